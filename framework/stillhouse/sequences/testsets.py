"""Test sets, which samples are held against: every text in every row, whatever its column is."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from stillhouse.config import CorpusSection
from stillhouse.config.graders import TestSetSection
from stillhouse.errors import CorpusError
from stillhouse.sequences.bad_rows import BadRowError
from stillhouse.sequences.decontaminate import FEWEST_WORDS, PassageIndex, index_of
from stillhouse.sequences.tables import (
    TEXT_SUFFIXES,
    local_files,
    looks_like_path,
    table_from_hub,
    table_of_files,
)


def passages_of(section: TestSetSection, *, cache_dir: Path) -> PassageIndex:
    """The index of a test set. `cache_dir` holds copies of local tables.

    Raises CorpusError where there is no such data set, or no text in it that can be looked for.
    """
    index = index_of(_texts_of(section, cache_dir=cache_dir))
    if not index.grams:
        raise CorpusError(
            f"the test set {section.dataset} has {index.num_texts} texts, and none of "
            f"{FEWEST_WORDS} words or more, so that no passage of it can be found; name the data "
            "set with its questions, or leave it out"
        )
    return index


def _texts_of(section: TestSetSection, *, cache_dir: Path) -> Iterator[str]:
    """The texts of a test set, one after the other: a question and its answer are two, so that each
    is found alone. A row that cannot be read has none."""
    is_local = looks_like_path(section.dataset)
    files = local_files(section.dataset) if is_local else []
    if files and files[0].suffix in TEXT_SUFFIXES:
        yield from (file.read_text(encoding="utf-8", errors="replace") for file in files)
        return
    whole = CorpusSection(
        dataset=section.dataset,
        subset=section.subset,
        split="train" if is_local else section.split,  # what a local file is called
        revision=section.revision,
    )
    table = table_of_files(files, whole, cache_dir=cache_dir) if is_local else table_from_hub(whole)
    read = table.reader([*table.columns])
    for row in range(table.num_rows):
        try:
            values = read(row)
        except BadRowError:
            continue
        yield from _texts_in(dict(values))


def _texts_in(value: Any) -> Iterator[str]:
    match value:
        case str():
            yield value
        case dict():
            for each in value.values():
                yield from _texts_in(each)
        case list():
            for each in value:
                yield from _texts_in(each)
