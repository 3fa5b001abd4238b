"""Latent-PMRF: restore a face by its posterior mean, then move the estimate to a real face with a flow between latents.

Paper: "Latent-PMRF" (arXiv 2507.00447 v1); baseline: PMRF (arXiv 2410.00418). Among all estimators whose outputs look
real, the one with the least squared error transports the posterior mean to the distribution of clean images. PMRF
(posterior-mean rectified flow) learns that transport on pixels. Latent-PMRF learns it between latents of Sim-VAE, an
autoencoder of 3x3 convolutions and per-pixel LayerNorm, without attention. Its reconstruction error bounds the distortion
[Eq. 4], and 32 channels make it small: 42.7 dB [Table 2].

    paper      name here   shape                range     meaning
    y, x       lq, hq      (B, 3, S, S)         [-1, 1]   degraded and clean face
    x_hat      estimate    (B, 3, S, S)         [-1, 1]   posterior mean E[X | Y = y], here SwinIR (`mmse`)
    E, D       vae         (B, 3, S, S) <-> (B, c, S/f, S/f)    Sim-VAE; latents are not rescaled
    z_0        z0          (B, c, h, w)         t = 0     source: latent of the posterior mean + noise of std sigma_s
    z_1        z1          (B, c, h, w)         t = 1     target: latent of the clean face
    t          t           (B,)                 [0, 1]    0 is the degraded end, 1 the clean end
    v_t(z_t)   velocity    (B, c, h, w)                   HDiT, which sees z_t and t only, never y

    [Eq. 1] euler_sample   [Eq. 2, 3, 5] cfm_loss   [Eq. 4] flow_source: options 1 and 2   [Eq. 6] vae_loss
    [Figure 2] interpolate   [sec. 4.1] SimVAE   [sec. 6.1] HDiT and the values of `Train`

Read first: `train_flow`, `restore`, `flow_source`, `euler_sample`, `cfm_loss`; then `SimVAE`. SwinIR and HDiT are networks
of other papers. Run `python latent_pmrf.py train` (toy faces, CPU, minutes) or `train --preset paper --data FFHQ`.
`--space pixel` is PMRF itself. y is made from x on the way: blur, shrink, noise, JPEG, enlarge (`DEGRADATIONS` of common.py).
"""
import functools
import math
import typing
from dataclasses import dataclass
from pathlib import Path

# common comes first: it sets up OpenMP before torch is imported
from common import (DEGRADATIONS, EMA, TOY, Run, SampleFlags, TrainFlags, UserError, command_line, find_checkpoint, load_strict,
                    lr_schedule, make_optimizer, open_faces, open_run, random_crop, read_torch, read_weights, restore_folder,
                    warmup_cosine)

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

import metrics

# ------------------------------------------------------------------------------------------------ configuration

# Sizes of the networks. paper: [sec. 6.1]; UNSTATED: the widths of the flow (PMRF's), the layout of Sim-VAE (authors' file).
SIZES = {
    "toy": dict(
        vae=dict(widths=(16, 32, 64)),
        mmse=dict(dim=64, depths=(4, 4), heads=4, features=48, unshuffle=4, drop_path=0.0, residual=True),
        flow=dict(widths=(64, 128), depths=(2, 4), patch=1, head_dim=32, mapping_width=128, depthwise=True),
        pixel_flow=dict(widths=(64, 128), depths=(2, 4), patch=2, head_dim=32, mapping_width=128)),
    "small": dict(
        vae=dict(widths=(64, 128, 256)),
        mmse=dict(dim=120, depths=(6, 6, 6, 6), unshuffle=4, drop_path=0.0, residual=True),
        flow=dict(widths=(192, 384), depths=(4, 8), patch=1, mapping_width=384, depthwise=True),
        pixel_flow=dict(widths=(192, 384), depths=(4, 8), patch=4, mapping_width=384)),
    "paper": dict(
        vae=dict(widths=(128, 256, 512, 512)),
        mmse=dict(dim=180, depths=(6,) * 8, heads=6, features=64, unshuffle=8, drop_path=0.1, residual=False),
        flow=dict(widths=(256, 512, 1024), depths=(2, 4, 6), patch=1, head_dim=64, mapping_width=768, depthwise=True),
        pixel_flow=dict(widths=(256, 512, 1024), depths=(2, 2, 8), patch=4, head_dim=64, mapping_width=768))}
HDIT_PMRF = dict(in_channels=3, **SIZES["paper"]["pixel_flow"])
# Changes of the paper to SD-VAE, undone one by one. sd: all of them (DIFFERS: without SD's attention and last norm).
# group_norm: Table 2's "- layernorm". sd_resizers: Figure 5a's, our reading of "- interpolate", in words "non-optimal
# resizing layers" [sec. 6.3]. UNSTATED: it may be pixel_shuffle, a switch of the authors' code. sd_block: no row of Table 2.
VAE_STYLES = {"sim": {}, "group_norm": dict(norm="group"), "pixel_shuffle": dict(resizer="pixel_shuffle"),
              "sd_resizers": dict(resizer="sd"), "sd_block": dict(block="sd"), "sd": dict(norm="group", resizer="sd", block="sd")}


@dataclass(frozen=True)
class Train(TrainFlags):
    """Train Sim-VAE, the posterior mean and the flow, then restore held-out faces."""
    # The values are the paper's [sec. 6.1; kl_weight 4.2] where no comment says otherwise; TOY_VALUES below are the toy's.
    # UNSTATED: ema_decay (PMRF's 0.9999) and bf16 of TrainFlags.
    output: str = "runs/latent_pmrf"       # folder for weights, checkpoints, log and pictures
    stage: typing.Literal["all", "vae", "mmse", "flow"] = "all"  # one stage, or all in order
    size: typing.Literal["toy", "small", "paper"] = "paper"  # of the networks, see SIZES
    degradation: typing.Literal[tuple(DEGRADATIONS)] = "difface"  # "following [46, 60]": PMRF's
    batch_size: int = 8                    # faces per process and micro-batch; paper 64 in all, 8 processes
    space: typing.Literal["latent", "pixel"] = "latent"  # where the flow runs; pixel is PMRF, which has no VAE
    source: typing.Literal["encode_mean", "latent_mean"] = "encode_mean"  # Eq. 4: options 2 and 1
    vae: str = ""                          # Sim-VAE to use, not train: folder of a run, diffusers folder or hub id
    mmse: str = ""                         # SwinIR to use: folder of a run, or swinir_restoration512_L1.pth of DifFace
    latent_channels: int = 32              # c of the latent; Table 3: 16, 24, 32, 48
    vae_style: typing.Literal[tuple(VAE_STYLES)] = "sim"  # Table 2: the paper's VAE with one change undone, or all
    perceptual: typing.Literal["vgg19", "reader"] = "vgg19"  # network of the perceptual loss
    vgg: str = ""                          # file of torchvision's vgg19 weights (default: torchvision fetches them)
    perceptual_weight: float = 0.05        # DIFFERS: authors' file; sec. 4.2: as Real-ESRGAN, whose is 1.0
    kl_weight: float = 1e-6                # of the KL summed over a latent
    vae_steps: int = 150_000               # of Sim-VAE
    vae_learning_rate: float = 1e-4        # peak of a cosine that ends at a hundredth of it
    mmse_steps: int = 270_000              # paper trains none (DifFace's weights); PMRF's 1000 epochs at its batch of 256
    mmse_learning_rate: float = 5e-4       # PMRF, constant
    flow_steps: int = 400_000              # of the flow
    learning_rate: float = 5e-4            # of the flow, constant
    source_noise: float = 0.1              # sigma_s: noise on the source; DIFFERS: authors' file, the paper adds none
    source_sample: bool = True             # z0 draws from q(z | x_hat); DIFFERS: authors' code. UNSTATED: so does z1
    num_inference_steps: int = 25          # Euler steps of the faces restored at the end [sec. 3.3]


# The fields that decide what weights mean: `Run` refuses to go on with a run that has others.
SETTINGS = ("size", "space", "source", "latent_channels", "vae_style")
TOY_VALUES = dict(                          # mmse is shipped; --mmse '' trains it, as --source latent_mean needs
    TOY, size="toy", mmse="toy/weights/swinir", latent_channels=16, perceptual="reader", vae_steps=1150, vae_learning_rate=2e-3,
    mmse_steps=5000, mmse_learning_rate=2e-3, flow_steps=600, learning_rate=2e-3, num_inference_steps=4)
SMALL = dict(
    size="small", image_size=128, batch_size=64, latent_channels=16, vae_steps=20_000, mmse_steps=20_000, flow_steps=50_000,
    checkpointing_steps=2000)


@dataclass(frozen=True)
class Sample(SampleFlags):
    """Restore faces with trained weights."""
    output: str = "results/latent_pmrf"    # folder for restored_faces/, posterior_mean/, cmp/ and args.json
    checkpoint: str = "toy/weights/latent_pmrf"  # output folder of a training run, or PMRF's released folder or hub id
    vae: str = ""                          # Sim-VAE instead of the checkpoint's, as --vae of train
    mmse: str = ""                         # SwinIR instead of the checkpoint's, as --mmse of train
    num_inference_steps: int = 0           # Euler steps K (0: as trained); 1 is one step from the mean


# ------------------------------------------------------------------------------------------------ model: Sim-VAE

class PixelLayerNorm(nn.LayerNorm):
    """LayerNorm over the channels of each pixel: no statistic crosses pixels, so the network stays a convolution."""

    def __init__(self, channels: int):
        super().__init__(channels, eps=1e-6)

    def forward(self, x):  # (B, C, H, W)
        with torch.autocast(x.device.type, enabled=False):        # it would return float32; the kernel sums in float32 anyway
            weight, bias = self.weight.to(x.dtype), self.bias.to(x.dtype)
            return F.layer_norm(x.movedim(1, -1), self.normalized_shape, weight, bias, self.eps).movedim(-1, 1)


def vae_norm(norm: str, channels: int) -> nn.Module:
    """LayerNorm per pixel ("layer"), or GroupNorm ("group"): 32 groups as SD-VAE; below 128 channels, groups of 4."""
    groups = math.gcd(32, max(1, channels // 4), channels)
    return PixelLayerNorm(channels) if norm == "layer" else nn.GroupNorm(groups, channels, eps=1e-6)


class SimBlock(nn.Module):
    """y = x + conv2(SiLU(conv1(norm(x)))), the only block of Sim-VAE [sec. 4.1]; "sd" adds SD-VAE's norm and SiLU."""

    def __init__(self, width: int, out: int, norm: str, block: str):
        super().__init__()
        self.norm, self.act = vae_norm(norm, width), nn.SiLU() if block == "sd" else nn.Identity()
        self.conv1 = nn.Conv2d(width, out, 3, padding=1)
        self.norm2 = vae_norm(norm, out) if block == "sd" else nn.Identity()
        self.conv2 = nn.Conv2d(out, out, 3, padding=1)
        self.shortcut = nn.Conv2d(width, out, 1) if width != out else nn.Identity()          # only with SD-style resizers

    def forward(self, x):
        return self.shortcut(x) + self.conv2(F.silu(self.norm2(self.conv1(self.act(self.norm(x))))))


class Down(nn.Module):
    """Halve the resolution with one strided 3x3 convolution. "sd" pads right and below, Sim-VAE all sides."""

    def __init__(self, width: int, out: int, resizer: str):
        super().__init__()
        self.resizer = resizer
        self.conv = nn.Conv2d(width, out, 3, stride=2, padding=int(resizer != "sd"))

    def forward(self, x):
        return self.conv(x if self.resizer != "sd" else F.pad(x, (0, 1, 0, 1)))


class Up(nn.Module):
    """Double the resolution: nearest neighbour, then a 3x3 convolution; or four times the channels, then pixel shuffle."""

    def __init__(self, width: int, out: int, resizer: str):
        super().__init__()
        self.shuffle = resizer == "pixel_shuffle"
        self.conv = nn.Conv2d(width, 4 * out if self.shuffle else out, 3, padding=1)

    def forward(self, x):
        if self.shuffle:
            return F.pixel_shuffle(self.conv(x), 2)
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))


class Blocks(nn.Module):
    """`layers` residual blocks, then perhaps a resizer, named as in the released checkpoint."""

    def __init__(self, width, out, layers, norm, block, downsampler=None, upsampler=None):
        super().__init__()
        self.resnets = nn.ModuleList(SimBlock(width if i == 0 else out, out, norm, block) for i in range(layers))
        self.downsampler, self.upsampler = downsampler or nn.Identity(), upsampler or nn.Identity()

    def forward(self, x):
        for layer in (*self.resnets, self.downsampler, self.upsampler):
            x = layer(x)
        return x


class Encoder(nn.Module):
    """(B, 3, H, W) -> moments (B, 2c, H/f, W/f)."""

    def __init__(self, channels, widths, layers, mid_layers, norm, resizer, block):
        super().__init__()
        last = len(widths) - 1
        self.conv_in = nn.Conv2d(3, widths[0], 3, padding=1)
        self.down_blocks = nn.ModuleList()
        for i, width in enumerate(widths):
            into = width if resizer != "sd" or i == 0 else widths[i - 1]
            after = None if i == last else Down(width, widths[i + 1] if resizer != "sd" else width, resizer)
            self.down_blocks.append(Blocks(into, width, layers, norm, block, downsampler=after))
        self.mid_block = Blocks(widths[-1], widths[-1], mid_layers, norm, block)
        self.conv_out = nn.Conv2d(widths[-1], 2 * channels, 3, padding=1)

    def forward(self, x):
        x = self.conv_in(x)
        for block in self.down_blocks:
            x = block(x)
        return self.conv_out(self.mid_block(x))


class Decoder(nn.Module):
    """(B, c, h, w) -> (B, 3, f h, f w); one more block per level than the encoder, no norm before conv_out."""

    def __init__(self, channels, widths, layers, mid_layers, norm, resizer, block):
        super().__init__()
        widths = tuple(reversed(widths))
        self.conv_in = nn.Conv2d(channels, widths[0], 3, padding=1)
        self.mid_block = Blocks(widths[0], widths[0], mid_layers, norm, block)
        self.up_blocks = nn.ModuleList()
        for i, width in enumerate(widths):
            into = width if resizer != "sd" or i == 0 else widths[i - 1]
            to = width if resizer == "sd" else widths[min(i + 1, len(widths) - 1)]
            after = None if i == len(widths) - 1 else Up(width, to, resizer)
            self.up_blocks.append(Blocks(into, width, layers + 1, norm, block, upsampler=after))
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

    def encode(self, x):
        """-> mean, logvar (B, c, h, w) of q(z | x); logvar within [-30, 20]."""
        mean, logvar = self.encoder(x.float()).chunk(2, dim=1)
        return mean, logvar.clamp(-30, 20)

    def decode(self, z):
        """-> (B, 3, H, W), not clamped."""
        return self.decoder(z.float())


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

    def drop_path(self, x):
        """Stochastic depth: in training a sample skips the branch with probability `drop`."""
        return x * F.dropout(x.new_ones(len(x), 1, 1), self.drop, self.training)

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
        x = x + self.drop_path(h.flatten(1, 2))
        return x + self.drop_path(self.mlp.fc2(F.gelu(self.mlp.fc1(self.norm2(x)))))


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


def zeroed(layer):
    nn.init.zeros_(layer.weight)
    return layer


class SwinIR(nn.Module):
    """The posterior-mean predictor: (B, 3, H, W) in [0, 1] -> the same, not clipped.

    Default: DifFace's SwinIR-L (15,792,587 parameters, its names). PMRF's "swinir_M": dim=120, depths=(6,) * 5.
    `latent_channels` > 0 predicts latents at 1 / unshuffle of the resolution instead (option 1 of sec. 3.2). `residual` adds
    the input to the output, as SwinIR does for denoising; the last convolution is zero at first, so training starts at the
    input. `tokens`: side of the token grid in training, for the stored masks.
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
        self.layers = nn.ModuleList(SwinGroup(dim, depth, heads, window, mlp_ratio, tokens,
                                              drops[sum(depths[:i]):sum(depths[:i + 1])])
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
        x = F.pad(x, (0, -width % step, 0, -height % step), mode="reflect")
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

@torch.compiler.disable  # the mask is made once and kept, outside of what --compile compiles
@functools.lru_cache(maxsize=32)
@torch.inference_mode(False)  # one call inside inference mode must not spoil a training that follows
def neighborhood_mask(height: int, width: int, kernel: int, device):
    """Which keys lie in the window of a query: (1, 1, H W, H W) bool, or on a GPU the blocks that `flex_attention` visits."""
    from torch.nn.attention.flex_attention import create_block_mask, create_mask

    def window(batch, head, query, key):  # at a border the window shifts in
        row = (query // width - kernel // 2).clamp(0, height - kernel)
        column = (query % width - kernel // 2).clamp(0, width - kernel)
        return ((key // width - row >= 0) & (key // width - row < kernel)
                & (key % width - column >= 0) & (key % width - column < kernel))

    make = create_block_mask if device.type == "cuda" else create_mask
    return make(window, None, None, height * width, height * width, device=device)


@functools.lru_cache
def compiled_flex_attention():
    from torch.nn.attention.flex_attention import flex_attention
    return torch.compile(flex_attention)


def neighborhood_attention(q, k, v, height: int, width: int, kernel_size: int = 7, scale: float | None = None):
    """Each query attends to the kernel_size x kernel_size keys around it; at a border the window shifts in [NATTEN].

    q, k, v (B, heads, H * W, head_dim), row-major -> the same shape.
    """
    if kernel_size % 2 == 0 or kernel_size > min(height, width):
        raise ValueError(f"neighborhood_attention: window {kernel_size} must be odd and fit the {height}x{width} grid")
    mask = neighborhood_mask(height, width, kernel_size, q.device)
    if q.is_cuda:
        return compiled_flex_attention()(q, k, v, block_mask=mask, scale=scale)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale)


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


class FourierFeatures(nn.Module):
    """[cos 2 pi W x, sin 2 pi W x] with a fixed random W, which is part of the weights."""

    def __init__(self, inputs: int, width: int):
        super().__init__()
        self.register_buffer("weight", torch.randn(width // 2, inputs))

    def forward(self, x):
        f = 2 * math.pi * (x[..., None, :] * self.weight).sum(-1)  # not @, which autocast would round to bf16
        return torch.cat([f.cos(), f.sin()], dim=-1)


class DepthwiseConv(nn.Conv2d):
    """3x3 depth-wise convolution over tokens (B, H W, C) [sec. 6.1]. DIFFERS: starts as the identity, theirs at random."""

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
        self.dwconv = DepthwiseConv(3 * width) if depthwise else None
        self.scale = nn.Parameter(torch.full((self.heads,), 10.0))
        self.pos_emb = nn.Module()
        angles = head_dim // 8  # half of a head is rotated; a quarter for each of y and x
        freqs = torch.linspace(math.log(math.pi), math.log(10 * math.pi), self.heads * angles + 1)[:-1].exp()
        self.pos_emb.register_buffer("freqs", freqs.view(angles, self.heads).T.contiguous())
        self.out_proj = zeroed(nn.Linear(width, width, bias=False))

    def forward(self, x, c, positions, grid):  # (B, N, D)
        qkv = self.qkv_proj(self.norm(x, c))
        qkv = self.dwconv(qkv, grid) if self.dwconv else qkv
        q, k, v = qkv.unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)  # 3 x (B, heads, N, D / heads)
        theta = (positions[None, :, :, None] * self.pos_emb.freqs[:, None, None]).flatten(2)  # (heads, N, 2 * angles)
        root = self.scale.float().sqrt()[:, None, None]
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
        self.norm, self.up_proj = AdaRMSNorm(width, cond), nn.Linear(width, 2 * d_ff, bias=False)
        self.dwconv = DepthwiseConv(2 * d_ff) if depthwise else None
        self.down_proj = zeroed(nn.Linear(d_ff, width, bias=False))

    def forward(self, x, c, grid):
        h = self.up_proj(self.norm(x, c))
        h = self.dwconv(h, grid) if self.dwconv else h
        return x + self.down_proj(geglu(h))


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
        self.norm, self.up_proj = RMSNorm(width), nn.Linear(width, 2 * d_ff, bias=False)
        self.down_proj = zeroed(nn.Linear(d_ff, width, bias=False))

    def forward(self, x):
        return x + self.down_proj(geglu(self.up_proj(self.norm(x))))


class Mapping(nn.Module):
    """From time features to the condition c of all adaptive norms."""

    def __init__(self, width: int, depth: int):
        super().__init__()
        self.in_norm = RMSNorm(width)                              # k-diffusion's order: PMRF's EMA is a list, without names
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


class HDiT(nn.Module):
    """Hourglass diffusion transformer: velocity of x (B, C, H, W) at time t (B,), same shape [arXiv 2401.11605; PMRF].

    Level i works on tokens of 2^i x 2^i patches; all levels but the last attend to `kernel` x `kernel` neighbourhoods,
    the last to everything. Names are k-diffusion's, as PMRF releases them: HDiT(**HDIT_PMRF) has 160,460,210
    parameters. DIFFERS: the HDiT that the paper cites, with depth-wise convolutions as a switch, has 147.83 M at the
    paper's sizes; 151.2 M are printed. docs/latent_pmrf.md says how the authors' own network differs.
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
        x = self.patch_out(self.out_norm(x), grid)                           # (B, H W, C), pixels row by row
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
        network = vgg19(weights=VGG19_Weights.IMAGENET1K_V1 if pretrained and not weights else None)
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
    """Mean squared error in [0, 1], whose minimiser is the posterior mean; clipped as in `posterior_mean`."""
    return (estimate.clamp(0, 1) - hq).square().mean()


def interpolate(z0, z1, t):
    """z_t = (1 - t) z0 + t z1 [Figure 2]; t (B,), 0 the source, 1 clean. The authors' code reverses t."""
    t = t.view(-1, *[1] * (z0.dim() - 1))
    return (1 - t) * z0 + t * z1


def cfm_loss(velocity, z0, z1, t):
    """E || v(z_t, t) - (z1 - z0) ||^2 [Eq. 3; Eq. 5 in latents], a mean over elements. z1 - z0: the line's velocity [Eq. 2]."""
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


def latent_source(vae, x, sample: bool, noise):
    """E(x): a draw of q(z | x), or its mean. Of x_hat it is the flow's source [Eq. 4, option 2], of the clean face its end.

    noise(like) draws N(0, 1). DIFFERS: the paper says E(x_hat), the authors' code draws. The caller adds `source_noise`.
    """
    mean, logvar = vae.encode(x)
    return mean + (0.5 * logvar).exp() * noise(mean) if sample else mean


def flow_source(nets, cfg, lq, noise):
    """(z0, estimate): the source before its noise, and the posterior mean (B, 3, S, S), which option 1 never makes: None.

    `noise(like)` draws N(0, 1).
    """
    if cfg.source == "latent_mean":  # [Eq. 4, option 1]: E[Z_1 | y] from a network trained on latents
        return nets["mmse"](lq * 0.5 + 0.5), None
    estimate = posterior_mean(nets["mmse"], lq)
    if cfg.space == "pixel":                                      # PMRF: the flow runs on pixels in [0, 1]
        return estimate * 0.5 + 0.5, estimate
    return latent_source(nets["vae"], estimate, cfg.source_sample, noise), estimate


@torch.no_grad()
def restore(nets, cfg, lq, noise, steps: int):
    """lq (B, 3, S, S) in [-1, 1] -> {"restored_faces", "posterior_mean"}, the same shape, clipped [sec. 3.3]."""
    z0, estimate = flow_source(nets, cfg, lq, noise)
    estimate = nets["vae"].decode(z0) if estimate is None else estimate
    z0 = z0.float()                                                # the state stays float32 under autocast
    z1 = euler_sample(nets["flow"], z0 + cfg.source_noise * noise(z0), steps)
    restored = z1 * 2 - 1 if cfg.space == "pixel" else nets["vae"].decode(z1)
    return {"restored_faces": restored.float().clamp(-1, 1), "posterior_mean": estimate.float().clamp(-1, 1)}


# ------------------------------------------------------------------------------------------------ training

def train_vae(cfg, run, faces, nets):
    """Stage 1: Sim-VAE on clean crops, without autocast. UNSTATED: a draw of q(z | x) is decoded, as in the authors' code.

    DIFFERS: AdamW (0.9, 0.99) with weight decay 0.01 and gradients clipped at 1, as the authors' code; the paper says
    Adam with its defaults. On a GPU TF32 multiplies, which they turn off.
    """
    vae = nets["vae"].train().requires_grad_(True)
    if cfg.perceptual == "vgg19":
        perceptual = VGGLoss(cfg.vgg).to(run.device)
    else:                                                          # the toy faces have a network of their own
        perceptual = functools.partial(metrics.feature_distance, metrics.load_reader("a", cfg.readers).to(run.device))
    optimizer = make_optimizer(cfg, vae.parameters(), cfg.vae_learning_rate, betas=(0.9, 0.99))
    modules, steps = {"vae": vae}, min(cfg.vae_steps, cfg.max_train_steps)
    warmup = min(500, steps // 20)                                 # DIFFERS: linear, authors' file; paper flat at a tenth
    factor = warmup_cosine(steps - warmup, warmup, floor=0.01, first=0.1)
    ema = EMA(modules, cfg.ema_decay)                              # averaged weights, for `sample`
    first = run.load("vae", modules, ema, optimizer)               # 0, or where a stopped run was saved
    clean = functools.partial(faces.training, degraded=False)

    for step, batch in run.batches(clean, "vae", first, steps):    # seeds torch by (seed, stage, step): resuming is bit-exact
        optimizer.zero_grad()
        for hq in random_crop(batch["hq"], cfg.image_size // 2).chunk(cfg.gradient_accumulation_steps):      # 256 of 512 px
            mean, logvar = vae.encode(hq)
            z = mean + (0.5 * logvar).exp() * torch.randn_like(mean)
            loss, parts = vae_loss(vae.decode(z), hq, mean, logvar, perceptual, cfg.perceptual_weight, cfg.kl_weight)
            (loss / cfg.gradient_accumulation_steps).backward()    # micro-batches add up their gradients
            run.note(loss=loss, **parts)
        run.average_gradients(modules)
        grad_norm = nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        for group in optimizer.param_groups:
            group["lr"] = cfg.vae_learning_rate * factor(step)
        optimizer.step()
        ema.update(step)
        run.log("vae", step, grad_norm=grad_norm)                  # stops a run whose loss is not finite
        run.save("vae", step, modules, ema, optimizer)             # every --checkpointing_steps

    vae.load_state_dict(ema["vae"])


def train_mmse(cfg, run, faces, nets):
    """Stage 2: the posterior mean, by least squares. With --source latent_mean the target is the latent."""
    mmse = nets["mmse"].train().requires_grad_(True)
    steps = min(cfg.mmse_steps, cfg.max_train_steps)
    optimizer, factor = make_optimizer(cfg, mmse.parameters(), cfg.mmse_learning_rate), lr_schedule(cfg, steps)
    modules = {"mmse": mmse}
    ema = EMA(modules, cfg.ema_decay)
    first, pieces = run.load("mmse", modules, ema, optimizer), cfg.gradient_accumulation_steps

    for step, batch in run.batches(faces.training, "mmse", first, steps):
        optimizer.zero_grad()
        for lq, hq in zip(batch["lq"].chunk(pieces), batch["hq"].chunk(pieces)):
            with run.autocast():
                estimate = mmse(lq * 0.5 + 0.5).float()
            if cfg.source == "latent_mean":
                loss = (estimate - nets["vae"].encode(hq)[0]).square().mean()
            else:
                loss = mmse_loss(estimate, hq * 0.5 + 0.5)
            (loss / pieces).backward()
            run.note(mse=loss)
        run.average_gradients(modules)
        grad_norm = nn.utils.clip_grad_norm_(mmse.parameters(), cfg.max_grad_norm)
        for group in optimizer.param_groups:
            group["lr"] = cfg.mmse_learning_rate * factor(step)
        optimizer.step()
        ema.update(step)
        run.log("mmse", step, grad_norm=grad_norm)
        run.save("mmse", step, modules, ema, optimizer)

    mmse.load_state_dict(ema["mmse"])


def train_flow(cfg, run, faces, nets):
    """Stage 3: a rectified flow carries the source (posterior mean) to the clean face; everything else is frozen."""
    flow = nets["flow"].train().requires_grad_(True)
    flow.gradient_checkpointing = cfg.gradient_checkpointing
    steps = min(cfg.flow_steps, cfg.max_train_steps)
    # Adam (0.9, 0.95) [sec. 6.1]: AdamW without decay (PMRF: 0.01). UNSTATED: gradients are clipped
    optimizer = make_optimizer(cfg, flow.parameters(), cfg.learning_rate, weight_decay=0.0)
    modules, factor = {"flow": flow}, lr_schedule(cfg, steps)
    ema = EMA(modules, cfg.ema_decay)
    first, pieces = run.load("flow", modules, ema, optimizer), cfg.gradient_accumulation_steps

    for step, batch in run.batches(faces.training, "flow", first, steps):
        # The two ends of the path: t = 0 a noisy latent of the posterior mean, t = 1 a latent of the clean face
        with torch.no_grad(), run.autocast():
            z0, _ = flow_source(nets, cfg, batch["lq"], torch.randn_like)
            if cfg.space == "latent":
                z1 = latent_source(nets["vae"], batch["hq"], cfg.source_sample, torch.randn_like)
            else:                                                  # PMRF
                z1 = batch["hq"] * 0.5 + 0.5
        z0 = z0.float() + cfg.source_noise * torch.randn_like(z0, dtype=torch.float32)
        t = stratified_time(len(z0), run.rank, run.world).to(run.device)

        # Match the velocity of the line between them
        optimizer.zero_grad()
        for a, b, s in zip(z0.chunk(pieces), z1.float().chunk(pieces), t.chunk(pieces)):
            with run.autocast():
                loss = cfm_loss(lambda z, when: flow(z, when).float(), a, b, s)              # [Eq. 3, 5]
            (loss / pieces).backward()
            run.note(cfm=loss)
        run.average_gradients(modules)
        grad_norm = nn.utils.clip_grad_norm_(flow.parameters(), cfg.max_grad_norm)
        for group in optimizer.param_groups:
            group["lr"] = cfg.learning_rate * factor(step)
        optimizer.step()
        ema.update(step)
        run.log("flow", step, grad_norm=grad_norm)
        run.save("flow", step, modules, ema, optimizer)

    flow.load_state_dict(ema["flow"])


def stages_of(cfg) -> list:
    """The stages of a configuration in order; each trains the network of its name."""
    return ["mmse", "flow"] if cfg.space == "pixel" else ["vae", "mmse", "flow"]


def built_on(cfg, part: str) -> list:
    """The parts that are trained on top of `part`: always the flow; the posterior mean if it predicts latents of the VAE."""
    later = [] if part == "flow" else ["flow"]
    return [*later, "mmse"] if part == "vae" and cfg.source == "latent_mean" else later


def train(cfg: Train) -> None:
    """The stages asked for, in order. Each is written when it ends, with pictures of what there is."""
    stages = stages_of(cfg)
    if cfg.stage not in ["all", *stages] or cfg.space == "pixel" and cfg.source == "latent_mean":
        raise UserError("--space pixel: has no stage vae and no --source latent_mean")
    run = Run(cfg, SETTINGS)
    faces, held = open_faces(cfg, mirror=True)
    nets = {stage: build(cfg, stage) for stage in stages}
    done = take_networks(cfg, run, nets)
    nets = {stage: net.to(run.device).eval().requires_grad_(False) for stage, net in nets.items()}
    run.compile(nets.values())
    for stage in stages if cfg.stage == "all" else [cfg.stage]:
        if stage in done:
            run.say(f"stage {stage}: taken as it is")
            continue
        {"vae": train_vae, "mmse": train_mmse, "flow": train_flow}[stage](cfg, run, faces, nets)
        nets[stage].eval().requires_grad_(False)
        given = [s for s in stages if getattr(cfg, s, "")]         # by --vae or --mmse: `sample` wants them too
        run.finish(stage, {s: nets[s].state_dict() for s in (*given, stage)}, later=built_on(cfg, stage))
        done = [s for s in stages if s in (*done, stage)]
        if run.main:
            found = restore_held_out(cfg, run, {s: nets[s] for s in done}, held.held_out(8))
            run.show(stage, {name: x for name, x in found.items() if x.shape[1] == 3})
    if run.main and done == stages:
        report(cfg, run, held, nets)


# ------------------------------------------------------------------------------------------------ networks, weights

def build(cfg, part: str) -> nn.Module:
    """The network of one part, in the sizes of a `Train` configuration."""
    sizes = SIZES[cfg.size]
    if part == "vae":
        return SimVAE(cfg.latent_channels, **sizes["vae"], **VAE_STYLES[cfg.vae_style])
    if part == "mmse":
        sizes = dict(sizes["mmse"])
        sizes |= dict(tokens=8 * -(-cfg.image_size // sizes["unshuffle"] // 8))              # padded to whole windows of 8
        if cfg.source == "latent_mean":
            sizes |= dict(residual=False, latent_channels=cfg.latent_channels)
        return SwinIR(**sizes)
    if cfg.space == "pixel":                                      # PMRF's network
        return HDiT(3, **sizes["pixel_flow"])
    return HDiT(cfg.latent_channels, **sizes["flow"])


def take_networks(cfg, run, nets: dict) -> list:
    """Fill `nets` with what --vae and --mmse name and with what --output holds already; returns the names of those."""
    done, new = [], set(nets)                                      # new: trained now, or given and not that of --output
    for part in nets:
        path = run.part(part)
        if getattr(cfg, part, ""):
            nets[part] = load_part(cfg, part, getattr(cfg, part))
            before = read_weights(path) if path else {}
            if all(torch.equal(tensor, before.get(name, tensor)) for name, tensor in nets[part].state_dict().items()):
                new.discard(part)
        elif path and not any(part in built_on(cfg, other) for other in new):
            load_strict(nets[part], read_weights(path), path)
            new.discard(part)
        elif cfg.stage in built_on(cfg, part):
            raise UserError(f"--stage {cfg.stage} needs {part}: train it first (--stage {part}), or give --{part}")
        else:
            continue
        done.append(part)
    return done


def load_part(cfg, part: str, where: str) -> nn.Module:
    """A released Sim-VAE or SwinIR, or that of another run's folder, in place of one that is trained here."""
    path = Path(where) / f"{part}.safetensors"
    if part == "mmse":
        return load_swinir(build(cfg, "mmse"), path if Path(where).is_dir() else where)
    if path.exists():
        _, before = open_run(where, Train)
        if before and before.vae_style != cfg.vae_style:                   # some styles have the same names
            raise UserError(f"--vae {where}: was trained with --vae_style {before.vae_style}, not {cfg.vae_style}")
        net = build(cfg, part)
        load_strict(net, read_weights(path), f"--{part} {where}")
        return net
    vae = load_sim_vae(where)
    if vae.decoder.conv_in.in_channels != cfg.latent_channels:
        raise UserError(f"--vae {where}: set --latent_channels {vae.decoder.conv_in.in_channels}, which it has")
    have, want = ([tensor.shape for tensor in net.state_dict().values()] for net in (vae, build(cfg, "vae")))
    if cfg.vae_style != "sim" or have != want:
        raise UserError(f"--vae {where}: a release has --vae_style sim, and other sizes than --size {cfg.size}")
    return vae


def weights_file(where: Path) -> Path:
    """The file itself, or the first one with weights in a folder."""
    kinds = ("*.safetensors", "*.bin", "*.ckpt")
    files = [where] if where.is_file() else [file for kind in kinds for file in sorted(where.glob(kind))]
    if not files:
        raise UserError(f"{where}: no weights there ({', '.join(kinds)})")
    return files[0]


def load_swinir(mmse: SwinIR, where) -> SwinIR:
    """Weights of a run or DifFace's into `mmse`. The masks of shifted windows belong to the picture's size: ours are kept."""
    state = {name.removeprefix("model."): tensor for name, tensor in read_weights(where).items()}
    masks = {name: t for name, t in mmse.state_dict().items() if name.endswith("attn_mask") and name in state}
    load_strict(mmse, state | masks, f"--mmse {where}")
    return mmse


def load_sim_vae(where: str) -> SimVAE:
    """The released Sim-VAE: a diffusers folder, its file, or a hub id. Widths and channels are read off the weights."""
    state = read_weights(weights_file(find_checkpoint(where, "vae")))
    state = {n: t.flatten() if ".norm." in n else t for n, t in state.items()}               # some files: (1, C, 1, 1)
    if "encoder.conv_out.bias" not in state:
        raise UserError(f"--vae {where}: not a Sim-VAE (no encoder.conv_out.bias in it)")
    first = [f"encoder.down_blocks.{i}.resnets.0.conv1.weight" for i in range(16)]
    vae = SimVAE(len(state["encoder.conv_out.bias"]) // 2, [state[name].shape[1] for name in first if name in state])
    load_strict(vae, state, f"--vae {where}")
    return vae


def load_pmrf(where: Path) -> dict:
    """PMRF's released blind-face model: `model.*` is the flow on pixels, `mmse_model.*` the SwinIR.

    A Lightning file also holds the averaged weights of the flow, a list in the order of its parameters: they are used.
    """
    raw = read_torch(weights_file(where))
    state, average = raw.get("state_dict", raw), raw.get("ema")
    nets = {"flow": HDiT(**HDIT_PMRF), "mmse": SwinIR()}
    for part, prefix in (("flow", "model."), ("mmse", "mmse_model.")):
        own = {n.removeprefix(prefix): t for n, t in state.items() if n.startswith(prefix)}
        load_strict(nets[part], own, f"--checkpoint {where}, {prefix}*")
    average = average.get("shadow_params") if isinstance(average, dict) else average
    if average:
        for parameter, shadow in zip(nets["flow"].parameters(), average, strict=True):
            parameter.data.copy_(shadow.view_as(parameter))
    return nets


# ------------------------------------------------------------------------------------------------ restore, measure

@torch.no_grad()
def restore_held_out(cfg, run, nets, batch) -> dict:
    """What the finished networks make of held-out faces: {name: (N, 3, S, S) on the CPU}, in batches.

    `latents` (N, c, h, w) and `reconstruction` are of the clean faces, `bound` is the posterior mean coded and decoded.
    """
    rng, found = torch.Generator().manual_seed(cfg.seed), {"lq": [batch["lq"]]}
    noise = lambda like: torch.randn(like.shape, generator=rng).to(like)
    for lq, hq in zip(batch["lq"].split(cfg.batch_size), batch["hq"].split(cfg.batch_size)):
        result, lq, hq = {}, lq.to(run.device), hq.to(run.device)
        if "vae" in nets:
            result["latents"] = nets["vae"].encode(hq)[0]
            result["reconstruction"] = nets["vae"].decode(result["latents"]).clamp(-1, 1)
        if "flow" in nets:
            result |= restore(nets, cfg, lq, noise, cfg.num_inference_steps)
        elif "mmse" in nets and cfg.source == "encode_mean":
            result["posterior_mean"] = posterior_mean(nets["mmse"], lq)
        if "vae" in nets and "posterior_mean" in result and cfg.source == "encode_mean":
            result["bound"] = nets["vae"].decode(nets["vae"].encode(result["posterior_mean"])[0]).clamp(-1, 1)
        for name, images in result.items():
            found.setdefault(name, []).append(images.cpu())
    return {**{name: torch.cat(images) for name, images in found.items()}, "hq": batch["hq"]}


def report(cfg, run, held, nets) -> None:
    """Restore faces of people the networks never saw, and measure them."""
    batch = held.held_out(cfg.validation_faces)
    found, reader = restore_held_out(cfg, run, nets, batch), metrics.load_reader("b", cfg.readers)
    shown = [name for name in ("lq", "posterior_mean", "restored_faces") if name in found]
    rows = {name: metrics.toy_scores(found[name], found["hq"], reader) for name in shown}
    count = len(batch["hq"])
    more = dict(faces=count, protocol=metrics.toy_protocol(held.folder, cfg.degradation, count, cfg.readers))
    if "vae" in nets:
        rows["reconstruction"] = metrics.toy_scores(found["reconstruction"], found["hq"], reader)
        if "bound" in found:                                       # option 2 [Eq. 4]
            more["bound_psnr"] = metrics.mean_psnr(found["bound"], found["posterior_mean"])
        length = found["latents"].norm(dim=1).flatten(1)
        more["latent_peak"] = (length.amax(1) / length.mean(1)).mean().item()                # outliers [Figure 4]
    run.report(rows, {name: found[name] for name in (*shown, "hq")}, nets, **more)


def load_networks(cfg: Sample) -> tuple:
    """(nets, Train configuration) for `sample`: a training run, or PMRF's release; --vae and --mmse replace its parts.

    A part that the run's folder lacks is where the run took it from.
    """
    folder, trained = open_run(cfg.checkpoint, Train)
    if trained is None:
        if cfg.vae or cfg.mmse:
            raise UserError("--vae, --mmse: PMRF's release has its own SwinIR, and no VAE")
        return load_pmrf(folder), Train(space="pixel")
    nets = {}
    for part in stages_of(trained):
        there = (folder / f"{part}.safetensors").exists()
        if where := getattr(cfg, part, "") or ("" if there else getattr(trained, part, "")):
            nets[part] = load_part(trained, part, where)
        else:
            nets[part] = build(trained, part)
            load_strict(nets[part], read_weights(folder / f"{part}.safetensors"), f"--checkpoint {cfg.checkpoint}, {part}")
    return nets, trained


def sample(cfg: Sample) -> None:
    """Restore a picture or a folder with trained weights, into --output."""
    run = Run(cfg)
    nets, trained = load_networks(cfg)
    nets = {part: net.to(run.device).eval() for part, net in nets.items()}
    run.compile(nets.values())

    def restore_batch(lq, names):
        # Every face gets the same noise, so that its result depends on the seed and not on its place in the folder.
        rng = torch.Generator().manual_seed(cfg.seed)
        noise = lambda like: torch.randn(like.shape[1:], generator=rng).to(like).expand_as(like)
        with run.autocast():
            return restore(nets, trained, lq, noise, cfg.num_inference_steps or trained.num_inference_steps)

    restore_folder(cfg, restore_batch, trained.image_size, run.device)


VERBS = {"train": (Train, {"toy": TOY_VALUES, "small": SMALL, "paper": {}}, train), "sample": (Sample, {}, sample)}

if __name__ == "__main__":
    command_line(__doc__, VERBS)
