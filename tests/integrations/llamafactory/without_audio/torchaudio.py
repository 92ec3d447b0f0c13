"""Stands in for torchaudio, which LLaMA-Factory imports and uses for audio alone.

PyPI has builds of it for CUDA only, which PyTorch's build for CPUs cannot load.
"""
