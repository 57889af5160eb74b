"""Agents of unequal ranks and scales, and agents that bring an adapter: against dense SVD, PEFT and by hand."""

import copy
import dataclasses
import json
import re

import numpy as np
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model

from decaf_lora import algorithms, consensus, graphs, partition
from decaf_lora.algorithms import GAUGES, Round
from decaf_lora.algorithms.inbox import Inbox
from decaf_lora.cli import main
from decaf_lora.config import TrainingConfig
from decaf_lora.errors import UserError
from decaf_lora.run import Run
from decaf_lora.runs import checkpoint
from rounds import mix, one_round, setting
from samples import LAYERS, make_adapter, products
from toy import Toy

pytestmark = pytest.mark.filterwarnings("ignore:.*recommended to pass.*")
RANKS = (1, 4, 2, 3)
FRESH = Toy(extras=True).default_lora()


def lora(rank, alpha=4.0, heads=True):
    return LoraConfig(
        r=rank, lora_alpha=alpha, target_modules=["first", "second"], modules_to_save=["head"] if heads else None
    )


def make_run(algorithm="decaf", ranks=RANKS, alphas=None, rounds=3, graph=None, **options):
    task = Toy(extras=True)
    made = algorithms.make(algorithm, **options.pop("options", {}))
    configs = [lora(r, a) for r, a in zip(ranks, alphas or [2 * r for r in ranks], strict=True)]
    shards = partition.dirichlet(task.labels, len(ranks), alpha=0.5, seed=1)
    training = TrainingConfig(steps=3, batch_size=5, learning_rate=0.02, agents_per_pass=2)
    values = {"lora": configs, "rounds": rounds, "evaluate_every": 2} | options
    return Run(task, made, graph or graphs.ring(len(ranks)), shards, training, **values)


def dense_rank(matrix, rank):
    u, s, vt = np.linalg.svd(matrix)
    return (u[:, :rank] * s[:rank]) @ vt[:rank]


# --- the rules ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [1, 2, 3, 7])
@pytest.mark.parametrize("gauge", GAUGES)
@pytest.mark.parametrize("kind", ["ring", "complete", "star"])
def test_decaf_truncates_the_mixed_products_to_each_agents_rank(gauge, kind, n):
    adapter, graph = make_adapter(n, unequal=True), graphs.parse(kind, n, 0)
    for reference in ("average", "own"):
        out, _ = one_round(algorithms.decaf(gauge, reference=reference), adapter, graph)
        for layer in LAYERS:
            before, after = products(adapter, layer).numpy(), products(out, layer).numpy()
            for agent in range(n):
                mixed = np.tensordot(graph.weights[agent], before, 1)
                expected = dense_rank(mixed, int(adapter.ranks[layer][agent]))
                np.testing.assert_allclose(after[agent], expected, atol=1e-7)


@pytest.mark.parametrize("name", ["dlora", "dlora_fa", "decaf", "decaf_tracked", "fedavg"])
def test_ranks_that_are_equal_change_nothing(name):
    algorithm = algorithms.make(name)
    plain = make_adapter(4, common_a=name == "dlora_fa")
    stated = dataclasses.replace(plain, ranks={k: torch.full((4,), r) for k, (r, _, _) in LAYERS.items()})
    graph = graphs.Graph.server([1, 2, 3, 4]) if name == "fedavg" else graphs.ring(4)
    ours, theirs = one_round(algorithm, stated, graph)[0], one_round(algorithm, plain, graph)[0]
    for key, tensor in ours.tensors().items():
        torch.testing.assert_close(tensor, theirs.tensors()[key], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("n", [2, 3, 7])
def test_dlora_fills_with_zeros_and_cuts_to_the_own_rank(n):
    adapter, graph = make_adapter(n, unequal=True), graphs.ring(n)
    out, _ = one_round(algorithms.dlora(), adapter, graph)
    for layer, (r, _, _) in LAYERS.items():
        scale = adapter.scale[layer].numpy()
        for i in range(n):
            own = np.arange(r) < int(adapter.ranks[layer][i])
            a = np.tensordot(graph.weights[i], adapter.A[layer].numpy(), 1) * own[:, None]
            b = np.tensordot(graph.weights[i] * scale / scale[i], adapter.B[layer].numpy(), 1) * own
            np.testing.assert_allclose(out.A[layer][i].numpy(), a, atol=1e-12)
            np.testing.assert_allclose(out.B[layer][i].numpy(), b, atol=1e-12)


def test_interference_and_tail_are_of_the_scaled_products_at_the_own_rank():
    n = 5
    adapter, graph = make_adapter(n, unequal=True), graphs.ring(n)
    inbox = Inbox.from_weights(adapter.message(), graph.weights, range(n), range(n))
    interference, tail = consensus.interference_and_tail(adapter, inbox)
    for i in range(n):
        squares = np.zeros(2)
        for layer in LAYERS:
            scaled = adapter.scale[layer][:, None, None].numpy() * adapter.B[layer].numpy()
            mixed = np.tensordot(graph.weights[i], scaled @ adapter.A[layer].numpy(), 1)
            factors = np.tensordot(graph.weights[i], scaled, 1) @ np.tensordot(
                graph.weights[i], adapter.A[layer].numpy(), 1
            )
            cut = mixed - dense_rank(mixed, int(adapter.ranks[layer][i]))
            squares += [np.square(mixed - factors).sum(), np.square(cut).sum()]
        np.testing.assert_allclose([interference[i], tail[i]], np.sqrt(squares), atol=1e-9)


def test_the_averaged_model_is_the_mean_product_at_the_largest_rank():
    adapter = make_adapter(5, unequal=True)
    one = consensus.averaged(adapter)
    for layer, (r, _, _) in LAYERS.items():
        mean = products(adapter, layer).numpy().mean(0)
        np.testing.assert_allclose(products(one, layer)[0].numpy(), dense_rank(mean, r), atol=1e-7)
        assert one.scale[layer][0] == adapter.scale[layer][consensus.largest(adapter)]


def test_tracked_gradients_are_exchanged_without_their_scales():
    """Agents that hold equal products and see equal gradients of them need no correction, whatever their scales."""
    adapter = make_adapter(1, unequal=True).select([0, 0, 0])
    scale = torch.tensor([0.5, 1.0, 4.0], dtype=torch.float64)
    b = {k: t * (adapter.scale[k] / scale)[:, None, None] for k, t in adapter.B.items()}
    adapter = dataclasses.replace(adapter, B=b, scale=dict.fromkeys(LAYERS, scale))
    algorithm = algorithms.make("dlora", tracking=True)
    state = algorithm.init(adapter, setting(adapter))
    generator = torch.Generator().manual_seed(0)
    gradients = {k: torch.zeros_like(t) for k, t in adapter.tensors().items()}
    for layer in LAYERS:  # of a loss G : s B A, by B: s G A^T
        g = torch.randn(*products(adapter, layer).shape[1:], generator=generator, dtype=torch.float64)
        gradients[f"B/{layer}"] = scale[:, None, None] * (g @ adapter.A[layer].mT)
    _, state = algorithm.steer(state, gradients, Round(1))
    _, state = one_round(algorithm, adapter, graphs.ring(3), 1, state)
    for layer in LAYERS:
        torch.testing.assert_close(
            state["tracking"][f"c/B/{layer}"], torch.zeros_like(adapter.B[layer]), atol=1e-12, rtol=0
        )


# --- whole runs ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [name for name in algorithms.KINDS if not algorithms.make(name).rule.alike])
def test_training_stays_within_the_ranks(name):
    run = make_run(name, alphas=(1, 8, 2, 9))
    records = list(run.train())
    assert all(np.isfinite(r.losses).all() for r in records[1:])
    trimmed = run.adapter.trim(run.adapter.tensors())
    assert all(torch.equal(t, trimmed[k]) for k, t in run.adapter.tensors().items())
    if name != "centralized":
        assert {k: t.tolist() for k, t in run.adapter.ranks.items()} == {"first": [*RANKS], "second": [*RANKS]}
    assert records[-1].averaged_score is not None


@pytest.mark.parametrize(
    "options",
    [
        {"options": {"moments": "transport"}},
        {"options": {"tracking": True, "relay_rank": 4}, "gossip_steps": 2},
        {"options": {"tracking": True, "gauge": "balanced"}, "graph": graphs.parse("one-peer-hypercube", 4, 0)},
    ],
)
def test_resumed_equals_uninterrupted(options, tmp_path):
    whole, first, second = (make_run(rounds=4, **copy.deepcopy(options)) for _ in range(3))
    list(whole.train())
    for record in first.train():
        if record.round == 2:
            break
    checkpoint.save(tmp_path, *first.snapshot())
    second.restore(*checkpoint.load_latest(tmp_path))
    list(second.train())
    for key, tensor in whole.adapter.tensors().items():
        assert torch.equal(tensor, second.adapter.tensors()[key]), key
    trimmed = whole.adapter.trim(whole.adapter.tensors())
    assert all(torch.equal(t, trimmed[k]) for k, t in whole.adapter.tensors().items())


def test_bytes_follow_each_agents_rank():
    sent = {}
    for name in ("decaf", "dlora_fa", "decaf_tracked", "fedavg"):
        *_, last = make_run(name).train()
        sent[name] = last.bytes_sent
    mean_rank, head, scales = np.mean(RANKS), 4 * (4 * 10 + 4), 2 * 4
    a, b = 4 * mean_rank * (12 + 10), 4 * mean_rank * (10 + 10)
    assert sent["decaf"] == pytest.approx(2 * (a + b + head + scales))
    assert sent["dlora_fa"] == pytest.approx(2 * (b + head + scales))
    assert sent["decaf_tracked"] == pytest.approx(2 * (2 * (a + b + head) + scales))
    assert sent["fedavg"] == pytest.approx(a + b + head + scales)


def test_every_agent_is_saved_at_its_own_rank_and_loads_in_peft(tmp_path):
    run = make_run(alphas=(1, 8, 2, 9))
    list(run.train())
    scores = run.trainer.evaluate(run.adapter).tolist()
    run.save_adapter(tmp_path / "averaged")
    averaged = float(run.trainer.evaluate(consensus.averaged(run.adapter))[0])
    for agent in range(4):
        run.save_adapter(tmp_path / str(agent), agent)
    plain, rows, task = run.attached.detach(), run.task.test_x, run.task
    for name, score, rank in [*zip("0123", scores, RANKS, strict=True), ("averaged", averaged, 4)]:
        saved = json.loads((tmp_path / name / "adapter_config.json").read_text())
        assert saved["r"] == rank
        theirs = PeftModel.from_pretrained(copy.deepcopy(plain), str(tmp_path / name)).eval()
        with torch.no_grad():
            accuracy = float((theirs(rows).argmax(1) == task.test_y).double().mean())
        assert accuracy == pytest.approx(score)


# --- agents that bring an adapter ---------------------------------------------------------------------------


def brought(folder, rank, alpha, seed, heads=True, **options):
    """An adapter that PEFT itself made and saved, and its model."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        config = lora(rank, alpha, heads)
        config.init_lora_weights = False
        for field, value in options.items():
            setattr(config, field, value)
        model = get_peft_model(copy.deepcopy(Toy(extras=True).model), config).eval()
        if heads:
            with torch.no_grad():
                for p in model.base_model.model.head.modules_to_save.parameters():
                    p.add_(torch.randn_like(p))
    model.save_pretrained(str(folder))
    return model


@pytest.mark.parametrize("pattern", [{}, {"rank_pattern": {"second": 5}, "alpha_pattern": {"first": 7}}])
def test_agents_start_from_the_adapters_they_bring(tmp_path, pattern):
    models = [brought(tmp_path / str(i), r, 3.0 * r + i, i, **pattern) for i, r in enumerate(RANKS)]
    configs = []
    for i, r in enumerate(RANKS):
        config = lora(r, 3.0 * r + i)
        for field, value in pattern.items():
            setattr(config, field, value)
        configs.append(config)
    run = make_run(lora=configs, init_adapters=[tmp_path / str(i) for i in range(4)])
    rows = run.task.test_x
    with torch.no_grad(), run.attached.bind(run.adapter) as bound:
        ours = bound(rows.repeat(4, 1)).unflatten(0, (4, -1))
        for agent in range(4):
            torch.testing.assert_close(ours[agent], models[agent](rows), rtol=1e-5, atol=1e-5)


def test_an_adapter_of_another_rank_is_filled_up_or_cut(tmp_path):
    small, large = brought(tmp_path / "small", 2, 6.0, 0), brought(tmp_path / "large", 5, 5.0, 1)
    directories = [tmp_path / "small", tmp_path / "large", None, tmp_path / "small"]
    with pytest.warns(UserWarning, match=r"init_adapters: 1 adapters were cut .*large.*% of a layer's norm is lost"):
        run = make_run(ranks=(4, 3, 2, 2), alphas=(1, 9, 2, 8), init_adapters=directories)
    rows = run.task.test_x
    with torch.no_grad(), run.attached.bind(run.adapter) as bound:
        ours = bound(rows.repeat(4, 1)).unflatten(0, (4, -1))
        torch.testing.assert_close(ours[0], small(rows), rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(ours[3], small(rows), rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(ours[2], run.attached.model.head.base(torch.tanh(
            run.attached.model.second.base(torch.tanh(run.attached.model.first.base(rows))))))  # fmt: skip
    for layer in ("first", "second"):
        module = getattr(large.base_model.model, layer)
        whole = module.get_delta_weight("default").detach().double().numpy()
        ours = products(run.adapter, layer)[1].double().numpy()
        np.testing.assert_allclose(ours, dense_rank(whole, 3), atol=1e-5)
        assert run.adapter.A[layer][0, :4].norm(dim=1).min() > 0  # rows to grow into
        assert not run.adapter.B[layer][0, :, 2:].any()


def test_product_consensus_merges_what_agents_bring_and_factor_averaging_does_not(tmp_path):
    """One exchange on a complete graph: DeCAF holds the best rank-r approximation of the mean product, DLoRA is off."""
    for i, r in enumerate(RANKS):
        brought(tmp_path / str(i), r, 2.0 * r, i)
    error = {}
    for name in ("decaf", "dlora"):
        run = make_run(name, graph=graphs.complete(4), init_adapters=[tmp_path / str(i) for i in range(4)])
        before = {k: products(run.adapter, k).double().mean(0) for k in run.adapter.layers}
        mix(run, 1)
        agent = 1  # of rank 4
        error[name] = {k: (products(run.adapter, k)[agent] - m).norm() / m.norm() for k, m in before.items()}
        best = {k: np.linalg.norm(m - dense_rank(m, 4)) / np.linalg.norm(m) for k, m in before.items()}
        if name == "decaf":
            assert all(error[name][k] == pytest.approx(best[k], rel=1e-4) for k in best)
    assert all(error["dlora"][k] > 1.3 * error["decaf"][k] for k in error["decaf"])


def test_centralized_training_starts_from_the_average(tmp_path):
    for i, r in enumerate(RANKS):
        brought(tmp_path / str(i), r, 2.0 * r, i)
    run = make_run("centralized", init_adapters=[tmp_path / str(i) for i in range(4)])
    others = make_run("local", init_adapters=[tmp_path / str(i) for i in range(4)])
    expected = consensus.averaged(others.adapter)
    for key, tensor in run.adapter.tensors().items():
        assert torch.equal(tensor, expected.tensors()[key])
    run.save_adapter(tmp_path / "out", 0)
    assert json.loads((tmp_path / "out" / "adapter_config.json").read_text())["r"] == 4


# --- the command --------------------------------------------------------------------------------------------

TOY = [
    "run",
    "digits",
    "--task.name",
    "tests/helpers/toy.py:make_toy",
    "--agents",
    "4",
    "--rounds",
    "2",
    "--lora.target-modules",
]
TOY += ["first", "second", "--partition", "iid", "--training.steps", "2", "--training.agents-per-pass", "4"]


def command(*arguments):
    return main([str(a) for a in arguments])


def test_ranks_and_adapters_by_command_and_back(tmp_path, capsys):
    first = [*TOY, "--lora.ranks", 1, 2, 3, 2]
    assert command(*first, "--out", tmp_path / "one") == 0
    assert json.loads((tmp_path / "one" / "run.json").read_text())["ranks"] == [1, 2, 3, 2]
    for agent in range(4):
        assert command("export", tmp_path / "one", "--agent", agent, "--to", tmp_path / f"agent-{agent}") == 0
    saved = json.loads((tmp_path / "agent-2" / "adapter_config.json").read_text())
    assert (saved["r"], saved["lora_alpha"]) == (3, 3)  # digits has scaling 1
    more = [*TOY, "--init-adapter", tmp_path / "agent-{agent}"]
    assert command(*more, "--out", tmp_path / "two") == 0
    assert json.loads((tmp_path / "two" / "run.json").read_text())["ranks"] == [1, 2, 3, 2]
    end, begin = ((tmp_path / k / "records.jsonl").read_text().splitlines() for k in ("one", "two"))
    assert json.loads(end[-1])["scores"] == json.loads(begin[0])["scores"]
    page = (tmp_path / "one" / "report.html").read_text()
    assert "<dd>1, 2, 3, 2</dd>" in page
    figure = page[page.index("<h3>Final score of every agent</h3>") :]
    figure = figure[: figure.index("</figure>")]
    assert sorted(re.findall(r"<text[^>]*fill: var\(--[^>]*>(\d+)</text>", figure)) == ["1", "2", "2", "3"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--lora.ranks", 2, 4], "lora.ranks: 2 given for 4 agents; give one for each."),
        (["--lora.alphas", 2, 4, 1], "lora.alphas: 3 given for 4 agents"),
        (["--lora.ranks", 2, 4, 1, 0], "lora: ranks must be at least 1"),
        (["--lora.ranks", 2, 4, 1, 11], "lora.r: rank 11 is larger than first (10 x 12)"),
        (["--init-adapter", "a", "b"], "init_adapters: 2 given for 4 agents"),
        (["--init-adapter", "nowhere-{agent}"], "init_adapters: nowhere-0/adapter_config.json cannot be read"),
    ],
)
def test_what_does_not_fit_is_one_line(options, message, tmp_path, capsys):
    assert command(*TOY, "--out", tmp_path / "run", *options) == 2
    error = capsys.readouterr().err.strip()
    assert message in error
    assert "\n" not in error
    assert not (tmp_path / "run").exists()


def test_an_adapter_of_another_model_names_the_tensors(tmp_path, capsys):
    brought(tmp_path / "a", 2, 2.0, 0, heads=False, target_modules=["first"])
    assert command(*TOY, "--init-adapter", tmp_path / "a", "--out", tmp_path / "run") == 2
    error = capsys.readouterr().err
    assert "does not fit the model and LoRA config; 2 tensors differ" in error
    assert "second.lora_A.weight, second.lora_B.weight" in error
    with pytest.raises(UserError, match="match different layers; they may differ in rank and alpha only"):
        make_run(lora=[lora(2), lora(2), lora(2), dataclasses.replace(lora(2), target_modules=["first"])])
