"""Read a store: which recipes it holds, and what the teacher said in one of its chunks.

    python read_a_store.py runs/store
    python read_a_store.py s3://bucket/prefix

It needs no teacher, no Ray and no GPU: a chunk carries its own token ids and targets.

Shapes: S sequences, L positions, N records of B bytes, K kept entries.
"""

import sys

import torch

import stillhouse


def main(url: str) -> None:
    for stored in stillhouse.list_recipes(url):
        recipe = stored.recipe
        print(f"recipe {stored.fingerprint16}: {stored.num_chunks} chunks of {recipe.num_chunks}")
        store = stillhouse.ChunkStore(url, recipe)
        if numbers := sorted(store.published()):
            show(store.fetch(numbers[0]), recipe)


def show(chunk, recipe: stillhouse.Recipe) -> None:
    """Print the first targets of a chunk. Its records are those of the positions whose loss mask
    is 1, sequence by sequence."""
    sequences = chunk.sequences
    target = stillhouse.decode(torch.from_numpy(chunk.targets_NB), recipe.spec)
    ids_N = sequences.token_ids_SL[sequences.loss_mask_SL == 1]
    print(f"chunk {chunk.number}: {target.num_tokens} targets of {recipe.k} entries")
    for n in range(3):
        entries = zip(target.token_ids_TK[n, :4], target.logprobs_TK[n, :4].exp(), strict=True)
        likeliest = ", ".join(f"{int(token)} ({share:.0%})" for token, share in entries)
        print(f"  after token {ids_N[n]}: {likeliest}")


if __name__ == "__main__":
    main(sys.argv[1])
