"""The README's commands: the quick start runs (shortened), the others are only parsed; what it names exists."""
import importlib.util
import json
import re
import shlex
from pathlib import Path

import pytest
import torch
from PIL import Image

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


def script(name):
    """A script of docs/ as a module."""
    spec = importlib.util.spec_from_file_location(name, ROOT / "docs" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def verbs(method, instead=None):
    """The verbs of a method, all with the function `instead` if given."""
    return {name: (flags, presets, instead or run) for name, (flags, presets, run) in method.VERBS.items()}


@pytest.mark.parametrize("name, command", CALLED)
def test_every_flag_of_the_readme_exists(name, command):
    """Parsed as the program would, with a function that only takes the configuration."""
    seen = []
    command_line("x", verbs(METHODS[name], seen.append), shlex.split(command.split(f"{name}.py")[1]))
    assert len(seen) == 1


@pytest.fixture(scope="session")
def trained(tmp_path_factory):
    """name -> folder in which the quick start's `train` ran, with fewer steps and faces; each method once."""
    root, done = tmp_path_factory.mktemp("quick_start"), set()
    (root / "docs").symlink_to(ROOT / "docs")

    def run(name):
        if name not in done:
            command_line("x", verbs(METHODS[name]),
                         [*quick_start(name)[0], "--max_train_steps", "2", "--validation_faces", "8",
                          *(["--bank", "64", "--consistency_seeds", "2"] if name == "pref_restore" else [])])
            done.add(name)
        return root

    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)
        yield run


def quick_start(name) -> list:
    """Arguments of the two commands of the first screen for a method: train, sample."""
    return [shlex.split(c.split(f"{name}.py")[1]) for c in COMMANDS if c.startswith(f"python {name}.py")][:2]


@pytest.mark.parametrize("name", METHODS)
def test_the_quick_start_runs(name, trained, monkeypatch, capsys):
    monkeypatch.chdir(trained(name))
    sample = quick_start(name)[1]
    command_line("x", verbs(METHODS[name]), sample)
    folder = Path(sample[sample.index("-o") + 1])
    restored = sorted(p.name for p in (folder / "restored_faces").iterdir())
    assert restored == sorted(p.stem + ".png" for p in (ROOT / "docs" / "toy_lq").iterdir())
    assert "restored 6 faces" in capsys.readouterr().out


def test_side_by_side_restores_the_same_faces_with_all_methods(trained, tmp_path):
    """The script of docs/ on the runs above: a row and a column of pictures per method, numbers as measured apart."""
    for name in METHODS:
        runs = trained(name) / "runs"
    script("side_by_side").main(["--runs", str(runs), "--faces", "3", "-o", str(tmp_path)])
    found = json.loads((tmp_path / "results" / "side_by_side.json").read_text())
    assert list(found["rows"]) == ["degraded", "bicubic of 32 px", "posterior mean", "Latent-PMRF", "HonestFace",
                                   "A2BFR", "Pref-Restore"]
    assert [found["rows"][m].get("generator_calls") for m in ("Latent-PMRF", "HonestFace", "A2BFR", "Pref-Restore")] \
        == [5, 1, 12, 10]                                          # posterior mean + 4; one; 4 steps of 3; 10
    hq, lq = [torch.stack([common.read_image(p) for p in sorted(folder.iterdir())]) for folder in
              (runs / "side_by_side_faces" / "hq", runs / "side_by_side_faces" / "lq")]
    for title, folder in (("degraded", "lq"), ("HonestFace", "honestface_lq/restored_faces")):
        images = torch.stack([common.read_image(p) for p in sorted((runs / "side_by_side_faces" / folder).iterdir())])
        error = ((images - hq) / 2).square().flatten(1).mean(1)
        assert found["rows"][title]["psnr"] == pytest.approx((-10 * error.log10()).mean().item(), abs=1e-3)
    assert found["rows"]["degraded"]["psnr_gain"] == 0 and (lq != hq).any()
    assert Image.open(tmp_path / "side_by_side.png").size == (8 * 116 + 4, 3 * 116 + 20)


def test_measuring_a_folder_against_itself(capsys):
    metrics.main([str(ROOT / "docs" / "toy_lq"), "--reference", str(ROOT / "docs" / "toy_lq")])
    said = capsys.readouterr().out
    assert "ssim" in said and "skipped" in said and "inf" in said


def test_files_and_links_exist():
    for page in (ROOT / "README.md", *(ROOT / "docs").glob("*.md")):
        for target in re.findall(r"\]\((?!http)([^)#]+)", page.read_text()):
            assert (page.parent / target).exists(), f"{page.name}: {target}"


@pytest.mark.parametrize("method", METHODS)
def test_the_equation_map_names_functions_that_exist(method):
    page = (ROOT / "docs" / f"{method}.md").read_text()
    names = re.findall(rf"\[`(\w+)`\]\(\.\./{method}\.py#L\d+\)", page)
    assert len(names) >= 8 and all(hasattr(METHODS[method], name) for name in names)


@pytest.mark.parametrize("module", METHODS.values(), ids=METHODS)
def test_presets_pass_their_own_checks(module):
    for preset in (module.Train(), module.Train(**module.PAPER), module.Ablate()):
        common.check_numbers(preset)
    paper = module.Train(**module.PAPER)
    assert getattr(paper, "lora_optimizer", paper.optimizer) == ("prodigy" if module is a2bfr else "adamw")
    assert paper.image_size == 512


@pytest.mark.parametrize("path", [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))], ids=lambda p: p.name)
def test_tables_are_what_the_results_say(path):
    tables = script("tables")
    assert tables.filled(path.read_text()) == path.read_text(), "run python docs/tables.py"


def test_a_verdict_needs_three_seeds_that_agree():
    verdict = script("tables").verdict
    assert [verdict([]), verdict([1.0, 1.0])] == ["to be measured", "too few seeds"]
    assert verdict([1.0, 1.1, 0.9]) == "reproduced" and verdict([-1.0, -1.1, -0.9]) == "not reproduced"
    assert verdict([0.1, 3.0, 0.1]) == "not distinguishable", "the mean is less than two standard errors from zero"
    assert verdict([5.0, 5.0, -0.1, 5.0, 5.0, 5.0, 5.0, 5.0]) == "not distinguishable", "one seed disagrees"
    assert verdict([0.0, 0.0, 0.0]) == "not distinguishable"


def test_claims_compare_rows_that_exist():
    """Every row of ours that a printed row stands beside is a row of `ablate`; every printed row has a number a column."""
    for name, printed in json.loads((ROOT / "docs" / "claims.json").read_text()).items():
        rows = METHODS[name.split("_ablation")[0]].ABLATIONS
        for table in printed["tables"]:
            assert all(len(numbers) == len(table["columns"]) for _, _, numbers in table["rows"]), table["where"]
            assert all(len(column) == 3 and column[2] in ("lower", "higher") for column in table["columns"])
            assert {row for _, row, _ in table["rows"]} <= set(rows), table["where"]
        assert all({row, other} <= set(rows) for _, row, other, *_ in printed.get("statements", []))


def test_every_two_printed_rows_are_compared_by_the_seeds_they_share(tmp_path, monkeypatch):
    tables = script("tables")
    monkeypatch.setattr(tables, "DOCS", tmp_path)
    (tmp_path / "results").mkdir()
    table = dict(where="Table 1", columns=[["FID", "fid_toy", "lower"], ["PSNR", "psnr", "higher"]],
                 rows=[["b", "B", [2, 20]], ["a", "A", [1, 20]], ["c", "C", [3, None]]])
    (tmp_path / "claims.json").write_text(json.dumps({"x": dict(tables=[table], not_computed=[["Table 9", "no CLIP"]])}))
    entries = [dict(row=row, seed=seed, scores=dict(fid_toy=value)) for row, seed, value in
               [("A", 0, 1.0), ("B", 0, 2.0), ("A", 1, 1.5), ("B", 1, 2.6), ("A", 2, 0.0), ("A", 3, 1.0), ("B", 3, 1.9)]]
    (tmp_path / "results" / "x.json").write_text(json.dumps({str(i): e for i, e in enumerate(entries)}))
    assert tables.claims("x").splitlines()[2:] == [
        "| Table 1 | A | B | FID 1 / 2 | fid_toy, lower is better | -1.000 ± 0.100 | 3 | reproduced |",
        "| Table 1 | B | A | PSNR 20 / 20 | psnr, higher is better |  | 0 | equal in print |",
        "| Table 1 | B | C | FID 2 / 3 | fid_toy, lower is better |  | 0 | to be measured |",
        "| Table 1 | A | C | FID 1 / 3 | fid_toy, lower is better |  | 0 | to be measured |",
        "", "Not computed here: Table 9 (no CLIP)."]
