"""The canary that a server's environment asks for."""

# SPDX-License-Identifier: Apache-2.0
from typing import TYPE_CHECKING

from ..kernels import environment

if TYPE_CHECKING:
    from ..canary import Canary


def canary_asked_for() -> "Canary | None":
    """Return the process's canary; None, and nothing of it is imported, without NVFP4_MOE_CANARY.

    Raises:
        ValueError: a variable of the canary.
    """
    if environment.canary_steps() is None:
        return None
    from ..canary import from_environment

    return from_environment()
