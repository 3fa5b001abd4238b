"""A2BFR: restore a degraded face so that it follows a text prompt and stays the same person.

Paper: "A2BFR: Attribute-Aware Blind Face Restoration" (arXiv 2603.29423). Its authors published inference only
(github.com/MediaX-SJTU/A2BFR). A frozen text-to-image transformer, FLUX, gets a third kind of token: the latents of the
degraded image. A LoRA acts on those tokens alone (OminiControl). The degraded image already tells the network most of what
the text says, so it would ignore the text. Two losses make it listen. Attribute-aware learning (AAL): the attribute-aware
encoder (AAE) reads the one-step clean image. Semantic dual-training (SDT): two faces that differ in one attribute share the
degraded image (and here the time and the noise), so where the noise hides the clean face only the prompt tells them apart.
Its loss keeps the two scores of that attribute a margin apart.

    paper            name here          shape           range    meaning
    I_LQ, I_GT       lq, hq             (B, 3, S, S)    [-1, 1]  degraded and clean face; hq_tar is the clean face of T_tar
    Z_0              z0                 (B, N, C)       about 1  packed latents of the clean face: N = (S / 16)^2, toy (S / 8)^2
    eps              noise              (B, N, C)       N(0, 1)
    Z_t              z_t                (B, N, C)                (1 - t) z_0 + t eps
    t                t                  (B,)            [0, 1]   1 is noise, 0 is clean
    V                velocity           (B, N, C)                predicts eps - z_0
    Z_LQ             condition          (B, N, C)                packed latents of the degraded image
    T_src, T_tar     text, pooled       (B, L, D), (B, P)        prompts as T5 and CLIP embed them
    AAE              encoder            (B, 3, S, S) -> (B, 12)  attribute logits, order of ATTRIBUTES
    A_src, A_tar     score              (B,)            [0, 1]   score of the attribute in which the pair differs
    lambda, alpha, m attribute_weight, dual_weight, dual_margin  UNSTATED: ours

ATTRIBUTES: young, smiling, mouth open, eyeglasses, bangs, wavy, straight, black, blond, brown, gray hair, hat. SIBLINGS: wavy
and straight, and the four colours, of which one holds. The toy's AAE is reader_a, a small CNN; reader_b measures. lq is hq,
blurred, shrunk, noised and stored as JPEG (`common.degrade_one`).
`nets` holds FLUX: nets["codec"] its autoencoder with the packing, nets["prior"] its transformer, nets["text"] T5 and CLIP.

    section 4.2: [Eq. 1] predict_clean   [Eq. 2] attribute_loss     [Eq. 3] branch_loss
    section 4.3: [Eq. 4] edited_score    [Eq. 5] dual_margin_loss   [Eq. 6] dual_training_loss
    section 4.1: flux_velocity, ConditionLinear     section 3.1: flow_edit, quality_check     section 5.1: the values of `Train`

Read first: `train_lora`, `pair_loss`, the losses that it calls; then `ConditionLinear` and `flux_velocity`; `restore`. Last
`pairs`, which builds the training pairs. `Prodigy` is the optimiser of another paper.
Run `python a2bfr.py train` (toy faces, a tiny FLUX in toy/weights/flux, CPU, minutes), or `train --preset paper --pairs FILE
--farl FILE`.
Left out: the face detector of section 4.1 (faces are aligned already), the vision-language metrics of section 5.1.
"""
import dataclasses
import functools
import json
import math
import statistics
import typing
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

# common comes first: it sets up OpenMP before torch is imported
from common import (ATTRIBUTES, EMA, SIBLINGS, TOY, Faces, Run, SampleFlags, TrainFlags, UserError, command_line, from_folder,
                    load_trained, lr_schedule, make_optimizer, mix, open_faces, open_run, read_lora, restore_folder, verbalise,
                    write_image)

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm

import metrics

TEMPLATE = "A photo of a human face"  # the paper's prompt without attributes [sec. 5.2]
NAMES = [name for _, name, _, _ in ATTRIBUTES]
SHOWN = {"template": TEMPLATE, "smiling": "a photo of a smiling person",  # title: prompt, as Figure 6
         "older, serious": "a photo of an older serious person",
         "eyeglasses": "a photo of a person, wearing eyeglasses",
         "blond, bangs": "a photo of a person with blond hair and bangs", "hat": "a photo of a person, wearing a hat"}
NEEDS = ("attributes", "identity")  # labels that the reader that measures must have been trained on
READ_UNTIL = 0.9  # UNSTATED: the encoder reads one-step faces of t <= 0.9; above they are too blurred to read

# ------------------------------------------------------------------------------------------------ configuration


@dataclass(frozen=True)
class Train(TrainFlags):
    """Train the LoRA on pairs of faces, then restore held-out faces under several prompts."""
    # The values are the paper's [sec. 5.1] where no comment says otherwise; TOY_VALUES below are the toy's. UNSTATED and
    # inherited from TrainFlags: degradation codeformer (the paper's is in its supplement), constant rate, bf16.
    output: str = "runs/a2bfr"             # folder for weights, checkpoints, log and pictures
    pretrained_model_name_or_path: str = "black-forest-labs/FLUX.1-dev"  # FLUX: folder in diffusers' layout or hub id
    data: str = ""                         # folder with a pairs.jsonl, written by the verb pairs (default: the toy world's)
    pairs: str = ""                        # pairs.jsonl to train on instead of that in --data
    validation_data: str = ""              # folder or pairs.jsonl of other people to measure on (default: the last tenth)
    stage: typing.Literal["all", "lora"] = "all"  # there is one stage
    batch_size: int = 1                    # pairs per process and micro-batch
    max_train_steps: int = 60_000          # optimiser steps
    farl: str = ""                         # face_attribute.farl.celeba.pt: the paper's encoder (default: reader_a)
    rank: int = 64                         # of the LoRA
    lora_alpha: float = 0.0                # 0: scale 1, as the release; else lora_alpha / rank. DIFFERS: paper 4
    optimizer: typing.Literal["prodigy", "adamw", "muon"] = "prodigy"  # of the LoRA
    learning_rate: float = 1.0             # of Prodigy, a factor on its step; AdamW wants 1e-4, Muon 1e-2
    prodigy_d0: float = 1e-6               # Prodigy's first step size; UNSTATED: its default
    max_grad_norm: float = 0.5             # clip the gradient to this norm; UNSTATED: OminiControl's
    ema_decay: float = 0.0                 # of the averaged weights that are saved and sampled; UNSTATED: no average
    gradient_checkpointing: bool = True    # recompute blocks, and finish one face of a pair before the other: less memory
    checkpointing_steps: int = 1000        # steps between saves of state.pt
    attribute_weight: float = 0.3          # UNSTATED: lambda of Eq. 3; 0 switches attribute-aware learning off
    dual_training: bool = True             # both faces of a pair, or one of them with its own prompt
    dual_weight: float = 0.3               # UNSTATED: alpha of Eq. 6
    dual_margin: float = 0.5               # UNSTATED: m of Eq. 5; DIFFERS: signed, at most what the clean faces differ
    dual: typing.Literal["signed", "abs"] = "signed"  # DIFFERS: signed: the gap points where the prompts ask; abs: as printed
    drop_text: float = 0.01                # share of pairs without prompts; "dropout 0.01", read as OminiControl's two
    drop_condition: float = 0.01           # share of pairs whose degraded image is black
    time_shift: float = 1.0                # s of `draw_times`; 1 as OminiControl, more: times nearer to noise
    num_inference_steps: int = 28          # Euler steps; UNSTATED: the release's
    guidance_scale: float = 3.5            # embedded, our reading of "CFG enabled"; UNSTATED: how much, release 3.0
    true_cfg_scale: float = 1.0            # away from the negative prompt, one more pass a step; off: see guidance_scale
    image_guidance_scale: float = 1.0      # away from a black degraded image, one more pass a step; ours, off
    validation_faces: int = 16             # held-out pairs restored and measured at the end; paper 1,200


# The fields that decide what weights mean: `Run` refuses to go on with a run that has others.
SETTINGS = ("pretrained_model_name_or_path", "image_size", "rank", "lora_alpha")
TOY_VALUES = dict(
    TOY, pretrained_model_name_or_path="toy/weights/flux", batch_size=16, max_train_steps=600,
    optimizer="muon", learning_rate=2e-2, ema_decay=0.99, gradient_checkpointing=False, drop_text=0.3, drop_condition=0.05,
    time_shift=4.0, num_inference_steps=4, guidance_scale=1.0, true_cfg_scale=2.5, image_guidance_scale=2.0, validation_faces=128)


@dataclass(frozen=True)
class Sample(SampleFlags):
    """Restore faces under a prompt with trained weights."""
    output: str = "results/a2bfr"          # folder for restored_faces/, cmp/ and args.json
    checkpoint: str = "toy/weights/a2bfr"  # output folder of a training run
    prompt: str = TEMPLATE                 # what the restored face should look like
    negative_prompt: str = TEMPLATE        # for --true_cfg_scale; training says it in place of a dropped prompt
    pretrained_model_name_or_path: str = ""  # FLUX: folder or hub id (default: as the checkpoint was trained)
    lora: str = ""                         # LoRA file, folder or hub id instead of a run: the release is thetrigger/A2BFR
    num_inference_steps: int = 0           # Euler steps (0: as trained; with --lora 28)
    guidance_scale: float = 0.0            # embedded guidance (0: as trained; with --lora 3.0)
    true_cfg_scale: float = 0.0            # away from --negative_prompt, a pass more (1: off, 0: as trained)
    image_guidance_scale: float = 0.0      # away from a black degraded image, a pass more (1: off, 0: as trained)
    image_size: int = 0                    # side of the network's square (0: as trained; with --lora 512)
    mixed_precision: typing.Literal["", "no", "bf16"] = ""  # autocast type (default: as trained; with --lora bf16)


@dataclass(frozen=True)
class BuildPairs:
    """Build pairs of faces that differ in one attribute: FlowEdit, three checks, one JSON line per pair."""
    # Section 3.1 has the method and the thresholds 0.6 and 0.4. UNSTATED: size, steps, guidance: FlowEdit's own for SD3.
    # DIFFERS: Qwen3 words the paper's prompts, here the rule `common.verbalise` does.
    output: str = "runs/a2bfr_pairs"       # folder for pairs.jsonl, source/, target/ and samples.png; a rerun goes on
    data: str = ""                         # folder of aligned faces, sub-folders = people (default: the toy world)
    count: int = 35_000                    # source faces; UNSTATED: how many tries the paper's 35,000 pairs took
    edits: int = 1                         # attributes edited per face, one pair each
    editor: typing.Literal["flux", "sd3"] = "sd3"  # model that edits
    pretrained_model_name_or_path: str = "stabilityai/stable-diffusion-3.5-medium"  # its folder or hub id; UNSTATED: medium
    image_size: int = 1024                 # side of the pictures
    num_inference_steps: int = 50          # N of the schedule
    n_max: int = 33                        # steps before the last n_max are skipped
    source_guidance: float = 3.5           # guidance of the source's prompt
    target_guidance: float = 13.5          # guidance of the target's prompt
    blends: tuple[float, ...] = (0.6, 0.8, 1.0)  # UNSTATED: share of the target's velocity, tried in this order
    tries: int = 2                         # noises per blend
    positive: float = 0.6                  # an attribute above this score is present
    negative: float = 0.4                  # below this it is absent; between, it is not edited
    max_leak: float = 0.3                  # UNSTATED: other attributes may move by this much
    min_identity: float = 0.4              # UNSTATED: cosine between the faces' embeddings; the data set's mean is 0.64
    min_structure: float = 0.5             # UNSTATED: SSIM between the faces, set at 64 px and not tried at 1024
    max_shift: float = 0.03                # UNSTATED: mean landmark shift, share of the eyes' distance
    readers: str = ""                      # folder of reader_a (default: toy/weights, made for toy faces)
    farl: str = ""                         # face_attribute.farl.celeba.pt, to score attributes
    arcface: str = ""                      # ArcFace weights (IR-50, IR-SE-50, IR-101), to score identity
    fan: str = ""                          # alignment_WFLW_4HG.pth, to measure how landmarks shift
    batch_size: int = 1                    # faces edited at a time
    seed: int = 0                          # of the noise and of the choice of attributes
    device: str = "auto"                   # auto, cpu, cuda, cuda:1, mps
    mixed_precision: typing.Literal["no", "bf16"] = "bf16"  # autocast type


FLUX_EDITOR = dict(editor="flux", pretrained_model_name_or_path="black-forest-labs/FLUX.1-dev", image_size=512,
                   num_inference_steps=28, n_max=24, source_guidance=1.5, target_guidance=5.5)
TOY_EDITOR = dict(FLUX_EDITOR, pretrained_model_name_or_path="toy/weights/flux", count=200, edits=2, image_size=64, n_max=22,
                  source_guidance=1.0, target_guidance=3.0, max_shift=0.1, batch_size=16, mixed_precision="no")


# ------------------------------------------------------------------------------------------------ model: FLUX with a condition


def pack(latents):
    """(B, C, h, w), h and w even -> tokens (B, h w / 4, 4 C): 2 x 2 latents each, inner order (c, dy, dx)."""
    x = latents.unflatten(3, (-1, 2)).unflatten(2, (-1, 2))                      # (B, C, h/2, 2, w/2, 2)
    return x.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)


def unpack(tokens, h: int, w: int):
    """The inverse: (B, h w / 4, 4 C) -> latents (B, C, h, w)."""
    x = tokens.unflatten(2, (-1, 2, 2)).unflatten(1, (h // 2, w // 2))           # (B, h/2, w/2, C, 2, 2)
    return x.permute(0, 3, 1, 4, 2, 5).flatten(4).flatten(2, 3)


def position_ids(height: int, width: int, device=None):
    """(height * width, 3) positions [0, row, column] of tokens. Image and condition have the same: their pixels match."""
    rows, columns = (torch.arange(n, dtype=torch.float32, device=device) for n in (height, width))
    return F.pad(torch.stack(torch.meshgrid(rows, columns, indexing="ij"), -1).flatten(0, 1), (1, 0))


class ConditionLinear(nn.Module):
    """y = W x on tokens before `start`, y = W x + (alpha / rank) B A x on the others: a frozen Linear with a LoRA.

    Without `start` it is the Linear as it was. A ~ N(0, (1 / rank)^2) and B = 0, so it starts as W.
    """

    def __init__(self, base: nn.Linear, rank: int, alpha: float):
        super().__init__()
        self.base, self.scale = base.requires_grad_(False), alpha / rank
        self.lora_A = nn.Linear(base.in_features, rank, bias=False, device=base.weight.device)
        self.lora_B = nn.Linear(rank, base.out_features, bias=False, device=base.weight.device)
        nn.init.normal_(self.lora_A.weight, std=1 / rank)
        nn.init.zeros_(self.lora_B.weight)

    def forward(self, x, start=None):  # (B, N, in) -> (B, N, out)
        y = self.base(x)
        if start is None or start >= x.shape[1]:
            return y
        tokens = x[:, start:].to(self.lora_A.weight.dtype)          # the LoRA is float32, FLUX may be bf16
        change = self.scale * self.lora_B(self.lora_A(tokens))
        return torch.cat([y[:, :start], y[:, start:] + change.to(y.dtype)], dim=1)


def condition_layers(transformer) -> list:
    """Names of the Linears that OminiControl adapts: 1 + 6 per two-stream block + 6 per one-stream block."""
    double = ("norm1.linear", "attn.to_q", "attn.to_k", "attn.to_v", "attn.to_out.0", "ff.net.2")
    single = ("norm.linear", "proj_mlp", "proj_out", "attn.to_q", "attn.to_k", "attn.to_v")
    names = [f"transformer_blocks.{i}.{n}" for i in range(len(transformer.transformer_blocks)) for n in double]
    names += [f"single_transformer_blocks.{i}.{n}" for i in range(len(transformer.single_transformer_blocks))
              for n in single]
    return ["x_embedder"] + names


def add_condition_lora(transformer, rank: int, alpha: float) -> list:
    """Freeze a diffusers FluxTransformer2DModel and wrap its Linears, in place; returns the new parameters.

    The model's own forward is unchanged by this: only `flux_velocity` says which tokens the LoRA acts on.
    231,804,928 parameters for FLUX.1-dev at rank 64. DIFFERS: the paper's alpha 4 would scale by 1/16; OminiControl,
    which the release uses, ignores alpha, and files are read with scale 1.
    """
    transformer.requires_grad_(False)
    for name in condition_layers(transformer):
        transformer.set_submodule(name, ConditionLinear(transformer.get_submodule(name), rank, alpha))
    return [p for p in transformer.parameters() if p.requires_grad]


def apply(layer, x, start: int):
    """A Linear, with its LoRA on tokens `start` and later where it has one."""
    return layer(x, start) if isinstance(layer, ConditionLinear) else layer(x)


def modulation(layer, signal, first: int, others: int, parts: int):
    """signal (B, 1 or 2, D) -> `parts` tensors (B, first + others, D), one row per token.

    Row 0 of the signal (time t) modulates the first tokens. Row 1 (time 0) goes through the LoRA and modulates the condition.
    """
    rows = apply(layer, signal, 1).split(1, dim=1)
    return torch.cat([row.expand(-1, n, -1) for row, n in zip(rows, (first, others))], 1).chunk(parts, dim=-1)


def rotate(x, cos, sin):
    """Rotary positions on neighbouring pairs: x (B, N, heads, d), cos and sin (N, d)."""
    a, b = x.float().unflatten(-1, (-1, 2)).unbind(-1)
    return (x.float() * cos[:, None] + torch.stack([-b, a], -1).flatten(-2) * sin[:, None]).to(x.dtype)


def attention(q, k, v, rope):
    """(B, N, heads, d) -> (B, N, heads d): every token of [text | image | condition] sees every token, as in the release."""
    q, k, v = (u.transpose(1, 2) for u in (rotate(q, *rope), rotate(k, *rope), v))
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


def same_type(norm, x):
    """An RMS norm in the type of its own weights: under autocast x may come in another."""
    return norm(x.to(norm.weight.dtype))


def image_qkv(attn, x, start: int):
    """Queries, keys and values (B, N, heads, d) by the image weights, queries and keys normalised."""
    q, k, v = (apply(f, x, start).unflatten(-1, (attn.heads, -1)) for f in (attn.to_q, attn.to_k, attn.to_v))
    return same_type(attn.norm_q, q), same_type(attn.norm_k, k), v


def text_qkv(attn, x):
    """The same of the text tokens (B, L), which have layers of their own."""
    q, k, v = (f(x).unflatten(-1, (attn.heads, -1)) for f in (attn.add_q_proj, attn.add_k_proj, attn.add_v_proj))
    return same_type(attn.norm_added_q, q), same_type(attn.norm_added_k, k), v


def double_block(block, text, image, signal, n_image: int, rope):
    """Two streams: text (B, L, D) has its own weights; [image | condition] (B, N + M, D) shares one set."""
    n_text, n_condition = text.shape[1], image.shape[1] - n_image
    shift, scale, gate, shift2, scale2, gate2 = modulation(block.norm1.linear, signal, n_image, n_condition, 6)
    t_shift, t_scale, t_gate, t_shift2, t_scale2, t_gate2 = modulation(block.norm1_context.linear, signal[:, :1],
                                                                      n_text, 0, 6)
    qkv = image_qkv(block.attn, block.norm1.norm(image) * (1 + scale) + shift, n_image)
    qkv_text = text_qkv(block.attn, block.norm1_context.norm(text) * (1 + t_scale) + t_shift)
    out = attention(*(torch.cat(both, 1) for both in zip(qkv_text, qkv)), rope)
    image = image + gate * apply(block.attn.to_out[0], out[:, n_text:], n_image)
    text = text + t_gate * block.attn.to_add_out(out[:, :n_text])
    h = block.ff.net[0](block.norm2(image) * (1 + scale2) + shift2)              # GELU: its Linear has no LoRA
    image = image + gate2 * apply(block.ff.net[2], h, n_image)
    return text + t_gate2 * block.ff_context(block.norm2_context(text) * (1 + t_scale2) + t_shift2), image


def single_block(block, x, signal, start: int, rope):
    """One stream [text | image | condition] (B, L + N + M, D); attention and MLP side by side."""
    shift, scale, gate = modulation(block.norm.linear, signal, start, x.shape[1] - start, 3)
    h = block.norm.norm(x) * (1 + scale) + shift
    out = attention(*image_qkv(block.attn, h, start), rope)
    h = block.act_mlp(apply(block.proj_mlp, h, start))
    return x + gate * apply(block.proj_out, torch.cat([out, h], dim=2), start)


def flux_velocity(transformer, noisy, condition, text, pooled, t, guidance, image_ids, condition_ids):
    """Velocity eps - z_0 of the noisy tokens, (B, N, 4 c), with the degraded face as further tokens of one sequence.

    transformer: diffusers FluxTransformer2DModel, its Linears wrapped by `add_condition_lora` or not. noisy
    (B, N, 4 c), condition (B, M, 4 c) or None, text (B, L, D), pooled (B, P), t (B,), 1 = noise, guidance (B,),
    image_ids (N, 3), condition_ids (M, 3). The condition is at time 0 with guidance 1 whatever t is [OminiControl].
    Without condition this is FluxTransformer2DModel.
    """
    net, dtype, given = transformer, transformer.proj_out.weight.dtype, noisy.dtype
    if condition is None:
        condition, condition_ids = noisy[:, :0], image_ids[:0]
    noisy, condition, text, pooled = (u.to(dtype) for u in (noisy, condition, text, pooled))
    n_text, n_image, n_condition = text.shape[1], noisy.shape[1], condition.shape[1]

    def clock(t, guidance):  # -> (B, D); rounded to bf16 as in diffusers, with which FLUX and the LoRA were made
        times = (t, guidance) if net.config.guidance_embeds else (t,)
        return net.time_text_embed(*(1000 * u.to(dtype) for u in times), pooled)

    signal = [clock(t, guidance)] + ([clock(0 * t, 0 * t + 1)] if n_condition else [])
    time, signal = signal[0], F.silu(torch.stack(signal, 1))                     # (B, D), (B, 1 or 2, D)
    image = apply(net.x_embedder, torch.cat([noisy, condition], 1), n_image)
    text = net.context_embedder(text)
    ids = torch.cat([image_ids.new_zeros(n_text, 3), image_ids, condition_ids])
    rope, recompute = net.pos_embed(ids), net.gradient_checkpointing and torch.is_grad_enabled()
    run = functools.partial(checkpoint, use_reentrant=False) if recompute else lambda f, *a: f(*a)
    for block in net.transformer_blocks:
        text, image = run(double_block, block, text, image, signal, n_image, rope)
    x = torch.cat([text, image], 1)
    for block in net.single_transformer_blocks:
        x = run(single_block, block, x, signal, n_text + n_image, rope)
    return net.proj_out(net.norm_out(x[:, n_text:n_text + n_image], time)).to(given)


# ------------------------------------------------------------------------------------------------ model: pixels, words


class Codec(nn.Module):
    """Images (B, 3, S, S) in [-1, 1] <-> tokens (B, N, 4 c): diffusers' AutoencoderKL, normalised, packed."""

    def __init__(self, vae, shift: float, scale: float):
        super().__init__()
        self.vae, self.token = vae, 2 ** len(vae.config.block_out_channels)      # side of a token in pixels: 16
        self.register_buffer("shift", torch.tensor(float(shift)))
        self.register_buffer("scale", torch.tensor(float(scale)))

    def encode(self, images, noise=None):
        """The posterior's mean, or with noise = torch.randn_like a sample of it, which FLUX trains on."""
        posterior = self.vae.encode(images.to(self.vae.dtype)).latent_dist
        z = posterior.mean.float()
        z = z if noise is None else z + posterior.std.float() * noise(z)
        return pack((z - self.shift.float()) * self.scale.float())

    def noise(self, size: int, seeds: list):
        """(len(seeds), N, 4 c), each row by its own seed: a face's result does not depend on its place in a batch."""
        n = (size // self.token) ** 2
        rows = [torch.randn(n, 4 * self.vae.config.latent_channels, generator=torch.Generator().manual_seed(seed))
                for seed in seeds]
        return torch.stack(rows).to(self.shift.device)

    def decode(self, tokens):
        """-> images, not clamped: a clamp would take the gradient of saturated pixels."""
        side = 2 * math.isqrt(tokens.shape[1])
        z = unpack(tokens.float(), side, side) / self.scale.float() + self.shift.float()
        return self.vae.decode(z.to(self.vae.dtype)).sample.float()


class FluxText(nn.Module):
    """FLUX's two text encoders, frozen: T5's last hidden states (padding is attended, as FLUX was trained) and CLIP's
    pooled vector. UserError where the folder lacks one. What is longer than T5's tokenizer says (512 tokens) is cut.
    """

    def __init__(self, where: str, dtype=torch.bfloat16):
        super().__init__()
        from transformers import AutoTokenizer, CLIPTextModel, T5EncoderModel
        part = functools.partial(from_folder, where=where, flag="pretrained_model_name_or_path")
        self.clip_words = part(AutoTokenizer, subfolder="tokenizer")
        self.t5_words = part(AutoTokenizer, subfolder="tokenizer_2")
        self.clip = part(CLIPTextModel, subfolder="text_encoder", dtype=dtype)
        self.t5 = part(T5EncoderModel, subfolder="text_encoder_2", dtype=dtype)
        self.length = self.t5_words.model_max_length
        self.eval().requires_grad_(False)

    def encode(self, prompts: list):
        """-> text (B, L, 4096), pooled (B, 768)."""
        ids = lambda words, n: words(prompts, padding="max_length", max_length=n, truncation=True,
                                     return_tensors="pt").input_ids.to(self.clip.device)
        clip_length = self.clip.config.max_position_embeddings                    # 77
        return self.t5(ids(self.t5_words, self.length))[0], self.clip(ids(self.clip_words, clip_length)).pooler_output

    def unread(self, prompt: str) -> str:
        """What T5 cannot read of a prompt, in words: unknown to its tokenizer, or beyond its length. "" if nothing."""
        unknown = [word for word in prompt.split() if self.t5_words.unk_token_id in self.t5_words(word).input_ids]
        if unknown:
            return f"the text encoder does not know {', '.join(unknown)}"
        count = len(self.t5_words(prompt).input_ids)
        return f"{count} tokens, the last {count - self.length} are cut" if count > self.length else ""


class Prompt(NamedTuple):
    """A prompt as the network takes it."""
    text: torch.Tensor                     # (B, L, D)
    pooled: torch.Tensor                   # (B, P)
    guidance: float = 1.0                  # embedded guidance; in `flux_editor` the classifier-free scale


@functools.cache
def compiled_velocity():
    """What --compile compiles: FLUX's blocks are functions here, so there is no module's forward to compile."""
    return torch.compile(flux_velocity)


def velocity(nets, z, t, prompt: Prompt, condition=None):
    """Velocity (B, N, C) in float32 of the noisy tokens z: of the restorer, or without a condition of FLUX alone."""
    side = math.isqrt(z.shape[1])
    places = position_ids(side, side, device=z.device)               # the condition lies on the same places
    guidance = torch.full_like(t, prompt.guidance)
    forward = compiled_velocity() if getattr(nets["prior"], "compiled", False) else flux_velocity
    return forward(nets["prior"], z, condition, prompt.text, prompt.pooled, t, guidance, places, places).float()


# ------------------------------------------------------------------------------------------------ losses


def predict_clean(z_t, velocity, t):
    """z0_hat = z_t - t V [Eq. 1]: exact where V = eps - z_0. z_t, velocity (B, ...), t (B,), 1 = noise.

    V also sees the prompt, which Eq. 1 leaves out.
    """
    return z_t - t.view(-1, *[1] * (z_t.dim() - 1)) * velocity


def attribute_loss(logits, target_probability):
    """BCE(AAE(D(z0_hat)), AAE(I_GT)) [Eq. 2], logits and soft targets (B, K) -> mean over both.

    Section 4.2 says "embeddings", section 4.3 "confidence scores"; a BCE takes scores: of the 12 attributes of section 3.1.
    UNSTATED: which; here ATTRIBUTES. The floor is the targets' entropy.
    """
    return F.binary_cross_entropy_with_logits(logits.float(), target_probability.float())


def attribute_divergence(logits, target_probability):
    """The same without its floor, KL(target || prediction) >= 0: what to look at in the log."""
    q = target_probability.float().clamp(1e-6, 1 - 1e-6)
    return attribute_loss(logits, q) - attribute_loss(q.logit(), q)


def edited_score(logits, edited):
    """A = AAE(D(z0_hat))_a, the score of the attribute in which the pair differs [Eq. 4]: (B, K), (B,) -> (B,)."""
    return logits.float().gather(1, edited[:, None])[:, 0].sigmoid()


def dual_margin_loss(score_src, score_tar, margin, sign=None):
    """max(0, m - |A_tar - A_src|) [Eq. 5], scores (B,), margin a number or (B,) -> mean.

    DIFFERS: with sign (B,), +1 where the target has the attribute and -1 where the source has it, the gap must point
    that way: max(0, m - s (A_tar - A_src)). The printed absolute value is also satisfied by the wrong order, and pushes
    there once the scores start out reversed. `pair_loss` also lets m be no more than the gap of the two clean faces. sign None
    and one m for all = as printed.
    """
    gap = score_tar - score_src
    return F.relu(margin - (gap.abs() if sign is None else sign * gap)).mean()


def branch_loss(velocity, decode, encoder, z0, noise, t, seen, target, edited, weight, attribute_weight):
    """L_AAL = L_diff + lambda L_attr of one face of a pair [Eq. 1-3]: (loss, scores (n,), {name: value}).

    velocity(z_t, t) -> (B, N, C), decode(tokens) -> images, encoder(images) -> logits (n, K). Only the rows `seen` (n,)
    are decoded and read; target (B, K) probabilities, edited (B,) attribute, weight (B,) of each row's L_diff.
    """
    z_t = torch.lerp(z0, noise, t.view(-1, 1, 1))
    v = velocity(z_t, t)
    diffusion = (weight * (v - (noise - z0)).square().mean((1, 2))).mean()
    if not len(seen):
        return diffusion, v.new_zeros(0), dict(diffusion=diffusion)
    logits = encoder(decode(predict_clean(z_t[seen], v[seen], t[seen])))
    attribute, kl = attribute_loss(logits, target[seen]), attribute_divergence(logits.detach(), target[seen])
    loss = diffusion + attribute_weight * attribute
    return loss, edited_score(logits, edited[seen]), dict(diffusion=diffusion, attribute=attribute, attribute_kl=kl)


def dual_training_loss(source, target, dual, dual_weight, backward=None):
    """L_total = L_AAL(src) + L_AAL(tar) + alpha L_dual [Eq. 6], and L_dual.

    source() and target() compute a branch: (loss, score); they draw nothing at random. dual(score_src, score_tar).
    With `backward` only one branch has a graph at a time. First comes the target's score without a graph. Then `backward` is
    called on the source's share. What is returned is the target's share alone, on which the caller calls backward. The sum of
    the two gradients is exactly that of the whole, for one forward pass more (none without a dual_weight).
    """
    if backward is None:
        (loss_src, a_src), (loss_tar, a_tar) = source(), target()
        gap = dual(a_src, a_tar)
        return loss_src + loss_tar + dual_weight * gap, gap
    held = None
    if dual_weight:
        with torch.no_grad():
            held = target()[1]
    loss_src, a_src = source()
    backward(loss_src + dual_weight * dual(a_src, held) if dual_weight else loss_src)
    loss_tar, a_tar = target()
    gap = dual(a_src.detach(), a_tar)
    return loss_tar + dual_weight * gap, gap


# ------------------------------------------------------------------------------------------------ optimiser: Prodigy


class Prodigy(torch.optim.Optimizer):
    """Adam that estimates its own step size d from the gradients [Mishchenko and Defazio 2023, Algorithm 4].

    d starts at d0 and only grows: towards D = |p0 - p*|, which <g, p0 - p> / |s|_1 summed over the run bounds from
    below. safeguard_warmup keeps the warm-up of lr out of the estimate. Bit-exact with prodigyopt 1.1.2 (decoupled
    decay). There is one d: ValueError for more than one group of parameters.
    """

    def __init__(self, params, lr=1.0, betas=(0.9, 0.999), weight_decay=0.0, use_bias_correction=False,
                 safeguard_warmup=False, d0=1e-6, d_coef=1.0, growth_rate=math.inf, eps=1e-8):
        super().__init__(params, dict(lr=lr, betas=betas, weight_decay=weight_decay, eps=eps, d_coef=d_coef,
                                      use_bias_correction=use_bias_correction, safeguard_warmup=safeguard_warmup,
                                      growth_rate=growth_rate, d0=d0, d=d0, d_max=d0, numerator=0.0, k=0))
        if len(self.param_groups) > 1:
            raise ValueError("Prodigy has one step size for all parameters: give one group")

    @torch.no_grad()
    def step(self, closure=None):
        loss = closure() if closure else None
        group = self.param_groups[0]
        (beta1, beta2), beta3 = group["betas"], group["betas"][1] ** 0.5
        d, d0, k = group["d"], group["d0"], group["k"]
        correction = (1 - beta2 ** (k + 1)) ** 0.5 / (1 - beta1 ** (k + 1)) if group["use_bias_correction"] else 1
        dlr = d * group["lr"] * correction
        parameters, dots, norms = [p for p in group["params"] if p.grad is not None], [], []
        for p in parameters:
            state, g = self.state[p], p.grad
            if not state:
                state.update(p0=p.clone(), s=torch.zeros_like(p), m=torch.zeros_like(p), v=torch.zeros_like(p))
            dots.append(torch.dot(g.flatten(), (state["p0"] - p).flatten()))
            state["m"].mul_(beta1).add_(g, alpha=d * (1 - beta1))
            state["v"].mul_(beta2).addcmul_(g, g, value=d * d * (1 - beta2))
            state["s"].mul_(beta3).add_(g, alpha=d / d0 * (d if group["safeguard_warmup"] else dlr))
            norms.append(state["s"].abs().sum())
        if not parameters or not (denominator := sum(torch.stack(norms).tolist())):
            return loss                                                          # no gradient yet: not a step
        group["numerator"] = beta3 * group["numerator"] + sum(d / d0 * dlr * x for x in torch.stack(dots).tolist())
        estimate = group["d_coef"] * group["numerator"] / denominator
        if d == d0:
            d = max(d, estimate)
        group["d_max"] = max(group["d_max"], estimate)
        group["d"] = d = min(group["d_max"], d * group["growth_rate"])
        for p in parameters:
            state = self.state[p]
            if group["weight_decay"]:
                p.add_(p, alpha=-group["weight_decay"] * dlr)                    # mul_(1 - x) rounds otherwise
            p.addcdiv_(state["m"], state["v"].sqrt().add_(d * group["eps"]), value=-dlr)
        group["k"] = k + 1
        return loss


# ------------------------------------------------------------------------------------------------ sampler


def flux_sigmas(steps: int, tokens: int):
    """(steps + 1,) times from 1 to 0: even steps, shifted towards noise the more tokens there are [FLUX.1-dev].

    mu is linear in the number of image tokens, 0.5 at 256 and 1.15 at 4096.
    """
    even = torch.linspace(1, 1 / steps, steps, dtype=torch.float64)
    mu = 0.5 + (1.15 - 0.5) * (tokens - 256) / (4096 - 256)
    return F.pad(math.exp(mu) / (math.exp(mu) + 1 / even - 1), (0, 1)).float()


def sd3_sigmas(steps: int, shift: float = 3.0):
    """(steps + 1,) times from 1 to 0 of SD3's scheduler: even from 1 to the shifted 1 / 1000, then shifted, then 0."""
    even = torch.linspace(1, shift / (999 + shift), steps, dtype=torch.float64)
    return F.pad(shift * even / (1 + (shift - 1) * even), (0, 1)).float()


@torch.no_grad()
def euler_sample(velocity, x, sigmas):
    """Integrate dx/dt = velocity(x, t (B,)) from sigmas[0] to 0, in float32."""
    for now, after in zip(sigmas[:-1].tolist(), sigmas[1:].tolist()):
        x = x + (after - now) * velocity(x, x.new_full((len(x),), now)).float()
    return x


def guide(velocity, away, scale: float):
    """away + scale (velocity - away): classifier-free guidance; 1 is none."""
    return away + scale * (velocity - away)


def normal(like, generator=None):
    """N(0, 1) of the shape of `like`, drawn on the CPU, the same on every device; a list gives one generator a row."""
    if isinstance(generator, list):
        return torch.stack([torch.randn(like.shape[1:], generator=g) for g in generator]).to(like)
    return torch.randn(like.shape, generator=generator).to(like)


@torch.no_grad()
def flow_edit(velocity, x_src, source, target, sigmas, n_max, n_min=0, n_avg=1, blend=1.0, generator=None):
    """Move x_src along V(target) - V(source), two velocities met at the same noise: no inversion [FlowEdit, Alg. 1].

    velocity(x, t (B,), prompt) with source and target as its prompts; sigmas (N + 1,) falling to 0. Of the N steps the
    first N - n_max are skipped (less change), the last n_min are ordinary sampling with the target. `blend` in [0, 1] is
    section 3.1's "controllable noise-blending", which interpolates noise maps by a formula of the supplement. DIFFERS: here
    velocities are mixed, V = (1 - blend) V_source + blend V_target: 0 changes nothing, 1 is FlowEdit. -> edited latents,
    float32. generator: of the noise, or a list of one per row.
    """
    x_src, steps = x_src.float(), len(sigmas) - 1
    n_max = min(n_max, steps)
    n_min = min(n_min, n_max)
    z = x_src
    for i, (now, after) in enumerate(zip(sigmas[:-1].tolist(), sigmas[1:].tolist())):
        left, t = steps - i, x_src.new_full((len(x_src),), now)
        noised = lambda: (1 - now) * x_src + now * normal(x_src, generator)
        if n_min < left <= n_max:
            change = torch.zeros_like(z)
            for _ in range(n_avg):
                z_src = noised()
                change += (velocity(z + z_src - x_src, t, target).float() - velocity(z_src, t, source).float()) / n_avg
            z = z + (after - now) * blend * change
        elif left <= n_min:
            z = z + noised() - x_src if left == n_min else z                     # onto the path of the target
            z = z + (after - now) * velocity(z, t, target).float()
    return z


@torch.no_grad()
def restore(nets, cfg, lq, prompts: list, noise, negative: str = TEMPLATE):
    """lq (B, 3, S, S) in [-1, 1], B prompts, noise (B, N, C) -> restored faces (B, 3, S, S) in [-1, 1].

    cfg: a `Train` configuration. A step takes up to three velocities: with everything, with the negative prompt, and with a
    black degraded image. v + (s - 1) (v - v_negative) + (s' - 1) (v - v_black); a scale of 1 leaves its term out.
    DIFFERS: OminiControl draws the latents of the degraded image from their posterior, here it is their mean.
    """
    condition = nets["codec"].encode(lq)
    asked = Prompt(*nets["text"].encode(prompts), cfg.guidance_scale)
    if cfg.true_cfg_scale != 1:
        against = Prompt(*nets["text"].encode([negative] * len(lq)), cfg.guidance_scale)
    if cfg.image_guidance_scale != 1:
        black = nets["codec"].encode(torch.full_like(lq, -1))

    def guided(z, t):
        v = velocity(nets, z, t, asked, condition)
        change = torch.zeros_like(v)
        if cfg.true_cfg_scale != 1:
            change += (cfg.true_cfg_scale - 1) * (v - velocity(nets, z, t, against, condition))
        if cfg.image_guidance_scale != 1:
            change += (cfg.image_guidance_scale - 1) * (v - velocity(nets, z, t, asked, black))
        return v + change

    z = euler_sample(guided, noise, flux_sigmas(cfg.num_inference_steps, noise.shape[1]))
    return nets["codec"].decode(z).clamp(-1, 1)


# ------------------------------------------------------------------------------------------------ data: pairs of faces


def read_pairs(path) -> list:
    """The rows of a pairs.jsonl: {source, target, attribute, sign, source_prompt, target_prompt, accepted, ...}.

    A line that a kill has cut short is left out.
    """
    rows = []
    for line in filter(str.strip, Path(path).read_text(errors="replace").splitlines()):
        try:
            rows.append(json.loads(line))
        except ValueError:
            print(f"{path}: a line is left out, it is no JSON: {line[:40]}", flush=True)
    return rows


class Pairs:
    """Rows of a pairs.jsonl as batches that depend on (seed, step, rank) alone."""

    def __init__(self, folder, rows: list, size: int, degradation: str, dual: bool = True):
        self.rows, self.dual = rows, dual
        files = sorted({Path(folder, row[key]) for row in rows for key in ("source", "target")})
        self.faces, self.place = Faces(folder, size, degradation, files=files), {path: k for k, path in enumerate(files)}

    def read(self, rows: list, key: str, seeds) -> dict:
        """hq (B, 3, S, S), and lq of sources, of the pictures that the rows name. UserError where one is damaged."""
        places = [self.place[self.faces.folder / row[key]] for row in rows]
        degraded = key == "source" or self.faces.degradation.grey > 0            # a grey lq turns both faces grey
        found = self.faces.batch(places, seeds, degraded)
        if found["place"].tolist() != places:
            raise UserError(f"{self.faces.folder}: a picture of pairs.jsonl cannot be read; take its line out")
        return found

    def batch(self, rows: list, seeds) -> dict:
        """hq, hq_tar, lq (B, 3, S, S), edited, sign, seeds (B,), source_prompts and target_prompts (lists).

        Attribute `edited` differs between hq and hq_tar: with sign +1 the target has it. UNSTATED: lq is made from the source.
        """
        source, target = self.read(rows, "source", seeds), self.read(rows, "target", seeds)
        return dict(hq=source["hq"], hq_tar=target["hq"], lq=source["lq"], seeds=source["seeds"],
                    edited=torch.tensor([NAMES.index(row["attribute"]) for row in rows]),
                    sign=torch.tensor([float(row["sign"]) for row in rows]),
                    source_prompts=[row["source_prompt"] for row in rows],
                    target_prompts=[row["target_prompt"] for row in rows])

    def training(self, count: int, seed: int, step: int, rank: int = 0, world: int = 1) -> dict:
        """The batch of one (step, rank): epochs in an endless row, each a permutation of the rows.

        Without dual training the loss sees the source alone. Then half of the rows change source and target, drawn anew in
        every epoch. UNSTATED: what Table 4's rows without SDT train on; here the faces and prompts of the rows with SDT.
        """
        places = ((step * world + rank) * count + torch.arange(count)).tolist()
        orders = {e: torch.randperm(len(self.rows), generator=torch.Generator().manual_seed(mix("pairs", seed, e)))
                  for e in {p // len(self.rows) for p in places}}
        rows = [self.rows[orders[p // len(self.rows)][p % len(self.rows)]] for p in places]
        seeds = [mix("lq", seed, p) for p in places]
        if not self.dual:
            rows = [exchanged(row) if s % 2 == 0 else row for row, s in zip(rows, seeds)]
        return self.batch(rows, seeds)

    def held_out(self, count: int) -> dict:
        """The first `count` rows, always with the same degraded images."""
        rows = self.rows[:count]
        return self.batch(rows, [mix("lq", row["source"], row["target"]) for row in rows])


def accepted(path: Path) -> list:
    """Accepted rows whose pictures are there: deleting bad targets is the manual review of section 3.1."""
    return [row for row in read_pairs(path) if row["accepted"] and row["attribute"] in NAMES
            and (path.parent / row["source"]).exists() and (path.parent / row["target"]).exists()]


def exchanged(row: dict) -> dict:
    """A row whose source and target have changed places."""
    return dict(row, source=row["target"], target=row["source"], sign=-row["sign"],
                source_prompt=row["target_prompt"], target_prompt=row["source_prompt"])


def open_pairs(cfg) -> tuple:
    """(Pairs to train on, Pairs held out) of --data or --pairs, and --validation_data.

    Without --validation_data the last people are held out, about a tenth of the rows; where a row names no person, its source
    is one.
    """
    where, held_out = cfg.pairs or cfg.data, cfg.validation_data
    if not where:
        open_faces(cfg)                                            # draws data/toy, once
        where, held_out = "data/toy/pairs", held_out or "data/toy/pairs_val"
    path, held_path = Path(where), Path(held_out or where)
    path, held_path = (place / "pairs.jsonl" if place.is_dir() else place for place in (path, held_path))
    rows, held = accepted(path), accepted(held_path)
    if held_path == path:
        person = lambda row: str(row.get("person", row["source"]))
        people = sorted(set(map(person, rows)))
        last = set(people[-max(1, len(people) // 10):])
        rows, held = [row for row in rows if person(row) not in last], [row for row in rows if person(row) in last]
    if not rows or not held:
        raise UserError(f"--pairs {path}: {len(rows)} accepted pairs to train on, {len(held)} to measure on; build more "
                        "(python a2bfr.py pairs)")
    options = dict(size=cfg.image_size, degradation=cfg.degradation)
    return Pairs(path.parent, rows, dual=cfg.dual_training, **options), Pairs(held_path.parent, held, **options)


# ------------------------------------------------------------------------------------------------ training


def draw_times(count: int, shift: float, device):
    """Logit-normal t = sigmoid(N(0, 1)) [OminiControl, as FLUX's recipe], moved to s t / (1 + (s - 1) t): to noise for s > 1."""
    t = torch.randn(count).sigmoid().to(device)
    return shift * t / (1 + (shift - 1) * t)


def pair_loss(cfg, run, nets, encoder, batch: dict, backward=None) -> tuple:
    """Loss of a batch, and {name: value} for the log: L_total of pairs [Eq. 6], or without dual training L_AAL [Eq. 3].

    First come all draws. Both branches share the degraded image, t and the noise; only the prompt and the clean face in z_t
    differ. At high t z_t shows little of the face, so the gap between the scores measures the prompt. UNSTATED: that they
    share t and noise.
    With `backward` the two branches need the memory of one: see `dual_training_loss`.
    """
    count, codec = len(batch["hq"]), nets["codec"]
    hq = dict(src=batch["hq"], tar=batch["hq_tar"])
    prompts = dict(src=batch["source_prompts"], tar=batch["target_prompts"])
    keep_text, keep_lq = torch.rand(count) >= cfg.drop_text, torch.rand(count) >= cfg.drop_condition
    z0, truth, prompt, parts = {}, {}, {}, {}
    with torch.no_grad(), run.autocast():
        lq = torch.where(keep_lq.view(-1, 1, 1, 1).to(run.device), batch["lq"], -1.0)        # black pixels, not zero latents
        condition = codec.encode(lq, torch.randn_like)
        t, noise = draw_times(count, cfg.time_shift, run.device), torch.randn_like(condition)
        for side in ("src", "tar") if cfg.dual_training else ("src",):
            z0[side] = codec.encode(hq[side], torch.randn_like)
            truth[side] = read_attributes(encoder, hq[side]).sigmoid()                       # AAE(I_GT)
            said = [p if keep else TEMPLATE for p, keep in zip(prompts[side], keep_text)]    # UNSTATED: OminiControl says ""
            prompt[side] = Prompt(*nets["text"].encode(said))                                # guidance 1: OminiControl's

    # The rows whose one-step face the encoder reads: those that have a prompt and are not too noisy
    keep_text = keep_text.to(run.device)
    seen = (keep_text & (t <= READ_UNTIL)).nonzero()[:, 0]
    if not cfg.attribute_weight and not (cfg.dual_training and cfg.dual_weight):
        seen = seen[:0]

    def branch(side):  # -> L_AAL [Eq. 3], scores of the edited attribute [Eq. 4]
        # UNSTATED: without its prompt nothing asks for the target, and L_diff would only teach drift.
        weight = keep_text.float() if side == "tar" else torch.ones_like(t)
        with run.autocast():
            loss, score, found = branch_loss(
                lambda z_t, t: velocity(nets, z_t, t, prompt[side], condition), codec.decode,
                functools.partial(read_attributes, encoder), z0[side], noise, t, seen, truth[side], batch["edited"], weight,
                cfg.attribute_weight)
        parts.update({f"{name}_{side}": value.detach() for name, value in found.items()})
        return loss, score

    def dual(a_src, a_tar):  # -> L_dual [Eq. 5]
        if not len(seen):
            return t.new_zeros(())
        if cfg.dual == "abs":
            return dual_margin_loss(a_src, a_tar, cfg.dual_margin)
        sign, edited = batch["sign"][seen], batch["edited"][seen, None]
        # m is at most what the clean faces differ in the asked direction; where the encoder sees it the other way, 0
        apart = sign * (truth["tar"][seen].gather(1, edited) - truth["src"][seen].gather(1, edited))[:, 0]
        return dual_margin_loss(a_src, a_tar, apart.clamp(0, cfg.dual_margin), sign)

    if not cfg.dual_training:
        return branch("src")[0], parts
    loss, gap = dual_training_loss(functools.partial(branch, "src"), functools.partial(branch, "tar"), dual,
                                   cfg.dual_weight if len(seen) else 0.0, backward)
    return loss, dict(parts, dual=gap.detach())


def train_lora(cfg, run, pairs, nets, encoder):
    """The paper's only stage: the LoRA on the condition's tokens learns, FLUX and the encoder stay frozen [sec. 4.1]."""
    prior = nets["prior"]
    if cfg.gradient_checkpointing:
        prior.enable_gradient_checkpointing()
        nets["codec"].vae.enable_gradient_checkpointing()
    parameters = [p for p in prior.parameters() if p.requires_grad]
    if cfg.optimizer == "prodigy":                                 # as OminiControl sets it
        optimizer = Prodigy(parameters, lr=cfg.learning_rate, weight_decay=0.01, use_bias_correction=True,
                            safeguard_warmup=True, d0=cfg.prodigy_d0)
    else:
        optimizer = make_optimizer(cfg, parameters, cfg.learning_rate, weight_decay=0.01)
    modules, factor = {"lora": prior}, lr_schedule(cfg, cfg.max_train_steps)
    ema = EMA(modules, cfg.ema_decay)                              # averaged weights of the LoRA, for `sample`
    first, pieces = run.load("lora", modules, ema, optimizer), cfg.gradient_accumulation_steps
    backward = lambda loss: (loss / pieces).backward()             # micro-batches add up their gradients

    for step, batch in run.batches(pairs.training, "lora", first, cfg.max_train_steps):
        optimizer.zero_grad()
        for i in range(0, cfg.batch_size * pieces, cfg.batch_size):              # the batch holds all micro-batches
            part = {key: value[i:i + cfg.batch_size] for key, value in batch.items()}
            loss, values = pair_loss(cfg, run, nets, encoder, part, backward if cfg.gradient_checkpointing else None)
            backward(loss)
            run.note(**values)
        run.average_gradients(modules)
        grad_norm = nn.utils.clip_grad_norm_(parameters, cfg.max_grad_norm)
        for group in optimizer.param_groups:
            group["lr"] = cfg.learning_rate * factor(step)
        optimizer.step()
        ema.update(step)
        if cfg.optimizer == "prodigy":                             # its step size only grows
            run.note(prodigy_d=torch.tensor(optimizer.param_groups[0]["d"]))
        run.log("lora", step, grad_norm=grad_norm)
        run.save("lora", step, modules, ema, optimizer)

    prior.load_state_dict(ema["lora"], strict=False)               # the LoRA is all that ema holds


def train(cfg: Train) -> None:
    """Train the LoRA and write it, then restore and measure held-out faces."""
    run = Run(cfg, SETTINGS)
    pairs, held = open_pairs(cfg)
    nets, encoder = load_networks(cfg, run.device), load_encoder(cfg, run.device)
    metrics.load_reader("b", cfg.readers, NEEDS)                   # what it lacks is said now, not after the training
    torch.manual_seed(mix("lora", cfg.seed))
    add_condition_lora(nets["prior"], cfg.rank, cfg.lora_alpha or cfg.rank)
    nets["prior"].compiled = cfg.compile
    if path := run.part("lora"):
        run.say("stage lora: taken as it is")
        load_lora(nets["prior"], path)
    else:
        train_lora(cfg, run, pairs, nets, encoder)
        run.finish("lora", {"lora": lora_tensors(nets["prior"])})
    if run.main:
        report(cfg, run, held, nets)


# ------------------------------------------------------------------------------------------------ networks, weights


def load_flux(where: str, dtype) -> dict:
    """Codec and transformer of a FLUX folder or hub id, frozen. UserError where it is incomplete."""
    from diffusers import AutoencoderKL, FluxTransformer2DModel
    prior = from_folder(FluxTransformer2DModel, where, "pretrained_model_name_or_path", "transformer", dtype=dtype)
    vae = from_folder(AutoencoderKL, where, "pretrained_model_name_or_path", "vae", dtype=dtype)
    codec = Codec(vae, vae.config.shift_factor, vae.config.scaling_factor)
    return dict(codec=codec.eval().requires_grad_(False), prior=prior.eval().requires_grad_(False))


def load_networks(cfg, device) -> dict:
    """FLUX's autoencoder, transformer and text encoders, frozen; in bf16, as released, where cfg computes in it.

    33 GB, and 42 while the paper's LoRA trains. cfg names the folder or hub id, the precision and the size of the faces.
    """
    dtype = torch.bfloat16 if cfg.mixed_precision == "bf16" else torch.float32
    text = FluxText(cfg.pretrained_model_name_or_path, dtype)
    nets = dict(load_flux(cfg.pretrained_model_name_or_path, dtype), text=text)
    if cfg.image_size % nets["codec"].token:
        raise UserError(f"--image_size {cfg.image_size}: must be a multiple of {nets['codec'].token}, the side of a token")
    return {name: net.to(device) for name, net in nets.items()}


def load_encoder(cfg, device):
    """The frozen attribute encoder: FaRL where its file is given, else reader_a.

    DIFFERS: the paper detects and aligns the face first [sec. 4.1]; here faces are aligned already.
    """
    if cfg.farl:
        return metrics.load_weights(metrics.FaRLAttributes(), cfg.farl).requires_grad_(False).to(device)
    return metrics.load_reader("a", cfg.readers, ["attributes"]).to(device)


def read_attributes(encoder, faces):
    """Attribute logits (B, 12) of faces (B, 3, S, S) in [-1, 1], differentiable, in float32 whatever the autocast."""
    with torch.autocast(faces.device.type, enabled=False):
        if isinstance(encoder, metrics.FaRLAttributes):                          # 40 logits of a fixed alignment
            mean, std = faces.new_tensor(encoder.CLIP).view(2, 3, 1, 1)
            logits = encoder((encoder.canvas(faces.float()) - mean) / std)
            return logits[:, [index for index, _, _, _ in ATTRIBUTES]]
        return encoder.attributes(encoder.stages(faces.float())[-1].flatten(1))


def lora_tensors(prior) -> dict:
    """{name: tensor} in the layout of diffusers and OminiControl; B carries alpha / rank, so the file's scale is 1."""
    layers = {name: prior.get_submodule(name) for name in condition_layers(prior)}
    return {f"transformer.{name}.{key}.weight": tensor for name, layer in layers.items()
            for key, tensor in (("lora_A", layer.lora_A.weight), ("lora_B", layer.scale * layer.lora_B.weight))}


def load_lora(prior, path) -> None:
    """The inverse of `lora_tensors`, into the layers of `add_condition_lora`. UserError on another rank or other layers."""
    tensors, scale = {}, prior.x_embedder.scale
    for name, (a, b) in read_lora(path).items():
        tensors |= {f"{name}.lora_A.weight": a, f"{name}.lora_B.weight": b / scale}
    load_trained(prior, tensors, path)


def lora_rank(path) -> int:
    """Rank of a LoRA file."""
    return len(next(iter(read_lora(path).values()))[0])


# ------------------------------------------------------------------------------------------------ restore, measure


def siblings(index: int) -> tuple:
    """The group of SIBLINGS that attribute `index` belongs to, else itself alone."""
    return next((group for group in SIBLINGS if index in group), (index,))


def others_of(index: int) -> list:
    """Attributes that an edit of `index` should leave alone: all but itself and its siblings."""
    return [i for i in range(len(ATTRIBUTES)) if i not in siblings(index)]


def in_batches(function, *columns, size: int):
    """`function` of `size` rows of the columns (tensors or lists) at a time; its results joined on the CPU."""
    return torch.cat([function(*(column[i:i + size] for column in columns)).cpu() for i in range(0, len(columns[0]), size)])


@torch.no_grad()
def prompt_scores(source, target, edited: list, sign: list, reader) -> dict:
    """How well two restorations of the same faces follow their prompts, read by `reader` (not the one of the loss).

    source, target (N, 3, S, S) under T_src and T_tar; edited: the attribute that T_tar switches, on for sign 1.
    attribute_accuracy_toy: share of targets whose edited attribute is on the asked side (AA of section 5.1, which asks
    Qwen3-VL). cross_prompt_identity_toy: mean cosine (CP-IDS, section 5.3). leakage_toy: mean change of the attributes that
    should stay, all but the edited one and its siblings. per_attribute: [accuracy, faces] by request.
    """
    device = next(reader.parameters()).device
    look = lambda x: [in_batches(lambda y: f(y.to(device)), x, size=64) for f in (reader.embed, reader.probabilities)]
    (who_a, a), (who_b, b) = look(source), look(target)
    right = [float((b[i, k] > 0.5) == (s > 0)) for i, (k, s) in enumerate(zip(edited, sign))]
    leak = [(a[i] - b[i]).abs()[others_of(k)].mean().item() for i, k in enumerate(edited)]
    groups: dict = {}
    for k, s, r in zip(edited, sign, right):
        groups.setdefault(f"{'' if s > 0 else 'not '}{NAMES[k]}", []).append(r)
    return dict(attribute_accuracy_toy=statistics.mean(right), leakage_toy=statistics.mean(leak),
                cross_prompt_identity_toy=(who_a * who_b).sum(1).mean().item(),
                per_attribute={name: [round(statistics.mean(v), 3), len(v)] for name, v in sorted(groups.items())})


def restore_held_out(cfg, run, nets, lq, prompts: list):
    """Faces (N, 3, S, S) on the CPU; face i has the same noise under every prompt."""
    noise = nets["codec"].noise(lq.shape[-1], [mix("noise", cfg.seed, i) for i in range(len(lq))])
    with run.autocast():
        return in_batches(lambda x, p, e: restore(nets, cfg, x.to(run.device), p, e), lq, prompts, noise, size=cfg.batch_size)


def report(cfg, run, held, nets) -> None:
    """Restore held-out faces under the prompts of the source, of the target and the template; measure them.

    Row `edited` stands for Table 3's pipelines: restored, then edited by FlowEdit with the same FLUX. DIFFERS: restored with
    the template; section 5.3 gives all methods T_tar. samples_prompts.png shows six faces under the prompts of SHOWN, as
    Figure 6.
    """
    batch = held.held_out(cfg.validation_faces)
    hq, lq = batch["hq"], batch["lq"]
    asked = dict(template=[TEMPLATE] * len(hq), source=batch["source_prompts"], target=batch["target_prompts"])
    images = {"lq": lq} | {name: restore_held_out(cfg, run, nets, lq, prompts) for name, prompts in asked.items()}
    how = BuildPairs(**(FLUX_EDITOR if nets["prior"].config.guidance_embeds else TOY_EDITOR))
    edit = functools.partial(edit_faces, flux_editor(nets, how.num_inference_steps, cfg.image_size), how, 1.0, run.device)
    recode = lambda x: nets["codec"].decode(nets["codec"].encode(x.to(run.device))).clamp(-1, 1)
    seeds = [mix("edit", cfg.seed, i) for i in range(len(hq))]
    with torch.no_grad(), run.autocast():
        images["edited"] = in_batches(edit, images["template"], asked["source"], asked["target"], seeds, size=cfg.batch_size)
        images["autoencoder"] = in_batches(recode, hq, size=cfg.batch_size)

    reader, rows, per_attribute = metrics.load_reader("b", cfg.readers, NEEDS).to(run.device), {}, {}
    for name, faces in images.items():
        rows[name] = metrics.toy_scores(faces, batch["hq_tar"] if name in ("target", "edited") else hq, reader, lq)
    for name, before in (("target", "source"), ("edited", "template")):
        found = prompt_scores(images[before], images[name], batch["edited"].tolist(), batch["sign"].tolist(), reader)
        per_attribute[name] = found.pop("per_attribute")
        rows[name] |= found
    shown = {title: restore_held_out(cfg, run, nets, lq[:6], [prompt] * len(lq[:6])) for title, prompt in SHOWN.items()}
    run.show("prompts", {"lq": lq[:6]} | shown)
    run.report(rows, dict(images, hq=hq, hq_tar=batch["hq_tar"]), nets, main="target", per_attribute=per_attribute,
               faces=len(hq), protocol=metrics.toy_protocol(held.faces.folder, cfg.degradation, len(hq), cfg.readers))


def sample(cfg: Sample) -> None:
    """Restore a picture or a folder under --prompt, into --output."""
    lora, trained = open_run(cfg.lora or cfg.checkpoint, Train)
    if lora.is_dir():
        lora = min(lora.glob("*.safetensors"), default=lora / "lora.safetensors")
    if trained is None:  # the release: a LoRA without a run of ours
        trained = Train(guidance_scale=3.0)
    names = ("pretrained_model_name_or_path", "num_inference_steps", "guidance_scale", "true_cfg_scale",
             "image_guidance_scale", "image_size", "mixed_precision")
    trained = dataclasses.replace(trained, **{name: getattr(cfg, name) for name in names if getattr(cfg, name)})
    precision = "bf16" if trained.mixed_precision == "bf16" else "no"
    run, rank = Run(dataclasses.replace(cfg, mixed_precision=precision)), lora_rank(lora)
    nets = load_networks(trained, run.device)
    nets["prior"].compiled = cfg.compile
    add_condition_lora(nets["prior"], rank, rank)                   # scale 1: the file's B carries alpha / rank
    load_lora(nets["prior"], lora)
    for prompt in (cfg.prompt, cfg.negative_prompt):
        if unread := nets["text"].unread(prompt):
            print(f"{prompt!r}: {unread}", flush=True)

    def restore_batch(lq, stems):
        # Every face gets the same noise, so that its result depends on the seed and not on its place in the folder.
        noise = nets["codec"].noise(trained.image_size, [cfg.seed] * len(lq))
        with run.autocast():
            return {"restored_faces": restore(nets, trained, lq, [cfg.prompt] * len(lq), noise, cfg.negative_prompt)}

    restore_folder(cfg, restore_batch, trained.image_size, run.device)


# ------------------------------------------------------------------------------------------------ building pairs


def editable(scores, positive=0.6, negative=0.4) -> list:
    """Indices of the attributes that can be switched: sure ones; of siblings, one that is off while another is on."""
    def switchable(i):
        if len(siblings(i)) > 1:
            return scores[i] < negative and max(scores[j] for j in siblings(i)) > positive
        return scores[i] > positive or scores[i] < negative
    return [i for i in range(len(ATTRIBUTES)) if switchable(i)]


def switch(scores, index: int) -> tuple:
    """(scores after switching attribute `index` and what excludes it, +1 switched on or -1 off)."""
    after, sign = [float(s) for s in scores], -1 if scores[index] > 0.5 else 1
    for i in siblings(index):
        after[i] = 0.0
    after[index] = float(sign > 0)
    return after, sign


class Editor(NamedTuple):
    """What FlowEdit needs of a text-to-image model."""
    velocity: typing.Callable              # (x, t, prompt) -> velocity
    prompt: typing.Callable                # (prompts, guidance) -> prompt
    encode: typing.Callable                # images (B, 3, S, S) in [-1, 1] -> x
    decode: typing.Callable                # x -> images
    sigmas: torch.Tensor                   # (N + 1,)


def flux_editor(nets, steps: int, size: int) -> Editor:
    """FLUX alone, no degraded image. FLUX.1-dev embeds the guidance. A FLUX without that embedding, as the toy's, takes
    classifier-free guidance against the empty prompt, as SD3 does."""
    codec, embedded = nets["codec"], nets["prior"].config.guidance_embeds

    def encode_prompt(prompts, guidance):  # with | without
        return [Prompt(*nets["text"].encode(said), guidance) for said in (prompts, [""] * len(prompts))]

    def guided(x, t, prompt):
        asked, empty = prompt
        v = velocity(nets, x, t, asked)
        return v if embedded or asked.guidance == 1 else guide(v, velocity(nets, x, t, empty), asked.guidance)

    return Editor(guided, encode_prompt, codec.encode, lambda z: codec.decode(z).clamp(-1, 1),
                  flux_sigmas(steps, (size // codec.token) ** 2))


def sd3_editor(where: str, steps: int, device, dtype) -> Editor:
    """SD3 or SD3.5: three text encoders, latents unpacked, classifier-free guidance against the empty prompt."""
    from diffusers import StableDiffusion3Pipeline
    pipe = StableDiffusion3Pipeline.from_pretrained(where, dtype=dtype).to(device)
    vae, net = pipe.vae, pipe.transformer
    scale, shift = vae.config.scaling_factor, vae.config.shift_factor

    def encode_prompt(prompts, guidance):  # with | without, in one batch
        text, no_text, pooled, no_pooled = pipe.encode_prompt(prompts, None, None, negative_prompt=[""] * len(prompts))
        return torch.cat([text, no_text]), torch.cat([pooled, no_pooled]), guidance

    def guided(x, t, prompt):
        text, pooled, guidance = prompt
        v, away = net(hidden_states=torch.cat([x, x]).to(net.dtype), timestep=1000 * torch.cat([t, t]),
                      encoder_hidden_states=text, pooled_projections=pooled, return_dict=False)[0].float().chunk(2)
        return guide(v, away, guidance)

    return Editor(guided, encode_prompt,
                  lambda x: (vae.encode(x.to(vae.dtype)).latent_dist.mean.float() - shift) * scale,
                  lambda z: vae.decode((z / scale + shift).to(vae.dtype)).sample.float().clamp(-1, 1),
                  sd3_sigmas(steps, pipe.scheduler.config.shift))


@torch.no_grad()
def edit_faces(editor: Editor, cfg: BuildPairs, blend: float, device, images, source: list, target: list, seeds: list):
    """FlowEdit of images (B, 3, S, S) from one prompt each to another; each has its own noise, whoever is beside it."""
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    z = flow_edit(editor.velocity, editor.encode(images.to(device)), editor.prompt(source, cfg.source_guidance),
                  editor.prompt(target, cfg.target_guidance), editor.sigmas, cfg.n_max, blend=blend, generator=generators)
    return editor.decode(z)


class Judge:
    """What is read off faces to accept or reject a pair: attributes, identity, landmarks, SSIM."""

    def __init__(self, cfg: BuildPairs, device):
        self.encoder, self.device = load_encoder(cfg, device), device
        needs = ["identity"] * (not cfg.arcface) + ["landmarks"] * (not cfg.fan)
        self.identity = self.detector = metrics.load_reader("a", cfg.readers, needs).to(device)
        if cfg.arcface:
            self.identity = metrics.load_iresnet(cfg.arcface).requires_grad_(False).to(device)
        if cfg.fan:
            self.detector = metrics.load_weights(metrics.FAN98(), cfg.fan).requires_grad_(False).to(device)

    @torch.no_grad()
    def attributes(self, faces) -> list:
        """12 scores per face."""
        return read_attributes(self.encoder, faces.to(self.device)).sigmoid().tolist()

    @torch.no_grad()
    def compare(self, source, target) -> list:
        """[identity, structure, shift] per row of two batches (B, 3, S, S) in [-1, 1]."""
        a, b = source.to(self.device), target.to(self.device)
        likeness = (self.identity.embed(a) * self.identity.embed(b)).sum(1)
        points_a, points_b = self.detector.landmarks(a), self.detector.landmarks(b)
        eyes = (points_a[:, 96] - points_a[:, 97]).norm(dim=-1).clamp(min=1e-3)   # WFLW's two pupils
        shift = (points_a - points_b).norm(dim=-1).mean(1) / eyes
        return torch.stack([likeness, metrics.ssim(a / 2 + 0.5, b / 2 + 0.5), shift], 1).tolist()


def quality_check(source, target, edited: int, sign: int, identity: float, structure: float, shift: float, positive=0.6,
                  negative=0.4, max_leak=0.3, min_identity=0.4, min_structure=0.5, max_shift=0.03) -> tuple:
    """May (source, target) teach one attribute? ({score: number}, [reason why not]): yes where there is no reason.

    The three automatic checks of section 3.1: attribute, identity, structure.
    source, target: 12 scores each in [0, 1]; edited: the attribute, sign +1 to be on, -1 off in the target; identity:
    cosine of the faces; structure: their SSIM; shift: mean landmark shift over the distance of the eyes. The attribute
    must cross from one side to the other. NaN fails. The paper's manual review comes after: look at target/.
    """
    moved = {NAMES[i]: abs(float(target[i]) - float(source[i])) for i in others_of(edited)}
    worst = max(moved, key=lambda name: math.inf if math.isnan(moved[name]) else moved[name])
    before, after = float(source[edited]), float(target[edited])
    tests = [
        (before < negative if sign > 0 else before > positive, f"attribute: {NAMES[edited]} was {before:.2f} already"),
        (after > positive if sign > 0 else after < negative,
         f"attribute: {NAMES[edited]} is {after:.2f} after being switched {'on' if sign > 0 else 'off'}"),
        (moved[worst] <= max_leak, f"attribute: {worst} moved by {moved[worst]:.2f} as well"),
        (identity >= min_identity, f"identity: similarity {identity:.2f}"),
        (structure >= min_structure, f"structure: SSIM {structure:.2f}"),
        (shift <= max_shift, f"structure: landmarks moved by {shift:.3f} of the eyes' distance")]
    scores = dict(before=before, after=after, leak=moved[worst], identity=identity, structure=structure, shift=shift)
    return {name: round(value, 4) for name, value in scores.items()}, [reason for passed, reason in tests if not passed]


def make_jobs(cfg: BuildPairs, faces: Faces, places: list, judge: Judge, done: set) -> list:
    """[(row of pairs.jsonl, source (3, S, S), its scores)] of the pairs that some pictures of a folder are to give.

    Every picture gives `edits` pairs, one attribute each. Those done before are left out.
    """
    images, jobs = {}, []
    for k in places:
        found, image, _ = faces.load(k)
        if found == k:                                            # else it is damaged, and its neighbour came
            images[k] = image / 127.5 - 1
    scores_of = judge.attributes(torch.stack(list(images.values()))) if images else []
    for (k, image), scores in zip(images.items(), scores_of):
        face, parent = faces.names[k].replace("/", "%2F"), faces.files[k].parent  # with suffix: a.png is not a.jpg
        choice = editable(scores, cfg.positive, cfg.negative)
        order = torch.randperm(len(choice), generator=torch.Generator().manual_seed(mix("edits", cfg.seed, face)))
        for edited in (choice[i] for i in order[:cfg.edits]):
            after, sign = switch(scores, edited)
            name, person = f"{face}_{NAMES[edited]}", parent.name if parent != faces.folder else face
            row = dict(id=name, person=person, source=f"source/{face}.png", target=f"target/{name}.png",
                       attribute=NAMES[edited], sign=sign, source_prompt=verbalise(scores), target_prompt=verbalise(after))
            jobs += [(row, image, scores)] if name not in done else []
    return jobs


def pairs(cfg: BuildPairs) -> None:
    """Every pair tries blends, mildest first, until its checks pass. A pair that is listed in pairs.jsonl is done."""
    run, path = Run(cfg), Path(cfg.output) / "pairs.jsonl"
    run.folder.mkdir(parents=True, exist_ok=True)
    if cfg.editor == "sd3":
        dtype = torch.bfloat16 if cfg.mixed_precision == "bf16" else torch.float32
        editor = sd3_editor(cfg.pretrained_model_name_or_path, cfg.num_inference_steps, run.device, dtype)
    else:
        editor = flux_editor(load_networks(cfg, run.device), cfg.num_inference_steps, cfg.image_size)
    judge = Judge(cfg, run.device)
    metrics.load_reader("b", cfg.readers, NEEDS)                   # for the report
    if not cfg.data:
        open_faces(Train())                                        # draws data/toy, once
    faces = Faces(cfg.data or "data/toy/train", cfg.image_size)
    # By file name: in a folder of people the first picture of everybody comes before the second ones.
    places = sorted(range(len(faces)), key=lambda k: faces.files[k].name)[:cfg.count]
    with open(path, "a") as file:
        if path.read_bytes()[-1:] not in (b"", b"\n"):             # a kill has cut the last line short: end it
            file.write("\n")
    done = {row["id"] for row in read_pairs(path)}
    limits = ("positive", "negative", "max_leak", "min_identity", "min_structure", "max_shift")
    limits = {name: getattr(cfg, name) for name in limits}
    attempts = [blend for blend in cfg.blends for _ in range(cfg.tries)]
    for start in tqdm(range(0, len(places), cfg.batch_size), "editing", disable=None):
        jobs = make_jobs(cfg, faces, places[start:start + cfg.batch_size], judge, done)
        for number, blend in enumerate(attempts, 1):
            if not jobs:
                break
            rows, images, _ = zip(*jobs)
            images, seeds = torch.stack(images), [mix("edit", cfg.seed, row["id"], number) for row in rows]
            prompts = ([row[key] for row in rows] for key in ("source_prompt", "target_prompt"))
            with run.autocast():
                edited = edit_faces(editor, cfg, blend, run.device, images, *prompts, seeds).cpu()
            left, found = [], zip(jobs, edited, judge.attributes(edited), judge.compare(images, edited))
            for (row, image, before), target, after, numbers in found:
                scores, reasons = quality_check(before, after, NAMES.index(row["attribute"]), row["sign"], *numbers, **limits)
                if reasons and number < len(attempts):
                    left.append((row, image, before))
                    continue
                if not reasons:                                    # first the pictures: a pair that is listed is whole
                    write_image(run.folder / row["source"], image)
                    write_image(run.folder / row["target"], target)
                row |= dict(accepted=not reasons, scores=scores, reasons=reasons, blend=blend, attempts=number)
                with open(path, "a") as file:
                    file.write(json.dumps(row) + "\n")
            jobs = left
    pairs_report(cfg, run, path)


def pairs_report(cfg: BuildPairs, run, path: Path) -> None:
    """metrics.json and samples.png of the accepted pairs, at most a thousand of them, read again from the files."""
    rows, good = read_pairs(path), accepted(path)
    failed = Counter(reason.split(":")[0] for row in rows if not row["accepted"] for reason in row["reasons"])
    if not good:
        raise UserError(f"no pair was accepted out of {len(rows)} (failed: {dict(failed)}): see the reasons in {path}; raise "
                        "--target_guidance or --n_max, or loosen a check")
    every = math.ceil(len(good) / 1000)
    batch = Pairs(path.parent, good[::every], min(cfg.image_size, 256), "codeformer").held_out(1000)
    source, target, edited, sign = batch["hq"], batch["hq_tar"], batch["edited"].tolist(), batch["sign"].tolist()
    numbers = prompt_scores(source, target, edited, sign, metrics.load_reader("b", cfg.readers, NEEDS))
    # identity is ArcFace's where --arcface is given; the paper's data have 0.6387
    identity, per_attribute = statistics.mean(row["scores"]["identity"] for row in good), numbers.pop("per_attribute")
    numbers |= dict(identity=identity, accepted=len(good), tried=len(rows))
    run.report({"pairs": numbers}, {"source": source, "target": target}, {}, per_attribute=per_attribute, failed=failed,
               config=dataclasses.asdict(cfg))


VERBS = {"train": (Train, {"toy": TOY_VALUES, "paper": {}}, train), "sample": (Sample, {}, sample),
         "pairs": (BuildPairs, {"toy": TOY_EDITOR, "paper": {}, "flux": FLUX_EDITOR}, pairs)}

if __name__ == "__main__":
    command_line(__doc__, VERBS)
