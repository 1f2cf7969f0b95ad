"""The tensors of a layer, and the counters by which autograd sees that one was written."""

# SPDX-License-Identifier: Apache-2.0
from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from typing import Any

import torch


def tensors_of(value: Any) -> Iterator[torch.Tensor]:
    """Yield a tensor itself, or the tensors of a dataclass and of the dataclasses in it."""
    if isinstance(value, torch.Tensor):
        yield value
    elif is_dataclass(value):
        for field in fields(value):
            yield from tensors_of(getattr(value, field.name))


def versions(layer: Any) -> list[int]:
    """The version of each tensor, which a write changes; 0 for tensors made in inference mode."""
    return [0 if t.is_inference() else t._version for t in tensors_of(layer)]


def mark_written(layer: Any) -> None:
    """Count a write to every tensor: torch does not see what a Triton kernel writes."""
    for t in tensors_of(layer):
        torch.autograd.graph.increment_version(t)
