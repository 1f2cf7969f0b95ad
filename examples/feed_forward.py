"""Feed-forward layers apart from their model: their inputs, row maxima and errors."""

# SPDX-License-Identifier: Apache-2.0
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch

Layer = Callable[[torch.Tensor], torch.Tensor]
"""[T, H] bf16 to the same."""
FeedForward = Callable[[int, torch.Tensor], torch.Tensor]
"""(layer, [T, H]) to [T, H], the residual not added."""


class Dense(Protocol):
    """A feed-forward layer, [T, H] to [T, H]."""

    def intermediate(self, x: torch.Tensor) -> torch.Tensor:
        """Compute the input of the second product, [T, I]."""

    def __call__(self, x: torch.Tensor) -> torch.Tensor: ...


@dataclass
class Ranges:
    """The row maxima of the feed-forward's input and of its intermediate, for each layer, in bf16."""

    inputs: list[torch.Tensor] = field(default_factory=list)
    row_maxima: list[tuple[torch.Tensor, torch.Tensor]] = field(default_factory=list)

    @classmethod
    def of(cls, dense: Callable[[int], Dense], run: Callable[[FeedForward], Any]) -> "Ranges":
        """Run a model whose feed-forward layers are `dense`; `run` takes their place in it."""
        found = cls()

        def feed_forward(layer: int, x: torch.Tensor) -> torch.Tensor:
            intermediate = dense(layer).intermediate(x)
            found.inputs.append(x)
            found.row_maxima.append((x.abs().amax(1).float(), intermediate.abs().amax(1).float()))
            return dense(layer)(x)

        run(feed_forward)
        return found

    def amax(self, layer: int) -> dict[str, float]:
        """Return the maxima that `prepare_experts` takes."""
        names = ("input_amax", "intermediate_amax")
        maxima = self.row_maxima[layer]
        return {name: m.max().item() for name, m in zip(names, maxima, strict=True)}

    def spread(self, layer: int) -> tuple[float, float]:
        """Return the largest row maximum over the smallest, of the input and of the intermediate."""
        first, second = ((m.max() / m.min()).item() for m in self.row_maxima[layer])
        return first, second


def unquantized_layer(experts: Sequence[Dense]) -> Layer:
    """Make the layer of these experts in bf16, which rounds each one's result and their sum."""
    return lambda x: torch.stack([expert(x).float() for expert in experts]).sum(0).to(x.dtype)


def errors_by_layer(
    layers: Sequence[Layer], dense: Callable[[int], Dense], inputs: Sequence[torch.Tensor]
) -> list[float]:
    """Compute each layer's relative error against `dense`, given its inputs, on every eighth token."""
    some = [x[::8].contiguous() for x in inputs]
    return [relative_error(layers[i](x), dense(i)(x)) for i, x in enumerate(some)]


def relative_error(given: torch.Tensor, wanted: torch.Tensor) -> float:
    """Divide the norm of the difference by the norm of what is wanted."""
    return ((given.double() - wanted).norm() / wanted.double().norm()).item()
