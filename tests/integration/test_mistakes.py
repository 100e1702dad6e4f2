"""What newcomers get wrong, each with its exit code and the words that matter: what was found, what
was wanted, what to do.

A mistake is one message and exit code 2; what only looks like one is accepted.
"""

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from contextlib import chdir
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from safetensors.torch import load_file, save_file
from transformers import T5Config

from helpers.command import as_toml, stillhouse
from helpers.models import CHAT_TEMPLATE, make_model, make_tokenizer
from helpers.world import TinyWorld
from stillhouse.config import Config
from stillhouse.config.sections import names_by_section
from stillhouse.suggestions import ELSEWHERE

ASK_THE_HUB_TWICE = """
import os, sys
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from threading import Thread

class NoSuchRepository(BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(404)
        self.send_header("X-Error-Code", "RepoNotFound")
        self.end_headers()

server = HTTPServer(("127.0.0.1", 0), NoSuchRepository)
Thread(target=server.serve_forever).start()
os.environ["HF_ENDPOINT"] = f"http://127.0.0.1:{server.server_port}"

from stillhouse.config import ModelSection
from stillhouse.errors import ModelError
from stillhouse.models.identity import model_identity

for _ in range(2):
    try:
        model_identity(ModelSection(model="owner/model"), cache_dir=Path(sys.argv[1]))
    except ModelError as error:
        print(str(error).replace("\\n", " "))
    server.shutdown()
    server.server_close()
"""


class Mistake(NamedTuple):
    """What is typed after `stillhouse`, below the folder of `scene`, and words of the answer."""

    typed: tuple[str, ...]
    words: tuple[str, ...]


def setting(override: str, *words: str) -> Mistake:
    return Mistake(("check", "tiny.toml", "--set", override), words)


def config(name: str, *words: str) -> Mistake:
    return Mistake(("check", name), words)


def chat(rows: str, *words: str) -> Mistake:
    overrides = (
        f"corpus.dataset = '{rows}'",
        "corpus.format = 'chat'",
        "teacher.model = 'chatty'",
        "student.model = 'chatty'",
    )
    return Mistake(
        ("check", "tiny.toml", *(word for override in overrides for word in ("--set", override))),
        words,
    )


MISTAKES = {
    # names
    "a misspelt setting": setting(
        "student.learning_rat = 1",
        "student.learning_rat: no such setting",
        "did you mean 'learning_rate'?",
    ),
    "a misspelt section": setting(
        "studnet.seed = 1", "studnet: no such setting", "did you mean 'student'?"
    ),
    "a batch size of the Trainer's": setting(
        "student.per_device_train_batch_size = 4", "here it is student.micro_batch_sequences"
    ),
    "accumulation of the Trainer's": setting(
        "student.gradient_accumulation_steps = 4",
        "student.global_batch_sequences, the sequences in",
    ),
    "epochs of the Trainer's": setting("student.num_train_epochs = 1", "here it is student.epochs"),
    "warm-up as a share": setting(
        "student.warmup_ratio = 0.1", "student.warmup_steps, a number of steps"
    ),
    "a directory of the Trainer's": setting(
        "student.output_dir = 'out'", "here it is the option --run-dir"
    ),
    "half precision of the Trainer's": setting(
        "student.bf16 = true", "teacher.dtype and student.dtype"
    ),
    "lr": setting(
        "student.lr = 1e-4", "student.lr: no such setting; here it is student.learning_rate"
    ),
    "lr without a section": setting(
        "lr = 1e-4", "lr: no such setting; here it is student.learning_rate"
    ),
    "a setting without its section": setting(
        "learning_rate = 1e-4", "did you mean 'student.learning_rate'?"
    ),
    "a setting in another section": setting(
        "student.sequence_length = 64", "did you mean 'corpus.sequence_length'?"
    ),
    "a name that is like no other": setting(
        "student.xyzzy = 1", "the nearest of 54 that are known here: "
    ),
    # values
    "text for a number": setting(
        "student.learning_rate = 'fast'", "student.learning_rate", "valid number", "found 'fast'"
    ),
    "a fraction of an epoch": setting(
        "student.epochs = 1.5", "student.epochs", "valid integer", "found 1.5"
    ),
    "bf16": setting(
        "student.dtype = 'bf16'", "'float32' or 'bfloat16'; found 'bf16'; did you mean 'bfloat16'?"
    ),
    "an interpreter that is not there": setting(
        "teacher.python = '/nowhere/bin/python'",
        "teacher.python is /nowhere/bin/python, which cannot run teachers",
        "this machine: it cannot be started (No such file or directory)",
        "leave teacher.python out",
    ),
    "an interpreter by a relative path": setting(
        "teacher.python = 'bin/python'", "'bin/python' is no absolute path; give one"
    ),
    "kl": setting("student.divergence = 'kl'", "found 'kl'; did you mean 'forward_kl'?"),
    "a list of data sets": setting(
        "corpus.dataset = ['a', 'b']", "corpus.dataset", "valid string", "found ['a', 'b']"
    ),
    "a negative count": setting(
        "target.k = -1", "target.k", "greater than or equal to 0; found -1"
    ),
    "no name": setting("teacher.model = ''", "teacher.model", "at least 1 character; found ''"),
    "a sequence beyond int32": setting(
        "corpus.sequence_length = 9007199254740992",
        "corpus.sequence_length",
        "less than or equal to 16777216",
    ),
    "a beta of one": setting("student.betas = [0.9, 1]", "student.betas.1", "less than 1; found 1"),
    "a share above one": setting(
        "student.mix = 1.5", "student.mix", "less than or equal to 1; found 1.5"
    ),
    "a learning rate of ten billion": setting(
        "student.learning_rate = 1e10", "student.learning_rate", "less than or equal to 1"
    ),
    "an integer of 4,000 digits": setting(
        f"student.epochs = {'9' * 4000}", "student.epochs", "a number of 13288 bits"
    ),
    "a hexadecimal integer without end": setting(
        f"student.epochs = 0x{'f' * 5000}", "student.epochs", "a number of 20000 bits"
    ),
    "more teachers than any cluster holds": setting(
        "teacher.max_replicas = 9007199254740992", "teacher.max_replicas", "65536"
    ),
    "settings that exclude each other": setting(
        "student.min_workers = 2", "min_workers is 2, above num_workers, which is 1"
    ),
    "nothing to keep": setting(
        "target = {k = 0, tail_draws = 0}", "k and tail_draws are both 0", "set one of them above 0"
    ),
    "sections that exclude each other": Mistake(
        ("check", "tiny.toml", "--set", "target.k = 0", "--set", "student.divergence = 'jsd'"),
        ("  - target.k is 0, and student.divergence is", 'set student.divergence = "forward_kl"'),
    ),
    # files, and the command line
    "no such config": config(
        "absent.toml", "absent.toml: No such file or directory", "give the path of a TOML file"
    ),
    "a directory for a config": config(
        "folder", "folder: Is a directory", "give the path of a TOML file"
    ),
    "a YAML file": config("axolotl.yaml", "this is YAML", "[student]"),
    "a JSON file": config("trainer.json", "this is JSON", "[student]"),
    "text without quotes": config(
        "unquoted.toml",
        "unquoted.toml is not TOML",
        "line 2",
        "quote text, as in 'dtype = \"bfloat16\"'",
    ),
    "True": config("python.toml", "python.toml is not TOML", "write true in small letters"),
    "brackets 5,000 deep": config("deep.toml", "deep.toml is nested too deeply"),
    "an integer of 5,000 digits": config(
        "digits.toml", "digits.toml has a number that cannot be read", "4300 digits"
    ),
    "a file that is not text": config("binary.toml", "binary.toml is not TOML", "not UTF-8"),
    "no teacher": config("half.toml", "teacher: missing", "student: missing"),
    "--set without quotes": setting(
        "student.dtype = float32", "is not TOML", "quote text, as in 'student.dtype = \"float32\"'"
    ),
    "a setting as an option": Mistake(
        ("run", "tiny.toml", "--student.learning_rate", "1e-4"),
        ("Settings are given with --set", "'student.learning_rate = ...'"),
    ),
    "a setting as an argument": config(
        "student.learning_rate=1e-4", "--set 'student.learning_rate=1e-4'"
    ),
    "a verb of another trainer's": Mistake(
        ("distill", "tiny.toml"), ("No such command 'distill'. Did you mean 'run'?",)
    ),
    "a misspelt verb": Mistake(("chekc", "tiny.toml"), ("Did you mean 'check'?",)),
    "a verb that is like no other": Mistake(
        ("zzz",), ("Known are init, demo, check, run, generate, grade",)
    ),
    # models
    "no such directory": setting(
        "teacher.model = '/nowhere/teacher'",
        "no directory /nowhere/teacher",
        "a hub name such as 'owner/name'",
    ),
    "a relative path from another directory": setting(
        "teacher.model = './gone'", "no directory ./gone in ", "not to the config file"
    ),
    "a relative path that looks like a hub name": setting(
        "teacher.model = 'models/gone'", "there is no models/gone in "
    ),
    "a hub name without a network": setting(
        "teacher.model = 'owner/model'", "owner/model", "the hub was not reached", "the network"
    ),
    "a tokenizer that is not there": setting(
        "student.tokenizer = './gone'", "no directory ./gone in "
    ),
    "a LoRA adapter": setting(
        "student.model = 'adapter'", "no config.json", "an adapter has to be merged first"
    ),
    "a T5 teacher": setting(
        "teacher.model = 't5'", "t5 is a t5 model, not a causal language model"
    ),
    "a teacher cut short": setting(
        "teacher.model = 'cut'", "cut/model.safetensors is cut short or damaged", "fetch it again"
    ),
    "a student cut short": setting(
        "student.model = 'cut'", "cut/model.safetensors is cut short or damaged", "fetch it again"
    ),
    "a teacher cut short, for run": Mistake(
        ("run", "tiny.toml", "--set", "teacher.model = 'cut'"),
        ("cut/model.safetensors is cut short",),
    ),
    "a part of the weights": setting(
        "teacher.model = 'parts'", "parts/model-2.safetensors is absent", "fetch the whole model"
    ),
    "a pointer in place of weights": setting(
        "teacher.model = 'pointer'", "pointer/model.safetensors is a pointer", "git lfs pull"
    ),
    "no weights": setting(
        "student.model = 'hollow'",
        "hollow has a config.json and no weights",
        'student.init = "config"',
    ),
    "tokenizers of other ids": setting(
        "student.model = 'other'", "the teacher's tokenizer ends at id 299, the student's at 309"
    ),
    "more entries than the vocabulary": setting(
        "target.k = 301", "[target] k is 301", "set k between 0 and 300"
    ),
    "draws from no tail": setting(
        "target = {k = 300, tail_draws = 2}", "[target] 2 draws", "no tail to draw from; draw none"
    ),
    "entries beyond all vocabularies": setting(
        "target.k = 100000", "target.k", "less than or equal to 4096"
    ),
    # documents
    "no such data": setting(
        "corpus.dataset = '/nowhere/*.txt'",
        "/nowhere/*.txt does not exist",
        "a hub name such as 'owner/name'",
    ),
    "a wrong column": setting(
        "corpus.column = 'body'", "no column 'body'; it has text", "set corpus.column"
    ),
    "text for chat": setting(
        "corpus.format = 'chat'", "no column 'messages'; it has text", "set corpus.column"
    ),
    "a sequence longer than the corpus": setting(
        "corpus.sequence_length = 10000000", "is too small", "lower corpus.sequence_length"
    ),
    "a batch larger than the corpus": setting(
        "student.global_batch_sequences = 10000000", "10,000,000", "or less"
    ),
    "a batch larger than the corpus, for run": Mistake(
        ("run", "tiny.toml", "--set", "student.global_batch_sequences = 1000000"),
        ("1,000,000", "or less"),
    ),
    "a table of commas": setting("corpus.dataset = 'rows.csv'", "rows.csv"),
    "a compressed file": setting("corpus.dataset = 'rows.jsonl.gz'", "rows.jsonl.gz"),
    "a broken line": setting("corpus.dataset = 'broken.jsonl'", "broken.jsonl"),
    "a row without text": setting(
        "corpus.dataset = 'null.jsonl'", "row 1 of", "null.jsonl", "or raise it to skip them"
    ),
    "no row": setting("corpus.dataset = 'empty.jsonl'", "empty.jsonl"),
    "chat of a model without a template": Mistake(
        (
            "check",
            "tiny.toml",
            "--set",
            "corpus.format = 'chat'",
            "--set",
            "corpus.column = 'text'",
        ),
        ("no chat template",),
    ),
    "an unknown role": chat("sharegpt.jsonl", "row 0 of", "sharegpt.jsonl", "'from' is none of"),
    "an image": chat("content_parts.jsonl", "row 0 of", "content_parts.jsonl", "only text is read"),
    "a call of a tool": chat("tool_call.jsonl", "row 0 of", "tool_call.jsonl", "drops calls of"),
    "no assistant": chat("no_assistant.jsonl", "no_assistant.jsonl", "no assistant's turn"),
    # places and machines
    "a scheme that is not read": setting(
        "store.url = 'ftp://host/chunks'", "ftp://host/chunks", "s3://"
    ),
    "a store in memory": setting(
        "store.url = 'memory://chunks'", "memory://chunks", "a directory or a bucket"
    ),
    "a file for a store": setting("store.url = 'a_file'", "a_file is a file; name another place"),
    "a store below a file": setting(
        "store.url = 'a_file/store'", "a_file is a file, so ", "a_file/store cannot be a directory"
    ),
    "a run directory below a file": Mistake(
        ("check", "tiny.toml", "--run-dir", "a_file/run"), ("a_file is a file, so ", "--run-dir")
    ),
    "a run directory below a file, for run": Mistake(
        ("run", "tiny.toml", "--run-dir", "a_file/run"), ("a_file/run/lock", "--run-dir")
    ),
    "checkpoints below a file": setting(
        "student.checkpoint_url = 'a_file/x'", "student.checkpoint_url: ", "a_file is a file, so "
    ),
    "CPUs that are not there": setting(
        "student.num_cpus = 1000", "CPU: 1000.25 needed", "num_cpus"
    ),
    "GPUs that are not there": Mistake(
        (
            "check",
            "tiny.toml",
            "--set",
            "teacher.num_gpus = 64",
            "--set",
            "teacher.pipeline = true",
        ),
        ("GPU: 64 needed", "num_gpus"),
    ),
    "GPUs that the engine leaves idle": setting(
        "teacher.num_gpus = 64", "teacher.num_gpus is 64", 'engine = "vllm" and num_gpus = 64'
    ),
    "a resource that no machine has": setting(
        "teacher.resources = {still = 1}", "still: 1 needed", "0 in the cluster"
    ),
    "eval of no run": Mistake(("eval", "absent"), ("absent",)),
    "report of no run": Mistake(("report", "absent"), ("absent",)),
    "export of no run": Mistake(("export", "absent", "out"), ("absent",)),
    "export to where something is": Mistake(
        ("export", "absent", "folder"), ("folder exists already and is not empty",)
    ),
}

ACCEPTED = {
    "a byte order mark": config("marked.toml", "Nothing stands in the way"),
    "letters of all kinds in a path": Mistake(
        ("check", "größe и данные.toml", "--run-dir", "läufe/один"), ("Nothing stands in the way",)
    ),
    "sequences longer than the model was made for": setting(
        "corpus.sequence_length = 513", "note: corpus.sequence_length is 513"
    ),
    "a student that starts without weights": Mistake(
        (
            "check",
            "tiny.toml",
            "--set",
            "student.model = 'hollow'",
            "--set",
            "student.init = 'config'",
        ),
        ("Nothing stands in the way",),
    ),
}


@pytest.fixture(scope="module")
def scene(tiny_world: TinyWorld, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder with everything that can be got wrong; the working directory of the tests here."""
    folder = tmp_path_factory.mktemp("scene")
    _write_configs(folder, as_toml(tiny_world.values))
    _make_models(folder)
    _write_rows(folder)
    (folder / "folder").mkdir()
    (folder / "folder" / "something").touch()
    (folder / "a_file").touch()
    with chdir(folder):
        yield folder


def _write_configs(folder: Path, tiny: str) -> None:
    texts = {
        "tiny.toml": tiny,
        "größe и данные.toml": tiny,
        "marked.toml": "\ufeff" + tiny,
        "axolotl.yaml": "# a student\nbase_model: owner/model\nlearning_rate: 1e-4\n",
        "trainer.json": '{"student": {"learning_rate": 1e-4}}\n',
        "unquoted.toml": "[student]\ndtype = bfloat16\n",
        "python.toml": "[corpus]\npacking = True\n",
        "deep.toml": f"corpus = {'[' * 5000}{']' * 5000}\n",
        "digits.toml": f"student.epochs = {'9' * 5000}\n",
        "half.toml": "[corpus]\ndataset = 'stdlib'\n",
    }
    for name, text in texts.items():
        (folder / name).write_text(text, encoding="utf-8")
    (folder / "binary.toml").write_bytes(b"\xff\xfe\x00\x01")


def _make_models(folder: Path) -> None:
    make_model(folder / "chatty", vocab_size=300, chat_template=CHAT_TEMPLATE)
    make_model(folder / "other", vocab_size=310)
    for name in ("cut", "parts", "pointer", "hollow"):
        make_model(folder / name, vocab_size=300)
    (folder / "hollow" / "model.safetensors").unlink()
    (folder / "pointer" / "model.safetensors").write_text(
        "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n"
    )
    whole = (folder / "cut" / "model.safetensors").read_bytes()
    (folder / "cut" / "model.safetensors").write_bytes(whole[:-1])

    weights = load_file(folder / "parts" / "model.safetensors")
    (folder / "parts" / "model.safetensors").unlink()
    save_file(weights, folder / "parts" / "model-1.safetensors")
    index = {
        "weight_map": {
            **dict.fromkeys(weights, "model-1.safetensors"),
            "lm_head.weight": "model-2.safetensors",
        }
    }
    (folder / "parts" / "model.safetensors.index.json").write_text(json.dumps(index))

    make_tokenizer(folder / "t5", vocab_size=300)
    T5Config(vocab_size=300, d_model=8, num_layers=1).save_pretrained(folder / "t5")
    (folder / "t5" / "model.safetensors").write_bytes(whole)
    make_tokenizer(folder / "adapter", vocab_size=300)
    (folder / "adapter" / "adapter_config.json").write_text("{}")


def _write_rows(folder: Path) -> None:
    question = {"role": "user", "content": "Why?"}
    rows: dict[str, list[Any]] = {
        "null.jsonl": [{"text": "one"}, {"text": None}],
        "empty.jsonl": [],
        "sharegpt.jsonl": [
            {"messages": [{"from": "human", "value": "Why?"}, {"from": "me", "value": "Why not?"}]}
        ],
        "content_parts.jsonl": [
            {
                "messages": [
                    question,
                    {"role": "assistant", "content": [{"type": "image", "url": "file"}]},
                ]
            },
        ],
        "tool_call.jsonl": [
            {
                "messages": [
                    question,
                    {"role": "assistant", "content": None, "tool_calls": [{"name": "look"}]},
                ]
            }
        ],
        "no_assistant.jsonl": [{"messages": [question]}],
    }
    for name, values in rows.items():
        (folder / name).write_text("".join(json.dumps(value) + "\n" for value in values))
    (folder / "rows.csv").write_text("text\none\n")
    (folder / "rows.jsonl.gz").write_bytes(b"\x1f\x8b\x08\x00")
    (folder / "broken.jsonl").write_text('{"text": "one"}\n{"text": "two\n')


@pytest.mark.parametrize("mistake", MISTAKES.values(), ids=MISTAKES.keys())
def test_a_mistake_ends_with_2_and_one_message_that_says_what_to_do(
    mistake: Mistake, scene: Path
) -> None:
    outcome = stillhouse(*mistake.typed, cache=scene / "cache")
    assert outcome.code == 2, outcome
    assert len(re.findall(r"^error: |^╭─ Error", outcome.err, re.MULTILINE)) == 1, outcome.err
    assert "Traceback" not in outcome.err
    assert len(outcome.err.split()) < 150  # not a screen of a library's
    for word in mistake.words:
        assert word in outcome.err
    assert not any((scene / place).exists() for place in ("runs", "out"))


@pytest.mark.parametrize("typed", ACCEPTED.values(), ids=ACCEPTED.keys())
def test_what_only_looks_like_a_mistake_is_accepted(typed: Mistake, scene: Path) -> None:
    outcome = stillhouse(*typed.typed, cache=scene / "cache")
    assert outcome.code == 0, outcome
    for word in typed.words:
        assert word in outcome.out


def test_a_wrong_name_and_a_hub_that_does_not_answer_are_told_apart(tmp_path: Path) -> None:
    environment = {
        name: text
        for name, text in os.environ.items()
        if name != "HF_HUB_OFFLINE" and not name.lower().endswith("_proxy")
    }
    answer = subprocess.run(
        [sys.executable, "-c", ASK_THE_HUB_TWICE, tmp_path],
        env=environment | {"HF_HOME": str(tmp_path / "hub")},
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    wrong_name, unreached = answer.stdout.splitlines()
    assert "check the name and the revision" in wrong_name
    assert "hf auth login" in wrong_name
    assert "the hub was not reached" not in wrong_name
    assert "the hub was not reached" in unreached
    assert "check the name" not in unreached


def test_what_takes_the_place_of_another_trainers_setting_exists() -> None:
    sections: dict[str, Any] = {
        name: field.annotation for name, field in Config.model_fields.items()
    }
    for name, words in ELSEWHERE.items():
        for word in words.replace(",", " ").split():
            section, _, key = word.partition(".")
            key, _, inner = key.partition(".")  # of a table, such as student.lora
            if section in sections and key:
                assert key in sections[section].model_fields, name
            if inner:
                assert inner in names_by_section()[f"{section}.{key}"], name
