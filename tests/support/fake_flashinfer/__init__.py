"""A fake FlashInfer for machines without a GPU: its own Python over the reference's kernels.

Everything down to the compiled modules is the installed flashinfer-python: its arguments, its tuner,
its quantizers. The modules are replaced; they read their arguments by the index formulas of its C++ and
compute with `nvfp4_moe.reference`, on CPU tensors, in as many ways to add as there are tactics. A fault
makes one of them wrong in a way that upstream kernels have been, or could be.
"""

# SPDX-License-Identifier: Apache-2.0
from .faults import FAULTS, Fault
from .install import CAPABILITY, FakeFlashInfer, installed

__all__ = ["CAPABILITY", "FAULTS", "FakeFlashInfer", "Fault", "installed"]
