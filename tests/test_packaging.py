"What a person gets from the wheel alone: the whole of it, and nothing that only works in a clone"
import json
import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from videotg_r1.datasets import clone_root, params_file, repo_path

ROOT = Path(__file__).parents[1]
CARRIED = ("nbs/stages", "nbs/explore", "params", "tests/data/world")


def files(folder): return sorted(p for p in (ROOT/folder).rglob("*") if p.is_file() and not any(o.startswith(".") for o in p.relative_to(ROOT).parts))


@pytest.fixture(scope="session")
def wheel(tmp_path_factory):
    "The wheel, built from a copy of what it needs"
    setuptools = pytest.importorskip("setuptools")
    if int(setuptools.__version__.split(".")[0]) < 77: pytest.skip("the wheel is built with setuptools 77 or newer, as pyproject.toml says")
    tree, out = tmp_path_factory.mktemp("tree"), tmp_path_factory.mktemp("wheel")
    for name in ("settings.ini", "setup.py", "pyproject.toml", "README.md", "LICENSE", "MANIFEST.in"): shutil.copy(ROOT/name, tree)
    for folder in ("videotg_r1", *CARRIED): shutil.copytree(ROOT/folder, tree/folder, ignore=shutil.ignore_patterns("__pycache__", ".*"))
    code = f"from setuptools import build_meta; print(build_meta.build_wheel({str(out)!r}))"
    subprocess.run([sys.executable, "-c", code], cwd=tree, check=True, capture_output=True, timeout=300)
    return next(out.glob("*.whl"))


@pytest.fixture(scope="session")
def site(wheel, tmp_path_factory):
    "The wheel as it lies after an installation"
    folder = tmp_path_factory.mktemp("site")
    zipfile.ZipFile(wheel).extractall(folder)
    return folder


def installed(site, cwd, *argv):
    "vtg of the installed package, in a folder that is no clone"
    code = "import sys; from videotg_r1.cli import main; sys.exit(main())"
    env = os.environ | {"PYTHONPATH": str(site), "PYTHONDONTWRITEBYTECODE": "1"}
    r = subprocess.run([sys.executable, "-c", code, *map(str, argv)], capture_output=True, text=True, cwd=cwd, env=env, timeout=300)
    return r.returncode, r.stdout, r.stderr


def test_the_wheel_carries_stages_params_checkpoint_and_the_smoke_runs_videos(wheel):
    with zipfile.ZipFile(wheel) as z:
        names = set(z.namelist())
        for folder in CARRIED:
            assert files(folder)
            for p in files(folder): assert z.read(f"videotg_r1/shipped/{p.relative_to(ROOT)}") == p.read_bytes()
        for p in files("videotg_r1/models"): assert str(p.relative_to(ROOT)) in names
        for p in files("videotg_r1"):
            if p.suffix == ".py": assert str(p.relative_to(ROOT)) in names
    assert not [n for n in names if re.match(r"(nbs|tests|reports|params|docs)/", n)], "nothing lands beside the package"


def test_metadata_names_the_extras_and_the_command(wheel):
    with zipfile.ZipFile(wheel) as z:
        read = lambda end: next(z.read(n).decode() for n in z.namelist() if n.endswith(end))
        meta, entry = read("dist-info/METADATA"), read("entry_points.txt")
    assert {"dev", "gpu", "ray", "docs"} <= set(re.findall(r"Provides-Extra: (\S+)", meta))
    assert "vtg = videotg_r1.cli:main" in entry and "Requires-Python: >=3.11" in meta
    assert "Teach a video language model" in meta, "the README is the description"
    plain = [o for o in re.findall(r"Requires-Dist: (.+)", meta) if "extra ==" not in o]
    assert not [o for o in plain if re.match(r"(sphinx|furo|jupyterlab|pytest|nbdev)\b", o)], "a user needs no tools of a developer"


def test_installed_vtg_finds_what_it_carries_from_an_empty_folder(site, tmp_path):
    before = sorted(p.relative_to(site) for p in site.rglob("*"))
    code, out, err = installed(site, tmp_path, "preflight", "smoke")
    assert code == 0, out + err
    assert str(site) in out and str(ROOT/"tests") not in out, "the wheel's own files, not the clone's"
    assert installed(site, tmp_path, "preflight", "params/smoke.yaml")[0] == 0
    code, _, err = installed(site, tmp_path, "run", "smok")
    assert code == 2 and "did you mean 'smoke'" in err and len(err.splitlines()) == 1
    assert sorted(p.relative_to(site) for p in site.rglob("*")) == before, "an installation is not written to"


def test_installed_stage_writes_into_the_working_folder_and_claims_no_commit(site, tmp_path):
    subprocess.run(["git", "init", "-q", str(tmp_path)], check=True)
    subprocess.run(["git", "-C", str(tmp_path), "-c", "user.name=a", "-c", "user.email=a@b", "commit", "-q", "--allow-empty", "-m", "x"], check=True)
    code, out, err = installed(site, tmp_path, "stage", "prepare", "--run-dir", "runs/a")
    assert code == 0, out + err
    run = json.loads((tmp_path/"runs/a/run.json").read_text())
    assert run["commit"] is None, "the working folder's repository says nothing about the package"
    assert (tmp_path/"runs/a/SUCCESS").is_file() and not (site/"runs").exists()


def test_a_clone_uses_its_own_files(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert clone_root() == ROOT and not (ROOT/"videotg_r1/shipped").exists()
    assert params_file("smoke") == ROOT/"params/smoke.yaml" == repo_path("params/smoke.yaml")
    (tmp_path/"smoke").write_text("run: mine\n")
    assert params_file("smoke") == Path("smoke"), "a file of the working folder comes first"
