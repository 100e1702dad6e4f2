"""Rows of tables as people have them: CSV, compressed files, rows that are tokenised already, and
bad rows, which are skipped and told up to a share."""

import gzip
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from transformers import PreTrainedTokenizerFast

from helpers.models import CHAT_TEMPLATE, make_tokenizer
from stillhouse.config import CorpusSection
from stillhouse.errors import CorpusError
from stillhouse.sequences.bad_rows import BadRow
from stillhouse.sequences.documents import load_documents
from stillhouse.sequences.packing import Split, prepare_corpus

ROWS: list[dict[str, Any]] = [{"text": f"text, {n}\n“of” it", "n": str(n)} for n in range(300)]
WHOLE_JSON = "".join(json.dumps(row) + "\n" for row in ROWS).encode()
WHOLE_CSV = ("text,n\n" + "".join(f'"{r["text"]}",{r["n"]}\n' for r in ROWS)).encode()


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> PreTrainedTokenizerFast:
    return make_tokenizer(tmp_path_factory.mktemp("tokenizer"))


def section(file: Path, **settings: Any) -> CorpusSection:
    return CorpusSection.model_validate(
        {"dataset": str(file), "sequence_length": 8, "heldout_sequences": 1, **settings}
    )


def texts(file: Path, **settings: Any) -> list[Any]:
    found = load_documents(section(file, **settings), cache_dir=file.parent / "cache")
    return [document for _, document in found]


def prepare(file: Path, tokenizer: Any, **settings: Any) -> Split:
    return prepare_corpus(
        section(file, **settings), tokenizer, tokenizer_digest="d", cache_dir=file.parent / "cache"
    )


def written(file: Path, rows: Sequence[Any]) -> Path:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def packed(data: bytes, suffix: str) -> bytes:
    if suffix.endswith(".gz"):
        return gzip.compress(data)
    if suffix.endswith(".zst"):
        sink = pa.BufferOutputStream()
        with pa.CompressedOutputStream(sink, "zstd") as stream:
            stream.write(data)
        return bytes(sink.getvalue())
    return data


# ---- kinds of files


@pytest.mark.parametrize("suffix", [".csv", ".csv.gz", ".csv.zst", ".jsonl.gz", ".jsonl.zst"])
def test_csv_and_compressed_files_have_the_rows_of_plain_json(tmp_path: Path, suffix: str) -> None:
    (tmp_path / "plain").mkdir()
    file, plain = tmp_path / f"a{suffix}", tmp_path / "plain" / "a.jsonl"
    file.write_bytes(packed(WHOLE_CSV if "csv" in suffix else WHOLE_JSON, suffix))
    plain.write_bytes(WHOLE_JSON)
    assert texts(file) == texts(plain)
    assert texts(file, column="n") == texts(plain, column="n")
    assert texts(file, split="train[:10]") == texts(plain, split="train[:10]")
    assert len(texts(file, split="train[:10]+train[20:25]")) == 15


def test_a_field_of_csv_is_text_whatever_it_looks_like(tmp_path: Path) -> None:
    file = tmp_path / "a.csv"
    file.write_bytes(
        b"\xef\xbb\xbftext,n\n007,1\nNA,2\n\n2020-01-01,3\n,4\n" + b"long " * 40000 + b",5"
    )
    found = texts(file)
    assert sorted(found) == ["", "007", "2020-01-01", "NA", "long " * 40000]


@pytest.mark.parametrize(
    ("name", "whole", "message"),
    [
        ("a.jsonl.gz", packed(WHOLE_JSON, ".gz"), r"a\.jsonl\.gz is damaged or cut short"),
        ("a.csv.zst", packed(WHOLE_CSV, ".zst"), r"a\.csv\.zst is damaged or cut short"),
        ("a.csv", WHOLE_CSV, r"a\.csv, line \d+: not CSV .*the file may be cut short"),
        ("a.jsonl", WHOLE_JSON, r"a\.jsonl, line 300: not JSON .*Mend or remove the line"),
        ("a.parquet", None, r"a\.parquet is damaged or cut short .*write or fetch the file again"),
    ],
)
def test_a_file_that_is_cut_short_is_named(
    tmp_path: Path, name: str, whole: bytes | None, message: str
) -> None:
    file = tmp_path / name
    if whole is None:
        pq.write_table(pa.Table.from_pylist(ROWS), file)
        whole = file.read_bytes()
    (tmp_path / f"0{name}").write_bytes(whole)
    file.write_bytes(whole[:-12])
    with pytest.raises(CorpusError, match=f"(?s){message}"):
        texts(tmp_path)


def test_copies_of_files_are_found_again_until_a_file_changes(tmp_path: Path) -> None:
    file = written(tmp_path / "a.jsonl", ROWS)
    before, copies = texts(file), tmp_path / "cache"
    made = sorted(path.name for path in copies.iterdir())
    (lines,) = copies.glob("*/lines")
    lines.write_bytes(lines.read_bytes()[:-5])  # a copy that was cut short is made again
    assert texts(file) == before
    assert sorted(path.name for path in copies.iterdir()) == made
    written(file, ROWS[:-1])
    assert len(texts(file)) == len(before) - 1


# ---- rows that are tokenised already


@pytest.mark.parametrize(
    ("masks", "settings"),
    [
        ({"loss_mask": [0, 0, 1, 1, 0, 1]}, {}),
        ({"labels": [-100, -100, 7, 8, -100, 10]}, {}),
        ({"own": [0, 0, 1, 1, 0, 1], "labels": [-100] * 6}, {"mask_column": "own"}),
    ],
)
@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
def test_ids_and_their_mask_are_taken_as_they_are(
    tmp_path: Path, masks: dict[str, Any], settings: dict[str, Any], suffix: str
) -> None:
    rows = [{"input_ids": [5, 6, 7, 8, 9, 10], **masks}] * 4
    file = written(tmp_path / "a.jsonl", rows)
    if suffix == ".parquet":
        file.unlink()
        file = tmp_path / "a.parquet"
        pq.write_table(pa.Table.from_pylist(rows), file)
    tokenizer = make_tokenizer(tmp_path / "tokenizer")
    found = prepare(file, tokenizer, format="tokens", packing=False, **settings).train.rows(0, 3)
    assert found.token_ids_SL[:, :6].tolist() == [[5, 6, 7, 8, 9, 10]] * 3
    assert found.loss_mask_SL.tolist() == [[0, 1, 1, 0, 1, 0, 0, 0]] * 3


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"input_ids": [1, 320]}, r"row 8 of .*has id 320, but the tokenizer's ids are 0 to 319"),
        ({"input_ids": [1, -1]}, "has id -1"),
        ({"input_ids": [1, "2"]}, "not a list of integers"),
        ({"input_ids": None}, "not a list of integers; found None"),
        ({"input_ids": [1, 2], "loss_mask": [1]}, "2 ids .* and 1 values in column 'loss_mask'"),
        ({"input_ids": [1, 2], "loss_mask": [1, 2]}, "has 2 in column 'loss_mask'; wanted: 0 or 1"),
        ({"input_ids": [1, 2], "labels": [-100, 3]}, "has 3 in column 'labels'; wanted: -100 or"),
        ({"input_ids": [1, 2], "loss_mask": [0, 0]}, "nothing in the corpus .* is learnt"),
        ({"ids": [1]}, "no column 'input_ids'; it has ids"),
    ],
)
def test_ids_that_cannot_be_learnt_from_say_why(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast, row: dict[str, Any], message: str
) -> None:
    with pytest.raises(CorpusError, match=message):
        prepare(written(tmp_path / "a.jsonl", [row] * 9), tokenizer, format="tokens")


# ---- bad rows


def test_bad_rows_are_skipped_and_told_and_the_others_are_as_without_them(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    """A column of mixed types, and a line that is no JSON, in the second of two files."""
    good = [{"text": f"document {number} of them"} for number in range(60)]
    (tmp_path / "rows").mkdir()
    written(tmp_path / "rows" / "a.jsonl", good[:30])
    second = written(tmp_path / "rows" / "b.jsonl", [*good[30:], {"text": 7}, {"text": ["a"]}])
    second.write_bytes(b"{bad\n" + second.read_bytes())
    made, again = (prepare(tmp_path / "rows", tokenizer, max_bad_rows=0.05) for _ in range(2))
    assert made == again
    told = sorted(made.account.bad_rows, key=lambda bad: bad.row)
    assert [(bad.file, bad.row) for bad in told] == [(str(second), row) for row in (0, 31, 32)]
    assert told[1] == BadRow(
        str(second),
        31,
        "it has int in column 'text'; wanted: text. Convert such rows, or remove them",
    )
    assert "line 1: not JSON" in told[0].reason
    assert made.account.num_documents == 60
    assert made.account.form == "texts of column 'text'"


@pytest.mark.parametrize("chat", [False, True])
def test_half_a_surrogate_pair_is_no_text(tmp_path: Path, chat: bool) -> None:
    half = "\ud83d"
    row = {"prompt": "Hi", "completion": half} if chat else {"text": half}
    tokenizer = make_tokenizer(tmp_path / "tokenizer", chat_template=CHAT_TEMPLATE)
    with pytest.raises(CorpusError, match=r"row 0 of .*not UTF-8 text .*surrogates not allowed"):
        prepare(written(tmp_path / "a.jsonl", [row]), tokenizer, format="chat" if chat else "text")


def test_more_bad_rows_than_are_allowed_stop_the_run_with_the_first_three(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    rows: list[dict[str, Any]] = [{"text": "a good one"}] * 20 + [{"text": None}] * 9
    file = written(tmp_path / "a.jsonl", rows)
    with pytest.raises(CorpusError) as refusal:
        prepare(file, tokenizer, max_bad_rows=0.25)
    message = str(refusal.value)
    assert message.startswith("8 rows are bad; the first of them:\n  row ")
    assert message.count("it has NoneType in column 'text'") == 3
    assert "corpus.max_bad_rows = 0.25 allows 7 of 29 rows" in message
    with pytest.raises(CorpusError, match=r"^row \d+ of .*it has NoneType .*allows 0 of 29 rows"):
        prepare(file, tokenizer, max_bad_rows=0)
