"""The order of training as a pure function of (seed, epoch, step): any machine and any world size
reads the same global batches.

An epoch shuffles the chunks, takes them in groups of neighbours, and shuffles the sequences within
each group. So only a few chunks are open at one time, and every sequence is read once. Memory is
O(chunks), never O(sequences).

Permutations sort the raw words of a bit generator: numpy keeps those streams the same for good,
unlike the methods of `Generator` (NEP 19).
"""

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

_CHUNK_ORDER = 0
_SEQUENCE_ORDER = 1


@dataclass(frozen=True, slots=True)
class Order:
    """Which sequences each optimiser step reads, over all ranks together. The last step of an epoch
    may be shorter."""

    num_sequences: int
    chunk_sequences: int
    global_batch_sequences: int
    seed: int
    window_chunks: int  # neighbouring chunks whose sequences are mixed

    @property
    def num_chunks(self) -> int:
        return -(-self.num_sequences // self.chunk_sequences)

    @property
    def steps_per_epoch(self) -> int:
        return -(-self.num_sequences // self.global_batch_sequences)

    def sequences(self, step: int) -> NDArray[np.int64]:
        """The sequence numbers of one step, counted from 0 over all epochs."""
        # the step's range in its epoch
        epoch, step_in_epoch = divmod(step, self.steps_per_epoch)
        start = step_in_epoch * self.global_batch_sequences
        stop = min(start + self.global_batch_sequences, self.num_sequences)
        # the groups that it runs through
        starts = self._plan(epoch).group_starts
        first, last = np.searchsorted(starts, (start, stop - 1), side="right") - 1
        groups = [self._group(epoch, group) for group in range(int(first), int(last) + 1)]
        return np.concatenate(groups)[start - starts[first] : stop - starts[first]]

    def chunks_in_reading_order(self, num_steps: int) -> list[int]:
        """The chunks that the first `num_steps` steps read, each once, by first use. More steps
        only append to the list.

        The first epoch reads every chunk, so later ones add none. Takes time in proportion to the
        sequences read.
        """
        num_read = min(num_steps * self.global_batch_sequences, self.num_sequences)
        chunks: dict[int, None] = {}
        for group, start in enumerate(self._plan(0).group_starts[:-1].tolist()):
            if start >= num_read:
                break
            sequences = self._group(0, group)[: num_read - start]
            chunks.update(dict.fromkeys((sequences // self.chunk_sequences).tolist()))
        return list(chunks)

    def chunks_finished(self, step: int) -> int:
        """How many chunks at the front of the reading order the first epoch will not read again
        after `step` steps.

        A lower bound: a chunk counts when its whole group is read. After the first epoch every
        chunk counts.
        """
        if step >= self.steps_per_epoch:
            return self.num_chunks
        num_read = step * self.global_batch_sequences
        groups_read = int(np.searchsorted(self._plan(0).group_starts, num_read, side="right")) - 1
        return min(groups_read * self.window_chunks, self.num_chunks)

    def steps_until_done_with(self, num_steps: int) -> NDArray[np.int64]:
        """int64 [num_chunks]: after how many of the first `num_steps` steps, over all epochs, a
        chunk will not be read again.

        An upper bound: a chunk counts as read until its whole group is. 0 where these steps do not
        read it.
        """
        whole_epochs, steps_left = divmod(num_steps, self.steps_per_epoch)
        done = np.zeros(self.num_chunks, dtype=np.int64)
        for epoch, num_read in (
            (whole_epochs - 1, self.num_sequences),
            (whole_epochs, steps_left * self.global_batch_sequences),
        ):
            if epoch < 0:
                continue
            plan = self._plan(epoch)
            group_ends = -(-plan.group_starts[1:] // self.global_batch_sequences)
            groups = np.arange(self.num_chunks) // self.window_chunks
            read = plan.group_starts[groups] < num_read
            last_steps = epoch * self.steps_per_epoch + group_ends[groups]
            done[plan.chunks[read]] = np.minimum(last_steps[read], num_steps)
        return done

    def _plan(self, epoch: int) -> "_EpochPlan":
        return _epoch_plan(
            self.num_sequences, self.chunk_sequences, self.window_chunks, self.seed, epoch
        )

    def _group(self, epoch: int, group: int) -> NDArray[np.int64]:
        return _group_sequences(
            self.num_sequences, self.chunk_sequences, self.window_chunks, self.seed, epoch, group
        )


def rank_rows(
    sequences: NDArray[np.int64], *, rank: int, world_size: int, micro_batch: int
) -> NDArray[np.int64]:
    """One rank's share of a global batch, int64 [num_micro_batches, micro_batch], padded with -1.

    Every rank has the same number of micro-batches. Together the ranks hold each sequence once, and
    their shares differ by one sequence at most.
    """
    num_micro_batches = -(-len(sequences) // (world_size * micro_batch))
    padded = np.full(num_micro_batches * micro_batch * world_size, -1, dtype=np.int64)
    padded[: len(sequences)] = sequences
    own = np.ascontiguousarray(padded.reshape(-1, world_size)[:, rank])
    return own.reshape(num_micro_batches, micro_batch)


@dataclass(frozen=True, slots=True)
class _EpochPlan:
    chunks: NDArray[np.int64]  # every chunk, in this epoch's order
    group_starts: NDArray[np.int64]  # sequences before each group, and last those of all


@lru_cache(maxsize=4)
def _epoch_plan(
    num_sequences: int, chunk_sequences: int, window_chunks: int, seed: int, epoch: int
) -> _EpochPlan:
    num_chunks = -(-num_sequences // chunk_sequences)
    chunks = _permutation(num_chunks, _CHUNK_ORDER, seed=seed, epoch=epoch, group=0)
    sizes = np.minimum(chunk_sequences, num_sequences - chunks * chunk_sequences)
    group_sizes = np.add.reduceat(sizes, np.arange(0, num_chunks, window_chunks))
    return _EpochPlan(_frozen(chunks), _frozen(np.concatenate(([0], np.cumsum(group_sizes)))))


@lru_cache(maxsize=16)
def _group_sequences(
    num_sequences: int, chunk_sequences: int, window_chunks: int, seed: int, epoch: int, group: int
) -> NDArray[np.int64]:
    plan = _epoch_plan(num_sequences, chunk_sequences, window_chunks, seed, epoch)
    chunks = plan.chunks[group * window_chunks : (group + 1) * window_chunks]
    sequences = (chunks[:, None] * chunk_sequences + np.arange(chunk_sequences)).ravel()
    sequences = sequences[sequences < num_sequences]
    shuffle = _permutation(len(sequences), _SEQUENCE_ORDER, seed=seed, epoch=epoch, group=group)
    return _frozen(sequences[shuffle])


def _permutation(
    length: int, purpose: int, *, seed: int, epoch: int, group: int
) -> NDArray[np.int64]:
    entropy = np.random.SeedSequence(seed % 2**64, spawn_key=(purpose, epoch, group))
    words = np.random.PCG64(entropy).random_raw(length)
    return np.argsort(words, kind="stable").astype(np.int64, copy=False)


def _frozen(array: NDArray[np.int64]) -> NDArray[np.int64]:
    array.setflags(write=False)
    return array
