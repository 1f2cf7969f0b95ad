"""The product of two NVFP4 matrices: `api` is FlashInfer's `mm_fp4`, `launch` runs `kernel`."""

# SPDX-License-Identifier: Apache-2.0
