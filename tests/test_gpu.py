"""What only a CUDA device can show: every toy preset trains there, in float32 and in bf16, from toy/weights."""
import json
import math
import subprocess
import sys

import pytest
import torch
from program import ROOT

import a2bfr
import latent_pmrf

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


@pytest.mark.parametrize("precision", ("no", "bf16"))
@pytest.mark.parametrize("method", ("latent_pmrf", "honestface", "a2bfr", "pref_restore"))
def test_a_toy_preset_trains(method, precision, tmp_path):
    """bf16 broke A2BFR's toy FLUX at its second step: cuDNN's attention gave gradients that were not numbers."""
    subprocess.run([sys.executable, f"{method}.py", "train", "-o", str(tmp_path), "--device", "cuda", "--mixed_precision", precision,
                    "--max_train_steps", "3", "--log_steps", "1", "--validation_faces", "8"], check=True, cwd=ROOT)
    steps = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()][1:]
    assert {row["step"] for row in steps} == {1, 2, 3}
    assert all(math.isfinite(value) for row in steps for value in row.values() if isinstance(value, float))
    assert json.loads((tmp_path / "metrics.json").read_text())["peak_memory_gb"] > 0.1


def test_neighbourhood_attention_by_blocks_equals_the_masked_one():
    """flex_attention skips blocks of keys; the CPU's path masks all keys. Values and gradients, at borders too."""
    torch.manual_seed(0)
    qkv = [torch.randn(2, 2, 16 * 24, 32, requires_grad=True) for _ in range(3)]
    there = [x.detach().cuda().requires_grad_() for x in qkv]
    wanted, found = latent_pmrf.neighborhood_attention(*qkv, 16, 24), latent_pmrf.neighborhood_attention(*there, 16, 24)
    weight = torch.randn_like(wanted)
    gradients = [torch.autograd.grad((out * weight.to(out)).sum(), x) for out, x in ((wanted, qkv), (found, there))]
    for a, b in zip((wanted, *gradients[0]), (found, *gradients[1])):
        torch.testing.assert_close(a, b.cpu(), rtol=5e-3, atol=5e-3)             # TF32 multiplies there


def test_the_divergence_of_attributes_is_allowed_under_autocast():
    logits, target = torch.randn(4, 12, device="cuda"), torch.rand(4, 12, device="cuda")
    with torch.autocast("cuda", torch.bfloat16):
        found = a2bfr.attribute_divergence(logits, target)
    p, q = logits.double().sigmoid(), target.double()
    wanted = (q * (q / p).log() + (1 - q) * ((1 - q) / (1 - p)).log()).mean()
    torch.testing.assert_close(found.double(), wanted, rtol=1e-4, atol=1e-6)
