"""Write the measured tables of README.md and docs/*.md from docs/results/*.json: python docs/tables.py

A block looks like this; the script replaces what stands between the marks, and a test compares:

    <!-- table NAME column column ... -->
    <!-- end -->

NAME.json is the metrics.json of a training run (its rows) or the rows.json of an ablation (mean and standard deviation
over seeds). Columns are scores; `seconds`, `steps` and `paper` can be columns of an ablation. `NAME@group` picks one
group of an ablation's rows, beside the unchanged method, or another table of metrics.json, such as `per_attribute`.
"""
import json
import re
import statistics
import sys
from pathlib import Path

DOCS = Path(__file__).parent
FILES = [DOCS.parent / "README.md", *sorted(DOCS.glob("*.md"))]
BLOCK = re.compile(r"(<!-- table (\S+) ([^>]*?) ?-->\n).*?(<!-- end -->)", re.S)
ROWS = {"lq": "degraded", "posterior_mean": "posterior mean", "restored_faces": "restored",
        "reconstruction": "autoencoder, clean faces", "autoencoder": "autoencoder, clean faces",
        "source": "restored, prompt of the source", "target": "restored, prompt of the target",
        "template": "restored, template prompt", "prior": "painted by the prior alone",
        "edited": "restored with the template, then edited (FlowEdit)"}
DIGITS = {"psnr": 2, "psnr_gain": 2, "source_psnr_gain": 2, "ssim": 3, "fid_toy": 2, "deg_toy": 1, "lmd_toy": 2, "ald_e_toy": 2,
          "ald_m_toy": 2, "attr_toy": 3, "quality_toy": 2, "reconstruction_psnr": 2, "seconds": 0, "steps": 0,
          "hps_std_toy": 4, "pick_std_toy": 4, "clip_std_toy": 4}
HEADS = {"attribute_accuracy_toy": "asked attribute right", "unguided_accuracy_toy": "without text guidance",
         "source_psnr_gain": "PSNR gain dB", "template_attr_toy": "attr_toy, template", "leakage_toy": "leakage",
         "cross_prompt_identity_toy": "cross-prompt identity", "identity_toy": "identity", "psnr": "PSNR dB", "psnr_gain": "PSNR gain dB", "ssim": "SSIM", "lmd_toy": "lmd_toy px",
         "reconstruction_psnr": "autoencoder PSNR dB", "seconds": "s"}


def number(name: str, values: list) -> str:
    if not values:
        return ""
    digits = DIGITS.get(name, 3)
    spread = f" ± {statistics.pstdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.{digits}f}{spread}"


def cells(entries: list, columns: list) -> list:
    """One cell per column for the entries (seeds) of an ablation's row."""
    found = []
    for name in columns:
        values = [entry["scores"].get(name, entry.get(name)) for entry in entries]
        found.append(values[0] if name == "paper" else number(name, [v for v in values if v is not None]))
    return found


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
        entries = [e for e in content.values() if group in ("", e["table"]) or not e["table"]]
        first = f"{len({e['seed'] for e in entries})} seed(s)"
        rows = dict.fromkeys(e["row"] for e in entries)
        lines = {row: cells([e for e in entries if e["row"] == row], columns) for row in rows}
    head = [first, *(HEADS.get(c, c) for c in columns)]
    text = [head, ["---"] * len(head), *([row, *values] for row, values in lines.items())]
    return "".join(f"| {' | '.join(line)} |\n" for line in text)


def filled(text: str) -> str:
    """The text with every block renewed."""
    return BLOCK.sub(lambda m: m[1] + table(m[2], m[3].split()) + m[4], text)


if __name__ == "__main__":
    for path in FILES:
        before = path.read_text()
        if filled(before) != before:
            path.write_text(filled(before))
            print(f"renewed {path}", file=sys.stderr)
