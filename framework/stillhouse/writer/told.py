"""A sample of which a server told the log-probabilities: its tokens become the student's ids where
each of them is one id, and nothing that was told is missing or strange.

Shapes: N tokens of a sample, K entries of each.
"""

import math
from collections.abc import Mapping

import numpy as np

from stillhouse.models.token_bytes import TokenMap
from stillhouse.servers.chat import Reply
from stillhouse.servers.told import Entry, ToldToken
from stillhouse.store.rollout_recipe import RolloutRecipe
from stillhouse.store.rollouts import NOT_TOLD, ROUNDING
from stillhouse.writer.engine import Sample

_Pair = tuple[float, int]  # log-probability and id

_NEVER = -9999.0  # OpenAI's for "very unlikely", which is no measurement


class NotToldError(Exception):
    """Why a reply has no targets, in a few words."""


def told_sample(reply: Reply, tokens: TokenMap, recipe: RolloutRecipe, *, end_id: int) -> Sample:
    """A reply as the server's own tokens, with what it told of them. `end_id`: of the token that
    ends a text, where the server leaves that out.

    Raises NotToldError where it cannot be learnt from so; the text still can.
    """
    # the sampled tokens, which the text is made of
    if not reply.told:
        raise NotToldError("without log-probabilities, or with some that are no finite numbers")
    ids_of = tokens.of_server(each.sampled.token for each in reply.told)
    ids = [_id_of(each.sampled, ids_of) for each in reply.told]
    ended = reply.finish == "stop"
    says_end = ended and ids[-1] in recipe.end_ids
    of_text = reply.told[:-1] if says_end else reply.told
    said = b"".join(each.sampled.token for each in of_text)
    has_end = any(number in recipe.end_ids for number in ids[: len(of_text)])
    if has_end or said != reply.text.encode(errors="surrogatepass"):
        raise NotToldError("with tokens that are not those of the text")

    # what was told of each of them
    tops = [_top(each, ids_of, num_entries=recipe.top_logprobs) for each in reply.told]
    is_plain = recipe.temperature == 1.0 and recipe.top_p == 1.0
    logprobs = [_sampled(each) if is_plain else math.nan for each in reply.told]

    # the end, where it was left out and has room
    if ended and not says_end:
        ended = len(ids) < recipe.max_new_tokens
        if ended:
            ids.append(end_id)
            tops.append([(math.nan, NOT_TOLD)] * recipe.top_logprobs)
            logprobs.append(math.nan)
    if len(ids) > recipe.max_new_tokens:
        raise NotToldError("with more tokens than were asked for")
    return Sample(
        np.array(ids, np.int32),
        np.array(logprobs, np.float32),
        ended,
        top_logprobs_NK=np.array([[logprob for logprob, _ in top] for top in tops], np.float32),
        top_ids_NK=np.array([[number for _, number in top] for top in tops], np.int32),
    )


def _id_of(entry: Entry, ids_of: Mapping[bytes, int]) -> int:
    if entry.token not in ids_of:
        raise NotToldError("with a token that is not one id of the tokenizer")
    return ids_of[entry.token]


def _top(told: ToldToken, ids_of: Mapping[bytes, int], *, num_entries: int) -> list[_Pair]:
    """The likeliest, by logprob descending, ties by id ascending."""
    # by id, in float32 as they are stored
    top = {_id_of(each, ids_of): float(np.float32(each.logprob)) for each in told.top}
    if len(top) < num_entries:
        raise NotToldError("with fewer entries than were asked for")
    entries = {_id_of(told.sampled, ids_of): float(np.float32(told.sampled.logprob))} | top
    if math.fsum(math.exp(min(each, 1.0)) for each in entries.values()) > 1.0 + ROUNDING:
        raise NotToldError("with probabilities that sum to more than 1")

    # the best of them; a rounded 1 is 1
    pairs = sorted((-min(each, 0.0), number) for number, each in entries.items())
    return [(-negative, number) for negative, number in pairs[:num_entries]]


def _sampled(told: ToldToken) -> float:
    return math.nan if told.sampled.logprob <= _NEVER else min(0.0, told.sampled.logprob)
