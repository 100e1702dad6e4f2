"""The table [teacher.vllm]: how the engine `vllm` runs a teacher."""

from typing import Annotated, Literal

from pydantic import Field

from stillhouse.config.fields import Amount, Count, Name, Section


class VllmSection(Section):
    """Settings of the engine `vllm` alone."""

    tensor_parallel: Annotated[int, Field(ge=1, le=1024)] | None = Field(
        None, description="GPUs that share each layer; none: num_gpus on cuda, 1 on cpu"
    )
    expert_parallel: bool = Field(
        False, description="these GPUs share experts as wholes, not each expert"
    )
    quantization: Name | None = Field(
        None,
        description="how weights are quantised as they are loaded, in vLLM's words, such as fp8; "
        "none: as the model's files say",
    )
    kv_cache_dtype: Literal["auto", "fp8"] = Field(
        "auto", description="number format of keys and values; auto: that of the activations"
    )
    max_batched_tokens: Count | None = Field(
        None, description="tokens in one forward pass; none: vLLM's own choice"
    )
    memory_share: Annotated[float, Field(gt=0.0, le=1.0)] = Field(
        0.92, description="share of each GPU's memory that vLLM may fill"
    )
    kv_cache_gb: Amount | None = Field(
        None,
        description="memory for keys and values in GB, on each GPU; none: what memory_share leaves "
        "on cuda, 1 on cpu",
    )
