"""The report page's tables: rows are cases, and below a row lie the details of its cells."""

# SPDX-License-Identifier: Apache-2.0
import shlex
from collections import Counter
from collections.abc import Sequence
from typing import Any

from ..differential.results import UNJUDGED
from .data import count_of
from .markup import Markup, element, join
from .svg import heat, histogram

QUIET = 8
"""A table shows this many rows of only identical cells; more are folded where others are shown."""


def section_table(key: str, section: dict[str, Any]) -> Markup:
    """Render a `Section`; `key` is its number, from 0."""
    rows = list(range(len(section["rows"])))
    quiet = [j for j, cells in enumerate(section["rows"].values()) if _is_quiet(cells)]
    fold = QUIET < len(quiet) < len(rows)
    visible = [j for j in rows if j not in set(quiet)] if fold else rows
    return element(
        "section",
        element("h2", section["title"], id=f"s{key}"),
        _table(key, section, visible) if rows else element("p", "Nothing was run."),
        _folded(key, section, quiet) if fold else "",
        _notes([*_reasons(section), *section["notes"]]),
        aria_labelledby=f"s{key}",
    )


def _is_quiet(cells: dict[str, dict[str, Any]]) -> bool:
    return all(cell["status"] == "identical" for cell in cells.values())


def _folded(key: str, section: dict[str, Any], rows: list[int]) -> Markup:
    every = list(section["rows"].values())
    compared = sum(cell["compared"] for j in rows for cell in every[j].values())
    summary = f"{count_of(len(rows), 'row')}, all identical ({count_of(compared, 'comparison')})"
    return element("details", element("summary", summary), _table(key, section, rows))


def _reasons(section: dict[str, Any]) -> list[str]:
    """Return the reasons why cells were skipped or withheld, each once."""
    reasons = Counter(
        (cell["status"], cell["note"] or "no reason given")
        for cells in section["rows"].values()
        for cell in cells.values()
        if cell["status"] in UNJUDGED
    )
    return [
        f"{status} ({count_of(n, 'cell')}): {reason}" for (status, reason), n in reasons.items()
    ]


def _notes(items: Sequence[str]) -> Markup:
    return element("ul", *(element("li", i) for i in items), class_="notes") if items else Markup()


def _table(key: str, section: dict[str, Any], rows: list[int]) -> Markup:
    heads = [element("th", column, scope="col") for column in ("case", *section["columns"])]
    every = list(section["rows"].items())
    body = [_row(key, j, section["columns"], *every[j]) for j in rows]
    return element(
        "div",
        element(
            "table",
            element("caption", section["title"]),
            element("thead", element("tr", *heads)),
            element("tbody", *body),
        ),
        class_="grid tall" if len(rows) > 2 * QUIET else "grid",
        role="group",
        aria_label=section["title"],
        tabindex=0,  # so that the keyboard can scroll it
    )


def _row(
    key: str, row: int, columns: Sequence[str], name: str, cells: dict[str, dict[str, Any]]
) -> Markup:
    """Render a row, and one below it if any of its cells has details."""
    places = [(details_key(key, row, k), c, cells.get(c)) for k, c in enumerate(columns)]
    head = element("th", name, scope="row")
    line = element("tr", head, *(_cell(k, cell) for k, _, cell in places))
    more = [_details(k, f"{name}: {c}", cell) for k, c, cell in places if cell and tells(cell)]
    if not more:
        return line
    return join(line, element("tr", element("td", *more, colspan=len(columns) + 1), class_="more"))


def tells(cell: dict[str, Any]) -> bool:
    """True if a cell has details."""
    return bool(cell["note"] or cell["failures"] or cell["histogram"])


def counts(cell: dict[str, Any]) -> str:
    """Write how many of a cell's comparisons failed, and how many there are."""
    if not cell["failed"]:
        return f"{cell['compared']:,}" if cell["compared"] else ""
    return f"{cell['failed']:,} of {cell['compared']:,}"


def _cell(key: str, cell: dict[str, Any] | None) -> Markup:
    if cell is None:
        return element("td", "-", class_="absent", title="not compared")
    content = join(element("b", cell["status"]), " ", counts(cell))
    if cell["note"]:
        content = join(content, element("small", cell["note"]))
    if tells(cell):
        content = element(
            "button", content, type="button", aria_expanded="false", aria_controls=key
        )
    return element("td", content, class_=cell["status"])


def _details(key: str, name: str, cell: dict[str, Any]) -> Markup:
    """Render the details of a cell; the key is inside, so that a link to it opens them."""
    listed = len(cell["failures"])
    return element(
        "details",
        element("summary", f"{name}: {cell['status']} {counts(cell)}".rstrip()),
        element(
            "div",
            element("p", cell["note"]) if cell["note"] else "",
            histogram(cell["histogram"]) if cell["histogram"] else "",
            element("p", f"The first {listed} of {count_of(cell['failed'], 'failure')}:")
            if cell["failed"] > listed > 0
            else "",
            *map(_failure, cell["failures"]),
            id=key,
        ),
        class_=cell["status"],
    )


def _failure(failure: dict[str, Any]) -> Markup:
    parts: list[Markup] = [
        element("h3", failure["case"]),
        element("p", failure["summary"], class_="summary"),
    ]
    if failure["details"]:
        parts.append(element("pre", "\n".join(failure["details"]), tabindex=0))
    if failure["heat"]:
        parts.append(heat(failure["heat"]))
    if failure["replay"]:
        command = shlex.join(["nvfp4-moe", "replay", failure["replay"]])
        if failure["again"]:
            parts.append(element("p", "On the machine where it was found:"))
            parts.append(copyable("code", failure["again"], "Copy command"))
        parts.append(element("p", "In the report's folder, wherever that is:"))
        parts.append(copyable("code", command, "Copy command"))
    if failure["upstream"]:
        text = copyable("pre", failure["upstream"], "Copy text")
        parts.append(element("details", element("summary", "A report for upstream"), text))
    return element("article", *parts)


def copyable(name: str, text: str, label: str) -> Markup:
    """Render text and a button, which shows only where scripts run."""
    button = element("button", label, type="button", class_="copy")
    return element("div", element(name, text), button, class_="copyable")


def details_key(section: str, row: int, column: int) -> str:
    return f"d{section}-{row}-{column}"
