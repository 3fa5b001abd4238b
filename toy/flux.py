"""The toy stand-in of FLUX.1-dev: `python -m toy.backbones vae flux` trains it into toy/weights/flux."""
import shutil
from pathlib import Path

# toy.backbones comes first: it sets up OpenMP before torch is imported
from toy.backbones import KL, captions_of, encode_all, fit, judge, kl_autoencoder, open_vae, publish, word_tokenizer

import torch

import a2bfr

SIZES = dict(
    vae=KL,
    transformer=dict(num_layers=2, num_single_layers=4, attention_head_dim=32, num_attention_heads=4,
                     axes_dims_rope=(4, 14, 14)),
    text=dict(width=64, layers=1, heads=4, length=32))


def new_folder(folder, seed: int = 0, sizes: dict = SIZES, vae=None) -> None:
    """Write a FLUX of random weights in the layout of the release, around `vae` if one is given."""
    from diffusers import FluxTransformer2DModel
    from transformers import CLIPTextConfig, CLIPTextModel, T5Config, T5EncoderModel
    torch.manual_seed(seed)
    text, vae = sizes["text"], vae or kl_autoencoder(sizes["vae"])
    words, width = word_tokenizer(text["length"]), text["width"]
    last = len(words) - 1
    transformer = FluxTransformer2DModel(
        **sizes["transformer"], in_channels=4 * vae.config.latent_channels, joint_attention_dim=width,
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


def captions(batch) -> list:
    """Captions, of which a half of the empty ones says TEMPLATE."""
    return [caption or (a2bfr.TEMPLATE if torch.rand(()) < 0.5 else "") for caption in captions_of(batch)]


def train(run, faces, held, sizes: dict = SIZES) -> None:
    """Transformer and both text encoders, by flow matching from noise (t = 1) to latents (t = 0).

    FLUX relates two pictures in one sequence [In-Context LoRA]; faces alone would not teach that. So in half of the steps
    the sequence goes on with a second, noisier or cleaner copy of the face.
    """
    device, new = run.device, run.folder / "new"
    new_folder(new, run.cfg.seed, sizes, open_vae(run.cfg, "cpu"))
    nets = dict(a2bfr.load_flux(new, torch.float32), text=a2bfr.FluxText(new, dtype=torch.float32))
    nets = {name: net.to(device) for name, net in nets.items()}
    prior, text, codec = nets["prior"].requires_grad_(True), nets["text"].requires_grad_(True), nets["codec"]
    parts = {"transformer": prior, "text_encoder": text.clip, "text_encoder_2": text.t5}
    tables = [p for name, p in text.named_parameters() if any(word in name for word in ("embed", "shared", "relative"))]

    def loss_of(batch):
        z0 = latents[batch["place"]].to(device)
        noise, t = torch.randn_like(z0), a2bfr.draw_times(len(z0), 4.0, z0.device)
        prompt = a2bfr.Prompt(*text.encode(captions(batch)))
        copied = torch.lerp(z0, torch.randn_like(z0), torch.rand_like(t).view(-1, 1, 1)) if torch.rand(()) < 0.5 else None
        v = a2bfr.velocity(nets, torch.lerp(z0, noise, t.view(-1, 1, 1)), t, prompt, copied)
        loss = (v.float() - (noise - z0)).square().mean()
        return loss, dict(loss=loss)

    @torch.no_grad()
    def draw(captions, first):
        editor = a2bfr.flux_editor(nets, 20, batch["hq"].shape[-1])              # with its guidance, towards the caption
        noise = codec.noise(batch["hq"].shape[-1], list(range(first, first + len(captions))))
        prompt = editor.prompt(captions, 1.5)
        return editor.decode(a2bfr.euler_sample(lambda z, t: editor.velocity(z, t, prompt), noise, editor.sigmas))

    def show():
        return {"a real face": batch["hq"], "drawn from its caption": draw(captions_of(batch, whole=True), 0)}

    latents, batch = encode_all(run, faces, lambda hq: codec.encode(hq).float()), held.held_out(12)
    fit(run, "flow", parts, faces, run.cfg.steps, 1e-2, loss_of, tables, show=show)

    def write(folder):
        shutil.copytree(new, folder)
        for name, module in (*parts.items(), ("vae", codec.vae)):
            module.to(torch.bfloat16).save_pretrained(folder / name)
    publish(run, Path(run.cfg.output) / "flux", write, steps=run.cfg.steps, batch_size=run.cfg.batch_size,
            **judge(run, held, draw))
