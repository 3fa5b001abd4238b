"""Trains the tiny FLUX that stands in for FLUX.1-dev: text to faces of 64 px, in the folder layout of diffusers.

    python -m toy.flux --steps 1200 --vae_steps 1200

writes toy/weights/flux: vae/ (AutoencoderKL, 16 channels), transformer/ (FluxTransformer2DModel), text_encoder/ and tokenizer/
(CLIP), text_encoder_2/ and tokenizer_2/ (T5), all in bf16. The words are those of `common.verbalise`. State, log and pictures
are in runs/toy_flux: a stopped command goes on where it was. On two CPU cores it takes about 10 minutes.

Nothing here is needed to understand A2BFR, which starts from a FLUX that is trained already.
"""
import argparse
import functools
import sys
from pathlib import Path

# common comes first: it sets up OpenMP before torch is imported
from common import (ATTRIBUTES, EMA, TOY, Run, TrainFlags, UserError, load_strict, lr_schedule, make_optimizer, open_faces,
                    random_crop, read_weights, verbalise, write_grid)

import torch
import torch.nn as nn

import a2bfr
import metrics

SIZES = dict(
    vae=dict(block_out_channels=(16, 32, 64), layers_per_block=1, latent_channels=16, norm_num_groups=8),
    transformer=dict(num_layers=2, num_single_layers=4, attention_head_dim=32, num_attention_heads=4,
                     axes_dims_rope=(4, 14, 14)),
    text=dict(width=64, layers=1, heads=4, length=32))


def word_tokenizer(length: int):
    """A word-level tokenizer of transformers: what `verbalise` and TEMPLATE say, no case, no punctuation, an end token."""
    from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast
    phrases = [phrase for row in ATTRIBUTES for phrase in row[2:]] + ["a photo of a human face an person with hair and wearing"]
    words = ["<pad>", "<unk>", *sorted(set(" ".join(phrases).split())), "</s>"]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("[^a-z0-9]+"), "removed")
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", len(words) - 1)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", pad_token="<pad>", eos_token="</s>",
                                   model_max_length=length)


def new_folder(folder, seed: int = 0, sizes: dict = SIZES) -> None:
    """Write a FLUX of random weights in the layout of the release."""
    from diffusers import AutoencoderKL, FluxTransformer2DModel
    from transformers import CLIPTextConfig, CLIPTextModel, T5Config, T5EncoderModel
    torch.manual_seed(seed)
    text, levels = sizes["text"], len(sizes["vae"]["block_out_channels"])
    words, width = word_tokenizer(text["length"]), text["width"]
    last = len(words) - 1
    vae = AutoencoderKL(
        **sizes["vae"], down_block_types=("DownEncoderBlock2D",) * levels, up_block_types=("UpDecoderBlock2D",) * levels,
        use_quant_conv=False, use_post_quant_conv=False, shift_factor=0.0, scaling_factor=1.0,
        mid_block_add_attention=False)                             # no attention: it trains on crops
    transformer = FluxTransformer2DModel(
        **sizes["transformer"], in_channels=4 * sizes["vae"]["latent_channels"], joint_attention_dim=width,
        pooled_projection_dim=width, guidance_embeds=False)
    clip = CLIPTextModel(CLIPTextConfig(
        vocab_size=last + 1, hidden_size=width, intermediate_size=2 * width, num_hidden_layers=text["layers"],
        num_attention_heads=text["heads"], max_position_embeddings=text["length"], pad_token_id=0, bos_token_id=1,
        eos_token_id=last))
    t5 = T5EncoderModel(T5Config(
        vocab_size=last + 1, d_model=width, d_kv=width // text["heads"], d_ff=2 * width, num_layers=text["layers"],
        num_heads=text["heads"], dropout_rate=0.0))
    for name, part in dict(vae=vae, transformer=transformer, text_encoder=clip, text_encoder_2=t5, tokenizer=words,
                           tokenizer_2=words).items():
        part.save_pretrained(Path(folder) / name)


def train_vae(cfg, run, faces, codec, steps: int) -> None:
    """The autoencoder, on random crops: L1 + features of reader_a + KL. Then its latents are measured, to be normalised."""
    vae, reader = codec.vae.requires_grad_(True), metrics.load_reader("a").to(run.device)
    optimizer, factor = make_optimizer(cfg, vae.parameters(), 5e-3, betas=(0.9, 0.99)), lr_schedule(cfg, steps)
    modules = {"vae": vae}
    ema = EMA(modules, cfg.ema_decay)
    first = run.load("vae", modules, ema, optimizer)
    for step, batch in run.batches(functools.partial(faces.training, degraded=False), "vae", first, steps):
        hq = random_crop(batch["hq"][:8], 32)
        with run.autocast():
            posterior = vae.encode(hq).latent_dist
            seen = vae.decode(posterior.sample()).sample.float()
        l1, kl, perceptual = (seen - hq).abs().mean(), posterior.kl().mean(), metrics.feature_distance(reader, seen, hq)
        optimizer.zero_grad()
        (l1 + 0.05 * perceptual + 1e-6 * kl).backward()
        nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        for group in optimizer.param_groups:
            group["lr"] = 5e-3 * factor(step)
        optimizer.step()
        ema.update(step)
        run.log("vae", step, l1=l1, perceptual=perceptual, kl=kl)
        run.save("vae", step, modules, ema, optimizer)
    run.finish("vae", ema, later=("transformer", "text_encoder", "text_encoder_2"))


@torch.no_grad()
def normalise(codec, hq) -> None:
    """Shift and scale that make the latents of hq (N, 3, S, S) zero-mean and of unit variance, into the VAE's config."""
    codec.shift.fill_(0), codec.scale.fill_(1)
    z = torch.cat([codec.encode(x) for x in hq.split(16)])
    codec.shift.fill_(z.mean()), codec.scale.fill_(1 / z.std())
    codec.vae.register_to_config(shift_factor=codec.shift.item(), scaling_factor=codec.scale.item())


def captions(attributes) -> list:
    """A caption per row of (B, 12). Half leave attributes out, so that short prompts are learned; a tenth say nothing."""
    count = len(attributes)
    quiet = (torch.rand(count, 1) < 0.5) & (torch.rand(count, len(ATTRIBUTES)) < 0.5)
    empty, template = (torch.rand(count) < 0.1).tolist(), (torch.rand(count) < 0.5).tolist()
    said = map(verbalise, torch.where(quiet, 0.5, attributes.cpu()))
    return [(a2bfr.TEMPLATE if template[i] else "") if empty[i] else caption for i, caption in enumerate(said)]


def train_prior(cfg, run, faces, nets, steps: int) -> None:
    """The transformer with both text encoders, by flow matching; the autoencoder is frozen."""
    prior, text = nets["prior"].requires_grad_(True), nets["text"].requires_grad_(True)
    modules = {"transformer": prior, "text_encoder": text.clip, "text_encoder_2": text.t5}
    parameters = [p for module in modules.values() for p in module.parameters()]
    tables = [p for name, p in text.named_parameters() if any(word in name for word in ("embed", "shared", "relative"))]
    optimizer, factor = make_optimizer(cfg, parameters, 1.5e-2, tables=tables), lr_schedule(cfg, steps)
    ema = EMA(modules, cfg.ema_decay)
    first = run.load("prior", modules, ema, optimizer)
    for step, batch in run.batches(functools.partial(faces.training, degraded=False), "prior", first, steps):
        with torch.no_grad(), run.autocast():
            z0 = nets["codec"].encode(batch["hq"], torch.randn_like)
        prompts = captions(batch["attributes"])
        noise, t = torch.randn_like(z0), a2bfr.draw_times(len(z0), 4.0, z0.device)
        with run.autocast():
            v = a2bfr.velocity(nets, torch.lerp(z0, noise, t.view(-1, 1, 1)), t, a2bfr.Prompt(*text.encode(prompts)))
        loss = (v - (noise - z0)).square().mean()
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        for group in optimizer.param_groups:
            group["lr"] = 1.5e-2 * factor(step)
        optimizer.step()
        ema.update(step)
        run.log("prior", step, loss=loss)
        run.save("prior", step, modules, ema, optimizer)
    run.finish("prior", ema)


@torch.no_grad()
def report(run, nets, hq) -> None:
    """autoencoder.png and samples.png: six faces under each prompt of a2bfr.SHOWN. Prints how the colours come back."""
    codec, text = nets["codec"], nets["text"]
    seen = torch.cat([codec.decode(codec.encode(x)) for x in hq.split(16)]).clamp(-1, 1)
    axes = torch.tensor([[1.0, 1, 1], [1, 0, -1], [-1, 2, -1]], device=hq.device)              # luma, red-blue, green-magenta
    was, came = (torch.einsum("ac,bchw->abhw", axes, x).flatten(1) for x in (hq, seen))
    was, came = was - was.mean(1, keepdim=True), came - came.mean(1, keepdim=True)
    slopes = ((was * came).sum(1) / was.square().sum(1)).tolist()
    run.say(f"autoencoder: {metrics.mean_psnr(seen, hq):.2f} dB; slope of luma, red-blue, green-magenta: "
            + ", ".join(f"{slope:.2f}" for slope in slopes))
    write_grid(run.folder / "autoencoder.png", {"clean": hq.cpu(), "autoencoder": seen.cpu()})
    noise, columns = codec.noise(hq.shape[-1], list(range(6))), {}
    for title, said in a2bfr.SHOWN.items():
        prompt = a2bfr.Prompt(*text.encode([said] * len(noise)))
        z = a2bfr.euler_sample(lambda z, t: a2bfr.velocity(nets, z, t, prompt), noise, a2bfr.flux_sigmas(8, noise.shape[1]))
        columns[title] = codec.decode(z).clamp(-1, 1).cpu()
    write_grid(run.folder / "samples.png", columns)


def take(run, module, name: str) -> None:
    """A finished part, frozen."""
    load_strict(module, read_weights(run.folder / f"{name}.safetensors"), f"{run.folder}, {name}")
    module.requires_grad_(False)


def train(output="toy/weights/flux", steps=1200, vae_steps=1200, data="", seed=0, device="auto", work="runs/toy_flux",
          sizes=SIZES, **flags) -> None:
    """Train autoencoder, then prior and text encoders, on --data; write the folder. flags: fields of TrainFlags."""
    options = dict(TOY, output=work, data=data, seed=seed, device=device, batch_size=32, resume_from_checkpoint="latest")
    cfg = TrainFlags(**options | flags)
    run = Run(cfg)
    new = run.folder / "new"
    new_folder(new, seed, sizes)
    faces, held = open_faces(cfg)
    nets = dict(a2bfr.load_flux(new, torch.float32), text=a2bfr.FluxText(new, dtype=torch.float32))
    nets = {name: net.to(run.device) for name, net in nets.items()}
    hq = held.held_out(64)["hq"].to(run.device)
    vae, prior, text = nets["codec"].vae, nets["prior"], nets["text"]
    parts = dict(vae=vae, transformer=prior, text_encoder=text.clip, text_encoder_2=text.t5)

    if not run.part("vae"):
        train_vae(cfg, run, faces, nets["codec"], vae_steps)
    take(run, vae, "vae")
    normalise(nets["codec"], hq)
    if not run.part("text_encoder_2"):                              # the last file of the stage
        train_prior(cfg, run, faces, nets, steps)
    for name in list(parts)[1:]:
        take(run, parts[name], name)
    report(run, nets, hq)
    if run.main:
        for name, part in parts.items():
            part.to(torch.bfloat16).save_pretrained(Path(output) / name)
        for name in ("tokenizer", "tokenizer_2"):
            word_tokenizer(sizes["text"]["length"]).save_pretrained(Path(output) / name)
        run.say(f"written: {output}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("-o", "--output", default="toy/weights/flux", help="folder to write")
    parser.add_argument("--steps", type=int, default=1200, help="of the prior")
    parser.add_argument("--vae_steps", type=int, default=1200, help="of the autoencoder")
    parser.add_argument("--data", default="", help="folder of faces with attributes.csv (default: the toy world)")
    parser.add_argument("--work", default="runs/toy_flux", help="folder of state, log and pictures")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="auto")
    try:
        train(**vars(parser.parse_args()))
    except UserError as error:                                      # stopped by Ctrl-C, or not finite
        sys.exit(f"error: {error}")
