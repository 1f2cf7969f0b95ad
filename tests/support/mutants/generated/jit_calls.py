"""Device functions called directly, on all of their arguments or on those at every edge.

The kernels name each function itself: `apply.py` finds by their names what is to be compiled anew.
"""

# SPDX-License-Identifier: Apache-2.0
import functools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from nvfp4_moe import host
from nvfp4_moe.kernels import triton_target as target
from nvfp4_moe.kernels.fused_quantize.kernel import _exp
from nvfp4_moe.kernels.jit.arithmetic import (
    add,
    add_magnitudes,
    div,
    flush,
    fma,
    from_bf16,
    larger,
    mul,
    mul_magnitude,
    rcp,
    reciprocal,
    smaller,
    sub,
    to_bf16,
)
from nvfp4_moe.kernels.jit.decode import decode_fourth, decode_values, operand_scale, scaled
from nvfp4_moe.kernels.jit.e2m1 import e2m1_encode, e2m1_encode_magnitudes
from nvfp4_moe.kernels.jit.e4m3 import e4m3_decode, e4m3_encode
from nvfp4_moe.kernels.jit.instructions import ex2_approx, tanh_approx
from nvfp4_moe.kernels.jit.pdl import await_previous
from nvfp4_moe.kernels.moe.routing import _sigmoid, instruction_table
from nvfp4_moe.reference import fused_quantize
from nvfp4_moe.reference.numerics import accumulate, e2m1, e4m3, fp32, functions

from ..calls import Answered, Call
from .numbers import around, factors_of_the_least, seeded, specials
from .part_calls import exactly

Tensor = torch.Tensor
_BLOCK = 512


@triton.jit
def of_two_kernel(
    a_ptr, b_ptr, c_ptr, table_ptr, y_ptr, N, NAME: tl.constexpr, FTZ: tl.constexpr,
    BLOCK: tl.constexpr, ARCH: tl.constexpr,
):  # fmt: skip
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    live = i < N
    a = tl.load(a_ptr + i, live, other=0)
    b = tl.load(b_ptr + i, live, other=0)
    if NAME == "mul":
        y = mul(a, b, FTZ, ARCH)
    elif NAME == "mul_magnitude":
        y = mul_magnitude(a, b, FTZ, ARCH)
    elif NAME == "sub":
        y = sub(a, b, FTZ, ARCH)
    elif NAME == "add":
        y = add(a, b, FTZ, ARCH)
    elif NAME == "add_magnitudes":
        y = add_magnitudes(a, b, FTZ, ARCH)
    elif NAME == "div":
        y = div(a, b, FTZ, ARCH)
    elif NAME == "smaller":
        y = smaller(a, b, ARCH)
    elif NAME == "larger":
        y = larger(a, b, ARCH)
    elif NAME == "fma":
        y = fma(a, b, tl.load(c_ptr + i, live, other=0), FTZ, ARCH)
    elif NAME == "flush":
        y = flush(a, FTZ, ARCH)
    elif NAME == "reciprocal":
        y = reciprocal(a, FTZ, ARCH)
    elif NAME == "rcp":
        y = rcp(a, table_ptr, ARCH)
    elif NAME == "to_bf16":
        y = from_bf16(to_bf16(a, ARCH), ARCH)
    elif NAME == "sigmoid":
        y = _sigmoid(a, table_ptr, True, ARCH)
    elif NAME == "from_bf16":
        y = from_bf16(a, ARCH)
    elif NAME == "ex2":
        y = ex2_approx(a, table_ptr, ARCH)
    elif NAME == "exp":
        y = _exp(a)
    elif NAME == "tanh":
        y = tanh_approx(a, table_ptr, ARCH)
    elif NAME == "e4m3_encode":
        y = e4m3_encode(a, ARCH)
    else:
        tl.static_assert(NAME == "e4m3_decode")
        y = e4m3_decode(a)
    tl.store(y_ptr + i, y, live)


@triton.jit
def e2m1_kernel(
    x_ptr, scale_ptr, words_ptr, values_ptr, NB, FTZ: tl.constexpr, ARCH: tl.constexpr,
):  # fmt: skip
    """Four rows of eight blocks: codes of x times scales, or with `values_ptr` of magnitudes."""
    block = (tl.program_id(0) * 4 + tl.arange(0, 4))[:, None] * NB + tl.program_id(1) * 8
    block += tl.arange(0, 8)[None, :]
    element = block[:, :, None] * 16 + tl.arange(0, 16)[None, None, :]
    x = tl.load(x_ptr + element)
    if values_ptr is None:
        words = e2m1_encode(x, tl.load(scale_ptr + block), FTZ, ARCH)
    else:
        words, values = e2m1_encode_magnitudes(x, ARCH)
        tl.store(values_ptr + element, values)
    tl.store(words_ptr + block[:, :, None] * 2 + tl.arange(0, 2)[None, None, :], words)


@triton.jit
def decode_words_kernel(words_ptr, scales_ptr, out_ptr, N, WHICH: tl.constexpr, BLOCK: tl.constexpr,
                        VALUES: tl.constexpr, ARCH: tl.constexpr):  # fmt: skip
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    words = tl.load(words_ptr + i)
    scale = tl.load(scales_ptr + i)
    if VALUES:
        y = decode_values(words, e4m3_decode(scale.to(tl.int32)), WHICH, ARCH)
        y = from_bf16(y, ARCH)
    else:
        y = scaled(decode_fourth(words, WHICH, ARCH), operand_scale(scale), ARCH).to(tl.float32)
    tl.store(out_ptr + i, y)


@functools.cache
def _patterns(dtype: torch.dtype) -> Tensor:
    """All 65,536 numbers of bf16 or fp16."""
    return torch.arange(-(2**15), 2**15, dtype=torch.int16, device="cpu").view(dtype)


@functools.cache
def _random() -> Tensor:
    """fp32 of any bits."""
    return torch.randint(
        -(2**31), 2**31, (1 << 15,), generator=seeded(21), dtype=torch.int32, device="cpu"
    ).view(torch.float32)


def _many() -> Tensor:
    return torch.cat([_patterns(torch.bfloat16).float(), _random(), specials()])


def _pairs() -> tuple[Tensor, Tensor]:
    """Every pair of 180 numbers, then random ones of like size, whose sums and quotients round."""
    some = torch.cat([specials(), host.normal(seeded(22), 96)])
    g = seeded(23)
    near = host.normal(g, 4096), host.normal(g, 4096)
    a, b = torch.meshgrid(some, some, indexing="ij")
    return torch.cat([a.flatten(), near[0]]), torch.cat([b.flatten(), near[1]])


_DECIDED_BY_AN_ULP = (
    -7.797612190246582, -10.718061447143555, 0.2323940545320511, 1.0899845361709595,
    -19.75469398498535, -16.288957595825195, 16.98673439025879, -12.907550811767578,
)  # fmt: skip
"""Arguments whose exponential an ulp of a coefficient changes, as a search has found."""


def _of_two(name: str, ftz: bool, least: bool = False) -> tuple[list[Tensor], Tensor]:
    """(arguments, results)"""
    if name in ("flush", "reciprocal", "rcp", "to_bf16", "exp", "ex2", "tanh", "sigmoid"):
        x = _many()
        if name == "exp":
            between = (host.arange(-126, 129).float() + 0.5) * math.log(2.0)  # two powers of two
            ends = around(torch.cat([host.fp32([87.0, 89.0, *_DECIDED_BY_AN_ULP]), between]))
            x = torch.cat([x, ends, host.normal(seeded(27), 1 << 15) * 30])
        if name == "ex2":
            steps = host.arange(-8, 9)
            ends = host.fp32([126.0, 127.0, 128.0, 149.0]).view(torch.int32)
            ends = (ends[:, None] + steps.int()).view(torch.float32).flatten()
            x = torch.cat([x, ends, -ends])
        if name == "to_bf16":
            half = (_patterns(torch.bfloat16).float().view(torch.int32) | 0x8000).view(
                torch.float32
            )
            x = torch.cat([x, around(half[half == half])])
        kept = fp32.flush if ftz else lambda t: t
        of: dict[str, Callable[[], Tensor]] = {
            "flush": lambda: kept(x),
            "reciprocal": lambda: kept(1 / kept(x)),
            "rcp": lambda: fp32.rcp_approx_ftz(x),
            "to_bf16": lambda: x.bfloat16().float(),
            "sigmoid": lambda: functions.Hopper().sigmoid(x),
            "exp": lambda: fused_quantize.exp(x),
            "ex2": lambda: functions.ex2_approx_ftz(x),
            "tanh": lambda: functions.tanh_approx(x),
        }
        return [x], of[name]()
    if name == "from_bf16":
        x = _patterns(torch.float16 if ftz else torch.bfloat16)
        return [x], x.float()
    if name == "e4m3_decode":
        byte = torch.arange(256, dtype=torch.int32, device="cpu")
        return [byte], e4m3.decode(byte.to(torch.uint8))
    if name == "e4m3_encode":
        numbers = e4m3.decode(torch.arange(127, dtype=torch.uint8, device="cpu"))
        between = torch.cat([numbers, (numbers[1:] + numbers[:-1]) / 2, host.fp32([464.0, 480.0])])
        every_nan = torch.tensor([0x7F800001, 0x7FFFFFFF], dtype=torch.int32, device="cpu")
        x = torch.cat([_many(), around(between), every_nan.view(torch.float32)])
        x = x[~torch.signbit(x)]
        return [x], e4m3.encode(x).int()
    a, b = factors_of_the_least() if least else _pairs()
    if name in ("smaller", "larger"):
        a, b = a.abs(), b.abs()
        return [a, b], (torch.fmin if name == "smaller" else torch.fmax)(a, b)
    if name == "fma":
        a, c = (
            (a if least else a.bfloat16().float()),
            b[torch.randperm(len(b), generator=seeded(24), device="cpu")],
        )
        near = -(a * b) * (1 + host.powers(host.integers(seeded(25), -24, -8, a.shape)))
        c = host.zeros(len(a)) if least else torch.where(host.arange(len(a)) % 2 == 0, c, near)
        ar = fp32.Arithmetic(ftz)
        return [a, b, c], accumulate.fma(ar.flush(a), ar.flush(b), c, ftz=ftz)
    ar = fp32.Arithmetic(ftz)
    first, second = ar.flush(a), ar.flush(b)
    result = {
        "mul": lambda: ar.mul(first, second),
        "mul_magnitude": lambda: ar.mul(first.abs(), second),
        "sub": lambda: ar.sub(first, second),
        "add": lambda: ar.add(first, second),
        "add_magnitudes": lambda: ar.add(first.abs(), second.abs()),
        "div": lambda: ar.div(first, second),
    }[name]()
    return [a, b], result


@dataclass(frozen=True)
class FunctionCall:
    """A function of `jit/arithmetic.py`, `instructions.py` or `e4m3.py`."""

    name: str
    ftz: bool = False
    least: bool = False  # results next to 2^-126

    def answer(self, device: str = "cpu") -> Tensor:
        given, want = _of_two(self.name, self.ftz, self.least)
        a, b, c = (t.to(device) for t in (*given, *[given[-1]] * (3 - len(given))))
        y = torch.empty(want.shape, dtype=want.dtype, device=device)
        table = torch.zeros(1, dtype=torch.int8, device=device)
        if device == "cpu":
            if self.name == "rcp":
                table = fp32.rcp_delta(a.device)
            elif self.name in ("ex2", "tanh", "sigmoid"):
                table = instruction_table(a.device)
        of_two_kernel[(triton.cdiv(len(a), _BLOCK),)](
            a, b, c, table, y, len(a), NAME=self.name, FTZ=self.ftz, BLOCK=_BLOCK,
            ARCH=target.arch(a.device), enable_fp_fusion=False,
        )  # fmt: skip
        return y.cpu()

    def judge(self) -> Answered:
        return exactly(_of_two(self.name, self.ftz, self.least)[1])


@dataclass(frozen=True)
class E2M1Call:
    """Blocks of all numbers of bf16 and of those next to ties, under scales of every size."""

    ftz: bool
    magnitudes: bool = False

    def _given(self) -> tuple[Tensor, Tensor]:
        ties = around(host.fp32([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0, 6.0, 7.0]))
        x = torch.cat([_patterns(torch.bfloat16).float(), ties, specials()])
        x = torch.nn.functional.pad(x, (0, -len(x) % 4096)).view(-1, 16, 16)
        x = x[torch.randperm(len(x), generator=seeded(26), device="cpu")]
        scales = host.fp32([1.0, 1 / 3, 2.0**-120, 2.0**100, 0.0, 2.5, 2.0**-130, 1.0])
        return (x.abs() if self.magnitudes else x), scales.repeat(x.shape[0], 2)

    def answer(self, device: str = "cpu") -> list[Tensor]:
        x, scales = (t.contiguous().to(device) for t in self._given())
        words = torch.empty((*scales.shape, 2), dtype=torch.int32, device=device)
        values = torch.empty_like(x) if self.magnitudes else None
        grid = x.shape[0] // 4, x.shape[1] // 8
        e2m1_kernel[grid](
            x, scales, words, values, x.shape[1], FTZ=self.ftz,
            ARCH=target.arch(x.device), enable_fp_fusion=False,
        )  # fmt: skip
        return [t.cpu() for t in (words, values) if t is not None]

    def judge(self) -> Answered:
        x, scales = self._given()
        if self.magnitudes:
            codes = e2m1.encode(x)
            return exactly([_words(codes), e2m1.decode(codes)])
        kept = fp32.flush if self.ftz else lambda t: t
        return exactly([_words(e2m1.encode(kept(kept(x) * kept(scales)[..., None])))])


@triton.jit
def wait_kernel(y_ptr, ARCH: tl.constexpr):
    await_previous(ARCH)
    tl.store(y_ptr, 1.0)


@dataclass(frozen=True)
class CompiledCall:
    """What no answer shows here: the instruction that waits, and code for a GPU that nobody has."""

    native: bool = False

    def answer(self, device: str = "cpu") -> list[bool]:
        if self.native:
            types = {"x_ptr": "*fp32", "scale_ptr": "*fp32", "words_ptr": "*i32", "NB": "i32"}
            constants = {"FTZ": True, "ARCH": 100}
            both = (
                _ptx(e2m1_kernel, 100, types, constants | {"values_ptr": None}),
                _ptx(e2m1_kernel, 100, types | {"values_ptr": "*fp32"}, constants),
            )
            return ["cvt.rn.satfinite.e2m1x2.f32" in ptx for ptx in both]
        found = [_ptx(wait_kernel, a, {"y_ptr": "*fp32"}, {"ARCH": a}) for a in (80, 90)]
        return ["griddepcontrol.wait" in ptx for ptx in found]

    def judge(self) -> Answered:
        return exactly([True, True] if self.native else [False, True])


def _ptx(kernel: Any, capability: int, types: dict[str, str], constants: dict[str, Any]) -> str:
    signature = {p.name: types.get(p.name, "constexpr") for p in kernel.params}
    source = ASTSource(kernel, signature=signature, constexprs=constants)
    ptx: str = triton.compile(source, target=GPUTarget("cuda", capability, 32)).asm["ptx"]
    return ptx


def _words(codes: Tensor) -> Tensor:
    return e2m1.pack(codes).contiguous().view(torch.int32)


@dataclass(frozen=True)
class DecodeWordsCall:
    """Every word of four codes, times every block scale or next to it."""

    values: bool

    def _given(self) -> tuple[Tensor, Tensor]:
        words = torch.arange(-(2**15), 2**15, dtype=torch.int16, device="cpu").repeat(2)
        scales = (host.arange(len(words)) * 37 % 128).to(torch.uint8)
        return words.view(torch.uint16), scales

    def answer(self, device: str = "cpu") -> list[Tensor]:
        words, scales = (t.to(device) for t in self._given())
        out = torch.empty(4, len(words), dtype=torch.float32, device=device)
        for which in range(4):
            decode_words_kernel[(len(words) // _BLOCK,)](
                words, scales, out[which], len(words), WHICH=which, BLOCK=_BLOCK,
                VALUES=self.values, ARCH=target.arch(words.device),
            )  # fmt: skip
        return [out.cpu()]

    def judge(self) -> Answered:
        words, scales = self._given()
        bits = words.view(torch.int16).int()
        codes = torch.stack([bits >> 4 * which & 15 for which in range(4)]).to(torch.uint8)
        size = 1.0 if self.values else 2.0**-8
        return exactly([e2m1.decode(codes) * e4m3.decode(scales) * size])


def named() -> Iterator[tuple[str, Callable[[], Call]]]:
    for name in (
        "mul",
        "mul_magnitude",
        "sub",
        "add",
        "add_magnitudes",
        "div",
        "fma",
        "flush",
        "reciprocal",
        "from_bf16",
    ):
        for ftz in (False, True):
            yield f"function, {name}, {ftz}", functools.partial(FunctionCall, name, ftz)
    for name in ("mul", "mul_magnitude", "fma"):
        yield f"function, {name}, least", functools.partial(FunctionCall, name, True, True)
    for name in ("smaller", "larger", "rcp", "to_bf16", "exp", "ex2", "tanh", "sigmoid"):
        yield f"function, {name}", functools.partial(FunctionCall, name)
    for name in ("e4m3_encode", "e4m3_decode"):
        yield f"function, {name}", functools.partial(FunctionCall, name)
    for ftz in (False, True):
        yield f"function, e2m1, {ftz}", functools.partial(E2M1Call, ftz)
    yield "function, e2m1, magnitudes", lambda: E2M1Call(False, True)
    for values in (False, True):
        yield f"function, decode, {values}", functools.partial(DecodeWordsCall, values)
    yield "compiled, wait", CompiledCall
    yield "compiled, e2m1 by an instruction", lambda: CompiledCall(True)
