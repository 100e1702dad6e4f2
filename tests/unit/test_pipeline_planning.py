"""Which format a new run takes: that of the chunks with which it can go on, else the newest. A
store that cannot be asked is never taken for an empty one."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from helpers.chunks import small_recipe
from helpers.faults import FaultyS3, everything
from helpers.s3 import s3_environment
from helpers.world import TinyWorld
from stillhouse.errors import StoreError, StoreUnavailable
from stillhouse.pipeline import Plan
from stillhouse.store import ChunkStore, Recipe, StoreForbidden


@pytest.fixture
def url(tmp_path: Path) -> str:
    return str(tmp_path / "store")


def planned(world: TinyWorld, url: str, **target: Any) -> Plan:
    """A plan of a run directory that is not there."""
    return world.plan(Path(url).parent / "run", store={"url": url}, target=target)


def in_format_1(world: TinyWorld, url: str, **target: Any) -> Recipe:
    earlier = planned(world, url, **target).recipe.in_format_1()
    assert earlier is not None
    return earlier


def test_a_new_store_is_of_the_newest_format(tiny_world: TinyWorld, url: str) -> None:
    assert planned(tiny_world, url).recipe.format == 2
    assert not Path(url).exists()


def test_a_store_of_format_1_is_filled_on_in_format_1(tiny_world: TinyWorld, url: str) -> None:
    earlier = in_format_1(tiny_world, url)
    ChunkStore.create(url, earlier)
    assert planned(tiny_world, url).recipe == earlier


def test_a_store_of_both_formats_is_filled_on_in_the_newest(
    tiny_world: TinyWorld, url: str
) -> None:
    newest = planned(tiny_world, url).recipe
    ChunkStore.create(url, in_format_1(tiny_world, url))
    ChunkStore.create(url, newest)
    assert planned(tiny_world, url).recipe == newest


def test_another_recipe_of_format_1_decides_nothing(tiny_world: TinyWorld, url: str) -> None:
    ChunkStore.create(url, in_format_1(tiny_world, url, k=9))
    assert planned(tiny_world, url).recipe.format == 2


def test_a_target_that_format_1_cannot_hold_is_of_format_2(tiny_world: TinyWorld, url: str) -> None:
    ChunkStore.create(url, in_format_1(tiny_world, url))
    weighted = planned(tiny_world, url, weighted_draws=True).recipe
    assert (weighted.format, weighted.weighted) == (2, True)


@pytest.mark.parametrize("version", [1, 2])
def test_a_run_keeps_its_format_wherever_its_store_is_now(
    tiny_world: TinyWorld, url: str, tmp_path: Path, version: int
) -> None:
    begun = replace(planned(tiny_world, url).recipe, format=version)
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "recipe.json").write_bytes(begun.canonical_json())
    assert planned(tiny_world, url).recipe == begun
    ChunkStore.create(url, in_format_1(tiny_world, url))
    assert planned(tiny_world, url).recipe == begun


@pytest.mark.parametrize(("status", "refusal"), [(409, StoreUnavailable), (403, StoreForbidden)])
def test_a_store_that_cannot_be_asked_is_refused_as_it_may_be_of_format_1(
    tiny_world: TinyWorld,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    status: int,
    refusal: type[StoreError],
) -> None:
    with FaultyS3("http://127.0.0.1:9") as bucket:
        bucket.refuse(everything, status=status)
        for name, value in s3_environment(bucket.url).items():
            monkeypatch.setenv(name, value)
        with pytest.raises(refusal, match=r"cannot look for .*/recipe\.json in s3://casks/a"):
            tiny_world.plan(tmp_path / "run", store={"url": "s3://casks/a"})


def test_a_url_without_its_slashes_is_no_directory(tiny_world: TinyWorld, tmp_path: Path) -> None:
    with pytest.raises(
        StoreError, match="the store's URL is memory:: wanted a directory, or s3://"
    ):
        tiny_world.plan(tmp_path / "run", store={"url": "memory:"})
    for url in ("s3:casks/a", "s3:/casks/a", "file:/casks", "memory:casks", "S3:casks"):
        with pytest.raises(StoreError, match=rf"is {url}: .* called so, write \./{url}"):
            ChunkStore(url, small_recipe())
    assert ChunkStore("./s3:casks", small_recipe()).url == str(Path("s3:casks").absolute())
