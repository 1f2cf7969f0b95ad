"""The Triton kernels' answers without a GPU: functions called where Triton's interpreter is on.

Triton reads TRITON_INTERPRET when it is imported, so that takes processes of their own.
"""

# SPDX-License-Identifier: Apache-2.0
import importlib.util
from typing import Any

from . import workers as processes

NAME = "triton (interpreter)"


def refusal() -> str | None:
    """Why nothing can be interpreted here; None if it can."""
    return None if importlib.util.find_spec("triton") else "Triton is not installed"


def call(function: str, jobs: list[tuple]) -> list[Any]:
    """`processes.call` with the interpreter on."""
    return processes.call(function, jobs, TRITON_INTERPRET="1")
