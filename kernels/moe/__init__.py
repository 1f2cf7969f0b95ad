"""The fused mixture of experts.

`api` has the public functions, `call` their checked arguments, `backends` the candidates and what each
refuses, `ops` the registration with `torch.library`, `launch` the Triton layer step by step.
"""

# SPDX-License-Identifier: Apache-2.0
