"""`nvfp4-moe solutions`: definitions and solutions of our layer for FlashInfer's substitution hook."""

# SPDX-License-Identifier: Apache-2.0
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from .. import files
from ..exits import CommandError, Exit
from ..kernels.flashinfer import version
from ..reference.activation import IMPLEMENTED
from ..reference.moe.routing import RoutingMethodType
from ..serving.substitution import LayerShape, routings, solutions
from .output import Result


def run(options: SimpleNamespace) -> Result:
    folder = Path(options.folder)
    shapes = [_shape(text, options) for text in options.shape]
    chosen = _routings(options)
    if not version.HERE.is_described:
        raise CommandError(
            "flashinfer-python of a described version is needed, which names the definitions: "
            "pip install 'nvfp4-moe[flashinfer]'"
        )
    files.check_folder("DIR", folder)
    written: list[str] = []
    for shape in shapes:
        for routing in chosen:
            if routing == RoutingMethodType.Llama4.name and shape.top_k != 1:
                continue
            pairs = list(solutions(shape, routing))
            if not pairs:
                print(f"none for {routing}: FlashInfer traces no calls of it")
            for definition, solution in pairs:
                name = definition["name"]
                _write(folder / "definitions" / "moe" / f"{name}.json", definition)
                _write(folder / "solutions" / "moe" / name / "nvfp4_moe.json", solution)
                written.append(name)
                print(name)
    print(f"FLASHINFER_TRACE_APPLY=1 FLASHINFER_TRACE_APPLY_PATH={folder} lets FlashInfer use them")
    return Result(Exit.DONE, {"folder": str(folder), "written": written})


def _shape(text: str, options: SimpleNamespace) -> LayerShape:
    given = f"--shape is {text!r}"
    try:
        hidden, intermediate, experts, top_k, *local = map(int, text.split(","))
    except ValueError:
        raise CommandError(f"{given}; it must be H,I,E,K or H,I,E,K,LOCAL: numbers") from None
    kinds = {kind.name: kind for kind in IMPLEMENTED}
    if options.activation not in kinds:
        names = ", ".join(kinds)
        raise CommandError(f"--activation is {options.activation!r}; it must be among {names}")
    activation = kinds[options.activation]
    tile = 64 if activation.gated else 128
    here = local[0] if local else experts
    fits = hidden > 0 and hidden % 128 == 0 and intermediate > 0 and intermediate % tile == 0
    if len(local) > 1 or not fits or not 1 <= top_k <= experts or not 1 <= here <= experts:
        raise CommandError(
            f"{given}; H must be a multiple of 128 and I of {tile}, as the prepared weights have them, "
            "K and LOCAL from 1 to E"
        )
    groups = None if options.groups is None else _groups(options.groups, experts)
    return LayerShape(hidden, intermediate, experts, top_k, here, activation, groups)


def _groups(text: str, experts: int) -> tuple[int, int]:
    try:
        count, top = map(int, text.split(","))
    except ValueError:
        count, top = 0, 0
    if not 1 <= top <= count or experts % count:
        raise CommandError(
            f"--groups is {text!r}; it must be N,TOP: the number of groups, which divides E, and of "
            "those that are chosen"
        )
    return count, top


def _routings(options: SimpleNamespace) -> list[str]:
    names = options.routing.split(",") if options.routing else [*routings()]
    for name in names:
        if name not in routings():
            raise CommandError(f"--routing has {name!r}; it must be among {', '.join(routings())}")
    grouped = RoutingMethodType.DeepSeekV3.name
    if options.groups is None and options.routing is None:
        names.remove(grouped)  # its definitions name the groups
    return names


def _write(path: Path, content: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=1) + "\n", "utf-8")
