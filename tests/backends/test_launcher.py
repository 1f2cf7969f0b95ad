"""Kernels are launched directly from the second time on, and found by all that Triton looks at."""

# SPDX-License-Identifier: Apache-2.0
from types import SimpleNamespace

import pytest
import torch
import triton
import triton.language as tl

from nvfp4_moe.kernels import launcher

pytestmark = pytest.mark.compile


@triton.jit(do_not_specialize=["rows"])
def kernel(x_ptr, bias_ptr, rows, columns, scale, SIZE: tl.constexpr, KIND: tl.constexpr):
    pass


class Compiled:
    """A compiled kernel of Triton that notes its launches."""

    function, packed_metadata = 7, (4, 1, 0)

    def __init__(self):
        self.launches = []

    def run(self, *args):
        self.launches.append(args)


@pytest.fixture
def compiled(monkeypatch) -> list[Compiled]:
    """Every kernel that Triton was asked for, as on the GPU of number 3."""
    found = []

    def run(*args, grid, warmup, **constants):
        found.append(Compiled())
        return found[-1]

    monkeypatch.setattr(launcher, "_DIRECT", True)
    monkeypatch.setattr(launcher, "_LAUNCHES", {})
    monkeypatch.setattr(kernel, "run", run)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 3)
    monkeypatch.setattr(torch._C, "_cuda_getCurrentRawStream", lambda device: 11, raising=False)
    return found


X = torch.zeros(64)
DEFAULT = {"x": X, "bias": None, "rows": 5, "columns": 32, "scale": 0.5, "SIZE": 8, "KIND": (1, 2)}


def run(grid=(6,), **changed) -> None:
    x, bias, rows, columns, scale, *constants = (DEFAULT | changed).values()
    names = dict(zip(("SIZE", "KIND"), constants, strict=True))
    launcher.launch(kernel, grid, x, bias, rows, columns, scale, **names, num_warps=4)


def test_the_second_launch_is_direct(compiled):
    run()
    other = torch.zeros(128)
    run((6, 2), x=other, rows=7, columns=48, scale=2.0)
    (found,) = compiled
    start = (6, 2, 1, 11, 7, (4, 1, 0), None, None, None)
    assert found.launches == [(*start, other.data_ptr(), None, 7, 48, 2.0, None, None)]


@pytest.mark.parametrize(
    "changed",
    [
        {"x": X[1:]}, {"x": X.int()}, {"bias": X}, {"columns": 1}, {"columns": 33},
        {"rows": 2**31}, {"columns": 2**31}, {"SIZE": 16}, {"KIND": (1, 3)},
    ],
    ids=str,
)  # fmt: skip
def test_what_triton_specializes_by_is_compiled_anew(compiled, changed):
    run()
    run(**changed)
    assert len(compiled) == 2
    run(**changed)
    assert [len(c.launches) for c in compiled] == [0, 1]


def test_what_it_does_not_specialize_by_is_not(compiled):
    run()
    run(rows=1)
    run(rows=16)
    assert len(compiled) == 1


def test_another_gpu_has_a_kernel_of_its_own(compiled, monkeypatch):
    run()
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 4)
    run()
    assert len(compiled) == 2


def test_a_profiler_hears_of_every_launch(compiled, monkeypatch):
    hooks = SimpleNamespace(calls=[print])
    run()
    monkeypatch.setattr(triton.knobs.runtime, "launch_enter_hook", hooks)
    run()
    assert len(compiled) == 2


def test_sizes():
    assert [launcher.cdiv(n, 4) for n in (0, 1, 4, 5)] == [0, 1, 1, 2]
    assert [launcher.next_power_of_2(n) for n in (1, 2, 3, 4, 5, 1024)] == [1, 2, 4, 4, 8, 1024]
