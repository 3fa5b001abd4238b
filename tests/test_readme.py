"""The README's commands: the quick start runs (shortened), the others are only parsed; what it names exists."""
import re
import shlex
from pathlib import Path

import pytest

import common
import latent_pmrf as lp
import metrics
from common import command_line

ROOT = Path(__file__).parent.parent
TEXT = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"^```bash[^\n]*\n(.*?)^```", TEXT, re.S | re.M)
COMMANDS = [line.split("   #")[0] for block in BLOCKS for line in block.splitlines() if line]
PRESETS = {"toy": lp.Train(), "paper": lp.Train(**lp.PAPER)}


@pytest.mark.parametrize("command", [c for c in COMMANDS if "latent_pmrf.py" in c])
def test_every_flag_of_the_readme_exists(command):
    """Parsed as the program would, with a function that only takes the configuration."""
    seen = []
    verbs = {"train": (lp.Train, PRESETS, seen.append), "sample": (lp.Sample, {}, seen.append)}
    command_line("x", verbs, shlex.split(command.split("latent_pmrf.py")[1]))
    assert len(seen) == 1


def test_the_quick_start_runs(tmp_path, monkeypatch, capsys):
    """The two commands of the first screen, with fewer steps and faces."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "docs").symlink_to(ROOT / "docs")
    run = [shlex.split(c.split("latent_pmrf.py")[1]) for c in COMMANDS if c.startswith("python latent_pmrf.py")][:2]
    verbs = {"train": (lp.Train, PRESETS, lp.train), "sample": (lp.Sample, {}, lp.sample)}
    short = ["--max_train_steps", "2", "--validation_faces", "8", "--num_inference_steps", "2"]
    command_line("x", verbs, [*run[0], *short])
    command_line("x", verbs, run[1])
    restored = sorted(p.name for p in (tmp_path / "results" / "toy" / "restored_faces").iterdir())
    assert restored == sorted(p.stem + ".png" for p in (ROOT / "docs" / "toy_lq").iterdir())
    assert "restored 6 faces" in capsys.readouterr().out


def test_measuring_a_folder_against_itself(capsys):
    metrics.main([str(ROOT / "docs" / "toy_lq"), "--reference", str(ROOT / "docs" / "toy_lq")])
    said = capsys.readouterr().out
    assert "ssim" in said and "skipped" in said and "inf" in said


def test_files_and_links_exist():
    for page in (ROOT / "README.md", ROOT / "docs" / "latent_pmrf.md"):
        for target in re.findall(r"\]\((?!http)([^)#]+)", page.read_text()):
            assert (page.parent / target).exists(), f"{page.name}: {target}"


def test_the_equation_map_names_functions_that_exist():
    page = (ROOT / "docs" / "latent_pmrf.md").read_text()
    names = re.findall(r"\[`(\w+)`\]\(\.\./latent_pmrf\.py\)", page)
    assert len(names) >= 8 and all(hasattr(lp, name) for name in names)


@pytest.mark.parametrize("method", ["latent_pmrf", "honestface"])
def test_presets_pass_their_own_checks(method):
    module = __import__(method)
    for preset in (module.Train(), module.Train(**module.PAPER), module.Ablate(), module.Ablate(**module.PAPER)):
        common.check_numbers(preset)
    assert module.Train(**module.PAPER).optimizer == "adamw" and module.Train(**module.PAPER).image_size == 512
