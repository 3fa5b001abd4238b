"""Rows of Pref-Restore's Tables VII and X, which restore with one trained network in several ways.

    python docs/preference_tables.py runs/pref_restore -o docs/results/pref_restore_tables.json

The rows are named as in claims.json. Table VII: captions at inference, with the network of stage 1. Table X: standard
deviations over seeds (_std_toy), with the networks of stage 1 and 2; tokens are the likeliest ones, or drawn anew with every
seed. Beside them the means over seeds: the scores, and contrast and saturation as shares of the truth's.
"""
import argparse
import json
import sys
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))
from common import Run, mix, open_faces, verbalise, write_json

import torch

import metrics
import pref_restore as pr


def contrast(x):
    """(B, 3, S, S) -> mean standard deviation of the grey pictures."""
    return x.mean(1).flatten(1).std(1).mean().item()


def saturation(x):
    """(B, 3, S, S) -> mean of the largest minus the smallest of R, G, B."""
    return (x.amax(1) - x.amin(1)).mean().item()


@torch.no_grad()
def table_rows(folder, guidance=None, faces: int = 128, seeds: int = 8, seed_faces: int = 32, device: str = "cpu") -> dict:
    """{row: {score: number}} of a run's folder; faces of Table VII, seeds and faces of Table X. guidance: None is the run's."""
    run = Run(pr.Sample(input="", device=device))
    model, vocab, done, cfg = pr.load_networks(str(folder))
    cfg = replace(cfg, guidance_scale=cfg.guidance_scale if guidance is None else guidance)
    model = model.to(run.device).eval().requires_grad_(False)
    batch, reader = open_faces(cfg)[1].held_out(faces), metrics.load_reader("b", cfg.readers).to(run.device)
    greedy, lq, rows = replace(cfg, ar="greedy"), batch["lq"], {}
    told = dict(no=[""] * len(lq), true=batch["captions"],         # read: from the degraded face, by another reader
                read=[verbalise(s) for s in metrics.load_reader("a", cfg.readers).probabilities(lq)],
                contradictory=[verbalise(1 - a) for a in batch["attributes"]])
    with pr.acting(model.sana, "base"):                            # stage 1, also of a run that has stage 2
        for kind, captions in told.items():
            restored = pr.restore_held_out(greedy, run, model, vocab, lq, captions, cfg.seed)
            rows[f"caption, {kind} text"] = metrics.toy_scores(restored, batch["hq"], reader) | pr.reward_numbers(
                cfg, restored.to(run.device), {**batch, "hq": batch["hq"].to(run.device)}, reader)

    few = {name: values[:seed_faces] for name, values in batch.items()}
    hq = few["hq"].to(run.device)
    for stage in ("1", "2") if "2" in done else ():                # Table X compares the two
        for name, chosen in ((f"seeds, stage {stage}", greedy), (f"seeds and words, stage {stage}", replace(cfg, ar="sample"))):
            found, means = {}, []
            for seed in range(seeds):
                with pr.acting(model.sana, "base" if stage == "1" else "current"):
                    images = pr.restore_held_out(chosen, run, model, vocab, few["lq"], [""] * len(hq), mix("seeds", cfg.seed, seed))
                images = images.to(run.device)
                means.append(metrics.toy_scores(images, hq, reader) | pr.reward_numbers(cfg, images, {**few, "hq": hq}, reader)
                             | dict(contrast=contrast(images) / contrast(hq), saturation=saturation(images) / saturation(hq)))
                scores = pr.score(pr.toy_rewards(reader), images, hq, few["captions"])
                scores = {name: scores[name] for name in ("hps", "pick", "clip")}
                scores["lmd"] = metrics.landmark_distance(reader.landmarks(images), reader.landmarks(hq))
                scores["deg"] = metrics.identity_angle(reader.embed(images), reader.embed(hq))
                for score, values in scores.items():
                    found.setdefault(f"{score}_std_toy", []).append(values)
            # Per face over its seeds, then the mean over faces. UNSTATED: the number of seeds
            rows[name] = {score: torch.stack(values).std(0).mean().item() for score, values in found.items()}
            rows[name] |= {score: sum(row[score] for row in means) / seeds for score in means[0]}
    return rows


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run")
    parser.add_argument("-o", "--output", default="docs/results/pref_restore_tables.json")
    parser.add_argument("--guidance_scale", type=float, help="default: that of the run")
    parser.add_argument("--device", default="cpu")
    given = parser.parse_args()
    rows = table_rows(given.run, given.guidance_scale, device=given.device)
    write_json(given.output, rows)
    print(json.dumps(rows, indent=1))
