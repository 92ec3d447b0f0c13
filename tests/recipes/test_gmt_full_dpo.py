"""DPO with a mask: equal to torchtune's own recipe without one, exact when resumed, alike on one process and two."""

import importlib.util
import json
import math
import random
import re
import shutil

import launch
import pytest
import torch
import yaml
from omegaconf import OmegaConf

from gmt_tune.errors import UserError
from gmt_tune.integrations.torchtune.config.check import check_config
from gmt_tune.integrations.torchtune.plugin.registry import config_paths, recipe_path
from gmt_tune.integrations.torchtune.run.preference import OWN_KEYS, check_preference_config

MASK = {"_component_": "gmt_tune.GradientMask", "density": 0.2, "dense": []}
DENSITY_ONE = {**MASK, "density": 1.0}
DPO = {"_component_": "torchtune.rlhf.loss.DPOLoss", "beta": 0.5, "label_smoothing": 0.1}
RSO = {"_component_": "torchtune.rlhf.loss.RSOLoss", "gamma": 0.5}


@pytest.fixture(scope="session")
def dpo_recipe():
    """The class of our recipe, loaded from its file as ``tune run`` does."""
    from gmt_tune.integrations.torchtune.plugin.registry import recipe_path

    spec = importlib.util.spec_from_file_location("gmt_full_dpo_recipe", recipe_path("gmt_full_dpo"))
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.GMTFullDPORecipe


@pytest.fixture(scope="session")
def pairs_file(tmp_path_factory):
    """Function that writes so many pairs of conversations: sums, and next to each a wrong one."""

    def write(count: int, seed: int):
        rng = random.Random(seed)
        file = tmp_path_factory.mktemp("pairs") / "pairs.jsonl"
        with file.open("w") as stream:
            for _ in range(count):
                a, b = rng.randint(0, 50), rng.randint(0, 50)
                question = {"role": "user", "content": f"What is {a} plus {b}?"}
                chosen, rejected = (
                    [question, {"role": "assistant", "content": answer}]
                    for answer in (f"{a} plus {b} is {a + b}.", f"That is {a + b + 1}, I think.")
                )
                stream.write(json.dumps({"chosen": chosen, "rejected": rejected}) + "\n")
        return str(file)

    return write


@pytest.fixture(scope="session")
def dpo_config(tiny_config, pairs_file):
    """Function that gives the config of a DPO run on the tiny model; keywords replace top-level keys."""
    source = {"_component_": "torchtune.datasets.preference_dataset", "source": "json", "split": "train"}
    train, held_out = pairs_file(64, 0), pairs_file(7, 1)

    def make(output_dir, **changes) -> dict:
        config = tiny_config(output_dir)
        config |= {
            "ref_checkpointer": dict(config["checkpointer"]),
            "dataset": {**source, "data_files": train},
            "dataset_val": {**source, "data_files": held_out},
            "batch_size_val": 3,
            "loss": DPO,
        }
        return {**config, **changes}

    return make


def test_losses_and_weights_equal_torchtunes_recipe(
    tmp_path, dpo_config, dpo_recipe, train_by, logged_metrics, final_weights
):
    def run(name, recipe_class=dpo_recipe, **more):
        changes = dict(gradient_accumulation_steps=2, clip_grad_norm=0.5, enable_activation_checkpointing=True)
        train_by(recipe_class, dpo_config(tmp_path / name, **changes, **more))
        lines = [line for line in (tmp_path / name / "logs" / "log.txt").read_text().splitlines() if " loss:" in line]
        numbers = [dict(re.findall(r"(\S+):(?:tensor\()?(-?[\d.e-]+)", line)) for line in lines]
        assert len(numbers) == 4
        return numbers, final_weights(tmp_path / name)

    masks = {"no_mask": None, "density_one": DENSITY_ONE}
    for loss, names in ((DPO, masks), (RSO, ["density_one"])):
        kind = loss["_component_"].rpartition(".")[2]
        wanted, wanted_weights = run(f"torchtune_{kind}", _torchtunes_recipe(), loss=loss)
        assert len({step["loss"] for step in wanted}) == 3  # the rate of the first step is zero
        for name in names:
            numbers, weights = run(f"{name}_{kind}", loss=loss, gradient_mask=masks[name])
            assert [step["loss"] for step in numbers] == [step["loss"] for step in wanted]  # to the last digit
            assert weights.keys() == wanted_weights.keys()
            assert all(torch.equal(weights[key], wanted_weights[key]) for key in weights), (kind, name)
            for step, theirs in zip(numbers, wanted, strict=True):
                # torchtune prints only four decimals of these
                others = theirs.keys() - {"loss", "lr", "tokens_per_second_per_gpu"}
                assert {"rewards/chosen", "rewards/margins"} <= others
                for key in others:
                    assert float(step[key]) == pytest.approx(float(theirs[key]), rel=1e-3, abs=1e-4), key
    _, masked = run("masked", gradient_mask=MASK)  # what shows that the comparison can fail
    assert any(not torch.equal(masked[key], wanted_weights[key]) for key in masked)


def test_with_compact_gradients_at_density_1_losses_and_norms_are_those_of_adamw(
    tmp_path, dpo_config, dpo_recipe, train_by, logged_metrics
):
    """Of eight micro-batches, three to a step, each epoch leaves two over, which the next one's first step divides."""
    common = dict(
        epochs=2, batch_size=8, gradient_accumulation_steps=3, max_steps_per_epoch=None, clip_grad_norm=0.5,
        dataset_val=None,
    )  # fmt: skip
    mask = {**DENSITY_ONE, "refresh_every": None}  # all gradients but the first step's are taken in compactly
    for name, changes in (
        ("dense", dict(optimizer={"_component_": "torch.optim.AdamW", "lr": 1e-3})),
        ("compact", dict(optimizer={"_component_": "gmt_tune.CompactAdamW", "lr": 1e-3}, gradient_mask=mask)),
    ):
        train_by(dpo_recipe, dpo_config(tmp_path / name, **common, **changes))
    for key in ("loss", "grad_norm", "rewards/margins"):
        found, wanted = ([step[key] for step in logged_metrics(tmp_path / name)] for name in ("compact", "dense"))
        assert len(wanted) == 4 and found == pytest.approx(wanted, rel=1e-3), key


def _torchtunes_recipe():
    """Its full_dpo_distributed, as its main function starts it, on one process of a backend that cannot average."""
    from gmt_tune.integrations.torchtune.process_group import ensure_rendezvous
    from gmt_tune.integrations.torchtune.run.base_recipes import load_base_recipe

    class OnOneProcess(load_base_recipe("full_dpo_distributed").FullDPORecipeDistributed):
        def __init__(self, cfg):
            ensure_rendezvous()
            torch.distributed.init_process_group("gloo")
            super().__init__(cfg)

        def train(self):
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(torch.distributed.ReduceOp, "AVG", torch.distributed.ReduceOp.SUM)
                super().train()

    return OnOneProcess


@pytest.mark.parametrize(
    "changes",
    [
        dict(gradient_mask={**MASK, "refresh_every": 3}, gradient_accumulation_steps=2, batch_size=2),
        dict(gradient_mask={**MASK, "score": "random"}, optimizer_in_bwd=True),
        pytest.param(
            dict(gradient_mask=MASK, optimizer={"_component_": "torchao.optim.AdamW8bit", "lr": 1e-3}),
            marks=pytest.mark.slow,  # saved by what test_resume.py checks
        ),
    ],
    ids=["inside a refresh interval", "random, optimizer in backward", "8-bit"],
)
def test_resumed_run_equals_uninterrupted_one(
    changes, tmp_path, dpo_config, dpo_recipe, train_by, logged_metrics, final_weights
):
    def make(name, **more):
        config = dpo_config(tmp_path / name, epochs=2, save_every_n_steps=2, seed=3, **changes, **more)
        # A reference that follows the trained model's folder in the config must not follow it to the checkpoint
        config["ref_checkpointer"]["checkpoint_dir"] = "${checkpointer.checkpoint_dir}"
        return config

    with torch.compiler.set_stance("force_eager"):  # torchao's updates compile for 20 s a shape
        train_by(dpo_recipe, make("straight", run_val_every_n_steps=1))
        losses = [step["loss"] for step in logged_metrics(tmp_path / "straight") if "loss" in step]
        assert len(losses) == 8 and len(set(losses)) >= 7
        shutil.copytree(tmp_path / "straight", tmp_path / "resumed")
        for later in ("epoch_1", "step_6", "logs/log.txt"):
            path = tmp_path / "resumed" / later
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        shutil.rmtree(tmp_path / "resumed" / "epoch_0")  # which leaves step 2, in the middle of the first epoch
        train_by(dpo_recipe, make("resumed", resume_from_checkpoint=True))
    assert [step["loss"] for step in logged_metrics(tmp_path / "resumed") if "loss" in step] == losses[2:]
    wanted, weights = final_weights(tmp_path / "straight", 1), final_weights(tmp_path / "resumed", 1)
    assert all(torch.equal(weights[key], wanted[key]) for key in wanted)


def test_validation_equals_what_transformers_computes(
    tmp_path, tiny_world, dpo_config, dpo_recipe, train_by, logged_metrics
):
    """And the numbers of the two models are not taken for each other's."""
    from transformers import AutoModelForCausalLM

    config = dpo_config(tmp_path, optimizer={"_component_": "torch.optim.AdamW", "lr": 5e-3}, gradient_mask=MASK)
    recipe = train_by(dpo_recipe, config)
    logged = next(step for step in logged_metrics(tmp_path) if "val_loss" in step)
    rows = list(recipe._validation._loader.dataset)
    assert len(rows) == 7
    log_probs = {}
    for name, folder in (("policy", tmp_path / "epoch_0"), ("reference", tiny_world / "model")):
        model = AutoModelForCausalLM.from_pretrained(folder)
        for side in ("chosen", "rejected"):
            log_probs[name, side] = torch.stack([_log_prob(model, row, side) for row in rows])
    rewards = {
        side: 0.5 * (log_probs["policy", side] - log_probs["reference", side]) for side in ("chosen", "rejected")
    }
    margins = rewards["chosen"] - rewards["rejected"]
    losses = -0.9 * margins.sigmoid().log() - 0.1 * (-margins).sigmoid().log()
    wanted = {
        "val_loss": losses.mean(),
        "val_rewards/chosen": rewards["chosen"].mean(),
        "val_rewards/rejected": rewards["rejected"].mean(),
        "val_rewards/margins": margins.mean(),
        "val_rewards/accuracies": (margins > 0).float().mean(),
        "val_preference_accuracy": (log_probs["policy", "chosen"] > log_probs["policy", "rejected"]).float().mean(),
        "val_log_probs/chosen": log_probs["policy", "chosen"].mean(),
        "val_log_probs/rejected": log_probs["policy", "rejected"].mean(),
    }
    for key, value in wanted.items():
        assert logged[key] == pytest.approx(value.item(), rel=1e-4, abs=1e-4), key
    assert logged["val_loss"] < 0.9 * math.log(2)


def test_micro_batches_left_over_at_an_epochs_end_are_divided_by_what_is_there(
    tmp_path, dpo_config, pairs_file, dpo_recipe, train_by, logged_metrics
):
    """At learning rate 0 every loss is ln 2, and a gradient is the mean over its step's pairs alone."""
    frozen = dict(
        optimizer={"_component_": "torch.optim.SGD", "lr": 0.0}, lr_scheduler=None, max_steps_per_epoch=None,
        shuffle=False, clip_grad_norm=1e9, dataset_val=None, loss={**DPO, "label_smoothing": 0.0},
    )  # fmt: skip

    def steps_on(name: str, lines: list[str], **changes) -> list[dict]:
        (tmp_path / f"{name}.jsonl").write_text("".join(lines))
        config = dpo_config(tmp_path / name, **frozen, **changes)
        config["dataset"] = {**config["dataset"], "data_files": str(tmp_path / f"{name}.jsonl")}
        train_by(dpo_recipe, config)
        return logged_metrics(tmp_path / name)

    with open(pairs_file(10, 2)) as file:
        lines = file.readlines()
    steps = steps_on("two_epochs", lines, batch_size=2, gradient_accumulation_steps=2, epochs=2)
    assert len(steps) == 4  # five micro-batches an epoch
    assert [step["loss"] for step in steps] == pytest.approx([math.log(2)] * 4, rel=1e-6)
    # The last two pairs and the first four
    (wanted,) = steps_on("one_step", [*lines[8:], *lines[:4]], batch_size=6)
    assert wanted["grad_norm"] != pytest.approx(steps[0]["grad_norm"], rel=1e-3)  # what shows that this can fail
    for key in ("grad_norm", "log_probs/chosen", "log_probs/rejected", "preference_accuracy"):
        assert steps[2][key] == pytest.approx(wanted[key], rel=1e-4, abs=1e-6), key


def _log_prob(model, row, side) -> torch.Tensor:
    tokens, labels = torch.tensor([row[f"{side}_input_ids"]]), torch.tensor([row[f"{side}_labels"]])
    with torch.no_grad():
        log_probs = model(tokens).logits[0, :-1].log_softmax(-1)
    learnt = [i for i, label in enumerate(labels[0, 1:].tolist()) if label != -100]
    return sum(log_probs[i, labels[0, i + 1]] for i in learnt)


def test_two_processes_train_and_validate_like_one(
    tmp_path, dpo_config, dpo_recipe, train_by, logged_metrics, final_weights
):
    changes = dict(gradient_mask=MASK, max_steps_per_epoch=3, run_val_every_n_steps=2, clip_grad_norm=0.5)
    train_by(dpo_recipe, dpo_config(tmp_path / "one", batch_size=4, **changes))
    config = dpo_config(tmp_path / "two", batch_size=2, **changes)  # of each process
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    launch.torchrun(
        recipe_path("gmt_full_dpo"), "--config", tmp_path / "config.yaml", processes=2, log_dir=tmp_path / "ranks"
    )
    one, two = logged_metrics(tmp_path / "one"), logged_metrics(tmp_path / "two")
    assert len(one) == len(two) == 5
    for step, other in zip(one, two, strict=True):
        assert step.keys() == other.keys()
        for key in step:
            if "second" not in key:
                assert other[key] == pytest.approx(step[key], rel=1e-3, abs=2e-4), key
    weights, others = final_weights(tmp_path / "one"), final_weights(tmp_path / "two")
    for key in weights:
        # Adam moves an entry whose gradient is all but zero by its rate one way or the other: few may
        assert ((weights[key] - others[key]).abs() > 1e-5).float().mean() < 0.01, key


WRONG = [
    (dict(ref_checkpointer=None), "ref_checkpointer is missing in the config: add a section like checkpointer"),
    (dict(ref_checkpoint={}), r"ref_checkpoint .* is no key of this recipe: did you mean ref_checkpointer\?"),
    ({"ref_checkpointer.checkpoint_dir": "/no/such"}, "ref_checkpointer.checkpoint_dir /no/such does not exist"),
    ({"ref_checkpointer.checkpoint_files": ["a.bin"]}, "ref_checkpointer.checkpoint_files names a.bin, which is not"),
    ({"ref_checkpointer.model_type": "GEMMA"}, "ref_checkpointer.model_type is GEMMA, but .* holds a llama model"),
    ({"ref_checkpointer.checkpoint_file": "x"}, r"ref_checkpointer\.checkpoint_file .* did you mean checkpoint_files"),
    ({"loss.betta": 0.1}, r"loss\.betta \(0\.1\) is no key of .*DPOLoss: did you mean beta\?"),
    ({"loss.beta": 0}, "loss.beta must be a number above 0, such as 0.1, got 0"),
    ({"loss.label_smoothing": 0.5}, "loss.label_smoothing must be a number from 0 to below 0.5, got 0.5"),
    (
        dict(loss={"_component_": "torchtune.modules.loss.CEWithChunkedOutputLoss"}),
        "CEWithChunkedOutputLoss is no loss of preferences.*set it to torchtune.rlhf.loss.DPOLoss or",
    ),
    (dict(loss={"_component_": "torchtune.rlhf.loss.PPOLoss"}), "PPOLoss is no loss of preferences"),
    ({"dataset.packed": True}, "dataset.packed: pairs of answers cannot be packed: remove the key"),
]


@pytest.mark.parametrize("changes, message", WRONG, ids=[str(next(iter(changes))) for changes, _ in WRONG])
def test_a_wrong_config_is_named_with_what_is_right(changes, message, tmp_path, dpo_config):
    cfg = OmegaConf.create(dpo_config(tmp_path))
    check_config(cfg, OWN_KEYS)
    check_preference_config(cfg)
    for key, value in changes.items():
        OmegaConf.update(cfg, key, value, merge=False, force_add=True)
    with pytest.raises(UserError, match=message) as caught:
        check_config(cfg, OWN_KEYS)
        check_preference_config(cfg)
    assert "\n" not in str(caught.value)


def test_the_other_recipe_names_the_one_that_a_config_is_for(tmp_path, dpo_config):
    with pytest.raises(UserError, match="ref_checkpointer is no key of this recipe: tune run gmt_full_dpo is the one"):
        check_config(OmegaConf.create(dpo_config(tmp_path)))


def test_data_of_another_kind_is_named_before_the_model_is_loaded(
    tmp_path, tiny_config, dpo_config, dpo_recipe, train_by, caplog
):
    caplog.set_level("INFO")
    with pytest.raises(UserError, match="dataset gives rows without chosen_input_ids, .*preference_dataset"):
        train_by(dpo_recipe, dpo_config(tmp_path, dataset=tiny_config(tmp_path)["dataset"]))
    assert "Instantiating model" not in caplog.text


@pytest.mark.slow
def test_quickstart_learns_what_answers_the_question(dpo_recipe, train_by, tmp_path, logged_metrics, capfd):
    accuracy = _quickstart_accuracy(_run_quickstart(tmp_path, dpo_recipe, train_by) or capfd.readouterr().out)
    assert 0.4 < accuracy["before"] < 0.6
    assert accuracy["after"] > accuracy["before"] + 0.25
    held_out = [step["val_preference_accuracy"] for step in logged_metrics(tmp_path) if "val_loss" in step]
    assert held_out[-1] == pytest.approx(accuracy["after"], abs=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 2])
def test_quickstart_as_a_command_reaches_what_the_docs_say(processes, run_tune, tmp_path):
    launch = ["run", *(["--nproc_per_node", processes] if processes > 1 else []), "gmt_full_dpo"]
    shown = run_tune(
        *launch, "--config", "quickstart_dpo", f"output_dir={tmp_path / 'out'}", cwd=tmp_path, timeout=900,
        HF_HUB_OFFLINE="1",
    )  # fmt: skip
    accuracy = _quickstart_accuracy(shown.stdout)
    assert 0.4 < accuracy["before"] < 0.6 and accuracy["after"] > 0.9


def _run_quickstart(output_dir, dpo_recipe, train_by) -> None:
    from gmt_tune.integrations.torchtune.plugin.assets import register_resolver

    register_resolver()
    cfg = OmegaConf.load(config_paths()["quickstart_dpo"])
    cfg.output_dir = str(output_dir)
    cfg.metric_logger.filename = "log.txt"
    cfg.dataset_val.size = cfg.evaluation.size = 96  # the same ones
    cfg.epochs, cfg.run_val_every_n_steps = 1, 54  # at its end
    train_by(dpo_recipe, cfg)


def _quickstart_accuracy(text: str) -> dict[str, float]:
    found = re.findall(r"preference_accuracy (before|after): (\S+)", text)
    return {when: float(value) for when, value in found}
