"""Documents become fixed sequences, in a fixed order, once; afterwards they are read from a memory map."""

from stillhouse.corpus.sequences import Corpus, Rows, Split, prepare_corpus

__all__ = ["Corpus", "Rows", "Split", "prepare_corpus"]
