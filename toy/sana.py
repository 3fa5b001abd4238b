"""Trains small stand-ins of the networks that Pref-Restore starts from: DC-AE, TA-Tok, Qwen3 and SANA (BLIP3o-NEXT).

    python -m toy.sana --steps 450

writes toy/weights/sana in the layouts of the releases, so that `pref_restore.load_release` reads it like them:

    config.json, model.safetensors, tokenizer files    BLIP3o-NEXT's layout: Qwen3, semantic connector, TA-Tok
    transformer/, vae/                                 diffusers folders: SANA, DC-AE

Two phases of --steps steps. `tokenizers`: DC-AE and TA-Tok learn to rebuild clean and degraded faces. `prior`: Qwen3 and
SANA learn to copy a face from its tokens and to draw one from its caption. Nothing here is needed to understand the method.
"""
import argparse
import json
import re
from pathlib import Path

from common import (ATTRIBUTES, Faces, load_strict, make_optimizer, mix, read_torch, save_part, warmup_cosine, whole_file,
                    write_grid, write_json)  # first: it sets up torch's threads

import torch
import torch.nn as nn
import torch.nn.functional as F
from tqdm import tqdm

import metrics
import pref_restore as pr


def sizes_of(size=64, token_side=4, codes=512, code_dim=32, siglip_width=144, llm_width=128, llm_layers=4, channels=32,
             vae_widths=(32, 32, 64, 128), heads=4, layers=6) -> dict:
    """Small networks of the very classes of the paper, for faces of `size` px. siglip_width: a multiple of 72, a head.

    DIFFERS: SANA gets sine positions, which stand in for what its 3x3 convolutions learn in pre-training; through the
    shared patch embedding the texture tokens get them too.
    """
    width, levels = 32 * heads, len(vae_widths)
    blocks, depths = ("ResBlock",) * (levels - 1) + ("EfficientViTBlock",), (0, 1) + (2,) * (levels - 2)
    return dict(
        llm=dict(hidden_size=llm_width, intermediate_size=3 * llm_width, num_hidden_layers=llm_layers,
                 num_attention_heads=llm_width // 32, num_key_value_heads=max(1, llm_width // 64), head_dim=32,
                 tie_word_embeddings=True, max_position_embeddings=2048, rms_norm_eps=1e-6),
        sana=dict(in_channels=channels, out_channels=channels, num_attention_heads=heads, attention_head_dim=32,
                  num_layers=layers, num_cross_attention_heads=heads, cross_attention_head_dim=32, cross_attention_dim=width,
                  caption_channels=width, mlp_ratio=2.5, sample_size=size // 2 ** (levels - 1), patch_size=1,
                  qk_norm="rms_norm_across_heads", interpolation_scale=1.0),
        vae=dict(latent_channels=channels, attention_head_dim=32, encoder_block_types=blocks, decoder_block_types=blocks,
                 encoder_block_out_channels=vae_widths, decoder_block_out_channels=vae_widths, encoder_layers_per_block=depths,
                 decoder_layers_per_block=depths, encoder_qkv_multiscales=((),) * levels,
                 decoder_qkv_multiscales=((),) * levels, upsample_block_type="interpolate", downsample_block_type="conv",
                 scaling_factor=1.0),
        tatok=dict(siglip=dict(pr.SO400M, hidden_size=siglip_width, intermediate_size=2 * siglip_width, num_hidden_layers=4,
                               num_attention_heads=siglip_width // pr.HEAD, image_size=size, patch_size=size // token_side),
                   codes=codes, code_dim=code_dim))


def word_tokenizer():
    """A tokenizer of transformers: the words and marks of the chat template, and the words of `verbalise`."""
    from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers
    from transformers import PreTrainedTokenizerFast
    pieces = r"<\|\w+\|>|\n|[a-z]+|[.:]"
    phrases = [phrase for row in ATTRIBUTES for phrase in row[2:]] + ["a photo of a human face an person with hair and wearing"]
    text = " ".join([pr.SYSTEM, pr.USER, pr.END, pr.ASSISTANT, pr.ASK, pr.ASK_CAPTION, pr.COPY, pr.DRAW, *phrases])
    words = ["<pad>", "<unk>", *sorted(set(re.findall(pieces, text.lower())))]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(pieces), "removed", invert=True)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", unk_token="<unk>")


def build(sizes: dict) -> tuple:
    """(PrefRestore, Vocabulary) of random weights."""
    vocab = pr.Vocabulary(word_tokenizer(), sizes["tatok"]["codes"])
    sizes = dict(sizes, llm=dict(sizes["llm"], vocab_size=vocab.size))
    return pr.PrefRestore(sizes), vocab


def save(folder, model, vocab, dtype=torch.bfloat16) -> None:
    """The folder of the page above."""
    from diffusers import AutoencoderDC, SanaTransformer2DModel
    folder, state = Path(folder), {}
    for prefix, module in (("model.", model.integrator.llm), ("model.diffusion_connector.", model.integrator.connector),
                           ("model.vision_tower.vision_tower.", model.tatok)):
        state |= {prefix + name: tensor.to(dtype) for name, tensor in module.state_dict().items()}
    save_part(folder / "model.safetensors", state)
    sana = SanaTransformer2DModel.from_config(model.sana.config)
    vae = AutoencoderDC.from_config(dict(model.vae.config, scaling_factor=model.latent_scale.item()))
    for name, copied, module in (("transformer", sana, model.sana), ("vae", vae, model.vae)):
        copied.load_state_dict(module.state_dict())
        nn.Module.to(copied, dtype).save_pretrained(folder / name)
    vocab.tokenizer.save_pretrained(str(folder))
    llm = {name: value for name, value in model.integrator.llm.config.to_dict().items() if name in pr.QWEN3_06B}
    write_json(folder / "config.json", dict(
        model_type="qwen3", image_start_tag_id=vocab.image_start, image_start_token_id=vocab.first_code,
        num_image_tokens=vocab.codes, **llm))


class TokenDecoder(nn.Module):
    """What makes visual tokens mean something; not kept. From N codes to a small picture and to a face reader's last
    features, from which identity and attributes are read linearly; TA-Tok likewise rebuilds SigLIP2's."""

    def __init__(self, width: int, side: int, features: int, pixels: int = 32):
        super().__init__()
        self.side, self.pixels = side, pixels
        self.position = nn.Parameter(0.02 * torch.randn(side * side, width))
        self.layers = nn.Sequential(*[nn.TransformerEncoderLayer(width, 4, 2 * width, 0.0, "gelu", batch_first=True,
                                                                 norm_first=True) for _ in range(2)])
        self.picture, self.features = nn.Linear(width, 3 * (pixels // side) ** 2), nn.Linear(width, features)

    def forward(self, code):  # (B, N, width) -> (B, 3, pixels, pixels), (B, N, features)
        h = self.layers(code + self.position)
        picture = F.fold(self.picture(h).mT, self.pixels, self.pixels // self.side, stride=self.pixels // self.side)
        return picture, self.features(h)


def tokenizer_loss(model, decoder, reader, x):
    """Both autoencoders on x (B, 3, S, S) -> (loss, parts). Noise on the latent forgives the flow's errors."""
    z = model.vae.encoder(x)
    rebuilt = model.vae.decoder(z + 0.1 * z.std() * torch.randn_like(z))
    code, ids, commitment = model.tatok(x)
    small, features = decoder(code)
    seen, real = reader.stages(rebuilt), reader.stages(x)
    l1, perceptual = (rebuilt - x).abs().mean(), sum((a - b).abs().mean() for a, b in zip(seen, real))
    target = F.layer_norm(F.adaptive_avg_pool2d(real[4], decoder.side).flatten(2).mT, real[4].shape[1:2])   # (B, N, 8w)
    pixel = (small - F.interpolate(x, small.shape[-2:], mode="area")).abs().mean()
    meaning = (features - target).square().mean()
    return l1 + 0.05 * perceptual + pixel + meaning + commitment, dict(l1=l1, meaning=meaning)


def prior_loss(model, vocab, cfg, batch):
    """Stage 1.1's loss on clean faces -> (loss, parts): half are copied from their tokens, half drawn from their caption."""
    tokens, drawn = model.tatok.encode(batch["hq"]), torch.rand(len(batch["hq"])) < 0.5
    captions = ["" if dropped else caption for dropped, caption in zip(torch.rand(len(drawn)) < 0.1, batch["captions"])]
    source = [None if d and caption else row for d, caption, row in zip(drawn, captions, tokens)]
    return pr.semantic_loss(model, vocab, cfg, dict(batch, captions=captions, tasks=["copy"] * len(drawn)), source)


@torch.no_grad()
def draw_captions(model, vocab, cfg, captions):
    """Faces that Qwen3 and SANA draw from captions alone."""
    prompt = pr.build_sequence(vocab, [None] * len(captions), captions, count=model.tatok.count)
    prompt = pr.Sequence(*(t.to(model.latent_scale.device) for t in prompt))
    states = model.integrator.generate(prompt, vocab, model.tatok.count)[1]
    noise = pr.noise_like(model, cfg, len(captions), torch.Generator().manual_seed(0))
    return pr.draw_face(model, cfg, model.condition(states), noise)


def train(output="toy/weights/sana", steps: int = 450, data="data/toy/train", batch_size: int = 32, device: str = "cpu",
          seed: int = 0, sizes: dict | None = None, save_every: int = 100) -> None:
    """Both phases, then the folder. A stopped call goes on where output/state.pt was saved, bit by bit."""
    cfg, folder, sizes = pr.Train(**pr.TOY_VALUES), Path(output), sizes or sizes_of()
    torch.manual_seed(seed)
    model, vocab = build(sizes)
    reader = metrics.load_reader("a").to(device)
    width, side = sizes["tatok"]["siglip"]["hidden_size"], int(model.tatok.count ** 0.5)
    model, decoder = model.to(device), TokenDecoder(width, side, reader.identity.in_features // 16).to(device)
    faces = Faces(data, sizes["tatok"]["siglip"]["image_size"], degradation="noisy")
    state = read_torch(folder / "state.pt") if (folder / "state.pt").exists() else {}
    if state:
        load_strict(model, state["model"], folder / "state.pt")
        decoder.load_state_dict(state["decoder"])

    for phase, prefixes, peak in (("tokenizers", ("vae.", "tatok."), 5e-3), ("prior", ("integrator.", "sana."), 1e-2)):
        if state.get("phase") == "prior" and phase == "tokenizers":
            continue
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(name.startswith(prefixes) and "regularizer.embedding.weight" not in name)
        parameters = [p for p in model.parameters() if p.requires_grad] + list(decoder.parameters()) * (phase == "tokenizers")
        optimizer, factor = make_optimizer(cfg, parameters, peak), warmup_cosine(steps, 5, 0.02, 0.2)
        average = {name: t.detach().clone() for name, t in model.state_dict().items()}
        first = 0
        if state.get("phase") == phase:
            first = state["step"]
            optimizer.load_state_dict(state["optimizer"])
            average = {name: t.to(device) for name, t in state["average"].items()}

        for step in tqdm(range(first, steps), phase, steps, initial=first):
            torch.manual_seed(mix(seed, phase, step))
            count = batch_size // 2 if phase == "tokenizers" else batch_size
            batch = {k: v.to(device) if torch.is_tensor(v) else v for k, v in faces.training(count, seed, step).items()}
            if phase == "tokenizers":                              # every other face is clean
                loss, parts = tokenizer_loss(model, decoder, reader, torch.cat([batch["hq"][::2], batch["lq"][1::2]]))
            else:
                loss, parts = prior_loss(model, vocab, cfg, batch)
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(parameters, 1.0)
            for group in optimizer.param_groups:
                group["lr"] = peak * factor(step)
            optimizer.step()
            with torch.no_grad():
                for name, t in model.state_dict().items():
                    average[name].lerp_(t, 1 - min(0.995, (1 + step) / (10 + step)))
            if (step + 1) % 50 == 0 or step + 1 == steps:
                tqdm.write(f"{phase}, step {step + 1}: {json.dumps({k: round(v.item(), 4) for k, v in parts.items()})}")
            if (step + 1) % save_every == 0 and step + 1 < steps:
                with whole_file(folder / "state.pt") as temporary:
                    torch.save(dict(phase=phase, step=step + 1, model=model.state_dict(), decoder=decoder.state_dict(),
                                    average=average, optimizer=optimizer.state_dict()), temporary)

        model.load_state_dict(average)
        batch = {k: v.to(device) if torch.is_tensor(v) else v for k, v in faces.held_out(64).items()}
        with torch.no_grad():
            if phase == "tokenizers":                              # DC-AE's scaling factor: latents of deviation 1
                model.latent_scale.copy_(1 / model.vae.encoder(batch["hq"]).std())
                model.lq_encoder.load_state_dict(model.vae.encoder.state_dict())
            pictures = dict(hq=batch["hq"], autoencoder=model.decode(model.encode(batch["hq"])))
        if phase == "prior":
            pictures["from_its_caption"] = draw_captions(model, vocab, cfg, batch["captions"][:8])
        write_grid(folder / f"{phase}.png", pictures)
        state = {}
    save(folder, model, vocab)
    (folder / "state.pt").unlink(missing_ok=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("-o", "--output", default="toy/weights/sana")
    parser.add_argument("--steps", type=int, default=450, help="of each phase")
    parser.add_argument("--data", default="data/toy/train")
    parser.add_argument("--batch_size", type=int, default=32)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--seed", type=int, default=0)
    train(**vars(parser.parse_args()))
