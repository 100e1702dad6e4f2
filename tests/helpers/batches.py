"""Batches of a student's reader, one after the other."""

from stillhouse.student.loader import Batch, BatchReader


def next_batch(reader: BatchReader) -> Batch:
    """The next batch, however long it takes."""
    batch = reader.next_unless(lambda: False)
    assert batch is not None
    return batch
