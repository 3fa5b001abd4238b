"""Restore the same degraded toy faces by all four methods: python docs/side_by_side.py [--runs runs] [--faces 128]

Takes the trained methods in RUNS/METHOD, restores faces of people whom no network saw (data/toy/test) with `sample`, and writes
side_by_side.png and results/side_by_side.json beside this file; `python docs/tables.py` prints the table into the README.
"""
import argparse
import shutil
import subprocess
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))
from common import Faces, list_images, open_faces, read_image, versions, write_grid, write_image, write_json

import torch

import metrics

ROOT = Path(__file__).parent.parent
METHODS = {"latent_pmrf": "Latent-PMRF", "honestface": "HonestFace", "a2bfr": "A2BFR", "pref_restore": "Pref-Restore"}


def main(argv=None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", default="runs", help="folder of the trained methods")
    parser.add_argument("--faces", type=int, default=128)
    parser.add_argument("--degradation", default="codeformer")
    parser.add_argument("-o", "--output", default=str(Path(__file__).parent), help="folder of side_by_side.png and results/")
    given = parser.parse_args(argv)
    out, work = Path(given.output), Path(given.runs) / "side_by_side"
    open_faces(argparse.Namespace(data="", validation_data="", image_size=64, degradation=given.degradation))  # draws data/toy
    faces = Faces("data/toy/test", 64, given.degradation)
    batch = faces.held_out(given.faces)
    shutil.rmtree(work, ignore_errors=True)
    for i, place in enumerate(batch["place"].tolist()):
        name = faces.files[place].parent.name
        write_image(work / "lq" / f"{name}.png", batch["lq"][i])
        for path in list_images(faces.files[place].parent):
            if path != faces.files[place]:                         # other pictures of the person, for HonestFace
                (work / "people" / name).mkdir(parents=True, exist_ok=True)
                shutil.copy(path, work / "people" / name)
    reader, rows = metrics.load_reader("b"), {"degraded": metrics.toy_scores(batch["lq"], batch["hq"], metrics.load_reader("b"))}
    columns = {"degraded": batch["lq"]}
    for method, title in METHODS.items():
        command = [f"{method}.py", "sample", "-i", str(work / "lq"), "-o", str(work / method), "--checkpoint", f"{given.runs}/{method}"]
        command += ["--reference", str(work / "people")] if method == "honestface" else []
        begun = time.time()
        subprocess.run([sys.executable, *command], cwd=ROOT, check=True)
        columns[title] = torch.stack([read_image(path) for path in list_images(work / method / "restored_faces")])
        rows[title] = metrics.toy_scores(columns[title], batch["hq"], reader) | {"seconds": time.time() - begun}
        if method == "latent_pmrf":
            columns["posterior mean"] = torch.stack([read_image(p) for p in list_images(work / method / "posterior_mean")])
            rows["posterior mean"] = metrics.toy_scores(columns["posterior mean"], batch["hq"], reader)
    order = ["degraded", "posterior mean", *METHODS.values()]
    write_grid(out / "side_by_side.png", {name: columns[name] for name in order} | {"truth": batch["hq"]}, cell=112)
    write_json(out / "results" / "side_by_side.json", dict(
        rows={name: rows[name] for name in order}, faces=len(batch["hq"]), degradation=given.degradation, argv=sys.argv,
        **versions(torch.device("cpu"))))


if __name__ == "__main__":
    main()
