"""The command: it answers at once, a mistake is one message and exit code 2, a bug keeps its
traceback."""

import json
import logging
import os
import re
import resource
import subprocess
import sys
from pathlib import Path

import pytest
import typer

from helpers.command import Outcome, as_toml, stillhouse
from helpers.models import CHAT_TEMPLATE, make_model
from helpers.world import TinyWorld
from stillhouse.cli.main import Verbs
from stillhouse.config import load_config
from stillhouse.config.settings import config_schema
from stillhouse.errors import ConfigError, TeacherError

COMMAND = Path(sys.executable).parent / "stillhouse"

ASK_EVERY_VERB = """
import sys
import stillhouse
from stillhouse.cli.main import app

for verb in ("", "init", "demo", "check", "run", "produce", "train", "eval", "report", "export",
             "settings", "schema", "store", "store ls", "store stat", "store diff",
             "store verify", "store sweep",
             "bench", "bench pipeline", "bench loss", "bench head"):
    try:
        app([*verb.split(), "--help"])
    except SystemExit as end:
        assert end.code == 0, verb
heavy = {"torch", "ray", "deepspeed", "transformers", "datasets", "wandb", "matplotlib", "obstore",
         "numpy"} & set(sys.modules)
sys.exit(f"loaded: {heavy}" if heavy else 0)
"""


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def config(tiny_world: TinyWorld, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("config") / "tiny.toml"
    path.write_text(as_toml(tiny_world.values))
    return path


@pytest.fixture
def in_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "here"
    folder.mkdir()
    monkeypatch.chdir(folder)
    return folder


def assert_mistake(outcome: Outcome, *words: str) -> None:
    assert outcome.code == 2, outcome
    assert outcome.err.count("error: ") == 1
    assert "Traceback" not in outcome.err
    for word in words:
        assert word in outcome.err


def test_help_for_every_verb_loads_nothing_heavy() -> None:
    answer = subprocess.run(
        [sys.executable, "-c", ASK_EVERY_VERB], capture_output=True, text=True, check=False
    )
    assert answer.returncode == 0, answer.stderr


def test_help_takes_less_than_a_second() -> None:
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    answer = subprocess.run([COMMAND, "--help"], capture_output=True, text=True, check=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 1.0
    for verb in (
        "init",
        "demo",
        "check",
        "run",
        "produce",
        "train",
        "eval",
        "report",
        "export",
        "settings",
        "schema",
        "store",
        "bench",
    ):
        assert f" {verb} " in answer.stdout


def test_the_version_is_shown() -> None:
    assert stillhouse("--version").out.startswith("stillhouse 0.")


def test_the_package_run_as_a_module_is_the_command() -> None:
    answer = subprocess.run(
        [sys.executable, "-m", "stillhouse", "--version"],
        capture_output=True,
        text=True,
        check=True,
    )
    assert answer.stdout == stillhouse("--version").out


def test_a_shell_completes_verbs_and_options() -> None:
    def completed(words: str) -> list[str]:
        asked = {
            "_STILLHOUSE_COMPLETE": "complete_bash",
            "COMP_WORDS": f"stillhouse {words}",
            "COMP_CWORD": str(len(words.split())),
        }
        answer = subprocess.run(
            [COMMAND], env=os.environ | asked, capture_output=True, text=True, check=True
        )
        return answer.stdout.split()

    assert completed("s") == ["settings", "schema", "store"]
    assert completed("store v") == ["verify"]
    assert "--run-dir" in completed("run --r")


def test_the_level_of_logs_is_an_option_or_a_variable_and_the_option_wins(
    monkeypatch: pytest.MonkeyPatch, in_empty_folder: Path
) -> None:
    logger = logging.getLogger("stillhouse")
    before, found = logger.level, list[int]()
    monkeypatch.setenv("STILLHOUSE_LOG", "error")
    try:
        for number, option in enumerate(((), ("--log-level", "debug"))):
            assert (
                stillhouse(
                    *option,
                    "init",
                    "teacher",
                    "student",
                    "stdlib",
                    "--out",
                    in_empty_folder / f"{number}.toml",
                ).code
                == 0
            )
            found.append(logger.level)
        assert found == [logging.ERROR, logging.DEBUG]
        assert stillhouse("--log-level", "loud", "init", "teacher", "student", "stdlib").code == 2
    finally:
        logger.setLevel(before)


@pytest.mark.parametrize(
    "arguments",
    [
        ("brew",),
        ("check",),
        ("check", "--quickly"),
        ("store", "verify"),
        ("init", "a", "b"),
        ("bench", "tub"),
    ],
)
def test_wrong_usage_ends_with_2_and_points_to_the_help(arguments: tuple[str, ...]) -> None:
    outcome = stillhouse(*arguments)
    assert outcome.code == 2
    assert "--help' for help" in outcome.err


@pytest.mark.parametrize(
    ("raised", "code", "message"),
    [
        (ConfigError("set k to 8"), 2, "error: set k to 8"),
        (TeacherError("chunk 3 failed"), 1, "error: chunk 3 failed"),
        (KeyboardInterrupt(), 130, "interrupted; the same command goes on from here"),
    ],
)
def test_what_a_verb_raises_becomes_one_line_and_an_exit_code(
    raised: BaseException, code: int, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as end:
        app_that_raises(raised)([])
    assert end.value.code == code
    assert capsys.readouterr().err == message + "\n"


def test_a_bug_keeps_its_traceback() -> None:
    with pytest.raises(ZeroDivisionError):
        app_that_raises(ZeroDivisionError("a bug"))([])


def app_that_raises(error: BaseException) -> typer.Typer:
    app = typer.Typer(cls=Verbs, pretty_exceptions_enable=False)

    @app.callback(invoke_without_command=True)
    def fail() -> None:
        raise error

    return app


@pytest.mark.usefixtures("in_empty_folder")
def test_init_writes_a_config_that_loads_and_never_overwrites_one() -> None:
    first = stillhouse("init", "owner/teacher", "owner/student", "stdlib")
    assert first.code == 0
    written = Path("distil.toml").read_text()
    assert written in first.out
    assert load_config(["distil.toml"]).teacher.model == "owner/teacher"
    directive = re.match(r"#:schema (\./\S+)\n", written)
    assert directive is not None
    assert json.loads(Path(directive[1]).read_text()) == config_schema()
    assert (
        "`stillhouse check 'my run.toml'`, then `stillhouse run 'my run.toml'`"
        in stillhouse("init", "a", "b", "c", "--out", "my run.toml").out
    )
    assert_mistake(stillhouse("init", "a", "b", "c"), "distil.toml exists already", "--out")
    assert Path("distil.toml").read_text() == written
    assert stillhouse("init", "a", "b", "c", "--out", "other.toml").code == 0
    assert_mistake(
        stillhouse("init", "a", "b", "c", "--out", "absent/other.toml"),
        "cannot write absent/other.toml",
    )


@pytest.mark.usefixtures("in_empty_folder")
def test_a_config_that_cannot_be_read_is_refused_before_anything_is_loaded() -> None:
    Path("wrong.toml").write_text("[student\n")
    assert_mistake(stillhouse("run", "absent.toml"), "absent.toml", "give the path of a TOML file")
    assert_mistake(stillhouse("run", "wrong.toml"), "wrong.toml is not TOML")


@pytest.mark.usefixtures("in_empty_folder")
def test_documents_that_cannot_teach_are_refused(config: Path, cache: Path, tmp_path: Path) -> None:
    empty, one_word = tmp_path / "empty.jsonl", tmp_path / "one_word.jsonl"
    empty.write_text("")
    one_word.write_text('{"text": "peat"}\n')
    for dataset, word in ((empty, "empty.jsonl"), (one_word, "sequence")):
        assert_mistake(
            stillhouse("check", config, "--set", f"corpus.dataset = '{dataset}'", cache=cache), word
        )


@pytest.mark.usefixtures("in_empty_folder")
def test_a_conversation_without_an_assistant_is_refused_by_its_row(
    config: Path, cache: Path, tmp_path: Path
) -> None:
    make_model(tmp_path / "chatty", vocab_size=300, chat_template=CHAT_TEMPLATE)
    rows = [
        [{"role": "user", "content": "Why?"}, {"role": "assistant", "content": "Why not?"}],
        [{"role": "user", "content": "Well?"}],
    ]
    chat = tmp_path / "chat.jsonl"
    chat.write_text("".join(json.dumps({"messages": messages}) + "\n" for messages in rows))
    models = [f"{role}.model = '{tmp_path / 'chatty'}'" for role in ("teacher", "student")]
    settings = [f"corpus.dataset = '{chat}'", "corpus.format = 'chat'", *models]
    overrides = [word for setting in settings for word in ("--set", setting)]
    assert_mistake(
        stillhouse("check", config, *overrides, cache=cache), "row 1 of", "no assistant's turn"
    )


def test_a_store_or_run_directory_below_a_file_is_refused_by_every_verb(
    config: Path, cache: Path, in_empty_folder: Path
) -> None:
    Path("file").write_text("")
    for verb in ("check", "run", "produce", "train"):
        store = stillhouse(
            verb, config, "--set", "store.url = 'file/store'", "--run-dir", "run", cache=cache
        )
        assert_mistake(store, str(in_empty_folder / "file"))
    for verb in ("check", "run"):
        assert_mistake(
            stillhouse(verb, config, "--run-dir", "file/run", cache=cache),
            str(in_empty_folder / "file"),
            "--run-dir",
        )


@pytest.mark.usefixtures("in_empty_folder")
def test_verbs_of_a_run_refuse_what_is_none() -> None:
    for verb in (("eval", "absent"), ("report", "absent"), ("export", "absent", "out")):
        assert_mistake(stillhouse(*verb), "absent")


def test_the_environment_is_left_alone_by_help() -> None:
    before = dict(os.environ)
    stillhouse("--help")
    assert dict(os.environ) == before
