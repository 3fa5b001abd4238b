"""common.py: the toy world, degradation, pictures, run plumbing, LoRA, and what bad input gets."""
import dataclasses
import io
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file, save_file

import common
from common import ATTRIBUTES, DEGRADATIONS, TOY_SPLITS, Degradation, UserError, degrade, toy_faces

ROOT = Path(__file__).parent.parent
NAMES = [name for _, name, _, _ in ATTRIBUTES]


# ---------------------------------------------------------------- toy world

def test_toy_faces_are_a_pure_function_of_their_seeds():
    before = torch.get_rng_state()
    batch = toy_faces(torch.tensor([3, 9]), torch.tensor([5, 1]))
    alone = toy_faces(9, 1)
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.allclose(batch.image[1], alone.image[0], atol=1e-5)
    assert torch.equal(batch.attributes[1], alone.attributes[0])
    assert batch.image.shape == (2, 3, 64, 64) and batch.image.abs().max() <= 1 and batch.landmarks.shape == (2, 98, 2)


def test_toy_splits_are_disjoint():
    ranges = sorted(TOY_SPLITS.values(), key=lambda r: r.start)
    assert len(ranges) == 3 and all(a.stop <= b.start for a, b in zip(ranges, ranges[1:]))
    assert len(TOY_SPLITS["train"]) >= 1_000_000


# Where an attribute may change the picture, as a box (left, top, right, bottom) in shares of the side.
REGIONS = {"Eyeglasses": (0.08, 0.28, 0.92, 0.66), "Mouth_Slightly_Open": (0.2, 0.5, 0.8, 0.98),
           "Bangs": (0.05, 0.0, 0.95, 0.62)}


@pytest.mark.parametrize("name", REGIONS)
def test_an_attribute_changes_only_its_region(name):
    people = torch.arange(24)
    base = toy_faces(people, people).attributes
    base[:, NAMES.index("Wearing_Hat")] = 0
    off, on = base.clone(), base.clone()
    off[:, NAMES.index(name)], on[:, NAMES.index(name)] = 0, 1
    a, b = toy_faces(people, people, off), toy_faces(people, people, on)
    change = (a.image - b.image).abs().amax(1)                              # (B, S, S)
    left, top, right, bottom = (int(64 * v) for v in REGIONS[name])
    outside = change.clone()
    outside[:, top:bottom, left:right] = 0
    assert outside.max() < 0.02 and (change.flatten(1).max(1).values > 0.1).all()


def test_attributes_do_not_move_the_face():
    """Hair, hats and glasses leave all landmarks where they are; only expression moves mouth and lids."""
    base = toy_faces(torch.arange(8), torch.arange(8))
    for name in ("Eyeglasses", "Bangs", "Wearing_Hat", "Young"):
        changed = base.attributes.clone()
        changed[:, NAMES.index(name)] = 1 - changed[:, NAMES.index(name)]
        assert torch.equal(toy_faces(torch.arange(8), torch.arange(8), changed).landmarks, base.landmarks), name


def test_landmarks_sit_where_they_are_drawn():
    """The pupils are dark or highlighted against the white beside them, and the mouth corners end the lips."""
    plain = torch.zeros(32, 12)
    plain[:, NAMES.index("Young")] = plain[:, NAMES.index("Brown_Hair")] = plain[:, NAMES.index("Straight_Hair")] = 1
    faces = toy_faces(torch.arange(32), torch.zeros(32, dtype=torch.long), plain, size=256)
    grey = faces.image.mean(1)
    hits = 0
    for i in range(32):
        for point, lids in ((96, (60, 64)), (97, (68, 72))):
            x, y = faces.landmarks[i, point].round().long().tolist()
            iris = grey[i, y - 2:y + 3, x - 2:x + 3].min()
            corners = faces.landmarks[i, list(lids)]
            white = torch.stack([grey[i, int(c[1]), int(0.55 * c[0] + 0.45 * x)] for c in corners]).max()
            hits += int(iris < white - 0.2)
    assert hits >= 60                                                       # of 64 eyes


def test_mean_geometry_is_the_ffhq_template():
    faces = toy_faces(torch.arange(200), torch.arange(200), size=32)
    faces = faces._replace(landmarks=faces.landmarks * 16)
    eyes = faces.landmarks[:, [96, 97]].mean(0)
    template = torch.tensor(common.FFHQ_512)
    assert (eyes - template[:2]).abs().max() < 12
    assert (faces.landmarks[:, [76, 82]].mean(0) - template[3:]).abs().max() < 20


def test_captions_follow_the_attributes_and_the_tokenizer_knows_them():
    tokenizer = common.WordTokenizer()
    for index in range(64):
        attributes = toy_faces(index, index, size=16).attributes[0]
        caption = common.verbalise(attributes)
        assert ("eyeglasses" in caption) == bool(attributes[NAMES.index("Eyeglasses")])
        assert ("a hat" in caption) == bool(attributes[NAMES.index("Wearing_Hat")])
        ids = tokenizer.encode(caption, 40)
        assert len(ids) == 40 and tokenizer.encode("<unk>", 1)[0] not in ids
    assert "eyeglasses" not in common.verbalise([0.5] * 12)                 # unknown attributes are not mentioned


# ---------------------------------------------------------------- degradation

def test_degradation_depends_on_its_seeds_alone():
    hq = toy_faces(torch.arange(4), torch.arange(4)).image
    for name, spec in DEGRADATIONS.items():
        lq = degrade(hq, spec, [1, 2, 3, 4])
        torch.manual_seed(123)
        assert torch.equal(lq, degrade(hq, spec, [1, 2, 3, 4])), name
        assert torch.equal(lq[2:], degrade(hq[2:], spec, [3, 4])), name
        assert lq.shape == hq.shape and not torch.equal(lq, degrade(hq, spec, [5, 6, 7, 8])), name
        levels = (lq + 1) * 127.5
        assert (levels - levels.round()).abs().max() < 1e-3 and lq.min() >= -1 and lq.max() <= 1


def test_degradation_equals_a_slow_reference():
    """Blur by explicit sums over a reflected neighbourhood, bilinear resize by hand; no noise, no JPEG."""
    spec = Degradation("test", blur=(6, 6), down=(16, 16), noise=(0, 0), jpeg_share=0.0, isotropic=1.0)
    hq = toy_faces(1, 1, size=64).image
    lq = degrade(hq, spec, [0])[0].numpy()
    sigma, half = 6 / 8, 2                                        # 512 -> 64: lengths shrink by 8, the kernel 41 -> 5
    weights = np.array([[np.exp(-(x * x + y * y) / (2 * sigma ** 2)) for x in range(-half, half + 1)]
                        for y in range(-half, half + 1)])
    weights /= weights.sum()
    image = np.pad(hq[0].numpy() * 0.5 + 0.5, ((0, 0), (half, half), (half, half)), mode="reflect")
    blurred = sum(weights[i, j] * image[:, i:i + 64, j:j + 64] for i in range(5) for j in range(5))

    def resize(a, n):
        """Bilinear with pixel centres at +0.5, no antialias."""
        m = a.shape[-1]
        place = np.clip((np.arange(n) + 0.5) * m / n - 0.5, 0, m - 1)
        low = np.minimum(place.astype(int), m - 2)
        f = place - low
        rows = a[:, low] * (1 - f)[:, None] + a[:, low + 1] * f[:, None]
        return rows[:, :, low] * (1 - f) + rows[:, :, low + 1] * f

    reference = np.round(resize(resize(blurred, 32), 64).clip(0, 1) * 255) / 127.5 - 1
    assert np.abs(lq - reference).max() <= 1 / 127.5 + 1e-4       # at most one grey level, where rounding flips


def test_noise_and_thumbnail_are_as_specified():
    flat = torch.zeros(32, 3, 64, 64)
    spec = Degradation("test", blur=(1, 1), down=(8, 8), noise=(10, 10), jpeg_share=0.0)   # 512 / 8 = 64: no resize
    lq = degrade(flat, spec, range(32)) * 127.5
    assert lq.std().item() == pytest.approx(10, rel=0.03) and abs(lq.mean().item()) < 0.6
    coarse = degrade(toy_faces(0, 0).image, dataclasses.replace(spec, down=(64, 64), noise=(0, 0)), [0])[0]
    steps = F.interpolate(F.interpolate(coarse[None], (8, 8), mode="bilinear"), (64, 64), mode="bilinear")
    assert (steps - coarse).abs().mean() < 0.05                             # 8 x 8 pixels carry all there is


def test_jpeg_is_pillows_jpeg():
    image = toy_faces(2, 2).image[0]
    file = io.BytesIO()
    common.to_pil(image).save(file, format="JPEG", quality=40)
    expected = torch.from_numpy(np.array(Image.open(file))).permute(2, 0, 1) / 255
    assert (common.jpeg(image / 2 + 0.5, 40) - expected).abs().max() < 1e-6


def test_ranges_are_drawn_uniformly():
    """Round kernels half the time, anisotropic ones with two sigmas: seen through the blur of a single white pixel."""
    spec = Degradation("test", blur=(6, 20), down=(8, 8), noise=(0, 0), jpeg_share=0.0, kernel=201)
    point = torch.full((200, 3, 64, 64), -1.0)
    point[:, :, 32, 32] = 1
    lq = degrade(point, spec, range(200)) + 1
    mass = lq[:, 0] / lq[:, 0].sum((1, 2), keepdim=True).clamp(min=1e-9)
    grid = torch.arange(64.0)
    mx, my = (mass.sum(1) * grid).sum(1), (mass.sum(2) * grid).sum(1)
    vx = (mass.sum(1) * (grid - mx[:, None]) ** 2).sum(1)
    vy = (mass.sum(2) * (grid - my[:, None]) ** 2).sum(1)
    seen = mass.sum((1, 2)) > 0                                             # wide kernels fall below one grey level
    round_share = ((vx / vy).log().abs()[seen] < 0.02).float().mean().item()
    assert 0.3 < round_share < 0.7


def test_grey_turns_both_images_grey():
    hq = toy_faces(torch.arange(3), torch.arange(3)).image
    lq, clean = common.degrade_pair(hq, dataclasses.replace(DEGRADATIONS["difface"], grey=1.0), range(3))
    assert (clean[:, 0] - clean[:, 1]).abs().max() < 1e-6 and (lq[:, 0] - lq[:, 2]).abs().max() < 1e-6


def test_lq_alone_is_never_grey():
    """`degrade` leaves hq in colour, so a grey lq beside it would teach to guess colours; nothing else changes."""
    hq, spec = toy_faces(torch.arange(3), torch.arange(3)).image, DEGRADATIONS["difface"]
    grey = degrade(hq, dataclasses.replace(spec, grey=1.0), range(3))
    assert torch.equal(grey, degrade(hq, dataclasses.replace(spec, grey=0.0), range(3)))
    assert (grey[:, 0] - grey[:, 2]).abs().mean() > 0.05


def test_every_preset_is_a_flag():
    choices = common.typing.get_args(common.typing.get_type_hints(common.TrainFlags)["degradation"])
    assert set(choices) == set(DEGRADATIONS)


def test_degrade_refuses_wrong_shapes():
    with pytest.raises(ValueError, match="square"):
        degrade(torch.zeros(1, 3, 8, 9), DEGRADATIONS["gfpgan"], [0])
    with pytest.raises(ValueError, match="one seed per image"):
        degrade(torch.zeros(2, 3, 16, 16), DEGRADATIONS["gfpgan"], [0])


# ---------------------------------------------------------------- pictures

def test_alignment_is_exact_on_the_template_and_inverts():
    photo = toy_faces(3, 3, size=512).image[0]
    face, transform = common.align_face(photo, common.FFHQ_512, 512)
    assert (face - photo)[:, 4:-4, 4:-4].abs().max() < 1e-2
    assert torch.allclose(transform, torch.eye(3, dtype=torch.float64)[:2], atol=1e-6)
    angle, scale = 0.3, 1.7
    turn = scale * torch.tensor([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]], dtype=torch.float64)
    points = torch.tensor(common.FFHQ_512, dtype=torch.float64)
    found = common.similarity(points @ turn.T + torch.tensor([5.0, -3.0]), points)
    assert torch.allclose(found[:, :2], torch.linalg.inv(turn), atol=1e-9)


def test_pasting_a_face_back_unchanged_changes_nothing():
    photo = F.interpolate(toy_faces(4, 4, size=256).image, (200, 300), mode="bilinear")[0]
    points = torch.tensor(common.FFHQ_512) * 0.25 + torch.tensor([90.0, 40.0])
    face, transform = common.align_face(photo, points, 256)
    back = common.paste_face(photo, face, transform)
    assert back.shape == photo.shape and (back - photo).abs().mean() < 0.01
    marked = common.paste_face(photo, torch.ones_like(face), transform)
    x, y = (points[2]).long().tolist()
    assert marked[:, y, x].min() > 0.99 and torch.equal(marked[:, :5, :5], photo[:, :5, :5])


@pytest.mark.parametrize("mode", ["L", "RGBA", "P", "CMYK", "I;16", "1", "LA"])
def test_every_mode_becomes_rgb(mode, tmp_path):
    picture = Image.fromarray((np.arange(48 * 40).reshape(48, 40) % 256).astype(np.uint8))
    deep = Image.fromarray(np.asarray(picture).astype(np.uint16) * 257)
    picture = deep if mode == "I;16" else picture.convert("RGB").convert(mode)
    path = tmp_path / ("x.tiff" if mode == "CMYK" else "x.png")
    picture.save(path)
    image = common.read_image(path)
    assert image.shape == (3, 48, 40) and image.min() >= -1 and image.max() <= 1
    if mode in ("L", "I;16"):
        assert (image[0] * 127.5 + 127.5 - torch.from_numpy(np.arange(48 * 40).reshape(48, 40) % 256)).abs().max() < 1


@pytest.mark.parametrize("kind", ["png", "gif", "jpg", "webp", "tif"])
def test_damaged_pictures_are_refused_never_black(tmp_path, kind):
    """60 damaged files: what Pillow refuses is refused, what it reads has Pillow's pixels."""
    rng = np.random.default_rng(0)
    picture = Image.fromarray(rng.integers(0, 256, (40, 40, 3), dtype=np.uint8)).resize((64, 64))
    picture.save(tmp_path / f"whole.{kind}", **({"compression": "tiff_lzw"} if kind == "tif" else {}))
    whole, refused, path = (tmp_path / f"whole.{kind}").read_bytes(), 0, tmp_path / f"damaged.{kind}"
    for number in range(60):
        data = bytearray(whole)
        if number % 2:
            data = data[:int(rng.integers(20, len(whole)))]
        else:
            for place in rng.integers(20, len(whole), 8):
                data[place] ^= int(rng.integers(1, 256))
        path.write_bytes(data)
        try:
            with Image.open(path) as file:
                pixels = np.asarray(file.convert("RGB"))
        except Exception:
            refused += 1
            with pytest.raises(UserError, match="damaged"):
                common.read_image(path)
        else:
            image = common.read_image(path)
            assert ((image.permute(1, 2, 0).numpy() + 1) * 127.5).round().astype(int).tolist() == pixels.tolist()
    assert refused >= 15                                           # else the damage was too mild to test anything


def test_exif_rotation_is_applied(tmp_path):
    picture = Image.new("RGB", (20, 10), "red")
    exif = Image.Exif()
    exif[0x0112] = 6
    picture.save(tmp_path / "x.jpg", exif=exif)
    assert common.read_image(tmp_path / "x.jpg").shape == (3, 20, 10)


@pytest.mark.parametrize("top, kind", [(255, np.int32), (65535, np.int32), (1, np.float32), (255, np.float32),
                                       (65535, np.float32), (65535, np.uint16)])
def test_deep_grey_pictures_keep_their_range(tmp_path, top, kind):
    Image.fromarray((np.linspace(0, top, 256).reshape(16, 16)).astype(kind)).save(tmp_path / "x.tiff")
    image = common.read_image(tmp_path / "x.tiff")
    assert torch.allclose(image[0].flatten(), torch.linspace(-1, 1, 256), atol=2 / 255)


def test_held_out_faces_inside_the_training_folder_are_not_trained_on(tmp_path):
    for i in range(4):
        common.write_image(tmp_path / ("val" if i < 2 else "train") / f"{i}.png", torch.zeros(3, 16, 16))
    faces = common.Faces(str(tmp_path), 16, str(tmp_path / "val"))
    assert [p.name for p in faces.files] == ["2.png", "3.png"] and len(faces.held_out_files) == 2


def test_landmarks_of_ten_points_are_not_two_faces(tmp_path):
    (tmp_path / "points.json").write_text(json.dumps({"a.png": [[[0, 0]] * 10], "b.png": []}))
    with pytest.raises(UserError, match="five points"):
        common.read_landmarks(tmp_path / "points.json")
    (tmp_path / "points.json").write_text(json.dumps({"a.png": [[[0, 0]] * 5] * 2, "b.png": []}))
    assert [len(v) for v in common.read_landmarks(tmp_path / "points.json").values()] == [2, 0]


def test_pictures_are_found_behind_links_and_a_loop_of_links_ends(tmp_path):
    for name in ("faces/b/1.png", "faces/a.jpg", "faces/.hidden.png", "faces/notes.txt", "elsewhere/2.png",
                 "faces/a.pdf", "faces/film.mpg"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    faces = tmp_path / "faces"
    (faces / "c").symlink_to(tmp_path / "elsewhere")
    (faces / "b" / "again").symlink_to(faces)
    assert common.list_images(faces) == [faces / "a.jpg"]
    assert common.list_images(faces, True) == [faces / "a.jpg", faces / "b" / "1.png", faces / "c" / "2.png"]


def test_unreadable_pictures_are_named(tmp_path):
    (tmp_path / "text.png").write_text("hello")
    Image.new("RGB", (64, 64), "blue").save(tmp_path / "cut.jpg")
    data = (tmp_path / "cut.jpg").read_bytes()
    (tmp_path / "cut.jpg").write_bytes(data[:len(data) // 2])
    for name in ("text.png", "cut.jpg"):
        with pytest.raises(UserError, match=name):
            common.read_image(tmp_path / name)
    with pytest.raises(UserError, match="no such"):
        common.list_images(tmp_path / "absent")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="no pictures"):
        common.list_images(tmp_path / "empty")


# ---------------------------------------------------------------- run plumbing

@dataclass(frozen=True)
class Tiny(common.TrainFlags):
    """A run of a linear model."""
    device: str = "cpu"
    steps: int = 8
    poison: int = -1


def tiny_run(cfg, stop_at=None):
    """Fit noise with a dropout network: any difference in draws, order or state shows in the weights."""
    run = common.Run(cfg)
    model = nn.Sequential(nn.Linear(4, 16), nn.Dropout(0.3), nn.Linear(16, 4))
    optimizer = common.make_optimizer(cfg, model.parameters(), 1e-2)
    stage = common.Stage(run, "tiny", {"m": model}, {"m": optimizer}, cfg.steps)
    faces = common.Faces("", 16)
    for step, batch in stage.steps(lambda k: faces.training(cfg.batch_size, cfg.seed, k, run.rank, run.world)):
        x = batch["hq"].mean((2, 3))
        noise = torch.randn(len(x), 1)
        loss = (model(torch.cat([x, noise], 1)) - noise).square().mean() / (0 if step == cfg.poison else 1)
        stage.update(loss, loss=loss)
        if stop_at is not None and step + 1 == stop_at and stage.micro + 1 == cfg.gradient_accumulation_steps:
            stage.step += 1
            stage.save()
            return stage
    return stage


def weights_of(stage):
    return torch.cat([t.flatten() for t in [*stage.trained["m"].values(), *stage.ema["m"].values()]]).detach()


@pytest.mark.parametrize("pieces", [1, 2])
def test_resume_is_bit_exact(tmp_path, pieces):
    cfg = Tiny(output=str(tmp_path / "a"), batch_size=4, gradient_accumulation_steps=pieces)
    straight = weights_of(tiny_run(cfg))
    other = dataclasses.replace(cfg, output=str(tmp_path / "b"))
    tiny_run(other, stop_at=4)
    resumed = tiny_run(dataclasses.replace(other, resume_from_checkpoint="latest"))
    assert torch.equal(straight, weights_of(resumed)) and straight.isfinite().all()


WORKER = """
import os, sys; sys.path[:0] = ["tests", "."]
import torch, test_common as t, dataclasses
torch.set_num_threads(1)
out = sys.argv[1]
cfg = t.Tiny(output=out + "/a", batch_size=4)
straight = t.weights_of(t.tiny_run(cfg))
other = dataclasses.replace(cfg, output=out + "/b")
t.tiny_run(other, stop_at=4)
torch.distributed.barrier()
resumed = t.weights_of(t.tiny_run(dataclasses.replace(other, resume_from_checkpoint="latest")))
torch.save((straight, resumed), out + f"/rank{torch.distributed.get_rank()}.pt")
torch.distributed.barrier()
torch.distributed.destroy_process_group()
os._exit(0)  # libtorch 2.14 aborts now and then while its threads are torn down ("terminate called ..."), all work done
"""


STOPPED = """
import os, signal, sys; sys.path[:0] = ["tests", "."]
import torch, test_common as t, common
plain, rank = common.toy_faces, os.environ["RANK"]
calls = []
def drawn(*a, **k):                      # the third batch of process 1 comes with a signal for it alone
    calls.append(1)
    if rank == "1" and len(calls) == 3:
        os.kill(os.getpid(), signal.SIGTERM)
    return plain(*a, **k)
common.toy_faces = drawn
try:
    t.tiny_run(t.Tiny(output=sys.argv[1] + "/a", batch_size=4, log_steps=100, checkpointing_steps=4))
except common.UserError as error:
    assert torch.load(sys.argv[1] + "/a/state.pt", weights_only=True)["step"] == 4   # on disk before any process ends
    open(sys.argv[1] + f"/said{rank}", "w").write(str(error))
torch.distributed.barrier()
os._exit(0)
"""


def in_two_processes(tmp_path, text):
    script = tmp_path / "worker.py"
    script.write_text(text)
    port = 20000 + os.getpid() % 20000
    workers = [subprocess.Popen([sys.executable, str(script), str(tmp_path)], cwd=ROOT, env=dict(
        os.environ, PYTHONPATH=str(ROOT), RANK=str(rank), WORLD_SIZE="2", LOCAL_RANK=str(rank),
        MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port)))
        for rank in range(2)]
    assert [w.wait(timeout=240) for w in workers] == [0, 0]


def test_a_signal_to_one_process_stops_both_at_the_same_step_and_saves(tmp_path):
    in_two_processes(tmp_path, STOPPED)
    assert all("stopped at step 4" in (tmp_path / f"said{rank}").read_text() for rank in (0, 1))


def test_two_processes_agree_and_resume_bit_exactly(tmp_path):
    in_two_processes(tmp_path, WORKER)
    (straight, resumed), (straight1, resumed1) = (torch.load(tmp_path / f"rank{r}.pt") for r in range(2))
    assert torch.equal(straight, resumed) and torch.equal(straight, straight1) and torch.equal(resumed, resumed1)
    alone = weights_of(tiny_run(Tiny(output=str(tmp_path / "c"), batch_size=4)))
    assert not torch.equal(alone, straight)                                 # the second process added something


def test_two_half_batches_equal_one_batch_in_the_gradient():
    """Averaged micro-batches give the gradient of the whole batch."""
    torch.manual_seed(0)
    x, whole, halves = torch.randn(8, 4), nn.Linear(4, 1), nn.Linear(4, 1)
    halves.load_state_dict(whole.state_dict())
    whole(x).square().mean().backward()
    for part in x.chunk(2):
        (halves(part).square().mean() / 2).backward()
    assert torch.allclose(whole.weight.grad, halves.weight.grad, atol=1e-6)


def test_ema_has_the_ramp():
    stage = common.Stage.__new__(common.Stage)
    stage.ema_decay, stage.step = 0.999, 0
    stage.trained, stage.ema = {"m": {"w": torch.ones(1)}}, {"m": {"w": torch.zeros(1)}}
    stage.update_ema()
    assert stage.ema["m"]["w"].item() == pytest.approx(0.9)                 # d = min(0.999, 1 / 10)


def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_the_checkpoint(tmp_path):
    cfg = Tiny(output=str(tmp_path), batch_size=2, checkpointing_steps=2, log_steps=1, poison=5)
    with pytest.raises(UserError, match=r"step 5: loss is not finite.*last good checkpoint"):
        tiny_run(cfg)
    state = torch.load(tmp_path / "state.pt", weights_only=True)
    assert state["step"] == 4 and all(t.isfinite().all() for t in state["modules"]["m"].values())


def test_resume_refuses_other_sizes_and_damaged_files(tmp_path):
    cfg = Tiny(output=str(tmp_path), batch_size=2, steps=2)
    tiny_run(cfg, stop_at=1)
    state = torch.load(tmp_path / "state.pt", weights_only=True)
    state["modules"]["m"]["0.weight"] = torch.zeros(3, 3)
    torch.save(state, tmp_path / "other.pt")
    with pytest.raises(UserError, match="other sizes"):
        tiny_run(dataclasses.replace(cfg, resume_from_checkpoint=str(tmp_path / "other.pt")))
    data = (tmp_path / "state.pt").read_bytes()
    (tmp_path / "state.pt").write_bytes(data[:len(data) // 2])
    with pytest.raises(UserError, match="damaged"):
        tiny_run(dataclasses.replace(cfg, resume_from_checkpoint="latest"))


def test_resume_from_another_folder_does_not_retrain_what_came_before(tmp_path):
    """A state of stage `tiny` elsewhere: that stage goes on here, an earlier one would be trained anew under it."""
    tiny_run(Tiny(output=str(tmp_path / "old"), batch_size=2), stop_at=4)
    cfg = Tiny(output=str(tmp_path / "new"), batch_size=2, resume_from_checkpoint=str(tmp_path / "old" / "state.pt"))
    assert tiny_run(cfg, stop_at=5).step == 5
    with pytest.raises(UserError, match="--output .*old"):
        common.Stage(common.Run(cfg), "earlier", {"m": nn.Linear(1, 1)}, {}, 1)


def test_a_resumed_run_counts_the_seconds_before(tmp_path):
    cfg = Tiny(output=str(tmp_path), batch_size=2)
    tiny_run(cfg, stop_at=4)
    state = torch.load(tmp_path / "state.pt", weights_only=True)
    torch.save(dict(state, seconds=1000.0), tmp_path / "state.pt")
    stage = tiny_run(dataclasses.replace(cfg, resume_from_checkpoint="latest"), stop_at=5)
    assert 1000 <= stage.run.account({})["seconds"] < 1100


def test_every_save_has_its_row_in_the_log(tmp_path):
    """Losses since the last row would be lost where a checkpoint falls between two of them."""
    tiny_run(Tiny(output=str(tmp_path), batch_size=2, steps=10, log_steps=5, checkpointing_steps=4))
    rows = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows if "loss" in row] == [4, 5, 8, 10]


def test_weights_are_as_readable_as_other_files(tmp_path):
    common.save_model(tmp_path, {"a": {"w": torch.zeros(2)}}, {"method": "m"})
    modes = {path.name: path.stat().st_mode for path in tmp_path.iterdir()}
    (tmp_path / "plain").write_text("")
    assert set(modes.values()) == {(tmp_path / "plain").stat().st_mode}


def test_resume_says_which_settings_changed(tmp_path, capsys):
    cfg = Tiny(output=str(tmp_path), batch_size=2)
    tiny_run(cfg, stop_at=4)
    tiny_run(dataclasses.replace(cfg, resume_from_checkpoint="latest", seed=7, batch_size=3, log_steps=5))
    said = capsys.readouterr().out
    assert "made with other --" in said and "--seed" in said and "--batch_size" in said and "--log_steps" not in said


def test_a_folder_that_holds_a_run_is_refused_or_overwritten_and_never_renamed(tmp_path):
    folder = tmp_path / "a"
    folder.mkdir()
    (folder / "log.jsonl").write_text("{}")
    (folder / "photo.png").write_bytes(b"the user's")
    with pytest.raises(UserError, match="holds another run"):
        common.Run(Tiny(output=str(folder)), fresh=True)
    run = common.Run(Tiny(output=str(folder), overwrite=True), fresh=True)
    assert (folder / "log.jsonl").read_text() == "{}"              # flags that are mistyped come out from here on
    run.start_log()
    assert "argv" in (folder / "log.jsonl").read_text() and (folder / "photo.png").read_bytes() == b"the user's"
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


@pytest.mark.parametrize("data, output", [("d", "d"), ("d/photos", "d"), ("d", ".")])
def test_an_output_that_holds_the_data_is_refused(tmp_path, monkeypatch, data, output):
    monkeypatch.chdir(tmp_path)
    Path(data).mkdir(parents=True)
    for flag in ("data", "validation_data"):
        with pytest.raises(UserError, match="holds --"):
            common.check_output(Tiny(output=output, **{flag: data}))
    common.check_output(Tiny(output="runs/x", data=data))


def test_a_stage_trained_once_more_unfinishes_the_former_at_its_first_step(tmp_path):
    """Not before: what fails on the way there must leave a finished run as it is."""
    (tmp_path / "config.json").write_text(json.dumps(dict(finished=["a", "b", "c"])))
    run = common.Run(Tiny(output=str(tmp_path)))
    run.former = ["b", "c"]
    model = nn.Linear(1, 1)
    optimizers = {"m": torch.optim.SGD(model.parameters(), 1.0)}
    torch.save(dict(stage="b", step=9), tmp_path / "state.pt")
    for batch, finished in ((UserError("a bad face"), ["a", "b", "c"]), ({}, ["a"])):
        stage = common.Stage(run, "b", {"m": model}, optimizers, 1)
        try:
            for _ in stage.steps(lambda k: batch):
                stage.update(model.weight.sum())
        except UserError:
            pass
        assert json.loads((tmp_path / "config.json").read_text())["finished"] == finished
        assert (tmp_path / "state.pt").exists() == (finished != ["a"]) != (tmp_path / "state_before.pt").exists()
    (tmp_path / "state.pt").write_bytes(b"of a stage that stood on the former")
    run.former = ["b"]
    run.drop_former()
    assert not (tmp_path / "state.pt").exists() and b"stood" in (tmp_path / "state_before.pt").read_bytes()


def test_a_second_training_in_a_folder_is_refused(tmp_path):
    """They would mix their files; the lock ends with its process, however that ends."""
    script = """
import sys, time
sys.path[:0] = ["tests", "."]
import common, test_common as t
run = common.Run(t.Tiny(output=sys.argv[1]))
run.start_log()
print("locked", flush=True)
time.sleep(60)
"""
    other = subprocess.Popen([sys.executable, "-c", script, str(tmp_path)], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    try:
        assert other.stdout.readline() == "locked\n"
        for fresh in (True, False):
            with pytest.raises(UserError, match="another training is writing there"):
                common.Run(Tiny(output=str(tmp_path), overwrite=True), fresh=fresh).start_log()
    finally:
        other.kill()
        other.wait()
    common.Run(Tiny(output=str(tmp_path), overwrite=True), fresh=True).start_log()


def test_results_inside_a_data_folder_are_no_data(tmp_path):
    for name in ("a.png", "person/b.png", "run/samples.png", "run/deep/c.png"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (4, 4)).save(tmp_path / name)
    (tmp_path / "run" / "log.jsonl").write_text("{}")
    assert [p.name for p in common.list_images(tmp_path, recursive=True)] == ["a.png", "b.png"]
    assert [p.name for p in common.list_images(tmp_path / "run")] == ["samples.png"]      # asked for, they are pictures


def test_results_are_named_alike_whatever_can_be_read():
    names = common.output_names([Path(name) for name in ("x.jpg", "x.png", "x.png.jpg", "y.png")])
    assert list(names.values()) == ["x", "x.png", "x.png.jpg", "y"]


def test_a_float_picture_may_overshoot_its_white(tmp_path):
    grey = np.full((4, 4), 0.5, np.float32)
    grey[0, 0] = 1.003
    Image.fromarray(grey).save(tmp_path / "a.tif")
    assert abs(common.read_image(tmp_path / "a.tif")[:, 1:].mean()) < 0.01
    grey[0, 0] = np.inf
    Image.fromarray(grey).save(tmp_path / "a.tif")
    with pytest.raises(UserError, match="not finite"):
        common.read_image(tmp_path / "a.tif")


def test_weights_that_are_not_finite_at_the_end_of_a_stage_are_not_given_back(tmp_path):
    run, model = common.Run(Tiny(output=str(tmp_path), max_grad_norm=0.0)), nn.Linear(1, 1)
    stage = common.Stage(run, "b", {"m": model}, {"m": torch.optim.SGD(model.parameters(), 1e30)}, 1)
    with pytest.raises(UserError, match="last step left weights that are not finite"):
        for _ in stage.steps(lambda k: {}):
            stage.update(1e15 * model.weight.sum())


def test_landmarks_that_are_no_pixels_are_skipped_face_by_face(tmp_path, capsys):
    Image.new("RGB", (600, 600), "green").save(tmp_path / "a.png")
    good = torch.tensor(common.FFHQ_512, dtype=torch.float64)
    points = {"a.png": torch.stack([good / 600, good, good + 1e7])}
    faces = common.cut_faces(tmp_path / "a.png", "a", 64, points, set())
    assert [(face["stem"], face["first"]) for face in faces] == [("a_01", True)]
    assert capsys.readouterr().out.count("must be pixels of this picture") == 2


def test_large_faces_are_restored_a_few_at_a_time():
    assert [common.at_once(size) for size in (16, 64, 128, 256, 512, 1024)] == [32, 32, 32, 8, 2, 1]


def test_loaders_that_cannot_fork_are_refused_in_words(tmp_path, monkeypatch):
    monkeypatch.delattr(os, "fork")
    stage = common.Stage(common.Run(Tiny(output=str(tmp_path), num_workers=1)), "b", {"m": nn.Linear(1, 1)}, {}, 1)
    with pytest.raises(UserError, match="--num_workers 1.*give 0"):
        next(stage.steps(lambda k: {}))


def test_resume_refuses_another_optimiser(tmp_path):
    cfg = Tiny(output=str(tmp_path), batch_size=2, steps=2, optimizer="adamw")
    tiny_run(cfg, stop_at=1)
    with pytest.raises(UserError, match="other optimisers"):
        tiny_run(dataclasses.replace(cfg, optimizer="muon", resume_from_checkpoint="latest"))


def test_a_gradient_that_is_not_finite_is_not_saved_even_without_clipping(tmp_path):
    """The loss is finite, its gradient is not: sqrt at 0."""
    run = common.Run(Tiny(output=str(tmp_path), checkpointing_steps=1, log_steps=9, max_grad_norm=0.0))
    model = nn.Linear(1, 1, bias=False)
    stage = common.Stage(run, "tiny", {"m": model}, {"m": torch.optim.SGD(model.parameters(), 1.0)}, 3)
    with pytest.raises(UserError, match="step 1: grad_norm is not finite.*last good checkpoint"):
        for step, _ in stage.steps(lambda k: {}):
            stage.update((model.weight * (step != 1)).square().sum().sqrt(), loss=torch.zeros(()))
    state = torch.load(tmp_path / "state.pt", weights_only=True)
    assert state["step"] == 1 and state["modules"]["m"]["weight"].isfinite().all()


def test_a_damaged_picture_ends_no_run(tmp_path, capsys):
    """Batches of one: the step whose picture is damaged takes the next one; only a folder of none is an error."""
    for i in range(12):
        common.write_image(tmp_path / f"{i:02d}.png", torch.full((3, 16, 16), i / 12))
    (tmp_path / "03.png").write_bytes((tmp_path / "03.png").read_bytes()[:40])
    faces = common.Faces(str(tmp_path), 16)
    seen = [faces.training(1, 0, k)["paths"][0].name for k in range(11)]
    assert len(set(seen)) == 10 and "03.png" not in seen and "skipped" in capsys.readouterr().out
    for path in tmp_path.iterdir():
        path.write_bytes(b"no picture")
    with pytest.raises(UserError, match="none of 1 pictures"):
        common.Faces(str(tmp_path), 16).training(1, 0, 0)


def test_an_error_in_a_loaders_process_is_one_line(tmp_path):
    run = common.Run(dataclasses.replace(Tiny(output=str(tmp_path)), num_workers=1))
    stage = common.Stage(run, "tiny", {}, {}, 2)

    def batch_at(k):
        raise UserError("--data: went away")
    with pytest.raises(UserError, match="^--data: went away$"):
        next(stage.steps(batch_at))


def test_a_log_that_cannot_be_written_is_one_line_and_a_cut_line_is_skipped(tmp_path):
    run = common.Run(Tiny(output=str(tmp_path)))
    run.log(stage="a", step=1, loss=2.0)
    with pytest.raises(UserError, match="log.jsonl: cannot be written"), no_space(50):
        run.log(stage="a", step=2, loss=5.0, more="x" * 100)
    with open(tmp_path / "log.jsonl", "a") as file:
        file.write("\n")
    run.log(stage="a", step=2, loss=1.0)
    assert common.read_curves(tmp_path / "log.jsonl", ("loss",)) == {"a: loss": [(1, 2.0), (2, 1.0)]}


def test_a_cut_save_does_not_call_a_stage_finished(tmp_path, monkeypatch):
    """config.json says what is finished, so it is written after the weights it speaks of."""
    common.save_model(tmp_path, {"vae": {"w": torch.zeros(2)}}, dict(method="x", finished=["vae"]))
    monkeypatch.setattr(common.safetensors.torch, "save_file", lambda *_, **__: (_ for _ in ()).throw(OSError(28, "full")))
    with pytest.raises(UserError, match="cannot be written"):
        common.save_model(tmp_path, {"vae": {"w": torch.ones(2)}}, dict(method="x", finished=["vae", "flow"]))
    config, parts = common.load_model(str(tmp_path), "x")
    assert config["finished"] == ["vae"] and not parts["vae"]["w"].any()


def test_a_pickle_that_would_run_code_is_refused(tmp_path):
    import pickle

    class Evil:
        def __reduce__(self):
            return os.system, (f"touch {tmp_path}/ran",)

    (tmp_path / "evil.pt").write_bytes(pickle.dumps({"params": Evil()}))
    torch.save({"x": Evil()}, tmp_path / "evil2.pt")
    for name in ("evil.pt", "evil2.pt"):
        with pytest.raises(UserError, match=f"{name}: refused"):
            common.read_weights(tmp_path / name)
    assert not (tmp_path / "ran").exists()
    for text in ("<!DOCTYPE html><html>404</html>", "version https://git-lfs.github.com/spec/v1"):  # what a download left
        (tmp_path / "net.pth").write_text(text)
        with pytest.raises(UserError, match="net.pth: damaged or not a checkpoint"):
            common.read_weights(tmp_path / "net.pth")


def test_a_failed_write_leaves_the_old_file(tmp_path):
    path = tmp_path / "file"
    path.write_text("old")
    with pytest.raises(UserError, match="unchanged"):
        with common.whole_file(path) as temporary:
            temporary.write_text("half of the new")
            raise OSError(28, "No space left on device")
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]


@pytest.mark.skipif(not Path("/proc").exists(), reason="asks /proc which processes live")
def test_leftovers_of_killed_writers_are_removed_those_of_living_ones_are_not(tmp_path):
    living, dead = (tmp_path / f".state.pt.{pid}.tmp" for pid in (os.getppid(), 2 ** 30))
    living.touch(), dead.touch()
    with common.whole_file(tmp_path / "state.pt") as temporary:
        temporary.write_text("whole")
    assert living.exists() and not dead.exists() and (tmp_path / "state.pt").read_text() == "whole"


@contextmanager
def no_space(size):
    """Inside, no file can grow beyond `size` bytes: what a full disk looks like to a program."""
    before, handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)


def test_a_full_disk_is_reported_in_one_line(tmp_path):
    """torch.save and safetensors where there is no space: what was there stays."""
    import safetensors.torch
    for save in (torch.save, safetensors.torch.save_file):
        (tmp_path / "w").write_text("old")
        with pytest.raises(UserError, match="w: cannot be written.*unchanged"):
            with no_space(10_000), common.whole_file(tmp_path / "w") as temporary:
                save({"a": torch.zeros(100_000)}, temporary)
        assert (tmp_path / "w").read_text() == "old"


# ---------------------------------------------------------------- LoRA

def small_model():
    torch.manual_seed(0)
    return nn.ModuleDict(dict(attn=nn.ModuleDict(dict(to_q=nn.Linear(6, 8), to_k=nn.Linear(6, 8))), ff=nn.Linear(6, 6)))


def test_lora_starts_as_the_base_and_merges_exactly(tmp_path):
    model, x = small_model(), torch.randn(5, 6)
    before = model.attn.to_q(x).detach()
    parameters = common.add_lora(model, ("to_q", "ff"), rank=2, alpha=8)
    assert torch.equal(model.attn.to_q(x), before) and sum(p.numel() for p in parameters) == 2 * (6 + 8) + 2 * (6 + 6)
    assert isinstance(model.attn.to_k, nn.Linear) and not model.attn.to_k.weight.requires_grad
    for layer in common.lora_layers(model).values():
        nn.init.normal_(layer.lora_B.weight)
    after = model.attn.to_q(x).detach()
    common.save_lora(model, tmp_path / "lora.safetensors")
    fresh = small_model()
    common.add_lora(fresh, ("to_q", "ff"), rank=2, alpha=8)
    common.load_lora(fresh, tmp_path / "lora.safetensors")
    assert torch.allclose(fresh.attn.to_q(x), after, atol=1e-6) and not torch.allclose(after, before)
    state = common.read_weights(tmp_path / "lora.safetensors")     # kohya's form: alpha beside unscaled matrices
    state = {n: t / 4 if "lora_B" in n else t for n, t in state.items()}
    state |= {n.replace(".lora_B.weight", ".alpha"): torch.tensor(8.) for n in list(state) if "lora_B" in n}
    save_file(state, tmp_path / "alpha.safetensors")
    common.load_lora(fresh, tmp_path / "alpha.safetensors")
    assert torch.allclose(fresh.attn.to_q(x), after, atol=1e-6)
    common.merge_lora(model)
    assert isinstance(model.attn.to_q, nn.Linear) and torch.allclose(model.attn.to_q(x), after, atol=1e-5)


def test_results_never_overwrite_their_input(tmp_path):
    common.write_image(tmp_path / "restored_faces" / "a.png", torch.zeros(3, 16, 16))
    cfg = common.SampleFlags(input=str(tmp_path / "restored_faces"), output=str(tmp_path))
    with pytest.raises(UserError, match="overwritten"):
        common.restore_folder(cfg, lambda lq, stems: {"restored_faces": lq + 1}, 16, "cpu")
        common.restore_folder(dataclasses.replace(cfg, input=str(tmp_path / "restored_faces" / "a.png")), None, 16, "cpu")
    assert (common.read_image(tmp_path / "restored_faces" / "a.png").abs() < .01).all()


def test_lora_of_another_rank_is_refused(tmp_path):
    model = small_model()
    common.add_lora(model, ("to_q",), rank=2, alpha=2)
    common.save_lora(model, tmp_path / "lora.safetensors")
    other = small_model()
    common.add_lora(other, ("to_q",), rank=4, alpha=4)
    with pytest.raises(UserError, match="rank 2"):
        common.load_lora(other, tmp_path / "lora.safetensors")


@pytest.mark.parametrize("prefix", ["transformer.", "unet."])
def test_lora_takes_the_alpha_that_diffusers_notes_in_the_header(tmp_path, prefix):
    model = small_model()
    common.add_lora(model, ("to_q",), rank=2, alpha=2)
    common.save_lora(model, tmp_path / "lora.safetensors", prefix)
    state = {name: torch.ones_like(v) for name, v in load_file(tmp_path / "lora.safetensors").items()}
    noted = {"lora_adapter_metadata": json.dumps({f"{prefix}lora_alpha": 16, f"{prefix}r": 2})}
    save_file(state, tmp_path / "lora.safetensors", noted)
    common.load_lora(model, tmp_path / "lora.safetensors", prefix)
    layer = next(iter(common.lora_layers(model).values()))
    assert (layer.scale * layer.lora_B.weight == 8).all() and (layer.lora_A.weight == 1).all()


def test_checkpoint_is_the_file_that_was_named(tmp_path):
    common.save_model(tmp_path, {"net": {"w": torch.zeros(1)}}, dict(method="m"))
    shutil.copy(tmp_path / "model.safetensors", tmp_path / "old.safetensors")
    assert common.load_model(str(tmp_path / "model.safetensors"), "m")[1]["net"]["w"] == 0
    with pytest.raises(UserError, match="old.safetensors"):
        common.load_model(str(tmp_path / "old.safetensors"), "m")


# ---------------------------------------------------------------- ablations

@dataclass(frozen=True)
class Rows(Tiny):
    """An ablation of two rows."""
    table: str = "all"
    rows: tuple = ()
    seeds: int = 1
    learning_rate: float = 1.0


ROWS = {"a": ("", {}, "first"), "b": ("", dict(learning_rate=2.0), "second")}


@pytest.mark.parametrize("kind", ["clip", "vae", "unet"])
def test_a_folder_that_lacks_weights_is_refused(tmp_path, kind):
    """transformers and diffusers would draw what a file lacks at random, and say so in a note only."""
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from transformers import CLIPConfig, CLIPModel
    small = dict(hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1)
    make, lost, file = {
        "clip": (lambda: CLIPModel(CLIPConfig(text_config=small, vision_config=dict(small, image_size=8, patch_size=4),
                                              projection_dim=8)), "visual_projection.weight", "model.safetensors"),
        "vae": (lambda: AutoencoderKL(block_out_channels=(8,), norm_num_groups=4), "decoder.conv_out.weight",
                "diffusion_pytorch_model.safetensors"),
        "unet": (lambda: UNet2DConditionModel(
            sample_size=8, block_out_channels=(32,), layers_per_block=1, down_block_types=("DownBlock2D",),
            up_block_types=("UpBlock2D",), cross_attention_dim=8, attention_head_dim=8), "conv_out.weight",
            "diffusion_pytorch_model.safetensors")}[kind]
    net = make()
    net.save_pretrained(tmp_path / "part")
    load = lambda: common.from_folder(type(net), str(tmp_path), "flag", "part")
    for name, tensor in load().state_dict().items():
        assert torch.equal(tensor, net.state_dict()[name]), name
    state = load_file(tmp_path / "part" / file)
    del state[lost]
    save_file(state, tmp_path / "part" / file, metadata={"format": "pt"})
    with pytest.raises(UserError, match=f"--flag .*part cannot be loaded .it lacks weights such as {lost}"):
        load()


def test_a_config_without_flags_is_one_line():
    with pytest.raises(UserError, match="somewhere: config.json lacks what a training run writes"):
        common.saved_flags(common.SampleFlags, {"method": "m"}, "somewhere")
    for wrong in ({}, {"input": "x", "seed": "5"}, {"input": "x", "batch_size": None}, []):
        with pytest.raises(UserError, match="somewhere: config.json lacks"):
            common.saved_flags(common.SampleFlags, {"train": wrong}, "somewhere")
    found = common.saved_flags(common.SampleFlags, {"train": {"input": "x", "seed": 5, "long_gone": 1}}, "somewhere")
    assert found.seed == 5


def test_an_ablation_repeats_rows_of_other_settings_and_no_others(tmp_path, capsys):
    asked = []

    def row(cfg, done):
        asked.append((cfg.learning_rate, cfg.seed))
        return dict(scores=dict(x=cfg.steps * cfg.learning_rate + cfg.seed))
    cfg = Rows(output=str(tmp_path), seeds=2)
    assert len(common.run_ablation(cfg, ROWS, row)) == 4 and len(asked) == 4
    idle = dataclasses.replace(cfg, output=f"{tmp_path}/", num_workers=3, log_steps=1, checkpointing_steps=7)
    assert len(common.run_ablation(idle, ROWS, row)) == 4 and len(asked) == 4        # these flags change no number
    found = common.run_ablation(dataclasses.replace(cfg, steps=9, seeds=1), ROWS, row)
    assert {key: e["scores"]["x"] for key, e in found.items()} == {"a, seed 0": 9, "b, seed 0": 18}  # not seed 1's of old
    common.print_ablation(found, ROWS, ("x",))
    assert "x 9   paper" in capsys.readouterr().out                                  # one seed has no spread
    (tmp_path / "rows.json").write_text("{")
    with pytest.raises(UserError, match="rows.json: damaged"):
        common.run_ablation(cfg, ROWS, row)


def test_the_spread_of_an_ablation_is_the_sample_deviation(capsys):
    done = {str(i): dict(row="a", scores=dict(x=float(i))) for i in (1, 2, 3)}
    common.print_ablation(done, ROWS, ("x",))
    assert "x 2 (1)" in capsys.readouterr().out


# ---------------------------------------------------------------- command line

@dataclass(frozen=True)
class Verb:
    """Do it."""
    batch_size: int = 4                    # how many at a time
    learning_rate: float = 1e-3            # step size
    widths: tuple[int, ...] = (1, 2)       # several numbers
    flag: bool = False                     # on or off


def call(*argv):
    seen = []
    common.command_line("Doc.", {"do": (Verb, {"a": Verb(), "b": Verb(batch_size=9)}, seen.append)}, list(argv))
    return seen[0]


def test_flags_presets_and_overrides():
    assert call("do") == Verb() and call("do", "--preset", "b", "--flag", "--widths", "5", "6").batch_size == 9
    assert call("do", "--preset", "b", "--batch_size", "2", "--widths", "7") == Verb(batch_size=2, widths=(7,))


def test_a_full_gpu_is_one_line_and_a_fault_of_ours_stays_a_traceback(capsys):
    def fail(error):
        def verb(cfg):
            raise error
        common.command_line("Doc.", {"do": (Verb, {"a": Verb()}, verb)}, ["do"])

    with pytest.raises(SystemExit) as stop:
        fail(torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB."))
    error = capsys.readouterr().err.strip()
    assert stop.value.code == 2 and "--batch_size" in error and "\n" not in error
    with pytest.raises(RuntimeError, match="sizes differ"):
        fail(RuntimeError("sizes differ"))


@pytest.mark.parametrize("argv, words", [
    (("do", "--batch_size", "0"), "--batch_size 0: must be at least 1"),
    (("do", "--learning_rate", "-1"), "--learning_rate"),
    (("do", "--learning_rate", "nan"), "--learning_rate"), (("do", "--batchsize", "3"), "did you mean --batch_size"),
    (("do", "--batch_size", "many"), "invalid int value"), (("undo",), "invalid choice"), ((), "required")])
def test_a_wrong_command_is_one_line_and_a_status(argv, words, capsys):
    with pytest.raises(SystemExit) as stop:
        call(*argv)
    error = capsys.readouterr().err
    assert stop.value.code == 2 and words in error and error.count("\n") == 1


def test_help_texts_are_the_comments_beside_the_fields():
    texts = common.field_help(common.TrainFlags)
    assert set(texts) == {f.name for f in dataclasses.fields(common.TrainFlags)} and all(texts.values())
    assert common.field_help(Verb)["batch_size"] == "how many at a time"


# ---------------------------------------------------------------- restoring folders

@dataclass(frozen=True)
class Restore(common.SampleFlags):
    output: str = ""


def test_restore_folder_takes_what_it_can_and_names_the_rest(tmp_path, capsys):
    source = tmp_path / "in"
    source.mkdir()
    for name, size in (("a.png", (64, 64)), ("tall.png", (30, 90)), ("dot.png", (1, 1)), ("huge.jpg", (3000, 20))):
        Image.new("RGB", size, "green").save(source / name)
    Image.new("RGB", (64, 64), "red").save(source / "a.jpg")                # the same stem twice
    (source / "broken.png").write_bytes(b"\x89PNG\r\n")
    cfg = Restore(input=str(source), output=str(tmp_path / "out"), batch_size=2)
    done = common.restore_folder(cfg, lambda lq, stems: {"restored_faces": -lq, "posterior_mean": lq}, 64, "cpu")
    said = capsys.readouterr().out
    assert done == 5 and "skipped" in said and "broken.png" in said and "30x90 resized to 64x64" in said
    names = {p.name for p in (tmp_path / "out" / "restored_faces").iterdir()}
    assert names == {"a.png", "a.png.png", "tall.png", "dot.png", "huge.png"}   # the second "a" keeps its full name
    assert json.loads((tmp_path / "out" / "args.json").read_text())["restored"] == 5
    only_bad = Restore(input=str(source / "broken.png"), output=str(tmp_path / "out2"))
    with pytest.raises(UserError, match="nothing was restored"):
        common.restore_folder(only_bad, lambda lq, stems: {"restored_faces": lq}, 64, "cpu")


def test_whole_photographs_every_face_is_restored_and_pasted(tmp_path):
    photo = Image.new("RGB", (400, 200), "gray")
    photo.save(tmp_path / "p.png")
    template = np.array(common.FFHQ_512) * 0.25
    faces = [(template + [20, 30]).tolist(), (template + [230, 40]).tolist()]
    (tmp_path / "points.json").write_text(json.dumps({"p.png": faces}))
    cfg = Restore(input=str(tmp_path / "p.png"), output=str(tmp_path / "out"), landmarks=str(tmp_path / "points.json"))
    assert common.restore_folder(cfg, lambda lq, stems: {"restored_faces": torch.ones_like(lq)}, 64, "cpu") == 2
    result = common.read_image(tmp_path / "out" / "restored_photos" / "p.png")
    assert result.shape == (3, 200, 400)
    for five in faces:
        x, y = (int(v) for v in five[2])
        assert result[:, y, x].min() > 0.98                                 # both faces are white now
    assert result[:, 5, 5].max() < 0.1
    assert (tmp_path / "out" / "restored_faces" / "p_01.png").exists()
    common.write_image(tmp_path / "clean" / "p_01.png", torch.zeros(3, 64, 64))     # a reference for the second face
    shown = dataclasses.replace(cfg, reference=str(tmp_path / "clean"), output=str(tmp_path / "shown"))
    common.restore_folder(shown, lambda lq, stems: {"restored_faces": lq}, 64, "cpu")
    widths = [common.read_image(tmp_path / "shown" / "cmp" / f"p_0{i}.png").shape[2] for i in (0, 1)]
    assert widths == [128, 192]
    (tmp_path / "points.json").write_text("[1, 2")
    with pytest.raises(UserError, match="--landmarks"):
        common.restore_folder(cfg, lambda lq, stems: {"restored_faces": lq}, 64, "cpu")


# ------------------------------------------------------------------------------------------------ optimiser, schedule


def test_muon_moves_every_direction_of_a_matrix_alike_and_vectors_as_adam():
    """First step: a matrix moves by 0.2 sqrt(longer side) lr U V^T up to Newton-Schulz's error, a vector by Adam."""
    torch.manual_seed(0)
    for shape in ((24, 40), (40, 24), (8, 4, 3, 3)):
        p = torch.nn.Parameter(torch.randn(shape))
        before, p.grad = p.detach().clone(), torch.randn(shape) * 1e-3
        u, _, v = torch.linalg.svd(p.grad.flatten(1), full_matrices=False)
        common.Muon([p], lr=0.1, weight_decay=0.0).step()
        moved = (before - p.detach()).flatten(1) / (0.1 * 0.2 * max(p.flatten(1).shape) ** 0.5)
        assert torch.linalg.svdvals(moved).min() > 0.6 and torch.linalg.svdvals(moved).max() < 1.3
        assert F.cosine_similarity(moved.flatten(), (u @ v).flatten(), 0) > 0.98
        assert abs((before - p.detach()).square().mean().sqrt() / 0.02 - 1) < 0.25  # the root mean square of Adam's
    ours, theirs = ([torch.nn.Parameter(torch.linspace(-1, 1, n)) for n in (5, 3)] for _ in range(2))
    muon = common.Muon(ours, lr=0.1, weight_decay=0.2)
    adam = torch.optim.AdamW(theirs, lr=0.1, betas=(0.9, 0.95), weight_decay=0.2)
    for step in range(5):
        for p, q in zip(ours, theirs):
            p.grad = torch.randn(len(p)) if len(p) == 5 or step > 1 else None   # one joins later: it counts its own steps
            q.grad = None if p.grad is None else p.grad.clone()
        muon.step(), adam.step()
    for p, q in zip(ours, theirs):
        assert torch.allclose(p, q, atol=1e-6)


def test_muon_orthogonalises_all_matrices_of_a_shape_as_newton_schulz_does_one():
    """Against the plain iteration on X itself in float64: wide, tall, of low rank, in bf16 and without any gradient."""
    def newton_schulz(x):
        x = x.double() / x.double().norm()
        for _ in range(5):
            gram = x @ x.T
            x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
        return x

    torch.manual_seed(0)
    for m, n in ((12, 40), (40, 12), (16, 16)):
        stack = torch.stack([torch.randn(m, n), torch.randn(m, 2) @ torch.randn(2, n) * 1e3, torch.zeros(m, n)])
        found = common.orthogonalised(stack)
        for row in (0, 1):
            torch.testing.assert_close(found[row].double(), newton_schulz(stack[row]), rtol=0, atol=2e-3)
        assert torch.equal(found[2], torch.zeros(m, n))
        half = common.orthogonalised(stack[:1].bfloat16())[0].double()
        torch.testing.assert_close(half, newton_schulz(stack[0].bfloat16()), rtol=0, atol=2e-3)


def test_muon_steps_alike_for_many_matrices_and_leaves_the_precision_of_products_alone():
    torch.manual_seed(0)
    many = [torch.nn.Parameter(torch.randn(6, 4)) for _ in range(3)] + [torch.nn.Parameter(torch.randn(6, 2, 2))]
    alone = [torch.nn.Parameter(p.detach().clone()) for p in many]
    for p, q in zip(many, alone):
        p.grad = torch.randn_like(p)
        q.grad = p.grad.clone()
    torch.set_float32_matmul_precision("high")                    # as a Run has it; Muon itself works in "highest"
    common.Muon(many, lr=0.1).step()
    assert torch.get_float32_matmul_precision() == "high"
    for p, q in zip(many, alone):
        common.Muon([q], lr=0.1).step()
        torch.testing.assert_close(p, q)


def test_a_cpus_autocast_runs_attention_in_float32(tmp_path):
    """Under bf16 a Run's attention is float32's, forward and backward, whatever the mask; outside autocast it is as given."""
    common.Run(SimpleNamespace(output=str(tmp_path / "out"), device="cpu", mixed_precision="bf16", seed=0))
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, 3, 5, 8, dtype=torch.bfloat16, requires_grad=True) for _ in range(3))
    wide = [x.detach().float().requires_grad_() for x in (q, k, v)]
    bias = torch.randn(5, 5, dtype=torch.bfloat16)
    for mask in (None, bias, bias > 0):
        wanted = F.scaled_dot_product_attention(*wide, mask.float() if mask is bias else mask, scale=0.5)
        with torch.autocast("cpu", torch.bfloat16):
            found = F.scaled_dot_product_attention(q, k, v, mask, scale=0.5)
        assert found.dtype == torch.float32 and torch.equal(found.nan_to_num(), wanted.nan_to_num())
    wanted, = torch.autograd.grad(F.scaled_dot_product_attention(*wide).sum(), wide[1])
    with torch.autocast("cpu", torch.bfloat16):
        found, = torch.autograd.grad(F.scaled_dot_product_attention(q, k, v).sum(), k)
    torch.testing.assert_close(found, wanted.bfloat16())
    assert F.scaled_dot_product_attention(q, k, v).dtype == torch.bfloat16


def test_a_run_leaves_cudnns_attention_out(tmp_path):
    torch.backends.cuda.enable_cudnn_sdp(True)
    common.Run(SimpleNamespace(output=str(tmp_path / "out"), device="cpu", mixed_precision="no", seed=0))
    assert not torch.backends.cuda.cudnn_sdp_enabled()


def test_learning_rate_schedules():
    cfg = SimpleNamespace(lr_scheduler="cosine", lr_warmup_steps=10)
    at = common.lr_schedule(cfg, 100)
    assert at(0) == pytest.approx(1 / 11) and at(10) == pytest.approx(1) and at(55) == pytest.approx(0.51)
    assert at(100) == pytest.approx(0.02) and at(500) == pytest.approx(0.02)
    assert all(b > a for a, b in zip(map(at, range(10)), map(at, range(1, 11))))
    flat = common.lr_schedule(SimpleNamespace(lr_scheduler="constant", lr_warmup_steps=0), 100)
    assert flat(0) == flat(99) == 1
    assert common.warmup_cosine(100, 20, floor=0.1, first=0.1)(10) == pytest.approx(0.55)


def test_a_cosine_ends_with_the_stage():
    """The floor is reached at the last step, not `warmup` steps after it."""
    at = common.lr_schedule(SimpleNamespace(lr_scheduler="cosine", lr_warmup_steps=50), 200)
    assert at(199) < 0.03


def test_an_autoencoder_leaves_an_fp16_autocast_and_stays_in_bf16():
    x = torch.randn(2, 2)
    for dtype, kept in ((torch.float16, torch.float32), (torch.bfloat16, torch.bfloat16)):
        with torch.autocast("cpu", dtype):
            with common.not_half(x):
                assert (x @ x).dtype == kept
    assert common.pick_precision("fp16", torch.device("cpu")) == "fp16"
    assert common.pick_precision("auto", torch.device("cpu")) in ("no", "bf16")
    assert common.pick_precision("auto", torch.device("mps")) == "no"


def test_lora_of_a_grouped_convolution_is_refused():
    with pytest.raises(ValueError, match="grouped"):
        common.LoRALinear(torch.nn.Conv2d(4, 4, 3, groups=2), 2, 2)
