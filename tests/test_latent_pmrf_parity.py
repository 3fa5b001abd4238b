"""Networks of Latent-PMRF against independent short re-implementations from their state dicts."""
import math

import pytest
import torch
import torch.nn.functional as F

import latent_pmrf as lp


def randomised(module, seed=0, scale=.3):
    """The module with every parameter redrawn, so that zero initialisation hides nothing; in eval mode."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in module.parameters():
            fan_in = p[0].numel() if p.dim() > 1 else 0
            noise = torch.randn(p.shape, generator=generator)
            p.copy_(noise / fan_in ** .5 if fan_in else 1 + scale * noise)
    return module.eval()


def test_eq1_euler_equals_the_released_reversed_time_loop():
    """The authors' code runs sigma = 1, 24/25, ..., 1/25 with v' = source - target: same path once sigma = 1 - t."""
    z0 = torch.randn(2, 3, 4, 4, dtype=torch.float64)
    velocity = lambda z, t: torch.sin(z) + t.view(-1, 1, 1, 1)
    z = z0.clone()
    for k in range(25, 0, -1):
        z = z - (-velocity(z, torch.full((2,), 1 - k / 25, dtype=torch.float64))) / 25
    torch.testing.assert_close(lp.euler_sample(velocity, z0), z, rtol=1e-6, atol=1e-6)


@pytest.fixture(scope="module")
def swinir():
    """DifFace's SwinIR-L with random weights."""
    torch.manual_seed(0)
    return lp.SwinIR().eval()


def test_swinir_relative_position_index_and_mask_are_the_public_ones(swinir):
    """index = 15 (dy + 7) + (dx + 7); the mask forbids (about -100) pairs that are neighbours only by the shift."""
    state = swinir.state_dict()
    y, x = torch.arange(64) // 8, torch.arange(64) % 8
    index = 15 * (y[:, None] - y + 7) + x[:, None] - x + 7
    assert torch.equal(state["layers.3.residual_group.blocks.2.attn.relative_position_index"].long(), index)
    coordinate = (torch.arange(64) + 4) % 64                                      # after the roll by -4
    region = ((coordinate - 4) // 8).view(8, 8)                                   # -1 wraps: rows 0..3 stay apart
    ry = region[:, None, :, None].expand(8, 8, 8, 8).reshape(64, 64)
    rx = region[None, :, None, :].expand(8, 8, 8, 8).reshape(64, 64)
    apart = (ry[:, :, None] != ry[:, None]) | (rx[:, :, None] != rx[:, None])
    assert torch.equal(state["layers.0.residual_group.blocks.1.attn_mask"], -100. * apart)


@pytest.mark.parametrize("j", [0, 1])
def test_swinir_block_equals_dense_masked_attention(swinir, j):
    """A Swin block is full attention restricted to (shifted, non-cyclic) 8 x 8 windows, plus MLP, both pre-norm."""
    seen, block = [], swinir.layers[2].residual_group.blocks[j]
    block.attn.relative_position_bias_table.data.normal_()
    hook = block.register_forward_hook(lambda m, args, out: seen.append((args[0], out)))
    with torch.no_grad():
        swinir(torch.rand(1, 3, 128, 192))                                        # 16 x 24 tokens
        hook.remove()
        x, got = (v.reshape(16 * 24, 180) for v in seen[0])
        w = {k: v for k, v in block.state_dict().items()}
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
        h = F.layer_norm(x, (180,), w["norm2.weight"], w["norm2.bias"])
        h = F.linear(h, w["mlp.fc1.weight"], w["mlp.fc1.bias"])
        x = x + F.linear(F.gelu(h), w["mlp.fc2.weight"], w["mlp.fc2.bias"])
    torch.testing.assert_close(got, x, rtol=1e-4, atol=1e-4)


def loop_attention(q, k, v, height, width, kernel, scale):
    """One query at a time: a kernel x kernel window that shifts at the borders and never shrinks."""
    out = torch.zeros_like(v)
    for y in range(height):
        for x in range(width):
            top = min(max(y - kernel // 2, 0), height - kernel)
            left = min(max(x - kernel // 2, 0), width - kernel)
            keys = [r * width + c for r in range(top, top + kernel) for c in range(left, left + kernel)]
            weights = (scale * torch.einsum("bhd,bhkd->bhk", q[:, :, y * width + x], k[:, :, keys])).softmax(-1)
            out[:, :, y * width + x] = torch.einsum("bhk,bhkd->bhd", weights, v[:, :, keys])
    return out


def test_neighborhood_attention_sees_exactly_49_keys():
    """With equal logits each query averages exactly 7 x 7 values, also in the corners."""
    n = 10 * 12
    q = torch.zeros(1, 1, n, n, dtype=torch.float64)
    weights = lp.neighborhood_attention(q, q, torch.eye(n, dtype=torch.float64).view(1, 1, n, n), 10, 12)[0, 0]
    assert torch.equal((weights > 1e-9).sum(1), torch.full((n,), 49))
    torch.testing.assert_close(weights[weights > 1e-9], torch.full((49 * n,), 1 / 49, dtype=torch.float64))


def shrink(value, name=""):
    """A small copy of HDIT_PMRF: one block per level, every width of 256 and above divided by four."""
    if isinstance(value, dict):
        return {k: shrink(v, str(k)) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(shrink(v, name) for v in value)
    if isinstance(value, int) and not isinstance(value, bool):
        return min(value, 2) if "depth" in name else value // 4 if value >= 256 else value
    return value


def slow_hdit(w, x, t):
    """k-diffusion's hourglass transformer from its state dict: 7 x 7 neighbourhoods, global attention in the middle.

    Where the weights hold depth-wise convolutions they follow the projections to q, k, v and to value and gate.
    """
    rms = lambda v: v * (v.square().mean(-1, keepdim=True) + 1e-6).rsqrt()
    fourier = lambda name, v: (lambda f: torch.cat([f.cos(), f.sin()], -1))(2 * math.pi * v @ w[f"{name}.weight"].T)

    def neighbours(name, v):                                             # (B, H, W, C): nine shifted copies, summed
        if f"{name}.dwconv.weight" not in w:
            return v
        h, wd, padded = v.shape[1], v.shape[2], F.pad(v, (0, 0, 1, 1, 1, 1))
        kernel = w[f"{name}.dwconv.weight"][:, 0]
        shifted = [padded[:, i:i + h, j:j + wd] * kernel[:, i, j] for i in range(3) for j in range(3)]
        return sum(shifted) + w[f"{name}.dwconv.bias"]

    def geglu(name, v):
        value, gate = neighbours(name, v @ w[f"{name}.up_proj.weight"].T).chunk(2, -1)
        return (value * F.gelu(gate)) @ w[f"{name}.down_proj.weight"].T

    def merge(v, p):                                                     # (B, H, W, C) -> (B, H/p, W/p, p p C)
        b, h, wd, c = v.shape
        return v.view(b, h // p, p, wd // p, p, c).permute(0, 1, 3, 2, 4, 5).reshape(b, h // p, wd // p, p * p * c)

    def split(v, p):
        b, h, wd, c = v.shape
        return v.view(b, h, wd, p, p, c // p ** 2).permute(0, 1, 3, 2, 4, 5).reshape(b, h * p, wd * p, c // p ** 2)

    def centres(n, half):
        return half * ((2 * torch.arange(n, dtype=x.dtype) + 1) / n - 1)

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

    def level(name, v, pos, neighbourhood):
        for j in range(1 + max(int(k.split(".")[name.count(".") + 1]) for k in w if k.startswith(name + "."))):
            v = block(f"{name}.{j}", v, pos, neighbourhood)
        return v

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
    v = rms(v) * w["out_norm.scale"]
    return split(v @ w["patch_out.proj.weight"].T, 4).movedim(-1, 1)


@pytest.fixture(scope="module")
def hdit():
    """A small HDiT of the released layout."""
    return lp.HDiT(**shrink(lp.HDIT_PMRF))


def test_hdit_recomputes_to_the_same_gradients():
    model, x, t = randomised(lp.HDiT(**shrink(lp.HDIT_PMRF))), torch.randn(1, 3, 64, 64), torch.tensor([.3])
    gradients = []
    for model.gradient_checkpointing in (False, True):
        model.zero_grad()
        model(x, t).square().mean().backward()
        gradients.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b)


def test_hdit_starts_as_the_zero_field(hdit):
    """patch_out is zero-initialised: before training the velocity is exactly zero."""
    assert torch.equal(hdit(torch.randn(2, 3, 64, 64), torch.rand(2)), torch.zeros(2, 3, 64, 64))


@pytest.mark.parametrize("depthwise, height, width", [(False, 64, 64), (False, 64, 96), (True, 64, 96)])
def test_hdit_equals_a_functional_reimplementation(depthwise, height, width):
    """With all parameters random, velocity(x, t) equals matmuls written from k-diffusion's equations."""
    model = randomised(lp.HDiT(**dict(shrink(lp.HDIT_PMRF), depthwise=depthwise)), seed=width)
    x, t = torch.randn(2, 3, height, width), torch.tensor([.1, .8])
    with torch.no_grad():
        torch.testing.assert_close(model(x, t), slow_hdit(model.state_dict(), x, t), rtol=2e-4, atol=2e-4)
        torch.testing.assert_close(model(x[1:], t[1:]), model(x, t)[1:], rtol=1e-4, atol=1e-4)      # batch of one
        assert (model(x, 1 - t) - model(x, t)).abs().max() > 1e-3
