"The dress rehearsal in miniature: real tokenizer, real clips, random weights loaded from a folder, every stage, killed once"
import json
import os
import subprocess
import sys
import threading
import time

import psutil
import pytest
import rehearsal
import scaling

from videotg_r1.torture import children

there = rehearsal.SHARED/"tokenizer/qwen2_5/tokenizer.json"


@pytest.mark.skipif(not there.is_file(), reason=f"no shared data: {there} is not there (VTG_SHARED_DATA says where)")
def test_its_model_and_annotations_are_what_a_users_would_be(tmp_path):
    from videotg_r1.policy import load_policy
    from videotg_r1.records import read_samples
    n = rehearsal.write_model(tmp_path/"model")
    policy = load_policy(str(tmp_path/"model"), device="cpu")
    assert n == sum(p.numel() for p in policy.model.parameters()) and policy.video_token_id == 151656 and len(policy.tokenizer) >= 151665
    counts = rehearsal.write_annotations(tmp_path, repeat=2)
    train, heldout = read_samples(tmp_path/"train.jsonl"), read_samples(tmp_path/"heldout.jsonl")
    assert (len(train), len(heldout)) == (counts["train"], counts["heldout"]) and not {s.video for s in train} & {s.video for s in heldout}
    path = rehearsal.write_params(tmp_path, steps=7, given=["shared.grpo={G: 2}", "shared.device=cuda"])
    assert "G: 2" in path.read_text() and "steps: 7" in path.read_text() and "device: cuda" in path.read_text()


@pytest.mark.skipif(not there.is_file() or not os.environ.get("VTG_REHEARSAL"), reason="takes minutes: VTG_REHEARSAL=1, with the shared data")
def test_every_stage_from_prepare_to_report_killed_once(tmp_path):
    rehearsal.write_model(tmp_path/"model")
    rehearsal.write_annotations(tmp_path)
    rehearsal.write_params(tmp_path)
    report, resumed = rehearsal.rehearse(tmp_path)
    assert (report/"index.html").is_file() and resumed == 2
    metrics = json.loads((report/"metrics.json").read_text())
    assert metrics["claim"]


@pytest.mark.parametrize("script, lacks", [("rehearsal", "no tokenizer/qwen2_5 and no annotated_clips.jsonl"), ("scaling", "no tokenizer/qwen2_5")])
def test_without_shared_data_it_is_one_line(script, lacks, tmp_path):
    r = subprocess.run([sys.executable, rehearsal.ROOT/f"tests/{script}.py", tmp_path/"out"], capture_output=True, text=True, timeout=120,
                       env=os.environ | dict(VTG_SHARED_DATA=str(tmp_path/"none")))
    assert r.returncode and f"{tmp_path/'none'} has {lacks}: set VTG_SHARED_DATA" in r.stderr and len(r.stderr.splitlines()) == 1, r.stderr


def test_what_is_measured_on_several_gpus_is_held_against_one(tmp_path):
    from videotg_r1.records import read_samples
    samples = read_samples(scaling.write_work(tmp_path/"clips", 7, 8, 32))
    assert len(samples) == 7 and len({s.video for s in samples}) == 4 and len(scaling.lines(tmp_path/"clips/samples.jsonl")*"x") == 7
    a = type("args", (), dict(out=tmp_path))()
    rows = [dict(what="grpo", gpus=1, shape="small", failed="no memory"), dict(what="grpo", gpus=1, shape="small", prompts_per_s=2.), dict(what="grpo", gpus=1, shape="large", prompts_per_s=9.)]
    (tmp_path/"rows.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    assert scaling.alone(a, dict(what="grpo", shape="small")) == 2. and scaling.alone(a, dict(what="estimate", shape="small")) is None
    trace = rehearsal.Trace("cpu")
    trace.rows = [(t, [10*t], [float(t)]) for t in range(5)]
    trace.grown = [(.5, "reflect/a.jsonl", 1), (1., "reflect/a.jsonl", 5), (2., "reflect/a.jsonl", 9), (3., "reflect-2/a.jsonl", 4)]
    assert trace.over(1, 3) == dict(util=[20], peak_gib=[3.]) and trace.work("reflect", 0, 9) == (1., 2.) and trace.work("reflect", 0, 1) is None


def test_warm_processes_wait_for_what_is_measured_beside_them(tmp_path):
    p = subprocess.Popen([sys.executable, "-c", "import subprocess, sys; subprocess.run([sys.executable, '-c', 'import time; time.sleep(120)'], start_new_session=True)"])
    a, seen = type("args", (), dict(out=tmp_path, after=tmp_path/"go", until=1e9))(), []
    end, family = time.monotonic() + 60, lambda: [psutil.Process(o) for o in (p.pid, *children(p.pid))]
    while len(family()) < 2 and time.monotonic() < end: time.sleep(.05)
    def look():
        states = lambda: {o.status() for o in family()}
        while states() != {psutil.STATUS_STOPPED} and time.monotonic() < end: time.sleep(.05)
        seen.append(states()); a.after.touch()
    watch = threading.Thread(target=look); watch.start()
    try:
        scaling.hold(a, p); watch.join()
        assert seen == [{psutil.STATUS_STOPPED}] and [*tmp_path.glob("warm-*")] and psutil.STATUS_STOPPED not in {o.status() for o in family()}
        ours = family()
    finally: scaling.stop(p)
    left = psutil.wait_procs(ours, timeout=5)[1]
    assert len(ours) == 2 and all(o.status() == psutil.STATUS_ZOMBIE for o in left)     # nobody may have asked for a grandchild's end
