"""Behaviour of spt.py and synthetic_tasks.py: oracles written another way, properties,
exact symmetries, and the gap itself.

    python -m pytest -q
"""
import copy
import inspect
import itertools
import json
import math
import os
import pickle
import re
import signal
import subprocess
import sys
import time
from collections import Counter
from dataclasses import replace
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn import functional as F

import spt
import synthetic_tasks as tasks

torch.set_num_threads(1)    # tiny products only wait for a second thread
HERE = Path(__file__).parent
SMALL = spt.Config(n_train=64, n_test=32, seq_len=9, vocab_size=5, pretrain_steps=6,
                   finetune_steps=4, batch_size=8)


def tokens_like(config, n=4, seed=0):
    """Random tokens (n, T), the mask symbol among them."""
    return torch.randint(config.vocab_size + 1, (n, config.seq_len),
                         generator=torch.Generator().manual_seed(seed))


# ---------------------------------------------------------------------------------------------
# Tasks
# ---------------------------------------------------------------------------------------------
def likelihood(name, x, label, V, signal, lag=1):
    """P(x | label) by the words of the task's docstring, one token at a time."""
    p, side = 1.0, math.isqrt(len(x))
    for t, symbol in enumerate(x):
        if name == "bag":
            expected = [s for s in range(V) if (s >= V // 2) == (label == 1)]
        elif name == "proximity":
            expected = [(x[t - lag] + (1 if label else -1)) % V] if t >= lag else range(V)
        else:
            row, column = divmod(t, side)
            neighbour = (x[t - side] if row else None) if label else (x[t - 1] if column else None)
            expected = range(V) if neighbour is None else [neighbour]
        p *= signal * (symbol in expected) / len(expected) + (1 - signal) / V
    return p


@pytest.mark.parametrize("name, sizes", [
    ("proximity", dict(seq_len=4, vocab_size=3, lag=1)),
    ("proximity", dict(seq_len=4, vocab_size=4, lag=2)),
    ("texture", dict(seq_len=4, vocab_size=3)), ("bag", dict(seq_len=3, vocab_size=4))])
def test_sequences_follow_the_law_of_their_class(name, sizes):
    n, signal = 40_000, 0.45
    tokens, labels = getattr(tasks, name)(n=n, signal=signal, seed=3, **sizes)
    assert tokens.dtype == labels.dtype == np.int64 and labels.sum() == n // 2
    T, V = sizes["seq_len"], sizes["vocab_size"]
    for label in (0, 1):
        seen = Counter(map(tuple, tokens[labels == label].tolist()))
        laws = {x: likelihood(name, x, label, V, signal, sizes.get("lag", 1))
                for x in itertools.product(range(V), repeat=T)}
        assert sum(laws.values()) == pytest.approx(1)
        chi_square = sum((seen[x] - n / 2 * p) ** 2 / (n / 2 * p) for x, p in laws.items())
        freedom = len(laws) - 1
        assert abs(chi_square - freedom) < 5 * math.sqrt(2 * freedom)


def test_proximity_reversal_swaps_the_classes_and_counts_say_nothing():
    V, signal = 5, 0.5
    for x in itertools.product(range(V), repeat=4):
        assert (likelihood("proximity", x, 1, V, signal)
                == pytest.approx(likelihood("proximity", x[::-1], 0, V, signal)))
    tokens, labels = tasks.proximity(n=20_000, seq_len=16, vocab_size=8, signal=0.5, lag=1, seed=0)
    for label in (0, 1):
        shares = (np.bincount(tokens[labels == label].ravel(), minlength=8)
                  / tokens[labels == label].size)
        assert np.abs(shares - 1 / 8).max() < 0.005
    assert abs(tasks.count_baseline(tokens[::2], labels[::2],
                                    tokens[1::2], labels[1::2]) - 0.5) < 0.02


@pytest.mark.parametrize("name, sizes", [
    ("proximity", dict(seq_len=9, vocab_size=4, lag=1)),
    ("proximity", dict(seq_len=9, vocab_size=3, lag=3)),
    ("texture", dict(seq_len=16, vocab_size=3)), ("bag", dict(seq_len=8, vocab_size=6))])
def test_best_possible_accuracy_is_that_of_the_likelihood_ratio(name, sizes):
    signal, lag = 0.3, sizes.get("lag", 1)
    tokens, labels = getattr(tasks, name)(n=300, signal=signal, seed=1, **sizes)
    right = 0.0
    for x, label in zip(tokens.tolist(), labels):
        up, down = (likelihood(name, x, k, sizes["vocab_size"], signal, lag) for k in (1, 0))
        right += 0.5 if math.isclose(up, down) else float((up > down) == label)
    best = tasks.best_possible_accuracy(name, tokens, labels,
                                        vocab_size=sizes["vocab_size"], lag=lag)
    assert best == pytest.approx(right / 300) and 0.6 < best < 1


def test_text_windows_come_from_their_own_part_half_of_them_backwards(tmp_path):
    letters = np.random.default_rng(0).choice(list("abcdefghijklmnopqrstuvw   "), size=6000)
    words = "".join(letters[:5900]) + "".join(letters[:100])    # the end repeats the beginning
    (tmp_path / "t.txt").write_text(words.upper(), encoding="utf-8")
    x, y, x_test, y_test = tasks.text(n_train=200, n_test=50, seq_len=16, vocab_size=26,
                                      path=tmp_path / "t.txt", seed=0)
    folded = " ".join(words.split())
    cut = len(folded) * 4 // 5
    assert x.shape == (200, 16) and x_test.shape == (50, 16) and y.sum() == 100
    letter = {}    # symbol -> character, read off the windows: every one must fit the text
    by_frequency = [c for c, _ in sorted(Counter(folded[:cut]).items(),
                                         key=lambda item: (-item[1], item[0]))]
    letter.update(enumerate(by_frequency))
    for part, windows, labels in ((folded[:cut], x, y), (folded[cut:], x_test, y_test)):
        places = {part[i:i + 16] for i in range(0, len(part) - 15, 16)}
        for window, label in zip(windows, labels):
            string = "".join(letter[s] for s in window)
            assert (string if label else string[::-1]) in places
    assert not any(folded[:cut].count(p)
                   for p in ("".join(letter[s] for s in w)[::1 if k else -1][i:i + 8]
                             for w, k in zip(x_test, y_test) for i in range(9)))
    default = tasks.make_task("text", n_train=10**6, n_test=10**6, seq_len=64, vocab_size=41)
    assert len(default[0]) > 4000 and default[0].max() == 40 and default[0].min() == 0


def test_training_and_test_parts_are_separate_streams_and_the_seed_is_all_there_is():
    sizes = dict(n_train=50, n_test=50, seq_len=16, vocab_size=8)
    for name in tasks.TASKS:
        first, again, other = (tasks.make_task(name, seed=seed, **sizes) for seed in (0, 0, 1))
        assert all((a == b).all() for a, b in zip(first, again))
        assert (first[0] != first[2]).any() and (first[0] != other[0]).any()


# ---------------------------------------------------------------------------------------------
# Positions and attention
# ---------------------------------------------------------------------------------------------
def test_sinusoidal_positions_by_the_formula():
    table = spt.sinusoidal_positions(20, 8).double()
    for t in range(20):
        for i in range(4):
            assert table[t, 2 * i].item() == pytest.approx(math.sin(t / 10000 ** (2 * i / 8)),
                                                           abs=1e-5)
            assert table[t, 2 * i + 1].item() == pytest.approx(math.cos(t / 10000 ** (2 * i / 8)),
                                                               abs=1e-5)
    products = table @ table.T
    for offset in range(20):
        assert products.diagonal(offset).std(correction=0) < 1e-5


def test_rotary_scores_depend_on_the_offset_alone():
    q, k = torch.randn(2, 8, dtype=torch.float64)
    scores = spt.rotate(q.expand(12, 8)) @ spt.rotate(k.expand(12, 8)).T
    for offset in range(-11, 12):
        assert scores.diagonal(offset).std(correction=0) < 1e-12
    assert scores[0].std() > 1e-3
    for t in range(12):    # pairs as complex numbers, times exp(i t / 10000^(2i/D))
        pairs = (torch.view_as_complex(q.view(4, 2))
                 * torch.exp(1j * t / 10000 ** (torch.arange(4) * 2 / 8).double()))
        assert torch.allclose(spt.rotate(q.expand(12, 8))[t], torch.view_as_real(pairs).flatten())


def test_distance_bias_by_hand():
    inf = math.inf
    left, right, left_half, _ = spt.distance_bias(4, 3).tolist()
    assert left == [[0, -inf, -inf], [-1, 0, -inf], [-2, -1, 0]]
    assert right == [[0, -1, -2], [-inf, 0, -1], [-inf, -inf, 0]]
    assert left_half[2] == [-1, -0.5, 0]
    assert spt.distance_bias(1, 3, one_sided=False).tolist() == [[[0, -1, -2], [-1, 0, -1],
                                                                  [-2, -1, 0]]]


@torch.no_grad()
def attention_by_loops(attention, x):
    """Softmax attention as three nested loops over queries, keys and heads."""
    B, T, C = x.shape
    H, D = attention.n_heads, C // attention.n_heads
    wq, wk = attention.query_key.weight.chunk(2)
    out = torch.zeros(B, T, C, dtype=x.dtype)
    for b in range(B):
        q, k, v = x[b] @ wq.T, x[b] @ wk.T, x[b] @ attention.value.weight.T
        for h in range(H):
            part = slice(h * D, (h + 1) * D)
            qh, kh = ((spt.rotate(q[:, part]), spt.rotate(k[:, part])) if attention.rotary
                      else (q[:, part], k[:, part]))
            for i in range(T):
                bias = torch.zeros(T) if attention.bias is None else attention.bias[h, i]
                e = [math.exp(qh[i] @ kh[j] / math.sqrt(D) + bias[j]) for j in range(T)]
                for j in range(T):
                    out[b, i, part] += e[j] / sum(e) * v[j, part]
    return out @ attention.out.weight.T


@pytest.mark.parametrize("rotary, bias", [(False, None), (True, None),
                                          (False, spt.distance_bias(2, 5).double())])
def test_attention_equals_nested_loops_and_the_fused_kernel_with_gradients(rotary, bias):
    torch.manual_seed(0)
    attention = spt.Attention(8, 2, rotary=rotary, bias=bias).double()
    x, gradients = torch.randn(2, 5, 8, dtype=torch.float64), []
    readable, weights = attention(x, return_weights=True)
    fused = attention(x)
    assert (torch.allclose(readable, fused)
            and torch.allclose(weights.sum(dim=-1), torch.ones(2, 2, 5).double()))
    assert torch.allclose(readable, attention_by_loops(attention, x))
    for y in (readable, fused):
        gradients.append(torch.autograd.grad(y.square().sum(), list(attention.parameters())))
    for a, b in zip(*gradients):
        assert torch.allclose(a, b) and a.abs().max() > 0


@pytest.mark.parametrize("positions, blind", [("none", True), ("symmetric", True),
                                              ("sinusoidal", False), ("learned", False),
                                              ("rotary", False), ("distance", False)])
def test_without_order_a_sequence_and_its_reverse_look_alike(positions, blind):
    config = replace(SMALL, positions=positions, n_layers=2)
    model, tokens = spt.new_model(config).double(), tokens_like(config)
    difference = (model.classify(tokens) - model.classify(tokens.flip(1))).abs().max()
    assert difference < 1e-12 if blind else difference > 1e-6


# ---------------------------------------------------------------------------------------------
# Masking, losses, the loop
# ---------------------------------------------------------------------------------------------
def test_masking_hides_a_binomial_share_and_nothing_else():
    tokens = torch.randint(8, (400, 100))
    corrupted, is_masked = spt.mask_tokens(tokens, 8, 0.3, torch.Generator().manual_seed(0))
    assert (corrupted[is_masked] == 8).all() and (corrupted[~is_masked] == tokens[~is_masked]).all()
    n = is_masked.sum().item()
    assert abs(n - 12_000) < 5 * math.sqrt(40_000 * 0.3 * 0.7)
    assert is_masked.sum(dim=1).double().var().item() == pytest.approx(100 * 0.3 * 0.7, rel=0.3)
    again = spt.mask_tokens(tokens, 8, 0.3, torch.Generator().manual_seed(0))[1]
    assert (again == is_masked).all()


def test_masked_loss_counts_hidden_tokens_only_and_cannot_see_them():
    model = spt.new_model(SMALL)
    tokens = torch.randint(5, (4, 9))
    corrupted, is_masked = spt.mask_tokens(tokens, 5, 0.4)
    log_p = model.reconstruct(corrupted).log_softmax(dim=-1)
    losses = [-log_p[b, t, tokens[b, t]] for b in range(4) for t in range(9) if is_masked[b, t]]
    loss = spt.masked_loss(model, tokens, corrupted, is_masked).item()
    assert loss == pytest.approx(sum(losses).item() / len(losses))
    elsewhere = torch.where(is_masked, tokens, (tokens + 1) % 5)    # others where nothing is hidden
    assert spt.masked_loss(model, elsewhere, corrupted, is_masked).item() == loss
    assert (corrupted[is_masked] == 5).all()    # so the model cannot see the answer
    nothing = torch.zeros_like(is_masked)
    assert spt.masked_loss(model, tokens, tokens, nothing).item() == 0


def test_losses_start_at_the_logarithm_of_the_number_of_choices():
    config = spt.Config()
    x, y, _, _ = (torch.from_numpy(a) for a in spt.load_data(config)[1])
    model = spt.new_model(config)
    corrupted, is_masked = spt.mask_tokens(x[:256], 8, 0.3)
    assert (spt.masked_loss(model, x[:256], corrupted, is_masked).item()
            == pytest.approx(math.log(8), abs=0.3))
    assert (F.cross_entropy(model.classify(x[:256]), y[:256]).item()
            == pytest.approx(math.log(2), abs=0.3))


@pytest.mark.parametrize("phase", ["pretrain", "finetune"])
def test_one_batch_can_be_overfitted(phase):
    config = replace(SMALL, pretrain_steps=300, finetune_steps=200, mask_ratio=0.1)
    tokens, labels = torch.randint(5, (2, 9)), torch.tensor([0, 1])
    losses = spt.pretrain(spt.new_model(config), tokens, config) if phase == "pretrain" else \
        spt.finetune(spt.new_model(config), tokens, labels, config)
    assert losses[0] > 0.3 and np.mean(losses[-20:]) < 0.1


def test_adamw_takes_the_steps_of_torch():
    start = torch.randn(3, 4, dtype=torch.float64)
    ours, theirs = start.clone().requires_grad_(), start.clone().requires_grad_()
    optimizer = spt.AdamW([ours])
    reference = torch.optim.AdamW([theirs], betas=optimizer.betas,
                                  weight_decay=optimizer.weight_decay)
    for step in range(5):
        for group in reference.param_groups:
            group["lr"] = 0.1 / (step + 1)
        ((ours - 1) ** 4).sum().backward()
        reference.zero_grad()
        ((theirs - 1) ** 4).sum().backward()
        optimizer.step(0.1 / (step + 1))
        reference.step()
        assert torch.allclose(ours, theirs, rtol=1e-12) and ours.grad is None
    assert (ours - start).abs().min() > 0.01


def test_the_residual_stream_keeps_its_precision_under_autocast():
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert spt.new_model(SMALL)(torch.zeros(2, 9, dtype=torch.int64)).dtype == torch.float32


def test_the_learning_rate_rises_to_its_peak_and_falls_to_a_tenth(monkeypatch):
    rates = []
    monkeypatch.setattr(spt.AdamW, "step", lambda self, lr: rates.append(lr))
    config = replace(SMALL, finetune_steps=100, lr=0.5)
    spt.finetune(spt.new_model(config), torch.zeros(8, 9, dtype=torch.int64),
                 torch.arange(8) % 2, config)
    assert rates[0] == pytest.approx(0.05) and np.argmax(rates) == 9
    assert rates[9] == pytest.approx(0.5, rel=0.01) and rates[-1] == pytest.approx(0.05)
    assert rates[49] == pytest.approx(0.5 * (1 - 0.9 / 16))


def test_a_loss_that_is_no_number_stops_the_run():
    model = spt.new_model(SMALL)
    with pytest.raises(FloatingPointError, match="pretraining"):
        spt.optimize(model, lambda rows: model.class_head.weight.sum() * math.nan, 8, 3, SMALL,
                     "pretraining")


def test_accuracy_equals_a_loop_over_sequences():
    model = spt.new_model(SMALL)
    x, y = torch.randint(5, (23, 9)), torch.randint(2, (23,))
    right = sum(int(model.classify(a[None])[0].argmax() == b) for a, b in zip(x, y))
    assert spt.accuracy(model, x, y, batch_size=5) == pytest.approx(right / 23)


# ---------------------------------------------------------------------------------------------
# Probes
# ---------------------------------------------------------------------------------------------
def query_key_names(names):
    return {name for name in names if "query_key" in name.split(".")}


@pytest.mark.parametrize("which", ["all", "qk", "not-qk"])
def test_transfer_moves_exactly_what_it_names(which):
    config = replace(SMALL, n_layers=2, positions="learned")
    source, target, fresh = (spt.new_model(replace(config, seed=seed)) for seed in (1, 2, 2))
    with torch.no_grad():
        for weight in source.parameters():
            weight.add_(1.0)
    spt.transfer(source, target, which)
    source, target, fresh = source.state_dict(), target.state_dict(), fresh.state_dict()
    encoder = {name for name in source if not name.startswith("class_head")}
    moved = {"all": encoder, "qk": query_key_names(encoder),
             "not-qk": encoder - query_key_names(encoder)}[which]
    assert len(query_key_names(encoder)) == 2
    for name in source:
        assert torch.equal(target[name], (source if name in moved else fresh)[name]), name


def test_attention_by_offset_equals_a_loop_and_sums_to_one():
    config = replace(SMALL, n_layers=2)
    model, tokens = spt.new_model(config), tokens_like(config)
    measured = spt.attention_by_offset(model, tokens)
    x, T = model.embed(tokens), config.seq_len
    for layer, block in enumerate(model.blocks):
        _, weights = block.attention(block.norm1(x), return_weights=True)
        by_loop = torch.zeros(config.n_heads, 2 * T - 1)
        for h, i, j in itertools.product(range(config.n_heads), range(T), range(T)):
            by_loop[h, j - i + T - 1] += weights[:, h, i, j].mean().item() / T
        assert torch.allclose(measured[layer], by_loop, atol=1e-6)
        x = block(x)
    assert torch.allclose(measured.sum(dim=-1), torch.ones(2, 2))


def test_frozen_query_key_maps_stay_as_they_are():
    config = replace(SMALL, freeze_qk=True)
    model, before = spt.new_model(config), spt.new_model(config).state_dict()
    spt.finetune(model, torch.randint(5, (16, 9)), torch.arange(16) % 2, config)
    kept = {name for name, weight in model.state_dict().items()
            if torch.equal(weight, before[name])}
    assert kept == query_key_names(before) | {"reconstruction_head.weight",
                                              "reconstruction_head.bias"}


# ---------------------------------------------------------------------------------------------
# Whole runs
# ---------------------------------------------------------------------------------------------
def numbers(result):
    """All of a result that must be the same on every repetition."""
    return {key: value for key, value in result.items() if key not in ("seconds", "config")}


def test_same_seed_same_bits_and_pretraining_changes_neither_data_nor_weights():
    first, again, other = (spt.run(replace(SMALL, spt=True, seed=seed)) for seed in (0, 0, 1))
    labels = spt.run(SMALL)
    assert numbers(first) == numbers(again) and numbers(first) != numbers(other)
    assert first["attention_by_offset"]["start"] == labels["attention_by_offset"]["start"]
    assert first["pretrain_steps"] + first["finetune_steps"] == labels["finetune_steps"] == 10
    state = torch.get_rng_state()
    spt.run(SMALL)
    assert torch.equal(state, torch.get_rng_state())


def test_fine_tuning_starts_from_the_pretrained_encoder_with_nothing_masked(monkeypatch):
    handed, seen = {}, set()
    finetune = spt.finetune

    def spy(model, tokens, labels, config, on_step=None):
        handed.update({name: weight.clone() for name, weight in model.state_dict().items()})
        model.token_embedding.register_forward_pre_hook(lambda _, inputs:
                                                        seen.update(inputs[0].unique().tolist()))
        return finetune(model, tokens, labels, config, on_step)
    monkeypatch.setattr(spt, "finetune", spy)
    config = replace(SMALL, spt=True)
    spt.run(config)
    pretrained, fresh = spt.new_model(config), spt.new_model(config).state_dict()
    spt.pretrain(pretrained, torch.from_numpy(spt.load_data(config)[1][0]), config)
    for name, weight in pretrained.state_dict().items():
        assert torch.equal(handed[name],
                           fresh[name] if name.startswith("class_head") else weight), name
    assert not torch.equal(handed["token_embedding.weight"], fresh["token_embedding.weight"])
    assert seen == set(range(config.vocab_size))


@pytest.mark.parametrize("which", ["all", "qk", "not-qk"])
def test_weights_that_move_alone_come_from_another_random_start(which, monkeypatch):
    source = {}

    def no_pretraining(model, tokens, config):
        source.update(copy.deepcopy(model.state_dict()))
        return [0.0]
    monkeypatch.setattr(spt, "pretrain", no_pretraining)
    config = replace(SMALL, spt=True, transfer=which)
    spt.run(config)
    fresh = spt.new_model(config).state_dict()
    for name in ("token_embedding.weight", "blocks.0.attention.query_key.weight"):
        assert torch.equal(source[name], fresh[name]) == (which == "all")


def test_the_gap_end_to_end(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = Path("r.jsonl")
    for flags in (["--spt"], []):
        assert spt.main(["--task", "proximity", "--seed", "5", "--json", str(path), *flags]) == 0
    ours, labels = map(json.loads, path.read_text().splitlines())
    assert ours["test_accuracy"] >= 0.9 and labels["test_accuracy"] <= 0.6
    assert (ours["neighbour_attention"]["fine-tuning"]
            > 5 * labels["neighbour_attention"]["label training"])
    assert ((ours["arm"], labels["arm"]) == ("spt", "labels") and ours["chance"] == 0.5
            and labels["best_possible"] > 0.99)
    assert (ours["pretrain_steps"] + ours["finetune_steps"]
            == labels["pretrain_steps"] + labels["finetune_steps"])
    assert (math.lcm(*(Fraction(reached).denominator for _, reached in labels["curve"])) == 64
            and [step for step, _ in labels["curve"]] == list(range(0, 261, 13)))    # 21 looks
    readme = (HERE / "README.md").read_text(encoding="utf-8")
    mean, deviation = map(float, re.search(r"SPT, lr 0.01 .*?±.*?(\d\.\d+) ± (\d\.\d+)",
                                           readme).groups())
    assert abs(ours["test_accuracy"] - mean) < 4 * deviation + 0.02    # README's number, here
    output = capsys.readouterr().out.splitlines()
    assert (f"test accuracy  {labels['test_accuracy']:.3f}" == output[-1]
            and max(map(len, output)) <= 80)


def test_compare_gives_the_numbers_of_single_runs_for_any_number_of_jobs(tmp_path):
    flags = ("--n-train 64 --n-test 32 --seq-len 9 --vocab-size 5 "
             "--pretrain-steps 6 --finetune-steps 4 --batch-size 8")
    lines = {}
    for jobs in ("1", "2"):
        path = tmp_path / jobs
        done = subprocess.run([sys.executable, "spt.py", "--compare", "--seeds", "2",
                               "--jobs", jobs, "--json", path, *flags.split()],
                              cwd=HERE, capture_output=True, text=True, check=True)
        assert done.stderr == "" and max(map(len, done.stdout.splitlines())) <= 80
        results = map(json.loads, path.read_text().splitlines())
        lines[jobs] = {(r["arm"], r["lr"], r["seed"]): numbers(r) for r in results}
    assert lines["1"] == lines["2"] and len(lines["1"]) == 8
    alone = spt.run(replace(SMALL, spt=True, seed=1))
    assert lines["1"]["spt", SMALL.lr, 1] == json.loads(json.dumps(numbers(alone)))


def test_ctrl_c_keeps_what_is_finished(tmp_path):
    path = tmp_path / "results.jsonl"
    process = subprocess.Popen([sys.executable, "spt.py", "--compare", "--seeds", "50",
                                "--pretrain-steps", "20", "--finetune-steps", "10", "--json", path],
                               cwd=HERE, stderr=subprocess.PIPE, start_new_session=True)
    for _ in range(600):
        if path.exists() and path.stat().st_size:
            break
        time.sleep(0.1)
    os.killpg(process.pid, signal.SIGINT)    # as a terminal does: to the whole group
    _, stderr = process.communicate(timeout=20)
    assert process.returncode == 130 and b"Traceback" not in stderr
    assert {json.loads(line)["task"] for line in path.read_text().splitlines()} == {"proximity"}


# ---------------------------------------------------------------------------------------------
# Claims and theory
# ---------------------------------------------------------------------------------------------
def test_every_rule_can_fail():
    names = [name for rows in spt.CLAIMS.values() for name in rows]
    assert len(names) == len(set(names))
    for rows in spt.CLAIMS.values():
        for name, (_, *rules) in rows.items():
            assert rules, name
            for rule in rules:    # a value on the good side of the bound, and one on the bad side
                column, sign, bound, *other = rule.split(" ", 4)
                numbers = {other[1]: {column: 10.0}} if other else {}
                bound = float(bound) * (10 if other else 1)
                assert spt.obeys(rule, {column: bound - 0.01}, numbers) == (sign == "<")
                assert spt.obeys(rule, {column: bound + 0.01}, numbers) == (sign == ">")
                assert set(other[1:]) <= set(names)


def result_of(accuracy, steps=300):
    return dict(test_accuracy=accuracy, train_accuracy=accuracy, steps_to_95=steps,
                neighbour_attention={"x": 0.2}, pretrain_steps=280, finetune_steps=120)


def test_a_claim_whose_numbers_are_swapped_does_not_hold(capsys, monkeypatch):
    monkeypatch.setattr(spt, "CLAIMS", {"1 one": {"low": ({}, "test < 0.6"),
                                                  "high": ({}, "test > 0.9")}})
    monkeypatch.setattr(spt, "theory", lambda config: True)
    for low, high, holds in ((0.5, 1.0, True), (1.0, 0.5, False), (0.5, 0.5, False)):
        monkeypatch.setattr(spt, "run_all", lambda tagged, jobs, path: [
            result_of(low if tags["row"] == "low" else high) for tags, _ in tagged])
        assert spt.main(["--reproduce"]) == (0 if holds else 1)
        assert ("DOES NOT HOLD: low: test < 0.6; high: test > 0.9"
                in capsys.readouterr().out) != holds


def test_of_several_learning_rates_a_row_keeps_the_best_of_the_first_seed(capsys, monkeypatch):
    asked = []

    def fake(tagged, jobs, path):
        asked.append([(config.seed, config.lr) for _, config in tagged])
        return [result_of({0.1: 0.5, 0.2: 0.7, 0.3: 0.6}[config.lr]) for _, config in tagged]
    monkeypatch.setattr(spt, "run_all", fake)
    monkeypatch.setattr(spt, "CLAIMS", {"1 one": {"row": (dict(lrs=(0.1, 0.2, 0.3)),
                                                          "test > 0.6")}})
    monkeypatch.setattr(spt, "theory", lambda config: True)
    assert spt.main(["--reproduce", "--seed", "4"]) == 0
    assert asked == [[(4, 0.1), (4, 0.2), (4, 0.3)], [(5, 0.2), (6, 0.2)]]
    assert "0.700 ± 0.000" in capsys.readouterr().out


def test_summary_takes_means_and_the_median_of_steps_where_never_is_infinite():
    found = spt.summary([result_of(0.5, None), result_of(0.7, 100), result_of(0.9, 0)])
    assert found == pytest.approx({"train": 0.7, "test": 0.7, "near": 0.2, "steps": 100})
    assert spt.summary([result_of(1, None), result_of(1, None), result_of(1, 5)])["steps"] \
        == math.inf


def test_theory_fails_where_labels_are_not_blind(capsys, monkeypatch):
    blind = spt.blind_directions
    for change in (lambda label, masked: (label + 1e-6, masked),     # labels see
                   lambda label, masked: (label, 0.0),               # masked tokens do not
                   lambda label, masked: (0.0, masked)):             # blind along every direction
        monkeypatch.setattr(spt, "blind_directions", lambda *inputs, **more: (
            {name: change(*pair) for name, pair in blind(*inputs, **more)[0].items()},
            blind(*inputs, **more)[1]))
        assert spt.main(["--theory"]) == 1
    monkeypatch.undo()
    assert spt.main(["--theory"]) == 0


def test_reproduce_quick_holds_and_says_so(tmp_path, capfd):
    path = tmp_path / "r.jsonl"
    assert spt.main(["--reproduce", "--quick", "--json", str(path)]) == 0
    out = capfd.readouterr().out
    assert "holds" in out and "DOES NOT HOLD" not in out and max(map(len, out.splitlines())) <= 80
    rows = {json.loads(line)["row"] for line in path.read_text().splitlines()}
    assert rows == {name for title in spt.CLAIMS if title[:2] in ("1 ", "5 ")
                    for name in spt.CLAIMS[title]}


def directions_by_hand(T):
    """Look left and look right, less the mean over all other offsets, of norm sqrt(T)."""
    found = {}
    for name, side in (("look left", -1), ("look right", 1)):
        d = torch.full((T, T), -1 / (T - 1), dtype=torch.float64)
        for i in range(T):
            d[i, i] = 0
            d[i, (i + side) % T] += 1
        found[name] = d * math.sqrt(T) / d.norm()
    return found


@pytest.mark.parametrize("at", [0.0, 0.5])
def test_blind_directions_agree_with_finite_differences(at):
    inputs = spt.theory_inputs(n=50, seq_len=8)
    start = at * torch.randn(8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    found, _ = spt.blind_directions(*inputs, scores=start)
    for name, direction in directions_by_hand(8).items():
        up, down = (spt.blind_directions(*inputs, scores=start + step * direction)[1]
                    for step in (1e-4, -1e-4))
        for derivative, high, low in zip(found[name], up, down):
            assert derivative == pytest.approx((high - low) / 2e-4, abs=1e-9)


def test_blind_directions_agree_with_the_closed_form():
    (tokens, labels, is_masked, values,
     to_class, to_symbol) = inputs = spt.theory_inputs(n=40, seq_len=8)
    total = dict.fromkeys(("look left", "look right"), 0.0)
    for x, hidden in zip(tokens, is_masked):
        v = values[torch.where(hidden, 8, x)]
        mean = v.mean(dim=0)
        p, slope = (mean.tanh() @ to_symbol).softmax(dim=0), 1 - mean.tanh() ** 2
        for i in range(8):
            error = (F.one_hot(x[i], 8) - p) @ to_symbol.T * slope
            for name, side in (("look left", -1), ("look right", 1)):
                others = sum(v[j] for j in range(8) if j != i) / 7
                total[name] -= hidden[i].item() * (error @ (v[(i + side) % 8] - others)).item() / 8
    scale = math.sqrt(8) / math.sqrt(8 * (36 / 49 + 6 / 49))
    found, _ = spt.blind_directions(*inputs)
    for name, value in total.items():
        assert found[name][1] == pytest.approx(scale * value / is_masked.sum().item(), rel=1e-9)


def test_labels_are_blind_along_circulant_directions_and_only_there():
    for seed in range(3):
        found, _ = spt.blind_directions(*spt.theory_inputs(seed=seed), seed=seed)
        label, masked = found.pop("random, not circulant")
        assert abs(label) > 1e-7
        for label, masked in found.values():
            assert abs(label) <= 1e-12 and abs(masked) >= 1e-6
    inputs = spt.theory_inputs()
    kernels = torch.randn(5, 16, dtype=torch.float64) * torch.tensor([0.0, 1, 3, 10, 30])[:, None]
    offset = (torch.arange(16) - torch.arange(16)[:, None]) % 16
    losses = [spt.blind_directions(*inputs, phi=lambda z: z, scores=k[offset])[1]
              for k in kernels]
    label, masked = zip(*losses)
    assert max(label) - min(label) < 1e-12 and max(masked) - min(masked) > 0.01


def test_without_dependence_the_masked_derivative_vanishes_as_one_over_the_root_of_n():
    def root_mean_square(n):
        draws = [spt.blind_directions(*spt.theory_inputs(n=n, seq_len=16, shuffled=True,
                                                         seed=seed))[0]["look both ways"][1]
                 for seed in range(60)]
        return math.sqrt(np.mean(np.square(draws)))
    assert 0.35 < root_mean_square(400) / root_mean_square(100) < 0.7


@pytest.mark.filterwarnings("ignore:std")    # of a single batch there is no standard error
def test_offset_gradients_agree_with_finite_differences():
    torch.manual_seed(0)
    config, T = replace(SMALL, n_heads=1, n_layers=2), SMALL.seq_len
    tokens, labels = torch.randint(5, (32, T)), torch.randint(2, (32,))
    torch.set_default_dtype(torch.float64)
    try:
        model = spt.new_model(config)
        found = spt.offset_gradients(model, tokens, labels, config)
        generator = torch.Generator().manual_seed(config.seed)    # the draws of offset_gradients
        shuffled = tokens.gather(1, torch.rand(tokens.shape, generator=generator,
                                               dtype=torch.float64).argsort(dim=1))
        _, is_masked = spt.mask_tokens(tokens, 5, config.mask_ratio, generator)

        def parts(left, right):    # scores raised at one offset, less the mean over all others
            offset = (torch.arange(T) - torch.arange(T)[:, None]) % T
            bias = torch.where(offset == T - 1, left, torch.where(offset == 1, right, 0.0))
            bias = bias - (left + right) / (T - 1) * (offset != 0)
            for block in model.blocks:
                block.attention.bias = bias[None]
            p = model.classify(tokens).log_softmax(dim=-1)
            masked = [spt.masked_loss(model, x, x.masked_fill(is_masked, 5), is_masked)
                      for x in (tokens, shuffled)]
            return torch.stack([(p.gather(1, 1 - labels[:, None])
                                 - p.gather(1, labels[:, None])).mean() / 2, masked[0] - masked[1]])
        for name, side in (("look both ways", 1), ("left, not right", -1)):
            step = 1e-7    # small, since ReLU has kinks
            slope = (parts(step, side * step) - parts(-step, -side * step)) / (2 * step)
            assert [mean for mean, _ in found[name]] == pytest.approx(slope.tolist(), rel=1e-4)
            assert slope.abs().min() > 1e-6
    finally:
        torch.set_default_dtype(torch.float32)


def test_in_the_full_model_only_the_masked_gradient_comes_to_draw_attention_next_door():
    config = spt.recipe("proximity", pretrain_steps=100, finetune_steps=100)
    x, y = map(torch.from_numpy, spt.load_data(config)[1][:2])
    taught_by_labels, taught_by_masks = spt.new_model(config), spt.new_model(config)
    spt.finetune(taught_by_labels, x, y, config)
    spt.pretrain(taught_by_masks, x, config)
    for model in (taught_by_labels, taught_by_masks):
        label, masked = spt.offset_gradients(model, x, y, config)["look both ways"]
        assert abs(label[0]) < 5 * label[1]
    assert masked[0] < -10 * masked[1] and masked[0] < -100 * abs(label[0])


# ---------------------------------------------------------------------------------------------
# Files
# ---------------------------------------------------------------------------------------------
SMALL_FLAGS = "--pretrain-steps 6 --finetune-steps 4 --batch-size 8"


def test_own_sequences_are_split_by_class_and_labels_may_be_names(tmp_path):
    rng = np.random.default_rng(0)
    tokens, labels = rng.integers(7, size=(100, 6)), np.tile(["cat", "dog", "eel", "fox"], 25)
    np.savez(tmp_path / "d.npz", tokens=tokens, labels=labels)
    x, y, x_test, y_test = tasks.from_file(tmp_path / "d.npz", seed=1)
    assert np.bincount(y).tolist() == [20] * 4 and np.bincount(y_test).tolist() == [5] * 4
    names = dict(zip(map(tuple, tokens.tolist()), labels))
    for part, numbers_of in ((x, y), (x_test, y_test)):
        assert all(names[tuple(s)] == ["cat", "dog", "eel", "fox"][k]
                   for s, k in zip(part.tolist(), numbers_of))
    np.savez(tmp_path / "e.npz", tokens=tokens[:60], labels=labels[:60],
             test_tokens=tokens[60:], test_labels=labels[60:])
    x, y, x_test, y_test = tasks.from_file(tmp_path / "e.npz")
    assert ((x == tokens[:60]).all() and (x_test == tokens[60:]).all()
            and y_test.tolist() == [0, 1, 2, 3] * 10)


def test_saved_weights_come_back_and_evaluate_to_the_same_numbers(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    np.savez("d.npz", tokens=np.arange(240).reshape(40, 6) % 5, labels=np.arange(40) % 3 + 10)
    flags = ["--data", "d.npz", *SMALL_FLAGS.split(), "--json", "r.jsonl"]
    assert spt.main([*flags, "--spt", "--save", "m.pt"]) == 0
    assert spt.main([*flags, "--load", "m.pt", "--finetune-steps", "0"]) == 0
    first, second = map(json.loads, Path("r.jsonl").read_text().splitlines())
    assert (first["test_accuracy"] == second["test_accuracy"]
            and first["n_parameters"] == second["n_parameters"])
    assert first["attention_by_offset"]["fine-tuning"] == second["attention_by_offset"]["start"]
    assert sorted(os.listdir()) == ["d.npz", "m.pt", "r.jsonl"]
    assert "of 6 tokens" in capsys.readouterr().out
    for other in (["--n-heads", "4"], ["--d-model", "64"], ["--positions", "none"],
                  ["--transfer", "qk", "--spt"]):
        assert spt.main([*flags, "--load", "m.pt", *other]) == 2
        assert other[0][2:].replace("-", "_") in capsys.readouterr().err


def test_a_kill_while_saving_leaves_a_file_that_loads(tmp_path):
    path, model = tmp_path / "m.pt", spt.new_model(SMALL)
    spt.save_weights(path, model, SMALL)
    for moment in np.random.default_rng(0).uniform(0, 0.03, size=20):
        child = os.fork()
        if child == 0:
            while True:
                spt.save_weights(path, model, SMALL)
        time.sleep(moment)
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        spt.load_weights(path, model, SMALL)


# ---------------------------------------------------------------------------------------------
# What README promises
# ---------------------------------------------------------------------------------------------
@pytest.mark.parametrize("name, use", [
    ("Attention", lambda piece:
     piece(8, 2)(torch.randn(2, 5, 8), return_weights=True)[1].sum(dim=-1).mean().detach()),
    ("sinusoidal_positions", lambda piece: piece(7, 4)[0, 1]),
    ("rotate", lambda piece: piece(torch.ones(3, 4))[0, 0]),
    ("distance_bias", lambda piece: piece(2, 4).exp()[0, 0, 0]),
    ("mask_tokens",
     lambda piece: piece(torch.ones(2, 3, dtype=torch.int64), 5, 0.0)[0].double().mean()),
    ("attention_by_offset",
     lambda piece: piece(spt.new_model(SMALL), tokens_like(SMALL)).sum(dim=-1).mean()),
    ("blind_directions",
     lambda piece: 1 + piece(*spt.theory_inputs(n=20, seq_len=8))[0]["look left"][0]),
    ("proximity", lambda piece: piece(n=4, seq_len=5, vocab_size=4)[1].sum() / 2),
])
def test_a_piece_works_when_its_source_alone_is_pasted(name, use):
    source = inspect.getsource(getattr(tasks if name == "proximity" else spt, name))
    scope = {}
    exec("import math, numpy as np, torch; from torch import nn; "
         "from torch.nn import functional as F\n" + source, scope)
    assert float(use(scope[name])) == pytest.approx(1, abs=1e-5)


def test_the_worked_diffs_of_the_readme_apply_and_run(tmp_path):
    diffs = re.findall(r"```diff\n(.*?)```", (HERE / "README.md").read_text(encoding="utf-8"),
                       flags=re.S)
    for file, diff in zip(("synthetic_tasks.py", "spt.py"), diffs, strict=True):
        source = (HERE / file).read_text(encoding="utf-8")
        for hunk in diff.split("@@\n"):
            old, new = ("".join(line[1:] for line in hunk.splitlines(True) if line[0] in keep)
                        for keep in (" -", " +"))
            assert source.count(old) == 1, old
            source = source.replace(old, new)
        (tmp_path / file).write_text(source, encoding="utf-8")
    done = subprocess.run([sys.executable, "spt.py", "--task", "first", "--positions", "ramp",
                           "--spt", *SMALL_FLAGS.split()],
                          cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0 and "test accuracy" in done.stdout, done.stderr


# ---------------------------------------------------------------------------------------------
# Bad input
# ---------------------------------------------------------------------------------------------
BAD_FLAGS = """
--task cooking | --no-such-flag | --spt=1 | --seed -1 | --seed x | --seeds 0 | --jobs 0
--threads 0 | --mask-ratio 0 | --mask-ratio 1 | --mask-ratio nan | --n-heads 3 | --n-heads 0
--d-model -32 | --d-model 33 | --vocab-size 2 | --vocab-size -8 | --seq-len 1 | --seq-len 999999999
--lag 64 | --lag 0 | --lag 2 --task text | --signal 1.5 | --signal -0.1 | --lr 0 | --lr inf
--lr nan | --batch-size 0 | --pretrain-steps 0 | --n-train 99999999999 | --n-train 1
--positions nowhere | --transfer some | --n-layers 1000 --d-model 16384 | --d-ff 0 | --device abacus
--device cuda:99 | --text {tmp}/none.txt --task text | --text {tmp} --task text
--text {tmp}/empty.txt --task text | --text {tmp}/binary --task text
--text {tmp}/short.txt --task text | --text {tmp}/short.txt | --json {tmp}
--json {tmp}/no/such/folder/r.jsonl | --task bag --vocab-size 7 | --save {tmp}
--save {tmp}/no/m.pt | --load {tmp}/none.pt | --load {tmp}/bad.pt | --load {tmp}/zip.pt
--load {tmp} | --compare --save {tmp}/m.pt | --data {tmp}/d.npz --seq-len 6 | --compare --reproduce
--reproduce --lr 0.1 | --quick | --load x.pt --spt --transfer qk | --theory --task bag
--theory --json {tmp}/r | --task texture --seq-len 60
--n-train 10000000 --seq-len 65536 | --batch-size 100000 --seq-len 65536 | stray
"""


class Payload:
    """Unpickled, it makes a file: what must not happen."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return Path.touch, (Path(self.path),)


@pytest.mark.parametrize("flags", BAD_FLAGS.replace("\n", " | ").strip(" |").split(" | "))
def test_bad_input_is_one_line_and_status_2(flags, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(spt, "run", lambda config: pytest.fail("training began"))
    (tmp_path / "empty.txt").write_text("")
    (tmp_path / "short.txt").write_text("too short " * 20)
    (tmp_path / "binary").write_bytes(bytes(range(256)) * 200)
    (tmp_path / "bad.pt").write_bytes(pickle.dumps(Payload(tmp_path / "executed")))
    torch.save({"config": Payload(tmp_path / "executed"), "weights": {}}, tmp_path / "zip.pt")
    before = sorted(tmp_path.iterdir())
    assert spt.main(flags.format(tmp=tmp_path).split()) == 2
    out, err = capsys.readouterr()
    assert (out == "" and err.count("\n") == 1 and err.startswith("spt.py: error: ")
            and len(err) > 30)
    assert sorted(tmp_path.iterdir()) == before


def test_what_does_not_fit_on_the_disk_leaves_the_files_as_they_were(tmp_path):
    results, weights = tmp_path / "results.jsonl", tmp_path / "m.pt"
    results.write_text('{"kept": true}\n')
    spt.save_weights(weights, spt.new_model(SMALL), SMALL)
    before = weights.read_bytes()
    code = f"""if True:
        import contextlib, resource, signal, spt
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (40, 40))
        for write in (lambda: spt.append_json({str(results)!r}, dict(long="x" * 100)),
                      lambda: spt.save_weights({str(weights)!r}, spt.new_model(config), config)):
            config = spt.Config()
            try:
                write()
            except OSError:
                print("refused")
        """
    done = subprocess.run([sys.executable, "-c", code], cwd=HERE, capture_output=True, text=True)
    assert done.stdout.split() == ["refused", "refused"], done.stderr
    assert results.read_text() == '{"kept": true}\n' and weights.read_bytes() == before
    assert sorted(os.listdir(tmp_path)) == ["m.pt", "results.jsonl"]


X, Y = np.arange(60).reshape(10, 6) % 5, np.arange(10) % 2
BAD_ARRAYS = {
    "floats": dict(tokens=X * 1.0, labels=Y), "NaN": dict(tokens=X * math.nan, labels=Y),
    "negative": dict(tokens=-X, labels=Y), "one-dimensional": dict(tokens=X[0], labels=Y),
    "three-dimensional": dict(tokens=X[None], labels=Y),
    "object tokens": dict(tokens=X.astype(object), labels=Y),
    "object labels": dict(tokens=X, labels=Y.astype(object)),
    "ragged": dict(tokens=np.array([[1, 2], [1]], dtype=object), labels=Y[:2]),
    "strings": dict(tokens=X.astype(str), labels=Y), "other length": dict(tokens=X, labels=Y[:9]),
    "label matrix": dict(tokens=X, labels=X), "float labels": dict(tokens=X, labels=Y / 2),
    "one class": dict(tokens=X, labels=Y * 0), "a class of one": dict(tokens=X, labels=Y == 0),
    "empty": dict(tokens=X[:0], labels=Y[:0]), "no labels": dict(tokens=X),
    "no tokens": dict(labels=Y), "other names": dict(x=X, y=Y), "nothing": {},
    "T of 1": dict(tokens=X[:, :1], labels=Y), "too many symbols": dict(tokens=X + 10**9, labels=Y),
    "empty test": dict(tokens=X, labels=Y, test_tokens=X[:0], test_labels=Y[:0]),
    "other T in the test": dict(tokens=X, labels=Y, test_tokens=X[:, :4], test_labels=Y),
    "half a test": dict(tokens=X, labels=Y, test_tokens=X),
    "payload": dict(tokens=X, labels=[Payload("executed")] * 10),
    "complex": dict(tokens=X + 1j, labels=Y), "NaN labels": dict(tokens=X, labels=Y * math.nan),
    "truncated": None, "no zip": b"PK but not a zip", "a pickle": pickle.dumps(Payload("executed")),
    "no bytes": b"",
}


@pytest.mark.parametrize("name", BAD_ARRAYS)
def test_bad_data_files_are_one_line_and_status_2(name, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(spt, "run", lambda config: pytest.fail("training began"))
    monkeypatch.chdir(tmp_path)
    content = BAD_ARRAYS[name]
    if isinstance(content, bytes):
        Path("d.npz").write_bytes(content)
    else:
        np.savez("d.npz", **(dict(tokens=X, labels=Y) if content is None else content))
    if content is None:
        Path("d.npz").write_bytes(Path("d.npz").read_bytes()[:-100])
    before = Path("d.npz").read_bytes()
    assert spt.main(["--data", "d.npz", "--spt"]) == 2
    out, err = capsys.readouterr()
    assert (out == "" and err.count("\n") == 1 and err.startswith("spt.py: error: ")
            and "d.npz" in err)
    assert os.listdir() == ["d.npz"] and Path("d.npz").read_bytes() == before
