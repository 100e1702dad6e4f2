"""Benchmarks: each times Stillhouse beside the alternatives of its users, in one session on one
machine."""
