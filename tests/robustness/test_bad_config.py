"""Configuration files: every word means what it says, and what cannot be read or meant is one line."""

import re

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from command import SMALL as SMALL_TOY
from command import line_of
from decaf_lora import config as configs
from decaf_lora.config import CompareConfig, RunConfig
from decaf_lora.errors import UserError
from decaf_lora.yaml_file import read_yaml, write_yaml
from inputs import decaf

TEXT = "task: {name: digits}\nagents: 2\npartition: iid\nrounds: 1\n"


def read(tmp_path, text, kind=RunConfig):
    path = tmp_path / "a.yaml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return configs.load(kind, path)


# Words


@pytest.mark.parametrize(
    ("text", "values"),
    [
        ("task: {classes: [no, yes, on, off, y, n]}", ("no", "yes", "on", "off", "y", "n")),
        ("task: {classes: [2026-01-01, 1:30, 1_0]}", ("2026-01-01", "1:30", "1_0")),
        ("task: {classes: ['1', '1e3', 'null', '']}", ("1", "1e3", "null", "")),
        ("task: {classes: [=, <<x, .5.5]}", ("=", "<<x", ".5.5")),
    ],
)
def test_words_are_words(text, values, tmp_path):
    assert read(tmp_path, text).task.classes == values


@pytest.mark.parametrize(
    ("text", "field", "value"),
    [
        ("rounds: 010", "rounds", 10),
        ("rounds: 0x10", "rounds", 16),
        ("rounds: 0o10", "rounds", 8),
        ("rounds: '7'", "rounds", 7),
        ("rounds: 7.0", "rounds", 7),
        ("training: {learning_rate: 1e-3}", "training.learning_rate", 1e-3),
        ("training: {learning_rate: .5}", "training.learning_rate", 0.5),
        ("training: {learning_rate: 1}", "training.learning_rate", 1.0),
        ("task: {chat_template: yes}", "task.chat_template", True),
        ("task: {length_normalized: FALSE}", "task.length_normalized", False),
        ("task: {max_length: ~}", "task.max_length", None),
    ],
)
def test_numbers_are_numbers(text, field, value, tmp_path):
    assert configs.flat(read(tmp_path, text))[field] == value


WRITABLE = st.text(st.characters(exclude_categories=["Cs"]))
PLAIN = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | WRITABLE,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text("abc.", max_size=5), inner, max_size=3),
    max_leaves=8,
)
WORDS = [
    "no",
    "1e3",
    "010",
    "0o7",
    "1:30",
    "2026-01-01",
    ".inf",
    "~",
    "null",
    "",
    "<<",
    "=",
    "1_0",
    "0b1",
    "y",
    "-",
    "+.5e3",
]


@given(PLAIN | st.sampled_from(WORDS) | st.lists(st.sampled_from(WORDS)))
@settings(max_examples=80, deadline=None)
def test_what_is_written_is_read(tmp_path_factory, value):
    path = tmp_path_factory.mktemp("yaml") / "a.yaml"
    path.write_text(write_yaml({"value": value}), encoding="utf-8")
    assert read_yaml(path, "config") == {"value": value}


@pytest.mark.parametrize("word", WORDS)
def test_a_readers_of_older_yaml_gets_the_same_words(word):
    assert yaml.safe_load(write_yaml({"word": word})) == {"word": word}


# Files


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_unicode_is_read(encoding, tmp_path):
    assert read(tmp_path, ("# Büro\n" + TEXT).encode(encoding)).agents == 2


def bomb(more, first="[a]"):
    """Fifty lines that mean more values than fit into any memory."""
    lines = [f"a0: &a0 {first}"] + [f"a{i}: &a{i} " + more.format(f"*a{i - 1}") for i in range(1, 50)]
    return "\n".join(lines).encode()


MISTAKES = {
    "another encoding": (("# Büro\n" + TEXT).encode("latin-1"), r"is not UTF-8 \(byte 0xfc in line 1\); save it"),
    "half of an encoding": (TEXT.encode("utf-16")[:31], "is not UTF-8"),
    "a binary file": (bytes(range(256)), "is not UTF-8"),
    "zeros": (b"\0" * 50, "is not YAML"),
    "nothing": (b"", "must hold a mapping"),
    "a word": (b"run", "must hold a mapping"),
    "a list": (b"[1, 2]", "must hold a mapping"),
    "null": (b"null", "must hold a mapping"),
    "an open list": (b"agents: [1", "is not YAML"),
    "tabs": (b"task:\n\tname: digits", "is not YAML"),
    "two documents": (b"agents: 2\n---\nagents: 3", "is not YAML"),
    "a key twice": (b"rounds: 3\nagents: 2\nrounds: 30", r"rounds is there twice \(lines 1 and 3\); leave one out"),
    "a key twice inside": (b"task: {name: a, name: b}", r"name is there twice \(lines 1 and 1\)"),
    "a python object": (b"agents: !!python/object/apply:os.system ['true']", "is not YAML"),
    "an unknown tag": (b"agents: !two 2", "is not YAML"),
    "a wrong tag": (b"agents: !!int x", "is not YAML"),
    "a wrong date": (b"agents: !!timestamp 2026-99-99", "is not YAML"),
    "a bomb of depth": (b"agents: " + b"[" * 20000, "is nested too deeply|is not YAML"),
    "a list as a key": (b"? [1]\n: 2", "is not YAML"),
    "a number as a key": (b"1: 2\nagents: 2", "1"),
    "no word as a key": (b"null: 2", "None"),
    "a key with a line break": (b'"a\\nb": 2', "a b: unknown field"),
    "an unknown anchor": (b"agents: *a", "is not YAML"),
    "an anchor in itself": (b"agents: 2\nseeds: &a [*a]", "the anchor in line 2 holds itself"),
    "a bomb of aliases": (bomb("[{0}, {0}, {0}, {0}]"), "its aliases .* mean more than 200000 values"),
    "a bomb of merged keys": (bomb("{{<<: [{0}, {0}, {0}], a: 1}}", "{b: 1}"), "its aliases .* mean more than 200000"),
    "a bomb of keys": (bomb("? {0}\n: {0}", "[b]"), "is not YAML|its aliases"),
    "a huge file": (TEXT.encode() + b"# much\n" * 200_000, "is larger than 1 MiB"),
    "a null section": (b"task: null", "task"),
    "a list as a section": (b"task: [1]", "task"),
    "a word as a section": (b"training: fast", "training"),
    "a number with 5000 digits": (b"rounds: " + b"1" * 5000, "is not YAML"),
    "an absurd number": (b"rounds: " + b"1" * 50, "rounds"),
    "an infinite rate": (b"training: {learning_rate: .inf}", "input should be a finite number"),
    "no rate": (b"training: {learning_rate: .nan}", r"training\.learning_rate"),
    "a huge seed": (b"seed: 99999999999999999999", "seed must be at most"),
    "a huge share": (b"task: {max_train: 1e400}", r"task\.max_train"),
    "a truth value": (b"rounds: true", "rounds must not be true or false; write a number, or a word in quotes"),
    "a truth value in a list": (b"task: {classes: [true, false]}", "classes must not be true or false"),
    "numbers as names": (b"task: {classes: [0, 1]}", r"task\.classes\.0: .* \(got 0\); write it in quotes"),
    "too many agents": (b"agents: 1000000", "agents: input should be less than or equal to 100000"),
    "too many workers": (b"task: {num_workers: 5000}", r"task\.num_workers"),
}  # fmt: skip


@pytest.mark.parametrize("what", list(MISTAKES))
def test_a_wrong_file_is_one_line(what, tmp_path, capsys):
    content, message = MISTAKES[what]
    with pytest.raises(UserError, match=message):
        read(tmp_path, content)
    code, lines = decaf(capsys, "run", tmp_path / "a.yaml", "--out", tmp_path / "run")
    assert code == 2
    assert len(lines) == 1
    assert len(lines[0]) < 600
    assert not (tmp_path / "run").exists()


def test_a_folder_or_nothing_in_place_of_a_file(tmp_path, capsys):
    (tmp_path / "d.yaml").mkdir()
    for name, message in (
        ("d.yaml", "Is a directory"),
        ("none.yaml", "No such file"),
        ("x" * 300 + ".yaml", "too long"),
    ):
        code, lines = decaf(capsys, "run", tmp_path / name, "--out", tmp_path / "run")
        assert (code, len(lines)) == (2, 1)
        assert message in lines[0]


# Numbers of every field


def annotation(name):
    kind = CompareConfig
    *parts, last = name.split(".")
    for part in parts:
        kind = kind.model_fields[part].annotation
    return str(kind.model_fields[last].annotation)


NUMBERS = [n for n in configs.fields(CompareConfig) if re.search(r"\b(int|float)\b", annotation(n))]


def test_most_fields_are_numbers():
    assert len(NUMBERS) > 30


@pytest.mark.parametrize("name", NUMBERS)
def test_absurd_numbers_are_one_line_in_every_field(name):
    inside = {"tuple": lambda v: [v] * 2, "dict": lambda v: {"query": v}, "list": lambda v: [v]}
    wrap = next((f for word, f in inside.items() if annotation(name).startswith(word)), lambda v: v)
    if name == "task.pixel_range":
        wrap = lambda v: [0, v]  # noqa: E731
    whole = [] if re.search(r"\bfloat\b", annotation(name)) else [10**30, -(10**30)]
    for value in (*whole, float("inf"), float("nan"), True):
        values = wrap(value)
        for part in reversed(name.split(".")):
            values = {part: values}
        with pytest.raises(UserError) as error:
            configs.build(CompareConfig, values)
        assert name.split(".")[-1] in str(error.value)
        assert len(str(error.value)) < 400


def test_a_round_has_no_endless_exchanges():
    assert configs.build(RunConfig, {"gossip_steps": 10_000}).gossip_steps == 10_000
    with pytest.raises(UserError, match=r"gossip_steps: must be at most 10000, or period"):
        configs.build(RunConfig, {"gossip_steps": 10_001})


def test_what_does_not_fit_into_memory_is_one_line(tmp_path, capsys):
    """12 inputs times a rank of 10^9 in float32: 48 GB."""
    out = tmp_path / "run"
    arguments = ("run", "digits", *SMALL_TOY, "--lora.r", 10**9, "--out", out)
    code, (line,) = decaf(capsys, *arguments)
    assert code == 2
    assert re.match(r"decaf: memory: .*does not fit into it\. Make lora\.r,", line)
    code, _ = decaf(capsys, *arguments, "--lora.r", 2)  # what failed does not block the corrected command
    assert code == 0


# Options of a command: each value is looked at wherever it is given, or the option is refused as unused there

FEDERATION = ["federation", "init", "FILE", "--recipe", "digits", "--agents", "a,b"]
POSITIVE = [
    (["run", "digits"], "timeout"),
    (["run", "digits"], "scale"),
    (["compare", "digits"], "timeout"),
    (["plan", "digits"], "tflops"),
    (FEDERATION, "days"),
    (FEDERATION, "patience"),
    (FEDERATION, "give-up"),
    (["federation", "request", "FILE", "--name", "a", "--dial-only"], "days"),
    (["federation", "seal", "FILE"], "days"),
    (["federation", "check", "FILE", "--name", "a"], "timeout"),
]


@pytest.mark.parametrize("value", ["-1", "0", "nan", "inf", "1e400"])
@pytest.mark.parametrize(("command", "option"), POSITIVE)
def test_a_positive_number_of_a_command_is_one(command, option, value, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    line = line_of(capsys, *command, f"--{option}", value)
    assert line.startswith(f"decaf: {option.replace('-', '_')}: ")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("command", "option", "value"),
    [
        ("run", "jobs", "-1"),
        ("compare", "jobs", "-1"),
        ("compare", "jobs", "1000000000000"),
        ("run", "timeout", "1e300"),
        ("plan", "processes", "0"),
        ("plan", "sequence-length", "-5"),
        ("plan", "num-train", "0"),
    ],
)
def test_a_number_out_of_range_is_named(command, option, value, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert line_of(capsys, command, "digits", f"--{option}", value).startswith(f"decaf: {option.replace('-', '_')}: ")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("command", "option", "value", "user"),
    [
        ("run", "jobs", "4", "`decaf compare`"),
        ("run", "timeout", "5", "--engine torchrun"),
        ("run", "backend", "gloo", "--engine torchrun"),
        ("run", "wire", "bfloat16", "--engine torchrun"),
        ("compare", "timeout", "5", "--engine torchrun"),
        ("compare", "backend", "nonsense", "--engine torchrun"),
        ("compare", "wire", "bfloat16", "--engine torchrun"),
    ],
)
def test_an_option_that_nothing_uses_is_refused(command, option, value, user, tmp_path, monkeypatch, capsys):
    """`--wire bfloat16` without torchrun used to round nothing, without a word."""
    monkeypatch.chdir(tmp_path)
    line = line_of(capsys, command, "digits", f"--{option}", value)
    assert line.startswith(f"decaf: {option}: only {user} uses it")
    assert not list(tmp_path.iterdir())


def test_options_of_a_run_are_unknown_where_a_federation_is_drafted(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert "--jobs: unknown option" in line_of(capsys, *FEDERATION, "--jobs", "2")


def test_a_negative_seed_of_a_graph_is_refused(capsys):
    assert line_of(capsys, "graph", "ring", "--seed", "-1").startswith("decaf: seed: ")


def test_aliases_that_mean_little_are_fine(tmp_path):
    text = "task: &t {name: digits}\nagents: &n 3\nrounds: *n\ntraining: {<<: &s {steps: 2}, batch_size: *n}\n"
    config = read(tmp_path, text)
    assert (config.rounds, config.training.steps, config.training.batch_size) == (3, 2, 3)


def test_a_file_without_an_end_is_one_line(tmp_path, capsys):
    """A device, or a file of many gigabytes that takes no room on the disk."""
    (tmp_path / "device.yaml").symlink_to("/dev/zero")
    with (tmp_path / "sparse.yaml").open("wb") as file:
        file.truncate(2**40)
    for name in ("device.yaml", "sparse.yaml"):
        code, lines = decaf(capsys, "run", tmp_path / name, "--out", tmp_path / "run")
        assert (code, len(lines)) == (2, 1)
        assert "is larger than 1 MiB" in lines[0]
