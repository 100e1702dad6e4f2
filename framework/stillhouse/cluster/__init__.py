"""Machines: the Ray cluster, the coordinator of a run, and what is known of machines that will
end."""
