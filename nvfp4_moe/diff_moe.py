"""The fused mixture of experts in `nvfp4-moe diff`: every backend here, judged by the contract.

An output must lie in the intervals of `reference.bounds`; where every sum is exact it must be the
reference's, to the bit. How many intervals are single values, and how near an output is to the
reference's, is said beside it.
"""

# SPDX-License-Identifier: Apache-2.0
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

import torch

from . import heat, inputs, interpreter, matrix_moe, sums, tactics
from .kernels import moe_dispatch
from .matrix_moe import EXPERTS, INTERMEDIATE, TENSOR, TOKENS, TOP_K
from .moe_case import MoECase
from .reference import moe
from .reference.activation import ActivationType, activate
from .reference.experts import Experts, prepare_experts
from .reference.interval import Interval
from .reference.moe import Activations, quantize_activations
from .reference.quantize import quantize_global_scale
from .reference.recipe import Recipe
from .report import Cell, Failure, Section, Status

INTERPRETER = interpreter.NAME
SHOWN = 3
"""Failures that a cell keeps."""
_PLACES = 10


@dataclass(frozen=True)
class Wrong:
    """A configuration of a backend whose output a case does not allow."""

    case: MoECase
    backend: str
    configuration: str
    failure: Failure


@dataclass
class Judgement:
    section: Section
    not_run: Counter = field(default_factory=Counter)
    wrong: list[Wrong] = field(default_factory=list)


@dataclass(frozen=True)
class Sweep:
    """What is run of every case beside the configuration that a call takes by itself."""

    every_configuration: bool = False
    replay: bool = False
    """In a CUDA graph, too, over poisoned memory: the same bits."""


class Allowed:
    """What an output of a case may be, and the reference's."""

    def __init__(self, case: MoECase):
        self.case = case
        self.want = case.reference()
        self.interval = None if case.exact else case.allowed()
        interval = self.interval or Interval.point(self.want)
        self.single = (interval.low == interval.high).double().mean().item()

    def wrong(self, got: torch.Tensor) -> torch.Tensor:
        """Which elements of an output [T, H] are not allowed."""
        if self.interval is None:
            return got.view(torch.int16) != self.want.view(torch.int16)
        return ~self.interval.contains(got)

    def places(self, got: torch.Tensor) -> list[int]:
        """How many elements lie in each tenth of an interval of more than one value."""
        if self.interval is None:
            return [0] * _PLACES
        low, high = self.interval.low, self.interval.high
        wide = (high > low) & low.isfinite() & high.isfinite() & ~self.wrong(got)
        place = (got.double() - low)[wide] / (high - low)[wide]
        return (place * _PLACES).long().clamp(0, _PLACES - 1).bincount(minlength=_PLACES).tolist()

    def details(self, got: torch.Tensor) -> list[str]:
        """The first element that is not allowed, with what it is the sum of."""
        t, h = self.wrong(got).nonzero()[0].tolist()
        lines = [f"first at token {t}, column {h}: {_value(got[t, h])}"]
        if self.interval is None:
            lines.append(f"every sum is exact; right is {_value(self.want[t, h])}")
        else:
            low, high = self.interval.low[t, h].item(), self.interval.high[t, h].item()
            lines.append(
                f"allowed {low:.9g} to {high:.9g}; the reference has {_value(self.want[t, h])}"
            )
        rows = self.case.rows()
        ids, weights = self.case.routed
        for k in range(ids.shape[1]):
            lines.append(
                f"slot {k}: expert {ids[t, k].item()}, weight {weights[t, k].item():.9g} times row "
                f"{_value(rows[t, k, h])}"
            )
        return lines


def known(names: str | None) -> list[str] | None:
    """The backends that were named, comma-separated; ValueError for an unknown one."""
    if names is None:
        return None
    here = {} if torch.cuda.is_available() else {"triton": INTERPRETER}
    for name in names.split(","):
        if name not in moe_dispatch.ORDER:
            allowed = ", ".join(moe_dispatch.ORDER)
            raise ValueError(f"--backends has {name!r}; it must be among {allowed}")
    return [here.get(name, name) for name in names.split(",")]


def run(
    backends: Iterable[str] | None = None, sweep: Sweep = Sweep(), *, large: bool = False
) -> Judgement:
    """Judge the backends (all that work here) on every case.

    Args:
        large: the cases that only a GPU has the time for, too.
    """
    on_gpu = torch.cuda.is_available()
    device = torch.device("cuda" if on_gpu else "cpu")
    result = Judgement(Section("fused mixture of experts"))
    every = matrix_moe.cases() + (matrix_moe.large_cases() if large else [])
    names = list(backends or _that_serve(every, device, result))
    withheld = {name: _sums(name, device) for name in names}
    interpreted = _interpret(every) if INTERPRETER in names else []
    for i, case in enumerate(every):
        case = case.to(device)
        allowed = Allowed(case)
        for name in names:
            if name == INTERPRETER:
                answer = interpreted[i]
            else:
                answer = moe_dispatch.refusal(name, case.request()) or _outputs(case, name, sweep)
            if isinstance(answer, str):
                cell = Cell("skipped", note=answer)
            else:
                outputs = answer if isinstance(answer, dict) else {tactics.DEFAULT: answer}
                cell = _judge(allowed, name, outputs, withheld[name], result.wrong)
            result.section.put(case.name, name, cell)
    result.section.notes.append(
        f"{TOKENS} tokens of {TENSOR}, {EXPERTS} experts, top {TOP_K}, I = {INTERMEDIATE}; outputs "
        "that the contract determines, and the relative error and the share of equal elements "
        "against the reference"
    )
    return result


def _that_serve(every: list[MoECase], device: torch.device, result: Judgement) -> list[str]:
    """The backends that serve any case here; why the others do not is noted."""
    found = []
    for name in moe_dispatch.ORDER:
        reasons = [moe_dispatch.refusal(name, case.to(device).request()) for case in every]
        if None in reasons:
            found.append(name)
        elif device.type == "cuda" or name != "triton":
            result.not_run[f"{name}: {Counter(reasons).most_common(1)[0][0]}"] += len(every)
    if device.type != "cuda":
        found.insert(0, INTERPRETER)
    return found


def _sums(backend: str, device: torch.device) -> str:
    """Empty where a backend adds as the intervals assume; the interpreter's fp32 does."""
    if backend in ("reference", INTERPRETER):
        return ""
    try:
        measured = sums.measure(backend, device)
    except Exception as error:  # a backend that fails here is judged on the cases
        return f"its sums could not be measured: {error}"
    return "" if measured.as_assumed else str(measured)


def _outputs(case: MoECase, backend: str, sweep: Sweep) -> dict[str, torch.Tensor | Exception]:
    """What each configuration gave, by name; the error of one that failed."""
    request = case.request()

    def call() -> torch.Tensor:
        return moe_dispatch.serve(request, backend)[0]

    configurations = [tactics.Configuration(tactics.DEFAULT)]
    found: dict[str, torch.Tensor | Exception] = {}
    if sweep.every_configuration:
        try:
            configurations = tactics.configurations(backend, request)
        except Exception as error:  # FlashInfer runs the call to be asked
            return {tactics.DEFAULT: error}
    for configuration in configurations:
        found[configuration.name] = _caught(call, configuration)
        if sweep.replay and request.capability is not None:
            found[f"{configuration.name}, replayed"] = _caught(
                lambda: _replayed(call), configuration
            )
    return found


def _caught(
    call: Callable[[], torch.Tensor], configuration: tactics.Configuration
) -> torch.Tensor | Exception:
    try:
        with configuration.forced():
            return call()
    except Exception as error:
        return error


def _replayed(call: Callable[[], torch.Tensor]) -> torch.Tensor:
    """The output of a call that was captured, its memory full of NaN before."""
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        output = call()
    output.fill_(torch.nan)
    graph.replay()
    torch.cuda.synchronize()
    return output.clone()


def _judge(
    allowed: Allowed,
    backend: str,
    outputs: dict[str, torch.Tensor | Exception],
    withheld: str,
    wrong: list[Wrong],
) -> Cell:
    """One cell of a case's configurations."""
    if withheld and not allowed.case.exact:
        return Cell("withheld", len(outputs), note=withheld)
    failures, places = [], [0] * _PLACES
    crashed, equal, error = False, 1.0, 0.0
    want = allowed.want.double()
    for name, got in outputs.items():
        title = f"{allowed.case.name}: {backend}, {name}"
        if isinstance(got, Exception):
            crashed = True
            lines = f"{type(got).__name__}: {got}".splitlines()
            failures.append((name, Failure(title, lines[0], lines[1:])))
            continue
        got = got.to(want.device)
        bad = allowed.wrong(got)
        if bad.any():
            summary = f"{int(bad.sum())} of {bad.numel()} outside"
            found = Failure(title, summary, allowed.details(got), heat.of_output(bad))
            failures.append((name, found))
        places = [a + b for a, b in zip(places, allowed.places(got), strict=True)]
        equal = min(equal, (got == want).double().mean().item())
        error = max(error, ((got - want).norm() / want.norm()).item())
    wrong += [Wrong(allowed.case, backend, name, failure) for name, failure in failures]
    status: Status = "identical" if allowed.case.exact else "inside"
    if failures:
        status = "crashed" if crashed else "different" if allowed.case.exact else "outside"
    note = f"{allowed.single:.1%} determined, error {error:.1e}, {equal:.1%} equal"
    return Cell(
        status, len(outputs), len(failures), note, [f for _, f in failures[:SHOWN]],
        places if sum(places) else None,
    )  # fmt: skip


def _value(x: torch.Tensor) -> str:
    """A bf16 number and its bits."""
    return f"{x.item():.9g} (0x{x.bfloat16().view(torch.int16).item() & 0xFFFF:04x})"


def costs() -> dict[str, float]:
    """Mean over tokens of the reference's relative error against the bf16 layer, in fp64.

    By token, since one with an outlier has most of the norm of all.
    """
    x = inputs.activations()[TENSOR].bfloat16()
    kind = ActivationType.Swiglu
    w13, w2 = matrix_moe.layer_weights(kind, x.shape[1])
    ids, weights = matrix_moe.choice(x.shape[0])
    want = torch.zeros(x.shape, dtype=torch.float64)
    largest = 0.0
    for t in range(x.shape[0]):
        for e, weight in zip(ids[t].tolist(), weights[t].tolist(), strict=True):
            y = activate((w13[e].double() @ x[t].double())[None], kind)[0]
            largest = max(largest, y.abs().max().item())
            want[t] += weight * (w2[e].double() @ y)
    experts = prepare_experts(
        w13, w2, kind, input_amax=x.abs().max().item(), intermediate_amax=largest
    )
    assert experts.input_scale is not None
    plain = prepare_experts(w13, w2, kind)
    static = quantize_global_scale(x, experts.input_scale, Recipe())
    given = {
        "bf16 (weights alone are quantized)": (Activations(x), plain),
        "per token": (quantize_activations(x, Recipe()), plain),
        "static, its scales from these very tokens": (
            Activations(static.codes, static.block_scales), experts
        ),
    }  # fmt: skip

    def error(a: Activations, e: Experts) -> float:
        difference = moe.fused_moe(a, e, ids, weights).output - want
        return (difference.norm(dim=1) / want.norm(dim=1)).mean().item()

    return {name: error(a, e) for name, (a, e) in given.items()}


def _serve_in_triton(case: MoECase) -> torch.Tensor | str:
    request = case.request()
    return moe_dispatch.refusal("triton", request) or moe_dispatch.serve(request, "triton")[0]


def _interpret(every: list[MoECase]) -> list[torch.Tensor | str]:
    """The Triton kernels' outputs from their interpreter, or why they do not serve."""
    return interpreter.call(f"diff_moe:{_serve_in_triton.__name__}", [(case,) for case in every])
