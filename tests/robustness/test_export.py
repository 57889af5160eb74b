"""What a run leaves must be whole: in a fresh process, PEFT and transformers give the run's own scores with it.

The models are the tiny ones of `helpers/tiny.py`; runs are made in this process, and one other process loads what was
exported, as a user would.
"""

import json
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from huggingface_hub import ModelCard
from peft import LoraConfig, PeftModel, get_peft_model
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor

import tiny
from decaf_lora import config as configs
from decaf_lora import data
from decaf_lora.cli import main
from decaf_lora.records import read_records
from decaf_lora.runs import checkpoint
from decaf_lora.runs.build import build_run
from decaf_lora.runs.export import export

pytestmark = pytest.mark.filterwarnings("ignore")

SHORT = (
    *("--agents", 2, "--rounds", 2, "--training.steps", 3, "--training.batch_size", 4, "--partition", "iid"),
    *("--device", "cpu", "--evaluate_every", 2, "--lr", 0.05, "--training.agents_per_pass", 2),
)
NAMES = ("maybe", "no", "yes")
WORDS = ("good", "old", "big")
SUBJECTS = ("cat", "dog", "bird", "tree", "mat", "sky")
TEXTS = [
    (f"{the} {a} {verb} {word}", NAMES[(i + (k % 5 == 0)) % 3])  # a rule with exceptions: scores differ from 0 and 1
    for k, (the, a, verb) in enumerate((t, a, v) for t in ("the", "a") for a in SUBJECTS for v in ("is", "was not"))
    for i, word in enumerate(WORDS)
]


def decaf(*arguments: Any) -> int:
    return main([str(argument) for argument in arguments])


def fails(capsys: pytest.CaptureFixture[str], *arguments: Any) -> str:
    """The one line of a mistake."""
    capsys.readouterr()
    assert decaf(*arguments) == 2
    err = capsys.readouterr().err.strip()
    assert "Traceback" not in err
    assert err.count("\n") == 0, err
    return err


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with data for every task."""
    place = tmp_path_factory.mktemp("export")
    rows = "".join(f"{text},{label}\n" for text, label in TEXTS)
    (place / "a.csv").write_text("text,label\n" + rows)
    (place / "a.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text, _ in TEXTS))
    for split, chosen in (("train", TEXTS[1::2]), ("test", TEXTS[::2])):
        (place / "pairs").mkdir(exist_ok=True)
        rows = "".join(f"{text},{text[::-1]},{label}\n" for text, label in chosen)
        (place / "pairs" / f"{split}.csv").write_text("text,other,label\n" + rows)
    draw = np.random.default_rng(0)
    for split in ("train", "test"):
        for k, name in enumerate(("big_cat", "small dog", "bird")):
            folder = place / "album" / split / name
            folder.mkdir(parents=True)
            for i in range(6):
                pixels = draw.integers(0, 90, (20, 20, 3)).astype(np.uint8)
                pixels[..., (k + (i > 3)) % 3] += 60
                image = Image.fromarray(pixels[: 20 - 8 * (i == 2)])
                exif = image.getexif()
                exif[0x0112] = 6 if i == 2 else 1  # a camera that was held upright: to be turned by 90 degrees
                image.save(folder / f"{i}.png", exif=exif)
    return place


@pytest.fixture(scope="module")
def model(place: Path) -> Callable[[str], Path]:
    def find(family: str) -> Path:
        if family == "half":  # saved in bfloat16, and loaded in float32 by the run
            if not (place / family).exists():
                shutil.copytree(find("bert"), place / family)
                whole = transformers.AutoModel.from_pretrained(place / "bert")
                whole.to(torch.bfloat16).save_pretrained(place / family)
            return place / family
        if family == "nli":  # fine-tuned already, with the classes in an order of its own
            if not (place / family).exists():
                config = transformers.BertConfig(**tiny.SMALL, id2label=dict(enumerate(("yes", "no", "maybe"))))
                with torch.random.fork_rng():
                    torch.manual_seed(0)
                    tuned = transformers.BertForSequenceClassification(config)
                    for parameter in tuned.parameters():
                        if parameter.dim() > 1:
                            torch.nn.init.normal_(parameter, std=0.3)
                    tuned.save_pretrained(place / family)
                tiny.tokenizer().save_pretrained(place / family)
            return place / family
        return place / family if (place / family).exists() else tiny.write(family, place / family)

    return find


TASKS: dict[str, tuple[str, dict[str, Any]]] = {
    "sequence-classification": ("bert", {"data": "a.csv", "test_share": 0.3}),
    "decoder with a head": ("gpt2", {"name": "sequence-classification", "data": "a.csv", "test_share": 0.3}),
    "causal-lm": ("llama", {"data": "a.jsonl", "test_share": 0.3}),
    "image-text": ("clip", {"data": "album", "templates": "the photo of {}"}),
    "many prompts": ("clip", {"name": "image-text", "data": "album", "templates": ("a photo of {}", "the old {}")}),
    "two texts": ("bert", {"data": "pairs", "text_pair_column": "other", "name": "sequence-classification"}),
    "half numbers": ("half", {"name": "sequence-classification", "data": "a.csv", "test_share": 0.3}),
    "order of its own": ("nli", {"name": "sequence-classification", "data": "a.csv", "test_share": 0.3}),
    "unequal ranks": (
        "bert",
        {"name": "sequence-classification", "data": "a.csv", "test_share": 0.3, "lora.ranks": (1, 3)},
    ),
    "unequal scales": ("llama", {"name": "causal-lm", "data": "a.jsonl", "test_share": 0.3, "lora.alphas": (2, 9)}),
}


@pytest.fixture(scope="module")
def runs(place: Path, model: Callable[[str], Path], datasets_cache: None) -> dict[str, Path]:
    """A finished run of every task."""
    folders = {}
    for name, (family, options) in TASKS.items():
        folders[name] = place / "runs" / name.replace(" ", "-")
        task = {"name": name, "model": model(family), **options}
        task["data"] = place / task["data"]
        given = []
        for key, value in task.items():
            given += [
                f"--{key}" if "." in key else f"--task.{key}",
                *([value] if not isinstance(value, tuple) else value),
            ]
        assert decaf("run", "digits", *SHORT, *given, "--out", folders[name]) == 0
    return folders


FRESH = """
import json, sys, warnings
from pathlib import Path
import torch, transformers
warnings.simplefilter("ignore")
transformers.utils.logging.set_verbosity_error()
place, found = Path(sys.argv[1]), {}

def of_card(directory):
    # Does what the card tells its reader to do.
    code = (directory / "README.md").read_text().split("```python")[1].split("```")[0]
    scope = {}
    exec(code[: code.rindex("print(")].replace("DIRECTORY", str(directory)), scope)
    return scope

rows = json.loads((place / "asked.json").read_text())
for directory in sorted(place.glob("out/*/*")):
    task = json.loads((directory / "decaf_lora.json").read_text())["task"]
    scope = of_card(directory)
    if task["use"] == "sequence-classification":
        pairs = rows["pairs" if len(task["columns"]) == 2 else "texts"]
        answers = [scope["classify"]([text])[0] for text, _ in pairs]
        answers = [answer["label"] for answer in answers]
        score = sum(a == label for a, (_, label) in zip(answers, pairs)) / len(answers)
    elif task["use"] == "image-text":
        names = {shown: name for shown, name in zip(task["prompt_names"], task["labels"])}
        options = {"candidate_labels": task["prompt_names"], "hypothesis_template": task["templates"][0]}
        options = options if len(task["templates"]) == 1 else {}
        answers = [names[scope["classify"](path, **options)[0]["label"]] for path, _ in rows["images"]]
        score = sum(a == label for a, (_, label) in zip(answers, rows["images"])) / len(answers)
    else:
        model, tokenizer = scope["write"].model, scope["write"].tokenizer
        total = count = 0
        for text in rows["plain"]:
            ids = torch.tensor([tokenizer(text)["input_ids"] + [tokenizer.eos_token_id]])
            with torch.no_grad():
                logits = model(ids).logits.log_softmax(-1)[0, :-1]
            total += float(logits.gather(1, ids[0, 1:, None]).sum())
            count += ids.shape[1] - 1
        score = total / count
    found[f"{directory.parent.name}/{directory.name}"] = score
print("FOUND", json.dumps(found))
"""


def test_a_fresh_process_gives_the_runs_own_scores(place: Path, runs: dict[str, Path]) -> None:
    """Adapters and merged models of every task, loaded as their own cards say, to the last test example."""
    expected = {}
    for name, folder in runs.items():
        first, *_, last = read_records(folder / "records.jsonl")
        assert last.scores is not None
        assert first.scores != last.scores, "the base alone does not pass for the model"
        chosen: list[tuple[int | str, bool]] = [(1, False), ("averaged", True)]
        if name in ("sequence-classification", "causal-lm", "image-text"):  # the others are variants of these
            chosen += [(1, True), ("averaged", False)]
        for agent, merge in chosen:
            to = place / "out" / name.replace(" ", "-") / f"{agent}-{'merged' if merge else 'adapter'}"
            export(folder, agent, to, merge=merge)
            score = last.averaged_score if agent == "averaged" else last.scores[1]
            expected[f"{to.parent.name}/{to.name}"] = score

    def rows(name: str, label: str | None) -> Any:
        task = configs.load(configs.RunConfig, runs[name] / "config.yaml").task
        return data.load(task, [("text_column", "text")], label=label)

    table, plain = rows("sequence-classification", "label"), rows("causal-lm", None)
    texts = list(zip(table.test["text"], [table.classes[i] for i in table.test_labels], strict=True))
    images = [(str(p), p.parent.name) for p in sorted((place / "album" / "test").rglob("*.png"))]
    pairs = [({"text": text, "text_pair": text[::-1]}, label) for text, label in TEXTS[::2]]
    asked = {"pairs": pairs, "texts": texts, "images": images, "plain": list(plain.test["text"])}
    (place / "asked.json").write_text(json.dumps(asked))
    (place / "fresh.py").write_text(FRESH)
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    command = [sys.executable, str(place / "fresh.py"), str(place)]
    told = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=place, check=False)
    assert told.returncode == 0, told.stderr[-3000:]
    found = json.loads(re.search(r"FOUND (.*)", told.stdout)[1])  # type: ignore[index]
    assert found == {name: pytest.approx(score, abs=1e-4) for name, score in expected.items()}
    assert len({round(score, 6) for score in found.values()}) > 4, "the scores tell the models apart"


def test_an_export_carries_all_that_belongs_to_it(runs: dict[str, Path], tmp_path: Path) -> None:
    expected = {
        "sequence-classification": {"tokenizer.json", "tokenizer_config.json", "labels.json"},
        "causal-lm": {"tokenizer.json", "tokenizer_config.json", "generation_config.json"},
        "image-text": {"tokenizer.json", "processor_config.json", "labels.json"},
    }
    for name, files in expected.items():
        for merge in (False, True):
            [to] = export(runs[name], 0, tmp_path / f"{name}-{merge}", merge=merge)
            found = {path.name for path in to.iterdir()}
            weights = {"config.json", "model.safetensors"} if merge else {"adapter_config.json"}
            assert files | weights | {"README.md", "decaf_lora.json"} <= found
            assert ("adapter_config.json" in found) != merge
            if "labels.json" in files:
                labels = json.loads((to / "labels.json").read_text())
                names = NAMES if name == "sequence-classification" else ("big_cat", "bird", "small dog")
                assert labels["id2label"] == {str(i): name for i, name in enumerate(names)}
                assert labels["label2id"] == {name: i for i, name in enumerate(names)}
            if merge and "labels.json" in files:
                assert json.loads((to / "config.json").read_text())["id2label"] == labels["id2label"]
        card = ModelCard.load(to / "README.md")
        assert card.data.library_name == "transformers"
        for said in ("decaf", "ring", "iid", "agent 0"):
            assert f"| {said} |" in card.content
    one = json.loads((tmp_path / "sequence-classification-False" / "adapter_config.json").read_text())
    assert one["modules_to_save"] == ["classifier"], "named once, and no guess of PEFT's beside it"


def test_every_agent_at_once(runs: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert decaf("export", runs["causal-lm"], "--agent", "all", "--to", tmp_path / "all") == 0
    assert "adapters of 2 agents" in capsys.readouterr().out
    assert sorted(p.name for p in (tmp_path / "all").iterdir()) == ["agent-0", "agent-1"]
    for agent in (0, 1):
        [alone] = export(runs["causal-lm"], agent, tmp_path / f"alone-{agent}")
        one, other = (load_file(d / "adapter_model.safetensors") for d in (tmp_path / "all" / f"agent-{agent}", alone))
        assert one.keys() == other.keys()
        assert all(torch.equal(one[key], other[key]) for key in one)


def test_neither_data_nor_code_of_the_folder_is_needed(
    place: Path, runs: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Data that has moved; a folder from somebody else whose configuration names a Python file."""
    folder = shutil.copytree(runs["sequence-classification"], tmp_path / "run")
    data_file = place / "a.csv"
    data_file.rename(place / "b.csv")
    try:
        (tmp_path / "own.py").write_text(f"open({str(tmp_path / 'RAN')!r}, 'w')\n")
        written = (folder / "config.yaml").read_text()
        attacked = written.replace("name: sequence-classification", f"name: {tmp_path / 'own.py'}:make")
        assert attacked != written
        (folder / "config.yaml").write_text(attacked)
        assert decaf("export", folder, "--agent", 1, "--to", tmp_path / "a") == 0
        assert decaf("export", folder, "--agent", 1, "--merge", "--to", tmp_path / "m") == 0
    finally:
        (place / "b.csv").rename(data_file)
    assert not (tmp_path / "RAN").exists()
    # A model class that is not one of transformers is not looked for elsewhere.
    found = checkpoint.load_latest(folder / "checkpoints")
    assert found is not None
    tensors, values = found
    values["outline"]["task"]["model_class"] = "os.system"
    checkpoint.save(folder / "checkpoints", tensors, values)
    assert "merge: " in fails(capsys, "export", folder, "--merge", "--to", tmp_path / "n")


def test_a_task_of_ones_own(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    own = tmp_path / "own.py"
    shutil.copy(Path(tiny.__file__).with_name("toy.py"), own)
    assert decaf("run", "digits", *SHORT, "--task", f"{own}:make_toy", "--out", tmp_path / "run") == 0
    own.unlink()
    [to] = export(tmp_path / "run", 1, tmp_path / "adapter")
    assert {"adapter_model.safetensors", "adapter_config.json", "README.md"} <= {p.name for p in to.iterdir()}
    line = fails(capsys, "export", tmp_path / "run", "--merge", "--to", tmp_path / "merged")
    assert "not one of transformers" in line
    assert "without --merge" in line
    assert not (tmp_path / "merged").exists()


def own_logits(folder: Path, agent: int) -> tuple[dict[str, Tensor], Tensor]:
    """A batch of test examples of a run, and an agent's own logits of it."""
    run = build_run(configs.load(configs.RunConfig, folder / "config.yaml"))
    found = checkpoint.load_latest(folder / "checkpoints")
    assert found is not None
    run.restore(*found)
    batch = run.task.test_batch(np.arange(run.task.num_test))
    batch = {k: t for k, t in batch.items() if k in ("input_ids", "attention_mask")}
    with torch.no_grad(), run.attached.bind(run.adapter.select([agent])):
        logits = run.task.model(**batch).logits
    run.close()
    return batch, logits


@pytest.mark.parametrize(
    "lora",
    [
        ("--lora.target_modules", "lm_head", "c_attn"),
        ("--lora.target_modules", ".*c_attn", "--lora.modules_to_save", "lm_head"),
        ("--lora.target_modules", ".*c_attn", "--lora.modules_to_save", "wte"),
    ],
    ids=["adapter on the head", "trained head", "trained embeddings"],
)
def test_tied_weights_come_apart(
    place: Path, model: Callable[[str], Path], tmp_path: Path, datasets_cache: None, lora: tuple[str, ...]
) -> None:
    """What is trained of one matrix that reads and writes must not change the other use of it."""
    task = ("--task", "causal-lm", "--task.model", model("gpt2"), "--task.data", place / "a.jsonl")
    assert decaf("run", "digits", *SHORT, *task, "--task.test_share", 0.3, *lora, "--out", tmp_path / "run") == 0
    batch, mine = own_logits(tmp_path / "run", 0)
    export(tmp_path / "run", 0, tmp_path / "merged", merge=True)
    [adapter] = export(tmp_path / "run", 0, tmp_path / "adapter")
    base = transformers.AutoModelForCausalLM.from_pretrained(model("gpt2"))
    merged = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    asked = batch["attention_mask"].bool()
    with torch.no_grad():
        plain = base(**batch).logits
        torch.testing.assert_close(merged(**batch).logits[asked], mine[asked], rtol=1e-4, atol=1e-4)
        adapted = PeftModel.from_pretrained(base, adapter)(**batch).logits
        torch.testing.assert_close(adapted[asked], mine[asked], rtol=1e-4, atol=1e-4)
    assert float((plain - mine)[asked].abs().max()) > 0.01


def test_a_base_that_is_an_adapter_is_refused(
    place: Path, model: Callable[[str], Path], tmp_path: Path, datasets_cache: None, capsys: pytest.CaptureFixture[str]
) -> None:
    """transformers loads base and adapter from such a directory; an export could only name one of both."""
    base = transformers.AutoModelForCausalLM.from_pretrained(model("llama"))
    lora = LoraConfig(r=4, target_modules=["q_proj"], task_type="CAUSAL_LM")
    get_peft_model(base, lora).save_pretrained(tmp_path / "first")
    transformers.AutoTokenizer.from_pretrained(model("llama")).save_pretrained(tmp_path / "first")
    task = ("--task", "causal-lm", "--task.model", tmp_path / "first", "--task.data", place / "a.jsonl")
    line = fails(capsys, "run", "digits", *SHORT, *task, "--task.test_share", 0.3, "--out", tmp_path / "run")
    assert "task.model" in line
    assert "init_adapters" in line
    assert str(model("llama")) in line
    assert not (tmp_path / "run").exists()
    complete = shutil.copytree(tmp_path / "first", tmp_path / "complete")  # a model with an adapter beside it
    for name in ("config.json", "model.safetensors"):
        shutil.copy(model("llama") / name, complete)
    task = (*task[:3], complete, *task[4:])
    assert "task.model" in fails(
        capsys, "run", "digits", *SHORT, *task, "--task.test_share", 0.3, "--out", tmp_path / "run"
    )


def test_the_base_has_gone(
    place: Path, model: Callable[[str], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str], datasets_cache: None
) -> None:
    base = shutil.copytree(model("gpt2"), tmp_path / "base")
    task = ("--task", "causal-lm", "--task.model", base, "--task.data", place / "a.jsonl", "--task.test_share", 0.3)
    assert decaf("run", "digits", *SHORT, *task, "--out", tmp_path / "run") == 0
    base.rename(tmp_path / "elsewhere")
    with pytest.warns(UserWarning, match="without a tokenizer"):
        export(tmp_path / "run", 0, tmp_path / "adapter")
    assert str(base) in fails(capsys, "export", tmp_path / "run", "--merge", "--to", tmp_path / "merged")
    assert [p.name for p in tmp_path.iterdir() if "merged" in p.name] == []


def test_generation_ends_where_the_training_texts_end(
    place: Path, model: Callable[[str], Path], tmp_path: Path, datasets_cache: None
) -> None:
    """The base's own settings are kept, also where they are at odds, and its tokenizer's end is among the ends."""
    base = shutil.copytree(model("gpt2"), tmp_path / "base")
    (base / "generation_config.json").write_text('{"eos_token_id": 7, "do_sample": false, "temperature": 0.5}')
    task = ("--task", "causal-lm", "--task.model", base, "--task.data", place / "a.jsonl", "--task.test_share", 0.3)
    assert decaf("run", "digits", *SHORT, *task, "--out", tmp_path / "run") == 0
    for merge in (False, True):
        [to] = export(tmp_path / "run", 0, tmp_path / f"merge-{merge}", merge=merge)
        settings = transformers.GenerationConfig.from_pretrained(to)
        assert settings.eos_token_id == [7, 3]
        assert settings.temperature == 0.5


@pytest.mark.parametrize("agent", ["²", "-1", "1.0", "", "Averaged", "2"])
def test_agents_that_are_none(
    runs: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str], agent: str
) -> None:
    assert "agent: " in fails(capsys, "export", runs["causal-lm"], f"--agent={agent}", "--to", tmp_path / "x")
    assert list(tmp_path.iterdir()) == []


def test_where_nothing_can_be_written(
    runs: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.chdir(tmp_path)
    for to in (tmp_path / "file" / "x", "file", tmp_path / ("n" * 300), "/dev/full", ".", "..", "/"):
        assert fails(capsys, "export", runs["causal-lm"], "--to", to).startswith("decaf: to: ")
    (tmp_path / "used").mkdir()
    (tmp_path / "used" / "mine").write_text("kept")
    assert "not an empty folder" in fails(capsys, "export", runs["causal-lm"], "--to", tmp_path / "used")
    assert (tmp_path / "used" / "mine").read_text() == "kept"
    # A disk that is full is the operating system's refusal in the middle: a limit on the size of files is one.
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (2000, limits[1]))
        for more in ((), ("--merge",)):
            line = fails(capsys, "export", runs["causal-lm"], *more, "--to", tmp_path / "full")
            assert line.startswith("decaf: to: cannot write")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, before)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file", "used"]
