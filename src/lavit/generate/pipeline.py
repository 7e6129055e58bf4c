# mypy: disable-error-code="overload-overlap"
# a string is a sequence of strings to a type checker; the first overload, of one input, takes it
"""What people call: pictures and words in, words and pictures out, one loaded model for all of it.

Prompts are laid out as in training (layout.py): a picture that is read enters as features, one that
stands in a prompt for a picture enters as its codes (method, Sec. 5). A verb takes one input and
gives one result, or a list and gives a list; its options are those of a `TypedDict` (options.py).
All inputs of a call are one batch of the engine. Input i takes seed + i: draw([a, b], seed=3) is
[draw(a, seed=3), draw(b, seed=4)], and draw([a] * 4) gives four drawings of a.

Each `stream_` verb gives an iterator of `Update`s (stream.py), whose `input` says which input they
belong to. What is wrong with inputs or options raises `InputError` at the call.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Unpack, overload

import torch
from PIL.Image import Image

from lavit.config import InputError
from lavit.conversation import Reply
from lavit.generate.options import (
    AskingOptions,
    ChatMessage,
    DrawingOptions,
    ImageList,
    KeepLike,
    Messages,
    MessagesList,
    OpenOptions,
    PictureSize,
    Pieces,
    PiecesList,
    RankedOptions,
    ReadingOptions,
    ReconstructionOptions,
    Seed,
    TextOptions,
    Written,
)
from lavit.generate.prompts import (
    answers_of,
    captions_of,
    drawings_of,
    edits_of,
    lay_prompt,
    mixtures_of,
    pictures_of,
    seeds_of,
)
from lavit.generate.protocols import UNANSWERABLE, answerable, refuses
from lavit.generate.runner import Runner, Work, message, shaped, words_and_pictures
from lavit.generate.score import ranked
from lavit.generate.stream import Update
from lavit.images import ImageInput, open_image
from lavit.sequence import VisualTokens
from lavit.visual_tokenizer.selector import KeepPolicy


class Pipeline(Runner):
    """A loaded LaVIT.

    `protocol` says how verbs sample and cut where a call does not: "default", "paper", "published",
    or a `Protocol`. `safety` (default: on for published weights): a written picture that the
    checker refuses raises `Refused`; `watermark` is text to hide in them. `compile` names a backend
    of torch.compile ("inductor", "cudagraphs") for the LM's step over a static cache: each number
    of lanes is compiled once, at first use. Pictures are given as paths, bytes, PIL images, arrays
    or tensors (`open_image`).
    """

    @overload
    def caption(self, images: ImageInput, **how: Unpack[ReadingOptions]) -> str: ...
    @overload
    def caption(self, images: ImageList, **how: Unpack[ReadingOptions]) -> list[str]: ...
    def caption(
        self, images: ImageInput | ImageList, **how: Unpack[ReadingOptions]
    ) -> str | list[str]:  # fmt: skip
        """Say what each picture shows, up to and without what cuts captions (`Protocol`)."""
        work = self._captions(images, **how)
        return shaped(self._texts(work), work.one)

    def stream_caption(
        self, images: ImageInput | ImageList, **how: Unpack[ReadingOptions]
    ) -> Iterator[Update]:  # fmt: skip
        """`caption`, as it is written."""
        return self._stream(self._captions(images, **how))

    def _captions(
        self,
        images: ImageInput | ImageList,
        *,
        keep: KeepLike = "auto",
        **how: Unpack[TextOptions],
    ) -> Work:
        inputs, protocol = captions_of(images, keep), self.protocol
        return self._words(inputs, protocol.caption, protocol.caption_ends, **how)

    @overload
    def ask(self, images: ImageInput, questions: str, **how: Unpack[AskingOptions]) -> str: ...
    @overload
    def ask(
        self, images: ImageList, questions: Sequence[str], **how: Unpack[AskingOptions]
    ) -> list[str]: ...  # fmt: skip
    def ask(
        self,
        images: ImageInput | ImageList,
        questions: str | Sequence[str],
        *,
        check_answerable: bool = False,
        **how: Unpack[ReadingOptions],
    ) -> str | list[str]:
        """Answer a question about each picture; lists are of the same length.

        check_answerable: as for VizWiz, ask first whether the question can be answered.
        """
        work = self._answers(images, questions, **how)
        said = self._texts(work)
        if check_answerable:
            asked = [questions] if isinstance(questions, str) else questions
            first = [answerable(question) for question in asked]
            able = self._texts(self._answers(pictures_of(images), first, **how))
            pairs = zip(said, able, strict=True)
            said = [UNANSWERABLE if refuses(answer) else text for text, answer in pairs]
        return shaped(said, work.one)

    def stream_ask(
        self,
        images: ImageInput | ImageList,
        questions: str | Sequence[str],
        **how: Unpack[ReadingOptions],
    ) -> Iterator[Update]:
        """`ask`, as it is written."""
        return self._stream(self._answers(images, questions, **how))

    def _answers(
        self,
        images: ImageInput | ImageList,
        questions: str | Sequence[str],
        *,
        keep: KeepLike = "auto",
        **how: Unpack[TextOptions],
    ) -> Work:
        inputs, protocol = answers_of(images, questions, keep), self.protocol
        return self._words(inputs, protocol.answer, protocol.answer_ends, **how)

    @overload
    def rank(
        self, images: ImageInput, among: Sequence[str], *, keep: KeepLike = ...
    ) -> list[str]: ...
    @overload
    def rank(
        self, images: ImageList, among: Sequence[str], *, keep: KeepLike = ...
    ) -> list[list[str]]: ...  # fmt: skip
    def rank(
        self,
        images: ImageInput | ImageList,
        among: Sequence[str],
        *,
        keep: KeepLike = "auto",
    ) -> list[str] | list[list[str]]:
        """The texts `among` as captions of each picture, the likeliest first.

        Likelihoods are of whole texts, with or without a full stop. Raises `InputError` for no
        texts, an empty one, or one that is there twice.
        """
        inputs = captions_of(images, keep)
        texts = [text.strip().removesuffix(".") for text in among]
        if not texts or not all(texts) or len(set(texts)) < len(texts):
            raise InputError("choose among one text or more, none empty and none twice")
        found: list[list[str]] = []
        for parts in inputs.parts:
            found.append(ranked(self.model, lay_prompt(self.model, parts), texts))
        return shaped(found, inputs.one)

    @overload
    def choose(self, images: ImageInput, among: Sequence[str], *, keep: KeepLike = ...) -> str: ...
    @overload
    def choose(
        self, images: ImageList, among: Sequence[str], *, keep: KeepLike = ...
    ) -> list[str]: ...
    def choose(
        self,
        images: ImageInput | ImageList,
        among: Sequence[str],
        *,
        keep: KeepLike = "auto",
    ) -> str | list[str]:
        """The likeliest of the texts `among` as the caption of each picture, as in `rank`."""
        found = self.rank(pictures_of(images), among, keep=keep)
        return shaped([texts[0] for texts in found], isinstance(images, ImageInput))

    @overload
    def complete(self, parts: Pieces, **how: Unpack[TextOptions]) -> str: ...
    @overload
    def complete(self, parts: PiecesList, **how: Unpack[TextOptions]) -> list[str]: ...
    def complete(
        self, parts: Pieces | PiecesList, **how: Unpack[TextOptions]
    ) -> str | list[str]:  # fmt: skip
        """Text that goes on from words (strings) and pictures (all else; a path is a `Path`)."""
        work = self._words(mixtures_of(parts, read=True), self.protocol.chat, **how)
        return shaped(self._texts(work), work.one)

    @overload
    def draw(self, prompts: str, **how: Unpack[RankedOptions]) -> Image: ...
    @overload
    def draw(self, prompts: Sequence[str], **how: Unpack[RankedOptions]) -> list[Image]: ...
    def draw(
        self, prompts: str | Sequence[str], **how: Unpack[RankedOptions]
    ) -> Image | list[Image]:  # fmt: skip
        """Draw each prompt; with `best_of`, the best of so many candidates."""
        return self._best(drawings_of(prompts), **how)

    def stream_draw(
        self,
        prompts: str | Sequence[str],
        *,
        previews: bool = False,
        **how: Unpack[DrawingOptions],
    ) -> Iterator[Update]:
        """`draw`, as it is written; `previews` adds pictures as they come out of the noise."""
        return self._stream(self.drawings(drawings_of(prompts), **how), previews)

    @overload
    def edit(
        self, images: ImageInput, instructions: str, **how: Unpack[RankedOptions]
    ) -> Image: ...  # fmt: skip
    @overload
    def edit(
        self, images: ImageList, instructions: Sequence[str], **how: Unpack[RankedOptions]
    ) -> list[Image]: ...  # fmt: skip
    def edit(
        self,
        images: ImageInput | ImageList,
        instructions: str | Sequence[str],
        **how: Unpack[RankedOptions],
    ) -> Image | list[Image]:
        """Make of each picture what its instruction says; lists are of the same length."""
        return self._best(edits_of(images, instructions), **how)

    def stream_edit(
        self,
        images: ImageInput | ImageList,
        instructions: str | Sequence[str],
        *,
        previews: bool = False,
        **how: Unpack[DrawingOptions],
    ) -> Iterator[Update]:
        """`edit`, as it is written; `previews` as in `stream_draw`."""
        return self._stream(self.drawings(edits_of(images, instructions), **how), previews)

    @overload
    def compose(self, parts: Pieces, **how: Unpack[RankedOptions]) -> Image: ...
    @overload
    def compose(self, parts: PiecesList, **how: Unpack[RankedOptions]) -> list[Image]: ...
    def compose(
        self, parts: Pieces | PiecesList, **how: Unpack[RankedOptions]
    ) -> Image | list[Image]:  # fmt: skip
        """Draw from words (strings) and pictures (all else; a path is a `Path`) in any order."""
        return self._best(mixtures_of(parts, read=False), **how)

    def stream_compose(
        self,
        parts: Pieces | PiecesList,
        *,
        previews: bool = False,
        **how: Unpack[DrawingOptions],
    ) -> Iterator[Update]:
        """`compose`, as it is written; `previews` as in `stream_draw`."""
        return self._stream(self.drawings(mixtures_of(parts, read=False), **how), previews)

    @overload
    def generate(self, parts: Pieces, **how: Unpack[OpenOptions]) -> Written: ...
    @overload
    def generate(self, parts: PiecesList, **how: Unpack[OpenOptions]) -> list[Written]: ...
    def generate(
        self, parts: Pieces | PiecesList, **how: Unpack[OpenOptions]
    ) -> Written | list[Written]:  # fmt: skip
        """Go on from words and pictures (as in `compose`) with words and pictures, in order.

        The model opens pictures by itself.
        """
        work = self._mixture(mixtures_of(parts, read=False), **how)
        found: list[Written] = [words_and_pictures(made) for made in self._run(work)]
        return shaped(found, work.one)

    @overload
    def chat(
        self, messages: Messages, *, out: Reply = ..., **how: Unpack[OpenOptions]
    ) -> ChatMessage: ...  # fmt: skip
    @overload
    def chat(
        self, messages: MessagesList, *, out: Reply = ..., **how: Unpack[OpenOptions]
    ) -> list[ChatMessage]: ...  # fmt: skip
    def chat(
        self,
        messages: Messages | MessagesList,
        *,
        out: Reply = "text",
        **how: Unpack[OpenOptions],
    ) -> ChatMessage | list[ChatMessage]:
        """Answer each conversation: messages in the form of Hugging Face chats (layout.py).

        The result is to be appended to the messages; its pictures carry their codes. out: "text",
        "image", or "auto", where the model opens pictures by itself. The options are those of
        `TextOptions`, `DrawingOptions` or `OpenOptions`; others raise `InputError`.
        """
        work = self.replies(messages, out, **how)
        return shaped([message(made) for made in self._run(work)], work.one)

    def stream_chat(
        self,
        messages: Messages | MessagesList,
        *,
        out: Reply = "text",
        previews: bool = False,
        **how: Unpack[OpenOptions],
    ) -> Iterator[Update]:
        """`chat`, as it is written; `previews` as in `stream_draw`."""
        return self._stream(self.replies(messages, out, **how), previews)

    def tokenize(
        self,
        images: ImageInput | ImageList,
        *,
        keep: KeepLike = "auto",
        seed: int = 0,
    ) -> VisualTokens:
        """Visual tokens of all pictures; `seed` is that of the policies that draw patches."""
        pictures = [open_image(picture) for picture in pictures_of(images)]
        generator = torch.Generator().manual_seed(seed)
        return self.model.encode_images(pictures, KeepPolicy.parse(keep), generator=generator)

    @overload
    def reconstruct(self, images: ImageInput, **how: Unpack[ReconstructionOptions]) -> Image: ...
    @overload
    def reconstruct(
        self, images: ImageList, **how: Unpack[ReconstructionOptions]
    ) -> list[Image]: ...  # fmt: skip
    def reconstruct(
        self,
        images: ImageInput | ImageList,
        *,
        seed: Seed = 0,
        keep: KeepLike = "auto",
        guidance: float | None = None,
        steps: int | None = None,
        size: PictureSize | None = None,
    ) -> Image | list[Image]:
        """Each picture through its visual tokens and back, without the language model."""
        self._ready(size)
        pictures = pictures_of(images)
        seeds = seeds_of(seed, len(pictures))
        each = zip(pictures, seeds, strict=True)
        codes = [self.tokenize(picture, keep=keep, seed=own).codes for picture, own in each]
        found = self.paint(codes, seeds=seeds, steps=steps, guidance=guidance, size=size)
        return shaped(found, isinstance(images, ImageInput))
