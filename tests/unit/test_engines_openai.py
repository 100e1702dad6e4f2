"""A teacher behind a server: its targets are those of its model, the server's faults are waited
for, and what is no score of the prompt is refused with what to do.

Shapes: D tokens of a document, V vocabulary.
"""

import math
import os
import threading
from collections.abc import Iterator
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from pathlib import Path
from time import monotonic
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from helpers.chunks import make_chunk, small_recipe
from helpers.models import make_model
from helpers.promptserver import Answer, Fault, PromptServer, busy, flat
from helpers.world import TinyWorld
from stillhouse.cluster.processes import local_secrets
from stillhouse.config import ScoringSection, TargetSection, TeacherSection, parse_config
from stillhouse.engines.choice import engine_named, require_capable
from stillhouse.engines.openai import TABLE, OpenAIEngine
from stillhouse.engines.openai_desk import Desk
from stillhouse.engines.openai_scores import Document, Scores, documents_of
from stillhouse.engines.probe import require_same_teacher
from stillhouse.engines.transformers import TransformersEngine
from stillhouse.errors import ConfigError, ServerError, StillhouseError, TeacherError
from stillhouse.logits import CompressedLogits, concatenate, decode
from stillhouse.pipeline.planning import resolved
from stillhouse.pipeline.run_dir import changes_that_matter
from stillhouse.redaction import scrub
from stillhouse.retry import Patience
from stillhouse.sequence import WorkItem
from stillhouse.servers.client import Access, Server

V = 300
RECIPE = small_recipe(
    format=2, k=8, label_logprob=True, teacher_kind="api", sequence_length=24, num_sequences=16
)
ITEM = WorkItem(1, make_chunk(RECIPE, 1).sequences)
DOCUMENT = next(documents_of(ITEM))
LONG = Patience(end_after_s=60.0, first_pause_s=0.01, last_pause_s=0.05)
SHORT = replace(LONG, end_after_s=1.0)


@pytest.fixture
def server() -> Iterator[PromptServer]:
    with PromptServer(flat).running() as running:
        yield running


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("t"), vocab_size=V, weight_std=0.3, seed=1)


def section_of(server: PromptServer, model: Path | str = "toy", **options: Any) -> TeacherSection:
    values = {"base_url": server.base_url, "served_model": "toy", **options}
    return TeacherSection(
        model=str(model), dtype="float32", engine="openai", openai=ScoringSection(**values)
    )


def engine_of(server: PromptServer, folder: Path, **options: Any) -> OpenAIEngine:
    section = section_of(server, **options)
    return OpenAIEngine(section, RECIPE, device="cpu", store_url=str(folder / "store"))


def client_of(server: PromptServer, patience: Patience = SHORT, **options: Any) -> Server:
    openai = section_of(server, **options).openai
    assert openai is not None
    return Server(openai, table=TABLE, access=Access(), patience=patience)


def asked(client: Server, document: Document = DOCUMENT) -> Scores:
    desk = Desk(client, None, num_entries=8, vocab_size=V)
    return desk.scores(document, threading.Event())


# --- targets ---


def test_the_targets_are_those_of_the_model_behind_the_server(
    teacher: Path, tmp_path: Path
) -> None:
    model = AutoModelForCausalLM.from_pretrained(teacher, dtype=torch.float32).eval()

    @torch.inference_mode()
    def logprobs_of(prompt: list[int]) -> Tensor:
        logits_DV: Tensor = model(torch.tensor([prompt])).logits[0]
        return logits_DV.log_softmax(dim=1)

    local = TeacherSection(model=str(teacher), dtype="float32")
    wanted = concatenate(TransformersEngine(local, RECIPE, device="cpu").targets(ITEM))
    with PromptServer(logprobs_of).running() as server:
        engine = engine_of(server, tmp_path, model=teacher)
        found = concatenate(engine.targets(ITEM))
        records = torch.cat([part.records_TB for part in engine.records(ITEM)])
    assert torch.equal(found.token_ids_TK, wanted.token_ids_TK)
    for name in ("logprobs_TK", "tail_logmass_T", "label_logprob_T"):
        torch.testing.assert_close(
            getattr(found, name), getattr(wanted, name), atol=2e-5, rtol=1e-5
        )
    assert torch.equal(decode(records, RECIPE.spec).token_ids_TK.sort()[0], ids_sorted(wanted))


def ids_sorted(targets: CompressedLogits) -> Tensor:
    return targets.token_ids_TK.sort().values


def test_equal_log_probabilities_are_in_the_order_of_their_ids(
    server: PromptServer, tmp_path: Path
) -> None:
    """Every 101st id has the same logit in `flat`, so ties are everywhere."""
    targets = concatenate(engine_of(server, tmp_path).targets(ITEM))
    steps_TK, ties_TK = targets.logprobs_TK.diff(), targets.token_ids_TK.diff() > 0
    assert (steps_TK <= 0).all()
    assert (steps_TK == 0).any()
    assert ties_TK[steps_TK == 0].all()


def test_a_document_is_one_request_up_to_its_last_label() -> None:
    ids = np.arange(10, dtype=np.int32)[None]
    positions = np.array([[0, 1, 2, 3, 0, 1, 2, 3, 4, 0]], np.int32)
    mask = np.array([[1, 1, 0, 0, 0, 1, 1, 0, 0, 0]], np.uint8)
    item = WorkItem(0, replace(ITEM.sequences.select(slice(1)), token_ids_SL=ids,
                               positions_SL=positions, loss_mask_SL=mask))  # fmt: skip
    sent = [(each.token_ids_D.tolist(), each.targets_T.tolist()) for each in documents_of(item)]
    assert sent == [([0, 1, 2], [0, 1]), ([4, 5, 6, 7], [1, 2])]


def test_what_the_entries_leave_is_the_tail_even_where_it_is_nothing(
    server: PromptServer, tmp_path: Path
) -> None:
    def one_hot(prompt: list[int]) -> Tensor:
        logits_DV = torch.zeros(len(prompt), V)
        logits_DV[:, 7] = 200.0
        return logits_DV.log_softmax(dim=1)

    server.logprobs_of = one_hot
    targets = concatenate(engine_of(server, tmp_path).targets(ITEM))
    assert (targets.tail_logmass_T == -math.inf).all()
    records = [part.records_TB for part in engine_of(server, tmp_path).records(ITEM)]
    assert (decode(torch.cat(records), RECIPE.spec).token_ids_TK[:, 0] == 7).all()


def test_an_item_without_targets_has_a_part_without_rows_and_asks_nothing(
    server: PromptServer, tmp_path: Path
) -> None:
    (part,) = engine_of(server, tmp_path).records(ITEM.without(range(4)))
    assert part.records_TB.shape == (0, RECIPE.spec.bytes_per_token)
    assert server.prompts == []


def test_no_more_requests_are_on_their_way_than_were_allowed(
    server: PromptServer, tmp_path: Path
) -> None:
    pair = threading.Barrier(2)  # which fewer than two at one time do not pass

    def wait_for_another(_prompt: list[int]) -> None:
        if len(server.prompts) <= 2:
            pair.wait(10)

    server.arrived = wait_for_another
    concatenate(engine_of(server, tmp_path, max_in_flight=2).targets(ITEM))
    assert (server.num_most, len(server.prompts)) == (2, len([*documents_of(ITEM)]))


def test_replicas_agree_and_one_with_another_model_does_not(
    server: PromptServer, tmp_path: Path
) -> None:
    first, other = (engine_of(server, tmp_path).probe() for _ in range(2))
    require_same_teacher(first, other, replica=1)
    assert first.rounding_kl == pytest.approx(0.0, abs=1e-6)
    server.logprobs_of = lambda prompt: flat([token + 1 for token in prompt])
    with pytest.raises(TeacherError, match="replica 1 disagrees"):
        require_same_teacher(first, engine_of(server, tmp_path).probe(), replica=1)


# --- what is refused, by the first request ---


def without_scores(answer: Answer) -> Answer:
    answer["choices"][0].pop("prompt_logprobs")
    return answer


def by_text(answer: Answer) -> Answer:
    listed = answer["choices"][0]["prompt_logprobs"]
    answer["choices"][0]["prompt_logprobs"] = [
        each and {f"token {name}": value for name, value in each.items()} for each in listed
    ]
    return answer


def cut_short(answer: Answer) -> Answer:
    answer["choices"][0]["prompt_logprobs"].pop()
    return answer


def fewer(answer: Answer) -> Answer:
    for entries in answer["choices"][0]["prompt_logprobs"][1:]:
        entries.pop(next(reversed(entries)))
        entries.pop(next(reversed(entries)))
    return answer


def scaled(answer: Answer, factor: float) -> Answer:
    for entries in answer["choices"][0]["prompt_logprobs"][1:]:
        for entry in entries.values():
            entry["logprob"] *= factor
    return answer


def normalised(answer: Answer) -> Answer:
    for entries in answer["choices"][0]["prompt_logprobs"][1:]:
        best = sorted((entry["logprob"] for entry in entries.values()), reverse=True)[:20]
        mass = math.fsum(map(math.exp, best))
        for entry in entries.values():
            entry["logprob"] -= math.log(mass)
        for token in [t for t, e in entries.items() if e["logprob"] < best[-1] - math.log(mass)]:
            entries[token]["logprob"] = -9999.0  # the token's own, beyond the best
    return answer


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        (without_scores, "does not score prompts: its answer has no prompt_logprobs by token id"),
        (by_text, "no prompt_logprobs by token id"),
        (lambda _: {"object": "error"}, "does not score prompts"),
        (cut_short, "scored 23 tokens of a prompt of 24"),
        (fewer, r"gave 19 entries for token \d+ of a prompt.*--max-logprobs 20"),
        (lambda answer: scaled(answer, 0.1), "sum to .* wanted log-probabilities of the full"),
        (normalised, "sum to 1 after every token of random text"),
    ],
)
def test_what_does_not_score_a_prompt_is_refused_by_the_first_request(
    server: PromptServer, tmp_path: Path, changed: Any, words: str
) -> None:
    server.changed = changed
    with pytest.raises(ServerError, match=words):
        engine_of(server, tmp_path).prove()
    assert len(server.prompts) == 1


def test_a_server_for_shorter_prompts_is_refused_before_any_request(
    server: PromptServer, tmp_path: Path
) -> None:
    server.max_model_len = 24
    with pytest.raises(ServerError, match=r"24 tokens at most.*wanted 25: .*--max-model-len 25"):
        engine_of(server, tmp_path).prove()
    assert server.prompts == []
    server.max_model_len = 25
    engine_of(server, tmp_path).prove()


def test_ids_that_the_tokenizer_does_not_have_are_refused(
    server: PromptServer, tmp_path: Path
) -> None:
    server.logprobs_of = lambda prompt: flat(prompt, vocab_size=V + 900)
    with pytest.raises(TeacherError, match="some are beyond the tokenizer's 300"):
        [*engine_of(server, tmp_path).records(ITEM)]


def test_numbers_that_are_not_finite_are_the_fault_of_the_document(
    server: PromptServer, tmp_path: Path
) -> None:
    server.changed = lambda answer: scaled(answer, math.nan)
    with pytest.raises(TeacherError, match="wanted finite numbers"):
        [*engine_of(server, tmp_path).records(ITEM)]


# --- patience ---


@pytest.mark.parametrize(
    "faults",
    [
        [busy(), busy("0"), busy("0.2")],
        [Fault("status", 500), Fault("status", 502), Fault("status", 503, is_charged=False)],
        [Fault("cut"), Fault("cut")],
        [Fault("silent")],
    ],
    ids=lambda faults: str(faults[0].kind) + str(faults[0].status),
)
def test_what_another_request_may_mend_is_asked_again(
    server: PromptServer, faults: list[Fault]
) -> None:
    server.faults.extend(faults)
    began = monotonic()
    timeout_s = 1.0 if faults[0].kind == "silent" else 60.0
    assert len(asked(client_of(server, LONG, timeout_s=timeout_s)).label_logprob_T)
    assert len(server.prompts) == len(faults) + 1
    if faults[-1].retry_after is not None:
        assert monotonic() - began >= 0.2


def test_a_date_to_wait_for_is_heeded_too(server: PromptServer) -> None:
    soon = datetime.now(UTC).replace(microsecond=0) + timedelta(seconds=1)
    wall = soon.timestamp() - 0.3
    server.faults.append(busy(format_datetime(soon, usegmt=True)))
    openai = section_of(server).openai
    assert openai is not None
    began = monotonic()
    asked(Server(openai, table=TABLE, access=Access(), patience=LONG, wall=lambda: wall))
    assert monotonic() - began >= 0.3


def test_a_wait_that_is_longer_than_the_patience_ends_at_once(server: PromptServer) -> None:
    server.faults.append(busy("7200"))
    with pytest.raises(ServerError, match=r"next try would be in 7200 s.*not now.*given up after"):
        asked(client_of(server))
    assert len(server.prompts) == 1


def test_a_server_that_stays_away_is_given_up_with_its_last_words(server: PromptServer) -> None:
    client = client_of(server, replace(SHORT, end_after_s=0.1))
    server.faults.extend([Fault("status", 500)] * 50)
    with pytest.raises(ServerError, match=r"status 500: .*not now.*run again to go on"):
        asked(client)
    server.faults.clear()
    nobody = client_of(server, replace(SHORT, end_after_s=0.1), base_url="http://127.0.0.1:1/v1")
    with pytest.raises(ServerError, match=r"127\.0\.0\.1:1/v1 has not answered.*ConnectError"):
        asked(nobody)


def test_a_document_at_which_alone_the_server_fails_is_at_fault_itself(
    server: PromptServer,
) -> None:
    client = client_of(server, replace(SHORT, end_after_s=0.4))
    other = next(
        each for each in documents_of(ITEM) if len(each.token_ids_D) != len(DOCUMENT.token_ids_D)
    )

    def fails_at(answer: Answer) -> Answer:
        if len(answer["choices"][0]["prompt_logprobs"]) == len(DOCUMENT.token_ids_D):
            asked(client, other)
            raise ConnectionError  # the connection is cut
        return answer

    server.changed = fails_at
    with pytest.raises(TeacherError, match="while it answers others"):
        asked(client)


@pytest.mark.parametrize(
    ("status", "kind"),
    [(400, TeacherError), (413, TeacherError), (403, ServerError), (302, ServerError)],
)
def test_other_refusals_are_told_at_once_in_the_servers_words(
    server: PromptServer, status: int, kind: type[StillhouseError]
) -> None:
    server.faults.append(Fault("status", status, is_charged=False))
    with pytest.raises(kind, match=f"status {status}: .*not now"):
        asked(client_of(server))
    assert len(server.prompts) == 1


@pytest.mark.parametrize("name", ["model", "system_fingerprint"])
def test_another_model_under_the_run_is_noticed(server: PromptServer, name: str) -> None:
    client = client_of(server)
    server.changed = lambda answer: answer | {name: "first"}
    asked(client)
    server.changed = lambda answer: answer | {name: "second"}
    with pytest.raises(ServerError, match=f"its answers' {name} is 'second', but it was 'first'"):
        asked(client)


def test_one_failure_ends_the_waiting_of_all(server: PromptServer, tmp_path: Path) -> None:
    server.faults.extend([busy("500"), busy("500"), Fault("status", 403, is_charged=False)])
    began = monotonic()
    with pytest.raises(ServerError, match="status 403"):
        [*engine_of(server, tmp_path, max_in_flight=3).records(ITEM)]
    assert monotonic() - began < 60


# --- keys, names and settings ---


def test_the_key_goes_to_the_server_and_nowhere_else(
    server: PromptServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    server.key = "a-key-of-1234567890"
    monkeypatch.setenv("MY_SERVER", server.key)
    engine = engine_of(server, tmp_path, api_key_env="MY_SERVER")
    engine.prove()
    assert scrub(f"it is {server.key}") == "it is (redacted)"
    openai = section_of(server).openai
    assert openai is not None
    client = Server(openai, table=TABLE, access=Access(server.key))
    assert server.key not in repr(vars(client)) + repr(vars(engine))
    with pytest.raises(ServerError, match=r"status 401: .*the variable OPENAI_API_KEY"):
        engine_of(server, tmp_path).prove()
    with pytest.raises(ServerError, match="holds no key") as caught:
        Server(openai, table=TABLE, access=Access(f"{server.key}\n"))
    assert server.key not in str(caught.value)


def test_the_key_travels_to_another_process_and_is_not_shown(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("MY_SERVER", "a-key-of-0987654321\n")
    secrets = local_secrets("MY_SERVER", "NOT_SET_ANYWHERE")
    assert secrets.keys == {"MY_SERVER": "a-key-of-0987654321"}
    assert "0987654321" not in repr(secrets)
    monkeypatch.delenv("MY_SERVER")  # as in the other process
    replace(secrets, hub_token=None).adopt()
    assert os.environ["MY_SERVER"] == "a-key-of-0987654321"
    assert scrub("a-key-of-0987654321") == "(redacted)"


def test_the_identity_is_of_names_and_not_of_addresses(
    server: PromptServer, tmp_path: Path
) -> None:
    def digest(model: str = "org/model", revision: str | None = None, **options: Any) -> str:
        section = section_of(server, model, **options).model_copy(update={"revision": revision})
        found = OpenAIEngine.identity(section, cache_dir=tmp_path)
        assert (found.kind, found.revision) == ("api", revision)
        return found.digest

    same = {digest(), digest(base_url="http://elsewhere:1/v1"), digest(served_model=None)}
    others = {digest("org/other"), digest(revision="v2"), digest(served_model="other")}
    assert (len(same), len(same | others)) == (1, 4)
    assert server.prompts == []


@pytest.mark.parametrize("names", [(), ("a", "b")])
def test_of_several_models_one_has_to_be_named(
    server: PromptServer, tmp_path: Path, names: tuple[str, ...]
) -> None:
    server.names = names
    with pytest.raises(ServerError, match=r"lists \d models.*name it in teacher.openai.served_mod"):
        OpenAIEngine.identity(section_of(server, served_model=None), cache_dir=tmp_path)


@pytest.mark.parametrize(
    ("target", "words"),
    [
        ({"k": 21, "tail_draws": 0}, "gives 20 entries at most"),
        ({}, "target.tail_draws is 40, but the engine .* set it to 0"),
        ({"tail_draws": 0, "temperature": 2.0}, "target.temperature is 2, .* set it to 1"),
        ({"tail_draws": 0, "tail_entropy": True}, "target.tail_entropy is true"),
    ],
)
def test_targets_that_no_served_prompt_has_are_refused(
    server: PromptServer, target: dict[str, Any], words: str
) -> None:
    capabilities = engine_named("openai").describe(section_of(server))
    with pytest.raises(ConfigError, match=words):
        require_capable(capabilities, TargetSection(**target), engine="openai")
    fits = TargetSection(k=20, tail_draws=0, label_logprob=True)
    require_capable(capabilities, fits, engine="openai")


@pytest.mark.parametrize(
    ("teacher_values", "words"),
    [
        ({"engine": "openai"}, r"openai is missing.*\[teacher.openai\] base_url"),
        (
            {"openai": {"base_url": "http://a/v1"}},
            'engine is "transformers"; set engine = "openai"',
        ),
        ({"openai": {"base_url": "a:8000"}}, r"base_url: wanted http://"),
        ({"openai": {"base_url": "http://me:secret-word@a/v1"}}, "without a user"),
        ({"openai": {"base_url": "http://a/v1", "api_key_env": "sk-secret-word"}}, "the NAME of"),
        ({"openai": {"base_url": "http://a/v1", "max_cost_usd": 5}}, "nothing would be counted"),
        ({"openai": {"base_url": "http://a/v1", "max_tokens": 5}}, "no such setting"),
    ],
)
def test_settings_that_do_not_fit_are_refused(teacher_values: dict[str, Any], words: str) -> None:
    values = {
        "corpus": {"dataset": "d"},
        "teacher": {"model": "t"} | teacher_values,
        "student": {"model": "s"},
    }
    with pytest.raises(ConfigError, match=words) as caught:
        parse_config(values)
    assert "secret-word" not in str(caught.value)


def test_a_plan_names_the_api_and_is_made_again_without_it(tmp_path: Path) -> None:
    world = TinyWorld.make(tmp_path)
    (tmp_path / "teacher" / "model.safetensors").unlink()  # only its tokenizer is here
    with PromptServer(flat, names=("org/served",)).running() as server:
        openai = {"base_url": server.base_url}
        teacher = {"engine": "openai", "openai": openai, "revision": "of May"}
        target = {"tail_draws": 0, "label_logprob": True}
        plan = world.plan(tmp_path / "run", teacher=teacher, target=target)
    assert (plan.recipe.teacher_kind, plan.recipe.teacher_dtype) == ("api", "as served")
    assert plan.config.teacher.openai is not None
    assert plan.config.teacher.openai.served_model == "org/served"
    again = resolved(plan.config, run_dir=tmp_path / "run", cache_dir=tmp_path / "cache")
    assert (again.recipe, again.config) == (plan.recipe, plan.config)
    assert not changes_that_matter(plan.config, again.config)
