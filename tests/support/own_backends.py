"""Backends that a user might have written: right ones, wrong ones, and one that raises."""

# SPDX-License-Identifier: Apache-2.0
from dataclasses import replace

import torch

from nvfp4_moe.kernels.baseline_moe.backends import BASELINE_MOE
from nvfp4_moe.kernels.moe.backends import FUSED_MOE
from nvfp4_moe.kernels.quantize.api import QUANTIZE

not_a_function = 3


def quantize(call):
    return QUANTIZE.run("reference", call)


def quantize_wrongly(call):
    """One code of the last row is another."""
    codes, *scales = quantize(call)
    codes[-1, -1] ^= 1
    return codes, *scales


def quantize_and_raise(call):
    raise RuntimeError("out of luck")


def quantize_some(call):
    """It finds only when it runs that it has no program."""
    if call.recipe.math == "exact":
        raise NotImplementedError("it has fast math only")
    return quantize(call)


def layer(call):
    return FUSED_MOE.run("reference", call)[0]


def layer_wrongly(call):
    """The first token's output is its double."""
    output = layer(call)
    output[0] *= 2
    return output


def layer_without_a_tile(call):
    """The first product leaves out a tile of 32 columns of K."""
    states = call.activations.hidden_states.clone()
    states[:, : 16 if states.dtype == torch.uint8 else 32] = 0
    return layer(replace(call, activations=replace(call.activations, hidden_states=states)))


def baseline(call):
    return BASELINE_MOE.run("reference", call)


def baseline_wrongly(call):
    return -baseline(call)


def layer_of_another_shape(call):
    return torch.zeros(1, 1)
