"""Mutants of the fused mixture of experts, and which criterion sees which."""

# SPDX-License-Identifier: Apache-2.0
from nvfp4_moe.kernels.records import repeats

repeats.enabled = False  # a call from a record would not run what a mutant replaces
