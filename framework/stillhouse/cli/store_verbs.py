"""The verbs `stillhouse store ...`."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from stillhouse import api
from stillhouse.cli.run_verbs import planned

if TYPE_CHECKING:
    from stillhouse.pipeline import Plan

store_app = typer.Typer(help="Look at, verify and tidy a store.", no_args_is_help=True)

StoreUrl = Annotated[
    str,
    typer.Argument(
        metavar="URL", help="A directory, or s3://, gs:// or az:// with bucket and prefix."
    ),
]
RecipePlace = Annotated[
    str,
    typer.Argument(
        metavar="URL[/FINGERPRINT]",
        help="A store of one recipe; or a store, a slash and a fingerprint's first digits.",
    ),
]


@store_app.command(name="ls")
def store_ls(url: StoreUrl) -> None:
    """The recipes of targets and of rollouts in a store, and how much of each is there."""
    from stillhouse.cli import store

    store.list_store(url)


@store_app.command(name="stat")
def store_stat(
    url: StoreUrl,
    fingerprint: Annotated[
        str,
        typer.Argument(metavar="[FINGERPRINT]", help="Its first digits; default: every recipe."),
    ] = "",
) -> None:
    """Every field of a recipe, and which of its chunks or shards are missing."""
    from stillhouse.cli import store

    store.show_recipes(url, fingerprint)


@store_app.command(name="diff")
def store_diff(one: RecipePlace, other: RecipePlace) -> None:
    """What differs between two recipes: exit code 0 where nothing does, else 1."""
    from stillhouse.cli.store_diff import compare

    if not compare(one, other):
        raise typer.Exit(1)


@store_app.command(name="verify")
def store_verify(
    url: StoreUrl,
    quarantine: Annotated[
        bool,
        typer.Option(
            "--quarantine",
            help="Move what is damaged away: `produce` then makes chunks again, `generate` shards, "
            "with other words perhaps, and `grade` verdicts.",
        ),
    ] = False,
    repair: Annotated[
        Path | None,
        typer.Option(
            "--repair",
            metavar="RUN_DIR|CONFIG",
            help="Make damaged chunks of this run's recipe again, with its teacher.",
        ),
    ] = None,
) -> None:
    """Read every chunk, shard and verdict, and check every bit of it; exit code 1 where any is
    damaged, and was not repaired."""
    from stillhouse.cli import store

    if repair is None:
        store.verify(url, quarantine=quarantine)
    else:
        store.repair(url, _plan_of(repair, url))


def _plan_of(repair: Path, url: str) -> "Plan":
    """The plan of a run directory, or of a config for this store: what is there decides the format
    of its recipe."""
    if repair.is_dir():
        return api.open_run(repair)
    return planned([repair], [f"store.url = {json.dumps(url, ensure_ascii=False)}"])


@store_app.command(name="sweep")
def store_sweep(
    url: StoreUrl,
    older_than_hours: Annotated[
        float,
        typer.Option("--older-than-hours", min=0.0, help="A younger one may still be written."),
    ] = 24.0,
) -> None:
    """Remove what killed writers left behind, and name what lies in quarantine."""
    from stillhouse.cli import store

    store.tidy(url, older_than_s=older_than_hours * 3600)
