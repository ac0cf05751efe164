"""Self-pretraining (SPT) of a Transformer for sequence classification, explained by one file that runs.

    python spt.py --task proximity --spt      pretrain on masked tokens, then fine-tune on labels
    python spt.py --task proximity            labels only, for the same total of steps
    python spt.py --task proximity --compare  both, several seeds, the gap, the attention picture
    python spt.py --help                      every flag: they are the fields of `Config`

The first command takes @SECONDS@ and ends with

@OUTPUT@

while the second ends near 0.500. Both arms see the same sequences, the same labels, the same initial
weights and the same number of steps. After arXiv 2605.21070 (2026) and Amos et al., arXiv 2310.02980;
the tasks and the set-up are this project's own, see README.md.

The story, top to bottom: Config; positions; attention, block, model; masking and the two training
loops; probes that look inside; one run; the command line.

Letters in shape comments: B sequences in a batch, T tokens in a sequence, C width (d_model),
H attention heads, D = C / H width of a head, V symbols (token V is the mask), K classes, L layers.
"""
import argparse
import copy
import errno
import io
import json
import math
import multiprocessing
import os
import shlex
import signal
import statistics
import sys
import textwrap
import time
import warnings
from concurrent.futures import BrokenExecutor, ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass, field, fields, replace
from types import SimpleNamespace

import torch
from torch import nn
from torch.nn import functional as F
from torch.optim.adamw import adamw
from tqdm import tqdm

from synthetic_tasks import TASKS, best_possible_accuracy, count_baseline, from_file, make_task

# ---------------------------------------------------------------------------------------------
# Config. Every default lives here and nowhere else, and the command line is made from it, so
# that help, flags and code cannot drift apart.
# ---------------------------------------------------------------------------------------------
POSITIONS = ("sinusoidal", "learned", "rotary", "distance", "symmetric", "none")


def option(default, help, low=None, high=None, choices=None):
    """A field of Config: its default, the help of its flag, and the values it may take."""
    return field(default=default, metadata=dict(help=help, low=low, high=high, choices=choices))


@dataclass(frozen=True)
class Config:
    """One run, or one comparison of runs. Raises ValueError for a value that makes no sense."""
    # what to do
    task: str = option("proximity", "what to classify", choices=TASKS)
    spt: bool = option(False, "pretrain on masked tokens first; without it, labels get all steps")
    compare: bool = option(False, "both arms over several seeds, side by side")
    reproduce: bool = option(False, "measure every claim, with a verdict; status 1 if one fails")
    quick: bool = option(False, "with --reproduce: one seed and the fast rows only")
    theory: bool = option(False, "what labels and masked tokens see of the attention scores")
    seed: int = option(0, "seed of data, weights, batches and masks", 0, 2**31)
    seeds: int = option(3, "seeds in --compare and --reproduce, counted from --seed", 1, 1000)
    jobs: int = option(os.cpu_count(), "processes that share the runs of --compare and --reproduce", 1, 256)
    threads: int = option(1, "threads in each process; a second one gains nothing here", 1, 256)
    device: str = option("cpu", "where the tensors live: cpu, cuda, mps")
    json: str = option(None, "file to append results to, one JSON object per finished run")
    save: str = option(None, "file to write the weights to at the end")
    load: str = option(None, "file of --save to start from, in place of random weights")
    # the data
    n_train: int = option(2000, "training sequences (text: at most)", 2, 10**7)
    n_test: int = option(2000, "test sequences (text: at most)", 2, 10**7)
    seq_len: int = option(64, "tokens in a sequence, T", 2, 2**16)
    vocab_size: int = option(8, "symbols, V", 2, 10**5)
    signal: float = option(0.5, "how often a token tells of its class (not text)", 0.0, 1.0)
    lag: int = option(1, "how far apart the neighbours of proximity stand", 1, 2**16)
    text: str = option(None, "UTF-8 file for text, in place of Python's own manual")
    data: str = option(None, "your own sequences: .npz with tokens (n, T) and labels (n,)")
    # the model
    positions: str = option("sinusoidal", "how the model knows positions", choices=POSITIONS)
    n_layers: int = option(1, "blocks, L", 1, 1000)
    d_model: int = option(32, "width, C", 2, 2**14)
    n_heads: int = option(2, "attention heads, H", 1, 2**10)
    d_ff: int = option(64, "width inside the MLP", 1, 2**16)
    # the training
    pretrain_steps: int = option(300, "steps of masked reconstruction", 1, 10**8)
    finetune_steps: int = option(100, "steps on labels", 0, 10**8)
    batch_size: int = option(32, "sequences in a step, B", 1, 10**5)
    lr: float = option(0.01, "peak learning rate", 1e-8, 10.0)
    mask_ratio: float = option(0.3, "share of tokens hidden in pretraining", 0.01, 0.99)
    transfer: str = option("all", "which pretrained weights fine-tuning starts from", choices=("all", "qk", "not-qk"))
    freeze_qk: bool = option(False, "keep query and key maps as they are while fine-tuning")

    def __post_init__(self):
        for f in fields(self):
            value, rule = getattr(self, f.name), f.metadata
            if rule["choices"] and value not in rule["choices"]:
                raise ValueError(f"{f.name} {value}: must be one of {', '.join(rule['choices'])}")
            if rule["low"] is not None and not rule["low"] <= value <= rule["high"]:
                raise ValueError(f"{f.name} {value}: must be from {rule['low']} to {rule['high']}")
        if self.d_model % (2 * self.n_heads):
            raise ValueError(f"n_heads {self.n_heads}: d_model, {self.d_model}, must be a multiple of 2 x heads")
        if self.lag > 1 and self.task != "proximity":
            raise ValueError(f"lag {self.lag}: only proximity has a lag")
        if self.text is not None and self.task != "text":
            raise ValueError(f"text {self.text}: goes with --task text")
        if max(self.n_train, self.n_test) * self.seq_len > 10**9:
            raise ValueError(f"n_train {self.n_train}: times seq_len is more than 10^9 tokens")
        if self.batch_size * self.seq_len > 2**23:
            raise ValueError(f"batch_size {self.batch_size}: times seq_len is more than 2^23 tokens")
        if self.n_layers * self.d_model * (4 * self.d_model + 2 * self.d_ff) > 10**9:
            raise ValueError(f"n_layers {self.n_layers}: with these widths, more than 10^9 weights")


# A task may bring its own recipe: what differs from the defaults above. Both arms share it.
RECIPES = {
    "text": dict(n_train=20_000, n_test=5_000, vocab_size=41, pretrain_steps=1200,
                 finetune_steps=400),
    "texture": dict(signal=0.6, pretrain_steps=300, finetune_steps=200),
    "bag": dict(signal=0.2),
}


def recipe(task, **changes):
    """Config of `task`: the defaults, then the task's own recipe, then `changes`."""
    return Config(**{"task": task, **RECIPES.get(task, {}), **changes})


# ---------------------------------------------------------------------------------------------
# Positions. Attention by itself sees a bag of tokens; these are the ways to tell it the order.
# The first gives *absolute* positions and leaves it to the query-key maps to make proximity out
# of them, which is what labels fail to teach. The others put proximity in by hand.
# ---------------------------------------------------------------------------------------------
def sinusoidal_positions(seq_len, d_model):
    """PE[t, 2i] = sin(t / 10000^(2i/C)), PE[t, 2i+1] = cos(same)   (Vaswani et al. 2017, sec. 3.5)

    Returns (T, C) float32, d_model even. The inner product of rows s and t depends on s - t alone.
    """
    position = torch.arange(seq_len)[:, None]                                     # (T, 1)
    frequency = 10000.0 ** (-torch.arange(0, d_model, 2) / d_model)               # (C/2,)
    angle = position * frequency                                                  # (T, C/2)
    return torch.stack([angle.sin(), angle.cos()], dim=-1).flatten(1)             # (T, C)


def rotate(x):
    """Rotary positions: turn pair i of token t by the angle t / 10000^(2i/D)   (Su et al. 2021, sec. 3.2)

    x (..., T, D) with D even -> the same shape. Rotated queries and keys have inner products that
    depend on positions only through their difference: proximity comes with the encoding.
    """
    T, D = x.shape[-2:]
    position = torch.arange(T, dtype=x.dtype, device=x.device)[:, None]           # (T, 1)
    pair = torch.arange(0, D, 2, dtype=x.dtype, device=x.device)                  # (D/2,)
    angle = position * 10000.0 ** (-pair / D)                                     # (T, D/2)
    a, b = x[..., 0::2], x[..., 1::2]                                             # (..., T, D/2) each
    turned = a * angle.cos() - b * angle.sin(), a * angle.sin() + b * angle.cos()
    return torch.stack(turned, dim=-1).flatten(-2)                                # (..., T, D)


def distance_bias(n_heads, seq_len, one_sided=True):
    """Scores' bias -slope * |i - j|, a penalty per step away (ALiBi, Press et al. 2022, sec. 3)

    Returns (H, T, T) float32, to be added to the scores. ALiBi looks left only; here even heads
    look left and odd heads right (-inf on the other side). The slopes are 1, 1, 1/2, 1/2, ...
    With `one_sided=False` every head sees both sides alike, a function of |i - j|.
    """
    offset = torch.arange(seq_len) - torch.arange(seq_len)[:, None]               # (T, T), j - i
    head = torch.arange(n_heads)[:, None, None]                                   # (H, 1, 1)
    bias = -(0.5 ** (head // 2)) * offset.abs()                                   # (H, T, T)
    if one_sided:
        wrong_side = torch.where(head % 2 == 0, offset > 0, offset < 0)           # (H, T, T)
        bias = bias.masked_fill(wrong_side, -math.inf)                            # (H, T, T)
    return bias


# ---------------------------------------------------------------------------------------------
# The model: one pre-norm Transformer encoder with two heads, one that fills in masked tokens
# and one that classifies. Linear maps inside it have no bias: it bought nothing and costs time.
# ---------------------------------------------------------------------------------------------
class Attention(nn.Module):
    """Multi-head self-attention, softmax(q kᵀ / √D + bias) v   (Vaswani et al. 2017, sec. 3.2)

    x (B, T, C) -> (B, T, C); with `return_weights=True` also the attention weights (B, H, T, T),
    by the formula as it reads. Otherwise PyTorch's fused kernel computes the same numbers without
    ever keeping a T x T tensor. `query_key` decides where to look, `value` and `out` what to bring.
    """

    def __init__(self, d_model, n_heads, rotary=False, bias=None):
        super().__init__()
        self.n_heads, self.rotary = n_heads, rotary
        self.query_key = nn.Linear(d_model, 2 * d_model, bias=False)
        self.value = nn.Linear(d_model, d_model, bias=False)
        self.out = nn.Linear(d_model, d_model, bias=False)
        self.register_buffer("bias", bias, persistent=False)                      # (H, T, T) or None

    def forward(self, x, return_weights=False):
        q, k = self.query_key(x).chunk(2, dim=-1)                                 # (B, T, C) each
        q, k, v = (t.unflatten(-1, (self.n_heads, -1)).transpose(1, 2)            # (B, H, T, D) each
                   for t in (q, k, self.value(x)))
        if self.rotary:
            q, k = rotate(q), rotate(k)                                           # (B, H, T, D) each
        if return_weights:
            scores = q @ k.mT / math.sqrt(q.shape[-1])                            # (B, H, T, T)
            scores = scores if self.bias is None else scores + self.bias          # (B, H, T, T)
            weights = scores.softmax(dim=-1)                                      # (B, H, T, T)
            return self.out((weights @ v).transpose(1, 2).flatten(2)), weights    # (B, T, C), ...
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=self.bias)          # (B, H, T, D)
        return self.out(y.transpose(1, 2).flatten(2))                             # (B, T, C)


class Block(nn.Module):
    """Pre-norm residual block: x + attention(norm(x)), then x + mlp(norm(x))."""

    def __init__(self, attention, d_model, d_ff):
        super().__init__()
        self.attention = attention
        self.norm1, self.norm2 = nn.LayerNorm(d_model), nn.LayerNorm(d_model)
        # ReLU as in Vaswani et al.: GELU reaches the same accuracies, and its erf costs 4 % of a step.
        self.mlp = nn.Sequential(nn.Linear(d_model, d_ff, bias=False), nn.ReLU(),
                                 nn.Linear(d_ff, d_model, bias=False))

    def forward(self, x):
        x = x + self.attention(self.norm1(x))                                     # (B, T, C)
        return x + self.mlp(self.norm2(x))                                        # (B, T, C)


class Transformer(nn.Module):
    """Encoder with a reconstruction head and a classification head; no causal mask, no dropout.

    tokens (B, T) int64 in [0, V], where V is the mask symbol:
        model(tokens)             -> (B, T, C)  features
        model.reconstruct(tokens) -> (B, T, V)  logits of the symbol that stands at each place
        model.classify(tokens)    -> (B, K)     logits of the class, from the mean over places
    """

    def __init__(self, config, n_classes=2):
        super().__init__()
        T, V, C, H = config.seq_len, config.vocab_size, config.d_model, config.n_heads
        self.token_embedding = nn.Embedding(V + 1, C)
        # At std 1 (PyTorch's default) tokens drown the positions, whose entries are of size 0.7,
        # and the scores take twice as many steps to turn positions into proximity.
        nn.init.normal_(self.token_embedding.weight, std=0.5)
        if config.positions == "learned":
            self.positions = nn.Parameter(0.7 * torch.randn(T, C))                # (T, C)
        else:
            fixed = sinusoidal_positions(T, C) if config.positions == "sinusoidal" else None
            self.register_buffer("positions", fixed, persistent=False)            # (T, C) or None
        bias = None
        if config.positions in ("distance", "symmetric"):
            bias = distance_bias(H, T, one_sided=config.positions == "distance")  # (H, T, T)
        self.blocks = nn.ModuleList(
            Block(Attention(C, H, rotary=config.positions == "rotary", bias=bias), C, config.d_ff)
            for _ in range(config.n_layers))
        self.norm = nn.LayerNorm(C)
        self.reconstruction_head = nn.Linear(C, V)
        self.class_head = nn.Linear(C, n_classes)

    def embed(self, tokens):
        x = self.token_embedding(tokens)                                          # (B, T, C)
        return x if self.positions is None else x + self.positions                # (B, T, C)

    def forward(self, tokens):
        x = self.embed(tokens)                                                    # (B, T, C)
        for block in self.blocks:
            x = block(x)                                                          # (B, T, C)
        return self.norm(x)                                                       # (B, T, C)

    def reconstruct(self, tokens):
        return self.reconstruction_head(self(tokens))                             # (B, T, V)

    def classify(self, tokens):
        return self.class_head(self(tokens).mean(dim=1))                          # (B, K)


def new_model(config, n_classes=2):
    """A Transformer at its random start. The weights depend on the config's seed and on nothing else."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        return Transformer(config, n_classes).to(config.device)


# ---------------------------------------------------------------------------------------------
# Training. Pretraining and fine-tuning are the same loop around two losses: one asks for the
# tokens that were hidden, the other for the label. Neither sees the test sequences.
# ---------------------------------------------------------------------------------------------
def mask_tokens(tokens, mask_id, mask_ratio, generator=None):
    """Hide each token with probability `mask_ratio`, independently of the others.

    tokens (B, T) int64 -> corrupted (B, T), where hidden tokens are replaced by `mask_id`, and
    is_masked (B, T) bool, True where a token was hidden and is to be predicted. `generator` is a
    CPU torch.Generator. Unlike BERT, a hidden token is always replaced by the mask symbol.
    """
    is_masked = (torch.rand(tokens.shape, generator=generator) < mask_ratio).to(tokens.device)  # (B, T)
    return tokens.masked_fill(is_masked, mask_id), is_masked


def masked_loss(model, tokens, corrupted, is_masked):
    """Mean cross-entropy in nats of the hidden tokens, and of no others; 0 if none is hidden."""
    features = model(corrupted)[is_masked]                                        # (N, C), N hidden
    logits = model.reconstruction_head(features)                                  # (N, V)
    return F.cross_entropy(logits, tokens[is_masked], reduction="sum") / max(len(logits), 1)


class AdamW:
    """Adam with decoupled weight decay (Loshchilov & Hutter 2019, algorithm 2), PyTorch's fused kernel.

    The same numbers as torch.optim.AdamW, whose first use imports PyTorch's compiler: 1.5 s that a run
    of a few seconds need not spend. beta_1 is 0.8, not 0.9: with less momentum the weights leave the
    plateau, before the neighbours are found, in fewer steps.
    """

    def __init__(self, weights, betas=(0.8, 0.99), eps=1e-8, weight_decay=0.01):
        self.betas, self.eps, self.weight_decay = betas, eps, weight_decay
        self.state = [(w, torch.zeros_like(w), torch.zeros_like(w), torch.zeros((), device=w.device))
                      for w in weights]    # the weight, means of its gradient and of its square, steps

    @torch.no_grad()
    def step(self, lr):
        """One step down the gradients, which are then cleared. A weight without one is left alone."""
        weights, means, squares, counts = map(list, zip(*(s for s in self.state if s[0].grad is not None)))
        adamw(weights, [w.grad for w in weights], means, squares, [], counts, lr=lr, beta1=self.betas[0],
              beta2=self.betas[1], eps=self.eps, weight_decay=self.weight_decay, amsgrad=False,
              maximize=False, fused=True)
        for w in weights:
            w.grad = None


def optimize(model, batch_loss, n_sequences, n_steps, config, phase, on_step=None):
    """The loop that both phases share: AdamW, 10 % linear warm-up, then cosine decay to a tenth.

    `batch_loss(rows)` gives the loss of the sequences `rows` (B,). Returns the loss of every step.
    Raises FloatingPointError when the loss is no longer a finite number.
    """
    optimizer = AdamW(weight for weight in model.parameters() if weight.requires_grad)
    generator = torch.Generator().manual_seed(config.seed + 2**32)                # batches only
    losses = []
    bar = tqdm(range(n_steps), desc=phase, unit=" steps", disable=None)           # silent off a terminal
    for step in bar:
        warm_up = min(1.0, (step + 1) / (0.1 * n_steps))
        decay = 0.55 + 0.45 * math.cos(math.pi * max(0.0, step / n_steps - 0.1) / 0.9)
        rows = torch.randint(n_sequences, (config.batch_size,), generator=generator)  # (B,)
        loss = batch_loss(rows.to(config.device))                                 # ()
        loss.backward()
        optimizer.step(config.lr * warm_up * decay)
        losses.append(loss.item())
        if not math.isfinite(losses[-1]):
            raise FloatingPointError(f"lr {config.lr}: the loss of {phase} is {losses[-1]} at step {step + 1}")
        bar.set_postfix_str(f"loss {losses[-1]:.3f}", refresh=False)
        if on_step:
            on_step(step + 1)
    return losses


def pretrain(model, tokens, config):
    """Masked reconstruction of tokens (n, T) for `config.pretrain_steps`; returns all losses, in nats.

    The loss starts near ln V, lingers there, and falls once attention has found the neighbours.
    """
    generator = torch.Generator().manual_seed(config.seed + 2**33)                # masks only

    def batch_loss(rows):
        batch = tokens[rows]                                                      # (B, T)
        return masked_loss(model, batch, *mask_tokens(batch, config.vocab_size, config.mask_ratio, generator))
    return optimize(model, batch_loss, len(tokens), config.pretrain_steps, config, "pretraining")


def finetune(model, tokens, labels, config, on_step=None):
    """Train on tokens (n, T) and labels (n,) for `config.finetune_steps`; returns all losses, in nats.

    Nothing is masked now. Label training alone is this same function, given all the steps.
    `on_step(step)` is called after every step.
    """
    for name, weight in model.named_parameters():
        weight.requires_grad_(not (config.freeze_qk and "query_key" in name))

    def batch_loss(rows):
        return F.cross_entropy(model.classify(tokens[rows]), labels[rows])
    return optimize(model, batch_loss, len(tokens), config.finetune_steps, config, "fine-tuning", on_step)


@torch.no_grad()
def accuracy(model, tokens, labels, batch_size=256):
    """Share of the sequences (n, T) whose most likely class is their label (n,)."""
    hits = sum((model.classify(x).argmax(dim=-1) == y).sum().item()
               for x, y in zip(tokens.split(batch_size), labels.split(batch_size)))
    return hits / len(labels)


# ---------------------------------------------------------------------------------------------
# Probes. What was learned, and where does it sit? Move only some of the weights into a fresh
# model, and look at how far attention reaches.
# ---------------------------------------------------------------------------------------------
def transfer(source, target, which="all"):
    """Copy the encoder of `source` into `target`: "all" of it, its query and key maps ("qk"), or "not-qk".

    The classification head of `target` stays fresh in every case. Returns the names that were copied.
    """
    moved = {name: weight for name, weight in source.state_dict().items()
             if not name.startswith("class_head")
             and (which == "all" or ("query_key" in name) == (which == "qk"))}
    target.load_state_dict(moved, strict=False)
    return list(moved)


@torch.no_grad()
def attention_by_offset(model, tokens):
    """Where attention goes, by offset key minus query: (L, H, 2T - 1), offset o at index T - 1 + o.

    Entry o is the mean over sequences of (1/T) Σ_i A[i, i + o], so each row sums to 1. For
    uniform attention it is (T - |o|) / T².
    """
    x, rows = model.embed(tokens), []                                             # (B, T, C)
    T = tokens.shape[1]
    for block in model.blocks:
        _, weights = block.attention(block.norm1(x), return_weights=True)         # (B, H, T, T)
        weights = weights.mean(dim=0)                                             # (H, T, T)
        rows.append(torch.stack([weights.diagonal(o, dim1=-2, dim2=-1).sum(dim=-1) / T
                                 for o in range(1 - T, T)], dim=-1))              # (H, 2T - 1)
        x = block(x)                                                              # (B, T, C)
    return torch.stack(rows)                                                      # (L, H, 2T - 1)


# ---------------------------------------------------------------------------------------------
# One run, start to end: data, model, training, measurements.
# ---------------------------------------------------------------------------------------------
def load_data(config):
    """Train tokens (n, T), train labels (n,), test tokens and test labels, int64 arrays."""
    if config.data is not None:
        return from_file(config.data, seed=config.seed)
    return make_task(config.task, n_train=config.n_train, n_test=config.n_test,
                     seq_len=config.seq_len, vocab_size=config.vocab_size, signal=config.signal,
                     lag=config.lag, path=config.text, seed=config.seed)


def neighbour_offsets(config):
    """The offsets, key minus query, of the tokens that tell the class together with the query's."""
    steps = {"proximity": [config.lag], "texture": [1, math.isqrt(config.seq_len)]}
    return [side * step for step in steps.get(config.task, [1]) for side in (-1, 1)]


def run(config):
    """Train one arm and measure it; returns plain numbers, ready for JSON.

    `curve` is the accuracy on the first 256 test sequences, [[step, accuracy], ...], with the
    steps of pretraining counted. `attention_by_offset` is the mean over heads and layers.
    """
    start = time.perf_counter()
    torch.set_num_threads(config.threads)
    data = load_data(config)
    x, y, x_test, y_test = (torch.from_numpy(a).to(config.device) for a in data)  # (n, T), (n,), twice
    n_classes = int(y.max()) + 1
    if not config.spt and config.load is None:    # the same total of steps, all of them on labels
        config = replace(config, finetune_steps=config.pretrain_steps + config.finetune_steps)
    pretrain_steps = config.pretrain_steps if config.spt else 0
    every = math.ceil((pretrain_steps + config.finetune_steps) / 20)                  # 20 looks at most
    curve, attention, masked_losses = [], {}, [math.nan]

    def follow(step):
        if step % every == 0 or step == config.finetune_steps:
            curve.append([pretrain_steps + step, accuracy(model, x_test[:256], y_test[:256])])

    def look(stage, model):
        sample = x_test[:max(1, 2**20 // config.seq_len**2)]                      # (B, T), B T² bounded
        attention[stage] = attention_by_offset(model, sample).mean(dim=(0, 1)).tolist()  # 2T - 1

    model = new_model(config, n_classes)
    if config.load is not None:
        load_weights(config.load, model, config)
    look("start", model)
    if config.spt:
        pretrained = copy.deepcopy(model)
        masked_losses = pretrain(pretrained, x, config)
        look("pretraining", pretrained)
        transfer(pretrained, model, config.transfer)
    finetune(model, x, y, config, follow)
    look("fine-tuning" if config.spt or config.load else "label training", model)
    if config.save is not None:
        save_weights(config.save, model, config)
    middle, reach = config.seq_len - 1, min(config.seq_len - 1, 16)
    neighbours = [middle + offset for offset in neighbour_offsets(config)]
    return dict(
        task=config.data or config.task, arm="spt" if config.spt else "labels", seed=config.seed, lr=config.lr,
        train_accuracy=accuracy(model, x[:5000], y[:5000]), test_accuracy=accuracy(model, x_test, y_test),
        chance=y_test.bincount().max().item() / len(y_test), count_baseline=count_baseline(*data),
        best_possible=None if config.data else best_possible_accuracy(
            config.task, *data[2:], vocab_size=config.vocab_size, lag=config.lag),
        pretrain_steps=pretrain_steps, finetune_steps=config.finetune_steps,
        steps_to_95=next((step for step, reached in curve if reached >= 0.95), None),
        n_parameters=sum(weight.numel() for weight in model.parameters()),
        n_train=len(x), n_test=len(x_test), seconds=time.perf_counter() - start, curve=curve,
        neighbour_attention={stage: sum(mass[i] for i in neighbours) for stage, mass in attention.items()},
        attention_by_offset={stage: [[i - middle, mass[i]] for i in range(middle - reach, middle + reach + 1)]
                             for stage, mass in attention.items()},
        config=asdict(config))


SHAPE = "seq_len", "vocab_size", "positions", "n_layers", "d_model", "n_heads", "d_ff"


def save_weights(path, model, config):
    """Write weights and Config. A kill at any moment leaves the old file or the new one, never half."""
    buffer, temporary = io.BytesIO(), f"{path}.{os.getpid()}.tmp"
    torch.save({"config": asdict(config), "weights": model.state_dict()}, buffer)
    try:
        with open(temporary, "wb") as file:
            file.write(buffer.getbuffer())
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError:
        os.remove(temporary)
        raise


def load_weights(path, model, config):
    """Fill `model` with the weights of a file of `save_weights`; no code in the file is ever run.

    Raises OSError, and ValueError for another kind of file or one made for another shape.
    """
    try:
        with warnings.catch_warnings():    # torch warns of pickles by others; the refusal says enough
            warnings.simplefilter("ignore")
            saved = torch.load(path, map_location=config.device, weights_only=True)
        weights, made_for = saved["weights"], [saved["config"][name] for name in SHAPE]
        model_shapes = {name: tuple(w.shape) for name, w in model.state_dict().items()}
        saved_shapes = {name: tuple(w.shape) for name, w in weights.items()}
    except OSError:
        raise
    except Exception as error:    # torch and pickle raise a dozen kinds on a file that is none of ours
        raise ValueError(f"load {path}: no file of --save ({type(error).__name__})") from None
    for name, theirs in zip(SHAPE, made_for):
        if theirs != getattr(config, name):
            raise ValueError(f"load {path}: made for {name} {theirs}, this model has {getattr(config, name)}")
    for name in model_shapes | saved_shapes:
        if model_shapes.get(name) != saved_shapes.get(name):
            raise ValueError(f"load {path}: its {name} is {saved_shapes.get(name)}, "
                             f"this model's {model_shapes.get(name)}")
    model.load_state_dict(weights)


# ---------------------------------------------------------------------------------------------
# Many runs: rows of a table. A row is a list of configs that differ in nothing but the seed, and,
# for label training, in the learning rate, where it gets the best of several on the *test* set.
# ---------------------------------------------------------------------------------------------
LABEL_LRS = 1e-3, 3e-3, 1e-2


def run_all(tagged, jobs, json_path):
    """Run every config of [(tags, config), ...], `jobs` at a time, each in a process of its own.

    Returns the results in the order asked for; a run computes the same numbers in whichever process
    it lands. A finished run goes to `json_path` at once, with its tags (a dict) beside the numbers.
    """
    results = [None] * len(tagged)
    with ProcessPoolExecutor(min(jobs, len(tagged)), initializer=start_worker) as pool:
        longest_first = sorted(range(len(tagged)), key=lambda i: -work(tagged[i][1]))
        place = {pool.submit(run, tagged[i][1]): i for i in longest_first}
        try:
            for done in tqdm(as_completed(place), total=len(place), desc="runs", unit=" runs", disable=None):
                i = place[done]
                results[i] = done.result()
                append_json(json_path, {**tagged[i][0], **results[i]})
        except BaseException:    # one run failed, or Ctrl-C: end the others now
            for worker in multiprocessing.active_children():
                worker.kill()
            raise
    return results


def work(config):
    """About how long a run takes, in no particular unit."""
    return (config.pretrain_steps + config.finetune_steps) * config.batch_size * config.seq_len * config.n_layers


def start_worker():
    """Progress bars and Ctrl-C belong to the parent process."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    sys.stderr = open(os.devnull, "w")


def append_json(path, record):
    """Add one line to the file, whole or not at all; no path, no file."""
    if path is None:
        return
    line = json.dumps(record).encode() + b"\n"
    with open(path, "ab", buffering=0) as file:
        end = file.seek(0, os.SEEK_END)
        if file.write(line) < len(line):
            file.truncate(end)
            raise OSError(errno.ENOSPC, "the disk is full, this line was left out", path)


# ---------------------------------------------------------------------------------------------
# What a person sees, in 80 columns.
# ---------------------------------------------------------------------------------------------
def say(text):
    """Print; where the terminal has no Unicode, bars become digits from 1 to 8."""
    try:
        text.encode(sys.stdout.encoding or "ascii")
    except UnicodeEncodeError:
        text = text.translate(str.maketrans("▁▂▃▄▅▆▇█±", "12345678~"))
    print(text, flush=True)


def bars(values, top):
    """Numbers from 0 to `top` as a row of bars."""
    return "".join("▁▂▃▄▅▆▇█"[min(7, int(8 * value / top))] for value in values)


def mean_curve(curves):
    """Mean of the second column over runs: [[[x, y], ...], ...] -> the x, the mean y."""
    return [x for x, _ in curves[0]], [statistics.mean(y) for y in zip(*([y for _, y in curve] for curve in curves))]


def show_attention(results):
    """Attention mass by offset, a row of bars per stage of training, averaged over the runs."""
    rows = {}
    for stage in ("start", "label training", "pretraining", "fine-tuning"):
        seen = [result for result in results if stage in result["attention_by_offset"]]
        if seen:
            offsets, mass = mean_curve([result["attention_by_offset"][stage] for result in seen])
            rows[stage] = mass, statistics.mean(result["neighbour_attention"][stage] for result in seen)
    top, half = max(max(mass) for mass, _ in rows.values()), len(offsets) // 2
    say(f"  {'attention by offset':<20}{offsets[0]:<+{half}}0{offsets[-1]:>+{half}}  on the neighbours")
    for stage, (mass, near) in rows.items():
        say(f"  {stage:<20}{bars(mass, top)}  {near:.3f}")


def yardsticks(result):
    """What the accuracies are to be compared with."""
    best = result["best_possible"]
    return (f"chance {result['chance']:.3f}, counting tokens {result['count_baseline']:.3f}, "
            f"best possible {'not known' if best is None else f'{best:.3f}'}")


def single(config, argv):
    """Train one arm and say what came out."""
    result = run(config)
    append_json(config.json, result)
    say(f"{result['task']}: {result['n_train']:,} training sequences of {config.seq_len} tokens, "
        f"{result['n_parameters']:,} weights, seed {config.seed}")
    before = f"{result['pretrain_steps']:,} steps on masked tokens, then " if config.spt else ""
    say(f"trained for {before}{result['finetune_steps']:,} steps on labels, in {result['seconds']:.1f} s")
    show_attention([result])
    other = [flag for flag in argv if flag != "--spt"] if config.spt else [*argv, "--spt"]
    say(f"the other arm: {shlex.join(['python', 'spt.py', *other])}")
    say(yardsticks(result))
    say(f"train accuracy {result['train_accuracy']:.3f}")
    say(f"test accuracy  {result['test_accuracy']:.3f}")


def spread(values):
    """Mean ± standard deviation over runs."""
    return f"{statistics.mean(values):.3f}" + (f" ± {statistics.stdev(values):.3f}" if len(values) > 1 else "")


def row_of(name, results):
    """A line of the table: accuracies, the steps until 95 % of the test sequences were right, attention."""
    reached = [r["steps_to_95"] for r in results if r["steps_to_95"]]
    steps = f"{statistics.mean(reached):,.0f}" if reached else \
        f"not in {results[0]['pretrain_steps'] + results[0]['finetune_steps']:,}"
    if 0 < len(reached) < len(results):
        steps += f" ({len(reached)} of {len(results)})"
    return (f"{name:<29}{spread([r['train_accuracy'] for r in results]):<15}"
            f"{spread([r['test_accuracy'] for r in results]):<15}{steps:<16}{near_mean(results):.3f}")


HEADER = f"{'':<29}{'train accuracy':<15}{'test accuracy':<15}{'95 % at step':<16}near"


def test_mean(results):
    return statistics.mean(r["test_accuracy"] for r in results)


def near_mean(results):
    """Attention mass on the task's own neighbours at the end of training."""
    return statistics.mean(list(r["neighbour_attention"].values())[-1] for r in results)


def compare(config):
    """Both arms over several seeds, side by side; the label-only arm is tuned in its favour."""
    arms = {f"labels only, lr {lr:g}": replace(config, spt=False, lr=lr)
            for lr in sorted({*LABEL_LRS, config.lr})}
    arms[f"SPT, lr {config.lr:g}"] = replace(config, spt=True)
    results = run_all([({}, replace(arm, seed=config.seed + i)) for arm in arms.values()
                       for i in range(config.seeds)], config.jobs, config.json)
    groups = dict(zip(arms, (results[i:i + config.seeds] for i in range(0, len(results), config.seeds))))
    *label_names, spt_name = groups
    best_name = max(label_names, key=lambda name: test_mean(groups[name]))
    first = results[0]
    say(f"{first['task']}: {first['n_train']:,} training sequences, {first['finetune_steps']:,} steps "
        f"in either arm, {config.seeds} seeds")
    say(f"{yardsticks(first)}\n{HEADER}")
    for name, group in groups.items():
        say(row_of(name, group))
    gap = test_mean(groups[spt_name]) - test_mean(groups[best_name])
    seconds = statistics.mean(r["seconds"] for r in results)
    say(f"the gap in test accuracy: {gap:.3f}    seconds for one run: {seconds:.1f}\n")
    for name in (best_name, spt_name):
        steps, heights = mean_curve([r["curve"] for r in groups[name]])
        say(f"  {name:<26}{'':<{20 - len(steps)}}{bars(heights, 1)}  test accuracy, steps {steps[0]:,} to {steps[-1]:,}")
    show_attention(groups[best_name] + groups[spt_name])


# ---------------------------------------------------------------------------------------------
# The claims, as rows that differ from a task's recipe and a rule on the numbers they give.
# ---------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Claim:
    """Rows of the table by name, each a change of its task's recipe, and a rule on what they measure.

    Of several learning rates, `lrs`, a row picks the best on the test set. `holds` takes the means of
    all rows so far by name: .train, .test, .near (attention on the neighbours) and .steps (to 95 %,
    infinite where a run did not get there).
    """
    title: str
    rows: dict
    rule: str
    holds: callable
    quick: bool = False


CLAIMS = (
    Claim("1 SPT beats training on the labels alone, at equal steps", {
        "labels only, best lr": dict(lrs=LABEL_LRS),
        "SPT": dict(spt=True),
    }, "SPT is above 0.95, labels only below 0.60",
        lambda m: m["SPT"].test > 0.95 and m["labels only, best lr"].test < 0.6, quick=True),
    Claim("1 ... and on real text: does English run forwards or backwards?", {
        "text: labels only, best lr": dict(task="text", lrs=LABEL_LRS),
        "text: SPT": dict(task="text", spt=True),
    }, "SPT is above 0.95, labels only below 0.60",
        lambda m: m["text: SPT"].test > 0.95 and m["text: labels only, best lr"].test < 0.6),
    Claim("1 ... but not for ever: with ten times the steps labels find it, too", {
        "labels, 10x steps": dict(lrs=(0.003,), finetune_steps=3700),
        "labels, learned positions": dict(positions="learned"),
    }, "10x the steps: above 0.70, yet 95 % takes 5 times SPT's steps or more",
        lambda m: m["labels, 10x steps"].test > 0.7
        and m["labels, 10x steps"].steps > 5 * m["SPT"].steps),
    Claim("2 Not depth", {
        "labels only, 2 layers": dict(n_layers=2),
        "labels only, 4 layers": dict(n_layers=4),
    }, "both below 0.60",
        lambda m: max(m["labels only, 2 layers"].test, m["labels only, 4 layers"].test) < 0.6),
    Claim("3 Not generalization alone: labels do not even fit", {
        "labels, 50,000 sequences": dict(n_train=50_000),
        "labels, 50,000, 10x steps": dict(n_train=50_000, finetune_steps=3700),
        "SPT, 200 sequences": dict(n_train=200, spt=True),
    }, "labels train below 0.60; with 10x steps they fit better, not wider: train and test "
       "within 0.05; SPT on 200 sequences tests above 0.85",
        lambda m: m["labels, 50,000 sequences"].train < 0.6
        and abs(m["labels, 50,000, 10x steps"].train - m["labels, 50,000, 10x steps"].test) < 0.05
        and m["SPT, 200 sequences"].test > 0.85),
    Claim("4 It is the query and key maps", {
        "only qk copied": dict(spt=True, transfer="qk", finetune_steps=200),
        "all but qk copied": dict(spt=True, transfer="not-qk", finetune_steps=200),
        "SPT, qk frozen for labels": dict(spt=True, freeze_qk=True),
    }, "200 steps on labels after copying: qk alone above 0.95, all but qk below 0.60; "
       "frozen: above 0.80",
        lambda m: m["only qk copied"].test > 0.95 and m["all but qk copied"].test < 0.6
        and m["SPT, qk frozen for labels"].test > 0.8),
    Claim("5 What they learn is proximity", {
        "SPT, no positions": dict(spt=True, positions="none"),
        "labels, rotary positions": dict(positions="rotary"),
        "labels, distance bias": dict(positions="distance"),
        "labels, bias in |i - j|": dict(positions="symmetric"),
    }, "attention on neighbours: SPT 5x labels; given rotary or distance, labels > 0.95; "
       "no positions or |i - j|: < 0.60",
        lambda m: m["SPT"].near > 5 * m["labels only, best lr"].near
        and min(m["labels, rotary positions"].test, m["labels, distance bias"].test) > 0.95
        and max(m["SPT, no positions"].test, m["labels, bias in |i - j|"].test) < 0.6, quick=True),
    Claim("Control: where counting tokens is enough there is nothing to gain", {
        "bag: labels only": dict(task="bag"),
        "bag: SPT": dict(task="bag", spt=True),
    }, "within 0.03 of each other",
        lambda m: abs(m["bag: SPT"].test - m["bag: labels only"].test) < 0.03),
)


def measured(results):
    """The means that a claim's rule is about."""
    steps = [math.inf if r["steps_to_95"] is None else r["steps_to_95"] for r in results]
    return SimpleNamespace(train=statistics.mean(r["train_accuracy"] for r in results),
                           test=test_mean(results), near=near_mean(results), steps=statistics.mean(steps))


def reproduce(config):
    """Measure every claim and print rows and verdicts; returns whether all of them hold."""
    claims = [claim for claim in CLAIMS if claim.quick or not config.quick]
    seeds = range(config.seed, config.seed + (1 if config.quick else config.seeds))
    tagged = []
    for claim in claims:
        for name, changes in claim.rows.items():
            base = recipe(**{"task": "proximity", **{k: v for k, v in changes.items() if k != "lrs"}})
            tagged += [(dict(claim=claim.title, row=name), replace(base, seed=seed, lr=lr, device=config.device))
                       for lr in changes.get("lrs", [base.lr]) for seed in seeds]
    rows = {}
    for (tags, run_config), result in zip(tagged, run_all(tagged, config.jobs, config.json)):
        rows.setdefault(tags["row"], {}).setdefault(run_config.lr, []).append(result)
    rows = {name: max(by_lr.values(), key=test_mean) for name, by_lr in rows.items()}
    numbers, verdicts = {name: measured(results) for name, results in rows.items()}, []
    say(f"mean ± standard deviation over {len(seeds)} seeds\n{HEADER}")
    for claim in claims:
        say(claim.title)
        for name in claim.rows:
            say(row_of("  " + name, rows[name]))
        verdicts.append(claim.holds(numbers))
        say(verdict(verdicts[-1], claim.rule))
    say("6 Labels are locally blind to proximity, masked tokens are not")
    verdicts.append(theory(config))
    say(verdict(verdicts[-1], "blind along circulant directions to 1e-12; masked tokens see them"))
    return all(verdicts)


def verdict(holds, rule):
    return textwrap.fill(f"  {'holds' if holds else 'DOES NOT HOLD'}: {rule}", 80, subsequent_indent="    ")


# ---------------------------------------------------------------------------------------------
# Theory: why labels do not teach attention to look at neighbours, and masked tokens do.
#
# Set-up. One attention layer, no residual, scores S (T, T) that depend on positions only:
#     A = softmax(S) by rows,   z_i = Σ_j A_ij v_j,   v_j the value of token j,
#     label logits = Wᵀ mean_i φ(z_i),   logits of a masked token i = Uᵀ φ(z_i),   φ token by token.
# A direction D in the space of scores is *circulant* if D_ij depends on (j - i) mod T alone. These
# are the proximity directions: "look one to the left" is D_ij = 1 where j = i - 1, else 0.
#
# 1. φ linear: labels are blind along all circulant S, everywhere. S circulant makes A circulant, so
#    its columns sum to 1 like its rows, and mean_i z_i = (1/T) Σ_j (Σ_i A_ij) v_j = mean_j v_j: the
#    scores have dropped out. Derivatives of every order are 0, whatever the data and the weights.
# 2. Any φ: labels are blind to first order at S = 0, where training starts. There every z_i is the
#    mean value v̄, and dA_ij = (D_ij - mean_k D_ik) / T has zero column sums if D is circulant, so
#        d mean_i φ(z_i) = φ'(v̄) (1/T) Σ_j (Σ_i dA_ij) v_j = 0.
# 3. Masked reconstruction escapes, because it does not average over i before it asks. Along "look ℓ
#    to the side" dz_i = (v_{i+ℓ} - v̄) / T, and with p the predicted probabilities its loss changes by
#        -(1/T) E[(onehot(x_i) - p)ᵀ Uᵀ φ'(v̄) (v_{i+ℓ} - v̄)],   i masked,
#    which is not 0 as soon as x_i and x_{i+ℓ} are dependent: as soon as neighbours matter.
#
# One caution. Token i is itself a mask symbol, so "look to the side" also means "look less at
# yourself", which pays a little (O(1/T)) with any data. The directions below therefore add nothing
# in all: each row of D is 0 at j = i and has mean 0 over all other j. For shuffled tokens the
# expected derivative is then exactly 0.
# ---------------------------------------------------------------------------------------------
def blind_directions(tokens, labels, is_masked, values, to_class, to_symbol, phi=torch.tanh,
                     scores=None, seed=0):
    """Derivatives of the label loss and of the masked loss along directions of the scores.

    The set-up above in the dtype of `values`: tokens (n, T) and labels (n,) int64, is_masked (n, T)
    bool, values (V + 1, C) with the mask symbol's last, to_class (C, K), to_symbol (C, V), token-wise
    `phi`, and `scores` (T, T) at which to differentiate, 0 (uniform attention) by default.
    Returns {direction: (label derivative, masked derivative)} for directions of norm sqrt(T), and
    under "loss" the two losses themselves.
    """
    n, T = tokens.shape
    scores = torch.zeros(T, T, dtype=values.dtype) if scores is None else scores
    scores = scores.clone().requires_grad_()                                      # (T, T)
    weights = scores.softmax(dim=-1)                                              # (T, T)
    corrupted = tokens.masked_fill(is_masked, len(values) - 1)                    # (n, T)
    pooled = phi(weights @ values[tokens]).mean(dim=1)                            # (n, C)
    hidden = phi(weights @ values[corrupted])[is_masked]                          # (N, C), N masked
    losses = (F.cross_entropy(pooled @ to_class, labels),
              F.cross_entropy(hidden @ to_symbol, tokens[is_masked]))
    gradients = [torch.autograd.grad(loss, scores, retain_graph=True)[0] for loss in losses]  # (T, T) each

    generator = torch.Generator().manual_seed(seed)
    offset = (torch.arange(T) - torch.arange(T)[:, None]) % T                     # (T, T), (j - i) mod T
    directions = {
        "look left": offset == T - 1,
        "look right": offset == 1,
        "look both ways": (offset == 1) | (offset == T - 1),
        "random circulant": torch.randn(T, generator=generator)[offset],
        "random, not circulant": torch.randn(T, T, generator=generator),
    }
    found = {"loss": tuple(loss.item() for loss in losses)}
    for name, direction in directions.items():
        direction = direction.to(values.dtype).masked_fill(offset == 0, 0)        # (T, T)
        direction -= direction.sum(dim=-1, keepdim=True) / (T - 1)                # rows add up to 0 ...
        direction = direction.masked_fill(offset == 0, 0)                         # ... and spare themselves
        direction *= math.sqrt(T) / direction.norm()
        found[name] = tuple((gradient * direction).sum().item() for gradient in gradients)
    return found


def offset_gradients(config, n_batches=30):
    """The same question to the full Transformer at its random start: residuals, LayerNorm, MLP and all.

    Gradients with respect to a score bias by offset (j - i) mod T, from which a control is taken off:
    the same batch with the labels swapped, or with the tokens shuffled. Along "look both ways", which
    is proximity, and along "left, not right". Returns {direction: {loss: (gradient, standard error)}}.
    """
    tokens, labels, _, _ = (torch.from_numpy(part) for part in load_data(config))  # (n, T), (n,)
    model, T = new_model(config), config.seq_len
    offset = (torch.arange(T) - torch.arange(T)[:, None]) % T                     # (T, T)
    generator = torch.Generator().manual_seed(config.seed)
    gradients = {"label": [], "masked": []}
    for rows in torch.arange(min(len(tokens), 64 * n_batches)).split(64):
        x, y = tokens[rows], labels[rows]                                         # (B, T), (B,)
        shuffled = x.gather(1, torch.rand(x.shape, generator=generator).argsort(dim=1))  # (B, T)
        corrupted, is_masked = mask_tokens(x, config.vocab_size, config.mask_ratio, generator)
        by_offset = torch.zeros(T, requires_grad=True)                            # (T,)
        for block in model.blocks:
            block.attention.bias = by_offset[offset]                              # (T, T)
        logits = model.classify(x)                                                # (B, K)
        losses = {
            "label": (F.cross_entropy(logits, y) - F.cross_entropy(logits, 1 - y)) / 2,
            "masked": masked_loss(model, x, corrupted, is_masked)
            - masked_loss(model, shuffled, shuffled.masked_fill(is_masked, config.vocab_size), is_masked)}
        for name, loss in losses.items():
            gradient, = torch.autograd.grad(loss, by_offset, retain_graph=True)   # (T,)
            left, right = (gradient[[-1, 1]] - gradient[1:].mean()).tolist()
            gradients[name].append((left + right, left - right))
    found = {}
    for i, direction in enumerate(("look both ways", "left, not right")):
        columns = {name: [pair[i] for pair in pairs] for name, pairs in gradients.items()}
        found[direction] = {name: (statistics.mean(g), statistics.stdev(g) / math.sqrt(len(g)))
                            for name, g in columns.items()}
    return found


def theory_inputs(n=1000, seq_len=32, vocab_size=8, d_model=16, shuffled=False, seed=0):
    """Arguments of `blind_directions`: sequences of proximity, masks, random weights in float64."""
    tokens, labels, _, _ = (torch.from_numpy(part) for part in make_task(
        "proximity", n_train=n, n_test=2, seq_len=seq_len, vocab_size=vocab_size, seed=seed))
    generator = torch.Generator().manual_seed(seed)
    values, to_class, to_symbol = (
        torch.randn(shape, generator=generator, dtype=torch.float64) / math.sqrt(scale)
        for shape, scale in (((vocab_size + 1, d_model), 1), ((d_model, 2), d_model), ((d_model, vocab_size), d_model)))
    if shuffled:
        tokens = tokens.gather(1, torch.rand(tokens.shape, generator=generator).argsort(dim=1))  # (n, T)
    is_masked = torch.rand(tokens.shape, generator=generator) < 0.3               # (n, T)
    return tokens, labels, is_masked, values, to_class, to_symbol


def theory(config):
    """Print what labels see and what masked tokens see; returns whether the two propositions hold."""
    def cell(value):
        return "exactly blind" if abs(value) < 1e-15 else f"{abs(value):.1e}"

    torch.set_num_threads(config.threads)
    holds = True
    for title, shuffled in (("neighbours depend on each other (proximity)", False),
                            ("the same tokens in shuffled order", True)):
        found = blind_directions(*theory_inputs(shuffled=shuffled, seed=config.seed))
        say(f"{title:<46}{'|label derivative|':<20}|masked derivative|")
        for name, (label, masked) in list(found.items())[1:]:
            say(f"  {name:<44}{cell(label):<20}{cell(masked)}")
            holds &= (abs(label) > 1e-9) if "not" in name else abs(label) <= 1e-12
            holds &= shuffled or "not" in name or abs(masked) >= 1e-6
    inputs = theory_inputs(seed=config.seed)
    offset = (torch.arange(32) - torch.arange(32)[:, None]) % 32
    generator = torch.Generator().manual_seed(config.seed)
    losses = [blind_directions(*inputs, phi=lambda z: z, scores=size * torch.randn(
        32, generator=generator, dtype=torch.float64)[offset])["loss"] for size in (0, 1, 3, 10)]
    label, masked = (max(column) - min(column) for column in zip(*losses))
    say(f"far from uniform, linear φ, 4 circulant kernels: label loss varies by {label:.0e}, masked by {masked:.2f}")
    holds &= label < 1e-12 < masked
    say(f"{'the full Transformer at its start (x 1e-6)':<46}{'label gradient':<20}masked gradient")
    for direction, losses in offset_gradients(recipe("proximity", seed=config.seed, n_test=2)).items():
        cells = [f"{mean * 1e6:+.0f} ± {error * 1e6:.0f}" for mean, error in losses.values()]
        say(f"  {direction:<44}{cells[0]:<20}{cells[1]}")
    return holds


# ---------------------------------------------------------------------------------------------
# The command line.
# ---------------------------------------------------------------------------------------------
class Parser(argparse.ArgumentParser):
    """argparse, but a mistake is an exception, not a page of usage."""

    def error(self, message):
        raise ValueError(message)


def parse(argv):
    """The Config that the flags `argv` ask for. Raises ValueError for flags that make no sense."""
    parser = Parser(prog="spt.py", description=__doc__.split("\n\n")[0], allow_abbrev=False,
                    argument_default=argparse.SUPPRESS)
    for f in fields(Config):
        flag, about = "--" + f.name.replace("_", "-"), f.metadata["help"]
        if f.type is bool:
            parser.add_argument(flag, action="store_true", help=about)
        else:
            own = "".join(f", {task} {changes[f.name]}" for task, changes in RECIPES.items() if f.name in changes)
            parser.add_argument(flag, type=f.type, help=f"{about} (default {f.default}{own})",
                                metavar="|".join(f.metadata["choices"] or [f.type.__name__]))
    given = vars(parser.parse_args(argv))
    for name in ("task", "text", "seq_len", "vocab_size", "n_train", "n_test", "signal", "lag"):
        if "data" in given and name in given:
            raise ValueError(f"{name} {given[name]}: does not go with --data, which tells it")
    return recipe(given.pop("task", Config.task), **given)


def check(config):
    """Find what is wrong with device, data and files before any training; raises ValueError or OSError.

    Returns the config with the sizes of the data in it.
    """
    try:
        torch.zeros(1, device=config.device)
    except (RuntimeError, AssertionError):
        raise ValueError(f"device {config.device}: not on this machine") from None
    x, y, x_test, _ = load_data(config)
    if config.data is not None:
        config = replace(config, seq_len=x.shape[1], n_train=len(x), n_test=len(x_test),
                         vocab_size=int(max(x.max(), x_test.max(), 1)) + 1)
    if (config.save or config.load) and (config.compare or config.reproduce or config.theory):
        raise ValueError(f"{'save' if config.save else 'load'} {config.save or config.load}: goes with a single run")
    if config.load is not None:
        load_weights(config.load, new_model(config, int(y.max()) + 1), config)
    if config.save is not None:
        if os.path.isdir(config.save):
            raise ValueError(f"save {config.save}: is a folder")
        open(f"{config.save}.{os.getpid()}.tmp", "wb").close()
        os.remove(f"{config.save}.{os.getpid()}.tmp")
    if config.json is not None:
        open(config.json, "ab").close()
    return config


def explain(error):
    """One line for a person: the flag or file, what was wrong, what is allowed."""
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename or 'a file'}: {error.strerror}"
    name, _, rest = str(error).partition(" ")
    flag = "--" + name.replace("_", "-") if name in Config.__dataclass_fields__ else name
    return " ".join(f"{flag} {rest}".split())


def main(argv=None):
    """Run the command line `argv`; returns the exit status: 0, 2 for bad input, 130 for Ctrl-C."""
    argv = sys.argv[1:] if argv is None else argv
    try:
        config = parse(argv)
        config = check(config)
        if config.reproduce:
            return 0 if reproduce(config) else 1
        if config.theory:
            theory(config)
        elif config.compare:
            compare(config)
        else:
            single(config, argv)
    except (ValueError, OSError, FloatingPointError, MemoryError, BrokenExecutor) as error:
        print(f"spt.py: error: {explain(error)}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
