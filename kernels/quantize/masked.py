"""`nvfp4_quantize_masked`: the quantizer on masked input, by every backend that can skip rows.

The rows of all experts stand one after another. A row index names those that are there, so the call is
one of the quantizer's, with its table of backends.
"""

# SPDX-License-Identifier: Apache-2.0
from dataclasses import replace
from typing import Any

import torch

from ...reference import checks
from ...reference.recipe import Build, SfLayout
from ..backends import Asked
from .api import QUANTIZE, QuantizeBackend, Result, backend_and_build
from .call import UNSET, QuantizeCall, check_values, make_quantize_call

_TILE_ROWS = {SfLayout.layout_linear: 1, SfLayout.layout_8x4: 8, SfLayout.layout_128x4: 128}


def check_masked_m(masked_m: Any, experts: int, max_m: int, name: str, like: torch.Tensor) -> None:
    """Raise for a `masked_m` of another shape, dtype or device than that of its input, `name`.

    Values outside 0 ... max_m raise where they can be read without waiting for a GPU. Elsewhere the
    kernels take the nearest value inside.
    """
    checks.tensor("masked_m", masked_m, (torch.int32, torch.int64), (experts,))
    if not like.is_meta:
        checks.same_device("masked_m", masked_m, name, like)
    if checks.reads_values(masked_m):
        inside = (masked_m >= 0) & (masked_m <= max_m)
        checks.values("masked_m", masked_m, inside, f"0 to max_m = {max_m}")


def live_row_index(masked_m: torch.Tensor, max_m: int) -> torch.Tensor:
    """[E * max_m] int32: the row itself, -1 beyond `masked_m`. Nothing waits for the GPU."""
    experts, device = masked_m.shape[0], masked_m.device
    row = torch.arange(experts * max_m, dtype=torch.int32, device=device).view(experts, max_m)
    inner = torch.arange(max_m, dtype=torch.int32, device=device)
    return torch.where(inner < masked_m[:, None], row, -1).flatten()


def _of_experts(call: QuantizeCall, result: Result) -> Result:
    assert call.masked_m is not None
    return tuple(t.unflatten(0, (call.masked_m.shape[0], -1)) for t in result)


@QUANTIZE.served(_of_experts)
def nvfp4_quantize_masked(
    a: torch.Tensor,
    masked_m: torch.Tensor,
    a_global_sf: float | torch.Tensor,
    sfLayout: SfLayout | int = SfLayout.layout_linear,
    *,
    per_token_activation: bool = False,
    nvfp4_4over6: Any = UNSET,
    fast_math: bool | None = None,
    build: Build | None = None,
    backend: QuantizeBackend | str = "auto",
) -> Asked[QuantizeCall]:
    """Quantize masked input, [E, max_m, K] of which expert e has `masked_m[e]` rows, to NVFP4.

    The rows beyond `masked_m` are never read: NaN and addresses that do not exist are harmless there.
    The results are zero there. It does what `flashinfer.scaled_fp4_grouped_quantize` (0.7.2) does, with
    a scale for each token or one for each expert, and in FlashInfer's ordinary layouts.

    Args:
        a: bf16 or fp16 (float8_e4m3fn with a global scale, fp32 per token), contiguous, K a multiple of
            16.
        masked_m: [E] int32 or int64, 0 to max_m, on a's device. It is not read back from a GPU.
        a_global_sf: per token, the inverse base scale, as `nvfp4_quantize` has it; otherwise the encode
            scale 448 * 6 / amax: a number, one fp32 element, or one of each expert, [E] fp32.
        sfLayout: of each expert's block scales. layout_128x4 needs max_m to be a multiple of 128, and
            layout_8x4 of 8.
        The rest: as for `nvfp4_quantize`.

    Returns:
        (codes uint8 [E, max_m, K/2], block scales uint8 [E, max_m, padded K/16]) and, per token, the
        fp32 decode scales [E, max_m].

    Raises:
        ValueError, TypeError: an argument that no backend accepts.
        UnsupportedError: the backend that was named cannot serve the call.
    """
    checks.tensor("a", a, shape=("E", "max_m", "K"), contiguous=True)
    experts, max_m, _ = a.shape
    check_masked_m(masked_m, experts, max_m, "a", a)
    if isinstance(a_global_sf, torch.Tensor) and a_global_sf.numel() > 1:
        checks.tensor("a_global_sf", a_global_sf, (torch.float32,), (experts,))
        a_global_sf = a_global_sf[:, None].expand(experts, max_m).reshape(-1)
    name, build = backend_and_build(backend, build)
    call = make_quantize_call(
        a.flatten(0, 1),
        a_global_sf,
        sfLayout=sfLayout,
        per_token_activation=per_token_activation,
        nvfp4_4over6=nvfp4_4over6,
        fast_math=fast_math,
        build=build,
    )
    if max_m % _TILE_ROWS[call.layout]:
        raise ValueError(
            f"sfLayout is {call.layout.name} with a of shape {list(a.shape)}; max_m must be a multiple "
            f"of {_TILE_ROWS[call.layout]}, so that no tile of block scales has rows of two experts"
        )
    check_values(call)
    return replace(call, row_index=live_row_index(masked_m, max_m), masked_m=masked_m), name


explain_nvfp4_quantize_masked = QUANTIZE.explaining(nvfp4_quantize_masked)
