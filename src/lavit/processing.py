"""Text and pictures to tensors, and back, for a training loop or application of one's own.

    processor = LaVITProcessor.from_pretrained("nano")
    inputs = processor(text="a red bar.", images=picture)  # pixel_values, parts
    patches = model.vision.encode_pixels(inputs["pixel_values"])
    tokens = model.visual_tokenizer.encode(patches)
    batch = processor.pack(inputs["parts"], tokens)
    loss = model(batch, patches[batch.images], tokens.keep[batch.images])

The processor has no weights, and how many tokens a picture has is the model's choice: documents are
packed once the codes of their pictures are known.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor
from transformers import AutoConfig, AutoTokenizer, BatchFeature, PreTrainedTokenizerBase

from lavit.config import InputError, ModelConfig, read_config
from lavit.images import ImageInput, open_image, pixels
from lavit.language.smollm2 import SMOLLM2, smollm2_config, smollm2_file
from lavit.layout import ImagePart, Part, TextPart, ids_of, reading, segments
from lavit.sequence import Batch, VisualTokens, lay_out, pack
from lavit.storage import model_folder, place_of_base
from lavit.vocabulary import MARKERS, Vocabulary

Ids = Int[Tensor, "rows tokens"] | Sequence[Sequence[int]]  # joint ids


@dataclass(frozen=True, eq=False)
class LaVITProcessor:
    """Pictures as the encoder takes them, documents as the language model does, and back.

    It needs no file of its own: config.json and the text tokenizer are saved with the model.
    """

    config: ModelConfig
    text_tokenizer: PreTrainedTokenizerBase
    vocabulary: Vocabulary

    @classmethod
    def from_pretrained(cls, model: str | Path, **hub: Any) -> LaVITProcessor:
        """Open the processor of a model by the model's name; `hub`: revision, cache_dir, token.

        Raises `InputError` where there is no such model, or its language part is not trained yet.
        """
        folder = model_folder(model, **hub, parts=("language",))
        config, where = read_config(folder), folder / "language"
        language, codes = config.language, config.visual_tokenizer.codes
        saved = language.source == "folder"  # it has the joint vocabulary then
        try:
            tokenizer = AutoTokenizer.from_pretrained(where)
            if language.source == SMOLLM2:
                architecture = smollm2_config(smollm2_file(language.sha256))
            else:
                architecture = AutoConfig.from_pretrained(place_of_base(language, where))
        except (OSError, ValueError) as error:
            line = str(error).splitlines()[0]
            raise InputError(f"{folder} has no language part that can be read: {line}") from error
        size = architecture.vocab_size - saved * (MARKERS + codes)
        return cls(config, tokenizer, Vocabulary(size, codes, tokenizer.eos_token_id))

    def __call__(
        self,
        text: str | Sequence[str] | None = None,
        images: ImageInput | Sequence[ImageInput] | None = None,
    ) -> BatchFeature:
        """Tensors of pictures, and the parts of documents about them.

        Returns `pixel_values` (fp32 [images 3 size size]) where there are images, and `parts`, a
        list for each text: a picture, by its number, and its caption, or text alone (layout.py has
        other kinds). Raises `InputError` for a bad picture, or texts that are not as many.
        """
        pictures = [images] if isinstance(images, ImageInput) else list(images or ())
        texts = [text] if isinstance(text, str) else list(text or ())
        if pictures and texts and len(pictures) != len(texts):
            raise InputError(f"{len(pictures)} pictures but {len(texts)} texts: give one for each")
        if not pictures:
            alone = [[TextPart(words, target=True, ends=True)] for words in texts]
            return BatchFeature({"parts": alone})
        vision, opened = self.config.vision, [open_image(picture) for picture in pictures]
        values = pixels(opened, vision.image_size, vision.mean, vision.std)
        parts = [reading(*pair) for pair in enumerate(texts)]
        return BatchFeature({"pixel_values": values, "parts": parts})

    def pack(self, parts: Sequence[Sequence[Part]], tokens: VisualTokens | None = None) -> Batch:
        """Documents, a row each: what `LaVIT.forward` takes. `tokens` are those of all `images`.

        Raises `InputError` where a picture has no codes, or nothing is a target.
        """
        known = [] if tokens is None else [tuple(codes.tolist()) for codes in tokens.split()]

        def codes(part: ImagePart) -> tuple[int, ...]:
            return known[part.image] if part.image < len(known) else ()

        ids, read_as = partial(ids_of, self.text_tokenizer), self.config.language.read_as
        lay = partial(segments, ids=ids, codes=codes, end=self.vocabulary.end, read_as=read_as)
        return pack([[lay_out(lay(one), self.vocabulary)] for one in parts], self.vocabulary)

    def batch_decode(self, ids: Ids, *, skip_special_tokens: bool = True) -> list[str]:
        """The text of each row, without pictures and, as a rule, special tokens."""
        texts = [[i for i in map(int, row) if i < self.vocabulary.text_size] for row in ids]
        how = {"skip_special_tokens": skip_special_tokens}
        return [str(self.text_tokenizer.decode(row, **how)) for row in texts]

    def batch_codes(self, ids: Ids) -> list[list[Int[Tensor, "kept"]]]:
        """The codes of the pictures of each row: each row is what `LaVIT.decode` takes."""
        known = self.vocabulary
        rows = (groupby(torch.as_tensor(row), lambda id: bool(known.is_code(id))) for row in ids)
        return [[known.codes_of(torch.stack([*run])) for code, run in row if code] for row in rows]
