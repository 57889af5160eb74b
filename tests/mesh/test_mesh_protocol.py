"""The exchange protocol on a network in memory and in virtual time."""

from __future__ import annotations

import pytest

from mesh.audit import accounts_agree, audit
from mesh.world import World

LINE3 = [(0, 1), (1, 2)]
RING4 = [(0, 1), (1, 2), (2, 3), (0, 3)]
K4 = [*RING4, (0, 2), (1, 3)]


@pytest.mark.parametrize(
    ("num_agents", "edges"),
    [(2, [(0, 1)]), (3, LINE3), (3, [*LINE3, (0, 2)]), (4, RING4), (4, K4)],
)
@pytest.mark.parametrize("hops", [1, 2])
def test_without_faults_every_edge_is_used_in_every_exchange(num_agents, edges, hops):
    world = World(num_agents, edges, 12, hops=hops).run()
    counts = audit(world)
    assert counts["uses"] == 2 * len(edges) * 12
    assert counts["whole matrices"] == 12
    assert [n.ended for n in world.nodes] == ["done"] * num_agents
    accounts_agree(world, calm=True)
