"""The rollouts of a store, for people: their recipes, what is there of each, and what verification
moved aside."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict

from rich.console import Console
from rich.filesize import decimal
from rich.table import Table
from rich.text import Text

from stillhouse.cli.store_missing import unreadable
from stillhouse.store.rollout_maintenance import StoredRollouts
from stillhouse.terminal import one_line, say

_DIGEST_DIGITS = 12


def print_rollouts(stored: Sequence[StoredRollouts], console: Console) -> None:
    """Print a line for each recipe of rollouts; nothing where there is none."""
    table = Table(box=None, header_style="bold")
    for heading in ("rollouts", "writer"):
        table.add_column(heading, no_wrap=True)
    for heading in ("prompts", "samples", "tokens", "shards", "bytes"):
        table.add_column(heading, justify="right")
    table.add_column("verdicts")
    for each in stored:
        recipe = each.store.recipe
        graders = [f"{name} {count:,}" for name, count in each.verdicts_by_name.items()]
        table.add_row(
            recipe.fingerprint[:16],
            Text(one_line(recipe.writer_digest[:_DIGEST_DIGITS])),
            f"{recipe.num_prompts:,}",
            f"{recipe.samples:,} of each",
            f"up to {recipe.max_new_tokens:,}",
            f"{each.num_shards:,} of {recipe.num_shards:,}",
            decimal(each.num_bytes),
            Text(one_line(", ".join(graders) or "none")),
        )
    if stored:
        console.print(table)


def show_rollouts(stored: StoredRollouts) -> None:
    """Print every field of a recipe of rollouts, its missing shards, and its graders."""
    store, recipe = stored.store, stored.store.recipe
    figures: dict[str, object] = {
        "fingerprint": recipe.fingerprint,
        **asdict(recipe),
        "shards": f"{stored.num_shards:,} of {recipe.num_shards:,}",
        "bytes": f"{stored.num_bytes:,}",
        **unreadable(
            store,
            recipe.num_shards,
            why_missing="`stillhouse generate`, given their file again, writes them",
            cure="`stillhouse generate`, given their file again, writes them anew",
        ),
    }
    graders = [
        ("grader", f"{name}: {count:,} of {recipe.num_shards:,} shards")
        for name, count in stored.verdicts_by_name.items()
    ]
    say(f"{store.url}/{store.folder}")
    for name, value in [*figures.items(), *(graders or [("graders", "none")])]:
        say(f"  {name:<17}  {one_line(str(value))}")


def words_of_moved(moved: Mapping[str, int]) -> str:
    """What was moved aside of rollouts, by its place in the recipe's folder, and who makes it
    again."""
    nouns = {
        "recipe.json": "recipes",
        "shards": "shards",
        "verdicts": "verdicts",
        "graders": "names of graders",
    }
    listed = [f"{moved[place]} {noun}" for place, noun in nouns.items() if moved[place]]
    if not listed:
        return "nothing of the rollouts was moved, for nothing reads it"
    return (
        f"{', '.join(listed)} were moved to quarantine/: `stillhouse generate`, given the same "
        "file, publishes recipes again and writes shards anew, with other words perhaps, and "
        "`stillhouse grade` grades what has no verdict"
    )
