"""`stillhouse store ls | stat | verify | sweep`: the contents of a store, for people.

Only three options write to a store: `verify --quarantine` moves what is damaged aside, `verify
--repair` makes chunks again, and `sweep` removes leftovers.
"""

import sys
import time
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict, replace
from typing import TYPE_CHECKING

from rich.console import Console
from rich.filesize import decimal
from rich.progress import track
from rich.table import Table
from rich.text import Text

from stillhouse.cli.store_labels import lines_of_labels, print_runs
from stillhouse.cli.store_missing import unreadable
from stillhouse.cli.store_rollouts import print_rollouts, show_rollouts, words_of_moved
from stillhouse.errors import ChunkError, RecipeError, StoreError
from stillhouse.store import (
    ChunkStore,
    Finding,
    Recipe,
    StoredRecipe,
    differences,
    list_recipes,
    nearest,
    sweep,
    verify_chunks,
    verify_store,
)
from stillhouse.store.rollout_maintenance import (
    StoredRollouts,
    list_rollouts,
    quarantine_rollouts,
)
from stillhouse.terminal import one_line, say
from stillhouse.tracking import ChunkEvent, RunEvent

if TYPE_CHECKING:
    from stillhouse.pipeline import Plan

_DIGEST_DIGITS = 12
_OF_ROLLOUTS = "rollouts/"  # their keys begin so
_PIPE_WIDTH = 160  # rich would cut what a pipe receives at 80 columns
_CURE_OF_CHUNKS = (
    "`--repair RUN_DIR` makes damaged chunks again; `--quarantine` only moves them aside"
)
_CURE_OF_ROLLOUTS = (
    "`--quarantine` moves damaged shards aside with the verdicts on them, and damaged verdicts: "
    "`stillhouse generate` and `stillhouse grade` then make them anew"
)


def list_store(url: str) -> None:
    """Print a line for each recipe in a store, of targets and of rollouts. Raises StoreError where
    there is none."""
    table = Table(box=None, header_style="bold")
    for heading in ("recipe", "teacher", "codec"):
        table.add_column(heading, no_wrap=True)
    for heading in ("k", "sequences", "chunks", "bytes"):
        table.add_column(heading, justify="right")
    recipes, rollouts = _everything(url)
    for fingerprint16, recipe, num_chunks, num_bytes in recipes:
        table.add_row(
            fingerprint16,
            Text(one_line(recipe.teacher_digest[:_DIGEST_DIGITS])),
            recipe.spec.codec_name,
            f"{recipe.k} + {recipe.num_draws} draws" if recipe.num_draws else str(recipe.k),
            f"{recipe.num_sequences:,} x {recipe.sequence_length:,}",
            f"{num_chunks:,} of {recipe.num_chunks:,}",
            decimal(num_bytes),
        )
    console = Console(width=None if sys.stdout.isatty() else _PIPE_WIDTH)
    if recipes:
        console.print(table)
    if recipes and rollouts:
        console.print()
    print_rollouts(rollouts, console)
    print_runs([ChunkStore(url, stored.recipe) for stored in recipes], console)


def show_recipes(url: str, fingerprint: str) -> None:
    """Print every field of the recipes whose fingerprint begins with `fingerprint`. Raises
    StoreError where none does."""
    # which
    recipes, rollouts = _everything(url)
    prefix = fingerprint.lower()
    chosen = [stored for stored in recipes if stored.recipe.fingerprint.startswith(prefix)]
    written = [each for each in rollouts if each.store.recipe.fingerprint.startswith(prefix)]
    if not chosen and not written:
        there = [
            *(stored.fingerprint16 for stored in recipes),
            *(each.store.recipe.fingerprint[:16] for each in rollouts),
        ]
        raise StoreError(
            f"no recipe in {url} begins with {fingerprint}; there are {', '.join(there)}"
        )

    # of targets, and then of rollouts
    for stored in chosen:
        recipe = stored.recipe
        figures: dict[str, object] = {
            "fingerprint": recipe.fingerprint,
            **asdict(recipe),
            "codec": recipe.spec.codec_name,
            "bytes a target": recipe.spec.bytes_per_token,
            "chunks": f"{stored.num_chunks:,} of {recipe.num_chunks:,}",
            "bytes": f"{stored.num_bytes:,}",
            **unreadable(
                ChunkStore(url, recipe),
                recipe.num_chunks,
                why_missing="not made yet, never needed, or deleted once read",
                cure="`--repair RUN_DIR` of `stillhouse store verify` has them made again",
            ),
        }
        say(f"{url}/{stored.fingerprint16}")
        labels = lines_of_labels(ChunkStore(url, recipe))
        for name, value in [*figures.items(), *labels]:
            say(f"  {name:<16}  {one_line(str(value))}")
    for each in written:
        show_rollouts(each)


def verify(url: str, *, quarantine: bool) -> None:
    """Check every object and print the damaged ones. Raises ChunkError where any is damaged; with
    `quarantine` damaged chunks, shards, verdicts and names of graders are moved aside first."""
    # read everything
    recipes = {stored.fingerprint16: stored for stored in list_recipes(url)}
    total = len(recipes) + sum(stored.num_chunks for stored in recipes.values())
    total += sum(stored.num_objects for stored in list_rollouts(url))
    num_objects, damaged = _checked(verify_store(url), total)
    if not num_objects:
        raise _nothing_at(url)
    if not damaged:
        say(f"{num_objects} objects in {url}: all are good")
        return

    # what to do, of targets and of rollouts
    written = [finding for finding in damaged if finding.key.startswith(_OF_ROLLOUTS)]
    chunks = [finding for finding in damaged if finding not in written]
    if quarantine:
        cures = [_chunks_moved(url, chunks, recipes)] if chunks else []
        cures += [_rollouts_moved(url, written)] if written else []
    else:
        cures = [_CURE_OF_CHUNKS] if chunks else []
        cures += [_CURE_OF_ROLLOUTS] if written else []
    raise ChunkError(
        f"{len(damaged)} of {num_objects} objects in {url} are damaged; {'; '.join(cures)}"
    )


def repair(url: str, plan: "Plan") -> None:
    """Check the chunks of a plan's recipe, have its teacher make the damaged ones again, and check
    those. Prints what was done.

    Raises RecipeError, which names the difference, where the store has nothing of this recipe;
    ChunkError where something stays damaged.
    """
    from stillhouse import pipeline  # Ray and transformers, which only this verb needs

    plan = _moved_to(plan, url)
    store = ChunkStore(url, plan.recipe)
    _require_recipe(url, plan.recipe)

    # find the damaged
    if store.restore_recipe():
        say(
            f"{plan.recipe.fingerprint[:16]}/recipe.json was damaged: it was moved to "
            "quarantine/, and published anew"
        )
    _, damaged = _checked(verify_chunks(store), len(store.published()))
    chunks = [
        finding.number
        for finding in damaged
        if finding.number is not None and finding.number < plan.recipe.num_chunks
    ]

    # make them again
    moved = [number for number in chunks if store.quarantine(number)]
    if moved:
        say(f"{len(moved)} chunks moved to quarantine/; a teacher makes them again")
        pipeline.repair(plan, moved, journal=_Printed())
    for number in moved:
        store.verify(number)

    # report
    if len(damaged) > len(chunks):
        strange = ", ".join(finding.key for finding in damaged if finding.number not in chunks)
        raise ChunkError(
            f"{len(moved)} chunks were repaired; these are no chunks of this recipe, and are "
            f"never read: {strange}"
        )
    say(
        f"{len(moved)} chunks were repaired: all {len(store.published())} in "
        f"{url}/{plan.recipe.fingerprint[:16]} are good"
    )


def _checked(findings: Iterable[Finding], total: int) -> tuple[int, list[Finding]]:
    """How many objects there were, and the damaged ones, which are printed as they are found."""
    console = Console(stderr=True)
    num_objects, damaged = 0, []
    for finding in track(findings, "verifying", total=total, console=console, transient=True):
        num_objects += 1
        if finding.problem is not None:
            damaged.append(finding)
            say(f"{one_line(finding.key)}: {finding.problem}")
    return num_objects, damaged


class _Printed:
    """A tracker that prints each chunk as it is made."""

    def record(self, event: RunEvent) -> None:
        if isinstance(event, ChunkEvent):
            chunk, seconds = event.chunk, event.seconds
            say(f"chunk {chunk} made again by teacher {event.replica} in {seconds:.1f} s")


def _moved_to(plan: "Plan", url: str) -> "Plan":
    """The plan with its store at `url`."""
    section = plan.config.store.model_copy(update={"url": ChunkStore(url, plan.recipe).url})
    return replace(plan, config=plan.config.model_copy(update={"store": section}))


def _require_recipe(url: str, recipe: Recipe) -> None:
    """Raise RecipeError where the store has other recipes only, StoreError where it has none."""
    if ChunkStore(url, recipe).published():
        return
    near = nearest([stored.recipe for stored in _recipes(url)], recipe)
    assert near is not None
    if near != recipe:
        raise RecipeError(
            f"{url} has no chunks of the recipe {recipe.fingerprint[:16]}, which this run makes; "
            "the nearest there is"
            f" {near.fingerprint[:16]}, and these differ (this run's value first):\n"
            + "\n".join(f"  - {difference}" for difference in differences(recipe, near))
            + "\nName the run directory or the config that the chunks were made with."
        )


def tidy(url: str, *, older_than_s: float) -> None:
    """Remove the leftovers of killed writers that are `older_than_s` old, and name what lies in
    quarantine."""
    swept = sweep(url, older_than_s=older_than_s, now=time.time())
    for path in swept.removed:
        say(f"removed {one_line(str(path))}")
    for key in swept.quarantined:
        say(f"in quarantine: {one_line(key)}")
    say(f"{len(swept.removed)} leftovers removed, {len(swept.quarantined)} objects in quarantine")


def _everything(url: str) -> tuple[list[StoredRecipe], list[StoredRollouts]]:
    """The recipes of targets and those of rollouts. Raises StoreError where there is neither."""
    recipes, rollouts = list_recipes(url), list_rollouts(url)
    if not recipes and not rollouts:
        raise _nothing_at(url)
    return recipes, rollouts


def _recipes(url: str) -> list[StoredRecipe]:
    recipes = list_recipes(url)
    if not recipes:
        raise _nothing_at(url)
    return recipes


def _nothing_at(url: str) -> StoreError:
    return StoreError(
        f"there is no recipe in {url}; give the store.url of a config whose chunks have been "
        "produced, or whose rollouts have been generated"
    )


def _chunks_moved(url: str, damaged: Sequence[Finding], recipes: dict[str, StoredRecipe]) -> str:
    moved = sum(_moved_aside(url, finding, recipes) for finding in damaged)
    return f"{moved} chunks were moved to quarantine/: `stillhouse produce` makes them again"


def _rollouts_moved(url: str, damaged: Sequence[Finding]) -> str:
    moved = Counter(
        key.split("/")[2] for finding in damaged for key in quarantine_rollouts(url, finding)
    )
    return words_of_moved(moved)


def _moved_aside(url: str, finding: Finding, recipes: dict[str, StoredRecipe]) -> bool:
    stored = recipes.get(finding.key.partition("/")[0])
    if stored is None or finding.number is None:
        return False
    try:
        return ChunkStore(url, stored.recipe).quarantine(finding.number)
    except RecipeError:  # the recipe has no such number, so it is never read
        return False
