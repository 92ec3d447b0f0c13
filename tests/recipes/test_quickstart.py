"""The first command of the README: a fine-tuned model, and what it learnt, from an empty folder."""

import re

import torch

from gmt_tune.data.village import questions


def test_quickstart_turns_wrong_answers_into_right_ones(run_tune, tmp_path, logged_metrics):
    output = tmp_path / "out"
    process = run_tune(
        "run",
        "gmt_full_finetune",
        "--config",
        "quickstart",
        f"output_dir={output}",
        "metric_logger.filename=log.txt",
        cwd=tmp_path,
        timeout=900,
        HF_HUB_OFFLINE="1",
        CXX="/bin/false",  # nothing can be compiled
    )
    accuracy = {when: float(value) for when, value in re.findall(r"accuracy (before|after): (\S+)", process.stdout)}
    assert accuracy["before"] < 0.2
    assert accuracy["after"] > 0.95
    # Nothing but what the run has to say: each checkpoint once, under its own name, and no warning of others' packages
    lines = process.stderr.splitlines()
    saved = [
        line for line in lines if "save" in line.lower() and not re.search("save_every_n_steps|save_model_card", line)
    ]
    assert saved == [f"Saved {output / f'epoch_{epoch}'}." for epoch in range(4)]
    assert not [line for line in lines if re.search("deprecated|torchao/|Profil", line)]

    steps = [step for step in logged_metrics(output) if "loss" in step]
    assert len(steps) == 108 and steps[-1]["loss"] < 0.1 * steps[0]["loss"]
    assert all(0.19 < step["mask/density"] < 0.21 for step in steps)

    assert share_answered_by_transformers(output / "epoch_3") > 0.8


def share_answered_by_transformers(folder) -> float:
    """Ask the saved model some held-out questions the way any user of transformers would."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    asked = questions("held_out")[:20]
    right = 0
    for question in asked:
        chat = [{"role": "user", "content": question.prompt}]
        text = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
        tokens = torch.tensor([tokenizer(text)["input_ids"]])
        generated = model.generate(tokens, max_new_tokens=20)[0, tokens.shape[1] :]
        right += tokenizer.decode(generated, skip_special_tokens=True).strip() == question.answer
    return right / len(asked)
