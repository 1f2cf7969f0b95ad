"""The probes of the quantizer's paths for a GPU, in the interpreter, accept the code as it is.

They replace functions of `kernels/quantize/block.py` by name, and a change there can leave names behind.
"""

# SPDX-License-Identifier: Apache-2.0
import pytest
from mutants.generated import gpu_paths

PROBES = dict(gpu_paths.named())


@pytest.mark.interpreter
@pytest.mark.parametrize("name", PROBES)
def test_a_probe_accepts_the_code_as_it_is(name):
    call = PROBES[name]()
    assert call.judge().accepts(call.answer())
