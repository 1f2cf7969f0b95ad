"""Mutants on a GPU are tried in forked processes, so the process that forks leaves CUDA alone."""

# SPDX-License-Identifier: Apache-2.0
import ctypes
import functools
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import triton
from mutants.__main__ import main
from mutants.generated import (
    command,
    cuda_state,
    gradients,
    kernel_probes,
    reference_probes,
    trial,
)
from mutants.generated.results import KEPT
from mutants.generated.rules import Generated
from triton.runtime import driver

from nvfp4_moe.reference.numerics import functions


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """The right answers are of small tensors, on which the threads of a busy machine wait."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def initialized(monkeypatch) -> list[str]:
    """Pretend a GPU that is not initialized; the names of the calls that initialize it are listed."""
    found: list[str] = []

    def noted(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            found.append(name)
            return function(*args, **kwargs)

        return call

    for name, result in (
        ("is_available", True),  # it counts GPUs, unless PYTORCH_NVML_BASED_CUDA_CHECK is 1
        ("device_count", 1),
        ("get_device_capability", (9, 0)),
        ("get_device_name", "a pretended GPU"),
        ("get_device_properties", SimpleNamespace(multi_processor_count=132)),
        ("_lazy_init", None),
    ):
        monkeypatch.setattr(torch.cuda, name, noted(name, lambda *_, result=result: result))
    engine = torch.autograd.graph._engine_run_backward
    for module in (torch.autograd, torch.autograd.graph):
        monkeypatch.setattr(module, "_engine_run_backward", noted("autograd", engine))
    monkeypatch.setattr(driver, "_active", None)
    default = property(noted("Triton's driver", lambda _: SimpleNamespace()))
    monkeypatch.setattr(type(driver), "default", default)
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: bool(found))
    monkeypatch.setattr(cuda_state, "_driver_is_initialized", lambda: False)  # by other tests
    for cached in (kernel_probes.probe, command._named_probes):
        cached.cache_clear()
    return found


def _with_autograd() -> None:
    x = torch.ones(2, dtype=torch.float32, device="cpu", requires_grad=True)
    x.square().sum().backward()


@pytest.mark.parametrize(
    "call", [lambda: torch.cuda.is_available(), _with_autograd, lambda: driver.active]
)
def test_a_call_that_initializes_the_pretended_gpu_is_seen(initialized, call):
    cuda_state.check("before")
    call()
    assert len(initialized) == 1
    with pytest.raises(cuda_state.InitializedError, match="since then"):
        cuda_state.check("since then")


def test_the_right_answers_of_every_probe_leave_cuda_alone(initialized):
    """The process that forks computes them."""
    names = {n for file in kernel_probes.OF_FILE for n in kernel_probes.asked(file, "cuda")}
    assert len(names) > 300
    by = {}
    for name in sorted(names):
        kernel_probes.probe(name, "cuda")
        if initialized:
            by[name] = initialized.copy()
            initialized.clear()
    assert not by
    list(reference_probes.ASKED["functions"]())  # it has derivatives
    assert not initialized


def test_a_gradient_is_that_of_autograds_engine():
    x = torch.linspace(-3, 3, 12, dtype=torch.float64, device="cpu").view(3, 4).requires_grad_()
    a, b = x.chunk(2, -1)
    inner = functions.Hopper().exp(a.float()).double()
    y = torch.where(b > 0, inner * b, a.clamp(max=1)) * torch.sigmoid(a) + b.T.reshape(3, 2)
    grad = torch.arange(6, dtype=torch.float64, device="cpu").view(3, 2) - 2.5
    (want,) = torch.autograd.grad(y, x, grad, retain_graph=True)
    got = gradients.gradient(y, grad)
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)
    assert want.any(0).all() and not got.requires_grad
    other = torch.ones(3, 2, dtype=torch.float64, device="cpu", requires_grad=True)
    with pytest.raises(ValueError, match="more than one leaf"):
        gradients.gradient(y.detach() * other + b, grad)


def _try_masked_rows(results, *more: str) -> int:
    """Try, on the pretended GPU, the mutants of a kernel whose probes are quick to make."""
    given = ["--generated", "kernels", "--device", "cuda", "--again", "--results", str(results)]
    return main([*given, "--only", "masked/rows.py masked_rows_kernel", *more])


def test_a_probe_that_initializes_cuda_is_named_and_nothing_is_forked(
    initialized, monkeypatch, tmp_path, capsys
):
    class Differentiates:
        def judge(self) -> None:
            _with_autograd()

    monkeypatch.setitem(kernel_probes._MORE, "masked rows, one expert", Differentiates)
    monkeypatch.setattr(os, "fork", lambda: pytest.fail("a process was forked"))
    assert _try_masked_rows(tmp_path / "results.txt") == 1
    said = capsys.readouterr()
    assert (
        "CUDA is initialized in this process" in said.err
        and "'masked rows, one expert'" in said.err
    )
    assert len(said.err.splitlines()) == 1 and not said.out


def test_a_command_in_a_process_that_uses_a_gpu_ends_at_once(initialized, tmp_path, capsys):
    torch.cuda.is_available()
    assert _try_masked_rows(tmp_path / "results.txt") == 1
    assert "before its first probe" in capsys.readouterr().err


def test_the_shards_of_a_run_on_a_gpu_fork_with_cuda_uninitialized(
    initialized, monkeypatch, tmp_path, capsys
):
    """`make mutants-gpu`, as far as it goes without a GPU: kernels of the probes do not run."""
    whole = kernel_probes.probe

    @functools.cache
    def probe(name: str, device: str) -> trial.Probe:
        whole(name, device)
        return lambda: iter(initialized)  # in the child

    monkeypatch.setattr(kernel_probes, "probe", probe)
    results, open_ones = tmp_path / "results.txt", 0
    for shard in ("1/2", "2/2"):
        options = ("--shard", shard, "--jobs", "2", "--seconds", "60", "--merge", str(KEPT))
        assert _try_masked_rows(results, *options) == 0  # what is open is harmless
        said = capsys.readouterr()
        assert "WRONG PROBE" not in said.out and not said.err
        open_ones += int(said.out.split(" tried in ")[0])
    assert not initialized
    (line,) = (s for s in results.read_text("utf-8").splitlines() if " masked_rows_kernel " in s)
    assert open_ones == line.partition(" cuda=")[2].count("s") > 0


def test_the_time_of_a_probe_is_that_of_a_run_that_compiles(
    initialized, monkeypatch, tmp_path, capsys
):
    """Triton's cache of earlier runs is not read, though it may have all kernels of unchanged code."""
    before = triton.knobs.cache.dir

    @functools.cache
    def probe(name: str, device: str) -> trial.Probe:
        return lambda: iter([name] * (triton.knobs.cache.dir == before))

    monkeypatch.setattr(kernel_probes, "probe", probe)
    assert _try_masked_rows(tmp_path / "results.txt", "--merge", str(KEPT)) == 0
    assert "WRONG PROBE" not in capsys.readouterr().out
    assert triton.knobs.cache.dir == before


def _waiting() -> Iterator[str]:
    time.sleep(60)
    yield "it was not ended"


def test_a_fork_after_cuda_is_initialized_is_refused_and_the_children_end(initialized):
    def given() -> Iterator[trial.Given]:
        yield Generated("", "", "", "one", 1, lambda: ""), [_waiting]
        torch.cuda.is_available()
        yield Generated("", "", "", "other", 1, lambda: ""), [_waiting]

    start = time.monotonic()
    trials = trial.run(given(), jobs=2, seconds=lambda _: 100.0, on_gpu=True)
    with pytest.raises(cuda_state.InitializedError, match="before it forks"):
        list(trials)
    with pytest.raises(ChildProcessError):  # none is left
        os.waitpid(-1, os.WNOHANG)
    assert time.monotonic() - start < 30


@pytest.mark.parametrize(("code", "is_initialized"), [(3, False), (0, True)])
def test_the_driver_says_what_torch_does_not_know(monkeypatch, code, is_initialized):
    """As after a backward pass on the CPU, of which `torch.cuda.is_initialized()` says nothing."""
    loaded = SimpleNamespace(cuDeviceGetCount=lambda count: code)
    monkeypatch.setattr(ctypes, "CDLL", lambda name, mode: loaded)
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: False)
    assert cuda_state.is_initialized() == is_initialized


def test_a_driver_that_nothing_has_loaded_is_not_loaded(monkeypatch):
    """The C library's own threads of old, which every system has and nothing loads."""
    name = "libanl.so.1"
    assert name not in Path("/proc/self/maps").read_text("utf-8")
    monkeypatch.setattr(cuda_state, "_DRIVER", name)
    assert not cuda_state._driver_is_initialized()
    assert name not in Path("/proc/self/maps").read_text("utf-8")
