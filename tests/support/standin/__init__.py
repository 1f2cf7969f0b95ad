"""FlashInfer without a GPU: its own Python, over kernels that the reference stands in for.

Everything down to the compiled modules is the installed flashinfer-python: its arguments, its tuner,
its quantizers. The modules are replaced; they read their arguments by the index formulas of its C++ and
compute with `nvfp4_moe.reference`, on CPU tensors, in as many ways to add as there are tactics. A lie
makes one of them wrong in a way that upstream kernels have been, or could be.
"""

# SPDX-License-Identifier: Apache-2.0
from .install import CAPABILITY, StandIn, installed
from .lies import LIES, Lie

__all__ = ["CAPABILITY", "LIES", "Lie", "StandIn", "installed"]
