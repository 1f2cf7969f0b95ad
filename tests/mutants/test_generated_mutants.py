"""Mutants made by rule: what is made, that it is applied, caught, and listed where it cannot be."""

# SPDX-License-Identifier: Apache-2.0
import inspect
import os
import re
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from mutants.__main__ import main
from mutants.edited_copy import KERNELS
from mutants.generated import (
    answers,
    command,
    executed,
    harmless,
    kernel_probes,
    reference_probes,
    trial,
)
from mutants.generated.apply import applied, module_of
from mutants.generated.results import KEPT, Results
from mutants.generated.rules import Generated, generate
from triton.runtime.errors import InterpreterError

from nvfp4_moe.kernels import launcher
from nvfp4_moe.kernels.jit.decode import decode_kernel
from nvfp4_moe.kernels.moe import grouped_gemm, permute
from nvfp4_moe.kernels.moe.hopper import grouped_gemm as grouped

_SOURCE = '''
LIMIT = 4.0

def f(x: int, y, n=2):
    """Not 1 mutant."""
    if x < y and not n:
        raise ValueError(f"{x + 1}")
    for i in range(n):
        y = x.float() + tl.load(p + i)
    return y[1:n]

@triton.jit
def g(x):
    return x
'''
CHEAP = ("e2m1", "e4m3", "fp32", "layouts", "routing", "dense", "recipe")


def test_the_rules():
    found = generate("a.py", _SOURCE)
    assert {m.shown for m in found} == {
        "a.py LIMIT: constant: 4.0 -> 4.000000476837158",
        "a.py f: constant: 2 -> 3",
        "a.py f: comparison: x < y -> x <= y",
        "a.py f: operator: x < y and (not n) -> x < y or not n",
        "a.py f: operator: not n -> n",
        "a.py f: index: range(n) -> range(n + 1)",
        "a.py f: operator: x.float() + tl.load(p + i) -> x.float() - tl.load(p + i)",
        "a.py f: rounding: x.float() -> x",
        "a.py f: index: tl.load(p + i) -> tl.load(p + i + 1)",
        "a.py f: operator: p + i -> p - i",
        "a.py f: constant: 1:n -> 2:n",
        "a.py f: index: 1:n -> 1:n + 1",
    }
    assert not generate("a.py", _SOURCE, jitted=True)


@pytest.fixture(scope="module")
def of_reference():
    return command.every("reference")


def test_every_mutant_has_a_name_of_its_own(of_reference):
    both = [*of_reference, *command.every("kernels")]
    assert not [key for key, count in Counter(m.key for m in both).items() if count > 1]
    listed = [key for keys in harmless.HARMLESS.values() for key in keys]
    assert len(listed) == len(set(listed))
    assert set(listed) <= {m.key for m in both}, "a harmless mutant that is not made any more"


def test_the_unchanged_reference_answers_as_it_did():
    assert not [wrong for name in CHEAP for wrong in reference_probes.probe(name)()]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="mutants are tried in forked processes")
def test_a_sample_is_caught(of_reference):
    """Every twelfth of the modules whose questions take no time."""
    cheap = [m for m in of_reference if Path(m.file).stem in CHEAP]
    assert {Path(m.file).stem for m in cheap} == set(CHEAP), "modules without a mutant"
    some = cheap[::12]
    left = [m for m in some if not harmless.reason(m.key)]
    first = [(m, list(command.probes_of(m, "cpu").values())[:1]) for m in left]
    tried = list(trial.run(first, jobs=1, seconds=lambda _: 60.0))
    assert {r.mutant.key for r in tried} == {m.key for m in left}
    assert [r.mutant.key for r in tried if r.status == "survived"] == []


@pytest.mark.interpreter
def test_a_sample_of_the_kernels_is_caught():
    every = [m for m in command.every("kernels") if m.file == "kernels/moe/routing.py"]
    some = [m for m in every if m.function == "route_kernel" and m.rule == "operator"][:3]
    given = [(m, list(command.probes_of(m, "cpu").values())) for m in some]
    tried = list(trial.run(given, jobs=1, seconds=lambda _: 200.0))
    assert len(some) == 3 and {r.mutant.key for r in tried} == {m.key for m in some}
    assert [r.mutant.key for r in tried if r.status == "survived"] == []


_WITHOUT_MUTANTS = {
    "kernels/instruction_probe.py": "it measures the GPU, and `doctor` compares what it measures",
    "kernels/moe/hopper/gluon.py": "it has other names of Triton's functions, and no number",
}


def test_what_triton_compiles_is_changed():
    mark = re.compile(
        r"^@(triton|gluon)\.(jit|constexpr_function)|^\w.* = \(?(tl|gl)\.constexpr\(", re.M
    )
    compiled = {
        path.relative_to(KERNELS.parent).as_posix()
        for path in KERNELS.rglob("*.py")
        if mark.search(path.read_text("utf-8"))
    }
    assert compiled == kernel_probes.OF_FILE.keys() | _WITHOUT_MUTANTS.keys()
    assert not kernel_probes.OF_FILE.keys() & _WITHOUT_MUTANTS.keys()


def _mutant(of_reference, name):
    return next(m for m in of_reference if m.function == name)


def test_what_changes_nothing_survives_and_a_loop_without_an_end_times_out(of_reference):
    made = _mutant(of_reference, "pack")
    nothing = replace(
        made, build=lambda: "def pack(code):\n    return code[..., 0::2] | code[..., 1::2] << 4"
    )
    endless = replace(made, build=lambda: "def pack(code):\n    while True:\n        pass")
    dies = replace(made, build=lambda: "def pack(code):\n    import os\n    os._exit(3)")
    probe = reference_probes.probe("e2m1")
    tried = trial.run(
        [(m, [probe]) for m in (nothing, endless, dies)], jobs=3, seconds=lambda _: 5.0
    )
    found = {r.mutant.source: (r.status, r.by) for r in tried}
    assert found[nothing.source] == ("survived", "")
    assert found[endless.source][0] == "timed out"
    assert found[dies.source] == ("killed", "the process ended")


def test_those_behind_a_child_that_ends_are_tried_by_another(of_reference):
    made = [m for m in of_reference if m.function == "pack"]
    dies = replace(made[0], build=lambda: "def pack(code):\n    import os\n    os._exit(3)")
    probe = reference_probes.probe("e2m1")
    some = [(m, [probe]) for m in (*made[:2], dies, *made[2:])]
    found = list(trial.run(some, jobs=1, seconds=lambda _: 60.0, at_once=len(some)))
    assert [r.mutant for r in found] == [m for m, _ in some]
    assert {r.status for r in found} == {"killed"}
    assert [r.by for r in found].count("the process ended") == 1


def test_a_mutant_is_taken_out_again(of_reference):
    probe = reference_probes.probe("e2m1")
    for mutant in (_mutant(of_reference, "pack"), _mutant(of_reference, "VALUES")):
        with applied(mutant):
            assert list(probe())
        assert not list(probe())


@pytest.mark.compile
@pytest.mark.parametrize("name", ["NONE", "to_bf16"])
def test_kernels_that_use_a_mutant_are_compiled_anew_and_no_others(name, monkeypatch):
    uses, other = grouped_gemm.expert_gemm_kernel, permute.permute_kernel
    other.device_caches[0] = compiled = object()
    key = uses.cache_key
    kept = {id(uses): object(), id(other): object()}
    monkeypatch.setattr(launcher, "_LAUNCHES", launches := dict(kept))
    with applied(next(m for m in command.every("kernels") if m.function == name)):
        assert uses.cache_key != key
        assert other.device_caches.pop(0) is compiled
        assert launches == {id(other): kept[id(other)]}  # what the launcher has compiled
        launches[id(uses)] = object()  # of the mutant
    assert uses.cache_key == key
    assert launches == {id(other): kept[id(other)]}


@pytest.mark.compile
def test_a_kernel_that_uses_a_mutant_through_a_constant_function_is_compiled_anew():
    """WARPS is a constant of `sums_layout`, which `ring_sums` calls."""
    key = grouped.ring_sums.cache_key, grouped._next.cache_key
    with applied(next(m for m in command.every("kernels") if m.function == "WARPS")):
        assert grouped.ring_sums.cache_key != key[0]
        assert grouped._next.cache_key == key[1]
    assert (grouped.ring_sums.cache_key, grouped._next.cache_key) == key


@pytest.mark.interpreter
@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("value, written", "value, row[:, :, None] >= 0"),  # a store without its mask
        ("padded + block)", "padded + block + 1)"),  # a store that is a block late
        ("written", "written"),  # the kernel as it is
    ],
)
def test_an_address_of_no_tensor_is_an_error(old, new):
    text = inspect.getsource(decode_kernel.fn)
    text = text[text.index("def ") :]
    assert old in text
    decode = next(m for m in command.every("kernels") if m.function == "decode_kernel")
    probe = kernel_probes.probe("decode", "cpu")
    with applied(replace(decode, build=lambda: text.replace(old, new))):
        if old == new:
            assert not list(probe())
            return
        with pytest.raises(InterpreterError, match="OutOfBoundsError"):
            list(probe())


def test_the_module_of_every_mutant_has_what_it_changes(of_reference):
    for mutant in (*of_reference, *command.every("kernels")):
        module, names = module_of(mutant.file), mutant.function.strip("()").split(", ")
        assert all(hasattr(module, name.split(".")[0]) for name in names), mutant.shown


def test_a_constant_is_exchanged_where_it_was_imported(of_reference):
    block = next(m for m in of_reference if m.source == "BLOCK_SIZE = 17")
    values = next(m for m in of_reference if "VALUES = " in m.source)
    tried = trial.run(
        [(block, [reference_probes.probe("dense")]), (values, [reference_probes.probe("e2m1")])],
        jobs=1,
        seconds=lambda _: 60.0,
    )
    assert [r.status for r in tried] == ["killed", "killed"]


def of_pack(results: Path) -> list[str]:
    """The command line that tries the mutants of `e2m1.pack`."""
    given = ["--generated", "reference", "--results", str(results)]
    return [*given, "--only", "e2m1.py pack"]


def _letters(results: Path) -> str:
    """Return the letters of the one function that a file has."""
    (line,) = (line for line in results.read_text().splitlines() if not line.startswith("#"))
    return line.partition("cpu=")[2]


def test_the_command_goes_on_where_it_ended(tmp_path, capsys):
    results = tmp_path / "build" / "results.txt"
    ask = of_pack(results)
    assert main([*ask, "--shard", "1/2"]) == 0
    half = _letters(results)
    assert set(half) == {"k", "."}
    assert main(ask) == 0
    assert set(_letters(results)) == {"k"}
    capsys.readouterr()
    assert main(ask) == 0
    assert capsys.readouterr().out.startswith("0 tried")


def test_two_files_of_results_are_merged(tmp_path, capsys):
    one, other = tmp_path / "one.txt", tmp_path / "other.txt"
    for path, shard in ((one, "1/2"), (other, "2/2")):
        assert main([*of_pack(path), "--shard", shard]) == 0
    capsys.readouterr()
    assert main([*of_pack(one), "--merge", str(other)]) == 0
    assert capsys.readouterr().out.startswith("0 tried")
    assert set(_letters(one)) == {"k"}


def _made(*sources: str) -> list[Generated]:
    return [m for i, text in enumerate(sources) for m in generate(f"reference/{i}.py", text)]


_FIRST, _SECOND = "def f(x):\n    return x + 1\n", "def g(x):\n    return x * 2\n"


def _tried(path: Path) -> list[Generated]:
    """The mutants of two functions, of which a file says that all are killed."""
    made = _made(_FIRST, _SECOND)
    results = Results(path, made)
    for mutant in made:
        results.add(mutant, "cpu", "killed")
    results.write()
    return made


def test_what_is_known_of_a_function_that_has_changed_is_dropped(tmp_path):
    path = tmp_path / "results.txt"
    _tried(path)
    now = _made(_FIRST, _SECOND.replace("x * 2", "x * 3"))
    results = Results(path, now)
    assert {(m.function, results.status(m)) for m in now} == {("f", "killed"), ("g", "not tried")}
    results.write()
    assert path.read_text().count("cpu=") == 1


def test_what_is_known_of_a_function_outlives_another_file_and_docstring(tmp_path):
    path = tmp_path / "results.txt"
    _tried(path)
    said = _SECOND.replace("\n", '\n    """Say what it does."""\n', 1)
    now = _made("", said, _FIRST)
    results = Results(path, now)
    assert {(m.file, results.status(m)) for m in now} == {
        ("reference/1.py", "killed"),
        ("reference/2.py", "killed"),
    }


def test_what_another_process_wrote_meanwhile_is_kept(tmp_path):
    path, made = tmp_path / "results.txt", _made(_FIRST, _SECOND)
    one, other = Results(path, made), Results(path, made)
    one.add(made[0], "cpu", "survived")
    one.add(made[1], "cpu", "timed out")
    one.write()
    other.add(made[0], "cuda", "killed")
    other.add(made[2], "cpu", "survived")
    other.write()
    found = Results(path, made)
    assert found.of(made[0]) == {"cpu": "survived", "cuda": "killed"}
    assert [found.status(m) for m in made[:3]] == ["killed", "timed out", "open"]


def test_the_results_of_the_repository_are_of_mutants_that_are_made(of_reference):
    known = Results(KEPT, [*of_reference, *command.every("kernels")])
    assert len(known.path.read_bytes()) < 100_000
    tried = Counter(known.status(m) for m in of_reference)
    assert tried["killed"] > len(of_reference) / 2


def test_one_that_nobody_sees_fails_the_command(tmp_path, capsys, monkeypatch):
    probes = {"accepts": lambda: iter(())}
    monkeypatch.setattr(command, "probes_of", lambda mutant, device: probes)
    results = tmp_path / "results.txt"
    ask = of_pack(results)
    assert main(ask) == 1
    assert "SURVIVED reference/numerics/e2m1.py pack: " in capsys.readouterr().out


def test_one_without_a_probe_on_the_device_is_not_tried(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(command, "probes_of", lambda mutant, device: {})
    assert main(of_pack(tmp_path / "results.txt")) == 0
    said = capsys.readouterr().out
    assert said.startswith("0 tried") and "SURVIVED" not in said


def test_a_probe_that_finds_fault_with_unchanged_code_fails_the_command(
    tmp_path, capsys, monkeypatch
):
    good = reference_probes.probe("e2m1")
    probes = {"good": good, "wrong": lambda: iter(["a fault"])}
    monkeypatch.setattr(command, "probes_of", lambda mutant, device: probes)
    assert main(of_pack(tmp_path / "results.txt")) == 1
    said = capsys.readouterr().out
    assert "WRONG PROBE wrong, on unchanged code: killed a fault" in said
    assert "SURVIVED" not in said and set(_letters(tmp_path / "results.txt")) == {"k"}


def test_the_probe_that_saw_the_last_mutant_of_a_function_comes_first(monkeypatch):
    made = _made(_FIRST)
    probes = {name: lambda: iter(()) for name in ("slow", "quick", "sees")}
    monkeypatch.setattr(command, "probes_of", lambda mutant, device: probes)
    order = command.Order({"slow": 3.0, "quick": 1.0, "sees": 2.0})
    named = [probes[n] for n in ("quick", "sees", "slow")]
    assert order.probes(made[0], "cpu") == named
    order.learn(trial.Result(made[0], "killed", "something", (1.0,)))
    named = [probes[n] for n in ("sees", "quick", "slow")]
    assert order.probes(made[1], "cpu") == named


def test_the_order_of_a_run_that_may_end_early(tmp_path, monkeypatch):
    """Open before harmless; there what the device has not tried, and what has fewer probes."""
    made = _made("def f(x):\n    return x + 1 - 2 * 3 // 4\n")
    names = ["new", "open", "harmless, tried", "harmless, many probes", "harmless, few probes"]
    of = dict(zip(made, names, strict=False))
    assert len(of) == len(names)
    results = Results(tmp_path / "results.txt", made)
    for mutant, name in of.items():
        if name != "new":
            results.add(mutant, "cuda" if "tried" in name else "cpu", "survived")
    monkeypatch.setattr(harmless, "reason", lambda key: "harmless" in of[by_key[key]] or None)
    by_key = {m.key: m for m in made}
    probes = {"harmless, many probes": {"a": None, "b": None}}
    monkeypatch.setattr(command, "probes_of", lambda m, device: probes.get(of[m], {"a": None}))
    found = sorted(of, key=lambda m: command._place(m, results, "cuda"))
    assert [of[m] for m in found] == ["open", "new", *reversed(names[2:])]


@pytest.fixture
def checked(monkeypatch) -> list[list[str]]:
    """Return the names of probes that are checked, each time; one mutant of `pack` is harmless."""
    names: list[list[str]] = []
    right = trial.check

    def check(probes, **options):
        probes = dict(probes)
        names.append(list(probes))
        return right(probes.items(), **options)

    good = reference_probes.probe("e2m1")
    keys = [m.key for m in command.every("reference") if m.function == "pack"]
    monkeypatch.setattr(trial, "check", check)
    monkeypatch.setattr(harmless, "reason", lambda key: "said" if key == keys[0] else None)
    monkeypatch.setattr(
        command,
        "probes_of",
        lambda m, device: {"good": good} | ({"more": good} if m.key == keys[0] else {}),
    )
    return names


def test_probes_of_harmless_mutants_alone_are_checked_last(tmp_path, checked):
    main(of_pack(tmp_path / "results.txt"))
    assert checked == [["good"], ["more"]]


def test_no_probe_is_checked_once_the_time_is_over(tmp_path, checked, capsys):
    main([*of_pack(tmp_path / "results.txt"), "--seconds", "1e-9"])
    assert checked == []
    assert capsys.readouterr().out.startswith("0 tried in 0 s, ")


def test_trials_end_at_their_time(of_reference):
    made = [m for m in of_reference if m.function == "pack"]
    slow = [lambda: time.sleep(60) or iter(())]
    start = time.monotonic()
    given = [(m, slow) for m in made]
    assert not list(trial.run(given, jobs=2, seconds=lambda _: 90.0, at_once=2, end=start + 0.5))
    assert time.monotonic() - start < 20
    with pytest.raises(ChildProcessError):  # none is left
        os.waitpid(-1, os.WNOHANG)


@pytest.mark.interpreter
def test_a_probe_is_not_shown_what_it_does_not_execute(tmp_path):
    path = tmp_path / "lines"
    assert not list(executed.recording(kernel_probes.probe("decode", "cpu"), path)())
    lines = executed.read(path)
    made = [m for m in command.every("kernels") if m.function == "decode_fourth"]
    shown = {m.change for m in made if executed.executes(lines, m)}
    assert "w & 7 -> w | 7" in shown and "ARCH == 0 -> ARCH != 0" in shown
    assert "WHICH == 1 -> WHICH != 1" in {m.change for m in made} - shown  # a branch of a GPU


def test_a_child_does_not_wait_for_threads_of_its_parent(of_reference):
    def many() -> Iterator[str]:
        torch.ones(2**22, dtype=torch.float32, device="cpu").exp()
        return iter(())

    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        many()
        nothing = replace(_mutant(of_reference, "pack"), file="")
        (found,) = trial.run([(nothing, [many])], jobs=1, seconds=lambda _: 20.0)
    finally:
        torch.set_num_threads(before)
    assert found.status == "survived"


def test_a_mutant_has_its_time_for_each_probe(of_reference):
    made = _mutant(of_reference, "pack")
    slow = [lambda: time.sleep(0.4) or iter(())] * 4
    (found,) = trial.run([(made, slow)], jobs=1, seconds=lambda _: 1.0)
    assert (found.status, len(found.passed)) == ("survived", 4)


def test_answers_are_compared_to_the_bit_but_for_the_bits_of_nan():
    x = torch.tensor([0.0, torch.nan])
    current = [x]
    kept = answers.Kept(lambda: iter([("x", current[0])]))
    current[0] = torch.tensor([0.0, -torch.nan])
    assert list(kept()) == []
    current[0] = torch.tensor([-0.0, torch.nan])
    assert list(kept()) == ["x"]
