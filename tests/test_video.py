"Real and hostile video files: what no notebook can test"
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import replace
from fractions import Fraction
from importlib.util import find_spec
from pathlib import Path

import av
import numpy as np
import pytest

from videotg_r1.decode import VideoError, decord_frames, pyav_frames, scan, write_mp4
from videotg_r1.video import (
    Clip,
    DecodeWorker,
    FrameCache,
    FrameSpec,
    WorkerLost,
    file_identity,
    probe,
    quarantined,
    read_clip,
    stop_workers,
)
from videotg_r1.video import _worker as worker

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT/"tests/fuzz"))
CLIPS = Path(os.environ.get("VTG_SHARED_DATA", ROOT.parent/"shared"/"data"))/"clips"
SMALL = FrameSpec(fps=2, min_pixels=28*28, max_pixels=56*56)
real = pytest.mark.skipif(not CLIPS.is_dir(), reason=f"no real clips: {CLIPS} is absent (set VTG_SHARED_DATA)")
DECORD = find_spec("decord") is not None
both = pytest.mark.skipif(not DECORD, reason="decord is not installed here (its wheels are x86-64 only)")

BROKEN = {"ExoPlayer/sample_ac3.mp4":"no video stream", "PHP-FFMpeg/WrongFile.mp4":"container", "decord/corrupted.mp4":"29 of 50",
          "derived/3MSZA_bitflips.mp4":"of 930", "derived/3MSZA_trunc50.mp4":"container", "moviepy/result.webm":"0 bytes",
          "small/Mpeg4.mp4":"no video stream", "small/mp4-with-audio.mp4":"no video stream"}
PYAV_ONLY = {"ExoPlayer/sample.flv":"1000 frames per second", "ExoPlayer/sample.mkv":"1000 frames per second",
             "derived/pancake_trunc50.mkv":"reported errors", "mmaction2/test.avi":"absurd time", "moviepy/no_duration.webm":"broken metadata",
             "torchcodec/av1_video.mkv":"stream", "torchcodec/h265_video.mp4":"open GOP",
             "torchvision/hmdb51_Turnk_r_Pippi_Michel_cartwheel_f_cm_np2_le_med_6.avi":"absurd time"}


def grey(n=96, side=112):
    "Frame i is grey 20 + 2i, so a mean tells which one it is"
    return np.full((n,side,side,3), 20, np.uint8) + 2*np.arange(n, dtype=np.uint8)[:,None,None,None]

def which(frames): return (frames.mean((1,2,3)) - 20)/2

def encode(path, frames, codec="libx264", fps=8, times=None, **options):
    "Any codec and container; `times` in seconds for a variable frame rate"
    with av.open(str(path), "w") as out:
        s = out.add_stream(codec, rate=fps)
        s.height,s.width,s.pix_fmt = *frames.shape[1:3],"yuv420p"
        s.options = {k:str(v) for k,v in options.items()}
        if times is not None: s.time_base = s.codec_context.time_base = Fraction(1, 1000)
        for i,f in enumerate(frames):
            p = av.VideoFrame.from_ndarray(f, format="rgb24")
            if times is not None: p.pts,p.time_base = round(times[i]*1000),Fraction(1, 1000)
            out.mux(s.encode(p))
        out.mux(s.encode())
    return path

def gone(pid, seconds=5):
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        try:
            if Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] == "Z": return True
        except OSError: return True
        time.sleep(.05)
    return False


@pytest.fixture(scope="module")
def outcomes():
    "(decoder, clip name) -> (Clip or VideoError, seconds), for every real clip"
    out = {}
    for path in sorted(p for p in CLIPS.glob("*/*") if p.is_file()):
        for decoder in ("auto", "pyav"):
            began = time.monotonic()
            try: got = read_clip(path, replace(SMALL, decoder=decoder))
            except VideoError as e: got = e
            out[decoder, str(path.relative_to(CLIPS))] = got,time.monotonic() - began
    return out

@real
@pytest.mark.parametrize("decoder", ["auto", "pyav"])
def test_every_clip_is_read_or_refused_in_one_line(outcomes, decoder):
    mine = {name:o for (d,name),o in outcomes.items() if d == decoder}
    assert {name for name,(o,_) in mine.items() if isinstance(o, VideoError)} == set(BROKEN)
    for name,(o,seconds) in mine.items():
        assert seconds < 30, name
        if name in BROKEN:
            assert BROKEN[name] in str(o) and "\n" not in str(o) and str(CLIPS/name) in str(o), o
            continue
        clip = o
        t,h,w,c = clip.frames.shape
        assert t % 2 == 0 and t >= 4 and h % 28 == 0 and w % 28 == 0 and c == 3, name
        assert clip.frame_ts[0] == 0 and (np.diff(clip.frame_ts) >= 0).all() and clip.frame_ts[-1] < clip.duration_s, name
        if decoder == "auto" and DECORD:
            assert clip.decoder == ("pyav" if name in PYAV_ONLY else "decord"), (name, clip)
            assert PYAV_ONLY.get(name, "") in clip.note

@real
@both
def test_both_decoders_give_the_same_frames_and_times(outcomes):
    names = {name for _,name in outcomes} - set(BROKEN) - set(PYAV_ONLY)
    assert len(names) == 25
    for name in names:
        a,b = (outcomes[o, name][0] for o in ("auto", "pyav"))
        assert a.decoder == "decord" and b.decoder == "pyav" and (a.frame_ts == b.frame_ts).all() and a.duration_s == b.duration_s and a.frames.shape == b.frames.shape
        assert np.abs(a.frames.astype(int) - b.frames).mean() < (3 if "10bits" in name else 1), name

@real
@pytest.mark.parametrize("decoder", ["auto", "pyav"])
def test_burned_in_timecode(decoder):
    "moviepy/example.mp4: every picture carries its own time, 25 a second; so only the right one matches"
    path = CLIPS/"moviepy/example.mp4"
    clip = read_clip(path, FrameSpec(fps=3, max_pixels=320*240, decoder=decoder))
    h,w = clip.frames.shape[1:3]
    with av.open(str(path)) as c: every = np.stack([f.to_ndarray(format="rgb24", width=w, height=h, interpolation="BILINEAR") for f in c.decode(video=0)])
    assert len(every) == 400 and len(clip.frames) == 48
    for i,(frame,ts) in enumerate(zip(clip.frames, clip.frame_ts, strict=True)):
        due = int(i/3*25 + 1e-6)
        near = range(max(0, due-3), min(400, due+4))
        assert min(near, key=lambda k:np.abs(every[k].astype(int) - frame).mean()) == due, i
        assert abs(ts - due/25) < 1e-6

@real
def test_rotation_tags_turn_pictures_upright():
    sizes = {o:probe(CLIPS/f"decord/video_{o}.mov") for o in (0, 90, 180, 270)}
    assert [(i.width, i.height, i.rotation) for i in sizes.values()] == [(568,320,0), (320,568,270), (568,320,180), (320,568,90)]
    upright = read_clip(CLIPS/"decord/video_0.mov", replace(SMALL, decoder="pyav")).frames[0].astype(int)
    upside = read_clip(CLIPS/"decord/video_180.mov", replace(SMALL, decoder="pyav")).frames[0].astype(int)
    assert upright.shape == upside.shape


@both
@pytest.mark.parametrize("name,codec,options,off", [
    ("open.mp4", "libx264", {"g":12, "bf":3, "x264-params":"open-gop=1:scenecut=0"}, "open GOP"),
    ("open.mkv", "libx264", {"g":12, "bf":3, "x264-params":"open-gop=1:scenecut=0"}, "open GOP"),
    ("closed.ts", "libx264", {"g":12, "bf":3}, "no index"), ("a.mpg", "mpeg2video", {"g":12, "bf":2}, "no index"),
    ("refresh.mp4", "libx264", {"bf":3, "x264-params":"intra-refresh=1:keyint=20"}, "open GOP"), ("b.avi", "mpeg4", {"g":12, "bf":2}, "open GOP"), ("c.avi", "libx264", {"g":12}, "absurd time"),
    ("closed.mp4", "libx264", {"g":12, "bf":3}, ""), ("closed.mkv", "libx264", {"g":12, "bf":3}, ""), ("a.flv", "libx264", {"g":12}, ""),
    ("a.webm", "libvpx", {"g":12, "deadline":"realtime", "cpu-used":8}, ""), ("a.avi", "mpeg4", {"g":12}, "")])
def test_files_where_decord_lands_on_other_pictures(tmp_path, name, codec, options, off):
    path = encode(tmp_path/name, grey(96), codec, **options, **({} if codec.startswith("libx264") else {"b":"2000k"}))
    for decoder in ("auto", "pyav"):
        clip = read_clip(path, replace(SMALL, decoder=decoder))
        assert np.abs(which(clip.frames) - clip.frame_ts*8).max() < 1.6, (clip, which(clip.frames)/8 - clip.frame_ts)
        assert np.abs(clip.frame_ts - np.arange(24)/2).max() < .13
        if decoder == "auto": assert (off in clip.note) and (clip.decoder == "pyav") == bool(off)

@pytest.mark.parametrize("hurt", [(0,), (0, 12), (12,)])
def test_an_avi_with_broken_keyframes_keeps_its_times(tmp_path, hurt):
    "AVI has no times of showing: they are counted from the first picture that comes, which need not be the first of the file"
    grain = np.random.default_rng(0).integers(-10, 11, (112, 112, 1))           # else every picture is a keyframe
    path = encode(tmp_path/"a.avi", (grey(96) + grain).astype(np.uint8), "mpeg4", g=12, b="2000k")
    with av.open(str(path)) as c: packets = [(p.pos, p.size) for p in c.demux(video=0) if p.size]
    data = bytearray(path.read_bytes())
    for pos, size in (packets[k] for k in hurt): data[pos + 8:pos + size] = bytes(size - 8)
    path.write_bytes(data)
    clip = read_clip(path, replace(SMALL, decoder="pyav", max_lost=.5))
    assert f"{12*len(hurt)} of 96" in clip.note and np.abs(which(clip.frames) - clip.frame_ts*8).max() < 1.6, which(clip.frames)/8 - clip.frame_ts

@both
def test_stream_copied_cut_is_refused_to_decord(tmp_path):
    "A cut at 4.5 s of a file with keyframes every 3 s: the pictures from 3 s on are in it, to be decoded and not shown"
    whole,cut = encode(tmp_path/"whole.mp4", grey(96), g=24, bf=3),tmp_path/"cut.mp4"
    with av.open(str(whole)) as i, av.open(str(cut), "w") as o:
        s = i.streams.video[0]; t = o.add_stream_from_template(s); i.seek(4_500_000)
        off = int(4.5/s.time_base)
        for p in i.demux(s):
            if p.size: p.pts -= off; p.dts -= off; p.stream = t; o.mux(p)
    import decord
    assert decord.VideoReader(str(cut), num_threads=1).get_frame_timestamp(0)[0] < 0
    clip = read_clip(cut, SMALL)
    assert clip.decoder == "pyav" and "below 0" in clip.note
    assert abs(clip.duration_s - 7.5) < .01 and np.abs(which(clip.frames)/8 - 4.5 - clip.frame_ts)[:15].max() < .13

@both
def test_variable_frame_rate_keeps_the_containers_times(tmp_path):
    "Ten pictures a second for 2 s, then one a second for 8 s: index / fps would be 5 s off"
    times = np.r_[np.arange(20)/10, np.arange(2, 10)]
    path = encode(tmp_path/"vfr.mp4", grey(28), times=times)
    for decoder in ("decord", "pyav"):
        clip = read_clip(path, replace(SMALL, fps=1, decoder=decoder))
        assert len(clip.frames) == 10 and np.abs(clip.frame_ts - np.arange(10)).max() < 2e-3
        assert np.abs(which(clip.frames) - np.r_[0, 10, np.arange(20, 28)]).max() < 1.1

def test_missing_beginning_does_not_shift_times(tmp_path):
    "First Matroska cluster lost: what is left must keep its times"
    path = encode(tmp_path/"a.mkv", grey(96), g=24, cluster_time_limit=3000)
    data = bytearray(path.read_bytes())
    with av.open(str(path)) as c: at = [p.pos for p in c.demux(video=0) if p.size and p.pts is not None and p.pts < 2900]
    data[at[0]:at[-1] + 20] = bytes(at[-1] + 20 - at[0])
    path.write_bytes(data)
    clip = read_clip(path, replace(SMALL, max_lost=.3))
    later = clip.frame_ts > 6.2
    assert "no picture in its first" in clip.note and later.sum() > 10 and np.abs(which(clip.frames)/8 - clip.frame_ts)[later].max() < .2, clip


def test_a_hang_costs_the_time_limit_and_nothing_else(tmp_path):
    path = write_mp4(tmp_path/"a.mp4", grey(16, 56), fps=4)
    read_clip(path, SMALL)
    child = worker(3 << 30).child.pid
    os.kill(child, signal.SIGSTOP)                               # what a hang looks like from outside
    began = time.monotonic()
    with pytest.raises(VideoError, match="no answer in 1.*more than 1 s"): read_clip(path, replace(SMALL, decoder="pyav"), timeout_s=1)
    assert time.monotonic() - began < 20 and gone(child)
    assert len(read_clip(path, SMALL).frames) == 8
    os.kill(worker(3 << 30).child.pid, signal.SIGSTOP)           # auto: half the time for decord, then PyAV in a new child
    clip = read_clip(path, SMALL, timeout_s=4)
    assert clip.decoder == "pyav" and "decord: no answer" in clip.note

def test_too_little_memory_is_an_error_and_not_a_crash(tmp_path):
    path = encode(tmp_path/"big.mp4", np.zeros((2,2160,3840,3), np.uint8), preset="ultrafast")
    with pytest.raises(VideoError): read_clip(path, SMALL, memory_bytes=8 << 20)
    assert read_clip(path, SMALL).frames.shape[0] == 4
    stop_workers()

def test_pixel_bombs_are_refused_before_decoding(tmp_path, monkeypatch):
    path = encode(tmp_path/"a.mp4", grey(4, 64))
    monkeypatch.setattr("videotg_r1.decode.MAX_FRAME_PIXELS", 64*64 - 1)
    with pytest.raises(VideoError, match="64x64"): scan(path)
    monkeypatch.setattr("videotg_r1.decode.MAX_FRAME_PIXELS", 64*64)
    monkeypatch.setattr("videotg_r1.decode.MAX_SOURCE_PIXELS", 64*64*4 - 1)
    with pytest.raises(VideoError, match="budget"): scan(path)

@pytest.mark.parametrize("text", ["#EXTM3U\n#EXTINF:1,\nhttp://127.0.0.1:9/a.ts\n", "ffconcat version 1.0\nfile /etc/passwd\n",
                                  "\ufeff#EXTM3U\n/etc/passwd\n", '<?xml version="1.0"?><MPD/>', "v=0\no=- 0 0 IN IP4 127.0.0.1\n"])
def test_playlists_are_refused(tmp_path, text):
    (tmp_path/"a.mp4").write_text(text)
    with pytest.raises(VideoError, match="playlist"): read_clip(tmp_path/"a.mp4", SMALL)

@pytest.mark.parametrize("name", ["http://127.0.0.1:9/a.mp4", "concat:a|b", "file:///etc/passwd", "-i", "a\nb.mp4", "\ud800.mp4", "x"*300, "", "a\0b"])
def test_hostile_names_are_one_line(tmp_path, name):
    with pytest.raises(VideoError) as e: read_clip(name, SMALL)
    assert "\n" not in str(e.value)
    with pytest.raises(VideoError): probe(name)
    with pytest.raises(VideoError): read_clip(name, SMALL, FrameCache(tmp_path))


PARENT = """
import os, sys, time
from videotg_r1.video import FrameSpec, read_clip, _worker
read_clip(sys.argv[1], FrameSpec(min_pixels=28*28))
fork = os.fork()
if not fork: time.sleep(20); os._exit(0)      # holds copies of the pipes, as a dataloader's worker would
print(_worker(3 << 30).child.pid, fork, flush=True)
time.sleep(60)
"""

def test_the_child_dies_with_its_parent(tmp_path):
    path = write_mp4(tmp_path/"a.mp4", grey(16, 56), fps=4)
    p = subprocess.Popen([sys.executable, "-c", PARENT, str(path)], stdout=subprocess.PIPE, text=True, cwd=ROOT)
    child,fork = map(int, p.stdout.readline().split())
    os.kill(p.pid, signal.SIGKILL); p.wait()
    try: assert gone(child)
    finally: os.kill(fork, signal.SIGKILL)

def test_a_forked_process_gets_a_child_of_its_own(tmp_path):
    path = write_mp4(tmp_path/"a.mp4", grey(16, 56), fps=4)
    read_clip(path, SMALL)
    mine = worker(3 << 30).child.pid
    if not (pid := os.fork()):
        try: os._exit(0 if len(read_clip(path, SMALL).frames) == 8 and worker(3 << 30).child.pid != mine else 1)
        finally: os._exit(2)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    assert len(read_clip(path, SMALL).frames) == 8 and worker(3 << 30).child.pid == mine

def test_the_child_is_light(tmp_path):
    path = write_mp4(tmp_path/"a.mp4", grey(16, 56), fps=4)
    read_clip(path, SMALL)
    maps = Path(f"/proc/{worker(3 << 30).child.pid}/maps").read_text()
    assert "libtorch" not in maps and "libav" in maps
    code = "import sys, videotg_r1.video; print([m for m in ('torch', 'av', 'decord', 'pandas', 'matplotlib') if m in sys.modules])"
    assert subprocess.check_output([sys.executable, "-c", code], text=True, cwd=ROOT).strip() == "[]"


def test_cache_follows_the_file_and_the_settings(tmp_path):
    path,cache = write_mp4(tmp_path/"a.mp4", grey(16, 56), fps=4),FrameCache(tmp_path/"cache")
    first = read_clip(path, SMALL, cache)
    again = read_clip(path, SMALL, cache)
    assert (cache.hits, cache.misses) == (1, 1) and (again.frames == first.frames).all() and again.decoder == first.decoder
    assert (again.frame_ts == first.frame_ts).all() and again.fps == first.fps and again.duration_s == first.duration_s
    read_clip(path, replace(SMALL, fps=1), cache); read_clip(path, replace(SMALL, decoder="pyav"), cache)
    assert cache.misses == 3
    write_mp4(path, grey(16, 56)[::-1], fps=4)                   # another video under the old name
    assert read_clip(path, SMALL, cache).frames[0].mean() < 60 and cache.misses == 4
    with pytest.raises(VideoError, match="no such file"): read_clip(tmp_path/"b.mp4", SMALL, cache)

def test_cache_survives_damage_and_a_disk_that_refuses(tmp_path, monkeypatch):
    path,cache = write_mp4(tmp_path/"a.mp4", grey(16, 56), fps=4),FrameCache(tmp_path/"cache")
    first = read_clip(path, SMALL, cache)
    entry = cache.entry(path, SMALL); data = entry.read_bytes()
    for broken in (b"", data[:100], data[:-1], data[:500] + b"\xff\xff" + data[502:], b"PK" + bytes(500), os.urandom(300)):
        entry.write_bytes(broken)
        assert (read_clip(path, SMALL, cache).frames == first.frames).all()
    assert cache.broken == 6 and entry.read_bytes() == data
    entry.unlink()
    def full(*a, **k): raise OSError(28, "No space left on device")
    monkeypatch.setattr(np, "savez", full)
    with pytest.warns(UserWarning, match="No space left"): assert (read_clip(path, SMALL, cache).frames == first.frames).all()
    assert not list(cache.folder.iterdir())

def test_cache_stays_within_its_bound(tmp_path):
    cache = FrameCache(tmp_path/"cache", max_bytes=200_000)
    paths = [write_mp4(tmp_path/f"{k}.mp4", grey(16, 56) + np.uint8(k), fps=4) for k in range(8)]
    for p in paths: read_clip(p, SMALL, cache)
    assert sum(o.stat().st_size for o in cache.folder.iterdir()) <= 200_000
    cache.hits = 0; read_clip(paths[-1], SMALL, cache)
    assert cache.hits == 1


def test_linspace_is_the_peers_rule(tmp_path):
    "qwen_vl_utils: nframes = floor to even of duration*fps, linspace(0, total-1, n).round()"
    path = encode(tmp_path/"a.mp4", grey(90), fps=8)             # 11.25 s
    clip = read_clip(path, replace(SMALL, placement="linspace"))
    want = np.linspace(0, 89, 22).round()
    assert np.abs(which(clip.frames) - want).max() < 1.6 and np.allclose(clip.frame_ts, want/8) and clip.fps == 22/11.25

def test_small_videos_do_not_grow_beyond_the_minimum(tmp_path):
    for side in (56, 112):
        path = encode(tmp_path/f"{side}.mp4", grey(16, side))
        assert read_clip(path, FrameSpec(min_pixels=28*28)).frames.shape[1:3] == (side, side)
        assert read_clip(path, FrameSpec()).frames.shape[1:3] == (112, 112)
        assert read_clip(path, FrameSpec(factor=32, min_pixels=32*32)).frames.shape[1] % 32 == 0

@both
def test_the_two_decoders_behind_one_plan(tmp_path):
    path = encode(tmp_path/"a.mp4", grey(96), g=12)
    info = scan(path)
    for index in ([0,0,0], [95], list(range(96)), [5,50,95], list(range(0, 96, 12))):
        a = decord_frames(path, info, np.asarray(index), 28, 56)
        b,_ = pyav_frames(path, info, np.asarray(index), 28, 56)
        assert a.shape == b.shape == (len(index),28,56,3) and np.abs(a.astype(int) - b).max() <= 3


def test_what_is_no_file_is_refused_at_once(tmp_path):
    "An endless device, a pipe that nobody writes to, a folder, links to nothing and to themselves"
    (tmp_path/"zero.mp4").symlink_to("/dev/zero"); os.mkfifo(tmp_path/"pipe.mp4"); (tmp_path/"folder.mp4").mkdir()
    (tmp_path/"gone.mp4").symlink_to("nowhere.mp4"); (tmp_path/"loop.mp4").symlink_to("loop.mp4")
    for name, word in dict(zero="not a regular file", pipe="not a regular file", folder="not a regular file", gone="no such file", loop="no such file").items():
        with pytest.raises(VideoError, match=word): read_clip(tmp_path/f"{name}.mp4", SMALL, timeout_s=20)
        with pytest.raises(VideoError): read_clip(tmp_path/f"{name}.mp4", SMALL, FrameCache(tmp_path/"cache"), timeout_s=20)

def test_a_file_that_grows_while_it_is_read_ends_in_time(tmp_path):
    path, stop = encode(tmp_path/"live.ts", grey(96)), threading.Event()
    more = path.read_bytes()
    def grow():
        with open(path, "ab") as f:
            while not stop.is_set() and f.tell() < 200 << 20: f.write(more); f.flush()
    t = threading.Thread(target=grow); t.start()
    began = time.monotonic()
    try: read_clip(path, SMALL, timeout_s=2)
    except VideoError as e: assert "\n" not in str(e)
    finally: stop.set(); t.join()
    assert time.monotonic() - began < 60

def test_a_decoder_that_crashes_is_named_and_replaced(tmp_path):
    path = write_mp4(tmp_path/"a.mp4", grey(16, 56), fps=4)
    for how in (signal.SIGSEGV, signal.SIGKILL):
        read_clip(path, SMALL)
        child = worker(3 << 30).child.pid
        os.kill(child, signal.SIGSTOP)                           # so that it surely dies with the question unanswered
        killer = threading.Timer(.3, os.kill, (child, how)); killer.start()
        if how != signal.SIGKILL: threading.Timer(.4, os.kill, (child, signal.SIGCONT)).start()
        with pytest.raises(VideoError, match=f"the decoder died .exit -{how.value}"): read_clip(path, replace(SMALL, decoder="pyav"), timeout_s=60)
        killer.join()
        assert len(read_clip(path, SMALL).frames) == 8

LIAR = """
import json, struct, sys
def say(o): t = json.dumps(o).encode(); sys.stdout.buffer.write(struct.pack('<I', len(t)) + t); sys.stdout.flush()
{what}
sys.stdin.read()
"""
@pytest.mark.parametrize("what", ["say({'shape': [10**6, 10**6, 3]})", "say({'shape': [-1, 4]})", "sys.stdout.buffer.write(struct.pack('<I', 2**32 - 1)); sys.stdout.flush()",
                                  "sys.exit(3)"])
def test_a_child_that_lies_is_not_believed(what):
    "A decoder that a file has taken over answers what it likes"
    w = DecodeWorker(1 << 30)
    w.child = subprocess.Popen([sys.executable, "-c", LIAR.format(what=what)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, bufsize=0)
    w.words, w.pid, w.answers = tempfile.TemporaryFile("a+b"), os.getpid(), 0
    with pytest.raises(WorkerLost): w.ask({"do": "scan", "path": "x"}, 20)
    assert w.child is None

def test_the_child_holds_no_secrets_and_no_network(tmp_path, monkeypatch):
    monkeypatch.setenv("MY_SECRET_TOKEN", "canary-in-the-environment")
    path = write_mp4(tmp_path/"a.mp4", grey(16, 56), fps=4)
    stop_workers(); read_clip(path, SMALL)
    child = worker(3 << 30).child.pid
    assert b"canary" not in Path(f"/proc/{child}/environ").read_bytes()
    limits = Path(f"/proc/{child}/limits").read_text()
    assert str(64 << 20) in limits.split("Max file size")[1].split("\n")[0] and "unlimited" not in limits.split("Max address space")[1].split("\n")[0][:40]
    status = Path(f"/proc/{child}/status").read_text()
    assert "NoNewPrivs:\t1" in status
    code = "from videotg_r1.decode import _leave_network as leave; import os; a = os.readlink('/proc/self/ns/net'); leave(); print(a != os.readlink('/proc/self/ns/net'))"
    if "True" not in subprocess.check_output([sys.executable, "-c", code], text=True, cwd=ROOT): pytest.skip("this kernel or container forbids unshare: the child keeps the network")
    assert os.readlink(f"/proc/{child}/ns/net") != os.readlink("/proc/self/ns/net")


def test_quarantine_spares_the_next_reader_and_forgets_a_repaired_file(tmp_path):
    path, cache = write_mp4(tmp_path/"a.mp4", grey(16, 56), fps=4), FrameCache(tmp_path/"cache")
    read_clip(path, SMALL)
    os.kill(worker(3 << 30).child.pid, signal.SIGSTOP)           # a hang: costs its limit once
    pyav = replace(SMALL, decoder="pyav")
    with pytest.raises(VideoError, match="no answer"): read_clip(path, pyav, cache, timeout_s=1)
    with pytest.raises(VideoError, match="no answer.*quarantine.jsonl"): read_clip(path, pyav, FrameCache(cache.folder), timeout_s=1)
    row, = quarantined(cache.folder)
    assert (row["video"], row["bytes"], row["sha256"]) == (str(path), path.stat().st_size, file_identity(path)[2]) and "pyav (av " in row["decoder"]
    assert len(read_clip(path, SMALL, cache).frames) == 8        # other settings are another question
    write_mp4(path, grey(24, 56), fps=4)
    assert len(read_clip(path, pyav, cache).frames) == 12 and quarantined(cache.folder) == []
    with pytest.raises(VideoError, match="no such file"): read_clip(tmp_path/"b.mp4", SMALL, cache)
    assert [r["reason"] for r in quarantined(cache.folder)] == ["no such file"]
    write_mp4(tmp_path/"b.mp4", grey(16, 56), fps=4)
    assert len(read_clip(tmp_path/"b.mp4", SMALL, cache).frames) == 8 and quarantined(cache.folder) == []

def test_a_decoder_that_does_not_start_is_not_held_against_the_video(tmp_path, monkeypatch):
    path, cache = write_mp4(tmp_path/"a.mp4", grey(16, 56), fps=4), FrameCache(tmp_path/"cache")
    (tmp_path/"av.py").write_text("raise ImportError('libav is gone')")
    stop_workers()
    with monkeypatch.context() as m:
        m.setenv("PYTHONPATH", str(tmp_path))
        with pytest.raises(ChildProcessError, match="no decoder starts here .the decoder died .exit 1: ImportError: libav is gone.*vtg doctor"): read_clip(path, SMALL, cache)
    assert not cache.quarantine.exists() and len(read_clip(path, SMALL, cache).frames) == 8

def test_processes_that_share_a_cache_keep_its_bound_together(tmp_path):
    clip = Clip(np.zeros((4, 28, 28, 3), np.uint8), np.arange(4)/2, 2., 2.)
    one, other = (FrameCache(tmp_path, max_bytes=100_000) for _ in range(2))     # as two processes have them
    for i in range(20): (one, other)[i % 2].put(tmp_path/f"{i:040x}.npz", clip)
    assert sum(p.stat().st_size for p in tmp_path.glob("*.npz")) <= 100_000

def test_quarantine_of_many_processes_at_once(tmp_path):
    pids = []
    for k in range(4):
        if not (pid := os.fork()):
            try:
                cache = FrameCache(tmp_path)
                for i in range(10): cache.set_aside(f"{k}-{i}", VideoError(tmp_path/f"{k}-{i}.mp4", "no such file"), SMALL)
                cache.set_aside("same", VideoError(tmp_path/"same.mp4", "no such file"), SMALL)
                os._exit(0)
            finally: os._exit(1)
        pids.append(pid)
    assert [os.waitstatus_to_exitcode(os.waitpid(p, 0)[1]) for p in pids] == [0]*4
    assert len(quarantined(tmp_path)) == 41 and len((tmp_path/"quarantine.jsonl").read_text().splitlines()) == 41

def test_forty_mutants():
    "A slice of `make fuzz`, which reads 2,000"
    from mutants import run
    counts, wrong = run(40, seed=7, workers=1, say=lambda *a, **k: None, most=20_000)
    assert wrong == [] and sum(counts.values()) == 80
    assert len({kind for kind, _, _ in counts}) >= 8 and {"read", "refused"} <= {o for _, _, o in counts}
