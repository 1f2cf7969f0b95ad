"""The baselines in `nvfp4-moe diff`: FlashInfer's BF16, FP8 and MXFP8 layers, where it serves them.

Where nothing rounds, an output must be the reference's, to the bit. With real hidden states the contract
leaves sums, last bits and scales inside cubins open (`reference.moe.baseline_moe`): the report says how
near an output is to the reference's, and does not judge it.
"""

# SPDX-License-Identifier: Apache-2.0
from collections.abc import Iterator

import torch

from ..cases import baseline_moe as matrix
from ..cases import inputs
from ..cases.baseline_moe import BaselineCase
from ..console import progress
from ..exits import CommandError
from ..kernels.baseline_moe.backends import BASELINE_MOE
from ..kernels.baseline_moe.call import BaselineCall
from ..kernels.flashinfer import baseline_moe as adapter
from ..kernels.flashinfer import version
from ..kernels.flashinfer.baseline_moe import NAMES
from ..reference.moe.baseline_moe import FORMATS, BaselineExperts, Format, quantize_for
from . import difference_map, flashinfer_tactics
from .calls import ONCE, Output, RunOptions, crash, outputs
from .results import SHOWN, Cell, FailingCase, Failure, PartResult, Section, Status, worst

TITLE = "BF16, FP8 and MXFP8 layers"
_FORMAT_OF: dict[str, Format] = {name: format for format, name in NAMES.items()}
"""The format of each of FlashInfer's backends; the other backends serve all."""


def known(names: str | None) -> list[str] | None:
    """The backends that were named, comma-separated; CommandError for an unknown one."""
    if names is None:
        return None
    for name in names.split(","):
        if name not in BASELINE_MOE.names:
            allowed = ", ".join(BASELINE_MOE.names)
            raise CommandError(f"--backends has {name!r}; it must be among {allowed}")
    return list(dict.fromkeys(names.split(",")))


def run(names: list[str] | None = None, options: RunOptions = ONCE) -> PartResult:
    """Compare the backends that were named, or all of FlashInfer's that serve here.

    A backend that was named has its cells even if it is not run.
    """
    result = PartResult(Section(TITLE))
    section = result.section
    device = "cuda" if torch.cuda.is_available() else "cpu"
    idle: dict[str, list[str]] = {}
    count = 0
    for format in FORMATS:
        chosen = [n for n in names or NAMES.values() if _FORMAT_OF.get(n, format) == format]
        every = [case.to(device) for case in matrix.cases(format)] if chosen else []
        count = max(count, len(every))
        for name in chosen:
            reason = BASELINE_MOE.refusal(name, every[0].call())
            if reason is not None and names is None:
                idle.setdefault(reason, []).append(name)
                continue
            for case in progress.track(every, f"{TITLE}: {name}"):
                section.put(case.name, name, _skipped(reason) or _judged(case, name, options))
            if name == NAMES["mxfp8"]:  # the one with a kernel for it, whose bits are determined
                cell = _skipped(reason) or _of_quantizer(every[0].experts)
                section.put(f"{format}, its quantizer", name, cell)
    for reason, layers in idle.items():
        result.not_run[f"{', '.join(layers)}: {reason}"] = count * len(layers)
    section.notes.append("the reference's bits where sums are exact, elsewhere how near they are")
    result.failures = [FailingCase(f) for cell in section.cells for f in cell.failures]
    return result


def _skipped(reason: str | None) -> Cell | None:
    return None if reason is None else Cell("skipped", note=reason)


def _judged(case: BaselineCase, name: str, options: RunOptions) -> Cell:
    call, expected = case.call(), case.reference()
    outputs_by_name = outputs(
        lambda: BASELINE_MOE.run(name, call),
        lambda: _configurations(name, call),
        options,
        expected.is_cuda,
    )
    wrong = [
        failure
        for configuration, output in outputs_by_name.items()
        for failure in _failures(case, expected, output, f"{case.name}: {name}, {configuration}")
    ]
    compared = sum(1 if output.again is None else 2 for output in outputs_by_name.values())
    statuses: list[Status] = ["identical" if case.exact else "withheld"]
    statuses += [status for status, _ in wrong]
    got = [
        output.got for output in outputs_by_name.values() if isinstance(output.got, torch.Tensor)
    ]
    note = _nearness(got, expected) if got else "no output"
    return Cell(worst(statuses), compared, len(wrong), note, [f for _, f in wrong[:SHOWN]])


def _of_quantizer(experts: BaselineExperts) -> Cell:
    """Compare FlashInfer's MXFP8 quantizer with the reference of its version on synthetic inputs."""
    here = version.HERE.contract
    every = [inputs.synthetic(kind, 64, 256).bfloat16() for kind in inputs.KINDS]
    x = torch.cat(every).to(experts.w13.device)
    title = f"mxfp8, its quantizer: {NAMES['mxfp8']}"
    try:
        got, expected = adapter.quantize(x, experts), quantize_for(x, experts, here)
    except Exception as error:
        return Cell("crashed", 1, 1, "no output", [crash(title, error)])
    assert got.scale is not None and expected.scale is not None
    codes = got.hidden_states.view(torch.uint8) != expected.hidden_states.view(torch.uint8)
    scales = got.scale != expected.scale
    if not codes.any() and not scales.any():
        return Cell("identical", 1, note=f"all equal, of {here}")
    summary = f"{int(codes.sum())} codes and {int(scales.sum())} scales are other bits"
    failure = Failure(title, summary, heat=difference_map.of_output(codes))
    return Cell("different", 1, 1, f"{(~codes).double().mean():.2%} equal", [failure])


def _configurations(name: str, call: BaselineCall) -> list[flashinfer_tactics.Configuration]:
    if name not in _FORMAT_OF:
        return [flashinfer_tactics.Configuration(flashinfer_tactics.DEFAULT)]
    return flashinfer_tactics.every_tactic(lambda: BASELINE_MOE.run(name, call))


def _nearness(every: list[torch.Tensor], expected: torch.Tensor) -> str:
    """The distance of the output that is farthest from the reference's, in words."""
    equal = min((got == expected).double().mean().item() for got in every)
    if equal == 1:
        return "all equal"
    norm = expected.double().norm()
    error = max(((got.double() - expected.double()).norm() / norm).item() for got in every)
    return f"{equal:.2%} equal, error {error:.1e}"


def _failures(
    case: BaselineCase, expected: torch.Tensor, output: Output, title: str
) -> Iterator[tuple[Status, Failure]]:
    """The failures of an output, and of the repeated call."""
    if isinstance(output.got, Exception):
        yield "crashed", crash(title, output.got)
    elif case.exact:
        yield from _difference(output.got, expected, title)
    if isinstance(output.again, Exception):
        yield "crashed", crash(f"{title}, again", output.again)
    elif output.again is not None and isinstance(output.got, torch.Tensor):
        yield from _difference(output.again, output.got, f"{title}, again")


def _difference(
    got: torch.Tensor, expected: torch.Tensor, title: str
) -> Iterator[tuple[Status, Failure]]:
    wrong = got.view(torch.int16) != expected.view(torch.int16)
    if not wrong.any():
        return
    t, h = (int(i) for i in wrong.nonzero()[0])
    summary = f"{int(wrong.sum())} of {wrong.numel()} elements are other bits"
    first = f"token {t}, column {h}: {got[t, h].item()!r} instead of {expected[t, h].item()!r}"
    yield "different", Failure(title, summary, [first], difference_map.of_output(wrong))
