"""Every figure of a trained run, each with count, interval, floor and ceiling (`lavit eval RUN`).

What is measured is said in evaluation.py, how reading is in reading.py. A drawing is right if the nearest real picture,
by the frozen encoder's features, has the name that was asked for (image.py); an edit, if it is the one that was asked for.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
from jaxtyping import Float
from PIL import Image
from torch import Tensor

import lavit
from lavit.config import InputError
from lavit.data.corpus import Edit, Picture
from lavit.data.prose import held_out_texts
from lavit.evaluate import cost
from lavit.evaluate import tokenizer as tokens_
from lavit.evaluate.evaluation import Evaluation, Progress, trained_on
from lavit.evaluate.figures import Figure, share
from lavit.evaluate.image import embed, hits, shrink
from lavit.evaluate.reading import caption_figures, choice_figures, question_figures
from lavit.evaluate.text import perplexity
from lavit.evaluate.words import name_of, without_template
from lavit.generate.remember import shown_texts
from lavit.storage import load_base

T = TypeVar("T")
DRAWN = 10  # pictures drawn at a time
CONCEPT_TOP = 20


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
            choice_figures,
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
        shown=[shown_texts(e.pipeline.model, picture.prompts[0])[:1] for picture in drawn],
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
    shown: Sequence[Sequence[str]] = (),
) -> Iterator[Figure]:
    made = _in_batches(e, what, pictures, make)
    names = [name_of(picture) for picture in pictures]
    ranked = e.gallery.nearest(embed(e.pipeline.model, made))
    best = e.gallery.nearest(embed(e.pipeline.model, [shrink(p.record.open(), size) for p in pictures]))
    wrong = names[1:] + names[:1]  # another drawing's name
    note = f"among {len(set(e.gallery.names))} names"
    if any(shown):
        note += f"; of this name is what its memory shows first: {float(np.mean(hits(shown, names))):.3f}"
    for top in (1, 5):
        yield share(
            f"{what}: nearest real picture, top-{top}",
            hits(ranked, names, top=top),
            floor=("another's drawing", float(np.mean(hits(ranked, wrong, top=top)))),
            ceiling=(f"real picture at {size} px", float(np.mean(hits(best, names, top=top)))),
            note=note,
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
    """Same instruction, two pictures: is each result nearer its own source, and is the nearest real picture its target?"""
    pairs = _edit_pairs(e, 40)
    if not pairs:
        return
    edits = [edit for pair in pairs for edit in pair]
    sources = [e.train.pictures[edit.source].record.open() for edit in edits]
    targets = [e.train.pictures[edit.target].record.open() for edit in edits]

    def make(part: Sequence[int], seeds: list[int]) -> list[Image.Image]:
        images, prompts = [sources[i] for i in part], [edits[i].prompt for i in part]
        return [made[0] for made in e.pipeline.edit(images, prompts, seed=[seed // 2 for seed in seeds])]

    model, size = e.pipeline.model, e.pipeline.model.config.pixels.size
    made, source = embed(model, _in_batches(e, "edits", range(len(edits)), make)), embed(model, sources)
    pair = torch.arange(len(edits)) ^ 1
    nearer = (made * source).sum(1) > (made * source[pair]).sum(1)
    yield share("edit: nearer its own source than another's", nearer.tolist(), floor=("chance", 0.5))
    best = embed(model, [shrink(image, size) for image in targets])
    wanted = torch.tensor([edit.target for edit in edits])[:, None]

    def found(results: Float[Tensor, "edits dim"], top: int) -> list[bool]:
        likest = (results @ e.known.features.T).topk(min(top, len(e.known.names)), dim=1).indices
        return (likest == wanted).any(1).tolist()

    for top in (1, 5):
        yield share(
            f"edit: nearest training picture is its target, top-{top}",
            found(made, top),
            floor=("another's result", float(np.mean(found(made[pair], top)))),
            ceiling=(f"real target at {size} px", float(np.mean(found(best, top)))),
            note=f"of {len(e.known.names)} pictures; the source itself: {float(np.mean(found(source, top))):.3f}",
        )


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
