"""Validators of files under launch/, docker/ and .github/: the schemas and loaders of the programs
that read them.

A validator takes a file's text and returns what is wrong with it. None needs a cloud, a cluster or
a container engine.
"""

import json
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import yaml
from jsonschema import Draft202012Validator
from jsonschema.validators import validator_for

from helpers.environments import (
    ROOT,
    containers_of,
    expanded_in,
    is_read_by_the_s3_server,
    is_read_in_our_image,
    is_set_by_ray_up,
    is_set_by_skypilot,
    is_set_by_slurm,
)

_SCHEMAS = Path(__file__).parents[1] / "schemas"
_KUBERNETES = "1.34"

Validator = Callable[[str], list[str]]


def kubernetes(text: str) -> list[str]:
    """KubeRay's own kinds by the schemas of its CRDs, all others by those of Kubernetes; both
    refuse what they do not know."""
    import kubernetes_validate

    found = []
    for document in yaml.safe_load_all(text):
        names = [
            each["name"]
            for container in containers_of(document)
            for each in container.get("env", ())
        ]
        found += [
            f"nothing in the image reads {name}" for name in names if not is_read_in_our_image(name)
        ]
        if str(document.get("apiVersion")).startswith("ray.io/"):
            found += [
                problem.message
                for problem in _kuberay(str(document.get("kind"))).iter_errors(document)
            ]
            # which a CRD leaves to Kubernetes
            document = {
                "apiVersion": "v1",
                "kind": "ConfigMap",
                "metadata": document.get("metadata"),
            }
        try:
            kubernetes_validate.validate(document, _KUBERNETES, strict=True)
        except (
            kubernetes_validate.ValidationError,
            kubernetes_validate.SchemaNotFoundError,
            KeyError,
        ) as error:
            found.append(str(error))
    return found


def ray_up(text: str) -> list[str]:
    """By what `ray up` does before it asks a cloud, and a machine's own settings by the cloud's
    API."""
    from ray.autoscaler._private.util import prepare_config, validate_config

    config = yaml.safe_load(text)
    unknown = [
        f"provider.{key} is not in Ray's schema"
        for key in config.get("provider", {})
        if key not in _providers_keys()
    ]
    try:
        validate_config(prepare_config(config))
    except Exception as error:
        return [*unknown, f"{type(error).__name__}: {error}"]
    commands = "\n".join(
        line for key, lines in config.items() if key.endswith("_commands") for line in lines
    )
    unknown += [
        f"nothing sets {name}" for name in expanded_in(commands) if not is_set_by_ray_up(name)
    ]
    machine = {"aws": _ec2_instance, "gcp": _compute_instance}[config["provider"]["type"]]
    return unknown + [
        problem
        for kind in config["available_node_types"].values()
        for problem in machine(kind["node_config"])
    ]


def compose(text: str) -> list[str]:
    """By the Compose specification's own schema; what services name has to be there, and their
    images have to read their variables."""
    project = yaml.safe_load(text)
    problems = by_schema("compose-spec", text)
    told = (ROOT / "docker" / "README.md").read_text()
    problems += [
        f"docker/README.md gives no {name}" for name in expanded_in(text) if f" {name}=" not in told
    ]
    for name, service in project.get("services", {}).items():
        is_read = (
            is_read_by_the_s3_server
            if "versitygw" in service.get("image", "")
            else is_read_in_our_image
        )
        problems += [
            f"nothing in the image of {name} reads {each}"
            for each in service.get("environment", ())
            if not is_read(each)
        ]
        mounted = [
            mount.partition(":")[0] for mount in service.get("volumes", ()) if mount[0] not in "./~"
        ]
        for kind, named in {
            "services": service.get("depends_on", ()),
            "networks": service.get("networks", ()),
            "volumes": mounted,
        }.items():
            problems += [
                f"{name} names {each}, which is not among the {kind}"
                for each in named
                if each not in project.get(kind, {})
            ]
    return problems


def dockerfile(text: str) -> list[str]:
    """By hadolint; what the image sets is read in it."""
    instructions = re.findall(r"^ENV ((?:.*\\\n)*.*)$", text, flags=re.MULTILINE)
    names = [
        name for instruction in instructions for name in re.findall(r"(?:^|\s)(\w+)=", instruction)
    ]
    return [
        f"nothing in the image reads {name}" for name in names if not is_read_in_our_image(name)
    ] + _told_by([_tool("hadolint"), "-"], text)


def sbatch(text: str) -> list[str]:
    """A shell script whose #SBATCH lines are options of sbatch, and whose variables are its own or
    Slurm's."""
    asked = re.findall(r"^#SBATCH --([\w-]+)", text, flags=re.MULTILINE)
    lines = re.findall(r"^#SBATCH\b", text, flags=re.MULTILINE)
    known = (_SCHEMAS / "sbatch-options.txt").read_text().split()
    unknown = [f"--{option} is no option of sbatch" for option in asked if option not in known]
    unknown += [f"Slurm sets no {name}" for name in expanded_in(text) if not is_set_by_slurm(name)]
    return (
        unknown
        + ["a line is not `#SBATCH --option`"] * (len(lines) - len(asked))
        + _told_by([_tool("shellcheck"), "-"], text)
    )


def skypilot(*texts: str) -> list[str]:
    """What SkyPilot's own loader refuses of each, or an empty text. It runs in its own
    environment."""
    python = ROOT / ".venv-sky" / "bin" / "python"
    assert python.exists(), "SkyPilot is not here: `make .venv-sky/.installed`"
    command = [python, Path(__file__).with_name("skypilot.py")]
    done = subprocess.run(
        command, input=json.dumps(texts), capture_output=True, text=True, check=True
    )
    return [problem or "" for problem in json.loads(done.stdout)]


def variables_of_sky(text: str) -> list[str]:
    """The variables of SkyPilot's tasks that nothing reads, and those that their scripts expand and
    nothing sets.

    What is given to one task is given to all of its group: `--env` and `--secret` are the group's.
    """
    tasks, problems = list(yaml.safe_load_all(text)), list[str]()
    scripts = [task.get("setup", "") + "\n" + task.get("run", "") for task in tasks]
    read = set().union(*map(expanded_in, scripts))
    for task, script in zip(tasks, scripts, strict=True):
        given, expanded = {**task.get("envs", {}), **task.get("secrets", {})}, expanded_in(script)
        problems += [
            f"nothing reads {name}"
            for name in given
            if name not in read and not is_read_in_our_image(name)
        ]
        problems += [
            f"nothing sets {name}"
            for name in expanded
            if name not in given and not is_set_by_skypilot(name)
        ]
    return problems


def by_schema(schema: str, text: str) -> list[str]:
    """What a schema of check-jsonschema's has against a YAML document."""
    return [error.message for error in _vendored(schema).iter_errors(yaml.safe_load(text))]


def keys_of(value: Any, path: tuple[str | int, ...] = ()) -> Iterator[tuple[str | int, ...]]:
    """The way to each key of nested mappings and lists."""
    if isinstance(value, dict):
        for key, inner in value.items():
            yield (*path, key)
            yield from keys_of(inner, (*path, key))
    elif isinstance(value, list):
        for index, inner in enumerate(value):
            yield from keys_of(inner, (*path, index))


def misspelt(document: Any, path: tuple[str | int, ...]) -> Any:
    """A copy of plain values in which the key at the end of the way has another last letter."""
    copy = json.loads(json.dumps(document))
    inner = copy
    for step in path[:-1]:
        inner = inner[step]
    key = str(path[-1])
    inner[key[:-1] + ("x" if key[-1] != "x" else "y")] = inner.pop(path[-1])
    return copy


@cache
def _kuberay(kind: str) -> Draft202012Validator:
    path = _SCHEMAS / f"kuberay-{kind.lower()}-v1.schema.json"
    return Draft202012Validator(json.loads(path.read_text()) if path.exists() else False)


@cache
def _vendored(schema: str) -> Any:
    """A validator of a schema that check-jsonschema brings along."""
    import check_jsonschema

    folder = Path(check_jsonschema.__file__).parent / "builtin_schemas" / "vendor"
    document = json.loads((folder / f"{schema}.json").read_text())
    return validator_for(document)(document)


@cache
def _providers_keys() -> set[str]:
    import ray.autoscaler

    return set(
        json.loads((Path(ray.autoscaler.__file__).parent / "ray-schema.json").read_text())[
            "properties"
        ]["provider"]["properties"]
    )


def _ec2_instance(settings: dict[str, Any]) -> list[str]:
    """Boto's own check of the parameters of EC2's RunInstances."""
    from botocore.validate import ParamValidator

    report = ParamValidator().validate({"MinCount": 1, "MaxCount": 1, **settings}, _run_instances())
    return [report.generate_report()] if report.has_errors() else []


@cache
def _run_instances() -> Any:
    import botocore.session

    return (
        botocore.session.get_session()
        .get_service_model("ec2")
        .operation_model("RunInstances")
        .input_shape
    )


def _compute_instance(settings: dict[str, Any]) -> list[str]:
    """By the discovery document of Google's Compute API."""
    return [*_unknown(settings, "Instance", "node_config")]


def _unknown(value: Any, kind: str, where: str) -> Iterator[str]:
    fields = _compute_api()[kind].get("properties", {})
    for key, inner in value.items():
        if key not in fields:
            yield f"{where}.{key} is not in {kind}"
            continue
        reference = fields[key].get("$ref") or fields[key].get("items", {}).get("$ref")
        for each in (inner if isinstance(inner, list) else [inner]) if reference else ():
            yield from _unknown(each, reference, f"{where}.{key}")


@cache
def _compute_api() -> dict[str, Any]:
    import googleapiclient.discovery_cache

    documents = Path(googleapiclient.discovery_cache.__file__).parent / "documents"
    schemas: dict[str, Any] = json.loads((documents / "compute.v1.json").read_text())["schemas"]
    return schemas


def _tool(name: str) -> str:
    return str(Path(sys.executable).with_name(name))


def _told_by(command: list[str], text: str) -> list[str]:
    done = subprocess.run(command, input=text, capture_output=True, text=True, check=False)
    return [] if done.returncode == 0 else [done.stdout + done.stderr]
