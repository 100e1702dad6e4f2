"""A student that is cut from its teacher: made once, trained on a real engine, and exported."""

from pathlib import Path

import torch
from transformers import AutoModelForCausalLM

from helpers.ranks import RankGroup
from helpers.training import loss_of_step, train_and_tell
from helpers.world import TinyWorld
from stillhouse import pipeline
from stillhouse.models.load import load_model
from stillhouse.pipeline.cuts import make_cut


def test_a_student_cut_from_its_teacher_begins_as_that_part_of_it_and_learns(
    tiny_world: TinyWorld, rank_groups: dict[int, RankGroup], tmp_path: Path
) -> None:
    teacher = tiny_world.values["teacher"]["model"]
    student = {
        "model": teacher,
        "init": {"layers": [1]},
        "learning_rate": 1e-2,
        "warmup_steps": 0,
        "max_steps": 12,
        "zero_stage": 2,
    }
    plan = tiny_world.plan(tmp_path / "run", student=student)
    tiny_world.fill_store(plan)
    job = plan.jobs[0]
    assert job.origin.settings["init"] == {"layers": [1], "intermediate_size": None}
    assert job.origin.settings["model"] == Path(teacher).name
    # made, and begun with
    make_cut(plan, workers=())
    cut = Path(job.section.model)
    assert cut.is_relative_to(plan.run_dir)
    first_loss = loss_of_step(job, 0, model=cut)
    rows = rank_groups[2].call(train_and_tell, job)[0]
    assert abs(rows[0].loss - first_loss) < 1e-5 * first_loss
    assert rows[-1].loss < rows[0].loss - 0.05
    # what comes of it
    assert pipeline.export_run(plan, tmp_path / "out") == 12
    trained = AutoModelForCausalLM.from_pretrained(tmp_path / "out").state_dict()
    begun = load_model(job.section).state_dict()
    assert trained.keys() == begun.keys()
    assert not any(torch.equal(trained[name], begun[name]) for name in trained)
