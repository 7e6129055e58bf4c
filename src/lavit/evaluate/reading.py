"""How well a run reads: captions, choices among its names, answers.

"Exact" means that the caption without its template equals the name. "A word" means that the first twelve words of a
caption share one with the name or keywords that is not in `COMMON_WORDS`. "Among all names" is the likeliest caption among the
names that the run was trained on, and its five likeliest.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from lavit.config import InputError
from lavit.data.corpus import Corpus, Picture, Question, load_corpus
from lavit.evaluate.evaluation import READ, Evaluation
from lavit.evaluate.figures import Figure, share
from lavit.evaluate.image import hits, pooled
from lavit.evaluate.words import content, name_of, without_template, words_of
from lavit.generate.remember import recalled

BATCH = 32
TOP = 5  # names
CHOSEN = 100  # pictures whose names are chosen among all, of each kind: a second each


def caption_figures(e: Evaluation) -> Iterator[Figure]:
    """Exact names on held-out, third artist's and training pictures; a word of the name or keywords on unseen ones too."""
    common = Counter(name_of(p) for p in e.train.pictures).most_common(1)[0][0]
    known = e.known
    read = [
        ("held out", e.held_out, e.held_out_patches, len(e.held_out)),
        ("unseen", e.unseen, e.unseen_patches, READ),
        ("train", e.train, e.train_patches, READ),
    ]
    if e.third is not None:
        read.insert(1, ("third artist", e.third, e.third_patches, READ))
    for where, corpus, patches, count in read:
        chosen = e.some(count, len(corpus))
        pictures = [corpus.pictures[i] for i in chosen]
        names = [name_of(picture) for picture in pictures]
        said = _captions(e, pictures, f"captions, {where}")
        own = chosen if corpus is e.train else None
        ranked = known.nearest(pooled(patches[chosen]), exclude=own)
        model = e.pipeline.model
        told = recalled(model, [p.record.open() for p in pictures]) if model.config.language.recall else []
        if corpus is not e.unseen:  # a name that was never seen is nobody's to say
            constant = float(np.mean([name == common for name in names]))
            peer = float(np.mean(hits(ranked, names)))
            right = [without_template(text) == name for text, name in zip(said, names, strict=True)]
            note = f"{len(set(known.names))} names; nearest training picture by pooled features: {peer:.3f}"
            if told:
                note += f"; what its memory tells first: {float(np.mean(hits(told, names))):.3f}"
            yield share(f"caption: exact name, {where}", right, floor=("best constant", constant), note=note)
        wanted = [words_of(picture) for picture in pictures]
        best = max(float(np.mean([bool(content(name) & one) for one in wanted])) for name in set(known.names))
        near = float(np.mean([bool(content(row[0]) & one) for row, one in zip(ranked, wanted, strict=True)]))
        right = [bool(content(without_template(text)) & one) for text, one in zip(said, wanted, strict=True)]
        note = f"nearest training picture by pooled features: {near:.3f}"
        if told:
            first = [bool(content(row[0]) & one) for row, one in zip(told, wanted, strict=True)]
            note += f"; what its memory tells first: {float(np.mean(first)):.3f}"
        yield share(f"caption: a word, {where}", right, floor=("best constant", best), note=note)


def _captions(e: Evaluation, pictures: Sequence[Picture], what: str) -> list[str]:
    said: list[str] = []
    for start in range(0, len(pictures), BATCH):
        said += e.pipeline.caption([picture.record.open() for picture in pictures[start : start + BATCH]])
        if e.progress:
            e.progress(what, len(said), len(pictures))
    return said


def choice_figures(e: Evaluation) -> Iterator[Figure]:
    """The likeliest among all trained names, of known emoji in hands that the run has not seen, as a retrieval gives them."""
    known = e.known
    among = sorted(set(known.names))
    if len(among) < 2:
        return
    read = [("held out", e.held_out, e.held_out_patches)]
    if e.third is not None:
        read.append(("third artist", e.third, e.third_patches))
    for where, corpus, patches in read:
        chosen = [i for i in e.some(CHOSEN, len(corpus)) if name_of(corpus.pictures[i]) in among]
        names = [name_of(corpus.pictures[i]) for i in chosen]
        ranked: list[list[str]] = []
        for start in range(0, len(chosen), BATCH):
            images = [corpus.pictures[i].record.open() for i in chosen[start : start + BATCH]]
            ranked += e.pipeline.choose(images, among, n=min(TOP, len(among)))
            if e.progress:
                e.progress(f"choices, {where}", len(ranked), len(chosen))
        peer = known.nearest(pooled(patches[chosen]))
        for top in (1, TOP):
            right, near = hits(ranked, names, top=top), float(np.mean(hits(peer, names, top=top)))
            note = f"{len(among)} names; nearest training pictures by pooled features: {near:.3f}"
            chance = ("chance", min(1.0, top / len(among)))
            yield share(f"caption among all names, {where}: top-{top}", right, floor=chance, note=note)


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
