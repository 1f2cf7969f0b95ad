"""The adapter to FlashInfer's quantizers.

`RULES` is the capability table: for each backend, what it refuses and why, with the place in
flashinfer-python 0.7.2.post1 that says so. `quantize` calls `flashinfer.nvfp4_quantize` by its
signature, in the form that a CUDA graph can capture.
"""

# SPDX-License-Identifier: Apache-2.0
import importlib.metadata
import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from ...reference.layouts import padded_shape
from ...reference.recipe import BLOCK_SIZE, Build
from .. import environment
from ..quantize_call import QuantizeCall

BUILDS: dict[str, Build] = {
    "flashinfer:cuda": "cuda",
    "flashinfer:cute-dsl": "cute-dsl",
    "flashinfer:cake": "cute-dsl",  # its outputs are bitwise those of cute-dsl
}
_CUDA_CAPABILITIES = ((10, 0), (10, 3), (10, 7), (11, 0), (12, 0), (12, 1))
_HALF = (torch.float16, torch.bfloat16)


def _version() -> tuple[int, ...] | None:
    """(0, 7) of the installed flashinfer-python, () if it does not say; None without it."""
    if importlib.util.find_spec("flashinfer") is None:
        return None
    try:
        parts = importlib.metadata.version("flashinfer-python").split(".")[:2]
        return tuple(int(part) for part in parts)
    except (importlib.metadata.PackageNotFoundError, ValueError):
        return ()


def _has_cake_programs() -> bool:
    """Whether cake can be built here: the wheel of 0.7.2.post1 lacks the sources it lists."""
    spec = importlib.util.find_spec("flashinfer")
    if spec is None or importlib.util.find_spec("flashinfer_jit_cache") is not None:
        return spec is not None
    folders = [
        Path(p) / "experimental/cake_nvfp4_per_token/csrc"
        for p in spec.submodule_search_locations or ()
    ]
    return any(folder.is_dir() for folder in folders)


VERSION = _version()
INSTALLED = VERSION is not None
HAS_CAKE_PROGRAMS = _has_cake_programs()

Rule = tuple[Callable[[QuantizeCall], Any], str]
"""(true if the request is refused, the reason with fields of the request)."""


def _sm(r: QuantizeCall) -> str:
    assert r.capability is not None
    return f"sm_{r.capability[0]}{r.capability[1]}"


def _scale_count(r: QuantizeCall) -> int:
    rows, columns = padded_shape(r.m, r.k // BLOCK_SIZE, r.layout)
    return rows * columns


_COMMON: tuple[Rule, ...] = (
    (
        lambda r: not INSTALLED,
        "flashinfer-python is not installed (pip install 'nvfp4-moe[flashinfer]')",
    ),
    (
        lambda r: VERSION and VERSION < (0, 7),
        "flashinfer-python is older than 0.7; its nvfp4_quantize has other arguments",
    ),
    # Its custom ops are not registered (utils.py:438), and the first call builds a module.
    (
        lambda r: torch.compiler.is_compiling(),
        "torch.compile cannot trace FlashInfer's Python",
    ),
    (
        lambda r: r.capability is None,
        "a is on the {r.a.device.type}; FlashInfer would move it to a GPU, we do not",
    ),
    (
        lambda r: (r.capability or (0, 0)) < (10, 0),
        "{sm} is before Blackwell (sm_100), where FlashInfer's quantizer returns garbage without "
        "an error",
    ),
    (lambda r: r.a.dtype == torch.float32, "a is float32; FlashInfer takes float16 and bfloat16"),
)


def _build_rule(build: Build) -> Rule:
    return (
        lambda r: r.recipe.build != build,
        f'its bits are those of build="{build}", not of {{r.recipe.build}}',
    )


def _math_rule(build: Build) -> Rule:
    return (
        lambda r: r.recipe.math != environment.math(build),
        "it reads the math from the environment, which says {env_math}, not {r.recipe.math}: "
        "{how_to}",
    )


_SHUFFLE_LIMIT: Rule = (
    # quantization.cu:676: block_scale_interleave's offsets are int
    lambda r: r.do_shuffle and _scale_count(r) > 2**31,
    "a has more than 2^31 block scales; with do_shuffle its offsets are 31 bits",
)
_INT32_SCALES: Rule = (
    # quantization_cute_dsl_utils.py:591
    lambda r: _scale_count(r) > 2**31,
    "a has more than 2^31 block scales, padding included; its offsets are 31 bits",
)
_ALIGNED_16: Rule = (
    # nvfp4_quantize.py:2206, :2333: assumed_align=16; a non-contiguous `a` is copied first
    lambda r: r.a.is_contiguous() and r.misaligned(16),
    "a does not start at a multiple of 16 bytes, as its loads need",
)

RULES: dict[str, tuple[Rule, ...]] = {
    "flashinfer:cuda": (
        *_COMMON,
        # jit/fp4_quantization.py, fp4_quantization.py:274
        (
            lambda r: r.capability not in _CUDA_CAPABILITIES,
            "{sm} has no module; sm_100, 103, 107, 110, 120 and 121 have",
        ),
        _build_rule("cuda"),
        _math_rule("cuda"),
        # fp4_quantization.py:1676
        (lambda r: r.out_scale is not None, "out_scale is only for cute-dsl and cake"),
        # fp4Quantize.cpp: CHECK_CONTIGUOUS, and a column-major matrix is quantized along M
        (lambda r: not r.a.is_contiguous(), "a is not contiguous"),
        # fp4_quantization.py:1196: one row of this stride counts as contiguous, and as transposed
        (
            lambda r: not r.per_token and r.a.stride(0) == 1,
            "a's rows have stride 1; FlashInfer would quantize along M",
        ),
        # quantization.cuh:45: loads of 32 bytes, and of 16 for e4m3
        (
            lambda r: r.misaligned(32 if r.a.dtype in _HALF else 16),
            "a does not start at a multiple of 32 bytes (e4m3: 16), as its loads need",
        ),
        # grid(m): an empty launch is an error
        (lambda r: r.m == 0, "a has no rows; its launch would be empty"),
        # quantization.cuh:876 and :895, quantization_utils.cuh:1069: uint32 offsets
        (
            lambda r: _scale_count(r) > 2**32,
            "a has more than 2^32 block scales, padding included; its offsets are 32 bits",
        ),
        _SHUFFLE_LIMIT,
        # fp4_quantization.py:1688: .item()
        (
            lambda r: r.per_token and r.scale_device not in (None, "cpu"),
            "a_global_sf is a tensor on the GPU; it would be read back by a synchronization. "
            "Give a float",
        ),
    ),
    "flashinfer:cute-dsl": (
        *_COMMON,
        _build_rule("cute-dsl"),
        _math_rule("cute-dsl"),
        # fp4_quantization.py:1714
        (lambda r: r.row_index is not None, "expanded_idx_to_permuted_idx is only for cuda"),
        # nvfp4_quantize.py: .reshape(1)
        (lambda r: r.by_row, "one a_global_sf a row is only for cuda"),
        (
            lambda r: r.m == 0 and r.per_token,
            "a has no rows; its per-token launch would be empty",
        ),
        _ALIGNED_16,
        # nvfp4_quantize.py:1072, which spares the per-token kernel what it says of the others
        (
            lambda r: not r.per_token and r.m * r.k > 2**31,
            "a has more than 2^31 elements; with a global scale its row offsets are 31 bits",
        ),
        _INT32_SCALES,
    ),
    "flashinfer:cake": (
        *_COMMON,
        # cake_backend.py: SUPPORTED_COMPUTE_CAPABILITIES
        (
            lambda r: r.capability not in ((10, 0), (10, 3)),
            "{sm} has no generated program; sm_100 and sm_103 have",
        ),
        _build_rule("cute-dsl"),
        (lambda r: r.recipe.math == "exact", "it has fast math only"),
        # fp4_quantization.py:1752-1785
        (lambda r: not r.per_token, "it is per-token only"),
        (lambda r: r.recipe.four_over_six is not None, "it has no 4over6"),
        (
            lambda r: r.layout.name != "layout_128x4" or r.do_shuffle,
            "it writes layout_128x4 only, without do_shuffle",
        ),
        (lambda r: r.row_index is not None, "expanded_idx_to_permuted_idx is only for cuda"),
        (lambda r: r.enable_pdl is False, "its programs are built with PDL; enable_pdl=False"),
        (lambda r: r.m == 0, "a has no rows; its launch would be empty"),
        # cake_backend.py:370: 512 threads of 8 blocks at most
        (lambda r: r.k > 65536, "K is {r.k}; it has programs for at most 65536"),
        # cake_backend.py:1159: rows are read in place
        (
            lambda r: r.misaligned(16) or r.a.stride(0) * r.a.element_size() % 16,
            "a's rows do not start at multiples of 16 bytes",
        ),
        _INT32_SCALES,
        (
            lambda r: not HAS_CAKE_PROGRAMS,
            "this flashinfer-python lacks the sources of its programs",
        ),
    ),
}


def refusal(backend: str, r: QuantizeCall) -> str | None:
    """Why the FlashInfer backend cannot serve the request; None if it can."""
    for refused, reason in RULES[backend]:
        if refused(r):
            build = BUILDS[backend]
            math = environment.math(build)
            how_to = "" if math == r.recipe.math else environment.how_to_get(r.recipe.math, build)
            sm = "" if r.capability is None else _sm(r)
            return reason.format(r=r, sm=sm, env_math=math, how_to=how_to)
    return None


def quantize(backend: str, r: QuantizeCall) -> tuple[torch.Tensor, ...]:
    """Run the request, which `refusal` let pass, on FlashInfer."""
    import flashinfer

    return tuple(flashinfer.nvfp4_quantize(**arguments(backend, r)))


def arguments(backend: str, r: QuantizeCall) -> dict[str, Any]:
    """The keyword arguments of `flashinfer.nvfp4_quantize` for the request."""
    from flashinfer import SfLayout
    from flashinfer.quantization.nvfp4_quantization_utils import NVFP44Over6Config

    config = r.recipe.four_over_six
    if config is not None:
        config = NVFP44Over6Config(config.e4m3_max, int(config.err_mode), config.err_use_fast_math)
    scale = r.scale
    if backend == "flashinfer:cuda" and r.per_token:
        scale = float(scale)  # a tensor on the CPU at most, see RULES
    elif isinstance(scale, torch.Tensor):
        scale = scale.contiguous()  # one a row: fp4Quantize.cpp checks it
    else:
        # torch.tensor(..., device="cuda"), which FlashInfer would call, breaks graph capture.
        scale = torch.full((1,), scale, dtype=torch.float32, device=r.a.device)
    chosen: dict[str, Any] = {
        "a": r.a,
        "a_global_sf": scale,
        "sfLayout": SfLayout(int(r.layout)),
        "do_shuffle": r.do_shuffle,
        "sf_vec_size": BLOCK_SIZE,
        "enable_pdl": r.enable_pdl,
        "backend": backend.removeprefix("flashinfer:"),
        "per_token_activation": r.per_token,
        "expanded_idx_to_permuted_idx": None if r.row_index is None else r.row_index.contiguous(),
        "out_scale": r.out_scale,
    }
    # An omitted recipe stays omitted: a given one makes FlashInfer check a_global_sf against it.
    if r.explicit_4over6 or r.a.dtype == torch.float8_e4m3fn:
        chosen["nvfp4_4over6"] = config
    return chosen
