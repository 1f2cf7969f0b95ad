"""The Markdown text of a bug report to a backend's project, made from a failing case."""

# SPDX-License-Identifier: Apache-2.0
from typing import Any

import torch

from .. import host
from ..cases.moe_case import MoECase
from ..cases.quantize import Case
from ..differential.compare import compare
from ..differential.explain import bits, explain_element, first_element
from ..differential.verdict import Allowed, explain_output
from ..kernels import environment
from ..kernels.flashinfer import trtllm
from ..kernels.flashinfer.functions import LAYERS
from ..kernels.flashinfer.layer import Layer
from ..kernels.flashinfer.quantize import BUILDS
from ..reference.moe.variants import VARIANTS
from ..reference.quantize import Quantized
from ..reference.recipe import BLOCK_SIZE, Build, Recipe, SfLayout
from .replay_file import Failure, MoEFailure, QuantizerFailure

INLINE = 256
"""Elements of a tensor that are written out; larger ones are loaded from the file."""

_WORDS = {1: ("uint8", 2, torch.int8), 2: ("uint16", 4, torch.int16), 4: ("uint32", 8, torch.int32)}


def bug_report_text(failure: Failure, path: str = "failure.safetensors") -> str:
    """A bug report: title, versions, the call, expected and actual output, and the arithmetic between.

    Args:
        path: the file of the case, as the report names it.

    Raises:
        ValueError: a recorded output is what it should be.
    """
    if isinstance(failure, QuantizerFailure):
        title, call, outcome = _quantizer(failure, path)
    else:
        title, call, outcome = _moe(failure, path)
    origin = failure.origin
    parts = [
        f"# {title}",
        "## Versions",
        *_versions(origin.machine),
        f"Found by `{origin.command}`.",
    ]
    parts += ["## The call", *call, "## Expected and got", *outcome]
    return "\n\n".join(parts) + "\n"


def _versions(machine: dict[str, Any]) -> list[str]:
    versions = ", ".join(f"{k} {v}" for k, v in machine.get("versions", {}).items() if v)
    gpus = machine.get("gpus") or ["none"]
    lines = [f"- {versions}", *(f"- GPU: {gpu}" for gpu in gpus)]
    if contract := machine.get("contract"):
        lines.append(f"- contract of nvfp4-moe: {contract}")
    lines += [f"- {k}={v}" for k, v in machine.get("environment", {}).items() if v is not None]
    return ["\n".join(lines)]


def _code(text: str, language: str = "") -> str:
    return f"```{language}\n{text}\n```"


def _raised(name: str, note: str) -> list[str]:
    return [f"{name} raised:", _code(note or "(what it said was not kept)")]


def _quantizer(failure: QuantizerFailure, path: str) -> tuple[str, list[str], list[str]]:
    x, case, suspect = failure.x, failure.case, failure.suspect
    other = next(side for side in failure.sides if side != suspect)
    how = f"{case.mode}, {case.recipe}"
    call = [
        f"`x` is {x.dtype} of shape {tuple(x.shape)}; {how}, block scales in {case.layout.name}.",
        _code(_quantizer_snippet(failure, path), "python"),
    ]
    got, expected = failure.outputs[suspect], failure.outputs[other]
    if got is None or expected is None:
        name = suspect if got is None else other
        return f"{name} raises: {how}", call, _raised(name, failure.origin.note)
    difference = compare(x, case, expected, got)
    if difference is None:
        raise ValueError(f"the outputs of {other} and {suspect} are the same")
    title = f"{suspect} differs from {other} in the {difference.step.split(' (')[0]}: {how}"
    row, block = difference.row, difference.block
    if row == x.shape[0]:
        where = _padding(expected, got)
        return title, call, [f"{difference}: in the padding of the block scales.", where]
    place = f"first at row {row}, block {block} (columns from {BLOCK_SIZE * block} on)"
    element = first_element(x, expected, got, row, block)
    return (
        title,
        call,
        [
            f"{difference}; {place}, in the step: {difference.step}.",
            _code(
                f"inputs   {difference.inputs}\nexpected {difference.left}\ngot      {difference.right}"
            ),
            f"The arithmetic of element {element} of that block, every operation rounded to fp32:",
            _code("\n".join(explain_element(x, case, row, block, element))),
        ],
    )


def _padding(expected: Quantized, got: Quantized) -> str:
    a, b = expected.block_scales.flatten(), got.block_scales.flatten()
    i = int((a != b).nonzero()[0])
    return _code(f"byte {i} of the buffer: expected 0x{int(a[i]):02x}, got 0x{int(b[i]):02x}")


def _quantizer_snippet(failure: QuantizerFailure, path: str) -> str:
    x, case, backend = failure.x, failure.case, failure.suspect
    if backend not in BUILDS:
        return _replay_snippet(path, backend)
    lines = [
        *_environment(case.recipe, BUILDS[backend], four_over_six=False),
        "import torch",
        "from flashinfer import SfLayout, nvfp4_quantize",
    ]
    config = "None"
    if (four := case.recipe.four_over_six) is not None:
        lines.append(
            "from flashinfer.quantization.nvfp4_quantization_utils import NVFP44Over6Config"
        )
        fast = four.err_use_fast_math
        config = f"NVFP44Over6Config({four.e4m3_max}, {int(four.err_mode)}, {fast})"
    lines += ["", *_input(x, path)]
    arguments = {
        "a": "x",
        "a_global_sf": _scale(x, case, backend),
        "sfLayout": f"SfLayout.{case.layout.name}",
        "do_shuffle": "False",
        "sf_vec_size": "16",
        "backend": repr(backend.removeprefix("flashinfer:")),
        "per_token_activation": str(case.per_token),
        "nvfp4_4over6": config,
    }
    lines += ["result = nvfp4_quantize(", *(f"    {k}={v}," for k, v in arguments.items()), ")"]
    lines += ["for t in result:", "    print(t.cpu().view(torch.uint8).numpy().tobytes().hex())"]
    return "\n".join(lines)


def _scale(x: torch.Tensor, case: Case, backend: str) -> str:
    """The scale with its bits; a float where the backend would read a tensor back."""
    scale = case.scale(x)
    if case.per_token and backend == "flashinfer:cuda":
        return repr(scale)
    of_rows = scale if isinstance(scale, torch.Tensor) else host.fp32([scale])
    patterns = ", ".join(bits(one).split()[0] for one in of_rows.cpu())
    return f"torch.tensor([{patterns}], dtype=torch.uint32).view(torch.float32).cuda()"


def _input(x: torch.Tensor, path: str) -> list[str]:
    if x.numel() > INLINE:
        return [
            "from safetensors.torch import load_file",
            "",
            f'x = load_file({path!r})["x"].cuda()',
        ]
    word, digits, signed = _WORDS[x.element_size()]
    rows = x.cpu().contiguous().view(signed).tolist()
    mask = (1 << 4 * digits) - 1
    lines = ["x = torch.tensor(", "    ["]
    for row in rows:
        for i in range(0, len(row), 8):
            text = ", ".join(f"0x{v & mask:0{digits}x}" for v in row[i : i + 8])
            lines.append(f"        {text},")
    shape = f"{x.shape[0]}, {x.shape[1]}"
    end = f").view({x.dtype}).reshape({shape}).cuda()"
    return [*lines, "    ],", f"    dtype=torch.{word},", end]


def _environment(recipe: Recipe, build: Build, four_over_six: bool) -> list[str]:
    """Lines that set the variables that FlashInfer reads; those of 4over6 where it is no argument."""
    wanted = {}
    if recipe.math == "exact":
        wanted[environment.EXACT_VARIABLES[build][0]] = "1"
    if four_over_six and (f := recipe.four_over_six) is not None:
        switch, mode, fast, use_256 = environment.FOUR_OVER_SIX_VARIABLES
        wanted |= {switch: "1", mode: "MSE" if int(f.err_mode) else "MAE"}
        wanted |= {fast: str(int(f.err_use_fast_math)), use_256: str(int(f.e4m3_max == 256))}
    if not wanted:
        return []
    return ["import os", "", *(f"os.environ[{k!r}] = {v!r}" for k, v in wanted.items()), ""]


def _replay_snippet(path: str, backend: str, configuration: str | None = None) -> str:
    lines = [
        "from nvfp4_moe.failures.replay import replay",
        "from nvfp4_moe.failures.replay_file import load",
        "",
        f"print(replay(load({path!r}), {backend!r}).text)",
    ]
    if configuration:
        lines.insert(0, f"# with the configuration {configuration}")
    return "\n".join(lines)


def _moe(failure: MoEFailure, path: str) -> tuple[str, list[str], list[str]]:
    case, backend = failure.case, failure.backend
    call = [f"{case.name}: {_shape(case)}."]
    if failure.configuration is not None:
        call.append(f"Configuration: `{failure.configuration}`.")
    if backend == trtllm.NAME:
        call.append(_code(_trtllm_snippet(case, path), "python"))
    elif backend in LAYERS:
        call.append(_code(_layer_snippet(LAYERS[backend], case, path), "python"))
    else:
        call.append(_code(_replay_snippet(path, backend, failure.configuration), "python"))
    if backend in LAYERS:
        given = LAYERS[backend].arguments(case.request())
        call += ["Its arguments:", _code("\n".join(_described(k, v) for k, v in given.items()))]
    if failure.output is None:
        return f"{backend} raises: {case.name}", call, _raised(backend, failure.origin.note)
    outside = Allowed(case, failure.accumulation, backend=backend).first(failure.output)
    if outside is None:
        raise ValueError(f"the output of {backend} is inside its interval")
    return (
        f"{backend}: wrong output of the fused call, {case.name}",
        call,
        [
            f"{outside}.",
            _code(outside.where()),
            f"The reference's steps to element {outside.column} of token {outside.token}:",
            _code("\n".join(explain_output(case, outside))),
        ],
    )


def _shape(case: MoECase) -> str:
    e, tokens = case.experts, case.activations.hidden_states.shape[0]
    states = "bf16" if case.activations.is_bf16 else "NVFP4"
    scales = "static scales" if case.activations.is_static else "per-token scales"
    return (
        f"{tokens} tokens, hidden size {e.hidden_size}, intermediate size {e.intermediate_size}, "
        f"{e.num_local} of {case.num_experts} experts from {case.local_expert_offset} on, top "
        f"{case.routing.top_k} ({case.routing.method.name}), {e.activation.name}, {states} hidden "
        f"states{'' if states == 'bf16' else ' with ' + scales}, intermediate {case.recipe}"
    )


def _described(name: str, value: Any) -> str:
    if isinstance(value, list | tuple):
        return "\n".join(_described(f"{name}[{i}]", v) for i, v in enumerate(value))
    if not isinstance(value, torch.Tensor):
        return f"{name} = {value!r}"
    text = f"{name}: {str(value.dtype).removeprefix('torch.')} {list(value.shape)}"
    small = value.numel() <= 8 and value.dtype in (torch.float32, torch.bfloat16, torch.int32)
    if not small:
        return text
    flat = value.reshape(-1)
    if value.dtype == torch.int32:
        return f"{text} = {flat.tolist()}"
    return f"{text} = " + ", ".join(bits(v) for v in flat)


def _trtllm_snippet(case: MoECase, path: str) -> str:
    """The call written out, its tensors from the file."""
    saved: dict[int, str] = {}
    for prefix, thing in (
        ("experts.", case.experts),
        ("activations.", case.activations),
        ("", case),
    ):
        for name, value in vars(thing).items():
            if isinstance(value, torch.Tensor):
                saved[id(value)] = f'saved["{prefix}{name}"]'

    def written(name: str, value: Any) -> str:
        if isinstance(value, tuple):
            return f"({', '.join(written(name, v) for v in value)})"
        if isinstance(value, SfLayout):
            return f"SfLayout.{value.name}"
        if not isinstance(value, torch.Tensor):
            return repr(value)
        if name == "hidden_states_scale":  # a view of what is saved
            return f"{saved[id(case.activations.block_scales)]}.view(torch.float8_e4m3fn)"
        return saved[id(value)]

    call = case.request()
    function, arguments = trtllm.LAYER.function(call).name, trtllm.LAYER.arguments(call)
    lines = [
        *_environment(case.recipe, "cuda", four_over_six=True),
        "import torch",
        "from flashinfer import SfLayout",
        f"from flashinfer.fused_moe import {function}",
        "from safetensors.torch import load_file",
        "",
        f"saved = {{k: t.cuda() for k, t in load_file({path!r}).items()}}",
        f"output = {function}(",
        *(f"    {name}={written(name, value)}," for name, value in arguments.items()),
        ")[0]",
        "print(output)",
    ]
    return "\n".join(lines)


def _layer_snippet(layer: Layer, case: MoECase, path: str) -> str:
    """The layer's own layouts are made from those in the file, which nvfp4-moe does."""
    function = layer.function(case.request()).name
    build = VARIANTS[case.build].quantizers
    return "\n".join(
        [
            *_environment(case.recipe, build, four_over_six=True),
            f"from flashinfer.fused_moe import {function}",
            "from nvfp4_moe.kernels.flashinfer.functions import LAYERS",
            "from nvfp4_moe.cases.moe_case import to_device",
            "from nvfp4_moe.failures.replay_file import load",
            "",
            f"case = to_device(load({path!r}).case, 'cuda')",
            f"print({function}(**LAYERS[{layer.name!r}].arguments(case.request())))",
        ]
    )
