"""A call that repeats is launched from its record: the same launches, for the tensors that are given."""

# SPDX-License-Identifier: Apache-2.0
import ctypes
import gc
import itertools
import math
import os
import sys
import warnings
import weakref
from typing import NamedTuple

import pretend_gpu
import pytest
import torch
import triton
from record_cases import CALLS, ROUTING, E, H, I, experts, inputs, layer, recorders_of
from torch.utils._python_dispatch import TorchDispatchMode

import nvfp4_moe
from nvfp4_moe import Routing, RoutingMethodType
from nvfp4_moe.kernels import backends, launcher, triton_target
from nvfp4_moe.kernels.moe.autotune import cache
from nvfp4_moe.kernels.moe.tile_table import table_configs
from nvfp4_moe.kernels.records import recorder, repeats
from nvfp4_moe.reference import checks

pytestmark = pytest.mark.compile


@pytest.fixture
def launches(monkeypatch):
    with torch.no_grad():
        yield pretend_gpu.present(monkeypatch)


@pytest.fixture
def recorders(monkeypatch):
    """Every recorder that has made a record, or could not."""
    return recorders_of(monkeypatch)


def test_the_pretended_gpu_ends_with_the_test():
    """Also where the test changes once more what pretending has changed."""
    owners = {checks: "reads_values", triton_target: "capability", repeats: "enabled"}
    before = [getattr(owner, name) for owner, name in owners.items()]
    patch = pytest.MonkeyPatch()
    pretend_gpu.present(patch)
    for owner, name in owners.items():
        patch.setattr(owner, name, None)
    patch.undo()
    assert [getattr(owner, name) for owner, name in owners.items()] == before


@pytest.mark.parametrize("make", CALLS.values(), ids=CALLS)
def test_a_record_has_the_launches_of_the_whole_call(launches, recorders, make):
    """Two calls of a form, of different tensors, write one record, and it launches for a third one."""
    calls = [make("cpu") for _ in range(3)]
    calls[0]()  # compiles
    counts = []
    for call in calls:
        before = len(launches)
        repeats.forget()
        call()
        call()
        counts.append(len(launches) - before)
    first, second, third = recorders
    assert first.refusal is None
    assert first.launches == second.launches == third.launches != []
    assert counts == [2 * len(third.launches)] * 3
    for _ in range(2):
        del launches[:]
        result = calls[2]()
        assert len(recorders) == 3, "another record"
        assert_launched(third, launches, result)


def assert_launched(recorder, launches, result):
    """The launches have the addresses of the given tensors, and the results' and no other's."""
    results = [result] if isinstance(result, torch.Tensor) else result
    written = {t.data_ptr() for t in results}
    seen = set()
    assert len(launches) == len(recorder.launches)
    for arguments, (_, *texts) in zip(launches, recorder.launches, strict=True):
        for value, text in zip(arguments, texts, strict=True):
            if text.startswith("g"):
                name, _, offset = text.partition(" + ")
                assert value == recorder.tensors[int(name[1:])].data_ptr() + int(offset or 0)
            elif text.startswith("a"):
                seen.add(value)
            elif "[" in text:
                assert hasattr(value, "base")
    given = {t.data_ptr() for t in recorder.tensors}
    assert written <= seen | given and not seen & given


def test_a_repeated_call_runs_little_python(launches):
    """It enters 16 functions in Python, 8 of them the pretended GPU's; without a record about 700."""
    call = layer()

    def entered() -> list[str]:
        names = []
        sys.setprofile(
            lambda frame, event, _: names.append(frame.f_code.co_name) if event == "call" else None
        )
        try:
            call()
        finally:
            sys.setprofile(None)
        return names

    counts = [len(entered()) for _ in range(9)]
    assert counts[0] > 400
    assert min(counts) <= 16, entered()


class Toy:
    """A GPU that runs one kernel, on bytes: step 0 adds 1, step 1 doubles."""

    def __init__(self):
        self.launched = 0

    def kernel(self, *args):
        self.launched += 1
        source, target, count, step = args[9:13]
        for i in range(count):
            value = ctypes.c_uint8.from_address(source + i)
            ctypes.c_uint8.from_address(target + i).value = (
                value.value + 1 if step == 0 else value.value * 2
            )


@triton.jit(do_not_specialize=["step"])
def toy_kernel(x_ptr, out_ptr, count, step, SIZE: triton.language.constexpr):
    pass


@pytest.fixture
def toy(launches, monkeypatch):
    made = Toy()
    compiled = pretend_gpu.Compiled(launches)
    compiled.run = made.kernel

    def first(*args, grid, warmup, **options):
        made.kernel(*[0] * 9, *(a.data_ptr() if hasattr(a, "data_ptr") else a for a in args))
        return compiled

    monkeypatch.setattr(toy_kernel, "run", first)
    return made


def test_a_record_computes(toy):
    def run(x):
        between, out = x.new_empty(x.shape), x.new_empty(x.shape)
        for source, target, step in ((x, between, 0), (between, out, 1)):
            launcher.launch(toy_kernel, (1,), source, target, x.numel(), step, SIZE=1)
        return out

    results = []
    for i in range(5):
        x = torch.full((7,), i, dtype=torch.uint8)
        results.append(repeats.repeat(run, (x,), {}))
    assert [r.tolist() for r in results] == [[(i + 1) * 2] * 7 for i in range(5)]
    assert toy.launched == 10


def test_a_record_copies(toy, recorders):
    """A copy of a given tensor, made between launches that write it, and a result in a given tensor."""

    def add_one(source, target):
        launcher.launch(toy_kernel, (1,), source, target, source.numel(), 0, SIZE=1)

    def run(x, out):
        add_one(x, x)
        copy, last = x.clone(), x.new_empty(x.shape)
        add_one(x, x)
        add_one(copy, last)
        return out.copy_(last)

    for i in range(5):
        x, out = (torch.full((7,), value, dtype=torch.uint8) for value in (i, 99))
        assert repeats.repeat(run, (x, out), {}) is out
        assert (x.tolist(), out.tolist()) == ([i + 2] * 7, [i + 2] * 7)
    assert [r.refusal for r in recorders] == [None]


def test_tensors_that_shared_memory_are_told_apart(toy):
    """A record of f(x, x) does not serve f(x, y): its launches may have read either."""

    def run(x, y):
        out = x.new_empty(x.shape)
        launcher.launch(toy_kernel, (1,), y, out, x.numel(), 0, SIZE=1)
        return out

    same, other = torch.zeros(4, dtype=torch.uint8), torch.full((4,), 9, dtype=torch.uint8)
    for _ in range(3):
        assert repeats.repeat(run, (same, same), {}).tolist() == [1] * 4
    assert repeats.repeat(run, (same, other), {}).tolist() == [10] * 4


def test_a_call_of_other_operations_is_not_recorded(launches, recorders):
    def run(x):
        return x + 1

    for i in range(4):
        assert repeats.repeat(run, (torch.full((2,), i),), {}).tolist() == [i + 1] * 2
    (recorder,) = recorders
    assert "aten.add" in recorder.refusal


def test_memory_that_was_written_by_torch_is_not_recorded(launches, recorders):
    def run(x):
        out = x.new_empty(x.shape)
        launcher.launch(toy_kernel, (1,), x, out, x.numel(), 0, SIZE=1)
        return out.zero_()

    for _ in range(3):
        repeats.repeat(run, (torch.zeros(2),), {})
    assert "zero_" in recorders[-1].refusal


def test_no_tensor_is_kept(launches):
    call = layer()
    for _ in range(4):
        call()
    x = inputs()[0]
    e, logits = experts(), torch.randn(1, E)
    for _ in range(4):
        nvfp4_moe.fused_moe(x, e, (logits, ROUTING), backend="triton")
    weak = [weakref.ref(t) for t in (x, logits, e.gemm1_weights)]
    del x, e, logits
    gc.collect()
    assert [w() for w in weak] == [None] * 3


def is_whole(call) -> bool:
    """Return True if a call goes its whole way, where it would be repeated before a change."""
    ran = []
    serve = backends.Operation.serve

    def spy(self, *args):
        ran.append(self.name)
        return serve(self, *args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(backends.Operation, "serve", spy)
        call()
    return bool(ran)


class Seeing(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return func(*args, **(kwargs or {}))


def test_what_a_call_depends_on_is_asked_each_time(launches, monkeypatch):
    x, logits = inputs(2)
    e = experts()

    def call(x=x, logits=logits, e=e, routing=ROUTING, **options):
        options = {"backend": "triton"} | options
        return nvfp4_moe.fused_moe(x, e, (logits, routing), **options)

    def whole(**options) -> bool:
        return is_whole(lambda: call(**options))

    for _ in range(3):
        call()
    assert not whole()
    assert not whole(x=x.clone()) and not whole(e=experts()), "other tensors of the form"
    wide = torch.zeros(2, 2 * H, dtype=torch.bfloat16)
    assert whole(x=inputs(3)[0], logits=inputs(3)[1])
    for changed in (
        {"routing": Routing(RoutingMethodType.Renormalize, 1)},
        {"logits": logits.bfloat16()},
        {"e": experts(biased=True)},
        {"fast_math": True},
        {"backend": "auto"},
        {"x": torch.zeros(2 * H + 8, dtype=torch.bfloat16)[8:].view(2, H)},
        {"num_experts": E},
    ):
        assert whole(**changed), changed
    with pytest.raises(ValueError, match="strides"):
        call(x=wide[:, :H])
    e.gemm1_weights.set_(torch.zeros(E, 2 * I, H // 2 + 64, dtype=torch.uint8)[:, :, : H // 2])
    with pytest.raises(ValueError, match="gemm1_weights has strides"):
        call()
    e.gemm1_weights.set_(experts().gemm1_weights)
    assert not whole()

    with Seeing():
        assert whole()
    monkeypatch.setenv("FLASHINFER_DISABLE_FP4_QUANT_FAST_MATH", "1")
    assert whole()
    monkeypatch.delenv("FLASHINFER_DISABLE_FP4_QUANT_FAST_MATH")
    monkeypatch.setenv("NVFP4_MOE_CHECK_VALUES", "1")
    assert whole()
    monkeypatch.delenv("NVFP4_MOE_CHECK_VALUES")
    assert not whole()
    monkeypatch.setenv("FLASHINFER_NVFP4_4OVER6", "1")
    for mode in ("MAE", "MSE"):
        monkeypatch.setenv("FLASHINFER_NVFP4_4OVER6_ERR_MODE", mode)
        assert whole(nvfp4_4over6=None), mode
    monkeypatch.delenv("FLASHINFER_NVFP4_4OVER6")
    assert not whole()
    needs = logits.clone().requires_grad_()
    with torch.enable_grad():
        assert all(whole(logits=needs) for _ in range(4))
    with monkeypatch.context() as patch:
        patch.setattr(pretend_gpu, "current_device", 1)
        assert whole()
    with monkeypatch.context() as patch:
        hooks = type("Hooks", (), {"calls": [print]})
        patch.setattr(triton.knobs.runtime, "launch_enter_hook", hooks)
        assert whole()
    assert not whole()


@pytest.mark.parametrize("change", ["backend", "tiles", "tiles for a while"])
def test_a_change_of_choices_drops_the_records(launches, monkeypatch, tmp_path, change):
    monkeypatch.setenv("NVFP4_MOE_CACHE", str(tmp_path))
    call = layer()
    for _ in range(3):
        call()
    assert not is_whole(call)
    if change == "backend":
        handle = nvfp4_moe.register_backend("fused_moe", "own", lambda call: None)
        assert is_whole(call)
        for _ in range(2):
            call()
        handle.remove()
    else:
        monkeypatch.setattr(cache, "_known", {})
        e = experts()
        tiles = cache.key_of(e, 2, 2, "per-token"), table_configs(e, 2)
        if change == "tiles":
            cache.store(*tiles)
        else:
            with cache.using(*tiles):
                assert is_whole(call)
                for _ in range(2):
                    call()
                assert not is_whole(call)
    assert is_whole(call)


def test_a_change_while_a_call_is_recorded(toy):
    """The call may have made its choices before the change: its record is dropped, too."""
    changes = [False, True]

    def run(x):
        out = x.new_empty(x.shape)
        launcher.launch(toy_kernel, (1,), x, out, x.numel(), 0, SIZE=1)
        if changes and changes.pop(0):
            repeats.forget()
        return out

    for _ in range(2):
        repeats.repeat(run, (torch.zeros(2, dtype=torch.uint8),), {})
    assert not changes and not repeats._known.records


def test_a_fork_has_no_records(launches, monkeypatch):
    """A child of a process that used the GPU cannot use it, and CUDA must not be asked there."""
    call = layer()
    for _ in range(4):
        call()
    assert repeats._known.records and repeats._known.guarded
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of a fork beside threads
        child = os.fork()
    if child == 0:  # nothing that could return to pytest
        os._exit(bool(repeats._known.records or repeats._known.guarded))
    assert os.waitpid(child, 0)[1] == 0
    repeats.forget()
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: False)
    assert all(is_whole(call) for _ in range(4))


def test_a_capture_records_nothing(launches, recorders, monkeypatch):
    """Values are not checked in a capture, so its record would skip the check ever after."""
    capturing = False
    monkeypatch.setenv("NVFP4_MOE_CHECK_VALUES", "1")
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: capturing)
    monkeypatch.setattr(checks, "reads_values", lambda *tensors, waits=False: not capturing)
    x, e, weights = inputs(1)[0], experts(), torch.rand(1, 2)
    ids = torch.zeros(1, 2, dtype=torch.int32)

    def call():
        return nvfp4_moe.fused_moe(x, e, (ids, weights), backend="triton")

    call()
    capturing = True
    for _ in range(3):
        call()
    capturing = False
    ids.fill_(E)
    for _ in range(3):
        with pytest.raises(ValueError, match="routing"):
            call()
    assert not recorders


@pytest.mark.parametrize("name", ["rmsnorm", "dense, out", "output"])
def test_a_write_into_a_given_tensor_is_counted(launches, recorders, name):
    """By its version: autograd then refuses to use a tensor that it saved before the write."""
    call, versions = CALLS[name]("cpu"), []
    for _ in range(6):
        result = call()
        written = result if isinstance(result, torch.Tensor) else result[-1]
        versions.append(written._version)
    assert [r.refusal for r in recorders] == [None]
    (step,) = {after - before for before, after in itertools.pairwise(versions)}
    assert step > 0


class Pair(NamedTuple):
    first: torch.Tensor
    second: torch.Tensor


RESULTS = {
    "a copy in another form": lambda x, out: x.clone().view(torch.int8),
    "memory in two forms": lambda x, out: (out, out.view(2, 2)),
    "a tuple with names": lambda x, out: Pair(out, x.clone()),
    "a copy and a list": lambda x, out: (x.clone(), [out]),
}


@pytest.mark.parametrize("result", RESULTS.values(), ids=RESULTS)
def test_a_result_has_the_form_of_the_whole_call(toy, result):
    def run(x):
        out = x.new_empty(x.shape)
        launcher.launch(toy_kernel, (1,), x, out, x.numel(), 0, SIZE=1)
        return result(x, out)

    def form(value):
        if isinstance(value, torch.Tensor):
            return value.dtype, value.shape, value.tolist()
        return type(value), [form(part) for part in value]

    x = torch.zeros(4, dtype=torch.uint8)
    first, *others = (form(repeats.repeat(run, (x,), {})) for _ in range(4))
    assert others == [first] * 3


@pytest.mark.parametrize("hook, direct", [(None, True), (lambda *args: None, False)])
def test_a_hook_that_is_no_chain(launches, monkeypatch, hook, direct):
    """Triton takes None and a function in the place of its chain of hooks."""
    monkeypatch.setattr(triton.knobs.runtime, "launch_exit_hook", hook)
    assert launcher.directly() == direct


def test_a_negative_zero_is_no_zero(toy):
    def run(x, number):
        out = x.new_empty(x.shape)
        step = int(math.copysign(1, number) < 0)
        launcher.launch(toy_kernel, (1,), x, out, x.numel(), step, SIZE=1)
        return out

    x = torch.full((2,), 5, dtype=torch.uint8)
    for _ in range(3):
        assert repeats.repeat(run, (x, 0.0), {}).tolist() == [6, 6]
    for _ in range(3):
        assert repeats.repeat(run, (x, -0.0), {}).tolist() == [10, 10]


def test_a_call_that_raises_leaves_no_key(launches):
    """Or else many bad calls, as with a NaN, which no key equals, would drop every record."""

    def run(x, number):
        raise ValueError("number is nan")

    for _ in range(3):
        with pytest.raises(ValueError, match="number"):
            repeats.repeat(run, (torch.zeros(1), float("nan")), {})
    assert not repeats._known.records


WRONG = {
    "a bool for a number": {"num_experts": True},
    "a float for a number": {"local_expert_offset": 0.0},
    "a number for a flag": {"batch_invariant": 0},
    "no name": {"finalize_order": "none"},
    "a list": {"build": ["cuda"]},
    "no backend": {"backend": "nobody"},
}


@pytest.mark.parametrize("wrong", WRONG.values(), ids=WRONG)
def test_bad_input_is_still_refused(launches, wrong):
    """Also what Python calls equal to the argument of a record: True and 1, 0.0 and 0."""
    x, logits = inputs()
    e = experts()
    good = {"num_experts": E, "local_expert_offset": 0, "batch_invariant": False}
    good |= {"finalize_order": "flashinfer", "build": "cuda", "backend": "triton"}
    for _ in range(4):
        nvfp4_moe.fused_moe(x, e, (logits, ROUTING), **good)
    for _ in range(4):
        with pytest.raises((TypeError, ValueError), match=f"{next(iter(wrong))} is "):
            nvfp4_moe.fused_moe(x, e, (logits, ROUTING), **good | wrong)


def test_a_large_call_gives_memory_back_between_its_steps(launches, recorders, monkeypatch):
    monkeypatch.setattr(recorder, "MOST_BYTES", 1000)
    call = layer()
    for _ in range(3):
        call()
    assert is_whole(call)
    assert len(recorders) == 1, "tried again"


def test_the_number_of_records_is_bounded(launches, monkeypatch):
    monkeypatch.setattr(repeats, "_MOST_KEPT", 3)
    for i in range(10):
        repeats.repeat(lambda x, i: x, (torch.zeros(1), i), {})
    assert len(repeats._known.records) <= 3
