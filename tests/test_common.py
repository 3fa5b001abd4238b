"""common.py: degradation, pictures, faces in a folder, a run and its resuming, optimisers, weights, LoRA, command line."""
import dataclasses
import io
import json
import math
import multiprocessing
import os
import signal
import socket
import subprocess
import sys
import time
import typing
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from PIL import Image, ImageCms
from program import ROOT, same
from safetensors.torch import load_file, save_file

import common
from common import ATTRIBUTES, DEGRADATIONS, Degradation, UserError, degrade
from toy import faces as toy

CPU, NAMES = torch.device("cpu"), [name for _, name, _, _ in ATTRIBUTES]


def toy_image(count, size=64):
    return toy.toy_faces(torch.arange(count), torch.arange(count), size=size).image


# ---------------------------------------------------------------- captions

def test_captions_state_the_attributes_that_are_sure():
    on = lambda *names: [1.0 if name in names else 0.0 for name in NAMES]
    assert common.verbalise(on("Young", "Smiling", "Eyeglasses", "Wavy_Hair", "Blond_Hair")) == \
        "a photo of a young smiling person with wavy blond hair, wearing eyeglasses, mouth closed"
    assert common.verbalise(torch.tensor(on("Bangs", "Wearing_Hat", "Mouth_Slightly_Open"))) == \
        "a photo of an older serious person with bangs, wearing a hat, mouth slightly open"
    assert common.verbalise([0.5] * 12) == "a photo of a person"


# ---------------------------------------------------------------- degradation

def test_degradation_depends_on_its_seeds_alone():
    hq = toy_image(4)
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
    hq = toy_image(1)
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
    coarse = degrade(toy_image(1), dataclasses.replace(spec, down=(64, 64), noise=(0, 0)), [0])[0]
    steps = F.interpolate(F.interpolate(coarse[None], (8, 8), mode="bilinear"), (64, 64), mode="bilinear")
    assert (steps - coarse).abs().mean() < 0.05                   # 8 x 8 pixels carry all there is


def test_jpeg_is_pillows_jpeg():
    image, file = toy_image(1)[0], io.BytesIO()
    common.to_pil(image).save(file, format="JPEG", quality=40)
    expected = torch.from_numpy(np.array(Image.open(file))).permute(2, 0, 1) / 255
    assert (common.jpeg(image / 2 + 0.5, 40) - expected).abs().max() < 1e-6


def test_half_of_the_kernels_are_round():
    """Anisotropic ones have two sigmas: seen through the blur of a single white pixel."""
    spec = Degradation("test", blur=(6, 20), down=(8, 8), noise=(0, 0), jpeg_share=0.0, kernel=201)
    point = torch.full((100, 3, 64, 64), -1.0)
    point[:, :, 32, 32] = 1
    lq = degrade(point, spec, range(100)) + 1
    mass, grid = lq[:, 0] / lq[:, 0].sum((1, 2), keepdim=True).clamp(min=1e-9), torch.arange(64.0)
    vx, vy = ((mass.sum(d) * (grid - (mass.sum(d) * grid).sum(1)[:, None]) ** 2).sum(1) for d in (1, 2))
    seen = mass.sum((1, 2)) > 0                                   # wide kernels fall below one grey level
    assert 0.3 < ((vx / vy).log().abs()[seen] < 0.02).float().mean() < 0.7


def test_grey_turns_both_images_grey_and_lq_alone_never():
    hq, spec = toy_image(3), dataclasses.replace(DEGRADATIONS["difface"], grey=1.0)
    lq, clean = common.degrade_pair(hq, spec, range(3))
    assert (clean[:, 0] - clean[:, 1]).abs().max() < 1e-6 and (lq[:, 0] - lq[:, 2]).abs().max() < 1e-6
    assert torch.equal(degrade(hq, spec, range(3)), degrade(hq, dataclasses.replace(spec, grey=0.0), range(3)))


# ---------------------------------------------------------------- pictures

def read(tmp_path, picture, kind="png", **options):
    """The picture after a round trip through a file, at its upper left pixel: [r, g, b] in 0 .. 255."""
    picture.save(tmp_path / f"x.{kind}", **options)
    return ((common.read_image(tmp_path / f"x.{kind}")[:, 0, 0] + 1) * 127.5).round().int().tolist()


@pytest.mark.parametrize("mode, colour, kind, wanted", [
    ("L", 200, "png", [200] * 3), ("1", 1, "png", [255] * 3), ("LA", (200, 255), "png", [200] * 3),
    ("LA", (200, 0), "png", [128] * 3), ("RGBA", (255, 0, 0, 0), "png", [128] * 3), ("RGBA", (255, 0, 0, 255), "png", [255, 0, 0]),
    ("RGBA", (255, 0, 0, 51), "webp", [153, 102, 102]), ("CMYK", (0, 255, 255, 0), "tiff", [255, 0, 0]),
    ("I;16", 40000, "png", [156] * 3), ("I", 40000, "tiff", [156] * 3), ("F", 40000.0, "tiff", [156] * 3), ("I", 200, "tiff", [200] * 3),
    ("F", 0.5, "tiff", [128] * 3),
    ("F", 200.0, "tiff", [200] * 3), ("F", 1.003, "tiff", [255] * 3), ("YCbCr", (149, 43, 21), "jpg", [0, 255, 1])])
def test_every_mode_becomes_rgb_and_what_is_transparent_mid_grey(tmp_path, mode, colour, kind, wanted):
    options = dict(lossless=True) if kind == "webp" else {}
    assert np.abs(np.subtract(read(tmp_path, Image.new(mode, (8, 6), colour), kind, **options), wanted)).max() <= 1


def test_colour_profiles_are_converted_to_srgb_also_beside_transparency_and_palettes(tmp_path):
    """sRGB's profile with the primaries of red and green exchanged: reading it exchanges the two channels."""
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    profile = profile.replace(b"rXYZ", b"????", 1).replace(b"gXYZ", b"rXYZ", 1).replace(b"????", b"gXYZ", 1)
    for r, g, b in ((200, 120, 90), (150, 200, 120), (60, 90, 180)):
        picture, wanted = Image.new("RGB", (8, 6), (r, g, b)), np.array([g, r, b])
        for shown in (picture, picture.convert("RGBA"), picture.quantize(2)):
            assert np.abs(read(tmp_path, shown, icc_profile=profile) - wanted).max() <= 1
        assert read(tmp_path, picture, icc_profile=b"damaged") == [r, g, b]


def test_exif_turns_and_pictures_that_are_not_square_lose_their_ends(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (20, 10), "red").save(tmp_path / "x.jpg", exif=exif)
    assert common.read_image(tmp_path / "x.jpg").shape == (3, 20, 10)
    wide = Image.new("RGB", (40, 10), "red")
    wide.paste("blue", (15, 0, 25, 10))
    wide.save(tmp_path / "x.png")
    assert torch.equal(common.read_image(tmp_path / "x.png", 10), torch.tensor([-1., -1, 1]).view(3, 1, 1).expand(3, 10, 10))


@pytest.mark.parametrize("kind", ["png", "jpg", "webp"])
def test_a_picture_that_was_cut_off_is_refused_never_black(tmp_path, kind):
    path = tmp_path / f"x.{kind}"
    common.to_pil(toy_image(1)[0]).save(path)
    path.write_bytes(path.read_bytes()[:-200])
    with pytest.raises(UserError, match="not a readable picture"):
        common.read_image(path)


def test_pictures_are_listed_behind_links_too_and_what_is_passed_over_is_counted(tmp_path, capsys):
    for name in ("faces/b/1.png", "faces/a.JPG", "faces/.hidden.png", "faces/attributes.csv", "faces/c.heic", "far/2.png"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    faces = tmp_path / "faces"
    assert common.list_images(faces) == [faces / "a.JPG"] and "2 files or folders passed over" in capsys.readouterr().out
    (faces / "c").symlink_to(tmp_path / "far")
    assert common.list_images(faces, True) == [faces / "a.JPG", faces / "b" / "1.png", faces / "c" / "2.png"]
    assert "1 files or folders" in capsys.readouterr().out


def test_a_failed_write_leaves_the_old_file(tmp_path):
    path = tmp_path / "file"
    path.write_text("old")
    with pytest.raises(OSError, match="file: cannot be written"), common.whole_file(path) as temporary:
        temporary.write_text("half")
        raise OSError("the disk is full")
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]


# ---------------------------------------------------------------- faces in a folder

def write_faces(folder, names, size=16):
    for i, name in enumerate(names):
        common.write_image(folder / name, torch.full((3, size, size), i / 15))


def test_labels_are_found_by_file_name(tmp_path):
    """The rows are in another order than the files; CelebA writes -1 and 1; a file without a row has no label."""
    write_faces(tmp_path, ["a/1.png", "a/2.png", "b/1.png"])
    (tmp_path / "attributes.csv").write_text("file," + ",".join(NAMES) + "\nb/1.png" + ",1,-1" * 6 + "\na/1.png" + ",-1" * 11 + ",1\n")
    (tmp_path / "captions.json").write_text(json.dumps({"a/2.png": "two"}))
    batch = common.Faces(tmp_path, 16).batch([2, 0, 1], [0, 1, 2])
    assert batch["attributes"][0].tolist() == [1, 0] * 6 and batch["attributes"][1].tolist() == [0] * 11 + [1]
    assert batch["attributes"][2].isnan().all() and batch["captions"] == ["", "", "two"]
    assert batch["person"].tolist() == [1, 0, 0] and batch["place"].tolist() == [2, 0, 1]
    assert batch["hq"][:, 0, 0, 0].tolist() == pytest.approx([2 / 15, 0, 1 / 15], abs=.01)


def test_landmarks_move_with_the_centred_square(tmp_path):
    """A picture of 40 x 20 px read at 10 px: its square begins at x = 10 and shrinks to half."""
    Image.new("RGB", (40, 20)).save(tmp_path / "x.png")
    points = torch.stack([torch.linspace(10, 30, 98), torch.linspace(0, 20, 98)], -1)
    columns = [f"{axis}{i}" for i in range(98) for axis in "xy"]
    (tmp_path / "landmarks.csv").write_text(",".join(["file", *columns, ""]) + "\nx.png," + ",".join(map(str, points.flatten().tolist())))
    batch = common.Faces(tmp_path, 10).batch([0], [0])
    torch.testing.assert_close(batch["landmarks"][0], torch.linspace(0, 10, 98)[:, None].expand(98, 2), rtol=0, atol=1e-4)
    assert "landmarks" not in common.Faces(tmp_path, 10, mirror=True).batch([0], [0])      # left and right change places


def test_held_out_faces_are_the_first_of_every_person_then_the_second(tmp_path):
    write_faces(tmp_path, ["a/1.png", "a/2.png", "a/3.png", "b/1.png", "c/1.png", "c/2.png"])
    faces = common.Faces(tmp_path, 16)
    names = lambda count: [faces.names[k] for k in faces.held_out(count)["place"]]
    assert names(6) == ["a/1.png", "b/1.png", "c/1.png", "a/2.png", "c/2.png", "a/3.png"] and names(2) == names(6)[:2]
    assert all(torch.equal(faces.held_out(3)[k], common.Faces(tmp_path, 16).held_out(6)[k][:3]) for k in ("hq", "lq"))


def test_training_batches_depend_on_seed_step_and_rank_alone_and_cover_every_epoch(tmp_path):
    write_faces(tmp_path, [f"{i}.png" for i in range(12)])
    faces, again = (common.Faces(tmp_path, 16, mirror=True) for _ in range(2))
    batches = {(step, rank): faces.training(2, 7, step, rank, world=2) for step in range(6) for rank in (0, 1)}
    for (step, rank), batch in reversed(batches.items()):
        twin = again.training(2, 7, step, rank, world=2)
        assert all(torch.equal(batch[key], twin[key]) for key in batch)
    for epoch in (range(3), range(3, 6)):
        places = torch.cat([batches[step, rank]["place"] for step in epoch for rank in (0, 1)])
        assert places.sort().values.tolist() == list(range(12))
    assert len(torch.cat([batch["seeds"] for batch in batches.values()]).unique()) == 24


def test_half_of_the_faces_are_mirrored_before_they_are_degraded(toy_folder):
    plain, mirrored = (common.Faces(toy_folder / "train", 16, mirror=mirror).training(16, 0, 0) for mirror in (False, True))
    turned = plain["seeds"] % 2 == 0
    assert 0 < turned.sum() < 16 and torch.equal(mirrored["hq"][~turned], plain["hq"][~turned])
    assert torch.equal(mirrored["hq"][turned], plain["hq"][turned].flip(-1))
    assert torch.equal(mirrored["lq"], degrade(mirrored["hq"], DEGRADATIONS["codeformer"], plain["seeds"]))


def test_a_damaged_picture_ends_no_run(tmp_path, capsys):
    """Batches of one: the step whose picture is damaged takes the next one."""
    write_faces(tmp_path, [f"{i:02d}.png" for i in range(12)])
    (tmp_path / "03.png").write_bytes((tmp_path / "03.png").read_bytes()[:40])
    faces = common.Faces(tmp_path, 16)
    seen = [faces.names[faces.training(1, 0, k)["place"][0]] for k in range(12)]
    assert len(set(seen)) == 11 and "03.png" not in seen and capsys.readouterr().out.count("skipped") == 1


def test_whole_people_are_held_out(tmp_path):
    opened = lambda folder: [faces.names for faces in common.open_faces(Tiny(output="x", data=str(folder), image_size=16))]
    write_faces(tmp_path / "five", [f"{p}/{i}.png" for p in "abcde" for i in range(4)])
    assert [{name[0] for name in names} for names in opened(tmp_path / "five")] == [set("abcd"), {"e"}]
    write_faces(tmp_path / "two", [f"a/{i:02d}.png" for i in range(30)] + ["b/1.png"])
    assert opened(tmp_path / "two")[1] == ["b/1.png"]
    write_faces(tmp_path / "one", [f"{i}.png" for i in range(9)])
    assert opened(tmp_path / "one")[1] == ["8.png"]


def test_without_data_the_toy_faces_are_drawn_once(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(toy, "draw", lambda folder, draw=toy.draw: draw(folder, 16, 0.002))
    train, held = common.open_faces(Tiny(output="x", image_size=16))
    assert (len(train), len(held)) == (2 * 8, 2 * 4) and not {p.parent.name for p in tmp_path.rglob("*.drawing")}
    monkeypatch.setattr(toy, "draw", None)
    assert common.open_faces(Tiny(output="x", image_size=16))[0].names == train.names


# ---------------------------------------------------------------- run

@dataclass(frozen=True)
class Tiny(common.TrainFlags):
    """A run of two linear stages."""
    device: str = "cpu"
    image_size: int = 16
    mixed_precision: str = "no"
    batch_size: int = 4
    num_workers: int = 0
    checkpointing_steps: int = 2
    log_steps: int = 1
    ema_decay: float = 0.9
    optimizer: str = "muon"
    steps: int = 4


def tiny_run(cfg, after=lambda stage, step, model: None):
    """Two stages in the form of the methods that learn noise with dropout: any difference in draws shows in the weights."""
    run = common.Run(cfg, ("image_size",))
    faces = SimpleNamespace(training=small_batch)
    models = {stage: nn.Sequential(nn.Linear(4, 16), nn.Dropout(0.3), nn.Linear(16, 4)) for stage in ("one", "two")}
    for stage, model in models.items():
        if run.part(stage):
            model.load_state_dict(common.read_weights(run.part(stage)))
            continue
        optimizer = common.make_optimizer(cfg, model.parameters(), 1e-2)
        modules = {"m": model}
        ema = common.EMA(modules, cfg.ema_decay)
        first = run.load(stage, modules, ema, optimizer)
        for step, batch in run.batches(faces.training, stage, first, cfg.steps):
            optimizer.zero_grad()
            for x in batch["x"].chunk(cfg.gradient_accumulation_steps):
                loss = (model(x) - torch.randn(len(x), 1)).square().mean()
                (loss / cfg.gradient_accumulation_steps).backward()
                run.note(loss=loss)
            run.average_gradients(modules)
            optimizer.step()
            ema.update(step)
            after(stage, step, model)
            run.log(stage, step)
            run.save(stage, step, modules, ema, optimizer)
        model.load_state_dict(ema["m"])
        run.finish(stage, {stage: model.state_dict()})
    return {f"{stage}.{name}": tensor for stage, model in models.items() for name, tensor in model.state_dict().items()}


def small_batch(count, seed, step, rank, world):
    return dict(x=torch.randn(count, 4, generator=torch.Generator().manual_seed(common.mix(seed, step, rank))), names=["a"])


def resumed(cfg):
    return dataclasses.replace(cfg, resume_from_checkpoint="latest")


class Killed(BaseException):
    pass


@pytest.mark.parametrize("pieces, optimizer", [(1, "muon"), (2, "adamw")])
def test_a_run_killed_before_or_after_any_write_goes_on_bit_by_bit(tmp_path, monkeypatch, pieces, optimizer):
    cfg = lambda name: Tiny(output=str(tmp_path / name), gradient_accumulation_steps=pieces, optimizer=optimizer)
    straight, replace, writes = tiny_run(cfg("straight")), os.replace, 0
    for kill_at in range(100):
        for late in (False, True):
            writes, again = 0, cfg(f"{kill_at}{late}")

            def dying(source, target, last=kill_at, late=late):
                nonlocal writes
                writes += 1
                if writes <= last or late:
                    replace(source, target)
                if writes > last:
                    raise Killed
            monkeypatch.setattr(os, "replace", dying)
            try:
                tiny_run(again)
                assert kill_at >= 7                               # config, and two states and a part of each stage
                return
            except Killed:
                monkeypatch.setattr(os, "replace", replace)
            assert same(straight, tiny_run(resumed(again)))


@pytest.mark.parametrize("workers", [0, 2])
def test_a_signal_saves_and_says_how_to_go_on(tmp_path, workers):
    """Clusters send it to the loader's processes too: one that died first would raise in the middle of a step."""
    cfg, before = Tiny(output=str(tmp_path), steps=6, checkpointing_steps=100, num_workers=workers), signal.getsignal(signal.SIGINT)
    straight = tiny_run(dataclasses.replace(cfg, output=str(tmp_path / "straight")))
    for number, wanted in ((signal.SIGTERM, 1), (signal.SIGINT, 3)):
        def stop(stage, step, model, number=number, wanted=wanted):
            if (stage, step) == ("two", wanted):
                for process in (os.getpid(), *(child.pid for child in multiprocessing.active_children())):
                    os.kill(process, number)
                time.sleep(0.3)
        with pytest.raises(UserError, match=f"stopped at step {wanted + 1} of stage two, saved; go on with --resume_from"):
            tiny_run(resumed(cfg), stop)
        assert torch.load(tmp_path / "state.pt", weights_only=True)["step"] == wanted + 1
    assert same(straight, tiny_run(resumed(cfg))) and signal.getsignal(signal.SIGINT) is before


def test_values_that_are_not_finite_stop_the_run_and_the_checkpoint_is_kept(tmp_path):
    def poison(stage, step, model):
        if step == 2:
            model[0].weight.data[0, 0] = math.nan
    for log_steps in (1, 100):                                    # seen in the loss, or only before weights are written
        cfg = Tiny(output=str(tmp_path / str(log_steps)), log_steps=log_steps, steps=5)
        with pytest.raises(UserError, match="stage one.* is not finite"):
            tiny_run(cfg, poison)
        state = torch.load(Path(cfg.output) / "state.pt", weights_only=True)
        assert state["step"] == 2 and state["modules"]["m"]["0.weight"].isfinite().all()
    with pytest.raises(UserError, match="stage one: 0.weight is not finite"):
        tiny_run(Tiny(output=str(tmp_path / "end"), checkpointing_steps=100, log_steps=100), poison)
    assert not (tmp_path / "end" / "one.safetensors").exists()


def test_a_line_of_the_log_is_the_mean_over_steps_and_micro_batches(tmp_path):
    run = common.Run(Tiny(output=str(tmp_path), log_steps=2))
    for step in range(2):
        for i in range(3):
            run.note(loss=torch.tensor(float(3 * step + i)))
        run.log("one", step, grad_norm=torch.tensor(step + 1.0))
    row, = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert row["loss"] == 2.5 and row["grad_norm"] == 1.5


def test_the_log_has_a_row_for_every_save(tmp_path):
    tiny_run(Tiny(output=str(tmp_path), steps=9, log_steps=5, checkpointing_steps=4))
    rows = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [(row["stage"], row["step"]) for row in rows[1:]] == [(s, k) for s in ("one", "two") for k in (4, 5, 8)]


def test_another_run_in_the_folder_is_refused_and_replaced_at_the_first_step(tmp_path):
    cfg = Tiny(output=str(tmp_path), steps=2)
    first = tiny_run(cfg)
    (tmp_path / "photo.png").write_bytes(b"the user's")
    with pytest.raises(UserError, match="holds another run .*--overwrite replaces it"):
        common.Run(cfg)
    with pytest.raises(UserError, match="holds another run"):
        common.Run(dataclasses.replace(cfg, stage="o"))           # as Pref-Restore's 1, which is 1.1 and 1.2
    assert same(first, tiny_run(resumed(cfg)))                    # all is finished: taken as it is
    other = dataclasses.replace(cfg, seed=1, overwrite=True)
    common.Run(other)                                             # a mistake after this deletes nothing
    assert (tmp_path / "one.safetensors").exists() and common.Run(other).part("one") is None
    assert not same(first, tiny_run(other)) and (tmp_path / "photo.png").read_bytes() == b"the user's"
    run = common.Run(dataclasses.replace(cfg, stage="two", overwrite=True))
    assert run.part("one") and run.part("two") is None


@pytest.mark.parametrize("workers", [0, 1])
def test_a_mistake_found_while_a_batch_is_made_is_one_line(tmp_path, workers):
    def no_batch(*which):
        raise UserError("0.png: no picture")
    run = common.Run(Tiny(output=str(tmp_path), num_workers=workers))
    with pytest.raises(UserError, match="^0.png: no picture$"):
        list(run.batches(no_batch, "one", 0, 2))


WORKER = """
import os, signal, sys
sys.path[:0] = ["tests", "."]
import torch, test_common as t
torch.set_num_threads(1)
round, out, rank = sys.argv[1], sys.argv[2], int(os.environ["RANK"])
cfg = lambda name: t.Tiny(output=f"{out}/{name}", optimizer="adamw")
kill = lambda number, who, at: lambda stage, step, model: (stage, step) == at and rank in who and os.kill(os.getpid(), number)
if round == "first":
    torch.save(t.tiny_run(cfg("straight")), f"{out}/straight{rank}.pt")
    try:                                      # SIGTERM reaches one process: both stop at the same step, when it is on disk
        t.tiny_run(cfg("stopped"), kill(signal.SIGTERM, [1], ("one", 1)))
    except t.UserError as error:
        assert "stopped at step 2" in str(error) and torch.load(f"{out}/stopped/state.pt", weights_only=True)["step"] == 2
        torch.save({}, f"{out}/said{rank}.pt")
    torch.distributed.barrier()
    t.tiny_run(cfg("killed"), kill(signal.SIGKILL, [0, 1], ("two", 2)))
torch.save(t.tiny_run(t.resumed(cfg("killed"))), f"{out}/killed{rank}.pt")
torch.save(t.tiny_run(t.resumed(cfg("stopped"))), f"{out}/stopped{rank}.pt")
torch.distributed.barrier()
os._exit(0)                                   # libtorch aborts now and then while its threads are torn down, all work done
"""


def test_two_processes_agree_and_go_on_after_a_kill_and_after_a_signal(tmp_path):
    for round, status in (("first", -9), ("second", 0)):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        workers = [subprocess.Popen([sys.executable, "-c", WORKER, round, str(tmp_path)], cwd=ROOT, env=dict(
            os.environ, RANK=str(rank), WORLD_SIZE="2", LOCAL_RANK=str(rank), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port)))
            for rank in range(2)]
        assert [w.wait(timeout=240) for w in workers] == [status, status]
    straight, *others = (torch.load(tmp_path / f"{name}{rank}.pt") for name in ("straight", "killed", "stopped") for rank in (0, 1))
    assert all(same(straight, other) for other in others) and (tmp_path / "said0.pt").exists() and (tmp_path / "said1.pt").exists()
    assert not same(straight, tiny_run(Tiny(output=str(tmp_path / "alone"), optimizer="adamw")))      # rank 1 added something
    assert sum("argv" in line for line in (tmp_path / "straight" / "log.jsonl").read_text().splitlines()) == 1


class InParts(nn.Module):
    """Its encoder is called alone, as that of an autoencoder; adds 1 where it is compiled."""

    def __init__(self):
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(4, 4), Compiled())

    def encode(self, x):
        return self.encoder(x)


class Compiled(nn.Module):
    def forward(self, x):
        return x + float(torch.compiler.is_compiling())


@pytest.mark.parametrize("wanted", (False, True))
def test_compile_reaches_networks_that_are_called_in_parts_and_keeps_names(tmp_path, wanted):
    run, net, x = common.Run(Tiny(output=str(tmp_path), compile=wanted)), InParts(), torch.randn(3, 4)
    names, plain = list(net.state_dict()), net.encode(x)
    run.compile([net])
    torch.testing.assert_close(net.encode(x), plain + wanted)
    assert list(net.state_dict()) == names
    net.encode(x).sum().backward()
    torch.testing.assert_close(net.encoder[0].bias.grad, torch.full((4,), 3.0))


def test_ema_has_the_ramp_and_copies_integers():
    module = nn.BatchNorm1d(1)
    ema = common.EMA({"m": module}, 0.999)
    ema["m"]["weight"].zero_()
    module.num_batches_tracked.fill_(5)
    ema.update(0)
    assert ema["m"]["weight"].item() == pytest.approx(0.9)        # d = min(0.999, 1 / 10)
    ema.decay = 0.5
    ema.update(10**6)
    assert ema["m"]["weight"].item() == pytest.approx(0.95) and ema["m"]["num_batches_tracked"] == 5


# ---------------------------------------------------------------- optimisers, schedules

def test_learning_rate_schedules():
    cfg = SimpleNamespace(lr_scheduler="cosine", lr_warmup_steps=10)
    at = common.lr_schedule(cfg, 100)
    assert at(0) == pytest.approx(1 / 11) and at(10) == pytest.approx(1) and at(55) == pytest.approx(0.51)
    assert at(99) < 0.021 and at(100) == at(500) == pytest.approx(0.02)
    flat = common.lr_schedule(SimpleNamespace(lr_scheduler="constant", lr_warmup_steps=0), 100)
    assert flat(0) == flat(99) == 1
    assert common.warmup_cosine(100, 20, floor=0.1, first=0.1)(10) == pytest.approx(0.55)


# ---------------------------------------------------------------- weights

def test_read_weights_takes_off_the_usual_wrappings(tmp_path):
    state = {"a.weight": torch.ones(2)}
    for content in (state, {"params_ema": state, "params": {}}, {"state_dict": {"module.a.weight": torch.ones(2)}}, {"model": state}):
        torch.save(content, tmp_path / "x.pth")
        assert same(common.read_weights(tmp_path / "x.pth"), state)
    save_file(state, tmp_path / "x.safetensors")
    assert same(common.read_weights(tmp_path / "x.safetensors"), state)
    with pytest.raises(UserError, match="here: .*Linear.*Missing.*bias.*Unexpected.*a.weight"):
        common.load_strict(nn.Linear(2, 2), state | {"weight": torch.ones(2, 2)}, "here")
    save_file({"a": torch.tensor([1.0, math.nan])}, tmp_path / "x.safetensors")
    with pytest.raises(UserError, match="a holds values that are not numbers"):
        common.read_weights(tmp_path / "x.safetensors")


def test_a_folder_that_lacks_weights_is_refused(tmp_path):
    """transformers and diffusers would draw what a file lacks at random, and say so in a note only."""
    from diffusers import AutoencoderKL
    net, file = AutoencoderKL(block_out_channels=(8,), norm_num_groups=4), tmp_path / "part" / "diffusion_pytorch_model.safetensors"
    net.save_pretrained(tmp_path / "part")
    load = lambda: common.from_folder(type(net), str(tmp_path), "flag", "part")
    assert same(load().state_dict(), net.state_dict())
    state = {n: t for n, t in load_file(file).items() if n != "decoder.conv_out.weight"}
    save_file(state, file, metadata={"format": "pt"})
    with pytest.raises(UserError, match="--flag .*part .*lacks weights such as decoder.conv_out.weight"):
        load()


# ---------------------------------------------------------------- LoRA

def small_model():
    torch.manual_seed(0)
    return nn.ModuleDict(dict(attn=nn.ModuleDict(dict(to_q=nn.Linear(6, 8), to_k=nn.Linear(6, 8))), conv=nn.Conv2d(6, 4, 3, padding=1)))


def test_lora_starts_as_the_base_and_survives_files_and_merging(tmp_path):
    model, x, picture = small_model(), torch.randn(5, 6), torch.randn(1, 6, 5, 5)
    before = model.attn.to_q(x).detach(), model.conv(picture).detach()
    parameters = common.add_lora(model, ("to_q", "conv"), rank=2, alpha=8)
    assert torch.equal(model.attn.to_q(x), before[0]) and torch.equal(model.conv(picture), before[1])
    assert sum(p.numel() for p in parameters) == 2 * (6 + 8) + 2 * (6 * 9 + 4) and not model.attn.to_k.weight.requires_grad
    layers = {name: layer for name, layer in model.named_modules() if isinstance(layer, common.LoRALinear)}
    for layer in layers.values():
        nn.init.normal_(layer.lora_B.weight)
    after = model.attn.to_q(x).detach(), model.conv(picture).detach()
    assert not torch.allclose(after[0], before[0])
    state = {f"transformer.{name}.{m}.weight": getattr(layer, m).weight.detach() * (4 if m == "lora_B" else 1)
             for name, layer in layers.items() for m in ("lora_A", "lora_B")}
    save_file(state, tmp_path / "lora.safetensors")               # alpha / rank stands in B; kohya's form has it beside them
    kohya = {n: t / 4 if "lora_B" in n else t for n, t in state.items()}
    kohya |= {n.replace(".lora_B.weight", ".alpha"): torch.tensor(8.) for n in state if "lora_B" in n}
    save_file(kohya, tmp_path / "kohya.safetensors")
    for name in ("lora", "kohya"):
        found = common.read_lora(tmp_path / f"{name}.safetensors")
        assert found.keys() == layers.keys()
        for layer, (a, b) in found.items():
            torch.testing.assert_close((a, b), (layers[layer].lora_A.weight, 4 * layers[layer].lora_B.weight))
    common.merge_lora(model)
    assert type(model.attn.to_q) is nn.Linear
    torch.testing.assert_close((model.attn.to_q(x), model.conv(picture)), after, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("noted, q, k", [
    (dict(r=4, lora_alpha=8), 2, 2), (dict(r=4, lora_alpha=8, use_rslora=True), 4, 4), ({}, 1, 1),
    (dict(r=4, lora_alpha=8, alpha_pattern={"to_k": 2}), 2, .5), (dict(r=8, lora_alpha=8, rank_pattern={"attn.to_k": 4}), 1, 2),
    (dict(r=4, lora_alpha=8, use_rslora=True, alpha_pattern={"attn.to_k": 2}), 4, 1)])
@pytest.mark.parametrize("prefix", ["transformer.", "unet."])
def test_lora_takes_the_scale_that_diffusers_notes_in_the_header(tmp_path, prefix, noted, q, k):
    state = {f"{prefix}attn.{n}.lora_{m}.weight": torch.ones(s) for n in ("to_q", "to_k") for m, s in (("A", (4, 6)), ("B", (8, 4)))}
    save_file(state, tmp_path / "x.safetensors", {"lora_adapter_metadata": json.dumps({f"{prefix}{n}": v for n, v in noted.items()})})
    found = {name: b.unique().item() for name, (_, b) in common.read_lora(tmp_path / "x.safetensors", prefix).items()}
    assert found == {"attn.to_q": q, "attn.to_k": k}


# ---------------------------------------------------------------- restoring folders

@dataclass(frozen=True)
class Restore(common.SampleFlags):
    output: str = ""


def test_restore_folder_takes_what_it_can_and_names_the_rest(tmp_path, capsys):
    for name, size in (("a.png", (64, 64)), ("tall.png", (30, 90)), ("dot.png", (1, 1)), ("huge.jpg", (3000, 20)),
                       ("a.jpg", (64, 64)), ("a.png.webp", (8, 8))):
        (tmp_path / "in").mkdir(exist_ok=True)
        Image.new("RGB", size, "green").save(tmp_path / "in" / name)
    (tmp_path / "in" / "broken.png").write_bytes(b"\x89PNG\r\n")
    cfg = Restore(input=str(tmp_path / "in"), output=str(tmp_path / "out"), batch_size=2)
    seen = []
    common.restore_folder(cfg, lambda lq, names: seen.append(names) or {"restored_faces": -lq, "posterior_mean": lq}, 64, CPU)
    said = capsys.readouterr()
    assert "skipped: " in said.out + said.err and "broken.png" in said.out + said.err and "centred square" in said.out + said.err
    names = {p.name for p in (tmp_path / "out" / "restored_faces").iterdir()}
    assert names == {"a.png.png", "a.jpg.png", "a.png.webp.png", "tall.png", "dot.png", "huge.png"}   # none twice
    assert [len(n) for n in seen] == [2, 2, 2]
    with pytest.raises(UserError, match="not finite"):
        common.restore_folder(dataclasses.replace(cfg, overwrite=True), lambda lq, n: {"restored_faces": lq / 0}, 64, CPU)


# ---------------------------------------------------------------- command line

@dataclass(frozen=True)
class Verb:
    """Do it."""
    output: str = "out"                    # where to
    data: str = ""                         # where from
    batch_size: int = 4                    # how many at a time
    learning_rate: float = 1e-3            # step size
    widths: tuple[int, ...] = (1, 2)       # several numbers
    flag: bool = False                     # on or off
    kind: typing.Literal["x", "y"] = "x"   # one of two


def call(*argv, error=None):
    seen = []

    def verb(cfg):
        if error:
            raise error
        seen.append(cfg)
    common.command_line("Doc.", {"do": (Verb, {"a": {}, "b": dict(batch_size=9, widths=(7,))}, verb)}, list(argv))
    return seen[0]


def test_flags_presets_and_overrides():
    assert call("do") == Verb() and call("do", "--preset", "b") == Verb(batch_size=9, widths=(7,))
    found = call("do", "--preset", "b", "--batch_size", "2", "--widths", "5", "6", "--flag", "--kind", "y", "-o", "here")
    assert found == Verb(output="here", batch_size=2, widths=(5, 6), flag=True, kind="y")


@pytest.mark.parametrize("argv, message", [
    (("do", "--batch_size", "0"), "--batch_size 0: must be a number from 1"), (("do", "--learning_rate", "nan"), "--learning_rate"),
    (("do", "--batchsize", "3"), "--batchsize"), (("do", "--data", "out/faces"), "--output out: holds --data out/faces"),
    (("do", "-o", ""), "--output: is empty"), (("do", "-o", __file__), "is a file; name a folder")])
def test_a_wrong_command_is_one_line_and_a_status(argv, message, capsys):
    with pytest.raises(SystemExit) as stop:
        call(*argv)
    error = capsys.readouterr().err
    assert stop.value.code == 2 and message in error and error.count("\n") == 1
    for wrong, text in ((dict(ema_decay=1.5), "from 0 to 1"), (dict(max_grad_norm=0.0), "--max_grad_norm 0")):
        with pytest.raises(UserError, match=text):
            common.check_config(common.TrainFlags(**wrong))


def test_help_is_grouped_and_its_texts_are_the_comments_beside_the_fields(capsys):
    texts = common.field_help(common.TrainFlags)
    assert set(texts) == {f.name for f in dataclasses.fields(common.TrainFlags)} and all(texts.values())
    assert common.field_help(Verb)["batch_size"] == "how many at a time"
    with pytest.raises(SystemExit):
        call("do", "--help")
    said = capsys.readouterr().out
    assert said.index("everyday:") < said.index("how many at a time [4]") < said.index("of this method:") < said.index("step size")
