"""A model's directory that is damaged, or whose parts do not belong together, is one line that names the file."""

import json
import shutil

import numpy as np
import pytest
import torch
import transformers

import tiny
from decaf_lora import tasks
from decaf_lora.cli import main
from decaf_lora.config import TaskConfig
from decaf_lora.errors import UserError

pytestmark = [pytest.mark.usefixtures("datasets_cache"), pytest.mark.filterwarnings("ignore::FutureWarning")]

LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 9\n"
TEXTS = [f"the {a} is {w}" for a in ("cat", "dog", "red dog") for w in ("good", "old", "big")] * 2


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    for family in ("bert", "llama", "clip"):
        tiny.write(family, folder / family)
    return folder


@pytest.fixture
def model_of(made, tmp_path):
    """A copy of a family's directory, to spoil."""
    return lambda family: shutil.copytree(made / family, tmp_path / family)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")

    def write(name, texts):
        rows = [json.dumps({"text": text, "other": text, "label": i % 2}) for i, text in enumerate(texts)]
        (folder / f"{name}.jsonl").write_text("\n".join(rows))
        return str(folder / f"{name}.jsonl")

    return write


def make(model, data, name="sequence-classification", **options):
    return tasks.make(TaskConfig(name=name, model=str(model), data=data("plain", TEXTS), test_share=0.25, **options))


def refused(message, *arguments, **options):
    with pytest.raises(UserError, match=message) as error:
        make(*arguments, **options)
    assert "\n" not in str(error.value)


# Damaged files


CLASSIFICATION, LANGUAGE = "sequence-classification", "causal-lm"


@pytest.mark.parametrize(
    ("name", "file"),
    [
        (CLASSIFICATION, "model.safetensors"),
        (CLASSIFICATION, "tokenizer.json"),
        (LANGUAGE, "config.json"),
        (LANGUAGE, "tokenizer_config.json"),
    ],
)
def test_a_pointer_of_git_lfs_is_named(name, file, model_of, data):
    model = model_of({"sequence-classification": "bert", "causal-lm": "llama"}[name])
    (model / file).write_bytes(LFS)
    refused(rf"task\.model: .*{file} is a pointer of Git LFS.*git lfs pull", model, data, name=name)


@pytest.mark.parametrize("size", [0, 7, 900])
def test_weights_that_are_cut_short_are_named(size, model_of, data):
    model = model_of("bert")
    path = model / "model.safetensors"
    path.write_bytes(path.read_bytes()[:size])
    refused(rf"task\.model: .*model\.safetensors \({size} bytes\) is damaged or cut short", model, data)


@pytest.mark.parametrize("text", ["", "{", "[]", "null", '{"model_type": "unheard-of"}', "\x00"])
@pytest.mark.parametrize("file", ["config.json", "tokenizer.json"])
def test_broken_json_is_one_line(file, text, model_of, data):
    model = model_of("bert")
    (model / file).write_text(text)
    refused(r"task\.model: .* cannot be loaded", model, data)


@pytest.mark.parametrize("content", [b"", LFS, b"\x80\x02 no pickle", b"PK\x03\x04 no archive"])
def test_broken_weights_of_the_older_format(content, model_of, data):
    model = model_of("bert")
    (model / "model.safetensors").unlink()
    (model / "pytorch_model.bin").write_bytes(content)
    refused(r"task\.model: .*(cannot be loaded|pointer)", model, data)


def test_a_part_of_the_weights_that_is_missing(model_of, data):
    model = model_of("bert")
    index = {"metadata": {}, "weight_map": {"embeddings.word_embeddings.weight": "model-00001-of-00002.safetensors"}}
    (model / "model.safetensors").unlink()
    (model / "model.safetensors.index.json").write_text(json.dumps(index))
    refused(r"task\.model: .* cannot be loaded", model, data)


@pytest.mark.parametrize("name", ["sequence-classification", "causal-lm", "image-text"])
def test_a_configuration_that_does_not_fit_the_weights(name, model_of, data):
    family = {"sequence-classification": "bert", "causal-lm": "llama", "image-text": "clip"}[name]
    model = model_of(family)
    values = json.loads((model / "config.json").read_text())
    (values["vision_config"] if family == "clip" else values)["intermediate_size"] = 48
    (model / "config.json").write_text(json.dumps(values))
    if family == "clip":
        config = TaskConfig(name=name, model=str(model))
        with pytest.raises(UserError, match="other shapes than its config"):
            tasks.pretrained_model(config, transformers.AutoModel)
    else:
        refused(r"task\.model: .*(other shapes than its config|lacks \d+ tensors)", model, data, name=name)


# Tokens that the model does not know


def with_words(folder, *words, pad=None):
    tokenizer = tiny.tokenizer("llama", pad=pad, limit=64)
    if pad is None:
        tokenizer.add_special_tokens({"pad_token": "[PAD]"})
    tokenizer.add_tokens(list(words))
    tokenizer.save_pretrained(folder)
    return folder


def small_llama(folder, vocabulary):
    config = transformers.LlamaConfig(**{**tiny.LLAMA, "vocab_size": vocabulary})
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def test_a_padding_token_beyond_the_embeddings(tmp_path, data):
    folder = with_words(small_llama(tmp_path, 48))
    refused(r"task\.model: token '\[PAD\]' has number 48, beyond the model's 48 embeddings.*resize", folder, data)


@pytest.mark.parametrize("name", ["sequence-classification", "causal-lm"])
def test_a_word_beyond_the_embeddings(name, tmp_path, data):
    folder = with_words(small_llama(tmp_path, 48), "zebra", pad="<pad>")
    config = TaskConfig(
        name=name, model=str(folder), data=data("zebra", [f"{text} zebra" for text in TEXTS]), test_share=0.25
    )
    with pytest.raises(UserError, match=r"task\.model: token 'zebra' has number 48, beyond the model's 48 embeddings"):
        tasks.make(config)


def test_words_that_no_text_uses_do_no_harm(tmp_path, data):
    task = make(with_words(small_llama(tmp_path, 48), "zebra", pad="<pad>"), data, name="causal-lm")
    assert bool(torch.isfinite(task.losses(task.train_batch(np.arange(4)), 1)).all())


def test_a_class_name_beyond_the_embeddings(model_of, tmp_path):
    from PIL import Image

    model = model_of("clip")
    tokenizer = transformers.AutoTokenizer.from_pretrained(model)
    tokenizer.add_tokens([f"word{i}" for i in range(20)])
    tokenizer.save_pretrained(model)
    for split in ("train", "test"):
        for name, colour in (("cat", "red"), ("word19", "blue")):
            (tmp_path / "album" / split / name).mkdir(parents=True)
            Image.new("RGB", (16, 16), colour).save(tmp_path / "album" / split / name / "0.png")
    with pytest.raises(UserError, match=r"task\.model: token 'word19' has number \d+, beyond the model's 60"):
        tasks.make(TaskConfig(name="image-text", model=str(model), data=str(tmp_path / "album")))


def test_kinds_of_tokens_that_the_model_does_not_know(model_of, data):
    """A RoBERTa knows one kind; a tokenizer in the manner of BERT gives the second text another."""
    model = model_of("bert")
    values = json.loads((model / "config.json").read_text())
    weights = transformers.AutoModel.from_pretrained(model)
    weights.config.type_vocab_size = 1
    weights.embeddings.token_type_embeddings = torch.nn.Embedding(1, values["hidden_size"])
    weights.save_pretrained(model)
    refused(r"task\.model: its tokenizer gives token_type_ids 1", model, data, text_pair_column="other")
    assert make(model, data).num_test > 0  # of one text all are of kind 0


def test_what_the_model_does_not_take_is_left_out(tmp_path, data):
    """A DistilBERT beside a tokenizer that also numbers the texts of a pair."""
    folder = tiny.write("distilbert", tmp_path)
    tiny.tokenizer().save_pretrained(folder)
    task = make(folder, data)
    assert "token_type_ids" not in task.train_batch(np.arange(2))
    assert bool(torch.isfinite(task.losses(task.train_batch(np.arange(2)), 1)).all())


# New layers


def test_a_parameter_that_is_new_within_old_ones_is_refused(model_of, data):
    """It would stay as it was drawn: only whole modules can be trained in full."""
    from decaf_lora.tasks.sequence_classification import heads

    model = transformers.AutoModelForSequenceClassification.from_pretrained(model_of("bert"))
    assert heads(model, ["classifier.weight", "classifier.bias"]) == ["classifier"]
    whole = ["bert.pooler.dense.weight", "bert.pooler.dense.bias"]
    assert heads(model, whole) == ["classifier", "bert.pooler.dense"]
    for new in (whole[1:], ["bert.scale"], ["scale"]):
        with pytest.raises(UserError, match=rf"the checkpoint lacks {new[0]} of .*stay as drawn"):
            heads(model, new)


# The command


@pytest.mark.parametrize("content", [LFS, b"", b"cut"])
def test_the_command(content, model_of, data, tmp_path, capsys):
    model = model_of("bert")
    (model / "model.safetensors").write_bytes(content)
    task = ("--task", "sequence-classification", "--task.model", model, "--task.data", data("plain", TEXTS))
    options = (*task, "--task.test-share", 0.25, "--agents", 2, "--rounds", 1, "--partition", "iid", "--device", "cpu")
    capsys.readouterr()
    assert main(["run", "digits", *map(str, options), "--out", str(tmp_path / "run")]) == 2
    err = capsys.readouterr().err
    assert "model.safetensors" in err
    assert len(err.strip().splitlines()) == 1
    assert not (tmp_path / "run").exists()
