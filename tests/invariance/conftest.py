"""The small models the invariance tests run on, with their store and checkpoint."""

import pytest

from megasft.proof.world import World, make_world


@pytest.fixture(scope="session")
def qwen3(tmp_path_factory: pytest.TempPathFactory) -> World:
    return make_world(tmp_path_factory.mktemp("invariance"), "qwen3")
