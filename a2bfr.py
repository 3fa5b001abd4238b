"""A2BFR: restore a degraded face so that it follows a text prompt and stays the same person.

Paper: "A2BFR: Attribute-Aware Blind Face Restoration", arXiv 2603.29423; its authors published inference only
(github.com/MediaX-SJTU/A2BFR). A frozen text-to-image transformer, FLUX, gets a third kind of token, the latents of the
degraded image, and a LoRA that acts on those tokens alone. Two things teach it to obey the prompt: an attribute encoder
(AAE) reads the one-step clean image (attribute-aware learning, AAL), and pairs of faces that differ in one attribute
share the degraded image, the time and the noise, so that nothing but the prompt can tell them apart
(semantic dual-training, SDT).

    paper            name here          shape           range    meaning
    I_LQ, I_GT       lq, hq             (B, 3, S, S)    [-1, 1]  degraded and clean face
    z_0              z0                 (B, N, C)       ~ N      packed latents of the clean face: N = (S / 16)^2, C 64
    eps              noise              (B, N, C)       N(0, 1)
    z_t              z_t                (B, N, C)                (1 - t) z_0 + t eps
    t                t                  (B,)            [0, 1]   1 is noise, 0 clean
    V                velocity           (B, N, C)                predicts eps - z_0
    T_src, T_tar     text, pooled       (B, L, D), (B, P)        embedded prompts
    AAE              encoder            (B, 3, S, S) -> (B, 12)  attribute logits, order of ATTRIBUTES
    A_src, A_tar     score              (B,)            [0, 1]   score of the attribute in which the pair differs
    lambda, alpha, m attribute_weight, dual_weight, dual_margin  UNSTATED: ours

    section 4.2: [Eq. 1] predict_clean   [Eq. 2] attribute_loss     [Eq. 3] branch_loss
    section 4.3: [Eq. 4] edited_score    [Eq. 5] dual_margin_loss   [Eq. 6] dual_training_loss

Run `python a2bfr.py train` (toy world, CPU, minutes): it first trains a tiny FLUX with its autoencoder and words, then
freezes it and goes on as with the real one; `train --preset paper --pretrained_model_name_or_path FLUX.1-dev` is the
paper's recipe. `pairs` builds training pairs from any folder of aligned faces, `sample --prompt "..."` restores.
Left out: T5 and CLIP are not trained, no face detector (aligned faces, or --landmarks), no vision-language metrics.
"""
import copy
import dataclasses
import functools
import itertools
import json
import math
import os
import re
import statistics
import time
import typing
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

# common comes first: it sets GOMP_SPINCOUNT before torch is imported
from common import (ATTRIBUTES, DEGRADATIONS, DEGRADATION_NAMES, PRECISIONS, SIBLINGS, SMILING, TOY_SPLITS, Faces,
                    LoRALinear, Run, SampleFlags, Stage, TrainFlags, UserError, WordTokenizer, at_once, command_line,
                    degrade, find_checkpoint, first_line, from_folder, list_images, load_lora, load_model, load_strict,
                    lr_schedule, make_optimizer, mix, not_half, print_ablation, print_table, random_crop, read_curves,
                    read_image, read_weights, restore_folder, run_ablation, same_settings, save_lora, save_model,
                    saved_flags, shared_parts, toy_faces, verbalise, versions, whole_file, write_curve, write_grid,
                    write_image, write_json)

import safetensors.torch
import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from PIL import Image
from torch.utils.checkpoint import checkpoint

import metrics

TEMPLATE = "A photo of a human face"  # the paper's prompt without attributes (section 5.2)
NAMES = [name for _, name, _, _ in ATTRIBUTES]
SHOWN = {"template": TEMPLATE, "smiling": "a photo of a smiling person",  # title: prompt, in prompts.png
         "older, serious": "a photo of an older serious person",
         "eyeglasses": "a photo of a person, wearing eyeglasses",
         "blond, bangs": "a photo of a person with blond hair and bangs", "hat": "a photo of a person, wearing a hat"}
LORA_FILE = "pytorch_lora_weights.safetensors"  # the name diffusers gives such a file

# ------------------------------------------------------------------------------------------------ configuration


@dataclass(frozen=True)
class Train(TrainFlags):
    """Train the toy FLUX (or take the real one), then the LoRA; restore held-out faces with several prompts."""
    output: str = "runs/a2bfr"             # folder for weights, checkpoints, log and pictures
    degradation: DEGRADATION_NAMES = "noisy"  # preset of common.DEGRADATIONS
    batch_size: int = 16                   # pairs per process and micro-batch of the LoRA; paper 1
    stage: typing.Literal["all", "vae", "prior", "lora"] = "all"  # one stage, or all in order
    pretrained_model_name_or_path: str = ""  # FLUX.1-dev: folder or hub id (default: train a toy prior)
    prior: str = ""                        # output folder of a run whose toy prior is used instead of training one
    pairs: str = ""                        # pairs.jsonl of the pairs verb (default: exact pairs of the toy world)
    readers: str = ""                      # folder of reader_a and reader_b (default: weights/, made for toy faces)
    farl: str = ""                         # face_attribute.farl.celeba.pt: the paper's attribute encoder
    lq_from: typing.Literal["src", "tar", "random"] = "src"  # UNSTATED: which face of a pair is degraded
    # toy autoencoder
    latent_channels: int = 16              # FLUX 16
    vae_widths: tuple[int, ...] = (16, 32, 64)  # per level, finest first; FLUX 128 256 512 512
    vae_batch_size: int = 8                # faces per step
    vae_crop: int = 32                     # side of the random crops it sees
    vae_steps: int = 1200                  # optimiser steps
    vae_learning_rate: float = 5e-3        # peak
    perceptual_weight: float = 0.05        # of the distance between features of reader_a
    kl_weight: float = 1e-6                # of the KL summed over a latent
    # toy prior
    heads: int = 4                         # attention heads of 32 channels; FLUX 24 of 128
    double_layers: int = 2                 # two-stream blocks; FLUX 19
    single_layers: int = 4                 # one-stream blocks; FLUX 38
    text_width: int = 64                   # width of a word; T5 4096
    text_length: int = 24                  # tokens of a prompt; FLUX 512
    prior_batch_size: int = 32             # faces per step
    prior_steps: int = 1200                # optimiser steps
    prior_learning_rate: float = 1.5e-2    # peak
    prior_drop_text: float = 0.1           # share of faces whose caption is dropped
    time_shift: float = 4.0                # s of the law of t: the condition matters in strong noise; OminiControl 1
    # LoRA
    rank: int = 32                         # paper 64
    lora_alpha: float = 0.0                # DIFFERS: paper 4; scale lora_alpha / rank (0: scale 1, as released)
    lora_steps: int = 350                  # optimiser steps; paper 60 000
    lora_optimizer: typing.Literal["prodigy", "adamw", "muon"] = "prodigy"  # of the LoRA; paper prodigy
    learning_rate: float = 0.0             # of the LoRA (0: Prodigy 1, AdamW 2e-3, Muon 1e-2; FLUX with AdamW 1e-4)
    prodigy_d0: float = 1e-4               # Prodigy's first step size; its default 1e-6 idles for tens of steps
    weight_decay: float = 0.01             # of the LoRA; UNSTATED: OminiControl's
    max_grad_norm: float = 0.5             # clip the gradient to this norm (0: off); UNSTATED: OminiControl's
    ema_decay: float = 0.99                # of the averaged weights that are saved and sampled
    # losses
    attribute_weight: float = 0.3          # UNSTATED: lambda of Eq. 3; 0 switches attribute-aware learning off
    dual_training: bool = True             # both faces of a pair (semantic dual-training), or one of them
    dual_weight: float = 0.3               # UNSTATED: alpha of Eq. 6
    dual_margin: float = 0.5               # UNSTATED: m of Eq. 5; signed: at most what the two clean faces differ
    dual: typing.Literal["signed", "abs"] = "signed"  # DIFFERS: the target on its side; abs: Eq. 5 as printed
    attr_t_max: float = 0.9                # UNSTATED: one-step faces from noisier latents are not read
    decoded: int = 0                       # decode only so many faces of a batch for the reader (0: all)
    drop_text: float = 0.1                 # share of pairs whose prompts are dropped; paper "dropout 0.01", read so
    drop_condition: float = 0.01           # share of pairs whose degraded image is black; paper as drop_text
    dropped_prompt: typing.Literal["empty", "template", "both"] = "both"  # what stands for a dropped prompt
    # condition branch
    independent_condition: bool = False    # the condition sees itself alone: allows sample --kv_cache
    condition_scale: int = 1               # 2: the condition in half resolution, a quarter of its tokens
    # memory
    two_pass: bool = False                 # exact gradient of a pair with the memory of one face, a forward more
    gradient_checkpointing: bool = False   # recompute blocks and autoencoder in the backward pass
    cache_text: bool = False               # embed all prompts to disk first; no text encoder while training
    # sampling
    num_inference_steps: int = 4           # Euler steps; release 28
    guidance_scale: float = 1.0            # embedded; 1 is all a toy prior knows; UNSTATED: FLUX 3.5, release 3.0
    true_cfg_scale: float = 2.0            # away from the empty prompt, what FLUX embeds; UNSTATED: paper preset 1, off
    image_guidance_scale: float = 1.3      # away from a black degraded image; UNSTATED: paper preset 1, off
    validation_faces: int = 128            # held-out faces restored and measured at the end


@dataclass(frozen=True)
class Sample(SampleFlags):
    """Restore faces under a prompt with trained weights."""
    output: str = "results/a2bfr"          # folder for restored_faces/, cmp/ and args.json
    checkpoint: str = "runs/a2bfr"         # output folder of a training run
    prompt: str = TEMPLATE                 # what the restored face should look like
    pretrained_model_name_or_path: str = ""  # FLUX.1-dev: folder or hub id (default: as the checkpoint was trained)
    lora: str = ""                         # LoRA file to use instead of the checkpoint's, e.g. the release's
    num_inference_steps: int = 0           # Euler steps (0: the checkpoint's; with --lora and FLUX 28, as the release)
    guidance_scale: float = 0.0            # embedded guidance (0: the checkpoint's; with --lora and FLUX 3.0, likewise)
    true_cfg_scale: float = 0.0            # away from --negative_prompt, a forward more (1: off, 0: the checkpoint's)
    negative_prompt: str = ""              # for --true_cfg_scale
    image_guidance_scale: float = 0.0      # away from a black degraded image, a forward more (1: off, 0: as above)
    kv_cache: bool = False                 # keep the condition's keys and values (needs --independent_condition runs)
    image_size: int = 512                  # side of the network's square; only with --lora and FLUX
    text_length: int = 512                 # tokens of a prompt; only with --lora and FLUX


@dataclass(frozen=True)
class Pairs:
    """Build pairs of faces that differ in one attribute: FlowEdit, three checks, one JSON line per pair."""
    output: str = "runs/a2bfr_pairs"       # folder for pairs.jsonl, source/, target/ and sheet.png; a rerun goes on
    data: str = ""                         # folder of aligned faces (default: the toy world)
    count: int = 200                       # source faces (a folder may have fewer)
    edits: int = 2                         # attributes edited per face, one pair each; UNSTATED: paper preset 1
    editor: typing.Literal["flux", "sd3"] = "flux"  # model that edits; paper SD3.5
    pretrained_model_name_or_path: str = ""  # FLUX.1-dev or SD3 folder or hub id (default: the prior of --checkpoint)
    checkpoint: str = "runs/a2bfr"         # training run whose toy prior edits
    image_size: int = 64                   # side of the pictures; SD3.5 1024
    num_inference_steps: int = 28          # N of the schedule; SD3 50
    n_max: int = 22                        # steps before the last n_max are skipped; FLUX 24, SD3 33
    n_min: int = 0                         # the last n_min are ordinary sampling with the target prompt
    n_avg: int = 1                         # noise draws averaged per step
    source_guidance: float = 1.0           # FLUX 1.5, SD3 3.5
    target_guidance: float = 3.0           # FLUX 5.5, SD3 13.5
    blends: tuple[float, ...] = (0.6, 0.8, 1.0)  # UNSTATED: retry ladder: share of the target's velocity, mildest first
    tries: int = 2                         # noises per step of the ladder
    positive: float = 0.6                  # an attribute above this score is present (section 3.1)
    negative: float = 0.4                  # below this it is absent; between, it is neither named nor edited
    max_leak: float = 0.3                  # UNSTATED: other attributes may move by this much
    min_identity: float = 0.4              # UNSTATED: cosine between the faces' embeddings; the data set's mean is 0.64
    min_structure: float = 0.5             # UNSTATED: SSIM between the faces, set at 64 px and not tried at 1024
    max_shift: float = 0.1                 # UNSTATED: mean landmark shift, share of the eyes' distance
    verbaliser: typing.Literal["template", "llm"] = "template"  # who writes the prompts; paper Qwen3
    llm: str = ""                          # folder or hub id of a chat model of transformers
    readers: str = ""                      # folder of reader_a (default: weights/, made for toy faces)
    farl: str = ""                         # face_attribute.farl.celeba.pt, to score attributes
    arcface: str = ""                      # ArcFace weights (IR-50, IR-SE-50, IR-101), to score identity
    fan: str = ""                          # alignment_WFLW_4HG.pth, to measure how landmarks shift
    batch_size: int = 16                   # faces edited at a time
    seed: int = 0                          # of the noise and of the choice of attributes
    device: str = "auto"                   # auto, cpu, cuda, cuda:1, mps
    mixed_precision: PRECISIONS = "auto"   # autocast type; auto: bf16 where the processor has it, else no


@dataclass(frozen=True)
class Ablate(Train):
    """Rerun the paper's tables at toy size; the prior is shared by the rows of a seed."""
    output: str = "runs/a2bfr_ablate"      # folder for rows.json and the priors
    table: typing.Literal["all", "losses", "data"] = "all"  # Table 4 (losses), Table 5 (data)
    rows: tuple[str, ...] = ()             # only these rows (default: all)
    seeds: int = 1                         # repetitions with other seeds
    pair_faces: int = 300                  # source faces of the pairs built for the data table
    vae_steps: int = 1000                  # shared by the rows of a seed
    prior_steps: int = 800                 # as vae_steps
    lora_steps: int = 150                  # a row is meant to take 3 CPU minutes
    attribute_weight: float = 1.0          # lambda of Eq. 3, larger: after so few steps 0.3 tells no rows apart
    dual_weight: float = 1.0               # alpha of Eq. 6
    validation_faces: int = 128            # held-out faces restored and measured per row


# Section 5.1: 512 px, batch 1 (read as one pair), rank 64, 60K iterations, Prodigy at 1, dropout .01.
# DIFFERS: validation_faces (1,200 pairs). UNSTATED: degradation (heavy, by Table 2's IDS of .35 and LPIPS of .27),
# averaging, precision, schedule; steps and scale of sampling ("classifier-free guidance enabled"), here FLUX's.
PAPER = dict(
    image_size=512, batch_size=1, degradation="codeformer", ema_decay=0.0, mixed_precision="bf16", num_workers=4,
    checkpointing_steps=1000, log_steps=50, lr_scheduler="constant", lr_warmup_steps=0, text_length=512, time_shift=1.0,
    rank=64, lora_steps=60_000, prodigy_d0=1e-6, drop_text=0.01, drop_condition=0.01,
    dropped_prompt="empty", two_pass=True, gradient_checkpointing=True, cache_text=True, num_inference_steps=28,
    guidance_scale=3.5, true_cfg_scale=1.0, image_guidance_scale=1.0, validation_faces=16)
# At most the paper's 35,000 pairs (section 5.1). UNSTATED: from how many tries; raise count until enough are accepted.
FLUX_EDITOR = dict(count=35_000, edits=1, image_size=512, n_max=24, source_guidance=1.5, target_guidance=5.5,
                   batch_size=1, mixed_precision="bf16", max_shift=0.03)
# The paper names SD3.5 (section 3.1); UNSTATED: its size, steps and guidance, here FlowEdit's own for SD3.
SD3_EDITOR = dict(FLUX_EDITOR, editor="sd3", image_size=1024, num_inference_steps=50, n_max=33, source_guidance=3.5,
                  target_guidance=13.5)


# ------------------------------------------------------------------------------------------------ model: FLUX


def pack(latents):
    """(B, C, h, w) -> tokens (B, h w / 4, 4 C): 2 x 2 latents each, inner order (c, dy, dx). ValueError if odd."""
    if latents.shape[-2] % 2 or latents.shape[-1] % 2:
        raise ValueError(f"pack wants an even height and width, got {tuple(latents.shape[-2:])}")
    x = latents.unflatten(3, (-1, 2)).unflatten(2, (-1, 2))                      # (B, C, h/2, 2, w/2, 2)
    return x.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)


def unpack(tokens, h: int, w: int):
    """The inverse: (B, h w / 4, 4 C) -> latents (B, C, h, w)."""
    x = tokens.unflatten(2, (-1, 2, 2)).unflatten(1, (h // 2, w // 2))           # (B, h/2, w/2, C, 2, 2)
    return x.permute(0, 3, 1, 4, 2, 5).flatten(4).flatten(2, 3)


def position_ids(height: int, width: int, scale: int = 1, device=None):
    """(height * width, 3) positions [0, row, column] of tokens; `scale` > 1: of a picture that much smaller.

    The condition lies on the same positions as the image, since the two are aligned pixel by pixel; a token of the
    smaller picture sits in the middle of the tokens that it covers.
    """
    rows, columns = [torch.arange(n, dtype=torch.float32, device=device) * scale + (scale - 1) / 2
                     for n in (height, width)]
    grid = torch.stack(torch.meshgrid(rows, columns, indexing="ij"), -1).flatten(0, 1)
    return F.pad(grid, (1, 0))


class ConditionLinear(LoRALinear):
    """A frozen Linear whose LoRA acts on tokens `start` and later; without `start` it is the Linear as it was."""

    def forward(self, x, start=None):  # (B, N, in) -> (B, N, out)
        y = self.base(x)
        if start is None or start >= x.shape[1]:
            return y
        change = self.scale * self.lora_B(self.lora_A(x[:, start:].to(self.lora_A.weight.dtype)))
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

    Row 0 of the signal (time t) speaks to the first tokens, row 1 (time 0), through the LoRA, to the condition.
    """
    rows = apply(layer, signal, 1).split(1, dim=1)
    return torch.cat([row.expand(-1, n, -1) for row, n in zip(rows, (first, others))], 1).chunk(parts, dim=-1)


def rotate(x, cos, sin):
    """Rotary positions on neighbouring pairs: x (B, N, heads, d), cos and sin (N, d)."""
    a, b = x.float().unflatten(-1, (-1, 2)).unbind(-1)
    return (x.float() * cos[:, None] + torch.stack([-b, a], -1).flatten(-2) * sin[:, None]).to(x.dtype)


class Attention(NamedTuple):
    """One softmax over [text | image | condition]; options and cache are the same for all layers of a forward."""
    rope: tuple                # cos, sin (N, d) of the tokens at hand
    conditions: int            # how many of the last tokens are the condition
    independent: bool          # the condition sees itself alone
    cache: dict | None         # layer -> keys and values of the condition

    def __call__(self, q, k, v, layer: int):  # (B, N, heads, d) -> (B, N, heads d)
        q, k = rotate(q, *self.rope), rotate(k, *self.rope)
        n = self.conditions
        if self.cache is not None and n:
            self.cache[layer] = k[:, -n:], v[:, -n:]
        elif self.cache:
            k, v = (torch.cat(both, 1) for both in zip((k, v), self.cache[layer]))
        q, k, v = (u.transpose(1, 2) for u in (q, k, v))
        if self.independent and n:
            out = torch.cat([F.scaled_dot_product_attention(q[:, :, :-n], k, v),
                             F.scaled_dot_product_attention(q[:, :, -n:], k[:, :, -n:], v[:, :, -n:])], 2)
        else:
            out = F.scaled_dot_product_attention(q, k, v)
        return out.transpose(1, 2).flatten(2)


def image_qkv(attn, x, start: int):
    """Queries, keys and values (B, N, heads, d) by the image weights, queries and keys normalised."""
    q, k, v = (apply(f, x, start).unflatten(-1, (attn.heads, -1)) for f in (attn.to_q, attn.to_k, attn.to_v))
    return same_type(attn.norm_q, q), same_type(attn.norm_k, k), v


def same_type(norm, x):
    """An RMS norm in the type of its own weights: under autocast x may come in another."""
    return norm(x.to(norm.weight.dtype))


def text_qkv(attn, x):
    """The same of the text tokens (B, L), which have layers of their own."""
    q, k, v = (f(x).unflatten(-1, (attn.heads, -1)) for f in (attn.add_q_proj, attn.add_k_proj, attn.add_v_proj))
    return same_type(attn.norm_added_q, q), same_type(attn.norm_added_k, k), v


def double_block(block, text, image, signal, n_image: int, attention, layer: int):
    """Two streams: text (B, L, D) has its own weights; [image | condition] (B, N + M, D) shares one set."""
    n_text, n_condition = text.shape[1], image.shape[1] - n_image
    shift, scale, gate, shift2, scale2, gate2 = modulation(block.norm1.linear, signal, n_image, n_condition, 6)
    t_shift, t_scale, t_gate, t_shift2, t_scale2, t_gate2 = modulation(block.norm1_context.linear, signal[:, :1],
                                                                      n_text, 0, 6)
    h = image_qkv(block.attn, block.norm1.norm(image) * (1 + scale) + shift, n_image)
    h_text = text_qkv(block.attn, block.norm1_context.norm(text) * (1 + t_scale) + t_shift)
    out = attention(*(torch.cat(both, 1) for both in zip(h_text, h)), layer)
    image = image + gate * apply(block.attn.to_out[0], out[:, n_text:], n_image)
    text = text + t_gate * block.attn.to_add_out(out[:, :n_text])
    h = block.ff.net[0](block.norm2(image) * (1 + scale2) + shift2)              # GELU: its Linear has no LoRA
    image = image + gate2 * apply(block.ff.net[2], h, n_image)
    return text + t_gate2 * block.ff_context(block.norm2_context(text) * (1 + t_scale2) + t_shift2), image


def single_block(block, x, signal, start: int, attention, layer: int):
    """One stream [text | image | condition] (B, L + N + M, D); attention and MLP side by side."""
    shift, scale, gate = modulation(block.norm.linear, signal, start, x.shape[1] - start, 3)
    h = block.norm.norm(x) * (1 + scale) + shift
    out = attention(*image_qkv(block.attn, h, start), layer)
    h = block.act_mlp(apply(block.proj_mlp, h, start))
    return x + gate * apply(block.proj_out, torch.cat([out, h], dim=2), start)


def flux_velocity(transformer, noisy, condition, text, pooled, t, guidance, image_ids, condition_ids,
                  independent=False, cache=None):
    """Velocity eps - z_0 of the noisy tokens, (B, N, 4 c), with the degraded face as further tokens of one sequence.

    transformer: diffusers FluxTransformer2DModel, its Linears wrapped by `add_condition_lora` or not. noisy
    (B, N, 4 c), condition (B, M, 4 c) or None, text (B, L, D), pooled (B, P), t (B,), 1 = noise, guidance (B,),
    image_ids (N, 3), condition_ids (M, 3). The condition is at time 0 with guidance 1 whatever t is [OminiControl].
    With `independent` it sees neither text nor image; then `cache`, an empty dict, is filled by the first call and
    replaces the condition in the next ones, exactly. Without condition this is FluxTransformer2DModel. ValueError: a
    cache without `independent`.
    """
    if cache is not None and not independent:
        raise ValueError("flux_velocity: a condition that sees the image changes with it; a cache needs independent")
    net, dtype, given = transformer, transformer.proj_out.weight.dtype, noisy.dtype
    if condition is None or cache:
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
    attention = Attention(net.pos_embed(ids), n_condition, independent, cache)
    run = functools.partial(checkpoint, use_reentrant=False) if net.gradient_checkpointing else lambda f, *a: f(*a)
    for i, block in enumerate(net.transformer_blocks):
        text, image = run(double_block, block, text, image, signal, n_image, attention, i)
    x = torch.cat([text, image], 1)
    for i, block in enumerate(net.single_transformer_blocks, len(net.transformer_blocks)):
        x = run(single_block, block, x, signal, n_text + n_image, attention, i)
    return net.proj_out(net.norm_out(x[:, n_text:n_text + n_image], time)).to(given)


# ------------------------------------------------------------------------------------------------ model: pixels, words


class Codec(nn.Module):
    """Images (B, 3, S, S) in [-1, 1] <-> tokens (B, N, 4 c): diffusers' AutoencoderKL, normalised, packed.

    Never in fp16, in which decoders overflow.
    """

    def __init__(self, vae, shift: float, scale: float):
        super().__init__()
        self.vae, self.token = vae, 2 ** len(vae.config.block_out_channels)      # side of a token in pixels: 16
        self.register_buffer("shift", torch.tensor(float(shift)))
        self.register_buffer("scale", torch.tensor(float(scale)))

    def encode(self, images, noise=None):
        """The posterior's mean, or with noise = torch.randn_like a sample of it, which FLUX trains on."""
        with not_half(images):
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
        with not_half(z):
            return self.vae.decode(z.to(self.vae.dtype)).sample.float()


class WordText(nn.Module):
    """The toy stand-in for T5 and CLIP: a learned vector per word; pooled is their sum, scaled to unit variance.

    Every attribute has words of its own and FLUX gives text no positions, so nothing is lost by ignoring their order.
    """

    def __init__(self, width: int, length: int):
        super().__init__()
        self.words, self.length = WordTokenizer(), length
        self.table = nn.Embedding(len(self.words), width, padding_idx=0)

    def encode(self, prompts: list):
        """-> text (B, L, D), pooled (B, D)."""
        device = self.table.weight.device
        ids = torch.tensor([self.words.encode(p, self.length) for p in prompts], device=device)  # (B, L)
        text = self.table(ids)
        return text, text.sum(1) / (ids > 0).sum(1, keepdim=True).clamp(min=1).sqrt()

    def check(self, prompt: str, flag: str = "--prompt") -> None:
        """UserError where a prompt has words that were never trained, or too many."""
        said = re.findall(r"\w+", prompt.lower())
        strange = [word for word in said if word not in self.words.ids]
        if strange or not said:
            strange = ", ".join(strange[:5])[:80] or "a prompt of no word"
            raise UserError(f"{flag}: this toy model does not know {strange}; "
                            f"it knows: {' '.join(self.words.words[2:])}")
        check_length(len(said), self.length, flag)


class FluxText:
    """FLUX's two text encoders, frozen: T5's last hidden states (padding is attended, as FLUX was trained) and CLIP's
    pooled vector. Raises UserError where the folder lacks one."""

    def __init__(self, where: str, length: int, device, dtype=torch.bfloat16):
        from transformers import AutoTokenizer, CLIPTextModel, T5EncoderModel
        part = functools.partial(from_folder, where=where, flag="pretrained_model_name_or_path")
        self.length, self.device = length, device
        self.clip_words = part(AutoTokenizer, subfolder="tokenizer")
        self.t5_words = part(AutoTokenizer, subfolder="tokenizer_2")
        self.clip = part(CLIPTextModel, subfolder="text_encoder", dtype=dtype).to(device).eval()
        self.t5 = part(T5EncoderModel, subfolder="text_encoder_2", dtype=dtype).to(device).eval()

    @torch.no_grad()
    def encode(self, prompts: list):
        """-> text (B, L, 4096), pooled (B, 768)."""
        ids = lambda words, n: words(prompts, padding="max_length", max_length=n, truncation=True,
                                     return_tensors="pt").input_ids.to(self.device)
        clip_length = self.clip.config.max_position_embeddings                    # 77
        return self.t5(ids(self.t5_words, self.length))[0], self.clip(ids(self.clip_words, clip_length)).pooler_output

    def check(self, prompt: str, flag: str = "--prompt") -> None:
        check_length(len(self.t5_words(prompt).input_ids), self.length, flag)


class CachedText:
    """`encode` of a text encoder, each prompt once: whoever lists the prompts first never holds T5 beside FLUX.

    make() builds the encoder when a prompt is missing, and it lives no longer than `prepare`, which all processes call
    together; with a `folder` the embeddings are files, one per prompt (`name` tells encoders apart), and each process
    makes its share; else they stay in memory.
    """

    def __init__(self, make, length: int, device, folder=None, name: str = ""):
        self.make, self.length, self.device, self.known, self.shared = make, length, device, {}, bool(folder)
        self.path = lambda prompt: folder and Path(folder) / f"{mix(name, prompt):012x}.safetensors"

    def has(self, prompt: str) -> bool:
        return self.path(prompt).exists() if self.path(prompt) else prompt in self.known

    def prepare(self, prompts) -> None:
        missing = [p for p in dict.fromkeys(prompts) if not self.has(p)]
        together = self.shared and dist.is_initialized()
        if together:
            dist.barrier()                                         # nobody writes before everybody has looked
            missing = missing[dist.get_rank()::dist.get_world_size()]
        self.embed(missing)
        if together:
            dist.barrier()

    @torch.no_grad()
    def embed(self, missing: list) -> None:
        encoder = self.make() if missing else None
        for prompt in missing:
            text, pooled = (v[0].cpu().clone() for v in encoder.encode([prompt]))
            if path := self.path(prompt):
                with whole_file(path) as temporary:
                    safetensors.torch.save_file(dict(text=text, pooled=pooled), temporary)
            else:
                self.known[prompt] = dict(text=text, pooled=pooled)

    def encode(self, prompts: list):
        self.embed([p for p in dict.fromkeys(prompts) if not self.has(p)])
        rows = [read_weights(self.path(p)) if self.path(p) else self.known[p] for p in prompts]
        return tuple(torch.stack([row[n] for row in rows]).to(self.device) for n in ("text", "pooled"))

    def check(self, prompt: str, flag: str = "--prompt") -> None:
        check_length(len(prompt.split()), self.length, flag)                     # a word is at least one token


def check_length(count: int, length: int, flag: str) -> None:
    if count > length:
        raise UserError(f"{flag}: {count} tokens, this model reads {length}; say it shorter")


def check_prompt(text, prompt: str, flag: str = "--prompt") -> None:
    """UserError for what the text encoder cannot read; nothing is cut silently."""
    if not prompt.strip():
        raise UserError(f"{flag} is empty: leave it out for {TEMPLATE!r}")
    text.check(prompt, flag)


# ------------------------------------------------------------------------------------------------ losses


def predict_clean(z_t, velocity, t):
    """z0_hat = z_t - t V [Eq. 1]: exact where V = eps - z_0. z_t, velocity (B, ...), t (B,), 1 = noise."""
    return z_t - t.view(-1, *[1] * (z_t.dim() - 1)) * velocity


def attribute_loss(logits, target_probability):
    """BCE(AAE(D(z0_hat)), AAE(I_GT)) [Eq. 2], logits and soft targets (B, K) -> mean over both.

    Section 4.2 says "embeddings", section 4.3 "confidence scores"; a BCE takes scores. UNSTATED: how many, here the 12
    of ATTRIBUTES. The floor is the targets' entropy.
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
    there once the scores start out reversed. Equal once the order is right. sign None and one m for all = as printed.
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
    With `backward` the graphs of the two branches are never alive together: the target's score is found first without a
    graph, the source is finished (`backward` is called on its share), then the target; what is returned holds the
    target's share. The sum of the two gradients is exactly that of the whole, for one forward pass more (none without
    a dual_weight).
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


# ------------------------------------------------------------------------------------------------ optimiser


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
    first N - n_max are skipped (less change), the last n_min are ordinary sampling with the target. `blend` in [0, 1],
    a number or a map that broadcasts, is section 3.1's "controllable noise-blending"; UNSTATED: how, here
    V = (1 - blend) V_source + blend V_target, so 0 changes nothing and 1 is FlowEdit. -> edited latents, float32.
    generator: of the noise, or a list of one per row.
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


class Prompt(NamedTuple):
    """A prompt as the network takes it."""
    text: torch.Tensor                     # (B, L, D)
    pooled: torch.Tensor                   # (B, P)
    guidance: float = 1.0                  # embedded guidance


class Setting(NamedTuple):
    """How to sample: embedded guidance, steps, the two kinds of classifier-free guidance, cache."""
    guidance: float = 1.0
    steps: int = 28
    true_cfg: float = 1.0
    negative: str = ""
    image_cfg: float = 1.0
    kv_cache: bool = False


def encode_condition(nets, cfg, lq, noise=None):
    """The degraded face as tokens (B, M, C) and their positions; in half resolution with --condition_scale 2."""
    scale, side = cfg.condition_scale, lq.shape[-1]
    small = lq if scale == 1 else F.interpolate(lq, (side // scale,) * 2, mode="bilinear", antialias=True)
    tokens = nets["codec"].encode(small, noise)
    n = math.isqrt(tokens.shape[1])
    return tokens, position_ids(n, n, scale, lq.device)


def velocity_of(nets, cfg, condition, condition_ids, cache=None):
    """(z_t, t, Prompt) -> velocity in float32, of the prior (condition None) or of the restorer."""
    def velocity(z, t, prompt):
        n = math.isqrt(z.shape[1])
        out = flux_velocity(nets["prior"], z, condition, prompt.text, prompt.pooled, t,
                            torch.full_like(t, prompt.guidance), position_ids(n, n, 1, z.device), condition_ids,
                            cfg.independent_condition and condition is not None, cache)
        return out.float()
    return velocity


@torch.no_grad()
def restore(nets, cfg, lq, prompts: list, noise, how: Setting):
    """lq (B, 3, S, S) in [-1, 1], B prompts, noise (B, N, C) -> restored faces (B, 3, S, S) in [-1, 1].

    Up to three velocities a step: with everything, with the negative prompt, with a black degraded image. DIFFERS:
    OminiControl draws the degraded image's latents from their posterior; their mean adds no dice.
    """
    condition, ids = encode_condition(nets, cfg, lq)
    caches = [{} if how.kv_cache else None for _ in range(3)]
    full = velocity_of(nets, cfg, condition, ids, caches[0])
    asked = Prompt(*nets["text"].encode(prompts), how.guidance)
    if how.true_cfg != 1:
        negative = velocity_of(nets, cfg, condition, ids, caches[1])
        against = Prompt(*nets["text"].encode([how.negative] * len(lq)), how.guidance)
    if how.image_cfg != 1:
        blind = velocity_of(nets, cfg, encode_condition(nets, cfg, torch.full_like(lq, -1))[0], ids, caches[2])

    def velocity(z, t):
        v = full(z, t, asked)
        change = torch.zeros_like(v)
        if how.true_cfg != 1:
            change += (how.true_cfg - 1) * (v - negative(z, t, against))
        if how.image_cfg != 1:
            change += (how.image_cfg - 1) * (v - blind(z, t, asked))
        return v + change

    z = euler_sample(velocity, noise, flux_sigmas(how.steps, noise.shape[1]))
    return nets["codec"].decode(z).clamp(-1, 1)


# ------------------------------------------------------------------------------------------------ networks, weights


def build_toy(cfg) -> dict:
    """Codec, words and prior of the toy preset: diffusers' own classes, small."""
    from diffusers import AutoencoderKL, FluxTransformer2DModel
    levels = len(cfg.vae_widths)
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * levels, up_block_types=("UpDecoderBlock2D",) * levels,
        block_out_channels=cfg.vae_widths, layers_per_block=1, latent_channels=cfg.latent_channels, norm_num_groups=8,
        use_quant_conv=False, use_post_quant_conv=False, mid_block_add_attention=False)  # no attention: trains on crops
    prior = FluxTransformer2DModel(
        in_channels=4 * cfg.latent_channels, num_layers=cfg.double_layers, num_single_layers=cfg.single_layers,
        attention_head_dim=32, num_attention_heads=cfg.heads, joint_attention_dim=cfg.text_width,
        pooled_projection_dim=cfg.text_width, guidance_embeds=True, axes_dims_rope=(4, 14, 14))
    return dict(codec=Codec(vae, 0.0, 1.0), text=WordText(cfg.text_width, cfg.text_length), prior=prior)


def load_flux(where: str, dtype) -> dict:
    """Codec and transformer of FLUX.1-dev, frozen. UserError where the folder is incomplete."""
    from diffusers import AutoencoderKL, FluxTransformer2DModel
    prior = from_folder(FluxTransformer2DModel, where, "pretrained_model_name_or_path", "transformer", dtype=dtype)
    vae = from_folder(AutoencoderKL, where, "pretrained_model_name_or_path", "vae", dtype=dtype)
    if prior.config.in_channels != 4 * vae.config.latent_channels:
        raise UserError(f"--pretrained_model_name_or_path {where}: the transformer takes {prior.config.in_channels} "
                        f"channels, the vae makes {4 * vae.config.latent_channels}; FLUX.1-dev is meant, not a variant")
    return dict(codec=Codec(vae, vae.config.shift_factor, vae.config.scaling_factor).requires_grad_(False),
                prior=prior.requires_grad_(False))


def weight_type(run):
    """Frozen weights are stored as they are computed."""
    return torch.bfloat16 if run.precision == "bf16" else torch.float32


def load_run(where: str) -> tuple:
    """(nets, Train configuration, finished stages) of a training run; nets without LoRA, none if it used real FLUX."""
    config, saved = load_model(where, "a2bfr")
    trained = saved_flags(Train, config, f"--checkpoint {where}")
    if trained.pretrained_model_name_or_path:
        return {}, trained, config["finished"]
    nets = build_toy(trained)
    for part in ("codec", "text", "prior"):
        if part not in saved:
            raise UserError(f"--checkpoint {where}: holds no {part} yet; finish its training first")
        load_strict(nets[part], saved[part], f"--checkpoint {where}, {part}")
    return {name: net.requires_grad_(False) for name, net in nets.items()}, trained, config["finished"]


def lora_rank(path) -> int:
    ranks = [len(t) for name, t in read_weights(path).items() if name.endswith("lora_A.weight") and t.dim() == 2]
    if not ranks:
        raise UserError(f"{path}: holds no LoRA (no name ends in lora_A.weight)")
    return ranks[0]


def read_attributes(encoder, faces):
    """Attribute logits (B, 12) of faces (B, 3, S, S) in [-1, 1], differentiable, in float32 whatever the autocast."""
    with torch.autocast(faces.device.type, enabled=False):
        if isinstance(encoder, metrics.FaRLAttributes):                          # 40 logits of a fixed alignment
            mean, std = faces.new_tensor(encoder.CLIP).view(2, 3, 1, 1)
            logits = encoder((encoder.canvas(faces.float()) - mean) / std)
            return logits[:, [index for index, _, _, _ in ATTRIBUTES]]
        return encoder.attributes(encoder.stages(faces.float())[-1].flatten(1))


def load_encoder(cfg, device):
    """The frozen attribute encoder: FaRL where its file is given, else reader_a.

    DIFFERS: a face detector comes first in the paper (section 4.1); here faces are aligned already.
    """
    if cfg.farl:
        return metrics.load_weights(metrics.FaRLAttributes(), cfg.farl).requires_grad_(False).to(device)
    return metrics.load_reader("a", cfg.readers, needs=("attributes",)).to(device)


# ------------------------------------------------------------------------------------------------ data: pairs of faces


def editable(scores, positive=0.6, negative=0.4) -> list:
    """Indices of the attributes that can be switched: known ones; of hair colours and waves, those that are off."""
    grouped = {i: group for group in SIBLINGS for i in group}
    known = lambda i: scores[i] > positive or scores[i] < negative
    return [i for i in range(len(ATTRIBUTES))
            if (scores[i] < negative and max(scores[j] for j in grouped[i]) > positive if i in grouped else known(i))]


def switch(scores, index: int) -> tuple:
    """(scores after switching attribute `index` and what excludes it, +1 switched on or -1 off)."""
    after, sign = [float(s) for s in scores], -1 if scores[index] > 0.5 else 1
    for i in next((group for group in SIBLINGS if index in group), ()):
        after[i] = 0.0
    after[index] = float(sign > 0)
    return after, sign


def others_of(index: int) -> list:
    """Attributes that an edit of `index` should leave alone."""
    group = next((group for group in SIBLINGS if index in group), (index,))
    return [i for i in range(len(ATTRIBUTES)) if i not in group]


def unsaid(count: int, generator=None):
    """(count, 12) bool: half of all captions leave out half of the attributes, so that short prompts are known too."""
    return ((torch.rand(count, 1, generator=generator) < 0.5)
            & (torch.rand(count, len(ATTRIBUTES), generator=generator) < 0.5))


class ToyPairs:
    """Exact pairs: the renderer switches one attribute, and all else stays.

    short: half of the prompts leave attributes out, for a toy prior that knows no language beyond its captions.
    """

    def __init__(self, size: int, short: bool = False):
        self.size, self.short = size, short

    def make(self, people, seeds, picks, silent=None) -> dict:
        """hq, hq_tar (B, 3, S, S), the prompts of both, edited, sign (B,); pick i chooses among what can be edited.

        silent (B, 12) bool: attributes of which neither prompt speaks, unless they are edited.
        """
        source = toy_faces(people, seeds, size=self.size)
        edits = [(choice := editable(a), choice[p % len(choice)]) for a, p in zip(source.attributes.tolist(), picks)]
        edited = torch.tensor([index for _, index in edits])
        after = [switch(a, i) for a, i in zip(source.attributes.tolist(), edited.tolist())]
        scores = torch.tensor([row for row, _ in after])
        quiet = torch.zeros_like(scores, dtype=torch.bool) if silent is None else silent.clone()
        for i, (_, index) in enumerate(edits):
            quiet[i, [k for k in range(len(ATTRIBUTES)) if k not in others_of(index)]] = False
        say = lambda rows: [verbalise(row) for row in torch.where(quiet, 0.5, rows)]
        return dict(hq=source.image, hq_tar=toy_faces(people, seeds, scores, self.size).image, edited=edited,
                    sign=torch.tensor([float(sign) for _, sign in after]), seeds=torch.as_tensor(seeds),
                    source_prompts=say(source.attributes), target_prompts=say(scores))

    def training(self, count: int, seed: int, step: int, rank: int = 0, world: int = 1) -> dict:
        rng = torch.Generator().manual_seed(mix("toy pairs", seed, step, rank))
        draw = lambda n: torch.randint(n, (count,), generator=rng)
        people, seeds, picks = draw(len(TOY_SPLITS["train"])), draw(2 ** 40), draw(2 ** 20).tolist()
        return self.make(people, seeds, picks, unsaid(count, rng) if self.short else None)

    def held_out(self, count: int) -> dict:
        people = TOY_SPLITS["test"].start + torch.arange(count)
        return self.make(people, torch.arange(count) + mix("held out", "pairs"), range(count))

    def prompts(self) -> list:
        """All that can be said in whole: every combination of attributes that the toy world has."""
        rows = []
        for flags in itertools.product((0, 1), repeat=7):
            for colour in range(4):
                hair = [int(i == colour) for i in range(4)]
                rows.append(verbalise([*flags[:6], 1 - flags[5], *hair, flags[6]]))
        return rows


PAIR_KEYS = ("source", "target", "attribute", "sign", "source_prompt", "target_prompt", "accepted")


def read_pairs(path) -> tuple:
    """(rows, {reason: count of lines left out}) of a pairs.jsonl; rows hold dictionaries with PAIR_KEYS, unchecked."""
    rows, broken = [], Counter()
    try:
        lines = Path(path).read_text(errors="replace").splitlines()
    except OSError as error:
        raise UserError(f"--pairs {path}: cannot be read ({error.strerror}); "
                        "make it with python a2bfr.py pairs") from None
    for line in filter(str.strip, lines):
        try:
            row = json.loads(line)
        except ValueError:
            broken["not JSON"] += 1
            continue
        if not isinstance(row, dict) or not set(PAIR_KEYS) <= row.keys():
            broken["without all fields"] += 1
        else:
            rows.append(row)
    return rows, broken


def is_whole(path: Path) -> bool:
    """Whether a picture can be read to its end. A PNG says so by checksums, others must be decoded."""
    try:
        with Image.open(path) as picture:
            picture.verify() if picture.format == "PNG" else picture.load()
        return True
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError):
        return False


def row_fault(row: dict, folder: Path, text=None, whole=is_whole) -> tuple:
    """(kind of fault, example) of an accepted row that cannot be used, or ("", ""). text: None leaves prompts alone."""
    if row["attribute"] not in NAMES:
        return "with an unknown attribute", str(row["attribute"])[:40]
    if row["sign"] not in (1, -1):
        return "with a sign that is neither 1 nor -1", str(row["sign"])[:40]
    for key in ("source", "target"):
        if not isinstance(row[key], str) or not whole(folder / row[key]):
            return "with a missing or unreadable file", str(row[key])[:80]
    try:
        for key in ("source_prompt", "target_prompt") if text else ():
            check_prompt(text, row[key], key)
    except (UserError, AttributeError) as error:
        return "with a prompt that cannot be used", str(error)
    return "", ""


def sound_pairs(path, text=None) -> tuple:
    """(rows that are accepted and whole, {fault: [count, example]}) of a pairs.jsonl. See `row_fault`."""
    rows, broken = read_pairs(path)
    good, faults = [], {reason: [count, ""] for reason, count in broken.items()}
    whole = functools.cache(is_whole)                              # a source serves several pairs
    for row in rows:
        fault, example = row_fault(row, Path(path).parent, text, whole) if row["accepted"] else ("not accepted", "")
        if fault:
            faults.setdefault(fault, [0, example])[0] += 1
        else:
            good.append(row)
    return good, faults


class FilePairs:
    """Accepted pairs of a pairs.jsonl, read when needed; broken rows are counted, said and left out.

    A tenth of the source faces is held out, chosen by name, so that no face is on both sides.
    """

    def __init__(self, path: str, size: int, text):
        self.folder, self.size = Path(path).parent, size
        rows, faults = sound_pairs(path, text)
        for fault, (count, example) in faults.items():
            print(f"--pairs {path}: {count} row{'s' * (count > 1)} left out, {fault}"
                  + f", such as {example}" * bool(example), flush=True)
        held = {row["source"] for row in rows if mix("held out", row["source"]) % 10 == 0}
        held = held or {row["source"] for row in rows[-1:]}
        if len(held) > 1 and all(row["source"] in held for row in rows):
            held = {rows[-1]["source"]}                            # few faces can all fall on one side
        self.rows, self.held = ([r for r in rows if (r["source"] in held) == side] for side in (False, True))
        if not self.rows:
            raise UserError(f"--pairs {path}: no accepted pair to train on; build more with python a2bfr.py pairs")

    def make(self, rows: list, seeds) -> dict:
        read = lambda key: torch.stack([read_image(self.folder / row[key], self.size) for row in rows])
        return dict(hq=read("source"), hq_tar=read("target"), seeds=seeds,
                    edited=torch.tensor([NAMES.index(r["attribute"]) for r in rows]),
                    sign=torch.tensor([float(r["sign"]) for r in rows]),
                    source_prompts=[r["source_prompt"] for r in rows],
                    target_prompts=[r["target_prompt"] for r in rows])

    def training(self, count: int, seed: int, step: int, rank: int = 0, world: int = 1) -> dict:
        places = ((step * world + rank) * count + torch.arange(count)).tolist()  # in an endless row of epochs
        order = functools.cache(lambda epoch: torch.randperm(
            len(self.rows), generator=torch.Generator().manual_seed(mix("pairs", seed, epoch))))
        rows = [self.rows[order(p // len(self.rows))[p % len(self.rows)]] for p in places]
        return self.make(rows, torch.tensor([mix("lq", seed, p) for p in places]))

    def held_out(self, count: int) -> dict:
        rows = self.held[:count]
        return self.make(rows, torch.tensor([mix("lq", r["source"]) for r in rows]))

    def prompts(self) -> list:
        return [row[key] for row in self.rows + self.held for key in ("source_prompt", "target_prompt")]


class Singles:
    """Faces of a folder without partners: training on the source alone, its attributes read by the encoder."""

    def __init__(self, faces: Faces, encoder):
        self.faces, self.encoder = faces, copy.deepcopy(encoder).cpu()           # read on the workers

    def make(self, batch: dict) -> dict:
        with torch.no_grad():
            scores = read_attributes(self.encoder, batch["hq"]).sigmoid().tolist()
        choices = [editable(s) or [SMILING] for s in scores]                      # where the encoder is sure of nothing
        edited = [choice[int(seed) % len(choice)] for choice, seed in zip(choices, batch["seeds"])]
        after = [switch(s, i) for s, i in zip(scores, edited)]
        return dict(hq=batch["hq"], seeds=batch["seeds"], edited=torch.tensor(edited),
                    sign=torch.tensor([float(sign) for _, sign in after]),
                    source_prompts=[verbalise(s) for s in scores], target_prompts=[verbalise(s) for s, _ in after])

    def training(self, count: int, seed: int, step: int, rank: int = 0, world: int = 1) -> dict:
        return self.make(self.faces.training(count, seed, step, rank, world))

    def held_out(self, count: int) -> dict:
        return self.make(self.faces.held_out(count))

    def prompts(self) -> list:
        raise UserError("--cache_text: the prompts of a folder without pairs are not known beforehand; give --pairs, "
                        "or --no-cache_text")


def pair_source(cfg, encoder, text):
    """Where the LoRA's faces come from."""
    if cfg.pretrained_model_name_or_path and not (cfg.pairs or cfg.data):
        print("no --pairs: FLUX learns from drawn toy faces; python a2bfr.py pairs builds pairs of photographs",
              flush=True)
    if cfg.pairs and (cfg.data or cfg.validation_data) and stages_of(cfg) == ["lora"]:
        print("--data and --validation_data are not read beside --pairs, which has the LoRA's faces", flush=True)
    if cfg.optimizer != Train.optimizer and stages_of(cfg) == ["lora"]:
        print("--optimizer is for the toy prior and is not read; the LoRA has --lora_optimizer", flush=True)
    if (cfg.pairs or cfg.data) and not (cfg.farl or cfg.readers):
        print("no --farl: attributes are read by a network that only knows toy faces", flush=True)
    if cfg.pairs:
        return FilePairs(cfg.pairs, cfg.image_size, text)
    if not cfg.data:
        return ToyPairs(cfg.image_size, short=not cfg.pretrained_model_name_or_path)
    return Singles(Faces(cfg.data, cfg.image_size, cfg.validation_data), encoder)


# ------------------------------------------------------------------------------------------------ training stages


def degraded(cfg, batch: dict):
    """The lq that both faces of a pair share, made from --lq_from."""
    hq = batch["hq"]
    if cfg.lq_from != "src" and "hq_tar" in batch:
        target = (batch["seeds"] % 2 == 0) | (cfg.lq_from == "tar")
        hq = torch.where(target.view(-1, 1, 1, 1), batch["hq_tar"], hq)
    return degrade(hq, DEGRADATIONS[cfg.degradation], batch["seeds"])


def one_face(batch: dict) -> dict:
    """One face of each pair, with its own prompt and later its own degraded image: training without SDT.

    UNSTATED: what Table 4's rows without SDT are trained on; here the faces and captions of the rows with pairs.
    """
    batch = dict(batch)
    target, hq_tar = batch["seeds"] % 2 == 0, batch.pop("hq_tar")
    prompts = zip(target.tolist(), batch["source_prompts"], batch["target_prompts"])
    return dict(batch, hq=torch.where(target.view(-1, 1, 1, 1), hq_tar, batch["hq"]),
                source_prompts=[tar if drawn else src for drawn, src, tar in prompts])


def train_vae(cfg, run, nets, encoder):
    """Stage 1 of the toy preset: the autoencoder, on crops; then its latents are measured and normalised."""
    faces, codec = Faces(cfg.data, cfg.image_size, cfg.validation_data), nets["codec"].requires_grad_(True)
    reader = metrics.load_reader("a", cfg.readers).to(run.device)
    steps = min(cfg.vae_steps, cfg.max_train_steps)
    optimizer = make_optimizer(cfg, codec.parameters(), cfg.vae_learning_rate, betas=(0.9, 0.99))
    stage = Stage(run, "vae", {"codec": codec}, {"codec": optimizer}, steps, lr_schedule(cfg, steps))
    for _, batch in stage.steps(lambda k: faces.training(cfg.vae_batch_size, cfg.seed, k, run.rank, run.world)):
        hq = random_crop(batch["hq"], cfg.vae_crop)
        with run.autocast(), not_half(hq):
            posterior = codec.vae.encode(hq).latent_dist
            seen = codec.vae.decode(posterior.sample()).sample.float()
        l1, kl = (seen - hq).abs().mean(), posterior.kl().mean()
        perceptual = metrics.feature_distance(reader, seen, hq)
        stage.update(l1 + cfg.perceptual_weight * perceptual + cfg.kl_weight * kl, l1=l1, perceptual=perceptual, kl=kl)
    codec.load_state_dict(stage.ema["codec"])
    codec.requires_grad_(False)
    with torch.no_grad():
        z = torch.cat([codec.encode(x) for x in faces.held_out(64, "val")["hq"].to(run.device).split(16)])
    codec.shift.fill_(z.mean())
    codec.scale.fill_(1 / z.std())


def blank_prompts(count: int, how: str) -> list:
    """What stands for a dropped prompt, per row: nothing, the template, or either."""
    blank = {"empty": ("", ""), "template": (TEMPLATE, TEMPLATE), "both": ("", TEMPLATE)}[how]
    return [blank[coin] for coin in torch.randint(2, (count,)).tolist()]


def draw_times(count: int, shift: float, device):
    """t = sigmoid(N(0, 1)) [OminiControl, as FLUX's recipe], moved to s t / (1 + (s - 1) t): to noise for s > 1."""
    t = torch.randn(count).sigmoid().to(device)
    return shift * t / (1 + (shift - 1) * t)


def train_prior(cfg, run, nets, encoder):
    """Stage 2 of the toy preset: a text-to-face FLUX with its word vectors, by flow matching. Then it is frozen."""
    faces, codec, prior, text = Faces(cfg.data, cfg.image_size, cfg.validation_data), *(
        nets[n] for n in ("codec", "prior", "text"))
    prior.requires_grad_(True), text.requires_grad_(True)
    optimizer = make_optimizer(cfg, prior.parameters(), cfg.prior_learning_rate, tables=text.parameters())
    steps = min(cfg.prior_steps, cfg.max_train_steps)
    stage = Stage(run, "prior", {"prior": prior, "text": text}, {"prior": optimizer}, steps, lr_schedule(cfg, steps))
    for _, batch in stage.steps(lambda k: faces.training(cfg.prior_batch_size, cfg.seed, k, run.rank, run.world)):
        with torch.no_grad(), run.autocast():
            z0 = codec.encode(batch["hq"], torch.randn_like)
            scores = batch["attributes"] if "attributes" in batch else read_attributes(encoder, batch["hq"]).sigmoid()
            scores = torch.where(unsaid(len(z0)), 0.5, scores.cpu()).tolist()
        told = torch.rand(len(z0)) >= cfg.prior_drop_text
        blank = blank_prompts(len(z0), cfg.dropped_prompt)
        prompt = Prompt(*text.encode([verbalise(s) if keep else b for s, keep, b in zip(scores, told, blank)]))
        noise, t = torch.randn_like(z0), draw_times(len(z0), cfg.time_shift, z0.device)
        with run.autocast():
            v = velocity_of(nets, cfg, None, None)(torch.lerp(z0, noise, t.view(-1, 1, 1)), t, prompt)
        stage.update((v - (noise - z0)).square().mean())
    for name in ("prior", "text"):
        nets[name].load_state_dict(stage.ema[name])
        nets[name].requires_grad_(False)


def lora_optimizer(cfg, parameters):
    """Prodigy as OminiControl sets it (one adaptive step size), AdamW or Muon."""
    usual = dict(prodigy=1.0, adamw=1e-4 if cfg.pretrained_model_name_or_path else 2e-3, muon=1e-2)
    rate = cfg.learning_rate or usual[cfg.lora_optimizer]
    if cfg.lora_optimizer != "prodigy":
        cfg = dataclasses.replace(cfg, optimizer=cfg.lora_optimizer)
        return make_optimizer(cfg, parameters, rate, weight_decay=cfg.weight_decay)
    return Prodigy(parameters, lr=rate, weight_decay=cfg.weight_decay, use_bias_correction=True,
                   safeguard_warmup=True, d0=cfg.prodigy_d0)


def draw_step(cfg, nets, encoder, batch: dict) -> dict:
    """All that is random in a step, and what needs no gradient: shared by both branches of a pair.

    One condition (a draw of its posterior), one t, one noise: only the prompt differs, so the gap between the scores of
    the branches measures the prompt and not the dice.
    """
    count, device = len(batch["hq"]), batch["hq"].device
    told, shown = torch.rand(count) >= cfg.drop_text, torch.rand(count) >= cfg.drop_condition
    lq = torch.where(shown.to(device).view(-1, 1, 1, 1), batch["lq"], -1.0)      # black pixels, not zero latents
    draw = dict(t=draw_times(count, cfg.time_shift, device), told=told.to(device))
    draw["condition"], draw["ids"] = encode_condition(nets, cfg, lq, torch.randn_like)
    rows = (draw["told"] & (draw["t"] <= cfg.attr_t_max)).nonzero()[:, 0]
    reads = cfg.attribute_weight or (cfg.dual_training and cfg.dual_weight)
    draw["seen"] = rows[:cfg.decoded or None] if reads else rows[:0]
    blank = blank_prompts(count, cfg.dropped_prompt)
    for side, key in (("src", "hq"), ("tar", "hq_tar"))[:1 + cfg.dual_training]:
        draw[f"z0_{side}"] = nets["codec"].encode(batch[key], torch.randn_like)
        draw[f"target_{side}"] = read_attributes(encoder, batch[key]).sigmoid() if reads else None
        prompts = batch[{"src": "source_prompts", "tar": "target_prompts"}[side]]
        prompts = [p if keep else b for p, keep, b in zip(prompts, told.tolist(), blank)]
        draw[f"prompt_{side}"] = Prompt(*nets["text"].encode(prompts))
    draw["noise"] = torch.randn_like(draw["z0_src"])
    return draw


def lora_loss(cfg, nets, encoder, batch: dict, autocast, backward=None) -> tuple:
    """The loss of one step and what to log: Eq. 6 on pairs, or Eq. 3 on single faces. See dual_training_loss."""
    with torch.no_grad(), autocast():
        draw = draw_step(cfg, nets, encoder, batch)
    seen, logged = draw["seen"], {}
    velocity = velocity_of(nets, cfg, draw["condition"], draw["ids"])

    def branch(side):
        # UNSTATED: a dropped prompt cannot ask for the target, whose L_diff would only teach drift.
        weight = draw["told"].float() if side == "tar" else torch.ones_like(draw["t"])
        with autocast():
            loss, score, parts = branch_loss(
                lambda z, t: velocity(z, t, draw[f"prompt_{side}"]), nets["codec"].decode,
                functools.partial(read_attributes, encoder), draw[f"z0_{side}"], draw["noise"], draw["t"], seen,
                draw[f"target_{side}"], batch["edited"], weight, cfg.attribute_weight)
        logged.update({f"{name}_{side}": value.detach() for name, value in parts.items()})
        return loss, score

    if not cfg.dual_training:
        return branch("src")[0], logged

    def dual(a_src, a_tar):
        if not len(seen):
            return a_src.new_zeros(())
        if cfg.dual == "abs":
            return dual_margin_loss(a_src, a_tar, cfg.dual_margin)
        true = [draw[f"target_{side}"].gather(1, batch["edited"][:, None])[seen, 0] for side in ("src", "tar")]
        sign = batch["sign"][seen]                                 # where the encoder sees it the other way: no margin
        apart = sign * (true[1] - true[0])
        return dual_margin_loss(a_src, a_tar, apart.clamp(0, cfg.dual_margin), sign)

    loss, gap = dual_training_loss(lambda: branch("src"), lambda: branch("tar"), dual,
                                   cfg.dual_weight if len(seen) else 0.0, backward)
    return loss, dict(logged, dual=gap.detach())


def train_lora(cfg, run, nets, encoder, source):
    """Stage 3: the paper's training. Only the LoRA on the condition's tokens learns. source: see `pair_source`."""
    words = nets["text"]
    if cfg.cache_text and isinstance(words, WordText):                           # the real encoders are cached already
        name = f"{mix(*words.table.weight.flatten().tolist())}"
        nets = dict(nets, text=CachedText(lambda: words, words.length, run.device, run.folder / "text", name))
        nets["text"].prepare([*source.prompts(), "", *SHOWN.values()])
    torch.manual_seed(mix("lora", cfg.seed))                                     # alike after all stages and alone
    parameters = add_condition_lora(nets["prior"], cfg.rank, cfg.lora_alpha or cfg.rank)
    nets["prior"].to(run.device)
    if cfg.gradient_checkpointing:
        nets["prior"].enable_gradient_checkpointing()
        nets["codec"].vae.enable_gradient_checkpointing()
    steps = min(cfg.lora_steps, cfg.max_train_steps)
    optimizer = lora_optimizer(cfg, parameters)
    stage = Stage(run, "lora", {"lora": nets["prior"]}, {"lora": optimizer}, steps, lr_schedule(cfg, steps))

    def batch_at(k):
        batch = source.training(cfg.batch_size, cfg.seed, k, run.rank, run.world)
        batch = batch if cfg.dual_training or "hq_tar" not in batch else one_face(batch)
        return dict(batch, lq=degraded(cfg, batch))

    backward = lambda loss: stage.scaler.scale(loss / stage.accumulate).backward()
    for _, batch in stage.steps(batch_at):
        loss, parts = lora_loss(cfg, nets, encoder, batch, run.autocast, backward if cfg.two_pass else None)
        if cfg.lora_optimizer == "prodigy":
            parts["prodigy_d"] = torch.tensor(optimizer.param_groups[0]["d"])
        stage.update(loss, **parts)
    nets["prior"].load_state_dict(stage.ema["lora"], strict=False)
    nets["prior"].requires_grad_(False)
    nets["prior"].gradient_checkpointing = False


TOY_TRAINERS = {"vae": train_vae, "prior": train_prior}
STAGE_OF = {"codec": "vae", "text": "prior", "prior": "prior"}     # where the parts of a toy run are trained


def stages_of(cfg) -> list:
    """All stages of this configuration, in order."""
    return ["lora"] if cfg.pretrained_model_name_or_path or cfg.prior else ["vae", "prior", "lora"]


def check_sizes(cfg) -> None:
    """Flags that cannot work together, in words, before anything is built. Raises UserError."""
    if cfg.stage not in ["all"] + stages_of(cfg):
        raise UserError(f"--stage {cfg.stage}: with a given prior there is only the stage lora")
    if not cfg.time_shift:
        raise UserError("--time_shift 0: must be more than 0")
    if cfg.condition_scale not in (1, 2, 4):
        raise UserError(f"--condition_scale {cfg.condition_scale}: must be 1, 2 or 4")
    side = 16 if cfg.pretrained_model_name_or_path else 2 ** len(cfg.vae_widths)
    if cfg.image_size % (side * cfg.condition_scale):
        raise UserError(f"--image_size {cfg.image_size}: must be a multiple of {side * cfg.condition_scale}, the side "
                        "of a token of the degraded image")
    if cfg.pairs:
        read_pairs(cfg.pairs)                                      # found missing now, not when the LoRA's turn comes
    elif cfg.data and cfg.dual_training and cfg.stage in ("all", "lora"):
        raise UserError(f"--data {cfg.data}: a folder has no pairs; build them with python a2bfr.py pairs and give "
                        "--pairs FILE, or train on single faces with --no-dual_training")
    shrink = 2 ** (len(cfg.vae_widths) - 1)
    if not cfg.vae_crop or cfg.vae_crop % shrink:
        raise UserError(f"--vae_crop {cfg.vae_crop}: must be a multiple of {shrink}, the autoencoder's factor")
    if any(w % 8 for w in cfg.vae_widths):
        raise UserError("--vae_widths: must be multiples of 8, the groups of a norm")
    if cfg.prior and cfg.pretrained_model_name_or_path:
        raise UserError("--prior: a toy prior, not read beside --pretrained_model_name_or_path; leave one of them out")
    refuse_fp16(cfg, cfg.pretrained_model_name_or_path)


def refuse_fp16(cfg, where: str) -> None:
    """UserError for released networks in fp16."""
    if cfg.mixed_precision == "fp16" and where:
        raise UserError("--mixed_precision fp16: FLUX and the autoencoders overflow in it; use bf16")


def networks(cfg, run, source_of=None) -> tuple:
    """(nets, finished stages): the real FLUX, another run's prior, or new toy networks and what is there of them.

    source_of(text) gives the faces of the LoRA, whose prompts --cache_text embeds.
    """
    if cfg.pretrained_model_name_or_path:
        make = lambda: FluxText(cfg.pretrained_model_name_or_path, cfg.text_length, run.device, weight_type(run))
        cached = CachedText(make, cfg.text_length, run.device, run.folder / "text",
                            f"{cfg.pretrained_model_name_or_path}, {cfg.text_length}")
        if cfg.cache_text:  # T5 comes and goes before the transformer is loaded
            cached.prepare([*source_of(cached).prompts(), "", *SHOWN.values()])
        text = cached if cfg.cache_text else make()
        return dict(load_flux(cfg.pretrained_model_name_or_path, weight_type(run)), text=text), []
    if cfg.prior:
        nets, trained, finished = load_run(cfg.prior)
        same = ("image_size", "latent_channels", "vae_widths", "heads", "double_layers", "single_layers", "text_width",
                "text_length")
        same_settings(cfg, trained, same, cfg.prior, "prior")
        if "prior" not in finished:
            raise UserError(f"--prior {cfg.prior}: its stage prior is not finished")
        return nets, []
    torch.manual_seed(cfg.seed)
    nets, finished = build_toy(cfg), []
    if not run.fresh and (run.folder / "config.json").exists():
        config, saved = load_model(cfg.output, "a2bfr")
        finished = [stage for stage in config["finished"] if stage != "lora" or (run.folder / LORA_FILE).exists()]
        stages, before = stages_of(cfg), saved_flags(Train, config, cfg.output)
        switches = ("image_size", "condition_scale", "independent_condition")     # what weights mean, not shapes
        for stage in finished:
            if cfg.resume_from_checkpoint or stages.index(stage) < stages.index(cfg.stage):
                same_settings(cfg, before, switches if stage == "lora" else switches[:1], cfg.output, "output")
        for part in saved:
            if STAGE_OF.get(part) in finished and (cfg.resume_from_checkpoint or STAGE_OF[part] != cfg.stage):
                load_strict(nets[part], saved[part], f"{cfg.output}, {part}")
    return nets, finished


def wear_lora(nets, path, device) -> None:
    """Put a LoRA file on the prior: its rank is read off it, its scale is 1."""
    rank = lora_rank(path)
    add_condition_lora(nets["prior"], rank, rank)
    load_lora(nets["prior"], path)
    nets["prior"].requires_grad_(False).to(device)


def save_run(cfg, run, nets, finished: list) -> None:
    """model.safetensors (toy networks, plain names), the LoRA in diffusers' layout, config.json last."""
    if not run.main:
        return
    if "lora" in finished:
        save_lora(nets["prior"], run.folder / LORA_FILE)
    trained = STAGE_OF if not cfg.pretrained_model_name_or_path else {}
    weights = {part: {n.replace(".base.", "."): v for n, v in nets[part].state_dict().items() if "lora_" not in n}
               for part, stage in trained.items() if stage in finished or cfg.prior}
    save_model(run.folder, weights, dict(method="a2bfr", train=dataclasses.asdict(cfg), finished=finished))


def train(cfg: Train) -> None:
    """The stages asked for, in order: each is saved when it ends; then held-out faces are restored and measured."""
    check_sizes(cfg)
    stages = stages_of(cfg)
    wanted = stages if cfg.stage == "all" else [cfg.stage]
    run = Run(cfg, fresh=cfg.stage == "all" and not cfg.resume_from_checkpoint)
    encoder = load_encoder(cfg, run.device)
    source_of = functools.cache(lambda text: pair_source(cfg, encoder, text))
    nets, finished = networks(cfg, run, source_of)
    missing = [s for s in stages[:stages.index(wanted[0])] if s not in finished]
    if missing:
        raise UserError(f"--stage {cfg.stage} needs {missing[0]}: train it first (--stage {missing[0]}), "
                        "or give --prior")
    nets = {name: net.to(run.device).requires_grad_(False) if isinstance(net, nn.Module) else net
            for name, net in nets.items()}
    source = source_of(nets["text"]) if "lora" in wanted else None
    metrics.load_reader("b", cfg.readers, needs=("attributes", "identity"))  # found missing before a run is moved
    run.start_log()
    if cfg.stage != "all" and not cfg.resume_from_checkpoint:
        run.former = stages[stages.index(cfg.stage):]
    for name in wanted:
        if name in finished and cfg.resume_from_checkpoint:
            run.say(f"stage {name}: finished before, taken as it is")
            if name == "lora":
                wear_lora(nets, run.folder / LORA_FILE, run.device)
            continue
        if name == "lora":
            train_lora(cfg, run, nets, encoder, source)
        else:
            TOY_TRAINERS[name](cfg, run, nets, encoder)
        finished = [s for s in finished if stages.index(s) < stages.index(name)] + [name]
        save_run(cfg, run, nets, ["vae", "prior"] * bool(cfg.prior) + finished)
    if run.main and source and "lora" in finished:
        report(cfg, run, nets, source, encoder)


# ------------------------------------------------------------------------------------------------ measuring


def in_batches(function, *columns, size: int):
    """function of pieces of the columns (tensors or lists), results joined on the CPU."""
    pieces = range(0, len(columns[0]), size)
    return torch.cat([function(*(c[i:i + size] for c in columns)).cpu() for i in pieces])


def restore_held_out(cfg, run, nets, lq, prompts: list):
    """Faces (N, 3, S, S) on the CPU; face i has the same noise under every prompt."""
    how = Setting(cfg.guidance_scale, cfg.num_inference_steps, cfg.true_cfg_scale, "", cfg.image_guidance_scale)
    noise = nets["codec"].noise(lq.shape[-1], [mix("noise", cfg.seed, i) for i in range(len(lq))])
    with run.autocast():
        return in_batches(lambda x, p, e: restore(nets, cfg, x.to(run.device), p, e, how), lq, prompts, noise,
                          size=at_once(cfg.image_size))


def prompt_scores(source, target, clean, edited: list, sign: list, reader) -> dict:
    """How well two restorations of the same faces obey their prompts, read by `reader` (not the one of the loss).

    source, target (N, 3, S, S) under T_src and T_tar, clean the source's clean face, `edited` the attribute that T_tar
    switches, on for sign 1. attribute_accuracy_toy: share of targets whose edited attribute is on the asked side (AA of
    section 5.1, which asks Qwen3-VL); cross_prompt_identity_toy (CP-IDS, section 5.3) and identity_toy (IDS): mean
    cosines; leakage_toy: mean change of the attributes that should stay; per_attribute: [accuracy, faces] by request.
    """
    device = next(reader.parameters()).device
    look = lambda x: [in_batches(f, x.to(device), size=64) for f in (reader.embed, reader.probabilities)]
    with torch.no_grad():
        (who_a, a), (who_b, b), (who, _) = look(source), look(target), look(clean)
    right = [float((b[i, k] > 0.5) == (s > 0)) for i, (k, s) in enumerate(zip(edited, sign))]
    leak = [(a[i] - b[i]).abs()[others_of(k)].mean().item() for i, k in enumerate(edited)]
    groups: dict = {}
    for k, s, r in zip(edited, sign, right):
        groups.setdefault(f"{'' if s > 0 else 'not '}{NAMES[k]}", []).append(r)
    return dict(attribute_accuracy_toy=statistics.mean(right), leakage_toy=statistics.mean(leak),
                cross_prompt_identity_toy=(who_a * who_b).sum(1).mean().item(),
                identity_toy=(who_a * who).sum(1).mean().item(),
                per_attribute={name: [round(statistics.mean(v), 3), len(v)] for name, v in sorted(groups.items())})


def prior_faces(cfg, run, nets, prompts: list):
    """Faces (N, 3, S, S) that the prior alone paints from prompts: how well it can obey at all."""
    noise = nets["codec"].noise(cfg.image_size, [mix("prior", cfg.seed, i) for i in range(len(prompts))])
    velocity, sigmas = velocity_of(nets, cfg, None, None), flux_sigmas(cfg.num_inference_steps, noise.shape[1])

    def paint(p, e):
        prompt = Prompt(*nets["text"].encode(p), cfg.guidance_scale)
        return nets["codec"].decode(euler_sample(lambda z, t: velocity(z, t, prompt), e, sigmas)).clamp(-1, 1)
    with torch.no_grad(), run.autocast():
        return in_batches(paint, prompts, noise, size=at_once(cfg.image_size))


def evaluate(cfg, run, nets, batch: dict, baseline: bool = True) -> tuple:
    """(rows of numbers, {title: images}) of held-out faces: degraded, restored with the source's prompt, the target's
    and the template, through the autoencoder, painted by the prior from the source's prompt alone; with `baseline`, on
    a toy prior, also Table 3's: restored with the template and then edited."""
    reader, hq = metrics.load_reader("b", cfg.readers).to(run.device), batch["hq"]
    asked = dict(source=batch["source_prompts"], target=batch["target_prompts"], template=[TEMPLATE] * len(hq))
    images = {"lq": degraded(cfg, batch)}
    images |= {title: restore_held_out(cfg, run, nets, images["lq"], prompts) for title, prompts in asked.items()}
    images["prior"] = prior_faces(cfg, run, nets, batch["source_prompts"])
    with torch.no_grad(), run.autocast():
        recode = lambda x: nets["codec"].decode(nets["codec"].encode(x.to(run.device))).clamp(-1, 1)
        images["autoencoder"] = in_batches(recode, hq, size=at_once(cfg.image_size))
    pairs_of = {"target": "source"}
    if baseline and not cfg.pretrained_model_name_or_path:
        editor, editing = flux_editor(nets, cfg, Pairs().num_inference_steps, cfg.image_size), Pairs(seed=cfg.seed)
        with run.autocast():
            images["edited"] = in_batches(
                functools.partial(edit_faces, editor, editing, 1.0, run.device), images["template"],
                batch["source_prompts"], batch["target_prompts"], [mix("edit", cfg.seed, i) for i in range(len(hq))],
                size=at_once(cfg.image_size))
        pairs_of["edited"] = "template"
    rows = {}
    for name in images:
        truth = batch.get("hq_tar", hq) if name in pairs_of else hq
        rows[name] = metrics.toy_scores(images[name], truth, reader, images["lq"])
        if name in pairs_of:
            rows[name] |= prompt_scores(images[pairs_of[name]], images[name], hq, batch["edited"].tolist(),
                                        batch["sign"].tolist(), reader)
    return rows, dict(images, hq=hq, **({"hq_tar": batch["hq_tar"]} if "hq_tar" in batch else {}))


def report(cfg, run, nets, source, encoder) -> dict:
    """Held-out faces: samples.png, prompts.png (each face under six prompts), curves.png, metrics.json, a table.

    With --farl also attribute_accuracy_farl, the share of targets on the asked side as FaRL reads them: a diagnostic,
    since the loss reads them with it too.
    """
    batch = source.held_out(cfg.validation_faces)
    rows, images = evaluate(cfg, run, nets, batch)
    if cfg.farl:
        with torch.no_grad():
            found = in_batches(lambda x: read_attributes(encoder, x.to(run.device)), images["target"], size=8)
        asked = found.gather(1, batch["edited"][:, None])[:, 0] * batch["sign"]
        rows["target"]["attribute_accuracy_farl"] = (asked > 0).float().mean().item()
    per_attribute = {name: row.pop("per_attribute") for name, row in rows.items() if "per_attribute" in row}
    folder, count = run.folder, len(batch["hq"])
    extra = dict(faces=count, **run.account(nets))
    protocol = metrics.toy_protocol(cfg.pairs or cfg.validation_data or cfg.data, cfg.degradation, count,
                                    cfg.readers)
    write_json(folder / "metrics.json", dict(rows=rows, per_attribute=per_attribute, **extra, protocol=protocol,
                                             **versions(run.device)))
    write_grid(folder / "samples.png", images)
    lq = images["lq"][:6]
    columns = {title: restore_held_out(cfg, run, nets, lq, [prompt] * len(lq)) for title, prompt in SHOWN.items()}
    write_grid(folder / "prompts.png", {"lq": lq} | columns)
    names = ("l1", "loss", "diffusion_src", "attribute_kl_src", "dual")
    write_curve(folder / "curves.png", read_curves(folder / "log.jsonl", names))
    shown = ("psnr", "psnr_gain", "fid_toy", "deg_toy", "attr_toy", "attribute_accuracy_toy", "leakage_toy",
             "cross_prompt_identity_toy", "identity_toy")
    print_table({name: {n: row[n] for n in shown if n in row} for name, row in rows.items()})
    for name, table in per_attribute.items():
        print(f"{name}: " + "  ".join(f"{a} {share:.2f} ({n})" for a, (share, n) in table.items()))
    run.say(f"{count} held-out faces; {extra['seconds']:.0f} s, {extra['peak_memory_gb']} GB at most; "
            f"pictures and numbers in {folder}")
    return rows


# ------------------------------------------------------------------------------------------------ restore


def sample(cfg: Sample) -> None:
    """Restore a picture or a folder with trained weights under --prompt, into --output."""
    run = Run(cfg)
    if not cfg.prompt.strip():
        raise UserError(f"--prompt is empty: leave it out for {TEMPLATE!r}")
    nets, trained = load_networks(cfg, run)
    if cfg.kv_cache and not trained.independent_condition:
        raise UserError("--kv_cache: this LoRA lets the condition see the image, so it changes with every step; "
                        "train with --independent_condition")
    given = lambda name: getattr(cfg, name) or getattr(trained, name)
    how = Setting(given("guidance_scale"), given("num_inference_steps"), given("true_cfg_scale"), cfg.negative_prompt,
                  given("image_guidance_scale"), cfg.kv_cache)
    if cfg.negative_prompt and how.true_cfg == 1:
        raise UserError("--negative_prompt: only read with a --true_cfg_scale other than 1")

    def restore_batch(lq, stems):
        # Every face gets the same noise, so that its result depends on the seed and not on its place in the folder.
        noise = nets["codec"].noise(trained.image_size, [cfg.seed] * len(lq))
        with run.autocast():
            return {"restored_faces": restore(nets, trained, lq, [cfg.prompt] * len(lq), noise, how)}

    restore_folder(cfg, restore_batch, trained.image_size, run.device)


def load_networks(cfg: Sample, run) -> tuple:
    """(nets with their LoRA, Train configuration): a training run, or FLUX and any LoRA file."""
    if cfg.lora and cfg.pretrained_model_name_or_path:  # the release: no run of ours, OminiControl's settings
        trained = Train(**dict(PAPER, image_size=cfg.image_size, text_length=cfg.text_length, guidance_scale=3.0,
                               pretrained_model_name_or_path=cfg.pretrained_model_name_or_path))
        check_sizes(trained)
        nets, lora = {}, cfg.lora
    else:
        nets, trained, finished = load_run(cfg.checkpoint)
        folder = find_checkpoint(cfg.checkpoint)
        lora = cfg.lora or (folder if folder.is_dir() else folder.parent) / LORA_FILE
        if "lora" not in finished and not cfg.lora:
            raise UserError(f"--checkpoint {cfg.checkpoint}: its stage lora is not finished; train it, or give --lora")
    where, kind = cfg.pretrained_model_name_or_path or trained.pretrained_model_name_or_path, weight_type(run)
    refuse_fp16(cfg, where)
    if where and kind is torch.float32:
        print("FLUX in float32 takes 48 GB; --mixed_precision bf16, as it was released, takes half", flush=True)
    if where:  # the prompts first: T5 is gone before the transformer comes
        words = FluxText(where, trained.text_length, run.device, kind)
        words.check(cfg.prompt)
        words.check(cfg.negative_prompt, "--negative_prompt")
        text = CachedText(lambda: words, trained.text_length, run.device)
        text.prepare([cfg.prompt, cfg.negative_prompt])
        text.make = words = None
        nets = dict(load_flux(where, kind), text=text)
    check_prompt(nets["text"], cfg.prompt)
    if cfg.negative_prompt:
        nets["text"].check(cfg.negative_prompt, "--negative_prompt")
    wear_lora(nets, lora, run.device)
    nets = {name: net.to(run.device) if isinstance(net, nn.Module) else net for name, net in nets.items()}
    return nets, trained


# ------------------------------------------------------------------------------------------------ building pairs


class Check(NamedTuple):
    accepted: bool
    scores: dict                           # every number that was looked at
    reasons: list                          # why not, in words; empty if accepted


def quality_check(source, target, edited: int, sign: int, identity: float, structure: float, shift: float, positive=0.6,
                  negative=0.4, max_leak=0.3, min_identity=0.4, min_structure=0.5, max_shift=0.1) -> Check:
    """May (source, target) teach one attribute? The three automatic checks of section 3.1: attribute, identity,
    structure. The paper's manual review comes after them: look at sheet.png and the folder target/.

    source, target: 12 scores each in [0, 1]; edited: the attribute, sign +1 to be on, -1 off in the target; identity:
    cosine of the faces; structure: their SSIM; shift: mean landmark shift over the distance of the eyes. The attribute
    must cross from one side to the other. NaN fails.
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
    scores = dict(before=before, after=after, leak=moved[worst], identity=identity, structure=structure,
                  shift=shift)
    reasons = [reason for passed, reason in tests if not passed]
    return Check(not reasons, {name: round(value, 4) for name, value in scores.items()}, reasons)


class Editor(NamedTuple):
    """A model that FlowEdit can use."""
    velocity: typing.Callable              # (x, t, prompt) -> velocity
    prompt: typing.Callable                # (prompts, guidance) -> prompt
    encode: typing.Callable                # images (B, 3, S, S) in [-1, 1] -> x
    decode: typing.Callable                # x -> images
    sigmas: torch.Tensor                   # (N + 1,)


def flux_editor(nets, cfg, steps: int, size: int) -> Editor:
    """FLUX alone, no degraded image. FLUX.1-dev has its guidance built in; the toy prior has not, and takes
    classifier-free guidance against the empty prompt, as SD3 does: then a prompt is (with, without, scale)."""
    plain, distilled, codec = velocity_of(nets, cfg, None, None), bool(cfg.pretrained_model_name_or_path), nets["codec"]

    def prompt(prompts, guidance):
        if distilled:
            return Prompt(*nets["text"].encode(prompts), guidance)
        return *(Prompt(*nets["text"].encode(p)) for p in (prompts, [""] * len(prompts))), guidance

    def velocity(x, t, prompt):
        if distilled or prompt[2] == 1:
            return plain(x, t, prompt if distilled else prompt[0])
        return guide(plain(x, t, prompt[0]), plain(x, t, prompt[1]), prompt[2])

    return Editor(velocity, prompt, codec.encode, lambda z: codec.decode(z).clamp(-1, 1),
                  flux_sigmas(steps, (size // codec.token) ** 2))


def sd3_editor(where: str, size: int, steps: int, device, dtype) -> Editor:
    """SD3 or SD3.5: three text encoders, latents unpacked, classifier-free guidance against the empty prompt."""
    from diffusers import StableDiffusion3Pipeline
    try:
        pipe = StableDiffusion3Pipeline.from_pretrained(where, dtype=dtype).to(device)
    except Exception as error:  # missing parts, offline, gated: a dozen kinds
        raise UserError(f"--pretrained_model_name_or_path {where}: cannot be loaded as SD3 "
                        f"({first_line(error)})") from None
    vae, net = pipe.vae, pipe.transformer
    scale, shift = vae.config.scaling_factor, vae.config.shift_factor

    def prompt(prompts, guidance):  # without | with, in one batch
        text, no_text, pooled, no_pooled = pipe.encode_prompt(prompts, None, None, negative_prompt=[""] * len(prompts))
        return torch.cat([no_text, text]), torch.cat([no_pooled, pooled]), guidance

    def velocity(x, t, prompt):
        text, pooled, guidance = prompt
        away, v = net(hidden_states=torch.cat([x, x]).to(net.dtype), timestep=1000 * torch.cat([t, t]),
                      encoder_hidden_states=text, pooled_projections=pooled, return_dict=False)[0].float().chunk(2)
        return guide(v, away, guidance)

    token = 2 ** len(vae.config.block_out_channels)
    if size % token:
        raise UserError(f"--image_size {size}: must be a multiple of {token}")
    return Editor(velocity, prompt,
                  lambda x: (vae.encode(x.to(vae.dtype)).latent_dist.mean.float() - shift) * scale,
                  lambda z: vae.decode((z / scale + shift).to(vae.dtype)).sample.float().clamp(-1, 1),
                  sd3_sigmas(steps, pipe.scheduler.config.shift))


def load_editor(cfg: Pairs, run) -> Editor:
    """SD3, FLUX.1-dev, or the toy prior of --checkpoint."""
    where, kind = cfg.pretrained_model_name_or_path, weight_type(run)
    refuse_fp16(cfg, where)
    if cfg.editor == "sd3":
        if not where:
            raise UserError("--editor sd3 needs --pretrained_model_name_or_path: a folder or hub id of SD3 or SD3.5")
        return sd3_editor(where, cfg.image_size, cfg.num_inference_steps, run.device, kind)
    if where:
        trained = Train(**dict(PAPER, pretrained_model_name_or_path=where))
        text = FluxText(where, trained.text_length, run.device, kind)
        nets = dict(load_flux(where, kind), text=text)
    else:
        nets, trained, finished = load_run(cfg.checkpoint)
        if "prior" not in finished:
            raise UserError(f"--checkpoint {cfg.checkpoint}: has no toy prior; give --pretrained_model_name_or_path")
    if cfg.image_size % nets["codec"].token:
        raise UserError(f"--image_size {cfg.image_size}: must be a multiple of {nets['codec'].token}")
    nets = {name: net.to(run.device) if isinstance(net, nn.Module) else net for name, net in nets.items()}
    return flux_editor(nets, trained, cfg.num_inference_steps, cfg.image_size)


@torch.no_grad()
def edit_faces(editor: Editor, cfg: Pairs, blend: float, device, images, source: list, target: list, seeds: list):
    """FlowEdit of images (B, 3, S, S) from one prompt each to another; each has its own noise, whoever is beside it."""
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    z = flow_edit(editor.velocity, editor.encode(images.to(device)), editor.prompt(source, cfg.source_guidance),
                  editor.prompt(target, cfg.target_guidance), editor.sigmas, cfg.n_max, cfg.n_min, cfg.n_avg, blend,
                  generators)
    return editor.decode(z)


class Judge:
    """What is read off faces to accept or reject a pair: attributes, identity, landmarks, SSIM."""

    def __init__(self, cfg: Pairs, device):
        self.encoder, self.device = load_encoder(cfg, device), device
        needs = ["identity"] * (not cfg.arcface) + ["landmarks"] * (not cfg.fan)
        self.reader = metrics.load_reader("a", cfg.readers, needs).to(device)
        self.identity = self.detector = self.reader
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


class LLMVerbaliser:
    """A chat model of transformers writes the caption (the paper: Qwen3); where it forgets a phrase, the template does.

    A caption that forgets an attribute would teach that attributes need not be asked for.
    """

    def __init__(self, where: str, device):
        if not where:
            raise UserError("--verbaliser llm needs --llm: a folder or hub id of a chat model")
        from transformers import AutoModelForCausalLM, AutoTokenizer
        self.words = from_folder(AutoTokenizer, where, "llm")
        self.model = from_folder(AutoModelForCausalLM, where, "llm").to(device).eval()

    @torch.no_grad()
    def __call__(self, scores) -> str:
        plain = verbalise(scores)
        said = [phrase for _, _, *phrases in ATTRIBUTES for phrase in phrases if phrase and f" {phrase}" in plain]
        ask = ("Rewrite as one fluent sentence about the face in a photo; keep the words "
               f"{', '.join(said)}. Answer with the sentence only: {plain}.")
        if self.words.chat_template:  # Qwen3 would think aloud first
            ask = self.words.apply_chat_template([dict(role="user", content=ask)], tokenize=False,
                                                 add_generation_prompt=True, enable_thinking=False)
        given = self.words(ask, return_tensors="pt").to(self.model.device)
        out = self.model.generate(input_ids=given.input_ids, attention_mask=given.attention_mask, max_new_tokens=80,
                                  do_sample=False, pad_token_id=self.words.eos_token_id or 0)
        answer = self.words.decode(out[0, given.input_ids.shape[1]:], skip_special_tokens=True).strip().split("\n")[0]
        return answer if answer and all(phrase in answer.lower() for phrase in said) else plain


class Job(NamedTuple):
    """One pair to be built."""
    name: str                              # of the pair, and of its target's file
    face: str                              # of the source's
    image: torch.Tensor                    # (3, S, S) the source
    scores: list                           # 12, of the source
    edited: int
    sign: int
    source_prompt: str
    target_prompt: str


def source_faces(cfg: Pairs):
    """(name, image (3, S, S)) of every source face; files that cannot be read are named and left out."""
    if not cfg.data:
        for i in range(cfg.count):
            face = toy_faces(TOY_SPLITS["train"].start + i, mix("pairs", cfg.seed, i), size=cfg.image_size)
            yield f"toy_{i:06d}", face.image[0]
        return
    root = Path(cfg.data)
    for path in list_images(root, recursive=True)[:cfg.count]:
        try:
            name = str(path.relative_to(root) if root.is_dir() else path.name)   # with suffix: a.png is not a.jpg
            yield re.sub(r"[%/\\]", lambda m: f"%{ord(m[0]):02X}", name), read_image(path, cfg.image_size)
        except UserError as error:
            print(f"skipped: {error}", flush=True)


def make_jobs(cfg: Pairs, faces: list, judge: Judge, caption, done: set) -> list:
    """The pairs to be built from a batch of (name, image): `edits` attributes per face, those done before left out."""
    jobs = []
    for (face, image), scores in zip(faces, judge.attributes(torch.stack([image for _, image in faces]))):
        choice = editable(scores, cfg.positive, cfg.negative)
        order = torch.randperm(len(choice), generator=torch.Generator().manual_seed(mix("edits", cfg.seed, face)))
        for edited in (choice[i] for i in order[:cfg.edits]):
            name = f"{face}_{NAMES[edited]}"
            if name not in done:
                after, sign = switch(scores, edited)
                jobs.append(Job(name, face, image, scores, edited, sign, caption(scores), caption(after)))
    return jobs


def attempt(cfg: Pairs, run, jobs: list, editor: Editor, judge: Judge, blend: float, number: int) -> list:
    """(job, edited image, Check) of one step of the ladder."""
    images = torch.stack([job.image for job in jobs])
    source, target = [job.source_prompt for job in jobs], [job.target_prompt for job in jobs]
    seeds = [mix("edit", cfg.seed, job.name, number) for job in jobs]
    with run.autocast():
        after = edit_faces(editor, cfg, blend, run.device, images, source, target, seeds).cpu()
    limits = ("positive", "negative", "max_leak", "min_identity", "min_structure", "max_shift")
    limits = {name: getattr(cfg, name) for name in limits}
    return [(job, image, quality_check(job.scores, scores, job.edited, job.sign, *numbers, **limits))
            for job, image, scores, numbers in zip(jobs, after, judge.attributes(after), judge.compare(images, after))]


def record(folder: Path, job: Job, image, check: Check, blend: float, attempts: int) -> None:
    """The pictures first, then one line: a pair that is listed is whole."""
    source, target = f"source/{job.face}.png", f"target/{job.name}.png"
    if check.accepted:
        if not (folder / source).exists():
            write_image(folder / source, job.image)
        write_image(folder / target, image)
    row = dict(id=job.name, source=source, target=target if check.accepted else None, attribute=NAMES[job.edited],
               sign=job.sign, source_prompt=job.source_prompt, target_prompt=job.target_prompt, accepted=check.accepted,
               scores=check.scores, reasons=check.reasons, blend=blend, attempts=attempts)
    try:
        with open(folder / "pairs.jsonl", "a") as file:
            file.write(json.dumps(row) + "\n")
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        raise UserError(f"{folder / 'pairs.jsonl'}: cannot be written ({error.strerror}); free space, then repeat the "
                        "command: it goes on") from None


def done_before(path: Path) -> set:
    """Names of the pairs that are listed; a line that a kill cut short is closed, so that the next one stands alone."""
    if not path.exists():
        return set()
    if path.stat().st_size and not path.read_bytes().endswith(b"\n"):
        with open(path, "a") as file:
            file.write("\n")
    rows, broken = read_pairs(path)
    for reason, count in broken.items():
        print(f"{path}: {count} line{'s' * (count > 1)} left out, {reason}")
    return {row["id"] for row in rows if "id" in row}


def made_with(cfg: Pairs, path: Path) -> dict:
    """What decides which picture a name stands for. UserError where the folder's pairs were built from other faces."""
    now = dict(data=str(Path(cfg.data).resolve()) if cfg.data else "", seed=cfg.seed, image_size=cfg.image_size)
    try:
        before = json.loads(path.read_text()) if path.exists() else now
        before = {name: before[name] for name in now}
    except (ValueError, KeyError, TypeError):
        raise UserError(f"{path}: damaged; move it away, or choose another --output") from None
    for name in (n for n in now if before[n] != now[n]):
        was = before[name] if before[name] != "" else "''"
        raise UserError(f"{path.parent}: its pairs were built with --{name} {was}; "
                        "go on with that, or choose another --output")
    return now


def pairs(cfg: Pairs) -> None:
    """Every job climbs the ladder until its checks pass; what is listed in pairs.jsonl is never touched again."""
    run = Run(cfg)
    if run.world > 1:
        raise UserError("pairs runs in one process; instead of torchrun start several, each with --data and --output")
    if cfg.data:
        list_images(cfg.data, recursive=True)                      # a mistyped folder comes out before the editor loads
    sources = made_with(cfg, run.folder / "made_with.json")
    editor, judge = load_editor(cfg, run), Judge(cfg, run.device)
    caption = LLMVerbaliser(cfg.llm, run.device) if cfg.verbaliser == "llm" else verbalise
    if cfg.data and not cfg.readers:
        reads = dict(farl="attributes", arcface="identity", fan="landmarks (--max_shift 0.1 or more)")
        for flag, what in reads.items():
            if not getattr(cfg, flag):
                print(f"no --{flag}: a network that only knows toy faces reads {what}", flush=True)
    write_json(run.folder / "made_with.json", sources)
    done, ladder = done_before(run.folder / "pairs.jsonl"), [blend for blend in cfg.blends for _ in range(cfg.tries)]
    faces, counts = source_faces(cfg), Counter()
    try:
        while batch := list(itertools.islice(faces, cfg.batch_size)):
            left = make_jobs(cfg, batch, judge, caption, done)
            for number, blend in enumerate(ladder, 1):
                results = attempt(cfg, run, left, editor, judge, blend, number) if left else []
                for job, image, check in results:
                    if check.accepted or number == len(ladder):
                        record(run.folder, job, image, check, blend, number)
                        counts["accepted" if check.accepted else "rejected"] += 1
                left = [job for job, _, check in results if not check.accepted]
            print(f"{sum(counts.values())} pairs tried, {counts['accepted']} accepted, "
                  f"{time.time() - run.started:.0f} s", flush=True)
    except KeyboardInterrupt:
        raise UserError(f"stopped; the same command goes on from {run.folder / 'pairs.jsonl'}") from None
    pairs_report(cfg, run, sum(counts.values()))


def pairs_report(cfg: Pairs, run, tried: int) -> None:
    """Contact sheet and numbers of the folder's accepted pairs (an even thousand of them), read again from files."""
    path = run.folder / "pairs.jsonl"
    rows = read_pairs(path)[0] if path.exists() else []
    good = sound_pairs(path)[0] if rows else []
    if not good:
        raise UserError(f"no pair was accepted out of {len(rows)}: see the reasons in {path}; "
                        "raise --target_guidance or --n_max, or loosen a check")
    some = good[::-(-len(good) // 1000)]                           # at most a thousand pairs of pictures in memory
    side = min(cfg.image_size, 256)                                # as large as what looks at them needs
    source, target = (torch.stack([read_image(run.folder / row[key], side) for row in some])
                      for key in ("source", "target"))
    edited, sign = [NAMES.index(row["attribute"]) for row in some], [row["sign"] for row in some]
    numbers = prompt_scores(source, target, source, edited, sign, metrics.load_reader("b", cfg.readers))
    numbers.pop("identity_toy")                                    # of the source and itself
    minutes = (time.time() - run.started) / 60 / tried * 1000 if tried else None
    numbers |= dict(measured=len(some), accepted=len(good), tried=len(rows), acceptance=len(good) / len(rows),
                    minutes_per_1000_pairs=minutes)
    write_json(run.folder / "metrics.json", dict(numbers, config=dataclasses.asdict(cfg), **versions(run.device)))
    few = slice(None, None, max(1, len(some) // 16))
    write_grid(run.folder / "sheet.png", {"source": source[few], "target": target[few]}, rows=16, cell=96)
    failed = Counter(reason.split(":")[0] for row in rows if not row["accepted"] for reason in row["reasons"])
    print(f"{len(good)} of {len(rows)} pairs accepted (failed: {dict(failed)}); by reader_b identity "
          f"{numbers['cross_prompt_identity_toy']:.3f}, attributes {numbers['attribute_accuracy_toy']:.3f}; {path}")
    if cfg.arcface:
        mean = statistics.mean(row["scores"]["identity"] for row in good)
        print(f"identity by ArcFace {mean:.4f} (the paper's data: 0.6387)")


# ------------------------------------------------------------------------------------------------ ablations

# name -> (table, changed fields, AA of the paper). Comparable in order, not in size: the paper asks Qwen3-VL about 512 px
# photographs. Table 4's header is scrambled in our text of the paper; its rows are read as section 5.5 tells them. The
# rows without SDT see as many faces a step as the others. Table 5 tunes DiT4SR; our own network stands in for it.
NO_AAL, NO_DUAL = dict(attribute_weight=0.0), dict(dual_weight=0.0)
NO_SDT = dict(dual_training=False, dual_weight=0.0, batch_size=2 * Train.batch_size)
ABLATIONS = {
    "no AAL, no SDT": ("", NO_AAL | NO_SDT, "AA .4078"),
    "AAL alone": ("losses", NO_SDT, "AA .6214"),
    "SDT without dual": ("losses", NO_AAL | NO_DUAL, "AA .6417"),
    "AAL + SDT without dual": ("losses", NO_DUAL, "AA .7757"),
    "full": ("", {}, "AA .8536"),
    "full, Eq. 5 as printed": ("losses", dict(dual="abs"), "no sign, one m"),
    "no AAL, no SDT, built pairs": ("data", NO_AAL | NO_SDT | dict(pairs="built"), "Table 5: .6308, FFHQ .4730"),
    "full, pairs built by FlowEdit": ("data", dict(pairs="built"), "Table 5: AA .8536"),
}


# Beginnings of the fields that change nothing before the LoRA: rows that differ in them share a prior.
LATER_FIELDS = ("output", "degradation", "batch_size", "stage", "pairs", "pair_faces", "lq_from", "rank", "lora_",
                "learning_rate", "prodigy_", "weight_decay", "attribute_weight", "dual", "attr_t_max", "decoded",
                "drop_", "independent_", "condition_", "two_pass", "gradient_checkpointing", "cache_text",
                "num_inference_steps", "guidance_scale", "true_cfg_scale", "image_guidance_scale", "validation_faces",
                "table", "rows", "seeds", "device", "num_workers", "log_", "checkpointing_", "resume_")


def ablate(cfg: Ablate) -> None:
    """Each row trains only the LoRA; autoencoder and prior are trained once per seed."""
    check_sizes(cfg)
    if cfg.pretrained_model_name_or_path or cfg.data:
        raise UserError("ablate runs on the toy world: leave out --pretrained_model_name_or_path and --data")
    done = run_ablation(cfg, ABLATIONS, ablation_row)
    names = ("attribute_accuracy_toy", "cross_prompt_identity_toy", "leakage_toy", "identity_toy")
    print_ablation(done, ABLATIONS, ("unguided_accuracy_toy", *names, "source_psnr_gain", "template_attr_toy"))
    edited = {key: dict(entry, scores=entry["edited"], row="restored, then edited") for key, entry in done.items()
              if "edited" in entry}
    table = {"restored, then edited": ("baseline of Table 3", {}, "this system without a prompt, then FlowEdit")}
    print_ablation(edited, table, names)


def ablation_row(cfg: Ablate, done: dict) -> dict:
    """Train the LoRA of a row; measure on the exact held-out pairs, whatever the row was trained on."""
    run, encoder = Run(cfg), load_encoder(cfg, "cpu")
    encoder, nets = encoder.to(run.device), toy_nets(cfg, run, encoder)
    if cfg.pairs == "built":
        cfg = dataclasses.replace(cfg, pairs=built_pairs(cfg, run, nets))
    started = time.time()
    train_lora(cfg, run, nets, encoder, pair_source(cfg, encoder, nets["text"]))
    seconds, batch = time.time() - started, ToyPairs(cfg.image_size).held_out(cfg.validation_faces)
    whole = cfg.dual_training and cfg.dual_weight and cfg.attribute_weight and cfg.dual == "signed" and not cfg.pairs
    rows, images = evaluate(cfg, run, nets, batch, baseline=whole)
    # Text guidance lifts every row towards the ceiling: what training alone has taught is seen without it.
    plain, asked = dataclasses.replace(cfg, true_cfg_scale=1.0), ("source_prompts", "target_prompts")
    both = [restore_held_out(plain, run, nets, images["lq"], batch[prompts]) for prompts in asked]
    unguided = prompt_scores(*both, batch["hq"], batch["edited"].tolist(), batch["sign"].tolist(),
                             metrics.load_reader("b", cfg.readers).to(run.device))
    extra = dict(source_psnr_gain=rows["source"]["psnr_gain"], template_attr_toy=rows["template"]["attr_toy"],
                 unguided_accuracy_toy=unguided["attribute_accuracy_toy"])
    return dict(scores=rows["target"] | extra, seconds=seconds, **({"edited": rows["edited"]} if whole else {}))


def toy_nets(cfg: Ablate, run, encoder) -> dict:
    """Autoencoder, words and prior of a seed: those of --prior, or trained once for all rows."""
    nets = {name: net.to(run.device).requires_grad_(False) for name, net in networks(cfg, run)[0].items()}
    if cfg.prior:
        return nets
    matters = tuple(f.name for f in dataclasses.fields(cfg) if not f.name.startswith(LATER_FIELDS))

    def train_parts():
        for stage in ("vae", "prior"):
            TOY_TRAINERS[stage](cfg, run, nets, encoder)
        return {name: net.state_dict() for name, net in nets.items()}

    for name, weights in shared_parts(cfg, "a2bfr", "prior", matters, train_parts).items():
        load_strict(nets[name], weights, f"{cfg.output}, {name}")
    return nets


def built_pairs(cfg: Ablate, run, nets) -> str:
    """pairs.jsonl of --pair_faces toy faces edited by the prior of these settings; built once."""
    fields = {k: v for k, v in dataclasses.asdict(cfg).items() if k == "pair_faces" or not k.startswith(LATER_FIELDS)}
    folder = Path(cfg.output) / f"pairs_{mix(json.dumps(fields, default=str)):012x}"
    if not (folder / "metrics.json").exists():
        save_model(folder / "prior", {name: net.state_dict() for name, net in nets.items()},
                   dict(method="a2bfr", train=dataclasses.asdict(cfg), finished=["vae", "prior"]))
        pairs(Pairs(output=str(folder), checkpoint=str(folder / "prior"), count=cfg.pair_faces, seed=cfg.seed,
                    image_size=cfg.image_size, device=cfg.device, readers=cfg.readers,
                    mixed_precision=cfg.mixed_precision))
    return str(folder / "pairs.jsonl")


VERBS = {
    "train": (Train, {"toy": Train(), "paper": Train(**PAPER)}, train),
    "sample": (Sample, {}, sample),
    "pairs": (Pairs, {"toy": Pairs(), "paper": Pairs(**SD3_EDITOR), "flux": Pairs(**FLUX_EDITOR)}, pairs),
    "ablate": (Ablate, {"toy": Ablate()}, ablate),
}

if __name__ == "__main__":
    command_line(__doc__, VERBS)
