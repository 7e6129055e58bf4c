"""What broken input does: hundreds of spoiled files, each through the verb that takes it.

Command   python recipes/fuzz.py [--count 400] [--seed 0] [--out FOLDER]
Data      toy pictures and a toy model (tests/conftest.py), made on the spot
Cost      a minute of a CPU core; 60 inputs are a test
Score     0 tracebacks, 0 unnamed, 0 unsaid (LOG.md)

An input is *taken* if it does no harm after all, else *refused*: then one line of `InputError`, or
a warning of what was left out, must name the item: its file, line, member or part. An input that is
broken for certain must not be taken without a word.
"""

from __future__ import annotations

import io
import json
import logging
import shutil
import sys
import traceback
from collections import Counter
from collections.abc import Iterator
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

import tyro
from fuzz_inputs import ROWS, Case, Maker
from jaxtyping import TypeCheckError
from rich.console import Console
from rich.table import Table
from safetensors.torch import load_file, save_file

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))
from conftest import NAMES, toy_config, toy_picture, toy_training
from lavit.cli import main as command_line
from lavit.config import InputError
from lavit.data.bulk import load_tokens
from lavit.data.conversation_documents import ConversationDocuments
from lavit.data.conversations import load_conversations
from lavit.evaluate.own import load_items
from lavit.model import LaVIT
from lavit.train.finetune import finetune_training
from lavit.train.run import open_run, train_stages


class Inputs(Maker):
    """Models, tokens and words besides."""

    def parts(self, pattern: str) -> list[Path]:
        """Files and folders of the model, without what its training left beside them."""
        left = {"tensorboard", "checkpoints", "cache"}
        return [path for path in sorted(self.model.rglob(pattern)) if not left & set(path.parts)]

    def copied(self, name: str) -> tuple[Path, Path]:
        """A model folder of links, but for one file, which is a copy."""
        folder = self.fresh()
        for path in self.parts("*"):
            if path.is_file():
                link = folder / path.relative_to(self.model)
                link.parent.mkdir(parents=True, exist_ok=True)
                link.symlink_to(path)
        file = folder / name
        data = file.read_bytes()
        file.unlink()
        file.write_bytes(data)
        return folder, file

    def model_json(self) -> Case:
        """config.json and the parts' own."""
        name = self.one(
            ("config.json",) * 6
            + ("language/config.json", "vision/config.json", "pixels/unet/config.json")
            + ("pixels/scheduler/scheduler_config.json", "language/tokenizer.json")
        )
        folder, file = self.copied(name)
        way, data = self.text(file.read_text())
        if self.rng.random() < 0.7:
            way, changed = self.strange(json.loads(file.read_text()))
            data = json.dumps(changed).encode()
        file.write_bytes(data)
        use = lambda: LaVIT.from_pretrained(folder)  # noqa: E731
        return Case(f"{name} {way}", use, (file.name, folder.name))

    def training_json(self) -> Case:
        """training.json, read by a run, a fine-tuning and the figures."""
        folder, file = self.copied("training.json")
        way, data = self.text(file.read_text())
        if self.rng.random() < 0.7:
            way, changed = self.strange(json.loads(file.read_text()))
            data = json.dumps(changed).encode()
        file.write_bytes(data)
        (folder / "visual_tokenizer" / "done").unlink()
        uses = {
            "run": lambda: open_run(folder, "data", toy_config(), toy_training()),
            "fine-tuning": lambda: finetune_training(folder),
            "eval": lambda: command_line(["eval", str(folder), "--figures", "kept_share"]),
        }
        who = self.one(list(uses)[: 2 + (self.rng.random() < 0.2)])
        return Case(f"{who} {way}", uses[who], (file.name, folder.name))

    def weights(self) -> Case:
        """A safetensors file of a part: damaged, or whole with a tensor of another name or size."""
        name = str(self.one([p.relative_to(self.model) for p in self.parts("*.safetensors")]))
        folder, file = self.copied(name)
        way = self.one(("renamed", "resized", "kind", "header", "long header", "file", "file"))
        if way in ("renamed", "resized", "kind"):
            tensors = load_file(file)
            key = self.one(sorted(tensors))
            if way == "renamed":
                tensors[f"{key}_"] = tensors.pop(key)
            elif way == "resized":
                tensors[key] = tensors[key].flatten()[:-1].clone()
            else:
                tensors[key] = tensors[key].bool()
            save_file(tensors, file, {"format": "pt"})
        else:
            data = file.read_bytes()
            ways = {"header": data[:8] + b"{'" + data[10:], "long header": b"\xff" * 8 + data[8:]}
            way, data = (way, ways[way]) if way in ways else self.spoiled(data)
            file.write_bytes(data)
        use = lambda: LaVIT.from_pretrained(folder)  # noqa: E731
        part = name.split("/")[0]
        near = "language" if part == "reader" else part  # one module in the model
        names = (file.name, f"{folder.name}/{part}", f"{folder.name}/{near}")
        return Case(
            f"{part} {way}", use, names, way in ("empty", "header", "long header", "resized")
        )

    def shard(self) -> Case:
        """Tokens of a corpus: manifest and shards."""
        folder = self.fresh()
        shutil.copytree(self.tokens, folder)
        file = self.one(sorted(path for path in folder.iterdir() if path.suffix))
        way, data = self.spoiled(file.read_bytes())
        if file.suffix == ".json" and self.rng.random() < 0.7:
            way, changed = self.strange(json.loads(file.read_text()))
            data = json.dumps(changed).encode()
        file.write_bytes(data)
        use = lambda: load_tokens(folder)  # noqa: E731
        return Case(f"{file.suffix} {way}", use, (file.name, folder.name))

    def talk(self) -> Case:
        """A file of conversations, one of which is broken."""

        def turns(number: int) -> dict[str, Any]:
            picture = {"type": "image", "image": f"pictures/{number}.png"}
            asked = [picture, {"type": "text", "text": "what is it?"}]
            said = {"role": "assistant", "content": NAMES[number]}
            return {"messages": [{"role": "user", "content": asked}, said]}

        lines, at = (
            [json.dumps(turns(number)) for number in range(ROWS)],
            int(self.rng.integers(ROWS)),
        )
        way, changed = self.strange(turns(at))
        data = json.dumps(changed).encode()
        if self.rng.random() < 0.4:
            way, data = self.text(lines[at])
        path = self.fresh(".jsonl")
        path.write_bytes(
            b"".join(data + b"\n" if n == at else lines[n].encode() + b"\n" for n in range(ROWS))
        )

        def learn() -> None:
            found = load_conversations(path)
            text, vocabulary = self.pipe.model.text_tokenizer, self.pipe.model.language.vocabulary
            config = toy_training().language
            codes = tuple((1, 2) for _ in found.pictures)
            documents = ConversationDocuments(
                found, codes, text=text, vocabulary=vocabulary, config=config, seed=0
            )
            documents.batch(0)

        use = self.one((learn, lambda: command_line(["data", "check", str(path)])))
        who = "learnt" if use is learn else "checked"
        return Case(f"{who}, {way}", use, (f"{path.name}:{at + 1}", path.name, "pictures/"))

    def chat(self) -> Case:
        """Messages that are given to the pipeline."""
        picture = {"type": "image", "image": str(self.pictures / "0.png")}
        messages = [
            {"role": "system", "content": "be short"},
            {"role": "user", "content": [picture, {"type": "text", "text": "what is it?"}]},
            {"role": "assistant", "content": "a red square"},
            {"role": "user", "content": "and its colour?"},
        ]
        way, messages = self.strange(messages)
        names = ("message", "conversation", "picture", "value", "prompt", "exist")
        return Case(way, lambda: self.pipe.chat(messages), names)

    def items(self) -> Case:
        """A file of items of one's own for `lavit eval`."""
        scene = {"background": "blue", "pattern": "plain", "style": "twemoji", "things": []}
        thing = {"name": "owl", "size": "small", "cell": [0, 0]}
        rows = [
            {"kind": "read", "pictures": ["pictures/0.png"], "facts": "an owl"},
            {"kind": "ask", "pictures": ["pictures/1.png"], "question": "who?", "answers": ["owl"]},
            {"kind": "draw", "prompt": "an owl", "facts": "an owl"},
            {
                "kind": "chat",
                "turns": [{"text": "what?", "pictures": ["pictures/0.png"], "answers": ["a"]}],
            },
            {"kind": "read", "scene": scene | {"things": [thing]}},
        ]
        at = int(self.rng.integers(len(rows)))
        way, changed = self.strange(rows[at])
        lines = [json.dumps(row).encode() for row in rows]
        lines[at] = json.dumps(changed).encode()
        if self.rng.random() < 0.3:
            way, lines[at] = self.text(json.dumps(rows[at]))
        path = self.fresh(".jsonl")
        path.write_bytes(b"\n".join(lines) + b"\n")
        use = lambda: load_items(path)  # noqa: E731
        return Case(f"{rows[at]['kind']}, {way}", use, (f"{path.name}, line {at + 1}", path.name))

    def cases(self, count: int) -> Iterator[tuple[str, Case]]:
        """Inputs of all kinds in turn; pictures, of which there are most kinds, come twice."""
        kinds = (
            "picture",
            "picture",
            "jsonl",
            "beside",
            "parquet",
            "tar",
            "model_json",
            "training_json",
        )
        kinds += ("weights", "shard", "talk", "chat", "items")
        for number in range(count):
            kind = kinds[number % len(kinds)]
            yield kind, getattr(self, kind)()


def judged(case: Case) -> tuple[str, str]:
    """How a case ended, in a word, and what was said."""
    heard, printed = io.StringIO(), io.StringIO()
    handler, log = logging.StreamHandler(heard), logging.getLogger("lavit")
    handler.setLevel(logging.WARNING)
    log.addHandler(handler)
    refused = ""
    try:
        with redirect_stdout(printed), redirect_stderr(heard):
            case.use()
    except InputError as error:
        refused = str(error)
    except SystemExit as end:
        refused = heard.getvalue() if end.code == 2 else f"exit code {end.code}"
    except TypeCheckError:  # where tests check types, before our own checks
        return "refused", ""
    except BaseException:
        return "traceback", traceback.format_exc()
    finally:
        log.removeHandler(handler)
    said = f"{refused}\n{heard.getvalue()}\n{printed.getvalue()}"
    if len(refused.strip().splitlines()) > 1 + heard.getvalue().count("left out"):
        return "lines", refused
    if refused or "left out" in said:
        named = any(name in said for name in case.names)
        return ("refused" if named else "unnamed"), said
    names = [name for name in case.names if name in said.partition("broken")[2]]
    return ("unsaid" if case.broken and not names else "taken"), said


ENDS = ("taken", "refused", "traceback", "lines", "unnamed", "unsaid")


def fuzz(place: Path, model: Path, count: int, seed: int) -> tuple[Table, list[str]]:
    """A table of how inputs of each kind ended, and those that ended wrongly."""
    ended: dict[str, Counter[str]] = {}
    wrong = []
    for kind, case in Inputs(place, model, seed).cases(count):
        end, said = judged(case)
        ended.setdefault(kind, Counter())[end] += 1
        if end not in ENDS[:2]:
            wrong.append(f"{end}: {kind}, {case.what} ({case.names[0]}):\n{said}")
    table = Table("kind", "inputs", *ENDS)
    total: Counter[str] = sum(ended.values(), Counter())
    for kind, counts in [*ended.items(), ("all", total)]:
        table.add_row(kind, str(counts.total()), *(str(counts[end]) for end in ENDS))
    return table, wrong


def main(count: int = 400, seed: int = 0, out: Path = Path("fuzz")) -> None:
    """Train the toy model, spoil, print the table; exit code 1 if an input ended wrongly."""
    shutil.rmtree(out, ignore_errors=True)
    (out / "data" / "train").mkdir(parents=True)
    lines = []
    for number, name in enumerate(NAMES):
        toy_picture(name).save(out / "data" / "train" / f"{number}.png")
        lines.append(json.dumps({"file_name": f"{number}.png", "text": f"{name}."}) + "\n")
    (out / "data" / "train" / "metadata.jsonl").write_text("".join(lines))
    run = open_run(out / "model", out / "data", toy_config(), toy_training(), trackers=())
    train_stages(run)
    table, wrong = fuzz(out / "inputs", out / "model", count, seed)
    for one in wrong:
        print(one)
    Console().print(table)
    if wrong:
        raise SystemExit(1)


if __name__ == "__main__":
    tyro.cli(main)
