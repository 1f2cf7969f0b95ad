"""NVFP4 experts from a checkpoint, as the fused call wants them."""

# SPDX-License-Identifier: Apache-2.0
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from ..reference import checks
from ..reference.activation import ActivationType, check_activation
from ..reference.numerics.subnormals import kept
from ..reference.recipe import BLOCK_SIZE
from ..reference.weights.arguments import check_parameter
from ..reference.weights.experts import Experts
from ..reference.weights.prepare import assemble_experts
from ..reference.weights.scalars import check_one_scale, per_expert
from .check import Check
from .errors import CheckpointError
from .folder import Folder
from .formats import BIAS, Format, read_quantization
from .layer_function import Function, function_of
from .layers import Layer, Projection, find_layer
from .locations import Place, read_matrix, read_scalar, read_vector
from .progress import Progress, silent
from .stacks import settle

_Weights = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]
_E4M3_RANGE = 6.0 * 448.0  # by which ModelOpt's activation scales divide the largest magnitude


def load_experts(
    folder: Path | str | Folder,
    layer: int | str,
    *,
    activation: ActivationType | None = None,
    device: torch.device | str = "cpu",
    static: bool = False,
    local: range | None = None,
    alpha: torch.Tensor | float | None = None,
    beta: torch.Tensor | float | None = None,
    clamp_limit: torch.Tensor | float | None = None,
    progress: Progress | None = None,
) -> Experts:
    """Read the NVFP4 experts of a layer, an expert at a time, and lay them out for every backend.

    Contract: codes and scales are the checkpoint's bits; gate and up keep scales of their own. What
    `convert` writes gives bitwise the `Experts` that `prepare_experts` makes of the same weights.
    Formats: `formats.py`; names: `naming.py`; what the configuration says of the experts' function is
    followed, or refused by the field's name: `layer_function.py`.

    Args:
        folder: of a Hugging Face checkpoint, ModelOpt's NVFP4 or compressed-tensors'.
        layer: its number, or the name of its module of experts where several have that number
            (`mtp.layers.0.mlp.experts`).
        activation: omitted, the configuration's (`hidden_act` and its like, `swiglu_limits`, the model).
        static: take the checkpoint's activation scales, of input and of intermediate the largest
            over all experts, local or not. Otherwise activations have a scale for each token, and
            the checkpoint's are not looked at.
        local: the experts to read, all without it.
        alpha, beta, clamp_limit: of the activation, as for `prepare_experts`; omitted, the
            configuration's. What is given counts, whatever the configuration says: 1, 0 and infinity
            stand for none.
        progress: called after each expert is checked, and again after each is read.

    Raises:
        CheckpointError: with the list of everything that is missing, extra, misshapen, of another
            dtype, NaN or unreadable, before anything is built; or of the fields of the configuration
            that cannot be followed, each with the argument that overrules it.
        ValueError, TypeError: another argument, named; `activation` does not fit the tensors, or
            `local` the number of experts.
    """
    if not isinstance(folder, Folder):
        checks.path("folder", folder)
    if not isinstance(layer, str):
        checks.integer("layer", layer, 0)
    if activation is not None:
        check_activation(activation)
    checks.device("device", device)
    checks.flag("static", static)
    checks.function("progress", progress, optional=True)
    if local is not None:
        checks.instance("local", local, range, "a range of experts, as range(0, 4)")
    plan = plan_layer(
        folder if isinstance(folder, Folder) else Folder(folder),
        layer,
        activation=activation,
        static=static,
        local=local,
        alpha=alpha,
        beta=beta,
        clamp_limit=clamp_limit,
        progress=progress,
    )
    return plan.read(device, progress)


@dataclass(frozen=True)
class Plan:
    """A layer of a checkpoint that was checked, and can be read."""

    folder: Folder
    layer: Layer
    format: Format
    function: Function
    experts: range
    local: range | None  # as `load_experts` was asked
    static: bool
    sizes: tuple[int, int]  # H and I

    @kept
    def read(self, device: torch.device | str = "cpu", progress: Progress | None = None) -> Experts:
        """Read the experts, one at a time; `load_experts` has the contract.

        Raises:
            CheckpointError: gate and up have scales of their own where the activation has one for both;
                static scales that are all zero.
        """
        where, function = checks.device("device", device), self.function
        reader = _Reader(self.folder, self.layer, self.format, where)
        reader.check_scales(self.experts, function)
        weights = reader.weights(self.experts, *self.sizes, progress or silent)
        biases = reader.biases(self.experts)
        amax = reader.amax() if self.static else (None, None)
        made = assemble_experts(
            *weights,
            function.activation,
            w13_bias=biases[0],
            w2_bias=biases[1],
            alpha=function.alpha,
            beta=function.beta,
            clamp_limit=function.clamp_limit,
            input_amax=amax[0],
            intermediate_amax=amax[1],
        )
        local = self.local
        return replace(
            made,
            router_weight_on_input=function.router_weight_on_input,
            first_expert=local.start if local is not None and local.step == 1 else None,
        )


@kept
def plan_layer(
    folder: Folder,
    layer: int | str,
    *,
    activation: ActivationType | None = None,
    static: bool = False,
    local: range | None = None,
    alpha: torch.Tensor | float | None = None,
    beta: torch.Tensor | float | None = None,
    clamp_limit: torch.Tensor | float | None = None,
    progress: Progress | None = None,
) -> Plan:
    """Check a layer; the arguments and errors are those of `load_experts`."""
    found = find_layer(folder, layer)
    settle(folder, found)
    function = function_of(
        folder, found, activation=activation, alpha=alpha, beta=beta, clamp_limit=clamp_limit
    )
    experts = range(found.num_experts) if local is None else local
    for name in ("alpha", "beta", "clamp_limit"):
        if (value := getattr(function, name)) is not None:
            check_parameter(name, value, function.activation, len(experts))
    if not experts or experts[0] < 0 or experts[-1] >= found.num_experts or experts.step != 1:
        checks.wrong_value("local", local, f"a part of range({found.num_experts})")
    quantization = read_quantization(folder)
    refusal = quantization.refusal(found, experts)
    if refusal is not None:
        raise CheckpointError(folder.path, [refusal])
    form = quantization.format
    check = Check(folder, found, form, experts, range(found.num_experts) if static else ())
    if problems := check.run(progress or silent):
        raise CheckpointError(folder.path, problems)
    sizes = check.hidden_size, check.intermediate_size
    return Plan(folder, found, form, function, experts, local, static, sizes)


class _Reader:
    """Reads what `Check` has found in order."""

    def __init__(self, folder: Folder, layer: Layer, form: Format, device: torch.device):
        self._folder, self._layer, self._form, self._device = folder, layer, form, device

    def check_scales(self, experts: range, function: Function) -> None:
        """Refuse gate and up with scales of their own where the activation has one scale for both.

        A tensor of limits is the caller's, which `assemble_experts` checks.
        """
        limit = function.clamp_limit
        if not self._layer.gated or isinstance(limit, torch.Tensor):
            return
        up, gate = (
            torch.stack(
                [self._form.decode(self._scalar(e, p, self._form.weight_scale)) for e in experts]
            )
            for p in ("up", "gate")
        )
        try:
            limits = per_expert(limit, len(experts), up.device)
            check_one_scale(function.activation, up, gate, limits)
        except ValueError as e:
            field = function.limit_field
            asked = f" (asked for by {field} of config.json)" if field else ""
            raise CheckpointError(
                self._folder.path, [f"{self._layer.module}: {e}{asked}"]
            ) from None

    def weights(
        self, experts: range, hidden: int, intermediate: int, progress: Progress
    ) -> _Weights:
        """Return the first six arguments of `assemble_experts`."""
        halves: tuple[Projection, ...] = ("up", "gate") if self._layer.gated else ("up",)
        rows = len(halves) * intermediate
        w13 = self._empty(len(experts), rows, hidden)
        w2 = self._empty(len(experts), hidden, intermediate)
        w13_decode, w2_decode = (
            torch.empty(size, dtype=torch.float32, device=self._device)
            for size in ((len(experts), len(halves)), (len(experts),))
        )
        for i, expert in enumerate(experts):
            for j, projection in enumerate(halves):
                part = slice(j * intermediate, (j + 1) * intermediate)
                w13_decode[i, j] = self._fill(expert, projection, w13[0][i, part], w13[1][i, part])
            w2_decode[i] = self._fill(expert, "down", w2[0][i], w2[1][i])
            progress(i + 1, len(experts), f"read expert {expert} of {self._layer.module}")
        if not self._layer.gated:
            w13_decode = w13_decode[:, 0]
        return *w13, w13_decode, *w2, w2_decode

    def biases(self, experts: range) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """Return (w13_bias, w2_bias) of `assemble_experts`, fp32; None for a GEMM without a bias."""
        layer = self._layer
        first: tuple[Projection, ...] = ("up", "gate") if layer.gated else ("up",)
        found = []
        for projections in (first, ("down",)):
            biased = experts if layer.has_bias(projections[0]) else ()
            rows = [torch.cat([self._vector(e, p) for p in projections]) for e in biased]
            found.append(torch.stack(rows).to(self._device) if rows else None)
        return found[0], found[1]

    def amax(self) -> tuple[float, float]:
        """Return the largest input and intermediate that the activation scales represent."""
        found = {}
        for side, projections in {"input": ("gate", "up"), "intermediate": ("down",)}.items():
            scales = [
                float(self._form.decode(self._scalar(expert, p, self._form.input_scale)))
                for expert in range(self._layer.num_experts)
                for p in self._layer.projections
                if p in projections
            ]
            if max(scales) == 0:
                raise CheckpointError(
                    self._folder.path,
                    [f"{self._layer.module}: every static scale of the {side} is zero"],
                )
            # In double: 2688 / (2688 s) then rounds to the fp32 1 / s that servers compute.
            found[side] = max(scales) * _E4M3_RANGE
        return found["input"], found["intermediate"]

    def _empty(self, experts: int, rows: int, columns: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Read codes and block scales."""
        codes, scales = (
            torch.empty(experts, rows, c, dtype=torch.uint8, device=self._device)
            for c in (columns // 2, columns // BLOCK_SIZE)
        )
        return codes, scales

    def _fill(
        self, expert: int, projection: Projection, codes: torch.Tensor, scales: torch.Tensor
    ) -> torch.Tensor:
        """Read one projection into place, and return its decode scale."""
        form = self._form
        codes.copy_(read_matrix(self._folder, self._place(expert, projection, form.codes)))
        blocks = read_matrix(self._folder, self._place(expert, projection, form.block_scales))
        scales.copy_(blocks.view(torch.uint8))
        return form.decode(self._scalar(expert, projection, form.weight_scale))

    def _vector(self, expert: int, projection: Projection) -> torch.Tensor:
        return read_vector(self._folder, self._place(expert, projection, BIAS)).float()

    def _scalar(self, expert: int, projection: Projection, kind: str) -> torch.Tensor:
        return read_scalar(self._folder, self._place(expert, projection, kind))

    def _place(self, expert: int, projection: Projection, kind: str) -> Place:
        place = self._layer.place(expert, projection, kind)
        assert place is not None, "checked before"
        return place
