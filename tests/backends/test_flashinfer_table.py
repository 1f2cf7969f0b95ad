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
    baselines,
    cute_dsl,
    cutlass,
    dense,
    quantize,
    rules,
    trtllm,
    version,
)
from nvfp4_moe.kernels.flashinfer import (
    description as function,
)
from nvfp4_moe.kernels.flashinfer import (
    functions as table,
)
from nvfp4_moe.kernels.flashinfer.description import KEYWORD, OMITTED, Argument, Function, OfType
from nvfp4_moe.kernels.flashinfer.rules import Rule, first_reason
from nvfp4_moe.kernels.flashinfer.version import CITED, EVERY, SUPPORTED, Versions

TABLES: dict[str, tuple[Rule, ...]] = {
    **{f"quantizer {name}": each for name, each in quantize.RULES.items()},
    **{f"product {name}": each for name, each in dense.RULES.items()},
    trtllm.NAME: trtllm.RULES,
    cute_dsl.NAME: cute_dsl.RULES,
    cutlass.NAME: cutlass.RULES,
    "baselines": baselines.RULES,
}


# Versions


@pytest.mark.parametrize(
    ("text", "parsed"),
    [("0.7.2.post1", (0, 7, 2)), ("0.7", (0, 7)), ("0.7.4rc1", (0, 7, 4)), ("1.0.0+cu13", (1, 0, 0)),
     ("unknown", ())],
)  # fmt: skip
def test_versions_are_read(text, parsed):
    assert version.parsed(text) == parsed


def test_a_range_has_its_beginning_and_not_its_end():
    span = Versions((0, 7), before=(0, 7, 3))
    assert [
        v in span for v in ((0, 6, 18), (0, 7), (0, 7, 0), (0, 7, 2), (0, 7, 3), (1, 0, 0))
    ] == [False, True, True, True, False, False]
    assert () in EVERY and (9, 9) in Versions((0, 7)) and CITED in SUPPORTED


def test_the_extra_ends_where_the_described_versions_end():
    text = (ROOT / "pyproject.toml").read_text()
    assert SUPPORTED.before is not None
    since, before = version.written(SUPPORTED.since), version.written(SUPPORTED.before)
    assert f'"flashinfer-python>={since},<{before}"' in text


def test_an_unknown_version_counts_as_the_cited_one(monkeypatch):
    pretend(monkeypatch, version=())
    assert version.HERE.described_as == CITED and first_reason(rules.COMMON, Call()) is None


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
    yield from {f.source for f in table.FUNCTIONS}


def test_sources_are_lines_of_the_installed_package(flashinfer):
    """A source names one file at least, by the end of its path, and a line that the file has."""
    root = Path(flashinfer.__file__).parent
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


def test_functions_are_defined_where_their_source_says(flashinfer):
    root = Path(flashinfer.__file__).parent
    for each in table.FUNCTIONS:
        name, line = each.source.rsplit(":", 1)
        around = (root / name).read_text().splitlines()[int(line) - 3 : int(line) + 3]
        defined = rf"\s*def {each.name.rsplit('.', 1)[-1]}\("
        assert any(re.match(defined, text) for text in around), each.source


# Functions


def test_the_installed_functions_are_as_described(flashinfer):
    assert version.HERE.version is not None
    found = table.differences()
    assert not found, "flashinfer-python has other functions now:\n" + "\n".join(found)
    assert len({f.name for f in table.FUNCTIONS}) == len(table.FUNCTIONS) > 15


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
        ((A, B, C, MODE, Argument("later", versions=SPAN)), []),
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

    assert function.as_theirs(SfLayout.layout_8x4) is flashinfer.SfLayout.layout_8x4
    made = function.as_theirs(NVFP44Over6Config(256, "MSE", True))
    assert type(made) is Theirs and made == Theirs(256, "MSE", True)
    assert function.as_theirs(None) is None and autotuner.UNTUNED == -1
