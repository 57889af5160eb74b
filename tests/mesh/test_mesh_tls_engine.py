"""The mesh over real sockets and mutual TLS against the simulation, bit for bit."""

import pytest

from decaf_lora import graphs
from decaf_lora.engines import Simulate
from decaf_lora.engines.links import Links, Neighbour, Timing
from decaf_lora.engines.mesh.link import dialler
from helpers.endpoints import own
from mesh.agents import Agent, N, equals_simulation, make_run

NAMES = ("alice", "bob", "carol", "dave")
TIMING = Timing(lost=30.0, first_retry=0.02, last_retry=0.1)


@pytest.fixture(scope="module")
def identities(tmp_path_factory):
    folder = tmp_path_factory.mktemp("keys")
    return [own(folder, name) for name in NAMES]


@pytest.mark.parametrize(
    "case",
    [
        ("decaf", {}, "ring", 1),
        ("decaf_tracked", {"messages": "int8"}, "complete", 1),
        ("decaf", {"relay_rank": 4}, "ring", 2),
    ],
    ids=str,
)
def test_over_tls_the_mesh_is_bit_equal_to_simulate(identities, case):
    simulated = make_run(case, Simulate)
    records = list(simulated.train())
    graph, ports, agents = graphs.parse(case[2], N, 0), {}, []
    for number in reversed(range(N)):  # whoever sorts first dials, so the last listens first
        neighbours = []
        for other in graph.neighbours(number):
            dials = dialler(NAMES[number], NAMES[other], frozenset(NAMES)) == NAMES[other]
            address = None if dials else f"127.0.0.1:{ports[other]}"
            neighbours.append(Neighbour(NAMES[other], identities[other].certificate, address, other, dials))
        links = Links(identities[number], neighbours, listen="127.0.0.1:0", timing=TIMING)
        agent = Agent(number, case, link=links)
        agent.start()
        ports[number] = links.port
        agents.append(agent)
    agents.reverse()
    for agent in agents:
        agent.join()
    equals_simulation(agents, simulated, records)
