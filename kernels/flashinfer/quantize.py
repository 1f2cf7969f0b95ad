"""The adapters to FlashInfer's NVFP4 quantizers: `flashinfer.nvfp4_quantize` with its three backends.

The function is called in the form that a CUDA graph can capture.
"""

# SPDX-License-Identifier: Apache-2.0
from typing import Any

import torch

from ...reference.layouts import padded_shape
from ...reference.recipe import BLOCK_SIZE, Build, SfLayout
from ..quantize.call import QuantizeCall
from . import version
from .description import BATCH_INVARIANT, OMITTED, Argument, Function, OfType
from .rules import (
    BLACKWELL,
    COMMON,
    SM100,
    Rule,
    first_reason,
    math_of,
    no_kernels_beside,
    on_no_gpu,
)
from .version import SINCE_NEW, UNTIL_NEW

BUILDS: dict[str, Build] = {
    "flashinfer:cuda": "cuda",
    "flashinfer:cute-dsl": "cute-dsl",
    "flashinfer:cake": "cute-dsl",  # its outputs are bitwise those of cute-dsl
}
_HALF = (torch.float16, torch.bfloat16)


def _scale(backend: str, r: QuantizeCall) -> float | torch.Tensor:
    scale = r.scale
    if backend == "flashinfer:cuda" and r.per_token:
        return float(scale)  # a tensor on the CPU at most, see RULES
    if isinstance(scale, torch.Tensor):
        return scale.contiguous()  # one a row: fp4Quantize.cpp checks it
    # torch.tensor(..., device="cuda"), which FlashInfer would call, breaks graph capture.
    return torch.full((1,), scale, dtype=torch.float32, device=r.a.device)


def _four_over_six(backend: str, r: QuantizeCall) -> Any:
    # An omitted recipe stays omitted: a given one makes FlashInfer check a_global_sf against it.
    if r.explicit_4over6 or r.a.dtype == torch.float8_e4m3fn:
        return r.recipe.four_over_six
    return OMITTED


_BACKEND = tuple(
    Argument("backend", lambda backend, _: backend.removeprefix("flashinfer:"), default, versions)
    for default, versions in (("cuda", UNTIL_NEW), ("auto", SINCE_NEW))
)
NVFP4_QUANTIZE = Function(
    "flashinfer",
    "nvfp4_quantize",
    "quantization/fp4_quantization.py:1578",
    (
        Argument("a", lambda _, r: r.a),
        Argument("a_global_sf", _scale),
        Argument("sfLayout", lambda _, r: r.layout, SfLayout.layout_128x4),
        Argument("do_shuffle", lambda _, r: r.do_shuffle, False),
        Argument("sf_vec_size", lambda *_: BLOCK_SIZE, 16),
        Argument("enable_pdl", lambda _, r: r.enable_pdl, None),
        *_BACKEND,
        Argument("per_token_activation", lambda _, r: r.per_token, False),
        Argument(
            "expanded_idx_to_permuted_idx",
            lambda _, r: None if r.row_index is None else r.row_index.contiguous(),
            None,
        ),
        Argument("out_scale", lambda _, r: r.out_scale, None),
        Argument("nvfp4_4over6", _four_over_six, OfType("_UnsetType")),
        BATCH_INVARIANT,
    ),
)
"""It is called with the name of a backend and a call."""


def _scale_count(r: QuantizeCall) -> int:
    rows, columns = padded_shape(r.m, r.k // BLOCK_SIZE, r.layout)
    return rows * columns


def _bits_of(build: Build) -> Rule[QuantizeCall]:
    return Rule(
        lambda r: r.recipe.build != build,
        f'its bits are those of build="{build}", not of {{r.recipe.build}}',
    )


_COMMON: tuple[Rule[QuantizeCall], ...] = (
    *COMMON,
    on_no_gpu("a is on the {r.a.device.type}; FlashInfer would move it to a GPU, we do not"),
    Rule(
        lambda r: (r.capability or (0, 0)) < (10, 0),
        "{sm} is before Blackwell (sm_100), where FlashInfer's quantizer returns garbage without "
        "an error",
        "tensorrt_llm/kernels/quantization.cuh:243",
    ),
    Rule(
        lambda r: r.a.dtype == torch.float32,
        "a is float32; FlashInfer takes float16 and bfloat16",
        "cpp/kernels/quantization.cu:386",
    ),
)
_NO_INDEX: Rule[QuantizeCall] = Rule(
    lambda r: r.row_index is not None,
    "expanded_idx_to_permuted_idx is only for cuda",
    "quantization/fp4_quantization.py:1714",
)
_INT32_SCALES: Rule[QuantizeCall] = Rule(
    lambda r: _scale_count(r) > 2**31,
    "a has more than 2^31 block scales, padding included; its offsets are 31 bits",
    "quantization/quantization_cute_dsl_utils.py:591",
)

RULES: dict[str, tuple[Rule[QuantizeCall], ...]] = {
    "flashinfer:cuda": (
        *_COMMON,
        no_kernels_beside(BLACKWELL, "quantization/fp4_quantization.py:274"),
        _bits_of("cuda"),
        math_of("cuda", "cpp/common/envUtils.cpp:365"),
        Rule(
            lambda r: r.out_scale is not None,
            "out_scale is only for cute-dsl and cake",
            "quantization/fp4_quantization.py:1676",
        ),
        # A column-major matrix is quantized along M.
        Rule(
            lambda r: not r.a.is_contiguous(),
            "a is not contiguous",
            "tensorrt_llm/thop/fp4Quantize.cpp:43",
        ),
        # One row of this stride counts as contiguous, and as transposed.
        Rule(
            lambda r: not r.per_token and r.a.stride(0) == 1,
            "a's rows have stride 1; FlashInfer would quantize along M",
            "quantization/fp4_quantization.py:1196",
        ),
        # loads of 32 bytes, and of 16 for e4m3
        Rule(
            lambda r: r.misaligned(32 if r.a.dtype in _HALF else 16),
            "a does not start at a multiple of 32 bytes (e4m3: 16), as its loads need",
            "tensorrt_llm/kernels/quantization.cuh:45",
        ),
        # Its TMA map asks for a fill that CUDA has for floating types, and says that e4m3 is UINT8.
        Rule(
            lambda r: (
                not r.per_token
                and r.a.dtype == torch.float8_e4m3fn
                and r.m >= 1024
                and r.k % 512 == 0
            ),
            "a is float8_e4m3fn [{r.m}, {r.k}]; from 1024 rows on, with K a multiple of 512, its "
            'launcher always raises "Failed to encode TMA tensor map"',
            "cpp/kernels/quantization.cu:567",
        ),
        # grid(m): an empty launch is an error
        Rule(
            lambda r: r.m == 0,
            "a has no rows; its launch would be empty",
            "cpp/kernels/quantization.cu:405",
        ),
        # uint32 offsets: also quantization.cuh:895 and quantization_utils.cuh:1069
        Rule(
            lambda r: _scale_count(r) > 2**32,
            "a has more than 2^32 block scales, padding included; its offsets are 32 bits",
            "tensorrt_llm/kernels/quantization.cuh:876",
        ),
        # block_scale_interleave's offsets are int
        Rule(
            lambda r: r.do_shuffle and _scale_count(r) > 2**31,
            "a has more than 2^31 block scales; with do_shuffle its offsets are 31 bits",
            "cpp/kernels/quantization.cu:676",
        ),
        # .item()
        Rule(
            lambda r: r.per_token and r.scale_device not in (None, "cpu"),
            "a_global_sf is a tensor on the GPU; it would be read back by a synchronization. "
            "Give a float",
            "quantization/fp4_quantization.py:1688",
        ),
    ),
    "flashinfer:cute-dsl": (
        *_COMMON,
        _bits_of("cute-dsl"),
        math_of("cute-dsl", "quantization/kernels/nvfp4_quantize.py:3250"),
        _NO_INDEX,
        # .reshape(1)
        Rule(
            lambda r: r.by_row,
            "one a_global_sf a row is only for cuda",
            "quantization/kernels/nvfp4_quantize.py:2671",
        ),
        Rule(
            lambda r: r.m == 0 and r.per_token,
            "a has no rows; its per-token launch would be empty",
            "quantization/kernels/nvfp4_quantize.py:3134",
        ),
        # assumed_align=16, also :2333; a matrix that is not contiguous is copied first
        Rule(
            lambda r: r.a.is_contiguous() and r.misaligned(16),
            "a does not start at a multiple of 16 bytes, as its loads need",
            "quantization/kernels/nvfp4_quantize.py:2206",
        ),
        # It spares the per-token kernel what it says of the others.
        Rule(
            lambda r: not r.per_token and r.m * r.k > 2**31,
            "a has more than 2^31 elements; with a global scale its row offsets are 31 bits",
            "quantization/kernels/nvfp4_quantize.py:1072",
        ),
        _INT32_SCALES,
    ),
    "flashinfer:cake": (
        *_COMMON,
        no_kernels_beside(SM100, "cake_nvfp4_per_token/cake_backend.py:102"),
        _bits_of("cute-dsl"),
        Rule(
            lambda r: r.recipe.math == "exact",
            "it has fast math only",
            "quantization/fp4_quantization.py:1753",
        ),
        Rule(
            lambda r: not r.per_token,
            "it is per-token only",
            "quantization/fp4_quantization.py:1853",
        ),
        Rule(
            lambda r: r.recipe.four_over_six is not None,
            "it has no 4over6",
            "quantization/fp4_quantization.py:1764",
        ),
        Rule(
            lambda r: r.layout.name != "layout_128x4" or r.do_shuffle,
            "it writes layout_128x4 only, without do_shuffle",
            "quantization/fp4_quantization.py:1759",
        ),
        _NO_INDEX,
        Rule(
            lambda r: r.enable_pdl is False,
            "its programs are built with PDL; enable_pdl=False",
            "cake_nvfp4_per_token/cake_backend.py:1288",
        ),
        Rule(
            lambda r: r.m == 0,
            "a has no rows; its launch would be empty",
            "cake_nvfp4_per_token/cake_backend.py:364",
        ),
        # 512 threads of 8 blocks at most
        Rule(
            lambda r: r.k > 65536,
            "K is {r.k}; it has programs for at most 65536",
            "cake_nvfp4_per_token/cake_backend.py:370",
        ),
        # rows are read in place
        Rule(
            lambda r: r.misaligned(16) or r.a.stride(0) * r.a.element_size() % 16,
            "a's rows do not start at multiples of 16 bytes",
            "cake_nvfp4_per_token/cake_backend.py:1159",
        ),
        _INT32_SCALES,
        Rule(
            lambda _: not version.HERE.has_cake_programs,
            "this flashinfer-python lacks the sources of its programs",
        ),
    ),
}
"""The rules of each backend, in the order in which they are asked."""


def refusal(backend: str, r: QuantizeCall) -> str | None:
    """Return why the FlashInfer backend cannot serve the call; None if it can."""
    return first_reason(RULES[backend], r)


def quantize(backend: str, r: QuantizeCall) -> tuple[torch.Tensor, ...]:
    """Run the call, which `refusal` let pass, on FlashInfer."""
    return tuple(NVFP4_QUANTIZE.run(backend, r))


def arguments(backend: str, r: QuantizeCall) -> dict[str, Any]:
    """Return the keyword arguments of `flashinfer.nvfp4_quantize` for the call, in our own types."""
    return NVFP4_QUANTIZE.keywords(backend, r)
