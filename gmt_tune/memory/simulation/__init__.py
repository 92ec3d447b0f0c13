"""Training steps on a GPU that is not there: what memory they take, and how often the host waits for the device.

- ``gpu``: PyTorch's ``FakeTensorMode`` with what it lacks: a driver's answers, and what is counted.
- ``recipe``: the recipe of a config on it, on one rank of as many as it is for.
- ``inputs``: what such a recipe reads in place of files; ``selecting``: what kernels would find in its gradients.
- ``driver``: lets autograd run without a driver.

Needs PyTorch's build for CUDA; nothing else of the package needs it.
"""
