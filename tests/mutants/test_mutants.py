"""The judge finds every mutant, at the stage where its fault is, and nothing else."""

# SPDX-License-Identifier: Apache-2.0
import pytest
from mutants import command
from mutants.__main__ import main
from mutants.kernel_mutants import KERNEL_MUTANTS
from mutants.reference_mutants import EVERY_SETTING, MUTANTS
from paths import ROOT

from nvfp4_moe.differential.conforming import CONFORMING, SETTINGS, conforms, perform
from nvfp4_moe.differential.stages import STAGES, judge
from nvfp4_moe.reference.moe.layer import Stages

_OF_QWEN = [m for m in MUTANTS if m.setting == "qwen"][:2]
# What the contract says bitwise, though no output may differ by it: seen at its stage alone.
INVISIBLE = {
    f"{family}: {name}"
    for family in ("activations", "requantization")
    for name in ("one per-token scale off by an ulp", "a zero without its sign")
}


def test_the_mutants_are_many():
    names = [m.name for m in MUTANTS]
    assert len(names) == len(set(names))
    assert {m.stage for m in MUTANTS} == set(STAGES)
    assert {m.setting for m in MUTANTS} <= set(EVERY_SETTING)


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda m: m.name)
def test_a_mutant_is_named(mutant):
    for seed in range(3):
        call = mutant.call(seed)
        verdict = judge(call, mutant.run(call))
        if verdict.first:
            break
    assert verdict.first == mutant.stage


@pytest.mark.parametrize(
    "setting,variant",
    [(s, v) for s in EVERY_SETTING for v in CONFORMING if conforms(v, EVERY_SETTING[s])],
)
def test_what_keeps_the_contract_is_accepted(setting, variant):
    call = EVERY_SETTING[setting].call(0)
    verdict = judge(call, perform(call, CONFORMING[variant]))
    assert verdict.first is None and verdict.outside == 0


def test_the_criteria_accept_the_right_output():
    for setting in SETTINGS.values():
        call = setting.call(0)
        right = perform(call, Stages()).result.output.double()
        assert all(accepts(right, right) for accepts in command.CRITERIA.values())
        assert not any(accepts(-right, right) for accepts in command.CRITERIA.values())


def test_an_output_alone_shows_all_but_the_invisible():
    some = [m for m in MUTANTS if m.name in INVISIBLE] + list(MUTANTS[::9])
    outcomes = command.try_mutants(some, seeds=2)
    assert {o.mutant.name for o in outcomes if not o.seen["interval"]} == INVISIBLE


QWEN = {"qwen": SETTINGS["qwen"]}


def test_the_command(capsys):
    some = command.Catalogue(_OF_QWEN, QWEN)
    assert main(["--seeds", "1", "--conforming", "1"], some) == 0
    printed = capsys.readouterr().out
    accepted = sum(conforms(name, QWEN["qwen"]) for name in CONFORMING)
    assert _OF_QWEN[0].name in printed
    assert f"\n{accepted} conforming runs: 0 false alarms" in printed


def test_a_mutant_that_nobody_sees_fails_the_command(capsys):
    unseen = command.Catalogue([command.Mutant("nothing at all", "rows")], QWEN)
    assert main(["--seeds", "1", "--conforming", "1"], unseen) == 1
    assert "NOT SEEN" in capsys.readouterr().out


def test_a_false_alarm_fails_the_command(capsys):
    mutant = next(m for m in MUTANTS if m.name == "rows: truncated to bf16")
    wrong = command.Catalogue([], QWEN, {"a mutant": mutant.stages})
    assert main(["--conforming", "1"], wrong) == 1
    assert "FALSE ALARM qwen" in capsys.readouterr().out


def test_the_command_tries_the_whole_catalogue():
    whole = command.Catalogue()
    assert (whole.mutants, whole.kernel_mutants) == (MUTANTS, KERNEL_MUTANTS)
    assert (whole.settings, whole.conforming) == (EVERY_SETTING, CONFORMING)
    assert set(whole.kernel_calls) == {m.call for m in KERNEL_MUTANTS}


def test_the_shipped_table_has_every_mutant_and_no_other():
    """A mutant that is lost from the catalogue is missed by the table, which names each."""
    tables = tables_of((ROOT / "docs" / "mutants.md").read_text("utf-8"))[:2]
    heads = [command._rows([])[0], command._kernel_rows([])[0]]
    catalogues = [
        [[m.name, m.setting, m.stage] for m in MUTANTS],
        [[m.name, m.file, m.call, "seen"] for m in KERNEL_MUTANTS],
    ]
    for (head, _, *rows, total), expected, want in zip(tables, heads, catalogues, strict=True):
        assert head == expected
        assert [row[: len(want[0])] for row in rows] == want
        assert total[0] == f"seen, of {len(want)}"


def tables_of(text):
    """Cells of every Markdown table, row by row."""
    found = [[]]
    for line in text.splitlines():
        if line.startswith("| "):
            found[-1].append([cell.strip() for cell in line.strip("|").split(" | ")])
        elif found[-1]:
            found.append([])
    return [table for table in found if table]
