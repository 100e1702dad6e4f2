"""A model and the resources of its processes, and the section [teacher]."""

from typing import Annotated, ClassVar, Literal, Self

from pydantic import Field, field_validator, model_validator

from stillhouse.config.fields import (
    Amount,
    BatchSize,
    BlockSize,
    Count,
    CountOrZero,
    Dtype,
    Name,
    NumProcesses,
    Seconds,
    Section,
    shown,
)
from stillhouse.config.servers import ScoringSection, ServerSection
from stillhouse.config.vllm import VllmSection
from stillhouse.extension import is_extension

_ENGINES = ("transformers", "vllm", "openai")


class ModelSection(Section):
    """A causal language model: its source, its number format and the resources of each process."""

    model: Name = Field(description="a Hugging Face hub name, or a local directory")
    revision: str | None = Field(
        None,
        description="a branch, tag or commit of a hub model; resolved to a commit when the run "
        "is planned",
    )
    trust_remote_code: bool = Field(
        False, description="run Python code that the model repository ships"
    )
    dtype: Dtype = Field("bfloat16", description="number format of weights and activations")
    device: Literal["auto", "cpu", "cuda"] = Field(
        "auto", description="auto: cuda where there is one"
    )
    num_cpus: Amount = Field(
        1.0,
        description="CPUs that Ray reserves for each process; below 1, processes share a core",
    )
    num_gpus: Annotated[float, Field(ge=0.0, le=1024.0)] | None = Field(
        None, description="GPUs that Ray reserves for each process; none: 1 on cuda, 0 on cpu"
    )
    gpu_memory_gb: Annotated[float, Field(gt=0.0, le=1e6)] | None = Field(
        None,
        description="memory of one of its GPUs in GB, such as 24 or 80; none: that of the card "
        "which Ray names, or of this machine's, and only `check` asks for it",
    )
    resources: dict[str, Amount] = Field(
        {}, description="custom Ray resources for each process, such as {spot = 1}"
    )


class PoolSection(ModelSection):
    """A model that an engine runs, in a pool of actors."""

    table: ClassVar[str]  # its name in a config
    engines: ClassVar[tuple[str, ...]] = _ENGINES  # by their names; others are of the user's own

    engine: str = "transformers"
    openai: ServerSection | None = None
    vllm: VllmSection = Field(VllmSection(), description="settings of the engine vllm alone")
    python: Name | None = Field(
        None,
        description="the absolute path of an interpreter of its own for these actors, on every "
        "machine that has them, such as /opt/vllm/bin/python; none: the one that runs the rest",
    )
    min_replicas: NumProcesses = Field(1, description="actors that must be up before it begins")
    max_replicas: NumProcesses = Field(1, description="actors to request from Ray")
    max_failures: Count = Field(
        3,
        description="failed attempts at a block (a chunk, or a shard of rollouts), or at one "
        "sequence or prompt of it, before it is given up",
    )
    max_set_aside: CountOrZero = Field(
        8, description="sequences or prompts that no actor could do before the command fails"
    )
    lease_timeout_s: Seconds = Field(
        3600.0, description="seconds after which a block is leased to a second actor as well"
    )
    watchdog_s: Seconds = Field(
        300.0,
        description="seconds without a heartbeat after which an actor is killed and replaced; a "
        "block may take longer than that",
    )

    @property
    def has_weights(self) -> bool:
        """Whether the weights of `model` are loaded; without, it has the tokenizer alone."""
        return self.engine not in ("openai", "text", "rollouts")

    @field_validator("engine")
    @classmethod
    def _is_an_engine(cls, name: str) -> str:
        if name in cls.engines or is_extension(name):
            return name
        raise ValueError(
            f"no engine {name!r}; known: {', '.join(cls.engines)}, or 'package.module:name' for "
            "one of your own"
        )

    @field_validator("python")
    @classmethod
    def _is_an_absolute_path(cls, python: str | None) -> str | None:
        if python is None or python.startswith("/"):
            return python
        raise ValueError(
            f"{shown(python)} is no absolute path; give one, since these actors run on machines "
            "with other directories"
        )

    @model_validator(mode="after")
    def _tables_are_of_the_engine(self) -> Self:
        if self.engine == "openai" and self.openai is None:
            raise ValueError(
                'engine is "openai", but openai is missing; say where the server is: '
                f'[{self.table}.openai] base_url = "http://10.0.0.5:8000/v1"'
            )
        if self.engine != "openai" and self.openai is not None:
            raise ValueError(
                f'openai is set, but engine is "{self.engine}"; set engine = "openai", or leave '
                "the table out"
            )
        if self.vllm != VllmSection() and self.engine != "vllm":
            raise ValueError(
                f'vllm has settings, but engine is "{self.engine}", which does not read them; set '
                'engine = "vllm", or leave the table out'
            )
        return self

    @model_validator(mode="after")
    def _replicas_are_a_range(self) -> Self:
        if self.min_replicas > self.max_replicas:
            raise ValueError(
                f"min_replicas is {self.min_replicas}, above max_replicas, which is "
                f"{self.max_replicas}"
            )
        return self


class TeacherSection(PoolSection):
    """The teacher and its pool of actors."""

    table = "teacher"
    engines = (*_ENGINES, "text", "rollouts")

    engine: str = Field(
        "transformers",
        description="what runs the teacher: transformers, vllm, openai (a server that scores "
        "prompts), text (no model: the target is the next token of the text, and `model` has the "
        "tokenizer), rollouts (no model: the log-probabilities that came with a writer's text, "
        "and `model` has the tokenizer), or 'package.module:name', a TeacherEngine of your own",
    )
    openai: ScoringSection | None = Field(
        None,
        description='the server of engine = "openai"; `model` then has the tokenizer, and names '
        "the teacher together with `revision` and served_model",
    )
    rollouts: Name | None = Field(
        None, description='those of engine = "rollouts"; none: corpus.dataset, as it has to be'
    )
    batch_sequences: BatchSize = Field(4, description="sequences in one forward pass")
    block_tokens: BlockSize = Field(
        1024, description="tokens whose logits are in memory at one time"
    )
    logits: Literal["exact", "fast"] = Field(
        "exact",
        description="exact: float32 logits; fast: in the teacher's dtype, which is faster at the "
        "head, and whose bfloat16 rounding loses more than the codec",
    )
    compile: bool = Field(
        False,
        description="compile the layers when an actor starts (torch.compile), which takes a minute "
        "and saves passes over memory; engine transformers",
    )
    pipeline: bool = Field(
        False,
        description="spread the layers over num_gpus GPUs, of which one works at a time; engine "
        "transformers, for a teacher that one GPU cannot hold",
    )

    @property
    def scored_by(self) -> str | None:
        """The model whose distributions are the targets, or the rollouts that hold them; None: the
        text itself is the target."""
        if self.rollouts is not None:
            return f"rollouts {self.rollouts.rpartition('/')[2]}"
        return None if self.engine == "text" else self.model
