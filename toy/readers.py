"""Trains the face readers, the small networks that `metrics.load_reader` gives to losses and tables.

    python -m toy.readers -o runs/readers                          # a, b and c on data/toy, which is drawn if it is not there
    python -m toy.readers c --optimizer muon --steps 600           # one of them
    python -m toy.readers -o my_readers --data MY_FACES            # then METHOD.py train --readers my_readers

A reader learns four things at once: who it is (ArcFace), 12 attributes, 98 landmarks, and how good the picture is. Losses use
a and c, tables use b. --data is a folder as for every method: sub-folders are people, attributes.csv and landmarks.csv lie
beside them. What the folder lacks is not trained: the file's header names it under `not_trained`, and whoever needs it refuses
the file. --output receives reader_a.safetensors and so on; those that the project ships lie in toy/weights.

Read first: `train_reader`, then `reader_losses`. The network is `metrics.FaceReader`.
"""
import functools
import itertools
import json
import math
import sys
import typing
from dataclasses import dataclass

# common comes first: it sets up OpenMP before torch is imported
from common import (DEGRADATIONS, EMA, Degradation, Run, UserError, check_finite, command_line, degrade, lr_schedule,
                    make_optimizer, mix, open_faces, print_table, save_part)

import torch
import torch.nn as nn
import torch.nn.functional as F
from torchvision.transforms.functional import gaussian_blur

from metrics import FaceReader, identity_similarity, landmark_distance, ssim_maps

WIDTHS = {"a": 12, "b": 16, "c": 12}                              # channels at 64 px
GOALS = dict(attribute_accuracy_clean=0.97, verification_auc_clean=0.99, quality_rank_correlation=0.90, landmark_px_clean=1.0)


@dataclass(frozen=True)
class Train:
    """Train the face readers and measure them on people they never saw."""
    which: tuple[str, ...] = ("a", "b", "c")  # readers to train
    output: str = "runs/readers"           # folder for the readers, checkpoints and log
    data: str = ""                         # folder of aligned faces, sub-folders = people (default: the toy world, drawn once)
    validation_data: str = ""              # folder of held-out people (default: the last tenth of --data)
    steps: int = 1000                      # optimiser steps of each reader
    batch_size: int = 64                   # faces per process and step
    optimizer: typing.Literal["muon", "adamw"] = "adamw"  # muon needs about half the steps
    learning_rate: float = 3e-3            # peak of a cosine
    lr_warmup_steps: int = 100             # steps in which the learning rate rises to its peak
    weight_decay: float = 0.02             # of the optimiser
    max_grad_norm: float = 1.0             # clip the gradient to this norm
    ema_decay: float = 0.99                # of the averaged weights that are stored
    margin: float = 0.2                    # ArcFace's additive angle, radians
    margin_scale: float = 24.0             # ArcFace's s
    attribute_weight: float = 2.0          # of the binary cross-entropy
    landmark_weight: float = 1.0           # of the cross-entropy of heatmaps plus the distance in pixels
    quality_weight: float = 20.0           # of the squared error
    validation_faces: int = 1000           # held-out faces that measure a reader
    device: str = "auto"                   # auto, cpu, cuda, cuda:1, mps
    seed: int = 0                          # every draw of a run follows from it
    num_workers: int = 1                   # processes that prepare batches ahead
    log_steps: int = 10                    # steps between lines of log.jsonl
    checkpointing_steps: int = 200         # steps between saves of state.pt
    resume_from_checkpoint: typing.Literal["", "latest"] = ""  # latest: go on with the run in --output
    overwrite: bool = False                # replace the run in --output
    # What `Run` and `open_faces` ask for, and no flag here
    image_size: typing.ClassVar = FaceReader.SIDE
    degradation: typing.ClassVar = "codeformer"  # not used: `spoil` degrades
    stage: typing.ClassVar = "all"
    lr_scheduler: typing.ClassVar = "cosine"
    mixed_precision: typing.ClassVar = "no"
    gradient_accumulation_steps: typing.ClassVar = 1


# ------------------------------------------------------------------------------------------------ data

SMOOTH = Degradation("what a network trained by squared error leaves: blur alone", (0.1, 12), (1, 16), (0, 1), (95, 100))
GRAINY = Degradation("strong noise on a face of full size", (0.1, 1), (1, 1), (10, 100), (95, 100))

# Each of the 98 points as the mean of two of iBUG's 68: brows by their middle line, pupils from the corners.
FROM_68 = tuple(
    [(k // 2, (k + 1) // 2) for k in range(33)]
    + [(k, k) for k in (17, 18, 19, 20, 21, 21, 20, 19, 18, 22, 23, 24, 25, 26, 25, 24, 23, 22)]
    + [(k, k) for k in range(27, 36)]
    + [(k + i, k + j) for k in (36, 42) for i, j in zip((0, 1, 1, 2, 3, 4, 4, 5), (0, 1, 2, 2, 3, 4, 5, 5))]
    + [(k, k) for k in range(48, 68)] + [(36, 39), (42, 45)])


def retouch(hq, kind, strength):
    """Looks that are no better face: contrast, saturation, sharpness. hq (B, 3, S, S), strength (B,) in 0..1 -> the same."""
    strength = strength.view(-1, 1, 1, 1).to(hq)
    if kind == "sharpness":
        return (hq + 3 * strength * (hq - gaussian_blur(hq, 5, 1.0))).clamp(-1, 1)
    centre = hq.mean(1, keepdim=True)                             # grey
    if kind == "contrast":
        centre = centre.mean((2, 3), keepdim=True)
    return (centre + (0.4 + 1.8 * strength) * (hq - centre)).clamp(-1, 1)        # 0.4 to 2.2 of the truth's


def spoil(hq, seeds):
    """Faces of every quality: (B, 3, S, S) in [-1, 1], seeds (B,) -> (image (B, 3, S, S), quality (B,)).

    A quarter stays clean; the others are hq + u (worse - hq), u = 1 for half of them, uniform for the rest; `worse` is
    degraded, grainy, or has another contrast, saturation or sharpness: a loss must not gain by such looks.
    UNSTATED: no paper trains such a network. The label is 1 - sqrt(1 - SSIM to the clean face) of R, G and B: 1 for that face,
    falling with blur, noise, blocks and wrong colours alike. SSIM is relative to the picture's own contrast, so the picture
    shows it. The root stretches the label where faces are almost clean.
    """
    kinds = (None, None, DEGRADATIONS["codeformer"], DEGRADATIONS["gfpgan"], SMOOTH, GRAINY, "contrast", "saturation",
             "sharpness", None, DEGRADATIONS["codeformer"], SMOOTH)
    worse, strength = hq.clone(), seeds // 13 % 1013 / 1012
    for number, kind in enumerate(kinds):
        rows = (seeds % len(kinds) == number).nonzero()[:, 0]
        if isinstance(kind, Degradation) and len(rows):
            worse[rows] = degrade(hq[rows], kind, seeds[rows])
        elif kind and len(rows):
            worse[rows] = retouch(hq[rows], kind, strength[rows])
    u = (seeds // len(kinds) % 1009 / 504).clamp(max=1).view(-1, 1, 1, 1).to(hq)
    image = hq + u * (worse - hq)
    return image, 1 - (1 - ssim_maps(image / 2 + 0.5, hq / 2 + 0.5)[0].flatten(1).mean(1)).clamp(min=0).sqrt()


@functools.lru_cache
def people_of(faces):
    """(number of a person for each person of `faces`, or -1; how many): sub-folders of two pictures, if three are such."""
    known = faces.person.bincount() > 1
    for person, path in zip(faces.person.tolist(), faces.files):
        if path.parent == faces.folder:                           # no sub-folder: pictures of anybody
            known[person] = False
    if known.sum() < 3:
        known[:] = False
    return torch.where(known, known.cumsum(0) - 1, -1), int(known.sum())


def not_trained(faces):
    """The labels that the folder lacks: of "attributes", "landmarks", "identity"."""
    missing = [label for label in ("attributes", "landmarks")
               if label not in faces.labels or faces.labels[label].isnan().all()]
    return missing + ["identity"] * (people_of(faces)[1] == 0)


def labelled(faces, batch):
    """A batch of `Faces` with `image`, `quality`, `identity` (B,), -1 if unknown, attributes and landmarks, NaN if unknown."""
    count = len(batch["hq"])
    image, quality = spoil(batch["hq"], batch["seeds"])
    attributes = batch.get("attributes", torch.full((count, 12), math.nan))
    landmarks = batch.get("landmarks", torch.full((count, 98, 2), math.nan))
    if landmarks[:, 68:].isnan().all():                           # a file of 68 points
        landmarks = landmarks[:, torch.tensor(FROM_68)].mean(2)
    return dict(hq=batch["hq"], image=image, quality=quality, identity=people_of(faces)[0][batch["person"]],
                attributes=attributes, landmarks=landmarks)


def training_batch(faces, count, seed, step, rank, world):
    """The batch of one (step, rank), for `Run.batches`."""
    return labelled(faces, faces.training(count, seed, step, rank, world, degraded=False))


# ------------------------------------------------------------------------------------------------ losses

def identity_loss(embeddings, classes, identity, margin, scale):
    """ArcFace: cross-entropy of s cos(theta + m) for the right class, s cos(theta) for the others [ArcFace Eq. 3].

    embeddings (B, D) and classes (N, D) of any length, identity (B,) -> scalar.
    """
    angle = (F.normalize(embeddings) @ F.normalize(classes).T).clamp(-0.9999, 0.9999).acos()
    right = F.one_hot(identity, len(classes)).bool()
    angle = torch.where(right, (angle + margin).clamp(max=math.pi), angle)
    return F.cross_entropy(scale * angle.cos(), identity)


def heatmap_loss(reader, logits, landmarks):
    """Cross-entropy to a Gaussian of one cell around each point, plus the distance of the means in pixels.

    The target is g_y g_x, so its cross-entropy is logsumexp(logits) - sum_yx g_y g_x logits_yx: no map of targets has to be
    made. logits (B, 98, 32 * 32), landmarks (B, 98, 2) in pixels at 64 -> scalar.
    """
    centres = torch.arange(reader.GRID, device=logits.device) + 0.5
    offset = centres - landmarks[..., None] * reader.GRID / reader.SIDE          # (B, 98, 2, 32) cells
    gx, gy = (-offset.square() / 2).softmax(-1).unbind(2)
    inner = (gy[:, :, None] @ logits.unflatten(2, (reader.GRID, reader.GRID)))[:, :, 0] * gx
    pixels = (reader.point_means(logits) * reader.SIDE - landmarks).abs().sum(-1)
    return (logits.logsumexp(-1) - inner.sum(-1) + pixels).mean()


def reader_losses(reader, classes, batch, cfg):
    """{name: weighted loss} of one batch, each over the faces that carry its label."""
    stages = reader.stages(batch["image"].contiguous(memory_format=torch.channels_last))
    whole, losses, known = stages[4].flatten(1), {}, batch["identity"] >= 0
    if known.any():
        embeddings = reader.identity(whole)[known].float()
        people = batch["identity"][known]
        losses["identity"] = identity_loss(embeddings, classes, people, cfg.margin, cfg.margin_scale)
    labels, known = batch["attributes"], ~batch["attributes"].isnan()
    if known.any():
        bce = F.binary_cross_entropy_with_logits(reader.attributes(whole).float()[known], labels[known])
        losses["attributes"] = cfg.attribute_weight * bce
    known = ~batch["landmarks"].isnan().flatten(1).any(1)
    known[1::2] = False  # every second face is enough: this loss costs more than the others together
    if known.any():
        maps = heatmap_loss(reader, reader.point_logits(stages)[known], batch["landmarks"][known])
        losses["landmarks"] = cfg.landmark_weight * maps
    return losses | {"quality": cfg.quality_weight * F.mse_loss(reader.score(stages), batch["quality"])}


# ------------------------------------------------------------------------------------------------ training

def train_reader(cfg, run, faces, held, name):
    """Train one reader and write it, with what it measures on held-out faces in the file's header."""
    torch.manual_seed(mix(cfg.seed, name))                        # the same first weights, whatever was trained before
    reader = FaceReader(WIDTHS[name]).to(run.device, memory_format=torch.channels_last).train()
    classes = nn.ParameterList([0.05 * torch.randn(max(1, people_of(faces)[1]), 128)]).to(run.device)  # ArcFace's centres
    modules, stage, factor = {"reader": reader, "classes": classes}, f"reader_{name}", lr_schedule(cfg, cfg.steps)
    parameters = [*reader.parameters(), *classes.parameters()]
    optimizer = make_optimizer(cfg, parameters, cfg.learning_rate, (0.9, 0.999), cfg.weight_decay)
    ema = EMA(modules, cfg.ema_decay)
    first = run.load(stage, modules, ema, optimizer)

    for step, batch in run.batches(functools.partial(training_batch, faces), stage, first, cfg.steps):
        optimizer.zero_grad()
        losses = reader_losses(reader, classes[0], batch, cfg)
        sum(losses.values()).backward()
        run.average_gradients(modules)
        grad_norm = nn.utils.clip_grad_norm_(parameters, cfg.max_grad_norm)
        for group in optimizer.param_groups:
            group["lr"] = cfg.learning_rate * factor(step)
        optimizer.step()
        ema.update(step)
        run.log(stage, step, **losses, grad_norm=grad_norm)
        run.save(stage, step, modules, ema, optimizer)

    reader.load_state_dict(half(ema["reader"]))                   # what is measured is what is stored
    check_finite({"reader": reader.state_dict()}, stage)
    rows, missing = measure_reader(reader.eval(), held), not_trained(faces)
    if run.main:
        about = dict(command=" ".join(sys.argv), seed=cfg.seed, steps=cfg.steps, not_trained=missing, measured=rows)
        save_reader(run.folder / f"{stage}.safetensors", reader, about)
        (run.folder / "state.pt").unlink(missing_ok=True)
    return rows


def half(state):
    """{name: tensor} with matrices in half precision, vectors as they are."""
    return {name: v.half() if v.is_floating_point() and v.dim() > 1 else v for name, v in state.items()}


def save_reader(path, reader, about):
    """Write the reader in half precision; `about` goes into the file's header as JSON."""
    save_part(path, half(reader.state_dict()), {key: json.dumps(value) for key, value in about.items()})


def train(cfg: Train) -> None:
    """The readers asked for, in order; print what each measures."""
    if unknown := set(cfg.which) - set(WIDTHS):
        raise UserError(f"--which {min(unknown)}: there are the readers {', '.join(WIDTHS)}")
    run, table = Run(cfg, ("data",)), {number: {"wanted": goal} for number, goal in GOALS.items()}
    faces, held_faces = open_faces(cfg)
    places = torch.arange(min(cfg.validation_faces, len(held_faces)))            # in a row: several pictures of a person
    held = labelled(held_faces, held_faces.batch(places, places + mix("held out"), degraded=False))
    if missing := not_trained(faces):
        run.say(f"not trained, since {faces.folder} has no such labels: {', '.join(missing)}")
    for name in cfg.which:
        path = run.folder / f"reader_{name}.safetensors"
        if path.exists():
            run.say(f"{path}: taken as it is")
        else:
            for number, value in train_reader(cfg, run, faces, held, name).items():
                table.setdefault(number, {})[name] = value
    if run.main:
        print_table(table)
        run.say(f"{len(held['hq'])} held-out faces; the readers are in {run.folder}: --readers {run.folder}")


# ------------------------------------------------------------------------------------------------ measuring

def ranks(values):
    """Ranks from 0 of (N,) numbers; equal ones share their mean rank."""
    _, place, count = values.unique(return_inverse=True, return_counts=True)
    return (count.cumsum(0) - (count + 1) / 2)[place].double()


def spearman(a, b):
    """Rank correlation of (N,) and (N,), -1..1."""
    return torch.corrcoef(torch.stack([ranks(a), ranks(b)]))[0, 1].item()


def verification_auc(embeddings, people):
    """Chance that a pair of one person is more alike than a pair of two: (N, D), (N,) -> 0..1, or NaN."""
    first, second = torch.triu_indices(len(people), len(people), 1)
    same = people[first] == people[second]
    n, m = same.sum().item(), (~same).sum().item()
    order = ranks(identity_similarity(embeddings[first], embeddings[second]))
    return (order[same].sum().item() - n * (n - 1) / 2) / (n * m) if n and m else math.nan


@torch.no_grad()
def measure_reader(reader, held):
    """The reader on faces never trained on, clean and spoilt: {name: number}, NaN without labels."""
    device, rows = next(reader.parameters()).device, {}
    for kind, images in (("clean", held["hq"]), ("spoilt", held["image"])):
        parts = [(*reader(x), reader.landmarks(x)) for x in images.to(device).split(100)]
        identity, logits, _, quality, points = [torch.cat(column).cpu() for column in zip(*parts)]
        known, labels = held["identity"] >= 0, held["attributes"]
        right = ((logits > 0) == (labels > 0.5))[~labels.isnan()].double()
        rows[f"attribute_accuracy_{kind}"] = right.mean().item()
        rows[f"verification_auc_{kind}"] = verification_auc(identity[known], held["identity"][known])
        rows[f"landmark_px_{kind}"] = landmark_distance(points, held["landmarks"]).nanmean().item()
    return rows | {"quality_rank_correlation": spearman(quality, held["quality"])}


def main(argv=None):
    """`python -m toy.readers a b --flags` is short for `train --which a b --flags`."""
    argv = sys.argv[1:] if argv is None else list(argv)
    names = list(itertools.takewhile(WIDTHS.__contains__, argv))
    command_line(__doc__, {"train": (Train, {}, train)}, ["train", *(["--which", *names] if names else []), *argv[len(names):]])


if __name__ == "__main__":
    main()
