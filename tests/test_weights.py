"""A weights file never runs code: a TorchScript archive and two pickle bombs through every reader of weights."""
import pickle
import re
import shutil

import pytest
import torch
from program import ROOT, ScriptTrap, Trap

import a2bfr
import common
import honestface
import latent_pmrf
import metrics
import pref_restore


def resumed(folder):
    return common.Run(common.TrainFlags(output=str(folder), resume_from_checkpoint="latest")).load("x", {}, {})


def model_folder(name, folder):
    import diffusers
    import transformers
    return common.from_folder(getattr(diffusers, name, None) or getattr(transformers, name), str(folder), "flag")


READERS = {  # flag: (file in a folder, how the program reads it)
    "--resume_from_checkpoint": ("state.pt", resumed),
    "latent_pmrf --vae": ("x.bin", lambda f: latent_pmrf.load_sim_vae(str(f))),
    "latent_pmrf --mmse": ("x.pth", lambda f: latent_pmrf.load_part(latent_pmrf.Train(), "mmse", str(f / "x.pth"))),
    "latent_pmrf --vgg": ("x.pth", lambda f: latent_pmrf.VGGLoss(str(f / "x.pth"))),
    "latent_pmrf --checkpoint": ("model.ckpt", lambda f: latent_pmrf.load_pmrf(f)),
    "honestface --vre": ("x.ckpt", lambda f: honestface.load_vre(None, str(f / "x.ckpt"))),
    "honestface --adapter": ("x.pth", lambda f: honestface.load_adapter(honestface.PromptAdapter(), str(f / "x.pth"))),
    "honestface --checkpoint": ("x.ckpt", lambda f: honestface.osdface_files(str(f), "checkpoint")),
    "honestface --osdface": ("x.pt", lambda f: honestface.read_unet_lora(str(f / "x.pt"))),
    "--arcface, --adaface": ("x_ir50.pth", lambda f: metrics.load_iresnet(f / "x_ir50.pth")),
    "--fan": ("x.pth", lambda f: metrics.load_weights(metrics.FAN98(), f / "x.pth")),
    "honestface --dists": ("x.pt", lambda f: metrics.DISTS(vgg_weights=str(f / "x.pt"))),
    "a2bfr --lora": ("x.safetensors", lambda f: a2bfr.lora_rank(f / "x.safetensors")),
    "a2bfr --lora, .pt": ("x.pt", lambda f: a2bfr.lora_rank(f / "x.pt")),
    "honestface --pretrained": ("diffusion_pytorch_model.bin", lambda f: model_folder("UNet2DConditionModel", f)),
    "a2bfr --pretrained": ("diffusion_pytorch_model.bin", lambda f: model_folder("FluxTransformer2DModel", f)),
    "a2bfr text encoder": ("pytorch_model.bin", lambda f: model_folder("CLIPTextModel", f)),
    "pref_restore --checkpoint": ("pytorch_model.bin", pref_restore.load_release),
    "pref_restore --ta_tok": ("ta_tok.pth", lambda f: pref_restore.read_ta_tok(f / "ta_tok.pth")),
    "metrics --weights, FID": ("x.pth", lambda f: metrics.FIDInception(f / "x.pth")),
    "metrics --weights, FaRL": ("x.pt", lambda f: metrics.load_weights(metrics.FaRLAttributes(), f / "x.pt")),
    "--readers": ("reader_b.safetensors", lambda f: metrics.load_reader("b", f)),
}


@pytest.fixture(scope="module")
def bombs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bombs")
    mark = folder / "ran"
    torch.save({"state_dict": {"w": torch.zeros(1)}, "x": Trap(mark)}, folder / "zip")
    (folder / "pickle").write_bytes(pickle.dumps(Trap(mark)))
    torch.jit.script(ScriptTrap(str(mark))).save(str(folder / "script"))
    torch.jit.load(str(folder / "script"))
    assert mark.exists()                                           # it is a bomb
    mark.unlink()
    return [folder / name for name in ("zip", "pickle", "script")], mark


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore:.torch.jit")
@pytest.mark.parametrize("flag", READERS)
def test_a_bomb_is_refused_in_one_line_and_nothing_runs(flag, bombs, tmp_path):
    files, mark = bombs
    name, read = READERS[flag]
    (tmp_path / "config.json").write_text('{"_class_name": "X", "model_type": "clip_text_model", "train": {}}')
    for file in files:
        shutil.copy(file, tmp_path / name)
        with pytest.raises(common.UserError) as refused:
            read(tmp_path)
        assert "\n" not in str(refused.value) and not mark.exists(), file.name


def test_no_source_reads_weights_in_a_way_that_runs_code():
    for path in [*ROOT.glob("*.py"), *ROOT.glob("toy/*.py"), *ROOT.glob("docs/*.py")]:
        text = path.read_text()
        assert not re.search(r"weights_only=False|pickle_module|torch\.jit|pickle\.loads?\(|trust_remote_code=True", text)
        assert all("weights_only=True" in call for call in re.findall(r"torch\.load\([^)]*\)", text)), path.name


@pytest.mark.parametrize("text", ("null", "[]", "{}"))
def test_a_folder_whose_configuration_is_not_ours_is_a_release(tmp_path, text):
    (tmp_path / "config.json").write_text(text)
    assert common.open_run(str(tmp_path), latent_pmrf.Train) == (tmp_path, None)


def test_a_run_of_another_method_is_named():
    with pytest.raises(common.UserError, match="is a run of a2bfr.py"):
        common.open_run("toy/weights/a2bfr", latent_pmrf.Train)


@pytest.mark.parametrize("text", ('{"method": "latent_pmrf"}', '{"method": "latent_pmrf", "train": []}'))
def test_a_damaged_configuration_is_no_run(tmp_path, text):
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(common.UserError, match="config.json: lacks the configuration of a run"):
        common.open_run(str(tmp_path), latent_pmrf.Train)
