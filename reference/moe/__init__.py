"""The mixture of experts, from router logits to the output.

`layer.py` is the fused call, of the hidden states of `hidden_states.py`. `routing.py`, `permute.py` and
`finalize.py` are its first and last steps. `masked.py` takes rows by expert, and
`shards.py` splits a layer over ranks. `baseline_moe.py` and `fp8.py` are the BF16, FP8 and MXFP8 layers
that NVFP4 is compared with.
"""

# SPDX-License-Identifier: Apache-2.0
from .hidden_states import Activations, quantize_activations
from .layer import MoEResult, fused_moe

__all__ = ["Activations", "MoEResult", "fused_moe", "quantize_activations"]
