"""Views of the journal: Weights & Biases and the progress bars. They are fed rows; they hold
nothing that the journal does not."""

import math
import time
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, Self

from rich.console import Console
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from stillhouse.config import TrackingSection
from stillhouse.errors import UserError
from stillhouse.redaction import scrub
from stillhouse.terminal import one_line, say
from stillhouse.tracking.events import (
    DelayRow,
    EndRow,
    EvalRow,
    NewerRow,
    OutageRow,
    PoolRow,
    Row,
    StallRow,
    StartRow,
    TrainRow,
    WaitRow,
)

_SAY_EVERY_S = 60.0
_WANDB_AXES = {
    "student/step": ["student/*", "student_checkpoint/*"],
    "control/step": ["control/*", "control_checkpoint/*"],
    "pool/published": ["pool/*", "chunk/*"],
}


class WandbView:
    """Mirrors the rows of a journal, handed over from its first one on, to Weights & Biases.

    W&B's step is the number of the row, so a journal that is fed again after a resume adds nothing
    twice, and fills in what W&B had not yet written when it was killed. A view is not the record:
    once it is open, its failures end the mirroring and never the run.
    """

    def __init__(
        self,
        section: TrackingSection,
        run_dir: Path,
        *,
        config: Mapping[str, Any],
        run_id: str,
        init_timeout_s: float = 60.0,
    ) -> None:
        """Open the run `run_id`, or open it again; `config` is the resolved configuration.

        Raises UserError where mode online cannot be had.
        """
        self._run: Any = _open_run(
            section,
            run_dir,
            config=scrub(dict(config)),
            run_id=run_id,
            init_timeout_s=init_timeout_s,
        )
        self.url: str | None = None if self._run.offline else self._run.url
        self._next_row = 0
        self._exit_code = 1
        for axis, names in _WANDB_AXES.items():
            self._run.define_metric(axis)
            for name in names:
                self._run.define_metric(name, step_metric=axis)

    def record(self, row: Row) -> None:
        number, self._next_row = self._next_row, self._next_row + 1
        self._guarded(lambda: self._send(row, number))

    def _send(self, row: Row, number: int) -> None:
        values = scrub(asdict(row))
        match row:
            case NewerRow():
                return
            case StartRow():
                self._run.config.update({"start": values}, allow_val_change=True)
                self._run.log({"attempt": row.attempt}, step=number)
            case EvalRow():
                self._run.summary.update(
                    {
                        f"eval/{row.model}/{name}": value
                        for name, value in values.items()
                        if name != "model"
                    }
                )
            case EndRow():
                self._exit_code = 0 if row.outcome == "done" else 1
                self._run.summary.update({"outcome": row.outcome, "message": values["message"]})
            case _:
                group = {
                    "train": values.get("role"),
                    "checkpoint": f"{values.get('role')}_checkpoint",
                }.get(row.kind, row.kind)
                numbers = {
                    name: value
                    for name, value in values.items()
                    if isinstance(value, int | float) and name != "time"
                }
                self._run.log(
                    {f"{group}/{name}": value for name, value in numbers.items()}
                    | {"_timestamp": row.time},
                    step=number,
                )

    def close(self) -> None:
        """Write out what is buffered and, online, send it. Without an EndRow of outcome done, W&B
        shows the run as failed."""
        self._guarded(lambda: self._run.finish(exit_code=self._exit_code))

    def _guarded(self, act: Callable[[], None]) -> None:
        if self._run is None:
            return
        try:
            act()
        except Exception as error:
            self._run = None
            Console(stderr=True).print(
                Text(one_line(scrub(f"W&B stopped taking rows ({error!r}); the journal goes on")))
            )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _open_run(
    section: TrackingSection,
    run_dir: Path,
    *,
    config: dict[str, Any],
    run_id: str,
    init_timeout_s: float,
) -> Any:
    import wandb

    wandb.setup(wandb.Settings(silent=True))
    quiet = wandb.Settings(
        silent=True,
        # what is printed, the command line, the git remote and the host's packages may all hold
        # secrets
        console="off",
        x_disable_meta=True,
        x_save_requirements=False,
        disable_git=True,
        disable_code=True,
        init_timeout=init_timeout_s,
        finish_timeout=300.0,  # seconds: an upload that hangs must not hold the run's machines
    )

    def start(mode: Literal["online", "offline"]) -> Any:
        return wandb.init(
            project=section.project,
            entity=section.entity,
            tags=section.tags,
            dir=run_dir,
            id=run_id,
            resume="allow",
            mode=mode,
            config=config,
            reinit="create_new",
            settings=quiet,
        )

    try:
        if section.wandb == "online" or (
            section.wandb == "auto" and wandb.login(prompt=False, verify=False)
        ):
            return start("online")
    except wandb.Error as error:
        if section.wandb == "online":
            raise UserError(
                f"W&B cannot be reached: {error}; run `wandb login`, or set tracking.wandb = "
                '"offline"'
            ) from error
        wandb.teardown()  # the service still holds the id of the run that it could not start
        wandb.setup(wandb.Settings(silent=True))
        where = run_dir / "wandb"
        say(
            one_line(
                scrub(
                    f"W&B cannot be reached ({error}); its rows go to {where}, from where `wandb "
                    "sync` sends them"
                )
            ),
            error=True,
        )
    return start("offline")


class ProgressView:
    """Two bars side by side, teachers and student; where the output is no terminal, one plain line
    every `every_s` seconds at most.

    What waits for a store, or stood still, is said in lines between, one a minute at most: an
    outage meets many processes at once.
    """

    def __init__(
        self,
        console: Console | None = None,
        *,
        clock: Callable[[], float] = time.time,
        every_s: float = 10.0,
    ) -> None:
        self._console = console or Console()
        self._clock = clock
        self._every_s = 0.1 if self._console.is_terminal else every_s
        self._last_shown = self._last_said = -math.inf
        self._stale = False
        self._start: StartRow | None = None
        self._wait: WaitRow | None = None
        self._pool: PoolRow | None = None
        self._train: TrainRow | None = None
        self._pool_pace = _Pace()
        self._train_pace = _Pace()
        self._live = (
            Live(console=self._console, auto_refresh=False) if self._console.is_terminal else None
        )

    def record(self, row: Row) -> None:
        match row:
            case StartRow():
                self._start, self._wait, self._pool, self._train = row, None, None, None
                self._pool_pace, self._train_pace = _Pace(), _Pace()
            case WaitRow():
                self._wait = row if row.missing else None
            case PoolRow():
                self._pool = row
                self._pool_pace.add(row.time, row.published)
            case TrainRow():
                if self._train is not None and self._train.role != row.role:
                    self._train_pace = _Pace()
                self._train = row
                self._train_pace.add(row.time, row.step)
            case DelayRow():
                self._say(
                    f"the {row.role}'s checkpoint of step {row.step} cannot be written yet: "
                    f"{row.why}"
                )
                return
            case OutageRow():
                self._say(f"{row.who} has waited for {row.seconds:.0f} s: {row.why}")
                return
            case StallRow():
                self._say(_stall_text(row))
                return
            case _:
                return
        self._stale = True
        if self._clock() - self._last_shown >= self._every_s:
            self._show()

    def _say(self, line: str) -> None:
        if self._clock() - self._last_said >= _SAY_EVERY_S:
            self._last_said = self._clock()
            self._console.print(line, highlight=False, markup=False, soft_wrap=True)

    def close(self) -> None:
        if self._stale:
            self._show()
        if self._live is not None:
            self._live.stop()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _show(self) -> None:
        self._last_shown, self._stale = self._clock(), False
        teachers, student = self._teachers(), self._student()
        if self._live is None:
            line = f"{teachers.title}{teachers.details} | {student.title}{student.details}"
            self._console.print(Text(one_line(line)), soft_wrap=True)
            return
        sides = Table.grid(padding=(0, 3), expand=True)
        sides.add_column(ratio=1)
        sides.add_column(ratio=1)
        sides.add_row(Text(one_line(teachers.title)), Text(one_line(student.title)))
        sides.add_row(teachers.bar, student.bar)
        sides.add_row(
            Text(teachers.details.removeprefix(", ")), Text(student.details.removeprefix(", "))
        )
        self._live.start()
        self._live.update(sides, refresh=True)

    def _teachers(self) -> "_Side":
        if (row := self._pool) is None:
            title = "teachers: starting" if self._train is None else "no teachers at work"
            if self._wait is not None and self._train is None:
                title = f"waiting for machines to join the cluster: {self._wait.missing}"
            return _Side(title, "", ProgressBar(total=1, completed=0))
        details = (
            f", {row.in_flight} in flight, window {row.window_chunks}, "
            f"{row.tokens_per_s:,.0f} tokens/s"
        )
        eta = _clock_text(self._pool_pace.seconds_to(row.needed))
        bar = ProgressBar(total=max(row.needed, 1), completed=row.published)
        return _Side(f"teachers {row.published}/{row.needed} chunks", f"{details}, ETA {eta}", bar)

    def _student(self) -> "_Side":
        if (row := self._train) is None:
            return _Side(
                "student: waiting for its first step", "", ProgressBar(total=1, completed=0)
            )
        steps = self._start.total_steps if self._start else row.step
        waiting = row.data_wait_s / row.seconds if row.seconds else 0.0
        details = f", loss {row.loss:.3f}, {row.tokens_per_s:,.0f} tokens/s, waiting {waiting:.0%}"
        eta = _clock_text(self._train_pace.seconds_to(steps))
        bar = ProgressBar(total=max(steps, 1), completed=row.step)
        return _Side(f"{row.role} {row.step}/{steps} steps", f"{details}, ETA {eta}", bar)


@dataclass(frozen=True, slots=True)
class _Side:
    title: str
    details: str
    bar: ProgressBar


class _Pace:
    """How fast a count has grown over its last few sightings."""

    def __init__(self) -> None:
        self._seen: deque[tuple[float, int]] = deque(maxlen=32)

    def add(self, seconds: float, count: int) -> None:
        self._seen.append((seconds, count))

    def seconds_to(self, total: int) -> float | None:
        """None while there is nothing to judge by."""
        (begin, first), (end, last) = self._seen[0], self._seen[-1]
        return (total - last) * (end - begin) / (last - first) if last > first else None


def _stall_text(row: StallRow) -> str:
    who = (
        f"teacher {row.rank}"
        if row.role == "teacher"
        else f"{row.role}, rank {row.rank}, step {row.step},"
    )
    what = row.phase if row.chunk is None else f"{row.phase}, chunk {row.chunk}"
    return f"{who} stood still for {row.seconds:.0f} s ({what}): it is killed and replaced"


def _clock_text(seconds: float | None) -> str:
    if seconds is None:
        return "?"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
