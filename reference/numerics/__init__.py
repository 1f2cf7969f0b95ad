"""The arithmetic below every operation, to the bit of the hardware: E2M1, E4M3, fp32 and sums.

`fp32.py` reads `rcp_delta.xz`, the measured table of the PTX instruction for an approximate reciprocal.
`functions.py` has the functions of the routing, exact or as an H200 approximates them.
`accumulate.py` multiplies matrices, and `subnormals.py` keeps the processor from flushing subnormals.
"""

# SPDX-License-Identifier: Apache-2.0
