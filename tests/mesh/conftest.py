"""Pieces that the tests of real agents share."""

import pytest

from sites import Program, Sites


@pytest.fixture(scope="session")
def program():
    made = Program()
    yield made
    made.close()


@pytest.fixture
def sites(program, tmp_path):
    return Sites(program, tmp_path)
