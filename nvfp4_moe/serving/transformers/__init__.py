"""NVFP4 experts in Hugging Face transformers, by its own registry of experts implementations."""

# SPDX-License-Identifier: Apache-2.0
from .forward import IMPLEMENTATIONS, prepare, register

__all__ = ["IMPLEMENTATIONS", "prepare", "register"]
