"""A config as it is written: without secrets, without what the environment holds, and still good for comparing."""

import pytest
from omegaconf import OmegaConf
from torchtune.training.metric_logging import DiskLogger

from gmt_tune.integrations.torchtune.checkpoint.config_differences import config_differences
from gmt_tune.integrations.torchtune.config.public import (
    PublicConfigLogger,
    config_to_log,
    environment_checks,
    public_config,
    without_secrets_of,
)


@pytest.fixture
def cfg(tmp_path, monkeypatch):
    monkeypatch.setenv("TEST_TOKEN", "from-the-environment")
    monkeypatch.setenv("TEST_LR", "0.5")
    monkeypatch.delenv("TEST_UNSET", raising=False)
    return OmegaConf.create(
        {
            "output_dir": str(tmp_path / "out"),
            "first": "${oc.env:TEST_TOKEN}",
            "second": "x-${first}",  # through another key
            "rows": [{"name": "${second}"}],
            "lr": "${oc.decode:${oc.env:TEST_LR}}",
            "unset": "${oc.env:TEST_UNSET,7}",
            "logs": "${output_dir}/logs",
            "metric_logger": {"api_key": "plain-secret", "project": "p"},
        }
    )


def test_text_from_the_environment_stays_as_it_was_written(cfg, tmp_path):
    assert public_config(cfg) == {
        "output_dir": str(tmp_path / "out"),
        "first": "${oc.env:TEST_TOKEN}",
        "second": "x-${oc.env:TEST_TOKEN}",
        "rows": [{"name": "x-${oc.env:TEST_TOKEN}"}],
        "lr": 0.5,
        "unset": "7",
        "logs": str(tmp_path / "out" / "logs"),
        "metric_logger": {"api_key": "***", "project": "p"},
    }
    assert OmegaConf.to_container(cfg, resolve=True)["first"] == "from-the-environment"  # as before


def test_a_metric_logger_is_given_no_secret(cfg, tmp_path):
    """torchtune's save the config in output_dir, and resolve it for what they upload."""
    logger = PublicConfigLogger(DiskLogger(str(tmp_path / "logs"), "log.txt"))
    logger.log_config(cfg)
    logger.log_dict({"loss": 1.0}, step=1)
    logger.close()
    saved = (tmp_path / "out" / "torchtune_config.yaml").read_text()
    assert "TEST_TOKEN" in saved and "***" in saved
    resolved = OmegaConf.to_container(config_to_log(cfg), resolve=True)
    for text in (saved, repr(resolved)):
        assert "from-the-environment" not in text and "plain-secret" not in text
    assert resolved["first"] == "${oc.env:TEST_TOKEN}" and resolved["output_dir"] == str(tmp_path / "out")
    assert "loss:1.0" in (tmp_path / "logs" / "log.txt").read_text()


def test_a_traceback_loses_the_secrets_of_its_config(cfg, monkeypatch, tmp_path):
    monkeypatch.setenv("TEST_FOLDER", str(tmp_path))
    cfg.folder = "${oc.env:TEST_FOLDER}/data"
    assert without_secrets_of(cfg, f'File "{tmp_path}/main.py"') == f'File "{tmp_path}/main.py"'  # no secret
    text = without_secrets_of(cfg, "401 for from-the-environment with plain-secret at https://a:b@host")
    assert text == "401 for *** with *** at https://***@host"


def test_a_changed_value_from_the_environment_is_seen_without_being_written(cfg, monkeypatch):
    before = environment_checks(cfg)
    assert before.keys() == {"first", "second", "rows[0].name"}
    assert all(len(check) == 3 for check in before.values())  # 12 bits say next to nothing of a secret
    assert environment_checks(cfg) == before
    monkeypatch.setenv("TEST_TOKEN", "another")
    after = environment_checks(cfg)
    assert all(before[key] != after[key] for key in before)


def test_a_config_of_an_earlier_version_that_was_saved_with_its_values_is_the_same_config(cfg):
    cfg.train_tokens = 4096  # which was hidden
    resolved = OmegaConf.to_container(cfg, resolve=True)
    public = public_config(cfg)
    saved = {**resolved, "metric_logger": {"api_key": "***", "project": "p"}, "train_tokens": "***"}
    assert config_differences(saved, {}, cfg) == []
    assert config_differences(public, environment_checks(cfg), cfg) == []
    assert config_differences({**saved, "first": "other"}, {}, cfg) == [
        "first comes from the environment and is not what it was"
    ]


FROM_TOKEN = {"data_files": ["${oc.env:TEST_TOKEN,/data}/x", "b"]}


@pytest.mark.parametrize(
    "before, after",
    [
        (FROM_TOKEN, {"data_files": ["from-the-environment/x", "b"]}),
        ({"data_files": ["from-the-environment/x", "b"]}, FROM_TOKEN),
        (FROM_TOKEN, {"data_files": ["${oc.env:TEST_UNSET,from-the-environment}/x", "b"]}),
    ],
)
def test_the_same_value_that_is_reached_another_way_is_no_difference(before, after, cfg):
    before, after = OmegaConf.create(before), OmegaConf.create(after)
    saved = public_config(before), environment_checks(before)
    assert config_differences(*saved, after) == []
    after.data_files[0] = "another"
    assert len(config_differences(*saved, after)) == 1


def test_a_hidden_value_that_changes_is_seen_unless_it_is_a_credential():
    def options(key: str, url: str):
        return OmegaConf.create({"dataset": {"storage_options": {"key": key, "token": key, "endpoint_urls": [url]}}})

    before = options("s3cret-key", "https://one")
    saved = public_config(before), environment_checks(before)
    assert "one" not in str(saved)
    assert config_differences(*saved, options("another-key", "https://one")) == []
    assert config_differences(*saved, options("s3cret-key", "https://two")) == [
        "dataset.storage_options.endpoint_urls[0] is not what it was"
    ]


def test_a_resolver_that_keeps_its_results_gives_no_secret_away(cfg):
    register = getattr(OmegaConf, "register_resolver", OmegaConf.register_new_resolver)
    register("test_kept", lambda text: f"<{text}>", use_cache=True, replace=True)
    cfg.kept = "${test_kept:${first}}"
    assert cfg.kept == "<from-the-environment>"
    assert public_config(cfg)["kept"] == "<${oc.env:TEST_TOKEN}>"
    assert cfg.kept == "<from-the-environment>"
