"""A Trainer script as an agent of a sealed federation: real processes over TLS, compared with `simulate`."""

import os
import signal
import time
import warnings
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForSequenceClassification, TrainerCallback, set_seed

import tiny
from decaf_lora import UserError, algorithms
from decaf_lora.cli import main
from decaf_lora.config import RunConfig, build
from decaf_lora.federation import commands, demo, file, keys, status
from decaf_lora.integrations import GossipCallback
from decaf_lora.integrations.saved_state import FILE
from endpoints import PATIENCE, until
from forked import CONTEXT
from trainer_scripts import make_trainer, values

NAMES = ("alice", "bob", "carol")
STEPS, EVERY = 10, 2
CLASSES = ("blue", "green", "red")
LORA = {"r": 2, "lora_alpha": 4, "target_modules": ["query", "value"]}
ALGORITHM = {"name": "decaf_tracked", "messages": "int8"}


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return tiny.write("bert", tmp_path_factory.mktemp("base") / "bert")


def seal(folder, base, names=NAMES[:2], *, graph="complete", patience=600.0, give_up=600.0, **changes):
    """A sealed federation of Trainer scripts; name -> what its callback is given."""
    folder.mkdir(exist_ok=True)
    given = {
        "task": {"name": "sequence-classification", "model": str(base), "classes": CLASSES},
        "lora": LORA,
        "algorithm": ALGORITHM,
        "training": {"steps": EVERY},
        "rounds": STEPS // EVERY,
        "seed": 3,
        **changes,
    }
    fed, config = folder / "fed.yaml", build(RunConfig, given)
    commands.init(fed, config, names, graph, limits=file.Limits(patience=patience, give_up=give_up))
    addresses = dict(zip(names, demo.free_addresses(len(names)), strict=True))
    signed = commands.seal(fed, [commands.request(fed, name, addresses[name])[0] for name in names])
    told = keys.fingerprint(signed.organiser)
    return {n: {"federation": fed, "name": n, "trust": told, "bind": addresses[n]} for n in names}


def script(folder, agent, base, lora=None, steps=STEPS, labels=3, **more):
    """A Trainer as people have it, on the base model in a folder."""
    set_seed(7)
    names = {"id2label": dict(enumerate(CLASSES))} if labels == 3 else {}
    model = AutoModelForSequenceClassification.from_pretrained(base, num_labels=labels, **names)
    set_seed(agent)
    config = LoraConfig(task_type="SEQ_CLS", **{**LORA, **(lora or {})})
    given = {"optim": "adamw_torch", "learning_rate": 0.01, "max_grad_norm": 0.5}
    given |= {"train_sampling_strategy": "random", "save_strategy": "steps", "save_steps": EVERY}
    return make_trainer(folder, agent, steps, get_peft_model(model, config), **given | more)


class All(TrainerCallback):
    """Waits before the first step until all neighbours are up: so that no exchange begins without one."""

    def __init__(self, gossip):
        self.gossip = gossip

    def on_step_begin(self, args, state, control, **kwargs):
        neighbours = self.gossip._engine.status()["neighbours"] if state.global_step == 0 else {}
        end = time.monotonic() + PATIENCE
        while not all(neighbour["up"] for neighbour in neighbours.values()):
            assert time.monotonic() < end
            time.sleep(0.01)
            neighbours = self.gossip._engine.status()["neighbours"]


class Kill(TrainerCallback):
    """Kills its own process when so many steps are done: after the checkpoint, before the next exchange."""

    def __init__(self, step):
        self.step = step

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            os.kill(os.getpid(), signal.SIGKILL)


def _agent(folder, base, agent, given, kill, resume, together):
    torch.set_num_threads(1)
    result = {}
    try:
        trainer = script(folder, agent, base)
        callback = GossipCallback(**given)
        trainer.add_callback(callback)
        if kill is not None:
            trainer.add_callback(Kill(kill))
        if together:
            trainer.add_callback(All(callback))
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            trainer.train(resume_from_checkpoint=resume)
        result = {"values": values(trainer.model), "round": callback.round, "step": trainer.state.global_step}
        result["told"] = [str(warning.message) for warning in told]
    except UserError as error:
        result = {"error": str(error)}
    torch.save(result, folder / f"{given['name']}.pt")


def start(folder, base, given, name, kill=None, resume=False, together=False):
    """The process of an agent."""
    work = (folder, base, NAMES.index(name), given[name], kill, resume, together)
    process = CONTEXT.Process(target=_agent, args=work, daemon=True)
    process.start()
    return process


def ended(folder, process, name):
    process.join(PATIENCE)
    assert process.exitcode == 0, process.exitcode
    return torch.load(folder / f"{name}.pt")


def simulated(folder, base, count=2, graph="complete"):
    trainers = [script(folder / "simulated", i, base) for i in range(count)]
    algorithm = algorithms.make("decaf_tracked", messages="int8")
    GossipCallback.simulate(trainers, graph=graph, algorithm=algorithm, every=EVERY, seed=3)
    return [values(trainer.model) for trainer in trainers]


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[k], other[k]) for k in one)


def test_three_scripts_over_tls_end_as_simulated(tmp_path, base):
    given = seal(tmp_path, base, NAMES, graph="line")
    work = {name: start(tmp_path, base, given, name, together=True) for name in NAMES}
    found = [ended(tmp_path, process, name) for name, process in work.items()]
    for name, theirs, own in zip(NAMES, found, simulated(tmp_path, base, 3, "line"), strict=True):
        assert (theirs["round"], theirs["step"]) == (STEPS // EVERY, STEPS)
        assert same(theirs["values"], own)
        said = status.read(status.file_of(tmp_path / "fed.yaml", name))
        assert (said.state, said.round, said.rounds) == ("done", 5, 5)
        assert all(edge.sent and edge.received and not edge.missed for edge in said.neighbours)
    # The result lies on disk, too, before the neighbours are told.
    saved = load_file(tmp_path / "agent-1" / "adapter" / "adapter_model.safetensors")
    key = next(k for k in found[1]["values"] if "lora_B" in k)
    assert torch.equal(saved[key.replace(".default", "")], found[1]["values"][key])
    last = load_file(tmp_path / "agent-1" / f"checkpoint-{STEPS}" / "adapter_model.safetensors")
    assert all(torch.equal(saved[k], last[k]) for k in saved)  # the last exchange comes before the last save


def test_a_killed_script_comes_back_and_ends_as_if_nothing_had_happened(tmp_path, base):
    given = seal(tmp_path, base)
    work = {name: start(tmp_path, base, given, name, {"bob": 6}.get(name)) for name in NAMES[:2]}
    work["bob"].join(PATIENCE)
    assert work["bob"].exitcode == -signal.SIGKILL
    work["bob"] = start(tmp_path, base, given, "bob", resume=True)
    for name, own in zip(NAMES[:2], simulated(tmp_path, base), strict=True):
        theirs = ended(tmp_path, work[name], name)
        assert same(theirs["values"], own)


def test_a_script_that_was_away_joins_the_others_at_their_round(tmp_path, base):
    given = seal(tmp_path, base, NAMES, patience=20.0)
    work = {n: start(tmp_path, base, given, n, {"carol": 4}.get(n), together=True) for n in NAMES}
    work["carol"].join(PATIENCE)
    assert work["carol"].exitcode == -signal.SIGKILL
    until(lambda: all((tmp_path / f"agent-{i}" / f"checkpoint-{STEPS}" / FILE).exists() for i in range(2)))
    work["carol"] = start(tmp_path, base, given, "carol", resume=True)
    found = {name: ended(tmp_path, process, name) for name, process in work.items()}
    assert [found[name]["round"] for name in NAMES] == [5] * 3
    assert [found[name]["step"] for name in NAMES[:2]] == [STEPS] * 2
    assert found["carol"]["step"] < STEPS
    assert any("which was away; training ends" in line for line in found["carol"]["told"])
    # Carol ends with the average of those who have answered her by then.
    key = next(k for k in found["carol"]["values"] if "modules_to_save" in k and "weight" in k)
    one, other, hers = (found[name]["values"][key] for name in NAMES)
    assert any(torch.allclose(hers, theirs, rtol=1e-6, atol=1e-7) for theirs in (one, other, (one + other) / 2))


def test_a_script_whose_neighbour_never_comes_gives_up_and_goes_on_later(tmp_path, base):
    given = seal(tmp_path, base, give_up=1.0)
    alone = script(tmp_path, 0, base)
    alone.add_callback(GossipCallback(**given["alice"]))
    with pytest.raises(UserError, match=r"neighbours: nobody answered for 1 s: bob .*The adapter is in") as caught:
        alone.train()
    assert caught.value.exit_code == 3
    assert status.read(status.file_of(tmp_path / "fed.yaml", "alice")).state == "gave up"
    assert (tmp_path / "agent-0" / "adapter" / "adapter_config.json").exists()
    assert (tmp_path / "agent-0" / "checkpoint-2" / FILE).exists()
    # The organiser gives them more time; the exchange that was due is made first.
    fed = tmp_path / "fed.yaml"
    changes = {"version": 2, "limits": file.Limits(patience=600, give_up=600)}
    organiser = keys.Organiser.load(commands.key_of_organiser(fed))
    file.write(file.seal(file.read_signed(fed).model_copy(update=changes), organiser), fed)
    work = {name: start(tmp_path, base, given, name, resume=name == "alice") for name in NAMES[:2]}
    for name, own in zip(NAMES[:2], simulated(tmp_path, base), strict=True):
        assert same(ended(tmp_path, work[name], name)["values"], own)


def test_a_script_and_decaf_agent_are_neighbours(tmp_path, base):
    """One organisation has a script, another runs `decaf agent` on a table; they end as the average of both."""
    table = tmp_path / "table"
    table.mkdir()
    rows = [f"the {a} {b},{c}" for a in ("cat", "dog") for b, c in zip(("sat", "ran", "flew"), CLASSES, strict=True)]
    for split in ("train", "test"):
        (table / f"{split}.csv").write_text("\n".join(["text,label", *rows * 2]) + "\n")
    given = seal(tmp_path, base, graph="complete")
    alice = start(tmp_path, base, given, "alice", together=True)
    bob = given["bob"]
    command = ["agent", bob["federation"], "--name", "bob", "--trust", bob["trust"], "--bind", bob["bind"]]
    assert main([*map(str, command), "--data", str(table), "--out", str(tmp_path / "bob")]) == 0
    found = ended(tmp_path, alice, "alice")
    assert found["round"] == STEPS // EVERY
    saved = load_file(tmp_path / "bob" / "adapter" / "adapter_model.safetensors")
    for name, tensor in found["values"].items():
        torch.testing.assert_close(saved[name.replace(".default", "").replace("modules_to_save.", "")], tensor)


# What is refused, in one line and before anything is sent


@pytest.fixture(scope="module")
def sealed(tmp_path_factory, base):
    return seal(tmp_path_factory.mktemp("sealed"), base)


@pytest.mark.parametrize(
    ("words", "changes"),
    [
        ("name: 'alic' is not known. Did you mean 'alice'", {"name": "alic"}),
        ("every: the federation file says 2 steps a round, every is 3", {"every": 3}),
        ("algorithm: the federation file says decaf_tracked", {"algorithm": "dlora"}),
        ("seed: the federation file says 3", {"seed": 0}),
        ("gossip_steps: the federation file says 1", {"gossip_steps": 2}),
        ("graph: the federation file says it", {"graph": "ring"}),
        ("store: the federation file says it", {"store": "tcp://here:29500"}),
        ("trust: the file is signed by", {"trust": "-".join(["0000"] * 8)}),
        ("key: cannot read", {"key": "nowhere.key"}),
    ],
)
def test_what_contradicts_the_file_is_refused(sealed, words, changes, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # a key brings a file beside it
    with pytest.raises(UserError, match=words) as caught:
        GossipCallback(**sealed["alice"] | changes)
    assert "\n" not in str(caught.value)


def test_what_the_file_says_may_be_said_again(sealed):
    GossipCallback(**sealed["alice"], algorithm="decaf_tracked", every=2, seed=3, gossip_steps=1)


def test_files_that_no_script_can_follow(tmp_path, base):
    for words, changes in (
        ("exchanges nothing", {"algorithm": {"name": "local"}}),
        ("every: the federation file counts epochs", {"training": {"epochs": 1.0}}),
        ("lora.ranks: agents of unequal rank", {"lora": {**LORA, "ranks": [2, 3]}}),
    ):
        folder = tmp_path / words[:5]
        folder.mkdir()
        with pytest.raises(UserError, match=words):
            GossipCallback(**seal(folder, base, **changes)["alice"])


@pytest.mark.parametrize(
    ("words", "changes"),
    [
        ("max_steps: 12 steps with an exchange every 2 make 6 rounds", {"steps": 12}),
        ("lora.r: the federation file says 2, the model has 3", {"lora": {"r": 3}}),
        ("lora.lora_alpha: the federation file says 4, the model has 2", {"lora": {"lora_alpha": 2}}),
        ("lora.use_rslora: the federation file says False", {"lora": {"use_rslora": True}}),
        ("lora.target_modules: the federation file says .*'query', 'value'", {"lora": {"target_modules": ["key"]}}),
        ("task.classes: the federation file has 3, the model 4", {"labels": 4}),
    ],
)
def test_a_script_that_does_not_fit_the_file_is_refused(tmp_path, base, sealed, words, changes):
    trainer = script(tmp_path, 0, base, **changes)
    refused(trainer, sealed, words)


def refused(trainer, sealed, words):
    trainer.add_callback(GossipCallback(**sealed["alice"]))
    with pytest.raises(UserError, match=words) as caught:
        trainer.train()
    assert "\n" not in str(caught.value)


def test_another_base_model_is_refused(tmp_path, base, sealed):
    trainer = script(tmp_path, 0, base)
    with torch.no_grad():
        trainer.model.get_base_model().bert.pooler.dense.weight[0, 0] += 1
    refused(trainer, sealed, "base model: .*pooler.dense.weight is not what .* holds")
    other = tmp_path / "other"
    tiny.write("bert", other)
    weights = load_file(other / "model.safetensors")
    weights["pooler.dense.weight"][0, 0] += 1
    save_file(weights, other / "model.safetensors", {"format": "pt"})
    refused(
        script(tmp_path, 0, other), sealed, "the weights in .* are not the organiser's: pooler.dense.weight differs"
    )
    nameless = script(tmp_path, 0, base)
    nameless.model.get_base_model().config._name_or_path = ""
    refused(nameless, sealed, "base model: it does not say where it was loaded from")


def test_classes_in_another_order_are_refused(tmp_path, base, sealed):
    trainer = script(tmp_path, 0, base)
    trainer.model.get_base_model().config.id2label = dict(enumerate(CLASSES[::-1]))
    refused(trainer, sealed, "task.classes: class 0 is 'blue' in the federation file and 'red' in the model")


def test_the_state_is_shown_by_the_command(tmp_path, base, capsys):
    given = seal(tmp_path, base)
    work = {name: start(tmp_path, base, given, name) for name in NAMES[:2]}
    for name, process in work.items():
        ended(tmp_path, process, name)
    assert main(["federation", "status", str(tmp_path / "fed.yaml"), "--name", "alice"]) == 0
    assert "alice, done" in capsys.readouterr().out
    folder = Path(tmp_path / "agent-0" / "adapter")
    fresh = AutoModelForSequenceClassification.from_pretrained(base, num_labels=3)
    PeftModel.from_pretrained(fresh, folder)
