"""These tests need a GPU, so `make test` does not collect them; `make test-gpu` does, and fails where there is none."""

import pytest
import torch


@pytest.fixture(scope="session")
def gpu() -> torch.device:
    assert torch.cuda.is_available(), "there is no GPU that torch can use; run these on a machine with one"
    return torch.device("cuda")
