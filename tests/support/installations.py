"""FlashInfer as it is installed on another machine, for what is refused there."""

# SPDX-License-Identifier: Apache-2.0
from dataclasses import replace
from typing import Any

import pytest

from nvfp4_moe.kernels.flashinfer import version

COMPLETE = version.Installation(version.CITED, has_cake_programs=True, has_cudnn=True)
"""Every backend of FlashInfer is installed completely."""


def pretend(monkeypatch: pytest.MonkeyPatch, **changes: Any) -> None:
    """From now on FlashInfer is installed completely, but for the changes."""
    monkeypatch.setattr(version, "HERE", replace(COMPLETE, **changes))
