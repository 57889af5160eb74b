"""What does the README.md of an exported directory say? What made the model, what it was scored, how it is used."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

TEMPLATE = """---
{{ card_data }}
---

# {{ title }}

{{ kind }}, trained by agents that share no data, with decaf-lora.

| | |
| --- | --- |
{% for name, value in made.items() %}| {{ name }} | {{ value }} |
{% endfor %}
{% if code %}## Use

```python
{{ code }}
```
{% endif %}"""

_CODE = {
    ("sequence-classification", False): """import json

from peft import AutoPeftModelForSequenceClassification
from transformers import AutoTokenizer, pipeline

labels = json.load(open("DIRECTORY/labels.json"))
id2label = {int(number): name for number, name in labels["id2label"].items()}
model = AutoPeftModelForSequenceClassification.from_pretrained(
    "DIRECTORY", id2label=id2label, label2id=labels["label2id"], dtype="DTYPE"
)
tokenizer = AutoTokenizer.from_pretrained("DIRECTORY")
model.config.pad_token_id = tokenizer.pad_token_id
classify = pipeline("text-classification", model=model, tokenizer=tokenizer, truncation=True)
print(classify(EXAMPLE))""",
    ("sequence-classification", True): """from transformers import pipeline

classify = pipeline("text-classification", model="DIRECTORY", truncation=True)
print(classify(EXAMPLE))""",
    ("causal-lm", False): """from peft import AutoPeftModelForCausalLM
from transformers import AutoTokenizer, pipeline

model = AutoPeftModelForCausalLM.from_pretrained("DIRECTORY", dtype="DTYPE")
write = pipeline("text-generation", model=model, tokenizer=AutoTokenizer.from_pretrained("DIRECTORY"))
print(write("..."))""",
    ("causal-lm", True): """from transformers import pipeline

write = pipeline("text-generation", model="DIRECTORY")
print(write("..."))""",
}
_PROCESSED = """import json

TOOLS

task = json.load(open("DIRECTORY/decaf_lora.json"))["task"]
model = AutoModel.from_pretrained("DIRECTORY", dtype="DTYPE")
processor = AutoProcessor.from_pretrained("DIRECTORY")
"""
_ZERO_SHOT = (
    _PROCESSED.replace("TOOLS", "from transformers import AutoModel, AutoProcessor, pipeline")
    + """classify = pipeline(
    "zero-shot-image-classification",
    model=model,
    tokenizer=processor.tokenizer,
    image_processor=processor.image_processor,
)
print(classify("image.png", candidate_labels=task["prompt_names"], hypothesis_template=task["templates"][0]))"""
)
_ENSEMBLE = (
    _PROCESSED.replace(
        "TOOLS",
        """import torch
from PIL import Image
from torch.nn.functional import normalize
from transformers import AutoModel, AutoProcessor""",
    )
    + """padding = "max_length" if "siglip" in model.config.model_type else True


def features(output):
    return normalize(output if isinstance(output, torch.Tensor) else output.pooler_output, dim=-1)


@torch.no_grad()
def classify(path):
    prompts = [template.format(name) for name in task["prompt_names"] for template in task["templates"]]
    tokens = processor.tokenizer(prompts, padding=padding, truncation=True, return_tensors="pt")
    pixels = processor.image_processor(Image.open(path).convert("RGB"), return_tensors="pt")
    text = features(model.get_text_features(**tokens)).unflatten(0, (-1, len(task["templates"])))
    text = normalize(text.mean(1), dim=-1)  # the mean of a class's prompts
    scores = (features(model.get_image_features(**pixels)) @ text.T * model.logit_scale.exp()).softmax(-1)[0]
    return [{"label": task["prompt_names"][i], "score": float(scores[i])} for i in scores.argsort(descending=True)]


print(classify("image.png"))"""
)
_PIPELINES = {
    "sequence-classification": "text-classification",
    "causal-lm": "text-generation",
    "image-text": "zero-shot-image-classification",
}


def write_card(directory: Path, task: Mapping[str, Any], made: Mapping[str, Any], merged: bool) -> None:
    """Writes the model card, README.md.

    Args:
        directory: of the export.
        task: the task's description (`Task.describe`).
        made: rows of the card's table on how the model was made, name -> text.
        merged: whether the directory holds a full model instead of an adapter.
    """
    from huggingface_hub import ModelCard, ModelCardData

    use = family(task)
    model = task.get("model")
    on_hub = model is not None and not Path(model).is_absolute()
    data = ModelCardData(
        base_model=model if on_hub else None,
        library_name="transformers" if merged else "peft",
        pipeline_tag=_PIPELINES.get(use),
        tags=["decaf-lora", "lora"],
        ignore_metadata_errors=True,
    )
    name = made.get("model", "model")
    base = f"{model or 'not of transformers'}{', in 4 bits' if task.get('quantized') else ''}"
    card = ModelCard.from_template(
        data,
        template_str=TEMPLATE,
        title=f"{name} of {task.get('name', 'a task')}",
        kind="A full model, its LoRA update folded in" if merged else "A LoRA adapter",
        made={_cell(k): _cell(v) for k, v in {"base model": base, **made}.items()},
        code=_code(task, use, merged),
    )
    (directory / "README.md").write_text(str(card), encoding="utf-8")


def _code(task: Mapping[str, Any], use: str, merged: bool) -> str | None:
    """Python code that loads the model and answers as the run did; None where the description does not suffice."""
    if use == "image-text" and task.get("processor"):  # no pipeline takes a model without a processor
        code = _ENSEMBLE if len(task["templates"]) > 1 else _ZERO_SHOT
    elif (use, merged) in _CODE and (merged or use != "sequence-classification" or task.get("labels")):
        code = _CODE[use, merged]
    else:
        return None
    pair = len(task.get("columns", ())) == 2
    example = '{"text": "...", "text_pair": "..."}' if pair else '"..."'
    dtype = task.get("dtype", "auto")
    return code.replace("DTYPE", dtype).replace("EXAMPLE", example) if task.get("model") else None


def family(task: Mapping[str, Any]) -> str:
    """How the model is used: sequence-classification, causal-lm, image-text, or another."""
    use = str(task.get("use", ""))
    return "causal-lm" if use in ("answers", "instruction", "text") else use


def _cell(value: Any) -> str:
    return " ".join(str(value).split()).replace("|", r"\|")
