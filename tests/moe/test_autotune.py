"""Autotuning: what is measured, dropped, chosen, kept and used.

In the interpreter the test owns the clock; on a GPU the clock is the GPU's own.
"""

# SPDX-License-Identifier: Apache-2.0
import itertools
from dataclasses import replace

import pytest
import torch
import triton
from assertions import assert_bitwise
from moe_cases import Case, Shape, make
from moe_triton_cases import to
from triton.runtime.errors import OutOfResources

import nvfp4_moe
from nvfp4_moe import UnsupportedError
from nvfp4_moe.kernels.moe import launch
from nvfp4_moe.kernels.moe.autotune import cache, search
from nvfp4_moe.kernels.moe.autotune.search import Measured, autotune, candidates, difference
from nvfp4_moe.kernels.moe.call import KernelCall
from nvfp4_moe.kernels.moe.hopper.config import CONFIGS
from nvfp4_moe.kernels.moe.tile_table import Config, gemm_config, local_slots, ring_serves
from nvfp4_moe.kernels.tiles import GemmConfig
from nvfp4_moe.reference.activation import ActivationType
from nvfp4_moe.reference.moe.hidden_states import Activations

TABLE = GemmConfig(64, 16, 128, 4, 4)  # of both GEMMs, for few tokens
WIDE = GemmConfig(128, 32, 128, 3, 4)
TALL = GemmConfig(128, 16, 64, 3, 4)


@pytest.fixture(autouse=True)
def folder(monkeypatch, tmp_path):
    monkeypatch.setenv("NVFP4_MOE_CACHE", str(tmp_path))
    monkeypatch.setattr(cache, "_known", {})
    return tmp_path


@pytest.fixture
def few(monkeypatch):
    """Three candidates, for the interpreter is slow."""
    monkeypatch.setattr(search, "candidates", lambda *_, **__: [TABLE, WIDE, TALL])


@pytest.fixture
def launched(monkeypatch) -> list[Config]:
    """The configuration of every GEMM that is launched."""
    found = []
    launch_gemm = launch._launch_gemm

    def spy(*args, **options):
        found.append(next(a for a in args if isinstance(a, Config)))
        launch_gemm(*args, **options)

    monkeypatch.setattr(launch, "_launch_gemm", spy)
    return found


def clock(times: dict):
    """Microseconds by configuration, or two of a whole call; 5 for others."""
    return lambda call: times.get(call.args[-1], 5.0)


def run(case: Case, **options) -> torch.Tensor:
    call = KernelCall(
        case.activations, case.experts, case.experts.num_local, finalize_order="slot", **options
    )
    return launch.fused_moe(call, case.ids, case.weights)[0]


def layer(case: Case, mode: str = "per-token", num_experts: int = 4, offset: int = 0) -> KernelCall:
    """A call of the case's layer without tokens, as `autotune_fused_moe` makes it."""
    states = torch.empty(0, case.experts.padded_hidden_size, dtype=torch.bfloat16)
    return KernelCall(
        Activations(states),
        case.experts,
        num_experts,
        local_expert_offset=offset,
        quantize=None if mode == "bf16" else mode,
    )


@pytest.mark.parametrize("native", [False, True])
def test_candidates(native):
    """The table's first, each once, every one legal, and few enough to compile."""
    for each, (rows, columns) in itertools.product(
        (1, 17, 65, 1024), ((1536, 2048), (2048, 704), (384, 7168), (128, 128))
    ):
        table = gemm_config(each, 1, columns, native=native)
        found = candidates(table, rows, columns, native=native)
        assert found[0] == table and len(set(found)) == len(found)
        assert 8 <= len(found) <= 32
        assert {c.bn for c in found} <= {16, 32, 64, 128} and len({c.bn for c in found}) >= 2
        for c in found[1:]:
            assert cache.refusal(c, columns, native=native) is None, c
            assert rows % c.bm == 0 and c.bm * c.bn <= 4096 * c.warps, c
    assert any(c.decoded for c in candidates(TABLE, 512, 512, native=native)) is False
    large = GemmConfig(128, 128, 128, 2, 4)
    assert any(c.decoded for c in candidates(large, 512, 512, native=native)) is not native


def test_difference():
    g = torch.Generator().manual_seed(1)
    want = torch.randn(5000, 256, generator=g).bfloat16()
    assert difference(want.clone(), want, True) == ""
    last = want.clone()
    last.view(torch.int16)[4999, 7] ^= 1
    assert "differs by" in difference(last, want, True)
    assert difference(last, want, False) == ""
    for wrong in (torch.nan, torch.inf, 0.0):
        got = want.clone()
        got[4321, :3] = wrong
        assert "differs by" in difference(got, want, False), wrong
    got = want.clone()
    got[4321] *= 1.01  # of all rows together, two parts in ten thousand
    assert "differs by" in difference(got, want, False)
    assert difference(want[:0], want[:0], True) == ""


def test_the_two_share_bn():
    """16 has the fastest first GEMM, 64 the fastest second; 32 the fastest two together."""
    times = {16: (1.0, 9.0), 32: (3.0, 3.0), 64: (9.0, 1.0), 128: (0.1, None)}
    measured = [
        Measured(gemm, replace(TABLE, bn=bn, bm=bm), us if us is None else us * bm / 64)
        for bn, pair in times.items()
        for gemm, us in enumerate(pair, 1)
        for bm in (128, 64, 256)
    ]
    assert search._fastest(measured) == (replace(TABLE, bn=32), replace(TABLE, bn=32))
    assert search._fastest([Measured(1, TABLE, 1.0), Measured(2, WIDE, 1.0)]) is None
    assert search._fastest([]) is None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tokens": 0}, "tokens is 0; it must be an integer of at least 1"),
        ({"tokens": [8, -1]}, "tokens is -1"),
        ({"tokens": 8.0}, "tokens is 8.0"),
        ({"tokens": True}, "tokens is True"),
        ({"top_k": 0}, "top_k is 0; it must be an integer from 1 to 4"),
        ({"top_k": 5}, "top_k is 5"),
        ({"top_k": 2.0}, "top_k is 2.0"),
        ({"num_experts": 3}, "num_experts is 3; it must be an integer of at least 4"),
        ({"local_expert_offset": 1}, "local_expert_offset is 1"),
        ({"activation": "fp8"}, "activation is 'fp8'; it must be one of per-token, static, bf16"),
        ({"activation": "static"}, "the experts must have been given input_amax"),
    ],
    ids=str,
)
def test_bad_arguments(change, message):
    experts = make(Shape(1, 128, 128, 4, 2)).experts
    with pytest.raises((TypeError, ValueError), match=message):
        nvfp4_moe.autotune_fused_moe(**{"experts": experts, "tokens": 8, "top_k": 2} | change)


def test_without_a_gpu():
    experts = make(Shape(1, 128, 128, 4, 2)).experts
    with pytest.raises(UnsupportedError, match="experts are on the cpu; only a GPU can be meas"):
        nvfp4_moe.autotune_fused_moe(experts, [1, 8], 2)


class TestInTheInterpreter:
    pytestmark = pytest.mark.interpreter

    def test_chosen_kept_and_used(self, launched, few, folder, monkeypatch):
        case = make(Shape(5, 128, 128, 4, 2))
        before = run(case)
        invariant = run(case, batch_invariant=True)
        assert launched == [TABLE] * 4
        (tuned,) = autotune(layer(case), [5], 2, clock({WIDE: 1, (WIDE, WIDE): 2}))
        assert tuned.chosen == (WIDE, WIDE) and tuned.table == (TABLE, TABLE)
        assert (tuned.table_us, tuned.chosen_us) == (5, 2)
        assert [(m.gemm, m.config, m.us, m.dropped) for m in tuned.measured] == [
            (gemm, config, us, "")
            for gemm in (1, 2)
            for config, us in ((TABLE, 5), (WIDE, 1), (TALL, 5))
        ]
        assert [tuned.file] == list(folder.rglob("*.json"))

        for _ in range(2):  # in this process, then as if in another
            for options, config in (({}, WIDE), ({"batch_invariant": True}, TABLE)):
                launched.clear()
                got = run(case, **options)
                assert launched == [config] * 2
                assert_bitwise(got, invariant if options else before, str(options))
            cache._known.clear()
        changes = (
            ("tokens", 9),
            ("hidden", 256),
            ("intermediate", 192),
            ("experts", 5),
            ("top_k", 3),
        )
        others = [make(replace(Shape(5, 128, 128, 4, 2), **{n: value})) for n, value in changes]
        others.append(make(Shape(5, 128, 128, 4, 2), ActivationType.Geglu))
        others.append(make(Shape(5, 128, 128, 4, 2), w2_bias=torch.zeros(4, 128)))
        launched.clear()
        for other in others:
            run(other)
        assert launched == [TABLE] * 2 * len(others)
        launched.clear()
        run(make(Shape(8, 128, 128, 4, 2)))  # the same bucket
        run(make(Shape(5, 128, 128, 4, 2), mode="bf16"))  # another key
        monkeypatch.setattr(triton, "__version__", "3.6.1")
        run(case)
        assert launched == [WIDE] * 2 + [TABLE] * 4

    def test_wrong_rows_are_dropped(self, few, monkeypatch, caplog):
        """One row of a thousand, one configuration, in the first GEMM alone and without a word."""
        launch_gemm = launch._launch_gemm

        def miscompiled(x, w, w_sf, bias, scale, out, p, config, *rest, **options):
            launch_gemm(x, w, w_sf, bias, scale, out, p, config, *rest, **options)
            if config == WIDE and rest[0]:
                out[2] *= 1.01

        monkeypatch.setattr(launch, "_launch_gemm", miscompiled)
        case = make(Shape(5, 128, 128, 4, 2))
        (tuned,) = autotune(layer(case), [5], 2, clock({WIDE: 1, TALL: 2, (TALL, TALL): 3}))
        assert tuned.chosen == (TALL, TALL)
        first, second = (m for m in tuned.measured if m.config == WIDE)
        assert first.us is None and "differs by" in first.dropped and second.us == 1
        assert [m for m in caplog.messages if str(WIDE) in m and "GEMM 1" in m]

    def test_wrong_on_full_tiles_alone(self, few, monkeypatch):
        """Random tokens do not fill a tile; others of the same bucket may."""
        launch_gemm = launch._launch_gemm

        def miscompiled(x, w, w_sf, bias, scale, out, p, config, *rest, **options):
            launch_gemm(x, w, w_sf, bias, scale, out, p, config, *rest, **options)
            if config == WIDE and int(p.end[1]) == 64:
                out[0] = 0

        monkeypatch.setattr(launch, "_launch_gemm", miscompiled)
        case = make(Shape(17, 128, 128, 6, 2, 1, 4))
        (tuned,) = autotune(layer(case, "per-token", 6, 1), [17], 2, clock({WIDE: 1}))
        assert [bool(m.dropped) for m in tuned.measured] == [False, True, False] * 2
        assert WIDE not in tuned.chosen

    def test_what_does_not_launch_is_dropped(self, few, monkeypatch):
        launch_gemm = launch._launch_gemm

        def refused(*args, **options):
            if WIDE in args:
                raise OutOfResources(300_000, 232_448, "shared memory")
            launch_gemm(*args, **options)

        monkeypatch.setattr(launch, "_launch_gemm", refused)
        case = make(Shape(5, 128, 128, 4, 2))
        (tuned,) = autotune(layer(case, "bf16"), [5], 2, clock({}))
        assert [m.dropped for m in tuned.measured if m.config == WIDE] == [
            str(OutOfResources(300_000, 232_448, "shared memory"))
        ] * 2
        assert tuned.chosen == tuned.table

    def test_the_whole_call_decides(self, few):
        case = make(Shape(5, 128, 128, 4, 2), mode="static")
        (tuned,) = autotune(layer(case, "static"), [5], 2, clock({WIDE: 1, (WIDE, WIDE): 5.0}))
        assert tuned.chosen == tuned.table and tuned.chosen_us == tuned.table_us == 5
        assert not [m for m in tuned.measured if m.dropped]
        cache._known.clear()
        assert cache.lookup(cache.key_of(case.experts, 10, 2, "static")) == (
            TABLE,
            TABLE,
        )

    def test_one_measurement_a_bucket(self, few):
        case = make(Shape(1, 128, 128, 4, 2))
        found = autotune(layer(case), [7, 9, 1, 5], 2, clock({}))
        assert [t.tokens for t in found] == [1, 7, 9]
        text = str(found[1])
        assert text.startswith("7 tokens: 5.0 us by the table, 5.0 us chosen\n")
        assert text.count("5.0 GemmConfig") == 6


def test_slots_held_elsewhere_do_not_count():
    """An eighth of 256 experts' slots is local: 128 tokens an expert, not 1,024."""
    case = make(Shape(1, 128, 64, 32, 1))
    assert local_slots(32768, case.experts, None) == 32768
    assert local_slots(32768, case.experts, 256) == 4096
    assert local_slots(1, case.experts, 256) == 1


@pytest.mark.gpu
@pytest.mark.parametrize("part", [0, 1])
@pytest.mark.parametrize("mode", ["per-token", "static", "bf16"])
@pytest.mark.parametrize("tokens", [3, 90, 1500])
def test_every_candidate_is_right(mode, tokens, part, folder, launched, monkeypatch):
    """All that launch have the table's rows; the choice is the fastest, on disk, and what runs.

    Every second candidate, and the others in another test: most of the time is their compilation.
    """
    monkeypatch.setattr(
        search, "candidates", lambda *a, **k: [(c := candidates(*a, **k))[0], *c[1 + part :: 2]]
    )
    shape = Shape(tokens, 1024, 512, 8, 4)
    case = make(shape, mode=mode)
    experts, x = to("cuda", case.experts), case.x.cuda()
    routing = (case.ids.cuda(), case.weights.cuda())
    options = {"activation": mode, "backend": "triton", "fast_math": True, "nvfp4_4over6": None}
    before = nvfp4_moe.fused_moe(x, experts, routing, **options)
    invariant = nvfp4_moe.fused_moe(x, experts, routing, batch_invariant=True, **options)

    (tuned,) = nvfp4_moe.autotune_fused_moe(experts, tokens, 4, activation=mode)
    print(tuned)
    assert [m for m in tuned.measured if "differs" in m.dropped] == []
    ran = [m for m in tuned.measured if m.us is not None]
    assert {m.config for m in ran} >= set(tuned.table) and len(ran) >= len(tuned.measured) / 2
    assert all(m.us > 0 for m in ran) and 0 < tuned.chosen_us <= tuned.table_us
    assert [tuned.file] == list(folder.rglob("*.json"))

    cache._known.clear()  # as in another process
    launched.clear()
    after = nvfp4_moe.fused_moe(x, experts, routing, **options)
    assert launched == list(tuned.chosen)
    error = (after.double() - before.double()).norm() / before.double().norm()
    assert error < 5e-3  # another order of sums may move a code of the intermediate
    again = nvfp4_moe.fused_moe(x, experts, routing, batch_invariant=True, **options)
    assert_bitwise(again, invariant, "batch-invariant, after tuning")


@pytest.mark.gpu
def test_the_entry_is_read_while_a_graph_is_captured():
    """The first look-up of all happens in the capture; the kernels were compiled before it."""
    case = make(Shape(17, 256, 128, 8, 2))
    experts, x = to("cuda", case.experts), case.x.cuda()
    routing = (case.ids.cuda(), case.weights.cuda())
    key = cache.key_of(experts, 34, 2, "per-token")
    cache.store(key, (GemmConfig(128, 32, 64, 3, 4), GemmConfig(64, 32, 64, 3, 4)))

    def call():
        return nvfp4_moe.fused_moe(x, experts, routing, backend="triton")

    want = call()
    torch.cuda.synchronize()
    cache._known.clear()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = call()
    assert cache._known[key][0].bk == 64
    graph.replay()
    assert_bitwise(captured, want, "replayed")


@pytest.mark.gpu
def test_a_kernel_that_writes_nothing_is_dropped(monkeypatch):
    """Right rows of the candidate before may still lie in the memory."""
    launch_gemm = launch._launch_gemm
    experts = to("cuda", make(Shape(1, 1024, 512, 8, 4)).experts)
    idle = CONFIGS[-1] if ring_serves(experts) else GemmConfig(64, 32, 128, 4, 4)
    monkeypatch.setattr(search, "candidates", lambda table, *_, **__: [table, idle])
    monkeypatch.setattr(
        launch, "_launch_gemm", lambda *a, **k: None if idle in a else launch_gemm(*a, **k)
    )
    (tuned,) = nvfp4_moe.autotune_fused_moe(experts, 8, 4)
    assert [bool(m.dropped) for m in tuned.measured] == [False, True] * 2
