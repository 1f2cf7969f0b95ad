"""What prints in the place of a dataclass's tensors: their dtypes and shapes, and no value of theirs."""

# SPDX-License-Identifier: Apache-2.0
from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from .experts import Experts

_ALWAYS = ("gemm1_weights", "gemm1_weights_scale", "gemm2_weights", "gemm2_weights_scale")
_SCALARS = ("output1_scale_scalar", "output1_scale_gate_scalar", "output2_scale_scalar")
_STATIC = ("input_scale", "intermediate_scale")


def dtype_and_shape(t: torch.Tensor) -> str:
    return f"{str(t.dtype).removeprefix('torch.')} {list(t.shape)}"


def short(owner: Any) -> str:
    """A dataclass in a line; for its `__repr__`."""
    parts = []
    for f in fields(owner):
        value = getattr(owner, f.name)
        shown = dtype_and_shape(value) if isinstance(value, torch.Tensor) else repr(value)
        parts.append(f"{f.name}={shown}")
    return f"{type(owner).__name__}({', '.join(parts)})"


def experts(e: "Experts") -> str:
    """Two lines: what the layer is; its weights, all its bytes, and where they are."""
    static = e.input_scale is not None
    facts = [
        f"{e.num_local} experts",
        f"hidden_size {e.hidden_size}",
        f"intermediate_size {e.intermediate_size}",
        e.activation.name,
        f"NVFP4, activation scales {'static' if static else 'per token'}",
    ]
    if e.shard != (0, 1):
        facts.append(f"shard {e.shard[0]} of {e.shard[1]}")
    if e.router_weight_on_input:
        facts.append("router's weights on the input")
    named = (*_ALWAYS, *_SCALARS, *_STATIC)
    held = [f.name for f in fields(e) if f.name not in named and _holds(getattr(e, f.name))]
    facts += [f"with {', '.join(held)}"] if held else []
    weights = (f"{name} {dtype_and_shape(getattr(e, name))}" for name in (_ALWAYS[0], _ALWAYS[2]))
    size = sum(t.nbytes for t in _tensors(e))
    where = e.gemm1_weights.device
    return f"Experts({', '.join(facts)})\n  {', '.join(weights)}; {size:,} bytes on {where}"


def _holds(value: Any) -> bool:
    return next(_tensors(value), None) is not None


def _tensors(value: Any) -> Iterator[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        yield value
    elif is_dataclass(value):
        for f in fields(value):
            yield from _tensors(getattr(value, f.name))
