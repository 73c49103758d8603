"Scores that agree with everybody's: golden pairs, public evaluators' numbers, answers that are broken in every way"
import json
import math
import os
import random
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from videotg_r1.answers import Answer, Truth, read_answers, read_truths
from videotg_r1.comparison import compare
from videotg_r1.scoring import PRESETS, TASKS, policy, score, score_files

ROOT = Path(__file__).parents[1]
OWN = ROOT/"tests/data/scoring"
SHARED = Path(os.environ.get("VTG_SHARED_DATA", ROOT.parent/"shared"/"data"))
real = pytest.mark.skipif(not SHARED.is_dir(), reason=f"no real data: {SHARED} is absent (set VTG_SHARED_DATA)")


def flat(d, head=""):
    return {k2: v2 for k, v in d.items() for k2, v2 in (flat(v, f"{head}{k}/").items() if isinstance(v, dict) else [(head + k, v)])}


def vtg(*argv):
    code = "import sys; from videotg_r1.cli import main; sys.exit(main())"
    r = subprocess.run([sys.executable, "-c", code, *map(str, argv)], capture_output=True, text=True, cwd=ROOT, timeout=120)
    return r.returncode, r.stdout, r.stderr


# tests/data/scoring is made up here; expected.json is what the public evaluators themselves print for it
EXPECTED = json.loads((OWN/"expected.json").read_text())


def test_own_retrieval_is_scored_as_the_public_evaluator_does():
    found = score_files("qvhighlights", OWN/"retrieval_truth.jsonl", OWN/"retrieval_answers.jsonl", policy("qvhighlights_official"), 0)
    ours, theirs = flat(found["public"]), flat(EXPECTED["qvhighlights_official"])
    assert len(theirs) > 80 and {k: ours.get(k) for k in theirs} == theirs


@pytest.mark.parametrize("name", ("nextgqa_official", "rextime_official", "time_r1", "timelens", "videomind"))
def test_own_answers_are_scored_as_each_public_evaluator_does(name):
    rules = dict(many_truths="first") if name in ("time_r1", "timelens") else {} # both know one true span a query
    rules["digits"] = 1 if name == "nextgqa_official" else 2
    task = name.split("_")[0] if name.endswith("official") else "vtg"
    found = score_files(task, OWN/"gqa_truth.jsonl", OWN/"gqa_answers.jsonl", policy(name, **rules), 0)["percent"]
    assert {k: found[k] for k in EXPECTED[name]} == EXPECTED[name]


def test_presets_differ_where_they_say_so():
    assert EXPECTED["time_r1"]["R1@0.5"] < EXPECTED["timelens"]["R1@0.5"] # `>` and `>=`
    assert EXPECTED["rextime_official"]["R1@0.5"] != EXPECTED["videomind"]["R1@0.5"] # float64 and float32


@real
@pytest.mark.parametrize("name", ("default", "qvhighlights_official"))
@pytest.mark.parametrize("system", ("moment_detr_sample", "qddetr_video_best", "vtg_gpt_val"))
def test_qvhighlights_systems_to_all_digits(system, name):
    folder = SHARED/"predictions/qvhighlights"/system
    found = score_files("qvhighlights", SHARED/"annotations/qvhighlights/highlight_val_release.jsonl", folder/"preds.jsonl", policy(name), 0)
    theirs = {k: v for k, v in flat(json.loads((folder/"metrics.json").read_text())).items() if not k.startswith("brief/")}
    ours = flat(found["public"])
    assert len(theirs) >= 90 and {k: ours.get(k) for k in theirs} == theirs


@real
def test_nextqa_answers():
    files = SHARED/"annotations/nextgqa/gsub_val.json", SHARED/"predictions/nextqa/HGA-bert-ft-h256-val.json"
    found = score_files("nextgqa", *files, policy("nextgqa_official"))
    assert (found["n"], found["percent"]) == (3358, {"Acc@QA": 47.35}) and found["counts"]["extra"] == 1638


@real
def test_timechat_charades_answers():
    files = SHARED/"predictions/charades/gt.json", SHARED/"predictions/charades/pred.json"
    with pytest.raises(ValueError, match="3220 of 3720 queries have no answer"): score_files("vtg", *files, policy("timelens"))
    for name in PRESETS:
        found = score_files("vtg", *files, policy(name, missing="leave_out"), 0)
        assert (found["n"], found["misses"]) == (500, 280)
        assert [found["percent"][f"R1@{m}"] for m in (.3, .5, .7)] == [9., 3.4, 1.4]
    assert score_files("vtg", *files, policy(), 0)["R1@0.3"] == 45/3720 # the default divides by all


WHOLE = {"charades_sta/charades_sta_test.txt": ("vtg", 3720, [34.30, .43, 0., 26.99]), "activitynet_captions/val_2.json": ("vtg", 17031, [48.02, 21.21, 12.41, 34.57]),
         "nextgqa/gsub_test.json": ("nextgqa", 5553, [20.57, 8.68, 21.14]), "rextime/rextime_val.jsonl": ("rextime", 921, [43.97, 32.14, 20.30, 37.25]),
         "qvhighlights/highlight_val_release.jsonl": ("qvhighlights", 1550, [20.06, 9.03, 6.06, 23.89])}


@real
@pytest.mark.parametrize("file", WHOLE)
def test_whole_video_answers(file):
    task, n, expected = WHOLE[file]
    truths, _ = read_truths(SHARED/"annotations"/file)
    found = score(task, truths, [Answer(t.qid, ((0., t.duration_s),)) for t in truths], policy(), 0)
    names = ("IoU@0.3", "IoU@0.5", "mIoU") if task == "nextgqa" else ("R1@0.3", "R1@0.5", "R1@0.7", "mIoU")
    assert found["n"] == n and [found["percent"][k] for k in names] == expected


@real
def test_with_a_tolerance_the_decimals_decide_whatever_the_arithmetic():
    truths, _ = read_truths(SHARED/"annotations/activitynet_captions/val_2.json")
    whole = [Answer(t.qid, ((0., t.duration_s),)) for t in truths]
    bare = {o["union"] + o["precision"]: round(17031*score("vtg", truths, whole, policy(**o), 0)["R1@0.5"]) for o in (
        dict(union="hull", precision="float64"), dict(union="sum", precision="float64"), dict(union="sum", precision="float32"))}
    assert bare == dict(hullfloat64=3612, sumfloat64=3607, sumfloat32=3605)
    assert {round(17031*score("vtg", truths, whole, policy(union=u, tolerance=1e-9), 0)["R1@0.5"]) for u in ("hull", "sum")} == {3613}


# a query of a video of its own, answered well by all but one, which is answered badly in some way
N = 6
TRUTHS = [Truth(str(i), f"v{i}", ((2., 6.), (8., 9.)), 10., 1, (1, 2), ((4, 4, 4), (4, 4, 4))) for i in range(N)]
GOOD = [Answer(str(i), ((2., 6.), (8., 9.)), (.9, .8), 1, (0., 9., 8., 1., 1.), True) for i in range(N)]
BAD = dict(reversed=((6., 2.),), zero=((7., 7.),), nan=((math.nan, 6.),), infinite=((-math.inf, math.inf),), null=((math.nan, math.nan),), empty=())


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("name", PRESETS)
@pytest.mark.parametrize("kind", BAD)
def test_a_broken_answer_is_never_better_than_a_wrong_one(task, name, kind):
    grade = lambda spans: score(task, TRUTHS, [*GOOD[1:], replace(GOOD[0], spans=spans, scores=tuple(1. for _ in spans), saliency=None)], policy(name), 0)
    wrong, broken = grade(((6.5, 7.),)), grade(BAD[kind])
    for k in wrong["percent"]: assert broken[k] <= wrong[k], (k, broken[k], wrong[k])
    assert broken["misses"] == 1 - (name == "nextgqa_official" and kind == "zero") and broken["remarks"]


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("name", PRESETS)
def test_silence_never_helps(task, name):
    full = score(task, TRUTHS, [*GOOD[1:], replace(GOOD[0], spans=((6.5, 7.),))], policy(name), 0)
    if PRESETS[name].missing == "refuse":
        with pytest.raises(ValueError, match="1 of 6 queries have no answer"): score(task, TRUTHS, GOOD[1:], policy(name), 0)
    else:
        silent = score(task, TRUTHS, GOOD[1:], policy(name), 0)
        assert all(silent[k] <= full[k] for k in full["percent"])
    assert "are left out" in " ".join(score(task, TRUTHS, GOOD[1:], policy(name, missing="leave_out"), 0)["remarks"])


def test_many_windows_do_not_help():
    spray = tuple((a/2, b/2) for a in range(20) for b in range(a + 1, 21))
    first = score("qvhighlights", TRUTHS, [replace(a, spans=spray[:1], scores=(1.,)) for a in GOOD], policy(), 0)
    many = score("qvhighlights", TRUTHS, [replace(a, spans=spray, scores=tuple(1. for _ in spray)) for a in GOOD], policy(), 0)
    assert many["R1@0.5"] == first["R1@0.5"] and many["mAP"] <= score("qvhighlights", TRUTHS, GOOD, policy(), 0)["mAP"]
    twice = [replace(a, spans=((2., 6.),)*2 + ((8., 9.),), scores=(.9, .85, .8)) for a in GOOD] # one true span is found once
    assert twice[0].spans[0] == twice[0].spans[1] and score("qvhighlights", TRUTHS, twice, policy(), 0)["mAP"] == pytest.approx((1 + 2/3)/2)


def test_order_of_rows_and_extra_rows_change_nothing():
    extra = [*reversed(GOOD), Answer("nobody", ((0., 1.),))]
    for task in TASKS:
        a, b = score(task, TRUTHS, GOOD, policy(), 50), score(task, TRUTHS, extra, policy(), 50)
        assert a["percent"] == b["percent"] and a["intervals"] == b["intervals"] and b["counts"]["extra"] == 1
    with pytest.raises(ValueError, match="does not know"): score("qvhighlights", TRUTHS, extra, policy("qvhighlights_official"), 0)


VALUES = (None, True, False, 0, -1, 7, 10**400, .5, math.nan, math.inf, -math.inf, "", "1 to 2", "B", [], {}, [[]], [1], [1, 2], [2, 1], [1, 2, 3], [[1, 2]],
          [[1, 2], [3]], [[1, 2, .5], [3, 4, .1]], [["a", 2]], [[None, None]], [[1, 2, None]], [[1, [2]]], [[1, 2]]*50, {"start": 1}, "[1, 2]", [math.nan]*75, [1.]*3)
NAMES = ("spans", "pred_relevant_windows", "pred", "timestamps", "choice", "ans", "prediction", "pred_saliency_scores", "vid", "raw", "miss_reason")


def test_hostile_answer_files_are_scored_or_refused(tmp_path):
    rng, refused = random.Random(0), 0
    (tmp_path/"truth.jsonl").write_text("".join(json.dumps(dict(qid=t.qid, vid=t.vid, spans=t.spans, duration_s=10, ans="B", relevant_clip_ids=t.clip_ids,
                                                                saliency_scores=t.saliency)) + "\n" for t in TRUTHS))
    for i in range(600):
        rows = [{k: rng.choice(VALUES) for k in rng.sample(NAMES, rng.randrange(4))} for _ in range(rng.randrange(4))]
        for j, r in enumerate(rows): r["qid"] = rng.choice((j, str(j), "0", None, 1.5, [], "x"*10**4)) if rng.random() < .2 else j
        name = "a.json" if i % 2 else "a.jsonl"
        (tmp_path/name).write_text(json.dumps(rng.choice((rows, {str(r["qid"]): r for r in rows}))) if i % 2 else "".join(json.dumps(r) + "\n" for r in rows))
        task = rng.choice(list(TASKS))
        try: found = score_files(task, tmp_path/"truth.jsonl", tmp_path/name, policy(), 0)
        except ValueError as e: refused += 1; assert "score" in str(e) or name in str(e), e
        else: assert all(0 <= found[k] <= 1 for k in found["percent"]) and found["n"] == N
    assert 100 < refused < 590


@pytest.mark.parametrize("text", ("", "\n\n", "[]", "{}", "null", "3", '"x"', "[1, 2", "\ufeff", "[[1, 2]]", '{"a": 1}\n{"a": 2}', '{"qid": 0}\n{"qid": 0}'))
@pytest.mark.parametrize("name", ("a.json", "a.jsonl"))
def test_files_that_are_no_answers_are_refused(tmp_path, text, name):
    (tmp_path/name).write_text(text)
    with pytest.raises(ValueError, match=name): read_answers(tmp_path/name)
    with pytest.raises(ValueError, match=name): read_truths(tmp_path/name)


def test_command_line_needs_no_torch_and_says_what_it_did(tmp_path):
    code = f"""import sys; from videotg_r1.cli import main
rc = main(["score", "qvhighlights", "--truth", {str(OWN/'retrieval_truth.jsonl')!r}, "--preds", {str(OWN/'retrieval_answers.jsonl')!r},
    "--policy", "qvhighlights_official", "--out", {str(tmp_path/'metrics.json')!r}])
assert not {{"torch", "pandas", "matplotlib"}} & set(sys.modules), "too much imported"; sys.exit(rc)"""
    said = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout
    found = json.loads((tmp_path/"metrics.json").read_text())
    assert found["public"]["full"]["MR-mAP"] == EXPECTED["qvhighlights_official"]["full"]["MR-mAP"]
    assert found["rules"]["rule"] == "Moment-DETR, standalone_eval/eval.py" and found["rules"]["rule"] in said
    assert f"{found['percent']['mAP']:.2f}" in said and found["intervals"]["mAP"][0] < found["mAP"] < found["intervals"]["mAP"][1]


def test_command_line_refuses_in_one_line(tmp_path):
    files = ("--truth", OWN/"gqa_truth.jsonl", "--preds", OWN/"gqa_answers.jsonl")
    for argv, words in ((("score", "charades_sta", *files), "are scored as vtg"), (("score", "vtg", *files, "--policy", "mine"), "no preset 'mine'"),
                        (("score", "vtg", *files, "--rules", "cilp=true"), "nearest: clip"), (("score", "vtg", *files[:3], tmp_path/"none.jsonl"), "no file"),
                        (("compare", OWN/"gqa_answers.jsonl", OWN/"retrieval_answers.jsonl", *files[:2]), "no qid is both"),
                        (("bench", "score", "--truth", OWN/"gqa_truth.jsonl"), "together")):
        code, _, err = vtg(*argv)
        assert code == 2 and words in err and len(err.splitlines()) == 1, err


def test_compare_from_the_command_line(tmp_path):
    rows = [json.loads(o) for o in (OWN/"gqa_answers.jsonl").read_text().splitlines()]
    (tmp_path/"worse.jsonl").write_text("".join(json.dumps(r | dict(pred_relevant_windows=[[0, 40]])) + "\n" for r in rows))
    code, said, err = vtg("compare", OWN/"gqa_answers.jsonl", tmp_path/"worse.jsonl", "--truth", OWN/"gqa_truth.jsonl", "--task", "rextime", "--out", tmp_path/"c.json")
    assert code == 0, err
    found = {r["metric"]: r for r in json.loads((tmp_path/"c.json").read_text())}
    assert found["mIoU"]["p"] < .05 and found["mIoU"]["verdict"] == "better" and found["mIoU"]["lo"] > 0 and "mIoU" in said
    assert found["Acc"]["diff"] == 0 and found["Acc"]["p"] == 1


def test_compare_knows_what_only_videos_can_show():
    "Ten queries of one video that go one way are one observation, not ten"
    truths = [Truth(f"{v}-{i}", f"v{v}", ((2., 6.),), 10.) for v in range(12) for i in range(10)]
    said = lambda good: [Answer(t.qid, ((2., 6.) if t.vid in good else (2., 4.),)) for t in truths]
    a = compare("vtg", truths, said({f"v{i}" for i in range(3)}), said(set()))[-1]
    assert a["diff"] > 0 and a["p"] > .2 and a["verdict"] == "no difference"


SETS = ROOT/"tests/data/sets"


@pytest.mark.parametrize("rows, file, truth", (("charades_rows", "charades_sta/charades_sta_train.txt", ""), ("activitynet_rows", "activitynet_captions/train.json", ""),
                                               ("nextgqa_rows", "nextgqa/test.csv", "nextgqa/gsub_test.json")))
def test_queries_are_called_as_the_readers_of_the_sets_call_them(rows, file, truth):
    "Answers to samples of `vtg stage prepare` can be scored against the released file, and the other way round"
    from videotg_r1 import datasets
    theirs = {r.qid: (r.vid, float(r.duration_s), [tuple(map(float, s)) for s in r.spans]) for r in getattr(datasets, rows)(SETS/file) if r.spans}
    ours, _ = read_truths(SETS/(truth or file))
    assert len(ours) > 1 and {t.qid: (t.vid, t.duration_s, list(t.spans)) for t in ours} == theirs
