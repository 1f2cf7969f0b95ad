"""The Triton mixture of experts against the reference: in the interpreter, and on a GPU."""

# SPDX-License-Identifier: Apache-2.0
from dataclasses import replace

import moe_triton_cases
import pytest
import torch
from assertions import assert_bitwise
from moe_cases import Shape, make
from moe_triton_cases import CONFIGS, SMALL, coarse, to
from mutants.generated.strict import codes_multiplied

from nvfp4_moe.differential import accumulation
from nvfp4_moe.kernels.moe import launch
from nvfp4_moe.kernels.moe.call import KernelCall
from nvfp4_moe.kernels.moe.tile_table import gemm_config
from nvfp4_moe.kernels.tiles import GemmConfig
from nvfp4_moe.reference.activation import ActivationType
from nvfp4_moe.reference.moe.hidden_states import Activations

PERMUTATIONS = [
    *(
        pytest.param("cpu", *sizes, *local, marks=pytest.mark.interpreter)
        for sizes in ((1, 4, 4), (37, 6, 3), (300, 20, 8), (700, 20, 8), (33000, 6, 4))
        for local in ((0, sizes[1]), (2, 3))
    ),
    *(
        pytest.param("cuda", *sizes, marks=pytest.mark.gpu)
        for sizes in (
            (512, 8, 8, 0, 8),
            (4096, 128, 8, 0, 128),
            (16383, 512, 22, 128, 77),
            (300, 2048, 32, 0, 2048),
        )
    ),
]
"""(device, tokens, experts, top_k, offset, local experts): the interpreter takes few slots."""


@pytest.mark.gpu
def test_the_table_is_the_shipped_one():
    found = {
        gemm_config(slots, 8, columns)
        for slots in range(1, 16384, 7)
        for columns in (768, 2048, 7168)
    }
    assert found == set(CONFIGS)


@pytest.mark.parametrize("case", moe_triton_cases.CASES, ids=lambda f: f.__name__)
def test_case(case, device):
    case(device, SMALL if device == "cpu" else CONFIGS[0])


@pytest.mark.gpu
@pytest.mark.parametrize("config", CONFIGS, ids=str)
@pytest.mark.parametrize(
    "shape",
    [
        Shape(33, 2048, 768, 8, 4),
        Shape(150, 1024, 2688, 8, 3),
        Shape(3, 2880, 704, 4, 2),
        Shape(5, 464, 464, 4, 2),
    ],
    ids=str,
)
def test_real_widths(shape, config):
    moe_triton_cases.real_widths(shape, config)


@pytest.mark.parametrize("device,tokens,experts,top_k,offset,num_local", PERMUTATIONS)
def test_permutation(device, tokens, experts, top_k, offset, num_local):
    moe_triton_cases.permutation(device, tokens, experts, top_k, offset, num_local)


@pytest.mark.gpu
def test_few_decoded_experts_at_a_time(monkeypatch):
    """The ring of decoded weights holds one expert, then three, then all."""
    case = coarse(Shape(150, 512, 256, 8, 3), ActivationType.Relu2)
    for size in (1, 3 * 256 * 512 * 2, 1 << 30):
        monkeypatch.setattr(launch, "_DECODED_BYTES", size)
        assert_bitwise(*moe_triton_cases.both(case, "cuda", config=CONFIGS[-1]), str(size))


def _output(activations, experts, ids, weights, **options):
    """The layer's output for quantized hidden states, by the launcher itself."""
    call = KernelCall(activations, experts, experts.num_local, **options)
    return launch.fused_moe(call, ids, weights)[0]


@pytest.mark.gpu
def test_cuda_graph_with_another_routing():
    shape = Shape(17, 256, 128, 8, 2)
    first, second = make(shape, seed=1), make(shape, seed=2)
    a, e, ids, w = (
        to("cuda", t) for t in (first.activations, first.experts, first.ids, first.weights)
    )
    _output(a, e, ids, w)  # compile
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = _output(a, e, ids, w)
    ids.copy_(second.ids)
    w.copy_(second.weights)
    graph.replay()
    assert_bitwise(captured, _output(a, e, ids, w), "replayed")


@pytest.mark.gpu
@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_all_that_is_read_is_written(config, unwritten_memory_is_nan):
    """Intermediates and the output: the sums are exact, so that the reference has the same bits."""
    case = coarse(Shape(150, 512, 256, 8, 3), ActivationType.Relu2)
    assert_bitwise(*moe_triton_cases.both(case, "cuda", config=config), "among NaN")


@pytest.mark.parametrize("static", [False, True], ids=["per-token", "static"])
def test_rows_of_no_local_expert_reach_no_result(device, static, unwritten_memory_is_nan):
    """A quantizer reads the rows of every slot between the GEMMs, and some are in no expert here."""
    case = coarse(Shape(9, 128, 128, 5, 2, 1, 3), ActivationType.Relu2, static=static)
    config = SMALL if device == "cpu" else CONFIGS[0]
    found = moe_triton_cases.both(case, device, config=config, local_expert_offset=1)
    assert_bitwise(*found, "among NaN")


@pytest.mark.gpu
@pytest.mark.parametrize("width,intermediate", [(2048, 768), (7168, 256)])
def test_batch_invariant(width, intermediate):
    """One token alone, and at some place of batches up to 4096, with ever other neighbours."""
    shape = Shape(4096, width, intermediate, 16, 4)
    case = make(shape)
    a, e, ids, w = (to("cuda", t) for t in (case.activations, case.experts, case.ids, case.weights))

    def run(rows):
        part = Activations(a.hidden_states[rows], a.block_scales[rows], a.per_token_scale[rows])
        return _output(
            part,
            e,
            ids[rows].contiguous(),
            w[rows].contiguous(),
            finalize_order="slot",
            batch_invariant=True,
        )

    token = 1234
    alone = run(torch.tensor([token], device="cuda"))[0]
    for tokens in (2, 3, 16, 33, 64, 147, 148, 300, 1024, 4096):
        others = torch.randperm(4096, device="cuda")[:tokens]
        place = tokens // 3
        others[others == token] = 7
        others[place] = token
        assert_bitwise(run(others)[place], alone, f"among {tokens}")


@pytest.mark.gpu
def test_the_sums_are_as_the_intervals_assume():
    assert accumulation.measure("triton", "cuda").as_assumed


@pytest.mark.interpreter
def test_codes_multiplied_as_they_are():
    """The path of GPUs with a block-scaled MMA, with that instruction spelled out."""
    for case in (moe_triton_cases.odd_sizes, moe_triton_cases.expert_parallel):
        with codes_multiplied():
            case("cpu", GemmConfig(128, 16, 128, 1, 4))


@pytest.mark.interpreter
@pytest.mark.parametrize("ring", [1, 1 << 28])
def test_weights_decoded_before(ring, monkeypatch):
    """One expert's at a time, and all."""
    monkeypatch.setattr(launch, "_DECODED_BYTES", ring)
    for case in (moe_triton_cases.odd_sizes, moe_triton_cases.expert_parallel):
        case("cpu", GemmConfig(128, 16, 64, 1, 4, decoded=True))


@pytest.mark.interpreter
def test_tiles_half_as_wide():
    """Experts with fewer rows than half a tile, with more, and with a second, nearly empty one."""
    config = GemmConfig(128, 32, 64, 1, 4)
    for case in (moe_triton_cases.odd_sizes, moe_triton_cases.expert_parallel):
        case("cpu", config)
    shape = Shape(34, 128, 128, 3, 2)
    ids = torch.tensor([[0, 1]] * 17 + [[0, 2]] * 17, dtype=torch.int32)  # rows: 32 + 2, 17, 17
    case = replace(moe_triton_cases.coarse(shape, ActivationType.Relu2), ids=ids)
    moe_triton_cases.assert_second_sums_are_exact(case, shape)
    assert_bitwise(*moe_triton_cases.both(case, "cpu", config=config), "sums that are exact")
