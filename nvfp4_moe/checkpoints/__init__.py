"""NVFP4 checkpoints: experts read from them, and ordinary checkpoints converted to them."""

# SPDX-License-Identifier: Apache-2.0
from .convert import convert
from .errors import CheckpointError
from .folder import Folder
from .layers import Layer, find_layers
from .load import load_experts

__all__ = ["CheckpointError", "Folder", "Layer", "convert", "find_layers", "load_experts"]
