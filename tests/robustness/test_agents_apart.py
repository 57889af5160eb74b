"""Agents in one pass never touch each other's results, whatever the layout of a model's tensors."""

import copy
import dataclasses
import warnings

import numpy as np
import pytest
import torch
import transformers
from peft import LoraConfig, PeftModel
from torch import nn
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from decaf_lora import algorithms, partition, separation
from decaf_lora.config import TrainingConfig
from decaf_lora.data import Ragged
from decaf_lora.errors import UserError
from decaf_lora.graphs import complete
from decaf_lora.run import Run
from decaf_lora.tasks.causal_lm import LanguageModeling
from decaf_lora.tasks.sequence_classification import SequenceClassification
from decaf_lora.tasks.sequences import Sequences
from toy import Toy

SMALL = {
    "vocab_size": 40,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 24,
    "max_position_embeddings": 34,
    "pad_token_id": 0,
}
RELATIVE = {"relative_attention": True, "pos_att_type": ["c2p", "p2c"], "share_att_key": True}
XLNET = {"vocab_size": 40, "d_model": 16, "n_layer": 2, "n_head": 2, "d_inner": 24}
TINY_GPT2 = {"vocab_size": 40, "n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 34}
APART = {
    "bert": ("BertConfig", SMALL, ["query", "value"], ["classifier"]),
    "roberta": ("RobertaConfig", SMALL, ["query", "dense"], ["classifier"]),
}
MIXED = {
    "longformer": ("LongformerConfig", SMALL | {"attention_window": 4}, ["query", "value"], ["classifier"]),
    "deberta-v2": (
        "DebertaV2Config",
        SMALL | RELATIVE,
        ["query_proj", "key_proj"],
        ["classifier"],
    ),
    "deberta": ("DebertaConfig", SMALL | RELATIVE, ["in_proj", "pos_proj", "pos_q_proj"], ["classifier"]),
    "xlnet": ("XLNetConfig", XLNET, ["layer_1", "layer_2"], ["logits_proj"]),
}
FAMILIES = APART | MIXED

pytestmark = pytest.mark.filterwarnings("ignore:fan_in_fan_out|ignore::DeprecationWarning")


def sequences(count, seed, longest=8):
    generator = np.random.default_rng(seed)
    lengths = generator.integers(longest - 3, longest + 1, count)
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    return Ragged(generator.integers(4, 40, offsets[-1]).astype(np.int32), offsets)


def encoder(family, dtype=torch.float32):
    kind, values, _, _ = FAMILIES[family]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = getattr(transformers, kind)(**values, num_labels=2)
        return AutoModelForSequenceClassification.from_config(config, dtype=dtype).eval()


def classification(family, dtype=torch.float32, examples=36):
    model = encoder(family, dtype)
    labels = np.arange(examples) % 2
    train, test = {"input_ids": sequences(examples, 1)}, {"input_ids": sequences(4, 2)}
    return SequenceClassification(model, train, labels, test, labels[:4], ["no", "yes"], heads=FAMILIES[family][3])


def run_of(task, lora, agents=2, per_pass=2, steps=2, **options):
    """Agents that do not talk: each must learn as if it were alone."""
    training = TrainingConfig(steps=steps, batch_size=4, learning_rate=0.02, agents_per_pass=per_pass)
    shards = partition.iid(task.labels, agents, 0)
    graph = complete(agents)
    return Run(task, algorithms.make("local"), graph, shards, training, lora=lora, rounds=1, **options)


def trained(task, lora, **options):
    run = run_of(task, lora, **options)
    list(run.train())
    run.close()
    return run


def lora_of(family, **values):
    _, _, targets, heads = FAMILIES[family]
    return LoraConfig(r=2, lora_alpha=8, target_modules=targets, modules_to_save=heads, **values)


def same(ours, theirs):
    for name, tensor in theirs.tensors().items():
        torch.testing.assert_close(ours.tensors()[name], tensor, rtol=1e-4, atol=1e-5, msg=name)


# Families of transformers


@pytest.mark.parametrize("agents", [2, 3])
@pytest.mark.parametrize("family", list(MIXED))
def test_agents_learn_as_they_do_alone(family, agents):
    alone = trained(classification(family), lora_of(family), agents=agents, per_pass=1)
    with pytest.warns(UserWarning, match=r"agents_per_pass: .* one by one"):
        together = trained(classification(family), lora_of(family), agents=agents, per_pass=agents)
    assert together.trainer.agents_per_pass == 1
    same(together.adapter, alone.adapter)


@pytest.mark.parametrize("family", list(MIXED))
def test_the_exported_adapter_is_the_run_s(family, tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        run = run_of(classification(family), lora_of(family), steps=3)
        list(run.train())
    batch = run.task.test_batch(np.arange(4))
    inputs = {k: batch[k] for k in ("input_ids", "attention_mask")}
    for agent in range(2):
        with torch.no_grad(), run.attached.bind(run.adapter.select([agent])):
            ours = run.task.model(**inputs).logits
        run.save_adapter(tmp_path / str(agent), agent)
        theirs = PeftModel.from_pretrained(encoder(family), tmp_path / str(agent)).eval()
        with torch.no_grad():
            torch.testing.assert_close(ours, theirs(**inputs).logits, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", list(APART))
def test_agents_of_the_usual_layout_share_a_pass(family, dtype):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        run = run_of(classification(family, dtype), lora_of(family), agents=3, per_pass=3)
    assert run.trainer.agents_per_pass == 3


@pytest.mark.parametrize("per_pass", [2, "auto"])
def test_mixed_agents_are_found_in_few_digits_too(per_pass):
    task, lora = classification("longformer", torch.bfloat16), lora_of("longformer")
    with pytest.warns(UserWarning, match="one by one"):
        assert run_of(task, lora, per_pass=per_pass).trainer.agents_per_pass == 1


def test_a_checkpoint_does_not_bring_mixed_passes_back():
    with pytest.warns(UserWarning, match="one by one"):
        run = run_of(classification("longformer"), lora_of("longformer"), per_pass="auto")
    tensors, values = run.snapshot()
    run.restore(tensors, values | {"agents_per_pass": 2})  # as an earlier version has left it
    assert run.trainer.agents_per_pass == 1


# Layouts that no family has


class SequenceFirst(nn.Module):
    """x (m, 6, 5) -> logits (m, 3); inside, the sequence comes first and the sizes divide by 1, 2, 3 and 6 agents."""

    def __init__(self):
        super().__init__()
        self.inner, self.head = nn.Linear(5, 7), nn.Linear(7, 3)

    def forward(self, x):
        hidden = torch.tanh(self.inner(x.transpose(0, 1)))
        return self.head(hidden.mean(0))


class OwnTask(Toy):
    """`Toy` with another model and inputs (m, 6, 5)."""

    def __init__(self, model):
        super().__init__()
        self.model = model
        generator = torch.Generator().manual_seed(5)
        self.x = torch.randn(len(self.y), 6, 5, generator=generator)
        self.test_x = torch.randn(len(self.test_y), 6, 5, generator=generator)
        self.y, self.test_y = self.y % 3, self.test_y % 3

    def default_lora(self):
        return LoraConfig(r=2, target_modules=["inner"])


def seeded(kind):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return kind()


@pytest.mark.parametrize("agents", [2, 3, 6])
def test_a_sequence_that_comes_first_and_divides(agents):
    alone = trained(OwnTask(seeded(SequenceFirst)), None, agents=agents, per_pass=1)
    with pytest.warns(UserWarning, match="one by one"):
        same(trained(OwnTask(seeded(SequenceFirst)), None, agents=agents, per_pass=agents).adapter, alone.adapter)


class SharedLoss(Toy):
    """A loss whose mean goes over all agents of a pass."""

    def losses(self, batch, agents):
        losses = super().losses(batch, agents)
        return losses / losses.detach().sum()


def test_a_loss_that_depends_on_the_neighbours():
    with pytest.warns(UserWarning, match="one by one"):
        assert run_of(SharedLoss(), None).trainer.agents_per_pass == 1


# Modules trained in full


def language_model(extras, kind="GPT2Config", values=TINY_GPT2):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(getattr(transformers, kind)(**values)).eval()
    starts = [np.ones(n, np.int64) for n in (36, 4)]
    train, test = Sequences(sequences(36, 1), starts[0]), Sequences(sequences(4, 2), starts[1])
    task = LanguageModeling(copy.deepcopy(model), train, np.zeros(36, np.int64), test)
    return model, task, LoraConfig(r=2, modules_to_save=extras)


@pytest.mark.parametrize("extras", [["wpe"], ["wte"], ["ln_f"], ["lm_head"], ["wpe", "ln_2"]])
def test_modules_trained_in_full_are_those_of_peft(extras, tmp_path):
    model, task, lora = language_model(extras)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        run = run_of(task, lora, steps=3)
        list(run.train())
    batch = task.test_batch(np.arange(4))
    inputs = {k: batch[k] for k in ("input_ids", "attention_mask")}
    moved = {name: t - run.attached.extras[name] for name, t in run.adapter.extras.items()}
    assert all(float(t.abs().max()) > 1e-3 for t in moved.values())
    for agent in range(2):
        with torch.no_grad(), run.attached.bind(run.adapter.select([agent])):
            ours = task.model(**inputs).logits
        run.save_adapter(tmp_path / str(agent), agent)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            theirs = PeftModel.from_pretrained(copy.deepcopy(model), tmp_path / str(agent)).eval()
        with torch.no_grad():
            torch.testing.assert_close(ours, theirs(**inputs).logits, rtol=1e-4, atol=1e-5)


class LoopsOverValues(nn.Module):
    """A head that looks at its input's numbers, which `torch.func.vmap` cannot follow."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(5))

    def forward(self, x):
        return x * self.weight if x.abs().max().item() > 0 else x


class WithLoops(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner, self.loops, self.head = nn.Linear(5, 5), LoopsOverValues(), nn.Linear(5, 3)

    def forward(self, x):
        return self.head(self.loops(torch.tanh(self.inner(x))).mean(1))


def test_a_module_that_cannot_be_vectorized_is_called_agent_by_agent():
    lora = LoraConfig(r=2, target_modules=["inner"], modules_to_save=["loops"])
    alone = trained(OwnTask(seeded(WithLoops)), lora, per_pass=1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        together = trained(OwnTask(seeded(WithLoops)), lora, per_pass=2)
    assert together.trainer.agents_per_pass == 2
    same(together.adapter, alone.adapter)
    assert not torch.equal(together.adapter.extras["loops.weight"][0], together.adapter.extras["loops.weight"][1])


# What the model does with the layers


class ReadsWeights(nn.Module):
    """The second layer is never called: its weight is used as it is, as `nn.MultiheadAttention` does."""

    def __init__(self):
        super().__init__()
        self.first, self.second, self.spare = nn.Linear(5, 7), nn.Linear(7, 3), nn.Linear(5, 7)

    def forward(self, x):
        return nn.functional.linear(torch.tanh(self.first(x)).mean(1), self.second.weight, self.second.bias)


@pytest.mark.parametrize(("agents", "per_pass"), [(1, 1), (2, 1), (2, 2)])
def test_a_layer_whose_weight_is_read_is_refused(agents, per_pass):
    lora = LoraConfig(r=2, target_modules=["first", "second"])
    with pytest.raises(UserError, match=r"reads the weight of second.*--lora\.exclude_modules second"):
        run_of(OwnTask(seeded(ReadsWeights)), lora, agents=agents, per_pass=per_pass)


def test_layers_that_take_no_part_are_told():
    lora = LoraConfig(r=2, target_modules=["first", "spare"])
    with pytest.warns(UserWarning, match=r"1 of 2 adapted layers take no part.*spare"):
        run_of(OwnTask(seeded(ReadsWeights)), lora)
    with pytest.raises(UserError, match="none of the adapted layers"):
        run_of(OwnTask(seeded(ReadsWeights)), LoraConfig(r=2, target_modules=["spare"]))


@pytest.mark.parametrize("extra", ["spare", "second"])
def test_a_module_trained_in_full_that_is_not_called_is_refused(extra):
    lora = LoraConfig(r=2, target_modules=["first"], modules_to_save=[extra])
    with pytest.raises(UserError, match=rf"modules_to_save: .*{extra}"):
        run_of(OwnTask(seeded(ReadsWeights)), lora, per_pass=1)


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.head = nn.Linear(7, 3)

    def forward(self, x):
        return self.head(x)


class ReachesInto(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner, self.block = nn.Linear(5, 7), Block()

    def forward(self, x):
        return self.block.head(torch.tanh(self.inner(x)).mean(1))


def test_a_module_that_the_model_reaches_into_is_refused():
    lora = LoraConfig(r=2, target_modules=["inner"], modules_to_save=["block"])
    with pytest.raises(UserError, match=r"modules_to_save: the model calls block\.head"):
        run_of(OwnTask(seeded(ReachesInto)), lora)


class ChangesItself(nn.Module):
    """Halves its own weights in its first forward pass, as RWKV does."""

    def __init__(self, factor=0.5):
        super().__init__()
        self.inner, self.head, self.factor, self.done = nn.Linear(5, 7), nn.Linear(7, 3), factor, False

    def forward(self, x):
        if not self.done:
            with torch.no_grad():
                self.inner.weight.mul_(self.factor)
            self.done = True
        return self.head(torch.tanh(self.inner(x)).mean(1))


def test_a_model_that_changes_its_weights_is_refused():
    with pytest.raises(UserError, match=r"task\.model: ChangesItself changes its own weights.*inner"):
        run_of(OwnTask(seeded(ChangesItself)), None)
    run_of(OwnTask(seeded(lambda: ChangesItself(1.0))), None)  # by nothing


RWKV = {"vocab_size": 40, "hidden_size": 16, "num_hidden_layers": 2, "context_length": 34}


def test_rwkv_is_as_in_peft_unless_it_rescales_its_weights(tmp_path):
    model, task, lora = language_model(None, "RwkvConfig", RWKV)  # it rescales from its sixth block on
    run = run_of(task, lora, steps=3)
    list(run.train())
    inputs = task.test_batch(np.arange(4))["input_ids"]
    run.save_adapter(tmp_path, 1)
    with torch.no_grad(), run.attached.bind(run.adapter.select([1])):
        ours = task.model(inputs, use_cache=False).logits
    theirs = PeftModel.from_pretrained(model, tmp_path).eval()
    with torch.no_grad():
        torch.testing.assert_close(ours, theirs(inputs, use_cache=False).logits, rtol=1e-4, atol=1e-5)
    _, task, lora = language_model(None, "RwkvConfig", RWKV | {"rescale_every": 1})
    with pytest.raises(UserError, match=r"RwkvForCausalLM changes its own weights.*rescale_every 0"):
        run_of(task, lora)


def test_a_model_of_nan_is_refused_before_training():
    task = OwnTask(seeded(WithLoops))
    task.model.head.weight.data[0, 0] = float("nan")
    with pytest.raises(UserError, match="the loss is nan before any training"):
        run_of(task, None)


# The check itself


def test_a_run_that_is_refused_leaves_the_model_as_it_was():
    task = OwnTask(seeded(ReadsWeights))
    names = [name for name, _ in task.model.named_modules()]
    for _ in range(2):
        with pytest.raises(UserError, match="reads the weight of second"):
            run_of(task, LoraConfig(r=2, target_modules=["first", "second"]))
        assert [name for name, _ in task.model.named_modules()] == names
    with pytest.raises(UserError, match="another run holds this ReadsWeights"):
        run_of(task, LoraConfig(r=2, target_modules=["first"])), run_of(task, LoraConfig(r=2, target_modules=["first"]))


@pytest.mark.parametrize("agents", [1, 2, 3])
def test_the_check_changes_no_result(monkeypatch, agents):
    lora = dataclasses.replace(Toy().default_lora(), lora_dropout=0.3)
    torch.manual_seed(3)
    before = torch.random.get_rng_state()
    checked = trained(Toy(extras=True), lora, agents=agents, per_pass=agents)
    assert torch.equal(torch.random.get_rng_state(), before)
    monkeypatch.setattr(separation, "check", lambda *arguments: True)
    unchecked = trained(Toy(extras=True), lora, agents=agents, per_pass=agents)
    for name, tensor in unchecked.adapter.tensors().items():
        assert torch.equal(checked.adapter.tensors()[name], tensor)
