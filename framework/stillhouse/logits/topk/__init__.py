"""Top-k of a distribution and draws from the rest: one reference, and faster backends that agree
with it."""
