"""The options of every subcommand, and its help.

Nothing here imports torch, so that `--help` and a misspelt option are answered at once. Choices that are
keys of a table elsewhere stand here, too; `tests/package/test_command_line.py` compares them with the
table.
"""

# SPDX-License-Identifier: Apache-2.0
import argparse
import math
import sys
from collections.abc import Callable
from pathlib import Path

PARTS = ("quantizers", "moe", "baselines")
"""The names in `report/parts.py`, PARTS."""
RENAMED_PARTS = {"siblings": "baselines"}
"""Names that parts had in release 0.1, and the names that they have now."""
RECIPES = ("all", "plain", "4over6", "fast", "exact")
"""The keys of `cases/quantize.py`, RECIPES."""
KINDS = ("normal", "heavy", "grid", "sparse", "bits", "edge")
"""The kinds of `cases/inputs.py`."""
LAYERS = ("few", "small", "large")
"""The keys of `cases/moe.py`, SETS."""
FLASHINFER_VERSIONS = ("0.7.2", "0.7.4")
"""Those of `reference/recipe.py`; the first is its default."""
CONVERSIONS = (
    "exact",
    *(
        f"exact-4over6-{e4m3_max}-{mode}"
        for e4m3_max in (448, 256)
        for mode in ("mae", "mae-fasterr", "mse", "mse-fasterr")
    ),
)
"""The keys of `cli/convert.py`, RECIPES."""


def _part(name: str) -> str:
    """The part of this name, or of a name that it had; the second warns."""
    if name not in RENAMED_PARTS:
        return name
    now = RENAMED_PARTS[name]
    print(f"warning: --only {name} is now --only {now}, and will be removed", file=sys.stderr)
    return now


def _diff(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Quantize the same tensors by every backend that works here and compare codes, block scales "
        "and per-token scales to the bit, then the fused mixture of experts, then FlashInfer's BF16, "
        "FP8 and MXFP8 layers where it serves them. Plain recipes are compared in all three scale "
        "layouts, 4over6 in one each in turn. A side or a tensor that was named and took part in no "
        "comparison counts as not run."
    )
    parser.add_argument(
        "--input", metavar="FILE", help="your own tensors, [M, K], from safetensors"
    )
    parser.add_argument("--backends", help="comma-separated; default: all that work here")
    parser.add_argument(
        "--backend",
        metavar="MODULE:FUNCTION",
        action="append",
        default=[],
        help="also a backend of your own, a function of one call, as `register_backend` takes it; of "
        "the part that --only names",
    )
    parser.add_argument("--recipes", choices=RECIPES, default="all")
    parser.add_argument(
        "--flashinfer", choices=FLASHINFER_VERSIONS, default=FLASHINFER_VERSIONS[0],
        help="of which version the bits are to be, whatever is installed (%(default)s)",
    )  # fmt: skip
    parser.add_argument("--kind", choices=KINDS, help="only this kind of synthetic input")
    parser.add_argument("--seed", type=int, default=0, help="of the synthetic inputs")
    parser.add_argument("--rows", type=int, help="at most this many rows of each tensor")
    parser.add_argument("--only", type=_part, choices=PARTS, help="one part")
    parser.add_argument(
        "--every-configuration",
        action="store_true",
        help="the mixture of experts in every tactic that a backend advertises",
    )
    parser.add_argument(
        "--replay", action="store_true", help="the mixture of experts in CUDA graphs, too"
    )
    parser.add_argument(
        "--layers",
        choices=LAYERS,
        default="small",
        help="of the mixture of experts: few; those that an interpreter has the time for (small); or "
        "those that only a GPU has the time for, too (large)",
    )
    parser.add_argument("--json", metavar="FILE", help="write everything to FILE; - is stdout")
    parser.add_argument(
        "--report",
        metavar="DIR",
        help="write report.html, report.json and each failing case to DIR",
    )


def _blackwell(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Run the whole matrix through every backend of this machine, FlashInfer's with every tactic "
        "that it advertises, in fast and exact math, with 4over6, and replayed in CUDA graphs; "
        "write the report; end with a table of verdicts. Named backends of which nothing was judged "
        "count as not run; where none are named, so does FlashInfer if none of its backends was."
    )
    parser.add_argument("--report", metavar="DIR", default="report", help="where to (report)")
    parser.add_argument("--backends", help="comma-separated; default: all")
    parser.add_argument("--small", action="store_true", help="a part, to see that it runs")
    parser.add_argument(
        "--timeout", type=float, default=3600, metavar="SECONDS", help="of one process (3600)"
    )


def _replay(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Run the failing case of a file again, both sides of a comparison or a fused call's backend, "
        "and print the first difference. A backend that cannot run here counts as not run."
    )
    parser.add_argument("file", metavar="FILE", help="written where a comparison failed")
    parser.add_argument(
        "--backend",
        help="run this one in the place of the one that failed; also module:function, as for diff",
    )
    parser.add_argument("--json", metavar="FILE", help="write the outcome to FILE; - is stdout")


def _doctor(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Say what is here: GPUs, versions, each backend usable or why not, the environment variables "
        "that matter, and on a GPU whether its rcp table is the known one and its sums as assumed."
    )
    parser.add_argument("--json", action="store_true")


def _fuzz_bounds(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Draw calls of the fused layer, of the layer over ranks and of the dense product over the whole "
        "range of fp32, run each in ways that keep the contract, and judge the outputs by the proved "
        "intervals. A difference is an output outside of its interval."
    )
    parser.add_argument("--seed", type=int, default=0, help="the first call's (0)")
    parser.add_argument("--runs", type=int, default=300, help="at least as many (300)")
    parser.add_argument("--seconds", type=float, default=math.inf, help="at most, each process")
    parser.add_argument("--tokens", type=int, default=4, help="rows of a call (4)")
    parser.add_argument("--ways", type=int, default=3, help="runs of a call by the reference (3)")
    parser.add_argument("--kinds", type=int, help="of calls, which kernels are compiled for (any)")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--triton", action="store_true", help="run our kernels, too")
    parser.add_argument("--processes", type=int, default=1, help="at a time (1)")


def _convert(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Write an NVFP4 checkpoint, as ModelOpt does, from a bf16, fp16, fp32 or FP8 one: "
        "the weights of its experts are quantized, all else is copied. Called again after an "
        "interruption it goes on where it stopped. Prints the error of each layer."
    )
    parser.add_argument("source", type=Path, metavar="SRC", help="the folder of a checkpoint")
    parser.add_argument("destination", type=Path, metavar="DST", help="a new folder")
    parser.add_argument(
        "--recipe", choices=CONVERSIONS, default="exact", help="default: %(default)s"
    )
    parser.add_argument(
        "--exclude",
        action="append",
        default=[],
        metavar="PATTERN",
        help="a module of experts that stays as it is, with wildcards (model.layers.61.*)",
    )
    parser.add_argument(
        "--no-input-scale",
        action="store_true",
        help="leave out the activation scales, which are written as 1.0, not calibrated",
    )
    parser.add_argument("--device", default="cpu", help="where to quantize; default: %(default)s")


def _solutions(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Write definitions and solutions of the fused layer, as flashinfer-bench has them. FlashInfer's "
        "hook (flashinfer.trace_apply) then calls ours for calls of these shapes, in any server. The "
        "installed flashinfer-python names the definitions."
    )
    parser.add_argument("folder", type=Path, metavar="DIR", help="where to")
    parser.add_argument(
        "--shape",
        action="append",
        required=True,
        metavar="H,I,E,K[,LOCAL]",
        help="of the weights, padding included: hidden and intermediate size, experts, top k, and the "
        "experts of a rank; again for another layer",
    )
    parser.add_argument("--activation", default="Swiglu", help="default: %(default)s")
    parser.add_argument("--routing", help="methods, comma-separated, or given; default: all")
    parser.add_argument("--groups", metavar="N,TOP", help="of DeepSeekV3's routing")


ADD: dict[str, Callable[[argparse.ArgumentParser], None]] = {
    "diff": _diff,
    "blackwell": _blackwell,
    "replay": _replay,
    "doctor": _doctor,
    "fuzz-bounds": _fuzz_bounds,
    "convert": _convert,
    "solutions": _solutions,
}
"""By subcommand: what gives its parser a description and options."""
