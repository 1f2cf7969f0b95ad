"""The BF16, FP8 and MXFP8 mixtures of experts that NVFP4 is compared with."""

# SPDX-License-Identifier: Apache-2.0
