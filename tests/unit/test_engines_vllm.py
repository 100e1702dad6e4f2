"""The engine `vllm`, its parts that need no vLLM: settings, refusals, requests, and the pooler on a
stand-in for vLLM's batches.

Shapes: S sequences, L positions, T target tokens, H hidden.
"""

from collections.abc import Mapping, Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from helpers.chunks import make_chunk, small_recipe
from stillhouse.config import TeacherSection, parse_config
from stillhouse.engines import _vllm_compat
from stillhouse.engines.base import draw_seeds
from stillhouse.engines.choice import engine_named
from stillhouse.engines.vllm import VllmEngine, requests_of
from stillhouse.engines.vllm_config import arguments_of
from stillhouse.engines.vllm_pooler import (
    PoolerPlan,
    Question,
    RecordsPooler,
    pack,
    read_answer,
    unpack,
)
from stillhouse.errors import ConfigError, TeacherError
from stillhouse.logits import Head, TargetSpec, compress_hidden, encode
from stillhouse.models.batch import TokenBatch
from stillhouse.models.head_files import HeadPlan
from stillhouse.pipeline.planning import number_format
from stillhouse.sequence import WorkItem

RECIPE = small_recipe(
    sequence_length=24,
    k=6,
    num_draws=9,
    weighted=True,
    label_logprob=True,
    tail_entropy=True,
    format=2,
)
SPEC = RECIPE.spec
H = 16


def teacher(**settings: Any) -> TeacherSection:
    given = {"model": "owner/name", "engine": "vllm", "dtype": "float32", "block_tokens": 7}
    return TeacherSection.model_validate(given | settings)


def item() -> WorkItem:
    return WorkItem(2, make_chunk(RECIPE).sequences)


# settings and refusals


def test_three_lines_choose_the_engine() -> None:
    section = TeacherSection(model="Qwen/Qwen3-30B-A3B-FP8", engine="vllm", num_gpus=8)
    arguments = arguments_of(section, sequence_length=4096, device="cuda")
    assert engine_named(section.engine) is VllmEngine
    assert arguments["tensor_parallel_size"] == 8
    assert arguments["distributed_executor_backend"] == "mp"
    assert (arguments["dtype"], arguments["max_model_len"]) == ("bfloat16", 4096)
    assert "quantization" not in arguments  # the model's files say


def test_on_the_cpu_one_process_has_a_cache_of_one_gigabyte() -> None:
    arguments = arguments_of(teacher(), sequence_length=64, device="cpu")
    assert arguments["distributed_executor_backend"] == "uni"
    assert (arguments["tensor_parallel_size"], arguments["kv_cache_memory_bytes"]) == (1, 10**9)


def test_vllms_settings_with_another_engine_are_refused() -> None:
    with pytest.raises(ConfigError, match='engine is "transformers", which does not read them'):
        parse_config(
            {
                "corpus": {"dataset": "x"},
                "teacher": {"model": "t", "vllm": {"quantization": "fp8"}},
                "student": {"model": "s"},
            }
        )


@pytest.mark.parametrize("found", ["0.29.0", "0.33.0", "1.32", "0.3.2"])
def test_another_version_than_those_tried_is_refused(found: str) -> None:
    with pytest.raises(ConfigError, match=f"vLLM {found} is installed; wanted version 0.32"):
        _vllm_compat.require_tried(found, table="teacher")


@pytest.mark.parametrize("found", ["0.32.0", "0.32.1", "0.32.0rc1", "0.32.0+cpu"])
def test_the_versions_tried_are_accepted(found: str) -> None:
    _vllm_compat.require_tried(found, table="teacher")


def test_an_absent_vllm_is_named_with_two_ways_to_have_it() -> None:
    with pytest.raises(ConfigError, match=r"stillhouse\[vllm\].*teacher\.python"):
        _vllm_compat.require_tried(None, table="teacher")


@pytest.mark.parametrize(
    ("settings", "wanted"),
    [
        ({}, "bfloat16+float32"),
        ({"logits": "fast"}, "bfloat16"),
        ({"vllm": {"tensor_parallel": 2, "max_batched_tokens": 64}}, "bfloat16+float32"),
        ({"vllm": {"quantization": "fp8"}}, "bfloat16+float32+fp8 weights"),
        (
            {"dtype": "float16", "vllm": {"quantization": "awq", "kv_cache_dtype": "fp8"}},
            "float16+float32+awq weights+fp8 cache",
        ),
    ],
)
def test_thenumber_format_says_what_moves_the_distribution(
    settings: Mapping[str, Any], wanted: str
) -> None:
    assert number_format(teacher(**({"dtype": "bfloat16"} | dict(settings)))) == wanted


# requests


def test_requests_are_the_documents_up_to_their_last_targets() -> None:
    sequences = item().sequences
    requests = requests_of(item(), RECIPE, num_sampled=10)
    batch, seen = TokenBatch.of(sequences), []
    for ids, question in requests:
        row = question.sequence - 2 * RECIPE.chunk_sequences
        columns_T = question.places_T + question.first_column
        assert sequences.positions_SL[row, question.first_column] == 0
        assert ids == sequences.token_ids_SL[row, question.first_column :][: len(ids)].tolist()
        assert question.places_T[-1] == len(ids) - 1
        seen += [(row, column) for column in columns_T.tolist()]
    assert seen == [*zip(*np.nonzero(sequences.loss_mask_SL), strict=True)]
    labels_T = np.concatenate([question.labels_T for _, question in requests])
    assert torch.equal(torch.from_numpy(labels_T).long(), batch.labels_T)
    assert sum(question.num_sampled for _, question in requests) == 10


def test_a_question_travels_as_plain_values() -> None:
    _, question = requests_of(item(), RECIPE, num_sampled=3)[0]
    again = Question.of(question.fields, num_tokens=99)
    assert again.fields == question.fields
    assert all(isinstance(value, bytes | int) for value in question.fields.values())


# the pooler


HEAD = Head(torch.randn((RECIPE.vocab_size, H), generator=torch.Generator().manual_seed(0)))
PLAN = PoolerPlan(
    teacher(),
    RECIPE,
    HeadPlan(RECIPE.vocab_size, ("lm_head.weight",), (), scale=1.0, softcap=None),
    probe_spec=TargetSpec(RECIPE.vocab_size, 20),
)


def a_pass(
    requests: Sequence[tuple[list[int], Question]],
    states: Sequence[Any],
    spans: Sequence[tuple[int, int]],
) -> Any:
    """What vLLM gives to a pooler: some tokens of each request, by first and last."""
    cursor = SimpleNamespace(
        seq_lens_cpu=torch.tensor([end for _, end in spans]),
        num_scheduled_tokens_cpu=torch.tensor([end - begin for begin, end in spans]),
        get_finished_mask=lambda: [
            end == len(ids) for (ids, _), (_, end) in zip(requests, spans, strict=True)
        ],
    )
    return SimpleNamespace(
        get_pooling_cursor=lambda: cursor,
        pooling_params=[SimpleNamespace(extra_kwargs=question.fields) for _, question in requests],
        pooling_states=states,
    )


def new_states(number: int) -> list[Any]:
    return [SimpleNamespace(hidden_states_cache=[]) for _ in range(number)]


def hidden_of(ids: Sequence[int]) -> Tensor:
    """Hidden states that depend on the token alone."""
    table_VH = torch.randn((RECIPE.vocab_size, H), generator=torch.Generator().manual_seed(1))
    return table_VH[torch.tensor(ids, dtype=torch.long)]


def asked_in(
    passes: Sequence[Sequence[tuple[int, int] | None]],
    requests: Sequence[tuple[list[int], Question]],
) -> list[Tensor | None]:
    """The last answers to requests of which each pass computes some tokens, or none."""
    pooler = RecordsPooler(PLAN, HEAD, first_id=0, group=None)
    states, answers = new_states(len(requests)), [None] * len(requests)
    found: list[Tensor | None] = list(answers)
    for spans in passes:
        here = [number for number, span in enumerate(spans) if span is not None]
        some = [span for span in spans if span is not None]
        ids = [
            token
            for number, (begin, end) in zip(here, some, strict=True)
            for token in requests[number][0][begin:end]
        ]
        batch = a_pass([requests[n] for n in here], [states[n] for n in here], some)
        for number, answer in zip(here, pooler(hidden_of(ids), batch), strict=True):
            found[number] = answer
    return found


def test_answers_are_the_targets_of_the_hidden_states() -> None:
    requests = requests_of(item(), RECIPE, num_sampled=10)
    answers = asked_in([[(0, len(ids)) for ids, _ in requests]], requests)
    batch = TokenBatch.of(item().sequences)
    wanted = compress_hidden(
        hidden_of(batch.token_ids_BL.flatten()[batch.target_positions_T].tolist()),
        HEAD,
        spec=SPEC,
        seeds_T=draw_seeds(item(), RECIPE).flatten()[batch.target_positions_T],
        labels_T=batch.labels_T,
    )
    parts = [
        read_answer(answer, question, SPEC)
        for answer, (_, question) in zip(answers, requests, strict=True)
        if answer is not None
    ]
    assert torch.equal(torch.cat([part.records_TB for part in parts]), encode(wanted, SPEC))
    for name, tensor in wanted.tensors.items():
        sampled = torch.cat([part.sample.tensors[name] for part in parts])
        torch.testing.assert_close(sampled, tensor[:10], atol=1e-6, rtol=1e-6)


def test_chunks_of_a_request_and_one_begun_anew_change_nothing() -> None:
    requests = requests_of(item(), RECIPE, num_sampled=10)
    requests = sorted(requests, key=lambda request: -len(request[0]))[:2]
    first, second = (len(ids) for ids, _ in requests)
    assert first > 4
    whole = asked_in([[(0, first), (0, second)]], requests)
    parts: list[list[tuple[int, int] | None]] = [
        [(0, 2), None],
        [(2, first - 1), (0, second)],
        [(first - 1, first), None],
    ]
    chunks = asked_in(parts, requests)
    anew = asked_in([[(0, first - 1), None], [(0, 3), None], [(3, first), (0, second)]], requests)
    for found in (chunks, anew):
        for answer, wanted in zip(found, whole, strict=True):
            assert answer is not None
            assert wanted is not None
            assert torch.equal(answer, wanted)


def test_a_probe_is_asked_by_its_own_spec() -> None:
    requests = requests_of(item(), RECIPE, num_sampled=10**6, is_probe=True)
    answers = asked_in([[(0, len(ids)) for ids, _ in requests]], requests)
    assert answers[0] is not None
    part = read_answer(answers[0], requests[0][1], PLAN.probe_spec)
    assert part.sample.num_tokens == len(requests[0][1].places_T) == len(part.records_TB)
    assert (part.sample.k, part.sample.num_draws) == (20, 0)


def test_what_vllm_makes_up_to_measure_memory_is_answered() -> None:
    pooler = RecordsPooler(PLAN, HEAD, first_id=0, group=None)
    _, question = requests_of(item(), RECIPE, num_sampled=0)[0]
    batch = a_pass([([0] * 5, question)], new_states(1), [(0, 5)])
    batch.pooling_params[0].extra_kwargs = None
    [answer] = pooler(hidden_of([0] * 5), batch)
    assert answer is not None
    assert len(answer) == 1 + 5 * SPEC.bytes_per_token


def test_a_failure_is_an_answer_that_raises_where_it_is_read() -> None:
    requests = requests_of(item(), RECIPE, num_sampled=10)[:1]
    pooler = RecordsPooler(PLAN, HEAD, first_id=0, group=None)
    ids, question = requests[0]
    batch = a_pass(requests, new_states(1), [(0, len(ids))])
    [answer] = pooler(hidden_of(ids) * torch.nan, batch)
    assert answer is not None
    with pytest.raises(TeacherError, match=r"in a forward pass with sequence .* no distribution"):
        read_answer(answer, question, SPEC)


@pytest.mark.parametrize("num_tokens", [0, 1, 5])
@pytest.mark.parametrize("k", [0, 4])
def test_packed_targets_come_back(num_tokens: int, k: int) -> None:
    spec = TargetSpec(RECIPE.vocab_size, k, num_draws=3, label_logprob=True)
    targets = compress_hidden(
        hidden_of([5] * num_tokens),
        HEAD,
        spec=spec,
        seeds_T=torch.arange(num_tokens),
        labels_T=torch.zeros(num_tokens, dtype=torch.long),
    )
    found = unpack(pack(targets, slice(None)).flatten(), spec)
    assert found.tensors.keys() == targets.tensors.keys()
    for name, tensor in targets.tensors.items():
        assert torch.equal(found.tensors[name], tensor)
