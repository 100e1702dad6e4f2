"""What engines/_vllm_compat.py relies on, asked of the vLLM that is installed. All has to hold
before another version is added; tests/vllm/test_engine.py holds that it works."""

import inspect
from dataclasses import fields

import numpy as np
import pytest
import torch

from stillhouse.engines import _vllm_compat

pytestmark = pytest.mark.filterwarnings("default")
REMEDY = "see to engines/_vllm_compat.py before this version is added"


@pytest.fixture(autouse=True, scope="module")
def environment() -> None:
    _vllm_compat.prepare_environment()


def test_the_installed_version_is_one_that_was_tried() -> None:
    _vllm_compat.require_tried(_vllm_compat.installed_version(), table="teacher")


def test_a_batch_tells_the_tokens_of_each_request_and_keeps_our_parts() -> None:
    from vllm.pooling_params import PoolingParams
    from vllm.v1.pool.metadata import PoolingMetadata, PoolingStates

    params = [PoolingParams(task="token_embed", extra_kwargs={"n": n}) for n in range(2)]
    states = [PoolingStates(), PoolingStates()]
    states[1].hidden_states_cache.append("a part")
    metadata = PoolingMetadata(torch.tensor([5, 9]), None, None, params, states)
    metadata.build_pooling_cursor(np.array([3, 4]), torch.tensor([5, 7]), torch.device("cpu"))
    assert _vllm_compat.requests_of(metadata) == [
        ({"n": 0}, 2, 5, True, []),
        ({"n": 1}, 3, 7, False, ["a part"]),
    ], REMEDY


def test_a_request_carries_our_values_and_is_not_read_from_the_cache() -> None:
    from vllm.pooling_params import PoolingParams

    params = PoolingParams(
        task="token_embed",
        use_activation=False,
        skip_reading_prefix_cache=True,
        extra_kwargs={"places": b"\0\1"},
    )
    again = params.clone()
    assert (again.extra_kwargs, again.skip_reading_prefix_cache) == ({"places": b"\0\1"}, True)


def test_a_worker_is_what_the_named_function_returns() -> None:
    from vllm.config import ParallelConfig
    from vllm.v1.worker.worker_base import WorkerWrapperBase

    assert "worker_cls" in {field.name for field in fields(ParallelConfig)}, REMEDY
    source = inspect.getsource(WorkerWrapperBase.init_worker)
    assert "self.worker = worker_class(**kwargs)" in source, REMEDY


def test_a_config_may_hold_any_value_that_has_a_hash() -> None:
    from vllm.config.utils import SupportsHash

    from stillhouse.engines.vllm_pooler import PoolerPlan

    assert issubclass(PoolerPlan, SupportsHash), REMEDY


def test_workers_are_started_so_that_they_see_their_owner_end() -> None:
    """By spawn: a forked one holds the other end of its own sentinel."""
    from vllm.utils.system_utils import get_mp_context

    assert get_mp_context().get_start_method() == "spawn", REMEDY


def test_an_engine_can_have_its_core_in_this_process() -> None:
    from vllm.v1.engine.llm_engine import LLMEngine

    assert "multiprocess_mode" in inspect.signature(LLMEngine.__init__).parameters, REMEDY


def test_the_sizes_of_heads_with_a_kernel_on_the_cpu_are_told() -> None:
    from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackend

    sizes = CPUAttentionBackend.get_supported_head_sizes()
    assert 16 not in sizes, REMEDY
    assert {64, 128} <= {*sizes}, REMEDY
