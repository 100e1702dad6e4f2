"""The verbs `stillhouse node ...`: a machine as the head of a cluster, or as a node of one."""

import os
import sys
from pathlib import Path
from typing import Annotated

import typer

from stillhouse.cluster import machine, node
from stillhouse.cluster.ray_directory import base_directory, current_address, machine_directory

node_app = typer.Typer(
    help="Make this machine the head of a cluster, or a node of one.", no_args_is_help=True
)

Resources = Annotated[
    list[str] | None,
    typer.Option("--resources", metavar="NAME=AMOUNT", help="What configs may ask for: teacher=8."),
]
Block = Annotated[bool, typer.Option("--block", help="Stay until Ray ends here, and fail then.")]


@node_app.command(name="head")
def node_head(
    port: Annotated[int, typer.Option("--port", help="The port that nodes join at.")] = node.PORT,
    resources: Resources = None,
    autoscaling: Annotated[
        Path | None,
        typer.Option("--autoscaling", help="The config of `ray up`, on a head that it made."),
    ] = None,
    block: Block = False,
) -> None:
    """Start a cluster with this machine as its head; only a machine with its token can join."""
    requested = node.parse_resources(resources or ())
    _prepare_machine()
    node.protected(os.environ)  # before a directory is made for nothing
    command = node.head(
        port=port,
        resources=requested,
        autoscaling=autoscaling,
        block=block,
        directory=machine_directory(base_directory(os.environ)),
    )
    node.start(command, os.environ)
    if not block:
        print(
            f"The cluster is at {current_address(base_directory(os.environ))}; on this machine, "
            'cluster.address = "auto" finds it.'
        )


@node_app.command(name="join")
def node_join(
    address: Annotated[str, typer.Argument(metavar="HOST[:PORT]", help="The head.")],
    resources: Resources = None,
    block: Block = False,
    patience_s: Annotated[
        float, typer.Option("--patience", help="Seconds to wait for the head.")
    ] = 600.0,
) -> None:
    """Make this machine a node of a cluster; both have to have the same token."""
    _prepare_machine()
    node.protected(os.environ)  # better reported before the wait than after it
    node.wait_for_head(
        address,
        patience_s=patience_s,
        waiting=lambda words: print(words, file=sys.stderr, flush=True),
    )
    command = node.join(
        address,
        resources=node.parse_resources(resources or ()),
        block=block,
        directory=machine_directory(base_directory(os.environ)),
    )
    node.start(command, os.environ)


@node_app.command(name="health")
def node_health() -> None:
    """Fail where this machine belongs to a cluster whose head does not answer."""
    node.require_health(base_directory(os.environ))


@node_app.command(name="token")
def node_token() -> None:
    """Make the token of a cluster; copy the file to all its machines."""
    path = Path(os.environ.get("RAY_AUTH_TOKEN_PATH") or node.TOKEN_FILE).expanduser()
    node.make_token(path)
    print(
        f"{path} is the token. Every machine of the cluster needs a copy there, readable by its "
        "owner alone."
    )


def _prepare_machine() -> None:
    """Check what Ray's processes need of this machine, and raise its limit of open files."""
    machine.require(machine.home())
    machine.require(machine.for_ray(os.environ, num_cpus=None))
    machine.raise_open_files()
