"""A pool: work leased to a fleet of workers that come and go. It decides which block is made next,
by which worker, and what happens to leases of a lost one.

The room is generic: what is leased is a block's number. How workers are started, given work and
compared is passed in as values.
"""
