"""An adapter to start from means here what it means in PEFT, or it is refused by name."""

import contextlib
import copy
import dataclasses
import json
import math
import shutil
import warnings

import peft
import pytest
import torch
import transformers
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file

import tiny
from decaf_lora.adapters import attach, fields, load_peft, rank_fields, read_adapter, read_config
from decaf_lora.cli import main
from decaf_lora.errors import UserError

pytestmark = [
    pytest.mark.usefixtures("datasets_cache"),
    pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning", "ignore::RuntimeWarning"),
]

TARGETS = ["q_proj", "v_proj"]
TOKENS = torch.tensor([[1, 5, 9, 12, 7], [1, 22, 6, 3, 3]])


def base():
    return tiny.new_model(transformers.AutoModelForCausalLM, "llama", tiny.DECODERS)


def write(folder, seed=0, **values):
    """What PEFT saves after some training of an adapter with this configuration."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = get_peft_model(base(), LoraConfig(**{"r": 4, "lora_alpha": 8, "target_modules": TARGETS} | values))
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.data += 0.1 * torch.randn_like(parameter)
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    return write(tmp_path_factory.mktemp("adapter"))


@pytest.fixture
def adapter(plain, tmp_path):
    """A copy to spoil."""
    return shutil.copytree(plain, tmp_path / "adapter")


def edit(folder, **values):
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))
    return folder


def agree_with_peft(folder, lora):
    """Logits of an agent that starts from `folder` and of PEFT's own model, the same to rounding."""
    attached = attach(base(), lora)
    adapters = load_peft(attached, attached.init([0, 1], seed=0), [folder, None], [0, 1])
    with torch.no_grad():
        theirs = PeftModel.from_pretrained(base(), folder).eval()(input_ids=TOKENS).logits
        with attached.bind(adapters.select([0])):
            ours = attached.model(input_ids=TOKENS).logits
        with attached.bind(adapters.select([1])):
            fresh = attached.model(input_ids=TOKENS).logits
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(fresh, theirs, atol=1e-2)


# Honoured: the same logits as in PEFT


@pytest.mark.parametrize(
    "values",
    [
        {},
        {"init_lora_weights": "gaussian"},
        {"init_lora_weights": False},
        {"init_lora_weights": "orthogonal"},
        {"use_rslora": True},
        {"lora_alpha": 5},
        {"lora_dropout": 0.5},
        {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {r"layers\.1\.self_attn\.v_proj": 3}},
        {"use_rslora": True, "rank_pattern": {r".*\.0\..*": 3}},
        {"fan_in_fan_out": True},
    ],
)
def test_what_is_honoured_gives_the_logits_of_peft(values, tmp_path):
    folder = write(tmp_path, **values)
    own = LoraConfig(target_modules=TARGETS, **{"r": 4, "lora_alpha": 8} | rank_fields(folder))
    agree_with_peft(folder, own)


@pytest.mark.parametrize(("r", "alpha"), [(4, 8), (4, 1), (6, 30)])
def test_ranks_and_scales_of_the_run_need_not_be_the_adapter_s(r, alpha, plain):
    agree_with_peft(plain, LoraConfig(r=r, lora_alpha=alpha, target_modules=TARGETS))


def test_patterns_of_layers_that_the_adapter_does_not_have_are_left_out(adapter):
    edit(adapter, rank_pattern={"o_proj": 3, "q_proj": 4}, alpha_pattern={"gate": 7})
    assert rank_fields(adapter) == {
        "r": 4,
        "lora_alpha": 8,
        "use_rslora": False,
        "rank_pattern": {"q_proj": 4},
        "alpha_pattern": {},
    }


# Refused by name


CHANGES_THE_BASE = [
    "pissa",
    "pissa_niter_4",
    "olora",
    "OLoRA",
    "corda",
    "loftq",
    "lora_ga",
    "eva",
    "mica",
    "new_one",
    3,
]


@pytest.mark.parametrize("start", [*CHANGES_THE_BASE, "eva", "mica", "new_one", 3])
def test_a_start_that_is_not_plain_is_refused_by_name(start, adapter):
    with pytest.raises(UserError, match=rf"adapter_config\.json has init_lora_weights {start!r}"):
        read_config(edit(adapter, init_lora_weights=start))


@pytest.mark.parametrize("start", ["pissa", "olora"])
def test_peft_s_own_way_to_convert_is_right(start, tmp_path):
    """The remedy that the message names: afterwards the adapter is a plain one with the same logits."""
    values = {"r": 2, "lora_alpha": 4, "target_modules": TARGETS, "init_lora_weights": start}
    model = get_peft_model(base(), LoraConfig(**values))
    model.peft_config["default"].init_lora_weights = True  # as PEFT asks for, so that it saves the start itself
    model.save_pretrained(tmp_path / "start")
    model.peft_config["default"].init_lora_weights = start
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data += 0.1
    with torch.no_grad():
        expected = model.eval()(input_ids=TOKENS).logits
    model.save_pretrained(tmp_path / "changed")
    with pytest.raises(UserError, match="path_initial_model_for_weight_conversion"):
        read_config(tmp_path / "changed")
    model.save_pretrained(tmp_path / "plain", path_initial_model_for_weight_conversion=str(tmp_path / "start"))
    attached = attach(base(), LoraConfig(target_modules=TARGETS, **rank_fields(tmp_path / "plain")))
    start_from = load_peft(attached, attached.init([0], seed=0), [tmp_path / "plain"], [0])
    with torch.no_grad(), attached.bind(start_from):
        torch.testing.assert_close(attached.model(input_ids=TOKENS).logits, expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("use_dora", True),
        ("bias", "all"),
        ("bias", "lora_only"),
        ("lora_bias", True),
        ("trainable_token_indices", [1, 2]),
        ("layer_replication", [[0, 1], [0, 2]]),
        ("target_parameters", ["mlp.experts.gate_up_proj"]),
        ("alora_invocation_tokens", [3]),
        ("use_qalora", True),
        ("ensure_weight_tying", True),
        ("kasa_config", {"beta": 1.0}),
        ("megatron_config", {"tensor_parallel": 2}),
        ("an_option_of_tomorrow", "on"),
        ("another_of_tomorrow", 0.5),
    ],
)
def test_what_is_not_supported_is_refused_by_name(field, value, adapter):
    with pytest.raises(UserError, match=rf"adapter_config\.json has {field} "):
        read_config(edit(adapter, **{field: value}))


@pytest.mark.parametrize(
    ("field", "value", "lost"),
    [
        ("exclude_modules", ["q_proj"], 2),
        ("exclude_modules", r".*\.0\..*", 2),
        ("layers_to_transform", [0], 2),
        ("layers_to_transform", 0, 2),
        ("target_modules", ["v_proj"], 2),
        ("target_modules", ".*_nothing", 4),
    ],
)
def test_factors_that_peft_would_drop_are_refused(field, value, lost, adapter):
    """PEFT reads such an adapter without a word, and leaves its factors of these layers out."""
    edit(adapter, **{field: value})
    with pytest.raises(UserError, match=rf"holds factors of {lost} layers \(first: model\.layers\.\d\."):
        read_adapter(adapter)


@pytest.mark.parametrize(
    "values",
    [
        {"target_modules": None},
        {"target_modules": "all-linear"},
        {"target_modules": r".*\.[qv]_proj", "exclude_modules": []},
        {"layers_to_transform": [0, 1], "layers_pattern": "layers"},
        {"exclude_modules": ["k_proj"]},
    ],
)
def test_fields_that_leave_nothing_out_are_fine(values, adapter):
    assert len(read_adapter(edit(adapter, **values)).tensors) == 8


@pytest.mark.parametrize(
    ("field", "value"),
    [
        *(("target_modules", value) for value in (7, {"a": 1}, ["q_proj", 1])),
        *(("exclude_modules", value) for value in (7, [None])),
        *(("modules_to_save", value) for value in ("classifier", {"a": 1})),
        *(("layers_to_transform", value) for value in ("0", [True], [0.0])),
        *(("layers_pattern", value) for value in (3, "(", ["layers", 1])),
    ],
)
def test_names_of_layers_that_are_none_are_refused(field, value, adapter):
    with pytest.raises(UserError, match=rf"adapter_config\.json: {field}: .* is n"):
        read_config(edit(adapter, **{field: value}))


def test_an_option_of_tomorrow_that_is_off_does_no_harm(adapter):
    off = {"one": None, "two": False, "three": [], "four": {}}
    assert read_config(edit(adapter, **off))["r"] == 4


def test_every_field_of_peft_has_its_rule():
    """A new PEFT may bring fields: each is honoured, without effect, or refused when it is on."""
    known = {f.name for f in dataclasses.fields(LoraConfig)}
    assert known >= fields.HONOURED | fields.WITHOUT_EFFECT
    assert not fields.HONOURED & fields.WITHOUT_EFFECT
    refused = known - fields.HONOURED - fields.WITHOUT_EFFECT
    for field in sorted(refused):
        values = {"peft_type": "LORA", "r": 2, "lora_alpha": 2, field: "something"}
        with pytest.raises(UserError, match=field):
            fields.check_saved(values, "adapter_config.json", "init_adapters")
    assert peft.__version__  # the rule is for the version that is installed


def test_other_types_of_adapters_are_refused(adapter):
    with pytest.raises(UserError, match="type IA3, not LORA"):
        read_config(edit(adapter, peft_type="IA3"))


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("r", 0),
        ("r", -1),
        ("r", 2.5),
        ("r", True),
        ("r", "4"),
        ("r", None),
        ("lora_alpha", 0),
        ("lora_alpha", -8),
        ("lora_alpha", math.nan),
        ("lora_alpha", math.inf),
        ("lora_alpha", True),
        ("lora_alpha", "8"),
        ("use_rslora", "yes"),
        ("rank_pattern", {"q_proj": 0}),
        ("rank_pattern", {"q_proj(": 2}),
        ("rank_pattern", [2]),
        ("alpha_pattern", {"q_proj": -1}),
        ("alpha_pattern", {"q_proj": math.nan}),
        ("alpha_pattern", {"q_proj": 10**400}),
        ("lora_alpha", 10**400),
        ("r", 10**30),
        ("rank_pattern", {"q_proj": 10**30}),
        ("lora_dropout", 1),
        ("lora_dropout", -0.1),
        ("lora_dropout", math.nan),
        ("lora_dropout", "0.1"),
        ("lora_dropout", True),
        ("lora_dropout", None),
        ("lora_dropout", [0.1]),
    ],
)
def test_numbers_without_a_meaning_are_refused(field, value, adapter):
    with pytest.raises(UserError, match=rf"adapter_config\.json: {field}"):
        read_adapter(edit(adapter, **{field: value}))


@pytest.mark.parametrize("field", ["r", "lora_alpha"])
def test_a_number_that_is_missing_is_named(field, adapter):
    path = adapter / "adapter_config.json"
    values = json.loads(path.read_text())
    del values[field]
    path.write_text(json.dumps(values))
    with pytest.raises(UserError, match=f"has no {field}"):
        read_config(adapter)


@pytest.mark.parametrize("text", ["[]", "null", "3", '"LORA"', "", "{", "\x00", "[" * 100000])
def test_a_configuration_that_is_none(text, adapter):
    (adapter / "adapter_config.json").write_text(text)
    with pytest.raises(UserError, match=r"adapter_config\.json"):
        read_config(adapter)


# Tensors


def spoil(folder, change):
    path = folder / "adapter_model.safetensors"
    tensors = load_file(path)
    name = next(name for name in sorted(tensors) if "lora_B" in name)
    tensors[name] = change(tensors[name])
    save_file(tensors, path)
    return name


@pytest.mark.parametrize(
    ("change", "what"),
    [
        (lambda t: t.bool(), "is of bool"),
        (lambda t: t.to(torch.complex64), "is of complex64"),
        (lambda t: t.int(), "is of int32"),
        (lambda t: t * math.nan, "not finite"),
        (lambda t: t + math.inf, "not finite"),
        (lambda t: t.double() + 1e300, "not finite"),
    ],
)
def test_tensors_without_a_meaning_name_file_and_tensor(change, what, adapter):
    name = spoil(adapter, change)
    with pytest.raises(UserError, match=what) as error:
        read_adapter(adapter)
    assert name in str(error.value)
    assert "adapter_model.safetensors" in str(error.value)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_other_precisions_are_read(dtype, adapter):
    spoil(adapter, lambda t: t.to(dtype))
    assert read_adapter(adapter).rank("model.layers.0.self_attn.q_proj") == 4


LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 9\n"


@pytest.mark.parametrize("file", ["adapter_model.safetensors", "adapter_config.json"])
def test_a_pointer_of_git_lfs_is_named(file, adapter):
    (adapter / file).write_bytes(LFS)
    with pytest.raises(UserError, match=rf"{file} is a pointer of Git LFS.*git lfs pull"):
        read_adapter(adapter)


@pytest.mark.parametrize("size", [0, 7, 200, 900])
def test_a_file_that_is_cut_short_is_named(size, adapter):
    path = adapter / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:size])
    with pytest.raises(UserError, match=rf"adapter_model\.safetensors \({size} bytes\) is damaged or cut short"):
        read_adapter(adapter)


def test_the_format_of_an_older_peft_is_refused_with_the_way_to_convert(adapter):
    torch.save(load_file(adapter / "adapter_model.safetensors"), adapter / "adapter_model.bin")
    (adapter / "adapter_model.safetensors").unlink()
    with pytest.raises(UserError, match=r"adapter_model\.bin.*save_pretrained"):
        read_adapter(adapter)
    # The way that the message names, taken.
    PeftModel.from_pretrained(base(), adapter).save_pretrained(adapter)
    agree_with_peft(adapter, LoraConfig(r=4, lora_alpha=8, target_modules=TARGETS))


def test_an_adapter_of_another_base_is_told(adapter):
    model = base()
    model.config._name_or_path = "someone/llama"
    attached = attach(model, LoraConfig(r=4, lora_alpha=8, target_modules=TARGETS))
    fresh = attached.init([0], seed=0)
    with pytest.warns(UserWarning, match="another base model.*someone/chat.*someone/llama"):
        load_peft(attached, fresh, [edit(adapter, base_model_name_or_path="someone/chat")], [0])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load_peft(attached, fresh, [edit(adapter, base_model_name_or_path="/elsewhere/llama")], [0])


anything = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)


@given(st.dictionaries(st.sampled_from(sorted(f.name for f in dataclasses.fields(LoraConfig))), anything, max_size=4))
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_no_configuration_ends_in_a_traceback(plain, values):
    read = {**json.loads((plain / "adapter_config.json").read_text()), **copy.deepcopy(values)}
    with contextlib.suppress(UserError):
        kept = fields.check_saved(read, "adapter_config.json", "init_adapters")
        assert kept["r"] >= 1
        assert 0 < kept["lora_alpha"] < math.inf


# The command


@pytest.fixture(scope="module")
def place(tmp_path_factory, plain):
    folder = tmp_path_factory.mktemp("place")
    tiny.write("llama", folder / "llama")
    lines = [json.dumps({"text": f"the {word} cat is good"}) for word in ("red", "old", "big", "small") * 4]
    (folder / "a.jsonl").write_text("\n".join(lines))
    shutil.copytree(plain, folder / "good")
    shutil.copytree(plain, folder / "pissa")
    edit(folder / "pissa", init_lora_weights="pissa")
    return folder


def run(folder, adapter, capsys, *more):
    task = ("--task", "causal-lm", "--task.model", folder / "llama", "--task.data", folder / "a.jsonl")
    sizes = ("--agents", 2, "--rounds", 1, "--training.steps", 1, "--training.batch-size", 2, "--partition", "iid")
    options = (*task, *sizes, "--task.test-share", 0.25, "--algorithm", "local", "--device", "cpu", *more)
    capsys.readouterr()
    code = main(["run", "digits", *map(str, options), "--init-adapters", str(adapter)])
    return code, capsys.readouterr().err


def test_the_command_takes_or_refuses_an_adapter_in_one_line(place, tmp_path, capsys):
    code, err = run(place, place / "pissa", capsys, "--out", tmp_path / "refused")
    assert code == 2
    assert len(err.strip().splitlines()) == 1
    assert "init_lora_weights 'pissa'" in err
    assert not (tmp_path / "refused").exists()
    assert run(place, place / "good", capsys, "--out", tmp_path / "taken")[0] == 0
