"""A pickle of a checkpoint can build tensors and plain values, whatever it asks for and whoever
asks torch to open it."""

import ast
import pickle
import re
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import deepspeed
import pytest
import torch

from helpers.bombs import Bomb, write_archive
from stillhouse.checkpoint.unpickling import ALLOWED, only_tensors, opened
from stillhouse.cli.main import app
from stillhouse.cluster.environment import forbid_pickled_code
from stillhouse.cluster.processes import prepare_process
from stillhouse.errors import CheckpointError


def named(path: str) -> bytes:
    """The instruction that puts a global on the pickle machine's stack."""
    module, _, name = path.rpartition(".")
    return f"c{module}\n{name}\n".encode()


def plain(value: object) -> bytes:
    """The instructions that put a plain value there."""
    return pickle.dumps(value, protocol=2)[2:-1]


def called(path: str, *arguments: object) -> bytes:
    return named(path) + plain(arguments) + b"R"


SCALER = "deepspeed.runtime.fp16.loss_scaler.LossScaler"
NEW_SCALER = named(SCALER) + b")\x81"
FROM_TYPE = "torch._tensor._rebuild_from_type_v2"
CODE = "__import__('os').mkdir({marker!r})"

MISUSES: dict[str, Callable[[str], bytes]] = {
    "a command": lambda marker: called("os.mkdir", marker),
    "the same by its other name": lambda marker: called("posix.mkdir", marker),
    "an expression": lambda marker: called("builtins.eval", CODE.format(marker=marker)),
    "an attribute of what is allowed": lambda marker: called(
        "torch.serialization.os.mkdir", marker
    ),
    "a file with code": lambda marker: called("runpy.run_path", marker),
    "torch.load itself": lambda marker: called("torch.serialization.load", marker),
    "a class that opens process groups": lambda _: called(
        "torch.distributed.device_mesh.DeviceMesh", "cpu", [0]
    ),
    "a command through a builder": lambda marker: (
        named(FROM_TYPE) + b"(" + named("os.mkdir") + plain(marker) + b"tR"
    ),
    "a builder that is given a class": lambda marker: (
        named(FROM_TYPE) + b"(" + named(SCALER) + plain((int, (marker,), None)) + b"tR"
    ),
    "a state that runs code": lambda _: (
        NEW_SCALER + b"}" + plain("__setstate__") + named("builtins.exec") + b"sb"
    ),
    "a state that calls a builder": lambda marker: (
        NEW_SCALER
        + b"}"
        + plain("__setstate__")
        + named("torch._utils._rebuild_tensor")
        + b"sb"
        + plain({"x": marker})
        + b"b"
    ),
    "a global by the newer instruction": lambda marker: (
        plain("os") + plain("mkdir") + b"\x93" + plain((marker,)) + b"R"
    ),
    "an instance of the oldest kind": lambda marker: b"(" + plain(marker) + b"ios\nmkdir\n",
    "an instance of a class on the stack": lambda marker: (
        b"(" + named("os.mkdir") + plain(marker) + b"o"
    ),
    "an extension by its number": lambda _: b"\x82\x01",
    "a stack that is empty": lambda _: b"R",
    "no end": lambda _: b"",
}


@pytest.mark.parametrize("misuse", MISUSES)
def test_instructions_that_do_more_than_build_tensors_are_refused(
    misuse: str, tmp_path: Path
) -> None:
    instructions = (
        b"\x80\x02"
        + MISUSES[misuse](str(tmp_path / "it-ran"))
        + (b"" if misuse == "no end" else b".")
    )
    write_archive(tmp_path / "file.pt", instructions)
    for open_it in (opened, lambda path: opened(path, map_location="meta"), load_within_deepspeed):
        with pytest.raises(
            CheckpointError, match=re.escape(f"{tmp_path / 'file.pt'} was not opened: ")
        ):
            open_it(tmp_path / "file.pt")
    assert not (tmp_path / "it-ran").exists()


def load_within_deepspeed(path: Path) -> Any:
    with only_tensors():
        return torch.load(path, map_location="cpu", weights_only=False)


@pytest.mark.filterwarnings("ignore:.*torch.jit.* is deprecated:DeprecationWarning")
def test_a_program_of_torchs_own_is_refused(tmp_path: Path) -> None:
    torch.jit.save(torch.jit.script(torch.nn.Identity()), tmp_path / "file.pt")
    with pytest.raises(CheckpointError, match=r"file\.pt was not opened"):
        opened(tmp_path / "file.pt")


def test_tensors_and_plain_values_come_back_as_they_were(tmp_path: Path) -> None:
    scaler, stage, address = (
        (kind(value) for kind, value in zip(ALLOWED[:2], (3.0, 2), strict=True)),
        ALLOWED[1](2),
        ALLOWED[2](numel=7, start=3),
    )
    state = {
        "weights": torch.arange(6.0).view(2, 3),
        "step": 7,
        "stage": stage,
        "slice": address,
        "names": ["lm.head", None, True, 0.5],
    }
    torch.save(state | {"scaler": next(scaler)}, tmp_path / "file.pt")
    for load in (opened, load_within_deepspeed):
        found = load(tmp_path / "file.pt")
        assert torch.equal(found.pop("weights"), state["weights"])
        assert found.pop("scaler").cur_scale == 3.0
        assert found == {name: value for name, value in state.items() if name != "weights"}
    assert opened(tmp_path / "file.pt", map_location="meta")["weights"].device.type == "meta"


@pytest.mark.parametrize("name", ["/outside", "../outside", "a/b", ".."])
def test_text_that_is_a_path_is_refused_wherever_it_stands(tmp_path: Path, name: str) -> None:
    for state in (
        {name: 0},
        {"shapes": [{name: torch.ones(1)}]},
        {"names": ("a", [name])},
        [{"layers": {"key": name}}],
    ):
        torch.save(state, tmp_path / "file.pt")
        with pytest.raises(
            CheckpointError, match=re.escape(f"was not used: it names {name!r}, which is a path")
        ):
            opened(tmp_path / "file.pt")


def test_the_words_of_a_refusal_cannot_steer_a_terminal(tmp_path: Path) -> None:
    write_archive(tmp_path / "file.pt", b"\x80\x02" + named("os.\x1b[31mred\r") + b".")
    torch.save({"\x1b[2J/": 0}, tmp_path / "path.pt")
    for name in ("file.pt", "path.pt"):
        with pytest.raises(CheckpointError) as refused:
            opened(tmp_path / name)
        assert str(refused.value).isprintable()


def test_what_libraries_allow_for_the_process_stays_allowed_elsewhere(tmp_path: Path) -> None:
    torch.serialization.add_safe_globals([Bomb])
    try:
        write_archive(tmp_path / "file.pt", b"\x80\x02" + named("helpers.bombs.Bomb") + b".")
        with pytest.raises(CheckpointError, match=r"it wants to use 'helpers\.bombs\.Bomb'"):
            opened(tmp_path / "file.pt")
        assert torch.load(tmp_path / "file.pt", weights_only=True) is Bomb
    finally:
        others = [each for each in torch.serialization.get_safe_globals() if each is not Bomb]
        torch.serialization.clear_safe_globals()
        torch.serialization.add_safe_globals(others)


def as_the_command(_: pytest.MonkeyPatch) -> None:
    with pytest.raises(SystemExit):
        app(["report", "/absent"], prog_name="stillhouse")


def as_a_worker(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")  # set, so that it is put back
    prepare_process("cpu", torch.get_num_threads())


@pytest.mark.parametrize("begin", [as_the_command, as_a_worker, lambda _: forbid_pickled_code()])
@pytest.mark.parametrize("asked", [None, "0", "1"])
def test_every_process_opens_tensors_alone_whatever_its_environment_asked_for(
    begin: Callable[[pytest.MonkeyPatch], None],
    asked: str | None,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    torch.save({"weights": torch.ones(2)}, tmp_path / "sound.pt")
    torch.save({"weights": Bomb(tmp_path / "it-ran")}, tmp_path / "file.pt")
    monkeypatch.setenv("TORCH_FORCE_WEIGHTS_ONLY_LOAD", asked or "")
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    begin(monkeypatch)
    with pytest.raises(pickle.UnpicklingError):
        torch.load(tmp_path / "file.pt", weights_only=False)
    assert not (tmp_path / "it-ran").exists()
    assert torch.load(tmp_path / "sound.pt", weights_only=False)["weights"].sum() == 2


# What the framework relies on: DeepSpeed opens files by `torch.load`, looked up when it is called,
# and in the process that asks for it.
OPENED_BY_TORCH_LOAD = {
    "checkpoint/autoep_universal.py": 6,
    "checkpoint/deepspeed_checkpoint.py": 7,
    "checkpoint/ds_to_universal.py": 13,
    "checkpoint/reshape_3d_utils.py": 1,
    "checkpoint/universal_checkpoint.py": 1,
    "checkpoint/zero_checkpoint.py": 1,
    "inference/engine.py": 2,
    "inference/v2/checkpoint/huggingface_engine.py": 1,
    "inference/v2/model_implementations/inference_policy_base.py": 1,
    "module_inject/replace_module.py": 4,
    "nvme/torch_fastio_engine.py": 1,
    "nvme/torch_io.py": 1,
    "runtime/base_optimizer.py": 1,
    "runtime/checkpoint_engine/decoupled_checkpoint_engine.py": 1,
    "runtime/checkpoint_engine/fast_checkpoint_engine.py": 1,
    "runtime/checkpoint_engine/torch_checkpoint_engine.py": 1,
    "runtime/zero/stage3.py": 2,
    "utils/zero_to_fp32.py": 3,
}
OPENED_OTHERWISE = {
    ("inference/v2/engine_factory.py", "pickle.load"),
    ("ops/transformer/inference/triton/matmul_ext.py", "pickle.load"),
}
POOLS = {
    (
        "checkpoint/ds_to_universal.py",
        "ProcessPoolExecutor",
    ),  # of one worker, which is the process itself
    ("nvme/io_engine.py", "Pool"),  # of its benchmark
}


def test_deepspeed_opens_files_where_it_is_known_to() -> None:
    root = Path(deepspeed.__path__[0])
    loads: Counter[str] = Counter()
    otherwise, pools, imported = set(), set(), set()
    for path in sorted(root.rglob("*.py")):
        text = path.read_text()
        if not re.search(r"\bload|pickle|ProcessPool|multiprocessing", text):
            continue
        name = path.relative_to(root).as_posix()
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
                called_name = f"{node.value.id}.{node.attr}"
                loads[name] += called_name == "torch.load"
                if re.fullmatch(
                    r"(pickle|cloudpickle|dill|joblib|marshal)\.(load|loads|Unpickler)", called_name
                ):
                    otherwise.add((name, called_name))
            if isinstance(node, ast.keyword) and node.arg == "allow_pickle":
                otherwise.add((name, "allow_pickle"))
            if isinstance(node, ast.Name) and node.id in ("ProcessPoolExecutor", "Pool"):
                pools.add((name, node.id))
            if isinstance(node, ast.ImportFrom) and node.module in (
                "torch",
                "torch.serialization",
                "pickle",
            ):
                imported |= {
                    (name, each.name)
                    for each in node.names
                    if each.name in ("load", "loads", "_load", "Unpickler")
                }
    assert +loads == Counter(OPENED_BY_TORCH_LOAD)
    assert (otherwise, pools, imported) == (OPENED_OTHERWISE, POOLS, set())
