"""The fused mixture of experts.

`api` has the public functions, `call` their checked arguments, `backends` the candidates and what each
refuses, `ops` the registration with `torch.library`. `routing` chooses the experts of logits. `launch`
is the Triton layer step by step: `permute`, `grouped_gemm` with `activation`, `finalize`. `configs` has
the table of the tiles of the GEMMs, and `autotune` measures others.
"""

# SPDX-License-Identifier: Apache-2.0
