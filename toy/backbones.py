"""Trains the toy stand-ins of the released networks, once; their weights are in toy/weights.

    python -m toy.backbones                                 # all, one after the other: hours on a CPU
    python -m toy.backbones flux --steps 8000               # some of them, after readers and vae
    python -m toy.backbones --data FACES --work runs/faces -o WEIGHTS      # on faces of your own

    vae       AutoencoderKL with 16 channels, which sd and flux share
    sd        Stable Diffusion: UNet2DConditionModel and CLIPTextModel, for honestface.py
    flux      FLUX: FluxTransformer2DModel, CLIPTextModel and T5EncoderModel, for a2bfr.py
    sana      BLIP3o-NEXT: AutoencoderDC, TA-Tok, Qwen3 and SanaTransformer2DModel, for pref_restore.py
    swinir    SwinIR, the posterior mean, for latent_pmrf.py
    readers   the face readers of the losses and tables
    latent_pmrf honestface a2bfr pref_restore     the methods on top of them, whose weights `sample` takes by default

They are written as the releases are, in bf16: diffusers and transformers folders, whose about.json names command, seed, steps,
device and commit. Log, state and samples are in runs/backbones/NAME, where a stopped run goes on when it is called again.
Nothing here is needed to understand a method, which starts from networks that are trained already.
"""
import functools
import importlib
import itertools
import json
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass, replace
from pathlib import Path

# common comes first: it sets up OpenMP before torch is imported
from common import (ATTRIBUTES, EMA, TOY, Run, TrainFlags, command_line, load_strict, lr_schedule, make_optimizer, open_faces,
                    random_crop, read_weights, save_part, verbalise, write_grid)

import torch
import torch.nn as nn
from tqdm import tqdm

import metrics

METHODS = ("latent_pmrf", "honestface", "a2bfr", "pref_restore")
NAMES = ("readers", "vae", "sd", "flux", "sana", "swinir", *METHODS)


@dataclass(frozen=True)
class Settings(TrainFlags):
    """Train toy stand-ins of the released networks."""
    which: tuple[str, ...] = NAMES         # stand-ins to train
    output: str = "toy/weights"            # folder that receives a folder per stand-in
    work: str = "runs/backbones"           # folder of logs, states and samples
    steps: int = 6000                      # of each generator and of the posterior mean
    vae_steps: int = 5000                  # of each autoencoder and tokenizer


# ------------------------------------------------------------------------------------------------ what they share


def fit(run, name, parts, faces, steps, rate, loss_of, tables=(), degraded=False, show=None, every=500) -> None:
    """Train `parts` {file name: module}, or take their files. loss_of(batch) -> (loss, values for the log).

    show(): {title: pictures}, drawn every `every` steps from the averaged weights, which the modules keep in the end.
    """
    if not all(run.part(part) for part in parts):
        parameters = [p for part in parts.values() for p in part.parameters() if p.requires_grad]
        optimizer = make_optimizer(run.cfg, parameters, rate, tables=tables)
        factor, ema = lr_schedule(run.cfg, steps), EMA(parts, run.cfg.ema_decay)
        first = run.load(name, parts, ema, optimizer)
        for step, batch in run.batches(functools.partial(faces.training, degraded=degraded), name, first, steps):
            optimizer.zero_grad()
            with run.autocast():
                loss, values = loss_of(batch)
            loss.backward()
            run.average_gradients(parts)
            nn.utils.clip_grad_norm_(parameters, run.cfg.max_grad_norm)
            for group in optimizer.param_groups:
                group["lr"] = rate * factor(step)
            optimizer.step()
            ema.update(step)
            run.log(name, step, **values)
            run.save(name, step, parts, ema, optimizer)
            if show and run.main and (step + 1) % every == 0:
                before = {part: {k: t.clone() for k, t in module.state_dict().items()} for part, module in parts.items()}
                for part, module in parts.items():
                    module.load_state_dict(ema[part], strict=False)
                write_grid(run.folder / f"{name}.png", show())
                for part, module in parts.items():
                    module.load_state_dict(before[part])
        run.finish(name, ema)
    for part, module in parts.items():
        load_strict(module, module.state_dict() | read_weights(run.folder / f"{part}.safetensors"), f"{run.folder}, {part}")
        module.eval().requires_grad_(False)
    if show and run.main:
        write_grid(run.folder / f"{name}.png", show())


@torch.no_grad()
def encode_all(run, faces, encode):
    """(N, ...) `encode` of every clean face, once: a batch's are [batch["place"]]."""
    places = tqdm(torch.arange(len(faces)).split(64), "encoding", disable=None if run.main else True)
    with run.autocast():
        clean = (faces.batch(k, torch.ones_like(k), degraded=False)["hq"] for k in places)
        return torch.cat([encode(hq.to(run.device)).cpu() for hq in clean])


def opponent(x):
    """(B, 3, H, W) -> luma, red minus blue, green minus magenta. The last is 2 % of a toy face, and L1 on RGB forgets it."""
    r, g, b = x.float().unbind(1)
    return torch.stack([(r + g + b) / 3, r - b, 2 * g - r - b], 1)


def colour_slopes(hq, copied) -> list:
    """Slope of a copy on the truth along the axes of `opponent`: 1 is right, 0 is a colour that is lost."""
    was, came = opponent(hq).transpose(0, 1).flatten(1), opponent(copied).transpose(0, 1).flatten(1)
    was, came = was - was.mean(1, keepdim=True), came - came.mean(1, keepdim=True)
    return ((was * came).sum(1) / was.square().sum(1)).tolist()


def copy_loss(reader, copied, hq):
    """L1 on pixels and opponent colours, and a tenth of the reader's LPIPS, which sums five stages."""
    copied = copied.float()
    colours = (opponent(copied) - opponent(hq)).abs().mean()
    return (copied - hq).abs().mean() + colours + 0.1 * metrics.reader_lpips(reader, copied, hq).mean()


def captions_of(batch, whole: bool = False) -> list:
    """A caption per face: what the attributes say, else that of captions.json, else none. In training half of them leave
    attributes out and a tenth is empty; `whole` are complete."""
    count = len(batch["hq"])
    said = batch.get("captions", [""] * count)
    if "attributes" in batch:
        quiet = (torch.rand(count, 1) < 0.5) & (torch.rand(count, len(ATTRIBUTES)) < 0.5)
        said = [verbalise(row) for row in torch.where(quiet & (not whole), 0.5, batch["attributes"].cpu())]
    return ["" if empty and not whole else caption for empty, caption in zip(torch.rand(count) < 0.1, said)]


def word_tokenizer(length: int, end: bool = True, text: str = "", marks: str = ""):
    """A word-level tokenizer of transformers: the words of `verbalise` and `text`, no case; `marks` are words too."""
    from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast
    phrases = [phrase for row in ATTRIBUTES for phrase in row[2:]]
    pattern, last = marks + "[a-z0-9]+", ["</s>"] * end
    said = " ".join([text, "a photo of a human face an person with hair and wearing", *phrases]).lower()
    words = ["<pad>", "<unk>", *sorted(set(re.findall(pattern, said))), *last]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(pattern), "removed", invert=True)
    if end:
        tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", len(words) - 1)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", pad_token="<pad>", model_max_length=length,
                                   **dict(eos_token="</s>") if end else {})


@torch.no_grad()
def judge(run, held, draw, faces: int = 512) -> dict:
    """`draw(captions, first)` -> pictures, for the captions of half of the held-out faces, as reader b sees them: share of
    attributes that are as the caption says, and fid_toy to the other half, beside that between the two halves."""
    reader, batch = metrics.load_reader("b", run.cfg.readers).to(run.device), held.held_out(faces)
    if not run.main or "attributes" not in batch:
        return {}
    count = len(batch["hq"]) // 2
    places = tqdm(torch.arange(count).split(32), "judging", disable=None)
    captions = captions_of(batch, whole=True)
    drawn = torch.cat([draw([captions[i] for i in rows], int(rows[0])).cpu() for rows in places])
    features = [torch.cat([reader.features(x.to(run.device)) for x in shown.split(64)])
                for shown in (drawn, batch["hq"][count:], batch["hq"][:count])]
    read = torch.cat([reader.probabilities(x.to(run.device)).cpu() for x in drawn.split(64)])
    found = dict(attributes=((read > 0.5) == (batch["attributes"][:count] > 0.5)).float().mean().item(),
                 fid_toy=metrics.frechet_distance(*features[:2]).item(),
                 fid_toy_real=metrics.frechet_distance(*features[2:0:-1]).item())
    run.say(str(found))
    return {name: round(value, 3) for name, value in found.items()}


def publish(run, folder, write, **about) -> None:
    """`write(folder)` under a temporary name, then renamed, with an about.json: `folder` never holds half of it."""
    folder = Path(folder)
    if not run.main:
        return
    part, cfg = folder.with_name(f".{folder.name}.part"), run.cfg
    shutil.rmtree(part, ignore_errors=True)
    write(part)
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, cwd=Path(__file__).parent)
    (part / "about.json").write_text(json.dumps(dict(
        command=" ".join(["python -m toy.backbones", *sys.argv[1:]]), seed=cfg.seed, **about,
        device=str(run.device), data=cfg.data or "data/toy", commit=commit.stdout.strip()),
        indent=1))
    for file in part.rglob("*"):                                  # diffusers writes weights for their owner alone
        file.chmod(0o755 if file.is_dir() else 0o644)
    shutil.rmtree(folder, ignore_errors=True)
    part.rename(folder)
    run.say(f"written: {folder}")


# ------------------------------------------------------------------------------------------------ the shared autoencoder

KL = dict(block_out_channels=(24, 48, 64), layers_per_block=1, latent_channels=16, norm_num_groups=8)


def kl_autoencoder(sizes: dict = KL):
    """FLUX's AutoencoderKL, small. Without attention, so that it can be trained on crops."""
    from diffusers import AutoencoderKL
    levels = len(sizes["block_out_channels"])
    return AutoencoderKL(
        **sizes, down_block_types=("DownEncoderBlock2D",) * levels, up_block_types=("UpDecoderBlock2D",) * levels,
        use_quant_conv=False, use_post_quant_conv=False, shift_factor=0.0, scaling_factor=1.0, mid_block_add_attention=False)


def train_vae(run, faces, held, sizes: dict = KL):
    """The autoencoder of `sd` and `flux`, on random crops; then the scale that gives its latents a variance of 1."""
    vae, reader = kl_autoencoder(sizes).to(run.device), metrics.load_reader("a", run.cfg.readers).to(run.device)

    def loss_of(batch):
        hq = random_crop(batch["hq"][:8], min(32, batch["hq"].shape[-1]))
        posterior = vae.encode(hq).latent_dist
        loss, kl = copy_loss(reader, vae.decode(posterior.sample()).sample, hq), posterior.kl().float().mean()
        return loss + 1e-6 * kl, dict(loss=loss, kl=kl)

    @torch.no_grad()
    def show():
        copied = vae.decode(vae.encode(hq).latent_dist.mean).sample
        run.say(f"{metrics.mean_psnr(copied, hq):.2f} dB; slope of luma, red-blue, green-magenta: "
                + ", ".join(f"{slope:.3f}" for slope in colour_slopes(hq, copied)))
        return {"hq": hq[:8], "autoencoder": copied[:8]}

    hq = held.held_out(64)["hq"].to(run.device)
    fit(run, "vae", {"vae": vae.train()}, faces, run.cfg.vae_steps, 5e-3, loss_of, show=show)
    with torch.no_grad():
        z = vae.encode(faces.training(64, run.cfg.seed, 0, degraded=False)["hq"].to(run.device)).latent_dist.mean
    vae.register_to_config(scaling_factor=1 / z.square().mean().sqrt().item())
    publish(run, Path(run.cfg.output) / "vae", lambda path: vae.to(torch.bfloat16).save_pretrained(path),
            vae_steps=run.cfg.vae_steps)


def open_vae(cfg, device):
    """The autoencoder of toy.backbones vae, which is trained first; or that which sd and flux have in the repository."""
    from diffusers import AutoencoderKL
    places = [Path(cfg.output) / name for name in ("vae", "sd/vae", "flux/vae")]
    vae = AutoencoderKL.from_pretrained(next((p for p in places if p.exists()), places[0]), low_cpu_mem_usage=False)
    return vae.float().to(device).requires_grad_(False)


# ------------------------------------------------------------------------------------------------ command line


def train_method(cfg, name: str, folder: str) -> None:
    """A method's own toy training, or Latent-PMRF's posterior mean; what `sample` needs of it, in bf16."""
    module = importlib.import_module("latent_pmrf" if name == "swinir" else name)
    more = dict(stage="mmse", mmse="", mmse_steps=cfg.steps) if name == "swinir" else {}
    module.train(module.Train(**module.TOY_VALUES | more | dict(
        output=folder, data=cfg.data, validation_data=cfg.validation_data, device=cfg.device, seed=cfg.seed,
        resume_from_checkpoint="latest")))

    def write(target):
        target.mkdir(parents=True)
        shutil.copy(Path(folder) / "config.json", target)
        for path in Path(folder).glob("*.safetensors"):
            if name == "latent_pmrf" and path.stem == "mmse" and module.TOY_VALUES["mmse"]:
                continue                                          # `sample` takes the stand-in's
            state = {key: t.bfloat16() if t.is_floating_point() else t for key, t in read_weights(path).items()}
            save_part(target / path.name, state)
    publish(Run(replace(cfg, output=folder, resume_from_checkpoint="latest")), Path(cfg.output) / name, write)


def train(cfg: Settings) -> None:
    """The stand-ins asked for, in the order of NAMES."""
    for name in [name for name in NAMES if name in cfg.which]:
        folder = str(Path(cfg.work) / name)
        if name == "readers":
            from toy import readers
            readers.train(readers.Train(output=cfg.output, data=cfg.data, validation_data=cfg.validation_data,
                                        device=cfg.device, seed=cfg.seed, resume_from_checkpoint="latest"))
        elif name == "swinir" or name in METHODS:
            train_method(cfg, name, folder)
        else:
            run = Run(replace(cfg, output=folder, resume_from_checkpoint="latest"))
            run.cfg = replace(run.cfg, output=cfg.output)
            faces, held = open_faces(cfg, mirror=name == "vae")
            if name == "vae":
                train_vae(run, faces, held)
            else:
                importlib.import_module(f"toy.{name}").train(run, faces, held)


def main() -> None:
    """`python -m toy.backbones sd flux --flags` is short for `train --which sd flux --flags`."""
    names = list(itertools.takewhile(NAMES.__contains__, sys.argv[1:]))
    rest = sys.argv[1 + len(names):]
    command_line(__doc__, {"train": (Settings, {"toy": TOY}, train)}, ["train", *(["--which", *names] if names else []), *rest])


if __name__ == "__main__":
    main()
