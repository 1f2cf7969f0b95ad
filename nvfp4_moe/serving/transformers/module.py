"""An experts module of transformers, read: what it computes, and its weights in this library's order.

The decorator `use_experts_implementation` sets flags on a module: `has_gate`, `has_bias`,
`is_transposed` ([E, K, N] in place of [E, N, K]), `is_concatenated` (rows [gate; up]; else they take
turns). Ours are [E, N, K] with rows [up; gate]. Written against transformers 5.17 and 5.24,
`integrations/moe.py`.
"""

# SPDX-License-Identifier: Apache-2.0
from typing import Any, NamedTuple

import torch

from ...kernels.backends import UnsupportedError
from ...reference.recipe import BLOCK_SIZE
from ..gate import Gate, up_then_gate
from .gates import gate_of

FLAGS = ("has_gate", "has_bias", "is_transposed", "is_concatenated")


class Projections(NamedTuple):
    """The weights and biases of a module, as `prepare_experts` takes them."""

    w13: torch.Tensor  # [E, 2 I, H], rows [up; gate], or [E, I, H]
    w2: torch.Tensor  # [E, H, I]
    w13_bias: torch.Tensor | None  # [E, 2 I] or [E, I]
    w2_bias: torch.Tensor | None  # [E, H]


def read_gate(module: Any) -> Gate:
    """Return the activation of a module that is served.

    Raises:
        UnsupportedError: a flag or an activation that is not modelled here.
    """
    name = type(module).__name__
    for flag in FLAGS:
        if not isinstance(getattr(module, flag, None), bool):
            raise UnsupportedError(
                f"{name} has no flag {flag}; `use_experts_implementation` of transformers sets it"
            )
    for flag, value in vars(module).items():
        if flag.startswith(("has_", "is_")) and flag not in FLAGS and value is True:
            raise UnsupportedError(f"{name} has {flag}, which is not modelled here")
    return gate_of(module)


def check_weights(module: Any) -> None:
    """Raise UnsupportedError unless the module's weights can be quantized."""
    name = type(module).__name__
    if any(hasattr(w, "to_local") for w in sources(module)):
        raise UnsupportedError(f"{name} has sharded parameters (DTensor) outside its forward")
    w13, w2 = weights(module)
    for size, number in (("H", w13.shape[2]), ("I", w2.shape[2])):
        if number % BLOCK_SIZE:
            raise UnsupportedError(
                f"{name} has {size} = {number}; it must be a multiple of {BLOCK_SIZE}"
            )


def sources(module: Any) -> list[torch.Tensor]:
    """The module's own tensors, of which its experts are quantized."""
    names = ["gate_up_proj" if module.has_gate else "up_proj", "down_proj"]
    names += [f"{name}_bias" for name in names] if module.has_bias else []
    return [getattr(module, name) for name in names]


def weights(module: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """The weights [E, N, K], without a copy; their rows are in the module's order."""
    first, second = sources(module)[:2]
    return (first.mT, second.mT) if module.is_transposed else (first, second)


def projections(module: Any) -> Projections:
    """The weights and biases in this library's order; gradients reach the module's own."""
    first, second = weights(module)
    bias, second_bias = sources(module)[2:] if module.has_bias else (None, None)
    return Projections(
        _ordered(module, first),
        second,
        None if bias is None else _ordered(module, bias),
        second_bias,
    )


def _ordered(module: Any, t: torch.Tensor) -> torch.Tensor:
    """Rows, dimension 1, as [up; gate]."""
    if not module.has_gate:
        return t
    return up_then_gate(t, interleaved=not module.is_concatenated)
