"""Latent-PMRF's mathematics and modules: closed forms, short loops, parameter names."""
import dataclasses
import math

import pytest
import torch
import torch.nn.functional as F
from torch.autograd import functional as autograd

import latent_pmrf as lp

f64 = torch.float64
still = lambda z, t: torch.zeros_like(z)                       # the zero velocity leaves a source where it is


@pytest.fixture(autouse=True)
def seeded():
    """Every test draws the same numbers, alone or in the suite."""
    torch.manual_seed(0)


def randomised(module):
    """The module with every parameter redrawn, so that zero initialisation hides nothing."""
    for p in module.parameters():
        noise = torch.randn_like(p)
        p.data = noise / p[0].numel() ** .5 if p.dim() > 1 else 1 + .3 * noise
    return module.eval()


def test_eq1_eq2_the_line_from_z0_to_z1_has_the_velocity_of_their_difference():
    """Figure 2: z_t = (1 - t) z0 + t z1 with one t per sample; d z_t / dt = z1 - z0 carries z0 to z1."""
    (z0, z1), t = torch.randn(2, 3, 4, 5, 6, dtype=f64), torch.tensor([0., .25, 1.], dtype=f64)
    z, velocity = autograd.jvp(lambda t: lp.interpolate(z0, z1, t), t, torch.ones_like(t))
    torch.testing.assert_close(z, torch.stack([z0[0], .75 * z0[1] + .25 * z1[1], z1[2]]))
    torch.testing.assert_close(velocity, z1 - z0)
    torch.testing.assert_close(lp.euler_sample(lambda z, t: velocity, z0, steps=7), z1)


@pytest.mark.parametrize("c", [0., 1., -2.5])
def test_eq3_cfm_loss_is_zero_at_the_oracle_and_c_squared_beside_it(c):
    """The loss is a mean over elements: an offset c everywhere costs c^2; v is asked at (z_t, t)."""
    (z0, z1), t = torch.randn(2, 4, 3, 5, 5, dtype=f64), torch.rand(4, dtype=f64)

    def velocity(z, s):
        torch.testing.assert_close(s.reshape(-1), t)
        torch.testing.assert_close(z, torch.lerp(z0, z1, t.view(4, 1, 1, 1)))
        return z1 - z0 + c

    loss = lp.cfm_loss(velocity, z0, z1, t)
    assert loss.shape == () and loss.item() == pytest.approx(c ** 2, abs=1e-20)


def test_eq5_best_constant_velocity_is_the_mean_displacement():
    """Over constant fields the loss is least at mean(z1 - z0), where it is the variance."""
    z0, z1 = torch.randn(2, 64, 2, 3, 3, dtype=f64)
    t, c = torch.rand(64, dtype=f64), torch.zeros((), dtype=f64, requires_grad=True)
    lp.cfm_loss(lambda z, t: c.expand_as(z), z0, z1, t).backward()
    best = c.detach() - c.grad / 2                                   # one Newton step: the curvature is 2
    assert best.item() == pytest.approx((z1 - z0).mean().item())
    loss = lp.cfm_loss(lambda z, t: best.expand_as(z), z0, z1, t)
    assert loss.item() == pytest.approx((z1 - z0).var(correction=0).item())


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


@pytest.mark.parametrize("steps", [1, 4, 25])
def test_eq1_euler_is_exact_on_constant_fields_and_never_asks_at_the_end(steps):
    """N steps of v = c move by c; the field is asked at t = 0, 1/N .. (N-1)/N; the source is left alone."""
    z0, c, times = torch.randn(3, 2, 4, 4, dtype=f64), torch.randn(2, 4, 4, dtype=f64), []
    kept = z0.clone()
    end = lp.euler_sample(lambda z, t: times.append(t) or c.expand_as(z), z0, steps=steps)
    torch.testing.assert_close((end, z0), (kept + c, kept))
    want = (torch.arange(steps, dtype=f64) / steps)[:, None].expand(steps, 3)       # one t per sample
    torch.testing.assert_close(torch.stack(times).double(), want, rtol=1e-6, atol=0)


def test_eq1_euler_is_first_order():
    """On dx/dt = x from 1, N steps give (1 + 1/N)^N, whose distance to e halves with the step."""
    field, one = lambda z, t: z, torch.ones(1, 1, 1, 1, dtype=f64)
    ends = [lp.euler_sample(field, one, steps=n).item() for n in (25, 50, 100, 200)]
    assert ends[0] == pytest.approx((1 + 1 / 25) ** 25)
    assert all(1.9 < (math.e - a) / (math.e - b) < 2.1 for a, b in zip(ends, ends[1:]))


@pytest.mark.parametrize("batch, world", [(1, 1), (8, 1), (5, 2), (3, 4)])
def test_stratified_time_puts_one_sample_in_each_stratum(batch, world):
    """Over the global batch of all ranks each [k/N, (k+1)/N) holds exactly one t, all in [0, 1)."""
    for seed in range(20):
        generators = [torch.Generator().manual_seed(10 * seed + rank) for rank in range(world)]
        t = torch.cat([lp.stratified_time(batch, r, world, g) for r, g in enumerate(generators)]).double()
        assert t.min() >= 0 and t.max() < 1
        assert torch.floor(t * batch * world).sort().values.tolist() == list(range(batch * world))


def test_strata_span_the_pieces_of_a_step(monkeypatch, tmp_path):
    """With gradient accumulation the times of all pieces together fall one into each stratum."""
    cfg = lp.Train(output=str(tmp_path), device="cpu", image_size=32, batch_size=3, gradient_accumulation_steps=4,
                   flow_steps=2, flow_widths=(32,), flow_depths=(1,), latent_channels=4, vae_widths=(8, 8))
    seen = []
    monkeypatch.setattr(lp, "flow_source", lambda nets, cfg, lq, noise: (torch.zeros(len(lq), 4, 16, 16), None))
    monkeypatch.setattr(lp, "latent_source", lambda vae, hq, sample, noise: torch.zeros(len(hq), 4, 16, 16))
    monkeypatch.setattr(lp, "cfm_loss", lambda v, z0, z1, t: seen.append(t) or v(z0, t).square().mean())
    lp.train_flow(cfg, lp.Run(cfg), lp.Faces("", 32), {"flow": lp.build(cfg, "flow")})
    for step in (seen[:4], seen[4:]):
        assert torch.floor(torch.cat(step) * 12).sort().values.tolist() == list(range(12))


def test_time_features_are_exact_under_autocast():
    features, t = lp.FourierFeatures(1, 16), torch.rand(4, 1)
    angle = 2 * math.pi * t * features.weight.T
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(features(t), torch.cat([angle.cos(), angle.sin()], 1))


def test_stratified_time_is_uniform_and_repeats_with_its_generator():
    """Within a stratum t is uniform (mean 1/2, variance 1/12 of the width); the generator decides it."""
    draw = lambda seed: lp.stratified_time(4096, generator=torch.Generator().manual_seed(seed)).double()
    offset = (draw(0) * 4096) % 1
    assert [offset.mean().item(), offset.var().item()] == pytest.approx([.5, 1 / 12], rel=.06)
    assert torch.equal(draw(3), draw(3)) and not torch.equal(draw(3), draw(4))


def test_eq6_kl_divergence_sums_over_the_latent_and_averages_over_the_batch():
    """Equals torch.distributions' KL to N(0, 1) summed over C, H, W; zero at the prior."""
    mean, logvar = torch.randn(2, 3, 4, 5, 6, dtype=f64)
    normal = torch.distributions.Normal
    want = torch.distributions.kl_divergence(normal(mean, (logvar / 2).exp()), normal(0., 1.)).sum() / 3
    assert lp.kl_divergence(mean, logvar).item() == pytest.approx(want.item())
    assert lp.kl_divergence(mean * 0, logvar * 0).item() == 0


def test_eq6_vae_loss_is_l1_perceptual_and_kl_by_their_weights():
    a, b, mean, logvar = torch.rand(4, 2, 3, 8, 8, dtype=f64)
    total, parts = lp.vae_loss(a, b, mean, logvar, lambda x, y: (x - y).square().mean(), .7, 1e-6)
    want = [(a - b).abs().mean(), (a - b).square().mean(), lp.kl_divergence(mean, logvar)]
    assert [parts[name].item() for name in ("l1", "perceptual", "kl")] == pytest.approx([w.item() for w in want])
    assert total.item() == pytest.approx((want[0] + .7 * want[1] + 1e-6 * want[2]).item())


def test_the_vae_sees_another_crop_of_every_image():
    """Equal images, whose pixels all differ, show the places of the crops."""
    x = torch.arange(32. * 32).view(1, 1, 32, 32).expand(8, 3, 32, 32)
    crops = lp.random_crop(x, 16)
    places = [divmod(int(crop[0, 0, 0]), 32) for crop in crops]
    assert len(set(places)) > 4
    assert all(torch.equal(crop, x[0, :, top:top + 16, left:left + 16]) for crop, (top, left) in zip(crops, places))


def test_vgg_loss_compares_features_before_their_relu():
    """VGG19 by hand: 2, 2, 4, 4, 4 convolutions of 3 x 3, halved between; read after conv1_2, 2_2, 3_4, 4_4, 5_4."""
    loss, (a, b) = lp.VGGLoss(pretrained=False), torch.rand(2, 1, 3, 32, 32) * 2 - 1
    convs = [m for m in loss.features if isinstance(m, torch.nn.Conv2d)]

    def stages(x):
        x, left = (x / 2 + .5 - torch.tensor([.485, .456, .406]).view(3, 1, 1)), iter(convs)
        x = x / torch.tensor([.229, .224, .225]).view(3, 1, 1)
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


def test_eq4_the_flow_starts_where_its_option_says():
    """Option 2 encodes the clipped estimate; option 1 takes the network's latents; PMRF stays in pixels of [0, 1]."""
    vae = randomised(lp.SimVAE(latent_channels=3, widths=(8, 12, 16, 20)))
    nets, lq = dict(vae=vae, mmse=lambda y: 3 * y - .5), torch.rand(2, 3, 16, 16) * 2 - 1
    start = lambda **changes: lp.flow_source(nets, dataclasses.replace(lp.Train(), **changes), lq, torch.ones_like)
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
        cfg, still = dataclasses.replace(lp.Train(), source="latent_mean"), lambda z, t: torch.zeros_like(z)
        found = lp.restore(dict(nets, flow=still), cfg, lq, torch.zeros_like, 1)
        torch.testing.assert_close(found["posterior_mean"], vae.decode(z0).clamp(-1, 1))
        torch.testing.assert_close(found["restored_faces"], found["posterior_mean"])


def test_posterior_mean_is_what_squared_error_finds():
    """y = x + noise: least squares finds E[x|y] = m + s^2 / (s^2 + n^2) (y - m) and leaves the MMSE."""
    m, s, n = .4, .8, .6
    a, b = torch.randn(2, 200_000, 1, 1, 1, dtype=f64)
    x, y = m + s * a, m + s * a + n * b          # a flow from 0 has x as its target: its loss is the MSE
    mse = lambda p: lp.cfm_loss(lambda z, t: p[0] * y + p[1], 0 * x, x, torch.zeros(len(x), dtype=f64))
    p, gain = torch.zeros(2, dtype=f64), s ** 2 / (s ** 2 + n ** 2)
    p = p - torch.linalg.solve(autograd.hessian(mse, p), autograd.jacobian(mse, p))    # one Newton step
    assert p.tolist() == pytest.approx([gain, m - gain * m], abs=.01)
    assert mse(p).item() == pytest.approx(gain * n ** 2, rel=.02)


def test_eq4_mean_of_latents_decodes_away_from_the_posterior_mean():
    """Option (1), D(E[E(x)|y]), misses E[x|y] even with a perfect curved autoencoder; option (2) does not."""
    encode, decode, m, s = lambda x: x ** 3, lambda z: z.sign() * z.abs() ** (1 / 3), .8, .5
    x = m + s * torch.tensor([-1., 1.], dtype=f64).repeat(8).view(16, 1, 1, 1)             # samples of x | y
    option1 = decode(lp.euler_sample(still, encode(x).mean(0, keepdim=True))) - x.mean()
    option2 = decode(lp.euler_sample(still, encode(x.mean(0, keepdim=True)))) - x.mean()
    assert option1.item() == pytest.approx((m ** 3 + 3 * m * s ** 2) ** (1 / 3) - m)       # E[x^3]
    assert option2.abs().item() < 1e-12


def test_eq4_source_error_of_option_2_equals_vae_reconstruction_error():
    """Option (2), z0 = E(x*): before any flow the picture is D(E(x*)), off by the VAE's own error on x*."""
    vae = randomised(lp.SimVAE(latent_channels=3, widths=(8, 12, 16, 20)))
    x = torch.rand(2, 3, 16, 16) * 2 - 1
    with torch.no_grad():
        start = vae.decode(lp.euler_sample(still, vae.encode(x)[0]))
        reconstruction = slow_decode(vae.state_dict(), slow_encode(vae.state_dict(), x)[0])
    want = (reconstruction - x).square().mean().item()
    assert want > 0 and (start - x).square().mean().item() == pytest.approx(want, rel=1e-4)


def sim_vae_keys():
    """The parameter names in section 6 of the fact sheet, written out."""
    names, sides = [], (("encoder", "down_blocks", 2, "down"), ("decoder", "up_blocks", 3, "up"))
    for side, stages, depth, direction in sides:
        blocks = [f"{stages}.{i}.resnets.{j}" for i in range(4) for j in range(depth)]
        blocks += [f"mid_block.resnets.{j}" for j in range(3)]
        names += [f"{side}.{block}.{part}" for block in blocks for part in ("norm", "conv1", "conv2")]
        names += [f"{side}.{stages}.{i}.{direction}sampler.conv" for i in range(3)]
        names += [f"{side}.conv_in", f"{side}.conv_out"]
    return {f"{name}.{p}" for name in names for p in ("weight", "bias")}


def slow_conv(w, name, x, stride=1):
    """A 3 x 3 convolution with padding 1 on all sides."""
    return F.conv2d(x, w[f"{name}.weight"], w[f"{name}.bias"], stride, padding=1)


def slow_block(w, name, x):
    """x + conv2(SiLU(conv1(LN(x)))), the layer norm over the channels of each pixel."""
    h = F.layer_norm(x.movedim(1, -1), x.shape[1:2], w[f"{name}.norm.weight"], w[f"{name}.norm.bias"], 1e-6)
    return x + slow_conv(w, f"{name}.conv2", F.silu(slow_conv(w, f"{name}.conv1", h.movedim(-1, 1))))


def slow_encode(w, x):
    """Sim-VAE's encoder from its state dict: mean and clamped log-variance."""
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
    """Sim-VAE's decoder from its state dict."""
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
def test_sim_vae_parameter_counts_and_names(c, encoder, decoder):
    """The paper-size network has the released names and counts (c32: 91,030,595) and no buffers."""
    with torch.device("meta"):
        state = lp.SimVAE(latent_channels=c).state_dict()
    assert set(state) == sim_vae_keys()
    count = lambda prefix: sum(v.numel() for k, v in state.items() if k.startswith(prefix))
    assert (count("encoder."), count("decoder."), count("")) == (encoder, decoder, encoder + decoder)
    assert state["encoder.down_blocks.2.resnets.0.norm.weight"].shape == (512,)


@pytest.mark.parametrize("height, width", [(16, 16), (24, 40)])
def test_sim_vae_equals_a_functional_reimplementation(height, width):
    """encode and decode equal conv2d / layer_norm calls on the same state dict; the latent is H/8 by W/8."""
    vae = randomised(lp.SimVAE(latent_channels=3, widths=(8, 12, 16, 20)))
    w, x = vae.state_dict(), torch.rand(2, 3, height, width) * 2 - 1
    z = torch.randn(2, 3, height // 8, width // 8)
    with torch.no_grad():
        (mean, logvar), picture = vae.encode(x), vae.decode(z)
        assert mean.shape == logvar.shape == z.shape and picture.shape == x.shape
        for got, want in zip((mean, logvar, picture), (*slow_encode(w, x), slow_decode(w, z))):
            torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)


def test_sim_vae_clamps_the_log_variance():
    """logvar stays within [-30, 20] whatever the network says; the mean is not touched."""
    vae = lp.SimVAE(latent_channels=3, widths=(8, 8, 8, 8))
    vae.encoder.conv_out.weight.data.zero_()
    vae.encoder.conv_out.bias.data = torch.tensor([100., -100., 5.] * 2)
    mean, logvar = vae.encode(torch.rand(1, 3, 8, 8))
    assert mean.flatten().tolist() == [100, -100, 5] and logvar.flatten().tolist() == [20, -30, 5]


def test_sim_vae_doubles_by_pixel_shuffle():
    """Four times the channels, dealt to 2 x 2 pixels; downsampling is Sim-VAE's strided convolution."""
    up, x = lp.Up(3, 5, "pixel_shuffle"), torch.randn(2, 3, 4, 6)
    got, channels = up(x), up.conv(x)
    assert got.shape == (2, 5, 8, 12)
    for c, i, j in [(c, i, j) for c in range(5) for i in (0, 1) for j in (0, 1)]:
        assert torch.equal(got[:, c, i::2, j::2], channels[:, 4 * c + 2 * i + j])
    sim, shuffled = [lp.SimVAE(4, (8, 12, 16), resizer=resizer) for resizer in ("sim", "pixel_shuffle")]
    shuffled.encoder.load_state_dict(sim.encoder.state_dict())
    x, sizes = torch.randn(1, 3, 16, 24), [{n: p.numel() for n, p in vae.named_parameters()} for vae in (sim, shuffled)]
    assert torch.equal(sim.encode(x)[0], shuffled.encode(x)[0]) and shuffled.decode(sim.encode(x)[0]).shape == x.shape
    assert sizes[1] == {n: 4 * size if "upsampler" in n else size for n, size in sizes[0].items()}


def test_latent_peak_is_the_largest_magnitude_over_the_mean():
    """1 for latents of one magnitude, wherever they point; one place of 25 ten times as large: 10 / (34 / 25)."""
    z = F.normalize(torch.randn(3, 4, 5, 5, dtype=f64), dim=1)
    assert lp.latent_peak(z) == pytest.approx(1)
    z[:, :, 2, 3] *= 10
    assert lp.latent_peak(z) == pytest.approx(10 / (34 / 25))


def test_sim_vae_is_convolutional():
    """Away from borders (reach: 15.5 latent cells in, 19.3 out) a crop by 8 px is a crop by one cell."""
    vae = randomised(lp.SimVAE(latent_channels=2, widths=(6, 6, 8, 8)))
    x, z = torch.rand(1, 3, 312, 280) * 2 - 1, torch.randn(1, 2, 42, 26)
    with torch.no_grad():
        whole, crop = vae.encode(x)[0][..., 1:, 1:], vae.encode(x[..., 8:, 8:])[0]
        torch.testing.assert_close(crop[..., 16:, 16:], whole[..., 16:, 16:], rtol=1e-4, atol=1e-5)
        assert (crop - whole)[..., 0, 0].abs().max() > 1e-3          # the border feels it: this has teeth
        whole, crop = vae.decode(z)[..., 8:, 8:], vae.decode(z[..., 1:, 1:])
        torch.testing.assert_close(crop[..., 160:, 160:], whole[..., 160:, 160:], rtol=1e-4, atol=1e-5)


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


def test_swinir_keeps_the_size_and_adds_the_mean_colour():
    """Output size = input size; with a zero last convolution the output is the mean colour in [0, 1]."""
    model, x = lp.SwinIR().eval(), torch.rand(2, 3, 64, 128)
    with torch.no_grad():
        assert model(x).shape == x.shape
        model.conv_last.weight.zero_(), model.conv_last.bias.zero_()
        torch.testing.assert_close(model(x), torch.tensor([[[.4488]], [[.4371]], [[.4040]]]).expand_as(x))


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


@pytest.mark.parametrize("height, width, kernel, scale", [(8, 8, 7, None), (9, 13, 7, 1.), (5, 11, 3, None),
                                                          (12, 5, 5, .3), (4, 6, 1, None), (7, 7, 7, None)])
def test_neighborhood_attention_equals_a_loop(height, width, kernel, scale):
    """Values and gradients equal the loop's; plain attention when the window covers all."""
    qkv = [torch.randn(2, 3, height * width, 4, dtype=f64, requires_grad=True) for _ in range(3)]
    got = lp.neighborhood_attention(*qkv, height, width, kernel_size=kernel, scale=scale)
    want = loop_attention(*qkv, height, width, kernel, 4 ** -.5 if scale is None else scale)
    torch.testing.assert_close(got, want)
    weight = torch.randn_like(want)
    for a, b in zip(*(torch.autograd.grad((out * weight).sum(), qkv) for out in (got, want))):
        torch.testing.assert_close(a, b)
    if height == width == kernel:
        torch.testing.assert_close(got, F.scaled_dot_product_attention(*qkv))


def test_neighborhood_attention_refuses_a_grid_smaller_than_its_window():
    """Fewer rows or columns than the kernel cannot hold the window: a ValueError, not a smaller window."""
    q = torch.zeros(1, 1, 54, 4)
    for grid in ((6, 9), (9, 6)):
        with pytest.raises(ValueError):
            lp.neighborhood_attention(q, q, q, *grid, 7)


def test_hdit_parameter_count_and_released_names():
    """HDiT(**HDIT_PMRF) has 160,460,210 parameters under k-diffusion's names."""
    with torch.device("meta"):
        model = lp.HDiT(**lp.HDIT_PMRF)
    assert sum(p.numel() for p in model.parameters()) == 160_460_210
    blocks = [f"mid_level.{j}." for j in range(8)]
    blocks += [f"{side}_levels.{i}.{j}." for side in ("down", "up") for i in (0, 1) for j in (0, 1)]
    names = [block + f"self_attn.{p}" for block in blocks for p in ("scale", "pos_emb.freqs")]
    names += [b + f"self_attn.{p}.weight" for b in blocks for p in ("norm.linear", "qkv_proj", "out_proj")]
    names += [block + f"ff.{p}.weight" for block in blocks for p in ("norm.linear", "up_proj", "down_proj")]
    for i in (0, 1):
        names += [f"merges.{i}.proj.weight", f"splits.{i}.proj.weight", f"splits.{i}.fac"]
        names += [f"mapping.blocks.{i}.{p}" for p in ("norm.scale", "up_proj.weight", "down_proj.weight")]
    names += [f"{p}.weight" for p in ("time_emb", "time_in_proj", "aug_emb", "aug_in_proj", "patch_in.proj")]
    names += ["patch_out.proj.weight", "out_norm.scale", "mapping.in_norm.scale", "mapping.out_norm.scale"]
    assert set(model.state_dict()) == set(names)


def test_the_paper_preset_has_the_printed_sizes():
    """--space pixel is PMRF's network; the latent flow adds depth-wise convolutions; Table 4 prints 106.8 M frozen."""
    count = lambda module: sum(p.numel() for p in module.parameters())
    latent = lp.Train(**lp.PAPER)
    pixel = dataclasses.replace(latent, space="pixel")
    with torch.device("meta"):
        flow = lp.build(pixel, "flow")
        assert count(flow) == 160_460_210 and set(flow.state_dict()) == set(lp.HDiT(**lp.HDIT_PMRF).state_dict())
        assert count(lp.build(latent, "flow")) == 147_834_290
        assert count(lp.build(latent, "vae")) + count(lp.build(latent, "mmse")) == 91_030_595 + 15_792_587
    assert (latent.flow_steps, 8 * latent.batch_size, latent.vae_steps) == (400_000, 64, 150_000)


def test_table_3_tries_16_24_and_48_of_32_channels():
    assert [factor * 32 for factor in lp.CHANNELS.values()] == [16, 24, 48] and set(lp.CHANNELS) < set(lp.ABLATIONS)
