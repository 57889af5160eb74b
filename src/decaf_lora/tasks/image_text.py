"""Zero-shot image classification with a dual encoder (CLIP, SigLIP): which class prompt fits the image?

    logit_c = scale <f(image), g(prompt_c)> / (|f| |g|),    loss = cross-entropy over the classes

With several templates, a class's text feature is the normalised mean of its prompts' normalised features.
The model's own logit scale stays frozen. Text features are computed once when no adapter sits in the text
encoder, and at every step (for every agent, with its own adapter) when one does.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Hashable, Sequence
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from decaf_lora import data
from decaf_lora.config import TaskConfig
from decaf_lora.errors import UserError
from decaf_lora.tasks.base import Batch, Task, cross_entropy
from decaf_lora.tasks.pretrained import pretrained_model, pretrained_tokenizer, refuse_unknown_tokens
from decaf_lora.tasks.scores import ClassScore

if TYPE_CHECKING:
    from peft import LoraConfig

TEMPLATES = ("a photo of a {}.",)
"""The prompt of CLIP's authors, used when none is given."""

Images = Callable[[np.ndarray], Tensor]
"""indices (m,) -> pixel values (m, channels, height, width), as the model's processor makes them."""


class ImageText(Task):
    """Image classification by prompts.

    Args:
        model: like transformers' `CLIPModel` or `SiglipModel`.
        tokenizer: that of the model.
        prompts: for each class its texts, one for each template.
        train_images: gives pixel values of training images by index.
        labels: (num_train,) class numbers.
        test_images: gives pixel values of test images by index.
        test_labels: (num_test,) class numbers.
        name: of the task.
        classes: names of the classes; None: the first prompt of each.
        score: how to score; None: accuracy.

    Raises:
        UserError: classes have different numbers of prompts.
    """

    model: Any

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        prompts: Sequence[Sequence[str]],
        train_images: Images,
        labels: np.ndarray,
        test_images: Images,
        test_labels: np.ndarray,
        name: str = "image-text",
        classes: Sequence[str] | None = None,
        score: ClassScore | None = None,
    ) -> None:
        if len({len(p) for p in prompts}) != 1:
            raise UserError("task.prompts: every class needs the same number of prompts (one a template).")
        self.model, self.name = model, name
        self.labels, self.num_test = np.asarray(labels), len(test_labels)
        self.classes = list(classes) if classes is not None else [p[0] for p in prompts]
        self._score = score or ClassScore("accuracy", self.classes)
        self.score_name = self._score.name
        self._train_images, self._test_images = train_images, test_images
        self._train_targets = torch.as_tensor(np.asarray(labels))
        self.test_labels = np.asarray(test_labels)
        self._test_targets = torch.as_tensor(np.asarray(test_labels))
        self._templates, self._prompts = len(prompts[0]), [list(of_class) for of_class in prompts]
        texts = [text for of_class in prompts for text in of_class]
        max_length = getattr(model.config.text_config, "max_position_embeddings", None)
        # SigLIP is trained with every text padded to its full length.
        padding = "max_length" if "siglip" in model.config.model_type else True
        too_long = [t for t in texts if max_length and len(tokenizer(t, verbose=False)["input_ids"]) > max_length]
        if too_long:
            warnings.warn(
                f"task.templates: {len(too_long)} of {len(texts)} prompts are longer than the model's {max_length} "
                f"tokens and are truncated (first: {too_long[0]!r}).",
                stacklevel=2,
            )
        tokens = tokenizer(texts, padding=padding, truncation=True, max_length=max_length, return_tensors="pt")
        self._tokens = {k: v for k, v in tokens.items() if k in ("input_ids", "attention_mask")}
        self.interface = {"use": "image-text", "labels": self.classes}
        self._text_adapted = False
        self._cached_text: Tensor | None = None

    def default_lora(self) -> LoraConfig:
        """LoRA on q, k, v of every text and vision block (Zanella & Ben Ayed 2024, arXiv 2405.18541)."""
        from peft import LoraConfig

        return LoraConfig(target_modules=["q_proj", "k_proj", "v_proj"])

    def on_attach(self, sites: list[str]) -> None:
        """Decides whether text features are computed once: not if anything outside the vision tower is trained."""
        self._text_adapted = not all(site.startswith(("vision", "visual")) for site in sites)
        self._cached_text = None

    def train_batch(self, indices: np.ndarray) -> Batch:
        return {"pixel_values": self._train_images(indices), "labels": self._train_targets[indices]}

    def test_batch(self, indices: np.ndarray) -> Batch:
        return {"pixel_values": self._test_images(indices), "labels": self._test_targets[indices]}

    def logits(self, pixel_values: Tensor, agents: int) -> Tensor:
        """Pixel values (agents * b, ...) -> logits (agents * b, C)."""
        images = _features(self.model.get_image_features(pixel_values=pixel_values))
        images = nn.functional.normalize(images.float(), dim=-1).unflatten(0, (agents, -1))
        text = self._text_features(agents, pixel_values.device)
        scale = self.model.logit_scale.detach().float().exp()
        return (scale * images @ text.mT).flatten(0, 1)

    def losses(self, batch: Batch, agents: int) -> Tensor:
        return cross_entropy(self.logits(batch["pixel_values"], agents), batch["labels"], agents)

    def statistics(self, batch: Batch, agents: int) -> Tensor:
        return self._score.statistics(self.logits(batch["pixel_values"], agents), batch["labels"], agents)

    def score(self, statistics: Tensor) -> Tensor:
        return self._score.score(statistics)

    def majority_score(self) -> float | None:
        return self._score.majority(self.labels, self._test_targets)

    def show_examples(self, indices: np.ndarray) -> list[str]:
        pixels = self._train_images(indices)
        channels, height, width = pixels.shape[1:]
        return [
            f"an image of {width} x {height} pixels, {channels} channel{'s' * (channels > 1)}, values from "
            f"{image.min():.3g} to {image.max():.3g}, for {self._prompts[label][0]!r}"
            for image, label in zip(pixels, self.labels[indices], strict=True)
        ]

    def example_keys(self, split: Literal["train", "test"]) -> list[Hashable]:
        images = self._train_images if split == "train" else self._test_images
        return list(images.contents()) if isinstance(images, data.Pixels) else []

    def _text_features(self, agents: int, device: torch.device) -> Tensor:
        """(agents or 1, C, d) unit text features of the classes."""
        if self._cached_text is not None:
            return self._cached_text
        if self.kept and "text" in self.kept:  # of the same agents, in an earlier pass over the test set
            return self.kept["text"]
        copies = agents if self._text_adapted else 1
        tokens = {k: t.to(device).repeat(copies, 1) for k, t in self._tokens.items()}
        with torch.set_grad_enabled(self._text_adapted and torch.is_grad_enabled()):
            features = _features(self.model.get_text_features(**tokens)).float()
        features = nn.functional.normalize(features, dim=-1).view(copies, -1, self._templates, features.shape[-1])
        features = nn.functional.normalize(features.mean(2), dim=-1)
        if not self._text_adapted:
            self._cached_text = features
        elif self.kept is not None:
            self.kept["text"] = features
        return features


def make(config: TaskConfig) -> ImageText:
    """The task that `config` describes. In prompts, underscores of class names become spaces."""
    from transformers import AutoModel

    templates = config.templates or TEMPLATES
    for template in templates:
        if template.count("{}") != 1 or template.count("{") != 1 or template.count("}") != 1:
            raise UserError(f"task.templates: {template!r} needs {{}} once, for the class name.")
    label, image = config.label_column or "label", config.image_column
    examples = data.load(config, [], label=label, image=image)
    if not examples.named:
        raise UserError(
            f"task.classes: the labels in column {label!r} are only numbers; give the {len(examples.classes)} names "
            "that prompts are made of, in the order of the numbers."
        )
    data.needs_classes(examples.labels, examples.classes)
    score = ClassScore(config.metric, examples.classes, config.positive)
    processor = pretrained_tokenizer(config, processor=True)
    if not (hasattr(processor, "image_processor") and hasattr(processor, "tokenizer")):
        raise UserError("task.model: it has no processor of images and text (preprocessor_config.json, tokenizer).")
    model, new = pretrained_model(config, AutoModel)
    if not all(hasattr(model, part) for part in ("get_image_features", "get_text_features", "logit_scale")):
        raise UserError(f"task.model: {type(model).__name__} is no dual encoder of images and text, such as CLIP.")
    if new:
        raise UserError(f"task.model: the checkpoint lacks {len(new)} tensors of the model (first: {new[0]}).")
    names = [name.replace("_", " ") for name in examples.classes]
    train, test = (
        data.Pixels(
            rows,
            image,
            processor.image_processor,
            config.num_workers,
            data.image_folder(config),
            config.image_cache * 2**30,
            config.pixel_range,
        )
        for rows in (examples.train, examples.test)
    )
    task = ImageText(
        model,
        processor.tokenizer,
        [[template.format(name) for template in templates] for name in names],
        train,
        examples.labels,
        test,
        examples.test_labels,
        classes=examples.classes,
        score=score,
    )
    refuse_unknown_tokens(model, processor.tokenizer, input_ids=task._tokens["input_ids"].numpy())
    task.tables = {"train": examples.train, "test": examples.test}
    task.interface = {**task.interface, "prompt_names": names, "templates": list(templates), "processor": True}
    task.interface |= {"image_column": image, "label_column": label, "pixel_range": config.pixel_range}
    task.content = examples.content
    return task


def _features(output: Any) -> Tensor:
    """The projected features: transformers returns a tensor or an output with `pooler_output`."""
    return output if isinstance(output, Tensor) else output.pooler_output
