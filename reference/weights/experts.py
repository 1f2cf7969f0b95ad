"""The experts of a layer: NVFP4 weights, their scales, and the scalars of the fused call.

    value of a weight = e2m1 code * e4m3 block scale * the expert's fp32 decode scale

`layout.py` has the order of rows and block scales.
"""

# SPDX-License-Identifier: Apache-2.0
from dataclasses import dataclass, fields

import torch

from ..activation import ActivationType
from ..numerics.functions import FunctionsName
from ..recipe import FLASHINFER, FlashInferVersion, Recipe
from .arguments import Options
from .summary import dtype_and_shape, one_line
from .versions import tensors_of
from .writers import WriterName

_WEIGHTS = ("gemm1_weights", "gemm2_weights")
_ALWAYS = (
    *_WEIGHTS,
    "gemm1_weights_scale",
    "gemm2_weights_scale",
    "output1_scale_scalar",
    "output1_scale_gate_scalar",
    "output2_scale_scalar",
    "input_scale",
    "intermediate_scale",
)
"""The tensors that `Experts.__repr__` does not list by name."""


@dataclass(frozen=True)
class CuteDslWeights:
    """A second copy of the weights of `num_local` experts."""

    w1_weight: torch.Tensor  # [E, M1, H/2] uint8
    w1_weight_sf: torch.Tensor  # [32, 4, M1/128, 4, H/64, E] e4m3, strided
    w1_alpha: torch.Tensor  # [E] fp32, of up and gate alike
    w2_weight: torch.Tensor  # [E, H, I/2] uint8
    w2_weight_sf: torch.Tensor  # [32, 4, H/128, 4, I/64, E] e4m3, strided
    w2_alpha: torch.Tensor  # [E] fp32

    def __repr__(self) -> str:
        return one_line(self)


@dataclass(frozen=True)
class CutlassWeights:
    """A second copy of the weights of `num_local` experts, and the static scales."""

    fc1_expert_weights: torch.Tensor  # [E, M1, H/2] uint8
    fc1_weight_block: torch.Tensor  # [E, M1, H/16] e4m3
    fc1_act_global: torch.Tensor  # [] fp32 encode scale of the hidden states
    fc1_global: torch.Tensor  # [E] fp32
    fc2_expert_weights: torch.Tensor  # [E, H, I/2] uint8
    fc2_weight_block: torch.Tensor  # [E, H, I/16] e4m3
    fc2_act_global: torch.Tensor  # [] fp32 encode scale of the intermediate
    fc2_global: torch.Tensor  # [E] fp32

    def __repr__(self) -> str:
        return one_line(self)


@dataclass(frozen=True)
class Experts:
    """The weights of `num_local` experts, and what else the fused call needs to know of them.

    H and I below are the padded sizes, multiples of 128 (I of 64, gated); padding is zero.
    `hidden_size` and `intermediate_size` are the valid ones. M1 is 2 I for gated activations, else I.
    The unit of every scalar and parameter, with its source: `docs/units.md`.
    """

    gemm1_weights: torch.Tensor  # [E, M1, H/2] uint8, rows shuffled
    gemm1_weights_scale: torch.Tensor  # [E, M1, H/16] float8_e4m3fn, rows shuffled, 128x4
    gemm2_weights: torch.Tensor  # [E, H, I/2] uint8
    gemm2_weights_scale: torch.Tensor  # [E, H, I/16] float8_e4m3fn
    output1_scale_scalar: torch.Tensor  # [E] fp32, of the up half (gated), of the result otherwise
    output1_scale_gate_scalar: torch.Tensor  # [E] fp32, of the gate half, or of the argument
    output2_scale_scalar: torch.Tensor  # [E] fp32
    hidden_size: int
    intermediate_size: int
    activation: ActivationType = ActivationType.Swiglu
    gemm1_bias: torch.Tensor | None = None  # [E, M1] fp32, rows shuffled, divided by the scalar
    gemm2_bias: torch.Tensor | None = None  # [E, H] fp32, likewise
    gemm1_alpha: torch.Tensor | None = None  # [E] fp32
    gemm1_beta: torch.Tensor | None = None  # [E] fp32; SwiGLU's: divided by up's scalar
    gemm1_clamp_limit: torch.Tensor | None = None  # [E] fp32, divided by the gate scalar
    input_scale: torch.Tensor | None = None  # [1] fp32 encode scale of static activations
    intermediate_scale: torch.Tensor | None = None  # [1] fp32, the same of the intermediate
    cute_dsl: CuteDslWeights | None = None  # by `reference.weights.cute_dsl.with_cute_dsl`
    cutlass: CutlassWeights | None = None  # by `reference.weights.cutlass.with_cutlass`
    shard: tuple[int, int] = (0, 1)  # which of how many shards of the intermediate
    first_expert: int | None = None  # place in the layer, where it is known
    router_weight_on_input: bool = False  # weights multiply the rows, not the results: Llama 4

    def __repr__(self) -> str:
        """Two lines: the facts of the layer, then its weights, all its bytes and their device."""
        static = self.input_scale is not None
        facts = [
            f"{self.num_local} experts",
            f"hidden_size {self.hidden_size}",
            f"intermediate_size {self.intermediate_size}",
            self.activation.name,
            f"NVFP4, activation scales {'static' if static else 'per token'}",
        ]
        if self.shard != (0, 1):
            facts.append(f"shard {self.shard[0]} of {self.shard[1]}")
        if self.router_weight_on_input:
            facts.append("router's weights on the input")
        optional = [f.name for f in fields(self) if f.name not in _ALWAYS]
        present = [n for n in optional if next(tensors_of(getattr(self, n)), None) is not None]
        facts += [f"with {', '.join(present)}"] if present else []
        weights = (f"{name} {dtype_and_shape(getattr(self, name))}" for name in _WEIGHTS)
        size = sum(t.nbytes for t in tensors_of(self))
        return (
            f"Experts({', '.join(facts)})\n"
            f"  {', '.join(weights)}; {size:,} bytes on {self.gemm1_weights.device}"
        )

    @property
    def num_local(self) -> int:
        return self.gemm1_weights.shape[0]

    @property
    def padded_hidden_size(self) -> int:
        return self.gemm2_weights.shape[1]

    @property
    def padded_intermediate_size(self) -> int:
        return self.gemm2_weights.shape[2] * 2

    def load_(
        self,
        w13: torch.Tensor,
        w2: torch.Tensor,
        *,
        first: int = 0,
        amax: tuple[torch.Tensor, torch.Tensor] | None = None,
        recipe: Recipe | None = None,
        w13_bias: torch.Tensor | None = None,
        w2_bias: torch.Tensor | None = None,
        alpha: torch.Tensor | float | None = None,
        beta: torch.Tensor | float | None = None,
        clamp_limit: torch.Tensor | float | None = None,
        input_amax: float | None = None,
        intermediate_amax: float | None = None,
        backend: WriterName = "auto",
    ) -> None:
        """Quantize new weights into these experts, in place; `update.py` has the contract.

        On a GPU it is five launches and three for each padded GEMM, reads the weights twice, needs a few
        bytes of memory, and does not wait: it can be captured itself. Afterwards every byte is what
        `prepare_experts` makes of the same arguments. No gradient reaches the weights, and nothing of
        them is kept.

        Args:
            w13: [n, 2 I, H] bf16 or fp16, [up; gate], [n, I, H] without a gate: of experts
                `first` to `first + n - 1`, on the device of these; w2: [n, H, I], the same dtype.
            amax: [n] fp32 each, largest magnitudes of w13 and of w2, where they are known: the
                weights are then read once. Larger values than these saturate.
            recipe: of the weights; exact math by default, as in `prepare_experts`.
            w13_bias, w2_bias, alpha, beta, clamp_limit: as for `prepare_experts`, of the same n
                experts: needed where these experts have them, refused elsewhere.
            input_amax, intermediate_amax: likewise; of a part of the experts, those of the layer.
            backend: "auto", "triton" or "reference"; they write the same bits.

        Raises:
            TypeError, ValueError: an argument that does not fit, on a CPU also by its values; a missing
                option; a backend that cannot serve. Nothing has been written then.
        """
        from .update import load_  # documented exception: these modules need this class

        options = Options(
            w13_bias, w2_bias, alpha, beta, clamp_limit, input_amax, intermediate_amax
        )
        load_(
            self, w13, w2, first=first, amax=amax, recipe=recipe, options=options, backend=backend
        )

    def checksum(
        self, flashinfer: FlashInferVersion = FLASHINFER, functions: FunctionsName = "exact"
    ) -> str:
        """Return 64 hexadecimal digits over every bit of the layer, the same on every device.

        Of the weights, scales, scalars and sizes; not of copies for other kernels (`with_cute_dsl`).
        `checksum.py` has the formula. It waits for the GPU. Equal bits are computed with equally where
        `nvfp4_moe.fingerprint` is equal, too.

        Args:
            flashinfer: whose bits the holder's calls ask for, so that others disagree with it.
            functions: those of the holder's `Routing`; their table enters, unless they are "exact".

        Raises:
            ValueError: another version, or other functions.
        """
        from .checksum import checksum

        return checksum(self, flashinfer, functions)
