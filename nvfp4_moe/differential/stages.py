"""One run of the fused call, judged stage by stage, and as a black box.

A stage is judged given what the run itself handed to it, so that the first that differs is the one at
fault. Stages that the contract determines are compared bitwise, the others with `reference.bounds`.
"""

# SPDX-License-Identifier: Apache-2.0
from dataclasses import dataclass, field
from typing import Any

import torch

from ..reference.bounds.accumulation import ANY_ORDER, Accumulation
from ..reference.bounds.interval import Interval
from ..reference.bounds.moe import fused_moe_bounds
from ..reference.moe.activations import Activations, quantize_activations
from ..reference.moe.finalize import FinalizeOrder, finalize
from ..reference.moe.layer import MoEResult, requantize
from ..reference.moe.permute import local_slots
from ..reference.moe.routing import Routing, route
from ..reference.recipe import Recipe
from ..reference.weights.experts import Experts

STAGES = (
    "routing",
    "activations",
    "accumulator1",
    "intermediate",
    "requantization",
    "rows",
    "output",
)


@dataclass(frozen=True)
class Call:
    """A call to judge: a layer with router logits and bf16 hidden states."""

    logits: torch.Tensor
    routing: Routing
    routing_bias: torch.Tensor | None
    x: torch.Tensor  # [T, padded H] bf16
    experts: Experts
    recipe: Recipe = field(default_factory=Recipe)
    local_expert_offset: int = 0
    finalize_order: FinalizeOrder = "flashinfer"


@dataclass(frozen=True)
class Run:
    """The result of an implementation: ids, weights, codes, and the steps that it kept."""

    ids: torch.Tensor
    weights: torch.Tensor
    activations: Activations
    result: MoEResult


@dataclass(frozen=True)
class Verdict:
    differing: dict[str, int]  # elements of each stage that are not what they may be
    outside: int  # elements of the output outside the interval of the whole call

    @property
    def first(self) -> str | None:
        """The first stage that is wrong; None if none is."""
        return next((stage for stage in STAGES if self.differing.get(stage)), None)


def _unequal(a: torch.Tensor, b: torch.Tensor) -> int:
    """The number of elements with different bits; all NaNs count as equal."""
    if a.shape != b.shape or a.dtype != b.dtype:
        return max(a.numel(), 1)
    bits = {1: torch.uint8, 2: torch.int16, 4: torch.int32}[a.element_size()]
    other = a.contiguous().view(bits) != b.contiguous().view(bits)
    return int((other & ~(a.isnan() & b.isnan())).sum() if a.is_floating_point() else other.sum())


def judge(call: Call, run: Run, accumulation: Accumulation = ANY_ORDER) -> Verdict:
    """Compare a run that kept its steps with what the call allows."""
    e, r = call.experts, run.result
    chosen = route(call.logits, call.routing, call.routing_bias)
    right = quantize_activations(call.x, call.recipe)
    assert right.block_scales is not None and right.per_token_scale is not None
    given = run.activations
    assert given.block_scales is not None and given.per_token_scale is not None
    differing = {
        "routing": _unequal(run.ids, chosen.ids) + _unequal(run.weights, chosen.weights_bf16),
        "activations": _unequal(given.hidden_states, right.hidden_states)
        + _unequal(given.block_scales, right.block_scales)
        + _unequal(given.per_token_scale, right.per_token_scale),
    }

    def bounds(a: Activations, ids: torch.Tensor, weights: torch.Tensor, **own: Any):  # type: ignore[no-untyped-def]
        return fused_moe_bounds(
            a,
            e,
            ids,
            weights,
            recipe=call.recipe,
            finalize_order=call.finalize_order,
            local_expert_offset=call.local_expert_offset,
            accumulation=accumulation,
            output_dtype=r.output.dtype,
            **own,
        )

    def outside(interval: Interval, x: torch.Tensor) -> int:
        return int((~interval.contains(x)).sum())

    steps, ids, weights = r.steps, run.ids, run.weights
    staged = bounds(
        given,
        ids,
        weights,
        accumulator1=steps["accumulator1"],
        intermediate=steps["intermediate"].float(),
    )
    differing["accumulator1"] = outside(staged.accumulator1, steps["accumulator1"])
    differing["intermediate"] = outside(staged.intermediate, steps["intermediate"])
    again: dict[str, torch.Tensor] = {}
    requantize(steps["intermediate"].bfloat16(), None, call.recipe, again)
    is_local = local_slots(ids, e.num_local, call.local_expert_offset)
    differing["requantization"] = sum(
        _unequal(steps[name][is_local], again[name][is_local])
        for name in ("fc2_input_codes", "fc2_input_block_scales", "fc2_input_token_scales")
    )
    differing["rows"] = outside(staged.rows, r.rows)
    ordered = finalize(r.rows.float(), weights, call.finalize_order, is_local)
    differing["output"] = _unequal(r.output, ordered.to(r.output.dtype))
    whole = bounds(right, chosen.ids, chosen.weights_bf16)
    return Verdict(differing, outside(whole.output, r.output))
