"""The teachers: a model that turns token ids into targets, the actor that publishes them, and the pool that hands out the work."""
