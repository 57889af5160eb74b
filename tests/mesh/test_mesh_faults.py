"""Faults on real agents over TLS: killed, stopped, cut off, behind firewalls. benchmarks/mesh_faults.py measures them.

Agents are held at a step, and links watched, so that each fault falls where it should on any machine.
"""

import contextlib
import importlib.util
import json
import shutil
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import network
from decaf_lora.config import RunConfig, build
from decaf_lora.federation import file
from decaf_lora.records import Record
from decaf_lora.runs.build import build_run
from endpoints import Proxy, until
from forwarder import forwarding
from lab import PORT, Federation
from ledger import Ledger

HELPERS = Path(__file__).parents[1] / "helpers"
THREE, FOUR = ("alice", "bob", "carol"), ("alice", "bob", "carol", "dave")
STEPS, ROUNDS = 2, 30
LONG = file.Limits(patience=120, give_up=240)
"""Nobody is given up who is merely slow."""


def config(agents, rounds=ROUNDS):
    values = {
        "task": {"name": f"{HELPERS / 'held.py'}:make_held"},
        "lora": {"r": 2, "lora_alpha": 4},
        "algorithm": {"name": "decaf_tracked"},
        "training": {"steps": STEPS, "batch_size": 4, "agents_per_pass": 1},
        "partition": "iid",
        "evaluate_every": rounds,
    }
    return build(RunConfig, {**values, "agents": agents, "rounds": rounds})


@pytest.fixture
def federation(tmp_path, program):
    """A federation of the toy task, of agents with these names."""
    with contextlib.ExitStack() as leave:

        def make(names, rounds=ROUNDS, limits=LONG, **options):
            shared = ("--partition", "iid", "--evaluate-every", str(rounds), "--agents-per-pass", "1")
            made = Federation(
                tmp_path / "sites",
                config(len(names), rounds),
                names,
                program,
                limits=limits,
                options=shared,
                **options,
            )
            return leave.enter_context(made)

        yield make


def at(round_):
    """The steps after which an agent is held at the beginning of the round after this one."""
    return round_ * STEPS


def begin(fed, **rounds):
    """Starts all agents. None begins before all links are up; those with a number are held after so many rounds."""
    for name in fed.names:
        fed.hold(name, 0)
    fed.start()
    fed.joined(*fed.names)
    for name in fed.names:
        if name in rounds:
            fed.hold(name, at(rounds[name]))
        else:
            fed.release(name)


def ends_well(fed, *names):
    """Exit codes are 0, all rounds done, and no edge was used by one end that should not be."""
    names = names or fed.names
    codes = fed.end(*names)
    assert codes == dict.fromkeys(names, 0), {name: fed.sites[name].log(name)[-1000:] for name in names}
    assert {name: fed.said(name).round for name in names} == dict.fromkeys(names, fed.rounds)
    uses = fed.ledger().uses()
    assert uses["wrong"] == 0
    return uses


def equals_simulation(fed, folder):
    """Each adapter is, bit for bit, that of a simulation."""
    with build_run(config(len(fed.names), fed.rounds).model_copy(update={"graph": "ring"})) as run:
        assert list(run.train())
        for number, name in enumerate(fed.names):
            run.save_adapter(folder / name, number)
    for name in fed.names:
        mine, truth = (load_file(f / "adapter_model.safetensors") for f in (fed.out(name) / "adapter", folder / name))
        assert mine.keys() == truth.keys()
        assert all(torch.equal(mine[key], truth[key]) for key in truth)


def test_a_slow_agent_is_waited_for(federation, tmp_path):
    fed = federation(THREE)
    begin(fed, carol=3)
    fed.held("carol")
    until(lambda: all(fed.said(name).waits_for == ["carol"] for name in ("alice", "bob")))
    fed.release("carol")
    assert ends_well(fed) == {"both": 3 * ROUNDS, "window": 0, "crash": 0, "wrong": 0}
    equals_simulation(fed, tmp_path / "simulated")


def test_two_neighbours_killed_at_once_are_back(federation):
    fed = federation(FOUR)
    lost, others = ("bob", "carol"), ("alice", "dave")
    begin(fed, bob=5, carol=5, alice=10, dave=10)
    fed.held(*lost)
    fed.kill(*lost)
    for name in lost:
        fed.hold(name, 0)
    fed.held(*others)
    fed.start(*lost)
    fed.held(*lost)
    fed.joined(*FOUR)
    fed.release(*FOUR)
    ends_well(fed)
    ledger = fed.ledger()
    for name in lost:
        assert fed.said(name).returned > 10
        assert ledger.missed(name) > 0
    assert [ledger.used(k, ROUNDS) for k in range(4)] == [{1, 3}, {0, 2}, {1, 3}, {0, 2}]
    # A link that is down is waited for 1 s, then half as long, and so on.
    assert all(record.missed[str(r)].keys() <= {"1"} for r, record in ledger.records[0].items() if record.missed)


def test_an_agent_that_left_rounds_out_is_killed_again(federation):
    """Its records then lack rounds, and it goes on from them all the same."""
    fed = federation(THREE)
    begin(fed, carol=5, alice=10)
    fed.held("carol")
    fed.kill("carol")
    fed.hold("carol", at(3))  # of its second life
    fed.held("alice")
    fed.start("carol")
    fed.joined(*THREE)
    fed.hold("alice", at(20))
    fed.held("carol")
    back = fed.round("carol")
    assert back > 10
    fed.kill("carol")
    fed.hold("carol", 0)
    fed.held("alice")
    fed.start("carol")
    fed.joined(*THREE)
    fed.release("alice", "carol")
    ends_well(fed)
    ledger = fed.ledger()
    rounds = list(ledger.records[2])
    assert {5, back, ROUNDS} <= set(rounds)
    assert 6 not in rounds
    assert [ledger.used(k, ROUNDS) for k in range(3)] == [{1, 2}, {0, 2}, {0, 1}]


def test_the_organisers_machine_is_gone(federation):
    """The others do not need its agent, its key or its file."""
    fed = federation(FOUR, limits=file.Limits(patience=120, give_up=6))
    begin(fed, alice=0, bob=0, carol=0, dave=0)
    shutil.rmtree(fed.organiser)
    fed.kill("alice")
    shutil.rmtree(fed.folder / "alice")
    others = FOUR[1:]
    fed.release(*others)
    ends_well(fed, *others)
    assert [fed.ledger().used(k, ROUNDS) for k in (1, 2, 3)] == [{2}, {1, 3}, {2}]


def test_a_stopped_agent_comes_back(federation):
    """SIGSTOP: its links stay, and it says nothing. It is given up after `patience`, here long before its links are."""
    fed = federation(THREE, limits=file.Limits(patience=2, give_up=240))
    begin(fed, carol=5, alice=10)
    fed.held("carol")
    fed.stop("carol")
    fed.release("carol")
    fed.held("alice")
    fed.go_on("carol")
    fed.reach(6, "carol")  # with bob, who does not wait for alice either
    fed.release("alice")
    ends_well(fed)
    own = fed.ledger().records[2]
    late = min(round_ for round_ in own if round_ > 5)
    assert late >= 9
    assert own[late].weights or any(own[r].weights for r in own if r > late)


def link(fed, own, other):
    """What the agent `own` says of its link to `other`."""
    return next(edge for edge in fed.said(own).neighbours if edge.name == other)


def test_a_link_that_is_cut_is_mended(federation):
    with contextlib.ExitStack() as leave:
        proxies = []

        def through(port):
            proxies.append(Proxy(port))
            leave.callback(proxies[0].stop)
            return proxies[0].port

        fed = federation(THREE, through={"bob": through})  # alice dials bob, and bob dials carol
        begin(fed, alice=5, bob=5)  # both, so that neither has sent its message of the round in which the link is cut
        fed.held("alice")
        fed.held("bob")
        proxies[0].cut()
        for own, other in (("alice", "bob"), ("bob", "alice")):
            until(lambda own=own, other=other: not link(fed, own, other).up)
        fed.release("bob")
        fed.hold("alice", at(15))
        fed.held("alice")
        proxies[0].mend()
        fed.joined(*THREE)
        fed.release("alice")
        uses = ends_well(fed)
    ledger = fed.ledger()
    assert 1 not in ledger.used(0, 8)
    assert 0 not in ledger.used(1, 8)
    assert [ledger.used(k, ROUNDS) for k in range(3)] == [{1, 2}, {0, 2}, {0, 1}]
    assert uses["crash"] == 0
    assert uses["both"] < 3 * ROUNDS


@pytest.fixture
def machines():
    if reason := network.why_not():
        pytest.skip(reason)
    with network.Network([*FOUR, "forwarder"]) as made:
        yield made


def test_nobody_can_be_dialled_but_a_forwarder_and_packets_are_lost(machines, federation, tmp_path):
    """A ring of four: alice and carol are reached through a forwarder, bob and dave only dial. 5 % loss."""
    outer = {"alice": 7001, "carol": 7003}
    for name in FOUR:
        machines.close(name)
    machines.lose(5)
    with forwarding(machines, "forwarder", PORT, outer):
        fed = federation(
            FOUR,
            rounds=8,
            network=machines,
            dial_only=("bob", "dave"),
            addresses={name: f"{machines.address('forwarder')}:{port}" for name, port in outer.items()},
        )
        begin(fed)
        assert ends_well(fed) == {"both": 4 * 8, "window": 0, "crash": 0, "wrong": 0}
    equals_simulation(fed, tmp_path / "simulated")


def test_the_ledger_sees_what_is_wrong(tmp_path):
    """Of two agents: rounds that both, one with a reason, one after a crash, and one without a reason has used."""
    seconds = {"exchange": 1.0}

    def write(name, *rounds):
        records = [Record(round=r, bytes_sent=1, learning_rate=0.1, seconds=seconds, **values) for r, values in rounds]
        (tmp_path / name).mkdir()
        (tmp_path / name / "records.jsonl").write_text("".join(json.dumps(vars(r)) + "\n" for r in records))

    def used(other, waited=0.5):
        return {"weights": {other: 0.5}, "waited": {other: waited}}

    silent = {"weights": {}, "waited": {"1": 2.5}, "missed": {"6": {"1": "silent"}}}
    write("alice", *((r, used("1")) for r in range(1, 6)), (6, silent))
    left = {"2": {"0": "cut off"}, "3": {"0": "declined"}}
    write("bob", (1, used("0")), (4, {"missed": left, **used("0")}), (6, {"weights": {}}))
    ledger = Ledger({name: tmp_path / name for name in ("alice", "bob")})
    assert ledger.uses() == {"both": 2, "window": 1, "crash": 1, "wrong": 1}
    assert ledger.cost("bob") == {"alice": 2.5}
    assert (ledger.missed("alice"), ledger.missed("bob")) == (1, 4)


def test_the_table_of_the_documentation_is_that_of_the_records():
    root = HELPERS.parents[1]
    path = root / "benchmarks" / "mesh_faults.py"
    spec = importlib.util.spec_from_file_location("mesh_faults", path)
    benchmark = importlib.util.module_from_spec(spec)
    sys.modules["mesh_faults"] = benchmark  # for its dataclass
    spec.loader.exec_module(benchmark)
    rows = json.loads(benchmark.RESULTS.read_text())
    assert benchmark.table(rows) in (root / "docs" / "mesh.md").read_text()
