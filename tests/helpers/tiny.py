"""Tiny random models of the families that people fine-tune, as directories that `from_pretrained` loads."""

import json
from pathlib import Path

import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers, processors, trainers
from transformers import AutoModel, AutoModelForCausalLM, PreTrainedTokenizerFast

KNOWN = (
    "the a red blue green cat dog bird sat ran flew on under over mat tree sky is it true false yes no maybe "
    "question answer : ? . , photo of big small old new good bad film was not very user assistant"
)
WORDS = KNOWN.split()


def tokenizer(style="bert", pad="<pad>", eos="</s>", limit=32):
    """Words of `WORDS`; `bert`: <s> a </s>, or <s> a </s> b </s>; `gpt`: the words alone."""
    specials = ["<pad>", "<s>", "<unk>", "</s>"]  # CLIP pools at its highest token if </s> is number 2
    vocabulary = {word: i for i, word in enumerate([*specials, *WORDS])}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    if style == "bert":
        backend.post_processor = processors.TemplateProcessing(
            single="<s> $A </s>", pair="<s> $A </s> $B:1 </s>:1", special_tokens=[("<s>", 1), ("</s>", 3)]
        )
    elif style == "llama":
        backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    names = ["input_ids", "token_type_ids", "attention_mask"] if style == "bert" else ["input_ids", "attention_mask"]
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token=pad,
        eos_token=eos,
        bos_token="<s>",
        unk_token="<unk>",
        model_max_length=limit,
        model_input_names=names,
    )


def qwen_tokenizer():
    """Byte-level pairs, as AutoTokenizer insists on for this family; texts have no beginning token."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=320, initial_alphabet=alphabet, special_tokens=["<|endoftext|>"])
    backend.train_from_iterator([" ".join(WORDS)] * 4, trainer)
    pairs = json.loads(backend.to_str())["model"]
    merges = [tuple(pair) for pair in pairs["merges"]]
    return transformers.Qwen2Tokenizer(vocab=pairs["vocab"], merges=merges, model_max_length=64)


SMALL = {
    "vocab_size": 60,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 24,
    "max_position_embeddings": 32,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 3,
}
LLAMA = SMALL | {"num_key_value_heads": 1, "max_position_embeddings": 64}
TOWERS = {
    "text_config": {**SMALL, "max_position_embeddings": 16},
    "vision_config": {
        "image_size": 16,
        "patch_size": 8,
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
    },
}
ENCODERS = {
    "bert": ("BertConfig", SMALL),
    "roberta": ("RobertaConfig", SMALL | {"type_vocab_size": 1, "pad_token_id": 0}),
    "distilbert": (
        "DistilBertConfig",
        {
            "vocab_size": 60,
            "dim": 16,
            "hidden_dim": 24,
            "n_layers": 2,
            "n_heads": 2,
            "max_position_embeddings": 32,
            "pad_token_id": 0,
        },
    ),
    "deberta-v2": (
        "DebertaV2Config",
        SMALL | {"relative_attention": True, "pos_att_type": ["p2c", "c2p"], "share_att_key": True},
    ),
}
DECODERS = {
    "llama": ("LlamaConfig", LLAMA),
    "qwen2": ("Qwen2Config", LLAMA | {"vocab_size": 320, "bos_token_id": None, "eos_token_id": 0}),
    "gpt2": (
        "GPT2Config",
        {
            "vocab_size": 60,
            "n_embd": 16,
            "n_layer": 2,
            "n_head": 2,
            "n_positions": 64,
            "bos_token_id": 1,
            "eos_token_id": 3,
        },
    ),
}
DUALS = {
    "clip": ("CLIPConfig", TOWERS | {"projection_dim": 8}),
    "siglip": ("SiglipConfig", TOWERS),
}


def new_model(kind, family, table):
    name, values = table[family]
    with torch.random.fork_rng():
        torch.manual_seed(1)
        model = kind.from_config(getattr(transformers, name)(**values)).eval()
        for parameter in model.parameters():  # far from the flat start of a new model
            if parameter.dim() > 1:
                parameter.data.normal_(std=0.3)
    return model


def write(family: str, directory: Path) -> Path:
    """Saves the family's model with its tokenizer, or processor, to `directory`."""
    if family in ENCODERS:
        new_model(AutoModel, family, ENCODERS).save_pretrained(directory)
        tok = tokenizer()
        if family in ("roberta", "distilbert"):
            tok.model_input_names = ["input_ids", "attention_mask"]
        tok.save_pretrained(directory)
    elif family in DECODERS:
        new_model(AutoModelForCausalLM, family, DECODERS).save_pretrained(directory)
        styles = {"gpt2": "gpt", "llama": "llama"}
        tok = tokenizer(styles[family], pad=None, limit=64) if family in styles else qwen_tokenizer()
        tok.save_pretrained(directory)
    else:
        new_model(AutoModel, family, DUALS).save_pretrained(directory)
        tok = tokenizer(limit=16)
        tok.model_input_names = ["input_ids"] + ["attention_mask"] * (family == "clip")
        tok.save_pretrained(directory)
        kind = getattr(transformers, {"clip": "CLIPImageProcessor", "siglip": "SiglipImageProcessor"}[family])
        size = {"height": 16, "width": 16}
        kind(size=size, crop_size=size).save_pretrained(directory)
    return directory
