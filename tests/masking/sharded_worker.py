"""One process of ``test_sharded.py``; also gives the same cases to one process without any sharding.

    torchrun --standalone --nproc_per_node N sharded_worker.py OUTPUT_FILE

Every process makes the same whole gradients from seeds, and keeps its part of them.
"""

import itertools
import os
import sys

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
from torch.utils._python_dispatch import TorchDispatchMode

from gmt_tune import GradientMask, mask_grads_
from gmt_tune.integrations.torchtune.process_group import leave
from gmt_tune.masking.flat import FlatShard

SHAPES = {
    "odd": (7, 5),
    "odder": (13, 11),
    "one": (1,),
    "two_rows": (2, 3),
    "cube": (3, 4, 5),
    "one_row": (1, 9),
    "larger": (64, 33),
    "norm": (33,),
}
MIXED = {"norm": torch.float32, "odder": torch.float16}  # the other dtypes of the case "mixed"


class GradientToWeight(GradientMask):
    """A user's own score."""

    def compute_score(self, name, parameter, grad):
        return grad / (parameter.detach().abs() + 1e-3)


class ByFirstLetter(GradientMask):
    """A user's own scope, of several tensors that no number of ranks divides."""

    def scope_of(self, name):
        return name[0]


class GradientToWeightByFirstLetter(ByFirstLetter, GradientToWeight):
    """Both."""


CLASSES = {  # by whether the scope and the score are the user's own
    (False, False): GradientMask,
    (False, True): GradientToWeight,
    (True, False): ByFirstLetter,
    (True, True): GradientToWeightByFirstLetter,
}


def policies() -> dict[str, dict]:
    """Every case: keywords of the mask, plus dtype and class."""
    cases = {}
    for dtype, scope, score in itertools.product(
        ("fp32", "bf16", "mixed"), ("tensor", "global"), ("magnitude", "saliency", "random", "own")
    ):
        refresh_every = 2 if (score, scope) in (("magnitude", "tensor"), ("saliency", "global")) else 1
        name = f"{dtype}, {scope}, {score}, refresh {refresh_every}"
        cases[name] = dict(dtype=dtype, scope=scope, score=score, refresh_every=refresh_every)
    for dtype, score, refresh_every in (("fp32", "magnitude", 2), ("bf16", "saliency", 1), ("mixed", "own", 1)):
        name = f"{dtype}, own scope, {score}, refresh {refresh_every}"
        cases[name] = dict(dtype=dtype, scope="own", score=score, refresh_every=refresh_every)
    cases["fp16"] = dict(dtype="fp16", scope="tensor", score="magnitude", refresh_every=1)
    return cases


# Run in every layout; the others run in the first one alone
EVERYWHERE = (
    "fp32, tensor, magnitude, refresh 2",
    "fp32, global, own, refresh 1",
    "fp32, tensor, random, refresh 1",
    "bf16, tensor, saliency, refresh 1",
    "mixed, global, magnitude, refresh 1",
    "fp32, own scope, magnitude, refresh 2",
    "mixed, own scope, own, refresh 1",
)
# What Triton's interpreter runs: it is slow, and what the kernels see of a layout is how long each local part is
INTERPRETED = (*EVERYWHERE[:5], "fp16", "bf16, global, saliency, refresh 2", "mixed, tensor, own, refresh 1")
INTERPRETED_LAYOUTS = ("rows", "FSDP2")


def dtype_of(case: str, name: str) -> torch.dtype:
    dtypes = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
    return MIXED.get(name, torch.bfloat16) if case == "mixed" else dtypes[case]


def whole(name: str, dtype: torch.dtype, step: int) -> torch.Tensor:
    """A weight (step -1) or gradient; of gradients, some rows are zero and many entries tie."""
    generator = torch.Generator().manual_seed(1000 * list(SHAPES).index(name) + step + 1)
    tensor = torch.randn(SHAPES[name], generator=generator)
    if step >= 0:
        tensor[::4] = 0
        tensor[1::4] = (tensor[1::4] * 4).round() / 4
    return tensor.to(dtype)


class Unsharded:
    """One process that holds all; what the other ways to lay tensors over the ranks are compared with."""

    def weight(self, name: str, tensor: torch.Tensor) -> torch.Tensor:
        """This rank's part of a whole tensor."""
        return tensor.clone()

    def grad(self, name: str, tensor: torch.Tensor) -> torch.Tensor:
        return self.weight(name, tensor)

    def whole(self, name: str, tensor: torch.Tensor) -> torch.Tensor:
        """The whole tensor again."""
        return tensor.clone()

    def register(self, mask: GradientMask) -> torch.optim.Optimizer:
        """An optimizer of the mask's parameters, or of what lies in them."""
        optimizer = torch.optim.SGD(mask.masked_parameters.values(), lr=0.0)
        mask.register(optimizer)
        return optimizer

    def set_grad(self, name: str, p: torch.Tensor, tensor: torch.Tensor) -> None:
        p.grad = self.grad(name, tensor)


def run_policy(policy: dict, ranks: Unsharded) -> list[dict]:
    """What a mask did in each step: masked gradients, thresholds and counts of whole tensors."""
    is_own = {key: policy[key] == "own" for key in ("scope", "score")}
    arguments = {key: policy[key] for key in ("scope", "score", "refresh_every") if not is_own.get(key)}
    parameters = {}
    for name in SHAPES:
        weight = whole(name, dtype_of(policy["dtype"], name), -1)
        parameters[name] = nn.Parameter(ranks.weight(name, weight))
    mask = CLASSES[is_own["scope"], is_own["score"]](parameters.items(), 0.3, seed=5, **arguments)
    optimizer = ranks.register(mask)
    parameters = mask.masked_parameters
    steps = []
    for step in range(2 * policy["refresh_every"] - 1):
        for name, p in parameters.items():
            ranks.set_grad(name, p, whole(name, p.dtype, step))
        optimizer.step()
        statistics = mask.statistics
        assert not any(isinstance(t, DTensor) for t in statistics.thresholds.values())
        steps.append(
            {
                "grads": {name: ranks.whole(name, p.grad) for name, p in parameters.items()},
                "thresholds": {name: t.clone() for name, t in statistics.thresholds.items()},
                "selected": {name: int(count) for name, count in statistics.selected.items()},
                "density": mask.metrics()["mask/density"],
            }
        )
    return steps


def run_function(ranks: Unsharded) -> dict:
    """The same for ``mask_grads_``."""
    results = {}
    for score, scope in (("magnitude", "tensor"), ("saliency", "global"), ("random", "tensor")):
        parameters = []
        for name in SHAPES:
            parameters.append(nn.Parameter(ranks.weight(name, whole(name, torch.float32, -1))))
            parameters[-1].grad = ranks.grad(name, whole(name, torch.float32, 0))
        statistics = mask_grads_(parameters, 0.3, scope=scope, score=score, seed=3)
        results[f"{score}, {scope}"] = {
            "grads": [ranks.whole(name, p.grad) for name, p in zip(SHAPES, parameters, strict=True)],
            "selected": [int(count) for count in statistics.selected.values()],
            "thresholds": [t.clone() for t in statistics.thresholds.values()],
        }
    return results


# ------------------------------------------------------------------ only in a process group


class Distributed(Unsharded):
    """Tensors on a mesh, with placements by position and whole tensor; None leaves one as it is."""

    def __init__(self, mesh: DeviceMesh, placements) -> None:
        self.mesh, self.placements = mesh, placements

    def weight(self, name, tensor):
        placements = self.placements(list(SHAPES).index(name), tensor)
        return tensor.clone() if placements is None else distribute_tensor(tensor, self.mesh, placements)

    def whole(self, name, tensor):
        return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor.clone()


class PartialSums(Distributed):
    """Gradients of which every rank holds a term; exact where the number of ranks is a power of two."""

    def grad(self, name, tensor):
        return DTensor.from_local(tensor / self.mesh.size(), self.mesh, [Partial()])


class OnTwoMeshes(Distributed):
    """1-d tensors on the first dimension of the mesh alone, as tensor parallelism leaves norms."""

    def weight(self, name, tensor):
        if tensor.dim() == 1:
            return distribute_tensor(tensor, self.mesh["dp"], [Shard(0)])
        return super().weight(name, tensor)


class FSDP2(Unsharded):
    """Tensors as ``fully_shard`` lays them out, on top of tensor parallelism if there is a dimension "tp".

    Parameters that hold the indices of their own entries tell every rank which entries it has.
    """

    def __init__(self, mesh: DeviceMesh) -> None:
        model = nn.Module()
        for i, (name, shape) in enumerate(SHAPES.items()):
            index = torch.arange(torch.Size(shape).numel(), dtype=torch.float32).view(shape)
            if "tp" in (mesh.mesh_dim_names or ()):
                index = distribute_tensor(index, mesh["tp"], [Shard(0 if i % 2 else len(shape) - 1)])
            model.register_parameter(name, nn.Parameter(index))
        fully_shard(model, mesh=mesh["dp"] if mesh.ndim > 1 else mesh)
        self.parameters = dict(model.named_parameters())
        self.index = {name: p.detach().to_local().long() for name, p in self.parameters.items()}

    def weight(self, name, tensor):
        p = self.parameters[name]
        local = tensor.view(-1)[self.index[name]]
        return DTensor.from_local(
            local, p.device_mesh, p.placements, run_check=False, shape=tensor.shape, stride=tensor.stride()
        )

    def whole(self, name, tensor):
        parts = [None] * dist.get_world_size()
        dist.all_gather_object(parts, (self.index[name], tensor.to_local()))
        found = torch.full((tensor.numel(),), float("nan"), dtype=tensor.dtype)
        for index, local in parts:
            found[index.flatten()] = local.flatten()
        return found.view(tensor.shape)


class FlatRanges(Unsharded):
    """Tensors of one dtype lie flattened one behind the other, cut anywhere, and an optimizer steps the pieces."""

    def register(self, mask):
        rank, size = dist.get_rank(), dist.get_world_size()
        parameters = mask.masked_parameters.values()
        shards = {}
        for dtype in dict.fromkeys(p.dtype for p in parameters):
            within = [p for p in parameters if p.dtype == dtype]
            whole = torch.cat([p.detach().flatten() for p in within])
            begin, end = (whole.numel() * i * i // size**2 for i in (rank, rank + 1))
            flat, place = nn.Parameter(whole[begin:end]), 0
            flat.grad = torch.zeros_like(flat)
            for p in within:
                first, last = (min(max(edge - place, 0), p.numel()) for edge in (begin, end))
                start = place + first - begin if first < last else 0
                shards[p] = FlatShard(flat, start, p.numel(), (first, last), dist.group.WORLD)
                place += p.numel()
        optimizer = torch.optim.SGD({id(s.within): s.within for s in shards.values()}.values(), lr=0.0)
        mask.register(optimizer, shards=shards)
        return optimizer

    def set_grad(self, name, p, tensor):
        p.grad.local.copy_(tensor.flatten()[slice(*p.held)])

    def whole(self, name, tensor):
        pieces = [None] * dist.get_world_size()
        dist.all_gather_object(pieces, tensor.local)
        return torch.cat(pieces).view(SHAPES[name])


def ways(world_size: int) -> dict[str, Unsharded]:
    """Ways to lay tensors over the ranks."""
    mesh = init_device_mesh("cpu", (world_size,))
    found = {
        "rows": Distributed(mesh, lambda i, t: [Shard(0)]),
        "columns": Distributed(mesh, lambda i, t: [Shard(t.dim() - 1)]),
        "flat ranges": FlatRanges(),
        "some whole": Distributed(mesh, lambda i, t: None if i % 3 == 0 else [Shard(0)]),
        "FSDP2": FSDP2(mesh),
    }
    if world_size in (2, 4):
        found["partial sums"] = PartialSums(mesh, lambda i, t: [Shard(0) if t.numel() > 100 else Replicate()])
    if world_size == 4:
        grid = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
        mixed = [
            lambda last: [Shard(0), Shard(last)],
            lambda last: [Replicate(), Shard(0)],
            lambda last: [Shard(0), Replicate()],
            lambda last: [Shard(last), Shard(0)],
            lambda last: [Replicate(), Replicate()],
        ]
        found["2x2, mixed"] = Distributed(grid, lambda i, t: mixed[i % len(mixed)](t.dim() - 1))
        found["2x2, mixed otherwise"] = Distributed(grid, lambda i, t: mixed[(i + 3) % len(mixed)](t.dim() - 1))
        found["2x2, hybrid"] = Distributed(grid, lambda i, t: [Replicate(), Shard(0)])
        found["2x2, two meshes"] = OnTwoMeshes(grid, lambda i, t: [Shard(0), Shard(1)])
        found["2x2, FSDP2 and tensor parallel"] = FSDP2(grid)
    return found


class Collectives(TorchDispatchMode):
    """Counts every collective operation, whoever starts it, and the bytes of the tensors given to it."""

    def __init__(self) -> None:
        super().__init__()
        self.count = self.bytes = 0
        self.kinds: set[str] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace in ("c10d", "_c10d_functional") and "wait" not in str(func):
            self.count += 1
            self.kinds.add(func.overloadpacket.__name__)
            flat = torch.utils._pytree.tree_leaves((args, kwargs))
            self.bytes += sum(t.numel() * t.element_size() for t in flat if isinstance(t, torch.Tensor))
        return func(*args, **(kwargs or {}))


def llama_of_30_layers(dtype: torch.dtype) -> nn.Module:
    """272 tensors as in SmolLM2-135M, of fewer entries: what travels depends on the number of tensors alone."""
    d = 18
    model = nn.Module()
    model.embed = nn.Embedding(101, d)
    model.layers = nn.ModuleList()
    for _ in range(30):
        layer = nn.Module()
        for name, (out, into) in {
            "q": (d, d), "k": (6, d), "v": (6, d), "o": (d, d), "w1": (48, d), "w2": (d, 48), "w3": (48, d)
        }.items():  # fmt: skip
            setattr(layer, name, nn.Linear(into, out, bias=False))
        layer.norm1, layer.norm2 = nn.RMSNorm(d), nn.RMSNorm(d)
        model.layers.append(layer)
    model.norm = nn.RMSNorm(d)
    model.to(dtype)
    for layer in model.layers:
        fully_shard(layer)
    fully_shard(model)
    return model


def count_collectives() -> dict[str, tuple[int, int, int, set[str]]]:
    """For each policy: collectives and bytes of a step, the number of masked tensors, and the collectives' kinds."""
    found = {}
    for dtype, policies in {
        "fp32": [{}, {"scope": "global"}, {"score": "saliency"}, {"score": "random"}, {"refresh_every": None}],
        "bf16": [{}],
    }.items():
        model = llama_of_30_layers(dtype_of(dtype, ""))
        for policy in policies:
            # Checking for NaN, which is on, and statistics are part of what is counted
            mask = GradientMask(model.named_parameters(), 0.2, dense=(), **policy)
            for p in model.parameters():
                p.grad = torch.randn_like(p)
            if "refresh_every" in policy:
                mask.mask_grads_()  # what is counted is a step that uses the selection of this one
            with Collectives() as collectives:
                mask.mask_grads_()
                mask.metrics()
            tensors = len(list(model.parameters()))
            found[f"{dtype}, {policy}"] = (collectives.count, collectives.bytes, tensors, collectives.kinds)
    return found


def nonfinite(ranks: Unsharded, is_interpreted: bool) -> dict[str, list[str]]:
    """What each rank says of a NaN that one of them holds, and whether a masked gradient was changed."""
    messages = {}
    cases = [
        ("magnitude", 1, 0.3), ("saliency", 1, 0.3), ("random", 1, 0.3), ("magnitude", None, 0.3), ("magnitude", 1, 1.0)
    ]  # fmt: skip
    for score, refresh_every, density in cases[:2] if is_interpreted else cases:
        parameters = {name: nn.Parameter(ranks.weight(name, whole(name, torch.float32, -1))) for name in SHAPES}
        mask = GradientMask(parameters.items(), density, score=score, refresh_every=refresh_every)
        for step in range(2):
            for name, p in parameters.items():
                grad = whole(name, torch.float32, step)
                if step == 1 and name == "odder":
                    grad[-1, -1] = float("nan")
                p.grad = ranks.grad(name, grad)
            try:
                mask.mask_grads_()
                message = "no error"
            except RuntimeError as error:
                message = str(error)
        everyone = [None] * dist.get_world_size()
        dist.all_gather_object(everyone, message)
        messages[f"{score}, refresh {refresh_every}, density {density}"] = everyone
    return messages


def dense_nonfinite(ranks: Unsharded) -> list[str]:
    """What each rank says of a NaN that one of them holds in a dense parameter."""
    parameters = {name: nn.Parameter(ranks.weight(name, whole(name, torch.float32, -1))) for name in SHAPES}
    mask = GradientMask(parameters.items(), 0.3, dense=["odder"])
    for name, p in parameters.items():
        grad = whole(name, torch.float32, 0)
        if name == "odder":
            grad[-1, -1] = float("nan")
        p.grad = ranks.grad(name, grad)
    try:
        mask.mask_grads_()
        message = "no error"
    except RuntimeError as error:
        message = str(error)
    everyone = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, message)
    return everyone


def load_states(ranks: Unsharded) -> list[dict[str, str]]:
    """What each rank says when it loads its own state, and that of rank 0."""
    mask, other = (
        GradientMask(
            [(name, nn.Parameter(ranks.weight(name, whole(name, torch.float32, -1)))) for name in SHAPES],
            0.3,
            refresh_every=None,
        )
        for _ in range(2)
    )
    optimizer, _ = ranks.register(mask), ranks.register(other)
    for name, p in mask.masked_parameters.items():
        ranks.set_grad(name, p, whole(name, torch.float32, 0))
    optimizer.step()
    states = {"own": mask.state_dict()}
    of_rank_0 = [mask.state_dict()]
    dist.broadcast_object_list(of_rank_0, src=0)
    states["rank 0's"] = of_rank_0[0]
    messages = {}
    for whose, state in states.items():
        try:
            other.load_state_dict(state)
            messages[whose] = "loaded"
        except ValueError as error:
            messages[whose] = str(error)
    everyone = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, messages)
    return everyone


def serve_by_kernels() -> list[int]:
    """Let Triton's kernels, in its interpreter, count and apply what is on the CPU; the widths of digits counted."""
    from quick_interpreter import patch_once_a_launch

    from gmt_tune.masking.search import devices
    from gmt_tune.masking.search import triton as kernels

    patch_once_a_launch()
    devices._SERVED = ("cpu",)
    launches, count = [], kernels.Counter.count

    def counted(self, prefixes, shift, width, with_flag):
        launches.append(width)
        return count(self, prefixes, shift, width, with_flag)

    kernels.Counter.count = counted
    return launches


def main(output_file: str) -> None:
    dist.init_process_group("gloo")
    rank, world_size = dist.get_rank(), dist.get_world_size()
    is_interpreted = "TRITON_INTERPRET" in os.environ
    layouts, cases = ways(world_size), policies()
    launches = serve_by_kernels() if is_interpreted else []
    if is_interpreted:
        layouts, cases = {way: layouts[way] for way in INTERPRETED_LAYOUTS}, {case: cases[case] for case in INTERPRETED}
    results = {"policies": {}, "function": run_function(layouts["rows"])}
    for layout, ranks in layouts.items():
        for case, policy in cases.items():
            if layout == "rows" or case in EVERYWHERE:
                results["policies"][f"{case} | {layout}"] = run_policy(policy, ranks)
    agree = [None] * world_size
    numbers = [[s["thresholds"], s["selected"]] for steps in results["policies"].values() for s in steps]
    dist.all_gather_object(agree, numbers)
    results["all ranks found the same"] = all(repr(other) == repr(agree[0]) for other in agree)
    results["nonfinite"] = nonfinite(layouts["rows"], is_interpreted)
    results["dense nonfinite"] = dense_nonfinite(layouts["rows"])
    states = ("rows", "columns", "FSDP2", "flat ranges")
    results["loaded"] = {layout: load_states(layouts[layout]) for layout in states if layout in layouts}
    results["collectives"] = count_collectives() if world_size == 2 and not is_interpreted else {}
    results["launches"] = len(launches)
    if rank == 0:
        torch.save(results, output_file)
    leave()  # without which the process can abort at its end


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    main(sys.argv[1])
