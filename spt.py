"""Why does self-pretraining help a Transformer? One file that runs, and shows it.

Self-pretraining (SPT): train a model to fill in masked tokens of its own training sequences, with
the labels hidden; then fine-tune the same model on their labels. No other data is used. Where the
label lives in who stands next to whom, after 600 steps of 32 sequences labels alone are near chance
and SPT is near perfect: masks teach attention to look near, labels then choose the side.

    python spt.py --task proximity --spt       pretrain, then fine-tune: 6 s on one core of
                                               an AMD EPYC with torch 2.13.0; it prints, above all,

                              train accuracy test accuracy  95 % at step  near  side
    SPT, seed 0               1.000          1.000          480           0.49  0.47

    python spt.py --task proximity             labels only, for the same 600 steps: 0.50
    python spt.py --task proximity --compare   both over several seeds: the gap and its reason
    python spt.py --reproduce                  every claim as measured numbers, with a verdict
    python spt.py --theory                     why: what is proved, and what happens in training

After arXiv 2605.21070 (2026) and Amos et al., arXiv 2310.02980; tasks and set-up are this project's
own. The method comes first and ends with `accuracy`; the rest is evidence: probes, one run, many
runs, the claims, the theory, the command line. Letters in shape comments: B sequences in a batch,
T tokens in a sequence, C width (d_model), H heads, D = C / H width of a head, V symbols (token V
is the mask), K classes, L layers, n sequences in all, N hidden tokens in a batch.
"""
import argparse
import json
import math
import os
import statistics
import sys
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, field, fields, replace
from multiprocessing import get_context

import torch
from torch import nn
from torch.nn import functional as F
from tqdm import tqdm

import synthetic_tasks as tasks

# ---------------------------------------------------------------------------------------------
# What can be configured. The command line is made from these fields, so that help and defaults
# cannot drift apart. Only whole experiments take a Config; everything else takes plain arguments,
# so that it can be copied alone.
# ---------------------------------------------------------------------------------------------
POSITIONS = "sinusoidal", "learned", "rotary", "distance", "none"


def option(default, help, choices=None):
    """A field of Config: its default, the help of its flag, and the values it may take."""
    return field(default=default, metadata=dict(help=help, choices=choices))


@dataclass(frozen=True)
class Config:
    """One run, or what to do with many. Raises ValueError for numbers out of range."""
    # what to do
    task: str = option("proximity", "what to classify", tasks.TASKS)
    spt: bool = option(False, "pretrain on masked tokens first; otherwise labels get all steps")
    seed: int = option(0, "seed of data, weights, batches and masks")
    seeds: int = option(3, "number of seeds, from --seed up, of --compare and --reproduce")
    jobs: int = option(os.cpu_count() or 1, "processes for --compare and --reproduce")
    device: str = option("cpu", "where the tensors live", ("cpu", "cuda"))
    json: str = option(None, "file to append results to, one JSON object a line")
    save: str = option(None, "file for the weights of a single run")
    # the data
    n_train: int = option(2000, "training sequences (text: at most)")
    n_test: int = option(1000, "test sequences (text: at most)")
    seq_len: int = option(64, "tokens in a sequence, T")
    vocab_size: int = option(8, "symbols, V")
    signal: float = option(0.5, "chance that a token follows its class's rule")
    text: str = option(None, "UTF-8 file; implies --task text, else on Python's own manual")
    data: str = option(None, "your own sequences: .npz with tokens (n, T) and labels (n,)")
    # the model
    positions: str = option("sinusoidal", "how the model knows positions", POSITIONS)
    n_layers: int = option(1, "blocks, L")
    d_model: int = option(32, "width, C")
    n_heads: int = option(2, "attention heads, H")
    d_ff: int = option(64, "width inside the MLP")
    readout: str = option("mean", "class from the mean over places, or from all", ("mean", "all"))
    # the training
    pretrain_steps: int = option(400, "steps on masked tokens")
    finetune_steps: int = option(200, "steps on labels")
    batch_size: int = option(32, "sequences in a step, B")
    pretrain_lr: float = option(0.01, "peak learning rate on masked tokens")
    lr: float = option(0.005, "peak learning rate on labels")
    mask_ratio: float = option(0.3, "share of tokens hidden in pretraining")
    # two probes of the query and key maps (qk)
    transfer: str = option("all", "copy qk or not-qk to a new model", ("all", "qk", "not-qk"))
    freeze_qk: bool = option(False, "keep query and key maps as they are while fine-tuning")

    def __post_init__(self):
        for f in fields(self):
            value, low = getattr(self, f.name), {"seed": 0, "seq_len": 2}.get(f.name, 1)
            if f.type is int and value < low or f.type is float and not 0 < value <= 1:
                rule = f"{low} or more" if f.type is int else "above 0 and at most 1"
                raise ValueError(f"--{f.name.replace('_', '-')} {value}: must be {rule}")


# One set of defaults serves every task; these are the exceptions. English has 41 symbols to tell
# apart, so it gets more steps. The signals put the best possible classifier well above chance.
RECIPES = {"text": dict(n_train=10_000, vocab_size=41, pretrain_steps=800, finetune_steps=600),
           "texture": dict(signal=0.6), "bag": dict(signal=0.2)}


def recipe(task="proximity", **changes):
    """The Config of a task: defaults, then the task's exceptions, then `changes`."""
    task = "text" if changes.get("text") else task
    return Config(**{"task": task, **RECIPES.get(task, {}), **changes})


# ---------------------------------------------------------------------------------------------
# Positions. Attention by itself sees a bag of tokens; these are ways to tell it their order.
# Sinusoidal and learned positions are absolute: query and key maps must turn places into
# proximity, that is, attention to small offsets. This is what labels fail to teach. Rotary
# positions and distance biases put offsets into the scores by hand.
# ---------------------------------------------------------------------------------------------
def sinusoidal_positions(seq_len, d_model):
    """PE[t, 2i] = sin(t / 10000^(2i/C)), PE[t, 2i+1] = cos(same)   (Vaswani et al. 2017, sec. 3.5)

    Returns (T, C) float32, for an even d_model.
    """
    frequency = 10000.0 ** (-torch.arange(0, d_model, 2) / d_model)       # (C/2,)
    angle = torch.arange(seq_len)[:, None] * frequency                    # (T, C/2)
    # sin a sin b + cos a cos b = cos(a - b): the inner product of rows i and j depends on i - j
    # alone. Proximity is in there, for query and key maps that bring it out.
    return torch.stack([angle.sin(), angle.cos()], dim=-1).flatten(1)     # (T, C)


def rotate(x):
    """Rotary positions: turn pair i of token t by t / 10000^(2i/D)   (Su et al. 2021, sec. 3.2)

    x (..., T, D) with D even -> the same shape. Inner products of rotated queries and keys depend
    on positions only through their difference: proximity comes with the encoding.
    """
    T, D = x.shape[-2:]
    frequency = 10000.0 ** (-torch.arange(0, D, 2) / D)                   # (D/2,)
    angle = (torch.arange(T)[:, None] * frequency).to(x.device)           # (T, D/2)
    cos, sin = angle.cos().to(x.dtype), angle.sin().to(x.dtype)           # (T, D/2) each
    # As a complex number, a + ib is multiplied by exp(i angle).
    a, b = x[..., 0::2], x[..., 1::2]                                     # (..., T, D/2) each
    pairs = torch.stack([a * cos - b * sin, a * sin + b * cos], dim=-1)   # (..., T, D/2, 2)
    return pairs.flatten(-2)                                              # (..., T, D)


def distance_bias(n_heads, seq_len):
    """A bias of -slope * |i - j| for the scores, a penalty per step (ALiBi, Press et al. 2022)

    Returns (H, T, T) float32. ALiBi looks left only; here even heads look left and odd heads look
    right, -inf on the other side, with slopes 1, 1, 1/2, 1/2, ...
    """
    offset = torch.arange(seq_len) - torch.arange(seq_len)[:, None]       # (T, T), j - i
    head = torch.arange(n_heads)[:, None, None]                           # (H, 1, 1)
    wrong_side = torch.where(head % 2 == 0, offset > 0, offset < 0)       # (H, T, T)
    return (-(0.5 ** (head // 2)) * offset.abs()).masked_fill(wrong_side, -math.inf)  # (H, T, T)


# ---------------------------------------------------------------------------------------------
# The model: a pre-norm Transformer encoder with two heads, to fill in tokens and to classify.
#
# Where can proximity sit? Ignoring the norm, place i holds t_i + p_i, token plus position, and a
# score of the first block is (t_i + p_i)ᵀ M (t_j + p_j) / √D, M made of query and key maps. Of
# its four terms, p_iᵀ M p_j knows places only. Whether it is large for j next to i is up to M:
# looking near has to be learned by the query and key maps.
# ---------------------------------------------------------------------------------------------
class Attention(nn.Module):
    """Multi-head self-attention, softmax(q kᵀ / √D + bias) v   (Vaswani et al. 2017, sec. 3.2)

    x (B, T, C) -> (B, T, C); with `return_weights=True` also the attention weights (B, H, T, T),
    by the formula as it reads. Otherwise PyTorch's fused kernel gives the same without storing
    them. `bias` (H, T, T) is added to the scores. `query` and `key` decide where to look, `value`
    and `out` what to bring back. Raises ValueError where heads do not divide d_model as needed.
    """

    def __init__(self, d_model, n_heads, rotary=False, bias=None):
        super().__init__()
        # Even, since sines go with cosines, and rotary positions turn pairs.
        if d_model % (2 * n_heads):
            raise ValueError(f"d_model {d_model}: must be a multiple of 2 x n_heads {n_heads}")
        self.n_heads, self.rotary = n_heads, rotary
        self.query, self.key, self.value, self.out = (    # matrices, as in the formula
            nn.Linear(d_model, d_model, bias=False) for _ in range(4))
        # Given by hand, so neither trained nor saved.
        self.register_buffer("score_bias", bias, persistent=False)        # (H, T, T) or None

    def forward(self, x, return_weights=False):
        q, k, v = (part(x).unflatten(-1, (self.n_heads, -1)).transpose(1, 2)  # (B, H, T, D) each
                   for part in (self.query, self.key, self.value))
        if self.rotary:
            q, k = rotate(q), rotate(k)                                   # (B, H, T, D) each
        if not return_weights:
            y = F.scaled_dot_product_attention(q, k, v, attn_mask=self.score_bias)  # (B, H, T, D)
            return self.out(y.transpose(1, 2).flatten(2))                 # (B, T, C)
        # Without the division, scores would grow with D and the softmax start out spiky.
        scores = q @ k.mT / math.sqrt(q.shape[-1])                        # (B, H, T, T)
        scores = scores if self.score_bias is None else scores + self.score_bias
        weights = scores.softmax(dim=-1)                                  # (B, H, T, T)
        return self.out((weights @ v).transpose(1, 2).flatten(2)), weights


class Block(nn.Module):
    """Pre-norm residual block, (B, T, C) -> (B, T, C): add attention, then an MLP."""

    def __init__(self, attention, d_model, d_ff):
        super().__init__()
        self.norm1, self.attention = nn.LayerNorm(d_model), attention
        self.norm2 = nn.LayerNorm(d_model)
        self.mlp = nn.Sequential(nn.Linear(d_model, d_ff, bias=False), nn.ReLU(inplace=True),
                                 nn.Linear(d_ff, d_model, bias=False))

    def forward(self, x):
        x = x + self.attention(self.norm1(x))                             # (B, T, C)
        return x + self.mlp(self.norm2(x))                                # (B, T, C)


class Transformer(nn.Module):
    """Encoder with a reconstruction head and a classification head; no causal mask, no dropout.

    tokens (B, T) int64 in [0, V], where V is the mask symbol:
        model(tokens)             -> (B, T, C)  features
        model.reconstruct(tokens) -> (B, T, V)  logits of the symbol that stands at each place
        model.classify(tokens)    -> (B, K)     logits of the class, from the mean over places or,
                                                with `readout="all"`, from all places side by side
    Raises ValueError where `positions` or `readout` is unknown or the widths do not fit.
    """

    def __init__(self, vocab_size, seq_len, n_classes=2, positions="sinusoidal", n_layers=1,
                 d_model=32, n_heads=2, d_ff=64, readout="mean"):
        super().__init__()
        if positions not in POSITIONS or readout not in ("mean", "all"):
            raise ValueError(f"{positions=}, {readout=}: must be one of {POSITIONS}, mean or all")
        self.token_embedding = nn.Embedding(vocab_size + 1, d_model)      # V symbols and the mask
        # PyTorch's default is a std of 1. Tokens of that size drown the positions, whose entries
        # have size 0.7, and attention is slower to turn positions into proximity.
        nn.init.normal_(self.token_embedding.weight, std=0.5)
        if positions == "learned":
            self.positions = nn.Parameter(torch.randn(seq_len, d_model))  # (T, C)
        else:
            fixed = sinusoidal_positions(seq_len, d_model) if positions == "sinusoidal" else None
            self.register_buffer("positions", fixed, persistent=False)    # (T, C) or None
        bias = distance_bias(n_heads, seq_len) if positions == "distance" else None  # (H, T, T)
        self.blocks = nn.ModuleList(
            Block(Attention(d_model, n_heads, positions == "rotary", bias), d_model, d_ff)
            for _ in range(n_layers))
        self.norm = nn.LayerNorm(d_model)
        self.reconstruction_head = nn.Linear(d_model, vocab_size)         # from C to V
        self.readout = readout
        self.class_head = nn.Linear(d_model * (seq_len if readout == "all" else 1), n_classes)

    def embed(self, tokens):
        x = self.token_embedding(tokens)                                  # (B, T, C)
        return x if self.positions is None else x + self.positions        # (B, T, C)

    def forward(self, tokens):
        x = self.embed(tokens)                                            # (B, T, C)
        for block in self.blocks:
            x = block(x)                                                  # (B, T, C)
        return self.norm(x)                                               # (B, T, C)

    # The two questions differ in one thing that will matter: reconstruction asks at a place,
    # classification asks for a mean over places, in which it is lost who stood next to whom.
    # Where the class is read from all places side by side, labels can do without masks: claim 5a.
    def reconstruct(self, tokens):
        return self.reconstruction_head(self(tokens))                     # (B, T, V)

    def classify(self, tokens):
        x = self(tokens)                                                  # (B, T, C)
        x = x.flatten(1) if self.readout == "all" else x.mean(dim=1)      # (B, T * C) or (B, C)
        return self.class_head(x)                                         # (B, K)


# ---------------------------------------------------------------------------------------------
# Self-pretraining: two losses, one loop. Pretraining asks for the tokens that were hidden, fine-
# tuning for the label. A model that knows nothing pays ln V nats for a hidden token and ln K for a
# label. `pretrain` and `finetune` ask of a model only that it has reconstruct(tokens) -> (B, T, V)
# and classify(tokens) -> (B, K): any encoder will do. Neither ever sees the test sequences.
# ---------------------------------------------------------------------------------------------
def mask_tokens(tokens, mask_id, mask_ratio, generator=None):
    """Hide each token with probability `mask_ratio`, independently of the others.

    tokens (B, T) int64 -> corrupted (B, T), where hidden tokens are replaced by `mask_id`, and
    is_masked (B, T) bool, True where a token was hidden and is to be predicted. `generator` is a
    CPU torch.Generator. Unlike BERT's, a hidden token is always replaced by the mask symbol.
    """
    # Drawn on the CPU and then moved, so that the same seed hides the same tokens on any device.
    is_masked = (torch.rand(tokens.shape, generator=generator) < mask_ratio).to(tokens.device)
    return tokens.masked_fill(is_masked, mask_id), is_masked


def masked_loss(model, tokens, corrupted, is_masked):
    """Mean cross-entropy, in nats, of the hidden tokens and of no others; 0 if none is hidden.

    tokens and corrupted (B, T) int64, is_masked (B, T) bool, as from `mask_tokens`.
    """
    logits = model.reconstruct(corrupted)[is_masked]                      # (N, V)
    return F.cross_entropy(logits, tokens[is_masked], reduction="sum") / max(1, len(logits))


def train(model, batch_loss, n_sequences, name, *, steps, lr, batch_size=32, seed=0,
          on_step=lambda step: None):
    """The loop of both phases: AdamW, 10 % linear warm-up, then a cosine to a tenth of the peak.

    `batch_loss(rows, generator)` is the loss of the sequences `rows` (B,), which are drawn with
    replacement; `on_step(step)` is called after every step. Returns the loss of every step.
    """
    def share_of_peak(step):
        progress = (step + 1) / steps
        return min(progress / 0.1, 0.55 + 0.45 * math.cos(math.pi * max(0, progress - 0.1) / 0.9))
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, fused=True)    # fused: faster
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, share_of_peak)
    # A generator for this phase alone: pretraining changes no batch of fine-tuning.
    generator, losses = torch.Generator().manual_seed(seed), []
    for step in tqdm(range(steps), name, disable=None):    # None: a bar in terminals only
        rows = torch.randint(n_sequences, (batch_size,), generator=generator)  # (B,)
        loss = batch_loss(rows, generator)                                # ()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
        on_step(step + 1)
    return losses


def pretrain(model, tokens, *, mask_id, mask_ratio=0.3, steps=400, lr=0.01, **training):
    """Masked reconstruction of tokens (n, T); returns the loss of every step, in nats.

    The loss starts near ln V, stays there for a while, and falls once attention looks near.
    `training`: batch_size, seed, on_step, see `train`.
    """
    def batch_loss(rows, generator):
        # A sequence that is drawn again is masked anew: it teaches more than once.
        batch = tokens[rows]                                              # (B, T)
        return masked_loss(model, batch, *mask_tokens(batch, mask_id, mask_ratio, generator))
    return train(model, batch_loss, len(tokens), "pretraining", steps=steps, lr=lr, **training)


def finetune(model, tokens, labels, *, steps=200, lr=0.005, **training):
    """Train on tokens (n, T) and labels (n,); returns the loss of every step, in nats.

    Nothing is masked now. Training on labels alone is this same function, given all the steps.
    """
    def batch_loss(rows, _):
        return F.cross_entropy(model.classify(tokens[rows]), labels[rows])
    return train(model, batch_loss, len(tokens), "fine-tuning", steps=steps, lr=lr, **training)


@torch.no_grad()
def accuracy(model, tokens, labels, batch_size=32):
    """Share of sequences (n, T) whose most likely class is their label (n,). Calls no eval()."""
    predicted = torch.cat([model.classify(x).argmax(dim=-1) for x in tokens.split(batch_size)])
    return (predicted == labels).double().mean().item()


# =============================================================================================
# Here the method ends. What follows is evidence, and first probes: move only some of the weights
# into another model, see where each head looks, ask a loss where it would have attention go. An
# offset is key minus query, (j - i) mod T: +1 is the right neighbour, -1 the left one.
# =============================================================================================
def transfer(source, target, which):
    """Copy the query and key maps of `source` to `target` ("qk"), or all the rest ("not-qk").

    The classification head of `target` stays as it is in either case.
    """
    for (name, weight), copy in zip(source.named_parameters(), target.parameters()):
        is_qk = ".query." in name or ".key." in name
        if is_qk == (which == "qk") and not name.startswith("class_head"):
            copy.data.copy_(weight.data)


def by_offset(x):
    """Sum x (..., T, T), by query i and key j, over all pairs of one offset: (..., T)."""
    T = x.shape[-1]
    key = (torch.arange(T)[:, None] + torch.arange(T)) % T                # (T, T), i + offset
    return x.gather(-1, key.to(x.device).expand_as(x)).sum(dim=-2)        # (..., T)


@torch.no_grad()
def look(model, tokens):
    """Where the heads look, on average over sequences (B, T) and places, as plain numbers.

    heads: for each of L * H heads, attention at offsets -16 ... 16. near: attention on both
    neighbours, at -1 and +1; side: the difference of the two; each of the head where it is largest.
    """
    x, seen, T = model.embed(tokens), [], tokens.shape[1]                 # (B, T, C)
    for block in model.blocks:
        _, weights = block.attention(block.norm1(x), return_weights=True)  # (B, H, T, T)
        seen.append(by_offset(weights.mean(dim=0)) / T)                   # (H, T)
        x = block(x)                                                      # (B, T, C)
    seen, reach = torch.cat(seen), min(16, (T - 1) // 2)                  # (L * H, T)
    return dict(near=(seen[:, 1] + seen[:, -1]).max().item(),
                side=(seen[:, 1] - seen[:, -1]).abs().max().item(),
                heads=seen[:, range(-reach, reach + 1)].tolist())         # (L * H, 33)


def attention_pull(model, loss, seq_len):
    """Where a loss would have attention go, by offset, (T,); positive: it would draw it there.

    Minus the gradient of `loss()`, a scalar made with `model`, with respect to an extra bias of
    the scores, alike for all heads of every module with a `score_bias`, which is None or (H, T, T)
    and added to its scores; less its mean over all offsets but 0.
    """
    # A bias of zeros changes nothing, but has a gradient.
    extra = next(model.parameters()).new_zeros(seq_len, seq_len).requires_grad_()  # (T, T)
    attentions = [module for module in model.modules() if hasattr(module, "score_bias")]
    own = [attention.score_bias for attention in attentions]              # (H, T, T) or None each
    for attention, bias in zip(attentions, own):
        attention.score_bias = extra[None] if bias is None else bias + extra  # (1 or H, T, T)
    pull = by_offset(-torch.autograd.grad(loss(), extra)[0])              # (T,)
    for attention, bias in zip(attentions, own):
        attention.score_bias = bias
    return pull - pull[1:].mean()


def neighbour_pulls(model, tokens, labels, *, mask_id, mask_ratio=0.3, batch_size=32, seed=0):
    """How masked tokens and how labels pull attention to the neighbours, at offsets -1 and +1.

    tokens (n, T), labels (n,). "near" is the pull on both neighbours, "side" that to the right less
    that to the left. What has nothing to do with order or with labels is taken out: the masked pull
    is less that on the same tokens shuffled, the label pull is half the difference to that of the
    wrong labels. Returns {"masked near": (mean over batches, standard error), "labels near": ...,
    "labels side": ...}.
    """
    generator, found = torch.Generator().manual_seed(seed), []
    for x, y in zip(tokens.split(batch_size), labels.split(batch_size)):  # (B, T), (B,)
        order = torch.rand(x.shape, generator=generator).argsort(dim=1)   # (B, T)
        shuffled = x.gather(1, order.to(x.device))                        # (B, T)
        # The same masks for a loss and its control: their luck cancels in the difference.
        corrupted, is_masked = mask_tokens(x, mask_id, mask_ratio, generator)
        control = shuffled.masked_fill(is_masked, mask_id)                # (B, T)
        by_masks = attention_pull(model, lambda: (
            masked_loss(model, x, corrupted, is_masked)
            - masked_loss(model, shuffled, control, is_masked)), x.shape[1])  # (T,)
        wrong = (y + 1) % (labels.max() + 1)                              # (B,)
        by_labels = attention_pull(model, lambda: (
            F.cross_entropy(model.classify(x), y)
            - F.cross_entropy(model.classify(x), wrong)) / 2, x.shape[1])  # (T,)
        found.append(torch.stack([by_masks[1] + by_masks[-1], by_labels[1] + by_labels[-1],
                                  by_labels[1] - by_labels[-1]]))         # (3,)
    deviations, means = torch.std_mean(torch.stack(found), dim=0)         # (3,) each
    named = zip(("masked near", "labels near", "labels side"), means, deviations / len(found)**0.5)
    return {name: (mean.item(), error.item()) for name, mean, error in named}


# ---------------------------------------------------------------------------------------------
# One run, start to end. The two arms are this one function: they share data, start weights and the
# total of steps, and differ in what the first `pretrain_steps` ask for.
# ---------------------------------------------------------------------------------------------
def load_data(config):
    """The config with its data's sizes, and [train tokens (n, T), train labels (n,), test ...]."""
    if config.data:
        data = tasks.from_file(config.data, config.seed)
        config = replace(config, task=os.path.basename(config.data), seq_len=data[0].shape[1],
                         vocab_size=int(max(data[0].max(), data[2].max())) + 1)
    else:
        data = tasks.make_task(config.task, n_train=config.n_train, n_test=config.n_test,
                               seq_len=config.seq_len, vocab_size=config.vocab_size,
                               signal=config.signal, path=config.text, seed=config.seed)
    config = replace(config, n_train=len(data[0]), n_test=len(data[2]))
    return config, [torch.from_numpy(part).to(config.device) for part in data]


def model_arguments(config, labels):
    """What to call Transformer with, for as many classes as `labels` (n,) name."""
    names = "vocab_size seq_len positions n_layers d_model n_heads d_ff readout".split()
    return dict(n_classes=int(labels.max()) + 1, **{name: getattr(config, name) for name in names})


def new_model(config, labels, seed):
    """A Transformer at the random start that `seed` gives."""
    torch.manual_seed(seed)
    return Transformer(**model_arguments(config, labels)).to(config.device)


def run(config):
    """Train one arm and measure it; returns plain numbers, ready for JSON.

    train and test: accuracy on the first 1,000 training and on all test sequences; curve: [[step,
    test accuracy], ...], where steps of pretraining count; looks: what `look` returned at each
    stage; near, side: of the last stage; masked_loss: mean of the first and of the last 20 steps.
    """
    config, (x, y, x_test, y_test) = load_data(config)                    # (n, T), (n,) twice
    total = config.pretrain_steps + config.finetune_steps    # the same in both arms
    pretrain_steps = config.pretrain_steps if config.spt else 0
    settings = dict(batch_size=config.batch_size, seed=config.seed)
    # Attention matrices are T x T for each sequence and head: the longer, the fewer are looked at.
    sample = x_test[:max(1, 2**18 // config.seq_len**2)]                  # (B, T)
    curve, masked_loss = [], None

    def follow(step):
        if pretrain_steps + step in [total * tenth // 10 for tenth in range(1, 11)]:
            curve.append([pretrain_steps + step, accuracy(model, x_test, y_test)])

    model = new_model(config, y, config.seed)
    looks = {"start": look(model, sample)}
    if config.spt:
        losses = pretrain(model, x, mask_id=config.vocab_size, mask_ratio=config.mask_ratio,
                          steps=pretrain_steps, lr=config.pretrain_lr, **settings)
        masked_loss = [statistics.mean(losses[:20]), statistics.mean(losses[-20:])]
        looks["pretraining"] = look(model, sample)
    if config.transfer != "all":
        # What is copied alone meets weights that it has never seen, of another random start.
        pretrained, model = model, new_model(config, y, config.seed + 10**6)
        transfer(pretrained, model, config.transfer)
    for name, weight in model.named_parameters():
        weight.requires_grad_(not (config.freeze_qk and (".query." in name or ".key." in name)))
    finetune(model, x, y, steps=total - pretrain_steps, lr=config.lr, on_step=follow, **settings)
    last = looks["fine-tuning" if config.spt else "label training"] = look(model, sample)
    if config.save:
        torch.save(dict(arguments=model_arguments(config, y), weights=model.state_dict()),
                   config.save)
    data = [part.cpu().numpy() for part in (x, y, x_test, y_test)]
    return dict(
        arm="SPT" if config.spt else "labels", total_steps=total,
        train=accuracy(model, x[:1000], y[:1000]), test=curve[-1][1],
        steps_to_95=next((step for step, reached in curve if reached >= 0.95), None),
        # Chance is what always naming the most frequent class would score.
        chance=y_test.bincount().max().item() / len(y_test), counting=tasks.count_baseline(*data),
        best_possible=tasks.best_possible_accuracy(config.task, *data[2:], config.vocab_size),
        near=last["near"], side=last["side"], masked_loss=masked_loss, curve=curve, looks=looks,
        n_weights=sum(weight.numel() for weight in model.parameters()), config=asdict(config))


# ---------------------------------------------------------------------------------------------
# Many runs, side by side in processes of one thread each. All that a run depends on is its
# Config, so its numbers are the same for any number of processes.
# ---------------------------------------------------------------------------------------------
LABEL_LRS = 1e-3, 3e-3, 1e-2    # labels alone get three learning rates and keep the best


def start_worker():
    """A process for runs: one thread, since two have too little to do, and no progress bars."""
    torch.set_num_threads(1)
    sys.stderr = open(os.devnull, "w")


def append_json(path, record):
    """Add a line to the file `path`; without a path do nothing."""
    if path:
        with open(path, "a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")


def run_rows(rows, config):
    """Run each config of {name: config} with `config.seeds` seeds; returns {name: [result, ...]}.

    Labels alone try three learning rates on the first seed. The one with the best accuracy on its
    *test* set, a choice in favour of labels, serves the other seeds.
    """
    results = {name: [] for name in rows}

    # "spawn" starts processes in a way that works on every system, with CUDA as well.
    with ProcessPoolExecutor(config.jobs, get_context("spawn"), start_worker) as pool:
        def run_all(asked):    # [(name, config), ...]
            done = pool.map(run, [replace(one, save=None) for _, one in asked])
            for (name, _), result in zip(asked, tqdm(done, "runs", len(asked), disable=None)):
                append_json(config.json, dict(row=name, **result))
                results[name].append(result)
        run_all([(name, replace(one, seed=config.seed, lr=lr)) for name, one in rows.items()
                 for lr in ([one.lr] if one.spt else LABEL_LRS)])
        for name, tried in results.items():
            best = max(tried, key=lambda result: result["test"])
            best["rates"] = ", ".join(f"lr {r['config']['lr']:g} {r['test']:.3f}" for r in tried)
            results[name] = [best]
        run_all([(name, replace(one, seed=config.seed + i, lr=results[name][0]["config"]["lr"]))
                 for name, one in rows.items() for i in range(1, config.seeds)])
    return results


HEADER = f"{'':26}{'train accuracy':15}{'test accuracy':15}{'95 % at step':14}{'near':6}side"


def mean(results, column):
    """Mean of a column over runs; one that never got to 95 % counts as infinitely many steps."""
    return statistics.mean(math.inf if r[column] is None else r[column] for r in results)


def show_row(name, results):
    """Print mean ± standard deviation over runs, under HEADER."""
    def spread(column):
        values = [result[column] for result in results]
        more = f" ± {statistics.stdev(values):.3f}" if len(values) > 1 else ""
        return f"{statistics.mean(values):.3f}{more}"
    reached = sum(result["steps_to_95"] is not None for result in results)
    steps = (f"{mean(results, 'steps_to_95'):,.0f}" if reached == len(results) else
             f"{reached} of {len(results)} runs")
    print(f"{name:26}{spread('train'):15}{spread('test'):15}{steps:14}"
          f"{mean(results, 'near'):.2f}  {mean(results, 'side'):.2f}")
    if "," in results[0].get("rates", ""):
        print("    on the first seed:", results[0]["rates"])


def report(rows):
    """Print {name: results}: yardsticks, a row each, and where the heads of a first seed look."""
    first = list(rows.values())[-1][0]
    c, best = first["config"], first["best_possible"]
    print(f"{c['task']}: {c['n_train']:,} training sequences of {c['seq_len']} tokens, "
          f"{first['total_steps']:,} steps, {first['n_weights']:,} weights\n"
          f"chance {first['chance']:.3f}, counting tokens {first['counting']:.3f}, "
          f"best possible {'unknown' if best is None else f'{best:.3f}'}\n{HEADER}")
    for name, results in rows.items():
        show_row(name, results)
    for name, (result, *_) in rows.items():
        reach = len(result["looks"]["start"]["heads"][0]) // 2
        print(f"{name:20} {f'offset {-reach}':{reach}}0{reach:>+{reach}}   -1    0   +1")
        for stage, seen in result["looks"].items():
            for i, head in enumerate(seen["heads"], 1):
                # A full bar is half of the head's attention.
                bars = "".join("▁▂▃▄▅▆▇█"[min(7, int(16 * mass))] for mass in head)
                print(f"  {stage:14} {i:2}  {bars} " + attention_text(head))
        if result["masked_loss"]:
            print("  masked loss from {:.2f} to {:.2f}; a model that knows nothing pays {:.2f}"
                  .format(*result["masked_loss"], math.log(c["vocab_size"])))


def attention_text(head):
    """Attention of a head at offsets -1, 0, +1."""
    middle = len(head) // 2
    return " ".join(f"{mass:.2f}" for mass in head[middle - 1:middle + 2])


def single(config):
    """Train one arm and print what came out."""
    result = run(config)
    append_json(config.json, result)
    report({f"{result['arm']}, seed {config.seed}": [result]})


def compare(config):
    """Both arms over several seeds, side by side, and the gap."""
    found = run_rows({arm: replace(config, spt=arm == "SPT") for arm in ("labels", "SPT")}, config)
    report({f"{arm}, lr {results[0]['config']['lr']:g}": results for arm, results in found.items()})
    gap = mean(found["SPT"], "test") - mean(found["labels"], "test")
    print(f"gap in test accuracy, mean over {config.seeds} seeds: {gap:.3f}")


# ---------------------------------------------------------------------------------------------
# The claims, after the paper's abstract, as data. A row is what differs from its task's recipe; a
# rule is a Python expression in the columns of the rows.
# ---------------------------------------------------------------------------------------------
def both(**changes):
    """Rows for labels only and for SPT, under the same changes."""
    return {"labels": changes, "SPT": dict(changes, spt=True)}


GAP = "test['labels'] < 0.6 and test['SPT'] > 0.95"
CLAIMS = {    # {title: ({row: changes}, rule)}
    "1 SPT beats labels alone, at equal steps": (both(), GAP),
    "1a on English: forwards or backwards?": (both(task="text"), GAP),
    "1b on sequences of 128 tokens": (both(seq_len=128), GAP),
    "1c in two dimensions (texture)": (both(task="texture"), "test['SPT'] > test['labels'] + 0.1"),
    "1d with learned positions": (both(positions="learned"), "test['SPT'] > test['labels'] + 0.1"),
    "1e labels do, too, at 10 x the steps": ({"labels": dict(finetune_steps=5600)},
        "test['labels'] > 0.8 and steps_to_95['labels'] > 2 * 600"),
    "1f and mostly in batches of 128": ({"labels": dict(batch_size=128)}, "test['labels'] > 0.6"),
    "1g SPT fails if 1 token in 64 is hidden": (
        {"SPT, few": dict(spt=True, mask_ratio=1 / 64)}, "test['SPT, few'] < 0.6"),
    "2 it is not depth: 2 layers": (both(n_layers=2), GAP),
    "2a 4 layers": (both(n_layers=4), GAP),
    "3 nor too few sequences: 50,000": ({"labels": dict(n_train=50_000)}, "train['labels'] < 0.6"),
    "3a 200 sequences": (both(n_train=200), "test['labels'] < 0.65 and test['SPT'] > 0.85"),
    # What is copied alone meets new weights, so these get 100 label steps more.
    "4 the query and key maps (qk) carry it": (
        {"qk copied": dict(spt=True, transfer="qk", finetune_steps=300),
         "rest copied": dict(spt=True, transfer="not-qk", finetune_steps=300)},
        "test['qk copied'] > 0.9 and test['rest copied'] < 0.6"),
    "4a even if labels may not change them": ({"qk frozen": dict(
        spt=True, freeze_qk=True, finetune_steps=300)}, "test['qk frozen'] > 0.9"),
    "5 given offsets by hand, labels suffice": (
        {"rotary": dict(positions="rotary"), "one-sided bias": dict(positions="distance")},
        "min(test['rotary'], test['one-sided bias']) > 0.95"),
    "5a or reading all places apart": ({"labels": dict(readout="all")}, "test['labels'] > 0.9"),
    "control: no gap where counting is enough": (
        both(task="bag"), "test['labels'] > 0.9 and abs(test['SPT'] - test['labels']) < 0.03"),
}


def verdict(rule, holds):
    """Print a rule and whether it holds; returns `holds`."""
    print(f"  {'holds' if holds else 'FAILS'}:", rule.replace(" and ", "\n    and "))
    return bool(holds)


def reproduce(config):
    """Measure every claim; exit status 1 if one does not hold. Returns whether all hold."""
    rows = {(title, name): recipe(device=config.device, **changes)
            for title, (claim, _) in CLAIMS.items() for name, changes in claim.items()}
    results, lines = run_rows(rows, config), []
    print(f"mean ± standard deviation, {config.seeds} seeds from {config.seed} up\n{HEADER}")
    for title, (claim, rule) in CLAIMS.items():
        print(title)
        for name in claim:
            show_row("  " + name, results[title, name])
        names = {column: {name: mean(results[title, name], column) for name in claim}
                 for column in ("train", "test", "steps_to_95")}
        tests = ", ".join(f"{name} {test:.2f}" for name, test in names["test"].items())
        lines.append((verdict(rule, eval(rule, names)), title, tests))
    lines.append((theory(recipe(seed=config.seed, json=config.json)), "6 why: see above", ""))
    print(f"\n{'claim':42}test accuracy")
    for ok, title, tests in lines:
        print(f"{title:42}{tests:33}{'holds' if ok else 'FAILS'}")
    return all(holds for holds, _, _ in lines)


# ---------------------------------------------------------------------------------------------
# Theory: why labels do not teach attention to look near, and masked tokens do.
#
# In words. Attention starts out uniform. A label asks about a mean over places. If every place
# shifts its gaze alike, each value is still counted once in the mean, so the mean does not move:
# labels start out blind. A hidden token asks for itself, at its own place, before any mean, and its
# neighbour knows something about it: there looking near soon pays. And a batch hides hundreds.
#
# Set-up. One attention layer, no residual, scores S (T, T) of positions only:
#     A = softmax(S) by rows,  z_i = Σ_j A_ij v_j,  v_j the value of token j,  φ token by token,
#     label logits Wᵀ mean_i φ(z_i),  logits of a hidden token i: Uᵀ φ(z_i).
# "Every place alike" is a *circulant* direction Δ of the scores: Δ_ij depends on (j - i) mod T.
#
# 1. φ linear: labels are blind along all circulant S. The rows of A sum to 1, and if S is
#    circulant so do its columns: mean_i z_i = (1/T) Σ_j (Σ_i A_ij) v_j = mean_j v_j. S drops out.
# 2. Any φ: labels are blind to first order at S = 0. There every z_i is the mean value v̄, and
#    dA_ij = (Δ_ij - mean_k Δ_ik) / T has column sums 0 if Δ is circulant:
#        d mean_i φ(z_i) = φ'(v̄) (1/T) Σ_j (Σ_i dA_ij) v_j = 0.
# 3. Masked tokens see. Along "look ℓ to the side", dz_i = (v_{i+ℓ} - v̄) / T, and with p the
#    predicted distribution of a hidden token x_i, its loss pulls by
#        (1/T) E[(onehot(x_i) - p)ᵀ Uᵀ φ'(v̄) (v_{i+ℓ} - v̄)],
#    in general not 0 when x_i and x_{i+ℓ} depend on each other.
#
# A pull is minus a derivative. Place i holds the mask symbol, so "look to the side" also means
# "look less at a mask", which pays with any data. So the mean pull on places but i is taken off;
# on shuffled tokens 0 is left on average.
# ---------------------------------------------------------------------------------------------
def one_layer_losses(scores, tokens, labels, corrupted, is_masked, values, to_class, to_symbol,
                     phi=torch.tanh):
    """The label loss and the masked loss of the set-up above, two scalars.

    scores S (T, T); tokens, corrupted (n, T) and is_masked (n, T) as in `masked_loss`; labels (n,);
    values (V + 1, C); to_class W (C, K); to_symbol U (C, V).
    """
    weights = scores.softmax(dim=-1)                                      # (T, T)
    pooled = phi(weights @ values[tokens]).mean(dim=1)                    # (n, C)
    hidden = phi(weights @ values[corrupted])[is_masked]                  # (N, C)
    return (F.cross_entropy(pooled @ to_class, labels),
            F.cross_entropy(hidden @ to_symbol, tokens[is_masked]))


def proved(seed):
    """Print the pulls in the one-layer set-up; returns whether they are as proved."""
    T, V, C, pulls = 16, 8, 8, []
    x, y = map(torch.from_numpy, tasks.proximity(n=2000, seq_len=T, vocab_size=V, seed=seed))
    torch.manual_seed(seed)
    shuffled = x.gather(1, torch.rand(x.shape).argsort(dim=1))            # (n, T)
    for _ in range(20):
        S = torch.zeros(T, T, dtype=torch.float64, requires_grad=True)    # (T, T)
        v, W, U = (torch.randn(shape).double() for shape in ((V + 1, C), (C, 2), (C, V)))
        losses = (*one_layer_losses(S, x, y, *mask_tokens(x, V, 0.3), v, W, U),
                  one_layer_losses(S, shuffled, y, *mask_tokens(shuffled, V, 0.3), v, W, U)[1])
        for loss in losses:
            pull = -torch.autograd.grad(loss, S, retain_graph=True)[0]    # (T, T)
            right, left = (by_offset(pull)[o] - by_offset(pull)[1:].mean() for o in (1, -1))
            pulls += [right, right + left, T * (pull[0, 1] - pull[0, 1:].mean())]
    rms = torch.stack(pulls).view(20, 3, 3).square().mean(dim=0).sqrt()   # (3, 3)
    print("One layer, as proved: size of the pull, root mean square over 20 random starts\n"
          f"{'':32}by labels       by masked tokens  shuffled")
    names = "all places look right", "all places look both ways", "one place alone looks right"
    for name, pull in zip(names, rms.T):
        print("  {:30}{:<16.0e}{:<18.1e}{:.1e}".format(name, *pull.tolist()))
    return verdict("labels < 1e-12 where all places move alike and masked > 3 * shuffled",
                   rms[0, :2].max() < 1e-12 < 1e-6 < rms[0, 2] and rms[1, 1] > 3 * rms[2, 1])


def theory(config):
    """Why: what is proved, and what happens in training. Returns whether all of it holds."""
    blind = proved(config.seed)
    config, (x, y, x_test, _) = load_data(config)                         # (n, T), (n,)
    common = dict(batch_size=config.batch_size, seed=config.seed)
    masking = dict(mask_id=config.vocab_size, mask_ratio=config.mask_ratio)
    before, after = config.pretrain_steps, config.finetune_steps
    alone, masks, sides = {}, {}, {}    # {step: what is seen after it}

    def see(found, steps):
        def on_step(step):
            if step in (0, 25, 50, 100, 150, 200, steps):
                found[step] = look(model, x_test[:64]) | neighbour_pulls(
                    model, x[:256], y[:256], seed=config.seed, **masking)
        on_step(0)
        return on_step
    model = new_model(config, y, config.seed)
    finetune(model, x, y, steps=before + after, lr=config.lr, on_step=see(alone, before), **common)
    model = new_model(config, y, config.seed)
    pretrain(model, x, steps=before, lr=config.pretrain_lr, on_step=see(masks, before),
             **masking, **common)
    finetune(model, x, y, steps=after, lr=config.lr, on_step=see(sides, after), **common)
    stages = {"labels only": alone, "SPT: masked tokens": masks, "SPT: then labels": sides}
    append_json(config.json, dict(row="theory", stages=stages, config=asdict(config)))
    print("Measured in the full model: pulls x 1000 ± standard error over batches\n"
          "     on both neighbours by        to the right:  each head's attention\n"
          "step masked tokens labels         by labels      at offsets -1, 0, +1")
    for title, found in stages.items():
        print(title)
        for step, seen in found.items():
            pulls = ("{:.2f} ± {:.2f}".format(*(1e3 * part for part in seen[name]))
                     for name in ("masked near", "labels near", "labels side"))
            print("{:4} {:14}{:15}{:15}".format(step, *pulls)
                  + "  ".join(map(attention_text, seen["heads"])))
    weak = max(abs(seen["labels " + to][0]) for seen in alone.values() for to in ("near", "side"))
    (pull, error), (label, _) = masks[before]["masked near"], masks[before]["labels near"]
    return all([
        blind,
        verdict("masks teach near: when they end, masked > 20 * labels and masked > 10 * error",
                pull > 20 * abs(label) and pull > 10 * error),
        verdict("labels alone do not: at all steps, either pull < that / 100", weak < pull / 100),
        verdict("labels choose the side: |right - left| < 0.05 before and > 0.1 after them",
                sides[0]["side"] < 0.05 and sides[after]["side"] > 0.1)])


# ---------------------------------------------------------------------------------------------
# The command line. What is wrong with flags and files is said in argparse's own way, with exit
# status 2, before anything is written.
# ---------------------------------------------------------------------------------------------
def main(argv=None):
    """Run the command line; returns 0, or 1 if a claim does not hold. Bad input exits with 2."""
    parser = argparse.ArgumentParser(
        prog="spt.py", description=__doc__.split("\n\n")[1], argument_default=argparse.SUPPRESS,
        usage="spt.py [--task TASK] [--spt | --compare | --reproduce | --theory] [flags]")
    for f in fields(Config):
        kind = (dict(action="store_true") if f.type is bool else
                dict(type=f.type, choices=f.metadata["choices"]))
        parser.add_argument("--" + f.name.replace("_", "-"), **kind,
                            help=f"{f.metadata['help']} (default {f.default})")
    for mode in (compare, reproduce, theory):
        parser.add_argument("--" + mode.__name__, dest="mode", action="store_const", const=mode,
                            help=mode.__doc__.split(".")[0])
    given = vars(parser.parse_args(argv))
    torch.set_num_threads(1)    # at this size two threads only wait for each other
    try:
        mode, config = given.pop("mode", single), recipe(**given)
        if config.device != "cpu" and not getattr(torch, config.device).is_available():
            raise ValueError(f"--device {config.device}: not on this machine")
        for path in filter(None, (config.json, config.save)):
            if os.path.isdir(path) or not os.path.isdir(os.path.dirname(path) or "."):
                raise ValueError(f"{path}: must be a file in a folder that exists")
        # A mode that gives a verdict returns it.
        return 1 if mode(config) is False else 0
    except (ValueError, OSError) as error:
        parser.error(str(error))


if __name__ == "__main__":
    sys.exit(main())
