"""The error of quantized weights, by layer."""

# SPDX-License-Identifier: Apache-2.0
import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, TextIO

_SIDES = {"w13": ("gate", "up"), "w2": ("down",)}


@dataclass
class LayerError:
    """Sums of squares over the experts of a layer, by projection: (of the error, of the weights)."""

    module: str
    sums: dict[str, tuple[float, float]] = field(default_factory=dict)

    def add(self, projection: str, error: float, signal: float) -> None:
        before = self.sums.get(projection, (0.0, 0.0))
        self.sums[projection] = (before[0] + error, before[1] + signal)

    def relative(self, *projections: str) -> float:
        """Return the error's Frobenius norm over that of the weights, by default of all projections."""
        chosen = [self.sums[p] for p in projections or self.sums if p in self.sums]
        error, signal = (sum(part) for part in zip(*chosen, strict=True))
        return math.sqrt(error / signal) if signal else 0.0

    def snr(self, *projections: str) -> float:
        """Return the signal-to-noise ratio in dB; infinite without an error."""
        relative = self.relative(*projections)
        return -20.0 * math.log10(relative) if relative else math.inf

    def as_dict(self) -> dict[str, Any]:
        """Return the module, and each GEMM's relative error and SNR in dB, None without an error."""
        gemms = {}
        for name, side in _SIDES.items():
            snr = self.snr(*side)
            gemms[name] = {
                "error": self.relative(*side),
                "snr_db": snr if math.isfinite(snr) else None,
            }
        return {"module": self.module, **gemms}


def merge(facts: Iterable[dict[str, Any]]) -> dict[str, LayerError]:
    """Add the sums that shards recorded, by module."""
    layers: dict[str, LayerError] = {}
    for shard in facts:
        for module, sums in shard.items():
            layer = layers.setdefault(module, LayerError(module))
            for projection, (error, signal) in sums.items():
                layer.add(projection, error, signal)
    return layers


def print_errors(errors: list[LayerError], stream: TextIO) -> None:
    """Write a line for each layer: relative Frobenius error and SNR of each GEMM's weights."""
    first = max([len("layer"), *(len(e.module) for e in errors)])
    head = "".join(f"  {f'{side}: error':>10}  {'SNR':>8}" for side in _SIDES)
    print(f"{'layer':<{first}}{head}", file=stream)
    for layer in errors:
        cells = "".join(
            f"  {layer.relative(*side):10.5f}  {layer.snr(*side):5.2f} dB"
            for side in _SIDES.values()
        )
        print(f"{layer.module:<{first}}{cells}", file=stream)
