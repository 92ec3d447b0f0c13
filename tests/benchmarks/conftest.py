"""Makes the benchmarks importable, as ``python -m benchmarks.quality`` in the root of the repository does."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))
