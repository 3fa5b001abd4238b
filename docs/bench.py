"""Seconds a step: python docs/bench.py METHOD ... [--preset toy] [--steps 12] [--flags ...], or python docs/bench.py networks

METHOD runs `METHOD.py train` for a few steps of every stage and reads log.jsonl: seconds a step without the first ones, the
share of them that waits for faces, losses. `networks` times HDiT and Sim-VAE at the paper's size, forward and backward, in
floating-point operations per second. Give --device, and --compile for torch.compile.
"""
import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))
import common

import torch
from torch.utils.flop_counter import FlopCounterMode

import latent_pmrf

ROOT = Path(__file__).parent.parent


def stages(method: str, given) -> None:
    """A line per stage of one method."""
    with tempfile.TemporaryDirectory() as folder:
        command = [f"{method}.py", "train", "--preset", given.preset, "-o", f"{folder}/run", "--max_train_steps", str(given.steps),
                   "--log_steps", "1", "--validation_faces", "8", "--device", given.device, *given.flags]
        subprocess.run([sys.executable, *command], cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
        rows = [json.loads(line) for line in Path(folder, "run", "log.jsonl").read_text().splitlines()]
    rows = [row for row in rows if "stage" in row]
    for stage in dict.fromkeys(row["stage"] for row in rows):
        own = [row for row in rows if row["stage"] == stage]
        times = [b["seconds"] - a["seconds"] for a, b in zip(own[1:], own[2:])]
        median = statistics.median(times) if times else float("nan")
        print(f"{method:13} {stage:12} {median:8.3f} s a step   waits for faces {100 * own[-1]['data_share']:4.1f} %", flush=True)


def network(name: str, net, inputs, given) -> None:
    """Median time of forward and backward, and operations per second."""
    net = net.to(given.device)
    inputs = [x.to(given.device) for x in inputs]
    run = torch.compile(net) if given.compile else net

    def step():
        with torch.autocast(torch.device(given.device).type, torch.bfloat16, enabled=given.device != "cpu"):
            out = run(*inputs)
        out.float().square().mean().backward()
        if given.device != "cpu":
            torch.cuda.synchronize()

    with FlopCounterMode(display=False) as counter:
        out = net(*inputs)
        out.float().square().mean().backward()
    times = []
    for _ in range(given.steps):
        begun = time.perf_counter()
        step()
        times.append(time.perf_counter() - begun)
    median = statistics.median(times[2:] or times)
    print(f"{name:28} {median:8.3f} s   {counter.get_total_flops() / median / 1e12:8.3f} TFLOP/s", flush=True)


class AutoEncode(torch.nn.Module):
    def __init__(self, vae):
        super().__init__()
        self.vae = vae

    def forward(self, x):
        return self.vae.decode(self.vae.encode(x)[0])


def main(argv=None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", nargs="+", choices=["latent_pmrf", "honestface", "a2bfr", "pref_restore", "networks"])
    parser.add_argument("--preset", default="toy")
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--batch_size", type=int, default=1)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--flags", nargs=argparse.REMAINDER, default=[], help="what follows goes to `train`")
    given = parser.parse_args(argv)
    print(json.dumps(dict(argv=sys.argv, **common.versions(torch.device(given.device)))))
    for what in given.what:
        if what != "networks":
            stages(what, given)
            continue
        sizes = latent_pmrf.SIZES["paper"]
        flow = latent_pmrf.HDiT(32, **sizes["flow"])
        torch.nn.init.normal_(flow.patch_out.proj.weight, std=0.02)                     # else its gradients would be zero
        network("HDiT, 64 x 64 latents", flow, [torch.randn(given.batch_size, 32, 64, 64), torch.rand(given.batch_size)], given)
        network("Sim-VAE c32, 256 px", AutoEncode(latent_pmrf.SimVAE(32, **sizes["vae"])),
                [torch.randn(given.batch_size, 3, 256, 256)], given)


if __name__ == "__main__":
    main()
