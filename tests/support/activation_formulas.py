"""The formula of every activation, for one pair of numbers."""

# SPDX-License-Identifier: Apache-2.0
import math

from nvfp4_moe.reference.activation import ActivationType


def sigmoid(x):
    return 1 / (1 + math.exp(-x))


def gelu(x):
    return x * 0.5 * math.erfc(-x / math.sqrt(2))


def gelu_tanh(x):
    return 0.5 * x * (1 + math.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


SCALE, GATE_SCALE, ALPHA, BETA, LIMIT = 0.75, 1.5, 1.25, 0.5, 1.75


def clamp(x):
    return max(-LIMIT, min(LIMIT, x))


FORMULAS = {
    ActivationType.Swiglu: lambda u, g: (
        (y := min(g, LIMIT) * GATE_SCALE) * sigmoid(ALPHA * y) * (clamp(u) + BETA) * SCALE
    ),
    ActivationType.SwigluStep: lambda u, g: (
        min(g * GATE_SCALE * sigmoid(g * GATE_SCALE), LIMIT * GATE_SCALE) * clamp(u) * SCALE
    ),
    ActivationType.Situ: lambda u, g: (
        BETA
        * math.tanh(clamp(u) * GATE_SCALE / BETA)
        * ALPHA
        * math.tanh((y := min(g, LIMIT) * GATE_SCALE) / ALPHA)
        * sigmoid(y)
        * SCALE
    ),
    ActivationType.Geglu: lambda u, g: gelu(g * GATE_SCALE) * u * SCALE,
    ActivationType.GegluTanh: lambda u, g: gelu_tanh(g * GATE_SCALE) * u * SCALE,
    ActivationType.Gelu: lambda u, g: gelu(g * GATE_SCALE) * SCALE,
    ActivationType.Relu: lambda u, g: max(g * GATE_SCALE, 0) * SCALE,
    ActivationType.Silu: lambda u, g: g * GATE_SCALE * sigmoid(g * GATE_SCALE) * SCALE,
    ActivationType.Relu2: lambda u, g: max(g * GATE_SCALE, 0) ** 2 * SCALE,
    ActivationType.Identity: lambda u, g: g * GATE_SCALE * SCALE,
}
