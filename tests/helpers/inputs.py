"""Data and models as people have them, made on the spot: tables, JSON lines, albums, tiny models, and commands."""

import csv
import json
import warnings
from pathlib import Path

from PIL import Image

import tiny
from decaf_lora import data, tasks
from decaf_lora.cli import main
from decaf_lora.config import TaskConfig

ROWS = [(f"the {a} is {w}", label) for a in ("cat", "dog") for w in ("good", "old", "big") for label in ("no", "yes")]
ROWS *= 3
TEXT = [("text_column", "text")]
SMALL = "--agents 2 --rounds 1 --training.steps 1 --training.batch_size 2 --training.agents_per_pass 2 --partition iid"
SMALL = [*SMALL.split(), "--device", "cpu"]


def table(path: Path, rows=ROWS, header=("text", "label"), **options) -> Path:
    """A CSV file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="", encoding=options.pop("encoding", "utf-8")) as file:
        csv.writer(file, **options).writerows([header, *rows])
    return path


def lines(path: Path, rows) -> Path:
    """A file of JSON lines."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def album(root: Path, classes=("cat", "dog"), splits=("train", "test"), count=4, make=None, suffix="png") -> Path:
    """root/split/class/class0.png ..., `make(number of the class, number of the image)` or a plain colour."""
    for split in splits:
        for k, name in enumerate(classes):
            (root / split / name).mkdir(parents=True, exist_ok=True)
            for i in range(count):
                image = make(k, i) if make else Image.new("RGB", (20, 20), ("red", "blue", "green", "white")[k])
                image.save(root / split / name / f"{name}{i}.{suffix}")
    return root


def model(family: str, folder: Path) -> Path:
    """A tiny model of a family, made once in `folder`."""
    return folder / family if (folder / family).exists() else tiny.write(family, folder / family)


def load(source, columns=TEXT, label="label", image=None, order=(), **options):
    """`data.load`, half held out unless there is a test split."""
    if "test_split" not in options:
        options.setdefault("test_share", 0.3)
    return data.load(TaskConfig(data=str(source), **options), columns, label=label, image=image, order=order)


def quiet(*args, **kwargs):
    """`load` without its warnings."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return load(*args, **kwargs)


def examples(found):
    """All examples as a sorted list of pairs."""
    pairs = [zip(rows["text"], rows["label"], strict=True) for rows in (found.train, found.test)]
    return sorted(pair for split in pairs for pair in split)


def make(name, **options):
    return tasks.make(TaskConfig(name=name, **{k: str(v) if isinstance(v, Path) else v for k, v in options.items()}))


def decaf(capsys, *arguments) -> tuple[int, list[str]]:
    """Exit code, and the lines on standard error, of a command."""
    capsys.readouterr()
    with warnings.catch_warnings():
        warnings.simplefilter("default")
        code = main([str(argument) for argument in arguments])
    err = capsys.readouterr().err
    assert "Traceback" not in err, err
    return code, [line for line in err.splitlines() if line.strip()]
