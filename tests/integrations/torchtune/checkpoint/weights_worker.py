"""Two processes of gloo, a sharded model: rank 0 reads its weights one by one."""

import contextlib
import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard

from gmt_tune.integrations.torchtune import process_group
from gmt_tune.integrations.torchtune.checkpoint.weights import one_by_one


def main(folder: Path) -> None:
    rank = int(os.environ["RANK"])
    dist.init_process_group("gloo", store=dist.FileStore(f"{folder}/store", 2), rank=rank, world_size=2)
    torch.manual_seed(0)
    whole = nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 3, bias=False))
    wanted = {name: weight.clone() for name, weight in whole.state_dict().items()}
    for layer in whole:
        fully_shard(layer)
    looks: list[None] = []

    def weights():
        return one_by_one(whole, torch.device("cpu"), lambda: looks.append(None))

    with weights() as by_name:
        for name in reversed(by_name):
            assert torch.equal(by_name[name].read(), wanted[name])
        assert list(by_name) == (list(wanted) if rank == 0 else [])
    assert len(looks) == (len(wanted) if rank == 0 else 0)
    for fails in (0, 1):
        with contextlib.suppress(KeyboardInterrupt), weights() as by_name:
            if rank == 0:
                assert torch.equal(by_name["1.weight"].read(), wanted["1.weight"])
            if rank == fails:
                raise KeyboardInterrupt
        dist.barrier()  # nobody is left behind
    if rank == 0:
        (folder / "done").touch()
    process_group.leave()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
