"""One call of the layer on masked input, checked, and how it crosses `torch.library`."""

# SPDX-License-Identifier: Apache-2.0
from collections.abc import Callable
from dataclasses import dataclass, field

import torch

from ....reference.moe.hidden_states import Activations
from ....reference.moe.masked import fused_moe_masked, live_rows, quantize_masked
from ....reference.recipe import Recipe
from ....reference.weights.experts import Experts
from ... import op_schema
from ...op_schema import Flat
from ..call import LayerMode, Quantize, padded_columns
from ..ops import EXPERTS


@dataclass(frozen=True)
class MaskedKernelCall(LayerMode):
    """The part of a call that kernels read; it crosses `torch.library`."""

    activations: Activations  # E * max_m rows, in place of T
    masked_m: torch.Tensor  # [E] int32 or int64
    experts: Experts
    expected_m: int  # rows of an expert on average, by which tiles are chosen
    # Of the intermediate. Dynamo of torch 2.11 refuses a default that is an object, used or not.
    recipe: Recipe = field(default_factory=Recipe)
    batch_invariant: bool = False
    quantize: Quantize | None = None

    @property
    def max_m(self) -> int:
        return self.activations.hidden_states.shape[0] // self.experts.num_local

    @property
    def output_shape(self) -> tuple[int, int, int]:
        """[E, max_m, hidden size]"""
        return self.experts.num_local, self.max_m, self.experts.hidden_size


@dataclass(frozen=True)
class MaskedMoECall(MaskedKernelCall):
    """The checked arguments of `fused_moe_masked`."""

    capability: tuple[int, int] | None = None  # of the GPU asked about; None on the CPU


Implementation = Callable[[MaskedKernelCall], torch.Tensor]
"""[E, max_m, hidden size] bf16. With `quantize` the hidden states are bf16, and quantized per token with
`recipe` first."""

FLAT = Flat(MaskedKernelCall, EXPERTS)


def register(name: str, implementation: Implementation) -> Implementation:
    """The op `nvfp4_moe::{name}_fused_moe_masked` of an implementation, as a function."""
    return op_schema.register(f"{name}_fused_moe_masked", FLAT, implementation, _empty, "Tensor")


def _empty(call: MaskedKernelCall) -> torch.Tensor:
    like = call.activations.hidden_states
    return like.new_empty(call.output_shape, dtype=torch.bfloat16)


def reference(call: MaskedKernelCall) -> torch.Tensor:
    """The reference as an `Implementation`."""
    a, (experts, max_m, _) = call.activations, call.output_shape

    def by_expert(t: torch.Tensor | None) -> torch.Tensor | None:
        return None if t is None else t.reshape(experts, max_m, *t.shape[1:])

    states = a.hidden_states.unflatten(0, (experts, max_m))
    if a.is_bf16 and states.shape[2] != call.experts.padded_hidden_size:
        live, given = live_rows(states, call.masked_m), states
        states = states.new_zeros((experts, max_m, call.experts.padded_hidden_size))
        states[live] = padded_columns(given[live], states.shape[2])
    if call.quantize:
        masked = quantize_masked(states, call.masked_m, call.recipe)
    else:
        masked = Activations(states, by_expert(a.block_scales), by_expert(a.per_token_scale))
    return fused_moe_masked(masked, call.masked_m, call.experts, recipe=call.recipe)


REFERENCE = register("reference", reference)
