"""Every command that README and site show: the option is there, the file too, and what runs in seconds is run."""

import ast
import contextlib
import inspect
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from decaf_lora.cli import main
from decaf_lora.integrations import GossipCallback
from inputs import ROWS, model, table

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
PROGRAMS = ("decaf", "python", "make", "pip", "torchrun", "hf")
pytestmark = [pytest.mark.filterwarnings("ignore"), pytest.mark.usefixtures("datasets_cache")]


def commands_of(page: Path) -> list[list[str]]:
    """The words of every command of a page; prompts, comments and the path of a virtual environment are cut."""
    text = re.sub(r"\\\n\s*", "", page.read_text(encoding="utf-8"))
    blocks = re.findall(r"^```(?:sh|bash)\n(.*?)^```", text, re.DOTALL | re.MULTILINE)
    lines = [line for block in blocks for line in block.splitlines()] + re.findall(r"^    (\S.*)$", text, re.MULTILINE)
    found = []
    for line in lines:
        line = re.sub(r"^\w+\$\s+|^sudo -u \w+ ", "", line)
        program = re.match(r"(?:[\w./-]*/)?(\w*)(?=\s|$)", line)
        if program and program[1] in PROGRAMS:
            found.append([program[1], *shlex.split(line, comments=True)[1:]])
    return found


EVERY = [(page, words) for page in PAGES for words in commands_of(page)]


def named(pair):
    page, words = pair
    return f"{page.stem}: {shlex.join(words)}"


def test_commands_are_found():
    assert len(EVERY) > 100
    assert {words[0] for _, words in EVERY} == set(PROGRAMS)


def help_of(words: list[str], capsys) -> str:
    """The help of a `decaf` command with its options before it; a mistake in one fails the test."""
    capsys.readouterr()
    try:
        code = main([*words, "--help"])
    except SystemExit as end:
        code = end.code
    out, err = capsys.readouterr()
    assert not code, err
    return out


@pytest.mark.parametrize("pair", EVERY, ids=named)
def test_a_command_is_as_the_program_has_it(pair, tmp_path, monkeypatch, capsys):
    _, (program, *words) = pair
    options = [word.split("=")[0] for word in words if word.startswith("--")]
    if program == "make":
        for target in words:
            assert re.search(rf"^{target.split('=')[0]}\b", (ROOT / "Makefile").read_text(), re.MULTILINE), target
    elif program == "pip":
        extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
        (asked,) = re.findall(r"decaf-lora(?:\[(.*)\])?", words[-1])
        assert not asked or set(asked.split(",")) <= extras.keys()
    elif program == "hf":
        told = subprocess.run([Path(sys.executable).parent / "hf", words[0], "--help"], capture_output=True, text=True)
        assert told.returncode == 0, told.stderr
    elif program == "python" and words[0] != "-m":
        assert (ROOT / words[0]).is_file()
        shared = [ROOT / "benchmarks" / "study_runs.py", ROOT / "benchmarks" / "cells.py"]
        known = "".join(path.read_text() for path in (ROOT / words[0], *shared))
        assert {option for option in options if f'"{option}"' not in known} == set()
    elif program == "python" and words[1] != "decaf_lora":
        known = (ROOT / words[1].replace(".", "/") / "__main__.py").read_text()
        assert {option for option in options if f'"{option}"' not in known} == set()
    else:
        if "decaf_lora" in words:
            words = words[words.index("decaf_lora") + 1 :]
        monkeypatch.chdir(tmp_path)
        for word in words:  # what a command reads before it shows its help
            if word.endswith(".yaml"):
                there = ROOT / word
                Path(word).parent.mkdir(parents=True, exist_ok=True)
                Path(word).write_text(there.read_text() if there.exists() else "task: {name: digits}\n")
        if "--resume" in words:
            words = ["compare" if words[0] == "compare" else "run", "digits", *words[3:]]
            options.remove("--resume")
        shown = help_of(words, capsys)
        if words[0] == "federation":
            assert {option for option in options if option not in shown} == set()


# --- what a page shows, done in its order ------------------------------------------------------------------


SHORT = {
    "digits": ("--rounds", "1", "--training.steps", "1", "--training.agents_per_pass", "10"),
    "mine": ("--rounds", "2", "--training.steps", "1", "--training.agents_per_pass", "2"),
}
"""As written but for the length of the runs, to save minutes."""


@pytest.fixture(scope="module")
def desk(tmp_path_factory):
    """A folder with a table, a small model, configurations of the names that pages use, and a finished run."""
    desk = tmp_path_factory.mktemp("desk")
    base = model("bert", desk)
    table(desk / "mine.csv", [(text, label) for text, label in ROWS])
    config = f"task: {{name: sequence-classification, model: {base}, data: {desk / 'mine.csv'}, test_share: 0.3}}\n"
    config += "agents: 2\ngraph: ring\npartition: iid\nrounds: 2\ndevice: cpu\nlora: {r: 2, lora_alpha: 2}\n"
    config += "training: {steps: 1, batch_size: 2, agents_per_pass: 2}\n"
    for name in ("mine", "my", "support"):
        (desk / f"{name}.yaml").write_text(config)
    with contextlib.chdir(desk):
        assert main(["run", "mine.yaml", "--out", "runs/mine"]) == 0
        assert main(["compare", "mine.yaml", "--algorithms", "dlora", "--out", "runs/digits-20260101-120000"]) == 0
        for number, who in enumerate(("alice", "bob", "carol")):
            assert main(["export", "runs/mine", "--agent", str(number % 2), "--to", f"{who}/adapter"]) == 0
    return desk


def follow(page: str, desk: Path, monkeypatch, capsys, leave_out=(), replace=(), base=None) -> list[str]:
    """Does what the commands of a page say, in their order; `init` takes the model `base`. What was done."""
    monkeypatch.chdir(desk)
    done = []
    for program, *words in commands_of(ROOT / "docs" / page):
        line = shlex.join(words)
        if program != "decaf" or any(re.search(pattern, line) for pattern in leave_out):
            continue
        for old, new in replace:
            words = [new if word == old else word for word in words]
        if words[:2] == ["run", "digits"]:
            words += SHORT["digits"]
        elif words[0] == "run" and "--rounds" not in words and words[1].endswith(".yaml"):
            words += SHORT["mine"]
        elif words[0] == "init":
            words += ["--model", base]
        if words[0] == "merge":
            shutil.rmtree("merged", ignore_errors=True)
        assert main(words) == 0, (line, capsys.readouterr().err)
        done.append(line)
    assert done
    return done


def python_of(page: str) -> list[str]:
    return re.findall(r"```(?:python|py)\n(.*?)```", (ROOT / "docs" / page).read_text(encoding="utf-8"), re.DOTALL)


def test_quickstart(desk, tmp_path, monkeypatch, capsys):
    table(tmp_path / "visits.csv", [(text, label) for text, label in ROWS])
    table(tmp_path / "new.csv", ROWS[:6])
    elsewhere = ["^federation demo"]  # tests/mesh/test_mesh_agent.py has it
    done = follow("quickstart.md", tmp_path, monkeypatch, capsys, leave_out=elsewhere, base=str(desk / "bert"))
    assert [line.split()[0] for line in done] == ["run", "run", "export", "export", "init", "check", "run", "predict"]
    for made in ("adapters/agent-3/adapter_model.safetensors", "model/model.safetensors", "runs/visits/report.html"):
        assert Path(made).is_file()
    assert len(Path("predictions/predictions.csv").read_text().splitlines()) == 7
    (code,) = python_of("quickstart.md")
    exec(compile(code, "quickstart.md", "exec"), {})
    assert Path("adapter/adapter_config.json").is_file()


def test_folders(desk, monkeypatch, capsys):
    assert len(follow("folders.md", desk, monkeypatch, capsys)) == 3
    assert len(Path("runs/mine/records.jsonl").read_text().splitlines()) == 61


def test_report(desk, monkeypatch, capsys):
    pytest.importorskip("tensorboard")
    follow("report.md", desk, monkeypatch, capsys, leave_out=["--log trackio"])
    assert list(Path("figures").glob("*.pdf"))


def test_tune(desk, monkeypatch, capsys):
    follow("tune.md", desk, monkeypatch, capsys)
    assert Path("runs/tune/best.yaml").is_file()
    (code,) = python_of("tune.md")
    exec(compile(code.replace("runs/tune", "runs/found"), "tune.md", "exec"), {})


def test_merge(desk, monkeypatch, capsys):
    follow("merge.md", desk, monkeypatch, capsys, replace=[("BASE", str(desk / "bert"))])
    assert Path("merged/model").is_dir()
    shutil.rmtree("merged")
    (code,) = python_of("merge.md")
    exec(compile(code, "merge.md", "exec"), {})
    assert Path("merged/adapter_model.safetensors").is_file()


def test_plan(desk, monkeypatch, capsys):
    """A plan of 7 billion parameters takes a quarter of a minute; tests/test_plan.py has one."""
    assert len(follow("plan.md", desk, monkeypatch, capsys, leave_out=["paper/boolq"])) == 2
    (code,) = python_of("plan.md")
    exec(compile(code.replace("paper/boolq", "digits"), "plan.md", "exec"), {})


def test_privacy(desk, monkeypatch, capsys):
    pytest.importorskip("opacus")
    follow("privacy.md", desk, monkeypatch, capsys)


def test_hub(desk, monkeypatch, capsys):
    follow("hub.md", desk, monkeypatch, capsys)
    assert Path("adapters/averaged/README.md").is_file()


def test_attackers(desk, monkeypatch, capsys):
    follow("study-attackers.md", desk, monkeypatch, capsys)


def test_ranks(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["run", "digits", "--out", "first", *SHORT["digits"]]) == 0
    assert main(["export", "first", "--agent", "all", "--to", "adapters"]) == 0
    for place, agent in (("ours", 0), ("theirs", 2)):
        shutil.copytree(f"adapters/agent-{agent}", f"{place}/adapter")
    assert len(follow("ranks.md", tmp_path, monkeypatch, capsys)) == 4


def test_the_trainers_arguments():
    """The three scripts need several machines; tests/test_trainer*.py run such. Here: are these its arguments?"""
    calls = [
        call
        for code in python_of("trainer.md")
        for call in ast.walk(ast.parse(code))
        if isinstance(call, ast.Call) and ast.unparse(call.func).startswith("GossipCallback")
    ]
    assert len(calls) == 3
    for call in calls:
        function = GossipCallback.simulate if isinstance(call.func, ast.Attribute) else GossipCallback
        inspect.signature(function).bind(*call.args, **{word.arg: word.value for word in call.keywords})
