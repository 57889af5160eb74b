"""What must not grow with the square of the number of agents, and what a run of many agents leaves behind."""

import json

import numpy as np
import pytest

from decaf_lora import graphs
from decaf_lora.cli import main
from decaf_lora.errors import UserError
from decaf_lora.runs import identity


@pytest.mark.parametrize("kind", ["ring", "base:3", "one-peer-exponential", "complete"])
@pytest.mark.parametrize("agents", [1, 2, 3, 7])
def test_rows_are_what_of_the_matrix_is_not_0(kind, agents):
    schedule = graphs.as_schedule(graphs.parse(kind, agents, 0))
    for round_ in range(schedule.period):
        graph = schedule.at(round_)
        built = np.zeros((agents, agents))
        for agent, row in enumerate(graph.rows()):
            for sender, weight in row:
                built[agent, sender] = weight
        assert np.array_equal(built, graph.weights)
        assert sum(map(len, graph.rows())) == np.count_nonzero(graph.weights)


def test_a_period_that_leaves_agents_apart_is_still_refused():
    apart = np.kron(np.eye(2), np.full((2, 2), 0.5))
    half = graphs.Graph(apart, connected=False)
    with pytest.raises(UserError, match="agents 2, 3 cannot be reached"):
        graphs.Schedule.cycle([half, half], "apart")


def test_a_run_of_many_agents_has_rows_in_its_facts_and_a_report(monkeypatch, tmp_path):
    monkeypatch.setattr(identity, "MANY", 3)
    toy = ["--task", "tests/helpers/toy.py:make_toy", "--rounds", "1", "--training.steps", "1", "--partition", "iid"]
    for agents in (2, 3):
        out = tmp_path / str(agents)
        assert main(["run", "digits", *toy, "--agents", str(agents), "--graph", "ring", "--out", str(out)]) == 0
        found = json.loads((out / "run.json").read_text())["graph"]
        if agents == 2:
            assert found["weights"] == [[0.5, 0.5], [0.5, 0.5]]
            assert found["sigma_2"] == pytest.approx(0)
        else:
            assert found["rows"] == [[[j, pytest.approx(1 / 3)] for j in range(3)] for _ in range(3)]
            assert "weights" not in found
            assert found["sigma_2"] is None
        assert ("Graph: ring" in (out / "report.html").read_text()) == (agents == 2)
