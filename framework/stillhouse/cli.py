"""The command `stillhouse`: parse first, import what is heavy afterwards, turn what is raised into one readable message and an exit code.

Exit codes: 0 done, 1 the run failed, 2 the user's mistake, 130 interrupted, 143 told to go by SIGTERM (the same command goes on).
"""

import logging
import os
import shlex
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from typer.core import TyperGroup

from stillhouse.errors import ConfigError, InterruptedRunError, StillhouseError, UserError

if TYPE_CHECKING:
    from stillhouse.evaluate import ModelName, Scores
    from stillhouse.pipeline import Plan


class Verbs(TyperGroup):
    """The verbs, and what becomes of the errors that they raise. A bug keeps its traceback."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:
            print("interrupted; the same command goes on from here", file=sys.stderr)
            raise typer.Exit(130) from None
        except InterruptedRunError as error:
            print(f"interrupted: {error}", file=sys.stderr)
            raise typer.Exit(143) from None
        except StillhouseError as error:
            print(f"error: {error}", file=sys.stderr)
            raise typer.Exit(2 if isinstance(error, UserError) else 1) from None


app = typer.Typer(
    cls=Verbs,
    help="Distil large language models through exact compressed top-k logits.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
store_app = typer.Typer(help="Look at, verify and tidy a chunk store.", no_args_is_help=True)
bench_app = typer.Typer(help="Measure Stillhouse against what one would do without it.", no_args_is_help=True)
app.add_typer(store_app, name="store")
app.add_typer(bench_app, name="bench")

Configs = Annotated[list[Path], typer.Argument(metavar="CONFIG", help="TOML files, merged left to right.")]
Overrides = Annotated[list[str] | None, typer.Option("--set", metavar="'SECTION.KEY = VALUE'", help="Override one value: a line of TOML.")]
RunDir = Annotated[Path | None, typer.Option("--run-dir", help="Where the run lives. Default: runs/ and the last config's name.")]
ExistingRun = Annotated[Path, typer.Argument(metavar="RUN_DIR", help="The directory of a run.")]
StoreUrl = Annotated[str, typer.Argument(metavar="URL", help="A directory, or s3://, gs:// or az:// with bucket and prefix.")]

Tokens = Annotated[int, typer.Option("--tokens", min=1, help="In the batch.")]
VocabSize = Annotated[int, typer.Option("--vocab", min=2)]
HiddenSize = Annotated[int, typer.Option("--hidden", min=1)]
Kept = Annotated[int, typer.Option("--k", min=1, help="Exact entries of a target.")]
TorchDtype = Annotated[Literal["float32", "bfloat16"], typer.Option("--dtype", help="Of the logits, or of hidden states and weight.")]
TorchDevice = Annotated[Literal["cpu", "cuda"], typer.Option("--device")]
Repeats = Annotated[int, typer.Option("--repeats", min=1, help="Times that each way is measured, on fresh data.")]
WithCompile = Annotated[bool, typer.Option("--compile/--no-compile", help="Also what torch.compile makes of torch's ways.")]
Out = Annotated[Path | None, typer.Option("--out", help="A JSON file for all that was measured.")]


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", is_eager=True, callback=lambda wanted: _show_version(wanted), help="Show it.")
    ] = False,
) -> None:
    """Distil large language models through exact compressed top-k logits."""


@app.command()
def init(
    teacher: Annotated[str, typer.Argument(help="The teacher: a hub name or a local directory.")],
    student: Annotated[str, typer.Argument(help="The student: a hub name or a local directory.")],
    dataset: Annotated[str, typer.Argument(help="A hub data set, local files, or 'stdlib'.")],
    out: Annotated[Path, typer.Option("--out", help="The file to write.")] = Path("distil.toml"),
) -> None:
    """Write a ten-line config for two models and a data set."""
    from stillhouse.starter import starter_toml

    text = starter_toml(teacher=teacher, student=student, dataset=dataset)
    try:
        with out.open("x", encoding="utf-8") as file:
            file.write(text)
    except FileExistsError:
        raise ConfigError(f"{out} exists already and stays as it is; name another file with --out") from None
    except OSError as error:
        raise ConfigError(f"cannot write {out}: {error.strerror}; name another file with --out") from None
    print(text, end="")
    print(f"\nWritten to {out}. Next: `stillhouse check {out}`, then `stillhouse run {out}`.")


@app.command()
def demo(run_dir: Annotated[Path, typer.Option("--run-dir", help="Where everything goes.")] = Path("runs/demo")) -> None:
    """Make a small teacher from Python's own standard library, distil it, and write the report."""
    _quieten()
    from stillhouse import demo

    demo.run_demo(run_dir, cache_dir=_cache_dir())


@app.command()
def check(configs: Configs, overrides: Overrides = None, run_dir: RunDir = None) -> None:
    """Validate everything that can be validated without a GPU, and say what a run would need."""
    made = _plan(configs, overrides, run_dir)
    from stillhouse.check import describe

    describe(made)


@app.command()
def run(configs: Configs, overrides: Overrides = None, run_dir: RunDir = None) -> None:
    """Produce and train at the same time, evaluate, report. Run it again to go on where it stopped."""
    made = _plan(configs, overrides, run_dir)
    from stillhouse import pipeline

    pipeline.run(made, command=_typed())
    _announce(made.run_dir)


@app.command()
def produce(configs: Configs, overrides: Overrides = None, run_dir: RunDir = None) -> None:
    """Fill the store with the teacher's targets; no student."""
    made = _plan(configs, overrides, run_dir)
    from stillhouse import pipeline

    pipeline.produce(made, command=_typed())


@app.command()
def train(configs: Configs, overrides: Overrides = None, run_dir: RunDir = None) -> None:
    """Train on a store that `produce` has filled, evaluate, report; no teacher pool."""
    made = _plan(configs, overrides, run_dir)
    from stillhouse import pipeline

    pipeline.train(made, command=_typed())
    _announce(made.run_dir)


@app.command(name="eval")
def evaluate(run_dir: ExistingRun) -> None:
    """Score teacher, student and control on the held-out split again."""
    made = _existing(run_dir)
    from stillhouse import pipeline

    _print_scores(pipeline.evaluate_run(made))


@app.command()
def report(run_dir: ExistingRun) -> None:
    """Write report.html from the run's journal."""
    from stillhouse.report import write_report

    print(write_report(run_dir))


@app.command()
def export(run_dir: ExistingRun, out: Annotated[Path, typer.Argument(metavar="OUT", help="The directory to write.")]) -> None:
    """Write the student as a plain Hugging Face directory."""
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ConfigError(f"{out} exists already and is not empty; name a new directory")
    made = _existing(run_dir)
    from stillhouse import pipeline

    steps = pipeline.export_run(made, out)
    print(f"{out}: the student after {steps} steps; AutoModelForCausalLM.from_pretrained('{out}') opens it")


@store_app.command(name="ls")
def store_ls(url: StoreUrl) -> None:
    """The recipes in a store, and how much of each is there."""
    from stillhouse import inventory

    inventory.list_store(url)


@store_app.command(name="stat")
def store_stat(
    url: StoreUrl,
    fingerprint: Annotated[str, typer.Argument(metavar="[FINGERPRINT]", help="Its first digits; default: every recipe.")] = "",
) -> None:
    """Every field of a recipe, and which of its chunks are missing."""
    from stillhouse import inventory

    inventory.show_recipes(url, fingerprint)


@store_app.command(name="verify")
def store_verify(
    url: StoreUrl,
    quarantine: Annotated[bool, typer.Option("--quarantine", help="Move damaged chunks away: `produce` then makes them again.")] = False,
    repair: Annotated[
        Path | None,
        typer.Option("--repair", metavar="RUN_DIR|CONFIG", help="Make damaged chunks of this run's recipe again, with its teacher."),
    ] = None,
) -> None:
    """Read every chunk and check every bit of it; exit code 1 where any is damaged, and was not repaired."""
    from stillhouse import inventory

    if repair is not None:
        inventory.repair(url, _existing(repair) if repair.is_dir() else _plan([repair], None, None))
        return
    inventory.verify(url, quarantine=quarantine)


@store_app.command(name="sweep")
def store_sweep(
    url: StoreUrl,
    older_than_hours: Annotated[float, typer.Option("--older-than-hours", min=0.0, help="A younger one may still be written.")] = 24.0,
) -> None:
    """Remove what killed writers left behind, and name what lies in quarantine."""
    from stillhouse import inventory

    inventory.tidy(url, older_than_s=older_than_hours * 3600)


@bench_app.command(name="pipeline")
def bench_pipeline(
    work_dir: Annotated[Path, typer.Option("--work-dir", help="Where models, stores and runs go.")] = Path("runs/bench"),
    num_steps: Annotated[int, typer.Option("--steps", help="Optimiser steps of each way.")] = 160,
    num_rounds: Annotated[int, typer.Option("--rounds", help="Times that every way is measured.")] = 3,
    out: Out = None,
) -> None:
    """`run`, and the same once cached, against one process that is teacher and student in turn, on two cores."""
    _quieten()
    from stillhouse.bench.pipeline import bench_pipeline

    bench_pipeline(work_dir, num_steps=num_steps, num_rounds=num_rounds, command=_typed(), out=out)


@bench_app.command(name="codec")
def bench_codec(
    num_tokens: Tokens = 192,
    vocab_size: VocabSize = 151_936,
    ks: Annotated[list[int] | None, typer.Option("--k", min=1, help="Exact entries; may be said again. Default: 32, 64, 128.")] = None,
    teacher: Annotated[Path | None, typer.Option("--teacher", help="A model's directory. Default: the demo's, if it is there.")] = None,
    device: TorchDevice = "cpu",
    repeats: Repeats = 5,
    out: Out = None,
) -> None:
    """What a target takes in bytes, what they lose, and how fast it is packed and unpacked; one thread, or one GPU."""
    _quieten()
    from stillhouse.bench.codec import Setting, bench_codec

    setting = Setting(num_tokens, vocab_size, tuple(ks or (32, 64, 128)), device)
    bench_codec(setting, teacher, repeats=repeats, cache_dir=_cache_dir(), command=_typed(), out=out)


@bench_app.command(name="topk")
def bench_topk(
    num_tokens: Tokens = 64,
    vocab_size: VocabSize = 151_936,
    k: Kept = 64,
    dtype: TorchDtype = "float32",
    device: TorchDevice = "cpu",
    repeats: Repeats = 7,
    with_compile: WithCompile = True,
    out: Out = None,
) -> None:
    """From logits to their greatest and their log-sum-exp: every path of ours beside torch, eager and compiled; one thread, or one GPU."""
    _quieten()
    from stillhouse.bench.topk import Setting, bench_topk

    setting = Setting(num_tokens, vocab_size, k, dtype, device)
    bench_topk(setting, repeats=repeats, with_compile=with_compile, command=_typed(), out=out)


@bench_app.command(name="loss")
def bench_loss(
    num_tokens: Tokens = 1024,
    vocab_size: VocabSize = 32_000,
    hidden_size: HiddenSize = 256,
    k: Kept = 64,
    dtype: TorchDtype = "float32",
    device: TorchDevice = "cpu",
    repeats: Repeats = 5,
    with_compile: WithCompile = True,
    out: Out = None,
) -> None:
    """The student's head and loss against autograd on all the logits, and each divergence; one thread, or one GPU."""
    _quieten()
    from stillhouse.bench.loss import Setting, bench_loss

    setting = Setting(num_tokens, vocab_size, hidden_size, k, dtype, device)
    bench_loss(setting, repeats=repeats, with_compile=with_compile, command=_typed(), out=out)


@bench_app.command(name="head")
def bench_head(
    num_tokens: Tokens = 1024,
    vocab_size: VocabSize = 32_000,
    hidden_size: HiddenSize = 256,
    k: Kept = 64,
    dtype: TorchDtype = "float32",
    device: TorchDevice = "cpu",
    repeats: Repeats = 5,
    out: Out = None,
) -> None:
    """A teacher's head, from hidden states to packed records, against the bare matrix product and eager torch; one thread, or one GPU."""
    _quieten()
    from stillhouse.bench.head import bench_head
    from stillhouse.bench.loss import Setting

    bench_head(Setting(num_tokens, vocab_size, hidden_size, k, dtype, device), repeats=repeats, command=_typed(), out=out)


@bench_app.command(name="checkpoint")
def bench_checkpoint(
    work_dir: Annotated[Path, typer.Option("--work-dir", help="On the disk that is measured.")] = Path("runs/bench"),
    hidden_size: HiddenSize = 512,
    num_layers: Annotated[int, typer.Option("--layers", min=1)] = 4,
    dtype: Annotated[Literal["float32", "bfloat16"], typer.Option("--dtype", help="Of the student.")] = "float32",
    zero_stage: Annotated[int, typer.Option("--zero-stage", min=1, max=3)] = 1,
    device: TorchDevice = "cpu",
    repeats: Repeats = 9,
    out: Out = None,
) -> None:
    """How long training stands still for a checkpoint, against DeepSpeed's save_checkpoint to the same disk; one thread, or one GPU."""
    _quieten()
    from stillhouse.bench.checkpoint import Setting, bench_checkpoint

    setting = Setting(hidden_size, num_layers, dtype, zero_stage, device)
    bench_checkpoint(setting, work_dir, repeats=repeats, command=_typed(), out=out)


@bench_app.command(name="restart")
def bench_restart(
    work_dir: Annotated[Path, typer.Option("--work-dir", help="Where models, stores and runs go.")] = Path("runs/bench"),
    num_rounds: Annotated[int, typer.Option("--rounds", min=1, help="Times that both are measured.")] = 3,
    num_kills: Annotated[int, typer.Option("--kills", min=1, help="Ranks killed in each of them.")] = 2,
    out: Out = None,
) -> None:
    """From a killed rank to the next step, against Ray Train and DeepSpeed joined as their documentation does; two ranks on two cores."""
    _quieten()
    from stillhouse.bench.restart import bench_restart

    bench_restart(work_dir, num_rounds=num_rounds, num_kills=num_kills, command=_typed(), out=out)


@bench_app.command(name="targets")
def bench_targets(
    teacher: Annotated[Path | None, typer.Option("--teacher", help="Its directory. Default: the demo's, made where there is none.")] = None,
    work_dir: Annotated[Path, typer.Option("--work-dir", help="Where models go that are made.")] = Path("runs/bench"),
    num_steps: Annotated[int, typer.Option("--steps", min=1, help="Optimiser steps of each student.")] = 420,
    num_seeds: Annotated[int, typer.Option("--seeds", min=1, help="Students of each kind.")] = 3,
    threads: Annotated[int, typer.Option("--threads", min=1, help="Of torch.")] = 1,
    quick: Annotated[bool, typer.Option("--quick", help="A few steps of one seed: whether it runs, not what comes of it.")] = False,
    out: Annotated[Path | None, typer.Option("--out", help="A JSON file for all that was measured; the figure goes beside it.")] = None,
) -> None:
    """The forms of a target at equal bytes: exact entries, draws from the tail, or both, between the text alone and the whole teacher."""
    _quieten()
    from stillhouse.bench.targets import QUICK, bench_targets, thorough

    effort = QUICK if quick else thorough(num_steps=num_steps, num_seeds=num_seeds)
    command = f"stillhouse {shlex.join(sys.argv[1:])}"
    bench_targets(work_dir, teacher, effort=effort, threads=threads, cache_dir=_cache_dir(), command=command, out=out)


def main() -> None:
    """The entry point."""
    app(prog_name="stillhouse")


def _show_version(wanted: bool) -> None:
    if wanted:
        from importlib.metadata import version

        print(f"stillhouse {version('stillhouse')}")
        raise typer.Exit


def _plan(configs: list[Path], overrides: list[str] | None, run_dir: Path | None) -> "Plan":
    from stillhouse.config import load_config

    config = load_config(configs, overrides or [])
    _quieten()
    from stillhouse import pipeline

    return pipeline.plan(config, run_dir=run_dir or Path("runs") / configs[-1].stem, cache_dir=_cache_dir())


def _existing(run_dir: Path) -> "Plan":
    _quieten()
    from stillhouse import pipeline

    return pipeline.open_run(run_dir, cache_dir=_cache_dir())


def _cache_dir() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "stillhouse"


def _quieten() -> None:
    """Settle the libraries' chatter before they are imported: what is said here is ours to say. The user's own settings win."""
    settings = {
        "TRANSFORMERS_VERBOSITY": "error",
        "DATASETS_VERBOSITY": "error",
        "TOKENIZERS_PARALLELISM": "true",  # unset, it warns at every fork after a tokenizer was used
        "WANDB_SILENT": "true",
        "OMP_WAIT_POLICY": "PASSIVE",  # threads that spin at every barrier are eight times slower when another process wants the core
    }
    if not sys.stderr.isatty():
        settings |= dict.fromkeys(("HF_DATASETS_DISABLE_PROGRESS_BARS", "HF_HUB_DISABLE_PROGRESS_BARS", "TQDM_DISABLE"), "1")
    for name, value in settings.items():
        os.environ.setdefault(name, value)
    logging.getLogger("DeepSpeed").addFilter(lambda record: record.levelno >= logging.ERROR)  # a level would be set back by its import


def _typed() -> str:
    return shlex.join(["stillhouse", *sys.argv[1:]])


def _announce(run_dir: Path) -> None:
    print(f"{run_dir / 'report.html'} tells the whole run; `stillhouse export {run_dir} OUT` writes the student as a Hugging Face model")


def _print_scores(scores: "Mapping[ModelName, Scores]") -> None:
    from rich.console import Console
    from rich.table import Table

    num_tokens = max(score.num_tokens for score in scores.values())
    table = Table(box=None, header_style="bold", caption=f"means over {num_tokens:,} held-out tokens, both models dense; nats")
    table.add_column("model")
    for heading in ("cross-entropy", "KL from teacher", "agreement", "acceptance", "calibration"):
        table.add_column(heading, justify="right", no_wrap=True)
    for name, score in scores.items():
        compared = [f"{value:.4f}" if name != "teacher" else "" for value in (score.kl, score.agreement, score.acceptance)]
        table.add_row(name, f"{score.cross_entropy:.4f}", *compared, f"{score.calibration_error:.4f}")
    Console().print(table)
