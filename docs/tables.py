"""Renew the measured tables and the line links of README.md and docs/*.md: python docs/tables.py

Links such as [`name`](../file.py#L12) get the line where the function or class stands now.

A block looks like this; the script replaces what stands between the marks, and a test compares:

    <!-- table NAME column column ... -->
    <!-- end -->
    <!-- claims NAME -->
    <!-- end -->
    <!-- piece FILE NAME -->                     one cell: what else of FILE `NAME` needs

NAME.json is the metrics.json of a training run (its rows) or the rows.json of an ablation (mean and standard deviation
over seeds). Columns are scores; `seconds` can be a column of an ablation. `NAME@group` picks the rows of one printed
table of claims.json, such as `Table_VIII`, or another table of metrics.json, such as `per_attribute`.
claims.json holds the ablation tables of the papers as printed, each row beside the name of ours and each column beside
our score; `claims` compares every two rows in every column with our rows of NAME.json. "statements" are comparisons that
a paper makes in words or curves, "not_computed" lists what the toy world cannot tell.
"""
import ast
import functools
import itertools
import json
import re
import statistics
import sys
from pathlib import Path

DOCS = Path(__file__).parent
FILES = [DOCS.parent / "README.md", *sorted(DOCS.glob("*.md"))]
BLOCK = re.compile(r"(<!-- table (\S+) ([^>]*?) ?-->\n).*?(<!-- end -->)", re.S)
CLAIMS = re.compile(r"(<!-- claims (\S+) -->\n).*?(<!-- end -->)", re.S)
LENGTH = re.compile(r"(\[`(\w+\.py)`\]\(\2\) \| )\d+")  # a table's cell after a file: how many lines it has
LINK = re.compile(r"\[`(?!\w+\.py`)([\w.]+)`\]\(((?:\.\./)?)(\w+\.py)(?:#L\d+)?\)")
ROWS = {"lq": "degraded", "posterior_mean": "posterior mean", "restored_faces": "restored",
        "reconstruction": "autoencoder, clean faces", "autoencoder": "autoencoder, clean faces",
        "source": "restored, prompt of the source", "target": "restored, prompt of the target",
        "template": "restored, template prompt", "prior": "painted by the prior alone",
        "edited": "restored with the template, then edited (FlowEdit)"}
DIGITS = {"psnr": 2, "psnr_gain": 2, "ssim": 3, "fid_toy": 3, "deg_toy": 1, "lmd_toy": 2, "ald_e_toy": 2,
          "lpips_toy": 3, "reconstruction_fid_toy": 3, "reconstruction_lpips_toy": 3, "latent_peak": 2,
          "ald_m_toy": 2, "attr_toy": 3, "quality_toy": 2, "reconstruction_psnr": 2, "seconds": 0, "steps": 0,
          "ms_per_face": 0, "generator_calls": 0, "million_parameters": 1,
          "hps_std_toy": 4, "pick_std_toy": 4, "clip_std_toy": 4}
HEADS = {"attribute_accuracy_toy": "asked attribute right", "leakage_toy": "leakage",
         "cross_prompt_identity_toy": "cross-prompt identity", "psnr": "PSNR dB",
         "psnr_gain": "PSNR gain dB", "ssim": "SSIM", "lmd_toy": "lmd_toy px", "ms_per_face": "ms per face",
         "generator_calls": "network calls", "million_parameters": "parameters, M",
         "reconstruction_psnr": "autoencoder PSNR dB", "seconds": "s"}


def number(name: str, values: list, extra: int = 0) -> str:
    """Mean ± sample deviation, with `extra` more digits than a table has."""
    if not values:
        return ""
    digits = DIGITS.get(name, 3) + extra
    spread = f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.{digits}f}{spread}"


def cells(entries: list, columns: list) -> list:
    """One cell per column for the entries (seeds) of an ablation's row."""
    values = {name: [entry["scores"].get(name, entry.get(name)) for entry in entries] for name in columns}
    return [number(name, [v for v in found if v is not None]) for name, found in values.items()]


def table(name: str, columns: list) -> str:
    name, _, group = name.partition("@")
    content = json.loads((DOCS / "results" / f"{name}.json").read_text())
    if group in content and group:  # {column: {row: [score, faces]}}
        first, each = group.replace("_", " "), content[group]
        lines = {f"{row} ({count})": [number(c, each[c].get(row, [])[:1]) for c in columns]
                 for row, (_, count) in each[columns[0]].items()}
    elif "rows" in content:
        first = f"{content['faces']} held-out faces"
        lines = {ROWS.get(row, row): [number(c, [s[c]] if c in s else []) for c in columns]
                 for row, s in content["rows"].items() if s.keys() & set(columns)}
    else:
        rows = {entry["row"]: [] for entry in content.values()}
        if group:
            printed = json.loads((DOCS / "claims.json").read_text())[name]["tables"]
            rows = {row: [] for t in printed if t["where"].replace(" ", "_") == group for _, row, _ in t["rows"]}
        for entry in content.values():
            rows.get(entry["row"], []).append(entry)
        rows = {row: entries for row, entries in rows.items() if entries}
        most = max(map(len, rows.values()))
        first = f"{most} seed(s)"                                  # a row with fewer says so
        lines = {row if len(of_row) == most else f"{row} ({len(of_row)} seed(s))": cells(of_row, columns)
                 for row, of_row in rows.items()}
    head = [first, *(HEADS.get(c, c) for c in columns)]
    text = [head, ["---"] * len(head), *([row, *values] for row, values in lines.items())]
    return "".join(f"| {' | '.join(line)} |\n" for line in text)


def verdict(gains: list) -> str:
    """gains: per seed, positive where the paper is right. Clear if every seed agrees and the mean is two standard
    errors away from zero."""
    if len(gains) < 3:
        return "too few seeds" if gains else "to be measured"
    clear = abs(statistics.mean(gains)) > 2 * statistics.stdev(gains) / len(gains) ** 0.5
    if not clear or min(gains) <= 0 <= max(gains):
        return "not distinguishable"
    return "reproduced" if gains[0] > 0 else "not reproduced"


def comparisons(printed: dict):
    """Yield (where, row that is better in print, other row, column, printed numbers, our score, "lower"/"higher").

    Every two rows of every table, in every column; then what the paper says in words or curves.
    """
    for table in printed["tables"]:
        for (_, first, a), (_, second, b) in itertools.combinations(table["rows"], 2):
            for (head, score, better), x, y in zip(table["columns"], a, b):
                if x is not None and y is not None:
                    swap = x != y and (x > y) != (better == "higher")
                    rows, numbers = (second, first) if swap else (first, second), (y, x) if swap else (x, y)
                    yield table["where"], *rows, head, numbers, score, better
    for where, row, other, score, better, words in printed.get("statements", []):
        yield where, row, other, words, None, score, better


def claims(name: str) -> str:
    """A line per comparison of two printed rows: our difference (mean and deviation over the seeds both have), verdict."""
    printed = json.loads((DOCS / "claims.json").read_text())[name]
    path = DOCS / "results" / f"{name}.json"
    entries = json.loads(path.read_text()).values() if path.exists() else []
    scores = {(e["row"], e["seed"]): e["scores"] for e in entries}
    lines = [["paper", "better in print", "than", "in print", "ours: score", "difference", "seeds", "verdict"], ["---"] * 8]
    for where, row, other, head, numbers, score, better in comparisons(printed):
        seeds = sorted({seed for r, seed in scores if r == row} & {seed for r, seed in scores if r == other})
        both = [(scores[row, s], scores[other, s]) for s in seeds]
        differences = [a[score] - b[score] for a, b in both if score in a and score in b]
        sign = 1 if better == "higher" else -1
        found = "equal in print" if numbers and numbers[0] == numbers[1] else verdict([sign * d for d in differences])
        words = f"{head} {numbers[0]:g} / {numbers[1]:g}" if numbers else head
        lines.append([where, row, other, words, f"{score}, {better} is better", number(score, differences, 1),
                      str(len(differences)), found])
    text = "".join(f"| {' | '.join(line)} |\n" for line in lines)
    if printed.get("not_computed"):
        text += "\nNot computed here: " + "; ".join(f"{what} ({why})" for what, why in printed["not_computed"]) + ".\n"
    return text


@functools.cache
def line_of(file: str, name: str) -> int:
    """Where the function or class `name`, or `Class.method`, begins in a file of the project; KeyError if it does not."""
    lines = {}
    for node in ast.parse((DOCS.parent / file).read_text()).body:
        lines |= {node.name: node.lineno} if hasattr(node, "name") else {}
        if isinstance(node, ast.ClassDef):
            lines |= {f"{node.name}.{inner.name}": inner.lineno for inner in node.body if hasattr(inner, "name")}
    return lines[name]


def piece(file: str, name: str) -> str:
    """What to copy with the function or class `name`: lines in all, and the definitions of the project that it uses."""
    tree, definitions, imported = ast.parse((DOCS.parent / file).read_text()).body, {}, {}
    for node in tree:
        targets = getattr(node, "targets", [])
        names = [node.name] if hasattr(node, "name") else [n.id for t in targets for n in ast.walk(t) if isinstance(n, ast.Name)]
        definitions |= dict.fromkeys(names, node)
        if isinstance(node, ast.ImportFrom) and node.module in ("common", "metrics"):
            imported |= {alias.name: node.module for alias in node.names}
    needed, others, left = {}, set(), [name]
    while left:
        here = left.pop()
        needed[here] = definitions[here]
        for node in ast.walk(needed[here]):
            word = getattr(node, "id", "")
            left += [word] * (word in definitions and word not in needed and word not in left)
            others |= {f"{imported[word]}.{word}"} if word in imported else set()
            if isinstance(node, ast.Attribute) and getattr(node.value, "id", "") == "metrics":
                others.add(f"metrics.{node.attr}")
    lines = sum(node.end_lineno - node.lineno + 1 for node in needed.values())
    words = ", ".join(f"`{word}`" for word in [*list(needed)[1:], *sorted(others)])
    return f" {lines} | {words or 'nothing'} "


def filled(text: str) -> str:
    """The text with every table, every line link and every length of a file renewed."""
    text = LINK.sub(lambda m: f"[`{m[1]}`]({m[2]}{m[3]}#L{line_of(m[3], m[1])})", text)
    text = re.sub(r"(<!-- piece (\S+) (\S+) -->).*", lambda m: m[1] + piece(m[2], m[3]) + "|", text)
    text = CLAIMS.sub(lambda m: m[1] + claims(m[2]) + m[3], text)
    text = LENGTH.sub(lambda m: m[1] + str(len((DOCS.parent / m[2]).read_text().splitlines())), text)
    return BLOCK.sub(lambda m: m[1] + table(m[2], m[3].split()) + m[4], text)


if __name__ == "__main__":
    for path in FILES:
        before = path.read_text()
        if filled(before) != before:
            path.write_text(filled(before))
            print(f"renewed {path}", file=sys.stderr)
