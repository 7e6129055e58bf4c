"""The same requests in free English, for models that begin with a language model's English.

`reworded` takes a prompt, a question, an edit or any other request in the language of scenes and
says it in another way. What is said of a scene stays in the language, which alone can be judged,
and so do the names of things: what is held out of a text is held out of its rewordings.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from functools import cache, partial

from lavit.data.scenes.chance import Rng, pick
from lavit.data.scenes.lexicon import NUMBERS, article
from lavit.data.scenes.parse import parse
from lavit.data.scenes.tasks import FULL, SHORT, TOGETHER, Message, SceneConversation
from lavit.data.scenes.world import BACKGROUNDS, COLOURS, PATTERNS, STYLES, Scene

FREE = 0.6  # of the requests of a pool are reworded
CAPITAL, MARKED = 0.5, 0.33  # of them begin with a capital, and end with a mark if they had none
JOINED = 0.3  # of two edits in turn are asked for at once
COURTEOUS = 0.35  # of the edits
COLOUR, GROUND = "|".join(COLOURS), "|".join(BACKGROUNDS)
PATTERN, STYLE = "|".join(PATTERNS), "|".join(STYLES.values())
IS = "is|are"
WHERE = "to the|on the|left of|right of|above|below|over|under"
Forms = tuple[str, ...]

QUESTIONS: tuple[tuple[str, Forms], ...] = (
    (r"what (?:is in the picture|do you see)\?", (
        "what can you see?", "what does the picture show?", "tell me what is in the picture",
        "which things are in it?",
    )),
    (r"is there (an? .+)\?", (
        "do you see {0}?", "can you see {0}?", "is {0} in the picture?",
        "does the picture have {0}?", "is {0} shown here?", "can you find {0} in this picture?",
    )),
    (r"are there any (.+)\?", (
        "do you see any {0}?", "can you see any {0}?", "does the picture show any {0}?",
        "are any {0} in it?",
    )),
    (r"how many (.+) (?:are there|do you see)\?", (
        "how many {0} can you see?", "how many {0} does the picture show?", "count the {0}",
        "what is the number of {0}?", "how many {0} are in the picture?",
        "tell me how many {0} there are",
    )),
    (r"what colour is the background\?", (
        "what is the colour of the background?", "which colour does the background have?",
        "what colour is behind the things?", "tell me the colour of the background",
    )),
    (r"(?:what pattern is the background|is the background plain, striped or dotted)\?", (
        "which pattern does the background have?", "what is the pattern of the background?",
        "is the background plain, or are there stripes or dots?",
    )),
    (rf"what colour ({IS}) the (.+)\?", (
        "which colour {0} the {1}?", "what is the colour of the {1}?",
        "tell me the colour of the {1}", "in which colour {0} the {1}?",
    )),
    (rf"where ({IS}) the (.+)\?", (
        "where can i find the {1}?", "where do you see the {1}?", "in which place {0} the {1}?",
        "tell me where the {1} {0}",
    )),
    (r"which is bigger, the (.+) or the (.+)\?", (
        "which one is larger, the {0} or the {1}?", "is the {0} or the {1} bigger?",
        "of the {0} and the {1}, which is bigger?", "which of the two is big, the {0} or the {1}?",
    )),
    (r"are there more (.+) than (.+)\?", (
        "do you see more {0} than {1}?", "does the picture have more {0} than {1}?",
        "is the number of {0} larger than the number of {1}?",
    )),
)  # fmt: skip
EDITS: tuple[tuple[str, Forms], ...] = (
    (r"(?:add|put|draw) ((?:an?|two) .+)", (
        "place {0}", "i would like {0} too", "there should be {0} as well", "insert {0}",
    )),
    (r"(?:remove|take away|delete) (the .+)", (
        "get rid of {0}", "i do not want {0}", "take {0} out", "erase {0}", "leave {0} out",
    )),
    (r"replace (the .+?) (?:with|by) (.+)|turn (the .+?) into (.+)", (
        "i want {1} instead of {0}", "change {0} into {1}", "put {1} in the place of {0}",
        "let {0} become {1}",
    )),
    (rf"(?:move|put) (the .+?) ((?:{WHERE}) .+)", (
        "i want {0} {1}", "bring {0} {1}", "{0} should be {1}", "let {0} stand {1}",
    )),
    (r"(?:swap the places of|swap|exchange) (the .+) and (the .+)", (
        "let {0} and {1} change places", "switch {0} and {1}", "{0} and {1} should trade places",
    )),
    (rf"make the background ({GROUND})|change the background to ({GROUND})", (
        "i want {a0} background", "let the background be {0}", "colour the background {0}",
        "use {0} for the background",
    )),
    (rf"(?:make|change|give) (?:it|the) .*?({PATTERN})(?: background)?", (
        "i want {a0} background", "let the background be {0}", "use {a0} background",
    )),
    (r"put it on an? (.+) background", (
        "i want it on {a0} background", "set it against {a0} background",
        "the background should be {0}",
    )),
    (rf"(?:make|paint) (the .+) ({COLOUR})|change the colour of (the .+) to ({COLOUR})", (
        "i want {0} to be {1}", "let {0} be {1}", "colour {0} {1}", "{0} should be {1}",
        "turn {0} {1}",
    )),
    (r"make (the .+) small(?:er)?", ("shrink {0}", "let {0} be smaller", "make {0} little")),
    (r"make (the .+) big(?:ger)?", ("enlarge {0}", "let {0} be larger", "make {0} large")),
    (rf"draw it (?:in the )?({STYLE})(?: style)?|make it ({STYLE})", (
        "i want it {0}", "redraw it in the {0} style", "use the {0} style",
    )),
    (r"make it (.+)", ("i want {0}", "let there be {0}", "there should be {0}")),
    (r"change the number of (.+) to (.+)", ("the number of {0} should be {1}",)),
    (r"(?:put )?(the .+) of the first picture on the background of the second", (
        "use the background of the second picture for {0} of the first",
        "{0} of the first picture, but on the background of the second",
    )),
)  # fmt: skip
OTHERS: dict[tuple[str, ...], Forms] = {
    TOGETHER: (
        "put everything into one picture", "merge the two pictures", "one picture with the "
        "things of both",
    ),
    FULL: (
        "describe everything you see", "tell me everything about the picture",
        "give me a full description of the picture",
    ),
    SHORT: ("caption this picture", "say in short what you see", "describe it in a few words"),
}  # fmt: skip
PROMPTS = (
    "i would like to see {0}", "please draw {0}", "i want a picture of {0}", "let me see {0}",
    "give me a picture with {0}", "create an image of {0}", "make a picture that shows {0}",
    "an image of {0}", "imagine {0}", "can you draw {0}?", "could you paint {0} for me?",
)  # fmt: skip
COURTESY = ("please {0}", "{0}, please", "can you {0}?", "could you {0}?", "now {0}", "then {0}")
REQUEST = re.compile(r"(?:draw a picture of|a picture of|draw|paint|show me) (?=[a-z])")
THINGS = re.compile(rf"(?:an?|{'|'.join(NUMBERS[1:])}) (?!.*background (?:with|:))")
ORDER = re.compile(
    r"(?:add|bring|change|colour|create|delete|draw|enlarge|erase|exchange|get|give|insert|leave|"
    r"let|make|merge|move|paint|place|put|redraw|remove|replace|set|shrink|swap|switch|take|turn|"
    r"use) "
)
WORDS: dict[str, Forms] = {  # other words for some, as often as they stand here
    "small": ("small", "little", "tiny"), "big": ("big", "large", "huge"),
    "striped": ("striped", "stripy"), "dotted": ("dotted", "spotted"),
    "two": ("two", "two", "2"), "three": ("three", "three", "3"), "four": ("four", "four", "4"),
    "above": ("above", "above", "over", "on top of"),
    "below": ("below", "below", "under", "beneath", "underneath"),
    "on a": ("on a", "on a", "in front of a", "with a"),
}  # fmt: skip
ANY_WORD = re.compile(rf"\b({'|'.join(WORDS)})\b")


def reworded(text: str, rng: Rng) -> str:
    """A request in other words; one that is known in no others comes back as it is."""
    for known, forms in OTHERS.items():
        if text in known:
            return pick(rng, forms)
    if question := _form(text, QUESTIONS, rng):
        return question
    prompt, changed = parse(text) is not None, _form(text, EDITS, rng)
    if prompt and not (changed and text.startswith(("add ", "put "))):
        return _varied(_prompt(text, rng), rng)
    changed = _varied(changed or text, rng)
    if rng.random() < COURTEOUS and ORDER.match(changed) and "?" not in changed:
        return pick(rng, COURTESY).format(changed)
    return changed


def freely(text: str, rng: Rng) -> str:
    """A request as people type it: most in other words, some with a capital and a mark."""
    return _typed(_maybe(text, rng), rng)


def _maybe(text: str, rng: Rng) -> str:
    return reworded(text, rng) if rng.random() < FREE else text


def _typed(text: str, rng: Rng) -> str:
    if rng.random() < CAPITAL:
        text = text[:1].upper() + text[1:]
    if text[-1:].isalnum() and rng.random() < MARKED:
        text += pick(rng, (".", ".", "!"))
    return text


def reworded_talk(talk: SceneConversation, rng: Rng) -> SceneConversation:
    """A conversation of which the user says most in other words, and some edits two at a time."""
    found: list[Message] = []
    for asked, given in zip(talk.messages[::2], talk.messages[1::2], strict=True):
        if (both := _joined(found, asked, given, rng)) is not None:
            found[-2:] = [both, given]
            continue
        found += [_said(asked, partial(_maybe, rng=rng)), given]
    asks = [_said(one, partial(_typed, rng=rng)) if one.role == "user" else one for one in found]
    return SceneConversation(tuple(asks))


def _said(message: Message, how: Callable[[str], str]) -> Message:
    """A message whose texts are said in another way."""
    parts = (how(part) if isinstance(part, str) else part for part in message.parts)
    return replace(message, parts=tuple(parts))


def _joined(found: list[Message], asked: Message, given: Message, rng: Rng) -> Message | None:
    """This edit and the one just before it as one request, now and then."""
    if len(found) < 4 or not all(isinstance(one.parts[0], Scene) for one in (given, found[-1])):
        return None
    first, second = found[-2].parts, asked.parts
    edits = [one[0] for one in (first, second) if len(one) == 1]
    orders = [text for text in edits if isinstance(text, str) and ORDER.match(text)]
    if len(orders) < 2 or rng.random() >= JOINED or any(parse(text) for text in orders):
        return None
    return Message("user", (f"{orders[0].removesuffix('?')} and {orders[1]}",))


def _form(text: str, table: tuple[tuple[str, Forms], ...], rng: Rng) -> str | None:
    """A text by the first pattern that is like it, in one of its other forms."""
    for pattern, forms in table:
        if like := re.fullmatch(pattern, text):
            words = [part for part in like.groups() if part is not None]
            an = {f"a{place}": article(part) for place, part in enumerate(words)}
            return pick(rng, forms).format(*words, **an)
    return None


def _prompt(text: str, rng: Rng) -> str:
    """A prompt that asks in another way, if it begins with the things."""
    body = REQUEST.sub("", text, count=1) if REQUEST.match(text) else text
    if not THINGS.match(body):
        return text
    forms = [form for form in PROMPTS if "." not in body or not form.endswith("?")]
    return pick(rng, forms).format(body)


def _varied(text: str, rng: Rng) -> str:
    return ANY_WORD.sub(lambda found: pick(rng, WORDS[found[0]]), text)


@cache
def words_of_rewording() -> frozenset[str]:
    """Every word that rewordings bring into the language."""
    tables = [form for _, forms in (*QUESTIONS, *EDITS) for form in forms]
    tables += [form for forms in (*OTHERS.values(), *WORDS.values()) for form in forms]
    return frozenset(re.findall(r"[a-z]+(?!\w*\})", " ".join((*tables, *PROMPTS, *COURTESY))))
