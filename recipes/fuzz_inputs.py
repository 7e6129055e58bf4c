"""Pictures and tables, spoiled in many ways, for recipes/fuzz.py.

Command   none of its own; recipes/fuzz.py
Data      toy pictures (tests/conftest.py)
Cost      nothing beside that recipe's
Score     as there
"""

from __future__ import annotations

import copy
import io
import json
import shutil
import sys
import tarfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))
from conftest import NAMES, toy_picture
from lavit.cli import main as command_line
from lavit.data.bulk import CorpusJob, tokenize_corpus
from lavit.data.corpus import load_corpus
from lavit.data.stream import Stream
from lavit.generate.pipeline import Pipeline
from lavit.images import FORMATS
from lavit.model import LaVIT

ROWS = 4  # of a table, lines of a file
STRANGE = (
    None, True, -1, 0, 10**30, 1e308, "", "x", [], {}, [[1]], {"a": None}, "\x00", "../..", "é" * 9,
)  # fmt: skip


@dataclass(frozen=True)
class Case:
    """One input: what it is, what takes it, the words that must name it, is it broken for sure."""

    what: str
    use: Callable[[], object]
    names: tuple[str, ...]
    broken: bool = False


class Maker:
    """Makes inputs in a folder, around a toy model that is trained."""

    def __init__(self, place: Path, model: Path, seed: int) -> None:
        self.place, self.model, self.rng = place, model, np.random.default_rng(seed)
        self.pipe = Pipeline(LaVIT.from_pretrained(model))
        self.number = 0
        self.tokens = place / "tokens"
        self.pictures = place / "pictures"
        self.pictures.mkdir(parents=True)
        for number in range(ROWS):
            toy_picture(NAMES[number]).save(self.pictures / f"{number}.png")
        job = CorpusJob(data=self.pictures, out=self.tokens, model=model, shard_size=2)
        tokenize_corpus(job, workers=0)

    def fresh(self, suffix: str = "") -> Path:
        """A path that nothing has yet."""
        self.number += 1
        return self.place / f"item-{self.number:04}{suffix}"

    def one(self, items: Any) -> Any:
        """One of some items."""
        return items[int(self.rng.integers(len(items)))]

    def spoiled(self, data: bytes) -> tuple[str, bytes]:
        """Bytes of a file, broken in one of several ways."""
        at = int(self.rng.integers(1, max(2, len(data))))
        ways = {
            "cut": data[:at],
            "empty": b"",
            "zeros": bytes(len(data)),
            "zeros inside": data[: at // 2] + bytes(at - at // 2) + data[at:],
            "flipped": data[:at] + bytes([data[at % len(data)] ^ 0xFF]) + data[at + 1 :],
            "no start": data[8:],
            "noise": self.rng.bytes(len(data)),
        }
        name = self.one(list(ways))
        return name, ways[name]

    def strange(self, value: Any) -> tuple[str, Any]:
        """JSON data with one place of it deleted or of another kind."""
        value = copy.deepcopy(value)
        places = [(value, key) for key in (value if isinstance(value, dict) else range(len(value)))]
        for holder, key in places:
            inner = holder[key]
            if isinstance(inner, dict | list):
                places += [
                    (inner, k) for k in (inner if isinstance(inner, dict) else range(len(inner)))
                ]
        holder, key = self.one(places)
        if self.rng.random() < 0.3:
            del holder[key]
            return f"without {key}", value
        holder[key] = self.one(STRANGE)
        return f"{key} is {str(holder[key])[:12]!r}", value

    def text(self, said: str) -> tuple[str, bytes]:
        """JSON text, broken as text."""
        ways = {
            "not UTF-8": said.encode()[:9] + b"\xff\xfe" + said.encode()[9:],
            "nested deep": ("[" * 100_000).encode(),
            "number of 5000 digits": said.encode().replace(b": ", b": " + b"9" * 5000 + b", ", 1),
            "NaN": said.encode().replace(b': "', b': NaN, "x": "', 1),
            "null": b"null",
            "a list": b"[]",
        }
        name = self.one([*ways, "bytes"])
        return (name, ways[name]) if name in ways else self.spoiled(said.encode())

    def picture(self) -> Case:
        """A picture of any format that PIL writes, in any mode, whole or not."""
        Image.init()
        image = toy_picture(self.one(NAMES), 48).rotate(int(self.rng.integers(360)))
        mode = self.one(("RGB", "RGB", "L", "P", "CMYK", "I;16", "RGBA", "1", "LA", "F", "I"))
        kind = self.one((*FORMATS, *sorted(Image.SAVE)))
        more = (
            {"save_all": True, "append_images": [image.rotate(9)]}
            if kind in ("GIF", "TIFF")
            else {}
        )
        stream = io.BytesIO()
        try:
            image.convert("L" if mode == "I;16" else mode).convert(mode).save(stream, kind, **more)
        except Exception:
            image.save(stream := io.BytesIO(), kind := self.one(FORMATS))
            mode = "RGB"
        data, way = stream.getvalue(), "whole"
        if self.rng.random() < 0.7:
            way, data = self.spoiled(data)
        elif kind in ("PNG", "BMP", "GIF") and self.rng.random() < 0.5:
            at = {"PNG": 16, "BMP": 18, "GIF": 6}[kind]
            way, data = "huge", data[:at] + b"\x7f\xff\xff\xff" + data[at + 4 :]
        path = self.fresh(self.one((f".{kind.lower()}", ".png", ".jpg", ".txt", "")))
        path.write_bytes(data)
        broken = way in ("empty", "zeros", "noise") or (way == "whole" and kind not in FORMATS)
        broken = broken and kind != "MPO"  # a JPEG with more behind it
        use = lambda: self.pipe.tokenize(str(path))  # noqa: E731
        return Case(f"{kind} {mode} {way}", use, (path.name,), broken)

    def check(self, path: Path, what: str, broken: bool = False) -> Case:
        """`lavit data check` of a file or folder; a picture of it or the file must be named."""
        use = lambda: command_line(["data", "check", str(path)])  # noqa: E731
        return Case(what, use, (path.name,), broken)

    def jsonl(self) -> Case:
        """A table of pictures and texts as JSON lines."""
        rows = [{"image": f"pictures/{n}.png", "text": NAMES[n]} for n in range(ROWS)]
        path = self.fresh(".jsonl")
        if self.rng.random() < 0.6:
            way, rows = self.strange(rows)
            path.write_text("".join(json.dumps(row) + "\n" for row in rows))
            return self.check(path, way)
        way, data = self.text("".join(json.dumps(row) + "\n" for row in rows))
        path.write_bytes(data)
        return self.check(path, way, way in ("empty", "zeros", "noise", "nested deep"))

    def beside(self) -> Case:
        """A folder of pictures with metadata, questions or edits that are broken."""
        folder = self.fresh()
        shutil.copytree(self.pictures, folder / "train")
        files = {
            "train/metadata.jsonl": [
                {"file_name": f"{n}.png", "text": NAMES[n]} for n in range(ROWS)
            ],
            "questions.jsonl": [
                {"image": f"train/{n}.png", "question": "what?", "answer": NAMES[n]}
                for n in range(ROWS)
            ],
            "edits.jsonl": [
                {
                    "sources": [f"train/{n}.png"],
                    "prompt": "turn",
                    "target": "train/0.png",
                    "kind": "a",
                }
                for n in range(ROWS)
            ],
        }
        name = self.one(list(files))
        way, rows = self.strange(files[name])
        data = "".join(json.dumps(row) + "\n" for row in rows).encode()
        if self.rng.random() < 0.4:
            way, data = self.text(data.decode())
        (folder / name).write_bytes(data)
        use = lambda: load_corpus(folder)  # noqa: E731
        return Case(f"{name} {way}", use, (Path(name).name, folder.name))

    def parquet(self) -> Case:
        """A parquet file with pictures inside."""
        import pyarrow as pa
        from pyarrow import parquet

        images: list[Any] = [{"bytes": p.read_bytes(), "path": p.name} for p in self.files()]
        texts: list[Any] = list(NAMES[:ROWS])
        way = self.one(("a picture", "null", "no column", "numbers", "file", "file", "file"))
        if way == "a picture":
            images[1]["bytes"] = self.spoiled(images[1]["bytes"])[1]
        if way == "null":
            images[1] = texts[2] = None
        columns = {"image": [7] * ROWS if way == "numbers" else images, "text": texts}
        if way == "no column":
            columns = {"picture of": texts}
        path = self.fresh(".parquet")
        parquet.write_table(pa.table(columns), path)
        if way == "file":
            way, data = self.spoiled(path.read_bytes())
            path.write_bytes(data)
        return self.streamed(path, way)

    def tar(self) -> Case:
        """A WebDataset shard."""
        path = self.fresh(".tar")
        members = {f"{n}.png": p.read_bytes() for n, p in enumerate(self.files())}
        members |= {f"{n}.txt": NAMES[n].encode() for n in range(ROWS)}
        way = self.one(("a member", "no ends", "no pictures", "file", "file", "file", "json"))
        if way == "a member":
            name = self.one(list(members))
            members[name] = self.spoiled(members[name])[1]
        if way == "no ends":
            members = {
                name.split(".")[0] + str(n): d for n, (name, d) in enumerate(members.items())
            }
        if way == "no pictures":
            members = {name: data for name, data in members.items() if name.endswith("txt")}
        if way == "json":
            members |= {f"{n}.json": b'{"a": ' for n in range(ROWS)}
        with tarfile.open(path, "w") as tar:
            for name, data in sorted(members.items()):
                info = tarfile.TarInfo(name)
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
        if way == "file":
            way, data = self.spoiled(path.read_bytes())
            path.write_bytes(data)
        return self.streamed(path, way)

    def files(self) -> list[Path]:
        """Pictures that are whole."""
        return sorted(self.pictures.glob("*.png"))

    def streamed(self, path: Path, what: str) -> Case:
        """A shard, checked or read as a stream."""
        if self.rng.random() < 0.5:
            return self.check(path, f"{what}, checked")

        def use() -> None:
            stream = Stream(str(path))
            for _ in range(ROWS + 1):
                stream.take().open()

        return Case(f"{what}, streamed", use, (path.name,))
