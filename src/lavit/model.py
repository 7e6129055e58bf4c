"""LaVIT, all of it on one page: images become tokens, one LM reads and writes them, and back.

    image ─ vision ─ selector ─ merger ─ codebook ─┐
            └───────── visual_tokenizer ────┘      ├─ language ─ codes ─ decode ─ pixels
    text ─ text_tokenizer ─────────────────────────┘         └─ text

The model is pure: it holds parts and composes them. Prompts and sampling are the pipeline's
(generate/). A part that was left out by name, or is not trained yet, is None.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, cast

import torch
from jaxtyping import Float
from PIL.Image import Image
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from lavit.config import PARTS, InputError, ModelConfig, read_config, write_config
from lavit.files import replacing, save_tensors
from lavit.language.lora import merge_lora
from lavit.language.model import Language
from lavit.placement import Places, placer
from lavit.sequence import Batch, VisualTokens
from lavit.storage import (
    has_part,
    load_language,
    load_visual_tokenizer,
    model_folder,
    over_base,
    save_language,
)
from lavit.vision.encoder import Vision, load_vision, save_vision
from lavit.visual_tokenizer.layers import Keep, Patches
from lavit.visual_tokenizer.selector import KeepPolicy
from lavit.visual_tokenizer.tokenizer import VisualTokenizer

if TYPE_CHECKING:  # diffusers takes seconds to import, and only pixels need it
    from huggingface_hub import CommitInfo

    from lavit.pixels.decoder import Pixels

EXACT = ("vision", "visual_tokenizer")  # in fp32 as in training, so that rounding flips no choice
TRAINED_BY = {"vision": "tokenizer", "visual_tokenizer": "tokenizer"}  # else the stage of its name
PUSHED = (
    "README.md",
    "training.json",
    "safety_checker",
)  # files and folders that go with the parts


class LaVIT(nn.Module):
    """Vision, visual tokenizer, language and pixels under one configuration.

    Encoder and visual tokenizer stay in fp32 whatever the model is moved to (`.half()`,
    `.to(dtype)`): rounding would flip their choices. `text_tokenizer` is the language model's own;
    `folder` is where the model was read from.
    """

    vision: Vision  # the frozen encoder
    visual_tokenizer: VisualTokenizer  # selector, merger, codebook, reconstructor
    language: Language  # the LM with its joint vocabulary
    pixels: Pixels  # the diffusion decoder
    text_tokenizer: PreTrainedTokenizerBase  # of the LM

    def __init__(
        self,
        config: ModelConfig,
        *,
        vision: nn.Module | None = None,
        visual_tokenizer: nn.Module | None = None,
        language: nn.Module | None = None,
        pixels: nn.Module | None = None,
        text_tokenizer: PreTrainedTokenizerBase | None = None,
        folder: Path | None = None,
    ) -> None:
        super().__init__()
        self.config, self.folder = config, folder
        self.text_tokenizer = cast("PreTrainedTokenizerBase", text_tokenizer)  # None: no language
        self.left_out: tuple[str, ...] = ()  # parts that `from_pretrained` was not to load
        self.register_module("vision", vision)
        self.register_module("visual_tokenizer", visual_tokenizer)
        self.register_module("language", language)
        self.register_module("pixels", pixels)

    @property
    def device(self) -> torch.device:
        """Where the first part lies; the CPU without any."""
        return next((parameter.device for parameter in self.parameters()), torch.device("cpu"))

    @property
    def dtype(self) -> torch.dtype:
        """Number type of language and pixels; that of the exact parts where neither is there."""
        parts = [part for name, part in self.named_children() if name not in EXACT]
        found = (p.dtype for part in parts for p in part.parameters() if p.is_floating_point())
        return next(found, torch.float32)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> LaVIT:
        """What `.to`, `.half` and `.cuda` call; the exact parts keep their number type."""

        def moved(tensor: Tensor) -> Tensor:
            found = fn(tensor)
            return found if found.dtype == tensor.dtype else tensor.to(found.device)

        for name, part in self.named_children() if recurse else ():
            part._apply(moved if name in EXACT else fn)
        return self

    def needs(self, *parts: str) -> None:
        """Raise `InputError` unless the model has these parts; it says what to do."""
        _check_names(parts)
        for part in parts:
            if getattr(self, part) is not None:
                continue
            if part in self.left_out:
                said = f"the part {part!r} was left out when {self.folder} was opened"
                raise InputError(f"{said}: name it among `parts`")
            stage = TRAINED_BY.get(part, part)
            command = f"lavit train {stage} --out {self.folder or 'FOLDER'}"
            raise InputError(f"this model has no {part} yet: give one, or train it with {command}")

    @torch.no_grad()
    def patches(self, images: Sequence[Image]) -> Patches:
        """Encoder features (fp32) of pictures (RGB, any size; squashed to the encoder's)."""
        self.needs("vision")
        return self.vision.encode(images)

    @torch.no_grad()
    def encode_images(
        self,
        images: Sequence[Image],
        policy: KeepPolicy | None = None,
        *,
        generator: torch.Generator | None = None,
    ) -> VisualTokens:
        """Pictures to visual tokens: the same picture, the same tokens, in training too."""
        self.needs("vision", "visual_tokenizer")
        return self.visual_tokenizer.encode(self.patches(images), policy, generator=generator)

    def forward(
        self,
        batch: Batch,
        patches: Patches | None = None,
        keep: Keep | None = None,
    ) -> Float[Tensor, ""]:
        """Mean next-id cross-entropy over the targets of packed rows (Eq. 6); goes backward.

        `patches` (`patches()`) and `keep` (`VisualTokens.keep`) are those of the pictures that
        `batch.images` numbers, in that order; without them read pictures enter as their codes.
        Raises `InputError` where slots and features disagree.
        """
        self.needs("language")
        if patches is not None:
            self.needs("visual_tokenizer")
            patches = self.visual_tokenizer.prepare(patches).to(self.language.rows.dtype)
        loss = self.language(batch, patches, keep)
        return loss.total / (loss.text_tokens + loss.visual_tokens)

    @torch.no_grad()
    def decode(self, codes: Sequence[Tensor]) -> Float[Tensor, "images patches dim"]:
        """Reconstructed encoder features (fp32) of images given as codes: what `pixels` paints.

        Raises `InputError` for an image of no codes, or of more than there are patches.
        """
        self.needs("visual_tokenizer")
        device = next(self.visual_tokenizer.parameters()).device  # parts may lie apart
        lengths = torch.tensor([len(c) for c in codes], device=device)
        return self.visual_tokenizer.decode(torch.cat(list(codes)).to(device), lengths)

    @classmethod
    def from_pretrained(
        cls,
        model: str | Path,
        *,
        revision: str | None = None,
        cache_dir: str | Path | None = None,
        token: str | bool | None = None,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        device_map: Places | None = None,
        quantization: str | None = None,
        base: str | None = None,
        parts: Sequence[str] = PARTS,
    ) -> LaVIT:
        """Open a model whole: a folder, a shipped name ("nano") or one of the hub ("org/name").

        `revision`, `cache_dir` and `token` are huggingface_hub's. `parts` names what is loaded; a
        part that is left out, or not trained yet, is None. `device_map` ("auto", or a map) spreads
        the language model and `quantization` ("int8", "nf4") rounds it (placement.py); `base` is
        another language model, a path or hub id, under the adapter of a model that has one. Raises
        `InputError` where there is no such model, a part is damaged or the format is another.
        """
        _check_names(parts)
        device = torch.device(device)
        place = placer(device, dtype, quantization, device_map)
        folder = model_folder(
            model, revision=revision, cache_dir=cache_dir, token=token, parts=parts
        )
        config = read_config(folder)
        if base is not None:
            config = over_base(config, base)
        wanted = [part for part in parts if has_part(config, folder, part)]
        found = cls(config, folder=folder)
        found.left_out = tuple(part for part in PARTS if part not in parts)
        if "vision" in wanted:
            found.vision = load_vision(config.vision, folder / "vision", strict=True)
        if "visual_tokenizer" in wanted:
            found.visual_tokenizer = load_visual_tokenizer(config, folder)
        if "pixels" in wanted:
            from lavit.pixels.decoder import Pixels

            found.pixels = Pixels.load(folder / "pixels", config.pixels)
        found.to(device, dtype)
        if "language" in wanted:
            language, found.text_tokenizer = load_language(config, folder)
            found.language = place(language)
        return found.eval()

    def merge_adapter(self) -> None:
        """Add the language model's LoRA to its weights, if it has one: the same outputs."""
        self.needs("language")
        merge_lora(self.language.lm)
        self.config = replace(self.config, language=replace(self.config.language, lora_rank=0))

    def save_pretrained(self, folder: str | Path, *, parts: Sequence[str] | None = None) -> None:
        """Write the configuration and the named parts (default: all there are); changes no model.

        A part's folder is replaced as a whole. Where `folder` holds a model already, its
        configuration of the other parts stays. Raises `InputError` for a part that is not there.
        """
        folder = Path(folder)
        there = [part for part in PARTS if getattr(self, part) is not None]
        chosen = there if parts is None else parts
        self.needs(*chosen)
        config = self.config
        if (folder / "config.json").exists():
            old = read_config(folder)
            kept = {part: getattr(old, part) for part in PARTS if part not in chosen}
            config = replace(config, **kept)
        if "vision" in chosen:
            with replacing(folder / "vision") as new:  # empty for an encoder that is referenced
                config = replace(config, vision=save_vision(self.vision, new))
        if "visual_tokenizer" in chosen:
            with replacing(folder / "visual_tokenizer") as new:
                save_tensors(self.visual_tokenizer.state_dict(), new / "model.safetensors")
        if "language" in chosen:
            text = self.text_tokenizer
            saved = save_language(self.language, text, self.config.language, folder)
            config = replace(config, language=saved)
        if "pixels" in chosen:
            with replacing(folder / "pixels") as new:
                self.pixels.save(new)
        write_config(folder, config)

    def push_to_hub(
        self,
        repo_id: str,
        *,
        commit_message: str = "Upload a LaVIT model",
        private: bool | None = None,
        token: str | bool | None = None,
        revision: str | None = None,
        create_pr: bool = False,
    ) -> CommitInfo:
        """Save the model and upload it as `repo_id` ("org/name"); returns the commit, its address.

        The options are transformers': a new repository may be `private`, `revision` is a branch,
        made where there is none, `create_pr` asks its owner to take the commit. The card, the
        training's settings and the safety checker of its folder go with it. Raises `InputError`
        where the hub refuses, or cannot be reached.
        """
        from huggingface_hub import HfApi

        api = HfApi(token=token)
        with tempfile.TemporaryDirectory() as place:
            self.save_pretrained(place)
            beside = [] if self.folder is None else [self.folder / name for name in PUSHED]
            for source in beside:
                if source.is_dir():
                    shutil.copytree(source, Path(place) / source.name)
                elif source.exists():
                    shutil.copy(source, place)
            try:
                repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
                if revision and not create_pr:
                    api.create_branch(repo_id, branch=revision, exist_ok=True)
                return api.upload_folder(
                    repo_id=repo_id,
                    folder_path=place,
                    revision=revision,
                    commit_message=commit_message,
                    create_pr=create_pr,
                )
            except Exception as error:  # its client fails in ways of its own
                line = (str(error).strip() or type(error).__name__).splitlines()[0]
                said = f"cannot upload to {repo_id}: {line}"
                raise InputError(f"{said}; give a `token` that may write there") from error


def _check_names(parts: Sequence[str]) -> None:
    """Raise `InputError` for a name that no part has."""
    for part in parts:
        if part not in PARTS:
            raise InputError(f"there is no part {part!r}: use {', '.join(PARTS)}")
