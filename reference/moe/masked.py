"""The layer on masked input: rows sorted by expert, as DeepEP's low-latency dispatch hands them over.

[E, max_m, ...] tensors hold `masked_m[e]` rows for expert e. The rows beyond them are never read:
stale rows of a replayed graph, NaN among them, must not reach a scale (flashinfer issue 3057). The
result is zero there. There is no routing and no weighting: the dispatcher combines.
"""

# SPDX-License-Identifier: Apache-2.0
import torch

from .. import checks
from ..numerics.accumulate import Accumulate
from ..quantize import Quantized, quantize_global_scale, quantize_per_token
from ..recipe import Recipe
from ..weights.experts import Experts
from .hidden_states import Activations
from .layer import fused_moe


def quantize_masked(
    x: torch.Tensor,
    masked_m: torch.Tensor,
    recipe: Recipe | None = None,
    *,
    global_scale: float | torch.Tensor | None = None,
) -> Activations:
    """Quantize [E, max_m, K], per token or with a global scale.

    Args:
        x: bf16 or fp16, K a multiple of 16.
        masked_m: [E] int32 or int64, rows of each expert.
        global_scale: the encode scale, 448 * 6 / amax: a number, or one fp32 element, or one of each
            expert, [E] fp32. None: per token.

    Returns:
        codes [E, max_m, K/2] uint8, block scales [E, max_m, K/16] uint8, linear, and per-token scales
        [E, max_m] fp32, None with a global scale; all zero beyond `masked_m`.

    Raises:
        ValueError: a `masked_m` of another shape or dtype, or outside 0 ... max_m; a `global_scale` of
            neither one element nor E.
    """
    recipe = recipe or Recipe()
    live = live_rows(x, masked_m)
    q: Quantized
    if global_scale is None:
        q = quantize_per_token(x[live], recipe.base_scale_inv, recipe)
    else:
        q = quantize_global_scale(x[live], _by_row(global_scale, live), recipe)
    token_scale = None if q.per_token_scale is None else _scatter(q.per_token_scale, live)
    return Activations(_scatter(q.codes, live), _scatter(q.block_scales, live), token_scale)


def fused_moe_masked(
    activations: Activations,
    masked_m: torch.Tensor,
    experts: Experts,
    *,
    recipe: Recipe | None = None,
    accumulate: Accumulate = "fp64",
) -> torch.Tensor:
    """Run each row through its expert: [E, max_m, hidden size] bf16, zero beyond `masked_m`.

    Args:
        activations: as `fused_moe` takes them, with [E, max_m] in place of [T]; E experts are local.
        recipe, accumulate: as `fused_moe` has them.

    Raises:
        ValueError: as `quantize_masked`, or another number of experts than `experts` hold.
    """
    live = live_rows(activations.hidden_states, masked_m)
    if live.shape[0] != experts.num_local:
        raise ValueError(
            f"hidden_states are of {live.shape[0]} experts; {experts.num_local} are local"
        )
    scales, per_token = activations.block_scales, activations.per_token_scale
    rows = Activations(
        activations.hidden_states[live],
        None if scales is None else scales.view(torch.uint8)[live],
        None if per_token is None else per_token[live],
    )
    ids = live.nonzero()[:, :1].int()  # one slot a row: the row's expert
    ones = torch.ones(ids.shape, dtype=torch.bfloat16, device=ids.device)
    result = fused_moe(rows, experts, ids, ones, recipe=recipe, accumulate=accumulate)
    return _scatter(result.rows[:, 0], live)


def live_rows(x: torch.Tensor, masked_m: torch.Tensor) -> torch.Tensor:
    """[E, max_m] bool: the rows of `x` that are there.

    Raises:
        ValueError: as `quantize_masked`.
    """
    if x.dim() != 3:
        raise ValueError(
            f"hidden_states have shape {tuple(x.shape)}; it must be [E, max_m, columns]"
        )
    experts, most = x.shape[:2]
    if masked_m.dtype not in (torch.int32, torch.int64) or tuple(masked_m.shape) != (experts,):
        raise ValueError(
            f"masked_m is {masked_m.dtype} of shape {tuple(masked_m.shape)}; it must be int32 or int64 "
            f"({experts},)"
        )
    if ((masked_m < 0) | (masked_m > most)).any():
        raise ValueError(f"masked_m is {masked_m.tolist()}; each must be 0 to {most}")
    return torch.arange(most, dtype=torch.int64, device=x.device) < masked_m.to(x.device)[:, None]


def _by_row(scale: float | torch.Tensor, live: torch.Tensor) -> float | torch.Tensor:
    """The global scale of each live row, or the one of all."""
    if not isinstance(scale, torch.Tensor) or scale.numel() == 1:
        return scale
    if scale.numel() != live.shape[0]:
        checks.wrong_value(
            "global_scale", scale, f"one element, or one an expert ({live.shape[0]})"
        )
    return scale.to(live.device).reshape(-1, 1).expand(live.shape)[live]


def _scatter(rows: torch.Tensor, live: torch.Tensor) -> torch.Tensor:
    out = rows.new_zeros((*live.shape, *rows.shape[1:]))
    out[live] = rows
    return out


quantize_grouped, fused_moe_grouped = quantize_masked, fused_moe_masked
"""The names of version 0.1."""
