"""A small tokenizer in the form of SentencePiece: spaces are marked, characters that it does not
have are bytes, and a text loses its leading space."""

from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

SPACE, END = "\N{LOWER ONE EIGHTH BLOCK}", "</s>"
_MERGES = [("t", "h"), ("th", "e"), (SPACE, "the"), ("e", "n"), ("en", "d"), (SPACE, "end")]


def spaced_tokenizer() -> PreTrainedTokenizerFast:
    """It has "the" and "end" with their space and without."""
    tokens = ["<unk>", END, *(f"<0x{byte:02X}>" for byte in range(256))]
    tokens += [SPACE, *"abcdefghijklmnopqrstuvwxyz", *("".join(pair) for pair in _MERGES)]
    vocab = {token: number for number, token in enumerate(tokens)}
    core = Tokenizer(models.BPE(vocab, _MERGES, unk_token="<unk>", byte_fallback=True))
    core.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    core.decoder = decoders.Sequence(
        [
            decoders.Replace(SPACE, " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    return PreTrainedTokenizerFast(tokenizer_object=core, eos_token=END, unk_token="<unk>")
