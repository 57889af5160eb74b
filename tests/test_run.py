"""The round loop: records, bytes, orders, resume bit for bit at every point, and the methods' order of merit."""

import contextlib
import copy
import dataclasses
import functools
import gc

import numpy as np
import pytest
import torch
from peft import PeftModel

from decaf_lora import algorithms, calibration, consensus, graphs, partition
from decaf_lora.config import TrainingConfig
from decaf_lora.engines import Pending, Simulate
from decaf_lora.errors import UserError
from decaf_lora.run import Run
from decaf_lora.runs import checkpoint
from toy import Toy, TwoLayers

CONFIG = TrainingConfig(steps=3, batch_size=5, learning_rate=0.02, agents_per_pass=2)


def make_run(algorithm="decaf", n=4, rounds=4, graph=None, task=None, training=CONFIG, **options):
    task = task or Toy(extras=True)
    names = {k: options.pop(k) for k in ("gauge", "order", "moments", "reference") if k in options}
    shards = partition.dirichlet(task.labels, n, alpha=0.5, seed=1)
    return Run(
        task,
        algorithms.make(algorithm, **names),
        graph or graphs.ring(n),
        shards,
        training,
        rounds=rounds,
        evaluate_every=2,
        **options,
    )


def same(a, b):
    assert a.tensors().keys() == b.tensors().keys()
    for key, tensor in a.tensors().items():
        assert torch.equal(tensor, b.tensors()[key]), key


@pytest.mark.parametrize("algorithm", list(algorithms.KINDS))
@pytest.mark.parametrize("n", [2, 3])
def test_every_algorithm_runs_and_records(algorithm, n):
    run = make_run(algorithm, n)
    records = list(run.train())
    assert [r.round for r in records] == [0, 1, 2, 3, 4]
    agents = 1 if algorithm == "centralized" else n
    assert [len(r.scores) if r.scores else 0 for r in records] == [agents, 0, agents, 0, agents]
    assert all(len(r.losses) == agents and np.isfinite(r.losses).all() for r in records[1:])
    assert records[0].losses is None
    assert records[-1].averaged_score is not None


def test_one_agent_trains_alone_and_talking_needs_two():
    run = make_run("local", 1)
    assert [r.consensus_distance for r in run.train()] == [0.0] * 5
    for algorithm in ("dlora", "decaf", "dlora_fa", "fedavg"):
        with pytest.raises(UserError, match=f"agents: {algorithm} needs at least 2 agents"):
            make_run(algorithm, 1)


def test_a_graph_of_another_size_is_refused():
    with pytest.raises(UserError, match="joins 5 agents but the partition has 4 shards"):
        make_run("dlora", 4, graph=graphs.ring(5))


def test_bytes_are_what_the_messages_hold():
    adapter_bytes = {}
    for algorithm in algorithms.KINDS:
        run = make_run(algorithm, 4)
        *_, last = run.train()
        adapter_bytes[algorithm] = last.bytes_sent
    a = 4 * (2 * 12 + 2 * 10)  # two layers, rank 2, float32
    b = 4 * (10 * 2 + 10 * 2)
    head = 4 * (4 * 10 + 4)
    assert adapter_bytes["dlora"] == adapter_bytes["decaf"] == 2 * (a + b + head)  # two neighbours
    assert adapter_bytes["dlora_fa"] == 2 * (b + head)
    assert adapter_bytes["fedavg"] == a + b + head  # once, to the server
    assert adapter_bytes["local"] == adapter_bytes["centralized"] == 0
    assert adapter_bytes["alternating"] == adapter_bytes["fedsa"] == 2 * (a + head)  # of round 4, A's turn
    assert adapter_bytes["core"] == 2 * (4 * 2 * 2**2 + head)
    assert adapter_bytes["decaf_tracked"] == 2 * adapter_bytes["decaf"]
    assert adapter_bytes["scaffold"] == 2 * adapter_bytes["fedavg"]
    for same in ("fedprox", "fedadam", "flexlora"):
        assert adapter_bytes[same] == adapter_bytes["fedavg"]


def test_the_recorded_learning_rate_is_that_of_the_rounds_first_step():
    training = CONFIG.model_copy(update={"optimizer": "sgd", "momentum": 0.0, "weight_decay": 0.0})
    training = training.model_copy(update={"schedule": "linear", "learning_rate": 0.4, "final_learning_rate": 0.1})
    run = make_run("local", rounds=3, training=training)
    rates = [record.learning_rate for record in run.train()]
    assert rates == pytest.approx([0.4, 0.4, 0.3, 0.2])  # round 0 is the start; the rates of steps 0, 3 and 6 of 9
    warm = make_run("local", rounds=4, training=training.model_copy(update={"warmup": 0.5}))
    assert [record.learning_rate for record in warm.train()] == pytest.approx([0, 0, 0.2, 0.4, 0.25])


@pytest.mark.parametrize("algorithm", list(algorithms.KINDS))
@pytest.mark.parametrize("stop", ["after a round", "within a round", "between start and round 1"])
def test_resumed_equals_uninterrupted_bit_for_bit(algorithm, stop, tmp_path):
    options = {"moments": "transport"} if algorithm == "decaf" else {}
    lora = dataclasses.replace(Toy(extras=True).default_lora(), lora_dropout=0.3)
    training = CONFIG.model_copy(update={"epochs": 0.7, "clip_norm": 0.5})
    options |= {"lora": lora, "training": training}
    whole = make_run(algorithm, **options)
    expected = list(whole.train())

    first = make_run(algorithm, **options)
    if stop == "within a round":
        first.on_step = lambda round_, done, steps, losses: first.stop() if (round_, done) == (3, 1) else None
        got = list(first.train())
        assert first.step_in_round == 1
    else:
        until = 2 if stop == "after a round" else 0
        got = []
        for record in first.train():
            got.append(record)
            if record.round == until:
                break
    checkpoint.save(tmp_path, *first.snapshot())

    second = make_run(algorithm, **options)
    second.restore(*checkpoint.load_latest(tmp_path))
    for record in second.train():
        if record.round > got[-1].round:
            got.append(record)
    same(whole.adapter, second.adapter)
    for ours, theirs in zip(got, expected, strict=True):
        assert dataclasses.replace(ours, seconds={}) == dataclasses.replace(theirs, seconds={})
    for group, moments in whole.trainer.moments.items():
        assert torch.equal(moments.first, second.trainer.moments[group].first)
        assert torch.equal(moments.second, second.trainer.moments[group].second)


@pytest.mark.parametrize("order", ["adapt-combine", "combine-adapt"])
@pytest.mark.parametrize("algorithm", ["dlora", "decaf", "dlora_fa"])
def test_orders_are_the_same_steps_shifted(algorithm, order, tmp_path):
    run = make_run(algorithm, order=order, rounds=3)
    records = list(run.train())
    assert all(r.bytes_sent > 0 for r in records[1:])
    if order == "combine-adapt":  # agents have drifted since the last mixing
        mixed = list(make_run(algorithm, order="adapt-combine", rounds=3).train())
        assert records[-1].consensus_distance > mixed[-1].consensus_distance
        first = make_run(algorithm, order=order, rounds=3)
        first.on_step = lambda round_, done, steps, losses: first.stop() if (round_, done) == (2, 2) else None
        list(first.train())
        checkpoint.save(tmp_path, *first.snapshot())
        second = make_run(algorithm, order=order, rounds=3)
        second.restore(*checkpoint.load_latest(tmp_path))
        *_, last = second.train()
        same(run.adapter, second.adapter)
        assert last.interference == records[-1].interference


class Logged(Simulate):
    """An engine that writes down what it is asked for."""

    def __init__(self, num_agents, events):
        super().__init__(num_agents)
        self.events = events

    def start(self, message, graph, exchange, sizes=None):
        return self.logged(f"exchange {exchange}", super().start(message, graph, exchange, sizes))

    def collect(self, tensors):
        return self.logged("collection", super().collect(tensors))

    def logged(self, what, pending):
        def wait():
            self.events.append(f"{what} arrives")
            return pending.wait()

        self.events.append(f"{what} starts")
        return Pending(wait)


class LoggedToy(Toy):
    """The same of a task."""

    def __init__(self, events):
        super().__init__()
        self.events = events

    def losses(self, batch, agents):
        if self.events[-1:] != ["steps"]:
            self.events.append("steps")
        return super().losses(batch, agents)

    def statistics(self, batch, agents):
        self.events.append(f"evaluates {agents}")
        return super().statistics(batch, agents)


def events_of(order, **options):
    events = []
    engine = functools.partial(Logged, events=events)
    training = CONFIG.model_copy(update={"agents_per_pass": 4})
    options |= {"order": order, "engine": engine, "training": training, "common_start": False}
    run = make_run("dlora", rounds=3, task=LoggedToy(events), **options)
    events.clear()  # what preparing the run has asked of the task
    list(run.train())
    return events


def test_exchange_and_collection_are_under_way_while_agents_are_evaluated():
    survey = ["collection starts", "evaluates 4", "collection arrives", "evaluates 1"]
    assert events_of("adapt-combine") == [
        *survey,
        *("steps", "exchange 0 starts", "exchange 0 arrives", "collection starts", "collection arrives"),
        *("steps", "exchange 1 starts", "exchange 1 arrives", *survey),
        *("steps", "exchange 2 starts", "exchange 2 arrives", *survey),
    ]
    assert events_of("combine-adapt", measure_every=3) == [
        *("exchange 0 starts", *survey, "exchange 0 arrives", "steps"),
        *("exchange 1 starts", "exchange 1 arrives", "steps"),
        *("exchange 2 starts", *survey, "exchange 2 arrives", "steps"),
        *survey,
    ]


@pytest.mark.parametrize("order", ["adapt-combine", "combine-adapt"])
@pytest.mark.parametrize("every", [2, 3, 9])
def test_measures_are_taken_in_their_rounds_and_change_nothing_else(order, every):
    always, seldom = (
        make_run("decaf", order=order, rounds=5),
        make_run("decaf", order=order, rounds=5, measure_every=every),
    )
    for whole, record in zip(always.train(), seldom.train(), strict=True):
        due = record.round % every == 0 or record.round == 5
        gone = {} if due else {"consensus_distance": None, "interference": None, "tail": None}
        assert dataclasses.replace(record, seconds={}) == dataclasses.replace(whole, seconds={}, **gone)
    same(always.adapter, seldom.adapter)


def test_a_run_that_goes_back_gives_up_the_exchange_under_way():
    run, whole = (make_run("decaf", order="combine-adapt") for _ in range(2))
    list(whole.train())
    for record in run.train():
        if record.round == 1:
            saved = copy.deepcopy(run.snapshot())
        if record.round == 2:
            break
    assert run._ahead is not None
    run.restore(*saved)
    list(run.train())
    same(run.adapter, whole.adapter)


@pytest.mark.parametrize("order", ["adapt-combine", "combine-adapt"])
@pytest.mark.parametrize("stop", [(2, 1), (2, 3)])
def test_a_run_that_was_stopped_goes_on_where_it_stopped(order, stop):
    whole, run = (make_run("decaf", order=order) for _ in range(2))
    expected = list(whole.train())
    run.on_step = lambda round_, done, steps, losses: run.stop() if (round_, done) == stop else None
    before = list(run.train())
    assert before[-1].round == (1 if stop == (2, 1) else 2)
    run.on_step = None
    after = list(run.train())
    assert [dataclasses.replace(r, seconds={}) for r in (*before, *after)] == [
        dataclasses.replace(r, seconds={}) for r in expected
    ]
    same(run.adapter, whole.adapter)
    assert list(run.train()) == []


def test_stopped_before_it_begins_a_run_has_the_first_record_alone():
    run = make_run()
    run.stop()
    assert [r.round for r in run.train()] == [0]
    assert [r.round for r in run.train()][-1] == 4


def test_a_loop_that_is_left_after_stop_is_gone_on_with():
    whole, run = make_run(), make_run()
    for record in run.train():
        if record.round == 2:
            run.stop()
            break
    assert [r.round for r in run.train()] == [3, 4]
    list(whole.train())
    same(run.adapter, whole.adapter)


def test_at_the_end_of_a_with_block_the_model_is_free_for_another_run():
    task = Toy(extras=True)
    plain = type(task.model.first)

    def fails():
        with make_run(task=task) as run:
            assert type(task.model.first) is not plain
            next(run.train())
            raise RuntimeError("mine")

    with pytest.raises(RuntimeError, match="mine"):
        fails()
    assert type(task.model.first) is plain
    with make_run(task=task) as run:
        assert [r.round for r in run.train()] == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("order", ["adapt-combine", "combine-adapt"])
def test_phases_of_ones_own_take_the_place_of_the_timer(order):
    inside, seen = [], []

    @contextlib.contextmanager
    def phase(name):
        assert not inside, "phases do not nest"
        inside.append(name)
        yield
        seen.append(inside.pop())

    run = make_run(order=order, rounds=1, phases=phase)
    records = list(run.train())
    assert [r.seconds for r in records] == [{}, {}]
    survey = ["evaluate", "measure", "evaluate"]
    if order == "adapt-combine":
        assert seen == [*survey, "train", "exchange", "exchange", "combine", "combine", "measure", *survey]
    else:
        assert seen == ["exchange", *survey, "exchange", "combine", "combine", "measure", "train", *survey]
    timed = list(make_run(order=order, rounds=1).train())
    assert set(timed[-1].seconds) == set(seen)
    assert all(seconds >= 0 for seconds in timed[-1].seconds.values())


def test_fedavg_equals_dlora_on_a_complete_graph_with_equal_sizes():
    task = Toy()
    shards = partition.Partition(tuple(np.arange(i * 30, (i + 1) * 30) for i in range(4)), task.labels)
    runs = [
        Run(Toy(), algorithms.make(name), graphs.complete(4), shards, CONFIG, rounds=3) for name in ("fedavg", "dlora")
    ]
    for run in runs:
        list(run.train())
    same(runs[0].adapter, runs[1].adapter)


@pytest.mark.parametrize("start", ["common", "independent"])
@pytest.mark.parametrize("n", [2, 3, 4])
def test_decaf_on_a_complete_graph_ends_in_one_product(n, start):
    """All agents hold the rank-r SVD of the float64 mean of the products that the last local steps left."""
    algorithm, before = algorithms.make("decaf"), []

    def combine(adapter, state, inbox, round_):
        before.append(adapter)
        return algorithm.rule.combine(adapter, state, inbox, round_)

    task = Toy(extras=True)
    shards = partition.dirichlet(task.labels, n, alpha=0.5, seed=1)
    run = Run(
        task,
        algorithms.chain(algorithm.rule._replace(combine=combine)),
        graphs.complete(n),
        shards,
        CONFIG.model_copy(update={"schedule": "constant"}),  # the last steps are as long as the first
        rounds=3,
        common_start=start == "common",
    )
    *_, last = run.train()
    assert len(before) == 3
    for layer in run.adapter.layers:
        dense = (before[-1].B[layer].double() @ before[-1].A[layer].double()).numpy()
        assert np.abs(dense - dense.mean(0)).max() > 1e-3  # the agents had parted
        u, s, vh = np.linalg.svd(dense.mean(0))
        expected = torch.from_numpy((u[:, :2] * s[:2]) @ vh[:2])
        for agent in range(n):
            product = run.adapter.B[layer][agent].double() @ run.adapter.A[layer][agent].double()
            torch.testing.assert_close(product, expected, rtol=1e-5, atol=1e-6)
    head = before[-1].extras["head.weight"].double().mean(0)
    torch.testing.assert_close(run.adapter.extras["head.weight"].double(), head.expand(n, -1, -1), rtol=1e-5, atol=1e-6)
    assert last.consensus_distance < 1e-5


def test_decaf_stays_near_dlora_on_a_complete_graph():
    """Common start, frequent mixing: interference is second order, so the products agree closely."""
    runs = {name: make_run(name, graph=graphs.complete(4), rounds=1) for name in ("dlora", "decaf")}
    for run in runs.values():
        *_, last = run.train()
    dlora, decaf = (runs[k].adapter for k in ("dlora", "decaf"))
    for layer in dlora.layers:
        a, b = dlora.B[layer] @ dlora.A[layer], decaf.B[layer] @ decaf.A[layer]
        assert (a - b).norm() < 0.05 * a.norm()
    assert last.interference > 0


def test_consensus_distance_against_dense_products():
    run = make_run("local", 4)
    list(run.train())
    adapter = run.adapter
    dense = [
        adapter.scale[k][:, None, None].double() * (adapter.B[k].double() @ adapter.A[k].double())
        for k in adapter.layers
    ]
    squares = sum((z - z.mean(0)).flatten(1).square().sum(1) for z in dense)
    assert consensus.distance(adapter) == pytest.approx(float(squares.mean().sqrt()), rel=1e-6)
    agreed = adapter.select([0, 0, 0])
    assert consensus.distance(agreed) == pytest.approx(0, abs=1e-9)
    nearly = agreed.with_tensors({"B/first": agreed.B["first"] + torch.tensor([0, 0, 1e-6])[:, None, None]})
    assert 0 < consensus.distance(nearly) < 1e-4


def test_averaged_model_is_the_best_rank_r_mean_of_products():
    run = make_run("local", 4)
    list(run.train())
    adapter, mean = run.adapter, consensus.averaged(run.adapter)
    for layer in adapter.layers:
        dense = (adapter.B[layer].double() @ adapter.A[layer].double()).mean(0).numpy()
        u, s, vh = np.linalg.svd(dense)
        expected = torch.from_numpy((u[:, :2] * s[:2]) @ vh[:2]).float()
        torch.testing.assert_close((mean.B[layer] @ mean.A[layer])[0], expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(mean.extras["head.bias"][0], adapter.extras["head.bias"].mean(0))


@pytest.mark.filterwarnings("ignore")
def test_saved_adapters_of_a_run_load_in_peft(digits_task, tmp_path):
    from transformers import CLIPModel

    from decaf_lora.tasks.demo import digits_data

    training = TrainingConfig(steps=2, batch_size=4, learning_rate=0.02, agents_per_pass=3)
    shards = partition.iid(digits_task.labels, 3, seed=0)
    run = Run(digits_task, algorithms.decaf(), graphs.ring(3), shards, training, rounds=2)
    list(run.train())
    indices = np.arange(6)
    pixels = digits_task.test_batch(indices)["pixel_values"]
    for agent in (1, "averaged"):
        run.save_adapter(tmp_path / str(agent), agent)
        which = consensus.averaged(run.adapter) if agent == "averaged" else run.adapter.select([agent])
        with torch.no_grad(), run.attached.bind(which):
            ours = digits_task.logits(pixels, 1)
        base = CLIPModel.from_pretrained(digits_data.MODEL_DIR, dtype=torch.float32)
        model = PeftModel.from_pretrained(base, tmp_path / str(agent)).eval()
        with torch.no_grad():
            theirs = model(pixel_values=pixels, **digits_task._tokens).logits_per_image
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-4)  # logits are scaled by about 50
    with pytest.raises(UserError, match="agent: 3 is not in this run; use 0 to 2"):
        run.save_adapter(tmp_path / "x", 3)
    run.close()


def test_torn_checkpoints_are_passed_over(tmp_path):
    run = make_run()
    for record in run.train():
        if record.round in (1, 2, 3):
            checkpoint.save(tmp_path, *run.snapshot())
    kept = checkpoint.all_of(tmp_path)
    assert [p.name for p in kept] == ["round-000002", "round-000003"]
    torn = kept[-1] / "tensors.safetensors"
    torn.write_bytes(torn.read_bytes()[:100])
    _, values = checkpoint.load_latest(tmp_path)
    assert values["round"] == 2
    assert checkpoint.load_latest(tmp_path / "none") is None


def test_more_agents_add_their_adapters_and_no_second_base():
    """Bytes of all tensors that are alive after two rounds of 1, 2, 3 and 10 agents."""

    def held(n):
        task = Toy(extras=True)
        task.model = TwoLayers(hidden=512)
        base = {p.data_ptr(): p.numel() * p.element_size() for p in task.model.parameters()}
        run = make_run("decaf" if n > 1 else "local", n, rounds=2, task=task, graph=graphs.ring(n) if n > 1 else None)
        list(run.train())
        assert {p.data_ptr() for p in run.attached.model.parameters()} == set(base)
        gc.collect()
        alive = [o for o in gc.get_objects() if type(o) in (torch.Tensor, torch.nn.Parameter)]
        storages = {
            t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in alive if t.device.type == "cpu"
        }
        adapters = sum(t.numel() * t.element_size() for t in run.adapter.tensors().values())
        return sum(storages.values()), sum(base.values()), adapters

    (one, base, _), *more = [held(n) for n in (1, 2, 3, 10)]
    for bytes_held, _, adapters in more:
        # The adapter, Adam's two moments, and a copy to spare.
        assert bytes_held - one < 4 * adapters
    assert 4 * more[-1][2] < base


@pytest.mark.parametrize("steps", [1, 3])
def test_the_recorded_loss_is_the_mean_over_the_local_steps(steps):
    """At a rate of nothing every step has the loss of the start, here over all the agent's examples."""
    task, shards = Toy(), [np.arange(0, 8), np.arange(20, 28), np.arange(50, 58)]
    expected = [torch.nn.functional.cross_entropy(task.model(task.x[shard]), task.y[shard]).item() for shard in shards]
    training = TrainingConfig(steps=steps, batch_size=8, learning_rate=1e-12, agents_per_pass=3)
    run = Run(task, algorithms.dlora(), graphs.ring(3), shards, training, rounds=2)
    for record in list(run.train())[1:]:
        assert record.losses == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize(("rounds", "steps", "timed"), [(10, 5, True), (12, 5, True), (7, 7, False)])
def test_passes_are_timed_only_in_a_run_of_fifty_local_steps(monkeypatch, rounds, steps, timed):
    asked = []
    monkeypatch.setattr(calibration, "fastest", lambda sizes, seconds: asked.append(seconds(1)) or sizes[0])
    run = make_run(training=CONFIG.model_copy(update={"steps": steps, "agents_per_pass": "auto"}), rounds=rounds)
    records = run.train()
    next(records), next(records)
    assert bool(asked) == timed


@pytest.mark.parametrize("moments", ["reset", "transport"])
def test_sgd_has_no_second_moment_to_carry(moments):
    run = make_run(moments=moments, training=CONFIG.model_copy(update={"optimizer": "sgd"}))
    list(run.train())
    assert all(group.second.shape == (4, 0) for group in run.trainer.moments.values())
    assert all(bool(group.first.any()) for name, group in run.trainer.moments.items() if name == "extras")
    assert bool(run.trainer.moments["A"].first.any()) == (moments == "transport")
