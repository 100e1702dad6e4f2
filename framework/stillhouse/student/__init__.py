"""The student: the order in which it reads, its data loader, and the engine and loop that train
it."""
