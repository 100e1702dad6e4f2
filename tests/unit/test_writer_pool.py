"""The pool of writers, without Ray: whoever dies when, each prompt has its samples once, and what
was published stays as it is."""

from collections import deque
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
import pytest

from helpers.calls import must_not_be_called
from helpers.rollouts import small_rollout_recipe
from helpers.simulation import Mailbox
from stillhouse.config.generate import WriterSection
from stillhouse.errors import ChangedWeightsError, TeacherError
from stillhouse.models.identity import ModelIdentity
from stillhouse.pool.dispatcher import Dispatcher
from stillhouse.pool.events import Answer, Answered, Died, Event, Passed, Raised, Started
from stillhouse.store.rollout_recipe import RolloutRecipe
from stillhouse.store.rollout_store import RolloutStore, ShardRef
from stillhouse.store.rollouts import SET_ASIDE, Rollouts
from stillhouse.tracking import RunEvent, SetAsideEvent, ShardEvent
from stillhouse.writer.actor import Ready, computed, published
from stillhouse.writer.block import PromptBlock, written
from stillhouse.writer.engine import Prompt, Sample
from stillhouse.writer.pool import comparison, limits_of

RECIPE = small_rollout_recipe(num_prompts=7, samples=3)
SECTION = WriterSection.model_validate(
    {"model": "a", "min_replicas": 2, "max_replicas": 2, "max_failures": 1}
)


class Killed(Exception):
    """A writer's process ends here."""


class Clerk:
    """A writer that writes its seeds down. It fails at prompts that begin with 13."""

    digest = None

    def __init__(
        self, _section: WriterSection, _recipe: RolloutRecipe, *, device: str, store_url: str
    ) -> None:
        assert (device, store_url) == ("cpu", "memory:")

    @classmethod
    def identity(cls, _section: WriterSection, *, cache_dir: Path) -> ModelIdentity:
        raise AssertionError(cache_dir)

    def weight_hashes(self) -> Mapping[str, int]:
        return {}

    def write(self, prompts: Sequence[Prompt], seeds: Sequence[int]) -> list[Sample]:
        if any(prompt.ids[0] == 13 for prompt in prompts):
            raise TeacherError("out of memory")
        return [
            Sample(
                np.array([1 + seed % 200, 0], np.int32),
                np.zeros(2, np.float32),
                ended=seed % 2 == 0,
            )
            for seed in seeds
        ]


CLERK = Clerk(SECTION, RECIPE, device="cpu", store_url="memory:")


class Backend:
    """Two workers in this process. `act(worker, item)` does the work, and may raise Killed."""

    def __init__(self, act: Callable[[PromptBlock], Answer]):
        self._act = act
        self._events: deque[Event[Ready]] = deque()
        self._dead: set[int] = set()

    def spawn(self, worker: int) -> None:
        self._events.append(Started(worker, Ready({"a": 1}, None, "cpu", 0.0, "node")))

    def submit(self, worker: int, lease: int, item: PromptBlock, *, publish: bool) -> None:
        if worker in self._dead:
            return
        try:
            if publish:
                self._events.append(Answered(worker, lease, self._act(item)))
            else:
                written(item, CLERK, RECIPE)
                self._events.append(Answered(worker, lease, Passed()))
        except Killed:
            self._dead.add(worker)
            self._events.append(Died(worker, "SIGKILL"))
        except TeacherError as error:
            self._events.append(Raised(worker, lease, error))

    def kill(self, worker: int) -> None:
        self._dead.add(worker)

    def events(self, *, timeout_s: float) -> list[Event[Ready]]:
        del timeout_s
        found = [*self._events]
        self._events.clear()
        return found


def prompts_of(recipe: RolloutRecipe, number: int, *, poison: int | None = None) -> PromptBlock:
    rows = recipe.shard_rows(number)
    prompts = [
        Prompt(row, np.array([13 if row == poison else 20 + row, 5], np.int32)) for row in rows
    ]
    return PromptBlock(number, prompts, frozenset(range(len(rows))))


def fill(
    store: RolloutStore, act: Callable[[PromptBlock], Answer], *, poison: int | None = None
) -> list[RunEvent]:
    events: list[RunEvent] = []

    class Journal:
        def record(self, event: RunEvent) -> None:
            events.append(event)

    pool: Dispatcher[PromptBlock, Ready] = Dispatcher(
        Backend(act),
        limits_of(SECTION),
        compare=comparison(RECIPE),
        store=store,
        order=range(RECIPE.num_shards),
        item_of=lambda number: prompts_of(RECIPE, number, poison=poison),
        window_chunks=RECIPE.num_shards,
        journal=Journal(),
    )
    pool.run(readers=(), coordinator=Mailbox(), finished=lambda: True)
    return events


def bytes_of(store: RolloutStore) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in Path(store.url).rglob("shards/*")}


@pytest.fixture
def store(tmp_path: Path) -> RolloutStore:
    return RolloutStore.create(str(tmp_path / "store"), RECIPE)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    store = RolloutStore.create(str(tmp_path_factory.mktemp("undisturbed")), RECIPE)
    fill(
        store, lambda item: published(store, computed(store, item, CLERK), tell=must_not_be_called)
    )
    assert len(bytes_of(store)) == RECIPE.num_shards
    return bytes_of(store)


@pytest.mark.parametrize("shard", range(4))
@pytest.mark.parametrize("phase", ["before it writes", "before the put", "after the put"])
def test_a_writer_killed_at_any_phase_changes_nothing(
    store: RolloutStore, undisturbed: dict[str, bytes], phase: str, shard: int
) -> None:
    killed: list[int] = []

    class Deadly(RolloutStore):
        def publish(self, rollouts: Rollouts) -> ShardRef:
            if phase == "before the put":
                die(rollouts.number)
            ref = super().publish(rollouts)
            if phase == "after the put":
                die(rollouts.number)
            return ref

    def die(number: int) -> None:
        if number == shard and not killed:
            killed.append(number)
            raise Killed

    def act(item: PromptBlock) -> Answer:
        if phase == "before it writes":
            die(item.number)
        deadly = Deadly(store.url, RECIPE)
        return published(deadly, computed(deadly, item, CLERK), tell=must_not_be_called)

    events = fill(store, act)
    assert killed == [shard]
    assert bytes_of(store) == undisturbed
    shards = [each.shard for each in events if isinstance(each, ShardEvent)]
    # one that died after the put could not report it
    assert sorted(shards) == [n for n in range(4) if phase != "after the put" or n != shard]


def test_a_prompt_that_every_writer_fails_at_is_set_aside_alone(
    store: RolloutStore, undisturbed: dict[str, bytes]
) -> None:
    events = fill(
        store,
        lambda item: published(store, computed(store, item, CLERK), tell=must_not_be_called),
        poison=3,
    )
    aside = [each for each in events if isinstance(each, SetAsideEvent)]
    assert [(each.chunk, each.sequences) for each in aside] == [(1, [3])]
    for number in range(4):
        shard = store.fetch(number)
        assert set(shard.prompts_S[shard.finish_S == SET_ASIDE].tolist()) == {3} & {
            *store.rows(number)
        }
    others = {name for name, data in bytes_of(store).items() if undisturbed[name] == data}
    assert len(others) == 3


def test_writers_of_other_weights_are_refused() -> None:
    first = Ready({"a": 1}, RECIPE.writer_digest, "cpu", 0.0, "node")
    compare = comparison(RECIPE)
    compare(first, first, 0)
    with pytest.raises(TeacherError, match="writer 1 has other weights than the first"):
        compare(first, Ready({"a": 2}, RECIPE.writer_digest, "cpu", 0.0, "node"), 1)
    with pytest.raises(ChangedWeightsError, match="found other, wanted some-weights"):
        compare(first, Ready({"a": 1}, "other", "cpu", 0.0, "node"), 1)


def test_what_no_writer_can_write_is_told_with_the_settings_of_writers(store: RolloutStore) -> None:
    def fail(_item: PromptBlock) -> Answer:
        raise TeacherError("no room")

    with pytest.raises(
        TeacherError, match=r"shard 0 cannot be made although each of its prompts .*writer\.batch"
    ):
        fill(store, fail)
