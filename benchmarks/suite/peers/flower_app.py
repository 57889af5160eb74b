"""FedAvg of LoRA adapters in Flower's simulation, written as Flower's own examples are; runs where Flower is installed.

    python -c "import flower_app; flower_app.main('FOLDER')"        # imported, so that its actors import it too

FOLDER has `setting.json`, `data.npz` (tokens, labels and the batches that every client takes) and the PEFT adapter that
all start from; `answer.json` is written to it. A client loads the model for every message, as the examples do, or
with `cached` once an actor.
"""

import functools
import json
import os
import time
from pathlib import Path

os.environ["FLWR_TELEMETRY_ENABLED"] = "0"

import numpy as np
import torch
from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg
from flwr.simulation import run_simulation
from peft import PeftModel, get_peft_model_state_dict, set_peft_model_state_dict
from transformers import AutoModelForSequenceClassification

client_app, server_app = ClientApp(), ServerApp()


def setting() -> dict:
    return json.loads((folder() / "setting.json").read_text())


def folder() -> Path:
    return Path(os.environ["FLOWER_FOLDER"])  # the actors are other processes


@functools.cache
def data() -> dict[str, np.ndarray]:
    return dict(np.load(folder() / "data.npz"))


def device() -> str:
    return "cuda" if setting()["gpus"] else "cpu"


def new_model() -> PeftModel:
    given = setting()
    base = AutoModelForSequenceClassification.from_pretrained(given["model"], num_labels=given["classes"])
    return PeftModel.from_pretrained(base, folder() / "start", is_trainable=True).eval().to(device())


cached_model = functools.cache(new_model)


def batch(split: str, rows: np.ndarray) -> dict[str, torch.Tensor]:
    held = data()
    lengths = held[f"{split}_lengths"][rows]
    longest = int(lengths.max())
    mask = torch.arange(longest)[None] < torch.from_numpy(lengths)[:, None]
    tokens = torch.from_numpy(held[f"{split}_tokens"][rows, :longest].astype(np.int64))
    labels = torch.from_numpy(held[f"{split}_labels"][rows])
    inputs = {"input_ids": tokens, "attention_mask": mask.long(), "labels": labels}
    return {name: tensor.to(device()) for name, tensor in inputs.items()}


@client_app.train()
def train(message: Message, context: Context) -> Message:
    given, held = setting(), data()
    model = cached_model() if given["cached"] else new_model()
    set_peft_model_state_dict(model, message.content["arrays"].to_torch_state_dict())
    client, number = context.node_config["partition-id"], message.content["config"]["server-round"]
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=given["rate"])
    losses = []
    for step in range((number - 1) * given["steps"], number * given["steps"]):
        loss = model(**batch("train", held["batches"][client, step])).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    metrics = {"train_loss": sum(losses) / len(losses), "num-examples": int(held["examples"][client])}
    arrays = ArrayRecord(get_peft_model_state_dict(model))
    return Message(content=RecordDict({"arrays": arrays, "metrics": MetricRecord(metrics)}), reply_to=message)


@server_app.main()
def serve(grid: Grid, context: Context) -> None:
    given, model = setting(), new_model()
    ends, scores = [], []

    @torch.no_grad()
    def evaluate(number: int, arrays: ArrayRecord) -> MetricRecord | None:
        ends.append(time.perf_counter())
        if number not in (0, given["rounds"]):
            return None
        scores.clear()
        set_peft_model_state_dict(model, arrays.to_torch_state_dict())
        rows = np.arange(len(data()["test_labels"]))
        for some in np.array_split(rows, max(1, len(rows) // 256)):
            inputs = batch("test", some)
            scores.append((model(**inputs).logits.argmax(-1) == inputs["labels"]).float())
        return MetricRecord({"accuracy": torch.cat(scores).mean().item()})

    start = ArrayRecord(get_peft_model_state_dict(model))
    FedAvg(fraction_evaluate=0.0).start(grid, start, num_rounds=given["rounds"], evaluate_fn=evaluate)
    rounds = np.diff(ends).tolist()
    answer = {"rounds": rounds, "accuracy": torch.cat(scores).mean().item()}
    (folder() / "answer.json").write_text(json.dumps(answer))


def main(where: str) -> None:
    os.environ["FLOWER_FOLDER"] = where
    given = setting()
    clients = {"client_resources": {"num_cpus": 1, "num_gpus": given["gpus"]}}
    run_simulation(server_app, client_app, num_supernodes=given["agents"], backend_config=clients)
