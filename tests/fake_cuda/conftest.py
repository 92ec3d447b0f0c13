"""A GPU that is not there: ``requirements.txt`` beside this file says what makes an environment for these tests."""

import pytest
from fake_cuda import steps


@pytest.fixture
def gpu():
    from gmt_tune.memory.simulation.gpu import SimulatedGPU

    with SimulatedGPU() as gpu:
        yield gpu


@pytest.fixture
def ranks():
    """Function that begins to simulate a GPU which is the first of so many."""
    with steps.simulated_devices() as begin:
        yield begin


@pytest.fixture
def without_triton(monkeypatch):
    from gmt_tune.masking.search import devices

    monkeypatch.setattr(devices, "_import_kernels", lambda: None)


@pytest.fixture(autouse=True)
def triton_works():
    """A kernel that is given a tensor on the CPU raises, and from then on masks would do without Triton."""
    from gmt_tune.masking.search import devices

    yield
    failures = list(devices._failures)
    devices._failures.clear()
    assert not failures
