"""A linear layer with NVFP4 weights: its weights, laid out for every backend, and its product.

    output = x @ weight.T + bias,   weight[n, k] = decode * code[n, k] * block scale[n, k / 16]

Per token, x is quantized with a scale for each row, as the experts' hidden states are, and `mm_fp4`
multiplies codes (W4A4). With bf16 activations `mm_bf16_fp4` multiplies x itself (W4A16). Both round once
to bf16; the bias is added to that, as servers do.
"""

# SPDX-License-Identifier: Apache-2.0
from dataclasses import dataclass

import torch

from ..kernels import environment
from ..kernels.backends import UnsupportedError
from ..kernels.dense.api import mm_bf16_fp4, mm_fp4
from ..kernels.moe.call import Mode
from ..kernels.quantize.api import nvfp4_quantize
from ..reference.layouts import from_linear
from ..reference.recipe import Recipe, SfLayout


@dataclass(frozen=True)
class LinearWeights:
    """The weights [N, K] of a linear layer, as `mm_fp4` takes its second matrix."""

    codes: torch.Tensor  # [N, K/2] uint8
    block_scales: torch.Tensor  # uint8 e4m3, 128x4
    decode: torch.Tensor  # [1] fp32
    bias: torch.Tensor | None  # [N] bf16

    @classmethod
    def of(
        cls,
        codes: torch.Tensor,
        block_scales: torch.Tensor,
        decode: torch.Tensor,
        bias: torch.Tensor | None = None,
    ) -> "LinearWeights":
        """Lay the tensors of a checkpoint out; codes and scales keep their bits.

        Args:
            codes: [N, K/2] uint8, the even column in the low nibble.
            block_scales: [N, K/16] uint8 e4m3, linear.
            decode: fp32, one element.
            bias: [N], of any float dtype; it is rounded to bf16.
        """
        return cls(
            codes.contiguous(),
            from_linear(block_scales.contiguous(), SfLayout.layout_128x4),
            decode.reshape(1),
            None if bias is None else bias.bfloat16(),
        )


def linear(
    x: torch.Tensor,
    weights: LinearWeights,
    activation: Mode,
    *,
    batch_invariant: bool = False,
) -> torch.Tensor:
    """Multiply rows by the weights of a linear layer.

    Args:
        x: [..., K] bf16.
        activation: "per-token" (W4A4) or "bf16" (W4A16).
        batch_invariant: a row of the result depends on no other row of x.

    Returns:
        [..., N] bf16.

    Raises:
        UnsupportedError: x has another dtype; static activations.
        ValueError, TypeError: as `nvfp4_quantize` and `mm_fp4`.
    """
    if x.dtype != torch.bfloat16:
        raise UnsupportedError(
            f"an NVFP4 linear layer was given {x.dtype}; it must be torch.bfloat16: load the model with "
            "dtype=torch.bfloat16"
        )
    rows = x.reshape(-1, x.shape[-1])
    b = weights.codes.T, weights.block_scales.T
    if activation == "bf16":
        product = mm_bf16_fp4(rows, *b, weights.decode, batch_invariant=batch_invariant)
    elif activation == "per-token":
        config = environment.four_over_six()
        codes, block_scales, token_scales = nvfp4_quantize(
            rows,
            Recipe(four_over_six=config).base_scale_inv,
            per_token_activation=True,
            nvfp4_4over6=config,
        )
        product = mm_fp4(
            codes,
            b[0],
            block_scales,
            b[1],
            token_scales * weights.decode,
            batch_invariant=batch_invariant,
        )
    else:
        raise UnsupportedError("NVFP4 linear layers have no static activations here")
    if weights.bias is not None:
        product = product + weights.bias
    return product.reshape(*x.shape[:-1], product.shape[1])
