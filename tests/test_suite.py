"""The benchmarks of speed and memory: do they run, go on where they were stopped, and show what was measured?"""

import json
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))  # another distribution has a package `benchmarks` too
try:
    from benchmarks.suite import cells, local_steps, page, scale, timing
    from benchmarks.suite.__main__ import main
finally:
    sys.path.remove(str(ROOT))


def test_every_row_runs_on_tiny_sizes(capsys):
    assert main(["--quick"]) == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("[")]
    assert {line.split("] ")[1].split(" ")[0] for line in lines} == set(cells.ROWS)
    assert not any("FAILED" in line for line in lines)


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("scope", ["bench", "full"])
def test_cells_have_names_of_their_own(scope, device):
    names = [cells.key(*cell) for cell in cells.settings_of(cells.ROWS, scope, device)]
    assert len(set(names)) == len(names) > 10


def test_runs_take_turns():
    order = []
    found = timing.interleaved(
        {name: lambda name=name: order.append(name) for name in "abc"}, budget=0, least=4, most=9, warm=1
    )
    assert "".join(order) == "abc" + "abc" + "bca" + "cab" + "abc"
    assert {name: len(seconds) for name, seconds in found.items()} == {"a": 4, "b": 4, "c": 4}


def test_ratios_are_those_of_the_turns():
    """A turn that was slow for both sides changes nothing."""
    assert timing.ratio([2, 40, 6, 8], [1, 20, 2, 4]) == {"median": 2, "low": 2, "high": 2.25, "pairs": 4}
    assert timing.spread([3.0]) == {"median": 3, "low": 3, "high": 3, "pairs": 1}
    with pytest.raises(ValueError, match="zip"):
        timing.ratio([1, 2], [1])


def _cell(commit="a" * 40, threads=2, **settings):
    machine = {"commit": commit, "threads": threads, "load": 0.1, "started": "2026-01-02T03:04:05+00:00"}
    return {"row": "scale", "settings": settings, "figures": {"x": 1.0}, "machine": machine}


def test_a_run_that_was_stopped_goes_on(tmp_path):
    place = tmp_path / "results.json"
    cells.Results(place).put(_cell(graph="ring"))
    later = cells.Results(place)
    assert later.has("scale", {"graph": "ring"}, "a" * 40, 2)
    assert not later.has("scale", {"graph": "ring"}, "b" * 40, 2)
    assert not later.has("scale", {"graph": "ring"}, "a" * 40, 1)
    assert not later.has("scale", {"graph": "star"}, "a" * 40, 2)
    later.put(_cell(commit="b" * 40, graph="ring"))
    assert [cell["machine"]["commit"] for cell in json.loads(place.read_text())["cells"]] == ["b" * 40]


def test_what_is_measured_is_not_measured_again(tmp_path, monkeypatch, capsys):
    asked = []

    def measured(row, settings, device, threads):
        asked.append(settings["graph"])
        if settings["graph"] == "base:3" and len(asked) < 3:
            raise RuntimeError("out of luck")
        return {**_cell(threads=threads, **settings), "figures": {"agents": {}}}

    monkeypatch.setattr(cells, "in_process", measured)
    monkeypatch.setattr("benchmarks.suite.machine.commit", lambda: "a" * 40)
    command = ["--only", "scale", "--threads", "1", "--results", str(tmp_path / "results.json")]
    assert main(command) == 1
    assert "out of luck" in capsys.readouterr().out
    assert main(command) == 0
    assert asked == ["ring", "base:3", "base:3"]
    assert main([*command, "--again"]) == 0
    assert asked[3:] == ["ring", "base:3"]


def test_some_cells_are_chosen_by_their_words(capsys):
    command = ["--full", "--list", "--only", "local_steps", "--match", "agents=1", "dtype=bf16", "batch=8"]
    assert main(command) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[1] for line in lines] == ["model=digits", "model=minilm", "model=vit"]
    assert all({"agents=1", "dtype=bf16", "batch=8"} <= set(line.split()) for line in lines)


def test_a_missed_bar_stays_with_its_reason():
    def found(switched, batch):
        ratios = {name: timing.spread([value]) for name, value in (("switched", switched), ("pooled", 1.0))}
        return cells.Found({"model": "minilm", "agents": 10, "batch": batch, "dtype": "float32"}, ratios)

    bars = {bar.name: bar for bar in local_steps.bars([found(1.9, 2), found(0.99, 32)])}
    assert [page.verdict(bar) for bar in bars.values()] == ["missed", "missed", "met"]
    assert "0.99" in bars["of switching"].measured
    assert all(local_steps.WHY[name] for name in bars)
    assert [page.verdict(bar) for bar in local_steps.bars([])] == ["open"] * 3
    assert scale.bars([]) == []


def test_the_page_shows_the_committed_results():
    assert page.PLACE.read_text() == page.written(), "run: python -m benchmarks.suite --page"
