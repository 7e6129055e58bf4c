"""Training at mini width: the share of the machine's matmul rate, and the rate of transformers.

    python benchmarks/train.py --data FOLDER [--threads 2] [--rows 8] [--tokens 512] [--runs 4]
                               [--json FILE]

The model has SmolLM2-135M's shape (30 blocks of 576, 9 heads of which 3 for keys and values, 49,152
text ids) and the visual rows of `codes`, random weights, fp32, everything trains. The documents are
those of --data, with a code drawn for each kept patch (a third of 100) in place of a trained
tokenizer's: lengths are what matters here.

mfu_ratio            (6 · parameters · useful tokens + attention inside documents, causal) / seconds
                     of a whole step with AdamW and clipping, over the best fp32 product of 1024³ to
                     4096³ just before and after it; the median over steps. Recomputation and
                     padding are not counted. A plain transformers step of 4×96 tokens gets about
                     0.66. Aim 0.70.
train_tokens_ratio   useful tokens a second of our packed step over those of a
                     `transformers.Trainer` step on the same documents in random order, batch 16,
                     padded to the longest, same weights. Aim 1.5.

Peak memory is that of the process. Steps alternate with the peer's; medians count. About ten
minutes on two idle cores; busy cores make every figure worthless.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    PrinterCallback,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

from lavit.config import InputError, LanguageTraining
from lavit.data.corpus import load_corpus
from lavit.data.documents import Documents
from lavit.language.model import Language
from lavit.language.reader import MergerReader
from lavit.sequence import IGNORE, Batch, Sequence, unpack
from lavit.train.language import train_text_tokenizer
from lavit.train.metrics import peak_gib
from lavit.visual_tokenizer.merger import Merger
from lavit.vocabulary import Vocabulary

SHAPE = {
    "model_type": "llama",
    "vocab_size": 49152,
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "max_position_embeddings": 8192,
    "tie_word_embeddings": True,
    "bos_token_id": None,
    "eos_token_id": 0,
}
PATCHES, DIM, CODES, KEPT = 100, 320, 1024, 33
PEER_BATCHES = 24  # of ours, whose documents the peer draws from


def matmul_rate(runs: int = 4) -> float:
    """Best fp32 product of 1024³, 2048³ and 4096³, in FLOP/s."""
    best = 0.0
    for size in (1024, 2048, 4096):
        a, b = torch.randn(size, size), torch.randn(size, size)
        for _ in range(runs if size < 4096 else 2):
            start = time.perf_counter()
            a @ b
            best = max(best, 2 * size**3 / (time.perf_counter() - start))
    return best


def make_documents(data: str, config: LanguageTraining) -> Documents:
    """Documents of a data set with drawn codes, about a third of the patches each."""
    corpus = load_corpus(data)
    generator = torch.Generator().manual_seed(0)
    lengths = (
        (KEPT + torch.randn(len(corpus), generator=generator)).round().long().clamp(1, PATCHES)
    )
    codes = tuple(
        tuple(torch.randint(CODES, (int(n),), generator=generator).tolist()) for n in lengths
    )
    text = train_text_tokenizer(corpus, 8192)
    vocabulary = Vocabulary(text_size=SHAPE["vocab_size"], codes=CODES, end=0)
    return Documents(corpus, codes, text=text, vocabulary=vocabulary, config=config, seed=0)


def make_language(layers: int) -> Language:
    """The model at mini width, random weights."""
    torch.manual_seed(0)
    options = {**SHAPE, "num_hidden_layers": layers}
    lm = AutoModelForCausalLM.from_config(
        AutoConfig.for_model(options.pop("model_type"), **options)
    )
    return Language(
        lm, MergerReader(Merger(DIM, 5, 2, 2.0), lm.config.hidden_size), codes=CODES, end=0
    ).train()


def flops(language: Language, batch: Batch) -> float:
    """FLOPs of one pass forward and backward: what the model needs, not what the code spends."""
    lm, width = language.lm, language.width
    parameters = sum(p.numel() for p in lm.parameters()) + language.rows.numel()
    tokens = int((batch.documents >= 0).sum())
    squares = sum(
        len(document) * (len(document) + 1) / 2
        for row in unpack(batch, language.vocabulary)
        for document in row
    )
    reader = sum(p.numel() for p in language.reader.parameters())
    read = int(batch.slots.sum())
    return (
        6 * parameters * tokens
        + 12 * lm.config.num_hidden_layers * width * squares
        + 6 * reader * read
    )


class Ours:
    """One packed step after the other, as the loop makes it."""

    def __init__(self, language: Language, documents: Documents) -> None:
        self.language, self.documents, self.step = language, documents, 0
        self.optimizer = torch.optim.AdamW(language.parameters(), lr=1e-5, eps=1e-6, fused=True)

    def __call__(self) -> tuple[float, int, float]:
        """Seconds, useful tokens and model FLOPs of one step; its batch is laid out beforehand."""
        batch = self.documents.batch(self.step)
        self.step += 1
        patches = torch.randn(len(batch.images), PATCHES, DIM)
        keep = torch.zeros(len(batch.images), PATCHES, dtype=torch.bool)
        for place, image in enumerate(batch.images.tolist()):
            keep[place, : len(self.documents.codes[image])] = True
        targets = int((batch.labels != IGNORE).sum())
        start = time.perf_counter()
        self.optimizer.zero_grad(set_to_none=True)
        loss = self.language(batch, patches, keep).total / targets
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.language.parameters(), 1.0)
        self.optimizer.step()
        float(loss.detach())
        seconds = time.perf_counter() - start
        return seconds, int((batch.documents >= 0).sum()), flops(self.language, batch)


class Clock(TrainerCallback):
    """Seconds of every step of a Trainer."""

    def __init__(self) -> None:
        self.seconds: list[float] = []

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        self.start = time.perf_counter()

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self.seconds.append(time.perf_counter() - self.start)


class Peer:
    """`transformers.Trainer` on the same documents as joint ids, in padded batches of 16."""

    batch = 16

    def __init__(self, language: Language, documents: Documents) -> None:
        options = {**SHAPE, "num_hidden_layers": language.lm.config.num_hidden_layers}
        options["vocab_size"] = language.vocabulary.size
        self.model = AutoModelForCausalLM.from_config(
            AutoConfig.for_model(options.pop("model_type"), **options)
        )
        with torch.no_grad():
            plain = language.lm.state_dict()
            joint = torch.cat([language.lm.get_input_embeddings().weight, language.rows])
            tables = {"model.embed_tokens.weight", "lm_head.weight"}
            self.model.load_state_dict({k: joint if k in tables else v for k, v in plain.items()})
        rows = [
            unpack(documents.batch(step), language.vocabulary)
            for step in range(1000, 1000 + PEER_BATCHES)
        ]
        self.sequences = [document for batch in rows for row in batch for document in row]
        self.tokens: list[int] = []

    def collate(self, sequences: list[dict[str, Sequence]]) -> dict[str, torch.Tensor]:
        """Padded to the longest; the model shifts labels itself."""
        found = [item["document"] for item in sequences]
        longest = max(map(len, found))
        self.tokens.append(sum(map(len, found)))
        ids = torch.tensor([[*s.ids, *[0] * (longest - len(s))] for s in found])
        mask = torch.tensor([[1] * len(s) + [0] * (longest - len(s)) for s in found])
        return {
            "input_ids": ids,
            "attention_mask": mask,
            "labels": ids.masked_fill(mask == 0, IGNORE),
        }

    def __call__(self, steps: int, seed: int) -> list[tuple[float, int]]:
        """Seconds and useful tokens of each step, the first (which makes the moments) left out."""
        self.tokens, clock = [], Clock()
        with tempfile.TemporaryDirectory() as folder:
            settings = TrainingArguments(
                folder,
                per_device_train_batch_size=self.batch,
                max_steps=steps + 1,
                learning_rate=1e-5,
                report_to=[],
                save_strategy="no",
                logging_strategy="no",
                use_cpu=True,
                seed=seed,
                disable_tqdm=True,
                remove_unused_columns=False,
                dataloader_num_workers=0,
            )
            data = [{"document": sequence} for sequence in self.sequences]
            trainer = Trainer(
                self.model,
                settings,
                data_collator=self.collate,
                train_dataset=data,
                callbacks=[clock],
            )
            trainer.remove_callback(PrinterCallback)
            trainer.train()
        return list(zip(clock.seconds, self.tokens[: len(clock.seconds)], strict=True))[1:]


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", required=True)
    parser.add_argument("--rows", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--layers", type=int, default=SHAPE["num_hidden_layers"])
    parser.add_argument("--runs", type=int, default=4)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--peer", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--json", type=Path)
    return parser.parse_args()


def main() -> None:
    """Measure, print a table."""
    options = arguments()
    torch.set_num_threads(options.threads)
    rates = {"learning_rate": 1e-5, "rows_rate": 1e-4, "reader_rate": 1e-4}
    config = LanguageTraining(steps=1, rows=options.rows, tokens=options.tokens, **rates)
    documents = make_documents(options.data, config)
    language = make_language(options.layers)
    peer = Peer(language, documents) if options.peer else None
    ours, theirs = Ours(language, documents), []
    ours()  # warm-up, moments
    steps, products = [], [matmul_rate()]
    for run in range(options.runs):
        steps.append(ours())
        products.append(matmul_rate())
        theirs += peer(1, seed=run) if peer else []
    # just before and just after each step
    best = [max(pair) for pair in itertools.pairwise(products)]
    mfu = statistics.median(
        work / seconds / rate for (seconds, _, work), rate in zip(steps, best, strict=True)
    )
    speed = statistics.median(tokens / seconds for seconds, tokens, _ in steps)
    useful = statistics.mean(tokens for _, tokens, _ in steps) / (options.rows * options.tokens)
    figures = {"mfu_ratio": round(mfu, 4)}
    print(
        f"{options.layers} blocks of 576, fp32, {options.threads} threads, "
        f"{options.rows} x {options.tokens} tokens a step"
    )
    rate = statistics.median(best)
    print(
        f"  best product       {rate / 1e9:9.1f} GFLOP/s   "
        f"({min(products) / 1e9:.1f} … {max(products) / 1e9:.1f})"
    )
    print(
        f"  our step           {speed:9.1f} tokens/s   {useful:.1%} of the row useful   "
        f"MFU {mfu:.3f} (aim 0.70)"
    )
    if theirs:
        other = sum(tokens for _, tokens in theirs) / sum(seconds for seconds, _ in theirs)
        mine = sum(tokens for _, tokens, _ in steps) / sum(seconds for seconds, _, _ in steps)
        figures["train_tokens_ratio"] = round(mine / other, 4)
        print(f"  Trainer's step     {other:9.1f} tokens/s   ratio {mine / other:.2f} (aim 1.5)")
    print(f"  peak memory        {peak_gib():9.2f} GiB of the process")
    if options.json:
        options.json.write_text(json.dumps({"figures": figures}) + "\n")


if __name__ == "__main__":
    try:
        main()
    except InputError as error:
        sys.exit(f"error: {error}")
