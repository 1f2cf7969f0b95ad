"""Every experts class of the installed transformers: served or refused, and why.

A class is built from the default configuration of its model, without memory for its weights, and its
flags and its activation are read as those of a loaded one. Constants such as a clamp limit are then the
defaults'. Sizes are not judged: they differ between the models of one class.
"""

# SPDX-License-Identifier: Apache-2.0
import ast
import importlib
import inspect
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ...kernels.backends import UnsupportedError
from .module import read_gate

DECORATOR = "use_experts_implementation"
SIZES = ("num_experts", "n_routed_experts", "moe_intermediate_size")
"""Attributes of configurations for which some have no number by default; 16 stands for it here."""


@dataclass(frozen=True)
class Row:
    """One class: a module of it, without memory for its weights, or why none could be made."""

    name: str
    module: Any
    failure: str = ""

    @property
    def layout(self) -> str:
        """The order in which the class stores its weights."""
        if self.module is None:
            return ""
        words = ["gate and up" if self.module.has_gate else "up"]
        if self.module.has_gate and not self.module.is_concatenated:
            words = ["gate and up in turns"]
        words += ["transposed"] if self.module.is_transposed else []
        words += ["biases"] if self.module.has_bias else []
        return ", ".join(words)

    @property
    def answer(self) -> tuple[str, str]:
        """The activation with which it is served, and why it is not; one of them is empty."""
        if self.module is None:
            return "", self.failure
        try:
            return str(read_gate(self.module)), ""
        except UnsupportedError as e:
            return "", str(e)


def rows() -> list[Row]:
    """Return every decorated class of the installed transformers, in the order of their names.

    Raises:
        ModuleNotFoundError: transformers is not installed.
    """
    import transformers

    folder = Path(transformers.__file__).parent / "models"
    found = (
        _row(f"transformers.models.{file.parent.name}.{file.stem}", name)
        for file in sorted(folder.glob("*/modeling_*.py"))
        for name in _decorated(file)
    )
    return sorted(found, key=lambda row: row.name)


def markdown() -> str:
    """Return the table of the installed version, as a page of the documentation has it."""
    import transformers

    table = [(row.name, row.layout, *row.answer) for row in rows()]
    served = sum(not refusal for *_, refusal in table)
    lines = [
        "# Experts classes of transformers",
        "",
        "`python -m nvfp4_moe.serving.transformers` wrote this page from transformers "
        f"{transformers.__version__}:",
        f"{served} of {len(table)} classes are served. Each class was built from the default",
        "configuration of its model, and its activation was evaluated beside those of this library.",
        "[transformers.md](transformers.md) says how a class is read. Sizes are not judged here: a",
        "layer whose H or I is no multiple of 16 is refused when it is quantized.",
        "",
        "| class | weights | served with | refused because |",
        "| --- | --- | --- | --- |",
    ]
    lines += [f"| {' | '.join(cells)} |".replace("  ", " ") for cells in table]
    return "\n".join(lines) + "\n"


def _decorated(file: Path) -> list[str]:
    """Names of the classes in a file that have the decorator, with arguments or without."""
    text = file.read_text(encoding="utf-8")
    if DECORATOR not in text:
        return []
    classes = (node for node in ast.walk(ast.parse(text)) if isinstance(node, ast.ClassDef))
    return [
        node.name
        for node in classes
        if any(DECORATOR in ast.unparse(decorator) for decorator in node.decorator_list)
    ]


def _row(module_name: str, name: str) -> Row:
    """Build a module of the class from the first configuration that it accepts."""
    try:
        modeling = importlib.import_module(module_name)
    except Exception as e:  # of a package that is missing, in most cases
        return Row(name, None, f"{module_name} cannot be imported here: {e}")
    reasons = []
    for config in _configurations(modeling):
        try:
            with torch.device("meta"):
                return Row(name, getattr(modeling, name)(config))
        except Exception as e:  # a configuration of another part of the model
            reasons.append(f"{type(config).__name__}: {e}")
    return Row(name, None, f"no configuration builds it ({'; '.join(dict.fromkeys(reasons))})")


def _configurations(modeling: Any) -> Iterator[Any]:
    """Default configurations of the models in a file, the parts of a multimodal one too."""
    from transformers import PreTrainedModel

    models: list[Any] = [
        value
        for value in vars(modeling).values()
        if inspect.isclass(value)
        and issubclass(value, PreTrainedModel)
        and value.__module__ == modeling.__name__
    ]
    for configuration in dict.fromkeys(model.config_class for model in models):
        try:
            config = configuration()
        except Exception:  # there is none, or it has no default; another may
            continue
        for part in (config, *(getattr(config, name) for name in config.sub_configs)):
            if part is not None:
                yield _with_sizes(part)


def _with_sizes(config: Any) -> Any:
    for name in SIZES:
        if not isinstance(getattr(config, name, 0), int):
            vars(config)[name] = 16  # `setattr` would check the type
    return config
