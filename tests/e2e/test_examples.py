"""The notebook goes from text to an exported student, and what it leaves can be scored and read
again with the public names."""

import json
import runpy
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoModelForCausalLM

import stillhouse
from stillhouse.errors import ConfigError

pytestmark = pytest.mark.usefixtures("ray_cluster")

EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.fixture(scope="module")
def notebook(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What the names of the notebook stand for after its last cell; its folder is `work`."""
    cells = json.loads((EXAMPLES / "quickstart.ipynb").read_text(encoding="utf-8"))["cells"]
    names: dict[str, Any] = {}
    folder = tmp_path_factory.mktemp("notebook")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setenv("XDG_CACHE_HOME", str(folder / "cache"))
        for cell in cells:
            if cell["cell_type"] == "code":
                exec("".join(cell["source"]), names)
        names["work"] = names["work"].absolute()
    return names


def test_the_notebook_goes_from_text_to_an_exported_student(notebook: dict[str, Any]) -> None:
    scores, work = notebook["scores"], notebook["work"]
    assert scores.keys() == {"teacher", "student"}
    assert scores["student"].kl > 0.0
    assert notebook["steps"] == notebook["plan"].total_steps == 30
    assert AutoModelForCausalLM.from_pretrained(work / "exported").num_parameters() > 0
    assert "distilled from teacher" in (work / "exported" / "README.md").read_text()


def test_the_notebook_is_kept_without_outputs() -> None:
    cells = json.loads((EXAMPLES / "quickstart.ipynb").read_text(encoding="utf-8"))["cells"]
    code = [cell for cell in cells if cell["cell_type"] == "code"]
    assert len(code) > 5
    assert all(cell["outputs"] == [] and cell["execution_count"] is None for cell in code)


def test_a_run_is_scored_again_to_the_same_figures(notebook: dict[str, Any]) -> None:
    assert stillhouse.evaluate(notebook["plan"]) == notebook["scores"]


def test_an_export_overwrites_nothing(notebook: dict[str, Any]) -> None:
    work = notebook["work"]
    with pytest.raises(ConfigError, match="is not empty; name a new directory"):
        stillhouse.export(work / "run", work / "exported")


def test_the_reader_of_a_store_prints_what_is_in_it(
    notebook: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    plan, work = notebook["plan"], notebook["work"]
    runpy.run_path(str(EXAMPLES / "read_a_store.py"))["main"](str(work / "store"))
    out = capsys.readouterr().out
    assert f"recipe {plan.recipe.fingerprint[:16]}: {len(plan.chunks)} chunks of " in out
    assert "targets of 8 entries" in out
    assert out.count("  after token ") == 3
