"""Every claim of this project as data, measured and judged by one command:

    python -m experiments.claims

The claims follow the abstract of arXiv 2605.21070, whose tasks and set-up are not known here. A
row holds what differs from its task's recipe, and the interval in which its mean test accuracy
must lie. Where labels must fail they run at all three rates of the comparison, and the best mean
counts. Where they must succeed they run at one rate. SPT always runs at the default rates, also
where it must fail. Exit status 1 says that a claim does not hold.

Three seeds take about 8 minutes on two cores.
"""
from typing import NamedTuple

import spt
from experiments import run_command
from experiments.theory import theory


class Row(NamedTuple):
    """One line of a claim: mean test accuracy lies in [low, high] at the best of `rates`."""
    name: str
    changes: dict
    low: float = 0.0
    high: float = 1.0
    rates: tuple = (None,)    # None: the rate of the recipe, or of `changes`


def labels_fail(at_most, name="labels", **changes):
    """Labels alone, at the best of three rates, stay below a bound."""
    return Row(name, changes, high=at_most, rates=spt.LABEL_RATES)


def gap(labels_at_most, spt_at_least, **changes):
    """Labels alone fail and SPT succeeds, with the same changes."""
    return [labels_fail(labels_at_most, **changes),
            Row("SPT", dict(spt=True, **changes), low=spt_at_least)]


# Labels also have to train what is not copied, so they get 100 steps more.
MOVED = dict(spt=True, finetune_steps=300)
SHORT = dict(spt=True, seq_len=128, pretrain_steps=150)

CLAIMS = {
    "1 SPT beats labels alone, at equal steps": gap(0.70, 0.95),
    "1a the same on English: forwards or backwards?": gap(0.70, 0.95, task="text"),
    "1b the same on sequences of 128 tokens": gap(0.70, 0.95, seq_len=128),
    "1c a smaller gap in two dimensions (texture)": gap(0.90, 0.95, task="texture"),
    "1d a smaller gap with learned positions, 400 + 400 steps":
        gap(0.75, 0.80, positions="learned", finetune_steps=400),
    "2 depth is not the bottleneck: 2 layers": gap(0.70, 0.95, n_layers=2),
    "2a the same with 4 layers": gap(0.70, 0.95, n_layers=4),
    # 600 steps of 32 draw 19,200 times from these. About 16,000 are drawn once or more.
    "3 labels fail on 16,000 different sequences, too": [labels_fail(0.70, n_train=50_000)],
    "4 the query and key maps carry what SPT learns": [
        Row("only these copied", dict(transfer="qk", **MOVED), low=0.90),
        Row("all but these copied", dict(transfer="rest", **MOVED), high=0.60),
        Row("SPT, these frozen", dict(spt=True, freeze_qk=True), high=0.60)],
    "5 on this task looking near is enough, without pretraining": [
        Row("labels, near start", dict(start="near", lr=0.01), low=0.95),
        labels_fail(0.60, "positions shuffled", start="near", positions="shuffled")],
    "5a offsets given by rotary positions are enough": [
        Row("labels, rotary", dict(positions="rotary", lr=0.01), low=0.95)],
    "6 the near start also shortens SPT's plateau: 128 tokens, 150 steps": [
        Row("SPT", SHORT, high=0.60),
        Row("SPT, near start", dict(start="near", **SHORT), low=0.85)],
    "7 more targets help labels, and few targets stop SPT": [
        Row("labels, 6,000 steps", dict(finetune_steps=5600, lr=0.003), low=0.80),
        Row("labels, batches of 128", dict(batch_size=128, lr=0.01), low=0.60),
        Row("SPT, 1 token in 64 masked", dict(spt=True, mask_ratio=1 / 64), high=0.60)],
    "8 control: no gap where counting is enough (bag)": [
        Row("labels", dict(task="bag"), low=0.90),
        Row("SPT", dict(task="bag", spt=True), low=0.90)],
}


def configs_of(row, seed, seeds, device):
    """The configs of a row: for each of its rates, one for each seed."""
    configs = []
    for rate in row.rates:
        changes = dict(seed=seed, device=device, **row.changes)
        if rate is not None:
            changes["lr"] = rate
        configs.extend(spt.over_seeds(spt.recipe(**changes), seeds))
    return configs


def judge(row, results, seeds):
    """Print the row at its best rate, and whether it is in its interval; returns whether it is."""
    by_rate = [results[i:i + seeds] for i in range(0, len(results), seeds)]
    best = max(by_rate, key=lambda of_rate: spt.mean_of(of_rate, "test"))
    holds = row.low <= spt.mean_of(best, "test") <= row.high
    bound = f"at least {row.low:.2f}" if row.low > 0 else f"at most {row.high:.2f}"
    print(f"  {row.name:26}{best[0]['config']['lr']:<7g}{spt.mean_and_std(best, 'train'):14}"
          f"{spt.mean_and_std(best, 'test'):14}{'' if holds else 'NOT '}{bound}", flush=True)
    return holds


def claims(seed, seeds, jobs, device, json):
    """Measure and print every claim. Returns whether all hold."""
    rows = {}       # {name in JSON: (title, row)}
    configs = {}    # {name in JSON: its configs}
    for title, of_claim in CLAIMS.items():
        for row in of_claim:
            name = f"{title}: {row.name}"
            rows[name] = (title, row)
            configs[name] = configs_of(row, seed, seeds, device)
    print(f"mean ± standard deviation over {seeds} seeds, from {seed} up\n"
          f"  {'':26}{'lr':7}{'train':14}{'test':14}test must be", flush=True)
    failing = []
    for name, results in spt.run_rows(configs, jobs, json):
        title, row = rows[name]
        if row is CLAIMS[title][0]:
            print(title)
        if not judge(row, results, seeds):
            failing.append(f"{title}: {row.name}")
    print(f"9 why the hint is faint (python -m experiments.theory --seed {seed})")
    if not theory(seed, jobs, device, json):
        failing.append("9 why the hint is faint")
    print()
    for name in failing:
        print(f"FAILS: {name}")
    if not failing:
        print("All claims hold.")
    return not failing


if __name__ == "__main__":
    run_command(claims, __doc__, "seed", "seeds", "jobs", "device", "json")
