"""The library's bits do not depend on how the caller has set torch up, as `caller_states.py` lists."""

# SPDX-License-Identifier: Apache-2.0
import json
import os
import subprocess
import sys

import pytest
from caller_states import PARTS, STATES
from paths import ROOT, SUPPORT

from nvfp4_moe.kernels.triton_target import INTERPRETING


def check(device: str, *parts: str) -> None:
    """Compare each part's results of all states in one process, which forks one for each state."""
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    done = subprocess.run(
        [sys.executable, str(SUPPORT / "caller_states.py"), device, *parts],
        env=os.environ | {"PYTHONPATH": path},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert list(found) == list(STATES)
    want = found["plain"]["inside"]
    assert list(want) == list(parts), "the results of other parts"
    assert len(set(want.values())) == len(parts) and all(len(w) == 16 for w in want.values()), want
    for state, results in found.items():
        assert results, f"the process of the state {state!r} ended early"
        for when, got in results.items():
            assert got == want, (state, when)


@pytest.mark.skipif(INTERPRETING, reason="the reference's results need no interpreter")
def test_the_reference_has_the_bits_of_the_plain_state():
    check("cpu", *PARTS)


@pytest.mark.gpu
@pytest.mark.parametrize("part", PARTS)
def test_the_kernels_have_the_bits_of_the_plain_state(part):
    check("cuda", part)


@pytest.mark.interpreter
@pytest.mark.slow
def test_the_kernels_in_the_interpreter_have_the_bits_of_the_plain_state():
    check("cpu", *PARTS)
