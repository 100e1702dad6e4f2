"""Teachers: the actor that computes and publishes targets, its Ray backend, and the pool's settings
for it."""
