"""The evidence beside spt.py. Each file is a command: `python -m experiments.claims`, and so on."""
import argparse
import sys

import spt


def verdict(statement, holds):
    """Print a statement and whether it holds; returns whether it does."""
    print(f"  {'holds' if holds else 'FAILS'}: {statement}")
    return bool(holds)


# The flags that commands here may take: what they are, their default, and what they mean.
FLAGS = {
    "seed": (int, 0, "first seed"),
    "seeds": (spt.positive, 3, "number of seeds, from --seed up"),
    "jobs": (spt.positive, None, "processes, at most; by default one for each core, 1 on a GPU"),
    "device": (str, "cpu", "where the tensors live"),
    "json": (str, None, "file to append results to, one JSON object a line"),
}


def run_command(measure, doc, *names):
    """Call `measure` with the flags of these names, and end with its exit status.

    That is 1 where `measure` returns False. Bad input ends with status 2 before it is called.
    """
    parser = argparse.ArgumentParser(description=doc.split("\n\n")[0])
    for name in names:
        kind, default, help = FLAGS[name]
        parser.add_argument("--" + name, type=kind, default=default,
                            help=f"{help} (default {default})" if default is not None else help)
    given = vars(parser.parse_args())
    try:
        config = spt.Config(seed=given.get("seed", 0), device=given.get("device", "cpu"))
        # The theory takes three seeds from --seed up, whatever --seeds says.
        n_checked = max(3, given.get("seeds", 3))
        spt.check(config, n_checked, {"--json": given.get("json")})
    except (ValueError, OSError) as error:
        parser.error(str(error))
    if given.get("jobs", 1) is None:
        given["jobs"] = spt.default_jobs(config.device)
    sys.stdout.reconfigure(errors="replace")
    sys.exit(spt.exit_status(lambda: measure(**given)))
