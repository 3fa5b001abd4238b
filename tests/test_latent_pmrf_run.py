"""latent_pmrf.py as a program: stages, resume, released weights, strange files, wrong flags. Tiny, no download."""
import dataclasses
import json
import os
import pickle
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import safetensors.torch
import torch
from PIL import Image

import common
import latent_pmrf as lp
from program import ROOT, caller, kill_in_stage, same, toy_pictures, train_once_more, weights

TINY = ["--vae_widths", "8", "8", "--latent_channels", "4", "--mmse_dim", "8", "--mmse_depths", "2",
        "--mmse_heads", "2", "--mmse_features", "8", "--mmse_unshuffle", "2", "--flow_widths", "16", "16",
        "--flow_depths", "1", "1", "--head_dim", "8", "--mapping_width", "16", "--neighborhood", "5",
        "--image_size", "32", "--vae_crop", "32", "--batch_size", "4", "--vae_steps", "4", "--mmse_steps", "4",
        "--flow_steps", "4", "--log_steps", "2",
        "--validation_faces", "8", "--num_inference_steps", "2", "--device", "cpu", "--perceptual", "none"]
call, refused = caller(lp)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """One tiny run of all stages, and a folder of toy pictures."""
    folder = tmp_path_factory.mktemp("run")
    call("train", *TINY, "-o", folder / "out")
    toy_pictures(folder / "faces", 12)
    return folder


def test_training_leaves_weights_numbers_and_pictures(trained):
    out = trained / "out"
    wanted = {"model.safetensors", "config.json", "metrics.json", "samples.png", "curves.png", "log.jsonl"}
    assert wanted <= {p.name for p in out.iterdir()}
    numbers = json.loads((out / "metrics.json").read_text())
    assert numbers["faces"] == 8
    assert set(numbers["rows"]) == {"lq", "posterior_mean", "restored_faces", "reconstruction"}
    assert all(name.endswith("_toy") or name in ("psnr", "ssim") for row in numbers["rows"].values() for name in row)
    assert {name.split(".")[0] for name in weights(out)} == {"vae", "mmse", "flow"}
    first = json.loads((out / "log.jsonl").read_text().splitlines()[0])
    assert first["config"]["seed"] == 0 and first["torch"] == torch.__version__


def test_stage_by_stage_equals_all_at_once(trained, tmp_path):
    for stage in ("vae", "mmse", "flow"):
        call("train", *TINY, "-o", tmp_path, "--stage", stage)
    assert same(weights(trained / "out"), weights(tmp_path))


def test_a_killed_run_goes_on_to_the_same_weights(trained, tmp_path):
    """SIGKILL amid the flow stage, then --resume_from_checkpoint latest: bit by bit the uninterrupted run."""
    arguments = kill_in_stage("latent_pmrf.py", tmp_path, "flow", *TINY)
    call(*arguments, "--resume_from_checkpoint", "latest")
    assert same(weights(trained / "out"), weights(tmp_path))


def test_a_stage_trained_once_more_can_be_stopped_and_resumed(trained, tmp_path, capsys, monkeypatch):
    flags = (*TINY, "--stage", "flow", "--learning_rate", "1e-3")
    assert same(*train_once_more(call, refused, capsys, monkeypatch, trained / "out", tmp_path, *flags))


@pytest.mark.parametrize("number, workers", [(signal.SIGINT, 0), (signal.SIGTERM, 2)])
def test_a_signal_saves_and_says_how_to_go_on(number, workers, tmp_path):
    """Ctrl-C, or the end of a cluster's job: both reach the loader's processes too, which must not die first."""
    command = [sys.executable, "latent_pmrf.py", "train", *TINY, "-o", str(tmp_path),
               "--vae_steps", "100000", "--log_steps", "1", "--num_workers", str(workers)]
    process = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
                               start_new_session=True)
    for _ in range(1200):
        log = tmp_path / "log.jsonl"
        if log.exists() and log.read_text().count("\n") > 3:
            break
        time.sleep(0.05)
    os.killpg(process.pid, number)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 2 and "--resume_from_checkpoint latest" in err and "Traceback" not in err
    assert torch.load(tmp_path / "state.pt", weights_only=True)["step"] > 0


@pytest.mark.skipif(not Path("/proc").exists(), reason="finds the loader's process in /proc")
def test_a_loader_that_is_killed_is_named(tmp_path):
    command = [sys.executable, "latent_pmrf.py", "train", *TINY, "-o", str(tmp_path), "--vae_steps", "100000",
               "--num_workers", "1", "--log_steps", "1"]
    process = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    log, children = tmp_path / "log.jsonl", Path(f"/proc/{process.pid}/task/{process.pid}/children")
    for _ in range(1200):
        if log.exists() and log.read_text().count("\n") > 3:
            break
        time.sleep(0.05)
    os.kill(int(children.read_text().split()[-1]), signal.SIGKILL)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 2 and "one of --num_workers was killed" in err and "Traceback" not in err, err


def test_an_earlier_run_is_refused_not_overwritten(tmp_path, capsys):
    out = tmp_path / "out"
    out.mkdir()
    (out / "model.safetensors").write_bytes(b"precious")
    assert "--overwrite" in refused(capsys, "train", *TINY, "-o", out)
    for flags in (["--data", "/nope"], ["--vae", "/nope"], ["--readers", "/nope"]):       # a mistake deletes nothing
        refused(capsys, "train", *TINY, "-o", out, "--overwrite", *flags)
    assert (out / "model.safetensors").read_bytes() == b"precious"
    call("train", *TINY, "-o", out, "--overwrite")
    assert {name.split(".")[0] for name in weights(out)} == {"vae", "mmse", "flow"}


def test_the_vae_is_clipped_and_the_flow_is_adam_without_decay(tmp_path, monkeypatch):
    """--max_grad_norm 0, as PMRF trains, leaves the VAE clipped at 1; Adam (0.9, 0.95) of section 6.1."""
    norms, flow, clip, make = [], [], torch.nn.utils.clip_grad_norm_, common.make_optimizer
    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", lambda p, norm: norms.append(norm) or clip(p, norm))
    monkeypatch.setattr(lp, "make_optimizer", lambda *a, **k: flow.append(make(*a, **k)) or flow[-1])
    call("train", *TINY, "-o", tmp_path, "--max_grad_norm", "0", "--optimizer", "adamw")
    assert norms == [1.0] * 4 + [float("inf")] * 8
    group = flow[-1].param_groups[0]
    assert isinstance(flow[-1], torch.optim.AdamW) and (group["betas"], group["weight_decay"]) == ((0.9, 0.95), 0)


def test_training_on_a_folder_of_pictures(trained, tmp_path):
    call("train", *TINY, "-o", tmp_path, "--data", trained / "faces")
    numbers = json.loads((tmp_path / "metrics.json").read_text())
    assert numbers["faces"] == 1                                            # a tenth of twelve is held out


def test_pmrf_and_option_1_train_and_sample(trained, tmp_path, capsys):
    for flags in (["--space", "pixel"], ["--source", "latent_mean"]):
        out = tmp_path / flags[1]
        call("train", *TINY, "-o", out, *flags)
        call("sample", "-i", trained / "faces", "-o", out / "r", "--checkpoint", out, "--device", "cpu",
             "--num_inference_steps", "2")
        assert len(list((out / "r" / "restored_faces").iterdir())) == 12
    pixels = ["sample", "-i", trained / "faces", "-o", tmp_path / "s", "--checkpoint", tmp_path / "pixel"]
    for flags in (["--vae", tmp_path], ["--vae_memory_gb", "1"]):
        assert "no autoencoder" in refused(capsys, *pixels, "--device", "cpu", *flags)


def test_sampling_depends_on_the_seed_and_on_nothing_else(trained, tmp_path):
    """Batch size and neighbours in the folder do not matter; the seed does."""
    run = lambda name, *flags: call("sample", "-i", trained / "faces", "-o", tmp_path / name, "--device", "cpu",
                                    "--checkpoint", trained / "out", "--num_inference_steps", "2", *flags)
    run("a"), run("b", "--batch_size", "5"), run("c", "--seed", "1")
    image = lambda name: common.read_image(tmp_path / name / "restored_faces" / "07.png")
    assert (image("a") - image("b")).abs().max() <= 2 / 127.5 + 1e-6 and not torch.equal(image("a"), image("c"))
    assert (tmp_path / "a" / "posterior_mean" / "07.png").exists() and (tmp_path / "a" / "cmp" / "07.png").exists()


def test_tiled_decoding_is_exact():
    torch.manual_seed(0)
    vae = lp.SimVAE(4, (8, 8, 8), layers=1, mid_layers=1).eval()
    z = torch.randn(1, 4, 40, 24)
    gigabytes = 5 * 8 * 4 * (4 * (2 * 12 + 8)) ** 2 / 2 ** 30     # tiles of 8 latents with 12 around them
    assert vae.reach() < 12
    with torch.no_grad():
        whole, tiled = vae.decode(z), vae.decode_tiled(z, gigabytes)
    assert whole.shape == tiled.shape and torch.allclose(whole, tiled, atol=1e-5)
    with pytest.raises(common.UserError, match="--vae_memory_gb"):
        vae.decode_tiled(z, 1e-6)


# ---------------------------------------------------------------- released formats

def test_sim_vae_folder_loads_as_diffusers_saves_it(tmp_path):
    vae = lp.SimVAE(4, (8, 16), mid_layers=3)
    safetensors.torch.save_file(vae.state_dict(), tmp_path / "diffusion_pytorch_model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps({"_class_name": "AutoencoderKLSim", "decay": 0.9999}))
    loaded = lp.load_sim_vae(str(tmp_path))
    x = torch.randn(1, 3, 16, 16)
    assert torch.equal(loaded.encode(x)[0], vae.encode(x)[0]) and loaded.widths == (8, 16)


def test_train_with_a_given_vae_and_swinir(trained, tmp_path, capsys):
    """--vae and --mmse take released files; only the flow is trained and the given weights end up in the checkpoint."""
    parts = common.load_model(str(trained / "out"), "latent_pmrf")[1]
    (tmp_path / "vae").mkdir()
    safetensors.torch.save_file(parts["vae"], tmp_path / "vae" / "diffusion_pytorch_model.safetensors")
    torch.save({"params_ema": {f"module.{n}": t for n, t in parts["mmse"].items()}}, tmp_path / "swinir.pth")
    call("train", *TINY, "-o", tmp_path / "out", "--vae", tmp_path / "vae", "--mmse", tmp_path / "swinir.pth")
    a, b = weights(trained / "out"), weights(tmp_path / "out")
    assert all(torch.equal(a[n], b[n]) for n in a)
    run = trained / "out"                                          # a folder of ours serves as well
    call("train", *TINY, "-o", tmp_path / "again", "--vae", run, "--mmse", run)
    assert same(a, weights(tmp_path / "again"))
    said = refused(capsys, "train", *TINY, "-o", tmp_path / "o", "--mmse", run, "--no-mmse_residual")
    assert "was trained with True" in said and "another --mmse" in said
    assert "nothing to train" in refused(capsys, "train", *TINY, "-o", tmp_path / "o", "--vae", run, "--stage", "vae")
    said = refused(capsys, "train", *TINY, "-o", tmp_path / "o", "--vae", tmp_path / "vae", "--vae_widths", "8", "16")
    assert "set --latent_channels 4 --vae_widths 8 8" in said
    assert "--vae" in refused(capsys, "train", *TINY, "-o", tmp_path / "o", "--vae", tmp_path / "nope")
    assert "no autoencoder" in refused(capsys, "train", *TINY, "-o", tmp_path / "o", "--vae", "x", "--space", "pixel")


def test_the_recipe_trains_the_vae_on_one_folder_and_the_flow_on_another(trained, tmp_path):
    call("train", *TINY, "-o", tmp_path, "--stage", "vae", "--data", trained / "faces")
    vae = weights(tmp_path)
    call("train", *TINY, "-o", tmp_path, "--stage", "flow", "--mmse", trained / "out")
    assert {name.split(".")[0] for name in weights(tmp_path)} == {"vae", "mmse", "flow"}
    assert all(torch.equal(weights(tmp_path)[name], tensor) for name, tensor in vae.items())


def test_a_stage_trained_anew_drops_what_stood_on_it(trained, tmp_path, capsys):
    shutil.copytree(trained / "out", tmp_path / "out")
    call("train", *TINY, "-o", tmp_path / "out", "--stage", "vae", "--seed", "5")
    assert "stage flow was trained on the former vae" in capsys.readouterr().out
    assert set(json.loads((tmp_path / "out" / "config.json").read_text())["finished"]) == {"vae", "mmse"}
    assert {name.split(".")[0] for name in weights(tmp_path / "out")} == {"vae", "mmse"}   # which never saw the vae
    call("train", *TINY, "-o", tmp_path / "alone", "--stage", "mmse")                      # nor waits for one
    assert {name.split(".")[0] for name in weights(tmp_path / "alone")} == {"mmse"}


def test_switches_that_change_no_shape_cannot_change_under_finished_networks(capsys, trained, tmp_path):
    shutil.copytree(trained / "out", tmp_path / "out")
    go = lambda *flags: refused(capsys, "train", *TINY, "-o", tmp_path / "out", "--stage", "flow", *flags)
    assert "--vae_norm group" in go("--vae_norm", "group") and "--neighborhood 3" in go("--neighborhood", "3")
    assert "--mmse_residual False" in go("--no-mmse_residual")
    assert same(weights(trained / "out"), weights(tmp_path / "out"))


def test_a_released_swinir_of_another_size_and_prefix_loads(tmp_path):
    sizes = dict(mmse_dim=8, mmse_depths=(2,), mmse_heads=2, mmse_features=8, mmse_unshuffle=2, mmse_residual=False)
    theirs = lp.build(lp.Train(image_size=32, **sizes), "mmse")
    torch.save({"state_dict": {f"model.{n}": t for n, t in theirs.state_dict().items()}}, tmp_path / "swinir.pth")
    ours = lp.load_part(lp.Train(image_size=64, **sizes), "mmse", str(tmp_path / "swinir.pth"))
    x = torch.rand(1, 3, 48, 64)
    with torch.no_grad():
        torch.testing.assert_close(ours.eval()(x), theirs.eval()(x))


def test_swinir_masks_a_grid_that_only_counts_as_many_windows():
    small = dict(dim=8, depths=(2,), heads=2, features=8, unshuffle=1)
    square, other = lp.SwinIR(tokens=16, **small).eval(), lp.SwinIR(tokens=24, **small).eval()   # 4 windows, 9
    other.load_state_dict({n: t for n, t in square.state_dict().items() if "attn_mask" not in n}, strict=False)
    x = torch.rand(1, 3, 8, 32)
    with torch.no_grad():
        torch.testing.assert_close(square(x), other(x))


def test_a_look_in_inference_mode_does_not_spoil_training():
    q = torch.randn(1, 1, 81, 8)
    with torch.inference_mode():
        lp.neighborhood_attention(q, q, q, 9, 9, 3)
    q.requires_grad_(True)
    lp.neighborhood_attention(q, q, q, 9, 9, 3).sum().backward()
    assert q.grad.isfinite().all()


def test_group_norm_never_has_one_channel_a_group():
    """SD-VAE's 32 groups hold 4 to 16 channels; one each would be an instance norm."""
    for channels in (8, 16, 32, 64, 128, 512):
        norm = lp.vae_norm("group", channels)
        assert channels // norm.num_groups >= 4 and norm.num_groups == min(32, channels // 4)
    assert lp.vae_norm("group", 34)(torch.zeros(1, 34, 2, 2)).shape == (1, 34, 2, 2)
    vae = lp.SimVAE(4, (8, 8), norm="group")
    with pytest.raises(common.UserError, match="GroupNorm"):
        vae.decode_tiled(torch.zeros(1, 4, 8, 8), 1.0)


def test_pmrf_release_loads_by_prefix(tmp_path, monkeypatch):
    """`model.*` and `mmse_model.*`, with metric sub-modules beside them, in one file: sizes shrunk for the test."""
    small = dict(lp.HDIT_PMRF, widths=(16, 16), depths=(1, 1), head_dim=8, mapping_width=16)
    monkeypatch.setattr(lp, "HDIT_PMRF", small)
    swinir = lp.SwinIR
    monkeypatch.setattr(lp, "SwinIR", lambda: swinir(dim=8, depths=(2,), heads=2, features=8))
    flow, mmse = lp.HDiT(**small), lp.SwinIR()
    state = {f"model.{n}": t for n, t in flow.state_dict().items()}
    state |= {f"mmse_model.{n}": t for n, t in mmse.state_dict().items()}
    safetensors.torch.save_file(state | {"fid.mean": torch.zeros(3)}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps({"degradation": "difface"}))
    nets, config = lp.load_networks(lp.Sample(input="x", checkpoint=str(tmp_path)))
    assert torch.equal(nets["flow"].patch_in.proj.weight, flow.patch_in.proj.weight)
    assert config.space == "pixel" and config.image_size == 512
    # The averages are a list in the order in which k-diffusion registers its parameters.
    names = [n for n, _ in flow.named_parameters() if n.startswith("mapping.")]
    block = [f"mapping.blocks.{i}.{n}" for i in (0, 1) for n in ("norm.scale", "up_proj.weight", "down_proj.weight")]
    assert names == ["mapping.in_norm.scale", *block, "mapping.out_norm.scale"]
    shadows = [torch.full_like(p, i) for i, p in enumerate(flow.parameters())]
    torch.save({"state_dict": state, "ema": {"shadow_params": shadows, "decay": 0.9999}}, tmp_path / "last.ckpt")
    averaged = lp.load_pmrf(tmp_path / "last.ckpt")["flow"]
    assert all((p == i).all() for i, p in enumerate(averaged.parameters()))
    assert torch.equal(averaged.time_emb.weight, flow.time_emb.weight)
    torch.save({"state_dict": state, "ema": shadows[:-1]}, tmp_path / "short.ckpt")
    with pytest.raises(common.UserError, match="not those of this flow"):
        lp.load_pmrf(tmp_path / "short.ckpt")


# ---------------------------------------------------------------- bad input

def test_bad_folders(capsys, trained, tmp_path):
    (tmp_path / "empty").mkdir()
    assert "--data" in refused(capsys, "train", *TINY, "-o", tmp_path / "o", "--data", trained / "faces" / "00.png")
    absent = tmp_path / "absent"
    assert "no such file or folder" in refused(capsys, "train", *TINY, "-o", tmp_path / "o", "--data", absent)
    assert "no pictures" in refused(capsys, "train", *TINY, "-o", tmp_path / "o", "--data", tmp_path / "empty")
    assert "no such file or folder" in refused(capsys, "sample", "-i", absent, "--checkpoint", trained / "out",
                                               "-o", tmp_path / "o")


def test_bad_checkpoints(capsys, trained, tmp_path):
    sample = lambda where: refused(capsys, "sample", "-i", trained / "faces", "-o", tmp_path / "o",
                                   "--checkpoint", where)
    assert "no such file or folder" in sample(tmp_path / "absent")
    copy = tmp_path / "copy"
    copy.mkdir()
    config = json.loads((trained / "out" / "config.json").read_text())
    data = (trained / "out" / "model.safetensors").read_bytes()
    (copy / "model.safetensors").write_bytes(data)
    (copy / "config.json").write_text(json.dumps(dict(config, method="honestface")))
    assert "belongs to honestface" in sample(copy)
    (copy / "config.json").write_text(json.dumps(dict(config, train=dict(config["train"], flow_widths=[32, 32]))))
    assert "does not fit HDiT" in sample(copy)
    (copy / "config.json").write_text(json.dumps(config))
    (copy / "model.safetensors").write_bytes(data[:1000])
    assert "damaged" in sample(copy)
    (copy / "config.json").write_text("{\"method\"")
    assert "damaged" in sample(copy)
    (tmp_path / "evil").mkdir()
    (tmp_path / "evil" / "model.ckpt").write_bytes(pickle.dumps({"state_dict": dataclasses.dataclass}))
    assert "damaged" in (said := sample(tmp_path / "evil")) or "refused" in said


def test_bad_flags(capsys, tmp_path, monkeypatch):
    assert "--batch_size 0" in refused(capsys, "train", "--batch_size", "0")
    assert "did you mean --flow_steps" in refused(capsys, "train", "--flow_step", "3")
    assert "--image_size 50" in refused(capsys, "train", *TINY, "-o", tmp_path, "--image_size", "50")
    assert "--neighborhood" in refused(capsys, "train", *TINY, "-o", tmp_path, "--neighborhood", "99")
    assert "--stage vae" in refused(capsys, "train", *TINY, "-o", tmp_path, "--space", "pixel", "--stage", "vae")
    assert "needs vae" in refused(capsys, "train", *TINY, "-o", tmp_path, "--stage", "flow")
    assert "--device" in refused(capsys, "train", *TINY, "-o", tmp_path, "--device", "toaster")
    for flag, value in (("--mmse_unshuffle", "3"), ("--mapping_width", "15"), ("--head_dim", "0"), ("--vae_crop", "31")):
        assert f"{flag} {value}" in refused(capsys, "train", *TINY, "-o", tmp_path, flag, value)
    assert "--vgg: only read with --perceptual vgg19" in refused(capsys, "train", *TINY, "-o", tmp_path, "--vgg", "x")
    assert "--rows" in refused(capsys, "ablate", "-o", tmp_path, "--rows", "nonsense")
    assert "ablate trains what its rows need" in refused(capsys, "ablate", *TINY, "-o", tmp_path, "--stage", "flow")
    for flags in (["--space", "pixel"], ["--source", "latent_mean"]):
        assert f"{flags[0]} {flags[1]}: the rows set it" in refused(capsys, "ablate", "-o", tmp_path, *flags)
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert "ablate runs in one process" in refused(capsys, "ablate", *TINY, "-o", tmp_path, "--rows", "Latent-PMRF")
    monkeypatch.delenv("WORLD_SIZE")
    assert "--source" in refused(capsys, "train", *TINY, "-o", tmp_path, "--space", "pixel", "--source", "latent_mean")
    assert "--vae_norm" in refused(capsys, "train", *TINY, "-o", tmp_path, "--vae", tmp_path, "--vae_norm", "group")
    (tmp_path / "bare").mkdir()
    safetensors.torch.save_file({"vae.x": torch.zeros(1)}, tmp_path / "bare" / "model.safetensors")
    (tmp_path / "bare" / "config.json").write_text('{"method": "latent_pmrf"}')
    assert "lacks what" in refused(capsys, "sample", "-i", tmp_path, "-o", tmp_path / "o", "--checkpoint",
                                   tmp_path / "bare")


def test_resume_from_a_run_with_other_sizes(capsys, tmp_path):
    call("train", *TINY, "-o", tmp_path, "--stage", "vae", "--checkpointing_steps", "2")
    error = refused(capsys, "train", *TINY, "-o", tmp_path / "new", "--stage", "vae", "--vae_widths", "8", "16",
                    "--resume_from_checkpoint", tmp_path / "state.pt")
    assert "other sizes" in error and "state.pt" in error


def test_an_output_folder_that_cannot_be_made(capsys, tmp_path):
    (tmp_path / "file").write_text("")
    assert "error:" in refused(capsys, "train", *TINY, "-o", tmp_path / "file" / "out")


def test_strange_pictures_are_restored(trained, tmp_path, capsys):
    source = tmp_path / "in"
    source.mkdir()
    for mode in ("L", "RGBA", "P", "1", "LA"):
        Image.new("RGB", (50, 30), "orange").convert(mode).save(source / f"{mode}.png")
    Image.new("CMYK", (33, 33)).save(source / "cmyk.tiff")
    Image.new("I;16", (33, 33), 40000).save(source / "deep.png")
    Image.new("RGB", (1, 1)).save(source / "dot.webp")
    Image.new("RGB", (8000, 40), "blue").save(source / "wide.jpg")
    (source / "notes.png").write_text("not a picture")
    call("sample", "-i", source, "-o", tmp_path / "out", "--checkpoint", trained / "out", "--device", "cpu",
         "--num_inference_steps", "1")
    said = capsys.readouterr().out
    assert len(list((tmp_path / "out" / "restored_faces").iterdir())) == 9
    assert "notes.png" in said and "8000x40 resized" in said


# ---------------------------------------------------------------- ablation

def test_ablation_rows_are_kept_and_shared(tmp_path, capsys):
    flags = [*TINY, "-o", tmp_path, "--table", "space"]
    call("ablate", *flags)
    said = capsys.readouterr().out
    rows = json.loads((tmp_path / "rows.json").read_text())
    assert {r["row"] for r in rows.values()} == {"Latent-PMRF", "PMRF*"} and "speed-up" in said
    before = (tmp_path / "rows.json").read_text()
    call("ablate", *flags)
    assert capsys.readouterr().out.count("finished before") == 2 and (tmp_path / "rows.json").read_text() == before
    call("ablate", *flags, "--flow_steps", "5")                    # a repeated row has its whole curve again
    rows = json.loads((tmp_path / "rows.json").read_text())
    assert [len(rows[f"{row}, seed 0"]["curve"]) > 1 for row in ("Latent-PMRF", "PMRF*")] == [True, True]
    assert rows["Latent-PMRF, seed 0"]["steps"] == rows["PMRF*, seed 0"]["steps"] == 5      # [Figure 6]
    scores = rows["Latent-PMRF, seed 0"]["scores"]
    assert {"lpips_toy", "reconstruction_psnr", "reconstruction_lpips_toy", "latent_peak"} <= set(scores)
