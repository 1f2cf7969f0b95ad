"""The tables of `docs/flashinfer_versions.md`, from the data; the program writes them into the page."""

# SPDX-License-Identifier: Apache-2.0
import re
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PAGE = "docs/flashinfer_versions.md"
PROGRAM = "tests/support/version_table.py"
FIRST, LAST = "<!-- written by tests/support/version_table.py -->", "<!-- end -->"


def tables() -> str:
    """The three tables, between the marks of the page."""
    from nvfp4_moe.kernels.flashinfer import differences as d

    changed = ("where", "0.7.2", "0.7.4", "source in 0.7.4", "test")
    parts = [
        "## Other bits",
        *_table(changed, ((r.what, r.old, r.new, f"`{r.source}`", f"`{r.test}`") for r in d.BITS)),
        "## Other defaults",
        *_table(changed, ((r.what, r.old, r.new, f"`{r.source}`", f"`{r.test}`") for r in d.DEFAULTS)),
        "## New in 0.7.4",
        *_table(("what", "here", "source in 0.7.4"),
                ((r.what, r.ours, f"`{r.source}`") for r in d.ADDITIONS)),
    ]  # fmt: skip
    return "\n\n".join([FIRST, *parts, LAST])


def _table(head: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> Iterator[str]:
    lines = [head, ("---",) * len(head), *rows]
    yield "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    path = ROOT / PAGE
    text = path.read_text(encoding="utf-8")
    new = re.sub(
        f"{re.escape(FIRST)}.*{re.escape(LAST)}", lambda _: tables(), text, flags=re.DOTALL
    )
    path.write_text(new, encoding="utf-8")
