"""A model reaches the hub whole, or the reason is told; a card's licence is read where there is
one."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from helpers.hub import Hub
from stillhouse.models.hub import licence_of

PUSHES = """
import json, os, sys
from pathlib import Path
from stillhouse.errors import ModelError
from stillhouse.models.hub import upload

answers = []
for name, token in json.loads(sys.argv[2]):
    os.environ["HF_TOKEN"] = token
    try:
        answers.append(upload(Path(sys.argv[1]), name, private=True, message="after 6 steps"))
    except ModelError as error:
        answers.append(f"refused: {error}")
print(json.dumps(answers))
"""


def pushed(folder: Path, hub: Hub, *pushes: tuple[str, str]) -> list[str]:
    """The answers to pushes of (name, token), from one process of their own: the library reads its
    settings when it is imported."""
    environment = os.environ | {
        "HF_ENDPOINT": hub.endpoint,
        "HF_HUB_OFFLINE": "0",
        "HF_HOME": str(folder.parent / "hf"),
    }
    command = [sys.executable, "-c", PUSHES, str(folder), json.dumps(pushes)]
    done = subprocess.run(
        command, env=environment, capture_output=True, text=True, timeout=120, check=True
    )
    answers: list[str] = json.loads(done.stdout)
    return answers


@pytest.fixture
def model(tmp_path: Path) -> Path:
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    (folder / "model.safetensors").write_bytes(b"\0" * 64)
    return folder


def test_a_directory_becomes_a_repository_with_the_same_files_or_the_reason_is_told(
    model: Path,
) -> None:
    with Hub(token="a-token").running() as hub:
        nobody, stranger, wrong, done = pushed(
            model,
            hub,
            ("acme/student", ""),
            ("acme/student", "another"),
            ("a/b/c", "a-token"),
            ("acme/student", "a-token"),
        )
    # refused, with what to do
    assert nobody.startswith("refused: acme/student cannot be pushed without a token; run `hf auth")
    assert "401" in stranger
    assert "that the token may write there" in stranger
    assert wrong.startswith("refused: a/b/c cannot be pushed")

    # pushed
    assert done == f"{hub.endpoint}/acme/student"
    assert hub.private == {"acme/student"}
    assert hub.messages == ["after 6 steps"]
    files = {file.name: file.read_bytes() for file in model.iterdir()}
    assert hub.repositories == {"acme/student": files}


@pytest.mark.parametrize(
    ("card", "licence"),
    [
        ("---\nlicense: apache-2.0\n---\n# A model\n", "apache-2.0"),
        ("---\ntags: [a]\n---\n", None),
        ("---\nlicense: [unclosed\n---\n", None),
        (None, None),
    ],
)
def test_the_licence_is_that_of_the_models_own_card(
    model: Path, card: str | None, licence: str | None
) -> None:
    if card is not None:
        (model / "README.md").write_text(card)
    assert licence_of(str(model)) == licence
