"""toy/faces.py: painted people with exact identity, attributes and landmarks, and the folder they are written to."""
import csv
import json
from types import SimpleNamespace

import pytest
import torch
import torch.nn as nn
from diffusers import StableDiffusionPipeline

import a2bfr
from common import ATTRIBUTES, SIBLINGS, TOY, UserError, make_optimizer, read_image, verbalise
from toy import backbones
from toy import faces as toy
from toy import readers
from toy.faces import toy_faces
from toy.muon import Muon

NAMES = [name for _, name, _, _ in ATTRIBUTES]


def test_toy_faces_are_a_pure_function_of_their_seeds():
    before = torch.get_rng_state()
    batch, alone = toy_faces([3, 9], [5, 1]), toy_faces(9, 1)
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.allclose(batch.image[1], alone.image[0], atol=1e-5)
    assert torch.equal(batch.attributes[1], alone.attributes[0]) and batch.identity.tolist() == [3, 9]
    assert batch.image.shape == (2, 3, 64, 64) and batch.image.abs().max() <= 1 and batch.landmarks.shape == (2, 98, 2)
    for wrong in (dict(identity=-1, instance=0), dict(identity=[1, 2], instance=[1, 2, 3]), dict(identity=1, instance=1, size=8)):
        with pytest.raises(ValueError):
            toy_faces(**wrong)


# Where an attribute may change the picture, as a box (left, top, right, bottom) in shares of the side.
REGIONS = {"Eyeglasses": (0.08, 0.28, 0.92, 0.66), "Mouth_Slightly_Open": (0.2, 0.5, 0.8, 0.98), "Bangs": (0.05, 0.0, 0.95, 0.62)}


@pytest.mark.parametrize("name", REGIONS)
def test_an_attribute_changes_only_its_region(name):
    people = torch.arange(12)
    off = toy_faces(people, people).attributes
    off[:, NAMES.index("Wearing_Hat")] = 0
    on = off.clone()
    off[:, NAMES.index(name)], on[:, NAMES.index(name)] = 0, 1
    change = (toy_faces(people, people, off).image - toy_faces(people, people, on).image).abs().amax(1)       # (B, S, S)
    left, top, right, bottom = (int(64 * v) for v in REGIONS[name])
    assert (change.flatten(1).max(1).values > 0.1).all()
    change[:, top:bottom, left:right] = 0
    assert change.max() < 0.02


def test_attributes_do_not_move_the_face():
    """Hair, hats and glasses leave all landmarks where they are; only expression moves mouth and lids."""
    base = toy_faces(torch.arange(8), torch.arange(8))
    for name in ("Eyeglasses", "Bangs", "Wearing_Hat", "Young"):
        changed = base.attributes.clone()
        changed[:, NAMES.index(name)] = 1 - changed[:, NAMES.index(name)]
        assert torch.equal(toy_faces(torch.arange(8), torch.arange(8), changed).landmarks, base.landmarks), name


def test_landmarks_sit_where_they_are_drawn():
    """The irises are dark against the white beside them."""
    plain = torch.zeros(12, 12)
    plain[:, NAMES.index("Young")] = plain[:, NAMES.index("Brown_Hair")] = plain[:, NAMES.index("Straight_Hair")] = 1
    faces = toy_faces(torch.arange(12), torch.zeros(12, dtype=torch.long), plain, size=256)
    grey, hits = faces.image.mean(1), 0
    for i in range(12):
        for point, lids in ((96, (60, 64)), (97, (68, 72))):
            x, y = faces.landmarks[i, point].round().long().tolist()
            iris = grey[i, y - 2:y + 3, x - 2:x + 3].min()
            corners = faces.landmarks[i, list(lids)]
            white = torch.stack([grey[i, int(c[1]), int(0.55 * c[0] + 0.45 * x)] for c in corners]).max()
            hits += int(iris < white - 0.2)
    assert hits >= 23                                                       # of 24 eyes


def test_mean_geometry_is_the_ffhq_template():
    """Eyes, nose tip and mouth corners of FFHQ's aligned faces at 512 px."""
    points = 32 * toy_faces(torch.arange(200), torch.arange(200), size=16).landmarks.mean(0)
    template = torch.tensor([(192.98, 239.95), (318.90, 240.19), (256.63, 314.02), (201.26, 371.41), (313.09, 371.15)])
    assert (points[[96, 97, 54, 76, 82]] - template).abs().max() < 20 and (points[[96, 97]] - template[:2]).abs().max() < 12


def rows(path):
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def test_the_folder_holds_the_people_with_exact_labels(toy_folder):
    """train/, val/ and test/ of other people each, PERSON/NN.png, and the three files of labels."""
    assert not {path.name for path in toy_folder.iterdir()} ^ {"train", "val", "test", "pairs", "pairs_val"}
    for split, people, each in (("train", 10, 8), ("val", 3, 4), ("test", 3, 4)):
        pictures = sorted(path.relative_to(toy_folder / split).as_posix() for path in (toy_folder / split).rglob("*.png"))
        assert pictures == [f"{p:04d}/{i:02d}.png" for p in range(people) for i in range(each)]
        attributes, landmarks = rows(toy_folder / split / "attributes.csv"), rows(toy_folder / split / "landmarks.csv")
        captions = json.loads((toy_folder / split / "captions.json").read_text())
        assert [row["file"] for row in attributes] == [row["file"] for row in landmarks] == list(captions) == pictures
        first = toy.SPLITS[split][0]
        for k in (0, each + 1, len(pictures) - 1):
            who = torch.tensor([[first + k // each], [k % each]])
            face = toy_faces(*who, toy.of_its_time(*who), size=32)
            assert [float(attributes[k][name]) for name in NAMES] == face.attributes[0].tolist()
            found = torch.tensor([[float(landmarks[k][f"{axis}{i}"]) for axis in "xy"] for i in range(98)])
            assert (found - face.landmarks[0]).abs().max() < 1e-3 and captions[pictures[k]] == verbalise(face.attributes[0])
            assert (read_image(toy_folder / split / pictures[k]) - face.image[0]).abs().max() <= 1 / 127.5
    ranges = sorted((first, first + people) for first, people, _ in toy.SPLITS.values())
    assert all(a[1] <= b[0] for a, b in zip(ranges, ranges[1:])) and max(end for _, end in ranges) < 2 ** 62


def test_an_album_has_two_pictures_of_each_time():
    first, second = (toy.of_its_time(torch.arange(64), torch.full((64,), k)) for k in (2, 3))
    lasting = [NAMES.index(name) for name in ("Young", "Bangs", "Wavy_Hair", "Black_Hair", "Blond_Hair", "Gray_Hair")]
    assert torch.equal(first[:, lasting], second[:, lasting]) and first[:, 0].unique().tolist() == [0, 1]
    assert not torch.equal(first[:, NAMES.index("Smiling")], second[:, NAMES.index("Smiling")])


def test_pairs_differ_in_one_attribute_and_are_no_training_pictures(toy_folder):
    pairs = [json.loads(line) for line in (toy_folder / "pairs" / "pairs.jsonl").read_text().splitlines()]
    assert len(pairs) == 20 and len({pair["attribute"] for pair in pairs}) >= 4 and {pair["sign"] for pair in pairs} == {1, -1}
    train = torch.stack([read_image(path) for path in sorted((toy_folder / "train").rglob("*.png"))])
    for k, pair in enumerate(pairs):
        source, target = (read_image(toy_folder / "pairs" / pair[side]) for side in ("source", "target"))
        face = toy_faces(k, 1000 + k, size=32)
        after, sign = toy.switched(face.attributes[0].tolist(), NAMES.index(pair["attribute"]))
        assert sign == pair["sign"] and pair["accepted"] and (source - face.image[0]).abs().max() <= 1 / 127.5
        assert (pair["source_prompt"], pair["target_prompt"]) == (verbalise(face.attributes[0]), verbalise(after))
        assert pair["source_prompt"] != pair["target_prompt"]
        wanted = toy_faces(k, 1000 + k, torch.tensor([after]), size=32).image[0]
        assert (target - wanted).abs().max() <= 1 / 127.5 and (target - source).abs().max() > 0.1
        assert ((train - source).abs().flatten(1).mean(1) > 0.01).all() and ((train - target).abs().flatten(1).mean(1) > 0.01).all()


@pytest.mark.parametrize("group", SIBLINGS)
def test_switching_a_sibling_switches_the_others_off(group):
    for index in group:
        before = [0.0] * 12
        before[group[index == group[0]]] = 1.0
        after, sign = toy.switched(before, index)
        assert sign == 1 and [after[i] for i in group] == [float(i == index) for i in group]
    after, sign = toy.switched([1.0] + [0.0] * 11, 0)
    assert (after, sign) == ([0.0] * 12, -1)


def test_a_stopped_drawing_leaves_no_folder_and_a_finished_one_is_kept(tmp_path, monkeypatch, capsys):
    with monkeypatch.context() as patch:
        patch.setattr(toy, "draw_pairs", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            toy.draw(tmp_path / "toy", 16, 0.002)
    assert not (tmp_path / "toy").exists()
    toy.draw(tmp_path / "toy", 16, 0.002)
    assert {path.name for path in tmp_path.iterdir()} == {"toy"}
    with pytest.raises(UserError, match="is there already"):
        toy.draw(tmp_path / "toy", 16, 0.002)


# ------------------------------------------------------------------------------------------------ stand-ins and readers

def test_colour_slopes_are_those_of_a_mixed_copy():
    """A copy that keeps luma, halves red minus blue and loses green minus magenta has the slopes 1, 1/2, 0."""
    hq = toy_faces(torch.arange(4), torch.arange(4)).image
    luma, red_blue, _ = backbones.opponent(hq).unbind(1)
    copy = torch.stack([luma + red_blue / 4, luma, luma - red_blue / 4], 1)
    slopes = backbones.colour_slopes(hq, copy)
    assert slopes == pytest.approx([1, 0.5, 0], abs=1e-5)


@pytest.mark.parametrize("kind", ["contrast", "saturation", "sharpness"])
def test_looks_lower_the_label_of_quality(kind):
    """A retouched face is no better than the clean one: only the clean one has the label 1."""
    hq = toy_faces(torch.arange(4), torch.arange(4)).image
    strong = readers.retouch(hq, kind, torch.ones(4))
    assert strong.abs().max() <= 1 and (strong - hq).abs().mean() > 0.02
    seeds = torch.arange(24) + 12 * 700                           # u is 1
    image, label = readers.spoil(hq[:1].expand(len(seeds), -1, -1, -1), seeds)
    clean = (image - hq[0]).abs().flatten(1).amax(1) < 1e-6
    assert clean.sum() == 6 and (label[clean] > 0.99).all() and (label[~clean] < 0.9).all()


def test_stand_ins_are_written_as_releases_and_go_on(toy_folder, tmp_path):
    """Two steps of each; a second call trains nothing and writes the same weights."""
    cfg = backbones.Settings(which=("vae", "sd", "flux", "sana"), steps=2, vae_steps=2, batch_size=2,
                             output=str(tmp_path / "weights"), work=str(tmp_path / "work"), data=str(toy_folder / "train"), device="cpu", **TOY)
    backbones.train(cfg)
    files = {path.relative_to(tmp_path) for path in (tmp_path / "weights").rglob("*") if path.is_file()}
    before = {path: path.read_bytes() for path in (tmp_path / "weights").rglob("*.safetensors")}
    assert json.loads((tmp_path / "weights" / "sd" / "about.json").read_text())["steps"] == 2
    backbones.train(cfg)
    assert files == {path.relative_to(tmp_path) for path in (tmp_path / "weights").rglob("*") if path.is_file()}
    assert len(before) == 11 and all(path.read_bytes() == data for path, data in before.items())
    assert set(a2bfr.load_flux(tmp_path / "weights" / "flux", torch.float32)) == {"codec", "prior"}
    pipeline = StableDiffusionPipeline.from_pretrained(tmp_path / "weights" / "sd", dtype=torch.float32)
    ids = pipeline.tokenizer("A photo of a person, unheard-of", padding="max_length").input_ids
    assert len(ids) == 77 and ids.count(1) == 1 and ids[-1] == 0


def test_muon_equals_torchs_muon_on_matrices_and_adam_on_vectors():
    """torch.optim.Muon takes matrices only and works in bf16: equal up to that."""
    torch.manual_seed(0)
    ours, theirs = ([nn.Parameter(torch.linspace(-1, 1, m * n).sin().view(m, n)) for m, n in ((24, 40), (40, 24))] for _ in range(2))
    muon = Muon(ours, lr=0.1, weight_decay=0.2)
    library = torch.optim.Muon(theirs, lr=0.1, momentum=0.95, nesterov=True, weight_decay=0.2, adjust_lr_fn="match_rms_adamw")
    for _ in range(4):
        for p, q in zip(ours, theirs):
            p.grad = torch.randn_like(p)
            q.grad = p.grad.clone()
        muon.step(), library.step()
    for p, q in zip(ours, theirs):
        torch.testing.assert_close(p, q, rtol=0, atol=4 * 0.1 * 0.2 * 0.05)
    ours, theirs = ([nn.Parameter(torch.linspace(-1, 1, n)) for n in (5, 3)] for _ in range(2))
    table = nn.Parameter(torch.ones(3, 2))
    muon = make_optimizer(SimpleNamespace(optimizer="muon"), [*ours, table], 0.1, weight_decay=0.2, tables=[table])
    adam = torch.optim.AdamW([*theirs, twin := nn.Parameter(torch.ones(3, 2))], lr=0.1, betas=(0.9, 0.95), weight_decay=0.2)
    for step in range(5):
        for p, q in zip([*ours, table], [*theirs, twin]):
            p.grad = torch.randn_like(p) if len(p) == 5 or step > 1 else None   # one joins later: it counts its own steps
            q.grad = None if p.grad is None else p.grad.clone()
        muon.step(), adam.step()
    for p, q in zip([*ours, table], [*theirs, twin]):
        torch.testing.assert_close(p, q, rtol=0, atol=1e-6)
