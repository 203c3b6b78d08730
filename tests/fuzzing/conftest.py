"""Fresh folders for every example of a property."""

import shutil
from contextlib import contextmanager

import pytest


@pytest.fixture
def place(tmp_path):
    """A function that gives a fresh empty folder."""

    @contextmanager
    def fresh():
        folder = tmp_path / "place"
        folder.mkdir()
        try:
            yield folder
        finally:
            shutil.rmtree(folder)

    return fresh
