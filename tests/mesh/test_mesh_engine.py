"""The mesh as an engine: agents in threads against the simulation, bit for bit."""

from __future__ import annotations

import json
import threading
import time
from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors.torch import load, save

from decaf_lora import graphs
from decaf_lora.adapters.names import owner, take
from decaf_lora.engines import Simulate
from decaf_lora.engines.mesh.engine import StoppedError, WaitedOutError
from decaf_lora.engines.mesh.frames import Data, Get, Last
from decaf_lora.engines.mesh.outcome import Phase, RejectionError
from decaf_lora.engines.mesh.payload import Template, pack
from decaf_lora.graphs import Graph
from mesh.agents import LIMITS, Agent, N, begin, equals_simulation, make_run, together
from mesh.switchboard import Switchboard


def ranks(*values):
    return values


CASES = [
    ("decaf", {}, "ring", 1),
    ("decaf", {}, "complete", 1),
    ("dlora", {}, "ring", 1),
    ("dlora_fa", {}, "ring", 1),
    ("decaf_tracked", {}, "ring", 1),
    ("decaf_tracked", {"messages": "int8"}, "complete", 1),
    ("decaf", {"messages": "int8"}, "ring", 1),
    ("decaf", {"truncation_feedback": 1.0}, "ring", 1),
    ("decaf", {"quasi_global": 0.5}, "ring", 1),
    ("decaf", {"order": "combine-adapt"}, "ring", 1),
    ("decaf", {"order": "combine-adapt", "moments": "transport", "gauge": "balanced"}, "star", 1),
    ("decaf", {}, "ring", 1, ranks(1, 4, 2, 3)),
    ("decaf_tracked", {}, "ring", 1, ranks(1, 4, 2, 3)),
    ("dlora_fa", {}, "star", 1, ranks(1, 4, 2, 3)),
    ("decaf", {"relay_rank": 4}, "ring", 2),
    ("decaf", {"relay_rank": 4, "order": "combine-adapt"}, "ring", 3),
    ("decaf", {"relay_rank": 8}, "ring", 2, ranks(1, 4, 2, 3)),
    ("decaf", {}, "hypercube", 1),
    ("decaf", {"relay_rank": 4}, "hypercube", "period"),
    ("decaf_tracked", {"relay_rank": 4}, "ring", 2),
    ("decaf_tracked", {"relay_rank": 4}, "hypercube", "period"),
    ("alternating", {"mixes": "both"}, "ring", 1),
    ("core", {"tracking": True}, "ring", 1),
    ("fedsa", {"transforms": ["personal_head", "outer_momentum"]}, "ring", 1),
    ("decaf", {"transforms": ["clipped"], "messages": "int8"}, "ring", 1),
    ("dlora", {"transforms": ["trimmed"]}, "complete", 1),
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_mesh_is_bit_equal_to_simulate(case):
    """Every agent knows its own examples alone, and what it ends with is that agent's row of the simulation."""
    simulated = make_run(case, Simulate)
    records = list(simulated.train())
    agents = together(case)
    equals_simulation(agents, simulated, records)
    for record in (record for agent in agents for record in agent.records):
        assert record.averaged_score is None
        assert record.consensus_distance is None


# Accounts of edges


def corrections(agents):
    """Agent -> name -> c, and agent -> neighbour -> name -> f."""
    c = {i: take("state/tracking/c/", a.tensors) for i, a in enumerate(agents)}
    f = {i: {j: take(f"state/tracking/f/{j}/", a.tensors) for j in a.neighbours} for i, a in enumerate(agents)}
    return c, f


def assert_accounts_agree(agents):
    """c_i = sum_j f_ij, f_ij = -f_ji, so sum_i c_i = 0 up to the rounding of c."""
    c, f = corrections(agents)
    for name in c[0]:
        largest = float(max(c[i][name].abs().max() for i in c))
        for i in c:
            torch.testing.assert_close(c[i][name], sum(f[i][j][name] for j in f[i]), atol=1e-5 * largest, rtol=0)
            for j in f[i]:
                assert torch.equal(f[i][j][name], -f[j][i][name])
        assert largest > 0
        assert float(sum(c[i][name] for i in c).abs().max()) <= 1e-5 * largest


TRACKED = ("decaf_tracked", {}, "ring", 1)


@pytest.mark.parametrize("case", [TRACKED, ("decaf_tracked", {"relay_rank": 4}, "ring", 2)], ids=str)
def test_corrections_are_sums_of_accounts_that_agree(case):
    assert_accounts_agree(together(case))


# Faults


def finished(agents):
    for agent in agents:
        agent.join()
    assert {agent.mesh.peer.phase for agent in agents} == {Phase.LEFT}


def test_an_edge_that_never_comes_up_is_as_if_it_were_not_there():
    """Bit for bit: its weight goes to its ends, and an agent without that edge is not held up for long."""
    case, board, limits = ("decaf", {}, "ring", 1), Switchboard(), replace(LIMITS, down=0.05, linger=2.0)
    board.blocked.add(frozenset((0, 1)))
    agents = [Agent(i, case, board, limits) for i in range(N)]
    begin(agents)
    finished(agents)
    weights = np.array(graphs.parse("ring", N, 0).weights)
    weights[0, 0] += weights[0, 1]
    weights[1, 1] += weights[1, 0]
    weights[0, 1] = weights[1, 0] = 0
    simulated = make_run(case, Simulate, graph=Graph(weights))
    list(simulated.train())
    equals_simulation(agents, simulated)
    for number, other in ((0, "1"), (1, "0"), (2, None), (3, None)):
        missed = [record.missed for record in agents[number].records]
        assert missed == [None, *({str(e): {other: "silent"}} if other else None for e in (1, 2, 3))]


def held_from(round_, agents, event):
    """These agents train no further than `round_` before the event."""

    def on_step(number, *_):
        if number >= round_:
            assert event.wait(60)

    for agent in agents:
        agent.run.on_step = on_step


class Killed(BaseException):
    pass


def killed_and_back(case, rounds, until):
    """Agent 2 is killed in round 3 and comes back from its checkpoint of round 2 once the others are at `until`."""
    board, limits = Switchboard(), replace(LIMITS, down=0.02)
    agents = [Agent(i, case, board, limits, rounds) for i in range(N)]
    back = threading.Event()
    victim, others = agents[2], [agents[i] for i in (0, 1, 3)]
    held_from(until, others, back)

    def kill(number, *_):
        if number == 3:
            raise Killed

    victim.run.on_step = kill
    begin(agents)
    victim.thread.join(60)
    assert isinstance(victim.error, Killed)
    tensors, values = victim.checkpoint
    victim.link.stop()
    again = agents[2] = Agent(2, case, board, limits, rounds)
    again.run.restore(tensors, json.loads(json.dumps(values)))
    while min(agent.mesh.peer.closed for agent in others) < min(until - 1, rounds):
        time.sleep(0.01)
    begin([again], others)
    back.set()
    finished(agents)
    return agents


def test_an_agent_that_is_killed_comes_back_by_itself_and_the_accounts_agree():
    agents = killed_and_back(TRACKED, rounds=16, until=9)
    rounds = [record.round for record in agents[2].records]
    assert rounds[0] >= 8  # it takes up the round that the others are at
    assert rounds[-1] == 16
    assert_accounts_agree(agents)


def test_a_crash_that_nobody_had_time_to_miss_changes_no_bit():
    """The others wait at the exchange that the checkpoint is before."""
    simulated = make_run(TRACKED, Simulate, rounds=5)
    records = list(simulated.train())
    board, limits = Switchboard(), replace(LIMITS, down=60.0)
    agents = [Agent(i, TRACKED, board, limits, 5) for i in range(N)]

    def kill(number, *_):
        if number == 3:
            raise Killed

    agents[2].run.on_step = kill
    begin(agents)
    agents[2].thread.join(60)
    tensors, values = agents[2].checkpoint
    agents[2].link.stop()
    agents[2] = Agent(2, TRACKED, board, limits, 5)
    agents[2].run.restore(tensors, json.loads(json.dumps(values)))
    agents[2].start()
    finished(agents)
    agents[2].records = records[:3] + agents[2].records
    equals_simulation(agents, simulated)
    assert [record.round for record in agents[2].records[3:]] == [3, 4, 5]


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("case", [TRACKED, ("decaf_tracked", {"relay_rank": 4}, "ring", 2)], ids=str)
def test_links_that_break_at_random_leave_accounts_that_agree(case, seed):
    board, rounds, random = Switchboard(), 20, np.random.default_rng(seed)
    agents = [Agent(i, case, board, replace(LIMITS, down=0.02), rounds) for i in range(N)]
    begin(agents)
    while min(agent.run.round for agent in agents) < 12:
        edge = random.integers(N)
        board.disconnect(edge, (edge + 1) % N, for_good=True)
        time.sleep(random.uniform(0, 0.05))
        board.mend(edge, (edge + 1) % N)
    finished(agents)
    missed = sum(len(record.weights or {}) < 2 for agent in agents for record in agent.records[1:])
    assert missed > 0
    assert_accounts_agree(agents)


def test_an_agent_that_comes_back_after_the_end_takes_the_average_of_those_that_serve():
    agents = killed_and_back(("decaf", {}, "ring", 1), rounds=6, until=7)
    assert agents[2].run.round == 6
    assert [record.round for record in agents[2].records] == [6]
    neighbours = [agents[j].run.adapter.tensors() for j in (1, 3)]
    extras = {name: t for name, t in agents[2].run.adapter.tensors().items() if name.startswith("extras/")}
    for name, tensor in extras.items():
        torch.testing.assert_close(tensor, (neighbours[0][name] + neighbours[1][name]) / 2)


@pytest.mark.parametrize("notices", ["before it sends", "after it has sent"])
def test_an_agent_that_was_stopped_for_long_catches_up(notices):
    """In the middle of its local steps, long enough for the links to take it for lost."""
    board, rounds = Switchboard(), 16
    agents = [Agent(i, TRACKED, board, replace(LIMITS, down=0.02), rounds) for i in range(N)]
    back, stopped, others = threading.Event(), threading.Event(), [agents[i] for i in (0, 1, 3)]
    held_from(9, others, back)

    def stop(number, step, *_):
        if (number, step) == (3, 1):
            for other in (1, 3):
                board.disconnect(2, other, for_good=True)
            stopped.set()
            while min(agent.mesh.peer.closed for agent in others) < 8:
                time.sleep(0.01)
            if notices == "before it sends":
                reconnect()

    def reconnect():
        for other in (1, 3):
            board.mend(2, other)
        while not all(agents[2].mesh.peer.edges[j].next == 9 for j in (1, 3)):
            time.sleep(0.01)

    agents[2].run.on_step = stop
    begin(agents)
    assert stopped.wait(60)
    if notices == "after it has sent":
        while agents[2].mesh.peer.exchange != 3:
            time.sleep(0.01)
        reconnect()
    while Get not in {type(frame) for sender, _, frame in list(board.frames) if sender == 2}:
        time.sleep(0.01)
    back.set()
    finished(agents)
    rounds_of = [record.round for record in agents[2].records]
    assert rounds_of[:3] == [0, 1, 2]
    assert 8 <= rounds_of[3] <= 12
    assert rounds_of[-1] == rounds
    assert_accounts_agree(agents)


def test_an_agent_that_is_alone_ends_with_exit_code_3_and_says_whom_it_missed():
    board = Switchboard()
    agent = Agent(0, TRACKED, board, replace(LIMITS, linger=0.2))
    agent.start()
    with pytest.raises(WaitedOutError, match=r"for agent 1, agent 3; none was in reach") as caught:
        agent.join()
    assert (caught.value.exit_code, caught.value.alone, caught.value.missing) == (3, True, ["agent 1", "agent 3"])


def test_stop_ends_an_agent_that_waits():
    agent = Agent(0, TRACKED, Switchboard())
    agent.start()
    status = agent.mesh.status()
    assert (status["phase"], status["round"], status["waits_for"]) == ("idle", 1, [])
    assert status["neighbours"]["agent 3"] == {"up": False, "round": 1, "missed": 0}
    agent.mesh.stop()
    with pytest.raises(StoppedError):
        agent.join()


def test_agents_whose_messages_differ_do_not_talk():
    board, limits = Switchboard(), replace(LIMITS, linger=2.0)
    agents = [Agent(i, ("decaf", {}, "ring", 1), board, limits) for i in range(3)]
    agents.append(Agent(3, ("decaf_tracked", {}, "ring", 1), board, limits))
    begin(agents)
    with pytest.raises(WaitedOutError, match="none was in reach"):
        agents[3].join()
    for agent in agents[:3]:
        agent.join()
        assert agent.run.round == 3
    told = [line for agent in agents for record in agent.records for line in record.rejected or []]
    told += [reason for agent in agents for _, reason in agent.mesh.peer.rejections]
    assert any("its messages have other names, shapes or types, or it runs another federation" in line for line in told)


def test_a_run_that_is_stopped_and_goes_on_is_bit_equal():
    case = ("decaf", {"order": "combine-adapt"}, "ring", 1)
    simulated = make_run(case, Simulate)
    list(simulated.train())
    board = Switchboard()
    agents = [Agent(i, case, board) for i in range(N)]
    agents[1].stops_after = (2, 1)
    begin(agents)
    finished(agents)
    equals_simulation(agents, simulated)


# Messages


def template(**sizes):
    return Template({"A/x": torch.ones(1, 3, 4), "int8/code/B": torch.ones(1, 2, dtype=torch.int8)}, sizes)


GOOD = {"A/x": torch.full((1, 3, 4), 2.0), "int8/code/B": torch.ones(1, 2, dtype=torch.int8)}


@pytest.mark.parametrize(
    ("payload", "says"),
    [
        (b"", "it is no safetensors file"),
        (b"\xff" * 100, "it is no safetensors file"),
        (save(GOOD)[:-1], "it is no safetensors file"),
        (save({"A/x": GOOD["A/x"]}), "it lacks a tensor: int8/code/B"),
        (save(GOOD | {"z": GOOD["A/x"].clone()}), "it has a tensor too many: z"),
        (save(GOOD | {"A/x": torch.ones(1, 3, 5)}), r"A/x is float32 \(1, 3, 5\), not float32 \(1, 3, 4\)"),
        (save(GOOD | {"A/x": torch.ones(2, 3, 4)}), r"A/x is float32 \(2, 3, 4\), not float32 \(1, 3, 4\)"),
        (save(GOOD | {"A/x": torch.ones(1, 3, 4).double()}), "A/x is float64"),
        (save(GOOD | {"A/x": torch.full((1, 3, 4), float("nan"))}), "A/x is not finite"),
        (save(GOOD | {"A/x": torch.full((1, 3, 4), float("inf"))}), "A/x is not finite"),
        (save(GOOD | {"A/x": torch.full((1, 3, 4), 1e20)}), "its norm is 3.46e.20, over 100 times the own 3.46"),
    ],
)
def test_a_message_that_is_none_is_refused(payload, says):
    with pytest.raises(RejectionError, match=says):
        template().unpack(payload, 1, 12**0.5)


def test_bytes_that_were_altered_anywhere_are_refused_or_sound():
    random, sound = np.random.default_rng(0), save(GOOD)
    refused = 0
    for _ in range(2000):
        payload = bytearray(sound)
        for place in random.integers(0, len(sound), random.integers(1, 6)):
            payload[place] = random.integers(0, 256)
        try:
            got = template().unpack(bytes(payload[: random.integers(len(sound) // 2, len(sound) + 1)]), 1, 1.0)
        except RejectionError:
            refused += 1
        else:
            assert {name: t.shape for name, t in got.items()} == {name: t.shape for name, t in GOOD.items()}
    assert refused > 1000


def test_a_sound_message_is_what_was_packed():
    got = template().unpack(pack(GOOD, {}, 0), 1, 12**0.5)
    assert all(torch.equal(got[name], tensor) for name, tensor in GOOD.items())


def test_a_message_may_be_small_where_the_own_one_is_still_zero():
    template().unpack(pack(GOOD, {}, 0), 1, 0.0)
    with pytest.raises(RejectionError, match="its norm is"):
        template().unpack(pack(GOOD | {"A/x": torch.full((1, 3, 4), 30.0)}, {}, 0), 1, 0.0)


def test_only_the_own_rank_travels_and_the_rest_is_zero():
    sizes = {"A/x": (1, [3, 1])}
    message = {**GOOD, "A/x": torch.cat([torch.ones(1, 1, 4), torch.zeros(1, 2, 4)], 1)}
    payload = pack(message, sizes, 1)
    assert load(payload)["A/x"].shape == (1, 1, 4)
    got = template(**sizes).unpack(payload, 1, 12**0.5)
    assert torch.equal(got["A/x"], message["A/x"])
    with pytest.raises(RejectionError, match="not float32"):
        template(**sizes).unpack(payload, 0, 12**0.5)


def test_what_leaves_an_agent_is_its_message_and_nothing_else():
    """All frames of a run: the payloads are the messages, whose tensors the template names."""
    case, board = ("decaf_tracked", {}, "ring", 1), Switchboard()
    agents = [Agent(i, case, board) for i in range(N)]
    begin(agents)
    finished(agents)
    names = set(agents[0].mesh.template().message)
    assert {owner(name) for name in names} == {"A", "B", "extras", "tracking"}
    for _, _, frame in board.frames:
        if isinstance(frame, Data | Last):
            assert frame.parts == 1
            assert set(load(frame.payload)) == names
        else:
            assert not hasattr(frame, "payload")
            assert len(getattr(frame, "facts", b"")) <= 64
