"""Documents become fixed sequences, in a fixed order, once; afterwards they are read from a memory
map."""

from stillhouse.sequences.corpus import Corpus
from stillhouse.sequences.packing import Split, prepare_corpus

__all__ = ["Corpus", "Split", "prepare_corpus"]
