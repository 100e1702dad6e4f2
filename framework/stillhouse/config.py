"""One typed, frozen configuration: TOML files merged left to right, then overrides; it imports
nothing heavy and is never mutated."""

import json
import re
import reprlib
import tomllib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    NonNegativeFloat,
    PositiveFloat,
    ValidationError,
    field_validator,
    model_validator,
)

from stillhouse import suggestions
from stillhouse.errors import ConfigError
from stillhouse.extension import is_extension

# up to there every reader of JSON takes a number whole
PositiveInt = Annotated[int, Field(gt=0, le=1 << 53)]
NaturalInt = Annotated[int, Field(ge=0, le=1 << 53)]
NumProcesses = Annotated[int, Field(gt=0, le=1 << 16)]  # more than any cluster of Ray's has held
Seed = Annotated[int, Field(ge=-(1 << 63), lt=1 << 64)]  # what torch takes
# a step of Adam moves each weight by about so much, and most weights are below 1
LearningRate = Annotated[float, Field(gt=0.0, le=1.0)]
Fraction = Annotated[float, Field(ge=0.0, le=1.0)]
Beta = Annotated[float, Field(ge=0.0, lt=1.0)]
Name = Annotated[str, Field(min_length=1)]
Dtype = Literal["float32", "bfloat16", "float16"]
DIVERGENCES = ("forward_kl", "reverse_kl", "jsd", "skew_forward_kl", "skew_reverse_kl", "tvd")
NoticeSource = Literal["auto", "aws", "gcp", "azure", "off"]


class Section(BaseModel):
    """A part of the configuration: frozen, and closed to names that it does not know."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, str_strip_whitespace=True, allow_inf_nan=False
    )


class ModelSection(Section):
    """What teacher and student share: a causal language model, where it comes from and how it is
    placed."""

    model: Name = Field(description="a Hugging Face hub name, or a local directory")
    revision: str | None = Field(
        None,
        description="a branch, tag or commit of a hub model; resolved to a commit once, at the "
        "start",
    )
    trust_remote_code: bool = Field(
        False, description="run Python code that the model repository ships"
    )
    dtype: Dtype = "bfloat16"
    device: Literal["auto", "cpu", "cuda"] = Field(
        "auto", description="auto: cuda where there is one"
    )
    num_cpus: PositiveFloat = Field(
        1.0,
        description="CPUs that Ray reserves for each process; below one core, processes share it",
    )
    num_gpus: Annotated[float, Field(ge=0.0)] | None = Field(
        None, description="GPUs for each process; None: 1 on cuda, 0 on cpu"
    )
    resources: dict[str, PositiveFloat] = Field(
        {}, description="custom Ray resources for each process, such as {spot = 1}"
    )


class CorpusSection(Section):
    """Documents, and how they become sequences of fixed length."""

    source: str = Field(
        "corpus",
        description="corpus: documents, tokenised and packed; 'package.module:name' opens Sources "
        "of your own",
    )
    dataset: Name = Field(
        description="a hub data set; local text, json(l), parquet or arrow files, a glob or a "
        "directory; or 'stdlib'"
    )
    subset: str | None = Field(None, description="the hub data set's configuration name")
    split: str = "train"
    revision: str | None = None
    format: Literal["text", "chat"] = Field(
        "text", description="text: plain documents; chat: lists of {role, content} messages"
    )
    column: str | None = Field(
        None, description="the column to read; None: 'text' for text, 'messages' for chat"
    )
    packing: bool = Field(
        True,
        description="pack documents end to end; False pads each conversation to its own sequence "
        "(chat only)",
    )
    sequence_length: Annotated[int, Field(ge=2, lt=1 << 31)] = 2048
    max_documents: PositiveInt | None = Field(
        None, description="read no more than this many documents, after the shuffle"
    )
    heldout_sequences: PositiveInt = Field(
        64,
        description="sequences set apart for evaluation, from documents that are never trained on",
    )
    seed: Seed = 0

    @model_validator(mode="after")
    def _padding_is_for_chat(self) -> "CorpusSection":
        if self.format == "text" and not self.packing:
            raise ValueError(
                "packing = false pads conversations, but format is 'text'; set format = \"chat\" "
                "or leave packing on"
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

    @property
    def text_column(self) -> str:
        return self.column or ("text" if self.format == "text" else "messages")


class TeacherSection(ModelSection):
    """The pool of teacher actors."""

    engine: str = Field(
        "transformers",
        description="what runs the teacher; 'package.module:name' is a TeacherEngine of your own",
    )
    min_replicas: NumProcesses = Field(
        1, description="actors that must be up before the run begins"
    )
    max_replicas: NumProcesses = Field(1, description="actors to ask Ray for")
    batch_sequences: PositiveInt = Field(4, description="sequences in one forward pass")
    block_tokens: PositiveInt = Field(1024, description="tokens whose logits exist at one time")
    logits: Literal["exact", "fast"] = Field(
        "exact",
        description="float32, or in the teacher's own dtype: faster at the head alone, and "
        "rounding bfloat16 loses more than the codec",
    )
    max_failures: PositiveInt = Field(
        3,
        description="failed attempts at a chunk, or at one sequence of it, after which it is not "
        "tried again",
    )
    max_set_aside: NaturalInt = Field(
        8, description="sequences that no teacher could compute, after which the run stops"
    )
    lease_timeout_s: PositiveFloat = Field(
        3600.0, description="seconds after which a chunk is given to another teacher as well"
    )
    watchdog_s: PositiveFloat = Field(
        300.0,
        description="seconds after which an actor without a heartbeat is killed and replaced, "
        "however long its chunk may take",
    )

    @field_validator("engine")
    @classmethod
    def _is_an_engine(cls, name: str) -> str:
        if name == "transformers" or is_extension(name):
            return name
        raise ValueError(
            f"no engine {name!r}; known: transformers, or 'package.module:name' for one of your own"
        )

    @model_validator(mode="after")
    def _replicas_are_a_range(self) -> "TeacherSection":
        if self.min_replicas > self.max_replicas:
            raise ValueError(
                f"min_replicas is {self.min_replicas}, above max_replicas, which is "
                f"{self.max_replicas}"
            )
        return self


class TargetSection(Section):
    """What of the teacher's distribution is kept for each token."""

    k: Annotated[int, Field(ge=0, le=4096)] = Field(8, description="exact head entries")
    tail_draws: Annotated[int, Field(ge=0, le=4096)] = Field(
        40,
        description="draws from the tail; forward_kl alone learns from them, and is unbiased with "
        "them; 0 says that it may see one bucket",
    )
    value_bits: Literal[6, 8] = Field(8, description="bits for each kept log-probability")
    temperature: PositiveFloat = Field(
        1.0, description="targets are of softmax(logits / temperature)"
    )

    @model_validator(mode="after")
    def _something_is_kept(self) -> "TargetSection":
        if self.k == 0 and self.tail_draws == 0:
            raise ValueError(
                "k and tail_draws are both 0: nothing of the teacher would be kept; set one of "
                "them above 0"
            )
        return self


class StoreSection(Section):
    """Where chunks live."""

    url: str = Field(
        "runs/store", description="a directory, or s3://, gs:// or az:// with bucket and prefix"
    )
    chunk_sequences: PositiveInt = Field(64, description="sequences in one chunk")
    window_bytes: PositiveInt = Field(
        4 << 30, description="how many bytes of chunks teachers may run ahead of the slowest reader"
    )
    retain: Literal["all", "until-read"] = Field(
        "all",
        description="until-read: `run` deletes chunks that no registered reader will read again, "
        "once that is in their checkpoints",
    )


class StudentSection(ModelSection):
    """The student, its loss and its optimiser."""

    dtype: Literal["float32", "bfloat16"] = "bfloat16"
    init: Literal["weights", "config"] = Field(
        "weights", description="start from the model's weights, or from its config with random ones"
    )
    tokenizer: Name | None = Field(None, description="None: the tokenizer beside the model")
    num_workers: NumProcesses = Field(1, description="ranks, one to a device")
    min_workers: NumProcesses | None = Field(
        None,
        description="go on with as few ranks when machines are lost; None: wait for num_workers",
    )
    max_failures: NaturalInt = Field(
        3, description="times in a row that ranks may be lost without a new commit"
    )
    watchdog_s: PositiveFloat = Field(
        300.0,
        description="seconds after which a rank that stands still is named, killed and replaced",
    )
    regroup_s: PositiveFloat = Field(
        60.0, description="seconds between looks for room to bring back ranks that were lost"
    )
    zero_stage: Literal[0, 1, 2, 3] = 1
    activation_checkpointing: bool = False
    global_batch_sequences: PositiveInt = Field(
        64, description="sequences in one optimiser step, over all ranks"
    )
    micro_batch_sequences: PositiveInt = Field(
        4, description="sequences in one forward pass of one rank"
    )
    block_tokens: PositiveInt | None = Field(
        None, description="tokens whose logits exist at one time; None: chosen for the device"
    )
    epochs: PositiveInt = 1
    max_steps: PositiveInt | None = Field(
        None, description="stop after this many optimiser steps, wherever in the epochs that is"
    )
    learning_rate: LearningRate = 1e-4
    min_learning_rate: Fraction = Field(0.0, description="where the cosine ends")
    warmup_steps: NaturalInt = 100
    weight_decay: Annotated[float, Field(ge=0.0)] = 0.1
    betas: tuple[Beta, Beta] = (0.9, 0.95)
    gradient_clip: PositiveFloat = 1.0
    divergence: str = Field(
        "forward_kl",
        description="forward_kl is unbiased with draws; the others see the tail as one bucket, "
        "and want entries that hold 80 % of the mass;"
        " 'package.module:name' is a Divergence of your own",
    )
    tail_as_bucket: bool = Field(
        False,
        description="train on one bucket for the tail, however much of the teacher's mass it "
        "holds; forward_kl never asks for this",
    )
    divergence_weight: Fraction = Field(1.0, description="0 trains on the text alone")
    mix: Fraction = Field(
        0.5,
        description="beta of jsd, alpha of the skewed divergences, whose tail is one bucket at "
        "every mix; unused by the others",
    )
    ce_weight: Annotated[float, Field(ge=0.0)] = Field(
        0.0, description="weight of the cross-entropy to the text's next token"
    )
    z_loss_weight: Annotated[float, Field(ge=0.0)] = Field(
        0.0,
        description="weight of the squared log-sum-exp of the logits, which keeps them from "
        "drifting; PaLM took 1e-4",
    )
    seed: Seed = 0
    shuffle_window_chunks: PositiveInt = Field(
        4, description="neighbouring chunks among which sequences are mixed"
    )
    checkpoint_every_steps: PositiveInt = 200
    keep_checkpoints: PositiveInt = 2
    checkpoint_url: str | None = Field(
        None,
        description="None: in the run directory; or a directory or s3://, gs:// or az:// that "
        "outlives every machine",
    )
    prefetch_batches: PositiveInt = Field(4, description="batches that the loader reads ahead")

    @field_validator("divergence")
    @classmethod
    def _is_a_divergence(cls, name: str) -> str:
        if name in DIVERGENCES or is_extension(name):
            return name
        meant = suggestions.value(name, DIVERGENCES)
        raise ValueError(
            f"wanted {', '.join(DIVERGENCES)}, or 'package.module:name' of your own; found "
            f"{_shown(name)}{meant}"
        )

    @model_validator(mode="after")
    def _settings_go_together(self) -> "StudentSection":
        if self.divergence_weight == 0.0 and self.ce_weight == 0.0:
            raise ValueError(
                "divergence_weight and ce_weight are both 0: the student would learn nothing; set "
                "one of them above 0"
            )
        if self.zero_stage == 0 and self.dtype == "bfloat16":
            raise ValueError(
                'DeepSpeed trains bfloat16 only with ZeRO; set zero_stage = 1, or dtype = "float32"'
            )
        if self.min_workers is not None and self.min_workers > self.num_workers:
            raise ValueError(
                f"min_workers is {self.min_workers}, above num_workers, which is {self.num_workers}"
            )
        if (
            self.divergence in ("jsd", "skew_forward_kl", "skew_reverse_kl")
            and not 0.0 < self.mix < 1.0
        ):
            raise ValueError(
                f"mix is {self.mix}, but {self.divergence} wants it strictly between 0 and 1"
            )
        return self


class EvaluateSection(Section):
    """The exact, dense comparison at the end."""

    control: bool = Field(
        False, description="also train a control student on the text alone: same tokens, same seed"
    )
    batch_sequences: PositiveInt = 4
    block_tokens: PositiveInt = Field(
        512, description="tokens whose two dense distributions exist at one time"
    )


class TrackingSection(Section):
    """Weights & Biases, a view of the journal."""

    wandb: Literal["auto", "online", "offline", "off"] = Field(
        "auto", description="auto: online with a key at hand, else offline"
    )
    project: str = "stillhouse"
    entity: str | None = None
    tags: tuple[str, ...] = ()
    run_id: str | None = Field(
        None, description="None: derived from the run directory's first start, and kept on resume"
    )


class ClusterSection(Section):
    """Which Ray cluster to use."""

    address: str | None = Field(
        None, description="a running cluster ('auto' or host:port); None starts one on this machine"
    )
    num_cpus: PositiveInt | None = Field(
        None, description="CPUs of the cluster started here; None: every core"
    )
    join_s: NonNegativeFloat = Field(
        600.0,
        description="seconds that a run waits for machines which have not joined that cluster yet",
    )
    threads: PositiveInt = Field(
        1, description="torch threads in each teacher and student process on the CPU"
    )
    notices: NoticeSource = Field(
        "auto",
        description="whose metadata server announces a machine's end; auto: the one that answers",
    )
    grace_s: PositiveFloat = Field(
        30.0, description="seconds between SIGTERM and the kill, as Kubernetes or Slurm are set to"
    )


class Config(Section):
    """A whole run."""

    corpus: CorpusSection
    teacher: TeacherSection
    student: StudentSection
    target: TargetSection = TargetSection()
    store: StoreSection = StoreSection()
    evaluate: EvaluateSection = EvaluateSection()
    tracking: TrackingSection = TrackingSection()
    cluster: ClusterSection = ClusterSection()

    @model_validator(mode="after")
    def _the_divergence_can_use_the_target(self) -> "Config":
        student = self.student
        if (
            self.target.k == 0
            and student.divergence in DIVERGENCES[1:]
            and student.divergence_weight > 0.0
        ):
            raise ValueError(
                f'target.k is 0, and student.divergence is "{student.divergence}", which learns '
                "nothing from draws;"
                ' set student.divergence = "forward_kl", or keep entries'
            )
        return self


def load_config(paths: Iterable[str | Path], overrides: Iterable[str] = ()) -> Config:
    """Read TOML files, merged left to right, then `section.key = value` overrides, each a line of
    TOML.

    Raises ConfigError naming the file, the field and, for an unknown name, the nearest right one.
    """
    merged: dict[str, Any] = {}
    for path in paths:
        merged = _merge(merged, _read(Path(path)))
    for override in overrides:
        merged = _merge(merged, _parse(override, where=f"--set '{override[:200]}'"))
    return parse_config(merged)


def parse_config(values: Mapping[str, Any]) -> Config:
    """Validate plain values, such as those of a resolved config. Raises ConfigError."""
    try:
        return Config.model_validate(values)
    except ValidationError as error:
        lines = [_explain(detail) for detail in error.errors()]
        raise ConfigError(
            "the configuration is not usable:\n" + "\n".join(f"  - {line}" for line in lines)
        ) from None


def resolved_json(config: Config) -> str:
    """Every value, defaults included, as indented JSON that `parse_config` reads back."""
    return json.dumps(config.model_dump(mode="json"), indent=2) + "\n"


def _read(path: Path) -> dict[str, Any]:
    try:
        text = path.read_text(encoding="utf-8-sig")  # editors of Windows begin a file with a mark
    except UnicodeDecodeError as error:
        raise ConfigError(
            f"{path} is not TOML: it is not UTF-8 text ({error.reason} at byte {error.start})"
        ) from None
    except OSError as error:
        cure = (
            f"give a setting with --set '{path}'"
            if "=" in path.name
            else "give the path of a TOML file"
        )
        raise ConfigError(f"cannot read the config file {path}: {error.strerror}; {cure}") from None
    return _parse(text, where=str(path))


def _parse(text: str, *, where: str) -> dict[str, Any]:
    try:
        return tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        default = (
            "; quote text, as in 'student.dtype = \"float32\"'" if where.startswith("--set") else ""
        )
        raise ConfigError(
            f"{where} is not TOML: {error}{suggestions.toml(text, str(error)) or default}"
        ) from None
    except RecursionError:
        raise ConfigError(
            f"{where} is nested too deeply: a setting is a table's key, as in 'student.seed = 1'"
        ) from None
    except ValueError as error:  # Python reads no number of more than 4,300 digits
        raise ConfigError(f"{where} has a number that cannot be read: {error}") from None


def _merge(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for key, value in over.items():
        both_tables = isinstance(value, Mapping) and isinstance(merged.get(key), Mapping)
        merged[key] = _merge(merged[key], value) if both_tables else value
    return merged


def _explain(detail: Mapping[str, Any]) -> str:
    """One mistake, as place, what was found and what would be right."""
    kind, place, found = detail["type"], [str(part) for part in detail["loc"]], detail["input"]
    if kind == "extra_forbidden":
        meant = suggestions.setting(place[-1], section=".".join(place[:-1]), known=_names())
        return f"{'.'.join(place)[:200]}: no such setting; {meant}"
    if kind == "missing":
        return f"{'.'.join(place)}: missing; it has no default"
    # what is wrong between sections names them itself
    where = f"{'.'.join(place)}: " if place else ""
    message = str(detail["msg"]).removeprefix("Value error, ")
    if kind == "value_error":
        return f"{where}{message}"
    allowed = re.findall(r"'([^']*)'", detail["ctx"]["expected"]) if kind == "literal_error" else []
    return f"{where}{message}; found {_shown(found)}" + (
        suggestions.value(found, allowed) if isinstance(found, str) else ""
    )


def _names() -> dict[str, list[str]]:
    """The names in each section; in '' those of the sections."""
    sections = {name: field.annotation for name, field in Config.model_fields.items()}
    own = {
        name: list(section.model_fields)
        for name, section in sections.items()
        if isinstance(section, type)
    }
    return {"": list(sections), **own}


def _shown(value: object) -> str:
    """A value as Python writes it, no longer than a line."""
    if isinstance(value, int) and value.bit_length() > 64:
        return f"a number of {value.bit_length()} bits"
    short = reprlib.Repr()
    short.maxstring = short.maxother = 100
    return short.repr(value)
