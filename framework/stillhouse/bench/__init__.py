"""Side by side against what users would do instead: what is timed, how, and the figures that come
of it."""
