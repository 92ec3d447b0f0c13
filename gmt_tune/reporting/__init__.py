"""What a run leaves behind, and how to look at it: the run log, the report, the difference of two checkpoints.

Nothing here is needed to train, and reading needs neither torch nor a GPU.
"""
