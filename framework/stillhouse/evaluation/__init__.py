"""Teacher, student and control on held-out text."""
