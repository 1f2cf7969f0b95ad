"""Parameters of the activation and biases in the units of the accumulator that they meet.

FlashInfer's kernels add biases and SwiGLU's beta to the first GEMM's sums, and clamp the sums, before a
scalar multiplies them. `docs/units.md` has the unit of every scalar and parameter, with sources.
"""

# SPDX-License-Identifier: Apache-2.0
import torch

from .activation import ActivationType


def per_expert(
    value: torch.Tensor | float | None, experts: int, device: torch.device
) -> torch.Tensor | None:
    """[E] fp32 of one value or one an expert; a copy, which a reload may write."""
    if value is None:
        return None
    value = torch.as_tensor(value, dtype=torch.float32, device=device)
    return value.expand(experts).clone(memory_format=torch.contiguous_format)


def static_encode_scale(amax: float) -> float:
    """Encode scale of activations whose largest magnitude is known; to be rounded to fp32."""
    return 2688.0 / amax


def in_raw_units(value: torch.Tensor, scalar: torch.Tensor) -> torch.Tensor:
    """A physical bias, beta or limit in units of the accumulator that `scalar` will multiply."""
    return value.float() / scalar


def must_share(
    kind: ActivationType, up: torch.Tensor, gate: torch.Tensor, limit: torch.Tensor | None
) -> torch.Tensor:
    """[E] bool: where scales of their own for up and gate are more than the contract can express.

    It has one limit for both halves of the accumulator, so that two scales would make one physical
    limit two, unless it is 0 or infinite; and SiTU multiplies both halves by one scalar.

    Args:
        up, gate: [E] fp32 decode scales.
        limit: [E] fp32, in physical units; None: none is given.
    """
    apart = up != gate
    if not kind.gated or (kind.linear_up and kind != ActivationType.SwigluStep and limit is None):
        return torch.zeros_like(apart)
    if kind.linear_up and limit is not None:
        apart = apart & (limit != 0) & limit.isfinite()
    return apart


def check_one_scale(
    kind: ActivationType, up: torch.Tensor, gate: torch.Tensor, limit: torch.Tensor | None
) -> None:
    """Raise where `must_share` holds. It waits for the GPU."""
    apart = must_share(kind, up, gate, limit)
    if not apart.any():
        return
    some = ", ".join(str(e) for e in apart.nonzero()[:5, 0].tolist())
    if not kind.linear_up:
        reason = f"{kind.name} has one scalar for both"
    elif limit is None:
        reason = "SwigluStep without clamp_limit clamps both at 7 / the gate's scale"
    else:
        reason = "clamp_limit is one limit of the accumulator for both"
    raise ValueError(
        f"w13_decode differs between up and gate of experts {some}, and {reason}: quantize both halves "
        "with one scale, or move both to the larger one (`nvfp4_moe.serving.serving_scales` and its "
        "`tied` do)"
    )
