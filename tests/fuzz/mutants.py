"""Damaged videos, made by the thousand: `python tests/fuzz/mutants.py 2000`

Each mutant is a real or self-made clip with something done to it: bits, bytes and blocks anywhere; bytes inside the pictures
only; boxes of MP4, elements of Matroska, chunks of AVI and packets of TS cut out, doubled, renamed, resized, their numbers
changed. Every one is read with both decoders. What must hold: an answer within the limit; the parent lives; a refusal is one
line; a clip has the number of frames that its duration and the sampling rule give, with a time for each; and where only bytes of
pictures were touched, a clip that is accepted has the length of the undamaged one, or its note says what is lost."""
import argparse
import collections
import math
import multiprocessing
import os
import struct
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import replace
from pathlib import Path

import av
import numpy as np

from videotg_r1.decode import VideoError
from videotg_r1.video import FrameSpec, read_clip

ROOT = Path(__file__).resolve().parents[2]
SHARED = Path(os.environ.get("VTG_SHARED_DATA", ROOT.parent/"shared"/"data"))/"clips"
SPEC = FrameSpec(fps=2, min_pixels=28*28, max_pixels=56*56, max_frames=64)
FPS, N = 8, 64
OWN = {"plain.mp4": ("libx264", dict(g=16, bf=2)), "fragments.mp4": ("libx264", dict(g=16, movflags="frag_keyframe+empty_moov")),
       "front.mov": ("libx264", dict(g=16, movflags="faststart")), "a.mkv": ("libx264", dict(g=16)), "b.webm": ("libvpx", {"deadline": "realtime", "cpu-used": 8}),
       "c.avi": ("mpeg4", dict(g=16)), "d.flv": ("libx264", dict(g=16)), "e.ts": ("libx264", dict(g=16)), "f.mp4": ("libx265", {"x265-params": "log-level=none:keyint=16"}),
       "g.mpg": ("mpeg2video", dict(g=12)), "h.nut": ("libx264", dict(g=16)), "i.asf": ("msmpeg4", dict(g=12))}


def own_clip(path, codec, options):
    "A clip with a texture, whose brightness tells the time: 40 at the start, 2 more with each frame"
    texture = np.random.default_rng(0).integers(0, 20, (64, 64, 3))
    with av.open(str(path), "w", options={k: v for k, v in options.items() if k == "movflags"}) as out:
        s = out.add_stream(codec, rate=25 if path.suffix == ".mpg" else FPS)
        s.height = s.width = 64
        s.pix_fmt, s.options = "yuv420p", {k: str(v) for k, v in options.items() if k != "movflags"}
        for i in range(N): out.mux(s.encode(av.VideoFrame.from_ndarray((texture + 40 + 2*i).astype(np.uint8), format="rgb24")))
        out.mux(s.encode())
    return path


def bases(folder, most=700_000):
    "Clips to damage: our own, and those of the shared folder with fewer than `most` bytes"
    paths = [own_clip(Path(folder)/name, *how) for name, how in OWN.items()]
    shared = [p for p in sorted(SHARED.glob("*/*")) if 0 < p.stat().st_size < most] if SHARED.is_dir() else []
    return paths + shared


def picture_bytes(path):
    "Byte ranges that surely lie inside compressed pictures, without the headers of their packets"
    if path.suffix not in (".mp4", ".mov", ".mkv", ".webm", ".avi", ".flv"): return []
    try:
        with av.open(str(path), metadata_errors="ignore") as c:
            return [(p.pos + 24, p.pos + p.size - 8) for p in c.demux(video=0) if p.size > 48 and (p.pos or 0) > 0]
    except (av.FFmpegError, IndexError): return []


def mp4_boxes(data, lo=0, hi=None, depth=0):
    "(start, body, end) of each box, from the outside in"
    hi, out = len(data) if hi is None else hi, []
    while lo + 8 <= hi and len(out) < 3000:
        size, kind = struct.unpack(">I4s", data[lo:lo + 8])
        body = lo + (16 if size == 1 else 8)
        if size == 1 and lo + 16 <= hi: size = struct.unpack(">Q", data[lo + 8:lo + 16])[0]
        end = hi if size == 0 else lo + size
        if end > hi or end < body: break
        out.append((lo, body, end))
        if kind in b"moov trak mdia minf stbl edts dinf mvex moof traf udta" and depth < 8: out += mp4_boxes(data, body, end, depth + 1)
        lo = end
    return out


def vint(data, at, marker):
    "(value, bytes) of an EBML number"
    n = next((i for i in range(8) if data[at] & (0x80 >> i)), None) if at < len(data) else None
    if n is None: return None, 1
    value = int.from_bytes(data[at:at + n + 1], "big")
    return value if marker else value & ((1 << 7*(n + 1)) - 1), n + 1


def ebml_elements(data, lo=0, hi=None, depth=0):
    "(start, body, end) of each element, from the outside in"
    hi, out = len(data) if hi is None else hi, []
    inner = {0x18538067, 0x1F43B675, 0x1654AE6B, 0xAE, 0xE0, 0xA0, 0x1C53BB6B, 0xBB, 0xB7, 0x1549A966, 0x114D9B74, 0x4DBB}
    while lo < hi and len(out) < 3000:
        kind, a = vint(data, lo, True)
        size, b = vint(data, lo + a, False)
        if kind is None or size is None: break
        body = lo + a + b
        end = hi if size == (1 << 7*b) - 1 else body + size
        if end > hi: break
        out.append((lo, body, end))
        if kind in inner and depth < 6: out += ebml_elements(data, body, end, depth + 1)
        lo = end
    return out


def riff_chunks(data, lo=0, hi=None, depth=0):
    "(start, body, end) of each chunk, from the outside in"
    hi, out = len(data) if hi is None else hi, []
    while lo + 8 <= hi and len(out) < 3000:
        kind, size = struct.unpack("<4sI", data[lo:lo + 8])
        body = lo + (12 if kind in (b"RIFF", b"LIST") else 8)
        end = lo + 8 + size + size % 2
        if end > hi or end < body: break
        out.append((lo, body, end))
        if kind in (b"RIFF", b"LIST") and depth < 5: out += riff_chunks(data, body, end, depth + 1)
        lo = end
    return out


def parts(data):
    "The pieces that a container is built of"
    if data[4:8] in (b"ftyp", b"moov", b"wide", b"free", b"skip"): return mp4_boxes(data)
    if data[:4] == b"\x1aE\xdf\xa3": return ebml_elements(data)
    if data[:4] == b"RIFF": return riff_chunks(data)
    if data[:1] == b"\x47" and data[188:189] == b"\x47": return [(i, i + 4, i + 188) for i in range(0, len(data) - 187, 188)]
    return []


def surgery(data, rng):
    "One operation on the structure of a container"
    out, found = bytearray(data), parts(data)
    if not found: return None
    lo, body, hi = found[rng.integers(len(found))]
    what = ["drop", "double", "rename", "size", "number", "swap", "empty"][rng.integers(7)]
    if what == "drop": del out[lo:hi]
    elif what == "double": out[hi:hi] = data[lo:hi]
    elif what == "rename": out[lo + 4:lo + 8] = rng.choice([b"free", b"moov", b"trak", b"\0\0\0\0", b"mdat", b"elst"])
    elif what == "size": out[lo:lo + 4] = struct.pack(">I", int(rng.choice([0, 1, 7, 8, 16, 2**31 - 1, 2**32 - 1, max(0, hi - lo - 1), hi - lo + 1])))
    elif what == "number" and hi - body >= 4:
        for _ in range(int(rng.integers(1, 4))):
            at = body + int(rng.integers(0, min(hi - body, 400) - 3))
            old = struct.unpack(">I", out[at:at + 4])[0]
            out[at:at + 4] = struct.pack(">I", int(rng.choice([0, 1, 2**31, 2**31 - 1, 2**32 - 1, (old + 1) % 2**32, (old - 1) % 2**32, old*2 % 2**32, old//2])))
    elif what == "swap":
        a, _, b = found[rng.integers(len(found))]
        out = bytearray(data[:lo] + data[a:b] + data[hi:])
    elif what == "empty": out[body:hi] = bytes(hi - body)
    if len(out) != len(data) and rng.random() < .6: mend(out, data, found, lo, hi)
    return bytes(out), f"structure: {what}"


def mend(out, data, found, lo, hi):
    "Give the boxes and chunks around a cut the size that they have now, so that a reader gets further"
    order = {b"RIFF": ("<I", 4)}.get(data[:4], (">I", 0))
    if data[:4] != b"RIFF" and data[4:8] not in (b"ftyp", b"moov", b"wide", b"free", b"skip"): return
    for a, _, c in found:
        if a < lo and c >= hi:
            size = struct.unpack_from(order[0], data, a + order[1])[0] + len(out) - len(data)
            struct.pack_into(order[0], out, a + order[1], size % 2**32)


def mutate(data, inside, rng):
    "(mutant, what was done)"
    n, out = len(data), bytearray(data)
    kind = int(rng.integers(12))
    if kind >= 8 and (done := surgery(data, rng)): return done
    if kind >= 5 and inside:
        for _ in range(int(rng.integers(1, 6))):
            lo, hi = inside[rng.integers(len(inside))]
            at, m = int(rng.integers(lo, hi)), int(rng.integers(1, 40))
            m = min(m, hi - at)
            if kind % 2: out[at] ^= 1 << int(rng.integers(8))
            else: out[at:at + m] = rng.integers(0, 256, m).astype(np.uint8).tobytes() if rng.random() < .5 else bytes(m)
        return bytes(out), "pictures: bits" if kind % 2 else "pictures: bytes"
    at, m = int(rng.integers(n)), int(rng.integers(1, 2000))
    if kind == 0: return data[:int(n*rng.random())], "cut"
    if kind == 1:
        for i in rng.integers(0, n, int(rng.integers(1, 30))): out[i] ^= 1 << int(rng.integers(8))
        return bytes(out), "bits"
    if kind == 2: out[at:at + m] = bytes(len(out[at:at + m])); return bytes(out), "zeros"
    if kind == 3: b = int(rng.integers(n)); out[at:at + m] = data[b:b + m]; return bytes(out), "splice"
    if kind == 4: del out[at:at + m]; return bytes(out), "hole"
    if rng.random() < .2: return b"", "nothing left"
    return data + rng.integers(0, 256, m).astype(np.uint8).tobytes(), "more at the end"


def due_frames(duration_s):
    "Frames that the grid rule gives, said once more by itself"
    pairs = math.ceil((duration_s*SPEC.fps - .5)/2 - 1e-6)
    return min(max(2*pairs, 4), 64)


def look(path, decoder, timeout_s, whole=None):
    "(outcome, complaint, times of the frames) of reading one file; `whole` is the undamaged clip where only pictures were touched"
    began = time.monotonic()
    try: clip = read_clip(path, replace(SPEC, decoder=decoder), timeout_s=timeout_s, memory_bytes=1 << 30)
    except VideoError as e:
        took = time.monotonic() - began
        outcome = "given up" if any(o in e.reason for o in ("no answer", "died")) else "refused"
        if took > timeout_s + 5: return outcome, f"took {took:.1f} s of {timeout_s:g}", None
        return outcome, "" if "\n" not in str(e) and e.reason else f"not one line: {str(e)!r}", None
    took, t, (n, h, w, c) = time.monotonic() - began, clip.frame_ts, clip.frames.shape
    complaints = {f"took {took:.1f} s": took > timeout_s + 5, f"{n} frames, {len(t)} times": n != len(t),
                  f"{n} frames for {clip.duration_s:.3f} s, due {due_frames(clip.duration_s)}": n != due_frames(clip.duration_s),
                  f"shape {clip.frames.shape}": h % 28 or w % 28 or c != 3, "times go back": (np.diff(t) < 0).any(),
                  f"times from {t[0]} to {t[-1]} in {clip.duration_s}": t[0] < 0 or t[-1] >= clip.duration_s,
                  f"sampled at {clip.fps}": not abs(n - clip.fps*clip.duration_s) < 2.01 and n not in (4, 64)}
    if whole is not None and not clip.note:
        complaints[f"{clip.duration_s:.3f} s, undamaged {whole.duration_s:.3f} s"] = abs(clip.duration_s - whole.duration_s) > 1e-3
        complaints[f"{n} frames, undamaged {len(whole.frames)}"] = n != len(whole.frames)
    return "read with a note" if clip.note else "read", "; ".join(k for k, v in complaints.items() if v), t if not clip.note else None


_known = {}


def one(task):
    "Make one mutant and read it with both decoders"
    path, seed, i, timeout_s, folder = task
    if path not in _known:
        try: clip = read_clip(path, replace(SPEC, decoder="pyav"), timeout_s=60)
        except VideoError: clip = None
        _known[path] = path.read_bytes(), picture_bytes(path), clip
    data, inside, clip = _known[path]
    mutant, kind = mutate(data, inside if clip else [], np.random.default_rng([seed, i]))
    file = Path(folder)/f"{i}{path.suffix}"
    file.write_bytes(mutant)
    rows = [(kind, d, *look(file, d, timeout_s, clip if kind.startswith("pictures") else None)) for d in ("auto", "pyav")]
    a, b = (r[4] for r in rows)
    if a is not None and b is not None and not (len(a) == len(b) and np.abs(a - b).max() < 1e-3): rows[0] = (kind, "auto", "read", "decord and PyAV give other times", a)
    if not any(r[3] for r in rows): file.unlink()
    return path.name, file, [r[:4] for r in rows]


def run(n, seed=0, workers=2, timeout_s=10., folder=None, say=print, most=700_000):
    "Read `n` mutants; (counts by (kind, decoder, outcome), list of complaints)"
    folder = Path(folder or tempfile.mkdtemp(prefix="mutants-"))
    paths = bases(folder, most)
    counts, wrong = collections.Counter(), []
    tasks = [(paths[i % len(paths)], seed, i, timeout_s, folder) for i in range(n)]
    ctx = multiprocessing.get_context("fork")
    with ProcessPoolExecutor(workers, ctx) as pool:
        try:
            for k, (name, file, rows) in enumerate(pool.map(one, tasks, chunksize=8), 1):
                for kind, decoder, outcome, complaint in rows:
                    counts[kind, decoder, outcome] += 1
                    if complaint: wrong.append(f"{name} {kind} {decoder}: {complaint} ({file})")
                if k % 200 == 0: say(f"{k} of {n} mutants, {len(wrong)} complaints", flush=True)
        except BrokenProcessPool: wrong.append("a process that reads videos died: the decoder's crash reached its parent")
    return counts, wrong


def main():
    p = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    p.add_argument("n", type=int, nargs="?", default=2000)
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--workers", type=int, default=2)
    p.add_argument("--timeout", type=float, default=10.)
    a = p.parse_args()
    began = time.time()
    counts, wrong = run(a.n, a.seed, a.workers, a.timeout)
    kinds, outcomes = sorted({k for k, _, _ in counts}), ["read", "read with a note", "refused", "given up"]
    print(f"{'what was done':24}{'decoder':9}" + "".join(f"{o:>18}" for o in outcomes))
    for kind in kinds:
        for d in ("auto", "pyav"): print(f"{kind:24}{d:9}" + "".join(f"{counts[kind, d, o]:18}" for o in outcomes))
    print(f"{'all':33}" + "".join(f"{sum(v for k, v in counts.items() if k[2] == o):18}" for o in outcomes))
    print(*wrong, sep="\n")
    print(f"{a.n} mutants in {time.time() - began:.0f} s, seed {a.seed}: {len(wrong)} complaints")
    return int(bool(wrong))


if __name__ == "__main__": sys.exit(main())
