"""The parts of a comparison: each entry of `PARTS` is a section of the report.

`diff` runs the parts. `blackwell` starts a process for each backend and environment of each part.
"""

# SPDX-License-Identifier: Apache-2.0
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TextIO

from ..cases.moe import SETS
from ..differential import baseline_moe, moe, quantize
from ..differential.calls import ONCE, RunOptions
from ..differential.quantize import InputSelection
from ..differential.results import PartResult
from ..kernels import environment
from ..kernels.baseline_moe.backends import BASELINE_MOE
from ..kernels.moe.backends import FUSED_MOE, ORDER
from ..kernels.quantize.api import BACKENDS, QUANTIZE
from . import terminal

_EXACT = environment.EXACT_VARIABLES["cute-dsl"][0]
_SWITCH, _MODE, _, _USE_256 = environment.FOUR_OVER_SIX_VARIABLES
_MATHS: dict[str, dict[str, str]] = {"fast math": {}, "exact math": {_EXACT: "1"}}
_LAYER_MATHS = _MATHS | {
    "4over6": {_SWITCH: "1"},
    "4over6 of 256 by MSE, exact math": {_SWITCH: "1", _MODE: "MSE", _USE_256: "1", _EXACT: "1"},
}
_ANY_MATH: dict[str, dict[str, str]] = {"any math": {}}
_LAYER_ARGUMENTS = ("--every-configuration", "--replay")


@dataclass(frozen=True)
class Settings:
    """The cases and the runs of a comparison."""

    inputs: InputSelection  # of the quantizers
    layers: str = "small"  # a key of `cases.moe.SETS`
    runs: RunOptions = ONCE  # of the layers


@dataclass(frozen=True)
class Part:
    """One part of a comparison, whose results are one section of the report."""

    name: str  # for `diff --only`
    title: str  # of its section
    backends: tuple[str, ...]  # all that `blackwell` runs
    maths: Mapping[str, dict[str, str]]
    """The environments in which `blackwell` runs each backend, by name: variables and values."""
    sides: Callable[[str | None], list[str] | None]
    """From the value of `--backends` to what is compared; raises CommandError."""
    run: Callable[[Settings, list[str] | None], PartResult]
    print: Callable[[PartResult, list[str] | None, float, TextIO], None]
    """Print a result on a terminal, given the sides and the seconds that it took."""
    arguments: Callable[[str, bool], list[str]]
    """The arguments of `diff` for one backend, of all its cases or of a small part of them."""
    operation: str
    """The operation that a user's backend is registered for."""
    optional: bool = False
    """The report has no section of it where it has no cells."""


QUANTIZERS = Part(
    "quantizers",
    quantize.TITLE,
    BACKENDS,
    _MATHS,
    quantize.available,
    lambda settings, sides: quantize.run(settings.inputs, sides or []),
    terminal.print_quantizers,
    lambda backend, small: [
        *("--backends", f"reference,{backend},{quantize.GOLDEN}"),
        *(("--kind", "grid") if small else ()),
    ],
    QUANTIZE.name,
)
MOE = Part(
    "moe",
    moe.TITLE,
    ORDER,
    _LAYER_MATHS,
    moe.known,
    lambda settings, sides: moe.run(sides, settings.runs, SETS[settings.layers]()),
    terminal.print_layers,
    lambda backend, small: [
        *("--backends", backend, *_LAYER_ARGUMENTS, "--layers", "few" if small else "large")
    ],
    FUSED_MOE.name,
)
BASELINES = Part(
    "baselines",
    baseline_moe.TITLE,
    BASELINE_MOE.names,
    _ANY_MATH,
    baseline_moe.known,
    lambda settings, sides: baseline_moe.run(sides, settings.runs),
    terminal.print_layers,
    lambda backend, small: ["--backends", backend, *_LAYER_ARGUMENTS],
    BASELINE_MOE.name,
    optional=True,
)
PARTS = (QUANTIZERS, MOE, BASELINES)
"""In the order of the report."""
