"""HonestFace's mathematics and modules: closed forms, slow loops, invariances, gradient routing, sizes."""
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F

import common
import honestface as hf
import metrics

f64 = torch.float64
AB = .4260863636                                  # alpha-bar of the fixed time step T_L = 399
LEFT, RIGHT = slice(60, 68), slice(68, 76)        # WFLW points of the two eyes, left and right in the picture
ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")
LINEAR = ATTENTION + ("ff.net.0.proj", "ff.net.2", "proj_in", "proj_out")
CONVOLUTIONS = LINEAR + ("conv1", "conv2", "conv_shortcut", "conv", "conv_in", "conv_out")


@pytest.fixture(autouse=True)
def seeded():
    """Every test draws the same numbers, alone or in the suite."""
    torch.manual_seed(0)


def number(value):
    """A loss as a float, whether it comes per image or as one number."""
    return float(torch.as_tensor(value).detach().double().mean())


def randomised(module):
    """The module with every trainable parameter redrawn, so that no initialisation hides anything."""
    for p in module.parameters():
        noise = torch.randn_like(p)
        p.data = noise / p[0].numel() ** .5 if p.dim() > 1 else 1 + .3 * noise
    return module.eval()


def unit(*shape, dtype=torch.float32):
    """Random unit vectors along the last axis."""
    return F.normalize(torch.randn(*shape, dtype=dtype), dim=-1)


def mse(a, b):
    """Per picture."""
    return (a - b).square().mean((1, 2, 3))


def close(got, want, tolerance=1e-5):
    """Equal to float32's precision: losses may compute in float32 whatever they are given."""
    torch.testing.assert_close(got, want, rtol=tolerance, atol=tolerance, check_dtype=False)


# ------------------------------------------------------------------------------------ one-step generator, Eq. 1-4

def test_alpha_bars_are_stable_diffusions_scaled_linear_schedule():
    """prod(1 - beta), the roots of beta linear from sqrt(.00085) to sqrt(.012); four published values."""
    betas = np.array([(.00085 ** .5 + (.012 ** .5 - .00085 ** .5) * i / 999) ** 2 for i in range(1000)])
    bars = hf.alpha_bars()
    assert bars.shape == (1000,) and bars.dtype == f64 and (bars.diff() < 0).all()
    np.testing.assert_allclose(bars.numpy(), np.cumprod(1 - betas), rtol=1e-6)
    assert bars[399].item() == pytest.approx(.42608636, abs=1e-7)
    assert bars[[249, 499, 999]].tolist() == pytest.approx([.67543, .27767, .00466], abs=5e-6)
    np.testing.assert_allclose(hf.alpha_bars(3, .04, .16).numpy(), [.96, .96 * .91, .96 * .91 * .84], rtol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, f64])
def test_eq1_forward_diffusion_mixes_by_the_roots_of_alpha_bar(dtype):
    """z_t = sqrt(a) z0 + sqrt(1 - a) noise: a = 1 keeps, 0 forgets, .36 is (.6, .8); one a per sample or for all."""
    z0, noise = torch.randn(2, 3, 4, 5, 6, dtype=dtype)
    z = hf.forward_diffuse(z0, noise, torch.tensor([1., .36, 0.], dtype=f64).view(3, 1, 1, 1))
    assert z.dtype == dtype
    close(z, torch.stack([z0[0], .6 * z0[1] + .8 * noise[1], noise[2]]), 1e-6)
    close(hf.forward_diffuse(z0, noise, .36), .6 * z0 + .8 * noise, 1e-6)


def test_eq2_the_true_noise_predicts_the_clean_latent_at_every_time():
    """predict_clean undoes forward_diffuse when the network knows the noise, per sample and for one float."""
    z0, noise = torch.randn(2, 5, 4, 3, 3, dtype=f64)
    bars = hf.alpha_bars()[[0, 249, 399, 750, 999]].view(5, 1, 1, 1)
    close(hf.predict_clean(hf.forward_diffuse(z0, noise, bars), noise, bars), z0, 1e-10)
    close(hf.predict_clean(torch.full((1, 1, 1, 1), 2.), torch.full((1, 1, 1, 1), 1.), .36),
          torch.full((1, 1, 1, 1), (2 - .8) / .6), 1e-6)


def test_eq3_one_step_from_the_degraded_latent_reaches_any_target():
    """eps* = (z_L - sqrt(a) z_H) / sqrt(1 - a) at T_L = 399 gives z_H back to float32's precision, dtype kept."""
    z_l, z_h = torch.randn(2, 2, 4, 8, 8)
    bar = hf.alpha_bars()[399].item()
    oracle = ((z_l.double() - bar ** .5 * z_h.double()) / (1 - bar) ** .5).float()
    got = hf.predict_clean(z_l, oracle, bar)
    assert got.dtype == torch.float32
    close(got, z_h, 1e-6)


def test_eq3_one_pass_at_the_timestep_adds_no_noise():
    """A network that knows the noise hidden in z_L gives z_H back: t, z and p reach it as they are."""
    seen, bars = [], hf.alpha_bars()
    clean, noise, prompt = torch.randn(2, 4, 8, 8), torch.randn(2, 4, 8, 8), torch.randn(2, 5, 6)
    z_l = bars[399].sqrt() * clean + (1 - bars[399]).sqrt() * noise

    def unet(z, t, encoder_hidden_states):
        seen.append((z, t, encoder_hidden_states))
        return SimpleNamespace(sample=noise)
    torch.testing.assert_close(hf.restore_latent(unet, z_l.float(), prompt, 399), clean, rtol=1e-3, atol=1e-3)
    (z, t, p), = seen
    assert torch.equal(z, z_l.float()) and int(t) == 399 and p is prompt


def test_eq3_the_step_is_a_gain_of_1_532_and_feels_the_network_by_minus_1_161():
    """decode(step(encode(x))): no noise seen makes it 1.532 x, .4584 x seen keeps it; d out / d eps = -1.1606."""
    encode, decode = lambda x: x * .18215, lambda z: z / .18215
    x, bar = torch.randn(2, 4, 5, 5, dtype=f64), hf.alpha_bars()[399].item()
    step = lambda share: decode(hf.predict_clean(encode(x), share * encode(x), bar))
    close(step(0.), x * 1.53197, 1e-5)
    close(step(.458369), x, 1e-5)
    eps = torch.randn(2, 4, 5, 5, requires_grad=True)
    hf.predict_clean(x.float(), eps, bar).sum().backward()
    close(eps.grad, torch.full_like(eps, -1.16058), 1e-5)


def test_eq4_restore_is_encoder_one_step_decoder():
    """x_H^ = G(x_L, p): decode(step(encode(x_L), p)), clipped; the prompt is the adapter's of Eq. 7's codewords."""
    class Codec:
        config = SimpleNamespace(scaling_factor=.5)
        encode = staticmethod(lambda x: SimpleNamespace(latent_dist=SimpleNamespace(mean=x[:, :1] * 3, std=x[:, :1])))
        decode = staticmethod(lambda z: SimpleNamespace(sample=z.expand(-1, 3, -1, -1) / 3))
    vre, lq = hf.VREncoder(width=32, multiples=(1, 1), dim=32, codes=8), torch.rand(2, 3, 8, 8) * .1
    unet = lambda z, t, encoder_hidden_states: SimpleNamespace(sample=z * encoder_hidden_states.mean((1, 2)).view(2, 1, 1, 1))
    nets = dict(vae=Codec, unet=unet, vre=vre, prompt=lambda codes, face: codes + 1 / 4)
    got = hf.restore(nets, SimpleNamespace(latent_sample=True, timestep=399), None, lq, None, None, torch.ones_like)
    with torch.no_grad():
        share = (hf.vre_tokens(vre(lq), vre.codebook) + 1 / 4).mean((1, 2)).view(2, 1, 1, 1)
    z_l = (lq[:, :1] * 3 + lq[:, :1]) * .5                          # mean + std x noise, scaled
    close(got, ((z_l - (1 - AB) ** .5 * share * z_l) / AB ** .5 / .5 / 3).expand(-1, 3, -1, -1).clamp(-1, 1), 1e-4)


# ------------------------------------------------------------------------------------ adversarial loss, Eq. 5

def test_eq5_losses_are_the_logistic_closed_forms():
    """L_G = softplus(-D(fake)), L_D = softplus(D(fake)) + softplus(-D(real)), means, no factor 1/2, any shape."""
    real, fake = torch.randn(2, 3, 1, 4, 4, dtype=f64)
    minus_log_sigmoid = lambda v: sum(math.log(1 + math.exp(-u)) for u in v.flatten().tolist()) / v.numel()
    assert number(hf.generator_loss(fake)) == pytest.approx(minus_log_sigmoid(fake), rel=1e-5)
    want = minus_log_sigmoid(real) + minus_log_sigmoid(-fake)
    assert number(hf.discriminator_loss(real, fake)) == pytest.approx(want, rel=1e-5)
    zero, far = torch.zeros(5, 1), torch.full((5, 1), 200.)
    assert number(hf.generator_loss(zero)) == pytest.approx(math.log(2))
    assert number(hf.discriminator_loss(zero, zero)) == pytest.approx(2 * math.log(2))
    assert number(hf.generator_loss(-far)) == 200 and number(hf.discriminator_loss(-far, far)) == 400
    assert number(hf.generator_loss(far)) == number(hf.discriminator_loss(far, -far)) == 0


def test_eq5_gradients_push_fakes_up_in_g_and_down_in_d_and_reals_up():
    """d L_G / d D(fake) = -sigmoid(-D) / n, d L_D / d D(fake) = sigmoid(D) / n, d L_D / d D(real) = -sigmoid(-D) / n."""
    real, fake = torch.randn(2, 6, 1, dtype=f64).requires_grad_().unbind(0)
    (g,) = torch.autograd.grad(hf.generator_loss(fake), fake)
    d_real, d_fake = torch.autograd.grad(hf.discriminator_loss(real, fake), (real, fake))
    close(g, -torch.sigmoid(-fake) / 6)
    close(d_fake, torch.sigmoid(fake) / 6)
    close(d_real, -torch.sigmoid(-real) / 6)
    assert (g < 0).all() and (d_fake > 0).all() and (d_real < 0).all()


class TinyDiscriminator(nn.Module):
    """Frozen convolution with LoRA and a trainable head: (B, 4, H, W) -> (B, 1, H, W) logits."""

    def __init__(self):
        super().__init__()
        self.body, self.head = nn.Conv2d(4, 6, 3, padding=1), nn.Conv2d(6, 1, 1)
        head = self.head
        common.add_lora(self, ("body",), 2, 2)
        head.requires_grad_(True)
        nn.init.normal_(self.body.lora_B.weight)

    def forward(self, z):
        return self.head(F.leaky_relu(self.body(z), .2))


def test_eq5_each_step_leaves_the_other_network_without_gradients():
    """D on diffused latents: its step gives G none, G's step (D frozen) gives D none, frozen weights never get any."""
    generator, d = nn.Conv2d(4, 4, 3, padding=1), TinyDiscriminator()
    trained = [p for p in d.parameters() if p.requires_grad]
    z_l, z_h, noise = torch.randn(3, 2, 4, 6, 6)
    bar, bars = hf.alpha_bars()[399].item(), hf.alpha_bars()[[100, 700]].view(2, 1, 1, 1)
    z_hat = hf.predict_clean(z_l, generator(z_l), bar)
    diffused = lambda z: d(hf.forward_diffuse(z, noise, bars))

    for p in trained:
        p.requires_grad_(False)
    hf.generator_loss(diffused(z_hat)).backward()
    assert all(p.grad is None for p in d.parameters())
    assert all(p.grad.abs().sum() > 0 for p in generator.parameters())

    kept = [p.grad.clone() for p in generator.parameters()]
    for p in trained:
        p.requires_grad_(True)
    hf.discriminator_loss(diffused(z_h), diffused(z_hat.detach())).backward()
    assert all(torch.equal(p.grad, g) for p, g in zip(generator.parameters(), kept))
    assert len(trained) == 4 and all(p.grad.abs().sum() > 0 for p in trained)
    assert all(p.grad is None for p in d.parameters() if not p.requires_grad)


# ------------------------------------------------------------------------------------ reference selection, Eq. 6

def lstsq_distance(l, h, w=None):
    """min_A sum_k w_k |A (x, y, 1) - h_k|^2 of (K, 2) points by numpy's least squares."""
    root = np.ones((len(l), 1)) if w is None else np.sqrt(np.asarray(w))[:, None]
    a, b = root * np.column_stack([l, np.ones(len(l))]), root * np.asarray(h)
    return float(((a @ np.linalg.lstsq(a, b, rcond=None)[0] - b) ** 2).sum())


def pixels(*shape):
    """Random points on a 512 px picture."""
    return 60 + 390 * torch.rand(*shape, 2)


def test_eq6_picks_the_affine_copy_of_the_degraded_face():
    """Among eight faces the mirrored, sheared, shrunk copy of x_L's landmarks wins, wherever it stands."""
    lq, others = pixels(98), pixels(7, 98)
    copy = lq @ torch.tensor([[-.6, .2], [.1, .8]]) + torch.tensor([300., 40.])
    for place in (0, 3, 7):
        chosen = hf.select_reference(torch.cat([others[:place], copy[None], others[place:]]), lq)
        assert chosen == place and isinstance(chosen, int)


def test_eq6_is_the_argmin_of_a_numpy_loop_with_and_without_weights():
    """argmin_i d(landmarks of r_i, landmarks of x_L); a weight of zero drops a point."""
    for _ in range(10):
        lq, weights = pixels(20), (torch.rand(20) < .5).float()
        references = lq + 30 * torch.rand(6, 1, 1) * torch.randn(6, 20, 2)
        for w in (None, weights):
            want = np.argmin([lstsq_distance(r.double(), lq.double(), w) for r in references])
            assert hf.select_reference(references, lq, w) == want
    references = torch.stack([lq + 3 * torch.randn(20, 2), lq.clone()])
    references[1, :5] += 100 * torch.randn(5, 2)
    assert hf.select_reference(references, lq) == 0
    assert hf.select_reference(references, lq, torch.tensor([0.] * 5 + [1.] * 15)) == 1


def test_eq6_measures_in_the_frame_of_the_degraded_face():
    """A tiny noisy face is near in its own pixels; in x_L's frame, the one of Eq. 6, the large one is nearer."""
    lq = pixels(98)
    large, tiny = lq + 2 * torch.randn(98, 2), .01 * (lq + 20 * torch.randn(98, 2))
    assert lstsq_distance(lq, tiny) < lstsq_distance(lq, large)                 # the wrong order would fall for it
    assert hf.select_reference(torch.stack([tiny, large]), lq) == 1


def test_eq6_ties_and_failed_detections_fall_back_to_the_first():
    """Equal references: the first of the best; nothing finite, or no landmarks of x_L: 0; a NaN never wins."""
    lq = pixels(98)
    far, near = pixels(98), lq + 1
    assert hf.select_reference(near.expand(3, 98, 2).clone(), lq) == 0
    assert hf.select_reference(torch.stack([far, near, near]), lq) == 1
    lost = torch.full((98, 2), math.nan)
    assert hf.select_reference(torch.stack([lost, lost * math.inf]), lq) == 0
    assert hf.select_reference(torch.stack([far, near]), lost) == 0
    assert hf.select_reference(torch.stack([near, lost, far]), lq) == 0
    assert hf.select_reference(lq[None] * 0 + 7, lq) == 0                       # one reference, one single point


# ------------------------------------------------------------------------------------ prompt: VRE tokens, Eq. 7

def loop_tokens(features, codebook, count):
    """One sample and one position at a time: nearest codewords, nearest position first, each codeword once."""
    rows = []
    for f in features:
        best = []
        for y in range(f.shape[1]):
            for x in range(f.shape[2]):
                distance = ((codebook - f[:, y, x]) ** 2).sum(1)
                best.append((distance.min().item(), distance.argmin().item()))
        chosen = list(dict.fromkeys(index for _, index in sorted(best)))[:count]
        empty = torch.zeros(count - len(chosen), codebook.shape[1], dtype=codebook.dtype)
        rows.append(torch.cat([codebook[chosen], empty]))
    return torch.stack(rows)


@pytest.mark.parametrize("codes, count", [(200, 77), (40, 77), (12, 8), (200, 5)])
def test_eq7_vre_tokens_equal_a_loop_over_samples_and_positions(codes, count):
    """Batched selection = the loop, with and without enough distinct codewords, alone and in a batch."""
    codebook = torch.randn(codes, 6, dtype=f64)
    features = torch.randn(3, 6, 9, 13, dtype=f64)
    features[1] = features[1, :, :1, :1]                      # every position alike: one codeword, zeros after it
    got, want = hf.vre_tokens(features, codebook, count), loop_tokens(features, codebook, count)
    assert got.shape == (3, count, 6)
    close(got, want, 1e-12)
    assert (got[1, 1:] == 0).all() and (got[1, 0] != 0).any()
    for b in range(3):
        close(hf.vre_tokens(features[b:b + 1], codebook, count), got[b:b + 1], 1e-12)
    shuffled = features.flatten(2)[..., torch.randperm(9 * 13)].view(features.shape)
    close(hf.vre_tokens(shuffled, codebook, count), got, 1e-12)          # a set of positions: order does not matter


@pytest.mark.parametrize("distinct", [30, 77, 120])
def test_eq7_vre_tokens_are_distinct_codewords_by_growing_distance(distinct):
    """At the released sizes: 77 x 512, each a row of the dictionary, none twice, most confident first, then zeros."""
    codebook = torch.randn(1024, 512)
    words = torch.randperm(1024)[:distinct]
    place = torch.randint(distinct, (256,))
    place[:distinct] = torch.arange(distinct)
    error = 1 + 5 * torch.randperm(256) / 256                  # how far each position is from its codeword, of about 32
    features = codebook[words[place]] + error[:, None] * unit(256, 512)
    tokens = hf.vre_tokens(features.T.reshape(1, 512, 16, 16), codebook)
    assert tokens.shape == (1, 77, 512)
    nearest = torch.full((distinct,), math.inf).scatter_reduce(0, place, error, "amin")
    want = words[nearest.argsort()][:77]
    assert torch.equal(tokens[0, :len(want)], codebook[want]) and len(set(want.tolist())) == min(77, distinct)
    assert (tokens[0, len(want):] == 0).all()


def executed_layers(module, x):
    """Output, and the convolutions and group norms in the order in which they ran."""
    order, hooks = [], []
    for layer in module.modules():
        if isinstance(layer, (nn.Conv2d, nn.GroupNorm)):
            hooks.append(layer.register_forward_hook(lambda m, *_: order.append(m)))
    with torch.no_grad():
        out = module(x)
    for hook in hooks:
        hook.remove()
    return out, order


def slow_vre(order, x, widths):
    """Taming's encoder by function calls, each layer taken from `order` by its sizes, whatever its name."""
    order = list(order)

    def conv(h, out, kernel, stride=1):
        spec = (h.shape[1], out, (kernel, kernel), (stride, stride))
        found = next(m for m in order if isinstance(m, nn.Conv2d)
                     and (m.in_channels, m.out_channels, m.kernel_size, m.stride) == spec)
        order.remove(found)
        h = F.pad(h, (0, 1, 0, 1)) if stride == 2 else h
        return F.conv2d(h, found.weight, found.bias, stride, 0 if stride == 2 else kernel // 2)

    def norm(h):
        found = next(m for m in order if isinstance(m, nn.GroupNorm) and m.num_channels == h.shape[1])
        order.remove(found)
        g = h.unflatten(1, (32, -1))                                                # 32 groups
        mean, var = g.mean((2, 3, 4), keepdim=True), g.var((2, 3, 4), correction=0, keepdim=True)
        return ((g - mean) / (var + 1e-6).sqrt()).flatten(1, 2) * found.weight[:, None, None] + found.bias[:, None, None]

    def block(h, out):
        change = conv(F.silu(norm(conv(F.silu(norm(h)), out, 3))), out, 3)
        return change + (conv(h, out, 1) if h.shape[1] != out else h)

    def attention(h):
        n = norm(h)
        q, k, v = [conv(n, h.shape[1], 1).flatten(2) for _ in range(3)]                     # (B, C, hw)
        weights = (torch.einsum("bci,bcj->bij", q, k) / h.shape[1] ** .5).softmax(-1)
        return h + conv(torch.einsum("bij,bcj->bci", weights, v).view(h.shape), h.shape[1], 1)

    h = conv(x, widths[0], 3)
    for level, width in enumerate(widths):
        last = level == len(widths) - 1
        for _ in range(2):
            h = attention(block(h, width)) if last else block(h, width)
        h = h if last else conv(h, width, 3, stride=2)
    h = block(attention(block(h, widths[-1])), widths[-1])
    h = conv(F.silu(norm(h)), widths[-1], 3)
    h = conv(h, widths[-1], 1)                                                              # quant_conv
    return h, order


def test_vre_encoder_equals_a_functional_reimplementation():
    """Pad right and bottom, two blocks per level, attention in the last, 32 groups of eps 1e-6, quant_conv last."""
    net = randomised(hf.VREncoder(width=32, multiples=(1, 2, 2), dim=64, codes=24))
    x = torch.rand(2, 3, 24, 16) * 2 - 1
    got, order = executed_layers(net, x)
    with torch.no_grad():
        want, left = slow_vre(order, x, (32, 64, 64))
    assert got.shape == (2, 64, 6, 4) and not left and net.codebook.shape == (24, 64)
    close(got, want, 1e-4)


def test_vre_encoder_double_normalisation_is_a_flag():
    """The release feeds (x - .5) / .5 of what is already in [-1, 1]; off by default."""
    sizes = dict(width=32, multiples=(1, 1), dim=32, codes=8)
    plain, twice = hf.VREncoder(**sizes).eval(), hf.VREncoder(**sizes, double_normalise=True).eval()
    twice.load_state_dict(plain.state_dict())
    x = torch.rand(1, 3, 16, 16) * 2 - 1
    with torch.no_grad():
        close(twice(x), plain((x - .5) / .5), 1e-5)
        assert (twice(x) - plain(x)).abs().max() > 1e-3


def test_vre_sizes_are_the_releases():
    """Encoder 28.39 M; with quant_conv (512 x 513) and dictionary (1024 x 512) 29.17 M; adapter 394,496."""
    with torch.device("meta"):
        vre, adapter = hf.VREncoder(), hf.PromptAdapter()
    total = sum(v.numel() for v in vre.state_dict().values())
    assert (round(total / 1e6, 2), round((total - 512 * 513 - 1024 * 512) / 1e6, 2)) == (29.17, 28.39)
    assert vre.codebook.shape == (1024, 512)
    assert sum(p.numel() for p in adapter.parameters()) == 512 * 256 + 256 + 256 * 1024 + 1024


def test_vre_dictionary_starts_uniform_in_one_over_n():
    """Codewords begin uniform in (-1/N, 1/N)."""
    words = hf.VREncoder(width=32, multiples=(1, 1), dim=32, codes=500).codebook.detach() * 500
    assert words.abs().max() <= 1 + 1e-5 and words.var().item() == pytest.approx(1 / 3, rel=.05)
    assert words.mean().item() == pytest.approx(0, abs=.02)


def test_prompt_adapter_is_two_linear_maps_with_silu_after_each():
    """SiLU(W2 SiLU(W1 token + b1) + b2) token by token: never under -.2785, zero rows become one constant."""
    adapter = randomised(hf.PromptAdapter(dim=12, hidden=10, out=14))
    tokens = 3 * torch.randn(2, 77, 12)
    tokens[:, 50:] = 0
    by_shape = {tuple(p.shape[:2]): p.detach() for p in adapter.parameters()}
    w1, w2, b1, b2 = by_shape[10, 12].view(10, 12), by_shape[14, 10].view(14, 10), by_shape[10,], by_shape[14,]
    with torch.no_grad():
        got = adapter(tokens)
    close(got, F.silu(F.silu(tokens @ w1.T + b1) @ w2.T + b2), 1e-5)
    assert got.shape == (2, 77, 14) and got.min() >= -.2785
    assert (got[:, 50:] - got[:1, 50:51]).abs().max() < 1e-6


# ------------------------------------------------------------------------------------ VRE training

def test_association_loss_of_orthonormal_features_in_closed_form():
    """n orthonormal vectors on both sides, whatever their lengths: log(1 + (n - 1) exp(-exp(s)))."""
    features = torch.eye(8, dtype=f64).view(2, 2, 2, 8).movedim(-1, 1)                     # (B, C, h, w), n = 8
    longer = features * (1 + torch.rand(2, 1, 2, 2, dtype=f64))
    for s in (0., math.log(2), math.log(1 / .07)):
        got = hf.association_loss(features, longer, torch.tensor(s, dtype=f64))
        assert number(got) == pytest.approx(math.log1p(7 * math.exp(-math.exp(s))), rel=1e-5, abs=1e-6)


def test_association_loss_equals_a_loop_and_trains_its_temperature():
    """Mean of both directions' cross-entropies to the diagonal; symmetric; the gradient reaches s and both sides."""
    f_h, f_l = torch.randn(2, 2, 5, 3, 2, dtype=f64).requires_grad_().unbind(0)
    s = torch.tensor(.4, dtype=f64, requires_grad=True)
    rows = [[f[b, :, y, x] for b in range(2) for y in range(3) for x in range(2)] for f in (f_h, f_l)]
    logits = torch.stack([torch.stack([s.exp() * (a @ b) / (a.norm() * b.norm()) for b in rows[1]]) for a in rows[0]])
    forth, back = [-(m.diagonal() - m.logsumexp(1)).mean() for m in (logits, logits.T)]
    want, got = (forth + back) / 2, hf.association_loss(f_h, f_l, s)
    close(got, want)
    close(hf.association_loss(f_l, f_h, s), want)
    for a, b in zip(*(torch.autograd.grad(v, (f_h, f_l, s), retain_graph=True) for v in (got, want))):
        assert a.abs().sum() > 0
        close(a, b)


def test_vector_quantize_is_nearest_with_a_straight_through_gradient():
    """Quantised = the nearest codeword by a loop; d out / d features is the identity, and the codebook gets none."""
    features, codebook = torch.randn(2, 5, 3, 4, dtype=f64), torch.randn(7, 5, dtype=f64)
    features.requires_grad_(), codebook.requires_grad_()
    out, _, indices = hf.vector_quantize(features, codebook)
    assert out.shape == features.shape and indices.shape == (2, 3, 4)
    for b, y, x in np.ndindex(2, 3, 4):
        distances = [(features[b, :, y, x] - word).square().sum().item() for word in codebook]
        assert indices[b, y, x] == np.argmin(distances)
        close(out[b, :, y, x], codebook[indices[b, y, x]], 1e-12)
    weight = torch.randn_like(out)
    to_features, to_codebook = torch.autograd.grad((out * weight).sum(), (features, codebook), allow_unused=True)
    close(to_features, weight)
    assert to_codebook is None or (to_codebook == 0).all()


@pytest.mark.parametrize("beta", [None, .25, 2.])
def test_vector_quantize_loss_weighs_the_codebook_by_beta(beta):
    """|sg(zq) - z|^2 + beta |zq - sg(z)|^2 (means): value (1 + beta) mse, gradients 2 (z - zq) / n and beta times that."""
    features, codebook = torch.randn(2, 5, 3, 4, dtype=f64), torch.randn(7, 5, dtype=f64)
    features.requires_grad_(), codebook.requires_grad_()
    keywords, beta = ({}, .25) if beta is None else (dict(beta=beta), beta)
    _, loss, indices = hf.vector_quantize(features, codebook, **keywords)
    error = (features - codebook[indices].movedim(-1, 1)).detach()
    assert number(loss) == pytest.approx((1 + beta) * error.square().mean().item(), rel=1e-5)
    to_features, to_codebook = torch.autograd.grad(loss, (features, codebook))
    close(to_features, 2 * error / error.numel())
    want = torch.zeros_like(codebook).index_add_(0, indices.flatten(), error.movedim(1, -1).reshape(-1, 5))
    close(to_codebook, -beta * 2 * want / error.numel())


# ------------------------------------------------------------------------------------ identity embedder

OVAL = torch.tensor([[5., 0], [-5, 0], [3, 2], [3, -2], [-3, 2], [-3, -2], [0, 2], [0, -2]])   # mean 0, 10 x 4


def two_eyes(left=(20., 30.), right=(44., 33.)):
    """(98, 2) points whose image-left eye lies and whose image-right eye stands on end, half extents 5."""
    points = torch.zeros(98, 2)
    points[LEFT], points[RIGHT] = OVAL + torch.tensor(left), OVAL.flip(1) + torch.tensor(right)
    return points


def test_eye_boxes_by_hand():
    """Centre = mean of 8 points, half side 1.4 x the larger half extent, at least 16 px of 512, x1 y1 x2 y2."""
    points = torch.stack([two_eyes(), two_eyes()])
    points[1, LEFT] = torch.tensor([30., 31.])                          # a single point: the minimum
    points[1, RIGHT] = torch.tensor([40., 20.])
    points[1, 75] += torch.tensor([16., 0.])                            # lopsided: mean 42, half extent 8
    boxes = hf.eye_boxes(points, 64)
    assert boxes.shape == (2, 2, 4)
    close(boxes[0], torch.tensor([[13., 23, 27, 37], [37, 26, 51, 40]]))
    close(boxes[1], torch.tensor([[27.2, 28.2, 32.8, 33.8], [42 - 11.2, 20 - 11.2, 42 + 11.2, 20 + 11.2]]))
    points[:] = 256.
    close(hf.eye_boxes(points, 512), torch.tensor([256 - 22.4, 256 - 22.4, 256 + 22.4, 256 + 22.4]).expand(2, 2, 4))


def test_eye_boxes_scale_with_the_picture_and_hold_the_eyes_of_toy_faces():
    """Boxes at 128 px are twice those at 64; every eye point inside, left box on the left, squares."""
    small, large = [common.toy_faces(list(range(12)), 3, size=size).landmarks for size in (64, 128)]
    boxes = hf.eye_boxes(small, 64)
    close(hf.eye_boxes(large, 128), 2 * boxes, 1e-4)
    for side, points in ((0, small[:, LEFT]), (1, small[:, RIGHT])):
        low, high = boxes[:, side, None, :2], boxes[:, side, None, 2:]
        assert ((points > low) & (points < high)).all()
    width, height = boxes[..., 2] - boxes[..., 0], boxes[..., 3] - boxes[..., 1]
    close(width, height, 1e-4)
    assert (boxes[:, 0, 0] < boxes[:, 1, 0]).all() and (width >= 2 * 1.4 * 2 - 1e-4).all()


class Pointwise(nn.Module):
    """A backbone without neighbourhoods: two 1 x 1 convolutions, and a memory of what it was given."""
    channels = (4, 5)

    def __init__(self):
        super().__init__()
        self.early, self.mid, self.seen = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 5, 1), []

    def forward(self, x):
        self.seen.append(x.detach())
        early = torch.tanh(self.early(x))
        return early, F.avg_pool2d(torch.tanh(self.mid(early)), 2)


def eye_tokens(dim=24, crop=14):
    """A small extractor, redrawn, and its backbone."""
    backbone = Pointwise()
    extractor = hf.FacialFeatureExtractor(backbone, dim=dim, crop=crop)
    return randomised(extractor), backbone


def test_ffe_sees_exactly_the_pixels_of_the_two_boxes():
    """Where a box has whole corners and the crop its size, the backbone gets those pixels in [0, 1]."""
    extractor, backbone = eye_tokens()
    picture, points = torch.rand(1, 3, 64, 64) * 2 - 1, two_eyes()[None]
    extractor(picture, points)
    seen = torch.cat(backbone.seen)
    assert seen.shape == (2, 3, 14, 14) and seen.min() >= 0 and seen.max() <= 1
    want = [picture[0, :, 23:37, 13:27] / 2 + .5, picture[0, :, 26:40, 37:51] / 2 + .5]
    assert any(all((a - b).abs().max() < 1e-4 for a, b in zip(pair, want)) for pair in (seen, seen.flip(0)))


def test_ffe_concatenates_four_embeddings_and_projects_them_together():
    """p_F = W [colour left, colour right, structure left, structure right] + b, cut into four tokens   [sec. 3.2]"""
    extractor, backbone = eye_tokens()
    picture, points = torch.rand(1, 3, 64, 64) * 2 - 1, two_eyes()[None]
    embeddings = []
    with torch.no_grad():
        got = extractor(picture, points)
        early, middle = backbone(backbone.seen[0])                                          # left eye, right eye
        colour = torch.cat([early.mean((2, 3)), (early.var((2, 3), correction=0) + 1e-6).sqrt()], 1)
        for head, eyes in ((extractor.colour, colour), (extractor.structure, F.adaptive_avg_pool2d(middle, 4).flatten(1))):
            embeddings += [extractor.norm(head.weight @ eye + head.bias) for eye in eyes]
        want = extractor.project.weight @ torch.cat(embeddings) + extractor.project.bias
        assert got.shape == (1, 4, 24) and [len(e) for e in embeddings] == [6] * 4
        close(got.flatten(), want, 1e-4)
        picture[..., 26:40, 37:51] *= .5                            # one projection: every token reads either eye
        assert ((extractor(picture, points) - got).abs().amax(-1) > 1e-3).all()


def test_ffe_ignores_the_rest_of_the_picture_and_of_the_batch():
    """Only the eyes matter, a face is read the same alone, and equal eyes still give four different tokens."""
    extractor, _ = eye_tokens()
    picture = torch.rand(3, 3, 64, 64) * 2 - 1
    points = torch.stack([two_eyes(), two_eyes((16.3, 24.8), (40.1, 22.2)), two_eyes((25.5, 40.), (45., 41.5))])
    with torch.no_grad():
        tokens = extractor(picture, points)
        for b in range(3):
            close(extractor(picture[b:b + 1], points[b:b + 1]), tokens[b:b + 1], 1e-4)
        mask = torch.zeros(64, 64)
        mask[22:38, 12:28] = mask[25:41, 36:52] = 1
        close(extractor(picture[:1] * mask, points[:1]), tokens[:1], 1e-4)
        same = extractor(torch.full((1, 3, 64, 64), .3), points[:1])[0]
    assert torch.cdist(same, same).fill_diagonal_(9).min() > .1


def test_ffe_backbone_is_frozen_and_the_heads_learn():
    """No gradient in VGG's place, some in everything else; training mode changes nothing of that."""
    extractor, backbone = eye_tokens()
    extractor.train()
    (extractor(torch.rand(2, 3, 64, 64) * 2 - 1, two_eyes().expand(2, 98, 2)) * torch.randn(2, 4, 24)).sum().backward()
    assert all(p.grad is None and not p.requires_grad for p in backbone.parameters())
    others = [p for n, p in extractor.named_parameters() if p.requires_grad]
    assert len(others) >= 4 and all(p.grad is not None and p.grad.abs().sum() > 0 for p in others)


def test_ffe_default_backbone_is_vgg16_to_relu3_3():
    """UNSTATED "layers 0 and 2" are blocks: 1,735,488 frozen parameters, 64 and 256 channels, tokens of 1024."""
    extractor = hf.FacialFeatureExtractor().eval()
    assert sum(p.numel() for p in extractor.parameters() if not p.requires_grad) == 1_735_488
    assert tuple(extractor.backbone.channels) == (64, 256)
    with torch.no_grad():
        assert extractor(torch.rand(1, 3, 64, 64) * 2 - 1, two_eyes()[None]).shape == (1, 4, 1024)


def small_fie():
    return hf.FaceIdentityEncoder(id_dim=16, tokens=7, dim=24).eval()


@pytest.mark.parametrize("redraw", [False, True])
def test_fie_does_not_depend_on_order_or_padding(redraw):
    """Any order of the references, any absent rows with anything in them, any batch: the same seven tokens."""
    encoder = randomised(small_fie()) if redraw else small_fie()
    faces, present = unit(2, 4, 16), torch.tensor([[True] * 4, [True, True, False, False]])
    with torch.no_grad():
        tokens = encoder(faces, present)
        assert tokens.shape == (2, 7, 24)
        order = torch.tensor([2, 0, 3, 1])
        close(encoder(faces[:, order], present[:, order]), tokens, 1e-4)
        junk = torch.cat([50 * torch.randn(2, 3, 16), faces], 1)
        close(encoder(junk, torch.cat([torch.zeros(2, 3, dtype=torch.bool), present], 1)), tokens, 1e-4)
        close(encoder(faces[1:, :2], present[1:, :2]), tokens[1:], 1e-4)
        other = encoder(unit(2, 4, 16), present)
    assert ((other - tokens).abs().amax(-1) > 1e-3).all()                 # every token listens to who it is


def test_fie_one_reference_gives_seven_different_tokens():
    """With one reference the softmax is 1 and all pooled vectors agree: the tokens must differ all the same, at init."""
    encoder = hf.FaceIdentityEncoder().eval()
    with torch.no_grad():
        tokens = encoder(unit(3, 1, 512), torch.ones(3, 1, dtype=torch.bool))
    assert tokens.shape == (3, 7, 1024)
    for face in tokens:
        apart = torch.cdist(face, face) + 1e9 * torch.eye(7)
        assert apart.min() > .05 * face.norm(dim=-1).mean()


def test_fie_pools_by_a_convex_combination():
    """Attention chooses weights, never values: copies of one picture say what the one says, and the same at any count."""
    encoder, face = randomised(small_fie()), unit(1, 1, 16)
    with torch.no_grad():
        one = encoder(face, torch.ones(1, 1, dtype=torch.bool))
        close(encoder(face.expand(1, 5, 16), torch.ones(1, 5, dtype=torch.bool)), one, 1e-4)
        two = torch.cat([face, unit(1, 1, 16)], 1)
        assert (encoder(two, torch.ones(1, 2, dtype=torch.bool)) - one).abs().max() > 1e-3


def test_fie_without_references_gives_learned_null_tokens():
    """All absent: finite tokens that no embedding moves, different from each other, that learn; neighbours unharmed."""
    encoder = small_fie()
    faces, present = unit(2, 3, 16), torch.tensor([[False] * 3, [True, False, True]])
    tokens = encoder(faces, present)
    assert tokens.isfinite().all()
    close(encoder(100 * torch.randn(2, 3, 16), present)[0], tokens[0])
    close(encoder(faces[1:], present[1:]), tokens[1:])
    assert (torch.cdist(tokens[0], tokens[0]) + torch.eye(7)).min() > 1e-3
    (tokens[0] * torch.randn(7, 24)).sum().backward()
    grads = [p.grad for p in encoder.parameters() if p.grad is not None]
    assert all(g.isfinite().all() for g in grads) and any(g.abs().sum() > 0 for g in grads)


def test_fie_accepts_no_reference_axis_at_all():
    """(B, 0, id_dim), a person without pictures, is the same as absent rows."""
    encoder = small_fie()
    with torch.no_grad():
        absent = encoder(unit(2, 3, 16), torch.zeros(2, 3, dtype=torch.bool))
        close(encoder(torch.zeros(2, 0, 16), torch.zeros(2, 0, dtype=torch.bool)), absent)


def test_fusion_starts_as_the_vre_prompt_and_can_learn():
    """77 + 4 + 7 -> 77: bitwise p_L at initialisation, whatever the references say, null tokens too; the gradient lives."""
    fusion, (p_l, p_f, p_i) = hf.PromptFusion(64), [torch.randn(2, n, 64) for n in (77, 4, 7)]
    null = hf.FaceIdentityEncoder(id_dim=16, dim=64)(torch.zeros(2, 1, 16), torch.zeros(2, 1, dtype=torch.bool))
    for identity in (p_i, 100 * p_i, null):
        got = fusion(p_l, p_f, identity)
        assert got.shape == (2, 77, 64) and torch.equal(got, p_l)
    (fusion(p_l, p_f, p_i) * torch.randn(2, 77, 64)).sum().backward()
    assert any(p.dim() > 1 and p.grad is not None and p.grad.abs().sum() > 0 for p in fusion.parameters())
    with torch.device("meta"):
        p = [torch.empty(1, n, 1024) for n in (77, 4, 7)]
        assert hf.PromptFusion(1024)(*p).shape == (1, 77, 1024)


def test_fusion_reads_sets_of_tokens_once_it_has_learned():
    """Redrawn: every prompt token feels p_F and p_I, their order says nothing, and p_L's order is kept."""
    fusion, (p_l, p_f, p_i) = randomised(hf.PromptFusion(64)), [torch.randn(2, n, 64) for n in (77, 4, 7)]
    order = torch.randperm(77)
    with torch.no_grad():
        got = fusion(p_l, p_f, p_i)
        for changed in (fusion(p_l, p_f + 1, p_i), fusion(p_l, p_f, p_i + 1)):
            assert ((changed - got).abs().amax(-1) > 1e-4).all()
        close(fusion(p_l, p_f.flip(1), p_i.roll(2, 1)), got, 1e-4)
        close(fusion(p_l[:, order], p_f, p_i), got[:, order], 1e-4)
        close(fusion(p_l[1:], p_f[1:], p_i[1:]), got[1:], 1e-4)


# ------------------------------------------------------------------------------------ identity loss, Eq. 8

def turned(x, degrees):
    """(B, 2, 1, 1) "images" turned in their plane."""
    c, s = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
    return torch.stack([c * x[:, 0] - s * x[:, 1], s * x[:, 0] + c * x[:, 1]], 1)


def test_eq8_identity_loss_sums_one_minus_cosine_over_the_ensemble():
    """0 for one person, .5 at 60 degrees, 2 at opposites; two recognisers add up, pictures average."""
    encoder = lambda x: F.normalize(x.flatten(1))
    x = torch.randn(6, 2, 1, 1, dtype=f64)
    for degrees, want in ((0, 0), (60, .5), (90, 1), (180, 2)):
        assert number(hf.identity_loss([encoder], turned(x, degrees), x)) == pytest.approx(want, abs=1e-6)
        assert number(hf.identity_loss([encoder] * 2, turned(x, degrees), x)) == pytest.approx(2 * want, abs=1e-6)
    half = torch.cat([x[:3], turned(x, 180)[3:]])
    first_only = lambda x: F.normalize(x[:, :1].flatten(1) * x.new_tensor([1., 0.]))       # sees the sign of one value
    signs = (x[:, 0] * half[:, 0] < 0).double().mean().item()
    assert number(hf.identity_loss([encoder, first_only], half, x)) == pytest.approx(1 + 2 * signs, rel=1e-5)


def test_eq8_gradient_reaches_the_restored_face_only():
    """Through frozen recognisers to x_hat, as from the explicit sum; nothing in the target or in the networks."""
    nets = [nn.Sequential(nn.Flatten(), nn.Linear(48, 8)).requires_grad_(False) for _ in range(2)]
    encoders = [lambda x, net=net: F.normalize(net(x)) for net in nets]
    restored, target = [torch.randn(3, 3, 4, 4).requires_grad_() for _ in range(2)]
    hf.identity_loss(encoders, restored, target).backward()
    explicit = sum(1 - F.cosine_similarity(net(restored), net(target.detach())).mean() for net in nets)
    close(restored.grad, torch.autograd.grad(explicit, restored)[0])
    assert target.grad is None and restored.grad.abs().sum() > 0
    assert all(p.grad is None for net in nets for p in net.parameters())


# ------------------------------------------------------------------------------------ EA-DISTS, Eq. 9

def slow_edges(x):
    """Sobel's magnitude of the mean of R, G, B inside the picture: (B, 3, H, W) -> (B, 1, H - 2, W - 2)."""
    g = x.mean(1, keepdim=True)
    at = lambda dy, dx: g[..., 1 + dy:g.shape[-2] - 1 + dy, 1 + dx:g.shape[-1] - 1 + dx]
    gx = sum(w * (at(i, 1) - at(i, -1)) for i, w in ((-1, 1), (0, 2), (1, 1)))
    gy = sum(w * (at(1, i) - at(-1, i)) for i, w in ((-1, 1), (0, 2), (1, 1)))
    return (gx ** 2 + gy ** 2 + 1e-6).sqrt()


def test_eq9_sobel_of_ramps_steps_and_noise():
    """A ramp of slope a: 8 a, the mean of the channels' slopes; a step of 1: 4; a constant: 1e-3; noise as a loop."""
    column = torch.arange(12, dtype=f64).expand(1, 3, 10, 12)
    slopes = torch.tensor([.01, .02, .06], dtype=f64).view(3, 1, 1)
    inside = lambda x: hf.sobel(x)[..., 1:-1, 1:-1]
    assert hf.sobel(column).shape == (1, 1, 10, 12)
    for ramp in (column * slopes, (column * slopes).mT):
        assert inside(ramp).flatten().tolist() == pytest.approx([(.24 ** 2 + 1e-6) ** .5] * 80, rel=1e-4)
    assert inside((column > 5).double()).max().item() == pytest.approx(4, rel=1e-6)
    assert inside(torch.full_like(column, .7)).flatten().tolist() == pytest.approx([1e-3] * 80, rel=1e-3)
    x = torch.rand(2, 3, 9, 7, dtype=f64)
    close(inside(x), slow_edges(x))


def test_eq9_sobel_has_a_finite_gradient_on_flat_pictures():
    """The 1e-6 under the root is there for this."""
    x = torch.full((1, 3, 6, 6), .5, requires_grad=True)
    hf.sobel(x)[..., 1:-1, 1:-1].sum().backward()
    assert x.grad.isfinite().all() and x.grad.abs().max() < 1e-3


def test_eq9_edge_aware_dists_adds_pictures_and_their_edges():
    """DISTS(x, y) + DISTS(edges of x, edges of y), in equal parts, of pictures as [0, 1], never clamped."""
    calls = []
    a, b = 3 * torch.rand(2, 2, 3, 10, 12, dtype=f64) - 1.5
    got = hf.edge_aware_dists(lambda x, y: calls.append((x, y)) or mse(x, y), a, b)
    halves = [v / 2 + .5 for v in (a, b)]
    given = lambda pair: next((v for v in ((a, b), halves) if torch.allclose(pair[0], v[0])), None)     # range of the caller
    assert len(calls) == 2 and sum(given(pair) is not None for pair in calls) == 1
    pictures, edges = calls if given(calls[0]) else reversed(calls)
    close(pictures[1], given(pictures)[1])
    for picture, edge in zip(pictures, edges):
        inside = edge[..., 1:-1, 1:-1]
        close(inside, slow_edges(picture).expand_as(inside))
    assert number(got) == pytest.approx(number(mse(*pictures)) + number(mse(*edges)), rel=1e-5)


def test_eq9_edge_aware_dists_with_the_real_network():
    """Zero at equality, symmetric, larger for more blur, and felt by every pixel of the restored picture."""
    dists, x = metrics.DISTS(), torch.rand(2, 3, 32, 32)
    blur = lambda v, n: F.avg_pool2d(F.pad(v, (n, n, n, n), mode="reflect"), 2 * n + 1, 1)
    assert number(hf.edge_aware_dists(dists, x, x)) == pytest.approx(0, abs=1e-5)
    near, far = [number(hf.edge_aware_dists(dists, blur(x, n), x)) for n in (1, 4)]
    assert 0 < near < far
    assert number(hf.edge_aware_dists(dists, x, blur(x, 4))) == pytest.approx(far, rel=1e-3)
    restored = blur(x, 1).requires_grad_()
    hf.edge_aware_dists(dists, restored, x).sum().backward()
    assert restored.grad.isfinite().all() and (restored.grad != 0).float().mean() > .99


def test_dists_l2_pooling_keeps_a_constant_inside():
    """sqrt(Hann-blurred squares): a constant stays itself away from the border (fact sheet 3)."""
    pool = metrics.L2Pool()
    close(pool(torch.full((1, 2, 12, 12), -.7))[..., 1:, 1:], torch.full((1, 2, 5, 5), .7))
    impulse = torch.zeros(1, 1, 8, 8)
    impulse[..., 4, 4] = 3.
    assert pool(impulse)[0, 0, 2, 2].item() == pytest.approx(1.5)                 # 3 sqrt(.5 x .5)


# ------------------------------------------------------------------------------------ masked face alignment, Eq. 10-13

def test_eq10_raw_mask_is_the_mean_over_the_landmarks_enlarged():
    """98 heatmaps act as their mean (not sum or maximum), bilinear to the size of the picture; no gradient."""
    heatmaps = torch.rand(2, 98, 8, 8, dtype=f64, requires_grad=True)
    mean = heatmaps.detach().mean(1, keepdim=True)
    mask = hf.mfa_mask(heatmaps, 16)
    assert mask.shape == (2, 1, 16, 16) and not mask.requires_grad
    close(mask, hf.mfa_mask(mean, 16))
    raw = F.interpolate(mean, (16, 16), mode="bilinear", align_corners=False)
    lifted = 1 - (-10 * raw).exp()
    low, high = lifted.amin((2, 3), keepdim=True), lifted.amax((2, 3), keepdim=True)
    close(mask, (lifted - low) / (high - low + 1e-6))


@pytest.mark.parametrize("k", [.01, 10., 100.])
def test_eq11_weak_responses_are_lifted_by_the_exponential(k):
    """Raw values 0, m, 1 give 0, (1 - e^{-km}) / (1 - e^{-k}), 1: concave, a plain min-max for small k; default 10."""
    values = torch.tensor([0., .01, .1, .3, .7, 1.], dtype=f64)
    heatmaps = values[torch.arange(36) % 6].view(1, 1, 6, 6)
    got = hf.mfa_mask(heatmaps, 6, k=k, eps=0.).flatten()[:6]
    want = (1 - np.exp(-k * values.numpy())) / (1 - math.exp(-k))
    np.testing.assert_allclose(got.numpy(), want, rtol=1e-5, atol=1e-5)
    assert (got >= values - 1e-5).all()
    close(hf.mfa_mask(heatmaps, 6), hf.mfa_mask(heatmaps, 6, k=10., eps=1e-6), 1e-12)


def test_eq11_each_picture_is_normalised_by_itself():
    """min 0 and max range / (range + eps) per picture, within [0, 1] even for negative responses; flat maps give 0."""
    heatmaps = torch.rand(3, 5, 12, 12, dtype=f64) * torch.tensor([1., .03, 1e-3], dtype=f64).view(3, 1, 1, 1)
    raw = heatmaps.mean(1).flatten(1)
    mask = hf.mfa_mask(heatmaps, 12, eps=.1)
    spread = (-10 * raw.amin(1)).exp() - (-10 * raw.amax(1)).exp()
    assert mask.amin((1, 2, 3)).tolist() == [0, 0, 0]
    close(mask.amax((1, 2, 3)), spread / (spread + .1))
    close(mask[1:2], hf.mfa_mask(heatmaps[1:2], 12, eps=.1), 1e-6)
    rough = hf.mfa_mask(torch.randn(2, 98, 16, 16) * .05 - .02, 64)
    assert rough.min() >= 0 and rough.max() <= 1 and rough.max() > .9
    assert (hf.mfa_mask(torch.zeros(1, 98, 16, 16), 64) == 0).all()
    assert hf.mfa_mask(torch.full((1, 98, 16, 16), .25, dtype=f64), 16).abs().max() < 1e-6


def test_eq12_eq13_loss_compares_composites_on_the_background():
    """perceptual(M x_hat + (1 - M) B, M x + (1 - M) B): with squares mean((M (x_hat - x))^2) for any B; grey is 0."""
    restored, target = torch.randn(2, 2, 3, 6, 6, dtype=f64)
    mask, seen = torch.rand(2, 1, 6, 6, dtype=f64), []
    want = (mask * (restored - target)).square().mean().item()
    for background in (0., -1., .5):
        record = lambda a, b: seen.append((a, b)) or mse(a, b)
        assert number(hf.mfa_loss(record, restored, target, mask, background)) == pytest.approx(want, rel=1e-5)
        composites = [mask * v + (1 - mask) * background for v in (restored, target)]
        assert all(any((a - b).abs().max() < 1e-5 for b in composites) for a in seen[-1])
    seen.clear()
    hf.mfa_loss(lambda a, b: seen.append((a, b)) or mse(a, b).mean(), restored, target, mask * 0)    # a scalar will do
    assert all((v == 0).all() for v in seen[0])                                  # nothing but mid grey
    assert hf.mfa_loss(mse, restored, target, mask).shape == ()


def test_eq13_vanishes_on_equal_pictures_and_empty_masks_and_forgets_b_under_a_full_one():
    """A distance that is no function of the difference: 0 at x_hat = x and at M = 0; B is nothing at M = 1."""
    distance = lambda a, b: (a.exp() - b.exp()).abs().mean((1, 2, 3))
    restored, target = torch.randn(2, 2, 3, 6, 6, dtype=f64)
    mask, one = torch.rand(2, 1, 6, 6, dtype=f64), torch.ones(2, 1, 6, 6, dtype=f64)
    loss = lambda m, background, x=restored: number(hf.mfa_loss(distance, x, target, m, background))
    assert loss(mask, 0., target) == loss(0 * one, 0.) == loss(0 * one, .8) == 0
    assert loss(one, 0.) == pytest.approx(loss(one, .8), rel=1e-5) == pytest.approx(number(distance(restored, target)), rel=1e-5)
    assert abs(loss(mask, 0.) - loss(mask, .8)) > 1e-3


def test_eq13_gradient_is_weighted_by_the_mask():
    """d mean((M (x_hat - x))^2) / d x_hat = 2 M^2 (x_hat - x) / n: none where the mask is black, none in the heatmaps."""
    restored, target = torch.randn(2, 1, 3, 8, 8, dtype=f64)
    heatmaps = torch.zeros(1, 98, 8, 8, dtype=f64)
    heatmaps[..., 2:5, 3:6] = torch.rand(1, 98, 3, 3, dtype=f64)
    restored.requires_grad_(), heatmaps.requires_grad_()
    mask = hf.mfa_mask(heatmaps, 8)
    hf.mfa_loss(mse, restored, target, mask).backward()
    close(restored.grad, 2 * mask ** 2 * (restored - target).detach() / restored.numel())
    assert heatmaps.grad is None and (restored.grad[..., 6:, :] == 0).all() and restored.grad.abs().max() > 0


# ------------------------------------------------------------------------------------ affine landmark distance, Eq. 14-15

def projection_distance(l, h, w):
    """|(I - Q Q^T) sqrt(W) H|^2, Q an orthonormal basis of the columns of sqrt(W) L'."""
    q, s, _ = np.linalg.svd(np.sqrt(w)[:, None] * np.column_stack([l, np.ones(len(l))]), full_matrices=False)
    q, rest = q[:, s > 1e-9 * s[0]], np.sqrt(w)[:, None] * h
    return float(((rest - q @ (q.T @ rest)) ** 2).sum())


def test_eq14_distance_is_the_least_of_all_affine_maps():
    """A moved corner of a square costs (a^2 + b^2) / 4; affine images cost 0; never above the raw distance."""
    def d(l, h, w=None):
        """The stable form; where Eq. 15 has its inverse, the printed one says the same."""
        found = metrics.affine_landmark_distance(l, h, w).item()
        if len(l) > 3 and not (l[:, 1] == 2 * l[:, 0] + 1).all():
            printed = hf.affine_landmark_distance(l, h, torch.ones(len(l), dtype=f64) if w is None else w).item()
            assert found == pytest.approx(printed, rel=1e-6, abs=1e-6)
        return found

    square = torch.tensor([[0., 0], [1, 0], [1, 1], [0, 1]], dtype=f64)
    moved = square.clone()
    moved[3] += torch.tensor([.3, -.4])
    assert d(square, moved) == pytest.approx(.25 / 4) and (moved - square).square().sum().item() == pytest.approx(.25)
    l, h = pixels(34).double(), pixels(34).double()
    w, mirror = .1 + torch.rand(34, dtype=f64), torch.tensor([-1., 1.], dtype=f64)
    shear = torch.tensor([[.7, .2], [-.1, 1.3]], dtype=f64)
    assert d(l, l @ shear + 40) == pytest.approx(0, abs=1e-12 * 512 ** 2)
    assert d(l * mirror, h, w) == pytest.approx(d(l @ shear + 3, h, w)) == pytest.approx(d(l, h, w))
    assert d(l, h, w) <= (w * (l - h).square().sum(-1)).sum().item()
    assert d(l, h, 5 * w) == pytest.approx(5 * d(l, h, w)) and d(l, 3 * h, w) == pytest.approx(9 * d(l, h, w))
    assert d(l, h, w) == pytest.approx(projection_distance(*(v.numpy() for v in (l, h, w))))
    assert d(l, h, w) == pytest.approx(lstsq_distance(l, h, w)) and d(l[:3], h[:3]) == pytest.approx(0, abs=1e-6)
    line = torch.stack([torch.arange(9.), 2 * torch.arange(9.) + 1], 1).double()
    assert d(line, h[:9]) == pytest.approx(projection_distance(line.numpy(), h[:9].numpy(), np.ones(9)))


def test_eq15_solves_eq14():
    """A* = H W L'^T (L' W L'^T)^-1; any other map is worse; the gradient of Eq. 14 vanishes there."""
    l, h, w = pixels(20).double(), pixels(20).double(), .1 + torch.rand(20, dtype=f64)
    lifted = torch.cat([l, torch.ones(20, 1, dtype=f64)], 1)
    star = (h.T * w) @ lifted @ torch.linalg.inv((lifted.T * w) @ lifted)
    got = hf.affine_fit(l, h, w)
    close(got, star, 1e-9)
    close(metrics.affine_fit(l, h, w), got, 1e-6)
    many = torch.stack([l, l.flip(0)]), torch.stack([h, 2 * h])                             # a batch of faces
    close(hf.affine_landmark_distance(*many, w), metrics.affine_landmark_distance(*many, w), 1e-6)
    cost = lambda a: (w * (lifted @ a.T - h).square().sum(-1)).sum()
    assert cost(got).item() == pytest.approx(metrics.affine_landmark_distance(l, h, w).item())
    assert all(cost(got + .01 * torch.randn(2, 3, dtype=f64)) > cost(got) for _ in range(20))
    gradient = torch.autograd.functional.jacobian(cost, got)
    assert gradient.abs().max() < 1e-9 * 512 * cost(got)


# ------------------------------------------------------------------------------------ LoRA, landmarks, crop, sizes

@pytest.mark.parametrize("options", [dict(kernel_size=3, padding=1), dict(kernel_size=3, stride=2, padding=1),
                                     dict(kernel_size=1, bias=False), dict(kernel_size=3, padding=2, dilation=2),
                                     dict(kernel_size=(3, 1), padding=(1, 0))])
def test_lora_convolution_starts_as_the_base_and_merges_exactly(options):
    """A has the kernel, B is 1 x 1; no-op at init; then base + alpha / rank B(A x); merging gives a plain convolution."""
    model, x = nn.Sequential(nn.Conv2d(3, 5, **options), nn.ReLU(), nn.Conv2d(5, 2, 1)), torch.randn(2, 3, 9, 8)
    base, before = model[0], model(x).detach()
    parameters = common.add_lora(model, ("0",), rank=4, alpha=8)
    layer = model[0]
    close(model(x), before, 1e-6)
    assert isinstance(layer, common.LoRALinear)
    assert layer.lora_A.weight.shape == (4, 3, *base.kernel_size) and layer.lora_B.weight.shape == (5, 4, 1, 1)
    assert {id(p) for p in parameters} == {id(layer.lora_A.weight), id(layer.lora_B.weight)}
    assert not any(p.requires_grad for p in (*base.parameters(), *model[2].parameters()))
    nn.init.normal_(layer.lora_B.weight)
    inner = F.conv2d(x, layer.lora_A.weight, None, base.stride, base.padding, base.dilation)
    close(layer(x), base(x) + 2 * torch.einsum("or,brhw->bohw", layer.lora_B.weight[:, :, 0, 0], inner), 1e-5)
    after = model(x).detach()
    common.merge_lora(model)
    assert type(model[0]) is nn.Conv2d
    close(model(x), after, 1e-4)
    assert (after - before).abs().max() > 1e-2


def test_lora_serves_linear_and_convolution_layers_of_one_model():
    """Both kinds are wrapped by one call and merged by one call, at r = alpha as in the paper."""
    model = nn.ModuleDict(dict(to_q=nn.Linear(6, 6), conv1=nn.Conv2d(6, 6, 3, padding=1), conv=nn.Conv2d(6, 6, 1)))
    run = lambda x: model["to_q"](model["conv"](model["conv1"](x)).movedim(1, -1))
    x = torch.randn(2, 6, 5, 5)
    before, parameters = run(x).detach(), common.add_lora(model, ("to_q", "conv1"), rank=16, alpha=16)
    close(run(x), before, 1e-6)
    assert len(parameters) == 4 and type(model["conv"]) is nn.Conv2d
    for p in parameters:
        nn.init.normal_(p, std=.1)
    after = run(x).detach()
    common.merge_lora(model)
    assert type(model["to_q"]) is nn.Linear and type(model["conv1"]) is nn.Conv2d
    close(run(x), after, 1e-4)
    assert (after - before).abs().max() > 1e-2


def test_heatmaps_are_decoded_on_a_four_pixel_grid_also_at_borders():
    """Cell + .5 +- .25 towards the larger neighbour, x 8 px; a point on the border disturbs no other."""
    heatmaps = torch.rand(1, 98, 64, 64) * .1
    cells = torch.randint(1, 63, (98, 2))
    cells[:4] = torch.tensor([[0, 0], [63, 63], [0, 63], [63, 0]])
    heatmaps[0, torch.arange(98), cells[:, 1], cells[:, 0]] = 1.
    points = metrics.decode_heatmaps(heatmaps, 512)[0]
    offset = points - (cells + .5) * 8
    assert offset.abs().max() <= 2 and ((points[4:] - 2) % 4 == 0).all()
    for i in range(4, 98):
        (x, y), h = cells[i].tolist(), heatmaps[0, i]
        assert offset[i].tolist() == [2. if h[y, x + 1] > h[y, x - 1] else -2., 2. if h[y + 1, x] > h[y - 1, x] else -2.]


def test_crop_of_arcface_matches_the_similarity_of_the_two_templates():
    """The box 65..448 x 61..445 of 512 px sends FFHQ's five points where ArcFace's 112 px template wants them."""
    ffhq = np.array(common.FFHQ_512) @ [1, 1j]
    arcface = np.array([(38.2946, 51.6963), (73.5318, 51.5014), (56.0252, 71.7366), (41.5493, 92.3655), (70.7299, 92.2041)])
    arcface = arcface @ [1, 1j]
    source, target = ffhq - ffhq.mean(), arcface - arcface.mean()
    scale = (source.conj() * target).sum() / (abs(source) ** 2).sum()
    shift = arcface.mean() - scale * ffhq.mean()
    assert scale.real == pytest.approx(.29209, abs=1e-5) and abs(math.degrees(np.angle(scale))) < .02
    corners = [(v - shift) / scale for v in (0, 112 + 112j)]
    box = np.array([corners[0].real, corners[0].imag, corners[1].real, corners[1].imag])
    assert np.abs(box - metrics.CROP_112).max() < .5
    x = (torch.arange(512.) + .5).expand(1, 3, 512, 512)                        # the coordinate as the picture
    for picture, low, high in ((x, box[0], box[2]), (x.mT, box[1], box[3])):
        crop = metrics.crop_112(picture)[0, 0]
        line = crop[56] if picture is x else crop[:, 56]
        want = low + (np.arange(112) + .5) / 112 * (high - low)
        assert np.abs(line.numpy() - want)[2:-2].max() < .6


def full_size(name, kind):
    """A network of Stable Diffusion 2.1 on the meta device, from the configuration in honestface.py."""
    if not hasattr(hf, name):
        pytest.skip(f"honestface.py has no {name}")
    import diffusers

    with torch.device("meta"):
        return getattr(diffusers, kind)(**getattr(hf, name))


def test_sd21_unet_has_the_published_sizes():
    """865.91 M; input, time embedding, down and middle, the discriminator's frozen half, 351.7 M."""
    unet = full_size("SD21_UNET", "UNet2DConditionModel")
    sizes = {name: sum(p.numel() for p in child.parameters()) for name, child in unet.named_children()}
    assert sum(p.numel() for p in unet.parameters()) == 865_910_724
    assert sum(sizes[n] for n in ("conv_in", "time_embedding", "down_blocks", "mid_block")) == 351_662_080
    heads = [m.heads for n, m in unet.named_modules() if n.endswith("attn2")]
    assert len(heads) == 16 and set(heads) == {5, 10, 20}


@pytest.mark.parametrize("names, modules, size", [(ATTENTION, 128, 3_319_808), (LINEAR, 192, 6_914_048),
                                                  (CONVOLUTIONS, 258, 16_222_848)])
def test_sd21_lora_has_the_published_sizes(names, modules, size):
    """Rank 16: attention 3.32 M, all linear 6.91 M, with convolutions 16.22 M, and nothing else trains."""
    unet = full_size("SD21_UNET", "UNet2DConditionModel")
    parameters = common.add_lora(unet, names, rank=16, alpha=16)
    assert len(parameters) == 2 * modules and sum(p.numel() for p in parameters) == size
    assert sum(p.numel() for p in unet.parameters() if p.requires_grad) == size


def test_sd21_vae_has_the_published_size():
    """83.65 M."""
    vae = full_size("SD21_VAE", "AutoencoderKL")
    assert round(sum(p.numel() for p in vae.parameters()) / 1e6, 2) == 83.65
