"""One part of a GPU session: `python -m stillhouse.bench.gpu.part [--dry-run] NAME OUT`."""

import argparse
from collections.abc import Callable
from importlib import import_module
from pathlib import Path

from stillhouse.bench.gpu.findings import Recorder
from stillhouse.bench.gpu.scale import REAL, TINY, Scale
from stillhouse.bench.gpu.session import FINDINGS, PARTS, Part


def function_of(part: Part) -> Callable[[Scale, Recorder], None]:
    module, name = part.function.split(":")
    found: Callable[[Scale, Recorder], None] = getattr(
        import_module(f"stillhouse.bench.gpu.{module}"), name
    )
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--dry-run", action="store_true")
    parser.add_argument("name", choices=[part.name for part in PARTS])
    parser.add_argument("out", type=Path)
    options = parser.parse_args()
    (part,) = (part for part in PARTS if part.name == options.name)
    function_of(part)(
        TINY if options.dry_run else REAL, Recorder(options.out / FINDINGS, part.name)
    )


if __name__ == "__main__":
    main()
