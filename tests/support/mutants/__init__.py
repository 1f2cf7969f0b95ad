"""Mutants of the fused mixture of experts, and which criterion sees which."""

# SPDX-License-Identifier: Apache-2.0
