"""A writer behind a server that tells log-probabilities: its own tokens are kept where each of them
is one id, with all that was told; else the text is, and the reason is known.

Shapes: N tokens of a sample, K entries of each, V vocabulary.
"""

import json
import math
import signal
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from helpers.buying import BRIEF
from helpers.models import make_model
from helpers.promptserver import Answer, PromptServer, Teller, flat, killed_at_request
from helpers.rollouts import small_rollout_recipe
from stillhouse.config.generate import GenerateConfig, WriterSection
from stillhouse.errors import ServerError
from stillhouse.models.token_bytes import bytes_by_id, token_map
from stillhouse.models.tokenizers import load_tokenizer
from stillhouse.pipeline import plan_generation
from stillhouse.servers.chat import Reply, reply_of
from stillhouse.servers.logprobs import Entry, TokenLogprobs
from stillhouse.store.rollout_recipe import RolloutRecipe
from stillhouse.store.rollout_store import RolloutStore
from stillhouse.store.rollouts import ENDED, Rollouts
from stillhouse.writer.api_tokens import NoTargetsError, sample_of_tokens
from stillhouse.writer.block import PromptBlock, written
from stillhouse.writer.engine import Prompt
from stillhouse.writer.openai import OpenAIWriter

VOCAB_SIZE, END_ID, K = 300, 0, 3
OTHER_SPECIAL = [1, 2]
TEXT = "a snowman: \N{SNOWMAN}"
RECIPE = small_rollout_recipe(
    num_prompts=4, shard_prompts=2, samples=2, sequence_length=60, max_new_tokens=30,
    end_ids=(END_ID,), vocab_size=VOCAB_SIZE, writer_kind="api", top_logprobs=K,
)  # fmt: skip


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("model"), vocab_size=VOCAB_SIZE)


@pytest.fixture(scope="module")
def tokenizer(model: Path) -> PreTrainedTokenizerFast:
    return load_tokenizer(str(model))


def without_special(prompt: list[int]) -> Tensor:
    """[D, V]: a distribution of which turns of a chat are no part."""
    logprobs_DV = flat(prompt, vocab_size=VOCAB_SIZE)
    logprobs_DV[:, OTHER_SPECIAL] = -torch.inf
    return logprobs_DV.log_softmax(dim=1)


def teller_of(tokenizer: PreTrainedTokenizerFast, **changes: Any) -> Teller:
    return Teller(lambda text: tokenizer.encode(text), bytes_by_id(tokenizer), **changes)


@pytest.fixture
def server(tokenizer: PreTrainedTokenizerFast) -> Iterator[PromptServer]:
    server = PromptServer(
        without_special, reply=lambda _request: (TEXT, "stop"), teller=teller_of(tokenizer)
    )
    with server.running() as running:
        yield running


def block_of(number: int) -> PromptBlock:
    source = json.dumps({"messages": [{"role": "user", "content": "Hello?"}]})
    prompts = [
        Prompt(row, np.arange(3, 6, dtype=np.int32), source) for row in RECIPE.shard_rows(number)
    ]
    return PromptBlock(number, prompts, frozenset(range(len(prompts))))


def writer_of(
    model: Path, server: PromptServer, store: Path, recipe: RolloutRecipe = RECIPE, **openai: Any
) -> OpenAIWriter:
    RolloutStore.create(str(store), recipe)
    table = {"base_url": server.base_url, "served_model": "toy", "top_logprobs": K} | openai
    section = WriterSection.model_validate(
        {"model": str(model), "engine": "openai", "openai": table}
    )
    return OpenAIWriter(section, recipe, device="cpu", store_url=str(store), patience=BRIEF)


def logprobs_in(rollouts: Rollouts, row: int) -> tuple[np.ndarray, np.ndarray]:
    """[N, K]: entries and their log-probabilities of a row's sampled places."""
    assert rollouts.top is not None
    places = rollouts.sequences.loss_mask_SL[row] == 1
    return rollouts.top.ids_SLK[row, places], rollouts.top.logprobs_SLK[row, places]


@pytest.mark.parametrize("tells_end", [False, True])
def test_a_sample_is_the_servers_own_tokens_with_what_it_told_of_each(
    model: Path,
    tokenizer: PreTrainedTokenizerFast,
    server: PromptServer,
    tmp_path: Path,
    tells_end: bool,
) -> None:
    # not the ids that the tokenizer would make of the text, but its letters
    letters = [tokenizer.encode(letter)[0] for letter in "the end"]
    server.reply = lambda _request: ("the end", "stop")
    names = bytes_by_id(tokenizer)
    server.teller = Teller(lambda _: [*letters], names, end_id=END_ID if tells_end else None)
    rollouts = written(block_of(0), writer_of(model, server, tmp_path), RECIPE)
    assert rollouts.rows_with_logprobs.all()
    assert set(rollouts.finish_S.tolist()) == {ENDED}
    assert rollouts.sampled_ids(0).tolist() == [*letters, END_ID]
    assert tokenizer.encode("the end") != letters

    # what was told, and of the end only where it was
    wanted_NV = without_special([5, *letters])
    ids_NK, logprobs_NK = logprobs_in(rollouts, 0)
    num_with_logprobs = len(letters) + tells_end
    assert (ids_NK[num_with_logprobs:] == -1).all()
    assert np.isnan(logprobs_NK[num_with_logprobs:]).all()
    best_NK = wanted_NV.topk(K, dim=1).values[:num_with_logprobs]
    np.testing.assert_allclose(logprobs_NK[:num_with_logprobs], best_NK, rtol=1e-6)
    found_NK = wanted_NV[:num_with_logprobs].gather(
        1, torch.from_numpy(ids_NK[:num_with_logprobs]).long()
    )
    np.testing.assert_allclose(found_NK, best_NK, rtol=1e-6)
    sampled = rollouts.sampled_logprobs_SL[0][rollouts.sequences.loss_mask_SL[0] == 1]
    labels = torch.tensor([*letters, END_ID])[:num_with_logprobs, None]
    np.testing.assert_allclose(
        sampled[:num_with_logprobs],
        wanted_NV[:num_with_logprobs].gather(1, labels)[:, 0],
        rtol=1e-6,
    )
    assert np.isnan(sampled[num_with_logprobs:]).all()
    RolloutStore(str(tmp_path), RECIPE).publish(rollouts)  # all values may be stored


def test_it_is_asked_in_the_form_of_each_route(
    model: Path, server: PromptServer, tmp_path: Path
) -> None:
    writer = writer_of(model, server, tmp_path)
    text = Prompt(1, np.array([5], np.int32), json.dumps({"text": "Once"}))
    writer.write([block_of(0).prompts[0], text], [1, 2])
    chat, completion = sorted(server.requests, key=lambda each: str(each["route"]))
    assert (chat["logprobs"], chat["top_logprobs"]) == (True, K)
    assert (completion["logprobs"], "top_logprobs" in completion) == (K, False)


def test_a_completion_tells_by_texts_alone(
    model: Path, tokenizer: PreTrainedTokenizerFast, server: PromptServer, tmp_path: Path
) -> None:
    """Half a character is no text: with one among the entries, the text alone is learnt."""
    halves = [number for number, name in bytes_by_id(tokenizer).items() if name[-1] >= 0x80]

    def printable(prompt: list[int]) -> Tensor:
        logprobs_DV = without_special(prompt)
        logprobs_DV[:, halves] = -torch.inf
        return logprobs_DV

    server.reply = lambda _request: ("the end", "stop")
    prompt = Prompt(0, np.array([5], np.int32), json.dumps({"text": "Once"}))
    for logprobs_of, is_told in ((printable, True), (without_special, False)):
        server.logprobs_of = logprobs_of
        [sample] = writer_of(model, server, tmp_path).write([prompt], [1])
        assert sample is not None
        assert (sample.top_ids_NK is not None) == is_told
        assert sample.ids.tolist() == [*tokenizer.encode("the end"), END_ID]


@pytest.mark.parametrize("changes", [{"temperature": 0.5}, {"top_p": 0.9}])
def test_what_was_drawn_from_another_distribution_has_no_log_probability(
    model: Path, server: PromptServer, tmp_path: Path, changes: dict[str, Any]
) -> None:
    recipe = replace(RECIPE, **changes)
    rollouts = written(block_of(0), writer_of(model, server, tmp_path, recipe), recipe)
    assert rollouts.rows_with_logprobs.all()
    is_sampled_SL = rollouts.sequences.loss_mask_SL == 1
    assert np.isnan(rollouts.sampled_logprobs_SL[is_sampled_SL]).all()


# what a server may say, and what comes of it
# ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def reply(tokenizer: PreTrainedTokenizerFast) -> Reply:
    """Four tokens of a text that ended itself, each with three entries; the last one is half a
    character."""
    ids = tokenizer.encode("x \N{SNOWMAN}")
    names, told = bytes_by_id(tokenizer), []
    for place, token in enumerate(ids):
        others = [names[60 + place], names[70 + place]]
        entries = [Entry(name, math.log(0.4)) for name in (names[token], *others[:1])]
        told.append(TokenLogprobs(entries[0], (*entries, Entry(others[1], math.log(0.1)))))
    return Reply("x \N{SNOWMAN}", "stop", tuple(told))


def with_place(reply: Reply, place: int, told: TokenLogprobs) -> Reply:
    assert reply.logprobs is not None
    return replace(reply, logprobs=(*reply.logprobs[:place], told, *reply.logprobs[place + 1 :]))


def changed_top(reply: Reply, *entries: Entry) -> Reply:
    """With these in place of the last entries of a place."""
    assert reply.logprobs is not None
    told = reply.logprobs[1]
    return with_place(reply, 1, replace(told, top=(*told.top[: K - len(entries)], *entries)))


def told(reply: Reply, tokenizer: PreTrainedTokenizerFast, **changes: Any) -> Any:
    tokens = token_map(tokenizer, end_ids=(END_ID,))
    return sample_of_tokens(reply, tokens, replace(RECIPE, **changes), end_id=END_ID)


def nothing(reply: Reply) -> Reply:
    return replace(reply, logprobs=None)


def no_token(reply: Reply) -> Reply:
    return replace(reply, text="", logprobs=())


def unknown_entry(reply: Reply) -> Reply:
    return changed_top(reply, Entry(b"no such token", -3.0))


def special_entry(reply: Reply) -> Reply:
    return changed_top(reply, Entry(b"<|im_start|>", -3.0))


def unknown_sampled(reply: Reply) -> Reply:
    assert reply.logprobs is not None
    return with_place(reply, 0, replace(reply.logprobs[0], sampled=Entry(b"no such token", -1.0)))


def another_text(reply: Reply) -> Reply:
    return replace(reply, text=f"{reply.text}.")


def a_stripped_text(reply: Reply) -> Reply:
    return replace(reply, text=reply.text.removeprefix("x"))


def an_end_inside(reply: Reply) -> Reply:
    assert reply.logprobs is not None
    end = replace(reply.logprobs[0], sampled=Entry(b"<|endoftext|>", -1.0))
    changed = with_place(reply, 0, end)
    return replace(changed, text=f"<|endoftext|>{reply.text[1:]}")


def an_entry_twice(reply: Reply) -> Reply:
    assert reply.logprobs is not None
    return changed_top(reply, reply.logprobs[1].top[0])


def an_entry_fewer(reply: Reply) -> Reply:
    assert reply.logprobs is not None
    return with_place(reply, 1, replace(reply.logprobs[1], top=reply.logprobs[1].top[:-1]))


def above_one(reply: Reply) -> Reply:
    assert reply.logprobs is not None
    return changed_top(reply, Entry(reply.logprobs[1].top[2].token, math.log(0.202)))


def one_above_one(reply: Reply) -> Reply:
    assert reply.logprobs is not None
    first, second, third = (each.token for each in reply.logprobs[1].top)
    top = (Entry(first, -30.0), Entry(second, 0.01), Entry(third, -31.0))
    return with_place(reply, 1, TokenLogprobs(top[0], top))


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (nothing, "without log-probabilities"),
        (no_token, "without log-probabilities"),
        (unknown_entry, "with a token that is not one id"),
        (special_entry, "with a token that is not one id"),
        (unknown_sampled, "with a token that is not one id"),
        (another_text, "with tokens that are not those of the text"),
        (a_stripped_text, "with tokens that are not those of the text"),
        (an_end_inside, "with tokens that are not those of the text"),
        (an_entry_twice, "with fewer entries"),
        (an_entry_fewer, "with fewer entries"),
        (above_one, "sum to more than 1"),
        (one_above_one, "sum to more than 1"),
    ],
)
def test_a_reply_without_sound_targets_is_refused_by_its_reason(
    reply: Reply,
    tokenizer: PreTrainedTokenizerFast,
    spoil: Callable[[Reply], Reply],
    reason: str,
) -> None:
    assert len(told(reply, tokenizer).ids) == 6
    with pytest.raises(NoTargetsError, match=reason):
        told(spoil(reply), tokenizer)


def test_more_tokens_than_were_asked_for_are_refused(
    reply: Reply, tokenizer: PreTrainedTokenizerFast
) -> None:
    with pytest.raises(NoTargetsError, match="more tokens"):
        told(reply, tokenizer, max_new_tokens=4)
    assert not told(reply, tokenizer, max_new_tokens=5).ended  # no room for an end
    assert not told(replace(reply, finish="length"), tokenizer).ended


def test_rounding_up_to_a_thousandth_is_taken(
    reply: Reply, tokenizer: PreTrainedTokenizerFast
) -> None:
    assert reply.logprobs is not None
    _, second, third = (each.token for each in reply.logprobs[1].top)
    sure = TokenLogprobs(
        replace_logprob(reply.logprobs[1].sampled, 0.0005),
        (
            replace_logprob(reply.logprobs[1].top[0], 0.0005),
            Entry(second, -9999.0),
            Entry(third, -30.0),
        ),
    )
    sample = told(with_place(reply, 1, sure), tokenizer)
    assert sample.top_logprobs_NK[1].tolist() == [0.0, -30.0, -9999.0]
    assert sample.logprobs[1] == 0.0
    unlikely = replace(
        reply.logprobs[1], sampled=replace_logprob(reply.logprobs[1].sampled, -9999.0)
    )
    assert np.isnan(told(with_place(reply, 1, unlikely), tokenizer).logprobs[1])


def replace_logprob(entry: Entry, logprob: float) -> Entry:
    return entry._replace(logprob=logprob)


def test_entries_lie_by_probability_and_ties_by_id(
    reply: Reply, tokenizer: PreTrainedTokenizerFast
) -> None:
    assert reply.logprobs is not None
    swapped = replace(reply.logprobs[1], top=reply.logprobs[1].top[::-1])
    for each in (reply, with_place(reply, 1, swapped)):
        sample = told(each, tokenizer)
        first, second, third = sample.top_ids_NK[1].tolist()
        assert first < second
        assert third == 71


@pytest.mark.parametrize("logprob", [math.nan, -math.inf, None, "-1", -(10**400), -1e300])
def test_a_log_probability_that_is_no_number_tells_nothing(logprob: Any) -> None:
    entry = {"token": "a", "bytes": None, "logprob": logprob}
    content = [entry | {"logprob": -1.0, "top_logprobs": [entry]}]
    choice = {"finish_reason": "stop", "message": {"content": "a"}}
    found = reply_of({"choices": [choice | {"logprobs": {"content": content}}]})
    assert (found.text, found.logprobs is None) == ("a", logprob != "-1")
    assert reply_of({"choices": [choice | {"logprobs": {"content": None}}]}).logprobs is None


@pytest.mark.parametrize("given", [1 << 50, [256], "a", {"a": 1}, [[97]]])
def test_bytes_that_are_none_tell_nothing(given: Any) -> None:
    entry = {"token": "a", "bytes": given, "logprob": -1.0, "top_logprobs": []}
    choice = {"finish_reason": "stop", "text": "a", "logprobs": {"content": [entry]}}
    assert reply_of({"choices": [choice]}).logprobs is None


def test_a_text_is_learnt_as_it_is_where_its_tokens_are_not_told(
    model: Path, tokenizer: PreTrainedTokenizerFast, server: PromptServer, tmp_path: Path
) -> None:
    """One of two samples of each prompt; both are in one shard."""
    server.changed = lambda answer: (
        answer if server.requests[-1]["seed"] % 2 else without_logprobs(answer)
    )
    recipe = replace(RECIPE, samples=8)
    writer = writer_of(model, server, tmp_path, recipe, max_in_flight=1)
    rollouts = written(block_of(0), writer, recipe)
    assert 0 < rollouts.rows_with_logprobs.sum() < len(rollouts)
    for row in range(len(rollouts)):
        assert rollouts.sampled_ids(row).tolist() == [*tokenizer.encode(TEXT), END_ID]
    RolloutStore(str(tmp_path), recipe).publish(rollouts)


def without_logprobs(answer: Answer) -> Answer:
    [choice] = answer["choices"]
    return answer | {"choices": [{name: choice[name] for name in choice if name != "logprobs"}]}


def test_a_server_that_tells_nothing_is_refused_before_anything_is_bought(
    model: Path, server: PromptServer, tmp_path: Path
) -> None:
    writer = writer_of(model, server, tmp_path)
    writer.prove(block_of(0).prompts[0])
    server.changed = without_logprobs
    with pytest.raises(ServerError, match=r"returns no log-probabilities.*set top_logprobs to 0"):
        writer.prove(block_of(0).prompts[0])
    server.reply = lambda _request: ("", "length")  # it thinks for longer than one token
    writer.prove(block_of(0).prompts[0])


# what was paid for
# ------------------------------------------------------------------------------------------------

PAID: dict[str, Any] = {"usd_per_million_input_tokens": 1.0, "usd_per_million_output_tokens": 1.0}


def write_until_killed(model: Path, server: PromptServer, store: Path) -> None:
    """In a process of its own."""
    written(block_of(0), writer_of(model, server, store, **PAID, max_in_flight=1), RECIPE)


def test_a_killed_writer_loses_nothing_of_what_was_told(
    model: Path, server: PromptServer, tmp_path: Path
) -> None:
    died = killed_at_request(server, 4, write_until_killed, model, server, tmp_path)
    assert died == -signal.SIGKILL
    rollouts = written(block_of(0), writer_of(model, server, tmp_path, **PAID), RECIPE)
    assert len(server.requests) == 4 + 1  # the one that was on its way
    assert rollouts.rows_with_logprobs.all()

    # and from what is kept alone the same is made
    again = written(block_of(0), writer_of(model, server, tmp_path, **PAID), RECIPE)
    assert len(server.requests) == 4 + 1
    for name, array in again.tensors.items():
        np.testing.assert_array_equal(array, rollouts.tensors[name])


def test_a_kept_answer_has_what_was_told_as_the_page_says(
    model: Path, tokenizer: PreTrainedTokenizerFast, server: PromptServer, tmp_path: Path
) -> None:
    written(block_of(0), writer_of(model, server, tmp_path, **PAID), RECIPE)
    for path in tmp_path.glob("rollouts/*/purchases/answers/*/*.json"):
        values = json.loads(path.read_text())
        told = values["logprobs"]
        assert b"".join(bytes.fromhex(entries[0][0]) for entries in told).decode() == TEXT
        assert [len(entries) for entries in told] == [1 + K] * len(tokenizer.encode(TEXT))


# the plan
# ------------------------------------------------------------------------------------------------


def test_a_plan_asks_for_as_much_as_the_config_says(
    model: Path, server: PromptServer, tmp_path: Path
) -> None:
    (tmp_path / "q.jsonl").write_text('{"text": "Once"}\n' * 3)

    def recipe_of(**openai: Any) -> RolloutRecipe:
        table = {"base_url": server.base_url, "served_model": "toy"} | openai
        values = {
            "prompts": {"dataset": str(tmp_path / "q.jsonl"), "format": "text"},
            "writer": {"model": str(model), "engine": "openai", "openai": table},
            "sampling": {"max_new_tokens": 20, "sequence_length": 40},
        }
        config = GenerateConfig.model_validate(values)
        return plan_generation(config, run_dir=tmp_path / "g", cache_dir=tmp_path / "c").recipe

    plain, asked = recipe_of(), recipe_of(top_logprobs=5)
    assert (plain.top_logprobs, asked.top_logprobs) == (0, 5)
    assert replace(asked, top_logprobs=0) == plain
