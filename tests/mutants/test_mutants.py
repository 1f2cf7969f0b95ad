"""The judge finds every mutant, at the stage where its fault is, and nothing else."""

# SPDX-License-Identifier: Apache-2.0
import io

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
    assert len(names) == len(set(names)) >= 60
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


@pytest.fixture
def one_setting(monkeypatch):
    monkeypatch.setattr(command, "EVERY_SETTING", {"qwen": SETTINGS["qwen"]})


@pytest.mark.usefixtures("one_setting")
def test_the_command(monkeypatch, capsys):
    monkeypatch.setattr(command.try_mutants, "__defaults__", (_OF_QWEN, 3))
    assert main(["--seeds", "1", "--conforming", "1"]) == 0
    printed = capsys.readouterr().out
    assert _OF_QWEN[0].name in printed and "0 false alarms" in printed


@pytest.mark.usefixtures("one_setting")
def test_a_mutant_that_nobody_sees_fails_the_command(monkeypatch, capsys):
    unseen = command.Mutant("nothing at all", "rows")
    monkeypatch.setattr(command.try_mutants, "__defaults__", ((unseen,), 3))
    assert main(["--seeds", "1", "--conforming", "1"]) == 1
    assert "NOT SEEN" in capsys.readouterr().out


@pytest.mark.usefixtures("one_setting")
def test_a_false_alarm_fails_the_command(monkeypatch, capsys):
    monkeypatch.setattr(command.try_mutants, "__defaults__", ((), 3))
    mutant = next(m for m in MUTANTS if m.name == "rows: truncated to bf16")
    monkeypatch.setattr(command, "CONFORMING", {"a mutant": mutant.stages})
    assert main(["--conforming", "1"]) == 1
    assert "FALSE ALARM qwen" in capsys.readouterr().out


def test_the_shipped_table_has_every_mutant():
    table = (ROOT / "docs" / "mutants.md").read_text()
    assert all(f"| {m.name} | {m.setting} | {m.stage} |" in table for m in MUTANTS)
    assert all(f"| {m.name} | {m.file} | {m.call} | seen |" in table for m in KERNEL_MUTANTS)
    for rows in (command._rows([]), command._kernel_rows([])):
        stream = io.StringIO()
        command._markdown(rows, stream)
        assert stream.getvalue().splitlines()[0] in table
