"""Checkpoints: files of all ranks, and one manifest that makes them a commit."""
