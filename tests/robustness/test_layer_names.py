"""Names of layers in a configuration mean what the user sees, or they are refused with the nearest ones."""

import copy

import pytest
import torch
import transformers
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

import tiny
from decaf_lora.adapters import attach
from decaf_lora.cli import main
from decaf_lora.config import LoraOptions, RunConfig
from decaf_lora.errors import UserError
from decaf_lora.runs.build import lora_config

pytestmark = [pytest.mark.usefixtures("datasets_cache"), pytest.mark.filterwarnings("ignore::FutureWarning")]


def bert():
    return AutoModelForSequenceClassification.from_config(transformers.BertConfig(**tiny.SMALL)).eval()


def llama():
    return AutoModelForCausalLM.from_config(transformers.LlamaConfig(**tiny.LLAMA)).eval()


def options(**values):
    """The configuration that these options of a user make for a task without own modules."""
    config = RunConfig.model_validate({"lora": values})
    return lora_config(config, LoraConfig(target_modules=["query", "value"]))


RWKV = {"vocab_size": 60, "hidden_size": 16, "num_hidden_layers": 2}


# Names that match


@pytest.mark.parametrize(
    "targets", ["query", "attention.self.query", "bert.encoder.layer.0.attention.self.query", r".*\.0\..*query"]
)
def test_one_name_on_the_command_line_is_a_name(targets):
    sites = list(attach(bert(), options(target_modules=targets)).sites)
    every = [f"bert.encoder.layer.{i}.attention.self.query" for i in range(2)]
    assert sites == (every if "0" not in targets else every[:1])


def test_a_name_in_python_that_is_no_pattern_of_a_whole_name_is_a_name_too():
    assert len(attach(bert(), LoraConfig(target_modules="query")).sites) == 2
    without = LoraConfig(target_modules=["query", "key"], exclude_modules="key")
    assert len(attach(bert(), without).sites) == 2


@pytest.mark.parametrize("blocks", [[0], [1], [0, 1]])
def test_blocks_are_counted_from_zero(blocks):
    found = attach(bert(), options(target_modules=["query"], layers_to_transform=blocks)).sites
    assert list(found) == [f"bert.encoder.layer.{i}.attention.self.query" for i in blocks]


@pytest.mark.parametrize(
    ("kind", "values", "expected"),
    [
        ("Mixtral", {**tiny.LLAMA, "num_local_experts": 2}, {"q_proj", "v_proj"}),
        ("Phi", {**tiny.SMALL}, {"q_proj", "v_proj", "fc1", "fc2"}),
        ("GPTNeoX", {**tiny.SMALL}, {"query_key_value"}),
        (
            "Rwkv",
            {"vocab_size": 60, "hidden_size": 16, "num_hidden_layers": 2},
            {"key", "value", "receptance", "output"},
        ),
    ],
)
def test_the_defaults_of_a_family_are_those_of_peft(kind, values, expected):
    model = AutoModelForCausalLM.from_config(getattr(transformers, f"{kind}Config")(**values)).eval()
    sites = attach(model, LoraConfig(r=2)).sites
    assert {site.rpartition(".")[2] for site in sites} == expected


# Names that match nothing


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"target_modules": ["query", "valeu"]}, r"lora\.target_modules: valeu matches no linear layer.*value"),
        ({"target_modules": "qeury"}, r"lora\.target_modules: qeury matches no linear layer.*query"),
        ({"target_modules": r".*(qeury|valeu)"}, r"lora\.target_modules: .*qeury"),
        ({"exclude_modules": ["polar"]}, r"lora\.exclude_modules: polar matches no module.*pooler"),
        ({"exclude_modules": "polar"}, r"lora\.exclude_modules: polar matches no module.*pooler"),
        ({"modules_to_save": ["clasifier"]}, r"lora\.modules_to_save: clasifier matches no module.*classifier"),
        ({"modules_to_save": [""]}, r"lora\.modules_to_save: +matches no module"),
        ({"rank_pattern": {"key": 2}}, r"lora\.rank_pattern: key matches no linear layer.*query"),
        ({"alpha_pattern": {r"layer\.7\..*": 2}}, r"lora\.alpha_pattern: layer"),
        ({"layers_to_transform": [7]}, r"layers_to_transform: block 7 holds no layer.*blocks 0 to 1"),
        ({"layers_to_transform": [0, 2]}, r"layers_to_transform: block 2 holds no layer"),
        ({"layers_to_transform": [-1]}, r"layers_to_transform: block -1 holds no layer"),
        ({"exclude_modules": ["query", "value"]}, "no layer of BertForSequenceClassification is left"),
    ],
)
def test_a_name_that_means_nothing_is_refused_with_the_nearest(values, message):
    with pytest.raises(UserError, match=message) as error:
        attach(bert(), options(**values))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"target_modules": ".*query("}, r"lora\.target_modules: .*no regular expression"),
        ({"exclude_modules": "*query"}, r"lora\.exclude_modules: .*no regular expression"),
        ({"rank_pattern": {"query(": 4}}, r"lora\.rank_pattern: .*no regular expression"),
        ({"alpha_pattern": {"[": 4}}, r"lora\.alpha_pattern: .*no regular expression"),
        ({"rank_pattern": {"query": 0}}, r"lora\.rank_pattern\.query: 0 is no rank"),
        ({"alpha_pattern": {"query": -2}}, r"lora\.alpha_pattern\.query: -2 is no scaling"),
        ({"rank_pattern": {"query": 99}}, r"rank 99 is larger than"),
        ({"target_modules": "all-linear", "layers_to_transform": [0]}, r"lora: `layers_to_transform`"),
    ],
)
def test_values_without_a_meaning_are_one_line(values, message):
    with pytest.raises(UserError, match=message) as error:
        attach(bert(), options(**values))
    assert "\n" not in str(error.value)


def test_a_family_without_defaults_lists_its_layers():
    with pytest.raises(UserError, match=r"lora\.target_modules: unset.*Sequential.*0, 2"):
        attach(nn.Sequential(nn.Linear(3, 3), nn.Tanh(), nn.Linear(3, 3)), LoraConfig())


# Modules to train in full


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"modules_to_save": ["embeddings"]}, r"embeddings means modules within one another \(bert\.embeddings and"),
        ({"modules_to_save": ["attention"]}, "no layer of BertForSequenceClassification is left"),
        ({"modules_to_save": ["y"]}, r"is, or holds, a layer of lora\.target_modules"),
        ({"modules_to_save": ["dropout"]}, r"dropout cannot be trained in full, it has no parameters"),
        ({"modules_to_save": ["encoder.layer"]}, "no layer of BertForSequenceClassification is left"),
    ],
)
def test_modules_that_cannot_be_trained_in_full_are_refused(values, message):
    with pytest.raises(UserError, match=message) as error:
        attach(bert(), options(**values))
    assert "\n" not in str(error.value)


def test_a_module_within_another_is_trained_once():
    own = options(modules_to_save=["pooler", "pooler.dense", "classifier"])
    attached = attach(bert(), own)
    assert attached.modules == ["bert.pooler", "classifier"]
    assert set(attached.config.modules_to_save) == {"pooler", "classifier"}


@pytest.mark.parametrize("given", [None, ["pooler"], ["classifier"], ["classifier", "pooler"]])
def test_the_task_s_new_layers_are_trained_whatever_else_is(given):
    task = LoraConfig(target_modules=["query"], modules_to_save=["classifier"])
    found = lora_config(RunConfig(lora=LoraOptions(modules_to_save=given)), task)
    assert set(found.modules_to_save) == {"classifier", *(given or [])}


def test_a_quantized_module_cannot_be_trained_in_full():
    model = bert()
    model.bert.pooler.dense.weight = nn.Parameter(torch.zeros(16, 16, dtype=torch.uint8), requires_grad=False)
    with pytest.raises(UserError, match="its weights are quantized"):
        attach(model, options(modules_to_save=["pooler"]))


# Layers that are no linear ones


def test_experts_that_are_no_linear_layers_are_named():
    model = AutoModelForCausalLM.from_config(transformers.MixtralConfig(**tiny.LLAMA, num_local_experts=2)).eval()
    with pytest.raises(UserError, match=r"MixtralExperts.*only linear layers.*q_proj, k_proj, v_proj, o_proj"):
        attach(model, LoraConfig(r=2, target_modules="all-linear"))


def test_an_attention_module_is_no_linear_layer():
    with pytest.raises(UserError, match=r"attention is a MultiheadAttention; only linear layers"):
        attach(
            tiny.new_model(transformers.AutoModel, "siglip", tiny.DUALS), LoraConfig(target_modules=["head.attention"])
        )


@pytest.mark.parametrize("attribute", ["weight", "bias", "in_features", "out_features"])
def test_code_that_looks_at_a_layer_sees_the_base_as_in_peft(attribute):
    plain = bert()
    lora = LoraConfig(r=2, target_modules=["query"])
    ours = attach(copy.deepcopy(plain), lora).model.bert.encoder.layer[0].attention.self.query
    theirs = get_peft_model(copy.deepcopy(plain), copy.deepcopy(lora)).base_model.model.bert.encoder.layer[0]
    ours, theirs = getattr(ours, attribute), getattr(theirs.attention.self.query, attribute)
    assert torch.equal(ours, theirs) if isinstance(ours, torch.Tensor) else ours == theirs
    with pytest.raises(AttributeError, match="nonsense"):
        _ = attach(copy.deepcopy(plain), lora).model.bert.encoder.layer[0].attention.self.query.nonsense


# The command


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("place")
    for family in ("bert", "siglip"):
        tiny.write(family, folder / family)
    rows = [f"the {a} is {w},{label}" for a in ("cat", "dog") for w in ("good", "old") for label in ("no", "yes")] * 3
    (folder / "a.csv").write_text("\n".join(["text,label", *rows]))
    return folder


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (("--lora.target_modules", "query", "--lora.layers_to_transform", "0"), 0, ""),
        (("--lora.layers_to_transform", "7"), 2, "block 7 holds no layer"),
        (("--lora.layers_to_transform", "x"), 2, "layers-to-transform"),
        (("--lora.rank_pattern", "query", "0"), 2, "lora.rank_pattern.query: 0 is no rank"),
    ],
)
def test_the_command(arguments, code, message, place, tmp_path, capsys):
    task = ("--task", "sequence-classification", "--task.model", place / "bert", "--task.data", place / "a.csv")
    sizes = ("--agents", 2, "--rounds", 1, "--training.steps", 1, "--training.batch-size", 2, "--partition", "iid")
    options = (*task, *sizes, "--task.test-share", 0.25, "--algorithm", "local", "--device", "cpu")
    capsys.readouterr()
    assert main(["run", "digits", *map(str, options), *arguments, "--out", str(tmp_path / "run")]) == code
    err = capsys.readouterr().err
    assert message in err
    if code:
        assert len(err.strip().splitlines()) == 1
