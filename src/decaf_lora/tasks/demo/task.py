"""The demo task: a tiny CLIP that knows handwritten digits meets them turned by 90 degrees and inverted."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from decaf_lora.tasks.demo import digits_data
from decaf_lora.tasks.image_text import Images, ImageText

if TYPE_CHECKING:
    from peft import LoraConfig


class Digits(ImageText):
    """`ImageText` on the embedded model and scikit-learn's digits; reads nothing from the network."""

    def __init__(self, shift: bool = True) -> None:
        from transformers import AutoTokenizer, CLIPModel

        model = CLIPModel.from_pretrained(digits_data.MODEL_DIR, dtype=torch.float32)
        tokenizer = AutoTokenizer.from_pretrained(digits_data.MODEL_DIR)
        train, test = digits_data.load("train", shift=shift), digits_data.load("test", shift=shift)
        super().__init__(
            model,
            tokenizer,
            [[digits_data.TEMPLATE.format(name)] for name in digits_data.CLASS_NAMES],
            _in_memory(train.images),
            train.labels,
            _in_memory(test.images),
            test.labels,
            name="digits",
            classes=digits_data.CLASS_NAMES,
        )
        self.interface = {**self.interface, "prompt_names": self.classes, "templates": [digits_data.TEMPLATE]}
        self.content = f"{digits_data.SPLIT_SHA256}, shifted: {shift}"

    def default_lora(self) -> LoraConfig:
        """Rank 2 on q, k, v of the vision encoder, scaling 1, as the paper's vision set-up."""
        from peft import LoraConfig

        return LoraConfig(r=2, lora_alpha=2, target_modules=r"vision_model.*\.(q_proj|k_proj|v_proj)")


def _in_memory(images: np.ndarray) -> Images:
    pixels = torch.from_numpy(images)

    def by_index(indices: np.ndarray) -> Tensor:
        return pixels[indices]

    return by_index
