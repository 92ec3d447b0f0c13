"""gmt-tune memory: its exact rows against real tensors, its estimates against what autograd really keeps."""

import json
from functools import partial
from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf

from gmt_tune.cli.configs import devices_of_run_line
from gmt_tune.cli.main import main
from gmt_tune.cli.memory import allocated_bytes, card_table, report
from gmt_tune.errors import UserError
from gmt_tune.integrations.torchtune.plugin.registry import config_paths
from gmt_tune.memory import estimate
from gmt_tune.memory.activations import head_bytes, layer_bytes, on_one_of
from gmt_tune.memory.sharding import Mesh, local_shapes
from gmt_tune.memory.simulation import driver
from gmt_tune.memory.states import optimizer_state_bytes

ROOT = Path(__file__).resolve().parents[2]
SIMULATED = ROOT / "benchmarks" / "results" / "simulated_memory.json"
TINY = {
    "_component_": "torchtune.models.llama3.llama3",
    "vocab_size": 301,
    "num_layers": 2,
    "num_heads": 8,
    "num_kv_heads": 2,
    "embed_dim": 64,
    "intermediate_dim": 176,
    "max_seq_len": 64,
}


@pytest.fixture(autouse=True)
def one_thread():
    """Tiny tensors: a second thread would only wait for the first, long on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def config(**changes):
    """The config of a run of a tiny model, as far as memory depends on it."""
    return OmegaConf.create(
        {
            "model": TINY,
            "tokenizer": {"max_seq_len": 32},
            "optimizer": {"_component_": "torch.optim.AdamW", "fused": True},
            "loss": {"_component_": "torchtune.modules.loss.CEWithChunkedOutputLoss"},
            "gradient_mask": {"_component_": "gmt_tune.GradientMask", "density": 0.2, "dense": ["*norm*"]},
            "batch_size": 2,
            "gradient_accumulation_steps": 2,  # gradients are there when a loss is computed
            "dtype": "bf16",
            **changes,
        }
    )


def complete(**changes):
    """A config that ``tune run`` takes: that of the quickstart, with sections replaced."""
    from gmt_tune.integrations.torchtune.plugin.assets import register_resolver
    from gmt_tune.integrations.torchtune.plugin.registry import config_paths

    register_resolver()
    quickstart = OmegaConf.to_container(OmegaConf.load(config_paths()["quickstart"]))
    return OmegaConf.create({**quickstart, **changes})


def build(dtype=torch.bfloat16, **changes):
    from torchtune import config, training

    with training.set_default_dtype(dtype):
        return config.instantiate(OmegaConf.create({**TINY, **changes}))


def real_bytes(value) -> int:
    """Memory of a tensor, of the tensors that a subclass is made of included."""
    if not isinstance(value, torch.Tensor):
        return 0
    if type(value) is not torch.Tensor and hasattr(value, "__tensor_flatten__"):
        return sum(real_bytes(getattr(value, name)) for name in value.__tensor_flatten__()[0])
    return value.numel() * value.element_size()


def rows_of(result) -> dict[str, int]:
    return {row.name: row.device_bytes for row in result.rows}


def train_a_step(model, optimizer):
    """One real optimizer step; gradients stay."""
    tokens = torch.randint(0, TINY["vocab_size"], (2, 16))
    model(tokens).float().logsumexp(-1).sum().backward()
    with torch.compiler.set_stance("force_eager"):  # torchao's update compiles for 20 s a shape
        optimizer.step()


# ---------------------------------------------------------------------------- exact rows


OPTIMIZERS = {
    "AdamW": ("torch.optim.AdamW", {}),
    "AdamW amsgrad": ("torch.optim.AdamW", {"amsgrad": True}),
    "SGD": ("torch.optim.SGD", {"lr": 0.1}),
    "SGD momentum": ("torch.optim.SGD", {"lr": 0.1, "momentum": 0.9}),
    "Adagrad": ("torch.optim.Adagrad", {}),
    "AdamW8bit": ("torchao.optim.AdamW8bit", {"bf16_stochastic_round": True}),
    "AdamW8bit small blocks": ("torchao.optim.AdamW8bit", {"block_size": 64}),
    "AdamW4bit": ("torchao.optim.AdamW4bit", {}),
    "AdamWFp8": ("torchao.optim.AdamWFp8", {}),
}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_states_weights_and_gradients_equal_those_of_a_real_step(name, dtype):
    path, options = OPTIMIZERS[name]
    model = build(dtype)
    component = getattr(__import__(path.rpartition(".")[0], fromlist=["optim"]), path.rpartition(".")[2])
    optimizer = component(model.parameters(), **options)
    train_a_step(model, optimizer)

    optimizer_section = {"_component_": path, **options}
    rows = rows_of(estimate(config(optimizer=optimizer_section, dtype={2: "bf16", 4: "fp32"}[dtype.itemsize])))
    buffers = sum(real_bytes(m.cache) for m in model.modules() if hasattr(m, "rope_init"))
    assert rows["weights"] == sum(real_bytes(p.data) for p in model.parameters()) + buffers
    assert rows["gradients"] == sum(real_bytes(p.grad) for p in model.parameters())
    states = sum(real_bytes(value) for state in optimizer.state.values() for value in state.values())
    assert rows["optimizer states"] == states


@pytest.mark.parametrize("component", ["llama3_1.llama3_1", "qwen2.qwen2", "phi3.phi3"])
def test_rotary_tables_are_as_large_as_those_of_a_real_model(component):
    section = {**TINY, "_component_": f"torchtune.models.{component}"}
    model = build(**section)
    held = [*(p.data for p in model.parameters()), *(m.cache for m in model.modules() if hasattr(m, "rope_init"))]
    assert rows_of(estimate(config(model=section)))["weights"] == sum(map(real_bytes, held))


def test_optimizer_in_backward_counts_the_largest_gradient_alone():
    largest = max(p.numel() for p in build().parameters())
    assert rows_of(estimate(config(optimizer_in_bwd=True)))["gradients"] == 2 * largest


def test_frozen_parameters_have_no_gradient_and_no_state():
    model, frozen = build(), {"_component_": "gmt_tune.GradientMask", "density": 0.5, "frozen": ["tok_embeddings*"]}
    rows = rows_of(estimate(config(gradient_mask=frozen)))
    trained = [p for name, p in model.named_parameters() if not name.startswith("tok_embeddings")]
    entries = sum(p.numel() for p in trained)
    assert rows["gradients"] == 2 * entries
    assert rows["optimizer states"] == 2 * 2 * entries + 4 * len(trained)


@pytest.mark.parametrize("refresh_every", [1, 4, None])
def test_mask_keeps_one_bit_an_entry_when_it_outlives_a_step(refresh_every):
    from gmt_tune import GradientMask

    model = build(torch.float32)
    mask = GradientMask(model.named_parameters(), density=0.2, dense=["*norm*"], refresh_every=refresh_every)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    mask.register(optimizer)
    train_a_step(model, optimizer)
    real = sum(real_bytes(bits) for bits in mask.state_dict()["selections"].values())

    section = {"_component_": "gmt_tune.GradientMask", "density": 0.2, "dense": ["*norm*"]}
    rows = rows_of(estimate(config(gradient_mask={**section, "refresh_every": refresh_every})))
    assert rows["gradient mask"] == real
    assert (real == 0) == (refresh_every == 1)


def test_a_mask_of_ones_own_is_said_to_keep_bits_if_it_has_a_schedule(monkeypatch):
    """Its class is the config's code, which an estimate does not run: it cannot know."""
    monkeypatch.syspath_prepend(ROOT / "examples")
    from own_rule import OftenFirst

    model = build(torch.float32)
    mask = OftenFirst(model.named_parameters(), density=0.2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    mask.register(optimizer)
    train_a_step(model, optimizer)
    real = sum(real_bytes(bits) for bits in mask.state_dict()["selections"].values())

    section = {"_component_": "own_rule.OftenFirst", "density": 0.2}
    (row,) = [row for row in estimate(config(gradient_mask=section)).rows if row.name == "gradient mask"]
    assert row.device_bytes == real > 0 and not row.exact
    assert row.note == "1 bit an entry, needed if own_rule.OftenFirst overrides refreshes"
    compact = {"_component_": "gmt_tune.CompactAdamW"}
    said = estimate(config(gradient_mask=section, optimizer=compact)).assumptions
    assert "own_rule.OftenFirst is not imported here: tensors are taken to be due as refresh_every says" in said


COMPACT_MODEL = {"vocab_size": 3000}  # so that some tensors have enough selected entries for quantized moments


@pytest.mark.parametrize(("state_bits", "refresh_every"), [(32, 1), (8, 4), (4, None), ("fp8", 2)])
def test_compact_rows_equal_what_a_real_run_holds(state_bits, refresh_every):
    from gmt_tune import CompactAdamW, GradientMask

    model = build(**COMPACT_MODEL)
    torch.manual_seed(0)
    # Not near 1 in 16, where ties that are dropped later decide how places are stored
    section = {"density": 0.03, "dense": ["*norm*"], "refresh_every": refresh_every}
    mask = GradientMask(model.named_parameters(), **section)
    optimizer = CompactAdamW(model.parameters(), state_bits=state_bits)
    mask.register(optimizer)
    held = []
    for step in range(2 * (refresh_every or 1)):
        torch.manual_seed(step)
        for _ in range(2):
            model(torch.randint(0, 3000, (8, 64))).float().logsumexp(-1).sum().backward()
        held.append(
            sum(real_bytes(p.grad) for p in model.parameters())
            + sum(real_bytes(part.local) for part, _ in optimizer._taken.values())
        )
        optimizer.step()
        optimizer.zero_grad()
    states = sum(real_bytes(value) for state in optimizer.state.values() for value in state.values())
    places = [mask.selection(p).places for p in mask.masked_parameters.values()]

    optimizer_section = {"_component_": "gmt_tune.CompactAdamW", "state_bits": state_bits}
    rows = rows_of(
        estimate(
            config(
                model={**TINY, **COMPACT_MODEL},
                optimizer=optimizer_section,
                gradient_mask={"_component_": "gmt_tune.GradientMask", **section},
            )
        )
    )
    assert rows["optimizer states"] == states
    assert rows["gradients"] + rows["due gradients"] == max(held)
    found = [tensor for each in places for tensor in each.lookup if tensor is not None]
    assert rows["gradient mask"] == sum(map(real_bytes, found))


@pytest.fixture
def six_devices():
    """A process group of six devices that exist in name only."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    torch.distributed.init_process_group("fake", store=FakeStore(), rank=0, world_size=6)
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize(("data", "tensor"), [(6, 1), (3, 2)])
def test_shards_have_the_shapes_that_torchtune_gives_them(data, tensor, six_devices):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor.parallel import parallelize_module
    from torchtune import training
    from torchtune.models.llama3 import base_llama_tp_plan

    odd = {"embed_dim": 40, "num_heads": 4, "intermediate_dim": 94}
    with torch.device("meta"):
        whole, model = build(**odd), build(**odd)
    mesh = init_device_mesh("cpu", (data, tensor), mesh_dim_names=("dp", "tp"))
    if tensor > 1:
        model = training.prepare_mha_for_tp(model, mesh["tp"])
        parallelize_module(model, mesh["tp"], parallelize_plan=base_llama_tp_plan())
    conditions = [partial(training.get_shard_conditions, names_to_match=["output"])]
    training.shard_model(model=model, shard_conditions=conditions, cpu_offload=False, dp_mesh=mesh["dp"])

    shapes = local_shapes(whole, Mesh(data, tensor), base_llama_tp_plan())
    assert shapes == {name: p.to_local().shape for name, p in model.named_parameters()}


@pytest.mark.parametrize("family", ["llama3", "qwen2_5", "qwen3"])
def test_a_tensor_parallel_layer_and_its_logits_keep_what_they_keep_on_two_devices(family, six_devices):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import DTensor
    from torch.distributed.tensor.parallel import parallelize_module
    from torchtune import training
    from torchtune.models.llama3 import base_llama_tp_plan

    from gmt_tune.models.qwen3 import qwen3_tp_plan

    plan = qwen3_tp_plan() if family == "qwen3" else base_llama_tp_plan()
    section = FAMILIES[family] | {"vocab_size": 302} | ({"tie_word_embeddings": False} if "qwen" in family else {})
    with torch.device("meta"):
        whole = build(**section)
    model, mesh = build(**section), init_device_mesh("cpu", (3, 2), mesh_dim_names=("dp", "tp"))["tp"]
    parallelize_module(training.prepare_mha_for_tp(model, mesh), mesh, parallelize_plan=plan)
    saved = {}

    def remember(tensor):
        storage = (tensor.to_local() if isinstance(tensor, DTensor) else tensor).untyped_storage()
        saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    hidden = torch.randn(2, 32, TINY["embed_dim"], dtype=torch.bfloat16, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(remember, lambda tensor: tensor):
        model.layers[0](hidden)
    for tensor in (*model.parameters(), *model.buffers()):
        local = tensor.to_local() if isinstance(tensor, DTensor) else tensor
        saved.pop(local.untyped_storage().data_ptr(), None)
    part = on_one_of(whole, local_shapes(whole, Mesh(tensor=2), plan), 2)
    options = {"checkpointed": False, "gradients_stay": True}
    kept = layer_bytes(part.layers[0], hidden.shape, hidden.dtype, **options).kept
    assert kept == pytest.approx(sum(saved.values()), rel=0.01)
    assert kept < 0.8 * layer_bytes(whole.layers[0], hidden.shape, hidden.dtype, **options).kept
    assert part.unembed(torch.empty_like(hidden, device="meta")).shape == model.unembed(hidden).shape


def test_low_bit_states_of_shards_that_are_uneven_stay_unquantized():
    from torchao.optim import AdamW8bit

    even, uneven = torch.Size([64, 64]), torch.Size([65, 65])
    scales_and_table = 2 * (64 * 64 // 256 * 4 + 256 * 4)
    assert optimizer_state_bytes(AdamW8bit, {}, [even], torch.bfloat16) == 2 * 64 * 64 + scales_and_table + 4
    assert optimizer_state_bytes(AdamW8bit, {}, [uneven], torch.bfloat16) == 2 * 2 * 65 * 65 + 4


def test_sharded_rows_shrink_with_the_devices_and_cpu_offload_moves_them_to_the_host():
    one, four = estimate(config()), estimate(config(), world_size=4)
    for name in ("gradients", "optimizer states"):
        assert rows_of(one)[name] / 4 <= rows_of(four)[name] < rows_of(one)[name] / 3
    offloaded = estimate(config(fsdp_cpu_offload=True), world_size=4)
    assert rows_of(offloaded)["gradients"] == rows_of(offloaded)["optimizer states"] == 0
    assert not any("fsdp_cpu_offload" in line for line in offloaded.assumptions)
    # The recipe leaves it out where nothing is sharded
    for changes in ({}, {"device": "cpu"}):
        alone = estimate(config(fsdp_cpu_offload=True, **changes), world_size=4 if changes else 1)
        assert alone.host_bytes == 0 and any(
            "fsdp_cpu_offload: True has no effect" in line for line in alone.assumptions
        )
    assert offloaded.host_bytes > rows_of(four)["gradients"] + rows_of(four)["optimizer states"]


# ---------------------------------------------------------------------------- estimates


SIZES = {key: value for key, value in TINY.items() if key != "_component_"}
FAMILIES = {
    "llama3": {},
    "qwen2_5": {"_component_": "torchtune.models.qwen2.qwen2", "tie_word_embeddings": True},
    "qwen3": {"_component_": "gmt_tune.models.qwen3.qwen3", "head_dim": 16},
    "gemma2": {"_component_": "gmt_tune.models.gemma2.gemma2", "head_dim": 16, "sliding_window_size": 8},
    "phi4": {"_component_": "torchtune.models.phi3.phi3"},
    "mistral_v0_3": {"_component_": "torchtune.models.mistral.mistral"},
}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_a_layer_keeps_what_autograd_saves_in_it(family, dtype):
    model = build(dtype, **FAMILIES[family])
    with torch.device("meta"):
        counted = build(dtype, **FAMILIES[family])
    for layer, meta_layer in zip(model.layers, counted.layers, strict=True):
        saved = {}

        def remember(tensor, saved=saved):
            storage = tensor.untyped_storage()
            saved[storage.data_ptr()] = storage.nbytes()
            return tensor

        inputs = torch.randn(2, 32, TINY["embed_dim"], dtype=dtype, requires_grad=True)
        with torch.autograd.graph.saved_tensors_hooks(remember, lambda tensor: tensor):
            layer(inputs)
        for tensor in (*model.parameters(), *model.buffers()):
            saved.pop(tensor.untyped_storage().data_ptr(), None)
        options = {"checkpointed": False, "gradients_stay": True}
        kept = layer_bytes(meta_layer, inputs.shape, dtype, **options).kept
        assert kept == pytest.approx(sum(saved.values()), rel=0.01)
        assert layer_bytes(meta_layer, inputs.shape, dtype, **options | {"checkpointed": True}).kept == inputs.nbytes


LOSSES = {
    "chunked": "torchtune.modules.loss.CEWithChunkedOutputLoss",
    "whole": "torch.nn.CrossEntropyLoss",
    "linear": "gmt_tune.models.losses.LinearCrossEntropyLoss",
}


@pytest.mark.parametrize(
    ("family", "checkpointing", "loss"),
    [
        ("llama3", True, "chunked"),
        ("gemma2", False, "linear"),
        *(
            pytest.param(*case, marks=pytest.mark.slow)
            for case in [("llama3", False, "whole"), ("qwen3", True, "linear"), ("gemma2", True, "chunked")]
        ),
    ],
)
def test_peak_of_a_micro_batch_is_what_torch_tracks(family, checkpointing, loss):
    from torch.distributed._tools.mem_tracker import MemTracker
    from torchtune import config as tt_config
    from torchtune import modules, training

    shape = {"vocab_size": 3000, "num_layers": 4, "embed_dim": 128, "intermediate_dim": 384, "max_seq_len": 256}
    shape |= FAMILIES[family]
    model = build(**shape)
    if checkpointing:
        training.set_activation_checkpointing(model, auto_wrap_policy={modules.TransformerSelfAttentionLayer})
    loss_fn = tt_config.instantiate(OmegaConf.create({"_component_": LOSSES[loss]}))
    if loss == "chunked":
        model.set_num_output_chunks(loss_fn.num_output_chunks)
    if loss == "linear":
        loss_fn.attach_(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)

    def step_loss(tokens, labels):  # logits live as long as in the recipe
        if loss == "linear":
            with loss_fn.of(labels):
                return model(tokens)
        logits = model(tokens)
        if isinstance(logits, list):
            return loss_fn(logits, labels)
        return loss_fn(logits.reshape(-1, logits.size(-1)), labels.reshape(-1))

    tokens, labels = torch.randint(0, 3000, (2, 2, 128))
    tracker = MemTracker()
    tracker.track_external(model, optimizer)
    with tracker:
        step_loss(tokens, labels).backward()
        tracker.reset_mod_stats()
        step_loss(tokens, labels).backward()  # meets the gradients of the first
    real = sum(device["Total"] for device in tracker.get_tracker_snapshot("peak").values())

    cfg = config(
        model={**TINY, **shape},
        optimizer={"_component_": "torch.optim.SGD", "lr": 0.1},
        loss={"_component_": LOSSES[loss]},
        tokenizer={"max_seq_len": 128},
        gradient_mask=None,
        enable_activation_checkpointing=checkpointing,
    )
    result = estimate(cfg)
    assert result.device_bytes - rows_of(result)["reserve"] == pytest.approx(real, rel=0.05)


def test_head_of_pairs_is_what_a_step_of_dpo_reaches():
    from torch.distributed._tools.mem_tracker import MemTracker
    from torchtune.rlhf import get_batch_log_probs
    from torchtune.rlhf.loss import DPOLoss

    def model():
        return build(torch.float32, vocab_size=4000, num_layers=0)

    hidden, labels = torch.randn(4, 32, TINY["embed_dim"]), torch.randint(0, 4000, (4, 32))
    trained, reference = model(), model()

    def log_probs(logits):
        return [get_batch_log_probs(*half) for half in zip(logits.chunk(2), labels.chunk(2), strict=True)]

    tracker = MemTracker()
    tracker.track_external(trained, reference)
    with tracker:
        policy = log_probs(trained.unembed(hidden))
        with torch.no_grad():
            other = log_probs(reference.unembed(hidden))
        DPOLoss()(*policy, *other)[0].mean().backward()
    real = sum(device["Total"] for device in tracker.get_tracker_snapshot("peak").values())
    real -= sum(map(real_bytes, [*trained.parameters(), *reference.parameters()]))
    with torch.device("meta"):
        counted = model()
    options = {"loss": None, "chunks": 0, "pairs": True, "gradients_stay": True}
    assert head_bytes(counted, hidden.shape, torch.float32, **options).peak == pytest.approx(real, rel=0.02)


@pytest.mark.parametrize(("optimizer", "measured"), [("AdamW", 51.6), ("AdamW8bit", 39.1), ("AdamW4bit", 33.2)])
def test_llama2_7b_agrees_with_what_torchao_measured_on_an_a100(optimizer, measured):
    # GiB allocated at the peak of full bf16 fine-tuning with torchtune; source: torchao/optim/README.md. The compiled
    # update of 4 bits took less scratch then
    package = "torch.optim" if optimizer == "AdamW" else "torchao.optim"
    cfg = config(
        model={"_component_": "torchtune.models.llama2.llama2_7b"},
        optimizer={"_component_": f"{package}.{optimizer}", **({"fused": True} if optimizer == "AdamW" else {})},
        tokenizer={"max_seq_len": 512},
        gradient_mask=None,
        enable_activation_checkpointing=True,
    )
    result = estimate(cfg)
    assert (result.device_bytes - rows_of(result)["reserve"]) / 2**30 == pytest.approx(
        measured, rel=0.05 if optimizer == "AdamW4bit" else 0.02
    )


def test_checkpointing_and_offloading_leave_less_on_the_device():
    more = dict(enable_activation_checkpointing=True, batch_size=64)
    cfgs = [
        config(batch_size=64),
        config(**more),
        config(**more, enable_activation_offloading=True, model={**TINY, "num_layers": 9}),
    ]
    kept, checkpointed, offloaded = (rows_of(estimate(cfg))["activations"] for cfg in cfgs)
    assert checkpointed < kept / 5
    assert offloaded == 2.5 * checkpointed  # five of nine inputs, against two of two
    assert estimate(cfgs[2]).host_bytes == 9 * 64 * 32 * 64 * 2


# ---------------------------------------------------------------------------- the command


def test_prints_a_row_for_each_demand_and_the_cards_it_fits_on(capsys):
    assert main(["memory", "--config", "llama3_1/8B_gmt_single_device"]) == 0
    printed = capsys.readouterr().out
    for text in ("weights", "8.03 B parameters", "AdamW8bit", "total", "fits on: 80 GB, 141 GB", "an estimate"):
        assert text in printed


def test_json_has_bytes_and_overrides_and_devices_apply(capsys):
    arguments = ["memory", "--config", "llama3_2/1B_gmt", "--world-size", "2", "--json"]
    assert main([*arguments, "batch_size=1"]) == 0
    small = json.loads(capsys.readouterr().out)
    assert main([*arguments, "batch_size=4", "tokenizer.max_seq_len=4096"]) == 0
    large = json.loads(capsys.readouterr().out)
    assert small["world_size"] == 2
    assert small["device_bytes"] == sum(row["device_bytes"] for row in small["rows"]) < large["device_bytes"]
    assert "4096 tokens" in large["assumptions"][0]


def test_reads_a_file_of_the_user_and_assumes_a_length_where_there_is_none(capsys, tmp_path):
    file = tmp_path / "mine.yaml"
    OmegaConf.save(complete(model=TINY, tokenizer={**complete().tokenizer, "max_seq_len": None}), file)
    assert main(["memory", "--config", str(file)]) == 0
    assert "64 tokens in a micro-batch (assumed" in capsys.readouterr().out  # the model's own limit


def test_all_prints_a_line_for_each_packaged_config(capsys, monkeypatch):
    from gmt_tune.integrations.torchtune.plugin import registry

    some = {
        name: path for name, path in config_paths().items() if name.endswith("_single_device")
    }  # each takes a while
    monkeypatch.setattr(registry, "config_paths", lambda: some)
    assert main(["memory", "--all"]) == 0
    lines = capsys.readouterr().out.strip().splitlines()
    assert [line.split("`")[1] for line in lines[2:]] == list(some)


def test_beside_prints_both_configs_part_by_part(capsys):
    assert main(["memory", "--config", "llama3_1/8B_gmt_compact", "--beside", "llama3_1/8B_gmt_single_device"]) == 0
    head, _, *lines = capsys.readouterr().out.strip().splitlines()
    assert head == "| GiB on each device | `llama3_1/8B_gmt_compact` | `llama3_1/8B_gmt_single_device` |"
    rows = {name.strip(): cells for name, *cells in (line[1:-1].split("|") for line in lines)}
    assert list(rows)[:2] == ["weights", "gradients"] and list(rows)[-1] == "total"
    compact, dense = (sum(float(cells[i]) for cells in list(rows.values())[:-1] if cells[i].strip()) for i in (0, 1))
    assert compact == pytest.approx(float(rows["total"][0]), abs=0.05)
    assert dense == pytest.approx(float(rows["total"][1]), abs=0.05)
    assert float(rows["gradients"][0]) < 0.1 * float(rows["gradients"][1])


@pytest.mark.parametrize("compares_all", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_configs_agree_with_their_simulated_steps(compares_all):
    """One of each kind and family at least; what changes an estimate or a config simulates it again."""
    simulated = json.loads(SIMULATED.read_text())
    on_gpus = [name for name, path in config_paths().items() if "\ndevice: cpu" not in path.read_text()]
    assert set(simulated) <= set(on_gpus)
    kinds_of = [
        {(name.partition("/")[0], name.partition("_gmt")[2]) for name in names} for names in (on_gpus, simulated)
    ]
    assert kinds_of[0] == kinds_of[1]
    one_of_each = {part: name for name in simulated for part in name.split("_gmt")}  # model, and kind
    for name in simulated if compares_all else set(one_of_each.values()):
        counted = report(name, None, [])
        assert counted["world_size"] == simulated[name]["devices"]
        assert allocated_bytes(counted) == pytest.approx(simulated[name]["peak_bytes"], rel=0.04), name


def test_measuring_without_a_build_for_cuda_is_refused_in_a_sentence(capsys, monkeypatch):
    monkeypatch.setattr(torch.version, "cuda", None)
    driver.answer_without_driver.cache_clear()
    assert main(["memory", "--config", "llama3_2/1B_gmt_single_device", "--measure"]) == 1
    assert "can be simulated only with a build of PyTorch for CUDA" in capsys.readouterr().err
    for more in (["--all"], ["--config", "quickstart"]):
        assert main(["memory", *more, "--measure"]) == 1
    assert "add device=cuda" in capsys.readouterr().err


def test_a_save_in_the_background_takes_a_copy_of_weights_and_states_in_host_memory():
    numel = sum(p.numel() for p in build().parameters())
    saved = [estimate(config(enable_async_checkpointing=is_async)).save_host_bytes for is_async in (False, True)]
    assert saved[0] < 2 * 2 * 301 * 64 + 1
    assert 3 * 2 * numel < saved[1] < 3.2 * 2 * numel  # in bf16: weights and two moments


def test_by_card_names_each_config_once_at_the_smallest_card_that_holds_it_compact_ones_first():
    def report(config, world_size, fits_on, device="cuda"):
        return {"config": config, "world_size": world_size, "fits_on": fits_on, "device": device}

    on_24 = ["24 GB", "40 GB", "48 GB", "80 GB", "141 GB"]
    reports = [
        report("quickstart", 1, ["24 GB"], device="cpu"),
        report("quickstart_dpo", 1, ["24 GB"], device="cpu"),
        report("some/13B_gmt", 8, ["80 GB", "141 GB"]),
        report("some/1.5B_gmt", 2, on_24),
        report("some/1.5B_gmt_compact", 1, on_24),
        report("some/1.5B_gmt_dpo", 4, ["80 GB", "141 GB"]),
        report("some/200M_gmt_cpu", 1, ["24 GB"], device="cpu"),
        report("too/large_gmt", 1, []),
    ]
    assert card_table(reports).splitlines() == [
        "| config | CPU | 24 GB | 80 GB |",
        "|---|---|---|---|",
        "| `quickstart` | itself, `_dpo` |  |  |",
        "| `some/200M_gmt` | `_cpu` |  |  |",
        "| `some/1.5B_gmt` |  | `_compact`, itself (2) | `_dpo` (4) |",
        "| `some/13B_gmt` |  |  | itself (8) |",
    ]


@pytest.mark.parametrize(
    ("line", "devices"),
    [
        ("#   tune run gmt_full_finetune --config x", 1),
        ("#   tune run --nproc_per_node 4 gmt_full_finetune --config x", 4),
        ("#   tune run --nnodes 2 --nproc-per-node=8 gmt_full_finetune", 16),
        ("model: x", 1),
    ],
)
def test_devices_come_from_the_run_line_of_a_config(line, devices):
    assert devices_of_run_line(f"# A config\n#\n{line}\nmodel: y\n") == devices


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--config", "llama3_1/8B_gmt_single_devic"], "did you mean llama3_1/8B_gmt_single_device"),
        (["--config", "nothing/like/it"], "`tune ls` lists them"),
        (["--all", "--beside", "llama3_1/8B_gmt"], "--beside compares with one config"),
        (["--config", "llama3_1/8B_gmt_compact", "~gradient_mask"], "add the section"),
        (["--config", "llama3_1/8B_gmt_compact", "optimizer.state_bits=7"], "state_bits must be one of"),
        (["--config", "llama3_1/8B_gmt", "--by-card"], "--by-card is for all configs"),
        (["--config", "llama3_1/8B_gmt", "--world-size", "0"], "--world-size must be a whole number from 1 on, got 0"),
        (["--config", "llama3_1/8B_gmt", "dtype=fp16"], "dtype must be one of bf16, fp32, got 'fp16'"),
        (["--config", "llama3_1/8B_gmt", "batch_size"], "must be in the form of key=value"),
        (["--config", "llama3_1/8B_gmt", "~batch_size"], "batch_size is missing"),
        (["--config", "llama3_1/8B_gmt", "gradient_mask.density=2"], "density"),
        (["--config", "llama3_1/8B_gmt", "optimizer=torch.optim.AdamX"], "'torch.optim.AdamX' cannot be imported"),
        (["--config", "llama3_1/8B_gmt", "optimizer.beta=1"], "optimizer.beta (1) is no key of"),
        (["--config", "llama3_1/8B_gmt", "model.layers=3"], "model.layers (3) is no key of"),
        (["--config", "llama3_1/70B_gmt", "tensor_parallel_dim=3"], "does not divide 8 devices"),
        (["--config", "llama3_1/8B_gmt", "tensor_parallel_dim=2"], "tensor_parallel_dim: 2 needs tensor_parallel_plan"),
    ],
)
def test_wrong_requests_get_one_sentence(arguments, sentence, capsys):
    assert main(["memory", *arguments]) == 1
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("gmt-tune: ") and sentence in error


@pytest.mark.parametrize(
    ("config", "override", "sentence"),
    [
        ("quickstart", "batch_sise=1", "is no key of this recipe: did you mean batch_size?"),
        ("quickstart", "tokenizer.max_seqlen=16", "tokenizer.max_seqlen (16) is no key of"),
        ("quickstart", "evaluation.sise=16", "evaluation.sise (16) is no key of gmt_tune.data.ExactMatch"),
        ("quickstart", "gradient_mask.densty=1", "did you mean gradient_mask.density?"),
        ("quickstart", "batch_size=0", "batch_size must be a whole number from 1 on, got 0"),
        ("quickstart", "gradient_mask.dense=[*norm*]", "write 'gradient_mask.dense=[\"*norm*\"]'"),
        ("quickstart", "tokenizer.max_seq_len=100000", "the model takes at most 256 tokens: lower it"),
        ("quickstart", "lr_scheduler.num_warmup_steps=few", "num_warmup_steps: few) cannot be made"),
        (
            "llama3_1/8B_gmt_compact",
            "optimizer_in_bwd=True",
            "optimizer_in_bwd: True needs gradient_accumulation_steps",
        ),
        ("llama3_1/8B_gmt_compact", "gradient_mask.scope=global", "scope 'global' does not work with CompactAdamW"),
        (
            "llama3_1/8B_gmt_low_memory",
            "gradient_mask.scope=global",
            "optimizer_in_bwd: True has one at a time: use gradient_mask.scope: tensor",
        ),
        (
            "llama3_1/8B_gmt_compact",
            "optimizer.max_grad_norm=3",
            "clip_grad_norm is 1.0 and optimizer.max_grad_norm is 3",
        ),
        ("llama3_1/8B_gmt_compact", "gradient_mask=null", "and there is none: add the section, or take torch.optim"),
        ("llama3_2/1B_gmt", "custom_sharded_layers=[tok_embeddings]", "must not name tok_embeddings for this model"),
        ("quickstart_dpo", "ref_checkpointer.modle_type=x", "ref_checkpointer.modle_type ('x') is no key of"),
        (
            "quickstart",
            "tokenizer.max_seq_len=long",
            "tokenizer.max_seq_len must be a whole number or null, got 'long'",
        ),
    ],
)
def test_what_tune_run_refuses_is_refused_here_too(config, override, sentence, capsys):
    assert main(["memory", "--config", config, override]) == 1
    printed = capsys.readouterr()
    assert sentence in printed.err and printed.out == ""


@pytest.mark.skipif(torch.cuda.is_available(), reason="it refuses machines without one")
def test_an_optimizer_for_another_device_ends_in_the_sentence_of_tune_run(capsys):
    plain = ["gradient_mask=null", "~optimizer.fused", "optimizer=torchao.optim.CPUOffloadOptimizer"]
    assert main(["memory", "--config", "llama3_1/8B_gmt", *plain]) == 1
    assert "cannot be made: CPU Offload currently only supports CUDA" in capsys.readouterr().err


SECTIONS = (
    "model", "optimizer", "loss", "gradient_mask", "tensor_parallel_plan", "tokenizer", "dataset", "dataset_val",
    "evaluation", "metric_logger", "lr_scheduler", "checkpointer", "profiler",
)  # fmt: skip
# On several devices, since only then a plan is read
MESH = {"tensor_parallel_dim": 2}
PLAN = {"_component_": "torchtune.models.llama3.base_llama_tp_plan"}


@pytest.mark.parametrize("path", ["os.system", "torch.os.system", "torchtune.config._instantiate.os.system"])
@pytest.mark.parametrize("section", SECTIONS)
def test_no_section_runs_what_is_no_part_of_a_run(section, path, tmp_path, capsys):
    command = {"_component_": path, "command": f"touch {tmp_path}/ran"}
    changes = {**MESH, "tensor_parallel_plan": PLAN, section: command}
    OmegaConf.save(complete(**changes), tmp_path / "config.yaml")
    main(["memory", "--config", str(tmp_path / "config.yaml"), "--world-size", "2"])
    printed = capsys.readouterr()
    assert "total" in printed.out or printed.err.startswith("gmt-tune: ")
    assert not (tmp_path / "ran").exists()


def test_modules_of_others_are_not_imported_but_for_the_model(tmp_path, monkeypatch, capsys):
    from gmt_tune.models.tiny import tiny_llama

    (tmp_path / "of_others.py").write_text(
        "from pathlib import Path\n"
        "from torchtune.models.llama3_2 import llama3_2\n"
        "from torchtune.modules import TransformerDecoder\n"
        "(Path(__file__).parent / 'imported').touch()\n"
        "def builder(**sizes) -> TransformerDecoder:\n    return llama3_2(**sizes)\n"
        "def without_annotation(**sizes):\n    return llama3_2(**sizes)\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    foreign = {"_component_": "of_others.Thing", "an_argument": 1}
    mask = {**foreign, "frozen": ["tok_embeddings*"], "dense": ["*norm*"]}
    # Of profilers, torchtune takes its own alone
    others = [s for s in SECTIONS if s not in ("model", "gradient_mask", "tensor_parallel_plan", "profiler")]
    cfg = complete(**dict.fromkeys(others, foreign), gradient_mask=mask, gradient_accumulation_steps=2)
    OmegaConf.save(cfg, "config.yaml")
    assert main(["memory", "--config", "config.yaml", "--json"]) == 0
    rows = {row["name"]: row for row in json.loads(capsys.readouterr().out)["rows"]}
    assert rows["optimizer states"]["note"] == "of_others.Thing, counted as torch.optim.AdamW"
    trained = [p for name, p in tiny_llama().named_parameters() if not name.startswith("tok_embeddings")]
    assert rows["gradients"]["device_bytes"] == sum(real_bytes(p) for p in trained)
    assert not (tmp_path / "imported").exists()

    sizes = {key: value for key, value in TINY.items() if key != "_component_"} | {"max_seq_len": 128}
    for name, sentence in (("builder", ""), ("without_annotation", "add -> TransformerDecoder to your builder")):
        OmegaConf.save(complete(model={"_component_": f"of_others.{name}", **sizes}), "config.yaml")
        assert main(["memory", "--config", "config.yaml"]) == (1 if sentence else 0)
        assert sentence in capsys.readouterr().err


def test_a_builder_that_fails_without_a_word_is_named(tmp_path, monkeypatch, capsys):
    (tmp_path / "silent_builder.py").write_text(
        "from torch import nn\ndef builder() -> nn.Module:\n    raise ValueError\n"
    )
    (tmp_path / "silent_import.py").write_text("raise RuntimeError\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    for path, sentence in (
        ("silent_builder.builder", "model cannot be built (ValueError)"),
        ("silent_import.builder", "cannot be imported (RuntimeError)"),
    ):
        OmegaConf.save(complete(model={"_component_": path}), "config.yaml")
        assert main(["memory", "--config", "config.yaml"]) == 1
        assert sentence in capsys.readouterr().err


def test_chunks_of_the_logits_are_those_of_the_loss():
    loss, model = {"_component_": "torchtune.modules.loss.CEWithChunkedOutputLoss"}, {**TINY, "vocab_size": 30_000}
    working = [
        rows_of(estimate(config(loss=section, model=model, batch_size=64)))["working memory"]
        for section in (None, {**loss, "num_output_chunks": 4}, loss, {**loss, "num_output_chunks": 8})
    ]
    assert working[0] > working[1] > working[2] == working[3]


def test_a_file_that_is_no_config_is_refused(capsys, tmp_path):
    file = tmp_path / "list.yaml"
    for text, sentence in [("- 1\n- 2\n", "is no config"), ("a: [1\nb", "cannot be read as YAML")]:
        file.write_text(text)
        assert main(["memory", "--config", str(file)]) == 1
        assert sentence in capsys.readouterr().err


def test_a_model_of_another_make_has_no_estimate_of_activations():
    cfg = config(model={"_component_": "torch.nn.Linear", "in_features": 8, "out_features": 8}, gradient_mask=None)
    result = estimate(cfg)
    assert rows_of(result)["weights"] == 2 * (64 + 8)
    assert "a Linear is no TransformerDecoder" in {row.name: row.note for row in result.rows}["activations"]
    with pytest.raises(UserError, match="gradient_mask"):
        estimate(config(gradient_mask={"_component_": "gmt_tune.GradientMask", "densty": 0.2}))


def test_a_model_that_does_not_run_without_data_says_so(tmp_path, monkeypatch):
    (tmp_path / "needs_data.py").write_text(
        "from gmt_tune.models.tiny import tiny_llama\n"
        "from torchtune.modules import RMSNorm, TransformerDecoder\n"
        "class Norm(RMSNorm):\n"
        "    def forward(self, x):\n        return super().forward(x) if x.sum() else x\n"
        "def builder() -> TransformerDecoder:\n"
        "    model = tiny_llama()\n    model.norm = Norm(64)\n    return model\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    result = estimate(config(model={"_component_": "needs_data.builder"}, gradient_mask=None))
    notes = {row.name: row.note for row in result.rows}
    assert notes["activations"].startswith("not estimated: the model does not run without data")
    assert "nothing is known" in notes["working memory"]
