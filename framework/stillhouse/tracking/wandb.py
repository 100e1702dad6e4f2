"""The view of a journal in Weights & Biases."""

from collections.abc import Callable, Mapping
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any, Self

from stillhouse.config import TrackingSection
from stillhouse.errors import UserError
from stillhouse.redaction import scrub
from stillhouse.terminal import one_line, say
from stillhouse.tracking.events import (
    CheckpointEvent,
    EndEvent,
    EvalEvent,
    HeldoutEvent,
    NewerEvent,
    RunEvent,
    StartEvent,
    TrainEvent,
)

# What W&B draws its charts over: an axis, and the names of the values that belong to it.
_WANDB_AXES = {
    "student/step": ["student/*", "student_checkpoint/*", "eval/student/*"],
    "control/step": ["control/*", "control_checkpoint/*", "eval/control/*"],
    "pool/published": ["pool/*", "chunk/*"],
}


class WandbView:
    """Mirrors a journal's events, from the first one on, to a run of Weights & Biases.

    W&B's step is the number of the event. So a journal that is read again after a resume adds
    nothing twice, and fills in what a killed process had not yet sent. Errors of W&B end the
    mirroring and never the run, for the journal is the record.
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
        """Open the run `run_id`, or open it again. `config` is the resolved configuration.

        Raises UserError where mode online is asked for and W&B cannot be reached.
        """
        self._run: Any = _open_run(
            section,
            run_dir,
            config=scrub(dict(config)),
            run_id=run_id,
            init_timeout_s=init_timeout_s,
        )
        self.url: str | None = None if self._run.offline else self._run.url
        self._num_events = 0
        self._exit_code = 1
        for axis, names in _WANDB_AXES.items():
            self._run.define_metric(axis)
            for name in names:
                # the summary's scores are those of the evaluation, not the last of a curve
                summary = "none" if name.startswith("eval/") else None
                self._run.define_metric(name, step_metric=axis, summary=summary)

    def record(self, event: RunEvent) -> None:
        """Send an event to W&B."""
        step, self._num_events = self._num_events, self._num_events + 1
        self._guarded(lambda: self._send(event, step))

    def _send(self, event: RunEvent, step: int) -> None:
        values = scrub(asdict(event))
        match event:
            case NewerEvent():
                return
            case StartEvent():
                self._run.config.update({"start": values}, allow_val_change=True)
                self._run.log({"attempt": event.attempt}, step=step)
            case EvalEvent():
                del values["model"]
                self._run.summary.update(
                    {f"eval/{event.model}/{name}": value for name, value in values.items()}
                )
            case EndEvent():
                self._exit_code = 0 if event.outcome == "done" else 1
                self._run.summary.update({"outcome": event.outcome, "message": values["message"]})
            case _:
                self._run.log(_numbers(event, values) | {"_timestamp": event.time}, step=step)

    def close(self) -> None:
        """Write out what is buffered and, online, send it. Without an EndEvent of outcome done, W&B
        shows the run as failed."""
        self._guarded(lambda: self._run.finish(exit_code=self._exit_code))

    def _guarded(self, act: Callable[[], None]) -> None:
        """Call W&B, and end the mirroring where it raises."""
        if self._run is None:
            return
        try:
            act()
        except Exception as error:
            self._run = None
            words = f"W&B failed ({error!r}) and shows no more of this run; the journal goes on"
            say(_scrubbed_line(words), error=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _numbers(event: RunEvent, values: Mapping[str, Any]) -> dict[str, float]:
    """The numbers among an event's values, by their names in W&B."""
    group = _group_of(event)
    numbers = {
        f"{group}/{name}": value
        for name, value in values.items()
        if isinstance(value, int | float) and name != "time"
    }
    if isinstance(event, HeldoutEvent):  # its axis is in another group
        numbers[f"{event.role}/step"] = event.step
    return numbers


def _group_of(event: RunEvent) -> str:
    """The first part of the names of an event's values in W&B."""
    match event:
        case TrainEvent():
            return event.role
        case CheckpointEvent():
            return f"{event.role}_checkpoint"
        case HeldoutEvent():
            return f"eval/{event.role}"
    return event.kind


def _open_run(
    section: TrackingSection,
    run_dir: Path,
    *,
    config: dict[str, Any],
    run_id: str,
    init_timeout_s: float,
) -> Any:
    """Open a run of W&B: online, or offline where the section asks for that, or for `auto` and W&B
    cannot be used. Raises UserError where it asks for online."""
    import wandb

    # What is the same in both modes.
    wandb.setup(wandb.Settings(silent=True))
    init = partial(
        wandb.init,
        project=section.project,
        entity=section.entity,
        tags=section.tags,
        dir=run_dir,
        id=run_id,
        resume="allow",
        config=config,
        reinit="create_new",
        settings=_wandb_settings(init_timeout_s),
    )

    # Online.
    try:
        if section.wandb == "online" or (
            section.wandb == "auto" and wandb.login(prompt=False, verify=False)
        ):
            return init(mode="online")
    except wandb.Error as error:
        if section.wandb == "online":
            raise UserError(
                f"W&B cannot be reached: {error}; run `wandb login`, or set tracking.wandb = "
                '"offline"'
            ) from error
        wandb.teardown()  # the service still holds the id of the run that it could not start
        wandb.setup(wandb.Settings(silent=True))
        words = (
            f"W&B cannot be reached ({error}); its values go to {run_dir / 'wandb'}, from where "
            "`wandb sync` sends them"
        )
        say(_scrubbed_line(words), error=True)

    # Offline.
    return init(mode="offline")


def _wandb_settings(init_timeout_s: float) -> Any:
    """Nothing but the events is sent: output, command line, git remote and packages may hold
    secrets."""
    import wandb

    return wandb.Settings(
        silent=True,
        console="off",
        x_disable_meta=True,
        x_save_requirements=False,
        disable_git=True,
        disable_code=True,
        init_timeout=init_timeout_s,
        finish_timeout=300.0,  # seconds: an upload that hangs must not hold the run's machines
    )


def _scrubbed_line(text: str) -> str:
    return one_line(scrub(text))
