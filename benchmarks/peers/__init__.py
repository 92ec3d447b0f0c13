"""Peers: the methods that people use instead of a gradient mask, beside ours, on the Hugging Face Trainer.

``python -m benchmarks.peers run`` makes results, ``python -m benchmarks.peers table`` the page of them. The packages
are in ``requirements.txt``, for an environment of their own.
"""
