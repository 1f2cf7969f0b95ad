"""The committed outcome of Hopper's GPU tests is that of this source."""

# SPDX-License-Identifier: Apache-2.0
import ast
import json

import hopper_report


def test_a_gpu_ran_this_source():
    report = json.loads(hopper_report.REPORT.read_text(encoding="utf-8"))
    assert report["digest"] == hopper_report.digest(), (
        "a kernel's source has changed since a GPU ran its tests: run them as "
        "tests/support/hopper_report.py says"
    )
    assert report["tests"]["failed"] == 0 and report["tests"]["passed"] > 0
    assert report["device"].startswith("NVIDIA H")


def test_every_kernel_in_gluon_is_covered():
    launched = {
        node.name
        for path in (hopper_report.ROOT / "kernels").rglob("*.py")
        for node in ast.parse(path.read_text(encoding="utf-8")).body
        if isinstance(node, ast.FunctionDef) and node.name.endswith("_kernel")
        if any(ast.unparse(d).startswith("gluon.jit") for d in node.decorator_list)
    }
    assert launched == set(hopper_report.KERNELS)


def test_the_digest_covers_what_the_kernel_is_compiled_from():
    names = {name.split("/")[-1] for name in hopper_report.definitions()}
    assert names >= {
        "grouped_gemm.py expert_gemm_kernel", "grouped_gemm.py ring_sums", "fragments.py ROWS",
        "fragments.py load_codes", "gluon.py reinterpreted", "activation.py activated",
        "approximations.py sigmoid", "pdl.py await_previous", "dense_gemm.py dense_gemm_kernel",
    }  # fmt: skip
    assert "arithmetic.py log2" not in names
