"""The mixture of experts, from router logits to the output.

`layer.py` is the fused call, of the hidden states of `activations.py`. `routing.py`, `permute.py` and
`finalize.py` are its first and last steps. `masked_layout.py` takes rows by expert, and
`shards.py` splits a layer over ranks. `baseline_moe.py` and `fp8.py` are the BF16, FP8 and MXFP8 layers
that NVFP4 is compared with.
"""

# SPDX-License-Identifier: Apache-2.0
from .activations import Activations, quantize_activations
from .layer import MoEResult, fused_moe

__all__ = ["Activations", "MoEResult", "fused_moe", "quantize_activations"]
