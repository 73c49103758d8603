"The committed reports of evidence say what their cells say, and the program of cells runs, stops and goes on."
import json
import re
import sys
from pathlib import Path

import pytest

from videotg_r1.config import from_params, load_params
from videotg_r1.experiments import Lab, program

ROOT = Path(__file__).parent.parent
REPORTS = ROOT/"reports"


def test_every_number_of_the_evidence_is_computed_from_its_cells():
    from videotg_r1.evidence import check_reports
    if not list(REPORTS.glob("evidence-*")): pytest.skip("no report of evidence is committed")
    for name,wrong in check_reports(REPORTS).items(): assert not wrong, f"reports/{name}/README.md: {wrong}"


def test_the_first_screen_says_what_the_reports_say():
    said = (ROOT/"README.md").read_text().split("**Does a tenth of the data do?**")[1].split("![")[0]
    found = re.findall(r"-?\+?\d\.\d{3} \[[^]]+\]", " ".join(said.split()))
    texts = " ".join(p.read_text() for p in REPORTS.glob("evidence-*/README.md"))
    assert len(found) > 5 and not [f for f in found if f not in texts]


@pytest.mark.parametrize("folder", sorted(REPORTS.glob("evidence-*")), ids=lambda p: p.name)
def test_a_report_is_small_and_whole(folder):
    assert {p.name for p in folder.iterdir()} == {"README.md", "cells.json.xz", "figure.png"}
    assert sum(p.stat().st_size for p in folder.iterdir()) <= 500_000
    text = (folder/"README.md").read_text()
    assert text.startswith("# ") and text.split("\n")[2].startswith("**") and "What would change our mind" in text
    assert "query-blind" in text and "zero-shot" in text


@pytest.mark.parametrize("path", sorted((ROOT/"params/evidence").glob("*.yaml")), ids=lambda p: p.name)
def test_params_name_cells_whose_needs_are_met(path):
    params = load_params(path)
    cells = program(from_params(Lab, params["lab"]), params["program"])
    names = [c.name for c in cells]
    assert len(set(names)) == len(names)
    for c in cells: assert not set(c.needs) - set(names), f"{c.name} needs {sorted(set(c.needs) - set(names))[:3]}"


def test_a_program_goes_on_where_it_was(tmp_path):
    "Two processes; a cell that is there is not done again, a failed one is tried again, an agent's pass is shared."
    from videotg_r1.experiments import run_program
    lab = load_params(ROOT/"params/evidence/smoke.yaml")["lab"] | dict(device="cpu", pool=16, lrs={}, chunks=1)
    lab["worlds"] = {k: v | dict(train_videos=min(v["train_videos"], 24), heldout_videos=min(v["heldout_videos"], 4), durations=[16], duration_weights=[1.])
                     for k,v in lab["worlds"].items() if k in ("pool", "test")}
    lab["grpo"] = lab["grpo"] | dict(steps=1, prompts_per_step=2, G=2, lr=1e-4)
    arms = [dict(experiment="masking", seeds=[0], budget=4, masks=["linear"], controls=["plain"])]
    with pytest.raises(ValueError, match="no part of the program makes choice"): run_program(dict(lab=lab | dict(lrs=dict(grpo=[1e-4])), program=arms), tmp_path/"lacking")
    first = run_program(dict(lab=lab, program=arms), tmp_path, workers=1, keep=str(tmp_path/"kept.tar.gz"))
    assert (first["done"], first["failed"], first["left"]) == (3, 0, 0)
    files = {p: p.stat().st_mtime_ns for p in (tmp_path/"cells").iterdir()}
    r = json.loads((tmp_path/"cells/mask-linear-4-s1-0.json").read_text())
    assert r["n"] == 4 and r["partial"] == 0 and r["tests"]["test"]["n"] == 8
    more = [*arms, dict(experiment="masking", seeds=[1], budget=4, masks=[], controls=["plain"]), dict(experiment="headline", seeds=[0], budgets=[99])]
    again = run_program(dict(lab=lab, program=more), tmp_path, workers=1, deadline_s=0)
    assert again["done"] == 3 and again["left"] == len(program(from_params(Lab, lab), more)) - 3, "after the deadline no cell is started"
    assert all(p.stat().st_mtime_ns == t for p,t in files.items())
    after_another = tmp_path/"cells/mask-linear-4-s1-0.json"
    after_another.unlink()
    assert run_program(dict(lab=lab, program=arms), tmp_path, workers=1)["done"] == 3
    alone = json.loads(after_another.read_text())
    assert alone["history"] == r["history"] and alone["tests"]["test"]["ious"] == r["tests"]["test"]["ious"], "what a process did before changes nothing"
    known = {p.stem: json.loads(p.read_text()) for p in (tmp_path/"cells").iterdir()}
    once_more = run_program(dict(lab=lab, program=arms), tmp_path/"again", workers=1, only=["mask-linear-4-s1-0"], known=known)
    assert (once_more["done"], once_more["left"]) == (1, 0) and not (tmp_path/"again/cells/mask-none-4-s1-0.json").exists()
    assert json.loads((tmp_path/"again/cells/mask-linear-4-s1-0.json").read_text())["tests"]["test"]["ious"] == r["tests"]["test"]["ious"], "one cell again, what it builds on taken from a report"


def test_a_lower_frame_rate_shows_the_same_videos_at_their_true_times(tmp_path, monkeypatch):
    "`sparse` is `test` with every second frame left out: same queries and spans, same pictures, and a model that is told the time. No decoder is needed."
    import torch

    from videotg_r1.experiments import Worlds, render_worlds
    from videotg_r1.policy import encode, frame_spec, load_policy
    from videotg_r1.video import read_clip
    for name in ("av", "decord"): monkeypatch.setitem(sys.modules, name, None)
    fields = load_params(ROOT/"params/evidence/synthetic.yaml")["lab"]
    assert fields["worlds"]["sparse"] == fields["worlds"]["test"] and fields["frames"]["sparse"] == {"fps": .5}
    fields["worlds"] = {k: fields["worlds"][k] | dict(heldout_videos=4) for k in ("test", "sparse")}
    lab = from_params(Lab, fields | dict(device="cpu"))
    render_worlds(lab, tmp_path, workers=1)
    dense, sparse = (Worlds(lab, tmp_path).test(w) for w in ("test", "sparse"))
    policy = load_policy("tiny", device="cpu")
    for a,b in zip(dense, sparse, strict=True):
        assert (a.qid, a.query, a.spans, a.duration_s) == (b.qid, b.query, b.spans, b.duration_s)
        one, half = (read_clip(s.video, frame_spec(policy, **lab.frames.get(w, {}))) for w,s in (("test", a), ("sparse", b)))
        assert half.fps == .5 and half.duration_s == one.duration_s == a.duration_s
        assert half.frame_ts.tolist() == [2.*i for i in range(int(a.duration_s)//2)] == one.frame_ts[::2].tolist()
        assert (half.frames == one.frames[::2]).all()
        x, y = (encode(policy, o, "When?") for o in (one, half))
        assert (x.second_per_grid_s, y.second_per_grid_s) == (2., 4.) and y.n_video_tokens*2 == x.n_video_tokens
        times = [torch.unique(e.position_ids[0][e.input_ids == policy.video_token_id]) for e in (x, y)]
        assert torch.equal(times[1], times[0][::2]), "a pair of frames has the place in time that it has among all frames"
        words = [e.input_ids[e.input_ids != policy.video_token_id].tolist() for e in (x, y)]
        assert words[0] == words[1]
