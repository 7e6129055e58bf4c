"""Parity: the published modules at toy size, and what they compute, against ours.

A fixture is a safetensors file: `weights/<part>/<published name>`, inputs `in/…`, outputs `out/…`,
sizes as metadata. Our parts are built at those sizes, loaded through the converter's own tables
(strictly) and run on the inputs, each part on what ours before it gave. A fixture may lack parts
at the end of the chain, with their outputs.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Literal

import torch
from jaxtyping import Bool, Float
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from lavit.config import InputError, PixelsConfig, VisionConfig
from lavit.convert import names
from lavit.modules.codebook import Codebook
from lavit.modules.condition import HEADS, Condition
from lavit.modules.layers import Ragged
from lavit.modules.merger import Merger
from lavit.modules.reconstructor import Reconstructor
from lavit.modules.selector import Selector
from lavit.modules.tokenizer import VisualTokenizer
from lavit.modules.vision import load_vision
from lavit.storage import load_strictly

SMOOTHING = 1e-6  # of the published softmax
TOLERANCE = 1e-4  # relative; a merger of kept rows alone agrees to 5e-6
SIZES = ("dim", "heads", "grid", "image_size", "patch_size", "codes", "code_dim", "batch")
# parts in the order of the data, and the outputs that each computes
PARTS = {
    "vit": ("vit_tokens",),
    "selector": ("selector_log_probs",),
    "merger": ("merged_kept",),
    "encode_task_layer": ("code_input",),
    "vq": ("code_ids", "codes"),
    "decoder": ("decoder_norm_reconstruction", "context_512"),
    "highres_decoder": ("context_1024", "pooled_1024"),
}
OUTPUTS = tuple(output for outputs in PARTS.values() for output in outputs)


@dataclass(frozen=True)
class Result:
    """One output: ‖ours - theirs‖/‖theirs‖, for ids the share that differs; `ok` if it passes."""

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
    """Our parts on a fixture's inputs: one method per published part, which fills `ours`."""

    def __init__(self, fixture: Fixture) -> None:
        self.fixture = fixture
        self.ours: dict[str, Tensor] = {}

    def given(self, name: str) -> Tensor:
        """What an earlier part of ours gave."""
        if name not in self.ours:
            part = next(part for part, outputs in PARTS.items() if name in outputs)
            raise InputError(f"{self.fixture.path} has no weights/{part}, which a later part needs")
        return self.ours[name]

    @cached_property
    def keep(self) -> Tensor:
        """The 0/1 mask to use, as booleans [batch patches]; every picture must keep something."""
        sizes = self.fixture.sizes
        keep = self.fixture.input("keep", (sizes["batch"], sizes["grid"] ** 2)) > 0.5
        if not bool(keep.any(1).all()):
            raise InputError(f"{self.fixture.path}: in/keep keeps nothing of some picture")
        return keep

    @property
    def rows(self) -> Ragged:
        """Kept rows of the batch."""
        return Ragged(self.keep.sum(1))

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
        architecture = names.vision_architecture(
            dim=sizes["dim"],
            hidden=int(self.ratio("vit") * sizes["dim"]),
            depth=depth,
            heads=sizes["heads"],
            image_size=sizes["image_size"],
            patch_size=sizes["patch_size"],
        )
        config = VisionConfig(
            source="random",
            image_size=sizes["image_size"],
            grid=sizes["grid"],
            dim=sizes["dim"],
            mean=(0.0,) * 3,
            std=(1.0,) * 3,
            architecture=architecture,
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
        self.ours["merged_kept"] = merger(self.given("vit_tokens")[:, 1:], self.keep)

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
        normed, condition = self._reconstruct("decoder", "cross")
        self.ours |= {"decoder_norm_reconstruction": normed, "context_512": condition.context}

    def highres_decoder(self) -> None:
        """The 1024-px reconstructor, its context and pooled vector."""
        _, condition = self._reconstruct("highres_decoder", "pooled")
        self.ours |= {"context_1024": condition.context, "pooled_1024": condition.pooled}

    def _reconstruct(self, part: str, kind: Literal["cross", "pooled"]) -> tuple[Tensor, Condition]:
        """Normed queries of a decoder, and what its condition head makes of the features."""
        sizes, weights = self.fixture.sizes, self.fixture.part(part)
        depth = names.depth_of(weights)
        reconstructor = Reconstructor(
            dim=sizes["dim"],
            heads=sizes["heads"],
            depth=depth,
            mlp_ratio=self.ratio(part),
            patches=sizes["grid"] ** 2,
            code_dim=sizes["code_dim"],
        )
        widths = {"cross": ("unet_proj.bias",), "pooled": ("unet_proj_1.bias", "unet_proj_2.bias")}[kind]
        found = [len(weights.get(name, ())) for name in widths]
        config = PixelsConfig(
            size=1,
            features_dim=sizes["dim"],
            patches=sizes["grid"] ** 2,
            condition=kind,
            condition_dim=found[0],
            pooled_dim=found[-1],
            pool_heads=sizes["heads"],
            unconditional="zeros",
        )
        both = nn.ModuleDict({"reconstructor": reconstructor, "head": HEADS[kind](config)})
        renames = (
            *names.under(names.reconstructor(depth), "", "reconstructor."),
            *names.under(names.condition(kind), "", "head."),
        )
        self.load(both, part, renames)
        rows = self.rows
        normed = reconstructor.normed(rows.pad(self.given("codes").float()), rows.valid)
        return normed, both["head"](reconstructor.to_features(normed), (1, 1))


@torch.no_grad()
def check_fixture(path: Path | str) -> list[Result]:
    """Hold our parts against a fixture, output by output.

    Raises `InputError` for a file that is no fixture, or whose weights do not map one to one onto
    our parts.
    """
    fixture = read_fixture(path)
    replay = Replay(fixture)
    for part, outputs in PARTS.items():
        wanted = [name for name in outputs if f"out/{name}" in fixture.tensors]
        if fixture.part(part):
            getattr(replay, part)()
        elif wanted:
            raise InputError(f"{fixture.path} has out/{wanted[0]} but no weights/{part} to compute it")
    return [
        _compare(name, replay.ours[name], fixture.tensors[f"out/{name}"])
        for name in OUTPUTS
        if f"out/{name}" in fixture.tensors
    ]


def _compare(name: str, ours: Tensor, theirs: Tensor) -> Result:
    if ours.shape != theirs.shape:
        raise InputError(f"out/{name} is {list(theirs.shape)}, our parts give {list(ours.shape)}")
    if not theirs.is_floating_point():
        error = float((ours != theirs).float().mean())
        return Result(name, error, error == 0.0)
    error = float((ours - theirs).double().norm() / theirs.double().norm().clamp(min=1e-30))
    return Result(name, error, error <= TOLERANCE)


@torch.no_grad()
def smoothing_effect(
    tokenizer: VisualTokenizer,
    patches: Float[Tensor, "images patches dim"],
    keep: Bool[Tensor, "images patches"],
) -> Float[Tensor, images]:
    """Per picture: relative difference that the published smoothing (1e-6) makes to merged rows.

    Ours leaves it out; on real weights it could matter where a masked logit towers above all
    allowed ones.
    """
    inputs = tokenizer.prepare(patches)
    ours = tokenizer.merger(inputs, keep).split(keep.sum(1).tolist())
    theirs = tokenizer.merger.masked(inputs, keep.to(inputs.dtype), dense=True, smoothing=SMOOTHING)[0]
    pairs = zip(ours, (rows[mask] for rows, mask in zip(theirs, keep, strict=True)), strict=True)
    return torch.stack([(a - b).norm() / b.norm() for a, b in pairs])
