"""NVFP4 with per-token scales: a bit-exact reference, Triton kernels, FlashInfer behind one call."""

# SPDX-License-Identifier: Apache-2.0
from pathlib import Path as _Path

# In a source checkout `kernels/` and `reference/` stand beside this folder; an installed wheel holds
# them inside it. Neither has an `__init__.py`, so that a checkout on `sys.path` does not hide other
# packages of those names.
_checkout = _Path(__file__).resolve().parent.parent
if (_checkout / "pyproject.toml").is_file():
    __path__.append(str(_checkout))
