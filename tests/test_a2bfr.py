"""A2BFR's equations and pieces: closed forms, short independent rewrites, parity with diffusers, prodigyopt and peft."""
import copy
import functools
import json
import math
import time

import pytest
import safetensors.torch
import torch
import torch.nn as nn
import torch.nn.functional as F

import a2bfr as ab
import common
import metrics

f64 = torch.float64


@pytest.fixture(autouse=True)
def seeded():
    """Every test draws the same numbers, alone or in the suite."""
    torch.manual_seed(0)


def tiny_flux(seed=0, **changes):
    """A random FluxTransformer2DModel of two blocks of each kind, tokens of 16 channels."""
    from diffusers import FluxTransformer2DModel
    torch.manual_seed(seed)
    sizes = dict(in_channels=16, num_layers=2, num_single_layers=2, attention_head_dim=16, num_attention_heads=2,
                 joint_attention_dim=32, pooled_projection_dim=32, guidance_embeds=True, axes_dims_rope=(4, 4, 8))
    return FluxTransformer2DModel(**sizes | changes).eval()


def tiny_tokenizer(length):
    """The toy world's words as a tokenizer of transformers, with an end token, as T5 and CLIP have."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast
    words = common.WordTokenizer().words + ["</s>"]
    tokenizer = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", len(words) - 1)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", pad_token="<pad>", eos_token="</s>",
                                   model_max_length=length)


def tiny_text_encoders(kind, width=32):
    """(CLIP, T5) of one layer each; `kind` the class of CLIP."""
    from transformers import CLIPTextConfig, T5Config, T5EncoderModel
    words = len(common.WordTokenizer()) + 1
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


def tiny_flux_folder(path):
    """FLUX.1-dev's folder layout, every network tiny and random. Returns the pipeline that was saved."""
    from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline
    from transformers import CLIPTextModel
    torch.manual_seed(0)
    clip, t5 = tiny_text_encoders(CLIPTextModel)
    pipe = FluxPipeline(FlowMatchEulerDiscreteScheduler(), tiny_vae(), clip, tiny_tokenizer(77), t5, tiny_tokenizer(512),
                        tiny_flux(num_layers=1, num_single_layers=1))
    pipe.save_pretrained(path)
    return pipe


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


# ---------------------------------------------------------------- model

def test_pack_is_flux_packing_and_unpack_its_inverse():
    from diffusers import FluxPipeline
    z = torch.randn(2, 3, 8, 6)
    assert torch.equal(ab.pack(z), FluxPipeline._pack_latents(z, 2, 3, 8, 6))
    assert torch.equal(ab.unpack(ab.pack(z), 8, 6), z) and ab.pack(z).shape == (2, 12, 12)
    token = ab.pack(z)[0, 4]                                        # second row of tokens, second column
    assert torch.equal(token, z[0, :, 2:4, 2:4].reshape(-1))        # (c, dy, dx), c slowest
    with pytest.raises(ValueError, match="even"):
        ab.pack(torch.zeros(1, 1, 3, 4))


def test_positions_of_a_smaller_condition_lie_between_those_it_covers():
    full, half = ab.position_ids(4, 4), ab.position_ids(2, 2, 2)
    assert full[:, 0].eq(0).all() and full[5].tolist() == [0, 1, 1]
    assert half.tolist() == [[0, .5, .5], [0, .5, 2.5], [0, 2.5, .5], [0, 2.5, 2.5]]
    assert half[0, 1:].tolist() == full[[0, 1, 4, 5], 1:].mean(0).tolist()


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
    noisy, _, text, pooled, t, _, ids, _ = inputs()
    g = torch.full_like(t, 3.5)
    low = [u.bfloat16() for u in (noisy, text, pooled)]
    with torch.no_grad():
        wanted = net(hidden_states=low[0], encoder_hidden_states=low[1], pooled_projections=low[2], timestep=t,
                     img_ids=ids, txt_ids=torch.zeros(5, 3), guidance=g).sample.float()
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


def test_lora_gradient_reaches_every_layer_that_can_matter():
    """All but the last block's queries, outputs and gates of the condition, which nothing reads afterwards."""
    net = tiny_flux()
    ab.add_condition_lora(net, 2, 2)
    for layer in common.lora_layers(net).values():
        nn.init.normal_(layer.lora_B.weight, std=.1)
    ab.flux_velocity(net, *inputs()).square().mean().backward()
    silent = {n for n, layer in common.lora_layers(net).items() if not layer.lora_B.weight.grad.any()}
    assert silent == {f"single_transformer_blocks.1.{n}" for n in ("proj_mlp", "proj_out", "attn.to_q")}


def test_independent_condition_ignores_the_image_and_its_cache_is_exact():
    net = with_lora(tiny_flux())
    args = list(inputs())
    caches = [{}, {}]
    call = functools.partial(ab.flux_velocity, net, independent=True)
    with torch.no_grad():
        first = call(*args, cache=caches[0])
        assert torch.equal(first, call(*args)) and len(caches[0]) == 4
        args[0], args[4] = torch.randn(2, 16, 16), torch.rand(2)                    # another noise, another time
        later = call(*args)
        call(*args, cache=caches[1])
        for layer in caches[0]:
            for a, b in zip(caches[0][layer], caches[1][layer]):
                assert a.shape == (2, 16, 2, 16) and torch.allclose(a, b, atol=1e-6)
        torch.testing.assert_close(call(*args, cache=caches[0]), later, atol=1e-5, rtol=0)
        args[1] = args[1] * math.nan                                                # not even looked at
        torch.testing.assert_close(call(*args, cache=caches[0]), later, atol=1e-5, rtol=0)
        with pytest.raises(ValueError, match="independent"):
            ab.flux_velocity(net, *args, cache={})


def test_cached_condition_is_faster():
    """Half of the tokens are gone, so about half of the work: the better of five runs each, far from a tie."""
    net, ids = tiny_flux(num_attention_heads=8), ab.position_ids(16, 16)
    args = (torch.randn(1, 256, 16), torch.randn(1, 256, 16), *inputs(1)[2:6], ids, ids)
    times = {True: [], False: []}
    with torch.no_grad():
        ab.flux_velocity(net, *args, independent=True, cache=(cache := {}))
        for _ in range(5):
            for cached in times:
                start = time.perf_counter()
                ab.flux_velocity(net, *args, independent=True, cache=cache if cached else None)
                times[cached].append(time.perf_counter() - start)
    assert min(times[True]) < .85 * min(times[False])


def test_gradient_checkpointing_gives_the_same_gradient():
    net, args, found = with_lora(tiny_flux()), inputs(), []
    for on in (False, True):
        net.gradient_checkpointing = on
        net.zero_grad()
        ab.flux_velocity(net, *args).square().mean().backward()
        found.append([p.grad.clone() for p in net.parameters() if p.requires_grad])
    assert all(torch.allclose(a, b, atol=1e-7) for a, b in zip(*found))


def test_paper_size_has_231_8_million_trainable_parameters():
    from diffusers import FluxTransformer2DModel
    with torch.device("meta"):
        net = FluxTransformer2DModel(guidance_embeds=True)
        new = ab.add_condition_lora(net, ab.PAPER["rank"], ab.PAPER["rank"])
    assert len(ab.condition_layers(net)) == 343
    assert sum(p.numel() for p in new) == 231_804_928
    assert sum(p.numel() for p in net.parameters()) - 231_804_928 == 11_901_408_320


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


# ---------------------------------------------------------------- LoRA files

def test_lora_file_has_the_layout_of_the_release_and_survives_the_round_trip(tmp_path):
    net, other = with_lora(tiny_flux(), rank=4, alpha=2.0), tiny_flux()
    ab.save_lora(net, tmp_path / "x.safetensors")
    state = safetensors.torch.load_file(tmp_path / "x.safetensors")
    assert len(state) == 2 * len(ab.condition_layers(net)) and not any("alpha" in n for n in state)
    assert state["transformer.single_transformer_blocks.1.norm.linear.lora_B.weight"].shape == (96, 4)
    assert ab.lora_rank(tmp_path / "x.safetensors") == 4
    ab.add_condition_lora(other, 4, 4)                                              # scale 1, as OminiControl reads it
    ab.load_lora(other, tmp_path / "x.safetensors")
    args = inputs()
    with torch.no_grad():
        torch.testing.assert_close(ab.flux_velocity(other, *args), ab.flux_velocity(net, *args), atol=1e-6, rtol=0)


def test_lora_of_another_rank_or_model_is_refused(tmp_path):
    ab.save_lora(with_lora(tiny_flux()), tmp_path / "x.safetensors")
    net = tiny_flux()
    ab.add_condition_lora(net, 8, 8)
    with pytest.raises(common.UserError, match="rank 4"):
        ab.load_lora(net, tmp_path / "x.safetensors")
    net = tiny_flux(num_layers=1)
    ab.add_condition_lora(net, 4, 4)
    with pytest.raises(common.UserError, match="other layers"):
        ab.load_lora(net, tmp_path / "x.safetensors")
    safetensors.torch.save_file({"a": torch.zeros(1)}, tmp_path / "y.safetensors")
    with pytest.raises(common.UserError, match="no LoRA"):
        ab.lora_rank(tmp_path / "y.safetensors")


def test_diffusers_reads_the_file_with_scale_1(tmp_path):
    pytest.importorskip("peft", reason="diffusers reads LoRA files with peft only")
    from diffusers import FluxPipeline
    net = with_lora(tiny_flux())
    ab.save_lora(net, tmp_path / "pytorch_lora_weights.safetensors")
    plain = tiny_flux()
    state = FluxPipeline.lora_state_dict(str(tmp_path), weight_name=ab.LORA_FILE)
    FluxPipeline.load_lora_into_transformer(state, None, plain)
    layer = plain.transformer_blocks[0].attn.to_q
    ours = net.transformer_blocks[0].attn.to_q
    x = torch.randn(2, 3, 32)
    with torch.no_grad():
        torch.testing.assert_close(layer(x), ours(x, 0), atol=1e-6, rtol=0)        # there it acts on all tokens


# ---------------------------------------------------------------- text

def test_word_text_is_unit_variance_and_blind_to_order():
    text = ab.WordText(256, 12)
    words, pooled = text.encode(["a smiling person with bangs", "bangs with person smiling a", ""])
    assert words.shape == (3, 12, 256) and torch.allclose(pooled[0], pooled[1], atol=1e-5)
    assert pooled[0].std().item() == pytest.approx(1, abs=.2) and not pooled[2].any() and not words[0, 5:].any()


def test_prompts_that_cannot_be_read_are_refused_in_one_line():
    text = ab.WordText(8, 24)
    check = functools.partial(ab.check_prompt, text)
    check("a smiling person with eyeglasses"), check(ab.TEMPLATE)
    for prompt, said in (("", "empty"), ("  ", "empty"), ("a zebra with wings", "zebra, wings"),
                         ("a person " * 1200, "2400 tokens"), ("???", "no word"), ("\U0001f600", "no word")):
        with pytest.raises(common.UserError, match=said) as error:
            check(prompt)
        assert "\n" not in str(error.value) and len(str(error.value)) < 700


def test_flux_text_equals_diffusers_own(tmp_path):
    pipe = tiny_flux_folder(tmp_path)
    prompts = ["a photo of a smiling person", "", "eyeglasses"]
    text, pooled = ab.FluxText(str(tmp_path), 20, "cpu", torch.float32).encode(prompts)
    with torch.no_grad():
        wanted, wanted_pooled, _ = pipe.encode_prompt(prompts, None, max_sequence_length=20)
    torch.testing.assert_close(text, wanted, atol=1e-5, rtol=0)
    torch.testing.assert_close(pooled, wanted_pooled, atol=1e-5, rtol=0)


@pytest.mark.parametrize("files", [True, False])
def test_cached_text_equals_the_encoder_and_builds_it_once(tmp_path, files):
    words, built = ab.WordText(8, 6), []
    make = lambda: built.append(1) or words
    cached = ab.CachedText(make, 6, "cpu", tmp_path / "text" if files else None, "words")
    prompts = ["a person", "a hat", "a person", ""]
    cached.prepare(prompts)
    for a, b in zip(cached.encode(prompts[:3]), words.encode(prompts[:3])):
        assert torch.equal(a, b.detach())
    assert len(built) == 1
    if files:
        assert len(list((tmp_path / "text").iterdir())) == 3
        again = ab.CachedText(make, 6, "cpu", tmp_path / "text", "words")
        assert torch.equal(again.encode([""])[0], words.encode([""])[0].detach()) and len(built) == 1
        ab.CachedText(make, 6, "cpu", tmp_path / "text", "other words").encode(["a hat"])
        assert len(built) == 2                                                     # encoders do not mix


# ---------------------------------------------------------------- losses

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
    for _ in range(3000):
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


# ---------------------------------------------------------------- a training step

def tiny_nets():
    """Codec, words and prior as the toy preset builds them, 32 px faces in four tokens... with their LoRA."""
    cfg = ab.Train(image_size=32, vae_widths=(8, 8, 8), latent_channels=4, heads=1, double_layers=1, single_layers=1,
                   text_width=16, batch_size=3, rank=4, lora_alpha=4.0, drop_text=0.0, drop_condition=0.0,
                   attr_t_max=1.0, mixed_precision="no", device="cpu")
    nets = ab.build_toy(cfg)
    nets["codec"].vae.encoder.conv_out.bias.data[4:] = -30                              # a posterior without spread
    nets = {name: net.requires_grad_(False) for name, net in nets.items()}
    ab.add_condition_lora(nets["prior"], 4, 4)
    for layer in common.lora_layers(nets["prior"]).values():
        nn.init.normal_(layer.lora_B.weight, std=.1)
    return cfg, nets


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


def pair_batch(cfg, count=3):
    batch = ab.ToyPairs(cfg.image_size).held_out(count)
    return dict(batch, lq=ab.degraded(cfg, batch))


def test_both_branches_share_condition_time_and_noise(monkeypatch):
    """And only the prompt and the clean face differ."""
    cfg, nets = tiny_nets()
    seen, original = [], ab.flux_velocity
    monkeypatch.setattr(ab, "flux_velocity", lambda *a: seen.append(a) or original(*a))
    ab.lora_loss(cfg, nets, Bright(), pair_batch(cfg), torch.no_grad)
    (_, z_src, c_src, text_src, _, t_src, *_), (_, z_tar, c_tar, text_tar, _, t_tar, *_) = seen
    assert torch.equal(c_src, c_tar) and torch.equal(t_src, t_tar) and not torch.equal(text_src, text_tar)
    assert z_src.shape == z_tar.shape and not torch.equal(z_src, z_tar)


def test_noise_of_a_step_is_the_same_for_both_faces_of_equal_pairs():
    """With the same clean face and prompt on both sides, the branches agree to the bit: nothing else is drawn."""
    cfg, nets = tiny_nets()
    batch = pair_batch(cfg)
    batch.update(hq_tar=batch["hq"], target_prompts=batch["source_prompts"])
    _, parts = ab.lora_loss(cfg, nets, Bright(), batch, torch.no_grad)
    assert parts["diffusion_src"].item() == pytest.approx(parts["diffusion_tar"].item(), rel=1e-6)
    assert parts["attribute_src"].item() == pytest.approx(parts["attribute_tar"].item(), rel=1e-6)


def test_two_pass_and_joint_training_steps_have_the_same_gradient():
    cfg, nets = tiny_nets()
    batch, found = pair_batch(cfg), []
    for backward in (None, lambda loss: loss.backward()):
        torch.manual_seed(3)
        nets["prior"].zero_grad()
        loss, _ = ab.lora_loss(cfg, nets, Bright(), batch, functools.partial(torch.autocast, "cpu", enabled=False), backward)
        loss.backward()
        found.append(torch.cat([p.grad.flatten() for p in nets["prior"].parameters() if p.requires_grad]))
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-7)
    assert found[0].norm() > 0


def test_where_the_encoder_sees_a_pair_the_other_way_there_is_no_margin(monkeypatch):
    """m is at most what the clean faces differ in the asked direction [Eq. 5]: it never asks for more than the truth."""
    cfg, nets = tiny_nets()
    batch, margins = pair_batch(cfg), []
    monkeypatch.setattr(ab, "dual_margin_loss", lambda a, b, m, sign=None: margins.append(m) or (a - b).sum())
    with torch.no_grad():
        apart = [ab.read_attributes(Bright(), batch[key]).sigmoid()[:, 0] for key in ("hq", "hq_tar")]
    for sign in (1.0, -1.0):
        ab.lora_loss(cfg, nets, Bright(), dict(batch, sign=torch.full((3,), sign)), torch.no_grad)
        wanted = (sign * (apart[1] - apart[0])).clamp(0, cfg.dual_margin)
        torch.testing.assert_close(margins[-1], wanted)
    assert (margins[0] > 0).any() and (margins[0] * margins[1] == 0).all()
    ab.lora_loss(ab.dataclasses.replace(cfg, dual="abs"), nets, Bright(), batch, torch.no_grad)
    assert margins[-1] == cfg.dual_margin                          # Eq. 5 as printed: one m, whatever the clean faces are


def test_paper_presets_have_the_printed_numbers():
    """Section 5.1; thresholds of section 3.1. DIFFERS: LoRA alpha."""
    train, pairs = ab.Train(**ab.PAPER), ab.Pairs(**ab.SD3_EDITOR)
    assert (train.rank, train.lora_steps, train.batch_size, train.image_size) == (64, 60_000, 1, 512)
    assert (train.drop_text, train.drop_condition, train.lora_optimizer) == (.01, .01, "prodigy")
    assert ab.lora_optimizer(train, [nn.Parameter(torch.zeros(1))]).param_groups[0]["lr"] == 1.0
    assert pairs.count * pairs.edits == 35_000 and (pairs.positive, pairs.negative, pairs.editor) == (.6, .4, "sd3")


def test_dropout_rates_black_condition_and_what_dropping_switches_off():
    cfg, nets = tiny_nets()
    batch = {k: v.repeat(100, *[1] * (v.dim() - 1)) if torch.is_tensor(v) else v * 100 for k, v in pair_batch(cfg).items()}
    for drop_text, drop_condition in ((.3, .1), (0., 1.)):
        changed = ab.dataclasses.replace(cfg, drop_text=drop_text, drop_condition=drop_condition, dropped_prompt="template")
        with torch.no_grad():
            draw = ab.draw_step(changed, nets, Bright(), batch)
            black = nets["codec"].encode(torch.full((1, 3, 32, 32), -1.))
            template = nets["text"].encode([ab.TEMPLATE])[0]
        dark = ((draw["condition"] - black).flatten(1).norm(dim=1) < 1)
        plain = (draw["prompt_src"].text - template).flatten(1).norm(dim=1) == 0
        assert dark.float().mean().item() == pytest.approx(drop_condition, abs=.06) or drop_condition == .1
        assert plain.float().mean().item() == pytest.approx(drop_text, abs=.1)
        assert torch.equal(plain, (draw["prompt_tar"].text - template).flatten(1).norm(dim=1) == 0)
        assert torch.equal(plain, ~draw["told"]) and draw["told"][draw["seen"]].all()     # dropped pairs are not read
    assert (torch.sigmoid(torch.randn(10 ** 5)).quantile(.95) - .84).abs() < .01          # the law of t
    assert (ab.draw_times(10 ** 5, 1.0, "cpu").quantile(.05) - .16).abs() < .01
    assert (ab.draw_times(10 ** 5, 4.0, "cpu").quantile(.5) - .8).abs() < .01             # 4 t / (1 + 3 t) of 1/2


def test_late_times_are_not_read_and_decoded_caps_the_readings():
    cfg, nets = tiny_nets()
    with torch.no_grad():
        none = ab.draw_step(ab.dataclasses.replace(cfg, attr_t_max=0.0), nets, Bright(), pair_batch(cfg))
        one = ab.draw_step(ab.dataclasses.replace(cfg, decoded=1), nets, Bright(), pair_batch(cfg))
        off = ab.draw_step(ab.dataclasses.replace(cfg, attribute_weight=0.0, dual_weight=0.0), nets, Bright(), pair_batch(cfg))
    assert len(none["seen"]) == 0 and len(one["seen"]) == 1 and len(off["seen"]) == 0


def test_overfitting_two_pairs_separates_the_scores_in_the_right_order():
    """The tiny system with a brightness reader: losses fall, and A_tar - A_src gets the sign of the pair."""
    cfg, nets = tiny_nets()
    cfg, nets["codec"] = ab.dataclasses.replace(cfg, attribute_weight=1.0, dual_weight=1.0), Pixels()
    parameters = [p for p in nets["prior"].parameters() if p.requires_grad]
    batch = pair_batch(cfg, 2)
    batch.update(hq=torch.full_like(batch["hq"], -.7), hq_tar=torch.full_like(batch["hq"], .7), sign=torch.ones(2))
    batch["hq"][1], batch["hq_tar"][1], batch["sign"][1] = .7, -.7, -1.
    optimizer, history = torch.optim.Adam(parameters, 1e-2), []
    for step in range(60):
        torch.manual_seed(step % 4)
        loss, parts = ab.lora_loss(cfg, nets, Bright(), batch, functools.partial(torch.autocast, "cpu", enabled=False))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        history.append((loss.item(), parts["dual"].item()))
    first, last = (torch.tensor(h).mean(0) for h in (history[:4], history[-4:]))
    assert (last < .8 * first).all(), (first, last)
    assert last[1] < cfg.dual_margin                                    # max(0, m - s (A_tar - A_src)) < m: the right sign


def test_degraded_image_is_shared_and_comes_from_the_chosen_face():
    cfg = ab.Train(image_size=32)
    batch = ab.ToyPairs(32).held_out(4)
    change = lambda **k: ab.degraded(ab.dataclasses.replace(cfg, **k), batch)
    expected = lambda key: common.degrade(batch[key], common.DEGRADATIONS[cfg.degradation], batch["seeds"])
    assert torch.equal(change(), expected("hq")) and torch.equal(change(lq_from="tar"), expected("hq_tar"))
    mixed, even = change(lq_from="random"), batch["seeds"] % 2 == 0
    assert torch.equal(mixed[even], expected("hq_tar")[even]) and torch.equal(mixed[~even], expected("hq")[~even])


def test_attributes_are_read_in_our_order_and_with_a_gradient():
    reader = metrics.load_reader("a")
    x = common.toy_faces(torch.arange(4), torch.arange(4)).image.requires_grad_(True)
    logits = ab.read_attributes(reader, x)
    torch.testing.assert_close(logits.sigmoid(), reader.probabilities(x))
    logits.sum().backward()
    assert x.grad.abs().sum() > 0
    with torch.autocast("cpu", torch.bfloat16):
        assert ab.read_attributes(reader, x).dtype == torch.float32


def test_farl_reads_the_twelve_of_forty():
    with torch.device("meta"):
        farl = metrics.FaRLAttributes()
    farl = farl.to_empty(device="cpu")
    for p in farl.parameters():
        nn.init.normal_(p, std=.02)
    x = torch.rand(1, 3, 64, 64) * 2 - 1
    with torch.no_grad():
        wanted = farl.probabilities(x)[:, [39, 31, 21, 15, 5, 33, 32, 8, 9, 11, 17, 35]]
        torch.testing.assert_close(ab.read_attributes(farl, x).sigmoid(), wanted)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device with 48 GB")
def test_a_full_width_step_fits_48_gb(capsys):
    """FLUX.1-dev's sizes, random weights: one pair at 512 px with every memory flag of the paper preset."""
    from bench import RandomText
    from diffusers import AutoencoderKL, FluxTransformer2DModel
    cfg, before = ab.Train(**ab.PAPER), torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device("cuda"):
            prior = FluxTransformer2DModel(guidance_embeds=True)
            vae = AutoencoderKL(down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4,
                                block_out_channels=(128, 256, 512, 512), layers_per_block=2, latent_channels=16,
                                use_quant_conv=False, use_post_quant_conv=False)
    finally:
        torch.set_default_dtype(before)
    nets = dict(prior=prior, codec=ab.Codec(vae, 0.1159, 0.3611).cuda().requires_grad_(False), text=RandomText("cuda"))
    optimizer = ab.lora_optimizer(cfg, ab.add_condition_lora(prior, cfg.rank, cfg.lora_alpha))
    prior.enable_gradient_checkpointing(), vae.enable_gradient_checkpointing()
    farl = metrics.FaRLAttributes().cuda().eval().requires_grad_(False)
    batch = {k: v.cuda() if torch.is_tensor(v) else v for k, v in pair_batch(cfg, 1).items()}
    autocast = lambda: torch.autocast("cuda", torch.bfloat16)
    for _ in range(3):
        torch.cuda.synchronize()
        start = time.perf_counter()
        loss, _ = ab.lora_loss(cfg, nets, farl, batch, autocast, lambda share: share.backward())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        torch.cuda.synchronize()
    peak = torch.cuda.max_memory_allocated() / 2 ** 30
    with capsys.disabled():
        print(f"\nfull-width step: {time.perf_counter() - start:.2f} s, {peak:.1f} GB at most")
    assert loss.isfinite() and peak < 47


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
    optimizer = ab.Prodigy([p], d0=1e-2)
    assert optimizer.step() is None and not optimizer.state                        # no gradient: nothing happens
    step = lambda o, p: (setattr(p, "grad", p.detach() - 3), o.step())
    [step(optimizer, p) for _ in range(5)]
    state = json.loads(json.dumps({k: v for k, v in optimizer.state_dict()["param_groups"][0].items()}))
    assert state["d"] > 1e-2 and state["k"] == 5
    other = ab.Prodigy([q], d0=1e-2)
    q.data.copy_(p.data)
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    [(step(optimizer, p), step(other, q)) for _ in range(5)]
    assert torch.equal(p, q)


# ---------------------------------------------------------------- samplers

def test_flux_sigmas_are_those_of_the_scheduler_and_of_the_fact_sheet():
    from diffusers import FlowMatchEulerDiscreteScheduler
    found = ab.flux_sigmas(28, 1024)
    scheduler = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, shift=3.0)
    scheduler.set_timesteps(sigmas=torch.linspace(1, 1 / 28, 28).tolist(), mu=.63)
    torch.testing.assert_close(found, scheduler.sigmas, atol=1e-6, rtol=0)
    assert found[[0, 1, 13, 27, 28]].tolist() == pytest.approx([1, .981, .684, .065, 0], abs=6e-4)
    assert (found[:-1] > found[1:]).all()


def test_sd3_sigmas_are_those_of_the_scheduler():
    from diffusers import FlowMatchEulerDiscreteScheduler
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    scheduler.set_timesteps(50)
    found = ab.sd3_sigmas(50)
    torch.testing.assert_close(found, scheduler.sigmas, atol=2e-4, rtol=0)
    assert found[50 - 33].item() == pytest.approx(.850, abs=2e-3)                   # where n_max = 33 starts


def test_euler_is_exact_on_straight_paths():
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


def test_flow_edit_with_only_ordinary_sampling_forgets_the_source():
    """n_min = n_max = N starts from pure noise: the target's distribution whatever the source is."""
    x = torch.full((4096, 1), 7.)
    out = ab.flow_edit(gaussian_velocity, x, 0., 3., ab.sd3_sigmas(50), 50, n_min=50)
    assert out.mean().item() == pytest.approx(3, abs=.1) and out.std().item() == pytest.approx(1, abs=.1)
    part = ab.flow_edit(gaussian_velocity, x, 7., 3., ab.sd3_sigmas(50), 40, n_min=20)
    assert 2 < part.mean().item() < 5 and part.isfinite().all()


def test_guidance_of_one_is_none_and_kinds_add_up():
    a, b = torch.randn(2, 3)
    assert torch.allclose(ab.guide(a, b, 1), a) and torch.equal(ab.guide(a, b, 0), b)
    torch.testing.assert_close(ab.guide(a, b, 3), b + 3 * (a - b))


@pytest.mark.parametrize("options", [dict(true_cfg=2.0, negative="a hat"), dict(image_cfg=1.5), dict(kv_cache=True),
                                     dict(true_cfg=2.0, image_cfg=1.5, kv_cache=True)])
def test_restore_with_every_kind_of_guidance(options):
    """Cached equals uncached, guidance changes the result, a scale of one does not; all in range."""
    cfg, nets = tiny_nets()
    cfg = ab.dataclasses.replace(cfg, independent_condition=True)
    lq = common.toy_faces([1, 2], [3, 4], size=32).image
    noise = nets["codec"].noise(32, [0, 1])
    run = lambda **k: ab.restore(nets, cfg, lq, ["a hat", "a photo of a smiling person"], noise, ab.Setting(1.0, 4, **k))
    plain, found = run(), run(**options)
    assert found.shape == lq.shape and found.abs().max() <= 1
    torch.testing.assert_close(found, run(**options | dict(kv_cache=not options.get("kv_cache", False))), atol=1e-4, rtol=0)
    assert torch.allclose(plain, found, atol=1e-4) == (options == dict(kv_cache=True))


# ---------------------------------------------------------------- pairs

def test_thresholds_decide_what_is_named_and_what_can_be_edited():
    scores = [.9, .1, .5, .61, .39, .8, .2, .1, .2, .7, .3, .05]
    assert ab.editable(scores) == [0, 1, 3, 4, 6, 7, 8, 10, 11]                 # .5 is unknown; brown and wavy are on
    assert ab.editable([.5] * 12) == [] and ab.editable([.5] * 7 + [.1] * 4 + [.5]) == []
    said = ab.verbalise(scores)
    assert "young" in said and "serious" in said and "eyeglasses" in said and "mouth" not in said and "hat" not in said


def test_switching_turns_siblings_off():
    scores = [.9, .1, .1, .1, .1, .9, .1, .1, .1, .9, .1, .1]
    after, sign = ab.switch(scores, 8)
    assert sign == 1 and after[7:11] == [0, 1, 0, 0] and after[:7] == scores[:7]
    after, sign = ab.switch(scores, 6)
    assert sign == 1 and after[5:7] == [0, 1]
    after, sign = ab.switch(scores, 0)
    assert sign == -1 and after[0] == 0 and after[1:] == scores[1:]
    assert set(ab.others_of(8)) == set(range(12)) - {7, 8, 9, 10} and set(ab.others_of(0)) == set(range(1, 12))


def test_toy_pairs_differ_in_one_attribute_of_one_person():
    batch = ab.ToyPairs(64).training(64, seed=1, step=2)
    reader = metrics.load_reader("b")
    with torch.no_grad():
        a, b = reader.probabilities(batch["hq"]) > .5, reader.probabilities(batch["hq_tar"]) > .5
        alike = (reader.embed(batch["hq"]) * reader.embed(batch["hq_tar"])).sum(1)
    rows = torch.arange(64)
    assert (b[rows, batch["edited"]] == (batch["sign"] > 0)).float().mean() > .9
    others = torch.stack([(a[i] == b[i])[ab.others_of(k)].float().mean() for i, k in enumerate(batch["edited"].tolist())])
    assert others.mean() > .95 and alike.mean() > .6
    assert all(s != t for s, t in zip(batch["source_prompts"], batch["target_prompts"]))
    assert len(set(batch["edited"].tolist())) >= 8
    again = ab.ToyPairs(64).training(64, seed=1, step=2)
    assert torch.equal(batch["hq_tar"], again["hq_tar"]) and batch["target_prompts"] == again["target_prompts"]
    assert len(set(ab.ToyPairs(64).prompts())) == 512
    assert set(batch["source_prompts"] + batch["target_prompts"]) <= set(ab.ToyPairs(64).prompts())


def test_short_prompts_of_toy_pairs_still_speak_of_what_is_edited():
    whole, short = (ab.ToyPairs(64, short=s).training(64, seed=1, step=2) for s in (False, True))
    assert torch.equal(whole["hq"], short["hq"]) and torch.equal(whole["edited"], short["edited"])
    for side in ("source_prompts", "target_prompts"):
        fewer = [len(a) < len(b) for a, b in zip(short[side], whole[side])]
        assert .25 < sum(fewer) / 64 < .75                      # half of the prompts leave something out
    for prompt, before, index, sign in zip(short["target_prompts"], short["source_prompts"], whole["edited"], whole["sign"]):
        phrase = ab.ATTRIBUTES[index][2 if sign > 0 else 3]
        assert phrase in prompt and (not phrase or prompt != before)


GOOD = dict(source=[.9, .1] + [.1] * 10, target=[.9, .9] + [.1] * 10, edited=1, sign=1, identity=.7, structure=.8, shift=.02)


@pytest.mark.parametrize("change, reason", [
    (dict(target=[.9, .5] + [.1] * 10), "attribute: Smiling is 0.50"), 
    (dict(source=[.9, .9] + [.1] * 10, sign=-1), "switched off"), (dict(source=[.9, .8] + [.1] * 10), "was 0.80 already"),
    (dict(target=[.9, .9] + [.1] * 9 + [math.nan]), "Wearing_Hat moved by nan"),
    (dict(target=[.5, .9] + [.1] * 10), "attribute: Young moved by 0.40"), (dict(identity=.39), "identity"),
    (dict(structure=.4), "SSIM"), (dict(shift=.2), "landmarks"), (dict(identity=math.nan), "identity")])
def test_quality_check_rejects_what_it_must(change, reason):
    assert ab.quality_check(**GOOD).accepted and ab.quality_check(**GOOD).reasons == []
    check = ab.quality_check(**GOOD | change)
    assert not check.accepted and len(check.reasons) == 1 and reason in check.reasons[0]
    assert set(check.scores) == {"before", "after", "leak", "identity", "structure", "shift"}


def test_flow_edit_counts_its_steps_from_the_end():
    """n_max beyond N is N, n_min beyond n_max is n_max: noise is always added before the target's own steps."""
    seen = []
    sigmas, x = torch.linspace(1, 0, 7), torch.ones(2, 3, 4)

    def velocity(z, t, prompt):
        seen.append((round(t[0].item(), 3), prompt, (z - (1 - t[0]) * x).abs().max().item() > 0.05))
        return torch.zeros_like(z)
    for n_max, n_min, first in ((2, 4, 2 / 6), (10, 10, 1.0), (9, 0, 1.0)):
        seen.clear()
        ab.flow_edit(velocity, x, "source", "target", sigmas, n_max, n_min, generator=torch.Generator().manual_seed(0))
        assert seen[0][0] == round(first, 3) and ("source" in [s[1] for s in seen]) == (n_min == 0)
        assert all(noisy for _, _, noisy in seen)


def test_quality_check_forgives_siblings():
    """Blond on, brown off: the second change belongs to the first."""
    source, target = [.9] * 7 + [.1, .1, .9, .1, .1], [.9] * 7 + [.1, .9, .1, .1, .1]
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
    StableDiffusion3Pipeline(net, FlowMatchEulerDiscreteScheduler(shift=3.0), tiny_vae(), clip, tiny_tokenizer(77), clip2,
                             tiny_tokenizer(77), t5, tiny_tokenizer(256)).save_pretrained(tmp_path)
    editor = ab.sd3_editor(str(tmp_path), 32, 6, "cpu", torch.float32)
    x = common.toy_faces([1, 2], [1, 2], size=32).image
    cfg = ab.Pairs(n_max=5, source_guidance=3.5, target_guidance=13.5)
    edit = lambda blend: ab.edit_faces(editor, cfg, blend, "cpu", x, ["a person"] * 2, ["a hat", "bangs"], [1, 2])
    with torch.no_grad():
        plain = editor.decode(editor.encode(x))
    torch.testing.assert_close(edit(0.0), plain)
    assert edit(1.0).shape == x.shape and not torch.allclose(edit(1.0), plain, atol=1e-3)
    t = torch.full((2,), .5)
    prompt = editor.prompt(["a hat", "bangs"], 1.0)
    with torch.no_grad():
        z = editor.encode(x)
        wanted = editor.velocity(z, t, prompt)
        again = editor.velocity(z[1:], t[1:], editor.prompt(["bangs"], 1.0))
    torch.testing.assert_close(wanted[1:], again, atol=1e-5, rtol=1e-4)              # halves of the batch do not mix


def test_llm_verbaliser_keeps_only_captions_that_say_everything(tmp_path):
    """A tiny random GPT-2 says nothing useful: the template stands. One that learned a caption is believed."""
    from transformers import GPT2Config, GPT2LMHeadModel
    words = tiny_tokenizer(512)
    words.backend_tokenizer.post_processor = __import__("tokenizers").processors.TemplateProcessing(single="$A")
    words.save_pretrained(tmp_path)
    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(vocab_size=len(words), n_positions=256, n_embd=32, n_layer=1, n_head=2,
                                       bos_token_id=None, eos_token_id=len(words) - 1)).eval()
    model.save_pretrained(tmp_path)
    scores = [.9, .9] + [.5] * 10                                                   # young, smiling
    caption = ab.LLMVerbaliser(str(tmp_path), "cpu")
    assert caption(scores) == ab.verbalise(scores) == "a photo of a young smiling person"
    heard = []
    original = caption.words.decode
    caption.words.decode = lambda ids, **k: heard.append(original(ids, **k)) or "A smiling face of somebody young."
    assert caption(scores) == "A smiling face of somebody young." and len(heard) == 1
    assert caption([.1] + scores[1:]) == "a photo of an older smiling person"       # "older" is missing there
    with pytest.raises(common.UserError, match="--llm"):
        ab.LLMVerbaliser(str(tmp_path / "absent"), "cpu")
