"""Which environment variables the programs of an image read, and which ones a launcher sets for the
scripts that it starts.

Installed programs are inspected, by their interface or by the names in their code; the others are
in schemas/environment.toml.
"""

import importlib.util
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
_LISTS = Path(__file__).parents[1] / "schemas" / "environment.toml"
_NAME = re.compile(rb"(?<![A-Za-z0-9_])[A-Z][A-Z0-9]*(?:_[A-Z0-9]+)+(?![A-Za-z0-9_])")
_EXPANDED = re.compile(r"(?<!\$)\$\{?([A-Z][A-Za-z0-9_]*)")
_ASSIGNED = re.compile(r"\b(?:export +)?([A-Z][A-Za-z0-9_]*)=")
# Of what is installed in our images, and reads variables of its own.
_READERS = {
    "ray": ("_raylet.so", "_private/**/*.py", "autoscaler/**/*.py"),
    "huggingface_hub": ("constants.py", "utils/_auth.py"),
    "wandb": ("env.py",),
}


def is_read_in_our_image(name: str) -> bool:
    """Whether Stillhouse, or a package that it depends on, reads a variable of this name."""
    names = (_own_names, _names_in_packages, _names_of_pip, _names_of_python)
    is_listed = name in _listed("system") | _listed("nvidia_container_toolkit")
    return is_listed or any(name in of() for of in names) or _is_of_an_object_store(name)


def is_read_by_the_s3_server(name: str) -> bool:
    return name in _listed("versitygw")


def is_set_by_slurm(name: str) -> bool:
    return name in _listed("slurm") | _listed("system")


def is_set_by_ray_up(name: str) -> bool:
    return name in _names_in_packages() | _listed("system")


def is_set_by_skypilot(name: str) -> bool:
    return name in _names_of_skypilot() | _listed("system")


def expanded_in(script: str) -> set[str]:
    """The names in capital letters that a shell script expands and does not assign itself: what its
    environment must hold."""
    return set(_EXPANDED.findall(script)) - set(_ASSIGNED.findall(script))


def containers_of(document: Any) -> Iterator[dict[str, Any]]:
    """The containers of Kubernetes' pods, wherever they stand in a document."""
    if isinstance(document, dict):
        yield from (
            each for key in ("containers", "initContainers") for each in document.get(key, ())
        )
        for inner in document.values():
            yield from containers_of(inner)
    elif isinstance(document, list):
        for inner in document:
            yield from containers_of(inner)


@cache
def _listed(program: str) -> frozenset[str]:
    return frozenset(tomllib.loads(_LISTS.read_text())[program])


@cache
def _own_names() -> frozenset[str]:
    """The names in quotes in our own code."""
    sources = (path.read_text() for path in (ROOT / "framework").rglob("*.py"))
    return frozenset(
        name for text in sources for name in re.findall(r"""["']([A-Z][A-Z0-9_]+)["']""", text)
    )


@cache
def _names_in_packages() -> frozenset[str]:
    paths = [
        path
        for package, patterns in _READERS.items()
        for pattern in patterns
        for path in _folder_of(package).glob(pattern)
    ]
    return frozenset(name.decode() for path in paths for name in _NAME.findall(path.read_bytes()))


@cache
def _names_of_skypilot() -> frozenset[str]:
    paths = (ROOT / ".venv-sky").glob("lib/python*/site-packages/sky/jobs/*.py")
    return frozenset(
        name.decode()
        for path in paths
        for name in _NAME.findall(path.read_bytes())
        if name.startswith(b"SKYPILOT_")
    )


@cache
def _names_of_python() -> frozenset[str]:
    shown = subprocess.run(
        [sys.executable, "--help-env"], capture_output=True, text=True, check=True
    )
    return frozenset(re.findall(r"\bPYTHON[A-Z]+\b", shown.stdout))


@cache
def _is_of_an_object_store(name: str) -> bool:
    """Whether it is an option of obstore, which looks for each of them in the environment."""
    from obstore.exceptions import UnknownConfigurationKeyError
    from obstore.store import AzureStore, GCSStore, S3Store

    store = {"AWS": S3Store, "GOOGLE": GCSStore, "AZURE": AzureStore}.get(name.partition("_")[0])
    if store is None or name != name.upper():
        return False
    try:
        store("bucket", config={name.lower(): "a value"})
    except UnknownConfigurationKeyError:
        return False
    except Exception:  # the option is known, and another is missing, or the value is refused
        return True
    return True


@cache
def _names_of_pip() -> frozenset[str]:
    """The options of `pip install`: pip reads each as PIP_, then its name."""
    from pip._internal.commands import create_command

    options = (
        option
        for each in create_command("install").parser.option_list_all
        for option in each._long_opts
    )
    return frozenset(
        "PIP_" + option.removeprefix("--").replace("-", "_").upper() for option in options
    )


def _folder_of(package: str) -> Path:
    found = importlib.util.find_spec(package)
    assert found is not None
    assert found.origin is not None
    return Path(found.origin).parent
