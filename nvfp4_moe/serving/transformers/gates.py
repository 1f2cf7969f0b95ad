"""The activation of an experts module of transformers, found by evaluating its own function.

A module computes `_apply_gate(gate_up)`, which a model may override with clamps and constants of its
own, or `act_fn(up)` where there is no gate. Names would not say what such a function computes. So it is
evaluated in fp32 at a grid of points, and each activation of this library is held beside it, with the
constants that the module has in its attributes. One that agrees at every point is taken; without one
the module is refused.
"""

# SPDX-License-Identifier: Apache-2.0
import itertools
import math
from collections.abc import Iterator
from typing import Any

import torch

from ...kernels.backends import UnsupportedError
from ...reference.activation import IMPLEMENTED, activate
from ..gate import Gate

ATTRIBUTES = {"alpha": ("alpha", "swiglu_alpha"), "clamp_limit": ("limit", "swiglu_limit")}
"""Attributes of modules, by the parameter that they hold (transformers 5.17 and 5.24)."""
_BETAS = (None, 1.0)  # of `up + 1`, a number in the functions themselves
_POINTS = (0.0, 0.01, 0.1, 0.5, 1.0, 1.7, 2.5, 4.0, 6.0, 8.0, 15.0, 100.0, 3e3, 1e5)


def gate_of(module: Any) -> Gate:
    """Return the activation that an experts module computes between its two products.

    Args:
        module: has `has_gate`, `is_concatenated`, and `_apply_gate` or `act_fn`.

    Raises:
        UnsupportedError: no activation of this library agrees with the module's at every point.
    """
    held = {name: _numbers(module, attributes) for name, attributes in ATTRIBUTES.items()}
    points = _points([number for numbers in held.values() for number in numbers])
    theirs = _evaluate(module, points)
    # The curve's own error, of cancellation, is multiplied by `up`.
    scale = points[0].abs().clamp(min=1)
    for gate in _candidates(module.has_gate, held):
        raw = torch.cat(points, 1) if module.has_gate else points[0]
        ours = activate(raw, gate.activation, **gate.parameters)
        if ours.shape == theirs.shape and bool(
            ((ours - theirs).abs() <= 1e-5 * theirs.abs() + 1e-6 * scale).all()
        ):
            return gate
    function = "_apply_gate" if module.has_gate else "act_fn"
    names = sorted({gate.activation.name for gate in _candidates(module.has_gate, held)})
    raise UnsupportedError(
        f"{type(module).__name__}.{function} computes none of {', '.join(names)} with the module's "
        f"{' and '.join(ATTRIBUTES)}, at {theirs.numel()} points"
    )


def _numbers(module: Any, attributes: tuple[str, ...]) -> list[float]:
    values = (getattr(module, name, None) for name in attributes)
    return sorted({float(v) for v in values if isinstance(v, int | float) and math.isfinite(v)})


def _points(limits: list[float]) -> tuple[torch.Tensor, torch.Tensor]:
    """Return (up, gate), [N, 2] fp32 each: every pair of points, also near the module's constants."""
    near = [limit * factor for limit in limits for factor in (0.5, 0.99, 1.01, 3.0)]
    positive = torch.tensor([*_POINTS, *near], dtype=torch.float32, device="cpu")
    each = torch.cat([positive, -positive])
    up, gate = torch.cartesian_prod(each, each).unbind(1)
    return up.reshape(-1, 2), gate.reshape(-1, 2)


@torch.no_grad()
def _evaluate(module: Any, points: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    """Return what the module makes of the points, in the order in which it takes gate and up."""
    up, gate = points
    try:
        if not module.has_gate:
            return module.act_fn(up)
        pair = [gate, up]
        rows = torch.cat(pair, 1) if module.is_concatenated else torch.stack(pair, 2).flatten(1)
        return module._apply_gate(rows)
    except Exception as e:  # it is the model's code, which may raise anything
        raise UnsupportedError(
            f"{type(module).__name__}'s activation cannot be evaluated in fp32 on the CPU: {e!r}"
        ) from e


def _candidates(has_gate: bool, held: dict[str, list[float]]) -> Iterator[Gate]:
    """Activations with each choice of parameters, the fewest parameters first."""
    for kind in IMPLEMENTED:
        if kind.gated != has_gate:
            continue
        choices = {
            "alpha": (None, *held["alpha"]),
            "beta": _BETAS,
            "clamp_limit": (None, *held["clamp_limit"]),
        }
        read = [name for name in choices if name in kind.parameters]
        for values in itertools.product(*(choices[name] for name in read)):
            yield Gate(kind, **dict(zip(read, values, strict=True)))
