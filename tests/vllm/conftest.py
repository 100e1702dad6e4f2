"""Shared by the tests that need vLLM: its settings on a CPU, and its own warnings.

They run in an environment of their own (`make test-vllm`), with the fixtures of tests/conftest.py.
"""

import os

import pytest

os.environ |= {
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",  # else each engine pins its threads to the first cores
    "VLLM_NO_USAGE_STATS": "1",
}


def pytest_configure(config: pytest.Config) -> None:
    """Warnings stay errors, but for those that importing vLLM gives."""
    for warning in ("DeprecationWarning:torch.jit._script", "FutureWarning:vllm[.]"):
        config.addinivalue_line("filterwarnings", f"ignore::{warning}")
