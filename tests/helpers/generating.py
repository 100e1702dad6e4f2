"""A generation whose processes are killed at chosen moments: requests on their way to the bucket,
or the bucket's answers, are held until the victim is gone.

The commands are real, each `generate` has a Ray cluster of its own, and what the bucket keeps of
each key is all that it was ever given.
"""

import json
import random
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from time import monotonic, sleep
from typing import Any, Literal

import psutil
from transformers import GenerationConfig

from helpers.command import as_toml
from helpers.commands import Command, CommandServer
from helpers.faults import Fault, FaultyS3, Matches
from helpers.models import make_model
from helpers.scene import make_bucket
from stillhouse import pipeline
from stillhouse.config.generate import load_generate_config
from stillhouse.pipeline import Generation

NUM_PROMPTS, SAMPLES, SHARD_PROMPTS = 34, 2, 3
Moment = Literal["before", "after"]
MOMENTS: tuple[Moment, ...] = ("before", "after")
_WRITER = "ray::_WriterActor"
_AGENTS = ("ray::DashboardAgent", "ray::RuntimeEnvAgent")
_PATIENCE_S = 240.0
_LOOK_EVERY_S = 0.05
_SLOWLY_S, _VERY_SLOWLY_S = 0.2, 2.0
_END_S = 30.0


def puts_of(name: str) -> Matches:
    """Publications of the objects whose keys have this in them."""
    return lambda request: request.method == "PUT" and name in request.path


RECIPE, SHARDS, VERDICTS = map(puts_of, ("/recipe.json", "/shards/", "/verdicts/"))


@dataclass
class Generating:
    """The same two commands, given again and again."""

    folder: Path
    bucket: str
    s3: FaultyS3
    commands: CommandServer
    num_writers_killed: int = 0

    @classmethod
    def prepare(
        cls, folder: Path, *, bucket: str, s3: FaultyS3, commands: CommandServer
    ) -> "Generating":
        """A writer whose samples often end themselves, sums as its prompts, and a config file."""
        make_bucket(bucket)
        make_model(folder / "writer", vocab_size=300, weight_std=0.3, seed=1)
        GenerationConfig(eos_token_id=[*range(0, 300, 12)]).save_pretrained(folder / "writer")
        rows = [{"sum": f"{n}+{n}=", "answer": f"{2 * n}"} for n in range(NUM_PROMPTS)]
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (folder / "sums.jsonl").write_text(text)
        values: dict[str, dict[str, Any]] = {
            "prompts": {
                "dataset": str(folder / "sums.jsonl"),
                "format": "text",
                "prompt_column": "sum",
                "reference_column": "answer",
            },
            "writer": {
                "model": str(folder / "writer"),
                "dtype": "float32",
                "num_cpus": 0.25,
                "batch_sequences": 4,
                "max_failures": 100,  # for deaths that happen to the same shard
            },
            "sampling": {"samples": SAMPLES, "max_new_tokens": 20, "sequence_length": 64},
            "store": {"url": f"s3://{bucket}/casks", "shard_prompts": SHARD_PROMPTS},
            "cluster": {"num_cpus": 2, "notices": "off"},
        }
        (folder / "maths.toml").write_text(as_toml(values) + "[[graders]]\nkind = 'number'\n")
        return cls(folder, bucket, s3, commands)

    def plan(self) -> Generation:
        config = load_generate_config(self.folder / "maths.toml")
        return pipeline.plan_generation(
            config, run_dir=self.folder / "run", cache_dir=self.folder / "cache"
        )

    def begin(self, verb: str) -> Command:
        place = ("--run-dir", self.folder / "run") if verb == "generate" else ()
        log = self.folder / f"{verb}.log"
        environment = {"AWS_ENDPOINT_URL": self.s3.url}
        return self.commands.start(
            verb, self.folder / "maths.toml", *place, log=log, environment=environment
        )

    def finish(self, verb: str) -> None:
        command = self.begin(verb)
        assert command.wait(timeout_s=_PATIENCE_S) == 0, command.words()

    def until(self, condition: Callable[[], object], command: Command) -> None:
        """Wait for it. Fails where the command ends before."""
        deadline = monotonic() + _PATIENCE_S
        while not condition():
            assert not command.has_ended(), command.words()
            assert monotonic() < deadline, command.words()
            sleep(_LOOK_EVERY_S)

    def publish_some(self, command: Command, num_shards: int) -> None:
        """Slowly, so that there are more to come."""
        fault, goal = self.s3.slow(SHARDS, seconds=_SLOWLY_S), self.num_offered + num_shards
        self.until(lambda: self.num_offered >= goal, command)
        self.s3.end(fault)

    @property
    def num_offered(self) -> int:
        """Puts of shards that reached the bucket."""
        return sum(map(SHARDS, self.s3.passed))

    # ---- deaths

    def kill_at_a_put(self, command: Command, matches: Matches, moment: Moment) -> None:
        """Before the put, which then never reaches the bucket; or after it, when nobody was
        told."""
        self._hold(matches, moment)
        self.until(lambda: self.s3.held, command)
        self.kill(command)

    def kill_writer_at_its_put(self, command: Command, moment: Moment) -> None:
        fault = self._hold(SHARDS, moment)
        self.until(lambda: self.s3.held, command)
        started = psutil.Process(command.pid).children(recursive=True)
        (writer,) = (each for each, title in _titled(started) if title.startswith(_WRITER))
        writer.kill()
        self.num_writers_killed += 1
        self.until(lambda: not self.s3.held, command)
        self.s3.end(fault)

    def kill(self, command: Command) -> None:
        """SIGKILL a command. What it started has to end by itself, and what is held is lost.

        Ray's two agents look for their head for a minute before they end.
        """
        started = psutil.Process(command.pid).children(recursive=True)
        command.kill()
        deadline = monotonic() + _END_S
        while left := [title for _, title in _titled(started) if title not in _AGENTS]:
            assert monotonic() < deadline, left
            sleep(_LOOK_EVERY_S)
        self.s3.end()

    def _hold(self, matches: Matches, moment: Moment) -> Fault:
        return self.s3.hold(matches) if moment == "before" else self.s3.hold_answers(matches)


def _titled(processes: Sequence[psutil.Process]) -> list[tuple[psutil.Process, str]]:
    """Those that are there, each with its title."""
    found = []
    for process in processes:
        with suppress(psutil.NoSuchProcess, psutil.ZombieProcess):
            found.append((process, "".join(process.cmdline()[:1])))
    return found


def live_through(work: Generating) -> None:
    """Each death once, and the whole commands at last."""
    # before there is anything; between two shards, after two writers; and after a put
    work.kill_at_a_put(work.begin("generate"), RECIPE, "before")
    command = work.begin("generate")
    work.kill_writer_at_its_put(command, "before")
    work.kill_writer_at_its_put(command, "after")
    work.publish_some(command, 2)
    work.kill_at_a_put(command, SHARDS, "before")
    work.kill_at_a_put(work.begin("generate"), SHARDS, "after")
    work.finish("generate")

    # the same of verdicts
    for moment in MOMENTS:
        work.kill_at_a_put(work.begin("grade"), VERDICTS, moment)
    work.finish("grade")


def live_through_more(work: Generating, rng: random.Random) -> None:
    """Deaths of all kinds, which are drawn; of a command also somewhere on its way."""
    for _ in range(4):
        if work.num_offered > NUM_PROMPTS // SHARD_PROMPTS // 2:
            break  # a command might be done before its end comes
        command = work.begin("generate")
        work.s3.slow(SHARDS, seconds=_VERY_SLOWLY_S)
        if rng.random() < 0.5:
            sleep(rng.uniform(0.0, 10.0))
            work.kill(command)
            continue
        for _ in range(rng.randint(0, 2)):
            work.kill_writer_at_its_put(command, rng.choice(MOMENTS))
        work.kill_at_a_put(command, SHARDS, rng.choice(MOMENTS))
    work.finish("generate")
    for _ in range(3):
        work.kill_at_a_put(work.begin("grade"), VERDICTS, rng.choice(MOMENTS))
    work.finish("grade")
