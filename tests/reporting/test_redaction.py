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
        "api_key_2", "token2", "dbpass", "smtp_pw", "dsn", "connection_string", "aws_access_key_id", "ngc_key",
        "kaggle_key", "AccountKey", "SharedAccessSignature",
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
        "label_token", "trigger_token", "batch_tokens", "input_tokens", "end_of_text_token", "headers", "first_pass",
        "shared_key", "bypass",
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
        (
            "https://s3/x?X-Amz-Signature=abc&X-Amz-Credential=AK%2F1",
            f"https://s3/x?X-Amz-Signature={HIDDEN}&X-Amz-Credential={HIDDEN}",
        ),
        ("https://s3/x?X-Amz-Security-Token=abc", f"https://s3/x?X-Amz-Security-Token={HIDDEN}"),
        ("postgresql://u:p@ss/w@h/db", f"postgresql://{HIDDEN}@h/db"),
        ("redis://:s3cret@h/0", f"redis://{HIDDEN}@h/0"),
        ("https://host.org:8080/a@b", "https://host.org:8080/a@b"),
        ("password=hunter22", f"password={HIDDEN}"),
        ("export HF_TOKEN=s3cret", f"export HF_TOKEN={HIDDEN}"),
        ("run --token='s3cret' x", f"run --token='{HIDDEN}' x"),
        ("api_key=s3cret&a=b", f"api_key={HIDDEN}&a=b"),
        ("max_tokens=5 train_tokens=5 eos_token=</s>", "max_tokens=5 train_tokens=5 eos_token=</s>"),
        ("https://hooks.slack.com/services/T0/B0/XX", f"https://hooks.slack.com/services/{HIDDEN}"),
        *((prefix + "a1b2" * 8, HIDDEN) for prefix in ("AIza", "npm_", "nvapi-", "r8_", "gsk_", "dapi", "dckr_pat_")),
        ("Authorization: Basic dXNlcjpwYXNz", f"Authorization: Basic {HIDDEN}"),
        ("Authorization=Basic dXNlcjpwYXNz", f"Authorization={HIDDEN} {HIDDEN}"),
        ("-----BEGIN RSA PRIVATE KEY-----\nMII\n-----END RSA PRIVATE KEY-----\nx", f"{HIDDEN}\nx"),
        ("https://host.org/a@b", "https://host.org/a@b"),
        ("models/llama3_2", "models/llama3_2"),
    ],
)
def test_text_that_looks_like_a_secret_is_hidden_under_any_key(text, wanted):
    assert without_secrets({"source": text}) == {"source": wanted}


def test_a_secret_that_is_given_twice_is_hidden_twice():
    config = {"metric_logger": {"api_key": "s3cret-value"}, "run": "x-s3cret-value-y"}
    assert without_secrets(config) == {"metric_logger": {"api_key": HIDDEN}, "run": f"x-{HIDDEN}-y"}


def test_the_kind_of_value_says_whether_tokens_and_headers_are_secret():
    ordinary = {"train_tokens": 4096, "my_tokens": 1.5, "tokens": [1, 2], "headers": ["a", "b"], "a": {"headers": True}}
    assert without_secrets(ordinary) == ordinary
    secret = {"tokens": "s3cret", "headers": {"x": "s3cret"}, "http_headers": {"x": "s3cret"}}
    assert "s3cret" not in str(without_secrets(secret))
