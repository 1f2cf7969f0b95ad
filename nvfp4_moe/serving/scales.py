"""The scalars of a serving stack's fused call, from the scales of a checkpoint.

As sglang 0.5.23 computes them for its TRT-LLM backends, operation by operation in fp32
(`modelopt_quant.py:2336-2360` and `:2756-2880`, `moe_runner/flashinfer_trtllm.py:587-611`):

    a13, a2       the largest input scale over all experts; per token: 1
    g1_alphas     a13 * weight_scale_2 of the gate projection
    g1_alphas_up  a13 * weight_scale_2 of the up projection
    g2_alphas     a2 * weight_scale_2 of the down projection
    *_quant       1 / a13, 1 / a2
    g1_scale_c    1 / a2 * g1_alphas_up; without a gate, and of SiTU, 1 / a2

The kernel clamps both halves of the first GEMM's accumulator at one limit, limit / g1_alphas. Where gate
and up differ, both are therefore moved to the larger scale, and block scales of the other half rescaled;
here SiTU's too, since the kernel multiplies both halves by one scalar, and SwigluStep's, since its limit
is 7 where none is given.
"""

# SPDX-License-Identifier: Apache-2.0
from dataclasses import dataclass

import torch

from ..reference import checks
from ..reference.activation import ActivationType, check_activation
from ..reference.weights.arguments import check_parameter
from ..reference.weights.scalars import must_share, per_expert
from .activation_policy import Activation


@dataclass(frozen=True)
class ServingScales:
    """The scalars of E local experts, by SGLang's names; input and intermediate have one scale each."""

    g1_alphas: torch.Tensor  # [E] fp32, FlashInfer's output1_scale_gate_scalar
    g1_alphas_up: torch.Tensor  # [E] fp32
    g1_scale_c: torch.Tensor  # [E] fp32, output1_scale_scalar
    g2_alphas: torch.Tensor  # [E] fp32, output2_scale_scalar
    w13_input_scale_quant: torch.Tensor  # [] fp32, encode scale of the input
    w2_input_scale_quant: torch.Tensor  # [] fp32, encode scale of the intermediate
    gemm1_clamp_limit: torch.Tensor | None = None  # [E] fp32, in the accumulator's domain
    block_scale_ratios: torch.Tensor | None = None  # [E, 2] fp32 of (up, gate); None: all 1

    def tied(self, w13_block_scales: torch.Tensor) -> torch.Tensor:
        """Return block scales [E, 2 I, H/16] e4m3, rows [up; gate], for `block_scale_ratios`."""
        if self.block_scale_ratios is None:
            return w13_block_scales
        halves = w13_block_scales.view(torch.float8_e4m3fn).unflatten(1, (2, -1)).float()
        scaled = halves * self.block_scale_ratios[:, :, None, None]
        return scaled.to(torch.float8_e4m3fn).flatten(1, 2)


@torch.no_grad()
def serving_scales(
    w13_weight_scale_2: torch.Tensor,
    w2_weight_scale_2: torch.Tensor,
    w13_input_scale: torch.Tensor,
    w2_input_scale: torch.Tensor,
    *,
    activation: Activation,
    kind: ActivationType = ActivationType.Swiglu,
    clamp_limit: float | None = None,
) -> ServingScales:
    """The scalars, of per-token activations (the checkpoint's input scales are then not used) or static.

    Args:
        w13_weight_scale_2: [E, 2] fp32 decode scales of (gate, up), or [E] or [E, 1] shared; E local.
        w2_weight_scale_2: [E] fp32.
        w13_input_scale: fp32 decode scales of all experts, local or not, of any shape.
        w2_input_scale: the same of the intermediate.
        activation: from `activation_of`: "per-token" or "static".
        clamp_limit: of a gated activation, in physical units (`swiglu_limit`); SiTU's is not read.

    Raises:
        TypeError, ValueError: an argument's type, shape or value, for which it waits for the GPU; no
            activation scales, or a static one that is not positive.
    """
    checks.one_of("activation", activation, ("per-token", "static"))
    check_activation(kind, "kind")
    _check_scales("w13_weight_scale_2", w13_weight_scale_2)
    _check_scales("w2_weight_scale_2", w2_weight_scale_2)
    gate, up = _gate_and_up(w13_weight_scale_2, kind.gated)
    if tuple(w2_weight_scale_2.shape) != tuple(gate.shape):
        raise ValueError(
            f"w2_weight_scale_2 has shape {tuple(w2_weight_scale_2.shape)}; with "
            f"w13_weight_scale_2 of {gate.shape[0]} experts it must be ({gate.shape[0]},)"
        )
    if clamp_limit is not None and kind.linear_up:
        check_parameter("clamp_limit", clamp_limit, ActivationType.Swiglu, len(gate))
    if activation == "per-token":
        a13 = a2 = torch.ones((), dtype=torch.float32, device=gate.device)
    else:
        a13 = _largest("w13_input_scale", w13_input_scale)
        a2 = _largest("w2_input_scale", w2_input_scale)
    quant13, quant2 = 1 / a13, 1 / a2
    alphas, alphas_up = a13 * gate, a13 * up
    ratios = None
    if not kind.linear_up:
        clamp_limit = None
    limit = per_expert(clamp_limit, len(gate), gate.device)
    untied = must_share(kind, alphas_up, alphas, limit)
    if untied.any():
        shared = torch.where(untied, torch.maximum(alphas, alphas_up), alphas)
        both = torch.stack([alphas_up, alphas], 1)
        ratios = torch.where(untied[:, None], both / shared[:, None], 1.0)
        alphas, alphas_up = shared, torch.where(untied, shared, alphas_up)
    if clamp_limit is not None:
        limit = clamp_limit / alphas
    scale_c = quant2 * alphas_up if kind.linear_up else quant2.expand(len(gate)).contiguous()
    return ServingScales(
        alphas, alphas_up, scale_c, a2 * w2_weight_scale_2.float(), quant13, quant2, limit, ratios
    )


def _check_scales(name: str, scales: torch.Tensor) -> None:
    checks.tensor(name, scales)
    if not scales.is_floating_point():
        checks.wrong_value(name, scales, "a tensor of floats")
    if checks.reads_values(scales, waits=True):
        checks.values(name, scales, (scales >= 0) & scales.isfinite(), "finite, 0 or above")


def _gate_and_up(scale: torch.Tensor, gated: bool) -> tuple[torch.Tensor, torch.Tensor]:
    allowed = (1, 2) if gated else (1,)
    if scale.dim() not in (1, 2) or (scale.dim() == 2 and scale.shape[1] not in allowed):
        raise ValueError(
            f"w13_weight_scale_2 has shape {tuple(scale.shape)}; it must be [E]"
            f"{', [E, 1] or [E, 2]' if gated else ' or [E, 1] without a gate'}"
        )
    scale = scale.float()
    if scale.dim() == 1:
        return scale, scale
    return scale[:, 0], scale[:, -1]


def _largest(name: str, scales: torch.Tensor) -> torch.Tensor:
    checks.tensor(name, scales)
    if not scales.numel():
        checks.wrong_value(name, scales, "a tensor of one value or more")
    largest = scales.max().float()
    if not 0 < largest < torch.inf or (1 / largest).isinf():
        raise ValueError(
            f"{name} is {largest.item()} at most; static scales must be positive, and so large that "
            "their reciprocals are fp32 numbers"
        )
    return largest
