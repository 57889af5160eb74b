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


@pytest.mark.usefixtures("capsys")
def test_the_commands_of_the_page_lead_from_a_table_to_predictions(tmp_path, monkeypatch):
    clinics = ("mayo", "charite", "ucl")
    rows = [(note, diagnosis, clinics[i % 7 % 3]) for i, (note, diagnosis) in enumerate(visits(180, 0))]
    monkeypatch.chdir(tmp_path)
    table(tmp_path / "visits.csv", rows, ("note", "diagnosis", "clinic"), delimiter=";", encoding="cp1252")
    new = visits(60, 1)
    table(tmp_path / "new.csv", new, ("note", "diagnosis"))
    section = PAGE.split("## From a table to predictions")[1].split("\n## ")[0]
    (commands,) = re.findall(r"```sh\n(.*?)```", section, re.S)
    for line in commands.splitlines():
        program, *words = shlex.split(line)
        assert program == "decaf"
        if words[0] == "init":
            words += ["--model", str(model("bert", tmp_path))]
        assert main(words) == 0, line
    written = yaml.safe_load(Path("visits.yaml").read_text())
    assert (written["task"]["text_column"], written["partition"], written["agents"]) == ("note", "column:clinic", 3)
    for folder in ("predictions", "predictions-of-both"):
        with Path(folder, "predictions.csv").open(encoding="utf-8-sig", newline="") as file:
            found = list(csv.DictReader(file))
        assert [(row["text"], row["label"]) for row in found] == new
        scores = json.loads(Path(folder, "scores.json").read_text())
        right = sum(row["predicted"] == row["label"] for row in found) / len(found)
        assert scores["accuracy"] == right > 0.8 > 0.4 > scores["majority"]
        assert sum(map(sum, scores["confusion"]["true_by_predicted"])) == 60
