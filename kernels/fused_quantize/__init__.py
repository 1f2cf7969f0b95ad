"""SiLU-and-multiply and RMSNorm, each followed by the per-token quantizer in the same kernel."""

# SPDX-License-Identifier: Apache-2.0
