"""Evaluation: the scores of teacher, student and control on held-out text."""
