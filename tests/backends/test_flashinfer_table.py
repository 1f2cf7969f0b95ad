"""The table of FlashInfer's functions: the installed package is as described, version by version."""

# SPDX-License-Identifier: Apache-2.0
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from installations import pretend
from paths import ROOT

from nvfp4_moe.kernels.flashinfer import (
    autotuner,
    baseline_moe,
    cute_dsl,
    cutlass,
    dense,
    description,
    functions,
    quantize,
    rules,
    trtllm,
    version,
)
from nvfp4_moe.kernels.flashinfer.description import KEYWORD, OMITTED, Argument, Function, OfType
from nvfp4_moe.kernels.flashinfer.rules import Rule, first_reason
from nvfp4_moe.kernels.flashinfer.version import CITED, DESCRIBED, EVERY, NEW, Versions

TABLES: dict[str, tuple[Rule, ...]] = {
    **{f"quantizer {name}": each for name, each in quantize.RULES.items()},
    **{f"product {name}": each for name, each in dense.RULES.items()},
    trtllm.NAME: trtllm.RULES,
    cute_dsl.NAME: cute_dsl.RULES,
    cutlass.NAME: cutlass.RULES,
    "baselines": baseline_moe.RULES,
}


# Versions


@pytest.mark.parametrize(
    ("text", "parsed"),
    [
        ("0.7.2.post1", (0, 7, 2)),
        ("0.7", (0, 7)),
        ("0.7.4rc1", (0, 7, 4)),
        ("1.0.0+cu13", (1, 0, 0)),
        ("unknown", ()),
    ],
)
def test_versions_are_read(text, parsed):
    assert version.parsed(text) == parsed


def test_a_range_has_its_beginning_and_not_its_end():
    span = Versions((0, 7), before=(0, 7, 3))
    assert [
        v in span for v in ((0, 6, 18), (0, 7), (0, 7, 0), (0, 7, 2), (0, 7, 3), (1, 0, 0))
    ] == [False, True, True, True, False, False]
    assert () in EVERY and (9, 9) in Versions((0, 7))


@pytest.mark.parametrize(
    ("installed", "described"),
    [
        (None, False),
        ((), False),
        ((0, 6, 18), False),
        ((0, 7), True),
        (CITED, True),
        ((0, 7, 3), False),
        (NEW, True),
        ((0, 7, 5), False),
    ],
)
def test_the_described_versions(monkeypatch, installed, described):
    pretend(monkeypatch, version=installed)
    assert version.HERE.is_described == described
    assert (first_reason(rules.COMMON, Call()) is None) == described


def test_the_extra_begins_where_the_described_versions_begin_and_has_no_end():
    text = (ROOT / "pyproject.toml").read_text()
    assert f'"flashinfer-python>={version.written(DESCRIBED[0].since)}"' in text


@pytest.mark.parametrize("other", [(0, 7, 3), ()])
def test_another_version_is_refused_and_what_differs_is_named(monkeypatch, other):
    lines = ["mm_fp4: fold is new", "nvfp4_quantize: a is gone"]
    monkeypatch.setattr(functions, "differences", lambda: lines)
    rules._what_differs.cache_clear()
    pretend(monkeypatch, version=other)
    reason = first_reason(rules.COMMON, Call())
    name = version.written(other) or "of an unknown version"
    assert reason is not None and reason.startswith(f"flashinfer-python {name} is not described")
    assert "; ".join(lines) in reason
    monkeypatch.setattr(functions, "differences", list)
    rules._what_differs.cache_clear()
    assert "nobody compared its bits" in (first_reason(rules.COMMON, Call()) or "")
    rules._what_differs.cache_clear()


# Rules


class Call:
    capability = (10, 0)
    number = 7


def test_a_rule_counts_in_its_versions_alone(monkeypatch):
    both = (
        Rule(lambda _: True, "{sm} has no {r.number}", versions=Versions((0, 7, 1), (0, 7, 2))),
        Rule(lambda r: r.number == 7, lambda r: f"{r.number} is refused"),
    )
    for here, reason in (((0, 7), "7 is refused"), ((0, 7, 1), "sm_100 has no 7")):
        pretend(monkeypatch, version=here)
        assert first_reason(both, Call()) == reason
        assert first_reason((), Call()) is None


@pytest.mark.parametrize("name", TABLES)
def test_every_table_begins_with_the_common_rules(name):
    assert TABLES[name][: len(rules.COMMON)] == rules.COMMON


def sources() -> Iterator[str]:
    yield from {rule.source for each in TABLES.values() for rule in each if rule.source}
    yield from {f.source for f in functions.FUNCTIONS}


@pytest.fixture
def cited(flashinfer):
    """FlashInfer of the version that the sources cite."""
    here = version.written(version.HERE.version or ())
    if version.HERE.version != CITED:
        pytest.skip(f"sources cite flashinfer-python {version.written(CITED)}; {here} is installed")
    return flashinfer


def test_sources_are_lines_of_the_installed_package(cited):
    """A source names one file at least, by the end of its path, and a line that the file has."""
    root = Path(cited.__file__).parent
    lengths: dict[str, int] = {}
    wrong = []
    for source in sources():
        name, line = source.rsplit(":", 1)
        if name not in lengths:
            found = [p for p in root.rglob(Path(name).name) if p.as_posix().endswith(f"/{name}")]
            lengths[name] = max((len(p.read_text().splitlines()) for p in found), default=0)
        if not 1 <= int(line) <= lengths[name]:
            wrong.append(source)
    assert not wrong and len(lengths) > 15


def test_functions_are_defined_where_their_source_says(cited):
    root = Path(cited.__file__).parent
    for each in functions.FUNCTIONS:
        name, line = each.source.rsplit(":", 1)
        around = (root / name).read_text().splitlines()[int(line) - 3 : int(line) + 3]
        defined = rf"\s*def {each.name.rsplit('.', 1)[-1]}\("
        assert any(re.match(defined, text) for text in around), each.source


# Functions


def test_the_installed_functions_are_as_described(flashinfer):
    assert version.HERE.version is not None
    found = functions.differences()
    assert not found, "flashinfer-python has other functions now:\n" + "\n".join(found)
    assert len({f.name for f in functions.FUNCTIONS}) == len(functions.FUNCTIONS) > 15


SPAN = Versions((0, 7, 4))


def changed(a, b=2, *, c=None, mode="x"):
    return a, b, c, mode


def described(*arguments: Argument) -> Function:
    return Function(__name__, "changed", "test_flashinfer_table.py:1", arguments)


@pytest.fixture
def here(monkeypatch):
    """This module can be imported by its name."""
    import sys

    monkeypatch.setitem(sys.modules, __name__, sys.modules.get(__name__) or _module())


def _module():
    import types

    module = types.ModuleType(__name__)
    module.changed = changed
    return module


A, B = Argument("a"), Argument("b", default=2)
C, MODE = Argument("c", default=None, kind=KEYWORD), Argument("mode", default="x", kind=KEYWORD)


@pytest.mark.parametrize(
    ("arguments", "lines"),
    [
        ((A, B, C, MODE), []),
        ((A, B, C, Argument("mode", default=OfType("str"), kind=KEYWORD)), []),
        ((A, B, C), ["mode is new"]),
        ((A, B, C, MODE, Argument("gone")), ["gone is gone"]),
        ((A, Argument("b", default=3), C, MODE), ["b has the default 2, not 3"]),
        ((A, Argument("b"), C, MODE), ["b has the default 2, not none"]),
        ((A, B, Argument("c", default=None), MODE), ["c is keyword-only"]),
        ((A, B, MODE, C), ["the order is a, b, c, mode"]),
        ((A, B, C, MODE, Argument("later", versions=Versions((9,)))), []),
    ],
)
def test_differences_have_names(here, arguments, lines):
    assert described(*arguments).differences() == [f"changed: {line}" for line in lines]


def test_a_function_that_is_gone():
    assert Function("math", "no_such", "x:1", ()).differences()[0].startswith("no_such: ")
    assert Function("no_such_module", "f", "x:1", ()).differences()[0].startswith("f: No module")


def test_another_version_is_more_rows(here, monkeypatch):
    """A renamed, a removed and an added argument, and a default that changed: data alone."""
    until = Versions(before=(0, 7, 4))
    each = described(
        Argument("a", lambda x: x),
        Argument("old", lambda x: x + 1, versions=until),
        Argument("b", lambda x: x + 1, 2, versions=SPAN),
        Argument("removed", lambda _: 5, versions=until),
        Argument("c", lambda x: OMITTED if x == 1 else x, None, SPAN, KEYWORD),
        Argument("mode", default="y", versions=until, kind=KEYWORD),
        Argument("mode", default="x", versions=SPAN, kind=KEYWORD),
    )
    pretend(monkeypatch, version=(0, 7, 2))
    assert each.keywords(1) == {"a": 1, "old": 2, "removed": 5}
    assert "changed: old is gone" in each.differences()
    pretend(monkeypatch, version=(0, 7, 4))
    assert each.keywords(1) == {"a": 1, "b": 2} and each.keywords(3) == {"a": 3, "b": 4, "c": 3}
    assert each.differences() == [] and each.run(3) == (3, 4, 3, "x")


def test_our_layouts_and_4over6_become_flashinfers(flashinfer):
    from flashinfer.quantization.nvfp4_quantization_utils import NVFP44Over6Config as Theirs

    from nvfp4_moe import NVFP44Over6Config, SfLayout

    assert description.as_theirs(SfLayout.layout_8x4) is flashinfer.SfLayout.layout_8x4
    made = description.as_theirs(NVFP44Over6Config(256, "MSE", True))
    assert type(made) is Theirs and made == Theirs(256, "MSE", True)
    assert description.as_theirs(None) is None and autotuner.UNTUNED == -1
