"""What more GPUs bring: GRPO steps and an agent's pass on 1, 2, ... GPUs of this machine, by the processes that `vtg run` starts.

    python tests/scaling.py OUT --shape Qwen2.5-VL-3B --gpus 1 2          GRPO with ddp.yaml, the difficulty agent with ranks
    python tests/scaling.py OUT --shape Qwen2.5-VL-7B --gpus 2 --only grpo --launch params/accelerate/fsdp2.yaml
    python tests/scaling.py OUT --device cpu                              a small model on two CPU processes: that it runs, not how fast

Random weights of that shape are written to OUT/SHAPE once. As many prompts and samples on each GPU, whatever their number.
A training is ended once its steps are measured, so no final model is written. A row of each goes to OUT/rows.jsonl and is printed.
"""
import argparse
import json
import os
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path

import numpy as np

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT/"tests")]
from rehearsal import Trace, shared_or_exit, write_model_apart  # noqa: E402

ON_CPU = "compute_environment: LOCAL_MACHINE\ndistributed_type: MULTI_CPU\nmixed_precision: 'no'\nnum_machines: 1\nuse_cpu: true\nmachine_rank: 0\nrdzv_backend: static\nsame_network: true\nmain_training_function: main\n"
BEGAN = time.time()


def write_work(folder, n, frames, side, queries=2):
    "`n` samples about clips of noise, each clip another one, so that the tower has to look at it"
    from videotg_r1.records import Sample, write_jsonl
    from videotg_r1.video import write_frames
    rng, samples, new = np.random.default_rng(0), [], not folder.exists()
    folder.mkdir(parents=True, exist_ok=True)
    for i in range(-(-n//queries)):
        path = folder/f"{i}.npz"
        if new:
            small = rng.integers(0, 255, (frames, 16, 16, 3), np.uint8)
            write_frames(path, small.repeat(side//16, 1).repeat(side//16, 2), np.arange(frames)/2, frames/2)
        samples += [Sample(f"q{i}_{k}", f"v{i}", str(path), frames/2, f"person opens the door of the {o} and walks away.", ((1. + k, 2. + k),))
                    for k, o in enumerate(("fridge", "room")[:queries])]
    write_jsonl(folder/"samples.jsonl", [s.to_dict() for s in samples[:n]])
    return str(folder/"samples.jsonl")


def free_port():
    with socket.socket() as s:
        s.bind(("localhost", 0))
        return s.getsockname()[1]


def lines(path): return path.read_bytes().count(b"\n") if path.is_file() else 0


def tell(p, number):
    "A signal to a process and all that it started: torchrun gives each of its own a session"
    from videotg_r1.torture import children
    if p.poll() is not None: return
    for pid in (p.pid, *children(p.pid)):
        with suppress(ProcessLookupError): os.kill(pid, number)


def stop(p):
    tell(p, signal.SIGKILL)
    p.wait()


def hold(a, p):
    "Stop processes that are warm until a file is there, so that others can be measured meanwhile"
    if not a.after or a.after.exists(): return
    tell(p, signal.SIGSTOP)
    (a.out/f"warm-{os.getpid()}").touch()
    while not a.after.exists() and time.time() - BEGAN < a.until: time.sleep(.05)
    tell(p, signal.SIGCONT)


def memory(trace, p, gpus):
    "GiB that a process and its children hold on these GPUs, the most, or 0 where the driver does not say: others may work beside them"
    if trace.device == "cpu": return 0
    import pynvml

    from videotg_r1.torture import children
    ours = {p.pid, *children(p.pid)}
    of = lambda i: pynvml.nvmlDeviceGetComputeRunningProcesses(pynvml.nvmlDeviceGetHandleByIndex(i))
    try: return round(max(sum(o.usedGpuMemory or 0 for o in of(i) if o.pid in ours) for i in gpus)/2**30, 2)
    except pynvml.NVMLError: return 0


def sent(trace, gpus):
    "GB that each GPU has sent over NVLink since the driver was loaded, or None where it does not say"
    if trace.device == "cpu": return None
    import pynvml
    try:
        found = [pynvml.nvmlDeviceGetFieldValues(pynvml.nvmlDeviceGetHandleByIndex(i), [(pynvml.NVML_FI_DEV_NVLINK_THROUGHPUT_DATA_TX, 2**32 - 1)])[0] for i in gpus]
        return None if any(o.nvmlReturn for o in found) else [o.value.ullVal*1024/1e9 for o in found]
    except (pynvml.NVMLError, AttributeError): return None


def ended(p, log): return RuntimeError(f"a process ended with {p.poll()}: {log}\n" + log.read_text(errors="replace")[-3000:])


def grpo(a, n, trace, gpus):
    "Seconds of a step, the first ones left out"
    from videotg_r1.config import to_params
    from videotg_r1.runners import TrainJob
    out, config = Path(tempfile.mkdtemp(prefix=f"grpo-{a.shape or 'small'}-{n}-", dir=a.out)), ROOT/a.launch
    settings = dict(steps=a.steps + a.skip + 8*bool(a.after), prompts_per_step=a.prompts*n, G=a.G, lr=1e-6, rewards=dict(iou=1.), max_completion_length=a.tokens, freeze_vision=True,
                    precision="fp32" if a.device == "cpu" else "bf16", gradient_checkpointing=not a.no_checkpointing, skip_dead=False, save_steps=0, grad_accum=a.parts, lora_r=a.lora, lora_alpha=2*a.lora or 16, compile=a.compile)
    job = TrainJob(method="grpo", path=str(out/"training"), model=str(a.model), samples=work(a, "grpo"), settings=settings, frames=a.frame_spec, device=a.device)
    (out/"job.json").write_text(json.dumps(dict(kind="train", job=to_params(job))))
    starter = ["accelerate.commands.launch", "--config_file", str(config), "--num_processes", str(n), "--main_process_port", str(free_port()), "-m"] if n > 1 or a.always else []
    with open(out/"log.txt", "wb") as log:
        p = subprocess.Popen([sys.executable, "-m", *starter, "videotg_r1.runners", str(out/"job.json")], stdout=log, stderr=log, start_new_session=True, env=env(gpus))
    history, began, at, until, link, skip = out/"training/history.jsonl", time.time(), [], 0, None, a.skip
    try:
        while lines(history) < a.steps + skip:
            if p.poll() is not None: raise ended(p, out/"log.txt")
            if time.time() - BEGAN > a.until: break
            if lines(history) > len(at): at += [time.time()]*(lines(history) - len(at))
            if len(at) >= a.skip and a.after:
                hold(a, p)
                skip, a.after = lines(history) + 1, None # the step that was held is left out
                at += [time.time()]*(skip - 1 - len(at))
            if len(at) >= skip and link is None: link = len(at), sent(trace, gpus)
            time.sleep(.05)
        until, last, own = time.time(), (lines(history), sent(trace, gpus)), memory(trace, p, gpus)
    finally: stop(p)
    rows = [json.loads(o) for o in history.read_text().splitlines()] if history.is_file() else []
    if len(rows) < skip + 2: raise RuntimeError(f"{len(rows)} steps in the time there was")
    used = rows[skip - 1:]
    step = [y["elapsed_s"] - x["elapsed_s"] for x, y in zip(used, used[1:], strict=False)]
    traffic = [round((y - x)/(last[0] - link[0]), 2) for x, y in zip(link[1], last[1], strict=True)] if until and link and link[1] and last[1] and last[0] > link[0] else None
    tokens = [(used[-1][f"total/{k}"] - used[0][f"total/{k}"])/sum(step) for k in ("prompt_tokens", "generated_tokens")]
    return dict(what="grpo", gpus=n, launch=Path(a.launch).name if starter else "", prompts=a.prompts*n, parts=a.parts, lora_r=a.lora, checkpointing=not a.no_checkpointing, compile=a.compile, G=a.G, tokens=a.tokens, step_s=round(statistics.median(step), 4), steps=[round(s, 3) for s in step],
                prompts_per_s=round(a.prompts*n*len(step)/sum(step), 4), prompt_tokens_per_s=round(tokens[0]), generated_tokens_per_s=round(tokens[1]),
                start_s=round(at[0] - began, 1) if at else None, nvlink_gb_a_step=traffic, own_gib=own, **trace.over(at[skip - 1] if len(at) >= skip else began, until, gpus))


def agent(a, n, trace, gpus):
    "Samples a second while all processes work; and how much longer the longest one worked than the mean of them"
    from videotg_r1.config import to_params
    from videotg_r1.runners import AgentJob
    out = Path(tempfile.mkdtemp(prefix=f"agent-{a.shape or 'small'}-{n}-", dir=a.out))
    job = AgentJob(agent=a.agent, path=str(out/"found.jsonl"), samples=work(a, "agent"), model=str(a.model), settings=dict(k=8, max_new_tokens=a.tokens, batch_size=16), frames=a.frame_spec,
                   device=a.device, max_samples=a.asked*n, runner="ranks" if n > 1 else "in_process", processes=n, compile=a.compile)
    (out/"job.json").write_text(json.dumps(to_params(job)))
    code = "import json, sys; from videotg_r1.config import from_params; from videotg_r1.runners import AgentJob, run_agent; run_agent(from_params(AgentJob, json.load(open(sys.argv[1]))), False)"
    with open(out/"log.txt", "wb") as log:
        p = subprocess.Popen([sys.executable, "-c", code, str(out/"job.json")], stdout=log, stderr=log, start_new_session=True, env=env(gpus))
    began, seen, most = time.time(), {}, 0 # file -> [(when, samples)]
    try:
        while p.poll() is None and time.time() - BEGAN < a.until:
            for f in ([out/"found.jsonl"] if n == 1 else out.glob("found.part-*.jsonl")):
                now, at = max(lines(f) - 1, 0), seen.setdefault(f.name, [(began, 0)])
                if now > at[-1][1]: at.append((time.time(), now)); most = max(most, memory(trace, p, gpus))
            left = a.asked*n - sum(at[-1][1] for at in seen.values())
            if n > 1 and seen and left and lines(out/"found.jsonl") > 1: # the last part to end was taken in before it was seen whole
                late = min(seen.values(), key=lambda at: at[-1][1])
                late.append((time.time(), late[-1][1] + left)); left = 0
            if a.after and len(seen) == n and min(len(at) for at in seen.values()) > 1:
                hold(a, p)
                for at in seen.values(): del at[2:] # what is measured begins anew
                a.after = None
            if not left: break
            time.sleep(.02)
        if sum(at[-1][1] for at in seen.values()) < a.asked*n and p.poll(): raise ended(p, out/"log.txt")
    finally:
        try: p.wait(6)
        except subprocess.TimeoutExpired: stop(p)
    ends = [at[-1][0] for at in seen.values()]
    if len(ends) < n or min(len(at) for at in seen.values()) < 5: raise RuntimeError(f"{ {k: at[-1] for k, at in seen.items()} } in the time there was")
    t0, t1 = max(at[2][0] for at in seen.values()), min(ends) # all of them work: from the slowest one's second batch to the first one's last
    within = lambda at, t: max(k for when, k in at if when <= t)
    own = [(at[-1][1] - at[2][1])/(at[-1][0] - at[2][0]) for at in seen.values()]
    spent = [at[-1][1]/o for at, o in zip(seen.values(), own, strict=True)]
    return dict(what=a.agent, gpus=n, samples=sum(at[-1][1] for at in seen.values()), k=8, queries=2, tokens=a.tokens, compile=a.compile, samples_per_s=round(sum(within(at, t1) - within(at, t0) for at in seen.values())/(t1 - t0), 4),
                each=[round(o, 3) for o in own], imbalance=round(max(spent)*len(spent)/sum(spent), 4), start_s=round(min(at[1][0] for at in seen.values()) - began, 1), measured_s=round(t1 - t0, 1), own_gib=most, **trace.over(t0, t1, gpus))


ALL_REDUCE = """
import os, sys, time, torch, torch.distributed as dist
cuda = sys.argv[1] != "cpu"
rank = int(os.environ["LOCAL_RANK"])
if cuda: torch.cuda.set_device(rank)
dist.init_process_group("nccl" if cuda else "gloo")
out = []
for mb in (25, 1024) if cuda else (1,):
    x = torch.ones(mb*2**18, device="cuda" if cuda else "cpu")
    spent = []
    for i in range(12):
        if cuda: torch.cuda.synchronize()
        t = time.perf_counter(); dist.all_reduce(x)
        if cuda: torch.cuda.synchronize()
        spent.append(time.perf_counter() - t)
    out.append(f"{mb}:{sorted(spent[2:])[5]:.6f}")
if rank == 0: print("TIMES", *out, flush=True)
dist.destroy_process_group()
"""


def all_reduce(a, n, trace, gpus):
    "Seconds to add up MiB of 32-bit numbers"
    (a.out/"all_reduce.py").write_text(ALL_REDUCE)
    out = subprocess.run([sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(n), str(a.out/"all_reduce.py"), a.device],
                         capture_output=True, text=True, timeout=90, env=env(gpus))
    line = next((o for o in out.stdout.splitlines() if o.startswith("TIMES")), None)
    if line is None: raise RuntimeError(out.stderr[-1500:])
    times = {int(k): float(v) for k, v in (o.split(":") for o in line.split()[1:])}
    return dict(what="all_reduce", gpus=n, seconds={f"{k} MiB": v for k, v in times.items()}, bus_gb_per_s={f"{k} MiB": round(k*2**20*2*(n - 1)/n/v/1e9, 1) for k, v in times.items()})


def env(gpus):
    return os.environ | dict(CUDA_VISIBLE_DEVICES=",".join(map(str, gpus)), OMP_NUM_THREADS="1", TOKENIZERS_PARALLELISM="false", HF_HUB_OFFLINE="1",
                             PYTHONPATH=os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH", "")])))


def work(a, kind):
    "Samples for one kind of row: training sees each clip once, an agent asks each twice"
    n, queries = (a.prompts*(a.steps + a.skip + 8), 1) if kind == "grpo" else (a.asked, 2)
    return write_work(a.out/f"clips-{kind}-{os.getpid()}", n*max(a.gpus), a.frames, a.side, queries)


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("out", type=Path)
    p.add_argument("--shape", default="", help="of a released model, as Qwen2.5-VL-3B (default: a small one)")
    p.add_argument("--gpus", type=int, nargs="+", default=[1, 2])
    p.add_argument("--first", type=int, default=0, help="number of the first GPU to use")
    p.add_argument("--only", nargs="+", default=["all_reduce", "grpo", "agent"], choices=["write", "all_reduce", "grpo", "agent"])
    p.add_argument("--launch", default="params/accelerate/ddp.yaml", help="accelerate config for more than one GPU")
    p.add_argument("--always", action="store_true", help="accelerate config for one GPU too")
    p.add_argument("--device", default="cuda")
    p.add_argument("--agent", default="estimate", choices=["reflect", "estimate", "evaluate"])
    p.add_argument("--prompts", type=int, default=4, help="of a GRPO step, on each GPU")
    p.add_argument("--G", type=int, default=8)
    p.add_argument("--tokens", type=int, default=64, help="of an answer")
    p.add_argument("--frames", type=int, default=64)
    p.add_argument("--side", type=int, default=224)
    p.add_argument("--steps", type=int, default=6, help="measured")
    p.add_argument("--skip", type=int, default=3, help="before them")
    p.add_argument("--asked", type=int, default=640, help="samples for the agent, on each GPU")
    p.add_argument("--parts", type=int, default=1, help="grad_accum")
    p.add_argument("--lora", type=int, default=0, help="rank of adapters; 0: all weights of the language model")
    p.add_argument("--no-checkpointing", action="store_true")
    p.add_argument("--compile", action="store_true", help="the layers of the model, as `compile: true` does")
    p.add_argument("--after", type=Path, help="wait for this file once warm, so that the start goes beside something else that is measured")
    p.add_argument("--until", type=float, default=1e9, help="seconds after which nothing goes on")
    a = p.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143)) # so that what was started is ended
    a.out = a.out.resolve()
    a.out.mkdir(parents=True, exist_ok=True)
    if a.device == "cpu":
        (a.out/"cpu.yaml").write_text(ON_CPU)
        if "ddp" in a.launch: a.launch = str(a.out/"cpu.yaml")
        a.frames, a.side, a.tokens, a.asked, a.steps, a.prompts, a.skip = 8, 64, 8, 96, 2, 1, 1
    a.model, a.frame_spec = a.out/(a.shape or "small"), dict(fps=2., max_frames=a.frames, min_pixels=a.side**2, max_pixels=a.side**2, total_pixels=a.frames*a.side**2)
    if not (a.model/"videotg.json").is_file() and a.only != ["all_reduce"]:
        t = time.time()
        shared_or_exit("tokenizer/qwen2_5")
        write_model_apart(a.model, a.shape, a.device, env([a.first]))
        say(a, dict(what="write", shape=a.shape, seconds=round(time.time() - t, 1)))
    trace = Trace(a.device)
    for kind in [o for o in ("all_reduce", "grpo", "agent") if o in a.only]:
        for n in a.gpus:
            if kind == "all_reduce" and n == 1: continue
            t = time.time()
            try: row = dict(all_reduce=all_reduce, grpo=grpo, agent=agent)[kind](a, n, trace, range(a.first, a.first + n))
            except Exception as e: row = dict(what=kind, gpus=n, failed=f"{type(e).__name__}: {str(e)[-2500:]}")
            rate = row.get("prompts_per_s") or row.get("samples_per_s")
            row |= dict(shape=a.shape or "small", frames=a.frames, side=a.side)
            if rate and (one := alone(a, row)): row["efficiency"] = round(rate/one/n/row.get("imbalance", 1), 4)
            say(a, row | dict(wall_s=round(time.time() - t, 1), at_s=round(time.time() - BEGAN, 1)))


def alone(a, row): # rate of one GPU, as measured before in this folder
    rows = [json.loads(o) for o in (a.out/"rows.jsonl").read_text().splitlines()] if (a.out/"rows.jsonl").is_file() else []
    same = lambda r: (r["what"], r.get("shape"), r.get("lora_r"), r.get("compile"), r.get("prompts", 0)/r.get("gpus", 1))
    found = [r for r in rows if r.get("gpus") == 1 and same(r) == same(row)]
    return next((r.get("prompts_per_s") or r.get("samples_per_s") for r in found if "failed" not in r), None)


def say(a, row):
    with open(a.out/"rows.jsonl", "a") as f: f.write(json.dumps(row) + "\n")
    print(json.dumps(row), flush=True)


if __name__ == "__main__": main()
