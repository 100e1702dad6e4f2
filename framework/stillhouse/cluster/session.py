"""A session on a Ray cluster: attach to one that exists, or start one on this machine, which ends
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
from stillhouse.cluster.head_process import head_required, is_port_closed, watched_socket
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
# failed health checks in a row, of three seconds each, after which Ray drops a node: on one machine
# a node may be busy, and is never cut off
_PATIENT_CHECKS = 100
# for how long a head may be absent, our own or that of a cluster that we attach to, which may be
# started again. Ray ends this process after 60 s
_OWN_HEAD_S = 1.0
_HEAD_S = 30.0


@contextmanager
def attached(section: ClusterSection) -> Iterator[dict[str, float]]:
    """Attach to the cluster that the section names, or start one on this machine; yields its
    resources by name.

    A cluster that was started here ends with the block. A process that is attached already, such
    as a test session, stays so. Raises HeadGoneError where the cluster's head, or this machine's
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
    """A cluster of this machine alone: its ports are on loopback, and no other user can enter the
    directory of its files."""
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
    """The failed preflight checks of this machine, as sentences for the user; none where the
    section attaches to a cluster."""
    return machine.for_ray(os.environ, num_cpus=section.num_cpus) if section.address is None else []


def remarks(section: ClusterSection) -> list[str]:
    """The checks of this machine that stop no run; none where the section attaches to a cluster."""
    if section.address is not None:
        return []
    return machine.remarks(os.environ, object_store_bytes=OBJECT_STORE_BYTES)


def _start(num_cpus: int | None, directory: Path) -> None:
    """Raises RunError where Ray does not start."""
    try:
        with _ray_compat.on_loopback(), _ray_compat.without_log_monitor():
            _init(
                address="local",
                num_cpus=num_cpus,
                include_dashboard=False,
                object_store_memory=OBJECT_STORE_BYTES,
                **_ray_compat.start_options(directory, failed_checks=_PATIENT_CHECKS),
            )
    except Exception as error:  # Ray has no class of its own for it
        ray.shutdown()
        reason = str(error).partition("\n")[0]
        raise RunError(
            f"Ray did not start on this machine ({reason}); where the machine was too busy, the "
            "same command goes on later. cluster.address attaches to a cluster that is there "
            "already"
        ) from error


@contextmanager
def _others_cluster(address: str) -> Iterator[None]:
    try:
        found = _resolved(address)
        _reach(found)
        logging.getLogger("ray").setLevel(logging.ERROR)  # as `_init` will
        _ray_compat.use_token_if_there_is_one()
        _init(address=found)
    except (OSError, ValueError, ray.exceptions.AuthenticationError) as error:
        refusal = _ray_compat.token_refusal(error)
        if refusal is None:
            raise ConfigError(
                f"no Ray cluster answers at {address!r} ({error}); start one with `stillhouse node "
                "head`, or leave cluster.address out"
            ) from None
        raise ConfigError(
            f"the Ray cluster at {address!r} lets in who has its token ({refusal}); put the token "
            "of its head into RAY_AUTH_TOKEN, or a file that holds it into RAY_AUTH_TOKEN_PATH"
        ) from None
    with _until_shutdown(patience_s=_HEAD_S):
        yield


def _init(**options: Any) -> None:
    ray.init(**options, namespace=_NAMESPACE, log_to_driver=False, logging_level=logging.ERROR)
    for handler in logging.getLogger("ray").handlers:
        if isinstance(handler, logging.StreamHandler):  # it prints; warnings are for the log alone
            handler.setLevel(logging.ERROR)
    logging.getLogger("ray").setLevel(logging.WARNING)


@contextmanager
def _until_shutdown(*, patience_s: float) -> Iterator[None]:
    here = _ray_compat.local_node()
    try:
        if here is None:  # a client by ray://, whose server reports the end
            yield
            return
        host, _, port = here.gcs_address.rpartition(":")
        with (
            watched_socket(here.raylet_socket) as is_raylet_gone,
            head_required(
                lambda: is_raylet_gone() or is_port_closed(host.strip("[]"), int(port)),
                patience_s=patience_s,
            ),
        ):
            yield
    finally:
        ray.shutdown()


def _resolved(address: str) -> str:
    """`auto` as host:port: RAY_ADDRESS, or the cluster that this machine belongs to. Ray itself
    would trust any process and any file that names one. Raises ValueError where there is none."""
    if address == "auto":
        address = os.environ.get("RAY_ADDRESS") or "auto"
    if address == "auto":
        address = current_address(base_directory(os.environ)) or ""
    if address in ("", "local"):  # Ray would start one
        raise ValueError("this machine belongs to none" if not address else "that is no address")
    return address


def settle_ray_train() -> None:
    """Set how Ray Train watches its ranks, before the first trainer is made. The user's own
    settings stay."""
    settings = {
        "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5",  # within which a dead rank is found
        # it would be one more process for each attempt, and the driver watches itself
        "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",
        "RAY_TRAIN_METRICS_ENABLED": "0",
    }
    for name, value in settings.items():
        os.environ.setdefault(name, value)


def _require_token() -> None:
    """Make sure that Ray authenticates by a token, since other users reach this machine's ports,
    too. Ray reads the token once. Raises ConfigError on a mode without one, or a weak token."""
    mode = os.environ.get("RAY_AUTH_MODE", "token")
    if mode.lower() != "token":
        raise ConfigError(
            f"RAY_AUTH_MODE is {mode!r}: all who reach this machine could run code on it; unset "
            "it, or set it to 'token'"
        )
    require_unguessable(os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32)))


def _reach(address: str) -> None:
    """Raise OSError where no process listens at host:port: Ray itself would try for minutes."""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if host and port.isdecimal():
        with socket.create_connection((host.strip("[]"), int(port)), timeout=_REACH_S):
            pass
