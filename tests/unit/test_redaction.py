"""Redaction: a secret is removed wherever it is in a text; what only looks like one stays."""

import json
import secrets
from pathlib import Path
from time import process_time
from typing import Any

import pytest

from stillhouse.redaction import REDACTED, know, scrub, secrets_of

X = "s3cr3t-Do.not~print+this0123456789"
HEX40 = "0123456789abcdef0123456789abcdef01234567"
HEX64 = "9f" * 32
BASIC = "dXNlcjpzM2NyM3QtcHc="  # of user:s3cr3t-pw
PEM = (
    "-----BEGIN RSA PRIVATE KEY-----\nMIIs3cr3tEowIBAAKCAQEA\nq9s3cr3tzz\n-----END RSA PRIVATE "
    "KEY-----"
)
JWT = "eyJhbGciOiJIUzI1NiJ9.eyJzM2NyM3QiOiJzM2NyM3QifQ.s3cr3t-signature_x"

SECRET_TEXTS = [
    # JSON, YAML, TOML, XML, Python and Rust
    ('{"api_key": "%s"}', X),
    ('{"password":"%s","user":"me"}', X),
    ('{\\"client_secret\\": \\"%s\\"}', X),
    ('{"apiKey": "%s"}', X),
    ('{"private_key": "%s"}', "a\\nb\\n" + X),
    ("password: %s", X),
    ("  - passwd: %s", "correct horse battery s3cr3t"),
    ("access_key:\n  %s", X),
    ("url: x\ntoken: %s\n", "passphrasecret"),
    ("--token %s", X),
    ("secret: |\n  first\n  %s\n", X),
    ("api_key = '%s'", X),
    ('credentials = { user = "me", value = "%s" }', X),
    ("<SecretAccessKey>%s</SecretAccessKey>", X),
    ("Client(token='%s', retries=3)", X),
    ('S3Config { secret_access_key: Some("%s"), region: "x" }', X),
    ("{'passwords': ['first', '%s']}", X),
    # options, assignments, headers
    ("stillhouse run x.toml --token %s", X),
    ("tool --token=%s --verbose", X),
    ("['tool', '--api-key', '%s']", X),
    ("""tool --password 'it'"'"'s %s'""", X),
    ('export HF_TOKEN="%s"', X),
    ("AWS_SECRET_ACCESS_KEY=%s python x.py", X),
    ("MY_PASSWORD1=%s", X),
    ("PGPASSWORD=%s psql", X),
    ("accesskey: '%s'", X),
    ("Authorization: Basic %s", BASIC),
    ("401 for Authorization: Bearer %s", X),
    ("authorization: %s; then it ended", X),
    (
        "Authorization: AWS4-HMAC-SHA256 Credential=AKIAIOSFODNN7EXAMPLE/us, Signature=%s",
        "5cr37" + HEX64,
    ),
    ("[('authorization', 'Basic %s')]", BASIC),
    ("X-Api-Key: %s", X),
    ("Set-Cookie: session=%s; Path=/", X),
    # forms of what services hand out
    ("cannot log in with %s", "hf_" + "s3cr3tAbcdefghijklmnopqrstuvwxyz01"),
    ("wandb: logging in with %s", HEX40),
    ("machine api.wandb.ai\n  login user\n  password %s", HEX40),
    ("WANDB_API_KEY=%s", HEX40),
    ("the key is %s", "wandb_v1_" + "s3cr3t0123456789abcdefghij"),
    ("clone failed: %s", "glpat-" + "s3cr3t_0123456789abc"),
    ("clone failed: %s", "ghp_" + "s3cr3t0123456789abcdefghijklmnopqrst"),
    ("clone failed: %s", "github_pat_" + "s3cr3t0123456789_abcdef"),
    ("posting with %s", "xoxb-" + "123456789012-s3cr3t"),
    ("GET https://maps.example/v1?x=1&key=%s", "AIza" + "Sys3cr3t0123456789abcdefghijklmnop"),
    ("refused: %s", "AIza" + "Sys3cr3t0123456789abcdefghijklmnop"),
    ("AKIAIOSFODNN7EXAMPLE:%s", "wJalrXUtnFEMIs3cr3tDENG/bPxRfiCYEXAMPLEK"),
    ("openai said no to %s", "sk-proj-" + "s3cr3t0123456789"),
    ("the header was %s", JWT),
    ("cannot parse %s", PEM),
    ('{"key_file": "%s"}', PEM.replace("\n", "\\n")),
    ("cut short: %s", PEM[:70]),
    # URLs
    ("s3://me:%s@bucket/prefix", X),
    ("postgres://user:%s@host:5432/db", "p@s3cr3t@ss"),
    ("cannot reach user:%s@host", "p@s3cr3t"),
    ("https://user:%s@host/path", "p/s3cr3t/w"),
    ("https://%s@example.com/repo.git", X),
    ("az://container/x?sv=2024&sig=%s&se=1", "s3cr3t%2Bx%3D"),
    ("https://b.s3.amazonaws.com/k?X-Amz-Signature=%s&X-Amz-Expires=60", HEX64),
    ("https://b.s3.amazonaws.com/k?X-Amz-Security-Token=%s", "s3cr3t%2F%2Fxyz"),
    ("https://example.com/?access_token=%s#x", "s3cr3t"),
]

INNOCENT_TEXTS = [
    f"recipe {HEX64}",
    f'{{"teacher_digest": "{HEX64}", "k": 64}}',
    f"revision = '{HEX40}'",
    f"Qwen/Qwen3-4B at revision {HEX40}",
    f"versions: wandb 0.31, at revision {HEX40}",
    f"sha256:{HEX64}",
    f"key: {HEX64}",
    "tokens_per_s: 5",
    '{"tokens_per_s": 1234.5, "num_tokens": 4096}',
    "token_ids = [1, 2, 3]",
    "token: 17",
    "bytes_per_token = 176",
    "block_tokens = 512, max_tokens=5",
    '"eos_token": "<|endoftext|>", "pad_token": "x"',
    "student.tokenizer = 'acme/small'",
    "the teacher's tokenizer ends at id 299, the student's at 309",
    "/runs/distil/checkpoints/step-00000005.json: its checksum differs",
    "s3://bucket/casks/0123456789abcdef/chunks/0000000012.safetensors",
    "http://localhost:7070/model@main",
    "http://[::1]:8000/a@b",
    "versity/versitygw:v1.8.0@sha256:" + HEX64,
    "abfss://container@account.dfs.core.windows.net/prefix",
    "write to owner@example.com",
    "permission denied: check the credentials and their rights to list, read, create and delete "
    "here",
    "no credentials were found: set those of the store's provider in the environment, such as "
    "AWS_ACCESS_KEY_ID",
    "the key model.layers.0.self_attn.q_proj.weight is missing",
    "key: model.layers.0.self_attn.q_proj.weight",
    "AWS_SHARED_CREDENTIALS_FILE=/home/me/.aws/credentials",
    "RAY_AUTH_TOKEN_PATH=/home/me/.ray/auth_token",
    "PWD=/home/me OLDPWD=/tmp",
    "hf_hub_download failed for hf_transfer_is_enabled",
    "Basic authentication is wanted; a bearer token is missing",
    'run `wandb login`, or set tracking.wandb = "offline"',
    "password=None, token=null, secret = false",
    "chunk 3: targets has shape (8, 32, 88), wanted (8, 32, 96)",
    "error: student.learning_rte: did you mean 'learning_rate'?",
    "File \"loader.py\", line 31, in rows: KeyError: 'input_ids'",
    "global-batch-sequences-per-rank-2",
    "Error getting credentials: dispatch failure",
    "mean KL, worst token: power laws",
    "answers without a token: whether the head lives",
    "Credentials: Hugging Face's token is read where the command starts",
    "tail_draws = 40; value_bits = 8; temperature = 1.0",
]


@pytest.mark.parametrize(
    ("text", "secret"), SECRET_TEXTS, ids=[text[:40] for text, _ in SECRET_TEXTS]
)
def test_no_part_of_a_secret_stays(text: str, secret: str) -> None:
    scrubbed = scrub(text % secret)
    assert REDACTED in scrubbed
    for part in (secret, *secret.split("@"), *secret.split("/"), *secret.split()):
        assert len(part) < 4 or part not in scrubbed
    assert "s3cr3t" not in scrubbed
    assert BASIC not in scrubbed


@pytest.mark.parametrize(
    ("text", "secret"), SECRET_TEXTS, ids=[text[:40] for text, _ in SECRET_TEXTS]
)
def test_what_was_scrubbed_once_does_not_change_again(text: str, secret: str) -> None:
    assert scrub(scrub(text % secret)) == scrub(text % secret)


@pytest.mark.parametrize("text", INNOCENT_TEXTS)
def test_what_only_sounds_secret_stays(text: str) -> None:
    assert scrub(text) == text


@pytest.mark.parametrize(
    "values",
    [
        {"api_key": X},
        {"hf_token": X},
        {"resources": {"dbPassword": [X]}},
        {"url": f"s3://me:{X}@bucket/prefix"},
        {"url": f"az://container/x?sv=2024&sig={X}&se=1"},
        {"command": f"HF_TOKEN={X} stillhouse run x.toml"},
        {"command": f"stillhouse run --set 'x.secret = \"{X}\"'"},
        {"message": f"401 for Authorization: Bearer {X}"},
        {"message": f"cannot log in with hf_{X[:6] + '0' * 20}"},
    ],
)
def test_secrets_are_scrubbed_by_name_and_by_look(values: dict[str, Any]) -> None:
    assert "s3cr3t" not in json.dumps(scrub(values))


def test_scrubbing_leaves_what_only_sounds_secret() -> None:
    values = {
        "block_tokens": 512,
        "bytes_per_token": 176,
        "tokenizer": "acme/tokenizer",
        "tokens_per_s": 1.5,
        "url": "s3://bucket/prefix",
        "command": "stillhouse run --set 'student.tokenizer = \"acme/small\"' --set "
        "'student.block_tokens = 3'",
        "recipe_fingerprint": "0f" * 32,
        "revision": "a1" * 20,
    }
    assert scrub(values) == values


def test_the_text_around_a_secret_stays() -> None:
    assert (
        scrub(f'{{"api_key": "{X}", "region": "eu"}}')
        == f'{{"api_key": "{REDACTED}", "region": "eu"}}'
    )
    assert scrub(f"Client(token='{X}', retries=3)") == f"Client(token='{REDACTED}', retries=3)"
    assert (
        scrub(f"GET https://me:{X}@host/a?sig={X}&b=1: 403")
        == f"GET https://{REDACTED}@host/a?sig={REDACTED}&b=1: 403"
    )
    assert (
        scrub(f"401 for Authorization: Bearer {X}; log in")
        == f"401 for Authorization: Bearer {REDACTED}; log in"
    )


def test_what_follows_a_part_that_was_replaced_is_not_taken_for_innocent() -> None:
    assert scrub(f"password: one {REDACTED}") == f"password: {REDACTED}"
    assert scrub(f"password={REDACTED}-and-more") == f"password={REDACTED}"


def test_a_key_that_names_a_secret_hides_all_texts_below_it_and_no_number() -> None:
    values = {
        "dbPassword": [X],
        "credentials": {"user": {"id": X}},
        "bytes_per_token": 176,
        "hf_token": None,
    }
    assert scrub(values) == {
        "dbPassword": [REDACTED],
        "credentials": {"user": {"id": REDACTED}},
        "bytes_per_token": 176,
        "hf_token": None,
    }


def test_a_known_value_is_replaced_wherever_it_occurs() -> None:
    # new in each run: a process does not forget
    known = f'{secrets.token_hex(8)} /"{secrets.token_hex(8)}'
    text = f"x{known}y"
    assert scrub(text) == text
    know([known])
    assert scrub(text) == f"x{REDACTED}y"
    assert scrub([json.dumps(known)]) == [f'"{REDACTED}"']
    assert (
        scrub(
            "see https://host/" + known.replace(" ", "%20").replace("/", "%2F").replace('"', "%22")
        )
        == f"see https://host/{REDACTED}"
    )


def test_secrets_are_what_variables_name_so_hold_and_what_tools_keep_in_files(
    tmp_path: Path,
) -> None:
    kept = {
        ".cache/huggingface/token": "hub-token-of-a-file\n",
        ".ray/auth_token": "ray-token-of-a-file",
        ".netrc": "machine api.wandb.ai\n  login user\n  password wandb-key-of-a-file\nmachine x "
        "login y password second-password\n",
        "web-identity": "identity-of-a-file",
    }
    for name, text in kept.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    secret = {
        *(
            "HF_TOKEN",
            "WANDB_API_KEY",
            "AWS_SECRET_ACCESS_KEY",
            "AWS_SESSION_TOKEN",
            "RAY_AUTH_TOKEN",
            "GOOGLE_API_KEY",
            "PGPASSWORD",
        ),
        *(
            "GOOGLE_SERVICE_ACCOUNT_KEY",
            "AZURE_STORAGE_ACCOUNT_KEY",
            "AZURE_STORAGE_SAS_KEY",
            "AZURE_CLIENT_SECRET",
            "S3_SECRET_KEY",
        ),
    }
    innocent = {
        "AWS_ACCESS_KEY_ID",
        "AWS_REGION",
        "TOKENIZERS_PARALLELISM",
        "RAY_AUTH_MODE",
        "GOOGLE_APPLICATION_CREDENTIALS_PATH",
    }
    environment = {name: f"value of {name}" for name in secret | innocent} | {
        "AWS_WEB_IDENTITY_TOKEN_FILE": "~/web-identity"
    }
    of_files = {
        "hub-token-of-a-file",
        "ray-token-of-a-file",
        "wandb-key-of-a-file",
        "second-password",
        "identity-of-a-file",
    }
    assert (
        secrets_of(environment, home=tmp_path) == {f"value of {name}" for name in secret} | of_files
    )
    assert secrets_of({}, home=tmp_path / "absent") == set()


def test_a_known_value_that_is_short_stays_for_it_could_be_a_word() -> None:
    know(["student"])
    assert scrub("student rank 0") == "student rank 0"


def test_a_long_text_takes_no_time_that_grows_with_its_square() -> None:
    began = process_time()
    for piece in (
        "a",
        "key=",
        "//",
        "password: ",
        "token='",
        "\\",
        "wandb ",
        "a:",
        "a:b@",
        "secrets: [",
        "- ",
    ):
        scrub(piece * (50_000 // len(piece)))
    assert process_time() - began < 5  # seconds
