"""The grouped GEMM for sm_90 in Gluon, Triton's language with explicit layouts and barriers.

`gluon.py` alone knows which Triton versions compile it. `docs/hopper_gluon.md` explains the design.
"""

# SPDX-License-Identifier: Apache-2.0
