"""A GPU's instructions in Triton's interpreter, which has none: what inline assembly does, to the bit.

Within `of_a_gpu`, kernels take the paths of a GPU. A result that is no number has one pattern, as there.
"""

# SPDX-License-Identifier: Apache-2.0
import functools
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any
from unittest import mock

import numpy as np
import torch
from triton import language as tl
from triton.runtime import interpreter

from nvfp4_moe.kernels import triton_target
from nvfp4_moe.kernels.jit import pdl
from nvfp4_moe.reference.numerics import accumulate, e2m1, e4m3, fp32, functions

Tensor = torch.Tensor
_ONES = (1 << 32) - 1
_OPERAND = re.compile(r"\{.*?\}|[^,]+")
"""A register, a number, or registers in braces."""


@contextmanager
def of_a_gpu(arch: int) -> Iterator[None]:
    """Let launches in the interpreter take the paths of a GPU."""
    builder = interpreter.InterpreterBuilder
    cast = builder.cast_impl

    def cast_impl(self: Any, source: Any, to: Any) -> Any:
        types = source.dtype.scalar, to.scalar
        # The interpreter's own takes subnormal numbers for zeros, and truncates.
        if types == (tl.bfloat16, tl.float32):
            wide = (source.data.astype(np.uint32) << 16).view(np.float32)
            return interpreter.TensorHandle(wide, to.scalar)
        if types == (tl.float32, tl.bfloat16):
            rounded = torch.from_numpy(source.data.copy()).bfloat16().view(torch.int16).numpy()
            return interpreter.TensorHandle(rounded.view(np.uint16), to.scalar)
        return cast(self, source, to)

    changes = {
        "cast_impl": cast_impl,
        "create_inline_asm": _inline_asm,
        "create_fma": _fused,
        # The interpreter's give NaN if either is.
        "create_maxnumf": lambda self, a, b: self.binary_op(a, b, np.fmax),
        "create_minnumf": lambda self, a, b: self.binary_op(a, b, np.fmin),
    }
    launching = [m for m in sys.modules.values() if vars(m).get("arch") is triton_target.arch]
    with ExitStack() as stack:
        for name, new in changes.items():
            stack.enter_context(mock.patch.object(builder, name, new))
        stack.enter_context(mock.patch.object(interpreter.ReduceOps, "generic_reduce", _reduced))
        stack.enter_context(mock.patch.object(pdl, "gdc_wait", lambda: None))
        for module in launching:
            stack.enter_context(mock.patch.object(module, "arch", lambda _: arch))
        yield


def _fused(_: Any, x: Any, y: Any, z: Any) -> Any:
    """Return x * y + z, rounded once, which the interpreter's own is not."""
    a, b, c = (torch.from_numpy(np.array(t.data)) for t in (x, y, z))
    return interpreter.TensorHandle(accumulate.fma(a, b, c).numpy(), z.dtype.scalar)


def _reduced(self: Any, given: tuple[Any, ...]) -> list[Any]:
    """Reduce by a function of the kernel: along the axis, and not one element at a time."""
    parts = [np.moveaxis(t.handle.data, self.axis, 0) for t in given]
    totals: Any = None
    for some in zip(*parts, strict=True):
        more = [self.to_tensor(np.array(d), t.dtype) for d, t in zip(some, given, strict=True)]
        totals = more if totals is None else self.combine_fn(*totals, *more)
        totals = totals if isinstance(totals, list | tuple) else [totals]
    return list(totals)


@dataclass(frozen=True)
class _Results:
    handles: list[Any]

    def get_result(self, i: int) -> Any:
        return self.handles[i]


def _inline_asm(
    _: Any, asm: str, constraints: str, values: list[Any], types: list[Any], pure: bool, pack: int
) -> _Results:
    """Run assembly: the registers $0 and on are of the results, those behind them of the values.

    A register of 32 bits has as many elements as fit in it, of `pack`; they do not mix.
    """
    sizes = [np.dtype(interpreter._get_np_dtype(t.scalar)).itemsize for t in types]
    sizes += [v.data.dtype.itemsize for v in values]
    assert len(constraints.split(",")) == sum(-(-pack * size // 4) for size in sizes)
    registers = {f"${len(types) + i}": _register(v.data) for i, v in enumerate(values)}
    for statement in re.sub(r"^\s*\{|\}\s*$", "", asm).split(";"):
        name, _, rest = statement.strip().partition(" ")
        if name in ("", ".reg"):
            continue
        operands = [o.strip("{}").split(",") for o in _OPERAND.findall(rest.replace(" ", ""))]
        to, *given = [[registers.get(n, n) for n in names] for names in operands]
        if name == "mov.b32":  # of parts to a whole, or the other way round
            (parts,) = given
            whole = sum(part << 32 // len(parts) * i for i, part in enumerate(parts))
            size = 32 // len(to)
            results = [whole >> size * i & (1 << size) - 1 for i in range(len(to))]
        else:
            results = [_operation(name)(*(_number(x) for (x,) in given)) & _ONES]
        registers |= dict(zip(operands[0], results, strict=True))
    return _Results([_handle(registers[f"${i}"], t.scalar) for i, t in enumerate(types)])


def _register(data: Any) -> Tensor:
    """Return the bits of the elements, of two or of four bytes."""
    data = np.ascontiguousarray(data)
    bits = data.view(np.int32 if data.dtype.itemsize == 4 else np.int16)
    return torch.from_numpy(bits.astype(np.int64)) & (1 << 8 * data.dtype.itemsize) - 1


def _handle(register: Tensor, type_: Any) -> Any:
    to = np.dtype(interpreter._get_np_dtype(type_))
    bits = register.numpy().astype(f"uint{8 * to.itemsize}")
    return interpreter.TensorHandle(bits.view(to), type_)


def _number(x: Tensor | str) -> Tensor:
    """Return a register, or a number that is written in its place."""
    return x if isinstance(x, Tensor) else torch.tensor(int(x.replace("0f", "0x"), 0))


def _fp32(register: Tensor) -> Tensor:
    return register.to(torch.int32).view(torch.float32)


def _of_fp32(result: Tensor) -> Tensor:
    bits = result.view(torch.int32).to(torch.int64)
    return torch.where(result.isnan(), 0x7FFFFFFF, bits)


def _operation(name: str) -> Callable[..., Tensor]:
    """Return what an instruction computes of registers."""
    kind, *modifiers = name.split(".")
    if kind in ("mul", "add", "sub", "div", "fma") or name.startswith("rcp.rn"):
        return _arithmetic(kind, "ftz" in modifiers)
    return _OTHERS[name]


def _arithmetic(kind: str, ftz: bool) -> Callable[..., Tensor]:
    ar = fp32.Arithmetic(ftz)
    compute: dict[str, Callable[..., Tensor]] = {
        "mul": ar.mul,
        "add": ar.add,
        "sub": ar.sub,
        "div": ar.div,
        "fma": functools.partial(accumulate.fma, ftz=ftz),
        "rcp": functools.partial(ar.div, 1.0),
    }

    def result(*registers: Tensor) -> Tensor:
        operands = torch.broadcast_tensors(*(ar.flush(_fp32(x)) for x in registers))
        return _of_fp32(compute[kind](*operands))

    return result


def _largest_halves(dtype: torch.dtype) -> Callable[[Tensor, Tensor], Tensor]:
    """Return what gives the larger magnitude of both halves, with the product of the signs."""

    def half(a: Tensor, b: Tensor) -> Tensor:
        x, y = ((h & 0x7FFF).to(torch.int16).view(dtype) for h in (a, b))
        larger = torch.fmax(x.float(), y.float()).to(dtype)
        bits = larger.view(torch.int16).to(torch.int64) | (a ^ b) & 0x8000
        return torch.where(larger.isnan(), 0x7FFF, bits)

    return lambda a, b: half(a & 0xFFFF, b & 0xFFFF) | half(a >> 16, b >> 16) << 16


def _fp16_of_e4m3(pair: Tensor) -> Tensor:
    low, high = (
        e4m3.decode(byte.to(torch.uint8)).half().view(torch.int16).to(torch.int64) & 0xFFFF
        for byte in (pair & 0xFF, pair >> 8)
    )
    return low | high << 16


def _lop3(a: Tensor, b: Tensor, c: Tensor, table: Tensor) -> Tensor:
    """Look up each bit of the result by those of the operands."""
    rows = [i for i in range(8) if table.item() >> i & 1]
    return functools.reduce(
        torch.Tensor.__or__,
        ((a if i & 4 else ~a) & (b if i & 2 else ~b) & (c if i & 1 else ~c) for i in rows),
    )


def _e4m3(x: Tensor) -> Tensor:
    return e4m3.encode(_fp32(x)).to(torch.int64)


def _e2m1(x: Tensor) -> Tensor:
    return e2m1.encode(_fp32(x)).to(torch.int64)


_OTHERS: dict[str, Callable[..., Tensor]] = {
    "abs.f32": lambda x: x & 0x7FFFFFFF,
    "rcp.approx.ftz.f32": lambda x: _of_fp32(fp32.rcp_approx_ftz(_fp32(x))),
    "max.xorsign.abs.bf16x2": _largest_halves(torch.bfloat16),
    "max.xorsign.abs.f16x2": _largest_halves(torch.float16),
    "ex2.approx.ftz.f32": lambda x: _of_fp32(functions.ex2_approx_ftz(_fp32(x))),
    "tanh.approx.f32": lambda x: _of_fp32(functions.tanh_approx(_fp32(x))),
    "cvt.rn.satfinite.e4m3x2.f32": lambda high, low: _e4m3(high) << 8 | _e4m3(low),
    "cvt.rn.satfinite.e2m1x2.f32": lambda high, low: _e2m1(high) << 4 | _e2m1(low),
    "cvt.rn.f16x2.e4m3x2": _fp16_of_e4m3,
    "cvt.f32.f16": lambda x: _of_fp32(x.to(torch.int16).view(torch.float16).float()),
    "cvt.u32.u16": lambda x: x,
    "shl.b32": lambda x, n: x << n,
    "shr.u32": lambda x, n: x >> n,
    "and.b32": lambda a, b: a & b,
    "lop3.b32": _lop3,
}
