"""Code in a file of a real checkpoint does not run: whichever ZeRO stage wrote it, whichever file
it is in, and whoever opens it."""

import itertools
import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from helpers.bombs import (
    Bomb,
    as_a_plain_pickle,
    beside_the_rest,
    in_the_old_format,
    instead,
    planted,
)
from helpers.command import stillhouse
from helpers.ranks import RankGroup
from helpers.training import ListTracker, refusals_of, refuse_outage, train_and_tell, with_student
from helpers.world import TinyWorld
from stillhouse.checkpoint.choice import newest
from stillhouse.checkpoint.manifest import Commit
from stillhouse.cluster.processes import Secrets
from stillhouse.errors import CheckpointError
from stillhouse.evaluation.scores import EvaluationJob, Trained, evaluate
from stillhouse.models.tokenizers import load_tokenizer
from stillhouse.pipeline import Plan
from stillhouse.pipeline.attempt import attempt
from stillhouse.student.export import export
from stillhouse.student.job import TrainJob
from stillhouse.student.universal import convert
from stillhouse.student.weights import consolidated_weights, weight_files

STAGES = (0, 1, 2, 3)
Ranks = dict[int, RankGroup]


@dataclass(frozen=True)
class Scene:
    """A real checkpoint of each stage, as one rank and as two ranks write it."""

    plan: Plan
    jobs: dict[tuple[int, int], TrainJob]  # by stage and number of ranks

    def root(self, stage: int, ranks: int = 2) -> Path:
        return Path(self.jobs[stage, ranks].checkpoints)

    def pickles(self, stage: int, ranks: int = 2) -> list[str]:
        return sorted(
            name for name in self.commit(stage, ranks).files if not name.endswith(".json")
        )

    def commit(self, stage: int, ranks: int = 2) -> Commit:
        found = newest(str(self.root(stage, ranks)))
        assert found is not None
        return found

    def folder(self, stage: int, ranks: int = 2) -> Path:
        return self.root(stage, ranks) / self.commit(stage, ranks).folder


@pytest.fixture(scope="module")
def scene(
    tiny_world: TinyWorld, rank_groups: Ranks, tmp_path_factory: pytest.TempPathFactory
) -> Scene:
    plan = tiny_world.plan(
        tmp_path_factory.mktemp("run"),
        student={"checkpoint_every_steps": 100, "ce_weight": 0.25, "init": "config"},
    )
    tiny_world.fill_store(plan)
    jobs = {}
    for stage, ranks in itertools.product(STAGES, (1, 2)):
        job = with_student(plan.jobs[0], zero_stage=stage)
        jobs[stage, ranks] = replace(job, run_dir=job.run_dir / str(ranks), total_steps=1)
        rank_groups[ranks].call(train_and_tell, jobs[stage, ranks])
    return Scene(plan, jobs)


def test_the_scene_holds_every_kind_of_file(scene: Scene) -> None:
    """So that none is forgotten below."""
    per_rank = {0: (1, 0), 1: (1, 2), 2: (1, 2), 3: (2, 2)}
    for stage in STAGES:
        names = scene.pickles(stage)
        found = tuple(
            sum(kind in name for name in names) for kind in ("model_states.pt", "optim_states.pt")
        )
        assert (found, len(names)) == (per_rank[stage], sum(per_rank[stage]))


def to_export(_scene: Scene, job: TrainJob, _ranks: Ranks) -> Any:
    tokenizer = load_tokenizer(job.section.model)
    return export(
        job.checkpoints,
        job.run_dir / "exported",
        section=job.section,
        tokenizer=tokenizer,
        card=str,
        tell=refuse_outage,
    )


def to_resume(_scene: Scene, job: TrainJob, ranks: Ranks) -> Any:
    return ranks[2].call(train_and_tell, replace(job, total_steps=2))


def to_go_on_with_another_number_of_ranks(_scene: Scene, job: TrainJob, ranks: Ranks) -> Any:
    return ranks[1].call(train_and_tell, replace(job, total_steps=2))


def to_evaluate(scene: Scene, job: TrainJob, ranks: Ranks) -> Any:
    config, heldout = scene.plan.config, scene.plan.sources.heldout
    comparison = EvaluationJob(
        teacher=config.teacher,
        models={"student": Trained(job.section, job.checkpoints, ListTracker())},
        vocab_size=scene.plan.recipe.vocab_size,
        section=config.evaluate,
        device="cpu",
        threads=1,
        secrets=Secrets(None),
    )
    return ranks[1].call(evaluate, comparison, heldout.block(0).select(slice(0, 2)))


def with_code_in(scene: Scene, name: str, *, stage: int, into: Path) -> TrainJob:
    """The job of two ranks, gone on with from a copy of its checkpoint in which `name` makes the
    folder `into`/it-ran."""
    job = replace(scene.jobs[stage, 2], run_dir=into)
    planted(
        scene.root(stage),
        Path(job.checkpoints),
        partial(beside_the_rest, bomb=Bomb(into / "it-ran")),
        names=(name,),
    )
    return job


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize(
    "to_open", [to_export, to_evaluate, to_resume, to_go_on_with_another_number_of_ranks]
)
def test_code_in_any_file_is_refused_by_name(
    scene: Scene,
    rank_groups: Ranks,
    to_open: Callable[[Scene, TrainJob, Ranks], Any],
    stage: int,
    tmp_path: Path,
) -> None:
    everything = to_open in (to_resume, to_go_on_with_another_number_of_ranks)
    for name in scene.pickles(stage) if everything else weight_files(scene.commit(stage)):
        if not name.endswith(".pt"):
            continue
        job = with_code_in(scene, name, stage=stage, into=tmp_path / name)
        with pytest.raises(
            CheckpointError, match=rf"{name} was not opened: it wants to use 'posix.mkdir'"
        ):
            to_open(scene, job, rank_groups)
        assert not (tmp_path / name / "it-ran").exists()


@pytest.mark.parametrize("asked", [None, "0", "1"])
def test_the_command_refuses_it_whatever_the_shell_asks_for(
    scene: Scene, asked: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """TORCH_FORCE_WEIGHTS_ONLY_LOAD as the user has it, and the variable that asks for the opposite
    beside it."""
    monkeypatch.delenv("TORCH_FORCE_WEIGHTS_ONLY_LOAD", raising=False)
    if asked is not None:
        monkeypatch.setenv("TORCH_FORCE_WEIGHTS_ONLY_LOAD", asked)
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1" if asked == "0" else "")
    for name in scene.pickles(3):
        job = with_code_in(scene, name, stage=3, into=tmp_path / name)
        plan = replace(
            scene.plan,
            config=scene.plan.config.model_copy(update={"student": job.section}),
            run_dir=job.run_dir,
        )
        with attempt(plan.request, "a test"):
            pass
        outcome = stillhouse("export", job.run_dir, tmp_path / name / "exported")
        assert (outcome.code, outcome.out) == (1, "")
        assert f"{name} was not opened: it wants to use 'posix.mkdir'" in outcome.err
        assert not (tmp_path / name / "exported").exists()
        assert not (tmp_path / name / "it-ran").exists()


@pytest.fixture
def no_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing outside of the functions themselves forbids code."""
    monkeypatch.setenv("TORCH_FORCE_WEIGHTS_ONLY_LOAD", "0")


@pytest.mark.usefixtures("no_environment")
@pytest.mark.parametrize("plant", [beside_the_rest, in_the_old_format, as_a_plain_pickle, instead])
@pytest.mark.parametrize("stage", STAGES)
def test_weights_are_read_without_running_code(
    scene: Scene, plant: Callable[..., None], stage: int, tmp_path: Path
) -> None:
    for name in scene.pickles(stage):
        marker = tmp_path / f"{name}-ran"
        plan = planted(
            scene.root(stage), tmp_path / name, partial(plant, bomb=Bomb(marker)), names=(name,)
        )
        if name in weight_files(plan):
            with pytest.raises(CheckpointError, match=rf"{name} was not opened"):
                consolidated_weights(tmp_path / name / plan.folder, zero_stage=stage)
        else:
            assert consolidated_weights(tmp_path / name / plan.folder, zero_stage=stage)
        assert not marker.exists()


@pytest.mark.usefixtures("no_environment")
@pytest.mark.parametrize("plant", [beside_the_rest, in_the_old_format, as_a_plain_pickle, instead])
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_a_checkpoint_is_converted_without_running_code(
    scene: Scene, plant: Callable[..., None], stage: int, tmp_path: Path
) -> None:
    for name in scene.pickles(stage):
        marker = tmp_path / f"{name}-ran"
        plan = planted(
            scene.root(stage), tmp_path / name, partial(plant, bomb=Bomb(marker)), names=(name,)
        )
        with pytest.raises(CheckpointError, match=rf"{name} was not opened"):
            convert(tmp_path / name / plan.folder, tmp_path / name / "universal")
        assert not marker.exists()


@pytest.mark.parametrize("stage", STAGES)
def test_an_engine_loads_without_running_code(
    scene: Scene, rank_groups: Ranks, stage: int, tmp_path: Path
) -> None:
    """Whoever calls it: `restore` looks at each file before, and here it is not asked."""
    names, markers, folders = scene.pickles(stage, 1), [], []
    for name, plant in itertools.product(names, (beside_the_rest, in_the_old_format, instead)):
        root = tmp_path / f"{name}-{plant.__name__}"
        markers.append(tmp_path / f"{root.name}-ran")
        folders.append(
            root
            / planted(
                scene.root(stage, 1), root, partial(plant, bomb=Bomb(markers[-1])), names=(name,)
            ).folder
        )
    (said,) = rank_groups[1].call(
        refusals_of, scene.jobs[stage, 1], [*folders, scene.folder(stage, 1)]
    )
    assert said[-1] == ""  # the sound one, after all of them
    for words, folder, marker in zip(said[:-1], folders, markers, strict=True):
        assert any(f"{folder / name} was not opened" in words for name in names)
        assert not marker.exists()


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_an_engine_loads_a_converted_checkpoint_without_running_code(
    scene: Scene, rank_groups: Ranks, stage: int, tmp_path: Path
) -> None:
    """It lies in the machine's temporary directory; each kind of file in it, of one parameter."""
    convert(scene.folder(stage), tmp_path / "sound")
    (parameter,) = (tmp_path / "sound").glob("zero/*.norm.weight")
    files = [
        *parameter.glob("*.pt"),
        *(tmp_path / "sound/zero").glob("*.pt"),
        *(tmp_path / "sound").glob("*.pt"),
    ]
    folders = []
    for number, file in enumerate(file.relative_to(tmp_path / "sound") for file in files):
        folders.append(tmp_path / str(number))
        shutil.copytree(tmp_path / "sound", folders[-1])
        instead(folders[-1] / file, Bomb(tmp_path / f"{number}-ran"))
    (said,) = rank_groups[1].call(
        refusals_of, scene.jobs[stage, 1], [*folders, tmp_path / "sound"], True
    )
    assert said[-1] == ""
    refused = [
        f"{folder}/" in words and "was not opened" in words
        for folder, words in zip(folders, said[:-1], strict=True)
    ]
    unread = {
        str(file.name) for file, is_refused in zip(files, refused, strict=True) if not is_refused
    }
    # one rank alone reads those of rank 0
    assert unread <= {"zero_pp_rank_1_mp_rank_00_model_states.pt"}
    assert not [*tmp_path.glob("*-ran")]


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_a_parameter_whose_name_is_a_path_makes_no_file_outside_of_the_conversion(
    scene: Scene, stage: int, tmp_path: Path
) -> None:
    """DeepSpeed makes folders by the names of parameters."""

    def rename(path: Path) -> None:
        torch.save(
            renamed(
                torch.load(path, weights_only=False),
                "lm.model.norm.weight",
                str(tmp_path / "outside"),
            ),
            path,
        )

    plan = planted(scene.root(stage), tmp_path / "root", rename, names=tuple(scene.pickles(stage)))
    with pytest.raises(
        CheckpointError, match=r"was not used: it names '.*/outside', which is a path"
    ):
        convert(tmp_path / "root" / plan.folder, tmp_path / "universal")
    assert not (tmp_path / "outside").exists()


def renamed(value: Any, old: str, new: str) -> Any:
    """The state with another name for one of its parameters, wherever it stands."""
    if isinstance(value, dict):
        return type(value)(
            (new if key == old else key, renamed(item, old, new)) for key, item in value.items()
        )
    if type(value) in (list, tuple):
        return type(value)(renamed(item, old, new) for item in value)
    return new if isinstance(value, str) and value == old else value
