"""a2bfr.py as a program: stages, resume, real FLUX folders, pairs, photographs, bad input. Tiny, no download."""
import dataclasses
import json
import math
import re
import shlex
import shutil
from pathlib import Path

import pytest
import safetensors.torch
import torch
import torch.nn.functional as F
from PIL import Image
from test_a2bfr import tiny_flux_folder

import a2bfr as ab
import common
import metrics
from program import ROOT, caller, kill_in_stage, toy_pictures, train_once_more

TINY = ["--vae_widths", "8", "8", "8", "--latent_channels", "4", "--heads", "1", "--double_layers", "1",
        "--single_layers", "1", "--text_width", "16", "--image_size", "32", "--vae_steps", "3", "--prior_steps", "3",
        "--lora_steps", "4", "--vae_batch_size", "4", "--prior_batch_size", "4", "--batch_size", "4", "--rank", "4",
        "--lora_alpha", "4", "--log_steps", "1", "--validation_faces", "4", "--num_inference_steps", "2", "--device", "cpu"]
LOOSE = ["--min_identity", "0", "--min_structure", "0", "--max_shift", "9", "--max_leak", "1", "--positive", "0.5",
         "--negative", "0.5"]
ANY = ["--positive", "0.01", "--negative", "0.99", "--max_shift", "999", "--max_leak", "2"]
SHORT = ["--num_inference_steps", "3", "--n_max", "2", "--image_size", "32", "--device", "cpu"]
QUICK = ["--num_inference_steps", "2", "--device", "cpu"]
call, refused = caller(ab, libraries_talk=True)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """One tiny run of all stages, a folder of toy pictures, and pairs built by its prior."""
    folder = tmp_path_factory.mktemp("run")
    call("train", *TINY, "-o", folder / "out")
    toy_pictures(folder / "faces", 6)
    call("pairs", *LOOSE, *SHORT, "--checkpoint", folder / "out", "-o", folder / "pairs", "--count", "8")
    return folder


@pytest.fixture(scope="module")
def flux(tmp_path_factory):
    folder = tmp_path_factory.mktemp("flux") / "FLUX.1-tiny"
    tiny_flux_folder(folder)
    return folder


def weights(folder):
    found = safetensors.torch.load_file(Path(folder) / ab.LORA_FILE)
    path = Path(folder) / "model.safetensors"
    return found | (safetensors.torch.load_file(path) if path.exists() else {})


def same(a, b):
    a, b = weights(a), weights(b)
    return a.keys() == b.keys() and all(torch.equal(a[n], b[n]) for n in a)


# ---------------------------------------------------------------- training

def test_training_leaves_weights_numbers_and_pictures(trained):
    out = trained / "out"
    wanted = {"model.safetensors", ab.LORA_FILE, "config.json", "metrics.json", "samples.png", "prompts.png", "curves.png",
              "log.jsonl"}
    assert wanted <= {p.name for p in out.iterdir()}
    numbers = json.loads((out / "metrics.json").read_text())
    rows = {"lq", "source", "target", "template", "edited", "prior", "autoencoder"}
    assert set(numbers["rows"]) == rows and numbers["faces"] == 4
    assert 0 <= numbers["rows"]["target"]["attribute_accuracy_toy"] <= 1
    assert sum(n for _, n in numbers["per_attribute"]["target"].values()) == 4
    names = weights(out)
    assert {n.split(".")[0] for n in names} == {"codec", "text", "prior", "transformer"}
    assert not any("lora" in n or ".base." in n for n in names if n.startswith("prior"))
    log = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    assert log[0]["config"]["seed"] == 0 and {"diffusion_src", "diffusion_tar", "dual", "prodigy_d"} <= log[-1].keys()


def test_only_the_lora_learns_in_the_last_stage(trained, tmp_path):
    call("train", *TINY, "-o", tmp_path, "--prior", trained / "out", "--lora_steps", "2", "--lora_optimizer", "adamw",
         "--learning_rate", "1e-2", "--seed", "3")
    a, b = weights(trained / "out"), weights(tmp_path)
    assert a.keys() == b.keys()
    assert all(torch.equal(a[n], b[n]) for n in a if "lora" not in n)
    assert any(t.any() for n, t in b.items() if "lora_B" in n)
    call("train", *TINY, "-o", tmp_path / "next", "--prior", tmp_path, "--lora_steps", "1")  # it holds the prior too


def test_stage_by_stage_equals_all_at_once(trained, tmp_path):
    for stage in ("vae", "prior", "lora"):
        call("train", *TINY, "-o", tmp_path, "--stage", stage)
    assert same(trained / "out", tmp_path)


def test_a_killed_run_goes_on_to_the_same_weights(trained, tmp_path):
    """SIGKILL amid the LoRA stage, then --resume_from_checkpoint latest: bit by bit the uninterrupted run."""
    arguments = kill_in_stage("a2bfr.py", tmp_path, "lora", *TINY)
    call(*arguments, "--resume_from_checkpoint", "latest")
    assert same(trained / "out", tmp_path)


def test_memory_flags_change_nothing_that_is_learned(trained, tmp_path):
    """Two passes, checkpointing and cached text give the same LoRA, up to rounding."""
    base = ["train", *TINY, "--prior", trained / "out", "--lora_optimizer", "adamw", "--learning_rate", "1e-3",
            "--mixed_precision", "no", "--attr_t_max", "1"]
    call(*base, "-o", tmp_path / "a")
    call(*base, "-o", tmp_path / "b", "--two_pass", "--gradient_checkpointing", "--cache_text")
    a, b = weights(tmp_path / "a"), weights(tmp_path / "b")
    lora = [n for n in a if "lora_B" in n]
    change = torch.cat([a[n].flatten() for n in lora])
    assert torch.cat([(a[n] - b[n]).flatten() for n in lora]).norm() < .05 * change.norm() and change.norm() > 0
    assert len(list((tmp_path / "b" / "text").glob("*.safetensors"))) > 514       # all whole prompts, and short ones


@pytest.mark.parametrize("flags", [
    ["--no-dual_training", "--attribute_weight", "0"], ["--dual", "abs", "--lq_from", "random", "--decoded", "1"],
    ["--independent_condition", "--dropped_prompt", "empty", "--drop_text", "1", "--drop_condition", "1"],
    ["--degradation", "a2bfr", "--gradient_accumulation_steps", "2", "--lora_optimizer", "muon", "--learning_rate", "1e-3"]])
def test_variants_of_the_method_train(trained, tmp_path, flags):
    call("train", *TINY, "--prior", trained / "out", "-o", tmp_path, "--lora_steps", "1", *flags)
    rows = json.loads((tmp_path / "metrics.json").read_text())["rows"]
    assert rows["target"]["psnr"] > 0
    last = json.loads((tmp_path / "log.jsonl").read_text().splitlines()[-1])
    assert ("diffusion_tar" in last) == ("--no-dual_training" not in flags)
    assert ("attribute_src" in last) == ("--attribute_weight" not in flags and "--drop_text" not in flags)


def test_without_dual_training_faces_of_both_sides_are_single_faces(trained, tmp_path, monkeypatch):
    """Table 4's rows without SDT: one face of each pair, its own prompt, its own degraded image."""
    seen, original = [], ab.lora_loss
    monkeypatch.setattr(ab, "lora_loss", lambda *a: seen.append(a[3]) or original(*a))
    call("train", *TINY, "--prior", trained / "out", "-o", tmp_path, "--lora_steps", "2", "--no-dual_training")
    targets = 0
    for step, batch in enumerate(seen):
        pairs = ab.ToyPairs(32, short=True).training(4, 0, step)
        for i, seed in enumerate(pairs["seeds"]):
            face, prompt = ("hq", "source_prompts") if seed % 2 else ("hq_tar", "target_prompts")
            targets += face == "hq_tar"
            assert torch.equal(batch["hq"][i], pairs[face][i]) and batch["source_prompts"][i] == pairs[prompt][i]
        assert torch.equal(batch["lq"], common.degrade(batch["hq"], common.DEGRADATIONS["noisy"], batch["seeds"]))
    assert 0 < targets < 8


def test_condition_in_half_resolution_and_the_cache(trained, tmp_path):
    call("train", *TINY, "--prior", trained / "out", "-o", tmp_path / "r", "--lora_steps", "1", "--condition_scale", "2",
         "--independent_condition")
    for name, flags in (("a", []), ("b", ["--kv_cache"])):
        call("sample", "-i", trained / "faces", "-o", tmp_path / name, "--checkpoint", tmp_path / "r", *QUICK, *flags)
    image = lambda name: common.read_image(tmp_path / name / "restored_faces" / "03.png")
    assert (image("a") - image("b")).abs().max() <= 2 / 127.5


# ---------------------------------------------------------------- sampling

def test_sampling_depends_on_prompt_and_seed_and_on_nothing_else(trained, tmp_path):
    run = lambda name, *flags: call("sample", "-i", trained / "faces", "-o", tmp_path / name, *QUICK,
                                    "--checkpoint", trained / "out", *flags)
    run("a"), run("b", "--batch_size", "4"), run("c", "--seed", "1"), run("d", "--prompt", "a smiling person with bangs")
    run("e", "--true_cfg_scale", "3", "--negative_prompt", "a hat", "--image_guidance_scale", "1.5")
    image = lambda name: common.read_image(tmp_path / name / "restored_faces" / "03.png")
    assert (image("a") - image("b")).abs().max() <= 2 / 127.5
    assert all(not torch.equal(image("a"), image(name)) for name in "cde")
    assert (tmp_path / "a" / "cmp" / "03.png").exists()


def test_strange_pictures_are_restored(trained, tmp_path, capsys):
    source = tmp_path / "in"
    source.mkdir()
    Image.new("RGBA", (50, 30), "orange").save(source / "a.png")
    Image.new("I;16", (33, 33), 40000).save(source / "deep.png")
    Image.new("RGB", (1, 1)).save(source / "dot.webp")
    (source / "notes.png").write_text("not a picture")
    call("sample", "-i", source, "-o", tmp_path / "out", "--checkpoint", trained / "out", *QUICK)
    said = capsys.readouterr().out
    assert len(list((tmp_path / "out" / "restored_faces").iterdir())) == 3
    assert "notes.png" in said and "50x30 resized to 32x32" in said


# ---------------------------------------------------------------- pairs

def test_pairs_leave_a_data_set_that_trains(trained, tmp_path, capsys):
    rows, broken = ab.read_pairs(trained / "pairs" / "pairs.jsonl")
    good = [row for row in rows if row["accepted"]]
    assert len(rows) == 16 and not broken and good and {p.name for p in (trained / "pairs").iterdir()} >= {
        "metrics.json", "sheet.png", "source", "target"}
    for row in rows:
        assert row["accepted"] == (not row["reasons"]) == bool(row["target"]) and set(ab.PAIR_KEYS) <= row.keys()
        assert row["accepted"] or row["attempts"] == 6                             # three blends, two noises each
    assert len(list((trained / "pairs" / "target").iterdir())) == len(good)
    numbers = json.loads((trained / "pairs" / "metrics.json").read_text())
    assert numbers["acceptance"] == len(good) / 16 and numbers["minutes_per_1000_pairs"] > 0
    call("train", *TINY, "--prior", trained / "out", "-o", tmp_path, "--lora_steps", "1",
         "--pairs", trained / "pairs" / "pairs.jsonl")
    assert "not accepted" in capsys.readouterr().out or len(good) == 16


def test_released_networks_judge_pairs(tmp_path):
    """--arcface and --fan read files in the released formats; likeness and shift are theirs, not the toy reader's."""
    torch.manual_seed(0)
    nets = dict(arcface=metrics.IResNet(18), fan=metrics.FAN98())
    for name, net in nets.items():
        torch.save(net.eval().state_dict(), tmp_path / f"{name}.pth")
    files = {name: str(tmp_path / f"{name}.pth") for name in nets}
    a, b = (common.toy_faces([1, 2], [i, i], size=64).image for i in (0, 1))
    found = torch.tensor(ab.Judge(ab.Pairs(**files), torch.device("cpu")).compare(a, b))
    with torch.no_grad():
        ea, eb = (F.normalize(nets["arcface"](metrics.crop_112(x))) for x in (a, b))
        pa, pb = (nets["fan"].landmarks(x) for x in (a, b))
    torch.testing.assert_close(found[:, 0], F.cosine_similarity(ea, eb))
    moved = [sum(math.dist(p, q) for p, q in zip(x.tolist(), y.tolist())) / 98 / max(1e-3, math.dist(x[96], x[97]))
             for x, y in zip(pa, pb)]
    torch.testing.assert_close(found[:, 2], torch.tensor(moved), rtol=1e-3, atol=1e-4)
    toy = torch.tensor(ab.Judge(ab.Pairs(), torch.device("cpu")).compare(a, b))
    assert (found[:, 0] - toy[:, 0]).abs().min() > 1e-3 and torch.equal(found[:, 1], toy[:, 1])


def test_a_stage_trained_once_more_can_be_stopped_and_resumed(trained, tmp_path, capsys, monkeypatch):
    flags = (*TINY, "--stage", "lora", "--learning_rate", "0.5")
    a, b = train_once_more(call, refused, capsys, monkeypatch, trained / "out", tmp_path, *flags, read=weights)
    assert all(torch.equal(a[name], b[name]) for name in b)


def test_a_retrained_stage_that_was_killed_before_it_saved_starts_anew(trained, tmp_path, monkeypatch):
    """Not from the weights of the former training."""
    flags = [*TINY, "--stage", "vae", "--seed", "3"]
    killed, straight = (shutil.copytree(trained / "out", tmp_path / name) for name in ("killed", "straight"))
    with monkeypatch.context() as patch:
        patch.setattr(common.Stage, "update", lambda *a, **k: (_ for _ in ()).throw(MemoryError))
        with pytest.raises(SystemExit):
            call("train", *flags, "-o", killed)
    call("train", *flags, "-o", killed, "--resume_from_checkpoint", "latest")
    call("train", *flags, "-o", straight)
    a, b = weights(killed), weights(straight)
    assert all(torch.equal(a[name], b[name]) for name in b if name.startswith("codec"))


def test_mistakes_leave_a_finished_run_as_it_is(trained, tmp_path, capsys):
    out = shutil.copytree(trained / "out", tmp_path / "out")
    before = (out / "config.json").read_bytes()
    for flags in (["--stage", "vae", "--readers", "/nope"], ["--readers", "/nope"],
                  ["--data", "/nope", "--no-dual_training"]):
        refused(capsys, "train", *TINY, "-o", out, *flags)
        assert (out / "config.json").read_bytes() == before and not (tmp_path / "out.1").exists()


def test_pairs_resume_after_a_kill(trained, tmp_path):
    """A torn last line and a lost later half: what was listed stays as it is, the rest comes out as before."""
    folder = tmp_path / "pairs"
    shutil.copytree(trained / "pairs", folder)
    lines = (folder / "pairs.jsonl").read_text().splitlines(keepends=True)
    (folder / "pairs.jsonl").write_text("".join(lines[:7]) + lines[7][:40])        # killed while writing
    kept = [json.loads(line) for line in lines[:7]]
    stamp = {row["target"]: (folder / row["target"]).stat().st_mtime_ns for row in kept if row["accepted"]}
    for row in map(json.loads, lines[7:]):
        if row["accepted"]:
            (folder / row["target"]).unlink()
    call("pairs", *LOOSE, *SHORT, "--checkpoint", trained / "out", "-o", folder, "--count", "8")
    rows, broken = ab.read_pairs(folder / "pairs.jsonl")
    assert broken == {"not JSON": 1} and rows[:7] == kept
    by_id = lambda rows: {row["id"]: {k: v for k, v in row.items() if k != "scores"} for row in rows}
    assert by_id(rows) == by_id(ab.read_pairs(trained / "pairs" / "pairs.jsonl")[0]) and len(rows) == 16
    assert all((folder / name).stat().st_mtime_ns == time for name, time in stamp.items())
    assert all((folder / row["target"]).exists() for row in rows if row["accepted"])


def test_broken_rows_are_counted_and_left_out(trained, tmp_path, capsys):
    folder = tmp_path / "pairs"
    shutil.copytree(trained / "pairs", folder)
    good = [row for row in ab.read_pairs(folder / "pairs.jsonl")[0] if row["accepted"]]
    rows = [dict(good[0], target="target/absent.png"), dict(good[0], attribute="Horns"), dict(good[0], sign=0),
            dict(good[0], source_prompt=""), dict(good[0], target_prompt="a zebra"), dict(good[0], source=7),
            dict(good[0], source_prompt=None), dict(good[0], source="x" * 5000),
            dict(good[0], source_prompt="a person " * 5000)]
    text = "".join(json.dumps(row) + "\n" for row in rows) + "{\"half\n[]\n{}\n\n"
    (folder / "pairs.jsonl").write_text(text + "".join(json.dumps(row) + "\n" for row in good[:2]))
    found = ab.FilePairs(str(folder / "pairs.jsonl"), 32, ab.WordText(8, 24))
    said = capsys.readouterr().out
    assert len(found.rows) + len(found.held) == 2 and found.held
    for part in ("3 rows left out, with a missing or unreadable file, such as target/absent.png",
                 "unknown attribute, such as Horns", "neither 1 nor -1",
                 "4 rows left out, with a prompt that cannot be used", "1 row left out, not JSON", "2 rows left out, without all fields"):
        assert part in said, part
    Image.open(folder / good[0]["source"]).convert("RGB").save(folder / "cut.jpg")
    (folder / "cut.jpg").write_bytes((folder / "cut.jpg").read_bytes()[:400])
    assert "unreadable" in ab.row_fault(dict(good[0], source="cut.jpg"), folder)[0]
    (folder / "pairs.jsonl").write_text(text)
    assert "no accepted pair" in refused(capsys, "train", *TINY, "--prior", trained / "out", "-o", tmp_path / "o",
                                         "--pairs", folder / "pairs.jsonl")
    assert "--pairs" in refused(capsys, "train", *TINY, "--prior", trained / "out", "-o", tmp_path / "o",
                                "--pairs", tmp_path / "absent.jsonl")


def test_pairs_of_other_faces_are_not_mixed_and_broken_rows_do_not_end_the_report(trained, tmp_path, capsys):
    """Names stand for one picture: other seeds, sizes or folders want another --output; a.png is not a.jpg."""
    folder, faces = tmp_path / "pairs", tmp_path / "faces"
    shutil.copytree(trained / "pairs", folder)
    again = ["pairs", *LOOSE, *SHORT, "--checkpoint", trained / "out", "-o", folder, "--count", "8"]
    before = (folder / "pairs.jsonl").read_bytes()
    assert "--seed 0" in refused(capsys, *again, "--seed", "1") and (folder / "pairs.jsonl").read_bytes() == before
    rows = ab.read_pairs(folder / "pairs.jsonl")[0]
    good = next(row for row in rows if row["accepted"])
    with open(folder / "pairs.jsonl", "a") as file:
        for change in (dict(attribute="Horns"), dict(target=None), dict(target="../../etc/absent.png")):
            file.write(json.dumps(dict(good, id="x", **change)) + "\n")
    call(*again)
    numbers = json.loads((folder / "metrics.json").read_text())
    assert numbers["accepted"] == sum(row["accepted"] for row in rows) == numbers["measured"]
    for name in ("a_b.png", "a/b.png", "a/b.jpg"):
        common.write_image(faces / name, common.toy_faces(1, 1, size=32).image[0])
    names = [name for name, _ in ab.source_faces(ab.Pairs(data=str(faces), image_size=32))]
    assert sorted(names) == ["a%2Fb.jpg", "a%2Fb.png", "a_b.png"]


def test_an_incomplete_flux_is_refused(flux, trained, tmp_path, capsys):
    """A missing tensor would be drawn at random."""
    broken = tmp_path / "flux"
    shutil.copytree(flux, broken)
    file = next((broken / "text_encoder_2").glob("*.safetensors"))
    tensors = safetensors.torch.load_file(file)
    gone = next(name for name in tensors if "layer_norm" in name)
    safetensors.torch.save_file({n: t for n, t in tensors.items() if n != gone}, file, metadata={"format": "pt"})
    said = refused(capsys, "sample", "-i", trained / "faces" / "00.png", "-o", tmp_path / "o", "--lora", tmp_path / "l",
                   "--pretrained_model_name_or_path", broken, "--image_size", "32", "--text_length", "24")
    assert "text_encoder_2" in said and "lacks weights" in said


def test_a_finished_run_is_not_measured_with_other_settings(trained, capsys):
    """They would change what its weights mean, and metrics.json would hold the numbers of another model."""
    before = (trained / "out" / "metrics.json").read_bytes()
    for flag, value in (("--image_size", "64"), ("--condition_scale", "2")):
        said = refused(capsys, "train", *TINY, "-o", trained / "out", "--resume_from_checkpoint", "latest", flag, value)
        assert f"{flag} {value}" in said and "was trained with" in said
    assert "was trained with 32" in refused(capsys, "train", *TINY, "-o", trained / "out", "--stage", "lora",
                                            "--image_size", "64")
    assert (trained / "out" / "metrics.json").read_bytes() == before


def test_an_earlier_stage_of_a_finished_run_is_taken_as_it_is(trained, tmp_path, capsys):
    """Resuming it trains nothing, loses nothing and has no LoRA to report on."""
    shutil.copytree(trained / "out", tmp_path / "out")
    call("train", *TINY, "-o", tmp_path / "out", "--stage", "vae", "--resume_from_checkpoint", "latest")
    assert "stage vae: finished before" in capsys.readouterr().out
    before, after = (safetensors.torch.load_file(f / "out" / "model.safetensors") for f in (trained, tmp_path))
    assert before.keys() == after.keys() and all(torch.equal(before[n], after[n]) for n in before)


def test_ablate_does_not_resume_one_row_into_another(tmp_path, capsys):
    said = refused(capsys, "ablate", *TINY, "-o", tmp_path, "--resume_from_checkpoint", "latest")
    assert "ablate goes on by itself" in said


def test_photographs_pairs_and_training_end_to_end(trained, tmp_path, capsys):
    """A folder instead of the toy world: own autoencoder and prior, pairs from it, LoRA on them; and without pairs."""
    faces, out = trained / "faces", tmp_path / "out"
    folder = [*TINY, "--data", faces, "-o", out]
    call("train", *folder, "--stage", "vae"), call("train", *folder, "--stage", "prior")
    call("pairs", *LOOSE, *SHORT, "--checkpoint", out, "-o", tmp_path / "pairs", "--data", faces, *ANY)
    assert "only knows toy faces" in capsys.readouterr().out
    call("train", *folder, "--stage", "lora", "--pairs", tmp_path / "pairs" / "pairs.jsonl")
    call("train", *TINY, "--data", faces, "-o", tmp_path / "single", "--prior", out, "--no-dual_training")
    assert (out / "metrics.json").exists() and (tmp_path / "single" / "metrics.json").exists()
    assert "has no pairs" in refused(capsys, "train", *TINY, "--data", faces, "-o", tmp_path / "o", "--prior", out)


# ---------------------------------------------------------------- the real FLUX, tiny

PAPER = ["--preset", "paper", "--image_size", "32", "--text_length", "24", "--rank", "4", "--lora_alpha", "4",
         "--lora_steps", "2", "--log_steps", "1", "--validation_faces", "2", "--num_inference_steps", "2", "--num_workers", "0",
         "--device", "cpu"]


def test_paper_preset_on_a_flux_folder(trained, flux, tmp_path, capsys):
    """Every memory flag on, bf16, text cached to disk; then sampling, and the LoRA file alone as the release is used."""
    out = tmp_path / "out"
    call("train", *PAPER, "--pretrained_model_name_or_path", flux, "-o", out, "--pairs", trained / "pairs" / "pairs.jsonl",
         "--data", trained / "faces", "--optimizer", "adamw")
    said = capsys.readouterr().out
    assert "--data and --validation_data are not read beside --pairs" in said and "--optimizer is for the toy prior" in said
    assert len(list((out / "text").iterdir())) > 2 and not any(n.startswith("prior") for n in weights(out))
    assert any(t.any() for n, t in weights(out).items() if "lora_B" in n)
    config = json.loads((out / "config.json").read_text())["train"]
    assert config["two_pass"] and config["gradient_checkpointing"] and config["cache_text"]
    sample = ["sample", "-i", trained / "faces" / "00.png", *QUICK, "--mixed_precision", "bf16", "--prompt", "any words do"]
    call(*sample, "--checkpoint", out, "-o", tmp_path / "a")
    call(*sample, "--lora", out / ab.LORA_FILE, "--pretrained_model_name_or_path", flux, "--image_size", "32",
         "--text_length", "24", "--guidance_scale", "3.5", "-o", tmp_path / "b")
    image = lambda name: common.read_image(tmp_path / name / "restored_faces" / "00.png")
    assert torch.equal(image("a"), image("b"))                                     # the run's guidance is 3.5


def test_flux_edits_pairs_with_its_embedded_guidance(trained, flux, tmp_path):
    call("pairs", "--preset", "flux", "--pretrained_model_name_or_path", flux, *SHORT, *LOOSE, "-o", tmp_path,
         "--count", "6", "--mixed_precision", "no", "--data", trained / "faces", *ANY)
    rows, _ = ab.read_pairs(tmp_path / "pairs.jsonl")
    assert len(rows) == 6 and any(row["accepted"] for row in rows)                 # one edit a face


def test_incomplete_flux_folders_are_named(flux, tmp_path, capsys, trained):
    train = lambda where: refused(capsys, "train", *PAPER, "--pretrained_model_name_or_path", where, "-o", tmp_path / "o",
                                  "--pairs", trained / "pairs" / "pairs.jsonl", "--no-cache_text")
    copy = tmp_path / "flux"
    shutil.copytree(flux, copy)
    shutil.rmtree(copy / "vae")
    assert "no folder vae/" in train(copy)
    shutil.copytree(flux / "vae", copy / "vae")
    (copy / "transformer" / "diffusion_pytorch_model.safetensors").write_bytes(b"x" * 100)
    assert "transformer cannot be loaded" in train(copy)
    shutil.copy(flux / "transformer" / "diffusion_pytorch_model.safetensors", copy / "transformer")
    config = json.loads((copy / "transformer" / "config.json").read_text())
    (copy / "transformer" / "config.json").write_text(json.dumps(dict(config, in_channels=64)))
    assert "transformer cannot be loaded" in train(copy)
    shutil.rmtree(copy / "text_encoder_2")
    assert "text_encoder_2" in train(copy)
    assert "--pretrained_model_name_or_path" in train(tmp_path / "absent")


# ---------------------------------------------------------------- bad input

def test_bad_prompts(capsys, trained, tmp_path):
    said = lambda prompt: refused(capsys, "sample", "-i", trained / "faces", "-o", tmp_path / "o", *QUICK,
                                  "--checkpoint", trained / "out", "--prompt", prompt)
    assert "--prompt is empty" in said("") and "--prompt is empty" in said("   ")
    assert "does not know zebra" in said("a smiling zebra") and "2500 tokens" in said("a hat " * 1250)
    assert "does not know" in said("x" * 10_000) and len(said("x" * 10_000)) < 800


def test_bad_checkpoints_and_lora_files(capsys, trained, tmp_path):
    sample = lambda *flags: refused(capsys, "sample", "-i", trained / "faces", "-o", tmp_path / "o", *QUICK, *flags)
    out = trained / "out"
    assert "no such file or folder" in sample("--checkpoint", tmp_path / "absent")
    copy = tmp_path / "copy"
    shutil.copytree(out, copy)
    (copy / ab.LORA_FILE).unlink()
    assert ab.LORA_FILE in sample("--checkpoint", copy)
    state = safetensors.torch.load_file(out / ab.LORA_FILE)
    cut = {n: (t[:2] if "lora_A" in n else t[:, :2]).contiguous() for n, t in state.items() if "single" in n}
    safetensors.torch.save_file(cut, tmp_path / "part.safetensors")
    assert "other layers" in sample("--checkpoint", out, "--lora", tmp_path / "part.safetensors")
    wrong = {n: torch.cat([t, t]) if "lora_B" in n else t for n, t in state.items()}
    safetensors.torch.save_file(wrong, tmp_path / "wide.safetensors")
    assert "wide.safetensors" in sample("--checkpoint", out, "--lora", tmp_path / "wide.safetensors")
    config = json.loads((out / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(dict(config, finished=["vae", "prior"])))
    assert "stage lora is not finished" in sample("--checkpoint", copy)
    (copy / "config.json").write_text(json.dumps(dict(config, train=dict(config["train"], heads=2))))
    assert "does not fit" in sample("--checkpoint", copy)
    assert "independent_condition" in sample("--checkpoint", out, "--kv_cache")


def test_bad_flags(capsys, trained, tmp_path):
    train = lambda *flags: refused(capsys, "train", *TINY, "-o", tmp_path / "o", *flags)
    assert "--image_size 36: must be a multiple of 8" in train("--image_size", "36")
    assert "multiple of 16" in refused(capsys, "train", *PAPER, "--image_size", "500", "-o", tmp_path / "o",
                                       "--pretrained_model_name_or_path", "x")
    assert "needs vae" in train("--stage", "prior") and "only the stage lora" in train("--stage", "vae", "--prior", "x")
    assert "--vae_widths" in train("--vae_widths", "12", "8")
    said = train("--prior", trained / "out", "--text_width", "32")
    assert "--text_width 32: " in said and "was trained with 16" in said and "another --prior" in said
    assert "--condition_scale" in train("--condition_scale", "3")
    assert "leave one of them out" in train("--prior", "x", "--pretrained_model_name_or_path", "y")
    assert "--stage vae" in refused(capsys, "ablate", *TINY, "-o", tmp_path / "o", "--stage", "vae")
    said = refused(capsys, "sample", "-i", tmp_path, "-o", tmp_path / "o", "--checkpoint", trained / "out", "--device",
                   "cpu", "--negative_prompt", "older", "--true_cfg_scale", "1")
    assert "--negative_prompt: only read with" in said
    assert "did you mean --lora_steps" in refused(capsys, "train", "--lora_step", "3")
    assert "--rows" in refused(capsys, "ablate", "-o", tmp_path, "--rows", "nonsense")
    pairs = lambda *flags: refused(capsys, "pairs", "-o", tmp_path / "p", "--device", "cpu", *flags)
    assert "needs --pretrained" in pairs("--editor", "sd3")
    assert "needs --llm" in pairs("--verbaliser", "llm", "--checkpoint", trained / "out", "--image_size", "32")
    assert "multiple of 8" in pairs("--checkpoint", trained / "out", "--image_size", "36")
    assert "--edits 0" in pairs("--checkpoint", trained / "out", "--edits", "0")
    (tmp_path / "damaged").mkdir()
    (tmp_path / "damaged" / "made_with.json").write_text("{")
    said = refused(capsys, "pairs", "-o", tmp_path / "damaged", "--checkpoint", trained / "out", "--device", "cpu")
    assert "made_with.json: damaged" in said
    assert "no pair was accepted" in pairs("--checkpoint", trained / "out", *SHORT, "--count", "1", "--min_identity", "2")
    assert "loaded as SD3" in pairs("--editor", "sd3", "--pretrained_model_name_or_path", trained / "faces", *SHORT)


def test_the_page_names_functions_and_flags_that_exist():
    page = (ROOT / "docs" / "a2bfr.md").read_text()
    names = re.findall(r"\[`(\w+)`\]\(\.\./a2bfr\.py#L\d+\)", page)
    assert len(names) >= 12 and all(hasattr(ab, name) for name in names)
    commands = [line.split("   #")[0] for line in page.splitlines() if line.startswith("python a2bfr.py")]
    for command in commands:
        seen, verb = [], shlex.split(command)[2]
        common.command_line("x", {verb: (*ab.VERBS[verb][:2], seen.append)}, shlex.split(command)[2:])
        assert len(seen) == 1
    assert len(commands) >= 8
    flags = {f.name for cls in (ab.Train, ab.Sample, ab.Pairs, ab.Ablate) for f in dataclasses.fields(cls)}
    assert set(re.findall(r"`--(?:no-)?(\w+)", page)) <= flags


# ---------------------------------------------------------------- ablation

def test_ablation_rows_are_kept_and_share_their_prior(tmp_path, capsys):
    flags = ["ablate", *TINY, "-o", tmp_path, "--lora_steps", "1", "--rows", "no AAL, no SDT", "full"]
    call(*flags)
    said = capsys.readouterr().out
    assert "AA .8536" in said and "restored, then edited" in said and len(list(tmp_path.glob("prior_*"))) == 1
    before = (tmp_path / "rows.json").read_text()
    entry = json.loads(before)["full, seed 0"]
    assert {"attribute_accuracy_toy", "leakage_toy", "source_psnr_gain", "template_attr_toy"} <= entry["scores"].keys()
    baseline = json.loads(before)["no AAL, no SDT, seed 0"]["config"]
    assert baseline["dual_training"] is False and baseline["batch_size"] == 2 * ab.Ablate.batch_size
    call(*flags)
    assert capsys.readouterr().out.count("finished before") == 2 and (tmp_path / "rows.json").read_text() == before
