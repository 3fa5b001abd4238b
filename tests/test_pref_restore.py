"""Pref-Restore: closed forms in the paper's order, gradient routing, released layouts, and the program. No download."""
import copy
import dataclasses
import functools
import json
import math
from pathlib import Path
from types import SimpleNamespace

import pytest
import safetensors.torch
import torch
import torch.nn as nn
import torch.nn.functional as F

import common
import pref_restore as pr
from program import caller, same, toy_data, toy_pictures, weights
from toy import sana
from toy.faces import toy_faces

f64, close = torch.float64, torch.testing.assert_close
SIZES = sana.sizes_of(size=32, token_side=2, codes=16, code_dim=8, siglip_width=72, llm_width=32, llm_layers=2, channels=8,
                      vae_widths=(16, 16, 32), heads=1, layers=2)
TINY = dict(image_size=32, batch_size=4, rank=4, groups=2, group_size=3, rollout_steps=3, num_inference_steps=2, device="cpu",
            mixed_precision="no", semantic_steps=3, texture_steps=3, preference_steps=3, validation_faces=6, log_steps=1)


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
    vocab = pr.Vocabulary(sana.chat_tokenizer(), 65_536)
    tokens = torch.randint(65_536, (1, 729))
    prompt, whole = pr.build_sequence(vocab, tokens, [""]), pr.build_sequence(vocab, tokens, [""], tokens)
    assert len(vocab.encode(pr.SYSTEM)) == 11 and len(vocab.encode(pr.USER + pr.ASK + pr.END)) == 12
    assert prompt.ids.shape == (1, 757) and whole.ids.shape == (1, 1489) and 1 not in prompt.ids        # nothing is unknown
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
        assert torch.equal(s.labels[b][kept], s.ids[b][kept]) and s.ids[b, start] == vocab.scale
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
    assert long.ids.shape[1] == 80 and (long.ids == vocab.encode("young")[0]).sum() == pr.caption_room(vocab, 4, 80)


@pytest.mark.parametrize("normalized", [True, False])
def test_simvq_takes_the_nearest_code_and_passes_the_gradient_straight(normalized):
    quantiser, z = pr.SimVQ(7, 3, normalized), torch.randn(2, 5, 3, requires_grad=True)
    code, ids, loss = quantiser(z)
    scaled = lambda v: v / v.norm(dim=-1, keepdim=True) if normalized else v
    table, flat = scaled(quantiser.embedding_proj(quantiser.embedding.weight)), scaled(z)
    assert ids.tolist() == [[min(range(7), key=lambda k: (z_n - table[k]).norm().item()) for z_n in z_b] for z_b in flat]
    close((code, loss), (table[ids], 1.25 * (table[ids] - flat).square().mean()))
    weight = torch.randn_like(code)
    gradient = lambda value: torch.autograd.grad((value * weight).sum(), z, retain_graph=True)
    close(gradient(code), gradient(flat))                          # as if nothing were rounded
    loss.backward()
    assert quantiser.embedding.weight.grad is None and quantiser.embedding_proj.weight.grad.abs().sum() > 0


def test_ta_tok_reads_the_layer_before_the_last(whole):
    model, images = copy.deepcopy(whole[1].tatok), whole[3]["hq"]
    before, tokens = model.features(images), model.encode(images)
    for p in [*model.encoder.encoder.layers[-1].parameters(), *model.encoder.post_layernorm.parameters()]:
        p.data.normal_()
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(model.encode(images), tokens)           # in every precision
    model.encoder.encoder.layers[-2].mlp.fc2.weight.data.normal_()
    assert not torch.equal(model.features(images), before)


def test_eq7_token_loss_is_the_plain_cross_entropy_in_value_and_gradient():
    states, head = (torch.randn(*shape, dtype=f64, requires_grad=True) for shape in ((2, 9, 6), (11, 6)))
    labels = torch.randint(11, (2, 9))
    labels[0, 3:6], labels[1, 7:] = -100, -100
    loss = pr.token_loss(states, head, labels, chunk=4)
    logits = (states @ head.T)[:, :-1].reshape(-1, 11)
    plain = F.cross_entropy(logits, labels[:, 1:].reshape(-1), ignore_index=-100)
    close(loss, plain)
    close(*(torch.autograd.grad(value, (states, head)) for value in (loss, plain)), atol=1e-6, rtol=1e-5)


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
    close(once, total, atol=1e-4, rtol=1e-4)


def test_training_and_inference_condition_on_the_same_positions(whole):
    """States that generation leaves, with cache and left padding, are those of a full pass sliced from <S0>."""
    _, model, vocab, batch = whole
    source = torch.randint(16, (4, 4))
    prompt = pr.build_sequence(vocab, source, batch["captions"])
    assert len(set(prompt.mask.sum(1).tolist())) > 1 and not prompt.mask[1, 0]  # unequal, padded on the left
    tokens, states = model.integrator.generate(prompt, vocab, 4)
    assert tokens.shape == (4, 4) and states.shape == (4, 5, 32)
    full = pr.build_sequence(vocab, source, batch["captions"], tokens)
    close(states, pr.answer_states(model.integrator(full), full.start, 4), atol=1e-5, rtol=1e-4)
    model = copy.deepcopy(model)
    pr.recompute_activations(model)                                                          # alike amid training
    close(model.train().integrator.generate(prompt, vocab, 4), (tokens, states))
    tokens, _ = model.integrator.generate(prompt, vocab, 9, top_p=0.9, temperature=1.0)      # exactly N visual tokens
    assert tokens.shape == (4, 9) and tokens.min() >= 0 and tokens.max() < 16


def test_pick_token_draws_in_proportion_from_what_transformers_would_leave():
    from transformers import TopKLogitsWarper, TopPLogitsWarper
    logits = torch.tensor([0.4, 0.3, 0.2, 0.1]).log()[None].expand(4000, -1)
    for top_k, top_p in ((4, .65), (3, .99), (2, .56), (1, .99)):  # top_p is a share of what top_k has left
        tokens = pr.pick_token(logits, top_k, top_p, temperature=1.)
        wanted = TopPLogitsWarper(top_p)(None, TopKLogitsWarper(top_k)(None, logits)).softmax(-1)[0]
        close(torch.bincount(tokens, minlength=4) / 4000, wanted, atol=.03, rtol=0)
    assert (pr.pick_token(logits) == 0).all()


def gaussian_velocity(mean, deviation):
    """The exact velocity of the flow from N(0, 1) at sigma 1 to N(mean, deviation^2) at sigma 0."""
    def velocity(x, sigma):
        s = sigma.view(-1, *[1] * (x.dim() - 1))
        variance = (1 - s) ** 2 * deviation ** 2 + s ** 2
        return -mean + (s - (1 - s) * deviation ** 2) / variance * (x - (1 - s) * mean)
    return velocity


def test_eq8_solvers_are_exact_on_straight_lines_converge_at_orders_one_and_two_and_remove_the_last_noise():
    x0, eps = torch.randn(2, 3, 4, 5, 5, dtype=f64)
    for steps in (1, 2, 3, 7):
        for sample in (pr.euler_sample, pr.dpm_solver_sample):
            close(sample(lambda x, sigma: eps - x0, eps, pr.sigma_grid(steps)), x0)
    # orders: from sigma .9 to .1 against the closed form; at the ends, where lambda is infinite, DPM is first-order
    x, m, d = torch.randn(64, 1, 1, 1, dtype=f64), 1.5, .3
    width = lambda s: math.sqrt((1 - s) ** 2 * d ** 2 + s ** 2)
    exact = .9 * m + width(.1) / width(.9) * (x - .1 * m)
    field, solvers = gaussian_velocity(m, d), (pr.euler_sample, pr.dpm_solver_sample)
    error = lambda sample, n: (sample(field, x, [.9 - .8 * i / n for i in range(n + 1)]) - exact).abs().mean().item()
    euler, dpm = ([error(sample, n) for n in (80, 160, 320)] for sample in solvers)
    assert all(1.9 < a / b < 2.1 for a, b in zip(euler, euler[1:]))
    assert all(3.8 < a / b < 5 for a, b in zip(dpm, dpm[1:])) and dpm[0] < euler[0] / 20
    grid = pr.sigma_grid(30)
    close(torch.tensor(grid[:-1]), torch.linspace(1, 1 / 30, 30))
    x = torch.randn(4096, 1, 1, 1, dtype=f64)
    end = lambda grid: pr.dpm_solver_sample(gaussian_velocity(1.3, 0.2), x, grid).mean().item()
    assert grid[-1] == 0 and end(grid) == pytest.approx(1.3, abs=.01) and end(grid[:-1]) < 1.27


def test_eq9_flow_loss_is_zero_at_the_oracle_and_levels_are_thousandths():
    x0, eps = torch.randn(2, 5, 2, 3, 3, dtype=f64)
    sigma = pr.uniform_sigma(5).double()

    def velocity(x_t, s):
        close(x_t, torch.stack([(1 - a) * b + a * c for a, b, c in zip(sigma, x0, eps)]))
        return eps - x0 + 2
    assert pr.flow_loss(velocity, x0, sigma, eps).item() == pytest.approx(4)
    many = pr.uniform_sigma(40_000)
    assert many.min() >= 1e-3 and many.max() <= 1 and (many * 1000 - (many * 1000).round()).abs().max() < 1e-3
    assert many.mean().item() == pytest.approx(.5005, abs=.01) and many.var().item() == pytest.approx(1 / 12, abs=.002)


def test_eq9_is_the_sum_of_its_two_terms(whole):
    """L = L_CE + lambda L_diff, from the same draws."""
    cfg, model, vocab, batch = whole
    run = lambda weight: torch.manual_seed(1) and pr.semantic_loss(
        model, vocab, dataclasses.replace(cfg, diffusion_weight=weight), batch)
    parts = run(0.)[1]
    close([run(w)[0] for w in (0., 1., 3.)], [parts["ce"] + w * parts["diffusion"] for w in (0., 1., 3.)])


def test_eq10_consistency_pulls_the_degraded_side_only():
    z_lq, z_hq = (z.requires_grad_() for z in torch.randn(2, 3, 2, 4, 4))
    loss = pr.latent_consistency_loss(z_lq, z_hq)
    loss.backward()
    assert z_hq.grad is None and loss.item() == pytest.approx(((z_lq - z_hq) ** 2).mean().item())
    close(z_lq.grad, 2 * (z_lq - z_hq).detach() / z_lq.numel())


def test_the_null_condition_is_zero_for_the_wanted_share_and_guidance_extrapolates_from_it():
    dropped = pr.drop_condition(torch.ones(20_000, 2, 3), .1)
    empty = (dropped == 0).flatten(1).all(1)
    assert ((dropped == 1).flatten(1).all(1) | empty).all() and empty.float().mean().item() == pytest.approx(.1, abs=.01)
    field = lambda x, sigma, cond: x + cond.sum((1, 2)).view(-1, 1, 1, 1)
    x, sigma, cond = torch.randn(2, 1, 2, 2), torch.ones(2), torch.randn(2, 3, 4)
    for scale in (0., 1., 2.):
        close(pr.guided(field, cond, scale)(x, sigma), x + scale * cond.sum((1, 2)).view(-1, 1, 1, 1))


def test_eq11_reward_is_the_weighted_sum_eq12_optimality_against_a_loop_and_by_hand():
    scores = dict(hps=torch.tensor([1., 2.]), lpips=torch.tensor([-.5, 0.]))
    close(pr.total_reward(scores, dict(hps=2., lpips=.5)), torch.tensor([1.75, 4.]))
    rewards, group = torch.randn(24, dtype=f64), torch.arange(24) % 5
    std = math.sqrt(sum((x - rewards.mean()) ** 2 for x in rewards.tolist()) / 24)
    for r, reward, g in zip(pr.optimality(rewards, group).tolist(), rewards.tolist(), group.tolist()):
        mine = [x for x, h in zip(rewards.tolist(), group.tolist()) if h == g]
        wanted = .5 + .5 * max(-1, min(1, (reward - sum(mine) / len(mine)) / (5 * (std + 1e-4))))
        assert r == pytest.approx(wanted, abs=1e-12)
    r = pr.optimality(torch.tensor([1., 1., 0., 4.]), torch.tensor([0, 0, 1, 1]))            # equal rewards say nothing
    assert (r[:2] == .5).all() and r[2] < .5 < r[3]
    far = pr.optimality(torch.cat([torch.zeros(999), torch.tensor([1000.])]), torch.zeros(1000, dtype=torch.long))
    assert far[-1] == 1 and far.min() >= 0


def test_eq12_the_group_is_the_face_so_equal_captions_stay_apart(whole, monkeypatch, tmp_path):
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
    close(((plus + minus) / 2, plus - old), (old, .1 * (v - old)))
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
    delta = alpha * (plus - old)                                                             # the policies mix to the old
    close((alpha * plus + (1 - alpha) * minus, delta), (old, (1 - alpha) * (old - minus)))
    v = old.clone().requires_grad_()
    point, level = torch.full((1, 1), x_t, dtype=f64), torch.full((1,), sigma, dtype=f64)
    each = [pr.nft_loss(v.view(1, 1), old.view(1, 1), point, x.view(1, 1), level, one.view(1), beta, form="velocity")
            for x, one in zip(x0, r)]
    gradient, = torch.autograd.grad((posterior * torch.stack(each)).sum(), v, create_graph=True)
    curvature, = torch.autograd.grad(gradient, v)
    close((v - gradient / curvature).detach(), old + 2 / beta * delta)                       # quadratic: a Newton step


def nft_inputs(batch=3):
    x0, eps, v, old, ref = torch.randn(5, batch, 2, 4, 4, dtype=f64)
    sigma, r = torch.rand(batch, dtype=f64) * .9 + .05, torch.rand(batch, dtype=f64)
    return x0, eps, v, old, ref, sigma, r, pr.interpolate(x0, eps, sigma)


def test_eq15_both_forms_against_loops():
    x0, eps, v, old, ref, sigma, r, x_t = nft_inputs()
    plain, stable = [], []
    for b in range(3):
        plus, minus, star = .9 * old[b] + .1 * v[b], 1.1 * old[b] - .1 * v[b], eps[b] - x0[b]
        plain.append(r[b] * ((plus - star) ** 2).mean() + (1 - r[b]) * ((minus - star) ** 2).mean())
        misses = [(x_t[b] - sigma[b] * velocity) - x0[b] for velocity in (plus, minus)]
        terms = [(miss ** 2).mean() / max(miss.abs().mean().item(), 1e-5) for miss in misses]
        stable.append(5 / .1 * (r[b] * terms[0] + (1 - r[b]) * terms[1]))
    arguments = (v, old, x_t, x0, sigma, r, .1)
    close((pr.nft_loss(*arguments, form="velocity"), pr.nft_loss(*arguments)), (sum(plain) / 3, sum(stable) / 3))
    close(pr.nft_loss(*arguments, v_ref=ref, kl_weight=.3), sum(stable) / 3 + .3 * ((v - ref) ** 2).mean())


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
        close(gradient[b], wanted, atol=1e-12, rtol=1e-9)
    close(loss.detach(), pr.nft_loss(old, old, x_t, x0, sigma, 1 - r, beta))


def test_eq15_nft_finds_the_known_optimum():
    """A policy that is the exact flow to N(mean, 0.3^2), reward -(x - 2)^2, 60 epochs of 64 roll-outs, six levels each:
    the best mean is 2, with a reward of minus the variance, -0.09."""
    mean, lagging, curve, grid = torch.zeros((), dtype=f64, requires_grad=True), torch.zeros((), dtype=f64), [], pr.sigma_grid(8)
    policy, old = gaussian_velocity(mean, .3), gaussian_velocity(lagging, .3)
    optimizer = torch.optim.Adam([mean], lr=.1)
    for epoch in range(60):
        x0 = pr.dpm_solver_sample(old, torch.randn(64, 1, 1, 1, dtype=f64), grid)
        reward = -(x0.flatten() - 2) ** 2
        curve.append(reward.mean().item())
        r, loss = pr.optimality(reward, torch.zeros(64, dtype=torch.long)), 0.0
        for i in torch.randperm(7)[:6].tolist():
            sigma = torch.full((64,), grid[i], dtype=f64)
            x_t = pr.interpolate(x0, torch.randn_like(x0), sigma)
            loss = loss + pr.nft_loss(policy(x_t, sigma), old(x_t, sigma), x_t, x0, sigma, r, .1) / 6
        optimizer.zero_grad(), loss.backward(), optimizer.step()
        lagging.lerp_(mean.detach(), 1 - pr.old_policy_decay(epoch + 1, 1))
    assert curve[0] < -3.5 and sum(curve[-5:]) / 5 > -.4 and abs(mean.item() - 2) < .4


def test_grpo_and_its_sde_steps_have_the_flow_as_limit_its_marginals_and_a_normal_density():
    x = torch.randn(20_000, 1, 1, 1, dtype=f64)
    field = gaussian_velocity(1.0, 0.5)
    v = field(x, torch.full((20_000,), .5, dtype=f64))
    close(pr.flow_sde_step(v, x, .5, .4, 1e-9)[0], x - .1 * v, atol=1e-7, rtol=0)
    path, log_probs = pr.sde_sample(field, x, pr.sigma_grid(100), .7)
    assert path[-1].mean().item() == pytest.approx(1, abs=.02) and path[-1].std().item() == pytest.approx(.5, abs=.02)
    assert len(path) == 101 and log_probs.shape == (20_000, 99)
    again, log_prob = pr.flow_sde_step(v, x, .5, .4, .7)
    g = .7 * math.sqrt(.5 / .5)
    mean = x + (v + g * g / 1.0 * (x + .5 * v)) * -.1
    close(log_prob, torch.distributions.Normal(mean, g * math.sqrt(.1)).log_prob(again).flatten())
    close(pr.flow_sde_step(v, x, .5, .4, .7, again)[1], log_prob)       # a stored step, read again
    now = torch.tensor([0., 0., .5], requires_grad=True)           # the policy gradient until the ratio leaves its clip
    pr.grpo_loss(now, torch.zeros(3), torch.tensor([2., -1., 3.]), .2).backward()
    close(now.grad, torch.tensor([-2., 1., 0.]) / 3)


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
    layer = next(iter(pr.policy_layers(sana).values()))
    assert not layer.old_A.requires_grad and not layer.old_B.requires_grad and not layer.base.weight.requires_grad
    wanted = [(.3 * old + .7 * new).detach() for old, new in ((layer.old_A, layer.lora_A), (layer.old_B, layer.lora_B))]
    pr.update_old(sana, .3)
    close([layer.old_A, layer.old_B], wanted)
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
    merged = copy.deepcopy(plain)
    for name, layer in merged.named_modules():
        key = f"base_model.model.{name}.lora_A.weight"
        if key in state:
            layer.weight.data += 8 / 4 * state[key.replace("lora_A", "lora_B")] @ state[key]
    close(call(merged), call(sana), atol=1e-4, rtol=1e-4)
    pr.load_peft(plain, str(tmp_path))                                                       # finds its lora/ inside
    close(call(plain), call(sana))


SEMANTIC = ("integrator.llm.embed_tokens", "integrator.llm.layers.0", "integrator.connector.0")
CAPTION = ("sana.caption_projection", "sana.caption_norm")
TEXTURE = ("sana.transformer_blocks.", "texture.", "lq_encoder.")
diffusion_of = lambda loss: lambda *given: (loss(*given)[1]["diffusion"],)


@pytest.mark.parametrize("stage, loss, changes, wanted, others", [
    ("1.1", pr.semantic_loss, {}, SEMANTIC + CAPTION, ("integrator.", "sana.caption_")),
    ("1.1", pr.semantic_loss, dict(as_printed=True), SEMANTIC, ("integrator.",)),            # the paper's frozen G
    ("1.2", pr.texture_loss, {}, TEXTURE, TEXTURE),                # E_0, the decoder, Qwen3 and projections stay
    ("1.2", diffusion_of(pr.texture_loss), {}, TEXTURE, TEXTURE),  # E_psi learns also without Eq. 10
    ("1.2", pr.texture_loss, dict(semantic=False), TEXTURE, TEXTURE),
    ("joint", pr.joint_loss, {}, SEMANTIC + CAPTION + TEXTURE, ("integrator.", "sana.caption_", *TEXTURE))])
def test_what_each_stage_teaches(whole, stage, loss, changes, wanted, others):
    """Fact sheet (b), (c): gradients pass through frozen networks and reach `wanted`; nothing but `others` changes."""
    cfg, model = dataclasses.replace(whole[0], condition_dropout=0., **changes), copy.deepcopy(whole[1])
    before = copy.deepcopy(model.state_dict())
    parameters = pr.route(model, stage, cfg)
    loss(model, whole[2], cfg, whole[3])[0].backward()
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
    close(cond[:, 5:], model.texture(model.sana.patch_embed(z)))
    assert torch.equal(read(0), cond) and not torch.equal(read(1), cond)
    assert torch.equal(read(0, ar="greedy"), read(1, ar="greedy"))


def test_own_answers_are_those_of_inference(whole):
    cfg, model, vocab, batch = whole
    (source, answer), batch = torch.randint(16, (2, 4, 4)), dict(batch, tasks=["restore"] * 4)
    write = lambda share: pr.write_answers(model, vocab, dataclasses.replace(cfg, own_answers=share), batch, source, answer)
    assert torch.equal(write(0.), answer)
    tokens, _ = model.integrator.generate(pr.build_sequence(vocab, source, batch["captions"]), vocab, 4)
    assert torch.equal(write(1.), tokens) and not torch.equal(tokens, answer)


def test_toy_rewards_prefer_the_face_itself_and_read_captions():
    faces = toy_faces(torch.arange(6), torch.arange(6))
    captions, reader = [common.verbalise(a) for a in faces.attributes.tolist()], pr.metrics.load_reader("a")
    blurred = F.interpolate(F.avg_pool2d(faces.image, 8), scale_factor=8, mode="bilinear").clamp(-1, 1)
    same, worse = (pr.score(pr.toy_rewards(reader), x, faces.image, captions, size=4) for x in (faces.image, blurred))
    assert set(same) == set(pr.REWARD_FILES) and all((same[name] > worse[name]).float().mean() > .8 for name in same)
    close(worse["lmd"], pr.landmark_reward(reader)(blurred, faces.image, captions), rtol=1e-4, atol=1e-5)
    found = pr.caption_targets("a photo of an older smiling person with wavy blond hair, wearing a hat")
    assert found.nan_to_num(-1).tolist() == [0, 1, -1, -1, -1, 1, 0, 0, 1, 0, 0, 1]
    x = torch.ones(1, 3, 64, 64)                                   # landmarks: 5 pixels of a 512 px face apart, or none found
    for far, wanted in ((5 * 64 / 512, .8), (math.nan, .01)):
        network = SimpleNamespace(landmarks=lambda x: torch.ones(1, 98, 2) * torch.tensor([far * (x.sum() > 0), 0.]))
        assert pr.landmark_reward(network)(x, -x, None).item() == pytest.approx(wanted)


class OpenClip(nn.Module):
    """Under open_clip's names; the text's layers look ahead, which one token alone does not tell."""

    def __init__(self):
        super().__init__()
        noise = lambda *shape: nn.Parameter(torch.randn(*shape))
        self.visual, self.logit_scale, self.token_embedding = nn.Module(), nn.Parameter(torch.tensor(2.)), nn.Embedding(40, 16)
        self.visual.conv1 = nn.Conv2d(3, 16, 4, 4, bias=False)
        self.visual.class_embedding, self.visual.proj, self.text_projection = noise(16), noise(16, 12), noise(16, 12)
        self.visual.positional_embedding, self.positional_embedding = noise(1 + 4, 16), noise(7, 16)
        self.visual.ln_pre, self.visual.ln_post, self.ln_final = (nn.LayerNorm(16) for _ in range(3))
        for tower in (self, self.visual):
            tower.transformer = nn.ModuleDict({"resblocks": nn.Sequential(*[pr.metrics.ViTBlock(16, 2) for _ in range(2)])})

    def image(self, x):
        x = self.visual.conv1(x).flatten(2).mT
        x = torch.cat([self.visual.class_embedding.expand(len(x), 1, -1), x], 1) + self.visual.positional_embedding
        return self.visual.ln_post(self.visual.transformer.resblocks(self.visual.ln_pre(x))[:, 0]) @ self.visual.proj

    def text(self, token):
        x = self.token_embedding(token[:, None]) + self.positional_embedding[:1]
        return self.ln_final(self.transformer.resblocks(x))[:, 0] @ self.text_projection


SMALL = dict(hidden_size=16, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, hidden_act="quick_gelu")
CLIP = dict(projection_dim=12, vision_config=dict(SMALL, projection_dim=12, image_size=8, patch_size=4), text_config=dict(
    SMALL, projection_dim=12, vocab_size=40, max_position_embeddings=7, eos_token_id=39, bos_token_id=38, pad_token_id=0))


def test_open_clip_becomes_a_clip_model_and_pictures_shrink_as_in_each_release():
    from torchvision.transforms import v2
    from transformers import CLIPConfig, CLIPModel
    theirs, ours = OpenClip().eval(), CLIPModel(CLIPConfig(**CLIP)).eval()
    for p in theirs.parameters():
        p.data.normal_(std=.3)
    common.load_strict(ours, pr.convert_open_clip(theirs.state_dict()), "test")
    x, end = torch.randn(3, 3, 8, 8), torch.tensor([39])
    image, text = ours.vision_model(pixel_values=x).pooler_output, ours.text_model(input_ids=end[None]).pooler_output
    found = ours.visual_projection(image), ours.text_projection(text)
    close(found, (theirs.image(x), theirs.text(end)), atol=1e-5, rtol=1e-4)
    # HPSv2: torchvision's bicubic on tensors; CLIPScore: its default; PickScore: Pillow's on 8 bits
    x, pixels = torch.rand(3, 40, 40) * 2 - 1, lambda name: pr.ClipReward(name, ours, None).pixels(x[None])[0] * 2 - 1
    close(pixels("hps"), v2.Resize((8, 8), interpolation=v2.InterpolationMode.BICUBIC, antialias=True)(x))
    close(pixels("clip"), v2.Resize((8, 8), antialias=True)(x))
    close(pixels("pick"), common.from_pil(common.to_pil(x).resize((8, 8), 3)), rtol=0, atol=1.01 / 127.5)


def test_rewards_load_from_files_in_the_released_formats(tmp_path, monkeypatch):
    from torchvision.models import vgg
    from transformers import CLIPConfig, CLIPModel
    monkeypatch.setattr(pr, "HPS_CLIP", CLIP)
    files = {name: tmp_path / file for name, file in pr.REWARD_FILES.items()}
    for name in ("clip", "pick"):
        CLIPModel(CLIPConfig(**CLIP)).save_pretrained(files[name])
    sana.chat_tokenizer().save_pretrained(str(files["clip"]))
    torch.save({"state_dict": OpenClip().state_dict()}, files["hps"])
    torch.save(pr.metrics.ArcFaceGray().state_dict(), files["identity"])
    torch.save(pr.metrics.FAN98().state_dict(), files["lmd"])
    torch.save({"features." + n: t for n, t in vgg.make_layers(vgg.cfgs["D"]).state_dict().items()}, files["lpips"])
    x, y = torch.rand(2, 2, 3, 32, 32) * 2 - 1
    y[1] = x[1]                                                    # the second face is restored perfectly
    scores = pr.score(pr.build_rewards(pr.Train(rewards=str(tmp_path)), "cpu"), x, y, ["a face", ""], size=1)
    assert list(scores) == list(pr.REWARD_FILES) and all(v.shape == (2,) and v.isfinite().all() for v in scores.values())
    assert scores["lpips"][0] < 0 and scores["lpips"][1].abs() < 1e-6 and (scores["lmd"] > 0).all()
    close(torch.stack([scores["identity"][1], scores["lmd"][1]]), torch.ones(2))
    pick = pr.real_reward(tmp_path, "pick", "cpu")
    assert pick.scale == pytest.approx(pick.model.logit_scale.exp().item() / 26)


def test_parameter_counts_of_the_full_size_networks():
    """Fact sheet 1.1, 2, 4.2, on the meta device: 1874.475 M is the figure in the authors' training log."""
    from diffusers import AutoencoderDC, SanaTransformer2DModel
    with torch.device("meta"):
        small, large = (pr.SemanticIntegrator(c, 2304) for c in (pr.QWEN3_06B, pr.QWEN3_17B))
        sana, vae = SanaTransformer2DModel(**pr.SANA15), AutoencoderDC(**pr.DCAE)
    million = lambda *modules, to=2: round(sum(p.numel() for module in modules for p in module.parameters()) / 1e6, to)
    caption = (sana.caption_projection, sana.caption_norm)
    sizes = million(large.llm, to=3), million(large.connector, to=3), million(large, *caption, to=3)
    assert sizes == (1854.256, 10.034, 1874.475)
    assert million(small, *caption) == 680.75
    assert million(sana) == 1604.64 and million(sana.transformer_blocks) == 1558.59
    assert million(vae) == 312.25 and million(vae.encoder) == 153.03
    pr.add_policies(sana, 32, 64.)
    assert sum(p.numel() for n, p in sana.named_parameters() if ".lora_" in n) == 22_937_600


def release(folder):
    """Tiny random networks in the authors' layout: two shards, config.json, tokenizer; SANA's folder beside it."""
    torch.manual_seed(3)
    model, vocab = sana.build(SIZES)
    model.latent_scale.fill_(0.41407)
    for p in model.parameters():
        p.data += .01 * torch.randn_like(p)
    sana.save(folder.parent / "sana", model, vocab, torch.float32)
    own, tower = model.integrator, "model.vision_tower.vision_tower."
    parts = {"model.": own.llm, "model.diffusion_connector.": own.connector, "model.sana.": model.sana,
             "model.sana_vae.encoder.": model.lq_encoder, "model.sana_vae.decoder.": model.vae.decoder,
             "model.vae_connector.": model.texture, "fixed_vae.": model.vae, tower: model.tatok}
    state = {prefix + n: t.clone() for prefix, part in parts.items() for n, t in part.state_dict().items()}
    del state["model.vae_connector.3.weight"]
    state[tower + "decoder.layers.0.weight"] = torch.zeros(2)      # of TA-Tok's own training
    vocab.tokenizer.save_pretrained(str(folder))
    for i in range(2):
        shard = {n: state[n] for n in sorted(state)[i::2]}
        safetensors.torch.save_file(shard, folder / f"model-0000{i + 1}-of-00002.safetensors")
    config = json.loads((folder.parent / "sana" / "config.json").read_text()) | dict(model_type="blip3o_qwen_inference")
    (folder / "config.json").write_text(json.dumps(config))
    return model, vocab


def test_releases_load_the_authors_and_qwens_own(tmp_path):
    wanted, vocab = release(tmp_path / "release")
    model, tokens, finished = pr.load_release(tmp_path / "release", sana=str(tmp_path / "sana"))
    assert [n for n, t in wanted.state_dict().items() if not torch.equal(t, model.state_dict()[n])] == ["texture.3.weight"]
    assert torch.equal(model.texture[3].weight, wanted.integrator.connector[3].weight)       # the tied RMSNorm
    assert model.latent_scale.item() == pytest.approx(.41407) and finished == ["1.1", "1.2"]
    assert (tokens.first_code, tokens.size) == (vocab.first_code, vocab.size)
    # TA-Tok's own file holds objects, and here a quantiser that compares by Euclid
    arguments = {"bottleneck": SimpleNamespace(args={"regularizer": {"args": {"l2_normalized": False}}})}
    save = {"sd": wanted.tatok.state_dict() | {"teacher.w": torch.zeros(1)}, "args": arguments}
    torch.save({"model": save}, tmp_path / "ta_tok.pth")
    # Qwen3, SANA, DC-AE and TA-Tok, each as its own project releases it: the new tokens are added
    from transformers import Qwen3Config, Qwen3ForCausalLM
    count = len(vocab.tokenizer)
    qwen = Qwen3ForCausalLM(Qwen3Config(**SIZES["llm"] | dict(vocab_size=count + 7, tie_word_embeddings=False)))    # padded
    qwen.save_pretrained(tmp_path / "qwen")
    vocab.tokenizer.save_pretrained(str(tmp_path / "qwen"))
    built, tokens, finished = pr.load_release(tmp_path / "qwen", *(str(tmp_path / name) for name in ("sana", "ta_tok.pth")))
    table, old = built.integrator.llm.embed_tokens.weight, qwen.model.embed_tokens.weight
    assert finished == [] and tokens.image_start == count and torch.equal(table[:count], old[:count])
    close(table[count:], old[:count].mean(0).expand(5 + 16, -1))
    close(built.integrator.head[-1], qwen.lm_head.weight[:count].mean(0))
    assert all(same(getattr(built, n).state_dict(), getattr(wanted, n).state_dict()) for n in ("tatok", "sana", "vae"))
    assert not built.tatok.bottleneck["regularizer"].l2_normalized


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
    data, short = toy_data(folder / "data"), [part for k, v in TINY.items() for part in (f"--{k}", str(v))]
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
    assert {"reward_toy", "lmd_toy", "lpips_toy"} <= set(numbers["rows"]["restored_faces"])
    stages = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()[1:]]
    assert [row["stage"] for row in stages] == ["1.1"] * 3 + ["1.2"] * 3 + ["2"] * 3 and "reward_toy" in stages[-1]
    assert parts_in(out) == {"1.1", "1.2", "2"} and (out / "samples.png").exists()
    assert json.loads((out / "lora" / "adapter_config.json").read_text())["r"] == 4
    assert all(p.isfinite().all() and (".lora_" in n) == (n[0] == "2") for n, p in parts.items())


def test_stage_by_stage_equals_all_at_once_also_on_another_runs_parts(trained, tmp_path):
    (folder, flags), wanted = trained, weights(trained[0] / "out")
    for stage in ("1.1", "1.2", "2"):
        call("train", *flags, folder / "sana", "-o", tmp_path / "steps", "--stage", stage)
    assert same(wanted, weights(tmp_path / "steps"))
    call("train", *flags, folder / "out", "-o", tmp_path / "two", "--stage", "2")
    assert same({n: t for n, t in wanted.items() if n[0] == "2"}, weights(tmp_path / "two"))  # holds what it trained
    assert torch.equal(*(restored(trained, tmp_path / f"r_{run}", "--checkpoint", tmp_path / run) for run in ("steps", "two")))


def test_a_stopped_run_goes_on_to_the_same_weights(trained, tmp_path, monkeypatch):
    flags, save = [*trained[1], trained[0] / "sana", "-o", tmp_path], common.Run.save

    def stopping(run, stage, step, *rest, **more):
        save(run, stage, step, *rest, **more)
        if (stage, step) == ("2", 1):
            raise KeyboardInterrupt
    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        patch.setattr(common.Run, "save", stopping)
        call("train", *flags, "--checkpointing_steps", "1")
    assert parts_in(tmp_path) == {"1.1", "1.2"}
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
    monkeypatch.setattr(pr, "Train", functools.partial(pr.Train, image_size=32, guidance_scale=pr.TOY_VALUES["guidance_scale"]))
    monkeypatch.setattr(pr, "open_run", lambda where, cls: (Path(where), None))
    theirs = restored(trained, tmp_path / "t", "--checkpoint", tmp_path / "release", "--sana", tmp_path / "sana",
                      "--num_inference_steps", "2", "--solver", "dpm")
    assert torch.equal(ours, theirs)
