"""The bytes that each id of a tokenizer stands for, and the one id that stands for given bytes: so
a server's tokens, which come as texts and bytes, become ids.

Not every server knows the bytes of its tokens. One that decodes each token alone says "the" for
" the" where its tokenizer drops a leading space, and U+FFFD for half a character. What such a
server may mean by two ids is no id, unless the server proves that it tells bytes as they are.
"""

import json
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedTokenizerFast

from stillhouse.errors import ModelError

_SPACE = "\N{LOWER ONE EIGHTH BLOCK}"  # SentencePiece's
_BYTE = re.compile(r"<0x([0-9A-Fa-f]{2})>")
_PRINTED = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]


@dataclass(frozen=True, slots=True)
class TokenMap:
    """Ids by their bytes. Special tokens are not in it, but those that end a text."""

    ids: Mapping[bytes, int]  # of bytes that one id alone stands for
    certain: Mapping[bytes, int]  # of these, those that no other id is when it is decoded alone
    proofs: frozenset[bytes]  # of these, those that no id is when it is decoded alone

    def of_server(self, sampled: Iterable[bytes]) -> Mapping[bytes, int]:
        """The ids of what a server says that names its sampled tokens so."""
        return self.ids if any(each in self.proofs for each in sampled) else self.certain


def token_map(tokenizer: PreTrainedTokenizerFast, *, end_ids: Iterable[int]) -> TokenMap:
    """Raises ModelError where the bytes of the tokenizer's ids are not known."""
    # the bytes that one id stands for
    special = {number for number, token in tokenizer.added_tokens_decoder.items() if token.special}
    found = bytes_by_id(tokenizer)
    named = {
        number: token
        for number, token in found.items()
        if token and (number not in special or number in end_ids)
    }
    counts = Counter(named.values())
    ids = {token: number for number, token in named.items() if counts[token] == 1}

    # and what each id is when it is decoded alone
    alone = {number: str(tokenizer.decode([number])).encode() for number in found}
    by_text = Counter(alone.values())
    certain = {
        token: number
        for token, number in ids.items()
        if by_text[token] == (1 if alone[number] == token else 0)
    }
    return TokenMap(ids, certain, frozenset(token for token in ids if not by_text[token]))


def bytes_by_id(tokenizer: PreTrainedTokenizerFast) -> dict[int, bytes]:
    """The bytes that each id stands for, within a text. An id for a byte that is a token as well is
    left out: no text is made of it.

    Raises ModelError where they are not known: the tokenizer is neither a byte-level BPE nor one in
    the form of SentencePiece.
    """
    decoder = json.loads(tokenizer.backend_tokenizer.to_str())["decoder"]
    parts = [*_parts(decoder)]
    kinds = {part["type"] for part in parts}
    added = tokenizer.added_tokens_decoder
    vocabulary = {
        number: token for token, number in tokenizer.get_vocab().items() if number not in added
    }
    # by the rule of its decoder; added tokens are texts as they are
    if "ByteLevel" in kinds:
        of_char = _bytes_of_chars()
        found = {number: _of_byte_level(token, of_char) for number, token in vocabulary.items()}
    elif "Metaspace" in kinds or any(_marks_spaces(part) for part in parts):
        matches = {
            number: _BYTE.fullmatch(token) if "ByteFallback" in kinds else None
            for number, token in vocabulary.items()
        }
        found = {
            number: token.replace(_SPACE, " ").encode()
            for number, token in vocabulary.items()
            if not matches[number]
        }
        tokens = {*found.values()}
        of_bytes = {number: bytes.fromhex(match[1]) for number, match in matches.items() if match}
        found |= {number: byte for number, byte in of_bytes.items() if byte not in tokens}
    else:
        raise ModelError(
            f"the bytes of the ids of {tokenizer.name_or_path} are not known: it decodes by "
            f"{', '.join(sorted(kinds)) or 'nothing'}; wanted a byte-level BPE, or a tokenizer in "
            "the form of SentencePiece: leave writer.openai.top_logprobs out, or name another "
            "tokenizer as writer.model"
        )
    return found | {number: token.content.encode() for number, token in added.items()}


def _parts(decoder: Any) -> Iterator[Mapping[str, Any]]:
    """The decoders of a sequence, or the one that there is."""
    if decoder is None:
        return
    if decoder["type"] != "Sequence":
        yield decoder
        return
    for each in decoder["decoders"]:
        yield from _parts(each)


def _marks_spaces(part: Mapping[str, Any]) -> bool:
    names = {"type": "Replace", "pattern": {"String": _SPACE}, "content": " "}
    return {name: part.get(name) for name in names} == names


def _of_byte_level(token: str, of_char: Mapping[str, int]) -> bytes:
    """A token with a character that stands for no byte is decoded as it is."""
    if all(char in of_char for char in token):
        return bytes(of_char[char] for char in token)
    return token.encode()


def _bytes_of_chars() -> dict[str, int]:
    """GPT-2's alphabet: bytes that are printed stand for themselves, the others are counted up from
    U+0100."""
    others = [byte for byte in range(256) if byte not in _PRINTED]
    return {chr(byte): byte for byte in _PRINTED} | {
        chr(256 + place): byte for place, byte in enumerate(others)
    }
