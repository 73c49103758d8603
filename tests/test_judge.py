"A judge behind a server that is slow, that fails, and that lies; and the agents that ask it"
import base64
import io
import json
import math
import os
import socket
import struct
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest
from PIL import Image

from videotg_r1.batches import ask_answers, ask_further, ask_yes
from videotg_r1.difficulty import DifficultyConfig, estimate
from videotg_r1.evaluation import EvalConfig, predict
from videotg_r1.judge import Judge, JudgeConfig, JudgeError
from videotg_r1.ledger import Ledger, merge_ledgers, read_ledger
from videotg_r1.policy import encode
from videotg_r1.prompts import exists_prompt, vtg_prompt
from videotg_r1.records import Sample
from videotg_r1.reflection import ReflectConfig, reflect
from videotg_r1.variants import open_ledger
from videotg_r1.video import Clip, FrameSpec

KEY = "sesame-open-4711"


def white_times(content):
    "What the server sees: the times in front of white pictures"
    light = lambda url: np.asarray(Image.open(io.BytesIO(base64.b64decode(url.partition(",")[2])))).mean() > 128
    return [float(a["text"].removesuffix(" s")) for a, b in zip(content, content[1:], strict=False) if b["type"] == "image_url" and light(b["image_url"]["url"])]


class Handler(BaseHTTPRequestHandler):
    def log_message(self, *_): pass

    def send(self, data, code=200, size=None, **headers):
        self.send_response(code)
        for k, v in (headers | {"Content-Length": size or len(data)}).items(): self.send_header(k.replace("_", "-"), str(v))
        self.end_headers()
        self.wfile.write(data)

    def do_POST(self):
        s = self.server
        body = self.rfile.read(int(self.headers["Content-Length"]))
        with s.lock:
            s.bodies.append(body); s.keys.append(self.headers["Authorization"]); s.times.append(time.monotonic())
            mode = s.modes.pop(0) if s.modes else s.usual
        getattr(self, mode)(json.loads(body))

    def ok(self, asked, n=None, logprobs=True, answer=None):
        content = asked["messages"][0]["content"]
        seen, p = white_times(content), None
        if content[-1]["text"].startswith("Does"): text, p = ("Yes", .9) if seen else ("No", .1)
        else: text = answer or (f"<answer>{min(seen)} to {max(seen) + 1}</answer>" if seen else "<answer>none</answer>")
        top = [dict(token=k, logprob=math.log(v)) for k, v in (("Yes", p), ("No", 1 - p))] if p else []
        choice = dict(message=dict(content=text)) | (dict(logprobs=dict(content=[dict(top_logprobs=top)])) if p and logprobs else {})
        n = asked["n"] if n is None else n
        self.send(json.dumps(dict(choices=[choice]*n, usage=dict(prompt_tokens=50, completion_tokens=4*n))).encode())

    def slow(self, asked): self.server.released.wait(20)
    def drip(self, asked):
        self.send(b"", size=10**6)
        while not self.server.released.wait(.02): self.wfile.write(b" ")
    def meet(self, asked):
        s = self.server
        with s.lock: s.at_once += 1; s.most = max(s.most, s.at_once)
        s.barrier.wait(20)
        with s.lock: s.at_once -= 1 # before the reply, which lets the next one come
        self.ok(asked)
    def http500(self, asked): self.send(b"CUDA error", 500)
    def http429(self, asked): self.send(b"slow down", 429, Retry_After="0.3")
    def http429_long(self, asked): self.send(b"slow down", 429, Retry_After="86400")
    def http400(self, asked): self.send(f"context too long; your key was {KEY}".encode(), 400)
    def http302(self, asked): self.send(b"", 302, Location=f"http://127.0.0.1:{self.server.server_port}/elsewhere")
    def html(self, asked): self.send(b"<html>Bad Gateway</html>")
    def half(self, asked): self.send(b'{"choices": [{"message": {"con', size=500)
    def reset(self, asked):
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.connection.close()
    def none(self, asked): self.ok(asked, n=0)
    def single(self, asked): self.ok(asked, n=1)
    def many(self, asked): self.ok(asked, n=asked["n"] + 5)
    def no_logprobs(self, asked): self.ok(asked, logprobs=False)
    def nonsense(self, asked): self.send(json.dumps(dict(choices=[dict(message=dict(content="As a model, I"))]*asked["n"], usage="much")).encode())
    def outside(self, asked): self.ok(asked, answer="<answer>50.0 to 40.0; 90.0 to 95.0; 8.0 to 4000.0</answer>")


class Server(ThreadingHTTPServer):
    daemon_threads = True
    def handle_error(self, *_): pass # clients that gave up


@pytest.fixture
def server():
    s = Server(("127.0.0.1", 0), Handler)
    s.bodies, s.keys, s.times, s.modes, s.usual, s.lock, s.at_once, s.most = [], [], [], [], "ok", threading.Lock(), 0, 0
    s.released, s.barrier = threading.Event(), threading.Barrier(3)
    s.url = f"http://127.0.0.1:{s.server_port}/v1"
    thread = threading.Thread(target=s.serve_forever, args=(.02,), daemon=True)
    thread.start()
    yield s
    s.released.set()
    s.shutdown()
    s.server_close()


def judge_of(server, folder="", env=None, **given):
    return Judge(JudgeConfig(**dict(dict(url=server.url, model="big", wait_s=.01, timeout_s=20., concurrency=4), **given)), folder, env)

def flashes(*at, n=10):
    frames = np.zeros((n, 28, 28, 3), np.uint8)
    frames[list(at)] = 255
    return Clip(frames=frames, frame_ts=np.arange(float(n)), duration_s=float(n), fps=1., path="", decoder="")

def exists(judge, *clips): return [encode(judge, c, exists_prompt("a flash")) for c in clips]


def test_what_passes_is_tried_again(server):
    server.modes = ["http500", "http429", "reset", "half", "html", "none"]
    with judge_of(server, tries=7) as judge:
        assert ask_yes(judge, exists(judge, flashes(2)))[0] == pytest.approx([.9])
        assert (judge.spent["requests"], judge.spent["failed"]) == (7, 6)
    assert server.times[2] - server.times[1] >= .3, "not before the time that the server named"


def test_what_does_not_pass_ends_at_once_and_keeps_the_key(server):
    for mode in ("http400", "http302"):
        server.modes = [mode]
        with judge_of(server, key_env="JUDGE_KEY", env=dict(JUDGE_KEY=KEY)) as judge:
            with pytest.raises(JudgeError, match=f"refuses big .HTTP {mode[4:]}") as e: ask_yes(judge, exists(judge, flashes(2)))
            assert KEY not in str(e.value) and judge.spent["requests"] == 1
    assert server.keys == [f"Bearer {KEY}"]*2, "sent to the server itself, never to where it points"


def test_a_server_that_wants_a_day_is_given_up(server):
    server.usual = "http429_long"
    with judge_of(server) as judge, pytest.raises(JudgeError, match="asks to wait 86400 s"): ask_yes(judge, exists(judge, flashes(2)))


@pytest.mark.parametrize("mode", ["slow", "drip"])
def test_late_is_late_however_it_comes(server, mode):
    server.usual = mode
    with judge_of(server, timeout_s=.2, tries=2) as judge, pytest.raises(JudgeError, match="no usable reply in 2 tries .*timed out"):
        ask_yes(judge, exists(judge, flashes(2)))
    assert len(server.bodies) == 2


def test_no_more_at_a_time_than_allowed(server):
    server.usual = "meet" # nobody is answered before three have come
    with judge_of(server, concurrency=3) as judge: ask_yes(judge, exists(judge, *(flashes(i) for i in range(9))))
    assert (server.most, len(server.bodies)) == (3, 9)


def test_no_more_a_minute_than_allowed(server):
    began = time.monotonic()
    with judge_of(server, per_minute=1200) as judge: ask_yes(judge, exists(judge, *(flashes(i) for i in range(8))))
    assert time.monotonic() - began >= 7*.05


def test_a_judge_that_is_closed_wakes_those_who_wait(server):
    server.usual = "http500"
    judge = judge_of(server, wait_s=50., tries=2)
    asks = exists(judge, flashes(2))
    threading.Timer(.3, judge.close).start()
    with pytest.raises(JudgeError, match="closed"): ask_yes(judge, asks)


def test_wrong_numbers_of_choices_are_made_right(server):
    with judge_of(server) as judge:
        asks = [encode(judge, flashes(2), vtg_prompt("a flash"))]
        server.usual = "single"
        texts, tokens, costs = ask_answers(judge, asks, G=3, seed=[7])
        assert texts == [["<answer>2.0 to 3.0</answer>"]*3] and sum(tokens[0]) == costs[0].generated_tokens == 12
        assert [json.loads(b)["seed"] for b in server.bodies] == [7, 8, 9] and [json.loads(b)["n"] for b in server.bodies] == [3, 2, 1]
        server.usual = "many"
        assert [len(t) for t in ask_further(judge, asks, [0], [], G=2, seed=[7])[0]] == [2]
        server.bodies.clear()
        assert len(ask_answers(judge, asks, G=4, greedy=True, seed=[7])[0][0]) == 4 and len(server.bodies) == 1


def test_votes_where_there_are_no_logprobs(server):
    server.usual = "no_logprobs"
    with judge_of(server, votes=4) as judge:
        assert ask_yes(judge, exists(judge, flashes(2), flashes()))[0] == [1., 0.]
        assert [judge.spent[k] for k in ("votes", "neither", "requests")] == [8, 0, 4]
    server.usual = "nonsense"
    with judge_of(server, votes=4, yes="votes") as judge:
        assert ask_yes(judge, exists(judge, flashes(2)))[0] == [.5], "it said nothing either way"
        with pytest.warns(RuntimeWarning, match="4 of 4 votes were neither"): assert judge.bill(dict(prompt_tokens=0, generated_tokens=0))["neither"] == 4


def test_kept_answers_are_believed_when_whole(server, tmp_path):
    with judge_of(server, tmp_path) as judge: ask_yes(judge, exists(judge, flashes(1), flashes(2)))
    kept = sorted(tmp_path.rglob("*.json"))
    assert len(kept) == 2
    kept[0].write_text('{"texts": ["Ye')
    with judge_of(server, tmp_path) as judge:
        assert ask_yes(judge, exists(judge, flashes(1), flashes(2)))[0] == pytest.approx([.9, .9])
        assert [judge.spent[k] for k in ("requests", "cached", "damaged")] == [1, 1, 1]
    with judge_of(server, tmp_path, model="other") as judge: # another model, another answer
        ask_yes(judge, exists(judge, flashes(1)))
        assert judge.spent["requests"] == 1


# the agents: every video is black with flashes; half of the samples have one flash outside their annotation
CLIPS = {f"/{i}": flashes(2, *([7] if i % 2 else []), n=10) for i in range(8)}
SAMPLES = [Sample(qid=f"q{i}", vid=str(i), video=f"/{i}", duration_s=10., query="a flash", spans=((2., 3.),)) for i in range(8)]
SPEC = FrameSpec(fps=1.)
CFG = ReflectConfig(k=2, threshold=.5, margin_s=0., show_margin_s=0., batch_size=3)


def test_reflection_by_a_judge(server, tmp_path):
    with judge_of(server) as judge:
        with open_ledger(tmp_path/"r.jsonl", "reflect", judge, CFG, SPEC, SAMPLES) as ledger:
            spent = reflect(judge, SAMPLES, CFG, ledger, read=CLIPS.get, progress=False)
            rows = {r["qid"]: r for r in ledger.rows()}
        assert [rows[s.qid]["verdict"] for s in SAMPLES] == ["keep", "partial"]*4
        assert rows["q1"]["proposals"] == [dict(span=[7., 8.], votes=2, p_event=.9)]
        assert spent.prompts == 4*2 + 4*4 and judge.bill(spent.to_dict())["requests"] == spent.prompts and spent.prompt_tokens == 50*spent.prompts
        assert judge.media.made == 2, "a black frame and a white one, each encoded once"
    with judge_of(server, url="http://127.0.0.1:9/v2") as moved, open_ledger(tmp_path/"r.jsonl", "reflect", moved, CFG, SPEC, SAMPLES) as ledger:
        assert len(ledger) == 8, "the same judge at another address"
    with judge_of(server, model="other") as other, pytest.raises(ValueError, match="big -> other|'big' -> 'other'"):
        open_ledger(tmp_path/"r.jsonl", "reflect", other, CFG, SPEC, SAMPLES)


def test_broken_off_and_called_again_nothing_is_asked_twice(server, tmp_path):
    def go(name, judge):
        with Ledger(tmp_path/name, dict(a=1)) as ledger:
            reflect(judge, SAMPLES, CFG, ledger, read=CLIPS.get, progress=False)
            return [{k: v for k, v in r.items() if k != "compute"} for r in ledger.rows()]
    with judge_of(server) as judge: whole = go("whole.jsonl", judge)
    server.bodies.clear()
    server.modes = ["ok"]*5
    server.usual = "http400"
    with judge_of(server, tmp_path/"kept", concurrency=1, key_env="K", env=dict(K=KEY)) as judge, pytest.raises(JudgeError): go("part.jsonl", judge)
    done = server.bodies[:5]
    server.bodies.clear()
    server.usual = "ok"
    with judge_of(server, tmp_path/"kept", concurrency=1, key_env="K", env=dict(K=KEY)) as judge: assert go("part.jsonl", judge) == whole
    assert not {*done} & {*server.bodies} and len(server.bodies) == len({*server.bodies})
    for p in tmp_path.rglob("*"): assert not p.is_file() or KEY.encode() not in p.read_bytes()


def test_spans_that_no_video_has_are_cut_or_left_out(server, tmp_path):
    server.usual = "outside"
    with judge_of(server) as judge, Ledger(tmp_path/"r.jsonl", dict(a=1)) as ledger:
        reflect(judge, SAMPLES[1:2], CFG, ledger, read=CLIPS.get, progress=False)
        assert [o["span"] for o in ledger.rows()[0]["proposals"]] == [[8., 10.]]


def test_estimation_and_evaluation_by_a_judge_in_two_parts(server, tmp_path):
    for agent, cfg in ((estimate, DifficultyConfig), (predict, EvalConfig)):
        parts = []
        for i in (0, 1):
            own = cfg(fold_size=2, fold_index=i)
            with judge_of(server) as judge, open_ledger(tmp_path/f"{agent.__name__}{i}.jsonl", agent.__name__, judge, own, SPEC, SAMPLES) as ledger:
                agent(judge, SAMPLES, own, ledger, read=CLIPS.get, progress=False)
                parts.append(ledger.path)
        out = tmp_path/f"{agent.__name__}.jsonl"
        assert merge_ledgers(parts, out, [s.qid for s in SAMPLES]) == dict(rows=8, twice=0, missing=[], absent=[])
        with judge_of(server) as judge, open_ledger(out, agent.__name__, judge, cfg(), SPEC, SAMPLES) as ledger: assert len(ledger) == 8
    rows = {r["qid"]: r for r in read_ledger(tmp_path/"estimate.jsonl")[1]}
    assert rows["q0"]["difficulty"] == 0. and rows["q1"]["mean_iou"] == pytest.approx(1/6, abs=1e-3) # 2 to 8 against 2 to 3


@pytest.mark.skipif("VTG_JUDGE_URL" not in os.environ, reason="asks a real server: set VTG_JUDGE_URL (http://127.0.0.1:8000/v1) and VTG_JUDGE_MODEL (its name there)")
@pytest.mark.parametrize("yes", ["logprobs", "votes"])
def test_a_real_server_answers_both_agents(tmp_path, yes):
    "Protocol and counting, not wisdom: vLLM, SGLang, `transformers serve`, whatever is meant to judge"
    given = dict(url=os.environ["VTG_JUDGE_URL"], model=os.environ["VTG_JUDGE_MODEL"], yes=yes, votes=3, tries=2, concurrency=2, send=os.environ.get("VTG_JUDGE_SEND", "frames"))
    clips = {k: flashes(2, *([7] if "1" in k else [])) for k in ("/0", "/1")}
    for again in (False, True): # the second time from the answers that were kept
        with Judge(JudgeConfig(**given), tmp_path/"kept") as judge, Ledger(tmp_path/f"{again}.jsonl", dict(a=1)) as ledger:
            reflect(judge, SAMPLES[:2], CFG, ledger, read=clips.get, progress=False)
            rows = [{k: v for k, v in r.items() if k != "compute"} for r in ledger.rows()]
            assert {r["qid"] for r in rows} == {"q0", "q1"} and all(0 <= o["p_event"] <= 1 for r in rows for o in r["proposals"])
            asked = exists(judge, clips["/1"])
            (p,), (cost,) = ask_yes(judge, asked)
            texts, lengths, _costs = ask_answers(judge, asked, G=3, max_new_tokens=16, seed=[4])
            assert 0 <= p <= 1 and len(texts[0]) == 3 and cost.prompt_tokens > 0 and sum(lengths[0]) > 0
        if not again: first = rows, p, texts, judge.spent["requests"]
    assert (rows, p, texts, 0) == (*first[:3], judge.spent["requests"]) and first[3] > 0
