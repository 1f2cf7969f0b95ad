"""The fused mixture of experts in `nvfp4-moe diff`: every backend here, judged by the contract.

An output must lie in the intervals of `reference.bounds`; where every sum is exact it must be the
reference's, to the bit. How many intervals are single values, and how near an output is to the
reference's, is said beside it.
"""

# SPDX-License-Identifier: Apache-2.0
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace

import torch

from ..cases import moe as moe_cases
from ..cases.moe import EXPERTS, INTERMEDIATE, TENSOR, TOKENS, TOP_K
from ..cases.moe_case import MoECase
from ..console import progress
from ..exits import CommandError
from ..kernels.moe.backends import FUSED_MOE
from . import accumulation, difference_map, flashinfer_tactics, workers
from .calls import ONCE, Output, RunOptions, crash, outputs
from .results import SHOWN, Cell, FailingCase, Failure, PartResult, Section, Status, worst
from .verdict import PLACES, Allowed, explain_output, left_open, may_drop_nan, unequal

TITLE = "fused mixture of experts"


@dataclass(frozen=True)
class WrongOutput(FailingCase):
    """A case in which one configuration of a backend gave an output that is not allowed."""

    case: MoECase
    backend: str
    configuration: str
    output: torch.Tensor | None  # on the CPU; None: it raised


def known(names: str | None) -> list[str] | None:
    """The backends that were named, comma-separated; CommandError for an unknown one."""
    if names is None:
        return None
    on_cpu = {} if torch.cuda.is_available() else {"triton": workers.INTERPRETER}
    for name in names.split(","):
        if name not in FUSED_MOE.names:
            allowed = ", ".join(FUSED_MOE.names)
            raise CommandError(f"--backends has {name!r}; it must be among {allowed}")
    return [on_cpu.get(name, name) for name in dict.fromkeys(names.split(","))]


def run(
    backends: Iterable[str] | None = None,
    options: RunOptions = ONCE,
    every: list[MoECase] | None = None,
) -> PartResult:
    """Judge the backends (all that work here) on every case (those of `cases.moe.cases`)."""
    on_gpu = torch.cuda.is_available()
    device = torch.device("cuda" if on_gpu else "cpu")
    result = PartResult(Section(TITLE))
    every = moe_cases.cases() if every is None else every
    on_device = [case.to(device) for case in every]
    names = list(backends or _that_serve(on_device, on_gpu, result))
    withheld = {name: _sums(name, device) for name in names}
    interpreted = _interpret(every) if workers.INTERPRETER in names else []
    if options.every_configuration and "triton" in names and on_gpu:
        _compile_ahead(every, options)
    for i, case in enumerate(progress.track(on_device, TITLE)):
        allowed: dict[tuple[bool, bool], Allowed] = {}
        for name in names:
            if name == workers.INTERPRETER:
                answer = interpreted[i]
            else:
                answer = FUSED_MOE.refusal(name, case.request()) or _outputs(case, name, options)
            if isinstance(answer, str):
                result.section.put(case.name, name, Cell("skipped", note=answer))
                continue
            judged_as = may_drop_nan(name), left_open(case, name) is not None
            if judged_as not in allowed:
                allowed[judged_as] = Allowed(case, backend=name)
            cell, wrong = _judge(allowed[judged_as], name, answer, withheld[name])
            result.section.put(case.name, name, cell)
            result.failures += wrong
    result.section.notes.append(
        f"{TOKENS} tokens of {TENSOR}, {EXPERTS} experts, top {TOP_K}, I = {INTERMEDIATE}; outputs "
        "that the contract determines, and the relative error and the share of equal elements "
        "against the reference"
    )
    return result


def _that_serve(every: list[MoECase], on_gpu: bool, result: PartResult) -> list[str]:
    """The backends that serve at least one case here; the reasons of the others go to `result`."""
    serving = []
    for name in FUSED_MOE.names:
        reasons = [FUSED_MOE.refusal(name, case.request()) for case in every]
        if None in reasons:
            serving.append(name)
        elif on_gpu or name != "triton":
            result.not_run[f"{name}: {Counter(reasons).most_common(1)[0][0]}"] += len(every)
    if not on_gpu:
        serving.insert(0, workers.INTERPRETER)
    return serving


def _sums(backend: str, device: torch.device) -> str:
    """Return how a backend adds if the intervals assume otherwise, so that it is not judged; else ""."""
    if backend in ("reference", workers.INTERPRETER):
        return ""
    try:
        measured = accumulation.measure(backend, device)
    except Exception as error:  # it is judged where sums are exact alone
        return f"its sums could not be measured: {error}"
    return "" if measured.as_assumed else str(measured)


def _outputs(case: MoECase, backend: str, options: RunOptions) -> dict[str, Output]:
    """The output of each configuration, by its name."""
    request = case.request()
    if backend == "reference":  # which no graph can capture
        options = replace(options, replay=False)
    return outputs(
        lambda: FUSED_MOE.serve(request, backend)[0],
        lambda: flashinfer_tactics.configurations(backend, request),
        options,
        case.activations.hidden_states.is_cuda,
    )


def _judge(
    allowed: Allowed, backend: str, outputs_by_name: dict[str, Output], withheld: str
) -> tuple[Cell, list[WrongOutput]]:
    """The cell of a case's configurations, and the outputs that are wrong."""
    exact, expected = allowed.case.exact, allowed.expected.double()
    compared = sum(1 if output.again is None else 2 for output in outputs_by_name.values())
    if withheld and not exact:
        return Cell("withheld", compared, note=withheld), []
    wrong, places = [], [0] * PLACES
    statuses: list[Status] = ["identical" if exact else "inside"]
    equal, error = 1.0, 0.0
    for name, output in outputs_by_name.items():
        for status, failure in _failures(
            allowed, output, f"{allowed.case.name}: {backend}, {name}"
        ):
            statuses.append(status)
            got = output.got.cpu() if isinstance(output.got, torch.Tensor) else None
            wrong.append(WrongOutput(failure, allowed.case, backend, name, got))
        if isinstance(output.got, torch.Tensor):
            got = output.got.to(expected.device)
            places = [a + b for a, b in zip(places, allowed.places(got), strict=True)]
            equal = min(equal, (got == expected).double().mean().item())
            error = max(error, ((got - expected).norm() / expected.norm()).item())
    near = "all equal" if equal == 1 else f"{equal:.2%} equal, error {error:.1e}"
    cell = Cell(
        worst(statuses),
        compared,
        len(wrong),
        f"{allowed.determined:.1%} determined, {near}",
        [w.failure for w in wrong[:SHOWN]],
        places if sum(places) else None,
    )
    return cell, wrong


def _failures(allowed: Allowed, output: Output, title: str) -> Iterator[tuple[Status, Failure]]:
    """The failures of an output, and of the repeated call."""
    if isinstance(output.got, Exception):
        yield "crashed", crash(title, output.got)
    else:
        got = output.got.to(allowed.expected.device)
        first = allowed.first(got)
        if first is not None:
            details = [first.where(), *explain_output(allowed.case, first)]
            status: Status = "outside" if allowed.interval else "different"
            heat = difference_map.of_output(allowed.wrong(got))
            yield status, Failure(title, str(first), details, heat)
    if isinstance(output.again, Exception):
        yield "crashed", crash(f"{title}, again", output.again)
    elif output.again is not None and isinstance(output.got, torch.Tensor):
        other = unequal(output.got, output.again)
        if other.any():
            summary = f"{int(other.sum())} of {other.numel()} elements are other bits"
            yield (
                "different",
                Failure(f"{title}, again", summary, heat=difference_map.of_output(other)),
            )


def _compile_ahead(every: list[MoECase], options: RunOptions) -> None:
    """Compile the GEMMs of every configuration side by side, into Triton's cache."""
    with progress.bar("compiling layers", len(every)):
        workers.call(_compile, [(case, options) for case in every])


def _compile(case: MoECase, options: RunOptions) -> None:
    case = case.to("cuda")
    if FUSED_MOE.refusal("triton", case.request()) is None:
        _outputs(case, "triton", replace(options, replay=False))


def _serve_in_triton(case: MoECase) -> dict[str, Output] | str:
    request = case.request()
    reason = FUSED_MOE.refusal("triton", request)
    return reason or {flashinfer_tactics.DEFAULT: Output(FUSED_MOE.serve(request, "triton")[0])}


def _interpret(every: list[MoECase]) -> list[dict[str, Output] | str]:
    """The outputs of the Triton kernels in the interpreter, or the reason why they do not serve."""
    if reason := workers.interpreter_refusal():
        return [reason] * len(every)
    with progress.bar("layers in Triton's interpreter", len(every)):
        return workers.call_interpreted(_serve_in_triton, [(case,) for case in every])
