"""Reads the Python of a page of `docs/`, and writes what a script has made between two marks of it."""

# SPDX-License-Identifier: Apache-2.0
import re

_BLOCK = re.compile(r"^```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def python_blocks(page: str) -> list[str]:
    """Return the Python blocks of a page's text, in order."""
    return _BLOCK.findall(page)


def marks(script: str) -> tuple[str, str]:
    """Return the lines around what the script makes; `script` is its path in the repository."""
    return f"<!-- made by {script} -->", "<!-- end -->"


def between_marks(page: str, content: str, marks: tuple[str, str]) -> str:
    """Return the page with the content in the place of what is between the two marks."""
    before, rest = page.split(marks[0])
    _, after = rest.split(marks[1])
    return f"{before}{marks[0]}\n{content}\n{marks[1]}{after}"
