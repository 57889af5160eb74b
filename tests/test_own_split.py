"""Somebody's own sites, from their table to the report: names go with the agents all the way."""

import contextlib
import csv
import json

import networkx as nx
import numpy as np
import pytest
import torch

from decaf_lora import algorithms, graphs, tasks
from decaf_lora.cli import main
from decaf_lora.config import RunConfig, TaskConfig, build
from decaf_lora.errors import UserError
from decaf_lora.run import Run
from decaf_lora.runs.build import build_run
from decaf_lora.runs.export import numbered
from tiny import WORDS, write
from toy import Toy

pytestmark = [pytest.mark.filterwarnings("ignore::FutureWarning"), pytest.mark.usefixtures("datasets_cache")]

SITES = ("mayo", "charite", "kings")
SITES_IN_ORDER = tuple(sorted(SITES))


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return str(write("bert", tmp_path_factory.mktemp("bert")))


def rows(count):
    """(text, label, hospital): a third of the rows from each site, in no order."""
    generator = np.random.default_rng(0)
    for i in generator.permutation(count):
        label = ("good", "bad")[i // 3 % 2]
        yield f"{' '.join(generator.choice(WORDS[:20], 4))} {label}", label, SITES[i % 3]


@pytest.fixture(scope="module")
def table(tmp_path_factory):
    path = tmp_path_factory.mktemp("table") / "visits.csv"
    with path.open("w", newline="") as file:
        csv.writer(file).writerows([("text", "label", "hospital"), *rows(60)])
    return str(path)


def config(model, table, **more):
    task = {"name": "sequence-classification", "model": model, "data": table, "test_share": 0.2}
    values = {
        "task": task,
        "agents": 3,
        "partition": "column:hospital",
        "rounds": 1,
        "training": {"steps": 1, "batch_size": 2},
        "algorithm": {"name": "decaf"},
    }
    return RunConfig.model_validate(values | more)


def test_a_column_of_the_data_makes_the_agents(model, table):
    task = tasks.make(config(model, table).task)
    hospitals = task.column("hospital")
    assert len(hospitals) == len(task.labels) == 48
    assert len(task.column("hospital", "test")) == task.num_test == 12
    with contextlib.closing(build_run(config(model, table))) as run:
        assert run.partition.names == ("charite", "kings", "mayo")
        for name, shard in zip(run.partition.names, run.partition.shards, strict=True):
            assert set(hospitals[shard]) == {name}


def test_the_test_rows_and_their_columns_go_together(model, table):
    """The task sorts its test examples by length; the columns must follow."""
    task = tasks.make(config(model, table).task)
    labels = [task.classes[label] for label in task.test_batch(np.arange(task.num_test))["labels"]]
    assert task.column("label", "test").tolist() == labels
    assert task.column("label").tolist() == [task.classes[label] for label in task.labels]


def test_a_column_that_is_not_there(model, table):
    with pytest.raises(UserError, match=r"partition: column: 'hospitl' is not known\. Did you mean 'hospital'\?"):
        build_run(config(model, table, partition="column:hospitl"))
    with pytest.raises(UserError, match="the task digits has no columns, so none called 'hospital'"):
        build_run(RunConfig(partition="column:hospital"))
    assert tasks.make(TaskConfig()).tables == {}


def test_packed_texts_have_no_columns(tmp_path, table):
    llama = str(write("llama", tmp_path))
    options = {"name": "causal-lm", "model": llama, "data": table, "test_share": 0.2}
    plain = tasks.make(TaskConfig.model_validate(options))
    assert set(plain.column("hospital")) == set(SITES)
    packed = tasks.make(TaskConfig.model_validate(options | {"packing": True, "max_length": 16}))
    with pytest.raises(UserError, match="has no columns"):
        packed.column("hospital")


def links(config):
    """The graph and the names of the agents of the run."""
    with contextlib.closing(build_run(config)) as run:
        return run.schedule.at(0), run.partition.names


EDGES = "mayo kings\nkings charite\n"


def test_a_graph_with_names_finds_its_agents(model, table, tmp_path):
    (tmp_path / "sites.edgelist").write_text(EDGES)
    graph, names = links(config(model, table, graph=str(tmp_path / "sites.edgelist")))
    assert graph.names == names == ("charite", "kings", "mayo")
    assert graph.edges == [(0, 1), (1, 2)]
    (tmp_path / "more.csv").write_text("source,target\nmayo,kings\nkings,ucl\n")
    with pytest.raises(UserError, match="are kings, mayo, ucl but those of the run charite, kings, mayo"):
        build_run(config(model, table, graph=str(tmp_path / "more.csv")))
    # A matrix keeps the order of its rows; the partition's order wins.
    (tmp_path / "rows.csv").write_text(",mayo,kings,charite\nmayo,0,1,0\nkings,1,0,1\ncharite,0,1,0\n")
    again, _ = links(config(model, table, graph=str(tmp_path / "rows.csv")))
    np.testing.assert_array_equal(again.weights, graph.weights)


def test_names_of_a_graph_alone_name_the_agents(model, table, tmp_path):
    (tmp_path / "sites.edgelist").write_text(EDGES)
    _, names = links(config(model, table, graph=str(tmp_path / "sites.edgelist"), partition="iid"))
    assert names == ("charite", "kings", "mayo")


def test_the_command_line_from_the_table_to_the_report(model, table, tmp_path, capsys):
    (tmp_path / "sites.edgelist").write_text(EDGES)
    out = tmp_path / "run"
    arguments = ["--agents", 3, "--partition", "column:hospital", "--graph", tmp_path / "sites.edgelist"]
    arguments += ["--task", "sequence-classification", "--model", model, "--data", table, "--task.test_share", 0.2]
    arguments += [
        "--test",
        "both",
        "--rounds",
        1,
        "--training.steps",
        1,
        "--training.batch_size",
        2,
        "--lora.r",
        2,
        "--out",
        out,
    ]
    assert main(["run", "digits", *map(str, arguments)]) == 0, capsys.readouterr().err
    facts = json.loads((out / "run.json").read_text())
    assert facts["names"] == ["charite", "kings", "mayo"]
    weights = np.array(facts["graph"]["weights"])
    assert weights[0, 2] == 0 < weights[0, 1]
    page = (out / "report.html").read_text()
    assert "Every site" in page
    assert page.count("kings</text>") >= 3  # a row of the scores, a column of the labels, a node of the graph
    # Export by name is export by number, without the table and without the user's graph.
    (tmp_path / "sites.edgelist").unlink()
    assert main(["export", str(out), "--agent", "kings", "--to", str(tmp_path / "kings")]) == 0
    assert main(["export", str(out), "--agent", "1", "--to", str(tmp_path / "one")]) == 0
    name = "adapter_model.safetensors"
    assert (tmp_path / "kings" / name).read_bytes() == (tmp_path / "one" / name).read_bytes()
    assert "agent 1, kings" in (tmp_path / "kings" / "README.md").read_text()
    assert main(["report", str(out)]) == 0
    capsys.readouterr()
    assert main(["export", str(out), "--agent", "ucl", "--to", str(tmp_path / "ucl")]) == 2
    assert (
        "agent: 'ucl' is neither a number nor 'averaged' nor 'all'. Choose one of: charite" in capsys.readouterr().err
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A file a site, as three people would save them, and a test set of all."""
    folder = tmp_path_factory.mktemp("sites")
    for number, site in enumerate(SITES):
        own = [(text, label) for text, label, hospital in rows(60) if hospital == site]
        if number == 0:
            (folder / f"{site}.jsonl").write_text("".join(json.dumps({"text": t, "label": k}) + "\n" for t, k in own))
        else:
            with (folder / f"{site}.csv").open("w", newline="") as file:
                csv.writer(file).writerows([("text", "label"), *own])
    (folder / "test.csv").write_text("text,label\ngood dog,good\nbad cat,bad\nthe film good,good\n")
    return folder


def test_a_file_a_site(model, folder, tmp_path):
    task = {"name": "sequence-classification", "model": model}
    made = config(model, "", task=task, partition=f"files:{folder}")
    assert made.task.data == str(folder)
    with contextlib.closing(build_run(made)) as run:
        assert run.partition.names == ("charite", "kings", "mayo")
        assert run.partition.sizes.tolist() == [20, 20, 20]
        assert run.task.num_test == 3
        batch = run.task.train_batch(run.partition.shards[2])
        own = [label for _, label, hospital in rows(60) if hospital == "mayo"]
        assert [run.task.classes[label] for label in batch["labels"]] == own
    held_out = config(model, "", task=task | {"test_share": 0.2}, partition=f"shots:6/files:{folder}")
    with pytest.raises(UserError, match=r"task\.test_share: .* has a test set, test\.csv; leave test_share out"):
        build_run(held_out)
    for site in folder.glob("[!t]*"):
        (tmp_path / site.name).write_bytes(site.read_bytes())
    held_out = config(model, "", task=task | {"test_share": 0.2}, partition=f"shots:6/files:{tmp_path}")
    with contextlib.closing(build_run(held_out)) as run:
        assert run.partition.names == ("charite", "kings", "mayo")
        assert run.partition.sizes.sum() == 12
        assert sum(map(len, run.partition.tests)) == run.task.num_test == 12


@pytest.mark.parametrize(
    ("task", "partition", "message"),
    [
        ({"data": "other"}, "FOLDER", r"files:.* sets task\.data to .*, but it is other; leave it out"),
        ({"file_column": "x"}, "FOLDER", r"files:.* sets task\.file_column to site, but it is x; leave it out"),
        ({"data": "FOLDER", "file_column": "text"}, "iid", r"has a column 'text' already"),
        ({}, "nowhere", r"task\.data: nowhere does not exist|task\.data: 'nowhere' is no local path"),
        ({}, "FOLDER/mayo.jsonl", "must be a folder with a file for each site"),
    ],
)
def test_folders_of_sites_that_cannot_be(model, folder, task, partition, message):
    task = {key: str(value).replace("FOLDER", str(folder)) for key, value in task.items()}
    values = {"name": "sequence-classification", "model": model, **task}
    partition = partition if partition == "iid" else f"files:{partition.replace('FOLDER', str(folder))}"
    with pytest.raises(UserError, match=message):
        build_run(build(RunConfig, {"task": values, "agents": 3, "partition": partition}))


def test_indices_are_the_rows_of_the_training_split(model, table, folder, tmp_path):
    (tmp_path / "rows.json").write_text('{"zoe": [0, 5], "adam": [2]}')
    task = {"name": "sequence-classification", "model": model, "data": table, "test_split": "train[:10%]"}
    values = {"task": task, "agents": 2, "partition": f"indices:{tmp_path}/rows.json"}
    with contextlib.closing(build_run(build(RunConfig, values))) as run:
        assert run.partition.names == ("zoe", "adam")
        with open(table, newline="") as file:
            texts = [row["text"] for row in csv.DictReader(file)]
        assert [run.task.column("text")[i] for i in run.partition.shards[0]] == [texts[0], texts[5]]
    moved = values | {"task": {**task, "test_split": None, "test_share": 0.2}}
    with pytest.raises(UserError, match=r"task\.test_share: it takes rows out of the training split"):
        build_run(build(RunConfig, moved))


def test_a_name_with_two_meanings_is_refused():
    assert numbered("7", ["3", "7"]) == 1  # there is no agent number 7
    assert numbered("1", ["a", "1"]) == 1
    assert numbered("1", []) == 1
    assert numbered("b", ["a", "b"]) == 1
    assert numbered("all", ["a", "b"]) == "all"
    with pytest.raises(UserError, match="agent: 1 is the name of agent 0 and the number of '0'; rename it"):
        numbered("1", ["1", "0"])
    with pytest.raises(UserError, match="agent: 'all' is also the name of an agent; give its number, 1"):
        numbered("all", ["a", "all"])


# --- each site's own test set -------------------------------------------------------------------------------


def own_accuracy(task, site):
    """The score of the model as it stands, on the test rows of a site: by hand, one by one."""
    right = []
    for row in np.flatnonzero(task.column("hospital", "test") == site):
        batch = task.test_batch(np.array([row]))
        right.append(int(task.logits(batch).argmax(-1).item() == batch["labels"].item()))
    return np.mean(right)


@pytest.mark.parametrize("algorithm", ["decaf", "local", "fedavg", "centralized"])
@pytest.mark.parametrize("test", ["all", "own", "both"])
def test_agents_are_scored_on_all_on_their_own_or_on_both(model, table, test, algorithm):
    values = {"test": test, "algorithm": {"name": algorithm}, "training": {"steps": 3, "learning_rate": 0.05}}
    values["evaluate_every"] = 1
    with contextlib.closing(build_run(config(model, table, **values))) as run:
        (*_, last) = run.train()
        own = []
        for agent, site in enumerate(SITES_IN_ORDER):
            one = run.adapter.select([0 if algorithm == "centralized" else agent])
            with torch.no_grad(), run.attached.bind(one):
                own.append(own_accuracy(run.task, site))
        everything = run.trainer.evaluate(run.adapter).tolist()
    assert last.own_scores == (None if test == "all" else pytest.approx(own))
    assert last.scores == pytest.approx(own if test == "own" else everything)
    assert len(set(own)) > 1  # the sites differ, so mixing them up would show
    assert last.averaged_score is not None


def test_averaged_scores_of_own_tests_are_the_mean_over_sites(model, table):
    values = {"test": "own", "algorithm": {"name": "fedavg"}, "training": {"steps": 3, "learning_rate": 0.05}}
    with contextlib.closing(build_run(config(model, table, **values))) as run:
        (*_, last) = run.train()
    assert last.averaged_score == pytest.approx(np.mean(last.scores))  # after a server all agents are the average


def test_own_tests_that_nobody_has(model, table, folder):
    with pytest.raises(UserError, match=r"test: nobody knows whose the test examples are; split by a column"):
        build_run(config(model, table, partition="iid", test="own"))
    task = {"name": "sequence-classification", "model": model}
    with pytest.raises(UserError, match=r"test: nobody knows whose"):  # the common test file names no site
        build_run(config(model, "", task=task, partition=f"files:{folder}", test="both"))
    task = {**task, "data": table, "test_split": "train[:1]"}
    with pytest.raises(UserError, match=r"test: agent (charite|kings|mayo) has no test example of its own"):
        build_run(config(model, table, task=task, test="own"))


def test_a_run_takes_whatever_gives_the_rows_of_an_agent():
    class Thirds:
        def load_partition(self, agent):
            return range(agent, 60, 3)

    task = Toy()
    graph = graphs.from_networkx(nx.Graph([("bob", "alice"), ("bob", "carol")]))
    with Run(task, algorithms.dlora(), graph, Thirds(), rounds=1) as run:
        assert run.partition.sizes.tolist() == [20, 20, 20]
        assert run.partition.names == ("alice", "bob", "carol")
    rows = {"carol": [0, 1, 2, 3], "alice": [4, 5, 6, 7], "bob": [8, 9, 10, 11]}
    with Run(task, algorithms.dlora(), graph, rows, rounds=1) as run:
        assert run.schedule.at(0).names == run.partition.names == ("carol", "alice", "bob")
        assert run.schedule.at(0).edges == [(0, 2), (1, 2)]
    with pytest.raises(UserError, match="partition: custom is int"):
        Run(task, algorithms.dlora(), graph, 3, rounds=1)
