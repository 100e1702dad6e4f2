"""Where the tests' commands come from: one process that has imported everything, once."""

from collections.abc import Iterator

import pytest

from helpers.commands import CommandServer


@pytest.fixture(scope="session")
def commands(s3_endpoint: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[CommandServer]:
    server = CommandServer(
        {
            "XDG_CACHE_HOME": str(tmp_path_factory.mktemp("cache")),
            "AWS_ENDPOINT_URL": s3_endpoint,
        }
    )
    yield server
    server.close()
