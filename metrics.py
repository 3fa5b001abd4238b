"""Numbers that say how good a restored face is, and the networks that measure faces.

    pairs       psnr, ssim, ms_ssim, lpips_network, DISTS          two images in [0, 1] -> one number per image
    sets        frechet_distance, mmd_rbf                          two sets of features (N, D) -> one number
    faces       identity_angle, landmark_distance, affine_landmark_distance, ind_rmse, ...
    released    ArcFaceGray, IResNet, FAN98, FaRLAttributes        networks with released parameter names, for load_weights
                FIDInception, DINOv2                               networks whose features a set distance compares
    toy         FaceReader, load_reader                            one small network in place of the four released face networks
                toy_scores, toy_protocol                           the numbers of a method's metrics.json
    program     python metrics.py RESTORED --reference CLEAN [--weights FOLDER]

FaceReader and the four face networks share their calls, so that one can replace another: `embed(x)` -> unit vectors,
`landmarks(x)` -> (B, 98, 2) pixels of x, `heatmaps(x)`, `probabilities(x)`. There x is (B, 3, S, S) RGB in [-1, 1] of any
size; the network converts range, colour, crop and size. `forward` takes what the authors feed. Numbers read by a FaceReader
end in `_toy`: they compare runs of this project with each other and with nothing else.

Read first: `toy_scores`, then the functions that it calls. The released networks are transcripts of other papers' code.
Sources: HonestFace (Eq. 14, 15), DISTS (arXiv 2004.07728), AdaFace, AdaptiveWingLoss, FaRL, VQFR, pyiqa.
"""
import functools
import json
import math
import sys
import warnings
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

# common comes first: it sets up OpenMP before torch is imported
from common import UserError, command_line, from_folder, list_images, load_strict, pick_device, read_image, read_weights

import safetensors
import torch
import torch.nn as nn
import torch.nn.functional as F
from tqdm import tqdm

# lpips, torchvision and transformers take seconds to import: the functions that need them do it.

# ------------------------------------------------------------------------------------------------ pairs of images

def same_images(a, b):
    """ValueError unless a and b are both (B, C, H, W) of one shape."""
    if a.dim() != 4 or a.shape != b.shape:
        raise ValueError(f"wants two equal shapes (B, C, H, W), got {tuple(a.shape)} and {tuple(b.shape)}")


def psnr(a, b):
    """10 log10(1 / MSE), RGB: (B, 3, H, W) twice in [0, 1] -> (B,) dB; inf where the images are equal."""
    same_images(a, b)
    return -10 * (a - b).square().flatten(1).mean(1).log10()


def mean_psnr(a, b) -> float:
    """Mean PSNR of (B, 3, H, W) in [-1, 1]."""
    return psnr(a / 2 + 0.5, b / 2 + 0.5).mean().item()


def luma(x):
    """(B, 3, H, W) RGB -> (B, 1, H, W): BT.601, full range, the Y of YIQ on which pyiqa computes SSIM."""
    return (x * x.new_tensor([0.299, 0.587, 0.114]).view(3, 1, 1)).sum(1, keepdim=True)


def ssim_maps(a, b):
    """SSIM and its contrast-structure factor, (B, C, H - 10, W - 10) each: 11x11 Gaussian of sigma 1.5."""
    x = torch.arange(11, dtype=a.dtype, device=a.device) - 5
    window = torch.exp(-x.square() / (2 * 1.5**2))
    window, channels = (window / window.sum()).expand(a.shape[1], 1, 1, 11), a.shape[1]
    # separable, each channel by itself, valid windows only
    blur = lambda v: F.conv2d(F.conv2d(v, window, groups=channels), window.transpose(2, 3), groups=channels)
    mu_a, mu_b = blur(a), blur(b)
    var_a, var_b, cov = blur(a * a) - mu_a**2, blur(b * b) - mu_b**2, blur(a * b) - mu_a * mu_b
    structure = (2 * cov + 0.03**2) / (var_a + var_b + 0.03**2)
    return structure * (2 * mu_a * mu_b + 0.01**2) / (mu_a**2 + mu_b**2 + 0.01**2), structure


def ssim(a, b):
    """Structural similarity of luma [Wang et al. 2004]: (B, 3, H, W) twice in [0, 1] -> (B,), 1 for equal images.

    The mean over the windows, as pyiqa's `ssim`. ValueError below 11 px. DIFFERS: pyiqa first rounds luma to 8 bits, which
    moves the fourth digit. It also lifts negative structure to 0 window by window, which the definition does not: up to
    0.008 more on degraded faces at 256 px, 0.03 under strong noise.
    """
    same_images(a, b)
    if min(a.shape[-2:]) < 11:
        raise ValueError(f"ssim needs images of 11 px or more, got {tuple(a.shape[-2:])}")
    return ssim_maps(luma(a), luma(b))[0].flatten(1).mean(1)


def ms_ssim(a, b, scales=5):
    """Multi-scale SSIM, product form [Wang et al. 2003]: (B, 3, H, W) twice in [0, 1] -> (B,).
    prod_j mean(structure_j)^w_j mean(SSIM_M)^w_M; 2x2 means halve the images between scales. Five scales need 176 px, else
    ValueError. Fewer take the first weights, rescaled to sum 1, and are another measure."""
    same_images(a, b)
    if min(a.shape[-2:]) < 11 * 2 ** (scales - 1):
        raise ValueError(f"ms_ssim: images of {tuple(a.shape[-2:])} are too small for {scales} scales")
    weights = a.new_tensor([0.0448, 0.2856, 0.3001, 0.2363, 0.1333])[:scales]
    factors, a, b = [], luma(a), luma(b)
    for scale in range(scales):
        full, structure = ssim_maps(a, b)
        factors.append((full if scale == scales - 1 else structure).flatten(1).mean(1).clamp(min=0))
        odd = [side % 2 for side in a.shape[-2:]]                 # an odd side gets zeros around it, as in pyiqa
        a, b = F.avg_pool2d(a, 2, padding=odd), F.avg_pool2d(b, 2, padding=odd)
    return (torch.stack(factors, 1) ** (weights / weights.sum())).prod(1)


def lpips_network(net="alex", backbone=""):
    """lpips.LPIPS v0.1 with its trained heads, frozen; images in [-1, 1]. net: alex (pyiqa's `lpips`) or vgg (usual loss).
    backbone: file of torchvision's alexnet or vgg16 (default: torch hub's cache). Nothing is ever fetched."""
    import lpips
    known = {"alex": "alexnet-owt-7be5be79.pth", "vgg": "vgg16-397923af.pth"}[net]
    path = Path(backbone or Path(torch.hub.get_dir()) / "checkpoints" / known)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")                           # lpips 0.1.4 calls torchvision in an outdated way
        network = lpips.LPIPS(net=net, pnet_rand=True, verbose=False)  # pnet_rand: do not fetch the backbone
    state = read_weights(path)                                    # lpips calls torchvision's features.5 slice2.5
    names = {name: "features." + name.split(".", 1)[1] for name in network.net.state_dict()}
    load_strict(network.net, {name: state[theirs] for name, theirs in names.items() if theirs in state}, path)
    return network.eval().requires_grad_(False)


class L2Pool(nn.Module):
    """sqrt(blur(x^2)) at stride 2, 3x3 Hann window, zeros outside, for max-pooling [DISTS Eq. 4]."""

    def forward(self, x):                                         # (B, C, H, W) -> (B, C, ceil(H / 2), ceil(W / 2))
        hann = x.new_tensor([0.25, 0.5, 0.25])
        window = (hann[:, None] * hann).expand(x.shape[1], 1, 3, 3)
        return (F.conv2d(x.square(), window, stride=2, padding=1, groups=x.shape[1]) + 1e-12).sqrt()


class DISTS(nn.Module):
    """Deep image structure and texture similarity: (B, 3, H, W) twice in [0, 1] -> (B,), 0 for equal images.

    D = 1 - sum_c (alpha_c l_c + beta_c s_c) over the channels of the image itself and of VGG16's relu1_2 .. relu5_3:
    l = (2 mu_a mu_b + c) / (mu_a^2 + mu_b^2 + c) compares texture, s = (2 cov + c) / (var_a + var_b + c) structure
    [DISTS Eq. 5-7; released code]. DIFFERS: the image is not resized to 256 px.
    weights: the authors' file of alpha and beta; without it each stage's trained total is split evenly, an approximation.
    vgg_weights: file of torchvision's vgg16; without it the features are random, and numbers compare within one run only.
    """
    TAPS = {3: 64, 8: 128, 15: 256, 22: 512, 29: 512}             # index in VGG16's features -> channels
    ALPHA = (0.0632, 0.0386, 0.0779, 0.1531, 0.2747, 0.2686)      # sums of the trained weights per stage
    BETA = (0.0616, 0.0001, 0.0007, 0.0024, 0.0020, 0.0572)

    def __init__(self, weights=None, vgg_weights=None):
        super().__init__()
        from torchvision.models import vgg
        layers = vgg.make_layers(vgg.cfgs["D"])[:30]
        self.features = nn.Sequential(*[L2Pool() if isinstance(m, nn.MaxPool2d) else m for m in layers])
        if vgg_weights is not None:
            state = {k.removeprefix("features."): v for k, v in read_weights(vgg_weights).items()}
            load_strict(self.features, {k: v for k, v in state.items() if k[0].isdigit()}, vgg_weights)
        for name, sums in (("alpha", self.ALPHA), ("beta", self.BETA)):          # (1, 1475, 1, 1), as released
            parts = [torch.full((n,), total / n) for n, total in zip((3, *self.TAPS.values()), sums)]
            self.register_buffer(name, torch.cat(parts).view(1, -1, 1, 1))
        if weights is not None:
            load_strict(self, self.state_dict() | read_weights(weights), weights)
        self.eval().requires_grad_(False)

    def stages(self, x):
        """[(B, 3, H, W), (B, 64, H, W), (B, 128, H/2, W/2), ...]: x itself, then five stages of VGG16."""
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
            mu_x, mu_y = x.mean((2, 3)), y.mean((2, 3))                          # (B, C)
            var_x, var_y = x.var((2, 3), correction=0), y.var((2, 3), correction=0)
            cov = (x * y).mean((2, 3)) - mu_x * mu_y
            texture.append((2 * mu_x * mu_y + 1e-6) / (mu_x**2 + mu_y**2 + 1e-6))
            structure.append((2 * cov + 1e-6) / (var_x + var_y + 1e-6))
        score = torch.cat(texture, 1) * self.alpha.flatten() + torch.cat(structure, 1) * self.beta.flatten()
        return 1 - score.sum(1) / (self.alpha.sum() + self.beta.sum())


# ------------------------------------------------------------------------------------------------ sets of features

def double(x):
    """x in float64, on the CPU where the device (mps) has none."""
    return (x.cpu() if x.device.type == "mps" else x).double()


def frechet_distance(x, y):
    """|mu_x - mu_y|^2 + tr(Sx + Sy - 2 (Sx Sy)^(1/2)), FID's formula: features (N, D), (M, D) -> scalar.

    float64. With roots Sx = Rx^T Rx, Sy = Ry^T Ry (QR of the centred features) tr (Sx Sy)^(1/2) is the sum of the singular
    values of Rx Ry^T: no matrix square root, no epsilon, nothing breaks when N < D. Biased upwards for few rows: compare
    sets of equal N [Heusel et al. 2017].
    """
    x, y = double(x), double(y)
    rx, ry = [torch.linalg.qr((v - v.mean(0)) / (len(v) - 1) ** 0.5, mode="r")[1] for v in (x, y)]
    spread = rx.square().sum() + ry.square().sum() - 2 * torch.linalg.svdvals(rx @ ry.T).sum()
    return ((x.mean(0) - y.mean(0)).square().sum() + spread).clamp(min=0)


def mmd_rbf(x, y, sigma=10.0, scale=1000.0):
    """scale (mean k(x, x) + mean k(y, y) - 2 mean k(x, y)): features (N, D), (M, D) -> scalar.
    k(a, b) = exp(-|a - b|^2 / (2 sigma^2)). Biased V-statistic (the diagonals count), float64, 1024 rows at a time. The
    defaults are CMMD's [Jayasumana et al. 2024]; Latent-PMRF applies them to DINOv2 features."""
    def kernel(a, b):
        sums = [torch.exp(-torch.cdist(rows, b).square() / (2 * sigma**2)).sum() for rows in a.split(1024)]
        return sum(sums) / (len(a) * len(b))

    x, y = double(x), double(y)
    return scale * (kernel(x, x) + kernel(y, y) - 2 * kernel(x, y))


# ------------------------------------------------------------------------------------------------ faces

# WFLW-98 indices; "left" is the left of the picture. UNSTATED: which points are HonestFace's eyes, eyebrows and mouth border;
# here all 34 of eyes and brows and all 20 of the mouth. Only the root of Eq. 14 is as small as the two A-LD columns in print.
EYES_AND_BROWS = tuple(range(33, 51)) + tuple(range(60, 76))
MOUTH = tuple(range(76, 96))
LEFT_EYE, RIGHT_EYE = tuple(range(60, 68)), tuple(range(68, 76))


def identity_similarity(e1, e2):
    """Cosine of embeddings (..., D) of any length -> (...), in [-1, 1] (IDS of CodeFormer and DifFace)."""
    return F.cosine_similarity(e1, e2, dim=-1).clamp(-1, 1)


def identity_angle(e1, e2):
    """Angle between embeddings (..., D) of any length -> (...), 0 to 180 degrees ("Deg." of VQFR).
    2 atan2(|u - v|, |u + v|) of unit vectors is the arccos of their cosine, but exact near 0 and never NaN."""
    u, v = F.normalize(e1, dim=-1), F.normalize(e2, dim=-1)
    return torch.rad2deg(2 * torch.atan2((u - v).norm(dim=-1), (u + v).norm(dim=-1)))


def landmark_distance(a, b):
    """LMD: mean Euclidean distance of points (..., K, 2) twice -> (...); papers: pixels at 512."""
    return (a - b).norm(dim=-1).mean(-1)


def affine_solution(L, H, weights):
    """Minimise Eq. 14 -> M (..., 2, 2), centres of L, H (..., 1, 2), weights (..., K), residuals; float64.
    The map is h = M (l - centre_l) + centre_h. In pixels the matrix that Eq. 15 inverts has condition 1e7 to 1e8; with
    points centred and scaled about 10. The pseudo-inverse serves where the map is not unique."""
    tolerance = 1e-9 if L.dtype == torch.float64 else 1e-5        # below: rounding of L
    L, H = double(L), double(H)
    w = torch.ones(()) if weights is None else torch.as_tensor(weights)
    w = double(w).to(L.device).expand(L.shape[:-1])
    total = w.sum(-1)[..., None, None].clamp(min=1e-300)
    centre_l, centre_h = [(w[..., None] * p).sum(-2, keepdim=True) / total for p in (L, H)]
    l, h = L - centre_l, H - centre_h
    size = ((w[..., None] * l.square()).sum((-2, -1), keepdim=True) / total).sqrt().detach().clamp(min=1e-12)
    root = w.sqrt()[..., None]
    matrix = (torch.linalg.pinv(root * l / size, rtol=tolerance) @ (root * h)).mT / size
    return matrix, centre_l, centre_h, w, l @ matrix.mT - h


def affine_fit(L, H, weights=None):
    """A* = H W L'^T (L' W L'^T)^-1, l' = (x, y, 1) [Eq. 15]: points (..., K, 2) twice -> (..., 2, 3).
    The affine map of L that comes nearest to H. weights (K,) or (..., K), default 1; 0 drops a point. Where the
    points lie on a line or are fewer than three, Eq. 15 has no inverse: the smallest minimiser is returned."""
    matrix, centre_l, centre_h, *_ = affine_solution(L, H, weights)
    return torch.cat([matrix, centre_h.mT - matrix @ centre_l.mT], -1).to(L)


def affine_landmark_distance(L, H, weights=None):
    """A-LD: d(L, H; W) = min_A sum_k w_k |A l'_k - h_k|^2 [Eq. 14]: points (..., K, 2) twice -> (...).
    Not symmetric: measured in squared units of H, blind to any affine change of L (pose, scale, mirroring). Defined for
    points on a line, differentiable where they are not. Tables show its root (EYES_AND_BROWS)."""
    *_, w, residual = affine_solution(L, H, weights)
    return (w * residual.square().sum(-1)).sum(-1).to(L)


def ind_rmse(restored, estimate):
    """IndRMSE: RMSE to the posterior mean, for want of the truth: (B, 3, H, W) twice in [0, 1] -> (B,).
    Latent-PMRF averages these roots over images. PMRF's script takes the root of the mean, on 0..255."""
    same_images(restored, estimate)
    return (restored - estimate).square().flatten(1).mean(1).sqrt()


def decode_heatmaps(heatmaps, size):
    """(B, K, h, w) -> (B, K, 2) points in pixels of an image of `size` (its side, or height and width).
    The cell of the maximum, a quarter cell towards the larger neighbour in x and in y, centre +0.5 [AWing].
    DIFFERS: neighbours beyond the border repeat it. In the released code one point there disturbs all others."""
    height, width = (size, size) if isinstance(size, int) else size
    h, w = heatmaps.shape[-2:]
    flat = heatmaps.flatten(2)
    place = flat.argmax(-1)
    x, y = place % w, place // w

    def value(column, row):
        return flat.gather(2, (row.clamp(0, h - 1) * w + column.clamp(0, w - 1))[..., None])[..., 0]

    dx, dy = (value(x + 1, y) - value(x - 1, y)).sign(), (value(x, y + 1) - value(x, y - 1)).sign()
    return torch.stack([(x + 0.5 + 0.25 * dx) * width / w, (y + 0.5 + 0.25 * dy) * height / h], -1)


# ------------------------------------------------------------------------------------------------ released networks

def bilinear(x, side, antialias=False):
    """(B, C, H, W) -> (B, C, side, side), bilinear, pixel centres at +0.5; default: no antialias, as cv2."""
    if x.shape[-2:] == (side, side):
        return x
    return F.interpolate(x, (side, side), mode="bilinear", align_corners=False, antialias=antialias)


def load_weights(module, path):
    """`module` in eval mode with the released weights of `path`, every name and shape checked.
    Takes off `model.`, under which a Lightning file keeps its network beside a head that is not wanted; other wrappings: see
    `read_weights`. UserError: missing, damaged or of another network."""
    state = read_weights(path)
    if any(name.startswith("model.") for name in state):
        state = {name.removeprefix("model."): v for name, v in state.items() if name.startswith("model.")}
    # BatchNorm's counters are absent from files older than torch 0.4.1.
    counters = {name: v for name, v in module.state_dict().items() if name.endswith("num_batches_tracked")}
    load_strict(module, counters | state, path)
    return module.eval()


class GrayBlock(nn.Module):
    """x -> PReLU(shortcut(x) + BN conv PReLU BN conv BN(x)); one PReLU serves twice."""

    def __init__(self, width, out, stride):
        super().__init__()
        self.bn0, self.conv1 = nn.BatchNorm2d(width), nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.bn1, self.prelu = nn.BatchNorm2d(width), nn.PReLU()
        self.conv2, self.bn2 = nn.Conv2d(width, out, 3, stride, 1, bias=False), nn.BatchNorm2d(out)
        self.downsample = nn.Identity() if stride == 1 and width == out else nn.Sequential(
            nn.Conv2d(width, out, 1, stride, bias=False), nn.BatchNorm2d(out))

    def forward(self, x):
        h = self.bn2(self.conv2(self.prelu(self.bn1(self.conv1(self.bn0(x))))))
        return self.prelu(h + self.downsample(x))


class ArcFaceGray(nn.Module):
    """ResNet-18 on grey faces: (B, 1, 128, 128) in [-1, 1] -> (B, 512), not normalised.
    The network behind "Deg." (VQFR's resnet18_110.pth) and GFPGAN's identity loss (arcface_resnet18.pth)."""

    def __init__(self):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(1, 64, 3, padding=1, bias=False), nn.BatchNorm2d(64)
        self.prelu, self.maxpool = nn.PReLU(), nn.MaxPool2d(2)
        for k, (width, out) in enumerate(((64, 64), (64, 128), (128, 256), (256, 512)), 1):
            self.add_module(f"layer{k}", nn.Sequential(GrayBlock(width, out, 1 if k == 1 else 2), GrayBlock(out, out, 1)))
        self.bn4 = nn.BatchNorm2d(512)
        self.fc5, self.bn5 = nn.Linear(512 * 8 * 8, 512), nn.BatchNorm1d(512)

    def forward(self, x):
        x = self.maxpool(self.prelu(self.bn1(self.conv1(x))))                                # (B, 64, 64, 64)
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))                            # (B, 512, 8, 8)
        return self.bn5(self.fc5(self.bn4(x).flatten(1)))

    def embed(self, x):
        """(B, 3, S, S) aligned faces in [-1, 1] -> (B, 512) unit vectors; whole, grey, at 128 px [VQFR]."""
        gray = (x * x.new_tensor([0.2989, 0.5870, 0.1140]).view(3, 1, 1)).sum(1, keepdim=True)
        return F.normalize(self(bilinear(gray, 128)))


class SqueezeExcite(nn.Module):
    """x scaled per channel by a gate that sees the means of all channels."""

    def __init__(self, width):
        super().__init__()
        self.fc1, self.fc2 = (nn.Conv2d(i, o, 1, bias=False) for i, o in ((width, width // 16), (width // 16, width)))

    def forward(self, x):
        return x * self.fc2(F.relu(self.fc1(x.mean((2, 3), keepdim=True)))).sigmoid()


class IRBlock(nn.Module):
    """x -> shortcut(x) + BN conv BN PReLU conv(stride) BN(x), no activation after. Layouts: see `IResNet`."""

    def __init__(self, width, out, stride, layout="adaface"):
        super().__init__()
        self.shortcut_layer = nn.MaxPool2d(1, stride) if width == out else nn.Sequential(
            nn.Conv2d(width, out, 1, stride, bias=False), nn.BatchNorm2d(out))
        self.res_layer = nn.Sequential(
            nn.BatchNorm2d(width), nn.Conv2d(width, out, 3, 1, 1, bias=False),
            *([nn.BatchNorm2d(out)] if layout == "adaface" else []),
            nn.PReLU(out), nn.Conv2d(out, out, 3, stride, 1, bias=False), nn.BatchNorm2d(out),
            *([SqueezeExcite(out)] if layout == "ir_se" else []))

    def forward(self, x):
        return self.res_layer(x) + self.shortcut_layer(x)


class IResNet(nn.Module):
    """IR-18/34/50/101 of AdaFace and TFace: (B, 3, 112, 112) in [-1, 1] -> (B, 512), not normalised.

    bgr: AdaFace's weights expect BGR, ArcFace's RGB. The wrong order costs accuracy without any error, so it is an argument.
    layout "ir": InsightFace_Pytorch's, without the norm in the middle of a block. "ir_se": the same with squeeze-and-excite
    gates, IR-SE-50, which facexlib has (recognition_arcface_ir_se50.pth).
    """
    UNITS = {18: (2, 2, 2, 2), 34: (3, 4, 6, 3), 50: (3, 4, 14, 3), 101: (3, 13, 30, 3)}

    def __init__(self, depth=50, bgr=False, layout="adaface"):
        super().__init__()
        self.bgr = bgr
        self.input_layer = nn.Sequential(nn.Conv2d(3, 64, 3, 1, 1, bias=False), nn.BatchNorm2d(64), nn.PReLU(64))
        blocks, width = [], 64
        for out, units in zip((64, 128, 256, 512), self.UNITS[depth]):
            for k in range(units):  # the first unit of every stage halves the resolution, also that of the first stage
                blocks.append(IRBlock(width, out, 2 if k == 0 else 1, layout))
                width = out
        self.body = nn.Sequential(*blocks)
        self.output_layer = nn.Sequential(nn.BatchNorm2d(512), nn.Dropout(0.4), nn.Flatten(),
                                          nn.Linear(512 * 7 * 7, 512), nn.BatchNorm1d(512, affine=layout != "adaface"))

    def forward(self, x):
        return self.output_layer(self.body(self.input_layer(x)))

    def embed(self, x):
        """(B, 3, S, S) FFHQ-aligned faces in [-1, 1] -> (B, 512) unit vectors."""
        x = crop_112(x)
        return F.normalize(self(x.flip(1) if self.bgr else x))


def load_iresnet(path, bgr=False):
    """An `IResNet` with the depth and layout of its file. UserError as `load_weights`."""
    state = read_weights(path)
    units = {name.partition("body.")[2].split(".")[0] for name in state if "body." in name}
    depth = {sum(units): depth for depth, units in IResNet.UNITS.items()}.get(len(units), 50)
    has = lambda ending: any(name.endswith(ending) for name in state)
    layout = "ir_se" if has("res_layer.5.fc1.weight") else "adaface" if has("res_layer.2.running_mean") else "ir"
    return load_weights(IResNet(depth, bgr, layout), path)


CROP_112 = (65, 61, 448, 445)  # left, top, right, bottom of ArcFace's 112 px template in FFHQ's 512 px one


def crop_112(x):
    """ArcFace's crop of FFHQ-aligned faces: (B, 3, S, S) -> (B, 3, 112, 112), a fixed box, differentiable.
    The least-squares similarity between the two five-point templates is this box to 0.01 degree of rotation."""
    left, top, right, bottom = [round(v * x.shape[-1] / 512) for v in CROP_112]
    return bilinear(x[..., top:bottom, left:right], 112, antialias=True)


class CoordConv(nn.Module):
    """Convolution that also sees rows, columns and radius, then rows and columns on the last face outline.
    The released code swaps the axes: its "x" varies along rows. Trained so, kept so."""

    def __init__(self, channels, out, kernel, stride=1, padding=0, outline=False):
        super().__init__()
        self.conv = nn.Conv2d(channels + (5 if outline else 3), out, kernel, stride, padding)

    def forward(self, x, heatmaps=None):
        sides = [torch.linspace(-1, 1, n, device=x.device, dtype=x.dtype) for n in x.shape[-2:]]
        rows, columns = [grid.expand(len(x), 1, -1, -1) for grid in torch.meshgrid(*sides, indexing="ij")]
        radius = (rows**2 + columns**2).sqrt()
        parts = [x, rows, columns, radius / radius.amax()]
        if heatmaps is not None:
            inside = (heatmaps[:, -1:].clamp(0, 1) > 0.05).to(x.dtype)
            parts += [rows * inside, columns * inside]
        return self.conv(torch.cat(parts, 1))


class FANBlock(nn.Module):
    """FAN's block: three 3x3 convolutions in a row, their results side by side, plus the input."""

    def __init__(self, width, out):
        super().__init__()
        half, quarter = out // 2, out // 4
        self.bn1, self.conv1 = nn.BatchNorm2d(width), nn.Conv2d(width, half, 3, padding=1, bias=False)
        self.bn2, self.conv2 = nn.BatchNorm2d(half), nn.Conv2d(half, quarter, 3, padding=1, bias=False)
        self.bn3, self.conv3 = nn.BatchNorm2d(quarter), nn.Conv2d(quarter, quarter, 3, padding=1, bias=False)
        self.downsample = nn.Identity() if width == out else nn.Sequential(
            nn.BatchNorm2d(width), nn.ReLU(), nn.Conv2d(width, out, 1, bias=False))

    def forward(self, x):
        a = self.conv1(F.relu(self.bn1(x)))
        b = self.conv2(F.relu(self.bn2(a)))
        c = self.conv3(F.relu(self.bn3(b)))
        return torch.cat([a, b, c], 1) + self.downsample(x)


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
    """Four stacked hourglasses of AdaptiveWingLoss: (B, 3, 256, 256) RGB in [0, 1] -> (B, 98, 64, 64).
    Peaks are near 1. File: alignment_WFLW_4HG.pth of facexlib. The authors return the maps of all four, each with a 99th
    channel for the outline of the face; here it is the last one's points."""

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

    def forward(self, x):
        x = F.relu(self.bn1(self.conv1(x)))                                                  # (B, 64, 128, 128)
        x = self.conv4(self.conv3(F.avg_pool2d(self.conv2(x), 2)))                           # (B, 256, 64, 64)
        maps = None
        for i in range(4):
            part = lambda name: getattr(self, f"{name}{i}")
            h = F.relu(part("bn_end")(part("conv_last")(part("top_m_")(part("m")(x, maps)))))
            maps = part("l")(h)
            if i < 3:
                x = x + part("bl")(h) + part("al")(maps)
        return maps[:, :98]

    def heatmaps(self, x):
        """(B, 3, S, S) faces in [-1, 1] -> (B, 98, 64, 64)."""
        return self(bilinear(x, 256) * 0.5 + 0.5)

    def landmarks(self, x):
        """(B, 3, S, S) faces in [-1, 1] -> (B, 98, 2) pixels of x, on a grid of S / 128 px; no gradient."""
        return decode_heatmaps(self.heatmaps(x), tuple(x.shape[-2:]))


class ViTBlock(nn.Module):
    """CLIP's pre-norm transformer layer with QuickGELU x sigmoid(1.702 x), under CLIP's names."""

    def __init__(self, dim, heads):
        super().__init__()
        self.ln_1, self.ln_2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.attn = nn.MultiheadAttention(dim, heads, batch_first=True)
        self.mlp = nn.ModuleDict(dict(c_fc=nn.Linear(dim, 4 * dim), c_proj=nn.Linear(4 * dim, dim)))

    def forward(self, x):                                         # (B, L, dim)
        h = self.ln_1(x)
        x = x + self.attn(h, h, h, need_weights=False)[0]
        h = self.mlp["c_fc"](self.ln_2(x))
        return x + self.mlp["c_proj"](h * torch.sigmoid(1.702 * h))


class FaRLBackbone(nn.Module):
    """CLIP's ViT-B/16, no ln_post, no projection: (B, 3, 224, 224) -> (B, 197, 768), class token first."""

    def __init__(self, dim=768, depth=12, heads=12):
        super().__init__()
        self.conv1 = nn.Conv2d(3, dim, 16, 16, bias=False)
        self.class_embedding = nn.Parameter(0.02 * torch.randn(dim))
        self.positional_embedding = nn.Parameter(0.02 * torch.randn(197, dim))
        self.ln_pre = nn.LayerNorm(dim)
        self.transformer = nn.Module()
        self.transformer.resblocks = nn.Sequential(*[ViTBlock(dim, heads) for _ in range(depth)])

    def forward(self, x):
        x = self.conv1(x).flatten(2).mT                                                      # (B, 196, 768)
        x = torch.cat([self.class_embedding.expand(len(x), 1, -1), x], 1) + self.positional_embedding
        return self.transformer.resblocks(self.ln_pre(x))


class FaRLHead(nn.Module):
    """Mean and maximum of the patches and the class token, normalised, mixed in learned shares: 40 logits."""

    def __init__(self, dim=768, classes=40):
        super().__init__()
        self.norm_0, self.norm_1, self.norm_2 = nn.LayerNorm(dim), nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.weights = nn.Parameter(torch.zeros(1, 3, 1))
        self.final_fc = nn.Linear(dim, classes)

    def forward(self, tokens):                                    # (B, 197, 768)
        patches = tokens[:, 1:]
        parts = [self.norm_0(patches.mean(1)), self.norm_1(patches.amax(1)), self.norm_2(tokens[:, 0])]
        return self.final_fc((torch.stack(parts, 1) * self.weights.softmax(1)).sum(1))


class FaRLAttributes(nn.Module):
    """facer's "farl/celeba/224": (B, 3, 224, 224) RGB with CLIP's normalisation -> 40 logits, CelebA's order.
    File: face_attribute.farl.celeba.pt (facer, release models-v1). `probabilities` takes aligned faces."""
    # FFHQ's 512 px template -> facer's 224 px canvas, least squares over five points: 155 px, black around
    AFFINE = ((0.30266, 0.00364, 33.268), (-0.00364, 0.30266, 34.714))
    CLIP = ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))  # mean, standard deviation

    def __init__(self):
        super().__init__()
        self.backbone, self.head = FaRLBackbone(), FaRLHead()

    def forward(self, x):
        return self.head(self.backbone(x))

    def canvas(self, x):
        """(B, 3, S, S) FFHQ-aligned faces in [-1, 1] -> (B, 3, 224, 224) in [0, 1], differentiable."""
        affine = torch.tensor(self.AFFINE, dtype=torch.float64)
        back = torch.linalg.inv(affine[:, :2])
        # affine_grid counts both pictures from -1 to 1: canvas pixel 112 c + 112, picture pixel 256 n + 256
        shift = (back @ (112 - affine[:, 2:])) / 256 - 1
        theta = torch.cat([back * 112 / 256, shift], 1).to(x).expand(len(x), 2, 3)
        grid = F.affine_grid(theta, (len(x), 3, 224, 224), align_corners=False)
        return F.grid_sample(x * 0.5 + 0.5, grid, align_corners=False)

    def probabilities(self, x):
        """(B, 3, S, S) FFHQ-aligned faces in [-1, 1] -> (B, 40) in [0, 1]; `common.ATTRIBUTES` holds indices of 12."""
        mean, std = x.new_tensor(self.CLIP).view(2, 3, 1, 1)
        return self((self.canvas(x) - mean) / std).sigmoid()


class FIDInception(nn.Module):
    """Inception v3 with FID's own weights (pt_inception-2015-12-05-6726825d.pth): (B, 3, H, W) in [0, 1] -> (B, 2048).
    TensorFlow's network of 2015 differs from torchvision's in the last branch of every block: averages leave the padding out,
    and the last block takes the maximum. clean-fid's resizing to 299 px."""

    def __init__(self, path):
        super().__init__()
        from torchvision.models import inception_v3
        self.net = load_weights(inception_v3(weights=None, num_classes=1008, aux_logits=False, init_weights=False), path)
        self.net.fc = nn.Identity()
        average = functools.partial(F.avg_pool2d, kernel_size=3, stride=1, padding=1, count_include_pad=False)
        maximum = functools.partial(F.max_pool2d, kernel_size=3, stride=1, padding=1)
        for name in "5b 5c 5d 6b 6c 6d 6e 7b 7c".split():
            block = self.net.get_submodule(f"Mixed_{name}")
            block._forward = functools.partial(self.branches, block, block._forward, maximum if name == "7c" else average)
        self.eval()

    @staticmethod
    def branches(block, original, pool, x):
        return original(x)[:-1] + [block.branch_pool(pool(x))]

    def forward(self, x):
        x = F.interpolate(x, (299, 299), mode="bicubic", antialias=True, align_corners=False).clamp(0, 1)
        return self.net((x * 255 - 128) / 128)


class DINOv2(nn.Module):
    """DINOv2's normalised class token: (B, 3, H, W) in [0, 1] -> (B, D). `path`: a folder of transformers."""

    def __init__(self, path):
        super().__init__()
        from transformers import AutoModel
        # DIFFERS: Meta's module (pyiqa) resamples positions 0.1 of a patch beyond, which moves features by up to 1 %.
        self.net = from_folder(AutoModel, str(path), "weights", local_files_only=True).eval()

    def forward(self, x):
        x = F.interpolate(x, (224, 224), mode="bicubic", antialias=True, align_corners=False)
        mean, std = x.new_tensor([[0.485, 0.456, 0.406], [0.229, 0.224, 0.225]]).view(2, 3, 1, 1)
        return self.net((x.clamp(0, 1) - mean) / std).last_hidden_state[:, 0]


# ------------------------------------------------------------------------------------------------ the toy reader

class Reading(NamedTuple):
    """What FaceReader reads from (B, 3, S, S)."""
    identity: torch.Tensor                                        # (B, 128) unit vectors
    attributes: torch.Tensor                                      # (B, 12) logits, order of ATTRIBUTES
    heatmaps: torch.Tensor                                        # (B, 98, 32, 32) in 0..1: 1 where a point surely is
    quality: torch.Tensor                                         # (B,) in 0..1, higher is better, about 0.95 for a clean face


def conv_unit(width, out, stride=1):
    """3x3 convolution, BatchNorm, SiLU."""
    return nn.Sequential(nn.Conv2d(width, out, 3, stride, 1, bias=False), nn.BatchNorm2d(out), nn.SiLU())


class Residual(nn.Sequential):
    """x + f(x)."""

    def forward(self, x):
        return x + super().forward(x)


class FaceReader(nn.Module):
    """One small CNN that reads identity, 12 attributes, 98 landmarks and quality from (B, 3, S, S) in [-1, 1].

    It stands in for ArcFace, FaRL, AWing-FAN and quality networks in the toy preset, under their calls. toy/readers.py
    trains it on clean and degraded faces. Any size is resized to 64 px. SiLU keeps it smooth and frozen BatchNorm keeps the
    faces of a batch apart, so that every output can be a loss.
    """
    SIDE, GRID = 64, 32

    def __init__(self, width=16):
        super().__init__()
        w = width
        self.stem = conv_unit(3, w)                                                                 # 64 px
        self.stage1 = nn.Sequential(conv_unit(w, 2 * w, 2), Residual(conv_unit(2 * w, 2 * w)))      # 32
        self.stage2 = nn.Sequential(conv_unit(2 * w, 4 * w, 2), Residual(conv_unit(4 * w, 4 * w)))  # 16
        self.stage3 = nn.Sequential(conv_unit(4 * w, 8 * w, 2), Residual(conv_unit(8 * w, 8 * w)))  # 8
        self.stage4 = conv_unit(8 * w, 8 * w, 2)                                                    # 4
        self.identity, self.attributes = nn.Linear(8 * w * 16, 128), nn.Linear(8 * w * 16, 12)
        self.lateral2, self.merge2 = nn.Conv2d(8 * w, 4 * w, 1), conv_unit(4 * w, 4 * w)
        self.lateral1, self.merge1 = nn.Conv2d(4 * w, 2 * w, 1), conv_unit(2 * w, 2 * w)
        self.points = nn.Conv2d(2 * w, 98, 1)
        self.quality_head = nn.Sequential(nn.BatchNorm1d(10 * w), nn.Linear(10 * w, 32), nn.SiLU(), nn.Linear(32, 1))

    def stages(self, x):
        """Features at five resolutions, (B, w, 64, 64) to (B, 8 w, 4, 4): what a perceptual loss compares."""
        x, found = bilinear(x, self.SIDE, antialias=True), []
        for stage in (self.stem, self.stage1, self.stage2, self.stage3, self.stage4):
            x = stage(x)
            found.append(x)
        return found

    def pool(self, stages):
        """(B, 10 w): means of three fine stages, standard deviations of two, which blur lowers."""
        means = [s.float().mean((2, 3)) for s in stages[:3]]
        squares = [s.float().square().mean((2, 3)) for s in stages[:2]]
        deviations = [(q - m * m).clamp(min=1e-6).sqrt() for q, m in zip(squares, means)]
        return torch.cat(means + deviations, 1)

    def score(self, stages):
        """(B,) in 0..1. A loss could push an unbounded score to any value."""
        return self.quality_head(self.pool(stages))[:, 0].float().sigmoid()

    def point_logits(self, stages):
        """(B, 98, 32 * 32): their softmax is where each landmark is."""
        up = functools.partial(F.interpolate, scale_factor=2, mode="bilinear", align_corners=False)
        h = self.merge2(up(self.lateral2(stages[3])) + stages[2])                            # (B, 4w, 16, 16)
        h = self.merge1(up(self.lateral1(h)) + stages[1])                                    # (B, 2w, 32, 32)
        return self.points(h).float().flatten(2)

    def point_means(self, logits):
        """(B, 98, 32 * 32) -> (B, 98, 2): the mean of each distribution, 0..1 of width and height."""
        shares = logits.softmax(-1).unflatten(2, (self.GRID, self.GRID))
        cells = (torch.arange(self.GRID, device=logits.device) + 0.5) / self.GRID
        return torch.stack([(shares.sum(2) * cells).sum(-1), (shares.sum(3) * cells).sum(-1)], -1)  # no @: bf16

    def forward(self, x) -> Reading:
        stages = self.stages(x)
        whole, shares = stages[4].flatten(1), self.point_logits(stages).softmax(-1)
        # A Gaussian of sigma 1 and sum 1 has its peak at 1 / 2 pi: the factor brings sure points to 1, as FAN's are.
        maps = (2 * math.pi * shares).clamp(max=1).unflatten(2, (self.GRID, self.GRID))
        return Reading(F.normalize(self.identity(whole)), self.attributes(whole), maps, self.score(stages))

    def embed(self, x):
        """-> (B, 128) unit vectors."""
        return F.normalize(self.identity(self.stages(x)[4].flatten(1)))

    def heatmaps(self, x):
        """-> (B, 98, 32, 32) in 0..1."""
        return self(x).heatmaps

    def landmarks(self, x):
        """-> (B, 98, 2) pixels of x: the mean of each point's map, finer than its cells, differentiable."""
        points = self.point_means(self.point_logits(self.stages(x)))
        return points * points.new_tensor([x.shape[-1], x.shape[-2]])

    def probabilities(self, x):
        """-> (B, 12) in 0..1, order of ATTRIBUTES."""
        return self.attributes(self.stages(x)[4].flatten(1)).sigmoid()

    def features(self, x):
        """-> (B, 10 w): what fid_toy compares."""
        return self.pool(self.stages(x))


def load_reader(name="b", folder=None, needs=()):
    """A trained FaceReader, frozen, in eval mode: "a" and "c" for losses, "b" for measuring. UserError if missing.

    They differ in width or seed: no network measures what was optimised against it. folder: where reader_NAME.safetensors
    lie, default toy/weights. `needs`: which of "attributes", "landmarks", "identity" the caller reads. UserError where the
    file was trained without such labels, which `not_trained` of the reader names.
    """
    path = Path(folder or Path(__file__).parent / "toy" / "weights") / f"reader_{name}.safetensors"
    state = {key: v.float() if v.is_floating_point() else v for key, v in read_weights(path).items()}
    reader = FaceReader(len(state["stem.1.weight"]) if "stem.1.weight" in state else 16)
    load_strict(reader, state, path)
    with safetensors.safe_open(path, "pt") as file:               # a header is all it reads
        reader.not_trained = json.loads((file.metadata() or {}).get("not_trained", "[]"))
    if lacking := [label for label in needs if label in reader.not_trained]:
        raise UserError(f"{path}: was trained without {', '.join(lacking)}, which this run reads; train it on faces with such "
                        "labels (python -m toy.readers --help), or leave --readers out")
    return reader.eval().requires_grad_(False)


def feature_distance(reader, a, b):
    """The VGG losses' stand-in: mean distance of features, sum over stages. Pictures in [-1, 1] -> scalar."""
    return sum((x - y).abs().mean() for x, y in zip(reader.stages(a), reader.stages(b)))


def reader_lpips(reader, a, b):
    """LPIPS' stand-in: squared distance of unit feature vectors, mean over places, sum over stages. -> (B,)"""
    pairs = zip(reader.stages(a), reader.stages(b))
    return sum((F.normalize(x.float()) - F.normalize(y.float())).square().sum(1).mean((1, 2)) for x, y in pairs)


# ------------------------------------------------------------------------------------------------ tables of toy faces

@torch.no_grad()
def toy_scores(restored, hq, reader, lq=None):
    """Every number of a toy table: restored, hq (N, 3, S, S) in [-1, 1] -> {name: float}, means over images.

    psnr (RGB) and ssim (luma) of the images as 8-bit files would hold them, psnr_gain over lq if that is given. Numbers of
    the reader (load_reader("b")) end in _toy: fid, deg (degrees), lmd (pixels of the image), ald_e and ald_m (root of
    HonestFace's Eq. 14, pixels), attr (share of 12 attributes read alike), quality, lpips. fid_toy is NaN for a single face.
    A number whose label the reader was not trained on is left out.
    """
    same_images(restored, hq)
    if not restored.isfinite().all():
        raise UserError("the restored faces hold values that are not finite: the training diverged, or bf16 overflowed")
    device, rows, features = next(reader.parameters()).device, defaultdict(list), ([], [])
    eight_bits = lambda v: ((v.to(device).clamp(-1, 1) * 127.5 + 127.5).round() / 127.5 - 1)
    for place in range(0, len(hq), 64):
        x, y = [eight_bits(v[place:place + 64]) for v in (restored, hq)]
        rows["psnr"].append(psnr(x / 2 + 0.5, y / 2 + 0.5))
        rows["ssim"].append(ssim(x / 2 + 0.5, y / 2 + 0.5))
        if lq is not None:
            rows["psnr_gain"].append(rows["psnr"][-1] - psnr(eight_bits(lq[place:place + 64]) / 2 + 0.5, y / 2 + 0.5))
        (read_x, points_x), (read_y, points_y) = [(reader(v), reader.landmarks(v)) for v in (x, y)]
        if "identity" not in reader.not_trained:
            rows["deg_toy"].append(identity_angle(read_x.identity, read_y.identity))
        if "landmarks" not in reader.not_trained:
            rows["lmd_toy"].append(landmark_distance(points_x, points_y))
            for name, chosen in (("ald_e_toy", EYES_AND_BROWS), ("ald_m_toy", MOUTH)):
                rows[name].append(affine_landmark_distance(points_x[:, chosen], points_y[:, chosen]).sqrt())
        if "attributes" not in reader.not_trained:
            rows["attr_toy"].append(((read_x.attributes > 0) == (read_y.attributes > 0)).float().mean(1))
        rows["quality_toy"].append(read_x.quality)
        rows["lpips_toy"].append(reader_lpips(reader, x, y))
        for found, v in zip(features, (x, y)):
            found.append(reader.features(v))
    scores = {name: torch.cat(values).mean().item() for name, values in rows.items()}
    x, y = [torch.cat(found) for found in features]
    return scores | {"fid_toy": frechet_distance(x, y).item() if len(x) > 1 else math.nan}


def toy_protocol(data, degradation, count, readers=""):
    """How the numbers of toy_scores came about, for metrics.json: {name: text}. readers: as for `load_reader`."""
    reader = f"; FaceReader {readers or 'toy/weights'}/reader_b.safetensors, whole image at 64 px"
    by_reader = dict(
        fid=f"Frechet distance of pooled features to the same {count} clean faces", deg="angle between embeddings in degrees",
        lmd="mean distance of 98 points in pixels of the image", attr="share of 12 attributes read alike",
        ald_e="root of HonestFace's Eq. 14, 34 points of eyes and brows, pixels of the image",
        lpips="LPIPS' form on the reader's features",
        ald_m="root of HonestFace's Eq. 14, 20 points of the mouth, pixels of the image",
        quality="guess of 1 - sqrt(1 - SSIM to the clean face)")
    return dict(
        faces=f"{count} held-out faces of {data or 'the toy world'}", degradation=degradation,
        psnr="RGB, 8 bits", psnr_gain="PSNR minus the PSNR of the degraded face",
        ssim="luma (BT.601, full range), 11x11 Gaussian of sigma 1.5, valid windows, 8 bits",
        **{f"{name}_toy": text + reader for name, text in by_reader.items()})


# ------------------------------------------------------------------------------------------------ measuring folders

@dataclass(frozen=True)
class Measure:
    """Measure restored faces against references of the same names: python metrics.py RESTORED --reference CLEAN."""
    input: str                             # folder of restored faces, or one file
    reference: str                         # folder of the clean faces
    weights: str = ""                      # folder of released networks; what it lacks is skipped by name
    real_set: str = ""                     # folder of real faces, such as FFHQ: adds fid_real, fid_dino_real, mmd_dino_real
    posterior_mean: str = ""               # folder of posterior means: adds indrmse
    device: str = "auto"                   # auto, cpu, cuda, cuda:1, mps


# {numbers: (protocol, patterns of the files in --weights that are all needed, loader of those files)}; docs/weights.md says
# where they come from. | stands between alternatives.
NETWORKS = {
    "lpips": ("AlexNet, v0.1, RGB, whole image", ["alexnet*.pth"], functools.partial(lpips_network, "alex")),
    "lpips-vgg": ("VGG16, v0.1, RGB, whole image", ["vgg16*.pth"], functools.partial(lpips_network, "vgg")),
    "dists": ("VGG16, released alpha and beta, RGB, not resized", ["dists*.pt*|DISTS*.pth|weights.pt", "vgg16*.pth"], DISTS),
    "deg, ids": ("ArcFace ResNet-18, whole face grey at 128 px; degrees (pairs below 1 left out), cosine",
                 ["resnet18_110*.pth|arcface_resnet18*.pth"], lambda file: load_weights(ArcFaceGray(), file)),
    "ids_ir50": ("cosine, IR-50 at 112 px, fixed crop, BGR if AdaFace's, else RGB", ["*ir50*|*ir_50*|*ir_se50*"],
                 lambda file: load_iresnet(file, "adaface" in file.name.lower())),
    "ids_ir101": ("cosine, IR-101 at 112 px, fixed crop, BGR if AdaFace's, else RGB", ["*ir101*|*ir_101*"],
                  lambda file: load_iresnet(file, "adaface" in file.name.lower())),
    "lmd, ald_e, ald_m": ("AWing FAN at 256 px, pixels at 512; mean of 98 points, root of HonestFace's Eq. 14 of eyes and "
                          "brows, of the mouth", ["*WFLW_4HG*.pth"], lambda file: load_weights(FAN98(), file)),
    "attr": ("share of 40 CelebA attributes read alike, FaRL ViT-B/16, 224 px", ["face_attribute.farl*.pt"],
             lambda file: load_weights(FaRLAttributes(), file)),
    "fid": ("Inception v3 of FID, 2048-d, bicubic antialiased 299 px", ["pt_inception-2015-12-05*.pth"], FIDInception),
    "fid_dino, mmd_dino": ("DINOv2 class token, bicubic antialiased 224 px; MMD: RBF, sigma 10, x 1000", ["dinov2*"], DINOv2)}


def open_networks(folder, device, skipped):
    """({number: network}, {number: protocol}) of what --weights holds. What it lacks goes into `skipped`."""
    net, protocol = {}, {}
    for names, (text, patterns, load) in NETWORKS.items():
        files = [[path for glob in pattern.split("|") for path in sorted(Path(folder).glob(glob))] if folder else []
                 for pattern in patterns]
        if not all(files):
            skipped[names] = f"put {' and '.join(patterns)} into --weights; see docs/weights.md"
            continue
        network = load(*[paths[0] for paths in files]).to(device)
        for name in names.split(", "):
            net[name], protocol[name] = network, f"{text} ({files[0][0].name})"
    return net, protocol


def pair_files(cfg):
    """[[restored, reference, posterior mean if there is one]]: files of one name, with or without the suffix."""
    files, *others = [list_images(place) for place in (cfg.input, cfg.reference, cfg.posterior_mean) if place]
    names = [{path.stem: path for path in side} | {path.name: path for path in side} for side in others]
    rows = [[path, *[side.get(path.name, side.get(path.stem)) for side in names]] for path in files]
    if lone := [path.name for path, partner, *_ in rows if not partner]:
        print(f"{len(lone)} of {len(files)} files in {cfg.input} are not in --reference {cfg.reference}: {lone[0]} ...")
    return [[path for path in row if path] for row in rows if row[1]]


def pair_numbers(net, x, y, estimate=None):
    """{number: (1,)} by the networks there are: restored, reference, posterior mean, each (1, 3, H, W) in [-1, 1]."""
    a, b = x / 2 + 0.5, y / 2 + 0.5
    found = {"psnr": psnr(a, b), "ssim": ssim(a, b)}
    if estimate is not None:
        found["indrmse"] = ind_rmse(a, estimate / 2 + 0.5)
    if min(x.shape[-2:]) >= 176:
        found["ms_ssim"] = ms_ssim(a, b)
    for name in [name for name in net if name.startswith("lpips")]:
        found[name] = net[name](x, y).flatten()
    if "dists" in net:
        found["dists"] = net["dists"](a, b)
    if "deg" in net:
        angle = identity_angle(net["deg"].embed(x), net["deg"].embed(y))
        found["deg"] = torch.where(angle < 1, math.nan, angle)    # PMRF's and VQFR's scripts leave such pairs out
    for name in [name for name in net if name.startswith("ids")]:
        found[name] = identity_similarity(net[name].embed(x), net[name].embed(y))
    if "lmd" in net:
        p, q = [net["lmd"].landmarks(v) * 512 / v.shape[-1] for v in (x, y)]
        found["lmd"] = landmark_distance(p, q)
        found["ald_e"] = affine_landmark_distance(p[:, EYES_AND_BROWS], q[:, EYES_AND_BROWS]).sqrt()
        found["ald_m"] = affine_landmark_distance(p[:, MOUTH], q[:, MOUTH]).sqrt()
    if "attr" in net:
        p, q = [net["attr"].probabilities(v) > 0.5 for v in (x, y)]
        found["attr"] = (p == q).float().mean(1)
    return found


@torch.no_grad()
def measure(cfg):
    """Print a table, what was skipped and why, and one line of JSON for a folder of restored faces."""
    device, skipped, pairs = pick_device(cfg.device), {}, pair_files(cfg)
    net, protocol = open_networks(cfg.weights, device, skipped)
    protocol |= dict(psnr="RGB, 8-bit files; identical pairs left out", indrmse=f"RMSE to {cfg.posterior_mean}, RGB in [0, 1]",
                     ssim="luma (BT.601, full range), 11x11 Gaussian of sigma 1.5, valid windows",
                     ms_ssim="luma, product of five scales")
    values, features, small = defaultdict(list), defaultdict(list), []           # features: {(network, set): [(1, D)]}
    sets = [name for name in ("fid", "fid_dino") if name in net]
    real = [[path] for path in list_images(cfg.real_set, recursive=True)] if cfg.real_set and sets else []
    for files in tqdm(pairs + real, "measuring", disable=None):
        try:
            x, *others = [read_image(path)[None].to(device) for path in files]
            found = pair_numbers(net, x, *others) if others else {}
        except ValueError as error:                               # a damaged picture, two sizes, or smaller than 11 px
            skipped[" and ".join(map(str, files))] = str(error)
            continue
        for name, value in found.items():
            values[name].append(value.item())
        for kind, image in {"restored": x, "gt": others[0]}.items() if others else [("real", x)]:
            for name in sets:
                features[name, kind].append(net[name](image / 2 + 0.5).cpu())
        if others and max(x.shape[-2:]) <= FaceReader.SIDE:
            small.append([bilinear(v, FaceReader.SIDE, antialias=True).cpu() for v in (x, others[0])])
    if not values:
        names, reason = next(reversed(skipped.items())) if pairs else (cfg.reference, "no file has the name of a restored one")
        raise UserError(f"no pair was measured: {names}: {reason}")
    if cfg.posterior_mean and "indrmse" not in values:
        skipped["indrmse"] = f"{cfg.posterior_mean} has no file with the name of a restored one"

    rows = []                                                     # (number, value, N, protocol)
    for name, column in values.items():                           # identical pairs have an infinite PSNR
        kept = [v for v in column if math.isfinite(v)] or [v for v in column if not math.isnan(v)]
        rows.append((name, sum(kept) / len(kept) if kept else math.nan, len(kept), protocol[name]))
    for name, kind in [key for key in features if key[1] != "restored"]:
        x, y = [torch.cat(features[name, side]) for side in ("restored", kind)]
        text = f"{protocol[name]}; against {len(y)} files of {cfg.real_set if kind == 'real' else cfg.reference}"
        if min(len(x), len(y)) < 2:
            skipped[f"{name}_{kind}"] = "one picture; a distance of sets needs two on both sides"
            continue
        if min(len(x), len(y)) <= x.shape[1]:
            text += f"; too few for {x.shape[1]} dimensions: biased, compare equal numbers of files alone"
        rows.append((f"{name}_{kind}", frechet_distance(x, y).item(), len(x), text))
        if name == "fid_dino":
            rows.append((f"mmd_dino_{kind}", mmd_rbf(x, y).item(), len(x), text))
    if len(small) == len(values["psnr"]):                         # every face is small: the toy reader looks, too
        x, y = [torch.cat(side) for side in zip(*small)]
        scores, texts = toy_scores(x, y, load_reader("b").to(device)), toy_protocol(cfg.reference, "", len(x))
        rows += [(name, value, len(x), texts[name].replace("of the image", "at 64 px"))
                 for name, value in scores.items() if name.endswith("_toy")]

    print(f"{'metric':18}  {'value':>10}  {'N':>6}  protocol")
    for name, value, count, text in rows:
        print(f"{name:18}  {value:10.4f}  {count:6d}  {text}")
    for names, reason in skipped.items():
        print(f"skipped {names}: {reason}")
    about = dict(restored=cfg.input, reference=cfg.reference, N={name: n for name, _, n, _ in rows})
    print(json.dumps({name: value if math.isfinite(value) else None for name, value, *_ in rows}
                     | dict(skipped=skipped, protocol=about | {name: text for name, _, _, text in rows})))


def main(argv=None):
    """`metrics.py RESTORED ...` is short for `metrics.py measure --input RESTORED ...`."""
    argv = sys.argv[1:] if argv is None else list(argv)
    if argv[:1] != ["measure"]:
        argv = ["measure", *["--input"] * bool(argv and argv[0][:1] != "-"), *argv]
    command_line(__doc__, {"measure": (Measure, {}, measure)}, argv)


if __name__ == "__main__":
    main()
