"""Every kernel starts on the device where its tensors are, and there is one place from which
kernels start."""

import ast
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import stillhouse
from stillhouse.logits.launching import run_kernel

SOURCE = Path(stillhouse.__file__).parent
THE_PLACE = SOURCE / "logits" / "launching.py"


class Devices:
    """The current device of a process with several GPUs, and a kernel that notes which one it is
    when it starts."""

    def __init__(self) -> None:
        self.current = 0
        self.launches: list[tuple[int, tuple[int, ...], tuple[object, ...], dict[str, object]]] = []

    @contextmanager
    def of(self, tensor: torch.Tensor) -> Iterator[None]:
        before, self.current = self.current, tensor.device.index
        try:
            yield
        finally:
            self.current = before

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        return lambda *arguments, **options: self.launches.append(
            (self.current, grid, arguments, options)
        )


def tensors(*devices: str) -> list[torch.Tensor]:
    with FakeTensorMode():
        return [torch.empty(2, device=device) for device in devices]


def test_a_kernel_starts_on_the_device_of_its_tensors_whatever_the_current_one() -> None:
    devices = Devices()
    logits, maxima = tensors("cuda:3", "cuda:3")
    run_kernel(devices, (4, 2), logits, 17, maxima, device_of=devices.of, TILE=64)
    assert devices.launches == [(3, (4, 2), (logits, 17, maxima), {"TILE": 64})]
    assert devices.current == 0


def test_tensors_of_two_devices_are_never_given_to_one_kernel() -> None:
    devices = Devices()
    with pytest.raises(AssertionError, match="one device"):
        run_kernel(devices, (1,), *tensors("cuda:3", "cuda:0"), device_of=devices.of)
    assert devices.launches == []


def launches_in(source: str) -> list[int]:
    """The lines of calls of a form in which Triton launches: `kernel[grid](...)`, and its methods
    `run` and `warmup`."""
    calls = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Call)]
    by_grid = [call.lineno for call in calls if isinstance(call.func, ast.Subscript)]
    by_name = [
        call.lineno
        for call in calls
        if isinstance(call.func, ast.Attribute) and call.func.attr in ("run", "warmup")
    ]
    return by_grid + by_name


def test_no_kernel_is_launched_anywhere_else() -> None:
    with_kernels = {
        path: path.read_text() for path in SOURCE.rglob("*.py") if "@triton.jit" in path.read_text()
    }
    assert {path.name for path in with_kernels} == {
        "blockmax_draw_triton.py",
        "blockmax_kernels_triton.py",
        "codec_kernels_triton.py",
        "codec_streams_triton.py",
        "head_passes_triton.py",
    }
    assert {path.name: launches_in(source) for path, source in with_kernels.items()} == {
        "blockmax_draw_triton.py": [],
        "blockmax_kernels_triton.py": [],
        "codec_kernels_triton.py": [],
        "codec_streams_triton.py": [],
        "head_passes_triton.py": [],
    }
    assert len(launches_in(THE_PLACE.read_text())) == 1


@pytest.mark.parametrize(
    "launch",
    ["_read[(num_tokens,)](logits)", "kernels._read[each](logits)", "_read.run(logits, grid=(1,))"],
)
def test_a_launch_elsewhere_would_be_seen(launch: str) -> None:
    assert launches_in(f"def launch(logits):\n    {launch}\n") == [2]
