"""Sources of sequences. The corpus: documents are tokenised and packed once, into sequences of one
length in a fixed order, which are then read from a memory map."""

from stillhouse.sequences.corpus import Corpus
from stillhouse.sequences.packing import Split, prepare_corpus

__all__ = ["Corpus", "Split", "prepare_corpus"]
