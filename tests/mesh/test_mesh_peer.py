"""What one peer does, rule by rule: patience, falling behind, catching up, the end, bad input."""

from __future__ import annotations

import hashlib
import itertools
from dataclasses import replace

import pytest

from decaf_lora.engines.mesh.account import EMPTY, digest
from decaf_lora.engines.mesh.edge import Verdict
from decaf_lora.engines.mesh.frames import PART, At, Closed, Data, Get, Have, Hello, Last, split
from decaf_lora.engines.mesh.outcome import Limits, Phase
from mesh.bench import LIMITS, Bench

TRIANGLE = [(0, 1), (1, 2), (0, 2)]


def away(bench, *agents):
    """These agents open nothing in this round; the others do, and give them up."""
    present = [agent for agent in bench.peers if agent not in agents]
    for agent in present:
        bench.open(agent)
    bench.settle()
    bench.wait(bench.limits.patience)
    bench.settle()
    return {agent: bench.take(agent) for agent in present}


# Patience


@pytest.mark.parametrize("up", [True, False])
def test_a_dead_neighbour_costs_at_most_twice_the_patience(up):
    bench = Bench(TRIANGLE, last=20)
    if not up:
        bench.crash(2)
    started = bench.now
    for _ in range(12):
        bench.open(0), bench.open(1)
        bench.settle()
        while bench.peers[0].exchange or bench.peers[1].exchange:
            bench.wait(0.01)
            bench.settle()
        assert bench.take(0).verdicts == {1: Verdict.USED, 2: Verdict.SILENT}
        bench.take(1)
    waited = bench.now - started
    assert waited <= 2 * LIMITS.patience + 12 * 0.02
    assert waited > (0.9 * LIMITS.patience if up else LIMITS.down)


def test_patience_is_doubled_by_a_success_and_whole_after_a_reconnect():
    bench = Bench(TRIANGLE, last=20)
    away(bench, 2), away(bench, 2)
    assert bench.peers[0].edges[2].patience == LIMITS.patience / 4
    bench.peers[2].open(3, b"back")
    bench.round(0, 1)
    bench.take(2)
    assert bench.peers[0].edges[2].patience == LIMITS.patience / 2
    bench.break_(0, 2)
    bench.connect(0, 2)
    bench.settle()
    assert bench.peers[0].edges[2].patience == LIMITS.patience


def test_every_new_part_is_progress_and_a_repeated_one_is_not():
    bench = Bench(TRIANGLE)
    payload = b"x" * (3 * PART + 1)
    bench.open(0), bench.open(1)
    bench.peers[2].open(1, payload)
    parts = [item for item in bench.queues[2, 0] if isinstance(item[1], Data)]
    assert [frame.part for _, frame in parts] == [0, 1, 2, 3]
    bench.queues[2, 0].clear()
    for number, frame in parts[:3]:
        bench.wait(LIMITS.patience - 1)
        bench.peers[0].on_frame(2, number, frame)
        bench.peers[0].on_frame(2, number, frame)
    assert bench.peers[0].exchange == 1
    bench.wait(LIMITS.patience / 2)
    bench.peers[0].on_frame(2, *parts[1])
    bench.wait(LIMITS.patience / 2)
    bench.deliver(1, 0), bench.deliver(0, 1), bench.deliver(1, 0)
    assert bench.take(0).verdicts == {1: Verdict.USED, 2: Verdict.SILENT}


def test_a_message_of_many_parts_arrives_whole_also_over_two_connections():
    bench = Bench([(0, 1)])
    payload = bytes(range(256)) * (PART // 256) * 2 + b"end"
    bench.peers[0].open(1, payload)
    number, frame = bench.queues[0, 1].popleft()
    bench.peers[1].on_frame(0, number, frame)
    bench.break_(0, 1)
    bench.connect(0, 1)
    bench.open(1)
    bench.settle()
    assert bench.take(1).contents == {0: payload}


@pytest.mark.parametrize("length", [0, 1, PART - 1, PART, PART + 1])
def test_parts_of_a_payload(length):
    parts = list(split(b"x" * length))
    assert b"".join(parts) == b"x" * length
    assert all(len(part) <= PART for part in parts)
    assert len(parts) == max(1, -(-length // PART))


def test_a_neighbour_that_sends_its_message_and_never_answers_is_cut_off():
    """It is up, so its answer would be certain: but the round goes on without it, also if it comes back at once."""
    bench = Bench(TRIANGLE)
    bench.processes[2].send = lambda peer, frame: None  # all that it says from here on is what the script says
    bench.open(0), bench.open(1)
    for agent in (0, 1):
        name = digest(1, 201, EMPTY, hashlib.sha256(b"liar").digest())
        bench.peers[agent].on_frame(2, 0, Data(1, 1, 0, 1, name, EMPTY, b"liar"))
    bench.settle()
    bench.wait(LIMITS.answer * LIMITS.patience - 1)
    assert bench.peers[0].exchange == 1
    bench.wait(1)
    assert bench.processes[0].cut == [(2, "it does not answer")]
    bench.connect(0, 2)
    assert bench.processes[0].cut[1:] == [(2, "it has not answered")]
    bench.wait(LIMITS.patience)
    assert bench.take(0).verdicts == {1: Verdict.USED, 2: Verdict.CUT_OFF}
    bench.connect(0, 2)
    assert bench.peers[0].edges[2].connection is not None


def test_a_neighbour_that_hung_is_heard_again_also_by_one_who_has_nobody_else():
    bench = Bench([(0, 1)])
    bench.open(0), bench.open(1)
    bench.deliver(1, 0)
    bench.now += LIMITS.answer * LIMITS.patience
    bench.peers[0].tick()
    assert bench.processes[0].cut == [(1, "it does not answer")]
    bench.break_(0, 1)
    bench.connect(0, 1)
    assert bench.processes[0].cut[1:] == [(1, "it has not answered")]
    bench.break_(0, 1)
    bench.wait(LIMITS.patience)
    assert bench.peers[0].exchange == 1
    bench.connect(0, 1)
    bench.settle()
    assert bench.take(0).verdicts == {1: Verdict.USED}


def test_what_becomes_due_before_it_is_asked_for_is_still_due():
    """A clock goes on between a look at the state and the question when to look again."""
    bench = Bench(TRIANGLE)
    bench.open(0)
    due = bench.peers[0].deadline()
    assert due == LIMITS.patience
    bench.now = due + 1
    assert bench.peers[0].deadline() == due
    bench.peers[0].tick()
    assert bench.peers[0].deadline() > bench.now


# Falling behind


def test_behind_by_one_while_another_is_too_does_the_round_and_those_ahead_wait():
    bench = Bench([(0, 1), (1, 2), (2, 3), (0, 2)], last=20)
    for agent in (2, 3):
        bench.open(agent)
    bench.settle()
    bench.wait(LIMITS.patience)
    bench.settle()
    assert bench.take(2).contents.keys() == {3}
    assert bench.open(0) == 1  # 1 is as far back
    assert bench.open(1) == 1
    bench.settle()
    assert bench.take(0).contents.keys() == {1}


def test_behind_by_one_alone_jumps_to_the_others():
    bench = Bench(TRIANGLE, last=20)
    away(bench, 2)
    assert bench.open(2) == 2
    assert bench.peers[2].next == 2


def test_behind_by_two_jumps_and_by_three_catches_up():
    bench = Bench(TRIANGLE, last=20)
    away(bench, 2), away(bench, 2)
    assert bench.peers[2].plan().exchange == 3
    assert not bench.peers[2].plan().catch_up
    away(bench, 2)
    assert bench.peers[2].plan().catch_up
    bench.peers[2].catch_up()
    bench.settle()
    assert bench.peers[2].caught_up.exchange == 4
    assert bench.peers[2].caught_up.contents == {0: b"adapter of 0", 1: b"adapter of 1"}
    outcomes = bench.round(0, 1, 2)
    assert all(len(outcome.contents) == 2 for outcome in outcomes.values())
    assert outcomes[2].emptied == frozenset()


def test_who_finds_out_with_an_open_exchange_that_it_is_three_behind_leaves_it_and_catches_up():
    """An old message must not be mixed with new ones."""
    bench = Bench(TRIANGLE, last=20)
    bench.break_(0, 2), bench.break_(1, 2)
    bench.open(2)
    for _ in range(4):
        bench.open(0), bench.open(1)
        bench.settle()
        bench.wait(LIMITS.down)
        bench.settle()
        bench.take(0), bench.take(1)
    bench.connect(0, 2), bench.connect(1, 2)
    bench.settle()
    late = bench.take(2)
    assert (late.exchange, late.took_part, late.contents) == (1, False, {})
    plan = bench.peers[2].plan()
    assert (plan.exchange, plan.catch_up) == (5, True)
    bench.peers[2].catch_up()
    bench.settle()
    assert all(len(outcome.contents) == 2 for outcome in bench.round(0, 1, 2).values())


def test_who_catches_up_does_not_wait_for_ever_for_a_neighbour_that_sends_nothing():
    bench = Bench(TRIANGLE, last=20)
    for _ in range(3):
        away(bench, 2)
    bench.peers[2].catch_up()
    bench.deliver(2, 0)
    bench.queues[2, 1].clear()
    bench.settle()
    assert bench.peers[2].caught_up is None
    bench.wait(LIMITS.patience)
    assert bench.peers[2].caught_up.contents == {0: b"adapter of 0"}


def test_who_catches_up_while_all_links_break_asks_again():
    bench = Bench([(0, 1), (1, 2)], last=20)
    for _ in range(3):
        away(bench, 2)
    bench.peers[2].catch_up()
    bench.break_(1, 2)
    bench.wait(3 * LIMITS.patience)
    assert bench.peers[2].phase is Phase.CATCHING_UP
    bench.connect(1, 2)
    bench.settle()
    assert bench.peers[2].caught_up.contents == {1: b"adapter of 1"}


def test_after_three_misses_an_end_empties_its_account():
    bench = Bench(TRIANGLE, last=20)
    bench.round(0, 1, 2)
    assert bench.peers[0].edges[2].saved.record != EMPTY
    assert [away(bench, 2)[0].emptied for _ in range(4)] == [frozenset(), frozenset(), {2}, frozenset()]
    assert bench.peers[0].edges[2].saved.record == EMPTY


def test_an_agent_without_a_neighbour_in_an_exchange_does_not_wait():
    bench = Bench([(0, 1), (1, 2)], row=lambda i, e: frozenset({0, 1} - {i}) if i < 2 else frozenset())
    bench.open(2)
    assert bench.take(2).verdicts == {}


def test_who_has_lost_todays_partner_goes_on_to_those_who_wait_for_it():
    """Of a schedule: 0-1 and 2-3, then 0-2 and 1-3; 1 is gone."""
    pairs = [[(0, 1), (2, 3)], [(0, 2), (1, 3)]]
    bench = Bench(
        [*pairs[0], *pairs[1]],
        row=lambda i, e: frozenset(j for pair in pairs[(e - 1) % 2] if i in pair for j in pair if j != i),
    )
    bench.crash(1)
    bench.open(0), bench.open(2), bench.open(3)
    bench.settle()
    assert bench.take(2).contents.keys() == {3}
    bench.take(3)
    bench.wait(LIMITS.down)
    assert bench.take(0).verdicts == {1: Verdict.SILENT}
    bench.open(0), bench.open(2)
    bench.settle()
    assert bench.take(0).contents.keys() == {2}


# Restart


def test_a_restart_goes_on_with_the_records_of_its_checkpoint_if_nobody_is_ahead():
    bench = Bench([(0, 1)], last=20)
    bench.round(0, 1)
    checkpoint = bench.round(0, 1)[1]
    bench.open(0)
    bench.crash(1)
    bench.start(1, closed=2, saved=checkpoint.edges, again=True)
    assert bench.peers[1].plan() is None  # not before a neighbour is up
    bench.connect(0, 1)
    bench.settle()
    assert bench.open(1) == 3
    bench.settle()
    assert bench.take(0).emptied == frozenset()
    assert bench.take(1).emptied == frozenset()


def test_a_restart_from_an_older_checkpoint_catches_up_and_the_accounts_start_anew():
    bench = Bench([(0, 1), (0, 2)], last=20)
    checkpoint = bench.round(0, 1, 2)[1]
    bench.round(0, 1, 2)
    bench.crash(1)
    bench.start(1, closed=1, saved=checkpoint.edges, again=True)
    bench.connect(0, 1)
    bench.settle()
    plan = bench.peers[1].plan()
    assert (plan.exchange, plan.catch_up) == (3, True)
    bench.peers[1].catch_up()
    bench.settle()
    assert bench.peers[1].caught_up.exchange == 3
    outcomes = bench.round(0, 1, 2)
    assert outcomes[0].emptied == {1}
    assert outcomes[1].emptied == {0}
    assert outcomes[0].edges[1].record == outcomes[1].edges[0].record


def test_a_restart_says_what_it_had_used():
    bench = Bench(TRIANGLE)
    for agent in (0, 1, 2):
        bench.open(agent)
    bench.deliver(0, 1), bench.deliver(1, 0), bench.deliver(1, 2), bench.deliver(2, 1)
    bench.deliver(1, 0, Data), bench.deliver(0, 1), bench.deliver(1, 2), bench.deliver(2, 1)
    checkpoint = bench.take(1)
    assert checkpoint.contents.keys() == {0, 2}
    bench.crash(1)
    bench.start(1, closed=1, saved=checkpoint.edges, again=True)
    bench.connect(0, 1)
    sent = bench.peers[0].edges[1].sent
    bench.deliver(1, 0), bench.deliver(0, 1)
    assert Have(2, 1, sent) in [frame for _, frame in bench.queues[1, 0]]


# The end


def test_a_finished_agent_serves_until_its_neighbours_are_done():
    bench = Bench(TRIANGLE, last=1)
    bench.open(0), bench.open(1)
    bench.settle()
    bench.wait(LIMITS.patience)
    for agent in (0, 1):
        bench.take(agent)
        bench.peers[agent].finish()
    bench.settle()
    bench.wait(10 * LIMITS.linger)
    assert [bench.peers[i].phase for i in (0, 1)] == [Phase.SERVING, Phase.SERVING]  # 2 is up
    assert bench.peers[2].plan().catch_up
    bench.peers[2].catch_up()
    bench.settle()
    assert bench.peers[2].caught_up.exchange == 2
    assert bench.peers[2].caught_up.contents.keys() == {0, 1}
    bench.peers[2].finish()
    bench.settle()
    assert {peer.phase for peer in bench.peers.values()} == {Phase.LEFT}


def test_a_finished_agent_that_starts_again_serves():
    bench = Bench(TRIANGLE, last=1)
    bench.crash(0)
    assert bench.start(0, closed=1, again=True).phase is Phase.SERVING
    bench.connect(0, 1)
    bench.settle()
    bench.peers[1].catch_up()
    bench.settle()
    assert bench.peers[1].caught_up.contents == {0: b"adapter of 0"}


def test_an_open_exchange_ends_with_those_that_are_done():
    bench = Bench(TRIANGLE, last=1)
    bench.open(0), bench.open(1)
    bench.settle()
    bench.wait(LIMITS.patience)
    bench.peers[2].open(1, b"too late")
    for agent in (0, 1):
        bench.take(agent)
        bench.peers[agent].finish()
    bench.settle()
    late = bench.take(2)
    assert (late.exchange, late.contents) == (1, {})
    assert late.left == {1: {0: Verdict.DECLINED, 1: Verdict.DECLINED}}
    assert bench.peers[2].phase is Phase.CLOSED_ALL


def test_giving_up_while_neighbours_are_up_but_do_not_answer():
    bench = Bench([(0, 1), (0, 2)])
    bench.open(0)
    bench.settle()
    bench.wait(LIMITS.give_up - 1)
    assert bench.peers[0].failure is None
    bench.wait(2)
    assert bench.peers[0].phase is Phase.GAVE_UP
    assert (bench.peers[0].failure.alone, bench.peers[0].failure.missing) == (False, [1, 2])


@pytest.mark.parametrize("again", [False, True])
def test_an_agent_that_is_alone_says_so(again):
    bench = Bench([(0, 1), (0, 2)])
    bench.crash(0)
    bench.start(0, again=again)
    if not again:
        bench.peers[0].open(1, b"")
    bench.wait(LIMITS.linger - 1)
    assert bench.peers[0].failure is None
    bench.wait(2)
    assert (bench.peers[0].failure.alone, bench.peers[0].failure.missing) == (True, [1, 2])


@pytest.mark.parametrize("up", [True, False])
def test_an_agent_that_stood_still_gives_its_neighbours_time_to_be_heard_again(up):
    """SIGSTOP for longer than it would wait: it does not take its own silence for theirs."""
    bench = Bench([(0, 1), (0, 2)])
    bench.open(0)
    bench.settle()
    if not up:
        bench.break_(0, 1), bench.break_(0, 2)
    bench.now += 2 * LIMITS.give_up
    bench.peers[0].tick()
    assert bench.peers[0].failure is None
    bench.wait(LIMITS.patience - 1)
    assert bench.peers[0].failure is None
    if not up:
        bench.connect(0, 1)
    bench.open(1)
    bench.settle()
    assert bench.take(0).verdicts[1] is Verdict.USED
    bench.open(0)
    bench.break_(0, 1), bench.wait(LIMITS.give_up + 1)
    assert bench.peers[0].phase is Phase.GAVE_UP


# Bad input


def bad_rounds(bench, rounds):
    for _ in range(rounds):
        bench.open(0), bench.open(1)
        bench.processes[0].bad = {b"bad"}
        bench.peers[2].open(bench.peers[2].next, b"bad")
        bench.settle()
        for agent in (0, 1, 2):
            yield bench.peers[agent].take()


def test_a_bad_message_is_refused_counted_and_not_used_by_either_end():
    bench = Bench(TRIANGLE)
    zero, one, two = bad_rounds(bench, 1)
    assert zero.verdicts == {1: Verdict.USED, 2: Verdict.DECLINED}
    assert two.verdicts == {0: Verdict.DECLINED, 1: Verdict.USED}
    assert one.contents.keys() == {0, 2}
    assert list(bench.peers[0].rejections) == [(2, "not finite")]
    assert bench.processes[0].cut == []


def test_after_three_bad_messages_in_a_row_the_connection_is_closed():
    bench = Bench(TRIANGLE)
    list(bad_rounds(bench, 2))
    bench.open(2, b"sound"), bench.round(0, 1), bench.take(2)
    list(bad_rounds(bench, 2))
    assert bench.processes[0].cut == []
    bench.open(2, b"bad"), bench.open(0), bench.open(1)
    bench.deliver(2, 0)
    assert bench.processes[0].cut == [(2, "not finite")]
    assert not bench.peers[0].edges[2].heard


def test_a_message_that_is_not_what_its_name_says():
    bench = Bench(TRIANGLE)
    bench.open(2)
    number, frame = bench.queues[2, 0].popleft()
    bench.open(0)
    bench.peers[0].on_frame(2, number, replace(frame, payload=b"altered"))
    assert Closed(1, 1, frame.digest) in [sent for _, sent in bench.queues[0, 2]]
    assert bench.peers[0].edges[2].message is None


def test_a_replayed_message_is_answered_and_changes_nothing():
    bench = Bench(TRIANGLE)
    bench.open(2)
    number, frame = next(item for item in bench.queues[2, 0] if isinstance(item[1], Data))
    bench.round(0, 1)
    bench.take(2)
    bench.peers[0].on_frame(2, number, frame)
    forged = replace(frame, payload=b"other", digest=bytes(32))
    bench.peers[0].on_frame(2, number, forged)
    answers = [sent for _, sent in bench.queues[0, 2]]
    assert answers == [Have(2, 1, frame.digest), Closed(2, 1, bytes(32))]
    assert bench.peers[0].edges[2].newest is None


NAME = hashlib.sha256(b"").digest()


@pytest.mark.parametrize(
    ("frame", "says"),
    [
        (At(0), "next is 0, not 1 to 9"),
        (At(10), "next is 10, not 1 to 9"),
        (Have(1, 9, NAME), "exchange is 9, not 1 to 8"),
        (Closed(1, 0, NAME), "exchange is 0, not 1 to 8"),
        (Have(1, 1, b"short"), "digest has 5 bytes, not 32"),
        (Data(1, 1, 0, 1, NAME, b"", b""), "record has 0 bytes, not 32"),
        (Data(1, 1, 1, 1, NAME, EMPTY, b""), "part 1 of 1 parts, of which there may be 4"),
        (Data(1, 1, 0, 5, NAME, EMPTY, b""), "part 0 of 5 parts, of which there may be 4"),
        (Data(1, 1, 1, 2, NAME, EMPTY, b""), "part 1 of 2 where 0 of 2 are here"),
        (Data(1, 1, 0, 2, NAME, EMPTY, b"x" * (PART + 1)), f"a part of {PART + 1} bytes, more than {PART}"),
        (Last(1, 0, 0, NAME, b""), "part 0 of 0 parts, of which there may be 4"),
        (Hello(1, 1 << 64), "life is not a number of 64 bits"),
    ],
)
def test_an_impossible_frame_closes_the_connection(frame, says):
    bench = Bench(TRIANGLE, limits=Limits(most_parts=4))
    bench.peers[0].on_frame(1, 0, frame)
    assert bench.processes[0].cut == [(1, says)]
    bench.peers[0].on_frame(1, 0, At(3))  # nothing more is read from it
    assert bench.peers[0].edges[1].next == 1


def test_nothing_is_read_before_the_hello():
    bench = Bench(TRIANGLE)
    bench.connect(0, 1)
    number = bench.numbers[frozenset((0, 1))]
    bench.peers[0].on_frame(1, number, At(3))
    assert bench.processes[0].cut == [(1, "the first frame is no hello")]


def test_a_second_hello_is_not_read():
    bench = Bench(TRIANGLE)
    away(bench, 2)
    bench.peers[2].on_frame(0, 0, Hello(1, 77))
    assert bench.peers[2].edges[0].next == 2


def test_neighbours_whose_facts_differ_do_not_talk():
    bench = Bench(TRIANGLE)
    bench.processes[0].facts = b"other"
    bench.connect(0, 1)
    bench.settle()
    assert bench.processes[0].cut == [(1, "facts differ")]
    assert list(bench.peers[0].rejections) == [(1, "facts differ")]
    bench.open(0)
    assert [type(frame) for _, frame in bench.queues[0, 1]] == []


def test_an_adapter_is_sent_once_for_each_exchange_however_often_it_is_asked_for():
    bench = Bench([(0, 1)])
    for _ in range(5):
        bench.peers[0].on_frame(1, 0, Get(1))
    assert len(bench.queues[0, 1]) == 1


def test_an_adapter_that_was_not_asked_for_is_dropped():
    bench = Bench([(0, 1)])
    bench.peers[0].on_frame(1, 0, Last(1, 0, 1, NAME, b""))
    assert bench.peers[0].edges[1].adapter is None


def test_the_name_of_a_message_depends_on_all_of_it():
    kinds = itertools.product((1, 2), (1, 2), (EMPTY, NAME), (EMPTY, NAME))
    assert len({digest(*kind) for kind in kinds}) == 16
