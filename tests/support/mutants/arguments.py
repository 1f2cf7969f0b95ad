"""Arguments of the fused call with a mistake each: weights, scales, scalars, activations."""

# SPDX-License-Identifier: Apache-2.0
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch

from nvfp4_moe import host
from nvfp4_moe.reference.layouts import from_linear, inverse, to_linear
from nvfp4_moe.reference.recipe import BLOCK_SIZE, SfLayout
from nvfp4_moe.reference.weights.experts import Experts
from nvfp4_moe.reference.weights.layout import reordered, row_order

Given = dict[str, Any]
Tensor = torch.Tensor
Change = Callable[[Tensor], Tensor]


def other_experts(change: Callable[[Experts], Given]) -> Callable[[Given], Given]:
    return lambda given: given | {"experts": replace(given["experts"], **change(given["experts"]))}


def other_tensor(name: str, f: Change) -> Callable[[Given], Given]:
    return other_experts(lambda e: {name: f(getattr(e, name))})


def other_activations(name: str, f: Change) -> Callable[[Given], Given]:
    return lambda given: (
        given
        | {
            "activations": replace(
                given["activations"], **{name: f(getattr(given["activations"], name))}
            )
        }
    )


def natural_rows(which: int) -> Callable[[Given], Given]:
    """The rows not shuffled, the scales following them."""

    def change(e: Experts) -> Given:
        codes, scales = f"gemm{which}_weights", f"gemm{which}_weights_scale"
        w, s = getattr(e, codes), getattr(e, scales)
        order = inverse(row_order(w.shape[1], which == 1 and e.activation.gated))
        return dict(zip((codes, scales), reordered(w, s, order), strict=True))

    return other_experts(change)


def laid_out(which: int, layout: SfLayout) -> Callable[[Given], Given]:
    """The scales in another layout, read as 128x4."""

    def change(e: Experts) -> Given:
        s = getattr(e, f"gemm{which}_weights_scale")
        linear = to_linear(s.view(torch.uint8), s.shape[1], s.shape[2], SfLayout.layout_128x4)
        other = torch.stack([from_linear(expert, layout) for expert in linear])
        return {f"gemm{which}_weights_scale": other.reshape(s.shape).view(s.dtype)}

    return other_experts(change)


def gate_and_up_exchanged(e: Experts) -> Given:
    order = row_order(e.gemm1_weights.shape[1], gated=True)
    half = order.numel() // 2
    swapped = inverse(order)[(order + half) % order.numel()]
    w, s = reordered(e.gemm1_weights, e.gemm1_weights_scale, swapped)
    return {"gemm1_weights": w, "gemm1_weights_scale": s}


def padding_filled(e: Experts) -> Given:
    """The padded columns of the second GEMM not zero, nor the rows of the first that feed them."""

    def filled(t: Tensor, order: Tensor, valid: Tensor) -> Tensor:
        t = t.clone()
        empty = ~valid[order]
        t[:, empty] = t[:, (~empty).nonzero()[0]]
        return t

    rows, size, half = e.gemm1_weights.shape[1], e.padded_intermediate_size, e.intermediate_size
    order = row_order(rows, e.activation.gated)
    valid = host.arange(rows) % size < half
    s = e.gemm1_weights_scale
    linear = to_linear(s.view(torch.uint8), rows, s.shape[2], SfLayout.layout_128x4)
    w2, s2 = e.gemm2_weights.clone(), e.gemm2_weights_scale
    w2[..., half // 2 :] = w2[..., : w2.shape[2] - half // 2]
    linear2 = to_linear(s2.view(torch.uint8), s2.shape[1], s2.shape[2], SfLayout.layout_128x4)
    linear2 = linear2.clone()
    linear2[..., half // BLOCK_SIZE :] = linear2[..., : linear2.shape[2] - half // BLOCK_SIZE]
    back = from_linear(filled(linear, order, valid), SfLayout.layout_128x4)
    return {
        "gemm1_weights": filled(e.gemm1_weights, order, valid),
        "gemm1_weights_scale": back.view(s.dtype),
        "gemm2_weights": w2,
        "gemm2_weights_scale": from_linear(linear2, SfLayout.layout_128x4).view(s2.dtype),
    }
