"""vLLM's own config of a model, from the section that names it: a teacher's, or a writer's."""

from typing import Any

from stillhouse.config import PoolSection
from stillhouse.engines import _vllm_compat
from stillhouse.errors import ConfigError, ModelError
from stillhouse.model_path import source_of

_CACHE_GB_ON_CPU = 1.0


def arguments_of(section: PoolSection, *, sequence_length: int, device: str) -> dict[str, Any]:
    """The settings as vLLM's EngineArgs names them."""
    settings, on_cpu = section.vllm, device == "cpu"
    cache_gb = _CACHE_GB_ON_CPU if on_cpu and settings.kv_cache_gb is None else settings.kv_cache_gb
    world = tensor_parallel(section, device=device)
    given = {
        "quantization": settings.quantization,
        "max_num_batched_tokens": settings.max_batched_tokens,
        "kv_cache_memory_bytes": None if cache_gb is None else int(cache_gb * 1e9),
    }
    return {
        "model": source_of(section.model),
        "revision": section.revision,
        "tokenizer_revision": section.revision,
        "trust_remote_code": section.trust_remote_code,
        "dtype": section.dtype,
        "max_model_len": sequence_length,
        "tensor_parallel_size": world,
        "enable_expert_parallel": settings.expert_parallel,
        "kv_cache_dtype": settings.kv_cache_dtype,
        "gpu_memory_utilization": settings.memory_share,
        "distributed_executor_backend": "uni" if world == 1 else "mp",
        "enforce_eager": on_cpu,  # compiling takes minutes there, and gains little
    } | {name: value for name, value in given.items() if value is not None}


def tensor_parallel(section: PoolSection, *, device: str) -> int:
    """The number of devices that share each layer."""
    if section.vllm.tensor_parallel is not None:
        return section.vllm.tensor_parallel
    return max(1, int(section.num_gpus or 1)) if device == "cuda" else 1


def vllm_config(
    section: PoolSection,
    *,
    sequence_length: int,
    length_setting: str,
    device: str,
    writes: bool,
    **ours: Any,
) -> Any:
    """vLLM's whole config, with arguments of `ours`, such as its worker; nothing is loaded.

    Raises ConfigError or ModelError for what vLLM does not run.
    """
    # a version that was tried, built for this kind of device
    _vllm_compat.require_tried(_vllm_compat.installed_version(), table=section.table)
    _vllm_compat.prepare_environment()
    built_for = "cpu" if _vllm_compat.is_cpu() else "cuda"
    if built_for != device:
        raise ConfigError(
            f"the {section.table} is placed on {device}, but the vLLM that is installed here runs "
            f'on {built_for}; set {section.table}.device = "{built_for}", or install the vLLM for '
            f"{device}"
        )

    # its own refusals, and one that it makes too late
    arguments = arguments_of(section, sequence_length=sequence_length, device=device)
    try:
        config = _vllm_compat.engine_config(writes=writes, **arguments, **ours)
    except (ValueError, NotImplementedError) as error:
        raise ModelError(
            f"vLLM does not run {section.model} with sequences of {sequence_length} tokens and "
            f"these settings: {error}; change {length_setting}, [{section.table}] or "
            f"[{section.table}.vllm], or take another model"
        ) from error
    size = _vllm_compat.unsupported_head_size(config)
    if size is not None:
        raise ModelError(
            f"the attention of {section.model} has heads of {size} numbers, for which vLLM has no "
            f'kernel on the CPU; run it on a GPU, or set {section.table}.engine = "transformers"'
        )
    return config
