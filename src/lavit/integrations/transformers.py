"""LaVIT as an any-to-any model of transformers: text and pictures in, text or a picture out.

    import lavit.integrations.transformers  # registers what follows
    processor = AutoProcessor.from_pretrained(folder)
    model = AutoModelForMultimodalLM.from_pretrained(folder)
    ids = model.generate(**processor(text="a red star"), generation_mode="image", seed=0)
    pictures = model.decode_image_tokens(ids, seed=0)
    processor.post_process_multimodal_output(pictures, generation_mode="image")[0]

How many tokens a picture has is the model's choice. So in the processor's ids a picture is its
start and its end, and the model puts features between them where it writes text, codes where it
draws. Rows are padded on the left. Seeds are arguments: row i takes seed + i. No torchvision is
needed, but transformers' own `pipeline("any-to-any")` wants it of every model that reads pictures.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int, UInt8
from PIL import Image
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModelForMultimodalLM,
    AutoProcessor,
    BatchFeature,
    GenerationConfig,
    GenerationMixin,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    ProcessorMixin,
)

from lavit.config import MODEL_TYPE, InputError
from lavit.generate.options import Messages, MessagesList, PictureSize, Seed
from lavit.generate.prompts import (
    Prompt,
    conversations_of,
    looked_at,
    sampling_of_codes,
    seeds_of,
    turn_ends,
)
from lavit.generate.request import Request
from lavit.generate.rows import check_rows, check_written
from lavit.generate.runner import Runner
from lavit.generate.sampling import Sampling
from lavit.images import ImageInput, open_image, pixels
from lavit.layout import ImagePart, Part, ids_of, mixed
from lavit.model import LaVIT
from lavit.placement import Places, place
from lavit.processing import LaVITProcessor
from lavit.sequence import Image as Codes
from lavit.sequence import Text, lay_out
from lavit.visual_tokenizer.selector import KeepPolicy

log = logging.getLogger(__name__)
MARK = "<image>"  # stands for a picture in a text
MODES = ("text", "image")
# options that are as transformers' callers give them, since nothing else is done
USUAL: Mapping[str, Any] = {
    "add_generation_prompt": True, "continue_final_message": False, "tokenize": True,
    "return_dict": True, "return_tensors": "pt", "padding": True, "videos": None, "audio": None,
}  # fmt: skip
SAMPLING = {  # names of transformers, and of `Sampling`
    "max_new_tokens": "max_tokens", "min_new_tokens": "min_tokens", "num_beams": "beams",
    "guidance_scale": "guidance", "temperature": "temperature", "top_k": "top_k",
    "top_p": "top_p", "min_p": "min_p", "length_penalty": "length_penalty",
    "early_stopping": "early_stopping",
}  # fmt: skip
OWN = ("pad_token_id", "bos_token_id", "eos_token_id", "transformers_version")  # of the LM
FROM_AUTO = ("trust_remote_code", "adapter_kwargs", "_from_auto", "_from_pipeline")
InputIds = Int[Tensor, "rows tokens"]
OutputIds = Int[Tensor, "rows written"]


class LaVITConfig(PreTrainedConfig):
    """config.json as transformers reads it; the fields are those of `lavit.config.ModelConfig`."""

    model_type = MODEL_TYPE

    def __init__(self, **fields: Any) -> None:
        super().__init__(**fields)


class LaVITMultimodalProcessor(ProcessorMixin):
    """Texts, conversations and pictures to ids and pixel values, and back."""

    def __init__(self, inner: LaVITProcessor) -> None:
        self.inner = inner

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.inner.config.name!r})"

    @classmethod
    def from_pretrained(  # type: ignore[override]
        cls,
        model: str | Path,
        *,
        revision: str | None = None,
        cache_dir: str | Path | None = None,
        token: str | bool | None = None,
        **_: Any,
    ) -> LaVITMultimodalProcessor:
        """Open a model's processor: a folder or a hub's name; other options are the model's."""
        hub: dict[str, Any] = {"revision": revision, "cache_dir": cache_dir, "token": token}
        return cls(LaVITProcessor.from_pretrained(model, **hub))

    def save_pretrained(self, save_directory: str | Path, *_: Any, **__: Any) -> None:
        """Nothing, which is said: config.json and the text tokenizer are saved with the model."""
        if not (Path(save_directory) / "config.json").is_file():
            log.warning("a processor has no files: model.save_pretrained writes what it opens from")

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The text tokenizer."""
        return self.inner.text_tokenizer

    def __call__(
        self,
        text: str | Sequence[str] | None = None,
        images: ImageInput | Sequence[ImageInput] | None = None,
        **options: Any,
    ) -> BatchFeature:
        """`input_ids` and `attention_mask` [rows tokens], `pixel_values` [images 3 size size].

        Pictures stand where texts have `<image>`; without such marks before the only text, or one
        before each. Raises `InputError` where there are not as many pictures as places.
        """
        _check(options)
        pictures = [images] if isinstance(images, ImageInput) else list(images or ())
        texts = [text] if isinstance(text, str) else list(text or [""])
        if not any(MARK in words for words in texts):
            each = len(pictures) if len(texts) == 1 else int(len(pictures) == len(texts))
            texts = [MARK * each + words for words in texts]
        places = sum(words.count(MARK) for words in texts)
        if places != len(pictures):
            said = f"{len(pictures)} pictures for {places} places"
            raise InputError(f"{said}: write {MARK} where each stands, or give one for each text")
        given = iter(pictures)
        return self._batch([mixed(_pieces(words, given), read=True) for words in texts])

    def apply_chat_template(  # type: ignore[override]
        self,
        conversation: Messages | MessagesList,
        *,
        generation_mode: str = "text",
        processor_kwargs: Mapping[str, Any] | None = None,
        **options: Any,
    ) -> BatchFeature:
        """The same of conversations, up to where the reply of this mode begins."""
        _check(options)
        mode: Any = _mode((processor_kwargs or {}).get("generation_mode", generation_mode))
        return self._batch(conversations_of(conversation, self.tokenizer, mode).parts)

    def _batch(self, prompts: Sequence[Sequence[Part]]) -> BatchFeature:
        rows = [list(chain.from_iterable(map(self._ids, parts))) for parts in prompts]
        longest, end = max(map(len, rows)), self.inner.vocabulary.end
        ids = [[end] * (longest - len(row)) + row for row in rows]
        mask = [[0] * (longest - len(row)) + [1] * len(row) for row in rows]
        found = {"input_ids": torch.tensor(ids), "attention_mask": torch.tensor(mask)}
        parts = [part for parts in prompts for part in parts if isinstance(part, ImagePart)]
        if shown := [open_image(part.image) for part in parts if not _written(part)]:
            vision = self.inner.config.vision
            found["pixel_values"] = pixels(shown, vision.image_size, vision.mean, vision.std)
        return BatchFeature(found)

    def _ids(self, part: Part) -> tuple[int, ...]:
        """Ids of words, or of a picture: its codes, where it has some, between start and end."""
        known = self.inner.vocabulary
        if isinstance(part, ImagePart):
            codes = torch.tensor(part.codes if _written(part) else (), dtype=torch.long)
            return (known.image_start, *known.ids(codes).tolist(), known.image_end)
        return (*ids_of(self.tokenizer, part.text, part.controls), *[known.end] * part.ends)

    def batch_decode(self, ids: InputIds, skip_special_tokens: bool = True) -> list[str]:
        """The text of each row, without pictures."""
        return self.inner.batch_decode(ids, skip_special_tokens=skip_special_tokens)

    def post_process_multimodal_output(  # type: ignore[override]
        self,
        generated_outputs: Tensor,
        skip_special_tokens: bool = True,
        generation_mode: str | None = None,
    ) -> list[str] | list[Image.Image]:
        """Texts of ids, or PIL images of what `decode_image_tokens` gave."""
        if _mode(generation_mode or "text") == "text":
            return self.batch_decode(generated_outputs, skip_special_tokens)
        return [Image.fromarray(picture.cpu().numpy()) for picture in generated_outputs]


class LaVITForMultimodalLM(PreTrainedModel, GenerationMixin):
    """A LaVIT (`lavit`) that writes what `generation_mode` says."""

    config_class = LaVITConfig
    input_modalities = ("image", "text")  # type: ignore[assignment]
    output_modalities = ("image", "text")  # type: ignore[assignment]

    def __init__(
        self, config: LaVITConfig, lavit: LaVIT, *, protocol: str = "default",
        safety: bool | None = None,
    ) -> None:  # fmt: skip
        super().__init__(config)
        self.lavit = lavit
        self.training = lavit.training
        self.runner = Runner(lavit, protocol=protocol, safety=safety)

    @classmethod
    def from_pretrained(  # type: ignore[override]
        cls,
        model: str | Path,
        *,
        config: LaVITConfig | None = None,
        dtype: str | torch.dtype | None = None,
        device_map: Places | None = None,
        protocol: str = "default",
        safety: bool | None = None,
        **options: Any,
    ) -> LaVITForMultimodalLM:
        """Open a model: a folder or a name of the hub.

        dtype "auto" or None is chosen by the device; `device_map` is a device, "auto", or a map of
        the language model's layers. `options` are those of `LaVIT.from_pretrained`.
        """
        if isinstance(device_map, Mapping) or device_map == "auto":
            device, options["device_map"] = "auto", device_map
        else:
            device = device_map or "cpu"
        where, kind = place(device, None if dtype == "auto" else dtype)
        found = LaVIT.from_pretrained(model, dtype=kind, device=where, **_asked(options))
        config = config or LaVITConfig.from_pretrained(str(found.folder))
        return cls(config, found, protocol=protocol, safety=safety)

    def save_pretrained(  # type: ignore[override]
        self, save_directory: str | Path, **_: Any
    ) -> None:
        """Write the model as `LaVIT.save_pretrained` does."""
        self.lavit.save_pretrained(save_directory)

    def forward(self, *args: Any, **kwargs: Any) -> Float[Tensor, ""]:
        """The loss of packed rows, as `LaVIT.forward` gives it."""
        loss: Tensor = self.lavit(*args, **kwargs)
        return loss

    @torch.no_grad()
    def generate(  # type: ignore[override]
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        pixel_values: Tensor | None = None,
        *,
        generation_mode: str = "text",
        generation_config: GenerationConfig | None = None,
        seed: Seed = 0,
        **how: Any,
    ) -> OutputIds:
        """Go on from each row of `LaVITMultimodalProcessor`: [rows tokens], [images 3 size size].

        "text": the rows and what follows them, padded with the LM's end. "image": joint ids of the
        codes of one picture a row, padded with image end. Text is the likeliest where nothing else
        is said; pictures are sampled as the protocol says. Options are those of transformers in
        `SAMPLING`, and do_sample; others raise `InputError`.
        """
        mode: Any = _mode(generation_mode)
        known = self.lavit.language.vocabulary
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        check_rows(input_ids, mask, known, pixel_values)
        values = iter([] if pixel_values is None else pixel_values.split(1))
        rows = [row[kept.bool()].tolist() for row, kept in zip(input_ids, mask, strict=True)]
        prompts = [vars(self._prompt(row, values, read=mode == "text")) for row in rows]
        pad = how.pop("pad_token_id", None)
        sampling = self._sampling(mode, generation_config, how)
        stop = turn_ends(self.lavit)[1]
        requests = [
            Request(sampling=sampling, seed=own, mode=mode, stop=stop, **prompt)
            for own, prompt in zip(seeds_of(seed, len(prompts)), prompts, strict=True)
        ]
        done = self.runner.engine.complete(requests)
        if mode == "image":
            codes = [known.ids(torch.tensor(one.images[0])).tolist() for one in done]
            return _padded(codes, known.image_end).to(input_ids.device)
        texts = _padded([list(one.text) for one in done], known.end if pad is None else pad)
        return torch.cat([input_ids, texts.to(input_ids.device)], dim=1)

    def _prompt(self, row: list[int], values: Iterator[Tensor], *, read: bool) -> Prompt:
        """Ids of a row; pictures without codes are looked at, in order, and `read` or encoded."""
        model, known = self.lavit, self.lavit.language.vocabulary
        read = read and model.config.language.read_as == "features"
        document: list[Text | Codes] = []
        features: list[Tensor] = []
        while known.image_start in row:
            start, end = row.index(known.image_start), row.index(known.image_end)
            codes = known.codes_of(torch.tensor(row[start + 1 : end], dtype=torch.long)).tolist()
            document.append(Text(tuple(row[:start])))
            if not codes:
                model.needs("vision", "visual_tokenizer")
                patches = model.vision.encode_pixels(next(values))
                if read:
                    features.append(looked_at(model, patches, KeepPolicy()))
                    document.append(Codes((0,) * len(features[-1]), read=True))
                else:
                    codes = model.visual_tokenizer.encode(patches).codes.tolist()
            if codes:
                document.append(Codes(tuple(codes), read=False))
            row = row[end + 1 :]
        laid = lay_out((*document, Text(tuple(row))), known)
        return Prompt(laid.ids, laid.slots, torch.cat(features) if features else None)

    def _sampling(
        self, mode: str, config: GenerationConfig | None, how: dict[str, Any]
    ) -> Sampling:
        """What the protocol says, and over it what is set in `config` and in `how`."""
        said = (config or self.generation_config).to_diff_dict()
        asked = how if config is None else {**said, **how}
        if unknown := sorted(asked.keys() - {*SAMPLING, *OWN, "do_sample"}):
            raise InputError(f"generate takes no {unknown[0]}: use {', '.join(SAMPLING)}")
        protocol = self.runner.protocol
        usual = protocol.chat
        if mode == "image":
            usual = sampling_of_codes(self.lavit, protocol, None, None)
        given = {**said, **how}
        ours = {SAMPLING[name]: given[name] for name in SAMPLING if given.get(name) is not None}
        if mode == "image" and "max_tokens" in ours:  # no picture has more
            ours["max_tokens"] = min(ours["max_tokens"], self.lavit.config.visual_tokenizer.patches)
        if given.get("do_sample") is False:
            ours["temperature"] = 0.0
        elif given.get("do_sample") and not usual.temperature:
            ours.setdefault("temperature", 1.0)
        return replace(usual, **ours)

    def decode_image_tokens(
        self,
        image_tokens: Tensor,
        seed: Seed = 0,
        *,
        steps: int | None = None,
        guidance: float | None = None,
        size: PictureSize | None = None,
    ) -> UInt8[Tensor, "images height width 3"]:
        """The picture of each row [rows written] of `generate`; its noise is that of seed + i."""
        known = self.lavit.language.vocabulary
        check_written(image_tokens, known)
        codes = [known.codes_of(row[known.is_code(row)]) for row in image_tokens]
        seeds = seeds_of(seed, len(codes))
        painted = self.runner.paint(codes, seeds=seeds, steps=steps, guidance=guidance, size=size)
        return torch.stack([torch.from_numpy(np.array(picture)) for picture in painted])


def _written(part: ImagePart) -> bool:
    """True where a picture enters as the codes that it came with."""
    return not part.read and part.codes is not None


def _pieces(words: str, pictures: Iterator[ImageInput]) -> list[Any]:
    """Words and pictures of a text with marks, in order."""
    first, *others = words.split(MARK)
    pieces: list[Any] = [first]
    for after in others:
        picture = next(pictures)
        pieces += [Path(picture) if isinstance(picture, str) else picture, after]
    return [piece for piece in pieces if not isinstance(piece, str) or piece] or [""]


def _padded(rows: Sequence[list[int]], filler: int) -> OutputIds:
    longest = max(map(len, rows))
    return torch.tensor([row + [filler] * (longest - len(row)) for row in rows])


def _mode(mode: str) -> str:
    if mode not in MODES:
        raise InputError(f"generation_mode is {mode!r}: use 'text' or 'image'")
    return mode


def _check(options: Mapping[str, Any]) -> None:
    """Raise `InputError` for an option of transformers' processors that is not the usual one."""
    for name, value in options.items():
        if name not in USUAL or value != USUAL[name]:
            raise InputError(f"{name}={value!r} is not served: leave it out")


def _asked(options: Mapping[str, Any]) -> dict[str, Any]:
    """Options without those that transformers' auto classes and pipelines add by themselves."""
    asked = {name: value for name, value in options.items() if name not in FROM_AUTO}
    return {name: value for name, value in asked.items() if value not in (None, False)}


AutoConfig.register(MODEL_TYPE, LaVITConfig, exist_ok=True)
AutoProcessor.register(LaVITConfig, LaVITMultimodalProcessor, exist_ok=True)
AutoModelForMultimodalLM.register(LaVITConfig, LaVITForMultimodalLM, exist_ok=True)
