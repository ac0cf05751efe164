"""Draw README's picture, experiments/spt.png:

    python -m experiments.plot

Left: test accuracy over steps, five seeds. Middle: where one head looks, in one seed. Right: the
masked loss over steps of pretraining, for three lengths of sequences, mean of two seeds. All that
is drawn is trained here. Needs matplotlib beside requirements.txt, and takes 1 to 4 minutes on two
cores.
"""
from pathlib import Path

import torch
from matplotlib import pyplot
from matplotlib.colors import LogNorm

import spt
from experiments import run_command

FOLDER = Path(__file__).parent

# Okabe and Ito's colours, which the colour-blind tell apart.
ORANGE = "#D55E00"
BLUE = "#0072B2"
GREEN = "#009E73"
GREY = "#555555"

COLOURS = {64: "#CC79A7", 128: "#8B3A7E", 256: "#3B0F3F"}    # of each length T
STYLES = {"random": "-", "near": "--"}          # of each start


# ---------------------------------------------------------------------------------------------
# What is trained. `label_run` and `masked_losses` are one run each, in a worker process.
# ---------------------------------------------------------------------------------------------
@torch.no_grad()
def attention_corner(model, tokens):
    """Attention of the first head, mean over sequences (B, T): the first 16 positions, (16, 16)."""
    block = model.blocks[0]
    x = block.norm1(model.embed(tokens))                                  # (B, T, C)
    weights = block.attention.weights(x)                                  # (B, H, T, T)
    head = weights.mean(dim=0)[0]                                         # (T, T)
    # Of all 64 positions single ones could not be seen.
    return head[:16, :16]


def label_run(config):
    """Train on labels, up to step 600; SPT trains on masked tokens for the first 400 of these.

    Returns test accuracies, one for every 25 steps on labels, and attention before and after them.
    """
    _, (x, y, x_test, y_test) = spt.load_data(config)
    model = spt.new_model(config, 2, config.seed)
    training = dict(seed=config.seed, progress=False)
    steps = 600
    if config.spt:
        steps = 200
        spt.pretrain(model, x, mask_id=8, **training)
    accuracies = []

    def measure(step):
        if step % 25 == 0:
            accuracies.append(spt.accuracy(model, x_test, y_test))

    measure(0)
    before = attention_corner(model, x_test[:64])
    spt.finetune(model, x, y, steps=steps, lr=config.lr, on_step=measure, **training)
    after = attention_corner(model, x_test[:64])
    return accuracies, before, after


def masked_losses(config):
    """The loss of every step of pretraining."""
    _, data = spt.load_data(config)
    model = spt.new_model(config, 2, config.seed)
    return spt.pretrain(model, data[0], mask_id=8, seed=config.seed, progress=False)


def plan_of(seeds, **changes):
    """The configs of a recipe for so many seeds."""
    return spt.over_seeds(spt.recipe(**changes), seeds)


# ---------------------------------------------------------------------------------------------
# What is drawn: a function for each part of the figure.
# ---------------------------------------------------------------------------------------------
def draw_arm(axes, runs, first, colour):
    """Mean over seeds as a line, smallest to largest as a band; labels begin at step `first`."""
    accuracies = torch.tensor([run[0] for run in runs])                   # (seeds, times)
    steps = range(first, 601, 25)
    axes.plot(steps, accuracies.mean(0), color=colour)
    axes.fill_between(steps, accuracies.amin(0), accuracies.amax(0), color=colour, alpha=0.25)


def draw_accuracy(part, labels, near, masks):
    """Test accuracy over steps, of three arms."""
    part.suptitle("1  Accuracy, five seeds")
    axes = part.subplots()
    axes.axvspan(0, 400, color=BLUE, alpha=0.08)
    draw_arm(axes, labels, 0, ORANGE)
    draw_arm(axes, near, 0, GREEN)
    draw_arm(axes, masks, 400, BLUE)
    axes.text(15, 0.45, "labels alone", color=ORANGE)
    axes.text(15, 1.02, "labels, near start", color=GREEN)
    axes.text(470, 0.6, "SPT:\nmasked\ntokens,\nthen\nlabels", color=BLUE)
    axes.set(xlabel="step", ylabel="test accuracy", ylim=(0.42, 1.08))


def draw_attention(part, labels, near, masks):
    """Attention of one head in the first seed, at four times."""
    part.suptitle("2  Where a head looks")
    maps = {
        "random start": labels[0][1],
        "after labels alone": labels[0][2],
        "after masked tokens": masks[0][1],
        "near start": near[0][1],
    }
    cells = part.subplots(2, 2, sharex=True, sharey=True)
    # A log scale shows uniform attention, 1/64, as well as a diagonal 50 times as large.
    scale = LogNorm(0.003, 1)

    for cell, title in zip(cells.flat, maps):
        cell.set_title(title)
        image = cell.imshow(maps[title], norm=scale)
    part.supxlabel("position looked at (key), 16 of 64")
    part.supylabel("looked from (query)")
    bar = part.colorbar(image, ax=cells, format="%g")
    bar.set_label("attention (uniform: 0.016)")


def draw_masked_losses(part, losses):
    """Masked loss over steps of pretraining, for {(T, start): losses of each seed}."""
    part.suptitle("3  Masked loss, two seeds")
    axes = part.subplots()
    axes.axhline(2.079, color=GREY, linewidth=0.8)
    for T, start in losses:
        seen = torch.tensor(losses[T, start]).mean(dim=0)                 # (steps,)
        # Single steps are noisy: the mean of the last ten is drawn.
        smooth = seen.unfold(0, 10, 1).mean(dim=1)
        axes.plot(range(10, 401), smooth, STYLES[start], color=COLOURS[T])
    axes.text(205, 2.09, "unigram entropy", color=GREY)
    axes.text(128, 1.97, "64", color=COLOURS[64])
    axes.text(195, 1.97, "128", color=COLOURS[128])
    axes.text(200, 2.045, "256 tokens", color=COLOURS[256])
    axes.text(240, 1.8, "solid:\nrandom start\ndashed:\nnear start", color=GREY)
    axes.set(xlabel="step on masked tokens", ylabel="masked loss")


def plot(jobs):
    """Train, draw, and write the picture."""
    of_labels = [*plan_of(5), *plan_of(5, start="near", lr=0.01), *plan_of(5, spt=True)]
    with spt.side_by_side(label_run, of_labels, jobs) as runs:
        labels = [next(runs) for _ in range(5)]
        near = [next(runs) for _ in range(5)]
        masks = [next(runs) for _ in range(5)]
    plans = {}     # {(T, start): configs}
    of_masks = []
    for T in COLOURS:
        for start in STYLES:
            plans[T, start] = plan_of(2, seq_len=T, start=start)
            of_masks.extend(plans[T, start])
    with spt.side_by_side(masked_losses, of_masks, jobs) as runs:
        losses = {which: [next(runs) for _ in plan] for which, plan in plans.items()}
    pyplot.rcParams.update({"font.size": 11, "axes.titlesize": 10, "figure.labelsize": 11})
    figure = pyplot.figure(figsize=(11, 4), layout="constrained")
    left, middle, right = figure.subfigures(1, 3, width_ratios=[1, 1.15, 1])
    draw_accuracy(left, labels, near, masks)
    draw_attention(middle, labels, near, masks)
    draw_masked_losses(right, losses)
    figure.savefig(FOLDER / "spt.png", dpi=160)


if __name__ == "__main__":
    run_command(plot, __doc__, "jobs")
