"""NVFP4 experts in Hugging Face transformers, by its own registry of experts implementations."""

# SPDX-License-Identifier: Apache-2.0
from pathlib import Path
from typing import Any

from .forward import IMPLEMENTATIONS, prepare, register

__all__ = ["IMPLEMENTATIONS", "from_pretrained", "prepare", "register"]


def from_pretrained(folder: Path | str, **options: Any) -> Any:
    """Load a model whose checkpoint has NVFP4 experts: `quantizer.from_pretrained`, after `register`."""
    register()
    from .quantizer import from_pretrained as load

    return load(folder, **options)
