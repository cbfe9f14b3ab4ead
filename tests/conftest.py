"""What one test must not leave to the next."""

import logging
from collections.abc import Iterator

import pytest


@pytest.fixture(autouse=True)
def log_level_of_the_package() -> Iterator[None]:
    """A recipe that runs in the test's own process switches the package's log to INFO; put back what was there."""
    logger = logging.getLogger("transformers.hf_matrix_optim")
    level = logger.level
    yield
    logger.setLevel(level)
