"""Backends run on the same cases: quantizers compared to the bit, layers judged by intervals."""

# SPDX-License-Identifier: Apache-2.0
