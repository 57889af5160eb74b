"""The command as users and scripts call it: results on disk, and one line and exit code 2 for every mistake."""

import contextlib
import dataclasses
import json
import os
import resource
import signal
import subprocess
import sys
import time
import warnings
from pathlib import Path

import numpy as np
import pytest
import yaml

from decaf_lora import graphs
from decaf_lora.cli import main
from decaf_lora.config import RunConfig, build, fields
from decaf_lora.records import read_records
from decaf_lora.runs import checkpoint
from decaf_lora.runs.build import build_run
from decaf_lora.runs.events import Interrupted, Subscriber
from decaf_lora.runs.folder import run
from forked import Command

TOY = f"{Path(__file__).parent / 'helpers' / 'toy.py'}:make_toy"
SMALL = [
    *("--task", TOY, "--agents", "3", "--rounds", "3", "--training.steps", "2", "--training.batch-size", "4"),
    *("--training.agents-per-pass", "3", "--partition", "iid", "--lora.lora-alpha", "4"),
]


def decaf(*arguments):
    return main([str(a) for a in arguments])


def fails(capsys, *arguments):
    """The one line that a mistake prints; asserts exit code 2, one line, no traceback."""
    capsys.readouterr()
    assert decaf(*arguments) == 2
    err = capsys.readouterr().err
    lines = [line for line in err.splitlines() if line.strip()]
    assert len(lines) == 1, err
    assert "Traceback" not in err
    assert lines[0].startswith("decaf: ")
    return lines[0]


@pytest.fixture
def finished(tmp_path, capsys):
    out = tmp_path / "run"
    assert decaf("run", "digits", *SMALL, "--out", out) == 0
    capsys.readouterr()
    return out


def test_a_run_leaves_its_folder(finished):
    assert {p.name for p in finished.iterdir()} == {
        "config.yaml",
        "environment.json",
        "run.json",
        "records.jsonl",
        "checkpoints",
        "summary.json",
        "report.html",
    }
    (row,) = json.loads((finished / "summary.json").read_text())
    assert list(row) == [
        *("algorithm", "graph", "partition", "seed", "mean_score", "worst_score", "std_score"),
        *("averaged_score", "bytes_sent", "seconds", "diverged", "lower_is_better", "start_score", "majority_score"),
        *("score_name", "scores", "alone_scores", "pooled_score", "own_score"),
    ]
    assert row["algorithm"] == "decaf"
    assert row["start_score"] == np.mean(read_records(finished / "records.jsonl")[0].scores)
    assert row["majority_score"] is None  # a task of one's own may have no classes
    assert row["graph"] == "ring"
    saved = yaml.safe_load((finished / "config.yaml").read_text())
    assert saved["training"]["steps"] == 2
    assert saved["agents"] == 3


@pytest.mark.parametrize("instructions", [None, "avx512_f", "avx_ne_convert"])
def test_bfloat16_on_a_processor_that_emulates_it(monkeypatch, instructions):
    known = {"architecture": "x86_64", "avx512_f": False} | ({instructions: True} if instructions else {})
    monkeypatch.setattr("torch.cpu.get_capabilities", lambda: known)
    config = build(RunConfig, {"task": {"name": "digits"}, "training": {"precision": "bfloat16", "agents_per_pass": 1}})
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        build_run(config).close()
    said = [str(w.message) for w in caught if "bfloat16" in str(w.message)]
    assert len(said) == (instructions is None)
    if said:
        assert said[0].startswith("training.precision: this processor has no instructions for bfloat16")
        assert said[0].endswith("; use --training.precision float32.")


def test_comparison_writes_summary_tables_and_report(tmp_path, capsys):
    out = tmp_path / "cmp"
    arguments = ["compare", "digits", *SMALL, "--seeds", "0", "1", "--algorithms", "local", "decaf", "fedavg"]
    assert decaf(*arguments, "--jobs", "1", "--out", out) == 0
    assert "decaf" in capsys.readouterr().out
    rows = json.loads((out / "summary.json").read_text())
    assert [(r["algorithm"], r["seed"]) for r in rows] == [(a, s) for s in (0, 1) for a in ("local", "decaf", "fedavg")]
    assert all((out / name).stat().st_size for name in ("report.html", "table.md", "table.csv", "table.tex"))
    before = (out / "summary.json").read_text()
    (out / "decaf-ring-iid-seed1" / "summary.json").unlink()  # as if it had been interrupted there
    assert decaf(*arguments, "--jobs", "2", "--out", out, "--resume", "--json") == 0
    again = json.loads(capsys.readouterr().out)
    assert [r["mean_score"] for r in again] == [r["mean_score"] for r in json.loads(before)]


def test_a_run_that_learns_nothing_says_so(tmp_path, capsys):
    assert decaf("run", "digits", *SMALL, "--lr", 1e-12, "--out", tmp_path / "r") == 0
    shown = capsys.readouterr().out
    assert "nothing useful was learnt by decaf (ring, " in shown
    assert "not better than the start (" in shown
    assert "training.learning_rate" in shown
    assert any(line.split()[:1] == ["start"] for line in shown.splitlines())
    assert "Nothing useful was learnt by DeCAF" in (tmp_path / "r" / "report.html").read_text()


def test_json_prints_rows(tmp_path, capsys):
    assert decaf("run", "digits", *SMALL, "--out", tmp_path / "r", "--json") == 0
    (row,) = json.loads(capsys.readouterr().out)
    assert row["bytes_sent"] > 0


def test_a_yaml_file_is_a_recipe(tmp_path, capsys):
    path = tmp_path / "mine.yaml"
    path.write_text(yaml.safe_dump({"task": {"name": TOY}, "agents": 2, "rounds": 1, "partition": "iid"}))
    assert decaf("run", path, "--training.agents_per_pass", 1, "--out", tmp_path / "r", "--json") == 0
    assert json.loads(capsys.readouterr().out)[0]["partition"] == "iid"


@pytest.mark.filterwarnings("ignore")
def test_names_that_scripts_rely_on(tmp_path, capsys):
    out, adapter, merged = tmp_path / "r", tmp_path / "a", tmp_path / "m"
    assert decaf("run", "digits", "--agents", 3, "--rounds", 2, "--training.agents_per_pass", 1, "--out", out) == 0
    assert decaf("export", out, "--agent", 1, "--to", adapter) == 0
    assert {p.name for p in adapter.iterdir()} >= {"adapter_config.json", "adapter_model.safetensors"}
    assert decaf("export", out, "--agent", "averaged", "--merge", "--to", merged) == 0
    from transformers import CLIPModel

    CLIPModel.from_pretrained(merged)
    assert "agent: 7 is not in this run; use 0 to 2" in fails(
        capsys, "export", out, "--agent", 7, "--to", tmp_path / "x"
    )
    assert "not an empty folder" in fails(capsys, "export", out, "--agent", 1, "--to", adapter)
    assert "neither a number" in fails(capsys, "export", out, "--agent", "one", "--to", tmp_path / "y")
    assert "holds no run" in fails(capsys, "export", tmp_path, "--to", tmp_path / "z")


def test_merged_export_gives_the_agents_logits(tmp_path, capsys, digits_task):
    """The merged model without PEFT against the agent's adapter through PEFT."""
    import torch
    from peft import PeftModel
    from transformers import CLIPModel

    from decaf_lora.tasks.demo import digits_data

    out = tmp_path / "r"
    small = ["--agents", 2, "--rounds", 2, "--training.agents_per_pass", 1, "--lr", 0.05]
    assert decaf("run", "digits", *small, "--out", out) == 0
    assert decaf("export", out, "--agent", 1, "--to", tmp_path / "a") == 0
    assert decaf("export", out, "--agent", 1, "--merge", "--to", tmp_path / "m") == 0
    base = CLIPModel.from_pretrained(digits_data.MODEL_DIR)
    with torch.no_grad():
        pixels = digits_task.test_batch(np.arange(8))["pixel_values"]
        plain = base.get_image_features(pixel_values=pixels).pooler_output
        adapted = PeftModel.from_pretrained(base, tmp_path / "a").get_image_features(pixel_values=pixels)
        merged = CLIPModel.from_pretrained(tmp_path / "m").get_image_features(pixel_values=pixels)
    torch.testing.assert_close(merged.pooler_output, adapted.pooler_output, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(plain, merged.pooler_output, atol=1e-3)


# Mistakes


def test_unknown_names_suggest_the_nearest(capsys):
    assert "Did you mean 'digits'" in fails(capsys, "run", "digit")
    assert "Did you mean 'compare'" in fails(capsys, "compar", "digits")
    assert "Did you mean --algorithm.gauge" in fails(capsys, "run", "digits", "--gauge", "balanced")
    assert "Did you mean --training.steps" in fails(capsys, "run", "digits", "--training.step", 3)
    assert "Did you mean 'ring'" in fails(capsys, "run", "digits", "--graph", "rin")
    assert "Did you mean 'dirichlet'" in fails(capsys, "run", "digits", "--partition", "dirichle:1")
    assert "Did you mean 'decaf'" in fails(capsys, "run", "digits", "--algorithm", "decav")
    assert "Did you mean 'digits'" in fails(capsys, "run", "digits", "--task", "digit")
    assert "name a recipe" in fails(capsys, "run", "--agents", 3)


BAD_VALUES = {
    "--agents 0": "agents: ",
    "--agents x": "agents",
    "--training.steps 0": "training.steps: ",
    "--training.learning_rate -1": "training.learning_rate: ",
    "--training.agents_per_pass 0": "agents_per_pass must be at least 1",
    "--training.schedule cos": "training.schedule",
    "--rounds 0": "rounds: ",
    "--lora.r 0": "lora.r: ",
    "--lora.lora_dropout 1": "lora.lora_dropout: ",
    "--partition dirichlet:0": "alpha",
    "--partition dirichlet:-1": "alpha",
    "--agents 1": "agents: decaf needs at least 2 agents",
    "--agents 900 --partition iid": "900 agents but only",
    "--algorithm dlora --algorithm.gauge balanced": "algorithm.gauge: dlora does not take this option",
    "--algorithm.gauge balance": "algorithm.gauge: 'balance' is not known. Did you mean 'balanced'",
    "--lora.r 65": "lora.r: rank 65 is larger than",
    "--lora.target_modules q_projj": "lora.target_modules: q_projj matches no linear layer",
    "--graph torus:2x3": "graph: ",
    "--graph torus:99999x999999": "graph: torus:99999x999999 has more than 100000 agents",
    "--graph torus:99999x99999": "graph: torus:99999x99999 has more than 100000 agents",
    "--graph nowhere.npy": "nowhere.npy",
    "--graph one-peer-hypercube --agents 10": "use 8 or 16 agents",
    "--gossip-steps 0": "gossip_steps: must be at least 1, or period",
    "--gossip-steps period --graph random-matching": "gossip_steps: random-matching never starts again",
    "--algorithm.tracking_gamma 0": "algorithm.tracking_gamma: ",
    "--algorithm fedavg --algorithm.tracking True": "algorithm.tracking: fedavg does not take this option",
    "--algorithm.relay_rank 0": "algorithm.relay_rank: ",
    "--algorithm.truncation_feedback 2": "algorithm.truncation_feedback: ",
    "--algorithm dlora --algorithm.truncation_feedback 1": "algorithm.truncation_feedback: dlora does not take",
    "--algorithm.quasi_global 1": "algorithm.quasi_global: ",
    "--algorithm.quasi_global 0.9 --algorithm.moments reset": "algorithm.quasi_global: it needs the moments",
    "--algorithm fedavg --algorithm.messages int8": "algorithm.messages: fedavg does not take this option",
    "--algorithm.messages int8 --algorithm.relay_rank 4": "algorithm.messages: int8 cannot be combined with",
    "--device cuda:9": "device: 'cuda:9' cannot be used here",
    "--device meta": "device: 'meta' cannot be used here",
    "--task nowhere.py:make": "nowhere.py does not exist",
    "--task nomodule:make": "cannot import 'nomodule'",
    "--task json:loads2": "has no function 'loads2'",
}


@pytest.mark.parametrize("arguments", list(BAD_VALUES))
def test_bad_values_name_the_field_and_write_nothing(capsys, tmp_path, arguments):
    out = tmp_path / "run"
    line = fails(capsys, "run", "digits", *arguments.split(), "--out", out)
    assert BAD_VALUES[arguments] in line
    assert not out.exists()


def test_a_folder_with_too_long_a_name_is_one_line(capsys, tmp_path):
    for command in ("run", "compare"):
        line = fails(capsys, command, "digits", *SMALL, "--out", tmp_path / ("x" * 300))
        assert "out: cannot write in" in line
        assert "File name too long" in line


def test_bad_matrices_name_the_row(capsys, tmp_path):
    weights = np.full((3, 3), 1 / 3)
    weights[1, 2] = 0.5
    np.save(tmp_path / "w.npy", weights)
    assert "row 1" in fails(capsys, "run", "digits", *SMALL, "--graph", tmp_path / "w.npy")
    apart = np.array([[0.5, 0.5, 0], [0.5, 0.5, 0], [0, 0, 1.0]])
    np.savetxt(tmp_path / "w.csv", apart, delimiter=",")
    line = fails(capsys, "run", "digits", *SMALL, "--graph", tmp_path / "w.csv")
    assert "connected" in line
    assert "2" in line


def test_bad_files(capsys, tmp_path):
    path = tmp_path / "c.yaml"
    assert "cannot read" in fails(capsys, "run", path)
    path.write_text("a: [1")
    assert "is not YAML" in fails(capsys, "run", path)
    path.write_text("training: {step: 3}")
    assert "training.step: unknown field. Did you mean training.steps?" in fails(capsys, "run", path)
    path.write_text("agents: many")
    assert "agents: " in fails(capsys, "run", path)


def test_debug_shows_the_traceback():
    with pytest.raises(ValueError, match="recipe"):
        decaf("run", "digit", "--debug")


def test_an_existing_run_is_not_overwritten(capsys, finished):
    before = {p: p.read_bytes() for p in finished.rglob("*") if p.is_file()}
    assert "already holds a run; pass --resume" in fails(capsys, "run", "digits", *SMALL, "--out", finished)
    line = fails(capsys, "run", "digits", *SMALL, "--out", finished, "--resume", "--seed", 5, "--lr", 0.1)
    assert "training.learning_rate: 0.01 -> 0.1" in line.replace("0.02 ->", "0.01 ->")
    assert "seed: 0 -> 5" in line
    assert {p: p.read_bytes() for p in finished.rglob("*") if p.is_file()} == before
    (finished.parent / "full").mkdir()
    (finished.parent / "full" / "thesis.txt").write_text("x")
    assert "is not empty" in fails(capsys, "run", "digits", *SMALL, "--out", finished.parent / "full")
    assert "holds no run" in fails(capsys, "run", "digits", *SMALL, "--out", finished.parent / "new", "--resume")
    assert "is a file" in fails(capsys, "run", "digits", *SMALL, "--out", finished / "config.yaml")


def test_nan_loss_stops_and_keeps_the_checkpoint(capsys, tmp_path):
    """A learning rate that blows up: agent and round are named, what was saved stays readable."""
    out = tmp_path / "r"
    line = fails(
        capsys,
        *("run", "digits", *SMALL, "--rounds", 200, "--checkpoint-every", 1, "--out", out),
        *("--training.optimizer", "sgd", "--lr", "1e6", "--training.schedule", "constant"),
    )
    assert "is not finite in round" in line
    assert "loss of agent" in line
    found = checkpoint.load_latest(out / "checkpoints")
    assert found is None or found[1]["round"] >= 1
    assert (out / "config.yaml").exists()


@pytest.mark.parametrize("jobs", [1, 2])
def test_a_comparison_outlives_a_run_that_diverges(capsys, tmp_path, jobs):
    """The others finish, the tables say so, the exit code tells scripts; --resume does not run it again."""
    out = tmp_path / "cmp"
    path = tmp_path / "blown.yaml"
    names = ("local", "dlora", "decaf")
    values = {"algorithms": list(names), "seeds": [0, 1], "learning_rates": {"dlora": 1e9}, "rounds": 6}
    training = {"optimizer": "sgd", "steps": 2, "batch_size": 4, "agents_per_pass": 3, "learning_rate": 0.01}
    task = {"name": TOY}
    path.write_text(yaml.safe_dump(values | {"task": task, "agents": 3, "partition": "iid", "training": training}))
    arguments = ["compare", path, "--jobs", jobs, "--out", out]
    assert decaf(*arguments) == 2
    printed = capsys.readouterr()
    *_, line = printed.err.splitlines()
    assert line.startswith("decaf: 2 runs have diverged, the first is dlora, ring, iid, seed 0: training: the ")
    assert "not finite" in line
    assert "diverged" in printed.out
    rows = {(r["algorithm"], r["seed"]): r for r in json.loads((out / "summary.json").read_text())}
    assert list(rows) == [(name, seed) for seed in (0, 1) for name in names]
    for (name, _), row in rows.items():
        assert (row["mean_score"] is None) == (row["diverged"] is not None) == (name == "dlora")
    table = {line.split(" |")[0]: line for line in (out / "table.md").read_text().splitlines()}
    assert "| diverged | diverged | diverged | diverged |" in table["| dlora"]
    assert "diverged" not in table["| decaf"]
    page = (out / "report.html").read_text()
    assert "diverged" in page
    before = {p: p.stat().st_mtime_ns for p in out.glob("*/*") if p.is_file()}
    assert decaf(*arguments, "--resume") == 2
    assert {p: p.stat().st_mtime_ns for p in out.glob("*/*") if p.is_file()} == before


@pytest.mark.skipif(os.geteuid() == 0 and not Path("/proc/self/mounts").exists(), reason="needs a read-only place")
def test_a_place_that_cannot_be_written(capsys):
    line = fails(capsys, "run", "digits", *SMALL, "--out", "/proc/decaf-run")
    assert "out: cannot write in /proc/decaf-run" in line


def _fill_disk():
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (3000, 3000))


def test_a_full_disk_keeps_the_earlier_checkpoint(tmp_path):
    """A real file size limit (as a full disk: the write fails) in a child process."""
    out = tmp_path / "r"
    arguments = ["run", "digits", *SMALL, "--rounds", "9", "--checkpoint-every", "1", "--out", out]
    code, err = Command(tmp_path / "full", *arguments, before=_fill_disk).ended()
    lines = [line for line in err.splitlines() if line.startswith("decaf: ")]
    assert code == 2, err
    assert len(lines) == 1
    assert "cannot write" in lines[0]
    assert "kept" in lines[0]
    assert "Traceback" not in err
    code, err = Command(tmp_path / "resumed", *arguments, "--resume").ended()
    assert code == 0, err


def test_ctrl_c_leaves_a_checkpoint_and_resume_equals_uninterrupted(tmp_path):
    """A real SIGINT to a real process, started as a user starts it, in mid-run."""
    arguments = ["run", "digits", *SMALL, "--rounds", "400", "--checkpoint-every", "50", "--evaluate-every", "400"]
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    command = [sys.executable, "-m", "decaf_lora", *arguments]
    process = subprocess.Popen([*command, "--out", str(cut)], stderr=subprocess.PIPE, text=True)
    records = cut / "records.jsonl"
    for _ in range(2400):
        if records.exists() and len(records.read_text().splitlines()) > 5:
            break
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130, err
    assert f"Go on with: decaf run --resume {cut} --task {TOY}" in err
    assert "--resume" in err
    assert "Traceback" not in err
    done = json.loads(records.read_text().splitlines()[-1])["round"]
    assert 0 < done < 400
    for extra in (["--out", str(cut), "--resume"], ["--out", str(whole)]):
        code, err = Command(tmp_path / "log", *arguments, *extra).ended()
        assert code == 0, err

    def tensors(out):
        return checkpoint.load_latest(out / "checkpoints")[0]

    ours, theirs = tensors(cut), tensors(whole)
    assert ours.keys() == theirs.keys()
    assert all((ours[k] == theirs[k]).all() for k in ours)

    def lines(out):
        rows = [json.loads(line) for line in (out / "records.jsonl").read_text().splitlines()]
        return [{k: v for k, v in row.items() if k != "seconds"} for row in rows]

    assert lines(cut) == lines(whole)


class Impatient(Subscriber):
    """Presses Ctrl-C as soon as the run starts."""

    def start(self, facts):
        os.kill(os.getpid(), signal.SIGINT)


def test_ctrl_c_before_the_first_step_and_resume(tmp_path):
    """The record of the start is in the file once."""
    config = build(RunConfig, {"task": {"name": TOY}, "agents": 3, "rounds": 2, "partition": "iid"} | {
        "lora": {"target_modules": ["first", "second"]}, "training": {"steps": 2, "agents_per_pass": 3}})  # fmt: skip
    with pytest.raises(Interrupted):
        run(config, tmp_path / "cut", watch=lambda name: Impatient())
    assert [r.round for r in read_records(tmp_path / "cut" / "records.jsonl")] == [0]
    run(config, tmp_path / "cut", resume=True)
    run(config, tmp_path / "whole")
    ours, theirs = (read_records(tmp_path / k / "records.jsonl") for k in ("cut", "whole"))
    assert [dataclasses.replace(r, seconds={}) for r in ours] == [dataclasses.replace(r, seconds={}) for r in theirs]


@pytest.mark.parametrize("jobs", [1, 2])
def test_a_comparison_says_a_warning_once(tmp_path, jobs):
    arguments = ["compare", "digits", *SMALL, "--partition", "up-to:1000", "--seeds", "0", "1", "--jobs", str(jobs)]
    arguments += ["--algorithms", "local", "decaf", "--out", str(tmp_path / "cmp")]
    code, err = Command(tmp_path / "log", *arguments).ended()
    assert code == 0, err
    assert err.count("decaf: warning: partition: ") == err.count("fewer than 1000 examples") == 1
    assert "UserWarning" not in err
    progress = [line for line in err.splitlines() if line.startswith("[")]
    assert [line.split()[0] for line in progress] == ["[1/4]", "[2/4]", "[3/4]", "[4/4]"]


def test_ctrl_c_in_a_comparison_of_two_processes(tmp_path):
    """SIGINT to the whole process group of a command, as a terminal sends it; then resume ends with every row."""
    out = tmp_path / "cmp"
    arguments = ["compare", "digits", *SMALL, "--rounds", "300", "--evaluate-every", "300", "--seeds", "0", "1"]
    arguments += ["--algorithms", "decaf", "dlora", "--jobs", "2", "--out", str(out)]
    command = [sys.executable, "-m", "decaf_lora", *arguments]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, start_new_session=True)
    for _ in range(2400):
        if any(len(p.read_text().splitlines()) > 3 for p in out.glob("*/records.jsonl")):
            break
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGINT)
    _, err = process.communicate(timeout=90)
    assert process.returncode == 130, err
    assert "Traceback" not in err
    assert "Go on with: decaf compare --resume" in err
    assert not (out / "summary.json").exists()
    code, err = Command(tmp_path / "log", *arguments, "--resume").ended()
    assert code == 0, err
    rows = json.loads((out / "summary.json").read_text())
    assert [(r["algorithm"], r["seed"]) for r in rows] == [("decaf", 0), ("dlora", 0), ("decaf", 1), ("dlora", 1)]


def test_ctrl_c_while_two_processes_load(tmp_path):
    """No run starts after a Ctrl-C that came while the task was loading: it would go on to its end."""
    toy = (Path(__file__).parent / "helpers" / "toy.py").read_text()
    slow = f"    Path({str(tmp_path / 'loading')!r}).touch()\n    time.sleep(3)\n    return Toy()\n"
    (tmp_path / "slow.py").write_text(f"import time\nfrom pathlib import Path\n\n{toy}\n\ndef make():\n{slow}")
    out = tmp_path / "cmp"
    arguments = ["compare", "digits", *SMALL, "--task", f"{tmp_path / 'slow.py'}:make", "--rounds", "1000000"]
    arguments += ["--seeds", "0", "1", "--algorithms", "decaf", "dlora", "--jobs", "2", "--out", str(out)]
    command = Command(tmp_path / "log", *arguments)
    try:
        while not (tmp_path / "loading").exists() and command.process.exitcode is None:
            time.sleep(0.05)
        time.sleep(0.5)
        os.killpg(command.process.pid, signal.SIGINT)
        code, err = command.ended()
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(command.process.pid, signal.SIGKILL)
    assert code == 130, err
    assert "Traceback" not in err
    assert "decaf: stopped before anything was written." in err


# graph, recipes, help


def test_graph_shows_and_draws(capsys, tmp_path):
    assert decaf("graph", "ring", "-n", 10, "--save", tmp_path / "g.png") == 0
    out = capsys.readouterr().out
    assert "sigma 2: 0.872678" in out
    assert (tmp_path / "g.png").read_bytes().startswith(b"\x89PNG")
    assert decaf("graph", "bipartite:8+2", "-n", 10, "--json") == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["sigma_2"] == pytest.approx(0.78, abs=1e-9)
    assert len(facts["weights"]) == 10
    assert decaf("graph", "ring", "-n", 100) == 0
    assert "100 x 100, wider than this window" in capsys.readouterr().out
    assert "save: " in fails(capsys, "graph", "ring", "--save", tmp_path / "no" / "g.png")


GRAPHS_OVER_TIME = {
    "base:3 -n 10": (
        *("period: 4 rounds", "exact average: after 4 rounds", "sigma 2 of the period: 0", "messages per round: 11.5"),
        "round 3: 10 messages, 0-5 1-6 2-7 3-8 4-9",
    ),
    # The sigma_2 of three rounds of the Fourier transform: max over frequencies of |prod_t cos(pi f 2^t / 6)|.
    "one-peer-exponential -n 6": (
        "exact average: never",
        "sigma 2 of the period: 0.216506",
        "sigma 2 per round: 0.6004",
    ),
    "one-peer-hypercube -n 8": ("exact average: after 3 rounds", "sigma 2 per round: 0", "messages per round: 8"),
    "random-matching -n 8": ("period: none", "sigma 2 per round, mean of 100 rounds: 0.71", "100 rounds: 8"),
}


@pytest.mark.parametrize("arguments", list(GRAPHS_OVER_TIME))
def test_graph_tells_of_a_schedule(capsys, arguments):
    assert decaf("graph", *arguments.split()) == 0
    out = capsys.readouterr().out
    for line in GRAPHS_OVER_TIME[arguments]:
        assert line in out


BAD_GRAPHS = {
    "hypercube -n 10": "10 agents cannot form a hypercube (it needs a power of 2); use 8 or 16 agents.",
    "one-peer-hypercube -n 3": "3 agents cannot form a one-peer-hypercube (it needs a power of 2); use 2 or 4 agents.",
    "torus -n 13": "13 agents cannot form a torus (it needs at least 2 rows); use 12 or 14 agents.",
    "torus:2x5 -n 11": "torus:2x5 has 10 agents but the run has 11, and 11 agents cannot form a torus "
    "(it needs at least 2 rows); use 10 or 12 agents.",
    "torus:2x5 -n 12": "torus:2x5 has 10 agents but the run has 12; use 10 agents, or torus:3x4 for 12.",
    "bipartite:8+2 -n 11": "has 10 agents but the run has 11; use 10 agents, or bipartite:9+2 for 11.",
    "complete-bipartite:5+5 -n 7": "use 10 agents, or complete-bipartite:4+3 for 7.",
    "random-regular:3 -n 9": "9 agents cannot form a random-regular:3 (agents x degree must be even); use 8 or 10",
    "random-regular:4 -n 3": "3 agents cannot have 4 neighbours each; use a degree of at most 2, or at least 5 agents.",
    "random-regular:3 -n 3": "3 agents cannot have 3 neighbours each; use a degree of at most 2, or at least 4 agents.",
    "erdos-renyi:0.01 -n 40": "none of 1000 draws with edge probability 0.01 connected all 40 agents; raise it above",
    "random-edges:0.0001 -n 5": "schedule: 1000 rounds of random-edges:0.0001 do not connect all 5 agents",
    "failing:0.9999:ring -n 5": "schedule: 1000 rounds of failing:0.9999:ring do not connect all 5 agents",
    "failing:0.1:hypercube -n 6": "6 agents cannot form a hypercube (it needs a power of 2); use 4 or 8 agents.",
    "apart.npy -n 4": "schedule: agents 2, 3 cannot be reached from agent 0; link them in some round of the period.",
    "ring.npy -n 5": "ring.npy has 4 agents but the run has 5; use 4 agents.",
    "low.npy -n 4": "graph: round 1 of low.npy: row 2 of the weights sums to 0.9, not 1",
}


@pytest.mark.parametrize("arguments", list(BAD_GRAPHS))
def test_graphs_that_cannot_be_are_one_line(capsys, tmp_path, monkeypatch, arguments):
    """And the nearest number of agents that can."""
    monkeypatch.chdir(tmp_path)
    half, alone = np.full((2, 2), 0.5), np.eye(2)
    pair = np.block([[half, 0 * half], [0 * half, alone]])
    np.save("ring.npy", graphs.ring(4).weights)
    np.save("apart.npy", [pair, np.eye(4)])
    np.save("low.npy", [graphs.ring(4).weights, np.diag([1, 1, 0.9, 1])])
    assert BAD_GRAPHS[arguments] in fails(capsys, "graph", *arguments.split())
    spec, _, agents = arguments.split()
    line = fails(capsys, "run", "digits", "--graph", spec, "--agents", agents, "--out", tmp_path / "run")
    assert BAD_GRAPHS[arguments] in line
    assert not (tmp_path / "run").exists()


def test_help_and_recipes(capsys):
    assert decaf() == 0
    assert "decaf compare" in capsys.readouterr().out
    assert decaf("recipes", "--json") == 0
    assert "digits" in json.loads(capsys.readouterr().out)
    for command in ("run", "compare"):
        with pytest.raises(SystemExit) as stop:
            decaf(command, "digits", "--help")
        assert stop.value.code == 0
        first = capsys.readouterr().out
        assert "--training.learning-rate" not in first
        assert all(f"--{option} " in first for option in ("rounds", "graph", "partition", "algorithm.name", "out"))
        for group in ("task", "lora", "training"):  # the others, each with what it is about
            assert f"\n  {group} " in first
        with pytest.raises(SystemExit):
            decaf(command, "digits", "--lr", 0.5, "--help", "training", "lora")
        asked = capsys.readouterr().out
        assert "--training.learning-rate FLOAT" in asked
        assert "--lora.r INT" in asked
        assert "--rounds" not in asked
        with pytest.raises(SystemExit):
            decaf(command, "digits", "--help", "all")
        everything = capsys.readouterr().out
        for option in fields(RunConfig):
            assert f"--{option.replace('_', '-')}" in everything
        assert "None" not in first + asked + everything
    assert "there is no group 'trainig'" in fails(capsys, "run", "digits", "--help", "trainig")
    with pytest.raises(SystemExit):
        decaf("graph", "--help")
    assert "erdos-renyi:0.4" in capsys.readouterr().out
    assert decaf("--version") == 0


def test_report_writes_its_figures(finished, tmp_path, capsys):
    assert decaf("report", finished, "--figures", tmp_path / "figures") == 0
    names = {p.name for p in (tmp_path / "figures").iterdir()}
    assert {"score-by-round.png", "training-loss-by-round.png", "who-holds-what.png"} <= names
    assert all(p.read_bytes().startswith(b"\x89PNG") for p in (tmp_path / "figures").iterdir())
    assert "nowhere" in fails(capsys, "report", tmp_path / "nowhere")
