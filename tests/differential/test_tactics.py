"""The tuner of FlashInfer is asked as it asks itself, and a tactic that is forced runs."""

# SPDX-License-Identifier: Apache-2.0
import contextlib
from dataclasses import replace

import moe_cases
import pytest
import torch
from moe_cases import Shape

from nvfp4_moe.differential import flashinfer_tactics
from nvfp4_moe.kernels import triton_target
from nvfp4_moe.kernels.moe import launch, tile_table
from nvfp4_moe.kernels.moe.autotune import cache
from nvfp4_moe.kernels.moe.backends import FUSED_MOE
from nvfp4_moe.kernels.moe.call import make_moe_call
from nvfp4_moe.kernels.moe.hopper.config import CONFIGS
from nvfp4_moe.kernels.tiles import GemmConfig
from nvfp4_moe.reference.moe.routing import Routing, RoutingMethodType

SHAPE = Shape(5, 128, 64, 4, 2)


def request_of(shape=SHAPE, **changes):
    case = moe_cases.make(shape)
    given = {
        "num_experts": shape.experts,
        "topk": (case.ids, case.weights),
        "routing": Routing(RoutingMethodType.Renormalize, shape.top_k),
        "nvfp4_4over6": None,
    }
    return make_moe_call(case.activations, case.experts, **given | changes)


@pytest.fixture
def ask(flashinfer):
    """Makes a function that asks FlashInfer's own tuner, as its layers do."""
    from flashinfer import autotuner
    from flashinfer.fused_moe.utils import get_hybrid_num_tokens_buckets, map_to_hybrid_bucket

    class Runner(autotuner.TunableRunner):
        def __init__(self, values):
            self.values = values
            self.seen = []

        def __hash__(self):
            return id(self)

        def get_valid_tactics(self, inputs, profile):
            self.seen.append((inputs[0].shape, profile.get_opt_shapes(), inputs[1]))
            return self.values(inputs[0].shape[0])

        def forward(self, inputs, tactic=-1, do_preparation=False, **kwargs):
            return self, tactic

    config = autotuner.TuningConfig(
        dynamic_tensor_specs=(
            autotuner.DynamicTensorSpec(
                (0,),
                (0,),
                get_hybrid_num_tokens_buckets(8192),
                lambda tokens: map_to_hybrid_bucket(tokens, 8192),
            ),
        ),
        inputs_pre_hook=lambda tensors: [tensors[0] + 1, "hooked"],
    )

    def ask(op, *every, tokens=24):
        runners = [Runner(values) for values in every]
        inputs = [torch.zeros(tokens, 8), torch.ones(3)]

        def call():
            return autotuner.AutoTuner.get().choose_one(op, runners, config, inputs, word="passed")

        call.runners = runners
        return call

    return ask


def array(*numbers):
    """Neither a list nor a tuple, as what crosses from C++."""
    return torch.tensor(numbers)


def names(found):
    return [t.name for t in found]


def test_the_default_then_every_tactic_of_the_bucket(ask):
    call = ask("x::layer", lambda tokens: [[8, tokens], [16, tokens], (tokens, ((1, 2), False))])
    found = flashinfer_tactics.advertised(call)
    assert names(found) == ["default", "[8, 32]", "[16, 32]", "[32, [[1, 2], false]]"]
    (seen,) = call.runners[0].seen
    assert seen == ((32, 8), ((32, 8), (3,)), "hooked")
    for tactic in found:
        with flashinfer_tactics.forced(tactic):
            assert call() == (call.runners[0], tactic.value)
    assert found[0].value == -1 and found[3].value == (32, ((1, 2), False))


def test_arrays_of_cpp_become_lists(ask):
    (_, found) = flashinfer_tactics.advertised(ask("x::layer", lambda _: [map(int, array(8, 3))]))
    assert found.name == "[8, 3]" and found.value == [8, 3]


def test_two_questions(ask):
    first, second = ask("a::b::gemm1", lambda _: [0, 1]), ask("a::b::gemm2", lambda _: [2, -1])
    found = flashinfer_tactics.advertised(lambda: (first(), second()))
    assert names(found) == ["default", "gemm1 0", "gemm1 1", "gemm2 2"]
    chosen = []
    for tactic in found:
        with flashinfer_tactics.forced(tactic):
            chosen.append((first()[1], second()[1]))
    assert chosen == [(-1, -1), (0, -1), (1, -1), (-1, 2)]


def test_several_runners(ask):
    call = ask("x::layer", lambda _: [-1, 5], lambda _: [-1, 5])
    found = flashinfer_tactics.advertised(call)
    assert names(found) == ["default", "runner 0 5", "runner 1 -1", "runner 1 5"]
    chosen = []
    for tactic in found:
        with flashinfer_tactics.forced(tactic):
            chosen.append(call())
    one, other = call.runners
    assert chosen == [(one, -1), (one, 5), (other, -1), (other, 5)]


def test_blocked_tactics_are_not_advertised(ask, monkeypatch):
    from flashinfer.autotuner import AutoTuner

    blocked = {"x::layer::Runner": {(8, 3)}}
    monkeypatch.setattr(AutoTuner.get()._blocklist, "_invalid", blocked)
    assert names(flashinfer_tactics.advertised(ask("x::layer", lambda _: [[8, 3], [8, 4]]))) == [
        "default",
        "[8, 4]",
    ]


def test_a_tactic_that_did_not_run_is_an_error(ask):
    (_, tactic) = flashinfer_tactics.advertised(ask("x::layer", lambda _: [7]))
    said = pytest.raises(RuntimeError, match="tactic 7 did not run: x::layer never asked")
    with said, flashinfer_tactics.forced(tactic):
        ask("another::layer", lambda _: [7])()
    with (
        pytest.raises(KeyError),
        flashinfer_tactics.forced(tactic),
    ):  # its own error is what is seen
        raise KeyError


def test_the_tuner_is_itself_again_afterwards(ask):
    from flashinfer.autotuner import AutoTuner

    before = AutoTuner.choose_one
    call = ask("x::layer", lambda _: [7])
    with contextlib.suppress(ZeroDivisionError):
        flashinfer_tactics.advertised(lambda: (call(), 1 / 0))
    assert AutoTuner.choose_one is before and call() == (call.runners[0], -1)


@pytest.mark.parametrize("tokens", [1, 24, 32, 300, 9000])
def test_what_its_own_tuning_measures_for_these_inputs(ask, monkeypatch, tokens):
    """Tuned by FlashInfer itself, with a clock, a call finds one of what is advertised here."""
    from flashinfer.autotuner import AutoTuner, autotune

    call = ask(f"measured::layer of {tokens}", lambda n: [[8, n], [16, n]], tokens=tokens)
    want = [t.value for t in flashinfer_tactics.advertised(call)[1:]]
    measured = []

    def clock(tuner, runner, inputs, tactic, *_, **__):
        measured.append(tactic)
        return 1.0 / len(measured)  # the last is the fastest

    monkeypatch.setattr(AutoTuner, "_profile_single_kernel", clock)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    with autotune(True):
        call()
    assert call() == (call.runners[0], want[-1])
    assert [t for t in measured if t in want] == want


def test_one_way_to_be_the_reference():
    assert names(flashinfer_tactics.configurations("reference", request_of())) == ["default"]
    with flashinfer_tactics.configurations("reference", request_of())[0].forced():
        pass


@pytest.fixture
def an_h100(monkeypatch, tmp_path):
    """For look-ups alone: nothing can be launched."""
    monkeypatch.setattr(triton_target, "capability", lambda device: (9, 0))
    monkeypatch.setattr(triton_target, "gpu_name", lambda device: "a GPU")
    monkeypatch.setattr(cache, "gpu_name", lambda device: "a GPU")
    monkeypatch.setattr(cache, "_known", {})
    monkeypatch.setenv("NVFP4_MOE_CACHE", str(tmp_path))


@pytest.fixture
def without_gluon(an_h100, monkeypatch):
    """As on an H100 whose Triton does not compile the GEMM for sm_90."""
    monkeypatch.setattr(tile_table, "ring_serves", lambda experts: False)


def test_tiles_of_the_gemm_for_sm_90(an_h100, monkeypatch):
    monkeypatch.setattr(tile_table, "ring_serves", lambda experts: True)
    request = request_of()
    found = flashinfer_tactics.configurations("triton", request)
    slots = tile_table.local_slots(10, request.experts, 4)
    table = launch._configs(request.experts, slots, 2, "per-token", False)
    assert found[0].name == "default" and table[0] == table[1]
    widths = set()
    for c in found[1:]:
        with c.forced():
            first, second = launch._configs(request.experts, slots, 2, "per-token", False)
        assert first == second != table[0] and c.name == f"tiles of {first.bn} tokens"
        widths.add(first.bn)
    assert widths | {table[0].bn} == {config.bn for config in CONFIGS}


def test_tiles_of_triton(without_gluon):
    request = request_of()
    found = flashinfer_tactics.configurations("triton", request)
    assert found[0].name == "default" and len({c.name for c in found}) == len(found) >= 6
    assert any("gemm1 256x128x64" in c.name and "decoded" in c.name for c in found)
    slots = tile_table.local_slots(10, request.experts, 4)
    table = launch._configs(request.experts, slots, 2, "per-token", False)
    assert table == tile_table.table_configs(request.experts, slots)
    for c in found[1:]:
        with c.forced():
            pair = launch._configs(request.experts, slots, 2, "per-token", False)
        which = int(c.name[4]) - 1
        assert pair != table and pair[0].bn == pair[1].bn
        assert c.name == f"gemm{which + 1} {flashinfer_tactics._words(pair[which])}"
        assert pair[1 - which] == replace(table[1 - which], bn=pair[which].bn)
        for config, (_, columns) in zip(pair, ((0, 128), (0, 64)), strict=True):
            assert cache.refusal(config, columns, native=False) is None
    assert launch._configs(request.experts, slots, 2, "per-token", False) == table


def test_tiles_that_the_kernel_refuses_are_left_out(without_gluon, monkeypatch):
    monkeypatch.setattr(cache, "refusal", lambda c, columns, native: c.decoded or None)
    found = flashinfer_tactics.configurations("triton", request_of())
    assert len(found) >= 4 and not any("decoded" in c.name for c in found)


def test_tiles_that_were_not_looked_up_are_an_error(an_h100):
    request = request_of()
    c = flashinfer_tactics.configurations("triton", request)[1]
    with pytest.raises(RuntimeError, match="did not run"), c.forced():
        launch._configs(request.experts, 4000, 2, "per-token", False)


def test_nothing_is_forced_where_bits_may_not_depend_on_it(an_h100):
    request = replace(request_of(), batch_invariant=True)
    assert names(flashinfer_tactics.configurations("triton", request)) == ["default"]


@pytest.mark.interpreter
@pytest.mark.parametrize("mode", ["per-token", "static", "bf16", "shares"])
def test_forced_tiles_are_launched(monkeypatch, tmp_path, mode):
    monkeypatch.setenv("NVFP4_MOE_CACHE", str(tmp_path))
    monkeypatch.setattr(cache, "_known", {})
    launched, launch_gemm = [], launch._launch_gemm

    def spy(*args, **options):
        launched.extend(a for a in args if isinstance(a, GemmConfig))
        launch_gemm(*args, **options)

    monkeypatch.setattr(launch, "_launch_gemm", spy)
    shape = replace(SHAPE, offset=1, local=2) if mode == "shares" else SHAPE
    case = moe_cases.make(shape, mode="per-token" if mode == "shares" else mode)
    request = make_moe_call(
        case.activations,
        case.experts,
        num_experts=4,
        topk=(case.ids, case.weights),
        routing=Routing(RoutingMethodType.Renormalize, 2),
        nvfp4_4over6=None,
        local_expert_offset=shape.offset,
    )
    every = flashinfer_tactics.configurations("triton", request)
    for c in (every[1], every[-1]):
        launched.clear()
        with c.forced():
            FUSED_MOE.serve(request, "triton")
        assert len(launched) == 2
        assert flashinfer_tactics._words(launched[int(c.name[4]) - 1]) == c.name[6:]
