"What breaks from outside: kills and full disks at every write of training, signals, damaged files, numbers that are none, locked folders"
import ast
import json
import os
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from test_training import gap, make_samples, rows_of, run, settings, spec_for, stop_at, strip

from videotg_r1 import cli, grpo, sft, stages
from videotg_r1.grpo import train_grpo
from videotg_r1.ledger import locked, read_ledger
from videotg_r1.policy import random_policy
from videotg_r1.records import read_jsonl, write_atomic
from videotg_r1.sft import SFTSettings, train_sft
from videotg_r1.training import checkpoints, seal
from videotg_r1.video import FrameCache

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    folder = tmp_path_factory.mktemp("world")
    return make_samples(folder), FrameCache(folder/"cache", 10**8)


# ---------------------------------------------------------------- every write of a training run
POINTS = """
import json, os, random, shutil, signal, sys
from pathlib import Path
sys.path[:0] = [{root!r}, {here!r}]
import test_training as t
from videotg_r1.grpo import grpo_trainer_class
from videotg_r1.policy import random_policy
from videotg_r1.sft import SFTSettings, sft_trainer_class, train_sft
from videotg_r1 import sft
from videotg_r1.torture import die_at, fail_at, in_child
from videotg_r1.training import weights_digest

folder, rng, out = Path({folder!r}), random.Random({seed}), []
grpo_trainer_class(); sft_trainer_class()          # TRL is loaded once, before the children are born
world = t.make_samples(folder), t.FrameCache(folder/"cache", 10**8)

def train(kind, family, where):
    if kind == "grpo":
        cfg = t.settings(steps=3, save_steps=1, schedule="linear", warmup_steps=1, prompts_per_step=4)
        policy, done = t.run(world, where, cfg, family, t.hard(schedule="adaptive")[0])
    else:
        policy = random_policy(family)
        cfg = SFTSettings(steps=3, batch_size=2, lr=1e-2, save_steps=1, lora_r=2, lora_dropout=.2, freeze_vision=True)
        done = train_sft(policy, world[0], cfg, where, frame_spec=t.spec_for(policy), cache=world[1], progress=False)
    return dict(weights=weights_digest(policy.model), rows=t.strip(t.rows_of(done)), left=sorted(p.name for p in where.iterdir()))

loss = sft.VideoSFT.compute_loss
def signalled(self, *a, **k):
    if self.state.global_step == 1: signal.raise_signal(signal.SIGTERM)
    return loss(self, *a, **k)

for kind, family in {pairs}:
    calm = in_child(lambda: train(kind, family, folder/f"{{kind}}-{{family}}"), folder/f"{{kind}}-{{family}}")
    for how in ("die", "full", "term"):
        at, where = rng.randint(2, calm["writes"] - 1), folder/f"{{kind}}-{{family}}-{{how}}"
        work = lambda: train(kind, family, where)
        if how == "die": first = die_at(work, where, at)
        elif how == "full": first = fail_at(work, where, at)
        else: first = in_child(work, where, at, lambda: os.kill(os.getpid(), signal.SIGTERM))
        again = in_child(work, where)
        out.append(dict(run=where.name, at=at, of=calm["writes"], first=first, equal=again.get("result") == calm["result"], again=again, calm=calm["result"]))
    if kind == "sft":
        where = folder/f"{{kind}}-{{family}}-mid"
        sft.VideoSFT.compute_loss = signalled
        first = in_child(work, where)
        sft.VideoSFT.compute_loss = loss
        kept = sorted(p.name for p in where.glob("checkpoint-*"))
        again = in_child(work, where)
        out.append(dict(run=where.name, at=0, of=0, first=first, equal=again.get("result") == calm["result"], again=again, kept=kept, calm=calm["result"]))
print(json.dumps(out))
"""


PAIRS = (("sft", "qwen3_vl"), ("grpo", "qwen2_5_vl"), ("grpo", "qwen3_vl"), ("sft", "qwen2_5_vl"))


def test_training_ends_the_same_whatever_write_it_was_struck_at(tmp_path):
    pairs = PAIRS if os.environ.get("VTG_ALL") else PAIRS[:2]       # the others resume in test_training
    code = POINTS.format(root=str(ROOT), here=str(ROOT/"tests"), folder=str(tmp_path), seed=int(os.environ.get("VTG_SEED", 0)), pairs=pairs)
    r = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert r.returncode == 0, r.stderr
    found = json.loads(r.stdout.splitlines()[-1])
    assert len(found) == 3*len(pairs) + sum(kind == "sft" for kind, _ in pairs)
    for o in found:
        assert o["equal"], o
        how = o["run"].rsplit("-", 1)[1]
        if how == "die": assert o["first"] == {}, o
        if how == "mid": assert "Interrupted: training: stopped by SIGTERM after step 2 of 3" in o["first"]["error"] and "checkpoint-2" in o["kept"], o
        said, done = o["first"].get("error", ""), o["first"].get("result") == o["calm"]
        if how == "full": assert "No space left" in said or done, o
        if how == "term": assert "Interrupted" in said or done or o["first"] == {}, o      # {}: it came before or after the steps


# ---------------------------------------------------------------- damage
def train(world, where, policy=None, **kw):
    policy = policy or random_policy("qwen3_vl")
    accept = kw.pop("accept", ())
    cfg = SFTSettings(**{**dict(steps=4, batch_size=2, lr=1e-2, save_steps=2, warmup_steps=1), **kw})
    out = train_sft(policy, world[0], cfg, where, frame_spec=spec_for(policy), cache=world[1], progress=False, accept=accept)
    return policy, out


class Stop(Exception): pass


def stopped(world, where, monkeypatch, step=3, **kw):
    "A run that ended in the middle"
    loss = sft.VideoSFT.compute_loss
    def stopping(self, *a, **k):
        if self.state.global_step == step: raise Stop
        return loss(self, *a, **k)
    with monkeypatch.context() as m, pytest.raises(Stop):
        m.setattr(sft.VideoSFT, "compute_loss", stopping)
        train(world, where, **kw)


@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.pt", "trainer_state.json"])
def test_a_damaged_checkpoint_falls_back_loudly(world, tmp_path, monkeypatch, name):
    ours, out = train(world, tmp_path/"a", save_steps=1)
    stopped(world, tmp_path/"b", monkeypatch, save_steps=1)
    assert sorted(checkpoints(tmp_path/"b")) == [2, 3]
    path = tmp_path/"b/checkpoint-3"/name
    data = bytearray(path.read_bytes()); data[len(data)//2] ^= 1; path.write_bytes(data)   # one bit
    with pytest.warns(RuntimeWarning, match=f"checkpoint-3/{name} is not what was written.*step 2"): again, out2 = train(world, tmp_path/"b", save_steps=1)
    assert out2["resumed_from"] == 2 and out2["damaged"] == [f"checkpoint-3/{name}"]
    assert gap(ours, again) == 0 and strip(rows_of(out)) == strip(rows_of(out2))


def test_a_damaged_final_is_trained_again(world, tmp_path):
    ours, out = train(world, tmp_path, steps=2)
    path = tmp_path/"final/model.safetensors"
    data = bytearray(path.read_bytes()); data[-1] ^= 1; path.write_bytes(data)
    with pytest.warns(RuntimeWarning, match="training again"): again, _ = train(world, tmp_path, steps=2)
    assert gap(ours, again) == 0


def test_what_a_fault_after_the_end_left_is_removed_by_the_next_call(world, tmp_path):
    "final is there, and the disk fills up or the process dies before the checkpoints are gone"
    _, out = train(world, tmp_path, steps=2)
    for step, whole in ((1, True), (2, False)):
        (tmp_path/f"checkpoint-{step}").mkdir(); (tmp_path/f"checkpoint-{step}/w").write_bytes(b"x")
        if whole: seal(tmp_path/f"checkpoint-{step}", dict(step=step))
    _, again = train(world, tmp_path, steps=2)
    assert again == out and not list(tmp_path.glob("checkpoint-*"))


def test_a_history_that_was_edited_is_refused_with_its_line(world, tmp_path, monkeypatch):
    stopped(world, tmp_path, monkeypatch)
    path = tmp_path/"history.jsonl"
    path.write_bytes(path.read_bytes().replace(b'"step": 2', b'"step": 7'))
    with pytest.raises(ValueError, match="history.jsonl, line 2: damaged"): train(world, tmp_path)


# ---------------------------------------------------------------- two owners, other settings
def test_a_second_training_of_one_folder_names_the_first(world, tmp_path):
    with locked(tmp_path/"run"), pytest.raises(ValueError, match=f"process {os.getpid()} is at work in it"):
        train(world, tmp_path/"run")


def test_changed_settings_go_on_only_where_named(world, tmp_path, monkeypatch):
    stopped(world, tmp_path, monkeypatch)
    with pytest.raises(ValueError, match="settings.grad_accum: 1 -> 2.*name it in accept"): train(world, tmp_path, grad_accum=2)
    ours, out = train(world, tmp_path, grad_accum=2, accept=["settings.grad_accum"])
    assert out["resumed_from"] == 2 and json.loads((tmp_path/"run.json").read_text())["changed"] == ["settings.grad_accum: 1 -> 2"]
    whole, _ = train(world, tmp_path/"whole")
    assert gap(ours, whole) < 1e-5
    with pytest.raises(ValueError, match="is finished, so nothing is left to change"): train(world, tmp_path, lr=1., accept=["settings"])


# ---------------------------------------------------------------- numbers that are none
def poison(monkeypatch, bad, value=float("nan")):
    "A loss that is not a number at some steps"
    loss = sft.VideoSFT.compute_loss
    def poisoned(self, *a, **k):
        out = loss(self, *a, **k)
        return out*value if self.state.global_step in bad else out
    monkeypatch.setattr(sft.VideoSFT, "compute_loss", poisoned)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_an_update_that_is_not_finite_is_left_out_and_counted(world, tmp_path, monkeypatch, value):
    with monkeypatch.context() as m:
        poison(m, {1}, value)
        ours, out = train(world, tmp_path, steps=3, save_steps=1)
    rows = rows_of(out)
    assert [r["skipped_updates"] for r in rows] == [0, 1, 0] and rows[2]["total/skipped_updates"] == 1
    assert rows[1]["loss"] is None and all(r["loss"] > 0 for r in (rows[0], rows[2]))
    assert all(torch.isfinite(p).all() for p in ours.model.parameters()) and gap(ours, random_policy("qwen3_vl")) > 0


def test_three_in_a_row_end_the_run_with_good_weights(world, tmp_path, monkeypatch):
    with monkeypatch.context() as m, pytest.raises(FloatingPointError, match="3 steps in a row"):
        poison(m, {2, 3, 4})
        train(world, tmp_path/"b", steps=6, save_steps=1)
    assert [r["step"] for r in read_jsonl(tmp_path/"b/history.jsonl")] == [1, 2, 3, 4]
    ours, _ = train(world, tmp_path/"a", steps=6, save_steps=1)
    kept = torch.load(checkpoints(tmp_path/"b")[4]/"optimizer.pt", weights_only=True)["state"]
    assert all(torch.isfinite(o["exp_avg"]).all() and o["step"] == 2 for o in kept.values())


def test_rewards_that_cannot_be_used_are_counted(world, tmp_path):
    def odd(text, s): return dict(q0=float("nan"), q1=None, q2=2.).get(s.qid, len(text)/100)
    odd.range = (0., 1.)
    policy = random_policy()
    out = train_grpo(policy, world[0], settings(steps=1, prompts_per_step=4, rewards={"odd": 1.}), tmp_path, frame_spec=spec_for(policy),
                     cache=world[1], reward_fns={"odd": odd}, progress=False)
    row = rows_of(out)[0]
    assert row["rewards/odd/refused"] == .5 and row["groups/unscorable"] == .75 and row["reward_std"] > 0
    assert row["completions/clipped_ratio"] > 0


def test_a_prompt_beyond_the_context_is_named(world, tmp_path):
    policy = random_policy()
    policy.model.config.get_text_config().max_position_embeddings = 60
    with pytest.raises(ValueError, match="qid q[0-3]: a prompt of .* do not fit the context of 60 tokens: lower fps"):
        run(world, tmp_path, settings(steps=1), policy=policy)


# ---------------------------------------------------------------- videos that cannot be read
def with_broken(world, tmp_path):
    "The same pool, q1's video cut short"
    (tmp_path/"cut.mp4").write_bytes(Path(world[0][1].video).read_bytes()[:300])
    return [replace(s, video=str(tmp_path/"cut.mp4")) if s.qid == "q1" else s for s in world[0]], world[1]


@pytest.mark.parametrize("kind", ["sft", "grpo"])
@pytest.mark.filterwarnings("ignore:training. set aside")
def test_the_turn_of_an_unreadable_video_goes_to_the_next_sample(world, tmp_path, monkeypatch, kind):
    broken = with_broken(world, tmp_path)
    def go(where, **kw):
        if kind == "sft": return train(broken, where, save_steps=1, **{"max_broken_share": .25, **kw})
        return run(broken, where, settings(steps=4, save_steps=1, rewards={"seen": 1.}, **{"max_broken_share": .25, **kw}), reward_fns={"seen": seen})
    def seen(text, s):
        asked.append(s.qid)
        return len(text)/100
    asked = []
    with pytest.raises(ValueError, match=r"1 of 4 samples .* more than max_broken_share=0.01 allows \(last: .*qid q1.*repair the videos"):
        go(tmp_path/"strict", max_broken_share=.01)
    with pytest.raises(ValueError, match="1 of 4 samples"): go(tmp_path/"strict", max_broken_share=.01)     # at once, from the file
    asked.clear()
    with pytest.warns(RuntimeWarning, match="set aside, its turns go to the next sample: .*qid q1"): ours, out = go(tmp_path/"a")
    assert out["set_aside"] == ["q1"] and rows_of(out)[-1]["total/unreadable"] == 2        # two passes over four samples
    assert [r["qid"] for r in read_ledger(tmp_path/"a/set_aside.jsonl")[1]] == ["q1"]
    if kind == "grpo": assert [asked.count(q) for q in ("q0", "q1", "q2", "q3")] == [1 + 8, 1, 1 + 16, 1 + 8]  # each reward is tried once before the run
    if kind == "sft": stopped(broken, tmp_path/"b", monkeypatch, save_steps=1, max_broken_share=.25)
    else: stop_at(broken, tmp_path/"b", settings(steps=4, save_steps=1, rewards={"seen": 1.}, max_broken_share=.25), 3, reward_fns={"seen": seen})
    again, out2 = go(tmp_path/"b", max_broken_share=.5)                                   # no choice that changes a result
    assert out2["resumed_from"] == 3 and gap(ours, again) == 0 and strip(rows_of(out)) == strip(rows_of(out2))


@pytest.mark.filterwarnings("ignore:training. set aside")
def test_a_pool_whose_file_was_struck_before_its_first_line_goes_on(world, tmp_path):
    "A kill, or a full disk, between making set_aside.jsonl and writing to it"
    (tmp_path/"run").mkdir(); (tmp_path/"run/set_aside.jsonl").touch()
    _, out = train(with_broken(world, tmp_path), tmp_path/"run", steps=2, max_broken_share=.25)
    assert out["set_aside"] == ["q1"] and [r["qid"] for r in read_ledger(tmp_path/"run/set_aside.jsonl")[1]] == ["q1"]
    (tmp_path/"runs/r/train-grpo/training").mkdir(parents=True); (tmp_path/"runs/r/train-grpo/training/set_aside.jsonl").touch()
    assert stages.set_aside(tmp_path/"runs", "r") == []             # what a finished run is asked at its end


# ---------------------------------------------------------------- memory
def small_memory(monkeypatch, most, where):
    "A learning pass that holds no more than `most` rows, or answers, with their activations"
    said = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
    def full(*a): raise said
    def bounded(n, tensor):
        if n <= most or not torch.is_grad_enabled(): return
        if where == "forward": full()
        tensor.register_hook(full)
    scored, rows = grpo.token_logps, sft.VideoSFT.piecewise
    def token_logps(policy, encs, ids, mask, **kw):
        out = scored(policy, encs, ids, mask, **kw)
        bounded(ids.shape[0]*ids.shape[1], out[0])
        return out
    def piecewise(self, model):
        def forward(*a, **kw):
            out = model(*a, **kw)
            bounded(len(kw["labels"]), out.log_probs)
            return out
        held, forward.training = rows(self, model), model.training
        return partial(held.func, forward, *held.args[1:]) if self.at_once else forward
    monkeypatch.setattr(grpo, "token_logps", token_logps)
    monkeypatch.setattr(sft.VideoSFT, "piecewise", piecewise)


def close(a, b):
    "Rows of two histories agree to rounding"
    for x, y in zip(strip(a), strip(b), strict=True):
        for k in x: assert x[k] == pytest.approx(y[k], rel=1e-3, abs=1e-4) or k == "total/flops", k


@pytest.mark.parametrize("where", ["forward", "backward"])
@pytest.mark.parametrize("grad_accum", [1, 2])
@pytest.mark.parametrize("kind", ["sft", "grpo"])
@pytest.mark.filterwarnings("ignore:.*out of memory after step")
def test_a_step_that_does_not_fit_is_done_in_pieces(world, tmp_path, monkeypatch, kind, grad_accum, where):
    grpo_cfg = settings(steps=3, save_steps=1, prompts_per_step=2, G=4, grad_accum=grad_accum, optim="sgd", beta=.01*(grad_accum - 1))
    def go(where):
        if kind == "grpo": return run(world, where, grpo_cfg)
        return train(world, where, steps=3, batch_size=4, save_steps=1, grad_accum=grad_accum, optim="sgd")
    whole, out = go(tmp_path/"whole")
    with monkeypatch.context() as m:
        small_memory(m, 3 if kind == "grpo" else 1, where)
        with pytest.warns(RuntimeWarning, match="out of memory after step 0: learning from"): pieces, out2 = go(tmp_path/"pieces")
        if grad_accum == 1:
            if kind == "grpo": stop_at(world, tmp_path/"again", grpo_cfg, 2)
            else: stopped(world, tmp_path/"again", m, step=2, steps=3, batch_size=4, save_steps=1, optim="sgd")
            again, out3 = go(tmp_path/"again")
            assert out3["resumed_from"] == 2 and gap(pieces, again) == 0 and strip(rows_of(out2)) == strip(rows_of(out3))
    assert gap(whole, pieces) < 1e-5 < gap(whole, random_policy("qwen2_5_vl" if kind == "grpo" else "qwen3_vl"))
    assert [r["at_once"] for r in rows_of(out2)] == [2 if kind == "grpo" else 1]*3
    close(rows_of(out), [{k: v for k, v in r.items() if k != "at_once"} for r in rows_of(out2)])


def test_a_single_answer_that_does_not_fit_says_what_to_change(world, tmp_path, monkeypatch):
    small_memory(monkeypatch, 0, "forward")
    with pytest.warns(RuntimeWarning, match="learning from 1 at a time"), \
         pytest.raises(RuntimeError, match="set grad_accum=2 or gradient_checkpointing=true.*lora_r.*lower max_pixels"):
        run(world, tmp_path, settings(steps=1))


# ---------------------------------------------------------------- disks
@pytest.fixture
def disk(tmp_path):
    "A function that mounts a small file system; skips where that is not allowed"
    mounted = []
    def mount(options):
        where = tmp_path/f"disk{len(mounted)}"; where.mkdir()
        try: r = subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(where)], capture_output=True, text=True)
        except FileNotFoundError: pytest.skip("no mount command")
        if r.returncode: pytest.skip(f"a small file system cannot be mounted here: {r.stderr.strip()}")
        mounted.append(where)
        return where
    yield mount
    for o in mounted: subprocess.run(["umount", "-l", str(o)], check=True)


def test_a_full_disk_costs_nothing_that_was_finished(world, tmp_path, disk):
    small = disk("size=5m")
    with pytest.raises(OSError, match="No space left on device: .*run"): train(world, small/"run", steps=6, save_steps=1, keep_checkpoints=9)
    kept = sorted(checkpoints(small/"run"))
    assert kept and free_bytes(small) < 2**21
    subprocess.run(["mount", "-o", "remount,size=100m", str(small)], check=True)
    again, out = train(world, small/"run", steps=6, save_steps=1, keep_checkpoints=9)
    ours, _ = train(world, tmp_path/"whole", steps=6, save_steps=1, keep_checkpoints=9)
    assert out["resumed_from"] >= kept[-1] and gap(ours, again) == 0


def free_bytes(path): return os.statvfs(path).f_bavail*os.statvfs(path).f_frsize


def test_a_stage_on_a_full_disk_says_so(disk, monkeypatch):
    small = disk("size=2m")
    monkeypatch.setattr(stages, "execute", lambda *a, **k: (small/"r/big").write_bytes(bytes(2**22)))
    with pytest.raises(stages.StageError, match="the disk of .* is full: make room and run the same command again") as e:
        stages.run_stage("select", {}, small/"r")
    assert e.value.status == "no_space"


def test_a_folder_that_cannot_be_written_is_one_line(disk, capsys):
    folder = disk("ro")
    assert cli.main(["stage", "select", "--run-dir", str(folder/"r")]) == 2
    err = capsys.readouterr().err
    assert "Read-only file system" in err and str(folder) in err and len(err.splitlines()) == 1


def test_a_run_on_a_disk_that_it_cannot_use_starts_nothing(disk, capsys):
    folder = disk("ro")
    assert cli.main(["run", "smoke", "--runs", str(folder)]) == 2
    assert f"--runs must be a folder that can be written to: {folder} is read-only" in capsys.readouterr().err
    assert cli.main(["preflight", "smoke", "--runs", str(folder)]) == 1 and "name another folder with --runs" in capsys.readouterr().out
    with pytest.raises(OSError, match="Read-only") as e: write_atomic(folder/"x.json", "{}")
    assert e.value.filename == str(folder/"x.json"), "not the name of a temporary file"


def test_a_disk_full_before_the_first_file(disk, capsys):
    small = disk("size=64k")
    with suppress(OSError): (small/"fill").write_bytes(bytes(2**17))
    assert cli.main(["preflight", "smoke", "--runs", str(small)]) == 1 and "missing disk         0 GB free" in capsys.readouterr().out
    assert cli.main(["run", "smoke", "--runs", str(small), "--only", "prepare"]) == 1
    said = capsys.readouterr()
    assert "no_space prepare" in said.out and "is full: make room and run the same command again" in said.err and len(said.err.splitlines()) == 1


# ---------------------------------------------------------------- a stage that hangs
HANG = dict(cells=[dict(cell_type="code", id=f"c{i}", metadata=dict(tags=["parameters"]) if not i else {}, source=src, outputs=[], execution_count=None)
                   for i, src in enumerate(['run_dir = ""  # output', "import time; time.sleep(600)"])],
            metadata=dict(kernelspec=dict(name="python3", display_name="python3", language="python")), nbformat=4, nbformat_minor=5)


def test_the_limit_without_a_sign_of_life_is_set_from_the_shell(tmp_path, capsys):
    (tmp_path/"hang.ipynb").write_text(json.dumps(HANG))
    began = time.monotonic()
    assert cli.main(["stage", str(tmp_path/"hang.ipynb"), "--run-dir", str(tmp_path/"r"), "--stall", "2"]) == 1
    assert "no sign of life for 2 s" in capsys.readouterr().err and time.monotonic() - began < 300
    assert stages.read_json(tmp_path/"r/run.json")["attempts"][-1]["status"] == "stalled"
    assert "time.sleep" in (tmp_path/"r/hang.ipynb").read_text() and "most recent call first" in (tmp_path/"r/kernel.log").read_text()
    assert cli.main(["stage", "select", "--run-dir", str(tmp_path/"s"), "--stall", "0"]) == 2
    assert "stall_s must be above 0 seconds, got 0" in capsys.readouterr().err


# ---------------------------------------------------------------- clocks
def clock_calls(path):
    "Functions that ask for the time of day"
    tree = ast.parse(path.read_text())
    return {f.name for f in ast.walk(tree) if isinstance(f, ast.FunctionDef) for n in ast.walk(f)
            if isinstance(n, ast.Attribute) and n.attr in ("time", "now", "utcnow") and isinstance(n.value, ast.Name) and n.value.id in ("time", "datetime")}


def test_nothing_is_computed_from_the_time_of_day():
    found = {f"{p.stem}.{f}" for p in (ROOT/"videotg_r1").glob("*.py") for f in clock_calls(p)}
    # a date for people, a server's date to wait for, and two ages of files, which have no other clock: a cache's leftovers, a status
    assert found == {"judge.wait_asked", "stages.record_start", "video.trim", "watch.run_progress"}, "durations are of time.monotonic or time.perf_counter"


def test_a_clock_that_jumps_moves_no_limit(tmp_path, monkeypatch):
    jumps = iter([1e9, 0., 2e9, -1e6]*1000)
    monkeypatch.setattr(time, "time", lambda: next(jumps))
    with locked(tmp_path/"run"):
        began = time.monotonic()
        with pytest.raises(ValueError, match="at work"), locked(tmp_path/"run", wait_s=.3): pass
        assert time.monotonic() - began >= .3
    stages.record_end(tmp_path, stages.record_start(tmp_path, {}), "ok")
    assert 0 <= stages.read_json(tmp_path/"run.json")["attempts"][0]["wall_s"] < 300


# ---------------------------------------------------------------- exit codes
def test_exit_codes(monkeypatch, capsys, tmp_path):
    def end(e=None, aside=()):
        def run_all(*a, **k):
            if e: raise e
        monkeypatch.setattr(stages, "run_all", run_all)
        monkeypatch.setattr(stages, "set_aside", lambda *a: list(aside))
        return cli.main(["run", str(ROOT/"params/smoke.yaml"), "--runs", str(tmp_path)])
    assert end() == 0
    assert end(stages.StageError("train: it broke")) == 1
    assert end(OSError(28, "No space left on device")) == 1
    assert end(ValueError("a misspelt name")) == 2
    assert end(aside=["q1", "q2"]) == 3 and "set aside: 2 samples" in capsys.readouterr().err
    assert end(stages.StageError("told to stop", "interrupted")) == 130
    assert end(KeyboardInterrupt()) == 130
