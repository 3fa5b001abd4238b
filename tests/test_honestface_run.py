"""honestface.py as a program: stages, resume, references, released formats, wrong flags. Tiny, no download."""
import dataclasses
import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import safetensors.torch
import torch
import torchvision
from diffusers import AutoencoderKL, UNet2DConditionModel

import common
import honestface as hf
import metrics
from program import caller, kill_in_stage, same, train_once_more, weights

SMALL = ["--vre_width", "8", "--vre_multiples", "1", "2", "--vre_dim", "8", "--vre_codes", "96", "--eye_crop", "8",
         "--image_size", "32", "--batch_size", "2", "--vre_steps", "2", "--onestep_steps", "3", "--log_steps", "1",
         "--validation_faces", "4", "--max_references", "2", "--device", "cpu", "--mixed_precision", "no"]
TINY = [*SMALL, "--prompt_dim", "32", "--vae_widths", "8", "16", "--latent_channels", "4", "--unet_widths", "32", "32",
        "--vae_steps", "2", "--prior_steps", "2"]
call, refused = caller(hf)


def tiny_config(**changes):
    sizes = dict(vre_width=8, vre_multiples=(1, 2), vre_dim=8, vre_codes=96, eye_crop=8, image_size=32, batch_size=2,
                 max_references=2, prompt_dim=32, vae_widths=(8, 16), latent_channels=4, unet_widths=(32, 32))
    return dataclasses.replace(hf.Train(), mixed_precision="no", **(sizes | changes))


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A tiny run of all stages, three degraded faces `lq/`, and an album per person `people/00` ..."""
    folder = tmp_path_factory.mktemp("run")
    call("train", *TINY, "-o", folder / "out")
    for person in range(3):
        faces = common.toy_faces([person] * 4, torch.arange(4), size=40)
        lq = common.degrade(faces.image[:1], common.DEGRADATIONS["codeformer"], [person])
        common.write_image(folder / "lq" / f"{person:02d}.png", lq[0])
        for i in range(1, 4):
            common.write_image(folder / "people" / f"{person:02d}" / f"{i}.png", faces.image[i])
    return folder


def pictures(folder):
    return {p.name: common.read_image(p) for p in sorted((Path(folder) / "restored_faces").glob("*.png"))}


def test_training_leaves_weights_numbers_and_pictures(trained):
    out = trained / "out"
    wanted = {"model.safetensors", "config.json", "metrics.json", "samples.png", "curves.png", "log.jsonl"}
    assert wanted <= {p.name for p in out.iterdir()}
    rows = json.loads((out / "metrics.json").read_text())["rows"]
    assert set(rows) == {"lq", "restored_faces", "one reference", "no reference", "wrong person", "autoencoder"}
    assert rows["lq"]["psnr_gain"] == 0
    assert {name.split(".")[0] for name in weights(out)} == {"vae", "unet", "words", "vre", "lora", "prompt"}


def test_stage_by_stage_equals_all_at_once(trained, tmp_path):
    for stage in hf.STAGES:
        call("train", *TINY, "-o", tmp_path, "--stage", stage)
    assert same(weights(trained / "out"), weights(tmp_path))


def test_a_killed_run_goes_on_to_the_same_weights(trained, tmp_path):
    """SIGKILL amid the one-step stage, with its two optimisers: bit by bit the uninterrupted run."""
    arguments = kill_in_stage("honestface.py", tmp_path, "onestep", *TINY)
    call(*arguments, "--resume_from_checkpoint", "latest")
    assert same(weights(trained / "out"), weights(tmp_path))


def test_a_stage_trained_once_more_can_be_stopped_and_resumed(trained, tmp_path, capsys, monkeypatch):
    flags = (*TINY, "--stage", "onestep", "--learning_rate", "1e-3")
    assert same(*train_once_more(call, refused, capsys, monkeypatch, trained / "out", tmp_path, *flags))


def test_sample_with_an_album_per_face(trained, tmp_path, capsys):
    """References change the result; each input finds its own sub-folder; no reference at all works too."""
    arguments = ["sample", "-i", trained / "lq", "--checkpoint", trained / "out", "--device", "cpu"]
    call(*arguments, "-o", tmp_path / "with", "--reference", trained / "people")
    said = capsys.readouterr().out
    call(*arguments, "-o", tmp_path / "without")
    a, b = pictures(tmp_path / "with"), pictures(tmp_path / "without")
    assert len(a) == len(b) == 3 and said.count("3 references") == 3 and a["00.png"].shape == (3, 32, 32)
    shown = common.read_image(tmp_path / "with" / "cmp" / "00.png")                # degraded | restored | reference
    photo = common.read_image(trained / "people" / "00" / "1.png", 32)
    assert shown.shape == (3, 32, 96) and (shown[..., 64:] - photo).abs().max() < 0.02
    args = json.loads((tmp_path / "with" / "args.json").read_text())
    assert args["config"]["reference"] == str(trained / "people")


def test_merged_lora_restores_as_the_unmerged_one(trained):
    nets, cfg, face_nets = hf.load_networks(hf.Sample(input="", checkpoint=str(trained / "out")), "cpu")
    apart = hf.prepare(cfg, face_nets, "cpu")
    _, parts = common.load_model(str(trained / "out"), "honestface")
    for part in ("vae", "unet", "vre", "lora", "prompt"):
        hf.put(apart, part, parts[part], cfg, "test")
    faces = common.toy_faces([5, 6], [0, 0], size=32)
    references, present = faces.image[:, None], torch.ones(2, 1, dtype=torch.bool)
    a, b = (hf.restore(n, cfg, face_nets, faces.image, references, present, torch.zeros_like) for n in (nets, apart))
    assert common.lora_layers(apart["unet"]) and not common.lora_layers(nets["unet"])
    assert torch.allclose(a, b, atol=1e-4)


def perturbed(cfg, face_nets):
    """Networks whose every path matters: nothing is at its zero start."""
    nets = hf.prepare(cfg, face_nets, "cpu")
    with torch.no_grad():
        for p in nets["prompt"].parameters():
            p.add_(0.3 * torch.randn_like(p)) if p.requires_grad else None
    return nets


def test_null_references_reproduce_the_model_without_references():
    """What stands in an absent slot never matters, and an empty album gives the same face as none."""
    torch.manual_seed(0)
    cfg = tiny_config()
    face_nets = hf.face_networks(cfg, "cpu")
    nets = perturbed(cfg, face_nets)
    faces = common.toy_faces([1, 2, 3, 4], [0, 0, 0, 0], size=32)
    lq, references = faces.image[:2], faces.image[2:][:, None].expand(-1, 3, -1, -1, -1)
    run = lambda r, m: hf.restore(nets, cfg, face_nets, lq, r, m, torch.zeros_like)
    none = run(references, torch.zeros(2, 3, dtype=torch.bool))
    assert torch.equal(none, run(torch.zeros_like(references[:, :1]), torch.zeros(2, 1, dtype=torch.bool)))
    first = torch.tensor([[True, False, False]] * 2)
    other = torch.cat([references[:, :1], torch.rand_like(references[:, 1:])], 1)
    assert torch.allclose(run(references, first), run(other, first), atol=1e-6)
    assert (run(references, first) - none).abs().max() > 1e-4     # and a reference does something


def test_the_reference_used_for_the_eyes_is_the_one_that_fits():
    """Eq. 6 inside a batch: each face picks among its present references, by geometry of eyes and brows."""
    lq = torch.rand(2, 98, 2) * 64
    landmarks = torch.rand(2, 3, 98, 2) * 64
    landmarks[0, 2] = lq[0] @ torch.tensor([[0.8, 0.1], [-0.2, 1.1]]) + 3
    landmarks[1, 0] = lq[1] * 0.5                                 # fits best, but is absent
    landmarks[1, 1] = lq[1] + 0.5 * torch.randn(98, 2)
    looked = SimpleNamespace(recogniser=lambda x: torch.zeros(len(x), 4),
                             detector=SimpleNamespace(landmarks=lambda x: landmarks.flatten(0, 1)))
    images = torch.arange(6.0).view(2, 3, 1, 1, 1).expand(-1, -1, 3, 8, 8)
    present = torch.tensor([[True, True, True], [False, True, True]])
    found = hf.read_references(looked, lq, images, present)
    assert found.chosen[:, 0, 0, 0].tolist() == [2.0, 4.0]
    assert torch.equal(found.landmarks, torch.stack([landmarks[0, 2], landmarks[1, 1]]))


def test_references_are_the_person_and_never_the_face_itself(tmp_path):
    for person in "ab":
        for i in range(3):
            common.write_image(tmp_path / person / f"{i}.png", torch.full((3, 16, 16), i / 4 + (person == "b") * -1.0))
    common.write_image(tmp_path / "alone" / "0.png", torch.ones(3, 16, 16))
    (tmp_path / "a" / "broken.png").write_text("no picture")
    faces = common.Faces(str(tmp_path), 16)
    faces.held_out_files = [*faces.files, *faces.held_out_files]
    people = hf.album(faces)
    batch = faces.held_out(20)
    images, present = hf.draw_references(faces, {k: sorted(set(v)) for k, v in people.items()}, batch, 4)
    assert sorted(present.sum(1).tolist()) == [0, 2, 2, 2, 2, 2, 2]
    for i, path in enumerate(batch["paths"]):
        for j in range(4):
            if present[i, j]:
                assert not torch.equal(images[i, j], batch["hq"][i])
                assert (images[i, j].mean() < 0) == (path.parent.name == "b")
    toy = common.Faces("", 16)
    batch = toy.training(3, 0, 0)
    images, present = hf.draw_references(toy, {}, batch, 2)
    again = common.toy_faces(batch["identity"], batch["seeds"] + 2, size=16).image
    assert present.all() and torch.equal(images[:, 1], again)


def test_held_out_people_lend_no_picture_to_training(tmp_path):
    """With --data alone whole people are held out: neither their faces nor their photographs are trained on."""
    for person in range(4):
        for i in range(3):
            common.write_image(tmp_path / f"{person}" / f"{i}.png", torch.full((3, 16, 16), person / 2 - 0.75))
    faces = common.Faces(str(tmp_path), 16)
    hf.check_people(tiny_config(data=str(tmp_path)), faces)
    for batch in [faces.training(4, 0, k) for k in range(5)] + [faces.held_out(9)]:
        references, present = hf.draw_references(faces, hf.album(faces), batch, 2)
        held_out = [bool((images > 0.5).all()) for images in (batch["hq"], references)]
        assert present.all() and held_out == [len(batch["hq"]) == 3] * 2 and (batch["hq"].max() < 0.5) != held_out[0]


def test_two_people_are_enough_and_one_is_not(tmp_path):
    """One of two is held out: the other is still trained with references. One folder of one person is refused."""
    for person in "ab":
        for i in range(2):
            common.write_image(tmp_path / person / f"{i}.png", torch.zeros(3, 16, 16))
    hf.check_people(tiny_config(data=str(tmp_path)), common.Faces(str(tmp_path), 16))
    one = str(tmp_path / "a")
    with pytest.raises(common.UserError, match="no sub-folders"):
        hf.check_people(tiny_config(data=one), common.Faces(one, 16))


def test_networks_that_nothing_reads_do_not_run(tmp_path):
    """--ide fie looks for no landmarks, --mfa none draws no heatmaps: a step works without a detector."""
    cfg = tiny_config(ide="fie", mfa="none", onestep_steps=1, output=str(tmp_path), device="cpu")
    run, face_nets = common.Run(cfg), hf.face_networks(cfg, "cpu")
    face_nets.detector = None
    nets = hf.prepare(cfg, face_nets, "cpu")
    assert set(hf.train_onestep(cfg, run, common.Faces("", 32), nets, face_nets)) == {"lora", "prompt"}


def test_references_are_mirrored_with_their_face(tmp_path):
    """The eyes of a mirrored face change places: a ramp from left to right tells which way a picture looks."""
    for person in "ab":
        for i in range(8):
            common.write_image(tmp_path / person / f"{i}.png", torch.linspace(-1, 1, 16).expand(3, 16, 16))
    faces = common.Faces(str(tmp_path), 16)
    batch = faces.training(8, 0, 0)
    images, present = hf.draw_references(faces, hf.album(faces), batch, 2)
    falls = lambda x: x[..., 0] > x[..., -1]
    assert 0 < batch["flipped"].sum() < 8 and present.all()
    assert torch.equal(falls(images)[:, 0, 0, 0], batch["flipped"]) and torch.equal(falls(batch["hq"])[:, 0, 0], batch["flipped"])


def test_strangers_are_other_people():
    """Sorted by person, as folders are: nobody gets the photographs of himself."""
    who = torch.tensor([0, 0, 0, 1, 1, 2])
    assert all(who[i] != who[j] for i, j in enumerate(hf.strangers(who).tolist()))
    assert hf.strangers(torch.zeros(3)) is None


def test_number_and_absence_of_training_references():
    cfg = tiny_config(max_references=4, batch_size=16, reference_dropout=0.25)
    at = hf.batches(cfg, SimpleNamespace(rank=0, world=1), common.Faces("", 16), "references")
    counts = torch.cat([at(k)["present"].sum(1) for k in range(40)])
    share = torch.bincount(counts, minlength=5) / len(counts)
    assert abs(share[0] - 0.25) < 0.06 and all(abs(s - 0.75 / 4) < 0.06 for s in share[1:])


def test_turns_leave_no_gradients_in_the_other_network():
    """Eq. 5: the restorer's turn fills no gradient of D, D's turn none of the restorer; frozen networks get none."""
    torch.manual_seed(0)
    cfg = tiny_config()
    face_nets = hf.face_networks(cfg, "cpu")
    nets = perturbed(cfg, face_nets)
    judge = hf.LatentDiscriminator(nets["unet"], cfg.lora_layers, 2, 2.0)
    common.add_lora(nets["unet"], cfg.lora_layers, 2, 2.0)
    faces = common.toy_faces([1, 2], [0, 0], size=32)
    references = torch.stack([faces.image, faces.image.flip(0)], 1)  # two: among one there is nothing to weigh
    prompt = hf.make_prompt(nets, face_nets, faces.image, references, torch.ones(2, 2, dtype=torch.bool))
    z = hf.encode(nets["vae"], faces.image)
    z_hat, t = hf.restore_latent(nets["unet"], z, prompt, 399), torch.tensor([10, 700])
    with hf.frozen(judge):
        hf.generator_loss(judge(z_hat, t, prompt.detach())).backward()
    has = lambda net: {n for n, p in net.named_parameters() if p.grad is not None and p.grad.abs().sum() > 0}
    assert not has(judge) and not has(nets["vae"]) and not has(nets["vre"])
    assert all("lora_" in n for n in has(nets["unet"])) and any("lora_B" in n for n in has(nets["unet"]))
    assert {"adapter.conv1.weight", "fie.query", "ffe.colour.weight"} <= has(nets["prompt"])
    assert not any("backbone" in n for n in has(nets["prompt"]))
    before = {n: p.grad.clone() for n, p in nets["prompt"].named_parameters() if p.grad is not None}
    hf.discriminator_loss(judge(z, t, prompt.detach()), judge(z_hat.detach(), t, prompt.detach())).backward()
    assert "head.0.weight" in has(judge) and all("lora_" in n or "head" in n for n in has(judge))
    assert all(torch.equal(before[n], p.grad) for n, p in nets["prompt"].named_parameters() if n in before)


def test_the_restorer_overfits_one_batch():
    torch.manual_seed(0)
    cfg = tiny_config()
    face_nets = hf.face_networks(cfg, "cpu")
    nets = hf.prepare(cfg, face_nets, "cpu")
    own = common.add_lora(nets["unet"], cfg.lora_layers, 16, 16.0)
    own += [p for p in nets["prompt"].parameters() if p.requires_grad]
    optimizer = common.Muon(own, lr=5e-3)
    faces = common.toy_faces([1, 2], [0, 0], size=32)
    lq = common.degrade(faces.image, common.DEGRADATIONS["codeformer"], [0, 1])
    z_l, z_h = hf.encode(nets["vae"], lq).detach(), hf.encode(nets["vae"], faces.image).detach()
    losses = []
    for _ in range(40):
        prompt = hf.make_prompt(nets, face_nets, lq, faces.image[:, None], torch.ones(2, 1, dtype=torch.bool))
        loss = (hf.restore_latent(nets["unet"], z_l, prompt, 399) - z_h).square().mean() / z_h.var()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.1 * losses[0]


def test_scaled_autoencoder_has_unit_latents_and_the_same_pictures():
    torch.manual_seed(0)
    vae = hf.prepare(tiny_config(), hf.face_networks(tiny_config(), "cpu"), "cpu")["vae"]
    images = common.toy_faces(torch.arange(8), torch.arange(8), size=32).image
    before = hf.decode(vae, hf.encode(vae, images))
    spread = vae.encode(images).latent_dist.std.mean() / vae.encode(images).latent_dist.mean.std()
    hf.scale_latents(vae, images)
    posterior = vae.encode(images).latent_dist
    assert abs(posterior.mean.std() - 1) < 1e-4
    assert torch.allclose(hf.decode(vae, hf.encode(vae, images)), before, atol=1e-4)
    assert torch.allclose(posterior.std.mean(), spread, rtol=1e-3)  # the noise is scaled with the signal


# -------------------------------------------------------------------------------------- released formats


@pytest.fixture(scope="module")
def tiny_sd(tmp_path_factory):
    """Random weights in Stable Diffusion 2.1's layout, every width cut down."""
    folder = tmp_path_factory.mktemp("sd")
    unet = hf.SD21_UNET | dict(block_out_channels=(32, 32, 64, 64), attention_head_dim=(1, 1, 2, 2), layers_per_block=1,
                               cross_attention_dim=1024)
    vae = hf.SD21_VAE | dict(block_out_channels=(32, 32, 32, 32), layers_per_block=1)
    torch.manual_seed(0)
    UNet2DConditionModel(**unet).save_pretrained(folder / "unet")
    AutoencoderKL(**vae).save_pretrained(folder / "vae")
    return folder


def test_a_paper_step_on_stable_diffusions_layout(tiny_sd, tmp_path):
    call("train", "--preset", "paper", *SMALL, "--prompt_dim", "1024", "--image_size", "64", "--max_train_steps", "1",
         "--pretrained_model_name_or_path", tiny_sd, "--face_networks", "reader", "--num_workers", "0", "-o", tmp_path,
         "--gradient_checkpointing", "--validation_faces", "2")
    assert {name.split(".")[0] for name in weights(tmp_path)} == {"vre", "lora", "prompt"}  # the base is not copied
    config = json.loads((tmp_path / "config.json").read_text())["train"]
    assert config["pretrained_model_name_or_path"] == str(tiny_sd) and config["timestep"] == 399
    common.write_image(tmp_path / "in" / "a.png", torch.zeros(3, 64, 64))
    call("sample", "-i", tmp_path / "in", "-o", tmp_path / "res", "--checkpoint", tmp_path, "--device", "cpu")
    assert pictures(tmp_path / "res")["a.png"].shape == (3, 64, 64)


def test_a_paper_step_with_every_released_network(tiny_sd, tmp_path):
    """Recognisers of two depths, landmark net, VGG16 and DISTS from files: each sees faces, one step trains on them."""
    torch.manual_seed(0)
    nets = {"arcface": metrics.IResNet(50, layout="ir_se"), "adaface": metrics.IResNet(18), "fan": metrics.FAN98(),
            "vgg": torch.nn.ModuleDict(dict(features=torchvision.models.vgg16(weights=None).features))}
    files = {name: str(tmp_path / f"{name}.pth") for name in nets}
    for name, net in nets.items():
        torch.save(net.state_dict(), files[name])
    dists = metrics.DISTS()
    files["dists"] = str(tmp_path / "dists.pt")
    torch.save(dict(alpha=dists.alpha, beta=dists.beta), files["dists"])
    eyes = hf.face_networks(tiny_config(face_networks="released", fie_network="adaface", **files), "cpu")
    a, b = common.toy_faces([1, 2], [1, 2], size=64).image[:, None]
    with torch.no_grad():
        for net, embed in zip((nets["arcface"].eval(), nets["adaface"].eval()), eyes.recognisers):
            crop = metrics.crop_112(a if net is nets["arcface"] else a.flip(1))                  # AdaFace looks at BGR
            torch.testing.assert_close(embed(a), torch.nn.functional.normalize(net(crop)))
        assert torch.equal(eyes.recogniser(a), eyes.recognisers[1](a)) and eyes.recogniser(a).shape == (1, eyes.id_dim)
        assert eyes.lpips(a, b) > 0 and eyes.lpips(a, a) == 0 and eyes.dists(a / 2 + .5, b / 2 + .5) > .001
        points = eyes.detector.landmarks(a)
        assert points.shape == (1, 98, 2) and 0 <= points.min() and points.max() <= 64
    call("train", "--preset", "paper", *SMALL, "--prompt_dim", "1024", "--image_size", "64", "--max_train_steps", "1",
         "--pretrained_model_name_or_path", tiny_sd, "--num_workers", "0", "-o", tmp_path / "out", "--validation_faces",
         "2", "--batch_size", "1", "--fie_network", "adaface",
         *[part for name, path in files.items() for part in (f"--{name}", path)])
    log = [json.loads(line) for line in (tmp_path / "out" / "log.jsonl").read_text().splitlines()]
    last = [row for row in log if row.get("stage") == "onestep"][-1]
    assert all(0 < last[name] < 10 for name in ("mse", "perceptual", "identity", "mfa", "gan"))


def test_given_encoder_and_adapter_are_kept_in_the_checkpoint(trained, tmp_path):
    """`sample` must not need the files of --vre and --adapter again; both are fed as the flag says."""
    cfg = tiny_config(vre_double_normalise=True)
    nets = hf.prepare(cfg, hf.face_networks(cfg, "cpu"), "cpu")
    torch.save({"state_dict": {f"vqvae_LQ.{n}": t for n, t in nets["vre"].state_dict().items()}}, tmp_path / "vre.ckpt")
    torch.save(nets["prompt"].adapter.state_dict(), tmp_path / "adapter.pth")
    call("train", *TINY, "-o", tmp_path / "out", "--vre", tmp_path / "vre.ckpt", "--adapter", tmp_path / "adapter.pth",
         "--vre_double_normalise")
    for name in ("vre.ckpt", "adapter.pth"):
        (tmp_path / name).unlink()
    loaded = hf.load_networks(hf.Sample(input="x", checkpoint=str(tmp_path / "out")), "cpu")[0]
    assert same(loaded["vre"].state_dict(), nets["vre"].state_dict()) and loaded["vre"].double_normalise
    assert hf.VQAutoencoder(8, (1, 2), 8, 96, True).double_normalise
    call("sample", "-i", trained / "lq", "-o", tmp_path / "res", "--checkpoint", tmp_path / "out", "--device", "cpu")


ATTENTION, CONVOLUTION = "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q", "down_blocks.0.resnets.0.conv1"


@pytest.fixture(scope="module")
def osdface(tmp_path_factory):
    """(folder, VRE, adapter, LoRA): random weights as associate_2.ckpt, embedding_change and a LoRA file, in their names."""
    torch.manual_seed(1)
    folder, vre, adapter = tmp_path_factory.mktemp("osdface"), hf.VREncoder(), hf.PromptAdapter()
    state = {f"vqvae_LQ.{n}": t for n, t in vre.state_dict().items()} | {"vqvae_LQ.decoder.conv_in.bias": torch.ones(3)}
    torch.save({"state_dict": state}, folder / "associate_2.ckpt")
    torch.save(adapter.state_dict(), folder / "embedding_change_weights.pth")
    lora = {f"unet.{ATTENTION}.lora_A.weight": torch.randn(16, 32), f"unet.{ATTENTION}.lora_B.weight": torch.randn(32, 16),
            f"unet.{CONVOLUTION}.lora.down.weight": torch.randn(16, 32, 3, 3),
            f"unet.{CONVOLUTION}.lora.up.weight": torch.randn(32, 16, 1, 1)}
    safetensors.torch.save_file(lora, folder / "pytorch_lora_weights.safetensors")
    return folder, vre, adapter, list(lora.values())


def test_osdface_release_loads_and_restores(tiny_sd, osdface):
    """Merged, loaded strictly, one face restored."""
    release, vre, adapter, (a, b, ca, cb) = osdface
    base = UNet2DConditionModel.from_pretrained(tiny_sd, subfolder="unet")
    nets, cfg = hf.load_osdface(release, str(tiny_sd))
    got, want = nets["unet"].get_submodule(ATTENTION).weight, base.get_submodule(ATTENTION).weight + b @ a
    assert torch.allclose(got, want, atol=1e-5)
    kernel = torch.einsum("or,rikl->oikl", cb[..., 0, 0], ca)
    assert torch.allclose(nets["unet"].get_submodule(CONVOLUTION).weight, base.get_submodule(CONVOLUTION).weight + kernel,
                          atol=1e-4)
    assert torch.equal(nets["vre"].codebook, vre.codebook) and cfg.vre_double_normalise
    assert torch.equal(nets["prompt"].adapter.conv2.weight, adapter.conv2.weight)
    lq, nothing = torch.rand(1, 3, 256, 256), torch.zeros(1, 1, dtype=torch.bool)
    out = hf.restore(nets, cfg, None, lq, torch.zeros(1, 1, 3, 256, 256), nothing, torch.zeros_like)
    assert out.shape == lq.shape and out.isfinite().all()


def test_training_starts_from_osdface(tiny_sd, osdface, tmp_path, capsys):
    """Section 4.1: before a step HonestFace without references is OSDFace; one step trains its LoRA, VRE and adapter kept."""
    release, vre, adapter, (a, b, ca, cb) = osdface
    flags = ["train", "--preset", "paper", "--pretrained_model_name_or_path", tiny_sd, "--face_networks", "reader",
             "--image_size", "64", "--eye_crop", "8", "--max_train_steps", "1", "--num_workers", "0", "--validation_faces",
             "2", "--device", "cpu", "--mixed_precision", "no", "--learning_rate", "1e-8", "--osdface", release]
    call(*flags, "-o", tmp_path / "out")
    parts = weights(tmp_path / "out")
    for layer, want_a, want_b in ((ATTENTION, a, b), (CONVOLUTION, ca, cb)):
        assert torch.allclose(parts[f"lora.{layer}.lora_A.weight"], want_a, atol=1e-5)
        assert torch.allclose(parts[f"lora.{layer}.lora_B.weight"], want_b, atol=1e-5)
    assert torch.equal(parts["vre.quantize.embedding.weight"], vre.codebook)
    assert torch.allclose(parts["prompt.adapter.conv2.weight"], adapter.conv2.weight, atol=1e-5)
    nets, cfg, _ = hf.load_networks(hf.Sample(input="", checkpoint=str(tmp_path / "out")), "cpu")
    former, _ = hf.load_osdface(release, str(tiny_sd))
    x = torch.rand(1, 3, 64, 64)
    assert cfg.vre_double_normalise
    codes = hf.vre_tokens(nets["vre"](x), nets["vre"].codebook)
    assert torch.equal(codes, hf.vre_tokens(former["vre"](x), former["vre"].codebook))
    z = hf.encode(former["vae"], x)
    own, theirs = (hf.restore_latent(n["unet"], z, n["prompt"].adapter(codes), 399) for n in (nets, former))
    assert torch.allclose(own, theirs, atol=1e-3 * theirs.abs().max().item())
    assert "--rank" in refused(capsys, *flags, "--rank", "8", "-o", tmp_path / "other")
    assert "not OSDFace's release" in refused(capsys, *flags[:-1], tmp_path / "nowhere", "-o", tmp_path / "other")


def test_paper_sizes_on_the_meta_device():
    """Table 3a: 978.4 M for OSDFace, 1,059 M for HonestFace (here 1,058.1 M); 351.7 M of the UNet in the discriminator."""
    millions = lambda *nets: sum(p.numel() for net in nets for p in net.parameters()) / 1e6
    with torch.device("meta"):
        unet, vae = UNet2DConditionModel(**hf.SD21_UNET), AutoencoderKL(**hf.SD21_VAE)
        vre, adapter = hf.VREncoder(), hf.PromptAdapter()
        prompt = hf.PromptBuilder(hf.Train(**hf.PAPER), None, 512)                         # with VGG16 to relu3_3
        recogniser, detector = metrics.IResNet(50), metrics.FAN98()
        parts = [round(millions(net), 1) for net in (unet, vae, vre.encoder, prompt, recogniser, detector)]
        assert parts == [865.9, 83.7, 28.4, 12.4, 43.6, 24.2]
        assert round(millions(unet, vae, vre.encoder, prompt, recogniser, detector), 1) == 1058.1
        assert round(millions(unet), 2) == 865.91 and round(millions(vae), 2) == 83.65
        assert round(millions(unet, vae, vre.encoder, adapter), 1) == 978.3
        judge = hf.LatentDiscriminator(unet, hf.ALL_LAYERS, 16, 16.0)
        frozen = sum(p.numel() for p in judge.parameters() if not p.requires_grad) / 1e6
        assert round(frozen, 1) == 351.7
        assert round(sum(p.numel() for p in common.add_lora(unet, hf.ALL_LAYERS, 16, 16.0)) / 1e6, 2) == 16.22


# ------------------------------------------------------------------------------------------- bad input


def test_bad_references_are_named_and_left_out(trained, tmp_path, capsys):
    arguments = ["sample", "-i", trained / "lq" / "00.png", "--checkpoint", trained / "out", "--device", "cpu",
                 "-o", tmp_path / "out"]
    assert "--reference" in refused(capsys, *arguments, "--reference", tmp_path / "nowhere")
    album = tmp_path / "album"
    album.mkdir()
    call(*arguments, "--reference", album)                        # empty: restored without
    said = capsys.readouterr().out
    assert "no references" in said and "restored 1 face" in said
    (album / "broken.png").write_text("no picture")
    common.write_image(album / "grey.png", torch.zeros(3, 64, 64))
    call(*arguments, "--reference", album)
    said = capsys.readouterr().out
    assert "broken.png" in said and "no face found in" in said and "0 references" in said and "restored 1 face" in said
    face = common.toy_faces(3, 1, size=64).image[0]
    for i in range(6):
        common.write_image(album / f"same{i}.png", face)          # all identical, more than fit
    call(*arguments, "--reference", album, "--max_references", "4")
    assert "only the first 4 references are used" in capsys.readouterr().out
    for i in range(2):
        common.write_image(album / "photo" / f"{i}.png", face)
    cfg = hf.Sample(input="x", reference=str(album), landmarks="points.json")
    found = hf.find_references(cfg, hf.face_networks(tiny_config(), "cpu", losses=False), 64, "cpu")
    assert len(found("photo_00")) == 2  # the faces of photo.png share its album
    assert len(found("stranger_00")) == cfg.max_references        # the pictures of the folder itself


def test_collinear_landmarks_give_a_box_and_a_choice():
    line = torch.stack([torch.linspace(0, 63, 98), torch.full((98,), 20.0)], 1)
    assert hf.select_reference(torch.stack([line + 1, line]), line) in (0, 1)
    boxes = hf.eye_boxes(line[None], 64)
    assert boxes.isfinite().all() and (boxes[..., 2] > boxes[..., 0]).all()


@pytest.mark.parametrize("flags, word", [
    (["--unet_widths", "33", "32"], "--unet_widths"), (["--image_size", "30"], "--image_size"),
    (["--timestep", "1000"], "--timestep"), (["--max_references", "0"], "--max_references"),
    (["--face_networks", "released"], "--fan"), (["--vre", "nothing.ckpt"], "nothing.ckpt"),
    (["--fan", "fan.pth"], "--fan: only read with --face_networks released"),
    (["--pretrained_model_name_or_path", "/nowhere/sd"], "--pretrained_model_name_or_path"),
    (["--stage", "onestep"], "needs vae"), (["--lora_layers", "nothing"], "nothing"),
    (["--lora_layers", "conv_out"], "conv_out"), (["--lora_layers", "norm1"], "norm1")])
def test_wrong_flags(capsys, tmp_path, flags, word):
    assert word in refused(capsys, "train", *TINY, "-o", tmp_path / "out", *flags)


def test_a_finished_run_is_not_measured_with_other_settings(trained, capsys):
    """They would change what its weights mean, and metrics.json would hold the numbers of another model."""
    before = (trained / "out" / "metrics.json").read_bytes()
    for flag, value in (("--timestep", "10"), ("--lora_alpha", "320.0"), ("--image_size", "64")):
        said = refused(capsys, "train", *TINY, "-o", trained / "out", "--resume_from_checkpoint", "latest", flag, value)
        assert f"{flag} {value}" in said and "was trained with" in said
    assert (trained / "out" / "metrics.json").read_bytes() == before


def test_checkpoints_of_another_kind(trained, tmp_path, capsys):
    call_sample = ["sample", "-i", trained / "lq", "-o", tmp_path / "o", "--device", "cpu", "--checkpoint"]
    assert "nowhere" in refused(capsys, *call_sample, tmp_path / "nowhere")
    empty = tmp_path / "empty"
    empty.mkdir()
    assert "--" in refused(capsys, *call_sample, empty)
    half = tmp_path / "half"
    call("train", *TINY, "-o", half, "--stage", "vae")
    assert "--stage" in refused(capsys, *call_sample, half)
    (half / "config.json").rename(half / "away")
    assert "no stage of this training is finished yet" in refused(capsys, *call_sample, half)
    config = json.loads((trained / "out" / "config.json").read_text())
    (half / "config.json").write_text(json.dumps(dict(config, method="latent_pmrf")))
    assert "latent_pmrf" in refused(capsys, *call_sample, half)


def test_people_without_folders_and_models_without_references(trained, tmp_path, capsys, monkeypatch):
    flat = [*TINY, "-o", tmp_path / "o", "--data", trained / "lq"]
    assert "no sub-folders, one per person" in refused(capsys, "train", *flat) and not (tmp_path / "o").exists()
    flat += ["--validation_data", trained / "people"]             # held-out people are no references either
    assert "no sub-folders, one per person" in refused(capsys, "train", *flat)
    assert "no sub-folders" in refused(capsys, "ablate", *flat, "--rows", "HonestFace")
    strangers = [*TINY, "-o", tmp_path / "o", "--data", trained / "people", "--validation_data", trained / "lq"]
    assert "--validation_data" in (said := refused(capsys, "train", *strangers)) and "no sub-folders" in said
    with monkeypatch.context() as patch:                           # nothing reads references, so none are drawn
        patch.setattr(hf, "draw_references", lambda faces, people, batch, count: (_ for _ in ()).throw(
            AssertionError) if "flipped" in batch else (batch["hq"][:, None], torch.ones(len(batch["hq"]), 1) > 0))
        call("train", *TINY, "-o", tmp_path / "none", "--ide", "none", "--data", trained / "people")
        patch.setattr(hf, "face_networks", None)                   # nor are face networks asked for to restore
        call("sample", "-i", trained / "lq", "-o", tmp_path / "s", "--checkpoint", tmp_path / "none")
    said = refused(capsys, "sample", "-i", trained / "lq", "-o", tmp_path / "s", "--checkpoint", tmp_path / "none",
                   "--reference", trained / "people")
    assert "--ide none" in said


def test_a_stage_trained_anew_drops_what_stood_on_it(trained, tmp_path, capsys):
    shutil.copytree(trained / "out", tmp_path / "out")
    call("train", *TINY, "-o", tmp_path / "out", "--stage", "vre", "--seed", "1")
    assert "stage onestep was trained on the former vre" in capsys.readouterr().out
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["finished"] == ["vae", "unet", "words", "vre"]
    assert {name.split(".")[0] for name in weights(tmp_path / "out")} == set(config["finished"])
    call("train", *TINY, "-o", tmp_path / "out", "--stage", "prior", "--seed", "1")
    before, after = weights(trained / "out"), weights(tmp_path / "out")   # the encoder never saw the prior
    assert any(n.startswith("vre.") for n in after) and after.keys() <= before.keys()


def test_ablation_rows_share_the_frozen_networks(tmp_path, capsys):
    flags = ["ablate", *TINY, "-o", tmp_path, "--rows", "no IDE", "MFA with MSE"]
    call(*flags)
    rows = json.loads((tmp_path / "rows.json").read_text())
    folders = sorted(p.name.split("_")[0] for p in tmp_path.iterdir() if p.is_dir())
    assert folders == ["prior", "vae", "vre"] and {r["row"] for r in rows.values()} == {"no IDE", "MFA with MSE"}
    assert all({"lpips_toy", "dists_toy", "fid_toy"} <= set(r["scores"]) for r in rows.values())   # Table 2 and 3c
    capsys.readouterr()
    call(*flags)
    assert capsys.readouterr().out.count("finished before") == 2
