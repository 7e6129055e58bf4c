"""LaVIT, all of it on one page: images become tokens, one LM reads and writes them, and back.

    image ─ vision ─ selector ─ merger ─ codebook ─┐
            └────────── tokenizer ──────────┘      ├─ language ─ codes ─ tokenizer.decode ─ pixels
    text ─ text tokenizer ─────────────────────────┘         └─ text

The model is pure: it holds parts and composes them. Prompts and sampling are the pipeline's
(generate/). Parts are read when they are first used: a caption never loads the pixel decoder.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from PIL.Image import Image
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from lavit.config import InputError, ModelConfig, from_json, read_json, to_json, write_json
from lavit.modules.language import Language
from lavit.modules.selector import KeepPolicy
from lavit.modules.tokenizer import VisualTokenizer
from lavit.modules.vision import Vision, load_vision, save_vision
from lavit.sequence import VisualTokens
from lavit.storage import (
    load_language,
    load_strictly,
    load_tensors,
    model_folder,
    replacing,
    save_language,
    save_tensors,
)

if TYPE_CHECKING:  # diffusers takes seconds to import, and only pixels need it
    from lavit.modules.pixels import Pixels

log = logging.getLogger(__name__)
PARTS = ("vision", "tokenizer", "language", "pixels")
EXACT = ("vision", "tokenizer")  # in fp32 as in training, so that rounding flips no choice


class LaVIT(nn.Module):
    """Vision, tokenizer, language and pixels under one configuration.

    Give parts to the constructor, or a `folder` from which missing ones are read at first use.
    `place_language` brings a language part that was read to its devices and number type; without it
    that moves as the other parts do.
    """

    def __init__(
        self,
        config: ModelConfig,
        parts: dict[str, nn.Module] | None = None,
        *,
        text: PreTrainedTokenizerBase | None = None,
        folder: Path | None = None,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
        place_language: Callable[[Language], Language] | None = None,
    ) -> None:
        super().__init__()
        self.config = config
        self.folder = folder
        self.device, self.dtype = torch.device(device), dtype
        self.parts = nn.ModuleDict(parts or {})
        self._text = text
        self._place_language = place_language

    @property
    def vision(self) -> Vision:
        """The frozen encoder."""
        return self._part("vision")

    @property
    def tokenizer(self) -> VisualTokenizer:
        """Selector, merger, codebook, reconstructor."""
        return self._part("tokenizer")

    @property
    def language(self) -> Language:
        """The LM with its joint vocabulary."""
        return self._part("language")

    @property
    def pixels(self) -> Pixels:
        """The diffusion decoder."""
        return self._part("pixels")

    @property
    def text(self) -> PreTrainedTokenizerBase:
        """The LM's own text tokenizer."""
        if self._text is None:
            self._part("language")
        return self._text

    def _part(self, name: str) -> Any:
        if name not in self.parts:
            if self.folder is None:
                raise InputError(f"this model has no {name}: give one, or train the {name} stage")
            part = self._load(name, self.folder)
            if name == "language" and self._place_language is not None:
                part = self._place_language(part)
            else:
                part = part.to(self.device, torch.float32 if name in EXACT else self.dtype)
            self.parts[name] = part.eval()
        return self.parts[name]

    def _load(self, name: str, folder: Path) -> nn.Module:
        if name == "vision":
            return load_vision(self.config.vision, folder / "vision")
        if name == "tokenizer":
            tokenizer = VisualTokenizer(self.config.tokenizer)
            where = folder / "tokenizer" / "model.safetensors"
            tensors = load_tensors(where)
            told = {"codebook.vectors", "codebook.mass"} <= tensors.keys()
            if told and "codebook.sums" not in tensors:
                mass = tensors["codebook.mass"][:, None]  # shipped models leave the sums out
                tensors["codebook.sums"] = tensors["codebook.vectors"] * mass
            load_strictly(tokenizer, tensors, where)
            return tokenizer
        if name == "language":
            if (folder / "language").is_dir() and not (folder / "reader").is_dir():
                said = f"{folder} has no reader for pictures (reader/ is missing)"
                raise InputError(f"{said}: copy it there, or train the language stage again")
            language, self._text = load_language(self.config, folder)
            return language
        if not (folder / "pixels").is_dir():
            raise InputError(f"{folder} has no pixel decoder: lavit train pixels --out {folder}")
        from lavit.modules.pixels import Pixels

        return Pixels.load(folder / "pixels", self.config.pixels)

    @torch.inference_mode()
    def patches(self, images: Sequence[Image]) -> Float[Tensor, "images patches dim"]:
        """Encoder features of pictures (RGB, any size; squashed to the encoder's)."""
        return self.vision.encode(images)

    @torch.inference_mode()
    def encode(
        self,
        images: Sequence[Image],
        policy: KeepPolicy | None = None,
        *,
        generator: torch.Generator | None = None,
    ) -> VisualTokens:
        """Pictures to visual tokens: the same picture, the same tokens, in training too."""
        return self.tokenizer.encode(self.patches(images), policy, generator=generator)

    @torch.inference_mode()
    def features(self, codes: Sequence[Tensor]) -> Float[Tensor, "images patches dim"]:
        """Reconstructed encoder features of images given as codes: what `pixels` paints."""
        lengths = torch.tensor([len(c) for c in codes], device=self.device)
        return self.tokenizer.decode(torch.cat(list(codes)).to(self.device), lengths)

    @classmethod
    def from_pretrained(
        cls,
        folder: str | Path,
        *,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
        place_language: Callable[[Language], Language] | None = None,
    ) -> LaVIT:
        """Open a model folder, a run or a model of this package ("nano"); parts load when used."""
        folder = model_folder(folder)
        config = from_json(ModelConfig, read_json(folder / "config.json"))
        return cls(config, folder=folder, device=device, dtype=dtype, place_language=place_language)

    def replace_base(self, source: str) -> None:
        """Put another language model (a path or hub id) under the adapter, before it is read."""
        language = self.config.language
        if not language.lora_rank or "language" in self.parts:
            raise InputError(f"{self.config.name} is no adapter over a base that could be replaced")
        said = "base weights: %s instead of %s, so the figures of this model do not apply"
        log.warning(said, source, language.source)
        self.config = replace(self.config, language=replace(language, source=source, sha256=None))

    def save_pretrained(self, folder: str | Path, *, parts: Sequence[str] = PARTS) -> None:
        """Write the configuration and the named parts; a part's folder is replaced as a whole."""
        folder = Path(folder)
        config = self.config
        if "vision" in parts:
            config = replace(config, vision=save_vision(self.vision, folder / "vision"))
        if "tokenizer" in parts:
            with replacing(folder / "tokenizer") as new:
                save_tensors(self.tokenizer.state_dict(), new / "model.safetensors")
        if "language" in parts:
            saved = save_language(self.language, self.text, config.language, folder)
            config = replace(config, language=saved)
        if "pixels" in parts:
            with replacing(folder / "pixels") as new:
                self.pixels.save(new)
        self.config = config
        write_json(folder / "config.json", to_json(config))
