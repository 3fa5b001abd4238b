"""Latent-PMRF: restore a face by its posterior mean, then move the estimate to a real face with a flow between latents.

Paper: "Latent-PMRF" (arXiv 2507.00447 v1); baseline: PMRF (arXiv 2410.00418). Among all estimators whose outputs
look real, the one with the least squared error transports the posterior mean to the distribution of clean images.
PMRF (posterior-mean rectified flow) learns that transport on pixels; here it runs between latents of Sim-VAE, an
autoencoder plain enough (3x3 convolutions, per-pixel LayerNorm, no attention) to reconstruct faces almost exactly: its
error bounds the distortion.

    paper      name here   shape                range     meaning
    y, x       lq, hq      (B, 3, S, S)         [-1, 1]   degraded and clean face
    x_hat      estimate    (B, 3, S, S)         [-1, 1]   posterior mean E[X | Y = y], here SwinIR (`mmse`)
    E, D       vae         (B, 3, S, S) <-> (B, c, S/f, S/f)    Sim-VAE; latents are not rescaled
    z_0        z0          (B, c, h, w)         t = 0     source: latent of the posterior mean + noise of std sigma_s
    z_1        z1          (B, c, h, w)         t = 1     target: latent of the clean face
    t          t           (B,)                 [0, 1]    0 is the degraded end, 1 the clean end
    v_t(z_t)   velocity    (B, c, h, w)                   HDiT, which sees z_t and t only, never y

    [Eq. 1] euler_sample   [Eq. 2, 3, 5] cfm_loss   [Eq. 4] flow_source: options 1 and 2   [Eq. 6] vae_loss
    [Figure 2] interpolate   [sec. 4.1] SimVAE   [sec. 6.1] HDiT and the paper preset

Run `python latent_pmrf.py train` (toy world, CPU, minutes) or `train --preset paper --data FFHQ`; then `sample`.
`--space pixel` is PMRF itself. Left out: Real-ESRGAN degradation for natural images, tiled velocity for large pictures.
"""
import dataclasses
import functools
import math
import time
import typing
from dataclasses import dataclass
from pathlib import Path

# common comes first: it sets GOMP_SPINCOUNT before torch is imported
from common import (DEGRADATIONS, Faces, Run, SampleFlags, Stage, TrainFlags, UserError, at_once, command_line,
                    degrade_pair, find_checkpoint, finished_parts, is_run, load_model, load_strict,
                    lr_schedule, make_optimizer, not_half, print_ablation, print_table, random_crop, read_curves,
                    read_torch, read_weights, refuse_unread, restore_folder, run_ablation, same_settings, save_model,
                    saved_flags, shared_parts, versions, warmup_cosine, write_curve, write_grid, write_json)

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

import metrics

# ------------------------------------------------------------------------------------------------ configuration


@dataclass(frozen=True)
class Train(TrainFlags):
    """Train Sim-VAE, the posterior mean and the flow, then restore held-out faces."""
    output: str = "runs/latent_pmrf"       # folder for weights, checkpoints, log and pictures
    batch_size: int = 8                    # faces per process and micro-batch; paper 64 over 8 GPUs
    max_grad_norm: float = 1.0             # clip the gradient of mmse and flow (0: off, as PMRF); the VAE's always at 1
    stage: typing.Literal["all", "vae", "mmse", "flow"] = "all"  # one stage, or all in order
    space: typing.Literal["latent", "pixel"] = "latent"  # where the flow runs; pixel is PMRF, which has no VAE
    source: typing.Literal["encode_mean", "latent_mean"] = "encode_mean"  # sec. 3.2: options 2 and 1
    vae: str = ""                          # Sim-VAE to use, not train: folder of a run, diffusers folder or hub id
    mmse: str = ""                         # SwinIR to use: a run's folder, or swinir_restoration512_L1.pth of DifFace
    # Sim-VAE
    latent_channels: int = 16              # c of the latent; paper 32
    vae_widths: tuple[int, ...] = (16, 32, 64)  # channels per level, finest first; paper 128 256 512 512
    vae_norm: typing.Literal["layer", "group"] = "layer"  # Table 2: per-pixel LayerNorm or GroupNorm
    vae_resizer: typing.Literal["sim", "pixel_shuffle", "sd"] = "sim"  # interpolation, pixel shuffle or Figure 5a
    vae_block: typing.Literal["sim", "sd"] = "sim"  # Figure 3: one norm and one activation, or SD-VAE's two
    perceptual: typing.Literal["reader", "vgg19", "none"] = "reader"  # network of the perceptual loss; paper vgg19
    vgg: str = ""                          # file of torchvision's vgg19 weights (default: torchvision fetches them)
    perceptual_weight: float = 0.05        # DIFFERS: authors' file; sec. 4.2: as Real-ESRGAN, whose is 1.0
    kl_weight: float = 1e-6                # of the KL summed over a latent
    vae_steps: int = 1150                  # paper 150 000
    vae_learning_rate: float = 2e-3        # peak; paper 1e-4
    vae_min_learning_rate: float = 1e-4    # end of the cosine; paper 1e-6
    vae_cosine_steps: int = 1150           # horizon of the cosine; paper vae_steps, authors' file 200 000
    vae_warmup_steps: int = 50             # linear, from a tenth of the peak (DIFFERS: paper 500 at a tenth, flat)
    vae_crop: int = 32                     # side of the random crop the VAE sees; paper 256
    # posterior mean
    mmse_dim: int = 64                     # SwinIR width; DifFace 180
    mmse_depths: tuple[int, ...] = (4, 4)  # Swin layers per residual group; DifFace 6 x 8
    mmse_heads: int = 4                    # attention heads; DifFace 6
    mmse_features: int = 48                # width at full resolution, after upsampling; DifFace 64
    mmse_unshuffle: int = 4                # space-to-depth before and upsampling after; DifFace 8
    mmse_residual: bool = True  # add the input, as SwinIR does for denoising: learns sooner; DifFace does not
    mmse_drop_path: float = 0.0            # share of skipped residual branches in training; DifFace 0.1
    mmse_steps: int = 3700                 # paper trains none (DifFace's weights); PMRF 1000 epochs
    mmse_learning_rate: float = 2e-3       # PMRF 5e-4, constant
    # flow
    flow_widths: tuple[int, ...] = (64, 128)  # HDiT width per level; paper 256 512 1024
    flow_depths: tuple[int, ...] = (2, 4)  # layers per level (fine levels count twice: down and up); paper 2 4 6
    flow_patch: int = 1                    # patch of the latent flow
    pixel_patch: int = 2                   # patch of the pixel flow; PMRF 4
    pixel_depths: tuple[int, ...] = (2, 4)  # flow_depths of the pixel flow; PMRF 2 2 8
    neighborhood: int = 7                  # side of the attention window on all levels but the last
    head_dim: int = 32                     # width of an attention head; paper 64
    depthwise: bool = True  # depth-wise convolutions in attention and feed-forward [sec. 6.1]; never in the pixel flow
    mapping_width: int = 128               # width of the time embedding; paper 768
    source_noise: float = 0.1              # sigma_s: noise on the source, in units of the space the flow runs in
    source_sample: bool = True             # source is a sample of the posterior q(z | x_hat), not its mean
    gradient_checkpointing: bool = False   # recompute the flow's layers in the backward pass: less memory, more time
    flow_steps: int = 600                  # paper 400 000
    learning_rate: float = 2e-3            # of the flow; paper 5e-4, constant
    flow_weight_decay: float = 0.0         # of the flow; UNSTATED: none in the paper, 0.01 in PMRF
    num_inference_steps: int = 4           # Euler steps of the faces restored at the end; paper 25


@dataclass(frozen=True)
class Sample(SampleFlags):
    """Restore faces with trained weights."""
    output: str = "results/latent_pmrf"    # folder for restored_faces/, posterior_mean/, cmp/ and args.json
    checkpoint: str = "runs/latent_pmrf"   # output folder of a training run, or PMRF's released folder or hub id
    vae: str = ""                          # Sim-VAE instead of the checkpoint's: folder of a run, or as --vae of train
    mmse: str = ""                         # SwinIR instead of the checkpoint's: folder of a run, or a released file
    num_inference_steps: int = 0           # Euler steps K (0: as trained, PMRF 25); 1 is one step from the mean
    vae_memory_gb: float = 0.0             # decode in tiles that need no more than this much memory (0: whole)


@dataclass(frozen=True)
class Ablate(Train):
    """Rerun the paper's tables at toy size."""
    output: str = "runs/latent_pmrf_ablate"  # folder for rows.json and the shared networks
    table: typing.Literal["all", "space", "vae", "source"] = "all"  # Table 4 and Figure 6; Tables 2, 3; section 3.2
    rows: tuple[str, ...] = ()             # only these rows (default: all)
    seeds: int = 1                         # repetitions with other seeds
    vae_steps: int = 1000                  # a row is meant to take 3-5 CPU minutes
    vae_cosine_steps: int = 1000           # as vae_steps
    mmse_steps: int = 1500                 # shared by the rows of a seed
    flow_steps: int = 400                  # of the latent and of the pixel flow
    num_inference_steps: int = 10          # Euler steps
    validation_faces: int = 128            # held-out faces restored and measured per row


# [sec. 6.1], degradation "following [46, 60]": PMRF's. UNSTATED: EMA, precision, clipping, widths of the flow (PMRF's);
# the layout of Sim-VAE and its EMA (authors' file). mmse_steps: PMRF's 1000 epochs of FFHQ at its batch of 256; the
# paper takes DifFace's SwinIR. DIFFERS: vae_cosine_steps, the authors' 200 000; printed is a cosine that ends at 1e-6.
PAPER = dict(
    image_size=512, batch_size=8, degradation="difface", ema_decay=0.9999, mixed_precision="bf16", num_workers=8,
    checkpointing_steps=5000, log_steps=100, optimizer="adamw", lr_scheduler="constant", lr_warmup_steps=0,
    max_grad_norm=0.0, latent_channels=32, vae_widths=(128, 256, 512, 512), perceptual="vgg19", vae_steps=150_000,
    vae_learning_rate=1e-4, vae_min_learning_rate=1e-6, vae_cosine_steps=200_000, vae_warmup_steps=500, vae_crop=256,
    mmse_dim=180, mmse_depths=(6,) * 8, mmse_heads=6, mmse_features=64, mmse_unshuffle=8, mmse_residual=False,
    mmse_drop_path=0.1, mmse_steps=270_000, mmse_learning_rate=5e-4,
    flow_widths=(256, 512, 1024), flow_depths=(2, 4, 6), pixel_patch=4, pixel_depths=(2, 2, 8), head_dim=64,
    mapping_width=768, flow_steps=400_000, learning_rate=5e-4, num_inference_steps=25)
HDIT_PMRF = dict(in_channels=3, widths=(256, 512, 1024), depths=(2, 2, 8), patch=4, head_dim=64, mapping_width=768,
                 depthwise=False)


# ------------------------------------------------------------------------------------------------ model: Sim-VAE


class PixelLayerNorm(nn.LayerNorm):
    """LayerNorm over the channels of each pixel: no statistic crosses pixels, so the network stays a convolution."""

    def __init__(self, channels: int):
        super().__init__(channels, eps=1e-6)

    def forward(self, x):  # (B, C, H, W)
        with torch.autocast(x.device.type, enabled=False):        # which would write float32; sums are wide anyway
            weight, bias = self.weight.to(x.dtype), self.bias.to(x.dtype)
            return F.layer_norm(x.movedim(1, -1), self.normalized_shape, weight, bias, self.eps).movedim(-1, 1)


def vae_norm(kind: str, channels: int) -> nn.Module:
    """"layer", or "group": 32 groups of at least 4 channels, as SD-VAE has them from 128 channels on."""
    groups = math.gcd(32, max(1, channels // 4), channels)
    return PixelLayerNorm(channels) if kind == "layer" else nn.GroupNorm(groups, channels, eps=1e-6)


class SimBlock(nn.Module):
    """y = x + conv2(SiLU(conv1(norm(x)))), the only block of Sim-VAE [sec. 4.1]; "sd" adds SD-VAE's norm and SiLU."""

    def __init__(self, width: int, out: int, norm: str, kind: str):
        super().__init__()
        self.kind = kind
        self.norm = vae_norm(norm, width)
        self.conv1 = nn.Conv2d(width, out, 3, padding=1)
        if kind == "sd":
            self.norm2 = vae_norm(norm, out)
        self.conv2 = nn.Conv2d(out, out, 3, padding=1)
        if width != out:  # only with SD-style resizers: channels change in the block
            self.shortcut = nn.Conv2d(width, out, 1)

    def forward(self, x):
        h = self.norm(x)
        h = self.conv1(F.silu(h) if self.kind == "sd" else h)
        h = F.silu(self.norm2(h) if self.kind == "sd" else h)
        return self.conv2(h) + (self.shortcut(x) if hasattr(self, "shortcut") else x)


class Down(nn.Module):
    """Halve the resolution with one strided 3x3 convolution. "sd" pads right and below, Sim-VAE all sides."""

    def __init__(self, width: int, out: int, style: str):
        super().__init__()
        self.style = style
        self.conv = nn.Conv2d(width, out, 3, stride=2, padding=int(style != "sd"))

    def forward(self, x):
        return self.conv(x if self.style != "sd" else F.pad(x, (0, 1, 0, 1)))


class Up(nn.Module):
    """Double the resolution: nearest neighbour, then a 3x3 convolution; or four times the channels, then pixel shuffle.

    UNSTATED: pixel shuffle is our reading of Table 2's "- interpolate": the authors' switch `upsample_method`.
    """

    def __init__(self, width: int, out: int, style: str):
        super().__init__()
        self.shuffle = style == "pixel_shuffle"
        self.conv = nn.Conv2d(width, 4 * out if self.shuffle else out, 3, padding=1)

    def forward(self, x):
        if self.shuffle:
            return F.pixel_shuffle(self.conv(x), 2)
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))


class Blocks(nn.Module):
    """`layers` residual blocks, then perhaps a resizer, named as in the released checkpoint."""

    def __init__(self, width, out, layers, norm, kind, downsampler=None, upsampler=None):
        super().__init__()
        self.resnets = nn.ModuleList(SimBlock(width if i == 0 else out, out, norm, kind) for i in range(layers))
        if downsampler is not None:
            self.downsampler = downsampler
        if upsampler is not None:
            self.upsampler = upsampler

    def forward(self, x):
        for block in self.resnets:
            x = block(x)
        for resizer in ("downsampler", "upsampler"):
            x = getattr(self, resizer)(x) if hasattr(self, resizer) else x
        return x


class Encoder(nn.Module):
    """(B, 3, H, W) -> moments (B, 2c, H/f, W/f)."""

    def __init__(self, channels, widths, layers, mid_layers, norm, resizer, kind):
        super().__init__()
        last = len(widths) - 1
        self.conv_in = nn.Conv2d(3, widths[0], 3, padding=1)
        self.down_blocks = nn.ModuleList()
        for i, width in enumerate(widths):
            into = width if resizer != "sd" or i == 0 else widths[i - 1]
            after = None if i == last else Down(width, widths[i + 1] if resizer != "sd" else width, resizer)
            self.down_blocks.append(Blocks(into, width, layers, norm, kind, downsampler=after))
        self.mid_block = Blocks(widths[-1], widths[-1], mid_layers, norm, kind)
        self.conv_out = nn.Conv2d(widths[-1], 2 * channels, 3, padding=1)

    def forward(self, x):
        x = self.conv_in(x)
        for block in self.down_blocks:
            x = block(x)
        return self.conv_out(self.mid_block(x))


class Decoder(nn.Module):
    """(B, c, h, w) -> (B, 3, f h, f w); one more block per level than the encoder, no norm before conv_out."""

    def __init__(self, channels, widths, layers, mid_layers, norm, resizer, kind):
        super().__init__()
        widths = tuple(reversed(widths))
        self.conv_in = nn.Conv2d(channels, widths[0], 3, padding=1)
        self.mid_block = Blocks(widths[0], widths[0], mid_layers, norm, kind)
        self.up_blocks = nn.ModuleList()
        for i, width in enumerate(widths):
            into = width if resizer != "sd" or i == 0 else widths[i - 1]
            to = width if resizer == "sd" else widths[min(i + 1, len(widths) - 1)]
            after = None if i == len(widths) - 1 else Up(width, to, resizer)
            self.up_blocks.append(Blocks(into, width, layers + 1, norm, kind, upsampler=after))
        self.conv_out = nn.Conv2d(widths[-1], 3, 3, padding=1)

    def forward(self, z):
        z = self.mid_block(self.conv_in(z))
        for block in self.up_blocks:
            z = block(z)
        return self.conv_out(z)


class SimVAE(nn.Module):
    """The paper's autoencoder [sec. 4.1]: (B, 3, H, W) in [-1, 1] <-> latents (B, c, H/f, W/f), f = 2^(levels - 1).

    Parameter names and, by default, sizes are those of the release: 91,030,595 parameters at c = 32, 90,809,379 at 16.
    norm, resizer, block undo the paper's changes to SD-VAE; "- 3x3 conv" of Table 2, SD-VAE's attention in the middle,
    has no switch: `mid_layers` blocks stand there.
    """

    def __init__(self, latent_channels=32, widths=(128, 256, 512, 512), layers=2, mid_layers=3, norm="layer",
                 resizer="sim", block="sim"):
        super().__init__()
        sizes = (latent_channels, tuple(widths), layers, mid_layers, norm, resizer, block)
        self.encoder, self.decoder = Encoder(*sizes), Decoder(*sizes)
        self.factor, self.widths = 2 ** (len(widths) - 1), tuple(widths)
        self.layers, self.mid_layers = layers, mid_layers

    def encode(self, x):
        """-> mean, logvar (B, c, h, w) of q(z | x); logvar within [-30, 20]."""
        with not_half(x):
            mean, logvar = self.encoder(x.float()).chunk(2, dim=1)
        return mean, logvar.clamp(-30, 20)

    def decode(self, z):
        """-> (B, 3, H, W), not clamped."""
        with not_half(z):
            return self.decoder(z.float())

    def decode_tiled(self, z, memory_gb: float):
        """`decode` in tiles that need about memory_gb. Exact: a tile sees all the latents that can reach its pixels.

        UserError with GroupNorm, whose statistics are of the whole picture, and where memory_gb is too little.
        """
        if any(isinstance(layer, nn.GroupNorm) for layer in self.modules()):
            raise UserError("--vae_memory_gb: GroupNorm sees the whole picture, tiles would change it; leave it out")
        halo = math.ceil(self.reach())
        # The widest moment: about five activations of widths[0] channels at full resolution.
        per_pixel = 5 * self.widths[0] * z.element_size() * len(z) / 2 ** 30
        tile = int(math.sqrt(memory_gb / per_pixel) / self.factor) - 2 * halo
        if tile < 1:
            least = per_pixel * (self.factor * (2 * halo + 4)) ** 2
            raise UserError(f"--vae_memory_gb {memory_gb}: too little for one tile; give at least {least:.2f}")
        f, (height, width) = self.factor, z.shape[-2:]
        rows = []
        for y in range(0, height, tile):
            row = []
            for x in range(0, width, tile):
                top, left = max(0, y - halo), max(0, x - halo)
                piece = self.decode(z[..., top:y + tile + halo, left:x + tile + halo])
                row.append(piece[..., (y - top) * f:(y - top + tile) * f, (x - left) * f:(x - left + tile) * f])
            rows.append(torch.cat(row, dim=-1))
        return torch.cat(rows, dim=-2)

    def reach(self) -> float:
        """Radius of the decoder's receptive field in latents: one per 3x3 convolution, halved at each doubling."""
        radius = 1.0 + 2 * self.mid_layers
        for level in range(len(self.widths)):
            radius += (2 * (self.layers + 1) + 1) / 2 ** level  # of the blocks and the resizer (or conv_out)
        return radius


# ------------------------------------------------------------------------------------------------ model: SwinIR


def shifted_window_mask(height: int, width: int, window: int, shift: int) -> torch.Tensor:
    """(windows, window^2, window^2): -100 where a rolled window joins two sides of the picture, else 0 [Swin]."""
    region = lambda n: (torch.arange(n) >= n - window).long() + (torch.arange(n) >= n - shift).long()
    label = 3 * region(height)[:, None] + region(width)[None]
    label = label.view(height // window, window, width // window, window).transpose(1, 2).reshape(-1, window ** 2)
    return (label[:, None] != label[:, :, None]).float() * -100.0


class WindowAttention(nn.Module):
    """Attention inside windows of window x window tokens with a learned bias per relative position."""

    def __init__(self, dim: int, window: int, heads: int):
        super().__init__()
        self.heads = heads
        self.relative_position_bias_table = nn.Parameter(torch.zeros((2 * window - 1) ** 2, heads))
        nn.init.trunc_normal_(self.relative_position_bias_table, std=0.02)
        place = torch.stack(torch.meshgrid(torch.arange(window), torch.arange(window), indexing="ij"), -1).view(-1, 2)
        offset = place[:, None] - place[None] + window - 1        # (w^2, w^2, 2)
        self.register_buffer("relative_position_index", offset[..., 0] * (2 * window - 1) + offset[..., 1])
        self.qkv, self.proj = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)

    def forward(self, x, mask):  # (B * windows, w^2, C), (windows, w^2, w^2) or None
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)  # 3 x (B W, heads, w^2, d)
        bias = self.relative_position_bias_table[self.relative_position_index].permute(2, 0, 1)  # (heads, w^2, w^2)
        # By hand: the fused kernels have no fast gradient for a learned bias.
        logits = (q * q.shape[-1] ** -0.5) @ k.transpose(-2, -1) + bias.to(q.dtype)
        if mask is not None:
            # Not added: exp(-100) is a denormal number, and slow on some processors.
            logits = logits.unflatten(0, (-1, len(mask))).masked_fill(mask[:, None] < 0, -math.inf).flatten(0, 1)
        x = logits.softmax(dim=-1) @ v
        return self.proj(x.transpose(1, 2).flatten(2))


class SwinLayer(nn.Module):
    """Window attention (every second layer on windows shifted by half) and an MLP, both pre-norm."""

    def __init__(self, dim, heads, window, shift, mlp_ratio, tokens, drop):
        super().__init__()
        self.window, self.shift, self.drop, self.tokens = window, shift, drop, tokens
        self.norm1, self.attn, self.norm2 = nn.LayerNorm(dim), WindowAttention(dim, window, heads), nn.LayerNorm(dim)
        hidden = int(dim * mlp_ratio)
        self.mlp = nn.ModuleDict(dict(fc1=nn.Linear(dim, hidden), fc2=nn.Linear(hidden, dim)))
        if shift:  # the released files carry the mask of the training size
            self.register_buffer("attn_mask", shifted_window_mask(tokens, tokens, window, shift))

    def residual(self, x):
        """Stochastic depth: in training a sample skips the branch with probability `drop`."""
        if not self.training or self.drop == 0:
            return x
        keep = torch.rand(len(x), 1, 1, device=x.device) >= self.drop
        return x * keep / (1 - self.drop)

    def forward(self, x, height, width):  # (B, H W, C)
        w, mask = self.window, None
        h = self.norm1(x).unflatten(1, (height, width))
        if self.shift:
            h = h.roll((-self.shift, -self.shift), (1, 2))
            mask = self.attn_mask
            if (height, width) != (self.tokens, self.tokens):
                mask = shifted_window_mask(height, width, w, self.shift).to(x.device)
        h = h.unflatten(2, (-1, w)).unflatten(1, (-1, w)).transpose(2, 3)                    # (B, H/w, W/w, w, w, C)
        shape = h.shape
        h = self.attn(h.flatten(3, 4).flatten(0, 2), mask).view(shape).transpose(2, 3).flatten(3, 4).flatten(1, 2)
        if self.shift:
            h = h.roll((self.shift, self.shift), (1, 2))
        x = x + self.residual(h.flatten(1, 2))
        return x + self.residual(self.mlp.fc2(F.gelu(self.mlp.fc1(self.norm2(x)))))


class SwinGroup(nn.Module):
    """Residual group: Swin layers, then a 3x3 convolution, added to the input (RSTB of SwinIR)."""

    def __init__(self, dim, depth, heads, window, mlp_ratio, tokens, drops):
        super().__init__()
        shifts = [window // 2 * (i % 2) for i in range(depth)]
        layers = [SwinLayer(dim, heads, window, shift, mlp_ratio, tokens, drop) for shift, drop in zip(shifts, drops)]
        self.residual_group = nn.ModuleDict(dict(blocks=nn.ModuleList(layers)))
        self.conv = nn.Conv2d(dim, dim, 3, padding=1)

    def forward(self, x, height, width):  # (B, H W, C)
        h = x
        for layer in self.residual_group.blocks:
            h = layer(h, height, width)
        return x + self.conv(h.transpose(1, 2).unflatten(2, (height, width))).flatten(2).transpose(1, 2)


class SwinIR(nn.Module):
    """The posterior-mean predictor: (B, 3, H, W) in [0, 1] -> the same, not clipped.

    Any size that is more than half of a window (8 x unshuffle pixels).

    Default: DifFace's SwinIR-L (15,792,587 parameters, its names). PMRF's "swinir_M": dim=120, depths=(6,) * 5.
    `latent_channels` > 0 predicts latents at 1 / unshuffle of the resolution instead (option 1 of sec. 3.2). `residual`
    adds the input to the output and starts there, as SwinIR does for denoising.
    DIFFERS: DifFace's weights were trained with L1, so they are nearer to a median; stage `mmse` minimises the squares.
    """

    def __init__(self, dim=180, depths=(6,) * 8, heads=6, window=8, mlp_ratio=2, unshuffle=8, features=64, tokens=64,
                 drop_path=0.1, latent_channels=0, residual=False):
        super().__init__()
        self.window, self.unshuffle, self.latent_channels, self.residual = window, unshuffle, latent_channels, residual
        self.register_buffer("mean", torch.tensor([0.4488, 0.4371, 0.4040]).view(1, 3, 1, 1), persistent=False)
        self.conv_first = nn.Sequential(nn.PixelUnshuffle(unshuffle), nn.Conv2d(3 * unshuffle ** 2, dim, 3, padding=1))
        self.patch_embed = nn.ModuleDict(dict(norm=nn.LayerNorm(dim)))
        drops = [drop_path * i / max(1, sum(depths) - 1) for i in range(sum(depths))]
        self.layers = nn.ModuleList(SwinGroup(dim, depth, heads, window, mlp_ratio, tokens, drops[sum(depths[:i]):])
                                    for i, depth in enumerate(depths))
        self.norm = nn.LayerNorm(dim)
        self.conv_after_body = nn.Conv2d(dim, dim, 3, padding=1)
        self.conv_before_upsample = nn.Sequential(nn.Conv2d(dim, features, 3, padding=1), nn.LeakyReLU())
        self.doublings = 0 if latent_channels else int(math.log2(unshuffle))
        for i in range(self.doublings):
            setattr(self, f"conv_up{i + 1}", nn.Conv2d(features, features, 3, padding=1))
        self.conv_hr = nn.Conv2d(features, features, 3, padding=1)
        self.conv_last = nn.Conv2d(features, latent_channels or 3, 3, padding=1)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                nn.init.zeros_(module.bias)
        if residual:
            zeroed(self.conv_last)
            nn.init.zeros_(self.conv_last.bias)

    def forward(self, x):
        given, (height, width) = x, x.shape[-2:]
        step = self.window * self.unshuffle
        x = F.pad(x, (0, -width % step, 0, -height % step), mode="reflect") if height % step or width % step else x
        shallow = self.conv_first(x - self.mean)                                             # (B, dim, h, w)
        h, w = shallow.shape[-2:]
        deep = self.patch_embed.norm(shallow.flatten(2).transpose(1, 2))                     # (B, h w, dim)
        for layer in self.layers:
            deep = layer(deep, h, w)
        deep = self.norm(deep).transpose(1, 2).unflatten(2, (h, w))
        x = self.conv_before_upsample(self.conv_after_body(deep) + shallow)
        for i in range(self.doublings):
            x = F.leaky_relu(getattr(self, f"conv_up{i + 1}")(F.interpolate(x, scale_factor=2.0, mode="nearest")), 0.2)
        x = self.conv_last(F.leaky_relu(self.conv_hr(x), 0.2))
        if self.latent_channels:
            return x
        return x[..., :height, :width] + (given if self.residual else self.mean)


# ------------------------------------------------------------------------------------------------ model: HDiT


@functools.lru_cache(maxsize=32)
@torch.inference_mode(False)  # one call inside inference mode must not spoil a training that follows
def neighborhood_tiles(height: int, width: int, kernel: int, device: torch.device, tile: int = 8):
    """Which keys a tile of queries needs: query index (n, t^2), key index (n, r^2), mask (n, t^2, r^2), place (H W,).

    The windows of t x t queries lie inside one region of r x r = (t + kernel - 1)^2 keys, cut off at the border.
    """
    axes, count = [], functools.partial(torch.arange, device=device)
    for length in (height, width):
        t, r = min(tile, length), min(tile + kernel - 1, length)
        queries = (count(0, length, t)[:, None] + count(t)).clamp(max=length - 1)                        # (tiles, t)
        keys = (queries[:, :1] - kernel // 2).clamp(0, length - r) + count(r)                            # (tiles, r)
        start = (queries - kernel // 2).clamp(0, length - kernel)  # the window shifts at a border, it never shrinks
        inside = (keys[:, None] >= start[..., None]) & (keys[:, None] < start[..., None] + kernel)       # (tiles, t, r)
        axes.append((queries, keys, inside))
    (qy, ky, my), (qx, kx, mx) = axes
    flat = lambda y, x: (y[:, None, :, None] * width + x[None, :, None, :]).flatten(2).flatten(0, 1)
    mask = (my[:, None, :, None, :, None] & mx[None, :, None, :, None, :]).flatten(4).flatten(2, 3).flatten(0, 1)
    # Where each token's answer stands; tiles that hang over the edge repeat its last queries, which nobody reads.
    ty, (tiles_x, tx) = qy.shape[1], qx.shape
    y, x = torch.meshgrid(count(height), count(width), indexing="ij")
    place = ((y // ty) * tiles_x + x // tx) * (ty * tx) + (y % ty) * tx + x % tx
    return flat(qy, qx), flat(ky, kx), mask, place.flatten()


def neighborhood_attention(q, k, v, height: int, width: int, kernel_size: int = 7, scale: float | None = None):
    """Each query attends to the kernel_size x kernel_size keys around it; at a border the window shifts in [NATTEN].

    q, k, v (B, heads, H * W, head_dim), row-major -> the same shape. Plain PyTorch: tiles of 8 x 8 queries share the
    region of keys they need, so memory grows with H * W, not its square, and the fused attention kernels still apply.
    Raises ValueError if the grid is smaller than the window or the window is even.
    """
    if kernel_size % 2 == 0 or kernel_size > min(height, width) or q.shape[-2] != height * width:
        raise ValueError(f"neighborhood_attention: window {kernel_size} must be odd and fit the {height}x{width} grid "
                         f"of {q.shape[-2]} tokens")
    batch, heads, _, dim = q.shape
    query, key, mask, place = neighborhood_tiles(height, width, kernel_size, q.device)
    gather = lambda x, index: x.flatten(0, 1)[:, index].flatten(0, 1)[:, None]  # (B heads n, 1, tokens, dim)
    out = F.scaled_dot_product_attention(gather(q, query), gather(k, key), gather(v, key),
                                         attn_mask=mask.repeat(batch * heads, 1, 1)[:, None], scale=scale)
    return out.view(batch, heads, -1, dim)[:, :, place]


def rms_norm(x, scale, eps: float = 1e-6):
    """x / rms(x) * scale over the last axis, in float32 or better."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    return x * (scale.to(wide.dtype) * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)).to(x.dtype)


def geglu(x):
    """(..., 2 D) -> value * GELU(gate), (..., D)."""
    value, gate = x.chunk(2, dim=-1)
    return value * F.gelu(gate)


def axial_positions(height: int, width: int, device=None):
    """(H * W, 2) centres (y, x) of the cells; the long side spans [-1, 1]."""
    longest = max(height, width)
    y, x = [(torch.arange(n, device=device) * 2 + 1 - n) / longest for n in (height, width)]
    return torch.stack(torch.meshgrid(y, x, indexing="ij"), dim=-1).flatten(0, 1)


def apply_rope(x, theta):
    """Rotate pairs (x_i, x_{i + d}), d = theta.shape[-1], by their angles; the rest stays. x (B, heads, N, dim)."""
    d = theta.shape[-1]
    a, b, rest = x[..., :d], x[..., d:2 * d], x[..., 2 * d:]
    cos, sin = theta.cos().to(x.dtype), theta.sin().to(x.dtype)
    return torch.cat([a * cos - b * sin, b * cos + a * sin, rest], dim=-1)


class RMSNorm(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(width))

    def forward(self, x):
        return rms_norm(x, self.scale)


class AdaRMSNorm(nn.Module):
    """RMSNorm whose scale is 1 + W c, W = 0 at the start: only scale, no shift, no gate."""

    def __init__(self, width: int, cond: int):
        super().__init__()
        self.linear = zeroed(nn.Linear(cond, width, bias=False))

    def forward(self, x, c):  # (B, N, D), (B, T)
        return rms_norm(x, self.linear(c)[:, None] + 1)


class GEGLU(nn.Linear):
    def __init__(self, width: int, out: int):
        super().__init__(width, 2 * out, bias=False)

    def forward(self, x):
        return geglu(super().forward(x))


class FourierFeatures(nn.Module):
    """[cos 2 pi W x, sin 2 pi W x] with a fixed random W, which is part of the weights."""

    def __init__(self, inputs: int, width: int):
        super().__init__()
        self.register_buffer("weight", torch.randn(width // 2, inputs))

    def forward(self, x):
        f = 2 * math.pi * (x[..., None, :] * self.weight).sum(-1)  # not @, which autocast would round to bf16
        return torch.cat([f.cos(), f.sin()], dim=-1)


class DepthwiseConv(nn.Conv2d):
    """3x3 depth-wise convolution over tokens (B, H W, C) [sec. 6.1]; starts as the identity.

    DIFFERS: the authors start it at random; from the identity the switch changes nothing at the first step.
    """

    def __init__(self, channels: int):
        super().__init__(channels, channels, 3, padding=1, groups=channels)
        nn.init.dirac_(self.weight, groups=channels)
        nn.init.zeros_(self.bias)

    def forward(self, x, grid):
        return super().forward(x.transpose(1, 2).unflatten(2, grid)).flatten(2).transpose(1, 2)


class SelfAttention(nn.Module):
    """Cosine-similarity attention with a learned scale per head and axial rotary positions; `kernel` 0 is global."""

    def __init__(self, width, cond, head_dim, kernel, depthwise):
        super().__init__()
        self.heads, self.kernel = width // head_dim, kernel
        self.norm = AdaRMSNorm(width, cond)
        self.qkv_proj = nn.Linear(width, 3 * width, bias=False)
        if depthwise:
            self.dwconv = DepthwiseConv(3 * width)
        self.scale = nn.Parameter(torch.full((self.heads,), 10.0))
        self.pos_emb = nn.Module()
        angles = head_dim // 8  # half of a head is rotated; a quarter for each of y and x
        freqs = torch.linspace(math.log(math.pi), math.log(10 * math.pi), self.heads * angles + 1)[:-1].exp()
        self.pos_emb.register_buffer("freqs", freqs.view(angles, self.heads).T.contiguous())
        self.out_proj = zeroed(nn.Linear(width, width, bias=False))

    def angles(self, positions):  # (N, 2) -> (heads, N, 2 * angles)
        return (positions[None, :, :, None] * self.pos_emb.freqs[:, None, None]).flatten(2)

    def forward(self, x, c, positions, grid):  # (B, N, D)
        qkv = self.qkv_proj(self.norm(x, c))
        qkv = self.dwconv(qkv, grid) if hasattr(self, "dwconv") else qkv
        q, k, v = qkv.unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)  # 3 x (B, heads, N, D / heads)
        theta, root = self.angles(positions), self.scale.float().sqrt()[:, None, None]
        unit = lambda u: u * (root * torch.rsqrt(u.float().square().sum(-1, keepdim=True) + 1e-6)).to(u.dtype)
        q, k = apply_rope(unit(q), theta), apply_rope(unit(k), theta)
        if self.kernel:
            out = neighborhood_attention(q, k, v, *grid, kernel_size=self.kernel, scale=1.0)
        else:
            out = F.scaled_dot_product_attention(q, k, v, scale=1.0)
        return x + self.out_proj(out.transpose(1, 2).flatten(2))


class FeedForward(nn.Module):
    """Adaptive norm, GEGLU of width d_ff, back."""

    def __init__(self, width, d_ff, cond, depthwise):
        super().__init__()
        self.norm, self.up_proj = AdaRMSNorm(width, cond), GEGLU(width, d_ff)
        if depthwise:
            self.dwconv = DepthwiseConv(2 * d_ff)
        self.down_proj = zeroed(nn.Linear(d_ff, width, bias=False))

    def forward(self, x, c, grid):
        h = self.norm(x, c)
        if hasattr(self, "dwconv"):
            return x + self.down_proj(geglu(self.dwconv(F.linear(h, self.up_proj.weight), grid)))
        return x + self.down_proj(self.up_proj(h))


class HDiTLayer(nn.Module):
    def __init__(self, width, d_ff, cond, head_dim, kernel, depthwise):
        super().__init__()
        self.self_attn = SelfAttention(width, cond, head_dim, kernel, depthwise)
        self.ff = FeedForward(width, d_ff, cond, depthwise)

    def forward(self, x, c, positions, grid):
        return self.ff(self.self_attn(x, c, positions, grid), c, grid)


class MappingBlock(nn.Module):
    def __init__(self, width: int, d_ff: int):
        super().__init__()
        self.norm, self.up_proj = RMSNorm(width), GEGLU(width, d_ff)
        self.down_proj = zeroed(nn.Linear(d_ff, width, bias=False))

    def forward(self, x):
        return x + self.down_proj(self.up_proj(self.norm(x)))


class Mapping(nn.Module):
    """From time features to the condition c of all adaptive norms."""

    def __init__(self, width: int, depth: int):
        super().__init__()
        self.in_norm = RMSNorm(width)                              # in k-diffusion's order: PMRF's averages are a list
        self.blocks = nn.ModuleList(MappingBlock(width, 3 * width) for _ in range(depth))
        self.out_norm = RMSNorm(width)

    def forward(self, x):
        x = self.in_norm(x)
        for block in self.blocks:
            x = block(x)
        return self.out_norm(x)


class Merge(nn.Module):
    """p x p tokens -> one: space to depth, then linear."""

    def __init__(self, width: int, out: int, patch: int = 2):
        super().__init__()
        self.patch, self.proj = patch, nn.Linear(width * patch ** 2, out, bias=False)

    def forward(self, x, grid):  # (B, H W, C) -> (B, H/p W/p, out)
        p = self.patch
        x = x.unflatten(1, (grid[0] // p, p, grid[1] // p, p)).transpose(2, 3)               # (B, H/p, W/p, p, p, C)
        return self.proj(x.flatten(3).flatten(1, 2))


class Split(nn.Module):
    """One token -> p x p: linear, then depth to space; with `skip`, mixed into it by a learned share."""

    def __init__(self, width: int, out: int, patch: int = 2, skip: bool = True):
        super().__init__()
        self.patch, self.proj = patch, nn.Linear(width, out * patch ** 2, bias=False)
        if skip:
            self.fac = nn.Parameter(torch.full((1,), 0.5))

    def forward(self, x, grid, skip=None):  # grid of x
        p = self.patch
        x = self.proj(x).unflatten(2, (p, p, -1)).unflatten(1, grid).transpose(2, 3)         # (B, H, p, W, p, out)
        x = x.flatten(1, 4)
        return x if skip is None else torch.lerp(skip, x, self.fac.to(x.dtype))


def zeroed(layer):
    nn.init.zeros_(layer.weight)
    return layer


class HDiT(nn.Module):
    """Hourglass diffusion transformer: velocity of x (B, C, H, W) at time t (B,), same shape [arXiv 2401.11605; PMRF].

    Level i works on tokens of 2^i x 2^i patches; all levels but the last attend to `kernel` x `kernel` neighbourhoods,
    the last to everything. Names are k-diffusion's, as PMRF releases them: HDiT(**HDIT_PMRF) has 160,460,210
    parameters. DIFFERS: this is the HDiT that the paper cites, with depth-wise convolutions as a switch: 147.83 M at
    the paper's sizes, 151.2 M are printed. The authors' latent network (LooUFormer, published without weights) has dot
    products, biases, no zero-initialised output, GELU on the first half and convolutions that resize: 153.98 M.
    """

    def __init__(self, in_channels=3, widths=(256, 512, 1024), depths=(2, 2, 8), patch=4, head_dim=64,
                 mapping_width=768, mapping_depth=2, kernel=7, depthwise=False):
        super().__init__()
        self.patch, self.gradient_checkpointing = patch, False
        self.patch_in = Merge(in_channels, widths[0], patch)
        self.time_emb = FourierFeatures(1, mapping_width)
        self.time_in_proj = nn.Linear(mapping_width, mapping_width, bias=False)
        self.aug_emb = FourierFeatures(9, mapping_width)  # k-diffusion's augmentation input, here always zero
        self.aug_in_proj = nn.Linear(mapping_width, mapping_width, bias=False)
        self.mapping = Mapping(mapping_width, mapping_depth)
        layer = lambda w, k: HDiTLayer(w, 3 * w, mapping_width, head_dim, k, depthwise)
        level = lambda i, k: nn.ModuleList(layer(widths[i], k) for _ in range(depths[i]))
        fine = range(len(widths) - 1)
        self.down_levels = nn.ModuleList(level(i, kernel) for i in fine)
        self.up_levels = nn.ModuleList(level(i, kernel) for i in fine)
        self.mid_level = level(len(widths) - 1, 0)
        self.merges = nn.ModuleList(Merge(widths[i], widths[i + 1]) for i in fine)
        self.splits = nn.ModuleList(Split(widths[i + 1], widths[i]) for i in fine)
        self.out_norm = RMSNorm(widths[0])
        self.patch_out = Split(widths[0], in_channels, patch, skip=False)
        zeroed(self.patch_out.proj)

    def condition(self, t):  # (B,) -> (B, T); t is fed raw, as PMRF does (k-diffusion feeds log(sigma) / 4)
        constant = self.aug_in_proj(self.aug_emb(t.new_zeros(len(t), 9)))
        return self.mapping(self.time_in_proj(self.time_emb(t[:, None])) + constant)

    def forward(self, x, t):
        side = self.patch * 2 ** len(self.merges)
        if x.shape[-2] % side or x.shape[-1] % side:
            raise ValueError(f"HDiT wants sides that are multiples of {side}, got {tuple(x.shape[-2:])}")
        shape, grid, c = x.shape, tuple(x.shape[-2:]), self.condition(t)
        x = self.patch_in(x.flatten(2).transpose(1, 2), grid)                                # (B, N, widths[0])
        grid = (grid[0] // self.patch, grid[1] // self.patch)
        skips = []
        for level, merge in zip(self.down_levels, self.merges):
            x = self.run_level(level, x, c, grid)
            skips.append(x)
            x, grid = merge(x, grid), (grid[0] // 2, grid[1] // 2)
        x = self.run_level(self.mid_level, x, c, grid)
        for level, split, skip in reversed(list(zip(self.up_levels, self.splits, skips))):
            x, grid = split(x, grid, skip), (grid[0] * 2, grid[1] * 2)
            x = self.run_level(level, x, c, grid)
        x = self.patch_out(self.out_norm(x), grid)  # (B, H * W * C), pixels row by row
        return x.view(shape[0], *shape[-2:], shape[1]).movedim(-1, 1)

    def run_level(self, level, x, c, grid):
        positions = axial_positions(*grid, device=x.device)       # cell centres: the mean of the 2 x 2 finer ones
        recompute = self.gradient_checkpointing and torch.is_grad_enabled()
        for layer in level:
            x = checkpoint(layer, x, c, positions, grid, use_reentrant=False) if recompute else \
                layer(x, c, positions, grid)
        return x


# ------------------------------------------------------------------------------------------------ losses


def kl_divergence(mean, logvar):
    """KL(N(mean, exp(logvar)) || N(0, 1)), summed over a latent (C, H, W), averaged over the batch."""
    return 0.5 * (mean.square() + logvar.exp() - 1 - logvar).flatten(1).sum(1).mean()


def vae_loss(reconstruction, hq, mean, logvar, perceptual, perceptual_weight, kl_weight):
    """[Eq. 6]: L1 + perceptual + KL, no discriminator. Returns (total, {name: value})."""
    l1, likeness, kl = (reconstruction - hq).abs().mean(), perceptual(reconstruction, hq), kl_divergence(mean, logvar)
    return l1 + perceptual_weight * likeness + kl_weight * kl, dict(l1=l1, perceptual=likeness, kl=kl)


class VGGLoss(nn.Module):
    """Weighted L1 between VGG19 features before their ReLU; a, b (B, 3, H, W) in [-1, 1] [Real-ESRGAN's layers]."""

    LAYERS = {2: 0.1, 7: 0.1, 16: 1.0, 25: 1.0, 34: 1.0}          # conv1_2, conv2_2, conv3_4, conv4_4, conv5_4

    def __init__(self, weights: str = "", pretrained: bool = True):
        super().__init__()
        from torchvision.models import VGG19_Weights, vgg19
        try:
            network = vgg19(weights=VGG19_Weights.IMAGENET1K_V1 if pretrained and not weights else None)
        except Exception as error:  # no network: urllib, ssl and timeouts each have their own
            raise UserError(f"torchvision cannot fetch vgg19 ({type(error).__name__}); give the file with --vgg, or "
                            "--perceptual reader") from None
        if weights:
            load_strict(network, read_weights(weights), f"--vgg {weights}")
        self.features = network.features[:35].eval().requires_grad_(False)
        self.register_buffer("mean", torch.tensor([0.485, 0.456, 0.406]).view(1, 3, 1, 1))
        self.register_buffer("std", torch.tensor([0.229, 0.224, 0.225]).view(1, 3, 1, 1))

    def stages(self, x):
        x, found = (x * 0.5 + 0.5 - self.mean) / self.std, []
        for i, layer in enumerate(self.features):
            x = F.relu(x) if isinstance(layer, nn.ReLU) else layer(x)  # not in place: the features before it are kept
            if i in self.LAYERS:
                found.append(x)
        return found

    def forward(self, a, b):
        with torch.no_grad():
            target = self.stages(b)
        return sum(w * (x - y).abs().mean() for w, x, y in zip(self.LAYERS.values(), self.stages(a), target))


def mmse_loss(estimate, hq):
    """Mean squared error in [0, 1], whose minimiser is the posterior mean; clipping is part of the network."""
    return (estimate.clamp(0, 1) - hq).square().mean()


def interpolate(z0, z1, t):
    """z_t = (1 - t) z0 + t z1 [Figure 2]; t (B,), 0 the source, 1 clean. DIFFERS: the authors' code reverses t."""
    t = t.view(-1, *[1] * (z0.dim() - 1))
    return (1 - t) * z0 + t * z1


def cfm_loss(velocity, z0, z1, t):
    """E || v(z_t, t) - (z1 - z0) ||^2 [Eq. 3; Eq. 5 in latents]: z1 - z0 is the velocity of the line [Eq. 2].

    A mean over all elements. velocity(z, t) is any callable.
    """
    return (velocity(interpolate(z0, z1, t), t) - (z1 - z0)).square().mean()


def stratified_time(batch: int, rank: int = 0, world: int = 1, generator=None):
    """(B,) times in [0, 1), one in each of batch * world strata, dealt to the processes in turn. UNSTATED: as PMRF."""
    stratum = torch.arange(batch) * world + rank
    return ((stratum + torch.rand(batch, generator=generator)) / (batch * world)).clamp(max=1 - 1e-7)


# ------------------------------------------------------------------------------------------------ sampler


@torch.no_grad()
def euler_sample(velocity, z0, steps: int = 25):
    """Integrate dz/dt = v(z, t) from t = 0 to 1 with `steps` equal Euler steps; v is never asked at t = 1 [Eq. 1]."""
    z = z0
    for i in range(steps):
        z = z + velocity(z, z.new_full((len(z),), i / steps)) / steps
    return z


def posterior_mean(mmse, lq):
    """x_hat = clip(f(y)): (B, 3, S, S) in [-1, 1] both ways, while the network works in [0, 1]."""
    return mmse(lq * 0.5 + 0.5).clamp(0, 1) * 2 - 1


def latent_source(vae, estimate, sample: bool, noise):
    """z_0 = E(x_hat) [Eq. 4, option 2]. Its error is the autoencoder's: D(z_0) - x_hat is reconstruction error.

    UNSTATED: the authors draw from q(z | x_hat) and add noise of std 0.1 (`source_noise`); the paper says E(x_hat).
    """
    mean, logvar = vae.encode(estimate)
    return mean + (0.5 * logvar).exp() * noise(mean) if sample else mean


def flow_source(nets, cfg, lq, noise):
    """z0 before its noise, and the estimate (B, 3, S, S) it comes from, None where there is none in pixels.

    `noise(like)` draws N(0, 1).
    """
    if cfg.space == "pixel":                                      # PMRF: the flow runs on pixels in [0, 1]
        estimate = posterior_mean(nets["mmse"], lq)
        return estimate * 0.5 + 0.5, estimate
    if cfg.source == "latent_mean":  # [Eq. 4, option 1]: E[Z_1 | y] from a network trained on latents
        return nets["mmse"](lq * 0.5 + 0.5), None
    estimate = posterior_mean(nets["mmse"], lq)
    return latent_source(nets["vae"], estimate, cfg.source_sample, noise), estimate


@torch.no_grad()
def restore(nets, cfg, lq, noise, steps: int, decode=None):
    """lq (B, 3, S, S) in [-1, 1] -> {"restored_faces", "posterior_mean"}, the same shape, clipped."""
    decode = decode or ("vae" in nets and nets["vae"].decode)
    z0, estimate = flow_source(nets, cfg, lq, noise)
    estimate = decode(z0) if estimate is None else estimate
    z0 = z0.float()                                                # the state stays float32 under autocast
    z1 = euler_sample(nets["flow"], z0 + cfg.source_noise * noise(z0), steps)
    restored = z1 * 2 - 1 if cfg.space == "pixel" else decode(z1)
    return {"restored_faces": restored.float().clamp(-1, 1), "posterior_mean": estimate.float().clamp(-1, 1)}


# ------------------------------------------------------------------------------------------------ networks, weights


def build(cfg, part: str) -> nn.Module:
    """The network of one part, with the sizes of a `Train` configuration."""
    if part == "vae":
        return SimVAE(cfg.latent_channels, cfg.vae_widths, norm=cfg.vae_norm, resizer=cfg.vae_resizer,
                      block=cfg.vae_block)
    if part == "mmse":
        predicts = cfg.latent_channels if cfg.source == "latent_mean" else 0
        return SwinIR(cfg.mmse_dim, cfg.mmse_depths, cfg.mmse_heads, unshuffle=cfg.mmse_unshuffle,
                      features=cfg.mmse_features, tokens=cfg.image_size // cfg.mmse_unshuffle,
                      drop_path=cfg.mmse_drop_path, latent_channels=predicts,
                      residual=cfg.mmse_residual and not predicts)
    sizes, depthwise = (cfg.latent_channels, cfg.flow_widths, cfg.flow_depths, cfg.flow_patch), cfg.depthwise
    if cfg.space == "pixel":                                      # PMRF's network
        sizes, depthwise = (3, cfg.flow_widths, cfg.pixel_depths, cfg.pixel_patch), False
    return HDiT(*sizes, cfg.head_dim, cfg.mapping_width, kernel=cfg.neighborhood, depthwise=depthwise)


def load_sim_vae(where: str) -> SimVAE:
    """The released Sim-VAE: a diffusers folder, its safetensors file, or a hub id. Sizes are read off the weights."""
    path = find_checkpoint(where, "vae")
    if path.is_dir():
        files = sorted(path.glob("*.safetensors")) or sorted(path.glob("*.bin"))
        if not files:
            raise UserError(f"--vae {where}: no .safetensors file in this folder")
        path = files[0]
    # Some files store norms as (1, C, 1, 1).
    state = {n: t.flatten() if ".norm." in n else t for n, t in read_weights(path).items()}
    if "decoder.conv_in.weight" not in state:
        raise UserError(f"--vae {where}: not a Sim-VAE (no decoder.conv_in.weight in it)")
    count = lambda pattern: len([n for n in state if n.startswith(pattern) and n.endswith("conv1.weight")])
    first = [f"encoder.down_blocks.{i}.resnets.0.conv1.weight" for i in range(16)]
    widths = [state[name].shape[1] for name in first if name in state]
    channels = state["decoder.conv_in.weight"].shape[1]
    vae = SimVAE(channels, widths, count("encoder.down_blocks.0."), count("encoder.mid_block."))
    load_strict(vae, state, f"--vae {where}")
    return vae


def load_pmrf(where: Path) -> dict:
    """PMRF's released blind-face model: `model.*` is the flow on pixels, `mmse_model.*` the SwinIR.

    A Lightning file also holds the averaged weights of the flow, a list in the order of its parameters: they are used.
    """
    kinds = ("*.safetensors", "*.bin", "*.ckpt")
    files = [where] if where.is_file() else [file for kind in kinds for file in sorted(where.glob(kind))]
    if not files:
        raise UserError(f"--checkpoint {where}: no weights in this folder")
    raw = read_torch(files[0]) if files[0].suffix == ".ckpt" else {}
    state = raw["state_dict"] if "state_dict" in raw else read_weights(files[0])
    nets = {"flow": HDiT(**HDIT_PMRF), "mmse": SwinIR()}
    for part, prefix in (("flow", "model."), ("mmse", "mmse_model.")):
        own = {n.removeprefix(prefix): t for n, t in state.items() if n.startswith(prefix)}
        load_strict(nets[part], own, f"--checkpoint {where}, {prefix}*")
    average = raw.get("ema")
    average = average.get("shadow_params") if isinstance(average, dict) else average
    own = list(nets["flow"].parameters())
    if average and [p.shape for p in own] != [shadow.shape for shadow in average]:
        raise UserError(f"--checkpoint {where}: its averaged weights are not those of this flow")
    for parameter, shadow in zip(own, average or []):
        parameter.data.copy_(shadow)
    return nets


def load_part(cfg, part: str, where: str) -> nn.Module:
    """A released Sim-VAE or SwinIR, or that of another run's folder, in place of one that is trained here."""
    if Path(where).is_dir() and is_run(Path(where)):
        config, found = load_model(where, "latent_pmrf")
        if part not in found:
            raise UserError(f"--{part} {where}: this run holds {', '.join(found)} but no {part}")
        same_switches(cfg, config, where, [part], part)
        net = build(cfg, part)
        load_strict(net, found[part], f"--{part} {where}")
        return net
    if part == "vae":
        if (cfg.vae_norm, cfg.vae_resizer, cfg.vae_block) != ("layer", "sim", "sim"):
            raise UserError(f"--vae {where}: goes not together with --vae_norm, --vae_resizer, --vae_block")
        vae = load_sim_vae(where)
        channels = vae.decoder.conv_in.in_channels
        if (channels, vae.widths) != (cfg.latent_channels, tuple(cfg.vae_widths)):
            raise UserError(f"--vae {where}: set --latent_channels {channels} --vae_widths "
                            f"{' '.join(map(str, vae.widths))}, which it has")
        return vae
    mmse = build(cfg, "mmse")
    if cfg.mmse_residual:
        print(f"--mmse {where}: read as a network that adds its input; DifFace's does not (train --no-mmse_residual)",
              flush=True)
    state = {name.removeprefix("model."): t for name, t in read_weights(where).items()}
    masks = {name: t for name, t in mmse.state_dict().items() if name.endswith("attn_mask")}  # of this size, not theirs
    load_strict(mmse, state | {name: t for name, t in masks.items() if name in state}, f"--mmse {where}")
    return mmse


def stages_of(cfg) -> list:
    """All stages of this configuration, in order; each trains the network of its name."""
    return ["mmse", "flow"] if cfg.space == "pixel" else ["vae", "mmse", "flow"]


def stands_on(cfg, part: str) -> list:
    """The parts that must be trained before `part`: the posterior mean needs the autoencoder only for latents."""
    if part == "flow":
        return stages_of(cfg)[:-1]
    return ["vae"] if part == "mmse" and cfg.source == "latent_mean" else []


# Fields that change what the weights of a part mean, but not their shapes.
SWITCHES = {"vae": ("vae_norm", "vae_resizer", "vae_block"), "mmse": ("source", "mmse_residual"),
            "flow": ("space", "source", "neighborhood", "head_dim")}


def same_switches(cfg, config: dict, folder, parts, flag: str) -> None:
    """UserError where the networks in a run's folder, which --`flag` names, mean something else than cfg says."""
    before = saved_flags(Train, config, f"--{flag} {folder}")
    same_settings(cfg, before, [name for part in parts for name in SWITCHES[part]], folder, flag)


# ------------------------------------------------------------------------------------------------ training stages


def perceptual_network(cfg, device):
    """Callable (a, b) -> scalar. The toy world has a network of its own for this; `vgg19` is the paper's."""
    if cfg.perceptual == "none":
        return lambda a, b: a.new_zeros(())
    if cfg.perceptual == "vgg19":
        return VGGLoss(cfg.vgg).to(device)
    reader = metrics.load_reader("a", cfg.readers).to(device)
    return functools.partial(metrics.feature_distance, reader)


def batches(cfg, run, faces, degraded: bool):
    """batch_at(k) for `Stage.steps`: hq and, where a stage needs it, its degraded version, made on the workers."""
    def at(k):
        batch = faces.training(cfg.batch_size, cfg.seed, k, run.rank, run.world)
        if not degraded:
            return dict(hq=batch["hq"])
        lq, hq = degrade_pair(batch["hq"], DEGRADATIONS[cfg.degradation], batch["seeds"])
        return dict(hq=hq, lq=lq)
    return at


def train_vae(cfg, run, faces, nets):
    """Stage 1: Sim-VAE on clean crops, without autocast. A sample of the posterior is decoded, not its mean.

    DIFFERS: AdamW (0.9, 0.99) with weight decay 0.01 and gradients clipped at 1, as the authors' code; the paper says
    Adam with its defaults. On a GPU TF32 multiplies, which they turn off.
    """
    run.cfg = dataclasses.replace(cfg, max_grad_norm=1.0)         # the authors clip this stage, PMRF not the others
    vae, perceptual = nets["vae"], perceptual_network(cfg, run.device)
    optimizer = make_optimizer(cfg, vae.parameters(), cfg.vae_learning_rate, betas=(0.9, 0.99))
    lr_at = warmup_cosine(cfg.vae_cosine_steps, cfg.vae_warmup_steps, cfg.vae_min_learning_rate / cfg.vae_learning_rate,
                          first=0.1)
    steps = min(cfg.vae_steps, cfg.max_train_steps)
    stage = Stage(run, "vae", {"vae": vae}, {"vae": optimizer}, steps, lr_at)
    for _, batch in stage.steps(batches(cfg, run, faces, degraded=False)):
        hq = random_crop(batch["hq"], cfg.vae_crop)
        mean, logvar = vae.encode(hq)
        z = mean + (0.5 * logvar).exp() * torch.randn_like(mean)
        loss, parts = vae_loss(vae.decode(z), hq, mean, logvar, perceptual, cfg.perceptual_weight, cfg.kl_weight)
        stage.update(loss, loss=loss, **parts)
    run.cfg = cfg
    return stage


def train_mmse(cfg, run, faces, nets):
    """Stage 2: the posterior mean, by least squares. With --source latent_mean the target is the latent."""
    mmse, vae = nets["mmse"].train(), nets.get("vae")
    steps = min(cfg.mmse_steps, cfg.max_train_steps)
    optimizer = make_optimizer(cfg, mmse.parameters(), cfg.mmse_learning_rate)
    stage = Stage(run, "mmse", {"mmse": mmse}, {"mmse": optimizer}, steps, lr_schedule(cfg, steps))
    for _, batch in stage.steps(batches(cfg, run, faces, degraded=True)):
        with run.autocast():
            estimate = mmse(batch["lq"] * 0.5 + 0.5)
        if cfg.source == "latent_mean":
            with torch.no_grad():
                target = vae.encode(batch["hq"])[0]
            loss = (estimate.float() - target).square().mean()
        else:
            loss = mmse_loss(estimate.float(), batch["hq"] * 0.5 + 0.5)
        stage.update(loss, mse=loss)
    mmse.eval()
    return stage


def train_flow(cfg, run, faces, nets, watch=None):
    """Stage 3: rectified flow from the source (posterior mean) to the clean face, everything else frozen.

    `watch(stage, step, seconds)` looks on while it trains (the ablation's curves); its own time is not counted. On a
    CPU these are seconds of this process' threads, so that other programs do not change what is compared.
    """
    flow, vae = nets["flow"], nets.get("vae")
    flow.gradient_checkpointing = cfg.gradient_checkpointing
    steps = min(cfg.flow_steps, cfg.max_train_steps)
    # Adam (0.9, 0.95) [sec. 6.1]: AdamW without decay
    optimizer = make_optimizer(cfg, flow.parameters(), cfg.learning_rate, weight_decay=cfg.flow_weight_decay)
    stage = Stage(run, "flow", {"flow": flow}, {"flow": optimizer}, steps, lr_schedule(cfg, steps))
    clock = time.perf_counter if run.device.type == "cuda" else time.process_time
    seconds, since = 0.0, clock()
    for step, batch in stage.steps(batches(cfg, run, faces, degraded=True)):
        with torch.no_grad(), run.autocast():
            z0, _ = flow_source(nets, cfg, batch["lq"], torch.randn_like)
            if cfg.space == "pixel":
                z1 = batch["hq"] * 0.5 + 0.5
            else:
                z1 = latent_source(vae, batch["hq"], True, torch.randn_like)  # UNSTATED: the target is a draw, too
            z0 = z0.float() + cfg.source_noise * torch.randn_like(z0, dtype=torch.float32)
        pieces = cfg.gradient_accumulation_steps                   # strata of the whole step, over processes and pieces
        t = stratified_time(len(z0), run.rank * pieces + stage.micro, run.world * pieces).to(run.device)
        with run.autocast():
            loss = cfm_loss(lambda z, t: flow(z, t).float(), z0, z1.float(), t)
        stage.update(loss, cfm=loss)
        if watch:
            if run.device.type == "cuda":
                torch.cuda.synchronize()
            seconds += clock() - since
            watch(stage, step + 1, seconds)
            since = clock()
    return stage


TRAINERS = {"vae": train_vae, "mmse": train_mmse, "flow": train_flow}


def start(cfg, wanted: list) -> tuple:
    """(nets, weights of those that are given or finished) of all stages, fresh where there is nothing yet."""
    torch.manual_seed(cfg.seed)
    nets, weights = {part: build(cfg, part) for part in stages_of(cfg)}, {}
    reuse = [part for part in nets if part not in wanted or cfg.resume_from_checkpoint]
    config, saved = finished_parts(cfg, "latent_pmrf") if reuse else ({}, {})
    if saved:
        same_switches(cfg, config, cfg.output, SWITCHES, "output")
    for part in nets:
        given = getattr(cfg, part, "")
        if given:
            nets[part] = load_part(cfg, part, given)
            weights[part] = nets[part].state_dict()
        elif part in reuse and part in saved:
            load_strict(nets[part], saved[part], f"{cfg.output}, {part}")
            weights[part] = saved[part]
        elif part not in wanted and part in stands_on(cfg, cfg.stage):
            raise UserError(f"--stage {cfg.stage} needs {part}: train it first (--stage {part}), or give --{part}")
    return nets, weights


def train(cfg: Train) -> None:
    """The stages asked for, in order: each is saved when it ends; then held-out faces are restored and measured."""
    wanted = stages_of(cfg) if cfg.stage == "all" else [cfg.stage]
    if cfg.stage not in ["all"] + stages_of(cfg):
        raise UserError(f"--stage {cfg.stage}: --space {cfg.space} has no such stage, only {', '.join(stages_of(cfg))}")
    if getattr(cfg, cfg.stage, ""):
        raise UserError(f"--stage {cfg.stage}: --{cfg.stage} gives that network, there is nothing to train")
    check_sizes(cfg)
    run = Run(cfg, fresh=cfg.stage == "all" and not cfg.resume_from_checkpoint)
    faces = Faces(cfg.data, cfg.image_size, cfg.validation_data)
    nets, weights = start(cfg, wanted)
    metrics.load_reader("b", cfg.readers)                          # a missing file comes out before an old run is moved
    if "vae" in wanted:
        perceptual_network(cfg, run.device)
    run.start_log()
    if cfg.stage != "all" and not cfg.resume_from_checkpoint:
        run.former = [cfg.stage] + [part for part in nets if cfg.stage in stands_on(cfg, part)]
    nets = {part: net.to(run.device).eval() for part, net in nets.items()}
    for part in wanted:
        if part in weights:
            run.say(f"stage {part}: {'given' if getattr(cfg, part, '') else 'finished before'}, taken as it is")
            continue
        nets[part].requires_grad_(True)
        stage = TRAINERS[part](cfg, run, faces, nets)
        nets[part].load_state_dict(stage.ema[part])
        nets[part].eval().requires_grad_(False)
        weights[part] = nets[part].state_dict()
        for later in stages_of(cfg) if cfg.stage != "all" else ():
            if part in stands_on(cfg, later) and weights.pop(later, None):  # trained on what has just been replaced
                run.say(f"stage {later} was trained on the former {part} and is dropped; train it again")
        if run.main:
            config = dict(method="latent_pmrf", train=dataclasses.asdict(cfg), finished=list(weights))
            save_model(cfg.output, weights, config)
    if run.main and set(weights) == set(nets):
        report(cfg, run, faces, nets)


def check_sizes(cfg) -> None:
    """Sizes that cannot work together, in words, before anything is built. Raises UserError."""
    if not cfg.vae_learning_rate:
        raise UserError("--vae_learning_rate 0: must be more than 0")
    if cfg.perceptual != "vgg19":
        refuse_unread(cfg, ("vgg",), "perceptual vgg19")
    if cfg.mmse_unshuffle & (cfg.mmse_unshuffle - 1):
        raise UserError(f"--mmse_unshuffle {cfg.mmse_unshuffle}: must be a power of two")
    if cfg.mapping_width % 2:
        raise UserError(f"--mapping_width {cfg.mapping_width}: must be even")
    shrink = 2 ** (len(cfg.vae_widths) - 1)
    if cfg.space == "pixel" and cfg.source == "latent_mean":
        raise UserError("--source latent_mean: the flow on pixels (--space pixel) has no latents; leave it out")
    if cfg.source == "latent_mean" and cfg.mmse and not cfg.vae:
        raise UserError("--mmse: with --source latent_mean it predicts latents of one autoencoder; give that as --vae")
    if cfg.space == "pixel" and cfg.vae:
        raise UserError("--vae: the flow on pixels (--space pixel) has no autoencoder; leave it out")
    if cfg.space == "latent" and min(cfg.vae_crop, cfg.image_size) % shrink:
        raise UserError(f"--vae_crop {cfg.vae_crop}: must be a multiple of {shrink}, the VAE's factor")
    tokens = cfg.image_size // cfg.mmse_unshuffle
    window = 8 * cfg.mmse_unshuffle
    if cfg.image_size % window:
        raise UserError(f"--image_size {cfg.image_size}: must be a multiple of {window}, SwinIR's windows")
    if cfg.mmse_dim % cfg.mmse_heads:
        raise UserError(f"--mmse_dim {cfg.mmse_dim}: must be a multiple of --mmse_heads {cfg.mmse_heads}")
    factor = cfg.pixel_patch if cfg.space == "pixel" else cfg.flow_patch * shrink
    levels, depths = len(cfg.flow_widths), cfg.pixel_depths if cfg.space == "pixel" else cfg.flow_depths
    side = factor * 2 ** (levels - 1)
    if cfg.image_size % side:
        raise UserError(f"--image_size {cfg.image_size}: must be a multiple of {side}, the flow's coarsest token")
    grid = 2 * cfg.image_size // side                             # tokens a side of the smallest level with windows
    if cfg.neighborhood % 2 == 0 or (levels > 1 and grid < cfg.neighborhood):
        raise UserError(f"--neighborhood {cfg.neighborhood}: must be odd and at most {grid}, the smallest grid")
    if levels != len(depths) or any(w % cfg.head_dim for w in cfg.flow_widths) or cfg.head_dim % 8:
        raise UserError("--flow_widths: wants as many --flow_depths (--pixel_depths), and multiples of --head_dim, "
                        "itself one of 8")
    if cfg.source == "latent_mean" and cfg.space == "latent" and tokens != cfg.image_size // shrink:
        raise UserError("--source latent_mean: --mmse_unshuffle must equal the VAE's factor, 2 ** (levels - 1)")


# ------------------------------------------------------------------------------------------------ measuring


def restore_held_out(cfg, run, nets, batch, steps: int) -> dict:
    """All held-out faces, in batches: lq, hq, posterior_mean, restored_faces, reconstruction (N, 3, S, S) on the CPU.

    Of the autoencoder: `latents` (N, c, h, w) of hq, and `bound`, the posterior mean coded and decoded. hq differs
    from the batch's only where a degradation turns pairs grey.
    """
    lq, clean = degrade_pair(batch["hq"], DEGRADATIONS[cfg.degradation], batch["seeds"])
    rng, found = torch.Generator().manual_seed(cfg.seed), {"lq": [lq], "hq": [clean]}
    noise = lambda like: torch.randn(like.shape, generator=rng).to(like)
    for x, hq in zip(lq.split(at_once(cfg.image_size)), clean.split(at_once(cfg.image_size))):
        result = restore(nets, cfg, x.to(run.device), noise, steps)
        if "vae" in nets:
            with torch.no_grad():
                result["latents"] = nets["vae"].encode(hq.to(run.device))[0]
                result["reconstruction"] = nets["vae"].decode(result["latents"]).clamp(-1, 1)
                result["bound"] = nets["vae"].decode(nets["vae"].encode(result["posterior_mean"])[0]).clamp(-1, 1)
        for name, images in result.items():
            found.setdefault(name, []).append(images.cpu())
    return {name: torch.cat(images) for name, images in found.items()}


def report(cfg, run, faces, nets) -> dict:
    """Restore faces the networks never saw; write samples.png, curves.png, metrics.json; print the table."""
    batch = faces.held_out(cfg.validation_faces)
    found = restore_held_out(cfg, run, nets, batch, cfg.num_inference_steps)
    hq, reader = found["hq"], metrics.load_reader("b", cfg.readers)
    rows = {name: metrics.toy_scores(found[name], hq, reader) for name in ("lq", "posterior_mean", "restored_faces")}
    if "vae" in nets:
        rows["reconstruction"] = metrics.toy_scores(found["reconstruction"], hq, reader)
    extra = dict(faces=len(hq), **run.account(nets))
    if "vae" in nets:  # [Eq. 4]: how far option 2 is from the posterior mean
        extra["bound_psnr"] = mean_psnr(found["bound"], found["posterior_mean"])
    folder = Path(cfg.output)
    protocol = metrics.toy_protocol(cfg.validation_data or cfg.data, cfg.degradation, len(hq), cfg.readers)
    write_json(folder / "metrics.json", dict(rows=rows, **extra, protocol=protocol, **versions(run.device)))
    columns = {name: found[name] for name in ("lq", "posterior_mean", "restored_faces")}
    write_grid(folder / "samples.png", dict(columns, hq=hq))
    write_curve(folder / "curves.png", read_curves(folder / "log.jsonl", ("l1", "mse", "cfm")))
    print_table(rows)
    run.say(f"{len(hq)} held-out faces; {extra['seconds']:.0f} s, {extra['peak_memory_gb']} GB at most; "
            f"pictures and numbers in {folder}")
    return rows


def mean_psnr(a, b) -> float:
    return metrics.psnr(a * 0.5 + 0.5, b * 0.5 + 0.5).mean().item()


# ------------------------------------------------------------------------------------------------ restore


def load_networks(cfg: Sample) -> tuple:
    """(nets, Train configuration) for `sample`: a training run, PMRF's release, or a run with released parts put in."""
    path = find_checkpoint(cfg.checkpoint)
    if is_run(path):
        config, parts = load_model(cfg.checkpoint, "latent_pmrf")
        trained = saved_flags(Train, config, f"--checkpoint {cfg.checkpoint}")
    else:
        if cfg.vae or cfg.mmse:
            raise UserError(f"--vae, --mmse: {cfg.checkpoint} is PMRF's release, which brings its own networks")
        nets = load_pmrf(path)
        return nets, dataclasses.replace(Train(**PAPER), space="pixel")
    nets = {}
    for part in stages_of(trained):
        given = getattr(cfg, part, "")
        if given:
            nets[part] = load_part(trained, part, given)
            continue
        if part not in parts:
            raise UserError(f"--checkpoint {cfg.checkpoint}: holds {', '.join(parts)} but no {part}; train it with "
                            f"--stage {part}")
        nets[part] = build(trained, part)
        load_strict(nets[part], parts[part], f"--checkpoint {cfg.checkpoint}, {part}")
    return nets, trained


def sample(cfg: Sample) -> None:
    """Restore a picture or a folder with trained weights, into --output."""
    run = Run(cfg)
    nets, trained = load_networks(cfg)
    nets = {part: net.to(run.device).eval() for part, net in nets.items()}
    if "vae" not in nets and (cfg.vae or cfg.vae_memory_gb):
        raise UserError(f"--vae, --vae_memory_gb: the flow of {cfg.checkpoint} runs on pixels and has no autoencoder; "
                        "leave them out")
    decode = None
    if cfg.vae_memory_gb:
        decode = functools.partial(nets["vae"].decode_tiled, memory_gb=cfg.vae_memory_gb)

    def restore_batch(lq, stems):
        # Every face gets the same noise, so that its result depends on the seed and not on its place in the folder.
        rng = torch.Generator().manual_seed(cfg.seed)
        noise = lambda like: torch.randn(like.shape[1:], generator=rng).to(like).expand_as(like)
        with run.autocast():
            return restore(nets, trained, lq, noise, cfg.num_inference_steps or trained.num_inference_steps, decode)

    restore_folder(cfg, restore_batch, trained.image_size, run.device)


# ------------------------------------------------------------------------------------------------ ablations

# name -> (table, changed fields, what the paper reports on CelebA-Test at 512 px: comparable in order, not in size).
# `ablate` fills in the channels. Of the authors' c = 32 Table 3 tries half, three quarters and one and a half times.
ABLATIONS = {
    "Latent-PMRF": ("", {}, "PSNR 26.38, FID 11.33 (Tables 1-3); 26.39, 10.94 (Table 4)"),
    "PMRF*": ("space", dict(space="pixel"), "Table 4: PSNR 26.64, FID 15.17"),
    "group norm": ("vae", dict(vae_norm="group"), "Table 2, - layernorm: PSNR 43.05, restored 26.17"),
    "pixel shuffle": ("vae", dict(vae_resizer="pixel_shuffle"), "Table 2, - interpolate: PSNR 42.98, restored 26.25"),
    "SD resizers": ("vae", dict(vae_resizer="sd"), "Figure 5a; no row, unless it is - interpolate"),
    "SD block": ("vae", dict(vae_block="sd"), "Figure 3; no row"),
    "SD-VAE style": ("vae", dict(vae_norm="group", vae_resizer="sd", vae_block="sd"),  # DIFFERS: without its attention
                     "Table 2, SD-VAE: PSNR 40.40, restored 25.26"),                   # and its norm before conv_out
    "half the channels": ("vae", dict(latent_channels=0), "Table 3, c = 16: PSNR 37.90, restored 26.44"),
    "three quarters of the channels": ("vae", dict(latent_channels=0), "Table 3, c = 24: PSNR 40.81, restored 26.39"),
    "one and a half times the channels": ("vae", dict(latent_channels=0),
                                          "Table 3, c = 48: PSNR 45.06, restored 26.46"),
    "option 1, posterior mean of latents": ("source", dict(source="latent_mean"), "worse distortion, sec. 3.2"),
}
CHANNELS = {"half the channels": 0.5, "three quarters of the channels": 0.75, "one and a half times the channels": 1.5}


def ablate(cfg: Ablate) -> None:
    """Each row trains only what it changes; the rest is shared by the rows of a seed."""
    check_sizes(cfg)
    if cfg.vae or cfg.mmse:
        raise UserError("--vae, --mmse: ablate trains its own; leave them out")
    for name in ("space", "source"):                               # a row would not be what its name says
        if getattr(cfg, name) != getattr(Ablate(), name):
            raise UserError(f"--{name} {getattr(cfg, name)}: the rows set it; choose them with --table or --rows")
    rows = dict(ABLATIONS)
    for name, factor in CHANNELS.items():
        rows[name] = (rows[name][0], dict(latent_channels=max(1, int(factor * cfg.latent_channels))), rows[name][2])
    for name, (group, changes, _) in rows.items():                 # only of the rows that will run
        if name in cfg.rows if cfg.rows else cfg.table in ("all", group):
            check_sizes(dataclasses.replace(cfg, **changes))
    done = run_ablation(cfg, rows, ablation_row)
    print_ablation(done, ABLATIONS, ("psnr", "fid_toy", "deg_toy", "lmd_toy", "reconstruction_psnr"))
    for pixel in (entry for entry in done.values() if entry["row"] == "PMRF*"):
        seed = pixel["config"]["seed"]
        latent = done.get(f"Latent-PMRF, seed {seed}")
        half = (len(pixel["curve"]) + 1) // 2
        for when, curve in (("half-way", pixel["curve"][:half]), ("last", pixel["curve"])) if latent else ():
            steps, seconds = speed_up(latent["curve"], curve)
            print(f"speed-up to the pixel flow's {when} fid_toy, seed {seed}: {steps} in steps, {seconds} in seconds "
                  "(paper 5.79x)")


def ablation_row(cfg, done: dict) -> dict:
    """Train what differs from the shared networks, then measure. All flows see the same number of faces [Figure 6].

    The two flows whose speed is compared are also measured on the way, off the clock.
    """
    run, faces = Run(cfg), Faces(cfg.data, cfg.image_size, cfg.validation_data)
    held, reader = faces.held_out(cfg.validation_faces), metrics.load_reader("b", cfg.readers)
    torch.manual_seed(cfg.seed)
    nets = {}
    for part in stages_of(cfg):
        nets[part] = build(cfg, part).to(run.device).eval()
        if part != "flow":
            shared_network(cfg, run, faces, nets, part)
    last = min(cfg.flow_steps, cfg.max_train_steps)
    compared = cfg.space == "pixel" or f"Latent-PMRF, seed {cfg.seed}" not in done
    curve, found, scores = [], {}, {}
    average = build(cfg, "flow").to(run.device).eval()

    def watch(stage, step, seconds):
        if step == last or (compared and step % max(1, last // 10) == 0):
            average.load_state_dict(stage.ema["flow"])
            found.update(restore_held_out(cfg, run, {**nets, "flow": average}, held, cfg.num_inference_steps))
            scores.update(ablation_scores(found, reader))
            curve.append((step, round(seconds, 2), scores["fid_toy"]))

    train_flow(cfg, run, faces, nets, watch)
    return dict(scores=scores, curve=curve, steps=curve[-1][0], seconds=curve[-1][1])


@torch.no_grad()
def ablation_scores(found, reader) -> dict:
    """Toy scores and LPIPS' stand-in of the restored faces and, as `reconstruction_*`, of the autoencoder's."""
    scores = {}
    for name, prefix in (("restored_faces", ""), ("reconstruction", "reconstruction_")):
        if name in found:
            pairs = zip(found[name].split(64), found["hq"].split(64))
            lpips = torch.cat([metrics.reader_lpips(reader, a, b) for a, b in pairs]).mean().item()
            values = dict(metrics.toy_scores(found[name], found["hq"], reader), lpips_toy=lpips)
            scores |= {prefix + key: value for key, value in values.items()}
    return scores | ({"latent_peak": latent_peak(found["latents"])} if "latents" in found else {})


def latent_peak(z) -> float:
    """Largest magnitude of a latent (B, c, h, w) over its mean magnitude, mean over the batch: Figure 4's outliers."""
    magnitude = z.norm(dim=1).flatten(1)
    return (magnitude.amax(1) / magnitude.mean(1)).mean().item()


def shared_network(cfg, run, faces, nets, part: str) -> None:
    """The autoencoder or the posterior mean: trained once for all rows of a seed that agree on its settings."""
    matters = ("seed", "image_size", "data", "validation_data", "batch_size", "gradient_acc", "optimizer", "lr_",
               "max_", "ema_decay", "mixed_precision", "readers", "vgg")
    if part == "vae" or cfg.source == "latent_mean":
        matters += ("vae", "latent_channels", "perceptual", "kl_weight")
    if part == "mmse":
        matters += ("mmse", "degradation", "source")
    nets[part].requires_grad_(True)
    trained = shared_parts(cfg, "latent_pmrf", part, matters,
                           lambda: {part: TRAINERS[part](cfg, run, faces, nets).ema[part]})
    load_strict(nets[part], trained[part], f"{cfg.output}, {part}")
    nets[part].eval().requires_grad_(False)


def speed_up(latent: list, pixel: list) -> tuple:
    """How much sooner the latent curve [(step, seconds, fid)] reaches the last value of the pixel curve, as text."""
    for step, seconds, fid in latent:
        if fid <= pixel[-1][2]:
            return f"{pixel[-1][0] / step:.2f}x", f"{pixel[-1][1] / seconds:.2f}x"
    return "not reached", "not reached"


VERBS = {
    "train": (Train, {"toy": Train(), "paper": Train(**PAPER)}, train),
    "sample": (Sample, {}, sample),
    "ablate": (Ablate, {"toy": Ablate(), "paper": Ablate(**PAPER)}, ablate),
}

if __name__ == "__main__":
    command_line(__doc__, VERBS)
