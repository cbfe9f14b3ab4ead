"""What one test must not leave to the next, and what the tests of the recipes share."""

import logging
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE_LOGGER = logging.getLogger("transformers.hf_matrix_optim")
PACKAGE_LEVEL = PACKAGE_LOGGER.level


@pytest.fixture(autouse=True)
def log_level_of_the_package() -> Iterator[None]:
    """A recipe in the process of a test, or of a fixture of its module, switches the package's log to INFO."""
    PACKAGE_LOGGER.setLevel(PACKAGE_LEVEL)
    yield
    PACKAGE_LOGGER.setLevel(PACKAGE_LEVEL)


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A folder for prepared data."""
    return str(tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file of a few pages."""
    from tiny_recipe import write_text

    return write_text(tmp_path_factory.mktemp("text"))
