"""Numbers of many dtypes that are read together."""

import torch

from gmt_tune import GradientMask
from gmt_tune.masking import functional
from gmt_tune.masking.host import start_copy, to_host, together


def test_numbers_come_in_their_order_and_exact():
    numbers = [
        torch.tensor(0.1), torch.tensor(2**53), torch.tensor(0.1, dtype=torch.bfloat16), torch.tensor(True),
        torch.tensor(-torch.inf), torch.tensor(2**24 + 1), torch.tensor(0.1, requires_grad=True),
    ]  # fmt: skip
    wanted = [number.item() for number in numbers]
    assert to_host(numbers) == wanted and to_host([]) == []
    copied, wait = start_copy(together(numbers, torch.device("cpu")))
    wait()
    assert copied.tolist() == wanted


def test_a_mask_is_read_once_for_metrics_and_for_the_detail_of_a_report(monkeypatch):
    from gmt_tune.reporting.mask_metrics import MaskMetrics

    reads = []
    monkeypatch.setattr(functional, "to_host", lambda numbers: reads.append(len(numbers)) or to_host(numbers))
    model = torch.nn.Sequential(torch.nn.Linear(9, 8), torch.nn.Linear(8, 7))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    mask = GradientMask(model.named_parameters(), density=0.25)
    mask.register(optimizer)
    metrics = MaskMetrics(mask)
    for step in (1, 2):
        model(torch.randn(5, 9)).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        detail, totals = metrics.detail(), metrics.totals()
        assert reads == [8] * step  # thresholds and counts of four tensors
        assert detail["threshold"] == {name: t.item() for name, t in mask.statistics.thresholds.items()}
        assert totals["mask/density"] == sum(map(int, mask.statistics.selected.values())) / (8 * 9 + 8 + 7 * 8 + 7)
