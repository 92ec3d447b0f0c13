"""Triton kernels of CompactAdamW: one a file, with the formula on top and its launcher below.

What they share: ``locate``, where selected entries are, as ``Places`` keeps it; ``moments`` and ``tiles``.
"""
