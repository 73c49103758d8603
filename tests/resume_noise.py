"""How far a run that was killed and resumed lies from one that was not, beside two that were not: the small model on a GPU or a CPU.

    python tests/resume_noise.py OUT --device cuda --precision bf16

Processes train GRPO for --steps on the same samples with the same seed: twice without a break, once ended by SIGKILL and called again, and once without a break but
without what a process keeps between steps (features of frames, recorded graphs) after the step that the killed one goes on from: what resuming may change by rounding
alone. Differences go to OUT/noise.json.
"""
import argparse
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT/"tests")]
from scaling import write_work  # noqa: E402


def start(a, name):
    from videotg_r1.config import to_params
    from videotg_r1.runners import TrainJob
    out = a.out/name
    out.mkdir(parents=True, exist_ok=True)
    settings = dict(steps=a.steps, prompts_per_step=4, G=8, lr=1e-4, rewards=dict(iou=1.), max_completion_length=24, precision=a.precision, freeze_vision=True, skip_dead=False, save_steps=a.save_steps)
    job = TrainJob(method="grpo", path=str(out/"training"), model="tiny", samples=a.samples, settings=settings, device=a.device)
    (out/"job.json").write_text(json.dumps(dict(kind="train", job=to_params(job))))
    code = f"import sys; sys.path[:0] = {[str(ROOT), str(ROOT/'tests')]}; from resume_noise import work; work(*sys.argv[1:])"
    with open(out/"log.txt", "ab") as log:
        return subprocess.Popen([sys.executable, "-c", code, str(out/"job.json"), str(a.save_steps*(name == "emptied"))], cwd=ROOT, stdout=log, stderr=log, start_new_session=True, env=os.environ | dict(OMP_NUM_THREADS="1"))


def work(job, empty_at):
    "A training; before the step after `empty_at`, if that is not 0, the policy forgets what it holds beside its weights"
    from videotg_r1 import grpo, runners
    look = grpo.VideoGRPO.look
    def forgetful(self, qids):
        if self.state.global_step == int(empty_at) > 0:
            for k in ("features", "_decoder", "_writer"): vars(self.policy).pop(k, None)
        return look(self, qids)
    grpo.VideoGRPO.look = forgetful
    runners.main([job])


def rows(a, name):
    path = a.out/name/"training/history.jsonl"
    return [json.loads(o) for o in path.read_text().splitlines()] if path.is_file() else []


def apart(a, one, two):
    "Largest differences of two runs: of the curves, of the weights, and how far training moved those"
    from videotg_r1.policy import load_policy
    left, right = rows(a, one), rows(a, two)
    keys = ("loss", "reward", "grad_norm", "entropy", "completions/mean_length")
    curves = {k: max((abs(x[k] - y[k]) for x, y in zip(left, right, strict=True) if x.get(k) is not None and y.get(k) is not None), default=None) for k in keys}
    base, *w = [{k: v.detach().double() for k, v in load_policy(o, device="cpu", dtype="float32").model.named_parameters()}
                for o in ("tiny", str(a.out/one/"training/final"), str(a.out/two/"training/final"))]
    gap, moved = (max((x[k] - y[k]).abs().max().item() for k in base) for x, y in (w, (w[0], base)))
    norm = lambda x, y: sum((x[k] - y[k]).pow(2).sum().item() for k in base)**.5
    first = next((x["step"] for x, y in zip(left, right, strict=True) if any(x.get(k) != y.get(k) for k in keys)), None)
    flops = max(abs(x["total/flops"] - y["total/flops"]) for x, y in zip(left, right, strict=True)) # more where a process looked at clips again
    return dict(curves=curves, flops=flops, weights=gap, moved=moved, relative=norm(*w)/norm(w[0], base), first_step_that_differs=first, steps=len(left))


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("out", type=Path)
    p.add_argument("--device", default="cuda")
    p.add_argument("--precision", default="bf16", choices=["fp32", "bf16"])
    p.add_argument("--steps", type=int, default=12)
    p.add_argument("--save-steps", type=int, default=4)
    a = p.parse_args()
    a.out = a.out.resolve()
    a.samples = write_work(a.out/"clips", 32, 16, 64, 8) # frames as they are: no decoder is needed
    runs = {o: start(a, o) for o in ("one", "two", "emptied", "killed")}
    while runs["killed"].poll() is None and len(rows(a, "killed")) < a.steps//2: time.sleep(.02)
    at = len(rows(a, "killed"))
    if runs["killed"].poll() is None: os.killpg(runs["killed"].pid, signal.SIGKILL)
    runs["killed"].wait()
    runs["killed"] = start(a, "killed")
    for o, r in runs.items():
        if r.wait(): raise SystemExit(f"{o} ended with {r.returncode}: {(a.out/o/'log.txt').read_text()[-1500:]}")
    done = json.loads((a.out/"killed/training/final/complete.json").read_text())["info"]
    found = dict(device=a.device, precision=a.precision, killed_after=at, resumed_from=done["resumed_from"], uninterrupted_twice=apart(a, "one", "two"), emptied=apart(a, "one", "emptied"), resumed=apart(a, "one", "killed"))
    (a.out/"noise.json").write_text(json.dumps(found, indent=1) + "\n")
    print(json.dumps(found), flush=True)


if __name__ == "__main__": main()
