"""A2BFR: closed forms in the paper's order, rewrites, parity with diffusers, prodigyopt and peft; then the program."""
import copy
import dataclasses
import functools
import json
import math
import shutil
import subprocess
import sys
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import safetensors.torch
import torch
import torch.nn as nn
import torch.nn.functional as F

import a2bfr as ab
import common
import metrics
from program import ROOT, caller, same, toy_pictures, weights
from toy import flux as toy_flux
from toy.faces import toy_faces

f64 = torch.float64
SIZES = dict(vae=dict(block_out_channels=(8, 8, 8), layers_per_block=1, latent_channels=4, norm_num_groups=4),
             transformer=dict(num_layers=1, num_single_layers=1, attention_head_dim=16, num_attention_heads=2,
                              axes_dims_rope=(4, 6, 6)),
             text=dict(width=32, layers=1, heads=2, length=24))
cpu = SimpleNamespace(device=torch.device("cpu"), autocast=nullcontext)     # what `pair_loss` asks of a Run


@pytest.fixture(autouse=True)
def seeded():
    """Every test draws the same numbers, alone or in the suite."""
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def flux(tmp_path_factory):
    """A tiny random FLUX as toy/flux.py lays it out: 8 px a token, no guidance embedding."""
    folder = tmp_path_factory.mktemp("flux")
    toy_flux.new_folder(folder, 0, SIZES)
    return folder


@pytest.fixture(scope="session")
def release(tmp_path_factory):
    """FLUX.1-dev's own layout, saved by diffusers' pipeline, tiny and random: 16 px a token, guidance embedded."""
    from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline
    from transformers import CLIPTextModel
    folder = tmp_path_factory.mktemp("release")
    torch.manual_seed(0)
    clip, t5 = tiny_text_encoders(CLIPTextModel)
    words = toy_flux.word_tokenizer
    pipe = FluxPipeline(FlowMatchEulerDiscreteScheduler(), tiny_vae(), clip, words(77), t5, words(20),
                        tiny_flux(num_layers=1, num_single_layers=1))
    pipe.save_pretrained(folder)
    return folder


def tiny_flux(seed=0, **changes):
    """A random FluxTransformer2DModel of two blocks of each kind, tokens of 16 channels."""
    from diffusers import FluxTransformer2DModel
    torch.manual_seed(seed)
    sizes = dict(in_channels=16, num_layers=2, num_single_layers=2, attention_head_dim=16, num_attention_heads=2,
                 joint_attention_dim=32, pooled_projection_dim=32, guidance_embeds=True, axes_dims_rope=(4, 4, 8))
    return FluxTransformer2DModel(**sizes | changes).eval()


def tiny_text_encoders(kind, width=32):
    """(CLIP, T5) of one layer each; `kind` the class of CLIP."""
    from transformers import CLIPTextConfig, T5Config, T5EncoderModel
    words = len(toy_flux.word_tokenizer(8))
    clip = kind(CLIPTextConfig(vocab_size=words, hidden_size=width, intermediate_size=32, num_hidden_layers=2,
                               num_attention_heads=2, max_position_embeddings=77, eos_token_id=words - 1, pad_token_id=0,
                               bos_token_id=1, projection_dim=width))
    t5 = T5EncoderModel(T5Config(vocab_size=words, d_model=32, d_kv=8, d_ff=32, num_layers=1, num_heads=2))
    return clip.eval(), t5.eval()


def tiny_vae(latents=4):
    from diffusers import AutoencoderKL
    return AutoencoderKL(down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4,
                         block_out_channels=(8,) * 4, layers_per_block=1, latent_channels=latents, norm_num_groups=4,
                         use_quant_conv=False, use_post_quant_conv=False, scaling_factor=0.3611, shift_factor=0.1159)


def inputs(batch=2, image=16, condition=16, text=5):
    """noisy, condition, text, pooled, t, guidance, image_ids, condition_ids."""
    side = math.isqrt(condition)
    return (torch.randn(batch, image, 16), torch.randn(batch, condition, 16), torch.randn(batch, text, 32),
            torch.randn(batch, 32), torch.rand(batch), torch.full((batch,), 3.5), ab.position_ids(4, 4),
            ab.position_ids(side, side, 4 // side))


def with_lora(net, rank=4, alpha=2.0, std=0.2):
    for p in ab.add_condition_lora(net, rank, alpha):
        nn.init.normal_(p, std=std)
    return net


# ---------------------------------------------------------------- sections 4.2 and 4.3: losses

@pytest.mark.parametrize("shape", [(4, 5, 6), (4, 3, 2, 2)])
def test_eq1_clean_latents_are_exact_for_the_true_velocity(shape):
    """z_t = (1 - t) z0 + t eps, V = eps - z0; an error e in V costs -t e."""
    z0, noise, error = torch.randn(3, *shape, dtype=f64)
    t = torch.tensor([0., .3, .9, 1.], dtype=f64)
    t_ = t.view(-1, *[1] * (len(shape) - 1))
    z_t = (1 - t_) * z0 + t_ * noise
    torch.testing.assert_close(ab.predict_clean(z_t, noise - z0, t), z0)
    torch.testing.assert_close(ab.predict_clean(z_t, noise - z0 + error, t), z0 - t_ * error)


def test_eq2_attribute_loss_is_the_mean_bce_and_its_floor_the_entropy():
    logits, q = torch.randn(3, 12), torch.rand(3, 12)
    p = logits.sigmoid()
    assert ab.attribute_loss(logits, q).item() == pytest.approx(-(q * p.log() + (1 - q) * (1 - p).log()).mean().item(), rel=1e-5)
    at_best = torch.logit(q.clamp(1e-6, 1 - 1e-6))
    assert ab.attribute_divergence(at_best, q).item() == pytest.approx(0, abs=1e-5)
    assert ab.attribute_divergence(logits, q) > 0
    assert ab.attribute_loss(torch.zeros(1, 1), torch.full((1, 1), .3)).item() == pytest.approx(math.log(2))


def fake_branch(attribute_weight, seen, weight=None, error=0.0):
    """branch_loss on made-up functions: a velocity that is off by `error`, an encoder that reads means."""
    z0, noise, t = torch.randn(3, 4, 12), torch.randn(3, 4, 12), torch.tensor([.2, .5, .8])
    encoder = lambda images: images.mean((1, 2, 3))[:, None] * torch.ones(12)
    return z0, t, ab.branch_loss(
        lambda z, s: noise - z0 + error, lambda tokens: ab.unpack(tokens, 4, 4), encoder, z0, noise, t, seen,
        torch.full((3, 12), .25), torch.tensor([1, 2, 3]), torch.ones(3) if weight is None else weight, attribute_weight)


def test_eq3_branch_loss_is_diffusion_plus_lambda_times_attribute():
    seen = torch.tensor([0, 2])
    torch.manual_seed(1)
    z0, t, (loss, score, parts) = fake_branch(.7, seen, error=.5)
    read = (z0 - t.view(3, 1, 1) * .5)[seen].mean((1, 2))                             # z0_hat = z0 - t e
    wanted = F.binary_cross_entropy_with_logits(read[:, None].expand(2, 12), torch.full((2, 12), .25))
    assert parts["diffusion"].item() == pytest.approx(.25)
    assert loss.item() == pytest.approx(.25 + .7 * wanted.item(), rel=1e-5)
    torch.testing.assert_close(score, read.sigmoid())
    assert fake_branch(.7, seen[:0], error=.5)[2][0].item() == pytest.approx(.25)          # nothing read: L_diff alone
    half = fake_branch(0, seen[:0], weight=torch.tensor([1., 0., 0.]), error=.5)[2][0]
    assert half.item() == pytest.approx(.25 / 3)


def test_eq4_the_score_is_that_of_the_edited_attribute():
    logits, edited = torch.randn(4, 12), torch.tensor([0, 11, 5, 5])
    wanted = torch.stack([logits[i, k] for i, k in enumerate(edited)]).sigmoid()
    torch.testing.assert_close(ab.edited_score(logits, edited), wanted)


@pytest.mark.parametrize("src, tar, signed, printed", [
    (.1, .9, 0, 0), (.3, .6, .2, .2), (.5, .5, .5, .5), (.6, .3, .8, .2), (.9, .1, 1.3, 0)])
def test_eq5_hinge_on_the_gap(src, tar, signed, printed):
    """m = .5, the target should have the attribute. The printed form rewards the wrong order, the signed one does not."""
    a, b = torch.tensor([src], dtype=f64), torch.tensor([tar], dtype=f64)
    assert ab.dual_margin_loss(a, b, .5, torch.ones(1)).item() == pytest.approx(signed, abs=1e-12)
    assert ab.dual_margin_loss(a, b, .5).item() == pytest.approx(printed, abs=1e-12)
    assert ab.dual_margin_loss(b, a, .5, -torch.ones(1)).item() == pytest.approx(signed, abs=1e-12)
    per_row = ab.dual_margin_loss(torch.cat([a, a]), torch.cat([b, b]), torch.tensor([.5, 0.], dtype=f64))
    assert per_row.item() == pytest.approx((printed + 0) / 2, abs=1e-12)


@pytest.mark.parametrize("sign, ends_right", [(torch.ones(1), True), (None, False)])
def test_eq5_reversed_scores_are_turned_round_by_the_signed_form_only(sign, ends_right):
    """Two logits that start on the wrong sides, Eq. 6 with K = 12, lambda = alpha = 1."""
    logits = torch.tensor([math.log(.55 / .45), -math.log(.55 / .45)], requires_grad=True)
    truth = torch.tensor([.05, .95])
    optimizer = torch.optim.SGD([logits], .5)
    for _ in range(1000):
        bce = F.binary_cross_entropy_with_logits(logits, truth, reduction="sum") / 12
        score = logits.sigmoid()
        optimizer.zero_grad()
        (bce + ab.dual_margin_loss(score[:1], score[1:], .5, sign)).backward()
        optimizer.step()
    assert (logits[1] > logits[0]).item() == ends_right


def test_eq6_total_is_the_sum_and_two_passes_have_its_gradient():
    w = torch.randn(5, dtype=f64)
    rows = torch.randn(2, 5, dtype=f64)

    def run(two_pass, weight=.7):
        x = w.clone().requires_grad_(True)
        graphs = []

        def side(i):
            value = (rows[i] * x).tanh()
            graphs.append(value.requires_grad)
            return value.square().sum(), value.sum().sigmoid()[None]

        dual = lambda a, b: ab.dual_margin_loss(a, b, .9, torch.ones(1))
        loss, gap = ab.dual_training_loss(lambda: side(0), lambda: side(1), dual, weight,
                                          (lambda share: share.backward()) if two_pass else None)
        loss.backward()
        return x.grad, loss.item(), gap.item(), graphs

    (joint, total, gap, _), (split, _, gap2, graphs) = run(False), run(True)
    torch.testing.assert_close(joint, split)
    assert gap == pytest.approx(gap2) and gap > 0 and graphs == [False, True, True]
    assert run(True, 0.0)[3] == [True, True]                       # nothing is compared: no third pass
    torch.testing.assert_close(run(True, 0.0)[0], run(False, 0.0)[0])
    values = [(row * w).tanh().square().sum().item() for row in rows]
    assert total == pytest.approx(sum(values) + .7 * gap)


# ---------------------------------------------------------------- section 4.1: model

def test_pack_is_flux_packing_and_a_smaller_condition_lies_between_the_tokens_it_covers():
    from diffusers import FluxPipeline
    z = torch.randn(2, 3, 8, 6)
    assert torch.equal(ab.pack(z), FluxPipeline._pack_latents(z, 2, 3, 8, 6)) and torch.equal(ab.unpack(ab.pack(z), 8, 6), z)
    assert torch.equal(ab.pack(z)[0, 4], z[0, :, 2:4, 2:4].reshape(-1))                # (c, dy, dx), c slowest
    with pytest.raises(ValueError, match="even"):
        ab.pack(torch.zeros(1, 1, 3, 4))
    full, half = ab.position_ids(4, 4), ab.position_ids(2, 2, 2)
    assert full[:, 0].eq(0).all() and full[5].tolist() == [0, 1, 1]
    assert half.tolist() == [[0, .5, .5], [0, .5, 2.5], [0, 2.5, .5], [0, 2.5, 2.5]]


@pytest.mark.parametrize("guidance", [True, False])
def test_without_condition_and_lora_it_is_flux(guidance):
    net = tiny_flux(guidance_embeds=guidance)
    noisy, _, text, pooled, t, g, ids, _ = inputs()
    call = dict(hidden_states=noisy, encoder_hidden_states=text, pooled_projections=pooled, timestep=t, img_ids=ids,
                txt_ids=torch.zeros(5, 3), guidance=g if guidance else None)
    ours = lambda: ab.flux_velocity(net, noisy, None, text, pooled, t, g, ids, None)
    with torch.no_grad():
        wanted = net(**call).sample
        before = ours()
        torch.testing.assert_close(before, wanted, atol=1e-5, rtol=0)
        with_lora(net)                                              # a LoRA without a condition touches nothing
        for now, then in ((ours(), before), (net(**call).sample, wanted)):  # but for the order of sums over threads
            torch.testing.assert_close(now, then, atol=2e-6, rtol=0)


def test_in_bf16_its_clock_is_rounded_as_that_of_diffusers():
    """diffusers gives t and guidance the type of the weights before it multiplies by 1000: 3.5 becomes 3504."""
    net = tiny_flux(guidance_embeds=True).bfloat16()
    noisy, _, text, pooled, t, g, ids, _ = inputs()
    low = [u.bfloat16() for u in (noisy, text, pooled)]
    with torch.no_grad():
        wanted = net(hidden_states=low[0], encoder_hidden_states=low[1], pooled_projections=low[2], timestep=t, img_ids=ids,
                     txt_ids=torch.zeros(5, 3), guidance=g).sample.float()
        ours = ab.flux_velocity(net, noisy, None, text, pooled, t, g, ids, None)
    torch.testing.assert_close(ours, wanted, atol=2 ** -7 * wanted.abs().max().item(), rtol=0)


def branch(net, adapted, text, image, condition, temb, temb0, ids, independent):
    """OminiControl with three separate branches, plain loops: `net` for text and image, `adapted` (LoRA merged) for the
    condition. Written apart from a2bfr.flux_velocity."""
    def modulate(linear, signal, parts):
        return [m[:, None] for m in linear(F.silu(signal)).chunk(parts, -1)]

    def rope(x, positions):
        cos, sin = net.pos_embed(positions)
        turned = torch.stack([-x[..., 1::2], x[..., 0::2]], -1).flatten(-2)
        return x * cos[:, None] + turned * sin[:, None]

    def project(attn, x, positions, added=False):
        names = ("add_q_proj", "add_k_proj", "add_v_proj") if added else ("to_q", "to_k", "to_v")
        q, k, v = (getattr(attn, n)(x).view(*x.shape[:2], attn.heads, -1) for n in names)
        norms = (attn.norm_added_q, attn.norm_added_k) if added else (attn.norm_q, attn.norm_k)
        return rope(norms[0](q), positions), rope(norms[1](k), positions), v

    def attend(parts):
        found = []
        for number, (q, _, _) in enumerate(parts):
            seen = parts[2:] if independent and number == 2 else parts
            k, v = (torch.cat([p[i] for p in seen], 1) for i in (1, 2))
            weights = torch.einsum("bnhd,bmhd->bhnm", q, k) / q.shape[-1] ** .5
            found.append(torch.einsum("bhnm,bmhd->bnhd", weights.softmax(-1), v).flatten(2))
        return found

    places = [torch.zeros(text.shape[1], 3), *ids]
    for block, lora in zip(net.transformer_blocks, adapted.transformer_blocks):
        streams = [(block.norm1_context, block.norm2_context, block.ff_context, block.attn.to_add_out, block, temb),
                   (block.norm1, block.norm2, block.ff, block.attn.to_out[0], block, temb),
                   (lora.norm1, lora.norm2, lora.ff, lora.attn.to_out[0], lora, temb0)]
        x = [text, image, condition]
        mods = [modulate(norm.linear, signal, 6) for norm, *_, signal in streams]
        normed = [s[0].norm(h) * (1 + m[1]) + m[0] for s, h, m in zip(streams, x, mods)]
        outs = attend([project(s[4].attn, h, p, i == 0) for i, (s, h, p) in enumerate(zip(streams, normed, places))])
        x = [h + m[2] * s[3](o) for s, h, m, o in zip(streams, x, mods, outs)]
        text, image, condition = [h + m[5] * s[2](s[1](h) * (1 + m[4]) + m[3]) for s, h, m in zip(streams, x, mods)]
    for block, lora in zip(net.single_transformer_blocks, adapted.single_transformer_blocks):
        x, blocks = [text, image, condition], [(block, temb), (block, temb), (lora, temb0)]
        mods = [modulate(b.norm.linear, signal, 3) for b, signal in blocks]
        normed = [b.norm.norm(h) * (1 + m[1]) + m[0] for (b, _), h, m in zip(blocks, x, mods)]
        outs = attend([project(b.attn, h, p) for (b, _), h, p in zip(blocks, normed, places)])
        text, image, condition = [
            h + m[2] * b.proj_out(torch.cat([o, F.gelu(b.proj_mlp(n), approximate="tanh")], 2))
            for (b, _), h, m, n, o in zip(blocks, x, mods, normed, outs)]
    return net.proj_out(net.norm_out(image, temb))


@pytest.mark.parametrize("independent", [False, True])
@pytest.mark.parametrize("side", [4, 2])
def test_one_sequence_equals_three_branches_with_lora_on_the_condition(independent, side):
    plain = tiny_flux()
    net = with_lora(copy.deepcopy(plain))
    merged = copy.deepcopy(net)
    common.merge_lora(merged)
    noisy, condition, text, pooled, t, g, ids, condition_ids = args = inputs(condition=side ** 2)
    clock = lambda model, t, g: model.time_text_embed(1000 * t, 1000 * g, pooled)
    with torch.no_grad():
        wanted = branch(plain, merged, plain.context_embedder(text), plain.x_embedder(noisy), merged.x_embedder(condition),
                        clock(plain, t, g), clock(plain, 0 * t, 0 * t + 1), (ids, condition_ids), independent)
        torch.testing.assert_close(ab.flux_velocity(net, *args, independent), wanted, atol=2e-5, rtol=0)


def test_fresh_lora_changes_nothing_and_trained_lora_only_condition_tokens():
    plain = tiny_flux()
    net = copy.deepcopy(plain)
    new = ab.add_condition_lora(net, 4, 4)
    with torch.no_grad():
        args = inputs()
        torch.testing.assert_close(ab.flux_velocity(net, *args), ab.flux_velocity(plain, *args), atol=1e-6, rtol=0)
        for p in new:
            nn.init.normal_(p)
        x = torch.randn(2, 7, 16)
        embedded, base = net.x_embedder(x, 4), plain.x_embedder(x)
        assert torch.equal(embedded[:, :4], base[:, :4]) and not torch.isclose(embedded[:, 4:], base[:, 4:]).any(-1).all()
        assert not torch.allclose(ab.flux_velocity(net, *args), ab.flux_velocity(plain, *args))
    assert {id(p) for p in new} == {id(p) for p in net.parameters() if p.requires_grad}


def test_independent_condition_ignores_the_image_and_its_cache_is_exact():
    net, args, cache, other = with_lora(tiny_flux()), list(inputs()), {}, {}
    call = functools.partial(ab.flux_velocity, net, independent=True)
    with torch.no_grad():
        assert torch.equal(call(*args, cache=cache), call(*args)) and len(cache) == 4
        args[0], args[4] = torch.randn(2, 16, 16), torch.rand(2)                        # another noise, another time
        later = call(*args, cache=other)
        assert all(torch.allclose(a, b, atol=1e-6) for i in cache for a, b in zip(cache[i], other[i]))
        args[1] = args[1] * math.nan                                                    # not even looked at
        torch.testing.assert_close(call(*args, cache=cache), later, atol=1e-5, rtol=0)
        with pytest.raises(ValueError, match="independent"):
            ab.flux_velocity(net, *args, cache={})


def test_paper_size_has_231_8_million_trainable_parameters_on_released_names():
    from diffusers import FluxTransformer2DModel
    with torch.device("meta"):
        net = FluxTransformer2DModel(guidance_embeds=True)
        released = set(net.state_dict())
        new = ab.add_condition_lora(net, ab.Train().rank, ab.Train().rank)
    names = ab.condition_layers(net)
    assert len(names) == 343 and sum(p.numel() for p in new) == 231_804_928
    assert sum(p.numel() for p in net.parameters()) - 231_804_928 == 11_901_408_320
    assert {name.replace(".base.", ".") for name in net.state_dict() if "lora_" not in name} == released
    assert set(ab.lora_tensors(net)) == {f"transformer.{name}.{m}.weight" for name in names for m in ("lora_A", "lora_B")}


def test_codec_normalises_packs_and_samples():
    codec = ab.Codec(tiny_vae(), 0.1159, 0.3611)
    x = torch.rand(2, 3, 32, 32) * 2 - 1
    with torch.no_grad():
        mean, tokens = codec.vae.encode(x).latent_dist.mean, codec.encode(x)
        torch.testing.assert_close(tokens, ab.pack((mean - 0.1159) * 0.3611))
        torch.testing.assert_close(codec.decode(tokens), codec.vae.decode(mean).sample, atol=1e-5, rtol=1e-4)
        std = codec.vae.encode(x).latent_dist.std
        sampled = codec.encode(x, torch.ones_like)
        torch.testing.assert_close(sampled, ab.pack((mean + std - 0.1159) * 0.3611))
    noise = codec.noise(32, [5, 6])
    assert noise.shape == tokens.shape and torch.equal(noise[1], codec.noise(32, [6])[0])


# ---------------------------------------------------------------- LoRA files, text

def test_lora_file_has_the_layout_of_the_release_and_survives_the_round_trip(tmp_path):
    net, other, path = with_lora(tiny_flux(), rank=4, alpha=2.0), tiny_flux(), tmp_path / "lora.safetensors"
    common.save_part(path, ab.lora_tensors(net))
    common.save_lora(net, tmp_path / "same.safetensors")
    assert path.read_bytes() == (tmp_path / "same.safetensors").read_bytes()
    state = safetensors.torch.load_file(path)
    assert len(state) == 2 * len(ab.condition_layers(net)) and not any("alpha" in n for n in state)
    assert state["transformer.single_transformer_blocks.1.norm.linear.lora_B.weight"].shape == (96, 4)
    assert ab.lora_rank(path) == 4
    ab.add_condition_lora(other, 4, 4)                                              # scale 1, as OminiControl reads it
    ab.load_lora(other, path)
    args = inputs()
    with torch.no_grad():
        torch.testing.assert_close(ab.flux_velocity(other, *args), ab.flux_velocity(net, *args), atol=1e-6, rtol=0)
    safetensors.torch.save_file({"a": torch.zeros(1)}, path)
    with pytest.raises(common.UserError, match="no LoRA"):
        ab.lora_rank(path)


def test_diffusers_reads_the_file_with_scale_1(tmp_path):
    pytest.importorskip("peft", reason="diffusers reads LoRA files with peft only")
    from diffusers import FluxPipeline
    net, plain = with_lora(tiny_flux()), tiny_flux()
    common.save_part(tmp_path / "lora.safetensors", ab.lora_tensors(net))
    state = FluxPipeline.lora_state_dict(str(tmp_path), weight_name="lora.safetensors")
    FluxPipeline.load_lora_into_transformer(state, None, plain)
    x = torch.randn(2, 3, 32)
    with torch.no_grad():                                          # there it acts on all tokens
        theirs, ours = plain.transformer_blocks[0].attn.to_q(x), net.transformer_blocks[0].attn.to_q(x, 0)
        torch.testing.assert_close(theirs, ours, atol=1e-6, rtol=0)


def test_flux_text_equals_diffusers_own_and_says_what_it_cannot_read(release):
    from diffusers import FluxPipeline
    pipe, prompts = FluxPipeline.from_pretrained(release), ["a photo of a smiling person", "", "eyeglasses"]
    ours = ab.FluxText(str(release), dtype=torch.float32)
    text, pooled = ours.encode(prompts)
    with torch.no_grad():
        wanted, wanted_pooled, _ = pipe.encode_prompt(prompts, None, max_sequence_length=20)
    torch.testing.assert_close(text, wanted, atol=1e-5, rtol=0)
    torch.testing.assert_close(pooled, wanted_pooled, atol=1e-5, rtol=0)
    assert ours.unread(ab.TEMPLATE) == ours.unread("") == "" and "know zebra" in ours.unread("a Zebra, smiling".lower())
    assert ours.unread("a hat " * 12) == "25 tokens, the last 5 are cut"


# ---------------------------------------------------------------- a training step

def tiny_nets(folder, **changes):
    """(configuration, networks) of the tiny FLUX with a LoRA that is not zero; 32 px are 16 tokens."""
    flags = dict(image_size=32, rank=4, drop_text=0.0, drop_condition=0.0, mixed_precision="no", device="cpu",
                 num_inference_steps=4, guidance_scale=1.0, time_shift=4.0, pretrained_model_name_or_path=str(folder))
    cfg = ab.Train(**flags | changes)
    nets = ab.load_networks(cfg, "cpu")
    nets["codec"].vae.encoder.conv_out.bias.data[4:] = -30                              # a posterior without spread
    ab.add_condition_lora(nets["prior"], 4, 4)
    for layer in common.lora_layers(nets["prior"]).values():
        nn.init.normal_(layer.lora_B.weight, std=.1)
    return cfg, nets


def pair_batch(folder, count=3):
    path = folder / "pairs" / "pairs.jsonl"
    return ab.Pairs(path.parent, ab.accepted(path), 32, "noisy").held_out(count)


class Pixels(nn.Module):
    """A codec whose latents are mean colours: decoding shows what the transformer does."""
    token = 8

    def encode(self, images, noise=None):
        return ab.pack(F.pad(F.avg_pool2d(images, 4), (0, 0, 0, 0, 0, 1)))

    def decode(self, tokens):
        return F.interpolate(ab.unpack(tokens, 8, 8)[:, :3], scale_factor=4.0)


class Bright(nn.Module):
    """An attribute network that reads twelve logits off the mean brightness, as FaceReader is called."""

    def __init__(self, factor=4.0):
        super().__init__()
        self.factor = nn.Parameter(torch.tensor(factor), requires_grad=False)

    def stages(self, x):
        return [x]

    def attributes(self, flat):
        return self.factor * flat.mean(1, keepdim=True) * torch.ones(12)


def test_both_branches_share_condition_time_and_noise_and_only_the_prompt_differs(flux, toy_folder, monkeypatch):
    cfg, nets = tiny_nets(flux)
    seen, original = [], ab.flux_velocity
    monkeypatch.setattr(ab, "flux_velocity", lambda *a: seen.append(a) or original(*a))
    batch = pair_batch(toy_folder)
    ab.pair_loss(cfg, cpu, nets, Bright(), batch)
    (_, z_src, c_src, text_src, _, t_src, *_), (_, z_tar, c_tar, text_tar, _, t_tar, *_) = seen
    assert torch.equal(c_src, c_tar) and torch.equal(t_src, t_tar) and not torch.equal(text_src, text_tar)
    assert z_src.shape == z_tar.shape and not torch.equal(z_src, z_tar)
    batch.update(hq_tar=batch["hq"], target_prompts=batch["source_prompts"])            # equal faces and prompts: equal losses
    _, parts = ab.pair_loss(cfg, cpu, nets, Bright(), batch)
    for name in ("diffusion", "attribute"):
        assert parts[f"{name}_src"].item() == pytest.approx(parts[f"{name}_tar"].item(), rel=1e-6)


def test_two_passes_with_recomputed_blocks_have_the_gradient_of_one(flux, toy_folder):
    cfg, nets = tiny_nets(flux)
    batch, found = pair_batch(toy_folder), []
    for backward in (None, lambda loss: loss.backward()):
        torch.manual_seed(3)
        nets["prior"].zero_grad()
        nets["prior"].gradient_checkpointing = backward is not None
        loss, _ = ab.pair_loss(cfg, cpu, nets, Bright(), batch, backward)
        loss.backward()
        found.append(torch.cat([p.grad.flatten() for p in nets["prior"].parameters() if p.requires_grad]))
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-7)
    assert found[0].norm() > 0


def test_where_the_encoder_sees_a_pair_the_other_way_there_is_no_margin(flux, toy_folder, monkeypatch):
    """m is at most what the clean faces differ in the asked direction [Eq. 5]; as printed it is one number."""
    cfg, nets = tiny_nets(flux)
    batch, margins = pair_batch(toy_folder), []
    monkeypatch.setattr(ab, "READ_UNTIL", 1.0)
    monkeypatch.setattr(ab, "dual_margin_loss", lambda a, b, m, sign=None: margins.append(m) or (a - b).sum())
    with torch.no_grad():
        apart = [ab.read_attributes(Bright(), batch[key]).sigmoid()[:, 0] for key in ("hq", "hq_tar")]
    for sign in (1.0, -1.0):
        ab.pair_loss(cfg, cpu, nets, Bright(), dict(batch, sign=torch.full((3,), sign)))
        torch.testing.assert_close(margins[-1], (sign * (apart[1] - apart[0])).clamp(0, cfg.dual_margin))
    assert (margins[0] * margins[1] == 0).all()
    ab.pair_loss(dataclasses.replace(cfg, dual="abs"), cpu, nets, Bright(), batch)
    assert margins[-1] == cfg.dual_margin


def test_dropped_prompts_black_conditions_and_what_is_read(flux, toy_folder, monkeypatch):
    """A dropped prompt is empty on both sides, its face is not read and its target has no L_diff; late times are not read."""
    cfg, nets = tiny_nets(flux, drop_text=.3, drop_condition=.2)
    batch = {k: v.repeat(60, *[1] * (v.dim() - 1)) if torch.is_tensor(v) else v * 60
             for k, v in pair_batch(toy_folder, 5).items()}
    seen, losses, original, loss = [], [], ab.flux_velocity, ab.branch_loss
    monkeypatch.setattr(ab, "flux_velocity", lambda *a: seen.append(a) or original(*a))
    monkeypatch.setattr(ab, "branch_loss", lambda *a: losses.append(a) or loss(*a))
    with torch.no_grad():
        ab.pair_loss(cfg, cpu, nets, Bright(), batch)
        black, empty = nets["codec"].encode(torch.full((1, 3, 32, 32), -1.)), nets["text"].encode([""])[0]
        (_, _, condition, text, *_), (_, _, _, text_tar, *_) = seen
        t, read = losses[0][5], losses[0][6]
        dark = (condition - black).flatten(1).norm(dim=1) < 1e-3
        silent = (text - empty).flatten(1).norm(dim=1) < 1e-3
        assert dark.float().mean().item() == pytest.approx(.2, abs=.06)
        assert silent.float().mean().item() == pytest.approx(.3, abs=.08)
        assert torch.equal(silent, (text_tar - empty).flatten(1).norm(dim=1) < 1e-3)
        assert torch.equal(read, (~silent & (t <= ab.READ_UNTIL)).nonzero()[:, 0])
        assert losses[0][9].all() and torch.equal(losses[1][9] > 0, ~silent)
        for changes, count in ((dict(decoded=2), 2), (dict(attribute_weight=0.0, dual_weight=0.0), 0)):
            ab.pair_loss(dataclasses.replace(cfg, **changes), cpu, nets, Bright(), batch)
            assert len(losses[-1][6]) == count
    assert (ab.draw_times(10 ** 5, 1.0, "cpu").quantile(.05) - .16).abs() < .01           # sigmoid of a normal
    assert (ab.draw_times(10 ** 5, 4.0, "cpu").quantile(.5) - .8).abs() < .01             # 4 t / (1 + 3 t) of 1/2


def test_overfitting_two_pairs_separates_the_scores_in_the_right_order(flux, toy_folder, monkeypatch):
    """The tiny system with a brightness reader: losses fall, and A_tar - A_src gets the sign of the pair."""
    cfg, nets = tiny_nets(flux, attribute_weight=1.0, dual_weight=1.0)
    monkeypatch.setattr(ab, "READ_UNTIL", 1.0)
    nets["codec"], batch = Pixels(), pair_batch(toy_folder, 2)
    parameters = [p for p in nets["prior"].parameters() if p.requires_grad]
    batch.update(hq=torch.full_like(batch["hq"], -.7), hq_tar=torch.full_like(batch["hq"], .7), sign=torch.ones(2))
    batch["hq"][1], batch["hq_tar"][1], batch["sign"][1] = .7, -.7, -1.
    optimizer, history = torch.optim.Adam(parameters, 1e-2), []
    for step in range(120):
        torch.manual_seed(step % 4)
        loss, parts = ab.pair_loss(cfg, cpu, nets, Bright(), batch)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        history.append((loss.item(), parts["dual"].item()))
    first, last = (torch.tensor(h).mean(0) for h in (history[:4], history[-4:]))
    assert (last < .8 * first).all(), (first, last)
    assert last[1] < cfg.dual_margin                                    # max(0, m - s (A_tar - A_src)) < m: the right sign


def test_defaults_have_the_printed_numbers():
    """Section 5.1; thresholds of section 3.1. DIFFERS: LoRA alpha."""
    train, pairs = ab.Train(), ab.BuildPairs()
    assert (train.rank, train.max_train_steps, train.batch_size, train.image_size) == (64, 60_000, 1, 512)
    assert (train.drop_text, train.drop_condition, train.optimizer) == (.01, .01, "prodigy")
    assert ab.lora_optimizer(train, [nn.Parameter(torch.zeros(1))]).param_groups[0]["lr"] == 1.0
    assert pairs.count * pairs.edits == 35_000 and (pairs.positive, pairs.negative, pairs.editor) == (.6, .4, "sd3")
    assert len(dataclasses.fields(train)) <= 45


def test_attributes_are_read_in_our_order_with_a_gradient_and_farl_reads_twelve_of_forty():
    reader, x = metrics.load_reader("a"), toy_faces(torch.arange(4), torch.arange(4)).image.requires_grad_(True)
    logits = ab.read_attributes(reader, x)
    torch.testing.assert_close(logits.sigmoid(), reader.probabilities(x))
    logits.sum().backward()
    assert x.grad.abs().sum() > 0
    with torch.device("meta"):
        farl = metrics.FaRLAttributes()
    farl = farl.to_empty(device="cpu")
    for p in farl.parameters():
        nn.init.normal_(p, std=.02)
    x = torch.rand(1, 3, 64, 64) * 2 - 1
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):     # which read_attributes switches off
        found = ab.read_attributes(farl, x)
    with torch.no_grad():
        torch.testing.assert_close(found.sigmoid(), farl.probabilities(x)[:, [39, 31, 21, 15, 5, 33, 32, 8, 9, 11, 17, 35]])


# ---------------------------------------------------------------- Prodigy

def quadratic(optimizer_class, steps, **options):
    """d and parameters of a least-squares fit; the second tensor starts at zero, as a LoRA's B does."""
    torch.manual_seed(1)
    x, y = torch.randn(64, 8), torch.randn(64, 4)
    a, b = nn.Parameter(torch.randn(8, 3) / 3), nn.Parameter(torch.zeros(3, 4))
    optimizer, ds = optimizer_class([a, b], **options), []
    for _ in range(steps):
        optimizer.zero_grad()
        (x @ a @ b - y).square().mean().backward()
        optimizer.step()
        ds.append(optimizer.param_groups[0]["d"])
    return ds, torch.cat([a.detach().flatten(), b.detach().flatten()])


@pytest.mark.parametrize("options", [
    dict(), dict(weight_decay=.01, use_bias_correction=True, safeguard_warmup=True), dict(growth_rate=1.02, d0=1e-4),
    dict(d_coef=.5, betas=(.9, .99), weight_decay=.1, lr=.5)])
def test_prodigy_is_prodigyopt_to_the_bit(options):
    prodigyopt = pytest.importorskip("prodigyopt", reason="parity only where prodigyopt is installed")
    ours, theirs = quadratic(ab.Prodigy, 50, **options), quadratic(prodigyopt.Prodigy, 50, **options)
    assert ours[0] == theirs[0] and torch.equal(ours[1], theirs[1])


def test_prodigy_follows_a_frozen_sequence_and_never_lowers_d():
    ds, _ = quadratic(ab.Prodigy, 120, weight_decay=.01, use_bias_correction=True, safeguard_warmup=True)
    assert all(b >= a for a, b in zip(ds, ds[1:])) and ds[0] == 1e-6
    frozen = {10: 1e-06, 20: 1.75464e-06, 30: 6.54334e-06, 50: 0.000198783, 80: 0.00921718, 120: 0.036639}
    for step, value in frozen.items():
        assert ds[step - 1] == pytest.approx(value, rel=1e-3)


def test_prodigy_first_step_by_hand():
    """d stays d0, m = d0 (1 - b1) g, v = d0^2 (1 - b2) g^2: the step is d0 lr m / (sqrt v + d0 eps)."""
    p = nn.Parameter(torch.tensor([1., -2.], dtype=f64))
    p.grad = torch.tensor([.5, 4.], dtype=f64)
    ab.Prodigy([p], lr=1.0, d0=1e-3).step()
    g = torch.tensor([.5, 4.], dtype=f64)
    wanted = torch.tensor([1., -2.], dtype=f64) - 1e-3 * (.1 * g) / ((.001 * g * g).sqrt() + 1e-8)
    torch.testing.assert_close(p.detach(), wanted)


def test_prodigy_resumes_and_refuses_two_groups():
    p, q = (nn.Parameter(torch.ones(3)) for _ in range(2))
    with pytest.raises(ValueError, match="one group"):
        ab.Prodigy([dict(params=[p]), dict(params=[q])])
    optimizer, other = ab.Prodigy([p], d0=1e-2), ab.Prodigy([q], d0=1e-2)
    assert optimizer.step() is None and not optimizer.state                        # no gradient: nothing happens
    step = lambda o, p: (setattr(p, "grad", p.detach() - 3), o.step())
    [step(optimizer, p) for _ in range(5)]
    assert optimizer.param_groups[0]["d"] > 1e-2 and optimizer.param_groups[0]["k"] == 5
    q.data.copy_(p.data)
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    [(step(optimizer, p), step(other, q)) for _ in range(5)]
    assert torch.equal(p, q)


# ---------------------------------------------------------------- samplers

def test_schedules_are_those_of_diffusers_and_euler_is_exact_on_straight_paths():
    from diffusers import FlowMatchEulerDiscreteScheduler
    scheduler = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, shift=3.0)
    scheduler.set_timesteps(sigmas=torch.linspace(1, 1 / 28, 28).tolist(), mu=.63)
    torch.testing.assert_close(ab.flux_sigmas(28, 1024), scheduler.sigmas, atol=1e-6, rtol=0)
    assert ab.flux_sigmas(28, 1024)[[0, 1, 13, 27, 28]].tolist() == pytest.approx([1, .981, .684, .065, 0], abs=6e-4)
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    scheduler.set_timesteps(50)
    torch.testing.assert_close(ab.sd3_sigmas(50), scheduler.sigmas, atol=2e-4, rtol=0)
    assert ab.sd3_sigmas(50)[50 - 33].item() == pytest.approx(.850, abs=2e-3)           # where n_max = 33 starts
    z0, noise = torch.randn(2, 3, 4, 5)
    for sigmas in (ab.flux_sigmas(3, 4), ab.flux_sigmas(28, 1024)):
        torch.testing.assert_close(ab.euler_sample(lambda x, t: noise - z0, noise, sigmas), z0)


def gaussian_velocity(x, t, mean):
    """E[eps - x0 | x_t] for x0 ~ N(mean, 1)."""
    t = t.view(-1, *[1] * (x.dim() - 1))
    variance = (1 - t) ** 2 + t ** 2
    return (2 * t - 1) / variance * (x - (1 - t) * mean) - mean


@pytest.mark.parametrize("blend, n_max, shift", [
    (0, 50, 0.), (.25, 50, .64), (.5, 50, 1.35), (.75, 50, 2.13), (1., 50, 3.), (1., 33, 2.51), (1., 15, 1.21)])
def test_flow_edit_moves_a_gaussian_as_computed(blend, n_max, shift):
    """N(0, 1) -> N(3, 1) on SD3's schedule (facts 4.2): monotone in blend and n_max, 0 is the identity."""
    x = torch.randn(4096, 1)
    moved = ab.flow_edit(gaussian_velocity, x, 0., 3., ab.sd3_sigmas(50), n_max, blend=blend,
                         generator=torch.Generator().manual_seed(0)) - x
    assert moved.mean().item() == pytest.approx(shift, abs=.08)
    if blend == 0:
        assert not moved.any()


def test_flow_edit_between_equal_prompts_is_the_identity_and_noise_is_per_row():
    x = torch.randn(3, 2, 4)
    edit = functools.partial(ab.flow_edit, gaussian_velocity, sigmas=ab.flux_sigmas(10, 16), n_max=8)
    assert torch.equal(edit(x, 1., 1., n_avg=2), x)
    rngs = lambda *seeds: [torch.Generator().manual_seed(s) for s in seeds]
    rough = lambda x, t, p: gaussian_velocity(x, t, p) + (x * (3 + p)).sin()
    edit = functools.partial(ab.flow_edit, rough, sigmas=ab.flux_sigmas(10, 16), n_max=8)
    together, alone = edit(x, 0., 2., generator=rngs(1, 2, 3)), edit(x[1:2], 0., 2., generator=rngs(2))
    torch.testing.assert_close(together[1:2], alone)
    assert not torch.allclose(together, edit(x, 0., 2., generator=rngs(4, 5, 6)), atol=1e-3)


def test_restore_adds_both_kinds_of_guidance(flux):
    """v + (s - 1)(v - v_negative) + (s' - 1)(v - v_black) of every Euler step; scales of one leave the plain velocity."""
    cfg, nets = tiny_nets(flux)
    lq, prompts, negative = toy_faces([1, 2], [3, 4], size=32).image, ["a hat", "a photo of a smiling person"], "bangs"
    noise, sigmas = nets["codec"].noise(32, [0, 1]), ab.flux_sigmas(4, 16)
    for s, image in ((1., 1.), (2., 1.), (1., 1.5), (3., 1.5)):
        changed = dataclasses.replace(cfg, true_cfg_scale=s, image_guidance_scale=image)
        found = ab.restore(nets, changed, lq, prompts, noise, negative)
        z = noise
        with torch.no_grad():
            condition, black = nets["codec"].encode(lq), nets["codec"].encode(torch.full_like(lq, -1))
            asked, against = (ab.Prompt(*nets["text"].encode(said)) for said in (prompts, [negative] * 2))
            for now, after in zip(sigmas, sigmas[1:]):
                ask = functools.partial(ab.velocity, nets, z, now.expand(2))
                v = ask(asked, condition)
                v = v + (s - 1) * (v - ask(against, condition)) + (image - 1) * (v - ask(asked, black))
                z = z + (after - now) * v
            torch.testing.assert_close(found, nets["codec"].decode(z).clamp(-1, 1), atol=1e-4, rtol=0)


# ---------------------------------------------------------------- section 3.1: pairs

def test_thresholds_decide_what_can_be_edited_and_switching_turns_siblings_off():
    scores = [.9, .1, .5, .61, .39, .8, .2, .1, .2, .7, .3, .05]
    assert ab.editable(scores) == [0, 1, 3, 4, 6, 7, 8, 10, 11]                 # .5 is unknown; brown and wavy are on
    assert ab.editable([.5] * 12) == [] and ab.editable([.5] * 7 + [.1] * 4 + [.5]) == []
    after, sign = ab.switch(scores, 8)
    assert sign == 1 and after[7:11] == [0, 1, 0, 0] and after[:7] == scores[:7]
    assert ab.switch(scores, 6)[0][5:7] == [0, 1] and ab.switch(scores, 0) == ([0, *scores[1:]], -1)
    assert set(ab.others_of(8)) == set(range(12)) - {7, 8, 9, 10} and set(ab.others_of(0)) == set(range(1, 12))


def test_pairs_of_the_toy_world_as_batches(toy_folder):
    """Batches depend on (seed, step, rank), cover an epoch, share one degraded image; people are held out whole."""
    cfg = ab.Train(pairs=str(toy_folder / "pairs" / "pairs.jsonl"), image_size=32, degradation="noisy")
    training, held = ab.open_pairs(cfg)
    assert len(training.rows) == 18 and len(held.rows) == 2
    rows = {row["source"] for row in training.rows}
    assert not rows & {row["source"] for row in held.rows}
    batch = training.training(4, seed=1, step=2)
    again = training.training(4, seed=1, step=2)
    assert all(torch.equal(v, again[k]) if torch.is_tensor(v) else v == again[k] for k, v in batch.items())
    whole = [training.training(3, 1, step, rank, 2) for step in range(3) for rank in range(2)]
    assert sorted(p for b in whole for p in b["source_prompts"]) == sorted(row["source_prompt"] for row in training.rows)
    assert torch.equal(batch["lq"], common.degrade(batch["hq"], common.DEGRADATIONS["noisy"], batch["seeds"]))
    single = ab.open_pairs(dataclasses.replace(cfg, dual_training=False))[0].training(4, 1, 2)
    for i, seed in enumerate(batch["seeds"].tolist()):              # Table 4's rows without SDT: one face, its own prompt
        face, prompt, sign = ("hq", "source_prompts", 1) if seed % 2 else ("hq_tar", "target_prompts", -1)
        assert torch.equal(single["hq"][i], batch[face][i]) and single["source_prompts"][i] == batch[prompt][i]
        assert single["sign"][i] == sign * batch["sign"][i]
    assert torch.equal(single["lq"], common.degrade(single["hq"], common.DEGRADATIONS["noisy"], single["seeds"]))
    reader = metrics.load_reader("b")
    scores = reader.probabilities(batch["hq_tar"])[range(4), batch["edited"]]
    assert ((scores > .5) == (batch["sign"] > 0)).float().mean() >= .75


def test_rows_that_name_a_person_are_held_out_together_and_bad_rows_are_left_out(toy_folder, tmp_path):
    folder = shutil.copytree(toy_folder / "pairs", tmp_path / "pairs")
    rows = [dict(row, person=k % 5) for k, row in enumerate(ab.read_pairs(folder / "pairs.jsonl"))]
    rows += [dict(rows[0], **bad) for bad in (dict(accepted=False, target=None), dict(target="gone.png"), dict(attribute="Horns"))]
    (folder / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows) + '{"half')
    training, held = ab.open_pairs(ab.Train(pairs=str(folder / "pairs.jsonl"), image_size=32))
    assert {row["person"] for row in held.rows} == {4} and {row["person"] for row in training.rows} == {0, 1, 2, 3}
    assert len(training.rows) + len(held.rows) == 20


GOOD = dict(source=[.9, .1] + [.1] * 10, target=[.9, .9] + [.1] * 10, edited=1, sign=1, identity=.7, structure=.8, shift=.02)


def test_quality_check_rejects_what_it_must_and_forgives_siblings():
    assert ab.quality_check(**GOOD).accepted and ab.quality_check(**GOOD).reasons == []
    for change, reason in ((dict(target=[.9, .5] + [.1] * 10), "attribute: Smiling is 0.50"),
                           (dict(source=[.9, .9] + [.1] * 10, sign=-1), "switched off"),
                           (dict(source=[.9, .8] + [.1] * 10), "was 0.80 already"),
                           (dict(target=[.9, .9] + [.1] * 9 + [math.nan]), "Wearing_Hat moved by nan"),
                           (dict(target=[.5, .9] + [.1] * 10), "attribute: Young moved by 0.40"), (dict(identity=.39), "identity"),
                           (dict(structure=.4), "SSIM"), (dict(shift=.2), "landmarks"), (dict(identity=math.nan), "identity")):
        check = ab.quality_check(**GOOD | change)
        assert not check.accepted and len(check.reasons) == 1 and reason in check.reasons[0]
    source, target = [.9] * 7 + [.1, .1, .9, .1, .1], [.9] * 7 + [.1, .9, .1, .1, .1]    # blond on, brown off with it
    assert ab.quality_check(source, target, 8, 1, .7, .8, .02).accepted
    assert not ab.quality_check(source, target, 0, -1, .7, .8, .02).accepted


def test_sd3_edits_on_its_own_classes(tmp_path):
    """FlowEdit with a tiny random SD3 folder: blend 0 gives the autoencoder's picture back, 1 does not."""
    from diffusers import FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel, StableDiffusion3Pipeline
    from transformers import CLIPTextModelWithProjection
    net = SD3Transformer2DModel(sample_size=4, patch_size=2, in_channels=4, num_layers=1, attention_head_dim=8,
                                num_attention_heads=2, joint_attention_dim=32, caption_projection_dim=16,
                                pooled_projection_dim=32, out_channels=4, pos_embed_max_size=8)
    (clip, t5), (clip2, _) = (tiny_text_encoders(CLIPTextModelWithProjection, 16) for _ in range(2))
    short, long = toy_flux.word_tokenizer(77), toy_flux.word_tokenizer(256)
    StableDiffusion3Pipeline(net, FlowMatchEulerDiscreteScheduler(shift=3.0), tiny_vae(), clip, short, clip2, short, t5,
                             long).save_pretrained(tmp_path)
    editor = ab.sd3_editor(str(tmp_path), 32, 6, "cpu", torch.float32)
    x, cfg = toy_faces([1, 2], [1, 2], size=32).image, ab.BuildPairs(n_max=5)
    edit = lambda blend: ab.edit_faces(editor, cfg, blend, "cpu", x, ["a person"] * 2, ["a hat", "bangs"], [1, 2])
    with torch.no_grad():
        z, t = editor.encode(x), torch.full((2,), .5)
        torch.testing.assert_close(edit(0.0), editor.decode(z))
        assert not torch.allclose(edit(1.0), editor.decode(z), atol=1e-3)
        together = editor.velocity(z, t, editor.prompt(["a hat", "bangs"], 1.0))
        alone = editor.velocity(z[1:], t[1:], editor.prompt(["bangs"], 1.0))
    torch.testing.assert_close(together[1:], alone, atol=1e-5, rtol=1e-4)            # halves of the batch do not mix


def test_llm_verbaliser_keeps_only_captions_that_say_everything(tmp_path):
    """A tiny random GPT-2 says nothing useful: the template stands. One that says every phrase is believed."""
    from transformers import GPT2Config, GPT2LMHeadModel
    words = toy_flux.word_tokenizer(512)
    words.save_pretrained(tmp_path)
    GPT2LMHeadModel(GPT2Config(vocab_size=len(words), n_positions=256, n_embd=32, n_layer=1, n_head=2, bos_token_id=None,
                               eos_token_id=len(words) - 1)).save_pretrained(tmp_path)
    caption, scores = ab.LLMVerbaliser(str(tmp_path), "cpu"), [.9, .9] + [.5] * 10      # young, smiling
    assert caption(scores) == common.verbalise(scores) == "a photo of a young smiling person"
    caption.words.decode = lambda ids, **k: "A smiling face of somebody young."
    assert caption(scores) == "A smiling face of somebody young."
    assert caption([.1] + scores[1:]) == "a photo of an older smiling person"           # "older" is missing there


# ---------------------------------------------------------------- the program

TINY = ["--image_size", "32", "--max_train_steps", "4", "--batch_size", "4", "--rank", "4", "--log_steps", "1",
        "--validation_faces", "2", "--num_inference_steps", "2", "--device", "cpu"]
LOOSE = ["--min_identity", "0", "--min_structure", "0", "--max_shift", "999", "--max_leak", "1", "--positive", "0.5",
         "--negative", "0.5", "--num_inference_steps", "3", "--n_max", "2", "--image_size", "32", "--device", "cpu"]
call, refused = caller(ab, libraries_talk=True)


@pytest.fixture(scope="module")
def trained(flux, toy_folder, tmp_path_factory):
    """One tiny run, a folder of toy pictures beside it, and the flags that repeat it."""
    folder = tmp_path_factory.mktemp("run")
    flags = ["train", *TINY, "--pretrained_model_name_or_path", flux, "--pairs", toy_folder / "pairs" / "pairs.jsonl"]
    call(*flags, "-o", folder / "out")
    toy_pictures(folder / "faces", 3)
    return SimpleNamespace(out=folder / "out", faces=folder / "faces", flags=flags)


def picture(folder, name="01"):
    return common.read_image(folder / "restored_faces" / f"{name}.png")


def test_training_leaves_weights_numbers_and_pictures(trained):
    names = {"lora.safetensors", "config.json", "metrics.json", "samples.png", "prompts.png", "log.jsonl"}
    assert names == {p.name for p in trained.out.iterdir()}
    numbers = json.loads((trained.out / "metrics.json").read_text())
    assert set(numbers["rows"]) == {"lq", "source", "target", "template", "edited", "autoencoder"} and numbers["faces"] == 2
    assert 0 <= numbers["rows"]["target"]["attribute_accuracy_toy"] <= 1 and numbers["main"] == "target"
    assert sum(n for _, n in numbers["per_attribute"]["target"].values()) == 2
    assert any(t.any() for n, t in weights(trained.out).items() if "lora_B" in n)
    last = json.loads((trained.out / "log.jsonl").read_text().splitlines()[-1])
    assert {"diffusion_src", "diffusion_tar", "dual", "prodigy_d"} <= last.keys()


KILLED = """
import os, signal, sys
import common, a2bfr
save = common.Run.save
def dying(run, stage, step, *rest):
    save(run, stage, step, *rest)
    if step + 1 == 2:
        os.kill(os.getpid(), signal.SIGKILL)
common.Run.save = dying
common.command_line("x", a2bfr.VERBS, sys.argv[1:])
"""


def test_a_killed_run_goes_on_to_the_same_weights(trained, tmp_path):
    """SIGKILL after the second step, then --resume_from_checkpoint latest: bit by bit the uninterrupted run."""
    flags = [*trained.flags, "--checkpointing_steps", "1", "-o", tmp_path]
    ended = subprocess.run([sys.executable, "-c", KILLED, *map(str, flags)], cwd=ROOT, capture_output=True, text=True)
    assert ended.returncode == -9 and not weights(tmp_path), ended.stderr[-2000:]
    call(*flags, "--resume_from_checkpoint", "latest")
    assert same(weights(trained.out), weights(tmp_path))


def test_the_stage_alone_equals_all_and_a_finished_one_is_taken_as_it_is(trained, tmp_path, capsys):
    call(*trained.flags, "-o", tmp_path, "--stage", "lora")
    assert same(weights(trained.out), weights(tmp_path))
    before = json.loads((tmp_path / "metrics.json").read_text())["rows"]
    call(*trained.flags, "-o", tmp_path, "--resume_from_checkpoint", "latest")
    assert "stage lora: taken as it is" in capsys.readouterr().out
    after = json.loads((tmp_path / "metrics.json").read_text())["rows"]
    assert all(after["target"][n] == pytest.approx(v, rel=1e-3, nan_ok=True) for n, v in before["target"].items())


def test_sampling_depends_on_prompt_and_seed_and_on_nothing_else(trained, tmp_path):
    run = lambda name, *flags: call("sample", "-i", trained.faces, "-o", tmp_path / name, "--checkpoint", trained.out, "--device",
                                    "cpu", *flags)
    run("a"), run("b", "--batch_size", "1"), run("c", "--seed", "1"), run("d", "--prompt", "a smiling person with bangs")
    run("e", "--true_cfg_scale", "3", "--negative_prompt", "a hat", "--image_guidance_scale", "1.5")
    assert (picture(tmp_path / "a") - picture(tmp_path / "b")).abs().max() <= 2 / 127.5
    assert all(not torch.equal(picture(tmp_path / "a"), picture(tmp_path / name)) for name in "cde")
    assert (tmp_path / "a" / "cmp" / "01.png").exists()


@pytest.mark.parametrize("flags", [
    ["--no-dual_training", "--attribute_weight", "0"], ["--dual", "abs", "--decoded", "1", "--gradient_checkpointing"],
    ["--degradation", "a2bfr", "--gradient_accumulation_steps", "2", "--optimizer", "muon", "--learning_rate", "1e-3"]])
def test_variants_of_the_method_train(trained, tmp_path, flags):
    call(*trained.flags, "-o", tmp_path, "--max_train_steps", "1", *flags)
    last = json.loads((tmp_path / "log.jsonl").read_text().splitlines()[-1])
    assert ("diffusion_tar" in last) == ("--no-dual_training" not in flags)
    assert ("attribute_src" in last) == ("--attribute_weight" not in flags)


def test_a_step_in_the_papers_layout_and_the_release_as_its_authors_use_it(trained, release, toy_folder, tmp_path):
    """bf16, both faces one after the other, blocks recomputed; then the LoRA alone, its rank read off the file."""
    out = tmp_path / "out"
    call("train", "--preset", "paper", *TINY, "--max_train_steps", "2", "--batch_size", "1", "--num_workers", "0",
         "--pretrained_model_name_or_path", release, "--pairs", toy_folder / "pairs" / "pairs.jsonl", "-o", out)
    assert any(t.any() for n, t in weights(out).items() if "lora_B" in n)
    sample = ["sample", "-i", trained.faces / "01.png", "--prompt", "a hat", "--num_inference_steps", "2", "--device", "cpu"]
    call(*sample, "--checkpoint", out, "-o", tmp_path / "a")
    call(*sample, "--lora", out / "lora.safetensors", "--pretrained_model_name_or_path", release, "--image_size", "32",
         "--guidance_scale", "3.5", "-o", tmp_path / "b")                            # the run's guidance is 3.5
    assert torch.equal(picture(tmp_path / "a"), picture(tmp_path / "b"))


def test_pairs_are_built_go_on_after_a_kill_and_train(trained, flux, toy_folder, tmp_path):
    """A torn last line and a lost later half: what was listed stays as it is, the rest comes out as before."""
    build = ["pairs", *LOOSE, "--pretrained_model_name_or_path", flux, "--data", toy_folder / "train", "--count", "8"]
    call(*build, "-o", tmp_path / "a")
    rows = ab.read_pairs(tmp_path / "a" / "pairs.jsonl")
    good = [row for row in rows if row["accepted"]]
    assert len(rows) == 16 and good and len({row["person"] for row in rows}) == 8
    for row in rows:
        assert row["accepted"] == (not row["reasons"]) == bool(row["target"]) and (row["accepted"] or row["attempts"] == 6)
    assert len(list((tmp_path / "a" / "target").iterdir())) == len(good) and (tmp_path / "a" / "sheet.png").exists()
    folder = shutil.copytree(tmp_path / "a", tmp_path / "b")
    lines = (folder / "pairs.jsonl").read_text().splitlines(keepends=True)
    (folder / "pairs.jsonl").write_text("".join(lines[:7]) + lines[7][:40])             # killed while writing
    for row in map(json.loads, lines[7:]):
        if row["accepted"]:
            (folder / row["target"]).unlink()
    call(*build, "-o", folder)
    by_id = lambda rows: {row["id"]: {k: v for k, v in row.items() if k != "scores"} for row in rows}
    assert by_id(ab.read_pairs(folder / "pairs.jsonl")) == by_id(rows)
    assert all((folder / row["target"]).exists() for row in good)
    call("train", *TINY, "--pretrained_model_name_or_path", flux, "-o", tmp_path / "c", "--data", folder,
         "--max_train_steps", "1", "--validation_data", toy_folder / "pairs")


def test_the_toy_flux_trains_resumes_and_is_a_flux(toy_folder, tmp_path):
    """toy/flux.py: three steps a stage at once, and stopped after two, write the same folder; A2BFR loads it."""
    train = functools.partial(toy_flux.train, data=str(toy_folder / "train"), device="cpu", sizes=SIZES, batch_size=4,
                              image_size=32, lr_warmup_steps=1, checkpointing_steps=1)
    train(tmp_path / "a", 3, 3, work=str(tmp_path / "work_a"))
    save, patch = common.Run.save, pytest.MonkeyPatch()

    def stopping(run, stage, step, *rest):
        save(run, stage, step, *rest)
        if (stage, step) == ("prior", 1):
            raise KeyboardInterrupt
    with patch.context() as inside:
        inside.setattr(common.Run, "save", stopping)
        with pytest.raises(KeyboardInterrupt):
            train(tmp_path / "b", 3, 3, work=str(tmp_path / "work_b"))
    train(tmp_path / "b", 3, 3, work=str(tmp_path / "work_b"))
    for name in ("vae", "transformer", "text_encoder", "text_encoder_2"):
        (a,), (b,) = ([*(tmp_path / run / name).glob("*.safetensors")] for run in "ab")
        assert same(safetensors.torch.load_file(a), safetensors.torch.load_file(b)), name
    nets = ab.load_networks(ab.Train(pretrained_model_name_or_path=str(tmp_path / "a"), image_size=32), "cpu")
    assert nets["codec"].token == 8 and nets["codec"].scale != 1 and nets["text"].length == 24
    assert (tmp_path / "work_a" / "samples.png").exists()
