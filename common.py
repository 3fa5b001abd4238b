"""What would be the same for any face-restoration paper: pictures, degradation, data, a run, weights, LoRA, the command line.

    captions      ATTRIBUTES, SIBLINGS, verbalise                  12 attributes of a face, and the sentence that states them
    degradation   Degradation, DEGRADATIONS, degrade               lq = { JPEG_q((hq * k_sigma) down_r + n) } up_r
    pictures      read_image, write_image, write_grid              files <-> (3, H, W) tensors
    data          Faces, open_faces                                a folder of people as batches
    run           Run                                              device, precision, processes, checkpoints, log
    updates       make_optimizer, lr_schedule, EMA                 what a training loop is made of
    weights       read_weights, load_strict, save_part, open_run, from_folder
    LoRA          LoRALinear, add_lora, merge_lora, read_lora
    restoring     restore_folder                                   `sample` of every method, without its network
    command line  TrainFlags, SampleFlags, command_line            flags from the fields of a dataclass

Images are `(3, H, W)` or `(B, 3, H, W)` RGB float32 in [-1, 1]. A `UserError` is a mistake of the person at the keyboard:
`command_line` prints it as one line and exits with status 2.
"""
import argparse
import collections
import csv
import dataclasses
import functools
import hashlib
import inspect
import io
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import typing
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

# OpenMP's threads wait awake for each other. Beside other busy programs a long wait costs many times the work itself.
# libgomp reads this when torch is imported, so `common` is imported before torch. docs/speed.md has the measurement.
os.environ.setdefault("GOMP_SPINCOUNT", "1000")

import numpy as np
import safetensors.torch
import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFilter, ImageOps
from tqdm import tqdm


class UserError(ValueError):
    """Something the user can mend: one line that names the file or flag and the remedy."""


class Stopped(UserError):
    """A stop that was asked for, with all saved: no error."""


def mix(*numbers) -> int:
    """One 48-bit seed from any integers and strings, the same on every machine."""
    return int.from_bytes(hashlib.blake2b(repr(numbers).encode(), digest_size=6).digest(), "big")


# ------------------------------------------------------------------------------------------------ captions

# (CelebA's index, name, phrase when on, phrase when off)
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
SIBLINGS = ((5, 6), (7, 8, 9, 10))                                # switching one on switches the others off


def verbalise(scores) -> str:
    """Caption from 12 attribute scores in [0, 1], in the order of ATTRIBUTES.

    An attribute above 0.6 is named, below 0.4 its negative phrase is, if it has one; between, it is left out. Of the
    hair colours, and of wavy and straight, only the highest score counts.
    """
    scores = [float(s) for s in (scores.tolist() if torch.is_tensor(scores) else scores)]
    if len(scores) != len(ATTRIBUTES):
        raise ValueError(f"verbalise wants {len(ATTRIBUTES)} scores, got {len(scores)}")

    def say(i):  # -> list of no phrase or one
        phrase = ATTRIBUTES[i][2] if scores[i] > 0.6 else ATTRIBUTES[i][3] if scores[i] < 0.4 else ""
        return [phrase] if phrase else []

    person = " ".join(say(0) + say(1) + ["person"])
    hair = " ".join([phrase for group in SIBLINGS for phrase in say(max(group, key=lambda i: scores[i]))] + ["hair"])
    hair = " and ".join(([hair] if hair != "hair" else []) + say(4))
    wears = " and ".join(say(3) + say(11))
    article = "an" if person[0] in "aeiou" else "a"
    who = f"a photo of {article} {person}" + (f" with {hair}" if hair else "")
    return ", ".join([who] + ([f"wearing {wears}"] if wears else []) + say(2))


# ------------------------------------------------------------------------------------------------ degradation

@dataclass(frozen=True)
class Degradation:
    """Ranges of lq = { JPEG_q( (hq * k_sigma) down_r + n_delta ) } up_r, each drawn uniformly per image.

    `blur` and `kernel` are pixels of a 512 px image and scale with the image. `down` is r: the small image in the middle
    has 512 / r pixels a side at every image size.
    """
    source: str                            # where the numbers come from
    blur: tuple = (1.0, 15.0)              # sigma of the Gaussian kernel, pixels at 512
    down: tuple = (4.0, 30.0)              # r: the small image has 512 / r pixels a side
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
    "vqfr1": Degradation("VQFR v1: GFPGAN without colour changes", (0.1, 10), (0.8, 8), (0, 20), (60, 100)),
    # DIFFERS: the release resizes by a random interpolation and half of its noise is grey; here as everywhere.
    "a2bfr": Degradation("A2BFR release, condition helper", (3, 15), (16, 16), (0, 25.5), (35, 90), isotropic=1.0,
                         kinds=("gaussian", "average", "median", "motion"),
                         blur_share=0.5, noise_share=0.2, jpeg_share=0.7),
    "toy": Degradation("toy presets: a face of 64 px loses who it is; no more noise than in the papers", (1, 15), (12, 28),
                       (0, 20), (30, 90)),
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
    draws = iter(torch.rand(16, generator=rng).tolist())
    uniform = lambda low, high: low + (high - low) * next(draws)
    size, unit, device = hq.shape[-1], hq.shape[-1] / 512, hq.device
    kind = spec.kinds[int(uniform(0, len(spec.kinds)))]
    sigma_x, sigma_y, angle = uniform(*spec.blur), uniform(*spec.blur), uniform(-math.pi, math.pi)
    round_kernel, blurred = uniform(0, 1) < spec.isotropic, uniform(0, 1) < spec.blur_share
    thumbnail = int(512 / uniform(*spec.down))
    delta = uniform(*spec.noise) / 255 * (uniform(0, 1) < spec.noise_share)
    quality, compressed = int(uniform(spec.jpeg[0], spec.jpeg[1] + 1)), uniform(0, 1) < spec.jpeg_share
    shift = torch.tensor([uniform(-1, 1) for _ in range(3)]).view(3, 1, 1) * 20 / 255 * (uniform(0, 1) < spec.jitter)
    grey = uniform(0, 1) < spec.grey

    x = hq * 0.5 + 0.5
    if blurred:
        # At 512 px: gaussian 41, average and median sigma, motion 1.7 sigma pixels; never narrower than 3
        side = spec.kernel if kind == "gaussian" else sigma_x * (1.7 if kind == "motion" else 1)
        side = max(3, 2 * round((side * unit - 1) / 2) + 1)
        if kind == "median":
            x = from_pil(to_pil(x * 2 - 1).filter(ImageFilter.MedianFilter(side))).to(device) / 2 + 0.5
        else:
            weights = blur_kernel(kind, side, sigma_x * unit, (sigma_x if round_kernel else sigma_y) * unit, angle)
            padded = F.pad(x[None], [side // 2] * 4, mode="reflect")         # the border rule of cv2.filter2D
            x = F.conv2d(padded, weights.to(device).expand(3, 1, side, side), groups=3)[0]
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
    """(B, 3, S, S) in [-1, 1] -> (lq, hq), both (B, 3, S, S); a share of the pairs may be grey. See `degrade`."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1 if hq.shape[-1] <= 128 else threads)  # on a small image threads wait longer than they work
    pairs = [degrade_one(image, spec, seed) for image, seed in zip(hq, seeds, strict=True)]
    torch.set_num_threads(threads)
    return torch.stack([lq for lq, _ in pairs]), torch.stack([clean for _, clean in pairs])


def degrade(hq: torch.Tensor, spec: Degradation, seeds) -> torch.Tensor:
    """lq = { JPEG_q( (hq * k_sigma) down_r + n_delta ) } up_r  [Pref-Restore Eq. 16; the other papers cite or say it]

    hq (B, 3, S, S) in [-1, 1] on any device, spec a `Degradation`, seeds B integers -> lq, same shape, 8-bit values
    in [-1, 1]. Image i depends on (hq[i], spec, seeds[i]) alone, so any test set can be rebuilt from its seeds.
    Never grey, as hq stays in colour; `degrade_pair` turns both.
    """
    return degrade_pair(hq, dataclasses.replace(spec, grey=0.0), seeds)[0]


# ------------------------------------------------------------------------------------------------ pictures

def to_pil(image: torch.Tensor) -> Image.Image:
    """(3, H, W) in [-1, 1] -> an 8-bit RGB picture."""
    array = (image.detach().float().clamp(-1, 1) * 127.5 + 127.5).round().byte()
    return Image.fromarray(array.permute(1, 2, 0).cpu().numpy())


def from_pil(picture: Image.Image) -> torch.Tensor:
    """A picture of any mode -> (3, H, W) float32 in [-1, 1], sRGB; what is transparent lies on mid grey."""
    if picture.mode.startswith("I") or picture.mode == "F":       # 16-bit and float grey: Pillow would clip at 255
        grey = np.nan_to_num(np.asarray(picture, dtype=np.float32))
        tops = (1, 255, 65535) if picture.mode == "F" else (255, 65535) if picture.mode == "I" else (65535,)
        top = next((top for top in tops if grey.max() <= 1.5 * top), grey.max())
        picture = Image.fromarray((grey / top * 255).clip(0, 255).round().astype(np.uint8))
    alpha = picture.convert("RGBA").getchannel("A") if picture.has_transparency_data else None
    if "icc_profile" in picture.info:
        from PIL import ImageCms
        picture = picture.convert({"L": "L", "LA": "L", "CMYK": "CMYK"}.get(picture.mode, "RGB"))   # no alpha, no palette
        try:
            profile = ImageCms.ImageCmsProfile(io.BytesIO(picture.info["icc_profile"]))
            picture = ImageCms.profileToProfile(picture, profile, ImageCms.createProfile("sRGB"), outputMode="RGB")
        except (ImageCms.PyCMSError, OSError):                    # damaged, or of another colour space than the picture
            pass
    if alpha:
        picture = Image.composite(picture.convert("RGB"), Image.new("RGB", picture.size, (128, 128, 128)), alpha)
    return torch.from_numpy(np.array(picture.convert("RGB"))).permute(2, 0, 1).float() / 127.5 - 1


def list_images(path, recursive: bool = False) -> list:
    """Files with a suffix that Pillow knows: [path] itself, or those in the folder, sorted. UserError if none."""
    path, known = Path(path), Image.registered_extensions().keys() - {".pdf", ".mpg", ".mpeg", ".eps", ".h5", ".hdf"}
    if path.is_file():
        return [path]
    inside = path.glob("*")
    if recursive:                                                 # behind links too
        inside = [Path(folder, name) for folder, _, names in os.walk(path, followlinks=True) for name in names]
    inside = [file for file in inside if file.name[0] != "."]
    found = [file for file in inside if file.suffix.lower() in known and file.is_file()]
    if not found:
        raise UserError(f"{path}: {'no pictures there' if path.exists() else 'no such file or folder'}")
    if passed := [file.name for file in inside if file.suffix.lower() not in known | {".csv", ".json", ".jsonl"}]:
        print(f"{path}: {len(passed)} files or folders passed over, such as {passed[0]}", flush=True)
    return sorted(found)


def read_image(path, size: int | None = None) -> torch.Tensor:
    """Any picture that Pillow reads -> (3, H, W) in [-1, 1], turned by its EXIF flag.

    With `size` its centred square as (3, size, size). UserError where Pillow cannot read it whole.
    """
    try:
        with Image.open(path) as file:
            file.load()                                           # raises where the pixels are damaged
            image = from_pil(ImageOps.exif_transpose(file))
    except Exception as error:                                    # Pillow raises many kinds, SyntaxError among them
        raise UserError(f"{path}: not a readable picture ({first_line(error)})") from None
    return image if size is None else centred_square(image, size)


def centred_square(image: torch.Tensor, size: int) -> torch.Tensor:
    """(3, H, W) -> (3, size, size), the middle; bicubic, antialiased when it shrinks (PMRF's way from FFHQ's 1024 to 512)."""
    side = min(image.shape[-2:])
    top, left = ((n - side) // 2 for n in image.shape[-2:])
    image = image[:, top:top + side, left:left + side]
    if side == size:
        return image
    return F.interpolate(image[None], (size, size), mode="bicubic", antialias=True, align_corners=False)[0].clamp(-1, 1)


def random_crop(x: torch.Tensor, side: int) -> torch.Tensor:
    """(B, C, H, W) -> (B, C, side, side), a place of its own for every image; smaller sides stay as they are."""
    place = [torch.randint(max(1, n - side + 1), (len(x),)).tolist() for n in x.shape[-2:]]
    return torch.stack([image[:, top:top + side, left:left + side] for image, top, left in zip(x, *place)])


@contextmanager
def whole_file(path):
    """Write to a temporary neighbour, flush, rename: `path` holds the old content or the new one, never half of it."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name[:60]}.tmp")
    try:
        yield temporary
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        os.chmod(temporary, 0o644)                                # safetensors writes files for their owner alone
        os.replace(temporary, path)
    except (OSError, RuntimeError, safetensors.SafetensorError) as error:                   # e.g. the disk is full
        raise OSError(f"{path}: cannot be written ({first_line(error)})") from None
    finally:
        temporary.unlink(missing_ok=True)


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


def first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:160]


# ------------------------------------------------------------------------------------------------ data

class Faces:
    """People in a folder as batches that depend on (seed, step, rank) alone.

    A sub-folder is a person. Beside them may lie attributes.csv (CelebA's names), landmarks.csv (98 points in pixels of
    the file) and captions.json; a batch holds what there is. `files` chooses among the pictures of the folder.
    """

    def __init__(self, folder, size: int, degradation: str = "codeformer", mirror: bool = False, files=None):
        self.folder, self.size, self.mirror = Path(folder), size, mirror
        self.cache, self.told, self.degradation = {}, False, DEGRADATIONS[degradation]
        self.files = list(files) if files is not None else list_images(folder, recursive=True)
        self.names = [path.relative_to(self.folder).as_posix() for path in self.files]
        people = {name: k for k, name in enumerate(sorted({path.parent for path in self.files}))}
        self.person = torch.tensor([people[path.parent] for path in self.files])
        self.labels = {}
        names = [name for _, name, *_ in ATTRIBUTES]
        for key, columns in (("attributes", names), ("landmarks", [f"{axis}{i}" for i in range(98) for axis in "xy"])):
            table, missing = read_table(self.folder / f"{key}.csv", columns), [math.nan] * len(columns)
            if table and not table.keys() & set(self.names):
                raise UserError(f"{self.folder}/{key}.csv: names no picture here; wants paths such as {self.names[0]}")
            if table:
                self.labels[key] = torch.tensor([table.get(name, missing) for name in self.names])
        if "attributes" in self.labels:                           # CelebA writes -1 and 1
            self.labels["attributes"].clamp_(0, 1)
        self.captions = read_json(self.folder / "captions.json") if (self.folder / "captions.json").exists() else {}

    def __len__(self) -> int:
        return len(self.files)

    def load(self, first: int) -> tuple:
        """(k, picture k as bytes (3, S, S), its (W, H)): of the first, or where that is damaged, which is said, the next."""
        for k in ((first + i) % len(self) for i in range(len(self))):
            if k not in self.cache:
                try:
                    image = read_image(self.files[k])
                except UserError as error:
                    print(f"skipped: {error}", flush=True)
                    self.cache[k] = None
                    continue
                square = ((centred_square(image, self.size) + 1) * 127.5).round().byte()
                found = k, square, tuple(image.shape[:0:-1])
                if image.shape[1] != image.shape[2] and not self.told:
                    print(f"{self.files[k]}: not square, its centred square is used; so is that of others", flush=True)
                    self.told = True
                if len(self) * square.numel() > 2 ** 31:          # a large set does not fit into memory
                    return found
                self.cache[k] = found
            if self.cache[k]:
                return self.cache[k]
        raise UserError(f"{self.folder}: no picture can be read")

    def batch(self, places, seeds, degraded: bool = True) -> dict:
        """hq, lq (B, 3, S, S), person, place, seeds (B,), and attributes (B, 12), landmarks (B, 98, 2), captions if known.

        No landmarks where faces are mirrored, which exchanges left and right.
        """
        places, images, sizes = map(list, zip(*(self.load(int(k)) for k in places)))
        found = dict(hq=torch.stack(images) / 127.5 - 1, person=self.person[places], place=torch.tensor(places),
                     seeds=torch.as_tensor(seeds))
        if self.mirror:
            found["hq"] = torch.where((found["seeds"] % 2 == 0).view(-1, 1, 1, 1), found["hq"].flip(-1), found["hq"])
        if degraded:
            found["lq"], found["hq"] = degrade_pair(found["hq"], self.degradation, found["seeds"])
        if "attributes" in self.labels:
            found["attributes"] = self.labels["attributes"][places]
        if "landmarks" in self.labels and not self.mirror:        # pixels of the file -> pixels of the square
            size = torch.tensor(sizes, dtype=torch.float32)[:, None]
            side = size.min(-1, keepdim=True).values
            points = self.labels["landmarks"][places].view(-1, 98, 2) - (size - side) / 2
            found["landmarks"] = points / side * self.size
        if self.captions:
            found["captions"] = [self.captions.get(self.names[k], "") for k in places]
        return found

    def training(self, count: int, seed: int, step: int, rank: int = 0, world: int = 1, degraded: bool = True) -> dict:
        """The batch of one (step, rank): epochs in an endless row, each a permutation of the files."""
        rng = torch.Generator().manual_seed(mix("faces", seed, step, rank))
        seeds = torch.randint(2 ** 40, (count,), generator=rng)
        row = (step * world + rank) * count + torch.arange(count)
        orders = {e: torch.randperm(len(self), generator=torch.Generator().manual_seed(mix("epoch", seed, e)))
                  for e in set((row // len(self)).tolist())}
        return self.batch([orders[p // len(self)][p % len(self)].item() for p in row.tolist()], seeds, degraded)

    def held_out(self, count: int) -> dict:
        """`count` faces, always the same: the first picture of every person, then the second ones, ..."""
        seen, turns = collections.Counter(), []
        for person in self.person.tolist():
            turns.append(seen[person])
            seen[person] += 1
        places = torch.tensor(turns).argsort(stable=True)[:count]
        return self.batch(places, torch.arange(len(places)) + mix("held out"))


def read_table(path: Path, columns: list) -> dict:
    """{file: [numbers]} of a CSV whose first column is the file; NaN for an absent column; {} without the file."""
    if not path.exists():
        return {}
    with open(path, newline="", encoding="utf-8-sig") as file:
        rows = csv.DictReader(file)
        try:
            return {row[rows.fieldnames[0]]: [float(row.get(name, "nan")) for name in columns] for row in rows}
        except (TypeError, ValueError):
            raise UserError(f"{path}, line {rows.line_num}: wants a number in every column") from None


def read_json(path):
    """The content of a JSON file. UserError where it is missing or damaged."""
    try:
        return json.loads(Path(path).read_text(encoding="utf-8-sig"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path}: cannot be read as JSON ({first_line(error)})") from None


def open_faces(cfg, mirror: bool = False) -> tuple:
    """(Faces to train on, Faces held out) of --data and --validation_data.

    Without --data the toy world is drawn into data/toy, once. Without --validation_data the last people of --data are held
    out, from the person whose first picture is nearest to the last tenth (or the last 200 pictures); of a folder without
    people its last pictures are.
    """
    data, validation = cfg.data, cfg.validation_data
    if not data:
        from toy import faces as toy
        if not Path("data/toy").exists() and int(os.environ.get("RANK", 0)) == 0:
            toy.draw("data/toy")
        if dist.is_initialized():                                 # the other processes wait for it
            dist.barrier()
        data, validation = "data/toy/train", validation or "data/toy/val"
    options = dict(size=cfg.image_size, degradation=cfg.degradation)
    if validation:
        return Faces(data, mirror=mirror, **options), Faces(validation, **options)
    files = list_images(data, recursive=True)
    first = len(files) - min(200, max(1, len(files) // 10))       # then the nearest picture where a person begins
    people = [k for k in range(1, len(files)) if files[k].parent != files[k - 1].parent]
    first = min(people, key=lambda k: abs(k - first), default=first)
    if first < 1:
        raise UserError(f"--data {data}: holds too few pictures to keep one for measuring; give --validation_data")
    return Faces(data, mirror=mirror, files=files[:first], **options), Faces(data, files=files[first:], **options)


# ------------------------------------------------------------------------------------------------ run

class Run:
    """One process of a run: where it computes and writes. torchrun starts one per GPU; rank 0 alone prints and saves.

    --output holds config.json, a NAME.safetensors for each finished part, log.jsonl, and state.pt of the stage in
    progress. A part is finished when its file is there, so a stage finds what earlier stages made by its name.
    """

    def __init__(self, cfg, settings: tuple = ()):
        """`settings`: fields of cfg that decide what weights mean; UserError where the run in --output has others."""
        self.cfg, self.folder, self.started = cfg, Path(cfg.output), time.time()
        self.rank, self.world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
        self.main, self.waited, self.begun, self.told = self.rank == 0, 0.0, self.started, 0.0
        self.stop = False                                         # "asked" by a signal, "saved" by `save`
        self.device = pick_device(cfg.device)
        if self.world > 1 and not dist.is_initialized():
            if self.device.type == "cuda":
                torch.cuda.set_device(self.device)
            dist.init_process_group("nccl" if self.device.type == "cuda" else "gloo")
        torch.manual_seed(cfg.seed)                               # the same initial weights in every process
        torch.set_float32_matmul_precision("high")                # TF32 on GPUs that have it
        torch.backends.cuda.enable_cudnn_sdp(False)               # its bf16 gradients were NaN for A2BFR's toy (torch 2.11)
        self.logged, self.former, self.entered = collections.defaultdict(list), [], False
        if hasattr(cfg, "resume_from_checkpoint"):
            self.check_folder(settings)

    def check_folder(self, settings: tuple) -> None:
        """UserError where --output holds another run, unless this one goes on with it or overwrites it."""
        cfg, config = self.cfg, self.folder / "config.json"
        replaced = ["config.json", "state.pt", "log.jsonl", "metrics.json", "*.safetensors"]
        if cfg.stage != "all":
            replaced = [f"{cfg.stage}*.safetensors", "state.pt"]          # 1: 1.1 and 1.2
        self.former = [path for name in replaced for path in self.folder.glob(name) if not cfg.resume_from_checkpoint]
        if self.former and not cfg.overwrite:
            raise UserError(f"--output {self.folder}: holds another run ({self.former[0].name} is there); "
                            "--resume_from_checkpoint latest goes on with it, --overwrite replaces it")
        if config.exists() and (cfg.resume_from_checkpoint or cfg.stage != "all"):
            before = read_json(config)["train"]
            for name in settings:
                if before.get(name) != json.loads(json.dumps(getattr(cfg, name))):
                    raise UserError(f"--{name} {getattr(cfg, name)}: {self.folder} was trained with {before.get(name)}; "
                                    "repeat that, or choose another --output")
        elif cfg.resume_from_checkpoint:
            self.say(f"{self.folder} holds no run yet: starting anew")

    def enter_folder(self) -> None:
        """Before the first step: delete what --overwrite replaces, write config.json, begin log.jsonl.

        Until then all that a run needs has been opened, so that a mistake costs no file.
        """
        self.entered = True
        self.wait()                                               # all have looked before rank 0 writes
        if self.main:
            for path in self.former:
                path.unlink(missing_ok=True)
            write_json(self.folder / "config.json", dict(method=Path(inspect.getfile(type(self.cfg))).stem,
                                                         train=dataclasses.asdict(self.cfg)))
            self.write_log(dict(argv=sys.argv, world=self.world, **versions(self.device)))
        self.wait()

    def wait(self) -> None:
        """Until all processes are here."""
        if self.world > 1:
            dist.barrier()

    def write_log(self, row: dict) -> None:
        """Append a line to log.jsonl."""
        with open(self.folder / "log.jsonl", "a") as file:
            file.write(json.dumps(row) + "\n")

    def part(self, name: str) -> Path | None:
        """The file of a part that this run, or the one it goes on with, has finished."""
        path = self.folder / f"{name}.safetensors"
        return path if path.exists() and path not in self.former else None

    def say(self, text: str) -> None:
        if self.main:
            tqdm.write(text)

    def compile(self, nets) -> None:
        """With --compile, torch.compile of the networks and of their parts, in place: names and weights stay."""
        for net in nets if self.cfg.compile else ():
            for module in (net, *net.children()):                 # some are called in parts: vae.encoder, vae.decoder
                module.compile()

    def autocast(self):
        native = torch.cuda.is_bf16_supported if self.device.type == "cuda" else torch.cpu._is_avx512_bf16_supported
        bf16 = native() if self.cfg.mixed_precision == "auto" else self.cfg.mixed_precision == "bf16"
        return torch.autocast(self.device.type, torch.bfloat16, enabled=bf16)

    def batches(self, batch_at, stage: str, first: int, last: int):
        """Yield (step, batch) for steps first .. last - 1; batch_at(count, seed, step, rank, world) makes a batch.

        Torch is reseeded with (seed, stage, step, rank) before each step: a resumed run draws what an uninterrupted one
        does. Ctrl-C and SIGTERM end the loop after the step in progress, when `save` has been called.
        """
        count = self.cfg.batch_size * self.cfg.gradient_accumulation_steps
        # The loader's data set is the range of steps: a worker gets a step, and `collate_fn` makes its batch.
        loader = torch.utils.data.DataLoader(
            range(first, last), batch_size=None, num_workers=self.cfg.num_workers, worker_init_fn=ignore_signals,
            collate_fn=functools.partial(one_batch, batch_at, count, self.cfg.seed, self.rank, self.world))
        if not self.entered:
            self.enter_folder()
        self.begun, self.waited = time.time(), 0.0                # waited: for faces, reading and degrading them
        self.logged.clear()                                       # of a stage that ended between two lines of the log
        before = {number: signal.signal(number, self.ask_to_stop) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            source = iter(loader)
            for step in tqdm(range(first, last), stage, last, initial=first, disable=None if self.main else True):
                asked = time.time()
                batch = next(source)
                self.waited += time.time() - asked
                if isinstance(batch, UserError):
                    raise batch
                torch.manual_seed(mix(self.cfg.seed, stage, step, self.rank))
                yield step, {k: v.to(self.device) if torch.is_tensor(v) else v for k, v in batch.items()}
                if self.stop == "saved":
                    self.wait()                                   # torchrun ends all when one ends: rank 0 saves first
                    raise Stopped(f"stopped at step {step + 1} of stage {stage}, saved; go on with "
                                  "--resume_from_checkpoint latest")
        finally:
            source = None                                         # ends the loader's processes, which ignore SIGTERM
            for number, handler in before.items():
                signal.signal(number, handler)

    def ask_to_stop(self, number, frame):
        if self.stop and self.world == 1:
            raise KeyboardInterrupt
        self.stop = "asked"
        self.say("stopping after this step" + " (once more: at once, without saving)" * (self.world == 1))

    def note(self, **values) -> None:
        """Values of one micro-batch for the next line of the log."""
        for name, value in values.items():
            self.logged[name].append(value.detach())              # stays on the device: no wait for a GPU

    def log(self, stage: str, step: int, every: int = 0, **values) -> None:
        """Mean of each value over `every` (0: --log_steps) steps, as a line of log.jsonl. UserError where one is not finite."""
        self.note(**values)
        if (step + 1) % (every or self.cfg.log_steps) and (step + 1) % self.cfg.checkpointing_steps:
            return
        means = {name: torch.stack(found).mean() for name, found in self.logged.items()}
        self.logged.clear()
        check_finite({"log": means}, f"stage {stage}, step {step + 1}")
        if self.main:
            row = {name: round(value.item(), 6) for name, value in means.items()}
            self.write_log(dict(stage=stage, step=step + 1, **row, seconds=round(time.time() - self.started, 2),
                                data_share=round(self.waited / (time.time() - self.begun), 4)))
            if not sys.stderr.isatty() and time.time() - self.told > 15:                # where no progress bar is drawn
                self.say(f"{stage}, step {step + 1}: " + ", ".join(f"{name} {value:.4g}" for name, value in row.items()))
                self.told = time.time()

    def average_gradients(self, modules: dict) -> None:
        """Mean over processes, in one message. Simpler than DDP, and it serves modules with several entry points."""
        if self.world > 1:
            gradients = [p.grad for module in modules.values() for p in module.parameters() if p.grad is not None]
            flat = torch.cat([g.flatten() for g in gradients])
            dist.all_reduce(flat)
            for g, averaged in zip(gradients, flat.div_(self.world).split([g.numel() for g in gradients])):
                g.copy_(averaged.view_as(g))

    def save(self, stage: str, step: int, modules: dict, ema: dict, *optimizers, every: int = 0) -> None:
        """state.pt: all that a resumed run needs, at every `every`-th step (0: --checkpointing_steps) and where a stop was
        asked for. modules {name: module}, ema {name: {tensor name: tensor}}. UserError where weights are not finite."""
        stop = self.stop == "asked"
        if self.world > 1:                                        # all processes stop at the same step
            asked = torch.tensor(float(stop), device=self.device)
            dist.all_reduce(asked)
            stop = asked.item() > 0
        if not stop and (step + 1) % (every or self.cfg.checkpointing_steps):
            return
        weights = {name: trained(module) for name, module in modules.items()}
        check_finite(weights, f"stage {stage}, step {step + 1}")
        if self.main:
            state = dict(stage=stage, step=step + 1, modules=weights, ema=dict(ema), seconds=time.time() - self.started,
                         optimizers=[optimizer.state_dict() for optimizer in optimizers])
            with whole_file(self.folder / "state.pt") as temporary:
                torch.save(state, temporary)
        self.stop = "saved" if stop else self.stop

    def load(self, stage: str, modules: dict, ema: dict, *optimizers) -> int:
        """The step to go on from: 0, or where state.pt of this stage was saved, whose content it loads."""
        path = self.folder / "state.pt"
        if not self.cfg.resume_from_checkpoint or not path.exists():
            return 0
        state = read_torch(path)
        if state["stage"] != stage:
            return 0
        for name, module in modules.items():
            load_trained(module, state["modules"][name], f"{path}, {name}")
            for key, tensor in ema[name].items():
                tensor.copy_(state["ema"][name][key])
        for optimizer, saved in zip(optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        self.started -= state["seconds"]
        self.say(f"resumed stage {stage} at step {state['step']}")
        return state["step"]

    def finish(self, stage: str, weights: dict, later: tuple = ()) -> None:
        """Write NAME.safetensors for each {NAME: {tensor name: tensor}}. `later` names parts that were trained on a former
        version of this stage: their files are deleted."""
        check_finite(weights, f"stage {stage}")
        if self.main:
            for name in later:
                if (self.folder / f"{name}.safetensors").exists():
                    (self.folder / f"{name}.safetensors").unlink()
                    self.say(f"{name} was trained on the former {stage} and is removed: train it again")
            for name, tensors in weights.items():
                save_part(self.folder / f"{name}.safetensors", tensors)
            for name in ("state.pt", "metrics.json"):              # the numbers were those of former parts
                (self.folder / name).unlink(missing_ok=True)
        self.wait()                                               # the next stage looks for state.pt

    def show(self, stage: str, pictures: dict) -> None:
        """samples_STAGE.png of {title: (N, 3, S, S)}, at the end of every stage."""
        write_grid(self.folder / f"samples_{stage}.png", pictures)

    def report(self, rows: dict, pictures: dict, nets: dict, **more) -> None:
        """metrics.json with `rows` {row: {score: number}}, what they were measured with and `more`; samples.png; the table."""
        import resource
        memory = torch.cuda.max_memory_allocated(self.device) if self.device.type == "cuda" else \
            1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        write_json(self.folder / "metrics.json", dict(
            rows=rows, **more, argv=sys.argv, seconds=round(time.time() - self.started, 1),
            peak_memory_gb=round(memory / 2 ** 30, 2), **versions(self.device),
            parameters={name: sum(p.numel() for p in net.parameters()) for name, net in nets.items()}))
        write_grid(self.folder / "samples.png", pictures)
        print_table(rows)
        self.say(f"pictures and numbers in {self.folder}")


def print_table(rows: dict) -> None:
    """{row: {column: number}} as a table; a column that a row lacks stays empty."""
    columns = {name: max(12, len(name) + 2) for row in rows.values() for name in row}
    width = max(16, *map(len, rows)) + 1
    print(" " * width + "".join(f"{c:>{w}}" for c, w in columns.items()))
    for name, row in rows.items():
        print(f"{name:>{width}}" + "".join(f"{row[c]:{w}.4g}" if c in row else " " * w for c, w in columns.items()), flush=True)


def one_batch(batch_at, count, seed, rank, world, step):
    """In a loader's process: the batch of a step, or the UserError that the main process raises."""
    try:
        return batch_at(count, seed, step, rank, world)
    except UserError as error:
        return error


def ignore_signals(worker: int) -> None:
    """In a loader's process: Ctrl-C and SIGTERM reach the whole group, but the main process decides when to end."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)


def pick_device(name: str) -> torch.device:
    """auto -> cuda, mps or cpu, in this order; under torchrun each process takes its own GPU."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    if name == "cuda":
        name = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"
    try:
        return torch.zeros(1, device=name).device
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"--device {name}: not usable here ({first_line(error)})") from None


def versions(device) -> dict:
    """What a number was measured with: torch, python, device, and the commit of this file where git knows it."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{device.type}, {torch.get_num_threads()} threads"
    git = ["git", "-C", str(Path(__file__).resolve().parent), "describe", "--always", "--dirty"]
    commit = subprocess.run(git, capture_output=True, text=True).stdout.strip() if shutil.which("git") else ""
    return dict(torch=torch.__version__, python=sys.version.split()[0], device=name, commit=commit)


def trained(module: nn.Module) -> dict:
    """{name: tensor} of what training changes: parameters with a gradient, and buffers (not a frozen backbone)."""
    frozen = {name for name, p in module.named_parameters(remove_duplicate=False) if not p.requires_grad}
    return {name: tensor.detach() for name, tensor in module.state_dict().items() if name not in frozen}


def check_finite(values: dict, where: str) -> None:
    """UserError if one of {group: {name: tensor}} is not finite."""
    for name, tensor in ((name, tensor) for group in values.values() for name, tensor in group.items()):
        if not tensor.isfinite().all():
            raise UserError(f"{where}: {name} is not finite; the last checkpoint is kept. Try a smaller --learning_rate, or "
                            "--mixed_precision no")


class EMA(dict):
    """{module name: {tensor name: running average of what is trained}}, equal to the weights at first."""

    def __init__(self, modules: dict, decay: float):
        super().__init__({name: {key: t.clone() for key, t in trained(module).items()} for name, module in modules.items()})
        self.modules, self.decay = modules, decay

    @torch.no_grad()
    def update(self, step: int) -> None:
        """ema <- d ema + (1 - d) weights with d = min(decay, (1 + n) / (10 + n)): a short memory at first."""
        d = min(self.decay, (1 + step) / (10 + step))
        for name, module in self.modules.items():
            for key, tensor in trained(module).items():
                average = self[name][key]
                average.lerp_(tensor, 1 - d) if tensor.is_floating_point() else average.copy_(tensor)


# ------------------------------------------------------------------------------------------------ optimisers

def make_optimizer(cfg, params, lr: float, betas: tuple = (0.9, 0.95), weight_decay: float = 0.01, tables=()):
    """AdamW or Muon, by --optimizer. `tables`: embeddings and codebooks, whose rows learn apart: Adam in both cases."""
    params, tables = list(params), list(tables)
    groups = [dict(params=[p for p in params if all(p is not table for table in tables)])]
    groups += [dict(params=tables, matrices=False)] if tables else []
    if cfg.optimizer == "muon":
        from toy.muon import Muon as Optimizer
    else:
        from torch.optim import AdamW as Optimizer
    return Optimizer(groups, lr=lr, betas=betas, weight_decay=weight_decay)


def warmup_cosine(steps: int, warmup: int = 0, floor: float = 0.0, first: float = 0.0):
    """factor(step) of the peak learning rate: `warmup` steps from `first` up, `steps` of a cosine to `floor`, constant."""
    def factor(step):
        if step < warmup:
            return first + (1 - first) * step / warmup
        return floor + 0.5 * (1 - floor) * (1 + math.cos(math.pi * min(1, (step - warmup) / max(1, steps))))
    return factor


def lr_schedule(cfg, steps: int, floor: float = 0.02):
    """factor(step) of the peak by --lr_scheduler and --lr_warmup_steps; the cosine ends at `floor` at the last of `steps`."""
    if cfg.lr_scheduler == "cosine":
        return warmup_cosine(steps - cfg.lr_warmup_steps, cfg.lr_warmup_steps, floor, 1 / (cfg.lr_warmup_steps + 1))
    return lambda step: min(1, (step + 1) / (cfg.lr_warmup_steps + 1))


# ------------------------------------------------------------------------------------------------ weights

def read_torch(path):
    """What a .safetensors file or one of torch.save holds; no code runs. UserError for a missing or damaged file, or code."""
    try:
        if Path(path).suffix == ".safetensors":
            return safetensors.torch.load_file(path)
        return torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; a stage writes its own when it ends") from None
    except Exception as error:                                    # a damaged file fails in a dozen ways
        raise UserError(f"{path}: refused: damaged, or it holds more than tensors, which could run code "
                        f"({first_line(error)[:80]}); convert it to safetensors") from None


def read_weights(path) -> dict:
    """{name: tensor} from .safetensors, .pth, .pt or .ckpt, without the usual wrappings and the `module.` of DDP."""
    state = read_torch(path)
    for key in ("params_ema", "params", "ema", "state_dict", "model"):
        if isinstance(state, dict) and isinstance(state.get(key), dict):
            state = state[key]
    if not isinstance(state, dict) or not all(isinstance(name, str) for name in state):
        raise UserError(f"{path}: holds no named tensors")
    if broken := [name for name, tensor in state.items() if torch.is_tensor(tensor) and tensor.isnan().any()]:
        raise UserError(f"{path}: {broken[0]} holds values that are not numbers")
    return {name.removeprefix("module."): tensor for name, tensor in state.items()}


def load_strict(module: nn.Module, state: dict, where) -> None:
    """load_state_dict(strict=True) whose complaint is one line."""
    try:
        module.load_state_dict(state, strict=True)
    except RuntimeError as error:
        wrong = " ".join(str(error).split())[:300]                # names that are missing, unknown, or of another shape
        raise UserError(f"{where}: is it of another method, preset or size? {wrong}") from None


def load_trained(module: nn.Module, state: dict, where) -> None:
    """What training changed (`trained`) back into a module whose frozen rest is there already."""
    own = trained(module)
    load_strict(module, {name: t for name, t in module.state_dict().items() if name not in own} | state, where)


def save_part(path, tensors: dict, about: dict | None = None) -> None:
    """{name: tensor} as a .safetensors file; `about` {text: text} goes into its header."""
    flat = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    with whole_file(path) as temporary:
        safetensors.torch.save_file(flat, temporary, metadata={"format": "pt"} | (about or {}))


def open_run(where: str, cls) -> tuple:
    """(folder, its `cls` configuration) of a run's folder or hub id; the configuration is None where it is a release's.

    cls: the `Train` of the method.
    """
    folder = find_checkpoint(where)
    if not folder.exists():
        raise UserError(f"{where}: no such checkpoint; `train -o {where}` makes one")
    config = read_json(folder / "config.json") if (folder / "config.json").exists() else {}
    if not isinstance(config, dict) or "method" not in config:
        return folder, None
    if not isinstance(config.get("train"), dict):
        raise UserError(f"{folder / 'config.json'}: lacks the configuration of a run")
    if config["method"] != Path(inspect.getfile(cls)).stem:
        raise UserError(f"{where}: is a run of {config['method']}.py")
    known = {field.name for field in dataclasses.fields(cls)}     # fields that are gone are left out
    return folder, cls(**{n: tuple(v) if isinstance(v, list) else v for n, v in config["train"].items() if n in known})


def find_checkpoint(where: str, flag: str = "checkpoint") -> Path:
    """A local file or folder as it is; `owner/name` is fetched from the hub. UserError, naming `flag`, if neither."""
    path = Path(where).expanduser()
    if path.exists() or not re.fullmatch(r"(?!runs/)[\w.-]+/[\w.-]+", where):
        return path
    try:
        from huggingface_hub import snapshot_download
        return Path(snapshot_download(where))
    except Exception as error:                                    # offline, gated, misspelt: a dozen kinds of exception
        raise UserError(f"--{flag} {where}: not a local path, and the hub says {type(error).__name__}") from None


def from_folder(cls, where: str, flag: str, subfolder: str = "", **options):
    """`cls.from_pretrained` (transformers, diffusers) of a local folder or hub id. UserError, naming `flag`, where it is
    missing, broken, or lacks weights, which the libraries would draw at random."""
    if cls.__module__.startswith("diffusers"):
        options["low_cpu_mem_usage"] = False                      # True would need the accelerate package
    try:
        if "Tokenizer" in cls.__name__:
            return cls.from_pretrained(where, subfolder=subfolder, **options)
        model, found = cls.from_pretrained(where, subfolder=subfolder, output_loading_info=True, **options)
        if found["missing_keys"]:
            raise ValueError(f"it lacks weights such as {min(found['missing_keys'])}")
    except Exception as error:                                    # missing files, other sizes, offline, gated: a dozen
        raise UserError(f"--{flag} {where}: {subfolder or cls.__name__} cannot be loaded ({first_line(error)})") from None
    return model


# ------------------------------------------------------------------------------------------------ LoRA

class LoRALinear(nn.Module):
    """y = W x + (alpha / rank) B A x with W frozen, A ~ N(0, (1 / rank)^2), B = 0: it starts as W [LoRA, Eq. 3].

    Of a convolution A keeps kernel, stride and padding, and B is 1x1 [layout of diffusers and peft].
    """

    def __init__(self, base: nn.Linear | nn.Conv2d, rank: int, alpha: float):
        super().__init__()
        self.base, self.scale = base.requires_grad_(False), alpha / rank
        own = dict(bias=False, device=base.weight.device)
        if isinstance(base, nn.Linear):
            self.lora_A = nn.Linear(base.in_features, rank, **own)
            self.lora_B = nn.Linear(rank, base.out_features, **own)
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
    """Wrap every Linear or Conv2d whose dotted name ends with one of `names`; freeze all else. Returns new parameters."""
    module.requires_grad_(False)
    targets = [n for n, m in module.named_modules()
               if type(m) in (nn.Linear, nn.Conv2d) and any(("." + n).endswith("." + end) for end in names)]
    if not targets:
        raise ValueError(f"no Linear or Conv2d in {type(module).__name__} has a name that ends with one of {names}")
    for name in targets:
        module.set_submodule(name, LoRALinear(module.get_submodule(name), rank, alpha))
    return [p for p in module.parameters() if p.requires_grad]


def merge_lora(module: nn.Module) -> None:
    """W <- W + (alpha / rank) B A, in place; the module is plain again."""
    for name, layer in [(name, layer) for name, layer in module.named_modules() if isinstance(layer, LoRALinear)]:
        a, b = layer.lora_A.weight.data, layer.lora_B.weight.data
        layer.base.weight.data += layer.scale * (b.flatten(1) @ a.flatten(1)).view_as(layer.base.weight)
        module.set_submodule(name, layer.base)


def read_lora(path, prefix: str = "transformer.") -> dict:
    """{layer: (A, B)} of a LoRA file in the layout of diffusers and peft, its own scale multiplied into B.

    The scale is 1, alpha / rank of `.alpha` tensors, or what diffusers' adapter settings say: lora_alpha, r, use_rslora,
    alpha_pattern and rank_pattern. UserError where the file holds anything else.
    """
    state, settings = read_weights(path), {}
    if Path(path).suffix == ".safetensors":
        with safetensors.safe_open(path, "pt") as file:
            settings = json.loads((file.metadata() or {}).get("lora_adapter_metadata", "{}"))
        settings = {key.removeprefix(prefix): value for key, value in settings.items()}
    match = lambda pattern, name, default: next(
        (value for end, value in (settings.get(pattern) or {}).items() if re.fullmatch(rf"(.*\.)?({end})", name)), default)
    found = {}
    for name in [n.removesuffix(".lora_A.weight") for n in state if n.endswith(".lora_A.weight")]:
        a, b = state.pop(f"{name}.lora_A.weight"), state.pop(f"{name}.lora_B.weight")
        layer, scale = name.removeprefix(prefix), 1.0
        if f"{name}.alpha" in state:
            scale = state.pop(f"{name}.alpha").item() / len(a)
        elif "lora_alpha" in settings:
            rank = match("rank_pattern", layer, settings.get("r", len(a)))
            rank = rank ** 0.5 if settings.get("use_rslora") else rank
            scale = match("alpha_pattern", layer, settings["lora_alpha"]) / rank
        found[layer] = (a, scale * b)
    if state or not found or settings.get("use_dora") or settings.get("lora_bias"):
        kind = min(state, default="DoRA, or biases" if found else "no LoRA")
        raise UserError(f"{path}: holds {kind}; wants pairs {prefix}LAYER.lora_A.weight and lora_B.weight alone")
    return found


# ------------------------------------------------------------------------------------------------ restoring

def restore_folder(cfg, restore, size: int, device) -> None:
    """`sample` without its network: read --input, restore in batches, write.

    `restore(lq (B, 3, size, size), names)` gives {folder: images of that shape}, at least "restored_faces"; a name is the
    stem of its result. cmp/ shows the input beside everything that came back.
    """
    out, files = Path(cfg.output), list_images(cfg.input)
    if (out / "restored_faces").exists() and not cfg.overwrite:
        raise UserError(f"--output {out}: holds results; choose another folder, or --overwrite")
    taken = collections.Counter(name for path in files for name in {path.stem, path.name})
    batch, done, told = [], 0, False
    for number, path in enumerate(tqdm(files, "restoring", disable=None)):
        try:
            image = read_image(path)
        except UserError as error:
            tqdm.write(f"skipped: {error}")
        else:
            if image.shape[1:] != (size, size) and not told:
                tqdm.write(f"{path.name}: {image.shape[2]}x{image.shape[1]}, its centred square is restored at {size}x{size}; "
                           "so are others of other sizes")
                told = True
            batch.append((path.stem if taken[path.stem] == 1 else path.name, centred_square(image, size)))
        if batch and (len(batch) == cfg.batch_size or number == len(files) - 1):
            names, lq = zip(*batch)
            results = restore(torch.stack(lq).to(device), list(names))
            if not all(images.isfinite().all() for images in results.values()):
                raise UserError("the network returned values that are not finite; try --mixed_precision no")
            for i, name in enumerate(names):
                for folder, images in results.items():
                    write_image(out / folder / f"{name}.png", images[i])
                beside = {"input": lq[i][None], **{folder: images[i:i + 1] for folder, images in results.items()}}
                write_grid(out / "cmp" / f"{name}.png", beside, cell=256)
            done, batch = done + len(names), []
    if not done:
        raise UserError(f"nothing was restored from {cfg.input}")
    write_json(out / "args.json", dict(argv=sys.argv, config=dataclasses.asdict(cfg), restored=done, **versions(device)))
    print(f"restored {done} face{'s' * (done > 1)} into {out / 'restored_faces'}", flush=True)


# ------------------------------------------------------------------------------------------------ command line

@dataclass(frozen=True)
class TrainFlags:
    """Flags that mean the same in every `train`. The comment beside a field is its --help text."""
    output: str = ""                       # folder for weights, checkpoints, log and pictures
    data: str = ""                         # folder of aligned faces, sub-folders = people (default: the toy world, drawn once)
    validation_data: str = ""              # folder of held-out people (default: the last tenth of --data, at most about 200)
    stage: str = "all"                     # one stage, or all in order
    degradation: typing.Literal[tuple(DEGRADATIONS)] = "codeformer"  # preset of common.DEGRADATIONS
    image_size: int = 512                  # side of the faces in pixels
    batch_size: int = 8                    # faces per process and micro-batch
    gradient_accumulation_steps: int = 1   # micro-batches per optimiser step
    gradient_checkpointing: bool = False   # recompute layers in the backward pass: less memory, more time
    max_grad_norm: float = 1.0             # clip the gradient to this norm
    optimizer: typing.Literal["muon", "adamw"] = "adamw"  # muon learns the toy world in half the time
    lr_scheduler: typing.Literal["cosine", "constant"] = "constant"  # of every stage that has no schedule of its own
    lr_warmup_steps: int = 0               # steps in which the learning rate rises to its peak
    ema_decay: float = 0.9999              # of the averaged weights that are saved and sampled (0: no average)
    max_train_steps: int = 10_000_000      # cap on the optimiser steps of each stage
    mixed_precision: typing.Literal["auto", "no", "bf16"] = "bf16"  # autocast type; auto: bf16 where the processor has it
    compile: bool = False                  # torch.compile the networks: minutes at the start, then faster steps
    device: str = "auto"                   # auto, cpu, cuda, cuda:1, mps
    seed: int = 0                          # every draw of a run follows from it
    num_workers: int = 4                   # processes that prepare batches ahead
    log_steps: int = 100                   # steps between lines of log.jsonl
    checkpointing_steps: int = 5000        # steps between saves of state.pt
    resume_from_checkpoint: typing.Literal["", "latest"] = ""  # latest: go on with the run in --output
    overwrite: bool = False                # replace the run in --output
    validation_faces: int = 256            # held-out faces restored and measured at the end
    readers: str = ""                      # folder of face readers trained on your own faces (default: toy/weights)


@dataclass(frozen=True)
class SampleFlags:
    """Flags that mean the same in every `sample`."""
    input: str                             # picture or folder of pictures: aligned faces
    output: str = ""                       # folder for restored_faces/, cmp/ and args.json
    checkpoint: str = ""                   # output folder of a training run, or a hub id
    overwrite: bool = False                # write into a folder that holds results
    batch_size: int = 8                    # faces restored at a time
    seed: int = 0                          # of the noise
    device: str = "auto"                   # auto, cpu, cuda, cuda:1, mps
    mixed_precision: typing.Literal["no", "bf16"] = "no"  # autocast type
    compile: bool = False                  # torch.compile the networks: for many faces


TOY = dict(degradation="toy", image_size=64, mixed_precision="auto", optimizer="muon", lr_scheduler="cosine",
           lr_warmup_steps=50, ema_decay=0.999, num_workers=0, log_steps=10, checkpointing_steps=500)
EVERYDAY = ("input", "output", "checkpoint", "data", "stage", "resume_from_checkpoint", "num_inference_steps", "batch_size",
            "max_train_steps", "device", "seed")


def field_help(cls) -> dict:
    """{field: the comment beside it} for a dataclass and its parents."""
    return {m[1]: m[2] for base in reversed(cls.__mro__) if dataclasses.is_dataclass(base)
            for m in re.finditer(r"^    (\w+): .*?#\s*(.+)$", inspect.getsource(base), re.M)}


class OneLine(argparse.ArgumentParser):
    """argparse whose complaint is one line."""

    def error(self, message):
        self.exit(2, f"error: {message}; see {self.prog} --help\n")


def add_flags(parser: argparse.ArgumentParser, cls, values: dict) -> None:
    """One --flag per field, in groups. Literal fields become choices, bool fields --x / --no-x, tuples take several values.
    The help ends with the value that holds without the flag: the one in `values`, or the field's default."""
    hints, texts, own = typing.get_type_hints(cls), field_help(cls), set(inspect.get_annotations(cls))
    groups = {title: parser.add_argument_group(title) for title in ("everyday", "of this method", "of every run")}
    for field in dataclasses.fields(cls):
        kind, names = hints[field.name], [f"--{field.name}"]
        names += {"input": ["-i"], "output": ["-o"]}.get(field.name, [])
        required = field.default is dataclasses.MISSING
        value, text = values.get(field.name, field.default), texts.get(field.name, "")
        if not required and value not in ("", ()):
            text += f" [{' '.join(map(str, value)) if isinstance(value, tuple) else value}]"
        options = dict(help=text.replace("%", "%%"), default=argparse.SUPPRESS, required=required, dest=field.name)
        if kind is bool:
            options["action"] = argparse.BooleanOptionalAction
        elif typing.get_origin(kind) is typing.Literal:
            options["choices"] = typing.get_args(kind)
        elif typing.get_origin(kind) is tuple:
            options.update(nargs="+", type=typing.get_args(kind)[0], metavar="")
        else:
            options.update(type=kind, metavar="")
        title = "everyday" if field.name in EVERYDAY else "of this method" if field.name in own else "of every run"
        groups[title].add_argument(*names, **options)


def check_config(cfg) -> None:
    """UserError for a number out of range (shares and decays are at most 1), an empty path, and data inside --output."""
    for field in dataclasses.fields(cfg):
        values = getattr(cfg, field.name)
        least = int(bool(field.default != 0 and re.search("size|steps$|faces$|rank$", field.name)))
        most = 1 if re.search("share|decay|drop|fraction", field.name) else sys.float_info.max
        for value in values if isinstance(values, tuple) else (values,):
            if isinstance(value, (int, float)) and not least <= value <= most:
                raise UserError(f"--{field.name} {value}: must be a number from {least}" + " to 1" * (most == 1))
    if getattr(cfg, "max_grad_norm", 1) == 0:
        raise UserError("--max_grad_norm 0: would make every gradient 0; a large number clips none")
    if getattr(cfg, "image_size", 0) % 8:
        raise UserError(f"--image_size {cfg.image_size}: must be a multiple of 8")
    for name in ("input", "output"):
        if getattr(cfg, name, None) == "":
            raise UserError(f"--{name}: is empty")
    if Path(getattr(cfg, "output", "")).is_file():
        raise UserError(f"--output {cfg.output}: is a file; name a folder")
    for name in ("data", "validation_data", "input"):
        inside = getattr(cfg, name, "")
        if inside and hasattr(cfg, "output") and Path(inside).resolve().is_relative_to(Path(cfg.output).resolve()):
            raise UserError(f"--output {cfg.output}: holds --{name} {inside}; choose another folder")


def parse(doc: str, verbs: dict, argv: list | None) -> tuple:
    """(function, configuration) of a command line; see `command_line`."""
    argv = sys.argv[1:] if argv is None else argv
    parser = OneLine(description=doc.strip().splitlines()[0], allow_abbrev=False)
    commands = parser.add_subparsers(dest="verb", required=True, parser_class=OneLine)
    for name, (cls, presets, _) in verbs.items():
        about = (cls.__doc__ or "").splitlines()[0]
        sub = commands.add_parser(name, help=about, description=about, allow_abbrev=False, usage="%(prog)s [flags]")
        first = next(iter(presets), None)
        if presets:
            sub.add_argument("--preset", choices=list(presets), default=first, help="named values; any flag overrides")
        shown = next((name for name in presets if f"--preset {name}" in " ".join(argv)), first)   # in --help
        add_flags(sub, cls, presets.get(shown, {}))
    given = {k: tuple(v) if isinstance(v, list) else v for k, v in vars(parser.parse_args(argv)).items()}
    cls, presets, function = verbs[given.pop("verb")]
    return function, cls(**{**presets.get(given.pop("preset", None), {}), **given})


def command_line(doc: str, verbs: dict, argv: list | None = None) -> None:
    """`python METHOD.py VERB --flags`. verbs: {name: (dataclass, {preset: {field: value}}, function of the configuration)}.

    Exits with a status: 0 done, 2 a mistake that the user can mend (one line says how), 130 stopped by Ctrl-C at once.
    """
    function, cfg = parse(doc, verbs, argv)
    try:
        check_config(cfg)
        function(cfg)
    except (UserError, OSError, MemoryError, torch.OutOfMemoryError) as error:
        memory = isinstance(error, (MemoryError, torch.OutOfMemoryError))
        text = "the memory is full: give a smaller --batch_size" if memory else str(error)
        print(text if isinstance(error, Stopped) else f"error: {text}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("stopped at once, nothing saved since the last checkpoint", file=sys.stderr)
        sys.exit(130)
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
