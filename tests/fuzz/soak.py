"""Decoding, and training, for a long time in one process: `python tests/fuzz/soak.py 20000` and `python tests/fuzz/soak.py --grpo 2000`

Reads small clips of many containers over and over, each with one decoder after the other, some of them broken, and watches the memory
of this process and of its decoding child, which is replaced every 500 answers. Memory is flat if the slope over the second half is
below what a leak of one small frame every hundred reads would be; for the child, the slope of its largest size within windows of
1,000 reads.

With `--grpo`, that many steps of GRPO of a model with random weights on four clips, through the same `train_grpo` as every run, with a
checkpoint every 200 steps, the reading ahead and the cache of frames. Memory is flat if the slope over the second half is below 1 KiB a
step: the metrics of one step held on to would be more."""
import argparse
import os
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
from mutants import OWN, SPEC, own_clip

from videotg_r1.decode import VideoError
from videotg_r1.video import _worker, read_clip

LEAK = 56*56*3/100 # bytes a read


def rss(pid):
    "Resident memory of a process in bytes"
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1])*os.sysconf("SC_PAGE_SIZE")


def soak(n, seconds=600., every=100):
    "(reads, refused, [reads, bytes here, bytes of the child] now and then, times that the child was replaced)"
    folder = Path(tempfile.mkdtemp(prefix="soak-"))
    paths = [own_clip(folder/name, *how) for name, how in OWN.items()]
    for i, p in enumerate(paths[:3]):
        (folder/f"cut{i}{p.suffix}").write_bytes(p.read_bytes()[:p.stat().st_size//3])
        paths.append(folder/f"cut{i}{p.suffix}")
    seen, refused, end, children = [], 0, time.monotonic() + seconds, set()
    for i in range(n):
        try: read_clip(paths[i % len(paths)], replace(SPEC, decoder=("auto", "pyav")[i//len(paths) % 2]))
        except VideoError: refused += 1
        if i % every == every - 1:
            child = _worker(3 << 30).child.pid
            children.add(child)
            seen.append((i + 1, rss(os.getpid()), rss(child)))
            if time.monotonic() > end: break
    return i + 1, refused, np.array(seen), len(children) - 1


def slopes(seen):
    "Bytes a read of (this process, the child at its largest in windows of ten looks), over the second half"
    half = seen[len(seen)//2:]
    tops = np.array([(w[0, 0], w[:, 2].max()) for w in np.array_split(half, max(2, len(half)//10))])
    return float(np.polyfit(half[:, 0], half[:, 1], 1)[0]), float(np.polyfit(tops[:, 0], tops[:, 1], 1)[0])


STEP_LEAK = 1024 # bytes a step


def train(steps, every=10):
    "([steps, bytes here] now and then, seconds)"
    from videotg_r1.grpo import GRPOSettings, train_grpo
    from videotg_r1.policy import frame_spec, random_policy
    from videotg_r1.records import Sample
    from videotg_r1.video import FrameCache
    folder, policy, seen, calls = Path(tempfile.mkdtemp(prefix="soak-")), random_policy(), [], [0]
    paths = [own_clip(folder/name, *how) for name, how in list(OWN.items())[:4]]
    samples = [Sample(qid=f"q{i}", vid=p.stem, video=str(p), duration_s=4., query="a square is bright", spans=((1., 2.),))
               for i, p in enumerate(paths)]
    cfg = GRPOSettings(steps=steps, prompts_per_step=2, G=4, max_completion_length=6, lr=1e-4, rewards={"letters": 1.}, save_steps=200)
    def letters(text, sample):
        calls[0] += 1
        step, rest = divmod(calls[0], cfg.prompts_per_step*cfg.G)
        if not rest and not step % every: seen.append((step, rss(os.getpid())))
        return sum(c in "aeiou" for c in text)/10 + len(text)/100
    began, spec = time.monotonic(), frame_spec(policy, fps=2., min_pixels=28*28, max_pixels=56*56)
    train_grpo(policy, samples, cfg, folder/"run", frame_spec=spec, cache=FrameCache(folder/"cache", 10**8),
               reward_fns={"letters": letters}, progress=False)
    return np.array(seen), time.monotonic() - began


def train_flat(steps):
    "Train, print the sizes and their slope; 1 where memory grows"
    seen, seconds = train(steps)
    for k, here in seen[::max(1, len(seen)//10)]: print(f"{k:8} steps  {here/2**20:7.1f} MiB")
    half = seen[len(seen)//2:]
    slope = float(np.polyfit(half[:, 0], half[:, 1], 1)[0])
    print(f"{steps} steps in {seconds:.0f} s; slope over the second half: {slope:+.1f} bytes a step (bound {STEP_LEAK})")
    return int(slope > STEP_LEAK)


def main():
    p = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    p.add_argument("n", type=int, nargs="?", default=20_000)
    p.add_argument("--seconds", type=float, default=600., help="stop after so long")
    p.add_argument("--grpo", type=int, metavar="STEPS", help="train for so many steps instead of decoding")
    a = p.parse_args()
    least = 100 if a.grpo else 1000
    if (a.grpo or a.n) < least: p.error(f"a slope needs {least} or more, got {a.grpo or a.n}")
    if a.grpo: return train_flat(a.grpo)
    began = time.time()
    n, refused, seen, replaced = soak(a.n, a.seconds)
    if n < least: sys.exit(f"soak.py: a slope needs {least} reads or more, {n} were made in {a.seconds:g} s: give it more --seconds")
    for k, here, child in seen[::max(1, len(seen)//10)]: print(f"{k:8} reads  {here/2**20:7.1f} MiB here  {child/2**20:7.1f} MiB in the child")
    here, child = slopes(seen)
    print(f"{n} reads, {refused} refused as they should be, in {time.time() - began:.0f} s; the child was replaced {replaced} times; "
          f"slope over the second half: {here:+.1f} bytes a read here, {child:+.1f} in the child (bound {LEAK:.0f})")
    return int(max(here, child) > LEAK)


if __name__ == "__main__": sys.exit(main())
