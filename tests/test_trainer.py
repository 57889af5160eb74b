"""A callback makes Trainers decentralized: their exchanges are the algorithm's, and all else stays the script's."""

import importlib.util
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from peft import IA3Config, LoraConfig, get_peft_model
from safetensors.torch import load_file
from transformers import TrainerCallback
from transformers.training_args import ParallelMode

import tiny
from decaf_lora import UserError, algorithms, graphs
from decaf_lora.integrations import GossipCallback
from decaf_lora.integrations.trainer import _check_parallel
from ranks import free_port
from trainer_scripts import Examples, full, make_model, make_trainer, start, values


def products(tensors):
    """Layer -> B A in float64."""
    return {
        k.replace("lora_A", "BA"): tensors[k.replace("lora_A", "lora_B")].double() @ tensors[k].double()
        for k in tensors
        if "lora_A" in k
    }


def heads(tensors):
    return {k: t for k, t in tensors.items() if "modules_to_save" in k}


def same(one, two):
    return one.keys() == two.keys() and all(torch.equal(one[k], two[k]) for k in one)


class Probe(TrainerCallback):
    """Keeps what is trained at the end of every step."""

    def __init__(self):
        self.seen = []

    def on_step_end(self, args, state, control, model=None, **kwargs):
        self.seen.append(values(model))


def exchanges(trainers, every, **given):
    """[(before of each agent, after of each agent)] of every exchange of a simulation."""
    before = [Probe() for _ in trainers]
    for trainer, probe in zip(trainers, before, strict=True):
        trainer.add_callback(probe)
    after = [AfterProbe() for _ in trainers]
    for trainer, probe in zip(trainers, after, strict=True):
        trainer.add_callback(probe)
    GossipCallback.simulate(trainers, every=every, **given)
    steps = trainers[0].state.max_steps
    due = [k for k in range(1, steps + 1) if k % every == 0 or k == steps]
    return [([p.seen[k - 1] for p in before], [p.seen[k] for p in after]) for k in due]


class AfterProbe(TrainerCallback):
    """Keeps what is trained at the beginning of every step, and at the end."""

    def __init__(self):
        self.seen = []

    def on_step_begin(self, args, state, control, model=None, **kwargs):
        self.seen.append(values(model))

    def on_train_end(self, args, state, control, model=None, **kwargs):
        self.seen.append(values(model))


def mixture(weights, everybody):
    """Of lists of tensors, one an agent, the weighted sums that each agent gets."""
    columns = list(zip(*everybody, strict=True))
    return [[sum(w * t for w, t in zip(row, ts, strict=True)) for ts in columns] for row in weights]


def by_hand(models, weights, every, steps, accumulate=1, clip=None, tracked=False):
    """DLoRA with SGD, in plain torch: agents take batches of 4 in order, and average all factors by `weights`."""
    n = len(models)
    trained = [[p for p in m.parameters() if p.requires_grad] for m in models]
    corrections = [[torch.zeros_like(p) for p in own] for own in trained]
    sums, taken, at = [[torch.zeros_like(p) for p in own] for own in trained], 0, [0] * n
    for model in models:
        model.train()
    for step in range(1, steps + 1):
        taken += 1
        for i, model in enumerate(models):
            data = Examples(i)
            for _ in range(accumulate):
                rows = [data[k] for k in range(at[i], at[i] + 4)]
                at[i] = (at[i] + 4) % len(data)
                batch = {"input_ids": torch.stack([r["input_ids"] for r in rows])}
                batch["labels"] = torch.tensor([r["labels"] for r in rows])
                model(**batch).loss.backward()  # their sum: Trainer leaves the mean to the model
            if clip is not None:
                torch.nn.utils.clip_grad_norm_(trained[i], clip)
            with torch.no_grad():
                for p, c, total in zip(trained[i], corrections[i], sums[i], strict=True):
                    total += p.grad
                    p -= 0.05 * (p.grad + c)
                    p.grad = None
        if step % every == 0 or step == steps:
            with torch.no_grad():
                mixed = [
                    [sum(w * p for w, p in zip(row, ps, strict=True)) for ps in zip(*trained, strict=True)]
                    for row in weights
                ]
                if tracked:
                    means = [[total / taken for total in own] for own in sums]
                    sent = [[g + c for g, c in zip(*two, strict=True)] for two in zip(means, corrections, strict=True)]
                    news = [
                        [sum(w * d for w, d in zip(row, ds, strict=True)) for ds in zip(*sent, strict=True)]
                        for row in weights
                    ]
                    corrections = [[x - g for x, g in zip(*two, strict=True)] for two in zip(news, means, strict=True)]
                for own, new in zip(trained, mixed, strict=True):
                    for p, x in zip(own, new, strict=True):
                        p.copy_(x)
            sums, taken = [[torch.zeros_like(p) for p in own] for own in trained], 0
    return [values(model) for model in models]


def close(one, two):
    assert one.keys() == two.keys()
    for key in one:
        torch.testing.assert_close(one[key], two[key], rtol=1e-5, atol=1e-6)


# What is exchanged


@pytest.mark.parametrize(("n", "graph"), [(2, "complete"), (3, "complete"), (3, "line")])
def test_dlora_averages_factors_by_the_graphs_weights(tmp_path, n, graph):
    trainers = [make_trainer(tmp_path, i, 8, make_model(i)) for i in range(n)]
    GossipCallback.simulate(trainers, graph=graph, algorithm="dlora", every=3)
    weights = graphs.parse(graph, n, 0).weights.tolist()
    for trainer, expected in zip(trainers, by_hand([make_model(i) for i in range(n)], weights, 3, 8), strict=True):
        close(values(trainer.model), expected)


@pytest.mark.parametrize("n", [2, 3])
def test_decaf_on_the_complete_graph_is_the_truncated_average_of_products(tmp_path, n):
    trainers = [make_trainer(tmp_path, i, 5, make_model(i)) for i in range(n)]
    for before, after in exchanges(trainers, 2, graph="complete", algorithm="decaf"):
        for layer in products(before[0]):
            mean = sum(products(own)[layer] for own in before) / n
            U, S, V = torch.linalg.svd(mean)
            best = U[:, :2] * S[:2] @ V[:2]
            assert S[2] > 1e-6 * S[0]  # there is something to cut
            for own in after:
                assert (products(own)[layer] - best).norm() <= 1e-5 * best.norm()
        for name in heads(before[0]):
            for own in after:
                torch.testing.assert_close(own[name], sum(other[name] for other in before) / n)


def test_tracking_steers_what_is_accumulated_and_clipped(tmp_path):
    given = {"gradient_accumulation_steps": 2, "max_grad_norm": 0.3}
    trainers = [make_trainer(tmp_path, i, 7, make_model(i), **given) for i in range(3)]
    algorithm = algorithms.dlora() | algorithms.tracking()
    GossipCallback.simulate(trainers, graph="line", algorithm=algorithm, every=2)
    weights = graphs.line(3).weights.tolist()
    found = by_hand([make_model(i) for i in range(3)], weights, 2, 7, accumulate=2, clip=0.3, tracked=True)
    for trainer, expected in zip(trainers, found, strict=True):
        close(values(trainer.model), expected)


def test_int8_sends_codes_with_error_feedback(tmp_path):
    trainers = [make_trainer(tmp_path, i, 6, make_model(i)) for i in range(2)]
    algorithm = algorithms.dlora() | algorithms.int8()
    left = [{}, {}]
    for before, after in exchanges(trainers, 2, graph="complete", algorithm=algorithm):
        for name in before[0]:
            read = []
            for i, own in enumerate(before):
                y = own[name] + left[i].get(name, 0)
                scale = y.abs().max() / 127
                read.append((y / scale).round() * scale if y.dim() == 2 else y)
                left[i][name] = y - read[-1]
            for own in after:
                torch.testing.assert_close(own[name], (read[0] + read[1]) / 2, rtol=1e-6, atol=1e-7)


def test_a_fixed_a_stays_and_trains_again_afterwards(tmp_path):
    trainers = [make_trainer(tmp_path, i, 4, make_model(1)) for i in range(2)]
    start = values(trainers[0].model)
    GossipCallback.simulate(trainers, graph="complete", algorithm="dlora_fa", every=2)
    for trainer in trainers:
        end = values(trainer.model)
        assert all(torch.equal(end[k], start[k]) for k in end if "lora_A" in k)
        assert not any(torch.equal(end[k], start[k]) for k in end if "lora_B" in k)
        assert all(p.requires_grad for k, p in trainer.model.named_parameters() if "lora_A" in k)


def test_moments_are_those_of_the_scripts_optimizer(tmp_path):
    trainers = [make_trainer(tmp_path, i, 4, make_model(0), optim="adamw_torch") for i in range(2)]
    seen = []

    class Moments(TrainerCallback):
        def on_step_begin(self, args, state, control, optimizer=None, model=None, **kwargs):
            kept = {k: optimizer.state[p] for k, p in model.named_parameters() if p in optimizer.state}
            seen.append((state.global_step, {k: s["exp_avg"].clone() for k, s in kept.items()}))

    trainers[0].add_callback(Moments())
    algorithm = algorithms.dlora(moments="reset")
    GossipCallback.simulate(trainers, graph="complete", algorithm=algorithm, every=2)
    by_step = dict(seen)
    assert any(t.any() for k, t in by_step[1].items() if ".lora_" in k)
    factors = [t for k, t in by_step[2].items() if ".lora_" in k]
    assert factors
    assert not any(t.any() for t in factors)
    assert all(t.any() for k, t in by_step[2].items() if "modules_to_save" in k)


# What stays the script's


@pytest.mark.parametrize("n", [1, 3])
def test_agents_that_do_not_talk_train_as_alone(tmp_path, n):
    expected = []
    for i in range(n):
        trainer = full(tmp_path, i)
        trainer.train()
        expected.append(values(trainer.model))
    trainers = [full(tmp_path, i) for i in range(n)]
    GossipCallback.simulate(trainers, algorithm="local", every=2)
    for trainer, alone in zip(trainers, expected, strict=True):
        assert same(values(trainer.model), alone)


def test_a_resumed_run_is_bit_equal_also_within_a_round(tmp_path):
    algorithm = algorithms.decaf() | algorithms.tracking() | algorithms.int8()
    given = {"graph": "ring", "algorithm": algorithm, "every": 3, "seed": 5}
    whole = [full(tmp_path / "a", i, steps=10, save_strategy="steps", save_steps=4) for i in range(3)]
    GossipCallback.simulate(whole, **given)
    paths = [str(tmp_path / "a" / f"agent-{i}" / "checkpoint-4") for i in range(3)]
    rest = [full(tmp_path / "b", i, steps=10) for i in range(3)]
    GossipCallback.simulate(rest, **given, resume_from_checkpoint=paths)
    for one, other in zip(whole, rest, strict=True):
        assert same(values(one.model), values(other.model))
    # From another folder's checkpoint: another adapter.
    swapped = [full(tmp_path / "b", i, steps=10) for i in range(3)]
    with pytest.raises(UserError, match="agent"):
        GossipCallback.simulate(swapped, **given, resume_from_checkpoint=paths[::-1])
    Path(paths[1], "gossip.safetensors").unlink()
    with pytest.raises(UserError, match=r"resume: there is no .*gossip\.safetensors"):
        GossipCallback.simulate(swapped, **given, resume_from_checkpoint=paths)


def test_the_last_exchange_comes_before_the_last_save(tmp_path):
    trainers = [make_trainer(tmp_path, i, 5, make_model(i), save_strategy="steps", save_steps=5) for i in range(2)]
    GossipCallback.simulate(trainers, graph="complete", algorithm="dlora", every=3)
    saved = [load_file(tmp_path / f"agent-{i}" / "checkpoint-5" / "adapter_model.safetensors") for i in range(2)]
    assert saved[0].keys() == saved[1].keys()
    assert all(torch.equal(saved[0][k], saved[1][k]) for k in saved[0])
    found = values(trainers[0].model)
    key = next(k for k in found if "lora_B" in k)
    assert torch.equal(saved[0][key.replace(".default", "")], found[key])


class Stop(TrainerCallback):
    def __init__(self, step):
        self.step = step

    def on_evaluate(self, args, state, control, **kwargs):
        control.should_training_stop = state.global_step >= self.step


def stopping(folder, agent, step):
    trainer = make_trainer(folder, agent, 8, make_model(agent), Examples(9, 4), eval_strategy="steps", eval_steps=1)
    trainer.add_callback(Stop(step))
    return trainer


def test_agents_that_stop_early_together_exchange_once_more(tmp_path):
    trainers = [stopping(tmp_path, i, 5) for i in range(2)]
    GossipCallback.simulate(trainers, graph="complete", algorithm="dlora", every=3)
    assert trainers[0].state.global_step == 5
    assert same(*(values(t.model) for t in trainers))


def test_an_agent_that_stops_alone_is_told(tmp_path):
    trainers = [stopping(tmp_path, i, (5, 8)[i]) for i in range(2)]
    with pytest.raises(UserError, match="equally many steps"):
        GossipCallback.simulate(trainers, graph="complete", algorithm="dlora", every=3)


def test_sft_trainer(tmp_path):
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    path = tiny.write("llama", tmp_path / "llama")
    trainers = []
    for i in range(2):
        lines = [" ".join(tiny.WORDS[i + k : i + k + 6]) for k in range(8)]
        args = SFTConfig(
            output_dir=str(tmp_path / f"agent-{i}"),
            max_steps=4,
            per_device_train_batch_size=2,
            learning_rate=0.01,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            use_cpu=True,
            bf16=False,
            seed=i,
            max_length=16,
        )
        config = LoraConfig(r=2, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
        data = Dataset.from_dict({"text": lines})
        trainers.append(SFTTrainer(str(path), args=args, train_dataset=data, peft_config=config))
    for before, after in exchanges(trainers, 2, graph="complete", algorithm="decaf"):
        for layer in products(before[0]):
            mean = sum(products(own)[layer] for own in before) / 2
            U, S, V = torch.linalg.svd(mean)
            best = U[:, :2] * S[:2] @ V[:2]
            assert best.norm() > 0
            for own in after:
                assert (products(own)[layer] - best).norm() <= 1e-5 * best.norm()


# Agents in processes of their own


def test_agents_that_meet_by_a_store_end_as_simulated(tmp_path):
    given = {"graph": "line", "algorithm": "decaf_tracked", "every": 4, "seed": 3}
    found = start(tmp_path, free_port(), [given] * 3)
    trainers = [full(tmp_path / "simulated", i) for i in range(3)]
    GossipCallback.simulate(trainers, **given)
    for trainer, theirs in zip(trainers, found, strict=True):
        assert same(values(trainer.model), theirs)


def test_agents_that_differ_are_refused_in_all_processes(tmp_path):
    given = {"graph": "complete", "algorithm": "dlora"}
    for error in start(tmp_path, free_port(), [given | {"every": 3}, given | {"every": 2}]):
        assert "every is 3 on rank 0, 2 on rank 1" in error


# What is refused, in one line


def refused(words, trainers, **given):
    with pytest.raises(UserError, match=words) as caught:
        GossipCallback.simulate(trainers, **{"graph": "complete", "every": 2, "algorithm": "decaf"} | given)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("words", "lora"),
    [
        ("lora.use_dora", {"use_dora": True}),
        ("lora.init_lora_weights", {"init_lora_weights": "pissa"}),
        ("lora.bias", {"bias": "lora_only"}),
        ("lora.target_modules: agent 0 has 4 layers .query, value", {"target_modules": ["query"]}),
        ("lora.r: agent 0 has 2 .* agent 1 3", {"r": 3, "lora_alpha": 6}),
        ("lora.lora_alpha: agent 0 has scaling 2 .* agent 1 scaling 4", {"lora_alpha": 8}),
        ("lora.modules_to_save: agent 0 has", {"modules_to_save": ["classifier", "pooler"]}),
    ],
)
def test_adapters_that_do_not_fit_are_refused(tmp_path, words, lora):
    refused(words, [make_trainer(tmp_path, 0), make_trainer(tmp_path, 1, model=make_model(**lora))])


def test_models_that_do_not_fit_are_refused(tmp_path):
    fine = make_trainer(tmp_path, 0)
    plain = make_model().unload()
    refused("model: BertForSequenceClassification is not a PEFT model", [fine, make_trainer(tmp_path, 1, model=plain)])
    base = get_peft_model(make_model().unload(), IA3Config(task_type="SEQ_CLS", target_modules=["key"]))
    refused("model: the adapter 'default' is a IA3Config", [fine, make_trainer(tmp_path, 1, model=base)])
    more = make_model()
    more.base_model.model.bert.pooler.dense.bias.requires_grad_(True)
    refused("model: .*pooler.dense.bias is trained but no part", [fine, make_trainer(tmp_path, 1, model=more)])
    other = make_model()
    with torch.no_grad():
        other.base_model.model.bert.pooler.dense.weight.add_(1)
    refused("base model: agent 0 has", [fine, make_trainer(tmp_path, 1, model=other)])
    refused("two of them train one model", [fine, make_trainer(tmp_path, 1, model=fine.model)])


def test_trainers_that_do_not_fit_are_refused(tmp_path, monkeypatch):
    fine, other = make_trainer(tmp_path, 0), make_trainer(tmp_path, 1)
    refused("max_steps: agent 0 has 6, agent 1 7", [fine, make_trainer(tmp_path, 1, 7)])
    refused("every: 7 steps never come, training has 6", [fine, other], every=7)
    refused("every: 0 steps never come", [fine, other], every=0)
    refused("graph: missing", [fine, other], graph=None)
    refused("graph: it joins 3 agents, here are 2", [fine, other], graph=graphs.ring(3))
    refused("agents: decaf needs at least 2, got 1; use local", [fine])
    refused("algorithm: fedavg does not gossip", [fine, other], algorithm="fedavg")
    refused("algorithm: core trains what a PEFT model does not hold", [fine, other], algorithm="core")
    refused("trainer 0 has no checkpoint", [fine, other], resume_from_checkpoint=True)
    starts = [make_trainer(tmp_path, i, model=make_model(i)) for i in range(2)]
    refused("A, which stays as it starts", starts, algorithm="dlora_fa")
    refused("optim: dlora .* those of SGD", [fine, other], algorithm=algorithms.dlora(moments="reset"))
    folders = [make_trainer(tmp_path, 0, save_strategy="steps") for _ in range(2)]
    refused("output_dir: two trainers write to one folder", folders)
    wild = [make_trainer(tmp_path, i, learning_rate=1e30) for i in range(2)]
    refused("training: the adapter of agent 0 is not finite after step 2", wild)
    for name, value in (("deepspeed", "zero.json"), ("fsdp", True), ("parallel_mode", ParallelMode.DISTRIBUTED)):
        given = SimpleNamespace(**{"deepspeed": None, "fsdp": None, "parallel_mode": None, name: value})
        with pytest.raises(UserError, match=r"(deepspeed|fsdp|DistributedDataParallel): GossipCallback does not"):
            _check_parallel(given)
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    refused("GossipCallback: RANK and WORLD_SIZE set", [fine, other])


@pytest.mark.parametrize(
    ("words", "given"),
    [
        ("name: missing; federation= and name= go together", {"federation": "fed.yaml"}),
        ("federation: missing; federation= and name= go together", {"name": "alice"}),
        ("federation: cannot read nowhere.yaml", {"federation": "nowhere.yaml", "name": "alice"}),
        ("trust: it belongs to a federation", {"trust": "7c41"}),
        ("store: missing", {}),
        ("store: '10.0.0.1:29500' is no address", {"store": "10.0.0.1:29500", "agent": 0, "agents": 2}),
        ("store: 'tcp://here:70000' is no address", {"store": "tcp://here:70000", "agent": 0, "agents": 2}),
        ("store: agent= and agents= are missing", {"store": "tcp://here:29500"}),
        ("agent: there is no agent 2 of 2", {"store": "tcp://here:29500", "agent": 2, "agents": 2}),
        ("timeout: 0 is not above 0", {"store": "tcp://here:29500", "agent": 0, "agents": 2, "timeout": 0}),
    ],
)
def test_what_the_callback_is_given_is_checked_at_once(words, given):
    with pytest.raises(UserError, match=words):
        GossipCallback(graph="complete", every=2, **given)


def test_the_example_shows_that_two_know_more_than_one(capsys):
    spec = importlib.util.spec_from_file_location("example", Path(__file__).parent.parent / "examples" / "trainer.py")
    example = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(example)
    scores = example.main([])
    assert min(scores["together"]) > 0.7 > 0.6 > max(scores["alone"])  # alone, half of the classes are out of reach
    assert "together" in capsys.readouterr().out
