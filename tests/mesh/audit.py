"""What must hold of the history of a `World`, whatever happened in it."""

from __future__ import annotations

from collections import Counter, defaultdict

import numpy as np

from decaf_lora.engines.mesh.edge import Verdict
from mesh.world import World


def audit(world: World) -> Counter:
    """Checks edges, messages and weights of every exchange; counts uses, one-sided ones and catch-ups.

    One-sided use is allowed only where the other end gave up by patience with the message in hand and the link down
    (`CUT_OFF`), or where a crash lies between the two.
    """
    counts: Counter = Counter(catch_ups=world.catch_ups)
    of = {(c.exchange, c.agent, c.life): c for c in world.closings}
    left = {(e, n.agent, life): v for n in world.nodes for e, life, v in n.left}
    lives = defaultdict(list)
    for c in world.closings:
        lives[c.exchange, c.agent].append(c.life)
    uneven = set()
    for c in world.closings:
        if len(c.outcome.verdicts) and len(lives[c.exchange, c.agent]) > 1:
            uneven.add(c.exchange)
        for j in c.outcome.contents:
            counts["uses"] += 1
            identity = c.outcome.contents[j][0]
            assert identity[0] == j
            theirs = of.get((c.exchange, j, identity[1]))
            verdicts = theirs.outcome.verdicts if theirs else left.get((c.exchange, j, identity[1]), {})
            if theirs is not None and c.agent in theirs.outcome.contents:
                back = theirs.outcome.contents[c.agent][0]
                if back[1] == c.life:
                    assert identity == theirs.own, "the message that was used is not what its sender mixed with"
                    assert back == c.own, "the message that was used is not what its sender mixed with"
                    continue
            counts["one-sided"] += 1
            uneven.add(c.exchange)
            crashed = identity[1] < world.nodes[j].life or c.life < world.nodes[c.agent].life
            verdict = verdicts.get(c.agent)
            assert verdict is Verdict.CUT_OFF or crashed, (c.exchange, c.agent, j, verdict, world.faults)
    if world.faults["breaks"] == 0:
        assert counts["one-sided"] == 0
    by_exchange = defaultdict(dict)
    for c in world.closings:
        by_exchange[c.exchange][c.agent] = c
    for exchange, closings in by_exchange.items():
        agents = sorted(closings)
        matrix = np.array([[closings[i].row.get(j, 0.0) for j in agents] for i in agents])
        assert (matrix >= 0).all()
        if exchange not in uneven:
            np.testing.assert_allclose(matrix.sum(0), 1, atol=1e-12)
            np.testing.assert_allclose(matrix.sum(1), 1, atol=1e-12)
            np.testing.assert_array_equal(matrix, matrix.T)
            counts["whole matrices"] += 1
    return counts


def accounts_agree(world: World, calm: bool) -> None:
    """c is the sum of the accounts of the edges; where records agree, accounts do; after calm sum_i c_i is 0.

    calm: whether the run has ended with exchanges that all edges took part in.
    """
    for n in world.nodes:
        np.testing.assert_allclose(n.c, sum(n.f.values()), atol=1e-9)
    for i, j in map(sorted, world.pairs):
        a, b = world.nodes[i], world.nodes[j]
        same = a.peer.edges[j].saved.record == b.peer.edges[i].saved.record
        if same:
            assert a.f[j] == -b.f[i], "equal records hide accounts that differ"
        assert same or not calm, f"records of edge {i}-{j} differ after calm"
    if calm:
        assert abs(sum(n.c for n in world.nodes)) < 1e-9
