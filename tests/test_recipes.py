"""The recipes: complete, true to what the paper states, and runnable on small models and data of one's own."""

import csv
import json
import os
import subprocess
import sys
from pathlib import Path

import datasets
import numpy as np
import pytest
import yaml
from PIL import Image

from decaf_lora import algorithms, config, graphs, partition, recipes, tasks
from decaf_lora.cli import main
from decaf_lora.config import CompareConfig, RunConfig, TaskConfig
from decaf_lora.runs.compare import cells
from tiny import write

PAPER = [name for name in recipes.RECIPES if name.startswith("paper/")]
ROOT = Path(__file__).parents[1]
DATA = Path(os.environ.get("DECAF_DATA", ROOT.parent / "shared" / "data"))
ALGORITHMS = ("local", "dlora", "dlora_fa", "decaf", "fedavg", "centralized")

pytestmark = [pytest.mark.filterwarnings("ignore::FutureWarning"), pytest.mark.usefixtures("datasets_cache")]


def decaf(*arguments):
    return main([str(a) for a in arguments])


def fails(capsys, *arguments):
    """The one line that a mistake prints; asserts exit code 2."""
    capsys.readouterr()
    assert decaf(*arguments) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line.strip()]
    mistakes = [line for line in lines if line.startswith("decaf: ") and not line.startswith("decaf: warning: ")]
    assert len(mistakes) == 1, lines
    assert "Traceback" not in "".join(lines)
    return mistakes[0]


@pytest.mark.parametrize("name", list(recipes.RECIPES))
def test_every_recipe_is_a_full_config_that_round_trips(name, tmp_path):
    made = recipes.get(name)
    assert CompareConfig.model_validate(made.model_dump()) == made
    (tmp_path / "c.yaml").write_text(config.dump(made))
    assert config.load(CompareConfig, tmp_path / "c.yaml") == made
    assert config.differences(made, made) == []


@pytest.mark.parametrize("name", list(recipes.RECIPES))
def test_every_name_in_a_recipe_resolves(name):
    made = recipes.get(name)
    labels = np.arange(4200) % (102 if made.task.name == "image-text" else 2)
    for graph in made.graphs or (made.graph,):
        assert graphs.as_schedule(graphs.parse(graph, made.agents, 0)).num_agents == made.agents
    for spec in made.partitions or (made.partition,):
        assert len(partition.parse(spec, labels, made.agents, 0).shards) == made.agents
    assert made.algorithms == ALGORITHMS
    assert all(name in algorithms.KINDS for name in made.algorithms)
    tasks.refuse_unused(made.task, tasks.KINDS[made.task.name].options, made.task.name)


# Rank, scaling, dropout, rounds, steps or epochs a round: the table of the paper's set-up.
PUBLISHED = {
    "paper/flowers102": ("openai/clip-vit-base-patch16", 2, 1, 0.25, 500, (None, 1), "accuracy"),
    "paper/ucf101": ("openai/clip-vit-base-patch16", 2, 1, 0.25, 500, (None, 1), "accuracy"),
    "paper/food101": ("openai/clip-vit-base-patch16", 2, 1, 0.25, 500, (None, 1), "accuracy"),
    "paper/wic": ("meta-llama/Llama-2-7b-hf", 4, 8, 0.1, 150 / 3, (3, None), "f1"),
    "paper/boolq": ("meta-llama/Llama-2-7b-hf", 4, 8, 0.1, 150 / 3, (3, None), "f1"),
}


@pytest.mark.parametrize("name", PAPER)
def test_recipes_have_the_published_settings(name):
    made = recipes.get(name)
    model, rank, scaling, dropout, rounds, (steps, epochs), metric = PUBLISHED[name]
    assert made.task.model == model
    assert made.task.metric == metric
    assert (made.lora.r, made.lora.lora_alpha / made.lora.r, made.lora.lora_dropout) == (rank, scaling, dropout)
    assert not made.lora.use_rslora
    assert (made.agents, made.rounds, made.training.batch_size, made.training.schedule) == (10, rounds, 32, "cosine")
    assert made.training.epochs == epochs
    assert steps is None or made.training.steps == steps
    assert {"ring", "complete", "bipartite"} <= set(made.graphs)


def test_the_paper_set_up_gives_four_shots_an_agent_and_classes_by_number():
    labels = np.random.default_rng(0).permutation(np.repeat(np.arange(101), 75))
    iid, by_class, dirichlet = (partition.parse(s, labels, 10, 0) for s in recipes.ucf101().partitions)
    assert (iid.label_table() == 4).all()
    table = by_class.label_table()
    assert all(set(np.flatnonzero(table[:, c])) == {c % 10} for c in range(101))
    for split in (iid, by_class, dirichlet):
        assert (split.label_table().sum(0) == 40).all()


def test_recipes_are_listed_with_a_line_each(capsys):
    assert decaf("recipes", "--json") == 0
    listed = json.loads(capsys.readouterr().out)
    assert listed == recipes.describe()
    assert set(PAPER) == set(PUBLISHED) <= set(listed)
    assert all(20 < len(line) < 62 for line in listed.values())  # a terminal's line
    assert decaf("recipes") == 0
    assert all(name in capsys.readouterr().out for name in ["paper/wic"])


# Shortened runs


def test_scale_is_resolved_into_the_configuration():
    food = recipes.get("paper/food101")
    short = recipes.shortened(food, 0.05)
    assert (short.rounds, short.task.max_test) == (25, 0.05)
    assert recipes.shortened(food, 1) == food
    assert recipes.shortened(food, 0.001).rounds == 2
    assert recipes.shortened(food.model_copy(update={"rounds": 1}), 0.5).rounds == 1
    limited = food.model_copy(update={"task": food.task.model_copy(update={"max_test": 1000})})
    assert recipes.shortened(limited, 0.05).task.max_test == 50
    assert recipes.shortened(short, 0.5).task.max_test == 0.025
    assert recipes.shortened(recipes.digits(), 0.5).task == recipes.digits().task
    same = food.model_copy(update={"rounds": 25, "task": food.task.model_copy(update={"max_test": 0.05})})
    assert short == same


@pytest.mark.parametrize("scale", ["0", "-1", "1.5", "nan"])
def test_a_scale_out_of_range(capsys, tmp_path, scale):
    line = fails(capsys, "run", "paper/wic", "--scale", scale, "--out", tmp_path / "r")
    says = "should be a finite number" if scale == "nan" else "must be above 0 and at most 1"
    assert line.startswith("decaf: scale: ")
    assert says in line
    assert not (tmp_path / "r").exists()


@pytest.mark.parametrize("limit", ["0", "-3", "1.5", "0.0"])
def test_limits_are_whole_numbers_or_shares(capsys, limit):
    line = fails(capsys, "run", "paper/wic", "--task.max_test", limit)
    assert "task.max_test: must be a whole number of at least 1, or a share between 0 and 1" in line


def test_a_share_of_the_test_examples(tmp_path):
    from decaf_lora import data

    rows = datasets.Dataset.from_dict({"text": ["x"] * 50, "label": [0, 1] * 25})
    rows.to_parquet(tmp_path / "all.parquet")
    values = {"data": str(tmp_path / "all.parquet"), "test_share": 0.4, "max_test": 0.3, "max_train": 0.5}
    found = data.load(TaskConfig(**values), [("text_column", "text")], label="label")
    assert len(found.test) == len(found.test_labels) == 6
    assert len(found.train) == 15
    assert found.test_labels.sum() == 3


# Small models and data of one's own, through the command line


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return write("llama", tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="module")
def senses(tmp_path_factory):
    """A JSON lines file with WiC's columns."""
    path = tmp_path_factory.mktemp("senses") / "wic.jsonl"
    generator = np.random.default_rng(0)
    words = ["cat", "dog", "bird", "tree", "mat", "sky"]
    lines = []
    for i in range(60):
        first, second = (" ".join(generator.choice(words, 4)) for _ in range(2))
        row = {"word": words[i % 6], "sentence1": first, "sentence2": second, "label": ("false", "true")[i % 2]}
        lines.append(json.dumps(row) + "\n")
    path.write_text("".join(lines))
    return path


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    return write("clip", tmp_path_factory.mktemp("clip"))


@pytest.fixture(scope="module")
def flowers(tmp_path_factory):
    """A folder of images, by split and class; one class has fewer than 40."""
    folder = tmp_path_factory.mktemp("flowers")
    generator = np.random.default_rng(0)
    for split, counts in (("train", (41, 40, 40, 9)), ("test", (3, 3, 3, 3))):
        for label, count in enumerate(counts):
            (folder / split / f"flower_{label}").mkdir(parents=True)
            for i in range(count):
                pixels = generator.integers(0, 255, (16, 16, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(folder / split / f"flower_{label}" / f"{i}.png")
    return folder


SMALL = ["--agents", "4", "--training.agents_per_pass", "4", "--training.batch_size", "4"]


def test_language_recipe_on_a_small_model_and_a_file(llama, senses, tmp_path, capsys):
    """Two graphs and two seeds: a baseline runs once for both graphs; a second call runs only what is missing."""
    out = tmp_path / "sweep"
    arguments = [
        *("compare", "paper/wic", "--model", llama, "--data", senses, "--scale", "0.04", "--out", out),
        *("--task.test_share", "0.2", "--task.max_length", "48", *SMALL, "--jobs", "1", "--graphs", "ring", "complete"),
        *("--partitions", "iid", "--seeds", "0", "1", "--algorithms", "local", "decaf"),
    ]
    assert decaf(*arguments) == 0
    runs = sorted(p.parent.name for p in out.glob("*/run.json"))
    names = ("decaf-complete", "decaf-ring", "local")
    assert runs == [f"{name}-iid-seed{seed}" for name in names for seed in (0, 1)]
    saved = yaml.safe_load((out / "config.yaml").read_text())
    assert (saved["rounds"], saved["task"]["max_test"], saved["task"]["test_split"]) == (2, 0.04, None)
    assert (saved["task"]["dtype"], saved["lora"]["lora_alpha"], saved["task"]["subset"]) == ("bfloat16", 32, "wic")
    rows = json.loads((out / "summary.json").read_text())
    scores = {(r["algorithm"], r["graph"], r["seed"]): r["mean_score"] for r in rows}
    assert len(scores) == len(rows) == 2 * 2 * 2
    assert all(scores["local", "ring", seed] == scores["local", "complete", seed] for seed in (0, 1))
    table = list(csv.reader((out / "scores.csv").open()))
    assert table[0] == [
        "metric",
        "algorithm",
        *(f"{g}, iid{end}" for g in ("ring", "complete") for end in ("", " (std)")),
    ]
    assert float(table[2][4]) == pytest.approx((scores["decaf", "complete", 0] + scores["decaf", "complete", 1]) / 2)
    assert r"\multicolumn{1}{c}{complete}" in (out / "scores.tex").read_text()
    assert (out / "scores.md").read_text().count("| decaf |") == 2
    page = (out / "report.html").read_text()
    assert page.count('class="pivot stack"') == 2
    assert page.count("<h2>complete · iid</h2>") == 1

    before = {p: p.stat().st_mtime_ns for p in out.glob("*/*") if p.is_file()}
    (out / "decaf-ring-iid-seed1" / "summary.json").unlink()  # as if it had been interrupted there
    capsys.readouterr()
    assert decaf(*arguments, "--resume", "--json") == 0
    assert json.loads(capsys.readouterr().out) == rows
    after = {p: p.stat().st_mtime_ns for p in out.glob("*/*") if p.is_file()}
    assert {p.parent.name for p in before if before[p] != after[p]} == {"decaf-ring-iid-seed1"}
    line = fails(capsys, *[a for a in arguments if a not in ("--scale", "0.04")], "--resume")
    assert "task.max_test: 0.04 -> None" in line


def test_vision_recipe_on_a_small_model_and_a_folder(clip, flowers, tmp_path, capsys):
    out = tmp_path / "run"
    arguments = ["run", "paper/flowers102", "--model", clip, "--data", flowers, "--scale", "0.004", "--out", out]
    own = ["--task.train_split", "train", "--task.test_split", "test", "--task.num_workers", "0"]
    assert decaf(*arguments, *own, *SMALL, "--partition", "up-to:40/by-class", "--graph", "bipartite") == 0
    assert "1 of 4 classes have fewer than 40 examples (at least 9)" in capsys.readouterr().err
    saved = config.load(RunConfig, out / "config.yaml")
    assert (saved.rounds, saved.training.epochs, saved.training.precision) == (2, 1, "bfloat16")
    facts = json.loads((out / "run.json").read_text())
    assert np.array(facts["partition"]["label_table"]).tolist() == np.diag([40, 40, 40, 9]).tolist()
    assert facts["partition"]["classes"] == [f"flower_{i}" for i in range(4)]
    assert facts["uses_graph"] is True
    line = fails(capsys, *arguments[:-1], tmp_path / "x", *own, *SMALL, "--partition", "shots:40")
    assert "class 3 has 9 examples, fewer than 40 shots; use at most 9 shots, or take what there is (up-to:40" in line


def test_what_the_recipe_asks_of_other_data_is_named(llama, senses, capsys):
    """A file has one split: the error says how to make a test set of it."""
    own = ["--model", llama, "--data", senses, "--task.max_length", "48"]
    line = fails(capsys, "run", "paper/wic", *own)
    assert "task.test_split: 'validation' is not known" in line
    assert "task.test_share 0.2" in line
    line = fails(capsys, "run", "paper/boolq", *own, "--task.test_share", "0.2")
    assert "task.templates: 'passage' is not known" in line
    line = fails(capsys, "run", "paper/wic", *own[:4], "--task.test_share", "0.2")
    assert "task.max_length: 256 is more than the model's limit of 64" in line


def test_a_recipe_without_hub_says_what_to_download(capsys):
    assert "hf download --repo-type dataset aps/super_glue" in fails(capsys, "run", "paper/wic")
    assert "ucf101-middle-frames does not exist; put the data there" in fails(capsys, "run", "paper/ucf101")


@pytest.mark.skipif(not DATA.exists(), reason=f"needs real data in {DATA}; set DECAF_DATA")
@pytest.mark.parametrize(("recipe", "name"), [("wic", "WiC"), ("boolq", "BoolQ")])
def test_the_prompts_fit_the_real_questions(recipe, name, llama, tmp_path, capsys):
    own = ["--model", llama, "--data", DATA / "superglue_val" / f"{name}.val.jsonl", "--task.test_share", "0.2"]
    own += ["--task.max_train", "40", "--task.max_length", "64", "--task.max_test", "10", "--scale", "0.04"]
    assert decaf("run", f"paper/{recipe}", *own, *SMALL, "--out", tmp_path / "r", "--json") == 0
    (row,) = json.loads(capsys.readouterr().out)
    assert 0 <= row["mean_score"] <= 1
    facts = json.loads((tmp_path / "r" / "run.json").read_text())
    assert facts["partition"]["classes"] == ["false", "true"]
    assert facts["score_name"] == "F1 (true)"


# Sweeps


def test_a_sweep_runs_what_has_no_graph_once():
    sweep = cells(recipes.get("paper/flowers102"))
    count = {name: sum(c.config.algorithm.name == name for c in sweep) for name in ALGORITHMS}
    once, each = 3 * 3, 4 * 3 * 3  # partitions x seeds, and graphs
    assert count == {a: each if a in ("dlora", "dlora_fa", "decaf") else once for a in ALGORITHMS}
    assert len({c.name for c in sweep}) == len(sweep)
    assert all("/" not in c.name and ":" not in c.name for c in sweep)
    shared = [c for c in sweep if c.config.algorithm.name in ("local", "fedavg", "centralized")]
    assert all(c.graphs == recipes.GRAPHS for c in shared)
    assert "local-up-to-40_by-class-seed2" in {c.name for c in shared}


def test_a_sweep_over_one_graph_keeps_its_names():
    names = {c.name for c in cells(recipes.get("digits"))}
    assert {"local-ring-dirichlet-0.1-seed0", "decaf-ring-dirichlet-0.1-seed2"} <= names
    assert sum(name.startswith("recommended-dirichlet-") for name in names) == 3
    assert len(names) == 21


def test_a_split_of_coop_becomes_a_folder_of_data(tmp_path, capsys):
    """Bytes as they were, names with the numbers; an absent image is named."""
    from decaf_lora import data

    images, splits = tmp_path / "frames", {"train": [], "val": [], "test": []}
    for number, label in enumerate(("Yo_Yo", "Archery")):
        (images / label).mkdir(parents=True)
        for i, split in enumerate(("train", "train", "val", "test")):
            Image.new("RGB", (8, 8), (i, number, 9)).save(images / label / f"v_{i}.png")
            splits[split].append([f"{label}/v_{i}.png", number, label])
    (tmp_path / "split.json").write_text(json.dumps(splits))
    command = [sys.executable, ROOT / "scripts" / "coop_split.py", images, tmp_path / "split.json", tmp_path / "out"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    (images / "Yo_Yo" / "v_0.png").rename(tmp_path / "moved.png")  # the folder needs the images no more
    found = data.load(TaskConfig(data=str(tmp_path / "out")), [], label="label", image="image")
    assert found.classes == ["Yo_Yo", "Archery"]
    assert found.labels.tolist() == [0, 0, 1, 1]
    assert found.test_labels.tolist() == [0, 1]
    assert found.train[0]["image"]["bytes"] == (tmp_path / "moved.png").read_bytes()
    command[-1] = tmp_path / "again"
    again = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert again.returncode == 1
    assert "1 of 8 images are not in" in again.stderr
    assert "first: Yo_Yo/v_0.png" in again.stderr
