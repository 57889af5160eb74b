"""Examples that are held out for validation: whose they are, that nobody trains on them, and what they score."""

import dataclasses
import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from decaf_lora import UserError, partition
from decaf_lora.config import RunConfig
from decaf_lora.runs.build import build_run
from decaf_lora.tasks.held_out import hold_out
from toy import Sealed, Toy

TASK = Toy()


@settings(max_examples=50)
@given(
    st.lists(st.integers(1, 40), min_size=1, max_size=3),
    st.floats(0.01, 0.99),
    st.integers(0, 10),
)
def test_every_agent_gives_a_share_of_its_own(sizes, share, seed):
    ends = np.cumsum([0, *sizes])
    split = partition.Partition(tuple(np.arange(a, b) for a, b in itertools.pairwise(ends)), TASK.labels)
    if max(sizes) == 1:
        with pytest.raises(UserError, match="single example"):
            hold_out(TASK, split, share, seed)
        return
    task, left = hold_out(TASK, split, share, seed)
    assert task.num_test == sum(map(len, left.tests))
    given_ = [task._examples[own] for own in left.tests]
    for before, kept, gave in zip(split.shards, left.shards, given_, strict=True):
        assert sorted([*kept, *gave]) == before.tolist()
        assert len(kept) >= 1
        assert (len(gave) >= 1) == (len(before) > 1)
        assert abs(len(gave) - share * len(before)) <= 1
    again, same = hold_out(TASK, split, share, seed)
    assert again._examples.tolist() == task._examples.tolist()
    assert [s.tolist() for s in same.shards] == [s.tolist() for s in left.shards]


def test_the_share_keeps_the_classes_of_each_agent():
    labels = np.repeat(np.arange(4), 20)
    task = Toy()
    task.labels = labels
    split = partition.iid(labels, 2, seed=0)  # 10 of each class an agent
    _, left = hold_out(task, split, 0.2, 0)
    assert left.label_table().tolist() == [[8] * 4] * 2


def test_agents_draw_by_themselves_and_by_seed():
    split = partition.iid(TASK.labels, 2, seed=0)
    other = dataclasses.replace(split, shards=(split.shards[0], split.shards[1][:10]))
    one, two = (hold_out(TASK, s, 0.2, 0)[1] for s in (split, other))
    assert one.shards[0].tolist() == two.shards[0].tolist()
    assert hold_out(TASK, split, 0.2, 1)[1].shards[0].tolist() != one.shards[0].tolist()


def test_a_run_scores_on_what_it_holds_out():
    """Against the model's own forward on these examples; the test set is never asked."""
    from decaf_lora.runs import build

    config = RunConfig.model_validate(
        {
            "agents": 3,
            "partition": "iid",
            "rounds": 2,
            "evaluate_every": 1,
            "validation_share": 0.25,
            "training": {"steps": 2, "batch_size": 4, "agents_per_pass": 3},
        }
    )
    task = Sealed()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(build, "_task", lambda config, device: task)
        run = build_run(config)
    with run:
        rows = run.task._examples
        assert run.task.score_name == "held-out accuracy"
        assert len(rows) == 30
        assert not set(rows) & set(run.partition.examples)
        *_, last = run.train()
        for agent in range(3):
            with run.attached.bind(run.adapter.select([agent])), torch.no_grad():
                right = task.model(task.x[rows]).argmax(1) == task.y[rows]
            assert last.scores[agent] == pytest.approx(right.float().mean().item())


def test_own_scores_are_of_the_agents_own_examples():
    config = RunConfig.model_validate(
        {
            "task": {"name": "digits"},
            "agents": 3,
            "partition": "dirichlet:0.3",
            "rounds": 1,
            "test": "both",
            "validation_share": 0.1,
            "training": {"steps": 1, "agents_per_pass": 3},
        }
    )
    with build_run(config) as run:
        *_, last = run.train()
        sizes = np.array([len(own) for own in run.partition.own_tests()])
        assert sizes.sum() == run.task.num_test
        for agent in range(3):  # all examples are those of the three, each once
            of_each = run.trainer.evaluate_own(run.adapter.select([agent] * 3), run.partition.tests).numpy()
            assert last.scores[agent] == pytest.approx(of_each @ sizes / sizes.sum())
            assert last.own_scores[agent] == pytest.approx(of_each[agent])


def test_scores_on_data_alike_are_of_held_out_examples_of_the_agents_classes():
    values = {"task": {"name": "digits"}, "agents": 3, "partition": "by-class", "rounds": 1, "test": "alike"}
    values |= {"validation_share": 0.1, "training": {"steps": 1, "agents_per_pass": 3}}
    with build_run(RunConfig.model_validate(values)) as run:
        *_, last = run.train()
        labels = run.task.labels[run.task._examples]
        for agent, shard in enumerate(run.partition.shards):
            # By class an agent holds all examples of its classes, so its own are the held-out ones of these classes.
            own = np.flatnonzero(np.isin(labels, np.unique(run.task.labels[shard])))
            chosen = run.partition.alike_tests(run.task.test_labels, 0)[agent]
            assert set(chosen) <= set(own)
            right = run.trainer.evaluate_own(run.adapter.select([agent]), [chosen])
            assert last.own_scores[agent] == pytest.approx(right.item())


def test_one_agent_of_a_mesh_cannot_hold_out_for_all():
    own = partition.Own(0, 3, np.arange(10), TASK.labels)
    with pytest.raises(UserError, match="own agent only"):
        hold_out(TASK, own, 0.2, 0)
