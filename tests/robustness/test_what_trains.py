"""What is asked to train does train, and is exported: a fresh PEFT model gives the run's own logits."""

import json
import warnings

import numpy as np
import pytest
import torch
import transformers
from peft import LoraConfig, PeftModel
from PIL import Image

import tiny
from decaf_lora.config import RunConfig
from decaf_lora.runs.build import build_run

pytestmark = [
    pytest.mark.usefixtures("datasets_cache"),
    pytest.mark.filterwarnings("ignore::FutureWarning", "ignore:.*fan_in_fan_out"),
]

VISION = r".*vision_model.*\.(q|v)_proj"
TEXT = r".*text_model.*\.(q|v)_proj"


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("place")
    for family in ("clip", "siglip", "llama"):
        tiny.write(family, folder / family)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        transformers.BertForMaskedLM(transformers.BertConfig(**tiny.SMALL)).save_pretrained(folder / "mlm")
    tiny.tokenizer().save_pretrained(folder / "mlm")
    rows = [{"text": f"the {a} is {w}", "label": w} for a in ("cat", "dog", "bird") for w in ("good", "bad")] * 4
    (folder / "a.jsonl").write_text("\n".join(map(json.dumps, rows)))
    for split in ("train", "test"):
        for name, colour in (("cat", "red"), ("dog", "blue")):
            (folder / "album" / split / name).mkdir(parents=True)
            for i in range(6):
                Image.new("RGB", (20, 20), colour).save(folder / "album" / split / name / f"{i}.png")
    return folder


def trained(place, name, model, data, lora, **task):
    """A run of two agents that do not talk, some steps long."""
    values = {
        "task": {"name": name, "model": str(place / model), "data": str(place / data), **task},
        "lora": {"r": 2, "lora_alpha": 4, **lora},
        "algorithm": {"name": "local"},
        "training": {"steps": 4, "batch_size": 4, "learning_rate": 0.05, "agents_per_pass": 2, "weight_decay": 0},
        "agents": 2,
        "rounds": 1,
        "partition": "iid",
        "device": "cpu",
    }
    run = build_run(RunConfig.model_validate(values))
    list(run.train())
    return run


# Text features are computed once only where nothing changes them


@pytest.mark.parametrize(
    ("model", "extra", "targets"),
    [
        ("clip", "text_projection", VISION),
        ("clip", "text_model.final_layer_norm", VISION),
        ("clip", "visual_projection", TEXT),
        ("siglip", "text_model.head", VISION),
        ("siglip", "vision_model.post_layernorm", VISION),
    ],
)
def test_modules_of_either_tower_train_and_are_exported(model, extra, targets, place, tmp_path):
    lora = {"target_modules": targets, "modules_to_save": [extra]}
    run = trained(place, "image-text", model, "album", lora)
    assert run.attached.modules == [extra]
    for name, base in run.attached.extras.items():
        if "k_proj.bias" not in name:  # a softmax does not see it
            assert float((run.adapter.extras[name] - base).abs().max()) > 1e-3, name
    batch = run.task.test_batch(np.arange(12))
    for agent in range(2):
        with torch.no_grad(), run.attached.bind(run.adapter.select([agent])):
            ours = run.task.logits(batch["pixel_values"], 1)
        run.save_adapter(tmp_path / str(agent), agent)
        plain = transformers.AutoModel.from_pretrained(place / model)
        theirs = PeftModel.from_pretrained(plain, tmp_path / str(agent)).eval()
        with torch.no_grad():
            expected = theirs(pixel_values=batch["pixel_values"], **run.task._tokens).logits_per_image
        if model == "siglip":  # its logits have a bias, the same for all classes
            expected = expected - plain.logit_bias.detach()
        torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-4)
    run.close()


@pytest.mark.parametrize(
    ("sites", "cached"),
    [
        (["vision_model.encoder.layers.0.self_attn.q_proj"], True),
        (["vision_model.x", "visual_projection"], True),
        (["vision_model.x", "text_projection"], False),
        (["vision_model.x", "text_model.y"], False),
        (["vision_model.x", "shared.y"], False),  # of either tower, for all that is known
    ],
)
def test_features_are_cached_only_if_all_that_trains_is_of_the_vision_tower(sites, cached, digits_task):
    digits_task.on_attach(sites)
    with torch.no_grad():
        digits_task.losses(digits_task.train_batch(np.arange(2)), 1)
    assert (digits_task._cached_text is not None) == cached
    digits_task.on_attach([])


# A task's new layers


@pytest.mark.parametrize(
    "given", [None, ["classifier"], ["embeddings.LayerNorm"], ["pooler"], ["pooler", "classifier"]]
)
def test_new_layers_train_and_are_exported_whatever_else_is_given(given, place, tmp_path):
    lora = {"target_modules": ["query"]} | ({} if given is None else {"modules_to_save": given})
    run = trained(place, "sequence-classification", "mlm", "a.jsonl", lora, test_share=0.25)
    new = {"classifier.weight", "classifier.bias", "bert.pooler.dense.weight", "bert.pooler.dense.bias"}
    assert new <= set(run.adapter.extras)
    for name, base in run.attached.extras.items():
        assert float((run.adapter.extras[name] - base).abs().max()) > 1e-3, name
    batch = run.task.test_batch(np.arange(run.task.num_test))
    inputs = {k: t for k, t in batch.items() if k != "labels"}
    for agent in range(2):
        with torch.no_grad(), run.attached.bind(run.adapter.select([agent])):
            ours = run.task.model(**inputs).logits
        run.save_adapter(tmp_path / str(agent), agent)
        with torch.random.fork_rng():
            torch.manual_seed(99)  # the new layers are drawn again: only what is exported can agree
            kind = transformers.AutoModelForSequenceClassification
            plain = kind.from_pretrained(place / "mlm", num_labels=2)
        theirs = PeftModel.from_pretrained(plain, tmp_path / str(agent)).eval()
        with torch.no_grad():
            torch.testing.assert_close(ours, theirs(**inputs).logits, rtol=1e-5, atol=1e-5)
    run.close()


@pytest.mark.parametrize(
    ("extra", "tied"),
    [("lm_head", False), ("lm_head", True), ("embed_tokens", True), ("norm", False), ("layers.1.mlp", False)],
)
def test_parts_of_a_language_model_train_and_are_exported(extra, tied, place, tmp_path):
    model = tmp_path / "llama"
    config = transformers.LlamaConfig(**tiny.LLAMA, tie_word_embeddings=tied)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        transformers.LlamaForCausalLM(config).save_pretrained(model)
    tiny.tokenizer("llama", pad=None, limit=64).save_pretrained(model)
    lora = {"target_modules": ["q_proj", "v_proj"], "modules_to_save": [extra]}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        run = trained(place, "causal-lm", model, "a.jsonl", lora, test_share=0.25)
    batch = run.task.test_batch(np.arange(run.task.num_test))
    inputs = {k: batch[k] for k in ("input_ids", "attention_mask")}
    for agent in range(2):
        with torch.no_grad(), run.attached.bind(run.adapter.select([agent])):
            ours = run.task.model(**inputs).logits
        run.save_adapter(tmp_path / str(agent), agent)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            plain = transformers.AutoModelForCausalLM.from_pretrained(model)
            theirs = PeftModel.from_pretrained(plain, tmp_path / str(agent)).eval()
        with torch.no_grad():
            torch.testing.assert_close(ours, theirs(**inputs).logits, rtol=1e-4, atol=1e-5)
    run.close()


@pytest.mark.parametrize("extra", ["norm", "layers.1.mlp", "embed_tokens"])
def test_modules_in_full_over_a_base_in_few_digits(extra, place):
    lora = {"target_modules": ["q_proj", "v_proj"], "modules_to_save": [extra]}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        run = trained(place, "causal-lm", "llama", "a.jsonl", lora, test_share=0.25, dtype="bfloat16")
    moved = [float((run.adapter.extras[name] - base.float()).abs().max()) for name, base in run.attached.extras.items()]
    assert min(moved) > 1e-3
    assert all(t.dtype == torch.float32 for t in run.adapter.extras.values())
    run.close()


def test_lora_on_all_layers_leaves_the_head_to_full_training(place):
    lora = {"target_modules": "all-linear"}
    run = trained(place, "sequence-classification", "mlm", "a.jsonl", lora, test_share=0.25)
    assert set(run.attached.modules) == {"classifier", "bert.pooler.dense"}
    assert not set(run.attached.modules) & set(run.attached.sites)
    assert isinstance(run.attached.config, LoraConfig)
    run.close()
