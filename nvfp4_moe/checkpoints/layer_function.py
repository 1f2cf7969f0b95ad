"""Finds what the experts of a checkpoint compute, by its config.json and the caller's arguments.

A caller's argument always counts before the configuration. A field that would change the function, and
that cannot be followed, is refused by its name. The fields are data: `model_fields.py`.
"""

# SPDX-License-Identifier: Apache-2.0
import math
import re
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from ..reference.activation import ActivationType, ParameterName
from .errors import CheckpointError
from .folder import Folder
from .layers import Layer
from .model_config import is_model, model_config
from .model_fields import (
    ACTIVATION_FIELDS,
    ACTIVATIONS,
    ELSEWHERE,
    HARMLESS,
    OAI,
    OAI_ACTIVATIONS,
    OAI_MODELS,
    PARAMETER_FIELDS,
    REFUSED_FIELDS,
    SUSPECTS,
    UNSERVED_MODELS,
    WEIGHT_ON_INPUT_FIELDS,
    WEIGHT_ON_INPUT_MODELS,
)
from .schema import NUMBER, shown

Given = torch.Tensor | float | None
_PARTS = re.compile(r"moe|ffn|mlp|expert")
_OTHER = re.compile(r"quant|compress|clip")  # descriptions of formats; CLIP is a vision model
_DRAFT = re.compile(r"(^|\.)(mtp|nextn|draft|eagle)")
_PLAIN = re.compile(r"[\w.\[\]]{1,120}")
_FP32_MAX = torch.finfo(torch.float32).max
_NEUTRAL = {"alpha": 1.0, "beta": 0.0, "clamp_limit": math.inf}
"""By parameter, of activations that have none: a field or an argument of it then asks for nothing."""


@dataclass(frozen=True)
class Function:
    """The experts' activation, its parameters in physical units, and the place of the router's weight.

    `limit_field` is the entry of config.json that asks for the clamp_limit; None of the caller's.
    """

    activation: ActivationType
    alpha: Given
    beta: Given
    clamp_limit: Given
    router_weight_on_input: bool
    limit_field: str | None


def function_of(
    folder: Folder,
    layer: Layer,
    *,
    activation: ActivationType | None = None,
    alpha: Given = None,
    beta: Given = None,
    clamp_limit: Given = None,
) -> Function:
    """Return the function of one layer of experts.

    Args:
        activation, alpha, beta, clamp_limit: the caller's, None where the configuration decides. A
            clamp_limit of infinity says that there is none, an alpha of 1 and a beta of 0 likewise.

    Raises:
        CheckpointError: with every field of config.json that cannot be followed.
        ValueError: `activation` does not fit the tensors.
    """
    given: dict[ParameterName, Given] = {"alpha": alpha, "beta": beta, "clamp_limit": clamp_limit}
    reading = _Reading(model_config(folder), layer)
    kind = reading.activation(activation)
    found = {name: reading.parameter(name, kind, value) for name, value in given.items()}
    arguments = [("activation", activation), *given.items()]
    reading.unknown_fields(kind, [name for name, value in arguments if value is not None])
    if reading.problems:
        raise CheckpointError(folder.path, [f"config.json: {p}" for p in reading.problems])
    assert kind is not None, "a problem otherwise"
    field = reading.limit_field if clamp_limit is None else None
    return Function(
        kind, **found, router_weight_on_input=reading.weight_on_input(), limit_field=field
    )


class _Reading:
    """Reads the fields of one model's configuration, and collects what cannot be followed."""

    def __init__(self, config: Mapping[str, Any], layer: Layer):
        self._config, self._layer = config, layer
        self.problems: list[str] = []
        self._names = {f: config[f] for f in ACTIVATION_FIELDS if config.get(f) is not None}
        self._oai = is_model(config, OAI_MODELS) is not None or any(
            str(name).lower() in OAI_ACTIVATIONS for name in self._names.values()
        )
        if (model := is_model(config, UNSERVED_MODELS)) is not None:
            self.problems.append(
                f"model_type is {shown(config.get('model_type'))}, which {UNSERVED_MODELS[model]}; "
                "nothing here computes that"
            )

    def activation(self, given: ActivationType | None) -> ActivationType | None:
        """Return the caller's value, else the configuration's; None, and a problem, if there is none."""
        gated = self._layer.gated
        if given is not None:
            if given.gated != gated:
                raise ValueError(
                    f"activation is {given.name}, which is {'' if given.gated else 'not '}gated; "
                    f"{self._layer.module} has {'' if gated else 'no '}gate projections"
                )
            return given
        kinds = {f: ACTIVATIONS.get((str(n).lower(), gated)) for f, n in self._names.items()}
        if not kinds and self._oai:
            kinds = {"model_type": ActivationType.Swiglu}
        field = next(iter(kinds), "hidden_act")
        kind = kinds.get(field)
        if kind is None:
            self.problems.append(
                f"{field} is {shown(self._names.get(field))}, with{'' if gated else 'out'} gate "
                "projections, which is no activation known here; give `activation`"
            )
        elif len(set(kinds.values())) > 1:
            each = " and ".join(f"{f} is {shown(self._names[f])}" for f in kinds)
            self.problems.append(f"{each}, which are two activations; give `activation`")
        elif kind == ActivationType.Swiglu and self._clamps_after():
            if self._oai:
                self.problems.append(
                    "swiglu_limits clamps the SiLU's result, which the activation of this model_type or "
                    f"{field} does not; give `activation`"
                )
            return ActivationType.SwigluStep
        return kind

    def parameter(self, name: ParameterName, kind: ActivationType | None, given: Given) -> Given:
        """Return the caller's, else the configuration's, else the model's value; None without effect."""
        if given is not None:
            return None if _is_neutral(given, name, kind) else given
        values = {f: v for f, v in self._values(name) if v is not None}
        if kind is None:
            return None
        for field, value in values.items():
            wanted = PARAMETER_FIELDS[field].activation
            if not _fits(kind, wanted, name) and not _is_neutral(value, name, wanted):
                self.problems.append(
                    f"{field} is {value}, of {wanted.name}; the activation is {kind.name}, which has "
                    f"no such {name}; give `activation`, or `{name}` to overrule it"
                )
        meanings = {(PARAMETER_FIELDS[f].activation, v) for f, v in values.items()}
        if len(meanings) > 1:
            each = " and ".join(f"{f} is {v}" for f, v in values.items())
            self.problems.append(f"{each}, which contradict each other; give `{name}`")
        found = next(iter(values.values()), None)
        if found is None:
            return self._default(name, kind)
        return None if _is_neutral(found, name, kind) else found

    def _default(self, name: ParameterName, kind: ActivationType) -> float | None:
        """Return the value of a parameter that no field gives; add a problem if none is safe."""
        if kind == ActivationType.Swiglu and self._oai:
            return OAI[name]
        if name == "beta":
            alpha = self._config.get("swiglu_alpha")
            if kind == ActivationType.Swiglu and alpha not in (None, 1):
                self.problems.append(
                    f"swiglu_alpha is {shown(alpha)} without swiglu_beta, which GPT-OSS and MiniMax-M3 "
                    "have at 1; give `beta`"
                )
            if kind == ActivationType.Situ and "situ" in map(str, self._names.values()):
                self.problems.append(
                    "activation_situ_linear_beta is missing: up is then linear, which SiTU here is "
                    "not; give `beta`"
                )
        return None

    @property
    def limit_field(self) -> str | None:
        """Return the first field that has a limit, or stands for one."""
        found = [f for f, v in self._values("clamp_limit") if v is not None]
        return next(iter([*found, *(["model_type"] if self._oai else [])]), None)

    def weight_on_input(self) -> bool:
        """True if the router's weight multiplies the rows before the experts."""
        if is_model(self._config, WEIGHT_ON_INPUT_MODELS) is not None:
            return True
        return any(bool(self._config.get(field)) for field in WEIGHT_ON_INPUT_FIELDS)

    def unknown_fields(self, kind: ActivationType | None, given: Collection[str]) -> None:
        """Refuse every field that could change the function and that nothing here knows.

        Args:
            given: the names of the caller's arguments, each of which answers for some fields.
        """
        known = {*ACTIVATION_FIELDS, *PARAMETER_FIELDS, *WEIGHT_ON_INPUT_FIELDS}
        for path, name, value in self._fields():
            plain = re.sub(r"(?<=[a-z0-9])(?=[A-Z])|\W", "_", name).lower()
            if value is None or value is False or plain in HARMLESS or ELSEWHERE.match(plain):
                continue
            where = path if _PLAIN.fullmatch(path) else shown(path)
            if "multiplier" in plain and _is_one(value):
                continue
            if (effect := REFUSED_FIELDS.get(plain)) is not None:
                self.problems.append(
                    f"{where} is {shown(value)}, which {effect}; nothing here computes that"
                )
                continue
            answer = next((argument for p, argument in SUSPECTS if p.search(plain)), None)
            if answer is None or answer in given or path in known:
                continue
            if ACTIVATIONS.get((str(value).lower(), self._layer.gated)) == kind is not None:
                continue
            self.problems.append(
                f"{where} is {shown(value)}, which may change what the experts compute and is not known "
                f"here; give `{answer}` to say what holds"
            )

    def _fields(self) -> Iterator[tuple[str, str, Any]]:
        """Yield (path, name, value) of every field, also within objects about experts."""
        for name, value in self._config.items():
            inside = _objects(value)
            if inside:
                yield from _inner_fields(name, name, value)
            if not inside or not (_PARTS.search(name) or _OTHER.search(name)):
                yield name, name, value

    def _clamps_after(self) -> bool:
        """True if a list of limits of the SiLU's result has one for this layer."""
        fields = [f for f, p in PARAMETER_FIELDS.items() if p.activation.row.clamps_result]
        return any(isinstance(self._config.get(f), list) and self._number(f) for f in fields)

    def _values(self, name: ParameterName) -> Iterator[tuple[str, float | None]]:
        for field, parameter in PARAMETER_FIELDS.items():
            if parameter.parameter == name and self._config.get(field) is not None:
                yield field, self._number(field)

    def _number(self, field: str) -> float | None:
        """Return the field's number for this layer; None if it says that there is none."""
        parameter, value = PARAMETER_FIELDS[field], self._config[field]
        if parameter.per_layer:
            value = self._entry(field, value)
        if value is None:
            return None
        limit = parameter.parameter == "clamp_limit"
        fits = NUMBER.fits(value) and abs(value) <= _FP32_MAX and not (limit and value < 0)
        if not (fits or (limit and value == math.inf)):
            self._say(
                f"{field} is {shown(value)}; it must be a number of fp32{' from 0' if limit else ''}, "
                f"or null; give `{parameter.parameter}` to overrule it"
            )
            return None
        if limit and value in (0, math.inf):
            return None if parameter.per_layer else math.inf
        return float(value)

    def _entry(self, field: str, values: Any) -> Any:
        """Return this layer's entry of a list with one entry a layer."""
        layer, argument = self._layer, PARAMETER_FIELDS[field].parameter
        if not isinstance(values, list):
            self._say(
                f"{field} is {shown(values)}; it must be a list with one entry a layer, or null; give "
                f"`{argument}` to overrule it"
            )
            return None
        if not any(values):
            return None
        if layer.index is None or _DRAFT.search(layer.module) or layer.index >= len(values):
            self._say(
                f"{field} has {len(values)} entries, none of which is for {layer.module}; give "
                f"`{argument}` (infinity: none)"
            )
            return None
        return values[layer.index]

    def _say(self, problem: str) -> None:
        if problem not in self.problems:
            self.problems.append(problem)


def _is_one(value: Any) -> bool:
    """True for a multiplier that has no effect, or a list of such."""
    if isinstance(value, list):
        return all(map(_is_one, value))
    return NUMBER.fits(value) and value == 1


def _objects(value: Any) -> list[tuple[str, dict[str, Any]]]:
    """Yield (place, object) of an object, or of those in an array; else nothing."""
    if isinstance(value, dict):
        return [("", value)]
    if not isinstance(value, list):
        return []
    return [(f"[{i}]", entry) for i, entry in enumerate(value) if isinstance(entry, dict)]


def _inner_fields(
    path: str, name: str, value: Any, of_experts: bool = False
) -> Iterator[tuple[str, str, Any]]:
    """(path, name, value) of the fields below `name` that tell of experts, at any depth."""
    if not of_experts and (ELSEWHERE.match(name.lower()) or _OTHER.search(name.lower())):
        return
    of_experts = of_experts or _PARTS.search(name.lower()) is not None
    for place, inner in _objects(value):
        for field, entry in inner.items():
            there = f"{path}{place}.{field}"
            if _objects(entry):
                yield from _inner_fields(there, field, entry, of_experts)
            elif of_experts:
                yield there, field, entry


def _fits(kind: ActivationType, wanted: ActivationType, name: ParameterName) -> bool:
    """True if a parameter that is meant for one activation can be the other's."""
    both = {ActivationType.Swiglu, ActivationType.SwigluStep}
    return name in kind.parameters and (kind == wanted or {kind, wanted} == both)


def _is_neutral(value: Given, name: ParameterName, kind: ActivationType | None) -> bool:
    """True if a number leaves the activation as it is without it."""
    if isinstance(value, torch.Tensor | bool) or value is None or kind is None:
        return False
    parameter = kind.parameters.get(name)
    return value == (_NEUTRAL[name] if parameter is None else parameter.neutral)
