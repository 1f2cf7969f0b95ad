"""The grouped GEMM for sm_90 on that GPU, against the reference."""

# SPDX-License-Identifier: Apache-2.0
from dataclasses import replace

import masked_cases
import moe_triton_cases
import pytest
import torch
from assertions import assert_bitwise
from moe_cases import Shape, make
from moe_triton_cases import coarse, to

from nvfp4_moe.kernels.moe import launch
from nvfp4_moe.kernels.moe.call import KernelCall, padded
from nvfp4_moe.kernels.moe.hopper.config import CONFIGS, refusal, ring_config
from nvfp4_moe.kernels.moe.permute import permute
from nvfp4_moe.kernels.triton_target import arch
from nvfp4_moe.reference.activation import ActivationType
from nvfp4_moe.reference.moe.hidden_states import Activations


def _refusal() -> str | None:
    if not torch.cuda.is_available():
        return "no GPU here"
    return refusal(arch(torch.device("cuda")))


pytestmark = [pytest.mark.gpu, pytest.mark.skipif(_refusal() is not None, reason=str(_refusal()))]


OTHERS = [replace(c, gathers=not c.gathers) for c in (CONFIGS[1], CONFIGS[-1])]
"""Configurations that gather tokens where the shipped ones do not, and the other way round."""
WAYS = [*CONFIGS, *OTHERS]


def test_the_table_is_the_shipped_one():
    assert {ring_config(slots, 8) for slots in range(1, 4096)} == set(CONFIGS)


@pytest.mark.parametrize("config", [CONFIGS[1], OTHERS[0]], ids=str)
@pytest.mark.parametrize("case", moe_triton_cases.CASES, ids=lambda f: f.__name__)
def test_case(case, config):
    case("cuda", config)


@pytest.mark.parametrize("config", [*CONFIGS, OTHERS[0]], ids=str)
def test_masked_input(config):
    masked_cases.exact_sums("cuda", config)
    masked_cases.the_rows_of_the_layer("cuda", config)


@pytest.mark.parametrize("config", WAYS, ids=str)
@pytest.mark.parametrize(
    "shape",
    [
        Shape(33, 2048, 768, 8, 4),
        Shape(150, 1024, 2688, 8, 3),
        Shape(700, 2880, 704, 4, 2),
        Shape(5, 464, 464, 4, 2),
    ],
    ids=str,
)
def test_real_widths(shape, config):
    moe_triton_cases.real_widths(shape, config)


@pytest.mark.parametrize("config", WAYS, ids=str)
def test_edges_of_every_width(config):
    moe_triton_cases.edges_of_widths(config, CONFIGS[0])


@pytest.mark.parametrize("config", WAYS, ids=str)
@pytest.mark.parametrize("offset,local", [(0, 8), (2, 3)], ids=["all local", "some local"])
def test_no_result_is_of_unwritten_memory(config, offset, local, unwritten_memory_is_nan):
    """The sums are exact, so that the reference has the same bits.

    Rows of slots of no local expert are read between the GEMMs, and nobody writes them.
    """
    case = coarse(Shape(150, 512, 256, 8, 3, offset, local), ActivationType.Relu2)
    found = moe_triton_cases.both(case, "cuda", config=config, local_expert_offset=offset)
    assert_bitwise(*found, "among NaN")


@pytest.mark.parametrize("config", WAYS, ids=str)
def test_no_slot_is_of_a_local_expert(config, unwritten_memory_is_nan):
    """The permutation then names no row, and no tile."""
    case = coarse(Shape(40, 512, 256, 8, 2, 2, 3), ActivationType.Relu2)
    case = replace(case, ids=torch.full_like(case.ids, 7))
    found = moe_triton_cases.both(case, "cuda", config=config, local_expert_offset=2)
    assert_bitwise(*found, "no row")


@pytest.mark.parametrize("config", [c for c in WAYS if c.gathers], ids=str)
def test_gathered_rows_lie_far_behind(config):
    """They begin 2^31 columns behind the first, and their scales behind as many rows less."""
    width, slots = 2048, 2 * config.bn + 9
    near = torch.randn(slots, width, dtype=torch.float32, device="cuda").bfloat16()
    scale = torch.rand(slots, dtype=torch.float32, device="cuda")
    experts = to("cuda", make(Shape(slots, width, 256, 1, 1)).experts)
    ids = torch.zeros((slots, 1), dtype=torch.int32, device="cuda")
    p = permute(ids, 1, 0, config.bn)
    options = (experts, p, slots, 1, config)
    want = launch.gemm1(launch.Operand(near, None, scale, placed=True), *options, fp32=False)

    tokens = 2**31 // width + slots
    x = torch.empty((tokens, width), dtype=torch.bfloat16, device="cuda")
    scales = torch.empty(tokens, dtype=torch.float32, device="cuda")
    x[-slots:], scales[-slots:] = near, scale
    far = replace(p, expanded=p.expanded + (tokens - slots))
    options = (experts, far, slots, 1, config)
    got = launch.gemm1(launch.Operand(x, None, scales), *options, fp32=False)
    assert_bitwise(got, want, "far rows")


@pytest.mark.parametrize("config", WAYS, ids=str)
@pytest.mark.parametrize("tokens", [1, 16, 17, 300])
@pytest.mark.parametrize(
    "activation,intermediate", [(ActivationType.Swiglu, 192), (ActivationType.Relu2, 384)]
)
@pytest.mark.parametrize("mode", ["per-token", "bf16"])
def test_kernels_pad_as_they_write(
    mode, activation, intermediate, tokens, config, unwritten_memory_is_nan
):
    """Columns that are no multiple of 128: as with padded hidden states and an intermediate in order.

    Strips are odd in number: three, of 64 results with a gate and of 128 without.
    """
    case = to("cuda", make(Shape(tokens, 464, intermediate, 8, 4), activation, mode="bf16"))
    a, e = Activations(case.x), case.experts
    quantize = "per-token" if mode == "per-token" else None
    call = KernelCall(a, e, e.num_local, quantize=quantize)
    got = launch.fused_moe(call, case.ids, case.weights, config=config)[0]
    want = launch.fused_moe(
        padded(call), case.ids, case.weights, config=config, observe=lambda *_: None
    )[0]
    assert not want.isnan().any()
    assert_bitwise(got, want, mode)


@pytest.mark.parametrize("tokens", [1, 7, 40, 300, 2000])
@pytest.mark.parametrize("hidden,intermediate", [(2048, 768), (7168, 256), (2880, 2880)])
def test_every_tile_has_the_same_bits(hidden, intermediate, tokens):
    """Sums of random terms, rounded at every step: another order would show."""
    case = make(Shape(tokens, hidden, intermediate, 8, 4))
    want, *others = (moe_triton_cases.output_of(case, "cuda", config=c) for c in WAYS)
    for config, got in zip(WAYS[1:], others, strict=True):
        assert_bitwise(got, want, str(config))


@pytest.mark.parametrize("config", WAYS, ids=str)
def test_every_run_has_the_same_bits(config):
    case = to("cuda", make(Shape(600, 2048, 768, 16, 4)))
    call = KernelCall(case.activations, case.experts, case.experts.num_local)
    want = launch.fused_moe(call, case.ids, case.weights, config=config)[0]
    different = torch.zeros((), dtype=torch.int64, device="cuda")
    for _ in range(1000):
        got = launch.fused_moe(call, case.ids, case.weights, config=config)[0]
        different += (got != want).any()
    assert different.item() == 0


@pytest.mark.parametrize("width,intermediate", [(2048, 768), (7168, 256)])
def test_batch_invariant(width, intermediate):
    """One token alone, and at some place of batches up to 16,384, with ever other neighbours."""
    case = to("cuda", make(Shape(16384, width, intermediate, 16, 4)))
    a, ids, w = case.activations, case.ids, case.weights

    def run(rows):
        part = Activations(a.hidden_states[rows], a.block_scales[rows], a.per_token_scale[rows])
        call = KernelCall(part, case.experts, case.experts.num_local, finalize_order="slot")
        return launch.fused_moe(call, ids[rows].contiguous(), w[rows].contiguous())[0]

    token = 1234
    alone = run(torch.tensor([token], device="cuda"))[0]
    for tokens in (2, 3, 16, 33, 64, 147, 148, 300, 1024, 4096, 16384):
        others = torch.randperm(16384, device="cuda")[:tokens]
        place = tokens // 3
        others[others == token] = 7
        others[place] = token
        assert_bitwise(run(others)[place], alone, f"among {tokens}")
