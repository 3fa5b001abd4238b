"""Numbers that say how good a restored face is, and the networks that measure faces.

    full reference    psnr, ssim, ms_ssim, lpips_distance, DISTS       two images in [0, 1] -> one number per image
    distributions     frechet_distance, mmd_rbf                        two sets of features (N, D)
    faces             identity_angle, identity_similarity, landmark_distance, affine_fit, affine_landmark_distance, ind_rmse
    real networks     ArcFaceGray, IResNet, FAN98, FaRLAttributes      released parameter names: `load_weights` is the loader
    toy network       FaceReader, load_reader                          stands in for all four where nothing can be downloaded
    whole sets        toy_scores; `python metrics.py RESTORED --reference DIR [--weights DIR]`

The four real networks and FaceReader share their calls, so that one can replace another: `embed(x)` -> unit vectors,
`landmarks(x)` -> (B, 98, 2) pixels of x, `heatmaps(x)`, `probabilities(x)`; x is (B, 3, S, S) RGB in [-1, 1] of any size,
and each network converts range, colour, crop and size inside. A network's own `forward` takes what its authors feed it.

Numbers read by a FaceReader end in `_toy`: they compare runs of this project with each other and with nothing else.
Sources: HonestFace v1 (Eq. 14-15), DISTS (arXiv 2004.07728), AdaFace, AdaptiveWingLoss, FaRL, VQFR's scripts, pyiqa's names.
"""
import functools
import json
import math
import re
import sys
import typing
from collections import OrderedDict
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import lpips
import safetensors.torch
import torch
import torch.nn as nn
import torch.nn.functional as F
import torchvision

from common import (ATTRIBUTES, DEGRADATIONS, TOY_SPLITS, Degradation, Run, Stage, TrainFlags, UserError, command_line, degrade,
                    list_images, load_strict, mix, pick_device, read_image, read_weights, toy_faces, versions, whole_file)

# ------------------------------------------------------------------------------------------------ full reference


def same_images(a, b):
    """ValueError unless a and b are both (B, C, H, W) of one shape."""
    if a.dim() != 4 or a.shape != b.shape:
        raise ValueError(f"wants two batches (B, C, H, W) of one shape, got {tuple(a.shape)} and {tuple(b.shape)}")


def psnr(a, b):
    """10 log10(1 / MSE) over the RGB pixels: (B, 3, H, W) x 2 in [0, 1] -> (B,) dB; inf where the images are equal."""
    same_images(a, b)
    return -10 * (a - b).square().flatten(1).mean(1).log10()


def luma(x):
    """(B, 3, H, W) RGB -> (B, 1, H, W), BT.601 weights, full range: the Y of pyiqa's SSIM (YIQ, not studio-range YCbCr)."""
    return (x * x.new_tensor([0.299, 0.587, 0.114]).view(3, 1, 1)).sum(1, keepdim=True)


def ssim_maps(a, b):
    """SSIM and its contrast-structure factor, both (B, C, H-10, W-10): Gaussian window 11, sigma 1.5, no padding."""
    x = torch.arange(11, dtype=a.dtype, device=a.device) - 5
    window = torch.exp(-x.square() / (2 * 1.5**2))
    window = (window / window.sum()).expand(a.shape[1], 1, 1, 11)

    def blur(v):  # separable, one channel at a time
        return F.conv2d(F.conv2d(v, window, groups=v.shape[1]), window.transpose(2, 3), groups=v.shape[1])

    mu_a, mu_b = blur(a), blur(b)
    var_a, var_b, cov = blur(a * a) - mu_a**2, blur(b * b) - mu_b**2, blur(a * b) - mu_a * mu_b
    structure = (2 * cov + 0.03**2) / (var_a + var_b + 0.03**2)
    return structure * (2 * mu_a * mu_b + 0.01**2) / (mu_a**2 + mu_b**2 + 0.01**2), structure


def ssim(a, b, y_channel=True):
    """Structural similarity [Wang et al. 2004]: (B, 3, H, W) x 2 in [0, 1] -> (B,), 1 for equal images.

    Mean of the map over valid windows; on luma as pyiqa's `ssim`, or averaged over RGB. ValueError below 11 px.
    DIFFERS: pyiqa rounds luma to 8 bits first (changes the fourth digit).
    """
    same_images(a, b)
    if min(a.shape[-2:]) < 11:
        raise ValueError(f"ssim needs images of at least 11 px, got {tuple(a.shape[-2:])}")
    a, b = (luma(a), luma(b)) if y_channel else (a, b)
    return ssim_maps(a, b)[0].flatten(1).mean(1)


def ms_ssim(a, b, scales=5, y_channel=True):
    """Multi-scale SSIM, product form [Wang et al. 2003]: (B, 3, H, W) x 2 in [0, 1] -> (B,).

    prod_j mean(structure_j)^w_j * mean(SSIM_M)^w_M, halved by 2x2 means between scales. Five scales need 176 px; with
    fewer, the first weights are used, rescaled to sum 1, and the number is another measure. ValueError if too small.
    """
    same_images(a, b)
    fits = 1 + int(math.log2(max(1.0, min(a.shape[-2:]) / 11)))
    if min(a.shape[-2:]) < 11 or not 1 <= scales <= min(5, fits):
        raise ValueError(f"images of {tuple(a.shape[-2:])} allow 1 to {min(5, fits)} scales, asked for {scales}")
    weights = a.new_tensor([0.0448, 0.2856, 0.3001, 0.2363, 0.1333])[:scales]
    a, b = (luma(a), luma(b)) if y_channel else (a, b)
    factors = []
    for scale in range(scales):
        full, structure = ssim_maps(a, b)
        factors.append((full if scale == scales - 1 else structure).flatten(1).mean(1).clamp(min=0))
        a, b = [F.avg_pool2d(v, 2) for v in (a, b)]
    return (torch.stack(factors, 1) ** (weights / weights.sum())).prod(1)


def backbone_file(name, folder=""):
    """The file of torchvision's vgg16 or alexnet in `folder`, else in torch hub's cache. UserError names what is missing."""
    for place in ([Path(folder)] if folder else []) + [Path(torch.hub.get_dir()) / "checkpoints"]:
        for path in sorted(place.glob(f"{name}*.pth")):
            return path
    known = {"alexnet": "alexnet-owt-7be5be79.pth", "vgg16": "vgg16-397923af.pth"}[name]
    raise UserError(f"{known} (torchvision's {name}) is needed and is neither in {folder or 'a given folder'} nor in torch hub's cache")


def lpips_network(net="alex", backbone=""):
    """lpips.LPIPS v0.1 with its trained heads; `net` alex (pyiqa's `lpips`) or vgg (the usual loss, VQFR's metric).

    backbone: file of torchvision's alexnet or vgg16 weights, default torch hub's cache; nothing is ever downloaded.
    Call it with images in [-1, 1] as a loss, or through `lpips_distance`. UserError if the backbone is absent.
    """
    path = backbone or backbone_file({"alex": "alexnet", "vgg": "vgg16"}[net])
    network, state = lpips.LPIPS(net=net, pnet_rand=True, verbose=False), read_weights(path)  # pnet_rand: do not download
    # lpips calls the layer features.5 of torchvision slice2.5
    wanted = {name: "features." + name.split(".", 1)[1] for name in network.net.state_dict()}
    load_strict(network.net, {name: state[source] for name, source in wanted.items() if source in state}, path)
    return network.eval().requires_grad_(False)


def lpips_distance(a, b, network=None):
    """LPIPS [Zhang et al. 2018]: (B, 3, H, W) x 2 in [0, 1] -> (B,); network of `lpips_network` (default alex)."""
    same_images(a, b)
    network = network or lpips_network().to(a.device)
    return network(2 * a - 1, 2 * b - 1).flatten()


class L2Pool(nn.Module):
    """sqrt(blur(x^2)) at stride 2: DISTS's pooling, a Hann window of 3 x 3 with zeros outside [DISTS Eq. 4]."""

    def forward(self, x):  # (B, C, H, W) -> (B, C, ceil(H / 2), ceil(W / 2))
        hann = x.new_tensor([0.25, 0.5, 0.25])
        window = (hann[:, None] * hann).expand(x.shape[1], 1, 3, 3)
        return (F.conv2d(x.square(), window, stride=2, padding=1, groups=x.shape[1]) + 1e-12).sqrt()


class DISTS(nn.Module):
    """Deep image structure and texture similarity: (B, 3, H, W) x 2 in [0, 1] -> (B,), 0 for equal images, symmetric.

    D = 1 - sum_c (alpha_c l_c + beta_c s_c) over the channels of the image itself and of VGG16's relu1_2 ... relu5_3, with
    l = (2 mu_a mu_b + c) / (mu_a^2 + mu_b^2 + c) for texture and s = (2 cov + c) / (var_a + var_b + c) for structure.
    [DISTS Eq. 5-7, released code.] weights: the authors' weights.pt (keys alpha, beta); without it every stage gets its
    trained total in equal parts, an approximation. vgg_weights: file of torchvision's vgg16; without it the features are
    random (`pretrained` is False) and the number is a texture distance of this run only. The side is not resized to 256.
    """
    TAPS = {3: 64, 8: 128, 15: 256, 22: 512, 29: 512}  # index in VGG16's features -> channels
    ALPHA = (0.0632, 0.0386, 0.0779, 0.1531, 0.2747, 0.2686)  # sums of the trained weights per stage
    BETA = (0.0616, 0.0001, 0.0007, 0.0024, 0.0020, 0.0572)

    def __init__(self, weights=None, vgg_weights=None):
        super().__init__()
        layers = torchvision.models.vgg.make_layers(torchvision.models.vgg.cfgs["D"])[:30]
        self.features = nn.Sequential(*[L2Pool() if isinstance(m, nn.MaxPool2d) else m for m in layers])
        self.pretrained = vgg_weights is not None
        if self.pretrained:
            state = {k.removeprefix("features."): v for k, v in read_weights(vgg_weights).items() if k.startswith("features.")}
            load_strict(self.features, state, vgg_weights)
        sizes = (3, *self.TAPS.values())
        spread = [torch.cat([torch.full((n,), s / n) for s, n in zip(sums, sizes)]) for sums in (self.ALPHA, self.BETA)]
        self.register_buffer("alpha", spread[0].view(1, -1, 1, 1))  # (1, 1475, 1, 1), as released
        self.register_buffer("beta", spread[1].view(1, -1, 1, 1))
        if weights is not None:
            state = read_weights(weights)
            load_strict(self, {**{f"features.{k}": v for k, v in self.features.state_dict().items()}, **state}, weights)
        self.eval().requires_grad_(False)

    def stages(self, x):
        """[(B, 3, H, W), (B, 64, H, W), (B, 128, H/2, W/2), ...], six of them; the first is x itself."""
        mean, std = x.new_tensor([[0.485, 0.456, 0.406], [0.229, 0.224, 0.225]]).view(2, 3, 1, 1)
        found, h = [x], (x - mean) / std
        for index, layer in enumerate(self.features):
            h = layer(h)
            if index in self.TAPS:
                found.append(h)
        return found

    def forward(self, a, b):
        same_images(a, b)
        texture, structure = [], []
        for x, y in zip(self.stages(a), self.stages(b)):
            mu_x, mu_y = x.mean((2, 3)), y.mean((2, 3))  # (B, C)
            var_x, var_y = x.var((2, 3), correction=0), y.var((2, 3), correction=0)
            cov = (x * y).mean((2, 3)) - mu_x * mu_y
            texture.append((2 * mu_x * mu_y + 1e-6) / (mu_x**2 + mu_y**2 + 1e-6))
            structure.append((2 * cov + 1e-6) / (var_x + var_y + 1e-6))
        total = self.alpha.sum() + self.beta.sum()
        score = torch.cat(texture, 1) * self.alpha.flatten() + torch.cat(structure, 1) * self.beta.flatten()
        return 1 - score.sum(1) / total


# ------------------------------------------------------------------------------------------------ distributions


def frechet_distance(x, y):
    """FID's formula |mu_x - mu_y|^2 + tr(Sx + Sy - 2 (Sx Sy)^(1/2)) on features (N, D), (M, D) -> scalar, float64.

    With roots Sx = Rx^T Rx, Sy = Ry^T Ry (QR of the centred features), the trace of (Sx Sy)^(1/2) is the sum of the
    singular values of Rx Ry^T: no matrix square root, no epsilon, and nothing breaks when N < D. [Heusel et al. 2017]
    ValueError below two rows. Biased upwards for few rows: compare sets of equal N only.
    """
    if x.dim() != 2 or y.dim() != 2 or x.shape[1] != y.shape[1] or min(len(x), len(y)) < 2:
        raise ValueError(f"wants features (N, D) and (M, D), N, M >= 2, got {tuple(x.shape)} and {tuple(y.shape)}")
    x, y = x.double(), y.double()
    roots = [torch.linalg.qr((v - v.mean(0)) / (len(v) - 1) ** 0.5, mode="r")[1] for v in (x, y)]  # (min(N, D), D)
    cross = torch.linalg.svdvals(roots[0] @ roots[1].T).sum()
    spread = roots[0].square().sum() + roots[1].square().sum()
    return ((x.mean(0) - y.mean(0)).square().sum() + spread - 2 * cross).clamp(min=0)


def mmd_rbf(x, y, sigma=10.0, scale=1000.0):
    """scale * (mean k(x, x) + mean k(y, y) - 2 mean k(x, y)), k = exp(-|a - b|^2 / (2 sigma^2)); (N, D), (M, D) -> scalar.

    Biased V-statistic (diagonals count), float64, 1024 rows at a time. Defaults of CMMD [Jayasumana et al. 2024], which
    Latent-PMRF applies to DINOv2 features.
    """
    x, y = x.double(), y.double()

    def kernel(a, b):
        sums = [torch.exp(-torch.cdist(part, b).square() / (2 * sigma**2)).sum() for part in a.split(1024)]
        return sum(sums) / (len(a) * len(b))

    return scale * (kernel(x, x) + kernel(y, y) - 2 * kernel(x, y))


# ------------------------------------------------------------------------------------------------ faces

# WFLW-98; "left" is the left of the picture. UNSTATED: HonestFace names the sets of A-LD without their points. 34 and 20
# points reproduce the ratio of its two columns, and the square root of Eq. 14 reproduces their size.
EYES_AND_BROWS = tuple(range(33, 51)) + tuple(range(60, 76))
MOUTH = tuple(range(76, 96))
LEFT_EYE, RIGHT_EYE = tuple(range(60, 68)), tuple(range(68, 76))
# Each of the 98 points as the mean of two of the 68 points of iBUG (brows: their middle line, pupils: between the corners).
FROM_68 = (tuple((k // 2, (k + 1) // 2) for k in range(33)) + tuple((k, k) for k in (17, 18, 19, 20, 21, 21, 20, 19, 18))
           + tuple((k, k) for k in (22, 23, 24, 25, 26, 25, 24, 23, 22)) + tuple((k, k) for k in range(27, 36))
           + ((36, 36), (37, 37), (37, 38), (38, 38), (39, 39), (40, 40), (40, 41), (41, 41))
           + ((42, 42), (43, 43), (43, 44), (44, 44), (45, 45), (46, 46), (46, 47), (47, 47))
           + tuple((k, k) for k in range(48, 68)) + ((36, 39), (42, 45)))


def identity_similarity(e1, e2):
    """Cosine of embeddings (..., D) of any length -> (...), in [-1, 1] (IDS of CodeFormer and DifFace)."""
    return F.cosine_similarity(e1, e2, dim=-1).clamp(-1, 1)


def identity_angle(e1, e2):
    """Angle between embeddings (..., D) of any length -> (...) in degrees, 0..180 ("Deg." of VQFR).

    2 atan2(|u - v|, |u + v|) for unit u, v: arccos of the cosine, but exact near 0 and never NaN.
    """
    u, v = F.normalize(e1, dim=-1), F.normalize(e2, dim=-1)
    return torch.rad2deg(2 * torch.atan2((u - v).norm(dim=-1), (u + v).norm(dim=-1)))


def landmark_distance(a, b):
    """LMD: mean Euclidean distance of points (..., K, 2) x 2 -> (...), in their unit (papers: pixels at 512)."""
    if a.shape != b.shape or a.shape[-1] != 2:
        raise ValueError(f"wants points (..., K, 2) twice, got {tuple(a.shape)} and {tuple(b.shape)}")
    return (a - b).norm(dim=-1).mean(-1)


def affine_normal_form(L, H, weights):
    """Solve Eq. 14 in centred, scaled float64 coordinates. Returns the 2x2 part, both centres, weights and H's residual."""
    if L.shape[-1] != 2 or L.shape != H.shape or L.shape[-2] < 1:
        raise ValueError(f"wants points (..., K, 2) twice, got {tuple(L.shape)} and {tuple(H.shape)}")
    w = torch.ones(L.shape[:-1]) if weights is None else torch.as_tensor(weights)
    w = w.to(L.device, torch.float64).expand(L.shape[:-1])
    if (w < 0).any():
        raise ValueError("weights of landmarks must not be negative")
    # In pixels the Gram matrix of Eq. 15 has condition 1e7; centred and scaled to unit size it has about 25.
    tolerance = 1e-9 if L.dtype == torch.float64 else 1e-5
    total = w.sum(-1, keepdim=True).clamp(min=1e-300)[..., None]
    centre_l, centre_h = [(w[..., None] * p.double()).sum(-2, keepdim=True) / total for p in (L, H)]  # (..., 1, 2)
    l, h = L.double() - centre_l, H.double() - centre_h
    size = ((w[..., None] * l.square()).sum((-2, -1), keepdim=True) / total).sqrt().detach().clamp(min=1e-12)
    root = w.sqrt()[..., None]
    # The pseudo-inverse gives a minimiser where the points lie on a line or coincide and A is not unique.
    matrix = (torch.linalg.pinv(root * l / size, rtol=tolerance) @ (root * h)).mT / size  # (..., 2, 2)
    return matrix, centre_l, centre_h, w, l @ matrix.mT - h


def affine_fit(L, H, weights=None):
    """A* = H W L'^T (L' W L'^T)^-1 with l' = (x, y, 1) [Eq. 15]: points (..., K, 2) x 2 -> (..., 2, 3), type of L.

    The affine map of L that comes nearest to H. weights (K,) or (..., K) >= 0, default 1; a zero drops its point. Where
    the points are collinear or fewer than three Eq. 15 has no inverse, and the minimiser of least norm is returned.
    """
    matrix, centre_l, centre_h, *_ = affine_normal_form(L, H, weights)
    return torch.cat([matrix, centre_h.mT - matrix @ centre_l.mT], -1).to(L.dtype)


def affine_landmark_distance(L, H, weights=None):
    """A-LD: d(L, H; W) = min_A sum_k w_k |A l'_k - h_k|^2 [Eq. 14]: points (..., K, 2) x 2 -> (...), squared unit of H.

    Not symmetric: measured in the frame of H, blind to any affine change of L (pose, scale, even a mirror). Stable for
    collinear points; differentiable where they are not. DIFFERS: tables report its square root (see EYES_AND_BROWS).
    """
    *_, w, residual = affine_normal_form(L, H, weights)
    return (w * residual.square().sum(-1)).sum(-1).to(L.dtype)


def ind_rmse(restored, estimate):
    """IndRMSE: RMSE against the posterior mean, which stands for the unknown truth: (B, 3, H, W) x 2 in [0, 1] -> (B,).

    Latent-PMRF averages these roots over images. DIFFERS from PMRF's script, the root of the mean over images, in 0..255.
    """
    same_images(restored, estimate)
    return (restored - estimate).square().flatten(1).mean(1).sqrt()


def five_points(landmarks98):
    """Left eye, right eye, nose tip, left and right mouth corner from WFLW-98 points: (..., 98, 2) -> (..., 5, 2)."""
    eyes = [landmarks98[..., list(eye), :].mean(-2) for eye in (LEFT_EYE, RIGHT_EYE)]
    return torch.stack([*eyes, *landmarks98[..., [54, 76, 82], :].unbind(-2)], -2)


def decode_heatmaps(heatmaps, size):
    """(B, K, h, w) -> (B, K, 2) points in pixels of an image of `size` (side, or (height, width)).

    Cell of the maximum, a quarter cell towards its larger neighbour in x and in y, the centre of a cell at +0.5 [AWing].
    DIFFERS: neighbours beyond the border repeat it; in the released code one border point disturbs all the others.
    """
    height, width = (size, size) if isinstance(size, int) else size
    h, w = heatmaps.shape[-2:]
    flat = heatmaps.flatten(2)
    at = flat.argmax(-1)
    x, y = at % w, at // w

    def value(column, row):
        return flat.gather(2, (row.clamp(0, h - 1) * w + column.clamp(0, w - 1))[..., None])[..., 0]

    dx, dy = (value(x + 1, y) - value(x - 1, y)).sign(), (value(x, y + 1) - value(x, y - 1)).sign()
    return torch.stack([(x + 0.5 + 0.25 * dx) * width / w, (y + 0.5 + 0.25 * dy) * height / h], -1)


# ------------------------------------------------------------------------------------------------ networks that measure faces


def resized(x, side, antialias=False):
    """(B, C, H, W) -> (B, C, side, side), bilinear, pixel centres at +0.5; not antialiased, as cv2 and GFPGAN do it."""
    if x.shape[-2:] == (side, side):
        return x
    return F.interpolate(x, (side, side), mode="bilinear", align_corners=False, antialias=antialias)


def load_weights(module, path):
    """Released weights into `module`, every name and shape checked; returns the module in eval mode.

    .pth, .pt, .ckpt or .safetensors; tensors only, no code is run. Unwraps state_dict/params/params_ema/model and takes off
    `module.` and `model.` (a Lightning file keeps its network under `model.` beside a head that is not wanted).
    UserError, one line: missing, damaged or of another network.
    """
    state = read_weights(path)
    if any(name.startswith("model.") for name in state):
        state = {name.removeprefix("model."): v for name, v in state.items() if name.startswith("model.")}
    own = module.state_dict()
    counters = {n: v for n, v in own.items() if n.endswith("num_batches_tracked")}  # absent in files older than torch 0.4.1
    load_strict(module, {**counters, **state}, path)
    return module.eval()


class GrayBlock(nn.Module):
    """x -> PReLU(shortcut(x) + BN conv PReLU BN conv BN(x)); one PReLU serves twice [arcface-pytorch's IRBlock]."""

    def __init__(self, width, out, stride):
        super().__init__()
        self.bn0 = nn.BatchNorm2d(width)
        self.conv1 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.prelu = nn.PReLU()
        self.conv2 = nn.Conv2d(width, out, 3, stride, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(out)
        if stride != 1 or width != out:
            self.downsample = nn.Sequential(nn.Conv2d(width, out, 1, stride, bias=False), nn.BatchNorm2d(out))

    def forward(self, x):
        h = self.bn2(self.conv2(self.prelu(self.bn1(self.conv1(self.bn0(x))))))
        return self.prelu(h + (self.downsample(x) if hasattr(self, "downsample") else x))


class ArcFaceGray(nn.Module):
    """ResNet-18 on grey faces, (B, 1, 128, 128) in [-1, 1] -> (B, 512): the network behind "Deg." and GFPGAN's identity loss.

    Files: resnet18_110.pth (VQFR), arcface_resnet18.pth (GFPGAN).
    """

    def __init__(self):
        super().__init__()
        self.conv1 = nn.Conv2d(1, 64, 3, padding=1, bias=False)
        self.bn1, self.prelu = nn.BatchNorm2d(64), nn.PReLU()
        self.maxpool = nn.MaxPool2d(2)
        for k, (width, out, stride) in enumerate(((64, 64, 1), (64, 128, 2), (128, 256, 2), (256, 512, 2)), 1):
            setattr(self, f"layer{k}", nn.Sequential(GrayBlock(width, out, stride), GrayBlock(out, out, 1)))
        self.bn4, self.dropout = nn.BatchNorm2d(512), nn.Dropout()
        self.fc5, self.bn5 = nn.Linear(512 * 8 * 8, 512), nn.BatchNorm1d(512)

    def forward(self, x):
        x = self.maxpool(self.prelu(self.bn1(self.conv1(x))))                     # (B, 64, 64, 64)
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))                 # (B, 512, 8, 8)
        return self.bn5(self.fc5(self.dropout(self.bn4(x)).flatten(1)))

    def embed(self, x):
        """(B, 3, S, S) aligned faces in [-1, 1] -> (B, 512) unit vectors. The whole picture in grey at 128 px, no crop [VQFR]."""
        gray = (x * x.new_tensor([0.2989, 0.5870, 0.1140]).view(3, 1, 1)).sum(1, keepdim=True)
        return F.normalize(self(resized(gray, 128)))


class IRBlock(nn.Module):
    """x -> shortcut(x) + BN conv(stride) PReLU BN conv BN(x), no activation after [AdaFace's BasicBlockIR]."""

    def __init__(self, width, out, stride):
        super().__init__()
        self.shortcut_layer = nn.MaxPool2d(1, stride) if width == out else nn.Sequential(
            nn.Conv2d(width, out, 1, stride, bias=False), nn.BatchNorm2d(out))
        self.res_layer = nn.Sequential(
            nn.BatchNorm2d(width), nn.Conv2d(width, out, 3, 1, 1, bias=False), nn.BatchNorm2d(out), nn.PReLU(out),
            nn.Conv2d(out, out, 3, stride, 1, bias=False), nn.BatchNorm2d(out))

    def forward(self, x):
        return self.res_layer(x) + self.shortcut_layer(x)


class IResNet(nn.Module):
    """IR-18/34/50/101 of AdaFace and TFace: (B, 3, 112, 112) in [-1, 1] -> (B, 512), not normalised.

    AdaFace's pair (unit vector, norm) is `embed_with_norm`. bgr: AdaFace's weights expect BGR, ArcFace's RGB; the wrong
    order costs accuracy without any error, so it is an argument. ValueError for another depth.
    """
    UNITS = {18: (2, 2, 2, 2), 34: (3, 4, 6, 3), 50: (3, 4, 14, 3), 101: (3, 13, 30, 3)}

    def __init__(self, depth=50, bgr=False):
        super().__init__()
        if depth not in self.UNITS:
            raise ValueError(f"IResNet depth must be one of {sorted(self.UNITS)}, got {depth}")
        self.bgr = bgr
        self.input_layer = nn.Sequential(nn.Conv2d(3, 64, 3, 1, 1, bias=False), nn.BatchNorm2d(64), nn.PReLU(64))
        blocks, width = [], 64
        for out, units in zip((64, 128, 256, 512), self.UNITS[depth]):
            for k in range(units):  # the first unit of every stage halves the resolution, the first stage's too
                blocks.append(IRBlock(width, out, 2 if k == 0 else 1))
                width = out
        self.body = nn.Sequential(*blocks)
        self.output_layer = nn.Sequential(nn.BatchNorm2d(512), nn.Dropout(0.4), nn.Flatten(), nn.Linear(512 * 7 * 7, 512),
                                          nn.BatchNorm1d(512, affine=False))

    def forward(self, x):
        return self.output_layer(self.body(self.input_layer(x)))

    def embed_with_norm(self, x):
        """(B, 3, S, S) FFHQ-aligned faces in [-1, 1] -> unit vectors (B, 512) and their norms before (B, 1)."""
        x = crop_112(x)
        feature = self(x.flip(1) if self.bgr else x)
        return F.normalize(feature), feature.norm(dim=1, keepdim=True)

    def embed(self, x):
        """(B, 3, S, S) FFHQ-aligned faces in [-1, 1] -> (B, 512) unit vectors."""
        return self.embed_with_norm(x)[0]


CROP_112 = (65, 61, 448, 445)  # left, top, right, bottom of ArcFace's 112 px template in the 512 px FFHQ template


def crop_112(x):
    """ArcFace's crop of FFHQ-aligned faces: (B, 3, S, S) -> (B, 3, 112, 112), a fixed box, differentiable, antialiased.

    The least-squares similarity between both five-point templates is this box to within 0.01 degree of rotation.
    """
    left, top, right, bottom = [round(v * x.shape[-1] / 512) for v in CROP_112]
    return resized(x[..., top:bottom, left:right], 112, antialias=True)


class CoordConv(nn.Module):
    """Convolution that also sees where it is: rows, columns, radius, and both again where the last face outline was.

    The released code swaps the axes: its "x" varies along rows. Trained so, kept so.
    """

    def __init__(self, channels, out, kernel, stride=1, padding=0, outline=False):
        super().__init__()
        self.conv = nn.Conv2d(channels + (5 if outline else 3), out, kernel, stride, padding)

    def forward(self, x, heatmaps=None):
        b, _, h, w = x.shape
        rows, columns = [torch.linspace(-1, 1, n, device=x.device, dtype=x.dtype) for n in (h, w)]
        rows, columns = rows.view(1, 1, h, 1).expand(b, 1, h, w), columns.view(1, 1, 1, w).expand(b, 1, h, w)
        radius = (rows**2 + columns**2).sqrt()
        parts = [x, rows, columns, radius / radius.amax()]
        if heatmaps is not None:
            inside = (heatmaps[:, -1:].clamp(0, 1) > 0.05).to(x.dtype)
            parts += [rows * inside, columns * inside]
        return self.conv(torch.cat(parts, 1))


class FANBlock(nn.Module):
    """Hierarchical block of FAN: three 3x3 convolutions in a row, all three results concatenated, plus the input."""

    def __init__(self, width, out):
        super().__init__()
        self.bn1, self.conv1 = nn.BatchNorm2d(width), nn.Conv2d(width, out // 2, 3, padding=1, bias=False)
        self.bn2, self.conv2 = nn.BatchNorm2d(out // 2), nn.Conv2d(out // 2, out // 4, 3, padding=1, bias=False)
        self.bn3, self.conv3 = nn.BatchNorm2d(out // 4), nn.Conv2d(out // 4, out // 4, 3, padding=1, bias=False)
        if width != out:
            self.downsample = nn.Sequential(nn.BatchNorm2d(width), nn.ReLU(), nn.Conv2d(width, out, 1, bias=False))

    def forward(self, x):
        a = self.conv1(F.relu(self.bn1(x)))
        b = self.conv2(F.relu(self.bn2(a)))
        c = self.conv3(F.relu(self.bn3(b)))
        return torch.cat([a, b, c], 1) + (self.downsample(x) if hasattr(self, "downsample") else x)


class Hourglass(nn.Module):
    """(B, 256, 64, 64) -> same: four halvings and back, a block on each way and on each skip."""

    def __init__(self, first):
        super().__init__()
        self.coordconv = CoordConv(256, 256, 1, outline=not first)
        for level in (4, 3, 2, 1):
            for name in ("b1", "b2", "b3") + (("b2_plus",) if level == 1 else ()):
                self.add_module(f"{name}_{level}", FANBlock(256, 256))

    def level(self, k, x):
        low = getattr(self, f"b2_{k}")(F.avg_pool2d(x, 2))
        low = self.level(k - 1, low) if k > 1 else self.b2_plus_1(low)
        low = getattr(self, f"b3_{k}")(low)
        return getattr(self, f"b1_{k}")(x) + F.interpolate(low, scale_factor=2, mode="nearest")

    def forward(self, x, heatmaps):
        return self.level(4, self.coordconv(x, heatmaps))


class FAN98(nn.Module):
    """Four stacked hourglasses of AdaptiveWingLoss: (B, 3, 256, 256) RGB in [0, 1] -> heatmaps (B, 98, 64, 64), peaks near 1.

    File: alignment_WFLW_4HG.pth of facexlib. `stacks` returns what the authors return: 4 x (B, 99, 64, 64), the last
    channel being the outline of the face.
    """

    def __init__(self):
        super().__init__()
        self.conv1, self.bn1 = CoordConv(3, 64, 7, 2, 3), nn.BatchNorm2d(64)
        self.conv2, self.conv3, self.conv4 = FANBlock(64, 128), FANBlock(128, 128), FANBlock(128, 256)
        for i in range(4):
            self.add_module(f"m{i}", Hourglass(first=i == 0))
            self.add_module(f"top_m_{i}", FANBlock(256, 256))
            self.add_module(f"conv_last{i}", nn.Conv2d(256, 256, 1))
            self.add_module(f"bn_end{i}", nn.BatchNorm2d(256))
            self.add_module(f"l{i}", nn.Conv2d(256, 99, 1))
            if i < 3:
                self.add_module(f"bl{i}", nn.Conv2d(256, 256, 1))
                self.add_module(f"al{i}", nn.Conv2d(99, 256, 1))

    def stacks(self, x):
        x = F.relu(self.bn1(self.conv1(x)))                                       # (B, 64, 128, 128)
        x = self.conv4(self.conv3(F.avg_pool2d(self.conv2(x), 2)))                # (B, 256, 64, 64)
        maps = [None]
        for i in range(4):
            part = lambda name: getattr(self, f"{name}{i}")
            h = part("top_m_")(part("m")(x, maps[-1]))
            h = F.relu(part("bn_end")(part("conv_last")(h)))
            maps.append(part("l")(h))
            if i < 3:
                x = x + part("bl")(h) + part("al")(maps[-1])
        return maps[1:]

    def forward(self, x):
        return self.stacks(x)[-1][:, :98]

    def heatmaps(self, x):
        """(B, 3, S, S) faces in [-1, 1] -> (B, 98, 64, 64)."""
        return self(resized(x, 256) * 0.5 + 0.5)

    def landmarks(self, x):
        """(B, 3, S, S) faces in [-1, 1] -> (B, 98, 2) pixels of x, on a grid of S / 256 px; no gradient."""
        return decode_heatmaps(self.heatmaps(x), tuple(x.shape[-2:]))


class ViTBlock(nn.Module):
    """CLIP's pre-norm transformer layer with QuickGELU x sigmoid(1.702 x), under CLIP's names."""

    def __init__(self, dim, heads):
        super().__init__()
        self.ln_1, self.attn, self.ln_2 = nn.LayerNorm(dim), nn.MultiheadAttention(dim, heads, batch_first=True), nn.LayerNorm(dim)
        self.mlp = nn.Sequential(OrderedDict(c_fc=nn.Linear(dim, 4 * dim), c_proj=nn.Linear(4 * dim, dim)))

    def forward(self, x):  # (B, L, dim)
        h = self.ln_1(x)
        x = x + self.attn(h, h, h, need_weights=False)[0]
        h = self.mlp.c_fc(self.ln_2(x))
        return x + self.mlp.c_proj(h * torch.sigmoid(1.702 * h))


class FaRLBackbone(nn.Module):
    """CLIP's ViT-B/16 without ln_post and projection: (B, 3, 224, 224) normalised -> (B, 197, 768), class token first."""

    def __init__(self, dim=768, depth=12, heads=12):
        super().__init__()
        self.conv1 = nn.Conv2d(3, dim, 16, 16, bias=False)
        self.class_embedding = nn.Parameter(0.02 * torch.randn(dim))
        self.positional_embedding = nn.Parameter(0.02 * torch.randn(197, dim))
        self.ln_pre = nn.LayerNorm(dim)
        self.transformer = nn.Module()
        self.transformer.resblocks = nn.Sequential(*[ViTBlock(dim, heads) for _ in range(depth)])

    def forward(self, x):
        x = self.conv1(x).flatten(2).mT                                           # (B, 196, 768)
        x = torch.cat([self.class_embedding.expand(len(x), 1, -1), x], 1) + self.positional_embedding
        return self.transformer.resblocks(self.ln_pre(x))


class FaRLHead(nn.Module):
    """Mean and maximum over the patches and the class token, each normalised, mixed by three learned shares, then 40 logits."""

    def __init__(self, dim=768, classes=40):
        super().__init__()
        self.norm_0, self.norm_1, self.norm_2 = nn.LayerNorm(dim), nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.weights = nn.Parameter(torch.zeros(1, 3, 1))
        self.final_fc = nn.Linear(dim, classes)

    def forward(self, tokens):  # (B, 197, 768)
        patches = tokens[:, 1:]
        parts = [self.norm_0(patches.mean(1)), self.norm_1(patches.amax(1)), self.norm_2(tokens[:, 0])]
        return self.final_fc((torch.stack(parts, 1) * self.weights.softmax(1)).sum(1))


class FaRLAttributes(nn.Module):
    """facer's "farl/celeba/224": (B, 3, 224, 224) RGB in [0, 1] -> 40 CelebA logits, in CelebA's order.

    File: face_attribute.farl.celeba.pt (facer, release models-v1). `probabilities` warps FFHQ-aligned faces itself.
    """
    # 512 px FFHQ template -> facer's 224 px canvas, least squares over the five points. The crop is very wide: the face is
    # 155 px of 224, black around it.
    AFFINE = ((0.30266, 0.00364, 33.268), (-0.00364, 0.30266, 34.714))

    def __init__(self):
        super().__init__()
        self.backbone, self.head = FaRLBackbone(), FaRLHead()

    def forward(self, x):
        mean, std = x.new_tensor([[0.48145466, 0.4578275, 0.40821073], [0.26862954, 0.26130258, 0.27577711]]).view(2, 3, 1, 1)
        return self.head(self.backbone((x - mean) / std))

    def canvas(self, x):
        """(B, 3, S, S) FFHQ-aligned faces in [-1, 1] -> (B, 3, 224, 224) in [0, 1], black outside; differentiable."""
        affine = torch.tensor(self.AFFINE, dtype=torch.float64)
        back = torch.linalg.inv(affine[:, :2])
        # affine_grid counts both pictures from -1 to 1: canvas pixel = 112 c + 112, picture pixel = 256 n + 256
        shift = (back @ (112 - affine[:, 2:])) / 256 - 1
        theta = torch.cat([back * 112 / 256, shift], 1).to(x).expand(len(x), 2, 3)
        grid = F.affine_grid(theta, (len(x), 3, 224, 224), align_corners=False)
        return F.grid_sample(x * 0.5 + 0.5, grid, align_corners=False)

    def probabilities(self, x):
        """(B, 3, S, S) FFHQ-aligned faces in [-1, 1] -> (B, 40) in [0, 1]; [:, [i for i, *_ in ATTRIBUTES]] are our 12."""
        return self(self.canvas(x)).sigmoid()


# ------------------------------------------------------------------------------------------------ the toy reader


class Reading(NamedTuple):
    """What FaceReader reads from (B, 3, S, S)."""
    identity: torch.Tensor    # (B, 128) unit vectors
    attributes: torch.Tensor  # (B, 12) logits, order of ATTRIBUTES
    heatmaps: torch.Tensor    # (B, 98, 32, 32), 0..1: 1 where a point certainly is, flat where it could be anywhere
    quality: torch.Tensor     # (B,) higher is better, about 1 for a clean face


def conv_unit(width, out, stride=1):
    return nn.Sequential(nn.Conv2d(width, out, 3, stride, 1, bias=False), nn.BatchNorm2d(out), nn.SiLU())


class Residual(nn.Sequential):
    """x + f(x)."""

    def forward(self, x):
        return x + super().forward(x)


class FaceReader(nn.Module):
    """One small CNN that reads identity, 12 attributes, 98 landmarks and quality from faces (B, 3, S, S) in [-1, 1].

    Stands in for ArcFace, FaRL, AWing-FAN and quality networks in the toy preset, under their calls. Trained on clean and
    degraded toy faces by `train-reader`; any size is resized to 64 px first. SiLU and frozen BatchNorm keep it smooth, so
    that every output is a usable loss.
    """
    SIDE, GRID = 64, 32

    def __init__(self, width=16):
        super().__init__()
        w = width
        self.stem = conv_unit(3, w)                                               # 64 px
        self.stage1 = nn.Sequential(conv_unit(w, 2 * w, 2), Residual(conv_unit(2 * w, 2 * w)))       # 32
        self.stage2 = nn.Sequential(conv_unit(2 * w, 4 * w, 2), Residual(conv_unit(4 * w, 4 * w)))   # 16
        self.stage3 = nn.Sequential(conv_unit(4 * w, 8 * w, 2), Residual(conv_unit(8 * w, 8 * w)))   # 8
        self.stage4 = conv_unit(8 * w, 8 * w, 2)                                  # 4
        self.identity = nn.Linear(8 * w * 16, 128)
        self.attributes = nn.Linear(8 * w * 16, 12)
        self.lateral2, self.lateral1 = nn.Conv2d(8 * w, 4 * w, 1), nn.Conv2d(4 * w, 2 * w, 1)
        self.merge2, self.merge1 = conv_unit(4 * w, 4 * w), conv_unit(2 * w, 2 * w)
        self.points = nn.Conv2d(2 * w, 98, 1)
        self.quality_head = nn.Sequential(nn.BatchNorm1d(10 * w), nn.Linear(10 * w, 32), nn.SiLU(), nn.Linear(32, 1))

    def stages(self, x):
        """Feature maps of five resolutions, (B, w, 64, 64) ... (B, 8w, 4, 4): what a perceptual loss compares."""
        x = resized(x, self.SIDE, antialias=True)
        found = []
        for stage in (self.stem, self.stage1, self.stage2, self.stage3, self.stage4):
            x = stage(x)
            found.append(x)
        return found

    def pool(self, stages):
        """(B, 10 w): mean and spread of two fine stages, mean of a third. The spread is what blur takes away."""
        spread = [(s.float().var((2, 3), correction=0) + 1e-6).sqrt() for s in stages[:2]]
        return torch.cat([s.float().mean((2, 3)) for s in stages[:3]] + spread, 1)

    def point_logits(self, stages):
        """(B, 98, 32 * 32): their softmax is where each landmark is."""
        up = lambda x: F.interpolate(x, scale_factor=2, mode="bilinear", align_corners=False)
        h = self.merge2(up(self.lateral2(stages[3])) + stages[2])                 # (B, 4w, 16, 16)
        h = self.merge1(up(self.lateral1(h)) + stages[1])                         # (B, 2w, 32, 32)
        return self.points(h).float().flatten(2)

    def point_means(self, logits):
        """(B, 98, 32 * 32) -> (B, 98, 2): the mean of each point's distribution, 0..1 of width and height."""
        shares = logits.softmax(-1).unflatten(2, (self.GRID, self.GRID))
        cells = (torch.arange(self.GRID, device=logits.device) + 0.5) / self.GRID
        return torch.stack([shares.sum(2) @ cells, shares.sum(3) @ cells], -1)

    def forward(self, x) -> Reading:
        stages = self.stages(x)
        whole = stages[4].flatten(1)
        # A Gaussian of sigma 1 that sums to 1 has its peak at 1 / 2 pi; this brings certain points to 1, as FAN's are.
        maps = (2 * math.pi * self.point_logits(stages).softmax(-1)).clamp(max=1).unflatten(2, (self.GRID, self.GRID))
        return Reading(F.normalize(self.identity(whole).float()), self.attributes(whole).float(), maps,
                       self.quality_head(self.pool(stages))[:, 0].float())

    def embed(self, x):
        """-> (B, 128) unit vectors."""
        return F.normalize(self.identity(self.stages(x)[4].flatten(1)))

    def heatmaps(self, x):
        """-> (B, 98, 32, 32) in 0..1."""
        return self(x).heatmaps

    def landmarks(self, x):
        """-> (B, 98, 2) in pixels of x: the mean of each point's map, sub-pixel and differentiable."""
        points = self.point_means(self.point_logits(self.stages(x)))
        return points * points.new_tensor([x.shape[-1], x.shape[-2]])

    def probabilities(self, x):
        """-> (B, 12) in [0, 1], order of ATTRIBUTES."""
        return self.attributes(self.stages(x)[4].flatten(1)).sigmoid()

    def quality(self, x):
        """-> (B,), higher is better: the SSIM to its clean version that an image looks like having."""
        return self.quality_head(self.pool(self.stages(x)))[:, 0]

    def features(self, x):
        """-> (B, 10 w <= 192): what fid_toy compares."""
        return self.pool(self.stages(x))


def load_reader(name="b", folder=Path(__file__).parent / "weights"):
    """A trained FaceReader, frozen, in eval mode: "a" for losses, "b" for measuring. UserError if the file is missing.

    Two networks of different width and seed, so that no number is read from the network that was optimised.
    """
    path = Path(folder) / f"reader_{name}.safetensors"
    if not path.is_file():
        raise UserError(f"{path}: no such reader; make it with python metrics.py train-reader --which {name}")
    state = {key: tensor.float() if tensor.is_floating_point() else tensor for key, tensor in read_weights(path).items()}
    reader = FaceReader(len(state.get("stem.1.weight", torch.zeros(16))))
    load_strict(reader, state, path)
    return reader.eval().requires_grad_(False)


# ------------------------------------------------------------------------------------------------ training the reader


@dataclass(frozen=True)
class TrainReader(TrainFlags):
    """Train the face readers on the toy world, or on a folder of faces with whatever labels it has, and measure them."""
    output: str = "runs/reader"            # folder for checkpoints and log
    weights: str = str(Path(__file__).parent / "weights")  # folder that receives reader_a.safetensors and reader_b.safetensors
    which: typing.Literal["both", "a", "b"] = "both"  # a: losses, b: measuring
    width_a: int = 12                      # channels of reader a at full resolution
    width_b: int = 16                      # channels of reader b
    steps: int = 2500                      # optimiser steps of each reader
    learning_rate: float = 3e-3            # AdamW, cosine to zero after a linear warm-up
    weight_decay: float = 0.02             # AdamW
    identities: int = 3000                 # toy people in the training set
    margin: float = 0.3                    # ArcFace's additive angle, radians
    margin_scale: float = 24.0             # ArcFace's s
    attribute_weight: float = 2.0          # of the binary cross-entropy
    landmark_weight: float = 1.0           # of the cross-entropy between heatmaps, and of the distance in pixels
    quality_weight: float = 20.0           # of the squared error of the quality
    batch_size: int = 64                   # faces per step
    mixed_precision: typing.Literal["no", "bf16", "fp16"] = "bf16"  # autocast type
    ema_decay: float = 0.99                # of the averaged weights that are saved
    num_workers: int = 1                   # processes that draw faces ahead
    validation_faces: int = 1200           # held-out faces, 4 per person in the toy world
    checkpointing_steps: int = 500         # steps between saves of state.pt


def spoil(hq, seeds):
    """Faces of every quality and the quality of each: (B, 3, S, S), seeds (B,) -> image (B, 3, S, S), quality (B,).

    A quarter stays clean; the others are hq + u (degrade(hq) - hq), with u = 1 for half of them and uniform for the rest.
    UNSTATED: no paper trains such a network. The label is SSIM to the clean face: 1 for it, falling with blur, noise and
    blocks alike, and readable from the picture because it is relative to the picture's own contrast.
    """
    smooth = Degradation("what an MSE network leaves: blur alone", (0.1, 12), (1, 16), (0, 1), (95, 100))
    lq = hq.clone()
    for kind, spec in enumerate((DEGRADATIONS["codeformer"], DEGRADATIONS["gfpgan"], smooth), 1):
        rows = (seeds % 4 == kind).nonzero()[:, 0]
        if len(rows):
            lq[rows] = degrade(hq[rows], spec, seeds[rows])
    u = (seeds // 4 % 1009) / 1008 * 2
    image = hq + u.clamp(max=1).view(-1, 1, 1, 1).to(hq) * (lq - hq)
    return image, ssim(image * 0.5 + 0.5, hq * 0.5 + 0.5)


class ToyLabels:
    """Batches of toy faces: `training(k)` from a fixed set of people, `held_out()` 4 pictures each of people never trained on."""

    def __init__(self, cfg):
        self.cfg, self.classes = cfg, cfg.identities

    def batch(self, people, seeds, first):
        toy = toy_faces(people, seeds, size=FaceReader.SIDE)
        image, quality = spoil(toy.image, seeds)
        return dict(hq=toy.image, image=image, quality=quality, identity=people - first, attributes=toy.attributes, landmarks=toy.landmarks)

    def training(self, step):
        rng = torch.Generator().manual_seed(mix("reader", self.cfg.seed, self.cfg.which, step))
        people = torch.randint(self.classes, (self.cfg.batch_size,), generator=rng) + TOY_SPLITS["train"].start
        return self.batch(people, torch.randint(2**40, people.shape, generator=rng), TOY_SPLITS["train"].start)

    def held_out(self):
        people = TOY_SPLITS["val"].start + torch.arange(self.cfg.validation_faces) // 4
        seeds = torch.randint(2**40, people.shape, generator=torch.Generator().manual_seed(mix("reader, held out")))
        parts = [self.batch(p, s, TOY_SPLITS["val"].start) for p, s in zip(people.split(100), seeds.split(100))]
        return {key: torch.cat([part[key] for part in parts]) for key in parts[0]}
