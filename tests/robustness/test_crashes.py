"""A sample of what `make faults` does at every write: killed there, resumed, the same bits."""

import shutil

import crashes
import pytest


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The run that is never killed, and how many moments to die at it has."""
    folder = tmp_path_factory.mktemp("whole")
    crashes.reference(folder / "run")
    return folder / "run", crashes.moments(folder)


@pytest.mark.parametrize("part", range(8))
@pytest.mark.parametrize("power", [False, True], ids=["killed", "power"])
def test_a_run_that_dies_at_a_write_goes_on_bit_equal(part, power, whole, tmp_path):
    """Moments from the first to the last, spread evenly."""
    out, count = whole
    assert count > 30
    moment = 1 + (2 * part + power) * (count - 1) // 15
    fault, before = crashes.survives(tmp_path, out, moment, power)
    assert fault is None, f"moment {moment} of {count}, {before}"


def test_the_comparison_sees_a_difference(whole, tmp_path):
    out, _ = whole
    shutil.copytree(out, tmp_path / "other")
    lines = (tmp_path / "other/records.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "other/records.jsonl").write_text("".join(lines[:-1]))
    assert not crashes.same(tmp_path / "other", out)
