"""LoRA (arXiv 2106.09685) through peft: put into a causal LM, merged, taken out."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from lavit.config import InputError, LanguageConfig, require


def inject_lora(lm: PreTrainedModel, config: LanguageConfig) -> None:
    """Put LoRA layers into an LM in place; of its weights only they train then.

    Raises `InputError` for an LM that has none of the layers.
    """
    peft = require("peft", extra="mini")
    rank, targets = config.lora_rank, list(config.lora_targets)
    if not any(name.rsplit(".", 1)[-1] in targets for name, _ in lm.named_modules()):
        said = f"LoRA finds none of the layers {', '.join(targets)} in {type(lm).__name__}"
        raise InputError(f"{said}: leave --lora out, all weights train then")
    lora = peft.LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=targets)
    peft.inject_adapter_in_model(lora, lm)


def is_lora(layer: Any) -> bool:
    """Whether a layer wraps another one with LoRA."""
    return hasattr(layer, "get_base_layer")


@torch.no_grad()
def merged_weight(layer: Any) -> Tensor:
    """The weight of a linear layer with its LoRA, if it has any, added."""
    if not is_lora(layer):
        return layer.weight
    weight = layer.get_base_layer().weight
    if not layer.merged and not layer.disable_adapters:
        for name in layer.active_adapters:
            weight = weight + layer.get_delta_weight(name)
    return weight


def merge_lora(lm: PreTrainedModel) -> None:
    """Add LoRA to the base weights and take it out: the same outputs; all weights train."""
    for name, layer in list(lm.named_modules()):
        if is_lora(layer):
            base = layer.get_base_layer()
            base.weight.data = merged_weight(layer).data
            lm.set_submodule(name, base)
    for trace in ("peft_config", "_hf_peft_config_loaded"):
        lm.__dict__.pop(trace, None)
    lm.requires_grad_(True)
