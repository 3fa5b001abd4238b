"""What would be the same for any face-restoration paper: faces, degradation, image files, run plumbing, LoRA.

    toy world     toy_faces, ATTRIBUTES, TOY_SPLITS,                faces with exact ground truth, no download
                  verbalise, WordTokenizer
    data          Faces, list_images, read_image                    the toy world or a folder, the same batches
    degradation   Degradation, DEGRADATIONS, degrade, degrade_pair  lq = { JPEG_q((hq * k_sigma) down_r + n) } up_r
    pictures      write_image, write_grid, write_curve, align_face, paste_face
    run plumbing  Run, Stage, Muon, make_optimizer, lr_schedule     device, precision, processes, EMA, checkpoints, log
    weights       read_weights, load_strict, save_model, load_model
    LoRA          LoRALinear, add_lora, merge_lora, save_lora, load_lora
    restoring     restore_folder                                    `sample` of every method, without its network
    reporting     print_table, read_curves, run_ablation, ...       tables, rows that survive an interruption
    command line  command_line                                      flags from the fields of a dataclass

Images are `(3, H, W)` or `(B, 3, H, W)` RGB float32 in [-1, 1]. Points are (x, y) in pixels, the top-left corner of
the picture at (0, 0), so that the centre of pixel (row i, column j) is (j + 0.5, i + 0.5). A `UserError` is a mistake
of the person at the keyboard (or of their disk): `command_line` prints it as one line and exits with status 2.
"""
import argparse
import collections
import dataclasses
import difflib
import functools
import hashlib
import inspect
import io
import json
import math
import os
import pickle
import re
import signal
import statistics
import subprocess
import sys
import time
import typing
import warnings
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import numpy as np

# OpenMP's threads wait for each other awake; a long wait beside other busy programs costs 4 to 100 times the work itself.
# libgomp reads this when torch is imported: docs/speed.md has the measurement.
os.environ.setdefault("GOMP_SPINCOUNT", "1000")

import safetensors.torch
import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFilter, ImageOps
from safetensors import SafetensorError
from tqdm import tqdm


class UserError(ValueError):
    """Something the user can mend: the message is one line that names the file or flag and the remedy."""


def refuse_unread(cfg, flags, switch: str) -> None:
    """UserError where a file is given that no one reads unless `switch` is on, rather than silence."""
    for flag in flags:
        if getattr(cfg, flag):
            raise UserError(f"--{flag}: only read with --{switch}; add that, or leave the file out")


def mix(*numbers) -> int:
    """One 48-bit seed from any integers and strings: the same numbers give the same seed on every machine."""
    return int.from_bytes(hashlib.blake2b(repr(numbers).encode(), digest_size=6).digest(), "big")


# ------------------------------------------------------------------------------------------------ toy world

# --------------------------------------------------------------------------------------- attributes and words
# (CelebA index, name, phrase when on, phrase when off). An empty phrase is not worth saying: a hat's absence
# goes without saying, and the hair colours, as wavy and straight, speak for each other.
ATTRIBUTES = (
    (39, "Young", "young", "older"),
    (31, "Smiling", "smiling", "serious"),
    (21, "Mouth_Slightly_Open", "mouth slightly open", "mouth closed"),
    (15, "Eyeglasses", "eyeglasses", ""),
    (5, "Bangs", "bangs", ""),
    (33, "Wavy_Hair", "wavy", ""),
    (32, "Straight_Hair", "straight", ""),
    (8, "Black_Hair", "black", ""),
    (9, "Blond_Hair", "blond", ""),
    (11, "Brown_Hair", "brown", ""),
    (17, "Gray_Hair", "gray", ""),
    (35, "Wearing_Hat", "a hat", ""),
)
YOUNG, SMILING, OPEN, GLASSES, BANGS, WAVY, STRAIGHT, BLACK, BLOND, BROWN, GRAY, HAT = range(12)
SIBLINGS = ((WAVY, STRAIGHT), (BLACK, BLOND, BROWN, GRAY))        # switching one on switches the others off
TOY_SPLITS = {  # identities
    "train": range(2**30), "val": range(2**30, 2**30 + 2**20), "test": range(2**31, 2**31 + 2**20)}


def verbalise(scores) -> str:
    """Caption from 12 attribute scores in [0, 1] (sequence or 1-D tensor, order of ATTRIBUTES).

    Above 0.6 an attribute is named, below 0.4 its negative phrase is, if it has one; between, it is unknown
    and left out. Of the hair colours, and of wavy and straight, the highest score speaks.
    ValueError unless there are 12 scores. Source: DESIGN 5, facts/a2bfr.md 3.5.
    """
    scores = [float(s) for s in (scores.tolist() if torch.is_tensor(scores) else scores)]
    if len(scores) != len(ATTRIBUTES):
        raise ValueError(f"verbalise wants {len(ATTRIBUTES)} scores, got {len(scores)}")

    def say(i):  # -> list of no phrase or one
        phrase = ATTRIBUTES[i][2] if scores[i] > 0.6 else ATTRIBUTES[i][3] if scores[i] < 0.4 else ""
        return [phrase] if phrase else []

    def best(group):
        return say(max(group, key=lambda i: scores[i]))

    person = " ".join(say(YOUNG) + say(SMILING) + ["person"])
    hair = " ".join([phrase for group in SIBLINGS for phrase in best(group)] + ["hair"])
    hair = " and ".join(([hair] if hair != "hair" else []) + say(BANGS))
    wears = " and ".join(say(GLASSES) + say(HAT))
    article = "an" if person[0] in "aeiou" else "a"
    who = f"a photo of {article} {person}" + (f" with {hair}" if hair else "")
    return ", ".join([who] + ([f"wearing {wears}"] if wears else []) + say(OPEN))


class WordTokenizer:
    """Word-level tokenizer: its vocabulary is what `verbalise` can say, and "a photo of a human face"."""

    def __init__(self):
        phrases = [phrase for row in ATTRIBUTES for phrase in row[2:]]
        text = " ".join(phrases + ["a photo of a human face an person with hair and wearing"])
        self.words = ["<pad>", "<unk>"] + sorted(set(text.split()))
        self.ids = {word: i for i, word in enumerate(self.words)}

    def __len__(self):
        return len(self.words)

    def encode(self, text: str, length: int) -> list[int]:
        """Exactly `length` ids: lower case, no punctuation, others <unk>, cut or filled with <pad> = 0."""
        ids = [self.ids.get(word, 1) for word in re.findall(r"[a-z]+", text.lower())][:length]
        return ids + [0] * (length - len(ids))


# ------------------------------------------------------------------------------------------------------- dice
# Everything is measured in head coordinates, x to the right, y down. The picture is [-1, 1] in both: one unit
# is 256 px of the FFHQ-aligned 512 px crop (eyes near (+-.246, -.063), nose tip (0, .227), mouth corners
# (+-.219, .449)). Each number is uniform in (low, high) and drawn by its own name: no draw depends on the
# order of the others.
IDENTITY = dict(
    face_w=(.48, .575), chin_y=(.71, .84), jaw_n=(1.85, 2.75), jaw_taper=(0, .2),
    ear_h=(.09, .14), neck_w=(.27, .35),
    eye_x=(.222, .27), eye_y=(-.073, -.037), eye_w=(.096, .125), eye_open=(.38, .56), eye_tilt=(-.12, .2),
    iris_r=(.043, .052), iris_hue=(0, 1), iris_light=(.75, 1.2),
    brow_gap=(.125, .18), brow_arch=(0, .05), brow_slope=(-.02, .035), brow_thick=(.011, .029),
    brow_len=(.9, 1.12),
    nose_y=(.195, .26), nose_w=(.07, .118), nose_bridge=(.032, .055), nose_h=(.12, .2), cheek=(.02, .075),
    mouth_y=(.452, .502), mouth_w=(.18, .25), lip_up=(.022, .056), lip_low=(.034, .078), lip_bow=(.1, .55),
    skin_tone=(0, 1), skin_warm=(-1, 1), lip_red=(0, 1), blush=(.2, 1), freckles=(-1.5, 1),
    hair_len=(.28, 1.15), hair_vol=(0, .06), hair_flare=(-.06, .16), hair_shade=(-1, 1),
    hairline=(-.60, -.46), peak=(-.03, .07), part=(-.6, .6), tuck=(-1, 1),
    wave_k=(22, 30), wave_phase=(0, 6.28),
    grain_x=(0, 50), grain_y=(0, 50),  # where in the noise this person's strands, pores and wrinkles lie
    **{f"mole{i}_x": (-.4, .4) for i in range(4)}, **{f"mole{i}_y": (-.1, .62) for i in range(4)},
    **{f"mole{i}_r": (-.012, .026) for i in range(4)},  # no mole when negative
)
INSTANCE = dict(
    shift_x=(-.035, .035), shift_y=(-.03, .03), roll=(-.14, .14), scale=(.95, 1.05), turn=(-.075, .075),
    light_x=(-1, 1), light_y=(-.75, -.2), light_power=(.92, 1.08), light_warm=(-1, 1),
    smile=(.85, 1.15), open=(.8, 1.15), mood=(.004, .019), lids=(.93, 1.05), brow_up=(-.008, .018),
    gaze_x=(-.02, .02), gaze_y=(-.006, .008), cloth_hue=(0, 1), cloth_value=(.2, .85), collar=(0, 1),
    back_hue=(0, 1), back_value=(.3, .85), back_sat=(.02, .2), back_angle=(0, 6.28), back_blur=(-.6, 1),
    back_phase=(0, 50), frame_w=(.135, .16), frame_h=(.088, .118), frame_round=(2, 5),
    frame_thick=(.011, .018), frame_hue=(0, 1), glare=(-.1, .1),
    hat_kind=(0, 3), hat_hue=(0, 1), hat_value=(.25, .8), hat_line=(-.46, -.38),
)
# Chance of each attribute when it is drawn; the hair colours share one draw, and so do wavy and straight.
CHANCE = {YOUNG: .6, SMILING: .5, OPEN: .45, GLASSES: .35, BANGS: .35, HAT: .25, WAVY: .5}
SKIN = (.97, .82, .73), (.93, .73, .60), (.82, .60, .45), (.64, .43, .31), (.44, .28, .20), (.30, .19, .145)
IRIS = ((.25, .14, .08), (.42, .25, .12), (.50, .42, .20), (.33, .47, .28), (.32, .50, .62), (.50, .62, .70),
        (.42, .45, .48))
HAIR = (.085, .070, .075), (.85, .67, .38), (.33, .205, .125), (.66, .66, .68)  # black, blond, brown, gray
FRAMES = (.06, .05, .06), (.36, .19, .09), (.72, .56, .24), (.45, .07, .10), (.10, .16, .36)


def _hash(x):
    """splitmix64 of an int64 tensor; int64 products wrap, and `>>` keeps the sign, hence the masks."""
    x = x + (0x9E3779B97F4A7C15 - 2**64)
    x = (x ^ ((x >> 30) & (2**34 - 1))) * (0xBF58476D1CE4E5B9 - 2**64)
    x = (x ^ ((x >> 27) & (2**37 - 1))) * (0x94D049BB133111EB - 2**64)
    return x ^ ((x >> 31) & (2**33 - 1))


def _dice(key, table):
    """One uniform number for each row of {name: (low, high)}: key (B,) int64 -> {name: (B,) float64}."""
    names = [int.from_bytes(hashlib.blake2b(n.encode(), digest_size=7).digest(), "big") for n in table]
    low, high = torch.tensor(list(table.values()), dtype=torch.float64, device=key.device).unbind(1)
    bits = _hash(key[:, None] ^ torch.tensor(names, device=key.device))  # (B, len(table))
    unit = ((bits >> 11) & (2**53 - 1)).double() * 2.0**-53
    return dict(zip(table, (low + (high - low) * unit).unbind(1)))


def _draw_attributes(key):
    """(B, 12) float64 0/1 from the dice of (identity, instance), whatever the identity is."""
    dice = _dice(key, {name: (0, 1) for _, name, *_ in ATTRIBUTES})
    columns = [dice[name] < CHANCE.get(i, 0) for i, (_, name, *_) in enumerate(ATTRIBUTES)]
    for k in range(4):
        columns[BLACK + k] = (dice["Black_Hair"] * 4).long() == k
    return torch.stack(columns, 1).double()


def _settle(attributes):
    """(B, 12) -> the same with one hair colour (the first on, else brown) and one of wavy and straight."""
    on = attributes > 0.5
    colour = on[:, BLACK:HAT]
    colour = torch.where(colour.any(1), colour.double().argmax(1), BROWN - BLACK)
    on = on.double()
    on[:, BLACK:HAT] = F.one_hot(colour, 4).double()
    on[:, STRAIGHT] = 1 - on[:, WAVY]
    return on


def _ramp(colours, position):
    """Piecewise linear palette: position (B,) in [0, 1] -> (B, 3)."""
    table = torch.tensor(colours, dtype=position.dtype, device=position.device)
    at = position.clamp(0, 1) * (len(colours) - 1)
    i = at.long().clamp(max=len(colours) - 2)
    return torch.lerp(table[i], table[i + 1], (at - i)[:, None])


def _hue(hue, value, saturation):
    """A muted colour wheel: (B,) each -> (B, 3)."""
    wheel = torch.stack([(6.2832 * (hue + k / 3)).cos() for k in range(3)], 1)
    return (value[:, None] * (1 + saturation[:, None] * wheel)).clamp(0.03, 0.97)


def _colours(f, attributes):
    """The pigments of a face: (B, 3) each."""
    def rgb(*values):
        return torch.tensor([values], dtype=torch.float64, device=f.roll.device)

    skin = _ramp(SKIN, f.skin_tone) * (1 + f.skin_warm[:, None] * rgb(.04, 0, -.07))
    hair = attributes[:, BLACK:HAT] @ rgb(*HAIR)[0] * (1 + .13 * f.hair_shade[:, None])
    rose = rgb(.74, .28, .28) * (.35 + .65 * skin.mean(1, keepdim=True))
    muted = torch.full_like(f.cloth_hue, .24)
    fixed = dict(white=rgb(.80, .79, .77), ink=rgb(.02, .02, .025), enamel=rgb(.93, .90, .84),
                 throat=rgb(.16, .05, .06), tongue=rgb(.62, .26, .27), silver=rgb(.62, .62, .64))
    return dict(
        skin=skin, blood=skin * rgb(.95, .60, .56), hair=hair, brow=torch.lerp(skin * .28, hair * .6, .5),
        lips=torch.lerp(skin * .8, rose, .4 + .45 * f.lip_red[:, None]), lip_line=skin * rgb(.42, .22, .22),
        iris=_ramp(IRIS, f.iris_hue) * f.iris_light[:, None], lid=skin * .45,
        lash=torch.lerp(skin * .2, rgb(.03, .025, .03), .7), frame=_ramp(FRAMES, f.frame_hue),
        cloth=_hue(f.cloth_hue, f.cloth_value, muted), felt=_hue(f.hat_hue, f.hat_value, muted),
        back=_hue(f.back_hue, f.back_value, f.back_sat),
        back2=_hue(f.back_hue + .12, f.back_value * .55, f.back_sat),
        light=f.light_power[:, None] * (1 + f.light_warm[:, None] * rgb(.04, 0, -.05)),
        **{name: colour.expand(len(skin), 3) for name, colour in fixed.items()})


# --------------------------------------------------------------------------------------------------- geometry
# The curves of a face. The painter evaluates them on pixels, `_landmarks` at fixed parameters: one
# definition, so the landmarks lie on what is painted. `f` has a tensor per name of IDENTITY and INSTANCE, to
# broadcast with `t`.

WARP = 0.7  # half-width of the part of the picture that turns with the head


def _contour(f, x, y):
    """The face is where rho < 1: a superellipse around (0, eye_y) whose jaw tapers to the chin."""
    down = (y - f.eye_y) / torch.where(y > f.eye_y, f.chin_y - f.eye_y, f.eye_y + .80)
    w = down.abs()
    side = x.abs() / (f.face_w * (1 - f.jaw_taper * down.clamp(0, 1)))
    return (side.clamp(min=1e-4) ** f.jaw_n + w.clamp(min=1e-4) ** f.jaw_n) ** (1 / f.jaw_n)


def _lids(f, t):
    """Heights of upper and lower lid over the line of the eye corners, t = -1 inner corner .. 1 outer."""
    arch = 1 - t * t
    height = f.eye_open * f.eye_w * f.lids * (1 - .10 * f.smile)
    return -height * arch * (1 - .18 * t), height * arch * (.46 - .24 * f.smile) * (1 + .2 * t)


def _brow(f, t):
    """Middle and half thickness of the brow, t = 0 inner end .. 1 outer end, where |x| = start + length t."""
    middle = f.eye_y - f.brow_gap - f.brow_up - f.brow_slope * t + .035 * t ** 3
    middle = middle - 4 * f.brow_arch * t * (1 - t) * (.6 + .7 * t)
    return middle, f.brow_thick * (1 - .8 * t * t) * (.75 + .5 * t)


def _brow_span(f):
    return f.eye_x - .125 * f.brow_len, .285 * f.brow_len  # start and length


def _lips(f, t):
    """Heights of outer top, inner top, inner bottom, outer bottom edge, t = -1 .. 1 between the corners."""
    arch = 1 - t * t
    line = f.mouth_y + f.smile * (.024 - .084 * t * t) - f.mood * t * t
    bow = 1 - f.lip_bow * torch.exp(-(t / .17) ** 2)
    inner_top = line - arch * f.open * (.012 + .014 * f.smile)
    inner_bottom = line + arch * f.open * (.062 + .012 * f.smile)
    thin = 1 - .18 * f.smile
    return (inner_top - f.lip_up * thin * arch * bow * (.6 + .45 * arch), inner_top, inner_bottom,
            inner_bottom + f.lip_low * thin * arch)


def _mouth_w(f):
    return f.mouth_w * (1 + .15 * f.smile - .04 * f.open)


def _iris_y(f):
    return f.eye_y + f.gaze_y - .12 * f.eye_open * f.eye_w


def _nose_shift(f, y):
    """The nose stands out of the face, so a turn moves its tip further than the cheeks."""
    return .55 * f.turn * ((y + .08) / .3).clamp(0, 1)


def _landmarks(f, size):
    """98 WFLW points in pixels: f of (B, 1) float64 -> (B, 98, 2) float64."""
    def row(*t):
        return torch.tensor([t], dtype=torch.float64, device=f.roll.device)

    def points(x, y):
        return torch.stack(torch.broadcast_tensors(x, y), -1)  # (B, n, 2)

    def both(left, order):  # a brow or eye and its mirror image, which counts from the inner end
        return [left, left[:, order] * row(-1, 1)[:, None]]

    # 0-32 contour: the angle of the superellipse runs from the left temple over the chin to the right one
    angle = torch.pi * row(*range(33)) / 32
    down = angle.sin().clamp(min=0) ** (2 / f.jaw_n)
    side = angle.cos().abs() ** (2 / f.jaw_n) * angle.cos().sign() * (1 - f.jaw_taper * down)
    parts = [points(-f.face_w * side, f.eye_y + (f.chin_y - f.eye_y) * down)]
    # 33-50 brows: outer end, upper edge inwards, lower edge back
    t = row(1, .75, .5, .25, 0, 0, .25, .5, .75)
    (middle, thick), (start, length) = _brow(f, t), _brow_span(f)
    brow = points(-start - length * t, middle + thick * row(0, -1, -1, -1, -1, 1, 1, 1, 1))
    parts += both(brow, [4, 3, 2, 1, 0, 8, 7, 6, 5])
    # 51-54 bridge of the nose down to its tip, 55-59 under the nostrils
    x = f.nose_w * row(0, 0, 0, 0, -.8, -.4, 0, .4, .8)
    y = f.nose_y + (f.nose_y - f.eye_y) * row(-1, -2 / 3, -1 / 3, 0, 0, 0, 0, 0, 0)
    y = y + row(0, 0, 0, 0, .052, .068, .078, .068, .052)
    parts.append(points(x + _nose_shift(f, y), y))
    # 60-75 eyes: outer corner, upper lid inwards, inner corner, lower lid back
    t = row(1, .5, 0, -.5, -1, -.5, 0, .5)
    upper, lower = _lids(f, t)
    lid = torch.cat([upper[:, :4], lower[:, 4:]], 1)
    eye = points(-f.eye_x - f.eye_w * t, f.eye_y - f.eye_tilt * f.eye_w * t + lid)
    parts += both(eye, [4, 3, 2, 1, 0, 7, 6, 5])
    # 76-95 lips: outer top, outer bottom back, inner top, inner bottom back; 96, 97 pupils
    for edge, t in ((0, row(-1, -.6, -.24, 0, .24, .6, 1)), (3, row(.66, .33, 0, -.33, -.66)),
                    (1, row(-.86, -.43, 0, .43, .86)), (2, row(.43, 0, -.43))):
        parts.append(points(_mouth_w(f) * t, _lips(f, t)[edge]))
    parts.append(points(f.eye_x * row(-1, 1) + f.gaze_x, _iris_y(f)))
    x, y = torch.cat(parts, 1).unbind(-1)  # (B, 98) head coordinates
    # `_paint` looks up x = X - turn (1 - X^2 / WARP^2) at each X; here its inverse, then roll, scale, shift
    x = 2 * (x + f.turn) / (1 + (1 + 4 * f.turn * (x + f.turn) / WARP**2).sqrt())
    cos, sin = f.roll.cos() * f.scale, f.roll.sin() * f.scale
    return (torch.stack([f.shift_x + x * cos - y * sin, f.shift_y + x * sin + y * cos], -1) + 1) * (size / 2)


# --------------------------------------------------------------------------------------------------- painting
# Layers from back to front. Distances are in head units, negative inside a shape; `px` is the pixel pitch in
# that unit. Edges are one pixel wide at every size, and patterns finer than two pixels fade out instead of
# aliasing.


def _cover(distance, px):
    """Coverage of the inside of a shape, its edge one pixel wide."""
    return (.5 - distance / px).clamp_(0, 1)


def _meet(*distances):
    """Distance to the intersection of shapes."""
    return functools.reduce(torch.maximum, distances)


def _line(distance, width, px):
    """Coverage of a line of half-width `width`; thinner than a pixel it fades instead of breaking up."""
    wide = torch.as_tensor(width).clamp(min=px / 2)
    return ((wide - distance.abs()) / px + .5).clamp_(0, 1) * (width / wide)


def _ellipse(x, y, a, b):
    """Distance to the ellipse of half-axes a, b, to first order."""
    x, y = x / a, y / b
    rho = (x * x + y * y).sqrt()
    return rho * (rho - 1) / ((x / a) ** 2 + (y / b) ** 2).sqrt().clamp(min=1e-3)


def _bell(r2):
    """Gaussian-like bump of the squared distance r2: 1 at 0, 0.32 at 1, and exactly nothing beyond 4."""
    return (1 - .25 * r2).clamp_(min=0).square_().square_()


def _blob(x, y, sx, sy):
    return _bell((x / sx) ** 2 + (y / sy) ** 2)


def _smooth(x, low, high):
    """Smooth step from 0 at `low` to 1 at `high` (which may lie below `low`)."""
    t = ((x - low) / (high - low)).clamp_(0, 1)
    return t * t * (3 - 2 * t)


@functools.lru_cache(maxsize=4)
def _lattice(device):
    """(1, 1, 64, 64) fixed random numbers in [-1, 1]."""
    table = _dice(torch.arange(64 * 64, device=device), {"lattice": (-1, 1)})
    return table["lattice"].float().view(1, 1, 64, 64)


def _noise(x, y):
    """Smooth noise in [-1, 1], one random number per unit cell: (B, H, W) coordinates -> (B, H, W)."""
    grid = torch.stack([x, y], -1).mul_(1 / 32)  # grid_sample counts half the lattice as 1
    lattice = _lattice(x.device).expand(len(x), -1, -1, -1)
    return F.grid_sample(lattice, grid, padding_mode="reflection", align_corners=False)[:, 0]


def _texture(x, y, octaves, px):
    """Sum of noise octaves ((cells per unit in x, in y, gain), ...), less those that px cannot carry."""
    total = torch.zeros_like(x)
    for cells_x, cells_y, gain in octaves:
        gain = gain * min(max(2 / (cells_x * px) - 2, 0), 1)  # a wave is two cells: 0 at 2 px, all at 3
        if gain:
            total += gain * _noise(x * cells_x, y * cells_y)
    return total


def _window(size, top, bottom, left=0, right=8):
    """Index (..., rows, columns) of a window that is given in eighths of the picture."""
    return ..., slice(size * top // 8, -(-size * bottom // 8)), slice(size * left // 8, -(-size * right // 8))


class _Canvas:
    """A picture being painted: image (B, 3, H, W) in [0, 1], head coordinates x, y (B, H, W), pixel pitch."""

    def __init__(self, image, x, y, px):
        self.image, self.x, self.y, self.px = image, x, y, px

    def crop(self, window):
        """A part of the canvas that paints into the same image."""
        return _Canvas(self.image[window], self.x[window].contiguous(), self.y[window].contiguous(), self.px)

    def paint(self, colour, mask):
        self.image.lerp_(colour.expand_as(self.image), mask[:, None])

    def shade(self, amount):
        """Darken by amount (B, H, W) in [0, 1]; red light travels furthest in skin, so shadows stay warm."""
        tint = torch.tensor([.85, 1, 1.05], device=amount.device).view(3, 1, 1)
        self.image.mul_(1 - amount[:, None] * tint)


def _hair_field(c, f):
    """What the hair layers share: distance to the silhouette, raggedness of the ends, colour (B, 3, H, W)."""
    top = -.14
    curl = f.wave_k * c.y + f.wave_phase + 5 * c.x.abs()
    x = c.x + f.wavy * .036 * torch.sin(curl) * _smooth(c.y, -.75, -.1) * (6 * c.x).clamp(-1, 1)
    width = f.face_w + .05 + f.hair_vol + .03 * f.wavy
    k = (c.y - top).clamp(max=0) / (.72 + f.hair_vol)  # 0 from the ears down, -1 at the crown
    side = x / (width + f.hair_flare * (c.y - top).clamp(min=0))
    # strands are the lines of constant q: meridians that fan out from the parting, then hang down
    room = (1 - k * k).clamp(min=.03).sqrt()
    q = (side + f.part * k) / room
    clump = _noise(11 * q + f.grain_x, 1.1 * c.y + f.grain_y)
    fine = _texture(q + f.grain_x, c.y + f.grain_y, ((5, 1.1, .2), (30, 2, .3), (70, 3, .22)), c.px)
    strands = (.24 * clump + fine) * room
    strands = strands + .2 * f.wavy * torch.sin(curl + 3 * clump + 1.2) * _smooth(c.y, -.8, -.3)
    part = _bell((q / .07) ** 2) * _smooth(k, -.5, -.8)
    tone = .9 + .22 * side * f.light_x - .28 * (k + .45) ** 2 - .4 * part + strands
    sheen = _bell(((k + .52 + .12 * strands) / .2) ** 2) * (.3 + strands).clamp(min=0)
    grey = f.old * .75 * _blob(c.x.abs() - .52, c.y + .12, .14, .3)
    base = torch.lerp(f.hair.expand(-1, -1, *k.shape[1:]), f.silver, grey[:, None])
    colour = base * tone.clamp_(.3, 1.5)[:, None] + sheen[:, None] * (.07 + .4 * base)
    distance = ((side * side + k * k).sqrt() - 1) * width
    return SimpleNamespace(distance=distance, ragged=.07 * clump + .025 * torch.sin(47 * q), colour=colour)


def _paint_background(c, f, x, y):
    """A blurred room in screen coordinates: a gradient of two colours with large soft spots."""
    spots = f.back_blur.clamp(min=0) * _noise(1.6 * x + f.back_phase, 1.6 * y + f.back_phase)
    mix = .5 + .35 * (x * f.back_angle.cos() + y * f.back_angle.sin()) + .6 * spots
    c.image.copy_(torch.lerp(f.back, f.back2, mix.clamp_(0, 1)[:, None]))


def _paint_clothes(c, f):
    fold = .9 + .08 * _noise(4 * c.x + f.grain_y, 2.5 * c.y) + .12 * c.x * f.light_x
    c.paint(f.cloth * fold[:, None], _cover(.86 + .26 * (c.x.abs() - f.neck_w).clamp(min=0) - c.y, c.px))


def _paint_back_hair(c, f, hair):
    mask = _cover(_meet(hair.distance, c.y - f.hair_len - hair.ragged), c.px)
    c.paint(hair.colour * .62, mask * (1 - f.hat * _smooth(c.y, -.35, -.42)))


def _paint_neck(c, f, rho):
    """The neck in the shadow of the chin, the collar, and the ears."""
    x, y, ax, px = c.x, c.y, c.x.abs(), c.px
    side = ax - f.neck_w - .9 * (y - .84).clamp(min=0) ** 1.5
    collar = y - .95 + .1 * f.collar - (.05 + .15 * f.collar) * (1 - 1.1 * ax / f.neck_w)
    lit = (.66 + .2 * f.light_x * x / f.neck_w) * (1 - .6 * _smooth(rho, 1.35, 1))
    c.paint(f.skin * lit[:, None], _cover(_meet(side, collar, -y), px))
    c.paint(f.cloth * .6, _line(collar - .012, .012, px) * _cover(side, px))
    ear_y = y - f.eye_y - .09
    ear_x = ax - f.face_w - .012 + .22 * ear_y
    lit = .86 + .13 * f.light_x * x.sign()
    c.paint(f.skin * lit[:, None], _cover(_ellipse(ear_x, ear_y, .055, f.ear_h), px))
    c.shade(.32 * _blob(ear_x - .006, ear_y, .022, .065))


def _fold(f, x, y):
    """Distance to the fold from the wing of the nose past the mouth corner, and the way along it (0 .. 1)."""
    along = (y - f.nose_y) / (f.mouth_y + .03 - f.nose_y)
    span = (1.2 * _mouth_w(f) - f.nose_w) * (.55 + .25 * along)
    return x.abs() - f.nose_w - .03 - .03 * f.smile - span * along, along


def _sculpt(c, f, rho):
    """Height of the skin over the picture plane (B, H, W): light then finds nose, cheeks and sockets."""
    x, y, ax = c.x, c.y, c.x.abs()
    r2 = (rho * rho).clamp(max=1.3)
    z = -.34 * r2 * (.55 + .45 * r2)
    z += .030 * _blob(ax - .20, y - f.eye_y + f.brow_gap - .01, .20, .06)
    z -= .060 * _blob(ax - f.eye_x + .02, y - f.eye_y, .12, .07)
    nx = x - _nose_shift(f, y)
    rise = _smooth(y, f.eye_y - .08, f.nose_y + .02) * _smooth(y, f.nose_y + .085, f.nose_y + .015)
    z += .56 * f.nose_h * rise * _bell((nx / (f.nose_bridge + .035 * rise)) ** 2)
    z += .03 * _blob(nx, y - f.nose_y - .01, .06, .05)
    z += .045 * _blob(nx.abs() - .72 * f.nose_w, y - f.nose_y - .035, .034, .04)
    z += (f.cheek + .035 * f.smile) * _blob(ax - .27, y - .17 + .03 * f.smile, .13, .12)
    z += .035 * _blob(x, y - f.mouth_y, .2, .11) + .05 * _blob(x, y - f.chin_y + .11, .13, .07)
    z -= .022 * _blob(x, y - f.mouth_y - f.lip_low - .045 - .06 * f.open, .11, .025)
    fold, along = _fold(f, x, y)
    depth = (.016 * f.old + .010 * f.smile) * _smooth(along, -.15, .25) * _smooth(along, 1.25, .7)
    return z - depth * _bell((fold / .028) ** 2)


def _paint_head(c, f, rho):
    """Skin: sculpted, lit from one side, with blush, pores, and shadows where light hardly gets in."""
    x, y, ax, px = c.x, c.y, c.x.abs(), c.px
    # the normal by central differences of the height, in screen axes, where the light is given
    z = F.pad(_sculpt(c, f, rho)[:, None], (1, 1, 1, 1), mode="replicate")[:, 0]
    zx, zy = (z[:, 1:-1, 2:] - z[:, 1:-1, :-2]) / (2 * px), (z[:, 2:, 1:-1] - z[:, :-2, 1:-1]) / (2 * px)
    lz = .75
    facing = (lz - f.light_x * zx - f.light_y * zy) * torch.rsqrt(1 + zx * zx + zy * zy)
    bright = (facing * torch.rsqrt(lz * lz + f.light_x ** 2 + f.light_y ** 2)).clamp_(min=0)
    flush = f.blush * (.30 * _blob(ax - .30, y - .20, .13, .10) + .25 * _blob(x, y - f.nose_y, .09, .07))
    skin = torch.lerp(f.skin.expand(-1, -1, *x.shape[1:]), f.blood, (flush + .15 * f.smile * flush)[:, None])
    pores = _texture(x + f.grain_x, y + f.grain_y, ((9, 9, .02), (50, 50, .02), (125, 125, .035)), px)
    gloss = bright ** 16 * .16 * (.6 + f.skin_tone)
    ambient = .52 + pores - .1 * _smooth(rho, .8, 1)
    lit = skin * (ambient[:, None] + .62 * bright[:, None] * f.light) + gloss[:, None]
    c.paint(lit, _cover((rho - 1) * f.face_w, px))
    c.shade(.34 * _blob(x - _nose_shift(f, y) + .02 * f.light_x, y - f.nose_y - .10, f.nose_w * .95, .028)
            + .20 * _blob(ax - f.eye_x + .03, y - f.eye_y + .055, .13, .042)
            + .16 * _blob(x, y - f.mouth_y - f.lip_low - .03 - .065 * f.open, .10, .022))


def _paint_age(c, f):
    """The fold beside the mouth (also of a smile); when older, bags, crow's feet and forehead lines."""
    x, y, ax = c.x, c.y, c.x.abs()
    fold, along = _fold(f, x, y)
    fold = _bell((fold / .018) ** 2) * _smooth(along, -.1, .3) * _smooth(along, 1.3, .8)
    ex, ey = ax - f.eye_x, y - f.eye_y
    bags = .34 * _bell(((ey - .085 + 3 * ex * ex) / .015) ** 2) * _smooth(ex.abs(), .11, .05)
    feet = _bell((torch.sin(ey * (400 * ax - 110)) / .5) ** 2) * _blob(ex - f.eye_w - .05, ey, .03, .045)
    brow = ey + f.brow_gap + .10 + .03 * torch.cos(6 * x + f.grain_x)
    lines = _bell((torch.sin(46 * brow) / .45) ** 2) * _smooth(brow.abs(), .13, .07) * _smooth(ax, .34, .2)
    c.shade((.36 * f.old + .14 * f.smile) * fold + f.old * (bags + .2 * feet + .24 * lines))


def _paint_marks(c, f):
    """Moles and freckles: fixed places of an identity."""
    mask = torch.zeros_like(c.x)
    for i in range(4):
        x, y, r = (getattr(f, f"mole{i}_{name}") for name in "xyr")
        wide = (1.3 * r).clamp(min=.8 * c.px)
        mask += _blob(c.x - x, c.y - y, wide, wide) * (1.3 * r.clamp(min=0) / wide) ** 2
    c.paint(f.skin * .38, (.9 * mask).clamp_(0, 1))
    spots = _smooth(_texture(c.x + f.grain_y, c.y + f.grain_x, ((60, 60, 1),), c.px), .35, .75)
    c.shade(f.freckles.clamp(min=0) * _blob(c.x.abs() - .2, c.y - .13, .2, .11) * (.06 + .4 * spots))


def _paint_eyes(c, f):
    """Eyeballs in their lids, both at once in |x|: only the gaze knows its side."""
    px, x = c.px, c.x.abs() - f.eye_x
    y = c.y - f.eye_y + f.eye_tilt * x
    t = x / f.eye_w
    upper, lower = _lids(f, t.clamp(-1, 1))
    edge = (t.abs() - 1) * f.eye_w
    ball = _cover(_meet(upper - y, y - lower, edge), px)
    under = _smooth(y - upper, .04, 0)  # the shadow of the upper lid on the ball
    c.shade(.30 * _blob(x, y + .005, f.eye_w * 1.15, .055))
    pink = .08 * _smooth(t, -.6, -1)[:, None] * (1 - f.blood)  # the inner corner
    c.paint(f.white * (1 - .38 * under - .16 * t * t)[:, None] - pink, ball)
    gx, gy = x - f.gaze_x * c.x.sign(), c.y - _iris_y(f)
    r = (gx * gx + gy * gy).sqrt()
    rays = .62 + .45 * _smooth(r, 0, .045) * _smooth(gy, -.03, .035)
    if px < .012:  # fibres, which 128 px cannot carry
        fibres = torch.sin(13 * torch.atan2(gy, gx + 1e-6) + f.grain_x + 90 * r)
        rays = rays + .35 * fibres * _smooth(r, .012, .03)
    rays = rays * (1 - .55 * _smooth(r, .78 * f.iris_r, f.iris_r)) * (1 - .3 * under)
    c.paint(f.iris * rays[:, None], ball * _cover(r - f.iris_r, px))
    c.paint(f.ink, ball * _cover(r - .42 * f.iris_r, px))
    wide = max(.011, .6 * px)
    glint = _blob(gx - .016 * f.light_x.sign(), gy + .017, wide, wide)
    c.paint(f.white * 1.2, (.011 / wide) ** 2 * ball * glint)
    # lash line over the ball, thin lower rim, crease of the upper lid
    reach = _cover((t.abs() - 1.04) * f.eye_w, px)
    c.paint(f.lash, .9 * reach * _line(y - upper + .005, .013 + .004 * t.clamp(-1, 1), px))
    c.paint(f.lid, .55 * reach * _line(y - lower - .003, .005, px))
    c.shade(.35 * _line(y - 1.12 * upper + .026, .006, px) * _smooth(t.abs(), 1.15, .6))


def _paint_brows(c, f):
    """Brows of short strands that lean outwards."""
    start, length = _brow_span(f)
    t = (c.x.abs() - start) / length
    middle, thick = _brow(f, t.clamp(0, 1))
    off = c.y - middle
    mask = _line(off, thick, c.px) * _smooth(t, -.04, .06) * _smooth(t, 1.04, .94)
    strands = _texture(c.x + (.9 * off + f.grain_x) * c.x.sign(), c.y, ((60, 5, .35), (110, 5, .35)), c.px)
    c.paint(f.brow * (1 + strands)[:, None], mask * (.88 + .5 * strands.clamp(max=0)))


def _paint_mouth(c, f):
    """Nostrils and nose wings, lips, and between them the dark, the tongue and the teeth."""
    x, y, px = c.x, c.y, c.px
    nx = (x - _nose_shift(f, y)).abs()
    wing = _bell((_ellipse(nx, y - f.nose_y - .035, f.nose_w, .055) / .014) ** 2)
    wing = wing * _smooth(nx, .5 * f.nose_w, f.nose_w) * _smooth(y, f.nose_y - .02, f.nose_y + .03)
    c.shade(.62 * _blob(nx - .42 * f.nose_w, y - f.nose_y - .058, .03, .016) + .26 * wing)
    t = x / _mouth_w(f)
    top, inner_top, inner_bottom, bottom = _lips(f, t.clamp(-1, 1))
    edge, arch = (t.abs() - 1) * _mouth_w(f), (1 - t * t).clamp(min=0)
    below = _smooth(y, inner_bottom - .01, inner_bottom + .01)
    gloss = _blob(x - .05 * f.light_x, y - inner_bottom - .45 * f.lip_low, .1, .018)
    lit = .80 + .10 * f.light_x * t + below * (.25 + .18 * gloss)
    lit = lit + _texture(x + f.grain_x, y, ((60, 6, .1),), px)
    c.paint(f.lips * lit[:, None], .94 * _cover(_meet(top - y, y - bottom, edge), px))
    opened = f.open.clamp(max=1)
    gap = opened * _cover(_meet(inner_top - y, y - inner_bottom, edge), px)
    c.paint(f.throat, gap)
    tongue = _smooth(y, inner_bottom - .035, inner_bottom - .005) * _smooth(t.abs(), .7, .3)
    c.paint(f.tongue, .7 * gap * tongue)
    seams = .22 * _bell((torch.sin(55 * x) / .3) ** 2) * min(max(.057 / px - 2, 0), 1)
    teeth = _cover(y - inner_top - (.024 + .026 * f.smile) * arch.sqrt(), px)
    c.paint(f.enamel * (1 - seams - .35 * t * t).clamp(min=.2)[:, None], gap * teeth)
    c.paint(f.lip_line, (.8 - .5 * opened) * _line(y - inner_top, .007, px) * _cover(edge - .004, px))
    c.shade(.22 * _blob(x.abs() - _mouth_w(f) - .005, y - f.mouth_y + .060 * f.smile + f.mood, .022, .022))


def _paint_hair(c, f, hair, face):
    """The hair in front: the cap and the sides around the opening of the face, and the bangs over it."""
    x, y, px = c.x, c.y, c.px
    peak = f.peak * _bell(((x - .1 * f.part) / .15) ** 2)
    hairline = f.hairline + peak + .10 * (x * f.part).clamp(min=-.05)
    up = (y + .10).clamp(max=0) / (hairline + .10)
    half = f.face_w * .93 + .30 * (y + .10).clamp(min=0)
    opening = (1 - ((x / half) ** 2 + up * up).sqrt()) * half  # < 0 on hair
    opening = opening + .3 * hair.ragged * _smooth(y, .1, -.2)
    end = torch.where(f.tuck > 0, -.02, f.hair_len) + hair.ragged  # tucked behind the ears or hanging down
    cap = _meet(opening, y - end)
    fringe = f.eye_y - .72 * f.brow_gap - .03 - .12 * x * f.part + .12 * x * x + .8 * hair.ragged
    bangs = f.bangs * _cover(_meet(y - fringe, x.abs() - f.face_w), px)
    near = _bell((opening.clamp(min=0) / .05) ** 2) * _smooth(y, .35, -.1)
    below = f.bangs * _bell(((y - fringe).clamp(min=0) / .04) ** 2) * (opening > 0)
    c.shade(face * torch.maximum(.42 * near, .36 * below))
    mask = torch.maximum(_cover(cap, px), bangs) * _cover(hair.distance, px)
    tips = 1 - .25 * bangs * _smooth(y, fringe - .1, fringe)
    c.paint(hair.colour * tips[:, None], mask * (1 - f.hat * _smooth(y, -.40, -.47)))


def _paint_glasses(c, f):
    """Frames between round and square, bridge, temples, and a reflection across both lenses."""
    x, y, px = c.x.abs() - f.eye_x - .012, c.y - f.eye_y - .012, c.px
    p, inner = f.frame_round, f.eye_x + .012 - f.frame_w
    lens = (x.abs() / f.frame_w).clamp(min=1e-3) ** p + (y.abs() / f.frame_h).clamp(min=1e-3) ** p
    lens = (lens ** (1 / p) - 1) * f.frame_h
    streak = _smooth((c.x - f.eye_x * c.x.sign() + .7 * y - f.glare).abs(), .05, .03)
    c.shade(.22 * f.glasses * _line(lens - .025, f.frame_thick, px) * (y > 0))
    c.paint(f.white * 1.1, f.glasses * _cover(lens, px) * (.07 + .30 * streak))
    bridge = _line(y + .02 + .02 * (c.x / inner) ** 2, f.frame_thick, px) * _cover(c.x.abs() - inner, px)
    temple = _meet(f.frame_w - x, c.x.abs() - f.face_w - .01)
    temple = _line(y + .035, .9 * f.frame_thick, px) * _cover(temple, px)
    mask = torch.maximum(torch.maximum(_line(lens, f.frame_thick, px), bridge), temple)
    c.paint(f.frame * (1 - .5 * y)[:, None], mask * f.glasses)


def _paint_hat(c, f, face):
    """A beanie, a cap with a visor or a hat with a brim, on the hat line of the forehead."""
    x, y, px = c.x, c.y, c.px
    kind = f.hat_kind.floor()
    beanie, cap, brimmed = ((kind == i).float() for i in range(3))
    width = f.face_w + .085 + f.hair_vol + .03 * f.wavy
    line = f.hat_line + .12 * (x / width) ** 2
    up = (y - f.hat_line - .05).clamp(max=0) / (.52 + .04 * brimmed)
    crown = (x / width).abs() ** 2.6 + up.abs() ** 2.6
    crown = (crown - 1) * width / 2.6  # good near the edge, where it matters
    knit = .10 * beanie * torch.sin(40 * x / (1.15 - .5 * (y + .45) ** 2))
    seam = .18 * cap * _bell(((x.abs() - .25 * (y + .98).clamp(min=0).sqrt()) / .02) ** 2)
    lit = .95 + .30 * x * f.light_x - .5 * (y + .72) ** 2 + knit - seam
    lit = lit + .05 * _noise(6 * x + f.grain_x, 6 * y)
    c.shade(f.hat * .5 * face * _smooth(y - line, .11 + .08 * cap, 0))
    c.paint(f.felt * lit[:, None], f.hat * _cover(_meet(crown, y - line), px))
    tall = .055 + .025 * brimmed
    band = _cover((y - line + tall).abs() - tall, px) * _cover(crown - .012 * beanie, px)
    c.paint(f.felt * (lit * (.8 - .3 * brimmed) + knit)[:, None], f.hat * (1 - cap) * band)
    vy = y - f.hat_line + .01
    visor = _meet(_ellipse(x, vy, .5, .16), .32 * x * x - vy - .035)
    c.paint(f.felt * (.55 + 1.6 * vy.clamp(0, .3))[:, None], f.hat * cap * _cover(visor, px))
    by = y - f.hat_line - .02 - .10 * x * x
    tone = .88 - 3.5 * by.clamp(-.1, .1) + .2 * x * f.light_x
    c.paint(f.felt * tone[:, None], f.hat * brimmed * _cover(_ellipse(x, by, .86, .075), px))


def _paint(f, size):
    """f of (B, 1, 1) numbers and (B, 3, 1, 1) colours, float32 -> image (B, 3, S, S) in [0, 1]."""
    grid = (torch.arange(size, device=f.roll.device) + .5) * (2 / size) - 1
    screen_x, screen_y = torch.broadcast_tensors(grid - f.shift_x, grid[:, None] - f.shift_y)
    cos, sin = f.roll.cos() / f.scale, f.roll.sin() / f.scale
    x, y = screen_x * cos + screen_y * sin, screen_y * cos - screen_x * sin
    x = x - f.turn * (1 - (x / WARP) ** 2).clamp(min=0)  # the front of the head turns most; see `_landmarks`
    c = _Canvas(x.new_empty(len(x), 3, size, size), x, y, 2 / size)
    hair, rho = _hair_field(c, f), _contour(f, x, y)
    face = _cover((rho - 1) * f.face_w, c.px)
    _paint_background(c, f, screen_x, screen_y)
    _paint_clothes(c.crop(_window(size, 6, 8)), f)
    _paint_back_hair(c, f, hair)
    window = _window(size, 3, 8)
    _paint_neck(c.crop(window), f, rho[window])
    window = _window(size, 1, 8, 1, 7)
    head, eyes = c.crop(window), c.crop(_window(size, 2, 5))
    _paint_head(head, f, rho[window])
    _paint_age(head, f)
    _paint_marks(c.crop(_window(size, 3, 7, 1, 7)), f)
    _paint_eyes(eyes, f)
    _paint_brows(eyes, f)
    _paint_mouth(c.crop(_window(size, 4, 8, 2, 6)), f)
    _paint_hair(c, f, hair, face)
    if f.glasses.any():
        _paint_glasses(eyes, f)
    if f.hat.any():
        top = _window(size, 0, 4)
        _paint_hat(c.crop(top), f, face[top])
    return c.image.clamp_(0, 1)


class ToyFaces(NamedTuple):
    image: torch.Tensor       # (B, 3, S, S) float32 in [-1, 1]
    landmarks: torch.Tensor   # (B, 98, 2) float32 pixels, x first, WFLW order
    attributes: torch.Tensor  # (B, 12) float32, 0 or 1
    identity: torch.Tensor    # (B,) int64


def toy_faces(identity, instance, attributes=None, size=64) -> ToyFaces:
    """Painted portraits with exact landmarks, attributes and identity (DESIGN 5).

    identity, instance: int, list or (B,) int64 tensor, numbers >= 0; a single one is repeated for the other.
        identity decides shape, skin, irises, moles and hair style; instance pose, light, mood, backdrop.
    attributes: (B, 12) in the order of ATTRIBUTES, > 0.5 is on, or None = drawn from (identity, instance).
        One hair colour is on (the first of several, brown of none), one of wavy (first) and straight.
    size: >= 16 pixels. A pure function: no random state is read; a face is the same alone and in a batch.
    ValueError: wrong shapes, negative numbers, a size below 16.
    """
    identity = torch.as_tensor(identity, dtype=torch.int64).reshape(-1)
    instance = torch.as_tensor(instance, dtype=torch.int64, device=identity.device).reshape(-1)
    if size < 16:
        raise ValueError(f"toy_faces wants a size of at least 16 pixels, got {size}")
    if len(identity) != len(instance) and 1 not in (len(identity), len(instance)):
        raise ValueError(f"toy_faces got {len(identity)} identities and {len(instance)} instances")
    identity, instance = (v.contiguous() for v in torch.broadcast_tensors(identity, instance))
    if len(identity) == 0 or min(identity.min(), instance.min()) < 0:
        raise ValueError("toy_faces wants at least one face, and numbers that are not negative")
    who = _hash(identity)
    when = _hash(who + instance)
    if attributes is None:
        attributes = _draw_attributes(when)
    else:
        attributes = torch.as_tensor(attributes, dtype=torch.float64, device=identity.device)
        if attributes.shape != (len(identity), len(ATTRIBUTES)):
            shape = tuple(attributes.shape)
            raise ValueError(f"toy_faces wants ({len(identity)}, 12) attributes, not {shape}")
    attributes = _settle(attributes)
    f = SimpleNamespace(**_dice(who, IDENTITY), **_dice(when, INSTANCE))
    f.smile, f.open = f.smile * attributes[:, SMILING], f.open * attributes[:, OPEN]
    f.old, f.glasses, f.bangs = 1 - attributes[:, YOUNG], attributes[:, GLASSES], attributes[:, BANGS]
    f.wavy, f.hat = attributes[:, WAVY], attributes[:, HAT]
    f.light_x = f.light_x.sign() * (.3 + .5 * f.light_x.abs())  # the light always comes from a side
    landmarks = _landmarks(SimpleNamespace(**{name: v[:, None] for name, v in vars(f).items()}), size)
    vars(f).update(_colours(f, attributes))
    images = []
    step = max(1, 2**16 // size**2)  # faces painted at a time: their layers stay in the cache
    for i in range(0, len(identity), step):
        chunk = {name: v[i:i + step, ..., None, None].float() for name, v in vars(f).items()}
        images.append(_paint(SimpleNamespace(**chunk), size))
    return ToyFaces(torch.cat(images) * 2 - 1, landmarks.float(), attributes.float(), identity)


# ------------------------------------------------------------------------------------------------ degradation

@dataclass(frozen=True)
class Degradation:
    """Ranges of lq = { JPEG_q( (hq * k_sigma) down_r + n_delta ) } up_r, each drawn uniformly per image.

    `blur` and `down` are lengths in pixels of a 512 px image and scale with the image, so that the thumbnail in the
    middle has the same number of pixels, 512 / r, at every image size (r < 1 enlarges it a little before the noise).
    """
    source: str                            # where the numbers come from
    blur: tuple = (1.0, 15.0)              # sigma of the Gaussian kernel, pixels at 512
    down: tuple = (4.0, 30.0)              # r: the thumbnail has 512 / r pixels a side
    noise: tuple = (0.0, 20.0)             # delta: standard deviation of the colour noise, of 255
    jpeg: tuple = (30, 80)                 # q: JPEG quality, whole numbers, both ends included
    kernel: int = 41                       # side of the blur kernel, pixels at 512
    isotropic: float = 0.5                 # share of round kernels; the others have two sigmas and an angle
    kinds: tuple = ("gaussian",)           # one is drawn: gaussian, average, median, motion
    blur_share: float = 1.0                # share of images that are blurred, get noise, get JPEG
    noise_share: float = 1.0
    jpeg_share: float = 1.0
    jitter: float = 0.0                    # share whose channels are each shifted by up to 20 / 255
    grey: float = 0.0                      # share turned grey, lq and hq alike


DEGRADATIONS = {
    # DIFFERS: q is drawn with its upper end, which int(uniform) of DifFace and Pref-Restore never reaches; 8 bits are
    # rounded, Pref-Restore truncates; GFPGAN also changes colours by a random matrix, here it shifts them only.
    "codeformer": Degradation("CodeFormer stage 2 training file"),
    "gfpgan": Degradation("GFPGAN v1 training file; made CelebA-Test", (0.1, 10), (0.8, 8), (0, 20), (60, 100),
                          jitter=0.3, grey=0.01),
    "difface": Degradation("DifFace, taken over by PMRF", (0.1, 15), (0.8, 32), (0, 20), (30, 100), grey=0.01),
    "pref_restore": Degradation("Pref-Restore training script", (1, 15), (1, 30), (0, 20), (30, 90)),
    "vqfr2": Degradation("VQFR v2", (1, 15), (1, 30), (0, 20), (30, 90)),
    "vqfr1": Degradation("VQFR v1: GFPGAN without colour changes", (0.1, 10), (0.8, 8), (0, 20), (60, 100)),
    # DIFFERS: the release resizes by a random interpolation and half of its noise is grey; here as everywhere.
    "a2bfr": Degradation("A2BFR release, condition helper", (3, 15), (16, 16), (0, 25.5), (35, 90), isotropic=1.0,
                         kinds=("gaussian", "average", "median", "motion"),
                         blur_share=0.5, noise_share=0.2, jpeg_share=0.7),
    # So little is left of a face that a reference can say who it is, or a prompt what it looks like, without
    # contradicting what is seen, as on the heavily degraded photographs of these papers.
    "thumbnail": Degradation("toy preset of honestface.py: 16 to 32 pixels, noise", (1, 15), (16, 32), (30, 60),
                             (40, 90)),
    "noisy": Degradation("toy preset of a2bfr.py and pref_restore.py: 32 to 64 pixels, strong noise", (1, 15), (8, 16),
                         (50, 90), (40, 90)),
}


def blur_kernel(kind: str, side: int, sigma_x: float, sigma_y: float, angle: float) -> torch.Tensor:
    """(side, side) weights that sum to 1. gaussian: exp(-d^T C^-1 d / 2) with C = R diag(sigma^2) R^T, in pixels."""
    half = side // 2
    y, x = torch.meshgrid(*[torch.arange(-half, half + 1, dtype=torch.float32)] * 2, indexing="ij")
    along, across = math.cos(angle) * x + math.sin(angle) * y, math.cos(angle) * y - math.sin(angle) * x
    if kind == "gaussian":
        weights = torch.exp(-0.5 * ((along / sigma_x) ** 2 + (across / sigma_y) ** 2))
    elif kind == "motion":                                        # a line of length `side` at the angle, one pixel wide
        weights = (1 - across.abs()).clamp(min=0) * (along.abs() <= half)
    else:
        weights = torch.ones_like(x)
    return weights / weights.sum()


def jpeg(image: torch.Tensor, quality: int) -> torch.Tensor:
    """(3, H, W) in [0, 1] through an 8-bit JPEG file in memory (4:2:0, Pillow's default)."""
    file = io.BytesIO()
    to_pil(image * 2 - 1).save(file, format="JPEG", quality=int(quality))
    return from_pil(Image.open(file)) / 2 + 0.5


def degrade_one(hq: torch.Tensor, spec: Degradation, seed: int) -> tuple:
    """One image (3, S, S) in [-1, 1] -> (lq, hq); hq differs from the input only where the pair turns grey."""
    rng = torch.Generator().manual_seed(int(seed))                # always on the CPU: the same draws on any device
    uniform = lambda low, high: low + (high - low) * torch.rand((), generator=rng).item()
    size, unit, device = hq.shape[-1], hq.shape[-1] / 512, hq.device
    kind = spec.kinds[int(uniform(0, len(spec.kinds)))]
    sigma_x, sigma_y, angle = uniform(*spec.blur), uniform(*spec.blur), uniform(-math.pi, math.pi)
    round_kernel, blurred = uniform(0, 1) < spec.isotropic, uniform(0, 1) < spec.blur_share
    thumbnail = int(512 / uniform(*spec.down))
    delta = uniform(*spec.noise) / 255 * (uniform(0, 1) < spec.noise_share)
    quality, compressed = int(uniform(spec.jpeg[0], spec.jpeg[1] + 1)), uniform(0, 1) < spec.jpeg_share
    shift = (2 * torch.rand(3, 1, 1, generator=rng) - 1) * 20 / 255 * (uniform(0, 1) < spec.jitter)
    grey = uniform(0, 1) < spec.grey

    x = hq * 0.5 + 0.5
    if blurred:
        # A kernel of 41 at 512 px, or as wide as its sigma for the box kinds, never narrower than 3.
        side = spec.kernel if kind == "gaussian" else sigma_x * (1.7 if kind == "motion" else 1)
        side = max(3, 2 * round((side * unit - 1) / 2) + 1)
        if kind == "median":
            x = from_pil(to_pil(x * 2 - 1).filter(ImageFilter.MedianFilter(side))).to(device) / 2 + 0.5
        else:
            weights = blur_kernel(kind, side, sigma_x * unit, (sigma_x if round_kernel else sigma_y) * unit, angle)
            padded = F.pad(x[:, None], [side // 2] * 4, mode="reflect")      # the border rule of cv2.filter2D
            x = F.conv2d(padded, weights.to(device)[None, None])[:, 0]
    x = F.interpolate(x[None], (thumbnail, thumbnail), mode="bilinear", align_corners=False)[0]  # no antialias, as cv2
    x = (x + delta * torch.randn(x.shape, generator=rng).to(device)).clamp(0, 1)
    if compressed:
        x = jpeg(x, quality).to(device)
    x = F.interpolate(x[None], (size, size), mode="bilinear", align_corners=False)[0] + shift.to(device)
    if grey:
        luma = torch.tensor([0.299, 0.587, 0.114], device=device).view(3, 1, 1)
        x, hq = (x * luma).sum(0).expand(3, -1, -1), (hq * luma).sum(0).expand(3, -1, -1)
    return (x.clamp(0, 1) * 255).round() / 127.5 - 1, hq          # 8 bits, as if read from a file


def degrade_pair(hq: torch.Tensor, spec: Degradation, seeds) -> tuple:
    """(B, 3, S, S) in [-1, 1] -> (lq, hq), both (B, 3, S, S): what a training step wants. See `degrade`."""
    if hq.dim() != 4 or hq.shape[1] != 3 or hq.shape[2] != hq.shape[3]:
        raise ValueError(f"degrade wants square images (B, 3, S, S), got {tuple(hq.shape)}")
    if len(seeds) != len(hq):
        raise ValueError(f"degrade wants one seed per image: {len(hq)} images, {len(seeds)} seeds")
    pairs = [degrade_one(image, spec, seed) for image, seed in zip(hq, seeds)]
    return torch.stack([lq for lq, _ in pairs]), torch.stack([clean for _, clean in pairs])


def degrade(hq: torch.Tensor, spec: Degradation, seeds) -> torch.Tensor:
    """lq = { JPEG_q( (hq * k_sigma) down_r + n_delta ) } up_r   [Latent-PMRF sec. 4; A2BFR suppl.; Pref-Restore Eq. 16]

    hq (B, 3, S, S) in [-1, 1] on any device, spec a `Degradation`, seeds B integers -> lq, same shape, 8-bit values
    in [-1, 1]. Image i depends on (hq[i], spec, seeds[i]) alone, so any test set can be rebuilt from its seeds.
    Never grey: hq stays in colour, and a grey lq beside it would teach to guess colours; `degrade_pair` turns both.
    """
    return degrade_pair(hq, dataclasses.replace(spec, grey=0.0), seeds)[0]


# ------------------------------------------------------------------------------------------------ pictures

FFHQ_512 = ((192.98138, 239.94708), (318.90277, 240.1936), (256.63416, 314.01935),
            (201.26117, 371.41043), (313.08905, 371.15118))


def to_pil(image: torch.Tensor) -> Image.Image:
    """(3, H, W) in [-1, 1] -> an 8-bit RGB picture."""
    array = (image.detach().float().clamp(-1, 1) * 127.5 + 127.5).round().byte()
    return Image.fromarray(array.permute(1, 2, 0).cpu().numpy())


def from_pil(picture: Image.Image) -> torch.Tensor:
    """A picture of any mode -> (3, H, W) float32 in [-1, 1]."""
    if picture.mode.startswith("I") or picture.mode == "F":       # 16-bit and float grey: Pillow would clip at 255
        grey = np.asarray(picture, dtype=np.float32)
        if not np.isfinite(grey).all():
            raise ValueError("it holds values that are not finite")
        tops = {"F": (1, 255, 65535), "I": (255, 65535, 2 ** 32 - 1)}.get(picture.mode, (65535,))
        over = 1.5 if picture.mode == "F" else 1                  # floats may overshoot what they call white
        top = next((top for top in tops if grey.max() <= over * top), tops[-1])
        picture = Image.fromarray((grey / top * 255).clip(0, 255).round().astype(np.uint8))
    if picture.mode == "P":                                       # a palette may hold transparency
        picture = picture.convert("RGBA")
    return torch.from_numpy(np.array(picture.convert("RGB"))).permute(2, 0, 1).float() / 127.5 - 1


def list_images(path, recursive: bool = False) -> list:
    """Files with a suffix that Pillow knows: [path] itself, or those in the folder, sorted. UserError if none."""
    path = Path(path)
    if path.is_file():
        return [path]
    if not path.is_dir():
        raise UserError(f"{path}: no such file or folder")
    # what Pillow can only write, or only recognise
    never = {"PDF", "PALM", "MPEG", "HDF5", "BUFR", "GRIB", "EPS", "WMF", "FITS"}
    known = {suffix for suffix, kind in Image.registered_extensions().items() if kind in Image.OPEN.keys() - never}
    seen, found = set(), []
    for folder, inside, files in os.walk(path, followlinks=True):
        if (real := os.path.realpath(folder)) in seen or not recursive and seen:  # a link to a folder above, or below
            inside.clear()
            continue
        seen.add(real)
        if recursive and len(seen) > 1 and {"log.jsonl", "args.json", "pairs.jsonl"} & set(files):
            inside.clear()                                        # results of this project are no data
            continue
        found += [Path(folder, name) for name in files if Path(name).suffix.lower() in known and name[0] != "."]
    found = sorted(p for p in found if p.is_file())
    if not found:
        raise UserError(f"{path}: no pictures in this folder (looked for png, jpg, webp, bmp, tiff ...)")
    return found


def read_image(path, size: int | None = None) -> torch.Tensor:
    """Any picture that Pillow reads -> (3, H, W) in [-1, 1], turned by its EXIF flag, squared to `size` if given."""
    try:
        with Image.open(path) as file:
            file.load()                                           # raises where the pixels are damaged
            try:
                picture = ImageOps.exif_transpose(file)
            except Exception:                                     # damaged EXIF of a picture that is whole
                picture = file
            image = from_pil(picture)
    except Exception as error:                                    # Pillow raises many kinds, SyntaxError among them
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(f"{path}: not a readable picture ({reason.replace(repr(str(path)), 'it')})") from None
    return image if size is None else resize(image, size)


def resize(image: torch.Tensor, size: int) -> torch.Tensor:
    """(3, H, W) -> (3, size, size), bicubic, antialiased when it shrinks (FFHQ's own way from 1024 to 512)."""
    if image.shape[-2:] == (size, size):
        return image
    return F.interpolate(image[None], (size, size), mode="bicubic", antialias=True, align_corners=False)[0].clamp(-1, 1)


@contextmanager
def whole_file(path):
    """Write to a temporary neighbour, flush, rename: `path` holds the old content or the new one, never half of it."""
    path = Path(path)
    temporary = path.with_name(f".{path.name[:60]}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.suffix in (".pt", ".safetensors") and Path("/proc").exists():  # left by a process killed while writing
            for left in path.parent.glob(f".{path.name[:60]}.*.tmp"):
                if not Path("/proc", left.suffixes[-2][1:]).exists():
                    left.unlink(missing_ok=True)
        yield temporary
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        mask = os.umask(0)
        os.umask(mask)
        os.chmod(temporary, 0o666 & ~mask)                        # safetensors writes files for their owner alone
        os.replace(temporary, path)
    except (OSError, RuntimeError, SafetensorError) as error:     # torch and safetensors word a full disk differently
        raise UserError(f"{path}: cannot be written ({first_line(error)}); what was there is unchanged. "
                        "Free space or choose another --output") from None
    finally:
        try:
            temporary.unlink(missing_ok=True)
        except OSError:
            pass


def write_image(path, image: torch.Tensor) -> None:
    """(3, H, W) in [-1, 1] to an 8-bit PNG."""
    with whole_file(path) as temporary:
        to_pil(image).save(temporary, format="PNG")


def write_json(path, content) -> None:
    with whole_file(path) as temporary:
        temporary.write_text(json.dumps(content, indent=1, default=str) + "\n")


def write_grid(path, columns: dict, rows: int = 8, cell: int = 128) -> None:
    """A table of pictures: {title: (N, 3, S, S) in [-1, 1]}, one row per face, small ones enlarged, not smoothed."""
    titles, rows = list(columns), min(rows, *(len(c) for c in columns.values()))
    side = max(cell, max(c.shape[-1] for c in columns.values()))
    sheet = Image.new("RGB", (len(titles) * (side + 4) + 4, rows * (side + 4) + 20), "white")
    draw = ImageDraw.Draw(sheet)
    for x, title in enumerate(titles):
        draw.text((x * (side + 4) + 6, 5), title, fill="black")
        for y in range(rows):
            sheet.paste(to_pil(columns[title][y]).resize((side, side), Image.NEAREST),
                        (x * (side + 4) + 4, y * (side + 4) + 20))
    with whole_file(path) as temporary:
        sheet.save(temporary, format="PNG")


def write_curve(path, curves: dict) -> None:
    """One panel per curve {name: [(step, value), ...]}; logarithmic when all values are positive."""
    width, height, per_row = 480, 260, 4
    rows, columns = max(1, -(-len(curves) // per_row)), max(1, min(len(curves), per_row))
    sheet = Image.new("RGB", (width * columns, height * rows), "white")
    draw = ImageDraw.Draw(sheet)
    for panel, (name, points) in enumerate(curves.items()):
        x, y = width * (panel % per_row), height * (panel // per_row)
        left, top, right, bottom = x + 62, y + 24, x + width - 12, y + height - 26
        log = all(v > 0 for _, v in points)
        values = [math.log10(v) if log else v for _, v in points]
        low, high = min(values), max(max(values), min(values) + 1e-9)
        place = lambda step, v: (left + (right - left) * step / max(1, points[-1][0]),
                                 bottom - (bottom - top) * (v - low) / (high - low))
        draw.rectangle((left, top, right, bottom), outline="gray")
        draw.text((left, y + 6), f"{name}{' (log scale)' if log else ''}", fill="black")
        for share in (0, 0.5, 1):
            level = low + share * (high - low)
            draw.text((x + 4, place(0, level)[1] - 6), f"{10 ** level if log else level:.3g}", fill="black")
        draw.text((right - 60, bottom + 6), f"step {points[-1][0]}", fill="black")
        draw.line([place(step, v) for (step, _), v in zip(points, values)], fill=(30, 90, 170), width=2)
    with whole_file(path) as temporary:
        sheet.save(temporary, format="PNG")


def similarity(source, target) -> torch.Tensor:
    """The (2, 3) matrix of rotation, scale and shift that takes source (K, 2) nearest to target (K, 2) [Umeyama 1991].

    With complex numbers the least-squares fit of target = a * source + b is one division. Raises UserError where all
    source points coincide. DIFFERS: facexlib drops outliers (LMEDS); on exact points the two are equal.
    """
    p = torch.view_as_complex(torch.as_tensor(source, dtype=torch.float64).contiguous())
    q = torch.view_as_complex(torch.as_tensor(target, dtype=torch.float64).contiguous())
    centred = p - p.mean()
    spread = centred.abs().square().sum()
    if not spread > 1e-9:
        raise UserError("the five points of a face coincide: give five different (x, y) pairs")
    a = (centred.conj() * (q - q.mean())).sum() / spread
    b = q.mean() - a * p.mean()
    return torch.tensor([[a.real, -a.imag, b.real], [a.imag, a.real, b.imag]])


def warp(image: torch.Tensor, matrix: torch.Tensor, height: int, width: int, fill) -> torch.Tensor:
    """Picture (C, H, W) seen through `matrix` as (C, height, width).

    `matrix` (2, 3) takes image pixels to output pixels; `fill` (C,) is what lies outside.
    """
    full = torch.cat([matrix, matrix.new_tensor([[0, 0, 1]])])
    scale = full[:2, :2].det().abs().sqrt().item()
    if scale < 1:                                                 # shrink first, with antialias, then sample one to one
        h, w = max(1, round(image.shape[1] * scale)), max(1, round(image.shape[2] * scale))
        full = full @ torch.diag(full.new_tensor([image.shape[2] / w, image.shape[1] / h, 1]))
        image = F.interpolate(image[None], (h, w), mode="bicubic", antialias=True, align_corners=False)[0]
    ys, xs = torch.meshgrid(torch.arange(height) + 0.5, torch.arange(width) + 0.5, indexing="ij")
    source = torch.stack([xs, ys, torch.ones_like(xs)], -1).double() @ torch.linalg.inv(full)[:2].T      # (h, w, 2)
    grid = (source / source.new_tensor([image.shape[2], image.shape[1]]) * 2 - 1).float().to(image)
    inside = F.grid_sample(torch.ones_like(image[None, :1]), grid[None], align_corners=False)[0]
    fill = torch.as_tensor(fill, dtype=image.dtype, device=image.device).view(-1, 1, 1)
    seen = F.grid_sample(image[None], grid[None], mode="bicubic", padding_mode="border", align_corners=False)[0]
    return seen.clamp(-1, 1) * inside + fill * (1 - inside)


def align_face(image: torch.Tensor, five_points, size: int = 512) -> tuple:
    """Cut a face out of a photo to the 512 px FFHQ template scaled to `size` [facexlib's five-point template].

    image (3, H, W) in [-1, 1]; five_points (5, 2) pixels: left eye, right eye, nose, left and right mouth corner, left
    meaning smaller x. Returns (face (3, size, size), transform (2, 3) float64 from photo to face pixels); the face is
    grey outside the photo.
    """
    points = torch.as_tensor(five_points, dtype=torch.float64)
    if points.shape != (5, 2) or not points.isfinite().all():
        raise UserError(f"a face needs five finite (x, y) points, got shape {tuple(points.shape)}")
    transform = similarity(points, torch.tensor(FFHQ_512, dtype=torch.float64) * size / 512)
    return warp(image, transform, size, size, [v / 127.5 - 1 for v in (132, 133, 135)]), transform  # facexlib's grey


def paste_face(photo: torch.Tensor, restored: torch.Tensor, transform: torch.Tensor) -> torch.Tensor:
    """Put a restored face (3, S, S) back where `align_face` took it from, its border feathered over S / 12 pixels."""
    size, (height, width) = restored.shape[-1], photo.shape[-2:]
    ramp = ((torch.minimum(torch.arange(size), torch.arange(size).flip(0)) + 0.5) / (size / 12)).clamp(max=1)
    mask = (ramp[:, None] * ramp[None])[None] * 2 - 1             # (1, S, S) in [-1, 1], as warp expects
    full = torch.cat([transform, transform.new_tensor([[0, 0, 1]])])
    back = torch.linalg.inv(full)[:2]
    weight = warp(mask.to(photo), back, height, width, [-1.0]) * 0.5 + 0.5
    return photo * (1 - weight) + warp(restored.to(photo), back, height, width, [0.0] * 3) * weight


# ------------------------------------------------------------------------------------------------ data

class Faces:
    """Aligned faces of the toy world (data="") or of a folder, as batches that depend on (seed, step, rank) alone.

    A folder's sub-folders are identities. `validation` names a second folder of held-out faces; without it the last
    people of the sorted sub-folders, about a tenth of the files (at most 200), are kept from training; of a folder
    without sub-folders the last files are. `mirror` flips half of the training faces.
    """

    def __init__(self, data: str, size: int, validation: str = "", mirror: bool = True):
        self.size, self.cache, self.skipped, self.mirror = size, {}, set(), mirror
        self.files = list_images(data, recursive=True) if data else []
        if data and Path(data).is_file():
            raise UserError(f"--data {data}: is a file; give a folder of aligned faces")
        held = min(200, max(1, len(self.files) // 10))
        if self.files and len({path.parent for path in self.files}) > 1:      # whole people, not their last pictures
            first = self.files[-held].parent
            start = next(i for i, path in enumerate(self.files) if path.parent == first)
            held = len(self.files) - (start or held)              # a last person who is all there is: pictures after all
        self.held_out_files = list_images(validation, recursive=True) if validation else self.files[-held:]
        kept = {path.resolve() for path in self.held_out_files}     # also where they lie inside of --data
        self.files = [path for path in self.files if path.resolve() not in kept]
        if data and not self.files:
            raise UserError(f"--data {data}: no picture is left to train on, all are held out; add pictures, or give "
                            f"{'another ' if validation else ''}--validation_data")
        names = sorted({str(p.parent) for p in self.files + self.held_out_files})
        self.person = {name: number for number, name in enumerate(names)}

    def load(self, path) -> torch.Tensor:
        """A file as (3, S, S); kept in memory as bytes, since small training sets are read hundreds of times."""
        if path not in self.cache:
            image = ((read_image(path, self.size) + 1) * 127.5).round().byte()
            if len(self.cache) * image.numel() > 2 ** 31:
                return image / 127.5 - 1
            self.cache[path] = image
        return self.cache[path] / 127.5 - 1

    def readable(self, path) -> bool:
        try:
            return self.load(path) is not None
        except UserError:
            return False

    def read(self, paths, seeds) -> dict:
        """hq, identity, seeds, paths of the files that can be read; the others are named and left out."""
        images, people, kept, read = [], [], [], []
        for path, seed in zip(paths, seeds):
            try:
                images.append(self.load(path))
                people.append(self.person[str(path.parent)])
                kept.append(seed)
                read.append(path)
            except UserError as error:
                if path not in self.skipped:                       # once, not every epoch
                    print(f"skipped: {error}", flush=True)
                self.skipped.add(path)
        if not images:
            raise UserError(f"none of {len(paths)} pictures could be read, the last one {paths[-1]}; check --data")
        return dict(hq=torch.stack(images), identity=torch.tensor(people), seeds=torch.stack(kept), paths=read)

    def training(self, batch_size: int, seed: int, step: int, rank: int = 0, world: int = 1) -> dict:
        """The batch of one (step, rank): hq (B, 3, S, S), identity (B,), seeds (B,) for `degrade`.

        The toy world adds its labels.
        """
        rng = torch.Generator().manual_seed(mix("faces", seed, step, rank))
        seeds = torch.randint(2 ** 40, (batch_size,), generator=rng)
        if not self.files:
            people = torch.randint(len(TOY_SPLITS["train"]), (batch_size,), generator=rng) + TOY_SPLITS["train"].start
            faces = toy_faces(people, seeds, size=self.size)
            return dict(hq=faces.image, identity=faces.identity, attributes=faces.attributes,
                        landmarks=faces.landmarks, seeds=seeds)
        places = (step * world + rank) * batch_size + torch.arange(batch_size)  # position in an endless row of epochs
        orders = {e: torch.randperm(len(self.files), generator=torch.Generator().manual_seed(mix("epoch", seed, e)))
                  for e in set((places // len(self.files)).tolist())}
        paths = [self.files[orders[p // len(self.files)][p % len(self.files)]] for p in places.tolist()]
        try:
            batch = self.read(paths, seeds)
        except UserError:                                         # a batch of damaged pictures: the nearest whole one
            turn = self.files[self.files.index(paths[0]):] + self.files
            whole = next((path for path in turn if self.readable(path)), None)
            if whole is None:
                raise
            batch = self.read([whole], seeds[:1])
        flip = (batch["seeds"] % 2 == 0).view(-1, 1, 1, 1) & self.mirror
        return dict(batch, hq=torch.where(flip, batch["hq"].flip(-1), batch["hq"]), flipped=flip.flatten())

    def held_out(self, count: int, split: str = "test") -> dict:
        """`count` faces never trained on, always the same; `split` "val" or "test" (a folder has one held-out set)."""
        seeds = torch.arange(count) + mix("held out", split)
        if not self.held_out_files:
            people = TOY_SPLITS[split].start + torch.arange(count)
            faces = toy_faces(people, torch.zeros(count, dtype=torch.long), size=self.size)
            return dict(hq=faces.image, identity=faces.identity, attributes=faces.attributes,
                        landmarks=faces.landmarks, seeds=seeds)
        return self.read(self.held_out_files[:count], seeds)


def at_once(size: int) -> int:
    """Faces of `size` px to restore and measure together: 32 toy faces, 2 of 512 px, whose decoding takes memory."""
    return max(1, min(32, 32 * 128 ** 2 // size ** 2))


def random_crop(x: torch.Tensor, side: int) -> torch.Tensor:
    """(B, C, H, W) -> (B, C, side, side), a place of its own for every image; smaller sides stay as they are."""
    place = [torch.randint(max(1, n - side + 1), (len(x),)).tolist() for n in x.shape[-2:]]
    return torch.stack([image[:, top:top + side, left:left + side] for image, top, left in zip(x, *place)])


class Endless(torch.utils.data.Dataset):
    """A function of the batch number as a data set: DataLoader's workers can run ahead without changing anything."""

    def __init__(self, batch_at):
        self.batch_at = batch_at

    def __getitem__(self, number: int):
        try:
            return self.batch_at(number)
        except UserError as error:  # a worker would wrap it into its traceback
            return error


def leave_group(worker: int) -> None:
    """In a loader's process: Ctrl-C and what else is sent to the whole group is for the main one, which saves."""
    os.setsid()


# ------------------------------------------------------------------------------------------------ run plumbing

def pick_device(name: str) -> torch.device:
    """auto -> cuda, mps or cpu, in this order; under torchrun each process takes its own GPU."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        device = torch.device(name)
        if device.type == "cuda":
            device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", device.index or 0)))
        torch.zeros(1, device=device).item()                      # `meta` computes nothing
    except (RuntimeError, AssertionError, ImportError) as error:
        raise UserError(f"--device {name}: not usable here ({str(error).splitlines()[0]}); try --device cpu") from None
    return device


def not_half(x: torch.Tensor):
    """For autoencoders, which overflow inside an fp16 autocast: they run in float32 there. bf16 is fine."""
    kind = x.device.type
    half = torch.get_autocast_dtype(kind) is torch.float16
    return torch.autocast(kind, enabled=torch.is_autocast_enabled(kind) and not half)


def pick_precision(name: str, device: torch.device) -> str:
    """no, bf16 or fp16; `auto` is bf16 where the processor multiplies it, which is about twice as fast."""
    if name != "auto":
        return name
    if device.type == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "no"
    able = device.type == "cpu" and getattr(torch.cpu, "_is_avx512_bf16_supported", bool)()
    return "bf16" if able else "no"


@functools.cache
def cpu_attention_in_float32():
    """From here on a CPU's autocast runs attention in float32: its bf16 gradient took nine times as long (torch 2.14).

    Replaces autocast's rule for the operator, so that networks of diffusers and transformers follow as well. The rule
    lives as long as the result, which the cache keeps.
    """
    def attention(query, key, value, attn_mask=None, *rest, **options):
        mask = attn_mask.float() if attn_mask is not None and attn_mask.is_floating_point() else attn_mask
        with torch.autocast("cpu", enabled=False):
            return F.scaled_dot_product_attention(query.float(), key.float(), value.float(), mask, *rest, **options)

    library = torch.library.Library("aten", "IMPL")
    with warnings.catch_warnings():                               # that there was another rule
        warnings.simplefilter("ignore")
        library.impl("scaled_dot_product_attention", attention, "AutocastCPU")
    return library


# Flags that say where and how a run is made, not what it makes.
IDLE_FLAGS = ("output", "overwrite", "resume_from_checkpoint", "device", "num_workers", "log_steps", "checkpointing_steps",
              "checkpointing_epochs")


RUN_FILES = ("state.pt", "model.safetensors", "log.jsonl", "config.json", "metrics.json")


class Run:
    """One process of a run: where it computes, in which precision, with which seed, and where it writes.

    `cfg` has the fields output, device, mixed_precision, seed; under torchrun the processes find each other here.
    With `fresh`, a folder that holds an earlier run is refused, unless --overwrite is given: then its files go when
    the new run writes its first line.
    """

    def __init__(self, cfg, fresh: bool = False):
        self.cfg, self.folder, self.started, self.resumed = cfg, Path(cfg.output), time.time(), False
        self.fresh = fresh
        self.former: list = []                                    # parts that --stage NAME trains, perhaps once more
        self.rank, self.world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
        self.device = pick_device(cfg.device)
        self.precision = pick_precision(cfg.mixed_precision, self.device)
        if self.device.type == "cpu" and self.precision != "no":
            cpu_attention_in_float32()
        if self.world > 1 and not dist.is_initialized():
            if self.device.type == "cuda":
                torch.cuda.set_device(self.device)
            dist.init_process_group("nccl" if self.device.type == "cuda" else "gloo",
                                    timeout=timedelta(hours=2))   # the others wait while rank 0 saves and measures
        torch.manual_seed(cfg.seed)                               # the same initial weights in every process
        torch.set_float32_matmul_precision("high")                # TF32 on GPUs that have it; nothing changes on a CPU
        torch.backends.cuda.enable_cudnn_sdp(False)               # its gradients were NaN for A2BFR's toy (torch 2.11)
        earlier = [name for name in RUN_FILES if (self.folder / name).exists()]
        if fresh and earlier and not getattr(cfg, "overwrite", False):
            raise UserError(f"--output {self.folder}: holds another run ({earlier[0]}); go on with it by "
                            "--resume_from_checkpoint latest, replace it by --overwrite, or choose another folder")
        if not fresh:                                             # else `start_log` does, when all flags are known good
            self.make_folder()

    def drop_former(self) -> None:
        """At the first step of --stage NAME: until it is done, what an earlier training of it left does not count.

        `self.former` leaves the `finished` of config.json, and state.pt, of this stage or of one that stands on it,
        becomes state_before.pt: after an interruption --resume_from_checkpoint takes neither for the new training.
        """
        path, state, former = self.folder / "config.json", self.folder / "state.pt", self.former
        self.former = []
        if not (self.main and former):
            return
        if path.exists():
            config = json.loads(path.read_text())
            write_json(path, dict(config, finished=[name for name in config.get("finished", []) if name not in former]))
        if state.exists():
            self.say(f"{state} is of an earlier training: kept as {state.replace(self.folder / 'state_before.pt')}")

    @property
    def main(self) -> bool:
        return self.rank == 0

    def say(self, text: str) -> None:
        if self.main:
            tqdm.write(text) if sys.stdout.isatty() else print(text, flush=True)

    def autocast(self):
        dtype = {"no": None, "bf16": torch.bfloat16, "fp16": torch.float16}[self.precision]
        return torch.autocast(self.device.type, dtype, enabled=dtype is not None)

    def log(self, **row) -> None:
        """One line of log.jsonl."""
        if self.main:
            try:
                with open(self.folder / "log.jsonl", "a") as file:
                    file.write(json.dumps(row, default=str) + "\n")
            except OSError as error:
                raise UserError(f"{self.folder}/log.jsonl: cannot be written ({error.strerror}); free space, then "
                                "--resume_from_checkpoint latest") from None

    def make_folder(self) -> None:
        """Make --output, empty of an earlier run's files where this one is `fresh`. UserError where that cannot be."""
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            if self.fresh and self.main:
                for name in RUN_FILES:
                    (self.folder / name).unlink(missing_ok=True)
        except OSError as error:
            raise UserError(f"--output {self.folder}: cannot be used ({error.strerror}); "
                            "choose another folder") from None

    def start_log(self) -> None:
        """First line of every run: the command, its settings and the versions, enough to repeat it."""
        self.lock()
        if self.fresh:
            self.make_folder()
            self.lock()
            if self.world > 1:
                dist.barrier()
        self.log(argv=sys.argv, config=dataclasses.asdict(self.cfg), **versions(self.device), world=self.world)

    def lock(self) -> None:
        """Until this process ends, --output is its own: a second training there is refused, not mixed in."""
        try:
            import fcntl
        except ImportError:                                       # Windows
            return
        if self.main and self.folder.is_dir():
            self.locked = open(self.folder / ".lock", "w")
            try:
                fcntl.lockf(self.locked, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except (BlockingIOError, PermissionError):
                raise UserError(f"--output {self.folder}: another training is writing there; choose another") from None
            except OSError:                                       # a file system without locks
                pass

    def account(self, nets: dict) -> dict:
        """What metrics.json says of a run: seconds since its start, peak memory, parameters of each network."""
        parameters = {name: sum(p.numel() for p in net.parameters()) for name, net in nets.items()
                      if isinstance(net, nn.Module)}
        return dict(seconds=round(time.time() - self.started, 1), peak_memory_gb=round(self.peak_memory_gb(), 2),
                    parameters=parameters)

    def peak_memory_gb(self) -> float:
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device) / 2 ** 30
        try:
            import resource
        except ImportError:                                       # Windows
            return 0.0
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2 ** 30 if sys.platform == "darwin" else 2 ** 20)


def versions(device) -> dict:
    """What a number was measured with: torch, python, device, and the commit of this file ("" outside a clone)."""
    device = torch.device(device)
    cuda = device.type == "cuda"
    name = torch.cuda.get_device_name(device) if cuda else f"{device.type}, {torch.get_num_threads()} threads"
    try:
        commit = subprocess.run(["git", "-C", Path(__file__).resolve().parent, "describe", "--always", "--dirty"],
                                capture_output=True, text=True).stdout.strip()
    except OSError:  # no git here
        commit = ""
    return dict(torch=torch.__version__, python=sys.version.split()[0], device=name, commit=commit)


class Muon(torch.optim.Optimizer):
    """Momentum made orthogonal for matrices and kernels, Adam for biases and gains [Jordan et al. 2024].

    All directions of a matrix learn at the same speed: the toy networks need half the time of AdamW. The update has
    the root mean square of Adam's, so AdamW's learning rates and weight decay hold [factor 0.2 sqrt(longer side),
    arXiv 2502.16982]. torch.optim.Muon takes two-dimensional parameters only.
    """

    def __init__(self, params, lr=1e-3, momentum=0.95, betas=(0.9, 0.95), weight_decay=0.01, matrices=True):
        defaults = dict(lr=lr, momentum=momentum, betas=betas, weight_decay=weight_decay, matrices=matrices)
        super().__init__(params, defaults)

    @torch.no_grad()
    def step(self):
        precision = torch.get_float32_matmul_precision()
        torch.set_float32_matmul_precision("highest")             # `orthogonalised` squares rounding errors: no TF32
        for group in self.param_groups:
            learning = [p for p in group["params"] if p.grad is not None]
            matrices = [p for p in learning if p.ndim > 1 and group["matrices"]]
            vectors = [p for p in learning if p.ndim < 2 or not group["matrices"]]
            if learning:
                torch._foreach_mul_(learning, 1 - group["lr"] * group["weight_decay"])
            if vectors:
                adam_update(vectors, [self.state[p] for p in vectors], group["lr"], group["betas"])
            if matrices:
                self.muon_update(matrices, group["lr"], group["momentum"])
        torch.set_float32_matmul_precision(precision)

    def muon_update(self, parameters, lr: float, momentum: float) -> None:
        """One step of Muon on matrices and kernels, in place."""
        for p in parameters:
            if not self.state[p]:
                self.state[p]["momentum"] = torch.zeros_like(p)
        gradients, momenta = [p.grad for p in parameters], [self.state[p]["momentum"] for p in parameters]
        torch._foreach_lerp_(momenta, gradients, 1 - momentum)
        alike = collections.defaultdict(list)                     # matrices of one shape are made orthogonal together
        for p, gradient in zip(parameters, torch._foreach_lerp(gradients, momenta, momentum)):        # Nesterov
            alike[gradient.flatten(1).shape].append((p, gradient.flatten(1)))
        for shape, pairs in alike.items():
            same, gradients = zip(*pairs)
            directions = [d.view_as(p) for p, d in zip(same, orthogonalised(torch.stack(gradients)))]
            torch._foreach_add_(same, directions, alpha=-0.2 * max(shape) ** 0.5 * lr)


def adam_update(parameters, states: list, lr: float, betas: tuple, eps: float = 1e-8) -> None:
    """One step of Adam on all parameters, in place; their `states` keep t, m and v.

    torch's `_foreach_` operations take lists: a GPU needs a handful of kernels for hundreds of small tensors.
    """
    for p, state in zip(parameters, states):
        if not state:
            state.update(t=0, m=torch.zeros_like(p), v=torch.zeros_like(p))
        state["t"] += 1
    gradients, (t, m, v) = [p.grad for p in parameters], zip(*([s["t"], s["m"], s["v"]] for s in states))
    torch._foreach_lerp_(m, gradients, 1 - betas[0])
    torch._foreach_lerp_(v, torch._foreach_mul(gradients, gradients), 1 - betas[1])
    scale = torch._foreach_sqrt(torch._foreach_div(v, [1 - betas[1] ** n for n in t]))
    torch._foreach_add_(scale, eps)
    torch._foreach_addcdiv_(parameters, torch._foreach_div(m, [1 - betas[0] ** n for n in t]), scale, value=-lr)


def orthogonalised(matrices: torch.Tensor, steps: int = 5) -> torch.Tensor:
    """(B, m, n) -> about U V^T of each U S V^T: singular values end between 0.7 and 1.2 (Newton-Schulz, quintic).

    A step is X <- p(G) X with G = X X^T. Polynomials of G commute, so the steps need G alone, which is (m, m), and X
    meets their product at the end: half the time where n > m. It needs full float32, as G has squared singular values.
    """
    x = matrices.to(torch.promote_types(matrices.dtype, torch.float32))
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
    tall = x.shape[1] > x.shape[2]
    x = x.mT if tall else x
    gram, product = x @ x.mT, None
    for _ in range(steps):
        p = torch.baddbmm(gram, gram, gram, beta=-4.7750, alpha=2.0315)
        p.diagonal(dim1=1, dim2=2).add_(3.4445)                   # 3.4445 - 4.7750 G + 2.0315 G^2
        product = p if product is None else p @ product
        gram = p @ gram @ p
    return (product @ x).mT if tall else product @ x


def make_optimizer(cfg, params, lr: float, betas: tuple = (0.9, 0.95), weight_decay: float = 0.01, tables=()):
    """AdamW or Muon, by --optimizer. `tables`: embeddings and codebooks, whose rows learn apart: Adam in both cases."""
    params, tables = list(params), list(tables)
    groups = [dict(params=[p for p in params if all(p is not table for table in tables)])]
    groups += [dict(params=tables, matrices=False)] if tables else []
    kind = Muon if cfg.optimizer == "muon" else torch.optim.AdamW
    return kind(groups, lr=lr, betas=betas, weight_decay=weight_decay)


def warmup_cosine(steps: int, warmup: int = 0, floor: float = 0.0, first: float = 0.0):
    """lr_at(step) for `Stage`, times the peak: `warmup` steps from `first` up, `steps` of a cosine to `floor`, flat."""
    def at(step):
        if step < warmup:
            return first + (1 - first) * step / warmup
        return floor + 0.5 * (1 - floor) * (1 + math.cos(math.pi * min(1, (step - warmup) / steps)))
    return at


def lr_schedule(cfg, steps: int):
    """lr_at for `Stage` by --lr_scheduler and --lr_warmup_steps; a cosine ends near 0 at the last of `steps`."""
    if cfg.lr_scheduler == "cosine":
        falling = max(1, steps - cfg.lr_warmup_steps)
        return warmup_cosine(falling, cfg.lr_warmup_steps, floor=0.02, first=1 / (cfg.lr_warmup_steps + 1))
    return lambda step: min(1, (step + 1) / (cfg.lr_warmup_steps + 1))


class Stage:
    """One training stage: trainable modules, their EMA, their optimisers, the checkpoint, the log and the progress bar.

        stage = Stage(run, "flow", {"flow": model}, {"flow": optimizer}, steps)
        for step, batch in stage.steps(batch_at):        # batch_at(k): micro-batch k, a pure function
            with run.autocast():
                loss = ...
            stage.update(loss, optimizer="flow", flow=loss)
        weights = stage.ema["flow"]                      # {name: tensor}: what `sample` should use

    Every draw of step k comes from (seed, stage, k, rank): torch is re-seeded before each step, so N steps equal N / 2
    + resume + N / 2 bit by bit without saving the state of any generator. Modules are never wrapped: gradients are
    averaged over processes in `update`, whichever methods of the modules made them (DDP only sees its own forward).
    """

    def __init__(self, run: Run, name: str, modules: dict, optimizers: dict, steps: int, lr_at=None):
        cfg = run.cfg
        self.run, self.name, self.modules, self.optimizers, self.last = run, name, modules, optimizers, steps
        self.accumulate, self.lr_at, self.ema_decay = cfg.gradient_accumulation_steps, lr_at, cfg.ema_decay
        self.log_steps, self.checkpointing_steps = cfg.log_steps, cfg.checkpointing_steps
        self.base_lr = {key: [group["lr"] for group in o.param_groups] for key, o in optimizers.items()}
        self.scaler = torch.amp.GradScaler(run.device.type, enabled=run.precision == "fp16")
        self.trained = {key: trained_tensors(module) for key, module in modules.items()}
        self.step, self.micro, self.history, self.stop = 0, 0, [], False
        if run.world > 1:                                         # one truth to start from
            for tensors in self.trained.values():
                for tensor in tensors.values():
                    dist.broadcast(tensor.data, 0)
        self.ema = {key: {n: t.detach().clone() for n, t in tensors.items()} for key, tensors in self.trained.items()}
        if cfg.resume_from_checkpoint:
            try:
                self.resume(cfg.resume_from_checkpoint)
            except UserError:
                raise
            except Exception as error:                            # fields that lack, or of another kind: a dozen ways
                raise UserError(f"--resume_from_checkpoint {cfg.resume_from_checkpoint}: its state.pt is damaged or of "
                                f"another version ({type(error).__name__}); move it away to begin this stage again"
                                ) from None

    # -- the loop

    def steps(self, batch_at):
        """Yield (step, batch) from where the checkpoint left off; save, log and stop cleanly on Ctrl-C or SIGTERM."""
        cfg, run = self.run.cfg, self.run
        first, pieces = self.step, self.accumulate
        workers = cfg.num_workers
        if workers and not hasattr(os, "fork"):
            raise UserError(f"--num_workers {workers}: needs processes that fork, which this system has not; give 0")
        loader = iter(torch.utils.data.DataLoader(
            Endless(batch_at), batch_size=None, sampler=range(first * pieces, self.last * pieces), num_workers=workers,
            multiprocessing_context="fork" if workers else None, worker_init_fn=leave_group if workers else None))
        bar = tqdm(total=self.last, initial=first, desc=self.name, dynamic_ncols=True,
                   disable=not (run.main and sys.stderr.isatty()))
        begun = logged = time.time()
        waited = 0.0                                              # for faces: drawing, reading and degrading them
        with caught_signals(self):
            while self.step < self.last:
                for self.micro in range(pieces):
                    asked = time.time()
                    batch = next(loader)
                    waited += time.time() - asked
                    if isinstance(batch, UserError):
                        raise batch
                    run.drop_former()
                    batch = {k: v.to(run.device) if torch.is_tensor(v) else v for k, v in batch.items()}
                    torch.manual_seed(mix(self.name, cfg.seed, self.step, self.micro, run.rank))
                    yield self.step, batch
                self.step += 1
                bar.update(1)
                at_save = self.step % self.checkpointing_steps == 0
                at_log = at_save or self.step % self.log_steps == 0 or self.step == self.last
                # several processes ask each other only at steps where all of them do
                stop = self.stop if run.world == 1 else at_log and agree(self.stop, run)
                if at_log or stop:                                # before a save: `check` ends a run that is not finite
                    losses = self.check()
                    rate = (time.time() - begun) / (self.step - first)
                    run.log(stage=self.name, step=self.step, **losses, seconds_per_step=round(rate, 5),
                            data_share=round(waited / max(1e-9, time.time() - begun), 3))
                    bar.set_postfix({k: f"{v:.4g}" for k, v in losses.items()})
                    if bar.disable and (time.time() - logged > 15 or self.step == self.last):
                        text = "  ".join(f"{k} {v:.4g}" for k, v in losses.items())
                        run.say(f"{self.name} {self.step}/{self.last}  {text}  {rate:.3f} s/step, "
                                f"{rate * (self.last - self.step):.0f} s left")
                        logged = time.time()
                if at_save or stop:
                    self.save()
                    if stop:
                        bar.close()
                        if run.world > 1:                         # torchrun ends all when one ends: save first
                            dist.barrier()
                        raise UserError(f"stopped at step {self.step} of stage {self.name}, saved; "
                                        "go on with --resume_from_checkpoint latest")
        bar.close()
        if not all(tensor.isfinite().all() for tensors in self.ema.values() for tensor in tensors.values()):
            raise UserError(f"stage {self.name}: its last step left weights that are not finite, nothing of it was "
                            "saved; try a smaller --learning_rate, or --mixed_precision no")

    def update(self, loss: torch.Tensor, /, optimizer: str | None = None, **logged) -> None:
        """Backward; after the last micro-batch of a step: average, clip, step, EMA. Extra keywords: losses to log."""
        key = optimizer or next(iter(self.optimizers))
        chosen, cfg = self.optimizers[key], self.run.cfg
        self.history.append((self.step, {name: value.detach() for name, value in (logged or {"loss": loss}).items()}))
        self.scaler.scale(loss / self.accumulate).backward()
        if self.micro + 1 < self.accumulate:
            return
        parameters = [p for group in chosen.param_groups for p in group["params"] if p.grad is not None]
        if self.run.world > 1:
            average_gradients(parameters, self.run.world)
        for group, base in zip(chosen.param_groups, self.base_lr[key]):
            group["lr"] = base * (self.lr_at(self.step) if self.lr_at else 1)
        self.scaler.unscale_(chosen)
        norm = nn.utils.clip_grad_norm_(parameters, cfg.max_grad_norm or math.inf)
        self.history[-1][1]["grad_norm"] = norm.detach()          # also without clipping: a NaN must not be saved
        self.scaler.step(chosen)
        chosen.zero_grad(set_to_none=True)
        if key == list(self.optimizers)[-1]:
            self.scaler.update()
            self.update_ema()

    @torch.no_grad()
    def update_ema(self) -> None:
        """ema <- d ema + (1 - d) weights with d = min(ema_decay, (1 + n) / (10 + n)): a short memory at first."""
        decay = min(self.ema_decay, (1 + self.step) / (10 + self.step))
        for key, tensors in self.trained.items():
            average = self.ema[key]
            real = [name for name, tensor in tensors.items() if tensor.is_floating_point()]
            if real:
                torch._foreach_lerp_([average[n] for n in real], [tensors[n] for n in real], 1 - decay)
            for name in tensors.keys() - real:                    # counters
                average[name].copy_(tensors[name])

    def check(self) -> dict:
        """Means of the losses since the last call, read from the device once. One that is not finite ends the run."""
        means = {}
        for name in dict.fromkeys(name for _, row in self.history for name in row):
            steps = [step for step, row in self.history if name in row]
            values = torch.stack([row[name].float() for _, row in self.history if name in row]).cpu()
            bad = ~values.isfinite()
            if bad.any() and not (name == "grad_norm" and self.scaler.is_enabled()):   # fp16 skips such steps by itself
                kept = self.run.folder / "state.pt"
                raise UserError(f"stage {self.name}, step {steps[int(bad.nonzero()[0])]}: {name} is not finite; "
                                "nothing was saved over "
                                + (f"the last good checkpoint {kept}: " if kept.exists() else "(no checkpoint yet): ")
                                + "try a smaller --learning_rate, or --mixed_precision no")
            means[name] = round(values[~bad].mean().item(), 6) if not bad.all() else 0.0
        self.history.clear()
        return means

    # -- the checkpoint

    def kinds(self) -> dict:
        return {key: type(optimizer).__name__ for key, optimizer in self.optimizers.items()}

    def save(self) -> None:
        """state.pt: everything a resumed run needs, as plain tensors and numbers (readable with weights_only=True)."""
        if not self.run.main:
            return
        state = dict(stage=self.name, step=self.step, config=json.loads(json.dumps(dataclasses.asdict(self.run.cfg))),
                     modules=self.trained, ema=self.ema, scaler=self.scaler.state_dict(),
                     optimizers={key: o.state_dict() for key, o in self.optimizers.items()}, kinds=self.kinds(),
                     seconds=time.time() - self.run.started)
        with whole_file(self.run.folder / "state.pt") as temporary:
            torch.save(state, temporary)

    def resume(self, where: str) -> None:
        """Load state.pt if it belongs to this stage. Raises UserError where it is damaged or of another size."""
        path = self.run.folder / "state.pt" if where == "latest" else Path(where)
        path = path / "state.pt" if path.is_dir() else path
        if where == "latest" and not path.exists():
            return
        state = read_torch(path)
        wanted = {"stage", "step", "modules", "ema", "optimizers", "kinds"}
        if not isinstance(state, dict) or not wanted <= state.keys():
            raise UserError(f"{path}: not a training state of this project; "
                            "--resume_from_checkpoint wants a state.pt or its folder")
        if state["stage"] != self.name:
            if path.parent.resolve() != self.run.folder.resolve() and not self.run.resumed:
                raise UserError(f"{path}: is at stage {state['stage']}, whose earlier stages are in its folder; "
                                f"go on there with --output {path.parent}")
            return
        if state["kinds"] != self.kinds():
            raise UserError(f"{path}: made with other optimisers; resume with the flags of that run")
        for key, tensors in self.trained.items():
            saved = state["modules"].get(key, {})
            wrong = [n for n in tensors if n not in saved or saved[n].shape != tensors[n].shape]
            wrong += [n for n in saved if n not in tensors]
            if wrong:
                raise UserError(f"{path}: made with other sizes ({key}.{wrong[0]} differs); "
                                "resume with the flags of that run: see its config.json")
            with torch.no_grad():
                for name, tensor in tensors.items():
                    tensor.copy_(saved[name])
                    self.ema[key][name].copy_(state["ema"][key][name])
        for key, optimizer in self.optimizers.items():
            optimizer.load_state_dict(state["optimizers"][key])
        if state["scaler"]:
            self.scaler.load_state_dict(state["scaler"])
        self.step, self.run.resumed = state["step"], True
        self.run.started -= state["seconds"]                       # metrics.json counts them all
        now = json.loads(json.dumps(dataclasses.asdict(self.run.cfg)))
        other = [name for name, value in state.get("config", {}).items()
                 if name in now and now[name] != value and name not in (*IDLE_FLAGS, "max_train_steps", "stage")]
        if other:
            self.run.say(f"{path}: was made with other {', '.join(f'--{name}' for name in other)}; the new values hold "
                         "from here on, but the optimiser keeps its own (betas, weight decay) except the learning rate")
        self.run.say(f"resumed stage {self.name} at step {self.step} from {path}")


def trained_tensors(module: nn.Module) -> dict:
    """{name: tensor} of trainable parameters and of buffers: what a checkpoint holds (not a frozen backbone again)."""
    frozen = {name for name, p in module.named_parameters(remove_duplicate=False) if not p.requires_grad}
    return {name: tensor for name, tensor in module.state_dict(keep_vars=True).items() if name not in frozen}


def average_gradients(parameters: list, world: int) -> None:
    """Mean over processes, all gradients in one message."""
    flat = torch.cat([p.grad.flatten() for p in parameters])
    dist.all_reduce(flat)
    for p, piece in zip(parameters, flat.div_(world).split([p.numel() for p in parameters])):
        p.grad.copy_(piece.view_as(p))


def agree(flag: bool, run: Run) -> bool:
    """True in all processes if it is true in one: they must stop at the same step."""
    shared = torch.tensor(float(flag), device=run.device)
    dist.all_reduce(shared)
    return shared.item() > 0


@contextmanager
def caught_signals(stage: Stage):
    """The first Ctrl-C (or SIGTERM) asks the loop to finish its step and save; the second one ends at once."""
    def ask(number, frame):
        if stage.stop and stage.run.world > 1:                    # torchrun passes on what the terminal also sent
            return
        if stage.stop:
            raise KeyboardInterrupt
        stage.stop = True
        stage.run.say("\nstopping after this step (once more: at once, without saving)")
    try:
        before = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
    except ValueError:                                            # not the main thread (a test): signals stay as is
        before = {}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


# ------------------------------------------------------------------------------------------------ weights

def read_torch(path):
    """torch.load that runs no code. Raises UserError for a missing, damaged or executable file."""
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise UserError(f"{path}: no such checkpoint") from None
    except Exception as error:                                    # a damaged file fails in a dozen ways
        with open(path, "rb") as file:
            head = file.read(2)
        if isinstance(error, pickle.UnpicklingError) and (head == b"PK" or head[:1] == b"\x80"):  # a pickle it is
            raise UserError(f"{path}: refused, it holds Python objects beside tensors and reading it could run code; "
                            "convert it to safetensors") from None
        raise UserError(f"{path}: damaged or not a checkpoint ({type(error).__name__}); "
                        "download or train it again") from None


def read_weights(path) -> dict:
    """{name: tensor} from .safetensors, .pth, .pt or .ckpt, without the usual wrappings and the `module.` of DDP."""
    path = Path(path)
    if path.suffix == ".safetensors":
        if not path.is_file():
            raise UserError(f"{path}: no such checkpoint")
        try:
            return safetensors.torch.load_file(path)
        except (SafetensorError, OSError, ValueError) as error:
            raise UserError(f"{path}: damaged or not a safetensors file ({str(error)[:80]}); "
                            "download or train it again") from None
    state = read_torch(path)
    for key in ("params_ema", "params", "ema", "state_dict", "model"):
        if isinstance(state, dict) and isinstance(state.get(key), dict):
            state = state[key]
    if not isinstance(state, dict) or not state or not all(
            isinstance(name, str) and torch.is_tensor(v) for name, v in state.items()):
        raise UserError(f"{path}: holds no dictionary of weights; give a file of model weights")
    return {name.removeprefix("module."): tensor for name, tensor in state.items()}


def load_strict(module: nn.Module, state: dict, where) -> None:
    """load_state_dict(strict=True) whose complaint is one line that says what is wrong and what to try."""
    own = module.state_dict()
    missing, extra = [n for n in own if n not in state], [n for n in state if n not in own]
    shapes = [f"{n} is {tuple(state[n].shape)}, wanted {tuple(own[n].shape)}"
              for n in own if n in state and state[n].shape != own[n].shape]
    if missing or extra or shapes:
        example = (shapes or [f"no {n}" for n in missing] or [f"unknown {n}" for n in extra])[0]
        raise UserError(f"{where}: does not fit {type(module).__name__}: {len(missing)} names missing, "
                        f"{len(extra)} unknown, {len(shapes)} of another shape (e.g. {example}); "
                        "is it of another method, preset or size?")
    module.load_state_dict(state, strict=True)


def save_model(folder, weights: dict, config: dict) -> None:
    """model.safetensors + config.json, what `sample` reads. `weights` {part: {name: tensor}} is stored as part.name."""
    folder = Path(folder)
    flat = {f"{part}.{name}": t.detach().cpu().contiguous()
            for part, tensors in weights.items() for name, t in tensors.items()}
    with whole_file(folder / "model.safetensors") as temporary:
        safetensors.torch.save_file(flat, temporary, metadata={"format": "pt"})
    write_json(folder / "config.json", config)                    # last: it says what is finished


def load_model(where: str, method: str) -> tuple:
    """(config, {part: {name: tensor}}) from a `save_model` folder, its model.safetensors or a hub id; or UserError."""
    folder = find_checkpoint(where)
    if folder.is_file() and folder.name != "model.safetensors":
        raise UserError(f"--checkpoint {where}: give the folder of a run, or the model.safetensors in it")
    folder = folder.parent if folder.is_file() else folder
    try:
        config = json.loads((folder / "config.json").read_text())
    except FileNotFoundError:
        begun = (folder / "log.jsonl").exists()
        raise UserError(f"--checkpoint {where}: " + (
            "no stage of this training is finished yet; go on with it by train --resume_from_checkpoint latest, "
            "or give another run" if begun else
            f"no config.json in {folder}; give the output folder of a training run")) from None
    except (ValueError, OSError) as error:
        raise UserError(f"--checkpoint {where}: config.json is damaged ({error})") from None
    found = config.get("method", "an unknown method") if isinstance(config, dict) else "something else"
    if found != method:
        raise UserError(f"--checkpoint {where}: belongs to {found}, not to {method}")
    config.setdefault("finished", [])
    parts: dict = {}
    for name, tensor in read_weights(folder / "model.safetensors").items():
        part, _, rest = name.partition(".")
        parts.setdefault(part, {})[rest] = tensor
    return config, parts


def same_settings(cfg, before, names, where, flag: str) -> None:
    """UserError where one of `names` differs from the run `before` in `where`, which --`flag` names."""
    for name in names:
        if getattr(before, name) != getattr(cfg, name):
            raise UserError(f"--{name} {getattr(cfg, name)}: {where} was trained with {getattr(before, name)}; "
                            f"repeat that, or choose another --{flag}")


def is_run(path: Path) -> bool:
    """Whether a folder, or the weights in it, comes from a training here and not from a release."""
    config = path / "config.json" if path.is_dir() else path.with_name("config.json")
    return config.exists() and '"method"' in config.read_text(errors="replace")


def saved_flags(cls, config: dict, where):
    """The `cls` (a method's Train) a run was made with, from its config.json; flags that are gone are left out."""
    known = {field.name: field.default for field in dataclasses.fields(cls)}
    try:
        saved = {name: value for name, value in config["train"].items() if name in known}
        kinds = {bool: bool, int: int, float: (int, float), str: str, tuple: list}
        wrong = (not isinstance(value, kinds.get(type(known[name]), object)) for name, value in saved.items())
        if not saved or any(wrong):
            raise TypeError
        return cls(**{name: tuple(value) if isinstance(value, list) else value for name, value in saved.items()})
    except (KeyError, TypeError, AttributeError):
        raise UserError(f"{where}: config.json lacks what a training run writes; train again") from None


HUB_ID = re.compile(r"(?!runs/)[\w.-]+/[\w.-]+")


def find_checkpoint(where: str, flag: str = "checkpoint") -> Path:
    """A local file or folder as it is; `owner/name` is fetched from the hub. UserError, naming `flag`, if neither."""
    path = Path(where).expanduser()
    if path.exists():
        return path
    if not HUB_ID.fullmatch(where):
        raise UserError(f"--{flag} {where}: no such file or folder{'; train first' * (flag == 'checkpoint')}")
    try:
        from huggingface_hub import snapshot_download
        return Path(snapshot_download(where))
    except Exception as error:                                    # offline, gated, misspelt: a dozen kinds of exception
        raise UserError(f"--{flag} {where}: not a local path, and the hub says {type(error).__name__}; "
                        "check the name and your connection") from None


def first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:120]


def from_folder(cls, where: str, flag: str, subfolder: str = "", **options):
    """`cls.from_pretrained` (transformers, diffusers) of a local folder or hub id; one line, a UserError that names
    `flag`, where it is missing, broken or lacks weights, which the libraries would draw at random."""
    path = Path(where).expanduser()
    if path.exists() and not (path / subfolder).is_dir():
        raise UserError(f"--{flag} {where}: no folder {subfolder}/ in it; is it a whole model?")
    if not path.exists() and not HUB_ID.fullmatch(where):
        raise UserError(f"--{flag} {where}: no such folder; give one, or a hub id (owner/name)")
    if cls.__module__.startswith("diffusers"):
        options["low_cpu_mem_usage"] = False                      # True would need the accelerate package
    load = functools.partial(cls.from_pretrained, str(path) if path.exists() else where, subfolder=subfolder, **options)
    try:
        if "Tokenizer" in cls.__name__:
            return load()
        model, found = load(output_loading_info=True)
        if found["missing_keys"]:
            raise ValueError(f"it lacks weights such as {sorted(found['missing_keys'])[0]}")
        return model
    except Exception as error:                                    # missing files, other sizes, offline, gated: a dozen
        raise UserError(f"--{flag} {where}: {subfolder or cls.__name__} cannot be loaded "
                        f"({first_line(error)})") from None


# ------------------------------------------------------------------------------------------------ LoRA

class LoRALinear(nn.Module):
    """y = W x + (alpha / rank) B A x with W frozen, A ~ N(0, (1 / rank)^2), B = 0: it starts as W [LoRA, Eq. 3].

    Of a convolution A keeps kernel, stride and padding, and B is 1x1 [layout of diffusers and peft]; ValueError for a
    grouped one.
    """

    def __init__(self, base: nn.Linear | nn.Conv2d, rank: int, alpha: float):
        super().__init__()
        self.base, self.scale = base.requires_grad_(False), alpha / rank
        own = dict(bias=False, device=base.weight.device)
        if isinstance(base, nn.Linear):
            self.lora_A = nn.Linear(base.in_features, rank, **own)
            self.lora_B = nn.Linear(rank, base.out_features, **own)
        elif base.groups > 1:
            raise ValueError("LoRA of a grouped convolution is not a product of two convolutions")
        else:
            self.lora_A = nn.Conv2d(base.in_channels, rank, base.kernel_size, base.stride, base.padding, base.dilation,
                                    padding_mode=base.padding_mode, **own)
            self.lora_B = nn.Conv2d(rank, base.out_channels, 1, **own)
        nn.init.normal_(self.lora_A.weight, std=1 / rank)
        nn.init.zeros_(self.lora_B.weight)

    def forward(self, x):
        change = self.lora_B(self.lora_A(x.to(self.lora_A.weight.dtype)))      # LoRA may be float32 on a bf16 base
        y = self.base(x)
        return y + (self.scale * change).to(y.dtype)


def add_lora(module: nn.Module, names: tuple, rank: int, alpha: float) -> list:
    """Wrap every Linear or Conv2d whose dotted name ends with one of `names`; freeze all else. Returns new parameters.

    Raises ValueError if no layer has such a name.
    """
    module.requires_grad_(False)
    targets = [n for n, m in module.named_modules()
               if type(m) in (nn.Linear, nn.Conv2d) and any(("." + n).endswith("." + end) for end in names)]
    if not targets:
        raise ValueError(f"no Linear or Conv2d in {type(module).__name__} has a name that ends with one of {names}")
    for name in targets:
        module.set_submodule(name, LoRALinear(module.get_submodule(name), rank, alpha))
    return [p for p in module.parameters() if p.requires_grad]


def lora_layers(module: nn.Module) -> dict:
    return {name: layer for name, layer in module.named_modules() if isinstance(layer, LoRALinear)}


def merge_lora(module: nn.Module) -> None:
    """W <- W + (alpha / rank) B A, in place; the module is plain again."""
    for name, layer in lora_layers(module).items():
        a, b = layer.lora_A.weight.data, layer.lora_B.weight.data
        layer.base.weight.data += layer.scale * (b.flatten(1) @ a.flatten(1)).view_as(layer.base.weight)
        module.set_submodule(name, layer.base)


def save_lora(module: nn.Module, path, prefix: str = "transformer.") -> None:
    """`{prefix}{layer}.lora_A.weight` and `lora_B.weight`, the layout of diffusers and peft.

    B carries alpha / rank: loaders assume 1.
    """
    state = {}
    for name, layer in lora_layers(module).items():
        state[f"{prefix}{name}.lora_A.weight"] = layer.lora_A.weight.detach().cpu().contiguous()
        state[f"{prefix}{name}.lora_B.weight"] = (layer.scale * layer.lora_B.weight).detach().cpu().contiguous()
    with whole_file(path) as temporary:
        safetensors.torch.save_file(state, temporary)


def load_lora(module: nn.Module, path, prefix: str = "transformer.") -> None:
    """The inverse of `save_lora`, into the LoRA layers of `module`. UserError on another rank or other layers.

    The scale is 1 unless the file has `.alpha` tensors or diffusers' adapter settings: then alpha / rank goes into B.
    """
    state, layers = read_weights(path), lora_layers(module)
    if Path(path).suffix == ".safetensors":
        with safetensors.safe_open(path, "pt") as file:
            noted = (file.metadata() or {}).get("lora_adapter_metadata", "{}")
        try:
            noted = json.loads(noted)
            scale = noted[f"{prefix}lora_alpha"] / noted[f"{prefix}r"] if f"{prefix}lora_alpha" in noted else 1
        except (ValueError, KeyError, TypeError, ZeroDivisionError):
            raise UserError(f"{path}: its lora_adapter_metadata is damaged") from None
        if scale != 1:
            state = {name: scale * v if name.endswith("lora_B.weight") else v for name, v in state.items()}
    for name in [name for name in state if name.endswith(".alpha")]:
        alpha, up = state.pop(name), f"{name.removesuffix('.alpha')}.lora_B.weight"
        if up in state:
            state[up] = state[up] * (alpha.item() / state[up].shape[1])
    wanted = {f"{prefix}{name}.lora_{part}.weight" for name in layers for part in "AB"}
    if wanted != set(state):
        example = sorted(wanted ^ set(state))[0]
        raise UserError(f"{path}: LoRA of other layers ({len(wanted - set(state))} missing, "
                        f"{len(set(state) - wanted)} unknown, e.g. {example})")
    for name, layer in layers.items():
        a, b = state[f"{prefix}{name}.lora_A.weight"], state[f"{prefix}{name}.lora_B.weight"]
        if a.shape != layer.lora_A.weight.shape or b.shape != layer.lora_B.weight.shape:
            if len(a) == len(layer.lora_A.weight):
                raise UserError(f"{path}: LoRA of a network of another width (at {name})")
            raise UserError(f"{path}: LoRA of rank {len(a)} at {name}, "
                            f"this model has rank {len(layer.lora_A.weight)}; set --rank {len(a)}")
        with torch.no_grad():
            layer.lora_A.weight.copy_(a)
            layer.lora_B.weight.copy_(b / layer.scale)


# ------------------------------------------------------------------------------------------------ restoring

def restore_folder(cfg, restore, size: int, device, shown=None) -> int:
    """`sample` without its network: read, restore in batches, write; returns the number of faces restored.

    cfg has input, output, batch_size, landmarks, reference. `restore(lq (B, 3, size, size), stems)` gives {folder:
    images of that shape}, at least "restored_faces"; `stems` are the B output names. With cfg.landmarks whole
    photographs go in and come out in restored_photos/, and the stems of a photo's faces end in _00, _01, ...
    `shown(stem)` gives pictures (N, 3, size, size) for cmp/, instead of the file of that name in cfg.reference.
    """
    out, faces, done = Path(cfg.output), [], 0
    points = read_landmarks(cfg.landmarks) if cfg.landmarks else None
    references = {p.stem: p for p in list_images(cfg.reference)} if cfg.reference and not shown else {}
    source = Path(cfg.input).resolve()
    source = source.parent if source.is_file() else source
    if source in [(out / name).resolve() for name in ("restored_faces", "restored_photos", "posterior_mean", "cmp")]:
        raise UserError(f"--input {cfg.input}: would be overwritten by the results; choose another --output")
    files = list_images(cfg.input)
    names, told = output_names(files), set()
    for number, path in enumerate(files):
        try:
            faces += cut_faces(path, names[path], size, points, told)
        except UserError as error:
            print(f"skipped: {error}", flush=True)
        while len(faces) >= cfg.batch_size or (faces and number == len(files) - 1):
            batch, faces = faces[:cfg.batch_size], faces[cfg.batch_size:]
            results = restore(torch.stack([face["lq"] for face in batch]).to(device), [face["stem"] for face in batch])
            if not all(r.isfinite().all() for r in results.values()):
                raise UserError("the network returned values that are not finite; try --mixed_precision no")
            for i, face in enumerate(batch):
                for folder, images in results.items():
                    write_image(out / folder / f"{face['stem']}.png", images[i])
                columns = [face["lq"], results["restored_faces"][i].cpu(), *(shown(face["stem"]) if shown else ())]
                wanted = face["path"].stem if points is None else face["stem"]
                try:
                    if wanted in references:
                        columns.append(read_image(references[wanted], size))
                except UserError as error:
                    print(f"no reference for {face['stem']}: {error}", flush=True)
                write_image(out / "cmp" / f"{face['stem']}.png", torch.cat(columns, dim=2))
                if points is not None:
                    paste_back(out / "restored_photos", face, results["restored_faces"][i].cpu())
                done += 1
    if not done:
        raise UserError(f"nothing was restored from {cfg.input}")
    write_json(out / "args.json",
               dict(argv=sys.argv, config=dataclasses.asdict(cfg), restored=done, **versions(device)))
    print(f"restored {done} face{'s' * (done > 1)} into {out / 'restored_faces'}", flush=True)
    return done


def read_landmarks(path) -> dict:
    """{file name: [[five (x, y) points], ...]} from JSON. Raises UserError."""
    try:
        content = json.loads(Path(path).read_text())
        points = {name: torch.tensor(faces, dtype=torch.float64) for name, faces in content.items()}
        if any(faces.numel() and faces.shape[1:] != (5, 2) for faces in points.values()):
            raise ValueError
        return points
    except FileNotFoundError:
        raise UserError(f"--landmarks {path}: no such file") from None
    except (ValueError, TypeError, AttributeError, RuntimeError, OSError):
        raise UserError(f"--landmarks {path}: wants JSON of the form "
                        "{\"photo.jpg\": [[[x, y], ... five points], ... faces]}") from None


def output_names(files) -> dict:
    """{path: name of its result}: its stem, or the whole file name where a file before it has that stem."""
    names, taken = {}, set()
    for path in files:
        names[path] = path.stem if path.stem not in taken else path.name
        taken.add(names[path])
    return names


def cut_faces(path: Path, stem: str, size: int, points: dict | None, told: set) -> list:
    """The faces of one file as dicts (lq, stem, path, transform); `told`: picture sizes already spoken of."""
    image = read_image(path)
    if len(os.fsencode(stem)) > 240:
        raise UserError(f"{path}: the name is too long for that of a result; rename it")
    if points is None:
        if image.shape[1:] != (size, size) and image.shape not in told:
            print(f"{path.name}: {image.shape[2]}x{image.shape[1]} resized to {size}x{size}, the network's square; so "
                  "are others of its size", flush=True)
            told.add(image.shape)
        return [dict(lq=resize(image, size), stem=stem, path=path)]
    if path.name not in points or not len(points[path.name]):
        raise UserError(f"{path}: no face listed for {path.name} in --landmarks")
    faces = []
    for number, five in enumerate(points[path.name]):
        try:
            if five.abs().max() > 2 * max(image.shape) or (five[0] - five[1]).norm() < 2:
                raise UserError("its points must be pixels of this picture, the eyes 2 px apart at least")
            face, transform = align_face(image, five, size)
        except UserError as error:
            print(f"{path.name}: face {number} skipped, {error}", flush=True)
            continue
        write_to = f"{stem}_{number:02d}"
        faces.append(dict(lq=face, stem=write_to, path=path, transform=transform, photo=stem, first=not faces))
    return faces


def paste_back(folder: Path, face: dict, restored: torch.Tensor) -> None:
    """Add one restored face to its photograph; the first starts from the input, the next ones from what is there."""
    target = folder / f"{face['photo']}.png"
    photo = read_image(face["path"] if face["first"] else target)
    write_image(target, paste_face(photo, restored, face["transform"]))


# ------------------------------------------------------------------------------------------------ reporting

def print_table(rows: dict) -> None:
    """{row: {column: number}} as a table; a column that a row lacks stays empty."""
    columns = {name: max(12, len(name) + 2) for row in rows.values() for name in row}
    width = max(16, *map(len, rows)) + 1
    print(" " * width + "".join(f"{c:>{w}}" for c, w in columns.items()))
    for name, row in rows.items():
        cells = (f"{row[c]:{w}.4g}" if c in row else " " * w for c, w in columns.items())
        print(f"{name:>{width}}" + "".join(cells), flush=True)


def read_curves(path, names: tuple) -> dict:
    """{"stage: loss": [(step, value)]} of log.jsonl for the losses `names`; of a step written twice the last counts."""
    curves: dict = {}
    for line in Path(path).read_text().splitlines():
        try:
            row = json.loads(line)
        except ValueError:  # a disk that was full cut it short
            continue
        for name in (n for n in names if isinstance(row, dict) and n in row):
            curves.setdefault(f"{row['stage']}: {name}", {})[row["step"]] = row[name]
    return {name: sorted(points.items()) for name, points in curves.items()}


def finished_parts(cfg, method: str) -> tuple:
    """(config, {part: weights}) that earlier stages left in --output; empty if there is nothing yet."""
    if not (Path(cfg.output) / "config.json").exists():
        return {}, {}
    config, parts = load_model(cfg.output, method)
    return config, {part: tensors for part, tensors in parts.items() if part in config["finished"]}


def decisive(config: dict) -> dict:
    """The fields of a row's configuration that decide its numbers."""
    return {name: value for name, value in config.items() if name not in IDLE_FLAGS}


def run_ablation(cfg, table: dict, run_row) -> dict:
    """Run the chosen rows for every seed; returns {"row, seed n": entry}, also what an earlier call finished.

    table {row: (group, changed fields, paper's words)}, group "" belongs to all; cfg has output, seed, seeds, table (a
    group or "all"), rows.
    run_row(changed cfg, entries so far) -> entry with at least `scores`. Entries are kept in rows.json after each row
    with their configuration: an interrupted ablation goes on where it stopped, and changed settings run again.
    """
    if cfg.resume_from_checkpoint:  # state.pt would be another row's
        raise UserError("--resume_from_checkpoint: ablate goes on by itself, row by row; leave it out")
    if getattr(cfg, "stage", "all") != "all":
        raise UserError(f"--stage {cfg.stage}: ablate trains what its rows need; choose them with --table or --rows")
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        raise UserError("ablate runs in one process; instead of torchrun start several, each with its --rows or --seed")
    unknown = [row for row in cfg.rows if row not in table]
    if unknown:
        raise UserError(f"--rows {unknown[0]}: no such row; there are: {', '.join(table)}")
    chosen = cfg.rows or [row for row, (group, _, _) in table.items() if cfg.table in ("all", group) or not group]
    path = Path(cfg.output) / "rows.json"
    try:
        before = lambda: json.loads(path.read_text()) if path.exists() else {}
        done = before()
        if any(not {"row", "seed", "config", "scores"} <= entry.keys() for entry in done.values()):
            raise ValueError
    except (ValueError, AttributeError):
        raise UserError(f"{path}: damaged; move it away, or choose another --output") from None

    def settings(row: str, seed: int) -> tuple:
        changed = dataclasses.replace(cfg, seed=seed, table="all", rows=(), seeds=1, **table[row][1])
        return changed, json.loads(json.dumps(dataclasses.asdict(changed)))

    for seed in range(cfg.seed, cfg.seed + cfg.seeds):
        for row in chosen:
            key, (changed, config) = f"{row}, seed {seed}", settings(row, seed)
            if key in done and decisive(done[key]["config"]) == decisive(config):
                print(f"{key}: finished before")
                continue
            print(f"--- {key}", flush=True)
            done.pop(key, None)                                    # of other settings: no row may build on it
            try:
                entry = run_row(changed, done)
            except UserError as error:
                if not str(error).startswith("stopped"):
                    raise
                raise UserError("stopped; the same command goes on with this row") from None
            done[key] = dict(entry, row=row, table=table[row][0], paper=table[row][2], seed=seed,
                             argv=sys.argv, config=config, **versions(pick_device(cfg.device)))
            write_json(path, before() | {key: done[key]})          # another process may work on other rows
    return {key: entry for key, entry in done.items() if entry["row"] in chosen
            and decisive(entry["config"]) == decisive(settings(entry["row"], entry["seed"])[1])}


def print_ablation(done: dict, table: dict, names: tuple) -> None:
    """A line per row: mean (standard deviation) over seeds of the scores `names`, beside the paper's words."""
    rows = [row for row in table if any(entry["row"] == row for entry in done.values())]
    for group in dict.fromkeys(table[row][0] for row in rows):
        print(f"\n{group or 'unchanged'}, toy size")
        for row in (r for r in rows if table[r][0] == group):
            scores, cells = [entry["scores"] for entry in done.values() if entry["row"] == row], []
            for name in names:
                values = [s[name] for s in scores if name in s]
                if values:
                    spread = f" ({statistics.stdev(values):.2g})" if len(values) > 1 else ""
                    cells.append(f"{name} {statistics.mean(values):.3g}{spread}")
            print(f"{row:>36}  {'  '.join(cells)}   paper: {table[row][2]}")


def shared_parts(cfg, method: str, name: str, matters: tuple, train_parts) -> dict:
    """Ablation rows share what they do not change: {part: weights} of a row with the same settings, or trained now.

    name: of the stage; matters: beginnings of the fields that decide; train_parts() -> {part: {name: tensor}}.
    """
    fields = dataclasses.asdict(cfg)
    key = json.dumps({field: value for field, value in fields.items() if field.startswith(matters)}, default=str)
    folder = Path(cfg.output) / f"{name}_{hashlib.blake2b(key.encode(), digest_size=4).hexdigest()}"
    if (folder / "config.json").exists():
        return load_model(str(folder), method)[1]
    parts = train_parts()
    save_model(folder, parts, dict(method=method, train=fields, finished=list(parts)))
    return parts


# ---------------------------------------------------------------------------------------- flags every method has

DEGRADATION_NAMES = typing.Literal[tuple(DEGRADATIONS)]
PRECISIONS = typing.Literal["auto", "no", "bf16", "fp16"]


@dataclass(frozen=True)
class TrainFlags:
    """Flags that mean the same in every `train`. The comment beside a field is its --help text."""
    output: str = ""                       # folder for weights, checkpoints, log and pictures
    data: str = ""                         # folder of aligned faces, sub-folders = identities (default: the toy world)
    validation_data: str = ""              # folder of held-out faces (default: the last tenth of --data)
    readers: str = ""                      # folder of face readers trained on your own faces (default: weights/)
    degradation: DEGRADATION_NAMES = "codeformer"  # preset of common.DEGRADATIONS
    image_size: int = 64                   # side of the faces in pixels
    batch_size: int = 16                   # faces per process and micro-batch
    gradient_accumulation_steps: int = 1   # micro-batches per optimiser step
    max_grad_norm: float = 1.0             # clip the gradient to this norm (0: off)
    optimizer: typing.Literal["muon", "adamw"] = "muon"  # muon learns the toy world in half the time; papers adamw
    lr_scheduler: typing.Literal["cosine", "constant"] = "cosine"  # of every stage that has no schedule of its own
    lr_warmup_steps: int = 50              # steps in which the learning rate rises to its peak
    ema_decay: float = 0.999               # of the averaged weights that are saved and sampled
    max_train_steps: int = 10_000_000      # cap on the optimiser steps of each stage
    mixed_precision: PRECISIONS = "auto"   # autocast type; auto: bf16 where the processor has it, else no
    device: str = "auto"                   # auto, cpu, cuda, cuda:1, mps
    seed: int = 0                          # every draw of a run follows from it
    num_workers: int = 0                   # processes that prepare batches ahead
    log_steps: int = 10                    # steps between lines of log.jsonl
    checkpointing_steps: int = 500         # steps between saves of state.pt
    resume_from_checkpoint: str = ""       # state.pt, its folder, or latest
    overwrite: bool = False                # replace an earlier run in --output
    validation_faces: int = 256            # held-out faces restored and measured at the end


@dataclass(frozen=True)
class SampleFlags:
    """Flags that mean the same in every `sample`."""
    input: str                             # picture or folder of pictures: aligned faces, or photos with --landmarks
    output: str = ""                       # folder for restored_faces/, cmp/ and args.json
    checkpoint: str = ""                   # output folder of a training run, or a hub id
    landmarks: str = ""                    # JSON {"photo.jpg": [[five (x, y)] per face]}: align, restore, paste back
    reference: str = ""                    # folder of pictures shown beside the result in cmp/ (with the stems of cmp/)
    batch_size: int = 8                    # faces restored at a time
    seed: int = 0                          # of the noise
    device: str = "auto"                   # auto, cpu, cuda, cuda:1, mps
    mixed_precision: PRECISIONS = "no"     # autocast type


# ------------------------------------------------------------------------------------------------ command line

@functools.lru_cache                                              # finding a class's source parses its whole file
def field_help(cls) -> dict:
    """{field: the comment beside it} for a dataclass and its parents: comment and --help text cannot differ."""
    return {m[1]: m[2] for base in reversed(cls.__mro__) if dataclasses.is_dataclass(base)
            for m in re.finditer(r"^    (\w+): .*?#\s*(.+)$", inspect.getsource(base), re.M)}


class OneLine(argparse.ArgumentParser):
    """argparse whose complaint is one line, with the nearest flag for a misspelt one."""

    def error(self, message):
        unknown = re.search(r"unrecognized arguments: (--\w+)", message)
        flags = [f for a in self._actions for f in a.option_strings]
        near = difflib.get_close_matches(unknown[1], flags, 1, 0.65) if unknown else []
        self.exit(2, f"error: {message}{f'; did you mean {near[0]}?' if near else f'; see {self.prog} --help'}\n")


def add_flags(parser: argparse.ArgumentParser, cls, preset=None) -> None:
    """One --flag per field. Literal fields become choices, bool fields --x / --no-x, tuples take several values.

    The help ends with the value that holds without the flag, in brackets: `preset`'s, or the field's default.
    """
    hints, texts = typing.get_type_hints(cls), field_help(cls)
    for field in dataclasses.fields(cls):
        kind, names = hints[field.name], [f"--{field.name}"]
        names += {"input": ["-i"], "output": ["-o"]}.get(field.name, [])
        required = field.default is dataclasses.MISSING
        value, text = getattr(preset, field.name, field.default), texts.get(field.name, "")
        if not required and value not in ("", ()) and "default" not in text:
            text += f" [{' '.join(map(str, value)) if isinstance(value, tuple) else value}]"
        options = dict(help=text.replace("%", "%%"), default=argparse.SUPPRESS, required=required, dest=field.name)
        if kind is bool:
            options["action"] = argparse.BooleanOptionalAction
        elif typing.get_origin(kind) is typing.Literal:
            options["choices"] = typing.get_args(kind)
        elif typing.get_origin(kind) is tuple:
            options.update(nargs="+", type=typing.get_args(kind)[0])
        else:
            options["type"] = kind
        parser.add_argument(*names, **options)


def check_numbers(cfg) -> None:
    """Counts and sizes are at least 1 unless 0 means something, rates and weights at least 0 and finite.

    Raises UserError naming the flag.
    """
    for field in dataclasses.fields(cfg):
        value = getattr(cfg, field.name)
        for number in value if isinstance(value, tuple) else (value,):
            if isinstance(number, (int, float)) and not isinstance(number, bool):
                if isinstance(number, int) and number >= 2 ** 63:
                    raise UserError(f"--{field.name}: must be below 2 ** 63")
                if not math.isfinite(number) or number < 0:
                    raise UserError(f"--{field.name} {number}: must be a finite number, 0 or more")
                off = r"warmup|workers|^(bank|top_k|timestep|decay_kind|consistency_seeds|checkpointing_epochs)$"
                if number == 0 and type(number) is int and field.default != 0 and not re.search(off, field.name):
                    raise UserError(f"--{field.name} 0: must be at least 1")


def check_output(cfg) -> None:
    """UserError where the data lies in the folder that the run writes to: results are never mixed with it."""
    out = Path(getattr(cfg, "output", "") or ".").resolve()
    for flag in ("data", "validation_data"):
        if getattr(cfg, flag, "") and Path(getattr(cfg, flag)).resolve().is_relative_to(out):
            raise UserError(f"--output {cfg.output}: holds --{flag} {getattr(cfg, flag)}; choose another folder")


def ready_streams() -> None:
    """Standard output and error that may be closed, and print any file's name."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:
            setattr(sys, name, open(os.devnull, "w"))
        elif hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")


def parse(doc: str, verbs: dict, argv: list | None) -> tuple:
    """(function, class, preset, {field: value given}) of a command line; see `command_line`."""
    parser = OneLine(description=doc.strip().splitlines()[0], allow_abbrev=False)
    commands = parser.add_subparsers(dest="verb", required=True, parser_class=OneLine)
    for name, (cls, presets, _) in verbs.items():
        sub = commands.add_parser(name, help=(cls.__doc__ or "").splitlines()[0], description=cls.__doc__,
                                  allow_abbrev=False)
        if len(presets) > 1:
            sub.add_argument("--preset", choices=list(presets), default=next(iter(presets)),
                             help="named values; any flag overrides")
        add_flags(sub, cls, next(iter(presets.values()), None))
    arguments, unknown = parser.parse_known_args(argv)
    if unknown:
        commands.choices[arguments.verb].error(f"unrecognized arguments: {' '.join(unknown)}")
    given = {k: tuple(v) if isinstance(v, list) else v for k, v in vars(arguments).items()}
    cls, presets, function = verbs[given.pop("verb")]
    preset = given.pop("preset", None)
    return function, cls, presets[preset] if preset else next(iter(presets.values()), None), given


def complaint(error: Exception) -> str:
    """One line about what a person can mend; "" about what only a programmer can."""
    text = str(error)
    if isinstance(error, UserError):
        return text if text.startswith("stopped") else f"error: {text}"
    if isinstance(error, BrokenPipeError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # else Python complains once more at its end
        return "error: standard output was closed; a training goes on with --resume_from_checkpoint latest"
    if isinstance(error, torch.OutOfMemoryError):
        return ("error: the GPU's memory is full: give a smaller --batch_size (more --gradient_accumulation_steps) or "
                "--gradient_checkpointing, where there are such flags")
    if isinstance(error, MemoryError) or "DefaultCPUAllocator" in text:
        return "error: the memory is full: give a smaller --batch_size or --image_size"
    if text.startswith("DataLoader worker"):
        return (f"error: one of --num_workers was killed, perhaps for memory ({text}); give fewer and "
                "--resume_from_checkpoint latest")
    return f"error: {text}" if isinstance(error, OSError) else ""


def command_line(doc: str, verbs: dict, argv: list | None = None) -> None:
    """`python METHOD.py VERB --flags`. verbs: {name: (dataclass, {preset: value of it}, function of it)}.

    Exits with a status: 0 done, 2 the user can mend it (one line says how), 130 stopped by Ctrl-C at once.
    """
    ready_streams()
    function, cls, base, given = parse(doc, verbs, argv)
    try:
        cfg = dataclasses.replace(base, **given) if base is not None else cls(**given)
        check_numbers(cfg)
        check_output(cfg)
        function(cfg)
    except (UserError, OSError, MemoryError, RuntimeError) as error:
        line = complaint(error)
        if not line:
            raise
        print(line, file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("stopped at once, nothing saved since the last checkpoint", file=sys.stderr)
        sys.exit(130)
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
