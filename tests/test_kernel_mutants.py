"""Mistakes in the source of the Triton kernels are found, and the kernels as they are accepted."""

# SPDX-License-Identifier: Apache-2.0
from dataclasses import replace
from pathlib import Path

import pytest
from nvfp4_moe.kernels import moe

from nvfp4_moe.__main__ import main
from nvfp4_moe.mutants import command, planted
from nvfp4_moe.mutants.kernel_calls import CALLS
from nvfp4_moe.mutants.kernels import KERNEL_MUTANTS

_BY_NAME = {(m.file, m.name): m for m in KERNEL_MUTANTS}
# One of each file that few calls show.
SAMPLE = [
    _BY_NAME[key]
    for key in (
        ("moe_gemm.py", "results truncated to bf16"),
        ("moe_kernels.py", "finalize: product rounded"),
        ("routing.py", "ties to the larger index"),
        ("quantize_kernel.py", "padded columns of block scales not written"),
        ("leaves.py", "reciprocal by division"),
    )
]


def test_the_catalogue_fits_the_source():
    kernels = Path(moe.__file__).parent
    assert len(_BY_NAME) == len(KERNEL_MUTANTS) >= 25
    assert {m.call for m in KERNEL_MUTANTS} == set(CALLS)
    assert all((kernels / m.file).read_text().count(m.old) == 1 for m in KERNEL_MUTANTS)


def test_an_edit_that_does_not_fit_names_the_mutant():
    with pytest.raises(ValueError, match=r"'of long ago': 'no such text' is 0 times in .*moe\.py"):
        planted.answer(
            planted.KernelMutant("of long ago", "moe.py", "no such text", "", "qwen"), "qwen"
        )


def test_a_call_that_fails_is_no_mutant_that_was_seen():
    broken = replace(SAMPLE[3], name="broken", new="no_such_name, mask")
    with pytest.raises(RuntimeError, match="mutant 'broken', quantizer, fast, 128x4: "):
        planted.answer(broken, broken.call)


def test_some_are_seen():
    assert all(o.seen["interval"] for o in command.try_kernels(SAMPLE))


def test_the_kernels_as_they_are_are_accepted():
    assert command.kernels_as_they_are(sorted({m.call for m in SAMPLE})) == []


@pytest.mark.slow
def test_all_are_seen():
    unseen = [o.mutant for o in command.try_kernels() if not o.seen["interval"]]
    assert unseen == []
    assert command.kernels_as_they_are() == []


def test_a_mutant_that_nobody_sees_fails_the_command(monkeypatch, capsys):
    """An edit that changes nothing, on the cheapest call."""
    unseen = replace(SAMPLE[3], name="nothing at all", new=SAMPLE[3].old)
    monkeypatch.setattr(command.try_mutants, "__defaults__", ((), 3))
    monkeypatch.setattr(command.try_kernels, "__defaults__", ((unseen,),))
    monkeypatch.setattr(command.kernels_as_they_are, "__defaults__", ((),))
    monkeypatch.setattr(command, "SETTINGS", {"grid": command.SETTINGS["grid"]})
    assert main(["mutants", "--seeds", "1", "--conforming", "1", "--kernels"]) == 1
    assert "NOT SEEN" in capsys.readouterr().out
