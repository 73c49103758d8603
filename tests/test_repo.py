"Hygiene of the repository itself: what no single notebook can test"
import ast
import configparser
import json
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from videotg_r1.config import load_params
from videotg_r1.preflight import preflight
from videotg_r1.stages import plan_run, stage_params

ROOT = Path(__file__).parents[1]
MODULES = sorted((ROOT/"nbs").glob("[0-9]*.ipynb"))
STAGES = sorted((ROOT/"nbs/stages").glob("*.ipynb"))
PARAMS = sorted((ROOT/"params").glob("*.yaml"))
NOTEBOOKS = sorted(p for p in (ROOT/"nbs").rglob("*.ipynb") if ".ipynb_checkpoints" not in p.parts)


def cells(path): return json.loads(path.read_text())["cells"]
def source(cell): return "".join(cell["source"])
def name_of(path): return next(m[1] for c in cells(path) if (m := re.search(r"^#\|\s*default_exp:?\s+(\S+)", source(c), re.M)))


ORDER = {name_of(p): p.name for p in MODULES} # two notebooks on one floor stand in the order of their names


def imports(module):
    "Own modules that a module imports, at top level and anywhere"
    tree = ast.parse((ROOT/f"videotg_r1/{module}.py").read_text())
    def own(node):
        if not isinstance(node, ast.ImportFrom) or not (node.level or (node.module or "").startswith("videotg_r1")): return []
        source = (node.module or "").removeprefix("videotg_r1").strip(".")
        return [source] if source else [a.name for a in node.names]
    top = [m for n in tree.body for m in own(n)]
    return top, [m for n in ast.walk(tree) for m in own(n)]


@pytest.mark.parametrize("module", ORDER)
def test_imports_go_down(module):
    for other in imports(module)[1]:
        if other == "__version__": continue
        assert ORDER[other] < ORDER[module], f"{module} imports {other}, which comes later"


def test_floors_0_to_2_load_no_torch():
    low = [m for m, name in ORDER.items() if name < "30"]
    code = f"import sys, importlib; [importlib.import_module('videotg_r1.' + m) for m in {low}]; print('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "False"


def test_rewards_import_is_quick_and_light():
    code = "import sys, time; t = time.process_time(); import videotg_r1.rewards; print(time.process_time() - t); print(sorted({'torch', 'pydantic', 'pandas', 'matplotlib'} & set(sys.modules)))"
    best = 9.
    for _ in range(3):
        out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.splitlines()
        best = min(best, float(out[0]))
        assert out[1] == "[]"
    assert best < .5, f"import videotg_r1.rewards took {best:.2f} s of CPU, three times at least"


@pytest.mark.parametrize("path", MODULES, ids=lambda p: p.name)
def test_notebook_form(path):
    own = cells(path)
    assert source(own[0]).startswith("# ") and "\n> " in source(own[0]), "cell 0: `# Title` and a one-line summary behind `>`"
    code = [c for c in own if c["cell_type"] == "code"]
    prose = 1 - len(code)/len(own)
    assert prose >= .25, f"{prose:.0%} of the cells are prose, 25 % are wanted"
    for c in code:
        if re.search(r"^#\|\s*exporti?\b", source(c), re.M):
            n = sum(bool(line.strip()) and not line.startswith("#|") for line in source(c).splitlines())
            assert n <= 50, f"an exported cell of {n} lines: two ideas, or a library? {source(c)[:80]!r}"
        assert "TODO" not in source(c)
    hidden = sum("#| hide" in source(c) for c in code)
    assert hidden <= max(2, .1*len(code)), f"{hidden} of {len(code)} code cells are hidden"


@pytest.mark.parametrize("path", STAGES, ids=lambda p: p.name)
def test_stage_form(path):
    own = cells(path)
    tagged = [i for i, c in enumerate(own) if "parameters" in c["metadata"].get("tags", [])]
    assert tagged == [1], f"cell 1, and only it, must be tagged 'parameters'; tagged: {tagged}"
    assert "run_dir" in stage_params(path)
    code = [c for c in own if c["cell_type"] == "code"]
    assert len(code) <= 15
    assert not any(c.get("outputs") for c in code), "results belong in reports/, not in nbs/stages"
    assert not any(source(c).lstrip().startswith("#|") for c in code), "papermill does not know nbdev's directives"
    for p in stage_params(path).values(): assert p.help, "every parameter has a comment behind it"


@pytest.mark.parametrize("path", PARAMS, ids=lambda p: p.stem)
def test_params_files(path):
    config = load_params(path)
    assert config["run"] == path.stem
    plan = plan_run(config)
    names = [j.name for j in plan]
    for j in plan: assert all(n in names[:names.index(j.name)] for n in j.needs), f"{j.name} comes before what it needs"


@pytest.mark.parametrize("path", PARAMS, ids=lambda p: p.stem)
def test_params_pass_the_settings_classes(path):
    "The planner checks names; the classes check types, ranges and combinations"
    from videotg_r1.config import from_params
    from videotg_r1.curriculum import CurriculumConfig
    from videotg_r1.difficulty import DifficultyConfig
    from videotg_r1.evaluation import EvalConfig
    from videotg_r1.grpo import GRPOSettings
    from videotg_r1.judge import JudgeConfig
    from videotg_r1.reflection import ReflectConfig
    from videotg_r1.selection import SelectConfig
    from videotg_r1.sft import SFTSettings
    from videotg_r1.synthetic import WorldConfig
    from videotg_r1.variants import Variant
    from videotg_r1.video import FrameSpec
    classes = dict(reflect=ReflectConfig, estimate=DifficultyConfig, evaluate=EvalConfig, ablation=EvalConfig, data_efficiency=EvalConfig)
    built = []
    def build(cls, given): built.append((from_params(cls, given), given))
    for j in plan_run(load_params(path)):
        p = j.params
        if j.stage in classes: build(classes[j.stage], p.get("settings", {}))
        if j.stage == "prepare" and "world" in p: build(WorldConfig, p["world"])
        for o in p.get("pools", {}).values(): build(SelectConfig, o)
        if p.get("frames"): build(FrameSpec, p["frames"])
        if p.get("judge"): build(JudgeConfig, p["judge"])
        if "grpo" in p: build(GRPOSettings, p["grpo"])
        if "sft" in p: build(SFTSettings, p["sft"])
        if p.get("curriculum"): build(CurriculumConfig, p["curriculum"])
        for o in p.get("variants", {}).values():
            build(Variant, o)
            if built[-1][0].curriculum: build(CurriculumConfig, built[-1][0].curriculum)
    assert {classes[j.stage] for j in plan_run(load_params(path)) if j.stage in classes} <= {type(cfg) for cfg, _ in built}
    for cfg, given in built:
        for name, value in given.items():
            got = getattr(cfg, name)
            assert (list(got) if isinstance(got, tuple) else got) == value or float(got) == float(value), f"{type(cfg).__name__}.{name}"


@pytest.mark.parametrize("path", [p for p in PARAMS if p.stem not in ("smoke", "quickstart", "gqa")], ids=lambda p: p.stem)
def test_preflight_names_what_a_real_run_lacks(path, monkeypatch, tmp_path):
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    config = load_params(path)
    missing = {o.what for o in preflight(config) if o.level == "missing"}
    if not (ROOT/"data").exists(): assert {"model", "annotations"} <= missing


def test_settings_ini_and_pyproject_agree():
    ini = configparser.ConfigParser(delimiters=["="])
    ini.read(ROOT/"settings.ini")
    d, toml = ini["DEFAULT"], tomllib.loads((ROOT/"pyproject.toml").read_text())
    nbdev, project = toml["tool"]["nbdev"], toml["project"]
    assert project["name"] == d["lib_name"] and project["requires-python"] == ">=" + d["min_python"]
    assert set(project["dynamic"]) >= {"version", "description", "dependencies", "optional-dependencies", "scripts"}
    assert nbdev["lib_path"] == d["lib_path"] and nbdev["nbs_path"] == d["nbs_path"]
    assert nbdev["allowed_cell_metadata_keys"] == ["tags"], "papermill's tag would be cleaned away"
    assert nbdev["jupyter_hooks"] is True
    assert f'__version__ = "{d["version"]}"' in (ROOT/"videotg_r1/__init__.py").read_text()


def test_constraints_pin_what_is_required():
    pinned = {re.split("==", line)[0].lower().replace("_", "-"): line.split("==")[1] for line in (ROOT/"constraints.txt").read_text().splitlines() if "==" in line and not line.startswith("#")}
    ini = configparser.ConfigParser(delimiters=["="])
    ini.read(ROOT/"settings.ini")
    for line in (ini["DEFAULT"]["requirements"] + "\n" + ini["DEFAULT"]["dev_requirements"]).splitlines():
        if not line.strip(): continue
        name, exact = re.match(r"([A-Za-z0-9_.-]+)", line)[1].lower().replace("_", "-"), re.search(r"==([\w.]+)", line)
        assert name in pinned, f"{name} is not in constraints.txt"
        if exact: assert pinned[name] == exact[1]
    assert not [v for v in pinned.values() if "+" in v or "/" in v], "no local builds, no addresses"


TEXT = [p for pattern in ("*.md", "*.ini", "*.toml", "*.txt", "Makefile", ".ci/*", "params/*", "videotg_r1/*.py", "tests/*.py", "nbs/**/*.ipynb", "reports/**/*.md", "reports/**/*.json", "reports/**/*.ipynb")
        for p in ROOT.glob(pattern) if p.is_file() and p.name != "test_repo.py"]


def test_what_set_up_writes_into_the_clone_is_not_committed():
    ignored = (ROOT/".gitignore").read_text().splitlines()
    assert {".venv/", ".gitconfig", "nbs/_quarto.yml", "nbs/nbdev.yml"} <= {*ignored}, "`nbdev_install_hooks` writes .gitconfig"


def test_no_paths_of_somebodys_machine():
    here = [re.escape(str(p)) + r"(?![\w-])" for p in (Path.home(), ROOT, ROOT.parent) if len(p.parts) > 1]
    bad = re.compile("|".join([r"/home/\w+|/Users/\w+|/root/|C:\\\\Users", *here]))
    for p in TEXT:
        found = bad.search(p.read_text())
        assert not found, f"{p.relative_to(ROOT)}: {found[0]}"


def test_no_open_servers_pickles_or_remote_code():
    for p in (ROOT/"videotg_r1").glob("*.py"):
        text = p.read_text()
        assert not re.search(r"0\.0\.0\.0|trust_remote_code\s*=\s*True|allow_pickle\s*=\s*True", text), p.name
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.Call):
                called = ast.unparse(node.func)
                assert called not in ("eval", "exec", "pickle.load", "pickle.loads", "joblib.load"), f"{p.name}: {called}"
                if called == "torch.load": assert "weights_only=True" in ast.unparse(node), f"{p.name}: torch.load"


def test_small_fixtures():
    size = sum(p.stat().st_size for p in (ROOT/"tests/data").rglob("*") if p.is_file())
    assert size < 200_000, f"tests/data holds {size} bytes"
    for p in NOTEBOOKS: assert p.stat().st_size < 500_000, f"{p.name} holds {p.stat().st_size} bytes"


def test_readme_numbers_are_those_of_the_report():
    text = (ROOT/"README.md").read_text()
    facts = json.loads((ROOT/"reports/2026-11-23_quickstart/metrics.json").read_text())
    assert [r["name"] for r in facts["results"]][:2] == ["query-blind", "zero-shot"]
    for r in facts["results"]:
        row = next(line for line in text.splitlines() if line.startswith(f"| {r['name']} |"))
        said = (r.get("vs_base") or {}).get("words", "")
        assert row == f"| {r['name']} | {r['mIoU']:.3f} | [{r['lo']:.3f}, {r['hi']:.3f}] | {r['R1@0.5']:.3f} | {said} |"


def test_committed_reports_are_small():
    for folder in (p for p in (ROOT/"reports").glob("20*") if p.is_dir()):
        assert sum(f.stat().st_size for f in folder.rglob("*") if f.is_file()) < 500_000, folder.name
