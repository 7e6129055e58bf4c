"""Every figure of a trained run, each with count, interval, floor and ceiling (`lavit eval RUN`).

Of a mixture the first source is read, written and drawn; the others are asked about where they have a split `test`, and
texts alone are read where a file of held-out texts lies beside them. Held-out pictures are those of the starter data's
split `other_hand`: emoji that the run knows, in the hand it has not seen; `unseen` are families it has seen in neither. A
third artist is read where `lavit data third` has drawn one beside the first source, and of it the names that the run knows.
"Exact" means that the caption without its template equals the name. "A word" means that the first twelve words of a
caption share one with the name or keywords that is not in `COMMON_WORDS`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
from jaxtyping import Float
from PIL import Image
from torch import Tensor

import lavit
from lavit.config import InputError, read_json
from lavit.data.corpus import Corpus, Edit, Picture, Question, load_corpus, parse_mixture
from lavit.data.prose import held_out_texts
from lavit.data.third import SPLIT, third_beside
from lavit.evaluate import cost
from lavit.evaluate import tokenizer as tokens_
from lavit.evaluate.figures import Figure, share
from lavit.evaluate.image import Gallery, embed, hits, pooled, shrink
from lavit.evaluate.text import perplexity
from lavit.evaluate.words import content, name_of, without_template, words_of
from lavit.generate.pipeline import Pipeline
from lavit.storage import WEIGHTS, load_base, model_folder

Progress = Callable[[str, int, int], None]
HELD_OUT = "other_hand"
T = TypeVar("T")
BATCH = 32
DRAWN = 10  # pictures drawn at a time
READ = 400  # pictures of one kind that are read at most; of held-out ones all
CONCEPT_TOP = 20


@dataclass
class Evaluation:
    """A run and the data it is measured on; features are computed once."""

    pipeline: Pipeline
    data: str
    limit: int | None
    progress: Progress | None

    @cached_property
    def sources(self) -> list[str]:
        """The sources of the mixture, without their weights."""
        return [name for name, _ in parse_mixture(self.data)]

    @cached_property
    def train(self) -> Corpus:
        """Pictures of the first source that the run was trained on."""
        return load_corpus(Path(self.sources[0]))

    @cached_property
    def held_out(self) -> Corpus:
        """Known emoji in the hand that the run has not seen."""
        return load_corpus(Path(self.sources[0]), (HELD_OUT,))

    @cached_property
    def unseen(self) -> Corpus:
        """Emoji of families that the run has not seen in any hand."""
        return load_corpus(Path(self.sources[0]), ("unseen",))

    @cached_property
    def third(self) -> Corpus | None:
        """A choice of known names in the hand of an artist whom the run has not seen; None without such pictures."""
        folder = third_beside(Path(self.sources[0]))
        if folder is None:
            return None
        names = {name_of(picture) for picture in self.train.pictures}
        known = [picture for picture in load_corpus(folder, (SPLIT,)).pictures if name_of(picture) in names]
        return Corpus(tuple(known[i] for i in self.some(READ, len(known)))) if known else None

    def patches(self, corpus: Corpus, what: str) -> Float[Tensor, "images patches dim"]:
        """Encoder features of a corpus."""
        parts = []
        for number, picture in enumerate(corpus.pictures):
            parts.append(self.pipeline.model.patches([picture.record.open()]))
            if self.progress and (number % 20 == 0 or number + 1 == len(corpus)):
                self.progress(f"features, {what}", number + 1, len(corpus))
        return torch.cat(parts)

    @cached_property
    def train_patches(self) -> Float[Tensor, "images patches dim"]:
        """Features of the training pictures."""
        return self.patches(self.train, "train")

    @cached_property
    def held_out_patches(self) -> Float[Tensor, "images patches dim"]:
        """Features of the held-out pictures."""
        return self.patches(self.held_out, "held out")

    @cached_property
    def unseen_patches(self) -> Float[Tensor, "images patches dim"]:
        """Features of the pictures of unseen families."""
        return self.patches(self.unseen, "unseen")

    @cached_property
    def gallery(self) -> Gallery:
        """Every real picture, all names."""
        parts = [self.train_patches, self.held_out_patches, self.unseen_patches]
        names = [name_of(p) for corpus in (self.train, self.held_out, self.unseen) for p in corpus.pictures]
        return Gallery(torch.cat([pooled(part) for part in parts]), tuple(names))

    def some(self, count: int, of: int, *, seed: int = 0) -> list[int]:
        """Numbers of a fixed random choice."""
        chosen = np.random.default_rng([seed, of]).permutation(of)[: min(count, of, self.limit or of)]
        return sorted(chosen.tolist())


def trained_on(model: str | Path) -> str:
    """The mixture that a run or shipped model was trained on; `InputError` if a shipped one's is not built yet."""
    folder = model_folder(model)
    data: str = read_json(folder / "training.json")["data"]
    missing = [name for name, _ in parse_mixture(data) if not Path(name).exists()]
    if missing and folder.parent == WEIGHTS:
        raise InputError(f"{', '.join(missing)} missing: lavit data {folder.name} builds it, or give --data")
    return data


def evaluate_run(
    run: str | Path,
    *,
    data: str | None = None,
    limit: int | None = None,
    progress: Progress | None = None,
) -> list[Figure]:
    """All figures; `data` defaults to what the run was trained on, `limit` bounds the pictures of each figure."""
    pipeline = lavit.load(run)
    data = data or trained_on(run)
    if limit is not None and limit < 1:
        raise InputError(f"limit is {limit}: measure at least one picture")
    evaluation = Evaluation(pipeline, data, limit, progress)
    return [
        figure
        for part in (
            tokenizer_figures,
            caption_figures,
            question_figures,
            drawing_figures,
            concept_figures,
            edit_figures,
            text_figures,
            cost_figures,
        )
        for figure in part(evaluation)
    ]


def tokenizer_figures(e: Evaluation) -> Iterator[Figure]:
    """Reconstruction, live codes, kept share, lengths."""
    tokenizer = e.pipeline.model.tokenizer
    train = tokens_.encode_all(tokenizer, e.train_patches)
    held = tokens_.encode_all(tokenizer, e.held_out_patches)
    mean_feature = e.train_patches.mean(0)
    yield tokens_.reconstruction(tokenizer, e.train_patches, mean_feature, where="train")
    yield tokens_.reconstruction(tokenizer, e.held_out_patches, mean_feature, where="held out")
    yield from tokens_.code_use(train, tokenizer.config.codes, where="train")
    yield from tokens_.code_use(held, tokenizer.config.codes, where="held out")
    images = [picture.record.open() for picture in e.held_out.pictures]
    yield from tokens_.lengths(held, images, where="held out")


def caption_figures(e: Evaluation) -> Iterator[Figure]:
    """Exact names on held-out, third artist's and training pictures; a word of the name or keywords on unseen ones too."""
    common = Counter(name_of(p) for p in e.train.pictures).most_common(1)[0][0]
    known = Gallery(pooled(e.train_patches), tuple(name_of(p) for p in e.train.pictures))
    read = [
        ("held out", e.held_out, e.held_out_patches, len(e.held_out)),
        ("unseen", e.unseen, e.unseen_patches, READ),
        ("train", e.train, e.train_patches, READ),
    ]
    if e.third is not None:
        read.insert(1, ("third artist", e.third, e.patches(e.third, "third artist"), READ))
    for where, corpus, patches, count in read:
        chosen = e.some(count, len(corpus))
        pictures = [corpus.pictures[i] for i in chosen]
        names = [name_of(picture) for picture in pictures]
        said = _captions(e, pictures, f"captions, {where}")
        own = chosen if corpus is e.train else None
        ranked = known.nearest(pooled(patches[chosen]), exclude=own)
        if corpus is not e.unseen:  # a name that was never seen is nobody's to say
            constant = float(np.mean([name == common for name in names]))
            peer = float(np.mean(hits(ranked, names)))
            right = [without_template(text) == name for text, name in zip(said, names, strict=True)]
            note = f"{len(set(known.names))} names; nearest training picture by pooled features: {peer:.3f}"
            yield share(f"caption: exact name, {where}", right, floor=("best constant", constant), note=note)
        wanted = [words_of(picture) for picture in pictures]
        best = max(float(np.mean([bool(content(name) & one) for one in wanted])) for name in set(known.names))
        near = float(np.mean([bool(content(row[0]) & one) for row, one in zip(ranked, wanted, strict=True)]))
        right = [bool(content(text) & one) for text, one in zip(said, wanted, strict=True)]
        note = f"nearest training picture by pooled features: {near:.3f}"
        yield share(f"caption: a word, {where}", right, floor=("best constant", best), note=note)


def _captions(e: Evaluation, pictures: Sequence[Picture], what: str) -> list[str]:
    said: list[str] = []
    for start in range(0, len(pictures), BATCH):
        said += e.pipeline.caption([picture.record.open() for picture in pictures[start : start + BATCH]])
        if e.progress:
            e.progress(what, len(said), len(pictures))
    return said


def question_figures(e: Evaluation) -> Iterator[Figure]:
    """Answers to templated questions about held-out pictures, by kind; and to the test questions of other sources."""
    yield from _answers(e, e.held_out, e.some(300, len(e.held_out.questions)), "held out")
    for source in e.sources[1:]:
        try:
            test = load_corpus(Path(source), ("test",))
        except InputError:  # texts alone, or no such split
            continue
        yield from _answers(e, test, e.some(500, len(test.questions)), f"{Path(source).name}, test")


def _answers(e: Evaluation, corpus: Corpus, numbers: Sequence[int], where: str) -> Iterator[Figure]:
    chosen: list[Question] = [corpus.questions[i] for i in numbers]
    said: list[str] = []
    for start in range(0, len(chosen), BATCH):
        part = chosen[start : start + BATCH]
        images = [corpus.pictures[q.picture].record.open() for q in part]
        said += e.pipeline.ask(images, [q.question for q in part])
        if e.progress:
            e.progress(f"questions, {where}", len(said), len(chosen))
    right = [text.strip().lower() == q.answer.lower() for text, q in zip(said, chosen, strict=True)]
    for kind, wanted in (("yes or no", True), ("open", False)):
        at = [i for i, q in enumerate(chosen) if (q.answer in ("yes", "no")) is wanted]
        if at:
            common = Counter(chosen[i].answer for i in at).most_common(1)[0][1] / len(at)
            yield share(f"question: {kind}, {where}", [right[i] for i in at], floor=("best constant", common))


def drawing_figures(e: Evaluation) -> Iterator[Figure]:
    """Reconstructions and drawings: is the nearest real picture the right one?"""
    size = e.pipeline.model.config.pixels.size
    held = [e.held_out.pictures[i] for i in e.some(60, len(e.held_out))]
    yield from _found(
        e,
        "reconstruction",
        held,
        size,
        lambda part, seeds: [
            e.pipeline.reconstruct(p.record.open(), seed=seed) for p, seed in zip(part, seeds, strict=True)
        ],
    )
    names = sorted({name_of(picture) for picture in e.train.pictures})
    picked = {names[i] for i in e.some(50, len(names), seed=1)}
    first = {name_of(picture): picture for picture in reversed(e.train.pictures) if name_of(picture) in picked}
    drawn = [first[name] for name in sorted(first)]
    yield from _found(
        e,
        "drawing of a trained name",
        drawn,
        size,
        lambda part, seeds: [made[0] for made in e.pipeline.draw([p.prompts[0] for p in part], seed=seeds)],
    )


def _in_batches(
    e: Evaluation,
    what: str,
    items: Sequence[T],
    make: Callable[[Sequence[T], list[int]], list[Image.Image]],
) -> list[Image.Image]:
    """Pictures of items, `DRAWN` at a time (each as it would be alone); item i has the seed i."""
    made: list[Image.Image] = []
    for start in range(0, len(items), DRAWN):
        part = items[start : start + DRAWN]
        made += make(part, list(range(start, start + len(part))))
        if e.progress:
            e.progress(what, len(made), len(items))
    return made


def _found(
    e: Evaluation,
    what: str,
    pictures: Sequence[Picture],
    size: int,
    make: Callable[[Sequence[Picture], list[int]], list[Image.Image]],
) -> Iterator[Figure]:
    made = _in_batches(e, what, pictures, make)
    names = [name_of(picture) for picture in pictures]
    ranked = e.gallery.nearest(embed(e.pipeline.model, made))
    best = e.gallery.nearest(embed(e.pipeline.model, [shrink(p.record.open(), size) for p in pictures]))
    wrong = names[1:] + names[:1]  # another drawing's name
    for top in (1, 5):
        yield share(
            f"{what}: nearest real picture, top-{top}",
            hits(ranked, names, top=top),
            floor=("another's drawing", float(np.mean(hits(ranked, wrong, top=top)))),
            ceiling=(f"real picture at {size} px", float(np.mean(hits(best, names, top=top)))),
            note=f"among {len(set(e.gallery.names))} names",
        )


def concept_figures(e: Evaluation) -> Iterator[Figure]:
    """Prompts of two trained names: are both among the names of the nearest real pictures?"""
    names = sorted({name_of(picture) for picture in e.train.pictures})
    chosen = [names[i] for i in np.random.default_rng(6).permutation(len(names))]
    pairs = list(zip(chosen[0::2], chosen[1::2], strict=False))[: min(30, e.limit or 30)]
    made = _in_batches(
        e,
        "two concepts",
        pairs,
        lambda part, seeds: [one[0] for one in e.pipeline.draw([" and ".join(pair) for pair in part], seed=seeds)],
    )
    ranked = e.gallery.nearest(embed(e.pipeline.model, made))

    def found(asked: Sequence[tuple[str, str]]) -> list[bool]:
        return [set(pair) <= set(row[:CONCEPT_TOP]) for pair, row in zip(asked, ranked, strict=True)]

    yield share(
        f"drawing of two names: both among the {CONCEPT_TOP} nearest names",
        found(pairs),
        floor=("another's drawing", float(np.mean(found(pairs[1:] + pairs[:1])))),
        note=f"among {len(set(e.gallery.names))} names",
    )


def edit_figures(e: Evaluation) -> Iterator[Figure]:
    """Same instruction, two pictures: is each result nearer to its own source than to the other's?"""
    pairs = _edit_pairs(e, 40)
    if not pairs:
        return
    edits = [edit for pair in pairs for edit in pair]
    sources = [e.train.pictures[edit.source].record.open() for edit in edits]

    def make(part: Sequence[int], seeds: list[int]) -> list[Image.Image]:
        images, prompts = [sources[i] for i in part], [edits[i].prompt for i in part]
        return [made[0] for made in e.pipeline.edit(images, prompts, seed=[seed // 2 for seed in seeds])]

    results = _in_batches(e, "edits", range(len(edits)), make)
    like = embed(e.pipeline.model, results) @ embed(e.pipeline.model, sources).T
    right = [bool(like[i, i] > like[i, i ^ 1]) for i in range(len(edits))]
    yield share("edit: nearer its own source than another's", right, floor=("chance", 0.5))


def _edit_pairs(e: Evaluation, count: int) -> list[tuple[Edit, Edit]]:
    """Pairs of edits with one prompt and sources of different families."""
    edits = e.train.edits
    rng = np.random.default_rng(2)
    pairs = []
    wanted = min(count, e.limit or count)
    for number in rng.permutation(len(edits))[:2000]:
        first = edits[number]
        family = e.train.pictures[first.source].row.get("family")
        others = [
            edit
            for edit in edits
            if edit.prompt == first.prompt and e.train.pictures[edit.source].row.get("family") != family
        ]
        if others:
            pairs.append((first, others[rng.integers(len(others))]))
        if len(pairs) >= wanted:
            break
    return pairs


def text_figures(e: Evaluation) -> Iterator[Figure]:
    """Perplexity of text beside the training text, against the LM that the run began with (where it is adapted)."""
    model, config = e.pipeline.model, e.pipeline.model.config.language
    for source in e.sources[1:]:
        texts = held_out_texts(Path(source))
        if texts:
            base = load_base(config, model.folder / "language")[0] if config.lora_rank else None
            yield perplexity(
                texts[: e.limit], model.text, model.language, base, where=Path(source).name, progress=e.progress
            )


def cost_figures(e: Evaluation) -> Iterator[Figure]:
    """Seconds of the verbs, and reading on dynamic tokens against all patches, on training pictures."""
    held = [e.held_out.pictures[i] for i in e.some(8, len(e.held_out), seed=7)]
    names = [name_of(picture) for picture in held]
    yield from cost.verbs(e.pipeline, [picture.record.open() for picture in held], names)
    pictures = [e.train.pictures[i] for i in e.some(100, len(e.train), seed=8)]

    def right(said: Sequence[str]) -> list[bool]:
        return [without_template(text) == name_of(picture) for text, picture in zip(said, pictures, strict=True)]

    images = [picture.record.open() for picture in pictures]
    yield from cost.dynamic_against_all(e.pipeline, images, right, e.progress)
