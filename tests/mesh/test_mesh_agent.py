"""`decaf agent` in real processes over TLS: ends as the simulation does, stops, goes on, comes back, gives up."""

import json
import os
import subprocess
import sys

import torch
import yaml
from safetensors.torch import load_file

from decaf_lora.cli import main
from decaf_lora.config import AlgorithmConfig
from decaf_lora.federation import demo, status
from decaf_lora.records import read_records
from decaf_lora.runs.build import build_run
from endpoints import until
from federations import NAMES, federation, said
from sites import WAIT


def test_three_agents_end_bit_equal_to_the_simulation(tmp_path, sites):
    """carol can only dial out: her neighbours never call her."""
    config, options = federation(tmp_path, dial_only=["carol"])
    for name in NAMES:
        sites.brake(name, 0)  # whoever is ready first waits a second for the others, which may need longer
        sites("start", name, *options[name])
    until(lambda: all(sites.held(name) for name in NAMES))
    until(lambda: all(edge.up for name in NAMES for edge in said(tmp_path, name).neighbours))
    for name in NAMES:
        sites.release(name)
    assert sites.wait(*NAMES) == dict.fromkeys(NAMES, 0), sites.log("alice")
    with build_run(config) as run:
        records = list(run.train())
        for number, name in enumerate(NAMES):
            run.save_adapter(tmp_path / "simulated" / name, number)
    for number, name in enumerate(NAMES):
        mine, truth = (
            load_file(folder / "adapter_model.safetensors")
            for folder in (tmp_path / name / "adapter", tmp_path / "simulated" / name)
        )
        assert mine.keys() == truth.keys()
        assert all(torch.equal(mine[key], truth[key]) for key in truth)
        own = read_records(tmp_path / name / "records.jsonl")
        assert [record.losses for record in own] == [r.losses and [r.losses[number]] for r in records]
        assert [record.scores for record in own] == [r.scores and [r.scores[number]] for r in records]
        last = said(tmp_path, name)
        assert (last.state, last.round, last.rounds) == ("done", 6, 6)
        assert [edge.name for edge in last.neighbours] == [n for n in NAMES if n != name]
        assert all(edge.missed == edge.rejected == 0 and edge.sent and edge.received for edge in last.neighbours)
        assert "| bob |" in (tmp_path / "alice" / "report.md").read_text()


def test_an_agent_that_is_stopped_goes_on(tmp_path, sites):
    """SIGTERM leaves a checkpoint; the other waits; started again, both end as if nothing had happened."""
    config, options = federation(tmp_path, NAMES[:2], rounds=40)
    sites.brake("alice", 20)
    for name in NAMES[:2]:
        sites("start", name, *options[name])
    until(lambda: sites.held("alice"))
    sites("term", "alice")
    sites.release("alice")
    assert sites.wait("alice") == {"alice": 130}
    stopped = said(tmp_path, "alice")
    assert stopped.state == "stopped"
    assert 3 <= stopped.round < 40
    assert "started again with the same --out" in sites.log("alice")
    sites("start", "alice", *options["alice"])
    assert sites.wait("alice", "bob") == {"alice": 0, "bob": 0}, sites.log("alice")
    assert said(tmp_path, "alice").returned == stopped.round + 1
    with build_run(config) as run:
        assert list(run.train())
        run.save_adapter(tmp_path / "simulated", 0)
    mine, truth = (load_file(tmp_path / f / "adapter_model.safetensors") for f in ("alice/adapter", "simulated"))
    assert all(torch.equal(mine[key], truth[key]) for key in truth)


def test_an_agent_that_is_killed_comes_back(tmp_path, sites):
    _, options = federation(tmp_path, rounds=60)
    sites.brake("carol", 30)
    for name in NAMES:
        sites("start", name, *options[name])
    until(lambda: sites.held("carol"))
    sites("kill", "carol")
    sites.release("carol")
    assert sites.wait("carol") == {"carol": -9}
    sites("start", "carol", *options["carol"])
    assert sites.wait(*NAMES) == dict.fromkeys(NAMES, 0), sites.log("carol")
    assert said(tmp_path, "carol").returned is not None
    assert [said(tmp_path, name).round for name in NAMES] == [60] * 3


def test_what_it_would_reach_alone_is_kept(tmp_path, sites):
    """Trained before round 1, equal to a local run on the same examples, and not again after a stop."""
    config, options = federation(tmp_path, NAMES[:2], rounds=30)
    sites.brake("bob", 110)  # 90 of them alone
    for name in NAMES[:2]:
        sites("start", name, *[option for option in options[name] if option != "--no-alone"])
    until(lambda: sites.held("bob"))
    sites("term", "bob")
    sites.release("bob")
    assert sites.wait("bob") == {"bob": 130}
    sites("start", "bob", *options["bob"])
    assert sites.wait("alice", "bob") == {"alice": 0, "bob": 0}, sites.log("bob")
    with build_run(config.model_copy(update={"algorithm": AlgorithmConfig(name="local")})) as run:
        *_, last = run.train()
    for number, name in enumerate(NAMES[:2]):
        assert said(tmp_path, name).score_alone == last.scores[number]
        assert said(tmp_path, name).score_at_start is not None


def test_who_is_alone_gives_up_and_names_who_was_missing(tmp_path, sites):
    _, options = federation(tmp_path, NAMES[:2], give_up=2.0)
    sites("start", "alice", *options["alice"])
    assert sites.wait("alice") == {"alice": 3}
    assert said(tmp_path, "alice").state == "gave up"
    assert said(tmp_path, "alice").said == "nobody answered for 2 s: bob"
    assert "gave up" in sites.log("alice")
    assert (tmp_path / "alice" / "adapter" / "adapter_model.safetensors").exists()
    assert "nobody answered for 2 s: bob" in (tmp_path / "alice" / "report.md").read_text()


def test_mistakes_are_one_line_and_send_nothing(tmp_path, capsys):
    _, options = federation(tmp_path, NAMES[:2])

    def fails(*changed, name="bob"):  # who listens
        capsys.readouterr()
        base = ["agent", str(tmp_path / "fed.yaml"), "--name", name, "--out", str(tmp_path / "out")]
        assert main([*base, *map(str, changed)]) == 2
        err = capsys.readouterr().err
        assert "Traceback" not in err
        (line,) = [line for line in err.splitlines() if not line.startswith("bob: starting")]
        assert line.startswith("decaf: ")
        assert not (tmp_path / "out").exists()
        return line

    right = options["bob"]
    assert "--trust" in fails(*right[2:])
    assert "Did you mean 'alice'" in fails(*right, name="alicia")
    assert "unknown option" in fails(*right, "--rounds", "3")
    assert "cannot listen on 192.0.2.1:7447" in fails(*right[:-1], "192.0.2.1:7447")
    assert "partition" in fails(*right, "--partition", "iidd")
    (tmp_path / "bob.key").chmod(0o604)
    assert "others may use" in fails(*right)
    (tmp_path / "bob.key").chmod(0o600)
    values = yaml.safe_load((tmp_path / "fed.yaml").read_text())
    values["signed"]["terms"]["rounds"] = 7
    (tmp_path / "fed.yaml").write_text(json.dumps(values))
    assert "has been altered" in fails(*right)


def test_the_demo(tmp_path):
    """Five processes, one killed and back: exit code 0 only if all end well."""
    command = [sys.executable, "-m", "decaf_lora", "federation", "demo", "--out", tmp_path / "demo", "--rounds", "12"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=WAIT, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "carol killed (SIGKILL) after round" in done.stdout
    assert "carol is back, in round" in done.stdout
    assert "all five ended well" in done.stdout
    for name in demo.NAMES:
        last = status.read(status.file_of(tmp_path / "demo" / "demo.yaml", name))
        assert (last.state, last.round) == ("done", 12)
        assert last.score > 0.3 > last.score_at_start  # it has learnt
        assert (tmp_path / "demo" / name / "adapter" / "adapter_config.json").exists()
        assert (tmp_path / "demo" / f"{name}.key").stat().st_mode & 0o777 == 0o600
    assert main(["federation", "demo", "--out", str(tmp_path / "demo")]) == 2
    assert main(["federation", "demo", "--out", str(tmp_path / "other"), "--rounds", "3"]) == 2
