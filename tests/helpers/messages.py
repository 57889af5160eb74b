"""A table of messages to a shop, as a person's own data: 300 rows, six kinds, the same words in all of them."""

import csv
import itertools
from pathlib import Path

import numpy as np

KINDS = {
    "delivery": (
        *("my parcel has not arrived", "the courier left my order at the wrong door", "tracking shows no movement"),
        *("the shipment is three days late", "when will you send my order"),
    ),
    "payment": (
        *("my card was charged twice for one order", "the bank refused my payment", "can I pay by invoice"),
        *("the total on my bill is wrong", "the discount was not taken off the price"),
    ),
    "return": (
        *("I want to send my order back", "the shoes do not fit, how do I return them", "where is my refund"),
        *("the item is not what I expected, take it back", "how many days do I have to return my order"),
    ),
    "account": (
        *("I cannot log in to my account", "the password link does not work", "please change my email address"),
        *("someone else uses my account", "how do I delete my profile"),
    ),
    "damage": (
        *("the box was crushed and the glass is broken", "my order came with a crack", "the screen has scratches"),
        *("a part of my order is missing", "the item stopped working on the first day"),
    ),
    "product": (
        *("is this jacket waterproof", "which size should I order", "does the lamp need a special bulb"),
        *("what is the sofa made of", "will the blue one be in stock again"),
    ),
}
BEFORE = ("", "hi, ", "hello, ", "please help: ", "good morning, ")
AFTER = ("", ", thanks", " today", ", please answer", ", again")


def write(path: Path, rows: int = 300) -> Path:
    """Writes the table, with the columns text and label."""
    every = [
        (before + text + after, kind)
        for kind, texts in KINDS.items()
        for before, text, after in itertools.product(BEFORE, texts, AFTER)
    ]
    chosen = np.random.default_rng(0).permutation(len(every))[:rows]
    with path.open("w", newline="") as file:
        csv.writer(file).writerows([("text", "label"), *(every[i] for i in chosen)])
    return path
