"""Restore the same degraded toy faces by all four methods: python docs/side_by_side.py [--weights toy/weights] [--faces 256]

Takes the trained methods in WEIGHTS/METHOD, restores faces of people whom no network saw (data/toy/test) with `sample`, and writes
side_by_side.png and results/side_by_side.json beside this file; `python docs/tables.py` prints the table into the README. Its
first eight faces are docs/toy_lq, other photographs of these people docs/toy_people, the truth docs/toy_hq.
"""
import argparse
import shutil
import subprocess
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))
from common import TOY, Faces, list_images, open_faces, read_image, versions, write_grid, write_image, write_json

import torch

import honestface
import metrics

ROOT = Path(__file__).parent.parent
METHODS = {"latent_pmrf": "Latent-PMRF", "honestface": "HonestFace", "a2bfr": "A2BFR", "pref_restore": "Pref-Restore"}


def write_inputs(folder: Path, count: int):
    """toy_lq/NN.png, toy_hq/NN.png and toy_people/NN/K.png of `count` people of the test set -> the batch."""
    open_faces(argparse.Namespace(data="", validation_data="", image_size=64, degradation=TOY["degradation"]))  # draws data/toy
    faces = Faces("data/toy/test", 64, TOY["degradation"])
    batch = faces.held_out(count)
    album, present = honestface.other_photographs(faces, batch, honestface.MAX_REFERENCES)
    for i in range(len(batch["hq"])):
        write_image(folder / "toy_lq" / f"{i:03d}.png", batch["lq"][i])
        write_image(folder / "toy_hq" / f"{i:03d}.png", batch["hq"][i])
        for k in present[i].nonzero().flatten().tolist():
            write_image(folder / "toy_people" / f"{i:03d}" / f"{k}.png", album[i, k])
    return batch, album


def main(argv=None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--weights", default="toy/weights", help="folder of the trained methods")
    parser.add_argument("--faces", type=int, default=256)
    parser.add_argument("--work", default="runs/side_by_side", help="folder of inputs and restored faces")
    parser.add_argument("-o", "--output", default=str(Path(__file__).parent), help="folder of side_by_side.png and results/")
    given = parser.parse_args(argv)
    out, work, reader = Path(given.output), Path(given.work), metrics.load_reader("b")
    shutil.rmtree(work, ignore_errors=True)
    batch, album = write_inputs(work, given.faces)
    rows, columns = {"degraded": metrics.toy_scores(batch["lq"], batch["hq"], reader)}, {"degraded": batch["lq"]}
    for method, title in METHODS.items():
        if not (Path(given.weights) / method / "config.json").exists():
            print(f"{method}: no weights in {given.weights}", flush=True)
            continue
        command = [f"{method}.py", "sample", "-i", str(work / "toy_lq"), "-o", str(work / method),
                   "--checkpoint", f"{given.weights}/{method}"]
        command += ["--reference", str(work / "toy_people")] if method == "honestface" else []
        begun = time.time()
        subprocess.run([sys.executable, *command], cwd=ROOT, check=True)
        columns[title] = torch.stack([read_image(path) for path in list_images(work / method / "restored_faces")])
        rows[title] = metrics.toy_scores(columns[title], batch["hq"], reader) | {"seconds": time.time() - begun}
        if method == "latent_pmrf":
            columns["posterior mean"] = torch.stack([read_image(p) for p in list_images(work / method / "posterior_mean")])
            rows["posterior mean"] = metrics.toy_scores(columns["posterior mean"], batch["hq"], reader)
    order = [name for name in ("degraded", "posterior mean", *METHODS.values()) if name in columns]
    grid = {name: columns[name] for name in order} | {"truth": batch["hq"], "reference": album[:, 0]}
    write_grid(out / "side_by_side.png", grid, cell=112)
    write_json(out / "results" / "side_by_side.json", dict(
        rows={name: rows[name] for name in order}, faces=len(batch["hq"]), degradation=TOY["degradation"], argv=sys.argv,
        **versions(torch.device("cpu"))))
    write_inputs(out, 8)


if __name__ == "__main__":
    main()
