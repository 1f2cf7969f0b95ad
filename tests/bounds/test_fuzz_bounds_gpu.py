"""Triton's kernels, and the reference on a GPU, are inside the intervals over the range of fp32."""

# SPDX-License-Identifier: Apache-2.0
from marks import ON_A_GPU

from nvfp4_moe.cli import fuzz_bounds

pytestmark = ON_A_GPU


def test_no_false_alarm():
    """Few kinds, which are soon compiled; `make fuzz-bounds-gpu` has many."""
    settings = {"tokens": 64, "ways": 2, "kinds": 5, "device": "cuda", "triton": True}
    tally = fuzz_bounds.part(0, 1, 200, 1e9, settings)
    assert not tally.alarms, "\n".join(tally.alarms)
    assert tally.runs["triton"] > 40
