"""Documents: every source, in one order, and errors that say what to do."""

import errno
import json
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from helpers.damage import small_disk
from stillhouse.config import CorpusSection
from stillhouse.errors import CorpusError, UserError
from stillhouse.sequences.documents import from_table, load_documents
from stillhouse.sequences.shuffle import shuffled_order
from stillhouse.sequences.tables import cure_of_hub, looks_like_path, table_of_dataset

TEXTS = [f"document number {number}" for number in range(20)]


def read_all(cache_dir: Path, dataset: str | Path, **settings: Any) -> list[Any]:
    documents = load_documents(
        CorpusSection.model_validate({"dataset": str(dataset), **settings}), cache_dir=cache_dir
    )
    return [document for _, document in documents]


def write_table(directory: Path, suffix: str) -> Path:
    file = directory / f"table{suffix}"
    if suffix == ".jsonl":
        file.write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    elif suffix == ".json":
        file.write_text(json.dumps([{"text": text} for text in TEXTS]))
    elif suffix == ".parquet":
        pq.write_table(pa.table({"text": TEXTS}), file)
    else:
        table = pa.table({"text": TEXTS})
        with pa.ipc.new_stream(str(file), table.schema) as writer:
            writer.write_table(table)
    return file


@pytest.mark.parametrize("suffix", [".json", ".jsonl", ".parquet", ".arrow"])
def test_every_kind_of_table_gives_the_same_documents_in_the_same_order(
    tmp_path: Path, suffix: str
) -> None:
    expected = [TEXTS[number] for number in shuffled_order(len(TEXTS), "corpus", seed=3)]
    assert read_all(tmp_path, write_table(tmp_path, suffix), seed=3) == expected


def test_text_files_are_one_document_each_whether_named_by_directory_or_glob(
    tmp_path: Path,
) -> None:
    (tmp_path / "deep").mkdir()
    for number, name in enumerate(["a.txt", "b.md", "c.py", "deep/d.text"]):
        (tmp_path / name).write_text(f"first line {number}\nsecond line\n")
    (tmp_path / "picture.png").write_bytes(b"\xff\xd8")
    from_directory = read_all(tmp_path / "cache", tmp_path)
    assert sorted(from_directory) == [f"first line {number}\nsecond line\n" for number in range(4)]
    assert read_all(tmp_path / "cache", tmp_path / "*.md") == ["first line 1\nsecond line\n"]
    assert read_all(tmp_path / "cache", f"{tmp_path}/**/*.text") == ["first line 3\nsecond line\n"]


def test_the_order_is_a_function_of_number_and_seed_that_never_changes() -> None:
    assert shuffled_order(8, "corpus", seed=0).tolist() == [1, 5, 6, 4, 2, 7, 3, 0]
    assert sorted(shuffled_order(1000, "sequence", seed=1).tolist()) == list(range(1000))
    assert (
        shuffled_order(1000, "sequence", seed=1).tolist()
        != shuffled_order(1000, "sequence", seed=2).tolist()
    )


def test_max_documents_is_taken_after_the_shuffle(tmp_path: Path) -> None:
    file = write_table(tmp_path, ".jsonl")
    assert read_all(tmp_path, file, seed=5, max_documents=4) == read_all(tmp_path, file, seed=5)[:4]


def test_the_standard_library_is_source_files_without_their_tests(tmp_path: Path) -> None:
    documents = read_all(tmp_path, "stdlib")
    assert len(documents) > 300
    assert any("class JSONDecoder" in str(document) for document in documents)
    assert not any(
        "class TestJson" in str(document) or "import pytest" in str(document)
        for document in documents
    )


def test_the_identity_follows_contents_and_not_the_seed_alone(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("one")
    section = CorpusSection(dataset=str(tmp_path))
    before = load_documents(section, cache_dir=tmp_path).identity
    assert load_documents(section, cache_dir=tmp_path).identity == before
    (tmp_path / "a.txt").write_text("other")
    assert load_documents(section, cache_dir=tmp_path).identity != before


def test_a_missing_column_is_answered_with_the_columns_that_there_are(tmp_path: Path) -> None:
    with pytest.raises(CorpusError, match=r"no column 'body'.*has text.*corpus\.column"):
        read_all(tmp_path, write_table(tmp_path, ".jsonl"), column="body")


def test_a_data_set_without_conversations_is_answered_with_its_columns(tmp_path: Path) -> None:
    with pytest.raises(CorpusError, match=r"no column 'messages'.*has text.*corpus\.column"):
        read_all(tmp_path, write_table(tmp_path, ".jsonl"), format="chat")


def test_streamed_and_empty_data_sets_are_refused() -> None:
    section = CorpusSection(dataset="somewhere")
    rows = datasets.Dataset.from_dict({"text": ["a"]})
    with pytest.raises(CorpusError, match=r"IterableDataset.*without streaming"):
        table_of_dataset(rows.to_iterable_dataset(), section)
    with pytest.raises(CorpusError, match="somewhere is empty"):
        from_table(table_of_dataset(rows.select([]), section), section)


def test_a_path_is_told_from_a_hub_name() -> None:
    assert all(
        looks_like_path(name)
        for name in ["/data", "./data", "~/data", "data/*.bin", "corpus.jsonl", "tests"]
    )
    assert not any(looks_like_path(name) for name in ["wikitext", "owner/name", "owner/name-v1.5"])


@pytest.mark.parametrize(
    ("make", "settings", "message"),
    [
        ("nothing", {"dataset": "absent/*.txt"}, "does not exist"),
        ("nothing", {"dataset": "./absent"}, "does not exist.*hub name"),
        ("nothing", {"dataset": "."}, "no file that can be read"),
        ("mixed", {"dataset": "."}, "several kinds.*glob"),
        ("zip", {"dataset": "./a.zip"}, "'.zip', which is not read"),
        ("latin", {"dataset": "a.txt"}, "not UTF-8.*byte 3"),
        ("text", {"dataset": "a.txt", "format": "chat"}, "no conversations"),
        ("text", {"dataset": "a.txt", "split": "test"}, "no split 'test'"),
        ("text", {"dataset": "a.txt", "column": "body"}, "one column is 'text'"),
        ("text", {"dataset": "a.txt", "subset": "en"}, r"corpus\.subset mean nothing"),
        ("nothing", {"dataset": "stdlib", "revision": "main"}, r"corpus\.revision mean nothing"),
        (
            "broken",
            {"dataset": "a.jsonl"},
            r"a\.jsonl, line 2: not JSON.*one JSON object on each line\. Mend or remove the line",
        ),
        ("table", {"dataset": "a.jsonl", "split": "test"}, "cannot be loaded.*test"),
        ("nothing", {"dataset": "owner/absent"}, "owner/absent cannot be loaded.*hf auth login"),
    ],
)
def test_a_source_that_cannot_be_read_says_why(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    make: str,
    settings: dict[str, object],
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    contents: dict[str, dict[str, bytes]] = {
        "nothing": {},
        "mixed": {"a.txt": b"text", "b.jsonl": b"{}"},
        "zip": {"a.zip": b"PK"},
        "latin": {"a.txt": b"caf\xe9"},
        "text": {"a.txt": b"text"},
        "broken": {"a.jsonl": b'{"text": "a"}\n{bad'},
        "table": {"a.jsonl": b'{"text": "a"}\n'},
    }
    for name, data in contents[make].items():
        Path(name).write_bytes(data)
    with pytest.raises(CorpusError, match=f"(?s){message}"):
        list(load_documents(CorpusSection.model_validate(settings), cache_dir=tmp_path / "cache"))


ROW = b'{"text": "a", "other": 1}\n'


@pytest.mark.parametrize(
    ("name", "contents", "message"),
    [
        (
            "a.jsonl",
            ROW * 5 + b'{"text": "caf\xe9"}\n' + ROW,
            "line 6: not UTF-8 text .*convert the file to UTF-8",
        ),
        (
            "a.jsonl",
            ROW + b"\n" + b'{"text": "a\n' + ROW,
            "line 3: not JSON .*column 12.*Mend or remove the line",
        ),
        ("a.jsonl", ROW * 3 + b"[1, 2]\n", "line 4: a list; wanted: one JSON object on each line"),
        (
            "a.json",
            b'[{"text": "a"},\n{"text": bad}]',
            "line 2: not JSON .*wanted: a list of objects",
        ),
        ("a.json", b'[{"text": "a"},\n\n{"text": "caf\xe9"}]', "line 3: not UTF-8 text"),
    ],
)
def test_a_line_of_json_that_cannot_be_read_is_named_with_its_file_and_number(
    tmp_path: Path, name: str, contents: bytes, message: str
) -> None:
    sound, broken = tmp_path / f"0-{name}", tmp_path / name
    sound.write_bytes(b"[" + ROW.strip() + b"]" if name.endswith(".json") else ROW * 9)
    broken.write_bytes(contents)
    with pytest.raises(CorpusError, match=f"(?s)cannot be (read|loaded): {broken}, {message}"):
        read_all(tmp_path / "cache", tmp_path)


def test_an_object_over_many_lines_is_one_row_and_no_broken_line(tmp_path: Path) -> None:
    row = {"text": "a text\nof lines", "more": TEXTS}
    (tmp_path / "a.json").write_text(json.dumps(row, indent=1))
    assert read_all(tmp_path / "cache", tmp_path / "a.json") == [row["text"]]
    (tmp_path / "b.jsonl").write_text('{"text": "a"}\n{bad\n')
    with pytest.raises(CorpusError, match=r"b\.jsonl, line 2: not JSON"):
        read_all(tmp_path / "cache", tmp_path)


def test_text_in_a_table_that_is_not_utf8_is_named_by_its_row(tmp_path: Path) -> None:
    texts = pa.array([b"a", b"caf\xe9"]).view(pa.string())
    pq.write_table(pa.table({"text": texts}), tmp_path / "a.parquet")
    with pytest.raises(
        CorpusError, match=r"row 1 of .*a\.parquet: not UTF-8 text .*convert or remove it"
    ):
        read_all(tmp_path / "cache", tmp_path / "a.parquet")


def test_commands_that_copy_a_table_at_the_same_time_all_find_it(tmp_path: Path) -> None:
    table = write_table(tmp_path, ".jsonl")
    wanted = read_all(tmp_path / "first", table)
    for number in range(10):
        cache = tmp_path / f"cache-{number}"
        with ThreadPoolExecutor(8) as commands:
            found = commands.map(partial(read_all, cache), [table] * 8)
            assert list(found) == [wanted] * 8


def test_a_cache_that_cannot_be_written_is_named_with_the_way_to_another(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(
        UserError,
        match=rf"the cache {tmp_path}/file/cache.* cannot be written: Not a directory.*set "
        r"XDG_CACHE_HOME",
    ):
        read_all(tmp_path / "file" / "cache", write_table(tmp_path, ".jsonl"))


@pytest.mark.parametrize(
    "reason",
    [OSError(errno.ENOSPC, "No space left"), OSError("Not enough disk space. Needed: 1 GiB")],
)
def test_a_full_disk_is_no_reason_to_check_the_name_of_a_data_set_of_the_hub(
    reason: OSError,
) -> None:
    failed = datasets.exceptions.DatasetGenerationError(
        "An error occurred while generating the dataset"
    )
    failed.__cause__ = reason
    assert "HF_HOME" in cure_of_hub(failed)
    assert "check name" in cure_of_hub(FileNotFoundError(errno.ENOENT, "no such data set"))


def test_a_full_disk_of_the_cache_is_told_from_bad_tables(tmp_path: Path) -> None:
    with small_disk(tmp_path / "disk", num_bytes=4096) as disk:
        message = (
            rf"the cache {disk}/cache.* cannot be written: No space left.*make room on that "
            r"disk, or set XDG_CACHE_HOME"
        )
        with pytest.raises(UserError, match=message):
            read_all(disk / "cache", write_table(tmp_path, ".jsonl"))
