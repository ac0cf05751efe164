"""Draw README's picture from JSON lines:  python assets/plot.py results.jsonl [picture.png]

Needs matplotlib, and in the file: runs of `--compare --json`, runs of `--theory --json`, and for
the thin lines runs of labels only with more steps. README's picture is made by

    python spt.py --compare --seeds 10 --json r.jsonl
    for i in 0 1 2 3 4; do python spt.py --theory --seed $i --json r.jsonl; done
    for i in 0 1 2; do python spt.py --finetune-steps 5600 --lr 0.003 --seed $i --json r.jsonl; done
    python assets/plot.py r.jsonl
"""
import json
import statistics
import sys

import matplotlib
matplotlib.use("Agg")
from matplotlib import pyplot

# Okabe and Ito's colours, which the colour-blind tell apart, on white, which dark pages show, too.
GREY, ORANGE, BLUE, GREEN = "#555555", "#D55E00", "#0072B2", "#009E73"


def band(axes, curves, colour, label, **style):
    """Mean of [{x: y}, ...] over seeds as a line, smallest to largest as a band."""
    x = sorted(curves[0])
    columns = [[curve[at] for curve in curves] for at in x]
    axes.plot(x, [statistics.mean(c) for c in columns], color=colour, label=label, **style)
    axes.fill_between(x, [min(c) for c in columns], [max(c) for c in columns], color=colour,
                      alpha=0.2, linewidth=0)


def what(axes, labels, spt, longer):
    """Test accuracy over steps."""
    before, total = spt[0]["config"]["pretrain_steps"], spt[0]["total_steps"]
    axes.axvspan(20, before, color=BLUE, alpha=0.08, linewidth=0)
    axes.text(100, 0.8, "SPT: masked\ntokens only", ha="center", color=BLUE)
    for run in longer:
        axes.plot(*zip(*run["curve"]), color=ORANGE, linewidth=0.8)
    if longer:
        axes.text(5600, 0.44, f"labels only,\n10 x the steps,\n{len(longer)} seeds", color=ORANGE,
                  ha="right")
    band(axes, [dict(run["curve"]) for run in labels], ORANGE, "labels only", linewidth=2)
    band(axes, [dict(run["curve"]) for run in spt], BLUE, "SPT", linewidth=2)
    axes.set(title=f"what: accuracy, {len(spt)} seeds", xlabel="step", ylabel="test accuracy",
             xscale="log", xlim=(20, 10 * total), ylim=(0.42, 1.03))
    axes.legend(loc="upper left", frameon=False, bbox_to_anchor=(0, 0.93))


def why(axes, theory):
    """Pulls on the neighbours while masked tokens teach, or labels alone."""
    def pulls(stage, name):
        return [{int(step): 1000 * seen[name][0] for step, seen in run["stages"][stage].items()}
                for run in theory]
    masks = "SPT: masked tokens"
    axes.axhline(0, color=GREY, linewidth=0.6)
    band(axes, pulls(masks, "masked near"), BLUE, "SPT: masked tokens, on both", marker="o",
         markersize=3)
    band(axes, pulls(masks, "labels near"), GREEN, "labels on that model, on both", marker="s",
         markersize=3, linestyle="--")
    band(axes, pulls("labels only", "labels near"), ORANGE, "labels only, on both", marker="^",
         markersize=3)
    band(axes, pulls("labels only", "labels side"), GREY, "labels only, right less left", marker="v",
         markersize=3, linestyle=":")
    axes.set_yscale("symlog", linthresh=1)
    axes.set(title=f"why: pull on the neighbours, {len(theory)} seeds", xlabel="step",
             ylabel="pull x 1000", ylim=(-10, 20000), yticks=[-10, -1, 0, 1, 10, 100])
    axes.legend(loc="upper left", frameon=False)


def how(axes, labels, spt):
    """Attention by offset, of the head that ends up most one-sided, in one run of each arm."""
    looks = spt["looks"]
    middle = len(looks["start"]["heads"][0]) // 2
    side = [abs(head[middle + 1] - head[middle - 1]) for head in looks["fine-tuning"]["heads"]]
    head, reach = side.index(max(side)), 6
    for label, seen, colour, style in (
            ("start", looks["start"], GREY, dict(linewidth=4, alpha=0.4)),
            ("labels only", labels["looks"]["label training"], ORANGE, dict(marker="^")),
            ("after masked tokens", looks["pretraining"], BLUE, dict(marker="o")),
            ("then after labels", looks["fine-tuning"], GREEN, dict(marker="s", linestyle="--"))):
        axes.plot(range(-reach, reach + 1), seen["heads"][head][middle - reach:middle + reach + 1],
                  color=colour, label=label, markersize=4, **style)
    axes.set(title=f"how: where head {head + 1} looks, seed {spt['config']['seed']}",
             xlabel="offset (-1: left neighbour)", ylabel="attention", ylim=(0, 1.05))
    axes.legend(loc="upper left", frameon=False)


def main(path, picture="assets/spt.png"):
    runs = [json.loads(line) for line in open(path, encoding="utf-8")]
    theory = [run for run in runs if run.get("row") == "theory"]
    spt = [run for run in runs if run.get("row") == "SPT"]
    tried = [run for run in runs if run.get("row") == "labels"]
    # The rate that more than one seed was run with is the one that was chosen.
    rates = [run["config"]["lr"] for run in tried]
    labels = [run for run in tried if rates.count(run["config"]["lr"]) == max(map(rates.count, rates))]
    longer = [run for run in runs if "row" not in run and run["total_steps"] > spt[0]["total_steps"]]
    pyplot.rcParams.update({"font.size": 9, "axes.titlesize": 10, "legend.fontsize": 8})
    figure, axes = pyplot.subplots(1, 3, figsize=(11, 3.6), layout="constrained", facecolor="white")
    what(axes[0], labels, spt, longer)
    why(axes[1], theory)
    how(axes[2], labels[0], spt[0])
    figure.savefig(picture, dpi=160)


if __name__ == "__main__":
    if len(sys.argv) not in (2, 3):
        sys.exit(__doc__)
    main(*sys.argv[1:])
