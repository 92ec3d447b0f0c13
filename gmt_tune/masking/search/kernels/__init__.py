"""Triton kernels that find thresholds and apply them; one a file, each for all tensors in one launch.

Needs Triton, which comes with PyTorch for CUDA and ROCm. ``triton`` beside it puts them together. In Triton's
interpreter (``TRITON_INTERPRET=1`` before Triton is imported) they run on CPU tensors.
"""
