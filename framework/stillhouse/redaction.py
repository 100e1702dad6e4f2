"""Redaction: secrets are removed from all output: journal, logs, W&B, report and terminal.

A text is secret for one of three reasons: its value is known to this process (`know`), it stands
next to a name of secrets (`password: ...`), or it has the form of a credential (`ghp_...`, a
private key, the password in a URL).
"""

import json
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any
from urllib.parse import quote

REDACTED = "(redacted)"
_LEAST_LENGTH = 8  # of a known value: a shorter one may be part of ordinary words
_known: set[str] = set()


def know(values: Iterable[str]) -> None:
    """Replace these values from now on wherever this process writes them. Values of fewer than 8
    characters are left out."""
    for value in values:
        if len(value) >= _LEAST_LENGTH:
            _known.update((value, quote(value, safe=""), json.dumps(value)[1:-1]))


def secrets_of(environment: Mapping[str, str], *, home: Path) -> set[str]:
    """The secrets of an environment: the values of variables with a name of secrets, and the tokens
    in the files where tools keep them."""
    found = {value.strip() for name, value in environment.items() if _SECRET_VARIABLE.search(name)}
    return found.union(*(_secrets_in(path) for path in _token_files(environment, home)))


# HF_TOKEN, WANDB_API_KEY, AWS_SECRET_ACCESS_KEY, AZURE_STORAGE_SAS_TOKEN,
# GOOGLE_SERVICE_ACCOUNT_KEY, ... but not AWS_ACCESS_KEY_ID
_SECRET_VARIABLE = re.compile(
    r"""(?xi) (?: TOKEN | SECRET | PASSWORD | PASSWD | PASSPHRASE | CREDENTIALS? | CONNECTION_STRING
        | (?:^|_)SAS(?:_KEY)?
        | (?: API | ACCESS | ACCOUNT | STORAGE | PRIVATE | SECRET | AUTH )_?KEY )$"""
)
_TOKEN_FILE_VARIABLE = re.compile(r"(?i)(?:TOKEN|SECRET|PASSWORD)_(?:FILE|PATH)$")
_MOST_BYTES = 1 << 16


def _token_files(environment: Mapping[str, str], home: Path) -> Iterator[Path]:
    """The files where tools keep tokens: the usual ones, and those in variables such as
    HF_TOKEN_PATH and RAY_AUTH_TOKEN_PATH."""
    yield Path(environment.get("HF_HOME") or home / ".cache" / "huggingface") / "token"
    yield home / ".ray" / "auth_token"
    yield Path(environment.get("NETRC") or home / ".netrc")
    for name, value in environment.items():
        if _TOKEN_FILE_VARIABLE.search(name):
            yield Path(value.replace("~", str(home), 1) if value.startswith("~") else value)


def _secrets_in(path: Path) -> set[str]:
    """The passwords of a .netrc, or else the whole text of a file that holds one token; nothing
    where it cannot be read."""
    try:
        with path.open("rb") as file:
            text = file.read(_MOST_BYTES).decode(errors="ignore")
    except (OSError, ValueError):
        return set()
    return set(re.findall(r"\bpassword\s+(\S+)", text)) or {text.strip()}


def scrub(values: Any, *, secret: bool = False) -> Any:
    """The same plain values with every secret text replaced. In a mapping, a key that is a name of
    secrets hides all texts below it."""
    if isinstance(values, Mapping):
        return {
            name: scrub(value, secret=secret or _key_names_a_secret(str(name)))
            for name, value in values.items()
        }
    if isinstance(values, list | tuple):
        return type(values)(scrub(value, secret=secret) for value in values)
    if not isinstance(values, str):
        return values
    return REDACTED if secret else _without_named(_without_formats(_without_known(values)))


def _without_known(text: str) -> str:
    for value in sorted(_known, key=len, reverse=True):  # the longest first: one may be in another
        text = text.replace(value, REDACTED)
    return text


# The forms of credentials. A group in front of the secret is kept.
_FORMATS = [
    re.compile(pattern, re.DOTALL)
    for pattern in (
        r"()-----BEGIN (?:[A-Z0-9]+ )*PRIVATE KEY(?: BLOCK)?-----.*?(?:-----END (?:[A-Z0-9]+ "
        r")*PRIVATE KEY(?: BLOCK)?-----|\Z)",
        # user:password@host, where the password may hold an @, and even a slash;
        # abfss://container@account and ssh://git@host hold none
        r"""(//)[^\s/?#"'<>:@]*:[^\s/?#"'<>]*(?=@)""",
        r"""(//)[^\s/?#"'<>:@\[]+:(?!\d{1,5}(?:[/?#\s]|$))[^\s"'<>]*(?=@)""",
        r"""(?<!abfs:)(?<!abfss:)(?<!ssh:)(//)[^\s/?#"'<>:@]+(?=@)""",
        r"(?<![\w/@:.])()[\w.+-]+:[^\s@/:]+@[^\s@/]+(?=@[\w.-])",
        r"""(\b(?i:bearer)\s+)(?!(?i:tokens?\b|auth|credential))[^\s"'<>,;\\]{6,}""",
        r"(\b(?i:basic)\s+)(?=[A-Za-z]*(?:[\d=+/]|[a-z][A-Z]))[A-Za-z0-9+/]{8,}={0,2}",
        r"(\bmachine\s+\S+\s+(?:login\s+\S+\s+)?password\s+)\S+",  # ~/.netrc
        r"((?i:wandb|w&b)(?:(?!\b(?i:revision|commit|sha|digest))[^\n]){0,60}?)\b[0-9a-f]{40}\b",
        r"()\bwandb_v\d_\w{12,}",
        r"()\bhf_[A-Za-z0-9]{12,}",
        r"()\b(?:gh[pousr]_|github_pat_)\w{12,}",
        r"()\bgl(?:pat|oas|rt|dt|cbt|ptt|ft|imt|soat|agent)-[\w-]{16,}",
        r"()\bxox[a-z]-[\w-]{8,}",
        r"()\b(?:AIza|ya29\.)[\w-]{20,}",
        # an id, and its secret beside it
        r"()\b(?:AKIA|ASIA)[A-Z0-9]{12,}\b"
        r"""(?:[\s:,;/|"']{1,4}[A-Za-z0-9/+=]{40}(?![A-Za-z0-9/+=]))?""",
        r"()\b(?:sk|nvapi)-(?=[\w-]*\d)[\w-]{12,}",
        r"()\b(?:(?:hvs\.|dckr_pat_|pypi-AgE)[\w-]{20,}|npm_[A-Za-z0-9]{36}|dapi[0-9a-f]{32})",
        r"()\beyJ[\w-]{8,}\.eyJ[\w-]{8,}(?:\.[\w-]*)?",  # a JSON web token
    )
]


def _without_formats(text: str) -> str:
    for pattern in _FORMATS:
        text = pattern.sub(rf"\1{REDACTED}", text)
    return text


# A word of a mapping's key that hides all texts below it.
_KEY_WORD = re.compile(
    "token|key|apikey|secret|password|passwd|passphrase|credentials?|authorization"
)
# The last word of a name of secrets; words before `key` that make it one; words before `token` and
# `pwd` that do not, as in pad_token and OLDPWD.
_SECRET_WORD = re.compile(
    ".*(?:password|passwd|passphrase|secret|apikey|accesskey|secretkey|privatekey|authtoken)"
)
_BEFORE_KEY = re.compile(
    "api|access|private|secret|account|client|signing|encryption|ssh|master|shared|auth"
)
_NOT_BEFORE_TOKEN = re.compile(
    "per|pad|eos|bos|unk|sep|cls|mask|special|next|first|last|stop|added|old"
)
_SECRET_PAIRS = frozenset([("amz", "signature"), ("storage", "sas"), ("azure", "sas")])
_PLURALS = frozenset(["secrets", "passwords", "credentials", "keys", "apikeys", "cookies"])

# A name, and what is between it and its value in JSON, YAML, TOML, Python, Rust's debug output,
# XML, headers, assignments, options.
_NAME = re.compile(
    r"""(?:(?P<indent>^[ \t]*(?:-[ \t]+)?) | (?<![\w.-])) (?P<name>[\w.-]+) (?:\\*["'])?
        (?: (?P<between>[ \t]* (?: =>? | := | == | :(?!//) | > ) [ \t]*) (?:\r?\n[ \t]+)?
            (?:Some\()?
          | (?P<option>,?[ \t]+) (?=[^\s-]) )""",
    re.VERBOSE | re.MULTILINE,
)
_QUOTED = re.compile(
    r"""[bBrRuU]{0,2}(?P<quote>\"{3}|'{3}|\\+["']|["'])"""
    r"(?P<inner>(?:\\.|[^\\]){0,4096}?)(?P=quote)",
    re.DOTALL,
)
# a YAML block, a list, a table
_COMPOUND = re.compile(
    r"[|>][+-]?[ \t]*\n(?:[ \t]+[^\n]*(?:\n|\Z))+|\[[^\]]{0,4096}\]|\{[^{}]{0,4096}\}"
)
_HEADER = re.compile(
    r"""(?:AWS4-HMAC-SHA256|Digest|OAuth)\b[^\n]*|[^\s"',;]{0,4096}(?:[ \t]+[^\s"',;]{1,4096})?"""
)
# Authorization: Bearer (redacted)
_DONE = re.compile(rf"(?:(?i:basic|bearer)[ \t]+)?{re.escape(REDACTED)}(?=[\s\"'&<>.,;)}}\]]|\Z)")
_LINE = re.compile(r"[^\n]*")
_WORD = re.compile(r"""[^\s"'&<>]{0,4096}""")
# The form that a value must have to count as a secret, by the kind of its name. It is narrower for
# names that have other uses, too.
_FORMS_OF = {
    "any": re.compile(r"(?!(?i:none|null|true|false)$).+", re.DOTALL),
    "credential": re.compile(r".+", re.DOTALL),
    "header": re.compile(r"(?!(?i:none|null|true|false)$).+"),
    "cookie": re.compile(r".+"),
    "token": re.compile(r"(?!(?:[\d.,e+-]+%?|(?i:none|null|true|false))$)[\w~+=$%.-][^\s<>{}]*"),
    "signature": re.compile(r"(?=\D*\d)[\w%+/=.~-]{16,}"),
    "key": re.compile(r"(?=.{20,256}\Z)(?=[^a-z]*[a-z])(?=[^A-Z]*[A-Z])(?=\D*\d)[\w+/=]+"),
}


def _without_named(text: str) -> str:
    """The text without the values of names of secrets, in any notation and quoting."""
    kept, at = list[str](), 0
    for found in _NAME.finditer(text):
        if found.start() < at or (found["option"] and not found["name"].startswith("-")):
            continue
        kind = _kind_of_secret(found["name"])
        if kind is None or _DONE.match(text, found.end()):
            continue
        begin, end = _value(text, found, kind)
        is_parameter = text.endswith(("?", "&"), 0, found.start())  # of a URL
        if _is_in_a_sentence(found, kind, text[found.end() : end]):
            continue
        if begin < end and (is_parameter or _FORMS_OF[kind].fullmatch(text[begin:end])):
            kept += [text[at:begin], REDACTED]
            at = end
    return "".join([*kept, text[at:]])


def _is_in_a_sentence(found: re.Match[str], kind: str, words: str) -> bool:
    """Whether plain words follow the name, as in `the worst token: power laws`, and the line is not
    of a form such as YAML's."""
    is_possible = kind == "credential" or (kind == "token" and found["indent"] is None)
    return is_possible and ":" in (found["between"] or "") and words.rstrip(".,;").isalpha()


def _kind_of_secret(name: str) -> str | None:
    """The kind of a name, a key of `_FORMS_OF`; None where it is no name of secrets."""
    words = _words(name.rstrip("0123456789._-"))
    last, before = (words[-1] if words else ""), (words[-2] if len(words) > 1 else "")
    last = last.removesuffix("s") if last in _PLURALS else last
    if (
        _SECRET_WORD.fullmatch(last)
        or (last == "key" and _BEFORE_KEY.fullmatch(before))
        or (before, last) in _SECRET_PAIRS
    ):
        return "any"
    if last in ("token", "pwd") and not _NOT_BEFORE_TOKEN.fullmatch(before):
        return "token"
    if last in ("credential", "cookie", "key", "signature"):
        return last
    return {"authorization": "header", "sig": "signature"}.get(last)


def _value(text: str, found: re.Match[str], kind: str) -> tuple[int, int]:
    """Where the value of a name begins and ends, without its quotes."""
    begin = found.end()
    if quoted := _QUOTED.match(text, begin):
        begin, end, behind = quoted.start("inner"), quoted.end("inner"), quoted.end()
        while more := _QUOTED.match(text, behind):  # as a shell joins 'it'"'"'s'
            end, behind = more.end("inner"), more.end()
        return begin, end
    if kind in ("any", "credential") and (compound := _COMPOUND.match(text, begin)):
        return compound.span()
    is_yaml = kind == "any" and found["indent"] is not None and ":" in (found["between"] or "")
    is_open = text.startswith(('"', "'"), begin)  # a quote that is not closed
    whole_line = is_yaml or is_open or kind == "cookie"
    value = (_LINE if whole_line else _HEADER if kind == "header" else _WORD).match(text, begin)
    assert value is not None
    if value[0].endswith(REDACTED):
        return begin, value.end()
    return begin, begin + len(value[0].rstrip(",;)]}"))


def _key_names_a_secret(name: str) -> bool:
    return any(map(_KEY_WORD.fullmatch, _words(name)))


def _words(name: str) -> list[str]:
    """The words of a name, in small letters: api_key, apiKey and API-KEY are two each."""
    spaced = re.sub(r"([a-z0-9])([A-Z])", r"\1 \2", name).lower()
    return re.findall(r"[a-z0-9]+", spaced)
