"""examples/own_loss.py: its divergence trains by itself, and a config can name it."""

import re
import runpy
from pathlib import Path

import pytest

import stillhouse

EXAMPLES = Path(__file__).parents[2] / "examples"


def test_the_distance_falls_from_print_to_print(capsys: pytest.CaptureFixture[str]) -> None:
    runpy.run_path(str(EXAMPLES / "own_loss.py"))["main"]()
    distances = [float(number) for number in re.findall(r"distance (\S+)", capsys.readouterr().out)]
    assert len(distances) == 4
    assert distances == sorted(distances, reverse=True)
    assert distances[-1] < 0.3 * distances[0]


def test_a_config_can_name_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(EXAMPLES)
    divergence = stillhouse.divergence_named("own_loss:squared_hellinger", 0.5)
    assert isinstance(divergence, stillhouse.Divergence)
    assert divergence.forward_kl_share == 0.0
