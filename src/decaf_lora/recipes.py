"""Which runs are ready to use? Recipes: functions that return a full configuration for `decaf compare`.

`decaf run RECIPE` takes the base run of the same recipe. `paper/...` are the experiments of the DeCAF paper
(arXiv 2505.21382); docs/reproducing.md says what is known of them and what they cost.
"""

from __future__ import annotations

import math
from collections.abc import Callable

from decaf_lora.config import AlgorithmConfig, CompareConfig, LoraOptions, RunConfig, TaskConfig, TrainingConfig
from decaf_lora.errors import UserError, unknown


def digits() -> CompareConfig:
    """Tiny CLIP on turned digits: ring, Dirichlet(0.1).

    The demo: it needs no download and takes minutes on 2 cores.
    """
    return CompareConfig(
        task=TaskConfig(name="digits"),
        lora=LoraOptions(r=2, lora_alpha=2),
        algorithm=AlgorithmConfig(name="decaf"),
        training=TrainingConfig(steps=5, batch_size=16, learning_rate=0.02, schedule="cosine"),
        # Each method at its own best of the studies (docs/study-decaf.md, study-consensus.md), where that is not 0.02.
        learning_rates={"local": 0.02, "dlora_fa": 0.16, "fedavg": 0.06},
        settings={
            "recommended": {
                "algorithm.name": "decaf_tracked",
                "algorithm.messages": "int8",
                "graph": "base:5",
                "gossip_steps": "period",
            }
        },
        agents=10,
        graph="ring",
        partition="dirichlet:0.1",
        rounds=30,
        evaluate_every=5,
        checkpoint_every=10,
    )


# The DeCAF paper. "Published" marks what the paper states, "ours" what it leaves open and we chose.

# Published: ring, fully connected, bipartite. Ours: which bipartite (8 + 2 hubs, and two halves of five).
GRAPHS = ("ring", "complete", "bipartite", "complete-bipartite")


def flowers102() -> CompareConfig:
    """CLIP ViT-B/16 on Flowers 102: 4 graphs, IID and non-IID."""
    task = TaskConfig(
        name="image-text",
        data="dpdl-benchmark/oxford_flowers102",
        # Ours: the official splits have 10, 10 and at least 20 images a class, so that 40 shots need two of them.
        train_split="train+test",
        test_split="validation",
        templates=("a photo of a {}, a type of flower.",),
    )
    # Its smallest classes have 30 training images: `up-to` takes all of them, and a warning counts these classes.
    return _vision(task, "up-to:40")


def ucf101() -> CompareConfig:
    """CLIP ViT-B/16 on UCF101 frames: 4 graphs, IID and non-IID."""
    task = TaskConfig(
        name="image-text",
        # The Hub has every frame of every video only; docs/reproducing.md makes this folder of middle frames.
        data="./ucf101-middle-frames",
        templates=("a photo of a person doing {}.",),
    )
    return _vision(task, "shots:40")


def food101() -> CompareConfig:
    """CLIP ViT-B/16 on Food-101: 4 graphs, IID and non-IID."""
    task = TaskConfig(
        name="image-text",
        data="ethz/food101",
        test_split="validation",
        templates=("a photo of {}, a type of food.",),
    )
    return _vision(task, "shots:40").model_copy(update={"evaluate_every": 100})  # 25,250 test images


def wic() -> CompareConfig:
    """LLaMA-2-7B on WiC (SuperGLUE): 4 graphs, IID and non-IID."""
    task = TaskConfig(
        name="causal-lm",
        data="aps/super_glue",
        subset="wic",
        test_split="validation",  # the labels of the test split are hidden
        templates=(
            "Sentence 1: {sentence1}\nSentence 2: {sentence2}\n"
            'Question: Does the word "{word}" mean the same in both sentences?\nAnswer:',
        ),
        answers=("no", "yes"),
        max_length=256,
    )
    return _language(task)


def boolq() -> CompareConfig:
    """LLaMA-2-7B on BoolQ (SuperGLUE): 4 graphs, IID and non-IID."""
    task = TaskConfig(
        name="causal-lm",
        data="aps/super_glue",
        subset="boolq",
        test_split="validation",
        templates=("{passage}\nQuestion: {question}?\nAnswer:",),
        answers=("no", "yes"),
        max_length=512,
    )
    return _language(task)


def _vision(task: TaskConfig, shots: str) -> CompareConfig:
    return CompareConfig(
        # 40 shots of 102 classes are 2.3 GiB of pixels. Decoding them for every batch takes longer than a GPU's step.
        task=task.model_copy(update={"model": "openai/clip-vit-base-patch16", "num_workers": 4, "image_cache": 4.0}),
        # Published: rank 2, scaling 1, dropout 0.25. Ours: q, k, v of all text and vision blocks (CLIP-LoRA).
        lora=LoraOptions(r=2, lora_alpha=2, lora_dropout=0.25, target_modules=["q_proj", "k_proj", "v_proj"]),
        # Published: batch 32, 500 epochs, mixing every epoch.
        training=_training(epochs=1, precision="bfloat16", agents_per_pass=2),
        rounds=500,
        agents=10,
        graph=GRAPHS[0],
        graphs=GRAPHS,
        # Published: IID is 40 shots a class in all, 4 an agent; non-IID. Ours: the two non-IID rules.
        partition=shots,
        partitions=(shots, f"{shots}/by-class", f"{shots}/dirichlet:0.1"),
        evaluate_every=50,
        checkpoint_every=50,
    )


def _language(task: TaskConfig) -> CompareConfig:
    return CompareConfig(
        task=task.model_copy(
            update={
                "model": "meta-llama/Llama-2-7b-hf",
                "metric": "f1",  # published
                "dtype": "bfloat16",
                "gradient_checkpointing": True,
                "eval_batch_size": 32,
            }
        ),
        # Published: rank 4, scaling 8, dropout 0.1. Ours: q, k, v of all blocks.
        lora=LoraOptions(r=4, lora_alpha=32, lora_dropout=0.1, target_modules=["q_proj", "k_proj", "v_proj"]),
        # Published: batch 32, 150 batches, mixing every 3.
        training=_training(steps=3, precision="bfloat16", agents_per_pass=1),
        rounds=50,
        agents=10,
        graph=GRAPHS[0],
        graphs=GRAPHS,
        # Ours: with two classes "every class on one agent" leaves eight agents without data, and Dirichlet(0.1)
        # leaves some with a single example.
        partition="iid",
        partitions=("iid", "dirichlet:0.5"),
        evaluate_every=25,
        checkpoint_every=10,
    )


def _training(**values: object) -> TrainingConfig:
    """Published: batch 32 and a cosine schedule. Ours: AdamW with CLIP-LoRA's numbers (arXiv 2405.18541)."""
    ours = {"optimizer": "adamw", "learning_rate": 2e-4, "weight_decay": 1e-2, "final_learning_rate": 1e-6}
    return TrainingConfig.model_validate({"batch_size": 32, "schedule": "cosine", **ours, **values})


RECIPES: dict[str, Callable[[], CompareConfig]] = {
    "digits": digits,
    "paper/flowers102": flowers102,
    "paper/ucf101": ucf101,
    "paper/food101": food101,
    "paper/wic": wic,
    "paper/boolq": boolq,
}


def get(name: str) -> CompareConfig:
    """The configuration of the recipe called `name`; UserError for an unknown one suggests the nearest."""
    if name not in RECIPES:
        raise unknown("recipe", name, RECIPES)
    return RECIPES[name]()


def describe() -> dict[str, str]:
    """Name of each recipe -> its summary, the first line of its docstring."""
    return {name: (recipe.__doc__ or "").splitlines()[0] for name, recipe in RECIPES.items()}


def shortened(config: RunConfig, scale: float) -> RunConfig:
    """`config` with a share of its rounds and of its test examples.

    Training data, local steps and the interval of evaluations stay, so that a round is what it was. The result is a
    configuration like any other: nothing else remembers the scale.

    Args:
        config: what to shorten.
        scale: the share, above 0 and at most 1. At least 2 rounds stay.

    Raises:
        UserError: `scale` is out of range.
    """
    if not 0 < scale <= 1:
        raise UserError(f"scale: must be above 0 and at most 1 (got {scale:g}); 0.05 is a twentieth of the run.")
    if scale == 1:
        return config
    rounds = max(min(2, config.rounds), math.ceil(round(scale * config.rounds, 6)))
    task, most = config.task, config.task.max_test
    if task.data is not None:  # the demo's and own tasks may not have the option
        kept = scale if most is None else scale * most if most < 1 else math.ceil(round(scale * most, 6))
        task = task.model_copy(update={"max_test": kept})
    return config.model_copy(update={"rounds": rounds, "task": task})
