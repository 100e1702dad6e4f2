"""Documents become fixed sequences, in a fixed order, once; afterwards they are read from a memory map."""

from stillhouse.corpus.sequences import Split, prepare_corpus
from stillhouse.corpus.stored import Corpus, Rows

__all__ = ["Corpus", "Rows", "Split", "prepare_corpus"]
