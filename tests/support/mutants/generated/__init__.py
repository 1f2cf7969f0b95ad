"""Mutants made by rule from the syntax of the reference and of the kernels, and what catches each."""

# SPDX-License-Identifier: Apache-2.0
