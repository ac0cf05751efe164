"""Why does self-pretraining help a Transformer? One file that runs, and shows it.

    python spt.py --task proximity --spt

Self-pretraining (SPT) trains a model to predict masked tokens of its own training sequences, and
then fine-tunes it on their labels. No other data is used. The task here is *proximity*. In class 1
a token is often the previous one plus 1, in class 0 it is often the previous one minus 1:

    class 1    2 3 4 0 1 2 5 6          with masks    2 3 _ 0 1 _ 5 6
    class 0    6 5 4 1 0 7 2 1          (there are 8 symbols, on a circle: after 7 comes 0)

All tokens are equally frequent in both classes, so only who stands next to whom tells them apart.
After 600 steps on labels alone the model still guesses. After 400 steps on masked tokens and 200
on labels it is nearly always right. The command above takes about 6 seconds on one core of an AMD
EPYC with torch 2.13.0, and two of its lines are

    SPT, seed 0: 400 steps on masked tokens, 200 on labels
    accuracy on test 1.000, on train 1.000

Why? At the start attention is nearly uniform: each position receives about the average of all
tokens. From there, a label gives no more than a faint hint that looking near pays, and a masked
token gives not much more. A faint hint drowns in the noise of a small batch, and it takes many
targets to bring it out. One sequence has one label, but many tokens to mask. So masks teach
attention to look near, and once it does, few steps on labels suffice.

    python spt.py --task proximity --lr 0.01                labels alone: 0.51
    python spt.py --task proximity --lr 0.01 --start near   the same, attention starts near: 1.00
    python spt.py --compare                 do I need SPT? labels and SPT over several seeds
    python -m experiments.targets           how many targets it takes until learning takes off
    python -m experiments.theory            why the hint is faint, proved in a simpler model
    python -m experiments.claims            every claim, with a verdict

After Coser et al., arXiv 2605.21070 (2026), and Amos et al., arXiv 2310.02980 (2023). Tasks and
set-up are this project's own. The method comes first and ends with `accuracy`. After it come where
attention starts and looks, one run, the comparison and the command line.

Letters in shape comments: B sequences in a batch, n in a data set, T tokens in a sequence, C width
(d_model), H heads, D = C / H width of a head, V symbols (token V is the mask), K classes, L layers,
M masked tokens in a batch.
"""
import argparse
import inspect
import json
import math
import os
import signal
import statistics
import sys
import textwrap
import threading
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field, fields, replace
from multiprocessing import active_children, get_context, parent_process

import torch
from torch import nn
from torch.nn import functional as F
from tqdm import tqdm

import synthetic_tasks as tasks


# ---------------------------------------------------------------------------------------------
# Positions. Attention by itself sees a bag of tokens: if they are shuffled, its outputs are
# shuffled alike and do not change otherwise. So the model is told where each token stands.
#
# Sinusoidal positions are absolute: each position has a vector of its own, which is added to the
# token's. Neighbours have similar vectors, but no part of the model knows that yet. To look at
# neighbours, attention must learn to compare these vectors. Rotary positions are relative: they
# put the offset between two tokens into attention by hand.
#
# Both functions compute the same angles, each by itself, so that each can be copied alone.
# ---------------------------------------------------------------------------------------------
POSITIONS = ("sinusoidal", "learned", "rotary", "shuffled", "none")


def sinusoidal_positions(seq_len, d_model):
    """One vector for each position, made of sines and cosines of many wavelengths.

    PE[t, 2i] = sin(t / 10000^(2i/C)), PE[t, 2i+1] = cos(same)   (Vaswani et al. 2017, sec. 3.5).
    Returns (T, C) float32, for an even d_model.
    """
    exponent = torch.arange(0, d_model, 2, dtype=torch.float32) / d_model
    frequency = 10000.0 ** -exponent                                      # (C/2,)
    angle = torch.arange(seq_len, dtype=torch.float32)[:, None] * frequency  # (T, C/2)
    # sin a sin b + cos a cos b = cos(a - b), so the inner product of two rows depends only on
    # their offset, and it is largest where the offset is 0.
    pairs = torch.stack([angle.sin(), angle.cos()], dim=-1)               # (T, C/2, 2)
    return pairs.flatten(1)                                               # (T, C)


def rotate(x):
    """Rotary positions: turn pair i of token t by the angle t / 10000^(2i/D).

    x (..., T, D) with D even -> the same shape. Inner products of rotated queries and keys depend
    on positions only through their difference (Su et al. 2021, sec. 3.2).
    """
    T, D = x.shape[-2:]
    exponent = torch.arange(0, D, 2, dtype=torch.float32, device=x.device) / D
    frequency = 10000.0 ** -exponent                                      # (D/2,)
    position = torch.arange(T, dtype=torch.float32, device=x.device)
    angle = position[:, None] * frequency                                 # (T, D/2)
    cos = angle.cos().to(x.dtype)
    sin = angle.sin().to(x.dtype)
    a = x[..., 0::2]                                                      # (..., T, D/2)
    b = x[..., 1::2]
    # This is how the complex number a + ib is multiplied by exp(i angle).
    pairs = torch.stack([a * cos - b * sin, a * sin + b * cos], dim=-1)   # (..., T, D/2, 2)
    return pairs.flatten(-2)                                              # (..., T, D)


# ---------------------------------------------------------------------------------------------
# The model: a pre-norm Transformer encoder with two output layers, one to fill in tokens and one
# to classify. There is no causal mask: every position may look at every other.
# ---------------------------------------------------------------------------------------------
class Attention(nn.Module):
    """Multi-head self-attention, softmax(q kᵀ / √D) v   (Vaswani et al. 2017, sec. 3.2).

    x (B, T, C) -> (B, T, C). Raises ValueError where d_model is not a multiple of 2 * n_heads.
    """

    def __init__(self, d_model, n_heads, rotary=False):
        super().__init__()
        # The width of a head must be even, because rotary positions turn pairs.
        if d_model % (2 * n_heads) != 0:
            raise ValueError(f"d_model {d_model}: must be a multiple of 2 x n_heads {n_heads}")
        self.n_heads = n_heads
        self.rotary = rotary
        # Query and key decide where to look, value and out what to bring back.
        self.query = nn.Linear(d_model, d_model, bias=False)
        self.key = nn.Linear(d_model, d_model, bias=False)
        self.value = nn.Linear(d_model, d_model, bias=False)
        self.out = nn.Linear(d_model, d_model, bias=False)

    def split_heads(self, x):
        B, T, C = x.shape
        x = x.view(B, T, self.n_heads, C // self.n_heads)                 # (B, T, H, D)
        return x.transpose(1, 2)                                          # (B, H, T, D)

    def queries_and_keys(self, x):
        q = self.split_heads(self.query(x))                               # (B, H, T, D)
        k = self.split_heads(self.key(x))
        if self.rotary:
            q = rotate(q)
            k = rotate(k)
        return q, k

    def weights(self, x):
        """How much each position looks at every other, (B, H, T, T); the last axis sums to 1."""
        q, k = self.queries_and_keys(x)
        # Without the division scores would grow with D, and the softmax would start spiky.
        scores = q @ k.transpose(-2, -1) / math.sqrt(q.shape[-1])         # (B, H, T, T)
        return scores.softmax(dim=-1)

    def forward(self, x):
        q, k = self.queries_and_keys(x)
        v = self.split_heads(self.value(x))                               # (B, H, T, D)
        # The same as self.weights(x) @ v, but the weights are never stored.
        y = F.scaled_dot_product_attention(q, k, v)                       # (B, H, T, D)
        return self.out(y.transpose(1, 2).flatten(2))                     # (B, T, C)


class Block(nn.Module):
    """Pre-norm residual block, (B, T, C) -> (B, T, C): add attention, then add an MLP."""

    def __init__(self, d_model, n_heads, d_ff, rotary=False):
        super().__init__()
        self.norm1 = nn.LayerNorm(d_model)
        self.attention = Attention(d_model, n_heads, rotary)
        self.norm2 = nn.LayerNorm(d_model)
        self.mlp = nn.Sequential(
            nn.Linear(d_model, d_ff, bias=False),
            nn.ReLU(),
            nn.Linear(d_ff, d_model, bias=False),
        )

    def forward(self, x):
        x = x + self.attention(self.norm1(x))
        x = x + self.mlp(self.norm2(x))
        return x


class Transformer(nn.Module):
    """Encoder with a reconstruction head and a class head.

    tokens (B, T) int64 in [0, V], where T is seq_len and V is the mask symbol:
        model(tokens)             -> (B, T, C)  features
        model.reconstruct(tokens) -> (B, T, V)  logits of the symbol at each position
        model.classify(tokens)    -> (B, K)     logits of the class
    `positions` is one of POSITIONS: "learned" starts as noise of std 1, "shuffled" has the
    sinusoidal rows in a random order. Raises ValueError for any other, or where the widths do not
    fit.
    """

    def __init__(self, vocab_size, seq_len, n_classes=2, positions="sinusoidal", n_layers=1,
                 d_model=32, n_heads=2, d_ff=64):
        super().__init__()
        if positions not in POSITIONS:
            raise ValueError(f"positions {positions!r}: must be one of {', '.join(POSITIONS)}")
        self.token_embedding = nn.Embedding(vocab_size + 1, d_model)      # V symbols and the mask
        # PyTorch's std of 1 would give a token the squared length C, where a sinusoidal position
        # has C / 2. Tokens would outweigh positions, and once query and key agree, a token would
        # look at equal tokens instead of near ones. With std 0.5 a token has C / 4.
        nn.init.normal_(self.token_embedding.weight, std=0.5)
        rotary = positions == "rotary"
        self.blocks = nn.ModuleList()
        for _ in range(n_layers):
            self.blocks.append(Block(d_model, n_heads, d_ff, rotary))
        self.norm = nn.LayerNorm(d_model)
        self.reconstruction_head = nn.Linear(d_model, vocab_size)         # (B, T, C) -> (B, T, V)
        self.class_head = nn.Linear(d_model, n_classes)                   # (B, C) -> (B, K)
        # Where the default dtype or device is another one, positions follow the weights.
        sinusoids = sinusoidal_positions(seq_len, d_model).to(self.norm.weight)  # (T, C)
        if positions == "learned":
            self.positions = nn.Parameter(torch.randn(seq_len, d_model))  # (T, C)
        elif positions == "sinusoidal":
            self.register_buffer("positions", sinusoids)
        elif positions == "shuffled":
            self.register_buffer("positions", sinusoids[torch.randperm(seq_len)])
        else:
            self.positions = None

    def embed(self, tokens):
        x = self.token_embedding(tokens)                                  # (B, T, C)
        if self.positions is not None:
            x = x + self.positions
        return x

    def forward(self, tokens):
        x = self.embed(tokens)                                            # (B, T, C)
        for block in self.blocks:
            x = block(x)
        return self.norm(x)

    def reconstruct(self, tokens):
        """Logits (B, T, V) of the symbol at each position of tokens (B, T)."""
        return self.reconstruction_head(self(tokens))

    def classify(self, tokens):
        """Logits (B, K) of the class, read from the average over the positions of tokens (B, T).

        This average is why labels alone are slow to teach attention where to look. Two neighbours
        can show in it only if attention has brought them together before. As long as attention is
        nearly uniform, looking a bit nearer only redistributes tokens between positions, and their
        average hardly notices. That is a faint hint, and one label for each sequence is few to
        bring it out of the noise.
        """
        x = self(tokens).mean(dim=1)                                      # (B, C)
        return self.class_head(x)


# ---------------------------------------------------------------------------------------------
# Self-pretraining. This is all of it, for tokens (B, T) and labels (B,) of one batch:
#
#     # pretraining: hide 30 % of the tokens, and ask for them
#     draws = torch.rand(tokens.shape)                                        # (B, T)
#     is_masked = draws < 0.3                                                 # (B, T)
#     corrupted = tokens.masked_fill(is_masked, mask_id)                      # (B, T)
#     logits = model.reconstruct(corrupted)                                   # (B, T, V)
#     masked_loss = F.cross_entropy(logits[is_masked], tokens[is_masked])     # ()
#     # fine-tuning: show all tokens, and ask for the labels
#     label_loss = F.cross_entropy(model.classify(tokens), labels)            # ()
#
# The functions below are these lines with their checks, and a loop that repeats them with AdamW.
# `pretrain`, `finetune` and `accuracy` ask of a model only that it has reconstruct(tokens) and
# classify(tokens), as above, so any encoder will do. Training never sees the test sequences.
# ---------------------------------------------------------------------------------------------
def mask_tokens(tokens, mask_id, mask_ratio, generator=None):
    """Mask each token with probability `mask_ratio`, independently of the others.

    tokens (B, T) int64 -> corrupted (B, T), where masked tokens are replaced by `mask_id`, and
    is_masked (B, T) bool, True where a token was masked and is to be predicted. A token that is
    `mask_id` already is never a target. Unlike BERT's, a masked token is always replaced by the
    mask symbol. `generator` is a CPU torch.Generator. Raises ValueError for a token above
    `mask_id`, or a `mask_ratio` that is not in (0, 1].
    """
    if not 0 < mask_ratio <= 1:
        raise ValueError(f"mask_ratio {mask_ratio}: must be above 0 and at most 1")
    if (tokens > mask_id).any():
        raise ValueError(f"mask_id {mask_id}: must be above all symbols, but one is "
                         f"{tokens.max()}")
    # Drawn on the CPU and then moved, so that a seed masks the same tokens on any device.
    draws = torch.rand(tokens.shape, generator=generator, device="cpu")   # (B, T)
    is_masked = (draws < mask_ratio).to(tokens.device) & (tokens != mask_id)
    corrupted = tokens.masked_fill(is_masked, mask_id)
    return corrupted, is_masked


def masked_loss(model, tokens, corrupted, is_masked):
    """Mean cross-entropy, in nats, of the masked tokens and of no others; 0 if none is masked.

    tokens and corrupted (B, T) int64 and is_masked (B, T) bool, as from `mask_tokens`.
    """
    logits = model.reconstruct(corrupted)[is_masked]                      # (M, V)
    targets = tokens[is_masked]                                           # (M,)
    if len(targets) == 0:
        return logits.sum()    # 0, where the mean of nothing would be NaN
    return F.cross_entropy(logits, targets)


def label_loss(model, tokens, labels):
    """Mean cross-entropy, in nats, of the labels (B,) of the sequences tokens (B, T)."""
    return F.cross_entropy(model.classify(tokens), labels)


def learning_rate(step, steps, peak):
    """The rate at `step` of `steps`: 10 % linear warm-up, then a cosine to a tenth of the peak."""
    progress = (step + 1) / steps
    if progress < 0.1:
        return peak * progress / 0.1
    angle = math.pi * (progress - 0.1) / 0.9
    return peak * (0.55 + 0.45 * math.cos(angle))


def train(model, batch_loss, n, *, steps, lr, batch_size=32, seed=0, progress=True, on_step=None):
    """The loop of both phases, with AdamW. Returns the loss of every step.

    `batch_loss(chosen, generator)` is the loss of the sequences number `chosen` (B,), which are
    drawn with replacement from n. `on_step(step)`, if given, is called after every step; it may
    measure the model, but must leave it in training mode. `progress` shows a bar, in terminals.
    """
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr)
    # Each phase has a generator of its own, so that pretraining changes no batch of fine-tuning.
    generator = torch.Generator().manual_seed(seed)
    losses = []
    step_numbers = range(steps)
    if progress:
        step_numbers = tqdm(step_numbers, disable=None)    # None: a bar in terminals only
    model.train()
    for step in step_numbers:
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, steps, lr)
        chosen = torch.randint(n, (batch_size,), generator=generator, device="cpu")
        loss = batch_loss(chosen, generator)                              # ()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
        if on_step is not None:
            on_step(step + 1)
    return losses


def pretrain(model, tokens, *, mask_id, mask_ratio=0.3, steps=400, lr=0.01, **training):
    """Train on masked tokens of the sequences tokens (n, T); returns the loss of every step.

    At first the loss is on a plateau, near the unigram entropy, which is the loss of a model that
    knows only how frequent each token is. It falls once attention looks near. `training` takes
    batch_size, seed, progress and on_step of `train`. Raises ValueError as `mask_tokens` does.
    """
    def batch_loss(chosen, generator):
        batch = tokens[chosen]                                            # (B, T)
        # A sequence that is drawn again is masked anew, so it teaches more than once.
        corrupted, is_masked = mask_tokens(batch, mask_id, mask_ratio, generator)
        return masked_loss(model, batch, corrupted, is_masked)
    return train(model, batch_loss, len(tokens), steps=steps, lr=lr, **training)


def check_labels(tokens, labels):
    """Raise ValueError unless there is one label (n,) for each sequence of tokens (n, T)."""
    if labels.shape != tokens.shape[:1]:
        raise ValueError(f"labels are {tuple(labels.shape)}: must be ({len(tokens)},), one for "
                         "each sequence")


def finetune(model, tokens, labels, *, steps=200, lr=0.005, **training):
    """Train on tokens (n, T) and labels (n,); returns the loss of every step.

    Nothing is masked now. Supervised training, on labels alone, is this same function on a new
    model. `training` takes batch_size, seed, progress and on_step of `train`. Raises ValueError
    for labels of another shape.
    """
    check_labels(tokens, labels)

    def batch_loss(chosen, generator):
        return label_loss(model, tokens[chosen], labels[chosen])
    return train(model, batch_loss, len(tokens), steps=steps, lr=lr, **training)


@torch.no_grad()
def accuracy(model, tokens, labels, batch_size=32):
    """Share of sequences (n, T) whose most likely class is their label (n,).

    Dropout is off meanwhile. Raises ValueError for labels of another shape.
    """
    check_labels(tokens, labels)
    was_training = model.training
    model.eval()
    correct = 0
    for x, y in zip(tokens.split(batch_size), labels.split(batch_size)):
        predicted = model.classify(x).argmax(dim=-1)                      # (B,)
        correct += (predicted == y).sum().item()
    model.train(was_training)
    return correct / len(tokens)


# =============================================================================================
# Here the method ends. What follows is evidence.
#
# Where attention starts, and where it looks. A score of the first block compares two vectors,
# each the sum of a token and a position. At the random start these comparisons mean nothing and
# are small, so attention is nearly uniform, and each position receives about the average of all
# tokens. That average is a bag: it tells how often each token occurs, and nothing about order.
#
# If key and query are the same map, a position looks at positions whose vectors are like its own.
# Those of neighbours are, because sinusoids are smooth. That is the near start, an intervention
# that trains nothing and changes only where attention starts.
# =============================================================================================
def blocks_of(model):
    """The blocks of a Transformer of this file; ValueError where a model has none."""
    blocks = getattr(model, "blocks", ())
    if len(blocks) == 0:
        raise ValueError(f"{type(model).__name__}: needs blocks with `attention`, as those of "
                         "spt.Transformer")
    return blocks


@torch.no_grad()
def start_attention(model, start):
    """Change where the attention of every block starts, before any training.

    "random" changes nothing. "near" sets key to query and makes both three times as large. That
    makes scores nine times as large, enough for the softmax to prefer what is alike. "uniform" sets
    query to 0, so that every position attends to all alike. Raises ValueError for any other word,
    or a model without blocks. Mimetic initialization is related (Trockman & Kolter 2023, arXiv
    2305.09828).
    """
    if start not in ("random", "near", "uniform"):
        raise ValueError(f"start {start!r}: must be random, near or uniform")
    for block in blocks_of(model):
        query = block.attention.query.weight                              # (C, C)
        key = block.attention.key.weight
        if start == "near":
            query.mul_(3)
            key.copy_(query)
        elif start == "uniform":
            query.zero_()


def is_query_or_key(name):
    """Whether the weight of this name decides where attention looks."""
    return ".query." in name or ".key." in name


@torch.no_grad()
def transfer(source, target, which):
    """Copy weights of the Transformer `source` to `target`, which then is trained on labels.

    "qk" copies the query and key maps, "rest" all but these. In either case the class head of
    `target` stays as it is, and positions are copied, because maps that compare positions mean
    nothing among others. Raises ValueError for any other word, or a model without blocks.
    """
    if which not in ("qk", "rest"):
        raise ValueError(f"transfer {which!r}: must be qk or rest")
    blocks_of(source)
    copies = target.state_dict()
    for name, weight in source.state_dict().items():
        wanted = is_query_or_key(name) == (which == "qk") or name == "positions"
        if wanted and not name.startswith("class_head."):
            copies[name].copy_(weight)


def by_offset(x):
    """Sum x (..., T, T), by query i and key j, over all pairs with one offset (j - i) mod T.

    Returns (..., T). Index 1 is the right neighbour and index -1 the left one; the first position
    counts as the right neighbour of the last.
    """
    T = x.shape[-1]
    position = torch.arange(T, device=x.device)
    key_position = (position[:, None] + position) % T                     # (T, T), query + offset
    by_query = x.gather(-1, key_position.expand_as(x))                    # (..., T, T)
    return by_query.sum(dim=-2)                                           # (..., T)


@torch.no_grad()
def attention_by_offset(model, tokens):
    """Attention of each head by offset, averaged over positions and sequences (B, T).

    Returns (L, H, T), on the CPU. Each row sums to 1, and uniform attention has 1 / T everywhere.
    Raises ValueError for a model without blocks.
    """
    T = tokens.shape[1]
    blocks = blocks_of(model)
    x = model.embed(tokens)                                               # (B, T, C)
    layers = []
    for block in blocks:
        weights = block.attention.weights(block.norm1(x))                 # (B, H, T, T)
        layers.append(by_offset(weights.mean(dim=0)) / T)                 # (H, T)
        x = block(x)
    return torch.stack(layers).cpu()                                      # (L, H, T)


def on_neighbours(attention):
    """Attention on both neighbours together, of the head that has most; attention (L, H, T)."""
    return (attention[..., 1] + attention[..., -1]).max().item()


# ---------------------------------------------------------------------------------------------
# One run. A Config holds all that the numbers of a run depend on, and the command line is made
# from its fields. Nothing above knows of Config.
# ---------------------------------------------------------------------------------------------
def option(default, help, choices=None, at_least=1):
    """A field of Config: its default, the help of its flag, and the values it may take."""
    return field(default=default, metadata=dict(help=help, choices=choices, at_least=at_least))


def default_of(function, name):
    """The default of an argument, so that it stands only once, where the function says it."""
    return inspect.signature(function).parameters[name].default


def flag_of(name):
    """The flag of a field of Config."""
    return "--" + name.replace("_", "-")


@dataclass(frozen=True)
class Config:
    """One run. Raises ValueError for a value that is not allowed, and names its flag."""
    task: str = option("proximity", "what to classify", (*tasks.TASKS, "data"))
    spt: bool = option(False, "pretrain on masked tokens first; otherwise labels get all steps")
    start: str = option("random", "where attention starts", ("random", "near", "uniform"))
    freeze_qk: bool = option(False, "query and key maps are not trained")
    transfer: str = option("all", "after pretraining, copy only query and key maps (qk), or all "
                           "but these (rest), to a new model", ("all", "qk", "rest"))
    seed: int = option(0, "seed of data, weights, batches and masks", at_least=0)
    device: str = option("cpu", "where the tensors live", ("cpu", "cuda", "mps"))
    # the data
    n_train: int = option(2000, "training sequences, at most")
    n_test: int = option(1000, "test sequences, at most")
    seq_len: int = option(64, "tokens in a sequence, T", at_least=3)
    vocab_size: int = option(8, "symbols, V", at_least=2)
    signal: float = option(0.5, "chance that a token follows its class's rule")
    text: str = option(None, "UTF-8 file for --task text, instead of Python's own manual")
    data: str = option(None, "your own sequences: .npz with tokens (n, T) and labels (n,)")
    # the model
    positions: str = option(default_of(Transformer, "positions"), "how the model knows positions",
                            POSITIONS)
    n_layers: int = option(default_of(Transformer, "n_layers"), "blocks, L")
    d_model: int = option(default_of(Transformer, "d_model"), "width, C")
    n_heads: int = option(default_of(Transformer, "n_heads"), "attention heads, H")
    d_ff: int = option(default_of(Transformer, "d_ff"), "width inside the MLP")
    # the training
    pretrain_steps: int = option(default_of(pretrain, "steps"), "steps on masked tokens")
    finetune_steps: int = option(default_of(finetune, "steps"), "steps on labels")
    batch_size: int = option(default_of(train, "batch_size"), "sequences in a step, B")
    pretrain_lr: float = option(default_of(pretrain, "lr"), "peak learning rate on masked tokens")
    lr: float = option(default_of(finetune, "lr"),
                       "peak learning rate on labels (--compare: of SPT)")
    mask_ratio: float = option(default_of(pretrain, "mask_ratio"),
                               "share of tokens masked in pretraining")

    def __post_init__(self):
        for f in fields(self):
            value = getattr(self, f.name)
            problem = f"{flag_of(f.name)} {value}: must be"
            choices = f.metadata["choices"]
            at_least = f.metadata["at_least"]
            if choices is not None and value not in choices:
                raise ValueError(f"{problem} one of {', '.join(choices)}")
            if f.type is int and not at_least <= value < 2**31:
                raise ValueError(f"{problem} {at_least} or more, and below 2**31")
            if f.type is float and not 0 < value <= 1:
                raise ValueError(f"{problem} above 0 and at most 1")
        if self.task == "data" and self.data is None:
            raise ValueError("--task data: needs --data FILE")


# One set of defaults serves every task, with these exceptions. English has more symbols to tell
# apart, so it gets more steps. The signals put the best possible classifier well above chance.
RECIPES = {
    "text": dict(n_train=10_000, vocab_size=41, pretrain_steps=800, finetune_steps=600),
    "texture": dict(signal=0.6),
    "bag": dict(signal=0.2),
}


def recipe(**changes):
    """The Config of a task: the defaults, then the task's exceptions, then `changes`."""
    task = changes.get("task", "proximity")
    if changes.get("text") is not None:
        task = "text"
    if changes.get("data") is not None:
        task = "data"
    return Config(**{**RECIPES.get(task, {}), **changes, "task": task})


def read_data(config):
    """The config with the sizes which the data turned out to have, and the data, a tasks.Data."""
    if config.task == "data":
        data = tasks.from_file(config.data, config.seed)
    else:
        parts = tasks.make_task(
            config.task, n_train=config.n_train, n_test=config.n_test, seq_len=config.seq_len,
            vocab_size=config.vocab_size, signal=config.signal, path=config.text, seed=config.seed)
        data = tasks.Data(*parts, symbols=list(range(config.vocab_size)), classes=[0, 1])
    config = replace(config, n_train=len(data.tokens), n_test=len(data.test_tokens),
                     seq_len=data.tokens.shape[1], vocab_size=len(data.symbols))
    return config, data


def tensors_of(data, device):
    """Train tokens (n, T), train labels (n,), test tokens and test labels, on a device."""
    parts = (data.tokens, data.labels, data.test_tokens, data.test_labels)
    return [torch.from_numpy(part).to(device) for part in parts]


def load_data(config):
    """The data of a run: train tokens (n, T), train labels (n,), test tokens, test labels.

    Returns them with a config that has the sizes which the data turned out to have. Raises
    ValueError or OSError for data that cannot be read.
    """
    config, data = read_data(config)
    return config, tensors_of(data, config.device)


def model_arguments(config, n_classes):
    """What Transformer is called with."""
    return dict(
        vocab_size=config.vocab_size, seq_len=config.seq_len, n_classes=n_classes,
        positions=config.positions, n_layers=config.n_layers, d_model=config.d_model,
        n_heads=config.n_heads, d_ff=config.d_ff)


def new_model(config, n_classes, seed):
    """A Transformer at its start, with the random weights that `seed` gives."""
    torch.manual_seed(seed)
    model = Transformer(**model_arguments(config, n_classes))
    start_attention(model, config.start)
    for name, weight in model.named_parameters():
        if config.freeze_qk and is_query_or_key(name):
            weight.requires_grad_(False)
    return model.to(config.device)


@torch.no_grad()
def masked_loss_on_test(model, tokens, config):
    """Mean loss, in nats, of all masked tokens in the sequences tokens (n, T); None if none is."""
    generator = torch.Generator().manual_seed(config.seed)
    total = 0
    n_masked = 0
    for batch in tokens.split(config.batch_size):
        corrupted, is_masked = mask_tokens(batch, config.vocab_size, config.mask_ratio, generator)
        M = is_masked.sum().item()
        total += M * masked_loss(model, batch, corrupted, is_masked).item()
        n_masked += M
    return total / n_masked if n_masked > 0 else None


def baselines(config, data):
    """What stands beside the accuracies and the masked loss of a run, for scale."""
    parts = (data.tokens, data.labels, data.test_tokens, data.test_labels)
    return dict(
        chance=tasks.chance(data.test_labels),
        unigram_accuracy=tasks.unigram_accuracy(*parts),
        bigram_accuracy=tasks.bigram_accuracy(*parts),
        best_possible=tasks.best_possible_accuracy(config.task, *parts[2:], config.vocab_size),
        unigram_entropy=tasks.unigram_entropy(data.tokens, config.vocab_size))


def run(config, progress=False):
    """Train one model and measure it. Returns the result, plain numbers, and the model.

    With `config.spt` it is self-pretraining, else supervised training for as many steps in total.
    Both arms share data, start weights, batch size and the total of steps.
    """
    config, data = read_data(config)
    x, y, x_test, y_test = tensors_of(data, config.device)                # (n, T), (n,) twice
    n_classes = len(data.classes)
    total_steps = config.pretrain_steps + config.finetune_steps
    label_steps = config.finetune_steps if config.spt else total_steps
    training = dict(batch_size=config.batch_size, seed=config.seed, progress=progress)
    # Attention weights are T x T, so the longer the sequences, the fewer are measured.
    n_measured = max(1, 2**18 // config.seq_len**2)
    sample = x_test[:n_measured]                                          # (B, T)

    model = new_model(config, n_classes, config.seed)
    attention = {"at init": attention_by_offset(model, sample)}           # (L, H, T) each
    test_masked_loss = None
    if config.spt:
        pretrain(model, x, mask_id=config.vocab_size, mask_ratio=config.mask_ratio,
                 steps=config.pretrain_steps, lr=config.pretrain_lr, **training)
        attention["pretrained"] = attention_by_offset(model, sample)
        test_masked_loss = masked_loss_on_test(model, x_test, config)
        if config.transfer != "all":
            # A new seed, so that what is not copied is not the start of the pretrained model.
            pretrained = model
            model = new_model(config, n_classes, config.seed + 10**6)
            transfer(pretrained, model, config.transfer)
    finetune(model, x, y, steps=label_steps, lr=config.lr, **training)
    attention["after labels"] = attention_by_offset(model, sample)

    result = dict(
        arm="SPT" if config.spt else "labels",
        total_steps=total_steps,
        train=accuracy(model, x, y),
        test=accuracy(model, x_test, y_test),
        test_masked_loss=test_masked_loss,
        on_neighbours=on_neighbours(attention["after labels"]),
        attention={stage: layers.tolist() for stage, layers in attention.items()},
        **baselines(config, data),
        config=asdict(config))
    return result, model


# ---------------------------------------------------------------------------------------------
# Many runs, side by side in processes of one thread each. All that a run depends on is its
# Config, so its numbers are the same for any number of processes.
# ---------------------------------------------------------------------------------------------
def result_of(config):
    """The result of `run` alone: a worker process need not send the model."""
    result, _ = run(config)
    return result


def over_seeds(config, seeds):
    """The config with each of `seeds` seeds, from its own up."""
    return [replace(config, seed=config.seed + i) for i in range(seeds)]


def cores():
    """How many cores this process may use."""
    if hasattr(os, "sched_getaffinity"):    # not on every system
        return len(os.sched_getaffinity(0))
    return os.cpu_count()


def default_jobs(device):
    """How many processes to use where nobody says: one for each core, but one on a GPU."""
    return cores() if device == "cpu" else 1


def start_worker():
    """Prepare a worker process: one thread, and an end when its parent has ended."""
    # At this size a second thread has too little to do, and the threads wait for each other.
    torch.set_num_threads(1)

    def end_with_parent():
        parent_process().join()
        os._exit(1)
    threading.Thread(target=end_with_parent, daemon=True).start()


@contextmanager
def side_by_side(function, configs, jobs):
    """In a `with`: what `function` returns for each config, in their order, as an iterator.

    Runs in at most `jobs` processes, and in this one if that is 1. Raises BrokenProcessPool where
    a process dies. No process is left when the `with` ends, whatever ends it.
    """
    jobs = min(jobs, len(configs), cores())
    if jobs <= 1:
        yield map(function, configs)
        return
    not_ours = set(active_children())
    # "spawn" works on every system, and with CUDA.
    pool = ProcessPoolExecutor(jobs, get_context("spawn"), start_worker)
    # Workers ignore Ctrl-C from their first moment on. This process answers it, and ends them.
    previous_handler = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        try:
            futures = [pool.submit(function, config) for config in configs]
        finally:
            signal.signal(signal.SIGINT, previous_handler)
        yield (future.result() for future in futures)
    finally:
        for process in set(active_children()) - not_ours:
            process.terminate()
        pool.shutdown()


def run_rows(rows, jobs, json_path=None):
    """Run every config of `rows`, {name: configs}; yields (name, results), a row once it is done.

    Each result is appended to the file `json_path`, in order, without waiting for its row. If that
    fails, OSError is raised after the last row.
    """
    configs = []
    for row in rows.values():
        configs.extend(row)
    problem = None
    with side_by_side(result_of, configs, jobs) as results:
        for name, row in rows.items():
            of_row = []
            for _ in row:
                of_row.append(next(results))
                try:
                    append_json(json_path, dict(row=name, **of_row[-1]))
                except OSError as error:
                    problem = error
            yield name, of_row
    if problem is not None:
        raise problem


def append_json(path, record):
    """Add a line to the file `path`. Without a path do nothing."""
    if path is not None:
        with naming("--json", path), open(path, "a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")


def save_model(path, model, config, data):
    """Write what it takes to use a model on new sequences. Without a path do nothing."""
    if path is None:
        return
    content = dict(
        arguments=model_arguments(config, len(data.classes)),
        weights={name: weight.cpu() for name, weight in model.state_dict().items()},
        symbols=data.symbols,
        classes=data.classes)
    with naming("--save", path), open(path, "wb") as file:
        torch.save(content, file)


@contextmanager
def naming(flag, path):
    """In a `with`: an OSError that says which file of which flag could not be used."""
    try:
        yield
    except OSError as error:
        raise OSError(f"{flag} {path}: {error.strerror}") from None


# ---------------------------------------------------------------------------------------------
# What is printed, in 80 columns.
# ---------------------------------------------------------------------------------------------
HEADER = f"{'':29}{'train':14}{'test':14}{'worst seed':12}neighbours"


def mean_of(results, column):
    """Mean of a column over runs."""
    return statistics.mean(result[column] for result in results)


def mean_and_std(results, column):
    """Mean ± standard deviation of a column over runs, as text."""
    text = f"{mean_of(results, column):.3f}"
    if len(results) > 1:
        text += f" ± {statistics.stdev(result[column] for result in results):.3f}"
    return text


def or_unknown(value):
    """A number with three decimals; "unknown" for None."""
    return "unknown" if value is None else f"{value:.3f}"


def show_setting(config):
    """Print the data, the size of the model, and the baselines; returns what `read_data` does."""
    config, data = read_data(config)
    found = baselines(config, data)
    model = new_model(config, len(data.classes), config.seed)
    n_weights = sum(weight.numel() for weight in model.parameters())
    print(f"{config.data or config.task}: {config.n_train:,} training sequences of "
          f"{config.seq_len} tokens, {config.vocab_size:,} symbols, {n_weights:,} weights")
    print(f"chance {found['chance']:.3f}, counting tokens {found['unigram_accuracy']:.3f}, "
          f"counting pairs {found['bigram_accuracy']:.3f}, "
          f"best possible {or_unknown(found['best_possible'])}")
    if data.unseen > 0:
        print(f"{data.unseen:.1%} of the test tokens are not in the training sequences")
    if config.n_test < 100:
        print(f"only {config.n_test} test sequences: the numbers below are rough")
    return config, data


def show_row(name, results):
    """Print one line of results, under HEADER."""
    worst = min(result["test"] for result in results)
    print(f"{name:29}{mean_and_std(results, 'train'):14}{mean_and_std(results, 'test'):14}"
          f"{worst:<12.3f}{mean_of(results, 'on_neighbours'):.2f}", flush=True)


def show_attention(result):
    """Print the attention of every head at some offsets, at each stage.

    After pretraining a head has most at offset 0, its own position, because it looks at what is
    like its own vector. Positions are smooth: what is like a neighbour's vector is even more like
    one's own.
    """
    offsets = [0]
    for distance in (1, 2, 4, 8):
        if 2 * distance < result["config"]["seq_len"]:
            offsets = [-distance, *offsets, distance]
    title = f"attention (uniform: {1 / result['config']['seq_len']:.2f})"
    print(f"{title:30}" + "".join(f"{offset:+5d}" if offset else "    0" for offset in offsets))
    for stage, layers in result["attention"].items():
        for layer, heads in enumerate(layers, 1):
            for number, head in enumerate(heads, 1):
                name = f"{stage}, layer {layer} head {number}"
                print(f"{name:30}" + "".join(f"{head[offset]:5.2f}" for offset in offsets))


def single(config, json_path, save_path):
    """Train one model and print what came out."""
    sized, data = show_setting(config)
    steps = f"{config.pretrain_steps + config.finetune_steps:,} steps on labels"
    if config.spt:
        steps = (f"{config.pretrain_steps:,} steps on masked tokens, "
                 f"{config.finetune_steps:,} on labels")
    print(f"{row_name(config)}, seed {config.seed}: {steps}", flush=True)
    result, model = run(config, progress=True)
    with ExitStack() as afterwards:    # both files are written, whatever fails before
        afterwards.callback(save_model, save_path, model, sized, data)
        afterwards.callback(append_json, json_path, result)
        show_result(result)


def show_result(result):
    """Print what came out of a single run."""
    print(f"accuracy on test {result['test']:.3f}, on train {result['train']:.3f}")
    if result["arm"] == "SPT":
        print(f"masked loss on test {or_unknown(result['test_masked_loss'])}, "
              f"unigram entropy {result['unigram_entropy']:.3f}")
    show_attention(result)


def row_name(config):
    """SPT or labels, and where attention starts if not at random."""
    name = "SPT" if config.spt else "labels"
    if config.start != "random":
        name += f", {config.start} start"
    return name


# ---------------------------------------------------------------------------------------------
# The comparison: do I need SPT? Labels alone, labels from the near start, labels with rotary
# positions, and SPT, over several seeds. Nothing is picked: each rate has a row of its own.
# ---------------------------------------------------------------------------------------------
LABEL_RATES = (0.002, 0.005, 0.01)    # so that a bad learning rate is not to blame


def rows_of_comparison(config, seeds):
    """The rows {name: configs} of `compare`."""
    rivals = {
        "labels": dict(),
        "labels, near start": dict(start="near"),
    }
    if config.positions != "rotary":    # else the first rows are rotary already
        rivals["labels, rotary"] = dict(positions="rotary")
    rows = {}
    for name, changes in rivals.items():
        for rate in LABEL_RATES:
            rival = replace(config, lr=rate, **changes)
            rows[f"{name}, lr {rate:g}"] = over_seeds(rival, seeds)
    rows[f"SPT, lr {config.lr:g}"] = over_seeds(replace(config, spt=True), seeds)
    return rows


def compare(config, seeds, jobs, json_path):
    """Print every row of the comparison as soon as it is measured, and what to make of them."""
    show_setting(config)
    print(f"accuracy, mean ± standard deviation over {seeds} seeds, from {config.seed} up;\n"
          "attention on both neighbours, of the head that has most")
    print(HEADER, flush=True)
    done = {}
    for name, results in run_rows(rows_of_comparison(config, seeds), jobs, json_path):
        show_row(name, results)
        done[name] = results
    show_advice(done)


def show_advice(done):
    """Print the masked loss of the last row, SPT, and advice where the numbers of rows give it."""
    *_, of_spt = done.values()
    losses = [or_unknown(result["test_masked_loss"]) for result in of_spt]
    print(textwrap.fill(f"masked loss on test, by seed: {', '.join(losses)} (unigram entropy "
                        f"{mean_of(of_spt, 'unigram_entropy'):.3f})", 80))
    stuck = []
    for result in of_spt:
        loss = result["test_masked_loss"]
        if loss is not None and not loss < 0.98 * result["unigram_entropy"]:
            stuck.append(str(result["config"]["seed"]))
    if stuck:
        print(textwrap.fill(
            f"Seed {', '.join(stuck)}: the masked loss is still at the unigram entropy. "
            "Pretraining is on its plateau, or tokens tell nothing about each other. Try more "
            "--pretrain-steps, or --spt --start near.", 80, break_on_hyphens=False))
    best = max(mean_of(results, "test") for results in done.values())
    pairs = mean_of(of_spt, "bigram_accuracy")
    if pairs > best - 0.01:
        print(f"Counting pairs of neighbours ({pairs:.3f}) does as well as the best row.")


# ---------------------------------------------------------------------------------------------
# The command line. What is wrong with flags and files is said in one line, below the usage, with
# exit status 2, and wherever it can be known before training begins.
# ---------------------------------------------------------------------------------------------
def defaults_of(f):
    """The default of a field of Config, and those of the tasks that have another, as text."""
    defaults = [str(f.default)]
    for task, changes in RECIPES.items():
        if f.name in changes:
            defaults.append(f"{task}: {changes[f.name]}")
    return ", ".join(defaults)


def positive(text):
    """A number of seeds or jobs, from the command line."""
    if int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text}: must be 1 or more")
    return int(text)


def make_parser():
    """The flags: one for each field of Config, and those that belong to no single run."""
    parser = argparse.ArgumentParser(
        prog="spt.py", description=__doc__.split("\n\n")[0], argument_default=argparse.SUPPRESS,
        usage="spt.py [--task TASK] [--spt | --compare] [flags]")
    parser.add_argument("--compare", action="store_true",
                        help="labels alone in three ways, and SPT, over several seeds")
    for f in fields(Config):
        if f.type is bool:
            parser.add_argument(flag_of(f.name), action="store_true", help=f.metadata["help"])
        else:
            parser.add_argument(flag_of(f.name), type=f.type, choices=f.metadata["choices"],
                                help=f"{f.metadata['help']} (default {defaults_of(f)})")
    parser.add_argument("--seeds", type=positive, help="--compare: seeds, from --seed up (default "
                        "3)")
    parser.add_argument("--jobs", type=positive, help="--compare: processes, at most (default one "
                        "for each core; 1 on a GPU)")
    parser.add_argument("--json", help="file to append results to, one JSON object a line")
    parser.add_argument("--save", help="file for the weights of a single run")
    return parser


def refuse_unused(given, config):
    """Raise ValueError for a flag that would change nothing, because others decide."""
    comparing = "compare" in given
    task = config.task
    of_data = {"text", "n_train", "n_test", "seq_len", "vocab_size", "signal"}
    of_spt = {"transfer", "mask_ratio", "pretrain_lr"}
    unused = [    # (whether they are unused, which, why)
        (comparing, {"spt", "start", "transfer", "save"}, "cannot go with --compare"),
        (not comparing, {"seeds", "jobs"}, "needs --compare"),
        (not comparing and not config.spt, of_spt, "needs --spt"),
        (task == "data", of_data, "cannot go with --data, which decides it"),
        (task == "text", {"signal"}, "cannot go with text"),
        (task != given.get("task", task), {"task"}, f"is {task} with --{task}"),
    ]
    for is_unused, names, why in unused:
        wrong = sorted(names & set(given))
        if is_unused and wrong:
            raise ValueError(f"{flag_of(wrong[0])}: {why}")


def check(config, seeds, paths):
    """Raise ValueError or OSError for what would fail later: device, data, sizes, output files."""
    try:
        torch.zeros(1, device=config.device)
    except (RuntimeError, AssertionError):
        raise ValueError(f"--device {config.device}: not on this machine") from None
    # Each seed may draw another test part, so all of them are checked.
    for seeded in over_seeds(config, seeds):
        sized, _ = read_data(seeded)
    new_model(sized, 2, config.seed)
    files = [path for path in (config.text, config.data, *paths.values()) if path is not None]
    for path in files:
        if files.count(path) > 1:
            raise ValueError(f"{path}: is the file of two flags, and one would overwrite it")
    for flag, path in paths.items():
        if path is not None:
            with naming(flag, path):
                open(path, "ab").close()


def command(parser, given):
    """What the command line asks for; ends it where the input is wrong."""
    names = {f.name for f in fields(Config)}
    seeds = given.get("seeds", 3)
    json_path = given.get("json")
    save_path = given.get("save")
    try:
        config = recipe(**{name: given[name] for name in given if name in names})
        refuse_unused(given, config)
        n_checked = seeds if "compare" in given else 1
        check(config, n_checked, {"--json": json_path, "--save": save_path})
    except (ValueError, OSError) as error:
        parser.error(str(error))
    if "compare" in given:
        jobs = given.get("jobs", default_jobs(config.device))
        compare(config, seeds, jobs, json_path)
    else:
        single(config, json_path, save_path)


def exit_status(command, *arguments):
    """Run a command and return its exit status.

    That is 0, or 1 if it returns False, 2 if a file could not be written, memory did not suffice or
    a worker process died, and 130 after Ctrl-C.
    """
    torch.set_num_threads(1)    # at this size two threads would only wait for each other
    try:
        holds = command(*arguments)
        sys.stdout.flush()
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:
        # Whoever read the output has left, as `| head` does. What is still unprinted goes nowhere.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except (OSError, MemoryError, BrokenProcessPool) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 1 if holds is False else 0


def main(argv=None):
    """Run the command line; bad input exits with status 2. Returns the exit status."""
    parser = make_parser()
    given = vars(parser.parse_args(argv))
    return exit_status(command, parser, given)


if __name__ == "__main__":
    # A terminal that lacks a character such as ± gets a question mark, not an error.
    sys.stdout.reconfigure(errors="replace")
    sys.exit(main())
