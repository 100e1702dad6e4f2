"""The Ray cluster: its session, nodes and processes, the coordinator of a run, heartbeats and
preemption notices."""
