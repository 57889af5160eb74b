"""How does the tokenizer of a llama2.c model become one that transformers loads?

    python scripts/convert_llama2c_tokenizer.py tok512.bin DIRECTORY

llama2.c (https://github.com/karpathy/llama2.c) keeps a sentencepiece byte-pair vocabulary in one file: the
longest token's length (int32), then for every token its score (float32), its length (int32) and its bytes, with
a space where sentencepiece writes U+2581. It merges the neighbours whose union has the highest score; a
character outside the vocabulary becomes its UTF-8 bytes. A list of merges in the order of the scores does the
same, in the format of a fast tokenizer.
"""

from __future__ import annotations

import struct
import sys
from pathlib import Path

from tokenizers import Tokenizer, decoders, normalizers, processors
from tokenizers.models import BPE
from transformers import PreTrainedTokenizerFast

SPACE = "\u2581"
SPECIAL = ("<unk>", "<s>", "</s>")  # tokens 0, 1, 2
FIRST_PIECE = 3 + 256  # after the special tokens and the 256 bytes


def read(path: Path) -> list[tuple[str, float]]:
    """The tokens (piece, score) of a llama2.c tokenizer file, by number."""
    raw = path.read_bytes()
    tokens, position = [], 4
    while position < len(raw):
        score, length = struct.unpack_from("<fi", raw, position)
        position += 8
        tokens.append((raw[position : position + length].decode(), score))
        position += length
    return tokens


def convert(path: Path, model_max_length: int | None = None) -> PreTrainedTokenizerFast:
    """The tokenizer of a llama2.c file as a fast tokenizer that starts every text with `<s>`."""
    tokens = read(path)
    pieces = [*SPECIAL, *(piece for piece, _ in tokens[3:FIRST_PIECE])]
    pieces += [piece.replace(" ", SPACE) for piece, _ in tokens[FIRST_PIECE:]]
    number = {piece: i for i, piece in enumerate(pieces)}
    merges = []
    for i in sorted(range(FIRST_PIECE, len(pieces)), key=lambda i: -tokens[i][1]):
        halves = [(pieces[i][:cut], pieces[i][cut:]) for cut in range(1, len(pieces[i]))]
        merges += [(left, right) for left, right in halves if left in number and right in number]
    tokenizer = Tokenizer(BPE(number, merges, unk_token=SPECIAL[0], fuse_unk=True, byte_fallback=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend(SPACE), normalizers.Replace(" ", SPACE)])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    limit = {} if model_max_length is None else {"model_max_length": model_max_length}
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
        clean_up_tokenization_spaces=False,
        **limit,
    )


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    convert(Path(sys.argv[1])).save_pretrained(sys.argv[2])
