"""One checked call of the quantizer, which every backend gets."""

# SPDX-License-Identifier: Apache-2.0
import numbers
from dataclasses import dataclass, replace
from typing import Any, get_args

import torch

from ...reference import checks
from ...reference.recipe import (
    BLOCK_SIZE,
    FLASHINFER,
    Build,
    FlashInferVersion,
    Math,
    NVFP44Over6Config,
    Recipe,
    SfLayout,
)
from .. import environment
from ..device import capability_of
from ..records import form


class _Unset:
    def __repr__(self) -> str:
        return "<omitted: FLASHINFER_NVFP4_4OVER6*>"


form.PLAIN.add(_Unset)
UNSET: Any = _Unset()
"""The default of `nvfp4_4over6`: the environment decides."""


@dataclass(frozen=True)
class QuantizeCall:
    """The arguments of `nvfp4_quantize`, normalized; made by `make_quantize_call`, which checks them."""

    a: torch.Tensor
    scale: float | torch.Tensor
    layout: SfLayout
    do_shuffle: bool
    enable_pdl: bool | None
    per_token: bool
    row_index: torch.Tensor | None
    out_scale: torch.Tensor | None
    recipe: Recipe
    explicit_4over6: bool
    capability: tuple[int, int] | None  # of the GPU asked about; None on the CPU
    masked_m: torch.Tensor | None = (
        None  # [E]: `a` has E * max_m rows, and `row_index` the live ones
    )

    @property
    def m(self) -> int:
        return self.a.shape[0]

    @property
    def k(self) -> int:
        return self.a.shape[1]

    @property
    def scale_device(self) -> str | None:
        """The device type of a_global_sf; None for a number."""
        return self.scale.device.type if isinstance(self.scale, torch.Tensor) else None

    @property
    def by_row(self) -> bool:
        """True if each row has its own global scale."""
        return isinstance(self.scale, torch.Tensor) and self.scale.numel() > 1

    def misaligned(self, alignment: int) -> bool:
        """True if `a` starts at no multiple of `alignment` bytes within its storage."""
        return self.a.storage_offset() * self.a.element_size() % alignment != 0


def make_quantize_call(
    a: torch.Tensor,
    a_global_sf: float | torch.Tensor,
    *,
    sfLayout: SfLayout | int = SfLayout.layout_128x4,
    do_shuffle: bool = False,
    sf_vec_size: int = BLOCK_SIZE,
    enable_pdl: bool | None = None,
    per_token_activation: bool = False,
    expanded_idx_to_permuted_idx: torch.Tensor | None = None,
    out_scale: torch.Tensor | None = None,
    nvfp4_4over6: Any = UNSET,
    fast_math: bool | None = None,
    build: Build = "cuda",
    flashinfer: FlashInferVersion = FLASHINFER,
) -> QuantizeCall:
    """Check what no backend accepts, and resolve what the environment decides.

    Arguments are as of `nvfp4_quantize`.

    Raises:
        ValueError, TypeError: one argument, what was given and what is allowed.
    """
    for name, value in (
        ("do_shuffle", do_shuffle),
        ("per_token_activation", per_token_activation),
    ):
        checks.flag(name, value)
    check_optional_flags(enable_pdl=enable_pdl, fast_math=fast_math)
    checks.one_of("build", build, get_args(Build))
    _check_matrix(a, sf_vec_size)
    layout = _layout(sfLayout)
    explicit = not is_unset(nvfp4_4over6)
    config = four_over_six_of(nvfp4_4over6) if explicit else environment.four_over_six()
    math = math_of(fast_math, build)
    recipe = Recipe(math, config, build, flashinfer)
    _check_dtype(a, recipe, per_token_activation, explicit, fast_math is None)
    if a.dtype == torch.float8_e4m3fn and config is not None:
        # From the environment: FlashInfer ignores it here, too.
        recipe = replace(recipe, four_over_six=None)
    _check_scale(a, a_global_sf, recipe, per_token_activation, explicit)
    _check_row_index(a, expanded_idx_to_permuted_idx, per_token_activation)
    _check_out_scale(a, out_scale, per_token_activation)
    if do_shuffle:
        _check_shuffle(a, layout)
    return QuantizeCall(
        a,
        a_global_sf,
        layout,
        do_shuffle,
        enable_pdl,
        per_token_activation,
        expanded_idx_to_permuted_idx,
        out_scale,
        recipe,
        explicit,
        capability_of(a),
    )


def is_unset(value: Any) -> bool:
    # FlashInfer's own sentinel is recognized by its class's name, so that nothing imports it.
    return value is UNSET or type(value).__name__ == "_UnsetType"


def check_optional_flags(**flags: Any) -> None:
    """Flags whose None leaves the choice to the environment or to the backend."""
    for name, value in flags.items():
        if value is not None:
            checks.flag(name, value)


def _layout(value: Any) -> SfLayout:
    try:
        if not isinstance(value, bool | str):
            return SfLayout(int(value))
    except (TypeError, ValueError):
        pass
    allowed = f"one of {', '.join(layout.name for layout in SfLayout)}"
    return checks.wrong_value("sfLayout", value, allowed)


def math_of(fast_math: bool | None, build: Build) -> Math:
    """Return the math that a `fast_math` argument means now; None means the environment's."""
    if fast_math is None:
        return environment.math(build)
    return "fast" if fast_math else "exact"


def four_over_six_of(value: Any) -> NVFP44Over6Config | None:
    if value is None or isinstance(value, NVFP44Over6Config):
        return value
    if all(hasattr(value, f) for f in ("e4m3_max", "err_mode", "err_use_fast_math")):
        return NVFP44Over6Config.of(value)
    return checks.wrong_type("nvfp4_4over6", value, "an NVFP44Over6Config or None")


def _check_matrix(a: torch.Tensor, sf_vec_size: int) -> None:
    checks.tensor("a", a, shape=("M", "K"))
    if sf_vec_size != BLOCK_SIZE:
        checks.wrong_value("sf_vec_size", sf_vec_size, f"{BLOCK_SIZE}, the size of NVFP4's blocks")
    if a.shape[1] % BLOCK_SIZE or a.shape[1] == 0:
        raise ValueError(
            f"a is {checks.given(a)}, K = {a.shape[1]}; K must be a positive multiple of {BLOCK_SIZE}"
        )


def _check_dtype(
    a: torch.Tensor, recipe: Recipe, per_token: bool, explicit: bool, math_from_environment: bool
) -> None:
    allowed = [torch.float16, torch.bfloat16]
    if a.dtype in allowed:
        return
    mode = "per token" if per_token else "with a global scale"
    if explicit and recipe.four_over_six is not None:
        mode += " and 4over6"
    else:
        allowed.append(torch.float32 if per_token else torch.float8_e4m3fn)
    if a.dtype not in allowed:
        raise ValueError(
            f"a is {checks.given(a)}; {mode} it must be {checks.any_of(map(checks.name_of, allowed))}"
        )
    if a.dtype == torch.float32 and not recipe.is_fast_alone:
        sources = environment.sources(recipe, math=math_from_environment, config=not explicit)
        raise ValueError(
            f"a is {checks.given(a)}, whose only recipe is fast math without 4over6, build cuda; "
            f"with {recipe}" + (f" (from {sources} in the environment)" if sources else "") + " it "
            "must be float16 or bfloat16"
        )


def _check_scale(
    a: torch.Tensor, scale: Any, recipe: Recipe, per_token: bool, explicit: bool
) -> None:
    if isinstance(scale, torch.Tensor):
        allowed = (1,) if per_token else (1, a.shape[0])
        if scale.numel() not in allowed or scale.dtype != torch.float32:
            wanted = "one element" if per_token else f"one element, or one a row ({a.shape[0]})"
            checks.wrong_value(
                "a_global_sf", scale, f"a tensor of float32 of {wanted}, or a number"
            )
        if scale.device.type != "cpu" or scale.numel() > 1:
            _check_device(a, scale, "a_global_sf")
    elif isinstance(scale, bool) or not isinstance(scale, numbers.Real):
        checks.wrong_type("a_global_sf", scale, "a positive number, or a tensor of float32")
    if per_token and explicit and _readable(scale):
        value = float(scale)
        if abs(value / recipe.base_scale_inv - 1) > 1e-3:  # FlashInfer's tolerance
            raise ValueError(
                f"a_global_sf is {value!r}; with e4m3_max {recipe.e4m3_max} it must be "
                f"1 / (6 * {recipe.e4m3_max}) = {recipe.base_scale_inv!r}"
            )


def check_values(r: QuantizeCall) -> None:
    """Raise for a scale that no caller means, where its value can be read.

    It is apart from `make_quantize_call`, so that a call which was recorded on a GPU can be replayed
    anywhere.
    An infinite encode scale is what FlashInfer's formula gives for a tensor of zeros.
    """
    allowed = "a positive number"
    if not isinstance(r.scale, torch.Tensor):
        if not r.scale > 0:
            checks.wrong_value("a_global_sf", r.scale, allowed)
    elif checks.reads_values(r.scale):
        checks.values("a_global_sf", r.scale, r.scale > 0, allowed)


def _readable(scale: float | torch.Tensor) -> bool:
    """True for a number, and for a tensor whose value needs no wait for a GPU and breaks no trace."""
    return not isinstance(scale, torch.Tensor) or (scale.is_cpu and checks.reads_values(scale))


def _check_device(a: torch.Tensor, other: torch.Tensor, name: str) -> None:
    if not a.is_meta:  # which `explain` takes, beside tensors of any device
        checks.same_device(name, other, "a", a)


def _check_out_scale(a: torch.Tensor, out_scale: Any, per_token: bool) -> None:
    if out_scale is None:
        return
    _check_per_token("out_scale", out_scale, per_token)
    checks.tensor("out_scale", out_scale, (torch.float32,))
    if out_scale.numel() != 1:
        checks.wrong_value("out_scale", out_scale, "a tensor of float32 of one element")
    _check_device(a, out_scale, "out_scale")


def _check_per_token(name: str, value: Any, per_token: bool) -> None:
    if not per_token:
        raise ValueError(
            f"{name} is {checks.given(value)}; without per_token_activation=True it must be None"
        )


def _check_row_index(a: torch.Tensor, index: Any, per_token: bool) -> None:
    if index is None:
        return
    name = "expanded_idx_to_permuted_idx"
    _check_per_token(name, index, per_token)
    checks.tensor(name, index, (torch.int32,), ("at least M",))
    if index.numel() < a.shape[0]:
        checks.wrong_value(name, index, f"a tensor of int32 of at least M = {a.shape[0]} elements")
    _check_device(a, index, name)


def _check_shuffle(a: torch.Tensor, layout: SfLayout) -> None:
    # `shuffle_matrix_sf_a` wants whole 128-row tiles, and its result is given the shape of unpadded
    # scales, so that there must be no padded columns (fp4_quantization.py:1540 and :1885).
    if layout != SfLayout.layout_128x4:
        raise ValueError(f"do_shuffle is True with sfLayout {layout.name}; it must be layout_128x4")
    if a.shape[0] % 128 or a.shape[1] % 64:
        raise ValueError(
            f"do_shuffle is True with a of shape {list(a.shape)}; M must be a multiple of 128 and K "
            "of 64"
        )
