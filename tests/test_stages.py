"All stages end to end on the smoke run, and the same after kills at arbitrary moments"
import json
import os
import re
import signal
import subprocess
import sys
import time
from html.parser import HTMLParser
from pathlib import Path

import nbformat
import pytest

from videotg_r1.torture import torture

ROOT = Path(__file__).parents[1]
MAIN = [sys.executable, "-c", "import sys; from videotg_r1.cli import main; sys.exit(main())"]


CANARY = "planted-secret-0123456789"


def start(folder, *more, params="params/smoke.yaml"):
    cmd = [*MAIN, "run", str(params), "--runs", str(folder/"runs"), "--reports", str(folder/"reports"), "--jobs", "2", *more]
    return subprocess.Popen(cmd, cwd=ROOT, env=os.environ | {"SOME_API_TOKEN": CANARY}, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True)


def finish(process, timeout=900):
    out = process.communicate(timeout=timeout)[0]
    return process.returncode, out


def ours(folder):
    "Processes that work for stages of a run in `folder`"
    found = []
    for p in Path("/proc").iterdir():
        if not p.name.isdigit(): continue
        try:
            env, cmd = (p/"environ").read_bytes(), (p/"cmdline").read_bytes()
            state = (p/"stat").read_text().rsplit(")", 1)[1].split()[0]
        except OSError: continue
        mine = b"VTG_STAGE=" in env and f"VTG_TEST={folder}".encode() in env
        if (mine or str(folder/"runs").encode() in cmd) and state != "Z": found.append(int(p.name))
    return found


pytestmark = pytest.mark.xdist_group("stages")                 # one smoke run for all of them


@pytest.fixture(scope="module")
def smoke(tmp_path_factory):
    folder = tmp_path_factory.mktemp("smoke")/"peace"    # `torture` compares with it
    code, out = finish(start(folder))
    assert code == 0, out
    return folder, out


def test_every_stage_finished(smoke):
    folder, out = smoke
    names = {"prepare", "reflect", "estimate", "select", "train-sft", "train-videotg_r1", "evaluate-base", "evaluate-sft",
             "evaluate-videotg_r1", "ablation", "data_efficiency"}
    for name in names:
        run = folder/"runs/smoke"/name
        assert (run/"SUCCESS").is_file() and (run/"metrics.json").is_file()
        record = json.loads((run/"run.json").read_text())
        assert record["attempts"][-1]["status"] == "ok" and record["attempts"][-1]["wall_s"] > 0 and record["versions"]["torch"]
        nb = nbformat.read(next(run.glob("*.ipynb")), 4)
        assert {c.metadata.papermill.status for c in nb.cells if c.cell_type == "code"} == {"completed"}
        for path, (size, _) in json.loads((run/"SUCCESS").read_text())["outputs"].items(): assert (run/path).stat().st_size == size
    kept = {p: (folder/"runs/smoke"/p/"training/final").is_dir() for p in ("ablation/plain", "data_efficiency/three")}
    assert kept == {"ablation/plain": True, "data_efficiency/three": False}, "keep_models"
    learnt = [json.loads(o) for o in (folder/"runs/smoke/train-videotg_r1/training/history.jsonl").read_text().splitlines()]
    assert any(r["reward_std"] > 0 and r["grad_norm"] > 0 for r in learnt), "equal weights after a kill say something only where something is learnt"
    assert sum(line.split()[2] == "ok" for line in out.splitlines() if re.match(r" +\d+ s ", line)) == len(names)


class Tags(HTMLParser):
    def __init__(self):
        super().__init__()
        self.seen = []
    def handle_starttag(self, tag, attrs): self.seen.append((tag, dict(attrs)))


def test_what_a_run_leaves_holds_no_token_and_no_home_folder(smoke):
    "Executed notebooks, records, logs and the report; test_hostile.py plants secrets in a stage that prints them"
    folder, _ = smoke
    files = [p for p in folder.rglob("*") if p.is_file()]
    assert len({p.suffix for p in files} & {".ipynb", ".json", ".html", ".md", ".jsonl"}) == 5
    home = re.compile(re.escape(str(Path.home())) + r"(?![\w-])")
    for p in files:
        assert CANARY.encode() not in p.read_bytes(), p
        if p.suffix in (".ipynb", ".html", ".md", ".log") or p.name in ("run.json", "params.json", "metrics.json"):
            assert len(str(Path.home())) < 2 or not home.search(p.read_text()), p


def test_report_is_complete_and_needs_no_network(smoke):
    report = smoke[0]/"reports/smoke"
    assert {"README.md", "metrics.json", "cards.json", "params.json", "index.html", "samples.html", "figures", "notebooks"} == {p.name for p in report.iterdir()}
    page = (report/"index.html").read_text()
    tags = Tags()
    tags.feed(page)
    assert not {t for t, _ in tags.seen} & {"script", "iframe", "link", "object", "embed", "base"}
    for tag, attrs in tags.seen:
        assert not [a for a in attrs if a.startswith("on")], tag
        for a in ("src", "href"): assert attrs.get(a, "data:image/png").startswith("data:image/png") or attrs[a] == "samples.html", attrs
    csp = next(a["content"] for t, a in tags.seen if a.get("http-equiv") == "Content-Security-Policy")
    assert csp.startswith("default-src 'none'") and "script" not in csp
    facts = json.loads((report/"metrics.json").read_text())
    assert [r["name"] for r in facts["results"]][:2] == ["query-blind", "zero-shot"]
    assert [r["name"] for r in facts["questions"]] == ["query-blind", "zero-shot", "SFT", "VideoTG-R1"]
    assert all(len(r["intervals"]["Acc@GQA"]) == 2 and r["n"] == 3 for r in facts["questions"])
    found = facts["failures"]
    assert found["model"] == "VideoTG-R1" and all(sum(o["n"] for o in e.values()) == 6 for e in found["errors"].values())
    assert {"errors.png", "recall_by.png", "worst.png", "median.png"} <= {p.name for p in (report/"figures").iterdir()}
    assert facts["claim"] in (report/"README.md").read_text()
    assert str(ROOT) not in "".join(p.read_text() for p in (report/"notebooks").iterdir())


def test_every_sample_of_the_run_is_on_one_page(smoke, tmp_path):
    r = subprocess.run([*MAIN, "browse", str(smoke[0]/"runs/smoke"), "--out", str(tmp_path/"all.html")], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert r.returncode == 0 and r.stdout.strip() == str(tmp_path/"all.html"), r.stderr
    for page in (tmp_path/"all.html", smoke[0]/"reports/smoke/samples.html"):
        text = page.read_text()
        rows = json.loads(re.search(r'<script type="application/json" id="data">(.*?)</script>', text, re.S)[1])["rows"]
        groups = {g: [r for r in rows if r["group"] == g] for g in ("held-out", "questions", "training")}
        assert {g: len(v) for g, v in groups.items()} == {"held-out": 6, "questions": 3, "training": 6}
        assert all([a["name"] for a in r["answers"]] == ["zero-shot", "SFT", "VideoTG-R1"] for r in groups["held-out"] + groups["questions"])
        assert all(r["verdict"] and r["ious"] and r["reason"] for r in groups["training"])
        assert str(ROOT) not in text and str(smoke[0]) not in text, "no path of this machine"


def test_a_second_call_does_nothing(smoke):
    folder = smoke[0]
    before = {p: p.stat().st_mtime_ns for p in folder.rglob("*") if p.is_file() and not p.name.endswith(".lock")}
    code, out = finish(start(folder))
    assert code == 0 and " ok " not in out, out
    assert {p: p.stat().st_mtime_ns for p in folder.rglob("*") if p.is_file() and not p.name.endswith(".lock")} == before


def test_changed_parameters_are_refused_by_name(smoke, tmp_path):
    folder = smoke[0]
    (tmp_path/"p.yaml").write_text((ROOT/"params/smoke.yaml").read_text().replace("sft: {steps: 2,", "sft: {steps: 3,"))
    cmd = [*MAIN, "run", str(tmp_path/"p.yaml"), "--runs", str(folder/"runs"), "--reports", str(tmp_path/"reports")]
    r = subprocess.run(cmd, cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert r.returncode == 1 and "params.sft.steps: 2 -> 3" in r.stderr, r.stderr
    assert "--force" in r.stderr


def test_struck_at_any_moment_it_ends_the_same(smoke, monkeypatch):
    monkeypatch.setenv("VTG_TEST", str(smoke[0].parent))
    seed, said = int(os.environ.get("VTG_SEED", 0)), []
    found = torture(ROOT/"params/smoke.yaml", 3, seed, smoke[0].parent, "prepare,estimate,train-sft", said.append)
    assert found == [], "\n".join(said + found)
    assert not ours(smoke[0].parent), "processes of the run are left"
    states = [a["status"] for p in (smoke[0].parent/"struck/runs/smoke").glob("*/run.json") for a in json.loads(p.read_text())["attempts"]]
    assert "running" not in states and states.count("ok") == 3


def test_told_to_stop_it_leaves_and_goes_on(smoke, tmp_path, monkeypatch):
    "SIGTERM to `vtg run` while a training stage works"
    monkeypatch.setenv("VTG_TEST", str(tmp_path))
    text = (ROOT/"params/smoke.yaml").read_text().replace("sft: {steps: 2, batch_size: 2, save_steps: 1}", "sft: {steps: 100000, batch_size: 2, save_steps: 50000}")
    assert "100000" in text
    (tmp_path/"p.yaml").write_text(text)
    process = start(tmp_path, "--only", "prepare,train-sft", params=tmp_path/"p.yaml")
    history, end = tmp_path/"runs/smoke/train-sft/training/history.jsonl", time.monotonic() + 300
    while not history.is_file() and process.poll() is None and time.monotonic() < end: time.sleep(.05)
    os.kill(process.pid, signal.SIGTERM)
    code, out = finish(process)
    assert code == 130 and "the same command goes on" in out, out
    assert not ours(tmp_path), "processes of the run are left"
    run = tmp_path/"runs/smoke/train-sft"
    assert json.loads((run/"run.json").read_text())["attempts"][-1]["status"] == "interrupted"
    assert json.loads((run/"status.json").read_text())["state"] == "interrupted"
    assert list((run/"training").glob("checkpoint-*/complete.json")), "it left without a checkpoint"


def test_the_params_file_says_how_long_silence_may_last(monkeypatch):
    "Given there, unless the flag says otherwise"
    import videotg_r1.stages as stages
    seen, config = [], dict(run="quiet", prepare=dict(source="synthetic"))
    monkeypatch.setattr(stages, "run_jobs", lambda plan, config, root, jobs, force, say, stall_s: seen.append(stall_s))
    for given, flag in (({}, None), (dict(stall_s=7200), None), (dict(stall_s=7200), 60.)): stages.run_all(config | given, stall_s=flag)
    assert seen == [None, 7200, 60.], "None: what run_stage says"
