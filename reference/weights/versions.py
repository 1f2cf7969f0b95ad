"""Whether a layer was written since: the version counters that autograd keeps of its tensors."""

# SPDX-License-Identifier: Apache-2.0
from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from typing import Any

import torch


def tensors_of(held: Any) -> Iterator[torch.Tensor]:
    """The tensors of a dataclass, and of the dataclasses that it holds."""
    for field in fields(held):
        value = getattr(held, field.name)
        if isinstance(value, torch.Tensor):
            yield value
        elif is_dataclass(value):
            yield from tensors_of(value)


def versions(held: Any) -> list[int]:
    """A number for each tensor, which a write to it changes; 0 of those made in inference mode."""
    return [0 if t.is_inference() else t._version for t in tensors_of(held)]


def mark_written(held: Any) -> None:
    """Count a write to every tensor: torch does not see what a Triton kernel writes."""
    for t in tensors_of(held):
        torch.autograd.graph.increment_version(t)
