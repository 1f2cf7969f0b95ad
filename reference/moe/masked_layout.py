"""The layer on the masked layout, in which all-to-all dispatchers hand over rows by expert.

A tensor [E, max_m, ...] holds `masked_m[e]` rows for expert e. Rows beyond them are never read: stale
rows of a replayed graph, NaN among them, must not reach a scale (flashinfer issue 3057). The output is
zero there. There is no routing and no weighting: the dispatcher combines.
"""

# SPDX-License-Identifier: Apache-2.0
import torch

from ..numerics.accumulate import Accumulate
from ..recipe import Recipe
from ..weights.experts import Experts
from .activations import Activations, quantize_activations
from .layer import fused_moe


def quantize_grouped(
    x: torch.Tensor, masked_m: torch.Tensor, recipe: Recipe | None = None
) -> Activations:
    """Quantize [E, max_m, K] per token.

    Args:
        x: bf16 or fp16, K a multiple of 16.
        masked_m: [E] int32 or int64, rows of each expert.

    Returns:
        codes [E, max_m, K/2] uint8, block scales [E, max_m, K/16] uint8, linear, and per-token scales
        [E, max_m] fp32; all zero beyond `masked_m`.

    Raises:
        ValueError: a `masked_m` of another shape or dtype, or outside 0 ... max_m.
    """
    recipe = recipe or Recipe()
    live = _live(x, masked_m)
    a = quantize_activations(x[live], recipe)
    assert a.block_scales is not None and a.per_token_scale is not None
    return Activations(
        *(_scatter(t, live) for t in (a.hidden_states, a.block_scales, a.per_token_scale))
    )


def fused_moe_grouped(
    activations: Activations,
    masked_m: torch.Tensor,
    experts: Experts,
    *,
    recipe: Recipe | None = None,
    accumulate: Accumulate = "fp64",
) -> torch.Tensor:
    """[E, max_m, hidden size] bf16: each row through its expert, zero beyond `masked_m`.

    Args:
        activations: as `fused_moe` takes them, with [E, max_m] in place of [T]; E experts are local.
        recipe, accumulate: as `fused_moe` has them.

    Raises:
        ValueError: as `quantize_grouped`, or another number of experts than `experts` hold.
    """
    live = _live(activations.hidden_states, masked_m)
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


def _live(x: torch.Tensor, masked_m: torch.Tensor) -> torch.Tensor:
    """[E, max_m] bool: the rows that are there."""
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


def _scatter(rows: torch.Tensor, live: torch.Tensor) -> torch.Tensor:
    out = rows.new_zeros((*live.shape, *rows.shape[1:]))
    out[live] = rows
    return out
