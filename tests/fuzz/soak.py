"""Decoding for a long time in one process: `python tests/fuzz/soak.py 20000`

Reads small clips of many containers over and over, each with one decoder after the other, some of them broken, and watches the memory
of this process and of its decoding child, which is replaced every 500 answers. Memory is flat if the slope over the second half is
below what a leak of one small frame every hundred reads would be; for the child, the slope of its largest size within windows of
1,000 reads."""
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


def main():
    p = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    p.add_argument("n", type=int, nargs="?", default=20_000)
    p.add_argument("--seconds", type=float, default=600., help="stop after so long")
    a = p.parse_args()
    began = time.time()
    n, refused, seen, replaced = soak(a.n, a.seconds)
    for k, here, child in seen[::max(1, len(seen)//10)]: print(f"{k:8} reads  {here/2**20:7.1f} MiB here  {child/2**20:7.1f} MiB in the child")
    here, child = slopes(seen)
    print(f"{n} reads, {refused} refused as they should be, in {time.time() - began:.0f} s; the child was replaced {replaced} times; "
          f"slope over the second half: {here:+.1f} bytes a read here, {child:+.1f} in the child (bound {LEAK:.0f})")
    return int(max(here, child) > LEAK)


if __name__ == "__main__": sys.exit(main())
