"""A callback makes Trainers decentralized: their exchanges are the algorithm's, and all else stays the script's."""

import copy
import os
import subprocess
import sys
from pathlib import Path

import pytest
import tiny
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    set_seed,
)

from decaf_lora import UserError, algorithms
from decaf_lora.integrations import GossipCallback

WORDS = 6
"""Tokens of an example."""


class Examples(torch.utils.data.Dataset):
    """Random tokens; the class is told by the first one."""

    def __init__(self, seed, count=24):
        generator = torch.Generator().manual_seed(seed)
        self.ids = torch.randint(4, 40, (count, WORDS), generator=generator)

    def __len__(self):
        return len(self.ids)

    def __getitem__(self, i):
        return {"input_ids": self.ids[i], "labels": int(self.ids[i, 0]) % 3}


def make_model(seed=0, dropout=0.0, **lora):
    set_seed(7)
    sizes = {k: v for k, v in tiny.SMALL.items() if k not in ("bos_token_id", "eos_token_id")}
    config = BertConfig(**sizes, num_labels=3, hidden_dropout_prob=dropout, attention_probs_dropout_prob=dropout)
    base = BertForSequenceClassification(config)
    set_seed(seed)
    fields = {"r": 2, "lora_alpha": 4, "target_modules": ["query", "value"], "modules_to_save": ["classifier"], **lora}
    return get_peft_model(base, LoraConfig(task_type="SEQ_CLS", **fields))


def make_trainer(folder, agent=0, steps=6, model=None, callbacks=(), **arguments):
    given = {
        "output_dir": str(folder / f"agent-{agent}"),
        "max_steps": steps,
        "per_device_train_batch_size": 4,
        "learning_rate": 0.05,
        "lr_scheduler_type": "constant",
        "weight_decay": 0.0,
        "optim": "sgd",
        "max_grad_norm": 0.0,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": True,
        "train_sampling_strategy": "sequential",
        "seed": 11 + agent,
    }
    made = TrainingArguments(**given | arguments)
    model = make_model() if model is None else model
    return Trainer(model, made, train_dataset=Examples(agent), callbacks=list(callbacks))


def values(model):
    """Name -> tensor of all that is trained."""
    return {k: p.detach().clone() for k, p in model.named_parameters() if ".lora_" in k or "modules_to_save" in k}


def products(tensors):
    """Layer -> B A in float64."""
    return {
        k.replace("lora_A", "BA"): tensors[k.replace("lora_A", "lora_B")].double() @ tensors[k].double()
        for k in tensors
        if "lora_A" in k
    }


def heads(tensors):
    return {k: t for k, t in tensors.items() if "modules_to_save" in k}


def trains_alone(trainer):
    trainer.train()
    return values(trainer.model)


def same(one, two):
    return one.keys() == two.keys() and all(torch.equal(one[k], two[k]) for k in one)


def test_smoke(tmp_path):
    trainers = [make_trainer(tmp_path, i) for i in range(2)]
    GossipCallback.simulate(trainers, graph="complete", algorithm="dlora", every=2)
    a, b = (values(t.model) for t in trainers)
    assert same(a, b)
