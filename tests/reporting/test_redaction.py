"""What no file of a run may hold is hidden, and nothing else is."""

from pathlib import Path

import pytest
import yaml

from gmt_tune.reporting.redaction import HIDDEN, is_secret_key, without_secrets

ROOT = Path(__file__).parents[2]
TOKEN = "hf_" + "a1B2" * 8


@pytest.mark.parametrize(
    "key",
    [
        "api_key", "apiKey", "WANDB_API_KEY", "wandb-api-key", "token", "hf_token", "use_auth_token", "access_token",
        "tokens_secret", "password", "db_passwd", "passphrase", "client_secret", "aws_secret_access_key", "private_key",
        "credentials", "github_pat", "smtp_pass", "Authorization", "bearer", "slack_webhook_url", "storage_options",
    ],
)  # fmt: skip
def test_a_key_that_is_named_like_a_secret_is_one(key):
    assert is_secret_key(key)
    assert without_secrets({"a": [{key: "s3cret", "b": 1}]}) == {"a": [{key: HIDDEN, "b": 1}]}


@pytest.mark.parametrize(
    "key",
    [
        "tokenizer", "max_tokens", "eos_token", "pad_token", "special_tokens", "tokens", "num_tokens", "key",
        "key_value", "column_map", "secretary", "passes", "path", "tokens_per_second", "monkey", "author", "packed",
    ],
)  # fmt: skip
def test_an_ordinary_key_is_none(key):
    assert not is_secret_key(key)


def test_no_value_of_a_config_that_is_shipped_is_hidden():
    files = sorted((ROOT / "configs").rglob("*.yaml"))
    assert len(files) > 20
    for file in files:
        config = yaml.safe_load(file.read_text())
        assert without_secrets(config) == config, file


def test_what_says_nothing_stays():
    config = {"token": None, "use_auth_token": True, "password": "", "hf_token": False}
    assert without_secrets(config) == config


def test_a_number_and_everything_below_a_secret_key_is_hidden():
    assert without_secrets({"password": 123456}) == {"password": HIDDEN}
    hidden = {"storage_options": {"key": HIDDEN, "hosts": [HIDDEN], "anon": False}}
    assert without_secrets({"storage_options": {"key": "abc", "hosts": ["h"], "anon": False}}) == hidden


@pytest.mark.parametrize(
    "text, wanted",
    [
        ("https://me:s3cret@host.org/x", f"https://{HIDDEN}@host.org/x"),
        ("https://host.org/x?sig=s3cret&page=2", f"https://host.org/x?sig={HIDDEN}&page=2"),
        (f"a {TOKEN} b", f"a {HIDDEN} b"),
        ("Bearer s3cret-s3cret", f"Bearer {HIDDEN}"),
        ("AccountName=me;AccountKey=s3cret==;", f"AccountName=me;AccountKey={HIDDEN};"),
        ("https://host.org/a@b", "https://host.org/a@b"),
        ("models/llama3_2", "models/llama3_2"),
    ],
)
def test_text_that_looks_like_a_secret_is_hidden_under_any_key(text, wanted):
    assert without_secrets({"source": text}) == {"source": wanted}


def test_a_secret_that_is_given_twice_is_hidden_twice():
    config = {"metric_logger": {"api_key": "s3cret-value"}, "run": "x-s3cret-value-y"}
    assert without_secrets(config) == {"metric_logger": {"api_key": HIDDEN}, "run": f"x-{HIDDEN}-y"}
