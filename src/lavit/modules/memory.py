"""Memory: what was said of the training pictures that are most like the one being read, told to the LM beside it.

A small LM that has seen a few hundred thousand tokens of pictures reads its table far better than a row of features. So the
texts of the nearest training pictures may stand behind a picture that is read, a line each, nearest first (the method of
SmallCap, arXiv 2209.15323, whose retrieval is CLIP's; LaVIT has none, and `LanguageConfig.recall` is 0 for its sizes):

    S f f f E  tiger face ⏎ cat face ⏎ lion ⏎ leopard ⏎  cat .

Pictures are compared by what several layers of the encoder see: the mean of the whole and of its four quarters, under a
metric in closed form that counts what tells texts apart and discounts what varies between pictures of the same text, and
between the views of one picture (linear discriminant analysis). And a hand seldom draws one thing twice: of two texts whose
pictures are equally like the one being read, the one that its manner has not drawn yet is the likelier. The manner is the
axis along which pictures of one text differ most. Nothing here is trained by gradient, and pictures can be added.

The same memory helps to draw, from words and from codes, both found by the tokens they share (modules/index.py). Pictures
whose texts a prompt mentions may stand before it, as codes with their texts (RA-CM3, arXiv 2211.12561), and the pixel decoder
may be shown the remembered picture whose codes are most like those it paints (RDM, arXiv 2204.11824):

    S c c c E tiger face ⏎  S c c c E cat face ⏎  a tiger face  S c c c E

An edit is asked for with a picture and words, and what is shown before it is found by both: what the picture is called counts
as part of the prompt.
"""

from __future__ import annotations

import io
import re
from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from functools import cached_property
from itertools import islice, zip_longest

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from PIL import Image
from torch import Tensor, nn

from lavit.config import InputError
from lavit.modules.index import Index

DIRECTIONS = 128  # of the metric, at most
NOISE = 0.1  # variance that every direction of a description has within a text, as a share of the mean one
QUARTERS = 2  # per side
MANNER = 0.1  # likeness lost to a text that the manner has drawn, but for what seems to be the very picture
VERY = 0.98  # cosine from which it does
APART = 0.6  # difference along the manner, in units of the usual one within a text, that makes two manners
MENTIONED = 0.4  # of a text's weight that must stand in a prompt, for it to be one of several that the prompt mentions
COMMON_WORDS = frozenset(
    ("a", "an", "and", "at", "for", "from", "in", "is", "it", "of", "on", "or", "the", "to", "with", "without")
)
ASKING_WORDS = frozenset(("can", "could", "i", "me", "my", "please", "would", "you", "your"))
OF_TEXTS = ("manner", "mean", "metric")
# a row for each picture; codes and pictures (WebP files) stand one after the other, of these lengths and sizes
OF_PICTURES = ("keys", "lengths", "manners", "owners", "sizes")
STATE = tuple(sorted((*OF_TEXTS, *OF_PICTURES, "codes", "pictures")))
WHOLE = {
    "codes": torch.int16,
    "lengths": torch.int16,
    "owners": torch.long,
    "pictures": torch.uint8,
    "sizes": torch.int32,
}


def describe(looks: Sequence[Float[Tensor, "images _places _channels"]]) -> Float[Tensor, "images described"]:
    """Means of each look (`Vision.looks`) over the picture and its quarters; places form a square grid."""
    parts = []
    for look in looks:
        images, places, channels = look.shape
        side = round(places**0.5)
        if side * side != places:
            raise InputError(f"{places} patches form no square grid: a memory needs one")
        grid = look.float().transpose(1, 2).reshape(images, channels, side, side)
        parts += [grid.mean((2, 3)), F.adaptive_avg_pool2d(grid, QUARTERS).flatten(2).transpose(1, 2).flatten(1)]
    return torch.cat(parts, 1)


def within_texts(
    described: Float[Tensor, "pictures described"], owners: Int[Tensor, "pictures"]
) -> Float[Tensor, "described described"]:
    """Covariance of the pictures of a text around their mean, over all texts; zeros if no text has two pictures."""
    count = owners.bincount()
    own = torch.zeros(len(count), described.shape[1]).index_add_(0, owners, described) / count[:, None].clamp(min=1)
    inside = (described - own[owners])[count[owners] > 1]
    return inside.T @ inside / max(1, int((count - 1).clamp(min=0).sum()))


def discriminant(
    total: Float[Tensor, "described described"], within: Float[Tensor, "described described"]
) -> Float[Tensor, "described directions"]:
    """The directions that vary most in all, in units of what varies within."""
    level = within.diagonal().mean() or total.diagonal().mean() or 1.0  # nothing varies: one picture
    factor = torch.linalg.cholesky((within + NOISE * level * torch.eye(len(within))).double())
    white = torch.linalg.solve_triangular(factor, total.double(), upper=False)
    white = torch.linalg.solve_triangular(factor, white.T, upper=False).float()
    vectors = torch.linalg.eigh((white + white.T) / 2).eigenvectors.flip(1)[:, :DIRECTIONS]
    return torch.linalg.solve_triangular(factor.T, vectors.double(), upper=True).float()


def first_axis(within: Float[Tensor, "described described"]) -> Float[Tensor, "described"]:
    """The axis along which two pictures of a text differ most, in units of that difference; zeros if they do not."""
    values, vectors = torch.linalg.eigh(within)
    varies = values[-1] > torch.finfo(values.dtype).eps
    return vectors[:, -1] / (2 * values[-1]) ** 0.5 if varies else torch.zeros(len(within))


class Memory(nn.Module):
    """Texts, and of the pictures that they were said of: keys, manners, codes and, for a decoder, small copies."""

    def __init__(self, texts: Sequence[str], tensors: dict[str, Tensor]) -> None:
        """`tensors` are the state of a memory; its `owners` are the numbers of its pictures' texts."""
        super().__init__()
        self.texts = tuple(texts)
        if set(tensors) != set(STATE) or bool((tensors["owners"] >= len(self.texts)).any()):
            raise InputError(
                f"a memory of {len(self.texts)} texts has tensors {sorted(tensors)}, expected {list(STATE)}: "
                "train its language stage again"
            )
        for name in STATE:
            self.register_buffer(name, tensors[name].to(WHOLE.get(name, torch.float)))

    @classmethod
    def of(
        cls,
        described: Float[Tensor, "pictures described"],
        texts: Sequence[str],
        views: Float[Tensor, "others described"],
        codes: Sequence[Sequence[int]] | None = None,
    ) -> Memory:
        """A memory of pictures, a text of each; `views` are differences of descriptions of one picture (none: 0 rows)."""
        if not texts:
            raise InputError("nothing is said of the pictures, so a memory would be empty: set recall to 0")
        mean, spread = described.mean(0), described.std(0, correction=0)
        spread = spread.where(spread > 0, 1.0)
        numbers = {text: number for number, text in enumerate(sorted(set(texts)))}
        centred, views = (described - mean) / spread, views / spread
        within = within_texts(centred, torch.tensor([numbers[text] for text in texts]))
        metric = discriminant(centred.T @ centred / len(centred), within + views.T @ views / max(1, len(views)))
        tensors = {"mean": mean, "metric": metric / spread[:, None], "manner": first_axis(within) / spread}
        none = {name: torch.zeros(0) for name in STATE} | {"keys": torch.zeros(0, metric.shape[1])}
        found = cls(tuple(numbers), none | tensors)
        found.add(described, texts, codes)
        return found

    def emptied(self) -> Memory:
        """The same metric and manner, and nothing remembered."""
        return Memory((), {n: tensor if n in OF_TEXTS else tensor[:0] for n, tensor in self.state_dict().items()})

    def __len__(self) -> int:
        return len(self.owners)

    def add(
        self,
        described: Float[Tensor, "pictures described"],
        texts: Sequence[str],
        codes: Sequence[Sequence[int]] | None = None,
        pictures: Sequence[Image.Image] | None = None,
    ) -> None:
        """More pictures, under the metric that is there; without codes they are told of, never shown."""
        numbers = {text: number for number, text in enumerate(dict.fromkeys((*self.texts, *texts)))}
        keys, manners = self.keys_of(described)
        codes = [()] * len(texts) if codes is None else codes
        self._extend("keys", keys)
        self._extend("manners", manners)
        self._extend("owners", torch.tensor([numbers[text] for text in texts]))
        self._extend("codes", torch.tensor([code for one in codes for code in one]))
        self._extend("lengths", torch.tensor([len(one) for one in codes]))
        self.texts = tuple(numbers)
        self._keep(pictures, len(texts))
        self.__dict__.pop("by_words", None)
        self.__dict__.pop("by_codes", None)

    def _extend(self, name: str, more: Tensor) -> None:
        have = getattr(self, name)
        setattr(self, name, torch.cat([have, more.to(have)]))

    def _keep(self, pictures: Sequence[Image.Image] | None, count: int) -> None:
        files = [b""] * count if pictures is None else [_file(picture) for picture in pictures]
        self._extend("pictures", torch.from_numpy(np.frombuffer(b"".join(files), dtype=np.uint8).copy()))
        self._extend("sizes", torch.tensor([len(file) for file in files]))

    def keep_pictures(self, pictures: Sequence[Image.Image]) -> None:
        """Copies of all pictures, small ones, for a pixel decoder (lossless WebP)."""
        if len(pictures) != len(self):
            raise InputError(f"{len(pictures)} pictures for a memory of {len(self)}: give one each")
        self.pictures, self.sizes = self.pictures[:0], self.sizes[:0]
        self._keep(pictures, len(pictures))

    def picture(self, number: int) -> Image.Image:
        """The copy of a remembered picture; `InputError` where none is kept."""
        size, end = int(self.sizes[number]), int(self.sizes[: number + 1].sum())
        if not size:
            raise InputError("this memory keeps no copies of its pictures: train its pixels stage again")
        with Image.open(io.BytesIO(self.pictures[end - size : end].cpu().numpy().tobytes())) as image:
            return image.convert("RGB")

    def text_of(self, number: int) -> str:
        """What was said of a remembered picture."""
        return self.texts[int(self.owners[number])]

    def codes_of(self, number: int) -> tuple[int, ...]:
        """Codes of a remembered picture."""
        end = int(self.lengths[: number + 1].sum())
        return tuple(self.codes[end - int(self.lengths[number]) : end].tolist())

    def keys_of(
        self, described: Float[Tensor, "images described"]
    ) -> tuple[Float[Tensor, "images directions"], Float[Tensor, "images"]]:
        """Unit vectors that are compared by their cosines, and places along the manner."""
        centred = described - self.mean
        return F.normalize(centred @ self.metric, dim=1), centred @ self.manner

    def likeness(self, described: Float[Tensor, "images described"]) -> Float[Tensor, "images pictures"]:
        """Cosines with every picture of the memory, less up to `MANNER` where the same manner has drawn the text already.

        A text that it has drawn more than once loses nothing: what is shown of it may well be one more.
        """
        keys, manners = self.keys_of(described)
        alike = keys @ self.keys.T
        if not self.manner.any():  # no text of training had two pictures
            return alike
        same = 1 - ((manners[:, None] - self.manners) / APART).square().clamp(max=1)
        drawn = same.new_zeros(len(same), len(self.texts)).index_add_(1, self.owners, same)
        once = (1 - (drawn - 1).abs()).clamp(min=0)
        return alike - MANNER * once[:, self.owners] * (alike < VERY)

    def nearest(self, likeness: Float[Tensor, "images pictures"], count: int) -> list[list[str]]:
        """The `count` texts (or all) whose nearest picture is most alike, best first."""
        best = torch.full((len(likeness), len(self.texts)), -torch.inf, device=likeness.device)
        best = best.scatter_reduce(1, self.owners.expand(len(likeness), -1), likeness, "amax")
        ranked = best.topk(min(count, len(self.texts)), dim=1)
        pairs = zip(ranked.values.tolist(), ranked.indices.tolist(), strict=True)
        return [[self.texts[n] for v, n in zip(*row, strict=True) if v > -torch.inf] for row in pairs]

    @torch.no_grad()
    def recall(self, described: Float[Tensor, "images described"], count: int) -> list[list[str]]:
        """Texts of the pictures most like those described, `count` of each, nearest first."""
        return self.nearest(self.likeness(described), count)

    @torch.no_grad()
    def shown(self, prompt: str, count: int, described: Float[Tensor, "1 described"] | None = None) -> list[int]:
        """Up to `count` pictures to stand before a prompt, or before an edit of a picture that is described.

        That picture is called what the likest remembered one is called, and is itself never shown.
        """
        if described is None:
            return self.mentioned(prompt, count)
        likeness, (_, manners) = self.likeness(described), self.keys_of(described)
        itself = _places(likeness[0].cpu() >= VERY)
        return self.changed(self.nearest(likeness, 1)[0][0], float(manners[0]), prompt, count, without=itself)

    @cached_property
    def by_words(self) -> Index:
        """The texts by their words."""
        return Index([words(text) for text in self.texts])

    @cached_property
    def by_codes(self) -> Index:
        """The pictures by their codes."""
        return Index([part.tolist() for part in self.codes.split(self.lengths.tolist())])

    def mentioned(self, prompt: str, count: int, *, without: Collection[int] = ()) -> list[int]:
        """Up to `count` pictures whose texts a prompt mentions, best first; never those in `without`.

        The text comes first that is most like the prompt and most covered by it, then others of which `MENTIONED` stands in
        the rest of it, then more pictures of these texts. A picture without codes cannot be shown.
        """
        found = list(islice(self._mentioned(prompt, self._showable(without)), count))
        turns = (number for turn in zip_longest(*found) for number in turn if number is not None)
        return list(islice(turns, count))

    def changed(self, text: str, manner: float, prompt: str, count: int, *, without: Collection[int] = ()) -> list[int]:
        """Up to `count` pictures that one called `text`, in a manner, may become by a prompt; never those in `without`.

        The same text in the manner that is farthest comes first; then, each in the nearest manner, the other texts that the
        text and the prompt mention together.
        """
        free = self._showable(without)
        apart = (self.manners.cpu() - manner).abs()
        said = torch.tensor([each == text for each in self.texts], dtype=torch.bool)
        own = said[self.owners.cpu()]
        found = [max(numbers, key=lambda n: float(apart[n])) for numbers in [_places(free & own)] if numbers]
        others = islice(self._mentioned(f"{text} {prompt}", free & ~own), count - len(found))
        return found + [min(numbers, key=lambda n: float(apart[n])) for numbers in others]

    def _showable(self, without: Collection[int]) -> Bool[Tensor, "pictures"]:
        free = (self.lengths > 0).cpu()
        free[list(without)] = False
        return free

    def _mentioned(self, prompt: str, free: Bool[Tensor, "pictures"]) -> Iterator[list[int]]:
        """The free pictures of each text that a prompt mentions, best text first."""
        owners = self.owners.cpu()
        showable = torch.zeros(len(self.texts), dtype=torch.bool)
        showable[owners[free]] = True
        left, least = words(prompt), 0.0
        while True:
            covered = self.by_words.covered(left) * showable
            alike = self.by_words.alike(left) * covered * (covered >= least)
            if not alike.any():
                return
            best = int(alike.argmax())
            yield _places(free & (owners == best))
            showable[best], least = False, MENTIONED
            said = set(words(self.texts[best]))
            left = [word for word in left if word not in said]

    def likest(self, codes: Sequence[int], *, without: Collection[int] = ()) -> int:
        """The remembered picture whose codes are most like those given; `InputError` where there is none."""
        alike = self.by_codes.alike(codes)
        alike[list(without)] = -1
        if not len(alike) or alike.max() < 0:
            raise InputError("this memory has no picture that could be shown: train its language stage again")
        return int(alike.argmax())


def words(text: str) -> list[str]:
    """The words of a text in lower case without common and asking ones; one that comes twice is two ("man", "man 2")."""
    said: Counter[str] = Counter()
    found = []
    for word in re.findall(r"\w+", text.lower()):
        if word in COMMON_WORDS or word in ASKING_WORDS:
            continue
        said[word] += 1
        found.append(word if said[word] == 1 else f"{word} {said[word]}")
    return found


def _places(mask: Bool[Tensor, "pictures"]) -> list[int]:
    return mask.nonzero()[:, 0].tolist()


def _file(picture: Image.Image) -> bytes:
    buffer = io.BytesIO()
    picture.convert("RGB").save(buffer, "WEBP", lossless=True, method=6)
    return buffer.getvalue()
