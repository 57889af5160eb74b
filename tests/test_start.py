"""What does a fresh process import? Only what it is about to use: the large libraries take seconds to come in."""

import itertools
import subprocess
import sys

import numpy as np
import pytest
from sklearn.datasets import load_digits

from decaf_lora.tasks.demo import digits_data

TABLES = {"datasets", "pandas", "pyarrow"}
FIGURES = {"matplotlib", "jinja2"}
MODELS = {"peft", "transformers", "accelerate"}
HEAVY = {"torch", "numpy", "scipy", "sklearn", "networkx", *TABLES, *FIGURES, *MODELS}


IMPORTS = {
    "import decaf_lora, decaf_lora.config, decaf_lora.runs, decaf_lora.cli": set(),
    "command('--help')": set(),
    "command('run', 'digits', '--help')": set(),
    "command('run', 'digits', '--agents', 'none')": set(),
    "import decaf_lora.data.content": set(),
    "from decaf_lora import Run": {"torch", "numpy", "networkx"},
    "from decaf_lora.tasks import causal_lm, image_text, sequence_classification": set(),
    # The demo reads no table. scipy and jinja2 come with transformers.
    "decaf_lora.tasks.digits()": {*MODELS, "scipy", "jinja2"},
}
"""What a process does, one thing after another -> what it may import for that."""

COMMAND = """
import contextlib, sys
def command(*arguments):
    with contextlib.suppress(SystemExit):
        decaf_lora.cli.main(arguments)
"""


def test_a_process_imports_only_what_it_is_about_to_use():
    steps = "".join(f"{step}\nprint('imported:', *sys.modules)\n" for step in IMPORTS)
    out = subprocess.run([sys.executable, "-c", COMMAND + steps], capture_output=True, text=True)
    assert out.returncode == 0, out.stderr
    told = [set(line.split()) & HEAVY for line in out.stdout.splitlines() if line.startswith("imported:")]
    new = dict(zip(IMPORTS, (b - a for a, b in itertools.pairwise([set(), *told])), strict=True))
    assert {step: found - IMPORTS[step] for step, found in new.items() if found - IMPORTS[step]} == {}
    assert new["from decaf_lora import Run"] == {"torch", "numpy", "networkx"}  # so the names in `HEAVY` are right


@pytest.mark.parametrize("at_hand", [True, False])
def test_the_demo_data_are_those_of_scikit_learn(at_hand, monkeypatch):
    if not at_hand:  # as in a release that keeps its digits elsewhere
        monkeypatch.setattr(digits_data.importlib.util, "find_spec", lambda name: None)
    images, labels = digits_data._source.__wrapped__()
    expected = load_digits()
    np.testing.assert_array_equal(images, expected.images)
    np.testing.assert_array_equal(labels, expected.target)
    assert (images.dtype, labels.dtype) == (np.float64, np.int64)
