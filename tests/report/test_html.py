"""The report page's text: what it says of a report, and that no data becomes markup."""

# SPDX-License-Identifier: Apache-2.0
import json
from html.parser import HTMLParser
from typing import get_args

import page_cases
import pytest

from nvfp4_moe.differential.results import FAILED, Cell, Failure, Heat, Section, Status
from nvfp4_moe.report import html as page
from nvfp4_moe.report import svg

HOSTILE = "</style><script>alert(1)</script> & \"double\" 'single' <b onclick=x>"
VOID = ("meta",)


class Page(HTMLParser):
    """Elements as (name, attributes, own text), in the order of their ends; nesting is checked."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[tuple[str, dict, list[str]]] = []
        self.elements: list[tuple[str, dict, str]] = []
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attrs):
        assert len(dict(attrs)) == len(attrs)
        if tag in VOID:
            self.elements.append((tag, dict(attrs), ""))
        else:
            self.open.append((tag, dict(attrs), []))

    def handle_endtag(self, tag):
        name, attributes, text = self.open.pop()
        assert name == tag
        self.elements.append((name, attributes, "".join(text)))
        if self.open:  # what a reader sees of an element is its descendants' text, too
            self.open[-1][2].extend(text)

    def handle_data(self, data):
        if self.open:
            self.open[-1][2].append(data)

    def all(self, tag: str, class_: str | None = None) -> list[str]:
        return [
            text
            for name, attributes, text in self.elements
            if name == tag and (class_ is None or class_ in attributes.get("class", "").split())
        ]


def rendered(*sections: Section) -> Page:
    return Page(page.render(page_cases.report(*sections).as_dict()))


def one(cell: Cell) -> Page:
    section = Section("a section")
    section.put("a case", "a pair", cell)
    return rendered(section)


def test_every_status_is_explained_worded_and_in_the_style():
    assert set(page.LEGEND) == set(get_args(Status))
    style = page._asset("page.css")
    for status in get_args(Status):
        found = one(Cell(status, compared=1234, failed=0))
        assert found.all("td", status) == [f"{status} 1,234"]
        assert status in found.all("span", "chip")
        assert f".{status} {{ --fill: var(--{status});" in style


def test_an_unknown_status_is_refused():
    with pytest.raises(ValueError, match=r"cells are \['fine'\]; a status is one of identical, "):
        one(Cell("fine"))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("cells", "verdict"),
    [
        ([], "Nothing was judged"),
        ([Cell("skipped"), Cell("withheld", 7, 7)], "Nothing was judged"),
        ([Cell("identical", 1)], "Nothing failed in 1 comparison"),
        ([Cell("identical", 2000), Cell("withheld", 7, 2)], "Nothing failed in 2,000 comparisons"),
        (
            [Cell("identical", 2000), Cell("different", 692, 3)],
            "3 of 2,692 comparisons failed",
        ),
        ([Cell("crashed")], "1 cell failed without a count"),
        (
            [Cell("outside", 3, 1), Cell("crashed"), Cell("crashed")],
            "1 of 3 comparisons failed, 2 cells failed without a count",
        ),
    ],
)
def test_verdict(cells, verdict):
    section = Section("a section")
    for i, cell in enumerate(cells):
        section.put(f"row {i}", "a pair", cell)
    found = rendered(section)
    failing = [cell for cell in cells if cell.status in FAILED]
    assert found.all("h1") == [verdict]
    assert found.all("h1", "bad") == ([verdict] if failing else [])
    assert found.all("title")[0] == f"nvfp4-moe diff: {verdict[0].lower()}{verdict[1:]}"
    assert len(found.all("ul", "failing")) == bool(failing)


def test_the_head_says_how_and_where_it_ran():
    found = Page(page.render(page_cases.faulty().as_dict()))
    assert found.all("code")[0] == "nvfp4-moe diff --report 'a folder'"
    facts = dict(zip(found.all("dt"), found.all("dd"), strict=True))
    assert facts["Took"] == "31 s"
    assert facts["GPU"] == "NVIDIA B200, sm_100, 178 GiB, CUDA 13.0"
    assert facts["Versions"] == "python 3.11.7, torch 2.13.0, flashinfer-python (not installed)"
    assert facts["Environment"] == "FLASHINFER_NVFP4_4OVER6=1"


def test_cells_stand_in_their_row_and_column():
    section = Section("a section", ["left", "right"])
    section.put("first", "right", Cell("different", 9, 2))
    section.put("second", "left", Cell("inside", 5, note="a note"))
    found = rendered(section)
    assert found.all("th") == ["case", "left", "right", "first", "second"]
    rows = [text for text in found.all("tr") if not text.startswith("second: left")]
    assert rows == ["caseleftright", "first-different 2 of 9", "secondinside 5a note-"]
    scopes = [attributes["scope"] for name, attributes, _ in found.elements if name == "th"]
    assert scopes == ["col", "col", "col", "row", "row"]


def test_a_cell_opens_the_details_that_it_has():
    found = Page(page.render(page_cases.faulty().as_dict()))
    controls = [a["aria-controls"] for _, a, _ in found.elements if "aria-controls" in a]
    ids = [a["id"] for _, a, _ in found.elements if "id" in a]
    assert len(ids) == len(set(ids)) and set(controls) == {i for i in ids if i.startswith("d")}
    links = {a["href"][1:] for name, a, _ in found.elements if name == "a"}
    assert len(links) == 4 and links < set(controls)
    told = one(Cell("different", 268, 3))
    assert not told.all("details") and not told.all("button", "")[1:]
    assert [a for name, a, _ in told.elements if name == "a"] == [{}]


def test_a_failure_is_told_whole():
    found = Page(page.render(page_cases.faulty().as_dict()))
    for fault in (page_cases.CODE, page_cases.SCALE, page_cases.MOE):
        assert sum(fault in text for text in found.all("p", "summary")) == 1
    assert "golden 3, per-token, exact, layout_linear" in found.all("h3")
    assert found.all("pre")[0].splitlines()[1] == "    codes 7f21 block scale 0x7e"
    assert "nvfp4-moe replay 'failure 1.safetensors'" in found.all("code")
    assert found.all("pre")[1].startswith("### Rounding of ties\n\n`quantize` differs")
    assert "The first 1 of 3 failures:" in found.all("p")


def test_reasons_are_listed_once_with_the_notes():
    notes = Page(page.render(page_cases.faulty().as_dict())).all("ul", "notes")[1]
    for told in (
        f"withheld (2 cells): {page_cases.WITHHELD}",
        f"skipped (3 cells): {page_cases.SKIPPED}",
        "24 tokens, 4 experts, top 2",
    ):
        assert notes.count(told) == 1


def test_many_rows_of_identical_cells_are_folded_beside_others():
    section = page_cases.quantization()
    found = rendered(section)
    assert "12 rows, all identical (1,584 comparisons)" in found.all("summary")
    first, folded = found.all("table")
    assert "golden 0" not in first and "layer0" not in folded and folded.count("golden") == 12
    for name in ("layer0.ffn_in, per-token", "layer0.ffn_mid, per-token"):
        del section.rows[name]
    found = rendered(section)
    assert not found.all("summary") and len(found.all("table")) == 1


def test_histogram_and_maps_have_their_counts():
    found = Page(page.render(page_cases.faulty().as_dict()))
    titles = found.all("title")
    assert "Where 12,244 outputs lie in their intervals" in titles
    assert "0 to 0.1: 4,000" in titles and "0.9 to 1: 57" in titles
    assert "Which tiles differ: 2,560 differences" in titles and "1, 4: 128" in titles
    assert "1, 5: 13" in titles and "1, 3: 128" not in titles
    none = one(Cell("inside", 1, histogram=[0] * 10))
    assert "No output has an interval of more than one value." in none.all("p")


@pytest.mark.parametrize(("rows", "columns"), [(1, 1), (32, 16), (33, 100), (1000, 65)])
def test_pooled_counts_are_sums(rows, columns):
    counts = [[i * columns + j for j in range(columns)] for i in range(rows)]
    sums, (down, across) = svg.pool(counts, 32)
    assert len(sums) <= 32 and len(sums[0]) <= 32
    for i in range(rows):
        for j in range(columns):
            sums[i // down][j // across] -= counts[i][j]
    assert not any(map(any, sums))
    assert (down, across) == (-(-rows // 32), -(-columns // 32))


def test_pooled_maps_say_what_a_square_sums():
    heat = Heat("an output", [[1] * 64 for _ in range(96)], [[0] * 16])
    told = one(Cell("different", 1, 1, failures=[Failure("a case", "all", heat=heat)]))
    assert "96 x 64, darkest 6; a square sums 3 x 2 tiles" in told.all("span")
    assert "93-95, 62-63: 6" in told.all("title")
    assert "Where within a tile none" in told.all("p")


def test_no_text_of_the_data_becomes_markup():
    failure = Failure(
        HOSTILE, HOSTILE, [HOSTILE], Heat(HOSTILE, [[1]], [[1]]), replay=HOSTILE, upstream=HOSTILE
    )
    section = Section(HOSTILE, notes=[HOSTILE])
    section.put(HOSTILE, HOSTILE, Cell("crashed", 1, 1, HOSTILE, [failure], [1] * 10))
    section.put(HOSTILE, "skipped", Cell("skipped", note=HOSTILE))
    report = page_cases.report(section)
    report.command = ["nvfp4-moe", HOSTILE]
    report.machine = {
        "versions": {HOSTILE: HOSTILE},
        "gpus": [HOSTILE],
        "environment": {"A": HOSTILE},
    }
    found = Page(page.render(report.as_dict()))
    assert len(found.all("script")) == len(found.all("style")) == 1
    assert not [a for _, a, _ in found.elements if "onclick" in a]
    for tag in ("h2", "h3", "pre", "li", "small", "th", "a", "caption", "figcaption", "summary"):
        assert any(HOSTILE in text for text in found.all(tag)), tag
    labels = [a["aria-label"] for name, a, _ in found.elements if name == "div" and "role" in a]
    assert labels == [HOSTILE]


def test_what_utf8_cannot_write_does_not_stop_the_page():
    page.render(page_cases.report(Section("of a crash: \udce2")).as_dict()).encode()


def test_the_page_needs_nothing_else():
    text = page.render(page_cases.faulty().as_dict())
    found = Page(text)
    for _, attributes, _ in found.elements:
        assert not {"src", "srcset", "style", "onclick"} & set(attributes)
        assert attributes.get("href", "#").startswith("#")
    assert "url(" not in text and "@import" not in text and "http:" not in text
    policy = next(a["content"] for _, a, _ in found.elements if "http-equiv" in a)
    assert policy.startswith("default-src 'none'; ") and "unsafe" not in policy


def test_the_page_of_json_is_the_same():
    report = page_cases.faulty().as_dict()
    assert page.render(json.loads(json.dumps(report))) == page.render(report)


@pytest.mark.parametrize(
    ("cell", "most"),
    [
        (Cell("identical", 11), 100_000),
        (Cell("skipped", note=page_cases.SKIPPED), 600_000),
    ],
)
def test_a_page_of_a_thousand_cells_is_small(cell, most):
    section = Section("large")
    for i in range(1000):
        section.put(f"layer{i // 10}.ffn_mid, per-token", f"backend {i % 10}", cell)
    assert len(page.render(page_cases.report(section).as_dict()).encode()) < most
