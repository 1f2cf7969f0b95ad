"""Runs a call in every configuration that a backend can choose, and repeats it; errors are results."""

# SPDX-License-Identifier: Apache-2.0
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch

from .flashinfer_tactics import DEFAULT, Configuration
from .results import Failure

Call = Callable[[], torch.Tensor]


@dataclass(frozen=True)
class Output:
    """The outputs of a call and of the same call repeated; an error takes the place of an output."""

    got: torch.Tensor | Exception
    again: torch.Tensor | Exception | None = None


@dataclass(frozen=True)
class RunOptions:
    """The runs of each case besides one call in the configuration that the backend chooses."""

    every_configuration: bool = False
    replay: bool = False
    """Repeat every call and compare the bits; on a GPU in a CUDA graph, over memory full of NaN."""


ONCE = RunOptions()


def outputs(
    call: Call,
    configurations: Callable[[], Iterable[Configuration]],
    options: RunOptions,
    on_gpu: bool,
) -> dict[str, Output]:
    """The output of each configuration, by its name.

    Args:
        configurations: called where the options ask for every configuration.
    """
    every: Iterable[Configuration] = [Configuration(DEFAULT)]
    if options.every_configuration:
        try:
            every = configurations()
        except Exception as error:  # FlashInfer runs the call to be asked
            return {DEFAULT: Output(error)}
    again = _replayed if on_gpu else _caught
    return {
        c.name: Output(_caught(call, c), again(call, c) if options.replay else None) for c in every
    }


def _caught(call: Call, configuration: Configuration) -> torch.Tensor | Exception:
    try:
        with configuration.forced():
            return call()
    except Exception as error:
        return error


def _replayed(call: Call, configuration: Configuration) -> torch.Tensor | Exception:
    """The output of a call that was captured in a CUDA graph, its memory full of NaN before."""

    def replay() -> torch.Tensor:
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            output = call()
        output.fill_(torch.nan)
        graph.replay()
        torch.cuda.synchronize()
        return output.clone()

    return _caught(replay, configuration)


def crash(title: str, error: Exception) -> Failure:
    first, *rest = f"{type(error).__name__}: {error}".splitlines()
    return Failure(title, first, rest)
