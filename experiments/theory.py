"""Why is the hint faint that looking near pays? A simpler model, in which it can be proved.

    python -m experiments.theory

It prints three parts, each with its verdicts: (a) what a bag of tokens teaches, (b) the proof in
numbers, and (c) the pulls of the full model while it trains. A *pull* towards an offset is how fast
a loss falls as every position attends a bit more to the token there. It takes half a minute on two
cores.

The proof in words. Attention starts nearly uniform, so each position receives the average of all
tokens. Let every position look a bit more at its right neighbour. Then each token is looked at more
from its left, and less from everywhere else. In total it is looked at as much as before. A label is
read from the average over positions, in which each token still counts as much as before, so the
average does not move, and the label gives no hint. A masked token is predicted at its own position,
before any average. There its neighbour now counts more, and a neighbour tells something about it.

The proof in letters, which are those of the code below. There is one layer without a skip
connection. S (T, T) are the attention scores, v_j is the value of token j, φ is any function that
acts on each position by itself, and W and U are the output maps:
    A = softmax(S) by rows,   z_i = Σ_j A_ij v_j,
    logits of the label: mean_i φ(z_i) W,   logits of the masked token i: φ(z_i) U.
A direction dS is *the same at all positions* if dS_ij depends on (j - i) mod T alone.

1. At S = 0 every z_i is the mean value v̄. There dA_ij = (dS_ij - mean_k dS_ik) / T. Its rows sum
   to 0, because those of A sum to 1. If dS is the same at all positions, so do its columns. Hence
       d mean_i φ(z_i) = (1/T) Σ_i φ'(v̄) dz_i = (1/T) φ'(v̄) Σ_j (Σ_i dA_ij) v_j = 0.
   So the label gives no pull, to first order, whatever v, φ and W are. Learning them is no help.
2. If φ is linear, this holds for all S that are the same at all positions, not only near 0, since
   the columns of A sum to 1, and mean_i z_i is the mean value.
3. For a masked token i, looking more at offset ℓ gives dz_i = (v_{i+ℓ} - v̄) / T. With p its
   prediction and x_i the token, the pull is
       (1/T) E[(onehot(x_i) - p) Uᵀ φ'(v̄) (v_{i+ℓ} - v̄)].
   In general that is not 0 where x_i and x_{i+ℓ} depend on each other. At a random start its sign
   is random, too, because U and v do not yet know what a neighbour tells. Once they have learned
   what can be learned at uniform attention, it points to the neighbours.

Proved is this much: without a skip connection, at uniform attention, labels give no pull towards
looking near, and masked tokens in general do. Measured, in part b, is that their pull is towards
the neighbours once the other weights have learned. The proof is there to show why the hint is
faint. In the full model the skip connection lets labels see a little, and attention is not quite
uniform. There the number of targets explains most, as experiments/targets.py measures. Not known
is how many targets other data need.
"""
from dataclasses import replace

import torch
from torch import nn
from torch.nn import functional as F

import spt
import synthetic_tasks as tasks
from experiments import run_command, verdict


# ---------------------------------------------------------------------------------------------
# Pulls
# ---------------------------------------------------------------------------------------------
def pull_by_offset(gradient):
    """The pull at each offset, (T,), from the gradient (T, T) of a loss by attention scores.

    A pull is minus the gradient by an extra score at one offset, the same at all positions. The
    mean over all offsets but 0 is subtracted. A masked position has the mask at offset 0, and
    looking away from it would otherwise count as a pull to all other offsets.
    """
    pull = -spt.by_offset(gradient)                                       # (T,)
    return pull - pull[1:].mean()


class WithExtraScores(nn.Module):
    """An spt.Attention whose scores have `extra` (T, T) added."""

    def __init__(self, attention, extra):
        super().__init__()
        self.attention = attention
        self.extra = extra

    def forward(self, x):
        q, k = self.attention.queries_and_keys(x)
        v = self.attention.split_heads(self.attention.value(x))           # (B, H, T, D)
        y = F.scaled_dot_product_attention(q, k, v, self.extra)
        return self.attention.out(y.transpose(1, 2).flatten(2))           # (B, T, C)


def attention_pull(model, loss, *batch):
    """Which offsets a loss would have a Transformer look at, (T,): positive where it asks for more.

    `loss(model, *batch)` is a scalar, such as spt.masked_loss or spt.label_loss, and the first of
    `batch` is tokens (B, T). Raises ValueError for a model without blocks.
    """
    T = batch[0].shape[1]
    # Zeros change nothing, but they have a gradient.
    extra = next(model.parameters()).new_zeros(T, T).requires_grad_()     # (T, T)
    for block in spt.blocks_of(model):
        block.attention = WithExtraScores(block.attention, extra)
    try:
        gradient = torch.autograd.grad(loss(model, *batch), extra)[0]     # (T, T)
    finally:    # whatever happens, the model is left as it was
        for block in model.blocks:
            block.attention = block.attention.attention
    return pull_by_offset(gradient)


def neighbour_pulls(model, config, tokens, labels):
    """The pulls at offsets -1 and +1, x 1000, as means over batches of 32.

    They are those of the masked loss with `config.spt`, else of the label loss. tokens (n, T) and
    labels (n,); returns a list of 2.
    """
    generator = torch.Generator().manual_seed(config.seed)    # masks the same tokens each time
    pulls = []
    for x, y in zip(tokens.split(32), labels.split(32)):                  # (B, T), (B,)
        if config.spt:
            corrupted, is_masked = spt.mask_tokens(
                x, config.vocab_size, config.mask_ratio, generator)
            pull = attention_pull(model, spt.masked_loss, x, corrupted, is_masked)
        else:
            pull = attention_pull(model, spt.label_loss, x, y)            # (T,)
        pulls.append(1000 * torch.stack([pull[-1], pull[1]]))             # (2,)
    return torch.stack(pulls).mean(dim=0).tolist()


PULL_STEPS = (0, 50, 100, 150, 200, 400, 800)


def pulls_while_training(config):
    """Train on masked tokens alone, with `config.spt`, or on labels alone, and measure pulls.

    Both take `config.pretrain_steps` steps, at the rate of their phase. Returns a dict of step,
    pull and on_neighbours for each of PULL_STEPS that was reached, measured on test sequences. The
    last one also has the loss on masked tokens, or the accuracy, of all test sequences.
    """
    config, (x, y, x_test, y_test) = spt.load_data(config)                # (n, T), (n,) twice
    model = spt.new_model(config, 2, config.seed)
    found = []

    def measure(step):
        if step in PULL_STEPS:
            pull = neighbour_pulls(model, config, x_test[:512], y_test[:512])
            attention = spt.attention_by_offset(model, x_test[:64])       # (L, H, T)
            found.append(dict(step=step, pull=pull, on_neighbours=spt.on_neighbours(attention)))

    training = dict(steps=config.pretrain_steps, batch_size=config.batch_size, seed=config.seed,
                    progress=False, on_step=measure)
    measure(0)
    if config.spt:
        spt.pretrain(model, x, mask_id=config.vocab_size, mask_ratio=config.mask_ratio,
                     lr=config.pretrain_lr, **training)
        found[-1]["masked_loss"] = spt.masked_loss_on_test(model, x_test, config)
    else:
        spt.finetune(model, x, y, lr=config.lr, **training)
        found[-1]["accuracy"] = spt.accuracy(model, x_test, y_test)
    return found


# ---------------------------------------------------------------------------------------------
# Part b: the layer of the proof
# ---------------------------------------------------------------------------------------------
class OneLayer(nn.Module):
    """The layer of the proof, float64: values v (V + 1, C), output maps W (C, K) and U (C, V)."""

    def __init__(self, vocab_size=8, width=8, n_classes=2, phi=torch.tanh):
        super().__init__()
        self.v = nn.Parameter(torch.randn(vocab_size + 1, width, dtype=torch.float64))
        self.W = nn.Parameter(torch.randn(width, n_classes, dtype=torch.float64))
        self.U = nn.Parameter(torch.randn(width, vocab_size, dtype=torch.float64))
        self.phi = phi

    def features(self, S, tokens):
        """φ(z), (n, T, C), for scores S (T, T) and tokens (n, T)."""
        A = S.softmax(dim=-1)                                             # (T, T)
        z = A @ self.v[tokens]                                            # (n, T, C)
        return self.phi(z)

    def label_loss(self, S, tokens, labels):
        average = self.features(S, tokens).mean(dim=1)                    # (n, C)
        return F.cross_entropy(average @ self.W, labels)

    def masked_loss(self, S, tokens, corrupted, is_masked):
        at_masked = self.features(S, corrupted)[is_masked]                # (M, C)
        return F.cross_entropy(at_masked @ self.U, tokens[is_masked])


def gradient_by_scores(loss, *batch):
    """The gradient (T, T) of loss(S, *batch) at S = 0, uniform attention."""
    T = batch[0].shape[1]
    S = torch.zeros(T, T, dtype=torch.float64, requires_grad=True)
    return torch.autograd.grad(loss(S, *batch), S)[0]


def learn_at_uniform_attention(layer, x, y, by_masks, steps=300):
    """Train v, and U or W, on masked tokens or labels of x (n, T) and y (n,), at S = 0."""
    S = torch.zeros(x.shape[1], x.shape[1], dtype=torch.float64)          # (T, T)

    def batch_loss(chosen, generator):
        if by_masks:
            corrupted, is_masked = spt.mask_tokens(x[chosen], 8, 0.3, generator)
            return layer.masked_loss(S, x[chosen], corrupted, is_masked)
        return layer.label_loss(S, x[chosen], y[chosen])
    spt.train(layer, batch_loss, len(x), steps=steps, lr=0.03, progress=False)


def one_layer_pulls(seed):
    """Pulls by offset at uniform attention, x 1000, for ten random starts of one layer.

    Returns {"labels" or "masks": {"before" or "after" the rest has learned: (10, T)}}, and, as a
    control, the pull of labels, before, on one position that looks right alone, (10,).
    """
    T = 32
    data = tasks.proximity(n=2000, seq_len=T, vocab_size=8, seed=seed)
    x, y = map(torch.from_numpy, data)                                    # (n, T), (n,)
    torch.manual_seed(seed)
    pulls = dict(labels=dict(before=[], after=[]), masks=dict(before=[], after=[]))
    alone = []
    for _ in range(10):
        masked = spt.mask_tokens(x, 8, 0.3)                               # (n, T) twice
        start = OneLayer().state_dict()
        for kind in pulls:
            layer = OneLayer()
            layer.load_state_dict(start)
            for when in ("before", "after"):
                if when == "after":
                    learn_at_uniform_attention(layer, x, y, by_masks=kind == "masks")
                if kind == "masks":
                    gradient = gradient_by_scores(layer.masked_loss, x, *masked)
                else:
                    gradient = gradient_by_scores(layer.label_loss, x, y)
                pulls[kind][when].append(1000 * pull_by_offset(gradient))  # (T,)
                if kind == "labels" and when == "before":
                    # Times T, to compare with pulls that sum over T positions.
                    alone.append(-1000 * T * gradient[0, 1])
    stacked = {kind: {when: torch.stack(rows) for when, rows in by_time.items()}
               for kind, by_time in pulls.items()}
    return stacked, torch.stack(alone)


# ---------------------------------------------------------------------------------------------
# What is printed
# ---------------------------------------------------------------------------------------------
def configs_of(seed, device):
    """What the full model trains for parts a and c, each by masks and by labels."""
    full = spt.recipe(seed=seed, device=device)
    # The hint is faint: after 400 steps one seed in ten has hardly taken it, after 800 all have.
    uniform = replace(full, start="uniform", freeze_qk=True, pretrain_steps=800)
    configs = [replace(uniform, spt=True), uniform]
    for seeded in spt.over_seeds(full, 3):
        configs.append(replace(seeded, spt=True))
    for seeded in spt.over_seeds(full, 3):
        configs.append(seeded)
    return configs


def show_bag(masks, labels):
    """Print part a from what `pulls_while_training` found by each; returns whether all hold."""
    loss = masks[-1]["masked_loss"]
    masks_start = min(masks[0]["pull"])
    masks_pull = min(masks[-1]["pull"])
    labels_pull = max(abs(pull) for pull in labels[-1]["pull"])
    print("A pull towards an offset is how fast a loss falls as every position attends a\n"
          "bit more to the token there. All pulls are x 1000. In parentheses: the bounds.")
    print("\n(a) The bag. Attention is held uniform for 800 steps, so each position receives\n"
          "the average of all tokens: the neighbours, without telling which they are.")
    return all([
        verdict(f"masked tokens learn a little from it: loss on test {loss:.3f}\n"
                "    (at most 2.075; the unigram entropy is ln 8 = 2.079)", loss <= 2.075),
        verdict(f"labels learn nothing from it: test accuracy {labels[-1]['accuracy']:.3f} "
                "(at most 0.60)", labels[-1]["accuracy"] <= 0.60),
        verdict("meanwhile masked tokens teach all other weights what neighbours tell:\n"
                f"    the smaller of their pulls to -1 and +1 grows from {masks_start:.1f} to "
                f"{masks_pull:.1f} (above 5)", masks_pull > 5),
        verdict(f"those of labels do not grow: {labels_pull:.2f} in size (at most 0.20)",
                labels_pull <= 0.20)])


def show_proof(pulls, alone):
    """Print part b from what `one_layer_pulls` returns; returns whether all hold."""
    print("\n(b) The proof in numbers: in one layer without skip connection, at uniform\n"
          "attention, labels give no pull at all. Pulls of masked tokens by offset, in ten\n"
          "random starts, before and after the other weights have learned for 300 steps:")
    offsets = (-1, 1, 2, 4, 8)
    print("  " + " " * 8 + "".join(f"{offset:<+14}" for offset in offsets).rstrip())
    for when, rows in pulls["masks"].items():
        line = f"  {when:8}"
        for offset in offsets:
            of_offset = rows[:, offset]                                   # (10,)
            line += f"{f'{of_offset.min():.1f} to {of_offset.max():.1f}':14}"
        print(line.rstrip())
    largest = max(rows.abs().max() for rows in pulls["labels"].values())
    before = pulls["masks"]["before"][:, [-1, 1]].abs().min()
    after = pulls["masks"]["after"]                                       # (10, T)
    ratio = (after[:, [-1, 1]].amin(dim=1) / after[:, 8].abs()).min()
    return all([
        verdict("here labels are blind, before and after: no pull is larger than\n"
                f"    {largest:.0e} (1e-9)", largest < 1e-9),
        verdict("masked tokens are not, even before: pulls to a neighbour, of either\n"
                f"    sign, are {before:.0e} or more in size (1e-4)", before > 1e-4),
        verdict("after, they pull to both neighbours in every start, by at least\n"
                f"    {ratio:.0f} times the size of that start's pull to +8 (5)", ratio > 5),
        verdict("control: where one position alone looks right, labels do pull, by up to\n"
                f"    {alone.abs().max():.1g} (0.01)", alone.abs().max() > 0.01)])


def mean_and_std(values):
    """Of one number for each seed, as text."""
    values = torch.tensor(values)
    mean = round(values.mean().item(), 2) + 0.0    # no -0.00
    return f"{mean:.2f} ± {values.std():.2f}"


def show_pulls(masks, labels):
    """Print part c from what `pulls_while_training` found for each seed; returns whether all hold.

    masks and labels are lists of the same length, one for each seed.
    """
    print("\n(c) The pulls of the full model while it trains, and its attention on both\n"
          "neighbours (uniform: 0.03); mean ± standard deviation over three seeds.")
    print(f"      {'on masked tokens':37}on labels")
    columns = f"{'at -1':13}{'at +1':13}{'attention':11}"
    print(f"step  {columns}{columns}".rstrip())
    for by_masks, by_labels in zip(zip(*masks), zip(*labels)):
        line = f"{by_masks[0]['step']:<6}"
        for of_seeds in (by_masks, by_labels):
            for side in (0, 1):
                line += f"{mean_and_std([found['pull'][side] for found in of_seeds]):13}"
            attention = [found["on_neighbours"] for found in of_seeds]
            line += f"{sum(attention) / len(attention):<11.2f}"
        print(line.rstrip())
    peak = min(max(min(found["pull"]) for found in by_seed) for by_seed in masks)
    largest = max(abs(pull) for by_seed in labels for found in by_seed for pull in found["pull"])
    return all([
        verdict("masked tokens pull to both sides, until attention is there: in every\n"
                f"    seed the smaller of the two pulls reaches {peak:.1f} (above 3)", peak > 3),
        verdict(f"32 labels a step do not within these steps: {largest:.2f} in size at most "
                "(0.30)", largest <= 0.30)])


def theory(seed, jobs, device, json):
    """Measure and print the three parts. Returns whether all verdicts hold."""
    with spt.side_by_side(pulls_while_training, configs_of(seed, device), jobs) as results:
        bag = show_bag(next(results), next(results))
        proof = show_proof(*one_layer_pulls(seed))
        masks = [next(results) for _ in range(3)]
        labels = [next(results) for _ in range(3)]
    pulls = show_pulls(masks, labels)
    spt.append_json(json, dict(row="theory", seed=seed, masks=masks, labels=labels))
    return bag and proof and pulls


if __name__ == "__main__":
    run_command(theory, __doc__, "seed", "jobs", "device", "json")
