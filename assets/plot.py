"""Draw README's picture from what `python spt.py --compare --json results.jsonl` wrote.

    python assets/plot.py results.jsonl [picture.png]      needs matplotlib

One row per task in the file: test accuracy over the steps of training, with the switch from
pretraining to fine-tuning marked, and attention mass by offset at the start, after label training
and after pretraining. Of several learning rates, label training is shown at its best.
"""
import json
import statistics
import sys
from collections import defaultdict

# Okabe and Ito's colours, which the colour-blind tell apart, on white, which dark pages show, too.
GREY, ORANGE, BLUE = "#666666", "#D55E00", "#0072B2"


def read(path):
    """{task: {"spt": [result, ...], "labels": [result, ...]}}, label training at its best rate."""
    found = defaultdict(lambda: {"spt": [], "labels": defaultdict(list)})
    for line in open(path, encoding="utf-8"):
        result = json.loads(line)
        if result["arm"] == "spt":
            found[result["task"]]["spt"].append(result)
        else:
            found[result["task"]]["labels"][result["lr"]].append(result)
    for arms in found.values():
        if not arms["spt"] or not arms["labels"]:
            raise ValueError("needs runs of both arms, as --compare --json writes them")
        arms["labels"] = max(arms["labels"].values(),
                             key=lambda runs: statistics.mean(r["test_accuracy"] for r in runs))
    return found


def draw_curves(axes, task, arms):
    switch = arms["spt"][0]["pretrain_steps"]
    for name, runs, colour in (("labels only", arms["labels"], ORANGE), ("SPT", arms["spt"], BLUE)):
        for i, run in enumerate(runs):
            axes.plot(*zip(*run["curve"]), color=colour, linewidth=1, alpha=0.8,
                      label=f"{name}, {len(runs)} seeds" if i == 0 else None)
    axes.axhline(arms["spt"][0]["chance"], color=GREY, linewidth=0.8, linestyle=":")
    axes.axvspan(0, switch, color=BLUE, alpha=0.08, linewidth=0)
    axes.text(switch / 2, 0.94, "SPT fills in\nmasked tokens", ha="center", va="top", color=BLUE)
    axes.set(title=f"{task}: accuracy over steps", xlabel="optimizer steps", ylim=(0.38, 1.02),
             ylabel="test accuracy", xlim=(0, None))
    axes.legend(loc="center left", frameon=False)


def draw_attention(axes, task, arms):
    for name, stage, runs, colour in (("start", "start", arms["spt"], GREY),
                                      ("after label training", "label training", arms["labels"], ORANGE),
                                      ("after pretraining", "pretraining", arms["spt"], BLUE)):
        curves = [run["attention_by_offset"][stage] for run in runs]
        offsets = [offset for offset, _ in curves[0]]
        mass = [statistics.mean(curve[i][1] for curve in curves) for i in range(len(offsets))]
        axes.plot(offsets, mass, color=colour, marker="o", markersize=3, linewidth=1.5, label=name)
    axes.set(title=f"{task}: where attention goes", xlabel="offset, key minus query (tokens)",
             ylabel="attention mass", ylim=(0, None))
    axes.legend(loc="upper right", frameon=False)


def main(argv):
    if len(argv) not in (1, 2):
        sys.exit("usage: python assets/plot.py results.jsonl [picture.png]")
    try:
        import matplotlib
        matplotlib.use("Agg")
        from matplotlib import pyplot
        found = read(argv[0])
    except ImportError:
        sys.exit("plot.py: needs matplotlib: pip install matplotlib")
    except (OSError, ValueError, KeyError, TypeError) as error:
        sys.exit(f"plot.py: {argv[0]}: no lines of --compare --json ({error})")
    if not found:
        sys.exit(f"plot.py: {argv[0]}: is empty")
    figure, rows = pyplot.subplots(len(found), 2, figsize=(9, 3.1 * len(found)), squeeze=False,
                                   layout="constrained", facecolor="white")
    for (left, right), (task, arms) in zip(rows, found.items()):
        draw_curves(left, task, arms)
        draw_attention(right, task, arms)
    figure.savefig(argv[1] if len(argv) == 2 else "assets/gap.png", dpi=110)


if __name__ == "__main__":
    main(sys.argv[1:])
