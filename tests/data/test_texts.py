"""Strings in one Arrow array."""

import pickle

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastpie import FastpieError
from fastpie.data import Texts
from fastpie.data.hashing import hash64, mixed


def test_it_behaves_as_a_list_of_strings():
    words = ["b", "", "a\0", "ä", "b"]
    texts = Texts(words)
    assert list(texts) == words
    assert len(texts) == 5
    assert (texts[1], texts[-1], texts[np.int64(2)]) == ("", "b", "a\0")
    assert texts[1:4] == words[1:4]
    assert texts[::-2] == words[::-2]
    assert "ä" in texts
    assert "c" not in texts
    assert 3 not in texts
    assert texts.index("ä") == 3
    assert texts == words
    assert texts != [*words, ""]
    assert texts != Texts(words[:4])
    assert pickle.loads(pickle.dumps(texts)) == texts
    with pytest.raises(IndexError):
        texts[5]


def test_an_arrow_array_of_one_chunk_is_not_copied():
    array = pa.array(["x", "yy"], pa.large_string())
    texts = Texts(pa.chunked_array([array]))
    assert texts.array.buffers()[2].address == array.buffers()[2].address
    assert Texts(pa.chunked_array([["x"], ["yy"]])) == ["x", "yy"]


@pytest.mark.parametrize("bad", [["a", None], [1], ["\ud800"]])
def test_what_is_no_text_is_refused(bad):
    with pytest.raises(FastpieError, match="Expected strings"):
        Texts(bad)


@given(st.lists(st.text(st.characters(exclude_categories=["Cs"]))), st.integers(0, 3))
def test_equal_strings_have_equal_hashes_wherever_they_lie(words, cut):
    whole = hash64(pa.chunked_array([pa.array(words, pa.large_string())]))
    parts = [pa.array(words[:cut], pa.large_string()), pa.array(words, pa.large_string())[cut:]]
    assert (hash64(pa.chunked_array(parts)) == whole).all()
    assert len(set(whole.tolist())) == len(set(words))


def test_long_strings_and_many_have_hashes_of_their_own():
    # Longer than a block of the hash, blocks that end within and between strings, a last byte apart.
    words = ["x" * 3_000_000, "x" * 2_999_999 + "y", *(f"patient{i:07d}" for i in range(200_000))]
    hashes = hash64(pa.chunked_array([pa.array(words, pa.large_string())]))
    assert len(np.unique(hashes)) == len(words)
    again = hash64(pa.chunked_array([pa.array(words[::-1], pa.large_string())]))
    assert (again[::-1] == hashes).all()


def test_hashes_are_the_same_for_ever():
    # Splits that were made with one version have to come out of the next: the definition again.
    def twin(word, seed):
        hashed = sum((b + 1) * 0x9E3779B97F4A7C15**i for i, b in enumerate(word.encode())) % 2**64
        hashed = finalised(hashed)
        return finalised(hashed ^ finalised(seed)) if seed else finalised(hashed)

    def finalised(x):  # SplitMix64
        x = (x + 0x9E3779B97F4A7C15) % 2**64
        x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) % 2**64
        x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) % 2**64
        return x ^ (x >> 31)

    words = ["", "a", "a\0", "HAM_0000118", "Käse" * 100]
    hashes = hash64(pa.chunked_array([pa.array(words, pa.large_string())]))
    for seed in (0, 1, -1, 2**70 + 1):
        assert mixed(hashes, seed).tolist() == [twin(w, seed % 2**64) for w in words]
