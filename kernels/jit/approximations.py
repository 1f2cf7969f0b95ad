"""Sigmoid, tanh and GELU of fp32 in Triton, without overflow and without cancellation.

Largest errors over all of fp32, relative but for results below 2^-126, in units of 2^-23:

    sigmoid(x)    6, and |x| more below zero
    tanh(x)       8
    gelu(x)       10 + x^2 below zero, 10 above
    gelu_tanh(x)  10, and 6 |u| more below zero, with u = 2 sqrt(2 / pi) (x + 0.044715 x^3)

Below 2^-126 the error of a sigmoid is at most 2^-126, of a GELU |x| times that. `tl.exp` is `ex2.approx`
of a rounded product, of 2 + |x| / 2 ulp; `/` is `div.full`, of 2 ulp. NaN gives NaN. -inf gives NaN
where the function is a product with x, as in `reference.activation`.
"""

# SPDX-License-Identifier: Apache-2.0
import triton
import triton.language as tl


@triton.jit
def sigmoid(x):
    e = tl.exp(-tl.abs(x))
    return tl.where(x < 0, e, 1.0) / (1.0 + e)


@triton.jit
def tanh(x):
    a = tl.abs(x)
    # Below 0.55 a polynomial, fitted to 2^-24.7: 1 - 2 / (1 + e^2a) cancels there.
    z = x * x
    p = tl.fma(z, 0.016437575221061707, -0.05267181247472763)
    p = tl.fma(z, p, 0.13320724666118622)
    p = tl.fma(z, p, -0.3333294689655304)
    small = x * tl.fma(z, p, 1.0)  # which keeps -0
    large = 1.0 - 2.0 / (1.0 + tl.exp(2.0 * a))
    return tl.where(a < 0.55, small, tl.where(x < 0, -large, large))


@triton.jit
def gelu(x):
    """x times the normal distribution function."""
    # Of |x|: e^(-x^2 / 2) t P(t) is half of erfc(|x| / sqrt 2), P fitted to 2^-24 for |x| < 18.
    t = 1.0 / tl.fma(tl.abs(x), 0.2121320366859436, 1.0)
    p = tl.fma(t, -0.064114511013031, 0.23972533643245697)
    p = tl.fma(t, p, -0.2499992698431015)
    p = tl.fma(t, p, 0.2670243978500366)
    p = tl.fma(t, p, -0.04272272437810898)
    p = tl.fma(t, p, 0.10554798692464828)
    p = tl.fma(t, p, 0.07464940845966339)
    p = tl.fma(t, p, 0.0852915421128273)
    p = tl.fma(t, p, 0.08459782600402832)
    q = p * t * tl.exp(x * x * -0.5)
    return x * tl.where(x < 0, q, 1.0 - q)


@triton.jit
def gelu_tanh(x):
    """0.5 x (1 + tanh(u / 2))."""
    return x * sigmoid(1.5957691216057308 * (x + 0.044715 * x * x * x))
