"""Probes of sm_90's grouped GEMM in Gluon, which runs on a GPU of that capability alone."""

# SPDX-License-Identifier: Apache-2.0
import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Any
from unittest import mock

import torch

from nvfp4_moe import host
from nvfp4_moe.cases import moe_edges
from nvfp4_moe.cases.moe_case import MoECase, to_device
from nvfp4_moe.differential.conforming import Setting
from nvfp4_moe.differential.verdict import Allowed
from nvfp4_moe.kernels import launcher
from nvfp4_moe.kernels.dense import launch as dense_launch
from nvfp4_moe.kernels.dense.call import KernelCall as DenseKernelCall
from nvfp4_moe.kernels.dense.hopper import HALVES
from nvfp4_moe.kernels.launcher import cdiv, next_power_of_2
from nvfp4_moe.kernels.moe import launch
from nvfp4_moe.kernels.moe.hopper.config import CONFIGS, RingConfig
from nvfp4_moe.kernels.moe.hopper.dense_gemm import clear_kernel
from nvfp4_moe.kernels.moe.hopper.fragments import ROWS as ROWS_OF_TILE
from nvfp4_moe.kernels.moe.hopper.rows import in_fragments
from nvfp4_moe.kernels.moe.masked import launch as masked_launch
from nvfp4_moe.kernels.moe.masked.call import MaskedKernelCall
from nvfp4_moe.kernels.moe.permute import Permutation, permute
from nvfp4_moe.kernels.moe.tile_table import Config
from nvfp4_moe.kernels.triton_target import arch, launch_options
from nvfp4_moe.reference.activation import ActivationType
from nvfp4_moe.reference.moe.hidden_states import Activations
from nvfp4_moe.reference.moe.routing import Routing, RoutingMethodType
from nvfp4_moe.reference.numerics import e2m1
from nvfp4_moe.reference.quantize import dequantize
from nvfp4_moe.reference.recipe import Recipe
from nvfp4_moe.reference.weights.layout import gemm1_values, gemm2_values
from nvfp4_moe.reference.weights.prepare import assemble_experts

from ..calls import Answered, Call, FusedCall
from ..edge_calls import ActivationCall
from ..kernel_calls import case_of
from . import guarded
from .numbers import seeded
from .operation_calls import ProductCall
from .part_calls import exactly

Tensor = torch.Tensor
Named = Iterator[tuple[str, Callable[[], Call]]]
_A = ActivationType
ROWS = (3, 1, 0, 17, 8, 33, 16, 9)
"""Rows of each expert: none, one, whole tiles, and few behind which a fuller tile begins."""
SMALL = RingConfig((16, 8), 2, 1, 2)
NARROW = RingConfig((8,), 2, 1, 2)
GATHERED = RingConfig((64, 16, 8), 2, 2, 1, gathers=True)
"""Each warp that copies has rows, and the last stage has columns beyond K."""
_MULTIPROCESSORS = "hopper.launch.multiprocessors"
_FEW_PROGRAMS: dict[str, Any] = {_MULTIPROCESSORS: lambda device: 1}


@contextmanager
def few_programs(multiprocessors: int = 1) -> Iterator[None]:
    """Launch the programs of one or few multiprocessors, which have several tiles each."""
    with mock.patch(f"{launch.__package__}.{_MULTIPROCESSORS}", lambda device: multiprocessors):
        yield


def case(
    kind: ActivationType,
    hidden: int,
    intermediate: int,
    rows: tuple[int, ...] = ROWS,
    *,
    bf16: bool = False,
    parameters: bool = False,
) -> MoECase:
    """One slot a token, in any order, as many for each expert as `rows` says."""
    one = Routing(RoutingMethodType.Renormalize, 1)
    setting = Setting(
        "ring", sum(rows), hidden, intermediate, len(rows), one, kind, parameters=parameters
    )
    weights = 0.2 + host.uniform(seeded(4), sum(rows), 1)
    return replace(
        case_of(setting, bf16=bf16), ids=_ids(rows), weights=weights.bfloat16(), logits=None
    )


def _ids(rows: tuple[int, ...]) -> Tensor:
    """[T, 1] int32, in any order."""
    ids = torch.repeat_interleave(host.arange(len(rows)), torch.tensor(rows, device="cpu"))
    return ids[torch.randperm(len(ids), generator=seeded(3), device="cpu"), None].int()


def exact(
    kind: ActivationType,
    hidden: int,
    intermediate: int,
    rows: tuple[int, ...] = ROWS,
    *,
    bf16: bool = False,
) -> MoECase:
    """A case of -1, 0 and 1 under powers of two, whose sums never round: one output alone is right."""
    e, tokens, g = len(rows), sum(rows), seeded(hidden)

    def codes(*size: int, density: float) -> Tensor:
        value = host.integers(g, 0, 2, size) * 8 + 2  # the codes of 1 and -1
        return e2m1.pack(torch.where(host.uniform(g, *size) < density, value, 0).to(torch.uint8))

    def ones(*size: int) -> Tensor:
        return torch.full(size, 0x38, dtype=torch.uint8, device="cpu")  # 1.0 in e4m3

    power = host.powers(host.arange(e).remainder(3))
    experts = assemble_experts(
        codes(e, intermediate, hidden, density=0.2),
        ones(e, intermediate, hidden // 16),
        power,
        codes(e, hidden, intermediate, density=0.1),
        ones(e, hidden, intermediate // 16),
        1 / power,
        kind,
    )
    behind = experts.padded_hidden_size - hidden
    x = torch.nn.functional.pad(codes(tokens, hidden, density=0.3), (0, behind // 2))
    scales = torch.nn.functional.pad(ones(tokens, hidden // 16), (0, behind // 16))
    of_token = host.powers(host.arange(tokens).remainder(5).sub(2))
    states = Activations(x, scales, of_token)
    if bf16:
        states = Activations((dequantize(x, scales, 1.0) * of_token[:, None]).bfloat16())
    weights = host.powers(-host.arange(tokens).remainder(3))[:, None].bfloat16()
    one = Routing(RoutingMethodType.Renormalize, 1)
    return MoECase(
        "ring, exact", states, experts, one, e, ids=_ids(rows), weights=weights, exact=True
    )


@dataclass(frozen=True)
class MaskedCall:
    """The tokens of a case as masked input: each expert's behind one another, then NaN."""

    case: MoECase
    given: Activations  # the case's, or in bf16 what the call quantizes
    rows: tuple[int, ...]
    config: Config = SMALL

    def _place(self) -> Tensor:
        """Return bool [E, max_m], and more rows than any expert has."""
        return host.arange(max(self.rows) + 1) < torch.tensor(self.rows, device="cpu")[:, None]

    def answer(self, device: str = "cpu") -> Tensor:
        place, ids = self._place(), self.case.ids
        assert ids is not None
        order = ids[:, 0].argsort(stable=True)

        def spread(t: Tensor | None) -> Tensor | None:
            if t is None:
                return None
            raw = t.view(torch.uint8) if t.element_size() == 1 else t
            out = raw.new_full(
                (*place.shape, *t.shape[1:]), 0x7F if raw.element_size() == 1 else torch.nan
            )
            out[place] = raw[order]
            return out.view(t.dtype).flatten(0, 1)

        a, case = self.given, self.case
        call = MaskedKernelCall(
            Activations(*(spread(t) for t in (a.hidden_states, a.block_scales, a.per_token_scale))),
            torch.tensor(self.rows, dtype=torch.int32, device="cpu"),
            case.experts,
            8,
            recipe=case.recipe,
            quantize="per-token" if a.is_bf16 and not case.activations.is_bf16 else None,
        )
        with few_programs():
            got = masked_launch.fused_moe_masked(to_device(call, device), config=self.config).cpu()
        out = torch.empty(len(order), got.shape[2], dtype=got.dtype, device="cpu")
        out[order] = got[place]
        return out

    def judge(self) -> Answered:
        """As the layer, whose weights are 1."""
        ones = host.ones(sum(self.rows), 1).bfloat16()
        allowed = Allowed(replace(self.case, weights=ones))
        right = allowed.expected.double()
        return Answered(lambda got: not allowed.wrong(got).any(), torch.Tensor.double, right)


@dataclass(frozen=True)
class FarRowsCall:
    """A product whose last rows are 2^31 elements behind the first: x is ones, scaled row by row."""

    config: RingConfig
    width: int = 65536

    def _experts(self) -> Any:
        g = seeded(5)
        codes = host.integers(g, 0, 2, (1, self.width, 128)) * 8 + 2  # the codes of 1 and -1
        ones = torch.full((1, self.width, 8), 0x38, dtype=torch.uint8, device="cpu")
        w2 = e2m1.pack(codes.to(torch.uint8))
        w13, s13 = w2[:, :128, :].repeat(1, 1, self.width // 128), ones[:, :128]
        s13 = s13.repeat(1, 1, self.width // 128)
        one = host.ones(1)
        return assemble_experts(w13, s13, one, w2, ones, one, _A.Relu2)

    def _scales(self) -> Tensor:
        rows = 2**31 // self.width + 24
        return host.powers(host.arange(rows) % 9 - 4)

    def answer(self, device: str = "cpu") -> Tensor:
        scales, experts = self._scales().to(device), to_device(self._experts(), device)
        rows = len(scales)
        x = in_fragments(torch.ones(rows, 128, dtype=torch.bfloat16, device=device))
        p = permute(torch.zeros(rows, 1, dtype=torch.int32, device=device), 1, 0, self.config.bn)
        out = launch.gemm2(launch.Operand(x, None, scales), experts, p, rows, self.config)
        found = out[-32:].cpu()
        del out
        torch.cuda.empty_cache()
        return found

    def judge(self) -> Answered:
        sums = gemm2_values(self._experts(), 0).float().sum(1)
        return exactly((self._scales()[-32:, None] * sums).bfloat16())


@dataclass(frozen=True)
class FarGatheredCall:
    """A product whose last tokens, the only ones with a slot, are 2^31 elements behind the first."""

    config: RingConfig
    width: int = 65536
    slots: int = 8
    far: int = 2**31

    def _experts(self) -> Any:
        codes = host.integers(seeded(7), 0, 2, (1, 128, self.width)) * 8 + 2  # of 1 and -1
        ones = torch.full((1, 128, self.width // 16), 0x38, dtype=torch.uint8, device="cpu")
        w13, w2 = e2m1.pack(codes.to(torch.uint8)), host.zeros(1, self.width, 64).to(torch.uint8)
        s2, one = ones.view(1, self.width, 8), host.ones(1)
        return assemble_experts(w13, ones, one, w2, s2, one, _A.Identity)

    def _scales(self, tokens: int) -> Tensor:
        return host.powers(host.arange(tokens) % 9 - 4)

    def answer(self, device: str = "cpu") -> Tensor:
        tokens, experts = self.far // self.width + 24, to_device(self._experts(), device)
        x = torch.ones(tokens, self.width, dtype=torch.bfloat16, device=device)
        x[: -self.slots] = 0.0
        slots = torch.arange(tokens - self.slots, tokens, dtype=torch.int32, device=device)
        p = _one_tile(slots, 0, self.slots)
        operand = launch.Operand(x, None, self._scales(tokens).to(device))
        out = launch.gemm1(operand, experts, p, self.slots, 1, self.config, fp32=False).cpu()
        del x, operand
        torch.cuda.empty_cache()
        return out

    def judge(self) -> Answered:
        scales = self._scales(self.far // self.width + 24)[-self.slots :]
        sums = gemm1_values(self._experts(), 0).float().sum(1)
        return exactly((scales[:, None] * sums).bfloat16())


@dataclass(frozen=True)
class FarZerosCall:
    """Results of an odd number of strips whose last rows are 2^31 elements behind the first."""

    config: RingConfig
    width: int = 65536
    rows: int = 8
    far: int = 2**31

    def _experts(self) -> Any:
        half = self.width - 64
        w13 = torch.full((1, 2 * half, 64), 0x22, dtype=torch.uint8, device="cpu")
        s13 = torch.full((1, 2 * half, 8), 0x38, dtype=torch.uint8, device="cpu")
        w2, s2 = w13.view(1, 128, half), s13.view(1, 128, half // 8)
        one = host.ones(1)
        return assemble_experts(
            w13, s13, one, w2[..., : half // 2], s2[..., : half // 16], one, _A.Swiglu
        )

    def answer(self, device: str = "cpu") -> Tensor:
        rows, experts = self.far // self.width + 24, to_device(self._experts(), device)
        x = torch.ones(rows, 128, dtype=torch.bfloat16, device=device)
        p = _one_tile(host.zeros(1).int().to(device), rows - self.rows, self.rows)
        operand = launch.Operand(x, None, None, placed=True)
        out = launch.gemm1(operand, experts, p, rows, 1, self.config, fp32=False, fragments=True)
        written = out[-self.rows :].isnan().logical_not().cpu()
        del out
        torch.cuda.empty_cache()
        return written

    def judge(self) -> Answered:
        return exactly(torch.ones(self.rows, self.width, dtype=torch.bool, device="cpu"))


def _one_tile(expanded: Tensor, first: int, rows: int) -> Permutation:
    """Return the permutation of one expert whose rows from `first` are one tile."""
    tile = torch.tensor([[0, first, rows, 1]], dtype=torch.int32, device=expanded.device)
    return Permutation(expanded, expanded, tile, tile[:, 1] + rows)


@dataclass(frozen=True)
class FewProgramsCall:
    """A dense product in few programs, each of which has several tiles.

    Programs may share tiles: one begins the sums, the next goes on.
    """

    product: ProductCall
    multiprocessors: int = 1
    shared: bool = True

    def answer(self, device: str = "cpu") -> Tensor:
        p = self.product
        tiles = cdiv(p.m, p.config.bn) * cdiv(p.n, ROWS_OF_TILE.value)
        programs = p.config.programs * self.multiprocessors
        assert tiles > programs and (tiles % programs > 0) == self.shared
        with few_programs(self.multiprocessors):
            return p.answer(device)

    def judge(self) -> Answered:
        return self.product.judge()


@dataclass(frozen=True)
class GuardedCall:
    """A call whose GEMMs fail if they read or write behind one of their tensors (`guarded.py`)."""

    call: Call

    def answer(self, device: str = "cpu") -> Any:
        with mock.patch(f"{launch.__package__}.hopper.launch.launch", guarded.launch):
            return self.call.answer(device)

    def judge(self) -> Answered:
        return self.call.judge()


@dataclass(frozen=True)
class BarriersCall:
    """How many barriers a GEMM initializes, which no result shows, in the forms that a call launches."""

    name: str
    config: RingConfig

    def answer(self, device: str = "cpu") -> list[int]:
        from . import compiled  # which knows the calls by name

        return [one.barriers() for one in compiled.launches(self.name)]

    def judge(self) -> Answered:
        pairs = 2 * self.config.stages  # a full and an empty one of each stage
        return exactly([pairs] * (1 if "dense" in self.name else 2))


@dataclass(frozen=True)
class ClearCall:
    """The marks of handed-over sums, cleared for some programs, with other memory behind them."""

    programs: int

    def answer(self, device: str = "cpu") -> Tensor:
        size = next_power_of_2(self.programs)
        marks = torch.full((2 * size,), 7, dtype=torch.int32, device=device)
        options = {"ARCH": arch(marks.device), **launch_options(marks.device)}
        launcher.launch(clear_kernel, (1,), marks, self.programs, SIZE=size, **options)
        return marks.cpu()

    def judge(self) -> Answered:
        behind = 2 * next_power_of_2(self.programs) - self.programs
        return exactly(
            torch.tensor([0] * self.programs + [7] * behind, dtype=torch.int32, device="cpu")
        )


@dataclass(frozen=True)
class OnesProductCall:
    """A large dense product of rows of ones, scaled row by row, whose sums are those of the weights."""

    m: int
    n: int
    k: int
    kept: int
    """Rows that are compared, the last."""
    multiprocessors: int | None = None
    config: RingConfig = SMALL

    def _weights(self) -> Tensor:
        """Return codes of 1 and -1, [n, k]."""
        return (host.integers(seeded(6), 0, 2, (self.n, self.k)) * 8 + 2).to(torch.uint8)

    def _alpha(self) -> Tensor:
        return host.powers(host.arange(self.m) % 9 - 4)

    def answer(self, device: str = "cpu") -> Tensor:
        alpha, b = self._alpha().to(device), e2m1.pack(self._weights()).to(device)
        a = torch.full((self.m, self.k // 2), 0x22, dtype=torch.uint8, device=device)
        sizes = (cdiv(rows, 128) * 128 * self.k // 16 for rows in (self.m, self.n))
        sa, sb = (torch.full((size,), 0x38, dtype=torch.uint8, device=device) for size in sizes)
        out = torch.empty(self.m, self.n, dtype=torch.bfloat16, device=device)
        few = few_programs(self.multiprocessors) if self.multiprocessors else nullcontext()
        with few:
            dense_launch.mm_fp4(DenseKernelCall(a, b, sa, sb, alpha, False), out, self.config)
        found = out[-self.kept :].cpu()
        del out
        torch.cuda.empty_cache()
        return found

    def judge(self) -> Answered:
        sums = (1 - 2 * (self._weights() >> 3).float()).sum(1)
        return exactly((self._alpha()[-self.kept :, None] * sums).bfloat16())


def named() -> Named:
    """The quickest to compile first; the programs of a call are fewer than its tiles, and more."""
    few, alone = _FEW_PROGRAMS, RingConfig((16, 8), 2, 2, 1)
    three: dict[str, Any] = {_MULTIPROCESSORS: lambda device: 3}
    parts = RingConfig((24, 8), 2, 1, 2)  # the sums of 24 tokens are of two sizes
    yield "ring, exact", lambda: FusedCall(exact(_A.Relu2, 384, 128), SMALL, few)
    yield "ring, codes", lambda: _of(_A.Swiglu, 384, 192)
    yield "ring, exact, one program", lambda: FusedCall(exact(_A.Identity, 640, 256), alone, few)
    yield (
        "ring, exact, bf16",
        lambda: FusedCall(exact(_A.Identity, 272, 384, bf16=True), SMALL, few),
    )
    yield "ring, bf16", lambda: _of(_A.Swiglu, 144, 384, bf16=True)
    # Three strips of the first product leave half of 128 columns, in which there have to be zeros.
    yield "ring, bf16, three strips", lambda: _of(_A.Swiglu, 144, 192, bf16=True)
    yield (
        "ring, bf16, three strips, tiles of 64",
        lambda: _of(_A.Swiglu, 144, 192, (40, 9), CONFIGS[3], bf16=True),
    )
    yield "ring, gathered", lambda: FusedCall(exact(_A.Relu2, 272, 128), GATHERED, few)
    yield (
        "ring, gathered, two slots",
        lambda: FusedCall(_twice(case(_A.Swiglu, 384, 192, (3, 1, 0, 17, 8))), GATHERED, few),
    )
    yield (
        "ring, gathered, bf16",
        lambda: FusedCall(exact(_A.Identity, 272, 384, bf16=True), GATHERED, three),
    )
    for hidden in (256, 384):  # the last step is whole, or has 128 columns beyond K
        nan = functools.partial(_every_second_is_nan, hidden)
        yield (
            f"ring, gathered, NaN, {hidden} columns",
            lambda nan=nan: FusedCall(nan(), GATHERED, few),
        )
    yield "ring, gathered, few are local", lambda: FusedCall(_few_are_local(), GATHERED, few)
    # The widest tile has one eight of rows more than a second warp that copies.
    narrow = RingConfig((32, 16), 2, 2, 1, gathers=True)
    yield (
        "ring, gathered, tiles of 32",
        lambda: FusedCall(exact(_A.Relu2, 272, 128), narrow, few),
    )
    yield (
        "ring, gathered, 130 steps",
        lambda: FusedCall(exact(_A.Relu2, 16640, 128, (3,)), GATHERED),
    )
    yield "ring, gathered, no token", lambda: FusedCall(_elsewhere(), GATHERED)
    yield "ring, biases", lambda: _of(_A.Swiglu, 176, 112, parameters=True)
    yield "ring, biases, bf16", lambda: _of(_A.Swiglu, 144, 128, bf16=True, parameters=True)
    yield "ring, one token", lambda: FusedCall(exact(_A.Relu2, 384, 128, (0, 1)), CONFIGS[0])
    yield "ring, exact, parts", lambda: FusedCall(exact(_A.Relu2, 384, 128), parts, few)
    yield "ring, parts", lambda: _of(_A.Swiglu, 384, 192, ROWS, parts)
    yield "ring, no token", lambda: FusedCall(_elsewhere(), SMALL)
    for config in (*CONFIGS[1:], replace(CONFIGS[-1], gathers=not CONFIGS[-1].gathers)):
        rows = (3, config.bn + 1, 0, config.bn // 2 + 1, 2 * config.bn)
        yield (
            f"ring, tiles of {config.bn}{', gathered' * config.gathers}",
            functools.partial(_exact_of, config, rows),
        )
    yield "ring, 128 steps", lambda: FusedCall(exact(_A.Relu2, 16384, 128, (3,)), SMALL)
    yield "ring, tiles of 64, gated", lambda: _of(_A.Swiglu, 144, 64, (40, 9), CONFIGS[3])
    for static in moe_edges.static(Recipe()):
        if static.name.startswith(("Swiglu,", "Relu2,")):
            yield f"ring, {static.name}", functools.partial(FusedCall, static, SMALL)
    for mode in ("codes", "bf16", "quantized"):
        yield f"ring, masked, {mode}", functools.partial(_masked, mode, (3, 0, 17, 8))
    for one in moe_edges.activations(Recipe()):
        yield f"ring, {one.name}", functools.partial(ActivationCall, one, NARROW)
    # Tiles of one strip; the second begins at a row that is no expert's number.
    two = exact(_A.Relu2, 128, 128, (3, 1))
    yield "ring, guarded", lambda: GuardedCall(FusedCall(two, SMALL, few))
    yield (
        "ring, guarded, gathered, one token",
        lambda: GuardedCall(FusedCall(exact(_A.Relu2, 384, 128, (0, 1)), GATHERED, few)),
    )
    yield (
        "ring, guarded, bf16, three strips",
        lambda: GuardedCall(_of(_A.Swiglu, 144, 192, bf16=True)),
    )
    yield "ring, far rows", lambda: FarRowsCall(SMALL)
    yield "ring, gathered, far rows", lambda: FarGatheredCall(GATHERED)
    yield "ring, far rows, odd strips", lambda: FarZerosCall(SMALL)
    half = torch.float16
    yield "ring, dense", lambda: ProductCall(SMALL, by_row=True, k=192)
    yield "ring, dense, exact", lambda: ProductCall(SMALL, exact=True, k=448, out_dtype=half)
    yield "ring, dense, no alpha", lambda: ProductCall(SMALL, exact=True, scaled=False, k=192)
    yield "ring, dense, 8x4", lambda: ProductCall(alone, use_8x4=True, by_row=True, m=41, k=320)
    yield (
        "ring, dense, in turn",
        lambda: FewProgramsCall(ProductCall(SMALL, exact=True, m=41, k=192), shared=False),
    )
    yield (
        "ring, dense, shared",
        lambda: FewProgramsCall(ProductCall(SMALL, exact=True, m=41, n=300, k=448, out_dtype=half)),
    )
    yield (
        "ring, dense, shared by three",
        lambda: FewProgramsCall(ProductCall(alone, by_row=True, m=60, n=200, k=320), 3),
    )
    yield (
        "ring, dense, shared, parts",
        lambda: FewProgramsCall(ProductCall(parts, exact=True, by_row=True, m=57, n=300, k=320)),
    )
    yield (
        "ring, dense, guarded",
        lambda: GuardedCall(ProductCall(SMALL, by_row=True, m=41, k=192)),
    )
    yield "compiled, barriers of ring, dense", lambda: BarriersCall("ring, dense", SMALL)
    yield "compiled, barriers of ring, exact", lambda: BarriersCall("ring, exact", SMALL)
    for programs in (3, 264):
        yield f"ring, dense, {programs} cleared", functools.partial(ClearCall, programs)
    yield "ring, dense, parts", lambda: ProductCall(parts, by_row=True, m=41, k=192)
    # A tile that leaves less than 3 KiB of shared memory.
    yield "ring, dense, tiles of 256", lambda: ProductCall(CONFIGS[-1], by_row=True, m=259, k=192)
    yield "ring, dense, tiles of 64", lambda: ProductCall(CONFIGS[3], by_row=True, m=103, k=192)
    # Two tiles of four strips of 64 rows of weights; every second strip is the upper half of 128.
    yield (
        "ring, dense, half tiles",
        lambda: ProductCall(HALVES[1], exact=True, by_row=True, n=200, k=320),
    )
    # The last rows are 2^31 elements behind the first.
    yield "ring, dense, far rows", lambda: OnesProductCall(2**15 + 24, 2**16, 64, kept=32)
    # A number of tiles, of steps of a tile and of a program have a product over 2^31.
    far = functools.partial(OnesProductCall, 91 * 16, 91 * 128, 4096, kept=91 * 16)
    yield "ring, dense, far steps", lambda: far(multiprocessors=4096)
    yield "ring, dense, 128 steps", lambda: OnesProductCall(3, 136, 16384, kept=3)
    # The last of 24 tokens fill the narrower tile.
    for m, n in ((1, 1), (17, 128), (9, 129), (24, 129)):
        yield (
            f"ring, dense, {m} by {n}",
            functools.partial(ProductCall, SMALL, exact=True, m=m, n=n, k=64),
        )


def _exact_of(config: RingConfig, rows: tuple[int, ...]) -> FusedCall:
    wide = 128 * config.groups * (config.stages + 1)
    return FusedCall(exact(_A.Relu2, wide, 128, rows), config, _FEW_PROGRAMS)


def _of(
    kind: ActivationType,
    hidden: int,
    intermediate: int,
    rows: tuple[int, ...] = (3, 1, 0, 17, 8),
    config: RingConfig = SMALL,
    **options: bool,
) -> FusedCall:
    return FusedCall(case(kind, hidden, intermediate, rows, **options), config, _FEW_PROGRAMS)


def _twice(one: MoECase) -> MoECase:
    """Give each token of a case with one slot another one, of the next expert."""
    assert one.ids is not None and one.weights is not None
    ids = torch.cat([one.ids, (one.ids + 1) % one.num_experts], 1)
    routing = Routing(RoutingMethodType.Renormalize, 2)
    return replace(one, ids=ids, weights=one.weights.repeat(1, 2), routing=routing)


def _every_second_is_nan(hidden: int) -> MoECase:
    """Tokens in bf16 of which each second one is NaN, so that columns read behind a row are NaN."""
    found = case(_A.Swiglu, hidden, 192, (3, 1, 0, 17, 8), bf16=True)
    x = found.activations.hidden_states.clone()
    x[1::2] = torch.nan
    return replace(found, activations=Activations(x))


def _few_are_local() -> MoECase:
    """Four of twelve experts are local, so that slots are undefined behind those of the last one.

    The number that memory has there, 2^31 - 1, is of a row that is gigabytes behind the last.
    """
    five = Routing(RoutingMethodType.Renormalize, 5)
    return case_of(Setting("few are local", 7, 256, 128, 12, five, offset=3, local=4))


def _elsewhere() -> MoECase:
    """All slots are of another rank's experts."""
    found = case(_A.Swiglu, 128, 128, (2, 3))
    assert found.ids is not None
    return replace(found, ids=found.ids + 2, num_experts=4)


def _masked(mode: str, rows: tuple[int, ...]) -> MaskedCall:
    kind = _A.Relu2 if mode == "codes" else _A.Swiglu
    of_codes, of_bf16 = (case(kind, 272, 96, rows, bf16=bf16) for bf16 in (False, True))
    judged = of_bf16 if mode == "bf16" else of_codes
    return MaskedCall(judged, (of_codes if mode == "codes" else of_bf16).activations, rows)
