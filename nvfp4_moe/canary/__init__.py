"""A watch over a layer in a running server: rows of its own calls, through the interval judge."""

# SPDX-License-Identifier: Apache-2.0
from .canary import Canary, from_environment

__all__ = ["Canary", "from_environment"]
