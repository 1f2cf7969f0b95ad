"""The Triton dense product against the reference: in the interpreter, and on a GPU.

On a GPU every shipped configuration runs.
"""

# SPDX-License-Identifier: Apache-2.0
from dataclasses import replace

import dense_cases
import pytest
import session
import torch
from assertions import assert_bitwise
from mutants.generated.strict import codes_multiplied

import nvfp4_moe
from nvfp4_moe.kernels.dense.launch import dense_config
from nvfp4_moe.kernels.op_schema import OPS
from nvfp4_moe.kernels.tiles import GemmConfig
from nvfp4_moe.kernels.triton_target import arch
from nvfp4_moe.reference import dense as reference

SHAPES = [
    (m, n, k) for m in (1, 16, 17, 33, 130, 513, 1024) for n, k in ((4096, 2048), (18432, 4096))
]
ARCH = arch(torch.device("cuda")) if session.has_gpu() else 90
SHIPPED = list(dict.fromkeys(dense_config(*shape, ARCH) for shape in SHAPES))
"""Every configuration of the table for this GPU, once; without a GPU, for an H100."""
SMALL = {
    "narrow": GemmConfig(64, 16, 128, 1, 4),
    "long": GemmConfig(128, 16, 256, 1, 4),
    "decoded": GemmConfig(64, 32, 64, 1, 4, decoded=True),
}
"""Configurations that the interpreter runs in reasonable time."""
PLACES = [
    *(pytest.param("cpu", c, marks=pytest.mark.interpreter, id=name) for name, c in SMALL.items()),
    *(pytest.param("cuda", c, marks=pytest.mark.gpu, id=str(c)) for c in SHIPPED),
]


@pytest.mark.parametrize("device,config", PLACES)
@pytest.mark.parametrize("case", dense_cases.CASES, ids=lambda f: f.__name__)
def test_case(case, device, config):
    case(device, config)


@pytest.mark.interpreter
@pytest.mark.parametrize("case", dense_cases.CASES, ids=lambda f: f.__name__)
def test_codes_multiplied_as_they_are(case):
    """The path of GPUs with a block-scaled MMA, with that instruction spelled out."""
    with codes_multiplied():
        case("cpu", GemmConfig(128, 16, 128, 1, 4))


@pytest.mark.gpu
@pytest.mark.parametrize("config", SHIPPED, ids=str)
@pytest.mark.parametrize(
    "shape",
    [(1, 4096, 4096), (130, 1000, 2880), (33, 7168, 2064), (300, 520, 1008)],
    ids=lambda s: "x".join(map(str, s)),
)
def test_real_widths(shape, config):
    """Bitwise where sums are exact, inside the interval elsewhere."""
    for use_8x4 in (False, True):
        case = dense_cases.with_poisoned_padding(dense_cases.coarse(*shape, use_8x4=use_8x4))
        dense_cases.bitwise(case, "cuda", config, f"8x4 {use_8x4}")
    dense_cases.close(dense_cases.real(*shape), "cuda", config)


@pytest.mark.gpu
@pytest.mark.parametrize("m", [1, 16, 17, 33, 130, 513, 1024, 2050])
@pytest.mark.parametrize("alpha", dense_cases.ALPHAS)
def test_the_tables_choice(m, alpha):
    for dtype in (torch.bfloat16, torch.float16):
        case = dense_cases.coarse(m, 640, 1536, alpha=alpha, dtype=dtype)
        dense_cases.bitwise(case, "cuda", None, f"{m} {alpha} {dtype}")


@pytest.mark.gpu
def test_beyond_two_to_the_31():
    """Codes of b, and the output, whose offsets need more than 31 bits."""
    if torch.cuda.get_device_properties(0).total_memory < 40 * 2**30:
        pytest.skip("needs a GPU with 40 GiB of memory")
    case = dense_cases.coarse(2, 128, 4096)
    n = 2**31 // 2048 + 256  # bytes of codes: n * 2048
    tiles = n // 128
    b_rows = case.b_rows.cuda().repeat(tiles, 1)
    b_scales = case.b_scales.cuda().repeat(tiles, 1)
    wide = replace(case.to("cuda"), b_rows=b_rows, b_scales=b_scales)
    got = dense_cases.output_of(wide, "cuda")
    want = reference.mm_fp4(**case.arguments)
    for tile in (0, 1, tiles // 2, tiles - 1):
        assert_bitwise(got[:, tile * 128 : tile * 128 + 128], want, f"columns of tile {tile}")
    del got, wide, b_rows, b_scales
    m = 2**31 // 4096 + 256
    case = dense_cases.coarse(128, 4096, 64)
    tall = replace(
        case.to("cuda"),
        a=case.a.cuda().repeat(m // 128, 1),
        a_scales=case.a_scales.cuda().repeat(m // 128, 1),
        alpha=case.alpha.cuda().repeat(m // 128),
    )
    got = dense_cases.output_of(tall, "cuda")
    want = reference.mm_fp4(**case.arguments)
    for tile in (0, m // 256, m // 128 - 1):
        assert_bitwise(got[tile * 128 : tile * 128 + 128], want, f"rows of tile {tile}")


@pytest.mark.gpu
def test_cuda_graph():
    """Replayed with other codes, scales and alpha, for a few rows and for many."""
    for m in (1, 33, 1500):
        first, second = (
            dense_cases.coarse(m, 256, 512, alpha="rows", seed=seed).to("cuda") for seed in (1, 2)
        )
        nvfp4_moe.mm_fp4(**first.arguments, backend="triton")  # compile
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = nvfp4_moe.mm_fp4(**first.arguments, backend="triton")
        for name in ("a", "b_rows", "a_scales", "b_scales", "alpha"):
            getattr(first, name).copy_(getattr(second, name))
        graph.replay()
        assert_bitwise(captured, reference.mm_fp4(**second.to("cpu").arguments), f"{m} rows")


@pytest.mark.gpu
def test_all_that_is_read_is_written(unwritten_memory_is_nan):
    """Decoded rows and the output."""
    case = dense_cases.coarse(1030, 200, 208).to("cuda")
    want = reference.mm_fp4(**case.to("cpu").arguments)
    assert_bitwise(nvfp4_moe.mm_fp4(**case.arguments, backend="triton"), want, "among NaN")


@pytest.mark.gpu
def test_compiles_by_inductor():
    case = dense_cases.coarse(33, 256, 512).to("cuda")
    options = {n: v for n, v in case.arguments.items() if n != "a"}

    def call(a):
        return nvfp4_moe.mm_fp4(a, **options, backend="triton") + 1

    assert_bitwise(torch.compile(call, fullgraph=True)(case.a), call(case.a), "compiled")


@pytest.mark.gpu
def test_rows_do_not_depend_on_their_neighbours():
    """With the same configuration a row's bits are its own."""
    case = dense_cases.real(40, 256, 512)
    alone = replace(
        case, a=case.a[:1], a_scales=case.a_scales, alpha=case.alpha[:1]
    )  # 128 rows of scales either way
    for config in SHIPPED:
        both = dense_cases.output_of(case, "cuda", config)
        assert_bitwise(dense_cases.output_of(alone, "cuda", config)[0], both[0], str(config))


@pytest.mark.interpreter
def test_the_public_call_runs_it():
    case = dense_cases.coarse(5, 40, 64)
    want = nvfp4_moe.mm_fp4(**case.arguments, backend="reference")
    assert_bitwise(nvfp4_moe.mm_fp4(**case.arguments, backend="triton"), want, "triton")
    out = torch.full((5, 40), torch.nan, dtype=torch.bfloat16)
    assert nvfp4_moe.mm_fp4(**case.arguments, out=out, backend="triton") is out
    assert_bitwise(out, want, "out")
    assert nvfp4_moe.explain_mm_fp4(**case.arguments).backend == "reference"


@pytest.mark.interpreter
def test_misaligned_and_strided_codes():
    case = dense_cases.coarse(5, 40, 64)
    want = nvfp4_moe.mm_fp4(**case.arguments, backend="reference")
    wide = torch.zeros(5, 40, dtype=torch.uint8)
    wide[:, 1:33] = case.a
    flat = torch.zeros(40 * 32 + 3, dtype=torch.uint8)
    b_rows = flat[3:].view(40, 32)
    b_rows.copy_(case.b_rows)
    arguments = case.arguments | {"a": wide[:, 1:33], "b": b_rows.T}
    assert_bitwise(nvfp4_moe.mm_fp4(**arguments, backend="triton"), want, "a copy is taken")


@pytest.mark.interpreter
@pytest.mark.parametrize("backend", ["triton", "reference", "auto"])
@pytest.mark.parametrize("alpha", dense_cases.ALPHAS)
def test_compiles_into_one_graph(backend, alpha):
    torch._dynamo.reset()
    case = dense_cases.coarse(7, 40, 64, alpha=alpha)

    def call(a, out=None):
        return nvfp4_moe.mm_fp4(**case.arguments | {"a": a}, out=out, backend=backend) * 2

    compiled = torch.compile(call, backend="aot_eager", fullgraph=True)
    assert_bitwise(compiled(case.a), call(case.a), backend)
    out = torch.full((7, 40), torch.nan, dtype=torch.bfloat16)
    assert_bitwise(compiled(case.a, out), call(case.a), "out")
    assert_bitwise(out * 2, call(case.a), "out is filled")


@pytest.mark.interpreter
@pytest.mark.parametrize("name", ["triton", "reference"])
def test_opcheck(name):
    op = OPS[f"{name}_mm_fp4"]
    for alpha, use_8x4 in (("none", False), ("rows", True)):
        c = dense_cases.coarse(7, 40, 64, alpha=alpha, use_8x4=use_8x4)
        out = torch.zeros(7, 40, dtype=torch.bfloat16)
        torch.library.opcheck(
            op, (c.a, c.b_rows, c.a_scales, c.b_scales, c.alpha, use_8x4, False, out)
        )
