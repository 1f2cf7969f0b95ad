"""Writes what a script has made into its page of `docs/`, between two marks."""

# SPDX-License-Identifier: Apache-2.0


def marks(script: str) -> tuple[str, str]:
    """Return the lines around what the script makes; `script` is its path in the repository."""
    return f"<!-- made by {script} -->", "<!-- end -->"


def between_marks(page: str, content: str, marks: tuple[str, str]) -> str:
    """Return the page with the content in the place of what is between the two marks."""
    before, rest = page.split(marks[0])
    _, after = rest.split(marks[1])
    return f"{before}{marks[0]}\n{content}\n{marks[1]}{after}"
