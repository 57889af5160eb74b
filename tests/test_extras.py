"""A light core: what works without the libraries that the extras bring, and the one line where one is missing."""

import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from decaf_lora import extras

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]

WITHOUT = """
import sys
sys.path[:0] = [{helpers!r}]
for name in {names!r}:
    sys.modules[name] = None
"""

CORE = """
from toy import Toy
from decaf_lora import Run, algorithms, graphs, integrations, partition
from decaf_lora.adapters import merge
task = Toy()
with Run(task, algorithms.decaf(), graphs.ring(3), partition.iid(task.labels, 3, seed=0), rounds=2) as run:
    print(len(list(run.train())), integrations.GossipCallback.__name__)
    for agent in (0, 1):
        run.save_adapter(f"agent-{agent}", agent=agent)
merge(["agent-0", "agent-1"], "both")
"""

COMMANDS = """
from decaf_lora.cli import main
for line in {lines!r}:
    print(main(line.split()), file=sys.stderr)
"""


def in_a_process(code, names, folder):
    first = WITHOUT.format(names=sorted(names), helpers=str(Path(__file__).parent / "helpers"))
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", first + code], cwd=folder, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return done


def test_training_from_python_and_merging_need_no_extra(tmp_path):
    every = {name for names in extras.LIBRARIES.values() for name in names}
    assert in_a_process(CORE, every, tmp_path).stdout == "3 GossipCallback\n"
    assert (tmp_path / "both" / "adapter_model.safetensors").exists()


def test_commands_say_which_extra_is_missing(tmp_path):
    (tmp_path / "table.csv").write_text("text,label\na b,x\n")
    lines = {
        "compare digits": "report: matplotlib is missing; pip install 'decaf-lora[report]'.",
        "run digits --out run": "report: matplotlib is missing; pip install 'decaf-lora[report]'.",
        "init text table.csv": "data: datasets is missing; pip install 'decaf-lora[data]'.",
        "federation status fed.yaml --name alice": "mesh: grpc is missing; pip install 'decaf-lora[mesh]'.",
    }
    blocked = {"matplotlib", "datasets", "grpc"}
    done = in_a_process(COMMANDS.format(lines=list(lines)), blocked, tmp_path)
    assert done.stderr.splitlines() == [part for line in lines.values() for part in (f"decaf: {line}", "2")]
    assert [path.name for path in tmp_path.iterdir()] == ["table.csv"]


def test_the_demo_without_its_extra(tmp_path):
    line = "demo: sklearn is missing; pip install 'decaf-lora[demo]'."
    done = in_a_process(COMMANDS.format(lines=["run digits --out run"]), {"sklearn"}, tmp_path)
    assert done.stderr.splitlines() == [f"decaf: {line}", "2"]
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("extra", extras.LIBRARIES)
def test_every_extra_is_in_the_package_and_in_all(extra):
    given = PROJECT["optional-dependencies"]
    assert given[extra]
    brought = {part for one in given["all"] for part in [one, *given[one.removeprefix("decaf-lora[").rstrip("]")]]}
    assert f"decaf-lora[{extra}]" in brought
    extras.need(extra, "x")  # they are all here
