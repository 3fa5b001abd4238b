"""Draws people: painted portraits with exact identity, attributes and landmarks, in a folder of the one data format.

    python -m toy.faces -o data/toy

draws about 14,500 faces of 64 px in a minute. The methods call it by themselves where no --data is given.

    data/toy/train/PERSON/NN.png    1000 people, 8 pictures each
    data/toy/val/, data/toy/test/   256 other people each, 4 pictures each
    .../attributes.csv              file and the 12 attributes of common.ATTRIBUTES, 0 or 1
    .../landmarks.csv               file and 98 points x, y in pixels, WFLW order
    .../captions.json               {file: caption}
    data/toy/pairs/pairs.jsonl      the same face with one attribute switched, as `a2bfr.py pairs` writes them; people of train
    data/toy/pairs_val/             the same of people of val

Nothing here is needed to understand a method: it stands in for FFHQ where nothing can be downloaded.
"""
import argparse
import csv
import functools
import hashlib
import json
import os
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

from common import ATTRIBUTES, SIBLINGS, UserError, to_pil, verbalise  # first: it sets up torch's threads

import torch
import torch.nn.functional as F
from tqdm import tqdm

YOUNG, SMILING, OPEN, GLASSES, BANGS, WAVY, STRAIGHT, BLACK, BLOND, BROWN, GRAY, HAT = range(12)

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
    """Painted portraits with exact landmarks, attributes and identity .

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


# ------------------------------------------------------------------------------------------------ folders

SPLITS = dict(train=(0, 1000, 8), val=(2**30, 256, 4), test=(2**31, 256, 4))  # first identity, people, pictures each
PAIRS = (2000, 256)                                               # of people of train and of val


def switched(attributes, index: int) -> tuple:
    """(12 attributes with one switched, +1 or -1 for on or off); of siblings such as hair colours one stays on."""
    after, sign = list(attributes), 1 if attributes[index] < 0.5 else -1
    for group in SIBLINGS:
        if index in group:  # a colour cannot be switched off by itself: another one is switched on
            for i in group:
                after[i] = 0.0
    after[index] = 1.0 if sign > 0 else 0.0
    return after, sign


def save(image, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    to_pil(image).save(path, compress_level=1)


def write_labels(folder: Path, names: list, faces: ToyFaces) -> None:
    """attributes.csv, landmarks.csv and captions.json beside the pictures."""
    tables = dict(attributes=([name for _, name, *_ in ATTRIBUTES], faces.attributes.int()),
                  landmarks=([f"{axis}{i}" for i in range(98) for axis in "xy"], faces.landmarks.flatten(1)))
    for name, (columns, values) in tables.items():
        with open(folder / f"{name}.csv", "w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(["file", *columns])
            writer.writerows([where, *[round(v, 3) for v in row]] for where, row in zip(names, values.tolist()))
    captions = {where: verbalise(row) for where, row in zip(names, faces.attributes)}
    (folder / "captions.json").write_text(json.dumps(captions, indent=0) + "\n")


def of_its_time(identity, instance):
    """(B, 12) attributes of pictures of an album: 0 and 1 are of one time, with the same age and hair, 2 and 3 of another."""
    now, then = (_settle(_draw_attributes(_hash(_hash(identity) + k))) for k in (instance, instance - instance % 2))
    lasting = [YOUNG, BANGS, WAVY, STRAIGHT, BLACK, BLOND, BROWN, GRAY]
    now[:, lasting] = then[:, lasting]
    return now


def draw_split(folder: Path, first: int, people: int, each: int, size: int, bar) -> None:
    """One sub-folder a person: the same identity under `each` poses, lights, moods and attributes."""
    names, drawn = [], []
    for person in range(0, people, 8):                             # eight people at a time
        count = min(8, people - person)
        who, when = first + person + torch.arange(count).repeat_interleave(each), torch.arange(each).repeat(count)
        faces = toy_faces(who, when, of_its_time(who, when), size)
        for i, image in enumerate(faces.image):
            names.append(f"{person + i // each:04d}/{i % each:02d}.png")
            save(image, folder / names[-1])
        drawn.append(faces)
        bar.update(len(faces.image))
    write_labels(folder, names, ToyFaces(*map(torch.cat, zip(*drawn))))


def draw_pairs(folder: Path, split: str, count: int, size: int, bar) -> None:
    """pairs.jsonl with source/ and target/: two pictures that differ in one attribute, of people of a split.

    The pictures are none of train/ or val/, so that a reference photograph is never the target itself.
    """
    rows = []
    for start in range(0, count, 64):
        numbers = torch.arange(start, min(start + 64, count))
        people = SPLITS[split][0] + numbers % SPLITS[split][1]
        source = toy_faces(people, 1000 + numbers, size=size)
        edits = []
        for k, before in zip(numbers.tolist(), source.attributes.tolist()):
            choices = [i for i in range(len(before)) if before[i] < 0.5 or not any(i in group for group in SIBLINGS)]
            index = choices[k // 3 % len(choices)]
            edits.append((index, *switched(before, index)))
        target = toy_faces(people, 1000 + numbers, torch.tensor([after for _, after, _ in edits]), size)
        for i, (k, (index, after, sign)) in enumerate(zip(numbers.tolist(), edits)):
            for where, image in (("source", source.image[i]), ("target", target.image[i])):
                save(image, folder / where / f"{k:05d}.png")
            rows.append(dict(source=f"source/{k:05d}.png", target=f"target/{k:05d}.png", attribute=ATTRIBUTES[index][1],
                             sign=sign, source_prompt=verbalise(source.attributes[i]), target_prompt=verbalise(after),
                             accepted=True))
        bar.update(2 * len(numbers))
    (folder / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def draw(folder, size: int = 64, share: float = 1.0) -> None:
    """Everything of the page above, under a temporary name until it is whole. share: less of it, for tests."""
    folder = Path(folder)
    if folder.exists():
        raise UserError(f"{folder}: is there already; remove it, or choose another -o")
    part = folder.with_name(f"{folder.name}.drawing{os.getpid()}")
    counts = {name: (first, max(2, round(share * people)), each) for name, (first, people, each) in SPLITS.items()}
    pairs, held = (max(4, round(share * n)) for n in PAIRS)
    total = sum(people * each for _, people, each in counts.values()) + 2 * pairs + 2 * held
    print(f"drawing {total} toy faces into {folder}, once", flush=True)
    try:
        with tqdm(total=total, desc="drawing", disable=None) as bar:
            for name, (first, people, each) in counts.items():
                draw_split(part / name, first, people, each, size, bar)
            draw_pairs(part / "pairs", "train", pairs, size, bar)
            draw_pairs(part / "pairs_val", "val", held, size, bar)
        if not folder.exists():                                    # another command may have drawn it meanwhile
            part.rename(folder)
    finally:
        shutil.rmtree(part, ignore_errors=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("-o", "--output", default="data/toy")
    parser.add_argument("--image_size", type=int, default=64)
    arguments = parser.parse_args()
    draw(arguments.output, arguments.image_size)
