"""The inputs and calls that are compared: tensors to quantize, MoE layers, edge cases, random calls."""

# SPDX-License-Identifier: Apache-2.0
