"""FlashInfer's functions that we call: the only folder that imports it."""

# SPDX-License-Identifier: Apache-2.0
