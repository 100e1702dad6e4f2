"""Writers: engines that sample from a model, the actor that publishes what they write as shards of
rollouts, and the pool's settings for it."""
