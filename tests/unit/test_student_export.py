"""An exported student is there whole or not at all, and keeps more of the model that it came from
than weights."""

import json
from itertools import count
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

from helpers.checkpoints import commit_weights
from helpers.command import stillhouse
from helpers.damage import small_disk
from helpers.models import CHAT_TEMPLATE, make_model
from helpers.world import TinyWorld
from stillhouse.atomic import SystemFiles
from stillhouse.config import StudentSection
from stillhouse.errors import ConfigError
from stillhouse.models.load import load_model
from stillhouse.models.tokenizers import load_tokenizer
from stillhouse.pipeline.export import export_run, trained_template
from stillhouse.pipeline.run_dir import claim
from stillhouse.student.export import generation_config_of, write_model

TALK = [{"role": "user", "content": "Which tree?"}, {"role": "assistant", "content": "An oak."}]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return make_model(tmp_path / "chat", vocab_size=300, hidden_size=8)


def write(folder: Path, **values: Any) -> StudentSection:
    (folder / "generation_config.json").write_text(json.dumps(values))
    return StudentSection(model=str(folder), dtype="float32")


def test_a_chat_model_keeps_its_end_tokens_and_its_sampling(folder: Path, tmp_path: Path) -> None:
    section = write(folder, eos_token_id=[1, 2], do_sample=True, temperature=0.7)
    found = generation_config_of(section)
    assert found is not None
    model = load_model(section, random_init_seed=0)
    model.generation_config = found
    model.save_pretrained(tmp_path / "out")
    saved = json.loads((tmp_path / "out" / "generation_config.json").read_text())
    assert (saved["eos_token_id"], saved["do_sample"], saved["temperature"]) == ([1, 2], True, 0.7)


def test_settings_that_cannot_be_saved_are_left_behind(folder: Path) -> None:
    assert generation_config_of(write(folder, do_sample=False, temperature=0.7)) is None
    (folder / "generation_config.json").unlink()
    assert generation_config_of(StudentSection(model=str(folder))) is None


class Killed(BaseException):
    """What is thrown in the place of SIGKILL."""


class KilledAt:
    """A file layer whose process is killed at its `number`-th call that changes anything: neither
    that one nor a later one is made."""

    def __init__(self, number: int) -> None:
        self._calls, self._number = count(), number

    def __getattr__(self, name: str) -> Any:
        def call(*arguments: Any) -> Any:
            if next(self._calls) >= self._number:
                raise Killed
            return getattr(SystemFiles(), name)(*arguments)

        return call


def test_an_export_killed_at_any_call_leaves_nothing_or_all_of_it_and_the_next_one_tidies_up(
    folder: Path, tmp_path: Path
) -> None:
    model, tokenizer = (
        load_model(StudentSection(model=str(folder), dtype="float32")),
        load_tokenizer(str(folder)),
    )
    parent = tmp_path / "exports"
    parent.mkdir()
    was_killed, was_there = True, list[bool]()
    whole = dict[str, bytes]()
    while was_killed:
        out, was_killed = parent / str(len(was_there)), False
        try:
            write_model(model, tokenizer, out, card="# A card", files=KilledAt(len(was_there)))
        except Killed:
            was_killed = True
        was_there.append(out.exists())
        if not was_there[-1]:
            write_model(model, tokenizer, out, card="# A card")
        whole = whole or contents(out)
        assert contents(out) == whole
        assert [path.name for path in parent.iterdir()] == [out.name]
        out.rename(tmp_path / f"kept {out.name}")
    assert was_there == sorted(was_there)
    # each file is synced before the directory has its name
    assert was_there.count(False) > len(whole) > 5
    assert {"config.json", "model.safetensors", "tokenizer.json", "README.md"} <= whole.keys()
    AutoModelForCausalLM.from_pretrained(tmp_path / "kept 0")


def contents(out: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in out.iterdir()}


def test_an_export_that_cannot_be_written_says_why_and_leaves_nothing(
    folder: Path, tmp_path: Path
) -> None:
    model, tokenizer = (
        load_model(StudentSection(model=str(folder), dtype="float32")),
        load_tokenizer(str(folder)),
    )

    def refusal(out: Path) -> str:
        with pytest.raises(ConfigError) as caught:
            write_model(model, tokenizer, out, card="")
        return str(caught.value)

    (tmp_path / "file").touch()
    assert (
        f"cannot write the model to {tmp_path}/file/out: Not a directory; name a new directory"
        in refusal(tmp_path / "file" / "out")
    )
    with small_disk(tmp_path / "disk", num_bytes=32 << 10) as disk:
        assert "No space left on device" in refusal(disk / "out")
        assert [*disk.iterdir()] == []
    with small_disk(tmp_path / "mounted", num_bytes=32 << 10) as mounted:
        assert "busy" in refusal(mounted)  # a mount point cannot be renamed over
        assert sorted(path.name for path in tmp_path.iterdir()) == [
            "chat",
            "disk",
            "file",
            "mounted",
        ]


def test_an_adapter_of_a_student_without_adapters_is_refused(
    tiny_world: TinyWorld, tmp_path: Path
) -> None:
    plan = tiny_world.plan(tmp_path / "run")
    plan.run_dir.mkdir()
    claim(plan.run_dir, config=plan.config, recipe=plan.recipe)
    outcome = stillhouse("export", plan.run_dir, tmp_path / "out", "--adapter")
    assert outcome.code == 2
    assert "trained without student.lora, so it has no adapter" in outcome.err
    assert not (tmp_path / "out").exists()


def test_a_student_is_exported_with_the_chat_template_that_it_was_trained_on(
    tiny_world: TinyWorld, tmp_path: Path
) -> None:
    """Of two data sets with conversations, that of the first. The plan's own tokenizer stays as it
    was."""
    template = CHAT_TEMPLATE + "{# of the corpus #}"
    (tmp_path / "own.jinja").write_text(template)
    model = make_model(tmp_path / "chat", vocab_size=300, chat_template=CHAT_TEMPLATE)
    (tmp_path / "talks.jsonl").write_text(
        "".join(json.dumps({"messages": TALK}) + "\n" for _ in range(40))
    )
    (tmp_path / "more.jsonl").symlink_to(tmp_path / "talks.jsonl")
    chat = {"format": "chat", "weight": 1.0}
    given = chat | {
        "dataset": str(tmp_path / "talks.jsonl"),
        "chat_template": str(tmp_path / "own.jinja"),
    }
    own = chat | {"dataset": str(tmp_path / "more.jsonl")}
    plan = tiny_world.plan(
        tmp_path / "run",
        corpus={"sequence_length": 64, "heldout_sequences": 3, "mixed_with": [given, own]},
        teacher={"model": str(model)},
        student={"model": str(model)},
    )
    commit_weights(plan.jobs[0].checkpoints, load_model(plan.config.student), 7)
    assert export_run(plan, tmp_path / "out") == 7
    assert AutoTokenizer.from_pretrained(tmp_path / "out").chat_template == template
    assert plan.tokenizer.chat_template == CHAT_TEMPLATE

    # without a template of the corpus, the tokenizer's own
    plain = tiny_world.plan(
        tmp_path / "run",
        corpus={"sequence_length": 64, "heldout_sequences": 3, "mixed_with": [own]},
        teacher={"model": str(model)},
        student={"model": str(model)},
    )
    assert trained_template(plain.config.corpus) is None
