"""PEFT's method comparison with our methods: its rules, our configs, a real run on the CPU, the committed page."""

import json
from pathlib import Path

import pytest
import torch

from benchmarks.peft_table import __main__ as cli
from benchmarks.peft_table import data, evaluation, page, runner
from benchmarks.peft_table.experiments import config_file, experiments, methods
from gmt_tune.cli.memory import load_config
from gmt_tune.integrations.torchtune.plugin.assets import asset
from gmt_tune.reporting.run_log import RunLog

WORDS = "one two three four five six seven eight nine ten".split()


@pytest.fixture
def local_data(tmp_path, monkeypatch):
    """A folder with files of the shape of MetaMathQA, FineWiki and GSM8K, a few short rows each."""
    rows = [(f"What is {word} times two?", str(2 * number)) for number, word in enumerate(WORDS * 3, start=1)]
    answers = [{"type": "GSM_Rephrased", "query": q, "response": f"It is {a}.\nThe answer is: {a}"} for q, a in rows]
    _write(tmp_path / "data" / "metamathqa.jsonl", answers)
    _write(tmp_path / "data" / "finewiki.jsonl", [{"text": f"{word} is a number. " * 9} for word in WORDS])
    for split, some in (("train", rows[:4]), ("test", rows[4:7])):
        problems = [{"question": q, "answer": f"2*n=<<2*n={a}>>{a}\n#### {a}"} for q, a in some]
        _write(tmp_path / "gsm8k" / f"{split}.jsonl", problems)
    monkeypatch.setenv("GSM8K_DIR", str(tmp_path / "gsm8k"))
    return tmp_path / "data"


def _write(file, rows) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))


# ---------------------------------------------------------------------- the comparison's rules


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("So it is $4^2 = 16$.\nThe answer is: 16", 16.0),
        ("48/2=<<48/2=24>>24\n#### 24", 24.0),
        ("The answer is 5.\nQuestion: What is 6?\nThe answer is 7!", 7.0),
        ("The final answer is: $3.50. ", 3.5),
        ("The answer is: 50%", 50.0),
        ("The answer is: 3/4", 0.75),
        ("The answer is: 9\n\nThat was easy", 9.0),
        ("#### 5 and The answer is: 4", 4.0),  # the mark that comes first in the list, wherever it stands
        ("#### 70,000", "70,000"),  # no number to the comparison: only the same characters are right
        ("The answer is: 1/0", "1/0"),
        ("The answer is: 1e99999999", "1e99999999"),
        ("The answer is: x + 1", "x + 1"),
        ("I do not know", None),
    ],
)
def test_final_answer_is_what_the_comparison_takes(text, answer):
    assert evaluation.final_answer(text) == answer


def test_training_rows_are_short_and_in_buckets_with_the_longest_first(tmp_path, local_data, monkeypatch):
    rows = [{"query": "q" * n, "response": "r"} for n in (5, 1298, 1299, 9, 7, 6, 8, 1)]
    _write(local_data / "metamathqa.jsonl", rows)
    monkeypatch.setattr(data, "BATCHES_IN_BUCKET", 2)
    found = data.prepare(tmp_path / "out", Characters(), local=local_data, steps=3, batch_size=2)
    texts = [json.loads(line)["text"] for line in found.train.read_text().splitlines()]
    assert [text.count("q") for text in texts] == [1298, 9, 7, 5, 8, 6]
    assert texts[1] == f"Question: {'q' * 9} Think step by step.\nAnswer:r"
    assert found.lengths == [len(text) + 2 for text in texts]
    with pytest.raises(cli.UserError, match="training takes 8 rows, but MetaMathQA has 7"):
        data.prepare(tmp_path / "out", Characters(), local=local_data, steps=4, batch_size=2)


def test_answers_are_sampled_where_the_models_own_settings_say_so(monkeypatch):
    from transformers import GenerationConfig

    from benchmarks.quality.evaluation import load_model
    from gmt_tune.models.chatml import ChatMLTokenizer

    monkeypatch.setattr(evaluation, "MAX_NEW_TOKENS", 8)
    folder = Path(asset("quickstart"))
    model, tokenizer = load_model(folder, "cpu", torch.float32), ChatMLTokenizer(str(folder / "tokenizer.json"))
    prompts = [data.prompt(f"Where does {name} live?") for name in ("Ada", "Bartholomew")]

    def answers(seed: int, **settings) -> list[str]:
        model.generation_config = GenerationConfig(**settings)
        torch.manual_seed(seed)
        return evaluation._generated(model, tokenizer, prompts)

    greedy = answers(0, do_sample=False)
    assert all(text.startswith(prompt) for text, prompt in zip(greedy, prompts, strict=True))
    assert greedy == answers(1, do_sample=False)
    assert greedy[1] == evaluation._generated(model, tokenizer, prompts[1:])[0]  # without padding on the left
    assert answers(0, do_sample=True, temperature=5.0) != answers(1, do_sample=True, temperature=5.0)


def test_loss_on_texts_is_of_each_next_token(monkeypatch):
    from benchmarks.quality.evaluation import load_model
    from gmt_tune.models.chatml import ChatMLTokenizer

    folder = Path(asset("quickstart"))
    model, tokenizer = load_model(folder, "cpu", torch.float32), ChatMLTokenizer(str(folder / "tokenizer.json"))
    texts = ["Ada lives in the mill.", "Where?", "The baker is old and lives near the river."]
    monkeypatch.setattr(evaluation, "TEXTS_AT_A_TIME", 2)
    monkeypatch.setattr(evaluation, "LONGEST_TEXT", 6)
    tokens = [torch.tensor(tokenizer.encode(text, add_eos=False)[:6]) for text in texts]
    with torch.no_grad():
        losses = [-model(t[None]).logits[0, :-1].log_softmax(-1).gather(1, t[1:, None]).flatten() for t in tokens]
    assert evaluation.text_loss(model, tokenizer, texts) == pytest.approx(float(torch.cat(losses).mean()), rel=1e-5)


class Characters:
    """A tokenizer whose tokens are characters."""

    def encode(self, text, add_bos, add_eos):
        return [1] * add_bos + [ord(character) for character in text] + [2] * add_eos


def test_numbers_of_training_are_means_of_250_steps_and_the_percentile_of_all(tmp_path, monkeypatch):
    log, clock = RunLog(tmp_path), [0.0]
    monkeypatch.setattr("gmt_tune.reporting.run_log.time.time", lambda: clock[0])
    log.truncate_after(0)
    for step in range(1, 401):
        clock[0] += 2
        log.log(step, {"loss": step <= 250, "peak_memory_reserved": step, "peak_memory_alloc": 1})
    found = runner._of_training(tmp_path, [10] * 1600, 4)
    first, second = found["metrics"]
    assert (first["step"], first["train loss"], first["train time"]) == (250, 1, 500)
    assert (second["step"], second["train loss"], second["elapsed time"]) == (400, 0, 800)
    assert (second["train samples"], second["tokens / sec"], second["mem allocated avg"]) == (1600, 20, 2**30)
    assert found["reserved_max"] == 400 * 2**30
    assert found["reserved_99th"] / 2**30 == pytest.approx(396.01)  # a hundredth of the way from 396 to 397
    assert found["reserved_avg"] / 2**30 == pytest.approx(200.5)


# ---------------------------------------------------------------------- configs


@pytest.mark.parametrize("method", methods())
def test_configs_are_those_of_full_fine_tuning_but_for_optimizer_and_mask(method):
    from torchtune.config import validate

    config, devices = load_config(str(config_file(method)), [])
    validate(config)
    full, _ = load_config(str(config_file("full")), [])
    differ = {key for key in {*config, *full} if config.get(key) != full.get(key)}
    assert differ <= {"optimizer", "gradient_mask", "output_dir", "checkpointer", "metric_logger"}
    assert config.checkpointer == {**full.checkpointer, "output_dir": config.output_dir}
    assert devices == 1
    mask = config.get("gradient_mask")
    assert f"{method.partition('_')[0]}{'_' if mask else ''}{mask.density if mask else ''}" == method
    assert config.optimizer.lr in [experiment.learning_rate for experiment in experiments([method])]


# ---------------------------------------------------------------------- a real run


@pytest.mark.slow
@pytest.mark.parametrize("method", ["full", "masked_0.2", "compact_0.2", "compact_0.05"])
def test_run_trains_measures_and_writes_the_comparisons_json(method, local_data, tmp_path, capsys):
    """Real: ``tune run`` and the evaluation, each in a process, with the quickstart's model in place of Llama."""
    model, results = asset("quickstart"), tmp_path / "results"
    arguments = [
        *("run", method, "device=cpu", "dtype=fp32", "max_steps_per_epoch=5", "lr_scheduler.num_warmup_steps=1"),
        *("model._component_=gmt_tune.models.tiny.tiny_llama", f"checkpointer.checkpoint_dir={model}"),
        *("checkpointer.checkpoint_files=[model.safetensors]", f"tokenizer.path={model}/tokenizer.json"),
        *(
            "tokenizer._component_=gmt_tune.models.chatml.ChatMLTokenizer",
            "log_peak_memory_stats=False",
            "tokenizer.max_seq_len=256",
        ),
        *("--lr", "0.001", "--data", str(local_data), "--results", str(results), "--work", str(tmp_path / "work")),
    ]
    if method.startswith("compact"):
        arguments[2:2] = ["optimizer.state_bits=32", "gradient_mask.refresh_every=2"]
    assert cli.main(arguments) == 0, capsys.readouterr().err
    (file,) = results.glob("*.json")
    result = json.loads(file.read_text())
    on_the_way, last = result["train_info"]["metrics"]
    assert set(page.row_of(result)) | {"task_name"} == set(page.COLUMNS)
    assert (last["step"], last["train samples"]) == (5, 20)
    assert 0 <= last["test accuracy"] <= 1 and on_the_way["valid accuracy"] is not None
    assert last["forgetting"] != 0
    assert result["train_info"]["num_total_params"] * 4 == result["train_info"]["file_size"]
    assert 0 < result["train_info"]["train_time"] < result["run_info"]["total_time"]
    changed = result["gmt_tune"]["fraction_changed"]
    assert (changed < 0.6) == method.startswith("compact")  # five steps: of two layers' turns, few entries
    assert not list((tmp_path / "work").rglob("*.safetensors"))

    made = file.stat().st_mtime_ns
    assert cli.main(arguments) == 0
    assert file.stat().st_mtime_ns == made  # done is done


# ---------------------------------------------------------------------- the page, and bad input


def test_page_is_that_of_the_committed_results():
    assert page.page() == page.PAGE.read_text(encoding="utf-8"), "run `python -m benchmarks.peft_table table`"


def test_a_result_fills_its_row(tmp_path, monkeypatch):
    experiment = experiments(["compact_0.05"], 1e-4)[0]
    published = json.loads((page.HERE / "published.json").read_text())[0]
    train = {name: published[name] for name in page.COLUMNS[6:11]} | {"train_time": 60.4}
    train["metrics"] = [{"test accuracy": 0.5, "train loss": 0.25, "forgetting": -0.125}]
    run = {"experiment_name": experiment.name, "peft_config": {"peft_type": "GMT_COMPACT"}, "total_time": 70.0}
    packages = {"package_info": {"transformers-version": "5.1"}}
    result = {"run_info": run | {"created_at": published["created_at"]}, "train_info": train, "meta_info": packages}
    monkeypatch.setattr(page, "RESULTS", tmp_path)
    runner.result_file(tmp_path, experiment).write_text(json.dumps(result))
    line = page._table([page._own_row(experiment)]).splitlines()[-1]
    cells = [cell.strip() for cell in line.strip("|").split("|")]
    assert cells[0] == "gmt-compact/llama-3.2-3B-density0.05-lr_0.0001"
    assert cells[1:6] == ["GMT_COMPACT", "70", "60", "0.500", "0.250"]
    assert cells[6] == "38,868,615,168" and cells[-4:] == ["2026-07-14", "MetaMathQA", "-0.125", "5.1"]


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["ful"], "there is no method 'ful': choose from full, masked_0.2"),
        (["full", "device=cpu"], "device=cpu makes it another experiment than the table's: give --results"),
        (["full", "--data", "nowhere"], "--data makes it another experiment than the table's"),
        (["full", "--data", "nowhere", "--results", "x"], "metamathqa.jsonl does not exist: --data must name a folder"),
        (
            ["full", "device=cpu", "checkpointer.checkpoint_dir=/nowhere", "--results", "x"],
            "there is no model in checkpointer.checkpoint_dir /nowhere: the first lines of",
        ),
        (["full", "densty=1", "--results", "x"], "densty"),
    ],
)
def test_bad_input_is_answered_in_a_sentence(arguments, sentence, capsys, monkeypatch):
    monkeypatch.delenv("GSM8K_DIR", raising=False)
    assert cli.main(["run", *arguments]) == 1
    error = capsys.readouterr().err
    assert sentence in error and error.startswith("Error: ") and error.count("\n") == 1


def test_without_a_gpu_the_table_cannot_be_made(capsys, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert cli.main(["run", "full"]) == 1
    assert (
        "full trains on device cuda, and PyTorch sees no GPU: run it where one of 48 GB is" in capsys.readouterr().err
    )
