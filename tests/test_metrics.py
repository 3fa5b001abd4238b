"""Metrics against closed forms, loops, numpy and scipy; measuring networks against short rewrites; the program; the readers."""
import itertools
import json
import math
from unittest import mock

import numpy as np
import pytest
import scipy.linalg
import scipy.stats
import torch
import torch.nn.functional as F
import torchvision

import common
import metrics
from toy import faces as toy
from toy import readers

f64 = torch.float64


@pytest.fixture(autouse=True)
def seeded():
    """Every test draws the same numbers, alone or in the suite."""
    torch.manual_seed(0)


def number(value):
    """A metric's value as a float, whether it comes per image or as one number."""
    return float(torch.as_tensor(value).double().mean())


def redraw(net):
    """The network in eval mode with parameters and running statistics away from their initial values."""
    for p in itertools.chain(net.parameters(), (b for n, b in net.named_buffers() if "running" in n)):
        p.data = torch.randn_like(p) / p[0].numel() ** .5 if p.dim() > 1 else p + .1 * torch.randn_like(p)
    return net.eval()


def test_psnr_is_ten_log_ten_of_the_mean_square_and_indrmse_a_root_per_image():
    """Images in [0, 1]: an offset of 0.1 is 20 dB, of 0.01 is 40 dB; symmetric."""
    a = torch.rand(2, 3, 32, 32) * .5
    assert number(metrics.psnr(a, a + .1)) == pytest.approx(20, abs=1e-3)
    assert number(metrics.psnr(a + .01, a)) == pytest.approx(40, abs=1e-2)
    assert metrics.ind_rmse(a, a + torch.tensor([.1, .3]).view(2, 1, 1, 1)).tolist() == pytest.approx([.1, .3])


def slow_ssim(a, b, luminance=True):
    """SSIM of two single-channel images, or its contrast and structure alone: 11 x 11 Gaussian window, sigma 1.5."""
    window = torch.exp(-(torch.arange(11, dtype=f64) - 5) ** 2 / (2 * 1.5 ** 2))
    blur = lambda v: F.conv2d(v.double(), (torch.outer(window, window) / window.sum() ** 2)[None, None])
    ma, mb, c1, c2 = blur(a), blur(b), .01 ** 2, .03 ** 2
    va, vb, cov = blur(a * a) - ma ** 2, blur(b * b) - mb ** 2, blur(a * b) - ma * mb
    structure = (2 * cov + c2) / (va + vb + c2)
    return (structure * ((2 * ma * mb + c1) / (ma ** 2 + mb ** 2 + c1) if luminance else 1)).mean().item()


def test_ssim_equals_a_gaussian_window_loop_on_grey_images():
    """On R = G = B it is the SSIM of the grey (or of BT.601 luma, (16 + 219 grey) / 255); 1 at equality."""
    a = torch.rand(1, 1, 24, 30, dtype=f64)
    b = (a + .2 * torch.randn_like(a)).clamp(0, 1)
    flat = torch.full_like(a, .3), torch.full_like(a, .5)
    assert slow_ssim(*flat) == pytest.approx((.3 + 1e-4) / (.34 + 1e-4))                # 2 m n / (m^2 + n^2)
    for x, y in ((a, b), (b, a), flat, (a, a)):
        got = number(metrics.ssim(x.expand(-1, 3, -1, -1), y.expand(-1, 3, -1, -1)))
        assert min(abs(got - slow_ssim(*pair)) for pair in ((x, y), [(16 + 219 * v) / 255 for v in (x, y)])) < 1e-4


@pytest.mark.parametrize("side", [44, 45])
def test_ms_ssim_is_the_product_over_halved_images(side):
    """Two scales by hand: mean structure of the first to the power w_1, SSIM of the second to w_2, w rescaled.
    An odd side gets a zero before it, as pyiqa's does."""
    a = torch.rand(1, 1, side, side, dtype=f64)
    b = (a + .1 * torch.randn_like(a)).clamp(0, 1)
    x, y = [metrics.luma(v.expand(-1, 3, -1, -1)) for v in (a, b)]
    halves = [F.interpolate(F.pad(v, (side % 2, 0, side % 2, 0)), scale_factor=.5, mode="area") for v in (x, y)]
    w, big = .0448 / (.0448 + .2856), torch.rand(1, 3, 176, 176)
    want = slow_ssim(x, y, luminance=False) ** w * slow_ssim(*halves) ** (1 - w)
    got = metrics.ms_ssim(a.expand(-1, 3, -1, -1), b.expand(-1, 3, -1, -1), scales=2)
    assert number(got) == pytest.approx(want, abs=1e-9) and number(metrics.ms_ssim(big, big)) == pytest.approx(1)


def test_fid_inception_equals_torchvision_with_other_pooling(tmp_path):
    """Averages leave the padding out, the very last block takes the maximum; counters may lack in the file."""
    net = redraw(torchvision.models.inception_v3(weights=None, num_classes=1008, aux_logits=False, init_weights=False))
    torch.save({n: t for n, t in net.state_dict().items() if "num_batches" not in n}, tmp_path / "w.pth")
    features, x, average, blocks = metrics.FIDInception(tmp_path / "w.pth"), torch.rand(2, 3, 299, 299), F.avg_pool2d, []
    for name, block in net.named_children():
        block.register_forward_pre_hook(lambda *_, name=name: blocks.append(name))

    def pool(v, **kernel):
        last = blocks[-1] == "Mixed_7c"
        return F.max_pool2d(v, **kernel) if last else average(v, **kernel, count_include_pad=False)
    with torch.no_grad():
        got, net.fc = features(x), torch.nn.Identity()
        with mock.patch.object(F, "avg_pool2d", pool):
            torch.testing.assert_close(got, net((x * 255 - 128) / 128), rtol=1e-4, atol=1e-5)
    assert got.shape == (2, 2048)


def test_frechet_distance_equals_scipy_sqrtm():
    """|dm|^2 + tr(C1 + C2 - 2 (C1 C2)^(1/2)): symmetric, zero between equal sets, right for fewer samples than features."""
    x, y = (torch.randn(n, 12, dtype=f64) @ torch.randn(12, 12, dtype=f64) + n / 100 for n in (200, 150))
    c1, c2 = np.cov(x.numpy().T), np.cov(y.numpy().T)
    want = np.trace(c1 + c2 - 2 * scipy.linalg.sqrtm(c1 @ c2).real) + (x.mean(0) - y.mean(0)).square().sum()
    for p, q, expected in ((x, y, want.item()), (y, x, want.item()), (x, x, 0)):
        assert number(metrics.frechet_distance(p, q)) == pytest.approx(expected, rel=1e-5, abs=1e-6)
    assert number(metrics.frechet_distance(x.float(), y.float())) == pytest.approx(want.item(), rel=1e-4)
    x = torch.randn(10, 40, dtype=f64)
    assert number(metrics.frechet_distance(x, x + .5)) == pytest.approx(10, abs=1e-2)


def test_mmd_rbf_equals_whole_kernel_matrices():
    """1000 (mean kxx + mean kyy - 2 mean kxy), diagonals included, k = exp(-|a - b|^2 / (2 sigma^2)); chunks do not matter."""
    kernel = lambda a, b, sigma: (-torch.cdist(a.double(), b.double()) ** 2 / (2 * sigma ** 2)).exp().mean().item()
    full = lambda x, y, sigma: kernel(x, x, sigma) + kernel(y, y, sigma) - 2 * kernel(x, y, sigma)
    x, y = torch.randn(7, 4, dtype=f64) * 8, torch.randn(9, 4, dtype=f64) * 8 + 3
    assert number(metrics.mmd_rbf(x, y)) == pytest.approx(1000 * full(x, y, 10), rel=1e-6)
    assert number(metrics.mmd_rbf(x, y, sigma=3., scale=2.)) == pytest.approx(2 * full(x, y, 3), rel=1e-6)
    x, y = torch.randn(1500, 3) * 5, torch.randn(1100, 3) * 5 + 1                        # more than 1024 rows
    assert number(metrics.mmd_rbf(x, y)) == pytest.approx(1000 * full(x, y, 10), rel=1e-3)


def test_identity_angle_in_degrees_and_landmark_distance_in_pixels():
    """Angles whatever the lengths, never nan where rounding takes the cosine past 1; a mean of Euclidean distances:
    a shift of all points by (3, 4) is 5 px, of half of them 2.5 px; not divided by any face size."""
    a, b = torch.eye(512)[:2]
    for other, degrees in ((5 * a, 0), (2 * b, 90), (-3 * a, 180), (a + 3 ** .5 * b, 60)):
        assert number(metrics.identity_angle(a[None], other[None])) == pytest.approx(degrees, abs=.1)
    e = torch.randn(200, 512)
    assert torch.as_tensor(metrics.identity_angle(e, e)).max() < .1                          # false for nan
    assert torch.as_tensor(metrics.identity_angle(e, -e)).min() > 179.9
    a, half = torch.rand(2, 98, 2) * 512, torch.arange(98)[:, None] % 2
    for factor, want in ((1, 5), (half, 2.5)):
        assert number(metrics.landmark_distance(a, a + factor * torch.tensor([3., 4.]))) == pytest.approx(want, rel=1e-4)


def numpy_affine(L, H, w):
    """Weighted least squares by numpy's pinv: the 2 x 3 matrix and the weighted sum of squares it leaves."""
    L, H, w = (v.detach().double().numpy() for v in (L, H, w))
    design, root = np.concatenate([L, np.ones((len(L), 1))], 1), np.sqrt(w)[:, None]
    A = (np.linalg.pinv(root * design) @ (root * H)).T
    return A, float((w[:, None] * (design @ A.T - H) ** 2).sum())


@pytest.mark.parametrize("k", [4, 20, 98])
def test_eq14_eq15_equal_numpy_least_squares(k):
    """Matrix and value are numpy's, with and without weights, per item of leading batch dimensions."""
    (L, H), w = torch.randn(2, 2, 3, k, 2, dtype=f64), torch.rand(2, 3, k, dtype=f64)
    for weights in (w, None):
        d, A = metrics.affine_landmark_distance(L, H, weights), metrics.affine_fit(L, H, weights)
        assert d.shape == (2, 3) and A.shape == (2, 3, 2, 3)
        for i, j in np.ndindex(2, 3):
            want_A, want = numpy_affine(L[i, j], H[i, j], w[i, j] if weights is w else torch.ones(k))
            np.testing.assert_allclose(A[i, j].numpy(), want_A, atol=1e-8)
            assert d[i, j].item() == pytest.approx(want, abs=1e-9)


def test_eq14_invariances_and_gradient():
    """Any affine map (mirrors too) of L is undone; H's similarity scales by s^2, weights linearly."""
    d = lambda L, H, w=None: metrics.affine_landmark_distance(L, H, w).item()
    (L, H), w = torch.randn(2, 20, 2, dtype=f64), torch.rand(20, dtype=f64)
    base, (shear, turn) = d(L, H, w), torch.tensor([[[1.2, .7], [-.3, .9]], [[.6, -.8], [.8, .6]]], dtype=f64)
    assert d(L, L @ shear.T + 3, w) == pytest.approx(0, abs=1e-12)                    # an affine copy
    assert d(L @ shear.T - 2, H, w) == pytest.approx(base)
    assert d(L * torch.tensor([-1., 1.]), H, w) == pytest.approx(base)                # mirror
    assert d(L, 2.5 * H @ turn.T + 7, w) == pytest.approx(2.5 ** 2 * base)
    assert d(L, H, 3 * w) == pytest.approx(3 * base)
    assert base < (w[:, None] * (L - H) ** 2).sum().item()                       # the identity is one choice
    assert abs(d(H, L, w) - base) > 1e-3 * base                                       # not symmetric
    w[7] = 0                                                                          # a dropped point
    assert d(L, H.index_fill(0, torch.tensor(7), 1e4), w) == pytest.approx(d(L, H, w), rel=1e-6)
    ask = (L[:6].requires_grad_(), H[:6].requires_grad_(), w[:6].requires_grad_())
    assert torch.autograd.gradcheck(metrics.affine_landmark_distance, ask)           # finite differences at rank 3


@pytest.mark.parametrize("k, direction", [(1, 0), (2, 0), (3, 0), (8, (2, -1)), (8, (0, 1)), (8, (0, 0))])
def test_eq14_degenerate_points(k, direction):
    """Fewer than three, collinear or coincident points: the minimum still exists (numpy's pinv)."""
    L, H = torch.randn(2, k, 2, dtype=f64) * 100 + 256
    if direction:
        L = 200 + 90 * torch.randn(k, 1, dtype=f64) * torch.tensor(direction)
    want = numpy_affine(L, H, torch.ones(k))[1]
    for dtype, tolerance in ((f64, 1e-6), (torch.float32, 1e-3)):
        d = metrics.affine_landmark_distance(L.to(dtype), H.to(dtype))
        assert torch.isfinite(metrics.affine_fit(L.to(dtype), H.to(dtype))).all()
        assert d.item() == pytest.approx(want, rel=tolerance, abs=10 * tolerance)


def test_eq14_by_hand_and_in_float32_at_512_pixels():
    """A unit-square corner moved by (a, b) costs (a^2 + b^2) / 4; eye points at 512 px are right to 1e-4."""
    L, H = torch.tensor([[[0., 0], [1, 0], [1, 1], [0, 1]], [[0, 0], [1, 0], [1, 1], [.6, .2]]])
    assert metrics.affine_landmark_distance(L, H).item() == pytest.approx(.25, rel=1e-4)    # a = .6, b = -.8
    for _ in range(20):
        L = torch.rand(34, 2) * torch.tensor([160., 40.]) + torch.tensor([180., 220.])
        H = L @ torch.tensor([[1.02, .03], [-.02, .98]]) + torch.randn(34, 2)
        want = numpy_affine(L, H, torch.ones(34))[1]
        assert metrics.affine_landmark_distance(L, H).item() == pytest.approx(want, rel=1e-4)


def slow_dists(convs, alpha, beta, x, y):
    """DISTS from its 13 VGG-16 convolutions: L2 pooling between stages, two terms per channel."""
    window = torch.tensor([[1., 2., 1.], [2., 4., 2.], [1., 2., 1.]]) / 16
    mean, std = torch.tensor([[.485, .456, .406], [.229, .224, .225]]).view(2, 3, 1, 1)

    def features(v):
        out, convs_left, h = [v], iter(convs), (v - mean) / std
        for stage, depth in enumerate((2, 2, 3, 3, 3)):
            if stage:
                c = h.shape[1]
                h = (F.conv2d(h ** 2, window.expand(c, 1, 3, 3), stride=2, padding=1, groups=c) + 1e-12).sqrt()
            for conv in itertools.islice(convs_left, depth):
                h = F.relu(F.conv2d(h, conv.weight, conv.bias, padding=1))
            out.append(h)
        return [o.double().flatten(2) for o in out]

    terms = [[], []]
    for a, b in zip(features(x), features(y)):
        ma, mb, va, vb = a.mean(-1), b.mean(-1), a.var(-1, correction=0), b.var(-1, correction=0)
        covariance = (a * b).mean(-1) - ma * mb
        terms[0].append((2 * ma * mb + 1e-6) / (ma ** 2 + mb ** 2 + 1e-6))
        terms[1].append((2 * covariance + 1e-6) / (va + vb + 1e-6))
    s1, s2 = (torch.cat(t, 1) for t in terms)
    return 1 - (alpha.flatten() * s1 + beta.flatten() * s2).sum(1) / (alpha.sum() + beta.sum())


@pytest.mark.parametrize("size", [(32, 32), (48, 33)])
def test_dists_equals_a_slow_reimplementation(size):
    """Same VGG weights, random alpha and beta: zero at equality, symmetric, and equal to the formulas."""
    net = metrics.DISTS().eval()
    convs = [m for m in net.modules() if isinstance(m, torch.nn.Conv2d) and m.groups == 1]
    assert [m.out_channels for m in convs] == [64] * 2 + [128] * 2 + [256] * 3 + [512] * 6
    assert net.alpha.shape == net.beta.shape == (1, 1475, 1, 1)
    a, b = torch.rand(2, 2, 3, *size)
    with torch.no_grad():
        for m in convs:
            m.weight.normal_(0, (2 / m.weight[0].numel()) ** .5), m.bias.normal_(0, .1)
        net.alpha.uniform_(), net.beta.uniform_()
        want = slow_dists(convs, net.alpha.double(), net.beta.double(), a, b)
        assert number(net(a, b)) == pytest.approx(number(want), rel=1e-3) and number(want) > .01
        assert number(net(b, a)) == pytest.approx(number(net(a, b)), rel=1e-4)
        assert number(net(a, a)) == pytest.approx(0, abs=1e-5)


@pytest.mark.parametrize("depth, layout", [(18, "adaface"), (50, "adaface"), (50, "ir"), (50, "ir_se")])
def test_iresnet_equals_a_functional_reimplementation_and_loads_by_its_file(tmp_path, depth, layout):
    """BN conv (BN) PReLU conv(stride) BN, a gate per channel in ir_se; subsampled or conv1x1-BN shortcuts; BN-fc-BN head."""
    net = redraw(metrics.IResNet(depth, layout=layout))
    w, k, x = net.state_dict(), int(layout == "adaface"), torch.rand(1, 3, 112, 112) * 2 - 1
    bn = lambda name, v: F.batch_norm(v, *[w.get(f"{name}.{p}") for p in ("running_mean", "running_var", "weight", "bias")])
    with torch.no_grad():
        got = net(x)
        torch.save({"state_dict": {f"model.{name}": v for name, v in w.items()}}, tmp_path / "net.ckpt")
        assert torch.equal(metrics.load_iresnet(tmp_path / "net.ckpt").eval()(x), got)
        x = F.prelu(bn("input_layer.1", F.conv2d(x, w["input_layer.0.weight"], padding=1)), w["input_layer.2.weight"])
        stages = {18: (2, 2, 2, 2), 50: (3, 4, 14, 3)}[depth]
        for i, stride in enumerate([s for units in stages for s in [2] + [1] * (units - 1)]):
            name, short = f"body.{i}.res_layer", f"body.{i}.shortcut_layer"
            h = F.conv2d(bn(f"{name}.0", x), w[f"{name}.1.weight"], padding=1)
            h = F.prelu(bn(f"{name}.2", h) if k else h, w[f"{name}.{2 + k}.weight"])
            h = bn(f"{name}.{4 + k}", F.conv2d(h, w[f"{name}.{3 + k}.weight"], stride=stride, padding=1))
            if layout == "ir_se":
                squeezed = (h.mean((2, 3)) @ w[f"{name}.5.fc1.weight"][:, :, 0, 0].T).relu()
                h = h * (squeezed @ w[f"{name}.5.fc2.weight"][:, :, 0, 0].T).sigmoid()[:, :, None, None]
            x = x[..., ::stride, ::stride]
            x = h + (bn(f"{short}.1", F.conv2d(x, w[f"{short}.0.weight"])) if f"{short}.0.weight" in w else x)
        fc = F.linear(bn("output_layer.0", x).flatten(1), w["output_layer.3.weight"], w["output_layer.3.bias"])
    assert x.shape == (1, 512, 7, 7) and ("output_layer.4.weight" in w) == (layout != "adaface")
    torch.testing.assert_close(got, bn("output_layer.4", fc), rtol=1e-3, atol=1e-4)
    with torch.device("meta"):
        nets = metrics.IResNet(50), metrics.IResNet(101), metrics.FAN98()
    assert [round(sum(p.numel() for p in n.parameters()) / 1e6, 2) for n in nets] == [43.59, 65.15, 24.15]    # as printed


def test_arcface_gray_equals_a_functional_reimplementation():
    """ResNet-18 of IR blocks on 1 x 128 x 128 with GFPGAN's names (one PReLU per block, used twice)."""
    net = redraw(metrics.ArcFaceGray())
    modules, norm = dict(net.named_modules()), lambda m, x: F.batch_norm(x, m.running_mean, m.running_var, m.weight, m.bias)
    act, x = lambda name, x: F.prelu(x, modules[name].weight), torch.rand(2, 1, 128, 128) * 2 - 1
    with torch.no_grad():
        got = net(x)
        x = F.max_pool2d(act("prelu", norm(net.bn1, F.conv2d(x, net.conv1.weight, padding=1))), 2)
        for i, j in itertools.product(range(1, 5), range(2)):
            block, stride = modules[f"layer{i}.{j}"], 2 if i > 1 and j == 0 else 1
            h = norm(block.bn1, F.conv2d(norm(block.bn0, x), block.conv1.weight, padding=1))
            h = F.conv2d(act(f"layer{i}.{j}.prelu", h), block.conv2.weight, stride=stride, padding=1)
            if stride == 2:
                x = norm(block.downsample[1], F.conv2d(x, block.downsample[0].weight, stride=2))
            x = act(f"layer{i}.{j}.prelu", norm(block.bn2, h) + x)
        want = norm(net.bn5, F.linear(norm(net.bn4, x).flatten(1), net.fc5.weight, net.fc5.bias))
    assert got.shape == (2, 512) and modules["prelu"].weight.numel() == 1
    torch.testing.assert_close(F.normalize(got), F.normalize(want), rtol=1e-3, atol=1e-5)


def test_fan98_returns_heatmaps():
    """256 px in, 98 maps of 64 x 64 out; batch and single image agree."""
    net, x = metrics.FAN98().eval(), torch.rand(2, 3, 256, 256)
    with torch.no_grad():
        both, one = net(x), net(x[1:])
    torch.testing.assert_close(both[1:], one, rtol=1e-3, atol=1e-4)
    assert both.shape == (2, 98, 64, 64) and both.std() > 0


def test_farl_attributes_equal_transformers_clip_and_a_hand_written_head():
    """Trunk = CLIPVisionModel ViT-B/16 on the same weights; head = softmax mix of mean, max, CLS."""
    from transformers import CLIPVisionConfig, CLIPVisionModel
    net, seen = redraw(metrics.FaRLAttributes()), []
    w = net.state_dict()
    assert sum(v.numel() for k, v in w.items() if k.startswith("head.")) == 35_371
    clip = CLIPVisionModel(CLIPVisionConfig(hidden_size=768, intermediate_size=3072, patch_size=16)).eval()
    parts = {"layer_norm1": "ln_1", "layer_norm2": "ln_2", "mlp.fc1": "mlp.c_fc", "mlp.fc2": "mlp.c_proj",
             "self_attn.out_proj": "attn.out_proj"}
    state = {k: w["backbone." + v] for k, v in (
        ("embeddings.class_embedding", "class_embedding"), ("embeddings.position_embedding.weight", "positional_embedding"),
        ("embeddings.patch_embedding.weight", "conv1.weight"), ("pre_layrnorm.weight", "ln_pre.weight"),
        ("pre_layrnorm.bias", "ln_pre.bias"))}
    for i, p in itertools.product(range(12), ("weight", "bias")):
        ours, theirs = f"backbone.transformer.resblocks.{i}.", f"encoder.layers.{i}."
        state |= {f"{theirs}{k}.{p}": w[f"{ours}{v}.{p}"] for k, v in parts.items()}
        state |= {f"{theirs}self_attn.{n}_proj.{p}": v for n, v in zip("qkv", w[f"{ours}attn.in_proj_{p}"].chunk(3))}
    assert sum("backbone" in k for k in w) == len(state) - 4 * 12                       # q, k, v are one here
    missing, unexpected = clip.load_state_dict(state, strict=False)
    assert not unexpected and all("post_layernorm" in k for k in missing)
    net.backbone.conv1.register_forward_pre_hook(lambda m, args: seen.append(args[0]))
    with torch.no_grad():
        got = net(torch.rand(1, 3, 224, 224))
        tokens = clip(pixel_values=seen[0]).last_hidden_state
        parts = tokens[:, 1:].mean(1), tokens[:, 1:].amax(1), tokens[:, 0]
        mixed = sum(s * F.layer_norm(v, (768,), w[f"head.norm_{k}.weight"], w[f"head.norm_{k}.bias"])
                    for k, (v, s) in enumerate(zip(parts, w["head.weights"].flatten().softmax(0))))
        want = F.linear(mixed, w["head.final_fc.weight"], w["head.final_fc.bias"])
    torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-4)


def test_farl_canvas_is_the_fit_of_facers_five_points_and_moves_pixels_there():
    """Facer's points in its 224 px canvas; a bright spot of the 512 px picture lands where the matrix says."""
    facer = [(93.108, 106.525), (130.392, 105.879), (111.809, 129.472), (95.288, 146.362), (129.609, 145.767)]
    ffhq = [(192.981, 239.947), (318.903, 240.194), (256.634, 314.019), (201.261, 371.41), (313.089, 371.151)]
    p, q = [torch.view_as_complex(torch.tensor(points, dtype=f64)) for points in (ffhq, facer)]
    turn = ((p - p.mean()).conj() * (q - q.mean())).sum() / (p - p.mean()).abs().square().sum()
    shift, wanted = q.mean() - turn * p.mean(), torch.tensor(metrics.FaRLAttributes.AFFINE, dtype=f64)
    fit = torch.tensor([[turn.real, -turn.imag, shift.real], [turn.imag, turn.real, shift.imag]], dtype=f64)
    torch.testing.assert_close(fit, wanted, rtol=1e-3, atol=1e-3)
    y, x = torch.meshgrid(torch.arange(512) + .5, torch.arange(512) + .5, indexing="ij")
    picture = 2 * (-((x - 318.9) ** 2 + (y - 240.2) ** 2) / (2 * 12 ** 2)).exp() - 1     # on the right eye, wide enough
    canvas = metrics.FaRLAttributes.canvas(metrics.FaRLAttributes, picture.expand(1, 3, 512, 512))[0, 0]
    place = torch.stack([canvas.sum(0), canvas.sum(1)]) @ (torch.arange(224) + .5) / canvas.sum()
    torch.testing.assert_close(place.double(), wanted @ torch.tensor([318.9, 240.2, 1], dtype=f64), rtol=0, atol=.1)


# ---------------------------------------------------------------- the program
@pytest.fixture
def folders(tmp_path):
    """Three toy faces and the same with noise, one of them untouched."""
    clean = toy.toy_faces([1, 2, 3], [1, 2, 3], size=64).image
    for i, image in enumerate(clean):
        common.write_image(tmp_path / "clean" / f"{i}.png", image)
        common.write_image(tmp_path / "restored" / f"{i}.png", image + .2 * torch.randn_like(image) * (i > 0))
    return tmp_path


def measured(capsys, *argv):
    metrics.main([str(a) for a in argv])
    return json.loads(capsys.readouterr().out.splitlines()[-1])


def test_program_pairs_by_name_and_names_what_it_leaves_out(folders, capsys):
    """PSNR's mean is without the untouched pair; a damaged and a smaller picture are skipped by name; IndRMSE to means."""
    ask = [folders / "restored", "--reference", folders / "clean"]
    found = measured(capsys, *ask, "--posterior_mean", folders / "clean")
    read = lambda name, i: common.read_image(folders / name / f"{i}.png")[None] / 2 + .5
    want = [number(metrics.psnr(read("restored", i), read("clean", i))) for i in (1, 2)]
    assert found["psnr"] == pytest.approx(sum(want) / 2) and found["protocol"]["N"]["psnr"] == 2
    assert found["protocol"]["N"]["ssim"] == 3 and "ms_ssim" not in found        # of 176 px and more
    assert found["indrmse"] == pytest.approx(sum([0, *(10 ** (-v / 20) for v in want)]) / 3, rel=1e-5)
    both = [torch.cat([2 * read(name, i) - 1 for i in range(3)]) for name in ("restored", "clean")]
    scores = metrics.toy_scores(*both, metrics.load_reader("b"))                 # 64 px: the toy reader looks as well
    assert found["deg_toy"] == pytest.approx(scores["deg_toy"], rel=1e-3)
    common.write_image(folders / "restored" / "1.png", torch.zeros(3, 32, 32))
    (folders / "restored" / "2.png").write_text("no picture")
    found = measured(capsys, *ask)
    assert found["protocol"]["N"]["ssim"] == 1 and found["psnr"] is None
    assert all(any(name in pair for pair in found["skipped"]) for name in ("1.png", "2.png"))


def test_program_with_weights(folders, capsys):
    """Random networks in the released formats; a set of one picture has no distance."""
    from transformers import Dinov2Config, Dinov2Model
    (weights := folders / "weights").mkdir()
    with torch.device("meta"):
        backbones = {"alexnet-owt-7be5be79": torchvision.models.alexnet(), "vgg16-397923af": torchvision.models.vgg16()}
    for name, net in backbones.items():                                         # not their large classifiers
        features = {n: torch.randn(v.shape) / 30 for n, v in net.state_dict().items() if "features" in n}
        torch.save(features, weights / f"{name}.pth")
    inception = torchvision.models.inception_v3(weights=None, num_classes=1008, aux_logits=False, init_weights=False)
    nets = {"pt_inception-2015-12-05-6726825d.pth": inception, "resnet18_110.pth": metrics.ArcFaceGray(),
            "adaface_ir50_ms1mv2.ckpt": metrics.IResNet(50), "alignment_WFLW_4HG.pth": metrics.FAN98(),
            "face_attribute.farl.celeba.pt": metrics.FaRLAttributes()}
    for name, net in nets.items():
        torch.save(redraw(net).state_dict(), weights / name)
    torch.save({name: torch.rand(1, 1475, 1, 1) for name in ("alpha", "beta")}, weights / "weights.pt")
    small = Dinov2Config(hidden_size=32, num_hidden_layers=1, num_attention_heads=2, patch_size=14)
    Dinov2Model(small).save_pretrained(weights / "dinov2-large")
    found = measured(capsys, folders / "restored", "--reference", folders / "clean", "--weights", weights,
                     "--real_set", folders / "clean" / "0.png")
    count = found["protocol"]["N"]
    assert all(found[name] > 0 for name in "lpips lpips-vgg dists lmd ald_e ald_m fid_gt fid_dino_gt mmd_dino_gt".split())
    assert all(0 <= found[name] <= 1 for name in ("ids", "ids_ir50", "attr")) and count["lpips"] == count["ids"] == 3
    assert 1 <= found["deg"] <= 180 and count["deg"] == 2                       # the untouched pair is left out
    assert {"fid_real", "fid_dino_real", "ids_ir101"} <= found["skipped"].keys() and "fid_real" not in found
    assert "pt_inception" in found["protocol"]["fid_gt"] and "too few for 2048 dimensions" in found["protocol"]["fid_gt"]


# ---------------------------------------------------------------- the toy readers
@pytest.mark.parametrize("name", ["a", "b"])
def test_shipped_readers_read_people_they_never_saw(name):
    """On people of the test split: attributes, landmarks, who is who, quality under mixed degradation."""
    reader, people = metrics.load_reader(name), toy.SPLITS["test"][0] + torch.arange(400) // 4
    drawn = toy.toy_faces(people, torch.arange(400) + 7)
    image, quality = readers.spoil(drawn.image, torch.randint(2 ** 40, (400,), generator=torch.Generator().manual_seed(0)))
    held = dict(image=image, quality=quality, identity=people, attributes=drawn.attributes, landmarks=drawn.landmarks)
    found = readers.measure_reader(reader, dict(held, hq=drawn.image))
    assert found["attribute_accuracy_clean"] >= .97 and found["verification_auc_clean"] >= .99
    assert found["landmark_px_clean"] <= 1 and found["quality_rank_correlation"] >= .9


def test_readers_losses_and_scores_equal_loops():
    """ArcFace's margin on the right class; cross-entropy to a Gaussian map written out, plus the distance in pixels."""
    e, classes, who = torch.randn(3, 8, dtype=f64), torch.randn(5, 8, dtype=f64), torch.tensor([4, 0, 2])
    cosine, want = F.cosine_similarity(e[:, None], classes[None], dim=-1), 0
    for row, k in zip(cosine, who.tolist()):
        logits = [24 * math.cos(math.acos(c) + .2 * (i == k)) for i, c in enumerate(row.tolist())]
        want += (math.log(sum(map(math.exp, logits))) - logits[k]) / 3
    assert readers.identity_loss(e, classes, who, .2, 24.).item() == pytest.approx(want)
    reader, logits, points = metrics.FaceReader(4), torch.randn(1, 98, 1024), torch.rand(1, 98, 2) * 64
    y, x = torch.meshgrid(torch.arange(32) + .5, torch.arange(32) + .5, indexing="ij")
    target = torch.stack([(-((x - px / 2) ** 2 + (y - py / 2) ** 2) / 2).flatten().softmax(0) for px, py in points[0]])
    mean = (logits[0].softmax(-1)[..., None] * 2 * torch.stack([x, y], -1).view(1, 1024, 2)).sum(1)
    want = -(target * logits[0].log_softmax(-1)).sum(-1) + (mean - points[0]).abs().sum(-1)
    assert readers.heatmap_loss(reader, logits, points).item() == pytest.approx(want.mean().item(), rel=1e-4)
    (a, b), e, who = torch.randint(5, (2, 40)).double(), torch.randn(12, 4), torch.arange(12) // 3        # with ties
    assert readers.spearman(a, b) == pytest.approx(scipy.stats.spearmanr(a, b)[0])
    alike = metrics.identity_similarity(e[:, None], e[None])
    same, other = ([alike[i, j].item() for i in range(12) for j in range(i) if (who[i] == who[j]) == k] for k in (True, False))
    assert readers.verification_auc(e, who) == pytest.approx(np.mean([p > q for p in same for q in other]))


def test_readers_train_on_a_folder(toy_folder, tmp_path, monkeypatch):
    """Two steps of reader a on faces without landmarks."""
    flags = "a --steps 2 --batch_size 6 --num_workers 0 --validation_faces 8 --device cpu".split()
    table = common.read_table
    monkeypatch.setattr(common, "read_table", lambda path, names: {} if path.stem == "landmarks" else table(path, names))
    readers.main([*flags, "--data", str(toy_folder / "train"), "--validation_data", str(toy_folder / "val"), "-o", str(tmp_path)])
    assert metrics.load_reader("a", tmp_path).not_trained == ["landmarks"]
