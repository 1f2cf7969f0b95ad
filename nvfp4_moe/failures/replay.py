"""A failing case run again: both sides of a comparison, or one backend of a fused call."""

# SPDX-License-Identifier: Apache-2.0
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch

from ..cases.moe_case import MoECase, to_device
from ..cases.quantize import Case
from ..differential import flashinfer_tactics, quantizers, workers
from ..differential.compare import compare
from ..differential.explain import explain_element, first_element
from ..differential.verdict import Allowed
from ..kernels.backends import UnsupportedError
from ..kernels.moe.backends import FUSED_MOE
from ..kernels.moe.call import MoECall
from ..kernels.quantize.api import QUANTIZE
from ..reference.quantize import Quantized
from .replay_file import Failure, MoEFailure, QuantizerFailure

Runner = Callable[[str, MoECase, str | None], torch.Tensor]
"""(backend, call, configuration or None) to the output, on the CPU."""


class CannotRunError(ValueError):
    """A side cannot run here; the message has the reason."""


class UnknownBackendError(CannotRunError):
    """There is no backend of this name."""


@dataclass(frozen=True)
class Replayed:
    """The outcome of running a failing case again."""

    differs: bool
    text: str
    facts: dict[str, Any]  # for --json


def run_call(backend: str, case: MoECase, configuration: str | None = None) -> torch.Tensor:
    """A backend's output of a fused call.

    Raises:
        CannotRunError: it cannot serve the call here, or cannot be told its configuration.
    """
    request = None
    if backend != workers.INTERPRETER:
        if backend not in FUSED_MOE.names:
            raise UnknownBackendError(f"the file's backend is {backend!r}, not one of ours")
        request = to_device(case, _device()).request()
        if reason := FUSED_MOE.refusal(backend, request):
            raise CannotRunError(f"{backend} cannot run here: {reason}")
    if request is None:
        if configuration is not None:
            raise CannotRunError(f"{backend} cannot be told to run {configuration}")
        if reason := workers.interpreter_refusal():
            raise CannotRunError(f"{backend} cannot run here: {reason}")
        return workers.call_interpreted(_serve_in_triton, [(case,)])[0]
    with _forced(backend, request, configuration):
        return FUSED_MOE.serve(request, backend)[0].cpu()


def _forced(
    backend: str, request: MoECall, configuration: str | None
) -> AbstractContextManager[None]:
    if configuration is None:
        return nullcontext()
    available = {c.name: c for c in flashinfer_tactics.configurations(backend, request)}
    if configuration not in available:
        raise CannotRunError(
            f"{backend} has no configuration {configuration!r} here; it has {', '.join(available)}"
        )
    return available[configuration].forced()


def _serve_in_triton(case: MoECase) -> torch.Tensor:
    return FUSED_MOE.serve(case.request(), "triton")[0]


def _device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def run_side(side: str, x: torch.Tensor, case: Case) -> Quantized:
    """The output of a side of a comparison, other than the golden one.

    Raises:
        CannotRunError: it cannot run here.
    """
    if side == workers.INTERPRETER:
        if reason := workers.interpreter_refusal():
            raise CannotRunError(f"{side} cannot run here: {reason}")
        return quantizers.interpret([(x, case)])[0]
    if side not in QUANTIZE.names:
        raise UnknownBackendError(f"the file's side is {side!r}, not one of ours")
    x = x.to(_device())
    if reason := quantizers.refusal(side, x, case):
        raise CannotRunError(f"{side} cannot run here: {reason}")
    try:
        return quantizers.run(side, x, case)
    except UnsupportedError as error:
        raise CannotRunError(str(error)) from error


def replay(failure: Failure, backend: str | None = None, runner: Runner = run_call) -> Replayed:
    """Run a failure again.

    Args:
        backend: in the place of the one that failed.
        runner: of fused calls.

    Raises:
        CannotRunError: no such backend, or one that cannot run here.
    """
    if backend is not None:
        backend = _backend(backend, isinstance(failure, QuantizerFailure))
    if isinstance(failure, QuantizerFailure):
        return _replay_quantizer(failure, backend)
    return _replay_moe(failure, backend, runner)


def _backend(name: str, of_quantizer: bool) -> str:
    names = {"triton": "triton" if torch.cuda.is_available() else workers.INTERPRETER}
    known = (*(QUANTIZE.names if of_quantizer else FUSED_MOE.names), workers.INTERPRETER)
    if name not in known:
        raise UnknownBackendError(f"--backend is {name!r}; it must be one of {', '.join(known)}")
    return names.get(name, name)


def _replay_quantizer(failure: QuantizerFailure, backend: str | None) -> Replayed:
    x, case = failure.x, failure.case
    sides = [backend if backend and s == failure.suspect else s for s in failure.sides]
    facts: dict[str, Any] = {"kind": "quantizer", "sides": sides}
    outputs = []
    for side in sides:
        try:
            fixed = failure.outputs[side] if side == quantizers.GOLDEN else None
            outputs.append(fixed or run_side(side, x, case))
        except RuntimeError as error:
            return _raised(side, error, facts)
    what = f"{tuple(x.shape)} {x.dtype}, {case.mode}, {case.recipe}, {case.layout.name}"
    left, right = outputs
    difference = compare(x, case, left, right)
    if difference is None:
        return Replayed(False, f"{what}: {sides[0]} and {sides[1]} are identical", facts)
    lines = [f"{what}: {sides[0]} and {sides[1]} differ: {difference}", f"  {difference.where()}"]
    if difference.row < x.shape[0]:
        row, block = difference.row, difference.block
        element = first_element(x, left, right, row, block)
        lines.append("by the reference:")
        lines += [f"    {line}" for line in explain_element(x, case, row, block, element)]
    return Replayed(True, "\n".join(lines), facts | {"difference": difference.as_dict()})


def _raised(side: str, error: RuntimeError, facts: dict[str, Any]) -> Replayed:
    return Replayed(True, f"{side} raised: {error}", facts | {"raised": str(error)})


def _replay_moe(failure: MoEFailure, backend: str | None, runner: Runner) -> Replayed:
    case, name = failure.case, backend or failure.backend
    # Another backend has other configurations.
    configuration = failure.configuration if name == failure.backend else None
    facts: dict[str, Any] = {"kind": "moe", "backend": name, "configuration": configuration}
    try:
        output = runner(name, case, configuration)
    except RuntimeError as error:
        return _raised(name, error, facts)
    what = f"{case.name}, {name}" + (f", {configuration}" if configuration else "")
    outside = Allowed(case, failure.accumulation, backend=name).first(output)
    if outside is None:
        return Replayed(False, f"{what}: {'the same bits' if case.exact else 'inside'}", facts)
    text = f"{what}: {outside}\n  {outside.where()}"
    return Replayed(True, text, facts | {"outside": outside.count, "first": outside.where()})


def quantizer_fails(case: Case, left: str, right: str) -> Callable[[torch.Tensor], bool]:
    """A predicate for `minimize_tensor`: two sides differ on a tensor; false where one cannot run."""

    def fails(x: torch.Tensor) -> bool:
        try:
            return compare(x, case, run_side(left, x, case), run_side(right, x, case)) is not None
        except CannotRunError:
            return False

    return fails


def call_fails(failure: MoEFailure, runner: Runner = run_call) -> Callable[[MoECase], bool]:
    """A predicate for `minimize_call`: the backend's output of a call is not permitted."""

    def fails(case: MoECase) -> bool:
        try:
            case.request()
            output = runner(failure.backend, case, failure.configuration)
        except ValueError:  # no call, or none that runs here
            return False
        allowed = Allowed(case, failure.accumulation, backend=failure.backend)
        return allowed.first(output) is not None

    return fails
