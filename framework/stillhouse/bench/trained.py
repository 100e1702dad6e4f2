"""The logits of a trained model on held-out text, over a vocabulary as large as today's models
have.

Shapes: T tokens, V vocabulary of the model, U of its lower half, W of the benchmark.
"""

from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel

from stillhouse.config import TeacherSection
from stillhouse.errors import ConfigError
from stillhouse.models.heads import final_hidden, head_of
from stillhouse.models.load import load_model
from stillhouse.models.tokenizers import load_tokenizer, tokenizer_digest, vocab_size_of
from stillhouse.sequences.corpus import Corpus
from stillhouse.sequences.packing import prepare_corpus

DEMO_TEACHER = Path("runs/demo/models/teacher")
_DOCUMENTS = 100  # the held-out text is in the first of them


def trained_logits(teacher_dir: Path, *, num_tokens: int, cache_dir: Path) -> Tensor:
    """float32 [T, V]: a teacher's logits on the held-out files of Python's standard library. Raises
    ConfigError where `teacher_dir` holds no model."""
    # imports Ray, without which a benchmark of one process starts
    from stillhouse.pipeline.toy import demo_config

    if not (teacher_dir / "config.json").is_file():
        raise ConfigError(
            f"there is no model in {teacher_dir}; name the directory of one with --teacher"
        )
    section = TeacherSection(model=str(teacher_dir), dtype="float32", device="cpu")
    teacher, tokenizer = load_model(section), load_tokenizer(section.model)
    corpus = demo_config(Path("runs/demo")).corpus.model_copy(update={"max_documents": _DOCUMENTS})
    split = prepare_corpus(
        corpus, tokenizer, tokenizer_digest=tokenizer_digest(tokenizer), cache_dir=cache_dir
    )
    return heldout_logits(
        teacher, split.heldout, vocab_size=vocab_size_of(tokenizer), num_tokens=num_tokens
    )


@torch.no_grad()
def heldout_logits(
    teacher: PreTrainedModel, heldout: Corpus, *, vocab_size: int, num_tokens: int
) -> Tensor:
    """float32 [T, V], of tokens from all over the corpus: T of them, or as many as there are."""
    length = heldout.sequence_length
    num_sequences = min(heldout.num_sequences, -(-num_tokens // length))
    sequences = [number * heldout.num_sequences // num_sequences for number in range(num_sequences)]
    rows = [heldout.rows(sequence, sequence + 1) for sequence in sequences]
    ids_BL, positions_BL = (
        torch.cat([torch.tensor(getattr(row, name)) for row in rows])
        for name in ("token_ids_SL", "positions_SL")
    )
    hidden_TH = final_hidden(teacher, ids_BL.long(), positions_BL.long()).flatten(0, 1)
    return head_of(teacher, vocab_size=vocab_size).logits(hidden_TH[:num_tokens]).float()


def enlarged(logits_TV: Tensor, vocab_size: int) -> Tensor:
    """[T, W] logits of nearly the same distributions over W >= V ids: the V ids are spread evenly
    among the W.

    Every added id has the logit of a random id of the row's lower half, less the log of how many
    are added for each of these. So the added ids together have the mass of that lower half, and the
    likely ids are left as they are. Raises ConfigError where W is below V.
    """
    num_tokens, num_ids = logits_TV.shape
    if vocab_size < num_ids:
        raise ConfigError(
            f"--vocab is {vocab_size}, less than the {num_ids} ids of the teacher; set it to "
            f"{num_ids} or more"
        )
    if vocab_size == num_ids:
        return logits_TV
    stretch = vocab_size // num_ids
    random = torch.Generator().manual_seed(0)
    lower_TU = logits_TV.sort(dim=1).values[:, : num_ids // 2]
    picks_TW = torch.randint(lower_TU.shape[1], (num_tokens, vocab_size), generator=random)
    num_added_each = (vocab_size - num_ids) / lower_TU.shape[1]
    whole_TW = lower_TU.gather(1, picks_TW) - torch.tensor(num_added_each).log()
    whole_TW[:, : num_ids * stretch : stretch] = logits_TV
    return whole_TW
