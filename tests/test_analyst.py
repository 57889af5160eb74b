"""The path of a clinic's analyst, as docs/own-data.md has it: a table with sites, and at the end predictions."""

import csv
import json
import re
import shlex
from pathlib import Path

import numpy as np
import pytest
import yaml

from decaf_lora.cli import main
from inputs import model, table

pytestmark = [pytest.mark.filterwarnings("ignore::FutureWarning"), pytest.mark.usefixtures("datasets_cache")]

README = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")
PAGE = (Path(__file__).parents[1] / "docs" / "own-data.md").read_text(encoding="utf-8")
SIGNS = {"fever": ("red", "blue"), "fracture": ("big", "small"), "rash": ("old", "new")}
FILL = ["the", "cat", "dog", "bird", "sat", "ran", "on", "under", "mat", "tree", "sky", "is", "it", "of", "was", "very"]


def visits(count, seed):
    """(note, diagnosis): two words of each note tell the diagnosis."""
    draw = np.random.default_rng(seed)
    rows = []
    for i in range(count):
        diagnosis = list(SIGNS)[i % 3]
        words = [*draw.choice(FILL, 4), *draw.choice(SIGNS[diagnosis], 2)]
        rows.append((" ".join(draw.permutation(words)), diagnosis))
    return rows


NEW = visits(60, 1)


@pytest.fixture
def clinic(tmp_path, monkeypatch):
    """A folder with `visits.csv`, of three clinics, and `new.csv`; the base model."""
    clinics = ("mayo", "charite", "ucl")
    rows = [(note, diagnosis, clinics[i % 7 % 3]) for i, (note, diagnosis) in enumerate(visits(180, 0))]
    monkeypatch.chdir(tmp_path)
    table(tmp_path / "visits.csv", rows, ("note", "diagnosis", "clinic"), delimiter=";", encoding="cp1252")
    table(tmp_path / "new.csv", NEW, ("note", "diagnosis"))
    return model("bert", tmp_path)


def follow(commands, base):
    """Runs lines as a shell would; only `init` is told of another model, since the one that it takes is on the hub."""
    for line in commands.strip().splitlines():
        program, *words = shlex.split(line, comments=True)
        assert program == "decaf"
        assert main([*words, *(["--model", str(base)] if words[0] == "init" else [])]) == 0, line


def check_predictions(folder):
    with Path(folder, "predictions.csv").open(encoding="utf-8-sig", newline="") as file:
        found = list(csv.DictReader(file))
    assert [(row["text"], row["label"]) for row in found] == NEW
    scores = json.loads(Path(folder, "scores.json").read_text())
    right = sum(row["predicted"] == row["label"] for row in found) / len(found)
    assert scores["accuracy"] == right > 0.8 > 0.4 > scores["majority"]
    assert sum(map(sum, scores["confusion"]["true_by_predicted"])) == 60


@pytest.mark.usefixtures("capsys")
def test_the_commands_of_the_page_lead_from_a_table_to_predictions(clinic):
    section = PAGE.split("## From a table to predictions")[1].split("\n## ")[0]
    (commands,) = re.findall(r"```sh\n(.*?)```", section, re.S)
    follow(commands, clinic)
    written = yaml.safe_load(Path("visits.yaml").read_text())
    assert (written["task"]["text_column"], written["partition"], written["agents"]) == ("note", "column:clinic", 3)
    for folder in ("predictions", "predictions-of-both"):
        check_predictions(folder)


@pytest.mark.usefixtures("capsys")
def test_the_commands_of_the_readme(clinic):
    section = README.split("## Your own data\n")[1]
    commands = re.match(r"\n((?:    decaf .*\n)+)", section)[1]
    *before, last = commands.strip().splitlines()
    follow("\n".join(before), clinic)
    check_predictions("predictions")
    for who, agent in zip(("alice", "bob", "carol"), ("mayo", "charite", "ucl"), strict=True):
        assert main(["export", "runs/visits", "--agent", agent, "--to", f"{who}/adapter"]) == 0
    follow(last, clinic)
    for folder in ("adapters/mayo", "merged"):
        assert Path(folder, "adapter_model.safetensors").exists()
