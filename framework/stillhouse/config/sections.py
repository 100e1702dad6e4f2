"""The other sections, and the whole: `Config`."""

from typing import Annotated, Literal

from pydantic import Field, model_validator

from stillhouse.config.corpus import ROLLOUTS, CorpusSection, DataSection
from stillhouse.config.fields import (
    DIVERGENCES,
    BatchSize,
    BlockSize,
    Count,
    CountOrZero,
    NoticeSource,
    NumBytes,
    Seconds,
    Section,
)
from stillhouse.config.graders import AcceptSection, DecontaminateSection
from stillhouse.config.models import TeacherSection
from stillhouse.config.servers import ScoringSection
from stillhouse.config.student import StudentSection
from stillhouse.config.vllm import VllmSection
from stillhouse.config.weights import CutSection, LoraSection


class TargetSection(Section):
    """The target of a token: what is kept of the teacher's distribution."""

    k: Annotated[int, Field(ge=0, le=4096)] = Field(
        8, description="entries: the likeliest tokens, kept with their log-probabilities"
    )
    tail_draws: Annotated[int, Field(ge=0, le=4096)] = Field(
        40,
        description="draws from the tail, which make forward_kl unbiased, and every divergence "
        "where weighted_draws is true; 0: the tail is one bucket",
    )
    value_bits: Literal[6, 8] = Field(8, description="bits of each kept log-probability")
    temperature: Annotated[float, Field(ge=0.01, le=100.0)] = Field(
        1.0, description="targets are of softmax(logits / temperature)"
    )
    weighted_draws: bool = Field(
        False,
        description="each draw has its log-probability, a byte more, so that every divergence can "
        "use it; forward_kl learns as well or better from plain draws",
    )
    label_logprob: bool = Field(
        False, description="keep the log-probability of the token that really follows"
    )
    tail_entropy: bool = Field(
        False,
        description="keep the entropy of the tail, so that the loss of forward_kl with draws falls "
        "to 0",
    )

    @model_validator(mode="after")
    def _something_is_kept(self) -> "TargetSection":
        if self.k == 0 and self.tail_draws == 0:
            raise ValueError(
                "k and tail_draws are both 0: nothing of the teacher would be kept; set one of "
                "them above 0"
            )
        if self.weighted_draws and self.tail_draws == 0:
            raise ValueError(
                "weighted_draws is true, but tail_draws is 0: there is nothing to weigh; set "
                "tail_draws above 0, such as 25"
            )
        return self


class StoreSection(Section):
    """The store of chunks."""

    url: str = Field(
        "runs/store", description="a directory, or s3://, gs:// or az:// with bucket and prefix"
    )
    chunk_sequences: BatchSize = Field(64, description="sequences in one chunk")
    window_bytes: NumBytes = Field(
        4 << 30,
        description="bytes of chunks that teachers may be ahead of the slowest student of a run",
    )
    retain: Literal["all", "until-read"] = Field(
        "all",
        description="until-read: `run` deletes a chunk once every registered consumer has read it "
        "and has that in a checkpoint",
    )


class EvaluateSection(Section):
    """The dense comparison of student and teacher on held-out text: at the end of a run, and, on
    less text, while students learn."""

    control: bool = Field(
        False,
        description="also train a control student on the text alone: same tokens, same seed",
    )
    batch_sequences: BatchSize = Field(4, description="sequences in one forward pass")
    block_tokens: BlockSize = Field(
        512, description="tokens whose two dense distributions are in memory at one time"
    )
    every_steps: CountOrZero = Field(
        0,
        description="optimiser steps between two evaluations while students learn, which draw the "
        "held-out curves; 0: at the end alone",
    )
    tokens_while_learning: Count = Field(
        4096,
        description="held-out target tokens that every_steps scores, up to the next whole sequence",
    )
    patience: CountOrZero = Field(
        0,
        description="held-out scores in a row without a lower KL after which a student stops "
        "early; 0: it takes all its steps",
    )
    keep_best: bool = Field(
        False,
        description="keep the checkpoint with the lowest held-out KL as well, for "
        "`stillhouse export --best`",
    )

    @model_validator(mode="after")
    def _there_are_scores_to_decide_by(self) -> "EvaluateSection":
        if self.every_steps == 0 and (self.patience > 0 or self.keep_best):
            name = "patience" if self.patience > 0 else "keep_best"
            raise ValueError(
                f"{name} is set, but every_steps is 0: nothing is scored while a student learns; "
                "set every_steps, such as 100"
            )
        return self


class TrackingSection(Section):
    """Weights & Biases, as a view of the journal."""

    wandb: Literal["auto", "online", "offline", "off"] = Field(
        "auto", description="auto: online where an API key is found, else offline"
    )
    project: str = Field("stillhouse", description="W&B project")
    entity: str | None = Field(None, description="W&B user or team; none: the key's default")
    tags: tuple[str, ...] = Field((), description="W&B tags of the run")
    run_id: str | None = Field(
        None,
        description="W&B run id; none: derived from the run directory's first start, and the same "
        "after a resume",
    )


class ClusterSection(Section):
    """The Ray cluster."""

    address: str | None = Field(
        None, description="a running cluster: 'auto' or host:port; none: start one on this machine"
    )
    num_cpus: Annotated[int, Field(ge=1, le=1 << 16)] | None = Field(
        None, description="CPUs of the cluster started here; none: every core"
    )
    join_s: Annotated[float, Field(ge=0.0, le=1e9)] = Field(
        600.0, description="seconds to wait for machines that have not joined the cluster yet"
    )
    threads: Annotated[int, Field(ge=1, le=4096)] = Field(
        1, description="torch threads of each teacher and student process on the CPU"
    )
    notices: NoticeSource = Field(
        "auto",
        description="the cloud whose metadata server is polled for preemption notices; auto: the "
        "one that answers",
    )
    grace_s: Seconds = Field(
        30.0, description="seconds between SIGTERM and SIGKILL, as Kubernetes or Slurm are set to"
    )


class Config(Section):
    """The configuration of a run."""

    corpus: CorpusSection
    teacher: TeacherSection
    student: StudentSection
    target: TargetSection = TargetSection()
    store: StoreSection = StoreSection()
    evaluate: EvaluateSection = EvaluateSection()
    tracking: TrackingSection = TrackingSection()
    cluster: ClusterSection = ClusterSection()

    @model_validator(mode="after")
    def _the_teacher_can_be_compared_with(self) -> "Config":
        if not self.teacher.has_weights and self.evaluate.every_steps > 0:
            raise ValueError(
                "evaluate.every_steps compares a student with its teacher's whole distributions, "
                f'and with teacher.engine = "{self.teacher.engine}" there are none here; set it to '
                '0, or run the teacher here (teacher.engine = "vllm" or "transformers")'
            )
        return self

    @model_validator(mode="after")
    def _text_alone_is_learnt_by_cross_entropy(self) -> "Config":
        if self.teacher.scored_by is None:
            _require_text_alone(self)
        return self

    @model_validator(mode="after")
    def _logprobs_are_those_of_the_corpus(self) -> "Config":
        if self.teacher.engine == "rollouts":
            _require_logprobs(self)
        elif self.teacher.rollouts is not None:
            raise ValueError(
                f'teacher.rollouts is set, but teacher.engine is "{self.teacher.engine}"; set it '
                'to "rollouts", or leave teacher.rollouts out'
            )
        return self

    @model_validator(mode="after")
    def _the_divergence_can_use_the_target(self) -> "Config":
        student = self.student
        uses_entries_only = student.divergence in DIVERGENCES[1:] and student.divergence_weight > 0
        if self.target.k == 0 and uses_entries_only and not self.target.weighted_draws:
            raise ValueError(
                f'target.k is 0, and student.divergence is "{student.divergence}", which learns '
                'nothing from draws; set student.divergence = "forward_kl", or keep entries, or '
                "give draws weights (target.weighted_draws = true)"
            )
        return self


def _require_text_alone(config: Config) -> None:
    target, student, found, wanted = config.target, config.student, list[str](), list[str]()
    # one entry is all that the text holds, and a divergence from it is cross-entropy or infinite
    if (target.k, target.tail_draws) != (1, 0):
        found.append(f"target.k is {target.k}, target.tail_draws is {target.tail_draws}")
        wanted += ["[target]", "k = 1", "tail_draws = 0"]
    if student.divergence_weight > 0.0:
        found.append(f"student.divergence_weight is {student.divergence_weight:g}")
        wanted += ["[student]", "divergence_weight = 0.0", "ce_weight = 1.0"]
    if found:
        lines = "".join(f"\n      {line}" for line in wanted)
        raise ValueError(
            'teacher.engine is "text", whose target is the next token alone, for cross-entropy to '
            f"learn; {', '.join(found)}; write{lines}"
        )
    # the same student twice
    if config.evaluate.control:
        raise ValueError(
            "evaluate.control trains a second student on the text alone, and with "
            'teacher.engine = "text" the student is that one; leave it out'
        )


def _require_logprobs(config: Config) -> None:
    corpus, target, found, wanted = config.corpus, config.target, list[str](), list[str]()
    # whole samples of one data set, with log-probabilities
    if not corpus.dataset.startswith(ROLLOUTS) or corpus.source != "corpus" or corpus.mixed_with:
        raise ValueError(
            'teacher.engine is "rollouts", which learns from log-probabilities in rollouts, but '
            f"the corpus is {corpus.dataset}, source {corpus.source}, mixed with "
            f"{len(corpus.mixed_with)} more; wanted rollouts alone, as in corpus.dataset = "
            f'"{ROLLOUTS}0123456789abcdef"'
        )
    if config.teacher.rollouts not in (None, corpus.dataset):
        raise ValueError(
            f"teacher.rollouts is {config.teacher.rollouts}, and corpus.dataset is "
            f"{corpus.dataset}; leave teacher.rollouts out"
        )
    if corpus.packing:
        found.append("corpus.packing is true, which cuts samples")
        wanted += ["[corpus]", "packing = false"]
    if corpus.accept is None or not corpus.accept.with_logprobs:
        found.append("corpus.accept takes samples without log-probabilities")
        wanted += ["[corpus.accept]", "with_logprobs = true"]

    # the entries that there are, and the tail as one bucket
    if target.tail_draws:
        found.append(f"target.tail_draws is {target.tail_draws}")
        wanted += ["[target]", "tail_draws = 0"]
    if found:
        lines = "".join(f"\n      {line}" for line in wanted)
        raise ValueError(
            'teacher.engine is "rollouts", whose targets are log-probabilities of whole samples, '
            f"as the writer's API gave them; {', '.join(found)}; write{lines}"
        )


def section_types() -> dict[str, type[Section]]:
    """The sections by name, in order."""
    types = {}
    for name, field in Config.model_fields.items():
        assert isinstance(field.annotation, type)
        types[name] = field.annotation
    return types


def names_by_section() -> dict[str, list[str]]:
    """The names in each section and in each table of one, and those of the sections under ''."""
    types = section_types()
    tables: dict[str, type[Section]] = {
        "corpus.mixed_with": DataSection,
        "corpus.accept": AcceptSection,
        "corpus.decontaminate": DecontaminateSection,
        "corpus.mixed_with.accept": AcceptSection,
        "corpus.mixed_with.decontaminate": DecontaminateSection,
        "teacher.vllm": VllmSection,
        "student.init": CutSection,
        "student.lora": LoraSection,
        "teacher.openai": ScoringSection,
    }
    return {"": list(types)} | {
        name: list(kind.model_fields) for name, kind in (types | tables).items()
    }
