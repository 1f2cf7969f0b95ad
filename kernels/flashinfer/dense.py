"""The adapters to FlashInfer's dense NVFP4 products.

`RULES` is the capability table: for each of its backends, what it refuses and why, with the place in
flashinfer-python 0.7.2.post1 that says so; `gb` is `gemm/gemm_base.py`. `mm_fp4` calls
`flashinfer.mm_fp4` by its signature, in a form that a CUDA graph can capture.
"""

# SPDX-License-Identifier: Apache-2.0
import importlib.metadata
import importlib.util
from collections.abc import Callable
from typing import Any

import torch

from ...reference.recipe import BLOCK_SIZE
from ..dense_call import DenseCall
from . import quantize as fi

Rule = tuple[Callable[[DenseCall], Any], str]
"""(true if the request is refused, the reason with fields of the request)."""


def _has_per_row_alpha() -> bool:
    """Whether the installed version has an alpha for each row; unknown versions do."""
    try:
        parts = importlib.metadata.version("flashinfer-python").split(".")[:3]
        return tuple(int(part) for part in parts) >= (0, 7, 2)
    except (importlib.metadata.PackageNotFoundError, ValueError):
        return True


HAS_PER_ROW_ALPHA = _has_per_row_alpha()
HAS_CUDNN = importlib.util.find_spec("cudnn") is not None

_COMMON: tuple[Rule, ...] = (
    (
        lambda r: not fi.INSTALLED,
        "flashinfer-python is not installed (pip install 'nvfp4-moe[flashinfer]')",
    ),
    (lambda r: fi.VERSION and fi.VERSION < (0, 7), "flashinfer-python is older than 0.7"),
    # its checks and its tuner are Python
    (lambda r: torch.compiler.is_compiling(), "torch.compile cannot trace FlashInfer's Python"),
    (lambda r: r.capability is None, "a is on the {r.a.device.type}; FlashInfer needs a GPU"),
)


def _capabilities(*served: tuple[int, int]) -> Rule:
    names = ", ".join(f"sm_{major}{minor}" for major, minor in served)
    return (lambda r: r.capability not in served, f"{{sm}} has no kernels; {names} have")


_EVERY_BLACKWELL = ((10, 0), (10, 3), (10, 7), (11, 0), (12, 0), (12, 1))
_SM12X = ((12, 0), (12, 1))
_ONE_ALPHA: Rule = (  # gb:7840
    lambda r: r.by_row,
    "alpha has one element a row; it takes one in all",
)
_128X4: Rule = (lambda r: r.use_8x4, "a's block scales are 8x4; it reads 128x4")
_CONTIGUOUS: Rule = (lambda r: not r.a.is_contiguous(), "a is not contiguous")
_ALIGNED_16: Rule = (
    lambda r: r.misaligned(16),
    "a or b does not start at a multiple of 16 bytes, as its loads need",
)
_K_32: Rule = (lambda r: r.k % 32, "K is {r.k}; it must be a multiple of 32")


def _on_sm12x(refused: Callable[[DenseCall], Any], reason: str) -> Rule:
    return (lambda r: r.capability in _SM12X and refused(r), reason)


RULES: dict[str, tuple[Rule, ...]] = {
    "flashinfer:cutlass": (
        *_COMMON,
        _capabilities(*_EVERY_BLACKWELL),  # gb:7940
        _ONE_ALPHA,
        _128X4,  # gb:7957
        _CONTIGUOUS,  # csrc/fp4_gemm_cutlass.cu:100: CHECK_INPUT
        _ALIGNED_16,
        _K_32,  # csrc/fp4_gemm_cutlass.cu:142
        # csrc/fp4_gemm_cutlass.cu:145
        (lambda r: r.n % 32, "N is {r.n}; it must be a multiple of 32"),
    ),
    "flashinfer:cute-dsl": (
        *_COMMON,
        _capabilities((10, 0), (10, 3), (10, 7), *_SM12X),  # gb:7968
        (lambda r: r.by_row and not HAS_PER_ROW_ALPHA, "one alpha a row came with 0.7.2"),
        # gb:6496
        (
            lambda r: r.by_row and r.capability not in ((10, 0), (10, 3)),
            "alpha has one element a row; on {sm} it takes one in all",
        ),
        _128X4,  # gb:8010
        _CONTIGUOUS,  # gemm_mm_fp4_cute_dsl.py:69: compact tensors
        _ALIGNED_16,
        _K_32,  # kernels/dense_blockscaled_gemm_sm100.py:1888: rows of whole 16 bytes
        (lambda r: r.n % 8, "N is {r.n}; it must be a multiple of 8"),  # gb:8012
        # kernels/sm12x_cute/runner.py:23, :47, policy.py:66
        _on_sm12x(lambda r: r.out_dtype != torch.bfloat16, "on {sm} it writes bfloat16 only"),
        _on_sm12x(
            lambda r: r.n % 64 or r.k % 64,
            "N is {r.n} and K {r.k}; on {sm} both must be multiples of 64",
        ),
        _on_sm12x(
            lambda r: r.misaligned(32),
            "a or b does not start at a multiple of 32 bytes, as {sm}'s kernel needs",
        ),
        _on_sm12x(
            lambda r: max(r.m * r.k, r.n * r.k, r.m * r.n) >= 2**31,
            "a matrix has 2^31 elements or more; on {sm} its offsets are 31 bits",
        ),
    ),
    "flashinfer:cudnn": (
        *_COMMON,
        _capabilities(*_EVERY_BLACKWELL),  # gb:7871
        _ONE_ALPHA,
        _128X4,  # gb:7889
        (lambda r: not HAS_CUDNN, "nvidia-cudnn-frontend is not installed"),  # gb:7892
        _CONTIGUOUS,
        _K_32,
    ),
    "flashinfer:cutedsl_low_latency": (
        *_COMMON,
        _capabilities((10, 0), (10, 3), (10, 7)),  # gb:8027
        _ONE_ALPHA,
        _128X4,  # gb:8042
        _CONTIGUOUS,  # gb:8046
        _ALIGNED_16,
        # gb:8055
        (
            lambda r: r.m > 8 or r.k % 64,
            "M is {r.m} and K {r.k}; it takes M up to 8 and K in multiples of 64",
        ),
    ),
    "flashinfer:b12x": (
        *_COMMON,
        _capabilities(*_SM12X),  # gb:8064
        _ONE_ALPHA,
        _128X4,  # gb:8090
        _CONTIGUOUS,
        _ALIGNED_16,
        _K_32,  # gb:8095
    ),
    "flashinfer:cake": (
        *_COMMON,
        # experimental/cake_nvfp4_per_token/support.py:35-89, in its order
        _capabilities((10, 0), (10, 3)),
        (lambda r: not HAS_PER_ROW_ALPHA, "it came with 0.7.2"),
        (
            lambda r: r.alpha is None or r.alpha.numel() != r.m,
            "it takes alpha with one element a row only",
        ),
        _128X4,
        _CONTIGUOUS,
        (lambda r: r.n % 8, "N is {r.n}; it must be a multiple of 8"),
        (lambda r: r.k % 256, "K is {r.k}; it must be a multiple of 256"),
        (lambda r: not r.enable_pdl, "its programs are built with PDL; enable_pdl=False"),
        _ALIGNED_16,
        (
            lambda r: not fi.HAS_CAKE_PROGRAMS,
            "this flashinfer-python lacks the sources of its programs",
        ),
    ),
    "flashinfer:trtllm": (
        *_COMMON,
        # gb:9647: the same call would be another product
        (lambda r: True, "it takes b with shuffled rows; mm_fp4's are in their natural order"),
    ),
}


def refusal(backend: str, r: DenseCall) -> str | None:
    """Why the FlashInfer backend cannot serve the request; None if it can."""
    for refused, reason in RULES[backend]:
        if refused(r):
            sm = "" if r.capability is None else f"sm_{r.capability[0]}{r.capability[1]}"
            return reason.format(r=r, sm=sm)
    return None


def mm_fp4(backend: str, r: DenseCall, out: torch.Tensor) -> None:
    """Run the request, which `refusal` let pass, on FlashInfer, into `out`."""
    import flashinfer

    flashinfer.mm_fp4(**arguments(backend, r, out))


def arguments(backend: str, r: DenseCall, out: torch.Tensor) -> dict[str, Any]:
    """The keyword arguments of `flashinfer.mm_fp4` for the request."""
    alpha = r.alpha
    if alpha is None and backend == "flashinfer:cutlass":
        # csrc/fp4_gemm_cutlass.cu:108 reads one in any case.
        alpha = torch.ones(1, dtype=torch.float32, device=r.a.device)
    return {
        "a": r.a,
        "b": r.b_rows.T,
        "a_descale": r.a_scales,
        "b_descale": r.b_scales.T,
        "alpha": alpha,
        "out_dtype": r.out_dtype,
        "out": out,
        "block_size": BLOCK_SIZE,
        "use_8x4_sf_layout": r.use_8x4,
        "backend": backend.removeprefix("flashinfer:"),
        "use_nvfp4": True,
        "enable_pdl": r.enable_pdl,
    }
