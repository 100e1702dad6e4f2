"""Checkpoints: files of all ranks that one manifest makes a commit."""
