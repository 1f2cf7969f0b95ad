"""The variants of the fused layer: whose bits a call has, and in which layouts its experts are.

A variant is what one of FlashInfer's layers does otherwise than the others: which quantizers it has, in
which order it adds the rows of a token, whether its first GEMM writes bf16, and in which layout it wants
the weights. `layer.py` and `../bounds/` compute all of them, and every backend asks the variant.
"""

# SPDX-License-Identifier: Apache-2.0
from dataclasses import dataclass

from ..recipe import Build, LayerBuild
from ..weights.copies import CUTE_DSL, CUTLASS, Layout
from ..weights.experts import Experts
from .finalize import FinalizeOrder


@dataclass(frozen=True)
class Variant:
    """One layer's bits.

    Args:
        name: the `build` of a call.
        quantizers: the build whose quantizers make the intermediate's codes.
        finalize_order: the order in which the layer itself adds the rows of a token.
        layout: the weights that the layer reads; None: those of `prepare_experts`.
        static_only: the layer has static scales alone. On every backend its calls then have static
            scales, are finalized, and have experts in its layout.
        rounds_first_gemm: the first GEMM, times its scalar, is rounded to bf16; the activation clamps
            NaN; the intermediate is bf16 and quantized by `Experts.intermediate_scale`.
    """

    name: LayerBuild
    quantizers: Build
    finalize_order: FinalizeOrder
    layout: Layout | None = None
    static_only: bool = False
    rounds_first_gemm: bool = False

    def prepared(self, experts: Experts) -> Experts:
        """The experts in the layout of the variant, too.

        Raises:
            ValueError: the layer cannot hold these experts.
        """
        return experts if self.layout is None else self.layout.add(experts)


VARIANTS: dict[LayerBuild, Variant] = {
    v.name: v
    for v in (
        Variant("cuda", "cuda", "flashinfer"),
        Variant("cute-dsl", "cute-dsl", "slot", CUTE_DSL),
        Variant("cutlass", "cuda", "slot", CUTLASS, static_only=True, rounds_first_gemm=True),
    )
}
