"The command line as a person meets it: exit codes, one-line errors, light imports"
import json
import shutil
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
    started = time.time()
    code, out, _ = vtg("--help")
    assert code == 0 and all(v in out for v in ("run", "stage", "preflight", "ground", "world", "score"))
    assert time.time() - started < 3


@pytest.mark.parametrize("verb", ("run", "stage", "preflight", "ground", "world", "score"))
def test_help_of_a_verb_explains_each_argument(verb):
    code, out, _ = vtg(verb, "--help")
    assert code == 0 and out.count("\n") >= 5


def test_unknown_verb_and_no_verb_are_errors():
    assert vtg("fly")[0] == 2
    assert vtg()[0] == 2


def test_import_is_light():
    code = "import sys, videotg_r1.cli; print(sorted({'torch', 'transformers', 'matplotlib', 'pandas', 'papermill'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "[]"


def test_score_by_hand_and_without_torch(tmp_path):
    truth = [json.loads(o) for o in (WORLD/"heldout.jsonl").read_text().splitlines()]
    rows = [dict(qid=t["qid"], spans=t["spans"]) for t in truth[:-1]] # the last query has no answer: a miss
    (tmp_path/"preds.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    code = f"""import sys; from videotg_r1.cli import main
rc = main(["score", {str(WORLD/'heldout.jsonl')!r}, {str(tmp_path/'preds.jsonl')!r}, "--out", {str(tmp_path/'m.json')!r}])
assert "torch" not in sys.modules; sys.exit(rc)"""
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)
    m = json.loads((tmp_path/"m.json").read_text())
    assert m["n"] == len(truth) and m["misses"] == 1 and abs(m["mIoU"] - (len(truth) - 1)/len(truth)) < 1e-9


def test_score_refuses_what_does_not_fit(tmp_path):
    (tmp_path/"preds.jsonl").write_text('{"qid": "nobody", "spans": [[0, 1]]}\n')
    code, _, err = vtg("score", WORLD/"heldout.jsonl", tmp_path/"preds.jsonl")
    assert code == 2 and "no qid is both" in err and len(err.splitlines()) == 1
    (tmp_path/"preds.jsonl").write_text('{"qid": "a"}\nnot json\n')
    code, _, err = vtg("score", WORLD/"heldout.jsonl", tmp_path/"preds.jsonl")
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
