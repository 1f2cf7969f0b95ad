"""A failing case in one safetensors file: its tensors, and the rest as JSON in the metadata.

Nothing in a file is executed. Every tensor comes back with the bits it had; what a file says is checked
against what this version writes, and by the checks of the public call.
"""

# SPDX-License-Identifier: Apache-2.0
import enum
import json
import os
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any, TypeVar, get_args

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from .. import strict_json
from ..cases.moe_case import MoECase
from ..cases.quantize import Case, Mode
from ..differential import quantizers
from ..host import READING
from ..machine import machine
from ..reference.activation import ActivationType
from ..reference.bounds.accumulation import ANY_ORDER, CONTIGUOUS, FP32, Accumulation
from ..reference.layouts import from_linear, padded_shape, to_linear
from ..reference.moe.hidden_states import Activations
from ..reference.moe.layer import OUTPUT_DTYPES
from ..reference.moe.routing import Routing, RoutingMethodType
from ..reference.quantize import Quantized
from ..reference.recipe import BLOCK_SIZE, Recipe, SfLayout
from ..reference.weights.copies import LAYOUTS
from ..reference.weights.experts import Experts
from ..report import invocation

FORMAT = 1
_KEY = "nvfp4_moe"
ACCUMULATIONS = {a.name: a for a in (ANY_ORDER, CONTIGUOUS, FP32)}
_EXPERT_TENSORS = tuple(f.name for f in fields(Experts) if "torch.Tensor" in str(f.type))
_OUTPUTS = ("codes", "block_scales", "per_token_scale")


class ReplayFileError(ValueError):
    """A file that cannot be read as a failing case; the message has its path and what is wrong."""


@dataclass(frozen=True)
class Origin:
    """The place where a failure was found."""

    command: str = field(default_factory=invocation.named)
    machine: dict[str, Any] = field(default_factory=machine)
    note: str = ""  # what a backend said that raised, or why it was not run


@dataclass(frozen=True)
class QuantizerFailure:
    """Two quantizations of one tensor that should be the same bits."""

    x: torch.Tensor  # [M, K]
    case: Case
    outputs: dict[str, Quantized | None]  # of the two sides, as found; None: it raised
    origin: Origin = field(default_factory=Origin)

    @property
    def sides(self) -> tuple[str, str]:
        left, right = self.outputs
        return left, right

    @property
    def suspect(self) -> str:
        """The side that is no oracle; of two backends the second."""
        oracles = ("reference", quantizers.GOLDEN)
        return next((side for side in reversed(self.sides) if side not in oracles), "reference")


@dataclass(frozen=True)
class MoEFailure:
    """An output of the fused call that is not permitted."""

    case: MoECase
    backend: str
    output: torch.Tensor | None  # [T, H] bf16, as it was found; None: it raised, or was not run
    configuration: str | None = None
    accumulation: Accumulation = ANY_ORDER
    origin: Origin = field(default_factory=Origin)


Failure = QuantizerFailure | MoEFailure


def rows_of(q: Quantized, rows: Sequence[int], case: Case) -> Quantized:
    """Some rows of an output that cannot be computed anew, padding zero."""
    index = list(rows)
    columns = q.codes.shape[1] * 2 // BLOCK_SIZE
    linear = to_linear(q.block_scales, q.codes.shape[0], columns, case.layout)
    scale = q.per_token_scale
    return Quantized(
        q.codes[index].contiguous(),
        from_linear(linear[index], case.layout),
        None if scale is None else scale[index].contiguous(),
    )


def save_quantizer(path: str | Path, failure: QuantizerFailure) -> None:
    """Write the file.

    Raises:
        OSError: it cannot be written.
    """
    case = failure.case
    tensors: dict[str, torch.Tensor | None] = {"x": failure.x}
    for i, q in enumerate(failure.outputs.values()):
        tensors |= {f"{i}.{name}": getattr(q, name, None) for name in _OUTPUTS}
    facts = {
        "kind": "quantizer",
        "sides": list(failure.sides),
        "raised": [side for side, q in failure.outputs.items() if q is None],
        "mode": case.mode,
        "recipe": case.recipe.code,
        "layout": case.layout.name,
        # Of a float JSON keeps the value to the bit, but for the bits of a NaN.
        "global_scale": case.global_scale,
    }
    _write(path, tensors, facts, failure.origin)


def save_moe(path: str | Path, failure: MoEFailure) -> None:
    """Write the file; copies in other layouts are not in it, but are made anew by `load`.

    Raises:
        OSError: it cannot be written.
    """
    c = failure.case
    e, r = c.experts, c.routing
    tensors: dict[str, torch.Tensor | None] = {
        f"experts.{name}": getattr(e, name) for name in _EXPERT_TENSORS
    }
    tensors |= {
        f"activations.{f.name}": getattr(c.activations, f.name) for f in fields(Activations)
    }
    tensors |= {name: getattr(c, name) for name in ("logits", "routing_bias", "ids", "weights")}
    tensors["output"] = failure.output
    facts = {
        "kind": "moe",
        "backend": failure.backend,
        "configuration": failure.configuration,
        "raised": failure.output is None,
        "accumulation": failure.accumulation.name,
        "name": c.name,
        "num_experts": c.num_experts,
        "local_expert_offset": c.local_expert_offset,
        "recipe": c.recipe.code,
        "build": c.build,
        "finalize_order": c.finalize_order,
        "output_dtype": str(c.output_dtype).removeprefix("torch."),
        "exact": c.exact,
        "hidden_size": e.hidden_size,
        "intermediate_size": e.intermediate_size,
        "activation": e.activation.name,
        **{layout.field: layout.is_in(e) for layout in LAYOUTS},
        "routing": asdict(r) | {"method": r.method.name},
    }
    _write(path, tensors, facts, failure.origin)


def _write(
    path: str | Path,
    tensors: dict[str, Any],
    facts: dict[str, Any],
    origin: Origin,
) -> None:
    # Clones, since safetensors refuses tensors that share their memory.
    contents = {
        k: t.detach().cpu().contiguous().clone() for k, t in tensors.items() if t is not None
    }
    text = json.dumps({"format": FORMAT, **facts, "origin": asdict(origin)})
    save_file(contents, path, {_KEY: text})


def is_failing_case(path: Path) -> bool:
    """True if a file's description names it a failing case; the rest of it may be damaged."""
    try:
        if not path.is_file() or path.is_symlink():
            return False
        with safe_open(str(path), "pt") as file:
            return _KEY in (file.metadata() or {})
    except (OSError, SafetensorError):
        return False


def load(path: str | Path) -> Failure:
    """Read a file that `save_quantizer` or `save_moe` wrote.

    Raises:
        ReplayFileError: it is missing, cut off, of another format, or not what those write.
    """
    if os.path.exists(path) and not os.path.isfile(path):  # a FIFO would block
        raise ReplayFileError(f"{path}: it is not a regular file")
    try:
        with READING, safe_open(str(path), "pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise ReplayFileError(f"{path}: {error}") from error
    try:
        facts = strict_json.parse(metadata[_KEY]) if _KEY in metadata else None
        if not isinstance(facts, dict):
            raise ValueError("it has no description of a failing case")
        if facts.get("format") != FORMAT:
            raise ValueError(f"format is {facts.get('format')!r}; this version reads {FORMAT}")
        kind = facts.pop("kind", None)
        if kind not in _READERS:
            raise ValueError(f"kind is {kind!r}; it must be one of {', '.join(_READERS)}")
        del facts["format"]
        contents = _Contents(facts, tensors)
        failure = _READERS[kind](contents)
        contents.check_all_read()
        return failure
    except (ValueError, TypeError, KeyError) as error:
        reason = f"{error} is missing" if isinstance(error, KeyError) else str(error)
        raise ReplayFileError(f"{path} cannot be replayed: {reason}") from error


E = TypeVar("E", bound=enum.Enum)


class _Contents:
    """The contents of a file; each entry is taken once, and none may remain."""

    def __init__(self, facts: dict[str, Any], tensors: dict[str, torch.Tensor]):
        self.facts, self.tensors = facts, tensors

    def fact(self, name: str, *types: type) -> Any:
        value = self.facts.pop(name)
        if type(value) not in types:
            allowed = " or ".join(t.__name__ for t in types)
            raise ValueError(f"{name} is {value!r}; it must be {allowed}")
        if type(value) is int and abs(value) >= 2**31:
            raise ValueError(f"{name} is {value}; it must be less than 2**31")
        return value

    def member(self, name: str, options: type[E]) -> E:
        value = self.fact(name, str)
        if value not in options.__members__:
            raise ValueError(f"{name} is {value!r}; it must be one of {list(options.__members__)}")
        return options[value]

    def optional(self, *names: str, prefix: str = "") -> dict[str, Any]:
        return {name: self.tensors.pop(prefix + name, None) for name in names}

    def tensor(self, name: str, dtype: torch.dtype, shape: tuple[int, ...]) -> torch.Tensor:
        t = self.tensors.pop(name)
        if t.dtype != dtype or tuple(t.shape) != shape:
            raise ValueError(f"{name} is {t.dtype} {tuple(t.shape)}; it must be {dtype} {shape}")
        return t

    def origin(self) -> Origin:
        given = self.fact("origin", dict)
        if set(given) != {f.name for f in fields(Origin)}:
            raise ValueError(f"origin has {sorted(given)}")
        return Origin(**given)

    def check_all_read(self) -> None:
        if self.facts or self.tensors:
            raise ValueError(f"unknown: {', '.join([*self.facts, *self.tensors])}")


def _quantizer(contents: _Contents) -> QuantizerFailure:
    sides, raised = contents.fact("sides", list), contents.fact("raised", list)
    if len(sides) != 2 or len(set(sides)) != 2 or not all(type(side) is str for side in sides):
        raise ValueError(f"sides is {sides!r}; it must be two names")
    mode, scale = contents.fact("mode", str), contents.fact("global_scale", float, int, type(None))
    if mode not in get_args(Mode):
        raise ValueError(f"mode is {mode!r}; it must be one of {get_args(Mode)}")
    if (scale is None) == (mode == "global-scale"):
        raise ValueError(f"global_scale is {scale!r} in mode {mode}")
    layout = contents.member("layout", SfLayout)
    case = Case(mode, Recipe.from_code(contents.fact("recipe", int)), layout, scale)
    x = contents.tensors.pop("x")
    if (x.dtype == torch.float32) != (mode == "fp32 per-token"):
        raise ValueError(f"x is {x.dtype} in mode {mode}")
    quantizers.request(x, case)  # raises for what no quantizer takes
    rows, columns = x.shape

    def output(i: int) -> Quantized:
        scales = padded_shape(rows, columns // BLOCK_SIZE, layout)
        return Quantized(
            contents.tensor(f"{i}.codes", torch.uint8, (rows, columns // 2)),
            contents.tensor(f"{i}.block_scales", torch.uint8, scales),
            contents.tensor(f"{i}.per_token_scale", torch.float32, (rows,))
            if case.per_token
            else None,
        )

    outputs = {side: None if side in raised else output(i) for i, side in enumerate(sides)}
    return QuantizerFailure(x, case, outputs, contents.origin())


_OUTPUT_DTYPES = {str(t).removeprefix("torch."): t for t in OUTPUT_DTYPES}


def _moe(contents: _Contents) -> MoEFailure:
    routing = contents.fact("routing", dict)
    if routing.get("method") not in RoutingMethodType.__members__:
        raise ValueError(f"routing's method is {routing.get('method')!r}")
    experts = Experts(
        **contents.optional(*_EXPERT_TENSORS, prefix="experts."),
        hidden_size=contents.fact("hidden_size", int),
        intermediate_size=contents.fact("intermediate_size", int),
        activation=contents.member("activation", ActivationType),
    )
    dtype = contents.fact("output_dtype", str) if "output_dtype" in contents.facts else "bfloat16"
    if dtype not in _OUTPUT_DTYPES:
        raise ValueError(f"output_dtype is {dtype!r}; it must be one of {[*_OUTPUT_DTYPES]}")
    case = MoECase(
        contents.fact("name", str),
        Activations(
            **contents.optional(*(f.name for f in fields(Activations)), prefix="activations.")
        ),
        experts,
        Routing(**routing | {"method": RoutingMethodType[routing["method"]]}),
        contents.fact("num_experts", int),
        **contents.optional("logits", "routing_bias", "ids", "weights"),
        local_expert_offset=contents.fact("local_expert_offset", int),
        recipe=Recipe.from_code(contents.fact("recipe", int)),
        build=contents.fact("build", str),
        finalize_order=contents.fact("finalize_order", str),
        output_dtype=_OUTPUT_DTYPES[dtype],
        exact=contents.fact("exact", bool),
    )
    layouts = [layout for layout in LAYOUTS if contents.fact(layout.field, bool)]
    replace(case, build="cuda").request()  # raises for what no backend takes
    for name in ("input_scale", "intermediate_scale"):
        scale = getattr(experts, name)
        if scale is not None and (scale.dtype != torch.float32 or tuple(scale.shape) != (1,)):
            raise ValueError(f"experts.{name} is {scale.dtype} {tuple(scale.shape)}")
    for layout in layouts:
        experts = layout.add(experts)
    case = replace(case, experts=experts)
    case.request()
    accumulation = contents.fact("accumulation", str)
    if accumulation not in ACCUMULATIONS:
        raise ValueError(f"accumulation is {accumulation!r}; it must be among {[*ACCUMULATIONS]}")
    output = None
    if not contents.fact("raised", bool):
        shape = (case.activations.hidden_states.shape[0], experts.hidden_size)
        output = contents.tensor("output", case.output_dtype, shape)
    return MoEFailure(
        case,
        contents.fact("backend", str),
        output,
        contents.fact("configuration", str, type(None)),
        ACCUMULATIONS[accumulation],
        contents.origin(),
    )


_READERS: dict[Any, Callable[[_Contents], Failure]] = {"quantizer": _quantizer, "moe": _moe}
