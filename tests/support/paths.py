"""Paths of the repository and of the helpers of its tests."""

# SPDX-License-Identifier: Apache-2.0
from pathlib import Path

SUPPORT = Path(__file__).resolve().parent
"""The helpers, which Python finds by this folder on its path."""

ROOT = SUPPORT.parent.parent
"""The repository."""
