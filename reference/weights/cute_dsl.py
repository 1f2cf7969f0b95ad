"""Experts' weights as FlashInfer's CuTe-DSL kernels want them, out of the prepared ones.

Rows of the first GEMM in their natural order, of gated activations 64 of up, then 64 of gate, and so on;
block scales in 128x4, seen as [32, 4, M/128, 4, K/64, E]; one scalar for each GEMM of an expert. Source:
flashinfer-python 0.7.2, `fused_moe/prepare.py:2495-2640` and `cute_dsl/utils.py:367`.
"""

# SPDX-License-Identifier: Apache-2.0
from dataclasses import replace

import torch

from .. import checks
from ..layouts import inverse
from ..recipe import BLOCK_SIZE
from .experts import CuteDslWeights, Experts
from .layout import reordered, row_order

_GROUP = 64  # rows of up, and of gate, at a time


def with_cute_dsl(experts: Experts) -> Experts:
    """Return the experts with their weights in CuTe-DSL's layout, too: as much memory again.

    `Experts.load_` keeps the copy up to date. It waits for the GPU.

    Raises:
        ValueError: the experts have static scales, biases, or scalars of their own for up and gate.
    """
    checks.instance("experts", experts, Experts, "Experts, as prepare_experts makes them")
    gated = experts.activation.gated
    gate, up = experts.output1_scale_gate_scalar, experts.output1_scale_scalar
    if not torch.equal(up, gate if gated else torch.ones_like(up)):
        raise ValueError(
            "output1_scale_scalar is not output1_scale_gate_scalar, or 1 without a gate; CuTe-DSL's "
            "kernels have one scalar, so up and gate share theirs, and there are no static scales"
        )
    if experts.gemm1_bias is not None or experts.gemm2_bias is not None:
        raise ValueError("the experts have biases; CuTe-DSL's kernels have none")
    w1, w1_sf = _rows(experts.gemm1_weights, experts.gemm1_weights_scale, gated)
    w2, w2_sf = _rows(experts.gemm2_weights, experts.gemm2_weights_scale, False)
    weights = CuteDslWeights(w1, w1_sf, gate, w2, w2_sf, experts.output2_scale_scalar)
    return replace(experts, cute_dsl=weights)


def refresh_cute_dsl(experts: Experts, some: slice) -> None:
    """Bring the copy of some experts up to date, in place, where there is one."""
    w = experts.cute_dsl
    if w is None:
        return
    gated = experts.activation.gated
    w1, w1_sf = _rows(experts.gemm1_weights[some], experts.gemm1_weights_scale[some], gated)
    w2, w2_sf = _rows(experts.gemm2_weights[some], experts.gemm2_weights_scale[some], False)
    w.w1_weight[some].copy_(w1)
    w.w1_weight_sf[..., some].copy_(w1_sf)
    w.w2_weight[some].copy_(w2)
    w.w2_weight_sf[..., some].copy_(w2_sf)
    w.w1_alpha[some].copy_(experts.output1_scale_gate_scalar[some])
    w.w2_alpha[some].copy_(experts.output2_scale_scalar[some])


def _rows(
    codes: torch.Tensor, scales: torch.Tensor, gated: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    experts, rows, half = codes.shape
    order = inverse(row_order(rows, gated, codes.device))
    if gated:
        order = order.reshape(2, -1, _GROUP).transpose(0, 1).reshape(-1)
    codes, swizzled = reordered(codes, scales, order)
    tiles = swizzled.reshape(experts, rows // 128, half // (2 * BLOCK_SIZE), 32, 4, 4)
    return codes, tiles.permute(3, 4, 1, 5, 2, 0)
