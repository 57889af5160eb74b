"""Three colleagues' adapters, trained apart with PEFT alone, become one, without data and without the base model.

    python examples/merge.py

The colleagues chose ranks 4, 8 and 2. PEFT's own merge refuses adapters that bring a classification head. This one
averages the heads as they are, and the low-rank updates as products, exactly, before it cuts them to one rank.
"""

import argparse
import json
import tempfile
from pathlib import Path

import numpy as np
import transformers
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import DataCollatorWithPadding, PrinterCallback, Trainer, TrainingArguments, set_seed

from decaf_lora import adapters
from trainer import built_in

RANKS = {"alice": 4, "bob": 8, "carol": 2}


def main(arguments=None):
    """Prints, and returns, the accuracy of each colleague's adapter and of the merged one."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--to", type=Path, help="where the adapters are kept")
    given = parser.parse_args(arguments)
    transformers.utils.logging.set_verbosity_error()
    train, test, tokenizer, make_base = built_in()
    classes = sorted({label for _, label in train})
    set_seed(0)
    start = make_base().state_dict()  # what all three downloaded

    def base():
        model = make_base()
        model.load_state_dict(start)
        return model

    def encoded(rows):
        return [{**tokenizer(text), "label": classes.index(label)} for text, label in rows]

    def trainer_of(model, rows, name):
        trainer = Trainer(
            model,
            TrainingArguments(
                output_dir=str(folder / f"training-{name}"),
                max_steps=given.steps,
                learning_rate=1e-2,
                save_strategy="no",
                report_to="none",
                disable_tqdm=True,
                logging_strategy="no",
                dataloader_pin_memory=False,
            ),
            train_dataset=encoded(rows),
            eval_dataset=encoded(test),
            data_collator=DataCollatorWithPadding(tokenizer),
            compute_metrics=lambda p: {"accuracy": float((np.argmax(p.predictions, -1) == p.label_ids).mean())},
        )
        trainer.remove_callback(PrinterCallback)
        return trainer

    with tempfile.TemporaryDirectory() as temporary:
        folder = given.to or Path(temporary)
        scores = {}
        for number, (name, rank) in enumerate(RANKS.items()):
            set_seed(0)  # one start for all: what begins alike merges best
            lora = LoraConfig(task_type="SEQ_CLS", r=rank, lora_alpha=2 * rank, target_modules=["query", "value"])
            trainer = trainer_of(get_peft_model(base(), lora), train[number::3], name)
            trainer.train()
            scores[name] = trainer.evaluate()["eval_accuracy"]
            trainer.model.save_pretrained(folder / name)
            # Which output of the head means what: heads are merged only where this agrees.
            (folder / name / "labels.json").write_text(json.dumps({"id2label": dict(enumerate(classes))}))
        merged = adapters.merge([folder / name for name in RANKS], folder / "merged")
        model = PeftModel.from_pretrained(base(), folder / "merged")
        scores["merged"] = trainer_of(model, train, "merged").evaluate()["eval_accuracy"]
    for name, score in scores.items():
        print(f"{name:8} {score:.3f}")
    print(f"The cut to one rank lost {merged.lost_in_all:.1%} of the update.")
    return scores


if __name__ == "__main__":
    main()
