"""What only a CUDA device can show: every toy stage trains there in the precision that --mixed_precision auto picks."""
import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import a2bfr

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


@pytest.mark.parametrize("method", ("latent_pmrf", "honestface", "a2bfr", "pref_restore"))
def test_a_toy_preset_trains(method, tmp_path):
    """bf16 broke A2BFR's prior at its second step: cuDNN's attention gave gradients that were not numbers."""
    script = Path(__file__).parent.parent / f"{method}.py"
    subprocess.run([sys.executable, str(script), "train", "-o", str(tmp_path / "out"), "--device", "cuda",
                    "--max_train_steps", "3", "--log_steps", "1", "--validation_faces", "8"], check=True)
    rows = [json.loads(line) for line in (tmp_path / "out" / "log.jsonl").read_text().splitlines()]
    steps = [row for row in rows if "seconds_per_step" in row]
    assert {row["step"] for row in steps} == {1, 2, 3}
    assert all(math.isfinite(value) for row in steps for value in row.values() if isinstance(value, float))
    assert json.loads((tmp_path / "out" / "metrics.json").read_text())["peak_memory_gb"] > 0.1


def test_the_divergence_of_attributes_is_allowed_under_autocast():
    logits, target = torch.randn(4, 12, device="cuda"), torch.rand(4, 12, device="cuda")
    with torch.autocast("cuda", torch.bfloat16):
        found = a2bfr.attribute_divergence(logits, target)
    p, q = logits.double().sigmoid(), target.double()
    wanted = (q * (q / p).log() + (1 - q) * ((1 - q) / (1 - p)).log()).mean()
    torch.testing.assert_close(found.double(), wanted, rtol=1e-4, atol=1e-6)
