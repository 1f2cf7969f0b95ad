"""Patterns by which a quantization config names modules."""

# SPDX-License-Identifier: Apache-2.0
import re
from fnmatch import fnmatchcase


def matches(pattern: str, module: str) -> bool:
    """Whether a pattern of `exclude_modules`, `ignore` or `targets` means a module.

    `re:` begins a regular expression for the start of the name; others have wildcards.
    """
    if pattern.startswith("re:"):
        return re.match(pattern[3:], module) is not None
    return fnmatchcase(module, pattern)
