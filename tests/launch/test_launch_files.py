"""Every file under launch/ and docker/ is one that its reader understands, and no misspelt field in it goes unnoticed."""

import re
from pathlib import Path

import pytest
import yaml

from helpers.launchfiles import ROOT, Validator, compose, dockerfile, keys_of, kubernetes, misspelt, ray_up, sbatch, skypilot

YAML: dict[str, Validator] = {
    "launch/k8s/raycluster.yaml": kubernetes,
    "launch/k8s/rayjob.yaml": kubernetes,
    "launch/k8s/storage.yaml": kubernetes,
    "launch/ray/aws.yaml": ray_up,
    "launch/ray/gcp.yaml": ray_up,
    "docker/compose.yaml": compose,
}
SKY = "launch/sky/run.yaml"
TEXT: dict[str, Validator] = {"docker/cpu.Dockerfile": dockerfile, "docker/gpu.Dockerfile": dockerfile, "launch/slurm/run.sbatch": sbatch}
FREE = {  # mappings whose keys are the writer's own
    *("labels", "annotations", "rayStartParams", "nodeSelector", "requests", "limits", "available_node_types", "environment", "volumes"),
    *("services", "networks", "file_mounts", "resources"),
}


def test_no_file_is_left_out() -> None:
    written = {path for folder in ("launch", "docker") for path in (ROOT / folder).rglob("*") if path.is_file()}
    known = {ROOT / name for name in (*YAML, *TEXT, SKY)}
    assert {path for path in written - known if path.suffix not in (".md", ".lock", ".in")} == set()


@pytest.mark.parametrize("name", [*YAML, *TEXT])
def test_its_reader_understands_it(name: str) -> None:
    assert (YAML | TEXT)[name]((ROOT / name).read_text()) == []


def documents_of(name: str) -> list[object]:
    return list(yaml.safe_load_all((ROOT / name).read_text()))


@pytest.mark.parametrize("name", YAML)
def test_each_misspelt_field_is_refused(name: str) -> None:
    documents = documents_of(name)
    accepted = []
    for index, document in enumerate(documents):
        for path in keys_of(document):
            if len(path) > 1 and path[-2] in FREE:
                continue
            if str(path[0]).startswith("x-"):  # an extension: it is seen where it is merged into a service
                continue
            changed = [*documents]
            changed[index] = misspelt(document, path)
            if not YAML[name](yaml.safe_dump_all(changed)):
                accepted.append(path)
    assert accepted == []


WORDS = {
    "docker/cpu.Dockerfile": r"^([A-Z]+)\b",
    "docker/gpu.Dockerfile": r"^([A-Z]+)\b",
    "launch/slurm/run.sbatch": r"^#SBATCH --([\w-]+)",
}


@pytest.mark.parametrize("name", WORDS)
def test_each_misspelt_instruction_or_option_is_refused(name: str) -> None:
    text = (ROOT / name).read_text()
    found = list(re.finditer(WORDS[name], text, flags=re.MULTILINE))
    assert len(found) > 5
    for word in found:
        changed = text[: word.end() - 1] + "q" + text[word.end() :]
        assert TEXT[name](changed) != [], word[0]


def test_skypilot_understands_its_job_group_and_refuses_each_misspelt_field() -> None:
    documents = documents_of(SKY)
    paths, texts = list[tuple[object, ...]](), [(ROOT / SKY).read_text()]
    for index, document in enumerate(documents):
        for path in keys_of(document):
            if not (len(path) > 1 and path[-2] in ("envs", "secrets")):  # whose names are the writer's own
                paths.append((index, *path))
                texts.append(yaml.safe_dump_all([*documents[:index], misspelt(document, path), *documents[index + 1 :]]))
    as_it_is, *changed = skypilot(*texts)
    assert as_it_is == ""
    assert [path for path, problem in zip(paths, changed, strict=True) if not problem] == []


def test_a_run_on_kubernetes_has_the_cluster_that_one_may_keep() -> None:
    (job,), (cluster,) = documents_of("launch/k8s/rayjob.yaml"), documents_of("launch/k8s/raycluster.yaml")
    assert job["spec"]["rayClusterSpec"] == cluster["spec"]  # type: ignore[index]


@pytest.mark.parametrize("name", sorted({Path(name).parent for name in (*YAML, *TEXT, SKY)}))
def test_a_page_beside_it_says_what_to_type(name: Path) -> None:
    assert (ROOT / name / "README.md").read_text().count("```") >= 2
