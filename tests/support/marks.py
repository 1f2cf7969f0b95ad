"""Marks that several test modules share."""

# SPDX-License-Identifier: Apache-2.0
import pytest
import torch

ON_A_GPU = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not torch.cuda.is_available() or torch.cuda.get_device_capability() < (8, 0),
        reason="no NVIDIA GPU of compute capability 8.0 or later here",
    ),
]
