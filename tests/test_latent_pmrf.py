"""Latent-PMRF: equations in the paper's order, networks against short rewrites, released weights, the program."""
import json
import math

import pytest
import safetensors.torch
import torch
import torch.nn.functional as F
from torch.autograd import functional as autograd

import common
import latent_pmrf as lp
from program import caller, kill, same, toy_pictures, weights

f64 = torch.float64
still = lambda z, t: torch.zeros_like(z)                       # the zero velocity leaves a source where it is


@pytest.fixture(autouse=True)
def seeded():
    """Every test draws the same numbers, alone or in the suite."""
    torch.manual_seed(0)


def randomised(module):
    """The module with every parameter redrawn, so that zero initialisation hides nothing; in eval mode."""
    for p in module.parameters():
        noise = torch.randn_like(p)
        p.data = noise / p[0].numel() ** .5 if p.dim() > 1 else 1 + .3 * noise
    return module.eval()


class Noting(dict):
    """A state dict that notes the names a rewrite reads: they are the released ones, spelt out there."""

    def __init__(self, module):
        super().__init__(module.state_dict())
        self.read = set()

    def __getitem__(self, name):
        self.read.add(name)
        return super().__getitem__(name)


# ---------------------------------------------------------------- equations
def test_eq1_euler_is_exact_on_constant_fields_and_equals_the_released_reversed_time_loop():
    """N steps of v = c move by c, asked at t = 0, 1/N .. (N-1)/N; the authors run sigma = 1 - t with v' = source - target."""
    z0, c = torch.randn(3, 2, 4, 4, dtype=f64), torch.randn(2, 4, 4, dtype=f64)
    for steps in (1, 4, 25):
        kept, times = z0.clone(), []
        end = lp.euler_sample(lambda z, t: times.append(t) or c.expand_as(z), z0, steps=steps)
        torch.testing.assert_close((end, z0), (kept + c, kept))                           # the source is left alone
        want = (torch.arange(steps, dtype=f64) / steps)[:, None].expand(steps, 3)         # one t per sample
        torch.testing.assert_close(torch.stack(times).double(), want, rtol=1e-6, atol=0)
    velocity, z = lambda z, t: torch.sin(z) + t.view(-1, 1, 1, 1), z0.clone()
    for k in range(25, 0, -1):
        z = z - (-velocity(z, torch.full((3,), 1 - k / 25, dtype=f64))) / 25
    torch.testing.assert_close(lp.euler_sample(velocity, z0), z, rtol=1e-6, atol=1e-6)


def test_eq1_eq2_the_line_from_z0_to_z1_has_the_velocity_of_their_difference():
    """Figure 2: z_t = (1 - t) z0 + t z1 with one t per sample; d z_t / dt = z1 - z0 carries z0 to z1."""
    (z0, z1), t = torch.randn(2, 3, 4, 5, 6, dtype=f64), torch.tensor([0., .25, 1.], dtype=f64)
    z, velocity = autograd.jvp(lambda t: lp.interpolate(z0, z1, t), t, torch.ones_like(t))
    torch.testing.assert_close(z, torch.stack([z0[0], .75 * z0[1] + .25 * z1[1], z1[2]]))
    torch.testing.assert_close(velocity, z1 - z0)
    torch.testing.assert_close(lp.euler_sample(lambda z, t: velocity, z0, steps=7), z1)


def test_eq3_cfm_loss_is_zero_at_the_oracle_and_c_squared_beside_it():
    """The loss is a mean over elements: an offset c everywhere costs c^2; v is asked at (z_t, t)."""
    (z0, z1), t = torch.randn(2, 4, 3, 5, 5, dtype=f64), torch.rand(4, dtype=f64)

    def velocity(z, s):
        torch.testing.assert_close((s, z), (t, torch.lerp(z0, z1, t.view(4, 1, 1, 1))))
        return z1 - z0 + c

    for c in (0., 1., -2.5):
        assert lp.cfm_loss(velocity, z0, z1, t).item() == pytest.approx(c ** 2, abs=1e-20)


def test_eq4_the_flow_starts_where_its_option_says():
    """Option 2 encodes the clipped estimate; option 1 takes the network's latents; PMRF stays in pixels of [0, 1]."""
    vae = randomised(lp.SimVAE(latent_channels=3, widths=(8, 12, 16, 20)))
    nets, lq = dict(vae=vae, mmse=lambda y: 3 * y - .5), torch.rand(2, 3, 16, 16) * 2 - 1
    start = lambda **changes: lp.flow_source(nets, lp.Train(**changes), lq, torch.ones_like)
    estimate = (3 * (lq / 2 + .5) - .5).clamp(0, 1)
    with torch.no_grad():
        mean, logvar = vae.encode(estimate * 2 - 1)
        for sample, want in ((False, mean), (True, mean + (logvar / 2).exp())):          # a draw whose noise is 1
            z0, shown = start(source_sample=sample)
            torch.testing.assert_close((z0, shown), (want, estimate * 2 - 1))
        z0, shown = start(space="pixel")
        torch.testing.assert_close((z0, shown), (estimate, estimate * 2 - 1))
        nets["mmse"] = lambda y: F.avg_pool2d(y, 8) + 2                                  # latents may leave [0, 1]
        z0, shown = start(source="latent_mean")
        torch.testing.assert_close(z0, F.avg_pool2d(lq / 2 + .5, 8) + 2)
        assert shown is None                                       # its picture is the decoded latent, made to restore
        found = lp.restore(dict(nets, flow=still), lp.Train(source="latent_mean"), lq, torch.zeros_like, 1)
        torch.testing.assert_close(found["posterior_mean"], vae.decode(z0).clamp(-1, 1))
        torch.testing.assert_close(found["restored_faces"], found["posterior_mean"])


def test_eq4_mean_of_latents_decodes_away_from_the_posterior_mean():
    """Option (1), D(E[E(x)|y]), misses E[x|y] even with a perfect curved autoencoder; option (2) does not."""
    encode, decode, m, s = lambda x: x ** 3, lambda z: z.sign() * z.abs() ** (1 / 3), .8, .5
    x = m + s * torch.tensor([-1., 1.], dtype=f64).repeat(8).view(16, 1, 1, 1)             # samples of x | y
    option1 = decode(lp.euler_sample(still, encode(x).mean(0, keepdim=True))) - x.mean()
    option2 = decode(lp.euler_sample(still, encode(x.mean(0, keepdim=True)))) - x.mean()
    assert option1.item() == pytest.approx((m ** 3 + 3 * m * s ** 2) ** (1 / 3) - m)       # E[x^3]
    assert option2.abs().item() < 1e-12


M0, S0, M1, S1 = -1., .7, 2., .5


def moments(t, covariance):
    """cov(z1 - z0, z_t) and var(z_t) for jointly Gaussian scalars N(M0, S0^2), N(M1, S1^2)."""
    variance = (1 - t) ** 2 * S0 ** 2 + t ** 2 * S1 ** 2 + 2 * t * (1 - t) * covariance
    return t * S1 ** 2 - (1 - t) * S0 ** 2 + (1 - 2 * t) * covariance, variance


def optimal_velocity(z, t, covariance):
    """E[z1 - z0 | z_t]: Gaussian regression of the displacement on z_t."""
    t = t.reshape(-1, 1, 1, 1)
    cross, variance = moments(t, covariance)
    return M1 - M0 + cross / variance * (z - (1 - t) * M0 - t * M1)


@pytest.mark.parametrize("covariance", [0., .2, -.15])
def test_eq1_optimal_velocity_carries_one_gaussian_into_the_other(covariance):
    """It transports N(M0, S0^2) to N(M1, S1^2) for any coupling, with an Euler error of first order."""
    source = M0 + S0 * torch.tensor([-1., 1.], dtype=f64).repeat(16).view(32, 1, 1, 1)    # exact moments
    errors = []
    for steps in (50, 100, 200, 400):
        end = lp.euler_sample(lambda z, t: optimal_velocity(z, t, covariance), source, steps=steps)
        assert end.mean().item() == pytest.approx(M1, abs=1e-6)
        errors.append(abs(end.std(correction=0).item() - S1))
    assert errors[-1] < 3e-3 and all(1.8 < a / b < 2.2 for a, b in zip(errors, errors[1:]))


@pytest.mark.parametrize("t", [.2, .5, .9])
def test_eq5_optimal_velocity_leaves_the_conditional_variance(t):
    """At the optimum the loss is Var(z1 - z0 | z_t); an offset or another slope costs more."""
    a, b = torch.randn(2, 200_000, 1, 1, 1, dtype=f64)
    z0, z1 = M0 + S0 * a, M1 + .2 / S0 * a + (S1 ** 2 - (.2 / S0) ** 2) ** .5 * b          # covariance .2
    times = torch.full((len(z0),), t, dtype=f64)
    field = lambda offset, slope: lambda z, t: optimal_velocity(z, t, .2) + offset + slope * z
    loss = lambda *change: lp.cfm_loss(field(*change), z0, z1, times).item()
    cross, variance = moments(t, .2)
    assert loss(0, 0) == pytest.approx(S0 ** 2 + S1 ** 2 - 2 * .2 - cross ** 2 / variance, rel=.02)
    assert loss(.1, 0) == pytest.approx(loss(0, 0) + .01, rel=.01) and loss(0, .1) > loss(0, 0)


@pytest.mark.parametrize("batch, world", [(1, 1), (5, 2), (3, 4)])
def test_stratified_time_puts_one_sample_in_each_stratum_uniformly(batch, world):
    """Over all ranks each [k/N, (k+1)/N) holds one t; in it t is uniform: mean 1/2, variance 1/12 of its width."""
    for seed in range(20):
        generators = [torch.Generator().manual_seed(10 * seed + rank) for rank in range(world)]
        t = torch.cat([lp.stratified_time(batch, r, world, g) for r, g in enumerate(generators)]).double()
        assert t.min() >= 0 and t.max() < 1
        assert torch.floor(t * batch * world).sort().values.tolist() == list(range(batch * world))
    offset = (lp.stratified_time(4096).double() * 4096) % 1
    assert [offset.mean().item(), offset.var().item()] == pytest.approx([.5, 1 / 12], rel=.06)


def test_eq6_vae_loss_is_l1_perceptual_and_kl_by_their_weights():
    """The KL to N(0, 1) is summed over C, H, W and averaged over the batch, zero at the prior."""
    (a, b), (mean, logvar) = torch.rand(2, 2, 3, 8, 8, dtype=f64), torch.randn(2, 3, 4, 5, 6, dtype=f64)
    normal = torch.distributions.Normal
    kl = torch.distributions.kl_divergence(normal(mean, (logvar / 2).exp()), normal(0., 1.)).sum() / 3
    assert lp.kl_divergence(mean, logvar).item() == pytest.approx(kl.item())
    assert lp.kl_divergence(mean * 0, logvar * 0).item() == 0
    total, parts = lp.vae_loss(a, b, mean, logvar, lambda x, y: (x - y).square().mean(), .7, 1e-6)
    want = [(a - b).abs().mean(), (a - b).square().mean(), kl]
    assert [parts[name].item() for name in ("l1", "perceptual", "kl")] == pytest.approx([w.item() for w in want])
    assert total.item() == pytest.approx((want[0] + .7 * want[1] + 1e-6 * want[2]).item())


def test_vgg_loss_compares_features_before_their_relu():
    """VGG19 by hand: 2, 2, 4, 4, 4 convolutions of 3 x 3, halved between; read after conv1_2, 2_2, 3_4, 4_4, 5_4."""
    loss, (a, b) = lp.VGGLoss(pretrained=False), torch.rand(2, 1, 3, 32, 32) * 2 - 1
    convs = [m for m in loss.features if isinstance(m, torch.nn.Conv2d)]

    def stages(x):
        mean, std, left = *torch.tensor([[.485, .456, .406], [.229, .224, .225]]).view(2, 3, 1, 1), iter(convs)
        x = (x / 2 + .5 - mean) / std
        for k, depth in enumerate((2, 2, 4, 4, 4)):
            x = F.max_pool2d(x.relu(), 2) if k else x
            for j in range(depth):
                conv = next(left)
                x = F.conv2d(x.relu() if j else x, conv.weight, conv.bias, padding=1)
            yield x

    want = sum(w * (x - y).abs().mean() for w, x, y in zip((.1, .1, 1, 1, 1), stages(a), stages(b)))
    a.requires_grad_(True)
    got = loss(a, b)
    got.backward()
    assert want > 0 and got.item() == pytest.approx(want.item(), rel=1e-4) and a.grad.abs().sum() > 0
    assert loss(a, a).item() == 0 and not any(p.requires_grad for p in loss.parameters())


# ---------------------------------------------------------------- Sim-VAE
def slow_conv(w, name, x, stride=1):
    return F.conv2d(x, w[f"{name}.weight"], w[f"{name}.bias"], stride, padding=1)


def slow_block(w, name, x):
    """x + conv2(SiLU(conv1(LN(x)))), the layer norm over the channels of each pixel."""
    h = F.layer_norm(x.movedim(1, -1), x.shape[1:2], w[f"{name}.norm.weight"], w[f"{name}.norm.bias"], 1e-6)
    return x + slow_conv(w, f"{name}.conv2", F.silu(slow_conv(w, f"{name}.conv1", h.movedim(-1, 1))))


def slow_encode(w, x):
    h = slow_conv(w, "encoder.conv_in", x)
    for i in range(4):
        for j in range(2):
            h = slow_block(w, f"encoder.down_blocks.{i}.resnets.{j}", h)
        h = slow_conv(w, f"encoder.down_blocks.{i}.downsampler.conv", h, stride=2) if i < 3 else h
    for j in range(3):
        h = slow_block(w, f"encoder.mid_block.resnets.{j}", h)
    mean, logvar = slow_conv(w, "encoder.conv_out", h).chunk(2, 1)
    return mean, logvar.clamp(-30, 20)


def slow_decode(w, z):
    h = slow_conv(w, "decoder.conv_in", z)
    for name in ["mid_block"] + [f"up_blocks.{i}" for i in range(4)]:
        for j in range(3):
            h = slow_block(w, f"decoder.{name}.resnets.{j}", h)
        if f"decoder.{name}.upsampler.conv.weight" in w:
            h = h.repeat_interleave(2, 2).repeat_interleave(2, 3)
            h = slow_conv(w, f"decoder.{name}.upsampler.conv", h)
    return slow_conv(w, "decoder.conv_out", h)


@pytest.mark.parametrize("c, encoder, decoder", [(16, 39_982_880, 50_826_499), (24, 40_056_624, 50_863_363),
                                                 (32, 40_130_368, 50_900_227), (48, 40_277_856, 50_973_955)])
def test_sim_vae_parameter_counts(c, encoder, decoder):
    """The paper-size network has the released counts (c32: 91,030,595)."""
    with torch.device("meta"):
        state = lp.SimVAE(latent_channels=c).state_dict()
    count = lambda prefix: sum(v.numel() for k, v in state.items() if k.startswith(prefix))
    assert (count("encoder."), count("decoder."), count("")) == (encoder, decoder, encoder + decoder)
    assert state["encoder.down_blocks.2.resnets.0.norm.weight"].shape == (512,)


def test_sim_vae_equals_a_functional_reimplementation():
    """encode and decode equal conv2d / layer_norm calls on the same weights, which have the released names."""
    vae = randomised(lp.SimVAE(latent_channels=3, widths=(8, 12, 16, 20)))
    w, x, z = Noting(vae), torch.rand(2, 3, 24, 40) * 2 - 1, torch.randn(2, 3, 3, 5)
    with torch.no_grad():
        (mean, logvar), picture = vae.encode(x), vae.decode(z)
        assert mean.shape == logvar.shape == z.shape and picture.shape == x.shape
        for got, want in zip((mean, logvar, picture), (*slow_encode(w, x), slow_decode(w, z))):
            torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)
    assert w.read == set(w)


# ---------------------------------------------------------------- SwinIR
def test_swinir_parameter_count_and_released_names():
    """15,792,587 parameters, names of the public checkpoint, masks for the 64 x 64 tokens of 512 px."""
    with torch.device("meta"):
        model = lp.SwinIR()
    assert sum(p.numel() for p in model.parameters()) == 15_792_587
    shapes = {k: tuple(v.shape) for k, v in model.state_dict().items()}
    for block, j in [(f"layers.{i}.residual_group.blocks.{j}", j) for i in range(8) for j in range(6)]:
        assert shapes[f"{block}.attn.relative_position_bias_table"] == (225, 6)
        assert shapes[f"{block}.attn.relative_position_index"] == (64, 64)
        assert shapes.get(f"{block}.attn_mask") == ((64, 64, 64) if j % 2 else None)
    assert shapes["patch_embed.norm.weight"] == (180,) and shapes["conv_last.weight"] == (3, 64, 3, 3)
    assert shapes["conv_after_body.weight"] == (180, 180, 3, 3)


@pytest.mark.parametrize("j", [0, 1])
def test_swinir_block_equals_dense_masked_attention(j):
    """A Swin block is full attention restricted to (shifted, non-cyclic) 8 x 8 windows, plus MLP, both pre-norm.
    With a zero last convolution the output is the mean colour in [0, 1]."""
    swinir, picture = lp.SwinIR().eval(), torch.rand(1, 3, 128, 192)                  # 16 x 24 tokens
    seen, block = [], swinir.layers[2].residual_group.blocks[j]
    block.attn.relative_position_bias_table.data.normal_()
    block.register_forward_hook(lambda m, args, out: seen.append((args[0], out)))
    with torch.no_grad():
        swinir.conv_last.weight.zero_(), swinir.conv_last.bias.zero_()
        torch.testing.assert_close(swinir(picture), torch.tensor([.4488, .4371, .4040]).view(3, 1, 1).expand_as(picture))
        x, got = (v.reshape(16 * 24, 180) for v in seen[0])
        w = block.state_dict()
        y, c = torch.arange(16).repeat_interleave(24), torch.arange(24).repeat(16)
        window = lambda v: torch.div(v - 4 * j, 8, rounding_mode="floor")
        together = (window(y)[:, None] == window(y)) & (window(c)[:, None] == window(c))
        dy, dx = y[:, None] - y, c[:, None] - c
        bias = w["attn.relative_position_bias_table"][(15 * (dy + 7) + dx + 7).clamp(0, 224)].permute(2, 0, 1)
        bias = bias.masked_fill(~together, -torch.inf)
        h = F.layer_norm(x, (180,), w["norm1.weight"], w["norm1.bias"])
        q, k, v = F.linear(h, w["attn.qkv.weight"], w["attn.qkv.bias"]).view(-1, 3, 6, 30).permute(1, 2, 0, 3)
        h = ((q @ k.mT * 30 ** -.5 + bias).softmax(-1) @ v).transpose(0, 1).reshape(-1, 180)
        x = x + F.linear(h, w["attn.proj.weight"], w["attn.proj.bias"])
        h = F.linear(F.layer_norm(x, (180,), w["norm2.weight"], w["norm2.bias"]), w["mlp.fc1.weight"], w["mlp.fc1.bias"])
        x = x + F.linear(F.gelu(h), w["mlp.fc2.weight"], w["mlp.fc2.bias"])
    torch.testing.assert_close(got, x, rtol=1e-4, atol=1e-4)


# ---------------------------------------------------------------- HDiT
def loop_attention(q, k, v, height, width, kernel, scale):
    """One query at a time: a kernel x kernel window that shifts at the borders and never shrinks."""
    out = []
    for y, x in [(y, x) for y in range(height) for x in range(width)]:
        top = min(max(y - kernel // 2, 0), height - kernel)
        left = min(max(x - kernel // 2, 0), width - kernel)
        keys = [r * width + c for r in range(top, top + kernel) for c in range(left, left + kernel)]
        logits = scale * (q[:, :, y * width + x, None] * k[:, :, keys]).sum(-1)         # (B, heads, keys)
        out.append((logits.softmax(-1)[..., None] * v[:, :, keys]).sum(2))
    return torch.stack(out, 2)


@pytest.mark.parametrize("height, width, kernel, scale", [(9, 13, 7, 1.), (12, 5, 5, .3), (4, 6, 1, None), (7, 7, 7, None)])
def test_neighborhood_attention_equals_a_loop(height, width, kernel, scale):
    """Values and gradients equal the loop's."""
    qkv = [torch.randn(2, 3, height * width, 4, dtype=f64, requires_grad=True) for _ in range(3)]
    got = lp.neighborhood_attention(*qkv, height, width, kernel_size=kernel, scale=scale)
    want = loop_attention(*qkv, height, width, kernel, 4 ** -.5 if scale is None else scale)
    torch.testing.assert_close(got, want)
    weight = torch.randn_like(want)
    for a, b in zip(*(torch.autograd.grad((out * weight).sum(), qkv) for out in (got, want))):
        torch.testing.assert_close(a, b)


def test_hdit_and_the_paper_preset_have_the_released_and_printed_sizes():
    """160,460,210 parameters with --space pixel (PMRF's network); Table 4 prints 106.8 M frozen."""
    count = lambda module: sum(p.numel() for p in module.parameters())
    latent, pixel = lp.Train(), lp.Train(space="pixel")
    with torch.device("meta"):
        model, flow = lp.HDiT(**lp.HDIT_PMRF), lp.build(pixel, "flow")
        assert count(lp.build(latent, "flow")) == 147_834_290                        # with depth-wise convolutions
        assert count(lp.build(latent, "vae")) + count(lp.build(latent, "mmse")) == 91_030_595 + 15_792_587
    assert (latent.flow_steps, 8 * latent.batch_size, latent.vae_steps) == (400_000, 64, 150_000)
    assert count(model) == count(flow) == 160_460_210


SMALL = dict(lp.HDIT_PMRF, widths=(64, 128, 256), depths=(2, 2, 2), mapping_width=192)


def slow_hdit(w, x, t):
    """k-diffusion's hourglass transformer from its state dict: 7 x 7 neighbourhoods, global attention in the middle.
    Depth-wise convolutions, where the weights hold them, follow the projections to q, k, v and to value and gate."""
    rms = lambda v: v * (v.square().mean(-1, keepdim=True) + 1e-6).rsqrt()
    fourier = lambda name, v: (lambda f: torch.cat([f.cos(), f.sin()], -1))(2 * math.pi * v @ w[f"{name}.weight"].T)

    def neighbours(name, v):                                             # (B, H, W, C): nine shifted copies, summed
        if f"{name}.dwconv.weight" not in w:
            return v
        (h, wd), padded, kernel = v.shape[1:3], F.pad(v, (0, 0, 1, 1, 1, 1)), w[f"{name}.dwconv.weight"][:, 0]
        shifted = [padded[:, i:i + h, j:j + wd] * kernel[:, i, j] for i in range(3) for j in range(3)]
        return sum(shifted) + w[f"{name}.dwconv.bias"]

    def geglu(name, v):
        value, gate = neighbours(name, v @ w[f"{name}.up_proj.weight"].T).chunk(2, -1)
        return (value * F.gelu(gate)) @ w[f"{name}.down_proj.weight"].T

    merge = lambda v, p: v.unflatten(2, (-1, p)).unflatten(1, (-1, p)).permute(0, 1, 3, 2, 4, 5).flatten(3)
    split = lambda v, p: v.unflatten(3, (p, p, -1)).permute(0, 1, 3, 2, 4, 5).flatten(3, 4).flatten(1, 2)
    centres = lambda n, half: half * ((2 * torch.arange(n, dtype=x.dtype) + 1) / n - 1)

    def block(name, v, pos, neighbourhood):
        b, h, wd, c = v.shape
        norm = lambda part: rms(v) * (1 + cond @ w[f"{name}.{part}.norm.linear.weight"].T)[:, None, None]
        heads = len(w[f"{name}.self_attn.scale"])
        qkv = neighbours(f"{name}.self_attn", norm("self_attn") @ w[f"{name}.self_attn.qkv_proj.weight"].T)
        q, k, value = qkv.view(b, h * wd, 3, heads, c // heads).permute(2, 0, 3, 1, 4)
        freqs = w[f"{name}.self_attn.pos_emb.freqs"][:, None]                                   # (heads, 1, d / 8)
        theta = torch.cat([pos[:, :1] * freqs, pos[:, 1:] * freqs], -1)
        d = theta.shape[-1]

        def rotate(u):
            scale = w[f"{name}.self_attn.scale"].view(-1, 1, 1).sqrt()
            u = u * (u.square().sum(-1, keepdim=True) + 1e-6).rsqrt() * scale
            a, o = u[..., :d], u[..., d:2 * d]
            return torch.cat([a * theta.cos() - o * theta.sin(), o * theta.cos() + a * theta.sin(), u[..., 2 * d:]], -1)

        q, k = rotate(q), rotate(k)
        o = loop_attention(q, k, value, h, wd, 7, 1.) if neighbourhood else (q @ k.mT).softmax(-1) @ value
        v = v + o.transpose(1, 2).reshape(b, h, wd, c) @ w[f"{name}.self_attn.out_proj.weight"].T
        return v + geglu(f"{name}.ff", norm("ff"))

    level = lambda name, v, *where: block(f"{name}.1", block(f"{name}.0", v, *where), *where)
    c = fourier("time_emb", t[:, None]) @ w["time_in_proj.weight"].T
    c = c + fourier("aug_emb", x.new_zeros(len(x), w["aug_emb.weight"].shape[1])) @ w["aug_in_proj.weight"].T
    c = rms(c) * w["mapping.in_norm.scale"]
    for i in range(2):
        c = c + geglu(f"mapping.blocks.{i}", rms(c) * w[f"mapping.blocks.{i}.norm.scale"])
    cond = rms(c) * w["mapping.out_norm.scale"]
    h, wd = x.shape[2] // 4, x.shape[3] // 4
    y, z = centres(h, min(1, h / wd)), centres(wd, min(1, wd / h))
    pos = torch.stack(torch.meshgrid(y, z, indexing="ij"), -1)
    v, skips = merge(x.movedim(1, -1), 4) @ w["patch_in.proj.weight"].T, []
    for i in range(2):
        v = level(f"down_levels.{i}", v, pos.view(-1, 2), True)
        skips.append((v, pos))
        v = merge(v, 2) @ w[f"merges.{i}.proj.weight"].T
        pos = pos.view(pos.shape[0] // 2, 2, pos.shape[1] // 2, 2, 2).mean((1, 3))
    v = level("mid_level", v, pos.reshape(-1, 2), False)
    for i in (1, 0):
        skip, pos = skips[i]
        v = torch.lerp(skip, split(v @ w[f"splits.{i}.proj.weight"].T, 2), w[f"splits.{i}.fac"])
        v = level(f"up_levels.{i}", v, pos.view(-1, 2), True)
    return split(rms(v) * w["out_norm.scale"] @ w["patch_out.proj.weight"].T, 4).movedim(-1, 1)


@pytest.mark.parametrize("depthwise, width", [(False, 64), (True, 96)])
def test_hdit_equals_a_functional_reimplementation(depthwise, width):
    """With all parameters random, velocity(x, t) equals matmuls written from k-diffusion's equations, under its names."""
    model = lp.HDiT(**dict(SMALL, depthwise=depthwise))
    x, t = torch.randn(2, 3, 64, width), torch.tensor([.1, .8])
    assert torch.equal(model(x, t), torch.zeros_like(x))                              # patch_out starts at zero
    w = Noting(randomised(model))
    with torch.no_grad():
        torch.testing.assert_close(model(x, t), slow_hdit(w, x, t), rtol=2e-4, atol=2e-4)
        assert w.read == set(w)
        torch.testing.assert_close(model(x[1:], t[1:]), model(x, t)[1:], rtol=1e-4, atol=1e-4)      # batch of one
        assert (model(x, 1 - t) - model(x, t)).abs().max() > 1e-3


# ---------------------------------------------------------------- released weights
def test_a_sim_vae_folder_and_a_swinir_of_another_size_and_prefix_load(tmp_path):
    """Sizes are read off the weights; some files store the gains of norms as (1, C, 1, 1)."""
    vae = lp.SimVAE(4, (8, 16))
    state = {n: t.view(1, -1, 1, 1).clone() if ".norm." in n else t for n, t in vae.state_dict().items()}
    safetensors.torch.save_file(state, tmp_path / "diffusion_pytorch_model.safetensors")
    loaded, x = lp.load_sim_vae(str(tmp_path)), torch.randn(1, 3, 16, 16)
    assert torch.equal(loaded.encode(x)[0], vae.encode(x)[0])
    theirs, ours = (lp.SwinIR(tokens=n, dim=8, depths=(2,), heads=2, features=8, unshuffle=2).eval() for n in (16, 32))
    torch.save({"state_dict": {f"model.{n}": t for n, t in theirs.state_dict().items()}}, tmp_path / "swinir.pth")
    lp.load_swinir(ours, str(tmp_path / "swinir.pth"))
    for x in (torch.rand(1, 3, 48, 64), torch.rand(1, 3, 16, 64)):     # the second grid has as many windows as the mask
        with torch.no_grad():
            torch.testing.assert_close(ours(x), theirs(x))


def test_pmrf_release_loads_by_prefix_with_its_averaged_weights(tmp_path, monkeypatch):
    """`model.*` and `mmse_model.*`, with metric sub-modules beside them; averages in k-diffusion's order of parameters."""
    small = dict(lp.HDIT_PMRF, widths=(16, 16), depths=(1, 1), head_dim=8, mapping_width=16)
    monkeypatch.setattr(lp, "HDIT_PMRF", small)
    swinir = lp.SwinIR
    monkeypatch.setattr(lp, "SwinIR", lambda: swinir(dim=8, depths=(2,), heads=2, features=8))
    flow, mmse = lp.HDiT(**small), lp.SwinIR()
    state = {f"model.{n}": t for n, t in flow.state_dict().items()}
    state |= {f"mmse_model.{n}": t for n, t in mmse.state_dict().items()}
    safetensors.torch.save_file(state | {"fid.mean": torch.zeros(3)}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps({"degradation": "difface"}))
    nets, config = lp.load_networks(lp.Sample(input="x", checkpoint=str(tmp_path)))
    assert torch.equal(nets["flow"].patch_in.proj.weight, flow.patch_in.proj.weight)
    assert config.space == "pixel" and config.image_size == 512
    shadows = [torch.full_like(p, i) for i, p in enumerate(flow.parameters())]
    torch.save({"state_dict": state, "ema": {"shadow_params": shadows, "decay": 0.9999}}, tmp_path / "last.ckpt")
    averaged = lp.load_pmrf(tmp_path / "last.ckpt")["flow"]
    assert all((p == i).all() for i, p in enumerate(averaged.parameters()))


# ---------------------------------------------------------------- the program
HDIT = dict(widths=(16, 16), depths=(1, 1), head_dim=8, mapping_width=16, kernel=5)
SWINIR = dict(dim=8, depths=(2,), heads=2, features=8, unshuffle=2, drop_path=0.1, residual=True)
TINY = dict(vae=dict(widths=(8, 8)), mmse=SWINIR, flow=dict(HDIT, patch=1), pixel_flow=dict(HDIT, patch=2))
FLAGS = """--image_size 32 --latent_channels 4 --batch_size 4 --vae_steps 4 --mmse_steps 4 --flow_steps 4
           --log_steps 2 --checkpointing_steps 2 --validation_faces 8 --num_inference_steps 2 --device cpu
           --perceptual reader""".split()
STAGES, call = ("vae", "mmse", "flow"), caller(lp)[0]


@pytest.fixture(scope="module")
def flags(toy_folder):
    """A command line; the program has networks of a few channels in every preset."""
    with pytest.MonkeyPatch.context() as patch:
        for size in lp.SIZES:
            patch.setitem(lp.SIZES, size, TINY)
        yield ["train", *FLAGS, "--mmse", "", "--data", toy_folder / "train", "--validation_data", toy_folder / "val", "-o"]


@pytest.fixture(scope="module")
def trained(tmp_path_factory, flags):
    """One run of all stages, and a folder of toy pictures."""
    folder = tmp_path_factory.mktemp("run")
    call(*flags, folder / "out")
    toy_pictures(folder / "faces", 12)
    return folder


def test_training_leaves_weights_numbers_and_pictures(trained):
    out = trained / "out"
    wanted = {f"{stage}.safetensors" for stage in STAGES} | {f"samples_{stage}.png" for stage in STAGES}
    assert wanted | {"config.json", "metrics.json", "log.jsonl", "samples.png"} == {p.name for p in out.iterdir()}
    numbers = json.loads((out / "metrics.json").read_text())
    assert set(numbers["rows"]) == {"lq", "posterior_mean", "restored_faces", "reconstruction"} and numbers["faces"] == 8
    assert all(name.endswith("_toy") or name in ("psnr", "ssim") for row in numbers["rows"].values() for name in row)
    assert numbers["latent_peak"] > 1 and {"bound_psnr", "parameters", "seconds", "protocol", "torch"} <= set(numbers)
    rows = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    assert [(r["stage"], r["step"]) for r in rows[1:]] == [(s, k) for s in STAGES for k in (2, 4)]


def test_stage_by_stage_equals_all_at_once(trained, flags, tmp_path):
    """A job started again trains no finished stage a second time; one trained anew drops what stood on it."""
    for stage, *more in (*zip(STAGES), ("flow", "--seed", "5", "--resume_from_checkpoint", "latest")):
        call(*flags, tmp_path, "--stage", stage, *more)
    assert same(weights(trained / "out"), weights(tmp_path)) and (tmp_path / "metrics.json").exists()
    (tmp_path / "metrics.json").unlink()                             # written again only when all stages are there
    call(*flags, tmp_path, "--stage", "vae", "--seed", "5", "--overwrite")
    assert {n.split(".")[0] for n in weights(tmp_path)} == {"vae", "mmse"} and not (tmp_path / "metrics.json").exists()


def test_a_killed_run_goes_on_to_the_same_weights(trained, flags, tmp_path):
    """SIGKILL amid the flow stage, then --resume_from_checkpoint latest: bit by bit the uninterrupted run."""
    kill("latent_pmrf", TINY, "flow", 3, *flags[1:], tmp_path)
    assert torch.load(tmp_path / "state.pt", weights_only=True)["step"] == 2
    call(*flags, tmp_path, "--resume_from_checkpoint", "latest")
    assert same(weights(trained / "out"), weights(tmp_path))


def test_a_given_vae_and_swinir_are_used_and_kept(trained, flags, tmp_path, monkeypatch):
    """Released files or a folder of ours: only the flow is trained, and the given weights end up beside it."""
    read = lambda part: safetensors.torch.load_file(trained / "out" / f"{part}.safetensors")
    (tmp_path / "vae").mkdir()
    safetensors.torch.save_file(read("vae"), tmp_path / "vae" / "diffusion_pytorch_model.safetensors")
    torch.save({"params_ema": {f"module.{n}": t for n, t in read("mmse").items()}}, tmp_path / "swinir.pth")
    call(*flags, tmp_path / "out", "--vae", tmp_path / "vae", "--mmse", tmp_path / "swinir.pth")
    call(*flags, tmp_path / "ours", "--vae", trained / "out", "--mmse", trained / "out", "--stage", "flow")
    assert same(weights(trained / "out"), weights(tmp_path / "out"))
    assert same(weights(trained / "out"), weights(tmp_path / "ours"))
    other = {n: t + 0.01 for n, t in read("vae").items()}              # a finished flow stands on another VAE: trained again
    safetensors.torch.save_file(other, tmp_path / "vae" / "diffusion_pytorch_model.safetensors")
    call(*flags, tmp_path / "out", "--vae", tmp_path / "vae", "--resume_from_checkpoint", "latest")
    now, before = weights(tmp_path / "out"), weights(trained / "out")
    assert not torch.equal(now["flow.patch_in.proj.weight"], before["flow.patch_in.proj.weight"])
    monkeypatch.setitem(lp.SIZES, "paper", dict(TINY, vae=dict(widths=(8, 12))))
    for wrong in (dict(vae_style="group_norm"), dict(latent_channels=8), dict(size="paper")):
        with pytest.raises(common.UserError, match="--vae .*--(vae_style|latent_channels|size)"):
            lp.load_part(lp.Train(**(dict(size="toy", latent_channels=4) | wrong)), "vae", str(tmp_path / "vae"))
    with pytest.raises(common.UserError, match="mmse.safetensors: no such file"):
        lp.load_part(lp.Train(), "mmse", str(tmp_path / "vae"))


def restored(folder, name="07"):
    return common.read_image(folder / "restored_faces" / f"{name}.png")


def test_sampling_depends_on_the_seed_and_on_nothing_else(trained, tmp_path):
    """Batch size, order and neighbours in the folder do not matter; the seed does."""
    run = lambda name, *more, given=trained / "faces": call("sample", "-i", given, "-o", tmp_path / name, "--device", "cpu",
                                                            "--checkpoint", trained / "out", *more)
    run("a"), run("b", "--batch_size", "5"), run("c", "--seed", "1"), run("d", given=trained / "faces" / "07.png")
    a, b, c, d = (restored(tmp_path / name) for name in "abcd")
    assert max((a - b).abs().max(), (a - d).abs().max()) <= 1 / 127.5 + 1e-6 and not torch.equal(a, c)
    assert (tmp_path / "a" / "posterior_mean" / "07.png").exists() and (tmp_path / "a" / "cmp" / "07.png").exists()


@pytest.mark.parametrize("more", ["--space pixel", "--source latent_mean", "--vae_style sd",
                                  "--vae_style pixel_shuffle --no-source_sample"])
def test_every_switch_of_the_tables_trains_and_samples(trained, flags, tmp_path, more):
    call(*flags, tmp_path / "out", *more.split(), "--max_train_steps", "1", "--optimizer", "adamw")
    call("sample", "-i", trained / "faces" / "03.png", "-o", tmp_path, "--checkpoint", tmp_path / "out", "--device", "cpu")
    assert restored(tmp_path, "03").std() > 0


def test_one_step_in_the_papers_layout(flags, tmp_path, monkeypatch):
    """Preset paper: bf16, AdamW (0.9, 0.95), no decay for the flow [sec. 6.1], the VAE clipped at 1, accumulation:
    the times of all micro-batches of a step together fall one into each stratum."""
    seen, cfm_loss = [], lp.cfm_loss
    monkeypatch.setattr(lp, "cfm_loss", lambda v, z0, z1, t: seen.append(t) or cfm_loss(v, z0, z1, t))
    norms, made, clip, make = [], [], torch.nn.utils.clip_grad_norm_, lp.make_optimizer
    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", lambda p, norm: norms.append(norm) or clip(p, norm))
    monkeypatch.setattr(lp, "make_optimizer", lambda *a, **k: made.append(make(*a, **k)) or made[-1])
    call("train", "--preset", "paper", *"""--image_size 32 --batch_size 2 --max_train_steps 1 --num_workers 0
         --perceptual reader --device cpu --mixed_precision bf16 --max_grad_norm 5 --gradient_accumulation_steps 2
         --gradient_checkpointing --validation_faces 4""".split(), *flags[len(FLAGS) + 1:-1], "-o", tmp_path)
    assert norms == [1.0, 5.0, 5.0] and all(t.isfinite().all() for t in weights(tmp_path).values())
    assert [type(optimizer) for optimizer in made] == [torch.optim.AdamW] * 3
    assert [(o.param_groups[0]["betas"], o.param_groups[0]["weight_decay"]) for o in made] == \
        [((0.9, 0.99), 0.01), ((0.9, 0.95), 0.01), ((0.9, 0.95), 0.0)]
    assert torch.floor(torch.cat(seen) * 4).sort().values.tolist() == [0, 1, 2, 3] and len(seen) == 2
