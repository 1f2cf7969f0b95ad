"""The fused layer on masked input: `[E, max_m, H]`, of which expert e has `masked_m[e]` rows.

`api` has the public function and its table of backends, `call` the checked arguments and the ops of
`torch.library`. `launch` is the Triton layer; it runs the steps of `kernels/moe/launch.py` on the rows
that `rows` finds.
"""

# SPDX-License-Identifier: Apache-2.0
