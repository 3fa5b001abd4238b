"""The README and the pages: their commands parse, what they name exists, their tables are what the results say."""
import importlib.util
import json
import re
import shlex
from pathlib import Path

import pytest

import common
import a2bfr
import honestface
import latent_pmrf
import metrics
import pref_restore

ROOT = Path(__file__).parent.parent
TEXT = (ROOT / "README.md").read_text() + (ROOT / "docs" / "weights.md").read_text()
BLOCKS = re.findall(r"^```bash[^\n]*\n(.*?)^```", TEXT, re.S | re.M)
COMMANDS = [line.split("   #")[0] for block in BLOCKS for line in block.splitlines() if line]
METHODS = {"latent_pmrf": latent_pmrf, "honestface": honestface, "a2bfr": a2bfr, "pref_restore": pref_restore}
ROWS = json.loads((ROOT / "docs" / "rows.json").read_text())
CALLED = [(m, c) for c in COMMANDS for m in METHODS if f"{m}.py " in c]


def script(name):
    """A script of docs/ as a module."""
    spec = importlib.util.spec_from_file_location(name, ROOT / "docs" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("name, command", CALLED)
def test_every_flag_of_the_readme_exists(name, command):
    """Parsed and checked as the program would, without running it."""
    _, cfg = common.parse("x", METHODS[name].VERBS, shlex.split(command.split(f"{name}.py")[1]))
    common.check_config(cfg)


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
    cls, presets, _ = module.VERBS["train"]
    for preset in presets.values():
        common.check_config(cls(**preset))
    assert not presets["paper"] and cls().image_size == 512       # the defaults are the paper's values


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
    """Every row of ours that a printed row stands beside is a row of rows.json; every printed row has a number a column."""
    for name, printed in json.loads((ROOT / "docs" / "claims.json").read_text()).items():
        rows = ROWS[name.split("_ablation")[0]]["rows"]
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
        "| Table 1 | A | B | FID 1 / 2 | fid_toy, lower is better | -1.0000 ± 0.1000 | 3 | reproduced |",
        "| Table 1 | B | A | PSNR 20 / 20 | psnr, higher is better |  | 0 | equal in print |",
        "| Table 1 | B | C | FID 2 / 3 | fid_toy, lower is better |  | 0 | to be measured |",
        "| Table 1 | A | C | FID 1 / 3 | fid_toy, lower is better |  | 0 | to be measured |",
        "", "Not computed here: Table 9 (no CLIP)."]


@pytest.mark.parametrize("name", ROWS)
def test_every_row_of_the_ablations_is_a_configuration(name):
    cls, presets, _ = METHODS[name].VERBS["train"]
    flags_of = script("replicate").flags_of
    rows = ROWS[name]["rows"]
    for settings in (rows[settings["of"]] if "of" in settings else settings for settings in rows.values()):
        argv = ["train", *flags_of(ROWS[name]["every row"] | settings, Path("base"))]
        common.check_config(common.parse("x", METHODS[name].VERBS, argv)[1])


def test_a_replication_runs_its_rows_once_and_flattens_their_scores(tmp_path, monkeypatch):
    """Two rows of two seeds with a stand-in for `train`: folders, flags, the base folder, and what is done stays done."""
    replicate, calls = script("replicate"), []

    def run(command, cwd):
        out = Path(command[command.index("-o") + 1])
        calls.append(command[2:])
        out.mkdir(parents=True)
        rows = {"lq": dict(psnr=20.0), "restored_faces": dict(psnr=25.0 + len(calls))}
        (out / "metrics.json").write_text(json.dumps(dict(rows=rows, bound_psnr=38.0, seconds=1, torch="t", python="p", device="d",
                                                          commit="c")))
        return type("Done", (), dict(returncode=0))

    monkeypatch.setattr(replicate.subprocess, "run", run)
    row = "option 1, posterior mean of latents"
    argv = ["latent_pmrf", "--rows", "Latent-PMRF", row, "--seeds", "2", "-o", str(tmp_path / "runs"), "--results", str(tmp_path)]
    replicate.main(argv)
    replicate.main(argv)
    assert len(calls) == 4 and "--source" in calls[1] and str(tmp_path / "runs" / "latent_pmrf" / "latent_pmrf_0") in calls[1]
    found = json.loads((tmp_path / "latent_pmrf_ablation.json").read_text())
    assert len(found) == 4 and found[f"{row}, seed 1"]["scores"] == dict(psnr=29.0, lq_psnr=20.0, bound_psnr=38.0, seconds=1)


def test_rows_of_equal_settings_are_one_training_and_others_restore_with_it(tmp_path, monkeypatch):
    replicate, calls = script("replicate"), []

    def run(command, cwd):
        calls.append(command[1])
        out = Path(command[command.index("-o") + 1])
        if command[1].startswith("docs"):
            out.write_text(json.dumps({"seeds, stage 2": dict(deg_std_toy=4.0)}))
        else:
            out.mkdir(parents=True)
            about = dict(seconds=1, torch="t", python="p", device="d", commit="c")
            (out / "metrics.json").write_text(json.dumps(dict(rows={"restored_faces": dict(psnr=25.0)}, **about)))
        return type("Done", (), dict(returncode=0))

    monkeypatch.setattr(replicate.subprocess, "run", run)
    replicate.main(["pref_restore", "--rows", "all rewards", "NFT", "seeds, stage 2", "--seeds", "1", "-o", str(tmp_path / "runs"),
                    "--results", str(tmp_path)])
    found = json.loads((tmp_path / "pref_restore_ablation.json").read_text())
    assert calls == ["pref_restore.py", "docs/preference_tables.py"]
    assert found["NFT, seed 0"]["scores"] == found["all rewards, seed 0"]["scores"] == dict(psnr=25.0, seconds=1)
    assert found["seeds, stage 2, seed 0"]["scores"] == dict(deg_std_toy=4.0)
