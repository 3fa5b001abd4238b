"""The toy stand-ins that Pref-Restore starts from: `python -m toy.backbones sana` trains DC-AE, TA-Tok, Qwen3 and SANA.

toy/weights/sana is in the layouts of the releases, so that `pref_restore.load_release` reads it like them:

    config.json, model.safetensors, tokenizer files    BLIP3o-NEXT's layout: Qwen3, semantic connector, TA-Tok
    transformer/, vae/                                 diffusers folders: SANA, DC-AE
"""
from pathlib import Path

# toy.backbones comes first: it sets up OpenMP before torch is imported
from toy.backbones import captions_of, colour_slopes, copy_loss, encode_all, fit, judge, publish, word_tokenizer

import torch
import torch.nn as nn
import torch.nn.functional as F

import metrics
import pref_restore as pr
from common import save_part, write_json

def sizes_of(size=64, token_side=4, codes=512, code_dim=32, siglip_width=144, llm_width=128, llm_layers=4, channels=64,
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


def chat_tokenizer():
    """A tokenizer of transformers: the words and marks of the chat template, and the words of `verbalise`."""
    text = " ".join([pr.SYSTEM, pr.USER, pr.END, pr.ASSISTANT, pr.ASK, pr.ASK_CAPTION, pr.COPY, pr.DRAW])
    return word_tokenizer(2048, False, text, r"<\|\w+\|>|\n|[.:]|")


def build(sizes: dict) -> tuple:
    """(PrefRestore, Vocabulary) of random weights."""
    vocab = pr.Vocabulary(chat_tokenizer(), sizes["tatok"]["codes"])
    sizes = dict(sizes, llm=dict(sizes["llm"], vocab_size=vocab.size))
    return pr.PrefRestore(sizes), vocab


def save(folder, model, vocab, dtype=torch.bfloat16) -> None:
    """The folder described on top."""
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


def train(run, faces, held, sizes: dict | None = None) -> None:
    """DC-AE; TA-Tok, which rebuilds clean and degraded faces; Qwen3 and SANA, which copy a face from its tokens or draw one
    from its caption."""
    cfg, sizes, device = pr.Train(**pr.TOY_VALUES), sizes or sizes_of(), run.device
    torch.manual_seed(run.cfg.seed)
    model, vocab = build(sizes)
    model, reader = model.to(device), metrics.load_reader("a", run.cfg.readers).to(device)
    side = int(model.tatok.count ** 0.5)
    decoder = TokenDecoder(sizes["tatok"]["siglip"]["hidden_size"], side, reader.identity.in_features // 16).to(device)
    batch = held.held_out(64)
    hq = batch["hq"].to(device)

    def autoencoder_loss(batch):
        z = model.vae.encoder(batch["hq"][:8])
        copied = model.vae.decoder(z + 0.05 * z.std() * torch.randn_like(z))  # noise on the latent forgives the flow's errors
        loss = copy_loss(reader, copied, batch["hq"][:8])
        return loss, dict(loss=loss)

    @torch.no_grad()
    def copies():
        copied = model.vae.decoder(model.vae.encoder(hq))
        run.say(f"{metrics.mean_psnr(copied, hq):.2f} dB; slope of luma, red-blue, green-magenta: "
                + ", ".join(f"{slope:.3f}" for slope in colour_slopes(hq, copied)))
        return {"hq": hq[:8], "autoencoder": copied[:8]}

    def token_loss(batch):
        x = torch.cat([batch["hq"][::2], batch["lq"][1::2]])      # every other face is clean
        code, ids, commitment = model.tatok(x)
        small, features = decoder(code)
        real = reader.stages(x)[4].float()
        target = F.layer_norm(F.adaptive_avg_pool2d(real, side).flatten(2).mT, real.shape[1:2])     # (B, N, 8w)
        pixel = (small - F.interpolate(x, small.shape[-2:], mode="area")).abs().mean()
        meaning = (features - target).square().mean()
        return pixel + meaning + commitment, dict(pixel=pixel, meaning=meaning)

    def prior_loss(batch):
        answer, captions, place = tokens[batch["place"]].to(device), captions_of(batch), batch["place"]
        alone = torch.rand(len(place)) < 0.5                       # drawn from the caption alone
        source = [None if a and caption else row for a, caption, row in zip(alone, captions, answer)]
        batch = dict(captions=captions, tasks=["copy"] * len(place))
        states, sequence = pr.teacher_forced(model, vocab, cfg, batch, source, answer)
        ce = pr.token_loss(states, model.integrator.head, sequence.labels)
        cond = model.condition(pr.answer_states(states, sequence.start, model.tatok.count))
        diffusion = pr.diffusion_loss(model, cfg, cond, latents[place].to(device))
        return ce + diffusion, dict(ce=ce, diffusion=diffusion)

    @torch.no_grad()
    def draw(captions, first):
        prompt = pr.build_sequence(vocab, [None] * len(captions), captions, count=model.tatok.count)
        prompt = pr.Sequence(*(t.to(device) for t in prompt))
        rng = torch.Generator().manual_seed(first)                 # of drawn tokens: the likeliest of a caption are always the same
        states = model.integrator.generate(prompt, vocab, model.tatok.count, generator=rng, **pr.CHOICE["sample"])[1]
        noise = pr.noise_like(model, cfg, len(captions), rng)
        return pr.draw_face(model, cfg, model.condition(states), noise)

    def samples():
        return {"a real face": hq[:12], "drawn from its caption": draw(captions_of(batch, whole=True)[:12], 0)}

    def trainable(*prefixes):
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(name.startswith(prefixes) and "regularizer.embedding.weight" not in name)

    trainable("vae.")
    fit(run, "dcae", {"dcae": model.vae}, faces, run.cfg.vae_steps, 5e-3, autoencoder_loss, show=copies)
    trainable("tatok.")
    fit(run, "tatok", {"tatok": model.tatok, "decoder": decoder}, faces, run.cfg.vae_steps, 5e-3, token_loss, degraded=True)
    with torch.no_grad():                                         # DC-AE's scaling factor: latents of variance 1
        model.latent_scale.copy_(1 / model.vae.encoder(hq).std())
    model.lq_encoder.load_state_dict(model.vae.encoder.state_dict())
    tokens, latents = encode_all(run, faces, model.tatok.encode), encode_all(run, faces, lambda hq: model.encode(hq).float())
    trainable("integrator.", "sana.")
    parts = {"integrator": model.integrator, "sana": model.sana}
    fit(run, "prior", parts, faces, run.cfg.steps, 1e-2, prior_loss, show=samples)
    publish(run, Path(run.cfg.output) / "sana", lambda folder: save(folder, model, vocab),
            steps=run.cfg.steps, vae_steps=run.cfg.vae_steps, batch_size=run.cfg.batch_size, **judge(run, held, draw))
