"""Statistics of quantization: how many blocks saturate or underflow, and the signal-to-noise ratio.

`measure.py` quantizes rows and counts what happens to them. `counts.py` has the counts, which add up
over calls, layers and ranks. `moe.py` collects both quantizations of a layer.
"""

# SPDX-License-Identifier: Apache-2.0
