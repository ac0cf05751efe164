"""Self-pretraining (SPT) of a Transformer for sequence classification, in one file that runs.

    python spt.py --task proximity --spt      pretrain on masked tokens, then fine-tune on labels
    python spt.py --task proximity            labels only, for the same total of steps
    python spt.py --task proximity --compare  both over several seeds: the gap and its reason
    python spt.py --reproduce                 every claim as measured numbers, with a verdict
    python spt.py --theory                    what labels cannot see and masked tokens can
    python spt.py --help                      every flag; they are the fields of Config

The first command takes 4 s on one core of an AMD EPYC with torch 2.13.0, more than half of it
for importing torch, and ends with

    chance 0.500, counting tokens 0.495, best possible 1.000
    train accuracy 0.999
    test accuracy  1.000

The second ends near 0.500, which is chance. The two ways to train, the two *arms*, see the same
sequences, labels, initial weights and number of steps (160 + 100); they differ in the first 160,
where SPT hides tokens of these sequences and asks for them. After arXiv 2605.21070 (2026)
and Amos et al., arXiv 2310.02980; the tasks and the set-up are this project's own, see README.md.

The story, top to bottom: Config; positions; the model; masking and the training loop; probes;
one run; many runs; what a person sees; the claims; the theory; the command line.

Letters in shape comments: B sequences in a batch, T tokens in a sequence, C width (d_model),
H heads, D = C / H width of a head, V symbols (token V is the mask), K classes, L layers.
"""
import argparse
import copy
import errno
import gc
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

import torch
from torch import nn
from torch.nn import functional as F
from torch.optim.adamw import adamw
from tqdm import tqdm

from synthetic_tasks import (TASKS, best_possible_accuracy, count_baseline, from_file, make_task,
                             proximity)

# ---------------------------------------------------------------------------------------------
# Config. The default of every flag lives here, and the command line is made from it, so that
# help, flags and code cannot drift apart. Functions that others may copy take plain
# arguments instead; only what runs a whole experiment takes a Config.
# ---------------------------------------------------------------------------------------------
POSITIONS = ("sinusoidal", "learned", "rotary", "distance", "symmetric", "none")
TRANSFERS = ("all", "qk", "not-qk")


def option(default, help, low=None, high=None, choices=None):
    """A field of Config: its default, the help of its flag, and the values it may take."""
    return field(default=default, metadata=dict(help=help, low=low, high=high, choices=choices))


@dataclass(frozen=True)
class Config:
    """One run, or one comparison of runs. Raises ValueError for a value that makes no sense.

    `recipe(task)` gives the defaults of a task other than proximity.
    """
    # what to do
    task: str = option("proximity", "what to classify", choices=TASKS)
    spt: bool = option(False, "pretrain on masked tokens first; without it labels get all steps")
    compare: bool = option(False, "both arms over several seeds, side by side")
    reproduce: bool = option(False, "measure every claim, with a verdict; status 1 if one fails")
    quick: bool = option(False, "with --reproduce: claims 1, 5 and 6, one seed")
    theory: bool = option(False, "what labels and masked tokens see of the attention scores")
    seed: int = option(0, "seed of data, weights, batches and masks", 0, 2**32 - 1)
    seeds: int = option(3, "seeds of --compare and --reproduce, from --seed up", 1, 1000)
    jobs: int = option(min(os.cpu_count() or 1, 256), "processes for --compare and --reproduce",
                       1, 256)
    threads: int = option(1, "threads in each process; a second one gains nothing here", 1, 256)
    device: str = option("cpu", "where the tensors live: cpu, cuda, mps")
    json: str = option(None, "file to append results to, one JSON object per finished run")
    save: str = option(None, "file to write the weights to at the end")
    load: str = option(None, "file of --save to start from, in place of random weights")
    # the data
    n_train: int = option(2000, "training sequences (text: at most)", 2, 10**7)
    n_test: int = option(2000, "test sequences (text: at most)", 2, 10**7)
    seq_len: int = option(64, "tokens in a sequence, T", 2, 2**13)
    vocab_size: int = option(8, "symbols, V", 2, 10**5)
    signal: float = option(0.5, "chance that a token follows its class's rule", 0.0, 1.0)
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
    pretrain_steps: int = option(160, "steps of masked reconstruction", 1, 10**8)
    finetune_steps: int = option(100, "steps on labels", 0, 10**8)
    batch_size: int = option(16, "sequences in a step, B", 1, 10**5)
    lr: float = option(0.01, "peak learning rate", 1e-8, 10.0)
    mask_ratio: float = option(0.4, "share of tokens hidden in pretraining", 0.01, 0.99)
    transfer: str = option("all", "pretrained weights that fine-tuning gets", choices=TRANSFERS)
    freeze_qk: bool = option(False, "keep query and key maps as they are while fine-tuning")

    def __post_init__(self):
        for f in fields(self):
            value, rule = getattr(self, f.name), f.metadata
            if rule["choices"] and value not in rule["choices"]:
                raise ValueError(f"{f.name} {value}: must be one of {', '.join(rule['choices'])}")
            # "not ... <=", so that NaN fails as well.
            if rule["low"] is not None and not rule["low"] <= value <= rule["high"]:
                raise ValueError(f"{f.name} {value}: must be from {rule['low']} to {rule['high']}")
        # Sine and cosine need an even d_model; rotary positions need it of every head.
        if self.d_model % (2 * self.n_heads):
            raise ValueError(f"d_model {self.d_model}: must be a multiple of 2 x n_heads, which "
                             f"is {2 * self.n_heads}")
        if self.lag > 1 and self.task != "proximity":
            raise ValueError(f"lag {self.lag}: only proximity has a lag")
        if self.text is not None and self.task != "text":
            raise ValueError(f"text {self.text}: goes with --task text")
        if self.load is not None and self.transfer != "all":
            raise ValueError(f"transfer {self.transfer}: pretrains a model of its own, not --load")
        # Sizes that each make sense alone, but together would only run out of memory.
        if max(self.n_train, self.n_test) * self.seq_len > 10**9:
            raise ValueError(f"n_train {self.n_train}: with seq_len, more than 10^9 tokens")
        if self.batch_size * self.seq_len > 2**23:
            raise ValueError(f"batch_size {self.batch_size}: with seq_len, more than 2^23 tokens")
        if self.n_layers * self.d_model * (4 * self.d_model + 2 * self.d_ff) > 10**9:
            raise ValueError(f"n_layers {self.n_layers}: with d_model and d_ff, over 10^9 weights")


# A task may bring its own recipe: what differs from the defaults above. Both arms share it. Text
# has 41 symbols to tell apart, texture two directions to find, and strangers' data who knows what:
# they get more steps. The signals are such that the best possible classifier is far from chance.
RECIPES = {
    "text": dict(n_train=20_000, n_test=5_000, vocab_size=41, pretrain_steps=700,
                 finetune_steps=400),
    "texture": dict(signal=0.6, finetune_steps=160),
    "bag": dict(signal=0.2),
    "data": dict(pretrain_steps=400, finetune_steps=400),    # --data FILE
}


def recipe(task, **changes):
    """Config of `task`: the defaults, then the task's own recipe, then `changes`."""
    own = RECIPES.get("data" if "data" in changes else task, {})
    return Config(**{"task": task, **own, **changes})


# ---------------------------------------------------------------------------------------------
# Positions. Attention by itself sees a bag of tokens; these are ways to tell it their order.
# Sinusoidal and learned ones are *absolute*: they leave it to the query and key maps to make
# proximity of them, that is, attention to small offsets, which is what labels fail to teach.
# Rotary positions and distance biases put offsets into the scores by hand.
# ---------------------------------------------------------------------------------------------
def sinusoidal_positions(seq_len, d_model):
    """PE[t, 2i] = sin(t / 10000^(2i/C)), PE[t, 2i+1] = cos(same)   (Vaswani et al. 2017, sec. 3.5)

    Returns (T, C) float32; d_model is even. The inner product of rows i and j depends on i - j
    alone, and with a rotation of each sin-cos pair in between it peaks at any offset one likes:
    proximity is in there, for query and key maps that bring it out.
    """
    position = torch.arange(seq_len)[:, None]                             # (T, 1)
    frequency = 10000.0 ** (-torch.arange(0, d_model, 2) / d_model)       # (C/2,)
    angle = position * frequency                                          # (T, C/2)
    # sin a sin b + cos a cos b = cos(a - b), so rows i and j have the inner product
    # Σ_pairs cos((i - j) frequency).
    return torch.stack([angle.sin(), angle.cos()], dim=-1).flatten(1)     # (T, C)


def rotate(x):
    """Rotary positions: turn pair i of token t by t / 10000^(2i/D)   (Su et al. 2021, sec. 3.2)

    x (..., T, D) with D even -> the same shape. Inner products of rotated queries and keys depend
    on positions only through their difference: proximity comes with the encoding.
    """
    T, D = x.shape[-2:]
    wide = torch.promote_types(x.dtype, torch.float32)    # half precision cannot count to T
    position = torch.arange(T, dtype=wide, device=x.device)[:, None]      # (T, 1)
    pair = torch.arange(0, D, 2, dtype=wide, device=x.device)             # (D/2,)
    angle = position * 10000.0 ** (-pair / D)                             # (T, D/2)
    cos, sin = angle.cos().to(x.dtype), angle.sin().to(x.dtype)           # (T, D/2) each
    # As a complex number, a + ib is multiplied by exp(i angle).
    a, b = x[..., 0::2], x[..., 1::2]                                     # (..., T, D/2) each
    turned = torch.stack([a * cos - b * sin, a * sin + b * cos], dim=-1)  # (..., T, D/2, 2)
    return turned.flatten(-2)                                             # (..., T, D)


def distance_bias(n_heads, seq_len, one_sided=True):
    """A bias of -slope * |i - j| for the scores, a penalty per step (ALiBi, Press et al. 2022)

    Returns (H, T, T) float32. ALiBi looks left only; here even heads look left and odd heads look
    right, -inf on the other side, with slopes 1, 1, 1/2, 1/2, ... With `one_sided=False` every
    head sees both sides alike, as a function of |i - j|.
    """
    offset = torch.arange(seq_len) - torch.arange(seq_len)[:, None]       # (T, T), j - i
    head = torch.arange(n_heads)[:, None, None]                           # (H, 1, 1)
    bias = -(0.5 ** (head // 2)) * offset.abs()                           # (H, T, T)
    if one_sided:
        wrong_side = torch.where(head % 2 == 0, offset > 0, offset < 0)   # (H, T, T)
        bias = bias.masked_fill(wrong_side, -math.inf)                    # (H, T, T)
    return bias


# ---------------------------------------------------------------------------------------------
# The model: one pre-norm Transformer encoder with two heads on top, one that fills in masked
# tokens and one that classifies. The linear maps inside have no bias: it bought nothing here.
#
# Where can proximity sit? A place's vector is token plus position, t_i + p_i. But for the norm, a
# score of the first block is
#     (t_i + p_i)ᵀ M (t_j + p_j) / √D,  M the product of one head's query and key maps.
# Multiplied out, one of its four terms, p_iᵀ M p_j, knows places only. M decides whether it is
# large for j next to i: attention to neighbours is a matter of the query and key maps.
# ---------------------------------------------------------------------------------------------
class Attention(nn.Module):
    """Multi-head self-attention, softmax(q kᵀ / √D + bias) v   (Vaswani et al. 2017, sec. 3.2)

    x (B, T, C) -> (B, T, C); with `return_weights=True` also the attention weights (B, H, T, T),
    by the formula as it reads. Otherwise PyTorch's fused kernel gives the same numbers and never
    keeps a B x H x T x T tensor. `query_key` decides where to look, `value` and `out` what to
    bring back. `bias` (H, T, T) goes with that T alone; like `rotary` it is no part of the
    state_dict. Raises ValueError where heads do not divide d_model (rotary: into even widths).
    """

    def __init__(self, d_model, n_heads, rotary=False, bias=None):
        super().__init__()
        if d_model % n_heads or (rotary and d_model // n_heads % 2):
            raise ValueError(f"n_heads {n_heads}: does not divide d_model {d_model} well")
        self.n_heads, self.rotary = n_heads, rotary
        self.query_key = nn.Linear(d_model, 2 * d_model, bias=False)
        self.value = nn.Linear(d_model, d_model, bias=False)
        self.out = nn.Linear(d_model, d_model, bias=False)
        self.register_buffer("bias", bias, persistent=False)              # (H, T, T) or None

    def forward(self, x, return_weights=False):
        # Queries, keys and values in one matrix product, which is faster than three.
        maps = torch.cat([self.query_key.weight, self.value.weight])      # (3C, C)
        q, k, v = (t.unflatten(-1, (self.n_heads, -1)).transpose(1, 2)    # (B, H, T, D) each
                   for t in F.linear(x, maps).chunk(3, dim=-1))
        if self.rotary:
            q, k = rotate(q), rotate(k)                                   # (B, H, T, D) each
        if return_weights:
            # Without the division, scores would grow with D and the softmax start out spiky.
            scores = q @ k.mT / math.sqrt(q.shape[-1])                    # (B, H, T, T)
            scores = scores if self.bias is None else scores + self.bias  # (B, H, T, T)
            weights = scores.softmax(dim=-1)                              # (B, H, T, T)
            return self.out((weights @ v).transpose(1, 2).flatten(2)), weights
        bias = None if self.bias is None else self.bias[None]             # (1, H, T, T) or None
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=bias)       # (B, H, T, D)
        return self.out(y.transpose(1, 2).flatten(2))                     # (B, T, C)


class Block(nn.Module):
    """Pre-norm residual block: x + attention(norm(x)), then x + mlp(norm(x)).

    x (B, T, C) -> (B, T, C); with `only`, a mask (B, T) of N places, their features (N, C) alone.
    ReLU as in Vaswani et al.: GELU gave the same accuracies, slower.
    """

    def __init__(self, attention, d_model, d_ff):
        super().__init__()
        self.attention = attention
        self.norm1, self.norm2 = nn.LayerNorm(d_model), nn.LayerNorm(d_model)
        self.mlp = nn.Sequential(nn.Linear(d_model, d_ff, bias=False), nn.ReLU(inplace=True),
                                 nn.Linear(d_ff, d_model, bias=False))

    def forward(self, x, only=None):
        x = x + self.attention(self.norm1(x))                             # (B, T, C)
        # From here on every place is on its own. Pretraining asks for the hidden ones only, and
        # leaving out the others makes its step a sixth faster.
        x = x if only is None else x[only]                                # (B, T, C) or (N, C)
        return x + self.mlp(self.norm2(x))                                # (B, T, C) or (N, C)


class Transformer(nn.Module):
    """Encoder with a reconstruction head and a classification head; no causal mask, no dropout.

    tokens (B, T) int64 in [0, V], where V is the mask symbol:
        model(tokens)             -> (B, T, C)  features; with `only`, see Block, (N, C)
        model.reconstruct(tokens) -> (B, T, V)  logits of the symbol that stands at each place
        model.classify(tokens)    -> (B, K)     logits of the class, from the mean over places
    """

    def __init__(self, config, n_classes=2):
        super().__init__()
        T, V, C, H = config.seq_len, config.vocab_size, config.d_model, config.n_heads
        # The mask symbol, token V, has a vector of its own.
        self.token_embedding = nn.Embedding(V + 1, C)
        # At std 1, PyTorch's default, tokens drown the positions, whose entries are of size 0.7,
        # and attention takes far more steps to turn positions into proximity.
        nn.init.normal_(self.token_embedding.weight, std=0.4)
        # Learned positions start as large as sinusoidal ones. Fixed ones are no weights: they are
        # neither trained nor saved nor transferred.
        if config.positions == "learned":
            self.positions = nn.Parameter(0.7 * torch.randn(T, C))        # (T, C)
        else:
            fixed = sinusoidal_positions(T, C) if config.positions == "sinusoidal" else None
            self.register_buffer("positions", fixed, persistent=False)    # (T, C) or None
        bias, rotary = None, config.positions == "rotary"
        if config.positions in ("distance", "symmetric"):
            bias = distance_bias(H, T, config.positions == "distance")    # (H, T, T)
        self.blocks = nn.ModuleList(Block(Attention(C, H, rotary, bias), C, config.d_ff)
                                    for _ in range(config.n_layers))
        # Most pre-norm models have one more norm here, before the heads. Without it pretraining
        # leaves its plateau in far fewer steps.
        self.reconstruction_head = nn.Linear(C, V)
        self.class_head = nn.Linear(C, n_classes)

    def embed(self, tokens):
        x = self.token_embedding(tokens)                                  # (B, T, C)
        return x if self.positions is None else x + self.positions        # (B, T, C)

    def forward(self, tokens, only=None):
        x = self.embed(tokens)                                            # (B, T, C)
        for block in self.blocks[:-1]:
            x = block(x)                                                  # (B, T, C)
        return self.blocks[-1](x, only)                                   # (B, T, C) or (N, C)

    # The two questions differ in one thing that will matter: reconstruction asks at a place,
    # classification asks for a mean over places, in which it is lost who stood next to whom.
    def reconstruct(self, tokens):
        return self.reconstruction_head(self(tokens))                     # (B, T, V)

    def classify(self, tokens):
        return self.class_head(self(tokens).mean(dim=1))                  # (B, K)


def new_model(config, n_classes=2):
    """A Transformer at its random start, which depends on the config's seed and shape alone."""
    with torch.random.fork_rng(devices=[]):    # the caller's random numbers stay as they were
        torch.manual_seed(config.seed)
        return Transformer(config, n_classes).to(config.device)


# ---------------------------------------------------------------------------------------------
# Training. Pretraining and fine-tuning are one loop around two losses: one asks for the tokens
# that were hidden, the other for the label. Neither ever sees the test sequences.
#     pretraining   mean over hidden places i of  -log softmax(reconstruct(corrupted))[i, x_i]
#     fine-tuning   mean over sequences of        -log softmax(classify(tokens))[label]
# A model that knows nothing pays ln V and ln K. Random numbers for data, weights, batches and
# masks come from separate generators: adding pretraining changes none of the others.
# ---------------------------------------------------------------------------------------------
def mask_tokens(tokens, mask_id, mask_ratio, generator=None):
    """Hide each token with probability `mask_ratio`, independently of the others.

    tokens (B, T) int64 -> corrupted (B, T), where hidden tokens are replaced by `mask_id`, and
    is_masked (B, T) bool, True where a token was hidden and is to be predicted. `generator` is a
    CPU torch.Generator. Unlike BERT's, a hidden token is always replaced by the mask symbol.
    """
    # Drawn on the CPU and then moved, so that the same seed hides the same tokens on any device.
    is_masked = torch.rand(tokens.shape, generator=generator) < mask_ratio  # (B, T)
    is_masked = is_masked.to(tokens.device)                               # (B, T)
    return tokens.masked_fill(is_masked, mask_id), is_masked


def masked_loss(model, tokens, corrupted, is_masked):
    """Mean cross-entropy in nats of the hidden tokens, and of no others; 0 if none is hidden.

    tokens and corrupted (B, T) int64, is_masked (B, T) bool, from `mask_tokens`.
    """
    features = model(corrupted, only=is_masked)                           # (N, C), N hidden tokens
    logits = model.reconstruction_head(features)                          # (N, V)
    return F.cross_entropy(logits, tokens[is_masked]) if len(logits) else logits.sum()


class AdamW:
    """Adam with decoupled weight decay (Loshchilov & Hutter 2019, algorithm 2), fused.

    The numbers of torch.optim.AdamW, whose own first use imports PyTorch's compiler, which
    takes longer than a whole run here. The betas are smaller than the usual 0.9 and 0.999: with
    less memory of old gradients pretraining leaves its first plateau in fewer steps.
    """

    def __init__(self, weights, betas=(0.5, 0.98), eps=1e-8, weight_decay=0.01):
        self.betas, self.eps, self.weight_decay = betas, eps, weight_decay
        # For each weight: the mean of its gradient, the mean of its square, the steps so far.
        self.state = [(w, torch.zeros_like(w), torch.zeros_like(w),
                       torch.zeros((), device=w.device)) for w in weights]

    @torch.no_grad()
    def step(self, lr):
        """One step down the gradients, which are then cleared; a weight without one is left."""
        state = [entry for entry in self.state if entry[0].grad is not None]
        weights, means, squares, counts = map(list, zip(*state))
        adamw(weights, [w.grad for w in weights], means, squares, [], counts, lr=lr, eps=self.eps,
              beta1=self.betas[0], beta2=self.betas[1], weight_decay=self.weight_decay,
              amsgrad=False, maximize=False, fused=True)
        for w in weights:
            w.grad = None


def optimize(model, batch_loss, n_sequences, n_steps, config, phase, on_step=None):
    """The loop that both phases share: AdamW, 10 % linear warm-up, decay to a tenth of the peak.

    `batch_loss(rows)` gives the loss of the sequences `rows` (B,); `on_step(step)` is called
    after every step. Returns the loss of every step. Raises FloatingPointError when the loss is
    no longer a finite number.
    """
    optimizer = AdamW(weight for weight in model.parameters() if weight.requires_grad)
    generator = torch.Generator().manual_seed(config.seed + 2**32)        # batches only
    losses = []
    # disable=None: no bar where the output is no terminal.
    bar = tqdm(range(n_steps), desc=phase, unit=" steps", disable=None)
    for step in bar:
        # Adam's first steps rest on few gradients, so they are made small. A fourth power
        # stays near its peak for long: pretraining leaves its plateau sooner than with a cosine.
        progress = (step + 1) / n_steps
        lr = config.lr * min(1.0, progress / 0.1) * (1 - 0.9 * progress**4)
        rows = torch.randint(n_sequences, (config.batch_size,), generator=generator)  # (B,)
        loss = batch_loss(rows.to(config.device))                         # ()
        loss.backward()
        optimizer.step(lr)
        losses.append(loss.item())
        if not math.isfinite(losses[-1]):
            raise FloatingPointError(f"lr {config.lr}: the loss of {phase} is {losses[-1]} at step "
                                     f"{step + 1}")
        bar.set_postfix_str(f"loss {losses[-1]:.3f}", refresh=False)
        if on_step:
            on_step(step + 1)
    return losses


def pretrain(model, tokens, config):
    """Masked reconstruction of tokens (n, T) for `config.pretrain_steps`; returns losses, in nats.

    The loss starts near ln V, lingers, and falls once attention has found the neighbours.
    """
    generator = torch.Generator().manual_seed(config.seed + 2**33)        # masks only

    # A sequence that is drawn again is masked anew: there is more to learn from it than once.
    def batch_loss(rows):
        batch = tokens[rows]                                              # (B, T)
        corrupted, is_masked = mask_tokens(batch, config.vocab_size, config.mask_ratio, generator)
        return masked_loss(model, batch, corrupted, is_masked)
    return optimize(model, batch_loss, len(tokens), config.pretrain_steps, config, "pretraining")


def finetune(model, tokens, labels, config, on_step=None):
    """Train on tokens (n, T), labels (n,) for `config.finetune_steps`; returns losses, in nats.

    Nothing is masked now. Label training alone is this same function, given all the steps.
    """
    # One way to ask what labels can do: keep the maps that pretraining found, train all else.
    for name, weight in model.named_parameters():
        weight.requires_grad_(not (config.freeze_qk and "query_key" in name))

    def batch_loss(rows):
        return F.cross_entropy(model.classify(tokens[rows]), labels[rows])
    return optimize(model, batch_loss, len(tokens), config.finetune_steps, config, "fine-tuning",
                    on_step)


@torch.no_grad()
def accuracy(model, tokens, labels, batch_size=256):
    """Share of the sequences (n, T) whose most likely class is their label (n,)."""
    hits = sum((model.classify(x).argmax(dim=-1) == y).sum().item()
               for x, y in zip(tokens.split(batch_size), labels.split(batch_size)))
    return hits / len(labels)


# ---------------------------------------------------------------------------------------------
# Probes. What was learned, and where does it sit? Move only some of the weights into a fresh
# model, and look at how far attention reaches. If the query and key maps alone are enough, it is
# they that label training failed to find.
# ---------------------------------------------------------------------------------------------
def transfer(source, target, which="all"):
    """Copy weights of `source` to `target`: "all", its query and key maps ("qk"), or "not-qk".

    The classification head of `target` stays fresh in every case.
    """
    # What is not named here keeps the random start of `target`.
    moved = {}
    for name, weight in source.state_dict().items():
        is_qk = "query_key" in name
        wanted = {"all": True, "qk": is_qk, "not-qk": not is_qk}[which]
        if wanted and not name.startswith("class_head"):
            moved[name] = weight
    target.load_state_dict(moved, strict=False)


@torch.no_grad()
def attention_by_offset(model, tokens):
    """Where attention goes, by offset key minus query: (L, H, 2T - 1), offset o at T - 1 + o.

    Entry o is the mean over sequences (B, T) of (1/T) Σ_i A[i, i + o], so each row sums to 1. For
    uniform attention it is (T - |o|) / T².
    """
    # The diagonals of a matrix of attention weights are its offsets.
    x, rows, T = model.embed(tokens), [], tokens.shape[1]                 # (B, T, C)
    for block in model.blocks:
        _, weights = block.attention(block.norm1(x), return_weights=True)  # (B, H, T, T)
        weights = weights.mean(dim=0)                                     # (H, T, T)
        rows.append(torch.stack([weights.diagonal(o, dim1=-2, dim2=-1).sum(dim=-1) / T
                                 for o in range(1 - T, T)], dim=-1))      # (H, 2T - 1)
        x = block(x)                                                      # (B, T, C)
    return torch.stack(rows)                                              # (L, H, 2T - 1)


# ---------------------------------------------------------------------------------------------
# One run, start to end: data, model, training, measurements. The two arms are this one function;
# what differs is the question in the first `pretrain_steps`. Each phase has its own optimizer and
# schedule; README tells what label training makes of such a fresh start.
# ---------------------------------------------------------------------------------------------
def load_data(config):
    """The config with the sizes of its data in it, and the data: four int64 arrays, which are train
    tokens (n, T), train labels (n,), test tokens and test labels.
    """
    if config.data is None:
        return config, make_task(
            config.task, n_train=config.n_train, n_test=config.n_test, seq_len=config.seq_len,
            vocab_size=config.vocab_size, signal=config.signal, lag=config.lag, path=config.text,
            seed=config.seed)
    x, y, x_test, y_test = from_file(config.data, seed=config.seed)
    vocab_size = int(max(x.max(), x_test.max(), 1)) + 1
    return replace(config, seq_len=x.shape[1], vocab_size=vocab_size, n_train=len(x),
                   n_test=len(x_test)), (x, y, x_test, y_test)


def neighbour_offsets(config):
    """Offsets (key minus query) of the tokens that, together with the query's, tell the class."""
    # In a flattened image the pixel above stands one row, √T places, before.
    steps = {"proximity": [config.lag], "texture": [1, math.isqrt(config.seq_len)]}
    return [side * step for step in steps.get(config.task, [1]) for side in (-1, 1)]


def run(config):
    """Train one arm and measure it; returns plain numbers, ready for JSON. Sets torch's threads.

    `train_accuracy` is that of the first 1,000 training sequences, `curve` that of the first 64
    test sequences, [[step, accuracy], ...], where the steps of pretraining count.
    `attention_by_offset` and `neighbour_attention` are means over layers and heads.
    """
    start = time.perf_counter()
    torch.set_num_threads(config.threads)
    config, data = load_data(config)
    x, y, x_test, y_test = (torch.from_numpy(a).to(config.device) for a in data)  # (n, T), (n,)
    pretrain_steps, n_classes = config.pretrain_steps if config.spt else 0, int(y.max()) + 1
    if not config.spt and config.load is None:    # label training gets the same total of steps
        config = replace(config, finetune_steps=config.pretrain_steps + config.finetune_steps)
    every = math.ceil((pretrain_steps + config.finetune_steps) / 20)    # 1 + 20 looks at most
    middle, reach = config.seq_len - 1, min(config.seq_len - 1, 16)    # offsets shown: +-reach
    curve, near, by_offset, masked_losses = [], {}, {}, []

    def follow(step):
        if step == config.finetune_steps or step % every == 0:
            curve.append([pretrain_steps + step, accuracy(model, x_test[:64], y_test[:64])])

    # Attention matrices are T x T for every sequence and head: the longer, the fewer are looked at.
    def look(stage, model):
        sample = x_test[:max(1, 2**18 // config.seq_len**2)]              # (B, T), B T² bounded
        mass = attention_by_offset(model, sample).mean(dim=(0, 1)).tolist()
        near[stage] = sum(mass[middle + o] for o in neighbour_offsets(config))
        by_offset[stage] = [[o, mass[middle + o]] for o in range(-reach, reach + 1)]

    # Both arms start from the same random weights, which the seed gives.
    model = new_model(config, n_classes)
    if config.load is not None:
        load_weights(config.load, model, config)
    look("start", model)
    if config.spt:
        pretrained = copy.deepcopy(model)
        # To say "it is these weights", source and target must share nothing else, not even their
        # random start.
        if config.transfer != "all":
            pretrained = new_model(replace(config, seed=config.seed ^ 2**31), n_classes)
        masked_losses = pretrain(pretrained, x, config)
        look("pretraining", pretrained)
        transfer(pretrained, model, config.transfer)
    # From here on the arms are the same again. The class head is fresh in both, but
    # for --load, which brings its own.
    follow(0)
    finetune(model, x, y, config, follow)
    look("fine-tuning" if config.spt or config.load else "label training", model)
    if config.save is not None:
        save_weights(config.save, model, config)
    # Chance is what always naming the most frequent class would score.
    return dict(
        task=config.data or config.task, arm="spt" if config.spt else "labels", seed=config.seed,
        lr=config.lr, train_accuracy=accuracy(model, x[:1000], y[:1000]),
        test_accuracy=accuracy(model, x_test, y_test),
        chance=y_test.bincount().max().item() / len(y_test), count_baseline=count_baseline(*data),
        best_possible=None if config.data else best_possible_accuracy(
            config.task, *data[2:], vocab_size=config.vocab_size, lag=config.lag),
        pretrain_steps=pretrain_steps, finetune_steps=config.finetune_steps,
        steps_to_95=next((step for step, reached in curve if reached >= 0.95), None),
        masked_loss=statistics.mean(masked_losses[-20:]) if config.spt else None,
        n_parameters=sum(weight.numel() for weight in model.parameters()),
        n_train=len(x), n_test=len(x_test), seconds=time.perf_counter() - start, curve=curve,
        neighbour_attention=near, attention_by_offset=by_offset, config=asdict(config))


def shape_of(model, config):
    """What must agree for weights to fit, as plain values."""
    names = "seq_len", "vocab_size", "positions", "n_layers", "d_model", "n_heads", "d_ff"
    return {**{name: getattr(config, name) for name in names},
            "n_classes": model.class_head.out_features}


def save_weights(path, model, config):
    """Write weights and Config. A kill at any moment leaves the old file or the new, never half."""
    # os.replace swaps names in one step; until then the new file is whole under another name.
    buffer, temporary = io.BytesIO(), f"{path}.{os.getpid()}.tmp"
    torch.save({"shape": shape_of(model, config), "config": asdict(config),
                "weights": model.state_dict()}, buffer)
    try:
        with open(temporary, "wb") as file:
            file.write(buffer.getbuffer())
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        if os.path.exists(temporary):
            os.remove(temporary)


def load_weights(path, model, config):
    """Fill `model` with the weights of a file of `save_weights`; no code in the file ever runs.

    Raises OSError, and ValueError for another kind of file or one made for another shape.
    """
    ours = shape_of(model, config)
    try:
        with warnings.catch_warnings():    # torch warns of strangers' pickles; they are refused
            warnings.simplefilter("ignore")
            saved = torch.load(path, map_location=config.device, weights_only=True)
        theirs = {name: saved["shape"][name] for name in ours}
        if theirs == ours:
            model.load_state_dict(saved["weights"])
    except OSError:
        raise
    except Exception as error:    # torch and pickle raise a dozen kinds on files that are not ours
        raise ValueError(f"load {path}: no file of --save ({type(error).__name__})") from None
    different = [name for name in ours if theirs[name] != ours[name]]
    if different:
        raise ValueError(f"load {path}: made for " + ", ".join(
            f"{name} {theirs[name]} (this model has {ours[name]})" for name in different))


# ---------------------------------------------------------------------------------------------
# Many runs, side by side in processes of one thread each: at this size a second thread has too
# little to do. All that a run depends on is its Config, so its numbers are the same wherever and
# in whatever order it runs. What is finished is written down at once: Ctrl-C loses the rest only.
# ---------------------------------------------------------------------------------------------
LABEL_LRS = 1e-3, 3e-3, 1e-2    # label training gets its best of these, picked on the *test* set


def run_all(tagged, jobs, json_path):
    """Run every config of [(tags, config), ...], `jobs` at a time; results in the order asked for.

    A finished run goes to `json_path` at once, with its tags (a dict) beside the numbers.
    """
    def work(i):
        config = tagged[i][1]
        return config.n_layers * (config.pretrain_steps + config.finetune_steps)

    results = [None] * len(tagged)
    if not tagged:
        return results
    # CUDA does not survive a fork, so there workers are spawned; else the platform's own way will
    # do, and where that is a fork, as on Linux, workers need not import PyTorch.
    start = None if all(config.device == "cpu" for _, config in tagged) else "spawn"
    with ProcessPoolExecutor(min(jobs, len(tagged)), multiprocessing.get_context(start),
                             initializer=start_worker) as pool:
        longest_first = sorted(range(len(tagged)), key=work, reverse=True)    # no late straggler
        try:
            place = {pool.submit(run, tagged[i][1]): i for i in longest_first}
            for done in tqdm(as_completed(place), "runs", len(place), unit=" runs", disable=None):
                i = place[done]
                results[i] = done.result()
                append_json(json_path, {**tagged[i][0], **results[i]})
        except BaseException:    # one run failed, or Ctrl-C: end the others now
            for worker in multiprocessing.active_children():
                worker.kill()
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    return results


def start_worker():
    """Progress bars and Ctrl-C belong to the parent process."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    sys.stderr = open(os.devnull, "w")


def append_json(path, record):
    """Add one line to the file, whole or not at all; no path, no file."""
    if path is None:
        return
    # One unbuffered write: lines of several processes do not mix, and half a line is taken back.
    line = json.dumps(record).encode() + b"\n"
    with open(path, "ab", buffering=0) as file:
        end = file.seek(0, os.SEEK_END)
        if file.write(line) < len(line):
            file.truncate(end)
            raise OSError(errno.ENOSPC, "the disk is full, this line was left out", path)


def summary(results):
    """What rules look at: means over runs of "train" and "test" accuracy and of "near", attention
    on the neighbours at the end, and the median of "steps" to 95 % of 64 test sequences, where a
    run that got no further counts as infinite.
    """
    return {"train": statistics.mean(r["train_accuracy"] for r in results),
            "test": statistics.mean(r["test_accuracy"] for r in results),
            "near": statistics.mean(list(r["neighbour_attention"].values())[-1] for r in results),
            "steps": statistics.median(math.inf if r["steps_to_95"] is None else r["steps_to_95"]
                                       for r in results)}


# ---------------------------------------------------------------------------------------------
# What a person sees, in 80 columns. Accuracies never come alone: beside them stand chance, what
# counting tokens would score, the best possible, and train accuracy, which tells a model that
# cannot fit from one that does not generalize.
# ---------------------------------------------------------------------------------------------
def say(text):
    """Print; where the terminal has no Unicode, bars become digits from 1 to 8."""
    try:
        text.encode(sys.stdout.encoding or "ascii")
    except UnicodeEncodeError:
        text = text.translate(str.maketrans("▁▂▃▄▅▆▇█±φ", "12345678~f"))
    print(text, flush=True)


def bars(values, top):
    """Numbers from 0 to `top` as a row of bars."""
    return "".join("▁▂▃▄▅▆▇█"[min(7, int(8 * value / top))] for value in values)


def mean_curve(curves):
    """Curves [[x, y], ...] of several runs over the same x -> the x, the means of y."""
    places = [x for x, _ in curves[0]]
    return places, [statistics.mean(curve[i][1] for curve in curves) for i in range(len(places))]


def show_attention(results):
    """Attention mass by offset, a row of bars per stage of training, averaged over the runs."""
    rows = {}
    for stage in ("start", "label training", "pretraining", "fine-tuning"):
        seen = [result for result in results if stage in result["attention_by_offset"]]
        if seen:
            offsets, mass = mean_curve([r["attention_by_offset"][stage] for r in seen])
            near = statistics.mean(r["neighbour_attention"][stage] for r in seen)
            rows[stage] = mass, near
    # One scale for all rows, so that a bar means the same before and after training.
    top, half = max(max(mass) for mass, _ in rows.values()), len(offsets) // 2
    say(f"  attention by offset {offsets[0]:<+{half}}0{offsets[-1]:>+{half}}  on the neighbours")
    for stage, (mass, near) in rows.items():
        say(f"  {stage:<20}{bars(mass, top)}  {near:.3f}")


def yardsticks(result):
    """What accuracies are to be compared with."""
    best = result["best_possible"]
    return (f"chance {result['chance']:.3f}, counting tokens {result['count_baseline']:.3f}, "
            f"best possible {'not known' if best is None else f'{best:.3f}'}")


def single(config, argv):
    """Train one arm and say what came out."""
    result = run(config)
    append_json(config.json, result)
    say(f"{result['task']}: {result['n_train']:,} training sequences of "
        f"{result['config']['seq_len']} tokens, {result['n_parameters']:,} weights, "
        f"seed {config.seed}")
    before = f"{result['pretrain_steps']:,} steps on masked tokens, then " if config.spt else ""
    say(f"trained for {before}{result['finetune_steps']:,} steps on labels, in "
        f"{result['seconds']:.1f} s")
    show_attention([result])
    if config.save is None and config.load is None:
        other = [flag for flag in argv if flag != "--spt"] if config.spt else [*argv, "--spt"]
        say(f"the other arm: {shlex.join(['python', 'spt.py', *other])}")
    say(yardsticks(result))
    say(f"train accuracy {result['train_accuracy']:.3f}")
    say(f"test accuracy  {result['test_accuracy']:.3f}")


HEADER = f"{'':<29}{'train accuracy':<15}{'test accuracy':<15}{'95 % at step':<16}near"


def show_row(name, results):
    """A line under HEADER: mean ± standard deviation over runs, and where 95 % was reached."""
    # The spread is over runs, each with its own data, weights, batches and masks.
    def spread(key):
        values = [result[key] for result in results]
        more = f" ± {statistics.stdev(values):.3f}" if len(values) > 1 else ""
        return f"{statistics.mean(values):.3f}{more}"

    reached = [r["steps_to_95"] for r in results if r["steps_to_95"] is not None]
    total = results[0]["pretrain_steps"] + results[0]["finetune_steps"]
    steps = f"{statistics.mean(reached):,.0f}" if reached else f"not in {total:,}"
    if 0 < len(reached) < len(results):
        steps += f" ({len(reached)} of {len(results)})"
    say(f"{name:<29}{spread('train_accuracy'):<15}{spread('test_accuracy'):<15}{steps:<16}"
        f"{summary(results)['near']:.3f}")


def compare(config):
    """Both arms over several seeds, side by side; the label-only arm is tuned in its favour."""
    # Label training gets three learning rates and keeps the best, chosen on the very test set it
    # is measured on; SPT gets one.
    arms = {f"labels only, lr {lr:g}": replace(config, spt=False, lr=lr)
            for lr in sorted({*LABEL_LRS, config.lr})}
    arms[f"SPT, lr {config.lr:g}"] = replace(config, spt=True)
    results = run_all([({}, replace(arm, seed=config.seed + i)) for arm in arms.values()
                       for i in range(config.seeds)], config.jobs, config.json)
    groups = {name: results[i * config.seeds:(i + 1) * config.seeds] for i, name in enumerate(arms)}
    # From here on label training is represented by its best learning rate.
    *label_names, spt = groups
    best = max(label_names, key=lambda name: summary(groups[name])["test"])
    say(f"{results[0]['task']}: {results[0]['n_train']:,} training sequences, "
        f"{results[0]['finetune_steps']:,} steps in either arm, {config.seeds} seeds")
    say(f"{yardsticks(results[0])}\n{HEADER}")
    for name, group in groups.items():
        show_row(name, group)
    say(f"gap in test accuracy, SPT less the best of labels only: "
        f"{summary(groups[spt])['test'] - summary(groups[best])['test']:.3f}")
    say(f"seconds for one run: {statistics.mean(r['seconds'] for r in results):.1f}\n")
    say("  test accuracy over steps; SPT spends its first steps on masked tokens")
    for name in (best, spt):
        steps, heights = mean_curve([r["curve"] for r in groups[name]])
        say(f"  {name:<22}{bars(heights, 1):>21}  to step {steps[-1]:,}")
    show_attention(groups[best] + groups[spt])


# ---------------------------------------------------------------------------------------------
# The claims, after the paper's abstract, as data: a row is what differs from its task's recipe,
# and what must hold of the numbers that come out. Unless a row changes them, both arms get the
# recipe's total of steps.
# ---------------------------------------------------------------------------------------------
LONGER = dict(pretrain_steps=320, finetune_steps=300)    # what is copied alone must be good
CLAIMS = {    # {claim: {row: (changes, rule, ...)}}; a rule reads a row's `summary`
    "1 SPT beats training on the labels alone, at equal steps": {
        "labels only": (dict(lrs=LABEL_LRS), "test < 0.60"),
        "SPT": (dict(spt=True), "test > 0.95", "near > 5 x labels only"),
    },
    "1b The same on real text: does English run forwards or backwards?": {
        "text: labels only": (dict(task="text", lrs=LABEL_LRS), "test < 0.60"),
        "text: SPT": (dict(task="text", spt=True), "test > 0.95"),
    },
    "1c The lead is in steps: given ten times as many, labels find it, too": {
        # 160 + 2,440 steps are ten times 260; 0.003 is the rate that suits so many.
        "labels, 10x steps": (dict(lrs=(0.003,), finetune_steps=2440), "test > 0.70",
                              "steps > 4 x SPT"),
        "labels, learned positions": (dict(positions="learned", lrs=LABEL_LRS), "test < 0.75"),
    },
    "2 It is not depth: more layers do not help labels": {
        "labels, 2 layers": (dict(n_layers=2, lrs=LABEL_LRS), "test < 0.60"),
        "labels, 4 layers": (dict(n_layers=4, lrs=LABEL_LRS), "test < 0.60"),
        "SPT, 2 layers": (dict(n_layers=2, spt=True), "test > 0.90"),
    },
    "3 It is not generalization alone: more sequences do not help labels": {
        # A model that only overfits would do better with more sequences; one that cannot find the
        # pattern can still learn few sequences by heart.
        "labels, 50,000 sequences": (dict(n_train=50_000, lrs=LABEL_LRS), "train < 0.60"),
        "... and 10x steps": (dict(n_train=50_000, lrs=(0.003,), finetune_steps=2440),
                              "train < 0.90"),
        "labels, 200 sequences": (dict(n_train=200, lrs=LABEL_LRS), "test < 0.65"),
        "SPT, 200 sequences": (dict(n_train=200, spt=True), "test > 0.85"),
    },
    "4 It is the query and key maps (qk): copied, then 300 steps on labels": {
        # In the first two, what is copied meets weights it has never seen, those of another seed.
        "only qk": (dict(spt=True, transfer="qk", **LONGER), "test > 0.95"),
        "all but qk": (dict(spt=True, transfer="not-qk", **LONGER), "test < 0.60"),
        "all, qk then frozen": (dict(spt=True, freeze_qk=True, finetune_steps=300),
                                "test > 0.90"),
    },
    "5 They learn to look next door; given offset and side, labels suffice": {
        # Rotary positions and the one-sided bias know left from right. |i - j| does not: a sequence
        # and its mirror image, which is of the other class, look the same to it.
        "SPT, no positions": (dict(spt=True, positions="none"), "test < 0.60"),
        "labels, rotary": (dict(positions="rotary"), "test > 0.95"),
        "labels, distance bias": (dict(positions="distance"), "test > 0.95"),
        "labels, bias in |i - j|": (dict(positions="symmetric"), "test < 0.60"),
    },
    "Control, and where SPT does not help: counting tokens is enough": {
        # Token counts are all there is, and label training finds them at once.
        "bag: labels only": (dict(task="bag"), "test > 0.90"),
        "bag: SPT": (dict(task="bag", spt=True), "test > 0.97 x bag: labels only",
                     "test < 1.03 x bag: labels only"),
    },
}


def obeys(rule, row, rows):
    """Whether the `summary` of a row obeys "column < bound" or "column > factor x other row"."""
    column, sign, bound, *other = rule.split(" ", 4)    # other: "x" and a row's name, or nothing
    limit = float(bound) * (rows[other[1]][column] if other else 1)
    return row[column] < limit if sign == "<" else row[column] > limit


def reproduce(config):
    """Measure every claim and print rows and verdicts; returns whether all of them hold.

    Of several learning rates, `lrs`, a row keeps the one that is best on the test set of the
    first seed.
    """
    claims = {title: rows for title, rows in CLAIMS.items()
              if not config.quick or title.startswith(("1 ", "5 "))}
    first, best, runs = [], {}, {}
    for title, rows in claims.items():
        for name, (changes, *_) in rows.items():
            changes = {"task": "proximity", "seed": config.seed, "device": config.device,
                       "threads": config.threads, **changes}
            lrs = changes.pop("lrs", [Config.lr])
            first += [(dict(claim=title, row=name), recipe(**changes, lr=lr)) for lr in lrs]
    # First seed: every learning rate. The other seeds: the rate that was best.
    for (tags, made), result in zip(first, run_all(first, config.jobs, config.json)):
        name = tags["row"]
        if name not in runs or result["test_accuracy"] > runs[name][0]["test_accuracy"]:
            best[name], runs[name] = (tags, made), [result]
    n_seeds = 1 if config.quick else config.seeds
    rest = [(tags, replace(made, seed=config.seed + i)) for tags, made in best.values()
            for i in range(1, n_seeds)]
    for (tags, _), result in zip(rest, run_all(rest, config.jobs, config.json)):
        runs[tags["row"]].append(result)
    numbers, verdicts = {name: summary(results) for name, results in runs.items()}, []

    def verdict(holds, rules):
        verdicts.append(holds)
        say(textwrap.fill(f"  {'holds' if holds else 'DOES NOT HOLD'}: {rules}", 80,
                          subsequent_indent="    "))

    say(f"mean ± standard deviation, seeds {config.seed} to {config.seed + n_seeds - 1}\n{HEADER}")
    for title, rows in claims.items():
        say(title)
        for name in rows:
            show_row("  " + name, runs[name])
        rules = [(name, rule) for name, (_, *own) in rows.items() for rule in own]
        verdict(all(obeys(rule, numbers[name], numbers) for name, rule in rules),
                "; ".join(f"{name}: {rule}" for name, rule in rules))
    say("6 In theory: labels are locally blind to proximity, masked tokens are not")
    verdict(theory(config), "labels exactly blind along all circulant directions, not along "
            "the other; masked tokens not blind, where neighbours depend on each other")
    return all(verdicts)


# ---------------------------------------------------------------------------------------------
# Theory: why labels do not teach attention to look at neighbours, and masked tokens do.
#
# Set-up. One attention layer, no residual, scores S (T, T) that depend on positions only (what
# query and key maps can make of positional encodings):
#     A = softmax(S) by rows,  z_i = Σ_j A_ij v_j,  v_j the value of token j,  φ token by token,
#     label logits Wᵀ mean_i φ(z_i),  logits of a masked token i: Uᵀ φ(z_i).
# A direction Δ in the space of scores is *circulant* if Δ_ij depends on (j - i) mod T alone: it
# prefers an offset, wherever the query stands. "Look one to the left" is Δ_ij = 1 where j = i - 1,
# else 0; proximity is made of such directions. (mod T closes the sequence to a circle, so that all
# columns are alike; with open ends the columns near them differ, a fraction O(1/T) of all.)
#
# 1. φ linear: labels are blind along all circulant S, everywhere. S circulant makes A circulant:
#    its columns, too, sum to 1, and mean_i z_i = (1/T) Σ_j (Σ_i A_ij) v_j = mean_j v_j. The
#    scores have dropped out: derivatives of every order are 0, whatever data and weights are.
# 2. Any φ: labels are blind to first order at S = 0, uniform attention, although looking at
#    neighbours may now pay further out. At S = 0 every z_i is the mean value v̄, and
#    dA_ij = (Δ_ij - mean_k Δ_ik) / T has zero column sums if Δ is circulant:
#        d mean_i φ(z_i) = φ'(v̄) (1/T) Σ_j (Σ_i dA_ij) v_j = 0.
# 3. Masked tokens escape, since each asks for itself, before any mean over i. Along "look ℓ to
#    the side" dz_i = (v_{i+ℓ} - v̄) / T. With π the predicted probabilities, the loss moves by
#        -(1/T) E[(onehot(x_i) - π)ᵀ Uᵀ φ'(v̄) (v_{i+ℓ} - v̄)],  i masked,
#    which in general is not 0 when the symbols x_i and x_{i+ℓ} depend on each other.
#
# A caution. Token i is itself a mask symbol, so "look to the side" also means "look less at
# yourself", which pays a little (O(1/T)) with any data. So each row of Δ here is 0 at j = i and
# has mean 0 over all other j; for shuffled tokens the expected derivative is then exactly 0.
# ---------------------------------------------------------------------------------------------
def blind_directions(tokens, labels, is_masked, values, to_class, to_symbol, phi=torch.tanh,
                     scores=None, seed=0):
    """Derivatives of the label loss and of the masked loss along directions of the scores.

    The set-up above: tokens (n, T) and labels (n,) int64, is_masked (n, T) bool, values (V + 1, C)
    with the mask symbol's last, to_class (C, K), to_symbol (C, V), token-wise `phi`, and `scores`
    (T, T) at which to differentiate, by default 0. Precision is that of `values`.
    Returns {direction: (label derivative, masked derivative)}, directions of norm √T, and the two
    losses, (label, masked).
    """
    T = tokens.shape[1]
    # One layer of attention whose scores do not look at tokens, then the two ways to ask.
    scores = torch.zeros(T, T, dtype=values.dtype) if scores is None else scores
    scores = scores.clone().requires_grad_()                              # (T, T)
    weights = scores.softmax(dim=-1)                                      # (T, T)
    corrupted = tokens.masked_fill(is_masked, len(values) - 1)            # (n, T)
    pooled = phi(weights @ values[tokens]).mean(dim=1)                    # (n, C)
    hidden = phi(weights @ values[corrupted])[is_masked]                  # (N, C), N masked tokens
    losses = (F.cross_entropy(pooled @ to_class, labels),
              F.cross_entropy(hidden @ to_symbol, tokens[is_masked]))
    gradients = [torch.autograd.grad(loss, scores, retain_graph=True)[0] for loss in losses]

    generator = torch.Generator().manual_seed(seed)
    offset = (torch.arange(T) - torch.arange(T)[:, None]) % T             # (T, T), (j - i) mod T
    directions = {                                                        # (T, T) each
        "look left": offset == T - 1,
        "look right": offset == 1,
        "look both ways": (offset == 1) | (offset == T - 1),
        "random circulant": torch.randn(T, generator=generator)[offset],
        "random, not circulant": torch.randn(T, T, generator=generator),
    }
    # The derivative along a direction is its inner product with the gradient.
    found, others = {}, (offset != 0).to(values.dtype)                    # (T, T)
    for name, direction in directions.items():
        # Rows spare j = i and have mean 0 over all other j.
        direction = direction * others                                    # (T, T)
        direction -= others * direction.sum(dim=-1, keepdim=True) / (T - 1)  # (T, T)
        # All of one length, so that derivatives along them can be compared.
        direction *= math.sqrt(T) / direction.norm()                      # (T, T)
        found[name] = tuple((gradient * direction).sum().item() for gradient in gradients)
    return found, tuple(loss.item() for loss in losses)


def theory_inputs(n=2000, seq_len=16, vocab_size=8, d_model=8, shuffled=False, seed=0):
    """Arguments of `blind_directions`: sequences of proximity, random weights in float64."""
    tokens, labels = map(torch.from_numpy, proximity(
        n=n, seq_len=seq_len, vocab_size=vocab_size, signal=0.5, lag=1, seed=seed))
    generator = torch.Generator().manual_seed(seed)

    def random(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64)
    values = random(vocab_size + 1, d_model)                              # (V + 1, C)
    to_class, to_symbol = random(d_model, 2), random(d_model, vocab_size)  # (C, K), (C, V)
    if shuffled:
        order = torch.rand(tokens.shape, generator=generator).argsort(dim=1)  # (n, T)
        tokens = tokens.gather(1, order)                                  # (n, T)
    is_masked = torch.rand(tokens.shape, generator=generator) < 0.3       # (n, T)
    scale = math.sqrt(d_model)                                            # logits of size 1
    return tokens, labels, is_masked, values, to_class / scale, to_symbol / scale


def offset_gradients(model, tokens, labels, config):
    """The same question to the full Transformer: residual stream, LayerNorm, MLP and all.

    tokens (n, T), labels (n,) in 0, 1; the first 256 are used, in batches. Gradients with respect
    to an extra score bias by offset (j - i) mod T; a negative one draws attention there. What has
    nothing to do with labels or with neighbours is taken out: the label part is half the difference
    to the loss with the two labels swapped, the masked part the difference to the loss of the same
    tokens shuffled. The extra bias takes the place of any bias that `model` has, and stays there.
    Returns {direction: (label part, masked part)}, each the mean over batches and its standard
    error.
    """
    V, T = config.vocab_size, config.seq_len
    offset = (torch.arange(T) - torch.arange(T)[:, None]) % T             # (T, T)
    generator = torch.Generator().manual_seed(config.seed)
    # A bias of zeros changes nothing, but has a gradient. Masks are the same in a loss and in its
    # control, so that the difference is not drowned by the luck of the draw.
    both_ways, sides = [], []    # a pair (label, masked) for each batch
    for x, y in zip(tokens[:256].split(32), labels.split(32)):            # (B, T), (B,)
        order = torch.rand(x.shape, generator=generator).argsort(dim=1)   # (B, T)
        shuffled = x.gather(1, order)                                     # (B, T)
        corrupted, is_masked = mask_tokens(x, V, config.mask_ratio, generator)
        bias = torch.zeros(T, requires_grad=True)                         # (T,)
        for block in model.blocks:
            block.attention.bias = bias[offset][None]                     # (1, T, T)
        logits = model.classify(x)                                        # (B, K)
        label = (F.cross_entropy(logits, y) - F.cross_entropy(logits, 1 - y)) / 2
        masked = (masked_loss(model, x, corrupted, is_masked)
                  - masked_loss(model, shuffled, shuffled.masked_fill(is_masked, V), is_masked))
        gradients = torch.stack([torch.autograd.grad(loss, bias, retain_graph=True)[0]
                                 for loss in (label, masked)])            # (2, T)
        left, right = gradients[:, -1], gradients[:, 1]                   # (2,) each
        both_ways.append(left + right - 2 * gradients[:, 1:].mean(dim=1))  # (2,)
        sides.append(left - right)                                        # (2,)
    return {name: [(part.mean().item(), part.std().item() / math.sqrt(len(part)))
                   for part in torch.stack(found).T]                      # (batches,) each
            for name, found in (("look both ways", both_ways), ("left, not right", sides))}


def theory(config):
    """Print what labels and masked tokens see; returns whether labels are blind as proved."""
    torch.set_num_threads(config.threads)
    holds, rounding = [], 1e-12    # a float64 that should be 0 is smaller than this
    for title, shuffled in (("tokens depend on their neighbours", False),
                            ("the same tokens, shuffled", True)):
        say(f"  {title:<38}{'|label derivative|':<20}|masked derivative|")
        found, _ = blind_directions(*theory_inputs(shuffled=shuffled, seed=config.seed))
        for name, (label, masked) in found.items():
            seen = "exactly blind" if abs(label) < rounding else f"{abs(label):.1e}"
            say(f"    {name:<36}{seen:<20}{abs(masked):.1e}")
        *circulant, (not_circulant, _) = found.values()
        holds += [abs(not_circulant) > 1e-9, all(abs(label) < rounding for label, _ in circulant),
                  shuffled or all(abs(masked) > 1e-6 for _, masked in circulant)]

    # Proposition 1 is about any circulant scores: walk from uniform attention to far away.
    inputs = theory_inputs(n=200, seed=config.seed)
    generator = torch.Generator().manual_seed(config.seed)
    T, losses = inputs[0].shape[1], []
    offset = (torch.arange(T) - torch.arange(T)[:, None]) % T             # (T, T)
    for size in (0, 1, 3, 10):
        kernel = size * torch.randn(T, generator=generator, dtype=torch.float64)  # (T,)
        losses += blind_directions(*inputs, phi=lambda z: z, scores=kernel[offset])[1:]
    label_range, masked_range = (max(column) - min(column) for column in zip(*losses))
    say(f"  {'far from uniform attention, linear φ':<38}{'label loss':<20}masked loss")
    say(f"    {'varies over circulant scores by':<36}{label_range:<20.0e}{masked_range:.2f}")

    # And the bridge from the one layer of the proof to the model that is trained.
    full = recipe("proximity", seed=config.seed)
    tokens, labels = map(torch.from_numpy, load_data(full)[1][:2])        # (n, T), (n,)
    say(f"  {'the full model at its random start':<38}{'label part':<20}masked part (x 1e-6)")
    for name, parts in offset_gradients(new_model(full), tokens, labels, full).items():
        label, masked = (f"{1e6 * mean:+,.0f} ± {1e6 * error:,.0f}" for mean, error in parts)
        say(f"    {name:<36}{label:<20}{masked}")
    return all(holds) and label_range < rounding < masked_range


# ---------------------------------------------------------------------------------------------
# The command line. Whatever is wrong with flags, files or the device is found before training
# starts, and said in one line: no traceback, nothing half-written, exit status 2.
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
            own = "".join(f", {task} {changes[f.name]}" for task, changes in RECIPES.items()
                          if f.name in changes)
            usual = "" if f.default is None else f" (default {f.default}{own})"
            parser.add_argument(flag, type=f.type, help=about + usual,
                                metavar="|".join(f.metadata["choices"] or [f.type.__name__]))
    # SUPPRESS leaves out what was not given, so that a task's recipe can fill it in.
    given = vars(parser.parse_args(argv))
    for name in ("task", "text", "seq_len", "vocab_size", "n_train", "n_test", "signal", "lag"):
        if "data" in given and name in given:
            raise ValueError(f"{name} {given[name]}: does not go with --data, which tells it")
    if "quick" in given and "reproduce" not in given:
        raise ValueError("quick goes with --reproduce")
    if ("save" in given or "load" in given) and "compare" in given:
        raise ValueError("save and --load go with a single run")
    # These two say themselves what they run, and refuse flags that say otherwise.
    takes = {"reproduce": {"quick", "seed", "seeds", "jobs", "threads", "device", "json"},
             "theory": {"seed", "threads"}}
    for mode in takes.keys() & given.keys():
        for name in given.keys() - takes[mode] - {mode}:
            raise ValueError(f"{name} {given[name]}: does not go with --{mode}")
    return recipe(given.pop("task", Config.task), **given)


def check(config):
    """Find what is wrong with device, data and files before training: ValueError or OSError."""
    try:
        torch.zeros(1, device=config.device).item()
    except (RuntimeError, AssertionError):
        raise ValueError(f"device {config.device}: not on this machine") from None
    config, (_, y, _, _) = load_data(config)
    if config.load is not None:
        load_weights(config.load, new_model(config, int(y.max()) + 1), config)
    if config.save is not None:
        if os.path.isdir(config.save):
            raise ValueError(f"save {config.save}: is a folder")
        # Only writing tells whether writing is possible; the file itself is not touched.
        trial = f"{config.save}.{os.getpid()}.tmp"
        open(trial, "wb").close()
        os.remove(trial)
    if config.json is not None:
        open(config.json, "ab").close()


def explain(error):
    """One line for a person: the flag or the file, what was wrong, what is allowed."""
    # A ValueError of this project starts with the name of a Config field; the flag is made of it.
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename or 'a file'}: {error.strerror}"
    name, _, rest = str(error).partition(" ")
    flag = "--" + name.replace("_", "-") if name in Config.__dataclass_fields__ else name
    return " ".join(f"{flag} {rest}".split())


def main(argv=None):
    """Run the command line; returns the exit status: 0, 1 if a claim fails, 2 for bad input, 130
    for Ctrl-C.
    """
    argv = sys.argv[1:] if argv is None else argv
    # What is caught here is what flags, files, memory or a diverging loss can cause; anything else
    # is a bug and keeps its traceback.
    try:
        config = parse(argv)
        check(config)
        if config.reproduce:
            return 0 if reproduce(config) else 1
        if config.theory:
            return 0 if theory(config) else 1
        if config.compare:
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
    # What the imports made is here to stay. Frozen, it is left alone by the garbage collector,
    # which else goes through it time and again, and once more at exit: 0.4 s of every command.
    gc.freeze()
    sys.exit(main())
