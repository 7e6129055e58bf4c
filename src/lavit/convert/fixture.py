"""Parity: the published modules at toy size, and what they compute, against ours.

A fixture is a safetensors file: `weights/<part>/<published name>`, inputs `in/…`, outputs `out/…`, sizes as metadata.
Our parts are built at those sizes, loaded through the converter's own tables (strictly) and run on the inputs, each
part on what ours before it gave. Where a part is absent, what it would have given is taken from the fixture.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from lavit.config import InputError, VisionConfig
from lavit.convert import names
from lavit.modules.codebook import Codebook
from lavit.modules.layers import Ragged
from lavit.modules.merger import Merger
from lavit.modules.reconstructor import Reconstructor
from lavit.modules.selector import Selector
from lavit.modules.vision import load_vision
from lavit.storage import load_strictly

TOLERANCE = 1e-4  # relative; a merger of kept rows alone agrees to 5e-6
SIZES = ("dim", "heads", "grid", "image_size", "patch_size", "codes", "code_dim", "batch")
PARTS = ("vit", "selector", "merger", "vq", "encode_task_layer", "decoder", "highres_decoder")
OUTPUTS = (
    "vit_tokens",
    "selector_log_probs",
    "merged_kept",
    "code_input",
    "code_ids",
    "codes",
    "decoder_norm_reconstruction",
    "context_512",
    "context_1024",
    "pooled_1024",
)


@dataclass(frozen=True)
class Result:
    """One output: ‖ours - theirs‖/‖theirs‖, or for ids the share that differs; `ok` says whether it passes."""

    name: str
    error: float
    ok: bool


@dataclass(frozen=True)
class Fixture:
    """Sizes and tensors of a fixture; `part` gives the published weights of one part."""

    path: Path
    sizes: dict[str, int]
    tensors: dict[str, Tensor]

    def part(self, name: str) -> dict[str, Tensor]:
        """Published weights of a part, fp32; empty where the fixture has none."""
        prefix = f"weights/{name}/"
        return {key[len(prefix) :]: value.float() for key, value in self.tensors.items() if key.startswith(prefix)}

    @cached_property
    def keep(self) -> Tensor:
        """The 0/1 mask to use, as booleans [batch patches]."""
        return self.input("keep", (self.sizes["batch"], self.sizes["grid"] ** 2)) > 0.5

    def input(self, name: str, shape: tuple[int, ...]) -> Tensor:
        """An input of that shape, else `InputError`."""
        found = self.tensors.get(f"in/{name}")
        if found is None or tuple(found.shape) != shape:
            given = "missing" if found is None else list(found.shape)
            raise InputError(f"{self.path}: in/{name} is {given}, expected {list(shape)}")
        return found.float()


def read_fixture(path: Path | str) -> Fixture:
    """Read a fixture; any other file raises `InputError`."""
    path = Path(path)
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a mapping)
    except FileNotFoundError as error:
        raise InputError(f"there is no file {path}") from error
    except (SafetensorError, OSError) as error:
        raise InputError(f"{path} is no parity fixture: not a safetensors file ({error})") from error
    try:
        sizes = {name: int(metadata[name]) for name in SIZES}
    except KeyError as error:
        raise InputError(f"{path} is no parity fixture: its metadata lacks {error}") from error
    except ValueError as error:
        raise InputError(f"{path} is no parity fixture: a size is no whole number ({error})") from error
    if min(sizes.values()) < 1 or sizes["dim"] % sizes["heads"]:
        raise InputError(f"{path}: sizes {sizes} cannot be built (heads must divide dim, all must be positive)")
    if sizes["image_size"] // sizes["patch_size"] != sizes["grid"]:
        raise InputError(f"{path}: {sizes['grid']} patches a side do not fit {sizes['image_size']} pixels")
    known = {f"in/{name}" for name in ("pixels", "keep")} | {f"out/{name}" for name in OUTPUTS}
    weights = tuple(f"weights/{part}/" for part in PARTS)
    strangers = sorted(name for name in tensors if name not in known and not name.startswith(weights))
    if strangers or not any(name.startswith("out/") for name in tensors):
        raise InputError(f"{path} is no parity fixture: unknown tensors {strangers[:3]}, or no outputs")
    return Fixture(path, sizes, tensors)


class Replay:
    """Our parts on a fixture's inputs: one method per published part, results collected under the outputs' names."""

    def __init__(self, fixture: Fixture) -> None:
        self.fixture = fixture
        self.ours: dict[str, Tensor] = {}

    def given(self, name: str) -> Tensor:
        """What an earlier part gave; the fixture's own value where that part is absent."""
        value = self.ours.get(name, self.fixture.tensors.get(f"out/{name}"))
        if value is None:
            raise InputError(f"{self.fixture.path}: neither out/{name} nor the weights that compute it are there")
        return value

    @property
    def rows(self) -> Ragged:
        """Kept rows of the batch."""
        lengths = self.fixture.keep.sum(1)
        if int(lengths.min()) < 1:
            raise InputError(f"{self.fixture.path}: in/keep keeps nothing of picture {int(lengths.argmin())}")
        return Ragged(lengths)

    def load(self, module: nn.Module, part: str, renames: names.Renames, aside: tuple[str, ...] = ()) -> None:
        """Load a part's published weights into our module, every tensor once."""
        weights = self.fixture.part(part)
        where = f"{self.fixture.path}: weights/{part}"
        ours = names.convert_all(weights, renames, where=where, aside=aside)
        load_strictly(module, ours, Path(where))

    def ratio(self, part: str) -> float:
        """MLP ratio that gives the part's hidden width exactly, whatever was rounded."""
        bias = self.fixture.part(part).get("blocks.0.mlp.fc1.bias")
        return 1.0 if bias is None else (len(bias) + 0.5) / self.fixture.sizes["dim"]

    def vit(self) -> None:
        """The encoder: last block before the norm, class token first."""
        sizes, weights = self.fixture.sizes, self.fixture.part("vit")
        depth = names.depth_of(weights)
        config = names.vision_config(
            dim=sizes["dim"],
            hidden=int(self.ratio("vit") * sizes["dim"]),
            depth=depth,
            heads=sizes["heads"],
            image_size=sizes["image_size"],
            patch_size=sizes["patch_size"],
        )
        vision = load_vision(config)
        self.load(vision.encoder, "vit", names.vision(depth), names.VISION_ASIDE)
        side = sizes["image_size"]
        self.ours["vit_tokens"] = vision.states(self.fixture.input("pixels", (sizes["batch"], 3, side, side)))[-1]

    def selector(self) -> None:
        """Two log-probabilities per patch."""
        selector = Selector(self.fixture.sizes["dim"])
        self.load(selector, "selector", names.selector())
        self.ours["selector_log_probs"] = selector(self.given("vit_tokens")[:, 1:])

    def merger(self) -> None:
        """Kept rows under the fixture's mask, image after image."""
        sizes, depth = self.fixture.sizes, names.depth_of(self.fixture.part("merger"))
        merger = Merger(sizes["dim"], sizes["heads"], depth, self.ratio("merger"))
        self.load(merger, "merger", names.merger(depth))
        assert self.rows.lengths.min() >= 1
        self.ours["merged_kept"] = merger(self.given("vit_tokens")[:, 1:], self.fixture.keep)

    def codebook(self) -> Codebook:
        """A codebook of the fixture's sizes, its weights still random."""
        sizes = self.fixture.sizes
        return Codebook(sizes["dim"], sizes["codes"], sizes["code_dim"])

    def encode_task_layer(self) -> None:
        """Merged rows in code space, before they are normalised."""
        codebook = self.codebook()
        self.load(codebook.to_code, "encode_task_layer", names.to_code())
        self.ours["code_input"] = codebook.to_code(self.given("merged_kept"))

    def vq(self) -> None:
        """Nearest codes, and their vectors."""
        codebook = self.codebook()
        rest = {name: value for name, value in codebook.state_dict().items() if name.startswith("to_code.")}
        weights = self.fixture.part("vq")
        ours = names.convert_all(weights, names.codebook(), where=f"{self.fixture.path}: weights/vq")
        load_strictly(codebook, ours | names.started_codebook(ours["vectors"]) | rest, self.fixture.path)
        vectors = torch.nn.functional.normalize(self.given("code_input"), dim=-1)
        self.ours["code_ids"] = codebook.index(vectors)
        self.ours["codes"] = codebook.vector(self.ours["code_ids"])

    def decoder(self) -> None:
        """The 512-px reconstructor and its context."""
        normed, features = self._reconstruct("decoder", names.condition("cross"))
        self.ours["decoder_norm_reconstruction"] = normed
        self.ours["context_512"] = self._condition("decoder", "cross", features)[0]

    def highres_decoder(self) -> None:
        """The 1024-px reconstructor, its context and pooled vector."""
        _, features = self._reconstruct("highres_decoder", names.condition("pooled"))
        context, pooled = self._condition("highres_decoder", "pooled", features)
        self.ours |= {"context_1024": context, "pooled_1024": pooled}
