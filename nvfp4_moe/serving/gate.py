"""The function between a layer's two products, as a model's own configuration gives it, and its rows."""

# SPDX-License-Identifier: Apache-2.0
from dataclasses import dataclass
from typing import Any

import torch

from ..reference.activation import ActivationType


@dataclass(frozen=True)
class Gate:
    """An activation and its parameters, in physical units, by their names in `prepare_experts`."""

    activation: ActivationType
    alpha: float | None = None
    beta: float | None = None
    clamp_limit: float | None = None

    @property
    def parameters(self) -> dict[str, Any]:
        return {"alpha": self.alpha, "beta": self.beta, "clamp_limit": self.clamp_limit}

    def __str__(self) -> str:
        given = (
            f"{name} {value:g}" for name, value in self.parameters.items() if value is not None
        )
        return " ".join([self.activation.name, *given])


def up_then_gate(rows: torch.Tensor, *, interleaved: bool) -> torch.Tensor:
    """Reorder rows, dimension 1, to this library's [up; gate].

    Args:
        rows: [E, 2 I, ...] of any dtype, as [gate; up]; `interleaved`, they take turns, gate first.

    Returns:
        A new tensor of the same shape and dtype.
    """
    gate, up = (rows[:, ::2], rows[:, 1::2]) if interleaved else rows.chunk(2, 1)
    return torch.cat([up, gate], 1)
