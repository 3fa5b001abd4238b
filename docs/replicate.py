"""Rerun the papers' ablation tables at toy size: python docs/replicate.py METHOD [--rows ROW ...] [--seeds 3]

A row of rows.json is `METHOD.py train` with other settings, in a folder of its own; it is done when its metrics.json is
there, so a stopped command goes on where it was. "{base}" in a setting is the folder of the method's first row of the same
seed: rows share the parts that they do not change. A row {"of": "other row"} trains nothing: preference_tables.py restores in
another way with the other row's network. Numbers go into results/METHOD_ablation.json, and `python docs/tables.py` prints them
into the pages.
"""
import argparse
import json
import re
import subprocess
import sys
from pathlib import Path

DOCS = Path(__file__).parent


def flags_of(settings: dict, base: Path) -> list:
    """{"vae_style": "sd", "source_sample": false} -> ["--vae_style", "sd", "--no-source_sample"]."""
    words = []
    for name, value in settings.items():
        if isinstance(value, bool):
            words.append(f"--{name}" if value else f"--no-{name}")
        else:
            values = value if isinstance(value, list) else [value]
            words += [f"--{name}", *[str(v).replace("{base}", str(base)) for v in values]]
    return words


def scores_of(numbers: dict) -> dict:
    """The scores of a metrics.json, flat: those of its main row by name, of other rows as row_score, and plain numbers."""
    rows = numbers["rows"]
    main = numbers.get("main", "restored_faces" if "restored_faces" in rows else list(rows)[-1])
    flat = {f"{row}_{name}": value for row, scores in rows.items() if row != main for name, value in scores.items()}
    return flat | {k: v for k, v in numbers.items() if isinstance(v, (int, float))} | rows[main]


def main(argv=None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    table = json.loads((DOCS / "rows.json").read_text())
    parser.add_argument("method", choices=list(table))
    parser.add_argument("--rows", nargs="+", help="only these rows (default: all)")
    parser.add_argument("--seeds", type=int, default=3, help="repetitions with seeds 0, 1, ...")
    parser.add_argument("-o", "--output", default="runs/replicate")
    parser.add_argument("--results", default=str(DOCS / "results"), help="folder of METHOD_ablation.json")
    parser.add_argument("--flags", nargs=argparse.REMAINDER, default=[], help="what follows goes to every `train`")
    given = parser.parse_args(argv)
    common, rows = table[given.method]["every row"], table[given.method]["rows"]
    if unknown := [row for row in given.rows or [] if row not in rows]:
        parser.error(f"no row {unknown[0]!r}; there are: {', '.join(rows)}")
    path = Path(given.results) / f"{given.method}_ablation.json"

    def folder(row, seed):
        first = next(name for name in rows if rows[name] == rows[row])          # rows of the same settings are one training
        return Path(given.output) / given.method / f"{re.sub(r'[^a-z0-9]+', '_', first.lower()).strip('_')}_{seed}"

    for seed in range(given.seeds):
        base = folder(next(iter(rows)), seed)
        for row in given.rows or rows:
            of = rows[row].get("of")
            place = folder(of or row, seed)
            if of:
                result, command = place / "tables.json", ["docs/preference_tables.py", str(place), "-o", str(place / "tables.json")]
            else:
                result, command = place / "metrics.json", [f"{given.method}.py", "train", "-o", str(place), "--seed", str(seed),
                                                           *flags_of(common | rows[row], base), *given.flags]
            if not result.exists():
                print(f"--- {row}, seed {seed}: python {' '.join(command)}", flush=True)
                again = ["--resume_from_checkpoint", "latest"] if (place / "config.json").exists() and not of else []
                if subprocess.run([sys.executable, *command, *again], cwd=DOCS.parent).returncode:
                    sys.exit(f"{row}, seed {seed}: stopped; the same command goes on")
            numbers = json.loads((place / "metrics.json").read_text())
            scores = json.loads(result.read_text())[row] if of else scores_of(numbers)
            done = json.loads(path.read_text()) if path.exists() else {}
            done[f"{row}, seed {seed}"] = dict(row=row, seed=seed, command=command, scores=scores, **{
                name: numbers[name] for name in ("seconds", "torch", "python", "device", "commit")})
            path.parent.mkdir(exist_ok=True)
            path.write_text(json.dumps(done, indent=1) + "\n")


if __name__ == "__main__":
    main()
