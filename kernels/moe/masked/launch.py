"""The layer on masked input in Triton, step by step.

Every row stays in its place from the input to the output, so that nothing is permuted. Rows beyond
`masked_m` are neither read nor written. No step waits for the GPU, and no launch depends on values: a
CUDA graph can be replayed with another `masked_m`.
"""

# SPDX-License-Identifier: Apache-2.0
import torch

from ....reference.moe.hidden_states import Activations
from ..hopper.config import RingConfig
from ..launch import gemm1, gemm2, operand, quantized
from ..tile_table import Config, table_configs
from .call import MaskedKernelCall, register
from .rows import copy_rows, masked_rows


def fused_moe_masked(call: MaskedKernelCall, *, config: Config | None = None) -> torch.Tensor:
    """Launch the kernels of the layer, as an `Implementation` of `call.py`.

    Args:
        config: the tiles of both GEMMs; None: the table's, for `expected_m` rows an expert.
    """
    a, experts, recipe = call.activations, call.experts, call.recipe
    rows = a.hidden_states.shape[0]
    out = a.hidden_states.new_zeros((rows, experts.padded_hidden_size), dtype=torch.bfloat16)
    if rows:
        expected = experts.num_local * call.expected_m
        first, second = (
            (config, config)
            if config
            else table_configs(experts, expected, batch_invariant=call.batch_invariant)
        )
        p = masked_rows(call.masked_m, call.max_m, first.bn)
        live, static, ring = p.permuted, call.is_static, isinstance(first, RingConfig)
        if a.is_bf16 and a.hidden_states.shape[1] != experts.padded_hidden_size:
            a = Activations(copy_rows(a.hidden_states, live, columns=experts.padded_hidden_size))
        if call.quantize:
            x1 = quantized(a.hidden_states, recipe, row_index=live, ring=ring)
        else:
            x1 = operand(a, live, ring=ring)
        intermediate = gemm1(x1, experts, p, rows, 0, first, fp32=static)
        del x1
        if call.is_w4a16:
            x2 = operand(Activations(intermediate), live, ring=ring)
        else:
            x2 = quantized(intermediate, recipe, per_token=not static, row_index=live, ring=ring)
        gemm2(x2, experts, p, rows, second, out=out)
    return out[:, : experts.hidden_size].contiguous().view(call.output_shape)


OP = register("triton", fused_moe_masked)
"""`fused_moe_masked` as an op of `torch.library`, which a compiler can call."""
