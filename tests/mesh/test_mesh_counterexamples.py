"""Histories in which earlier rules failed, found by the model checker: the letters are those of model/README.md."""

from __future__ import annotations

import pytest

from decaf_lora.engines.mesh.edge import Verdict
from decaf_lora.engines.mesh.frames import Data, Have, Hello
from decaf_lora.engines.mesh.link import dialler
from decaf_lora.engines.mesh.outcome import Phase
from mesh.bench import Bench

USED, DECLINED, CUT_OFF = Verdict.USED, Verdict.DECLINED, Verdict.CUT_OFF


def test_a_opening_an_exchange_closes_everything_below_it():
    bench = Bench([(0, 1), (1, 2), (2, 3)])
    for agent in (2, 3):
        bench.open(agent)
    bench.settle()
    bench.wait(10)  # 2 gives up 1, which has sent nothing, and closes exchange 1 with 3
    assert bench.take(2).verdicts == {1: Verdict.SILENT, 3: USED}
    bench.peers[1].open(1, b"early")
    bench.settle()
    bench.wait(10)  # 1 gives up 0 and takes its message to exchange 2, where 2 is
    assert bench.peers[1].exchange == 2
    bench.peers[0].open(1, b"late")
    bench.settle()
    late = bench.take(0)  # 1 has told 0 that exchange 1 is over, so 0 follows to exchange 2
    assert late.left == {1: {1: DECLINED}}
    assert (late.exchange, late.verdicts, late.contents) == (2, {1: USED}, {1: b"early"})
    bench.take(3)
    bench.open(2)
    bench.settle()
    assert bench.take(1).verdicts == {0: USED, 2: USED}


def test_b_a_message_of_an_earlier_life_is_not_used():
    bench = Bench([(0, 1)])
    bench.open(0)
    bench.open(1, b"first life")
    bench.deliver(1, 0)
    bench.crash(1)
    bench.start(1, again=True)
    bench.connect(0, 1)
    bench.settle()  # the second life answers 0's message before it has opened anything itself
    assert bench.peers[0].take() is None
    bench.open(1, b"second life")
    bench.settle()
    assert bench.take(0).contents == {1: b"second life"}
    assert bench.take(1).verdicts == {0: USED}


def test_c_a_message_that_an_earlier_life_sent_ahead_is_not_used():
    bench = Bench([(0, 1), (0, 2)])
    bench.open(0)
    bench.open(1)
    bench.settle()  # 0 waits for 2; 1 has closed exchange 1
    bench.take(1)
    bench.open(1, b"sent ahead")
    bench.settle()
    bench.crash(1)
    bench.start(1, again=True)
    bench.connect(0, 1)
    bench.settle()
    bench.round(1, 2)
    bench.take(0)
    assert bench.open(0) == 2
    bench.open(2)
    bench.settle()  # 1 has answered, but has not opened exchange 2 in this life
    assert bench.peers[0].take() is None
    bench.open(1, b"second life")
    bench.settle()
    assert bench.take(0).contents[1] == b"second life"


def one_sided(bench: Bench, user: int, other: int) -> None:
    """A round of all three in which `user` uses `other`, which loses the answer and gives up with the link down."""
    for agent in bench.peers:
        bench.open(agent)
    bench.deliver(user, other, Data)
    bench.deliver(other, user, Data, Have)
    bench.deliver(user, other, Hello)  # its answer is lost
    bench.break_(user, other)
    bench.settle()
    bench.wait(10)
    bench.settle()
    assert bench.take(user).verdicts[other] is USED
    assert bench.take(other).verdicts[user] is CUT_OFF
    bench.take(3 - user - other)
    bench.connect(user, other)
    bench.settle()


def test_d_opposite_one_sided_uses_empty_the_account_on_both_ends():
    bench = Bench([(0, 1), (1, 2), (0, 2)])
    one_sided(bench, 0, 1)
    one_sided(bench, 1, 0)
    outcomes = bench.round(0, 1, 2)
    assert outcomes[0].emptied == {1}
    assert outcomes[1].emptied == {0}
    assert outcomes[2].emptied == frozenset()
    assert outcomes[0].edges[1].record == outcomes[1].edges[0].record
    assert all(o.emptied == frozenset() for o in bench.round(0, 1, 2).values())


def test_e_records_are_compared_as_they_were_sent():
    bench = Bench([(0, 1), (1, 2)])
    bench.open(0)
    bench.open(1)
    bench.settle()
    assert bench.take(0).emptied == frozenset()
    bench.open(0)
    bench.settle()  # message 2 of 0, with the record after exchange 1, is at 1, which has exchange 1 open still
    bench.open(2)
    bench.settle()
    assert bench.take(1).emptied == frozenset()
    bench.take(2)
    outcomes = bench.round(1, 2) | {0: bench.take(0)}
    assert all(o.emptied == frozenset() for o in outcomes.values())


def test_f_a_new_next_is_told_before_the_others_hello_is_here():
    bench = Bench([(0, 1)], last=1)
    bench.round(0, 1)
    bench.break_(0, 1)
    bench.connect(0, 1)  # both hellos are under way, and say that the last exchange may still be closed
    bench.peers[0].finish()
    bench.peers[1].finish()
    bench.settle()
    assert [bench.peers[i].phase for i in (0, 1)] == [Phase.LEFT, Phase.LEFT]


def test_g_the_end_does_not_hang_on_one_frame():
    bench = Bench([(0, 1)], last=1)
    bench.round(0, 1)
    bench.peers[0].finish()
    bench.settle()
    bench.peers[1].finish()
    bench.break_(0, 1)  # what 1 said last is lost, and 1 has left
    assert [bench.peers[i].phase for i in (0, 1)] == [Phase.SERVING, Phase.LEFT]
    bench.wait(99)
    assert bench.peers[0].phase is Phase.SERVING
    bench.wait(2)
    assert bench.peers[0].phase is Phase.LEFT


def test_g_the_end_is_told_only_once_it_is_on_disk():
    bench = Bench([(0, 1)], last=1)
    bench.round(0, 1)
    bench.peers[0].finish()
    bench.settle()
    assert bench.peers[0].phase is Phase.SERVING  # 1 may still come back from before the end
    bench.crash(1)
    bench.start(1, closed=0, again=True)
    bench.connect(0, 1)
    bench.settle()
    assert bench.peers[1].plan().catch_up
    bench.peers[1].catch_up()
    bench.settle()
    assert bench.peers[1].caught_up.contents == {0: b"adapter of 0"}
    assert bench.peers[1].caught_up.exchange == 2
    bench.peers[1].finish()
    bench.settle()
    assert [bench.peers[i].phase for i in (0, 1)] == [Phase.LEFT, Phase.LEFT]


def test_h_who_is_late_comes_back_with_the_first_exchange_of_a_round():
    bench = Bench([(0, 1), (1, 2)], last=12, hops=2)
    bench.open(1)
    bench.open(2)
    bench.settle()
    bench.wait(10)  # 0 is left out
    bench.settle()
    assert bench.take(1).verdicts == {0: Verdict.SILENT, 2: USED}
    assert bench.peers[1].next == 2  # the second exchange of round 1
    plan = bench.peers[0].plan()
    assert (plan.exchange, plan.catch_up) == (3, False)
    # The same for a message that is open already: it was made for the first hop.
    bench.peers[0].open(1, b"first hop")
    bench.settle()
    assert bench.peers[0].exchange == 3


def test_i_frames_of_a_superseded_connection_are_dropped():
    bench = Bench([(0, 1), (1, 2), (0, 2)])
    bench.open(0)
    bench.open(1)
    bench.deliver(0, 1)
    late = list(bench.queues[1, 0])  # message and answer of 1
    assert {type(frame) for _, frame in late} == {Data, Have}
    bench.break_(0, 1)
    bench.open(2)
    bench.deliver(1, 2)
    bench.deliver(2, 1)
    bench.deliver(2, 0)
    bench.now += 10
    bench.peers[1].tick()
    assert bench.take(1).verdicts == {0: CUT_OFF, 2: USED}
    bench.deliver(0, 2, Hello, Data)
    bench.connect(0, 1)
    bench.deliver(1, 0)  # 1 says that exchange 1 is over
    for number, frame in late:
        bench.peers[0].on_frame(1, number, frame)
    bench.deliver(2, 0)
    assert bench.take(0).verdicts == {1: DECLINED, 2: USED}


def test_i_late_messages_of_an_earlier_life_are_dropped():
    bench = Bench([(0, 1)])
    bench.open(1, b"first life")
    late = list(bench.queues[1, 0])
    bench.crash(1)
    bench.start(1, again=True)
    bench.connect(0, 1)
    bench.settle()
    for number, frame in late:
        bench.peers[0].on_frame(1, number, frame)
    bench.open(0)
    bench.settle()
    assert bench.peers[0].take() is None
    bench.open(1, b"second life")
    bench.settle()
    assert bench.take(0).contents == {1: b"second life"}


@pytest.mark.parametrize("listens", [{"alice"}, {"bob"}, {"alice", "bob"}])
def test_j_one_end_of_an_edge_dials_and_it_can(listens):
    ends = {dialler("alice", "bob", frozenset(listens)), dialler("bob", "alice", frozenset(listens))}
    assert len(ends) == 1
    (dialled,) = {"alice", "bob"} - ends
    assert dialled in listens


def test_j_an_edge_of_which_no_end_can_be_dialled():
    with pytest.raises(ValueError, match="neither alice nor bob can be dialled"):
        dialler("bob", "alice", frozenset({"carol"}))


def test_k_patience_does_not_end_while_the_answer_is_certain():
    bench = Bench([(0, 1), (1, 2), (0, 2)])
    for agent in (0, 1, 2):
        bench.open(agent)
    bench.deliver(1, 0)
    held = [(n, frame) for n, frame in bench.queues[0, 1] if isinstance(frame, Have)]
    bench.deliver(0, 1, Data)  # the answer of 0 is on its way
    bench.settle()
    assert bench.take(0).verdicts[1] is USED
    bench.wait(50)
    assert bench.peers[1].exchange == 1
    for number, frame in held:
        bench.peers[1].on_frame(0, number, frame)
    assert bench.take(1).verdicts[0] is USED


def test_k_a_closed_that_comes_after_a_have_counts():
    bench = Bench([(0, 1), (1, 2), (0, 2)])
    bench.open(0)
    bench.open(1)
    bench.deliver(0, 1)
    bench.deliver(1, 0)  # 0 has message and answer of 1, and waits for 2; its own answer is lost
    bench.break_(0, 1)
    assert bench.peers[0].edges[1].usable
    bench.open(2)
    bench.deliver(2, 1)
    bench.deliver(1, 2)
    bench.deliver(2, 1)
    bench.deliver(2, 0)
    bench.now += 10
    bench.peers[1].tick()  # 1 gives up 0 with its message in hand
    assert bench.take(1).verdicts == {0: CUT_OFF, 2: USED}
    bench.deliver(0, 2, Hello, Data)
    bench.connect(0, 1)
    bench.deliver(1, 0)
    bench.deliver(0, 1)
    bench.deliver(1, 0)
    bench.settle()
    assert bench.take(0).verdicts == {1: DECLINED, 2: USED}
