"""A public benchmark, made and run by one command:

    python -m experiments.benchmark

MNIST-1D (Greydanus & Kobak 2024) has 4,000 + 1,000 sequences of 40 values in 10 classes. Here the
values are cut into 16 levels, at quantiles of the training part, and come in order or with the 40
places shuffled, the same way in every sequence. Beside it stand scikit-learn's 8 x 8 digits, row
by row, 16 grey levels and 0, with a random fifth as the test.

Needs `pip install mnist1d scikit-learn`. Nothing is downloaded. Writes mnist1d.npz,
mnist1d_shuffled.npz and digits.npz into this folder and prints a table, a line as soon as it is
measured. README has three of its lines, with the best of the three label rates. It takes about
half an hour on two cores, and `--seeds 1` a third of that.
"""
from dataclasses import replace
from pathlib import Path

import numpy as np

import spt
from experiments import run_command

FOLDER = Path(__file__).resolve().parent
LABEL_RATES = (0.001, 0.003, 0.01)
# MNIST-1D gets two layers, twice the width and ten times the steps, in either arm.
LARGER = dict(n_layers=2, d_model=64, n_heads=4, d_ff=128, pretrain_steps=3000,
              finetune_steps=3000, pretrain_lr=0.003, lr=0.003)
LINES = {
    "MNIST-1D, in order: 2 layers, width 64, 6,000 steps": dict(data="mnist1d.npz", **LARGER),
    "MNIST-1D, positions shuffled alike everywhere": dict(data="mnist1d_shuffled.npz", **LARGER),
    "digits, 600 steps": dict(data="digits.npz"),
    "digits, 2,400 steps": dict(data="digits.npz", finetune_steps=2000),
}


def make_mnist1d():
    """Write MNIST-1D as tokens, in order and shuffled."""
    import mnist1d.data
    data = mnist1d.data.make_dataset(mnist1d.data.get_dataset_args())
    quantiles = np.quantile(data["x"], np.arange(1, 16) / 16)
    tokens = np.digitize(data["x"], quantiles)                        # (4000, 40)
    test_tokens = np.digitize(data["x_test"], quantiles)              # (1000, 40)
    in_order = np.arange(40)
    shuffled = np.random.default_rng(0).permutation(40)
    for name, places in (("mnist1d", in_order), ("mnist1d_shuffled", shuffled)):
        np.savez(FOLDER / name, tokens=tokens[:, places], labels=data["y"],
                 test_tokens=test_tokens[:, places], test_labels=data["y_test"])


def make_digits():
    """Write scikit-learn's digits as tokens."""
    from sklearn.datasets import load_digits
    digits = load_digits()
    tokens = digits.images.reshape(-1, 64).astype(int)                # (1797, 64)
    np.savez(FOLDER / "digits", tokens=tokens, labels=digits.target)


def arms_of(changes):
    """The configs of a line: labels at three rates, labels from the near start, SPT."""
    changes = dict(changes, data=str(FOLDER / changes["data"]))
    config = spt.recipe(**changes)
    arms = [replace(config, lr=rate) for rate in LABEL_RATES]
    near_rate = 0.003 if config.d_model == 64 else 0.01
    arms.append(replace(config, start="near", lr=near_rate))
    arms.append(replace(config, spt=True))
    return arms


def cell(results):
    """Mean ± standard deviation of test accuracy, and the mean of train accuracy."""
    return f"{spt.mean_and_std(results, 'test')} ({spt.mean_of(results, 'train'):.2f})"


def benchmark(seed, seeds, jobs, device, json):
    """Make the data, and print a line of the table as soon as it is measured."""
    make_mnist1d()
    make_digits()
    rows = {}    # {name in JSON: configs}
    for title, changes in LINES.items():
        for number, arm in enumerate(arms_of(dict(changes, seed=seed, device=device)), 1):
            rows[f"{title}, column {number}"] = spt.over_seeds(arm, seeds)
    print("| test accuracy (train) | labels, lr 0.001 | lr 0.003 | lr 0.01 | near start | SPT |")
    print("|---|---|---|---|---|---|", flush=True)
    titles = iter(LINES)
    cells = []
    for _, results in spt.run_rows(rows, jobs, json):
        cells.append(cell(results))
        if len(cells) == 5:
            print(f"| {next(titles)} | {' | '.join(cells)} |", flush=True)
            cells = []


if __name__ == "__main__":
    run_command(benchmark, __doc__, "seed", "seeds", "jobs", "device", "json")
