"""Text for `repr`: dtypes and shapes of tensors, never values."""

# SPDX-License-Identifier: Apache-2.0
from dataclasses import fields
from typing import Any

import torch


def dtype_and_shape(t: torch.Tensor) -> str:
    return f"{str(t.dtype).removeprefix('torch.')} {list(t.shape)}"


def one_line(owner: Any) -> str:
    """A dataclass with its tensors' dtypes and shapes, for its `__repr__`."""
    parts = []
    for f in fields(owner):
        value = getattr(owner, f.name)
        text = dtype_and_shape(value) if isinstance(value, torch.Tensor) else repr(value)
        parts.append(f"{f.name}={text}")
    return f"{type(owner).__name__}({', '.join(parts)})"
