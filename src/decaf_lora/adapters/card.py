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

_LABELS = """import json

labels = json.load(open("{dir}/labels.json"))["id2label"]
id2label = {{int(number): name for number, name in labels.items()}}
"""

_CODE = {
    ("sequence-classification", False): _LABELS
    + """
from peft import AutoPeftModelForSequenceClassification
from transformers import AutoTokenizer, pipeline

model = AutoPeftModelForSequenceClassification.from_pretrained(
    "{dir}", id2label=id2label, label2id={{name: number for number, name in id2label.items()}}
)
tokenizer = AutoTokenizer.from_pretrained("{dir}")
model.config.pad_token_id = tokenizer.pad_token_id
classify = pipeline("text-classification", model=model, tokenizer=tokenizer, truncation=True)
print(classify("..."))""",
    ("sequence-classification", True): """from transformers import pipeline

classify = pipeline("text-classification", model="{dir}", truncation=True)
print(classify("..."))""",
    ("causal-lm", False): """from peft import AutoPeftModelForCausalLM
from transformers import AutoTokenizer, pipeline

model = AutoPeftModelForCausalLM.from_pretrained("{dir}")
write = pipeline("text-generation", model=model, tokenizer=AutoTokenizer.from_pretrained("{dir}"))
print(write("..."))""",
    ("causal-lm", True): """from transformers import pipeline

write = pipeline("text-generation", model="{dir}")
print(write("..."))""",
}
_ZERO_SHOT = """import json

from transformers import AutoModel, AutoProcessor, pipeline

task = json.load(open("{dir}/decaf_lora.json"))["task"]
model, processor = AutoModel.from_pretrained("{dir}"), AutoProcessor.from_pretrained("{dir}")
classify = pipeline(
    "zero-shot-image-classification",
    model=model,
    tokenizer=processor.tokenizer,
    image_processor=processor.image_processor,
)
print(classify("image.png", candidate_labels=task["prompt_names"], hypothesis_template=task["templates"][0]))"""
_CODE |= {("image-text", False): _ZERO_SHOT, ("image-text", True): _ZERO_SHOT}
_PIPELINES = {
    "sequence-classification": "text-classification",
    "causal-lm": "text-generation",
    "image-text": "zero-shot-image-classification",
}


def write_card(directory: Path, task: Mapping[str, Any], made: Mapping[str, Any], merged: bool) -> None:
    """Writes README.md: task is the task's description, made what there is to say, name -> text."""
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
    code = _CODE.get((use, merged)) if model else None
    if use == "image-text" and not task.get("processor"):
        code = None  # no processor of images belongs to the model
    name = made.get("model", "model")
    card = ModelCard.from_template(
        data,
        template_str=TEMPLATE,
        title=f"{name} of {task.get('name', 'a task')}",
        kind="A full model, its LoRA update folded in" if merged else "A LoRA adapter",
        made={_cell(k): _cell(v) for k, v in {"base model": model or "not of transformers", **made}.items()},
        code=code.format(dir="DIRECTORY") if code else None,
    )
    (directory / "README.md").write_text(str(card), encoding="utf-8")


def family(task: Mapping[str, Any]) -> str:
    """How the model is used: sequence-classification, causal-lm, image-text, or another."""
    use = str(task.get("use", ""))
    return "causal-lm" if use in ("answers", "instruction", "text") else use


def _cell(value: Any) -> str:
    return " ".join(str(value).split()).replace("|", r"\|")
