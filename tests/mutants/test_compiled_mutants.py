"""Mutants that the kernels' compilation decides, and the forms that the probes of Gluon's have."""

# SPDX-License-Identifier: Apache-2.0
from dataclasses import replace

import pytest
from mutants.__main__ import main
from mutants.generated import command, compiled, kernel_probes, trial
from mutants.generated.results import Results

pytestmark = pytest.mark.compile
FILE = "kernels/moe/hopper/dense_gemm.py"
QUICK = "ring, dense, 3 cleared"
"""A probe whose one kernel compiles in a tenth of a second."""


@pytest.fixture
def one_probe(monkeypatch):
    monkeypatch.setattr(kernel_probes, "asked", lambda file, device: [QUICK] * (file == FILE))
    command._named_probes.cache_clear()
    yield
    command._named_probes.cache_clear()


@pytest.fixture(scope="module")
def of_clear_kernel():
    made = [m for m in command.every("kernels") if m.file == FILE]
    return {m.change: m for m in made if m.function == "clear_kernel"}


def test_what_does_not_compile_is_killed_and_what_is_the_same_code_survives(
    one_probe, of_clear_kernel
):
    changed = of_clear_kernel["i < programs -> i <= programs"]
    source = changed.unchanged
    same = replace(
        changed, change="same", build=lambda: source.replace("ready_ptr + i", "i + ready_ptr")
    )
    fails = replace(changed, change="fails", build=lambda: source.replace("[32]", "[16]"))
    assert same.source != source != fails.source
    probes = compiled.probes(FILE)
    assert trial.check(probes.items(), jobs=1, seconds=100.0)[1] == []
    given = [(m, list(probes.values())) for m in (same, fails, changed)]
    same_code, no_code, other_code = trial.run(given, jobs=1, seconds=lambda _: 100.0)
    assert (same_code.status, no_code.status) == ("survived", "killed")
    assert not no_code.by.startswith(compiled.WAITS)
    assert (other_code.status, other_code.by) == ("killed", compiled.WAITS)


def test_the_command_keeps_what_compilation_decides_alone(
    one_probe, of_clear_kernel, tmp_path, capsys
):
    path = tmp_path / "results.txt"
    asked = [
        "--generated",
        "kernels",
        "--device",
        "compile",
        "--only",
        "dense_gemm.py clear_kernel",
    ]
    main([*asked, "--results", str(path)])
    said = capsys.readouterr().out
    assert said.startswith(f"{len(of_clear_kernel)} tried") and "WRONG PROBE" not in said
    found = Results(path, command.every("kernels"))
    kept = {change: found.of(m) for change, m in of_clear_kernel.items()}
    assert kept["i < programs -> i <= programs"] == {}
    assert {"compile": "killed"} in kept.values()


def test_of_tritons_kernels_those_that_are_open_are_compiled(tmp_path, capsys, monkeypatch):
    """Its kernel in assembly has no place for a packed pair; one that is harmless does not wait."""
    tried = [m for m in command.every("kernels") if m.file == "kernels/jit/arithmetic.py"]
    by_change = {m.change: m for m in tried if m.function == "fma"}
    packed = next(m for change, m in by_change.items() if change.endswith("True, 2)"))
    path = tmp_path / "results.txt"
    results = Results(path, tried)
    for mutant in tried:
        results.add(mutant, "cpu", "survived" if mutant is packed else "killed")
    results.write()
    monkeypatch.setattr(kernel_probes, "asked", lambda file, device: ["function, fma, False"])
    # The compiler aborts, which may take long to report.
    monkeypatch.setattr(command, "LEAST_SECONDS", 100.0)
    command._named_probes.cache_clear()
    main(
        ["--generated", "kernels", "--device", "compile", "--results", str(path), "--only", "fma:"]
    )
    command._named_probes.cache_clear()
    assert capsys.readouterr().out.startswith("1 tried")
    assert Results(path, tried).of(packed) == {"cpu": "survived", "compile": "killed"}


def test_what_does_not_fit_is_killed(one_probe, of_clear_kernel, monkeypatch):
    probes = compiled.probes(FILE)
    assert trial.check(probes.items(), jobs=1, seconds=100.0)[1] == []
    changed = of_clear_kernel["i < programs -> i <= programs"]
    monkeypatch.setattr(compiled, "_SHARED_BYTES", -1)
    (found,) = trial.run([(changed, list(probes.values()))], jobs=1, seconds=lambda _: 100.0)
    assert found.by.startswith("OutOfResources: out of resource: shared memory")


def test_a_constant_exchanged_in_a_child_leaves_the_digests(one_probe, of_clear_kernel):
    """The child empties all caches, and compares its kernels with the unchanged ones all the same."""
    probes = compiled.probes(FILE)
    assert trial.check(probes.items(), jobs=1, seconds=100.0)[1] == []
    constant = next(m for m in command.every("kernels") if m.function == "COPIERS")
    changed = of_clear_kernel["i < programs -> i <= programs"]
    given = [(m, list(probes.values())) for m in (constant, changed)]
    same_code, other_code = trial.run(given, jobs=1, seconds=lambda _: 100.0)
    assert (same_code.status, other_code.by) == ("survived", compiled.WAITS)


def test_files_that_launch_one_form_have_one_probe_of_it(monkeypatch):
    monkeypatch.setattr(kernel_probes, "asked", lambda file, device: [QUICK])
    assert compiled.probes(FILE) == compiled.probes("kernels/moe/hopper/grouped_gemm.py") != {}


def test_a_fault_of_the_machine_decides_nothing(one_probe, of_clear_kernel, monkeypatch):
    probes = compiled.probes(FILE)

    def fails(*args, **options):
        raise OSError("no space left on device")

    monkeypatch.setattr(compiled, "_run", fails)
    (mutant, *_) = of_clear_kernel.values()
    (found,) = trial.run([(mutant, list(probes.values()))], jobs=1, seconds=lambda _: 100.0)
    assert found.by.startswith(compiled.WAITS)


def of_ring(name):
    return name.startswith("ring") and "far" not in name


def test_the_probes_launch_the_dense_gemm_in_every_form():
    """With shared tiles and without: a scale for each row or for all, and a width of several parts.

    Also without a scale, and with half tiles, which have half of the warps.
    """
    forms, scaled, warps = set(), set(), set()
    for name in kernel_probes.asked(FILE, "cuda"):
        for launch in compiled.launches(name) if of_ring(name) else []:
            given = {p.name: a for p, a in zip(launch.kernel.params, launch.args, strict=False)}
            given |= launch.options
            if launch.kernel.__name__ == "dense_gemm_kernel":
                scaled.add(given["alpha_ptr"] is not None)
                warps.add(given["num_warps"])
                parts = any(width & (width - 1) for width in given["WIDTHS"])
                forms.add((given["sums_ptr"] is not None, given["BY_ROW"], parts))
    assert forms >= {
        (shared, by_row, False) for shared in (False, True) for by_row in (False, True)
    }
    assert {(False, True, True), (True, True, True)} <= forms
    assert scaled == {False, True}
    assert warps == {4, 8}


def test_the_probes_launch_the_grouped_gemm_in_every_form():
    """Each constant that is a truth value is true in some launch and false in another."""
    options = ("GATHERED", "FRAGMENTS", "ODD", "AHEAD")
    found = {}
    for name in kernel_probes.asked("kernels/moe/hopper/grouped_gemm.py", "cuda"):
        for launch in compiled.launches(name) if of_ring(name) else []:
            if launch.kernel.__name__ == "expert_gemm_kernel":
                for option in options:
                    found.setdefault(option, set()).add(bool(launch.options[option]))
    assert found == {option: {False, True} for option in options}
