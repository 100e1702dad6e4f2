"""What student/_deepspeed_compat.py relies on, asked of the DeepSpeed that is installed. All has to
hold before its cap is raised."""

import inspect
import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from deepspeed.runtime.engine import DeepSpeedEngine

REMEDY = "see to student/_deepspeed_compat.py before the cap on DeepSpeed is raised"

PROCESS = """
import contextlib, json, os, sys
from pathlib import Path
out, facts = Path(sys.argv[1]), {}
os.environ |= {"DS_ACCELERATOR": "cpu", "RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"}
with contextlib.redirect_stdout(sys.stderr):
    import torch, torch.distributed as dist
    from deepspeed.runtime.checkpoint_engine.torch_checkpoint_engine import TorchCheckpointEngine
    import deepspeed
    from stillhouse.student import _deepspeed_compat
    facts["probed at import"] = "__compatible_ops__" in vars(deepspeed.ops)
    facts["Muon at import"] = "deepspeed.runtime.zero.muon.original_muon" in sys.modules
    compiles = torch.compile
    _deepspeed_compat.import_muon()
    facts["Muon now"] = "deepspeed.runtime.zero.muon.original_muon" in sys.modules
    facts["compiler now"] = "torch._dynamo" in sys.modules
    facts["torch.compile is back"] = torch.compile is compiles

    dist.init_process_group("gloo", init_method=f"file://{out / 'meeting'}", rank=0, world_size=1)
    saved = []
    class Writer(TorchCheckpointEngine):
        def save(self, state_dict, path):
            saved.append(Path(path).name)
            super().save(state_dict, path)
    model = torch.nn.Linear(2, 2)
    settings = {
        "train_micro_batch_size_per_gpu": 1,
        "optimizer": {"type": "AdamW", "params": {"torch_adam": True}},
        "zero_optimization": {"stage": 1},
    }
    engine = _deepspeed_compat.initialize(model=model, model_parameters=model.parameters(),
                                          config=settings, dist_init_required=False)
    facts["probed by an engine"] = bool(deepspeed.ops.__compatible_ops__)
    _deepspeed_compat.save_through(engine, Writer())
    engine.save_checkpoint(str(out), tag="1", save_latest=False)
    with torch.no_grad():
        model.weight.zero_()
    loaded = _deepspeed_compat.load(engine, out / "1", universal=False)
    facts["loaded"] = loaded and bool(model.weight.any())
facts["saved"] = sorted(saved)
facts["files"] = sorted(
    path.name for path in out.rglob("*") if path.is_file() and path.name != "meeting"
)
print(json.dumps(facts))
"""


@pytest.fixture(scope="module")
def facts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Of a process of its own: it has to be the first to import DeepSpeed."""
    command = [sys.executable, "-c", PROCESS, str(tmp_path_factory.mktemp("engine"))]
    # as other tests leave it
    environment = {
        name: value for name, value in os.environ.items() if name != "TORCH_FORCE_WEIGHTS_ONLY_LOAD"
    }
    done = subprocess.run(
        command, env=environment, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, f"{done.stderr}\n{REMEDY}"
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def test_no_compiler_is_looked_for(facts: dict[str, Any]) -> None:
    found = {name: facts[name] for name in ("probed at import", "probed by an engine")}
    assert found == dict.fromkeys(found, False), (
        f"`deepspeed.ops.__compatible_ops__` is not found out on first use, or is another; {REMEDY}"
    )


def test_muon_is_imported_without_torchs_compiler(facts: dict[str, Any]) -> None:
    wanted = {
        "Muon at import": False,
        "Muon now": True,
        "compiler now": False,
        "torch.compile is back": True,
    }
    assert {name: facts[name] for name in wanted} == wanted, (
        f"`import deepspeed` imports Muon, or Muon compiles in another way; {REMEDY}"
    )


def test_all_files_of_a_checkpoint_go_through_the_writer(facts: dict[str, Any]) -> None:
    assert facts["files"] == facts["saved"], f"`save_checkpoint` writes files of its own; {REMEDY}"
    assert len(facts["saved"]) == 2


def test_without_us_a_checkpoint_would_hold_scripts(tmp_path: Path) -> None:
    engine = SimpleNamespace(_change_recovery_script_permissions=lambda _: None)
    DeepSpeedEngine._copy_recovery_script(engine, str(tmp_path))
    assert "zero_to_fp32.py" in [path.name for path in tmp_path.iterdir()], (
        f"another method copies the scripts now; {REMEDY}"
    )
    assert "self._copy_recovery_script(save_path)" in inspect.getsource(DeepSpeedEngine), (
        f"it is called in another way; {REMEDY}"
    )


def test_a_checkpoint_comes_back_into_the_engine(facts: dict[str, Any]) -> None:
    assert facts["loaded"], REMEDY


@pytest.mark.parametrize("universal", [False, True])
def test_whether_a_checkpoint_is_universal_is_asked_of_the_config_at_each_load(
    universal: bool,
) -> None:
    engine = SimpleNamespace(_config=SimpleNamespace(load_universal_checkpoint=universal))
    assert DeepSpeedEngine.load_universal_checkpoint(engine) is universal, (
        f"the engine asks another value; {REMEDY}"
    )
