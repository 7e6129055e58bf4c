"""A faster step for Llama-shaped LMs in fp32 on a CPU; equal to the plain one up to rounding.

A step reads every weight once, so its floor is bytes over memory bandwidth; products of 2 … 16 rows through `F.linear`
stay far above it. Here the weights are packed for MKL, q-k-v and gate-up are one product each, LoRA is merged into the
packed copy, and grouped queries enter attention as rows of one key head.

Prompts are read by the LM itself. `decoder_for` chooses between this and the plain way, and logs the choice.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from functools import cache

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from lavit.generate.cache import LaneCache
from lavit.generate.decoder import Decoder
from lavit.modules.language import Language

log = logging.getLogger(__name__)

LLAMA_SHAPED = ("LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM")
# Rows that the packing is told to expect. Any number is computed right (`packing_works` tries it); up to this many are
# fast: packed for 8, sixteen rows take 1.4 times what they take packed for 64, which costs fewer rows nothing.
PACK_ROWS = 64


class Packed:
    """A linear layer with its weight `[out, in]` packed for MKL; fp32 rows in, rows out."""

    def __init__(self, weight: Float[Tensor, "out in"], bias: Float[Tensor, "out"] | None = None) -> None:
        self.weight = weight.detach().contiguous()
        self.bias = None if bias is None else bias.detach()
        self.packed = torch.ops.mkl._mkl_reorder_linear_weight(self.weight, PACK_ROWS)
        self.weight = self.weight.new_empty(1).expand(weight.shape)  # the kernel reads only the shape

    def __call__(self, x: Float[Tensor, "rows in"]) -> Float[Tensor, "rows out"]:
        """Rows times weight, plus bias."""
        return torch.ops.mkl._mkl_linear(x, self.packed, self.weight, self.bias, x.shape[0])


@cache
def packing_works() -> bool:
    """True where this torch packs for MKL, and one packing serves any number of rows (tried on a small product)."""
    if not (torch.backends.mkl.is_available() and hasattr(torch.ops.mkl, "_mkl_reorder_linear_weight")):
        return False
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(96, 64, generator=generator)
    packed = Packed(weight)
    rows = [torch.randn(count, 64, generator=generator) for count in (1, 2, 3, 8, 33)]
    return all(torch.allclose(packed(x), F.linear(x, weight), atol=1e-4) for x in rows)


@dataclass(frozen=True)
class Layer:
    """The packed weights of one block."""

    norm_attention: Tensor
    qkv: Packed
    out: Packed
    norm_mlp: Tensor
    gate_up: Packed
    down: Packed


class PackedDecoder(Decoder):
    """`Decoder` with packed weights for the step and the heads. The weights are copied: later changes do not count."""

    def __init__(self, language: Language) -> None:
        super().__init__(language)
        self.config = language.lm.config
        self.eps = self.config.rms_norm_eps
        self.layers = [_pack(block) for block in language.body.layers]
        self.norm = language.body.norm.weight.detach()
        self.text_head = Packed(*_joined(language.lm.get_output_embeddings()))
        self.visual_head = Packed(self._head_rows[language.vocabulary.writing])

    def step(self, ids: Int[Tensor, "lanes"], memory: LaneCache) -> Float[Tensor, "lanes width"]:
        """Read one joint id per lane; returns its hidden state."""
        x = self.language.embed(ids[:, None])
        positions = memory.begin(1)
        mask = memory.mask(positions, x.dtype)
        cos, sin = self.language.body.rotary_emb(x, positions)
        half = sin.shape[-1] // 2
        turn = torch.cat([-sin[..., :half], sin[..., half:]], -1)  # the sign of the rotated half
        x = x[:, 0]
        for number, layer in enumerate(self.layers):
            x = x + layer.out(
                self._attend(layer.qkv(self._norm(x, layer.norm_attention)), cos, turn, mask, memory, number)
            )
            gate, up = layer.gate_up(self._norm(x, layer.norm_mlp)).chunk(2, -1)
            x = x + layer.down(F.silu(gate) * up)
        memory.advance([1] * len(ids))
        return self._norm(x, self.norm)

    def _attend(self, qkv: Tensor, cos: Tensor, turn: Tensor, mask: Tensor, memory: LaneCache, number: int) -> Tensor:
        lanes, dim = qkv.shape[0], cos.shape[-1]
        kv_heads = self.config.num_key_value_heads
        query_heads = self.config.num_attention_heads
        qkv = qkv.view(lanes, -1, dim)
        turned, v = qkv.split([query_heads + kv_heads, kv_heads], 1)
        turned = torch.addcmul(turned * cos, turned.roll(dim // 2, -1), turn)
        q, k = turned.split([query_heads, kv_heads], 1)
        keys, values = memory.update(k[:, :, None], v[:, :, None], number)
        out = F.scaled_dot_product_attention(q.reshape(lanes, kv_heads, -1, dim), keys, values, attn_mask=mask)
        return out.reshape(lanes, -1)

    def _norm(self, x: Tensor, weight: Tensor) -> Tensor:
        return F.rms_norm(x, weight.shape, weight, self.eps)

    def text_logits(self, hidden: Float[Tensor, "lanes width"]) -> Float[Tensor, "lanes text"]:
        """Logits of the text ids."""
        return self.text_head(hidden)

    def writing_logits(self, hidden: Float[Tensor, "lanes width"]) -> Float[Tensor, "lanes writing"]:
        """Logits of what may stand inside an image: image end and the codes."""
        return self.visual_head(hidden)


def _joined(*linears: nn.Module) -> tuple[Tensor, Tensor | None]:
    """Weights and biases of linear layers as those of one layer; LoRA is merged."""
    weights, biases = [], []
    for linear in linears:
        base = linear.get_base_layer() if hasattr(linear, "get_base_layer") else linear
        weight = base.weight.detach()
        if base is not linear and not linear.merged and not linear.disable_adapters:
            weight = weight + sum(linear.get_delta_weight(name).detach() for name in linear.active_adapters)
        weights.append(weight)
        biases.append(base.bias)
    return torch.cat(weights), None if biases[0] is None else torch.cat(biases)


def _pack(block: nn.Module) -> Layer:
    attention, mlp = block.self_attn, block.mlp
    return Layer(
        block.input_layernorm.weight.detach(),
        Packed(*_joined(attention.q_proj, attention.k_proj, attention.v_proj)),
        Packed(*_joined(attention.o_proj)),
        block.post_attention_layernorm.weight.detach(),
        Packed(*_joined(mlp.gate_proj, mlp.up_proj)),
        Packed(*_joined(mlp.down_proj)),
    )


def obstacle(language: Language) -> str | None:
    """Why the packed step cannot serve this LM here; None where it can."""
    config = language.lm.config
    linears = [m for m in language.body.modules() if hasattr(m, "get_base_layer") or isinstance(m, nn.Linear)]
    for holds, why in (
        (
            type(language.lm).__name__ in LLAMA_SHAPED,
            f"{type(language.lm).__name__} is not Llama-shaped",
        ),
        (language.rows.device.type == "cpu", f"it is on {language.rows.device.type}"),
        (not hasattr(language.lm, "hf_device_map"), "accelerate has spread its layers"),
        (getattr(language.lm, "hf_quantizer", None) is None, "its weights are rounded already"),
        (
            all(p.dtype == torch.float32 for p in language.lm.parameters()),
            "its weights are not all fp32",
        ),
        (getattr(config, "hidden_act", None) == "silu", "its activation is not SiLU"),
        (not getattr(config, "use_sliding_window", False), "its attention slides"),
        (
            all(type(m) is nn.Linear or _is_lora(m) for m in linears),
            "it has linear layers of an unknown kind",
        ),
        (packing_works(), "this torch has no packed products"),
    ):
        if not holds:
            return why
    return None


def _is_lora(module: nn.Module) -> bool:
    plain = hasattr(module, "get_delta_weight") and type(module.get_base_layer()) is nn.Linear
    return plain and not any(getattr(module, "use_dora", {}).values())


def decoder_for(language: Language, *, compile: str | None = None) -> Decoder:
    """Choose the decoder of an LM: packed where it can be, with static shapes on CUDA, plain elsewhere.

    `compile` names a backend of `torch.compile` ("inductor", "cudagraphs") for the plain step; each number of lanes is
    compiled once.
    """
    why = "it is to be compiled" if compile else obstacle(language)
    name = type(language.lm).__name__
    if why is None:
        log.info("%s: packed fp32 step on the CPU", name)
        return PackedDecoder(language)
    static = compile is not None or language.rows.device.type == "cuda"
    log.info("%s: step through transformers, %s, because %s", name, "static" if static else "growing", why)
    return Decoder(language, static=static, compile=compile)
