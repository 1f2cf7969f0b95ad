"""`nvfp4-moe diff`: the same tensors through every backend here, compared to the bit."""

# SPDX-License-Identifier: Apache-2.0
import argparse
import json
import sys
import time
from collections import Counter
from pathlib import Path

from .. import files
from ..cases import moe as matrix_moe
from ..cases import quantize as matrix
from ..differential import baselines as diff_siblings
from ..differential import moe as diff_moe
from ..differential import quantize as diff_quantizers
from ..differential.calls import Sweep
from ..differential.format_error import costs
from ..differential.moe import Judgement
from ..differential.quantize import Choice, Comparison
from ..exits import CommandError, Exit
from ..failures import write as folder
from ..report import terminal as text
from ..report.data import Report
from .options import PARTS


def run(options: argparse.Namespace) -> Exit:
    start = time.monotonic()
    parts, names = _parts(options), options.backends
    backends = diff_quantizers.available(names) if "quantizers" in parts else []
    layers = diff_moe.known(names) if "moe" in parts else None
    siblings = diff_siblings.known(names) if "siblings" in parts else None
    if options.input is not None:
        matrix.check_file(options.input)
    if options.report is not None:
        files.check_folder("--report", options.report)
    if options.json not in (None, "-"):
        files.check_file("--json", options.json)
    if options.rows is not None and options.rows < 1:
        raise CommandError(f"--rows is {options.rows}; it must be at least 1")
    if not 0 <= options.seed < 2**63:
        raise CommandError(f"--seed is {options.seed}; it must be at least 0 and below 2^63")
    stream = sys.stderr if options.json == "-" else sys.stdout
    whole, not_run = Report.of_this_run(), Counter[str]()
    compared: Comparison | None = None
    judged: Judgement | None = None
    if "quantizers" in parts:
        choice = Choice(options.input, options.kind, options.recipes, options.seed, options.rows)
        compared = diff_quantizers.run(choice, backends)
        whole.sections.append(compared.section)
        text.print_comparison(compared, backends, time.monotonic() - start, stream)
        not_run += compared.not_run
        whole.missing += compared.missing
    sweep = Sweep(options.every_configuration, options.replay)
    if "moe" in parts:
        judged = diff_moe.run(layers, sweep, matrix_moe.SETS[options.layers]())
        whole.sections.append(judged.section)
        text.print_judgement(judged.section, [found.failure for found in judged.failures], stream)
        not_run += judged.not_run
    if "siblings" in parts:
        section, idle = diff_siblings.run(siblings, sweep)
        whole.sections += [section] if section.rows else []
        failures = [failure for cell in section.cells for failure in cell.failures]
        text.print_judgement(section, failures, stream)
        not_run += idle
    text.print_not_run(not_run, stream)
    if "moe" in parts and not names:
        text.print_costs(costs(), stream)
    whole.seconds = round(time.monotonic() - start, 1)
    whole.not_run = dict(not_run)
    if names:  # of one part
        sides = backends or layers or siblings or []
        missing = [side for section in whole.sections for side in section.missing(sides)]
        whole.missing += [f"backend {side}: it took part in no comparison" for side in missing]
    if options.report:
        folder.write_failures(compared, judged, Path(options.report))
        folder.write(whole, Path(options.report))
        print(f"the report is in {options.report}", file=stream)
    if options.json:
        printed = json.dumps(whole.as_dict(), indent=1)
        print(printed) if options.json == "-" else Path(options.json).write_text(
            printed + "\n", "utf-8"
        )
    text.print_end(whole, stream)
    return whole.status


def _parts(options: argparse.Namespace) -> tuple[str, ...]:
    """What to compare: a file or a kind of input is the quantizers'."""
    about_quantizers = options.input is not None or options.kind
    if options.only not in (None, "quantizers") and about_quantizers:
        raise CommandError(f"--only is {options.only}; --input and --kind are of the quantizers")
    if options.only:
        return (options.only,)
    return ("quantizers",) if about_quantizers or options.backends else PARTS
