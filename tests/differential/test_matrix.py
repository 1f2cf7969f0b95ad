"""The matrix of `nvfp4-moe blackwell` on the GPU at hand: a test for each part, backend and math.

`pytest -m blackwell` runs it. What a backend or a machine lacks is the reason of a skip.
"""

# SPDX-License-Identifier: Apache-2.0
import os
from argparse import Namespace

import pytest

from nvfp4_moe.cli import blackwell
from nvfp4_moe.differential.results import FAILED

pytestmark = pytest.mark.blackwell
OPTIONS = Namespace(small=True, timeout=600.0)


@pytest.mark.parametrize("job", blackwell.jobs(None), ids=lambda job: job.folder)
def test_a_backend_keeps_the_contract(job, tmp_path):
    result = blackwell.run_job(job, None, os.cpu_count() or 1, OPTIONS, tmp_path)
    cell = blackwell.verdict(result)
    if cell.status == "skipped":
        pytest.skip(f"{job.backend}: {cell.note}")
    assert cell.status not in FAILED, f"{cell.failed} of {cell.compared}: {cell.note}"
    assert cell.compared > 0
