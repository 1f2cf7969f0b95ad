"""Statistics of quantization: how many blocks saturate or underflow, and the signal-to-noise ratio.

`counts.py` measures rows of activations and of weights. `moe.py` collects both quantizations of a layer,
by expert and over calls. `table.py` prints them.
"""

# SPDX-License-Identifier: Apache-2.0
