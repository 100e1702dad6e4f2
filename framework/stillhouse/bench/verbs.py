"""`stillhouse bench ...`: the subcommands. Each imports what it measures, and so the heavy
libraries, when it is called."""

from pathlib import Path
from typing import Annotated, Literal

import typer

from stillhouse.cluster.environment import cache_dir, quieten, typed

bench_app = typer.Typer(
    help="Measure Stillhouse against what one would do without it.", no_args_is_help=True
)

WorkDir = Annotated[Path, typer.Option("--work-dir", help="Where all that it makes goes.")]
Rounds = Annotated[int, typer.Option("--rounds", min=1, help="Times that every way is measured.")]
Teacher = Annotated[
    Path | None, typer.Option("--teacher", help="A model's directory. Default: the demo's.")
]
Tokens = Annotated[int, typer.Option("--tokens", min=1, help="In the batch.")]
VocabSize = Annotated[int, typer.Option("--vocab", min=2)]
HiddenSize = Annotated[int, typer.Option("--hidden", min=1)]
Kept = Annotated[int, typer.Option("--k", min=1, help="Exact entries of a target.")]
TorchDtype = Annotated[
    Literal["float32", "bfloat16"],
    typer.Option("--dtype", help="Of the logits, or of hidden states and weight."),
]
TorchDevice = Annotated[Literal["cpu", "cuda"], typer.Option("--device")]
Repeats = Annotated[
    int, typer.Option("--repeats", min=1, help="Times that each way is measured, on fresh data.")
]
WithCompile = Annotated[
    bool,
    typer.Option("--compile/--no-compile", help="Also what torch.compile makes of torch's ways."),
]
Out = Annotated[Path | None, typer.Option("--out", help="A JSON file for all that was measured.")]
_WORK_DIR = Path("runs/bench")


@bench_app.command(name="pipeline")
def bench_pipeline(
    work_dir: WorkDir = _WORK_DIR,
    num_steps: Annotated[int, typer.Option("--steps", help="Optimiser steps of each way.")] = 160,
    num_rounds: Rounds = 3,
    out: Out = None,
) -> None:
    """`run`, and the same once its chunks are cached, against one process that does the work of
    teacher and student in turn; two cores."""
    quieten()
    from stillhouse.bench.pipeline import bench_pipeline

    bench_pipeline(work_dir, num_steps=num_steps, num_rounds=num_rounds, command=typed(), out=out)


@bench_app.command(name="codec")
def bench_codec(
    num_tokens: Tokens = 192,
    vocab_size: VocabSize = 151_936,
    ks: Annotated[
        list[int] | None,
        typer.Option("--k", min=1, help="Exact entries; may be said again. Default: 32, 64, 128."),
    ] = None,
    teacher: Teacher = None,
    device: TorchDevice = "cpu",
    repeats: Repeats = 5,
    out: Out = None,
) -> None:
    """What a target takes in bytes, what they lose, and how fast it is packed and unpacked; one
    thread, or one GPU."""
    quieten()
    from stillhouse.bench.codec import Setting, bench_codec

    setting = Setting(num_tokens, vocab_size, tuple(ks or (32, 64, 128)), device)
    bench_codec(setting, teacher, repeats=repeats, cache_dir=cache_dir(), command=typed(), out=out)


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
    """From logits to their greatest and their log-sum-exp: every backend of ours beside torch,
    eager and compiled; one thread, or one GPU."""
    quieten()
    from stillhouse.bench.topk import Setting, bench_topk

    setting = Setting(num_tokens, vocab_size, k, dtype, device)
    bench_topk(setting, repeats=repeats, with_compile=with_compile, command=typed(), out=out)


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
    """The student's head and loss against autograd on all the logits, and each divergence; one
    thread, or one GPU."""
    quieten()
    from stillhouse.bench.loss import Setting, bench_loss

    setting = Setting(num_tokens, vocab_size, hidden_size, k, dtype, device)
    bench_loss(setting, repeats=repeats, with_compile=with_compile, command=typed(), out=out)


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
    """A teacher's head, from hidden states to packed records, against the bare matrix product and
    eager torch; one thread, or one GPU."""
    quieten()
    from stillhouse.bench.head import bench_head
    from stillhouse.bench.loss import Setting

    bench_head(
        Setting(num_tokens, vocab_size, hidden_size, k, dtype, device),
        repeats=repeats,
        command=typed(),
        out=out,
    )


@bench_app.command(name="engines")
def bench_engines(
    num_sequences: Annotated[int, typer.Option("--sequences", min=1, help="In a block.")] = 16,
    sequence_length: Annotated[int, typer.Option("--length", min=32, help="Of a sequence.")] = 512,
    vocab_size: VocabSize = 4_096,
    hidden_size: HiddenSize = 256,
    num_layers: Annotated[int, typer.Option("--layers", min=1)] = 4,
    dtype: TorchDtype = "float32",
    device: TorchDevice = "cpu",
    threads: Annotated[int, typer.Option("--threads", min=1, help="Of torch.")] = 1,
    repeats: Repeats = 5,
    with_compile: Annotated[
        bool, typer.Option("--compile/--no-compile", help="Also transformers' layers, compiled.")
    ] = True,
    out: Out = None,
) -> None:
    """A teacher of random weights on four kinds of blocks, by each engine that is installed and by
    rows with a mask: targets a second, and how far apart they are."""
    quieten()
    from stillhouse.bench.engines import Setting, bench_engines
    from stillhouse.bench.random_model import RandomModel

    model = RandomModel(vocab_size, hidden_size, num_layers, dtype, device, threads)
    setting = Setting(num_sequences, sequence_length, model)
    bench_engines(setting, repeats=repeats, with_compile=with_compile, command=typed(), out=out)


@bench_app.command(name="writing")
def bench_writing(
    num_prompts: Annotated[int, typer.Option("--prompts", min=1, help="In a round.")] = 32,
    longest_prompt: Annotated[int, typer.Option("--longest-prompt", help="Tokens.")] = 512,
    max_new_tokens: Annotated[int, typer.Option("--max-new-tokens", min=1)] = 192,
    mean_new_tokens: Annotated[int, typer.Option("--mean-new-tokens", min=1, help="About.")] = 64,
    batch_sequences: Annotated[
        int, typer.Option("--batch", min=1, help="Side by side; vLLM chooses itself.")
    ] = 16,
    vocab_size: VocabSize = 32_000,
    hidden_size: HiddenSize = 512,
    num_layers: Annotated[int, typer.Option("--layers", min=1)] = 8,
    dtype: TorchDtype = "float32",
    device: TorchDevice = "cpu",
    threads: Annotated[int, typer.Option("--threads", min=1, help="Of torch.")] = 1,
    engines: Annotated[
        str, typer.Option("--engines", help="Of writers, with commas.")
    ] = "transformers,vllm",
    repeats: Repeats = 5,
    out: Out = None,
) -> None:
    """What writers of one model sample a second, by each engine that is installed and by `generate`
    of Transformers; prompts and samples of mixed length."""
    quieten()
    from stillhouse.bench.random_model import RandomModel
    from stillhouse.bench.writing import Setting, bench_writing

    # a model, and what it writes to
    model = RandomModel(vocab_size, hidden_size, num_layers, dtype, device, threads)
    written = num_prompts, longest_prompt, max_new_tokens, mean_new_tokens, batch_sequences
    setting = Setting(*written, model)
    bench_writing(setting, engines.split(","), repeats=repeats, command=typed(), out=out)


@bench_app.command(name="checkpoint")
def bench_checkpoint(
    work_dir: Annotated[
        Path, typer.Option("--work-dir", help="On the disk that is measured.")
    ] = _WORK_DIR,
    hidden_size: HiddenSize = 512,
    num_layers: Annotated[int, typer.Option("--layers", min=1)] = 4,
    dtype: Annotated[
        Literal["float32", "bfloat16"], typer.Option("--dtype", help="Of the student.")
    ] = "float32",
    zero_stage: Annotated[int, typer.Option("--zero-stage", min=1, max=3)] = 1,
    device: TorchDevice = "cpu",
    repeats: Repeats = 9,
    out: Out = None,
) -> None:
    """How long a checkpoint blocks training, against DeepSpeed's save_checkpoint to the same disk;
    one thread, or one GPU."""
    quieten()
    from stillhouse.bench.checkpoint import Setting, bench_checkpoint

    setting = Setting(hidden_size, num_layers, dtype, zero_stage, device)
    bench_checkpoint(setting, work_dir, repeats=repeats, command=typed(), out=out)


@bench_app.command(name="restart")
def bench_restart(
    work_dir: WorkDir = _WORK_DIR,
    num_rounds: Rounds = 3,
    num_kills: Annotated[int, typer.Option("--kills", min=1, help="In each round.")] = 2,
    out: Out = None,
) -> None:
    """From a killed rank to the next step, against Ray Train and DeepSpeed used as they document;
    two ranks on two cores."""
    quieten()
    from stillhouse.bench.restart import bench_restart

    bench_restart(work_dir, num_rounds=num_rounds, num_kills=num_kills, command=typed(), out=out)


@bench_app.command(name="targets")
def bench_targets(
    teacher: Teacher = None,
    work_dir: WorkDir = _WORK_DIR,
    num_steps: Annotated[int, typer.Option("--steps", min=1, help="Of each student.")] = 420,
    num_seeds: Annotated[int, typer.Option("--seeds", min=1, help="Students of each kind.")] = 3,
    threads: Annotated[int, typer.Option("--threads", min=1, help="Of torch.")] = 1,
    quick: Annotated[
        bool, typer.Option("--quick", help="A few steps of one seed: to see that it runs.")
    ] = False,
    peers: Annotated[
        bool,
        typer.Option(
            "--peers",
            help="The targets and losses of DistillKit and TRL, where they are installed, beside "
            "four sizes of ours.",
        ),
    ] = False,
    out: Out = None,
) -> None:
    """The forms of a target at equal bytes: exact entries, draws from the tail, or both, between
    the text alone and the whole teacher. A figure goes beside the file of --out."""
    quieten()
    from stillhouse.bench.beside_peers import beside
    from stillhouse.bench.peers import installed_peers, installed_projects, require_a_peer
    from stillhouse.bench.targets import QUICK, SPLITS, bench_targets, thorough

    if peers:
        require_a_peer(installed_projects())
    # how much, and of what
    effort = QUICK if quick else thorough(num_steps=num_steps, num_seeds=num_seeds)
    bench_targets(
        work_dir,
        teacher,
        beside(installed_peers) if peers else SPLITS,
        effort=effort,
        threads=threads,
        cache_dir=cache_dir(),
        command=typed(),
        out=out,
    )


@bench_app.command(name="divergences")
def bench_divergences(
    vocab_size: VocabSize = 4_096,
    num_steps: Annotated[int, typer.Option("--steps", min=1, help="Of each student.")] = 120,
    num_seeds: Annotated[int, typer.Option("--seeds", min=1, help="Languages of each kind.")] = 3,
    num_tokens: Annotated[int, typer.Option("--tokens", min=1, help="Of each step.")] = 256,
    first_seed: Annotated[int, typer.Option("--first-seed", min=0, help="Of --seeds.")] = 0,
    teachers: Annotated[
        str, typer.Option("--teachers", help="With commas. flat: its best 8 ids hold half.")
    ] = "flat,sharp",
    starts: Annotated[
        str, typer.Option("--starts", help="Of the students, with commas.")
    ] = "warm,schedule,far",
    divergences: Annotated[
        str, typer.Option("--divergences", help="With commas. Default: all six.")
    ] = "",
    peers: Annotated[
        bool,
        typer.Option(
            "--peers",
            help="Forward KL from the targets of DistillKit and TRL too, where they are installed.",
        ),
    ] = False,
    threads: Annotated[int, typer.Option("--threads", min=1, help="Of torch.")] = 1,
    out: Out = None,
) -> None:
    """Every divergence on every form of target at equal bytes, in an exact language: flat and sharp
    teachers, students from random weights and warm ones."""
    quieten()
    from stillhouse.bench.divergences import DIVERGENCES, Effort, Scope, bench_divergences
    from stillhouse.bench.peers import installed_peers, installed_projects, require_a_peer

    if peers:
        require_a_peer(installed_projects())
    # how much of which pairings
    effort = Effort(num_seeds, num_steps, batch_tokens=num_tokens, first_seed=first_seed)
    scope = Scope(
        tuple(teachers.split(",")),
        tuple(starts.split(",")),
        tuple(divergences.split(",") if divergences else DIVERGENCES),
    )
    bench_divergences(
        vocab_size,
        effort,
        scope,
        peers_at=installed_peers if peers else lambda _vocab_size: [],
        threads=threads,
        command=typed(),
        out=out,
    )


@bench_app.command(name="verified")
def bench_verified(
    num_prompts: Annotated[int, typer.Option("--prompts", min=64, help="Written to.")] = 24_000,
    num_heldout: Annotated[int, typer.Option("--heldout", min=1, help="Prompts apart.")] = 500,
    num_steps: Annotated[int, typer.Option("--steps", min=1, help="Of each student.")] = 2_000,
    num_seeds: Annotated[int, typer.Option("--seeds", min=1, help="Students of each kind.")] = 3,
    first_seed: Annotated[int, typer.Option("--first-seed", min=0, help="Of --seeds.")] = 0,
    threads: Annotated[int, typer.Option("--threads", min=1, help="Of torch.")] = 1,
    out: Out = None,
) -> None:
    """A student of all that a fallible writer wrote against one of what a grader accepted: the
    share of right answers, on sums that were held out."""
    quieten()
    from stillhouse.bench.verified import Effort, bench_verified

    effort = Effort(num_seeds, num_prompts, num_steps, num_heldout, first_seed=first_seed)
    bench_verified(effort, threads=threads, command=typed(), out=out)
