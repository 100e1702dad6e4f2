"""Work leased to workers that come and go: which block is made next, by whom, and what becomes of
it when they are lost.

The room is generic: what is leased is a block's number. How workers are started, asked and compared
comes in as values.
"""
