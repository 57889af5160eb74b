"""How is a small CLIP trained from nothing? What make_digits_clip.py and make_small_clip.py share.

A caption is a template with a class name in it, a token is a word, and the loss is CLIP's, with one caption a class.
"""

import hashlib
import math
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch
import transformers
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from torch import Tensor, nn
from transformers import CLIPModel, PreTrainedTokenizerBase, PreTrainedTokenizerFast

# <eos> must not be 2: transformers takes that for CLIP's old config and pools at the largest id instead.
SPECIAL = ("<pad>", "<unk>", "<bos>", "<eos>")
MAX_WORDS = 16
MAX_LOGIT_SCALE = math.log(100)  # as in CLIP

Batch = tuple[Tensor, Tensor, list[str]]
"""Pixel values (k, channels, height, width), class numbers (k,), one caption a class."""


def word_tokenizer(templates: Sequence[str], names: Sequence[str]) -> PreTrainedTokenizerFast:
    """One token per word, lower case: `<bos> a photo of the digit seven <eos>`."""
    words = sorted({word for template in templates for word in template.format("").split()})
    vocabulary = {token: index for index, token in enumerate([*SPECIAL, *words, *names])}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    backend.normalizer = normalizers.Lowercase()
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    backend.post_processor = processors.TemplateProcessing(
        single="<bos> $A <eos>",
        special_tokens=[(token, vocabulary[token]) for token in ("<bos>", "<eos>")],
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        model_max_length=MAX_WORDS,
        model_input_names=["input_ids", "attention_mask"],
        clean_up_tokenization_spaces=False,
        **{f"{token.strip('<>')}_token": token for token in SPECIAL},
    )


def text_config(tokenizer: PreTrainedTokenizerBase) -> dict[str, int | None]:
    """What a `CLIPTextConfig` must know of its tokenizer."""
    return {
        "vocab_size": len(tokenizer),
        "max_position_embeddings": MAX_WORDS,
        "pad_token_id": tokenizer.pad_token_id,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
    }


def draw_captions(templates: Sequence[str], names: Sequence[str], generator: torch.Generator) -> list[str]:
    """A caption of every class, each by a template of its own."""
    drawn = torch.randint(len(templates), (len(names),), generator=generator)
    return [templates[t].format(name) for t, name in zip(drawn, names, strict=True)]


def train(
    model: CLIPModel,
    tokenizer: PreTrainedTokenizerBase,
    batches: Iterable[Batch],
    *,
    steps: int,
    learning_rate: float,
    weight_decay: float,
) -> None:
    """AdamW with warm-up and cosine decay on `batches`, of which there are `steps`."""
    decayed = [p for p in model.parameters() if p.ndim >= 2]
    plain = [p for p in model.parameters() if p.ndim < 2]
    optimizer = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": weight_decay}, {"params": plain, "weight_decay": 0.0}],
        lr=learning_rate,
    )
    schedule = transformers.get_cosine_schedule_with_warmup(optimizer, steps // 20, steps)
    model.train()
    for step, (images, labels, captions) in enumerate(batches):
        text = tokenizer(captions, padding=True, return_tensors="pt").to(model.device)
        similarity = model(pixel_values=images, **text).logits_per_image
        loss = contrastive_loss(similarity, labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        with torch.no_grad():
            model.logit_scale.clamp_(max=MAX_LOGIT_SCALE)
        if step % 100 == 0:
            print(f"step {step:4d}  loss {loss.item():.4f}", flush=True)


def contrastive_loss(similarity: Tensor, labels: Tensor) -> Tensor:
    """CLIP's symmetric loss with one caption per class: every image of a class is a positive of its caption.

    similarity (k, C), images by captions; labels (k,).
    """
    positives = nn.functional.one_hot(labels, similarity.shape[1]).to(similarity.dtype)
    images_of = positives / positives.sum(dim=0).clamp(min=1)
    to_text = nn.functional.cross_entropy(similarity, labels)
    to_image = -(images_of * similarity.log_softmax(dim=0)).sum(dim=0).mean()
    return (to_text + to_image) / 2


@torch.no_grad()
def zero_shot(
    model: CLIPModel, tokenizer: PreTrainedTokenizerBase, captions: Sequence[str], images: Tensor, labels: Tensor
) -> float:
    """Share of `images` (k, channels, height, width) whose nearest caption is that of their class, `labels` (k,)."""
    text = tokenizer(list(captions), padding=True, return_tensors="pt").to(model.device)
    correct = 0
    for some, classes in zip(images.split(1000), labels.split(1000), strict=True):
        similarity = model(pixel_values=some, **text).logits_per_image
        correct += int((similarity.argmax(dim=1) == classes).sum())
    return correct / len(labels)


def sha256(path: Path) -> str:
    """The checksum of a file, as `sha256sum` prints it."""
    return hashlib.sha256(path.read_bytes()).hexdigest()
