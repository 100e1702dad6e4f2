"""What a command settles before libraries are imported."""

import subprocess
import sys

CALLS_RAY_AFTER_ITS_END = """
from stillhouse.cluster.environment import quieten
quieten()
import ray
try:
    ray.put(1)
except Exception as error:
    print(type(error).__name__)
print(ray.is_initialized())
"""


def test_a_thread_that_calls_ray_after_its_end_starts_no_cluster() -> None:
    done = subprocess.run(
        [sys.executable, "-c", CALLS_RAY_AFTER_ITS_END],
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    assert done.stdout.splitlines()[-1] == "False"
