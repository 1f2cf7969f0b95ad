"""The library's bits do not depend on how the caller has set torch up, as `caller_states.py` lists."""

# SPDX-License-Identifier: Apache-2.0
import functools
import json
import os
import subprocess
import sys

import pytest
from caller_states import PARTS, STATES
from marks import ON_A_GPU
from paths import ROOT, SUPPORT

from nvfp4_moe.kernels.triton_target import INTERPRETING


@functools.cache
def results(device: str) -> dict[str, dict[str, dict[str, str]]]:
    """By state, by when, by part."""
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    done = subprocess.run(
        [sys.executable, str(SUPPORT / "caller_states.py"), device],
        env=os.environ | {"PYTHONPATH": path}, capture_output=True, text=True, timeout=600,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def check(state: str, device: str) -> None:
    found = results(device)
    want = found["plain"]["inside"]
    assert len(set(want.values())) == len(PARTS) and all(len(w) == 16 for w in want.values()), want
    assert found[state], "the process of this state ended early"
    for when, got in found[state].items():
        assert got == want, (state, when)


@pytest.mark.skipif(INTERPRETING, reason="the reference's results need no interpreter")
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=ON_A_GPU)])
@pytest.mark.parametrize("state", STATES)
def test_results_are_those_of_the_plain_state(state, device):
    """The reference's on a CPU, the Triton kernels' on a GPU."""
    check(state, device)


@pytest.mark.interpreter
@pytest.mark.slow
@pytest.mark.parametrize("state", STATES)
def test_interpreter(state):
    check(state, "cpu")
