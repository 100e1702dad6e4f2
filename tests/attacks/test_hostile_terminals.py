"""What stores, files, templates and errors hold is shown on a terminal and does not steer it; a
command's last words hold no secret."""

import io
import json
import os
import secrets
import subprocess
import sys
import unicodedata
from pathlib import Path

import pytest
from rich.console import Console

from helpers.chunks import make_chunk, small_recipe
from helpers.command import Outcome, as_toml, stillhouse
from helpers.models import make_model
from helpers.world import TinyWorld, merged
from stillhouse.errors import StoreError
from stillhouse.pipeline.attempt import attempt
from stillhouse.redaction import know
from stillhouse.store import ChunkStore
from stillhouse.tracking import EndEvent, ProgressView, StartEvent, WaitEvent, read_journal

CLEAR = "\x1b[2J"
STEERING = f"[/x]{CLEAR}\x07\x9b2J\r\u202ex"
BIDIRECTIONAL = {"LRE", "RLE", "LRO", "RLO", "PDF", "LRI", "RLI", "FSI", "PDI"}

ENDS_IN_A_BUG = """
import os
from stillhouse.cli.main import app, main

@app.command()
def stumble():
    raise ValueError(os.environ["MESSAGE"])

main()
"""


def steers(text: str) -> set[str]:
    """The characters of a text that a terminal obeys instead of showing them."""
    return {
        each for each in text if unicodedata.category(each) in ("Cc", "Cs") and each not in "\n\t"
    } | {each for each in text if unicodedata.bidirectional(each) in BIDIRECTIONAL}


def assert_harmless(outcome: Outcome, *, code: int, shows: str) -> None:
    assert outcome.code == code, outcome
    assert steers(outcome.out) == set()
    assert steers(outcome.err) <= {"\r"}  # of the progress bars of `datasets`
    assert shows in outcome.out + outcome.err


@pytest.fixture
def store(tmp_path: Path) -> ChunkStore:
    """A store whose recipe has a hostile text in each field that takes any."""
    fields = ("corpus_digest", "tokenizer_digest", "teacher_digest", "teacher_dtype")
    recipe = small_recipe(**dict.fromkeys(fields, STEERING + "\n  not there         none"))
    store = ChunkStore.create(str(tmp_path / "store"), recipe)
    store.publish(make_chunk(recipe, 0))
    return store


@pytest.fixture
def in_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")


def test_ls_shows_a_recipe_whose_teacher_is_markup_and_escape_sequences(store: ChunkStore) -> None:
    assert_harmless(stillhouse("store", "ls", store.url), code=0, shows="[/x]\\x1b[2J")


def test_stat_shows_each_field_on_a_line_of_its_own(store: ChunkStore) -> None:
    outcome = stillhouse("store", "stat", store.url)
    assert_harmless(outcome, code=0, shows="[/x]\\x1b[2J\\x07\\x9b2J\\x0d\\u202ex\\n")
    (line,) = (line for line in outcome.out.splitlines() if line.startswith("  not there"))
    assert line.startswith("  not there         1-2: ")


def test_verify_shows_the_names_of_strange_fields_and_of_damaged_files(store: ChunkStore) -> None:
    folder = Path(store.url) / store.folder
    values = json.loads((folder / "recipe.json").read_text())
    (folder / "recipe.json").write_text(json.dumps(values | {STEERING: 1}))
    assert_harmless(stillhouse("store", "verify", store.url), code=1, shows="[/x]\\x1b[2J")


@pytest.mark.parametrize(
    ("name", "code"), [("\x9b2J", 0), ("\u202ex", 0), (CLEAR, 2)]
)  # 2: it cannot be an object's key
def test_sweep_shows_the_names_in_quarantine(store: ChunkStore, name: str, code: int) -> None:
    (Path(store.url) / store.folder / "quarantine").mkdir()
    (Path(store.url) / store.folder / "quarantine" / name).write_bytes(b"half a chunk")
    assert_harmless(stillhouse("store", "sweep", store.url), code=code, shows="/quarantine")


def test_an_error_shows_a_name_that_is_no_text() -> None:
    assert_harmless(
        stillhouse("store", "ls", os.fsdecode(b"/nowhere/\x9b2J")),
        code=2,
        shows="/nowhere/\\udc9b2J",
    )


@pytest.mark.usefixtures("in_empty_folder")
def test_check_shows_what_a_chat_template_raises(tiny_world: TinyWorld, tmp_path: Path) -> None:
    make_model(
        tmp_path / "chatty",
        vocab_size=300,
        chat_template="{{ raise_exception('" + CLEAR + "\\u202e password: hunter2hunter2') }}",
    )
    turns = [{"role": "user", "content": "Why?"}, {"role": "assistant", "content": "Why not?"}]
    (tmp_path / "chat.jsonl").write_text(json.dumps({"messages": turns}) + "\n")
    chatty = {"model": str(tmp_path / "chatty")}
    values = merged(
        tiny_world.values,
        {
            "corpus": {"dataset": str(tmp_path / "chat.jsonl"), "format": "chat"},
            "teacher": chatty,
            "student": chatty,
        },
    )
    Path("chat.toml").write_text(as_toml(values))
    outcome = stillhouse("check", "chat.toml", cache=tmp_path / "cache")
    assert_harmless(outcome, code=2, shows="\\x1b[2J\\u202e password: (redacted)")


@pytest.mark.usefixtures("in_empty_folder")
def test_check_takes_a_corpus_whose_name_is_markup(tiny_world: TinyWorld, tmp_path: Path) -> None:
    dataset = tmp_path / "a[" / "b]" / f"{CLEAR}.jsonl"
    dataset.parent.mkdir(parents=True)
    dataset.write_bytes(Path(tiny_world.values["corpus"]["dataset"]).read_bytes())
    Path("tiny.toml").write_text(as_toml(merged(tiny_world.values, {"student": {"max_steps": 5}})))
    outcome = stillhouse(
        "check",
        "tiny.toml",
        "--set",
        f"corpus.dataset = {json.dumps(str(dataset))}",
        cache=tmp_path / "cache",
    )
    assert_harmless(outcome, code=0, shows="a[/b]/\\x1b[2J.jsonl")


@pytest.mark.parametrize("is_terminal", [True, False])
def test_the_progress_view_shows_what_machines_are_missing(is_terminal: bool) -> None:
    shown = {}
    for missing in ("nothing", STEERING):
        out = io.StringIO()
        with ProgressView(
            Console(file=out, width=200, force_terminal=is_terminal, color_system=None),
            clock=lambda: 100.0,
        ) as view:
            view.record(WaitEvent(missing, time=100.0))
        shown[missing] = out.getvalue()
    # what rich itself says to a terminal
    assert steers(shown[STEERING]) == steers(shown["nothing"])
    assert CLEAR not in shown[STEERING]
    assert "[/x]\\x1b[2J\\x07" in shown[STEERING]


def test_a_bug_keeps_its_traceback_without_secrets_and_escape_sequences() -> None:
    secret = secrets.token_hex(16)
    environment = os.environ | {
        "WANDB_API_KEY": secret,
        "MESSAGE": f"{STEERING} cannot log in with {secret}",
    }
    command = [sys.executable, "-c", ENDS_IN_A_BUG, "stumble"]
    ended = subprocess.run(
        command, env=environment, capture_output=True, encoding="utf-8", check=False
    )
    assert ended.returncode == 1
    assert "Traceback" in ended.stderr
    assert "[/x]\\x1b[2J\\x07\\x9b2J\\x0d\\u202ex cannot log in with (redacted)" in ended.stderr
    assert steers(ended.stderr) == set()


def test_an_error_shows_no_value_of_a_secret_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    secret = secrets.token_hex(16)
    monkeypatch.setenv("AZURE_STORAGE_ACCOUNT_KEY", secret)
    assert_harmless(
        stillhouse("store", "ls", f"/nowhere/{secret}"),
        code=2,
        shows="there is no recipe in /nowhere/(redacted);",
    )


def test_the_last_row_of_a_journal_has_no_secret(tiny_world: TinyWorld, tmp_path: Path) -> None:
    plan = tiny_world.plan(tmp_path / "run")
    secret = secrets.token_hex(16)
    know([secret])
    with pytest.raises(StoreError), attempt(plan.request, f"stillhouse run --token {secret[:20]}"):
        raise StoreError(f'401 {{"api_key": "{secret[:20]}"}}, then {secret}')
    start, end = (
        row
        for row in read_journal(tmp_path / "run" / "journal.jsonl")
        if isinstance(row, StartEvent | EndEvent)
    )
    assert isinstance(start, StartEvent)
    assert isinstance(end, EndEvent)
    assert start.command == "stillhouse run --token (redacted)"
    assert end.message == '401 {"api_key": "(redacted)"}, then (redacted)'
