"""Every file under launch/ and docker/ is valid for the program that reads it, and a misspelt field
in it is refused."""

import json
import re
from pathlib import Path

import pytest
import yaml

from helpers.environments import ROOT, is_read_by_the_s3_server, is_read_in_our_image
from helpers.launchfiles import (
    Validator,
    compose,
    dockerfile,
    keys_of,
    kubernetes,
    misspelt,
    ray_up,
    sbatch,
    skypilot,
    variables_of_sky,
)
from stillhouse.config.generate import load_generate_config

YAML: dict[str, Validator] = {
    "launch/k8s/raycluster.yaml": kubernetes,
    "launch/k8s/rayjob.yaml": kubernetes,
    "launch/k8s/storage.yaml": kubernetes,
    "launch/ray/aws.yaml": ray_up,
    "launch/ray/gcp.yaml": ray_up,
    "docker/compose.yaml": compose,
}
SKY = ("launch/sky/generate.yaml", "launch/sky/run.yaml")
TEXT: dict[str, Validator] = {
    "docker/cpu.Dockerfile": dockerfile,
    "docker/gpu.Dockerfile": dockerfile,
    "docker/vllm.Dockerfile": dockerfile,
    "launch/slurm/generate.sbatch": sbatch,
    "launch/slurm/run.sbatch": sbatch,
}
FREE = {  # mappings whose keys are the writer's own
    *("labels", "annotations", "rayStartParams", "nodeSelector", "requests", "limits"),
    *("available_node_types", "file_mounts", "resources", "services", "networks", "volumes"),
}


def test_no_file_is_left_out() -> None:
    written = {
        path
        for folder in ("launch", "docker")
        for path in (ROOT / folder).rglob("*")
        if path.is_file()
    }
    known = {ROOT / name for name in (*YAML, *TEXT, *SKY)}
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
            # an extension: it is checked where it is merged into a service
            if str(path[0]).startswith("x-"):
                continue
            changed = [*documents]
            changed[index] = misspelt(document, path)
            if not YAML[name](yaml.safe_dump_all(changed)):
                accepted.append(path)
    assert accepted == []


WORDS = {
    "docker/cpu.Dockerfile": r"^([A-Z]+)\b",
    "docker/gpu.Dockerfile": r"^([A-Z]+)\b",
    "docker/vllm.Dockerfile": r"^([A-Z]+)\b",
    "launch/slurm/generate.sbatch": r"^#SBATCH --([\w-]+)",
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


@pytest.mark.parametrize("name", SKY)
def test_skypilot_understands_its_job_group_and_refuses_each_misspelt_field(name: str) -> None:
    documents = documents_of(name)
    paths, texts = list[tuple[object, ...]](), [(ROOT / name).read_text()]
    for index, document in enumerate(documents):
        for path in keys_of(document):
            if len(path) > 1 and path[-2] in ("envs", "secrets"):  # whose keys are the writer's own
                continue
            changed = [*documents]
            changed[index] = misspelt(document, path)
            paths.append((index, *path))
            texts.append(yaml.safe_dump_all(changed))
    as_it_is, *problems = skypilot(*texts)
    assert as_it_is == ""
    assert [path for path, problem in zip(paths, problems, strict=True) if not problem] == []


# a file's reader, and where the names of environment variables stand in it
VARIABLES: dict[str, tuple[Validator, str]] = {
    "docker/compose.yaml": (compose, r"\$\{(\w+)|^ {4,6}([A-Z]\w+):"),
    "docker/cpu.Dockerfile": (dockerfile, r"\b([A-Z_]+)=(?!python:3)"),
    "docker/gpu.Dockerfile": (dockerfile, r"\b([A-Z_]+)=(?!python:3)"),
    "docker/vllm.Dockerfile": (dockerfile, r"\b([A-Z_]+)=(?!python:3)"),
    "launch/ray/aws.yaml": (ray_up, r"\$(\w+)"),
    "launch/ray/gcp.yaml": (ray_up, r"\$(\w+)"),
    **dict.fromkeys(SKY, (variables_of_sky, r"\$([A-Z]\w+)|^  ([A-Z]\w+):")),
    "launch/slurm/generate.sbatch": (sbatch, r"\$\{?([A-Z]\w+)"),
    "launch/slurm/run.sbatch": (sbatch, r"\$\{?([A-Z]\w+)"),
}


@pytest.mark.parametrize("name", VARIABLES)
def test_each_misspelt_environment_variable_is_refused(name: str) -> None:
    understands, pattern = VARIABLES[name]
    text = (ROOT / name).read_text()
    assert understands(text) == []
    found = list(re.finditer(pattern, text, flags=re.MULTILINE))
    assert found
    accepted = []
    for word in found:
        end = word.end(word.lastindex or 0)
        if not understands(text[: end - 1] + ("X" if text[end - 1] != "X" else "Y") + text[end:]):
            accepted.append(word[0])
    assert accepted == []


def test_a_variable_of_a_pod_is_one_that_its_image_reads() -> None:
    (cluster,) = documents_of("launch/k8s/raycluster.yaml")
    container = cluster["spec"]["headGroupSpec"]["template"]["spec"]["containers"][0]  # type: ignore[index]
    container["env"] = [{"name": "HF_TOKEN", "value": "x"}]
    assert kubernetes(yaml.safe_dump(cluster)) == []
    container["env"] = [{"name": "HF_TOKEM", "value": "x"}]
    assert kubernetes(yaml.safe_dump(cluster)) == ["nothing in the image reads HF_TOKEM"]


def test_the_secrets_that_the_page_of_kubernetes_makes_are_read_in_the_image() -> None:
    names = re.findall(r"--from-literal=(\w+)=", (ROOT / "launch/k8s/README.md").read_text())
    assert names
    assert [name for name in names if not is_read_in_our_image(name)] == []


@pytest.mark.parametrize(
    "name",
    [
        "AWS_REGION",
        "RAY_AUTH_TOKEN",
        "WANDB_API_KEY",
        "HF_TOKEN",
        "PYTHONUNBUFFERED",
        "PIP_NO_CACHE_DIR",
        "HOME",
    ],
)
def test_a_variable_is_known_by_its_whole_name_to_the_programs_that_read_it(name: str) -> None:
    assert is_read_in_our_image(name)
    for wrong in (
        (name[:-1], name + "S", name.lower(), "X" + name, name.replace("_", ""))
        if "_" in name
        else (name[:-1],)
    ):
        assert not is_read_in_our_image(wrong), wrong
    assert not is_read_by_the_s3_server(name)


def test_a_run_on_kubernetes_has_the_cluster_that_one_may_keep() -> None:
    (job,), (cluster,) = (
        documents_of("launch/k8s/rayjob.yaml"),
        documents_of("launch/k8s/raycluster.yaml"),
    )
    assert job["spec"]["rayClusterSpec"] == cluster["spec"]  # type: ignore[index]


def test_writers_are_spot_machines_that_offer_what_configs_ask_for_and_come_on_demand() -> None:
    config = load_generate_config(ROOT / "configs/generated-maths.toml")
    (cluster,) = documents_of("launch/k8s/raycluster.yaml")
    (group,) = (
        each
        for each in cluster["spec"]["workerGroupSpecs"]  # type: ignore[index]
        if each["groupName"] == "writers-on-spot"
    )
    assert json.loads(json.loads(group["rayStartParams"]["resources"])) == config.writer.resources
    assert (group["minReplicas"], group["maxReplicas"]) == (0, config.writer.max_replicas)
    for name in ("launch/ray/aws.yaml", "launch/ray/gcp.yaml"):
        (launcher,) = documents_of(name)
        kind = launcher["available_node_types"]["writers-on-spot"]  # type: ignore[index]
        assert kind["resources"].items() >= config.writer.resources.items()
        assert (kind["min_workers"], kind["max_workers"]) == (0, config.writer.max_replicas)
    for name in ("launch/sky/generate.yaml", "launch/slurm/generate.sbatch"):
        for resource in config.writer.resources:
            assert f"{resource}=" in (ROOT / name).read_text()


@pytest.mark.parametrize("name", sorted({Path(name).parent for name in (*YAML, *TEXT, *SKY)}))
def test_a_page_beside_it_says_what_to_type(name: Path) -> None:
    assert (ROOT / name / "README.md").read_text().count("```") >= 2
