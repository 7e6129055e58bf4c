"""Parity: the published modules at toy size, and what they compute, against ours.

A fixture is a safetensors file: `weights/<part>/<published name>`, inputs `in/…`, outputs `out/…`,
sizes as metadata. Our parts are built at those sizes, loaded through the converter's own tables
(strictly) and run on the inputs, each part on what ours before it gave. A fixture may lack parts
at the end of the chain, with their outputs.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Literal

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from lavit.config import InputError, PixelsConfig, TokenizerConfig
from lavit.convert import names
from lavit.convert.sizes import vision_config
from lavit.files import load_strictly
from lavit.pixels.condition import HEADS, Condition
from lavit.vision.encoder import load_vision
from lavit.visual_tokenizer.layers import Ragged
from lavit.visual_tokenizer.tokenizer import VisualTokenizer

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


@dataclass(frozen=True)
class Result:
    """One output: ‖ours - theirs‖/‖theirs‖, for ids the share that differs; `ok` if it passes."""

    name: str
    error: float
    ok: bool


@torch.no_grad()
def check_fixture(path: Path | str) -> list[Result]:
    """Hold our parts against a fixture, output by output.

    Raises `InputError` for a file that is not a fixture, or whose weights do not map one to one
    onto our parts.
    """
    replay = Replay(Path(path))
    results = []
    for part, outputs in PARTS.items():
        wanted = [name for name in outputs if f"out/{name}" in replay.tensors]
        if wanted or part in replay.weights:
            ours = getattr(replay, part)()
            replay.ours |= dict(zip(outputs, ours, strict=True))
        results += [_compare(n, replay.ours[n], replay.tensors[f"out/{n}"]) for n in wanted]
    return results


def _compare(name: str, ours: Tensor, theirs: Tensor) -> Result:
    if ours.shape != theirs.shape:
        raise InputError(f"out/{name} is {list(theirs.shape)}, our parts give {list(ours.shape)}")
    if not theirs.is_floating_point():
        error = float((ours != theirs).float().mean())
        return Result(name, error, error == 0.0)
    error = float((ours - theirs).double().norm() / theirs.double().norm().clamp(min=1e-30))
    return Result(name, error, error <= TOLERANCE)


class Replay:
    """Our parts on a fixture's inputs: a method per published part, which gives its outputs.

    A file that is no fixture raises `InputError`.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.ours: dict[str, Tensor] = {}
        self.weights: dict[str, dict[str, Tensor]] = {}
        try:
            with safe_open(path, "pt") as file:
                metadata = file.metadata() or {}
                self.tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            self.sizes = sizes = SimpleNamespace(**{name: int(metadata[name]) for name in SIZES})
        except (SafetensorError, OSError) as error:
            raise InputError(f"{path} is not a parity fixture: {error}") from error
        except (KeyError, ValueError) as error:
            raise InputError(
                f"{path} is not a parity fixture: size in metadata: {error}"
            ) from error
        if min(vars(sizes).values()) < 1 or sizes.dim % sizes.heads:
            raise InputError(f"{path}: {sizes} cannot be built (heads must divide dim)")
        if sizes.image_size // sizes.patch_size != sizes.grid:
            raise InputError(f"{path}: {sizes} cannot be built (image and patches do not fit)")
        known = {f"out/{name}" for outputs in PARTS.values() for name in outputs}
        for name, tensor in self.tensors.items():
            kind, _, rest = name.partition("/")
            part, _, inner = rest.partition("/")
            if kind == "weights" and part in PARTS:
                self.weights.setdefault(part, {})[inner] = tensor.float()
            elif name not in known | {"in/pixels", "in/keep"}:
                raise InputError(f"{path} is not a parity fixture: unknown tensors such as {name}")
        if not known & self.tensors.keys():
            raise InputError(f"{path} is not a parity fixture: no outputs")

    def part(self, name: str) -> dict[str, Tensor]:
        """Published weights of a part, fp32."""
        if name not in self.weights:
            raise InputError(f"{self.path} has no weights/{name}, which its outputs need")
        return self.weights[name]

    def given(self, name: str) -> Tensor:
        """What an earlier part of ours gave."""
        if name not in self.ours:
            self.part(next(part for part, outputs in PARTS.items() if name in outputs))
        return self.ours[name]

    def input(self, name: str, *shape: int) -> Tensor:
        """An input of that shape for each picture of the batch, else `InputError`."""
        found, expected = self.tensors.get(f"in/{name}"), [self.sizes.batch, *shape]
        if found is None or list(found.shape) != expected:
            given = "missing" if found is None else list(found.shape)
            raise InputError(f"{self.path}: in/{name} is {given}, expected {expected}")
        return found.float()

    @property
    def keep(self) -> Tensor:
        """The 0/1 mask to use, as booleans [batch patches]; every picture must keep something."""
        keep = self.input("keep", self.sizes.grid**2) > 0.5
        if not bool(keep.any(1).all()):
            raise InputError(f"{self.path}: in/keep keeps nothing of some picture")
        return keep

    def load(self, module: nn.Module, part: str, renames: names.Renames) -> None:
        """Load a part's published weights into our module, every tensor once."""
        where = f"{self.path}: weights/{part}"
        aside = names.VISION_ASIDE if part == "vit" else ()
        ours = names.convert_all(self.part(part), renames, where=where, aside=aside)
        load_strictly(module, ours, Path(where))

    def tokenizer(self, part: str) -> VisualTokenizer:
        """Our tokenizer at the fixture's sizes, its blocks as a published part has them."""
        weights, sizes = self.part(part), self.sizes
        depth, hidden = names.depth_of(weights), len(weights.get("blocks.0.mlp.fc1.bias", ()))
        config = TokenizerConfig(
            dim=sizes.dim,
            patches=sizes.grid**2,
            heads=sizes.heads,
            merger_depth=depth,
            reconstructor_depth=depth,
            mlp_ratio=(hidden + 0.5) / sizes.dim,  # gives the width exactly, whatever was rounded
            codes=sizes.codes,
            code_dim=sizes.code_dim,
        )
        return VisualTokenizer(config)

    def vit(self) -> tuple[Tensor]:
        """The encoder: last block before the norm, class token first."""
        weights, side = self.part("vit"), self.sizes.image_size
        try:
            config = vision_config(weights)
        except (KeyError, ValueError) as error:
            raise InputError(f"{self.path}: weights/vit: {error}") from error
        given = {"num_attention_heads": self.sizes.heads, "image_size": side}
        architecture = config.architecture | given
        vision = load_vision(replace(config, source="random", architecture=architecture))
        self.load(vision.encoder, "vit", names.vision(names.depth_of(weights)))
        return (vision.states(self.input("pixels", 3, side, side))[-1],)

    def selector(self) -> tuple[Tensor]:
        """Two log-probabilities per patch."""
        selector = self.tokenizer("selector").selector
        self.load(selector, "selector", names.selector())
        return (selector(self.given("vit_tokens")[:, 1:]),)

    def merger(self) -> tuple[Tensor]:
        """Kept rows under the fixture's mask, image after image."""
        merger = self.tokenizer("merger").merger
        self.load(merger, "merger", names.merger(len(merger.blocks)))
        return (merger(self.given("vit_tokens")[:, 1:], self.keep),)

    def encode_task_layer(self) -> tuple[Tensor]:
        """Merged rows in code space, before they are normalised."""
        to_code = self.tokenizer("encode_task_layer").codebook.to_code
        self.load(to_code, "encode_task_layer", names.to_code())
        return (to_code(self.given("merged_kept")),)

    def vq(self) -> tuple[Tensor, Tensor]:
        """Nearest codes, and their vectors."""
        codebook, where = self.tokenizer("vq").codebook, f"{self.path}: weights/vq"
        ours = names.convert_all(self.part("vq"), names.codebook(), where=where)
        load_strictly(codebook, codebook.state_dict() | ours, Path(where))
        ids = codebook.index(F.normalize(self.given("code_input"), dim=-1))
        return ids, codebook.vector(ids)

    def decoder(self) -> tuple[Tensor, Tensor | None]:
        """The 512-px reconstructor's normed queries, and its context."""
        normed, condition = self._reconstruct("decoder", "cross", "unet_proj", "unet_proj")
        return normed, condition.context

    def highres_decoder(self) -> tuple[Tensor | None, Tensor | None]:
        """The 1024-px decoder's context and pooled vector."""
        projections = "unet_proj_1", "unet_proj_2"
        _, condition = self._reconstruct("highres_decoder", "pooled", *projections)
        return condition.context, condition.pooled

    def _reconstruct(
        self,
        part: str,
        kind: Literal["cross", "pooled"],
        narrow: str,
        wide: str,
    ) -> tuple[Tensor, Condition]:
        """Normed queries of a decoder, and what its condition head makes of the features."""
        weights, reconstructor = self.part(part), self.tokenizer(part).reconstructor
        config = PixelsConfig(
            size=1,
            features_dim=self.sizes.dim,
            patches=self.sizes.grid**2,
            condition=kind,
            condition_dim=len(weights.get(f"{narrow}.bias", ())),
            pooled_dim=len(weights.get(f"{wide}.bias", ())),
            pool_heads=self.sizes.heads,
            unconditional="zeros",
        )
        both = nn.ModuleDict({"reconstructor": reconstructor, "head": HEADS[kind](config)})
        renames = (
            *names.under(names.reconstructor(len(reconstructor.blocks)), "", "reconstructor."),
            *names.under(names.condition(kind), "", "head."),
        )
        self.load(both, part, renames)
        normed: list[Tensor] = []
        reconstructor.norm.register_forward_hook(lambda _, __, out: normed.append(out))
        rows = Ragged(self.keep.sum(1))
        features = reconstructor(rows.pad(self.given("codes").float()), rows.valid)
        return normed[0], both["head"](features, (1, 1))
