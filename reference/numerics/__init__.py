"""The numbers below every operation: the E2M1, E4M3 and fp32 arithmetic of the hardware, to the bit.

`rcp_delta.xz` is the table of `rcp.approx` that `fp32.py` reads. `subnormals.py` keeps the processor
from flushing subnormal numbers.
"""

# SPDX-License-Identifier: Apache-2.0
