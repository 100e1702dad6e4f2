"""The teachers: the actor that turns token ids into targets and publishes them, its Ray backend,
and what makes a pool one of teachers."""
