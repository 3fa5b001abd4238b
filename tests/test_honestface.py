"""honestface.py: equations in the paper's order, networks against rewrites and published sizes, the program. No download."""
import json
import math
from types import SimpleNamespace

import numpy as np
import pytest
import safetensors.torch
import torch
import torch.nn as nn
import torch.nn.functional as F
from diffusers import AutoencoderKL, UNet2DConditionModel
from program import caller, kill, same, weights
from scipy import ndimage
from torchvision.models.vgg import cfgs, make_layers

import common
import honestface as hf
import metrics
from toy import sd
from toy.faces import toy_faces
from toy.muon import Muon

f64 = torch.float64
ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")
SD21_UNET = dict(sample_size=64, in_channels=4, out_channels=4, block_out_channels=(320, 640, 1280, 1280), layers_per_block=2,
    down_block_types=("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",), attention_head_dim=(5, 10, 20, 20),
    up_block_types=("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3, cross_attention_dim=1024, use_linear_projection=True)
SD21_VAE = dict(down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4, layers_per_block=2,
    block_out_channels=(128, 256, 512, 512), latent_channels=4, sample_size=768, scaling_factor=0.18215)      # as 2.1 base

number = lambda value: float(torch.as_tensor(value).detach().double().mean())       # a loss, per image or as one number
unit = lambda *shape: F.normalize(torch.randn(*shape), dim=-1)
mse = lambda a, b: (a - b).square().mean((1, 2, 3))                                 # per picture
# Equal to float32's precision: losses may compute in float32 whatever they are given.
close = lambda got, want, atol=1e-5: torch.testing.assert_close(got, want, rtol=atol, atol=atol, check_dtype=False)
pixels = lambda *shape: 60 + 390 * torch.rand(*shape, 2)                            # random points on a 512 px picture


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def randomised(module):
    """The module with every trainable parameter redrawn, so that no initialisation hides anything."""
    for p in module.parameters():
        noise = torch.randn_like(p)
        p.data = noise / p[0].numel() ** .5 if p.dim() > 1 else 1 + .3 * noise
    return module.eval()


def test_alpha_bars_are_stable_diffusions_scaled_linear_schedule():
    """prod(1 - beta), the roots of beta linear from sqrt(.00085) to sqrt(.012); four published values."""
    betas = np.array([(.00085 ** .5 + (.012 ** .5 - .00085 ** .5) * i / 999) ** 2 for i in range(1000)])
    bars = hf.alpha_bars()
    assert bars.shape == (1000,) and bars.dtype == f64
    np.testing.assert_allclose(bars.numpy(), np.cumprod(1 - betas), rtol=1e-6)
    assert bars[[399, 249, 499, 999]].tolist() == pytest.approx([.42608636, .67543, .27767, .00466], abs=5e-6)


def test_eq1_forward_diffusion_mixes_by_the_roots_of_alpha_bar_and_eq2_undoes_it():
    """z_t = sqrt(a) z0 + sqrt(1 - a) noise: a = 1 keeps, 0 forgets, .36 is (.6, .8); one a per sample or for all."""
    z0, noise = torch.randn(2, 3, 4, 5, 6)
    z = hf.forward_diffuse(z0, noise, torch.tensor([1., .36, 0.], dtype=f64).view(3, 1, 1, 1))
    close(z, torch.stack([z0[0], .6 * z0[1] + .8 * noise[1], noise[2]]), 1e-6)
    close(hf.forward_diffuse(z0, noise, .36), .6 * z0 + .8 * noise, 1e-6)
    bars = hf.alpha_bars()[[0, 399, 999]].view(3, 1, 1, 1)
    close(hf.predict_clean(hf.forward_diffuse(z0.double(), noise, bars), noise, bars), z0, 1e-10)
    close(hf.predict_clean(z0, noise, .36), (z0 - .8 * noise) / .6, 1e-6)


def test_eq3_one_pass_at_the_timestep_adds_no_noise():
    """A network that knows the noise hidden in z_L gives z_H back: t, z and p reach it as they are."""
    seen, bar, prompt = [], hf.alpha_bars()[399], torch.randn(2, 5, 6)
    clean, noise = torch.randn(2, 2, 4, 8, 8)
    z_l = (bar.sqrt() * clean + (1 - bar).sqrt() * noise).float()
    unet = lambda z, t, encoder_hidden_states: seen.append((z, t, encoder_hidden_states)) or SimpleNamespace(sample=noise)
    torch.testing.assert_close(hf.restore_latent(unet, z_l, prompt, 399), clean, rtol=1e-3, atol=1e-3)
    (z, t, p), = seen
    assert torch.equal(z, z_l) and int(t) == 399 and p is prompt


def test_eq4_restore_is_encoder_one_step_decoder():
    """x_H^ = G(x_L, p): decode(step(encode(x_L), p)), clipped; the prompt is the adapter's of Eq. 7's codewords."""
    class Codec:
        config = SimpleNamespace(scaling_factor=.5)
        encode = staticmethod(lambda x: SimpleNamespace(latent_dist=SimpleNamespace(mean=x[:, :1] * 3, std=x[:, :1])))
        decode = staticmethod(lambda z: SimpleNamespace(sample=z.expand(-1, 3, -1, -1) / 3))
    class Prompt:
        fusion = None
        __call__ = lambda self, codes, face: codes + 1 / 4
    vre, lq = hf.VREncoder(width=32, multiples=(1, 1), dim=32, codes=8), torch.rand(2, 3, 8, 8) * .1
    unet = lambda z, t, encoder_hidden_states: SimpleNamespace(sample=z * encoder_hidden_states.mean((1, 2)).view(2, 1, 1, 1))
    nets = dict(vae=Codec, unet=unet, vre=vre, prompt=Prompt())
    got = hf.restore(nets, SimpleNamespace(timestep=399), None, lq, None, None, torch.ones_like)
    with torch.no_grad():
        share = (hf.vre_tokens(vre(lq), vre.codebook) + 1 / 4).mean((1, 2)).view(2, 1, 1, 1)
    z_l, bar = (lq[:, :1] * 3 + lq[:, :1]) * .5, .4260863636        # mean + std x noise, scaled; alpha-bar of T_L = 399
    close(got, ((z_l - (1 - bar) ** .5 * share * z_l) / bar ** .5 / .5 / 3).expand(-1, 3, -1, -1).clamp(-1, 1), 1e-4)


def test_eq5_losses_are_the_logistic_closed_forms():
    """L_G = softplus(-D(fake)), L_D = softplus(D(fake)) + softplus(-D(real)), means, no factor 1/2."""
    real, fake = torch.randn(2, 12, dtype=f64)
    minus_log_sigmoid = lambda v: sum(math.log(1 + math.exp(-u)) for u in v.tolist()) / v.numel()
    assert number(hf.generator_loss(fake)) == pytest.approx(minus_log_sigmoid(fake), rel=1e-5)
    want = minus_log_sigmoid(real) + minus_log_sigmoid(-fake)
    assert number(hf.discriminator_loss(real, fake)) == pytest.approx(want, rel=1e-5)
    far = torch.full((5,), 200.)
    assert number(hf.generator_loss(-far)) == 200 and number(hf.discriminator_loss(-far, far)) == 400


def tiny_networks(tiny):
    """(configuration, networks, face networks) before training, with nothing of the prompt at its zero start."""
    cfg = hf.Train(**hf.TOY_VALUES | dict(image_size=32, pretrained_model_name_or_path=str(tiny[-5])))
    face_nets = hf.face_networks(cfg, "cpu")
    nets = hf.build(cfg, face_nets, "cpu")
    for p in nets["prompt"].parameters():
        p.data += .3 * torch.randn_like(p) if p.requires_grad else 0
    return cfg, nets, face_nets


def test_eq5_turns_leave_no_gradients_in_the_other_network(tiny):
    """The restorer's turn fills no gradient of D, D's turn none of the restorer; frozen networks get none."""
    cfg, nets, face_nets = tiny_networks(tiny)
    judge = hf.LatentDiscriminator(nets["unet"], hf.ALL_LAYERS, 2, 2.0)
    common.add_lora(nets["unet"], hf.ALL_LAYERS, 2, 2.0)
    image, two = toy_faces([1, 2], [0, 0], size=32).image, torch.ones(2, 2, dtype=torch.bool)    # of one, nothing is weighed
    prompt = hf.make_prompt(nets, face_nets, image, torch.stack([image, image.flip(0)], 1), two)
    z = hf.encode(nets["vae"], image)
    z_hat, t = hf.restore_latent(nets["unet"], z, prompt, 399), torch.tensor([10, 700])
    with hf.frozen(judge):
        hf.generator_loss(judge(z_hat, t, prompt.detach())).backward()
    has = lambda net: {n: p.grad.clone() for n, p in net.named_parameters() if p.grad is not None and p.grad.abs().sum() > 0}
    assert not has(judge) and not has(nets["vae"]) and not has(nets["vre"])
    assert all("lora_" in n for n in has(nets["unet"])) and any("lora_B" in n for n in has(nets["unet"]))
    before = has(nets["prompt"])
    assert {"adapter.conv1.weight", "fie.query", "ffe.colour.weight"} <= before.keys()
    hf.discriminator_loss(judge(z, t, prompt.detach()), judge(z_hat.detach(), t, prompt.detach())).backward()
    assert "head.0.weight" in has(judge) and all("lora_" in n or "head" in n for n in has(judge))
    assert same(before, has(nets["prompt"]))


def lstsq_distance(l, h, w=None):
    """min_A sum_k w_k |A (x, y, 1) - h_k|^2 of (K, 2) points by numpy's least squares."""
    root = np.ones((len(l), 1)) if w is None else np.sqrt(np.asarray(w))[:, None]
    a, b = root * np.column_stack([l, np.ones(len(l))]), root * np.asarray(h)
    return float(((a @ np.linalg.lstsq(a, b, rcond=None)[0] - b) ** 2).sum())


def test_eq6_is_the_argmin_of_a_numpy_loop_in_the_frame_of_the_degraded_face():
    """argmin_i d(landmarks of r_i, landmarks of x_L); a weight of zero drops a point; ties and failures: the first."""
    for _ in range(10):
        lq, weights = pixels(20), (torch.rand(20) < .5).float()
        references = lq + 30 * torch.rand(6, 1, 1) * torch.randn(6, 20, 2)
        for w in (None, weights):
            want = np.argmin([lstsq_distance(r.double(), lq.double(), w) for r in references])
            assert hf.select_reference(references, lq, w) == want
    lq, far, lost = pixels(98), pixels(98), torch.full((98, 2), math.nan)
    near, large, tiny = lq + 1, lq + 2 * torch.randn(98, 2), .01 * (lq + 20 * torch.randn(98, 2))
    assert lstsq_distance(lq, tiny) < lstsq_distance(lq, large)                 # in its own pixels the tiny face is near
    for wanted, face, *album in ((1, lq, tiny, large), (0, lq, near, near, near), (1, lq, far, near, near),
                                 (0, lq, lost, lost * math.inf), (0, lost, far, near), (0, lq, near, lost, far),
                                 (1, lost, lost, near)):
        assert hf.select_reference(torch.stack(album), face) == wanted
    lq, landmarks = torch.rand(2, 98, 2) * 64, torch.rand(2, 3, 98, 2) * 64      # in a batch: the present one that fits
    landmarks[0, 2] = lq[0] @ torch.tensor([[0.8, 0.1], [-0.2, 1.1]]) + 3
    landmarks[1, 0] = lq[1] * 0.5                                 # fits best, but is absent
    landmarks[1, 1] = lq[1] + 0.5 * torch.randn(98, 2)
    looked = SimpleNamespace(recogniser=lambda x: torch.zeros(len(x), 4),
                             detector=SimpleNamespace(landmarks=lambda x: landmarks.flatten(0, 1)))
    images = torch.arange(6.0).view(2, 3, 1, 1, 1).expand(-1, -1, 3, 8, 8)
    found = hf.read_references(looked, lq, images, torch.tensor([[True, True, True], [False, True, True]]))
    assert found.chosen[:, 0, 0, 0].tolist() == [2.0, 4.0]
    assert torch.equal(found.landmarks, torch.stack([landmarks[0, 2], landmarks[1, 1]]))


def loop_tokens(features, codebook, count):
    """One sample and one position at a time: nearest codewords, nearest position first, each codeword once."""
    rows = []
    for f in features:
        distances = [((codebook - f[:, y, x]) ** 2).sum(1) for y, x in np.ndindex(*f.shape[1:])]
        best = sorted((d.min().item(), d.argmin().item()) for d in distances)
        chosen = list(dict.fromkeys(index for _, index in best))[:count]
        rows.append(F.pad(codebook[chosen], (0, 0, 0, count - len(chosen))))
    return torch.stack(rows)


@pytest.mark.parametrize("codes, count", [(40, 77), (200, 5)])
def test_eq7_vre_tokens_equal_a_loop_over_samples_and_positions(codes, count):
    """Batched selection = the loop, with and without enough distinct codewords; the order of positions does not matter."""
    codebook, features = torch.randn(codes, 6, dtype=f64), torch.randn(3, 6, 9, 13, dtype=f64)
    features[1] = features[1, :, :1, :1]                      # every position alike: one codeword, zeros after it
    got = hf.vre_tokens(features, codebook, count)
    close(got, loop_tokens(features, codebook, count), 1e-12)
    assert got.shape == (3, count, 6) and (got[1, 1:] == 0).all() and (got[1, 0] != 0).any()
    shuffled = features.flatten(2)[..., torch.randperm(9 * 13)].view(features.shape)
    close(hf.vre_tokens(shuffled, codebook, count), got, 1e-12)


def slow_vre(w, x, levels):
    """The released encoder and quant_conv by function calls from its state dict: (B, 3, S, S) -> (B, dim, S / f, S / f)."""
    norm = lambda h, name: F.group_norm(h, 32, w[f"{name}.weight"], w[f"{name}.bias"], 1e-6)

    def conv(h, name, stride=1):
        h, padding = (F.pad(h, (0, 1, 0, 1)), 0) if stride == 2 else (h, w[f"{name}.weight"].shape[-1] // 2)
        return F.conv2d(h, w[f"{name}.weight"], w[f"{name}.bias"], stride, padding)

    def block(h, name):
        change = conv(F.silu(norm(conv(F.silu(norm(h, f"{name}.norm1")), f"{name}.conv1"), f"{name}.norm2")), f"{name}.conv2")
        return change + (conv(h, f"{name}.nin_shortcut") if f"{name}.nin_shortcut.weight" in w else h)

    def attention(h, name):
        q, k, v = [conv(norm(h, f"{name}.norm1"), f"{name}.{n}").flatten(2) for n in "qkv"]   # (B, C, hw)
        weights = (torch.einsum("bci,bcj->bij", q, k) / h.shape[1] ** .5).softmax(-1)
        return h + conv(torch.einsum("bij,bcj->bci", weights, v).view(h.shape), f"{name}.proj_out")

    h = conv(x, "encoder.conv_in")
    for level in range(levels):
        for i in range(2):
            h = block(h, f"encoder.down.{level}.block.{i}")
            h = attention(h, f"encoder.down.{level}.attn.{i}") if level == levels - 1 else h
        h = h if level == levels - 1 else conv(h, f"encoder.down.{level}.downsample.conv", 2)
    h = block(attention(block(h, "encoder.mid.block_1"), "encoder.mid.attn_1"), "encoder.mid.block_2")
    return conv(conv(F.silu(norm(h, "encoder.norm_out")), "encoder.conv_out"), "quant_conv")


@pytest.mark.parametrize("twice", [False, True])
def test_vre_encoder_equals_a_functional_reimplementation(twice):
    """Pad right and bottom, two blocks per level, attention in the last, quant_conv last; the release feeds (x - .5) / .5."""
    net = randomised(hf.VREncoder(width=32, multiples=(1, 2, 2), dim=64, codes=24, double_normalise=twice))
    x = torch.rand(2, 3, 24, 16) * 2 - 1
    with torch.no_grad():
        got, want = net(x), slow_vre(net.state_dict(), (x - .5) / .5 if twice else x, 3)
    assert got.shape == (2, 64, 6, 4) and net.codebook.shape == (24, 64)
    close(got, want, 1e-4)


def test_prompt_adapter_is_two_linear_maps_with_silu_after_each():
    """SiLU(W2 SiLU(W1 token + b1) + b2) token by token."""
    adapter, tokens = randomised(hf.PromptAdapter(dim=12, hidden=10, out=14)), 3 * torch.randn(2, 77, 12)
    by_shape = {tuple(p.shape[:2]): p.detach() for p in adapter.parameters()}
    w1, w2, b1, b2 = by_shape[10, 12].view(10, 12), by_shape[14, 10].view(14, 10), by_shape[10,], by_shape[14,]
    close(adapter(tokens).detach(), F.silu(F.silu(tokens @ w1.T + b1) @ w2.T + b2), 1e-5)


def test_association_loss_equals_a_loop_and_trains_its_temperature():
    """Mean of both directions' cross-entropies to the diagonal; the gradient reaches s and both sides."""
    f_h, f_l = torch.randn(2, 2, 5, 3, 2, dtype=f64).requires_grad_().unbind(0)
    s = torch.tensor(.4, dtype=f64, requires_grad=True)
    rows = [[f[b, :, y, x] for b in range(2) for y in range(3) for x in range(2)] for f in (f_h, f_l)]
    logits = torch.stack([torch.stack([s.exp() * (a @ b) / (a.norm() * b.norm()) for b in rows[1]]) for a in rows[0]])
    want, got = sum(-(m.diagonal() - m.logsumexp(1)).mean() for m in (logits, logits.T)) / 2, hf.association_loss(f_h, f_l, s)
    close(got, want)
    for a, b in zip(*(torch.autograd.grad(v, (f_h, f_l, s), retain_graph=True) for v in (got, want))):
        assert a.abs().sum() > 0
        close(a, b)


def test_vector_quantize_is_nearest_straight_through_and_weighs_the_codebook_by_beta():
    """|sg(zq) - z|^2 + beta |zq - sg(z)|^2: (1 + beta) mse; the gradient passes to the features unchanged."""
    features, codebook, beta = torch.randn(2, 5, 3, 4, dtype=f64), torch.randn(7, 5, dtype=f64), 2.
    features.requires_grad_(), codebook.requires_grad_()
    out, loss, indices = hf.vector_quantize(features, codebook, beta)
    for b, y, x in np.ndindex(2, 3, 4):
        assert indices[b, y, x] == np.argmin([(features[b, :, y, x] - word).square().sum().item() for word in codebook])
        close(out[b, :, y, x], codebook[indices[b, y, x]], 1e-12)
    weight = torch.randn_like(out)
    close(torch.autograd.grad((out * weight).sum(), features)[0], weight)
    error = (features - codebook[indices].movedim(-1, 1)).detach()
    assert number(loss) == pytest.approx((1 + beta) * error.square().mean().item(), rel=1e-5)
    to_features, to_codebook = torch.autograd.grad(loss, (features, codebook))
    close(to_features, 2 * error / error.numel())
    want = torch.zeros_like(codebook).index_add_(0, indices.flatten(), error.movedim(1, -1).reshape(-1, 5))
    close(to_codebook, -beta * 2 * want / error.numel())


@torch.no_grad()
def test_ffe_sees_the_pixels_of_the_two_boxes_and_projects_four_embeddings_together():
    """Boxes: centre = mean of 8 points, half side 1.4 x the larger half extent, at least 16 px of 512.
    p_F = W [colour left, colour right, structure left, structure right] + b, cut into four tokens   [sec. 3.2]"""
    eyes = torch.zeros(98, 2)                                           # one eye lies, one stands on end, half extents 5
    oval = torch.tensor([[5., 0], [-5, 0], [3, 2], [3, -2], [-3, 2], [-3, -2], [0, 2], [0, -2]])     # mean 0, 10 x 4
    eyes[60:68], eyes[68:76] = oval + torch.tensor([20., 30]), oval.flip(1) + torch.tensor([44., 33])
    close(hf.eye_boxes(eyes[None], 64)[0], torch.tensor([[13., 23, 27, 37], [37, 26, 51, 40]]))
    close(hf.eye_boxes(0 * eyes[None] + 256, 512), 256 + 22.4 * torch.tensor([-1., -1, 1, 1]).expand(1, 2, 4))   # one point
    extractor, seen, embeddings = randomised(hf.FacialFeatureExtractor(dim=24, crop=14)), [], []
    extractor.backbone.register_forward_hook(lambda _, inputs, outputs: seen.append((*inputs, outputs)))
    picture = torch.rand(1, 3, 64, 64) * 2 - 1
    got = extractor(picture, eyes[None])
    (crops, (early, middle)), = seen                                                        # left eye, right eye
    want = torch.cat([picture[..., 23:37, 13:27], picture[..., 26:40, 37:51]]) / 2 + .5     # boxes with whole corners
    assert crops.shape == (2, 3, 14, 14) and (crops - want).abs().max() < 1e-4
    colour = torch.cat([early.mean((2, 3)), (early.var((2, 3), correction=0) + 1e-6).sqrt()], 1)
    for head, both in ((extractor.colour, colour), (extractor.structure, F.adaptive_avg_pool2d(middle, 4).flatten(1))):
        embeddings += [extractor.norm(head.weight @ eye + head.bias) for eye in both]
    want = extractor.project.weight @ torch.cat(embeddings) + extractor.project.bias
    assert got.shape == (1, 4, 24) and [len(e) for e in embeddings] == [6] * 4
    close(got.flatten(), want, 1e-4)


def test_fie_does_not_depend_on_order_or_padding_and_its_tokens_differ():
    """Any order of the references, any absent rows with anything in them, any batch: the same seven tokens."""
    encoder, faces = randomised(hf.FaceIdentityEncoder(id_dim=16, tokens=7, dim=24)), unit(3, 4, 16)
    present = torch.tensor([[True] * 4, [True, True, False, False], [False] * 4])
    tokens, order = encoder(faces, present), torch.tensor([2, 0, 3, 1])
    close(encoder(faces[:, order], present[:, order]), tokens, 1e-4)
    close(encoder(torch.cat([50 * torch.randn(3, 3, 16), faces], 1), F.pad(present, (3, 0))), tokens, 1e-4)
    close(encoder(faces[1:2, :2], present[1:2, :2]), tokens[1:2], 1e-4)
    moved = (encoder(unit(3, 4, 16), present) - tokens).abs().amax(-1)
    assert (moved[:2] > 1e-3).all() and moved[2].max() < 1e-5             # without references no embedding moves the tokens
    encoder = hf.FaceIdentityEncoder()                                    # as initialised: one reference, the softmax is 1
    tokens, = encoder(unit(1, 1, 512), torch.ones(1, 1, dtype=torch.bool))
    assert (torch.cdist(tokens, tokens) + 1e9 * torch.eye(7)).min() > .05 * tokens.norm(dim=-1).mean()


def test_fusion_starts_as_the_vre_prompt_and_can_learn():
    """77 + 4 + 7 -> 77: bitwise p_L at initialisation, whatever the references say; a gradient flows."""
    fusion, (p_l, p_f, p_i) = hf.PromptFusion(64), [torch.randn(2, n, 64) for n in (77, 4, 7)]
    assert torch.equal(fusion(p_l, p_f, p_i), p_l) and torch.equal(fusion(p_l, p_f, 100 * p_i), p_l)
    (fusion(p_l, p_f, p_i) * torch.randn(2, 77, 64)).sum().backward()
    assert any(p.dim() > 1 and p.grad is not None and p.grad.abs().sum() > 0 for p in fusion.parameters())


def test_eq8_identity_loss_sums_one_minus_cosine_over_the_ensemble():
    """0 for one person, .5 at 60 degrees, 2 at opposites; pictures average; the gradient reaches the restored face only."""
    x = torch.randn(6, 2, 1, 1, dtype=f64)
    for degrees, want in ((0, 0), (60, .5), (90, 1), (180, 2)):
        c, s = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
        turned = torch.stack([c * x[:, 0] - s * x[:, 1], s * x[:, 0] + c * x[:, 1]], 1)     # "images" turned in their plane
        assert number(hf.identity_loss([lambda x: F.normalize(x.flatten(1))], turned, x)) == pytest.approx(want, abs=1e-6)
    nets = [nn.Sequential(nn.Flatten(), nn.Linear(48, 8)).requires_grad_(False) for _ in range(2)]
    encoders = [lambda x, net=net: F.normalize(net(x)) for net in nets]
    restored, target = [torch.randn(3, 3, 4, 4).requires_grad_() for _ in range(2)]
    loss = hf.identity_loss(encoders, restored, target)
    explicit = sum(1 - F.cosine_similarity(net(restored), net(target.detach())).mean() for net in nets)
    close(loss, explicit)
    loss.backward()
    close(restored.grad, torch.autograd.grad(explicit, restored)[0])
    assert target.grad is None and restored.grad.abs().sum() > 0


def slow_edges(x):
    """Sobel's magnitude of the mean of R, G, B by scipy: (B, 3, H, W) -> (B, 1, H, W), equal inside the border."""
    across, down = (np.stack([ndimage.sobel(grey, axis) for grey in x.mean(1).numpy()]) for axis in (0, 1))
    return torch.from_numpy((across ** 2 + down ** 2 + 1e-6) ** .5)[:, None]


def test_eq9_edge_aware_dists_adds_pictures_and_their_sobel_edges():
    """A ramp of slope a: 8 a, the mean of the channels' slopes; a step of 1: 4; noise as a loop."""
    column = torch.arange(12, dtype=f64).expand(1, 3, 10, 12)
    slopes = torch.tensor([.01, .02, .06], dtype=f64).view(3, 1, 1)
    inside = lambda x: hf.sobel(x)[..., 1:-1, 1:-1]
    for ramp in (column * slopes, (column * slopes).mT):
        assert inside(ramp).flatten().tolist() == pytest.approx([(.24 ** 2 + 1e-6) ** .5] * 80, rel=1e-4)
    assert inside((column > 5).double()).max().item() == pytest.approx(4, rel=1e-6)
    calls, (a, b) = [], 3 * torch.rand(2, 2, 3, 10, 12, dtype=f64) - 1.5
    got = hf.edge_aware_dists(lambda x, y: calls.append((x, y)) or mse(x, y), a, b)
    pictures, edges = calls
    assert torch.equal(pictures[0], a) and torch.equal(pictures[1], b)
    for picture, edge in zip(pictures, edges):
        close(edge[..., 1:-1, 1:-1], slow_edges(picture)[..., 1:-1, 1:-1].expand(-1, 3, -1, -1))
    assert number(got) == pytest.approx(number(mse(*pictures)) + number(mse(*edges)), rel=1e-5)


def test_eq10_mask_is_the_mean_over_landmarks_and_eq11_lifts_weak_responses_and_normalises_each_picture():
    """0, m, 1 give 0, (1 - e^{-km}) / (1 - e^{-k}), 1: concave; min 0, max range / (range + eps); flat maps give 0."""
    values = torch.tensor([0., .01, .1, .3, .7, 1.], dtype=f64)
    for k in (.01, 10., 100.):
        got = hf.mfa_mask(values.repeat(6).view(1, 1, 6, 6), 6, k=k, eps=0.).flatten()[:6]
        np.testing.assert_allclose(got.numpy(), (1 - np.exp(-k * values.numpy())) / (1 - math.exp(-k)), rtol=1e-5, atol=1e-5)
    heatmaps = torch.rand(3, 98, 12, 12, dtype=f64) * torch.tensor([1., .03, 1e-3], dtype=f64).view(3, 1, 1, 1)
    raw = F.interpolate(heatmaps.mean(1, keepdim=True), (24, 24), mode="bilinear", align_corners=False)
    low, high = ((-10 * extreme).exp() for extreme in (raw.amax((2, 3), keepdim=True), raw.amin((2, 3), keepdim=True)))
    close(hf.mfa_mask(heatmaps.requires_grad_(), 24, eps=.1), (high - (-10 * raw).exp()) / (high - low + .1))
    assert not hf.mfa_mask(heatmaps, 12).requires_grad
    assert hf.mfa_mask(torch.full((1, 98, 16, 16), .25, dtype=f64), 16).abs().max() < 1e-6


def test_eq12_eq13_loss_compares_composites_on_the_background():
    """perceptual(M x_hat + (1 - M) B, M x + (1 - M) B): with squares mean((M (x_hat - x))^2) for any B; default mid grey."""
    (restored, target), mask, seen = torch.randn(2, 2, 3, 6, 6, dtype=f64), torch.rand(2, 1, 6, 6, dtype=f64), []
    record = lambda a, b: seen.append((a, b)) or mse(a, b)
    want = (mask * (restored - target)).square().mean().item()
    for background in (0., -1., .5):
        assert number(hf.mfa_loss(record, restored, target, mask, background)) == pytest.approx(want, rel=1e-5)
        for got, v in zip(seen[-1], (restored, target)):
            close(got, mask * v + (1 - mask) * background)
    assert hf.mfa_loss(record, restored, target, mask * 0).shape == () and (torch.stack(seen[-1]) == 0).all()


def test_eq14_eq15_are_the_least_squares_over_affine_maps():
    """A moved corner of a square costs (a^2 + b^2) / 4, affine images 0; numpy and the stable forms of metrics.py agree."""
    square = torch.tensor([[0., 0], [1, 0], [1, 1], [0, 1]], dtype=f64)
    moved = square + torch.tensor([[0., 0], [0, 0], [0, 0], [.3, -.4]], dtype=f64)
    assert hf.affine_landmark_distance(square, moved, torch.ones(4, dtype=f64)).item() == pytest.approx(.25 / 4)
    l, h, w = pixels(34).double(), pixels(34).double(), .1 + torch.rand(34, dtype=f64)
    image = l @ torch.tensor([[.7, .2], [-.1, 1.3]], dtype=f64) + 40
    assert hf.affine_landmark_distance(l, image, w).item() == pytest.approx(0, abs=1e-12 * 512 ** 2)
    got, star = hf.affine_landmark_distance(l, h, w).item(), hf.affine_fit(l, h, w)
    assert got == pytest.approx(lstsq_distance(l, h, w)) == pytest.approx(metrics.affine_landmark_distance(l, h, w).item())
    close(metrics.affine_fit(l, h, w), star, 1e-6)
    cost = lambda a: (w * (F.pad(l, (0, 1), value=1.) @ a.T - h).square().sum(-1)).sum()
    assert cost(star).item() == pytest.approx(got)
    assert torch.autograd.functional.jacobian(cost, star).abs().max() < 1e-9 * 512 * cost(star)


def test_landmarks_on_a_four_pixel_grid_and_the_crop_of_arcface():
    """Cell + .5 +- .25 towards the larger neighbour, x 8 px; the box sends FFHQ's five points to ArcFace's template."""
    heatmaps, cells = torch.rand(1, 98, 64, 64) * .1, torch.randint(1, 63, (98, 2))
    heatmaps[0, torch.arange(98), cells[:, 1], cells[:, 0]] = 1.
    offset = metrics.decode_heatmaps(heatmaps, 512)[0] - (cells + .5) * 8
    for (x, y), h, found in zip(cells.tolist(), heatmaps[0], offset.tolist()):
        assert found == [2. if h[y, x + 1] > h[y, x - 1] else -2., 2. if h[y + 1, x] > h[y - 1, x] else -2.]
    ffhq = np.array([(192.98138, 239.94708), (318.90277, 240.1936), (256.63416, 314.01935), (201.26117, 371.41043),
                     (313.08905, 371.15118)]) @ [1, 1j]
    arcface = np.array([(38.2946, 51.6963), (73.5318, 51.5014), (56.0252, 71.7366), (41.5493, 92.3655),
                        (70.7299, 92.2041)]) @ [1, 1j]
    source, target = ffhq - ffhq.mean(), arcface - arcface.mean()
    scale = (source.conj() * target).sum() / (abs(source) ** 2).sum()
    shift = arcface.mean() - scale * ffhq.mean()
    box = np.array([-shift / scale, (112 + 112j - shift) / scale]).view(float)
    assert np.abs(box - metrics.CROP_112).max() < .5
    across = metrics.crop_112((torch.arange(512.) + .5).expand(1, 3, 512, 512))[0, 0, 56]   # the coordinate as the picture
    assert np.abs(across.numpy() - box[0] - (np.arange(112) + .5) / 112 * (box[2] - box[0]))[2:-2].max() < .6


def test_networks_have_the_published_sizes():
    """Table 3a: 978.4 M for OSDFace, 1,059 M for HonestFace (here 1,058.1 M). LoRA of rank 16 has 16.22 M with convolutions."""
    linear = ATTENTION + ("ff.net.0.proj", "ff.net.2", "proj_in", "proj_out")
    millions = lambda *nets: sum(p.numel() for net in nets for p in net.parameters()) / 1e6
    with torch.device("meta"):
        unet, vae = UNet2DConditionModel(**SD21_UNET), AutoencoderKL(**SD21_VAE)
        vre, adapter, prompt = hf.VREncoder(), hf.PromptAdapter(), hf.PromptBuilder(hf.Train(), None, 512)
        recogniser, detector = metrics.IResNet(50), metrics.FAN98()
        parts = [round(millions(net), 1) for net in (unet, vae, vre.encoder, prompt, recogniser, detector)]
        assert parts == [865.9, 83.7, 28.4, 12.4, 43.6, 24.2]                               # prompt: with VGG16 to relu3_3
        assert round(millions(unet, vae, vre.encoder, prompt, recogniser, detector), 1) == 1058.1
        assert round(millions(unet, vae, vre.encoder, adapter), 1) == 978.3 and len(vre.state_dict()) == 173
        assert (round(millions(vre), 2), round(millions(vre.encoder), 2), millions(adapter)) == (29.17, 28.39, .394496)
        assert sum(p.numel() for p in prompt.ffe.backbone.parameters()) == 1_735_488
        assert prompt.fusion(*[torch.empty(1, n, 1024) for n in (77, 4, 7)]).shape == (1, 77, 1024)
        judge = hf.LatentDiscriminator(unet, hf.ALL_LAYERS, 16, 16.0)
        assert round(sum(p.numel() for p in judge.parameters() if not p.requires_grad) / 1e6, 1) == 351.7
        for names, layers, size in ((ATTENTION, 128, 3_319_808), (linear, 192, 6_914_048), (hf.ALL_LAYERS, 258, 16_222_848)):
            parameters = common.add_lora(UNet2DConditionModel(**SD21_UNET), names, 16, 16)
            assert len(parameters) == 2 * layers and sum(p.numel() for p in parameters) == size


call, _ = caller(hf)
SIZES = dict(vre=dict(width=8, multiples=(1, 2), dim=8, codes=96), eye_crop=8)
TINY_SD = dict(vae=dict(block_out_channels=(8, 16), layers_per_block=1, latent_channels=4, norm_num_groups=8),
               unet_widths=(32, 32), prompt_dim=32)
FLAGS = ("--image_size 32 --batch_size 2 --vre_steps 2 --onestep_steps 3 --log_steps 1 --device cpu --validation_faces 4 "
         "--mixed_precision no --num_workers 0").split()


@pytest.fixture(scope="module")
def tiny(toy_folder, tmp_path_factory):
    """Flags of a tiny run: random networks in the layout of toy/weights/sd, sizes cut down, toy people of 32 px."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("sd")
    sd.new_folder(folder, sizes=TINY_SD)
    before, hf.SIZES["toy"] = hf.SIZES["toy"], SIZES
    yield [*FLAGS, "--pretrained_model_name_or_path", folder, "--data", toy_folder / "train", "--validation_data",
           toy_folder / "val"]
    hf.SIZES["toy"] = before


@pytest.fixture(scope="module")
def trained(tiny, tmp_path_factory):
    """A tiny run of all stages `out/`, three degraded faces `lq/`, and an album per person `people/00` ..."""
    folder = tmp_path_factory.mktemp("run")
    call("train", *tiny, "-o", folder / "out")
    for person in range(3):
        faces = toy_faces([person] * 4, torch.arange(4), size=40).image
        lq, = common.degrade(faces[:1], common.DEGRADATIONS["codeformer"], [person])
        common.write_image(folder / "lq" / f"{person:02d}.png", lq)
        for i in range(1, 4):
            common.write_image(folder / "people" / f"{person:02d}" / f"{i}.png", faces[i])
    return folder


log_of = lambda folder, stage: [row for row in map(json.loads, (folder / "log.jsonl").read_text().splitlines())
                                if row.get("stage") == stage]


def test_training_leaves_weights_numbers_and_pictures(trained):
    out = trained / "out"
    wanted = {"config.json", "metrics.json", "log.jsonl", "samples.png", "samples_vre.png"}
    assert wanted | {f"{n}.safetensors" for n in ("vre", "onestep", "prompt")} == {p.name for p in out.iterdir()}
    rows = json.loads((out / "metrics.json").read_text())["rows"]
    assert set(rows) == {"lq", "restored_faces", "one reference", "no reference", "wrong person", "autoencoder"}
    assert rows["lq"]["psnr_gain"] == 0 and {"lpips_toy", "dists_toy", "deg_toy"} <= rows["restored_faces"].keys()
    names = [n for n in weights(out) if n.startswith("onestep.")]                           # LoRA in diffusers' layout
    assert names and all(n.startswith("onestep.unet.") and n.endswith(("lora_A.weight", "lora_B.weight")) for n in names)


def test_stage_by_stage_recomputed_or_accumulated_equals_all_at_once(trained, tiny, tmp_path):
    for stage in ("vre", "onestep"):
        call("train", *tiny, "-o", tmp_path / "a", "--stage", stage, "--gradient_checkpointing")
    assert same(weights(trained / "out"), weights(tmp_path / "a"))
    call("train", *tiny, *"--batch_size 1 --gradient_accumulation_steps 2 -o".split(), tmp_path / "b", "--vre", trained / "out")
    pieces, whole = (log_of(folder, "onestep")[0]["grad_norm"] for folder in (tmp_path / "b", trained / "out"))
    assert pieces == pytest.approx(whole, rel=1e-3)


def test_a_killed_run_goes_on_to_the_same_weights(trained, tiny, tmp_path):
    """SIGKILL amid the one-step stage, with its two optimisers: bit by bit the uninterrupted run."""
    kill("honestface", SIZES, "onestep", 2, *tiny, "-o", tmp_path, "--checkpointing_steps", "1")
    call("train", *tiny, "-o", tmp_path, "--resume_from_checkpoint", "latest")
    assert same(weights(trained / "out"), weights(tmp_path))


def test_sample_depends_on_seed_and_references_not_on_batch_or_neighbours(trained, tmp_path, capsys):
    shared, one = ["--checkpoint", trained / "out", "--device", "cpu"], trained / "lq" / "01.png"
    call("sample", "-i", trained / "lq", *shared, "-o", tmp_path / "a", "--reference", trained / "people", "--batch_size", "3")
    assert capsys.readouterr().out.count("3 references") == 3     # each input finds its own sub-folder
    for name, seed in (("b", 0), ("c", 1)):
        call("sample", "-i", one, *shared, "-o", tmp_path / name, "--reference", trained / "people" / "01", "--seed", seed)
    a, b, c = (common.read_image(tmp_path / name / "restored_faces" / "01.png") for name in "abc")
    assert a.shape == (3, 32, 32) and (a - b).abs().max() < .01 < (a - c).abs().max()


def test_references_are_the_person_mirrored_as_the_face_and_never_the_face_itself(tmp_path):
    for k, person in enumerate("ab"):                             # a ramp; slope: where a picture looks; height: which it is
        for i in range(4):
            ramp = torch.linspace(-.1, .1, 16).expand(3, 16, 16) + i / 8 - k * .8
            common.write_image(tmp_path / person / f"{i}.png", ramp)
    common.write_image(tmp_path / "alone" / "0.png", torch.ones(3, 16, 16))
    faces = common.Faces(tmp_path, 16, mirror=True)
    batch, falls = faces.training(16, 0, 0), lambda x: (x[..., 0] > x[..., -1])[0, 0].item()
    images, present = hf.other_photographs(faces, batch, 4)
    for i, hq in enumerate(batch["hq"]):
        assert present[i].sum() == (0 if (hq == 1).all() else 3)
        for photo in images[i][present[i]]:
            assert (photo.mean() < -.25) == (hq.mean() < -.25) and (photo.mean() - hq.mean()).abs() > .1
            assert falls(photo) == falls(hq)
    assert 0 < sum(map(falls, batch["hq"])) < 16
    who = torch.tensor([0, 0, 0, 1, 1, 2])
    assert all(who[i] != who[j] for i, j in enumerate(hf.strangers(who).tolist()))


def test_the_restorer_overfits_one_batch_and_null_references_are_no_references(tiny):
    cfg, nets, face_nets = tiny_networks(tiny)
    own = common.add_lora(nets["unet"], hf.ALL_LAYERS, 16, 16.0) + [p for p in nets["prompt"].parameters() if p.requires_grad]
    optimizer, losses, hq = Muon(own, lr=5e-3), [], toy_faces([1, 2], [0, 0], size=32).image
    lq, one = common.degrade(hq, common.DEGRADATIONS["codeformer"], [0, 1]), torch.ones(2, 1, dtype=torch.bool)
    z_l, z_h = hf.encode(nets["vae"], torch.cat([lq, hq])).detach().chunk(2)
    for _ in range(25):
        prompt = hf.make_prompt(nets, face_nets, lq, hq[:, None], one)
        losses.append((hf.restore_latent(nets["unet"], z_l, prompt, 399) - z_h).square().mean() / z_h.var())
        optimizer.zero_grad()
        losses[-1].backward()
        optimizer.step()
    assert losses[-1] < 0.2 * losses[0]
    run = lambda r, m: hf.restore(nets, cfg, face_nets, lq, r, m, torch.zeros_like)
    none, album = run(torch.zeros(2, 1, 3, 32, 32), ~one), torch.stack([hq, torch.rand_like(hq)], 1)
    assert torch.equal(none, run(album, torch.zeros(2, 2, dtype=torch.bool)))               # an absent slot is not seen
    assert torch.allclose(run(album, torch.tensor([[True, False]] * 2)), run(hq[:, None], one), atol=1e-3)
    assert (run(hq[:, None], one) - none).abs().max() > 1e-2      # and a reference does something


def test_parts_switched_off_do_not_run(tiny, tmp_path, monkeypatch):
    """Tables 3b, 3c: --ide fie looks for no landmarks, --mfa none draws no heatmaps, --ide none reads no reference."""
    built, lost = hf.face_networks, SimpleNamespace()
    monkeypatch.setattr(hf, "face_networks", lambda *a, **k: hf.dataclasses.replace(built(*a, **k), detector=lost))
    call("train", *tiny, "-o", tmp_path / "fie", "--ide", "fie", "--mfa", "none", "--max_train_steps", "1")
    monkeypatch.setattr(hf, "read_references", None)
    call("train", *tiny, "-o", tmp_path / "none", *"--ide none --mfa none --gan_weight 0 --max_train_steps 1".split())


LAYER, CONVOLUTION = "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q", "down_blocks.0.resnets.0.conv1"


@pytest.fixture(scope="module")
def released(tmp_path_factory):
    """Random weights in released layouts: `sd` with every width cut down, `osdface`, `faces`; and OSDFace's networks."""
    torch.manual_seed(1)
    root, vre, adapter = tmp_path_factory.mktemp("released"), hf.VREncoder(), hf.PromptAdapter()
    unet = SD21_UNET | dict(block_out_channels=(32, 32, 64, 64), attention_head_dim=(1, 1, 2, 2), layers_per_block=1)
    UNet2DConditionModel(**unet).save_pretrained(root / "sd" / "unet")
    AutoencoderKL(**SD21_VAE | dict(block_out_channels=(32,) * 4, layers_per_block=1)).save_pretrained(root / "sd" / "vae")
    nets = {"arcface_ir_se50": metrics.IResNet(50, layout="ir_se"), "adaface_ir18": metrics.IResNet(18),
            "alignment_WFLW_4HG": metrics.FAN98(), "vgg16-397923af": nn.ModuleDict(dict(features=make_layers(cfgs["D"])))}
    (root / "faces").mkdir()
    for name, net in nets.items():
        torch.save(net.state_dict(), root / "faces" / f"{name}.pth")
    torch.save({n: getattr(metrics.DISTS(), n) for n in ("alpha", "beta")}, root / "faces" / "weights.pt")
    (root / "osdface").mkdir()
    state = {f"vqvae_LQ.{n}": t for n, t in vre.state_dict().items()} | {"vqvae_LQ.decoder.conv_in.bias": torch.ones(3)}
    torch.save({"state_dict": state}, root / "osdface" / "associate_2.ckpt")
    torch.save(adapter.state_dict(), root / "osdface" / "embedding_change_weights.pth")
    lora = {f"unet.{LAYER}.lora_A.weight": torch.randn(16, 32), f"unet.{LAYER}.lora_B.weight": torch.randn(32, 16),
            f"unet.{CONVOLUTION}.lora.down.weight": torch.randn(16, 32, 3, 3),
            f"unet.{CONVOLUTION}.lora.up.weight": torch.randn(32, 16, 1, 1)}
    safetensors.torch.save_file(lora, root / "osdface" / "pytorch_lora_weights.safetensors")
    osdface = hf.load_networks(hf.Sample(input="", checkpoint=str(root / "osdface"),
                                         pretrained_model_name_or_path=str(root / "sd")), "cpu")
    return SimpleNamespace(root=root, vre=vre, adapter=adapter, lora=list(lora.values()), nets=nets, osdface=osdface)


def test_osdface_release_is_merged_and_restores(released):
    (a, b, ca, cb), (nets, cfg, _) = released.lora, released.osdface
    base = UNet2DConditionModel.from_pretrained(released.root / "sd", subfolder="unet")
    change = lambda name: nets["unet"].get_submodule(name).weight - base.get_submodule(name).weight
    assert torch.allclose(change(LAYER), b @ a, atol=1e-5)
    assert torch.allclose(change(CONVOLUTION), torch.einsum("or,rikl->oikl", cb[..., 0, 0], ca), atol=1e-4)
    assert torch.equal(nets["vre"].codebook, released.vre.codebook) and nets["vre"].double_normalise
    assert torch.equal(nets["prompt"].adapter.conv2.weight, released.adapter.conv2.weight)
    out = hf.restore(nets, cfg, None, torch.rand(1, 3, 64, 64), None, None, torch.zeros_like)
    assert out.shape == (1, 3, 64, 64) and out.isfinite().all()


def test_a_paper_step_starts_from_osdface_and_trains_on_every_released_network(released, toy_folder, tmp_path):
    """Section 4.1: before a step HonestFace without references is OSDFace; one step of learning rate 1e-8 leaves it so."""
    (a, b, ca, cb), root = released.lora, released.root
    call("train", "--preset", "paper", *FLAGS, "--data", toy_folder / "train", "--validation_data", toy_folder / "val",
         "--pretrained_model_name_or_path", root / "sd", "--osdface", root / "osdface", "--face_networks", root / "faces",
         *"--image_size 64 --learning_rate 1e-8 --max_train_steps 1 --batch_size 1 --validation_faces 1 -o".split(), tmp_path)
    parts = weights(tmp_path)
    for layer, want_a, want_b in ((LAYER, a, b), (CONVOLUTION, ca, cb)):
        assert torch.allclose(parts[f"onestep.unet.{layer}.lora_A.weight"], want_a, atol=1e-5)
        assert torch.allclose(parts[f"onestep.unet.{layer}.lora_B.weight"], want_b, atol=1e-5)
    assert torch.equal(parts["vre.quantize.embedding.weight"], released.vre.codebook)
    last = log_of(tmp_path, "onestep")[-1]
    assert all(0 < last[name] < 10 for name in ("mse", "perceptual", "identity", "mfa", "gan", "discriminator"))
    nets, cfg, face_nets = hf.load_networks(hf.Sample(input="", checkpoint=str(tmp_path)), "cpu")
    former, x = released.osdface[0], torch.rand(1, 3, 64, 64) * 2 - 1
    with torch.no_grad():
        z, codes = hf.encode(former["vae"], x), hf.vre_tokens(nets["vre"](x), nets["vre"].codebook)
        own, theirs = (hf.restore_latent(n["unet"], z, n["prompt"].adapter(codes), 399) for n in (nets, former))
        assert torch.allclose(own, theirs, atol=1e-3 * theirs.abs().max().item())
        crop = metrics.crop_112(x)                                # what each recogniser sees: AdaFace BGR
        eyes = hf.face_networks(hf.dataclasses.replace(cfg, fie_network="adaface"), "cpu")
        for name, embed, flipped in zip(("arcface_ir_se50", "adaface_ir18"), eyes.recognisers, (crop, crop.flip(1))):
            close(embed(x), F.normalize(released.nets[name].eval()(flipped)))
        assert torch.equal(eyes.recogniser(x), eyes.recognisers[1](x)) and eyes.recogniser(x).shape == (1, eyes.id_dim)
