"""Measure the GEMM tiles on the GPU at hand, and keep the fastest in a file."""

# SPDX-License-Identifier: Apache-2.0
