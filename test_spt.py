"""Tests of spt.py and synthetic_tasks.py, one fact each: the tasks first, then spt.py from its top.

    python -m pytest -q
"""
import copy
import functools
import inspect
import io
import json
import math
import os
import re
import signal
import subprocess
import sys
import time
from collections import Counter
from dataclasses import fields, replace
from itertools import product
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn import functional as F
from torch.testing import assert_close

import spt
import synthetic_tasks as tasks

torch.set_num_threads(1)    # tiny products only wait for a second thread
ROOT = Path(spt.__file__).parent

# A run that takes a fraction of a second. No value is the default.
SIZES = dict(n_train=64, n_test=32, seq_len=9, vocab_size=5, pretrain_steps=6, finetune_steps=4)
SMALL = spt.Config(**SIZES)
LABELS = torch.arange(32) % 2


@pytest.fixture(autouse=True)
def the_same_random_numbers_whichever_tests_ran_before():
    torch.manual_seed(0)


def small_model(**arguments):
    """A Transformer for 9 tokens of 5 symbols; token 5 is the mask."""
    return spt.Transformer(vocab_size=5, seq_len=9, **arguments)


def random_tokens(n=32, seq_len=9):
    return torch.randint(5, (n, seq_len))


def small_data(**changes):
    """The tensors of a SMALL run: train tokens and labels, test tokens and labels."""
    _, tensors = spt.load_data(replace(SMALL, **changes))
    return tensors


def assert_same_bits(model, other):
    assert_close(model.state_dict(), other.state_dict(), rtol=0, atol=0)


def readme():
    return (ROOT / "README.md").read_text(encoding="utf-8")


# --- The laws of the tasks ---------------------------------------------------------------------
# The rules once more, in the words of the docstrings: the symbols among which the rule of a class
# chooses token t of the sequence x. All have 4 tokens of 4 symbols.
def proximity_rule(x, t, label):
    if t == 0:
        return [0, 1, 2, 3]
    if label == 1:
        return [(x[t - 1] + 1) % 4]
    return [(x[t - 1] - 1) % 4]


def texture_rule(x, t, label):
    # Pixels 0 and 1 are the upper row, 2 and 3 the lower one.
    if label == 0 and t in (1, 3):
        return [x[t - 1]]
    if label == 1 and t in (2, 3):
        return [x[t - 2]]
    return [0, 1, 2, 3]


def bag_rule(x, t, label):
    if label == 1:
        return [2, 3]
    return [0, 1]


RULES = {"proximity": proximity_rule, "texture": texture_rule, "bag": bag_rule}


def probability(name, x, label):
    """P(x | label) at signal 0.45, one token at a time."""
    p = 1.0
    for t, token in enumerate(x):
        choices = RULES[name](x, t, label)
        by_rule = 1 / len(choices) if token in choices else 0
        p *= 0.45 * by_rule + 0.55 / 4
    return p


def draw(name, n):
    generate = getattr(tasks, name)
    return generate(n=n, seq_len=4, vocab_size=4, signal=0.45, seed=3)


def test_every_task_but_text_has_a_law():
    assert set(RULES) == set(tasks.TASKS) - {"text"}


@pytest.mark.parametrize("label", [0, 1])
@pytest.mark.parametrize("name", RULES)
def test_sequences_follow_the_law_of_their_class(name, label):
    tokens, labels = draw(name, 40_000)
    seen = Counter(map(tuple, tokens[labels == label].tolist()))
    chi_square = 0
    for x in product(range(4), repeat=4):
        expected = 20_000 * probability(name, x, label)
        chi_square += (seen[x] - expected) ** 2 / expected
    # 256 sequences: 255 degrees of freedom, and 5 standard deviations on either side.
    assert abs(chi_square - 255) < 5 * math.sqrt(2 * 255)


@pytest.mark.parametrize("name", RULES)
def test_the_best_possible_guess_is_the_likelier_class(name):
    tokens, labels = draw(name, 1000)
    right = 0
    for x, label in zip(tokens.tolist(), labels.tolist()):
        own = probability(name, x, label)
        other = probability(name, x, 1 - label)
        if math.isclose(own, other):
            right += 0.5
        elif own > other:
            right += 1
    best = tasks.best_possible_accuracy(name, tokens, labels, 4)
    assert best == pytest.approx(right / 1000)


def test_reversal_swaps_the_classes_of_proximity():
    tokens, labels = draw("proximity", 2000)
    right = tasks.best_possible_accuracy("proximity", tokens, labels, 4)
    reversed_right = tasks.best_possible_accuracy("proximity", tokens[:, ::-1], labels, 4)
    assert right > 0.6
    assert reversed_right == pytest.approx(1 - right)


# --- Train and test parts of every task --------------------------------------------------------
COUNTING = {"proximity": 0.5, "text": 0.5, "texture": 0.5, "bag": 0.89}


def test_every_task_has_a_score_by_counting():
    assert set(COUNTING) == set(tasks.TASKS)


@pytest.mark.parametrize("name", COUNTING)
def test_counting_helps_in_the_bag_alone(name):
    data = tasks.make_task(name, n_train=4000, n_test=4000, seq_len=16, vocab_size=8, signal=0.3)
    assert tasks.count_baseline(*data) == pytest.approx(COUNTING[name], abs=0.05)


# Class 0 saw four 0 and no 1, class 1 one of each; everything counts once more than seen.
#   0 1:  2/3 x 5/6 x 1/6 = 0.093 in class 0,  1/3 x 1/2 x 1/2 = 0.083 in class 1
#   1 1:  2/3 x 1/6 x 1/6 = 0.019 in class 0,  1/3 x 1/2 x 1/2 = 0.083 in class 1
#   2 1:  2/3 x 1/7 x 1/7 = 0.014 in class 0,  1/3 x 1/5 x 2/5 = 0.027 in class 1; 2 is new
@pytest.mark.parametrize("sequence, label", [([0, 1], 0), ([1, 1], 1), ([2, 1], 1)])
def test_counting_is_naive_bayes_with_one_count_more(sequence, label):
    tokens = np.array([[0, 0], [0, 0], [0, 1]])
    labels = np.array([0, 0, 1])
    right = tasks.count_baseline(tokens, labels, np.array([sequence]), np.array([label]))
    assert right == 1


@pytest.fixture
def book(tmp_path):
    """A file of 5000 random letters; the first 4000 are the training part."""
    letters = np.random.default_rng(0).choice(list("abcdefgh"), size=5000)
    path = tmp_path / "book.txt"
    path.write_text("".join(letters))
    return path


def small_task(name, book, seed=0):
    return tasks.make_task(name, n_train=30, n_test=30, seq_len=16, vocab_size=8, signal=1,
                           path=book, seed=seed)


@pytest.mark.parametrize("name", tasks.TASKS)
def test_half_of_the_sequences_are_of_either_class(name, book):
    _, labels, _, test_labels = small_task(name, book)
    assert labels.sum() == 15
    assert test_labels.sum() == 15


@pytest.mark.parametrize("name", tasks.TASKS)
def test_the_seed_decides_the_data(name, book):
    data = small_task(name, book)
    again = small_task(name, book)
    other = small_task(name, book, seed=1)
    for i in range(4):
        assert (data[i] == again[i]).all()
        assert (data[i] != other[i]).any()


@pytest.mark.parametrize("name", tasks.TASKS)
def test_the_test_part_is_not_the_training_part(name, book):
    tokens, labels, test_tokens, test_labels = small_task(name, book)
    assert (tokens != test_tokens).any()
    assert (labels != test_labels).any()


def test_signal_1_is_for_both_parts(book):
    tokens, labels, test_tokens, test_labels = small_task("bag", book)
    assert (tokens // 4 == labels[:, None]).all()
    assert (test_tokens // 4 == test_labels[:, None]).all()


# --- text --------------------------------------------------------------------------------------
def windows_of(path):
    """All windows of 20 characters: 8 symbols of their own, and one for the rest."""
    return tasks.text(n_train=999, n_test=999, seq_len=20, vocab_size=9, path=path)


def read_back(tokens, labels, alphabet):
    """The windows as sorted strings, those with label 0 turned round again."""
    windows = []
    for row, label in zip(tokens, labels):
        window = "".join(alphabet[token] for token in row)
        if label == 0:
            window = window[::-1]
        windows.append(window)
    return sorted(windows)


def test_text_is_cut_into_windows_and_its_last_fifth_is_the_test_part(book):
    tokens, labels, test_tokens, test_labels = windows_of(book)
    letters = book.read_text()
    alphabet = sorted("abcdefgh", key=letters[:4000].count, reverse=True)
    windows = [letters[i:i + 20] for i in range(0, 5000, 20)]
    assert read_back(tokens, labels, alphabet) == sorted(windows[:200])
    assert read_back(test_tokens, test_labels, alphabet) == sorted(windows[200:])


def test_a_test_window_that_repeats_the_training_part_is_left_out(book):
    letters = book.read_text()
    # The last of the 50 test windows now stands in the training part, too, across two windows.
    book.write_text(letters[:4980] + letters[7:27])
    _, _, test_tokens, test_labels = windows_of(book)
    alphabet = sorted("abcdefgh", key=letters[:4000].count, reverse=True)
    windows = [letters[i:i + 20] for i in range(4000, 5000, 20)]
    assert read_back(test_tokens, test_labels, alphabet) == sorted(windows[:-1])


@pytest.mark.parametrize("window, unseen", [
    pytest.param("abcd-----", [], id="4 at the start"),
    pytest.param("---bcde--", [], id="4 inside"),
    pytest.param("-----efgh", [], id="4 at the end"),
    pytest.param("abc-d-fgh", [8], id="3 at most"),
])
def test_four_characters_in_a_row_are_half_a_window_of_nine(window, unseen):
    assert tasks.unseen_windows("abcdefgh" + window, cut=8, starts=[8], seq_len=9) == unseen


def test_frequent_characters_of_the_training_part_are_symbols_and_the_others_share_one():
    symbols = tasks.text_symbols("bbbaac" + "cccd", cut=6, vocab_size=3)
    assert symbols.tolist() == [0, 0, 0, 1, 1, 2, 2, 2, 2, 2]


def test_white_space_is_folded_and_letters_are_lower_case(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("  One\n\n\tTWO  é\n", encoding="utf-8")
    assert tasks.read_text(path) == "one two é"


def test_text_with_fewer_than_ten_test_windows_is_refused(book):
    book.write_text(book.read_text()[:994])
    with pytest.raises(ValueError, match="book.txt: 9 windows of 20 .* needs 10"):
        windows_of(book)


# --- from_file ---------------------------------------------------------------------------------
# All 32 sequences of 5 bits. The first bit is the label.
BITS = np.array(list(product([0, 1], repeat=5)))
FIRST = BITS[:, 0]
FOUR_ARRAYS = dict(tokens=BITS, labels=FIRST, test_tokens=BITS[9:], test_labels=FIRST[9:])


def load(folder, seed=0, **arrays):
    """What from_file makes of these arrays."""
    np.savez(folder / "mine.npz", **arrays)
    return tasks.from_file(folder / "mine.npz", seed)


def test_a_test_part_in_the_file_is_used_as_it_is(tmp_path):
    x, y, x_test, y_test = load(tmp_path, **FOUR_ARRAYS)
    assert (x == BITS).all()
    assert (y == FIRST).all()
    assert (x_test == BITS[9:]).all()
    assert (y_test == FIRST[9:]).all()


def test_without_a_test_part_a_random_fifth_is_the_test_part_and_no_row_is_lost(tmp_path):
    x, y, x_test, y_test = load(tmp_path, tokens=BITS, labels=FIRST)
    assert len(x_test) == 6
    assert sorted(x.tolist() + x_test.tolist()) == BITS.tolist()
    assert (y == x[:, 0]).all()
    assert (y_test == x_test[:, 0]).all()


def test_the_seed_decides_which_fifth(tmp_path):
    x, *_ = load(tmp_path, seed=1, tokens=BITS, labels=FIRST)
    again, *_ = load(tmp_path, seed=1, tokens=BITS, labels=FIRST)
    other, *_ = load(tmp_path, seed=2, tokens=BITS, labels=FIRST)
    assert (x == again).all()
    assert (x != other).any()


@pytest.mark.parametrize("kind", ["uint8", "bool", "U1", "S1"])
def test_tokens_may_be_of_any_discrete_type(kind, tmp_path):
    arrays = dict(FOUR_ARRAYS, tokens=BITS.astype(kind), test_tokens=BITS[9:].astype(kind))
    x, _, x_test, _ = load(tmp_path, **arrays)
    assert (x == BITS).all()
    assert (x_test == BITS[9:]).all()


def test_tokens_may_be_negative_and_huge_and_become_symbols_in_sorted_order(tmp_path):
    tokens = [[2**40, -5, 0], [12_000_000, 0, 0]]
    x, _, x_test, _ = load(tmp_path, tokens=tokens, labels=[0, 1],
                           test_tokens=tokens, test_labels=[0, 1])
    assert x.tolist() == [[3, 0, 1], [2, 1, 1]]
    assert (x_test == x).all()


def test_a_token_unseen_in_training_becomes_the_mask_symbol(tmp_path):
    _, _, x_test, _ = load(tmp_path, tokens=[[2, 4, 6], [6, 4, 2]], labels=[0, 1],
                           test_tokens=[[5, 4, 7], [-1, 2, 6]], test_labels=[0, 1])
    assert x_test.tolist() == [[3, 1, 3], [3, 0, 2]]


@pytest.mark.parametrize("labels, classes", [
    pytest.param([7, -3, 2**40], [1, 0, 2], id="integers with gaps"),
    pytest.param([True, False, True], [1, 0, 1], id="booleans"),
    pytest.param(["dog", "cat", "eel"], [1, 0, 2], id="names"),
    pytest.param([b"dog", b"cat", b"eel"], [1, 0, 2], id="bytes"),
    pytest.param([2.0, -1.0, 5.0], [1, 0, 2], id="whole floats"),
    pytest.param([[4], [3], [5]], [1, 0, 2], id="a column"),
])
def test_labels_become_classes_in_sorted_order(labels, classes, tmp_path):
    _, y, _, y_test = load(tmp_path, tokens=BITS[:3], labels=labels,
                           test_tokens=BITS[:3], test_labels=labels)
    assert y.tolist() == classes
    assert y_test.tolist() == classes


RAGGED = np.array([[0, 1, 0], [1, 0]], dtype=object)


@pytest.mark.parametrize("name, array, message", [
    ("tokens", BITS * 1.0, "tokens is float64 .*np.digitize"),
    ("tokens", BITS * 1j, "tokens is complex128 .*needs integers"),
    ("tokens", FIRST, r"tokens is int64 \(32,\); needs \(n, T\)"),
    ("tokens", BITS[:, :2], r"tokens is int64 \(32, 2\); .*3 tokens or more"),
    ("tokens", BITS.astype(str), "tokens is <U21 but test_tokens int64; needs one type"),
    ("tokens", BITS * 0, r"one symbol, \[0\]; needs two"),
    ("tokens", RAGGED, "tokens is an array of objects.*one length"),
    ("test_tokens", BITS[9:, 1:], "5 tokens, test sequences 4; all need one length"),
    ("labels", FIRST[1:], r"labels is int64 \(31,\); needs \(32,\)"),
    ("labels", FIRST + 0.5, "labels is float64 .*whole floats"),
    ("labels", FIRST * 0, r"one class, \[0\]; needs two"),
    ("test_labels", FIRST[9:] + 1, "labels of the test part has classes"),
])
def test_an_array_that_cannot_be_used_is_refused(name, array, message, tmp_path):
    with pytest.raises(ValueError, match=f"mine.npz: .*{message}"):
        load(tmp_path, **(FOUR_ARRAYS | {name: array}))


@pytest.mark.parametrize("name", FOUR_ARRAYS)
def test_a_missing_array_is_named(name, tmp_path):
    arrays = dict(FOUR_ARRAYS)
    del arrays[name]
    with pytest.raises(ValueError, match=f"mine.npz: has no {name}; needs {name}"):
        load(tmp_path, **arrays)


class Payload:
    """Unpickled, it makes a file: what must not happen."""

    def __reduce__(self):
        return Path.touch, (Path("executed"),)


def test_nothing_in_a_file_is_executed(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match="labels is an array of objects"):
        load(tmp_path, tokens=BITS, labels=[Payload()] * 32)
    assert not Path("executed").exists()


def test_a_single_array_is_refused(tmp_path):
    np.save(tmp_path / "mine.npy", BITS)
    with pytest.raises(ValueError, match="mine.npy: a single array.*np.savez"):
        tasks.from_file(tmp_path / "mine.npy")


@pytest.mark.parametrize("damage, message", [
    pytest.param(lambda content: content[:-100], "mine.npz: .*damaged", id="truncated"),
    # The checksum of the array no longer agrees.
    pytest.param(lambda content: content.replace(b"(32, 5)", b"(32, 4)"),
                 "mine.npz: tokens cannot be read", id="one array"),
])
def test_a_damaged_file_is_refused(damage, message, tmp_path):
    path = tmp_path / "mine.npz"
    np.savez(path, **FOUR_ARRAYS)
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(ValueError, match=message):
        tasks.from_file(path)


# --- Positions ---------------------------------------------------------------------------------
def test_sinusoidal_positions_follow_their_formula():
    positions = spt.sinusoidal_positions(7, 4)
    for t in range(7):
        sines = [math.sin(t), math.cos(t), math.sin(t / 100), math.cos(t / 100)]
        assert positions[t].tolist() == pytest.approx(sines, abs=1e-6)


def test_sinusoidal_positions_of_neighbours_are_more_alike_than_of_others():
    positions = spt.sinusoidal_positions(64, 32)
    alike = positions @ positions.T
    for offset in range(2, 64):
        assert alike.diagonal(1).min() > alike.diagonal(offset).max() + 1


def test_rotary_positions_turn_complex_numbers():
    x = torch.randn(12, 8)
    frequency = 10000.0 ** (-torch.arange(4) / 4)
    turns = torch.exp(1j * torch.arange(12)[:, None] * frequency)
    as_complex = torch.view_as_complex(x.view(12, 4, 2))
    turned = torch.view_as_real(as_complex * turns)
    assert_close(spt.rotate(x), turned.flatten(1))


def test_shuffled_positions_are_the_sinusoidal_rows_in_another_order():
    shuffled = small_model(positions="shuffled").positions
    rows = spt.sinusoidal_positions(9, 32)
    assert not torch.equal(shuffled, rows)
    assert sorted(shuffled.tolist()) == sorted(rows.tolist())


def test_learned_positions_are_weights_and_the_others_are_not():
    for positions in spt.POSITIONS:
        names = dict(small_model(positions=positions).named_parameters())
        assert ("positions" in names) == (positions == "learned")


# --- Attention and the model -------------------------------------------------------------------
@torch.no_grad()
def attention_by_loops(attention, x):
    """Output (T, C) and weights (H, T, T) of one sequence, by loops over heads and pairs."""
    T = len(x)
    out = torch.zeros_like(x)
    weights = torch.zeros(2, T, T).to(x)
    for h in range(2):
        own = slice(h * 16, h * 16 + 16)    # the channels of this head
        q = x @ attention.query.weight[own].T
        k = x @ attention.key.weight[own].T
        v = x @ attention.value.weight[own].T
        if attention.rotary:
            q = spt.rotate(q)
            k = spt.rotate(k)
        for i in range(T):
            scores = [math.exp(q[i] @ k[j] / 4) for j in range(T)]
            for j in range(T):
                weights[h, i, j] = scores[j] / sum(scores)
                out[i, own] += weights[h, i, j] * v[j]
    return out @ attention.out.weight.T, weights


@pytest.mark.parametrize("rotary", [False, True])
def test_attention_equals_loops(rotary):
    attention = spt.Attention(32, 2, rotary).double()
    x = torch.randn(1, 9, 32).double()
    out, weights = attention_by_loops(attention, x[0])
    assert_close(attention(x, return_weights=True), (out[None], weights[None]))


@pytest.mark.parametrize("rotary", [False, True])
@pytest.mark.parametrize("biased", [False, True])
def test_the_formula_and_the_kernel_of_pytorch_agree_gradients_included(rotary, biased):
    attention = spt.Attention(32, 2, rotary).double()
    if biased:
        attention.score_bias = torch.randn(9, 9).double()
    x = torch.randn(2, 9, 32).double()
    by_kernel = attention(x)
    by_formula, _ = attention(x, return_weights=True)
    assert_close(by_formula, by_kernel)
    weights = list(attention.parameters())
    kernel_gradients = torch.autograd.grad(by_kernel.square().sum(), weights)
    formula_gradients = torch.autograd.grad(by_formula.square().sum(), weights)
    assert_close(formula_gradients, kernel_gradients)


def test_a_width_that_heads_do_not_divide_is_refused():
    with pytest.raises(ValueError, match="d_model 32.*n_heads 3"):
        spt.Attention(32, 3)


def test_unknown_positions_are_refused():
    with pytest.raises(ValueError, match="nowhere"):
        small_model(positions="nowhere")


def test_the_model_is_a_pre_norm_encoder_with_a_last_norm_and_two_heads():
    model = small_model(n_layers=2)
    tokens = random_tokens()
    x = model.token_embedding(tokens) + spt.sinusoidal_positions(9, 32)
    for block in model.blocks:
        x = x + block.attention(F.layer_norm(x, (32,)))
        hidden = block.mlp[0](F.layer_norm(x, (32,))).clamp(min=0)
        x = x + block.mlp[2](hidden)
    x = F.layer_norm(x, (32,))
    assert_close(model.reconstruct(tokens), model.reconstruction_head(x))
    assert_close(model.classify(tokens), model.class_head(x.mean(dim=1)))


def test_every_argument_of_the_model_shapes_it():
    model = spt.Transformer(vocab_size=7, seq_len=11, n_classes=3, positions="learned", n_layers=3,
                            d_model=24, n_heads=4, d_ff=20)
    assert model.token_embedding.weight.shape == (8, 24)
    assert model.positions.shape == (11, 24)
    assert len(model.blocks) == 3
    assert model.blocks[2].attention.n_heads == 4
    assert model.blocks[2].mlp[0].weight.shape == (20, 24)
    assert model.reconstruct(random_tokens(2, 11)).shape == (2, 11, 7)
    assert model.classify(random_tokens(2, 11)).shape == (2, 3)


@pytest.mark.parametrize("positions", spt.POSITIONS)
def test_only_without_positions_a_sequence_and_its_reverse_look_alike(positions):
    model = small_model(positions=positions).double()
    tokens = random_tokens()
    difference = model.classify(tokens) - model.classify(tokens.flip(1))
    alike = difference.abs().max().item() < 1e-12
    assert alike == (positions == "none")


def test_with_distances_alone_a_sequence_and_its_reverse_look_alike():
    model = small_model(positions="none").double()
    tokens = random_tokens()
    without_distances = model.classify(tokens)
    position = torch.arange(9)
    # |i - j| is the same after reversal: a distance has no direction.
    distance = (position[:, None] - position).abs()
    model.blocks[0].attention.score_bias = -distance.double()
    with_distances = model.classify(tokens)
    assert not torch.allclose(with_distances, without_distances)
    assert_close(with_distances, model.classify(tokens.flip(1)))


def test_a_new_model_knows_nothing():
    x, y, _, _ = small_data(n_train=500)
    model = small_model()
    corrupted, is_masked = spt.mask_tokens(x, 5, 0.3)
    by_masks = spt.masked_loss(model, x, corrupted, is_masked).item()
    by_labels = spt.label_loss(model, x, y).item()
    assert by_masks == pytest.approx(math.log(5), abs=0.3)
    assert by_labels == pytest.approx(math.log(2), abs=0.1)


# --- Masking and the two losses ----------------------------------------------------------------
def test_masked_tokens_become_the_mask_symbol_and_the_others_stay():
    tokens = random_tokens(400, 100)
    corrupted, is_masked = spt.mask_tokens(tokens, 5, 0.3)
    assert (corrupted[is_masked] == 5).all()
    assert torch.equal(corrupted[~is_masked], tokens[~is_masked])


def test_the_number_of_masked_tokens_is_binomial():
    _, is_masked = spt.mask_tokens(random_tokens(400, 100), 5, 0.3)
    per_sequence = is_masked.sum(dim=1).double()
    assert per_sequence.mean().item() == pytest.approx(30, abs=5 * math.sqrt(21 / 400))
    assert per_sequence.var().item() == pytest.approx(21, rel=0.3)


def test_the_same_generator_masks_the_same_tokens():
    tokens = random_tokens()
    _, first = spt.mask_tokens(tokens, 5, 0.3, torch.Generator().manual_seed(3))
    _, again = spt.mask_tokens(tokens, 5, 0.3, torch.Generator().manual_seed(3))
    _, other = spt.mask_tokens(tokens, 5, 0.3, torch.Generator().manual_seed(4))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_an_unknown_token_which_is_the_mask_symbol_is_never_a_target():
    tokens = random_tokens()
    tokens[:, 2] = 5
    _, is_masked = spt.mask_tokens(tokens, 5, 0.9)
    assert not is_masked[:, 2].any()
    assert is_masked[:, 3].any()


def test_masked_loss_is_the_mean_over_masked_tokens_alone():
    model = small_model()
    tokens = random_tokens()
    corrupted, is_masked = spt.mask_tokens(tokens, 5, 0.4)
    log_p = model.reconstruct(corrupted).log_softmax(dim=-1)
    losses = []
    for b, t in is_masked.nonzero().tolist():
        losses.append(-log_p[b, t, tokens[b, t]].item())
    loss = spt.masked_loss(model, tokens, corrupted, is_masked)
    assert loss.item() == pytest.approx(np.mean(losses))


def test_masked_loss_is_0_where_nothing_is_masked():
    tokens = random_tokens()
    nothing = torch.zeros(tokens.shape, dtype=torch.bool)
    assert spt.masked_loss(small_model(), tokens, tokens, nothing).item() == 0


# --- The training loop -------------------------------------------------------------------------
# Progress is (step + 1) / 40. The warm-up ends at 0.1, and then the cosine makes half a turn.
@pytest.mark.parametrize("step, rate", [
    (0, 0.0025),
    (1, 0.005),
    (3, 0.01),
    pytest.param(6, 0.001 + 0.009 * (1 + math.cos(math.radians(15))) / 2, id="at 15 degrees"),
    (21, 0.0055),
    (39, 0.001),
])
def test_the_rate_warms_up_and_then_follows_a_cosine_to_a_tenth(step, rate):
    assert spt.learning_rate(step, 40, 0.01) == pytest.approx(rate)


def test_training_equals_a_plain_loop_of_adamw_over_random_batches():
    model = small_model()
    by_hand = copy.deepcopy(model)
    tokens = random_tokens()
    spt.finetune(model, tokens, LABELS, steps=20, lr=0.02, batch_size=7, seed=3)
    optimizer = torch.optim.AdamW(by_hand.parameters())
    generator = torch.Generator().manual_seed(3)
    for step in range(20):
        optimizer.param_groups[0]["lr"] = spt.learning_rate(step, 20, 0.02)
        rows = torch.randint(32, (7,), generator=generator)
        loss = F.cross_entropy(by_hand.classify(tokens[rows]), LABELS[rows])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert_same_bits(model, by_hand)


def test_pretraining_trains_on_the_masked_loss_of_batches_that_are_masked_by_its_ratio():
    model = small_model()
    by_hand = copy.deepcopy(model)
    tokens = random_tokens()

    def batch_loss(rows, generator):
        corrupted, is_masked = spt.mask_tokens(tokens[rows], 5, 0.4, generator)
        return spt.masked_loss(by_hand, tokens[rows], corrupted, is_masked)

    spt.train(by_hand, batch_loss, 32, steps=5, lr=0.02, batch_size=7, seed=3)
    spt.pretrain(model, tokens, mask_id=5, mask_ratio=0.4, steps=5, lr=0.02, batch_size=7, seed=3)
    assert_same_bits(model, by_hand)


def test_a_batch_of_labels_can_be_learned_by_heart():
    losses = spt.finetune(small_model(), random_tokens(4), LABELS[:4], steps=150, progress=False)
    assert np.mean(losses[-20:]) < 0.1


def test_a_batch_of_tokens_can_be_learned_by_heart():
    losses = spt.pretrain(small_model(), random_tokens(2), mask_id=5, mask_ratio=0.1, steps=300,
                          progress=False)
    assert np.mean(losses[-20:]) < 0.1


def test_training_goes_on_in_training_mode_after_a_measurement():
    # It matters to an encoder with dropout.
    model = small_model()
    tokens = random_tokens()
    modes = []
    model.register_forward_pre_hook(lambda module, inputs: modes.append(module.training))

    def measure(step):
        spt.accuracy(model, tokens, LABELS)

    spt.finetune(model, tokens, LABELS, steps=2, on_step=measure)
    assert modes == [True, False, True, False]


def test_accuracy_counts_the_last_and_smaller_batch_too():
    model = small_model()
    tokens = random_tokens(33)
    predicted = model.classify(tokens).argmax(dim=-1)
    assert spt.accuracy(model, tokens, predicted) == 1
    predicted[-1] = 1 - predicted[-1]
    assert spt.accuracy(model, tokens, predicted) == 32 / 33


# --- Where attention starts --------------------------------------------------------------------
def test_near_start_has_key_equal_to_query_three_times_as_large_in_every_block():
    model = small_model(n_layers=2)
    before = copy.deepcopy(model)
    spt.start_attention(model, "near")
    for block, block_before in zip(model.blocks, before.blocks):
        three_times = 3 * block_before.attention.query.weight
        assert_close(block.attention.query.weight, three_times)
        assert_close(block.attention.key.weight, three_times)


@pytest.mark.parametrize("start, changed", [
    ("random", []), ("near", ["query", "key"]), ("uniform", ["query"])])
def test_a_start_changes_no_other_weights(start, changed):
    model = small_model()
    before = copy.deepcopy(model).state_dict()
    spt.start_attention(model, start)
    for name, weight in model.state_dict().items():
        expected = any(f".{part}." in name for part in changed)
        assert (not torch.equal(weight, before[name])) == expected, name


def test_near_start_makes_scores_symmetric():
    model = small_model().double()
    spt.start_attention(model, "near")
    attention = model.blocks[0].attention
    x = torch.randn(2, 9, 32).double()
    q = attention.split_heads(attention.query(x))
    k = attention.split_heads(attention.key(x))
    scores = q @ k.mT
    assert_close(scores, scores.mT)


def test_near_start_looks_near_and_the_random_start_does_not():
    model = spt.Transformer(vocab_size=8, seq_len=64)
    tokens = torch.randint(8, (32, 64))
    assert spt.on_neighbours(spt.look(model, tokens)) < 0.05    # uniform: 2 / 64 = 0.03
    spt.start_attention(model, "near")
    assert spt.on_neighbours(spt.look(model, tokens)) > 0.06


def test_uniform_start_attends_to_all_positions_alike():
    model = small_model(n_layers=2)
    spt.start_attention(model, "uniform")
    looks = spt.look(model, random_tokens())
    assert_close(looks, torch.full((2, 2, 9), 1 / 9))


def test_an_unknown_start_is_refused():
    with pytest.raises(ValueError, match="sideways"):
        spt.start_attention(small_model(), "sideways")


@pytest.mark.parametrize("which, parts", [
    ("qk", ["query", "key"]),
    ("rest", ["token_embedding", "value", "out", "mlp", "reconstruction_head"])])
def test_a_transfer_copies_these_parts_and_no_others(which, parts):
    source = small_model()
    target = small_model()
    expected = copy.deepcopy(target).state_dict()
    for name, weight in source.state_dict().items():
        if any(part in name.split(".") for part in parts):
            expected[name] = weight
    spt.transfer(source, target, which)
    assert_close(target.state_dict(), expected, rtol=0, atol=0)


def test_an_unknown_transfer_is_refused():
    with pytest.raises(ValueError, match="half"):
        spt.transfer(small_model(), small_model(), "half")


# --- Where attention looks ---------------------------------------------------------------------
def test_by_offset_equals_a_loop():
    x = torch.randn(3, 5, 5)
    summed = spt.by_offset(x)
    for offset in range(5):
        pairs = [x[:, i, (i + offset) % 5] for i in range(5)]
        assert_close(summed[:, offset], sum(pairs))


def test_look_is_the_mean_attention_of_each_head_by_offset():
    model = small_model(n_layers=2)
    tokens = random_tokens()
    second = model.blocks[1]
    x = model.blocks[0](model.embed(tokens))
    _, weights = second.attention(second.norm1(x), return_weights=True)
    expected = spt.by_offset(weights.mean(dim=0)) / 9
    assert_close(spt.look(model, tokens)[1], expected.detach())


def test_on_neighbours_is_both_sides_of_the_head_that_has_most():
    looks = torch.zeros(2, 2, 9)
    looks[0, 1, 1] = 0.5
    looks[0, 1, -1] = 0.25
    looks[1, 0, 1] = 0.6
    assert spt.on_neighbours(looks) == 0.75


def test_a_pull_agrees_with_finite_differences():
    model = small_model(n_layers=2).double()
    tokens = random_tokens()

    def loss_with(offset, size):
        """The loss after the scores of all pairs at this offset have been raised by `size`."""
        extra = size * torch.eye(9).double().roll(offset, dims=1)
        for block in model.blocks:
            block.attention.score_bias = extra
        return spt.label_loss(model, tokens, LABELS).item()

    slopes = []
    for offset in range(9):
        slopes.append((loss_with(offset, 1e-5) - loss_with(offset, -1e-5)) / 2e-5)
    pull = -np.array(slopes)
    pull = pull - pull[1:].mean()    # offset 0 is left out of the mean
    found = spt.attention_pull(model, spt.label_loss, tokens, LABELS)
    assert found.numpy() == pytest.approx(pull, rel=1e-3, abs=1e-8)
    assert abs(pull[1]) > 1e-6


def test_a_pull_leaves_the_model_as_it_was():
    model = small_model()
    spt.attention_pull(model, spt.label_loss, random_tokens(), LABELS)
    assert model.blocks[0].attention.score_bias is None
    assert all(weight.grad is None for weight in model.parameters())


# --- One run -----------------------------------------------------------------------------------
def flags_of(settings):
    """Settings of a run as flags of the command line."""
    flags = []
    for name, value in settings.items():
        flags += [spt.flag_of(name), str(value)]
    return flags


QUICK = flags_of(SIZES)


@pytest.fixture
def empty_folder(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)


def saved():
    """What is in the file m.pt."""
    return torch.load("m.pt", weights_only=True)


def records():
    """The results in the file r.json."""
    return [json.loads(line) for line in Path("r.json").read_text("utf-8").splitlines()]


# No value is the default.
EVERY_SETTING = dict(
    seed=3, n_train=60, n_test=30, seq_len=11, vocab_size=6, signal=0.8, positions="rotary",
    n_layers=2, d_model=16, n_heads=1, d_ff=20, start="near", pretrain_steps=7, finetune_steps=40,
    batch_size=7, pretrain_lr=0.02, lr=0.03, mask_ratio=0.4)


def test_every_flag_acts_as_in_a_run_written_by_hand(empty_folder):
    x, y, x_test, y_test = map(torch.from_numpy, tasks.make_task(
        "proximity", n_train=60, n_test=30, seq_len=11, vocab_size=6, signal=0.8, seed=3))
    torch.manual_seed(3)
    model = spt.Transformer(6, 11, 2, positions="rotary", n_layers=2, d_model=16, n_heads=1,
                            d_ff=20)
    spt.start_attention(model, "near")
    spt.pretrain(model, x, mask_id=6, mask_ratio=0.4, steps=7, lr=0.02, batch_size=7, seed=3)
    spt.finetune(model, x, y, steps=40, lr=0.03, batch_size=7, seed=3)

    spt.main(["--spt", "--json", "r.json", "--save", "m.pt", *flags_of(EVERY_SETTING)])
    assert_close(saved()["weights"], model.state_dict(), rtol=0, atol=0)
    assert records()[0]["train"] == spt.accuracy(model, x, y)
    assert records()[0]["test"] == spt.accuracy(model, x_test, y_test)
    assert records()[0]["train"] != records()[0]["test"]    # neither can stand for the other


def test_labels_alone_get_the_steps_of_both_phases(empty_folder):
    x, y, _, _ = small_data()
    model = spt.new_model(SMALL, 2, seed=0)
    spt.finetune(model, x, y, steps=6 + 4, lr=0.003)
    spt.main([*QUICK, "--lr", "0.003", "--save", "m.pt"])
    assert_close(saved()["weights"], model.state_dict(), rtol=0, atol=0)


def config_of(flags, monkeypatch):
    """The Config to which these flags lead."""
    configs = []
    monkeypatch.setattr(spt, "single", lambda config, *paths: configs.append(config))
    assert spt.main(flags) == 0
    return configs[0]


# The other fields of Config have a test each, below.
OTHER_FIELDS = {"task", "spt", "freeze_qk", "transfer", "device", "text", "data"}


def test_every_field_of_config_is_tested_where_it_acts_with_another_value_than_its_default():
    assert {field.name for field in fields(spt.Config)} == set(EVERY_SETTING) | OTHER_FIELDS
    for name, value in EVERY_SETTING.items():
        assert value != getattr(spt.Config(), name), name


def test_the_task_decides_the_sequences(monkeypatch):
    config = config_of(["--task", "texture", "--seq-len", "16"], monkeypatch)
    _, (x, *_) = spt.load_data(config)
    expected, *_ = tasks.make_task("texture", n_train=2000, n_test=1000, seq_len=16, vocab_size=8,
                                   signal=0.6)
    assert (x.numpy() == expected).all()


def test_the_text_decides_the_sequences(monkeypatch, book):
    config = config_of(["--text", str(book)], monkeypatch)
    _, (x, *_) = spt.load_data(config)
    expected, *_ = tasks.text(n_train=10_000, n_test=1000, seq_len=64, vocab_size=41, path=book)
    assert (x.numpy() == expected).all()


def test_own_data_decide_the_sizes_and_have_no_best_possible_accuracy(empty_folder):
    tokens = np.random.default_rng(0).integers(5, size=(40, 12)) * 1000
    np.savez("bag.npz", tokens=tokens, labels=np.arange(40) % 3)    # the name of a task
    spt.main("--data bag.npz --pretrain-steps 1 --finetune-steps 1 --json r.json "
             "--save m.pt".split())
    assert saved()["arguments"]["seq_len"] == 12
    assert saved()["arguments"]["vocab_size"] == 5
    assert saved()["arguments"]["n_classes"] == 3
    assert records()[0]["best_possible"] is None


@pytest.mark.parametrize("flags", [[], ["--spt"]])
def test_frozen_maps_keep_their_bits_through_all_phases_and_the_others_move(flags, empty_folder):
    spt.main([*QUICK, *flags, "--freeze-qk", "--n-layers", "2", "--save", "m.pt"])
    start = spt.new_model(replace(SMALL, n_layers=2), 2, seed=0).state_dict()
    for name, weight in saved()["weights"].items():
        if ".query." in name or ".key." in name or name == "positions":
            assert torch.equal(weight, start[name]), name
        elif "--spt" in flags or "reconstruction_head" not in name:
            assert not torch.equal(weight, start[name]), name


@pytest.mark.parametrize("which", ["qk", "rest"])
def test_a_transfer_is_to_a_new_model_and_this_is_fine_tuned(which, empty_folder):
    x, y, _, _ = small_data()
    pretrained = spt.new_model(SMALL, 2, seed=0)
    spt.pretrain(pretrained, x, mask_id=5, steps=6)
    model = spt.new_model(SMALL, 2, seed=10**6)
    spt.transfer(pretrained, model, which)
    spt.finetune(model, x, y, steps=4)
    spt.main([*QUICK, "--spt", "--transfer", which, "--save", "m.pt"])
    assert_close(saved()["weights"], model.state_dict(), rtol=0, atol=0)


def test_the_device_decides_where_data_and_weights_live(monkeypatch):
    # "meta" is a device that every machine has. Config would refuse it.
    monkeypatch.setattr(spt.Config, "__post_init__", lambda config: None)
    config = replace(SMALL, device="meta")
    _, tensors = spt.load_data(config)
    model = spt.new_model(config, 2, seed=0)
    assert {tensor.device.type for tensor in tensors} == {"meta"}
    assert {weight.device.type for weight in model.parameters()} == {"meta"}
    assert model.positions.device.type == "meta"


@pytest.mark.parametrize("spt_arm", [False, True])
def test_no_test_sequence_is_seen_in_training(spt_arm, monkeypatch):
    config = replace(SMALL, spt=spt_arm)
    _, model = spt.run(config)
    original = tasks.make_task

    def poisoned(name, **settings):
        x, y, x_test, y_test = original(name, **settings)
        return x, y, 4 - x_test, 1 - y_test

    monkeypatch.setattr(tasks, "make_task", poisoned)
    _, other = spt.run(config)
    assert_same_bits(other, model)


def test_the_yardsticks_of_a_run_are_those_of_its_data():
    parts = tasks.make_task("proximity", n_train=64, n_test=32, seq_len=9, vocab_size=5)
    parts[3][:20] = 0
    yardsticks = spt.yardsticks(SMALL, *map(torch.from_numpy, parts))
    assert yardsticks["chance"] == max(parts[3].mean(), 1 - parts[3].mean())
    assert yardsticks["counting"] == tasks.count_baseline(*parts)
    assert yardsticks["best_possible"] == tasks.best_possible_accuracy("proximity", *parts[2:], 5)
    assert yardsticks["frequency_loss"] == spt.frequency_loss(torch.from_numpy(parts[0]))


def test_frequency_loss_is_the_entropy_of_the_tokens():
    tokens = torch.tensor([[0, 0, 0, 0], [1, 1, 2, 3]])
    entropy = 0.5 * math.log(2) + 0.25 * math.log(4) + 2 * 0.125 * math.log(8)
    assert spt.frequency_loss(tokens) == pytest.approx(entropy)


def test_masked_loss_on_test_is_the_mean_over_all_masked_tokens_of_all_batches():
    model = small_model()
    tokens = random_tokens(40)
    config = replace(SMALL, seed=3, mask_ratio=0.05)
    # Batches are of 32 and 8 sequences; the masks are drawn one after the other.
    generator = torch.Generator().manual_seed(3)
    corrupted, is_masked = spt.mask_tokens(tokens, 5, 0.05, generator)
    loss = spt.masked_loss(model, tokens, corrupted, is_masked)
    assert spt.masked_loss_on_test(model, tokens, config) == pytest.approx(loss.item())


def test_a_run_with_masks_notes_their_loss_at_first_at_last_and_on_test():
    result, _ = spt.run(replace(SMALL, spt=True, pretrain_steps=50))
    x, _, x_test, _ = small_data()
    model = spt.new_model(SMALL, 2, seed=0)
    losses = spt.pretrain(model, x, mask_id=5, steps=50)
    assert result["masked_loss"] == [np.mean(losses[:20]), np.mean(losses[30:])]
    assert result["test_masked_loss"] == spt.masked_loss_on_test(model, x_test, SMALL)


def test_a_config_refuses_an_unknown_word_in_library_use_too():
    with pytest.raises(ValueError, match="--start sideways"):
        spt.Config(start="sideways")


def test_a_task_has_its_recipe_and_changes_overrule_it():
    assert spt.recipe(task="text").vocab_size == 41
    assert spt.recipe(text="a.txt").task == "text"
    assert spt.recipe(data="a.npz").task == "data"
    assert spt.recipe(task="bag").signal == 0.2
    assert spt.recipe(task="bag", signal=0.4).signal == 0.4


# --- The gap itself ----------------------------------------------------------------------------
@pytest.fixture(scope="module")
def headline():
    """The result of `python spt.py --task proximity --spt`."""
    result, _ = spt.run(spt.Config(spt=True))
    return result


def test_spt_is_near_perfect(headline):
    assert headline["test"] >= 0.99
    assert headline["train"] >= 0.99


def test_after_masks_heads_look_near_and_mostly_at_their_own_position(headline):
    looks = torch.tensor(headline["looks"]["pretraining"])
    assert looks.argmax(dim=-1).tolist() == [[0, 0]]
    assert spt.on_neighbours(looks) > 5 * 2 / 64    # five times uniform attention


def test_at_the_start_attention_is_nearly_uniform(headline):
    looks = torch.tensor(headline["looks"]["start"])
    assert looks.max() < 2 / 64


def test_masked_loss_falls_from_knowing_nothing_to_knowing_neighbours(headline):
    first, last = headline["masked_loss"]
    assert first == pytest.approx(math.log(8), abs=0.1)
    assert last < 1.75
    assert headline["test_masked_loss"] < 1.75


@pytest.mark.parametrize("changes, low, high", [
    pytest.param(dict(), 0, 0.6, id="labels alone fail"),
    pytest.param(dict(start="near", lr=0.01), 0.95, 1, id="from the near start they succeed"),
    pytest.param(dict(spt=True, freeze_qk=True), 0, 0.6, id="SPT fails with frozen maps"),
])
def test_the_gap_is_where_attention_starts(changes, low, high):
    result, _ = spt.run(spt.Config(**changes))
    assert low <= result["test"] <= high


def test_the_headline_result_stands_in_readme(headline):
    rows = re.findall(r"^SPT, seed 0 +(\S+) +(\S+) +(\S+)", readme(), re.M)
    assert len(rows) == 1
    train, test, looks = map(float, rows[0])
    assert headline["train"] == pytest.approx(train, abs=0.01)
    assert headline["test"] == pytest.approx(test, abs=0.01)
    # Machines round differently, and attention shows it most.
    assert headline["on_neighbours"] == pytest.approx(looks, abs=0.15)


# --- The comparison ----------------------------------------------------------------------------
@functools.cache
def any_result():
    """Any result; tests change what they look at."""
    result, _ = spt.run(replace(SMALL, spt=True))
    return result


class FakePool:
    """In the place of workers: the test accuracy of a config is what `rule` says."""

    def __init__(self, rule):
        self.rule = rule

    def __enter__(self):
        return self

    def __exit__(self, *error):
        return False

    def imap(self, function, configs):
        for config in configs:
            yield dict(any_result(), config=vars(config), test=self.rule(config))


@pytest.fixture
def workers(monkeypatch):
    """Replaces the workers by a rule, (config) -> test accuracy."""
    def install(rule):
        monkeypatch.setattr(spt, "start_workers", lambda jobs: FakePool(rule))
    return install


def test_compare_prints_mean_and_spread_of_seven_rows_over_the_seeds(workers, capsys):
    # Seeds 4 and 5 add 0.04 and 0.05.
    workers(lambda c: 0.2 * (c.start == "near") + 0.5 * c.spt + 10 * c.lr + c.seed / 100)
    spt.main(["--compare", "--seed", "4", "--seeds", "2"])
    table = capsys.readouterr().out.partition(spt.HEADER)[2]
    rows = []
    for line in table.splitlines()[1:-1]:
        name, train, test, looks = re.split(" {2,}", line)
        rows.append((name, test))
    assert rows == [
        ("labels, lr 0.002", "0.065 ± 0.007"),
        ("labels, lr 0.005", "0.095 ± 0.007"),
        ("labels, lr 0.01", "0.145 ± 0.007"),
        ("labels, near start, lr 0.002", "0.265 ± 0.007"),
        ("labels, near start, lr 0.005", "0.295 ± 0.007"),
        ("labels, near start, lr 0.01", "0.345 ± 0.007"),
        ("SPT, lr 0.005", "0.595 ± 0.007"),
    ]


def test_compare_prints_80_columns_and_ends_with_the_masked_loss(workers, capsys):
    workers(lambda config: 0.5)
    spt.main(["--compare", "--seeds", "2"])
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 80
    assert lines[-1].startswith(f"  masked loss on test {any_result()['test_masked_loss']:.3f}")


def test_compare_passes_the_flags_of_a_run_on_to_every_row(workers):
    configs = []
    workers(lambda config: configs.append(config) or 0.5)
    spt.main(["--compare", "--seeds", "1", "--n-layers", "2", "--positions", "rotary"])
    assert {(config.n_layers, config.positions) for config in configs} == {(2, "rotary")}


def test_compare_writes_a_line_of_json_for_every_run(workers, empty_folder):
    workers(lambda config: config.lr)
    spt.main(["--compare", "--seeds", "2", "--json", "r.json"])
    assert [record["config"]["seed"] for record in records()] == [0, 1] * 7
    assert records()[0]["row"] == "labels, lr 0.002"
    assert records()[0]["test"] == 0.002
    assert records()[-1]["row"] == "SPT, lr 0.005"


def test_a_row_of_the_comparison_is_shown_as_soon_as_it_is_done(workers, monkeypatch):
    out = io.StringIO()
    shown = []
    monkeypatch.setattr(out, "flush", lambda: shown.append(out.getvalue()))
    monkeypatch.setattr(sys, "stdout", out)
    workers(lambda config: 0.5)
    spt.main(["--compare", "--seeds", "1"])
    assert shown[0].splitlines()[-1].startswith("labels, lr 0.002")
    assert shown[1].splitlines()[-1].startswith("labels, lr 0.005")


@pytest.mark.parametrize("flags, jobs", [(["--jobs", "3"], 3), ([], os.cpu_count())])
def test_jobs_is_the_number_of_workers(flags, jobs, monkeypatch):
    asked = []

    def start_workers(jobs):
        asked.append(jobs)
        return FakePool(lambda config: 0.5)

    monkeypatch.setattr(spt, "start_workers", start_workers)
    spt.main(["--compare", "--seeds", "1", *flags])
    assert asked == [jobs]


def test_workers_give_the_same_bits_as_this_process():
    configs = [replace(SMALL, spt=True), SMALL]
    alone = [spt.result_of(config) for config in configs]
    with spt.start_workers(2) as pool:
        assert list(pool.imap(spt.result_of, configs)) == alone


# --- The claims --------------------------------------------------------------------------------
ROWS = []    # (title, row) of all claims
for title, claim in spt.CLAIMS.items():
    for row in claim:
        ROWS.append((title, row))


def accuracies(broken=None):
    """A test accuracy for every config of `--reproduce --seeds 2`.

    All rows lie in the middle of their interval, but for the broken one. That lies 0.01 outside,
    and if it runs at three rates only the second does.
    """
    found = {}
    for _, row in ROWS:
        plan = spt.plan_of(row, 0, 2, "cpu")
        for config in plan:
            assert config not in found    # no two rows train the same
            found[config] = (row.low + row.high) / 2
        if row is broken:
            if len(row.rates) == 3:
                plan = plan[2:4]    # both seeds of the second rate
            for config in plan:
                found[config] = row.low - 0.01 if row.low > 0 else row.high + 0.01
    return found


@pytest.fixture
def reproduce(workers, monkeypatch):
    """Runs --reproduce on such accuracies and returns its exit status."""
    monkeypatch.setattr(spt, "theory", lambda seed, device, json_path: True)

    def run(found, *flags):
        workers(lambda config: found[config])
        return spt.main(["--reproduce", "--seeds", "2", *flags])

    return run


def test_reproduce_holds_if_all_rows_hold(reproduce, capsys):
    assert reproduce(accuracies()) == 0
    assert "FAILS" not in capsys.readouterr().out


@pytest.mark.parametrize("title, row", ROWS)
def test_reproduce_fails_if_one_row_fails_and_names_its_claim(title, row, reproduce, capsys):
    assert reproduce(accuracies(broken=row)) == 1
    summary = capsys.readouterr().out.partition("Summary")[2]
    assert summary.count("FAILS: ") == 1
    assert f"{title}\n  FAILS: " in summary


def test_reproduce_fails_if_the_theory_fails(reproduce, monkeypatch):
    monkeypatch.setattr(spt, "theory", lambda seed, device, json_path: False)
    assert reproduce(accuracies()) == 1


def test_reproduce_writes_a_line_of_json_for_every_run(reproduce, empty_folder):
    reproduce(accuracies(), "--json", "r.json")
    written = [(record["claim"], record["row"]) for record in records()]
    expected = []
    for title, row in ROWS:
        expected += [(title, row.name)] * len(row.rates) * 2
    assert written == expected


@pytest.mark.parametrize("row, accuracies, expected", [
    (spt.spt_works(0.95), [1.0, 1.0, 0.82], "SPT 0.94 (at least 0.95)"),
    (spt.labels_fail(0.70), [0.6, 0.6, 0.93], "labels 0.71 (at most 0.70)"),
])
def test_a_row_judges_the_mean_over_seeds_and_says_what_is_asked(row, accuracies, expected):
    configs = spt.over_seeds(spt.Config(), 3)
    rule = dict(zip(configs, accuracies)).get
    holds, text = spt.judge(row, list(FakePool(rule).imap(None, configs)), seeds=3)
    assert not holds
    assert text == expected


def test_a_row_runs_on_its_seeds_and_device_with_its_changes():
    row = spt.Row("labels", dict(finetune_steps=5600, lr=0.003), low=0.80)
    config = spt.Config(finetune_steps=5600, lr=0.003, device="cuda")
    plan = spt.plan_of(row, seed=7, seeds=2, device="cuda")
    assert plan == [replace(config, seed=7), replace(config, seed=8)]


def test_labels_that_must_fail_run_at_three_rates_with_the_recipe_of_their_task():
    plan = spt.plan_of(spt.labels_fail(0.7, task="text"), seed=7, seeds=1, device="cpu")
    config = spt.recipe(task="text", seed=7)
    assert plan == [replace(config, lr=rate) for rate in (0.002, 0.005, 0.01)]


def test_the_two_arms_of_a_claim_differ_in_self_pretraining_alone():
    for rows in spt.CLAIMS.values():
        if [row.name for row in rows] == ["labels", "SPT"]:
            labels, ours = rows
            assert ours.changes == dict(labels.changes, spt=True)


# --- Theory ------------------------------------------------------------------------------------
class OneLayer:
    """Proximity data, masked, and random weights: what `one_layer_losses` takes."""

    def __init__(self):
        x, y = tasks.proximity(n=60, seq_len=6, vocab_size=5)
        self.tokens = torch.from_numpy(x)
        self.labels = torch.from_numpy(y)
        self.corrupted, self.is_masked = spt.mask_tokens(self.tokens, 5, 0.3)
        self.values = torch.randn(6, 4).double()
        self.to_class = torch.randn(4, 2).double()
        self.to_symbol = torch.randn(4, 5).double()

    def losses(self, scores, phi=torch.tanh):
        return spt.one_layer_losses(
            scores, self.tokens, self.labels, self.corrupted, self.is_masked, self.values,
            self.to_class, self.to_symbol, phi)

    def gradients_at_uniform_attention(self, phi=torch.tanh):
        """The gradient of the label loss and of the masked loss by the scores, (T, T) each."""
        scores = torch.zeros(6, 6).double().requires_grad_()
        label, masked = self.losses(scores, phi)
        by_label = torch.autograd.grad(label, scores, retain_graph=True)[0]
        by_masks = torch.autograd.grad(masked, scores)[0]
        return by_label, by_masks


def test_the_label_loss_of_one_layer_equals_a_loop():
    layer = OneLayer()
    scores = torch.randn(6, 6).double()
    loss = 0
    for tokens, label in zip(layer.tokens, layer.labels):
        pooled = 0
        for i in range(6):
            z = scores[i].softmax(0) @ layer.values[tokens]
            pooled += z.tanh() / 6
        loss -= (pooled @ layer.to_class).log_softmax(0)[label] / 60
    assert_close(layer.losses(scores)[0], loss)


def test_the_masked_loss_of_one_layer_equals_a_loop():
    layer = OneLayer()
    scores = torch.randn(6, 6).double()
    losses = []
    for b, i in layer.is_masked.nonzero().tolist():
        z = scores[i].softmax(0) @ layer.values[layer.corrupted[b]]
        log_p = (z.tanh() @ layer.to_symbol).log_softmax(0)
        losses.append(-log_p[layer.tokens[b, i]])
    assert_close(layer.losses(scores)[1], sum(losses) / len(losses))


def test_the_masked_pull_has_the_closed_form_of_the_theory():
    layer = OneLayer()
    by_offset = torch.zeros(6).double()
    for b, i in layer.is_masked.nonzero().tolist():
        v = layer.values[layer.corrupted[b]]
        mean = v.mean(dim=0)
        p = (mean.tanh() @ layer.to_symbol).softmax(0)
        error = F.one_hot(layer.tokens[b, i], 5) - p
        slope = 1 - mean.tanh() ** 2    # the derivative of tanh
        for offset in range(6):
            neighbour = v[(i + offset) % 6]
            by_offset[offset] += error @ layer.to_symbol.T @ (slope * (neighbour - mean)) / 6
    _, by_masks = layer.gradients_at_uniform_attention()
    assert_close(-spt.by_offset(by_masks), by_offset / layer.is_masked.sum())


@pytest.mark.parametrize("phi", [torch.tanh, torch.square, torch.relu])
def test_at_uniform_attention_labels_are_blind_if_all_positions_move_alike(phi):
    by_label, _ = OneLayer().gradients_at_uniform_attention(phi)
    assert spt.by_offset(by_label).abs().max() < 1e-12


@pytest.mark.parametrize("phi, blind", [(torch.clone, True), (torch.tanh, False)])
def test_far_from_uniform_labels_are_blind_if_phi_is_linear_and_only_then(phi, blind):
    layer = OneLayer()
    position = torch.arange(6)
    offset = (position - position[:, None]) % 6
    score_of_offset = 3 * torch.randn(6).double()
    uniform, _ = layer.losses(torch.zeros(6, 6).double(), phi)
    moved, _ = layer.losses(score_of_offset[offset], phi)
    assert ((moved - uniform).abs() < 1e-12) == blind


@pytest.mark.parametrize("which, where, size", [
    pytest.param(0, np.s_[3, 5], -1e-9, id="labels see"),
    pytest.param(1, np.s_[:, 1], 0, id="masks are blind"),
    pytest.param(1, np.s_[:, 8], 5e-3, id="masks see far"),
    pytest.param(2, np.s_[:], 0, id="labels are blind to one position alone"),
])
def test_the_proof_fails_on_other_numbers(which, where, size, monkeypatch):
    pulls = spt.one_layer_pulls(0)
    pulls[which][where] = size
    monkeypatch.setattr(spt, "one_layer_pulls", lambda seed: pulls)
    assert not spt.show_proof(0)


@pytest.fixture
def bag(monkeypatch):
    """Shows part a with made-up measurements. Returns whether it holds, and what was trained."""
    def show(masked_loss=2.068, test_accuracy=0.51, masks=(14.0, 15.0), labels=(0.09, -0.09)):
        configs = []

        def pulls_while_training(config):
            configs.append(config)
            last = masks if config.spt else labels
            return [dict(pull=[0.0, 0.0]), dict(pull=last)], f"model {len(configs)}"

        def masked_loss_on_test(model, tokens, config):
            assert model == "model 1"
            return masked_loss

        def accuracy(model, tokens, labels):
            assert model == "model 2"
            return test_accuracy

        monkeypatch.setattr(spt, "pulls_while_training", pulls_while_training)
        monkeypatch.setattr(spt, "masked_loss_on_test", masked_loss_on_test)
        monkeypatch.setattr(spt, "accuracy", accuracy)
        return spt.show_bag(seed=3, device="cpu"), configs
    return show


def test_the_bag_holds_if_masks_have_a_hint_and_their_pull_grows(bag):
    holds, _ = bag()
    assert holds


@pytest.mark.parametrize("change", [
    pytest.param(dict(masked_loss=2.078), id="masks have no hint"),
    pytest.param(dict(test_accuracy=0.70), id="labels learn"),
    pytest.param(dict(masks=(14.0, 4.0)), id="a pull of masks is small"),
    pytest.param(dict(labels=(0.09, -0.30)), id="a pull of labels grows"),
])
def test_the_bag_fails_if_one_measurement_is_another(bag, change):
    holds, _ = bag(**change)
    assert not holds


def test_the_bag_holds_attention_uniform_for_masks_and_for_labels(bag):
    _, configs = bag()
    uniform = spt.Config(start="uniform", freeze_qk=True, pretrain_steps=800, seed=3)
    assert configs == [replace(uniform, spt=True), uniform]


def test_the_bag_prints_80_columns_at_most(bag, capsys):
    bag()
    assert max(map(len, capsys.readouterr().out.splitlines())) <= 80


@pytest.mark.parametrize("masks, labels, holds", [
    ([14.0, 15.0], [0.09, -0.09], True),
    ([14.0, 4.0], [0.09, -0.09], False),
    ([14.0, 15.0], [0.09, -0.30], False)])
def test_the_pulls_hold_if_both_of_masks_grow_and_none_of_labels(
        masks, labels, holds, monkeypatch):
    def pulls_while_training(config):
        pull = masks if config.spt else labels
        return [dict(step=100, pull=pull, deviation=[0.1, 0.1], on_neighbours=0.03)], None

    monkeypatch.setattr(spt, "pulls_while_training", pulls_while_training)
    assert spt.show_pulls(0, "cpu", None) == holds


# Part c on a small task: 26 steps on masks, or 30 on labels.
SMALL_PULLS = replace(SMALL, n_test=600, pretrain_steps=26)
BOTH_ARMS = pytest.mark.parametrize("config", [
    pytest.param(replace(SMALL_PULLS, spt=True), id="masks"),
    pytest.param(SMALL_PULLS, id="labels")])


def models_by_hand(config):
    """The model at its start, after 25 steps and at the end."""
    _, (x, y, _, _) = spt.load_data(config)
    model = spt.new_model(config, 2, seed=0)
    models = [copy.deepcopy(model)]

    def keep(step):
        if step == 25:
            models.append(copy.deepcopy(model))

    if config.spt:
        spt.pretrain(model, x, mask_id=5, steps=26, on_step=keep)
    else:
        spt.finetune(model, x, y, steps=30, on_step=keep)
    models.append(model)
    return models


@BOTH_ARMS
def test_the_pulls_at_a_step_are_those_of_the_model_after_so_many_steps(config):
    _, (_, _, x_test, y_test) = spt.load_data(config)
    start, after_25, _ = models_by_hand(config)
    found, _ = spt.pulls_while_training(config)
    assert [row["step"] for row in found] == [0, 25]
    for row, model in zip(found, [start, after_25]):
        pull, deviation = spt.neighbour_pulls(model, config, x_test[:512], y_test[:512])
        assert row["pull"] == pull
        assert row["deviation"] == deviation


@BOTH_ARMS
def test_where_heads_look_at_a_step_stands_beside_its_pulls(config):
    _, (_, _, x_test, _) = spt.load_data(config)
    start, after_25, _ = models_by_hand(config)
    found, _ = spt.pulls_while_training(config)
    for row, model in zip(found, [start, after_25]):
        assert row["on_neighbours"] == spt.on_neighbours(spt.look(model, x_test[:64]))


@BOTH_ARMS
def test_the_model_whose_pulls_were_measured_is_returned_as_it_was_trained(config):
    _, _, trained = models_by_hand(config)
    _, model = spt.pulls_while_training(config)
    assert_same_bits(model, trained)


def mean_neighbour_pulls(model, loss, batches):
    pulls = [1000 * spt.attention_pull(model, loss, *batch) for batch in batches]
    mean = torch.stack(pulls).mean(dim=0)
    return pytest.approx([mean[-1].item(), mean[1].item()])


def test_the_pulls_of_labels_are_of_the_label_loss():
    model = small_model()
    _, _, tokens, labels = small_data(n_test=64)
    batches = zip(tokens.split(32), labels.split(32))
    expected = mean_neighbour_pulls(model, spt.label_loss, batches)
    found, _ = spt.neighbour_pulls(model, SMALL, tokens, labels)
    assert found == expected


def test_the_pulls_of_masks_are_of_the_masked_loss_with_the_same_masks_each_time():
    model = small_model()
    _, _, tokens, labels = small_data(n_test=64)
    generator = torch.Generator().manual_seed(4)
    batches = []
    for part in tokens.split(32):
        corrupted, is_masked = spt.mask_tokens(part, 5, 0.4, generator)
        batches.append((part, corrupted, is_masked))
    expected = mean_neighbour_pulls(model, spt.masked_loss, batches)
    config = replace(SMALL, spt=True, seed=4, mask_ratio=0.4)
    first, _ = spt.neighbour_pulls(model, config, tokens, labels)
    again, _ = spt.neighbour_pulls(model, config, tokens, labels)
    assert first == expected
    assert again == expected


def test_neighbour_pulls_are_mean_and_deviation_over_batches_of_32(monkeypatch):
    # Pulls of two batches, by offset; the left neighbour is the last.
    pulls = iter([torch.tensor([0, 1.0, 0, 0, 3.0]), torch.tensor([0, 5.0, 0, 0, 9.0])])
    monkeypatch.setattr(spt, "attention_pull", lambda model, loss, *batch: next(pulls))
    _, _, tokens, labels = small_data(n_test=64)
    means, deviations = spt.neighbour_pulls(None, SMALL, tokens, labels)
    assert means == [6000, 3000]
    assert deviations == pytest.approx([6000 / math.sqrt(2), 4000 / math.sqrt(2)])


@pytest.mark.parametrize("failing", ["show_bag", "show_proof", "show_pulls", None])
def test_theory_fails_if_one_of_its_parts_fails(failing, monkeypatch):
    for part in ("show_bag", "show_proof", "show_pulls"):
        holds = part != failing
        monkeypatch.setattr(spt, part, lambda seed, *others, holds=holds: holds and seed == 4)
    assert spt.main(["--theory", "--seed", "4"]) == (0 if failing is None else 1)


def test_where_attention_is_held_uniform_masks_have_a_hint_and_their_pull_grows():
    config = spt.Config(spt=True, start="uniform", freeze_qk=True, pretrain_steps=800)
    _, (_, _, x_test, _) = spt.load_data(config)
    found, model = spt.pulls_while_training(config)
    assert spt.masked_loss_on_test(model, x_test, config) < math.log(8) - 0.004
    assert found[-1]["step"] == 800
    assert min(found[-1]["pull"]) > 5


def test_theory_end_to_end(empty_folder, monkeypatch, capsys):
    # Part a is the test above, and takes long.
    monkeypatch.setattr(spt, "show_bag", lambda seed, device: True)
    assert spt.main(["--theory", "--json", "r.json"]) == 0
    assert max(map(len, capsys.readouterr().out.splitlines())) <= 80
    for arm in ("masks", "labels"):
        assert [row["step"] for row in records()[0][arm]] == [0, 25, 50, 100, 150, 200, 400]


# --- Bad input ---------------------------------------------------------------------------------
def contents():
    """Every file in the current folder and below, with its bytes."""
    return {path: path.read_bytes() for path in Path().rglob("*") if path.is_file()}


def must_not_happen(*arguments, **settings):
    pytest.fail("training began")


@pytest.fixture
def refused(monkeypatch, empty_folder, capsys):
    """Runs flags that must be refused before anything happens. Returns the error."""
    Path("folder").mkdir()
    Path("latin.txt").write_bytes(b"caf\xe9 " * 1000)
    Path("old.json").write_bytes(b"{}\n")
    Path("busy.pt.part").write_bytes(b"of another run")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(spt, "run_mode", must_not_happen)

    def run(flags):
        before = contents()
        with pytest.raises(SystemExit, match="^2$"):
            spt.main(flags.split())
        printed = capsys.readouterr()
        assert printed.out == ""
        assert "Traceback" not in printed.err
        assert contents() == before
        # Lines before the last one are argparse's usage.
        error = printed.err.splitlines()[-1]
        assert error.startswith("spt.py: error: ")
        return error

    return run


# The last flag and its value are wrong.
BAD_INPUT = [
    "--no-such-flag 3",
    "--task cooking",
    "--seed -1",
    "--seed x",
    "--seed 9999999999",
    "--n-heads 0",
    "--n-heads 3",
    "--lr nan",
    "--lr 0",
    "--signal 1.5",
    "--spt --mask-ratio 0",
    "--seq-len 2",
    "--vocab-size 2",
    "--positions nowhere",
    "--start sideways",
    "--spt --transfer half",
    "--task bag --vocab-size 7",
    "--task texture --seq-len 60",
    "--text none.txt",
    "--text folder",
    "--text latin.txt",
    "--data none.npz",
    "--data latin.txt",
    "--json none/r.json",
    "--json folder",
    "--save none/m.pt",
    "--save folder",
    "--save busy.pt",
    "--json new.json --save new.json",
    "--json ./new.json --save new.json",
    "--text latin.txt --save latin.txt",
    "--text latin.txt --json latin.txt",
    "--device cuda",
    "--compare --reproduce",
    "--compare --theory",
    "--compare --seeds 0",
    "--compare --jobs 0",
    "--json new.json --lr 2",
    "--json old.json --lr 2",
    "--save old.json --lr 2",
]


@pytest.mark.parametrize("flags", BAD_INPUT)
def test_bad_input_is_refused_and_named(flags, refused):
    error = refused(flags)
    flag, value = flags.split()[-2:]
    # The tasks name an argument, such as vocab_size, and not its flag.
    assert flag[2:] in error.replace("_", "-")
    assert value in error


# The first flag cannot go with the others, or without another.
NOT_TOGETHER = [
    "--mask-ratio 0.5",
    "--transfer qk",
    "--pretrain-lr 0.1",
    "--seeds 2",
    "--jobs 2",
    "--task data",
    "--spt --compare",
    "--start near --compare",
    "--transfer qk --compare",
    "--save m.pt --compare",
    "--save m.pt --reproduce",
    "--n-layers 3 --reproduce",
    "--task text --theory",
    "--seeds 2 --theory",
    "--text latin.txt --task bag",
    "--signal 0.5 --task text",
    "--signal 0.5 --text latin.txt",
    "--vocab-size 5 --data own.npz",
    "--seq-len 9 --data own.npz",
    "--n-train 9 --data own.npz",
    "--n-test 9 --data own.npz",
    "--signal 0.5 --data own.npz",
    "--text latin.txt --data own.npz",
    "--task bag --data own.npz",
]


@pytest.mark.parametrize("flags", NOT_TOGETHER)
def test_a_flag_that_would_be_ignored_is_refused(flags, refused):
    first = flags.split()[0]
    assert f"error: {first}: " in refused(flags)


@pytest.mark.parametrize("flags, unwritable", [
    ("--json new.json", "."),
    ("--json old.json", "old.json"),
    ("--json folder/new.json", "folder"),
    ("--save new.pt", "."),
])
def test_a_place_without_write_permission_is_refused(flags, unwritable, refused, monkeypatch):
    # Who runs the tests may be root, who has every permission.
    monkeypatch.setattr(os, "access", lambda path, mode: path != unwritable)
    assert f"{flags}: cannot be written" in refused(flags)


def test_a_gpu_takes_one_job(refused, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert "--jobs 2: must be 1" in refused("--compare --device cuda --jobs 2")


def test_compare_checks_the_random_test_part_of_every_seed(refused, monkeypatch):
    def from_file(path, seed):
        if seed == 2:
            raise ValueError("bad test part")
        return BITS, FIRST, BITS, FIRST

    monkeypatch.setattr(tasks, "from_file", from_file)
    Path("mine.npz").touch()
    assert "bad test part" in refused("--data mine.npz --compare --seeds 3")


# --- Help --------------------------------------------------------------------------------------
def test_help_names_every_flag_and_no_other_and_what_it_means(monkeypatch):
    monkeypatch.setenv("COLUMNS", "1000")    # no sentence is broken over two lines
    text = spt.make_parser().format_help()
    flags = {"--help", "--compare", "--reproduce", "--theory"}
    for names in spt.FLAGS_OF_MODE.values():
        flags.update(map(spt.flag_of, names))
    assert set(re.findall("--[a-z-]+", text)) == flags
    for field in fields(spt.Config):
        meaning = field.metadata["help"]
        if field.type is not bool:
            meaning += f" (default {field.default})"
        assert meaning in text


def test_help_prints_80_columns_and_ends_with_status_0(monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "80")
    with pytest.raises(SystemExit, match="^0$"):
        spt.main(["--help"])
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("usage: spt.py ")
    assert max(map(len, lines)) <= 80


# --- What a run prints and writes --------------------------------------------------------------
def test_heads_are_printed_in_tenths_by_offset_and_then_at_the_neighbours(capsys):
    head = [0.0] * 9
    head[0] = 0.41
    head[1] = 0.12     # the right neighbour
    head[-1] = 0.28    # the left neighbour
    spt.show_heads(dict(config=dict(seq_len=9), looks={"start": [[head]]}))
    line = capsys.readouterr().out.splitlines()[1]
    assert line == "start, layer 1 head 1          ...341... 0.28 0.41 0.12"


def test_a_run_prints_80_columns(capsys):
    spt.main([*QUICK, "--spt", "--start", "uniform", "--n-layers", "2", "--seq-len", "64"])
    assert max(map(len, capsys.readouterr().out.splitlines())) <= 80


def test_printed_accuracies_are_those_of_json(empty_folder, capsys):
    spt.main([*QUICK, "--json", "r.json", "--lr", "0.1"])
    result = records()[0]
    train = f"{result['train']:.3f}"
    test = f"{result['test']:.3f}"
    looks = f"{result['on_neighbours']:.2f}"
    row = capsys.readouterr().out.partition("labels, seed 0")[2]
    assert row.split()[:3] == [train, test, looks]


def test_json_gets_one_line_a_run(empty_folder):
    spt.main([*QUICK, "--json", "r.json"])
    spt.main([*QUICK, "--json", "r.json", "--spt", "--task", "texture"])
    labels, ours = records()
    assert labels["arm"] == "labels"
    assert labels["masked_loss"] is None
    assert labels["config"]["task"] == "proximity"
    assert ours["arm"] == "SPT"
    assert ours["config"]["task"] == "texture"
    assert ours["total_steps"] == labels["total_steps"] == 10


@pytest.mark.parametrize("positions", ["learned", "shuffled"])
def test_a_saved_model_is_the_one_that_was_measured(positions, empty_folder):
    spt.main([*QUICK, "--json", "r.json", "--save", "m.pt", "--n-layers", "2", "--n-heads", "4",
              "--positions", positions])
    model = spt.Transformer(**saved()["arguments"])
    model.load_state_dict(saved()["weights"])
    _, _, x_test, _ = small_data()
    assert spt.look(model, x_test).tolist() == records()[0]["looks"]["labels alone"]


# --- Output that fails -------------------------------------------------------------------------
@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="this system has no /dev/full")
def test_a_full_disk_under_json_is_one_line_after_the_numbers(capsys):
    assert spt.main([*QUICK, "--json", "/dev/full"]) == 2
    printed = capsys.readouterr()
    assert "labels, seed 0" in printed.out
    assert printed.err == "spt.py: error: --json /dev/full: No space left on device\n"


def write_half(path, content):
    """What Path.write_bytes does on a disk that becomes full."""
    with open(path, "wb") as file:
        file.write(content[:10])
    raise OSError(28, "No space left on device")


def test_a_full_disk_under_save_leaves_the_older_file(empty_folder, monkeypatch, capsys):
    Path("m.pt").write_text("older")
    monkeypatch.setattr(Path, "write_bytes", write_half)
    assert spt.main([*QUICK, "--save", "m.pt"]) == 2
    printed = capsys.readouterr()
    assert "labels, seed 0" in printed.out
    assert printed.err == "spt.py: error: --save m.pt: No space left on device\n"
    assert contents() == {Path("m.pt"): b"older"}


def launch(*command, encoding="utf-8"):
    """Python with these arguments, as a process of its own."""
    environment = dict(os.environ, PYTHONIOENCODING=encoding)
    environment.pop("PYTHONUNBUFFERED", None)    # it would hide a flush that is missing
    return subprocess.Popen(
        [sys.executable, *command], cwd=ROOT, env=environment, encoding=encoding,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True)


QUICK_COMPARE = ["spt.py", *QUICK, "--compare", "--seeds", "1", "--jobs", "1"]


def test_a_terminal_without_the_characters_gets_the_numbers():
    process = launch(*QUICK_COMPARE, encoding="ascii")
    out, err = process.communicate()
    assert err == ""
    assert process.returncode == 0
    assert "mean ? standard deviation" in out
    assert "masked loss on test" in out.splitlines()[-1]


@pytest.mark.parametrize("command, n_lines", [
    # Nobody reads: a single run finds out when it prints.
    pytest.param(["spt.py", *QUICK], 0, id="single"),
    # As `| head -1` does. Rows are yet to come.
    pytest.param(QUICK_COMPARE, 1, id="compare"),
])
def test_a_reader_who_leaves_early_causes_no_error(command, n_lines):
    process = launch(*command)
    for _ in range(n_lines):
        process.stdout.readline()
    process.stdout.close()
    assert process.stderr.read() == ""
    process.stderr.close()
    assert process.wait() == 0


# A shell may have this process ignore Ctrl-C, and its children with it.
INTERRUPTIBLE = """
import signal, sys, spt
signal.signal(signal.SIGINT, signal.default_int_handler)
print("ready", flush=True)
sys.exit(spt.main())
"""


@pytest.mark.parametrize("flags, n_lines", [
    pytest.param(["--spt", "--pretrain-steps", "100000"], 1, id="single"),
    pytest.param(["--reproduce", "--jobs", "1"], 3, id="reproduce"),
])
def test_ctrl_c_ends_a_run_within_3_seconds_in_one_line(flags, n_lines):
    process = launch("-u", "-c", INTERRUPTIBLE, *flags)
    for _ in range(n_lines):
        process.stdout.readline()
    time.sleep(1)    # training, or a worker, has now begun
    os.killpg(process.pid, signal.SIGINT)
    try:
        # Workers hold the same pipes: this waits for them, too.
        _, err = process.communicate(timeout=3)
    finally:
        process.kill()
    assert err == "spt.py: interrupted\n"
    assert process.returncode == 130


class NoWorkers:
    """In the place of a multiprocessing context. Its pool is what Ctrl-C does while it starts."""

    @staticmethod
    def Pool(jobs, initializer):
        return signal.getsignal(signal.SIGINT)


def test_workers_ignore_ctrl_c_which_is_for_their_parent_to_answer(monkeypatch):
    monkeypatch.setattr(spt, "get_context", lambda method: NoWorkers)
    assert spt.start_workers(1) == signal.SIG_IGN


# --- Pieces that copy alone, and README --------------------------------------------------------
# The pieces that are pasted together, and a use of them.
PIECES = [
    ("sinusoidal_positions", "sinusoidal_positions(7, 4)"),
    ("rotate", "rotate(torch.ones(3, 4))"),
    ("Attention", "Attention(8, 2)(torch.ones(1, 3, 8), return_weights=True)"),
    ("mask_tokens", "mask_tokens(tokens, 5, 0.3)"),
    ("masked_loss", "masked_loss(model, tokens, tokens, tokens > 0)"),
    ("pretrain train learning_rate mask_tokens masked_loss",
     "pretrain(model, tokens, mask_id=5, steps=2)"),
    ("by_offset", "by_offset(torch.ones(3, 3))"),
    ("start_attention", "start_attention(model, 'near')"),
    ("proximity", "proximity(n=4, seq_len=5, vocab_size=4)"),
]


@pytest.mark.parametrize("names, use", PIECES)
def test_pieces_work_when_their_source_alone_is_pasted(names, use):
    scope = dict(model=small_model(), tokens=random_tokens())
    exec("import math, numpy as np, torch, torch.nn as nn, torch.nn.functional as F", scope)
    exec("from tqdm import tqdm", scope)
    for name in names.split():
        module = tasks if name == "proximity" else spt
        exec(inspect.getsource(getattr(module, name)), scope)
    eval(use, scope)


def code_block(start):
    """The Python block of README that has this text."""
    blocks = re.findall(r"```python\n(.*?)```", readme(), re.S)
    return [block for block in blocks if start in block][0]


def test_the_method_in_readme_computes_the_losses_of_the_file():
    model = small_model()
    tokens = random_tokens()
    scope = dict(torch=torch, F=F, model=model, tokens=tokens, labels=LABELS, mask_ratio=0.3,
                 mask_id=5)
    exec(code_block("masked_loss ="), scope)
    assert 0 < scope["is_masked"].float().mean() < 0.6
    by_masks = spt.masked_loss(model, tokens, scope["corrupted"], scope["is_masked"])
    assert_close(scope["masked_loss"], by_masks)
    assert_close(scope["label_loss"], spt.label_loss(model, tokens, LABELS))


def test_readme_names_every_claim_and_bound():
    for title, row in ROWS:
        lines = [line for line in readme().splitlines() if line.startswith(f"| {title} ")]
        assert len(lines) == 1, title
        bound = f"at least {row.low:.2f}" if row.low > 0 else f"at most {row.high:.2f}"
        assert re.search(rf"{row.name} [\d.]+ \({bound}\)", lines[0]), (title, row.name)


def test_the_encoder_of_readme_learns_with_self_pretraining(capsys):
    exec(code_block("TransformerEncoder("), {})
    printed = capsys.readouterr().out.split()
    assert float(printed[-1]) >= 0.9
