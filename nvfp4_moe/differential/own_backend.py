"""A user's own backend in a comparison: a function, named on the command line as module:function."""

# SPDX-License-Identifier: Apache-2.0
import importlib
import os
import sys
from collections.abc import Callable
from typing import Any

from ..exits import CommandError
from ..kernels.backends import Registration, register_backend


def register(address: str, operation: str) -> Registration:
    """Register the function as a backend of this name; "auto" never takes it.

    Args:
        address: "module:function", of a module that Python finds, also in the working directory.
        operation: as for `register_backend`; the function takes its call.

    Raises:
        CommandError: there is no such module or function, or the module cannot be imported.
    """
    function = _function(address)
    try:
        return register_backend(operation, address, function)
    except (TypeError, ValueError) as error:
        raise CommandError(f"--backend is {address!r}: {error}") from None


def _function(address: str) -> Callable[..., Any]:
    module_name, _, name = address.partition(":")
    if not module_name or not name:
        raise CommandError(f"--backend is {address!r}; it must be module:function")
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())  # behind the others, so that it hides no package
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{module_name}.".startswith(f"{error.name}."):
            raise CommandError(f"--backend is {address!r}; its module needs {error.name}") from None
        raise CommandError(f"--backend is {address!r}; there is no module {module_name}") from None
    except Exception as error:
        raise CommandError(
            f"--backend is {address!r}; importing it raised {type(error).__name__}: {error}"
        ) from error
    function = getattr(module, name, None)
    if not callable(function):
        raise CommandError(f"--backend is {address!r}; {module_name} has no function {name}")
    return function  # type: ignore[no-any-return]
