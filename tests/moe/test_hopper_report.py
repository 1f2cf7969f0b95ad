"""The committed outcome of Hopper's GPU tests is that of this source."""

# SPDX-License-Identifier: Apache-2.0
import json

import hopper_report


def test_a_gpu_ran_this_source():
    report = json.loads(hopper_report.REPORT.read_text(encoding="utf-8"))
    assert report["digest"] == hopper_report.digest(), (
        "the kernel's source has changed since a GPU ran its tests: run them as "
        "tests/support/hopper_report.py says"
    )
    assert report["tests"]["failed"] == 0 and report["tests"]["passed"] > 0
    assert report["device"].startswith("NVIDIA H")


def test_the_digest_covers_what_the_kernel_is_compiled_from():
    names = {path.name for path in hopper_report.modules()}
    assert names >= {"grouped_gemm.py", "fragments.py", "gluon.py", "activation.py", "pdl.py"}
