"""The labels of a store, for people: which runs filled it, when, and from what."""

from collections.abc import Iterator, Sequence

from rich.console import Console
from rich.table import Table
from rich.text import Text

from stillhouse.store import ChunkStore
from stillhouse.store.labels import Label, labels_of
from stillhouse.terminal import one_line, say

_MOST_RUNS = 3  # of one recipe in a list of all


def print_runs(stores: Sequence[ChunkStore], console: Console) -> None:
    """Print a line for each of the newest runs of every recipe, the newest last; nothing where none
    has a label."""
    found = {store.folder: labels_of(store, most=_MOST_RUNS) for store in stores}

    # a table of the runs
    runs = [(folder, label) for folder, labels in found.items() for label in labels.labels]
    table = Table(
        "recipe", "begun (UTC)", "teacher", "data set", "run", box=None, header_style="bold"
    )
    for column in table.columns:
        column.no_wrap = True
    for folder, label in sorted(runs, key=lambda each: each[1].created):
        names = (label.names.get(name, "") for name in ("teacher", "dataset"))
        cells = (_minute(label), *map(_last_part, names), label.run)
        table.add_row(folder, *(Text(one_line(cell)) for cell in cells))
    if runs:
        console.print()
        console.print(table)

    # what is not in it
    for folder, labels in found.items():
        for key in labels.broken:
            say(_broken(key))
        if labels.num_older:
            say(f"{labels.num_older} older runs of {folder} are listed by `stillhouse store stat`")


def lines_of_labels(store: ChunkStore) -> Iterator[tuple[str, str]]:
    """A name and a text for each label of a recipe, the newest last."""
    labels = labels_of(store)
    for label in labels.labels:
        names = ", ".join(f"{name} {value}" for name, value in label.names.items())
        yield "run", f"{label.run}, begun {label.created}: {names}"
    for key in labels.broken:
        yield "run", _broken(key)


def _broken(key: str) -> str:
    return f"{key} is no label, or cannot be read; nothing depends on it"


def _minute(label: Label) -> str:
    """When the run began, to the minute, in UTC."""
    return label.created[:16].replace("T", " ")


def _last_part(name: str) -> str:
    """A path's last part, which tells more of it in a narrow column; a hub's name is whole."""
    is_path = name.startswith(("/", "~"))
    return name.rstrip("/").rpartition("/")[2] if is_path else name
