"""The federation file and the keys: what is signed, what is trusted, and what is refused with which words."""

import copy
import hashlib
import json
import os
import struct
from datetime import UTC, datetime, timedelta

import networkx as nx
import numpy as np
import pytest
import yaml
from cryptography.hazmat.primitives.asymmetric import ed25519
from hypothesis import given, settings
from hypothesis import strategies as st

from decaf_lora import graphs, recipes
from decaf_lora.config import CompareConfig, RunConfig, TaskConfig, build
from decaf_lora.errors import UserError
from decaf_lora.federation import base_model, dialling, file, keys, terms, trust


@pytest.fixture(scope="module")
def known(tmp_path_factory):
    """The organiser and three sites."""
    folder = tmp_path_factory.mktemp("keys")
    sites = [keys.make_identity(name, folder / f"{name}.key") for name in ("alice", "bob", "carol")]
    return keys.Organiser.make(folder / "organiser.key"), sites


def digits(**changes):
    base = recipes.get("digits")
    values = {name: getattr(base, name) for name in RunConfig.model_fields}
    return build(RunConfig, {**values, "agents": 3, **changes})


def signed(known, **changes):
    organiser, sites = known
    values = {
        "name": "hospitals",
        "version": 1,
        "expires": "2100-01-01T00:00:00Z",
        "organiser": organiser.public,
        "software": ("0.1.0", "0.2.0"),
        "agents": [
            {"name": own.name, "address": f"{own.name}.example.org:7447", "certificate": own.certificate.decode()}
            for own in sites
        ],
        "graph": "ring",
        "weights": [graphs.ring(3).weights.tolist()],
        "limits": {},
        "terms": terms.terms_of(digits()),
        "base": {"a": "0" * 64},
        "tokenizer": {},
        **changes,
    }
    return file.Signed.model_validate(values)


def written(known, path, **changes):
    made = signed(known, **changes)
    file.write(file.seal(made, known[0]), path)
    return made


# Keys


def test_a_key_file_is_for_its_owner_alone(tmp_path):
    before = os.umask(0)  # the most open one
    try:
        own = keys.make_identity("alice", tmp_path / "alice.key")
    finally:
        os.umask(before)
    assert own.path.stat().st_mode & 0o777 == 0o600
    assert keys.load_identity(own.path) == own
    for mode in (0o640, 0o604, 0o660, 0o777):
        own.path.chmod(mode)
        with pytest.raises(UserError, match=f"key: others may use .*mode {mode:o}.*chmod 600"):
            keys.load_identity(own.path)
    own.path.chmod(0o400)
    assert keys.load_identity(own.path) == own


def test_a_key_is_never_overwritten(tmp_path):
    own = keys.make_identity("alice", tmp_path / "alice.key")
    with pytest.raises(UserError, match="exists already"):
        keys.make_identity("alice", own.path)
    assert keys.load_identity(own.path) == own


@pytest.mark.parametrize("content", [b"", b"hello", b"\xff" * 100, b"x" * 70_000])
def test_what_is_no_key(tmp_path, content):
    path = tmp_path / "alice.key"
    keys.write_private(path, content)
    with pytest.raises(UserError, match="key: "):
        keys.load_identity(path)
    with pytest.raises(UserError, match="key: "):
        keys.Organiser.load(path)
    with pytest.raises(UserError, match="key: cannot read"):
        keys.load_identity(tmp_path / "nobody.key")
    with pytest.raises(UserError, match="is not a file"):
        keys.load_identity(tmp_path)


def test_a_key_and_the_certificate_of_another(tmp_path, known):
    _, (alice, bob, _) = known
    keys.write_private(tmp_path / "mixed.key", alice.key + bob.certificate)
    with pytest.raises(UserError, match="not that of the certificate"):
        keys.load_identity(tmp_path / "mixed.key")
    with pytest.raises(UserError, match="not the key of an organiser"):
        keys.Organiser.load(alice.path)


@pytest.mark.parametrize("name", ["", "Alice", "a b", "-a", "a-", "a" * 64, "ä", "a.b", "a\n"])
def test_what_is_no_name(tmp_path, name):
    with pytest.raises(UserError, match="is not a name"):
        keys.make_identity(name, tmp_path / "x.key")
    assert not (tmp_path / "x.key").exists()


def test_a_fingerprint_is_that_of_the_key_however_it_is_typed(known):
    organiser, _ = known
    found = keys.fingerprint(organiser.public)
    digits = hashlib.sha256(bytes.fromhex(organiser.public)).hexdigest()[:32]
    assert found.replace("-", "") == digits
    assert [len(group) for group in found.split("-")] == [4] * 8
    assert keys.read_fingerprint(f" {found.upper().replace('-', ' ')} ") == found
    for wrong in ("", "7c41", found + "0", found.replace(found[0], "g")):
        with pytest.raises(UserError, match="is not a fingerprint"):
            keys.read_fingerprint(wrong)


# The signed part


def test_the_signature_is_ed25519_over_canonical_json(known, tmp_path):
    """Checked with nothing of this package: YAML, JSON and Ed25519 as the standards say."""
    path = tmp_path / "fed.yaml"
    made = written(known, path)
    content = yaml.safe_load(path.read_text())
    text = json.dumps(content["signed"], sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    key = ed25519.Ed25519PublicKey.from_public_bytes(bytes.fromhex(content["signed"]["organiser"]))
    key.verify(bytes.fromhex(content["signature"]), text.encode())
    assert file.read_signed(path) == made
    assert made.digest() == hashlib.sha256(text.encode()).hexdigest()


def test_the_file_may_be_laid_out_anew(known, tmp_path):
    path = tmp_path / "fed.yaml"
    made = written(known, path)
    path.write_text(json.dumps(yaml.safe_load(path.read_text()), sort_keys=True, indent=7))
    assert file.read_signed(path) == made


def leaves(value, where=()):
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from leaves(inner, (*where, key))
    elif isinstance(value, list) and value:
        for key, inner in enumerate(value):
            yield from leaves(inner, (*where, key))
    else:
        yield where


def test_whatever_is_altered_is_noticed(known, tmp_path):
    """Every value of the signed part, one at a time; also one that is taken away."""
    path = tmp_path / "fed.yaml"
    written(known, path)
    content = yaml.safe_load(path.read_text())
    places = list(leaves(content["signed"]))
    assert len(places) > 80
    for place in places:
        for change in ("altered", "removed"):
            forged = copy.deepcopy(content)
            inner = forged["signed"]
            for key in place[:-1]:
                inner = inner[key]
            if change == "removed":
                del inner[place[-1]]
            else:
                inner[place[-1]] = {"other": inner[place[-1]]}
            path.write_text(json.dumps(forged))
            with pytest.raises(UserError, match="has been altered after it was signed"):
                file.read_signed(path)


@pytest.mark.parametrize("signature", ["", "00", "zz" * 64, "00" * 64, 5, None])
def test_what_is_no_signature(known, tmp_path, signature):
    path = tmp_path / "fed.yaml"
    written(known, path)
    content = yaml.safe_load(path.read_text())
    path.write_text(json.dumps({**content, "signature": signature}))
    with pytest.raises(UserError, match="federation: "):
        file.read_signed(path)


def test_a_file_that_another_has_signed_is_another_organisers(known, tmp_path):
    """Whoever signs anew has to say so with another key, which is not the trusted one."""
    path, kept = tmp_path / "fed.yaml", tmp_path / "alice.trust"
    made = written(known, path)
    trust.accept(made, kept, keys.fingerprint(known[0].public))
    mallory = keys.Organiser.make(tmp_path / "mallory.key")
    forged = made.model_copy(update={"organiser": mallory.public, "version": 2})
    file.write(file.seal(forged, mallory), path)
    with pytest.raises(UserError, match="and hospitals was signed by"):
        trust.accept(file.read_signed(path), kept)
    with pytest.raises(UserError, match="and hospitals was signed by"):
        trust.accept(file.read_signed(path), kept, keys.fingerprint(mallory.public))


@pytest.mark.parametrize(
    ("text", "what"),
    [
        ("", "is not a federation file"),
        ("- 1", "is not a federation file"),
        ("a: 1", "is not a federation file"),
        ("a: [", "is not YAML"),
        ("\x00", "is not YAML"),
        ("a: &x [1]\nb: *x", "has YAML aliases"),
        ("!!python/object/apply:os.system [ls]", "is not YAML"),
        ("signed: {a: .nan}\nsignature: ab", "has been altered"),
        ("signed: {2000-01-01: 1}\nsignature: ab", "has been altered"),
        ("draft: {}", "is a draft"),
        ("signed: {}\nsigned: {}", "signed is there twice"),
        ("x: " + "[" * 5000, "is not YAML"),
    ],
)
def test_what_is_no_federation_file(tmp_path, text, what):
    path = tmp_path / "fed.yaml"
    path.write_text(text)
    with pytest.raises(UserError, match=what):
        file.read_signed(path)


def test_a_file_that_is_too_large_or_not_there(tmp_path):
    path = tmp_path / "fed.yaml"
    with pytest.raises(UserError, match="cannot read"):
        file.read_signed(path)
    path.write_bytes(b"#" * (file.MOST_BYTES + 1))
    with pytest.raises(UserError, match="larger than 16 MiB"):
        file.read_signed(path)


def test_an_unknown_field_is_of_another_version_of_the_software(known, tmp_path):
    """Signed well, and not understood: refused, not half obeyed."""
    organiser, _ = known
    path = tmp_path / "fed.yaml"
    values = {**signed(known).values(), "quorum": 3}
    file.write({"signed": values, "signature": organiser.sign(file.canonical(values))}, path)
    with pytest.raises(UserError, match="quorum: unknown field"):
        file.read_signed(path)


def test_expiry(known):
    made = signed(known, expires="2030-01-01T00:00:00Z")
    file.refuse_expired(made, datetime(2029, 12, 31, tzinfo=UTC))
    with pytest.raises(UserError, match="expired at 2030-01-01 00:00 UTC, and this machine's clock says 2030-01-02"):
        file.refuse_expired(made, datetime(2030, 1, 2, tzinfo=UTC))


@pytest.mark.parametrize(
    ("changes", "what"),
    [
        ({"expires": "2030-01-01T00:00:00"}, "must be a time in UTC"),
        ({"version": 0}, "version"),
        ({"format": 2}, "format"),
        ({"weights": [np.eye(3).tolist()]}, "connect|reach"),
        ({"weights": [graphs.ring(4).weights.tolist()]}, "not for 3 agents"),
        ({"weights": [[[1, 1, 0], [0, 1, 0], [0, 0, 1]]]}, "graph"),
        ({"weights": []}, "weights"),
        ({"tells": ["round", "loss"]}, "tells"),
        ({"agents": []}, "agents"),
        ({"organiser": "ab"}, "organiser"),
    ],
)
def test_what_cannot_be_signed(known, changes, what):
    with pytest.raises(ValueError, match=what):
        signed(known, **changes)


def test_members_are_who_their_certificates_say(known):
    _, (alice, bob, carol) = known

    def member(name, own, address=None):
        return {"name": name, "address": address, "certificate": own.certificate.decode()}

    for agents, what in [
        ([member("alice", bob), member("bob", alice), member("carol", carol)], "the certificate of alice is for bob"),
        ([member("alice", alice), member("alice", alice), member("bob", bob)], "two agents are called alice"),
        ([member("alice", alice, "nowhere"), member("bob", bob), member("carol", carol)], "is not host:port"),
        ([{**member("alice", alice), "certificate": "x"}, member("bob", bob)], "not one self-signed certificate"),
        ([{**member("alice", alice), "age": 3}, member("bob", bob)], "age"),
    ]:
        with pytest.raises(ValueError, match=what):
            signed(known, agents=agents)


@pytest.mark.parametrize(
    ("address", "parts"),
    [
        ("alice.example.org:7447", ("alice.example.org", 7447)),
        ("10.0.0.1:1", ("10.0.0.1", 1)),
        ("[::1]:65535", ("::1", 65535)),
        ("alice", None),
        ("alice:", None),
        (":7447", None),
        ("alice:0", None),
        ("alice:65536", None),
        ("alice:-1", None),
        ("alice:²", None),
        ("::1:7447", None),
        ("https://alice:7447", None),
        ("a b:7447", None),
    ],
)
def test_addresses(address, parts):
    if parts:
        assert file.host_port(address) == parts
    else:
        with pytest.raises(UserError, match="is not host:port"):
            file.host_port(address)


def test_agents_of_two_versions_are_told_which_is_older(known):
    one, two = signed(known), signed(known, version=2)
    other = signed(known, graph="another")
    assert one.facts() == signed(known).facts()
    assert len({each.facts() for each in (one, two, other)}) == 3
    assert one.differs(two.facts()) == (
        "it follows version 2 of the federation file, this agent version 1: start this agent again with version 2"
    )
    assert two.differs(one.facts()) == (
        "it follows version 1 of the federation file, this agent version 2: start it again with version 2"
    )
    assert one.differs(other.facts()) == (
        "it follows another version 1 of the federation file: one of the two is not the organiser's"
    )


# Trust


def test_trust_is_told_once_and_kept(known, tmp_path):
    kept, made = tmp_path / "alice.trust", signed(known)
    found = keys.fingerprint(known[0].public)
    with pytest.raises(UserError, match=f"--trust {found}"):
        trust.accept(made, kept)
    other = found[:-4] + ("0000" if found[-4:] != "0000" else "1111")
    with pytest.raises(UserError, match=f"signed by {found}, not by {other}"):
        trust.accept(made, kept, other)
    assert not kept.exists()
    trust.accept(made, kept, found)
    trust.accept(made, kept)
    trust.accept(signed(known, name="banks"), kept, found)  # another federation of the same organiser
    trust.accept(made, kept)


def test_older_files_are_refused(known, tmp_path):
    kept, found = tmp_path / "alice.trust", keys.fingerprint(known[0].public)
    trust.accept(signed(known, version=2), kept, found)
    with pytest.raises(UserError, match="the file is version 1, and version 2 was seen before"):
        trust.accept(signed(known, version=1), kept, found)
    with pytest.raises(UserError, match="sealed two files with one number"):
        trust.accept(signed(known, version=2, graph="other"), kept)
    trust.accept(signed(known, version=3), kept)
    with pytest.raises(UserError, match="is version 2, and version 3 was seen"):
        trust.accept(signed(known, version=2), kept)


@pytest.mark.parametrize("content", ["", "[]", '{"hospitals": 1}', '{"hospitals": {"organiser": "x"}}', "\x00"])
def test_a_damaged_record_of_trust_trusts_nobody(known, tmp_path, content):
    kept = tmp_path / "alice.trust"
    kept.write_text(content)
    with pytest.raises(UserError, match="is damaged"):
        trust.accept(signed(known), kept, keys.fingerprint(known[0].public))


# Terms


def test_every_field_is_shared_or_local():
    """A new field of the task must be put on one side: what is not shared must not be signed."""
    assert set(terms.SHARED_TASK) <= set(TaskConfig.model_fields)
    assert set(terms.LOCAL_TASK) == {
        *(
            "data",
            "file_column",
            "subset",
            "train_split",
            "test_split",
            "test_share",
            "max_train",
            "max_test",
            "data_seed",
        ),
        *("text_column", "text_pair_column", "image_column", "label_column", "prompt_column", "answer_column"),
        *("file_column", "delimiter", "quoting", "encoding", "pixel_range"),
        *("gradient_checkpointing", "num_workers", "image_cache", "skip_bad", "eval_batch_size"),
    }


def test_nothing_of_a_site_is_signed():
    config = digits(task={"name": "sequence-classification", "data": "secret.csv", "classes": ("a", "b"), "model": "m"})
    made = terms.terms_of(config)
    said = made.model_dump(mode="json")
    fields = {place[-1] for place in leaves(said)} | {place[0] for place in leaves(said)}
    assert not fields & {*terms.LOCAL_TASK, "device", "agents_per_pass", "partition", "evaluate_every"}
    assert "secret" not in file.canonical(said).decode()
    with pytest.raises(ValueError, match="data belongs to a site"):
        terms.Terms.model_validate({**made.model_dump(), "task": {"name": "digits", "data": "x"}})


def test_a_site_adds_its_own_and_changes_nothing_shared():
    made = terms.terms_of(digits())
    config = made.config(3, "ring", {"device": "cpu", "eval_batch_size": 8, "agents_per_pass": 1})
    assert (config.task.eval_batch_size, config.device, config.training.agents_per_pass) == (8, "cpu", 1)
    assert config.training.learning_rate == digits().training.learning_rate
    assert (config.agents, config.rounds) == (3, 30)
    for shared in ("rounds", "classes", "steps", "learning_rate", "model", "graph", "agents", "lora"):
        with pytest.raises(UserError, match=f"{shared}: the federation file says it"):
            made.config(3, "ring", {shared: 1})


def test_the_options_of_ones_own_task_are_shared():
    task = {"name": "moons.py:make", "noise": 0.25, "data": "secret.csv"}
    made = terms.terms_of(digits(task=task))
    assert made.task["noise"] == 0.25
    assert "data" not in made.task
    config = terms.Terms.model_validate(made.model_dump(mode="json")).config(3, "ring", {"data": "mine.csv"})
    assert config.task.own == {"noise": 0.25}
    assert config.task.data == "mine.csv"


def test_a_site_without_a_test_set_holds_one_out(tmp_path):
    """One file has no test set. A folder may have one, which must not be passed over without a word."""
    made, data = terms.terms_of(digits(task={"name": "causal-lm", "model": "m"})), tmp_path / "x.csv"
    data.touch()
    assert made.config(3, "ring", {"data": str(data)}).task.test_share == 0.2
    assert made.config(3, "ring", {"data": str(data), "test_split": "test"}).task.test_share is None
    assert made.config(3, "ring", {"data": str(data), "test_share": 0.5}).task.test_share == 0.5
    assert made.config(3, "ring", {"data": str(tmp_path)}).task.test_share is None
    assert made.config(3, "ring", {"data": "org/data"}).task.test_share is None


@pytest.mark.parametrize(
    ("changes", "what"),
    [
        ({"algorithm": {"name": "fedavg"}}, "fedavg needs a server.*use decaf"),
        ({"algorithm": {"name": "centralized"}}, "centralized needs a server"),
        ({"algorithm": {"name": "scaffold"}}, "scaffold needs a server"),
        ({"gossip_steps": "period"}, "gossip_steps: write the number"),
        ({"init_adapters": ("x",)}, "init_adapters"),
        ({"task": {"name": "sequence-classification", "data": "x.csv", "model": "m"}}, "task.classes: list the"),
    ],
)
def test_what_needs_a_server_or_everybodys_data_is_refused(changes, what):
    with pytest.raises(UserError, match=what):
        terms.terms_of(digits(**changes))


def test_a_draft_that_was_edited_means_what_it_says(tmp_path):
    """Words that YAML 1.1 takes for truth values, and numbers that it takes for words."""
    path = tmp_path / "fed.yaml"
    made = terms.terms_of(
        digits(task={"name": "sequence-classification", "model": "m", "classes": ("no", "on", "1e3")})
    )
    draft = file.Draft(name="hospitals", agents=("no", "b"), graph="ring", terms=made)
    file.write({"draft": draft.model_dump(mode="json")}, path)
    assert file.read_draft(path) == draft
    text = path.read_text().replace("learning_rate: 0.02", "learning_rate: 2e-3").replace("'on'", "on")
    path.write_text(text)
    edited = file.read_draft(path)
    assert edited.terms.training["learning_rate"] == 0.002
    assert edited.terms.task["classes"] == ["no", "on", "1e3"]


def test_the_draft(tmp_path):
    path = tmp_path / "fed.yaml"
    draft = file.Draft(name="hospitals", agents=("a", "b"), graph="ring", terms=terms.terms_of(digits()))
    file.write({"draft": draft.model_dump(mode="json")}, path)
    assert file.read_draft(path) == draft
    text = path.read_text()
    path.write_text(text.replace(" learning_rate:", " learning_rat:"))
    with pytest.raises(UserError, match=r"learning_rat: unknown field[.] Did you mean learning_rate"):
        file.read_draft(path)
    path.write_text(text.replace("rounds: 30", "rounds: many"))
    with pytest.raises(UserError, match=r"fed\.yaml: terms\.rounds: "):
        file.read_draft(path)


# Who dials


@pytest.mark.parametrize("kind", ["ring", "complete", "line", "star", "hypercube"])
def test_with_all_dialable_every_graph_works(kind):
    dialling.check_dialling(graphs.as_schedule(graphs.parse(kind, 4, 0)).at(0), "abcd", [True] * 4)


def test_an_edge_that_nobody_can_dial_is_refused_with_a_graph_that_works():
    with pytest.raises(UserError) as error:
        dialling.check_dialling(graphs.ring(4), ["a", "b-1", "c", "d"], [False, False, True, True])
    said = str(error.value)
    assert said.startswith("graph: a and b-1 are linked and can both only dial. A graph that works: --graph ")
    edges = dialling.edges_of(said.rpartition(" ")[2], ["a", "b-1", "c", "d"])
    assert edges
    assert (0, 1) not in edges
    with pytest.raises(UserError, match="One of them needs an address"):
        dialling.check_dialling(graphs.ring(3), "abc", [False] * 3)


@given(n=st.integers(2, 9), seed=st.integers(0, 1000), p=st.floats(0, 1), data=st.data())
@settings(max_examples=60, deadline=None)
def test_what_is_proposed_connects_all_and_can_be_dialled(n, seed, p, data):
    listens = data.draw(st.lists(st.booleans(), min_size=n, max_size=n).filter(any))
    drawn = nx.compose(nx.random_labeled_tree(n, seed=seed), nx.gnp_random_graph(n, p, seed=seed))
    graph = graphs.from_networkx(drawn)
    edges = dialling.proposed(graph, listens)
    assert all(listens[i] or listens[j] for i, j in edges)
    assert nx.is_connected(nx.Graph(edges))
    assert set(nx.Graph(edges)) == set(range(n))
    if all(listens):
        assert edges == graph.edges
    names = [f"agent-{k}" for k in range(n)]
    assert dialling.edges_of(",".join(f"{names[i]}-{names[j]}" for i, j in edges), names) == edges


@pytest.mark.parametrize("text", ["ring", "a-b,b-x", "a-a", "a", "", "a-b,,b-c"])
def test_what_is_no_list_of_edges(text):
    assert dialling.edges_of(text, ["a", "b", "c"]) is None


# The base model


def safetensors(path, tensors):
    header, body = {}, b""
    for name, array in tensors.items():
        kind = {"float32": "F32", "float16": "F16"}[array.dtype.name]
        header[name] = {"dtype": kind, "shape": array.shape, "data_offsets": [len(body), len(body) + array.nbytes]}
        body += array.tobytes()
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + body)


def test_hashes_do_not_depend_on_how_tensors_are_split_over_files(tmp_path):
    a, b = np.arange(6, dtype=np.float32).reshape(2, 3), np.ones(4, np.float16)
    one, two = tmp_path / "one", tmp_path / "two"
    one.mkdir()
    two.mkdir()
    safetensors(one / "model.safetensors", {"a": a, "b": b})
    safetensors(two / "model-1.safetensors", {"b": b})
    safetensors(two / "model-2.safetensors", {"a": a})
    found = base_model.tensors(one)
    assert found == base_model.tensors(two)
    assert found["a"] == hashlib.sha256(b"F32 [2, 3]\n" + a.tobytes()).hexdigest()
    safetensors(two / "model-2.safetensors", {"a": a.reshape(3, 2)})
    with pytest.raises(UserError, match=r"the weights in .*two are not the organiser's: a differs \(1 of 2\)"):
        base_model.check_same("weights", base_model.tensors(two), found, two)
    (two / "model-2.safetensors").unlink()
    with pytest.raises(UserError, match="a is missing"):
        base_model.check_same("weights", base_model.tensors(two), found, two)
    base_model.check_same("weights", found, found, one)


def test_the_demos_model_is_hashed():
    folder = base_model.model_folder(TaskConfig(name="digits"))
    from safetensors import safe_open

    with safe_open(folder / "model.safetensors", "np") as opened:
        assert sorted(base_model.tensors(folder)) == sorted(opened.keys())
    assert "tokenizer.json" in base_model.tokenizer(folder)


@pytest.mark.parametrize("content", [b"", b"\xff" * 8, struct.pack("<Q", 5) + b"hello", struct.pack("<Q", 2) + b"{}"])
def test_a_damaged_model(tmp_path, content):
    (tmp_path / "model.safetensors").write_bytes(content)
    with pytest.raises(UserError, match=r"task\.model: "):
        base_model.tensors(tmp_path)
    header = json.dumps({"a": {"dtype": "F32", "shape": [9], "data_offsets": [0, 36]}}).encode()
    (tmp_path / "model.safetensors").write_bytes(struct.pack("<Q", len(header)) + header + bytes(35))
    with pytest.raises(UserError, match="it ends early"):
        base_model.tensors(tmp_path)


def test_a_model_that_is_not_here(tmp_path):
    with pytest.raises(UserError, match="is neither a folder nor on the Hub"):
        base_model.model_folder(TaskConfig(name="causal-lm", model=str(tmp_path / "nothing")))
    with pytest.raises(UserError, match="has no weights as safetensors"):
        base_model.tensors(tmp_path)


def test_certificates_last_as_long_as_they_say(tmp_path):
    own = keys.make_identity("alice", tmp_path / "alice.key", days=10)
    expires = keys.read_certificate(own.certificate.decode()).expires
    assert abs(expires - datetime.now(UTC) - timedelta(days=10)) < timedelta(minutes=10)


def test_recipes_are_runs():
    assert isinstance(recipes.get("digits"), CompareConfig)
