"""An op of ours is called without torch's dispatcher only where that would do nothing else."""

# SPDX-License-Identifier: Apache-2.0
import warnings
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from nvfp4_moe.kernels.dispatch import Direct
from nvfp4_moe.kernels.op_schema import OPS, Flat, register


@dataclass(frozen=True)
class Call:
    x: torch.Tensor
    size: int = 2
    scale: float = 1.5
    bias: torch.Tensor | None = None
    flag: bool = True
    dtype: torch.dtype = torch.float32
    number: float | None = None


ran: list[dict[str, Any]] = []


def run(call: Call, y: torch.Tensor) -> torch.Tensor:
    ran.append(vars(call))
    return call.x * call.scale + y


FUNCTION = register(
    "dispatched", Flat(Call), run, lambda call, y: torch.empty_like(call.x), "Tensor",
    tensors="Tensor y",
)  # fmt: skip
X, Y = torch.arange(3.0), torch.ones(3)


@pytest.fixture
def dispatched(monkeypatch):
    """Every call of the op that the dispatcher got."""
    calls = []
    op = type(OPS["dispatched"])
    through = op.__call__

    def spy(self, *args, **kwargs):
        calls.append(args)
        return through(self, *args, **kwargs)

    monkeypatch.setattr(op, "__call__", spy)
    return calls


def test_a_plain_call_needs_no_dispatcher(dispatched):
    for x in (X, torch.nn.Parameter(X, requires_grad=False)):
        assert FUNCTION(Call(x, bias=Y), Y).tolist() == [1.0, 2.5, 4.0]
    with torch.no_grad():
        assert FUNCTION(Call(X.clone().requires_grad_()), Y).tolist() == [1.0, 2.5, 4.0]
    assert not dispatched


class Modes(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return func(*args, **(kwargs or {}))


class Functions(TorchFunctionMode):
    def __torch_function__(self, func, types, args=(), kwargs=None):
        return func(*args, **(kwargs or {}))


class Own(torch.Tensor):
    pass


OTHERS = {
    "a gradient": lambda: FUNCTION(Call(X.clone().requires_grad_()), Y),
    "a gradient of a later tensor": lambda: FUNCTION(Call(X), Y.clone().requires_grad_()),
    "a gradient of an optional tensor": lambda: FUNCTION(
        Call(X, bias=Y.clone().requires_grad_()), Y
    ),
    "meta": lambda: FUNCTION(Call(X.to("meta")), Y.to("meta")),
    "a subclass": lambda: FUNCTION(Call(X.as_subclass(Own)), Y),
    "a negative view": lambda: FUNCTION(Call(torch._neg_view(X)), Y),
    "a number of numpy": lambda: FUNCTION(Call(X, size=np.int64(2)), Y),
    "an integer for a float": lambda: FUNCTION(Call(X, scale=2), Y),
    "an integer for an optional float": lambda: FUNCTION(Call(X, number=2), Y),
    "a keyword": lambda: FUNCTION(Call(X), y=Y),
}
"""By name, calls that need the dispatcher for their arguments."""


@pytest.mark.parametrize("call", OTHERS.values(), ids=OTHERS)
def test_other_arguments_go_to_the_dispatcher(dispatched, call):
    call()
    assert len(dispatched) == 1


def test_the_dispatcher_converts_numbers():
    """The op's function never sees another type than its schema's."""
    del ran[:]
    FUNCTION(Call(X, size=np.int64(2), scale=2, number=3), Y)
    assert [type(ran[-1][name]) for name in ("size", "scale", "number")] == [int, float, float]


def test_a_gradient_through_an_op_is_an_error():
    result = FUNCTION(Call(X.clone().requires_grad_()), Y)
    with pytest.raises(RuntimeError, match="no autograd formula"):
        result.sum().backward()


AROUND = {
    "a dispatch mode": Modes,
    "fake tensors": lambda: FakeTensorMode(allow_non_fake_inputs=True),
    "a function mode": Functions,
    "a device for factories": lambda: torch.device("cpu"),
    "a profile": torch.profiler.profile,
}


@pytest.mark.parametrize("around", AROUND.values(), ids=AROUND)
def test_whoever_watches_is_told(dispatched, around):
    with around():
        FUNCTION(Call(X), Y)
    assert len(dispatched) == 1


def test_a_profile_names_the_op():
    with torch.profiler.profile() as profile:
        FUNCTION(Call(X), Y)
    assert "nvfp4_moe::dispatched" in {event.key for event in profile.key_averages()}


TRACES = {
    "make_fx": lambda f: make_fx(f)(X),
    "export": lambda f: torch.export.export(_module(f), (X,), strict=False),
    "functionalize": lambda f: torch.func.functionalize(f)(X),
    "jit": lambda f: torch.jit.trace(f, X, check_trace=False),
}


def _module(function):
    class Module(torch.nn.Module):
        def forward(self, x):
            return function(x)

    return Module()


@pytest.mark.parametrize("trace", TRACES.values(), ids=TRACES)
def test_traces_and_transforms_see_the_op(dispatched, trace):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        trace(lambda x: FUNCTION(Call(x), Y))
    assert dispatched


@pytest.mark.compile
def test_a_compiled_function_has_the_op():
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph.code)
        return graph.forward

    function = torch.compile(lambda x: FUNCTION(Call(x), Y), fullgraph=True, backend=backend)
    assert function(X).tolist() == [1.0, 2.5, 4.0]
    assert "nvfp4_moe.dispatched" in graphs[0]


def test_an_op_that_writes_goes_to_the_dispatcher():
    """The dispatcher counts the write in the version of the tensor."""
    writing = register(
        "writing", Flat(Call), lambda call, out: None, lambda call, out: None, "()",
        tensors="Tensor(a!) out", mutates=("out",),
    )  # fmt: skip
    with pytest.raises(AssertionError):
        Direct(OPS["writing"])
    out = torch.zeros(3)
    before = out._version
    writing(Call(X), out)
    assert out._version > before
