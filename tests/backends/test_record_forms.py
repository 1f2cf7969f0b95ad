"""The form of a call: the key that defines it, and the guard that tests it in less time."""

# SPDX-License-Identifier: Apache-2.0
import contextlib
import itertools
from dataclasses import dataclass
from typing import Any

import pretend_gpu
import pytest
import torch
from record_cases import layer, recorders_of
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._python_dispatch import TorchDispatchMode

from nvfp4_moe import RoutingMethodType
from nvfp4_moe.kernels import launcher
from nvfp4_moe.kernels.quantize.call import UNSET
from nvfp4_moe.kernels.records import form, recorder, repeats

pytestmark = [
    pytest.mark.compile,
    pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning"),
]


@pytest.fixture
def launches(monkeypatch):
    with torch.no_grad():
        yield pretend_gpu.present(monkeypatch)


@dataclass(frozen=True)
class Layer:
    weight: torch.Tensor
    size: int = 300
    bias: torch.Tensor | None = None


@dataclass(frozen=True)
class OtherLayer(Layer):
    pass


def run(*args: Any, **kwargs: Any) -> None:
    """Stand for a function of which calls are kept."""


def guard_of(args: tuple[Any, ...], kwargs: dict[str, Any]):
    """Return the guard of a call, as a function that returns True for one that passes."""
    body = recorder.Body(0, (), ["return True"], {})
    return body.guarded(form.Guard(args, kwargs))


def tensor(*shape: int, start: int = 0, dtype: torch.dtype = torch.uint8) -> torch.Tensor:
    """Return a tensor that begins `start` elements after a multiple of 64 bytes."""
    size = torch.Size(shape).numel()
    return torch.zeros(size + start, dtype=dtype)[start:].view(shape)


X, Y = tensor(4, 6), tensor(4, 6)
NAN = float("nan")
VALUES: dict[str, Any] = {
    "none": None, "unset": UNSET, "true": True, "false": False,
    "one": 1, "zero": 0, "large": 10**6, "0.0": 0.0, "-0.0": -0.0, "1.0": 1.0, "nan": NAN,
    "text": "triton", "no text": "", "dtype": torch.uint8, "other dtype": torch.int8,
    "enum": RoutingMethodType.Renormalize, "number of the enum": int(RoutingMethodType.Renormalize),
    "tuple": (), "list": [], "pair": (1, None), "longer": (1, None, None), "list of two": [1, None],
    "tensor": X, "another": tensor(4, 6), "signed": tensor(4, 6, dtype=torch.int8),
    "transposed": tensor(6, 4).T, "shape": tensor(6, 4), "flat": tensor(24),
    "start": tensor(4, 6, start=16), "start of no element": tensor(4, 6, start=1),
    "strides": tensor(4, 12)[:, :6], "meta": torch.empty(4, 6, dtype=torch.uint8, device="meta"),
    "parameter": torch.nn.Parameter(tensor(4, 6), requires_grad=False),
    "float": tensor(4, 6, dtype=torch.float32),
    "with a gradient": tensor(4, 6, dtype=torch.float32).requires_grad_(),
    "layer": Layer(X), "layer with a bias": Layer(X, bias=tensor(4)), "size": Layer(X, 301),
    "the same size": Layer(tensor(4, 6), int("300")), "other class": OtherLayer(X),
    "weight twice": Layer(X, bias=X), "two weights": Layer(tensor(4, 6), bias=tensor(4, 6)),
}  # fmt: skip
AMONG_OTHERS = {
    "first": lambda value: ((value, Y), {}),
    "beside a layer": lambda value: ((Y, Layer(Y)), {"given": value, "last": Y}),
    "in a tuple": lambda value: ((Y, (Layer(Y), value)), {"name": "triton"}),
}
"""By name, a function that returns the arguments of a call with a value in some place."""


@pytest.mark.parametrize("call", AMONG_OTHERS.values(), ids=AMONG_OTHERS)
def test_a_guard_lets_calls_of_its_key_alone_pass(launches, call):
    """For every two values: no call of another key passes. The same call does, and an equal one."""
    keys = {name: form.key_of(run, *call(value))[0] for name, value in VALUES.items()}
    same = []
    for name, known in VALUES.items():
        guard = guard_of(*call(known))
        assert guard(*call(known)) is True, name
        for other, value in VALUES.items():
            if guard(*call(value)) is not form.missed:
                assert keys[name] == keys[other], (name, other)
                same.append((name, other))
    assert ("tensor", "another") in same and ("layer", "the same size") in same


def test_a_guard_tests_the_names_of_arguments(launches):
    guard = guard_of((X,), {"a": 1, "b": None})
    assert guard((X,), {"b": None, "a": 1}) is True
    for args, kwargs in (
        ((X,), {"a": 1}), ((X,), {"a": 1, "c": None}), ((X,), {"a": 1, "b": None, "c": None}),
        ((X, 1, None), {}), ((), {"x": X, "a": 1, "b": None}), ((), {"a": 1, "b": None}),
    ):  # fmt: skip
        assert guard(args, kwargs) is form.missed


class Seeing(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return func(*args, **(kwargs or {}))


@contextlib.contextmanager
def device_one():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pretend_gpu, "current_device", 1)
        yield


@contextlib.contextmanager
def deterministic():
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


@contextlib.contextmanager
def variable(name: str = "NVFP4_MOE_CHECK_VALUES"):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(name, "1")
        yield


AROUND = {
    "a dispatch mode": Seeing,
    "fake tensors": lambda: FakeTensorMode(allow_non_fake_inputs=True),
    "a recording": lambda: recorder.Recorder([]),
    "inference": torch.inference_mode,
    "another GPU": device_one,
    "deterministic algorithms": deterministic,
    "a variable": variable,
}


@pytest.mark.parametrize("around", AROUND.values(), ids=AROUND)
def test_what_is_around_a_call_is_tested(launches, around):
    """`repeats.serve` or the key tests each of these, so a guard must."""
    guard = guard_of((X,), {})
    with around():
        assert guard((X,), {}) is form.missed
    assert guard((X,), {}) is True


def test_proxies_are_tested(launches):
    guard, passed = guard_of((X,), {}), []

    def body(y):
        passed.append(guard((X,), {}))
        return y + 1

    for mode in ("real", "fake", "symbolic"):
        make_fx(body, tracing_mode=mode)(torch.zeros(3))
    assert passed == [form.missed] * 3


def test_transforms_and_traces_are_tested(launches):
    guard, passed = guard_of((X,), {}), []

    def body(y):
        passed.append(guard((X,), {}))
        return y + 1

    x = torch.zeros(3)
    torch.func.vmap(body)(x)
    torch.func.grad(lambda y: body(y).sum())(x)
    torch.func.jvp(body, (x,), (x,))
    torch.func.functionalize(body)(x)
    torch.jit.trace(body, x, check_trace=False)
    assert passed == [form.missed] * 5
    assert guard((X,), {}) is True


def test_a_gradient_is_tested(launches):
    """Its key has nothing of a gradient: such a call has none."""
    weight = torch.nn.Parameter(torch.zeros(3))
    guard = guard_of((weight,), {})
    assert guard((torch.nn.Parameter(torch.zeros(3)),), {}) is True
    with torch.enable_grad():
        assert guard((weight,), {}) is form.missed
        with pytest.raises(form.NotKeptError):
            form.key_of(run, (weight,), {})


def test_a_call_is_repeated_without_a_guard(launches, monkeypatch):
    """So it is where torch has no comparison of tensors, or a record has enough guards."""
    monkeypatch.setattr(form.Guard, "possible", False)
    recorders, call = recorders_of(monkeypatch), layer()
    for _ in range(4):
        call()
    before = len(launches)
    call()
    (made,) = recorders
    assert len(launches) - before == len(made.launches) > 0
    assert not repeats._known.guarded


def test_guards_are_few(launches, monkeypatch):
    """A record whose guards let no call pass is not compiled again and again."""
    call, made = layer(), []
    for _ in range(2):
        call()
    compiled = recorder.Body.guarded

    def guarded(self, guard):
        made.append(guard)
        compiled(self, guard)
        return lambda args, kwargs: form.missed

    monkeypatch.setattr(recorder.Body, "guarded", guarded)
    for _ in range(10):
        call()
    assert len(made) == repeats._MOST_GUARDS


def test_forms_of_one_size_are_all_served(launches, monkeypatch):
    """They are more than the guards that are tried: the others are found by their keys."""
    recorders = recorders_of(monkeypatch)
    modes = itertools.product(("per-token", "bf16"), (False, True), (None, True, False))
    calls = [
        layer(activation=activation, batch_invariant=invariant, fast_math=fast)
        for activation, invariant, fast in modes
    ]
    for _ in range(4):
        for call in calls:
            call()
    assert len(calls) == 12 > repeats._MOST_TRIED
    (tried,) = repeats._known.guarded.values()
    assert len(tried) == repeats._MOST_TRIED
    made = len(recorders)
    del launches[:]
    for call in calls:
        call()
    assert len(recorders) == made
    assert len(launches) == sum(len(r.launches) for r in recorders if r.refusal is None)


def test_memory_is_filled_where_torch_fills_it(launches, monkeypatch):
    """The record of a call under deterministic algorithms allocates by `torch.empty`, which fills."""
    call = layer()
    with deterministic():
        results = [call() for _ in range(5)]
        assert repeats._known.guarded
    assert all(bool(r.isnan().all()) for r in results)


def test_the_constant_part_of_a_descriptor(launches, monkeypatch):
    """The constant part of a descriptor depends on the address by its first argument alone."""
    entry = launcher._entry

    def expanding(found):
        call, before, _ = entry(found)
        return call, before, itertools.repeat(lambda given: (given.base.data_ptr(), 11, 22))

    monkeypatch.setattr(launcher, "_entry", expanding)
    call = layer()
    for _ in range(5):
        call()
    repeated = [args for args in launches if 11 in args and 22 in args][-2:]
    whole = [args for args in launches if any(hasattr(a, "base") for a in args)][-2:]
    for launched, wanted in zip(repeated, whole, strict=True):
        expected = []
        for value in wanted:
            expected += (value.base.data_ptr(), 11, 22) if hasattr(value, "base") else (value,)
        assert len(launched) == len(expected)
        assert [type(value) for value in launched] == [type(value) for value in expected]
        given = [i for i, value in enumerate(launched[1:]) if value == 22]
        assert len(given) == 3 and all(launched[i] == 11 for i in given)


def test_the_addresses_of_a_descriptor_are_bounded(monkeypatch):
    monkeypatch.setattr(launcher, "_MOST_ADDRESSES", 3)
    made = []
    firsts = launcher._Firsts(lambda address: made.append(address) or -address)
    assert [firsts[address] for address in (1, 2, 3, 1, 4, 4)] == [-1, -2, -3, -1, -4, -4]
    assert made == [1, 2, 3, 4] and len(firsts) == 1
