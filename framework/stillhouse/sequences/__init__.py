"""Sources of sequences. The corpus: documents are tokenised and packed once, into sequences of one
length in a fixed order, which are then read from a memory map."""
