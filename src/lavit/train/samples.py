"""What stage 2 says and draws of the same few pictures as it learns: lines of samples.jsonl.

Codes are written as numbers: painting them needs stage 3, which comes later.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from lavit.data.corpus import Corpus
from lavit.data.stream_documents import StreamingDocuments
from lavit.generate.engine import Engine
from lavit.generate.request import Request
from lavit.generate.sampling import Sampling
from lavit.layout import Part, drawing, reading
from lavit.sequence import Sequence, lay_out
from lavit.train.language import LanguageStage

PICTURES = 4
WORDS = 96  # tokens of a caption at most


class Samples:
    """Captions (greedy) and drawings (one seed) of a corpus's first pictures that have words."""

    def __init__(self, stage: LanguageStage, corpus: Corpus, text: PreTrainedTokenizerBase) -> None:
        self.stage, self.text = stage, text
        texts = [(n, one) for n, one in enumerate(corpus.pictures) if one.captions and one.prompts]
        self.pictures = texts[:PICTURES]

    @torch.no_grad()
    def __call__(self, step: int) -> list[dict[str, Any]]:
        """A line for each picture: its own words, the caption, the prompt and the codes drawn."""
        if not self.pictures:
            return []
        language = self.stage.module
        training = language.training
        language.eval()
        try:
            requests = [self._requests(number, picture) for number, picture in self.pictures]
            done = iter(Engine(language).complete([one for pair in requests for one in pair]))
        finally:
            language.train(training)
        return [
            {
                "picture": picture.record.name,
                "wanted": picture.captions[0],
                "caption": str(self.text.decode(list(said.text), skip_special_tokens=True)).strip(),
                "prompt": picture.prompts[0],
                "codes": list(drawn.images[0]),
            }
            for (_, picture), said, drawn in zip(self.pictures, done, done, strict=True)
        ]

    def _requests(self, number: int, picture: Any) -> tuple[Request, Request]:
        """Caption and drawing of a picture."""
        stage, at = self.stage, torch.tensor([number])
        language = stage.module
        device = language.rows.device
        assert stage.features is not None and stage.tokens is not None  # none without pictures
        patches, keep = stage.features.rows(at), stage.tokens.keep[at].to(device)
        seen, asked = self._laid(reading(number)), self._laid(drawing(picture.prompts[0]))
        said = Sampling(temperature=0.0, max_tokens=WORDS)
        caption = Request(ids=seen.ids, sampling=said)
        if language.read_as == "features":
            features = language.read(stage.tokenizer.prepare(patches).to(device), keep)
            caption = replace(caption, slots=seen.slots, features=features)
        most = keep.shape[1]
        drawn = Sampling(temperature=1.0, top_k=50, guidance=2.0, min_tokens=1, max_tokens=most)
        return caption, Request(ids=asked.ids, mode="image", sampling=drawn)

    def _laid(self, parts: list[Part]) -> Sequence:
        documents = self.stage.documents
        assert not isinstance(documents, StreamingDocuments)
        segments = documents.segments(parts, documents.codes.__getitem__)
        return lay_out(segments, documents.vocabulary)
