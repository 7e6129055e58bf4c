"""A faster step for Llama-shaped LMs in fp32 on a CPU; equal to the plain one up to rounding.

A step's floor is the bytes of its weights over memory bandwidth; products of 2-16 rows through
`F.linear` stay far above it. Here the weights are packed for MKL, q-k-v and gate-up are one product
each, LoRA is merged into the packed copy, and grouped queries enter attention as rows of one key
head. Prompts are read by the LM itself.
"""

from __future__ import annotations

import logging
from functools import cache
from typing import Any, cast

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from lavit.generate.decoder import Decoder, Hidden, LaneCache
from lavit.language.lora import is_lora, merged_weight
from lavit.language.model import Language

log = logging.getLogger(__name__)

# Qwen3 has a norm on each head's query and key besides
LLAMA_SHAPED = ("LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM")
# Rows that the packing is made for. Any number is computed right (`packing_works` tries it);
# up to this many are fast: packed for 8, sixteen rows take 1.4 times what they take packed for 64,
# which costs fewer rows nothing.
PACK_ROWS = 64


class Packed:
    """A linear layer with its weight `[out, in]` packed for MKL; fp32 rows in, rows out."""

    def __init__(self, weight: Tensor, bias: Tensor | None = None) -> None:
        weight = weight.detach().contiguous()
        self.bias = None if bias is None else bias.detach()
        self.packed = torch.ops.mkl._mkl_reorder_linear_weight(weight, PACK_ROWS)
        self.weight = weight.new_empty(1).expand(weight.shape)  # the kernel reads only the shape

    @classmethod
    def of(cls, *linears: Any) -> Packed:
        """Linear layers of one input as one; LoRA is merged."""
        weights, biases = [], []
        for linear in linears:
            weights.append(merged_weight(linear).detach())
            biases.append((linear.get_base_layer() if is_lora(linear) else linear).bias)
        return cls(torch.cat(weights), None if biases[0] is None else torch.cat(biases))

    def __call__(self, x: Float[Tensor, "rows in"]) -> Float[Tensor, "rows out"]:
        """Rows times weight, plus bias."""
        return torch.ops.mkl._mkl_linear(x, self.packed, self.weight, self.bias, x.shape[0])


@cache
def packing_works() -> bool:
    """True where this torch packs for MKL, and one packing serves any number of rows (tried)."""
    known = hasattr(torch.ops.mkl, "_mkl_reorder_linear_weight")
    if not (torch.backends.mkl.is_available() and known):
        return False
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(96, 64, generator=generator)
    packed = Packed(weight)
    rows = [torch.randn(count, 64, generator=generator) for count in (1, 2, 3, 8, 33)]
    return all(torch.allclose(packed(x), F.linear(x, weight), atol=1e-4) for x in rows)


class Layer:
    """The packed weights of one block."""

    def __init__(self, block: Any) -> None:
        attention, mlp = block.self_attn, block.mlp
        self.norm_attention = block.input_layernorm.weight.detach()
        self.qkv = Packed.of(attention.q_proj, attention.k_proj, attention.v_proj)
        self.norm_heads = _head_norms(attention)
        self.out = Packed.of(attention.o_proj)
        self.norm_mlp = block.post_attention_layernorm.weight.detach()
        self.gate_up = Packed.of(mlp.gate_proj, mlp.up_proj)
        self.down = Packed.of(mlp.down_proj)


def _head_norms(attention: Any) -> Float[Tensor, "heads dim"] | None:
    """Weights of the norms of all queries and keys, a row for each head; None without them."""
    if not hasattr(attention, "q_norm"):
        return None
    weights = []
    for norm, linear in (
        (attention.q_norm, attention.q_proj),
        (attention.k_norm, attention.k_proj),
    ):
        weight = norm.weight.detach()
        weights.append(weight.expand(linear.out_features // len(weight), -1))
    return torch.cat(weights)


class PackedDecoder(Decoder):
    """`Decoder` with packed copies of weights for step and heads: later changes do not count."""

    def __init__(self, language: Language) -> None:
        super().__init__(language)
        self.config = language.lm.config
        self.body = cast(Any, language.body)
        self.layers = [Layer(block) for block in self.body.layers]
        self.norm: Tensor = self.body.norm.weight.detach()
        self.text_head = Packed.of(language.lm.get_output_embeddings())
        self.visual_head = Packed(self._head_rows[language.vocabulary.writing])

    def read(self, embeddings: Float[Tensor, "lanes 1 width"], memory: LaneCache) -> Hidden:
        """Read one embedding per lane; returns its hidden state."""
        x = embeddings
        positions, mask = memory.begin(1, x.dtype)
        cos, sin = self.body.rotary_emb(x, positions)
        x, lanes, dim = x[:, 0], len(x), cos.shape[-1]
        turn = torch.cat([-sin[..., : dim // 2], sin[..., dim // 2 :]], -1)  # the turned half
        heads, pairs = self.config.num_attention_heads, self.config.num_key_value_heads
        for number, layer in enumerate(self.layers):
            qkv = layer.qkv(self._norm(x, layer.norm_attention)).view(lanes, -1, dim)
            turned, v = qkv.split([heads + pairs, pairs], 1)
            if layer.norm_heads is not None:
                turned = self._norm(turned, None) * layer.norm_heads
            turned = torch.addcmul(turned * cos, turned.roll(dim // 2, -1), turn)
            q, k = turned.split([heads, pairs], 1)
            keys, values = memory.update(k[:, :, None], v[:, :, None], number)
            q = q.reshape(lanes, pairs, -1, dim)
            mixed = F.scaled_dot_product_attention(q, keys, values, attn_mask=mask)
            x = x + layer.out(mixed.reshape(lanes, -1))
            gate, up = layer.gate_up(self._norm(x, layer.norm_mlp)).chunk(2, -1)
            x = x + layer.down(F.silu(gate) * up)
        memory.advance([1] * lanes)
        return self._norm(x, self.norm)

    def _norm(self, x: Tensor, weight: Tensor | None) -> Tensor:
        return F.rms_norm(x, x.shape[-1:], weight, self.config.rms_norm_eps)

    def text_logits(self, hidden: Hidden) -> Float[Tensor, "lanes text"]:
        """Logits of the text ids."""
        return self.text_head(hidden)

    def writing_logits(self, hidden: Hidden) -> Float[Tensor, "lanes writing"]:
        """Logits of what may stand inside an image: image end and the codes."""
        return self.visual_head(hidden)


def obstacle(language: Language) -> str | None:
    """Why the packed step cannot serve this LM here; None where it can."""
    lm, config = language.lm, language.lm.config
    name, device = type(lm).__name__, language.rows.device.type
    modules = language.body.modules()
    linears = [m for m in modules if isinstance(m, nn.Linear) or is_lora(m)]
    for holds, why in (
        (name in LLAMA_SHAPED, f"{name} is not Llama-shaped"),
        (device == "cpu", f"it is on {device}"),
        (not hasattr(lm, "hf_device_map"), "accelerate has spread its layers"),
        (getattr(lm, "hf_quantizer", None) is None, "its weights are rounded already"),
        (all(p.dtype == torch.float32 for p in lm.parameters()), "its weights are not all fp32"),
        (getattr(config, "hidden_act", None) == "silu", "its activation is not SiLU"),
        (not getattr(config, "use_sliding_window", False), "its attention slides"),
        (all(map(_known, linears)), "it has linear layers of an unknown kind"),
        (packing_works(), "this torch has no packed products"),
    ):
        if not holds:
            return why
    return None


def _known(module: Any) -> bool:
    """True for a plain linear layer, alone or under LoRA."""
    if type(module) is nn.Linear:
        return True
    plain = is_lora(module) and type(module.get_base_layer()) is nn.Linear
    return plain and not any(getattr(module, "use_dora", {}).values())


def decoder_for(language: Language, *, compile: str | None = None) -> Decoder:
    """The decoder of an LM: packed where it can be, with static shapes on CUDA, plain elsewhere.

    `compile` names a backend of `torch.compile` ("inductor", "cudagraphs") for the plain step; each
    number of lanes is compiled once.
    """
    why = "it is to be compiled" if compile else obstacle(language)
    name = type(language.lm).__name__
    if why is None:
        log.info("%s: packed fp32 step on the CPU", name)
        return PackedDecoder(language)
    static = compile is not None or language.rows.device.type == "cuda"
    shapes = "static" if static else "growing"
    log.info("%s: step through transformers, %s, because %s", name, shapes, why)
    return Decoder(language, static=static, compile=compile)
