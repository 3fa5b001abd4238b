"""The four methods on the same degraded toy faces, one picture and one table: python docs/side_by_side.py --train

Each method's own command line does the work: `train` into RUNS/METHOD (all four on one degradation; finished runs are
kept), then `sample` on a folder of held-out faces. HonestFace also gets four photographs of each person, A2BFR its
template prompt, Pref-Restore no caption. Writes docs/side_by_side.png and docs/results/side_by_side.json; the tables
in the pages are renewed by docs/tables.py.
"""
import argparse
import json
import shutil
import subprocess
import sys
import time
from pathlib import Path

import torch

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))
import a2bfr  # noqa: E402
import common  # noqa: E402
import honestface  # noqa: E402
import latent_pmrf  # noqa: E402
import metrics  # noqa: E402
import pref_restore  # noqa: E402

METHODS = {"latent_pmrf": latent_pmrf, "honestface": honestface, "a2bfr": a2bfr, "pref_restore": pref_restore}
TITLES = {"latent_pmrf": "Latent-PMRF", "honestface": "HonestFace", "a2bfr": "A2BFR", "pref_restore": "Pref-Restore"}
SIZE, REFERENCES = 64, 4


def generator_calls(method: str, cfg: dict) -> int:
    """Forward passes of the network that paints, for one face (Pref-Restore's language model is not counted)."""
    if method == "honestface":
        return 1
    if method == "a2bfr":
        return cfg["num_inference_steps"] * (1 + (cfg["true_cfg_scale"] != 1) + (cfg["image_guidance_scale"] != 1))
    return cfg["num_inference_steps"] * (1 if cfg.get("guidance_scale", 1) == 1 else 2) + (method == "latent_pmrf")


def write_faces(folder: Path, count: int, degradation: str) -> dict:
    """Held-out faces as files: hq/ and lq/000.png ..., one/000.png, people/000/0.png ... -> {hq, lq} (count, 3, S, S)."""
    faces = common.Faces("", SIZE, "")
    batch = faces.held_out(count)
    lq = common.degrade(batch["hq"], common.DEGRADATIONS[degradation], batch["seeds"])
    references, _ = honestface.draw_references(faces, {}, batch, REFERENCES)
    shutil.rmtree(folder, ignore_errors=True)                      # a smaller count must not leave faces behind
    for i in range(count):
        common.write_image(folder / "hq" / f"{i:03d}.png", batch["hq"][i])
        common.write_image(folder / "lq" / f"{i:03d}.png", lq[i])
        for j in range(REFERENCES):
            common.write_image(folder / "people" / f"{i:03d}" / f"{j}.png", references[i, j])
    common.write_image(folder / "one" / "000.png", lq[0])
    return dict(hq=read_faces(folder / "hq", count), lq=lq)         # 8 bits, like all that is compared with them


def sample(method: str, run: Path, folder: Path, which: str) -> float:
    """`METHOD.py sample` on folder/which into folder/METHOD_which; returns the seconds it took."""
    argv = ["sample", "-i", str(folder / which), "-o", str(folder / f"{method}_{which}"), "--checkpoint", str(run),
            "--batch_size", "32"] + (["--reference", str(folder / "people")] if method == "honestface" else [])
    started = time.perf_counter()
    common.command_line(METHODS[method].__doc__, METHODS[method].VERBS, argv)
    return time.perf_counter() - started


def read_faces(folder: Path, count: int):
    return torch.stack([common.read_image(folder / f"{i:03d}.png") for i in range(count)])


def scores(restored, found: dict, reader) -> dict:
    with torch.no_grad():                                          # halved: as the reward of Pref-Restore is
        distance = torch.cat([metrics.reader_lpips(reader, x, y) / 2
                              for x, y in zip(restored.split(64), found["hq"].split(64))])
    return metrics.toy_scores(restored, found["hq"], reader, found["lq"]) | {"lpips_toy": distance.mean().item()}


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--train", action="store_true", help="train what RUNS lacks, one method after another")
    parser.add_argument("--runs", type=Path, default=Path("runs/side_by_side"), help="folder of the four runs")
    parser.add_argument("--faces", type=int, default=128, help="held-out faces to restore")
    parser.add_argument("--degradation", default="noisy", choices=list(common.DEGRADATIONS), help="of all four")
    parser.add_argument("-o", "--output", type=Path, default=ROOT / "docs", help="folder for picture and results/")
    parser.add_argument("--flags", nargs=argparse.REMAINDER, default=[], help="what follows goes to every `train`")
    args = parser.parse_args(argv)
    if args.faces < 2:
        parser.error(f"--faces {args.faces}: give at least 2, fid_toy is a distance of sets")
    for method in METHODS if args.train else ():
        if not (args.runs / method / "metrics.json").exists():
            command = [sys.executable, str(ROOT / f"{method}.py"), "train", "--degradation", args.degradation,
                       "-o", str(args.runs / method), *args.flags]
            print(" ".join(command), flush=True)
            subprocess.run(command, check=True)
    absent = [m for m in METHODS if not (args.runs / m / "metrics.json").exists()]
    if absent:
        parser.error(f"{args.runs / absent[0]}: no finished training run; add --train, or train with -o there")

    folder, reader = args.runs / "side_by_side_faces", metrics.load_reader("b")
    found = write_faces(folder, args.faces, args.degradation)
    half = torch.nn.functional.interpolate(found["lq"], scale_factor=0.5, mode="area")
    bicubic = torch.nn.functional.interpolate(half, scale_factor=2, mode="bicubic").clamp(-1, 1)
    pictures = {"degraded": found["lq"], "bicubic of 32 px": bicubic}
    rows = {name: scores(images, found, reader) for name, images in pictures.items()}
    for method, title in TITLES.items():
        _, alone, all_of_them = [sample(method, args.runs / method, folder, which) for which in ("one", "one", "lq")]
        report = json.loads((args.runs / method / "metrics.json").read_text())
        config = json.loads((args.runs / method / "config.json").read_text())["train"]
        if config["degradation"] != args.degradation:
            print(f"{title} was trained on {config['degradation']}, not on {args.degradation}", file=sys.stderr)
        if method == "latent_pmrf":
            pictures["posterior mean"] = read_faces(folder / f"{method}_lq" / "posterior_mean", args.faces)
            rows["posterior mean"] = scores(pictures["posterior mean"], found, reader) | dict(
                generator_calls=1, million_parameters=report["parameters"]["mmse"] / 1e6)
        pictures[title] = read_faces(folder / f"{method}_lq" / "restored_faces", args.faces)
        rows[title] = scores(pictures[title], found, reader) | dict(
            ms_per_face=1000 * (all_of_them - alone) / max(1, args.faces - 1),
            generator_calls=generator_calls(method, config),
            million_parameters=sum(report["parameters"].values()) / 1e6)
    protocol = metrics.toy_protocol("", args.degradation, args.faces) | dict(
        lpips_toy="LPIPS' form on features of FaceReader weights/reader_b.safetensors",
        ms_per_face="time of `sample` on all faces minus its time on one, files included, batch 32")
    common.write_json(args.output / "results" / "side_by_side.json", dict(
        rows=rows, faces=args.faces, argv=sys.argv, protocol=protocol, **common.versions("cpu")))
    common.write_grid(args.output / "side_by_side.png", pictures | {"truth": found["hq"]}, rows=6, cell=112)
    common.print_table(rows)


if __name__ == "__main__":
    main()
