"""The k likeliest tokens of a distribution, and draws from the rest: one reference, and faster ways
that agree with it."""
