"""The demonstration of a model of scenes: what it reads, answers, draws, edits and composes.

Things that stand together here never did so in training. The pipeline is used as anyone would use
it: free generation, one sample each, nothing is chosen among several.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

import lavit
from lavit.config import InputError
from lavit.data.scenes.edits import edit
from lavit.data.scenes.language import describe, prompt
from lavit.data.scenes.lexicon import unknown_words
from lavit.data.scenes.parse import parse
from lavit.data.scenes.questions import SceneQuestion, questions, right
from lavit.data.scenes.render import render
from lavit.data.scenes.sample import LADDER, scene_at
from lavit.data.scenes.splits import valid_world
from lavit.data.scenes.tasks import several
from lavit.data.scenes.world import Scene, facts
from lavit.evaluate.demo_page import Item, Section, contact_sheet, page, save_sheet
from lavit.evaluate.examinee import scenes_of
from lavit.evaluate.judge import Judge, all_right
from lavit.evaluate.kept import Progress
from lavit.evaluate.known import rules_of, strange_words
from lavit.storage import model_folder
from lavit.visualize import kept_over

READ, ASKED, DRAWN = 6, 6, 8  # pictures, or prompts
EDITS = ("replace", "background", "recolour", "swap", "remove", "number")
COMPOSED = ("together", "background", "together")
RUNGS = 4  # pictures for each number of things
SHOWN = (0, 1, 3, 6, 9)  # rungs of which a picture is shown
STRANGE = "a purplish wombat on a blue background"
APART = 1000  # pictures between those of two seeds
TRIES = 200  # pictures that are looked at for one that allows an edit
PARTS = {  # what they are called, and where they are
    "visual_tokenizer": ("visual tokenizer", "visual_tokenizer/model.safetensors"),
    "language": ("language part", "language", "reader"),
    "pixels": ("pixel decoder", "pixels"),
}


def write_demo(
    model: str | Path, out: Path, *, seed: int = 0, progress: Progress | None = None,
) -> list[Section]:  # fmt: skip
    """Write OUT/index.html and OUT/sheet.png, and return what they show.

    Sections whose parts the model lacks say so. Raises `InputError` for a model that was not
    trained on scenes, or was with every pair of things.
    """
    show = Show(model, seed)
    makers = (
        show.reading, show.asking, show.drawing, show.editing, show.composing, show.strange,
        show.ladder,
    )  # fmt: skip
    sections = []
    for number, make in enumerate(makers):
        sections.append(make())
        if progress:
            progress("demo", number + 1, len(makers))
    try:
        out.mkdir(parents=True, exist_ok=True)
        (out / "index.html").write_text(page(show.name, sections), encoding="utf-8")
        save_sheet(contact_sheet(show.name, sections), out / "sheet.png")
    except OSError as error:
        raise InputError(f"cannot write to {out}: {error.strerror or error}") from error
    return sections


VERDICT = {True: "as asked", False: "not as asked", None: ""}  # of the judge


@dataclass(frozen=True)
class Task:
    """Pictures and words to draw from, and one right answer."""

    sources: tuple[Scene, ...]
    words: str
    target: Scene


class Show:
    """A loaded model and the sections of its page."""

    def __init__(self, model: str | Path, seed: int) -> None:
        if seed < 0:
            raise InputError(f"seed is {seed}: give a number from 0")
        self.folder, self.seed = model_folder(model), seed
        said = scenes_of(self.folder)
        if said is None:
            raise InputError(
                f"{model} was not trained on scenes, which the demo shows: its training.json has "
                "no origin (lavit data scenes makes data that have one)"
            )
        self.rules = rules_of(self.folder)
        if not self.rules.held_out_pairs:
            raise InputError(f"{model} saw every pair of things; the demo shows pairs held out")
        self.size = said.get("size", 160)
        self.pipe = lavit.load(self.folder)
        self.name = self.pipe.model.config.name

    def reading(self) -> Section:
        """Captions, right where they say exactly what is so."""
        title = "Reading"
        about = (
            "Each picture shows things that never stood together in training. The model says all "
            "that it sees; a tick means that every word is right and nothing is left out. Beside "
            "each picture: the patches that became tokens; the others, faded, flow into them."
        )
        if lacking := self.lacking("visual_tokenizer", "language"):
            return Section(title, about, missing=lacking)
        scenes = list(self.scenes(0, READ))
        pictures = [self.picture(scene) for scene in scenes]
        captions = self.pipe.caption(pictures)
        items = []
        for scene, picture, caption in zip(scenes, pictures, captions, strict=True):
            keep = self.pipe.tokenize(picture).keep[0]
            kept = f"{int(keep.sum())} of {len(keep)} patches kept"
            good = parse(caption) == facts(scene)
            truth = "" if good else f"It shows: {describe(scene, self.rng(1))}"
            shown = (("picture", picture), (kept, kept_over(picture, keep, size=240)))
            items.append(Item(shown, said=caption, truth=truth, right=good))
        return Section(title, about, tuple(items))

    def asking(self) -> Section:
        """Questions of different kinds."""
        title, about = "Answering", "Questions about other pictures of things never seen together."
        if lacking := self.lacking("visual_tokenizer", "language"):
            return Section(title, about, missing=lacking)
        asked = self.questions()
        pictures = [self.picture(scene) for scene, _ in asked]
        answers = self.pipe.ask(pictures, [one.question for _, one in asked])
        items = []
        for (scene, one), picture, answer in zip(asked, pictures, answers, strict=True):
            good = right(answer, one.question, scene)
            truth = "" if good else f"Right would be: {one.answer}"
            items.append(Item((("picture", picture),), one.question, answer, truth, good))
        return Section(title, about, tuple(items))

    def questions(self) -> list[tuple[Scene, SceneQuestion]]:
        """A picture and a question for each, of as many kinds as there are."""
        rng, found, kinds = self.rng(2), [], set()
        for scene in self.scenes(100):
            each = [one for one in questions(scene, rng, self.rules, 4) if one.kind != "contents"]
            if each:
                one = next((one for one in each if one.kind not in kinds), each[0])
                found.append((scene, one))
                kinds.add(one.kind)
            if len(found) == ASKED:
                break
        return found

    def drawing(self) -> Section:
        """Prompts for pictures that training never showed."""
        rng, scenes = self.rng(3), self.scenes(300, DRAWN)
        tasks = [Task((), prompt(scene, rng, full=True), scene) for scene in scenes]
        about = (
            "Prompts that name things never seen together in training, and the first picture that "
            "comes out for each. A tick means that the judge, a detector that sees the picture "
            "alone, finds everything that was asked for and nothing else."
        )
        return self.made("Drawing", about, tasks)

    def editing(self) -> Section:
        """Instructions for pictures of things never seen together."""
        rng, tasks = self.rng(4), []

        def allowed(scene: Scene) -> bool:
            return valid_world(scene) is None

        for number, kind in enumerate(EDITS):
            for scene in self.scenes(400 + 50 * number):
                one = edit(scene, rng, self.rules, kind, allowed=allowed)
                if one is not None:
                    tasks.append(Task((one.source,), one.prompt, one.target))
                    break
        about = (
            "A picture of things never seen together, an instruction, and what the model makes of "
            "them. All else should stay as it was. The last picture is one right answer."
        )
        return self.made("Editing", about, tasks)

    def composing(self) -> Section:
        """Two pictures and what to make of them."""
        rng, tasks = self.rng(5), []
        for kind in COMPOSED:
            one = several(rng, self.rules, kind, split="pairs")
            tasks.append(Task(one.sources, one.prompt, one.target))
        about = (
            "Two pictures and an instruction go in, one picture comes out, again of things never "
            "seen together. The last picture is one right answer."
        )
        return self.made("Composing", about, tasks)

    def strange(self) -> Section:
        """A prompt with words that the model never learnt."""
        words = ", ".join(strange_words(self.folder, [STRANGE]))
        about = (
            "The world of this model is small. It draws something all the same, and lavit says "
            f"on the command line: {self.name} does not know: {words}."
        )
        nothing = Scene("blue", "plain", "twemoji", ())
        return self.made("Words it does not know", about, [Task((), STRANGE, nothing)])

    def made(self, title: str, about: str, tasks: Sequence[Task]) -> Section:
        """What the model draws for tasks, each with a seed of its own."""
        if lacking := self.lacking("visual_tokenizer", "language", "pixels"):
            return Section(title, about, missing=lacking)
        sources = [[self.picture(scene) for scene in task.sources] for task in tasks]
        pairs = zip(sources, tasks, strict=True)
        prompts: list[list[str | Image.Image]] = [[*shown, task.words] for shown, task in pairs]
        seeds = [self.seed * APART + number for number in range(len(tasks))]
        made = self.pipe.compose(prompts, seed=seeds)
        seen = Judge.load().look(made)
        items = []
        for task, shown, drawn, saw in zip(tasks, sources, made, seen, strict=True):
            names = ("before",) if len(shown) == 1 else ("first", "second")
            pictures = [*zip(names, shown, strict=False), ("drawn", drawn)]
            if shown:
                pictures.append(("one right answer", self.picture(task.target)))
            good = None if unknown_words(task.words) else all_right(facts(task.target), saw)
            items.append(Item(tuple(pictures), asked=task.words, said=VERDICT[good], right=good))
        return Section(title, about, tuple(items))

    def ladder(self) -> Section:
        """Tokens of pictures with 0 to 9 things."""
        title = "Tokens and content"
        about = (
            f"The number of tokens of pictures with 0 to {LADDER - 1} things, {RUNGS} pictures of "
            "each number; the line joins the means. Training had at most four things in a picture."
        )
        if lacking := self.lacking("visual_tokenizer"):
            return Section(title, about, missing=lacking)
        counts: list[list[int]] = [[] for _ in range(LADDER)]
        items = []
        for index in range(RUNGS * LADDER):
            scene = scene_at("ladder", self.seed * APART + index, rules=self.rules)
            picture, number = self.picture(scene), len(scene.things)
            keep = self.pipe.tokenize(picture).keep[0]
            if not counts[number] and number in SHOWN:
                shown = kept_over(picture, keep, size=240)
                kept = int(keep.sum())
                things = f"{number or 'no'} thing{'s' * (number != 1)}"
                tokens = f"{kept} token{'s' * (kept != 1)}"
                items.append(Item(((things, picture), (tokens, shown))))
            counts[number].append(int(keep.sum()))
        return Section(title, about, tuple(items), counts=tuple(map(tuple, counts)))

    def scenes(self, first: int, count: int = TRIES) -> Iterator[Scene]:
        """Scenes of things never seen together, made when they are asked for."""
        for number in range(count):
            yield scene_at("pairs", self.seed * APART + first + number, rules=self.rules)

    def picture(self, scene: Scene) -> Image.Image:
        """A scene as the model saw them in training."""
        return render(scene, self.size)

    def rng(self, section: int) -> np.random.Generator:
        """Randomness of a section."""
        return np.random.default_rng([self.seed, section])

    def lacking(self, *parts: str) -> str:
        """What is missing of these parts, as a sentence; empty if nothing is."""
        found = []
        for part in parts:
            name, *places = PARTS[part]
            if not all((self.folder / place).exists() for place in places):
                found.append(name)
        if not found:
            return ""
        listed = " and no ".join(found)
        return f"This model has no {listed} yet, so there is nothing to show here."
