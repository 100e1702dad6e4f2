"""Prompts: rows of a data set as the token ids that a writer goes on with.

They are rendered and tokenised once, into a file of the cache directory. Prompt *i* is the same on
every machine: the rows are shuffled by a seed, as those of a corpus are.
"""

import hashlib
import io
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import xxhash
from numpy.typing import NDArray

from stillhouse import atomic
from stillhouse.cache import writing_cache
from stillhouse.config import CorpusSection
from stillhouse.config.generate import PromptsSection
from stillhouse.errors import CorpusError
from stillhouse.sequences.account import Account
from stillhouse.sequences.bad_rows import BadRow, BadRowError, require_few
from stillhouse.sequences.chat import ChatTemplate, template_text
from stillhouse.sequences.conversations import Conversation
from stillhouse.sequences.documents import Documents, load_documents

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

_VERSION = 2  # a change to rendering, tokenising or order raises it
_CHECK_BYTES = 8  # xxh3 of all behind it, at the beginning of a file


@dataclass(frozen=True, slots=True, eq=False)
class Prompts:
    """P prompts, one after the other."""

    ids: NDArray[np.int32]
    starts_P1: NDArray[np.int64]  # prompt p is ids[starts_P1[p] : starts_P1[p + 1]]
    references: tuple[str, ...]  # of each prompt, for graders; empty where the data set has none
    # of each prompt, for a writer behind a server: JSON of its `text`, or of its `messages` and
    # `tools`, as OpenAI's API has them; empty where they were not asked for
    sources: tuple[str, ...]
    account: Account

    def __len__(self) -> int:
        return len(self.starts_P1) - 1

    def __getitem__(self, number: int) -> NDArray[np.int32]:
        return self.ids[self.starts_P1[number] : self.starts_P1[number + 1]]

    @property
    def digest(self) -> str:
        """sha256 over all ids, where each prompt begins, and the sources."""
        digest = hashlib.sha256(self.starts_P1.astype("<i8").tobytes())
        digest.update(self.ids.astype("<i4").tobytes())
        if self.sources:
            digest.update(json.dumps(self.sources).encode())
        return digest.hexdigest()

    @property
    def references_digest(self) -> str:
        """16 digits: sha256 over all references."""
        return hashlib.sha256(json.dumps(self.references).encode()).hexdigest()[:16]


def prepare_prompts(
    section: PromptsSection,
    tokenizer: "PreTrainedTokenizerFast",
    *,
    tokenizer_digest: str,
    most_tokens: int,
    with_sources: bool,
    cache_dir: Path,
    on_progress: Callable[[int, int], None] = lambda *_: None,
) -> Prompts:
    """The prompts of a data set, of at most `most_tokens` each; a longer one is a bad row. Found in
    `cache_dir` as made before from the same rows, section and tokenizer.

    Raises CorpusError for data that cannot be used, a missing column, and more bad rows than the
    section allows; CacheError.
    """
    try:
        # all that decides them names their file
        corpus = _as_corpus(section)
        documents = load_documents(corpus, cache_dir=cache_dir / "tables")
        references = _references(section, corpus, cache_dir)
        key = {
            "version": _VERSION,
            "section": section.model_dump(mode="json") | {"chat_template": template_text(corpus)},
            "tokenizer": tokenizer_digest,
            "documents": [documents.identity, None if references is None else references.identity],
            "most_tokens": most_tokens,
            "with_sources": with_sources,
        }
        digest = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()
        path = cache_dir / "prompts" / f"{digest[:32]}.prompts"

        # found there, or made
        with writing_cache(cache_dir):
            found = _read(path)
            if found is None:
                rows = _Rows(documents, references, tokenizer, corpus, most_tokens, with_sources)
                found = _tokenised(rows, section, on_progress)
                atomic.make_directory(path.parent)
                atomic.replace(path, _packed(found))
    except CorpusError as error:
        raise CorpusError(_in_prompts(str(error))) from error
    return found


class _Row(NamedTuple):
    ids: NDArray[np.int32]
    reference: str
    source: str


@dataclass(frozen=True, slots=True)
class _Rows:
    """The rows of a data set as prompts."""

    documents: Documents
    references: Documents | None
    tokenizer: "PreTrainedTokenizerFast"
    corpus: CorpusSection
    most_tokens: int
    with_sources: bool

    def __iter__(self) -> Iterator[_Row | BadRow]:
        """Each row as a prompt, or why it is none."""
        is_chat = self.corpus.format == "chat"
        template = ChatTemplate(self.tokenizer, template_text(self.corpus)) if is_chat else None
        for row in map(int, self.documents.order):
            try:
                document = self.documents.read(row)
                text = document if template is None else _asked(document, template)
                reference = "" if self.references is None else self.references.read(row)
                ids = self._ids(text, is_text=template is None)
                source = _as_json(document) if self.with_sources else ""
                yield _Row(ids, reference, source)
            except BadRowError as error:
                yield BadRow(*self.documents.place(row), str(error))

    def _ids(self, text: str, *, is_text: bool) -> NDArray[np.int32]:
        encoded = self.tokenizer(text, add_special_tokens=is_text, verbose=False)["input_ids"]
        ids = np.array(encoded, np.int32)
        if is_text and len(ids) and ids[-1] == self.tokenizer.eos_token_id:
            ids = ids[:-1]  # some tokenizers end each text
        if not 1 <= len(ids) <= self.most_tokens:
            raise BadRowError(
                f"its prompt has {len(ids)} tokens; wanted: 1 to {self.most_tokens}, which is "
                "sampling.sequence_length less sampling.max_new_tokens"
            )
        return ids


def _asked(document: Conversation, template: ChatTemplate) -> str:
    if document.messages and document.messages[-1]["role"] == "assistant":
        raise BadRowError(
            "its last turn is an assistant's, so nothing is asked; leave that turn out, or name "
            'the column of questions as prompts.prompt_column, with prompts.format = "text"'
        )
    return template.prompt(document)


def _as_json(document: str | Conversation) -> str:
    if isinstance(document, str):
        return json.dumps({"text": document})
    tools = {"tools": [*document.tools]} if document.tools else {}
    return json.dumps({"messages": [*document.messages], **tools})


def _tokenised(
    rows: _Rows, section: PromptsSection, on_progress: Callable[[int, int], None]
) -> Prompts:
    """All prompts, in order. Raises CorpusError where more rows are bad than the section allows."""
    # each row
    account = Account(form=rows.documents.form)
    found: list[_Row] = []
    for each in rows:
        if isinstance(each, BadRow):
            account.bad_rows.append(each)
            most = section.max_bad_rows
            require_few(account.bad_rows, num_rows=len(rows.documents), max_share=most)
            continue
        found.append(each)
        account.num_documents += 1
        account.num_tokens += len(each.ids)
        on_progress(account.num_documents, account.num_tokens)
    if not found:
        raise CorpusError(f"no row of {section.dataset} is a prompt; give one at least")

    # as one value
    starts_P1 = np.cumsum([0, *(len(each.ids) for each in found)], dtype=np.int64)
    return Prompts(
        np.concatenate([each.ids for each in found]),
        starts_P1,
        () if rows.references is None else tuple(each.reference for each in found),
        tuple(each.source for each in found) if rows.with_sources else (),
        account,
    )


def _as_corpus(section: PromptsSection, **changes: Any) -> CorpusSection:
    """The rows are read as those of a corpus."""
    values = {
        "dataset": section.dataset,
        "subset": section.subset,
        "split": section.split,
        "revision": section.revision,
        "format": section.format,
        "column": section.prompt_column,
        "chat_template": section.chat_template,
        "max_documents": section.max_prompts,
        "max_bad_rows": section.max_bad_rows,
        "seed": section.seed,
    }
    return CorpusSection.model_validate(values | changes)


def _references(
    section: PromptsSection, corpus: CorpusSection, cache_dir: Path
) -> Documents | None:
    """The references, of the same rows in the same order."""
    if section.reference_column is None:
        return None
    texts = {"format": "text", "column": section.reference_column, "chat_template": None}
    return load_documents(
        CorpusSection.model_validate(corpus.model_dump() | texts), cache_dir=cache_dir / "tables"
    )


def _in_prompts(message: str) -> str:
    """A corpus's error, with the names that the settings have here."""
    for name, own in (
        ("corpus.column", "prompts.prompt_column or prompts.reference_column"),
        ("corpus.", "prompts."),
    ):
        message = message.replace(name, own)
    return message


# ---- the file


def _packed(prompts: Prompts) -> bytes:
    about = {
        "references": prompts.references,
        "sources": prompts.sources,
        "form": prompts.account.form,
        "bad_rows": [[each.file, each.row, each.reason] for each in prompts.account.bad_rows],
    }
    text = np.frombuffer(json.dumps(about).encode(), np.uint8)
    file = io.BytesIO()
    np.savez(file, ids=prompts.ids, starts=prompts.starts_P1, about=text)
    data = file.getvalue()
    return xxhash.xxh3_64_digest(data) + data


def _read(path: Path) -> Prompts | None:
    """The prompts of a file that was written before; None where there is none, or it is damaged."""
    try:
        whole = path.read_bytes()
    except FileNotFoundError:
        return None
    check, data = whole[:_CHECK_BYTES], whole[_CHECK_BYTES:]
    if xxhash.xxh3_64_digest(data) != check:
        return None
    with np.load(io.BytesIO(data)) as arrays:
        ids, starts_P1 = arrays["ids"], arrays["starts"]
        about = json.loads(arrays["about"].tobytes())
    account = Account(
        num_documents=len(starts_P1) - 1,
        num_tokens=len(ids),
        form=about["form"],
        bad_rows=[BadRow(*each) for each in about["bad_rows"]],
    )
    references, sources = (tuple(about[name]) for name in ("references", "sources"))
    return Prompts(ids, starts_P1, references, sources, account)
