"""`nvfp4_moe.cases.inputs` under the name that the documentation uses."""

# SPDX-License-Identifier: Apache-2.0
from .cases.inputs import KINDS, activations, golden, synthetic

__all__ = ["KINDS", "activations", "golden", "synthetic"]
