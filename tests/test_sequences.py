"""How token sequences are joined, cut and chosen: against lists of Python."""

import itertools

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from decaf_lora.data import Ragged
from decaf_lora.tasks.sequences import packed

DOCUMENTS = st.lists(st.tuples(st.integers(0, 2), st.lists(st.integers(0, 99), max_size=9)), min_size=1, max_size=8)
"""(label, tokens) of each document."""


def ragged(sequences):
    return Ragged(np.array(list(itertools.chain(*sequences)), np.int32), np.cumsum([0, *map(len, sequences)]))


@given(DOCUMENTS, st.integers(1, 5))
def test_packing_joins_each_label_and_cuts_it(documents, length):
    labels, texts = zip(*documents, strict=True)
    expected = []
    for label in sorted(set(labels)):
        joined = [token for own, text in documents if own == label for token in text]
        expected += [(label, joined[i : i + length]) for i in range(0, len(joined), length)]
    expected = [(label, block) for label, block in expected if len(block) > 1]

    blocks, of_block = packed(ragged(texts), np.array(labels), length)

    assert list(zip(of_block.tolist(), (block.tolist() for block in blocks.tokens), strict=True)) == expected
    assert (blocks.starts == 1).all()
    assert (len(blocks.starts), blocks.tokens.values.dtype, of_block.dtype) == (len(expected), np.int32, np.int64)


def test_one_label_is_packed_without_a_copy():
    tokens = ragged([[1, 2, 3], [], [4, 5, 6]])
    blocks, _ = packed(tokens, np.zeros(3, np.int64), 4)
    assert [block.tolist() for block in blocks.tokens] == [[1, 2, 3, 4], [5, 6]]
    assert np.shares_memory(blocks.tokens.values, tokens.values)


@given(DOCUMENTS, st.data())
def test_sequences_are_taken_in_any_order(documents, data):
    texts = [text for _, text in documents]
    chosen = data.draw(st.lists(st.integers(0, len(texts) - 1), max_size=9))
    taken = ragged(texts).take(np.array(chosen, np.int64))
    assert [sequence.tolist() for sequence in taken] == [texts[i] for i in chosen]
    everything = ragged(texts)
    assert everything.take(np.arange(len(texts))) is everything
