"""A sample of the fuzzer's cases, always the same; `make fuzz` goes on for hours with others."""

import pytest

import fuzz

COUNTS = {"config": 80, "command": 100, "adapter": 12, "data": 120, "image": 12, "run_folder": 12}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("made")
    fuzz.prepare(folder)
    return folder


@pytest.mark.parametrize("target", list(fuzz.TARGETS))
def test_no_input_ends_in_a_traceback(target, made):
    tried, bad = fuzz.run(target, range(COUNTS[target]), made)
    shown = "\n".join(f"--target {target} --seed {seed}\n{wrong}" for seed, wrong in bad[:3])
    assert tried == COUNTS[target]
    assert not bad, f"{len(bad)} of {COUNTS[target]} cases:\n{shown}"
