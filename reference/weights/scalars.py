"""Scales and parameters of a layer: in which units, and in which range they are prepared.

FlashInfer's kernels add biases and SwiGLU's beta to the accumulator, and clamp it, before a scalar
multiplies it: the weights' decode scale / the encode scale of what they are multiplied with.
`docs/units.md` has the unit of every scalar and parameter, with sources. With b the largest magnitude of
what is added to an expert's accumulator,

    scalar >= max(1, b) 2^-126

holds of everything prepared here, so that no scalar is 0 or subnormal and b / scalar stays in fp32.
Weights so small that their own scale would be less get a larger one, and are rounded to its grid.
"""

# SPDX-License-Identifier: Apache-2.0
import torch

from ..activation import ActivationType
from ..recipe import Recipe

MOST_OF_WEIGHTS = 2.0**117
"""The largest encode scale of weights: over the least block scale, 2^-9, it is a normal fp32 number."""
MOST_OF_ACTIVATIONS = 2.0**100
"""The largest static encode scale: it leaves scalars of ordinary weights far from the subnormal ones."""
MOST_RAW = 2.0**126
"""The largest magnitude of 1, and of what is added to an accumulator, in the accumulator's units."""
LARGEST = torch.finfo(torch.float32).max


def per_expert(
    value: torch.Tensor | float | None, experts: int, device: torch.device
) -> torch.Tensor | None:
    """[E] fp32 of one value or one an expert; a copy, which a reload may write."""
    if value is None:
        return None
    if not isinstance(value, torch.Tensor):
        # A tensor made of the number would be a copy from the host, which no graph captures.
        return torch.full((experts,), float(value), dtype=torch.float32, device=device)
    value = value.to(device=device, dtype=torch.float32)
    return value.expand(experts).clone(memory_format=torch.contiguous_format)


def in_raw_units(value: torch.Tensor, scalar: torch.Tensor) -> torch.Tensor:
    """A physical bias, beta or limit in units of the accumulator that `scalar` will multiply.

    Finite values stay finite: what leaves fp32 becomes its largest number, which clamps nothing.
    """
    value = value.float()
    raw = value / scalar
    return torch.where(raw.isinf() & value.isfinite(), raw.clamp(-LARGEST, LARGEST), raw)


def largest_added(*added: torch.Tensor | None) -> torch.Tensor | None:
    """[E] fp32: the largest magnitude of each expert's biases and beta, at least 1; None of none.

    Args:
        added: [E, ...] each, in physical units; what is not finite counts as 1.
    """
    sizes = [t.float().abs().reshape(len(t), -1).amax(1) for t in added if t is not None]
    if not sizes:
        return None
    size = torch.stack(sizes).amax(0)
    return torch.where(size.isfinite(), size, 1.0).clamp(min=1.0)


def most_encode_scale(
    divisor: torch.Tensor | None, added: torch.Tensor | None
) -> torch.Tensor | float:
    """The largest encode scale of an expert's weights, [E] or of all, that keeps its scalar in range.

    Args:
        divisor: [1] fp32, the encode scale of what the weights are multiplied with; None: 1.
        added: [E] fp32, from `largest_added`.
    """
    like = divisor if added is None else added
    if like is None:
        return MOST_RAW
    most = torch.full_like(like, MOST_RAW)
    # In this order no quotient leaves fp32 but one that limits nothing.
    for factor in (added, divisor):
        most = most if factor is None else most / factor
    return most


def weight_encode_scale(
    amax: torch.Tensor, recipe: Recipe, most: torch.Tensor | float = MOST_RAW
) -> torch.Tensor:
    """Encode scales, fp32, of weights with the given largest magnitudes; zeros have 1.

    None is more than `most`, from `most_encode_scale`, or than `MOST_OF_WEIGHTS`.
    """
    amax = amax.float()
    # As torch divides a number by a tensor: two roundings, which every writer of weights repeats.
    encode = torch.where(amax == 0, 1.0, amax.reciprocal() * (6.0 * recipe.e4m3_max))
    encode = torch.where(encode > MOST_OF_WEIGHTS, MOST_OF_WEIGHTS, encode)
    return torch.where(encode > most, most, encode)


def static_encode_scale(amax: float) -> float:
    """Encode scale of activations whose largest magnitude is known, in fp32's range; to be rounded."""
    return min(max(2688.0 / amax, 1 / MOST_RAW), MOST_OF_ACTIVATIONS)


def quotient(decode: torch.Tensor, encode: torch.Tensor | None) -> torch.Tensor:
    """decode / encode, at most fp32's largest number."""
    return decode if encode is None else _finite(decode / encode)


def product(scalar: torch.Tensor, encode: torch.Tensor | None) -> torch.Tensor:
    """scalar * encode, at most fp32's largest number."""
    return scalar if encode is None else _finite(scalar * encode)


def _finite(x: torch.Tensor) -> torch.Tensor:
    return torch.where(x > LARGEST, LARGEST, x)


def raised(
    scales: torch.Tensor, decode: torch.Tensor, most: torch.Tensor | float
) -> tuple[torch.Tensor, torch.Tensor]:
    """(block scales, decode scales) of quantized weights, the latter at least 1 / most.

    Where a decode scale rises, block scales fall as much: the values stay what they are but for the
    rounding of the block scales. It waits for the GPU.

    Args:
        scales: [E, rows, K/16] e4m3, as float8_e4m3fn or bytes.
        decode: [E], or [E, 2] of the halves of the rows.
        most: from `most_encode_scale`.
    """
    least = torch.as_tensor(1.0 / most, dtype=torch.float32, device=decode.device)
    if decode.dim() == 2:
        least = least.reshape(-1, 1)
    low = decode < least
    if not low.any():
        return scales, decode
    ratio = torch.where(low, decode / least, 1.0).reshape(decode.shape[0], -1)
    halves = scales.view(torch.float8_e4m3fn).unflatten(1, (ratio.shape[1], -1))
    rounded = (halves.float() * ratio[:, :, None, None]).to(torch.float8_e4m3fn)
    kept = torch.where(
        low.reshape(ratio.shape)[:, :, None, None],
        rounded.view(torch.uint8),
        halves.view(torch.uint8),
    )
    return kept.flatten(1, 2).view(scales.dtype), torch.where(low, least, decode)


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
    if not kind.gated or (kind.linear_up and limit is None and not kind.limited):
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
        default = kind.parameters["clamp_limit"].default
        reason = f"{kind.name} without clamp_limit clamps both at {default:g} / the gate's scale"
    else:
        reason = "clamp_limit is one limit of the accumulator for both"
    raise ValueError(
        f"w13_decode differs between up and gate of experts {some}, and {reason}: quantize both halves "
        "with one scale, or move both to the larger one (`nvfp4_moe.serving.serving_scales` and its "
        "`tied` do)"
    )
