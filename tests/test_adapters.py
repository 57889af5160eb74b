"""Stacked LoRA against PEFT itself: the same sites, the same forward, adapters that travel both ways."""

import copy
import dataclasses

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    BertConfig,
    CLIPConfig,
    CLIPModel,
    GPT2Config,
    LlamaConfig,
)

from decaf_lora.adapters import attach, load_peft, save_peft
from decaf_lora.errors import UserError


def llama():
    config = LlamaConfig(
        vocab_size=50, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2
    )
    return AutoModelForCausalLM.from_config(config)


def gpt2():
    return AutoModelForCausalLM.from_config(GPT2Config(vocab_size=50, n_embd=16, n_layer=2, n_head=2, n_positions=32))


def bert():
    config = BertConfig(
        vocab_size=50,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=24,
        num_labels=3,
    )
    return AutoModelForSequenceClassification.from_config(config)


MODELS = {"llama": llama, "gpt2": gpt2, "bert": bert}


@pytest.fixture(params=list(MODELS))
def model(request):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return MODELS[request.param]().eval()


CONFIGS = {
    "defaults": LoraConfig(r=3),
    "all-linear": LoraConfig(r=2, target_modules="all-linear", lora_alpha=6),
    "regex": LoraConfig(r=2, target_modules=r".*\.(1|h\.1)\..*(q_proj|c_attn|query|value)"),
    "patterns": LoraConfig(
        r=4,
        target_modules=["q_proj", "v_proj", "c_attn", "query", "dense"],
        rank_pattern={r".*\.0\..*": 2},
        alpha_pattern={r".*\.1\..*": 16},
        use_rslora=True,
    ),
    "layers": LoraConfig(r=2, target_modules=["q_proj", "c_attn", "query"], layers_to_transform=[1]),
    "excluded": LoraConfig(r=2, target_modules="all-linear", exclude_modules=["c_proj", "o_proj", "key"]),
}


def in_model(name, model):
    """The configuration `name` with the names that this family has: others would be refused."""
    config = copy.deepcopy(CONFIGS[name])
    ends = {module.rpartition(".")[2] for module, _ in model.named_modules()}
    for field in ("target_modules", "exclude_modules"):
        if isinstance(given := getattr(config, field), set):
            setattr(config, field, given & ends)
    return config


def peft_sites(model, config):
    peft = get_peft_model(copy.deepcopy(model), copy.deepcopy(config)).base_model.model
    return {
        name: (m.r["default"], m.scaling["default"]) for name, m in peft.named_modules() if isinstance(m, LoraLayer)
    }


@pytest.mark.parametrize("name", list(CONFIGS))
@pytest.mark.filterwarnings("ignore")
def test_sites_ranks_and_scales_are_those_of_peft(model, name):
    config = in_model(name, model)
    expected = peft_sites(model, config)
    attached = attach(model, config)
    assert {k: (s.rank, s.scale) for k, s in attached.sites.items()} == expected
    assert len(expected) > 0


def random_adapter(attached, n, seed=1, common=False):
    generator = torch.Generator().manual_seed(seed)
    start = attached.init(range(n), seed=seed, common_start=common)

    def noise(tensors, size):
        return {k: t + size * torch.randn(t.shape, generator=generator) for k, t in tensors.items()}

    return dataclasses.replace(start, B=noise(start.B, 0.3), extras=noise(start.extras, 0.1))


def logits(model, rows):
    return model(input_ids=rows).logits


@pytest.mark.parametrize("n", [1, 2, 3])
@pytest.mark.filterwarnings("ignore")
def test_saved_agents_give_the_same_logits_in_peft(model, n, tmp_path):
    plain = copy.deepcopy(model)
    config = LoraConfig(r=2, lora_alpha=8, target_modules="all-linear")
    attached = attach(model, config)
    adapter = random_adapter(attached, n)
    rows = torch.randint(0, 50, (n * 4, 7), generator=torch.Generator().manual_seed(3))
    with torch.no_grad(), attached.bind(adapter) as bound:
        ours = logits(bound, rows).view(n, 4, -1)
    for agent in range(n):
        save_peft(adapter, agent, attached.config, tmp_path / str(agent))
        theirs = PeftModel.from_pretrained(copy.deepcopy(plain), tmp_path / str(agent)).eval()
        with torch.no_grad():
            expected = logits(theirs, rows[agent * 4 : agent * 4 + 4]).flatten(1)
        torch.testing.assert_close(ours[agent], expected, rtol=1e-5, atol=1e-5)
        assert not torch.allclose(expected, logits(plain, rows[agent * 4 : agent * 4 + 4]).flatten(1), atol=1e-3)


@pytest.mark.filterwarnings("ignore")
def test_modules_to_save_are_one_copy_an_agent_and_load_in_peft(tmp_path):
    plain = bert().eval()
    config = LoraConfig(r=2, target_modules=["query", "value"], modules_to_save=["classifier"], task_type="SEQ_CLS")
    attached = attach(copy.deepcopy(plain), config)
    assert set(attached.extras) == {"classifier.weight", "classifier.bias"}
    adapter = random_adapter(attached, 3)
    rows = torch.randint(0, 50, (6, 5), generator=torch.Generator().manual_seed(3))
    with torch.no_grad(), attached.bind(adapter) as bound:
        ours = logits(bound, rows).view(3, 2, -1)
    for agent in range(3):
        save_peft(adapter, agent, attached.config, tmp_path / str(agent))
        theirs = PeftModel.from_pretrained(copy.deepcopy(plain), tmp_path / str(agent)).eval()
        with torch.no_grad():
            torch.testing.assert_close(
                ours[agent], logits(theirs, rows[agent * 2 : agent * 2 + 2]), rtol=1e-5, atol=1e-5
            )


@pytest.mark.filterwarnings("ignore")
def test_an_adapter_trained_and_saved_by_peft_loads(model, tmp_path):
    config = LoraConfig(r=2, lora_alpha=6, target_modules="all-linear", init_lora_weights=False)
    theirs = get_peft_model(copy.deepcopy(model), copy.deepcopy(config)).eval()
    theirs.save_pretrained(tmp_path)
    attached = attach(model, LoraConfig(r=2, lora_alpha=6, target_modules="all-linear"))
    adapter = load_peft(attached, attached.init([0, 1], seed=0), [tmp_path, tmp_path], [0, 1])
    rows = torch.randint(0, 50, (3, 6), generator=torch.Generator().manual_seed(3))
    with torch.no_grad(), attached.bind(adapter) as bound:
        ours = logits(bound, rows.repeat(2, 1)).view(2, 3, -1)
        expected = logits(theirs, rows).flatten(1)
    torch.testing.assert_close(ours[0], expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(ours[1], expected, rtol=1e-5, atol=1e-5)


@pytest.mark.filterwarnings("ignore")
def test_loading_an_adapter_that_does_not_fit_names_the_tensors(tmp_path):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        get_peft_model(llama(), LoraConfig(r=3, target_modules=["q_proj"])).save_pretrained(tmp_path)
    attached = attach(llama(), LoraConfig(r=2, target_modules=["q_proj", "v_proj"]))
    fresh = attached.init([0], seed=0)
    with pytest.raises(
        UserError, match=r"does not fit.*4 tensors differ.*layers\.0\.self_attn\.v_proj\.lora_A\.weight"
    ):
        load_peft(attached, fresh, [tmp_path], [0])
    with pytest.raises(UserError, match=r"adapter_config\.json cannot be read"):
        load_peft(attached, fresh, [tmp_path / "nowhere"], [0])
    (tmp_path / "adapter_model.safetensors").unlink()
    with pytest.raises(UserError, match=r"adapter_model\.safetensors does not exist"):
        load_peft(attached, fresh, [tmp_path], [0])


def test_detach_gives_the_model_back():
    model = bert().eval()
    names = [name for name, _ in model.named_modules()]
    rows = torch.randint(0, 50, (2, 5))
    with torch.no_grad():
        before = logits(model, rows)
        attached = attach(model, LoraConfig(r=2, target_modules=["query"], modules_to_save=["classifier"]))
        unbound = logits(model, rows)
        attached.detach()
        after = logits(model, rows)
    assert [name for name, _ in model.named_modules()] == names
    assert torch.equal(before, unbound)
    assert torch.equal(before, after)


@pytest.mark.filterwarnings("ignore")
def test_start_is_peft_default_distribution_and_common_or_not():
    attached = attach(llama(), LoraConfig(r=8, target_modules=["q_proj"]))
    common = attached.init([0, 1, 2], seed=0)
    own = attached.init([0, 1, 2], seed=0, common_start=False)
    again = attached.init([2], seed=0, common_start=False)
    name = attached_name = next(iter(common.A))
    assert torch.equal(common.A[name][0], common.A[name][2])
    assert not torch.equal(own.A[name][0], own.A[name][2])
    assert torch.equal(own.A[attached_name][2], again.A[name][0])  # whoever holds the agent
    assert all(not t.any() for t in common.B.values())
    values = common.A[name][0].flatten()
    bound = 1 / 16**0.5  # kaiming_uniform(a=sqrt(5)) of fan-in 16
    assert values.abs().max() <= bound
    assert values.std() == pytest.approx(bound / 3**0.5, rel=0.15)


UNSUPPORTED = {
    "use_dora": True,
    "bias": "all",
    "lora_bias": True,
    "init_lora_weights": "pissa",
    "trainable_token_indices": [1],
    "layer_replication": [(0, 1)],
    "target_parameters": ["weight"],
}


@pytest.mark.parametrize("option", list(UNSUPPORTED))
def test_unsupported_options_are_refused_by_name(option):
    config = LoraConfig(r=2, target_modules=["q_proj"], **{option: UNSUPPORTED[option]})
    with pytest.raises(UserError, match=f"lora.{option}"):
        attach(llama(), config)


def test_targets_that_match_nothing_list_the_nearest():
    with pytest.raises(UserError, match=r"lora\.target_modules: query_proj matches no linear layer.*q_proj"):
        attach(llama(), LoraConfig(target_modules=["query_proj"]))


def test_a_rank_larger_than_a_layer_is_refused():
    with pytest.raises(UserError, match=r"lora\.r: rank 17 is larger than model\.layers\.0\.self_attn\.q_proj"):
        attach(llama(), LoraConfig(r=17, target_modules=["q_proj"]))


def test_a_target_that_is_not_linear_is_refused():
    with pytest.raises(UserError, match=r"lora\.target_modules"):
        attach(llama(), LoraConfig(r=2, target_modules=["embed_tokens"]))
    conv = nn.Sequential(nn.Conv2d(3, 4, 2), nn.Flatten(), nn.Linear(4, 4))
    with pytest.raises(UserError, match="Conv2d"):
        attach(conv, LoraConfig(r=2, target_modules=["0"]))


@pytest.mark.filterwarnings("ignore")
def test_the_base_is_in_memory_once():
    model = llama()
    pointers = {p.data_ptr() for p in model.parameters()}
    attached = attach(model, LoraConfig(r=2, target_modules="all-linear"))
    adapter = attached.init(range(50), seed=0)
    with attached.bind(adapter) as bound:
        assert {p.data_ptr() for p in bound.parameters()} == pointers
    assert adapter.num_agents == 50


def test_a_clip_text_tower_takes_agents_prompts():
    config = CLIPConfig(
        text_config={
            "vocab_size": 20,
            "hidden_size": 16,
            "intermediate_size": 16,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "max_position_embeddings": 8,
            "eos_token_id": 19,
        },
        vision_config={
            "image_size": 8,
            "patch_size": 4,
            "hidden_size": 16,
            "intermediate_size": 16,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
        },
        projection_dim=8,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = CLIPModel(config).eval()
    attached = attach(model, LoraConfig(r=2, target_modules=["q_proj", "v_proj"]))
    adapter = random_adapter(attached, 2)
    tokens = torch.tensor([[1, 2, 3, 19], [1, 4, 5, 19], [1, 6, 7, 19]])
    with torch.no_grad():
        with attached.bind(adapter):
            both = model.get_text_features(input_ids=tokens.repeat(2, 1)).pooler_output.view(2, 3, -1)
        for agent in range(2):
            with attached.bind(adapter.select([agent])):
                one = model.get_text_features(input_ids=tokens).pooler_output
            torch.testing.assert_close(both[agent], one, rtol=1e-5, atol=1e-6)
    assert not torch.allclose(both[0], both[1], atol=1e-3)
