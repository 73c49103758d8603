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

ROOT = Path(__file__).parents[1]
MAIN = [sys.executable, "-c", "import sys; from videotg_r1.cli import main; sys.exit(main())"]
TIMES = ("seconds", "_s", "_time", "cpu_seconds", "started")


def start(folder, *more):
    cmd = [*MAIN, "run", "params/smoke.yaml", "--runs", str(folder/"runs"), "--reports", str(folder/"reports"), "--jobs", "2", *more]
    return subprocess.Popen(cmd, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True)


def finish(process, timeout=400):
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


@pytest.fixture(scope="module")
def smoke(tmp_path_factory):
    folder = tmp_path_factory.mktemp("smoke")
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
    assert sum(line.split()[2] == "ok" for line in out.splitlines() if re.match(r" +\d+ s ", line)) == len(names)


class Tags(HTMLParser):
    def __init__(self):
        super().__init__()
        self.seen = []
    def handle_starttag(self, tag, attrs): self.seen.append((tag, dict(attrs)))


def test_report_is_complete_and_needs_no_network(smoke):
    report = smoke[0]/"reports/smoke"
    assert {"README.md", "metrics.json", "params.json", "index.html", "figures", "notebooks"} == {p.name for p in report.iterdir()}
    page = (report/"index.html").read_text()
    tags = Tags()
    tags.feed(page)
    assert not {t for t, _ in tags.seen} & {"script", "iframe", "link", "object", "embed", "base"}
    for tag, attrs in tags.seen:
        assert not [a for a in attrs if a.startswith("on")], tag
        for a in ("src", "href"): assert attrs.get(a, "data:image/png").startswith("data:image/png"), attrs
    csp = next(a["content"] for t, a in tags.seen if a.get("http-equiv") == "Content-Security-Policy")
    assert csp.startswith("default-src 'none'") and "script" not in csp
    facts = json.loads((report/"metrics.json").read_text())
    assert [r["name"] for r in facts["results"]][:2] == ["query-blind", "zero-shot"]
    assert facts["claim"] in (report/"README.md").read_text()
    assert str(ROOT) not in "".join(p.read_text() for p in (report/"notebooks").iterdir())


def test_a_second_call_does_nothing(smoke):
    folder = smoke[0]
    before = {p: p.stat().st_mtime_ns for p in folder.rglob("*") if p.is_file() and not p.name.endswith(".lock")}
    started = time.time()
    code, out = finish(start(folder))
    assert code == 0 and " ok " not in out, out
    assert time.time() - started < 20
    assert {p: p.stat().st_mtime_ns for p in folder.rglob("*") if p.is_file() and not p.name.endswith(".lock")} == before


def test_changed_parameters_are_refused_by_name(smoke, tmp_path):
    folder = smoke[0]
    (tmp_path/"p.yaml").write_text((ROOT/"params/smoke.yaml").read_text().replace("sft: {steps: 2,", "sft: {steps: 3,"))
    cmd = [*MAIN, "run", str(tmp_path/"p.yaml"), "--runs", str(folder/"runs"), "--reports", str(tmp_path/"reports")]
    r = subprocess.run(cmd, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert r.returncode == 1 and "params.sft.steps: 2 -> 3" in r.stderr, r.stderr
    assert "--force" in r.stderr


def result(folder, name):
    "What a stage found, without how long it took"
    run = folder/"runs/smoke"/name
    drop = lambda o: {k: drop(v) for k, v in o.items() if not k.endswith(TIMES)} if isinstance(o, dict) else o
    rows = {}
    for p in [*run.glob("*.jsonl"), *run.glob("training/history.jsonl")]:
        for row in map(json.loads, p.read_text().splitlines()):
            if "fingerprint" not in row: rows[p.name, row.get("qid", row.get("step"))] = {k: v for k, v in drop(row).items() if k not in ("compute", "_crc", "video")}
    return drop(json.loads((run/"metrics.json").read_text())), rows


def rows_on_disk(folder):
    "Finished rows of all ledgers of a run"
    return [line for p in sorted((folder/"runs").rglob("*.jsonl")) if p.name in ("difficulties.jsonl", "predictions.jsonl")
            for line in p.read_text().splitlines(True) if line.endswith("\n")]


def test_killed_at_any_moment_it_ends_the_same(smoke, tmp_path, monkeypatch):
    monkeypatch.setenv("VTG_TEST", str(tmp_path))
    jobs = ("prepare", "estimate", "train-sft", "evaluate-sft")
    kept = []
    for wait_s, sig in ((4, signal.SIGKILL), (9, signal.SIGTERM), (11, signal.SIGKILL)):
        process = start(tmp_path, "--only", ",".join(jobs))
        time.sleep(wait_s)
        if process.poll() is not None: break
        os.kill(process.pid, sig)
        finish(process)
        end = time.time() + 10
        while ours(tmp_path) and time.time() < end: time.sleep(.1)
        assert not ours(tmp_path), "processes of the run are left"
        assert all(line in (now := rows_on_disk(tmp_path)) for line in kept), "a finished row was lost"
        kept = now if kept else rows_on_disk(tmp_path)
    code, out = finish(start(tmp_path, "--only", ",".join(jobs)))
    assert code == 0, out
    assert all(line in rows_on_disk(tmp_path) for line in kept), "a finished row was lost or redone"
    for name in jobs: assert result(tmp_path, name) == result(smoke[0], name), name
    states = [a["status"] for name in jobs for a in json.loads((tmp_path/"runs/smoke"/name/"run.json").read_text())["attempts"]]
    assert "killed" in states and "running" not in states
