"""Experts' weights as FlashInfer's cutlass kernels want them, out of the prepared ones.

Rows in their natural order, [up; gate], block scales in 128x4; activations have static scales, and the
layer one scalar for each GEMM of an expert. Source: flashinfer-python 0.7.2,
`fused_moe/prepare.py:1950-2045` and `flashinfer_cutlass_fused_moe_binding.cu:1456-1548`.
"""

# SPDX-License-Identifier: Apache-2.0
from dataclasses import replace

import torch

from .. import checks
from ..layouts import inverse
from .experts import CutlassWeights, Experts
from .layout import reordered, row_order
from .scalars import product


def with_cutlass(experts: Experts) -> Experts:
    """The experts, holding their weights in cutlass' layout too: as much memory again.

    `Experts.load_` keeps the copy up to date. It waits for the GPU.

    Raises:
        ValueError: the experts have no static scales, a bias or a parameter of the activation, or
            scalars of their own for up and gate.
    """
    checks.instance("experts", experts, Experts, "Experts, as prepare_experts makes them")
    encode1, encode2 = experts.input_scale, experts.intermediate_scale
    if encode1 is None or encode2 is None:
        missing = "input_amax" if encode1 is None else "intermediate_amax"
        raise ValueError(f"the experts have no {missing}; cutlass' layer has static scales alone")
    for name in ("gemm1_bias", "gemm2_bias", "gemm1_alpha", "gemm1_beta", "gemm1_clamp_limit"):
        if getattr(experts, name) is not None:
            raise ValueError(
                f"the experts have {name}, which cutlass' layer wants in physical units; we hand it none"
            )
    kind, gate = experts.activation, experts.output1_scale_gate_scalar
    shared = product(gate, encode2) if kind.linear_up else encode2.expand_as(gate)
    if not torch.equal(experts.output1_scale_scalar, shared):
        raise ValueError(
            "output1_scale_scalar is not output1_scale_gate_scalar, or 1 without a gate, times the "
            "intermediate's scale; cutlass' layer has one scalar, so up and gate share theirs"
        )
    w1, w1_scales, w2, w2_scales = _natural(experts, slice(None))
    weights = CutlassWeights(
        w1,
        w1_scales,
        encode1.reshape(()),
        gate,
        w2,
        w2_scales,
        encode2.reshape(()),
        experts.output2_scale_scalar,
    )
    return replace(experts, cutlass=weights)


def refresh_cutlass(experts: Experts, some: slice) -> None:
    """Bring the copy of some experts up to date, in place, where there is one."""
    w = experts.cutlass
    if w is None:
        return
    copies = w.fc1_expert_weights, w.fc1_weight_block, w.fc2_expert_weights, w.fc2_weight_block
    for old, new in zip(copies, _natural(experts, some), strict=True):
        old[some].copy_(new)
    for act, encode in (
        (w.fc1_act_global, experts.input_scale),
        (w.fc2_act_global, experts.intermediate_scale),
    ):
        assert encode is not None, "checked by with_cutlass"
        act.copy_(encode.reshape(()))
    w.fc1_global[some].copy_(experts.output1_scale_gate_scalar[some])
    w.fc2_global[some].copy_(experts.output2_scale_scalar[some])


def _natural(experts: Experts, some: slice) -> tuple[torch.Tensor, ...]:
    """(codes, block scales) of both GEMMs of some experts, rows in their natural order."""
    device, gated = experts.gemm1_weights.device, experts.activation.gated
    order1 = inverse(row_order(experts.gemm1_weights.shape[1], gated, device))
    order2 = inverse(row_order(experts.padded_hidden_size, False, device))
    return (
        *reordered(experts.gemm1_weights[some], experts.gemm1_weights_scale[some], order1),
        *reordered(experts.gemm2_weights[some], experts.gemm2_weights_scale[some], order2),
    )
