"""A seeded fuzzer: no input may end in a traceback, a hang or a death of the process.

    python tests/helpers/fuzz.py                     every target in turn, until it is stopped
    python tests/helpers/fuzz.py --seconds 3600      for an hour
    python tests/helpers/fuzz.py --target data --seed 123      one case again, with its traceback

A target takes valid inputs apart: it flips bits, cuts, repeats, and puts words where others stood that have upset
programs before. All cases run in processes forked from one that has imported everything. What the program may do
is succeed, or refuse with one line (exit code 2).
"""

import argparse
import contextlib
import io
import json
import multiprocessing
import os
import random
import shutil
import signal
import sys
import tempfile
import time
import traceback
import warnings
from pathlib import Path

HERE = Path(__file__).parent
LIMIT = 60
"""Seconds after which a case hangs."""

WORDS = [
    *("", " ", "0", "-1", "1e400", "-0.0", "nan", "inf", ".inf", "1" * 400, "9" * 19, "0x10", "010", "1_0", "²", "٣"),
    *(
        "true",
        "null",
        "~",
        "None",
        "no",
        "[]",
        "{}",
        "[[[[",
        "{{}}",
        "{",
        "}",
        "{0}",
        "%s",
        "$HOME",
        "*a",
        "&a",
        "!!int",
    ),
    *(
        "<<",
        "=",
        "@",
        "`",
        "'",
        '"',
        "\\",
        "\t",
        "\r",
        "\n\n",
        "\0",
        "\x1b[31m",
        "\ufeff",
        "\ud800",
        "é",
        "猫",
        "\u202e",
    ),
    *("/", "..", "../..", "/dev/null", "~nobody", "a" * 300, "file.py:f", "os:system", "a:b:c", "ring:", "torus:0x0"),
    *("erdos-renyi:2", "dirichlet:0", "shots:-1", "--out", "--help", "-", "--", "=1"),
]


# Ways to spoil


def spoilt_text(draw: random.Random, text: str) -> str:
    """A text after one to three accidents, in whole words and signs."""
    for _ in range(draw.randint(1, 3)):
        pieces = [piece for piece in _pieces(text) if piece]
        if not pieces:
            return draw.choice(WORDS)
        i = draw.randrange(len(pieces))
        match draw.randrange(6):
            case 0:
                pieces[i] = draw.choice(WORDS)
            case 1:
                del pieces[i : i + draw.randint(1, 5)]
            case 2:
                pieces[i:i] = pieces[i : i + draw.randint(1, 8)] * draw.randint(1, 3)
            case 3:
                pieces.insert(i, draw.choice(WORDS))
            case 4:
                j = draw.randrange(len(pieces))
                pieces[i], pieces[j] = pieces[j], pieces[i]
            case _:
                pieces = pieces[:i]
        text = "".join(pieces)
    return text


def _pieces(text: str) -> list[str]:
    pieces, word = [], ""
    for sign in text:
        if sign.isalnum() or sign in "._":
            word += sign
        else:
            pieces += [word, sign]
            word = ""
    return [*pieces, word]


def spoilt_bytes(draw: random.Random, raw: bytes) -> bytes:
    """Bytes after one to three accidents."""
    data = bytearray(raw)
    for _ in range(draw.randint(1, 3)):
        i = draw.randrange(len(data) + 1)
        match draw.randrange(6):
            case 0 if data:
                data[i % len(data)] ^= 1 << draw.randrange(8)
            case 1:
                del data[i:]
            case 2:
                del data[i : i + draw.randint(1, 20)]
            case 3:
                data[i:i] = draw.randbytes(draw.randint(1, 20))
            case 4:
                data[i:i] = data[i : i + draw.randint(1, 60)] * draw.randint(1, 3)
            case _:
                data[i:i] = draw.choice(WORDS).encode("utf-8", "surrogatepass")
    return bytes(data)


def spoilt(draw: random.Random, raw: bytes) -> bytes:
    if draw.random() < 0.1:
        return draw.choice(
            [b"", b"null", b"[]", b"\n", b"\0" * 64, b"{}", b"version https://git-lfs.github.com/spec/v1"]
        )
    try:
        text = raw.decode()
    except UnicodeDecodeError:
        return spoilt_bytes(draw, raw)
    if draw.random() < 0.3:
        return spoilt_bytes(draw, raw)
    encoding = draw.choice(["utf-8"] * 8 + ["utf-16", "cp1252", "utf-16-le", "latin-1"])
    errors = "surrogatepass" if encoding.startswith("utf") else "replace"
    return spoilt_text(draw, text).encode(encoding, errors)


def spoilt_value(draw: random.Random, value, depth: int = 0):
    """Plain values with some replaced, left out, or put where they do not belong."""
    if isinstance(value, dict) and value and draw.random() < 0.9:
        made = {k: v for k, v in value.items() if draw.random() > 0.03}
        for key in draw.sample(sorted(made), min(len(made), draw.randint(1, 2))):
            made[key] = spoilt_value(draw, made[key], depth + 1)
        if draw.random() < 0.1:
            made[draw.choice(WORDS)] = draw.choice(WORDS)
        return made
    if isinstance(value, list) and value and draw.random() < 0.7:
        made = list(value)
        i = draw.randrange(len(made))
        made[i] = spoilt_value(draw, made[i], depth + 1)
        return made * draw.randint(1, 2)
    return draw.choice([None, True, False, 0, 1, -1, 2**70, 0.5, float("inf"), [], {}, [None], {"a": 1}, *WORDS])


# Targets: each runs one case in an empty folder, and may raise UserError


def config(draw: random.Random, folder: Path, made: Path) -> None:
    """A configuration file, of a run or a comparison."""
    from decaf_lora import config as configs
    from decaf_lora.yaml_file import write_yaml

    kind = draw.choice([configs.RunConfig, configs.CompareConfig])
    values = kind().model_dump(mode="json")
    if draw.random() < 0.5:
        with contextlib.suppress(UnicodeError):
            (folder / "a.yaml").write_text(write_yaml(spoilt_value(draw, values)), encoding="utf-8")
    if not (folder / "a.yaml").exists():
        (folder / "a.yaml").write_bytes(spoilt(draw, write_yaml(values).encode()))
    found = configs.load(kind, folder / "a.yaml")
    (folder / "b.yaml").write_text(configs.dump(found), encoding="utf-8")
    assert configs.load(kind, folder / "b.yaml") == found, "what is written is not what is read"


def command(draw: random.Random, folder: Path, made: Path) -> None:
    """A command line: the commands that are over soon, and the options of the others."""
    from decaf_lora import config as configs
    from decaf_lora import graphs, partition
    from decaf_lora.cli.options import Output, Planning, configured

    small = [word for word in WORDS if len(word) < 10]
    names = [*graphs.KINDS, *partition.KINDS, "x.yaml", "x.npy", "x.py:f", "digits"]

    def word() -> str:
        made = draw.choice([*small, *names, "1", "2", "5", "7", "0.5"])
        made = f"{made}:{draw.choice([*small, '2', '3', '2x3', '0.3', '1+2'])}" if draw.random() < 0.3 else made
        return spoilt_text(draw, made) if draw.random() < 0.1 else made

    def given(options: list[str]) -> list[str]:
        found = []
        for _ in range(draw.randint(0, 3)):
            found.append(draw.choice(options) if draw.random() < 0.95 else word())
            if draw.random() < 0.85:
                found.append(word())
        return found

    match draw.randrange(8):
        case 0 | 1:
            main(["graph", word(), *given(["--agents", "--seed", "--json", "--save", "-n", "--kind"])])
        case 2:
            main(["report", draw.choice([str(folder), word()]), *given(["--json", "--to"])])
        case 3:
            main(["export", draw.choice([str(folder), word()]), *given(["--agent", "--to", "--merge"])])
        case 4:
            main([draw.choice([word(), "recipes", "graph", "version"]), *given(["--json", "--version", "--help"])])
        case 5:
            labels, agents = [i % 3 for i in range(40)], draw.randint(1, 12)
            graphs.parse(word(), agents, draw.randrange(5))
            partition.parse(word(), labels, agents, draw.randrange(5))
        case _:
            kinds = [(configs.RunConfig, Output), (configs.CompareConfig, Output), (configs.RunConfig, Planning)]
            kind, which = draw.choice(kinds)
            options = [f"--{name}" for name in configs.fields(kind)]
            said = io.StringIO()
            with contextlib.suppress(SystemExit), contextlib.redirect_stdout(said):  # --help
                configured(kind, "run", ["digits" if draw.random() < 0.95 else word(), *given(options)], which)


def adapter(draw: random.Random, folder: Path, made: Path) -> None:
    """A PEFT directory to start from."""
    shutil.copytree(made / "adapter", folder / "adapter")
    path = folder / "adapter" / draw.choice(["adapter_config.json"] * 2 + ["adapter_model.safetensors"])
    if path.suffix == ".json" and draw.random() < 0.7:
        value = spoilt_value(draw, json.loads(path.read_text()))
        path.write_text(json.dumps(value), encoding="utf-8", errors="surrogatepass")
    else:
        path.write_bytes(spoilt(draw, path.read_bytes()))
    main(["run", str(made / "toy.yaml"), "--out", str(folder / "run"), "--init-adapter", str(folder / "adapter")])


def data(draw: random.Random, folder: Path, made: Path) -> None:
    """A file or folder of texts, read as a task reads it."""
    from decaf_lora.config import TaskConfig
    from decaf_lora.data import load, needs_text

    source = draw.choice(sorted((made / "data").iterdir()))
    path = folder / source.name
    if source.is_dir():
        shutil.copytree(source, path)
        inside = draw.choice(sorted(file for file in path.rglob("*") if file.is_file()))
        if draw.random() < 0.2:
            inside = inside.rename(inside.with_name(draw.choice(["test.csv", "x.txt", "metadata.csv", "a.JSON", "b"])))
        inside.write_bytes(spoilt(draw, inside.read_bytes()))
    else:
        path.write_bytes(spoilt(draw, source.read_bytes()))
    options = {"delimiter": [";", "tab", "a"], "quoting": ["none", "standard"], "encoding": ["cp1252", "utf-8", "x"]}
    options |= {
        "subset": ["one", "x"],
        "train_split": ["train[:50%]", "train[", "test"],
        "classes": [("yes", "no"), ("a",)],
    }
    given = {k: draw.choice(v) for k, v in options.items() if draw.random() < 0.08}
    task = TaskConfig(data=str(path), test_share=0.3, **given)
    found = load(task, [("text_column", "text")], label=draw.choice(["label", "label", None]))
    for rows in (found.train, found.test):
        needs_text(rows, [("text_column", "text")])
        assert all(isinstance(text, str) for text in rows["text"][:])


def image(draw: random.Random, folder: Path, made: Path) -> None:
    """A folder of images."""
    from decaf_lora.config import TaskConfig
    from decaf_lora.data import decode_image, load

    shutil.copytree(made / "album", folder / "album")
    for _ in range(draw.randint(1, 2)):
        file = draw.choice(sorted(file for file in (folder / "album").rglob("*") if file.is_file()))
        match draw.randrange(4):
            case 0:
                file.rename(
                    file.with_name(draw.choice(["x.txt", "test.png", ".hidden.png", "a b.PNG", "metadata.csv"]))
                )
            case 1:
                target = file.parent / draw.choice(["deeper", "train", "..", "../.."])
                target.mkdir(exist_ok=True)
                file.rename(target / file.name)
            case _:
                file.write_bytes(spoilt(draw, file.read_bytes()))
    task = TaskConfig(data=str(folder / "album"), test_share=0.3, skip_bad=draw.random() < 0.5)
    found = load(task, [], label="label", image="image")
    for file in found.train["image"]:
        assert decode_image(file).mode == "RGB"


def run_folder(draw: random.Random, folder: Path, made: Path) -> None:
    """The folder of a run that is reported, exported or gone on with."""
    out = folder / "run"
    shutil.copytree(made / "run", out)
    for _ in range(draw.randint(1, 2)):
        file = draw.choice(sorted(file for file in out.rglob("*") if file.is_file() and file.suffix != ".html"))
        if draw.random() < 0.2:
            file.unlink()
        elif file.suffix == ".json" and draw.random() < 0.6:
            with contextlib.suppress(ValueError):
                file.write_text(json.dumps(spoilt_value(draw, json.loads(file.read_text()))), errors="surrogatepass")
        else:
            file.write_bytes(spoilt(draw, file.read_bytes()))
    match draw.randrange(8):
        case 0:
            main(["report", str(out)])  # takes a second
        case 1 | 2 | 3:
            main(["export", str(out), "--to", str(folder / "to")])
        case _:
            main(["run", str(made / "toy.yaml"), "--out", str(out), "--resume"])


TARGETS = {f.__name__: f for f in (config, command, adapter, data, image, run_folder)}


def main(arguments: list[str]) -> None:
    """A whole command, with what it prints."""
    from decaf_lora import cli

    said = io.StringIO()
    with contextlib.redirect_stderr(said), contextlib.redirect_stdout(io.StringIO()):
        try:
            code = cli.main(arguments)
        except SystemExit as stop:  # --help
            code = stop.code
    assert code in (0, 2, None), f"exit code {code}"
    assert "Traceback" not in said.getvalue(), said.getvalue()
    if code == 2:
        lines = [line for line in said.getvalue().splitlines() if line.strip()]
        assert lines, "exit code 2 without a line"
        assert lines[-1].startswith("decaf: "), lines[-1]


# Cases


def prepare(made: Path) -> None:
    """Valid inputs, to be spoilt."""
    from datasets import Dataset

    import inputs

    toy = f"task: {{name: '{HERE / 'toy.py'}:make_toy'}}\nagents: 2\npartition: iid\nrounds: 3\ndevice: cpu\n"
    toy += "checkpoint_every: 1\ntraining: {steps: 1, batch_size: 2, agents_per_pass: 2}\n"
    (made / "toy.yaml").write_text(toy)
    main(["run", str(made / "toy.yaml"), "--out", str(made / "run")])
    main(["export", str(made / "run"), "--to", str(made / "adapter")])
    folder = made / "data"
    rows = [(text if i % 5 else f'{text}, "so"', label) for i, (text, label) in enumerate(inputs.ROWS)]
    records = [{"text": text, "label": label, "more": {"n": i}} for i, (text, label) in enumerate(rows)]
    for name, delimiter in (("a.csv", ","), ("b.csv", ";"), ("c.tsv", "\t")):
        inputs.table(folder / name, rows, delimiter=delimiter)
    inputs.lines(folder / "d.jsonl", records)
    (folder / "e.json").write_text(json.dumps(records))
    (folder / "f.txt").write_text("\n\n".join(text for text, _ in rows))
    Dataset.from_list(records).to_parquet(folder / "g.parquet")
    (folder / "h.csv").write_bytes((folder / "a.csv").read_bytes().replace(b"cat", "chaton rusé".encode("cp1252")))
    inputs.table(folder / "split" / "train.csv", rows)
    inputs.lines(folder / "split" / "test.jsonl", records)
    with contextlib.suppress(ImportError):
        import openpyxl

        book = openpyxl.Workbook()
        for row in (("text", "label"), *rows):
            book.active.append(row)
        book.save(folder / "i.xlsx")
    inputs.album(made / "album", count=2)


def case(target: str, seed: int, made: Path) -> str | None:
    """What is wrong with a case: the traceback, or None."""
    from decaf_lora.errors import UserError

    def hangs(*args: object) -> None:
        raise TimeoutError(f"hangs for {LIMIT} s")

    draw = random.Random(f"{target}/{seed}")
    before = os.getcwd()
    with tempfile.TemporaryDirectory() as name, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        os.chdir(name)
        signal.signal(signal.SIGALRM, hangs)
        signal.alarm(LIMIT)
        try:
            TARGETS[target](draw, Path(name), made)
        except UserError as error:
            if len(str(error)) > 2000 or "\n" in str(error) or not str(error):
                return f"not one line: {error}"
        except BaseException:
            return traceback.format_exc()
        finally:
            signal.alarm(0)
            os.chdir(before)
    return None


def cases(target: str, seeds: range, made: str, pipe, until: float | None = None) -> None:
    """Runs cases in a process of its own; sends each seed before, and what is wrong after."""
    import datasets

    datasets.config.HF_DATASETS_CACHE = Path(made) / "cache"
    datasets.disable_progress_bars()
    for seed in seeds:
        if until is not None and time.monotonic() > until:
            break
        pipe.send((seed, None))
        if (wrong := case(target, seed, Path(made))) is not None:
            pipe.send((seed, wrong))
    pipe.send((None, None))


def server():
    """The context whose server has imported everything; processes are forked from it."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(
        ["inputs", "fuzz", "decaf_lora.runs", "decaf_lora.report", "decaf_lora.tasks.causal_lm"]
    )
    return context


def run(target: str, seeds: range, made: Path, until: float | None = None) -> tuple[int, list[tuple[int, str]]]:
    """How many cases were begun, and (seed, what is wrong) of those that end badly.

    A process that dies is one, and the others go on.
    """
    tried, found, left = 0, [], seeds
    context = server()
    while len(left):
        ours, theirs = context.Pipe(duplex=False)
        process = context.Process(target=cases, args=(target, left, str(made), theirs, until))
        process.start()
        theirs.close()
        current = None
        with contextlib.suppress(EOFError):
            while True:
                seed, wrong = ours.recv()
                if wrong is not None:
                    found.append((seed, wrong))
                elif seed is None:
                    process.join()
                    return tried, found
                else:
                    current = seed
                    tried += 1
        process.join()
        if current is None:
            return tried, [*found, (left[0], f"no case ran; exit code {process.exitcode}")]
        found.append((current, f"the process died with exit code {process.exitcode}"))
        left = range(current + 1, left.stop)
    return tried, found


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--target", choices=list(TARGETS))
    parser.add_argument("--seed", type=int, help="one case, in this process")
    parser.add_argument("--seconds", type=float, default=float("inf"))
    return parser.parse_args()


def _main() -> int:
    options = _arguments()
    with tempfile.TemporaryDirectory() as name:
        made = Path(name)
        prepare(made)
        if options.seed is not None:
            import datasets

            datasets.config.HF_DATASETS_CACHE = made / "cache"
            wrong = case(options.target or "data", options.seed, made)
            print(wrong or "fine")
            return int(wrong is not None)
        targets = [options.target] if options.target else list(TARGETS)
        counts, bad, start, end = (
            dict.fromkeys(targets, 0),
            0,
            random.randrange(10**9),
            time.monotonic() + options.seconds,
        )
        while time.monotonic() < end:
            for target in targets:
                tried, found = run(target, range(start, start + 200), made, min(end, time.monotonic() + 600))
                for seed, wrong in found:
                    print(f"\n--target {target} --seed {seed}\n{wrong}", flush=True)
                counts[target] += tried
                bad += len(found)
            start += 200
            shutil.rmtree(made / "cache", ignore_errors=True)
            shown = ", ".join(f"{target} {count}" for target, count in counts.items())
            print(f"{sum(counts.values())} cases ({shown}), {bad} bad", flush=True)
    return int(bad > 0)


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    sys.path.insert(0, str(HERE))
    sys.exit(_main())
