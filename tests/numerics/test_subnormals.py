"""Subnormal numbers count, whatever flag the caller's thread and torch's pool have."""

# SPDX-License-Identifier: Apache-2.0
import subprocess
import sys

import pytest
from paths import ROOT

from nvfp4_moe.kernels.triton_target import INTERPRETING

_SOURCE = """
import threading
import torch
torch.set_num_threads(2)
if {before}:
    torch.set_flush_denormal(True)
torch.ones(1 << 17) * 2  # which starts the threads of the pool
torch.set_flush_denormal({flag})
from nvfp4_moe.reference.quantize import dequantize
from nvfp4_moe.reference.numerics.subnormals import flushes
codes = torch.full((512, 128), 0x22, dtype=torch.uint8)
scales = torch.full((512, 16), 8, dtype=torch.uint8)
bits = torch.tensor([2**9], dtype=torch.int32).view(torch.float32)

def check():
    for _ in range(2):
        found = dequantize(codes, scales, bits).view(torch.int32)
        assert (found == 8).all(), found.unique()  # 2^-6 of it
        assert flushes() == {flag} and torch.get_num_threads() == 2

check()
thread = threading.Thread(target=check)
seen = []
threading.excepthook = seen.append
thread.start()
thread.join()
assert not seen, seen
"""


@pytest.mark.skipif(INTERPRETING, reason="the reference needs no interpreter")
@pytest.mark.parametrize("before", [False, True])
@pytest.mark.parametrize("flag", [False, True])
def test_pools_of_threads(before, flag):
    """The pool's threads were started under the flag or not, and the caller has it now or not."""
    source = _SOURCE.format(before=before, flag=flag)
    done = subprocess.run([sys.executable, "-c", source], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
