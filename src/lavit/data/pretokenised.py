"""Stage 2 on codes that `lavit tokenize-corpus` made beforehand (data/bulk.py), for data too large to encode in a training.

Codes are all that writing needs; reading needs features, which are not kept there, so such a training has [text, image],
edits and text alone. The codes must be of the run's own tokenizer: its hash is compared.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from lavit.config import InputError, VisionConfig
from lavit.data.bulk import load_tokens
from lavit.data.corpus import Corpus
from lavit.data.features import Features
from lavit.sequence import VisualTokens


def corpus_codes(
    folder: str | Path, corpus: Corpus, data: str | Path, *, tokenizer: str
) -> tuple[tuple[int, ...], ...]:
    """Codes of every picture of a corpus, in its order, from a folder of tokens of the source `data`.

    `tokenizer` is the `tokenizer_hash` of the run. Tokens of another tokenizer, and pictures that have none, raise
    `InputError`.
    """
    found = load_tokens(folder, tokenizer=tokenizer)
    parts = found.tokens.split()
    codes = dict(zip(found.names, parts, strict=True))
    root = Path(data).resolve()
    names = [_below(picture.record.name, root) for picture in corpus.pictures]
    missing = [name for name in names if name not in codes]
    if missing:
        raise InputError(
            f"{folder} has no tokens of {len(missing)} of {len(names)} pictures of {data} ({missing[0]}): "
            f"tokenise that source, lavit tokenize-corpus {data} --out {folder}"
        )
    return tuple(tuple(codes[name].tolist()) for name in names)


def nothing_read(vision: VisionConfig) -> tuple[Features, VisualTokens]:
    """Features and tokens of no picture, for trainings that read none."""
    nothing = torch.zeros(0, dtype=torch.long)
    features = Features(np.zeros((0, vision.patches, vision.dim), dtype=np.float16))
    return features, VisualTokens(nothing, nothing, torch.zeros(0, vision.patches, dtype=torch.bool))


def _below(name: str, root: Path) -> str:
    """A record's name as data/bulk.py keeps it: below its source."""
    try:
        return Path(name).resolve().relative_to(root).as_posix()
    except (ValueError, OSError):
        return name.removeprefix(str(root))
