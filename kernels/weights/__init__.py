"""Quantize new weights in place into the layouts that a layer's experts already have."""

# SPDX-License-Identifier: Apache-2.0
