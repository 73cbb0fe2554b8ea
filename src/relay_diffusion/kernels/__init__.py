"""Triton kernels of what is bound by memory or by launching: for GPUs only, imported where one is used.

Those of the network walk over channels_last tensors as rows of pixels [N, pixels, C], in tiles of BLOCK_R pixels x
BLOCK_C channels, and compute in float32, whatever their inputs are stored in. The caller of each kernel
holds the same computation in plain torch.
"""

import importlib.util

HAVE_TRITON = importlib.util.find_spec("triton") is not None  # it comes with torch where torch can use a GPU
FUSION = {"enable_fp_fusion": True}  # fused multiply-add; set explicitly: the default varies between versions
