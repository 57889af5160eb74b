"""The pages about graphs, partitions and algorithms of one's own: their files and commands work as written."""

import re
import shlex
from pathlib import Path

import pytest
import yaml

from decaf_lora import config
from decaf_lora.cli import main
from tiny import write

DOCS = Path(__file__).parents[1] / "docs"
pytestmark = [pytest.mark.filterwarnings("ignore::FutureWarning"), pytest.mark.usefixtures("datasets_cache")]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return str(write("bert", tmp_path_factory.mktemp("bert")))


@pytest.mark.parametrize("page", ["own-graph.md", "own-partition.md", "own-algorithm.md"])
def test_a_page_works_as_written(page, model, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    text = (DOCS / page).read_text()
    commands = []
    for before, language, code in re.findall(r"([^\n]*(?:\n[^\n]+)*)\n\n```(\w+)\n(.*?)```", text, re.DOTALL):
        if saved := re.search(r"Save\s+this\s+as\s+`([\w.]+)`", before):
            Path(saved[1]).write_text(code.replace("MODEL", model))
        elif language == "python":
            exec(compile(code, page, "exec"), {"__name__": "example"})
        elif language == "yaml":
            config.build(config.RunConfig, yaml.safe_load(code))
        elif language == "sh":
            commands += code.strip().splitlines()
        else:
            assert language == "toml"
    assert commands
    for command in commands:
        assert main(shlex.split(command)[1:]) == 0, capsys.readouterr().err
    runs = [path.parent for path in Path("runs").glob("*/config.yaml")] if Path("runs").exists() else []
    assert all((run / "report.html").exists() for run in runs)
    assert len(runs) == sum("--out" in command for command in commands)
