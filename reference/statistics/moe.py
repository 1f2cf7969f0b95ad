"""Statistics of the two quantizations of a fused mixture of experts, and their collection by layer."""

# SPDX-License-Identifier: Apache-2.0
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch

from .counts import QuantizationStatistics, statistics_table

INVALID = ("ids out of range", "NaN weights")
"""Invalid slots of the ids and weights of a call; on the CPU such a call raises."""


@dataclass(frozen=True)
class MoEStatistics:
    """Statistics of one call or of several, by global expert; experts of other ranks have no rows.

    A row is a token in a slot: a token counts once for each of its local experts. Ranks that hold
    different experts, or have different tokens, add up alike.
    """

    hidden_states: QuantizationStatistics
    intermediate: QuantizationStatistics
    invalid: torch.Tensor  # [2] int64, columns `INVALID`; every rank counts what it was given

    @classmethod
    def empty(cls, num_experts: int, device: torch.device | str | None = None) -> "MoEStatistics":
        """Return the statistics of no tokens."""
        empty = QuantizationStatistics.empty
        invalid = torch.zeros(len(INVALID), dtype=torch.int64, device=device)
        return cls(empty(num_experts, device), empty(num_experts, device), invalid)

    def __add__(self, other: "MoEStatistics") -> "MoEStatistics":
        """Return the statistics of the tokens of both; ValueError if their numbers of experts differ."""
        return self.clone().add_(other)

    def add_(self, other: "MoEStatistics") -> "MoEStatistics":
        """Add into these tensors in place."""
        if not isinstance(other, MoEStatistics):
            raise TypeError(f"other is {type(other).__name__}; it must be MoEStatistics")
        self.hidden_states.add_(other.hidden_states)
        self.intermediate.add_(other.intermediate)
        self.invalid.add_(other.invalid)
        return self

    def clone(self) -> "MoEStatistics":
        return MoEStatistics(
            self.hidden_states.clone(), self.intermediate.clone(), self.invalid.clone()
        )

    def parts(self) -> dict[str, QuantizationStatistics]:
        """Return both by name."""
        return {"hidden states": self.hidden_states, "intermediate": self.intermediate}

    def __str__(self) -> str:
        """Write a table by expert, and the invalid slots. It waits for the device."""
        lines = statistics_table(
            {
                f"{what}, {name}": statistics
                for what, part in self.parts().items()
                for name, statistics in part.by_expert().items()
            }
        )
        return "\n".join([lines, *_invalid_slots("", self)])


class LayerStatistics(Mapping[str, MoEStatistics]):
    """Statistics by layer, added up over calls.

    seen = LayerStatistics()
    y = seen.record("layers.3", fused_moe(x, experts, routing, stats=True))
    print(seen)

    A layer's first call makes its tensors, later ones add to them in place and wait for nothing: in a
    CUDA graph captured after that first call, every replay adds.
    """

    def __init__(self) -> None:
        self._layers: dict[str, MoEStatistics] = {}

    def record(self, layer: str, result: tuple[torch.Tensor, MoEStatistics]) -> torch.Tensor:
        """Add the statistics that `fused_moe(..., stats=True)` returned, and return its output."""
        output, statistics = result
        if layer in self._layers:
            self._layers[layer].add_(statistics)
        else:
            self._layers[layer] = statistics.clone()
        return output

    def __getitem__(self, layer: str) -> MoEStatistics:
        return self._layers[layer]

    def __iter__(self) -> Iterator[str]:
        return iter(self._layers)

    def __len__(self) -> int:
        return len(self._layers)

    def __str__(self) -> str:
        """Write a table by layer, over all experts. It waits for the device."""
        lines = [
            statistics_table(
                {
                    f"{layer}, {what}": part
                    for layer, statistics in self.items()
                    for what, part in statistics.parts().items()
                }
            )
        ]
        for layer, statistics in self.items():
            lines += _invalid_slots(f"{layer}: ", statistics)
        return "\n".join(lines)


def _invalid_slots(prefix: str, statistics: MoEStatistics) -> list[str]:
    """Write a line for each count of `INVALID` that is not 0."""
    counts = zip(INVALID, statistics.invalid.tolist(), strict=True)
    return [f"{prefix}{count} slots with {what}" for what, count in counts if count]
