"""Packing: ids, positions and masks against a plain account of every token, and a cache that is
found again."""

import dataclasses
import json
import pickle
import re
import sys
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Barrier
from typing import Any

import numpy as np
import pytest
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

from helpers.damage import small_disk
from helpers.models import CHAT_TEMPLATE, EOS, MIN_VOCAB_SIZE, make_tokenizer
from stillhouse.config import CorpusSection
from stillhouse.errors import CorpusError, UserError
from stillhouse.sequences.corpus import Corpus
from stillhouse.sequences.packing import Split, prepare_corpus

QUESTION = {"role": "user", "content": "Which tree is it?"}
ANSWER = {"role": "assistant", "content": "An old oak."}
FORGETFUL_TEMPLATE = (  # like templates that drop the reasoning of earlier turns
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{% if loop.last or message['role'] == 'user' %}{{ message['content'] }}{% else %}...{% endif "
    "%}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
DECEITFUL_TEMPLATE = CHAT_TEMPLATE.replace("<|im_start|>assistant", "<|im_start|>somebody")


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> PreTrainedTokenizerFast:
    return make_tokenizer(
        tmp_path_factory.mktemp("tokenizer"), vocab_size=400, chat_template=CHAT_TEMPLATE
    )


def make_texts(count: int) -> list[str]:
    """Texts of 0 to 40 words that say which document they are in every word."""
    random = np.random.default_rng(0)
    return [" ".join([f"doc{number:04d}"] * int(random.integers(0, 40))) for number in range(count)]


def prepare(
    tmp_path: Path, rows: Sequence[Any], tokenizer: Any, *, digest: str = "digest", **settings: Any
) -> Split:
    is_chat = settings.get("format") == "chat"
    file = tmp_path / "corpus.jsonl"
    lines = "".join(json.dumps({"messages" if is_chat else "text": row}) + "\n" for row in rows)
    if not file.exists():  # writing it again would make other documents of it
        file.write_text(lines)
    section = CorpusSection.model_validate(
        {"dataset": str(file), "sequence_length": 16, "heldout_sequences": 2, **settings}
    )
    return prepare_corpus(section, tokenizer, tokenizer_digest=digest, cache_dir=tmp_path / "cache")


def columns(corpus: Corpus) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    rows = corpus.rows(0, corpus.num_sequences)
    return rows.token_ids_SL, rows.positions_SL, rows.loss_mask_SL


def as_packed(corpus: Corpus) -> Corpus:
    """The same sequences in the order of their packing."""
    return dataclasses.replace(corpus, order_path=None)


def documents_in(corpus: Corpus, tokenizer: PreTrainedTokenizerFast) -> list[str]:
    return [
        name
        for ids in columns(corpus)[0]
        for name in re.findall(r"doc\d{4}", text_of(tokenizer, ids))
    ]


# ---- text


def test_packed_text_is_documents_end_to_end_with_positions_and_labels_of_their_own(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    split = prepare(tmp_path, make_texts(200), tokenizer)
    for corpus in (split.heldout, as_packed(split.train)):
        assert corpus.num_targets == int(columns(corpus)[2].sum())
        for ids, positions, mask in zip(*columns(corpus), strict=True):
            position = 0
            for t in range(16):
                assert positions[t] == position
                ends = ids[t] == tokenizer.eos_token_id
                # the token before EOS has EOS as its label; EOS itself has none
                assert mask[t] == (t < 15 and not ends)
                position = 0 if ends else position + 1


def test_every_token_is_used_once_in_the_order_of_the_shuffle(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    texts = make_texts(60)
    split = prepare(tmp_path, texts, tokenizer, heldout_sequences=1)
    whole = text_of(tokenizer, columns(as_packed(split.train))[0].ravel())
    documents = whole.split(EOS)
    # training starts with a whole document: the held-out one's rest is not used
    assert documents[0] in texts
    assert set(documents[:-1]) <= set(texts)
    found = [
        name for document in documents for name in dict.fromkeys(re.findall(r"doc\d{4}", document))
    ]
    assert len(found) == len(set(found)) >= 50
    assert found != sorted(found)


def test_the_sequences_to_train_on_are_shuffled_by_the_seed(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    """A stretch of them is a sample of all documents, though the parts of one were packed side by
    side."""
    texts = [f"doc{number:04d} " * 200 for number in range(40)]
    corpora = [prepare(tmp_path, texts, tokenizer, seed=seed).train for seed in (0, 1)]
    for corpus in corpora:
        lying = [tuple(ids) for ids in columns(as_packed(corpus))[0].tolist()]
        shuffled = [tuple(ids) for ids in columns(corpus)[0].tolist()]
        assert sorted(lying) == sorted(shuffled)
        stretch = dataclasses.replace(corpus, num_sequences=corpus.num_sequences // 5)
        assert len(set(documents_in(as_packed(stretch), tokenizer))) <= 10
        assert len(set(documents_in(stretch, tokenizer))) >= 35
    orders = [np.load(str(corpus.order_path)).tolist() for corpus in corpora]
    assert orders[0][:100] != orders[1][:100]
    assert prepare(tmp_path, texts, tokenizer, seed=0).train == corpora[0]


def test_heldout_documents_are_never_trained_on(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    split = prepare(tmp_path, make_texts(100), tokenizer, heldout_sequences=5)
    assert split.heldout.num_sequences == 5
    heldout = set(documents_in(split.heldout, tokenizer))
    assert heldout
    assert heldout.isdisjoint(documents_in(split.train, tokenizer))


def test_a_tokenizer_that_begins_texts_with_a_token_keeps_it_and_it_is_never_a_label(
    tmp_path: Path,
) -> None:
    beginning = make_tokenizer(tmp_path / "tokenizer", vocab_size=400)
    begin = beginning.convert_tokens_to_ids("<|im_start|>")
    beginning.backend_tokenizer.post_processor = TemplateProcessing(
        single="<|im_start|> $A", special_tokens=[("<|im_start|>", begin)]
    )
    ids_SL, positions_SL, mask_SL = columns(prepare(tmp_path, make_texts(60), beginning).train)
    assert (ids_SL[positions_SL == 0] == begin).any()
    assert not mask_SL[:, :-1][ids_SL[:, 1:] == begin].any()
    assert mask_SL[:, :-1][ids_SL[:, :-1] == begin].any()


def test_a_text_that_spells_the_end_token_ends_once(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    split = prepare(tmp_path, ["a" + EOS] * 40, tokenizer)
    text = text_of(tokenizer, columns(as_packed(split.train))[0].ravel())
    assert EOS + EOS not in text


# ---- chat


def text_of(tokenizer: PreTrainedTokenizerFast, ids: Iterable[int]) -> str:
    text = tokenizer.decode([*ids])
    assert isinstance(text, str)
    return text


def labels_of(corpus: Corpus, tokenizer: PreTrainedTokenizerFast, row: int) -> str:
    ids_SL, _, mask_SL = columns(corpus)
    return text_of(tokenizer, ids_SL[row, 1:][mask_SL[row, :-1] == 1])


def test_only_what_an_assistant_says_and_its_end_token_is_learnt(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    system = {"role": "system", "content": "Be brief."}
    conversation = [
        system,
        QUESTION,
        ANSWER,
        QUESTION,
        {"role": "assistant", "content": " Ash\n, maybe… 木"},
    ]
    split = prepare(
        tmp_path, [conversation] * 6, tokenizer, format="chat", packing=False, sequence_length=256
    )
    assert split.train.num_sequences == 4
    assert (
        labels_of(split.train, tokenizer, 0) == "An old oak.<|im_end|> Ash\n, maybe… 木<|im_end|>"
    )


def test_padded_conversations_have_a_sequence_each_and_padding_comes_last_unlearnt(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    lengths = [1, 5, 30]
    conversations = [
        [QUESTION, {"role": "assistant", "content": "word " * lengths[number % 3]}]
        for number in range(12)
    ]
    split = prepare(
        tmp_path, conversations, tokenizer, format="chat", packing=False, sequence_length=64
    )
    ids_SL, positions_SL, mask_SL = columns(split.train)
    assert len(ids_SL) == 10
    assert (positions_SL == np.arange(64)).all()
    whole = [str(tokenizer.apply_chat_template(row, tokenize=False)) for row in conversations]
    for ids, mask in zip(ids_SL, mask_SL, strict=True):
        last_label = int(np.flatnonzero(mask)[-1]) + 1
        rest = text_of(tokenizer, ids[last_label + 1 :])
        assert rest == "" or re.fullmatch(rf"\n({re.escape(EOS)})*", rest)
        assert any(text.startswith(text_of(tokenizer, ids).split(EOS)[0]) for text in whole)


def test_packed_conversations_run_on_and_a_long_one_is_cut_with_positions_from_zero(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    long = [QUESTION, {"role": "assistant", "content": "word " * 60}]
    ids_SL, positions_SL, mask_SL = columns(
        prepare(tmp_path, [long] * 6, tokenizer, format="chat", sequence_length=32).train
    )
    assert (positions_SL[:, 0] == 0).all()
    assert (mask_SL[:, -1] == 0).all()
    starts = np.flatnonzero(positions_SL.ravel() == 0)
    turn = tokenizer.convert_tokens_to_ids("<|im_start|>")
    assert all(start % 32 == 0 or ids_SL.ravel()[start] == turn for start in starts)
    assert any(start % 32 for start in starts)


def test_sequences_without_a_target_are_left_out(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    talkative = [{"role": "user", "content": "word " * 100}, ANSWER]
    for packing in (True, False):
        split = prepare(
            tmp_path,
            [talkative, [QUESTION, ANSWER]] * 10,
            tokenizer,
            format="chat",
            sequence_length=48,
            packing=packing,
        )
        assert columns(split.train)[2].any(axis=1).all()
        assert columns(split.heldout)[2].any(axis=1).all()


@pytest.mark.parametrize(
    ("rows", "template", "message"),
    [
        ([[QUESTION, ANSWER], [QUESTION]], CHAT_TEMPLATE, r"row 1 of .*no assistant's turn"),
        ([[QUESTION, ANSWER]], DECEITFUL_TEMPLATE, r"row 0 of .*not a prefix of the whole"),
        (
            [[{"role": "user", "value": "no content"}]],
            CHAT_TEMPLATE,
            r"row 0 of .*'messages' is not a list of messages.*value",
        ),
        (["plain text"], CHAT_TEMPLATE, r"row 0 of .*not a list of messages.*plain text"),
        (
            [[QUESTION, ANSWER]],
            "{{ raise_exception('no such role') }}",
            r"row 0 of .*template of .* refuses.*no such role",
        ),
        ([[QUESTION, ANSWER]], None, r"no chat template.*instruction-tuned"),
    ],
)
def test_conversations_that_cannot_be_told_apart_are_refused(
    tmp_path: Path, rows: Any, template: str | None, message: str
) -> None:
    tokenizer = make_tokenizer(tmp_path / "tokenizer", chat_template=template)
    with pytest.raises(CorpusError, match=f"(?s){message}"):
        prepare(tmp_path, rows, tokenizer, format="chat")


def test_a_single_turn_is_learnt_under_a_template_that_rewrites_earlier_ones(
    tmp_path: Path,
) -> None:
    tokenizer = make_tokenizer(tmp_path / "tokenizer", chat_template=FORGETFUL_TEMPLATE)
    split = prepare(
        tmp_path,
        [[QUESTION, ANSWER]] * 5,
        tokenizer,
        format="chat",
        packing=False,
        sequence_length=64,
    )
    assert labels_of(split.train, tokenizer, 0) == "An old oak.<|im_end|>"


# ---- refusals


def test_masks_that_are_empty_everywhere_stop_the_preparation(tmp_path: Path) -> None:
    silent = CHAT_TEMPLATE + "{% if false %}{% generation %}{% endgeneration %}{% endif %}"
    tokenizer = make_tokenizer(tmp_path / "tokenizer", chat_template=silent)
    with pytest.raises(
        CorpusError, match=r"nothing in the corpus .* is learnt: of the \d+ tokens of its 9 doc"
    ):
        prepare(tmp_path, [[QUESTION, ANSWER]] * 9, tokenizer, format="chat")


def test_how_conversations_were_told_is_kept_with_the_corpus(tmp_path: Path) -> None:
    tokenizer = make_tokenizer(tmp_path / "tokenizer", chat_template=FORGETFUL_TEMPLATE)
    rows = [[QUESTION, ANSWER]] * 20 + [[QUESTION, ANSWER] * 2] * 10
    made, found = (prepare(tmp_path, rows, tokenizer, format="chat") for _ in range(2))
    assert made == found
    assert made.account.ways == {"prefixes": 20, "last": 10}
    assert made.account.num_documents == 30


def test_too_small_a_corpus_says_how_many_tokens_it_has(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    with pytest.raises(
        CorpusError,
        match=r"its 3 documents hold 6 tokens, which make 0 sequences of 16.*wanted: 2 held-out",
    ):
        prepare(tmp_path, ["a", "b", "c"], tokenizer)


def test_a_corpus_without_a_single_target_is_refused(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    late = [{"role": "user", "content": "word " * 100}, ANSWER]
    with pytest.raises(CorpusError, match="0 sequences of 16 with a target"):
        prepare(tmp_path, [late] * 10, tokenizer, format="chat", packing=False)


def test_a_tokenizer_without_an_end_token_is_refused(tmp_path: Path) -> None:
    endless = make_tokenizer(tmp_path / "tokenizer")
    endless.eos_token = None
    with pytest.raises(CorpusError, match="no end-of-sequence token"):
        prepare(tmp_path, ["a"], endless)


def test_a_row_that_is_not_text_is_named(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    with pytest.raises(CorpusError, match=r"row 1 of .* has NoneType in column 'text'"):
        prepare(tmp_path, ["a", None], tokenizer)


# ---- identity and cache


def test_the_digest_is_of_the_sequences_and_of_nothing_else(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    def digest(name: str, texts: list[str], **settings: Any) -> str:
        (tmp_path / name).mkdir()
        return prepare(tmp_path / name, texts, tokenizer, **settings).train.digest

    texts = make_texts(80)
    first = digest("first", texts)
    assert digest("again", texts) == first
    assert digest("seed", texts, seed=1) != first
    assert digest("length", texts, sequence_length=8) != first
    assert digest("text", [*texts[:-1], "another"]) != first
    assert digest("heldout", texts, heldout_sequences=60) != first


def test_a_corpus_is_prepared_once_and_then_found_without_its_tokenizer(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    texts = make_texts(80)
    split = prepare(tmp_path, texts, tokenizer)
    assert prepare(tmp_path, texts, None, digest="digest") == split
    assert len(list((tmp_path / "cache" / "corpus").iterdir())) == 1
    prepare(tmp_path, texts, tokenizer, digest="another")
    assert len(list((tmp_path / "cache" / "corpus").iterdir())) == 2


def test_commands_that_prepare_a_corpus_at_the_same_time_all_find_it(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    """Over a damaged copy, which each of them finds and removes."""
    texts, num_commands = make_texts(40), 6
    wanted = prepare(tmp_path, texts, tokenizer).train
    section = CorpusSection.model_validate(
        {"dataset": str(tmp_path / "corpus.jsonl"), "sequence_length": 16, "heldout_sequences": 2}
    )

    def prepared(together: Barrier) -> str:
        def on_progress(num_documents: int, _num_tokens: int) -> None:
            if num_documents == len(texts):
                together.wait(timeout=60)  # all have as much left to do

        return prepare_corpus(
            section,
            tokenizer,
            tokenizer_digest="digest",
            cache_dir=tmp_path / "cache",
            on_progress=on_progress,
        ).train.digest

    for _ in range(20):
        Path(wanted.path).write_bytes(b"")
        together = Barrier(num_commands)
        with ThreadPoolExecutor(num_commands) as commands:
            found = commands.map(prepared, [together] * num_commands)
            assert list(found) == [wanted.digest] * num_commands
        assert len(list((tmp_path / "cache" / "corpus").iterdir())) == 1


def test_a_cache_that_was_cut_short_is_made_again(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    texts = make_texts(80)
    split = prepare(tmp_path, texts, tokenizer)
    for file in map(Path, (split.train.path, str(split.train.order_path))):
        whole = file.read_bytes()
        file.write_bytes(whole[:-100])
        assert prepare(tmp_path, texts, tokenizer) == split
        assert file.read_bytes() == whole


def test_a_full_disk_of_the_cache_is_named_with_the_way_to_another(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    (tmp_path / "documents").mkdir()
    for number in range(40):
        (tmp_path / "documents" / f"{number}.txt").write_text(f"doc{number:04d} " * 400)
    section = CorpusSection(
        dataset=str(tmp_path / "documents"), sequence_length=16, heldout_sequences=2
    )
    with small_disk(tmp_path / "disk", num_bytes=256 << 10) as disk:
        message = (
            rf"the cache {disk}/cache cannot be written: .*No space left.*make room on that "
            r"disk, or set XDG_CACHE_HOME"
        )
        with pytest.raises(UserError, match=message):
            prepare_corpus(section, tokenizer, tokenizer_digest="digest", cache_dir=disk / "cache")
        assert list((disk / "cache" / "corpus").iterdir()) == []


def test_a_cache_that_cannot_be_written_is_refused(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    (tmp_path / "a.txt").write_text("word " * 400)
    (tmp_path / "file").write_text("")
    section = CorpusSection(
        dataset=str(tmp_path / "a.txt"), sequence_length=16, heldout_sequences=2
    )
    with pytest.raises(
        UserError,
        match=rf"the cache {tmp_path}/file/cache cannot be written: Not a directory.*set "
        r"XDG_CACHE_HOME",
    ):
        prepare_corpus(
            section, tokenizer, tokenizer_digest="digest", cache_dir=tmp_path / "file" / "cache"
        )


@pytest.mark.parametrize(
    ("settings", "digests"),
    [
        ({"format": "text"}, ("8aaa24a95b93f0bf", "363fb5d7d561a141")),
        ({"format": "chat"}, ("82509810a77744ee", "0763f14f9b7dd25a")),
        ({"format": "chat", "packing": False}, ("236140d3d4eecccf", "6196f282d072e112")),
    ],
)
def test_the_same_documents_have_the_same_digest_in_every_year(
    tmp_path: Path, settings: dict[str, Any], digests: tuple[str, str]
) -> None:
    """Stores go by it. The tokenizer knows single bytes alone, so nothing else is in it than what
    this test says."""
    bytewise = make_tokenizer(
        tmp_path / "tokenizer", vocab_size=MIN_VOCAB_SIZE, chat_template=CHAT_TEMPLATE
    )
    texts = [f"{'' if n % 7 == 3 else f'word {n} — 木 '}" * (n * n % 97) for n in range(300)]
    texts[5] = "long " * 9000
    is_chat = settings["format"] == "chat"
    rows = (
        [
            [{"role": "user", "content": text}, {"role": "assistant", "content": text[:50] + "."}]
            for text in texts
        ]
        if is_chat
        else texts
    )
    split = prepare(tmp_path, rows, bytewise, sequence_length=64, heldout_sequences=8, **settings)
    assert (split.train.digest[:16], split.heldout.digest[:16]) == digests


def test_a_failed_preparation_leaves_nothing_behind(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    with pytest.raises(CorpusError):
        prepare(tmp_path, ["a", None], tokenizer)
    assert list((tmp_path / "cache" / "corpus").iterdir()) == []


def test_a_corpus_is_a_value_that_travels(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    corpus = prepare(tmp_path, make_texts(80), tokenizer).train
    twin = pickle.loads(pickle.dumps(corpus))
    assert twin == corpus
    assert Path(str(corpus.order_path)).is_absolute()
    assert (twin.rows(1, 3).token_ids_SL == columns(corpus)[0][1:3]).all()
    assert Path(corpus.path).is_absolute()


def test_rows_are_views_of_the_map_and_any_range_reads_the_same(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    letters = text_of(tokenizer, range(100, 300)) * 15
    split = prepare(
        tmp_path, [letters[number:] for number in range(140)], tokenizer, sequence_length=512
    )
    corpus = as_packed(split.train)
    border = (1 << 18) // 512  # the first sequence of the second record batch
    assert corpus.num_sequences > border + 4
    across = corpus.rows(border - 2, border + 2)
    for number, row in enumerate(range(border - 2, border + 2)):
        for one, several in zip(
            dataclasses.astuple(corpus.rows(row, row + 1)), dataclasses.astuple(across), strict=True
        ):
            assert (one[0] == several[number]).all()
    inside = corpus.rows(3, 9)
    assert not any(
        array.flags.owndata or array.flags.writeable
        for array in (inside.token_ids_SL, inside.positions_SL, inside.loss_mask_SL)
    )
    assert [array.dtype for array in inside.arrays] == [np.int32, np.int32, np.uint8]
    for start, stop in ((-1, 2), (5, 5), (0, corpus.num_sequences + 1)):
        with pytest.raises(IndexError):
            corpus.rows(start, stop)


def files_opened_in(work: Callable[[], object]) -> list[str]:
    """The names of all that this process opens meanwhile, as Python's audit events tell them."""
    names: list[str] = []
    watching = True  # a hook stays for the life of the process

    def note(event: str, arguments: tuple[object, ...]) -> None:
        if watching and event == "open":
            names.append(Path(str(arguments[0])).name)

    sys.addaudithook(note)
    work()
    watching = False
    return names


def test_a_chunks_rows_open_the_data_alone_and_what_finds_and_checks_them_once_for_all(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    corpus = prepare(tmp_path, make_texts(200), tokenizer).train
    assert corpus.num_sequences > 64
    first, twin = corpus.rows(0, 64), pickle.loads(pickle.dumps(corpus))
    assert files_opened_in(lambda: twin.rows(0, 64)) == ["train.arrow"]
    with ThreadPoolExecutor(4) as pool:
        for rows in pool.map(lambda _: twin.rows(0, 64), range(8)):
            for name in ("token_ids_SL", "positions_SL", "loss_mask_SL"):
                assert np.array_equal(getattr(rows, name), getattr(first, name))


def test_a_file_that_was_written_again_is_read_again(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    corpus = prepare(tmp_path, make_texts(200), tokenizer).train
    before, order_path = corpus.rows(0, 2), Path(str(corpus.order_path))
    order_S = np.load(order_path)
    order_path.unlink()
    np.save(order_path, order_S[::-1])
    last = corpus.rows(corpus.num_sequences - 2, corpus.num_sequences)
    assert np.array_equal(last.token_ids_SL, before.token_ids_SL[::-1])
