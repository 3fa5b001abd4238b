"""Trains the toy stand-in of Stable Diffusion 2.1: an autoencoder, then a text-to-face latent diffusion model.

    python -m toy.sd --steps 400 --vae_steps 1600 -o toy/weights/sd

writes a folder that diffusers' StableDiffusionPipeline reads (vae, unet, text_encoder, tokenizer, scheduler) and samples.png.
Beside them config.json and log.jsonl hold the command, the seed and the device. honestface.py loads this folder and the
released one by the same lines. Nothing here is needed to understand a method.

The captions of the pictures are the prompts. Without --data the toy faces are drawn into data/toy once. A stopped run goes on
with --resume_from_checkpoint latest.
"""
import functools
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path

# common comes first: it sets up OpenMP before torch is imported
from common import (ATTRIBUTES, EMA, TOY, Run, TrainFlags, command_line, lr_schedule, make_optimizer, open_faces, random_crop,
                    verbalise, write_grid)

import torch
import torch.nn as nn
import torch.nn.functional as F
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers
from transformers import CLIPTextConfig, CLIPTextModel, PreTrainedTokenizerFast

import metrics

TOKENS = 77                                                       # of a prompt, as Stable Diffusion's


@dataclass(frozen=True)
class Settings(TrainFlags):
    """Train the toy stand-in of Stable Diffusion."""
    output: str = "toy/weights/sd"         # folder of the weights, the log and the state
    steps: int = 400                       # of the diffusion model
    vae_steps: int = 1600                  # of the autoencoder
    learning_rate: float = 2e-3            # of the diffusion model
    vae_learning_rate: float = 5e-3        # of the autoencoder
    vae_crop: int = 32                     # side of the random crop the autoencoder sees
    kl_weight: float = 1e-6                # of the KL summed over a latent
    latent_channels: int = 16              # c of the latent; SD 4
    vae_widths: tuple[int, ...] = (24, 48, 64)  # channels per level; SD 128 256 512 512
    unet_widths: tuple[int, ...] = (96, 128)  # channels per level, multiples of 32; SD 320 640 1280 1280
    prompt_dim: int = 128                  # width of a prompt token; SD 2.1 1024


# ------------------------------------------------------------------------------------------------ networks


def make_tokenizer() -> PreTrainedTokenizerFast:
    """Word-level tokenizer: its vocabulary is what `verbalise` can say."""
    phrases = [phrase for row in ATTRIBUTES for phrase in row[2:]] + ["a photo of a human face an person with hair and wearing"]
    words = ["<pad>", "<unk>"] + sorted(set(" ".join(phrases).split()))
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("[^a-z]+"), "removed")
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", unk_token="<unk>", model_max_length=TOKENS)


def make_networks(cfg) -> dict:
    """{"vae", "unet", "text_encoder"} of SD's classes, random. The finest level has no attention: half the time."""
    levels, lower, heads = len(cfg.vae_widths), len(cfg.unet_widths) - 1, tuple(width // 32 for width in cfg.unet_widths)
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * levels, up_block_types=("UpDecoderBlock2D",) * levels, norm_num_groups=8,
        block_out_channels=cfg.vae_widths, latent_channels=cfg.latent_channels, sample_size=cfg.image_size,
        mid_block_add_attention=False)
    unet = UNet2DConditionModel(
        sample_size=cfg.image_size // 2 ** (levels - 1), in_channels=cfg.latent_channels, out_channels=cfg.latent_channels,
        block_out_channels=cfg.unet_widths, layers_per_block=1, norm_num_groups=16, use_linear_projection=True,
        down_block_types=("DownBlock2D",) + ("CrossAttnDownBlock2D",) * lower,
        up_block_types=("CrossAttnUpBlock2D",) * lower + ("UpBlock2D",), attention_head_dim=heads,
        cross_attention_dim=cfg.prompt_dim)
    text = CLIPTextConfig(
        vocab_size=len(make_tokenizer()), hidden_size=cfg.prompt_dim, intermediate_size=2 * cfg.prompt_dim, num_hidden_layers=1,
        num_attention_heads=max(1, cfg.prompt_dim // 32), max_position_embeddings=TOKENS, projection_dim=cfg.prompt_dim,
        pad_token_id=0, bos_token_id=0, eos_token_id=0)
    return dict(vae=vae, unet=unet, text_encoder=CLIPTextModel(text))


def make_scheduler() -> DDIMScheduler:
    """Stable Diffusion's 1000 noise levels."""
    return DDIMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False,
                         set_alpha_to_one=False, steps_offset=1)


def save_folder(path: Path, write) -> None:
    """`write(folder)` under a temporary name, then renamed: `path` never holds half of it."""
    part = path.with_name(f".{path.name}.part")
    shutil.rmtree(part, ignore_errors=True)
    write(part)
    for file in part.rglob("*.safetensors"):                      # diffusers writes them for their owner alone
        file.chmod(0o644)
    shutil.rmtree(path, ignore_errors=True)
    part.rename(path)


# ------------------------------------------------------------------------------------------------ training


def train_autoencoder(cfg, run, faces, vae) -> None:
    """L1 + a tenth of the reader's LPIPS, which sums five stages, + KL, on random crops; then the scale of the latents."""
    vae.train()
    reader = metrics.load_reader("a", cfg.readers).to(run.device)
    optimizer, steps = make_optimizer(cfg, vae.parameters(), cfg.vae_learning_rate), min(cfg.vae_steps, cfg.max_train_steps)
    modules, factor = {"vae": vae}, lr_schedule(cfg, steps)
    ema = EMA(modules, cfg.ema_decay)
    first, clean = run.load("vae", modules, ema, optimizer), functools.partial(faces.training, degraded=False)
    for step, batch in run.batches(clean, "vae", first, steps):
        hq = random_crop(batch["hq"], cfg.vae_crop)
        with run.autocast():
            posterior = vae.encode(hq).latent_dist
            copied = vae.decode(posterior.sample()).sample.float()
        l1, kl = F.l1_loss(copied, hq), posterior.kl().float().mean()
        perceptual = metrics.reader_lpips(reader, copied, hq).mean()
        optimizer.zero_grad()
        (l1 + 0.1 * perceptual + cfg.kl_weight * kl).backward()
        run.average_gradients(modules)
        nn.utils.clip_grad_norm_(vae.parameters(), cfg.max_grad_norm)
        for group in optimizer.param_groups:
            group["lr"] = cfg.vae_learning_rate * factor(step)
        optimizer.step()
        ema.update(step)
        run.log("vae", step, l1=l1, perceptual=perceptual, kl=kl)
        run.save("vae", step, modules, ema, optimizer)
    vae.load_state_dict(ema["vae"])
    with torch.no_grad():
        hq = faces.training(64, cfg.seed, 0, degraded=False)["hq"].to(run.device)
        vae.register_to_config(scaling_factor=1 / vae.encode(hq).latent_dist.mean.std().item())


def train_diffusion(cfg, run, faces, nets) -> None:
    """Predict the noise in latents of all 1000 levels, from the caption. UNet and text encoder are trained together."""
    unet, text, vae, tokenizer = nets["unet"].train(), nets["text_encoder"].train(), nets["vae"], make_tokenizer()
    modules, steps = {"unet": unet, "text_encoder": text}, min(cfg.steps, cfg.max_train_steps)
    parameters = [p for module in modules.values() for p in module.parameters()]
    tables = [module.weight for module in text.modules() if isinstance(module, nn.Embedding)]
    optimizer = make_optimizer(cfg, parameters, cfg.learning_rate, tables=tables)
    factor, ema = lr_schedule(cfg, steps), EMA(modules, cfg.ema_decay)
    bars = make_scheduler().alphas_cumprod.to(run.device)
    first, clean = run.load("diffusion", modules, ema, optimizer), functools.partial(faces.training, degraded=False)
    for step, batch in run.batches(clean, "diffusion", first, steps):
        with torch.no_grad(), run.autocast():
            z = vae.encode(batch["hq"]).latent_dist.sample().float() * vae.config.scaling_factor
        t, noise = torch.randint(len(bars), (len(z),), device=z.device), torch.randn_like(z)
        a = bars[t].view(-1, 1, 1, 1)
        with run.autocast():
            prompt = text(tokens_of(tokenizer, captions_of(batch)).to(z.device)).last_hidden_state
            estimate = unet(a.sqrt() * z + (1 - a).sqrt() * noise, t, encoder_hidden_states=prompt).sample
        loss = F.mse_loss(estimate.float(), noise)
        optimizer.zero_grad()
        loss.backward()
        run.average_gradients(modules)
        nn.utils.clip_grad_norm_(parameters, cfg.max_grad_norm)
        for group in optimizer.param_groups:
            group["lr"] = cfg.learning_rate * factor(step)
        optimizer.step()
        ema.update(step)
        run.log("diffusion", step, noise=loss)
        run.save("diffusion", step, modules, ema, optimizer)
    for name, module in modules.items():
        module.load_state_dict(ema[name])
        module.eval()


def captions_of(batch) -> list:
    """Captions of a batch: those of captions.json, else what the attributes say, else none."""
    if "captions" in batch:
        return batch["captions"]
    return [verbalise(row) for row in batch["attributes"]] if "attributes" in batch else [""] * len(batch["hq"])


def tokens_of(tokenizer, captions):
    """(B, 77) token ids."""
    return tokenizer(captions, padding="max_length", max_length=TOKENS, truncation=True, return_tensors="pt").input_ids


def train_settings(cfg: Settings) -> None:
    """Autoencoder, then diffusion model; what a resumed run finds finished is kept."""
    run, folder = Run(cfg, ("latent_channels", "vae_widths", "unet_widths", "prompt_dim")), Path(cfg.output)
    if cfg.resume_from_checkpoint and (folder / "model_index.json").exists():
        return run.say(f"{folder} is finished")
    faces, held = open_faces(cfg, mirror=True)
    nets = {name: net.to(run.device) for name, net in make_networks(cfg).items()}
    if cfg.resume_from_checkpoint and (folder / "vae").exists():
        nets["vae"] = AutoencoderKL.from_pretrained(folder / "vae", low_cpu_mem_usage=False).float().to(run.device)
    else:
        train_autoencoder(cfg, run, faces, nets["vae"])
        if run.main:
            save_folder(folder / "vae", nets["vae"].save_pretrained)
        run.finish("vae", {})
    nets["vae"].eval().requires_grad_(False)
    train_diffusion(cfg, run, faces, nets)
    if not run.main:
        return
    pipeline = StableDiffusionPipeline(nets["vae"], nets["text_encoder"], make_tokenizer(), nets["unet"], make_scheduler(),
                                       None, None, requires_safety_checker=False)
    write_samples(pipeline, held.held_out(8), folder / "samples.png", cfg.seed)
    pipeline.to(torch.bfloat16)
    for part in ("vae", "unet", "text_encoder", "tokenizer", "scheduler"):
        save_folder(folder / part, getattr(pipeline, part).save_pretrained)
    pipeline.save_config(folder)                                  # model_index.json
    run.finish("diffusion", {})
    run.say(f"weights and samples.png in {folder}")


@torch.no_grad()
def write_samples(pipeline, batch, path, seed: int) -> None:
    """A grid: faces, what the autoencoder makes of them, and faces drawn from their captions in 25 steps."""
    pipeline.set_progress_bar_config(disable=True)
    hq, vae, rng = batch["hq"].to(pipeline.device), pipeline.vae, torch.Generator().manual_seed(seed)
    copied = vae.decode(vae.encode(hq).latent_dist.mean).sample
    drawn = pipeline(captions_of(batch), num_inference_steps=25, guidance_scale=1.0, generator=rng, output_type="pt").images
    write_grid(path, {"hq": hq, "autoencoder": copied, "from its caption": drawn * 2 - 1})


def train(output: str, steps: int, data: str = "", **flags) -> None:
    """Train on a folder of faces and write `output`. flags: other fields of `Settings`."""
    train_settings(Settings(**(TOY | dict(output=output, steps=steps, data=data) | flags)))


if __name__ == "__main__":
    command_line(__doc__, {"train": (Settings, {"toy": TOY}, train_settings)}, ["train", *sys.argv[1:]])
