"""Triton kernels of CompactAdamW: one a file, with the formula on top and its launcher below.

What they share is in ``locate``: where selected entries are, as ``Places`` keeps it.
"""
