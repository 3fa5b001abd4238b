"""The README's commands: the quick start runs (shortened), the others are only parsed; what it names exists."""
import importlib.util
import re
import shlex
from pathlib import Path

import pytest

import a2bfr
import common
import honestface
import latent_pmrf
import metrics
import pref_restore
from common import command_line

ROOT = Path(__file__).parent.parent
TEXT = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"^```bash[^\n]*\n(.*?)^```", TEXT, re.S | re.M)
COMMANDS = [line.split("   #")[0] for block in BLOCKS for line in block.splitlines() if line]
METHODS = {"latent_pmrf": latent_pmrf, "honestface": honestface, "a2bfr": a2bfr, "pref_restore": pref_restore}
CALLED = [(m, c) for c in COMMANDS for m in METHODS if f"{m}.py " in c]


def verbs(method, instead=None):
    """The verbs of a method, all with the function `instead` if given."""
    return {name: (flags, presets, instead or run) for name, (flags, presets, run) in method.VERBS.items()}


@pytest.mark.parametrize("name, command", CALLED)
def test_every_flag_of_the_readme_exists(name, command):
    """Parsed as the program would, with a function that only takes the configuration."""
    seen = []
    command_line("x", verbs(METHODS[name], seen.append), shlex.split(command.split(f"{name}.py")[1]))
    assert len(seen) == 1


@pytest.mark.parametrize("name", METHODS)
def test_the_quick_start_runs(name, tmp_path, monkeypatch, capsys):
    """The two commands of the first screen for each method, with fewer steps and faces."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "docs").symlink_to(ROOT / "docs")
    train, sample = [shlex.split(c.split(f"{name}.py")[1]) for c in COMMANDS if c.startswith(f"python {name}.py")][:2]
    command_line("x", verbs(METHODS[name]), [*train, "--max_train_steps", "2", "--validation_faces", "8"])
    command_line("x", verbs(METHODS[name]), sample)
    folder = Path(sample[sample.index("-o") + 1])
    restored = sorted(p.name for p in (tmp_path / folder / "restored_faces").iterdir())
    assert restored == sorted(p.stem + ".png" for p in (ROOT / "docs" / "toy_lq").iterdir())
    assert "restored 6 faces" in capsys.readouterr().out


def test_measuring_a_folder_against_itself(capsys):
    metrics.main([str(ROOT / "docs" / "toy_lq"), "--reference", str(ROOT / "docs" / "toy_lq")])
    said = capsys.readouterr().out
    assert "ssim" in said and "skipped" in said and "inf" in said


def test_files_and_links_exist():
    for page in (ROOT / "README.md", *(ROOT / "docs" / f"{name}.md" for name in METHODS)):
        for target in re.findall(r"\]\((?!http)([^)#]+)", page.read_text()):
            assert (page.parent / target).exists(), f"{page.name}: {target}"


@pytest.mark.parametrize("method", METHODS)
def test_the_equation_map_names_functions_that_exist(method):
    page = (ROOT / "docs" / f"{method}.md").read_text()
    names = re.findall(rf"\[`(\w+)`\]\(\.\./{method}\.py\)", page)
    assert len(names) >= 8 and all(hasattr(METHODS[method], name) for name in names)


@pytest.mark.parametrize("module", METHODS.values(), ids=METHODS)
def test_presets_pass_their_own_checks(module):
    for preset in (module.Train(), module.Train(**module.PAPER), module.Ablate(), module.Ablate(**module.PAPER)):
        common.check_numbers(preset)
    paper = module.Train(**module.PAPER)
    assert getattr(paper, "lora_optimizer", paper.optimizer) == ("prodigy" if module is a2bfr else "adamw")
    assert paper.image_size == 512


@pytest.mark.parametrize("path", [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))], ids=lambda p: p.name)
def test_tables_are_what_the_results_say(path):
    spec = importlib.util.spec_from_file_location("tables", ROOT / "docs" / "tables.py")
    tables = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tables)
    assert tables.filled(path.read_text()) == path.read_text(), "run python docs/tables.py"
