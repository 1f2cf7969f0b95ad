"""The arithmetic of one element spelled out, a line a step: what a quantizer should have done there.

Every operation is done here once more, on its own, by the rules of `reference/quantize.py`; the values
are fp32 with their bits.
"""

# SPDX-License-Identifier: Apache-2.0
from dataclasses import dataclass, field

import torch

from .. import host
from ..cases.quantize import Case
from ..reference.numerics import e2m1, e4m3
from ..reference.numerics.fp32 import FLT_MAX, Arithmetic, rcp_approx_ftz
from ..reference.quantize import Quantized
from ..reference.recipe import BLOCK_SIZE, NVFP44Over6Config, NVFP44Over6ErrMode
from .compare import run_reference

_SIXTH = host.fp32([1.0 / 6.0])


def explain_element(x: torch.Tensor, case: Case, row: int, block: int, element: int) -> list[str]:
    """The reference's steps from the input to the code of x[row, 16 * block + element].

    Args:
        x: [M, K] fp16, bf16, fp32 or e4m3, as `run_reference` takes it.

    Raises:
        ValueError: there is no such element.
    """
    rows, blocks = x.shape[0], x.shape[1] // BLOCK_SIZE
    for name, index, count in (
        ("row", row, rows),
        ("block", block, blocks),
        ("element", element, BLOCK_SIZE),
    ):
        if not 0 <= index < count:
            raise ValueError(f"{name} is {index}; it must be 0 to {count - 1}")
    steps = _Steps(x[row].cpu(), case, row, block, element)
    if case.mode == "fp32 per-token":
        _fp32_per_token(steps)
    else:
        encode = _encode_scale(steps)
        if x.dtype == torch.float8_e4m3fn:
            _prescale(steps, encode)
        if x.dtype == torch.float8_e4m3fn and case.recipe.build == "cuda":
            _e4m3(steps, encode)
        elif case.recipe.four_over_six is None:
            _plain(steps, encode)
        else:
            _four_over_six(steps, encode, case.recipe.four_over_six)
    return steps.lines


def first_element(x: torch.Tensor, left: Quantized, right: Quantized, row: int, block: int) -> int:
    """The element of a block to explain: the first whose codes differ, else the largest."""
    place = slice(block * BLOCK_SIZE // 2, (block + 1) * BLOCK_SIZE // 2)
    a, b = (e2m1.unpack(side.codes[row, place].cpu()) for side in (left, right))
    if (a != b).any():
        return int((a != b).nonzero()[0])
    return _top(x[row, block * BLOCK_SIZE :][:BLOCK_SIZE].cpu())


def bits(t: torch.Tensor) -> str:
    """A float's bits in hex, and its value: 0x3f80 (1)."""
    size = t.element_size()
    pattern = int(t.reshape(1).view({1: torch.uint8, 2: torch.int16, 4: torch.int32}[size]))
    return f"0x{pattern & (1 << 8 * size) - 1:0{2 * size}x} ({float(t):.9g})"


def _top(values: torch.Tensor) -> int:
    """Return the index of the largest magnitude; NaN counts as none."""
    a = (values.float() if values.dtype == torch.float8_e4m3fn else values).abs()
    return int(a.masked_fill(a.isnan(), -1.0).argmax())


@dataclass
class _Steps:
    """The row, and what has been said of it; values are fp32 tensors of one element."""

    line: torch.Tensor  # [K]
    case: Case
    row: int
    block: int
    element: int
    lines: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.ar = Arithmetic(ftz=self.case.recipe.build == "cuda")
        start = self.block * BLOCK_SIZE
        self.values = self.line[start : start + BLOCK_SIZE]
        value = self.values[self.element : self.element + 1]
        self.x = self.ar.flush(value.float())
        self.lines.append(f"x[{self.row}, {start + self.element}] = {bits(value)}")

    @property
    def fast(self) -> bool:
        return self.case.recipe.math == "fast"

    def say(self, name: str, how: str, value: torch.Tensor) -> torch.Tensor:
        self.lines.append(" = ".join(filter(None, (name, how, bits(value)))))
        return value

    def maximum(self, name: str, first: int, values: torch.Tensor, none: float) -> torch.Tensor:
        """The largest magnitude of columns from `first` on; `none` if all are NaN."""
        at = _top(values)
        top = values[at : at + 1].abs().float()
        where = f"|x[{self.row}, {first + at}]|"
        if top.isnan():
            return self.say(name, "of nothing but NaN", host.fp32([none]))
        flushed = self.ar.flush(top)
        return self.say(name, where + (", flushed" if flushed != top else ""), flushed)

    def block_maximum(self) -> torch.Tensor:
        return self.maximum("block maximum V", self.block * BLOCK_SIZE, self.values, torch.nan)

    def reciprocal(self, what: str, value: torch.Tensor) -> tuple[str, torch.Tensor]:
        """By the math of the recipe: (how, value)."""
        if self.fast:
            return f"rcp({what})", rcp_approx_ftz(value)
        return f"(1 / {what})", self.ar.div(1.0, value)

    def scale_byte(self, name: str, what: str, unrounded: torch.Tensor) -> torch.Tensor:
        """The block scale, as fp32."""
        byte = e4m3.encode(unrounded)
        self.lines.append(
            f"{name} = e4m3({what}) = 0x{int(byte):02x} ({float(e4m3.decode(byte)):.9g})"
        )
        return e4m3.decode(byte)

    def code(self, name: str, factor: torch.Tensor, factor_name: str) -> torch.Tensor:
        """The code of the element, as fp32."""
        scaled = self.say(f"x * {factor_name}", "", self.ar.mul(self.x, factor))
        code = e2m1.encode(scaled)
        self.lines.append(f"{name} = e2m1(that) = 0x{int(code):x} ({float(e2m1.decode(code)):g})")
        return e2m1.decode(code)


def _encode_scale(s: _Steps) -> torch.Tensor:
    """enc, and the per-token scale where there is one."""
    if not s.case.per_token:
        given = torch.as_tensor(s.case.scale(s.line[None]), dtype=torch.float32, device="cpu")
        return s.say("encode scale enc", "given", s.ar.flush(given.reshape(1)))
    recipe = s.case.recipe
    g = s.say("g", f"1 / (6 * {recipe.e4m3_max})", host.fp32([recipe.base_scale_inv]))
    a = s.maximum("row maximum A", 0, s.line, 0.0)
    zero_row = 0.0 if recipe.four_over_six else FLT_MAX
    if s.fast:
        scale = s.say("per-token scale", "A * g", s.ar.mul(a, g))
        if recipe.build == "cuda" and scale == 0:
            return s.say("encode scale enc", "0, since A * g is 0", host.zeros(1))
        if recipe.build != "cuda" and a == 0:
            return s.say("encode scale enc", "that of a zero row", host.fp32([zero_row]))
        return s.say("encode scale enc", "rcp(A * g)", rcp_approx_ftz(scale))
    if a == 0:
        s.say("per-token scale", "0, since A is 0", host.zeros(1))
        return s.say("encode scale enc", "that of a zero row", host.fp32([zero_row]))
    inverse = s.say("1 / g", "", s.ar.div(1.0, g))
    encode = s.say("(1/g) / A", "", s.ar.div(inverse, a))
    encode = s.say("encode scale enc", "min(that, FLT_MAX)", s.ar.min_flt_max(encode))
    if encode == 0:
        encode = s.say("encode scale enc", "1, since that is 0", host.ones(1))
    s.say("per-token scale", "1 / enc", s.ar.div(1.0, encode))
    return encode


def _output_scale(s: _Steps, scale: torch.Tensor, n: str, encode: torch.Tensor) -> torch.Tensor:
    """Explain a block with this rounded scale; `n` names a 4over6 candidate, "4" or "6", or is empty."""
    how, decode = s.reciprocal("enc", encode)
    product = s.say(f"sf{n} * {how}", "", s.ar.mul(scale, decode))
    how, factor = s.reciprocal("that", product)
    if not s.fast:
        how, factor = f"min({how.strip('()')}, FLT_MAX)", s.ar.min_flt_max(factor)
    return s.say(f"output scale{n}", how, factor)


def _fast_unrounded(s: _Steps, v: torch.Tensor, encode: torch.Tensor, name: str) -> torch.Tensor:
    sixth = s.say("V * rcp(6)", "", s.ar.mul(v, _SIXTH))
    return s.say(name, "enc * that", s.ar.mul(encode, sixth))


def _plain(s: _Steps, encode: torch.Tensor) -> None:
    v = s.block_maximum()
    if s.fast:
        unrounded = _fast_unrounded(s, v, encode, "block scale, unrounded")
    elif v == 0:
        unrounded = s.say("block scale, unrounded", "0, since V is 0", host.zeros(1))
    else:
        sixth = s.say("enc * (1/6)", "", s.ar.mul(encode, _SIXTH))
        unrounded = s.say("block scale, unrounded", "V * that", s.ar.mul(v, sixth))
    scale = s.scale_byte("block scale sf", "that", unrounded)
    by_scale = s.fast and s.case.recipe.build == "cute-dsl"
    if (scale if by_scale else v) == 0:
        why = f"0, since {'sf' if by_scale else 'V'} is 0"
        factor = s.say("output scale", why, host.zeros(1))
    else:
        factor = _output_scale(s, scale, "", encode)
    s.code("code", factor, "output scale")


def _prescale(s: _Steps, encode: torch.Tensor) -> None:
    """The elements of e4m3 are brought into fp16 by 6 over the encode scale."""
    if s.case.recipe.math == "exact" and s.case.recipe.build == "cute-dsl":
        how, decode = "(1 / enc)", s.ar.div(1.0, encode)
    else:
        how, decode = "rcp(enc)", rcp_approx_ftz(encode)
    factor = s.say("prescale", f"{how} * 6", s.ar.mul(decode, e2m1.MAX))
    s.values = s.ar.mul(s.values.float(), factor).half()
    s.x = s.values[s.element : s.element + 1].float()
    s.say("x", "fp16(x * prescale)", s.x)


def _e4m3(s: _Steps, encode: torch.Tensor) -> None:
    """The rule that the CUDA build has for e4m3 alone, in fast math whatever the recipe's."""
    unrounded = _fast_unrounded(s, s.block_maximum(), encode, "block scale, unrounded")
    scale = s.scale_byte("block scale sf", "that", unrounded)
    if unrounded == 0:
        factor = s.say("output scale", "0, since the unrounded scale is 0", host.zeros(1))
    else:
        inverse = s.say("rcp(sf)", "", rcp_approx_ftz(scale))
        factor = s.say("output scale", "that * enc", s.ar.mul(inverse, encode))
    s.code("code", factor, "output scale")


def _four_over_six(s: _Steps, encode: torch.Tensor, config: NVFP44Over6Config) -> None:
    v = s.block_maximum()
    if v == 0:
        s.lines.append("block scale 0x00 and code 0, since V is 0")
        return
    if s.fast:
        s6 = _fast_unrounded(s, v, encode, "s6")
    else:
        sixth = s.say("V / 6", "", s.ar.div(v, e2m1.MAX))
        s6 = s.say("s6", "that * enc", s.ar.mul(sixth, encode))
    s4 = s.say("s4", "1.5 * s6", s.ar.mul(s6, 1.5))
    steps = run_reference(s.line[None], s.case, keep_steps=True).steps
    errors, codes = {}, {}
    for n, unrounded in ((6, s6), (4, s4)):
        scale = s.scale_byte(f"sf{n}", f"s{n}", unrounded)
        factor = _output_scale(s, scale, str(n), encode)
        codes[n] = s.code(f"code{n}", factor, f"output scale{n}")
        _difference(s, codes[n], scale, encode, n, config)
        mode = NVFP44Over6ErrMode(int(config.err_mode))
        term = "|d|" if mode == NVFP44Over6ErrMode.MAE else "d * d"
        errors[n] = s.say(
            f"error{n}",
            f"sum of {term} over the 16 elements, left to right",
            steps[f"error_of_{n}"][0, s.block : s.block + 1],
        )
    taken, why = (4, "<") if errors[4] < errors[6] else (6, "is not <")
    s.lines.append(f"error4 {why} error6, so the block has sf{taken} and code{taken}")


def _difference(
    s: _Steps,
    code: torch.Tensor,
    scale: torch.Tensor,
    encode: torch.Tensor,
    n: int,
    config: NVFP44Over6Config,
) -> None:
    """d of this element under one candidate."""
    scaled = s.say(f"code{n} * sf{n}", "", code * scale)
    if config.err_use_fast_math:
        wanted = s.say("x * enc", "", s.ar.mul(s.x, encode))
        s.say(f"d{n}", "the one minus the other", s.ar.sub(scaled, wanted))
        return
    a = host.zeros(1)
    if s.case.mode == "per-token":
        a = s.ar.flush(s.line[_top(s.line)].abs().nan_to_num(nan=0.0, posinf=torch.inf).float())
    if a > 0:
        product = s.say("that * A", "", s.ar.mul(scaled, a))
        divisor = e2m1.MAX * config.e4m3_max
        value = s.say("dequantized", f"that / {divisor:g}", s.ar.div(product, divisor))
    else:
        how, decode = s.reciprocal("enc", encode)
        value = s.say("dequantized", f"that * {how}", s.ar.mul(scaled, decode))
    s.say(f"d{n}", "dequantized - x", s.ar.sub(value, s.x))


def _fp32_per_token(s: _Steps) -> None:
    g = s.say("g", "1 / (6 * 448)", host.fp32([s.case.recipe.base_scale_inv]))
    a = s.maximum("row maximum A", 0, s.line, 0.0)
    per_token = s.say("per-token scale", "A * g", s.ar.mul(a, g))
    v = s.maximum("block maximum V", s.block * BLOCK_SIZE, s.values, 0.0)
    if v == 0:
        factor = s.say("output scale", "0, since V is 0", host.zeros(1))
    else:
        inverse = s.say("rcp(V)", "", rcp_approx_ftz(v))
        factor = s.say("output scale", "6 * rcp(V)", s.ar.mul(inverse, e2m1.MAX))
    product = s.say("(A * g) * output scale", "", s.ar.mul(per_token, factor))
    if product == 0:
        unrounded = s.say("block scale, unrounded", "0, since that is 0", host.zeros(1))
    else:
        unrounded = s.say("block scale, unrounded", "rcp(that)", rcp_approx_ftz(product))
    s.scale_byte("block scale sf", "that", unrounded)
    s.code("code", factor, "output scale")
