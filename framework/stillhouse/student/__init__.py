"""The student: the order in which it reads, the loss that it learns from, and the engine that
trains it."""
