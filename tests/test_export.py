"Sharing a model: `vtg export` on a run in miniature, `vtg push` against a stand-in for a hub on 127.0.0.1"
import base64
import hashlib
import json
import os
import re
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from videotg_r1.policy import random_policy, save_policy
from videotg_r1.records import write_jsonl
from videotg_r1.training import seal


def vtg(*argv, **env):
    code = "import sys; from videotg_r1.cli import main; sys.exit(main())"
    r = subprocess.run([sys.executable, "-c", code, *map(str, argv)], capture_output=True, text=True, timeout=120, env=os.environ | env)
    return r.returncode, r.stdout, r.stderr


class Hub(BaseHTTPRequestHandler):
    "The few answers of a hub that an upload needs: create, preupload, LFS batch and PUT, commit"
    def log_message(self, *args): pass

    def answer(self, data, status=200):
        body = json.dumps(data).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def body(self): return self.rfile.read(int(self.headers.get("Content-Length") or 0))

    def do_POST(self):
        hub, body = self.server, self.body()
        hub.seen.append((self.path, self.headers.get("Authorization")))
        here = f"http://127.0.0.1:{hub.server_port}"
        if self.headers.get("Authorization") != "Bearer hf_secret": return self.answer(dict(error="who are you?"), 401)
        if self.path == "/api/repos/create":
            hub.created.append(json.loads(body))
            return self.answer(dict(url=f"{here}/me/model"))
        if self.path == "/api/validate-yaml": return self.answer(dict(errors=[], warnings=[]))
        if "/preupload/" in self.path:
            mode = lambda f: "lfs" if re.search(r"\.(safetensors|parquet)$", f["path"]) else "regular"
            return self.answer(dict(files=[dict(path=f["path"], uploadMode=mode(f), shouldIgnore=False) for f in json.loads(body)["files"]]))
        if self.path.endswith("/info/lfs/objects/batch"):
            objects = [dict(oid=o["oid"], size=o["size"], actions=dict(upload=dict(href=f"{here}/lfs/{o['oid']}"))) for o in json.loads(body)["objects"]]
            return self.answer(dict(transfer="basic", objects=objects))
        if "/commit/" in self.path:
            for line in map(json.loads, body.splitlines()):
                value = line["value"]
                if line["key"] == "file": hub.files[value["path"]] = base64.b64decode(value["content"])
                if line["key"] == "lfsFile": hub.files[value["path"]] = hub.blobs[value["oid"]]
            return self.answer(dict(commitUrl=f"{here}/me/model/commit/{'1'*40}", commitOid="1"*40))
        return self.answer(dict(error=f"the stand-in does not know {self.path}"), 404)

    def do_PUT(self):
        data = self.body()
        self.server.blobs[self.path.rsplit("/", 1)[1]] = data
        assert hashlib.sha256(data).hexdigest() == self.path.rsplit("/", 1)[1]
        self.answer({})


@pytest.fixture
def hub():
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    server.seen, server.created, server.files, server.blobs = [], [], {}, {}
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield server
    server.shutdown()
    server.server_close()
    thread.join()


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    "A finished run with one training, written by hand"
    folder = tmp_path_factory.mktemp("runs")/"toy"
    origin = dict(commit="0"*40, dirty=True, versions={"torch": "2"}, python="3.11", machine="a machine", gpu=None, command="vtg run toy", seeds={},
                  attempts=[dict(started=1., status="ok", wall_s=2.)])
    def stage(name, params, metrics):
        (folder/name).mkdir(parents=True)
        for k, v in dict(params=params, metrics=metrics, run=origin, compute={}).items(): (folder/name/f"{k}.json").write_text(json.dumps(v))
        (folder/name/"SUCCESS").write_text('{"code": "c"}')
        return folder/name
    train = stage("train-sft", dict(method="sft", model="/data/weights/Qwen2.5-VL-3B-Instruct", pool="all", sft=dict(steps=2)), dict(n=6, steps=2))
    save_policy(random_policy("qwen2_5_vl", 0), train/"training/final")
    seal(train/"training/final", {})
    (train/"training/history.jsonl").write_text('{"step": 1}\n')
    metrics = dict(n=2, videos=2, mIoU=.5, lo=.1, hi=.9, misses=1, **{f"R1@{m}": .5 for m in (.3, .5, .7)})
    judged = stage("evaluate-sft", {}, metrics)
    write_jsonl(judged/"scores.jsonl", [dict(qid="a", vid="v", iou=1.), dict(qid="b", vid="w", iou=0.)])
    from videotg_r1.ledger import Ledger
    with Ledger(judged/"predictions.jsonl", dict(stage="evaluate")) as ledger: ledger.append(dict(qid="a", raw="<img src=x onerror=alert(1)>", spans=[[0., 1.]]))
    return folder


@pytest.fixture(scope="module")
def exported(run, tmp_path_factory):
    to = tmp_path_factory.mktemp("out")/"model"
    code, out, err = vtg("export", "toy", "--to", to, "--runs", run.parent)
    assert code == 0 and str(to) in out, err
    return to


def test_export_has_model_card_and_results(exported):
    names = {str(p.relative_to(exported)) for p in exported.rglob("*") if p.is_file()}
    assert {"README.md", "config.json", "model.safetensors", "tokenizer.json", "results/queries.jsonl", "results/queries.parquet", "results/table.json",
            "training.jsonl", "export.json"} <= names
    card = (exported/"README.md").read_text()
    assert card.startswith("---\n") and "license: \"other\"\n" in card and "license_name: \"qwen-research\"" in card, "the 3B keeps the licence of its base"
    for part in ("Base", "Data", "Method", "Numbers", "Limits", "Use", "Origin"): assert f"\n## {part}\n" in card
    assert "| **this model** | 2 | 0.500 | [0.100, 0.900] |" in card and "with uncommitted changes" in card


def test_export_says_nothing_about_the_machine(exported, run):
    for p in exported.rglob("*"):
        if p.suffix in (".md", ".json", ".jsonl"):
            text = p.read_text()
            assert "/data/weights" not in text and str(run.parent) not in text and str(Path.home()) + "/" not in text, p.name


def test_rows_of_the_table_and_of_the_queries_agree(exported):
    import pandas as pd
    rows = [json.loads(o) for o in (exported/"results/queries.jsonl").read_text().splitlines()]
    table = {r["key"]: r for r in json.loads((exported/"results/table.json").read_text())}
    assert sum(r["iou"] for r in rows)/len(rows) == table["sft"]["mIoU"] == .5
    assert pd.read_parquet(exported/"results/queries.parquet").qid.tolist() == [r["qid"] for r in rows] == ["a", "b"]
    assert rows[1]["spans"] is None and rows[0]["spans"] == [[0., 1.]] and "query" not in rows[0], "sentences belong to the data set"


def test_exported_weights_are_those_that_were_trained(exported, run):
    assert (exported/"model.safetensors").read_bytes() == (run/"train-sft/training/final/model.safetensors").read_bytes()


def test_mistakes_are_one_line(run, exported, tmp_path, capsys):
    from videotg_r1.cli import main
    for argv, words in ((("export", "nobody", "--to", tmp_path/"x", "--runs", run.parent), "there are toy"),
                        (("export", "toy", "--to", tmp_path/"x", "--runs", run.parent, "--variant", "grpo"), "choose one of sft"),
                        (("export", "toy", "--to", exported, "--runs", run.parent), "--force"),
                        (("push", tmp_path, "me/model"), "is no export"), (("push", exported, "model"), "owner/name")):
        code = main([*map(str, argv)])
        err = capsys.readouterr().err
        assert code == 2 and words in err and len(err.strip().splitlines()) == 1, err
    assert not (tmp_path/"x").exists()


def test_push_puts_every_file_on_the_hub_and_keeps_it_private(exported, hub, tmp_path):
    env = dict(HF_TOKEN="hf_secret", HF_HUB_OFFLINE="0", HF_HUB_DISABLE_XET="1", HF_HUB_DISABLE_PROGRESS_BARS="1", HF_HOME=str(tmp_path))
    endpoint = f"http://127.0.0.1:{hub.server_port}"
    code, out, err = vtg("push", exported, "me/model", "--endpoint", endpoint, **env)
    assert code == 0 and f"{endpoint}/me/model/commit/" in out, err
    assert len(hub.created) == 1 and "private" in (hub.created[0].get("visibility"), hub.created[0].get("private") and "private")
    want = {str(p.relative_to(exported)): p.read_bytes() for p in exported.rglob("*") if p.is_file()}
    assert {k: v for k, v in hub.files.items() if k != ".gitattributes"} == want
    assert len(hub.blobs) == 2, "weights and parquet went as large files"
    assert vtg("push", exported, "me/model", "--endpoint", endpoint, "--public", **env)[0] == 0 and "private" not in json.dumps(hub.created[1])


def test_push_refused_offline_or_nameless_is_one_line(exported, hub, tmp_path):
    env = dict(HF_HUB_DISABLE_XET="1", HF_HOME=str(tmp_path), HF_TOKEN_PATH=str(tmp_path/"none"))
    endpoint = f"http://127.0.0.1:{hub.server_port}"
    for more, words in ((dict(HF_TOKEN="hf_secret", HF_HUB_OFFLINE="1"), "HF_HUB_OFFLINE"), (dict(HF_TOKEN="", HF_HUB_OFFLINE="0"), "hf auth login"),
                        (dict(HF_TOKEN="hf_wrong", HF_HUB_OFFLINE="0"), "the hub refused")):
        code, out, err = vtg("push", exported, "me/model", "--endpoint", endpoint, **env, **more)
        assert code == 2 and words in err and len(err.strip().splitlines()) == 1, err
        assert "hf_" not in err.replace("hf_xet", ""), "a token is never shown"
    assert not hub.files


def test_doctor_says_each_part_and_finds_nothing_missing_here(capsys):
    from videotg_r1.cli import main
    code = main(["doctor"])
    out = capsys.readouterr().out
    assert code == 0, out
    for what in ("python", "packages", "kernel", "memory", "disk", "decoder", "GPU", "model"): assert re.search(rf"^(ok|note) +{what} ", out, re.M), out
