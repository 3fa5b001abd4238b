"""How fast are the networks? python tests/bench.py [--device cuda] [--repeat 5] [--batch_size 1] [--compile] [--toy]

HDiT at the paper's size (512 px face, 64 x 64 latents, 32 channels), forward + backward, against the least such a
network can do: the same matrix products and attention calls without norms, positions, gates or convolutions. The two
are timed in turn, so that other work on the machine touches both; the median of the ratios is what counts. Then
Sim-VAE c32 on its 256 px crops. Both in floating-point operations per second, and as a share of the card's peak.
With --toy: how long the toy presets (random weights) take to restore a face, in turn as well.
With --train: a training step of every stage of the toy presets, and the share of it that waits for faces.
With --costs: the three operators every stage of the toy presets spends most time in, by torch's profiler.
With --cache: FLUX at full width with few blocks, the condition's keys and values kept between steps or not.
With --paper METHOD ...: the paper presets at full size with random weights, on one fixed batch: a training step, and
one face at 512 px restored. For one GPU of 80 GB.
"""
import argparse
import contextlib
import dataclasses
import io
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.nn.functional as F
import torchvision
from diffusers import AutoencoderKL, FluxTransformer2DModel, UNet2DConditionModel
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(Path(__file__).parent.parent))
import a2bfr as a2
import common
import honestface as hf
import latent_pmrf as lp
import metrics
import pref_restore as pr


class LowerBound(torch.nn.Module):
    """Only the products of HDiT: qkv, attention, out, up, down for every layer, merges and splits between levels.

    Window attention is one SDPA call over all tokens of a level (`dense`), or over the tiles HDiT itself uses.
    """

    def __init__(self, in_channels, widths, depths, head_dim, dense, **_):
        super().__init__()
        self.widths, self.depths, self.head_dim, self.dense = widths, depths, head_dim, dense
        make = lambda i, o: torch.nn.Parameter(torch.randn(o, i) * i ** -0.5)
        layer = lambda w: torch.nn.ParameterList([make(w, 3 * w), make(w, w), make(w, 6 * w), make(3 * w, w)])
        self.into, self.out = make(in_channels, widths[0]), make(widths[0], in_channels)
        level = lambda i: torch.nn.ModuleList(layer(widths[i]) for _ in range(depths[i]))
        self.down = torch.nn.ModuleList(level(i) for i in range(len(widths) - 1))
        self.up = torch.nn.ModuleList(level(i) for i in range(len(widths) - 1))
        self.mid = level(len(widths) - 1)
        self.merge = torch.nn.ParameterList(make(4 * a, b) for a, b in zip(widths, widths[1:]))
        self.split = torch.nn.ParameterList(make(b, 4 * a) for a, b in zip(widths, widths[1:]))

    def layers(self, level, x, grid, window):
        for qkv, out, up, down in level:
            q, k, v = F.linear(x, qkv).unflatten(-1, (3, -1, self.head_dim)).permute(2, 0, 3, 1, 4)
            if window and not self.dense:
                a = lp.neighborhood_attention(q, k, v, *grid)
            else:
                a = F.scaled_dot_product_attention(q, k, v)
            x = F.linear(a.transpose(1, 2).flatten(2), out)
            x = F.linear(F.linear(x, up)[..., :down.shape[1]], down)
        return x

    def forward(self, x, t):
        grid = tuple(x.shape[-2:])
        x = F.linear(x.flatten(2).transpose(1, 2), self.into)
        for level, merge in zip(self.down, self.merge):
            x = self.layers(level, x, grid, True)
            x, grid = F.linear(x.reshape(len(x), -1, merge.shape[1]), merge), (grid[0] // 2, grid[1] // 2)
        x = self.layers(self.mid, x, grid, False)
        for level, split in reversed(list(zip(self.up, self.split))):
            grid = (grid[0] * 2, grid[1] * 2)
            x = F.linear(x, split).reshape(len(x), -1, split.shape[0] // 4)
            x = self.layers(level, x, grid, True)
        return F.linear(x, self.out).transpose(1, 2).unflatten(2, grid)


def seconds(network, x, t, autocast):
    sync = torch.cuda.synchronize if x.is_cuda else (lambda: None)
    sync()
    start = time.perf_counter()
    with autocast():
        out = network(x, t)
    out.float().square().mean().backward()
    sync()
    return time.perf_counter() - start


PEAKS = {"H100": 989e12, "H200": 989e12, "A100": 312e12}           # bf16 without sparsity, from the makers' data sheets


def operations(network, x, t, autocast) -> int:
    """Floating-point operations of the matrix products and dense convolutions of a forward and a backward pass.

    Of HDiT count the lower bound's: torch takes depth-wise convolutions for dense ones in the backward pass.
    """
    with FlopCounterMode(display=False) as counter:
        seconds(network, x, t, autocast)
    network.zero_grad()
    return sum(count for name, count in counter.get_flop_counts()["Global"].items() if "attention" not in str(name))


def rate(count: int, x, took: float) -> str:
    """So many operations in so many seconds, and as a share of the card's peak."""
    speed = count / took
    name = torch.cuda.get_device_name(x.device) if x.is_cuda else ""
    shares = [f", {speed / peak:.0%} of the card's bf16 peak" for card, peak in PEAKS.items() if card in name]
    return f"{speed / 1e12:.3g} TFLOP/s{''.join(shares)}"


def bench_training(device, steps: int) -> None:
    """`train` of each toy preset with a few steps a stage, as a program; what its log says of each stage."""
    for method in ("latent_pmrf", "honestface", "a2bfr", "pref_restore"):
        with tempfile.TemporaryDirectory() as folder:
            command = [sys.executable, str(Path(__file__).parent.parent / f"{method}.py"), "train", "-o", f"{folder}/out",
                       "--max_train_steps", str(steps), "--log_steps", str(steps), "--validation_faces", "8",
                       "--device", str(device)]
            subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
            rows = [json.loads(line) for line in Path(folder, "out", "log.jsonl").read_text().splitlines()]
            memory = json.loads(Path(folder, "out", "metrics.json").read_text())["peak_memory_gb"]
        for row in (r for r in rows if "data_share" in r):
            print(f"{method} {row['stage']}: {row['seconds_per_step']:.3f} s a step, {row['data_share']:.0%} of it for data")
        print(f"{method}: {memory} GB at most", flush=True)


def bench_costs(device, steps: int) -> None:
    """`train` of each toy preset with a few steps a stage; the profiler looks at all but a stage's first two."""
    plain = common.Stage.steps

    def steps_with_profile(stage, batch_at):
        with torch.profiler.profile() as profile:
            for step, batch in plain(stage, batch_at):
                if step == 2:
                    profile.stop()
                    profile.start()
                yield step, batch
        found = [row for row in profile.key_averages() if row.key.startswith(("aten::", "enumerate(DataLoader)"))]
        cost = lambda row: row.self_device_time_total if device.type == "cuda" else row.self_cpu_time_total
        found.sort(key=cost, reverse=True)
        names = (f"{row.key.removeprefix('aten::')} {cost(row) / sum(map(cost, found)):.0%}" for row in found[:3])
        print(f"{stage.run.folder.name} {stage.name}: {', '.join(names)}", flush=True)

    common.Stage.steps = steps_with_profile
    with tempfile.TemporaryDirectory() as folder:
        for method in (lp, hf, a2, pr):
            argv = ["train", "-o", f"{folder}/{method.__name__}", "--max_train_steps", str(steps), "--validation_faces",
                    "8", "--device", str(device), "--log_steps", "1000"]
            with contextlib.redirect_stderr(io.StringIO()):
                common.command_line(method.__doc__, method.VERBS, argv)


def toy_restorers(device) -> dict:
    """name -> function that restores 32 toy faces with the networks of a toy preset, as `sample` does."""
    faces = common.Faces("", 64, "")
    batch = faces.held_out(32)
    lq = common.degrade(batch["hq"], common.DEGRADATIONS["thumbnail"], batch["seeds"]).to(device)
    pmrf, one, flux, pref = lp.Train(), hf.Train(), a2.Train(), pr.Train()
    flow = {part: lp.build(pmrf, part).to(device).eval() for part in ("vae", "mmse", "flow")}
    face_nets = hf.face_networks(one, device, losses=False)
    nets = hf.prepare(one, face_nets, device)
    references, present = (x.to(device) for x in hf.draw_references(faces, {}, batch, one.max_references))
    prior = {name: net.to(device) for name, net in a2.build_toy(flux).items()}
    a2.add_condition_lora(prior["prior"], flux.rank, flux.lora_alpha)
    noise = prior["codec"].noise(64, list(range(32)))
    how = a2.Setting(flux.guidance_scale, flux.num_inference_steps, flux.true_cfg_scale, "", flux.image_guidance_scale)
    model, vocab = pr.build(pref)[:2]
    model.to(device).eval().uses = ("semantic", "texture")

    def pref_restore():
        start = pr.noise_like(model, pref, 32, torch.Generator().manual_seed(0))
        return pr.draw_face(model, pref, pr.read_face(model, vocab, pref, lq, [""] * 32), start)

    return {"Latent-PMRF, 25 steps": lambda: lp.restore(flow, pmrf, lq, torch.randn_like, 25),
            "HonestFace, 4 references": lambda: hf.restore(nets, one, face_nets, lq, references, present),
            "HonestFace, no references": lambda: hf.restore(nets, one, face_nets, lq, references, present & False),
            "A2BFR": lambda: a2.restore(prior, flux, lq, [a2.TEMPLATE] * 32, noise.to(device), how),
            "Pref-Restore": pref_restore}


def flux_with_cache(device, steps: int) -> dict:
    """name -> function that integrates a 512 px face with 3 blocks of FLUX's width (random weights), 512 text tokens."""
    with torch.device(device):
        flux = FluxTransformer2DModel(num_layers=1, num_single_layers=2, guidance_embeds=True)
        a2.add_condition_lora(flux, 64, 64.0)
        z, condition, text = torch.randn(1, 1024, 64), torch.randn(1, 1024, 64), torch.randn(1, 512, 4096)
        pooled, one = torch.randn(1, 768), torch.ones(1)
    ids = a2.position_ids(32, 32, 1, device)

    @torch.no_grad()
    def integrate(cache):
        field = lambda x, t: a2.flux_velocity(flux, x, condition, text, pooled, t, one, ids, ids, True, cache)
        return a2.euler_sample(field, z, a2.flux_sigmas(steps, 1024))

    return {f"FLUX's width, {steps} steps": lambda: integrate(None), "with cache": lambda: integrate({})}


def paper_run(method, folder, device, steps, **switches) -> tuple:
    """(configuration, run) of a paper preset that logs each of its few steps."""
    cfg = method.Train(**method.PAPER | dict(output=folder, device=str(device), max_train_steps=steps, log_steps=1,
                                             num_workers=0, validation_faces=1) | switches)
    return cfg, common.Run(cfg)


def latent_pmrf_at_full_size(folder, device, steps) -> tuple:
    cfg, run = paper_run(lp, folder, device, steps)
    nets = {part: lp.build(cfg, part).to(device).eval() for part in lp.stages_of(cfg)}
    batch = lp.batches(cfg, run, common.Faces("", cfg.image_size, ""), degraded=True)(0)
    lp.batches = lambda *_, **__: lambda step: batch
    lq = batch["lq"][:1].to(device)
    return (run, {f"flow, {cfg.batch_size} faces": lambda: lp.train_flow(cfg, run, None, nets)},
            lambda: lp.restore(nets, cfg, lq, torch.randn_like, cfg.num_inference_steps))


def honestface_at_full_size(folder, device, steps) -> tuple:
    nets = dict(arcface=metrics.IResNet(50, layout="ir_se"), adaface=metrics.IResNet(50), fan=metrics.FAN98(),
                vgg=torch.nn.ModuleDict(dict(features=torchvision.models.vgg16(weights=None).features)))
    for name, net in nets.items():
        torch.save(net.state_dict(), f"{folder}/{name}.pth")
    files = {name: f"{folder}/{name}.pth" for name in nets}
    cfg, run = paper_run(hf, f"{folder}/out", device, steps, **files)

    def random_stable_diffusion(where, cfg):
        with torch.device(device):
            return dict(vae=AutoencoderKL(**hf.SD21_VAE), unet=UNet2DConditionModel(**hf.SD21_UNET))

    hf.load_stable_diffusion = random_stable_diffusion
    face_nets = hf.face_networks(cfg, device)
    nets = hf.prepare(cfg, face_nets, device)
    batch = hf.batches(cfg, run, common.Faces("", cfg.image_size, ""), "references")(0)
    hf.batches = lambda *_, **__: lambda step: batch
    given = [batch[name].to(device) for name in ("lq", "references", "present")]
    return (run, {f"onestep, {cfg.batch_size} face": lambda: hf.train_onestep(cfg, run, None, nets, face_nets)},
            lambda: hf.restore(nets, cfg, face_nets, *given))


class RandomText:
    """Embeddings of FLUX's size, as if read from disk."""

    def __init__(self, device):
        self.device = device

    def encode(self, prompts):
        return (torch.randn(len(prompts), 512, 4096, device=self.device),
                torch.randn(len(prompts), 768, device=self.device))


def a2bfr_at_full_size(folder, device, steps) -> tuple:
    cfg, run = paper_run(a2, folder, device, steps)
    torch.set_default_dtype(torch.bfloat16)                       # 12 B parameters: 24 GB
    with torch.device(device):
        prior, vae = FluxTransformer2DModel(guidance_embeds=True), AutoencoderKL(
            **hf.SD21_VAE | dict(latent_channels=16, use_quant_conv=False, use_post_quant_conv=False))
    torch.set_default_dtype(torch.float32)
    nets = dict(prior=prior.requires_grad_(False), codec=a2.Codec(vae, 0.1159, 0.3611).to(device).requires_grad_(False),
                text=RandomText(device))
    farl = metrics.FaRLAttributes().to(device).eval().requires_grad_(False)
    batch = a2.ToyPairs(cfg.image_size).held_out(cfg.batch_size)
    lq = a2.degraded(cfg, batch)
    a2.degraded = lambda cfg, batch: lq
    source = SimpleNamespace(training=lambda *where: batch)
    how = a2.Setting(cfg.guidance_scale, cfg.num_inference_steps)
    noise = nets["codec"].noise(cfg.image_size, [0])
    return (run, {f"lora, {cfg.batch_size} pair": lambda: a2.train_lora(cfg, run, nets, farl, source)},
            lambda: a2.restore(nets, cfg, lq.to(device), [a2.TEMPLATE], noise, how))


def pref_restore_at_full_size(folder, device, steps) -> tuple:
    vocab = pr.Vocabulary(pr.ToyTokenizer(), 65_536, first=151_669)
    tatok = dict(siglip=pr.SO400M, codes=65_536, code_dim=1536)
    sizes = dict(llm=pr.QWEN3_17B, sana=pr.SANA15, vae=pr.DCAE, tatok=tatok)
    cfg, run = paper_run(pr, folder, device, steps, rewards="toy", groups=1, pretrained="", sana="")
    with torch.device(device):
        model = pr.PrefRestore(sizes)
    pr.recompute_activations(model)
    faces = pr.CaptionedFaces(dataclasses.replace(cfg, captions=""))
    batch = pr.batches(cfg, run, faces)(0)
    pr.batches = lambda cfg, run, source, size=None, **_: lambda step: {k: v[:size] for k, v in batch.items()}
    train = {f"{name}, {cfg.batch_size} x {cfg.gradient_accumulation_steps} faces":
             lambda name=name: pr.train_alignment(cfg, run, None, model, vocab, name) for name in ("1.1", "1.2")}
    train[f"2, {cfg.groups} x {cfg.group_size} roll-outs"] = \
        lambda: pr.train_preference(dataclasses.replace(cfg, max_train_steps=2), run, None, model, vocab)

    def restore():
        cond = pr.read_face(model.eval(), vocab, cfg, batch["lq"][:1].to(device), [""])
        pr.draw_face(model, cfg, cond, pr.noise_like(model, cfg, 1, torch.Generator().manual_seed(0)))

    return run, train, restore


def bench_paper(method: str, device, steps: int = 6) -> None:
    """Seconds of a training step (median, without the first two) and of restoring a face, and the most memory.

    A face is restored after the first stage: an epoch of Pref-Restore's last one takes minutes.
    """
    gpu = torch.cuda if device.type == "cuda" else None
    sync, peak = gpu.synchronize if gpu else lambda: None, lambda: f"{run.peak_memory_gb():.1f} GB"
    with tempfile.TemporaryDirectory() as folder:
        run, stages, restore = globals()[f"{method}_at_full_size"](folder, device, steps)
        for number, (name, train) in enumerate(stages.items()):
            train()
            rows = [json.loads(line) for line in Path(run.folder, "log.jsonl").read_text().splitlines()]
            rows = [row for row in rows if row["stage"] == name.split(",")[0]]
            ends = [row["step"] * row["seconds_per_step"] for row in rows]
            took = [after - before for before, after in zip(ends, ends[1:])]
            print(f"{method} {name}: {statistics.median(took[1:] or took):.3f} s a step, {peak()}", flush=True)
            for warm in (False, True) if number == 0 else ():
                if gpu:
                    gpu.empty_cache(), gpu.reset_peak_memory_stats()
                start = time.perf_counter()
                with torch.no_grad(), run.autocast():
                    restore()
                sync()
                if warm:
                    print(f"{method} restores a face: {time.perf_counter() - start:.3f} s, {peak()}", flush=True)


def bench_restorers(restorers: dict, device, repeat: int, faces: int) -> None:
    times = {name: [] for name in restorers}
    for i in range(repeat + 1):                                   # the first round warms up
        for name, restorer in restorers.items():
            start = time.perf_counter()
            restorer()
            if device.type == "cuda":
                torch.cuda.synchronize()
            times[name] += [time.perf_counter() - start] * bool(i)
    first = next(iter(times.values()))
    for name, took in times.items():
        ratio = statistics.median(a / b for a, b in zip(took, first))
        print(f"{name}: {1000 / faces * statistics.median(took):.1f} ms per face, {ratio:.2f}x the first line")


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--batch_size", type=int, default=1)
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--toy", action="store_true")
    parser.add_argument("--train", action="store_true")
    parser.add_argument("--costs", action="store_true")
    parser.add_argument("--cache", action="store_true")
    parser.add_argument("--paper", nargs="+", choices=("latent_pmrf", "honestface", "a2bfr", "pref_restore"))
    args = parser.parse_args()
    device = torch.device(args.device)
    torch.backends.cuda.enable_cudnn_sdp(False)                   # as common.Run
    autocast = lambda: torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda")
    cuda = device.type == "cuda"
    where = torch.cuda.get_device_name(device) if cuda else f"cpu, {torch.get_num_threads()} threads"
    if args.train:
        print(f"torch {torch.__version__}, {where}, 20 steps a stage")
        return bench_training(device, 20)
    if args.costs:
        print(f"torch {torch.__version__}, {where}, self time of operators")
        return bench_costs(device, 3)
    if args.paper:
        print(f"torch {torch.__version__}, {where}, {'bf16' if cuda else 'fp32'}, paper presets")
        for method in args.paper:
            bench_paper(method, device)
        return
    if args.toy or args.cache:
        print(f"torch {torch.__version__}, {where}, fp32, median of {args.repeat}")
        restorers, faces = (flux_with_cache(device, 4), 1) if args.cache else (toy_restorers(device), 32)
        bench_restorers(restorers, device, args.repeat, faces)
        return
    print(f"torch {torch.__version__}, {where}, batch {args.batch_size}, {'bf16' if cuda else 'fp32'}, "
          f"median of {args.repeat}")
    x, t = torch.randn(args.batch_size, 32, 64, 64, device=device), torch.rand(args.batch_size, device=device)
    paper = dict(lp.HDIT_PMRF, in_channels=32, depths=(2, 4, 6), patch=1, depthwise=True)
    for name, config in (("paper (depth-wise convolutions)", paper),
                         ("paper without them", dict(paper, depthwise=False))):
        networks = {"HDiT": lp.HDiT(**config).to(device),
                    "bound, same tiles": LowerBound(**config, dense=False).to(device),
                    "bound, dense attention": LowerBound(**config, dense=True).to(device)}
        count = operations(networks["bound, same tiles"], x, t, autocast)
        for layer in networks["HDiT"].modules() if args.compile else ():
            if isinstance(layer, lp.HDiTLayer):
                layer.compile(dynamic=False)
        times = {key: [] for key in networks}
        for i in range(-2, args.repeat):                          # the first rounds warm up
            for key, network in networks.items():
                took = seconds(network, x, t, autocast)
                if i >= 0:
                    times[key].append(took)
                network.zero_grad()
        ratio = lambda key: statistics.median(a / b for a, b in zip(times["HDiT"], times[key]))
        print(f"HDiT {name}: {statistics.median(times['HDiT']):.3f} s, "
              f"{ratio('bound, same tiles'):.2f}x the bound with the same tiles, "
              f"{ratio('bound, dense attention'):.2f}x the bound with dense attention; "
              f"{rate(count, x, statistics.median(times['HDiT']))}; the bound with the same tiles "
              f"{rate(count, x, statistics.median(times['bound, same tiles']))}", flush=True)
        del networks
    vae, crop = lp.SimVAE().to(device, memory_format=torch.channels_last), torch.rand(args.batch_size, 3, 256, 256)
    crop = crop.to(device, memory_format=torch.channels_last)
    reconstruct = lambda x, t: vae.decode(vae.encode(x)[0])
    reconstruct.zero_grad = vae.zero_grad
    count = operations(reconstruct, crop, t, autocast)
    took = statistics.median([seconds(reconstruct, crop, t, autocast) for _ in range(args.repeat + 2)][2:])
    print(f"Sim-VAE c32, 256 px: {took:.3f} s, {rate(count, crop, took)}", flush=True)
    if device.type == "cuda":
        print(f"peak memory {torch.cuda.max_memory_allocated() / 2 ** 30:.2f} GiB")
    with torch.no_grad():
        vae = lp.SimVAE(8, (24, 48, 96)).to(device)
        z = torch.randn(1, 8, 64, 64, device=device)
        for name, decode in (("whole", vae.decode), ("tiled, 0.2 GB", lambda z: vae.decode_tiled(z, 0.2))):
            start = time.perf_counter()
            decode(z)
            print(f"toy Sim-VAE, 64 x 64 latents, {name}: {time.perf_counter() - start:.2f} s")


if __name__ == "__main__":
    main()
