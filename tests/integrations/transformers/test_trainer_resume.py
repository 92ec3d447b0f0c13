"""A Trainer run resumed from its checkpoint ends with the bits of one that was not interrupted."""

import json
import shutil
from pathlib import Path

import pytest
import torch

from gmt_tune.integrations.transformers import GradientMaskCallback

RUN = {"max_steps": 8, "save_strategy": "steps", "save_steps": 3, "lr_scheduler_type": "linear"}
RUN |= {"shuffle": True, "num_train_epochs": 2}


@pytest.fixture(scope="module")
def undisturbed(make_trainer_in, tmp_path_factory):
    """Function that gives the Trainer of an undisturbed run; each policy is trained once."""
    trained = {}

    def train(policy, optim="adamw_torch", model=None):
        key = json.dumps([policy, optim])
        if key not in trained:
            settings = {**RUN, "optim": optim, "output_dir": str(tmp_path_factory.mktemp("undisturbed"))}
            trained[key] = make_trainer_in([GradientMaskCallback(**policy)], model, **settings)
            trained[key].train()
        return trained[key]

    return train


@pytest.fixture
def interrupt(undisturbed, tmp_path):
    """Function that gives a checkpoint as a run leaves it that is killed behind step 3."""

    def leave(policy, **run):
        source = Path(undisturbed(policy, **run).args.output_dir) / "checkpoint-3"
        assert (source / "gradient_mask.pt").is_file()
        return Path(shutil.copytree(source, tmp_path / "interrupted" / "checkpoint-3"))

    return leave


def resume(make_trainer, policy, checkpoint: Path, resume_from=True, model=None, **changes):
    callback = GradientMaskCallback(**policy)
    trainer = make_trainer([callback], model, **{**RUN, "output_dir": str(checkpoint.parent), **changes})
    trainer.train(resume_from_checkpoint=resume_from)
    assert callback.mask.step == 8
    return trainer


@pytest.mark.parametrize(
    "policy",
    [
        {"density": 0.2, "refresh_every": 1},
        {"density": 0.2, "refresh_every": 4},
        {"density": 0.2, "refresh_every": None, "scope": "global"},
        {"density": 0.2, "refresh_every": 4, "score": "random"},
    ],
    ids=lambda policy: f"refresh={policy['refresh_every']}-{policy.get('score', 'magnitude')}",
)
def test_resumed_equals_undisturbed(make_trainer, undisturbed, interrupt, same_bits, policy):
    """The checkpoint of step 3 lies inside the second epoch's data and inside a refresh interval of 4."""
    resumed = resume(make_trainer, policy, interrupt(policy))
    assert same_bits(resumed.model.state_dict(), undisturbed(policy).model.state_dict()) == []


def test_resumed_equals_undisturbed_with_torchaos_8_bit_states(
    make_trainer, make_model, undisturbed, interrupt, same_bits
):
    policy, optim = {"density": 0.2, "refresh_every": 4}, "adamw_torch_8bit"
    sizes = {"vocab_size": 128, "hidden_size": 64, "intermediate_size": 64}  # large enough to be quantized
    with torch.compiler.set_stance("force_eager"):
        checkpoint = interrupt(policy, optim=optim, model=make_model(**sizes))
        resumed = resume(make_trainer, policy, checkpoint, model=make_model(**sizes), optim=optim)
    states = resumed.optimizer.optimizer.state.values()
    assert "OptimState8bit" in {type(state["exp_avg"]).__name__ for state in states}
    assert same_bits(resumed.model.state_dict(), undisturbed(policy, optim).model.state_dict()) == []


def test_a_stored_selection_is_needed_to_resume(make_trainer, undisturbed, interrupt, same_bits):
    """The test above can fail: without the file, a new selection would be made where the old one should hold."""
    policy = {"density": 0.2, "refresh_every": 4}
    checkpoint = interrupt(policy)
    content = torch.load(checkpoint / "gradient_mask.pt", weights_only=True)
    content["mask"]["selections"] = {}
    torch.save(content, checkpoint / "gradient_mask.pt")
    resumed = resume(make_trainer, policy, checkpoint)
    assert same_bits(resumed.model.state_dict(), undisturbed(policy).model.state_dict()) != []


def test_resume_from_a_folder_elsewhere(make_trainer, undisturbed, interrupt, same_bits, tmp_path):
    policy = {"density": 0.2, "refresh_every": 4}
    moved = tmp_path / "moved" / "checkpoint-3"
    shutil.move(interrupt(policy), moved)
    # The mask of a checkpoint of another run lies where this run's own would lie: it must not be taken.
    other = tmp_path / "other" / "checkpoint-3"
    shutil.copytree(tmp_path / "moved", tmp_path / "other")
    content = torch.load(other / "gradient_mask.pt", weights_only=True)
    torch.save({**content, "trainer_state": "another run's"}, other / "gradient_mask.pt")

    with pytest.raises(FileNotFoundError, match="set resume_from_checkpoint in the training arguments"):
        resume(make_trainer, policy, other, resume_from=str(moved))
    resumed = resume(make_trainer, policy, other, resume_from=str(moved), resume_from_checkpoint=str(moved))
    assert same_bits(resumed.model.state_dict(), undisturbed(policy).model.state_dict()) == []


def test_refresh_1_needs_no_file(make_trainer, undisturbed, interrupt, same_bits):
    policy = {"density": 0.2}
    checkpoint = interrupt(policy)
    (checkpoint / "gradient_mask.pt").unlink()
    resumed = resume(make_trainer, policy, checkpoint)
    assert same_bits(resumed.model.state_dict(), undisturbed(policy).model.state_dict()) == []


def test_another_policy_than_the_saved_one_is_refused(make_trainer, interrupt):
    checkpoint = interrupt({"density": 0.2})
    with pytest.raises(ValueError, match="density is 0.3, was 0.2"):
        resume(make_trainer, {"density": 0.3}, checkpoint)


def test_checkpoints_of_the_model_alone_hold_no_mask(make_trainer, tmp_path):
    make_trainer([GradientMaskCallback(density=0.2)], **{**RUN, "max_steps": 3, "save_only_model": True}).train()
    files = {path.name for path in (tmp_path / "out" / "checkpoint-3").iterdir()}
    assert "model.safetensors" in files and "gradient_mask.pt" not in files
