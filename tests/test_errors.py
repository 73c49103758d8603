"""The mistakes that TROUBLESHOOTING.md lists, made on purpose: each message is the one in its table, and says who, what was
expected, what came and what to do. VTG_SHOW_ERRORS=1 prints what is said, to write the table from."""
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import av
import numpy as np
import pytest
import torch

from videotg_r1 import cli, stages, variants
from videotg_r1.decode import write_mp4
from videotg_r1.ledger import Ledger, locked
from videotg_r1.video import DecodeWorker

ROOT = Path(__file__).resolve().parents[1]
WORLD = ROOT/"tests/data/world"
VIDEO = WORLD/"videos/heldout_00000.mp4"
FAST = ("--model", "random-qwen2_5_vl", "--device", "cpu", "--frames", "fps=1", "min_pixels=784", "max_pixels=3136")
SMOKE = (ROOT/"params/smoke.yaml").read_text()
ROW = json.loads((WORLD/"heldout.jsonl").read_text().splitlines()[0])


def ground(path, *more, query="a red square moves"): return ["ground", path, query, *(more or FAST)]


def truth(tmp, **change):
    "Preflight of a run on one's own annotations, with one row changed"
    (tmp/"truth.jsonl").write_text(json.dumps(ROW | change) + "\n")
    (tmp/"p.yaml").write_text(SMOKE.replace("tests/data/world/train.jsonl", str(tmp/"truth.jsonl"), 1))
    return ["preflight", tmp/"p.yaml", "--runs", tmp/"runs"]


def score(tmp, truth, preds): return ["score", "vtg", "--truth", file(tmp, truth, "t.jsonl"), "--preds", preds]


def params(tmp, old="", new="", text=None):
    (tmp/"p.yaml").write_text(SMOKE.replace(old, new, 1) if text is None else text)
    return ["run", tmp/"p.yaml", "--runs", tmp/"runs", "--reports", tmp/"reports"]


def file(tmp, data, name="clip.mp4"):
    (tmp/name).write_bytes(data)
    return tmp/name


def sound(tmp):
    with av.open(str(tmp/"song.m4a"), "w") as out:
        s = out.add_stream("aac", rate=44100)
        for i in range(10):
            f = av.AudioFrame.from_ndarray(np.zeros((2, 1024), np.float32), format="fltp", layout="stereo")
            f.sample_rate, f.pts = 44100, i*1024
            out.mux(s.encode(f))
        out.mux(s.encode(None))
    return tmp/"song.m4a"


def damaged(tmp):
    "The pictures of a good file overwritten"
    frames = np.random.default_rng(0).integers(0, 255, (32, 64, 64, 3)).astype(np.uint8)
    data = bytearray(write_mp4(tmp/"clip.mp4", frames, fps=8, g=4).read_bytes())
    with av.open(str(tmp/"clip.mp4")) as c: at = [(p.pos, p.size) for p in c.demux(video=0) if p.size]
    for pos, size in at[4:28]: data[pos + 8:pos + size] = bytes(size - 8)
    return file(tmp, bytes(data))


def folder(tmp, name="model"):
    (tmp/name).mkdir()
    (tmp/name/"config.json").write_text("{}")
    return tmp/name


def torn_ledger(tmp):
    with Ledger(tmp/"predictions.jsonl", dict(a=1)) as o:
        for i in range(3): o.append(dict(qid=f"q{i}", spans=[[0, 1]]))
    text = (tmp/"predictions.jsonl").read_text().replace('"q1"', '"q9"')
    (tmp/"predictions.jsonl").write_text(text)
    return tmp/"predictions.jsonl"


def stage(tmp, name, *values): return ["stage", name, *values, "--run-dir", str(tmp/"by-hand")]


def big_run(tmp, name="charades_qwen2_5_vl_7b"): return ["preflight", ROOT/f"params/{name}.yaml", "--runs", tmp]


def finished(tmp):
    "A stage's result, then the same folder with other parameters"
    args = stage(tmp, "select", f"samples={WORLD/'train.jsonl'}")
    identity = dict(stage="select", params={}, inputs={}, key="0")
    (tmp/"by-hand").mkdir()
    (tmp/"by-hand/identity.json").write_text(json.dumps(identity)); (tmp/"by-hand/SUCCESS").write_text(json.dumps(dict(key="0", code="", outputs={})))
    return args


MISTAKES = {
    "video not there": lambda t: ground("nowhere.mp4"),
    "folder for a video": lambda t: ground(t),
    "picture or text": lambda t: ground(file(t, b"1\n00:00:01,000 --> 00:00:02,000\nhello\n")),
    "sound only": lambda t: ground(sound(t)),
    "half a download": lambda t: ground(file(t, VIDEO.read_bytes()[:VIDEO.stat().st_size//3])),
    "empty file": lambda t: ground(file(t, b"")),
    "playlist": lambda t: ground(file(t, b"#EXTM3U\nhttp://example.org/a.ts\n", "clip.m3u8")),
    "damaged pictures": lambda t: ground(damaged(t)),
    "bare stream": lambda t: ground(bare(t)),
    "empty query": lambda t: ground(VIDEO, query=" "),
    "essay for a query": lambda t: ground(VIDEO, query="and then "*300),
    "frames that contradict": lambda t: ground(VIDEO, *FAST, "max_frames=2"),
    "misspelt setting": lambda t: ground(VIDEO, *FAST, "fsp=2"),
    "no equals sign": lambda t: ground(VIDEO, *FAST, "fps"),
    "no such device": lambda t: ground(VIDEO, "--model", "tiny", "--device", "cuda:99"),
    "weights are pickled": lambda t: ground(VIDEO, "--model", folder(t), "--device", "cpu"),
    "unknown verb": lambda t: ["gruond", VIDEO, "x"],
    "a value behind `vtg run`": lambda t: ["run", "quickstart", "grpo.steps=3"],
    "no params file": lambda t: ["run", "quickstrat"],
    "tab in a params file": lambda t: params(t, text="run: x\nshared:\n\tmodel: tiny\n"),
    "name given twice": lambda t: params(t, text="run: x\nrun: y\n"),
    "misspelt section": lambda t: params(t, "evaluate:", "evalute:"),
    "run named as a path": lambda t: params(t, "run: smoke", "run: ../smoke"),
    "unknown stage": lambda t: ["stage", "trian"],
    "unknown parameter": lambda t: stage(t, "train", "metod=sft"),
    "wrong type": lambda t: stage(t, "train", "pool=3"),
    "misspelt setting of a stage": lambda t: stage(t, "train", "sft={stepz: 1}"),
    "wrong type of a setting": lambda t: stage(t, "train", "grpo={lr: abc}"),
    "stage before its input": lambda t: stage(t, "estimate", f"samples={t}/train.jsonl"),
    "other settings in the same folder": finished,
    "model not fetched": lambda t: big_run(t),
    "big model without a GPU": lambda t: big_run(t),
    "annotations not there": lambda t: big_run(t),
    "span in frames": lambda t: truth(t, spans=[[480, 720]]),
    "span backwards": lambda t: truth(t, spans=[[5, 2]]),
    "video path leads out": lambda t: truth(t, video="../../secret.mp4"),
    "line is not json": lambda t: score(t, b'{"qid": "a"\n', file(t, b"", "p.jsonl")),
    "ledger edited by hand": lambda t: score(t, json.dumps(ROW).encode(), torn_ledger(t)),
    "less than no videos": lambda t: ["world", t/"w", "train_videos=-1"],
}


def bare(tmp):
    with av.open(str(tmp/"clip.h264"), "w", format="h264") as out:
        s = out.add_stream("libx264", rate=8)
        s.height = s.width = 64
        s.pix_fmt = "yuv420p"
        for _ in range(8): out.mux(s.encode(av.VideoFrame.from_ndarray(np.zeros((64, 64, 3), np.uint8), format="rgb24")))
        out.mux(s.encode())
    return tmp/"clip.h264"


def table():
    "name -> (exit code, pattern of what is said) of TROUBLESHOOTING.md"
    out = {}
    for line in (ROOT/"TROUBLESHOOTING.md").read_text().splitlines():
        cells = [c.strip().replace("&#124;", "|") for c in re.split(r"(?<!\\)\|", line)[1:-1]]
        if len(cells) == 5 and cells[4].isdigit() and (m := re.fullmatch(r"`(.+)`", cells[2])):
            out[cells[0]] = int(cells[4]), re.compile(r"[\s\S]*?".join(map(re.escape, m[1].split("…"))))
    return out


def made(name, tmp_path, capsys, monkeypatch):
    "(exit code, everything said) of a mistake"
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path/"hub"))
    monkeypatch.setattr("videotg_r1.preflight.gpus", lambda: [], raising=False)
    try: code = cli.main([str(o) for o in MISTAKES[name](tmp_path)])
    except SystemExit as e: code = e.code
    said = capsys.readouterr()
    return code, said.out + said.err


@pytest.mark.parametrize("name", MISTAKES)
def test_the_message_is_the_one_in_the_table(name, tmp_path, capsys, monkeypatch):
    code, text = made(name, tmp_path, capsys, monkeypatch)
    if os.environ.get("VTG_SHOW_ERRORS"):
        with capsys.disabled(): print(f"\n@@ {name} | {code} | {text.strip()}")
        return
    want, pattern = table()[name]
    assert code == want and pattern.search(text), f"exit {code}, said: {text}"
    assert "Traceback" not in text


def test_two_runs_in_one_folder(tmp_path, capsys):
    with locked(tmp_path/"by-hand"):
        code = f"import sys; from videotg_r1.cli import main; sys.exit(main(['stage', 'select', 'samples={WORLD/'train.jsonl'}', '--run-dir', {str(tmp_path/'by-hand')!r}]))"
        r = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, timeout=120)
    want, pattern = table()["two runs in one folder"]
    assert r.returncode == want and pattern.search(r.stderr), r.stderr


def train_here(name, change, tmp_path, capsys, monkeypatch, samples=WORLD/"train.jsonl"):
    "What a training stage without a kernel says; held against the table"
    def execute(notebook, params, *_):
        pool, (policy, spec) = variants.read_pool(params["samples"], "", "all"), variants.open_model(params["model"], params["frames"], "cpu")
        try: variants.fit("grpo", policy, pool, params["grpo"], tmp_path/"t", {}, "", spec, None)
        except Exception as e: raise stages.StageError(f"train: {type(e).__name__}: {e}") from e
    monkeypatch.setattr(stages, "execute", execute)
    frames = "frames={fps: 1.0, min_pixels: 784, max_pixels: 3136}"
    code = cli.main(list(map(str, stage(tmp_path, "train", f"samples={samples}", f"grpo={change}", frames))))
    text, (want, pattern) = capsys.readouterr().err, table()[name]
    assert code == want and pattern.search(text), text
    return text


def test_a_prompt_that_is_too_long(tmp_path, capsys, monkeypatch):
    text = train_here("prompt too long", "{steps: 1, max_completion_length: 99999}", tmp_path, capsys, monkeypatch)
    assert "an answer of up to 99999" in text


@pytest.mark.filterwarnings("ignore:.*out of memory after step")
def test_memory_that_holds_no_answer(tmp_path, capsys, monkeypatch):
    def full(*a, **k): raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
    monkeypatch.setattr("videotg_r1.grpo.token_logps", full)
    text = train_here("out of GPU memory", "{steps: 1, G: 2, prompts_per_step: 1, max_completion_length: 4}", tmp_path, capsys, monkeypatch)
    assert "Tried to allocate 2.00 GiB" in text


@pytest.mark.filterwarnings("ignore:training. set aside")
def test_a_pool_of_unreadable_videos(tmp_path, capsys, monkeypatch):
    rows = [json.loads(o) | dict(video=str(WORLD/json.loads(o)["video"])) for o in (WORLD/"train.jsonl").read_text().splitlines()]
    rows[0]["video"] = str(file(tmp_path, b"no video"))
    samples = file(tmp_path, "".join(json.dumps(o) + "\n" for o in rows).encode(), "s.jsonl")
    text = train_here("videos of the pool unreadable", "{steps: 6, G: 2, prompts_per_step: 1, max_completion_length: 4}", tmp_path, capsys, monkeypatch, samples)
    assert "1 of 6 samples" in text


def test_a_decoder_that_takes_too_long(tmp_path, capsys, monkeypatch):
    code, text = None, ""
    receive = DecodeWorker._receive
    def slow(self, deadline):
        if self.answers: raise TimeoutError             # it has started, and is asked something
        return receive(self, deadline)
    monkeypatch.setattr(DecodeWorker, "_receive", slow)
    code = cli.main([str(o) for o in ground(VIDEO, *FAST, "--timeout", "1")])
    text = capsys.readouterr().err
    want, pattern = table()["decoding takes too long"]
    assert code == want and pattern.search(text), text


def test_the_table_and_the_tests_name_the_same_mistakes():
    others = {"two runs in one folder", "decoding takes too long", "prompt too long", "out of GPU memory", "videos of the pool unreadable"}
    assert set(table()) == {*MISTAKES, *others} and len(table()) >= 30


def test_help_says_what_the_exit_codes_mean(capsys):
    with pytest.raises(SystemExit): cli.main(["--help"])
    text, doc = capsys.readouterr().out, (ROOT/"TROUBLESHOOTING.md").read_text()
    for code in ("0", "1", "2", "3", "130"): assert re.search(rf"\b{code}\b", text) and f"| {code} |" in doc
    one, row = text.partition("Exit codes:")[2].partition("2 the caller")[0], doc.partition("| 1 |")[2].partition("\n")[0]
    for verb in ("preflight", "data", "merge"): assert verb in one and f"`vtg {verb}`" in row, "these checks end with 1 too"
