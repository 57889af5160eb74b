"""Small scripts with a `transformers.Trainer`, as people have them, and agents of them in processes of their own."""

import contextlib

import torch
from peft import LoraConfig, get_peft_model
from transformers import BertConfig, BertForSequenceClassification, Trainer, TrainingArguments, set_seed

import tiny
from decaf_lora import UserError
from decaf_lora.integrations import GossipCallback
from forked import CONTEXT

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
    for parameter in base.parameters():  # far from the flat start of a new model
        if parameter.dim() > 1:
            parameter.data.normal_(std=0.3)
    set_seed(seed)
    fields = {"r": 2, "lora_alpha": 4, "target_modules": ["query", "value"], "modules_to_save": ["classifier"], **lora}
    return get_peft_model(base, LoraConfig(task_type="SEQ_CLS", **fields))


def make_trainer(folder, agent=0, steps=6, model=None, tests=None, **arguments):
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
    return Trainer(model, made, train_dataset=Examples(agent), eval_dataset=tests)


def values(model):
    """Name -> tensor of all that is trained."""
    return {k: p.detach().clone() for k, p in model.named_parameters() if ".lora_" in k or "modules_to_save" in k}


def full(folder, agent, **more):
    """A Trainer with all that a script may have: dropout, shuffling, AdamW, a schedule, clipping, accumulation."""
    given = {"optim": "adamw_torch", "lr_scheduler_type": "cosine", "warmup_steps": 2, "weight_decay": 0.1}
    given |= {"learning_rate": 0.01, "max_grad_norm": 0.5, "gradient_accumulation_steps": 2}
    given |= {"train_sampling_strategy": "random"}
    return make_trainer(folder, agent, model=make_model(agent, dropout=0.1, lora_dropout=0.1), **given | more)


def start(folder, port, each):
    """Agents in processes of their own: of each the values in the end, or the error; `each` are their arguments."""
    count, listening = len(each), f"tcp://127.0.0.1:{port}"
    work = [CONTEXT.Process(target=_agent, args=(folder, listening, i, count, own)) for i, own in enumerate(each)]
    for process in work:
        process.start()
    for process in work:
        process.join(timeout=300)  # against a hang; a busy machine may well take minutes
        if process.is_alive():
            process.kill()
    return [torch.load(folder / f"{i}.pt") for i in range(count)]


def _agent(folder, store, agent, agents, given):
    torch.set_num_threads(1)
    result = "nothing"
    with contextlib.suppress(UserError):
        try:
            trainer = full(folder, agent)
            trainer.add_callback(GossipCallback(store=store, agent=agent, agents=agents, timeout=20, **given))
            trainer.train()
            result = values(trainer.model)
        except UserError as error:
            result = str(error)
            raise
    torch.save(result, folder / f"{agent}.pt")
