"""Triton kernels for operations limited by memory bandwidth or launch time.

GPU only; each module is imported on first use. The network's kernels read channels_last tensors as rows of pixels
[N, pixels, C], in tiles of BLOCK_R pixels x BLOCK_C channels, and compute in float32 for any input dtype. The caller
of each kernel has the same computation in plain torch.
"""

import importlib.util

HAVE_TRITON = importlib.util.find_spec("triton") is not None  # it comes with torch where torch can use a GPU
FUSION = {"enable_fp_fusion": True}  # fused multiply-add; set explicitly: the default varies between versions
