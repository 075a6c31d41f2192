"""Captions to embeddings: pure words in order, and umT5 as Wan uses it."""

import subprocess
import sys

import numpy as np
import pytest
import torch

from data_prep.text import HashText, UMT5Text, open_text


def test_the_same_word_is_the_same_vector_everywhere():
    text = HashText()
    a, b = text.encode(["a red circle in front of a blue square", "Red, moving BLUE"])
    assert a.shape == (9, 64) and a.dtype == np.float32
    assert np.array_equal(a[0], a[6])  # a ... a
    assert np.array_equal(a[1], b[0]) and np.array_equal(a[7], b[2])  # red, blue
    assert len(np.unique(np.concatenate([a, b]), axis=0)) == 9  # different words differ
    assert np.allclose(a.mean(1), 0, atol=1e-5) and np.allclose(a.var(1), 1, atol=1e-5)
    cosines = (a @ a.T / 64)[~np.eye(9, dtype=bool)]
    assert np.sort(cosines)[:-2].max() < 0.6  # all but the repeated "a"


def test_vectors_do_not_depend_on_the_process():
    code = "from data_prep.text import HashText; print(HashText().encode(['circle'])[0].tobytes().hex())"
    other = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=True,
        env={"PYTHONHASHSEED": "7", "PYTHONPATH": ":".join(sys.path)},
    ).stdout.strip()
    assert other == HashText().encode(["circle"])[0].tobytes().hex()


def test_empty_and_long_captions():
    text = HashText()
    empty, spaces, long, comma = text.encode(["", "  ", "word " * 100, "!?"])
    assert empty.shape == (1, 64) and np.array_equal(empty, spaces) and np.array_equal(empty, comma)
    assert long.shape == (text.max_tokens, 64)
    assert not np.array_equal(empty[0], long[0])


def test_unknown_encoders_are_refused():
    for spec in ("t5", "umt5", "umt5:", "default:x"):
        with pytest.raises(ValueError, match="unknown text encoder"):
            open_text(spec)


def test_umt5_returns_the_true_tokens_of_the_padded_pass(umt5_folder):
    """Equal to what Wan computes: a pass padded to 512 with its mask, cut at the caption's length."""
    text = open_text(f"umt5:{umt5_folder}")
    got = text.encode(["a  red &amp; circle ", "", "a " * 600])
    assert [len(embedding) for embedding in got] == [5, 1, 512] and text.dim == 16 and text.max_tokens == 512
    tokens = text.tokenizer(["a red & circle"], padding="max_length", max_length=512, return_tensors="pt")
    with torch.no_grad():
        padded = text.model(tokens.input_ids, tokens.attention_mask).last_hidden_state[0, :5].numpy()
    assert np.allclose(got[0], padded, atol=1e-5) and got[0].dtype == np.float32
    assert UMT5Text(umt5_folder).hash == text.hash


def test_umt5_refuses_a_folder_without_it(tmp_path):
    with pytest.raises(ValueError, match="no umT5 here"):
        open_text(f"umt5:{tmp_path}")
