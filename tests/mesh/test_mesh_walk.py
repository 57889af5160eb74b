"""What docs/mesh.md tells three organisations to do: a folder for each machine, tables of their own, processes."""

import shutil

import pytest
import yaml
from peft import PeftModel
from transformers import AutoModelForSequenceClassification, AutoTokenizer

import tiny
from decaf_lora.cli import main
from decaf_lora.federation import demo, status
from sites import Program, Sites

NAMES = ("alice", "bob", "carol")
WORDS = [word for word in tiny.WORDS if word.isalpha()]


@pytest.fixture
def program():
    made = Program()
    yield made
    made.close()


@pytest.fixture
def command(capsys):
    """Runs a command that must succeed; what it prints."""

    def run(*arguments):
        capsys.readouterr()
        assert main([str(argument) for argument in arguments]) == 0, capsys.readouterr()
        return capsys.readouterr().out

    return run


def table(path, site):
    """Texts about good and bad things; each site has its own, and hardly any of one of the classes."""
    lines = ["text,label"]
    for i in range(40):
        label = ("good", "bad")[i % (8 if site == 0 else 2) > 0]
        lines.append(f"the {label} {WORDS[(7 * i + site) % len(WORDS)]} {WORDS[i]},{label}")
    path.write_text("\n".join(lines) + "\n")


def test_from_nothing_to_a_finished_adapter(tmp_path, command, program):
    model = tiny.write("bert", tmp_path / "model")
    machines = {name: tmp_path / name for name in ("organiser", *NAMES)}
    for folder in machines.values():
        folder.mkdir()
    recipe = machines["organiser"] / "my-task.yaml"
    task = {"name": "sequence-classification", "model": str(model), "classes": ["bad", "good"]}
    training = {"steps": 2, "batch_size": 4, "learning_rate": 0.01}
    recipe.write_text(yaml.safe_dump({"task": task, "training": training, "rounds": 3}))

    fed = machines["organiser"] / "fed.yaml"
    out = command("federation", "init", fed, "--recipe", recipe, "--agents", "alice,bob,carol", "--graph", "ring")
    told = out.split("fingerprint: ")[1].split()[0]
    addresses = dict(zip(NAMES, demo.free_addresses(3), strict=True))
    for name in NAMES:
        own = machines[name] / "fed.yaml"
        shutil.copy(fed, own)
        where = ["--dial-only"] if name == "carol" else ["--listen", addresses[name]]
        command("federation", "request", own, "--name", name, *where)
        shutil.copy(machines[name] / f"{name}.request", machines["organiser"])
    requests = [machines["organiser"] / f"{name}.request" for name in NAMES]
    command("federation", "seal", fed, *requests)
    assert not list(machines["organiser"].glob("*[ae].key"))  # no site's key has left its machine

    sites = {name: Sites(program, machines[name]) for name in NAMES}
    for number, name in enumerate(NAMES):
        shutil.copy(fed, machines[name] / "fed.yaml")
        data = machines[name] / f"{name}.csv"
        table(data, number)
        out = command(
            "federation", "check", machines[name] / "fed.yaml", "--name", name, "--trust", told, "--data", data
        )
        assert not [line for line in out.splitlines() if line.startswith("wrong")]
        assert "right  data: 32 examples to learn from of 2 classes, 8 to score on (accuracy)." in out
        bind = [] if name == "carol" else ["--bind", addresses[name]]
        sites[name]("start", name, "--data", data, *bind)
    assert {name: sites[name].wait(name)[name] for name in NAMES} == dict.fromkeys(NAMES, 0), sites["alice"].log(
        "alice"
    )

    for name in NAMES:
        said = status.read(status.file_of(machines[name] / "fed.yaml", name))
        assert (said.state, said.round) == ("done", 3)
        assert None not in (said.score, said.score_at_start, said.score_alone)
        run = machines[name] / name
        assert "| on its own data alone |" in (run / "report.md").read_text()
        base = AutoModelForSequenceClassification.from_pretrained(model, num_labels=2)
        PeftModel.from_pretrained(base, run / "adapter")
        assert AutoTokenizer.from_pretrained(run / "adapter")("the cat")["input_ids"]
        card = (run / "adapter" / "README.md").read_text()
        assert f"# agent {NAMES.index(name)}, {name} of sequence-classification" in card
