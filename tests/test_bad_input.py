"""What a user meets who names a model and data of their own: one line and exit code 2, or one counted warning.

Real `decaf run` on tiny models and tables; the same mistakes in finer detail are in the tests of each module.
"""

import contextlib
import os
import pty
import subprocess
import sys
import termios
import threading
import warnings

import pytest
from PIL import Image

import tiny
from decaf_lora.cli import main

ROWS = [(f"the cat is {word}", label) for word in ("good", "old", "big") for label in ("no", "yes")] * 3
FEW = [*ROWS, ("a bird", "maybe")]
LONG = [("the red cat sat " * 20, label) for _, label in ROWS]


pytestmark = pytest.mark.usefixtures("datasets_cache")


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder of models and data, as a user has one: the working directory of every command here."""
    folder = tmp_path_factory.mktemp("place")
    for family in ("bert", "llama", "clip"):
        tiny.write(family, folder / family)
    tiny.write("llama", folder / "endless")
    tiny.tokenizer("llama", pad=None, eos=None).save_pretrained(folder / "endless")
    tables = {
        "good": ROWS,
        "few": FEW,
        "long": LONG,
        "missing": [*ROWS, ("a dog", None)],
        "floats": [(text, 0.5) for text, _ in ROWS],
        "split/train": ROWS,
        "split/test": [*ROWS, ("a bird", "maybe")],
        "numbers": [(3, label) for _, label in ROWS],
        "empty/train": ROWS,
        "empty/test": [],
    }
    (folder / "split").mkdir()
    (folder / "empty").mkdir()
    for name, rows in tables.items():
        lines = [f"{text},{'' if label is None else label}" for text, label in rows]
        (folder / f"{name}.csv").write_text("\n".join(["text,label", *lines]) + "\n")
    for split, count in (("train", 4), ("test", 2)):
        for name, colour in (("cat", "red"), ("dog", "blue")):
            (folder / "album" / split / name).mkdir(parents=True)
            for i in range(count):
                Image.new("RGB", (16, 16), colour).save(folder / "album" / split / name / f"{name}{i}.png")
    (folder / "album" / "train" / "cat" / "cat1.png").write_bytes(b"no image")
    (folder / "album" / "train" / "dog" / "dog3.png").write_bytes(b"")
    return folder


BERT = "--task sequence-classification --task.model bert --task.test_share 0.3"
LLAMA = "--task causal-lm --task.model llama --task.test_share 0.3"
CLIP = "--task image-text --task.model clip --task.data album"
RUN = "--agents 2 --rounds 1 --training.steps 1 --training.batch_size 2 --training.agents_per_pass 2 --partition iid"
RUN += " --device cpu"


def decaf(capsys, monkeypatch, place, out, options):
    """Exit code and the lines on standard error of `decaf run`, as a process of its own would give them."""
    monkeypatch.chdir(place)
    capsys.readouterr()
    with warnings.catch_warnings():  # the command's own way to show them
        warnings.simplefilter("default")
        code = main(["run", "digits", *RUN.split(), *options.split(), "--out", str(out)])
    err = capsys.readouterr().err
    assert "Traceback" not in err
    return code, [line for line in err.splitlines() if line.strip()]


MISTAKES = {
    f"{BERT} --task.data good.csv --lora.target_modules q_projj": (
        "lora.target_modules: q_projj matches no linear layer of BertForSequenceClassification"
    ),
    f"{BERT} --task.data nowhere.csv": "task.data: nowhere.csv does not exist",
    f"{BERT} --task.data some/data": "run `hf download --repo-type dataset some/data --local-dir DIR`, bring DIR here",
    f"{BERT} --task.data good.csv --task.model ./nowhere": "task.model: nowhere does not exist",
    f"{BERT} --task.data good.csv --task.model some/model": "run `hf download some/model --local-dir DIR`, bring DIR",
    f"{BERT} --task.data good.csv --task.model album": "task.model: album cannot be loaded",
    f"{BERT} --task.data good.csv --task.text_column txt": "task.text_column: 'txt' is not known. Did you mean 'text'?",
    f"{BERT} --task.data numbers.csv": "task.text_column: column 'text' holds",
    f"{BERT} --task.data good.csv --task.max_length 33": "task.max_length: 33 is more than the model's limit of 32",
    f"{BERT} --task.data missing.csv": "task.label_column: 1 of 19 train examples have no label in column 'label'",
    f"{BERT} --task.data floats.csv": "task.label_column: column 'label' holds",
    "--task sequence-classification --task.model bert --task.data split": (
        "task.label_column: 1 of 19 test examples have labels unseen in training: 'maybe' (1)"
    ),
    "--task sequence-classification --task.model bert --task.data empty": "task.test_split: the split 'test' holds no",
    "--task sequence-classification --task.model bert --task.data good.csv": "task.test_share 0.2",
    f"{BERT} --task.data good.csv --partition shots:1 --agents 3": "partition: 3 agents but only 2 examples",
    f"{BERT} --task.data good.csv --partition shots:2/by-class --agents 3": "leaves agent 2 without any",
    f"{BERT} --task.data good.csv --partition shots:40": "has 6 examples, fewer than 40 shots; use at most 6 shots",
    f"{BERT.replace('bert', 'endless')} --task.data good.csv": "neither a padding nor an end-of-sequence token",
    f"{LLAMA} --task.data good.csv --task.answers no": "task.prompt_column: a prompt needs",
    f"{LLAMA} --task.data good.csv --task.prompt_column text --task.answers no": "task.answers: 1 answers for 2 class",
    f"{LLAMA.replace('llama', 'bert')} --task.data good.csv": "it is no causal language model",
    CLIP: "task.data: 2 of 8 train images do not decode: cat1.png, dog3.png; mend or remove them",
    f"{CLIP} --task.model bert --skip-bad": "task.model: it has no processor of images and text",
    f"{BERT} --task.data good.csv --skip-bad": "task.skip_bad: sequence-classification does not use it",
}


@pytest.mark.parametrize("options", list(MISTAKES))
def test_a_mistake_is_one_line_and_writes_nothing(options, place, tmp_path, capsys, monkeypatch):
    code, lines = decaf(capsys, monkeypatch, place, tmp_path / "run", options)
    assert code == 2
    *others, line = lines
    assert line.startswith("decaf: ")
    assert MISTAKES[options] in line
    # Before the mistake, at most what was left out of what was asked for.
    assert all(other.startswith("decaf: warning: task.skip_bad: 2 of 8 train images") for other in others)
    assert bool(others) == ("album" in options and "--skip-bad" in options)
    assert not (tmp_path / "run").exists()


COUNTED = {
    f"{BERT} --task.data long.csv": "task.max_length: truncated to 32 tokens: 13 of 13 train, 5 of 5 test examples.",
    f"{LLAMA} --task.data long.csv --task.max_length 8": "truncated to 8 tokens: 13 of 13 train, 5 of 5 test examples.",
    f"{BERT.replace('bert', 'llama')} --task.data good.csv": (
        "task.model: its tokenizer has no padding token; '</s>' is used."
    ),
    f"{BERT} --task.data few.csv": "1 of 3 classes have train examples but no test example: maybe.",
    f"{CLIP} --skip-bad": ("task.skip_bad: 2 of 8 train images do not decode: cat1.png, dog3.png; they are left out."),
}


@pytest.mark.parametrize("options", list(COUNTED))
def test_what_is_changed_is_counted_in_one_warning(options, place, tmp_path, capsys, monkeypatch):
    code, lines = decaf(capsys, monkeypatch, place, tmp_path / "run", options)
    assert code == 0
    (warning,) = [line for line in lines if line.startswith("decaf: warning: ")]
    assert COUNTED[options] in warning
    assert (tmp_path / "run" / "summary.json").exists()


def test_preprocessing_shows_a_bar_on_a_terminal(place, tmp_path):
    """A real process on a real (pseudo-)terminal: what the person in front of it sees."""
    hidden = ("HF_HUB_DISABLE_PROGRESS_BARS", "HF_DATASETS_DISABLE_PROGRESS_BARS", "COLUMNS", "LINES")
    environment = {k: v for k, v in os.environ.items() if k not in hidden}
    environment |= {"HF_DATASETS_CACHE": str(tmp_path / "cache"), "TERM": "xterm"}
    ours, theirs = pty.openpty()
    termios.tcsetwinsize(theirs, (30, 120))
    parts: list[bytes] = []

    def read() -> None:
        with contextlib.suppress(OSError):  # the terminal's other end is closed
            while chunk := os.read(ours, 65536):
                parts.append(chunk)

    reader = threading.Thread(target=read)
    reader.start()
    arguments = ["run", "digits", *f"{BERT} --task.data good.csv {RUN}".split(), "--out", str(tmp_path / "mine")]
    command = [sys.executable, "-m", "decaf_lora", *arguments]
    done = subprocess.run(command, cwd=place, env=environment, timeout=120, stdout=subprocess.DEVNULL, stderr=theirs)
    os.close(theirs)
    reader.join(timeout=30)
    os.close(ours)
    seen = b"".join(parts).decode(errors="replace")
    assert done.returncode == 0, seen
    for split, count in (("train", 13), ("test", 5)):
        assert f"Tokenizing {split}: 100%" in seen
        assert f"{count}/{count}" in seen
    assert seen.rindex("Tokenizing test: 100%") < seen.index("mine ")  # then the display of the run
    assert "score" in seen
