"""A report of a run with three injected faults: `python tests/support/faulty_report.py FOLDER`.

The Triton kernels' place is taken by the reference with a fault in its global-scale codes, one in its
128x4 layout, and one in the output of a mixture of experts.
"""

# SPDX-License-Identifier: Apache-2.0
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from unittest import mock

import torch
from paths import ROOT

from nvfp4_moe.cases import moe as moe_cases
from nvfp4_moe.cases.moe_case import MoECase
from nvfp4_moe.cases.quantize import Case
from nvfp4_moe.differential import moe as diff_moe
from nvfp4_moe.differential import quantize as diff_quantize
from nvfp4_moe.differential import quantizers, workers
from nvfp4_moe.differential.compare import run_reference
from nvfp4_moe.differential.quantize import InputSelection
from nvfp4_moe.failures import write as failures_write
from nvfp4_moe.reference.layouts import from_linear, to_linear
from nvfp4_moe.reference.numerics import e2m1
from nvfp4_moe.reference.quantize import Quantized
from nvfp4_moe.reference.recipe import SfLayout
from nvfp4_moe.report.data import Report

ROWS = ("normal, per-token", "normal, global-scale", "Swiglu, bf16")
"""The rows of the tables that are red, and no others."""
_128X4 = SfLayout.layout_128x4


def quantizer(x: torch.Tensor, case: Case) -> Quantized:
    """Per token, 128x4 scales lie as in 8x4; with a global scale the sixth code of 6 is 4."""
    q = run_reference(x, case)
    if case.mode == "per-token" and case.layout == _128X4:
        rows, columns = q.block_scales.shape
        linear = to_linear(q.block_scales, rows, columns, _128X4)
        return replace(q, block_scales=from_linear(linear, SfLayout.layout_8x4))
    if case.mode == "global-scale":
        codes = e2m1.unpack(q.codes)
        wrong = torch.where(codes[:, 5::16] == 7, 6, codes[:, 5::16])
        codes[:, 5::16] = wrong
        return replace(q, codes=e2m1.pack(codes))
    return q


def layer(case: MoECase) -> torch.Tensor:
    """W4A16 drops the second slot of tokens whose first expert is 2."""
    if not case.activations.is_bf16:
        return case.reference()
    ids, weights = case.routed
    weights = weights.clone()
    weights[ids[:, 0] == 2, 1:] = 0
    return replace(case, logits=None, ids=ids, weights=weights).reference()


@contextmanager
def faulty_backends() -> Iterator[None]:
    def interpret(jobs):
        return [quantizer(x, case) for x, case in jobs]

    def interpret_layers(every):
        return [{"default": diff_moe.Output(layer(case))} for case in every]

    with (
        mock.patch.object(quantizers, "interpret", interpret),
        mock.patch.object(diff_moe, "_interpret", interpret_layers),
        mock.patch.object(
            failures_write, "run_call", lambda backend, case, configuration: layer(case)
        ),
        mock.patch.object(torch.cuda, "is_available", lambda: False),
    ):
        yield


def write(where: Path) -> Report:
    start = time.monotonic()
    few = moe_cases.chosen_cases(("Swiglu, per token", "Swiglu, bf16"))
    with faulty_backends(), mock.patch.object(moe_cases, "cases", lambda: few):
        backends = ["reference", workers.INTERPRETER]
        compared = diff_quantize.run(InputSelection(kind="normal", recipes="plain"), backends)
        judged = diff_moe.run([workers.INTERPRETER, "reference"])
        script = [
            "env",
            "PYTHONPATH=.:tests/support",
            sys.executable,
            "tests/support/faulty_report.py",
            str(where),
        ]
        whole = Report(script, sections=[compared.section, judged.section])
        whole.folder, whole.name = str(ROOT), "make faulty-report"
        failures_write.write_failures([compared, judged], where)
        whole.seconds = round(time.monotonic() - start, 1)
        failures_write.write(whole, where)
    return whole


if __name__ == "__main__":
    found = write(Path(sys.argv[1]))
    print(f"{found.failed} comparisons failed, as they must; the report is in {sys.argv[1]}")
