"""The quantizers' part of `nvfp4-moe diff`: every pair of backends, compared to the bit."""

# SPDX-License-Identifier: Apache-2.0
import itertools
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace

import torch

from ..cases import inputs
from ..cases import quantize as quantize_cases
from ..cases.quantize import Case, Input
from ..console import progress
from ..exits import CommandError, Exit
from ..kernels import environment
from ..kernels.backends import UnsupportedError
from ..kernels.flashinfer import version
from ..kernels.flashinfer.quantize import BUILDS
from ..kernels.quantize.api import QUANTIZE
from ..reference.quantize import Quantized, dequantize
from ..reference.recipe import FLASHINFER, FlashInferVersion, Recipe, SfLayout
from . import difference_map, quantizers, workers
from .calls import crash
from .compare import Difference, compare, run_reference
from .explain import explain_element, first_element
from .results import PAIRED, SHOWN, Cell, FailingCase, Failure, PartResult, Section

TITLE = "quantizers"
GOLDEN = quantizers.GOLDEN
_LINEAR, _128X4 = SfLayout.layout_linear, SfLayout.layout_128x4
INTERPRETED_ROWS = 16
"""The number of rows of a tensor that the interpreter quantizes, where it does not quantize all."""
FEW = 100
"""Up to this number of cases, kernels are compiled one after the other."""
CANNOT = "which cannot run here: "
"""The text before the reason of a refusal."""


@dataclass(frozen=True)
class InputSelection:
    """The inputs and recipes to compare: options of the command."""

    file: str | None = None
    kind: str | None = None
    recipes: str = "all"
    seed: int = 0
    rows: int | None = None
    flashinfer: FlashInferVersion = FLASHINFER


@dataclass(frozen=True)
class QuantizerDifference(FailingCase):
    """A case in which two backends gave different bits."""

    item: Input
    case: Case
    pair: tuple[str, str]
    difference: Difference


def label(item: Input) -> str:
    """The name of the table row that an input belongs to."""
    if item.group == "golden":
        return "golden " + item.name.split("/")[1]
    return item.name.split()[0] if item.group == "synthetic" else item.name


def run(selection: InputSelection, backends: list[str]) -> PartResult:
    """Compare the backends, which `available` let pass, on all selected inputs."""
    result = PartResult(Section(TITLE))
    items = list(_inputs(selection, result))
    if len(backends) < 2:  # one side is no comparison
        return result
    if workers.INTERPRETER in backends:
        items = [_for_the_interpreter(item) for item in items]
        result.section.notes.append(
            f"{workers.INTERPRETER} is slow: it ran some of the cases, on the first "
            f"{INTERPRETED_ROWS} rows of each tensor that is not synthetic"
        )
    interpreted = _interpret(items) if workers.INTERPRETER in backends else {}
    jobs = [(item.x, case) for item in items for case in item.cases]
    if "triton" in backends and len(jobs) > FEW:
        quantizers.compile_ahead(jobs)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    for i, item in enumerate(progress.track(items, "quantizers")):
        x = item.x.to(device)
        for case in item.cases:
            known = {GOLDEN: item.golden, workers.INTERPRETER: interpreted.get(i, {})}
            outputs: dict[str, Quantized] = {}
            refused: dict[str, str] = {}
            for backend in backends:
                if backend in known:
                    if case in known[backend]:
                        outputs[backend] = known[backend][case]
                elif reason := quantizers.refusal(backend, x, case):
                    refused[backend] = reason
                else:
                    try:
                        outputs[backend] = quantizers.run(backend, x, case)
                    except UnsupportedError as error:
                        refused[backend] = str(error)
                    except Exception as error:
                        _add_crash(result, item, case, backend, error)
            _add(result, item, case, outputs, refused)
    return result


def available(names: str | None) -> list[str]:
    """The sides to compare, in order, each once; CommandError for one that is unknown or not here."""
    on_gpu = torch.cuda.is_available()
    usable = ["reference", *_that_serve(), GOLDEN]
    if not on_gpu and workers.interpreter_refusal() is None:
        usable.insert(1, workers.INTERPRETER)
    if names is None:
        return usable
    known = {"triton": "triton" if on_gpu else workers.INTERPRETER}
    chosen = [known.get(name, name) for name in names.split(",")]
    for name in chosen:
        if name not in (*QUANTIZE.names, GOLDEN, workers.INTERPRETER):
            allowed = ", ".join((*QUANTIZE.names, GOLDEN))
            raise CommandError(f"--backends has {name!r}; it must be among {allowed}")
        if name not in usable:
            raise CommandError(f"--backends has {name!r}, {CANNOT}{_refusal(name)}", Exit.NOT_RUN)
    return list(dict.fromkeys(chosen))


def _that_serve() -> list[str]:
    """The backends that serve a matrix here in the math that the environment asks for."""
    return [b for b in QUANTIZE.names if b != "reference" and _refusal(b) is None]


def _refusal(backend: str) -> str | None:
    """Return why a backend serves no matrix of the installed FlashInfer's bits; None if it does."""
    if backend == workers.INTERPRETER:
        return workers.interpreter_refusal()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    x = torch.empty(16, 64, dtype=torch.bfloat16, device=device)
    build = BUILDS.get(backend, "cuda")
    recipe = Recipe(environment.math(build), None, build, version.HERE.contract)
    return quantizers.refusal(backend, x, Case("per-token", recipe, _128X4))


def _add(
    result: PartResult,
    item: Input,
    case: Case,
    outputs: dict[str, Quantized],
    refused: dict[str, str],
) -> None:
    row, section = f"{label(item)}, {case.mode}", result.section
    section.rows.setdefault(row, {})
    result.elements += item.x.numel() * (len(outputs) > 1)
    for backend, reason in refused.items():
        if reason.startswith("its bits are those"):
            continue  # of another build: no part of the matrix
        result.not_run[f"{backend}: {reason}"] += 1
        column = PAIRED.join(("reference", backend))
        if column not in section.rows.get(row, {}):
            section.put(row, column, Cell("skipped", note=reason))
    for pair in itertools.combinations(outputs, 2):
        column = PAIRED.join(pair)
        cell = section.rows.get(row, {}).get(column)
        if cell is None or cell.status == "skipped":
            cell = Cell("identical")
            section.put(row, column, cell)
        cell.compared += 1
        left, right = (outputs[backend] for backend in pair)
        difference = compare(item.x, case, left, right, item.first_row)
        if difference is None:
            continue
        cell.status, cell.failed = "different", cell.failed + 1
        cell.note = cell.note or str(difference)
        failure = _failure(item, case, pair, left, right, difference)
        if len(cell.failures) < SHOWN:
            cell.failures.append(failure)
        result.failures.append(QuantizerDifference(failure, item, case, pair, difference))


def _add_crash(result: PartResult, item: Input, case: Case, backend: str, error: Exception) -> None:
    row, column = f"{label(item)}, {case.mode}", PAIRED.join(("reference", backend))
    cell = result.section.rows.get(row, {}).get(column)
    if cell is None or cell.status == "skipped":
        cell = Cell("crashed", note="no output")
        result.section.put(row, column, cell)
    cell.status, cell.compared, cell.failed = "crashed", cell.compared + 1, cell.failed + 1
    if len(cell.failures) < SHOWN:
        title = f"{item.name}, {case.mode}, {case.recipe}, {case.layout.name}: {backend}"
        cell.failures.append(crash(title, error))


def _failure(
    item: Input,
    case: Case,
    pair: tuple[str, str],
    left: Quantized,
    right: Quantized,
    difference: Difference,
) -> Failure:
    wrong = left.block_scales.cpu() != right.block_scales.cpu()
    details = difference.where().splitlines()
    row, block = difference.row - item.first_row, difference.block
    if row < item.x.shape[0]:  # not in the padding
        element = first_element(item.x, left, right, row, block)
        details += ["by the reference:", *explain_element(item.x, case, row, block, element)]
    return Failure(
        f"{item.name}, {case.mode}, {case.recipe}, {case.layout.name}: {pair[0]} and {pair[1]}",
        str(difference),
        details,
        difference_map.of_block_scales(wrong, case.layout) if wrong.any() else None,
    )


def _inputs(selection: InputSelection, result: PartResult) -> Iterator[Input]:
    """Every selected input."""
    recipes = quantize_cases.choose(selection.recipes, selection.flashinfer)
    skipped: dict[str, str] = {}
    tensors: Iterable[tuple[str, torch.Tensor, list[Input]]] = ()
    if selection.file:
        tensors = quantize_cases.from_file(selection.file, selection.rows, recipes, False, skipped)
    elif not selection.kind:
        tensors = quantize_cases.activations(selection.rows, recipes, False)
    for name, x, pieces in tensors:
        if x.dtype != torch.float32:
            result.facts.append({"tensor": name, **_what_per_token_is_for(x)})
        yield from pieces
    if not selection.file:
        kinds = [selection.kind] if selection.kind else inputs.KINDS
        yield from quantize_cases.synthetic(kinds, selection.seed, selection.rows, recipes, False)
        if selection.rows is None and not selection.kind:
            yield from quantize_cases.golden(recipes)
    result.missing = [f"tensor {name}: {reason}" for name, reason in skipped.items()]


def _what_per_token_is_for(x: torch.Tensor) -> dict:
    """Spread of the rows' maxima, and the SNR in dB with one scale a row and with one for all.

    Rows with a NaN or an infinity have neither and are left out; their number is given. Where no row
    is left that has a value but 0, spread and SNR are None.
    """
    x = x[:4096]
    finite = x.isfinite().all(1)
    facts = {
        "shape": list(x.shape),
        "rows_with_nan": int(x.isnan().any(1).sum()),
        "rows_with_infinity": int(x.isinf().any(1).sum()),
    }
    x = x[finite]
    if not x.any():
        return facts | {"spread": None, "snr_per_token": None, "snr_global": None}
    exact = x.double()
    maxima = exact.abs().amax(1)
    recipe = Recipe("exact")
    q = run_reference(x, Case("per-token", recipe, _LINEAR))
    assert q.per_token_scale is not None
    scale = quantize_cases.global_scale(x, recipe)
    g = run_reference(x, Case("global-scale", recipe, _LINEAR, scale))

    def snr(values: torch.Tensor) -> float:
        return float(10 * torch.log10(exact.square().sum() / (values - exact).square().sum()))

    return facts | {
        "spread": float(maxima.max() / maxima[maxima > 0].min()),
        "snr_per_token": snr(dequantize(q.codes, q.block_scales, q.per_token_scale).double()),
        "snr_global": snr(dequantize(g.codes, g.block_scales, 1 / scale).double()),
    }


def _for_the_interpreter(item: Input) -> Input:
    """The part of an input that the interpreter has the time for."""
    if item.group in ("golden", "synthetic"):
        return replace(item, interpreted=item.interpreted and item.x.shape[1] <= 128)
    return replace(item, x=item.x[:INTERPRETED_ROWS])


def _interpret(items: list[Input]) -> dict[int, dict[Case, Quantized]]:
    """The interpreter's outputs. Of many cases only some are run, each of them on some input."""
    jobs, places = [], []
    for i, item in enumerate(items):
        if not item.interpreted:
            continue
        every = {"golden": 1, "synthetic": 3}.get(item.group, 4)
        for j, case in enumerate(item.cases):
            if (i + j + j // every) % every == 0:
                jobs.append((item.x, case))
                places.append((i, case))
    outputs: dict[int, dict[Case, Quantized]] = {}
    for (i, case), result in zip(places, quantizers.interpret(jobs), strict=True):
        outputs.setdefault(i, {})[case] = result
    return outputs
