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
import csv
import functools
import json
import math
import sys
import typing
from collections import Counter, OrderedDict, defaultdict
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import lpips
import safetensors.torch
import torch
import torch.nn as nn
import torch.nn.functional as F
import torchvision
from tqdm import tqdm

from common import (ATTRIBUTES, DEGRADATIONS, TOY_SPLITS, Degradation, Run, Stage, TrainFlags, UserError, command_line, degrade,
                    list_images, load_strict, mix, pick_device, read_image, read_weights, toy_faces, whole_file)

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
        means = [s.float().mean((2, 3)) for s in stages[:3]]
        squares = [s.float().square().mean((2, 3)) for s in stages[:2]]
        return torch.cat(means + [(q - m * m + 1e-6).clamp(min=1e-6).sqrt() for q, m in zip(squares, means)], 1)

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
    steps: int = 1500                      # optimiser steps of each reader
    learning_rate: float = 3e-3            # AdamW, cosine to zero after a linear warm-up
    weight_decay: float = 0.02             # AdamW
    identities: int = 2000                 # toy people in the training set
    margin: float = 0.2                    # ArcFace's additive angle, radians
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


def read_tables(folder, pattern):
    """Rows of the CSV files `pattern` in the folder or above it: {file they speak of: [(column name, text), ...]}."""
    found = {}
    for path in [p for place in (folder.parent, folder) for p in sorted(place.glob(pattern))]:
        with open(path, newline="", encoding="utf-8") as file:
            header, *rows = csv.reader(file)
        found |= {(path.parent / row[0]).resolve(): list(zip(header[1:], row[1:])) for row in rows if row}
    return found


def label_rows(attributes, landmarks, size):
    """One file's labels: (12,) 0/1 or NaN, and (98, 2) points in pixels of FaceReader's picture or NaN; size = (W, H) of the file."""
    values = {name.strip(): float(text) for name, text in attributes or ()}
    row = torch.tensor([float(values[name] > 0) if name in values else math.nan for _, name, *_ in ATTRIBUTES])
    points = torch.tensor([float(text) for _, text in landmarks or ()]).view(-1, 2)
    if len(points) == 68:
        points = points[torch.tensor(FROM_68)].mean(1)
    if len(points) != 98:
        points = torch.full((98, 2), math.nan)
    return row, points / torch.tensor(size) * FaceReader.SIDE


class FolderLabels:
    """Batches of real faces of a folder with whatever labels it has: identity -1 and NaN where it has none.

    Sub-folders with two pictures or more are identities, where there are three of them at least. attributes.csv (CelebA's
    names, -1/1) and landmarks*.csv (x0,y0,x1,... of 68 or 98 points in pixels of the file) lie in the folder or above it; their
    first column is the path from there. Every tenth identity, or file, is held out. Same calls as ToyLabels.
    """

    def __init__(self, cfg):
        self.cfg, images, people, labels = cfg, [], [], []
        root, files = Path(cfg.data), list_images(cfg.data, recursive=True)
        sizes = Counter(path.parent for path in files)
        persons = [folder for folder in sorted(sizes) if sizes[folder] > 1 and folder != root]
        persons = {folder: k for k, folder in enumerate(persons)} if len(persons) > 2 else {}
        try:
            attributes, landmarks = read_tables(root, "attributes.csv"), read_tables(root, "landmarks*.csv")
            for path in files:
                image, at = read_image(path), path.resolve()
                labels.append(label_rows(attributes.get(at), landmarks.get(at), image.shape[:0:-1]))
                small = resized(image[None], FaceReader.SIDE, antialias=True)[0]
                images.append((small.clamp(-1, 1) * 127.5 + 127.5).round().byte())
                people.append(persons.get(path.parent, -1))
        except (ValueError, RuntimeError) as error:
            raise UserError(f"--data {cfg.data}: {str(error).splitlines()[0]}; mend or remove that file") from None
        if len(images) < 20:
            raise UserError(f"--data {cfg.data}: {len(images)} pictures; a reader needs 20 at the very least")
        self.images, self.people = torch.stack(images), torch.tensor(people)
        self.attributes, self.landmarks = [torch.stack(column) for column in zip(*labels)]
        held = torch.where(self.people >= 0, self.people, torch.arange(len(people))) % 10 == 9
        self.places, self.classes = {kept: (held != kept).nonzero()[:, 0] for kept in (True, False)}, len(persons)

    def batch(self, places, seeds):
        hq = self.images[places] / 127.5 - 1
        image, quality = spoil(hq, seeds)
        return dict(hq=hq, image=image, quality=quality, identity=self.people[places], attributes=self.attributes[places],
                    landmarks=self.landmarks[places])

    def training(self, step):
        rng = torch.Generator().manual_seed(mix("reader", self.cfg.seed, self.cfg.which, step))
        places = self.places[True][torch.randint(len(self.places[True]), (self.cfg.batch_size,), generator=rng)]
        return self.batch(places, torch.randint(2**40, places.shape, generator=rng))

    def held_out(self):
        places = self.places[False][:self.cfg.validation_faces]
        rng = torch.Generator().manual_seed(mix("reader, held out"))
        return self.batch(places, torch.randint(2**40, places.shape, generator=rng))


def reader_losses(reader, margin, batch, cfg):
    """The four losses of one batch, each over the faces that carry its label (identity >= 0, the others not NaN).

    identity: ArcFace, cross-entropy of s cos(theta + m) for the right person and s cos(theta) for the others [ArcFace Eq. 3].
    """
    stages = reader.stages(batch["image"].contiguous(memory_format=torch.channels_last))
    whole, losses = stages[4].flatten(1), {}
    known = batch["identity"] >= 0
    if known.any():
        cosine = (F.normalize(reader.identity(whole)[known].float()) @ F.normalize(margin).T).clamp(-0.9999, 0.9999)
        right = F.one_hot(batch["identity"][known], len(margin)).bool()
        angle = torch.where(right, cosine.acos() + cfg.margin, cosine.acos())
        losses["identity"] = F.cross_entropy(cfg.margin_scale * angle.clamp(max=math.pi).cos(), batch["identity"][known])
    labels, logits = batch["attributes"], reader.attributes(whole).float()
    if not labels.isnan().all():
        bce = F.binary_cross_entropy_with_logits(logits, labels.nan_to_num(), reduction="none")
        losses["attributes"] = cfg.attribute_weight * bce[~labels.isnan()].mean()
    seen = ~batch["landmarks"].isnan().flatten(1).any(1)
    seen[1::2] = False                                            # every second face is enough: this loss costs the most
    if seen.any():
        points, logits = batch["landmarks"][seen] / reader.SIDE, reader.point_logits(stages)[seen]
        centres = torch.arange(reader.GRID, device=points.device) + 0.5                           # in cells
        gauss = (-(centres - points[..., None] * reader.GRID).square() / 2).softmax(-1)           # (B, 98, 2, 32), sums to 1
        # cross-entropy to the product of both Gaussians: logsumexp(logits) - sum_yx g_y g_x logits_yx
        grid = logits.unflatten(2, (reader.GRID, reader.GRID))
        entropy = logits.logsumexp(-1) - ((gauss[:, :, 1, None] @ grid)[:, :, 0] * gauss[:, :, 0]).sum(-1)
        pixels = (reader.point_means(logits) - points).abs().sum(-1) * reader.SIDE
        losses["landmarks"] = cfg.landmark_weight * (entropy + pixels).mean()
    losses["quality"] = cfg.quality_weight * F.mse_loss(reader.quality_head(reader.pool(stages))[:, 0].float(), batch["quality"])
    return losses


def train_reader(cfg):
    """Train the readers that cfg.which names, store them and measure what was stored."""
    for name in "ab" if cfg.which == "both" else cfg.which:
        one = replace(cfg, which=name, output=str(Path(cfg.output) / name), seed=cfg.seed + (name == "b"))
        run, data = Run(one), FolderLabels(one) if cfg.data else ToyLabels(one)
        reader = FaceReader(one.width_a if name == "a" else one.width_b).to(run.device, memory_format=torch.channels_last)
        margin = nn.ParameterList([0.05 * torch.randn(max(1, data.classes), 128)]).to(run.device)
        optimizer = torch.optim.AdamW([*reader.parameters(), *margin.parameters()], weight_decay=one.weight_decay)
        warm = lambda k: min(1, (k + 1) / 100) * 0.5 * (1 + math.cos(math.pi * k / one.steps)) + 1e-3
        optimizer.param_groups[0]["lr"] = one.learning_rate
        stage = Stage(run, f"reader_{name}", dict(reader=reader, margin=margin), dict(reader=optimizer), one.steps, lr_at=warm)
        run.start_log()
        for _, batch in stage.steps(data.training):
            with run.autocast():
                losses = reader_losses(reader.train(), margin[0], batch, one)
            stage.update(sum(losses.values()), **losses)
        untrained = {"identity", "attributes", "landmarks", "quality"} - set(losses)
        if untrained:
            run.say(f"not trained, since {cfg.data} has no such labels: {', '.join(sorted(untrained))}")
        reader.load_state_dict(stage.ema["reader"])
        path = Path(cfg.weights) / f"reader_{name}.safetensors"
        save_reader(path, reader, {})
        rows = measure_reader(load_reader(name, cfg.weights).to(run.device), data.held_out())
        save_reader(path, reader, dict(command=" ".join(sys.argv), seed=one.seed, steps=one.steps, untrained=sorted(untrained), measured=rows))
        run.say(f"{path}: {path.stat().st_size / 2**20:.2f} MB, " + ", ".join(f"{key} {value:.4g}" for key, value in rows.items()))


def save_reader(path, reader, about):
    """Matrices in half precision, the rest in single; `about` goes into the file's metadata."""
    state = {k: v.cpu().half() if v.is_floating_point() and v.dim() > 1 else v.cpu() for k, v in reader.state_dict().items()}
    with whole_file(path) as temporary:
        safetensors.torch.save_file({k: v.contiguous() for k, v in state.items()}, temporary, {k: json.dumps(v) for k, v in about.items()})


def ranks(values):
    """Ranks from 0 of (N,) numbers; equal ones share their mean rank."""
    _, place, count = values.unique(return_inverse=True, return_counts=True)
    return (count.cumsum(0) - (count + 1) / 2)[place].double()


def spearman(a, b):
    """Rank correlation of (N,) and (N,)."""
    return torch.corrcoef(torch.stack([ranks(a), ranks(b)]))[0, 1].item()


def verification_auc(embeddings, people):
    """Chance that a pair of one person is more alike than a pair of two: (N, D), (N,) -> area under the ROC curve."""
    first, second = torch.triu_indices(len(people), len(people), 1)
    likeness, same = identity_similarity(embeddings[first], embeddings[second]), people[first] == people[second]
    n = same.sum().item()
    return ((ranks(likeness)[same].sum().item() - n * (n - 1) / 2) / (n * (len(same) - n))) if 0 < n < len(same) else math.nan


@torch.no_grad()
def measure_reader(reader, held):
    """The requirements of DESIGN 5 on faces never trained on, clean and spoilt: {name: number}, NaN without labels."""
    rows = {}
    for kind, images in (("clean", held["hq"]), ("spoilt", held["image"])):
        parts = [reader(x.to(next(reader.parameters()).device)) for x in images.split(100)]
        read = Reading(*[torch.cat(field).cpu() for field in zip(*parts)])
        points = torch.cat([reader.landmarks(x.to(next(reader.parameters()).device)).cpu() for x in images.split(100)])
        known, labels = held["identity"] >= 0, held["attributes"]
        rows[f"attribute_accuracy_{kind}"] = ((read.attributes > 0) == (labels > 0.5))[~labels.isnan()].double().mean().item()
        rows[f"verification_auc_{kind}"] = verification_auc(read.identity[known], held["identity"][known])
        rows[f"landmark_error_px_{kind}"] = landmark_distance(points, held["landmarks"]).nanmean().item()
    rows["quality_rank_correlation"] = spearman(read.quality, held["quality"])
    return rows


# ------------------------------------------------------------------------------------------------ whole sets of toy faces


@torch.no_grad()
def toy_scores(restored, hq, reader, lq=None):
    """Every number of a toy table: restored, hq (N, 3, S, S) in [-1, 1], N >= 2, reader from `load_reader("b")` -> {name: float}.

    psnr (RGB) and ssim (Y) of the images as 8-bit files would hold them, psnr_gain over lq if given; what the reader saw ends
    in _toy: fid_toy, deg_toy (degrees), lmd_toy (px of the image), ald_e_toy and ald_m_toy (root of Eq. 14 [HonestFace],
    px), attr_toy (share of 12 attributes read alike), quality_toy (higher is better). Means over images.
    """
    same_images(restored, hq)
    device, rows, features = next(reader.parameters()).device, defaultdict(list), ([], [])
    for place in range(0, len(hq), 64):
        x, y = [(v[place:place + 64].to(device).clamp(-1, 1) * 127.5 + 127.5).round() / 127.5 - 1 for v in (restored, hq)]
        rows["psnr"].append(psnr(x / 2 + 0.5, y / 2 + 0.5))
        rows["ssim"].append(ssim(x / 2 + 0.5, y / 2 + 0.5))
        if lq is not None:
            rows["psnr_gain"].append(rows["psnr"][-1] - psnr(lq[place:place + 64].to(x) / 2 + 0.5, y / 2 + 0.5))
        (read_x, read_y), (points_x, points_y) = [[f(v) for v in (x, y)] for f in (reader, reader.landmarks)]
        rows["deg_toy"].append(identity_angle(read_x.identity, read_y.identity))
        rows["lmd_toy"].append(landmark_distance(points_x, points_y))
        for name, chosen in (("ald_e_toy", EYES_AND_BROWS), ("ald_m_toy", MOUTH)):
            rows[name].append(affine_landmark_distance(points_x[:, chosen], points_y[:, chosen]).sqrt())
        rows["attr_toy"].append(((read_x.attributes > 0) == (read_y.attributes > 0)).float().mean(1))
        rows["quality_toy"].append(read_x.quality)
        for found, v in zip(features, (x, y)):
            found.append(reader.features(v))
    scores = {name: torch.cat(values).mean().item() for name, values in rows.items()}
    return scores | {"fid_toy": frechet_distance(torch.cat(features[0]), torch.cat(features[1])).item()}


def toy_protocol(data, degradation, count):
    """How the numbers of `toy_scores` came about, for metrics.json: {name: text}."""
    reader = "weights/reader_b.safetensors (FaceReader trained on toy faces), whole image resized to 64 px"
    return dict(
        faces=f"{count} held-out faces of {data or 'the toy world'}", degradation=degradation, psnr="RGB, 8 bits, mean over images",
        ssim="luma, 11x11 Gaussian, sigma 1.5, 8 bits", fid_toy=f"Frechet distance of pooled features to the same {count} clean faces; {reader}",
        deg_toy=f"angle between embeddings, degrees; {reader}", lmd_toy=f"mean distance of 98 points, px of the image; {reader}",
        ald_e_toy="square root of Eq. 14 of HonestFace, 34 points of eyes and brows", ald_m_toy="the same, 20 points of the mouth",
        attr_toy=f"share of 12 attributes read alike; {reader}", quality_toy=f"mean predicted quality, 1 = clean; {reader}")


# ------------------------------------------------------------------------------------------------ measuring folders


@dataclass(frozen=True)
class Measure:
    """Measure a folder of restored faces against references of the same file names (without suffix)."""
    input: str                             # folder of restored faces, or one file
    reference: str                         # folder of the clean faces
    weights: str = ""                      # folder of released networks; the table says which file enables which number
    real_set: str = ""                     # folder of real faces, such as FFHQ: adds fid_real
    posterior_mean: str = ""               # folder of posterior means: adds indrmse
    iqa: str = ""                          # metrics of pyiqa, if it is installed: musiq,maniqa,...
    toy: bool = False                      # also what the toy reader sees (default: only for faces of 64 px or less)
    device: str = "auto"                   # auto, cpu, cuda, cuda:1, mps


class FIDInception(nn.Module):
    """Inception v3 with FID's weights: (B, 3, H, W) in [0, 1] -> (B, 2048). File: pt_inception-2015-12-05-6726825d.pth.

    torchvision's network differs from TensorFlow's 2015 one in the pooling branches: averages there leave the padding out,
    and the last block takes the maximum. Each block's pooling branch comes last in its list, and is replaced here.
    """

    def __init__(self, path):
        super().__init__()
        self.net = torchvision.models.inception_v3(weights=None, num_classes=1008, aux_logits=False, init_weights=False)
        load_strict(self.net, read_weights(path), path)
        self.net.fc = nn.Identity()
        average = functools.partial(F.avg_pool2d, kernel_size=3, stride=1, padding=1, count_include_pad=False)
        for name in "5b 5c 5d 6b 6c 6d 6e 7b 7c".split():
            block = getattr(self.net, f"Mixed_{name}")
            pool = functools.partial(F.max_pool2d, kernel_size=3, stride=1, padding=1) if name == "7c" else average
            block._forward = functools.partial(self.replaced, block, block._forward, pool)
        self.eval()

    @staticmethod
    def replaced(block, branches, pool, x):
        return branches(x)[:-1] + [block.branch_pool(pool(x))]

    def forward(self, x):
        x = F.interpolate(x, (299, 299), mode="bicubic", antialias=True, align_corners=False).clamp(0, 1)  # clean-fid's resize
        return self.net((x * 255 - 128) / 128)


def basic_numbers(x, y):
    """What needs no network: x restored, y reference, (1, 3, H, W) in [-1, 1] -> {name: (1,)}."""
    a, b = x / 2 + 0.5, y / 2 + 0.5
    scales = min(5, 1 + int(math.log2(min(a.shape[-2:]) / 11)))
    return {"psnr": psnr(a, b), "ssim": ssim(a, b), "ms_ssim" if scales == 5 else f"ms_ssim_{scales}_scales": ms_ssim(a, b, scales)}


# Builders: (names, [paths], device) -> function of one pair (x, y) as above -> {name: (1,)}.


def lpips_numbers(names, paths, device):
    network = lpips_network("vgg" if names == "lpips-vgg" else "alex", paths[0]).to(device)
    return lambda x, y: {names: network(x, y).flatten()}


def dists_numbers(names, paths, device):
    network = DISTS(*paths).to(device)
    return lambda x, y: {names: network(x / 2 + 0.5, y / 2 + 0.5)}


def identity_numbers(names, paths, device):
    """Angle and cosine of embeddings; angles below one degree are left out of the mean, as in VQFR's script."""
    blank = IResNet(int(names[6:]), bgr="ada" in paths[0].name.lower()) if names.startswith("ids_ir") else ArcFaceGray()
    net = load_weights(blank, paths[0]).to(device)

    def numbers(x, y):
        e1, e2 = net.embed(x), net.embed(y)
        angle, cosine = identity_angle(e1, e2), identity_similarity(e1, e2)
        return {names: cosine} if names.startswith("ids_ir") else {"deg": torch.where(angle < 1, math.nan, angle), "ids": cosine}
    return numbers


def landmark_numbers(names, paths, device):
    """LMD and the two A-LD, in pixels of a 512 px face whatever the size of the images."""
    net = load_weights(FAN98(), paths[0]).to(device)

    def numbers(x, y):
        p, q = [net.landmarks(v) * 512 / v.shape[-1] for v in (x, y)]
        parts = {name: affine_landmark_distance(p[:, chosen], q[:, chosen]).sqrt() for name, chosen in (("ald_e", EYES_AND_BROWS), ("ald_m", MOUTH))}
        return {"lmd": landmark_distance(p, q), **parts}
    return numbers


def attribute_numbers(names, paths, device):
    net = load_weights(FaRLAttributes(), paths[0]).to(device)
    return lambda x, y: {names: ((net.probabilities(x) > 0.5) == (net.probabilities(y) > 0.5)).float().mean(1)}


def inception_features(paths, device):
    net = FIDInception(paths[0]).to(device)
    return lambda x: net(x / 2 + 0.5)


def dino_features(paths, device):
    """DINOv2's normalised class token from a folder of transformers."""
    from transformers import AutoModel

    net = AutoModel.from_pretrained(paths[0], local_files_only=True).to(device).eval()

    def features(x):
        x = F.interpolate(x / 2 + 0.5, (224, 224), mode="bicubic", antialias=True, align_corners=False).clamp(0, 1)
        mean, std = x.new_tensor([[0.485, 0.456, 0.406], [0.229, 0.224, 0.225]]).view(2, 3, 1, 1)
        return net((x - mean) / std).last_hidden_state[:, 0]
    return features


# names -> (file patterns in --weights, all needed, | between equals; what they are called; protocol; builder)
PAIR_NETWORKS = {
    "lpips": (["alexnet*.pth"], "alexnet-owt-7be5be79.pth", "LPIPS v0.1 AlexNet, RGB, whole image", lpips_numbers),
    "lpips-vgg": (["vgg16*.pth"], "vgg16-397923af.pth", "LPIPS v0.1 VGG16, RGB, whole image", lpips_numbers),
    "dists": (["dists*.pt*|DISTS*.pth", "vgg16*.pth"], "dists.pt and vgg16-397923af.pth", "VGG16, RGB, not resized", dists_numbers),
    "deg, ids": (["resnet18_110*.pth|arcface_resnet18*.pth"], "resnet18_110.pth or arcface_resnet18.pth",
                 "angle (degrees, pairs below 1 left out) and cosine of ArcFace ResNet-18, whole face grey at 128 px", identity_numbers),
    "ids_ir50": (["*ir50*|*ir_50*"], "adaface_ir50*.ckpt or arcface_ir50*.pth", "cosine, IR-50, fixed 112 px crop; BGR if the file is AdaFace's", identity_numbers),
    "ids_ir101": (["*ir101*|*ir_101*"], "adaface_ir101*.ckpt or arcface_ir101*.pth", "cosine, IR-101, as ids_ir50", identity_numbers),
    "lmd, ald_e, ald_m": (["*WFLW_4HG*.pth"], "alignment_WFLW_4HG.pth",
                          "AWing FAN at 256 px, pixels at 512; mean over 98 points; root of HonestFace Eq. 14 on 34 and 20", landmark_numbers),
    "attr": (["face_attribute.farl*.pt"], "face_attribute.farl.celeba.pt", "share of 40 CelebA attributes read alike, FaRL ViT-B/16", attribute_numbers),
}
SET_NETWORKS = {
    "fid": (["pt_inception-2015-12-05*.pth"], "pt_inception-2015-12-05-6726825d.pth", "Inception v3 of FID, 2048-d, bicubic antialiased 299 px", inception_features),
    "dino": (["dinov2*"], "dinov2-large (folder of transformers)", "DINOv2 class token, bicubic 224 px", dino_features),
}


def find_files(folder, patterns):
    """One file per pattern ("a*|b*": the first that exists), or None if one is missing."""
    found = [next((p for glob in pattern.split("|") for p in sorted(Path(folder).glob(glob))), None) for pattern in patterns]
    return found if folder and all(found) else None


def pair_files(restored, reference):
    """[(stem, restored file, reference file)]; UserError if a stem is there twice or nothing matches."""
    sides = []
    for flag, place in (("RESTORED", restored), ("--reference", reference)):
        files = list_images(place)
        by_stem = {p.stem: p for p in files}
        if len(by_stem) < len(files):
            twice = next(p for p in files if by_stem[p.stem] != p)
            raise UserError(f"{flag} {place}: {twice.name} and {by_stem[twice.stem].name} have one stem; keep one of them")
        sides.append(by_stem)
    stems = [stem for stem in sides[0] if stem in sides[1]]
    if not stems:
        raise UserError(f"no file name of {restored} occurs in {reference} (suffixes aside), e.g. {next(iter(sides[0]))}; check --reference")
    for place, own, other in ((restored, *sides), (reference, *sides[::-1])):
        if lone := [stem for stem in own if stem not in other]:
            print(f"{len(lone)} of {len(own)} files in {place} have no partner and are left out, e.g. {own[lone[0]].name}")
    return [(stem, sides[0][stem], sides[1][stem]) for stem in stems]


def read_pair(restored, reference, device):
    """Two files -> (1, 3, H, W) each in [-1, 1]; UserError unless they have one size of 11 px or more."""
    x, y = read_image(restored), read_image(reference)
    sizes = [f"{v.shape[2]}x{v.shape[1]}" for v in (x, y)]
    if x.shape != y.shape:
        raise UserError(f"{restored} is {sizes[0]}, {reference} is {sizes[1]}: resize one folder to the other")
    if min(x.shape[1:]) < 11:
        raise UserError(f"{restored} is {sizes[0]}: too small to measure, 11 px are needed")
    return x[None].to(device), y[None].to(device)


def pyiqa_numbers(wanted, device, skipped):
    """{name: function of a pair} of pyiqa's metrics, where it is installed and finds its weights."""
    functions = {}
    for name in filter(None, wanted.split(",")):
        try:
            import pyiqa

            metric = pyiqa.create_metric(name, device=device)
            pair = (lambda x, y, m=metric, n=name: {n: m(x / 2 + 0.5, y / 2 + 0.5).flatten()})
            single = (lambda x, y, m=metric, n=name: {n: m(x / 2 + 0.5).flatten()})
            functions[name] = pair if metric.metric_mode == "FR" else single
        except ImportError:
            skipped[name] = "pip install pyiqa"
        except Exception as error:  # its errors depend on the metric: unknown name, no connection for the weights
            skipped[name] = f"pyiqa says {type(error).__name__}: {str(error).splitlines()[0][:80] if str(error) else ''}"
    return functions


def set_numbers(cfg, device, files, skipped):
    """FID and its relatives of whole folders: yields (name, value, N, protocol)."""
    sets = {"gt": [y for _, _, y in files]} | ({"real": list_images(cfg.real_set, recursive=True)} if cfg.real_set else {})
    for kind, (patterns, known, protocol, build) in SET_NETWORKS.items():
        paths = find_files(cfg.weights, patterns)
        names = {"fid": ["fid"], "dino": ["fid_dino", "mmd_dino"]}[kind]
        if paths is None or len(files) < 2:
            skipped[", ".join(f"{n}_{s}" if kind == "fid" else n for n in names for s in sets)] = known if paths is None else "two pairs at least"
            continue
        network = build(paths, device)
        features = lambda these: torch.cat([network(read_image(p)[None].to(device)).cpu() for p in these])
        found = features([x for _, x, _ in files])
        for name, these in sets.items():
            other = features(these)
            text = f"{protocol}; against {len(these)} files of {cfg.reference if name == 'gt' else cfg.real_set}"
            yield f"fid{'_dino' * (kind == 'dino')}_{name}", frechet_distance(found, other).item(), len(files), text
            if kind == "dino":
                yield f"mmd_dino_{name}", mmd_rbf(found, other).item(), len(files), f"RBF, sigma 10, x1000; {text}"


@torch.no_grad()
def measure(cfg):
    """Print a table and one JSON line for a folder of restored faces."""
    device, files, skipped = pick_device(cfg.device), pair_files(cfg.input, cfg.reference), {}
    functions, protocol = [basic_numbers], {"psnr": "RGB, 8-bit files", "ssim": "luma (BT.601, full range), 11x11 Gaussian, sigma 1.5, valid",
                                            "ms_ssim": "luma, product of 5 scales (name says if fewer fit)"}
    if cfg.weights and not Path(cfg.weights).is_dir():
        raise UserError(f"--weights {cfg.weights}: no such folder")
    for names, (patterns, known, text, build) in PAIR_NETWORKS.items():
        paths = find_files(cfg.weights, patterns)
        if paths is None:
            skipped[names] = known
        else:
            functions.append(build(names, paths, device))
            protocol |= {name: f"{text} ({paths[0].name})" for name in names.split(", ")}
    for name, function in pyiqa_numbers(cfg.iqa, device, skipped).items():
        functions.append(function)
        protocol[name] = "pyiqa's default"
    if cfg.posterior_mean:
        estimates = {p.stem: p for p in list_images(cfg.posterior_mean)}
        protocol["indrmse"] = f"mean over images of the RMSE to {cfg.posterior_mean}, RGB, 0..1"
    values, small = defaultdict(list), []
    for stem, restored, reference in tqdm(files, disable=not sys.stderr.isatty()):
        x, y = read_pair(restored, reference, device)
        if max(x.shape[-2:]) <= FaceReader.SIDE or cfg.toy:
            small.append(torch.cat([resized(v, FaceReader.SIDE, antialias=True) for v in (x, y)]).cpu())
        for function in functions:
            for name, value in function(x, y).items():
                values[name].append(value.item())
        if cfg.posterior_mean:
            if stem not in estimates:
                raise UserError(f"--posterior_mean {cfg.posterior_mean}: has no {stem}")
            values["indrmse"].append(ind_rmse(x / 2 + 0.5, read_pair(estimates[stem], restored, device)[0] / 2 + 0.5).item())
    rows = []
    for name, column in values.items():
        kept = [v for v in column if not math.isnan(v)]
        rows.append((name, sum(kept) / len(kept) if kept else math.nan, len(kept), protocol.get(name, protocol["ms_ssim"])))
    rows += set_numbers(cfg, device, files, skipped)
    if len(small) == len(files) > 1:
        pairs, text = torch.stack(small), toy_protocol(cfg.input, "", len(files))
        scores = toy_scores(pairs[:, 0], pairs[:, 1], load_reader("b").to(device))
        rows += [(name, value, len(files), text[name]) for name, value in scores.items() if name.endswith("_toy")]
    print_rows(cfg, rows, skipped)


def print_rows(cfg, rows, skipped):
    """The table, what was left out and why, and the JSON line."""
    width = max(len(name) for name, *_ in rows)
    print(f"{'metric':{width}}  {'value':>10}  {'N':>6}  protocol")
    for name, value, count, text in rows:
        print(f"{name:{width}}  {value:10.4f}  {count:6d}  {text}")
    for names, reason in skipped.items():
        print(f"skipped {names}: {'put' if 'pip' not in reason else 'needs'} {reason} {'in --weights' if 'pi' not in reason else ''}")
    numbers = {name: value if math.isfinite(value) else None for name, value, *_ in rows}
    protocol = {name: text for name, _, _, text in rows}
    print(json.dumps(dict(numbers, restored=cfg.input, reference=cfg.reference, N={name: count for name, _, count, _ in rows},
                          skipped=skipped, protocol=protocol)))


def main(argv=None):
    """`python metrics.py RESTORED ...` is short for `measure -i RESTORED ...`; the other verb is train-reader."""
    argv = sys.argv[1:] if argv is None else list(argv)
    if argv and not argv[0].startswith("-") and argv[0] not in ("measure", "train-reader"):
        argv = ["measure", "--input", *argv]
    command_line(__doc__, {"measure": (Measure, {}, measure), "train-reader": (TrainReader, {}, train_reader)}, argv)


if __name__ == "__main__":
    main()
