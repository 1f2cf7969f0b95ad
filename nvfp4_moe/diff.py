"""`nvfp4-moe diff`: the same tensors through every backend here, compared to the bit."""

# SPDX-License-Identifier: Apache-2.0
import argparse
import itertools
import json
import sys
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TextIO

import torch

from . import diff_moe, inputs, matrix, runners
from .compare import Difference, compare, run_reference
from .kernels import environment
from .kernels.dispatch import BACKENDS
from .matrix import Case, Input
from .reference.quantize import Quantized, dequantize
from .reference.recipe import Recipe, SfLayout

GOLDEN = runners.GOLDEN
_LINEAR = SfLayout.layout_linear
INTERPRETED_ROWS = 16
"""Rows of a tensor that the interpreter is given, where it is given only some."""

FEW = 100
"""Cases whose kernels are compiled as they come."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Quantize the same tensors by every backend that works here and compare codes, block scales "
        "and per-token scales to the bit, then the fused mixture of experts. Plain recipes are "
        "compared in all three scale layouts, "
        "4over6 in one each in turn. Exit status: 0 all identical, 1 a difference, 2 bad usage."
    )
    parser.add_argument(
        "--input", metavar="FILE", help="your own tensors, [M, K], from safetensors"
    )
    parser.add_argument("--backends", help="comma-separated; default: all that work here")
    parser.add_argument("--recipes", choices=matrix.RECIPES, default="all")
    parser.add_argument("--kind", choices=inputs.KINDS, help="only this kind of synthetic input")
    parser.add_argument("--seed", type=int, default=0, help="of the synthetic inputs")
    parser.add_argument("--rows", type=int, help="at most this many rows of each tensor")
    parser.add_argument("--json", metavar="FILE", help="write everything to FILE; - is stdout")


@dataclass
class Report:
    """Cases compared and differences found, by (label, mode) and pair of backends."""

    pairs: dict[tuple[str, str], dict[tuple[str, str], list]] = field(default_factory=dict)
    first: list[tuple[str, tuple[str, str], Difference]] = field(default_factory=list)
    not_run: Counter = field(default_factory=Counter)
    elements: int = 0
    different: int = 0
    notes: list[str] = field(default_factory=list)

    def add(self, item: Input, case: Case, outputs: dict[str, Quantized]) -> None:
        row = self.pairs.setdefault((label(item), case.mode), {})
        self.elements += item.x.numel() * (len(outputs) > 1)
        for pair in itertools.combinations(outputs, 2):
            cell = row.setdefault(pair, [0, 0, 0, 0, 0])
            left, right = (outputs[backend] for backend in pair)
            difference = compare(item.x, case, left, right, item.first_row)
            cell[0] += 1
            if difference is None:
                continue
            cell[1] += 1
            self.different += 1
            for i, n in enumerate((difference.codes, difference.block_scales)):
                cell[2 + i] += n
            cell[4] += difference.per_token_scales
            what = f"{item.name}, {case.mode}, {case.recipe}, {case.layout.name}"
            self.first.append((what, pair, difference))


def label(item: Input) -> str:
    """The row of the table that an input belongs to."""
    if item.group == "golden":
        return "golden " + item.name.split("/")[1]
    return item.name.split()[0] if item.group == "synthetic" else item.name


def run(options: argparse.Namespace) -> int:
    start = time.monotonic()
    try:
        backends = _backends(options.backends)
        if options.input:
            matrix.check_file(options.input)
        if options.rows is not None and options.rows < 1:
            raise ValueError(f"--rows is {options.rows}; it must be at least 1")
    except (ValueError, *matrix.FILE_ERRORS) as error:
        print(f"nvfp4-moe diff: {error}", file=sys.stderr)
        return 2
    report = Report()
    stream = sys.stderr if options.json == "-" else sys.stdout
    facts: list[dict] = []
    items = list(_inputs(options, report, facts))
    if runners.INTERPRETER in backends:
        items = [_for_the_interpreter(item) for item in items]
        report.notes.append(
            f"{runners.INTERPRETER}: of each whole tensor the first {INTERPRETED_ROWS} rows, of each "
            "synthetic and whole tensor some cases"
        )
    interpreted = _interpret(items, backends) if runners.INTERPRETER in backends else {}
    jobs = [(item.x, case) for item in items for case in item.cases]
    if "triton" in backends and len(jobs) > FEW:
        runners.compile_ahead(jobs)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    for i, item in enumerate(items):
        x = item.x.to(device)
        for case in item.cases:
            outputs = {}
            for backend in backends:
                if backend in (GOLDEN, runners.INTERPRETER):
                    known = item.golden if backend == GOLDEN else interpreted.get(i, {})
                    if case in known:
                        outputs[backend] = known[case]
                elif reason := runners.refusal(backend, x, case):
                    if not reason.startswith("its bits are those"):
                        report.not_run[f"{backend}: {reason}"] += 1
                else:
                    outputs[backend] = runners.run(backend, x, case)
            report.add(item, case, outputs)
    seconds = time.monotonic() - start
    _print(report, facts, backends, seconds, stream)
    layers = []
    if not (options.input or options.kind or options.backends):
        layers = diff_moe.run(stream)
    if options.json:
        whole = _as_json(report, facts, backends, seconds)
        whole["moe"] = [asdict(a) for a in layers]
        text = json.dumps(whole, indent=1)
        print(text) if options.json == "-" else Path(options.json).write_text(text + "\n")
    return 1 if report.different or not all(a.agrees for a in layers) else 0


def _backends(names: str | None) -> list[str]:
    """The sides to compare, in order; ValueError for an unknown one."""
    on_gpu = torch.cuda.is_available()
    here = ["reference", GOLDEN]
    if on_gpu:
        x = torch.empty(16, 64, dtype=torch.bfloat16, device="cuda")
        for build in ("cuda", "cute-dsl"):
            case = Case("per-token", Recipe(environment.math(build), build=build), _LINEAR)
            for backend in BACKENDS:
                if backend not in here and runners.refusal(backend, x, case) is None:
                    here.insert(1, backend)
    else:
        here.insert(1, runners.INTERPRETER)
    if names is None:
        return here
    known = {"triton": "triton" if on_gpu else runners.INTERPRETER}
    chosen = [known.get(name, name) for name in names.split(",")]
    for name in chosen:
        if name not in (*BACKENDS, GOLDEN, runners.INTERPRETER):
            allowed = ", ".join((*BACKENDS, GOLDEN))
            raise ValueError(f"--backends has {name!r}; it must be among {allowed}")
        if name not in here:
            raise ValueError(
                f"--backends has {name!r}, which cannot run here; see `nvfp4-moe doctor`"
            )
    return chosen


def _inputs(options: argparse.Namespace, report: Report, facts: list[dict]) -> Iterator[Input]:
    """Every Input of the matrix that the options choose."""
    recipes = matrix.choose(options.recipes)
    skipped: dict[str, str] = {}
    if options.input:
        tensors = matrix.from_file(options.input, options.rows, recipes, False, skipped)
    elif options.kind:
        yield from matrix.synthetic([options.kind], options.seed, options.rows, recipes, False)
        return
    else:
        tensors = matrix.activations(options.rows, recipes, False)
    for name, x, pieces in tensors:
        if x.dtype != torch.float32:
            facts.append({"tensor": name, **_what_per_token_is_for(x)})
        yield from pieces
    if not options.input:
        yield from matrix.synthetic(inputs.KINDS, options.seed, options.rows, recipes, False)
        if options.rows is None:
            yield from matrix.golden(recipes)
    for name, reason in skipped.items():
        report.not_run[f"tensor {name}: {reason}"] += 1


def _what_per_token_is_for(x: torch.Tensor) -> dict:
    """Spread of the rows' maxima, and the SNR in dB with one scale a row and with one for all."""
    x = x[:4096]
    exact = x.double()
    maxima = exact.abs().amax(1)
    recipe = Recipe("exact")
    q = run_reference(x, Case("per-token", recipe, _LINEAR))
    assert q.per_token_scale is not None
    scale = matrix.global_scale(x, recipe)
    g = run_reference(x, Case("global-scale", recipe, _LINEAR, scale))

    def snr(values: torch.Tensor) -> float:
        return float(10 * torch.log10(exact.square().sum() / (values - exact).square().sum()))

    return {
        "shape": list(x.shape),
        "spread": float(maxima.max() / maxima[maxima > 0].min()),
        "snr_per_token": snr(dequantize(q.codes, q.block_scales, q.per_token_scale).double()),
        "snr_global": snr(dequantize(g.codes, g.block_scales, 1 / scale).double()),
    }


def _for_the_interpreter(item: Input) -> Input:
    """The input cut down to what the interpreter has the time for."""
    if item.group in ("golden", "synthetic"):
        return replace(item, interpreted=item.interpreted and item.x.shape[1] <= 128)
    return replace(item, x=item.x[:INTERPRETED_ROWS])


def _interpret(items: list[Input], backends: list[str]) -> dict[int, dict[Case, Quantized]]:
    """The interpreter's answers: of some cases where there are many, so that each meets some input."""
    jobs, places = [], []
    for i, item in enumerate(items):
        if not item.interpreted:
            continue
        every = {"golden": 1, "synthetic": 3}.get(item.group, 4)
        for j, case in enumerate(item.cases):
            if (i + j + j // every) % every == 0:
                jobs.append((item.x, case))
                places.append((i, case))
    found: dict[int, dict[Case, Quantized]] = {}
    for (i, case), result in zip(places, runners.interpret(jobs), strict=True):
        found.setdefault(i, {})[case] = result
    return found


def _print(
    report: Report, facts: list[dict], backends: list[str], seconds: float, stream: TextIO
) -> None:
    pairs = list(dict.fromkeys(p for row in report.pairs.values() for p in row))
    headers = [f"{a} = {b}" for a, b in pairs]
    widths = [max(len(h), 14) for h in headers]
    first = max(len(name) for name, _ in report.pairs) if report.pairs else 10
    titles = [f"{h:<{w}}" for h, w in zip(headers, widths, strict=True)]
    print("  ".join([f"{'input':<{first}}", f"{'mode':<15}", *titles]).rstrip(), file=stream)
    for (name, mode), row in report.pairs.items():
        cells = [_cell(row.get(pair)) for pair in pairs]
        line = f"{name:<{first}}  {mode:<15}"
        line += "".join(f"  {c:<{w}}" for c, w in zip(cells, widths, strict=True))
        print(line.rstrip(), file=stream)
    for what, pair, difference in report.first[:10]:
        print(f"\n{what}: {pair[0]} and {pair[1]} differ: {difference}", file=stream)
        print(f"  {difference.where()}", file=stream)
    if len(report.first) > 10:
        print(f"\n... and {len(report.first) - 10} more (--json has all)", file=stream)
    if facts:
        print("\nwhat a per-token scale is for (exact math, no 4over6):", file=stream)
        width = max(len(f["tensor"]) for f in facts)
        for f in facts:
            print(
                f"  {f['tensor']:<{width}}  row maxima spread {f['spread']:5.1f} x   "
                f"SNR per token {f['snr_per_token']:5.2f} dB, one scale {f['snr_global']:5.2f} dB",
                file=stream,
            )
    compared = sum(cell[0] for row in report.pairs.values() for cell in row.values())
    verdict = f"{report.different} DIFFER" if report.different else "all identical"
    print(
        f"\n{compared} comparisons of {report.elements:,} elements by {', '.join(backends)}: "
        f"{verdict} ({seconds:.0f} s)",
        file=stream,
    )
    for note in report.notes:
        print(note, file=stream)
    for reason, count in report.not_run.items():
        print(f"not run ({count}): {reason}", file=stream)
    if not torch.cuda.is_available():
        print("not run: FlashInfer and Triton on a GPU: no CUDA device here", file=stream)


def _cell(cell: list | None) -> str:
    if cell is None:
        return "-"
    count, different, *numbers = cell
    if not different:
        return f"identical ({count})"
    return f"{different}/{count} differ: " + "+".join(str(n) for n in numbers)


def _as_json(report: Report, facts: list[dict], backends: list[str], seconds: float) -> dict:
    return {
        "identical": report.different == 0,
        "backends": backends,
        "seconds": round(seconds, 1),
        "elements": report.elements,
        "torch": torch.__version__,
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "rows": [
            {
                "input": name,
                "mode": mode,
                "pair": list(pair),
                "cases": cell[0],
                "different": cell[1],
            }
            | dict(zip(("codes", "block_scales", "per_token_scales"), cell[2:], strict=True))
            for (name, mode), row in report.pairs.items()
            for pair, cell in row.items()
        ],
        "differences": [
            {"case": what, "pair": list(pair)} | difference.as_dict()
            for what, pair, difference in report.first
        ],
        "tensors": facts,
        "not_run": dict(report.not_run),
    }
