"""Pref-Restore: closed forms in the paper's order, gradient routing, released layouts, and the program. No download."""
import argparse
import copy
import dataclasses
import functools
import json
import math
import pickle
import shutil
import subprocess
import sys
from types import SimpleNamespace

import pytest
import safetensors.torch
import torch
import torch.nn as nn
import torch.nn.functional as F

import common
import pref_restore as pr
from program import ROOT, ScriptTrap, Trap, caller, same, toy_data, toy_pictures, weights
from toy import sana
from toy.faces import toy_faces

f64 = torch.float64
SIZES = sana.sizes_of(size=32, token_side=2, codes=16, code_dim=8, siglip_width=72, llm_width=32, llm_layers=2, channels=8,
                      vae_widths=(16, 16, 32), heads=1, layers=2)
TINY = dict(image_size=32, batch_size=4, rank=4, groups=2, group_size=3, rollout_steps=3, num_inference_steps=2, device="cpu",
            mixed_precision="no")
STEPS = dict(semantic_steps=3, texture_steps=3, preference_steps=3, validation_faces=6, log_steps=1)


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


@pytest.fixture(scope="module")
def whole():
    """(cfg, model, vocab, batch) of random tiny networks and four toy faces. Not to be changed by a test."""
    torch.manual_seed(0)
    model, vocab = sana.build(SIZES)
    faces = toy_faces(torch.arange(4), torch.arange(4), size=32)
    lq = common.degrade(faces.image, common.DEGRADATIONS["pref_restore"], range(4))
    batch = dict(hq=faces.image, lq=lq, captions=["a photo of a young person", "", "a photo of an older person", ""],
                 tasks=["restore"] * 3 + ["copy"])
    return pr.Train(**pr.TOY_VALUES | TINY), model.eval(), vocab, batch


def test_the_chat_layout_and_the_added_tokens_are_those_of_the_released_model():
    """Word by word the template has as many pieces as Qwen3's tokens: 11, 12 + 729, 5; 757 in all, 1489 in training."""
    vocab = pr.Vocabulary(sana.word_tokenizer(), 65_536)
    tokens = torch.randint(65_536, (1, 729))
    prompt, whole = pr.build_sequence(vocab, tokens, [""]), pr.build_sequence(vocab, tokens, [""], tokens)
    assert len(vocab.encode(pr.SYSTEM)) == 11 and len(vocab.encode(pr.USER + pr.ASK + pr.END)) == 12
    assert prompt.ids.shape == (1, 757) and whole.ids.shape == (1, 1489)
    assert 1 not in prompt.ids                                                               # nothing is unknown
    assert prompt.ids[0, -2:].tolist() == [vocab.image_start, vocab.scale] and prompt.start.item() == 756
    assert torch.equal(whole.ids[0, :757], prompt.ids[0]) and whole.ids[0, 757 + 729] == vocab.image_end
    vocab = pr.Vocabulary(SimpleNamespace(__len__=None, pad_token_id=151_643), 65_536, first=151_669)
    assert (vocab.image_start, vocab.image_end, vocab.scale, vocab.first_code) == (151_669, 151_670, 151_671, 151_674)
    assert vocab.size == 217_210 == pr.QWEN3["vocab_size"] and vocab.pad == 151_643


def test_a_loss_mask_leaves_out_the_degraded_tokens_and_padding_only(whole):
    """Fact sheet 1.5: prompt and <S0> are labels too; with ce_on_text off only the N tokens and <im_end> are."""
    _, _, vocab, batch = whole
    source, answer = torch.randint(16, (2, 4, 4))
    s = pr.build_sequence(vocab, source, batch["captions"], answer, batch["tasks"])
    at = len(vocab.encode(pr.SYSTEM + pr.USER))
    for b in range(4):
        kept, start = s.labels[b] != -100, s.start[b]
        padding = range(int(s.mask[b].sum()), s.ids.shape[1])                                # right padding
        assert torch.nonzero(~kept).flatten().tolist() == [*range(at, at + 4), *padding]
        assert torch.equal(s.labels[b][kept], s.ids[b][kept])
        assert s.ids[b, start] == vocab.scale
        assert torch.equal(s.ids[b, start + 1:start + 5] - vocab.first_code, answer[b])
    only = pr.build_sequence(vocab, source, batch["captions"], answer, ce_on_text=False)
    assert ((only.labels != -100).sum(1) == 5).all()
    assert (only.labels[:, 1:].gather(1, only.start[:, None]) == answer[:, :1] + vocab.first_code).all()


def test_captions_choose_the_request_the_side_task_overrides_them_and_the_context_cuts_them(whole):
    vocab, source = whole[2], torch.zeros(1, 4, dtype=torch.long)
    text = lambda caption, task: vocab.tokenizer.decode(
        [i for i in pr.build_sequence(vocab, source, [caption], tasks=[task]).ids[0].tolist() if i < vocab.image_start])
    assert "content" in text("a young person", "restore") and "young" in text("a young person", "restore")
    assert "content" not in text("", "restore") and text("", "restore") == text("  \n", "restore")
    assert "mission" in text("a young person", "copy") and "young" not in text("a young person", "copy")
    long = pr.build_sequence(vocab, source, ["young " * 500], source, context=80)
    young = vocab.encode("young")[0]
    assert long.ids.shape[1] == 80 and (long.ids == young).sum() == pr.caption_room(vocab, 4, 80)


@pytest.mark.parametrize("normalized", [True, False])
def test_simvq_takes_the_nearest_code_and_passes_the_gradient_straight(normalized):
    quantiser, z = pr.SimVQ(7, 3, normalized), torch.randn(2, 5, 3, requires_grad=True)
    code, ids, loss = quantiser(z)
    table, flat = quantiser.embedding_proj(quantiser.embedding.weight), z
    if normalized:
        table, flat = table / table.norm(dim=1, keepdim=True), z / z.norm(dim=2, keepdim=True)
    brute = [[min(range(7), key=lambda k: (flat[b, n] - table[k]).norm().item()) for n in range(5)] for b in range(2)]
    assert ids.tolist() == brute
    torch.testing.assert_close(code, table[ids])
    torch.testing.assert_close(loss, 1.25 * (table[ids] - flat).square().mean())
    weight = torch.randn_like(code)
    found, = torch.autograd.grad((code * weight).sum(), z, retain_graph=True)
    wanted, = torch.autograd.grad((flat * weight).sum(), z)  # as if nothing were rounded
    torch.testing.assert_close(found, wanted)
    loss.backward()
    assert quantiser.embedding.weight.grad is None and quantiser.embedding_proj.weight.grad.abs().sum() > 0


def test_ta_tok_reads_the_layer_before_the_last_alike_in_every_precision(whole):
    model, images = copy.deepcopy(whole[1].tatok), whole[3]["hq"]
    before, plain = model.features(images), model.encode(images)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(model.encode(images), plain)
    for p in [*model.encoder.encoder.layers[-1].parameters(), *model.encoder.post_layernorm.parameters()]:
        p.data.normal_()
    assert torch.equal(model.features(images), before)
    model.encoder.encoder.layers[-2].mlp.fc2.weight.data.normal_()
    assert not torch.equal(model.features(images), before)


def test_eq7_token_loss_is_the_plain_cross_entropy_in_value_and_gradient():
    states, head = (torch.randn(*shape, dtype=f64, requires_grad=True) for shape in ((2, 9, 6), (11, 6)))
    labels = torch.randint(11, (2, 9))
    labels[0, 3:6], labels[1, 7:] = -100, -100
    loss = pr.token_loss(states, head, labels, chunk=4)
    logits = (states @ head.T)[:, :-1].reshape(-1, 11)
    plain = F.cross_entropy(logits, labels[:, 1:].reshape(-1), ignore_index=-100)
    torch.testing.assert_close(loss, plain)
    for a, b in zip(torch.autograd.grad(loss, (states, head)), torch.autograd.grad(plain, (states, head))):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-5)


def test_eq7_the_answer_factorises_into_its_tokens(whole):
    """sum_i log p(s_i | s_<i, F_v, F_t), each from a sequence cut before s_i, equals one teacher-forced pass."""
    _, model, vocab, _ = whole
    source, answer = torch.randint(16, (2, 1, 4))
    s = pr.build_sequence(vocab, source, ["young person"], answer, ce_on_text=False)
    once = pr.token_loss(model.integrator(s), model.integrator.head, s.labels) * 5           # N tokens and <im_end>
    total = 0.0
    for end in range(s.start.item() + 1, s.start.item() + 6):
        cut = pr.Sequence(s.ids[:, :end], s.mask[:, :end], s.labels[:, :end], s.start)
        logits = model.integrator(cut)[:, -1] @ model.integrator.head.T
        total = total - logits.log_softmax(-1)[0, s.ids[0, end]]
    torch.testing.assert_close(once, total, atol=1e-4, rtol=1e-4)


def test_training_and_inference_condition_on_the_same_positions(whole):
    """States that generation leaves, with cache and left padding, are those of a full pass sliced from <S0>."""
    _, model, vocab, batch = whole
    source = torch.randint(16, (4, 4))
    prompt = pr.build_sequence(vocab, source, batch["captions"])
    assert len(set(prompt.mask.sum(1).tolist())) > 1 and not prompt.mask[1, 0]  # unequal, padded on the left
    tokens, states = model.integrator.generate(prompt, vocab, 4)
    assert tokens.shape == (4, 4) and states.shape == (4, 5, 32)
    full = pr.build_sequence(vocab, source, batch["captions"], tokens)
    sliced = pr.answer_states(model.integrator(full), full.start, 4)
    torch.testing.assert_close(states, sliced, atol=1e-5, rtol=1e-4)
    for b in range(4):                                                                       # neighbours do not matter
        alone = pr.build_sequence(vocab, source[b:b + 1], batch["captions"][b:b + 1])
        one, state = model.integrator.generate(alone, vocab, 4)
        assert torch.equal(one[0], tokens[b])
        torch.testing.assert_close(state[0], states[b], atol=1e-5, rtol=1e-4)
    model = copy.deepcopy(model)                                                             # alike amid training
    pr.recompute_activations(model)
    got = model.train().integrator.generate(prompt, vocab, 4)
    assert torch.equal(got[0], tokens) and model.integrator.llm.training
    torch.testing.assert_close(got[1], states)
    integrator = model.eval().integrator                           # and it cannot end early: exactly N visual tokens
    last = integrator(prompt)[:, -1].mean(0)
    integrator.llm.embed_tokens.weight.data[vocab.image_end] = 1000 * last.detach()
    assert (integrator(prompt)[:, -1] @ integrator.head.T).argmax(-1).eq(vocab.image_end).any()
    tokens, _ = integrator.generate(prompt, vocab, 9, top_p=0.9, temperature=1.0)
    assert tokens.shape == (4, 9) and tokens.min() >= 0 and tokens.max() < 16


def test_pick_token_draws_from_the_nucleus_in_proportion():
    logits = torch.tensor([0.4, 0.3, 0.2, 0.1]).log()[None].expand(4000, -1)
    assert (pr.pick_token(logits) == 0).all() and (pr.pick_token(logits, top_k=1, temperature=1.) == 0).all()
    g = torch.Generator().manual_seed(0)
    share = lambda **kw: torch.bincount(pr.pick_token(logits, generator=g, temperature=1., **kw), minlength=4) / 4000
    torch.testing.assert_close(share(), torch.tensor([.4, .3, .2, .1]), atol=.03, rtol=0)
    torch.testing.assert_close(share(top_p=.65), torch.tensor([4 / 7, 3 / 7, 0, 0]), atol=.03, rtol=0)
    torch.testing.assert_close(share(top_k=3), torch.tensor([4, 3, 2, 0]) / 9, atol=.03, rtol=0)
    # top_p is a share of what top_k has left, as in transformers' generate: of .4 and .3 the first is 4/7 > .56 alone
    assert share(top_k=2, top_p=.56)[0] == 1


def gaussian_velocity(mean, deviation):
    """The exact velocity of the flow from N(0, 1) at sigma 1 to N(mean, deviation^2) at sigma 0."""
    def velocity(x, sigma):
        s = sigma.view(-1, *[1] * (x.dim() - 1))
        variance = (1 - s) ** 2 * deviation ** 2 + s ** 2
        return -mean + (s - (1 - s) * deviation ** 2) / variance * (x - (1 - s) * mean)
    return velocity


def test_eq8_both_solvers_are_exact_on_straight_lines():
    x0, eps = torch.randn(2, 3, 4, 5, 5, dtype=f64)
    for steps in (1, 2, 3, 7):
        for sample in (pr.euler_sample, pr.dpm_solver_sample):
            torch.testing.assert_close(sample(lambda x, sigma: eps - x0, eps, pr.sigma_grid(steps)), x0)


def test_eq8_solvers_converge_at_orders_one_and_two_and_the_grids_trailing_zero_removes_the_last_noise():
    """From sigma .9 to .1 against the closed form; at the ends, where lambda is infinite, DPM is first-order."""
    x, m, d = torch.randn(64, 1, 1, 1, dtype=f64), 1.5, .3
    width = lambda s: math.sqrt((1 - s) ** 2 * d ** 2 + s ** 2)
    exact = .9 * m + width(.1) / width(.9) * (x - .1 * m)
    field, solvers = gaussian_velocity(m, d), (pr.euler_sample, pr.dpm_solver_sample)
    error = lambda sample, n: (sample(field, x, [.9 - .8 * i / n for i in range(n + 1)]) - exact).abs().mean().item()
    euler, dpm = ([error(sample, n) for n in (80, 160, 320)] for sample in solvers)
    assert all(1.9 < a / b < 2.1 for a, b in zip(euler, euler[1:]))
    assert all(3.8 < a / b < 5 for a, b in zip(dpm, dpm[1:])) and dpm[0] < euler[0] / 20
    whole = [(sample(field, x, pr.sigma_grid(20)) - m - d * x).abs().mean() for sample in solvers]
    assert whole[1] < whole[0] / 5
    grid = pr.sigma_grid(30)
    torch.testing.assert_close(torch.tensor(grid[:-1]), torch.linspace(1, 1 / 30, 30))
    x = torch.randn(4096, 1, 1, 1, dtype=f64)
    end = lambda grid: pr.dpm_solver_sample(gaussian_velocity(1.3, 0.2), x, grid).mean().item()
    assert grid[-1] == 0 and end(grid) == pytest.approx(1.3, abs=.01) and end(grid[:-1]) < 1.27


def test_eq9_flow_loss_is_zero_at_the_oracle_and_levels_are_thousandths():
    x0, eps = torch.randn(2, 5, 2, 3, 3, dtype=f64)
    sigma = pr.uniform_sigma(5).double()

    def velocity(x_t, s):
        torch.testing.assert_close(x_t, torch.stack([(1 - a) * b + a * c for a, b, c in zip(sigma, x0, eps)]))
        return eps - x0 + 2
    assert pr.flow_loss(velocity, x0, sigma, eps).item() == pytest.approx(4)
    many = pr.uniform_sigma(40_000)
    assert many.min() >= 1e-3 and many.max() <= 1 and (many * 1000 - (many * 1000).round()).abs().max() < 1e-3
    assert many.mean().item() == pytest.approx(.5005, abs=.01) and many.var().item() == pytest.approx(1 / 12, abs=.002)


def test_eq9_is_the_sum_of_its_two_terms(whole):
    """L = L_CE + lambda L_diff, from the same draws."""
    cfg, model, vocab, batch = whole
    for weight in (0., 1., 3.):
        torch.manual_seed(1)
        loss, now = pr.semantic_loss(model, vocab, dataclasses.replace(cfg, diffusion_weight=weight), batch)
        parts = now if weight == 0 else parts                                                # the same for all
        torch.testing.assert_close(loss, parts["ce"] + weight * parts["diffusion"])


def test_eq10_consistency_pulls_the_degraded_side_only():
    z_lq, z_hq = (z.requires_grad_() for z in torch.randn(2, 3, 2, 4, 4))
    loss = pr.latent_consistency_loss(z_lq, z_hq)
    loss.backward()
    assert z_hq.grad is None and loss.item() == pytest.approx(((z_lq - z_hq) ** 2).mean().item())
    torch.testing.assert_close(z_lq.grad, 2 * (z_lq - z_hq).detach() / z_lq.numel())


def test_the_null_condition_is_zero_for_the_wanted_share_and_guidance_extrapolates_from_it():
    dropped = pr.drop_condition(torch.ones(20_000, 2, 3), .1)
    empty = (dropped == 0).flatten(1).all(1)
    assert ((dropped == 1).flatten(1).all(1) | empty).all()
    assert empty.float().mean().item() == pytest.approx(.1, abs=.01)
    field = lambda x, sigma, cond: x + cond.sum((1, 2)).view(-1, 1, 1, 1)
    x, sigma, cond = torch.randn(2, 1, 2, 2), torch.ones(2), torch.randn(2, 3, 4)
    for scale in (0., 1., 2.):
        torch.testing.assert_close(pr.guided(field, cond, scale)(x, sigma), x + scale * cond.sum((1, 2)).view(-1, 1, 1, 1))


def test_eq11_reward_is_the_weighted_sum():
    scores = dict(hps=torch.tensor([1., 2.]), lpips=torch.tensor([-.5, 0.]))
    torch.testing.assert_close(pr.total_reward(scores, dict(hps=2., lpips=.5)), torch.tensor([1.75, 4.]))


def test_eq12_optimality_against_a_loop_constant_groups_at_a_half_and_outliers_clipped():
    rewards, group = torch.randn(24, dtype=f64), torch.arange(24) % 5
    std = math.sqrt(sum((x - rewards.mean()) ** 2 for x in rewards.tolist()) / 24)
    for r, reward, g in zip(pr.optimality(rewards, group).tolist(), rewards.tolist(), group.tolist()):
        mine = [x for x, h in zip(rewards.tolist(), group.tolist()) if h == g]
        wanted = .5 + .5 * max(-1, min(1, (reward - sum(mine) / len(mine)) / (5 * (std + 1e-4))))
        assert r == pytest.approx(wanted, abs=1e-12)
    assert (pr.optimality(torch.full((6,), 3.), torch.tensor([0, 0, 0, 7, 7, 7])) == .5).all()
    r = pr.optimality(torch.tensor([1., 1., 0., 4.]), torch.tensor([0, 0, 1, 1]))
    assert (r[:2] == .5).all() and r[2] < .5 < r[3]
    assert (pr.optimality(torch.tensor([5., -3.]), torch.tensor([0, 1])) == .5).all()        # a group of one says nothing
    far = pr.optimality(torch.cat([torch.zeros(999), torch.tensor([1000.])]), torch.zeros(1000, dtype=torch.long))
    assert far[-1] == 1 and far.min() >= 0


def test_eq12_the_group_is_the_face_so_equal_captions_stay_apart(whole, monkeypatch, tmp_path):
    """Two faces with one caption: each is judged against its own mean, whatever the authors' key would merge."""
    cfg, model, vocab, batch = whole
    seen, optimality, read = [], pr.optimality, pr.read_face
    monkeypatch.setattr(pr, "optimality", lambda rewards, group, *a: seen.append(group) or optimality(rewards, group, *a))
    monkeypatch.setattr(pr, "read_face", lambda m, v, cfg, *a: seen.append(cfg.ar) or read(m, v, cfg, *a))
    cfg = dataclasses.replace(cfg, preference_steps=1, output=str(tmp_path))
    faces = SimpleNamespace(training=lambda *a: dict(hq=batch["hq"][:2], lq=batch["lq"][:2], captions=["same", "same"]))
    pr.train_preference(cfg, common.Run(cfg), faces, copy.deepcopy(model), vocab)
    assert seen[0] == "greedy" and seen[1].tolist() == [0, 0, 0, 1, 1, 1]


def test_eq13_eq14_plus_and_minus_mirror_each_other_at_the_old_velocity():
    v, old = torch.randn(2, 3, 4, dtype=f64)
    plus, minus = pr.implicit_velocities(v, old, .1)
    torch.testing.assert_close((plus + minus) / 2, old)
    torch.testing.assert_close(plus - old, .1 * (v - old))
    assert torch.equal(pr.implicit_velocities(old, old, 1.)[0], old)


@pytest.mark.parametrize("beta", [.1, 1.])
def test_eq1_to_eq4_the_minimiser_is_the_old_velocity_moved_by_two_over_beta_delta(beta):
    """Clean samples from a discrete policy at one noisy point: the loss is least at v_old + 2 / beta Delta, where Delta
    is the same seen from pi+ [Eq. 1] and from pi- [Eq. 2]: alpha (v+ - v_old) = (1 - alpha) (v_old - v-)."""
    x0, share, r = torch.randn(6, dtype=f64), torch.rand(6, dtype=f64), torch.rand(6, dtype=f64)
    x_t, sigma = .4, .6
    eps = (x_t - (1 - sigma) * x0) / sigma
    posterior = share * torch.exp(-eps ** 2 / 2)                                             # pi_old(x0 | x_t)
    posterior = posterior / posterior.sum()
    mean = lambda weight: (weight * (eps - x0)).sum() / weight.sum()
    old, plus, minus, alpha = mean(posterior), mean(posterior * r), mean(posterior * (1 - r)), (posterior * r).sum()
    torch.testing.assert_close(alpha * plus + (1 - alpha) * minus, old)                      # the policies mix to the old
    delta = alpha * (plus - old)
    torch.testing.assert_close(delta, (1 - alpha) * (old - minus))
    v = old.clone().requires_grad_()
    point, level = torch.full((1, 1), x_t, dtype=f64), torch.full((1,), sigma, dtype=f64)
    each = [pr.nft_loss(v.view(1, 1), old.view(1, 1), point, x.view(1, 1), level, one.view(1), beta, form="velocity")
            for x, one in zip(x0, r)]
    gradient, = torch.autograd.grad((posterior * torch.stack(each)).sum(), v, create_graph=True)
    curvature, = torch.autograd.grad(gradient, v)
    best = (v - gradient / curvature).detach()                                               # quadratic: a Newton step
    torch.testing.assert_close(best, old + 2 / beta * delta)


def nft_inputs(batch=3):
    x0, eps, v, old, ref = torch.randn(5, batch, 2, 4, 4, dtype=f64)
    sigma, r = torch.rand(batch, dtype=f64) * .9 + .05, torch.rand(batch, dtype=f64)
    return x0, eps, v, old, ref, sigma, r, pr.interpolate(x0, eps, sigma)


def test_eq15_both_forms_against_loops():
    x0, eps, v, old, ref, sigma, r, x_t = nft_inputs()
    plain, stable = [], []
    for b in range(3):
        s, plus, minus, star = sigma[b], .9 * old[b] + .1 * v[b], 1.1 * old[b] - .1 * v[b], eps[b] - x0[b]
        plain.append(r[b] * ((plus - star) ** 2).mean() + (1 - r[b]) * ((minus - star) ** 2).mean())
        misses = [(x_t[b] - s * velocity) - x0[b] for velocity in (plus, minus)]
        terms = [(miss ** 2).mean() / max(miss.abs().mean().item(), 1e-5) for miss in misses]
        stable.append(5 / .1 * (r[b] * terms[0] + (1 - r[b]) * terms[1]))
    arguments = (v, old, x_t, x0, sigma, r, .1)
    torch.testing.assert_close(pr.nft_loss(*arguments, form="velocity"), sum(plain) / 3)
    torch.testing.assert_close(pr.nft_loss(*arguments), sum(stable) / 3)
    with_kl = pr.nft_loss(*arguments, v_ref=ref, kl_weight=.3)
    torch.testing.assert_close(with_kl, sum(stable) / 3 + .3 * ((v - ref) ** 2).mean())


@pytest.mark.parametrize("beta", [.1, 1.])
def test_eq15_gradient_at_the_old_policy_is_advantage_weighted_flow_matching(beta):
    """dL/dv = -A 2 sigma^2 (v* - v_old) / (w C H W B), w = sigma mean |v* - v_old|, A = 10 (r - 1/2): 5 and 1/beta
    cancel. To 1e-6 (here 1e-12). The value does not depend on r."""
    x0, eps, _, old, _, sigma, r, x_t = nft_inputs()
    v = old.clone().requires_grad_()
    loss = pr.nft_loss(v, old, x_t, x0, sigma, r, beta)
    gradient, = torch.autograd.grad(loss, v)
    for b in range(3):
        star = eps[b] - x0[b]
        w = sigma[b] * (star - old[b]).abs().mean()
        wanted = -10 * (r[b] - .5) * 2 * sigma[b] ** 2 * (star - old[b]) / (w * star.numel() * 3)
        torch.testing.assert_close(gradient[b], wanted, atol=1e-12, rtol=1e-9)
    torch.testing.assert_close(loss.detach(), pr.nft_loss(old, old, x_t, x0, sigma, 1 - r, beta))


@pytest.mark.parametrize("algorithm", ["nft", "grpo"])
def test_eq15_nft_finds_the_known_optimum_and_so_does_grpo_with_the_same_budget(algorithm):
    """Policies that are the exact flow to N(mean, 0.3^2), reward -(x - 2)^2, 60 epochs of 64 roll-outs, six levels each:
    the best mean is 2, with a reward of minus the variance, -0.09."""
    (mean, lagging), curve, grid = torch.zeros(2, dtype=f64), [], pr.sigma_grid(8)
    mean = mean.clone().requires_grad_()
    policy, old = gaussian_velocity(mean, .3), gaussian_velocity(lagging, .3)
    optimizer = torch.optim.Adam([mean], lr=.1)
    for epoch in range(60):
        noise = torch.randn(64, 1, 1, 1, dtype=f64)
        if algorithm == "nft":
            x0 = pr.dpm_solver_sample(old, noise, grid)
        else:
            path, log_probs = pr.sde_sample(policy, noise, grid, .7)
            x0 = path[-1]
        reward = -(x0.flatten() - 2) ** 2
        curve.append(reward.mean().item())
        r, loss = pr.optimality(reward, torch.zeros(64, dtype=torch.long)), 0.0
        for i in torch.randperm(7)[:6].tolist():
            sigma = torch.full((64,), grid[i], dtype=f64)
            if algorithm == "nft":
                x_t = pr.interpolate(x0, torch.randn_like(x0), sigma)
                loss = loss + pr.nft_loss(policy(x_t, sigma), old(x_t, sigma), x_t, x0, sigma, r, .1) / 6
            else:
                log_prob = pr.flow_sde_step(policy(path[i], sigma), path[i], grid[i], grid[i + 1], .7, path[i + 1])[1]
                loss = loss + pr.grpo_loss(log_prob, log_probs[:, i], (2 * r - 1) * 5, 1e-2) / 6
        optimizer.zero_grad(), loss.backward(), optimizer.step()
        lagging.lerp_(mean.detach(), 1 - pr.old_policy_decay(epoch + 1, 1))
    assert curve[0] < -3.5 and sum(curve[-5:]) / 5 > -.4 and abs(mean.item() - 2) < .4


def test_grpo_and_its_sde_steps_have_the_flow_as_limit_its_marginals_and_a_normal_density():
    x = torch.randn(20_000, 1, 1, 1, dtype=f64)
    field = gaussian_velocity(1.0, 0.5)
    v = field(x, torch.full((20_000,), .5, dtype=f64))
    step, _ = pr.flow_sde_step(v, x, .5, .4, 1e-9)
    torch.testing.assert_close(step, x - .1 * v, atol=1e-7, rtol=0)
    path, log_probs = pr.sde_sample(field, x, pr.sigma_grid(100), .7)
    assert path[-1].mean().item() == pytest.approx(1, abs=.02) and path[-1].std().item() == pytest.approx(.5, abs=.02)
    assert len(path) == 101 and log_probs.shape == (20_000, 99)
    again, log_prob = pr.flow_sde_step(v, x, .5, .4, .7)
    g = .7 * math.sqrt(.5 / .5)
    mean = x + (v + g * g / 1.0 * (x + .5 * v)) * -.1
    normal = torch.distributions.Normal(mean, g * math.sqrt(.1))
    torch.testing.assert_close(log_prob, normal.log_prob(again).flatten())
    torch.testing.assert_close(pr.flow_sde_step(v, x, .5, .4, .7, again)[1], log_prob)       # a stored step, read again
    now = torch.tensor([0., 0., .5], requires_grad=True)           # the policy gradient until the ratio leaves its clip
    pr.grpo_loss(now, torch.zeros(3), torch.tensor([2., -1., 3.]), .2).backward()
    torch.testing.assert_close(now.grad, torch.tensor([-2., 1., 0.]) / 3)


@pytest.fixture
def policies(whole):
    sana, plain = copy.deepcopy(whole[1].sana), copy.deepcopy(whole[1].sana)
    pr.add_policies(sana, 4, 8.)
    call = lambda net: net(torch.ones(1, 8, 8, 8), encoder_hidden_states=torch.ones(1, 3, 32), timestep=torch.ones(1),
                           return_dict=False)[0]
    return sana, plain, call


def test_policies_start_as_stage_1_the_base_stays_so_bit_for_bit_and_old_follows(policies):
    sana, plain, call = policies
    assert torch.equal(call(sana), call(plain)) and len(pr.policy_layers(sana)) == 2 * 8     # blocks x attentions x layers
    for layer in pr.policy_layers(sana).values():
        layer.lora_B.data.normal_()
    for still in ("base", "old"):                                                            # old still lags
        with pr.acting(sana, still):
            assert torch.equal(call(sana), call(plain))
    assert not torch.allclose(call(sana), call(plain))
    sana.requires_grad_(False)                                     # old never gets a gradient and follows by its decay
    for layer in pr.policy_layers(sana).values():
        layer.lora_A.requires_grad_(), layer.lora_B.requires_grad_(), layer.old_B.normal_()
    with pr.acting(sana, "old"):
        assert not call(sana).requires_grad
    call(sana).sum().backward()
    layer = next(iter(pr.policy_layers(sana).values()))
    assert layer.lora_B.grad.abs().sum() > 0 and not layer.old_B.requires_grad and layer.base.weight.grad is None
    layer.lora_A.data.add_(1)
    wanted = [(.3 * old + .7 * new).detach() for old, new in ((layer.old_A, layer.lora_A), (layer.old_B, layer.lora_B))]
    pr.update_old(sana, .3)
    torch.testing.assert_close([layer.old_A, layer.old_B], wanted)
    at = lambda kind: [round(pr.old_policy_decay(step, kind), 6) for step in (0, 75, 76, 500, 1000)]
    assert at(0) == [0] * 5 and at(1) == [0, .075, .076, .5, .5] and at(2) == [0, 0, .0075, .999, .999]


def test_lora_in_pefts_layout_is_w_plus_scaled_b_a(policies, tmp_path):
    sana, plain, call = policies
    for layer in pr.policy_layers(sana).values():
        layer.lora_B.data.normal_()
    pr.save_peft(sana, tmp_path / "lora")
    config = json.loads((tmp_path / "lora" / "adapter_config.json").read_text())
    assert config["r"] == 4 and config["lora_alpha"] == 8 and config["peft_type"] == "LORA"
    state = safetensors.torch.load_file(tmp_path / "lora" / "adapter_model.safetensors")
    assert "base_model.model.transformer_blocks.1.attn2.to_out.0.lora_B.weight" in state and len(state) == 2 * 16
    merged, rescaled = copy.deepcopy(plain), copy.deepcopy(plain)
    for name, layer in merged.named_modules():
        key = f"base_model.model.{name}.lora_A.weight"
        if key in state:
            layer.weight.data += 8 / 4 * state[key.replace("lora_A", "lora_B")] @ state[key]
    torch.testing.assert_close(call(merged), call(sana), atol=1e-4, rtol=1e-4)
    pr.load_peft(plain, str(tmp_path))                                                       # finds its lora/ inside
    torch.testing.assert_close(call(plain), call(sana))
    (tmp_path / "lora" / "adapter_config.json").write_text(json.dumps(dict(config, lora_alpha=2)))
    pr.load_peft(rescaled, str(tmp_path / "lora"))
    assert {layer.scale.item() for layer in pr.policy_layers(rescaled).values()} == {.5}


SEMANTIC = ("integrator.llm.embed_tokens", "integrator.llm.layers.0", "integrator.connector.0")
CAPTION = ("sana.caption_projection", "sana.caption_norm")
TEXTURE = ("sana.transformer_blocks.", "texture.", "lq_encoder.")
diffusion_of = lambda loss: lambda *given: (loss(*given)[1]["diffusion"],)


@pytest.mark.parametrize("stage, loss, changes, wanted, others", [
    ("1.1", pr.semantic_loss, {}, SEMANTIC + CAPTION, ("integrator.", "sana.caption_")),
    ("1.1", pr.semantic_loss, dict(as_printed=True), SEMANTIC, ("integrator.",)),            # the paper's frozen G
    ("1.1", diffusion_of(pr.semantic_loss), {}, ("integrator.llm.layers.0.self_attn",), ("integrator.", "sana.caption_")),
    ("1.2", pr.texture_loss, {}, TEXTURE, TEXTURE),                # E_0, the decoder, Qwen3 and projections stay
    ("1.2", diffusion_of(pr.texture_loss), {}, TEXTURE, TEXTURE),  # E_psi learns also without Eq. 10
    ("1.2", pr.texture_loss, dict(semantic=False), TEXTURE, TEXTURE),
    ("joint", pr.joint_loss, {}, SEMANTIC + CAPTION + TEXTURE, ("integrator.", "sana.caption_", *TEXTURE))])
def test_what_each_stage_teaches(whole, stage, loss, changes, wanted, others):
    """Fact sheet (b), (c): gradients pass through frozen networks and reach `wanted`; nothing but `others` changes."""
    cfg, model, vocab, batch = whole
    cfg, model = dataclasses.replace(cfg, condition_dropout=0., **changes), copy.deepcopy(model)
    before = copy.deepcopy(model.state_dict())
    parameters = pr.route(model, stage, cfg)
    loss(model, vocab, cfg, batch)[0].backward()
    torch.optim.SGD(parameters, .1).step()
    got = {n for n, t in model.state_dict().items() if not torch.equal(t, before[n])}
    got |= {n for n, p in model.named_parameters() if p.grad is not None and p.grad.abs().sum() > 0}
    assert all(any(n.startswith(start) for n in got) for start in wanted) and all(n.startswith(others) for n in got)


def test_condition_is_semantic_then_texture_tokens_and_section_4b1_draws_the_former(whole):
    cfg, model, vocab, batch = whole
    read = lambda seed, **changes: pr.read_face(model, vocab, dataclasses.replace(cfg, **changes), batch["lq"],
                                                batch["captions"], torch.Generator().manual_seed(seed))
    cond, z = read(0), model.encode_lq(batch["lq"])
    assert cond.shape == (4, 5 + 64, 32) and pr.Train().ar == cfg.ar == "sample"
    torch.testing.assert_close(cond[:, 5:], model.texture(model.sana.patch_embed(z)))
    assert torch.equal(read(0), cond) and not torch.equal(read(1), cond)
    assert torch.equal(read(0, ar="greedy"), read(1, ar="greedy"))


def test_own_answers_are_those_of_inference(whole):
    cfg, model, vocab, batch = whole
    source, answer = torch.randint(16, (2, 4, 4))
    batch = dict(batch, captions=["", "a person", "", "a hat"], tasks=["restore"] * 4)
    write = lambda share: pr.write_answers(model, vocab, dataclasses.replace(cfg, own_answers=share), batch, source, answer)
    assert torch.equal(write(0.), answer)
    tokens, states = model.integrator.generate(pr.build_sequence(vocab, source, batch["captions"]), vocab, 4)
    assert torch.equal(write(1.), tokens) and not torch.equal(tokens, answer)
    seen, sequence = pr.teacher_forced(model, vocab, cfg, batch, source, tokens)
    torch.testing.assert_close(pr.answer_states(seen, sequence.start, 4), states, rtol=1e-4, atol=1e-5)
    torch.manual_seed(5)
    own = torch.rand(4) < .5
    torch.manual_seed(5)
    some = write(.5)
    assert own.any() and not own.all() and torch.equal(some[own], tokens[own]) and torch.equal(some[~own], answer[~own])


def test_toy_rewards_prefer_the_face_itself_and_read_captions():
    faces = toy_faces(torch.arange(6), torch.arange(6))
    captions = [common.verbalise(a) for a in faces.attributes.tolist()]
    reader = pr.metrics.load_reader("a")
    blurred = F.interpolate(F.avg_pool2d(faces.image, 8), scale_factor=8, mode="bilinear").clamp(-1, 1)
    score = lambda names, x: pr.score(pr.toy_rewards(*map(pr.metrics.load_reader, names)), x, faces.image, captions, size=4)
    same, worse, other, both = score("a", faces.image), score("a", blurred), score("c", blurred), score("ac", blurred)
    assert set(same) == set(pr.REWARD_FILES) and all((same[name] > worse[name]).float().mean() > .8 for name in same)
    for name, wanted in dict(hps=reader.quality(blurred), lpips=-pr.metrics.reader_lpips(reader, blurred, faces.image) / 2,
                             identity=(reader.embed(blurred) * reader.embed(faces.image)).sum(1),
                             lmd=pr.landmark_reward(reader)(blurred, faces.image, captions)).items():
        torch.testing.assert_close(worse[name], wanted, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(worse["pick"], worse["hps"] * worse["clip"])
    for name in worse:                                             # several readers: their mean
        torch.testing.assert_close(both[name], (worse[name] + other[name]) / 2)
    found = pr.caption_targets("a photo of an older smiling person with wavy blond hair, wearing a hat")
    assert found.nan_to_num(-1).tolist() == [0, 1, -1, -1, -1, 1, 0, 0, 1, 0, 0, 1]
    points = torch.rand(2, 98, 2) * 64                             # landmarks: in pixels of a 512 face
    network = SimpleNamespace(landmarks=lambda x: points + torch.tensor([5 * 64 / 512 * (x.sum() > 0), 0.]))
    reward = pr.landmark_reward(network)(torch.ones(2, 3, 64, 64), -torch.ones(2, 3, 64, 64), None)
    torch.testing.assert_close(reward, torch.full((2,), .8))  # d = 5: the fact sheet's example
    lost = SimpleNamespace(landmarks=lambda x: torch.full((1, 98, 2), math.nan))
    assert pr.landmark_reward(lost)(torch.ones(1, 3, 8, 8), torch.ones(1, 3, 8, 8), None).item() == pytest.approx(.01)


class OpenClip(nn.Module):
    """open_clip's network of PyTorch's own transformer, released() under open_clip's names."""

    def __init__(self):
        super().__init__()
        noise = lambda *shape: nn.Parameter(torch.randn(*shape))
        tower = lambda: nn.TransformerEncoder(nn.TransformerEncoderLayer(
            16, 2, 32, 0., "gelu", batch_first=True, norm_first=True), 2, enable_nested_tensor=False)
        self.visual, self.logit_scale, self.token_embedding = nn.Module(), nn.Parameter(torch.tensor(2.)), nn.Embedding(40, 16)
        self.visual.conv1 = nn.Conv2d(3, 16, 4, 4, bias=False)
        self.visual.class_embedding, self.visual.proj, self.text_projection = noise(16), noise(16, 12), noise(16, 12)
        self.visual.positional_embedding, self.positional_embedding = noise(1 + 4, 16), noise(7, 16)
        self.visual.ln_pre, self.visual.ln_post, self.ln_final = (nn.LayerNorm(16) for _ in range(3))
        self.visual.transformer, self.transformer = tower(), tower()

    def image(self, x):
        x = self.visual.conv1(x).flatten(2).mT
        x = torch.cat([self.visual.class_embedding.expand(len(x), 1, -1), x], 1) + self.visual.positional_embedding
        return self.visual.ln_post(self.visual.transformer(self.visual.ln_pre(x))[:, 0]) @ self.visual.proj

    def text(self, ids):
        mask = torch.full((ids.shape[1],) * 2, -math.inf).triu(1)
        x = self.transformer(self.token_embedding(ids) + self.positional_embedding, mask)
        return self.ln_final(x)[torch.arange(len(ids)), ids.argmax(1)] @ self.text_projection

    def released(self):
        names = dict(layers="resblocks", self_attn="attn", linear1="mlp.c_fc", linear2="mlp.c_proj", norm1="ln_1", norm2="ln_2")
        return {".".join(names.get(part, part) for part in n.split(".")): t for n, t in self.state_dict().items()}


SMALL = dict(hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, hidden_act="gelu", projection_dim=12)
CLIP = dict(projection_dim=12, vision_config=dict(SMALL, image_size=8, patch_size=4), text_config=dict(
    SMALL, vocab_size=40, max_position_embeddings=7, eos_token_id=39, bos_token_id=38, pad_token_id=0))


def test_open_clip_weights_become_a_clip_model_with_the_same_embeddings():
    from transformers import CLIPConfig, CLIPModel
    theirs, ours = OpenClip().eval(), CLIPModel(CLIPConfig(**CLIP)).eval()
    for p in theirs.parameters():
        p.data.normal_(std=.3)
    common.load_strict(ours, pr.convert_open_clip(theirs.released()), "test")
    x, ids = torch.randn(3, 3, 8, 8), torch.tensor([[38, 5, 6, 39, 0, 0, 0], [38, 1, 39, 0, 0, 0, 0]])
    image, text = ours.vision_model(pixel_values=x).pooler_output, ours.text_model(input_ids=ids).pooler_output
    torch.testing.assert_close(ours.visual_projection(image), theirs.image(x), atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(ours.text_projection(text), theirs.text(ids), atol=1e-5, rtol=1e-4)


def test_real_rewards_from_files_in_the_released_formats(tmp_path, monkeypatch):
    """All six networks, tiny or random, under the names of their releases."""
    from torchvision.models import vgg
    from transformers import CLIPConfig, CLIPModel
    monkeypatch.setattr(pr, "HPS_CLIP", CLIP)
    files = {name: tmp_path / file for name, file in pr.REWARD_FILES.items()}
    for name in ("clip", "pick"):
        CLIPModel(CLIPConfig(**CLIP)).save_pretrained(files[name])
    sana.word_tokenizer().save_pretrained(str(files["clip"]))
    torch.save({"state_dict": OpenClip().released()}, files["hps"])
    torch.save(pr.metrics.ArcFaceGray().state_dict(), files["identity"])
    torch.save(pr.metrics.FAN98().state_dict(), files["lmd"])
    torch.save({"features." + n: t for n, t in vgg.make_layers(vgg.cfgs["D"]).state_dict().items()}, files["lpips"])
    rewards = pr.build_rewards(pr.Train(rewards=str(tmp_path)), "cpu")
    x, y = torch.rand(2, 2, 3, 32, 32) * 2 - 1
    y[1] = x[1]                                                    # the second face is restored perfectly
    scores, one = pr.score(rewards, x, y, ["a face", ""]), pr.score(rewards, x, y, ["a face", ""], size=1)
    assert list(scores) == list(pr.REWARD_FILES) and all(v.shape == (2,) for v in scores.values())
    assert all(v.isfinite().all() and v.abs().max() <= 1 for name, v in scores.items() if name != "lpips")
    assert scores["lpips"][0] < 0 and scores["lpips"][1].abs() < 1e-6 and (scores["lmd"] > 0).all()
    torch.testing.assert_close(torch.stack([scores["identity"][1], scores["lmd"][1]]), torch.ones(2))
    torch.testing.assert_close(one, scores, rtol=1e-4, atol=1e-5)  # picture by picture: the same
    pick = pr.real_reward(tmp_path, "pick", "cpu")
    assert pick.scale == pytest.approx(pick.model.logit_scale.exp().item() / 26)


def test_clip_rewards_shrink_pictures_as_their_own_code_does():
    """HPSv2: torchvision's bicubic on tensors; CLIPScore: its default; PickScore: Pillow's bicubic on 8 bits."""
    from torchvision.transforms import v2
    x = torch.rand(2, 3, 40, 40) * 2 - 1
    bicubic = v2.Resize((16, 16), interpolation=v2.InterpolationMode.BICUBIC, antialias=True)
    torch.testing.assert_close(pr.RESIZE["hps"](x, 16), bicubic(x))
    torch.testing.assert_close(pr.RESIZE["clip"](x, 16), v2.Resize((16, 16), antialias=True)(x))
    for p, ours in zip(x, pr.RESIZE["pick"](x, 16)):
        small = common.Image.fromarray(((p + 1) * 127.5).round().byte().permute(1, 2, 0).numpy()).resize((16, 16), 3)
        torch.testing.assert_close(ours, torch.tensor(list(small.getdata())).mT.view(3, 16, 16) / 127.5 - 1)


def test_parameter_counts_of_the_full_size_networks():
    """Fact sheet 1.1, 2, 4.2, on the meta device: 1874.475 M is the figure in the authors' training log."""
    from diffusers import AutoencoderDC, SanaTransformer2DModel
    with torch.device("meta"):
        small, large = (pr.SemanticIntegrator(c, 2304) for c in (pr.QWEN3_06B, pr.QWEN3_17B))
        sana, vae, texture = SanaTransformer2DModel(**pr.SANA15), AutoencoderDC(**pr.DCAE), pr.connector(2240, 2304)
    count = lambda *modules: sum(p.numel() for module in modules for p in module.parameters())
    million = lambda *modules: round(count(*modules) / 1e6, 2)
    caption = (sana.caption_projection, sana.caption_norm)
    assert round(count(large.llm) / 1e6, 3) == 1854.256 and round(count(large.connector) / 1e6, 3) == 10.034
    assert round(count(large, *caption) / 1e6, 3) == 1874.475
    assert round(count(small.llm, large.connector, *caption) / 1e6) == 683 or million(small, *caption) == 680.75
    assert million(sana) == 1604.64 and million(sana.transformer_blocks) == 1558.59
    assert million(vae) == 312.25 and million(vae.encoder) == 153.03
    assert count(texture) == 2240 * 2304 + 2304 + 2304 ** 2 + 2 * 2304
    pr.add_policies(sana, 32, 64.)
    assert sum(p.numel() for n, p in sana.named_parameters() if ".lora_" in n) == 22_937_600


def release(folder, finished=True):
    """Tiny random networks in the authors' layout: two shards, config.json, tokenizer; SANA's folder beside it."""
    torch.manual_seed(3)
    model, vocab = sana.build(SIZES)
    model.latent_scale.fill_(0.41407)
    for p in model.parameters():
        p.data += .01 * torch.randn_like(p)
    sana.save(folder.parent / "sana", model, vocab, torch.float32)
    parts = {"model.": model.integrator.llm, "model.diffusion_connector.": model.integrator.connector, "model.sana.": model.sana,
             "model.sana_vae.encoder.": model.lq_encoder, "model.sana_vae.decoder.": model.vae.decoder}
    tower = "model.vision_tower.vision_tower."
    if finished:
        parts |= {"model.vae_connector.": model.texture, "fixed_vae.": model.vae, tower: model.tatok}
    state = {prefix + n: t.clone() for prefix, part in parts.items() for n, t in part.state_dict().items()}
    state.pop("model.vae_connector.3.weight", None)
    state |= {tower + "decoder.layers.0.weight": torch.zeros(2)} if finished else {}         # of TA-Tok's own training
    folder.mkdir(parents=True, exist_ok=True)
    for i in range(2):
        shard = {n: state[n] for n in sorted(state)[i::2]}
        safetensors.torch.save_file(shard, folder / f"model-0000{i + 1}-of-00002.safetensors")
    config = json.loads((folder.parent / "sana" / "config.json").read_text()) | dict(model_type="blip3o_qwen_inference")
    (folder / "config.json").write_text(json.dumps(config))
    vocab.tokenizer.save_pretrained(str(folder))
    return model, vocab


def test_releases_load_the_authors_finished_or_before_stage_1_2_and_qwens_own(tmp_path):
    wanted, vocab = release(tmp_path / "release")
    model, tokens, finished = pr.load_release(str(tmp_path / "release"), sana=str(tmp_path / "sana"))
    state = model.state_dict()
    for name, tensor in wanted.state_dict().items():
        if name != "texture.3.weight":
            assert torch.equal(state[name], tensor), name
    assert torch.equal(model.texture[3].weight, wanted.integrator.connector[3].weight)       # the tied RMSNorm
    assert finished == ["1.1", "1.2"] and (tokens.first_code, tokens.size) == (vocab.first_code, vocab.size)
    assert model.latent_scale.item() == pytest.approx(.41407)
    release(tmp_path / "early", finished=False)
    arguments = {"bottleneck": {"args": {"bottleneck_dim": 8}}, "x": SimpleNamespace(a=argparse.Namespace(b=1))}
    save = {"sd": wanted.tatok.state_dict() | {"teacher.w": torch.zeros(1).bfloat16()}, "args": arguments}
    torch.save({"model": save}, tmp_path / "ta_tok.pth")
    with pytest.raises(pickle.UnpicklingError):
        torch.load(tmp_path / "ta_tok.pth", weights_only=True)                               # why it needs its own reader
    found, told = pr.read_ta_tok(tmp_path / "ta_tok.pth")
    assert same(found, wanted.tatok.state_dict()) and told == arguments | {"x": {"a": {"b": 1}}}        # harmless shells
    model, _, finished = pr.load_release(*(str(tmp_path / name) for name in ("early", "sana", "ta_tok.pth")))
    assert finished == [] and same(model.tatok.state_dict(), wanted.tatok.state_dict())
    assert torch.equal(model.vae.encoder.conv_in.conv.weight, wanted.vae.encoder.conv_in.conv.weight)   # E_0 of --sana
    # Qwen3, SANA, DC-AE and TA-Tok, each as its own project releases it: the new tokens are added
    from transformers import Qwen3Config, Qwen3ForCausalLM
    count = len(vocab.tokenizer)
    llm = dict(SIZES["llm"], vocab_size=count + 7, tie_word_embeddings=False)                # padded, as Qwen3's table is
    qwen = Qwen3ForCausalLM(Qwen3Config(**llm))
    qwen.save_pretrained(tmp_path / "qwen")
    vocab.tokenizer.save_pretrained(str(tmp_path / "qwen"))
    built, tokens, finished = pr.load_release(*(str(tmp_path / name) for name in ("qwen", "sana", "ta_tok.pth")))
    assert pr.qwen_sizes({"rope_theta": 1000000})["rope_parameters"]["rope_theta"] == 1e6    # as transformers 4 wrote it
    table, old = built.integrator.llm.embed_tokens.weight, qwen.model.embed_tokens.weight
    assert finished == [] and tokens.image_start == count and table.shape == (count + 5 + 16, 32)
    assert torch.equal(table[:count], old[:count]) and built.integrator.head.shape == table.shape
    torch.testing.assert_close(table[count:], old[:count].mean(0).expand(21, -1))
    torch.testing.assert_close(built.integrator.head[-1], qwen.lm_head.weight[:count].mean(0))
    assert all(same(getattr(built, n).state_dict(), getattr(wanted, n).state_dict()) for n in ("tatok", "sana", "vae"))


@pytest.mark.filterwarnings("ignore:.torch.jit")
def test_no_file_of_weights_runs_code(whole, tmp_path):
    """A TorchScript archive and two pickles that would write a file: each is refused in one line, nothing is written."""
    sprung, sana_net = tmp_path / "sprung", copy.deepcopy(whole[1].sana)
    torch.save({"model": {"sd": {}, "args": SimpleNamespace(a=Trap(sprung))}, "w": Trap(sprung)}, tmp_path / "zip")
    (tmp_path / "pickle").write_bytes(pickle.dumps(Trap(sprung)))
    torch.jit.script(ScriptTrap(str(sprung))).save(str(tmp_path / "script"))
    assert not sprung.exists()
    torch.jit.load(str(tmp_path / "script"))
    assert sprung.exists()                                         # the trap works
    sprung.unlink()
    (tmp_path / "adapter_config.json").write_text(json.dumps(dict(r=4, lora_alpha=8)))
    for name, read in {"ta_tok.pth": lambda: pr.read_ta_tok(tmp_path / "ta_tok.pth"),
                       "adapter_model.safetensors": lambda: pr.load_peft(sana_net, str(tmp_path)),
                       "pytorch_model.bin": lambda: pr.read_release(str(tmp_path))}.items():
        for trap in ("zip", "pickle", "script"):
            shutil.copy(tmp_path / trap, tmp_path / name)
            with pytest.raises(common.UserError) as refused:
                read()
            assert "\n" not in str(refused.value) and not sprung.exists(), (name, trap)
        (tmp_path / name).unlink()


def test_eq16_the_degradation_is_the_training_scripts():
    spec = common.DEGRADATIONS["pref_restore"]
    assert (spec.blur, spec.down, spec.noise, spec.jpeg, spec.kernel) == ((1, 15), (1, 30), (0, 20), (30, 90), 41)


call, _ = caller(pr)
parts_in = lambda folder: {path.stem for path in folder.glob("*.safetensors")}


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """(folder with a tiny run of all stages in out/ and six pictures in faces/, the flags of the run)."""
    folder = tmp_path_factory.mktemp("run")
    torch.manual_seed(0)
    sana.save(folder / "sana", *sana.build(SIZES))
    data, short = toy_data(folder / "data"), [part for k, v in (TINY | STEPS).items() for part in (f"--{k}", str(v))]
    flags = [*short, "--data", data / "train", "--validation_data", data / "val", "--sana", folder / "sana", "--pretrained"]
    call("train", *flags, folder / "sana", "-o", folder / "out")
    toy_pictures(folder / "faces", 6)
    return folder, flags


def restored(trained, out, *flags):
    folder = trained[0]
    call("sample", "-i", folder / "faces", "-o", out, "--checkpoint", folder / "out", "--device", "cpu", *flags)
    return torch.stack([common.read_image(p) for p in sorted((out / "restored_faces").iterdir())])


def test_training_leaves_weights_numbers_pictures_and_a_lora(trained):
    out = trained[0] / "out"
    numbers, parts = json.loads((out / "metrics.json").read_text()), weights(out)
    assert list(numbers["rows"]) == ["lq", "stage_1", "restored_faces", "reconstruction"] and numbers["faces"] == 6
    assert {"reward_toy", "lmd_toy", "lpips_toy"} <= set(numbers["rows"]["restored_faces"]) and "reward_lmd_toy" in numbers
    stages = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()[1:]]
    assert [row["stage"] for row in stages] == ["1.1"] * 3 + ["1.2"] * 3 + ["2"] * 3 and "reward_toy" in stages[-1]
    assert parts_in(out) == {"1.1", "1.2", "2"} and (out / "samples.png").exists()
    assert json.loads((out / "lora" / "adapter_config.json").read_text())["r"] == 4
    assert all(p.isfinite().all() and (".lora_" in n) == (n[0] == "2") for n, p in parts.items())


def test_stage_by_stage_equals_all_at_once_also_on_another_runs_parts(trained, tmp_path):
    folder, flags = trained
    for stage in ("1.1", "1.2", "2"):
        call("train", *flags, folder / "sana", "-o", tmp_path / "steps", "--stage", stage)
    wanted = weights(folder / "out")
    assert same(wanted, weights(tmp_path / "steps"))
    call("train", *flags, folder / "out", "-o", tmp_path / "two", "--stage", "2")
    assert same({n: t for n, t in wanted.items() if n[0] == "2"}, weights(tmp_path / "two"))  # holds what it trained
    assert torch.equal(*(restored(trained, tmp_path / f"r_{run}", "--checkpoint", tmp_path / run) for run in ("steps", "two")))


KILLED = """
import os, signal, sys, common, pref_restore
save = common.Run.save
def dying(run, stage, step, *rest, **more):
    save(run, stage, step, *rest, **more)
    if (stage, step + 1) == ("2", 2):
        os.kill(os.getpid(), signal.SIGKILL)
common.Run.save = dying
common.command_line("x", pref_restore.VERBS, sys.argv[1:])
"""


def test_a_killed_run_goes_on_to_the_same_weights(trained, tmp_path):
    """SIGKILL amid stage 2, then --resume_from_checkpoint latest: bit by bit the uninterrupted run."""
    flags = [*map(str, trained[1]), str(trained[0] / "sana"), "-o", str(tmp_path)]
    command = [sys.executable, "-c", KILLED, "train", *flags, "--checkpointing_steps", "1"]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert ended.returncode == -9, ended.stderr[-2000:]
    call("train", *flags, "--resume_from_checkpoint", "latest")
    assert same(weights(trained[0] / "out"), weights(tmp_path))


def test_sampling_depends_on_the_seed_and_the_caption_and_on_nothing_else(trained, tmp_path):
    draw = lambda name, *flags: restored(trained, tmp_path / name, *flags)
    near = lambda a, b: (a - b).abs().max() <= 2 / 127.5 + 1e-6
    a, caption, greedy = draw("a"), "a photo of an older smiling person", ("--ar", "greedy")
    assert near(a, draw("b", "--batch_size", "4")) and not torch.equal(a, draw("c", "--seed", "1"))
    (tmp_path / "captions.json").write_text(json.dumps({f"{i:02d}.png": caption for i in range(5)}))
    told, plain = draw("d", "--caption", caption, *greedy), draw("f", *greedy)
    named = draw("e", "--captions", tmp_path / "captions.json", *greedy, "--batch_size", "3")
    assert near(told[:5], named[:5]) and near(named[5], plain[5]) and not torch.equal(told, plain)
    assert not torch.equal(draw("g", "--policy", "base"), a) and torch.equal(draw("h", "--lora", trained[0] / "out"), a)


def test_the_authors_layout_trains_and_samples_and_other_arms_run(trained, tmp_path, monkeypatch):
    """Joint training as printed, texture alone; then stage 2 and `sample` on a finished checkpoint of the authors' layout."""
    folder, flags = trained
    joint = [*flags, folder / "sana", "-o", tmp_path / "joint", "--as_printed", "--stage"]
    call("train", *joint, "joint", "--gradient_checkpointing", "--gradient_accumulation_steps", "2", "--guidance_scale", "2")
    call("train", *joint, "2", "--resume_from_checkpoint", "latest")
    assert parts_in(tmp_path / "joint") == {"joint", "2"}
    call("train", *flags, folder / "sana", "-o", tmp_path / "texture", "--no-semantic", "--stage", "1")
    assert len(restored(trained, tmp_path / "r", "--checkpoint", tmp_path / "texture")) == 6
    release(tmp_path / "release")
    call("train", *flags, tmp_path / "release", "--sana", tmp_path / "sana", "-o", tmp_path / "out")
    assert parts_in(tmp_path / "out") == {"2"}
    ours = restored(trained, tmp_path / "s", "--checkpoint", tmp_path / "out", "--policy", "base", "--solver", "dpm")
    monkeypatch.setattr(pr, "Train", functools.partial(pr.Train, image_size=32, guidance_scale=1.0))
    monkeypatch.setattr(pr, "open_run", lambda where, cls: (None, None))
    theirs = restored(trained, tmp_path / "t", "--checkpoint", tmp_path / "release", "--sana", tmp_path / "sana",
                      "--num_inference_steps", "2", "--solver", "dpm")
    assert torch.equal(ours, theirs)
