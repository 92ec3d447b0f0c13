"""The profiler of a run, and CUDA's memory history beside it."""

import torch


class RunProfiler:
    """torchtune's profiler; in ``memory_steps`` of this process, from 0 on, CUDA's allocations are recorded too.

    Attributes:
        writes_trace: set it to False where other ranks may not come: torchtune's trace handler waits for all of them.
    """

    def __init__(self, profiler, memory_steps: range = range(0)) -> None:
        self._profiler, self._memory_steps = profiler, memory_steps
        self.writes_trace = True
        self._steps = 0
        self._is_running = self._is_recording = False

    def start(self) -> None:
        self._profiler.start()
        self._is_running = True
        self._record(self._steps in self._memory_steps)

    def step(self) -> None:
        self._profiler.step()
        self._steps += 1
        self._record(self._steps in self._memory_steps)

    def stop(self) -> None:
        """End, if it runs, and write a trace of the steps so far."""
        if not self._is_running:
            return
        self._is_running = False
        self._record(False)
        if not self.writes_trace:
            self._profiler.on_trace_ready = None
        self._profiler.stop()

    def _record(self, is_on: bool) -> None:
        if is_on != self._is_recording:
            torch.cuda.memory._record_memory_history(enabled="all" if is_on else None)
            self._is_recording = is_on
