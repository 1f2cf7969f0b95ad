"""The fused mixture of experts.

`api` has the public functions, `call` their checked arguments, `backends` the candidates and what each
refuses, `ops` the registration with `torch.library`. `routing` chooses the experts of logits. `launch`
is the Triton layer step by step: `permute`, `grouped_gemm` with `activation`, `finalize`. `tile_table`
has the tiles of the GEMMs, and `autotune` measures others. `hopper` is the grouped GEMM for sm_90,
`masked` the layer on masked input, `training` has kernels of the backward pass, and `row_samples` copies
rows for the canary.
"""

# SPDX-License-Identifier: Apache-2.0
