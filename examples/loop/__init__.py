"""Trainer, samplers and comparisons of `closed_loop.py`."""

# SPDX-License-Identifier: Apache-2.0
