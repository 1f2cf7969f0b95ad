"""Measure speed: the operations, their cases, the clocks, results in a file, and plots.

`nvfp4-moe bench`, `pytest bench` and the speed tables of `bench/` measure by these modules. A `Case`
(`case.py`) is one operation at one shape, number of tokens and backend. `operations.py` has the table of
operations, and each has a file: `quantize.py`, `dense.py`, `moe.py`, `checkpoint.py`.
"""

# SPDX-License-Identifier: Apache-2.0
