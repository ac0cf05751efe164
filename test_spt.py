"""Behaviour of spt.py and synthetic_tasks.py: oracles written another way, properties, gradients,
exact symmetries, and the gap itself.

    python -m pytest -q
"""
import copy
import inspect
import json
import math
import re
import subprocess
import sys
from collections import Counter
from contextlib import nullcontext
from dataclasses import asdict, replace
from itertools import product
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from torch.nn import functional as F

import spt
import synthetic_tasks as tasks

torch.set_num_threads(1)    # tiny products only wait for a second thread
SIZES = dict(n_train=64, n_test=32, seq_len=9, vocab_size=5, pretrain_steps=6, finetune_steps=4)
SMALL, FLAGS = spt.Config(**SIZES), [f"--{k.replace('_', '-')}={v}" for k, v in SIZES.items()]
LABELS, ROOT = torch.arange(32) % 2, Path(spt.__file__).parent


@pytest.fixture(autouse=True)
def the_same_random_numbers_whichever_tests_ran_before():
    torch.manual_seed(0)


def small_model(**arguments):
    """A Transformer for 9 tokens of 5 symbols."""
    return spt.Transformer(5, 9, **arguments)


def random_tokens(n=32, T=9):
    return torch.randint(5, (n, T))


def blocks(language):
    """The code blocks of README in a language."""
    return re.findall(rf"```{language}\n(.*?)```", (ROOT / "README.md").read_text("utf-8"), re.S)


# --- Tasks -----------------------------------------------------------------------------------
def likelihood(name, x, label, V, signal):
    """P(x | label) by the words of the task's docstring, one token at a time; images are 2 x 2."""
    p, half, back = 1.0, V // 2, 2 if label else 1
    for t in range(len(x)):
        follows = {"bag": range(half, V) if label else range(half),
                   "proximity": [(x[t - 1] + 2 * label - 1) % V] if t else range(V),
                   "texture": [x[t - back]] if t & back else range(V)}[name]
        p *= signal * (x[t] in follows) / len(follows) + (1 - signal) / V
    return p


@pytest.mark.parametrize("name, T, V", [("proximity", 4, 4), ("texture", 4, 3), ("bag", 3, 4)])
def test_sequences_follow_the_law_of_their_class_and_the_best_guess_is_the_likelier(name, T, V):
    n, signal, right = 40_000, 0.45, 0.0
    tokens, labels = getattr(tasks, name)(n=n, signal=signal, seed=3, seq_len=T, vocab_size=V)
    laws = [{x: likelihood(name, x, label, V, signal) for x in product(range(V), repeat=T)}
            for label in (0, 1)]
    assert labels.sum() == n // 2
    for label, law in enumerate(laws):
        seen = Counter(map(tuple, tokens[labels == label].tolist()))
        chi_square = sum((seen[x] - n / 2 * p) ** 2 / (n / 2 * p) for x, p in law.items())
        assert abs(chi_square - len(law) + 1) < 5 * math.sqrt(2 * len(law))
        for x, times in seen.items():
            ratio = law[x] / laws[1 - label][x]
            right += times / n * (0.5 if math.isclose(ratio, 1) else ratio > 1)
            # Reversal swaps the classes.
            assert name != "proximity" or law[x] == pytest.approx(laws[1 - label][x[::-1]])
    assert tasks.best_possible_accuracy(name, tokens, labels, V) == pytest.approx(right)


def test_counts_say_nothing_but_in_the_bag_and_the_streams_are_separate():
    for name, counts in (("proximity", 0.5), ("texture", 0.5), ("bag", 0.893), ("text", 0.5)):
        first, again, other = (tasks.make_task(name, n_train=4000, n_test=4000, seq_len=16,
                                               vocab_size=8, signal=0.3, seed=s) for s in (0, 0, 1))
        assert all((a == b).all() for a, b in zip(first, again))
        assert all((a[:99] != b[:99]).any() for a, b in zip(first, (*first[2:], *other[2:])))
        assert tasks.count_baseline(*first) == pytest.approx(counts, abs=0.05), name
    # 2/3 x 5/6 x 1/6 > 1/3 x 1/2 x 1/2, and 2/3 x 1/6 x 1/6 < 1/3 x 1/2 x 1/2.
    x, x_test, y = np.array([[0, 0], [0, 0], [0, 1]]), np.array([[0, 1], [1, 1]]), np.arange(2)
    assert tasks.count_baseline(x, np.array([0, 0, 1]), x_test, y) == 1


def test_text_windows_come_from_their_own_part_half_of_them_backwards(tmp_path):
    letters = np.random.default_rng(0).choice(list("abcdefghijklmnopqrstuvw   "), size=6000)
    words = " ".join("".join([*letters[:5900], *letters[:106]]).split())    # ends as it begins
    (path := tmp_path / "t.txt").write_text("  " + words.upper(), encoding="utf-8")
    x, y, x_test, y_test = tasks.text(n_train=200, n_test=999, seq_len=16, vocab_size=26, path=path)
    train, test = words[:len(words) * 4 // 5], words[len(words) * 4 // 5:]
    letter = sorted(sorted(set(words)), key=train.count, reverse=True)
    may = [{part[i:i + 16] for i in range(0, len(part) - 15, 16)} for part in (train, test)]
    does = [{"".join(letter[s] for s in row)[::1 if label else -1] for row, label in zip(*part)}
            for part in ((x, y), (x_test, y_test))]
    known = {w for w in may[1] if any(w[i:i + 8] in train for i in range(9))}
    assert does[0] <= may[0] and len(does[0]) == 200 and does[1] == may[1] - known and known


# --- Positions, attention, model -------------------------------------------------------------
def test_rotary_positions_turn_complex_numbers():
    turns = torch.exp(1j * torch.arange(12)[:, None] / 10000 ** (torch.arange(4) / 4))
    pairs = torch.view_as_real(torch.view_as_complex(torch.arange(8.0).view(4, 2)) * turns)
    assert torch.allclose(spt.rotate(torch.arange(8.0).expand(12, 8)), pairs.flatten(1), atol=1e-5)


def test_distance_bias_by_hand():
    left, right, left_half, _, no = *spt.distance_bias(4, 3).tolist(), -math.inf
    assert left == [[0, no, no], [-1, 0, no], [-2, -1, 0]] and left_half[2] == [-1, -0.5, 0]
    assert right == [[0, -1, -2], [no, 0, -1], [no, no, 0]]


@torch.no_grad()
def attention_by_loops(attention, x):
    """Softmax attention of one sequence (T, C) as loops over heads, queries and keys."""
    out, turn = torch.zeros_like(x), spt.rotate if attention.rotary else lambda part: part
    for h in range(2):
        own = slice(h * 16, h * 16 + 16)
        q, k, v = (x @ getattr(attention, name).weight[own].T for name in ("query", "key", "value"))
        for i in range(9):
            bias = [0] * 9 if attention.score_bias is None else attention.score_bias[h, i]
            e = [math.exp(turn(q)[i] @ turn(k)[j] / 4 + bias[j]) for j in range(9)]
            out[i, own] = sum(e[j] / sum(e) * v[j] for j in range(9))
    return out @ attention.out.weight.T


@pytest.mark.parametrize("positions", ["sinusoidal", "rotary", "distance"])
def test_attention_equals_nested_loops_and_the_fused_kernel_with_gradients(positions):
    attention = small_model(positions=positions).double().blocks[0].attention
    x = torch.randn(2, 9, 32).double()
    readable, fused = attention(x, return_weights=True)[0], attention(x)
    assert torch.allclose(fused, torch.stack([attention_by_loops(attention, one) for one in x]))
    weights = list(attention.parameters())
    gradients = (torch.autograd.grad(y.square().sum(), weights) for y in (readable, fused))
    for a, b in [(readable, fused), *zip(*gradients)]:
        assert torch.allclose(a, b) and a.abs().max() > 0


def test_the_model_is_a_pre_norm_encoder_with_a_last_norm_two_heads_and_sinusoidal_positions():
    model, tokens = small_model(n_layers=2), random_tokens()
    x = model.token_embedding(tokens) + torch.tensor([
        [(math.cos if i % 2 else math.sin)(t / 10000 ** (i // 2 / 16)) for i in range(32)]
        for t in range(9)])
    for block in model.blocks:
        x = x + block.attention(F.layer_norm(x, (32,)))
        x = x + block.mlp[2](block.mlp[0](F.layer_norm(x, (32,))).clamp(min=0))
    x = F.layer_norm(x, (32,))
    assert torch.allclose(model.classify(tokens), model.class_head(x.mean(dim=1)), atol=1e-5)
    assert torch.allclose(model.reconstruct(tokens), model.reconstruction_head(x), atol=1e-5)


@pytest.mark.parametrize("readout", ["mean", "all"])
@pytest.mark.parametrize("positions", [*spt.POSITIONS, "|i - j|"])
def test_without_order_a_sequence_and_its_reverse_look_alike(positions, readout):
    kind, tokens = "none" if positions == "|i - j|" else positions, random_tokens()
    model = small_model(positions=kind, n_layers=2, readout=readout).double()
    for block in model.blocks if positions == "|i - j|" else []:
        block.attention.score_bias = torch.maximum(*spt.distance_bias(2, 9)).double()[None]
    difference = (model.classify(tokens) - model.classify(tokens.flip(1))).abs().max()
    assert difference < 1e-12 if (kind, readout) == ("none", "mean") else difference > 1e-6
    assert ("positions" in dict(model.named_parameters())) == (positions == "learned")
    with pytest.raises(ValueError, match="nowhere"):
        small_model(**{"positions": "nowhere"} if readout == "mean" else {"readout": "nowhere"})


# --- Masking, losses, the loop ---------------------------------------------------------------
def test_masking_hides_a_binomial_share_and_nothing_else():
    tokens, generators = random_tokens(400, 100), [torch.Generator().manual_seed(0) for _ in "ab"]
    (corrupted, hidden), again = (spt.mask_tokens(tokens, 5, 0.3, one) for one in generators)
    assert torch.equal(corrupted, torch.where(hidden, 5, tokens)) and torch.equal(again[1], hidden)
    assert abs(hidden.sum().item() - 12_000) < 5 * math.sqrt(40_000 * 0.3 * 0.7)
    assert hidden.sum(dim=1).double().var().item() == pytest.approx(100 * 0.3 * 0.7, rel=0.3)


def test_masked_loss_counts_hidden_tokens_only_and_cannot_see_them():
    model, tokens = small_model(), random_tokens()
    corrupted, hidden = spt.mask_tokens(tokens, 5, 0.4)
    log_p = model.reconstruct(corrupted).log_softmax(dim=-1).tolist()
    by_loop = np.mean([-log_p[b][t][tokens[b, t]] for b, t in hidden.nonzero().tolist()])
    # Of the true tokens only the hidden ones count.
    loss = spt.masked_loss(model, torch.where(hidden, tokens, 0), corrupted, hidden).item()
    assert loss == pytest.approx(by_loop) and loss == pytest.approx(math.log(5), abs=0.3)
    assert spt.masked_loss(model, tokens, tokens, torch.zeros_like(hidden)).item() == 0


def test_one_batch_can_be_overfitted():
    x, model, steps = random_tokens(2), small_model(), []
    masked = spt.pretrain(small_model(), x, mask_id=5, mask_ratio=0.1, steps=300)
    labels = spt.finetune(model, x, LABELS[:2], steps=100, on_step=steps.append)
    assert steps == list(range(1, 101)) and spt.accuracy(model, x, LABELS[[0, 0]]) == 0.5
    assert masked[0] > 1 and labels[0] == pytest.approx(math.log(2), abs=0.3)
    assert max(np.mean(masked[-20:]), np.mean(labels[-20:])) < 0.1


def test_adamw_of_torch_warms_up_and_then_follows_a_cosine_to_a_tenth(monkeypatch):
    rates = []

    def adamw(*weights, make=torch.optim.AdamW, **settings):
        made = make(*weights, **settings)
        made.register_step_pre_hook(lambda *_: rates.append(made.param_groups[0]["lr"]))
        assert made.defaults["betas"] == (0.9, 0.999) and made.defaults["weight_decay"] == 0.01
        return made
    monkeypatch.setattr(torch.optim, "AdamW", adamw)
    spt.finetune(small_model(), random_tokens(), LABELS, steps=40, lr=0.01)
    quarter = 0.001 + 0.009 * (2 + math.sqrt(2)) / 4    # of the way down, after 10 % on the way up
    assert len(rates) == 40 and [rates[step - 1] for step in (1, 2, 3, 4, 13, 22, 40)] \
        == pytest.approx([0.0025, 0.005, 0.0075, 0.01, quarter, 0.0055, 0.001])


# --- Probes ----------------------------------------------------------------------------------
def test_attention_by_offset_equals_a_loop():
    model, tokens, heads = small_model(n_layers=2).double(), random_tokens(), []
    seen, x = spt.look(model, tokens), model.embed(tokens)
    for block in model.blocks:
        for head in block.attention(block.norm1(x), True)[1].mean(dim=0).tolist():
            heads.append([sum(head[i][(i + o) % 9] for i in range(9)) / 9 for o in range(-4, 5)])
        x, by_loop = block(x), np.array(heads)
    assert np.array(seen["heads"]) == pytest.approx(by_loop) and by_loop.sum(1) == pytest.approx(1)
    near, side = by_loop[:, 3] + by_loop[:, 5], by_loop[:, 5] - by_loop[:, 3]
    assert [seen["near"], seen["side"]] == pytest.approx([near.max(), abs(side).max()])


@pytest.mark.parametrize("positions", ["sinusoidal", "distance"])
def test_the_pull_on_attention_agrees_with_finite_differences(positions):
    model, tokens = small_model(positions=positions).double(), random_tokens()
    attention, own = model.blocks[0].attention, model.blocks[0].attention.score_bias

    def loss(offset=0, size=0.0):    # with the scores at one offset raised
        if size:
            extra = size * torch.eye(9).double().roll(offset, dims=1)[None]
            attention.score_bias = extra if own is None else own + extra
        return F.cross_entropy(model.classify(tokens), LABELS)
    pull = spt.attention_pull(model, loss, 9).numpy()
    assert attention.score_bias is own and abs(pull).max() > 1e-5
    slopes = np.array([(loss(o, -1e-6) - loss(o, 1e-6)).item() / 2e-6 for o in range(9)])
    assert pull == pytest.approx(slopes - slopes[1:].mean(), rel=1e-3, abs=1e-8)


def test_the_pulls_on_the_neighbours_by_hand_and_by_symmetry():
    model, tokens, found = small_model(positions="none").double(), random_tokens(), []
    generator = torch.Generator().manual_seed(3)    # the draws of neighbour_pulls
    for x, y in zip(tokens.split(8), LABELS.split(8)):
        shuffled = x.gather(1, torch.rand(x.shape, generator=generator).argsort(dim=1))
        hidden = torch.rand(x.shape, generator=generator) < 0.4
        real, control, right, wrong = (spt.attention_pull(model, loss, 9).numpy() for loss in (
            *(lambda z=z: spt.masked_loss(model, z, z.masked_fill(hidden, 5), hidden)
              for z in (x, shuffled)),
            *(lambda k=k: F.cross_entropy(model.classify(x), k) for k in (y, 1 - y))))
        masked, label = real - control, (right - wrong) / 2
        found.append([label[1] - label[8], label[1] + label[8], masked[1] + masked[8]])
    by_hand = np.stack([np.mean(found, axis=0), np.std(found, axis=0, ddof=1) / 2], 1)
    # Swapped labels pull the other way. Reversal exchanges left and right: it flips the side alone.
    for x, y, signs in ((tokens, LABELS, [1, 1, 1]), (tokens, 1 - LABELS, [-1, -1, 1]),
                        (tokens.flip(1), LABELS, [-1, 1])):    # the masks are not reversed
        pulls = spt.neighbour_pulls(model, x, y, mask_id=5, mask_ratio=0.4, batch_size=8, seed=3)
        for name, pair, sign in zip(["labels side", "labels near", "masked near"], by_hand, signs):
            assert pulls[name] == pytest.approx(pair * [sign, 1], rel=1e-6)


# --- Whole runs ------------------------------------------------------------------------------
def test_same_seed_same_bits_and_pretraining_changes_neither_data_nor_weights():
    first, again, other, labels = (spt.run(replace(SMALL, **changes)) for changes in (
        dict(spt=True), dict(spt=True), dict(spt=True, seed=1), {}))
    assert first == again and first["looks"]["start"] == labels["looks"]["start"]
    assert all(first[k] == labels[k] for k in ("counting", "best_possible", "total_steps"))
    assert [s for s, _ in first["curve"]] == [7, 8, 9, 10] == [s for s, _ in labels["curve"]][6:]
    (_, (x, y, *_)), (_, (z, *_)) = (spt.load_data(replace(SMALL, seed=seed)) for seed in (0, 1))
    a, b, c = (spt.finetune(spt.new_model(SMALL, y, start), x, y, steps=3, seed=batches)
               for start, batches in ((0, 0), (1, 0), (0, 1)))
    assert b != a != c and (x != z).any() and first["looks"] != other["looks"]


@pytest.mark.parametrize("arm, freeze", [("labels", False), ("all", False), ("all", True),
                                         ("qk", False), ("not-qk", False)])
def test_what_is_handed_over_to_fine_tuning(arm, freeze, monkeypatch):
    # Weights before and after each phase, its seed and steps; largest tokens of the last one.
    seen, asked, shown = [], [], set()

    def watched(model, *rest, train=spt.train, **settings):
        shown.clear()
        asked.append((settings["seed"], settings["steps"]))
        model.token_embedding.register_forward_pre_hook(lambda _, x: shown.add(x[0].max().item()))
        seen.append(copy.deepcopy(model.state_dict()))
        losses = train(model, *rest, **settings)
        seen.append(copy.deepcopy(model.state_dict()))
        return losses
    monkeypatch.setattr(spt, "train", watched)
    changes = {} if arm == "labels" else dict(spt=True, transfer=arm)
    config = replace(SMALL, freeze_qk=freeze, n_layers=2, seed=7, **changes)
    spt.run(config)
    start, (*pretraining, handed, last) = spt.new_model(config, LABELS, 7).state_dict(), seen
    names, head, unused, norms, query, key = ({name for name in start if part in name} for part in (
        "", "class_head", "reconstruction_head", "norm", ".query.", ".key."))

    def alike(a, b):
        return {name for name in names if torch.equal(a[name], b[name])}
    # What is copied alone meets another random start, which shares only the norms with this one.
    assert alike(start, handed) == dict(labels=names, all=head, qk=norms).get(arm, set())
    if pretraining:
        assert alike(start, pretraining[0]) == names
        assert alike(pretraining[1], handed) == {
            "all": names, "qk": query | key, "not-qk": names - query - key - head}[arm]
    assert alike(handed, last) == unused | (query | key if freeze else set())
    # 5 is the mask symbol; both arms have 10 steps.
    assert shown == {4} and asked == ([(7, 6), (7, 4)] if pretraining else [(7, 10)])


def test_the_gap_end_to_end(tmp_path, capsys):
    for flags in (["--spt"], []):
        assert spt.main(["--task", "proximity", "--json", f"{tmp_path}/r", *flags]) == 0
    ours, labels = map(json.loads, (tmp_path / "r").read_text().splitlines())
    assert min(ours["test"], ours["train"]) >= 0.95 and labels["test"] <= 0.6
    start, near, side = ours["looks"].values()
    assert near["near"] > 5 * 2 / 64 > start["near"] and near["side"] < 0.1 < 0.2 < side["side"]
    assert ours["side"] == side["side"] and len(side["heads"][0]) == 33
    assert ours["masked_loss"] == pytest.approx([math.log(8), 1.7], abs=0.15)
    for result, before in ((ours, ours["config"]["pretrain_steps"]), (labels, 0)):
        steps, correct = np.array(result["curve"]).T * [[1], [1000]]    # of the whole test set
        assert list(steps) == [s for s in range(60, 601, 60) if s > before]
        assert np.allclose(correct, correct.round()) and correct[-1] == 1000 * result["test"]
        assert result["steps_to_95"] == next((s for s, r in result["curve"] if r >= 0.95), None)
    out = capsys.readouterr().out
    assert max(map(len, out.splitlines())) <= 80
    # README shows the first of the two: text and numbers in turn, without the bars.
    shown, printed = (re.split(r"(\d[\d.]*)", re.sub("[▁-█]", "", text))
                      for text in (blocks("text")[0], out))
    for a, b in zip(shown[:-1], printed):
        assert a == b or float(a) == pytest.approx(float(b), abs=0.05, rel=0.3)


def test_compare_gives_the_bits_of_single_runs_for_any_number_of_jobs(tmp_path):
    alone, written = json.loads(json.dumps(spt.run(replace(SMALL, spt=True)))), []
    for jobs in ("1", "2"):
        subprocess.run([sys.executable, spt.__file__, "--compare", "--seeds=1", "--jobs", jobs,
                        "--json", tmp_path / jobs, *FLAGS], check=True)
        written.append([json.loads(line) | dict(config=None) for line in (tmp_path / jobs).open()])
    assert written[0] == written[1] and len(written[0]) == 4
    assert written[0][-1] == alone | dict(config=None, row="SPT")


def test_own_data_are_split_and_saved_weights_come_back(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    tokens = np.random.default_rng(0).integers(5, size=(100, 12))
    labels = np.array(["cat", "dog", "eel"])[tokens[:, 0] % 3]
    for name, more in ("d", {}), ("own", dict(test_tokens=tokens[9:], test_labels=labels[9:])):
        np.savez(name, tokens=tokens, labels=labels, **more)
    assert [len(part) for part in tasks.from_file("own.npz")] == [100, 100, 91, 91]
    x, y, x_test, y_test = map(torch.from_numpy, tasks.from_file("d.npz"))
    both = torch.cat([x, x_test])
    assert (len(x_test), len(both.unique(dim=0))) == (20, 100)
    assert (both[:, 0] % 3 == torch.cat([y, y_test])).all()
    assert spt.main([*FLAGS, "--data=d.npz", "--readout=all", "--save=m.pt", "--json=r"]) == 0
    result, saved = json.loads(Path("r").read_text()), torch.load("m.pt", weights_only=True)
    model = spt.Transformer(**saved["arguments"])
    model.load_state_dict(saved["weights"])
    assert spt.accuracy(model, x_test, y_test) == result["test"] and model.readout == "all"
    assert spt.look(model, x_test) == result["looks"]["label training"]


# --- Many runs and claims --------------------------------------------------------------------
def result_of(config, test, train, steps):
    """What `run` would return, with these numbers."""
    return dict(arm="?", total_steps=10, train=train, test=test, steps_to_95=steps, near=0.3,
                side=0.1, chance=0.5, counting=0.5, best_possible=None, masked_loss=None, curve=[],
                looks={"start": {"heads": [[0.02] * 33]}}, n_weights=9, config=asdict(config))


def test_labels_keep_the_best_of_three_rates_and_spt_has_one(capsys, monkeypatch):
    asked = []

    def run(config):
        asked.append((config.spt, config.seed, config.lr))
        test = {0.001: 0.5, 0.003: 0.6, 0.005: 0.6, 0.01: 0.7}[config.lr] - 0.2 * (config.seed == 5)
        return result_of(config, test, 1 - test, None if config.seed == 5 else 300)
    monkeypatch.setattr(spt, "ProcessPoolExecutor", lambda *_: nullcontext(Mock(map=map)))
    monkeypatch.setattr(spt, "run", run)
    assert spt.main(["--compare", "--seeds", "2", "--seed", "4"]) == 0
    assert sorted(asked) == [(False, 4, 0.001), (False, 4, 0.003), (False, 4, 0.01),
                             (False, 5, 0.01), (True, 4, 0.005), (True, 5, 0.005)]
    out = capsys.readouterr().out
    for text in ("0.600 ± 0.141", "0.500 ± 0.141", "1 of 2 runs", ": -0.100"):
        assert text in out and max(map(len, out.splitlines())) <= 80
    assert [spt.mean([dict(n=1), dict(n=n)], "n") for n in (3, None)] == [2, math.inf]


def test_every_row_of_every_claim_can_make_it_fail_alone(capsys, monkeypatch):
    def run_rows(rows, config):
        results = {}
        for (title, row), one in rows.items():
            assert (one.transfer == "not-qk") == (row == "rest copied")
            high = row in ("SPT", "qk copied", "qk frozen") or re.match("1e|1f|5|control", title)
            steps = 3000 if title[:2] == "1e" and flipped != flips[0] else 300
            seen = (.99, .99, steps) if bool(high) != ((title, row) == flipped) else (.5, .5, None)
            results[title, row] = [result_of(one, *seen)] * 2
            if row == "SPT":    # the arms share all but one thing
                assert replace(rows[title, "labels"], spt=True) == one != rows[title, "labels"]
        return results

    monkeypatch.setattr(spt, "run_rows", run_rows)
    monkeypatch.setattr(spt, "theory", Mock(side_effect=lambda _: flipped != "6", __doc__="Why.",
                                            __name__="theory"))
    flips = [("1e", "few"), *((t, row) for t, (rows, _) in spt.CLAIMS.items() for row in rows)]
    for flipped in [None, "6", *flips]:
        assert spt.main(["--reproduce"]) == (flipped is not None)
        out = capsys.readouterr().out.splitlines()
        for title, line in zip([*spt.CLAIMS, "6"], out[-len(spt.CLAIMS) - 1:], strict=True):
            fails = flipped and title.startswith(flipped[0])    # in the summary
            assert line.startswith(title) and line.endswith("FAILS" if fails else "holds")
        assert max(map(len, out)) <= 80 and str(out).count("  FAILS:") == (flipped in flips)


# --- Theory ----------------------------------------------------------------------------------
def one_layer(n=60, T=6, V=5, C=4):
    """Proximity data, masked, and random weights: what one_layer_losses takes after the scores."""
    x, y = map(torch.from_numpy, tasks.proximity(n=n, seq_len=T, vocab_size=V))
    weights = (torch.randn(shape).double() for shape in ((V + 1, C), (C, 2), (C, V)))
    return x, y, *spt.mask_tokens(x, V, 0.3), *weights


def slopes(scores, inputs, **phi):
    """Both losses, and the gradient of each by the scores (T, T)."""
    scores = scores.double().requires_grad_()
    losses = spt.one_layer_losses(scores, *inputs, **phi)
    return losses, [torch.autograd.grad(loss, scores, retain_graph=True)[0] for loss in losses]


def test_one_layer_losses_by_hand_and_the_closed_form_of_the_masked_pull():
    S, (x, y, corrupted, hidden, values, W, U) = torch.randn(6, 6).double(), (inputs := one_layer())
    A, closed, losses = S.exp() / S.exp().sum(1, keepdim=True), [], []
    for b, i in hidden.nonzero().tolist():
        v, mean = values[corrupted[b]], values[corrupted[b]].mean(0)    # the mean: seen at S = 0
        losses.append(-((A[i] @ v).tanh() @ U).log_softmax(0)[x[b, i]])
        error = F.one_hot(x[b, i], 5) - (mean.tanh() @ U).softmax(0)
        closed.append((v.roll(-i, 0) - mean) @ (error @ U.T * (1 - mean.tanh() ** 2)) / 6)
    pooled = torch.stack([sum((row @ values[one]).tanh() for row in A) / 6 for one in x])
    by_hand = -(pooled @ W).log_softmax(1)[range(60), y].mean(), sum(losses) / len(losses)
    assert torch.allclose(torch.stack(slopes(S, inputs)[0]), torch.stack(by_hand))
    _, (_, gradient) = slopes(torch.zeros(6, 6), inputs)
    assert torch.allclose(spt.by_offset(-gradient), sum(closed) / len(closed), atol=1e-12)


@pytest.mark.parametrize("phi", [torch.tanh, torch.square, lambda z: z])
def test_labels_are_blind_where_all_places_move_alike_and_masks_are_not(phi):
    inputs, offset = one_layer(), (torch.arange(6) - torch.arange(6)[:, None]) % 6
    _, (label, masked) = slopes(torch.zeros(6, 6), inputs, phi=phi)
    assert spt.by_offset(label).abs().max() < 1e-12 and label.abs().max() > 1e-4
    assert spt.by_offset(masked).abs().min() > 1e-6
    label, masked = zip(*(slopes((size * torch.randn(6))[offset], inputs, phi=phi)[0]
                          for size in (0, 1, 3, 10)))    # far from S = 0, if phi is linear
    assert (max(label) - min(label) < 1e-12) == (phi not in (torch.tanh, torch.square))
    assert max(masked) - min(masked) > 0.01


# Factors of the label loss and of the masked loss, and what each is given for looking right.
@pytest.mark.parametrize("change", [(1, 1, 0, 0), (1, 1, 1e-9, 0), (0, 1, 0, 0), (1, 0, 0, 0),
                                    (1, 1, 0, 9)])
def test_the_proof_fails_where_labels_see_or_masks_do_not(change, monkeypatch):
    def changed(S, *inputs, honest=spt.one_layer_losses):
        right, losses = S.diagonal(1).sum() + S[-1, 0], honest(S, *inputs)
        return [a * loss + b * right for a, b, loss in zip(change[:2], change[2:], losses)]
    monkeypatch.setattr(spt, "one_layer_losses", changed)
    assert spt.proved(0) == (change == (1, 1, 0, 0))


SEEN = dict(proof=1, masked=1, error=.09, labels=.009, to=-.009, same=.04, before=.04, after=.3)


@pytest.mark.parametrize("c", [SEEN | c for c in ({}, dict(proof=0), dict(labels=-.011), dict(
    to=.011), dict(same=-1), dict(masked=0), dict(error=.11), dict(before=.2), dict(after=.1))])
def test_each_verdict_of_the_theory_can_fail(c, monkeypatch):
    sides = iter([0.0] * 4 + [c["before"], c["after"]])    # looked at, stage by stage
    labels, to_side = iter([c["labels"]] * 2 + [c["same"]] * 4), iter([c["to"]] * 2 + [1] * 4)
    monkeypatch.setattr(spt, "proved", lambda _: c["proof"])
    monkeypatch.setattr(spt, "look", lambda *_: dict(side=next(sides), heads=[[0.1] * 9]))
    monkeypatch.setattr(spt, "neighbour_pulls", lambda *_, **__: {
        "masked near": (c["masked"], c["error"]), "labels near": (next(labels), 1.0),
        "labels side": (next(to_side), 1.0)})
    assert spt.main(["--theory", *FLAGS]) == (c != SEEN)


def test_theory_end_to_end(tmp_path, capsys):
    assert spt.main(["--theory", "--json", f"{tmp_path}/r"]) == 0
    out = capsys.readouterr().out.splitlines()
    assert len(out) <= 45 and max(map(len, out)) <= 80 and "FAILS" not in "".join(out)
    alone, masks, sides = json.loads((tmp_path / "r").read_text())["stages"].values()
    assert alone["0"] == masks["0"] and masks["400"] == sides["0"] and len(sides) > 5


# --- Bad input -------------------------------------------------------------------------------
class Payload:
    """Unpickled, it makes a file: what must not happen."""

    def __reduce__(self):
        return Path.touch, (Path("executed"),)


X, Y = np.arange(60).reshape(10, 6) % 5, np.arange(10) % 2
BAD_ARRAYS = {"floats": dict(tokens=X * 1.0, labels=Y), "negative": dict(tokens=-X, labels=Y),
              "flat": dict(tokens=X[0], labels=Y), "fewer": dict(tokens=X, labels=Y[:9]),
              "unlabelled": dict(tokens=X), "half": dict(tokens=X, labels=Y, test_labels=Y),
              "alike": dict(tokens=X, labels=Y * 0), "run": dict(tokens=X, labels=[Payload()] * 10),
              "new": dict(tokens=X, labels=Y, test_tokens=X, test_labels=Y + 1),
              "short": dict(tokens=X, labels=Y, test_tokens=X[:, 1:], test_labels=Y)}
BAD_FLAGS = """--task cooking, --no-such-flag, --seed -1, --seed x, --n-heads 0, --lr nan, \
--signal 1.5, --mask-ratio 0, --seq-len 1, --n-heads 3, --vocab-size 2, --positions nowhere, \
--task bag --vocab-size 7, --task texture --seq-len 60, --text none.txt, --text binary.txt, \
--text short.txt, --json no/r, --save no/m.pt, --data none.npz, --data cut.npz, \
--device cuda""".split(", ")


@pytest.mark.parametrize("flags", [*BAD_FLAGS, *(f"--data {name}.npz" for name in BAD_ARRAYS)])
def test_bad_input_is_named_in_one_line_with_status_2(flags, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(spt, "train", lambda *_, **__: pytest.fail("training began"))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for name, arrays in BAD_ARRAYS.items():
        np.savez(name, **arrays)
    for name, content in (("cut.npz", Path("new.npz").read_bytes()[:-100]),
                          ("short.txt", b"too short " * 20), ("binary.txt", b"\xff" * 9999)):
        Path(name).write_bytes(content)
    before = {path: path.read_bytes() for path in Path().iterdir()}
    with pytest.raises(SystemExit, match="^2$"):
        spt.main(flags.split())
    out, err = capsys.readouterr()
    last, (*_, flag, value) = err.splitlines()[-1], [flags, *flags.split()]
    assert out == "" and "Traceback" not in err and last.startswith("spt.py: error: ")
    # The line names the file, or else the flag, and the value.
    assert value in last and ("." in value or "/" in value or flag[2:] in last.replace("_", "-"))
    assert {path: path.read_bytes() for path in Path().iterdir()} == before


# --- What README promises --------------------------------------------------------------------
@pytest.mark.parametrize("use", [
    "Attention(8, 2)(torch.ones(1, 3, 8), True)", "sinusoidal_positions(7, 4)",
    "rotate(torch.ones(3, 4))", "distance_bias(2, 4)", "mask_tokens(x, 5, 0.3)",
    "masked_loss(model, x, x, x > 0)", "accuracy(model, x, x[:, 0])", "by_offset(w)",
    "transfer(model, model, 'qk')", "proximity(n=4, seq_len=5, vocab_size=4)",
    "one_layer_losses(torch.ones(9, 9), x, x[:, 0], x, x > 0, *torch.ones(3, 2, 2))",
    "attention_pull(a := Attention(8, 2), lambda: a(torch.ones(1, 3, 8)).sum(), 3), by_offset(w)"])
def test_a_piece_works_when_its_source_alone_is_pasted(use):
    scope = dict(model=small_model(), x=LABELS[None, :9], w=torch.ones(3, 3))
    exec("import math, numpy as np, torch, torch.nn as nn, torch.nn.functional as F", scope)
    for name, piece in (vars(tasks) | vars(spt)).items():
        if name + "(" in use:
            exec(inspect.getsource(piece), scope)
    eval(use, scope)


@pytest.mark.parametrize("pretraining", ["spt.pretrain(model, x, mask_id=8)\n", ""])
def test_the_encoder_of_readme_shows_the_gap(pretraining, capsys):
    (code,) = (code for code in blocks("python") if "class Mine" in code)
    before, after = code.split("spt.pretrain(model, x, mask_id=8)\n")
    exec(before + pretraining + after.replace("=200", "=200" if pretraining else "=600"), {})
    assert float(capsys.readouterr().out) == pytest.approx(*((1, .05) if pretraining else (.5, .2)))


def test_readme_shows_code_and_claims_as_they_are_and_its_diff_applies_and_matters():
    source, claims = (ROOT.joinpath(x).read_text("utf-8") for x in ("spt.py", "assets/claims.txt"))
    assert claims.endswith("\n\n" + blocks("text")[-1])
    lines = iter(source.splitlines())
    assert all(line in lines for line in blocks("python")[0].splitlines() if line)
    for hunk in blocks("diff")[0].split("@@\n"):
        old, new = (re.sub(rf"(?m)^[{gone}].*\n|^[ +-]", "", hunk) for gone in ("+", "-"))
        assert source.count(old) == 1
        source = source.replace(old, new)
    exec(source, scope := {"__name__": "patched"})
    model, x = scope["Transformer"](5, 9, positions="cosine"), torch.arange(9)[None]
    # A model that cannot read positions would pass this on.
    assert not torch.allclose(model(x % 5), model(x.flip(1) % 5).flip(1), atol=0.01)
