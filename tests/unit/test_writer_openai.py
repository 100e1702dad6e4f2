"""A writer behind a server: what is asked of it, what its text becomes, and what it may cost,
whatever fails on the way."""

import json
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from helpers.buying import BRIEF
from helpers.models import make_model
from helpers.promptserver import Answer, Fault, PromptServer, busy, killed_at_request, num_tokens_of
from helpers.rollouts import small_rollout_recipe
from stillhouse.config.generate import WriterSection
from stillhouse.errors import ServerError, TeacherError
from stillhouse.models.tokenizers import load_tokenizer
from stillhouse.servers.chat import chat_question, text_question
from stillhouse.store.rollout_recipe import RolloutRecipe
from stillhouse.store.rollout_store import RolloutStore
from stillhouse.store.rollouts import CUT, ENDED, SET_ASIDE
from stillhouse.writer.block import PromptBlock, written
from stillhouse.writer.choice import writer_named
from stillhouse.writer.engine import Prompt
from stillhouse.writer.openai import OpenAIWriter, most_usd

VOCAB_SIZE, END_ID = 300, 0
QUESTIONS = ["What is 1 + 2?", "And 3 + 4?", "Say <|im_end|>.", "\ud800"]
ONE_USD_A_TOKEN = 1e6


def recipe_of(**changes: Any) -> RolloutRecipe:
    values = {
        "num_prompts": len(QUESTIONS),
        "shard_prompts": 2,
        "samples": 3,
        "sequence_length": 60,
        "max_new_tokens": 30,
        "end_ids": (END_ID, 7),
        "vocab_size": VOCAB_SIZE,
        "writer_kind": "api",
    }
    return small_rollout_recipe(**values | changes)


RECIPE = recipe_of()


def block_of(number: int, recipe: RolloutRecipe = RECIPE) -> PromptBlock:
    prompts = [
        Prompt(row, np.arange(2, 5 + row, dtype=np.int32), source_of(QUESTIONS[row]))
        for row in recipe.shard_rows(number)
    ]
    return PromptBlock(number, prompts, frozenset(range(len(prompts))))


def source_of(question: str) -> str:
    return json.dumps({"messages": [{"role": "user", "content": question}]})


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("model"), vocab_size=VOCAB_SIZE)


def echo(request: Answer) -> tuple[str, str]:
    """A short text of the question and the seed."""
    asked = request["messages"][-1]["content"] if "messages" in request else request["prompt"]
    return f"{len(asked)} {request['seed'] % 97}", "stop"


@pytest.fixture
def server() -> Iterator[PromptServer]:
    with PromptServer(must_not_score, reply=echo).running() as running:
        yield running


def must_not_score(prompt: list[int]) -> Any:
    raise AssertionError(prompt)


def section_of(model: Path, server: PromptServer, **openai: Any) -> WriterSection:
    table = {"base_url": server.base_url, "served_model": "toy"} | openai
    return WriterSection.model_validate({"model": str(model), "engine": "openai", "openai": table})


def writer_of(
    model: Path, server: PromptServer, store: Path, recipe: RolloutRecipe = RECIPE, **openai: Any
) -> OpenAIWriter:
    RolloutStore.create(str(store), recipe)
    section = section_of(model, server, **openai)
    return OpenAIWriter(section, recipe, device="cpu", store_url=str(store), patience=BRIEF)


PAID: dict[str, Any] = {
    "usd_per_million_input_tokens": ONE_USD_A_TOKEN,
    "usd_per_million_output_tokens": ONE_USD_A_TOKEN,
}


def test_a_conversation_and_a_seed_of_its_own_are_asked_for_each_sample(
    model: Path, server: PromptServer, tmp_path: Path
) -> None:
    assert writer_named("openai") is OpenAIWriter
    recipe = recipe_of(temperature=0.5, top_p=0.7)
    request = {"reasoning_effort": "low"}
    writer = writer_of(model, server, tmp_path, recipe, request=request)
    written(block_of(0, recipe), writer, recipe)
    assert len({each["seed"] for each in server.requests}) == 6
    for each in server.requests:
        del each["seed"]
    assert (
        server.requests.count(
            {
                "model": "toy",
                "messages": [{"role": "user", "content": QUESTIONS[0]}],
                "max_tokens": 30,
                "temperature": 0.5,
                "top_p": 0.7,
                "reasoning_effort": "low",
                "route": "/v1/chat/completions",
            }
        )
        == 3
    )


def test_a_text_is_gone_on_with(model: Path, server: PromptServer, tmp_path: Path) -> None:
    writer = writer_of(model, server, tmp_path)
    writer.write([Prompt(0, np.array([5], np.int32), json.dumps({"text": "Once"}))], [9])
    [request] = server.requests
    assert (request["route"], request["prompt"]) == ("/v1/completions", "Once")


def test_a_reply_is_tokenised_behind_its_prompt_and_ended(
    model: Path, server: PromptServer, tmp_path: Path
) -> None:
    rollouts = written(block_of(0), writer_of(model, server, tmp_path), RECIPE)
    tokenizer = load_tokenizer(str(model))
    for row in range(len(rollouts)):
        prompt = block_of(0).prompts[row // 3]
        ids = rollouts.ids(row)
        assert ids[: len(prompt.ids)].tolist() == prompt.ids.tolist()
        assert ids[-1] == END_ID
        text = tokenizer.decode(rollouts.sampled_ids(row)[:-1].tolist())
        assert str(text).startswith(f"{len(QUESTIONS[prompt.number])} ")
    assert set(rollouts.finish_S.tolist()) == {ENDED}
    RolloutStore(str(tmp_path), RECIPE).publish(rollouts)  # all values may be stored


@pytest.mark.parametrize(
    ("reply", "finish", "num_tokens"),
    [
        (("word " * 99, "stop"), CUT, 30),  # by the student's tokenizer it is longer
        (("word", "length"), CUT, None),
        (("", "stop"), ENDED, 1),
        (("", "length"), SET_ASIDE, 0),  # it only thought
        (("no", "content_filter"), SET_ASIDE, 0),
        (("", "tool_calls"), SET_ASIDE, 0),
    ],
)
def test_a_reply_may_be_cut_withheld_or_empty(
    model: Path,
    server: PromptServer,
    tmp_path: Path,
    reply: tuple[str, str],
    finish: int,
    num_tokens: int | None,
) -> None:
    server.reply = lambda _request: reply
    rollouts = written(block_of(0), writer_of(model, server, tmp_path), RECIPE)
    assert set(rollouts.finish_S.tolist()) == {finish}
    assert num_tokens is None or len(rollouts.sampled_ids(0)) == num_tokens
    assert END_ID not in rollouts.sampled_ids(0)[:-1].tolist()
    RolloutStore(str(tmp_path), RECIPE).publish(rollouts)


def test_what_looks_special_in_a_text_stays_text(
    model: Path, server: PromptServer, tmp_path: Path
) -> None:
    tokenizer = load_tokenizer(str(model))
    special = str(tokenizer.eos_token)
    assert tokenizer(special, add_special_tokens=False)["input_ids"] == [END_ID]
    server.reply = lambda _request: (f"a{special}b", "stop")
    rollouts = written(block_of(0), writer_of(model, server, tmp_path), RECIPE)
    assert rollouts.sampled_ids(0).tolist().count(END_ID) == 1


def test_a_question_is_never_dearer_than_was_reserved_for_it() -> None:
    """A server counts a token for each byte at most, and some around each message."""
    for text in ("", "word " * 50, "\N{SNOWMAN}" * 50, "\ud800"):
        messages = [{"role": "user", "content": text}] * 3
        for question in (
            chat_question(messages, max_tokens=5),
            text_question(text, max_tokens=5),
        ):
            assert question.most_tokens.written == 5
            assert question.most_tokens.prompt >= num_tokens_of(question.fields)


def test_the_newer_name_of_a_limit_stands_in_for_the_older() -> None:
    messages = [{"role": "user", "content": "a"}]
    question = chat_question(messages, max_tokens=5, max_completion_tokens=9)
    assert question.most_tokens.written == 9
    assert question.fields == {"messages": messages, "max_completion_tokens": 9}


def test_what_all_samples_may_cost_is_told_beforehand(
    model: Path, server: PromptServer, tmp_path: Path
) -> None:
    prices: dict[str, Any] = {
        "usd_per_million_input_tokens": 1.0,
        "usd_per_million_output_tokens": 1e6,
    }
    options = section_of(model, server, **prices).openai
    assert options is not None
    most = most_usd(options, RECIPE, map(source_of, QUESTIONS))
    written_alone = len(QUESTIONS) * 3 * 30
    assert written_alone < most < written_alone + 0.01
    writer = writer_of(model, server, tmp_path, **prices, max_cost_usd=most)
    for number in range(2):
        written(block_of(number), writer, RECIPE)
    assert writer.granted_usd() <= most


def test_what_was_paid_for_is_kept_until_its_shard_is_published(
    model: Path, server: PromptServer, tmp_path: Path
) -> None:
    writer = writer_of(model, server, tmp_path, **PAID)
    first = written(block_of(0), writer, RECIPE)
    again = written(block_of(0), writer_of(model, server, tmp_path, **PAID), RECIPE)
    assert len(server.requests) == 6
    np.testing.assert_array_equal(first.sequences.token_ids_SL, again.sequences.token_ids_SL)
    assert len([*tmp_path.glob("rollouts/*/purchases/answers/0000000000/*.json")]) == 6
    RolloutStore(str(tmp_path), RECIPE).publish(first)
    written(block_of(1), writer, RECIPE)
    kept = [*tmp_path.glob("rollouts/*/purchases/answers/*/*.json")]
    assert {path.parent.name for path in kept} == {"0000000001"}


def test_what_costs_nothing_is_not_kept(model: Path, server: PromptServer, tmp_path: Path) -> None:
    written(block_of(0), writer_of(model, server, tmp_path), RECIPE)
    kept = [*tmp_path.glob("rollouts/*/purchases/*")]
    assert [path.name for path in kept] == ["served.json"]


FAULTS = [
    busy(),
    Fault("status", 503, is_charged=False),
    Fault("status", 500),
    Fault("cut"),
    Fault("silent"),
]


def test_a_limit_is_kept_under_every_fault(
    model: Path, server: PromptServer, tmp_path: Path
) -> None:
    """All 12 samples are bought, or the limit is reached; what was charged is never above it."""
    server.faults.extend([None, *FAULTS, None, FAULTS[2], FAULTS[3]])
    limit = 3000.0
    settings = PAID | {"max_cost_usd": limit, "timeout_s": 0.5, "max_in_flight": 2}
    writer = writer_of(model, server, tmp_path, **settings)
    shards = [written(block_of(number), writer, RECIPE) for number in (0, 1)]
    assert sum(len(each) for each in shards) == 12
    num_written = sum(len(echo(each)[0]) for each in server.requests)  # at most
    assert server.num_charged + num_written <= writer.granted_usd() <= limit


def test_a_limit_that_is_too_low_ends_it_and_raising_it_buys_nothing_twice(
    model: Path, server: PromptServer, tmp_path: Path
) -> None:
    settings = PAID | {"max_in_flight": 1}
    writer = writer_of(model, server, tmp_path, **settings, max_cost_usd=480.0)
    with pytest.raises(ServerError, match=r"writer\.openai\.max_cost_usd, which is 480"):
        written(block_of(0), writer, RECIPE)
    num_bought = len(server.requests)
    assert 0 < num_bought < 6
    writer = writer_of(model, server, tmp_path, **settings, max_cost_usd=4000.0)
    written(block_of(0), writer, RECIPE)
    assert len(server.requests) == 6


def write_until_killed(model: Path, server: PromptServer, store: Path) -> None:
    """In a process of its own."""
    writer = writer_of(model, server, store, **PAID, max_cost_usd=9000.0, max_in_flight=1)
    written(block_of(0), writer, RECIPE)


@pytest.mark.parametrize("num_requests", [1, 4])
def test_a_killed_writer_costs_a_request_and_what_is_kept_is_not_bought_again(
    model: Path, server: PromptServer, tmp_path: Path, num_requests: int
) -> None:
    died = killed_at_request(server, num_requests, write_until_killed, model, server, tmp_path)
    assert died == -signal.SIGKILL

    # another one: the request that was on its way is sent again
    writer = writer_of(model, server, tmp_path, **PAID, max_cost_usd=9000.0)
    written(block_of(0), writer, RECIPE)
    assert len(server.requests) == 6 + 1
    num_written = sum(len(echo(each)[0]) for each in server.requests)
    assert server.num_charged + num_written <= writer.granted_usd() <= 9000.0


def test_another_model_under_the_command_is_noticed(
    model: Path, server: PromptServer, tmp_path: Path
) -> None:
    writer = writer_of(model, server, tmp_path)
    written(block_of(0), writer, RECIPE)
    server.changed = lambda answer: answer | {"model": "another"}
    for each in (writer, writer_of(model, server, tmp_path)):  # and by a process that begins later
        with pytest.raises(
            ServerError, match=r"model is 'another'.*served_model of writer\.openai"
        ):
            written(block_of(1), each, RECIPE)


def test_a_prompt_that_the_server_refuses_is_at_fault_itself(
    model: Path, server: PromptServer, tmp_path: Path
) -> None:
    server.faults.append(Fault("status", 400, is_charged=False))
    with pytest.raises(TeacherError, match="status 400"):
        written(block_of(0), writer_of(model, server, tmp_path), RECIPE)


def test_a_server_that_cannot_be_used_is_refused_by_one_token(
    model: Path, server: PromptServer, tmp_path: Path
) -> None:
    writer = writer_of(model, server, tmp_path)
    writer.prove(block_of(0).prompts[0])
    assert server.requests[0]["max_tokens"] == 1
    server.changed = lambda _answer: {"model": "toy", "choices": []}
    with pytest.raises(ServerError, match="no completion"):
        writer.prove(block_of(0).prompts[0])
    server.key = "secret"
    with pytest.raises(ServerError, match=r"401.*writer\.openai.*OPENAI_API_KEY"):
        writer.prove(block_of(0).prompts[0])


def test_the_identity_is_of_names_and_of_what_each_request_adds(
    model: Path, server: PromptServer, tmp_path: Path
) -> None:
    def digest(**openai: Any) -> str:
        section = section_of(model, server, **openai)
        found = OpenAIWriter.identity(section, cache_dir=tmp_path)
        assert (found.kind, found.revision) == ("api", None)
        return found.digest

    asked_for = digest(served_model=None)  # the only one that it lists
    assert asked_for == digest() == digest(max_in_flight=1, **PAID)
    assert len({digest(), digest(served_model="b"), digest(request={"a": 1})}) == 3
