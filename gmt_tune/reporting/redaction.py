"""One rule for what no file of a run may hold: passwords, tokens and keys. Standard library only.

A value is hidden for its key's name (``api_key``, ``hf_token``, all below ``storage_options``), or for what it looks
like (the password in a URL, a token of a well-known service). Values that come from environment variables are the
business of whoever resolves them: ``public_config`` of the torchtune integration.
"""

import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any

HIDDEN = "***"

_SHORTEST_SECRET = 6  # characters; shorter ones would be found in any text

# Words of a key that make all that is below it secret, wherever they stand in it.
_SECRET_WORDS = {
    "password", "passwords", "passwd", "passphrase", "passcode", "pwd", "secret", "secrets", "credential",
    "credentials", "creds", "apikey", "authorization", "bearer", "cookie", "cookies", "webhook", "netrc",
}  # fmt: skip
_SECRET_LAST_WORDS = {"pat", "pass", "dbpass", "pw", "auth", "authtoken", "accesstoken", "hftoken", "jwt", "dsn"}
_SECRET_WHOLE_KEYS = {"storage_options", "client_kwargs"}
# Without regard to how the words are set apart: AccountKey, ACCOUNTKEY, account_key
_SECRET_ENDINGS = (
    "password", "passwd", "pwd", "apikey", "accountkey", "accesskey", "accesskeyid", "accesssignature",
    "connectionstring",
)  # fmt: skip

# Words before "token" or "tokens" that mean a piece of text, or a number of them.
_TEXT_TOKENS = set(
    """
    bos eos pad unk mask sep cls eot eom eoh bot boi eoi fim prefix suffix middle start end begin stop special
    added additional extra new newline image video audio vision im system assistant think tool max min num n total
    per ignore prompt response completion instruction padding unknown first last next text turn label trigger
    answer query control reserved batch input output train target context sequence seq
    """.split()
)
_PASSES_OVER_DATA = {"first", "second", "last", "next", "forward", "backward", "single", "per", "num"}

# Words before "key" that make it one of a lock rather than of a table.
_KEYS_OF_LOCKS = {
    "api", "access", "secret", "private", "account", "encryption", "ssh", "license", "signing", "subscription", "auth",
    "service", "admin", "deploy", "client", "hf", "wandb", "comet", "openai", "anthropic", "ngc", "kaggle",
}  # fmt: skip

_LOOKS_SECRET = re.compile(
    r"""(?P<before>://)(?:[^/\s@:?\#]*:(?!\d+/)\S+|[^/\s@]+)(?=@)  # user and password of a URL; digits/ are a port
    | (?P<parameter>[?&](?i:[\w-]*(?:token|key|secret|password|sig|signature|credential))=)[^&\s'"]+
    | (?P<bearer>\b[Bb]earer\s+)[\w.~+/=-]{8,}
    | (?P<basic>(?i:\bauthorization['"]?\s*[:=]\s*['"]?basic\s+))[\w+/=-]+
    | (?P<hook>https://hooks\.slack\.com/services/)[\w/-]+
    | \b(?:hf_|api_org_)[A-Za-z0-9]{16,}
    | \bsk-[A-Za-z0-9_-]{16,}
    | \b(?:gh[pousr]_|github_pat_|glpat-|xox[abeprs]-|pypi-|AIza|npm_|nvapi-|r8_|gsk_|dckr_pat_)[A-Za-z0-9_-]{16,}
    | \bdapi[0-9a-f]{32}
    | \b(?:AKIA|ASIA)[A-Z0-9]{16}\b
    | \beyJ[\w-]{8,}\.eyJ[\w-]{8,}\.[\w-]+                          # a JSON web token
    | -----BEGIN\ [A-Z ]*PRIVATE\ KEY-----(?s:.*?)(?:-----END\ [A-Z ]*PRIVATE\ KEY-----|\Z)
    """,
    re.VERBOSE,
)
_ASSIGNMENT = re.compile(r"""([\w-]+)(=['"]?)([^;&\s'"]+)""")


def without_secrets(config):
    """A copy of plain dicts and lists in which passwords, tokens and keys read ``***``, wherever they stand."""
    values = hidden_values(config)

    def hide(value, is_secret: bool):
        if is_secret:  # None, True, False and what is empty say no secret
            return value if value is None or isinstance(value, bool) or value == "" else HIDDEN
        return scrub(value, values) if isinstance(value, str) else value

    return _map_values(config, hide)


def is_secret_key(key: str) -> bool:
    """Whether a key's name says that its value is a secret."""
    words = _words(key)
    if not words:
        return False
    before = words[-2] if len(words) > 1 else None
    if "".join(words).endswith(_SECRET_ENDINGS) or not _SECRET_WORDS.isdisjoint(words):
        return True
    if words[-1] in ("token", "tokens"):
        return before not in _TEXT_TOKENS and "of" not in words and (before is not None or words[-1] == "token")
    if words[-1] in ("key", "keys"):
        return before in _KEYS_OF_LOCKS
    if words[-1] == "pass":
        return before not in _PASSES_OVER_DATA
    return "_".join(words) in _SECRET_WHOLE_KEYS or words[-1] in _SECRET_LAST_WORDS


def is_credential(key: str) -> bool:
    """Whether a value that is hidden is a secret itself, by its own key, rather than beside one."""
    return is_secret_key(key) or _words(key)[-1:] in (["key"], ["keys"], ["id"], ["user"], ["username"])


def _words(key: str) -> list[str]:
    """The words of a key in lower case, without a number at its end."""
    words = re.findall(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+|\d+", key)
    while words and words[-1].isdigit():
        words.pop()
    return [word.lower() for word in words]


def _is_secret(key: str, value) -> bool:
    """:func:`is_secret_key`, where the kind of value does not say otherwise."""
    words = _words(key)
    if words[-1:] == ["headers"]:  # of HTTP rather than of a table
        return isinstance(value, Mapping)
    if words == ["tokens"]:
        return isinstance(value, str)
    if words[-1:] in (["token"], ["tokens"]) and isinstance(value, (int, float)):  # a count, or an id
        return False
    return is_secret_key(key)


def scrub(text: str, values: Iterable[str] = ()) -> str:
    """A text in which ``values``, and what looks like a password or a token, read ``***``."""

    def hide(match: re.Match) -> str:
        return next((group for group in match.groups() if group), "") + HIDDEN

    def hide_assigned(match: re.Match) -> str:
        name, sign, value = match.groups()
        return f"{name}{sign}{HIDDEN}" if _is_secret(name, int(value) if value.isdecimal() else value) else match[0]

    for value in sorted(values, key=len, reverse=True):
        if len(value) >= _SHORTEST_SECRET:
            text = text.replace(value, HIDDEN)
    return _ASSIGNMENT.sub(hide_assigned, _LOOKS_SECRET.sub(hide, text))


def hidden_values(config) -> list[str]:
    """The texts that :func:`without_secrets` hides for their key's name."""
    texts: list[str] = []

    def collect(value, is_secret: bool) -> None:
        if is_secret and value is not None and not isinstance(value, bool):
            texts.append(str(value))

    _map_values(config, collect)
    return texts


def _map_values(config, change: Callable[[Any, bool], Any], is_secret: bool = False):
    """Dicts and lists as they are, with ``change(value, whether a key above it is secret)`` for each other value."""
    if isinstance(config, Mapping):
        return {
            str(key): _map_values(value, change, is_secret or _is_secret(str(key), value))
            for key, value in config.items()
        }
    if isinstance(config, (list, tuple)):
        return [_map_values(value, change, is_secret) for value in config]
    return change(config, is_secret)
