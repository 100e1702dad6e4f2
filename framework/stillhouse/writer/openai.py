"""`OpenAIWriter`: a model behind a server with OpenAI's API writes; its text is tokenised for those
who learn from it, unless the server returns its tokens and all of them are theirs.

A chat's messages go to /chat/completions, a text to /completions. What was paid for is kept in the
store until its shard is published.
"""

import hashlib
import json
import logging
import threading
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from stillhouse.config.generate import WriterSection
from stillhouse.config.servers import WritingSection
from stillhouse.errors import ServerError
from stillhouse.models.identity import ModelIdentity, is_local
from stillhouse.models.token_bytes import token_map
from stillhouse.models.tokenizers import load_tokenizer
from stillhouse.retry import DEFAULT_PATIENCE, Patience
from stillhouse.servers.access import access_of, served_model
from stillhouse.servers.answers import answers_of
from stillhouse.servers.chat import Reply, chat_question, reply_of, text_question
from stillhouse.servers.client import Question, Server
from stillhouse.servers.desk import all_answers
from stillhouse.servers.logprobs import logprobs_in, logprobs_in_json
from stillhouse.store.recipe import canonical_json
from stillhouse.store.rollout_recipe import RolloutRecipe
from stillhouse.store.rollout_store import RolloutStore
from stillhouse.writer.api_tokens import NoTargetsError, sample_of_tokens
from stillhouse.writer.engine import Prompt, Sample

_log = logging.getLogger(__name__)

_TABLE = "writer.openai"
_MOST_SEED = 2**31 - 1  # what all servers take


class OpenAIWriter:
    """A writer on a server. Construction sends no request.

    Log-probabilities are known of a sample all of whose tokens, as the server returns them, are ids
    of the student's tokenizer. Of others the text alone is.
    """

    digest: str | None = None  # nothing is loaded here

    def __init__(
        self,
        section: WriterSection,
        recipe: RolloutRecipe,
        *,
        device: str,
        store_url: str,
        patience: Patience = DEFAULT_PATIENCE,
    ) -> None:
        # the tokenizer of the student
        del device  # the server has its own
        self._recipe, self._options = recipe, options_of(section)
        self._tokenizer = load_tokenizer(
            section.model,
            revision=section.revision,
            trust_remote_code=section.trust_remote_code,
        )
        own = self._tokenizer.eos_token_id
        self._end_id = own if own in recipe.end_ids else recipe.end_ids[0]
        self._token_map = (
            token_map(self._tokenizer, end_ids=recipe.end_ids) if recipe.top_logprobs else None
        )

        # the server, and what is kept; what costs nothing is not
        store = RolloutStore(store_url, recipe)
        self._access = access_of(self._options, store.blobs, store.folder, table=_TABLE)
        self._server = Server(self._options, table=_TABLE, access=self._access, patience=patience)
        self._answers = answers_of(store) if self._options.is_paid else None

    @classmethod
    def identity(cls, section: WriterSection, *, cache_dir: Path) -> ModelIdentity:
        """Of the names that the user and the server give the model, and of what is added to each
        request, since no file of it can be read. Asks the server only where `served_model` is not
        set."""
        del cache_dir  # nothing is computed
        options = options_of(section)
        served = served_model(options, table=_TABLE)
        names = {
            "model": None if is_local(section) else section.model,
            "request": options.request,
            "revision": section.revision,
            "served_model": served,
        }
        digest = hashlib.sha256(canonical_json(names)).hexdigest()
        return ModelIdentity(digest, section.revision, kind="api", served_model=served)

    def weight_hashes(self) -> Mapping[str, int]:
        """None: they are elsewhere."""
        return {}

    def write(self, prompts: Sequence[Prompt], seeds: Sequence[int]) -> list[Sample | None]:
        """A sample is None where the server gives no text, or withholds it."""
        asked = [
            (
                prompt.number // self._recipe.shard_prompts,
                _question(prompt.source, seed, self._options, self._recipe),
            )
            for prompt, seed in zip(prompts, seeds, strict=True)
        ]
        replies = all_answers(self._reply, asked, num_threads=self._options.max_in_flight)
        self.tidy()  # the shards before this one are published
        reasons = Counter[str]()
        samples = [self._sample(reply, reasons) for reply in replies]
        if self._token_map is not None:
            counts = [f"{count} {reason}" for reason, count in reasons.most_common()]
            _log.info("%s", "; ".join([f"of {len(samples)} samples", *counts]))
        return samples

    def prove(self, prompt: Prompt) -> None:
        """Ask for one token. Raises ServerError where the server cannot be used."""
        one_token = replace(self._recipe, max_new_tokens=1)
        question = _question(prompt.source, 0, self._options, one_token)
        reply = self._server.ask(question, read=reply_of, stop=threading.Event())
        if self._token_map is not None and reply.text and not reply.logprobs:
            raise ServerError(
                f"the server returns no log-probabilities with what it writes, and {_TABLE}."
                f"top_logprobs is {self._recipe.top_logprobs}; wanted a server and a model whose "
                "answers have them: set top_logprobs to 0 to learn from the text alone"
            )

    def tidy(self) -> None:
        """Delete the answers that are kept of published shards, if the store lets it."""
        if self._answers is not None:
            self._answers.tidy()

    def granted_usd(self) -> float:
        """What is spent on the recipe's rollouts, or reserved; 0 where there is no limit."""
        return self._access.money.granted_usd()

    def _reply(self, asked: tuple[int, Question], stop: threading.Event) -> Reply:
        """The reply to a question of a shard, bought unless it was bought before."""
        # kept?
        shard, question = asked
        digest = _digest_of(question)
        if self._answers is not None:
            kept = self._answers.read(shard, digest)
            if isinstance(kept.get("text"), str) and isinstance(kept.get("finish"), str):
                return Reply(kept["text"], kept["finish"], logprobs_in(kept.get("logprobs")))

        # bought, and kept where it was paid for
        reply = self._server.ask(question, read=reply_of, stop=stop)
        if self._answers is not None:
            logprobs = (
                {} if reply.logprobs is None else {"logprobs": logprobs_in_json(reply.logprobs)}
            )
            self._answers.keep(
                shard, digest, {"text": reply.text, "finish": reply.finish} | logprobs
            )
        return reply

    def _sample(self, reply: Reply, reasons: Counter[str]) -> Sample | None:
        """A reply as ids. It is counted by whether it has log-probabilities, and why not."""
        if reply.finish not in ("stop", "length"):
            return None  # withheld, or a call of a tool
        if self._token_map is not None:
            try:
                sample = sample_of_tokens(reply, self._token_map, self._recipe, end_id=self._end_id)
                reasons["with log-probabilities"] += 1
                return sample
            except NoTargetsError as error:
                reasons[str(error)] += 1
        return self._of_text(reply)

    def _of_text(self, reply: Reply) -> Sample | None:
        """A text as ids; what says that it is special stays text."""
        encoded = self._tokenizer(
            reply.text, add_special_tokens=False, split_special_tokens=True, verbose=False
        )
        ids = np.array(encoded["input_ids"], np.int32)
        ended = reply.finish == "stop" and len(ids) < self._recipe.max_new_tokens
        ids = (
            np.append(ids, np.int32(self._end_id)) if ended else ids[: self._recipe.max_new_tokens]
        )
        if not len(ids):
            return None
        return Sample(ids, np.full(len(ids), np.nan, np.float32), ended)


def options_of(section: WriterSection) -> WritingSection:
    assert section.openai is not None, "the config wants it with this engine"
    return section.openai


def _digest_of(question: Question) -> str:
    """32 hexadecimal digits: XXH3-128 of its route and its fields, in canonical JSON."""
    values = {"fields": question.fields, "route": question.route}
    return xxhash.xxh3_128_hexdigest(canonical_json(values))


def _question(source: str, seed: int, options: WritingSection, recipe: RolloutRecipe) -> Question:
    """What is asked for one sample of a prompt, whose `source` this is."""
    fields: dict[str, Any] = {
        "max_tokens": recipe.max_new_tokens,
        "temperature": recipe.temperature,
        "top_p": recipe.top_p,
        "seed": seed & _MOST_SEED,
        "num_entries": recipe.top_logprobs,
    }
    asked = json.loads(source)
    ask = text_question if "text" in asked else chat_question
    return ask(**asked, **(fields | options.request))


def most_usd(options: WritingSection, recipe: RolloutRecipe, sources: Iterable[str]) -> float:
    """What all samples of these prompts may cost at most, if no answer is lost on its way."""
    prompt_usd, written_usd = options.usd_in_and_out
    most = [_question(source, 0, options, recipe).most_tokens for source in sources]
    usd = sum(each.prompt * prompt_usd + each.written * written_usd for each in most) / 1e6
    return recipe.samples * usd
