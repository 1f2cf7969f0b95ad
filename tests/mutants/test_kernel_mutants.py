"""Mistakes in the source of the Triton kernels are found, and the kernels as they are accepted."""

# SPDX-License-Identifier: Apache-2.0
import ast
from dataclasses import replace

import pytest
from mutants import command, edited_copy
from mutants.__main__ import main
from mutants.kernel_calls import CALLS
from mutants.kernel_mutants import KERNEL_MUTANTS
from mutants.reference_mutants import EVERY_SETTING
from mutants.syntax import Edit, spots

_BY_NAME = {m.name: m for m in KERNEL_MUTANTS if m.call != "qwen"}
# One of each file that few calls show.
SAMPLE = [
    _BY_NAME[name]
    for name in (
        "half a tile for more rows than it holds",
        "finalize: product rounded",
        "scaling factor left out",
        "padded columns of block scales not written",
        "reciprocal by division",
    )
]


def test_every_mutant_fits_the_source():
    assert len({(m.name, m.call) for m in KERNEL_MUTANTS}) == len(KERNEL_MUTANTS)
    assert {m.call for m in KERNEL_MUTANTS} == set(CALLS)
    for mutant in KERNEL_MUTANTS:
        source = mutant.place(edited_copy.KERNELS)[0].read_text()
        assert mutant.edit.applied(source) != ast.unparse(ast.parse(source))


def _edited(mutant, **changes):
    return replace(mutant, edit=replace(mutant.edit, **changes))


def test_an_edit_that_does_not_fit_names_the_mutant():
    gone = _edited(SAMPLE[0], old="no_such(name)", within=("of_long_ago",))
    with pytest.raises(
        ValueError, match=r"mutant 'half .*`no_such\(name\)`, within `of_long_ago` fits 0"
    ):
        edited_copy.answer(gone, gone.call)


def test_an_edit_that_fits_twice_names_the_places():
    everywhere = _edited(SAMPLE[0], old="await_previous(ARCH)")
    with pytest.raises(
        ValueError, match=r"fits \d+ places of kernels/ \(.*moe/grouped_gemm.py:\d+.*must fit one"
    ):
        everywhere.place(edited_copy.KERNELS)


_MODULE = """
def first(x, limit):
    if MODE == 1:
        return [x, (x + 1) *  # the factor
                limit]
    else:
        return x + 1

def second(y):
    a = y << 1
    b = a + y
    return b
"""


@pytest.mark.parametrize(
    "edit,expected",
    [
        (Edit("(x + 1) * A_", "(x - 1) * A_"), "[x, (x - 1) * limit]"),
        (Edit("x + 1", "x", ("MODE == 1",)), "[x, x * limit]"),
        (Edit("A_ + B_", "B_ - A_", ("second",)), "b = y - a"),
        (Edit("a = Y_ << 1\nb = a + Y_", "b = Y_"), "def second(y):\n    b = y\n"),
        (Edit("a = y << 1", "pass\na = 1"), "pass\n    a = 1\n    b = a + y"),
        (Edit("A_ + A_", "A_"), None),
        (Edit("x + 1", "x"), None),
        (Edit("x + 1", "x", ("second",)), None),
    ],
)
def test_a_pattern_fits_by_syntax(tmp_path, edit, expected):
    """Brackets, comments and line breaks do not matter; None: it does not fit one place."""
    module = tmp_path / "module.py"
    module.write_text(_MODULE)
    if expected is None:
        with pytest.raises(ValueError, match="must fit one"):
            edit.place(tmp_path)
    else:
        assert edit.place(tmp_path)[0] == module
        assert expected in edit.applied(_MODULE)
        assert ast.unparse(spots(_MODULE)[0]) == ast.unparse(ast.parse(_MODULE)), "left changed"


def test_a_call_that_fails_is_no_mutant_that_was_seen():
    broken = replace(_edited(SAMPLE[3], new="tl.store(P_, no_such_name)"), name="broken")
    with pytest.raises(RuntimeError, match="mutant 'broken', quantizer, fast, 128x4: "):
        edited_copy.answer(broken, broken.call)


def test_mutants_without_an_answer_are_named_and_the_others_are_kept(tmp_path, capsys):
    right, file = SAMPLE[3], tmp_path / "kept.jsonl"
    broken = replace(_edited(right, new="tl.store(P_, no_such_name)"), name="broken")
    gone = replace(_edited(right, old="no_such(name)"), name="gone")
    grid = {"grid": EVERY_SETTING["grid"]}
    wrong = command.Catalogue([], grid, {}, kernel_mutants=[broken, gone, right], kernel_calls=[])
    asked = ["--conforming", "0", "--kernels", "--resume", str(file)]
    assert main(asked, wrong) == 1
    said = capsys.readouterr().err
    assert said.startswith("mutants: error: ") and "'broken'" in said and "'gone'" in said
    assert right.name in file.read_text() and "no_such" not in file.read_text()


def test_some_are_seen():
    assert all(o.seen["interval"] for o in command.try_kernels(SAMPLE))


def test_the_kernels_as_they_are_are_accepted():
    assert command.kernels_as_they_are(sorted({m.call for m in SAMPLE})) == []


@pytest.mark.slow
def test_all_are_seen():
    unseen = [o.mutant for o in command.try_kernels(KERNEL_MUTANTS) if not o.seen["interval"]]
    assert unseen == []
    assert command.kernels_as_they_are(list(CALLS)) == []


def test_a_mutant_that_nobody_sees_fails_the_command(capsys):
    """An edit that changes nothing, on the cheapest call."""
    unseen = replace(_edited(SAMPLE[3], new=SAMPLE[3].edit.old), name="nothing at all")
    grid = {"grid": EVERY_SETTING["grid"]}
    catalogue = command.Catalogue([], grid, kernel_mutants=[unseen], kernel_calls=[])
    assert main(["--seeds", "1", "--conforming", "1", "--kernels"], catalogue) == 1
    assert "NOT SEEN" in capsys.readouterr().out
