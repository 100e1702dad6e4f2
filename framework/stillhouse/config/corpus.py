"""The section [corpus]: data sets, how their rows are read, and how documents become sequences."""

import re
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from stillhouse.config.fields import Count, Fraction, Name, Section, Seed
from stillhouse.config.graders import AcceptSection, DecontaminateSection
from stillhouse.extension import is_extension

ROLLOUTS = "rollouts://"  # before the fingerprint of what `stillhouse generate` wrote


class DataSection(Section):
    """A data set, and how its rows are read."""

    dataset: Name = Field(
        description="a hub data set; local text, json(l) or csv (also .gz or .zst), parquet or "
        "arrow files, a glob or a directory; 'stdlib', the Python files of the standard library; "
        "or rollouts://FINGERPRINT, what `stillhouse generate` wrote into the store"
    )
    subset: str | None = Field(None, description="the hub data set's configuration name")
    split: str = Field("train", description="the data set's split")
    revision: str | None = Field(None, description="a branch, tag or commit of a hub data set")
    format: Literal["text", "chat", "tokens"] = Field(
        "text",
        description="text: plain documents; chat: messages of {role, content} or {from, value}, "
        "or a question and its answer in two columns; tokens: ids, which no tokenizer changes",
    )
    column: str | None = Field(
        None,
        description="the column to read; none: 'text' for text, 'input_ids' for tokens, and for "
        "chat the first there is of messages, conversations, conversation, prompt with completion, "
        "instruction with output (and input), prompt with response, question with answer",
    )
    mask_column: str | None = Field(
        None,
        description="the column that says which ids are learnt, for tokens; none: the first there "
        "is of loss_mask, assistant_masks, completion_mask (1 is learnt) and labels (-100 is not); "
        "without any, all are learnt",
    )
    chat_template: str | None = Field(
        None,
        description="a Jinja file, or the template itself, in place of the tokenizer's chat "
        "template; parts between {% generation %} and {% endgeneration %} are learnt",
    )
    max_documents: Annotated[int, Field(ge=1, le=10**12)] | None = Field(
        None, description="documents to read at most, after the shuffle; none: all"
    )
    accept: AcceptSection | None = Field(
        None,
        description="which samples of rollouts are trained on, by what `stillhouse grade` found; "
        "none: all that ended themselves",
    )
    decontaminate: DecontaminateSection | None = Field(
        None, description="test sets of which samples of rollouts must not hold passages"
    )
    weight: Annotated[float, Field(ge=0.0, le=1e9)] = Field(
        1.0,
        description="share of the sequences of a mixture, relative to the weights of mixed_with; "
        "0 leaves the data set out",
    )

    @model_validator(mode="before")
    @classmethod
    def _rollouts_are_tokens(cls, values: Any) -> Any:
        """They need no format in a file."""
        is_table = isinstance(values, dict)
        if is_table and str(values.get("dataset", "")).startswith(ROLLOUTS):
            return {"format": "tokens", **values}
        return values

    @model_validator(mode="after")
    def _rollouts_are_nothing_else(self) -> "DataSection":
        if not self.dataset.startswith(ROLLOUTS):
            for name in ("accept", "decontaminate"):
                if getattr(self, name) is not None:
                    raise ValueError(
                        f"{name} is set, but dataset is {self.dataset}; only samples that "
                        f"`stillhouse generate` wrote ({ROLLOUTS}...) are chosen by it: leave "
                        f"{name} out"
                    )
            return self
        if not re.fullmatch(r"(.+/)?[0-9a-f]{16}", self.dataset.removeprefix(ROLLOUTS)):
            raise ValueError(
                f"dataset is {self.dataset}; wanted {ROLLOUTS} and the 16 digits that `stillhouse "
                "generate` printed, before them the URL of the store and a slash where it is "
                "another one than store.url"
            )
        if self.format != "tokens":
            raise ValueError(
                f"format is '{self.format}', but rollouts are ids of tokens already; leave format "
                "out"
            )
        return self

    @model_validator(mode="after")
    def _settings_fit_the_format(self) -> "DataSection":
        for name, wanted in (("chat_template", "chat"), ("mask_column", "tokens")):
            if getattr(self, name) is not None and self.format != wanted:
                raise ValueError(
                    f"{name} is set, but format is '{self.format}'; set format = \"{wanted}\", or "
                    f"leave {name} out"
                )
        return self

    @property
    def text_column(self) -> str:
        names = {"text": "text", "chat": "messages", "tokens": "input_ids"}
        return self.column or names[self.format]


class CorpusSection(DataSection):
    """The documents, and how they become sequences of one length."""

    source: str = Field(
        "corpus",
        description="corpus: documents, tokenised and packed; 'package.module:name' opens Sources "
        "of your own",
    )
    mixed_with: tuple[DataSection, ...] = Field(
        (),
        description="more data sets, each a table [[corpus.mixed_with]] of the settings above: "
        "each has its weight's share of the sequences, and none is used twice in an epoch",
    )
    max_bad_rows: Fraction = Field(
        0.001,
        description="share of a data set's rows that may be skipped because nothing can be learnt "
        "from them; bad_rows.jsonl in the run directory lists them; 0: the first one is an error",
    )
    packing: bool = Field(
        True,
        description="pack documents end to end, none of which attends to another; false pads each "
        "document to a sequence (not for text)",
    )
    sequence_length: Annotated[int, Field(ge=2, le=1 << 24)] = Field(
        2048, description="tokens in one sequence"
    )
    heldout_sequences: Count = Field(
        64,
        description="sequences set apart for evaluation, from documents that are never trained on",
    )
    seed: Seed = Field(0, description="seed of the shuffle of documents")

    @model_validator(mode="after")
    def _data_sets_go_together(self) -> "CorpusSection":
        if not self.packing and any(each.format == "text" for each in (self, *self.mixed_with)):
            raise ValueError(
                "packing = false pads conversations, but format is 'text'; set format = \"chat\" "
                "or leave packing on"
            )
        if not any(each.weight for each in (self, *self.mixed_with)):
            raise ValueError(
                "the weights of all data sets are 0: there would be nothing to learn; set the "
                "weight of one of them above 0"
            )
        places = [(each.dataset, each.subset, each.split) for each in self.parts()]
        again = next((each for each in places if places.count(each) > 1), None)
        if again is not None:
            raise ValueError(
                f"{again[0]} is named twice: a document that one holds out could be trained on by "
                "the other; name it once, with the sum of the weights"
            )
        if self.heldout_sequences < len(self.parts()):
            raise ValueError(
                f"heldout_sequences is {self.heldout_sequences}, but a mixture of "
                f"{len(self.parts())} data sets holds out one of each at least; raise it"
            )
        return self

    @field_validator("source")
    @classmethod
    def _is_a_source(cls, name: str) -> str:
        if name == "corpus" or is_extension(name):
            return name
        raise ValueError(
            f"no source {name!r}; known: corpus, or 'package.module:name' for one of your own"
        )

    def in_store(self, url: str) -> "CorpusSection":
        """The same, where rollouts without a store of their own are those of the store `url`."""
        mixed = tuple(
            each.model_copy(update={"dataset": _in_store(each.dataset, url)})
            for each in self.mixed_with
        )
        return self.model_copy(
            update={"dataset": _in_store(self.dataset, url), "mixed_with": mixed}
        )

    def parts(self) -> list["CorpusSection"]:
        """Each data set of a weight above 0 as a corpus of its own."""
        common: dict[str, Any] = {
            name: getattr(self, name)
            for name in CorpusSection.model_fields.keys() - DataSection.model_fields.keys()
        } | {"mixed_with": ()}
        return [
            CorpusSection.model_construct(
                **{name: getattr(each, name) for name in DataSection.model_fields}, **common
            )
            for each in (self, *self.mixed_with)
            if each.weight
        ]


def _in_store(dataset: str, url: str) -> str:
    digits = dataset.removeprefix(ROLLOUTS)
    return f"{ROLLOUTS}{url}/{digits}" if digits != dataset and "/" not in digits else dataset
