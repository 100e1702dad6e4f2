"""A session on a Ray cluster: attach to one that is there, or start one on this machine that ends
with the command."""

import logging
import os
import secrets
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import ray

from stillhouse.cluster import _ray_compat, machine
from stillhouse.cluster.environment import learn_secrets
from stillhouse.cluster.head_process import held_to, nobody_listens, required
from stillhouse.cluster.node import OBJECT_STORE_BYTES, require_unguessable
from stillhouse.cluster.ray_directory import (
    base_directory,
    current_address,
    new_directory,
    ray_directory,
    remove_directory,
)
from stillhouse.config import ClusterSection
from stillhouse.errors import ConfigError, RunError

_log = logging.getLogger(__name__)

_NAMESPACE = "stillhouse"
_REACH_S = 10.0
# that one machine's own node may fail in a row, three seconds each: it may be busy, and is never
# cut off
_PATIENT_CHECKS = 100
# that a head may be away; others' may be started again. Ray ends this process after 60
_OWN_HEAD_S, _HEAD_S = (
    1.0,
    30.0,
)


@contextmanager
def attached(section: ClusterSection) -> Iterator[dict[str, float]]:
    """Attach to the cluster that the section names, or start one on this machine; yields its
    resources by name.

    A cluster that this started ends with the block. Inside an already attached process (a test
    session) it is used as it is. Raises HeadGoneError where the cluster's head, or this machine's
    part of it, is gone before the block is done.
    """
    if ray.is_initialized():
        yield ray.cluster_resources()
        return
    with _own_cluster(section) if section.address is None else _others_cluster(section.address):
        learn_secrets()  # the cluster's token may be a new one
        resources = ray.cluster_resources()
        _log.info("attached to a Ray cluster of %s", resources)
        yield resources


@contextmanager
def _own_cluster(section: ClusterSection) -> Iterator[None]:
    """A cluster of this machine alone: its ports are on loopback, and its files where no other user
    can enter."""
    machine.require(lacks(section))
    _require_token()
    directory = new_directory(base_directory(os.environ))
    try:
        _start(section.num_cpus, ray_directory(directory))
        with _until_shutdown(patience_s=_OWN_HEAD_S):
            yield
    finally:
        remove_directory(directory)


def lacks(section: ClusterSection) -> list[str]:
    """What this machine lacks to start the section's cluster, as sentences for the user; empty
    where it attaches to one."""
    return machine.for_ray(os.environ, num_cpus=section.num_cpus) if section.address is None else []


def remarks(section: ClusterSection) -> list[str]:
    """What is worth knowing of this machine where the section's cluster is started on it."""
    return (
        machine.remarks(os.environ, object_store_bytes=OBJECT_STORE_BYTES)
        if section.address is None
        else []
    )


def _start(num_cpus: int | None, directory: Path) -> None:
    """Raises RunError where Ray does not start."""
    try:
        with _ray_compat.on_loopback():
            _init(
                address="local",
                num_cpus=num_cpus,
                include_dashboard=False,
                object_store_memory=OBJECT_STORE_BYTES,
                **_ray_compat.start_options(directory, failed_checks=_PATIENT_CHECKS),
            )
    except Exception as error:  # Ray has no class for it
        ray.shutdown()
        why = str(error).partition("\n")[0]
        raise RunError(
            f"Ray did not start on this machine ({why}); where the machine was too busy, the same "
            "command goes on later."
            " cluster.address attaches to a cluster that is there already"
        ) from error


@contextmanager
def _others_cluster(address: str) -> Iterator[None]:
    try:
        found = _resolved(address)
        _reach(found)
        logging.getLogger("ray").setLevel(logging.ERROR)  # as `_init` will
        _ray_compat.use_token_if_there_is_one()
        _init(address=found)
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"no Ray cluster answers at {address!r} ({error}); start one with `stillhouse node "
            "head`, or leave cluster.address out"
        ) from None
    except ray.exceptions.AuthenticationError as error:
        why = str(error).partition(". ")[0]
        raise ConfigError(
            f"the Ray cluster at {address!r} lets in who has its token ({why}); put the token of "
            "its head into RAY_AUTH_TOKEN, or a file"
            " that holds it into RAY_AUTH_TOKEN_PATH"
        ) from None
    with _until_shutdown(patience_s=_HEAD_S):
        yield


def _init(**options: Any) -> None:
    ray.init(**options, namespace=_NAMESPACE, log_to_driver=False, logging_level=logging.ERROR)
    for handler in logging.getLogger("ray").handlers:
        if isinstance(handler, logging.StreamHandler):  # which prints: warnings are for the log
            handler.setLevel(logging.ERROR)
    logging.getLogger("ray").setLevel(logging.WARNING)


@contextmanager
def _until_shutdown(*, patience_s: float) -> Iterator[None]:
    here = _ray_compat.local_node()
    try:
        if here is None:  # a client by ray://, which its server tells
            yield
            return
        host, _, port = here.gcs_address.rpartition(":")
        with (
            held_to(here.raylet_socket) as is_raylet_gone,
            required(
                lambda: is_raylet_gone() or nobody_listens(host.strip("[]"), int(port)),
                patience_s=patience_s,
            ),
        ):
            yield
    finally:
        ray.shutdown()


def _resolved(address: str) -> str:
    """`auto` as host:port: RAY_ADDRESS, or what this machine was made part of. Ray itself would
    believe any process and any file."""
    if address == "auto":
        address = os.environ.get("RAY_ADDRESS") or "auto"
    if address == "auto":
        address = current_address(base_directory(os.environ)) or ""
    if address in ("", "local"):  # Ray would start one
        raise ValueError("this machine belongs to none" if not address else "that is no address")
    return address


def settle_ray_train() -> None:
    """How Ray Train shall look after its ranks, before the first trainer is made. The user's own
    settings win."""
    settings = {
        "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5",  # a dead rank is seen that soon
        # one more process for each life of a group: the driver watches for that
        "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",
        "RAY_TRAIN_METRICS_ENABLED": "0",
    }
    for name, value in settings.items():
        os.environ.setdefault(name, value)


def _require_token() -> None:
    """Other users reach the ports of this machine, too: Ray asks who comes where it finds a token,
    which it reads once."""
    mode = os.environ.get("RAY_AUTH_MODE", "token")
    if mode.lower() != "token":
        raise ConfigError(
            f"RAY_AUTH_MODE is {mode!r}: all who reach this machine could run code on it; unset "
            "it, or set it to 'token'"
        )
    require_unguessable(os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32)))


def _reach(address: str) -> None:
    """Raise OSError where nobody listens at host:port: Ray itself would try for minutes."""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if host and port.isdecimal():
        with socket.create_connection((host.strip("[]"), int(port)), timeout=_REACH_S):
            pass
