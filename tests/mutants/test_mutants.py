"""The judge finds every mutant, at the stage where its fault is, and nothing else."""

# SPDX-License-Identifier: Apache-2.0
import sys
from pathlib import Path

import pytest
from mutants import command, kept
from mutants.__main__ import main
from mutants.edited_copy import KERNELS
from mutants.generated.command import REFERENCE
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


_SMALL = command.Catalogue(_OF_QWEN, QWEN, dict([*CONFORMING.items()][:1]))


class _Stopped(Exception):
    """End a run in these tests, as an interrupt does."""


@pytest.fixture
def tried(monkeypatch):
    """Return the names of mutants that are tried, and how many are before a run ends, if it does."""
    names, stops = [], []
    right = command.try_mutant

    def try_mutant(mutant, calls):
        if stops and len(names) == stops[0]:
            raise _Stopped
        names.append(mutant.name)
        return right(mutant, calls)

    monkeypatch.setattr(command, "try_mutant", try_mutant)
    return names, stops


def test_a_run_that_was_stopped_goes_on(tmp_path, capsys, tried):
    names, stops = tried
    file = tmp_path / "build" / "kept.jsonl"
    asked = ["--seeds", "1", "--conforming", "1"]
    assert main(asked, _SMALL) == 0
    whole = capsys.readouterr().out
    names.clear()
    stops.append(1)
    with pytest.raises(_Stopped):
        main([*asked, "--resume", str(file)], _SMALL)
    with file.open("a") as opened:
        opened.write('\n["mutant')  # as one that was stopped in a line
    stops.clear()
    assert main([*asked, "--resume", str(file)], _SMALL) == 0
    assert names == [m.name for m in _OF_QWEN]  # each once
    assert capsys.readouterr().out == whole
    assert main([*asked, "--resume", str(file)], _SMALL) == 0
    assert names == [m.name for m in _OF_QWEN] and capsys.readouterr().out == whole


def test_what_was_found_of_other_source_is_found_anew(tmp_path, capsys, tried, monkeypatch):
    names, _ = tried
    asked = ["--seeds", "1", "--conforming", "1", "--resume", str(tmp_path / "kept.jsonl")]
    assert main(asked, _SMALL) == 0
    monkeypatch.setattr(kept, "sources", lambda *, kernels: "other")
    assert main(asked, _SMALL) == 0
    assert names == [m.name for m in _OF_QWEN] * 2


def test_sources_are_those_of_the_packages(tmp_path, monkeypatch):
    """A change of a kernel counts for kernels alone, one of the reference for both."""

    def digests():
        return kept.sources(kernels=False), kept.sources(kernels=True)

    before = digests()
    for name, counts in {
        "nvfp4_moe.kernels.moe.routing": (False, True),
        "nvfp4_moe.reference.moe.routing": (True, True),
        "mutants.stage_mutants": (True, True),
        "mutants.kernel_mutants": (False, True),
        "mutants.generated.rules": (False, False),
    }.items():
        changed = tmp_path / "changed.py"
        changed.write_bytes(Path(sys.modules[name].__file__).read_bytes() + b"\n# changed\n")
        with monkeypatch.context() as patched:
            patched.setattr(sys.modules[name], "__file__", str(changed))
            after = digests()
        assert tuple(a != b for a, b in zip(before, after, strict=True)) == counts, name
    assert digests() == before


def test_runs_of_the_reference_execute_no_kernel():
    """A finding about one is kept though a kernel changes."""
    executed = set()

    def profile(frame, event, _):
        if event == "call":
            executed.add(Path(frame.f_code.co_filename).resolve())

    sys.setprofile(profile)
    try:
        command.try_mutants(MUTANTS[::45], 1)
        command.false_alarms(1, QWEN, _SMALL.conforming)
    finally:
        sys.setprofile(None)
    assert REFERENCE / "moe" / "layer.py" in executed
    left_out = {
        Path(module.__file__).resolve()
        for name, module in sys.modules.items()
        if f"{name}.".startswith(kept.OF_KERNELS) and getattr(module, "__file__", None)
    }
    assert KERNELS / "moe" / "launch.py" in left_out
    assert executed & left_out == set()
