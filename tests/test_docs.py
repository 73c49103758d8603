"What the documentation says is so: names of settings, links, files beside it. The site itself is looked at where it was built"
import ast
import configparser
import importlib.util
import re
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest
import yaml

from videotg_r1.cli import VERBS, parser
from videotg_r1.stages import settings_fields, stage_notebook, stage_params

ROOT = Path(__file__).parents[1]
PAGES = sorted((ROOT/"docs").glob("*.md"))
BLOCKS = {"grpo": "grpo.GRPOSettings", "sft": "sft.SFTSettings", "frames": "video.FrameSpec", "filters": "datasets.FilterConfig", "select": "selection.SelectConfig",
          "estimate": "difficulty.DifficultyConfig", "reflect": "reflection.ReflectConfig", "evaluate": "evaluation.EvalConfig", "curriculum": "curriculum.CurriculumConfig"}


@pytest.mark.parametrize("path", PAGES, ids=lambda p: p.stem)
def test_settings_that_pages_name_exist(path):
    named = re.findall(rf"`({'|'.join([*BLOCKS, 'prepare', 'train'])})\.(?!jsonl)(\w+)(?::[^`]*)?`", path.read_text())
    if path.stem == "coming-from": assert len(named) > 60, "the tables name our settings"
    for block, key in named:
        known = stage_params(stage_notebook(block)) if block in ("prepare", "train") else settings_fields(BLOCKS[block])
        assert key in known, f"{path.name}: `{block}.{key}` is no setting"


@pytest.mark.parametrize("path", PAGES, ids=lambda p: p.stem)
def test_commands_that_pages_name_exist(path):
    text = path.read_text()
    shell = "\n".join(re.findall(r"```sh\n(.*?)```", text, re.S)) + "\n" + "\n".join(re.findall(r"`(vtg [^`]*)`", text))
    for verb in re.findall(r"^\s*(?:nohup )?vtg (\w+)", shell, re.M): assert verb in VERBS, f"{path.name}: vtg {verb}"
    targets = set(re.findall(r"^([a-z]+):", (ROOT/"Makefile").read_text(), re.M))
    for target in re.findall(r"^make (\w+)", shell, re.M): assert target in targets, f"{path.name}: make {target}"
    for name in re.findall(r"params/(\w+)\.yaml", text):
        assert name == "mine" or (ROOT/f"params/{name}.yaml").is_file(), f"{path.name}: params/{name}.yaml"


@pytest.mark.parametrize("path", [ROOT/"README.md", ROOT/"SECURITY.md", *PAGES], ids=lambda p: p.stem)
def test_commands_in_blocks_are_understood(path, capsys):
    "Every whole command of a page, with its arguments; nothing is run"
    blocks = "\n".join(re.findall(r"```(?:sh)?\n(.*?)```", path.read_text(), re.S)).replace("\\\n", " ")
    for line in re.findall(r"^(?:nohup )?(?:unshare .*?)?(?:\.venv/bin/)?(vtg [a-z].*)", blocks, re.M):
        words = shlex.split(re.split(r" >| &", line)[0], comments=True)
        try: parser().parse_args(words[1:])
        except SystemExit as e: assert not e.code, f"{path.name}: {line}: {capsys.readouterr().err}"


@pytest.mark.parametrize("path", PAGES, ids=lambda p: p.stem)
def test_links_between_pages_lead_somewhere(path):
    made = {"settings", "commands", "changelog", "contributing", "troubleshooting", "security", "library/index", "stages/index", "api/index", "results/index"}
    for link in re.findall(r"\]\((?!https?:|#)([^)#]+)", path.read_text()):
        stem = link.removesuffix(".md")
        assert stem in made or (ROOT/f"docs/{stem}.md").is_file() or (ROOT/f"nbs/{stem.removeprefix('library/')}.ipynb").is_file(), f"{path.name}: {link}"


def fields_in(path, *classes):
    "Annotated names of classes, read without importing them"
    nodes = [n for n in ast.parse(path.read_text(encoding="utf-8")).body if isinstance(n, ast.ClassDef) and n.name in classes]
    assert len(nodes) == len(classes), f"{path.name} has no {classes}"
    return {f.target.id for n in nodes for f in n.body if isinstance(f, ast.AnnAssign)}


def test_what_is_called_trls_is_trls():
    "The left column of the page for users of TRL, against the TRL that is installed"
    trl, transformers = (Path(importlib.util.find_spec(o).origin).parent for o in ("trl", "transformers"))
    config = fields_in(trl/"trainer/grpo_config.py", "GRPOConfig") | fields_in(trl/"trainer/base_config.py", "_BaseConfig") | fields_in(transformers/"training_args.py", "TrainingArguments")
    trainer = next(n for n in ast.parse((trl/"trainer/grpo_trainer.py").read_text(encoding="utf-8")).body if isinstance(n, ast.ClassDef) and n.name == "GRPOTrainer")
    given = {a.arg for f in trainer.body if isinstance(f, ast.FunctionDef) and f.name == "__init__" for a in f.args.args}
    table = (ROOT/"docs/coming-from.md").read_text().split("## TRL")[1]
    rows = re.findall(r"^\| (`.*?) \| (.*?) \|", table, re.M)
    named = [(name, row[1]) for row in rows for name in re.findall(r"`(\w+)`", row[0]) if name != "GRPOConfig"]
    assert len(named) > 25
    for name, ours in named: assert name in config | given, f"TRL's GRPOConfig has no {name} (beside our {ours})"


def test_every_page_is_in_the_contents():
    listed = set(re.findall(r"^([\w/-]+)$", "\n".join(re.findall(r"```\{toctree\}(.*?)```", (ROOT/"docs/index.md").read_text(), re.S)), re.M))
    assert {p.stem for p in PAGES} - {"index"} <= listed


def generator():
    "docs/build.py as a module"
    spec = importlib.util.spec_from_file_location("docs_build", ROOT/"docs/build.py")
    build = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(build)
    return build


def test_every_report_is_a_page_and_its_links_lead_somewhere(tmp_path):
    build = generator()
    build.SRC = tmp_path
    build.results()
    reports = {p.parent.name for p in (ROOT/"reports").glob("*/README.md")}
    listed = re.findall(r"^([\w-]+)/README$", (tmp_path/"results/index.md").read_text(), re.M)
    assert sorted(listed) == sorted(reports) and listed[0] == "evidence-headline"
    for page in [*tmp_path.rglob("README.md"), tmp_path/"results/LOG.md"]:
        for link in re.findall(r"\]\((?!https?:|#)([^)]*)\)", page.read_text()): assert (page.parent/link).is_file(), f"{page.parent.name}: {link}"
    front = (tmp_path/"generated/headline.md").read_text()
    assert front.split("\n")[0] in (ROOT/"reports/evidence-headline/README.md").read_text() and (tmp_path/re.search(r"!\[.*?\]\((.*?)\)", front)[1]).is_file()


def test_the_reference_reads_docments():
    "The generator on a source of three lines: names, types, defaults, meanings, and what comes back"
    build = generator()
    text = 'def f(\n    a:int, # how many\n    b="x|y", # which\n)->list: # of both\n    "Do it"\n'
    page = build.function_page(ast.parse(text).body[0], build.comments(text))
    assert "| `a` | `int` |  | how many |" in page and "| `b` |  | `'x\\|y'` | which |" in page and "| *returns* | `list` |  | of both |" in page
    page = build.module_page(ROOT/"videotg_r1/spans.py", "00_spans")
    assert "### t_iou" in page and "| *returns* |" in page


def test_citation_agrees_with_the_package():
    cite = yaml.safe_load((ROOT/"CITATION.cff").read_text())
    ini = configparser.ConfigParser(delimiters=["="])
    ini.read(ROOT/"settings.ini")
    assert cite["version"] == ini["DEFAULT"]["version"] and cite["license"] == "Apache-2.0" and cite["cff-version"] == "1.2.0"
    assert {"title", "message", "authors", "type"} <= cite.keys()


def test_dockerfile_copies_what_the_wheel_needs_and_runs_as_nobody_special():
    text = (ROOT/"Dockerfile").read_text()
    ini = configparser.ConfigParser(delimiters=["="])
    ini.read(ROOT/"settings.ini")
    for folder in [o for o in ini["DEFAULT"]["shipped"].split("\n") if o] + ["videotg_r1"]: assert f"COPY {folder} {folder}" in text
    assert ":latest" not in text and all(":" in o for o in re.findall(r"^FROM (\S+)", text, re.M)), "images are named with their version"
    assert re.findall(r"^USER (\S+)", text, re.M)[-1] == "1000" and 'ENTRYPOINT ["vtg"]' in text
    if shutil.which("hadolint"): subprocess.run(["hadolint", str(ROOT/"Dockerfile")], check=True)


def test_slurm_example_is_sound_and_passes_the_signal_on(tmp_path):
    script = ROOT/"slurm/run.sbatch"
    subprocess.run(["bash", "-n", str(script)], check=True)
    if shutil.which("shellcheck"): subprocess.run(["shellcheck", str(script)], check=True)
    for name, body in dict(vtg='[ "$1" = run ] || exit 0; trap "echo stopped >> log; exit 143" TERM; echo started >> log; kill -TERM $PPID; for i in 1 2 3 4 5 6 7 8 9; do sleep 1; done',
                           scontrol='echo "$@" >> log').items():
        (tmp_path/name).write_text("#!/bin/bash\n" + body + "\n")
        (tmp_path/name).chmod(0o755)
    env = dict(PATH=f"{tmp_path}:/usr/bin:/bin", SLURM_SUBMIT_DIR=str(tmp_path), SLURM_JOB_ID="7")
    done = subprocess.run(["bash", str(script), "params/smoke.yaml"], cwd=tmp_path, env=env, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert (tmp_path/"log").read_text().split() == ["started", "stopped", "requeue", "7"]


SITE = ROOT/"docs/_build/html"


@pytest.mark.skipif(not (SITE/"index.html").is_file(), reason="the site is not built: make docs")
def test_built_site_in_a_browser():
    "Two pages and the search, opened from files: what they show, and that they ask no network"
    api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed: pip install -e '.[browser]'")
    if not shutil.which("chromium"): pytest.skip("no chromium on this machine")
    with api.sync_playwright() as p:
        browser = p.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox", "--disable-gpu"])
        page, asked, errors = browser.new_context(offline=True).new_page(), [], []
        page.on("request", lambda r: asked.append(r.url) if r.url.startswith("http") else None)
        page.on("pageerror", lambda e: errors.append(str(e)))
        page.goto((SITE/"concepts.html").as_uri())
        assert page.locator("article img").count() >= 7 and page.locator("math").count() >= 5
        assert page.evaluate("[...document.querySelectorAll('article img')].every(i => i.complete && i.naturalWidth > 100)")
        page.locator("article summary").first.click()
        assert page.get_by_text("make_world").first.is_visible()
        page.goto((SITE/"settings.html").as_uri())
        assert page.get_by_text("report_to").first.is_visible()
        page.locator("input[name=q]").first.fill("partially annotated")
        page.keyboard.press("Enter")
        page.wait_for_selector("#search-results li a[href*=reflection]", timeout=30_000) # results come one by one
        browser.close()
    assert not asked and not errors
