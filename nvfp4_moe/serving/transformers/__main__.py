"""`python -m nvfp4_moe.serving.transformers` prints which experts classes are served, and why not."""

# SPDX-License-Identifier: Apache-2.0
from .classes import markdown

print(markdown(), end="")
