"""The grouped and the dense GEMM for sm_90 in Gluon, Triton's language with layouts and barriers.

`gluon.py` alone knows the names of Triton's versions. `docs/hopper_gluon.md` explains the design.
"""

# SPDX-License-Identifier: Apache-2.0
