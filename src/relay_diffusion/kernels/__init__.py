"""Triton kernels of what is bound by memory: for GPUs only, imported where one is used.

They walk over channels_last tensors as rows of pixels [N, pixels, C], in tiles of BLOCK_R pixels x BLOCK_C channels,
and compute in float32, whatever their inputs are stored in. `networks/ops.py` says in plain torch what they compute.
"""
