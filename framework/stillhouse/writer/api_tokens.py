"""A sample of a server's own tokens: they become the student's ids where each of them is one id,
and its log-probabilities are whole and make sense.

Shapes: N tokens of a sample, K entries of each.
"""

import math
from collections.abc import Mapping

import numpy as np

from stillhouse.models.token_bytes import TokenMap
from stillhouse.servers.chat import Reply
from stillhouse.servers.logprobs import Entry, TokenLogprobs
from stillhouse.store.rollout_recipe import RolloutRecipe
from stillhouse.store.rollouts import NO_ENTRY, ROUNDING
from stillhouse.writer.engine import Sample

_Pair = tuple[float, int]  # log-probability and id

_NEVER = -9999.0  # OpenAI's for "very unlikely", which is no measurement


class NoTargetsError(Exception):
    """Why a reply has no targets, in a few words."""


def sample_of_tokens(
    reply: Reply, tokens: TokenMap, recipe: RolloutRecipe, *, end_id: int
) -> Sample:
    """A reply as the server's own tokens, with the log-probabilities that came with them. `end_id`:
    of the token that ends a text, where the server leaves that out.

    Raises NoTargetsError where it cannot be learnt from so; the text still can.
    """
    # the sampled tokens, which the text is made of
    if not reply.logprobs:
        raise NoTargetsError("without log-probabilities, or with some that are no finite numbers")
    ids_of = tokens.of_server(each.sampled.token for each in reply.logprobs)
    ids = [_id_of(each.sampled, ids_of) for each in reply.logprobs]
    ended = reply.finish == "stop"
    says_end = ended and ids[-1] in recipe.end_ids
    of_text = reply.logprobs[:-1] if says_end else reply.logprobs
    said = b"".join(each.sampled.token for each in of_text)
    has_end = any(number in recipe.end_ids for number in ids[: len(of_text)])
    if has_end or said != reply.text.encode(errors="surrogatepass"):
        raise NoTargetsError("with tokens that are not those of the text")

    # the log-probabilities of each of them
    tops = [_top(each, ids_of, num_entries=recipe.top_logprobs) for each in reply.logprobs]
    is_plain = recipe.temperature == 1.0 and recipe.top_p == 1.0
    logprobs = [_sampled(each) if is_plain else math.nan for each in reply.logprobs]

    # the end, where it was left out and has room
    if ended and not says_end:
        ended = len(ids) < recipe.max_new_tokens
        if ended:
            ids.append(end_id)
            tops.append([(math.nan, NO_ENTRY)] * recipe.top_logprobs)
            logprobs.append(math.nan)
    if len(ids) > recipe.max_new_tokens:
        raise NoTargetsError("with more tokens than were asked for")
    return Sample(
        np.array(ids, np.int32),
        np.array(logprobs, np.float32),
        ended,
        top_logprobs_NK=np.array([[logprob for logprob, _ in top] for top in tops], np.float32),
        top_ids_NK=np.array([[number for _, number in top] for top in tops], np.int32),
    )


def _id_of(entry: Entry, ids_of: Mapping[bytes, int]) -> int:
    if entry.token not in ids_of:
        raise NoTargetsError("with a token that is not one id of the tokenizer")
    return ids_of[entry.token]


def _top(token: TokenLogprobs, ids_of: Mapping[bytes, int], *, num_entries: int) -> list[_Pair]:
    """The likeliest, by logprob descending, ties by id ascending."""
    # by id, in float32 as they are stored
    top = {_id_of(each, ids_of): float(np.float32(each.logprob)) for each in token.top}
    if len(top) < num_entries:
        raise NoTargetsError("with fewer entries than were asked for")
    entries = {_id_of(token.sampled, ids_of): float(np.float32(token.sampled.logprob))} | top
    if math.fsum(math.exp(min(each, 1.0)) for each in entries.values()) > 1.0 + ROUNDING:
        raise NoTargetsError("with probabilities that sum to more than 1")

    # the best of them; a rounded 1 is 1
    pairs = sorted((-min(each, 0.0), number) for number, each in entries.items())
    return [(-negative, number) for negative, number in pairs[:num_entries]]


def _sampled(token: TokenLogprobs) -> float:
    return math.nan if token.sampled.logprob <= _NEVER else min(0.0, token.sampled.logprob)
