"""The fidelity check on the test series of a benchmark: which share of the slices passes, model by model.

harmonict benchmark configs/kentucky.toml --out runs/kentucky
python examples/fidelity_of_models.py configs/kentucky.toml runs/kentucky/trial/cohort.csv \
    runs/kentucky/models/choe runs/kentucky/models/bridge

Prints a Markdown table: slices that pass, warn and fail. `target` is the true target image of the same patient, checked
as if a model had made it: below 100 % where dose or slice thickness differ, for there it holds other noise.
"""

from __future__ import annotations

import argparse
from collections import Counter
from pathlib import Path

from harmonict.evaluate.benchmark import harmonized, test_cases
from harmonict.evaluate.benchmark_plan import load_plan
from harmonict.fidelity import check_fidelity
from harmonict.methods import load_model

SETS = ("kernel", "iterative", "dose or thickness")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("plan", type=Path)
    parser.add_argument("cohort", type=Path)
    parser.add_argument("models", type=Path, nargs="+")
    chosen = parser.parse_args()
    models = {folder.name: load_model(folder) for folder in chosen.models}
    found: dict[tuple[str, str], Counter[str]] = {}
    for files in test_cases(load_plan(chosen.plan), chosen.cohort):
        case = files.read()
        for name in ("target", *models):
            result = case.target if name == "target" else harmonized(models[name], case.source)
            verdicts = check_fidelity(case.source, result).verdict
            found.setdefault((name, case.differs), Counter()).update(verdicts)
    print("| slices: pass / warn / fail | " + " | ".join((*SETS, "all: pass")) + " |")
    print("|---" * (len(SETS) + 2) + "|")
    for name in ("target", *models):
        counts = [found.get((name, one), Counter()) for one in SETS]
        cells = [" / ".join(str(c[word]) for word in ("pass", "warn", "fail")) for c in counts]
        total = sum(counts, Counter())
        print(f"| {name} | {' | '.join(cells)} | {100 * total['pass'] / max(total.total(), 1):.1f} % |")


if __name__ == "__main__":
    main()
