"""The environment variable that the reference reads."""

# SPDX-License-Identifier: Apache-2.0
VALUES_VARIABLE = "NVFP4_MOE_CHECK_VALUES"
"""Set to 1, calls on a GPU read the values of their arguments, too, and wait for the GPU to do so."""
