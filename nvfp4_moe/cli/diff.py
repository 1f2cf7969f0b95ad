"""`nvfp4-moe diff`: the same tensors through every backend here, compared to the bit."""

# SPDX-License-Identifier: Apache-2.0
import sys
import time
from collections import Counter
from contextlib import ExitStack
from pathlib import Path
from types import SimpleNamespace

from .. import files
from ..cases import quantize as quantize_cases
from ..differential import own_backend
from ..differential.calls import RunOptions
from ..differential.format_error import format_errors
from ..differential.quantize import InputSelection
from ..differential.results import PartResult
from ..exits import CommandError
from ..failures import write
from ..report import terminal
from ..report.data import Report
from ..report.parts import MOE, PARTS, QUANTIZERS, Part, Settings
from .output import Result


def run(options: SimpleNamespace) -> Result:
    parts = _parts(options)
    with ExitStack() as stack:
        for address in options.backend:
            stack.enter_context(own_backend.register(address, parts[0].operation))
        return _compare(options, parts, _names(options))


def _compare(options: SimpleNamespace, parts: tuple[Part, ...], names: str | None) -> Result:
    start = time.monotonic()
    sides = {part.name: part.sides(names) for part in parts}
    if options.input is not None:
        quantize_cases.check_file(options.input)
    if options.report is not None:
        files.check_folder("--report", options.report)
    if options.rows is not None and options.rows < 1:
        raise CommandError(f"--rows is {options.rows}; it must be at least 1")
    if not 0 <= options.seed < 2**63:
        raise CommandError(f"--seed is {options.seed}; it must be at least 0 and below 2^63")
    stream = sys.stdout
    settings = Settings(
        InputSelection(
            options.input,
            options.kind,
            options.recipes,
            options.seed,
            options.rows,
            options.flashinfer,
        ),
        options.layers,
        options.flashinfer,
        RunOptions(options.every_configuration, options.replay),
    )
    whole, not_run = Report.of_this_run(), Counter[str]()
    whole.flashinfer = options.flashinfer
    results: list[PartResult] = []
    for part in parts:
        result = part.run(settings, sides[part.name])
        part.print(result, sides[part.name], time.monotonic() - start, stream)
        whole.sections += [result.section] if result.section.rows or not part.optional else []
        whole.missing += result.missing
        not_run += result.not_run
        results.append(result)
    terminal.print_not_run(not_run, stream)
    if MOE in parts and not names:
        terminal.print_format_errors(format_errors(), stream)
    whole.seconds = round(time.monotonic() - start, 1)
    whole.not_run = dict(not_run)
    if names:  # which are of one part
        (named,) = sides.values()
        missing = [side for section in whole.sections for side in section.missing(named or ())]
        whole.missing += [f"backend {side}: it took part in no comparison" for side in missing]
    if options.report:
        write.write_failures(results, Path(options.report))
        write.write(whole, Path(options.report))
        print(f"the page is {Path(options.report) / write.PAGE}; open it in a browser", file=stream)
    terminal.print_end(whole, stream)
    return Result(whole.status, whole.as_dict())


def _names(options: SimpleNamespace) -> str | None:
    """The backends to compare, comma-separated; None: all. One's own are compared with the reference."""
    if not options.backend:
        return options.backends  # type: ignore[no-any-return]
    return ",".join([options.backends or "reference", *options.backend])


def _parts(options: SimpleNamespace) -> tuple[Part, ...]:
    """The parts to compare. A file or a kind of input belongs to the quantizers."""
    about_quantizers = options.input is not None or options.kind
    if options.only not in (None, QUANTIZERS.name) and about_quantizers:
        raise CommandError(f"--only is {options.only}; --input and --kind are of the quantizers")
    if options.backend and not (options.only or about_quantizers):
        names = " or ".join(part.name for part in PARTS)
        raise CommandError(f"--backend is {options.backend[0]}; --only must name its part, {names}")
    if options.only:
        return tuple(part for part in PARTS if part.name == options.only)
    return (QUANTIZERS,) if about_quantizers or options.backends else PARTS
