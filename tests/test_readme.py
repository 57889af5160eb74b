"""The README's Python example runs as written, and its layout names the files that are there."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


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


def test_the_layout_names_every_module():
    layout = README.split("## Layout")[1].split("## ")[0]
    modules = {p.name for p in (ROOT / "src" / "decaf_lora").rglob("*.py")} - {"__init__.py", "__main__.py"}
    scripts = {p.name for folder in ("benchmarks", "scripts") for p in (ROOT / folder).glob("*.py")}
    missing = {name for name in modules | scripts if name not in layout and name != "base.py"}
    assert not missing
    for name in re.findall(r"[\w/]+\.py", layout):
        assert list(ROOT.rglob(Path(name).name)), name


def test_links_into_the_repository_exist():
    for page in [ROOT / "README.md", *(ROOT / "docs").rglob("*.md")]:
        for target in re.findall(r"\]\((?!http)([^)#]+)\)", page.read_text()):
            assert (page.parent / target).exists(), f"{page.name}: {target}"
