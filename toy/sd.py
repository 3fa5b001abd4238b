"""The toy stand-in of Stable Diffusion 2.1: `python -m toy.backbones vae sd` trains it into toy/weights/sd."""
import shutil
from pathlib import Path

# toy.backbones comes first: it sets up OpenMP before torch is imported
from toy.backbones import KL, captions_of, encode_all, fit, judge, kl_autoencoder, open_vae, publish, word_tokenizer

import torch
import torch.nn as nn
import torch.nn.functional as F

TOKENS = 77                                                       # of a prompt, as Stable Diffusion's
SIZES = dict(vae=KL, unet_widths=(96, 128), prompt_dim=128)       # multiples of 32; SD 320 640 1280 1280, 1024


def new_folder(folder, vae=None, seed: int = 0, sizes: dict = SIZES) -> None:
    """Write a Stable Diffusion of random weights in the layout of the release, around `vae` if one is given."""
    from diffusers import DDIMScheduler, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel
    torch.manual_seed(seed)
    widths, dim, words = sizes["unet_widths"], sizes["prompt_dim"], word_tokenizer(TOKENS)
    lower, vae = len(widths) - 1, vae or kl_autoencoder(sizes["vae"])
    unet = UNet2DConditionModel(                                  # the finest level has no attention: half the time
        sample_size=16, in_channels=vae.config.latent_channels, out_channels=vae.config.latent_channels, layers_per_block=1,
        block_out_channels=widths, norm_num_groups=16, use_linear_projection=True, cross_attention_dim=dim,
        down_block_types=("DownBlock2D",) + ("CrossAttnDownBlock2D",) * lower, attention_head_dim=[w // 32 for w in widths],
        up_block_types=("CrossAttnUpBlock2D",) * lower + ("UpBlock2D",))
    text = CLIPTextModel(CLIPTextConfig(
        vocab_size=len(words), hidden_size=dim, intermediate_size=2 * dim, num_hidden_layers=1, num_attention_heads=dim // 32,
        max_position_embeddings=TOKENS, projection_dim=dim, pad_token_id=0, bos_token_id=0, eos_token_id=len(words) - 1))
    scheduler = DDIMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False,
                              set_alpha_to_one=False, steps_offset=1)                       # Stable Diffusion's 1000 levels
    for name, part in dict(vae=vae, unet=unet, text_encoder=text, tokenizer=words, scheduler=scheduler).items():
        part.save_pretrained(Path(folder) / name)
    (Path(folder) / "model_index.json").write_text('''{"_class_name": "StableDiffusionPipeline",
 "feature_extractor": [null, null], "safety_checker": [null, null], "requires_safety_checker": false,
 "scheduler": ["diffusers", "DDIMScheduler"], "text_encoder": ["transformers", "CLIPTextModel"],
 "tokenizer": ["transformers", "PreTrainedTokenizerFast"], "unet": ["diffusers", "UNet2DConditionModel"],
 "vae": ["diffusers", "AutoencoderKL"]}''')


def train(run, faces, held, sizes: dict = SIZES) -> None:
    """UNet and text encoder: predict the noise in latents of all 1000 levels, from the caption."""
    from diffusers import StableDiffusionPipeline
    device, new = run.device, run.folder / "new"
    new_folder(new, open_vae(run.cfg, "cpu"), run.cfg.seed, sizes)
    pipeline = StableDiffusionPipeline.from_pretrained(new, low_cpu_mem_usage=False).to(device)
    pipeline.set_progress_bar_config(disable=True)
    vae, unet, text, tokenizer = pipeline.vae.eval(), pipeline.unet, pipeline.text_encoder, pipeline.tokenizer
    vae.requires_grad_(False), unet.train(), text.train()
    tables = [module.weight for module in text.modules() if isinstance(module, nn.Embedding)]
    bars = pipeline.scheduler.alphas_cumprod.to(device)

    def loss_of(batch):
        z = latents[batch["place"]].to(device)
        t, noise = torch.randint(len(bars), (len(z),), device=device), torch.randn_like(z)
        a = bars[t].view(-1, 1, 1, 1)
        tokens = tokenizer(captions_of(batch), padding="max_length", max_length=TOKENS, truncation=True, return_tensors="pt")
        prompt = text(tokens.input_ids.to(device)).last_hidden_state
        estimate = unet(a.sqrt() * z + (1 - a).sqrt() * noise, t, encoder_hidden_states=prompt).sample
        loss = F.mse_loss(estimate.float(), noise)
        return loss, dict(noise=loss)

    def draw(captions, first):
        rng = torch.Generator().manual_seed(first)
        return pipeline(captions, num_inference_steps=25, guidance_scale=2.0, generator=rng, output_type="pt").images * 2 - 1

    def show():
        return {"a real face": batch["hq"], "drawn from its caption": draw(captions_of(batch, whole=True), 0)}

    latents = encode_all(run, faces, lambda hq: vae.encode(hq).latent_dist.mean.float() * vae.config.scaling_factor)
    batch = held.held_out(12)
    fit(run, "diffusion", {"unet": unet, "text_encoder": text}, faces, run.cfg.steps, 2e-3, loss_of, tables, show=show)

    def write(folder):
        shutil.copytree(new, folder)
        for name, module in (("unet", unet), ("text_encoder", text), ("vae", vae)):
            module.to(torch.bfloat16).save_pretrained(folder / name)
    publish(run, Path(run.cfg.output) / "sd", write, steps=run.cfg.steps, batch_size=run.cfg.batch_size,
            **judge(run, held, draw))
