"""The report page: one HTML file that needs no network, made of `report.Report.as_dict()`."""

# SPDX-License-Identifier: Apache-2.0
import base64
import hashlib
from collections.abc import Iterator, Sequence
from importlib import resources
from typing import Any

from ..differential.results import FAILED, Status
from ..exits import Exit
from .data import count_of
from .markup import Markup, element, join
from .tables import copyable, counts, details_key, section_table, tells

LEGEND: dict[Status, str] = {
    "identical": "the same bits",
    "inside": "every output in its proved interval",
    "different": "bits that differ where they must be the same",
    "outside": "an output that no conforming kernel can give",
    "crashed": "the backend raised, or its process ended",
    "withheld": "run but not judged: it does not add as the intervals assume",
    "skipped": "not run here",
}
LISTED = 20
"""The most failing cells that the head links to."""


def render(report: dict[str, Any]) -> str:
    """Render the page of a run.

    Args:
        report: of `Report.as_dict()`, or read from its JSON.

    Raises:
        ValueError: a cell has a status that `report.Status` does not name.
    """
    if unknown := set(report["statuses"]) - set(LEGEND):
        raise ValueError(f"cells are {sorted(unknown)}; a status is one of {', '.join(LEGEND)}")
    style, script = _asset("page.css"), _asset("page.js")
    verdict = report["verdict"]
    head = element(
        "head",
        element("meta", charset="utf-8"),
        element("meta", http_equiv="Content-Security-Policy", content=_policy(style, script)),
        element("meta", name="viewport", content="width=device-width, initial-scale=1"),
        element("meta", name="color-scheme", content="light dark"),
        element("title", f"{report['name']}: {verdict}"),
        element("style", style),
        element("script", script),
    )
    sections = [section_table(f"{i}", s) for i, s in enumerate(report["sections"])]
    body = element("body", _header(report, verdict), element("main", *sections))
    return "<!DOCTYPE html>\n" + element("html", head, "\n", body, lang="en") + "\n"


def _asset(name: str) -> Markup:
    return Markup(resources.files("nvfp4_moe").joinpath("data", name).read_text("utf-8"))


def _policy(style: str, script: str) -> str:
    """Nothing is loaded, and nothing runs or styles but the two texts given."""

    def digest(text: str) -> str:
        return base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()

    return (
        f"default-src 'none'; style-src 'sha256-{digest(style)}'; "
        f"script-src 'sha256-{digest(script)}'; base-uri 'none'; form-action 'none'"
    )


def _cells(report: dict[str, Any]) -> Iterator[tuple[str, str, str, str, dict[str, Any]]]:
    """Yield (key, section's title, row, column, cell) of each cell; its details have the key."""
    for i, section in enumerate(report["sections"]):
        if section["summary"]:
            continue
        for j, (row, cells) in enumerate(section["rows"].items()):
            for column, cell in cells.items():
                key = details_key(f"{i}", j, section["columns"].index(column))
                yield key, section["title"], row, column, cell


def _header(report: dict[str, Any], verdict: str) -> Markup:
    machine = report["machine"]
    versions = [f"{k} {v or '(not installed)'}" for k, v in machine["versions"].items()]
    variables = [f"{k}={v}" for k, v in machine["environment"].items() if v is not None]
    seconds = report["seconds"]
    facts = {
        "Run again": copyable("code", report["pasted"], "Copy command"),
        "Date": report["date"],
        "Took": f"{seconds:.1f} s" if seconds < 10 else f"{seconds:,.0f} s",
        "GPU": _lines(machine["gpus"] or ["none"]),
        "NVIDIA driver": machine.get("driver") or "none",
        "Commit": machine.get("commit") or "none: no checkout",
        "Contract": element("code", machine.get("contract") or "not recorded"),
        "Bits asked for": f"FlashInfer {report['flashinfer']}",
        "Versions": element("span", ", ".join(versions)),
        "Environment": _lines(variables, "code") if variables else "none of its variables is set",
    }
    look = {Exit.DONE: None, Exit.NOT_RUN: "open"}.get(report["exit_status"], "bad")
    missing = [element("li", f"Asked for and not run: {what}") for what in report["missing"]]
    return element(
        "header",
        element("p", report["name"], class_="kicker"),
        element("h1", verdict[0].upper() + verdict[1:], class_=look),
        element("ul", *missing, class_="failing") if missing else "",
        _failing(report),
        element(
            "dl",
            *(join(element("dt", k), element("dd", v)) for k, v in facts.items()),
            class_="facts",
        ),
        _legend(report["statuses"]),
    )


def _failing(report: dict[str, Any]) -> Markup:
    """Link to the details of failures."""
    items = [
        element(
            "li",
            element("span", cell["status"], class_=f"chip {cell['status']}"),
            " ",
            element("a", f"{row}: {column}", href=f"#{key}" if tells(cell) else None),
            element("span", f" {counts(cell)} · {title}"),
        )
        for key, title, row, column, cell in _cells(report)
        if cell["status"] in FAILED
    ]
    if len(items) > LISTED:
        items[LISTED:] = [element("li", f"and {count_of(len(items) - LISTED, 'more cell')} below")]
    return element("ul", *items, class_="failing") if items else Markup()


def _legend(statuses: dict[str, int]) -> Markup:
    entries = [
        element(
            "div",
            element("dt", element("span", status, class_=f"chip {status}")),
            element("dd", f"{means}; {count_of(statuses.get(status, 0), 'cell')}"),
        )
        for status, means in LEGEND.items()
    ]
    return element("dl", *entries, class_="legend", aria_label="What the cells say")


def _lines(items: Sequence[str], name: str = "span") -> Markup:
    return element("ul", *(element("li", element(name, item)) for item in items))
