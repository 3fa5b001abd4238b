"""A2BFR: closed forms in the paper's order, rewrites, parity with diffusers, prodigyopt and peft; then the program."""
import dataclasses
import functools
import json
import math
import shutil
import subprocess
import sys
from contextlib import nullcontext
from types import SimpleNamespace

import diffusers
import pytest
import safetensors.torch
import torch
import torch.nn as nn
import torch.nn.functional as F
import transformers

import a2bfr as ab
import common
import metrics
from program import KILLED, ROOT, caller, same, toy_pictures, weights
from toy import flux as toy_flux
from toy.faces import toy_faces

f64 = torch.float64
SIZES = dict(vae=dict(block_out_channels=(8, 8, 8), layers_per_block=1, latent_channels=4, norm_num_groups=4),
             transformer=dict(num_layers=1, num_single_layers=1, attention_head_dim=16, num_attention_heads=2,
                              axes_dims_rope=(4, 6, 6)), text=dict(width=32, layers=1, heads=2, length=24))
cpu = SimpleNamespace(device=torch.device("cpu"), autocast=nullcontext)     # what `pair_loss` asks of a Run
# An attribute network that reads twelve logits off the mean brightness, as FaceReader is called
BRIGHT = SimpleNamespace(stages=lambda x: [x], attributes=lambda flat: 4 * flat.mean(1, keepdim=True) * torch.ones(12))


@pytest.fixture(autouse=True)
def seeded():  # every test draws the same numbers, alone or in the suite
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def flux(tmp_path_factory):
    """A tiny random FLUX as toy/flux.py lays it out: 8 px a token, no guidance embedding."""
    toy_flux.new_folder(folder := tmp_path_factory.mktemp("flux"), 0, SIZES)
    return folder


@pytest.fixture(scope="session")
def release(tmp_path_factory):
    """FLUX.1-dev's own layout, saved by diffusers' pipeline, tiny and random: 16 px a token, guidance embedded."""
    folder, words = tmp_path_factory.mktemp("release"), toy_flux.word_tokenizer
    clip, t5 = tiny_text_encoders(transformers.CLIPTextModel)
    diffusers.FluxPipeline(diffusers.FlowMatchEulerDiscreteScheduler(), tiny_vae(), clip, words(77), t5, words(20),
                           tiny_flux(num_layers=1, num_single_layers=1)).save_pretrained(folder)
    return folder


def tiny_flux(**changes):
    """A random FluxTransformer2DModel of two blocks of each kind, tokens of 16 channels; always the same."""
    torch.manual_seed(0)
    sizes = dict(in_channels=16, num_layers=2, num_single_layers=2, attention_head_dim=16, num_attention_heads=2,
                 joint_attention_dim=32, pooled_projection_dim=32, guidance_embeds=True, axes_dims_rope=(4, 4, 8))
    return diffusers.FluxTransformer2DModel(**sizes | changes).eval()


def tiny_text_encoders(kind, width=32):
    torch.manual_seed(0)
    words = len(toy_flux.word_tokenizer(8))
    clip = kind(transformers.CLIPTextConfig(
        vocab_size=words, hidden_size=width, projection_dim=width, intermediate_size=32, num_hidden_layers=2,
        num_attention_heads=2, max_position_embeddings=77, eos_token_id=words - 1, pad_token_id=0, bos_token_id=1))
    t5 = transformers.T5Config(vocab_size=words, d_model=32, d_kv=8, d_ff=32, num_layers=1, num_heads=2)
    return clip.eval(), transformers.T5EncoderModel(t5).eval()


def tiny_vae():
    return diffusers.AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4, block_out_channels=(8,) * 4,
        layers_per_block=1, latent_channels=4, norm_num_groups=4, use_quant_conv=False, use_post_quant_conv=False,
        scaling_factor=0.3611, shift_factor=0.1159)


def inputs():
    """noisy, condition, text, pooled, t, guidance, image_ids, condition_ids."""
    return (torch.randn(2, 16, 16), torch.randn(2, 16, 16), torch.randn(2, 5, 32), torch.randn(2, 32), torch.rand(2),
            torch.full((2,), 3.5), ab.position_ids(4, 4), ab.position_ids(4, 4))


def with_lora(net):
    for p in ab.add_condition_lora(net, 4, 2.0):
        nn.init.normal_(p, std=.2)
    return net


# ---------------------------------------------------------------- sections 4.2 and 4.3: losses
def test_eq1_clean_latents_are_exact_for_the_true_velocity():
    """z_t = (1 - t) z0 + t eps, V = eps - z0; an error e in V costs -t e."""
    (z0, noise, error), t = torch.randn(3, 4, 5, 6, dtype=f64), torch.tensor([0., .3, .9, 1.], dtype=f64)
    z_t = (1 - t.view(4, 1, 1)) * z0 + t.view(4, 1, 1) * noise
    torch.testing.assert_close(ab.predict_clean(z_t, noise - z0 + error, t), z0 - t.view(4, 1, 1) * error)
    torch.testing.assert_close(ab.predict_clean(z_t[..., None], (noise - z0)[..., None], t), z0[..., None])


def test_eq2_attribute_loss_is_the_mean_bce_and_its_floor_the_entropy():
    logits, q = torch.randn(3, 12), torch.rand(3, 12)
    wanted = -(q * logits.sigmoid().log() + (1 - q) * (1 - logits.sigmoid()).log()).mean()
    assert ab.attribute_loss(logits, q).item() == pytest.approx(wanted.item(), rel=1e-5)
    assert ab.attribute_divergence(torch.logit(q.clamp(1e-6, 1 - 1e-6)), q).item() == pytest.approx(0, abs=1e-5)
    assert ab.attribute_divergence(logits, q) > 0


def test_eq3_branch_loss_is_diffusion_plus_lambda_times_attribute():
    """On made-up functions: a velocity that is off by .5, an encoder that reads means."""
    (z0, noise), t, seen = torch.randn(2, 3, 4, 12), torch.tensor([.2, .5, .8]), torch.tensor([0, 2])
    encoder = lambda images: images.mean((1, 2, 3))[:, None] * torch.ones(12)
    losses = lambda seen, attribute_weight, weight: ab.branch_loss(
        lambda z, s: noise - z0 + .5, lambda tokens: ab.unpack(tokens, 4, 4), encoder, z0, noise, t, seen,
        torch.full((3, 12), .25), torch.tensor([1, 2, 3]), weight, attribute_weight)
    loss, score, parts = losses(seen, .7, torch.ones(3))
    read = (z0 - t.view(3, 1, 1) * .5)[seen].mean((1, 2))                             # z0_hat = z0 - t e
    wanted = F.binary_cross_entropy_with_logits(read[:, None].expand(2, 12), torch.full((2, 12), .25))
    assert parts["diffusion"].item() == pytest.approx(.25) and torch.allclose(score, read.sigmoid(), rtol=1.3e-6, atol=1e-5)
    assert loss.item() == pytest.approx(.25 + .7 * wanted.item(), rel=1e-5)
    assert losses(seen[:0], .7, torch.ones(3))[0].item() == pytest.approx(.25)             # nothing read: L_diff alone
    assert losses(seen[:0], 0, torch.tensor([1., 0., 0.]))[0].item() == pytest.approx(.25 / 3)


def test_eq4_the_score_is_that_of_the_edited_attribute():
    logits, edited = torch.randn(4, 12), torch.tensor([0, 11, 5, 5])
    torch.testing.assert_close(ab.edited_score(logits, edited), torch.stack([x[k] for x, k in zip(logits, edited)]).sigmoid())


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


def test_eq5_reversed_scores_are_turned_round_by_the_signed_form_only():
    """Two logits that start on the wrong sides, Eq. 6 with K = 12, lambda = alpha = 1."""
    for sign in (torch.ones(1), None):
        logits = torch.tensor([math.log(.55 / .45), -math.log(.55 / .45)], requires_grad=True)
        optimizer = torch.optim.SGD([logits], .5)
        for _ in range(1000):
            bce = F.binary_cross_entropy_with_logits(logits, torch.tensor([.05, .95]), reduction="sum") / 12
            score = logits.sigmoid()
            optimizer.zero_grad()
            (bce + ab.dual_margin_loss(score[:1], score[1:], .5, sign)).backward()
            optimizer.step()
        assert (logits[1] > logits[0]).item() == (sign is not None)


def test_eq6_total_is_the_sum_and_two_passes_have_its_gradient():
    w, rows = torch.randn(5, dtype=f64), torch.randn(2, 5, dtype=f64)
    def run(backward, weight=.7):
        x, graphs = w.clone().requires_grad_(True), []
        def side(i):
            value = (rows[i] * x).tanh()
            graphs.append(value.requires_grad)
            return value.square().sum(), value.sum().sigmoid()[None]
        dual = lambda a, b: ab.dual_margin_loss(a, b, .9, torch.ones(1))
        loss, gap = ab.dual_training_loss(lambda: side(0), lambda: side(1), dual, weight, backward)
        loss.backward()
        return x.grad, loss.item(), gap.item(), graphs

    for weight, passes in ((.7, [False, True, True]), (0.0, [True, True])):        # nothing is compared: no third pass
        (joint, total, gap, _), (split, _, gap2, graphs) = run(None, weight), run(torch.Tensor.backward, weight)
        torch.testing.assert_close(joint, split)
        assert gap == pytest.approx(gap2) and gap > 0 and graphs == passes
        assert total == pytest.approx(sum((row * w).tanh().square().sum().item() for row in rows) + weight * gap)


# ---------------------------------------------------------------- section 4.1: model
def test_codec_packs_and_places_tokens_as_flux_does():
    z, ids = torch.randn(2, 3, 8, 6), ab.position_ids(4, 3)
    tokens = ab.pack(z)
    assert torch.equal(tokens, diffusers.FluxPipeline._pack_latents(z, 2, 3, 8, 6)) and torch.equal(ab.unpack(tokens, 8, 6), z)
    assert torch.equal(tokens[0, 4], z[0, :, 2:4, 2:4].reshape(-1))                    # (c, dy, dx), c slowest
    assert torch.equal(ids, diffusers.FluxPipeline._prepare_latent_image_ids(2, 4, 3, "cpu", torch.float32))
    codec, x = ab.Codec(tiny_vae(), 0.1159, 0.3611), torch.rand(2, 3, 32, 32) * 2 - 1
    with torch.no_grad():
        posterior, tokens, sampled = codec.vae.encode(x).latent_dist, codec.encode(x), codec.encode(x, torch.ones_like)
        torch.testing.assert_close(tokens, ab.pack((posterior.mean - 0.1159) * 0.3611))
        torch.testing.assert_close(codec.decode(tokens), codec.vae.decode(posterior.mean).sample, atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(sampled, ab.pack((posterior.mean + posterior.std - 0.1159) * 0.3611))
    noise = codec.noise(32, [5, 6])
    assert noise.shape == tokens.shape and torch.equal(noise[1], codec.noise(32, [6])[0])


@pytest.mark.parametrize("guidance", [True, False])
def test_without_condition_and_lora_it_is_flux(guidance):
    """In bf16 too: diffusers gives t and guidance the type of the weights, then multiplies by 1000: 3.5 is 3504."""
    net, (noisy, _, text, pooled, t, g, ids, _) = tiny_flux(guidance_embeds=guidance), inputs()
    ours = lambda: ab.flux_velocity(net, noisy, None, text, pooled, t, g, ids, None)
    theirs = lambda noisy, text, pooled: net(
        hidden_states=noisy, encoder_hidden_states=text, pooled_projections=pooled, timestep=t, img_ids=ids,
        txt_ids=torch.zeros(5, 3), guidance=g if guidance else None).sample.float()
    with torch.no_grad():
        before, wanted = ours(), theirs(noisy, text, pooled)
        torch.testing.assert_close(before, wanted, atol=1e-5, rtol=0)
        with_lora(net)                      # a LoRA without a condition touches nothing but the order of sums over threads
        torch.testing.assert_close((ours(), theirs(noisy, text, pooled)), (before, wanted), atol=2e-6, rtol=0)
        net = tiny_flux(guidance_embeds=guidance).bfloat16()
        wanted = theirs(noisy.bfloat16(), text.bfloat16(), pooled.bfloat16())
        torch.testing.assert_close(ours(), wanted, atol=2 ** -7 * wanted.abs().max().item(), rtol=0)


def branch(net, adapted, text, image, condition, temb, temb0, ids):
    """OminiControl with three separate branches, plain loops: `net` for text and image, `adapted` (LoRA merged) for the
    condition. Written apart from a2bfr.flux_velocity."""
    modulate = lambda linear, signal, parts: [m[:, None] for m in linear(F.silu(signal)).chunk(parts, -1)]
    def rope(x, positions):
        cos, sin = net.pos_embed(positions)
        return x * cos[:, None] + torch.stack([-x[..., 1::2], x[..., 0::2]], -1).flatten(-2) * sin[:, None]
    def project(attn, x, positions, added=False):
        names = ("add_q_proj", "add_k_proj", "add_v_proj") if added else ("to_q", "to_k", "to_v")
        q, k, v = (getattr(attn, n)(x).view(*x.shape[:2], attn.heads, -1) for n in names)
        norms = (attn.norm_added_q, attn.norm_added_k) if added else (attn.norm_q, attn.norm_k)
        return rope(norms[0](q), positions), rope(norms[1](k), positions), v
    def attend(parts):
        found = []
        for q, _, _ in parts:
            k, v = (torch.cat([p[i] for p in parts], 1) for i in (1, 2))
            shares = (torch.einsum("bnhd,bmhd->bhnm", q, k) / q.shape[-1] ** .5).softmax(-1)
            found.append(torch.einsum("bhnm,bmhd->bnhd", shares, v).flatten(2))
        return found

    places, x = [torch.zeros(text.shape[1], 3), *ids], [text, image, condition]
    for block, lora in zip(net.transformer_blocks, adapted.transformer_blocks):
        streams = [(block.norm1_context, block.norm2_context, block.ff_context, block.attn.to_add_out, block, temb),
                   (block.norm1, block.norm2, block.ff, block.attn.to_out[0], block, temb),
                   (lora.norm1, lora.norm2, lora.ff, lora.attn.to_out[0], lora, temb0)]
        mods = [modulate(norm.linear, signal, 6) for norm, *_, signal in streams]
        normed = [s[0].norm(h) * (1 + m[1]) + m[0] for s, h, m in zip(streams, x, mods)]
        outs = attend([project(s[4].attn, h, p, i == 0) for i, (s, h, p) in enumerate(zip(streams, normed, places))])
        x = [h + m[2] * s[3](o) for s, h, m, o in zip(streams, x, mods, outs)]
        x = [h + m[5] * s[2](s[1](h) * (1 + m[4]) + m[3]) for s, h, m in zip(streams, x, mods)]
    for block, lora in zip(net.single_transformer_blocks, adapted.single_transformer_blocks):
        blocks = [(block, temb), (block, temb), (lora, temb0)]
        mods = [modulate(b.norm.linear, signal, 3) for b, signal in blocks]
        normed = [b.norm.norm(h) * (1 + m[1]) + m[0] for (b, _), h, m in zip(blocks, x, mods)]
        outs = attend([project(b.attn, h, p) for (b, _), h, p in zip(blocks, normed, places)])
        x = [h + m[2] * b.proj_out(torch.cat([o, F.gelu(b.proj_mlp(n), approximate="tanh")], 2))
             for (b, _), h, m, n, o in zip(blocks, x, mods, normed, outs)]
    return net.proj_out(net.norm_out(x[1], temb))


def test_one_sequence_equals_three_branches_with_lora_on_the_condition():
    plain, merged, net = tiny_flux(), tiny_flux(), with_lora(tiny_flux())
    for name in ab.condition_layers(net):
        layer = net.get_submodule(name)
        merged.get_submodule(name).weight.data += 2 / 4 * layer.lora_B.weight.data @ layer.lora_A.weight.data   # alpha / rank
    noisy, condition, text, pooled, t, g, ids, condition_ids = args = inputs()
    clock = lambda t, g: plain.time_text_embed(1000 * t, 1000 * g, pooled)
    with torch.no_grad():
        wanted = branch(plain, merged, plain.context_embedder(text), plain.x_embedder(noisy), merged.x_embedder(condition),
                        clock(t, g), clock(0 * t, 0 * t + 1), (ids, condition_ids))
        torch.testing.assert_close(ab.flux_velocity(net, *args), wanted, atol=2e-5, rtol=0)


def test_a_fresh_lora_changes_nothing():
    plain, net, args = tiny_flux(), tiny_flux(), list(inputs())
    new = ab.add_condition_lora(net, 4, 4)
    assert {id(p) for p in new} == {id(p) for p in net.parameters() if p.requires_grad}
    with torch.no_grad():
        torch.testing.assert_close(ab.flux_velocity(net, *args), ab.flux_velocity(plain, *args), atol=1e-6, rtol=0)


def test_paper_size_has_231_8_million_trainable_parameters_on_released_names_and_defaults_are_as_printed():
    """Section 5.1; thresholds of section 3.1. DIFFERS: LoRA alpha."""
    train, pairs = ab.Train(), ab.BuildPairs()
    with torch.device("meta"):
        net = diffusers.FluxTransformer2DModel(guidance_embeds=True)
        released = set(net.state_dict())
        new = ab.add_condition_lora(net, train.rank, train.rank)
    names = ab.condition_layers(net)
    assert len(names) == 343 and sum(p.numel() for p in new) == 231_804_928
    assert sum(p.numel() for p in net.parameters()) - 231_804_928 == 11_901_408_320
    assert {name.replace(".base.", ".") for name in net.state_dict() if "lora_" not in name} == released
    assert set(ab.lora_tensors(net)) == {f"transformer.{name}.{m}.weight" for name in names for m in ("lora_A", "lora_B")}
    assert (train.rank, train.max_train_steps, train.batch_size, train.image_size) == (64, 60_000, 1, 512)
    assert (train.drop_text, train.drop_condition, train.optimizer, train.learning_rate) == (.01, .01, "prodigy", 1.0)
    assert pairs.count * pairs.edits == 35_000 and (pairs.positive, pairs.negative, pairs.editor) == (.6, .4, "sd3")


def test_lora_file_has_the_layout_of_the_release_survives_the_round_trip_and_diffusers_reads_it(tmp_path):
    net, other, plain, path, args = with_lora(tiny_flux()), tiny_flux(), tiny_flux(), tmp_path / "lora.safetensors", inputs()
    common.save_part(path, ab.lora_tensors(net))
    state, x = safetensors.torch.load_file(path), torch.randn(2, 3, 32)
    assert len(state) == 2 * len(ab.condition_layers(net)) and not any("alpha" in n for n in state) and ab.lora_rank(path) == 4
    assert state["transformer.single_transformer_blocks.1.norm.linear.lora_B.weight"].shape == (96, 4)
    ab.add_condition_lora(other, 4, 8)                                              # at any scale of the layers
    ab.load_lora(other, path)
    with torch.no_grad():
        torch.testing.assert_close(ab.flux_velocity(other, *args), ab.flux_velocity(net, *args), atol=1e-6, rtol=0)
        pytest.importorskip("peft", reason="diffusers reads LoRA files with peft only")
        state = diffusers.FluxPipeline.lora_state_dict(str(tmp_path), weight_name=path.name)
        diffusers.FluxPipeline.load_lora_into_transformer(state, None, plain)       # theirs acts on all tokens
        theirs, ours = plain.transformer_blocks[0].attn.to_q(x), net.transformer_blocks[0].attn.to_q(x, 0)
        torch.testing.assert_close(theirs, ours, atol=1e-6, rtol=0)


def test_flux_text_equals_diffusers_own_and_says_what_it_cannot_read(release):
    pipe, ours = diffusers.FluxPipeline.from_pretrained(release), ab.FluxText(str(release), dtype=torch.float32)
    prompts = ["a photo of a smiling person", "", "eyeglasses"]
    with torch.no_grad():
        wanted = pipe.encode_prompt(prompts, None, max_sequence_length=20)[:2]
    torch.testing.assert_close(tuple(ours.encode(prompts)), wanted, atol=1e-5, rtol=0)
    assert ours.unread(ab.TEMPLATE) == "" and "zebra" in ours.unread("a zebra") and "last 5" in ours.unread("a hat " * 12)


@pytest.fixture
def tiny(flux, toy_folder):
    """(configuration, networks, three pairs) of the tiny FLUX with a LoRA that is not zero; 32 px are 16 tokens."""
    cfg = ab.Train(image_size=32, rank=4, drop_text=0.0, drop_condition=0.0, mixed_precision="no", device="cpu", time_shift=4.0,
                   num_inference_steps=4, guidance_scale=1.0, pretrained_model_name_or_path=str(flux))
    nets, path = ab.load_networks(cfg, "cpu"), toy_folder / "pairs" / "pairs.jsonl"
    nets["codec"].vae.encoder.conv_out.bias.data[4:] = -30                              # a posterior without spread
    ab.add_condition_lora(nets["prior"], 4, 4)
    for name in ab.condition_layers(nets["prior"]):
        nn.init.normal_(nets["prior"].get_submodule(name).lora_B.weight, std=.1)
    return cfg, nets, ab.Pairs(path.parent, ab.accepted(path), 32, "toy").held_out(3)


def test_branches_share_condition_time_and_noise_and_two_passes_with_recomputed_blocks_have_their_gradient(tiny, monkeypatch):
    (cfg, nets, batch), seen, found, original = tiny, [], [], ab.flux_velocity
    for backward in (None, lambda loss: loss.backward()):
        torch.manual_seed(3)
        nets["prior"].zero_grad()
        nets["prior"].gradient_checkpointing = backward is not None
        ab.pair_loss(cfg, cpu, nets, BRIGHT, batch, backward)[0].backward()
        found.append(torch.cat([p.grad.flatten() for p in nets["prior"].parameters() if p.requires_grad]))
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-7)
    assert found[0].norm() > 0
    monkeypatch.setattr(ab, "flux_velocity", lambda *a: seen.append(a) or original(*a))
    ab.pair_loss(cfg, cpu, nets, BRIGHT, batch)
    (_, z_src, c_src, text_src, _, t_src, *_), (_, z_tar, c_tar, text_tar, _, t_tar, *_) = seen
    assert torch.equal(c_src, c_tar) and torch.equal(t_src, t_tar) and not torch.equal(text_src, text_tar)
    assert z_src.shape == z_tar.shape and not torch.equal(z_src, z_tar)


def test_eq5_margin_is_at_most_what_the_clean_faces_differ_in_the_asked_direction(tiny, monkeypatch):
    """And 0 where the encoder sees the pair the other way; as printed it is one number."""
    (cfg, nets, batch), margins = tiny, []
    monkeypatch.setattr(ab, "READ_UNTIL", 1.0)
    monkeypatch.setattr(ab, "dual_margin_loss", lambda a, b, m, sign=None: margins.append(m) or (a - b).sum())
    source, target = (ab.read_attributes(BRIGHT, batch[key]).sigmoid()[:, 0] for key in ("hq", "hq_tar"))
    for sign in (1.0, -1.0):
        ab.pair_loss(cfg, cpu, nets, BRIGHT, dict(batch, sign=torch.full((3,), sign)))
        torch.testing.assert_close(margins[-1], (sign * (target - source)).clamp(0, cfg.dual_margin))
    ab.pair_loss(dataclasses.replace(cfg, dual="abs"), cpu, nets, BRIGHT, batch)
    assert margins[-1] == cfg.dual_margin


def test_dropped_prompts_black_conditions_and_what_is_read(tiny, monkeypatch):
    """A dropped prompt is the template on both sides, its face is not read and its target has no L_diff; late times are not read."""
    cfg, nets, batch = dataclasses.replace(tiny[0], drop_text=.3, drop_condition=.2), *tiny[1:]
    batch = {k: v.repeat(100, *[1] * (v.dim() - 1)) if torch.is_tensor(v) else v * 100 for k, v in batch.items()}
    seen, losses, original, loss = [], [], ab.flux_velocity, ab.branch_loss
    monkeypatch.setattr(ab, "flux_velocity", lambda *a: seen.append(a) or original(*a))
    monkeypatch.setattr(ab, "branch_loss", lambda *a: losses.append(a) or loss(*a))
    with torch.no_grad():
        ab.pair_loss(cfg, cpu, nets, BRIGHT, batch)
        black, plain = nets["codec"].encode(torch.full((1, 3, 32, 32), -1.)), nets["text"].encode([ab.TEMPLATE])[0]
        (_, _, condition, text, *_), (_, _, _, text_tar, *_) = seen
        dark, silent, silent_tar = ((x - y).flatten(1).norm(dim=1) < 1e-3
                                    for x, y in ((condition, black), (text, plain), (text_tar, plain)))
        assert dark.float().mean().item() == pytest.approx(.2, abs=.06)
        assert silent.float().mean().item() == pytest.approx(.3, abs=.08) and torch.equal(silent, silent_tar)
        assert torch.equal(losses[0][6], (~silent & (losses[0][5] <= ab.READ_UNTIL)).nonzero()[:, 0])
        assert losses[0][9].all() and torch.equal(losses[1][9] > 0, ~silent)
        _, parts = ab.pair_loss(dataclasses.replace(cfg, dual_training=False), cpu, nets, BRIGHT, batch)
    assert parts.keys() == {"diffusion_src", "attribute_src", "attribute_kl_src"} and len(losses) == 3        # Eq. 3 alone
    for shift, median in ((1.0, .5), (4.0, .8)):                    # s t / (1 + (s - 1) t) of 1/2
        assert (ab.draw_times(10 ** 5, shift, "cpu").median() - median).abs() < .01


def test_overfitting_two_pairs_separates_the_scores_in_the_right_order(tiny, monkeypatch):
    """With a codec of mean colours and a brightness reader losses fall, and A_tar - A_src gets the sign of the pair."""
    cfg, nets, batch = dataclasses.replace(tiny[0], attribute_weight=1.0, dual_weight=1.0), *tiny[1:]
    monkeypatch.setattr(ab, "READ_UNTIL", 1.0)
    nets["codec"] = SimpleNamespace(
        token=8, encode=lambda images, noise=None: ab.pack(F.pad(F.avg_pool2d(images, 4), (0, 0, 0, 0, 0, 1))),
        decode=lambda tokens: F.interpolate(ab.unpack(tokens, 8, 8)[:, :3], scale_factor=4.0))
    bright = torch.tensor([.7, -.7]).view(2, 1, 1, 1).expand(2, 3, 32, 32)
    batch = {k: v[:2] for k, v in batch.items()} | dict(hq=-bright, hq_tar=bright, sign=torch.tensor([1., -1.]))
    optimizer, history = torch.optim.Adam([p for p in nets["prior"].parameters() if p.requires_grad], 1e-2), []
    for step in range(120):
        torch.manual_seed(step % 4)
        loss, parts = ab.pair_loss(cfg, cpu, nets, BRIGHT, batch)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        history.append([loss.item(), parts["dual"].item()])
    first, last = torch.tensor(history[:4]).mean(0), torch.tensor(history[-4:]).mean(0)
    assert (last < .8 * first).all() and last[1] < cfg.dual_margin      # max(0, m - s (A_tar - A_src)) < m: the right sign


def test_attributes_are_read_in_our_order_with_a_gradient_and_farl_reads_twelve_of_forty():
    reader, x = metrics.load_reader("a"), toy_faces(torch.arange(4), torch.arange(4)).image.requires_grad_(True)
    logits = ab.read_attributes(reader, x)
    torch.testing.assert_close(logits.sigmoid(), reader.probabilities(x))
    assert torch.autograd.grad(logits.sum(), x)[0].abs().sum() > 0
    with torch.device("meta"):
        farl = metrics.FaRLAttributes()
    farl = farl.to_empty(device="cpu")
    [nn.init.normal_(p, std=.02) for p in farl.parameters()]
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):     # which read_attributes switches off
        found = ab.read_attributes(farl, x[:1])
    with torch.no_grad():
        wanted = farl.probabilities(x[:1])[:, [39, 31, 21, 15, 5, 33, 32, 8, 9, 11, 17, 35]]
    torch.testing.assert_close(found.sigmoid(), wanted)


def quadratic(optimizer_class, steps, **options):
    """d and parameters of a least-squares fit; the second tensor starts at zero, as a LoRA's B does."""
    torch.manual_seed(1)
    x, y, ds = torch.randn(64, 8), torch.randn(64, 4), []
    a, b = nn.Parameter(torch.randn(8, 3) / 3), nn.Parameter(torch.zeros(3, 4))
    optimizer = optimizer_class([a, b], **options)
    for _ in range(steps):
        optimizer.zero_grad()
        (x @ a @ b - y).square().mean().backward()
        optimizer.step()
        ds.append(optimizer.param_groups[0]["d"])
    return ds, torch.cat([a.detach().flatten(), b.detach().flatten()])


def test_prodigy_is_prodigyopt_to_the_bit():
    prodigyopt = pytest.importorskip("prodigyopt", reason="parity only where prodigyopt is installed")
    for options in (dict(), dict(weight_decay=.01, use_bias_correction=True, safeguard_warmup=True),
                    dict(growth_rate=1.02, d0=1e-4), dict(d_coef=.5, betas=(.9, .99), weight_decay=.1, lr=.5)):
        ours, theirs = quadratic(ab.Prodigy, 50, **options), quadratic(prodigyopt.Prodigy, 50, **options)
        assert ours[0] == theirs[0] and torch.equal(ours[1], theirs[1])


def test_prodigy_first_step_by_hand_and_a_frozen_sequence_that_never_lowers_d():
    """First d stays d0, m = d0 (1 - b1) g, v = d0^2 (1 - b2) g^2: the step is d0 lr m / (sqrt v + d0 eps)."""
    start, g = torch.tensor([1., -2.], dtype=f64), torch.tensor([.5, 4.], dtype=f64)
    p = nn.Parameter(start.clone())
    p.grad = g.clone()
    ab.Prodigy([p], lr=1.0, d0=1e-3).step()
    torch.testing.assert_close(p.detach(), start - 1e-3 * (.1 * g) / ((.001 * g * g).sqrt() + 1e-8))
    ds, _ = quadratic(ab.Prodigy, 120, weight_decay=.01, use_bias_correction=True, safeguard_warmup=True)
    assert all(b >= a for a, b in zip(ds, ds[1:])) and ds[0] == 1e-6
    frozen = {10: 1e-06, 20: 1.75464e-06, 30: 6.54334e-06, 50: 0.000198783, 80: 0.00921718, 120: 0.036639}
    assert [ds[step - 1] for step in frozen] == pytest.approx(list(frozen.values()), rel=1e-3, abs=0)


def test_schedules_are_those_of_diffusers_and_euler_is_exact_on_straight_paths():
    flux = diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, shift=3.0)
    flux.set_timesteps(sigmas=torch.linspace(1, 1 / 28, 28).tolist(), mu=.63)
    torch.testing.assert_close(ab.flux_sigmas(28, 1024), flux.sigmas, atol=1e-6, rtol=0)
    sd3 = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)
    sd3.set_timesteps(50)
    torch.testing.assert_close(ab.sd3_sigmas(50), sd3.sigmas, atol=2e-4, rtol=0)
    z0, noise = torch.randn(2, 3, 4, 5)
    torch.testing.assert_close(ab.euler_sample(lambda x, t: noise - z0, noise, ab.flux_sigmas(3, 4)), z0)


def test_flow_edit_moves_a_gaussian_as_computed():
    """N(0, 1) -> N(3, 1) on SD3's schedule (facts 4.2): monotone in blend and n_max, 0 is the identity; noise is per row."""
    def velocity(x, t, mean):  # E[eps - x0 | x_t] for x0 ~ N(mean, 1)
        t = t.view(-1, *[1] * (x.dim() - 1))
        return (2 * t - 1) / ((1 - t) ** 2 + t ** 2) * (x - (1 - t) * mean) - mean
    rngs = lambda *seeds: [torch.Generator().manual_seed(s) for s in seeds]
    rough = lambda rows, *seeds: ab.flow_edit(lambda x, t, mean: velocity(x, t, mean) + (x * (3 + mean)).sin(), rows, 0., 2.,
                                              ab.flux_sigmas(10, 16), 8, n_avg=2, generator=rngs(*seeds))
    x = torch.randn(3, 2, 4)
    torch.testing.assert_close(rough(x, 1, 2, 3)[1:2], rough(x[1:2], 2))
    x = torch.randn(4096, 1)
    for a, n, shift in ((0, 50, 0), (.25, 50, .64), (.5, 50, 1.35), (.75, 50, 2.13), (1, 50, 3), (1, 33, 2.51), (1, 15, 1.21)):
        moved = ab.flow_edit(velocity, x, 0., 3., ab.sd3_sigmas(50), n, blend=a, generator=rngs(0)[0]) - x
        assert moved.mean().item() == pytest.approx(shift, abs=.08) and (a or not moved.any())


def test_restore_adds_both_kinds_of_guidance(tiny):
    """v + (s - 1)(v - v_negative) + (s' - 1)(v - v_black) of every Euler step; scales of one leave the plain velocity."""
    cfg, nets, _ = tiny
    lq, prompts, negative = toy_faces([1, 2], [3, 4], size=32).image, ["a hat", "a photo of a smiling person"], "bangs"
    noise, sigmas = nets["codec"].noise(32, [0, 1]), ab.flux_sigmas(4, 16)
    with torch.no_grad():
        condition, black = nets["codec"].encode(lq), nets["codec"].encode(torch.full_like(lq, -1))
        asked, against = (ab.Prompt(*nets["text"].encode(said)) for said in (prompts, [negative] * 2))
        for s, image in ((1., 1.), (2., 1.), (1., 1.5), (3., 1.5)):
            z, cfg = noise, dataclasses.replace(cfg, true_cfg_scale=s, image_guidance_scale=image)
            for now, after in zip(sigmas, sigmas[1:]):
                ask = functools.partial(ab.velocity, nets, z, now.expand(2))
                v = ask(asked, condition)
                z = z + (after - now) * (v + (s - 1) * (v - ask(against, condition)) + (image - 1) * (v - ask(asked, black)))
            found = ab.restore(nets, cfg, lq, prompts, noise, negative)
            torch.testing.assert_close(found, nets["codec"].decode(z).clamp(-1, 1), atol=1e-4, rtol=0)


def test_a_compiled_velocity_is_the_velocity(monkeypatch):
    """With a gradient, under the LoRA, and the transformer keeps its names. aot_eager: all of torch.compile but C++."""
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))
    noisy, condition, text, pooled, t, *_ = inputs()
    nets, found = dict(prior=with_lora(tiny_flux(num_layers=1, num_single_layers=1))), []
    names = list(nets["prior"].state_dict())
    for nets["prior"].compiled in (False, True):
        v = ab.velocity(nets, noisy, t, ab.Prompt(text, pooled), condition)
        found.append((v, torch.autograd.grad(v.square().sum(), nets["prior"].x_embedder.lora_A.weight)[0]))
    torch.testing.assert_close(*found, atol=1e-4, rtol=1e-4)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] and list(nets["prior"].state_dict()) == names


# ---------------------------------------------------------------- section 3.1: pairs
def test_thresholds_decide_what_can_be_edited_switching_turns_siblings_off_and_the_check_forgives_them():
    scores = [.9, .1, .5, .61, .39, .8, .2, .1, .2, .7, .3, .05]
    assert ab.editable(scores) == [0, 1, 3, 4, 6, 7, 8, 10, 11]                 # .5 is unknown; brown and wavy are on
    after, sign = ab.switch(scores, 8)
    assert sign == 1 and after[7:11] == [0, 1, 0, 0] and after[:7] == scores[:7]
    assert ab.switch(scores, 6)[0][5:7] == [0, 1] and ab.switch(scores, 0) == ([0, *scores[1:]], -1)
    assert set(ab.others_of(8)) == set(range(12)) - {7, 8, 9, 10} and set(ab.others_of(0)) == set(range(1, 12))
    on, off = [.9, .9] + [.1] * 10, [.9, .1] + [.1] * 10
    good = dict(source=off, target=on, edited=1, sign=1, identity=.7, structure=.8, shift=.02)
    assert not ab.quality_check(**good)[1]
    bad = (dict(target=[.9, .5] + [.1] * 10), dict(source=on, sign=-1), dict(source=[.9, .8] + [.1] * 10),
           dict(target=on[:11] + [math.nan]), dict(target=[.5, .9] + [.1] * 10), dict(identity=.39), dict(structure=.4),
           dict(shift=.2), dict(identity=math.nan))
    assert all(len(ab.quality_check(**good | change)[1]) == 1 for change in bad)
    source, target = [.9] * 7 + [.1, .1, .9, .1, .1], [.9] * 7 + [.1, .9, .1, .1, .1]    # blond on, brown off with it
    assert [len(ab.quality_check(source, target, *edit, .7, .8, .02)[1]) for edit in ((8, 1), (0, -1))] == [0, 2]


def test_pairs_of_the_toy_world_as_batches(toy_folder, tmp_path):
    """Batches cover an epoch, both faces share one degraded image; people are held out whole, bad rows left out."""
    folder = shutil.copytree(toy_folder / "pairs", tmp_path / "pairs")
    rows = [dict(row, person=k % 5) for k, row in enumerate(ab.read_pairs(folder / "pairs.jsonl"))]
    rows += [rows[0] | bad for bad in (dict(accepted=False, target=None), dict(target="gone.png"), dict(attribute="Horns"))]
    (folder / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows) + '{"half')
    cfg = ab.Train(pairs=str(folder / "pairs.jsonl"), image_size=32, degradation="toy")
    training, held = ab.open_pairs(cfg)
    assert {row["person"] for row in held.rows} == {4} and {row["person"] for row in training.rows} == {0, 1, 2, 3}
    assert len(training.rows) + len(held.rows) == 20
    whole = [training.training(4, 1, step, rank, 2) for step in range(2) for rank in range(2)]
    assert sorted(p for b in whole for p in b["source_prompts"]) == sorted(row["source_prompt"] for row in training.rows)
    batch, single = whole[2], ab.open_pairs(dataclasses.replace(cfg, dual_training=False))[0].training(4, 1, 1, 0, 2)
    for i, seed in enumerate(batch["seeds"].tolist()):              # Table 4's rows without SDT: one face, its own prompt
        face, prompt, sign = ("hq", "source_prompts", 1) if seed % 2 else ("hq_tar", "target_prompts", -1)
        assert torch.equal(single["hq"][i], batch[face][i]) and single["source_prompts"][i] == batch[prompt][i]
        assert single["sign"][i] == sign * batch["sign"][i]
    for b in (batch, single):
        assert torch.equal(b["lq"], common.degrade(b["hq"], common.DEGRADATIONS["toy"], b["seeds"]))
    scores = metrics.load_reader("b").probabilities(batch["hq_tar"])[range(4), batch["edited"]]
    assert ((scores > .5) == (batch["sign"] > 0)).float().mean() >= .75


def test_sd3_edits_on_its_own_classes(tmp_path):
    """FlowEdit with a tiny random SD3 folder: blend 0 gives the autoencoder's picture back, 1 does not."""
    net = diffusers.SD3Transformer2DModel(
        sample_size=4, patch_size=2, in_channels=4, num_layers=1, attention_head_dim=8, num_attention_heads=2, out_channels=4,
        joint_attention_dim=32, caption_projection_dim=16, pooled_projection_dim=32, pos_embed_max_size=8)
    (clip, t5), (clip2, _) = (tiny_text_encoders(transformers.CLIPTextModelWithProjection, 16) for _ in range(2))
    short, long, schedule = toy_flux.word_tokenizer(77), toy_flux.word_tokenizer(256), diffusers.FlowMatchEulerDiscreteScheduler
    diffusers.StableDiffusion3Pipeline(net, schedule(shift=3.0), tiny_vae(), clip, short, clip2, short, t5,
                                       long).save_pretrained(tmp_path)
    editor = ab.sd3_editor(str(tmp_path), 6, "cpu", torch.float32)
    x, cfg, asked = toy_faces([1, 2], [1, 2], size=32).image, ab.BuildPairs(n_max=5), ["a hat", "bangs"]
    edit = lambda blend: ab.edit_faces(editor, cfg, blend, "cpu", x, ["a person"] * 2, asked, [1, 2])
    with torch.no_grad():
        plain = editor.decode(editor.encode(x))
    torch.testing.assert_close(edit(0.0), plain)
    assert not torch.allclose(edit(1.0), plain, atol=1e-3)


# ---------------------------------------------------------------- the program
TINY = ["--image_size", "32", "--max_train_steps", "4", "--batch_size", "4", "--rank", "4", "--log_steps", "1",
        "--validation_faces", "2", "--num_inference_steps", "2", "--device", "cpu", "--optimizer", "prodigy", "--learning_rate", "1"]
call, refused = caller(ab, libraries_talk=True)
picture = lambda folder: common.read_image(folder / "restored_faces" / "01.png")


@pytest.fixture(scope="module")
def trained(flux, toy_folder, tmp_path_factory):
    """One tiny run, a folder of toy pictures beside it, and the flags that repeat it."""
    folder = tmp_path_factory.mktemp("run")
    flags = ["train", *TINY, "--pretrained_model_name_or_path", flux, "--pairs", toy_folder / "pairs" / "pairs.jsonl"]
    call(*flags, "-o", folder / "out")
    toy_pictures(folder / "faces", 3)
    return SimpleNamespace(out=folder / "out", faces=folder / "faces", flags=flags)


@pytest.mark.parametrize("name, label", [("a", "attributes"), ("b", "identity")])
def test_readers_that_never_learned_a_label_are_refused_before_training(trained, tmp_path, capsys, name, label):
    for other in "ab":
        about = {"not_trained": json.dumps([label])} if other == name else {}
        common.save_part(tmp_path / "readers" / f"reader_{other}.safetensors", metrics.load_reader(other).state_dict(), about)
    line = refused(capsys, *trained.flags, "--readers", tmp_path / "readers", "-o", tmp_path / "out")
    assert f"reader_{name}.safetensors: was trained without {label}" in line and not (tmp_path / "out").exists()


def test_training_leaves_weights_numbers_and_pictures(trained):
    names, numbers = {p.name for p in trained.out.iterdir()}, json.loads((trained.out / "metrics.json").read_text())
    assert names == {*"lora.safetensors config.json metrics.json samples.png samples_prompts.png log.jsonl".split()}
    assert set(numbers["rows"]) == {"lq", "source", "target", "template", "edited", "autoencoder"} and numbers["faces"] == 2
    assert 0 <= numbers["rows"]["target"]["attribute_accuracy_toy"] <= 1 and numbers["main"] == "target"
    assert sum(n for _, n in numbers["per_attribute"]["target"].values()) == 2
    assert any(t.any() for n, t in weights(trained.out).items() if "lora_B" in n)
    last = json.loads((trained.out / "log.jsonl").read_text().splitlines()[-1])
    assert {"diffusion_src", "diffusion_tar", "dual", "prodigy_d"} <= last.keys()


def test_a_killed_run_goes_on_to_the_same_weights(trained, tmp_path):
    """SIGKILL after the second step, then --resume_from_checkpoint latest: bit by bit the uninterrupted run."""
    flags = [*trained.flags, "--checkpointing_steps", "1", "-o", tmp_path]
    text = KILLED.replace('{method}.SIZES["toy"] = {sizes}\n', "").format(method="a2bfr", stage="lora", step=2)
    ended = subprocess.run([sys.executable, "-c", text, *map(str, flags)], cwd=ROOT, capture_output=True, text=True)
    assert ended.returncode == -9 and not weights(tmp_path), ended.stderr[-2000:]
    call(*flags, "--resume_from_checkpoint", "latest")
    assert same(weights(trained.out), weights(tmp_path))


def test_the_stage_alone_equals_all_and_a_finished_one_is_taken_as_it_is(trained, tmp_path, capsys):
    call(*trained.flags, "-o", tmp_path, "--stage", "lora")
    assert same(weights(trained.out), weights(tmp_path))
    call(*trained.flags, "-o", tmp_path, "--resume_from_checkpoint", "latest")
    assert "stage lora: taken as it is" in capsys.readouterr().out and same(weights(trained.out), weights(tmp_path))


def test_sampling_depends_on_prompt_and_seed_and_on_nothing_else(trained, tmp_path):
    def run(name, *flags):
        call("sample", "-i", trained.faces, "-o", tmp_path / name, "--checkpoint", trained.out, "--device", "cpu", *flags)
        return picture(tmp_path / name)
    first = run("a")
    assert (first - run("b", "--batch_size", "1")).abs().max() <= 2 / 127.5 and (tmp_path / "a" / "cmp" / "01.png").exists()
    for flags in (["--seed", "1"], ["--prompt", "a smiling person with bangs"],
                  ["--true_cfg_scale", "3", "--negative_prompt", "a hat", "--image_guidance_scale", "1.5"]):
        assert not torch.equal(first, run(flags[0], *flags))


def test_a_step_in_the_papers_layout_and_the_release_as_its_authors_use_it(trained, release, toy_folder, tmp_path):
    """bf16, both faces one after the other, blocks recomputed; then the LoRA alone, its rank read off the file."""
    out, pairs = tmp_path / "out", toy_folder / "pairs" / "pairs.jsonl"
    call("train", "--preset", "paper", *TINY, "--max_train_steps", "2", "--batch_size", "1", "--num_workers", "0",
         "--pretrained_model_name_or_path", release, "--pairs", pairs, "-o", out)
    assert any(t.any() for n, t in weights(out).items() if "lora_B" in n)
    sample = ["sample", "-i", trained.faces / "01.png", "--prompt", "a hat", "--num_inference_steps", "2", "--device", "cpu"]
    call(*sample, "--checkpoint", out, "-o", tmp_path / "a")
    call(*sample, "--lora", out / "lora.safetensors", "--pretrained_model_name_or_path", release, "--image_size", "32",
         "--guidance_scale", "3.5", "-o", tmp_path / "b")                            # the run's guidance is 3.5
    assert torch.equal(picture(tmp_path / "a"), picture(tmp_path / "b"))


def test_pairs_are_built_go_on_after_a_kill_and_train(flux, toy_folder, tmp_path):
    """A torn last line and a lost later half: what was listed stays as it is, the rest comes out as before."""
    loose = ("--min_identity 0 --min_structure 0 --max_shift 999 --max_leak 1 --positive .5 --negative .5 --n_max 2 "
             "--num_inference_steps 3 --image_size 32 --device cpu --count 8").split()
    build = ["pairs", *loose, "--pretrained_model_name_or_path", flux, "--data", toy_folder / "train", "-o"]
    call(*build, tmp_path / "a")
    rows = ab.read_pairs(tmp_path / "a" / "pairs.jsonl")
    good = [row for row in rows if row["accepted"]]
    assert len(rows) == 16 and good and len({row["person"] for row in rows}) == 8
    for row in rows:
        assert row["accepted"] == (not row["reasons"]) and (row["accepted"] or row["attempts"] == 6)
    assert len(list((tmp_path / "a" / "target").iterdir())) == len(good) and (tmp_path / "a" / "samples.png").exists()
    folder = shutil.copytree(tmp_path / "a", tmp_path / "b")
    lines = (folder / "pairs.jsonl").read_text().splitlines(keepends=True)
    (folder / "pairs.jsonl").write_text("".join(lines[:7]) + lines[7][:40])             # killed while writing
    [(folder / row["target"]).unlink() for row in map(json.loads, lines[7:]) if row["accepted"]]
    call(*build, folder)
    by_id = lambda rows: {row["id"]: {k: v for k, v in row.items() if k != "scores"} for row in rows}
    assert by_id(ab.read_pairs(folder / "pairs.jsonl")) == by_id(rows)
    assert all((folder / row["target"]).exists() for row in good)
    call("train", *TINY, "--pretrained_model_name_or_path", flux, "-o", tmp_path / "c", "--data", folder,
         "--max_train_steps", "1", "--validation_data", toy_folder / "pairs", "--gradient_accumulation_steps", "2")
