"Annotation files of other people: the real ones, hostile ones, and what `vtg data` says about them"
import codecs
import html.parser
import io
import json
import os
import pickle
import re
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

import pytest

from videotg_r1.annotations import read_pickle
from videotg_r1.cli import main
from videotg_r1.config import load_params
from videotg_r1.dataset_checks import check_parts, look_at_all, set_parts
from videotg_r1.datasets import SETS, Part, annotation_file, counted, data_parts, leak, prepare, read_set, rows_read
from videotg_r1.external import import_findings, import_time_r1
from videotg_r1.ledger import read_ledger
from videotg_r1.records import read_samples
from videotg_r1.stages import plan_run

ROOT = Path(__file__).parents[1]
REAL = Path(os.environ.get("VTG_SHARED_DATA") or ROOT.parent/"shared/data")/"annotations"
real = pytest.mark.skipif(not REAL.is_dir(), reason=f"the released annotation files are not here ({REAL})")
OWN = ROOT/"tests/data/sets" # made by hand, in the forms of the released files


def vtg(*argv):
    "Exit code, output and complaints of a command, in this process: a new one takes a second to start"
    out, err = io.StringIO(), io.StringIO()
    with redirect_stdout(out), redirect_stderr(err): code = main([*map(str, argv)])
    return code, out.getvalue(), err.getvalue()


def load(name, split, root=REAL, policy="clip"): return read_set(name, annotation_file(name, split, root), root/"no videos", split, policy)


# --- the real files -------------------------------------------------------------------------------------------------
# rows, usable samples, queries with several spans, {fault, fate: queries}
GOLDEN = {
    ("charades_sta", "train"): (12408, 12404, 0, {"past the end, cut": 1802, "backwards, left out": 4}),
    ("charades_sta", "test"): (3720, 3720, 0, {"past the end, cut": 562}),
    ("activitynet_captions", "train"): (37421, 37417, 0, {"past the end, cut": 261, "empty, left out": 2, "backwards, left out": 2}),
    ("activitynet_captions", "val"): (17505, 17505, 0, {"past the end, cut": 134}),
    ("activitynet_captions", "test"): (17031, 17031, 0, {"past the end, cut": 111}),
    ("qvhighlights", "train"): (7218, 7218, 2363, {}),
    ("qvhighlights", "val"): (1550, 1550, 530, {}),
    ("qvhighlights", "test"): (1542, 1542, 0, {}),
    ("didemo", "val"): (4180, 4180, 0, {"length taken from its 5-second parts, no durations.json, kept": 4180}),
    ("didemo", "test"): (4021, 4021, 0, {"length taken from its 5-second parts, no durations.json, kept": 4021}),
    ("tacos", "train"): (9790, 9790, 0, {"past the end, cut": 43}),
    ("tacos", "val"): (4436, 4436, 0, {}),
    ("tacos", "test"): (4001, 4001, 0, {"past the end, cut": 5}),
    ("hirest_grounding", "train"): (865, 864, 0, {"empty, left out": 1}),
    ("hirest_grounding", "val"): (193, 193, 0, {}),
    ("hirest_step", "train"): (4145, 4130, 0, {"empty, left out": 15}),
    ("hirest_step", "val"): (606, 603, 0, {"empty, left out": 3}),
    ("nextgqa", "val"): (3358, 3358, 339, {"past the end, cut": 3}),
    ("nextgqa", "test"): (5553, 5553, 591, {"before 0, cut": 36}),
    ("rextime", "val"): (921, 919, 0, {"the letter of the answer without its options: grounding only, kept": 921, "past the end, cut": 4, "empty, left out": 2}),
    ("time_r1", "train"): (2500, 2500, 0, {"past the end, cut": 48}),
    ("time_r1", "test"): (800, 789, 0, {"past the end, cut": 27, "part of a longer file, kept": 252, "empty, left out": 11}),
}


@real
@pytest.mark.parametrize("name,split", GOLDEN, ids=lambda o: o)
def test_released_files_have_the_published_rows_and_the_known_hazards(name, split):
    rows, usable, several, faults = GOLDEN[name, split]
    samples, issues = load(name, split)
    assert (rows_read(samples, issues), len(samples), sum(len(s.spans) > 1 for s in samples), counted(issues)) == (rows, usable, several, faults)
    assert SETS[name].rows.get(split, rows) == rows
    assert len({s.qid for s in samples}) == len(samples)
    assert all(0 <= a < b <= s.duration_s for s in samples for a, b in s.spans)


@real
def test_hazards_of_charades_and_time_r1_by_hand():
    train = load("charades_sta", "train", policy="keep")[0]
    lines = (REAL/"charades_sta/charades_sta_train.txt").read_text().splitlines()
    late = [s for s in train if s.spans[0][1] > s.duration_s]
    assert len(late) == 1802, "1,805 rows end late; 3 of them also end before they begin"
    for s in late[:50]: assert lines[int(s.qid.rsplit("_", 1)[1]) - 1].startswith(f"{s.vid} {s.spans[0][0]:g}".split(".")[0])
    assert sum(o.over_s > 1 for o in load("time_r1", "train")[1]) == 29


@real
def test_kept_spans_give_the_known_score_of_the_whole_video():
    from videotg_r1.spans import best_iou
    iou = [best_iou((0, s.duration_s), s.spans) for s in load("charades_sta", "test", policy="keep")[0]]
    assert [round(100*v/len(iou), 2) for v in (sum(i >= .3 for i in iou), sum(i >= .5 for i in iou), sum(iou))] == [34.30, .43, 26.99]


@real
def test_two_forms_of_tacos_agree():
    frames = {(s.query, s.vid): s for s in load("tacos", "test")[0]}
    seconds = read_set("tacos", REAL/"tacos/lighthouse_tacos_test_release.jsonl", REAL, "test")[0]
    assert len(seconds) == 4001
    same = [s for s in seconds if (s.query.strip(), s.vid) in frames]
    assert len(same) == 4001
    assert all(abs(s.duration_s - frames[s.query.strip(), s.vid].duration_s) < .01 for s in same)


@real
def test_known_leaks_are_found():
    rex = load("rextime", "val")[0]
    touched = lambda name, split: int(re.match(r"(\d+) of", leak(load(name, split)[0], rex) or "0 of")[1])
    assert (touched("qvhighlights", "val"), touched("qvhighlights", "train"), touched("activitynet_captions", "test")) == (180, 0, 739)
    assert leak(load("nextgqa", "val")[0], load("nextgqa", "test")[0]) == ""
    assert "453 of 3720" in leak(load("time_r1", "test")[0], load("charades_sta", "test")[0])


@real
def test_time_r1_predictions_reproduce_every_published_iou(tmp_path):
    found = import_time_r1(REAL/"time_r1/train_2k5.json", tmp_path/"d.jsonl")
    assert (found["findings"], found["reproduced"]) == (2500, 2500)
    rows, published = read_ledger(tmp_path/"d.jsonl")[1], {o["qid"]: o["difficulty"] for o in json.loads((REAL/"time_r1/train_2k5.json").read_text())}
    assert all(abs(100*o["mean_iou"] - published[o["qid"]]) < 1e-6 and abs(o["difficulty"] + o["mean_iou"] - 1) < 1e-12 for o in rows)
    hardest = max(rows, key=lambda o: o["difficulty"])
    assert published[hardest["qid"]] == min(published.values()), "their high is easy, ours is hard"
    assert {s.qid for s in load("time_r1", "train")[0]} == {o["qid"] for o in rows}


@real
def test_report_of_a_released_set(tmp_path):
    code, out, _ = vtg("data", "charades_sta", "--root", REAL, "--out", tmp_path)
    assert code == 1 and "no folder" in out, "the videos are not there"
    assert "12,408 rows in charades_sta_train.txt, as published" in out and "4 queries: backwards, left out (charades_sta_train_8252" in out
    assert "1,573 of 3,720 samples ask with a sentence that also trains" in out and "none of its videos trains" in out
    assert (tmp_path/"report.html").read_text().count("<svg") == 10


# --- small files of our own, in the released forms --------------------------------------------------------------------
EXPECTED = {"qvhighlights": ("train", 2, (75., 150.)), "didemo": ("train", 2, (5., 11.25)), "tacos": ("train", 2, (5., 10.)), "queryd": ("train", 2, (3.5, 9.)), "hirest_grounding": ("train", 1, (35., 79.)),
            "hirest_step": ("train", 2, (35., 48.)), "cosmo_cap": ("train", 2, (2., 5.)), "internvid_vtime": ("train", 1, (1.5, 3.)), "charades_sta": ("train", 2, (0., 6.9)),
            "activitynet_captions": ("train", 2, (.8, 19.9)), "nextgqa": ("val", 2, (.5, 12.6)), "rextime": ("train", 2, (3., 9.)), "time_r1": ("train", 2, (1., 4.))}


def test_own_files_cover_every_set(): assert set(EXPECTED) == set(SETS) - {"jsonl"}


@pytest.mark.parametrize("name", EXPECTED)
def test_each_set_in_its_released_form(name):
    split, n, first = EXPECTED[name]
    samples, issues = load(name, split, OWN)
    assert (len(samples), samples[0].spans[0]) == (n, first), issues
    assert all(s.source == name and s.split == split and s.query == s.query.strip() and Path(s.video).is_absolute() for s in samples)


def test_questions_keep_their_options():
    gqa, rex = load("nextgqa", "val", OWN)[0][0], load("rextime", "train", OWN)[0][0]
    assert (gqa.qid, gqa.options[gqa.answer], len(gqa.spans)) == ("10_8", "lay on floor", 2)
    assert (rex.answer, rex.options[1]) == (1, "It snows")


def test_mixture_by_root_alone(tmp_path):
    sources = ", ".join(n for n in EXPECTED if n not in ("nextgqa", "rextime", "activitynet_captions", "time_r1"))
    paths, notes = prepare(tmp_path, sources, root=str(OWN), report_on="nextgqa", filters=dict(min_s=1.))
    assert len(read_samples(paths["train"])) == 16 and {s.source for s in read_samples(paths["heldout"])} == {"nextgqa"}
    assert notes == {"didemo train: past the end, cut": 1}, "its last part is shorter than 5 s"


# --- hostile files ----------------------------------------------------------------------------------------------------
class Run:
    def __init__(self, call, *args): self.call, self.args = call, args
    def __reduce__(self): return self.call, self.args


def traps(mark):
    "Pickles that would do something"
    yield from (pickle.dumps(Run(f, a), p) for p in range(6) for f, a in ((os.system, f"touch {mark}"), (eval, f"open({str(mark)!r}, 'w')"), (exec, f"open({str(mark)!r}, 'w')"), (Path.touch, Path(mark))))
    yield pickle.dumps({"video-a": [["a", Run(os.system, f"touch {mark}")]]})
    yield f"cos\nsystem\n(S'touch {mark}'\ntR.".encode()
    yield f"(S'touch {mark}'\nios\nsystem\n.".encode()                      # INST
    yield f"(cos\nsystem\nS'touch {mark}'\no.".encode()                     # OBJ
    yield b"\x80\x02cbuiltins\ngetattr\n."
    yield b"\x80\x04\x8c\x02os\x8c\x06system\x93."                          # STACK_GLOBAL without a call
    yield b"\x82\x01."                                                      # EXT1
    yield b"Psomebody\n."                                                   # PERSID
    yield pickle.dumps({}) + b"PK\x03\x04"                                  # another file behind it
    yield codecs.encode(pickle.dumps({}), "zlib")
    yield b"\x80\x04\x95" + b"\xff"*7 + b"\x7f."                            # a frame of exabytes
    yield b"\x80\x04\x8d" + b"\xff"*7 + b"\x7f."                            # a text of exabytes
    yield b"Nr\xff\xff\xff\x7f."                                            # memory for two billion names


def test_pickles_that_call_are_refused_and_nothing_is_called(tmp_path):
    mark = tmp_path/"sprung"
    found = list(traps(mark))
    for data in found:
        (tmp_path/"trap.pkl").write_bytes(data)
        with pytest.raises(ValueError, match="refused, only containers"): read_pickle(tmp_path/"trap.pkl")
    assert len(found) >= 36 and not mark.exists()


def test_a_trapped_queryd_is_refused_as_a_whole(tmp_path):
    for f in (OWN/"queryd").iterdir(): (tmp_path/f.name).write_bytes(f.read_bytes())
    (tmp_path/"raw_captions_combined_filtered-v2.pkl").write_bytes(pickle.dumps({"video-abc": Run(os.system, f"touch {tmp_path/'sprung'}")}))
    with pytest.raises(ValueError, match="refused"): read_set("queryd", tmp_path/"train_list.txt", tmp_path, "train")
    assert not (tmp_path/"sprung").exists()


NAMES = ["../secret", "a/../../secret", "/etc/passwd", "file:///etc/passwd", "//etc/passwd", "..\\secret", "C:\\x", "a\0b", "x\ny", "\u2025/secret", "\uff0e\uff0e\uff0fsecret", "%2e%2e%2fsecret", "..%2fsecret",
         "link/secret", "linked", "x"*300, "y/"*800, ".", "..", "./../secret", "~root/x", "\u202etxt.mp4", "http://host/x", "concat:/etc/passwd|x", "a\tb", "\ud800", " ", "\r\n", "a//b", "secret/../../secret"]


def sample_row(i, **kw): return dict(qid=f"q{i}", vid="a", duration_s=20, query="a dog runs", spans=[[2, 5]]) | kw
def write_rows(path, rows): path.write_text("".join(json.dumps(o) + "\n" for o in rows)); return path


@pytest.mark.parametrize("field", ["vid", "video"])
def test_no_name_of_a_video_leads_out_of_its_folder(tmp_path, field):
    videos = tmp_path/"videos"
    videos.mkdir()
    (tmp_path/"secret.mp4").write_text("not yours"); (tmp_path/"secret").write_text("not yours")
    (videos/"link").symlink_to(tmp_path); (videos/"linked.mp4").symlink_to(tmp_path/"secret.mp4")
    samples, issues = read_set("jsonl", write_rows(tmp_path/"t.jsonl", [sample_row(i, **{field: n}) for i, n in enumerate(NAMES)]), videos, "train")
    bad = {o.qid for o in issues if o.fate == "left out"}
    for s in samples: assert os.path.realpath(s.video).startswith(str(videos) + os.sep), s.video
    allowed = {f"q{i}" for i, n in enumerate(NAMES) if field == "video" and not n.strip()} # no `video`: the vid names the file
    assert {s.qid for s in samples} <= allowed and len(bad) >= len(NAMES) - 2


def test_dirty_rows_each_have_a_stated_fate(tmp_path):
    nan = float("nan")
    rows = [sample_row(0), sample_row(0, query="the same id"), sample_row(1, query="x"*10_000_000), sample_row(2, spans=[[nan, 5]]), sample_row(3, spans=[[2, float("inf")]]), sample_row(4, spans=[[5, 2]]),
            sample_row(5, spans=[[5, 5]]), sample_row(6, spans=[[30, 40]]), sample_row(7, spans=[[-1, 5]]), sample_row(8, spans=[[2, 30]]), sample_row(9, duration_s=nan), sample_row(10, duration_s="long"),
            sample_row(11, duration_s=-3), sample_row(12, query=""), sample_row(13, query=7), sample_row(14, spans="12"), sample_row(15, spans=[[1, 2], [9, 3], [4, 6]]), sample_row(16, options=["a", "b"], answer=5),
            sample_row(17, spans=[["1", "2"]]), sample_row(18, spans=[[1, 2, 3]]), sample_row(19, duration_s=10**400), sample_row(20, spans=[None]), sample_row(21, duration_s=True), sample_row(22, spans=None),
            sample_row(23, options="ab", answer=0), sample_row(24, vid=None), sample_row(25, qid=None), sample_row(26, qid=[1]), sample_row(27, vid=["a"])]
    path = write_rows(tmp_path/"t.jsonl", rows)
    good = {"clip": {"q0": ((2., 5.),), "q7": ((0., 5.),), "q8": ((2., 20.),), "q15": ((1., 2.), (4., 6.)), "q17": ((1., 2.),)}}
    good["keep"] = good["clip"] | {"q8": ((2., 30.),)}
    good["drop"] = {k: v for k, v in good["clip"].items() if k in ("q0", "q17")}
    for policy, wanted in good.items():
        samples, issues = read_set("jsonl", path, tmp_path, "train", policy)
        assert {s.qid: s.spans for s in samples} == wanted, policy
        assert samples[0].query == "a dog runs" and rows_read(samples, issues) == len(rows)
        named = {o.qid for o in issues}
        assert named == {str(o["qid"]) for o in rows} - {"q17"}, "whatever was changed or left out is named"
    with pytest.raises(ValueError, match=r"rows are unusable, at most 5%"): prepare(tmp_path/"o", "jsonl", train=str(path), heldout=str(path), videos=str(tmp_path), allow_leak=True)


@pytest.mark.parametrize("content,words", [
    ("AO8RW 0 1##caf\u00e9\n".encode("latin-1"), "line 1: expected UTF-8"), ("AO8RW 0 1##x\n".encode("utf-16"), "UTF-16"), (b"AO8RW 0 1##x\n\x80\x81", "line 2: expected UTF-8"),
    (b"AO8RW 0 1 x\n", "line 1: expected `VID"), (b"AO8RW 0##x\n", "line 1: expected `VID"), (b"\0\0\0", "line 1")])
def test_charades_in_a_wrong_form_names_the_line(tmp_path, content, words):
    (tmp_path/"charades_sta_train.txt").write_bytes(content); (tmp_path/"durations.json").write_text('{"AO8RW": 9}')
    with pytest.raises(ValueError, match=re.escape(words)): read_set("charades_sta", tmp_path/"charades_sta_train.txt", tmp_path, "train")


def test_bom_and_windows_line_ends_change_nothing(tmp_path):
    for name, split in (("charades_sta", "train"), ("qvhighlights", "train"), ("activitynet_captions", "train"), ("nextgqa", "val")):
        path = annotation_file(name, split, OWN)
        folder = tmp_path/name
        folder.mkdir()
        for f in path.parent.iterdir(): (folder/f.name).write_bytes(b"\xef\xbb\xbf" + f.read_bytes().replace(b"\n", b"\r\n"))
        ours, theirs = (read_set(name, p, tmp_path, split)[0] for p in (path, folder/path.name))
        assert [s.to_dict() for s in ours] == [s.to_dict() for s in theirs] and ours


@pytest.mark.parametrize("name", SETS)
@pytest.mark.parametrize("content", [b"", b"[]", b"{}", b"null", b"[1]", b'{"a": 1}', b'[{"a": 1}]', b'{"a": {"b": [1]}}', b"[" * 50_000, b"\xff\xfe", b"PK\x03\x04", b'{"qid": 1}\n{"qid": 1}'], ids=range(12))
def test_any_file_is_read_or_refused_never_a_crash(tmp_path, name, content):
    files = SETS[name].files or {"train": ("mine.jsonl",)}
    for names in files.values():
        for f in names: (tmp_path/f).write_bytes(content)
    for f in ("durations.json", "gsub_val.json", "gsub_test.json", "raw_captions_combined_filtered-v2.pkl", "times_captions_combined_filtered-v2.pkl"): (tmp_path/f).write_bytes(content)
    for split, names in files.items():
        for f in names:
            try: samples, _ = read_set(name, tmp_path/f, tmp_path, split)
            except ValueError as e: assert str(e) and "\n" not in str(e)[:50]
            else: assert samples == []


# --- reports ------------------------------------------------------------------------------------------------------------
EVIL = ["<script>alert(1)</script>", "<img src=x onerror=alert(1)>", "\"><svg/onload=alert(1)>", "'-alert(1)-'", "</title><script>x</script>", "javascript:alert(1)", "&lt;b&gt;", "<style>*{}</style>", "\x1b[2J\x07", "</svg><iframe src=//x>"]


class Tags(html.parser.HTMLParser):
    def __init__(self): super().__init__(); self.seen = []
    def handle_starttag(self, tag, attrs): self.seen.append((tag, dict(attrs)))


def test_page_of_a_hostile_set_is_inert(tmp_path):
    rows = [sample_row(i, query=e, vid=f"v{i}{e}".replace("/", ""), qid=f"{e} {n} {i}", spans=spans) for i, e in enumerate(EVIL) for n, spans in (("good", [[2, 5]]), ("bad", [[5, 2]]))]
    path = write_rows(tmp_path/f"{EVIL[1].replace('/', '')}.jsonl", rows)
    report = check_parts([Part("train", "jsonl", path, (tmp_path,), "train"), Part("heldout", "jsonl", path, (tmp_path,), "test")], EVIL[0], out=tmp_path/"out")
    page, tags = (tmp_path/"out/report.html").read_text(), Tags()
    tags.feed(page)
    assert not {"script", "img", "iframe", "link", "object", "embed", "a", "form"} & {t for t, _ in tags.seen}
    assert not [k for _, attrs in tags.seen for k in attrs if k.startswith("on") or k in ("src", "href", "style")]
    assert sum(t == "style" for t, _ in tags.seen) == 1 and "default-src 'none'" in page and "\x1b" not in page
    assert any(f.what == "leak" and f.level == "missing" for f in report.findings)
    found = json.loads((tmp_path/"out/report.json").read_text())
    assert found["files"][0]["rows"] == 20 and len(found["files"][0]["issues"]) >= 10


def test_video_check_goes_on_where_it_was_killed(tmp_path):
    clips = sorted((ROOT/"tests/data/world/videos").glob("*.mp4"))
    for i in range(12): (tmp_path/f"{i:02}.mp4").write_bytes(clips[i % len(clips)].read_bytes() if i % 4 else b"broken")
    paths = sorted(map(str, tmp_path.glob("*.mp4")))
    first = look_at_all(paths[:5], tmp_path/"v.jsonl", workers=2)
    lines = (tmp_path/"v.jsonl").read_bytes().splitlines(keepends=True)
    (tmp_path/"v.jsonl").write_bytes(b"".join(lines[:4]) + lines[4][:20]) # as a kill in the middle of a line leaves it
    done = look_at_all(paths, tmp_path/"v.jsonl", workers=2)
    assert {p: done[p] for p in first} == first and len(done) == 12
    assert [p for p in paths if "error" in done[p]] == paths[::4]
    again = (tmp_path/"v.jsonl").read_bytes()
    assert look_at_all(paths, tmp_path/"v.jsonl", workers=2) == done and (tmp_path/"v.jsonl").read_bytes() == again


def test_lengths_that_do_not_fit_are_named(tmp_path):
    (tmp_path/"a.mp4").write_bytes(next((ROOT/"tests/data/world/videos").glob("heldout*.mp4")).read_bytes())
    part = Part("train", "jsonl", write_rows(tmp_path/"t.jsonl", [sample_row(0, duration_s=99., spans=[[80, 90]])]), (tmp_path,), "train")
    said = [f.text for f in check_parts([part], "x", out=tmp_path/"out").findings if f.what == "lengths"]
    assert len(said) == 1 and "a: 99.0 s annotated" in said[0] and "1 queries have a span beyond the measured end" in said[0]


def test_exit_codes_of_vtg_data(tmp_path):
    world = ROOT/"tests/data/world"
    assert vtg("data", "smoke", "--out", tmp_path/"a", "--check", "none")[0] == 0
    code, out, _ = vtg("data", "jsonl", "--train", world/"train.jsonl", "--heldout", world/"train.jsonl", "--videos", world, "--out", tmp_path/"b", "--check", "none")
    assert code == 1 and re.search("missing +leak", out)
    assert vtg("data", "jsonl", "--train", world/"train.jsonl", "--heldout", world/"train.jsonl", "--videos", world, "--out", tmp_path/"b", "--check", "none", "--allow-leak")[0] == 0
    code, _, err = vtg("data", "charades")
    assert code == 2 and "did you mean 'charades_sta'" in err and len(err.splitlines()) == 1


def leaking(tmp_path, **kw):
    config = load_params(ROOT/"params/smoke.yaml")
    config["prepare"] |= dict(heldout="tests/data/world/train.jsonl", **kw)
    (tmp_path/"p.yaml").write_text(json.dumps(config))
    return tmp_path/"p.yaml"


def test_a_params_file_that_trains_on_what_it_reports_on_is_stopped(tmp_path):
    assert vtg("preflight", leaking(tmp_path))[0] == 1
    code, out, _ = vtg("data", tmp_path/"p.yaml", "--out", tmp_path/"o", "--check", "none")
    assert code == 1 and "allow_leak: true" in out
    p = load_params(tmp_path/"p.yaml")["prepare"]
    with pytest.raises(ValueError, match="allow_leak: true"): prepare(tmp_path/"r", **p)
    assert any("leak allowed" in k for k in prepare(tmp_path/"r", **p, allow_leak=True)[1])
    leaking(tmp_path, allow_leak=True)
    assert vtg("preflight", tmp_path/"p.yaml")[0] == 0
    assert vtg("data", tmp_path/"p.yaml", "--out", tmp_path/"o", "--check", "none")[0] == 0


# --- findings made elsewhere ----------------------------------------------------------------------------------------------
def test_training_can_start_from_imported_findings(tmp_path):
    from videotg_r1.selection import SelectConfig, select
    samples = read_samples(ROOT/"tests/data/world/train.jsonl")
    d = write_rows(tmp_path/"d.jsonl", [dict(qid=s.qid, preds=[list(s.spans[0]), None]) for s in samples])
    r = write_rows(tmp_path/"r.jsonl", [dict(qid=s.qid, verdict="partial" if i == 0 else "keep") for i, s in enumerate(samples)])
    code, out, err = vtg("import", "difficulties", d, "--samples", ROOT/"tests/data/world/train.jsonl", "--out", tmp_path/"diff.jsonl")
    assert code == 0, err
    assert import_findings("reflections", r, samples, tmp_path/"refl.jsonl") == dict(findings=6, other=0, keep=5, partial=1)
    rows = select(samples, read_ledger(tmp_path/"diff.jsonl")[1], read_ledger(tmp_path/"refl.jsonl")[1], SelectConfig(share=1.))
    assert [o["picked"] for o in rows] == [False] + [True]*5 and rows[1]["bin"] == "medium"
    config = {k: v for k, v in load_params(ROOT/"params/smoke.yaml").items() if k not in ("reflect", "estimate", "ablation", "data_efficiency")}
    config["shared"] |= dict(reflections=str(tmp_path/"refl.jsonl"), difficulties=str(tmp_path/"diff.jsonl"))
    jobs = {j.name: j for j in plan_run(config)}
    assert "reflect" not in jobs and jobs["select"].params["difficulties"] == str(tmp_path/"diff.jsonl") == jobs["train-videotg_r1"].params["difficulties"]


def test_bins_of_imported_difficulties_are_those_of_the_estimate_stage():
    from inspect import signature

    from videotg_r1.external import difficulty_row
    text = (ROOT/"videotg_r1/difficulty.py").read_text() # read, not imported: torch takes seconds
    for name in ("easy_below", "hard_from"):
        assert float(re.search(rf"{name}: float = ([.\d]+)", text)[1]) == signature(difficulty_row).parameters[name].default


def test_data_parts_by_root_and_by_name():
    parts = data_parts("hirest_step", root=str(OWN), report_on="rextime, charades_sta")
    assert [(p.role, p.split, p.path.name) for p in parts] == [("train", "train", "all_data_train.json"), ("heldout", "val", "rextime_val.json"), ("heldout", "test", "charades_sta_test.txt")]
    with pytest.raises(ValueError, match="no folder of videos for rextime"): data_parts("jsonl", "a", "b", "c", "", "rextime")
    assert {p.split for p in set_parts("charades_sta", OWN)} == {"train"}


def test_where_no_decoder_starts_stored_frames_are_looked_at_and_the_rest_is_a_finding(tmp_path, monkeypatch):
    import numpy as np

    from videotg_r1.dataset_checks import Checked, check_videos
    from videotg_r1.datasets import Part
    from videotg_r1.records import Sample
    from videotg_r1.video import stop_workers, write_frames
    (tmp_path/"bin").mkdir(); (tmp_path/"bin/av.py").write_text("raise ImportError('libav is gone')")
    for name in ("a", "b"): write_frames(tmp_path/f"{name}.npz", np.zeros((6, 28, 56, 3), np.uint8), np.arange(6)/2, 3.)
    (tmp_path/"b.npz").write_bytes(b"PK")
    (tmp_path/"c.mp4").write_bytes(b"x")
    stop_workers()
    monkeypatch.setenv("PYTHONPATH", str(tmp_path/"bin"))
    def checked(*names):
        part = Part("train", "clips", tmp_path/"x.jsonl", (tmp_path,), "train")
        c = Checked(part, [Sample(o, o, str(tmp_path/o), 3., "a thing happens", ((0., 1.),)) for o in names])
        check_videos(c, tmp_path/f"{len(names)}.jsonl")
        return c, [(f.level, f.text.split(": ", 1)[1]) for f in c.findings]
    c, found = checked("a.npz", "b.npz")
    assert c.seen[str(tmp_path/"a.npz")] == dict(duration_s=3., width=56, height=28, fps=2., codec="npz")
    assert found[1][0] == "missing" and "1 of 2 cannot be decoded" in found[1][1]
    c, found = checked("a.npz", "b.npz", "c.mp4")
    assert not c.seen and found[-1][0] == "missing" and "not looked at: DecodeWorker: no decoder starts here" in found[-1][1] and len(found) == 2
