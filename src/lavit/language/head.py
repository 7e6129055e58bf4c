"""Cross-entropy over text and codes with one softmax (paper Eq. 6), and its gradients, in one pass.

    hidden ─┬─ text head (with or without bias) ─┐
            └─ visual rows ──────────────────────┴─ logits of a chunk ─ softmax − one-hot

The gradient of a cross-entropy is known as soon as its logits are, so each chunk's logits turn into
gradients in place and are gone before the next: nothing is computed twice and the full logits never
exist (the idea of Liger's fused linear cross-entropy, arXiv 2410.10989, written in plain
torch).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class HeadLoss(torch.autograd.Function):
    """hidden, labels, text weight and bias, visual weight, chunk, train → total, losses, correct.

    hidden [targets width]; labels [targets], joint ids; weights [rows width]; `losses` (float) and
    `correct` (bool) are per target and carry no gradient. Logits, sums and gradients of the weights
    are fp32 whatever the dtype of `hidden`.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        labels: Tensor,
        text: Tensor,
        bias: Tensor | None,
        visual: Tensor,
        chunk: int,
        train: bool,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Loss and, where gradients are wanted, gradients of all that wants one."""
        wanted = [train and needed for needed in ctx.needs_input_grad]
        d_hidden = torch.empty_like(hidden) if wanted[0] else None
        d_text, d_bias, d_visual = (
            torch.zeros_like(weight, dtype=torch.float32) if need and weight is not None else None
            for weight, need in zip((text, bias, visual), wanted[2:5], strict=True)
        )
        losses = hidden.new_empty(len(hidden), dtype=torch.float32)
        correct = torch.empty_like(losses, dtype=torch.bool)
        text_rows, visual_rows = text.to(hidden.dtype), visual.to(hidden.dtype)
        with torch.autocast(hidden.device.type, enabled=False):
            for at in range(0, len(hidden), chunk):
                part = slice(at, at + chunk)
                here, target = hidden[part], labels[part, None]
                logits = _logits(here, text_rows, bias, visual_rows)
                top, own = logits.amax(-1, keepdim=True), logits.gather(-1, target)
                total = logits.sub_(top).exp_().sum(-1, keepdim=True)
                losses[part] = (total.log() + top - own)[:, 0]
                correct[part] = (own >= top)[:, 0]
                if not any(wanted):
                    continue
                gradient = logits.div_(total)
                gradient.scatter_add_(-1, target, torch.full_like(total, -1.0))
                if d_bias is not None:
                    d_bias += gradient[:, : len(text)].sum(0)
                gradient = gradient.to(hidden.dtype)
                of_text, of_visual = gradient[:, : len(text)], gradient[:, len(text) :]
                if d_hidden is not None:
                    d_hidden[part] = torch.addmm(of_visual @ visual_rows, of_text, text_rows)
                if d_text is not None:
                    _add_product(d_text, of_text, here)
                if d_visual is not None:
                    _add_product(d_visual, of_visual, here)
        ctx.gradients = (d_hidden, d_text, d_bias, d_visual)
        ctx.dtypes = (text.dtype, None if bias is None else bias.dtype, visual.dtype)
        ctx.mark_non_differentiable(losses, correct)
        return losses.sum(), losses, correct

    @staticmethod
    def backward(ctx: Any, gradient: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
        """The gradients of `forward`, times the loss's own."""
        d_hidden, d_text, d_bias, d_visual = ctx.gradients
        ctx.gradients = None  # they change in place: a second backward would be wrong, so it fails
        text, bias, visual = (
            None if found is None else found.mul_(gradient).to(dtype)
            for found, dtype in zip((d_text, d_bias, d_visual), ctx.dtypes, strict=True)
        )
        d_hidden = None if d_hidden is None else d_hidden.mul_(gradient)
        return d_hidden, None, text, bias, visual, None, None


def _logits(hidden: Tensor, text: Tensor, bias: Tensor | None, visual: Tensor) -> Tensor:
    """Joint logits of a chunk in fp32, text and visual ids side by side in one buffer."""
    logits = hidden.new_empty(len(hidden), len(text) + len(visual))
    torch.mm(hidden, text.t(), out=logits[:, : len(text)])
    torch.mm(hidden, visual.t(), out=logits[:, len(text) :])
    logits = logits.float()
    if bias is not None:
        logits[:, : len(text)] += bias.float()
    return logits


def _add_product(total: Tensor, gradient: Tensor, hidden: Tensor) -> None:
    """total += gradientᵀ · hidden, in fp32."""
    if gradient.dtype == total.dtype:
        total.addmm_(gradient.t(), hidden)
    else:
        total += (gradient.t() @ hidden).float()
