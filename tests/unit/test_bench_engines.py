"""`bench engines` gives every way the same blocks, which are of the kinds that they are named
after, and says how far their records are apart."""

import json
from pathlib import Path

import numpy as np
import pytest

from helpers.command import stillhouse
from stillhouse.bench.engine_blocks import KINDS, PACKED, PADDED, SHORT, WHOLE, block_of
from stillhouse.bench.engines import DOCUMENTS, ROWS

SMALL = "--sequences 3 --length 32 --vocab 300 --hidden 32 --layers 1 --repeats 2 --no-compile"


def test_the_verb_writes_what_it_measured(tmp_path: Path) -> None:
    out = tmp_path / "engines.json"
    done = stillhouse("bench", "engines", *SMALL.split(), "--out", out)
    assert done.code == 0, done.err
    found = json.loads(out.read_text())["kinds"]
    assert [*found] == [*KINDS]
    for measured in found.values():
        assert measured["costs"].keys() == measured["mean_kl"].keys() >= {ROWS, DOCUMENTS}
        assert {len(costs) for costs in measured["costs"].values()} == {2}
        assert len(measured["num_targets"]) == 2
        assert abs(measured["mean_kl"][ROWS]) < 1e-5
    assert all(kind.capitalize() in done.out for kind in KINDS)


def test_a_head_that_no_teacher_has_is_refused() -> None:
    done = stillhouse("bench", "engines", "--hidden", "40")
    assert done.code == 2
    assert "--hidden is 40" in done.err


@pytest.mark.parametrize("kind", KINDS)
def test_blocks_are_the_same_for_a_seed_and_hold_what_their_kind_says(kind: str) -> None:
    block, again, other = (block_of(kind, (8, 64), vocab_size=99, seed=seed) for seed in (1, 1, 2))
    assert np.array_equal(block.token_ids_SL, again.token_ids_SL)
    assert np.array_equal(block.positions_SL, again.positions_SL)
    assert not np.array_equal(block.token_ids_SL, other.token_ids_SL)
    num_documents = int((block.positions_SL == 0).sum())
    assert (num_documents > 8) == (kind == PACKED)
    assert block.positions_SL.shape == (8, 8 if kind == SHORT else 64)
    assert not block.loss_mask_SL[:, -1].any()
    num_targets_S = block.loss_mask_SL.sum(axis=1)
    if kind in (WHOLE, SHORT):
        assert set(num_targets_S) == {block.positions_SL.shape[1] - 1}
    if kind == PADDED:
        assert len(set(num_targets_S)) > 3
        assert num_targets_S.max() < 60
    if kind == PACKED:
        # each document's last token has no target
        assert int(num_targets_S.sum()) == 8 * 64 - num_documents
