"""The configuration of `stillhouse generate` and `stillhouse grade`: prompts, the model that writes
to them, where its rollouts go, and what grades them."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from stillhouse.config.fields import (
    BatchSize,
    Count,
    Fraction,
    Name,
    Section,
    Seed,
)
from stillhouse.config.graders import (
    SECTIONS_BY_KIND,
    GraderSection,
    require_names_of_their_own,
    require_no_references,
)
from stillhouse.config.models import PoolSection
from stillhouse.config.reading import read_values, validated
from stillhouse.config.sections import ClusterSection
from stillhouse.config.servers import WritingSection
from stillhouse.config.vllm import VllmSection


class PromptsSection(Section):
    """The prompts: a data set, and how its rows are read."""

    dataset: Name = Field(
        description="a hub data set; or local json(l) or csv (also .gz or .zst), parquet or arrow "
        "files, a glob or a directory"
    )
    subset: str | None = Field(None, description="the hub data set's configuration name")
    split: str = Field("train", description="the data set's split")
    revision: str | None = Field(None, description="a branch, tag or commit of a hub data set")
    format: Literal["text", "chat"] = Field(
        "chat",
        description="chat: messages whose last turn is missing, rendered by the chat template up "
        "to where an assistant's turn begins; text: a text, which the writer goes on with",
    )
    prompt_column: str | None = Field(
        None,
        description="the column to read; none: 'text' for text, and for chat the first there is of "
        "messages, conversations and conversation",
    )
    reference_column: str | None = Field(
        None, description="a column of texts that graders compare with, such as the right answer"
    )
    chat_template: str | None = Field(
        None,
        description="a Jinja file, or the template itself, in place of the tokenizer's chat "
        "template",
    )
    max_prompts: Annotated[int, Field(ge=1, le=10**10)] | None = Field(
        None, description="prompts to read at most, after the shuffle; none: all"
    )
    max_bad_rows: Fraction = Field(
        0.001,
        description="share of the rows that may be skipped because they are no prompts, or leave "
        "no room for sampling.max_new_tokens; 0: the first one is an error",
    )
    seed: Seed = Field(0, description="seed of the shuffle of prompts")

    @model_validator(mode="after")
    def _a_template_is_for_chat(self) -> "PromptsSection":
        if self.chat_template is not None and self.format != "chat":
            raise ValueError(
                f"chat_template is set, but format is '{self.format}'; set format = \"chat\", or "
                "leave chat_template out"
            )
        return self


class WriterSection(PoolSection):
    """The model that writes, and its pool of actors."""

    table = "writer"

    engine: str = Field(
        "transformers",
        description="what runs the writer: transformers, vllm, openai (a server with OpenAI's chat "
        "API), or 'package.module:name', a WriterEngine of your own",
    )
    openai: WritingSection | None = Field(
        None,
        description='the server of engine = "openai"; `model` then has the tokenizer of those who '
        "will learn from it",
    )
    batch_sequences: BatchSize = Field(
        16, description="samples that are written side by side; engine transformers"
    )


class SamplingSection(Section):
    """How a sample is drawn, and when it ends."""

    samples: Annotated[int, Field(ge=1, le=1 << 16)] = Field(1, description="of each prompt")
    temperature: Annotated[float, Field(ge=0.01, le=100.0)] = Field(
        1.0, description="samples are of softmax(logits / temperature)"
    )
    top_p: Annotated[float, Field(gt=0.0, le=1.0)] = Field(
        1.0, description="of the likeliest tokens that have this mass together; 1: of all"
    )
    max_new_tokens: Count = Field(512, description="tokens after which a sample is cut")
    sequence_length: Annotated[int, Field(ge=2, le=1 << 24)] = Field(
        2048,
        description="tokens that a prompt may have together with its sample; a longer prompt than "
        "leaves room for max_new_tokens is a bad row",
    )
    seed: Seed = Field(0, description="seed of the samples")

    @model_validator(mode="after")
    def _a_prompt_has_room(self) -> "SamplingSection":
        if self.max_new_tokens >= self.sequence_length:
            raise ValueError(
                f"max_new_tokens is {self.max_new_tokens}, which leaves no room for a prompt: "
                f"sequence_length is {self.sequence_length}; raise it, or lower max_new_tokens"
            )
        return self


class RolloutStoreSection(Section):
    """The store of rollouts."""

    url: str = Field(
        "runs/store", description="a directory, or s3://, gs:// or az:// with bucket and prefix"
    )
    shard_prompts: BatchSize = Field(64, description="prompts in one shard")


class GenerateConfig(Section):
    """The configuration of `stillhouse generate` and `stillhouse grade`."""

    prompts: PromptsSection
    writer: WriterSection
    sampling: SamplingSection = SamplingSection()
    store: RolloutStoreSection = RolloutStoreSection()
    graders: tuple[GraderSection, ...] = ()
    cluster: ClusterSection = ClusterSection()

    @model_validator(mode="after")
    def _graders_have_what_they_need(self) -> "GenerateConfig":
        require_names_of_their_own(self.graders)
        if self.prompts.reference_column is None:
            require_no_references(self.graders)
        return self


def is_of_generate(values: Mapping[str, Any]) -> bool:
    """Whether plain values are a config of `generate`, not of a run: these two sections are no
    run's."""
    return "prompts" in values or "writer" in values


def load_generate_config(
    paths: str | Path | Iterable[str | Path], overrides: str | Iterable[str] = ()
) -> GenerateConfig:
    """Read TOML files and overrides, as `load_config` does for a run. Raises ConfigError."""
    known = {"": list(GenerateConfig.model_fields)}
    for name, field in GenerateConfig.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, Section):
            known[name] = list(field.annotation.model_fields)
    tables: dict[str, type[Section]] = {"writer.vllm": VllmSection, "writer.openai": WritingSection}
    known |= {name: list(section.model_fields) for name, section in tables.items()}
    for kind, section in SECTIONS_BY_KIND.items():
        known[f"graders.{kind}"] = list(section.model_fields)
    return validated(GenerateConfig, read_values(paths, overrides), known=known)
