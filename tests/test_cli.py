"The command line as a person meets it: exit codes, one-line errors, light imports"
import json
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
WORLD = ROOT/"tests/data/world"
RANDOM = ("--model", "random-qwen2_5_vl", "--device", "cpu", "--frames", "fps=1", "min_pixels=784", "max_pixels=3136")


def vtg(*argv, cwd=ROOT, timeout=120):
    code = "import sys; from videotg_r1.cli import main; sys.exit(main())"
    r = subprocess.run([sys.executable, "-c", code, *map(str, argv)], capture_output=True, text=True, cwd=cwd, timeout=timeout)
    return r.returncode, r.stdout, r.stderr


def test_help_names_every_verb_and_is_quick():
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    code, out, _ = vtg("--help")
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert code == 0 and all(v in out for v in ("run", "stage", "preflight", "ground", "world", "score", "compare", "bench"))
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 3    # CPU time: a loaded machine is no slower by it


@pytest.mark.parametrize("verb", ("run", "stage", "preflight", "ground", "world", "score", "compare", "bench"))
def test_help_of_a_verb_explains_each_argument(verb):
    code, out, _ = vtg(verb, "--help")
    assert code == 0 and out.count("\n") >= 5


def test_unknown_verb_and_no_verb_are_errors():
    assert vtg("fly")[0] == 2
    code, _, err = vtg()
    assert code == 2 and "exit codes" in err.lower() and "preflight" in err, "it says what can be done"
    assert vtg("--version")[1].startswith("vtg 0")


def test_import_is_light():
    code = "import sys, videotg_r1.cli; print(sorted({'torch', 'transformers', 'matplotlib', 'pandas', 'papermill'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "[]"


def test_score_by_hand_and_without_torch(tmp_path):
    truth = [json.loads(o) for o in (WORLD/"heldout.jsonl").read_text().splitlines()]
    rows = [dict(qid=t["qid"], spans=t["spans"]) for t in truth[:-1]] # the last query has no answer: a miss
    (tmp_path/"preds.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    code = f"""import sys; from videotg_r1.cli import main
rc = main(["score", "vtg", "--truth", {str(WORLD/'heldout.jsonl')!r}, "--preds", {str(tmp_path/'preds.jsonl')!r}, "--out", {str(tmp_path/'m.json')!r}])
assert "torch" not in sys.modules; sys.exit(rc)"""
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)
    m = json.loads((tmp_path/"m.json").read_text())
    assert m["n"] == len(truth) and m["misses"] == 1 and abs(m["mIoU"] - (len(truth) - 1)/len(truth)) < 1e-9


def test_score_refuses_what_does_not_fit(tmp_path):
    (tmp_path/"preds.jsonl").write_text('{"qid": "nobody", "spans": [[0, 1]]}\n')
    code, _, err = vtg("score", "vtg", "--truth", WORLD/"heldout.jsonl", "--preds", tmp_path/"preds.jsonl")
    assert code == 2 and "no qid is both" in err and len(err.splitlines()) == 1
    (tmp_path/"preds.jsonl").write_text('{"qid": "a"}\nnot json\n')
    code, _, err = vtg("score", "vtg", "--truth", WORLD/"heldout.jsonl", "--preds", tmp_path/"preds.jsonl")
    assert code == 2 and "line 2" in err and len(err.splitlines()) == 1


def test_world_is_the_same_twice(tmp_path):
    for d in ("a", "b"):
        code, out, err = vtg("world", tmp_path/d, "train_videos=2", "heldout_videos=1", "durations=[16]", "duration_weights=[1.0]", "--workers", "1")
        assert code == 0, err
    assert (tmp_path/"a/train.jsonl").read_bytes() == (tmp_path/"b/train.jsonl").read_bytes()
    assert vtg("world", tmp_path/"c", "train_video=2")[0] == 2


def test_ground_prints_and_draws(tmp_path):
    code, out, err = vtg("ground", WORLD/"videos/heldout_00000.mp4", "the red square moves left", "--model", "random-qwen2_5_vl", "--device", "cpu",
                         "--out", tmp_path/"t.png", "--frames", "fps=1", "min_pixels=784", "max_pixels=3136")
    assert code == 0, err
    assert "timeline: " in out and (tmp_path/"t.png").read_bytes()[:4] == b"\x89PNG"


def broken(folder):
    "Files that are no video, each in its own way"
    good = (WORLD/"videos/heldout_00000.mp4").read_bytes()
    files = {"empty.mp4": b"", "text.mp4": b"not a video\n"*50, "cut.mp4": good[:len(good)//3], "noise.mp4": bytes(range(256))*40}
    for name, data in files.items(): (folder/name).write_bytes(data)
    return [folder/name for name in files]


def test_broken_videos_give_one_line_and_exit_2(tmp_path):
    for path in [*broken(tmp_path), tmp_path/"missing.mp4", tmp_path]:
        code, out, err = vtg("ground", path, "a dog barks", *RANDOM, cwd=tmp_path)
        assert code == 2, f"{path.name}: {code} {out} {err}"
        assert len(err.strip().splitlines()) == 1 and path.name in err, f"{path.name}: {err}"
    assert not list(tmp_path.glob("*.png"))


def test_ground_refuses_an_empty_query():
    assert vtg("ground", WORLD/"videos/heldout_00000.mp4", "  ")[0] == 2


def test_stage_list_and_mistakes():
    code, out, _ = vtg("stage", "train", "--list")
    assert code == 0 and "sft.SFTSettings" in out
    code, _, err = vtg("stage", "train", "metod=sft")
    assert code == 2 and "did you mean 'method'" in err
    code, _, err = vtg("stage", "train", "sft={stepz: 1}")
    assert code == 2 and "did you mean 'steps'" in err


def test_preflight_says_what_is_missing(tmp_path):
    assert vtg("preflight", "params/smoke.yaml")[0] == 0
    text = (ROOT/"params/smoke.yaml").read_text().replace("train: tests/data/world/train.jsonl", "train: nowhere.jsonl")
    (tmp_path/"p.yaml").write_text(text)
    code, out, _ = vtg("preflight", tmp_path/"p.yaml")
    assert code == 1 and "missing annotations" in out and "nowhere.jsonl" in out


def test_run_refuses_a_params_file_before_anything_starts(tmp_path):
    text = (ROOT/"params/smoke.yaml").read_text()
    for old, new, words in (("evaluate:", "evalute:", "did you mean 'evaluate'"), ("k: 2", "kk: 2", "did you mean 'k'"), ("run: smoke", "run: ../smoke", "names the folders")):
        (tmp_path/"p.yaml").write_text(text.replace(old, new, 1))
        code, out, err = vtg("run", tmp_path/"p.yaml", "--runs", tmp_path/"runs")
        assert code == 2 and words in err, err
    assert not (tmp_path/"runs").exists()


SHARED = ROOT.parent/"shared/data/clips"


@pytest.mark.skipif(not SHARED.is_dir(), reason="no ../shared/data/clips")
def test_ground_on_real_footage(tmp_path):
    shutil.copy(SHARED/"UniTime/3MSZA.mp4", tmp_path/"clip.mp4")
    code, out, err = vtg("ground", "clip.mp4", "person turn a light on.", *RANDOM, cwd=tmp_path)
    assert code == 0, err
    assert (tmp_path/"clip_timeline.png").is_file()


BAD = {"ExoPlayer/sample_ac3.mp4", "PHP-FFMpeg/WrongFile.mp4", "decord/corrupted.mp4", "derived/3MSZA_bitflips.mp4", "derived/3MSZA_trunc50.mp4", "moviepy/result.webm", "small/Mpeg4.mp4",
       "small/mp4-with-audio.mp4"}
ODD = ("ExoPlayer/bear-vp9-odd-dimensions.webm", "decord/video_90.mov", "decord/unordered.mov", "moviepy/no_duration.webm")
SPAN = re.compile(r"^\d+\.\d+ to \d+\.\d+ s", re.M)


@pytest.fixture
def grounder(tmp_path, monkeypatch, capsys):
    "Function that runs `vtg ground` in this process, with one model for all"
    from videotg_r1 import cli, variants
    model = variants.open_model("random-qwen2_5_vl", dict(fps=1, min_pixels=784, max_pixels=3136), "cpu")
    monkeypatch.setattr(variants, "open_model", lambda *a: model)
    monkeypatch.chdir(tmp_path)
    def ground(path):
        code = cli.main(["ground", str(path), "a person opens a door"])
        said = capsys.readouterr()
        return code, said.out, said.err
    return ground


@pytest.mark.skipif(not SHARED.is_dir(), reason="no ../shared/data/clips")
def test_ground_on_odd_and_on_broken_clips(grounder, tmp_path):
    for name in ODD:
        code, out, err = grounder(SHARED/name)
        assert code == 0 and SPAN.search(out) and (tmp_path/f"{Path(name).stem}_timeline.png").is_file(), (name, out, err)
    for name in BAD:
        code, out, err = grounder(SHARED/name)
        assert code == 2 and not out and err.count("\n") == 1 and Path(name).name in err and ";" in err, (name, out, err)


def test_ground_on_odd_names(grounder, tmp_path):
    "Whatever a file is called, the picture lies in the working folder and no line is broken"
    for name in ("a 'b\".mp4", "line\nbreak\x1b[31m\u202e.mp4", "$(touch x);`id`{x}%n.mp4", "x"*240 + ".mp4", "\udcff.mp4", "漢字"):
        shutil.copy(WORLD/"videos/heldout_00000.mp4", tmp_path/name)
        code, out, err = grounder(tmp_path/name)
        assert code == 0 and SPAN.search(out) and out.count("\n") == 2 and "\x1b" not in out and "\u202e" not in out, (name, out, err)
        made, = tmp_path.glob("*_timeline.png")
        made.unlink()
    assert not (tmp_path/"x").exists()


def a_run(folder, lr, late):
    "What a run leaves, as far as a comparison reads it: six videos of two queries, answers that are `late` seconds late"
    rows = [dict(qid=f"q{i}", vid=f"v{i//2}", video="", duration_s=60., query=f"event {i}", spans=[[20., 30.]]) for i in range(12)]
    lines = lambda rows: "".join(json.dumps(o) + "\n" for o in rows)
    said = [dict(qid=r["qid"], raw="", spans=[[20. + late, 30. + late]], choice=None, miss_reason="") for r in rows]
    scores = [dict(qid=r["qid"], vid=r["vid"], iou=(10 - late)/(10 + late), iop=0., exists=False, right=None, gqa=None, miss_reason="") for r in rows]
    for job, params, files in (("prepare", {}, {"heldout.jsonl": lines(rows)}), ("train-grpo", dict(method="grpo", pool="all", grpo=dict(lr=lr)), {}),
                               ("evaluate-grpo", dict(model=f"runs/{folder.name}/train-grpo/training/final"), {"predictions.jsonl": lines(said), "scores.jsonl": lines(scores)})):
        (folder/job).mkdir(parents=True)
        for name, text in {**files, "params.json": json.dumps(params), "run.json": json.dumps(dict(commit="c", code="c", versions={})), "SUCCESS": "{}"}.items():
            (folder/job/name).write_text(text)
    return folder


def test_compare_explains_why_two_runs_differ(tmp_path):
    a = a_run(tmp_path/"runs/new", 1e-4, 1.)
    a_run(tmp_path/"runs/old", 1e-3, 5.)
    code, out, err = vtg("compare", "new", "old", "--runs", tmp_path/"runs", "--out", tmp_path/"c.json")
    assert code == 0, err
    assert "grpo.lr  0.0001 -> 0.001   (train-grpo)" in out and "GRPO: 12 won, 0 lost of 12" in out and "One thing differs" in out
    found = json.loads((tmp_path/"c.json").read_text())["models"]["GRPO"]
    assert abs(found["rows"][-1]["diff"] - (9/11 - 5/15)) < 1e-9 and found["won"][0]["answers"] == [[[21., 31.]], [[25., 35.]]]
    page = (a/"compare-old.html").read_text()
    assert "default-src 'none'" in page and "<script" not in page
    (tmp_path/"answers.jsonl").write_text("{}\n")
    for argv, words in (((a, tmp_path/"answers.jsonl"), "both files of answers, or both runs"), ((tmp_path/"answers.jsonl",)*2, "--truth"),
                        (("new", "nothing", "--runs", tmp_path/"runs"), "there are new, old")):
        code, _, err = vtg("compare", *argv)
        assert code == 2 and words in err and len(err.splitlines()) == 1, err


def test_explore_copies_the_notebooks_and_overwrites_nothing(tmp_path):
    code, out, _ = vtg("explore", tmp_path/"play")
    assert code == 0 and {p.name for p in (tmp_path/"play").iterdir()} == {p.name for p in (ROOT/"nbs/explore").glob("*.ipynb")} and "jupyter lab" in out
    code, _, err = vtg("explore", tmp_path/"play")
    assert code == 2 and "is there already" in err


def refused(*argv):
    "The one line, without a traceback, with which a command that ends with 2 says why"
    rc, out, err = vtg(*argv, timeout=60)
    assert rc == 2 and len(err.splitlines()) == 1 and "Traceback" not in out + err, (argv, rc, out, err)
    return err


@pytest.mark.parametrize("text, words", [("prepare: 3", "params.prepare: expected a mapping"), ("train: [sft]", "params.train: expected a mapping"), ("train: {a: }", "params.train.a: expected a mapping"),
                                         ("shared: abc", "params.shared: expected a mapping"), ("report: 3", "params.report: expected a mapping"), ("", "has no stage")])
def test_sections_that_are_no_mapping_or_not_there(tmp_path, text, words):
    (tmp_path/"p.yaml").write_text(f"run: x\n{text}\n")
    assert words in refused("run", tmp_path/"p.yaml", "--runs", tmp_path/"runs")


def test_run_refuses_impossible_numbers_and_folders_before_anything_starts(tmp_path):
    (tmp_path/"file").touch()
    for argv, words in ((["--jobs", "-1"], "--jobs must be 0"), (["--stall", "-5"], "--stall must be above 0"), (["--stall", "nan"], "--stall must be above 0"),
                        (["--runs", tmp_path/"file"], "file is a file: name another"), (["--reports", tmp_path/"file/x"], "--reports must be a folder")):
        assert words in refused("run", "smoke", "--runs", tmp_path/"runs", *argv)
    assert not (tmp_path/"runs").exists()
    code, out, _ = vtg("preflight", "smoke", "--runs", tmp_path/"file")
    assert code == 1 and "missing disk" in out and "name another folder with --runs" in out


@pytest.mark.parametrize("old, new, words", [("G: 4", "G: 0", "train-videotg_r1: grpo: GRPOSettings.G must be at least 2"), ("G: 4", "G: 9999999999", "and below 2**31, got 9999999999"), ("max_frames: 32", "max_frames: 0", "FrameSpec.max_frames"), ("method: grpo", "method: dpo", "method must be sft or grpo")])
def test_preflight_refuses_what_no_stage_takes(tmp_path, old, new, words):
    (tmp_path/"p.yaml").write_text((ROOT/"params/smoke.yaml").read_text().replace(old, new, 1))
    assert words in refused("preflight", tmp_path/"p.yaml")


def test_a_wrong_value_in_a_late_stage_stops_the_run_before_the_first(tmp_path):
    for old, new, words in (("curriculum: {}", "curriculum: {start: 1.5}", "CurriculumConfig.start must be in [0,1]"), ("pool: videotg,", "pool: vidotg,", "did you mean 'videotg'?"), ("share: 0.5", "share: 30", "SelectConfig.share must be in (0,1]")):
        text = (ROOT/"params/smoke.yaml").read_text()
        assert old in text
        (tmp_path/"p.yaml").write_text(text.replace(old, new))
        assert words in refused("run", tmp_path/"p.yaml", "--runs", tmp_path/"runs", "--reports", tmp_path/"reports")
        assert words in refused("preflight", tmp_path/"p.yaml")
    assert not (tmp_path/"runs").exists()


def test_preflight_takes_numbers_in_quotes(tmp_path):
    (tmp_path/"p.yaml").write_text((ROOT/"params/smoke.yaml").read_text().replace("G: 4", 'G: "4"', 1).replace("fps: 1.0", 'fps: "1.0"', 1))
    assert vtg("preflight", tmp_path/"p.yaml")[0] == 0


def test_mistakes_that_ended_in_a_traceback(tmp_path):
    (tmp_path/"file").touch()
    video = WORLD/"videos/heldout_00000.mp4"
    assert "at most a day" in refused("ground", video, "x", "--timeout", "inf")
    assert "--out must be a .png file" in refused("ground", video, "x", "--out", video)
    assert "name=value, line 1" in refused("ground", video, "x", "--frames", "=")
    assert "no section 'lab'" in refused("evidence", "smoke")
    assert "no section 'lab'" in refused("evidence", "smoke", "--count")
    assert "--points must be at least 1" in refused("torture", "smoke", "--points", "0", "--folder", tmp_path/"t")
    assert "a file is where a folder is needed" in refused("explore", tmp_path/"file")
    code, _, err = vtg("torture", "smoke", "--folder", tmp_path/"file")
    assert code == 1 and "Traceback" not in err and "is a file" in err


def test_values_may_stand_behind_a_flag(tmp_path):
    assert "did you mean 'train_videos'" in refused("world", tmp_path/"w", "--workers", "1", "train_videoz=1")
    assert "unrecognized arguments: a=1" in vtg("watch", "x", "--once", "a=1")[2]
    assert "grpo.GRPOSettings has no 'learning_rate'; did you mean 'lr'?" in refused("stage", "train", "grpo.learning_rate=1e-6", "--run-dir", tmp_path/"s")


def test_a_reader_that_leaves():
    code = "import sys; from videotg_r1.cli import main; sys.exit(main())"
    p = subprocess.Popen([sys.executable, "-c", code, "preflight", "smoke"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT)
    p.stdout.close()
    err = p.stderr.read()
    assert p.wait(60) == 130 and "closed pipe" in err and len(err.splitlines()) == 1, err


def test_ctrl_c_again_leaves_no_traceback():
    "The second arrives while the process waits for its children to end"
    code = """import sys, signal, multiprocessing, time
from videotg_r1 import cli
signal.signal(signal.SIGINT, signal.default_int_handler)
def child(): signal.signal(signal.SIGINT, signal.SIG_IGN); time.sleep(5)
def verb(args):
    multiprocessing.get_context("fork").Process(target=child).start()
    print("up", flush=True); time.sleep(60)
cli.VERBS["doctor"] = (verb, [])
sys.exit(cli.main(["doctor"]))"""
    p = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT)
    assert p.stdout.readline() == "up\n"
    p.send_signal(signal.SIGINT)
    line = p.stderr.readline()
    time.sleep(.5)
    p.send_signal(signal.SIGINT)
    rest = p.stderr.read()
    assert "stopped; the same command goes on" in line and not rest and p.wait(30) in (130, -signal.SIGINT)


def test_a_damaged_record_is_named(tmp_path):
    a_run(tmp_path/"runs/new", 1e-4, 1.)
    (tmp_path/"runs/new/prepare/run.json").write_text('{"a')
    for argv in (["browse", "new"], ["compare", "new", "new"]):
        said = refused(*argv, "--runs", tmp_path/"runs")
        assert "prepare/run.json" in said and "restore it, or move it away" in said
    (tmp_path/"by-hand").mkdir()
    (tmp_path/"by-hand/SUCCESS").write_text("")
    (tmp_path/"by-hand/identity.json").write_text("{")
    said = refused("stage", "select", f"samples={WORLD/'train.jsonl'}", "--run-dir", tmp_path/"by-hand")
    assert "identity.json: damaged" in said and "move it away" in said
