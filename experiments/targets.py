"""Are labels blind to looking near, or are there just few of them?

    python -m experiments.targets

A target is one label, or one masked token. A step of SPT asks 32 sequences for 32 labels, or for
some 600 masked tokens. Here both are asked for the same number of targets a step, and what counts
is how many steps, and how many targets, it takes until learning takes off. That is when the loss
on the test sequences has come a fifth of the way from chance to the best: for labels from ln 2 to
0, for masked tokens from the unigram entropy to the 1.64 that SPT reaches. The learning rate is
constant after 40 steps of warm-up, and each number is at the better of two rates.

Three seeds take about 8 minutes on two cores, `--seeds 1` a third of that.
"""
import math
import statistics
from itertools import product
from typing import NamedTuple

import torch
from torch.nn import functional as F

import spt
from experiments import run_command, verdict

RATES = (0.003, 0.01)
WARM_UP = 40    # steps
EVERY = 10      # steps from one look at the test loss to the next
TAKEN_OFF = {
    "labels": 0.8 * math.log(2),
    "masks": 0.8 * math.log(8) + 0.2 * 1.64,
}


class Cell(NamedTuple):
    """What a step asks for: `each` targets of a kind in each of `sequences` sequences."""
    kind: str    # "labels" or "masks"
    sequences: int
    each: int = 1
    start: str = "random"
    seq_len: int = 64
    limit: int = 3000    # steps after which to give up
    rates: tuple = RATES


# {name: {targets a step: cell}}
TABLE = {
    "labels": {
        32: Cell("labels", 32),
        128: Cell("labels", 128, limit=2000),
        608: Cell("labels", 608, limit=1000)},
    "masked tokens": {
        32: Cell("masks", 32),
        128: Cell("masks", 128, limit=2000),
        608: Cell("masks", 608, limit=1000)},
    "masked, as in SPT": {
        608: Cell("masks", 32, each=19, limit=1000)},
    "labels, near start": {
        32: Cell("labels", 32, start="near"),
        128: Cell("labels", 128, start="near", limit=2000),
        608: Cell("labels", 608, start="near", limit=1000)},
}
# {what it is: cell}. Batches of 128 sequences of 128 tokens are slow, so they have one rate.
LONG = dict(seq_len=128, limit=1500, rates=(0.003,))
BELOW = {
    "4 masked tokens in each of 32 sequences": Cell("masks", 32, each=4, limit=2000),
    "one label asked at all its 64 positions": Cell("labels", 32, each=64, limit=2000),
    "length 128: 1 label in each of 128": Cell("labels", 128, **LONG),
    "length 128: 1 masked in each of 128": Cell("masks", 128, **LONG),
    "length 128: 38 masked in each of 32": Cell("masks", 32, each=38, seq_len=128),
}


def mask_exactly(tokens, each, generator):
    """Mask `each` tokens of every sequence, tokens (B, T); returns the same as `mask_tokens`."""
    draws = torch.rand(tokens.shape, generator=generator)                 # (B, T)
    places = draws.topk(each, dim=1).indices                              # (B, each)
    is_masked = torch.zeros(tokens.shape, dtype=torch.bool).scatter(1, places, True)
    return tokens.masked_fill(is_masked, 8), is_masked


def loss_of(cell, model, tokens, labels, generator):
    """The loss of one step, of tokens (B, T) and labels (B,)."""
    if cell.kind == "masks":
        return spt.masked_loss(model, tokens, *mask_exactly(tokens, cell.each, generator))
    if cell.each == 1:
        return spt.label_loss(model, tokens, labels)
    logits = model.class_head(model(tokens))                              # (B, T, K)
    return F.cross_entropy(logits.flatten(0, 1), labels.repeat_interleave(cell.each))


@torch.no_grad()
def test_loss(cell, model, tokens, labels):
    """The loss on test tokens (n, T): of their labels, or of one in eight tokens, always the same.

    It is measured alike for all cells of a kind, however many targets they train on.
    """
    each = 1 if cell.kind == "labels" else tokens.shape[1] // 8
    generator = torch.Generator().manual_seed(0)
    return loss_of(cell._replace(each=each), model, tokens, labels, generator).item()


def steps_to_take_off(run):
    """The steps until learning takes off, or None within the limit; run is (cell, rate, seed)."""
    cell, rate, seed = run
    config = spt.recipe(seed=seed, start=cell.start, seq_len=cell.seq_len)
    _, (x, y, x_test, y_test) = spt.load_data(config)                     # (n, T), (n,) twice
    x_test = x_test[:256]
    y_test = y_test[:256]
    model = spt.new_model(config, 2, seed)
    optimizer = torch.optim.AdamW(model.parameters())
    generator = torch.Generator().manual_seed(seed)
    for step in range(1, cell.limit + 1):
        optimizer.param_groups[0]["lr"] = rate * min(1, step / WARM_UP)
        chosen = torch.randint(len(x), (cell.sequences,), generator=generator)
        loss = loss_of(cell, model, x[chosen], y[chosen], generator)      # ()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % EVERY == 0 and test_loss(cell, model, x_test, y_test) <= TAKEN_OFF[cell.kind]:
            return step
    return None


# ---------------------------------------------------------------------------------------------
# What is printed
# ---------------------------------------------------------------------------------------------
def at_better_rate(by_rate, limit):
    """The steps of every seed at the rate that needs fewer; by_rate is a list of such lists."""
    def total(steps):
        return sum(2 * limit if step is None else step for step in steps)
    return min(by_rate, key=total)


def text_of(cell, steps):
    """The steps of the seeds until take-off, and the targets seen until then, as two texts."""
    reached = [step for step in steps if step is not None]
    if len(reached) < len(steps):
        return f"{len(reached)} of {len(steps)} seeds", f"(in {cell.limit:,} steps)"
    mean = statistics.mean(reached)
    spread = f" ± {statistics.stdev(reached):.0f}" if len(reached) > 1 else ""
    asked_anew = cell.each if cell.kind == "masks" else 1    # a label asked again is the same
    targets = round(mean * cell.sequences * asked_anew, -2)
    return f"{mean:,.0f}{spread}", f"({targets:,.0f})"


def mean_steps(cell, steps):
    """The mean over seeds, where a seed that did not take off counts with the limit."""
    return statistics.mean(cell.limit if step is None else step for step in steps)


def show_table(found):
    """Print the table and the lines below it; found is {cell: steps of the seeds}."""
    print("A target is one label, or one masked token. Each is from a sequence of its own,\n"
          "but as in SPT 19 masked tokens are from each of 32. Learning takes off when the\n"
          "test loss has come a fifth of the way from chance to the best known. The table\n"
          "has the steps until then (tested every 10 steps), mean ± standard deviation over\n"
          "seeds, and in parentheses the targets seen until then.\n")
    print(f"{'targets a step':22}{32:<18}{128:<18}{608}")
    for name, row in TABLE.items():
        lines = [f"{name:22}", " " * 22]
        for n_targets in (32, 128, 608):
            texts = ("", "")
            if n_targets in row:
                texts = text_of(row[n_targets], found[row[n_targets]])
            for i in (0, 1):
                lines[i] += f"{texts[i]:18}"
        print(lines[0].rstrip())
        print(lines[1].rstrip())
    print()
    for name, cell in BELOW.items():
        steps, targets = text_of(cell, found[cell])
        print(f"{name:42}{steps} {targets}")


def judge(found):
    """Print the verdicts; returns whether all hold."""
    def steps(name, n_targets):
        cell = TABLE[name][n_targets]
        return mean_steps(cell, found[cell])
    print("\nIn parentheses: the bounds.")
    few = steps("labels", 32)
    spt_like = steps("masked, as in SPT", 608)
    same = steps("labels", 128) / steps("masked tokens", 128)
    many = steps("labels", 608) / steps("masked tokens", 608)
    near = few / steps("labels, near start", 32)
    four = BELOW["4 masked tokens in each of 32 sequences"]
    spread_out = mean_steps(four, found[four]) / steps("masked tokens", 128)
    return all([
        verdict(f"32 labels a step need {few / spt_like:.1f} times the steps of SPT's 608 masked\n"
                "    tokens (5 or more)", few >= 5 * spt_like),
        verdict("in training labels are few rather than blind: 608 a step take off\n"
                f"    {few / steps('labels', 608):.1f} times sooner than 32 (4 or more)",
                few >= 4 * steps("labels", 608)),
        verdict(f"at 128 targets a step, labels need {same:.1f} times the steps of masked tokens\n"
                "    (1 to 4)", 1 <= same <= 4),
        verdict(f"at 608, {many:.1f} times (1 to 4)", 1 <= many <= 4),
        verdict("4 masked tokens in each of 32 sequences do the work of 1 in each of\n"
                f"    128: {spread_out:.1f} times the steps (0.5 to 2)", 0.5 <= spread_out <= 2),
        verdict(f"from the near start 32 labels take off {near:.1f} times sooner (3 or more)",
                near >= 3)])


def targets(seed, seeds, jobs, json):
    """Measure and print all cells. Returns whether the verdicts hold."""
    cells = list(BELOW.values())
    for row in TABLE.values():
        cells.extend(row.values())
    runs = []
    for cell in cells:
        runs.extend(product([cell], cell.rates, range(seed, seed + seeds)))
    with spt.side_by_side(steps_to_take_off, runs, jobs) as results:
        steps_of = {}    # {(cell, rate, seed): steps, or None}
        for run in runs:
            steps_of[run] = next(results)
            cell, rate, seed_of_run = run
            spt.append_json(json, dict(row="targets", **cell._asdict(), lr=rate, seed=seed_of_run,
                                       steps=steps_of[run]))
    found = {}
    for cell in cells:
        by_rate = []
        for rate in cell.rates:
            by_rate.append([steps_of[cell, rate, seed + i] for i in range(seeds)])
        found[cell] = at_better_rate(by_rate, cell.limit)
    show_table(found)
    return judge(found)


if __name__ == "__main__":
    run_command(targets, __doc__, "seed", "seeds", "jobs", "json")
