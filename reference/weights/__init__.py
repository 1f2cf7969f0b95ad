"""The weights of a layer's experts: quantized, laid out for each kernel, updated in place.

`experts.py` has the `Experts` that every layer takes, `prepare.py` makes them, and `layout.py` has the
order of their rows. `update.py` writes new weights into them, `checksum.py` compares them between
processes, and `cute_dsl.py` and `cutlass.py` add the copies that those kernels read.
"""

# SPDX-License-Identifier: Apache-2.0
