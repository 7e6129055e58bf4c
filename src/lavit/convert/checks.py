"""Published parts that stay as they are, held against the libraries that will open them.

The language model, its tokenizer, UNet, autoencoder and scheduler are copied; here transformers and
diffusers build them on the meta device, from the new folder. So what `lavit draw` would refuse is
refused before, in the published folder's own names.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from diffusers import AutoencoderKL
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from lavit.config import InputError, PixelsConfig, read_json
from lavit.convert.folders import folder_tensors
from lavit.convert.sizes import check_shapes
from lavit.pixels.decoder import Pixels
from lavit.pixels.diffusion import UNet, class_of, noise_schedule, options
from lavit.vocabulary import MARKERS, Vocabulary


@contextmanager
def _published(place: str, folder: Path, what: str) -> Iterator[None]:
    """Whatever fails, as one line about a published part; libraries fail in ways of their own."""
    try:
        yield
    except Exception as error:
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        reason = reason.replace(str(folder), place)
        said = f"{place} {what}: {reason}"
        if isinstance(error, InputError):
            said = reason if place in reason else f"{place}: {reason}"
        raise InputError(said) from error


def check_language(folder: Path, width: int, codes: int) -> None:
    """Hold the LM's tensors against transformers' own model, and the tokenizer against its rows.

    `width` is what the reader leads to. Raises `InputError` where they do not agree.
    """
    place = "language_model"
    with _published(place, folder, "has a config.json that names no language model"):
        architecture = AutoConfig.from_pretrained(folder)
        with torch.device("meta"):
            expected = AutoModelForCausalLM.from_config(architecture).state_dict()
    check_shapes(expected, folder_tensors(folder), where=place)
    rows, visual = architecture.vocab_size, MARKERS + codes
    if rows <= visual:
        raise InputError(f"{place} has {rows} rows, but {visual} of them must be visual")
    if width != architecture.hidden_size:
        leads = f"visual_weight.bin: vit_proj leads to {width} channels"
        raise InputError(f"{place}/{leads}, the LM has {architecture.hidden_size}")
    with _published(place, folder, "has no tokenizer that opens"):
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
        if tokenizer.eos_token_id is None or not tokenizer("a picture")["input_ids"]:
            raise InputError(f"{place} has no tokenizer with words and an end token")
        Vocabulary(rows - visual, codes, tokenizer.eos_token_id)


def check_pixels(folder: Path, config: PixelsConfig, place: str) -> None:
    """Hold UNet, autoencoder and scheduler against diffusers' own; `InputError` if they differ."""
    found = {}
    for part, kind in (("unet", UNet), ("vae", AutoencoderKL)):
        with _published(place, folder, f"has a {part}/config.json that no {part} is built of"):
            said = read_json(folder / part / "config.json")
            with torch.device("meta"):
                found[part] = class_of(said, part, kind).from_config(options(said))
        tensors = folder_tensors(folder / part)
        found[part]._fix_state_dict_keys_on_load(tensors)  # old names, as when it is loaded
        check_shapes(found[part].state_dict(), tensors, where=f"{place}/{part}")
    with _published(place, folder, "has parts that do not go together"):
        schedule = noise_schedule(read_json(folder / "scheduler" / "scheduler_config.json"))
        with torch.device("meta"):
            Pixels(config, found["unet"], schedule, found["vae"])
