"""How captions are scored on COCO: CIDEr-D, BLEU and ROUGE-L, with the choices of its server.

CIDEr-D   Vedantam et al. 2015: mean over n = 1..4 of clipped tf-idf cosines, sigma 6, times 10;
          document frequencies are those of the references of the pictures that are scored
BLEU      Papineni et al. 2002: of the whole set, the closest reference's length
ROUGE-L   Lin 2004: best precision and best recall over references, beta 1.2

WordList are those of the Penn Treebank in lower case without punctuation, as Stanford's tokenizer
gives them; ours is a regular expression, so that no Java is needed. Scores are in points (x 100).
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Sequence

import numpy as np

ORDERS = 4  # longest n-grams
SIGMA = 6.0  # of CIDEr-D's penalty of lengths
BETA = 1.2  # weight of recall in ROUGE-L

WordList = list[str]
Grams = Counter[tuple[str, ...]]

# words that are two, a clitic behind a word, abbreviations, numbers, words, and other marks
SPLIT = {"cannot": "can not", "gonna": "gon na", "gotta": "got ta", "wanna": "wan na"}
SPLIT |= {"gimme": "gim me", "lemme": "lem me", "'tis": "'t is", "'twas": "'t was"}
# brackets have names, which the server's list of punctuation has in capitals: they stay
SPLIT |= {"(": "-lrb-", ")": "-rrb-", "[": "-lsb-", "]": "-rsb-", "{": "-lcb-", "}": "-rcb-"}
# whose full stop belongs to them, at the end of a caption too
ABBREVIATIONS = """
    adm ala apr ariz assn aug ave bldg blvd bros calif capt cmdr co col colo conn corp cpl ct dak
    dec dept dr esq est etc ext feb fla fri ft ga gen gov hon inc ind intl jan jr jul jun ky lt ltd
    maj mar md messrs mfg mich minn mo mon mont mr mrs ms mt natl neb nev nov oct okla penn pres
    prof pvt rd rep rev sen sep sept sgt sq sr st ste tel tenn thu thurs tue tues univ va vs vt wed
    wis wyo
"""
WORD = re.compile(
    rf"""https?://\S+
    |n't\b|'n'|'(?:s|m|d|ll|re|ve|n)\b    # do n't, rock 'n' roll, man 's
    |(?<!\w)'(?:em|till?|cause|tis|twas|\d\ds?)\b  # '90s
    |\w+?(?=n't\b)
    |(?:s'mores|c'mon|ma'ams?|ne'er|e'er|li'l|nat'l|ev'ry|nor'easter)\b
    |(?:ol|dunkin|somethin)'(?!\w)|y'(?=[a-z])
    |[dlo]'(?!(?:s|m|d|ll|re|ve)\b)[^\W\d]\w*  # o'clock
    |(?:[a-z]\.){{2,}}                      # u.s.
    |(?:{"|".join(ABBREVIATIONS.split())}|ph\.d|(?:no|fig|pp)(?=\.\s*\d)|[a-z](?=\.\s+\w))\.
    |\d+(?:st|nd|rd|th|s)?(?:-\w+)+       # 10-year-old
    |\d+[^\W\d]\w*                       # 6ft
    |(?:(?<!\S)[-+])?(?:\d+(?:[.,:/]\d+)*|(?<!\w)\.\d+)  # 1,000 and 10:30
    |(?-i:[A-Z]+(?:&[A-Z]+)+)             # AT&T
    |\w+(?:[-/@.]\w+)*                   # black-and-white
    |[\#@][a-z]\w*|[!?]{{2,}}|[$%&+=@\#*/()[\]{{}}<>~^|\\°]""",
    re.VERBOSE | re.IGNORECASE,
)
SIGNS = str.maketrans(
    {"’": "'", "‘": "'", "“": '"', "”": '"', "½": " 1/2 ", "¼": " 1/4 ", "¾": " 3/4 "}
    | {"¢": " cents ", "£": "#", "€": "$"}
)


def caption_words(text: str) -> WordList:
    """The words of a caption, in lower case and without punctuation."""
    found = (token.lower() for token in WORD.findall(text.translate(SIGNS)))
    return [word for token in found for word in SPLIT.get(token, token).split(" ")]


def grams(words: WordList, orders: Sequence[int] = range(1, ORDERS + 1)) -> Grams:
    """How often each n-gram of these orders stands in words."""
    return Counter(tuple(words[at : at + n]) for n in orders for at in range(len(words) - n + 1))


def cider(said: Sequence[WordList], references: Sequence[Sequence[WordList]]) -> list[float]:
    """CIDEr-D of each caption, in points."""
    counted = [[grams(words) for words in each] for each in references]
    documents: Grams = Counter()
    for each in counted:
        documents.update({gram for one in each for gram in one})
    log_count = math.log(len(references))

    def weighed(counts: Grams) -> tuple[list[dict[tuple[str, ...], float]], list[float], int]:
        """tf-idf by order, the norms, and the length."""
        vectors: list[dict[tuple[str, ...], float]] = [{} for _ in range(ORDERS)]
        for gram, count in counts.items():
            rarity = log_count - math.log(max(1, documents[gram]))
            vectors[len(gram) - 1][gram] = count * rarity
        norms = [math.sqrt(sum(x * x for x in vector.values())) for vector in vectors]
        pairs = sum(count for gram, count in counts.items() if len(gram) == 2)
        return vectors, norms, pairs

    scores = []
    for words, each in zip(said, counted, strict=True):
        ours, norms, length = weighed(grams(words))
        total = 0.0
        for theirs, other_norms, other_length in map(weighed, each):
            penalty = math.exp(-((length - other_length) ** 2) / (2 * SIGMA**2))
            for own, other, a, b in zip(ours, theirs, norms, other_norms, strict=True):
                product = sum(min(x, other.get(gram, 0.0)) * other.get(gram, 0.0)
                              for gram, x in own.items())  # fmt: skip
                total += penalty * product / (a * b) if a and b else 0.0
        scores.append(100 * 10 * total / (ORDERS * len(each)))
    return scores


def bleu_counts(said: Sequence[WordList], references: Sequence[Sequence[WordList]]) -> np.ndarray:
    """What BLEU sums over captions, `[captions, 2 + 2 * 4]`: length, closest reference's length,
    n-grams of each order, and those of them that are right.
    """
    rows = []
    for words, each in zip(said, references, strict=True):
        closest = min((abs(len(one) - len(words)), len(one)) for one in each)[1]
        row = [len(words), closest]
        right = []
        for n in range(1, ORDERS + 1):
            ours = grams(words, [n])
            best: Grams = Counter()
            for one in each:
                best |= grams(one, [n])  # the larger of each count
            row.append(sum(ours.values()))
            right.append(sum((ours & best).values()))
        rows.append(row + right)
    return np.array(rows, dtype=np.float64)


def bleu(counts: np.ndarray, n: int) -> float:
    """BLEU-n of the captions whose `bleu_counts` these are, in points."""
    sums = counts.sum(0)
    length, closest = sums[:2]
    tried, right = sums[2 : 2 + n], sums[2 + ORDERS : 2 + ORDERS + n]
    if not right.all():
        return 0.0
    shortness = min(0.0, 1 - closest / length)
    return float(100 * np.exp(np.log(right / tried).mean() + shortness))


def rouge_l(words: WordList, references: Sequence[WordList]) -> float:
    """ROUGE-L of one caption, in points."""
    common = [_common(words, one) for one in references]
    if not words or not any(common):
        return 0.0
    precision = max(common) / len(words)
    recall = max(x / len(one) for x, one in zip(common, references, strict=True) if one)
    return 100 * (1 + BETA**2) * precision * recall / (recall + BETA**2 * precision)


def _common(a: WordList, b: WordList) -> int:
    """Length of the longest common subsequence."""
    row = [0] * (len(b) + 1)
    for x in a:
        before = 0  # what the row above has one column to the left
        for at, y in enumerate(b, 1):
            above = row[at]
            row[at] = before + 1 if x == y else max(row[at - 1], above)
            before = above
    return row[-1]
