"""pref_restore.py as a program: stages, resume, captions, released layouts, wrong flags. Tiny, no download."""
import copy
import dataclasses
import json
import os
import shutil
import subprocess
import sys

import pytest
import safetensors.torch
import torch

import common
import pref_restore as pr
from program import ROOT, caller, kill_in_stage, same, toy_pictures, train_once_more, weights
from test_pref_restore import release

TINY = ["--image_size", "32", "--batch_size", "4", "--token_side", "2", "--codes", "16", "--code_dim", "8",
        "--tokenizer_width", "24", "--llm_width", "32", "--llm_layers", "2", "--latent_channels", "8",
        "--vae_widths", "16", "16", "32", "--sana_heads", "1", "--sana_layers", "2", "--bank", "64", "--rank", "4",
        "--tokenizer_steps", "3", "--prior_steps", "3", "--semantic_steps", "3", "--texture_steps", "3",
        "--joint_steps", "3", "--preference_steps", "2", "--groups", "2", "--group_size", "3", "--rollout_batch", "4",
        "--rollout_steps", "3", "--num_inference_steps", "2", "--validation_faces", "6", "--consistency_faces", "2",
        "--consistency_seeds", "2", "--log_steps", "1", "--device", "cpu", "--mixed_precision", "no"]
call, refused = caller(pr)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """One tiny run of all stages, and a folder of toy pictures."""
    folder = tmp_path_factory.mktemp("run")
    call("train", *TINY, "-o", folder / "out")
    toy_pictures(folder / "faces", 6)
    return folder


def sample(trained, out, *flags):
    call("sample", "-i", trained / "faces", "-o", out, "--checkpoint", trained / "out", "--device", "cpu", *flags)
    return torch.stack([common.read_image(p) for p in sorted((out / "restored_faces").iterdir())])


def test_training_leaves_weights_numbers_pictures_and_a_lora(trained):
    out = trained / "out"
    wanted = {"model.safetensors", "config.json", "metrics.json", "samples.png", "curves.png", "log.jsonl", "lora"}
    assert wanted <= {p.name for p in out.iterdir()}
    numbers = json.loads((out / "metrics.json").read_text())
    assert list(numbers["rows"]) == ["lq", "reconstruction", "stage 1.1", "stage 1.2", "stage 2"]
    assert numbers["faces"] == 6
    assert all(name.endswith("_toy") or name in ("psnr", "ssim") for row in numbers["rows"].values() for name in row)
    assert {"deg_std_toy", "reward_toy", "reward_lmd_toy", "lmd_toy", "lpips_toy"} <= set(numbers["rows"]["stage 2"])
    config = json.loads((out / "config.json").read_text())
    assert config["finished"] == ["tokenizer", "prior", "1.1", "1.2", "2"] and config["uses"] == ["semantic", "texture"]
    lora = json.loads((out / "lora" / "adapter_config.json").read_text())
    assert lora["r"] == 4 and (out / "lora" / "adapter_model.safetensors").exists()
    stages = {json.loads(line).get("stage") for line in (out / "log.jsonl").read_text().splitlines()[1:]}
    assert stages == {"tokenizer", "prior", "1.1", "1.2", "2"}


def test_lpips_toy_is_twice_the_negative_reward(trained):
    row = json.loads((trained / "out" / "metrics.json").read_text())["rows"]["stage 2"]
    assert row["lpips_toy"] == pytest.approx(-2 * row["reward_lpips_toy"], rel=1e-4)


def test_stage_by_stage_equals_all_at_once(trained, tmp_path):
    for stage in ("tokenizer", "prior", "1.1", "1.2", "2"):
        call("train", *TINY, "-o", tmp_path, "--stage", stage)
    assert same(weights(trained / "out"), weights(tmp_path))


def test_a_killed_run_goes_on_to_the_same_weights(trained, tmp_path):
    """SIGKILL amid stage 2, then --resume_from_checkpoint latest: bit by bit the uninterrupted run."""
    arguments = kill_in_stage("pref_restore.py", tmp_path, "2", *TINY, "--checkpointing_epochs", "1")
    call(*arguments, "--resume_from_checkpoint", "latest")
    assert same(weights(trained / "out"), weights(tmp_path))


def test_stage_1_is_kept_bit_for_bit_under_stage_2(trained, tmp_path):
    """A second preference run on the first one's Stage 1; --policy base of both is the same network."""
    for stage in ("tokenizer", "prior", "1.1", "1.2"):
        call("train", *TINY, "-o", tmp_path / "stage1", "--stage", stage)
    before = sample(trained, tmp_path / "b", "--checkpoint", tmp_path / "stage1")
    base = sample(trained, tmp_path / "base", "--policy", "base")
    after = sample(trained, tmp_path / "after")
    assert torch.equal(before, base) and base.shape == after.shape
    call("train", *TINY, "-o", tmp_path / "again", "--stage", "2", "--pretrained", tmp_path / "stage1")
    assert same(weights(tmp_path / "again"), weights(trained / "out"))


def test_joint_no_semantic_and_grpo_run(trained, tmp_path):
    call("train", *TINY, "-o", tmp_path / "joint", "--joint", "--algorithm", "grpo", "--guidance_scale", "2",
         "--rank", "3")                                            # 32 / 3 is no float32
    config = json.loads((tmp_path / "joint" / "config.json").read_text())
    assert config["finished"] == ["tokenizer", "prior", "joint", "2"]
    call("train", *TINY, "-o", tmp_path / "texture", "--no-semantic", "--nft_form", "velocity", "--anchor", "stage1")
    config = json.loads((tmp_path / "texture" / "config.json").read_text())
    assert config["uses"] == ["texture"] and "1.1" not in config["finished"]
    assert len(sample(trained, tmp_path / "r", "--checkpoint", tmp_path / "texture")) == 6


def test_sampling_depends_on_the_seed_and_the_caption_and_on_nothing_else(trained, tmp_path, capsys):
    a, b = sample(trained, tmp_path / "a"), sample(trained, tmp_path / "b", "--batch_size", "4")
    assert (a - b).abs().max() <= 2 / 127.5 + 1e-6
    assert not torch.equal(a, sample(trained, tmp_path / "c", "--seed", "1"))
    said = sample(trained, tmp_path / "d", "--caption", "a photo of an older smiling person")
    listed = [{"image": f"somewhere/{i:02d}.png", "caption": "a photo of an older smiling person"} for i in range(6)]
    (tmp_path / "captions.json").write_text(json.dumps(listed))
    assert torch.equal(said, sample(trained, tmp_path / "e", "--captions", tmp_path / "captions.json"))
    assert torch.equal(a, sample(trained, tmp_path / "f", "--caption", "  "))                # empty: caption-free
    drawn = sample(trained, tmp_path / "g", "--ar", "sample", "--solver", "euler")
    assert torch.equal(drawn, sample(trained, tmp_path / "h", "--ar", "sample", "--solver", "euler"))
    alone = sample(trained, tmp_path / "i", "--ar", "sample", "--solver", "euler", "--batch_size", "1")
    assert (drawn - alone).abs().max() <= 2 / 127.5 + 1e-6         # whatever else is in the batch
    assert "brings its own" in refused(capsys, "sample", "-i", trained / "faces", "-o", tmp_path / "j", "--checkpoint",
                                       trained / "out", "--sana", "x")


def test_a_stage_trained_once_more_can_be_stopped_and_resumed(trained, tmp_path, capsys, monkeypatch):
    flags = (*TINY, "--stage", "2", "--learning_rate", "1e-2")
    assert same(*train_once_more(call, refused, capsys, monkeypatch, trained / "out", tmp_path, *flags))
    call("train", *flags, "-o", tmp_path / "new", "--pretrained", trained / "out")     # the same, into another folder
    assert same(weights(tmp_path / "new"), weights(tmp_path / "straight"))
    said = refused(capsys, "train", *TINY, "--stage", "2", "--rank", "2", "-o", tmp_path / "straight")
    assert "the preference LoRA that is there has rank 4 and alpha 32" in said
    assert "2" in json.loads((tmp_path / "straight" / "config.json").read_text())["finished"]


def test_what_was_stopped_while_measuring_is_measured(trained, tmp_path):
    out = shutil.copytree(trained / "out", tmp_path / "out")
    numbers = json.loads((out / "metrics.json").read_text())
    row = numbers["rows"].pop("stage 2")
    (out / "metrics.json").write_text(json.dumps(numbers))
    call("train", *TINY, "-o", out, "--resume_from_checkpoint", "latest")
    assert json.loads((out / "metrics.json").read_text())["rows"]["stage 2"] == pytest.approx(row, abs=1e-5)


def test_captions_of_unequal_length_share_a_batch(trained, tmp_path):
    captions = {"00.png": "young", "01.png": "a photo of an older smiling person with wavy blond hair", "02.png": ""}
    (tmp_path / "c.json").write_text(json.dumps(captions))
    mixed = sample(trained, tmp_path / "a", "--captions", tmp_path / "c.json")
    alone = sample(trained, tmp_path / "b", "--captions", tmp_path / "c.json", "--batch_size", "1")
    assert (mixed - alone).abs().max() <= 2 / 127.5 + 1e-6


def test_a_long_caption_is_cut_with_a_line_that_says_so(trained, tmp_path, capsys):
    sample(trained, tmp_path / "a", "--caption", "young " * 300)
    assert "300 words, cut to the first" in capsys.readouterr().out


def test_training_on_a_folder_with_captions(trained, tmp_path, capsys):
    told = {"00.png": "a young person", "01.png": "young " * 300, "absent.png": "an older person"}
    (tmp_path / "c.json").write_text(json.dumps(told))
    call("train", *TINY, "-o", tmp_path / "out", "--data", trained / "faces", "--captions", tmp_path / "c.json",
         "--bank", "0")
    said = capsys.readouterr().out
    assert "1 of its pictures are not in the folder, left out (e.g. absent.png)" in said and "4 of 6 pictures have none" in said
    assert "1 captions are longer than the" in said
    assert json.loads((tmp_path / "out" / "metrics.json").read_text())["faces"] == 1


# ---------------------------------------------------------------- released layouts

def test_two_processes_train_all_stages_though_one_reads_a_face_less(tmp_path):
    """A damaged file shortens the batch of one of them, which must not stop the exchange of rewards in stage 2."""
    toy_pictures(tmp_path / "faces", 7)
    sorted((tmp_path / "faces").iterdir())[0].write_bytes(b"no picture")
    command = [sys.executable, "pref_restore.py", "train", *TINY, "--bank", "0", "--data", str(tmp_path / "faces"),
               "--readers", "weights", "-o", str(tmp_path / "out")]
    workers = [subprocess.Popen(command, cwd=ROOT, text=True, stdout=subprocess.PIPE, env=dict(
        os.environ, RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2", OMP_NUM_THREADS="1",
        MASTER_ADDR="127.0.0.1", MASTER_PORT=str(20000 + os.getpid() % 20000))) for rank in range(2)]
    said = [worker.communicate(timeout=240)[0] for worker in workers]
    assert "skipped" in "".join(said)
    assert json.loads((tmp_path / "out" / "config.json").read_text())["finished"][-1] == "2"
    assert all(t.isfinite().all() for t in weights(tmp_path / "out").values())


def test_every_stage_runs_on_the_authors_layout_and_sample_restores_with_it(trained, tmp_path):
    """Stages 1.1 to 2 from a checkpoint without texture connector, then a LoRA on the finished one."""
    release(tmp_path / "early", texture=False)
    flags = ["--pretrained", tmp_path / "early", "--sana", tmp_path / "sana", "--gradient_checkpointing"]
    call("train", *TINY, "-o", tmp_path / "out", *flags)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["finished"] == ["tokenizer", "prior", "1.1", "1.2", "2"] and not config["toy_words"]
    ours = sample(trained, tmp_path / "a", "--checkpoint", tmp_path / "out")  # our copy of it, its tokenizer too
    assert len(ours) == 6 and ours.shape[-1] == 32


def test_the_authors_finished_checkpoint_with_a_preference_lora(trained, tmp_path, monkeypatch):
    monkeypatch.setattr(pr, "PAPER", dict(pr.PAPER, image_size=32, num_inference_steps=2, guidance_scale=2.))
    model, _ = release(tmp_path / "done")
    sana = copy.deepcopy(model.sana)
    pr.add_policies(sana, 4, 8.)
    for layer in pr.policy_layers(sana).values():
        layer.lora_B.data.normal_()
    pr.save_peft(sana, tmp_path / "lora")
    flags = ["--checkpoint", tmp_path / "done", "--sana", tmp_path / "sana"]
    stage1 = sample(trained, tmp_path / "a", *flags)
    stage2 = sample(trained, tmp_path / "b", *flags, "--lora", tmp_path / "lora")
    base = sample(trained, tmp_path / "c", *flags, "--lora", tmp_path / "lora", "--policy", "base")
    assert torch.equal(stage1, base) and not torch.equal(stage1, stage2)


def test_parts_from_diffusers_and_transformers_folders(trained, tmp_path):
    """--llm, --sana and --ta_tok: Qwen3 with new words, SANA, DC-AE and TA-Tok's file, each through from_pretrained."""
    from transformers import Qwen3Config, Qwen3ForCausalLM
    model, vocab = release(tmp_path / "release")
    words = len(vocab.tokenizer)
    config = dict(pr.toy_sizes(pr.Train(llm_width=32, llm_layers=2), vocab)["llm"], vocab_size=words)
    Qwen3ForCausalLM(Qwen3Config(**config)).save_pretrained(tmp_path / "qwen")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / "qwen" / name).write_bytes((tmp_path / "release" / name).read_bytes())
    torch.save({"model": {"sd": model.tatok.state_dict(), "args": {}}}, tmp_path / "ta_tok.pth")
    files = {name: str(tmp_path / file) for name, file in dict(llm="qwen", sana="sana", ta_tok="ta_tok.pth").items()}
    cfg = pr.Train(**files, image_size=32)
    built, words, finished, _ = pr.build(cfg)
    assert built.integrator.llm.embed_tokens.weight.shape == (vocab.size, 32) and finished == ["tokenizer", "prior"]
    assert built.integrator.llm.config.rope_parameters["rope_theta"] == 1e4         # as its config.json says
    with pytest.raises(common.UserError, match="--ta_tok is missing"):
        pr.build(dataclasses.replace(cfg, ta_tok=""))
    for part in ("tatok", "sana", "vae"):
        assert same(getattr(built, part).state_dict(), getattr(model, part).state_dict())
    assert words.first_code == vocab.first_code


# ---------------------------------------------------------------- bad input

def test_bad_captions(capsys, trained, tmp_path):
    go = lambda path, *flags: refused(capsys, "sample", "-i", trained / "faces", "-o", tmp_path / "o", "--checkpoint",
                                      trained / "out", "--captions", path, *flags)
    assert "no such file" in go(tmp_path / "absent.json")
    bad = tmp_path / "bad.json"
    for text in ("nonsense", "[1, 2]", "[{\"image\": \"00.png\"}]", "{\"00.png\": 3}", "3"):
        bad.write_text(text)
        assert "wants JSON of the form" in go(bad), text
    bad.write_text(json.dumps([{"image": "x.png", "caption": "y"}]))
    assert "no caption for any picture" in go(bad)
    assert "--caption" in go(bad, "--caption", "also")


def test_each_face_is_told_its_own_caption(trained, tmp_path, monkeypatch):
    """Folders and endings tell captions apart, in the prompt itself."""
    for name in ("bob/1.png", "bob/1.jpg", "anna/1.png"):
        common.write_image(tmp_path / name, torch.zeros(3, 32, 32))
    said, real = [], pr.read_face
    monkeypatch.setattr(pr, "read_face", lambda m, v, c, lq, captions, g: said.extend(captions) or real(m, v, c, lq, captions, g))
    told = {"bob/1.png": "smiling", "anna/1.png": "young", "1.jpg": "older"}
    (tmp_path / "told.json").write_text(json.dumps(told))
    call("sample", "-i", tmp_path / "bob", "-o", tmp_path / "o", "--checkpoint", trained / "out", "--device", "cpu",
         "--captions", tmp_path / "told.json")
    assert said == ["older", "smiling"]                            # 1.jpg, then 1.png


def test_bad_flags(capsys, trained, tmp_path):
    go = lambda *flags: refused(capsys, "train", *TINY, "-o", tmp_path / "o", *flags)
    assert "--group_size 1" in go("--group_size", "1")
    assert "--group_size 1" in go("--group_size", "1", "--stage", "tokenizer")      # its rewards are measured with
    assert "--llm x: is not read" in go("--pretrained", trained / "out", "--llm", "x")
    assert "--decay_kind 7" in go("--decay_kind", "7") and "at most 1" in go("--timestep_fraction", "1.5")
    assert "--consistency_seeds 1" in go("--consistency_seeds", "1")
    assert "--rollout_steps 2" in go("--algorithm", "grpo", "--rollout_steps", "1")
    assert "itself" in go("--pretrained", tmp_path / "o") and not (tmp_path / "o.1").exists()
    assert "--token_side 3" in go("--token_side", "3") and "--nft_beta 0" in go("--nft_beta", "0")
    assert "--groups 0" in go("--groups", "0")
    assert "--hps: only read with --rewards real" in go("--hps", "hps.pt")
    assert "--vae_widths" in go("--vae_widths", "16", "16", "40")
    assert "--context 30" in go("--context", "30")
    assert "every reward weight is 0" in go(*[f for n in pr.REWARD_FILES for f in (f"--{n}_weight", "0")])
    assert "needs stage tokenizer" in go("--stage", "1.1")
    assert "--stage joint" in go("--stage", "joint")
    assert "did you mean --preference_steps" in go("--preference_step", "3")
    assert "no such row" in refused(capsys, "ablate", "-o", tmp_path, "--rows", "nonsense")
    assert "already past it" in refused(capsys, "train", *TINY, "-o", trained / "out", "--stage", "1.1")


def test_absent_reward_networks_are_named_before_anything_is_trained(capsys, tmp_path):
    go = lambda *flags: refused(capsys, "train", *TINY, "-o", tmp_path / "o", "--rewards", "real", *flags)
    error = go()
    assert "reward hps needs --hps" in error and "--hps_weight 0" in error
    assert "reward clip needs --clip" in go("--hps_weight", "0")
    looks = [f for name in ("hps", "clip", "pick") for f in (f"--{name}_weight", "0")]
    assert "--clip /no/clip: no such" in go("--hps_weight", "0", "--clip", "/no/clip")
    (tmp_path / "arcface").touch()
    assert "vgg.pth" in go(*looks, "--arcface", tmp_path / "arcface", "--vgg", "/no/vgg.pth")
    assert not (tmp_path / "o" / "model.safetensors").exists()


def test_a_reward_that_is_not_finite_stops_the_run_and_keeps_the_checkpoint(capsys, trained, tmp_path, monkeypatch):
    for stage in ("tokenizer", "prior", "1.1", "1.2"):
        call("train", *TINY, "-o", tmp_path, "--stage", stage)
    before, real = weights(tmp_path), pr.toy_rewards
    nan = lambda x, *others: x.mean((1, 2, 3)) * float("nan")
    monkeypatch.setattr(pr, "toy_rewards", lambda *readers: dict(real(*readers), hps=nan))
    capsys.readouterr()
    assert "reward hps is not finite" in refused(capsys, "train", *TINY, "-o", tmp_path, "--stage", "2")
    assert same(before, weights(tmp_path))


def test_constant_rewards_teach_nothing_and_stay_finite(trained, tmp_path, monkeypatch):
    one = lambda x, *others: torch.ones(len(x))
    monkeypatch.setattr(pr, "toy_rewards", lambda *readers: dict.fromkeys(pr.REWARD_FILES, one))
    cfg = ["--kl_weight", "0", "--preference_weight_decay", "0", "--stage", "2", "--pretrained"]
    for stage in ("tokenizer", "prior", "1.1", "1.2"):
        call("train", *TINY, "-o", tmp_path / "s", "--stage", stage)
    call("train", *TINY, "-o", tmp_path / "o", *cfg, tmp_path / "s")
    assert all(t.isfinite().all() for t in weights(tmp_path / "o").values())


def test_bad_checkpoints(capsys, trained, tmp_path):
    go = lambda where, *flags: refused(capsys, "sample", "-i", trained / "faces", "-o", tmp_path / "o", "--checkpoint",
                                       where, *flags)
    assert "no such file or folder" in go(tmp_path / "absent")
    bare = tmp_path / "bare"
    bare.mkdir()
    assert "no .safetensors" in go(bare)
    safetensors.torch.save_file({"x": torch.zeros(1)}, bare / "model.safetensors")
    assert "config.json" in go(bare)
    (bare / "config.json").write_text("{}")
    assert "image_start_tag_id" in go(bare)
    copied = tmp_path / "copied"
    copied.mkdir()
    (copied / "config.json").write_bytes((trained / "out" / "config.json").read_bytes())
    (copied / "model.safetensors").write_bytes((trained / "out" / "model.safetensors").read_bytes()[:2000])
    assert "damaged" in go(copied)
    config = json.loads((trained / "out" / "config.json").read_text())
    (copied / "model.safetensors").write_bytes((trained / "out" / "model.safetensors").read_bytes())
    config["sizes"]["llm"]["hidden_size"] = 64
    (copied / "config.json").write_text(json.dumps(config))
    assert "does not fit" in go(copied)
    del config["sizes"]
    (copied / "config.json").write_text(json.dumps(config))
    assert "config.json lacks" in go(copied)
    assert "--lora" in go(trained / "out", "--lora", bare)
    call("train", *TINY, "-o", tmp_path / "young", "--stage", "tokenizer")
    assert "only stages tokenizer" in go(tmp_path / "young")


# ---------------------------------------------------------------- ablation

def test_ablation_rows_are_kept_and_shared(tmp_path, capsys):
    flags = ["ablate", *TINY, "-o", tmp_path, "--rows", "stage 1.1", "stages 1.1 + 1.2", "caption, true text", "NFT",
             "GRPO"]
    call(*flags)
    said = capsys.readouterr().out
    rows = json.loads((tmp_path / "rows.json").read_text())
    assert len(rows) == 5 and "Figure 6" in said and "reward_last" in said and "Table VII" in said
    stages = sorted(p.name.split("_")[0] for p in tmp_path.iterdir() if p.is_dir())
    assert stages == ["1.1", "1.2", "2", "2", "prior", "tokenizer"]                          # each trained once
    assert len(rows["NFT, seed 0"]["curve"]) == 2
    call(*flags)
    assert capsys.readouterr().out.count("finished before") == 5
