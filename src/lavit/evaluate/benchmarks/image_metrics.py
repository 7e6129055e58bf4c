"""How sets of pictures are compared: FID and KID by a given Inception file, CLIP's score.

FID       Heusel et al. 2017: Frechet distance of two Gaussians of Inception's pooled features
KID       Binkowski et al. 2018: squared MMD, cubic kernel, mean of 100 subsets of at most 1,000
CLIPScore Hessel et al. 2021: cosine of picture and words, at least 0; in points (x 100), which is
          what torchmetrics gives and what tables of text-to-image print; FID and KID have no unit

The Inception file is TorchScript, such as the field's `inception-2015-12-05.pt`: it takes uint8
pictures `[n, 3, h, w]` and resizes them itself. CLIP's folder is one of transformers.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor
from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD

from lavit.config import InputError
from lavit.files import pretrained
from lavit.images import levels, pixels

SUBSETS, SUBSET = 100, 1000  # of KID
BLANK = 256  # pixels of a picture that is tried when a network is opened


def frechet_distance(a: np.ndarray, b: np.ndarray) -> float:
    """FID of two sets of features `[pictures, dim]`."""
    mean_a, mean_b = a.mean(0), b.mean(0)
    cov_a, cov_b = np.atleast_2d(np.cov(a, rowvar=False)), np.atleast_2d(np.cov(b, rowvar=False))
    values, vectors = np.linalg.eigh(cov_a)
    root = (vectors * np.sqrt(values.clip(0))) @ vectors.T
    mixed = np.linalg.eigvalsh(root @ cov_b @ root)  # those of cov_a cov_b
    spread = np.trace(cov_a) + np.trace(cov_b) - 2 * np.sqrt(mixed.clip(0)).sum()
    return float(((mean_a - mean_b) ** 2).sum() + spread)


def kernel_distances(a: np.ndarray, b: np.ndarray) -> list[float]:
    """KID of each of 100 pairs of subsets of two sets of features; their mean is the figure."""
    rng = np.random.default_rng(0)
    size = min(SUBSET, len(a), len(b))
    found = []
    for _ in range(SUBSETS):
        x = a[rng.choice(len(a), size, replace=False)]
        y = b[rng.choice(len(b), size, replace=False)]
        found.append(squared_mmd(x, y))
    return found


def squared_mmd(x: np.ndarray, y: np.ndarray) -> float:
    """The unbiased squared MMD of two sets of equal size under KID's kernel (x.y / dim + 1)^3."""
    size, dim = x.shape

    def kernel(p: np.ndarray, q: np.ndarray) -> np.ndarray:
        return (p @ q.T / dim + 1) ** 3

    within = [(k.sum() - np.trace(k)) / (size * (size - 1)) for k in (kernel(x, x), kernel(y, y))]
    return float(sum(within) - 2 * kernel(x, y).mean())


class Inception:
    """The features of a TorchScript file."""

    def __init__(self, path: Path, device: torch.device) -> None:
        try:
            with warnings.catch_warnings():  # torch.jit is deprecated, the field's file is not
                warnings.simplefilter("ignore", DeprecationWarning)
                self.model = torch.jit.load(str(path), map_location=device).eval()
        except (RuntimeError, OSError, ValueError) as error:
            why = " ".join(str(error).split())[:120]
            said = f"{path} is not a TorchScript file ({why})"
            raise InputError(f"{said}: give one such as inception-2015-12-05.pt") from error
        self.device = device
        try:
            names = [argument.name for argument in self.model.forward.schema.arguments]
            self.options = {"return_features": True} if "return_features" in names else {}
            shape = self.features([Image.new("RGB", (BLANK, BLANK))] * 2).shape
        except Exception as error:  # a network of another kind fails in ways of its own
            why = " ".join(str(error).split())[-120:]
            raise InputError(f"{path} gives no features of uint8 pictures: {why}") from error
        if len(shape) != 2 or shape[0] != 2:
            raise InputError(f"{path} gives features of shape {shape}, expected [pictures, dim]")

    @torch.inference_mode()
    def features(self, images: Sequence[Image.Image]) -> np.ndarray:
        """Features `[pictures, dim]` (float64) of pictures that are squares of one size."""
        batch = levels(images, images[0].width).to(self.device)
        found: Tensor = self.model(batch, **self.options)
        return found.flatten(1).double().cpu().numpy()


class Clip:
    """CLIP of a transformers folder: how well words fit a picture."""

    def __init__(self, folder: Path, device: torch.device) -> None:
        from transformers import AutoTokenizer, CLIPModel

        if not (folder / "config.json").is_file():
            raise InputError(f"{folder} holds no config.json: give --clip a transformers folder")
        try:
            self.model: Any = pretrained(CLIPModel, folder, local_files_only=True)
            self.words = AutoTokenizer.from_pretrained(folder, local_files_only=True)
        except Exception as error:  # configurations, weights and tokenizers fail in their own ways
            why = " ".join(str(error).split())[:200]
            raise InputError(f"{folder} is not a transformers folder of CLIP: {why}") from error
        self.model.to(device).eval()
        try:
            self.score("a picture", Image.new("RGB", (BLANK, BLANK)))
        except Exception as error:  # as above, of parts that do not fit each other
            why = " ".join(str(error).split())[:200]
            raise InputError(f"{folder} scores no pair of words and picture: {why}") from error

    @torch.inference_mode()
    def scores(self, texts: Sequence[str], images: Sequence[Image.Image]) -> list[float]:
        """100 * max(0, cosine) of each pair. A text is cut at the context of CLIP."""
        config = self.model.config
        size, context = config.vision_config.image_size, config.text_config.max_position_embeddings
        squares = [ImageOps.fit(image, (size, size), Image.Resampling.BICUBIC) for image in images]
        batch = pixels(squares, size, OPENAI_CLIP_MEAN, OPENAI_CLIP_STD).to(self.model.device)
        how = {"padding": True, "truncation": True, "max_length": context, "return_tensors": "pt"}
        ids = self.words(list(texts), **how).to(self.model.device)
        out = self.model(**ids, pixel_values=batch)
        cosines = torch.nn.functional.cosine_similarity(out.text_embeds, out.image_embeds)
        return [100 * max(0.0, float(value)) for value in cosines]

    def score(self, text: str, image: Image.Image) -> float:
        """`scores` of one pair."""
        return self.scores([text], [image])[0]


def centre_square(image: Image.Image, side: int) -> Image.Image:
    """The largest square in the middle, resized (bicubic) to a side in pixels."""
    return ImageOps.fit(image, (side, side), Image.Resampling.BICUBIC)
