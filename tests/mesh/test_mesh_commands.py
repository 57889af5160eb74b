"""`decaf federation` as people call it: what is written, printed and refused; each mistake one line, exit code 2."""

import json
import os
import shutil
import socket
import subprocess
import sys
import threading
import time
from datetime import UTC, datetime, timedelta

import pytest
import yaml
from rich.console import Console

import tiny
from decaf_lora.cli import main
from decaf_lora.engines.links import Links, Neighbour
from decaf_lora.federation import checking, commands, file, keys, status
from decaf_lora.federation.terms import GOOD
from endpoints import PATIENCE, QUICK, Heard, until

NAMES = ("alice", "bob", "carol")


@pytest.fixture
def said(capsys):
    """Runs a command that must succeed; what it prints."""

    def run(*arguments):
        capsys.readouterr()
        code = main(["federation", *map(str, arguments)])
        out = capsys.readouterr()
        assert code == 0, out
        assert out.err == ""
        return out.out

    return run


@pytest.fixture
def fails(capsys):
    """Runs a command that must fail; its one line."""

    def run(*arguments):
        capsys.readouterr()
        assert main(["federation", *map(str, arguments)]) == 2
        lines = [line for line in capsys.readouterr().err.splitlines() if line.strip()]
        assert len(lines) == 1, lines
        assert lines[0].startswith("decaf: ")
        return lines[0]

    return run


@pytest.fixture(scope="module")
def sealed(tmp_path_factory):
    """A federation of three, as made by its people; a folder to copy. carol only dials."""
    folder = tmp_path_factory.mktemp("federation")
    fed = folder / "fed.yaml"
    assert main(["federation", "init", str(fed), "--recipe", "digits", "--agents", "alice,bob,carol"]) == 0
    for name in NAMES:
        where = ["--dial-only"] if name == "carol" else ["--listen", "127.0.0.1:1"]
        assert main(["federation", "request", str(fed), "--name", name, *where]) == 0
    assert main(["federation", "seal", str(fed), *(str(folder / f"{name}.request") for name in NAMES)]) == 0
    return folder


@pytest.fixture
def place(sealed, tmp_path):
    shutil.copytree(sealed, tmp_path / "f")
    return tmp_path / "f"


def told(place):
    return keys.fingerprint(file.read_signed(place / "fed.yaml").organiser)


def test_what_the_people_do(place, said):
    fed = place / "fed.yaml"
    signed = file.read_signed(fed)
    assert [member.name for member in signed.agents] == list(NAMES)
    assert [member.address for member in signed.agents] == ["127.0.0.1:1", "127.0.0.1:1", None]
    assert signed.version == 1
    assert len(signed.base) > 100
    for secret in (*NAMES, "fed.organiser"):
        assert (place / f"{secret}.key").stat().st_mode & 0o777 == 0o600
        assert "PRIVATE" not in fed.read_text()
    for name in NAMES:
        assert "PRIVATE" not in (place / f"{name}.request").read_text()
    out = said("check", fed, "--name", "alice", "--trust", told(place))
    *lines, _, last = out.splitlines()
    assert [line.split()[0] for line in lines] == ["right"] * 15 + ["open", "right"]
    assert "data: 800 examples to learn from of 10 classes, 397 to score on (accuracy)." in out
    assert "right  one batch: goes through the model; its loss is " in out
    assert "this agent sends 24.6 kB a round, 737 kB in all; the agent trains alone first" in out
    assert last.startswith("Nothing is wrong. 1 thing is open: it can begin once the others are there.")
    assert "bob not reached: 127.0.0.1:1: Connection refused" in out
    assert "carol dials this agent" in out
    as_json = json.loads(said("check", fed, "--name", "alice", "--json"))  # the trust is kept
    assert [finding["verdict"] for finding in as_json] == ["right"] * 15 + ["open", "right"]


def test_help_names_every_command(said):
    out = said()
    for name in ("init", "request", "seal", "check", "status"):
        assert f"decaf federation {name}" in out
    assert "selfish" not in out


def test_run_options_go_into_the_draft(tmp_path, said):
    fed = tmp_path / "x.yaml"
    out = said("init", fed, "--agents", "a,b", "--rounds", "7", "--lr", "0.5", "--recipe", "digits", "--give-up=60")
    assert "fingerprint: " in out
    draft = file.read_draft(fed)
    assert draft.terms.rounds == 7
    assert draft.terms.training["learning_rate"] == 0.5
    assert draft.limits.give_up == 60
    assert draft.name == "x"


@pytest.mark.parametrize(
    ("arguments", "what"),
    [
        (["--recipe", "digit", "--agents", "a,b"], "recipe: 'digit' is not known. Did you mean 'digits'"),
        (["--recipe", "digits", "--agents", "a"], "agents"),
        (["--recipe", "digits", "--agents", "a,a"], "two agents are called a"),
        (["--recipe", "digits", "--agents", "a,B"], "'B' is not a name"),
        (["--recipe", "digits", "--agents", "a,b", "--graph", "rin"], "graph: 'rin' is not known"),
        (["--recipe", "digits", "--agents", "a,b,c", "--graph", "a-b"], "graph"),
        (["--recipe", "digits", "--agents", "a,b", "--graph", "random-matching"], "never starts again"),
        (["--recipe", "digits", "--agents", "a,b", "--algorithm", "fedavg"], "fedavg needs a server"),
        (["--recipe", "digits", "--agents", "a,b", "--rounds", "0"], "rounds: "),
        (["--recipe", "digits", "--agents", "a,b", "--gossip-steps", "2"], "algorithm.relay_rank"),
        (["--recipe", "digits", "--agents", "a,b", "--days", "0"], "days: input should be greater than 0"),
        (["--recipe", "digits", "--agents", "a,b", "--spam", "1"], "unknown option"),
        (
            ["--recipe", "digits", "--agents", "a,b,c,d", "--graph", "one-peer-hypercube", "--algorithm.tracking"],
            "algorithm.tracking: over the 2 rounds",
        ),
        (["--recipe", "digits", "--agents", "a,b,c,d", "--graph", "one-peer-exponential"], "edges in one direction"),
        (
            ["--recipe", "digits", "--agents", "a,b", "--gossip-steps", "2", "--algorithm.messages", "int8"],
            "algorithm.messages int8 cannot be combined",
        ),
        (["--agents", "a,b"], "recipe"),
    ],
)
def test_init_refuses_what_cannot_work(tmp_path, fails, arguments, what):
    if "--algorithm.tracking" in arguments:
        arguments = [*arguments, "True"]
    assert what in fails("init", tmp_path / "fed.yaml", *arguments)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("row", "holds"),
    [
        ("--algorithm decaf_tracked --graph base:5 --gossip_steps period --algorithm.messages int8", False),
        ("--algorithm decaf_tracked --graph base:5 --gossip_steps 2 --algorithm.messages int8", False),
        ("--algorithm decaf_tracked --graph ring", True),
        ("--algorithm decaf_tracked --graph ring --gossip_steps 4 --algorithm.relay_rank 2", True),
        ("--algorithm decaf_tracked --graph ring --algorithm.messages int8", True),
        ("--algorithm decaf_tracked --graph ring --algorithm.quasi_global 0", True),
        ("--algorithm decaf_tracked --graph complete --algorithm.messages int8", True),
        ("--algorithm fedavg", False),
        ("--graph random-matching", False),
    ],
)
def test_which_rows_of_the_readme_hold(tmp_path, said, fails, row, holds):
    """`init` refuses the others, and names those that are recommended."""
    names = ",".join("abcdefghij")
    arguments = ("init", tmp_path / "fed.yaml", "--recipe", "digits", "--agents", names, *row.split())
    if holds:
        said(*arguments)
    else:
        assert fails(*arguments).endswith(f"use {GOOD}.")


def test_init_overwrites_nothing(place, fails):
    before = (place / "fed.yaml").read_bytes()
    assert "exists already" in fails("init", place / "fed.yaml", "--recipe", "digits", "--agents", "a,b")
    assert (place / "fed.yaml").read_bytes() == before


def test_request_refuses(place, fails, tmp_path):
    fed = place / "fed.yaml"
    line = fails("request", fed, "--name", "alic", "--dial-only")
    assert "Did you mean 'alice'" in line
    assert line.endswith("Or, if alic is to be added, give --new.")
    assert "is an agent of" in fails("request", fed, "--name", "alice", "--dial-only", "--new")
    assert "'Dave' is not a name" in fails("request", fed, "--name", "Dave", "--dial-only", "--new")
    assert "listen: give" in fails("request", fed, "--name", "alice")
    assert "listen: give" in fails("request", fed, "--name", "alice", "--dial-only", "--listen", "a:1")
    assert "is not host:port" in fails("request", fed, "--name", "alice", "--listen", "alice")
    assert "is that of bob, not of alice" in fails(
        "request", fed, "--name", "alice", "--dial-only", "--key", place / "bob.key"
    )
    (place / "alice.key").chmod(0o644)
    assert "others may use" in fails("request", fed, "--name", "alice", "--dial-only")
    assert "cannot read" in fails("request", tmp_path / "none.yaml", "--name", "alice", "--dial-only")


def test_a_request_made_again_has_the_same_key(place, said):
    before = (place / "alice.key").read_bytes()
    said("request", place / "fed.yaml", "--name", "alice", "--listen", "alice.example.org:7447")
    assert (place / "alice.key").read_bytes() == before
    assert yaml.safe_load((place / "alice.request").read_text())["request"]["address"] == "alice.example.org:7447"


def test_the_next_version_keeps_who_sends_nothing_new(place, said):
    fed = place / "fed.yaml"
    said("request", fed, "--name", "alice", "--listen", "alice.example.org:7447")
    said("seal", fed, place / "alice.request")
    signed = file.read_signed(fed)
    assert signed.version == 2
    assert [member.address for member in signed.agents] == ["alice.example.org:7447", "127.0.0.1:1", None]


def test_an_agent_is_added_and_one_removed(place, said, fails):
    fed = place / "fed.yaml"
    said("request", fed, "--name", "dave", "--listen", "d:1", "--new")
    assert "is of dave, who is not an agent" in fails("seal", fed, place / "dave.request")
    assert "none of dave" in fails("seal", fed, "--agents", "alice,bob,dave")
    said("seal", fed, place / "dave.request", "--agents", "alice,bob,dave")
    assert [member.name for member in file.read_signed(fed).agents] == ["alice", "bob", "dave"]
    assert "name: 'carol' is not known" in "".join(f.said for f in checking.check(fed, "carol"))


def test_seal_refuses(place, fails, said):
    fed = place / "fed.yaml"
    before = fed.read_bytes()
    assert "is no request" in fails("seal", fed, fed)
    assert "two requests of alice" in fails("seal", fed, place / "alice.request", place / "alice.request")
    assert "before the file would" in fails("seal", fed, "--days", "1000")
    said("request", fed, "--name", "bob", "--dial-only")
    line = fails("seal", fed, place / "bob.request")
    assert "graph: bob and carol are linked and can both only dial. A graph that works: --graph " in line
    assert fed.read_bytes() == before
    said("seal", fed, place / "bob.request", "--graph", line.split("--graph ")[1])
    assert file.read_signed(fed).version == 2
    (place / "fed.organiser.key").unlink()
    keys.Organiser.make(place / "fed.organiser.key")
    assert "was sealed with another key" in fails("seal", fed)
    (place / "fed.organiser.key").chmod(0o640)
    assert "others may use" in fails("seal", fed)


def test_a_draft_is_sealed_only_with_every_request(tmp_path, said, fails):
    fed = tmp_path / "fed.yaml"
    said("init", fed, "--recipe", "digits", "--agents", "alice,bob")
    said("request", fed, "--name", "alice", "--listen", "a:1")
    assert "request: none of bob" in fails("seal", fed, tmp_path / "alice.request")
    assert "is a draft" in "".join(f.said for f in checking.check(fed, "alice"))


def verdicts(place, name, **options):
    return {f.what: (f.verdict, f.said) for f in checking.check(place / "fed.yaml", name, timeout=5.0, **options)}


def test_check_says_what_is_wrong(place, capsys):
    fed = place / "fed.yaml"
    told_ = told(place)
    found = verdicts(place, "alice")
    assert found["organiser"][0] == "wrong"
    assert f"--trust {told_}" in found["organiser"][1]
    assert found["neighbours"] == ("open", "not dialled before the rest is right.")
    (place / "alice.key").chmod(0o644)
    assert "chmod 600" in verdicts(place, "alice", told=told_)["key"][1]
    (place / "alice.key").chmod(0o600)
    (place / "alice.key").rename(place / "old.key")
    keys.make_identity("alice", place / "alice.key")
    assert "is not the key whose certificate the file has for alice" in verdicts(place, "alice")["key"][1]
    assert verdicts(place, "alice", key=place / "old.key", told=told_)["key"][0] == "right"
    fed.write_text(fed.read_text().replace("rounds: 30", "rounds: 31"))
    found = verdicts(place, "alice")
    assert list(found) == ["signature"]
    assert "has been altered" in found["signature"][1]
    assert main(["federation", "check", str(fed), "--name", "alice"]) == 2


def resealed(place, **changes):
    """The file, signed by its organiser with other values."""
    organiser = keys.Organiser.load(commands.key_of_organiser(place / "fed.yaml"))
    signed = file.read_signed(place / "fed.yaml").model_copy(update=changes)
    file.write(file.seal(signed, organiser), place / "fed.yaml")
    return signed


def test_check_of_another_base_model_or_software_or_of_an_expired_file(place):
    told_ = told(place)
    signed = file.read_signed(place / "fed.yaml")
    first = sorted(signed.base)[0]
    resealed(place, base={**signed.base, first: "0" * 64}, software=("9.0", "9.1"), tokenizer={"vocab.txt": "0" * 64})
    found = verdicts(place, "alice", told=told_)
    assert found["base model"][0] == "wrong"
    assert f"{first} differs (1 of {len(signed.base)})" in found["base model"][1]
    assert "pip install 'decaf-lora[mesh]>=9.0,<9.1'" in found["software"][1]
    soon = (datetime.now(UTC) + timedelta(days=5, hours=1)).replace(microsecond=0)
    resealed(place, base=signed.base, version=2, expires=soon, software=signed.software)
    odd = [said for what, (verdict, said) in verdicts(place, "alice").items() if (what, verdict) == ("file", "odd")]
    assert odd == ["it ends in 5 days: no agent starts with it after that; ask the organiser for a new version."]
    past = signed.expires.replace(year=2020)
    resealed(place, base=signed.base, version=3, expires=past, tokenizer={"vocab.txt": "0" * 64})
    found = verdicts(place, "alice")
    assert "vocab.txt is missing" in found["base model"][1]
    assert "the file expired at 2020-" in found["clock"][1]


def test_check_reads_the_sites_own_data(tmp_path, said, capsys):
    """A label that is not among the agreed classes is named; so is a column that is not there."""
    model = tiny.write("bert", tmp_path / "model")
    recipe = tmp_path / "recipe.yaml"
    task = {"name": "sequence-classification", "model": str(model), "classes": ["bad", "good"]}
    recipe.write_text(yaml.safe_dump({"task": task, "lora": {"r": 2, "target_modules": ["query", "value"]}}))
    fed = tmp_path / "fed.yaml"
    said("init", fed, "--recipe", recipe, "--agents", "a,b")
    for name in "ab":
        said("request", fed, "--name", name, "--listen", "127.0.0.1:1")
    said("seal", fed, tmp_path / "a.request", tmp_path / "b.request")
    trusted = ["--name", "b", "--trust", told(tmp_path)]
    good = tmp_path / "good.csv"
    good.write_text("text,label\n" + "the cat sat,good\nthe dog sat,bad\n" * 20)
    out = said("check", fed, *trusted, "--data", good)
    assert "data: 32 examples to learn from of 2 classes, 8 to score on" in out  # a fifth is held out
    assert "right  example 1: '<s> the cat sat </s>' (5 tokens), label 'good'" in out
    assert "right  labels: 'bad' 16, 'good' 16." in out
    assert "odd    in both sets: 8 of 8 test examples are also to learn from" in out
    assert "secret" not in fed.read_text()
    for content, options, what in [
        ("text,label\n" + "the cat sat,good\nthe dog sat,awful\n" * 20, [], "awful"),
        ("question,label\n" + "the cat sat,good\n" * 20, [], "task.text_column"),
        ("text,label\n", [], "task"),
    ]:
        other = tmp_path / "other.csv"
        other.write_text(content)
        capsys.readouterr()
        assert main(["federation", "check", str(fed), *trusted, "--data", str(other), *options]) == 2
        out = capsys.readouterr().out
        (line,) = [line for line in out.splitlines() if line.startswith("wrong")]
        assert line.startswith("wrong  data: ")
        assert out.splitlines()[-1].startswith("1 thing is wrong: mend what the lines say")
        assert what in line


def test_check_takes_no_option_that_all_share(place, fails):
    assert "rounds" in fails("check", place / "fed.yaml", "--name", "alice", "--rounds", "3")


def test_check_sees_a_neighbour_that_is_up_and_one_that_refuses(place):
    """Carol dials alice, who listens and knows her, and bob, whose file is another."""
    alice, bob = (keys.load_identity(place / f"{name}.key") for name in ("alice", "bob"))
    carol = keys.load_identity(place / "carol.key")
    stranger = keys.make_identity("carol", place / "stranger.key")
    ends = []
    for own, sees in ((alice, carol), (bob, stranger)):
        neighbour = Neighbour("carol", sees.certificate, None, 2, True)
        ends.append(Links(own, [neighbour], listen="127.0.0.1:0", timing=QUICK))
        ends[-1].start(Heard())
    try:
        signed = file.read_signed(place / "fed.yaml")
        members = [
            member.model_copy(update={"address": f"127.0.0.1:{end.port}"})
            for member, end in zip(signed.agents, ends, strict=False)
        ]
        resealed(place, agents=(*members, signed.agents[2]))
        found = verdicts(place, "carol", told=told(place))
    finally:
        for end in ends:
            end.stop()
    assert found["neighbour alice"] == ("right", f"alice answers at {members[0].address}.")
    refused = "refused by bob after its certificate was shown: ask whether the file of bob is version 1."
    assert found["neighbour bob"] == ("wrong", refused)


def test_two_sites_that_wait_for_each_other_meet(place):
    """Both ends of an edge run `check --wait`, one for longer than the other; a third is not there."""
    ports = [free_port(), free_port()]
    signed = file.read_signed(place / "fed.yaml")
    members = [m.model_copy(update={"address": f"127.0.0.1:{p}"}) for m, p in zip(signed.agents, ports, strict=False)]
    signed = resealed(place, agents=(*members, signed.agents[2]))
    found = {}

    def meet(name, wait):
        own = keys.load_identity(place / f"{name}.key")
        bind = f"127.0.0.1:{ports[0 if name == 'alice' else 1]}"
        found[name] = {f.what: (f.verdict, f.said) for f in checking.meet(signed, own, place / "fed.yaml", bind, wait)}

    threads = [threading.Thread(target=meet, args=wait) for wait in (("alice", 3.0), ("bob", 6.0))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(PATIENCE)
    assert found["alice"]["neighbour bob"] == ("right", "bob is up.")
    assert found["bob"]["neighbour alice"] == ("right", "alice is up.")
    assert found["alice"]["neighbour carol"][0] == "open"
    assert "it has not dialled this agent" in found["alice"]["neighbour carol"][1]
    own = status.AgentStatus("f", 1, "alice", os.getpid(), "training", written=time.time())
    with status.Teller(status.file_of(place / "fed.yaml", "alice"), own):
        meet("alice", 1.0)
    assert "the agent is running" in found["alice"]["neighbours"][1]


def free_port():
    with socket.create_server(("127.0.0.1", 0)) as server:
        return server.getsockname()[1]


def test_status(place, said, fails):
    fed = place / "fed.yaml"
    assert "status: alice has not run here yet" in fails("status", fed, "--name", "alice")
    assert "Did you mean 'alice'" in fails("status", fed, "--name", "alise")
    edges = [status.EdgeStatus("bob", up=True, since=1.0, missed=2, sent=1500), status.EdgeStatus("carol", why="lost")]
    what = status.AgentStatus("f", 1, "alice", 7, "training", 3, 30, loss=0.5, waits_for=["bob"], neighbours=edges)
    path = status.file_of(fed, "alice")
    with status.Teller(path, what, pause=0.01):
        assert status.read(path) == what
        what.round = 4
        until(lambda: status.read(path).round == 4)
        what.state = "done"
    assert status.read(path).state == "done"
    assert json.loads(said("status", fed, "--name", "alice", "--json"))["neighbours"][0]["name"] == "bob"
    out = said("status", fed, "--name", "alice")
    assert "f, version 1: alice, done" in out
    assert "round 4 of 30, loss 0.500\n" in out
    assert "1.5 kB" in out
    assert "waits" not in out  # it has ended
    for content in ("{", "[]", '{"name": "alice"}', "{}"):
        path.write_text(content)
        assert "is not what an agent writes" in fails("status", fed, "--name", "alice")


def test_the_screen_fits_a_terminal_and_says_all(capsys):
    """Neighbours up or down, since when and why; round, whom it waits for, loss, scores, bytes, time left."""
    now = time.time()
    why = "bob not reached: bob.example.org:7447: Connection refused (is bob running, is the address right?)."
    edges = [
        status.EdgeStatus("bob", since=now - 7300, why=why, missed=12, waited=31.0, rejected=2, sent=10**9),
        status.EdgeStatus("carol", up=True, since=now - 50, received=2_000_000, why="the connection broke"),
    ]
    what = status.AgentStatus("clinics", 3, "alice", 7, "waiting", 11, 200, ["bob"], 0.4, 0.8, 0.1, 0.6, 5000.0)
    what.neighbours, what.written = edges, now
    console = Console(width=80, highlight=False)

    def screen():
        capsys.readouterr()
        console.print(status.shown(what))
        lines = capsys.readouterr().out.splitlines()
        assert all(len(line) <= 80 for line in lines)
        return " ".join(" ".join(lines).split())

    said = screen()
    for part in (
        "clinics, version 3: alice, waiting",
        "round 11 of 200, loss 0.400, score 0.800, at the start 0.100, on its own data alone 0.600, about 83 min left",
        "waits for bob",
        "bob │ down 2 h 1 min │ 12 │ 31 s │ 2 │ 1.0 GB │ 0 B",
        "carol │ up 50 s │ 0 │ 0 s │ 0 │ 0 B │ 2.0 MB",
        why,
    ):
        assert part in said
    assert "broke" not in said  # carol is up again
    what.written = now - 60
    assert "waiting 60 s ago; it has not been heard of since" in screen()
    what.state, what.written = "serving", now
    assert "alice, finished, and here until its neighbours are done too" in screen()
    what.state, what.said = "gave up", "nobody answered for 60 s: bob"
    assert "nobody answered for 60 s: bob" in screen()
    assert why not in screen()


def test_unknown_commands_and_options(place, fails):
    assert "Did you mean 'check'" in fails("chek")
    assert "unknown option" in fails("check", place / "fed.yaml", "--nam", "alice")
    assert "trust" in fails("check", place / "fed.yaml", "--name", "alice", "--trst", "x")


def test_without_the_extra_it_says_what_to_install(place):
    code = "import sys; sys.modules[sys.argv.pop(1)] = None; from decaf_lora.cli import main; sys.exit(main())"
    for missing in ("grpc", "cryptography"):
        command = [sys.executable, "-c", code, missing, "federation", "check", place / "fed.yaml", "--name", "alice"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE)
        assert done.returncode == 2
        assert done.stderr == f"decaf: mesh: {missing} is missing; pip install 'decaf-lora[mesh]'.\n"
