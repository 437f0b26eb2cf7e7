"""The processes that the tests of several ranks share."""

from collections.abc import Iterator

import pytest

from tests.privacy.ranks.processes import Processes


@pytest.fixture(scope="session")
def processes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Processes]:
    made = Processes(tmp_path_factory.mktemp("ranks"))
    yield made
    made.close()
