"""What the tests of emulated Hopper kernels have in common."""

import pytest
import torch

no_gpu_in_sight = pytest.mark.skipif(
    torch.cuda.is_available(), reason="small kernels beside the emulated ones run in Triton's interpreter: hide the GPU"
)
