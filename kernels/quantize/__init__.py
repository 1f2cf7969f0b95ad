"""The quantizer: `api` is FlashInfer's function, `call` its checked arguments, `launch` runs `kernel`.

`block` has the arithmetic of one block of 16, `ops` the registration with `torch.library`.
"""

# SPDX-License-Identifier: Apache-2.0
