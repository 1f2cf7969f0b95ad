"""Cases of a reload: it must give the bits of experts prepared anew, on any device, by any backend."""

# SPDX-License-Identifier: Apache-2.0
from dataclasses import fields, replace
from typing import Any

import torch
from assertions import assert_bitwise

from nvfp4_moe import ActivationType
from nvfp4_moe.reference.recipe import NVFP44Over6Config, Recipe
from nvfp4_moe.reference.weights.cute_dsl import with_cute_dsl
from nvfp4_moe.reference.weights.cutlass import with_cutlass
from nvfp4_moe.reference.weights.experts import Experts
from nvfp4_moe.reference.weights.prepare import prepare_experts
from nvfp4_moe.reference.weights.versions import tensors_of

EXPERTS, HIDDEN, INTERMEDIATE = (
    3,
    208,
    80,
)  # neither a multiple of the tiles that they are padded to
RECIPES = (
    Recipe("exact"),
    Recipe(),
    Recipe("exact", NVFP44Over6Config(256, "MSE")),
    Recipe("exact", build="cute-dsl"),
)


def weights(
    kind: ActivationType,
    seed: int,
    *,
    dtype: torch.dtype = torch.bfloat16,
    n: int = EXPERTS,
    hidden: int = HIDDEN,
    intermediate: int = INTERMEDIATE,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Normal ones under scales that differ by expert, with zeros and an outlier."""
    g = torch.Generator().manual_seed(seed)
    rows = intermediate * (2 if kind.gated else 1)
    # The largest expert's outlier stays below 65504, which fp16 holds.
    size = torch.tensor([2.0 ** (3 * (e - n) + 12 - seed) for e in range(n)])[:, None, None]
    w13 = torch.randn(n, rows, hidden, generator=g) * size
    w2 = torch.randn(n, hidden, intermediate, generator=g) * size
    w13[:, :, :16] = 0
    w2[0] = 0
    w13[-1, -1, -1] = -7 * w13[-1].abs().amax()
    return w13.to(dtype), w2.to(dtype)


def moved(experts: Experts, device: str) -> Experts:
    """Field by field; a tensor held twice is then held twice."""

    def to(value: Any) -> Any:
        if hasattr(value, "__dataclass_fields__"):
            return replace(value, **{f.name: to(getattr(value, f.name)) for f in fields(value)})
        return value.to(device, copy=True) if isinstance(value, torch.Tensor) else value

    return to(experts)


def assert_same(got: Experts, want: Experts, what: str) -> None:
    for field in fields(want):
        a, b = getattr(got, field.name), getattr(want, field.name)
        if isinstance(b, torch.Tensor):
            assert_bitwise(a, b, f"{what}, {field.name}")
        elif hasattr(b, "__dataclass_fields__"):
            for inner in fields(b):
                left, right = getattr(a, inner.name), getattr(b, inner.name)
                assert_bitwise(left, right, f"{what}, {field.name}.{inner.name}")
        else:
            assert a == b, (what, field.name)


def pointers(experts: Experts) -> list[int]:
    tensors = (getattr(experts, f.name) for f in fields(experts))
    return [t.data_ptr() for t in tensors if isinstance(t, torch.Tensor)]


def each_way(device: str, backend: str) -> None:
    """Every recipe and kind of layer, given maxima and found ones."""
    swiglu, relu2 = ActivationType.Swiglu, ActivationType.Relu2
    for recipe in RECIPES:
        for kind in (swiglu, relu2):
            reloaded(kind, device, backend, recipe=recipe)
    for kind in (swiglu, relu2, ActivationType.Situ):
        reloaded(kind, device, backend, options={"input_amax": 3.0, "intermediate_amax": 5.0})
    reloaded(swiglu, device, backend, dtype=torch.float16)
    reloaded(swiglu, device, backend, given=True)
    for kind in (swiglu, relu2):
        copies(kind, device, backend)
        of_all_magnitudes(kind, device, backend)


def reloaded(
    kind: ActivationType,
    device: str,
    backend: str,
    *,
    recipe: Recipe = RECIPES[0],
    dtype: torch.dtype = torch.bfloat16,
    options: dict[str, Any] | None = None,
    given: bool = False,
    **sizes: int,
) -> None:
    """All experts at once, then one of them once more."""
    again = options or {}
    options = again | {"recipe": recipe}
    old, new = (weights(kind, seed, dtype=dtype, **sizes) for seed in (0, 1))
    experts = moved(prepare_experts(*old, kind, **options), device)
    before = pointers(experts)
    want = prepare_experts(*new, kind, **options)
    w13, w2 = (w.to(device) for w in new)
    amax = tuple(w.abs().amax((1, 2)).float() for w in (w13, w2)) if given else None
    poison(experts)
    experts.load_(w13, w2, amax=amax, recipe=recipe, backend=backend, **again)
    what = f"{kind.name}, {recipe}, {dtype}, {backend}"
    assert_same(experts, want, what)
    one = old[0][1:2], old[1][1:2]
    some = (w.to(device) for w in one)
    experts.load_(*some, first=1, recipe=recipe, backend=backend, **again)
    mixed = tuple(torch.cat([n[:1], o, n[2:]]) for n, o in zip(new, one, strict=True))
    assert_same(experts, prepare_experts(*mixed, kind, **options), f"{what}, one expert")
    assert pointers(experts) == before


def poison(experts: Experts, byte: int = 0x7F) -> None:
    """Every byte of every tensor, as pages have it that a sleeping server has dropped."""
    for t in tensors_of(experts):
        (t if t.dim() else t.reshape(1)).view(torch.uint8).fill_(byte)


def options_of(device: str) -> list[tuple[ActivationType, dict[str, Any]]]:
    """Layers of 3 experts that have every option of `prepare_experts`, between them."""
    swiglu, relu2, situ = ActivationType.Swiglu, ActivationType.Relu2, ActivationType.Situ
    static = {"input_amax": 3.0, "intermediate_amax": 5.0}
    biases = {"w13_bias": torch.linspace(-1, 1, 3 * 160).reshape(3, 160).to(device)}
    biases["w2_bias"] = torch.linspace(-2, 1, 3 * 208).reshape(3, 208).to(device)
    apart = {name: torch.tensor([1.5, 2.5, 0.7], device=device) for name in ("alpha", "beta")}
    return [
        (swiglu, {}),
        (swiglu, {"alpha": 1.702, "beta": 1.0, "clamp_limit": 7.0} | biases),
        (swiglu, apart | static),
        (situ, apart | {"clamp_limit": 3.0} | static),
        (ActivationType.SwigluStep, {"clamp_limit": 0.3}),
        (relu2, static),
        (relu2, {}),
    ]


def restored(device: str, backend: str) -> None:
    """Every option of `prepare_experts` that a layer can have, after its pages were dropped."""
    for kind, options in options_of(device):
        w13, w2 = (w.to(device) for w in weights(kind, 1))
        want = prepare_experts(w13, w2, kind, **options)
        for byte in (0x7F,) if options else (0, 0x7F):
            for split in (slice(0, 3),), (slice(2, 3), slice(0, 2)):
                got = moved(want, device)
                poison(got, byte)
                for some in split:
                    given = {
                        name: v[some] if isinstance(v, torch.Tensor) else v
                        for name, v in options.items()
                    }
                    got.load_(w13[some], w2[some], first=some.start, backend=backend, **given)
                what = f"{kind.name}, {sorted(options)}, {backend}, pages of {byte}, {split}"
                assert_same(got, want, what)


MAGNITUDES = (2.0**-133, 1e-37, 1e-34, 1e-20, 1.0, 2.0**124)


def of_all_magnitudes(kind: ActivationType, device: str, backend: str) -> None:
    """Weights, biases, limits and static scales from the smallest numbers to the largest."""
    n, rows = len(MAGNITUDES), 32 if kind.gated else 16
    shapes = (n, rows, 32), (n, 32, 16)
    size = torch.tensor(MAGNITUDES, dtype=torch.float64)[:, None, None]
    g = torch.Generator().manual_seed(3)
    old = [torch.ones(shape, dtype=torch.bfloat16) for shape in shapes]
    new = [(torch.randn(s, generator=g).clamp(-8, 8) * size).bfloat16() for s in shapes]
    for of_bias, amax in ((None, None), (1e-45, 1e-45), (3e38, 3e38), (3e38, 1e-30), (1e9, None)):
        static = {} if amax is None else {"input_amax": amax, "intermediate_amax": amax}
        given: dict[str, Any] = {}
        if of_bias is not None:
            given = {"w13_bias": torch.full((n, rows), of_bias)}
            given["w2_bias"] = torch.full((n, 32), of_bias)
            if kind.gated:
                given |= {"beta": of_bias, "clamp_limit": of_bias}
        experts = moved(prepare_experts(*old, kind, **static, **given), device)
        on = {name: v.to(device) if isinstance(v, torch.Tensor) else v for name, v in given.items()}
        experts.load_(*(w.to(device) for w in new), backend=backend, **on, **static)
        want = prepare_experts(*new, kind, **static, **given)
        assert_same(experts, want, f"{kind.name}, {backend}, {of_bias}, {amax}")


def copies(kind: ActivationType, device: str, backend: str) -> None:
    """The second copies of the weights follow."""
    static = {"input_amax": 3.0, "intermediate_amax": 5.0}
    for copied, options in ((with_cute_dsl, {}), (with_cutlass, static)):
        old, new = (weights(kind, seed, hidden=256, intermediate=128) for seed in (0, 1))
        experts = moved(copied(prepare_experts(*old, kind, **options)), device)
        poison(experts)
        experts.load_(*(w[:1].to(device) for w in old), backend=backend, **options)
        experts.load_(*(w[1:].to(device) for w in new), first=1, backend=backend, **options)
        mixed = (torch.cat([o[:1], n[1:]]) for o, n in zip(old, new, strict=True))
        want = copied(prepare_experts(*mixed, kind, **options))
        assert_same(experts, want, f"{kind.name}, {copied.__name__}, {backend}")
