"""A model and the resources of its processes, and the section [teacher]."""

from typing import Annotated, Literal

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
)
from stillhouse.extension import is_extension


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


class TeacherSection(ModelSection):
    """The teacher and its pool of actors."""

    engine: str = Field(
        "transformers",
        description="what runs the teacher: transformers, or 'package.module:name', a "
        "TeacherEngine of your own",
    )
    min_replicas: NumProcesses = Field(1, description="actors that must be up before a run begins")
    max_replicas: NumProcesses = Field(1, description="actors to request from Ray")
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
    max_failures: Count = Field(
        3,
        description="failed attempts at a chunk, or at one sequence of it, before it is given up",
    )
    max_set_aside: CountOrZero = Field(
        8, description="sequences that no teacher could compute before the run fails"
    )
    lease_timeout_s: Seconds = Field(
        3600.0,
        description="seconds after which a chunk is leased to a second teacher as well",
    )
    watchdog_s: Seconds = Field(
        300.0,
        description="seconds without a heartbeat after which an actor is killed and replaced; a "
        "chunk may take longer than that",
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
