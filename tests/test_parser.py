"The answer parser on ten thousand generated answers of each family: no exception, and what was written is read back exactly"
import math

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from videotg_r1.prompts import format_answer, is_formatted, parse_answer

EXAMPLES, ANSWERS, BYTES = 100, 100, 16 # answers are cut from bytes, 100 to an example: that is what makes 10,000 take a second
DASHES = (" - ", "-", " – ", "–", " — ", "—", " ~ ")
WORDS = (" to ", " and ", " until ", " till ", " through ")


class Dice:
    "Choices read off a number, so that hypothesis can shrink what failed"
    def __init__(self, data): self.n = int.from_bytes(data, "big")
    def below(self, k):
        self.n, out = divmod(self.n, k)
        return out
    def one(self, options): return options[self.below(len(options))]


def times(d, most=40_000):
    "A span as (whole seconds, decimals as text) twice, the second later"
    digits = d.below(4)
    a = d.below(most*10**digits)
    b = a + 1 + d.below(600*10**digits)
    text = lambda t: (t//10**digits, f"{t % 10**digits:0{digits}d}" if digits else "")
    return text(a), text(b)


def value(t): return float(f"{t[0]}.{t[1]}")
def plain(t): return f"{t[0]}.{t[1]}" if t[1] else str(t[0])
def clock(t, hours, pad):
    h, m, s = (t[0]//3600, t[0]//60 % 60, t[0] % 60) if hours else (0, t[0]//60, t[0] % 60)
    first = "02d" if pad else "d"
    return (f"{h:{first}}:{m:02d}:{s:02d}" if hours else f"{m:{first}}:{s:02d}") + (f".{t[1]}" if t[1] else "")


def around(d, text):
    "The answer as it may stand in a completion"
    return d.one(("{}", "<answer>{}</answer>", "<think>First 1 to 2, <answer>B</answer>.</think>\n<answer> {} </answer>", "<ANSWER>{}</ANSWER>",
                  "<answer>{}", "<answer>1 to 2</answer> No: <answer>{}</answer>", "The event happens at {} in the video.", "\n{}.\n")).format(text)


def seconds(d):
    a, b = times(d)
    unit = d.one(("", " s", "s", " sec", " seconds", " secs", " second"))
    return around(d, plain(a) + d.one(("", unit)) + d.one(DASHES + WORDS) + plain(b) + unit), a, b

def minutes(d):
    a, b = times(d, 50_000)
    pad = d.below(2)
    return around(d, clock(a, False, pad) + d.one(DASHES + WORDS) + clock(b, False, pad)), a, b

def hours(d):
    a, b = times(d, 300_000)
    pad = d.below(2)
    return around(d, clock(a, True, pad) + d.one(DASHES + WORDS) + clock(b, True, pad)), a, b

def from_to(d):
    a, b = times(d)
    write = d.one((plain, lambda t: clock(t, True, True)))
    words = d.one(("from {} to {}", "From {} until {}", "between {} and {}", "it lasts from {} through {}", "from {}s to {}s"))
    return around(d, words.format(write(a), write(b))), a, b

def en_dash(d):
    a, b = times(d)
    write = d.one((plain, lambda t: plain(t) + "s", lambda t: clock(t, False, True) if t[0] < 60_000 else plain(t)))
    return around(d, write(a) + d.one(("–", " – ", " –", "– ", "—", " — ")) + write(b)), a, b

def json_like(d):
    a, b = times(d)
    quote, write = d.one((("", plain), ('"', plain), ('"', lambda t: clock(t, True, True)), ('"', lambda t: plain(t) + "s")))
    x, y = (quote + write(t) + quote for t in (a, b))
    name = d.one(("", "_time", "_seconds", "_sec"))
    form = d.one((f"[{x}, {y}]", f"[[{x},{y}]]", f"({x}, {y})", f'{{"timestamps": [{x}, {y}]}}', f'{{"start{name}": {x}, "end{name}": {y}}}',
                  f'[{{"start{name}":{x},"end{name}":{y},"query":"a dog"}}]', f'{{\n  "start{name}": {x},\n  "end{name}": {y}\n}}',
                  f'{{"span": "{write(a)} - {write(b)}"}}', f"```json\n{{'start{name}': {x}, 'end{name}': {y}}}\n```"))
    return around(d, form), a, b

def tagged(tag):
    def family(d):
        a, b = times(d)
        write = d.one((plain, lambda t: plain(t) + "s", lambda t: clock(t, True, True)))
        x, y, o, c = write(a), write(b), f"<{tag}>", f"</{tag}>"
        return around(d, d.one((f"{o}{x}{c} to {o}{y}{c}", f"{o}{x}{c}{o}{y}{c}", f"{o}{x}{c}, {o}{y}{c}", f"{o}{x} to {y}{c}", f"{o} {x} – {y} {c}",
                                f"from {o}{x}{c} to {o}{y}{c}", f"{o}[{x}, {y}]{c}"))), a, b
    return family


FAMILIES = dict(seconds=seconds, mm_ss=minutes, hh_mm_ss=hours, from_a_to_b=from_to, en_dash=en_dash, json=json_like,
                time=tagged("time"), timestep=tagged("timestep"))
fuzz = settings(max_examples=EXAMPLES, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck))
chunks = st.binary(min_size=ANSWERS*BYTES, max_size=ANSWERS*BYTES).map(
    lambda data: [Dice(data[i:i + BYTES]) for i in range(0, len(data), BYTES)])


@pytest.mark.parametrize("family", FAMILIES)
def test_spans_are_read_back_exactly(family):
    seen = set()
    @fuzz
    @given(chunks)
    def check(dice):
        for d in dice:
            text, a, b = FAMILIES[family](d)
            parsed = parse_answer(text)
            assert parsed.spans == ((value(a), value(b)),), (text, parsed)
            assert parsed.ok and not parsed.miss_reason, text
            seen.add(text)
    check()
    assert len(seen) > 8_000, "the generator repeats itself"


LETTERS = ("{L}", "{L})", "({L})", "{L}.", "{L}:", "**{L}**", "[{L}]", '"{L}"', "{L}, {s}", "({L}) {s}", "{L}) {s}", "{L} {s}", "{L} [{s}]", "{L}\nfrom {s}",
           "{L} from {s}", "{L}. {text}, {s}", "{L}: {text} from {s}", "{L} - {text}", "Answer: {L}", "answer: {L}, {s}", "ANSWER: ({L})", "Answer: {L}) {text}",
           "The answer is {L}.", "The answer is ({L}), {s}", "The correct answer is option {L}, {s}", "Option {L}: {text}", "I choose option {L} because {text}",
           "The right choice is {L}", "Final answer: **{L}**", "The question is hard.\nAnswer: {L}\nTime: {s}", '{{"answer": "{L}", "start": 1, "end": 2}}',
           "Answer = {L}", "Answer:\n{L}", "My answer is '{L}'")
NO_LETTER = ("{text}", "a man {text}", "A man walks in, {s}", "I think so, {s}", "The answer is A man walking", "at 3 a.m.", "e.g. {text}", "i.e. {text}",
             "I'm not sure", "{L}, {M}", "{L}, {M}, {s}", "{s}", "answer", "Option", "", "no idea", "{L}-shaped", "{L}{M}", "the {l}-team wins", "Answer: {L}{m}{m}")
TEXTS = ("the dog barks", "somebody opens a door", "the red square moves left", "two people sit down")


def test_letters():
    "Options: `B)`, and `Answer: C` means C"
    seen = set()
    @fuzz
    @given(chunks)
    def check(dice):
        for d in dice:
            a, b = times(d)
            L, M = chr(65 + d.below(26)), chr(65 + d.below(26))
            fill = dict(L=L, M=M, l=L.lower(), m=M.lower(), s=f"{plain(a)} to {plain(b)}", text=d.one(TEXTS))
            wrap = d.one(("{}", "<answer>{}</answer>", "<think>B, or A: 1 to 2</think><answer>{}</answer>", "<answer>A, 1 to 2</answer><answer>{}</answer>"))
            yes, no = (wrap.format(d.one(forms).format(**fill)) for forms in (LETTERS, NO_LETTER))
            assert parse_answer(yes).choice == ord(L) - 65, yes
            assert parse_answer(no).choice is None, no
            seen.add(yes)
    check()
    assert len(seen) > 5_000, "the generator repeats itself"


def test_our_own_form():
    "What `format_answer` writes is in the strict form and read back as rounded"
    @fuzz
    @given(chunks)
    def check(dice):
        for d in dice:
            digits, choice = d.below(4), d.one((None, *range(26)))
            spans = [tuple(sorted((value(a), value(b)))) for a, b in (times(d) for _ in range(1 + d.below(3)))]
            text = format_answer(spans, choice, digits)
            kind = "elsewhere" if choice is None else "gqa"
            parsed = parse_answer(text, strict=choice is None or len(spans) == 1, kind=kind)
            assert parsed.choice == choice and len(parsed.spans) == len(spans), text
            for (s, e), (x, y) in zip(parsed.spans, spans, strict=True):
                assert s == round(x*10**digits)/10**digits and (e == round(y*10**digits)/10**digits or round(e - s, 9) == 10**-digits), text
            assert is_formatted(text, kind) == (choice is None or len(spans) == 1), text
    check()


@settings(fuzz, max_examples=1000)
@given(st.text(max_size=80), st.sampled_from(["{}", "<answer>{}</answer>", "<think>{}", "{} to {}", "[{}, {}]", '{{"start": {}, "end": {}}}', "Answer: {}", "<time>{}</time>"]))
def test_any_text(text, frame):
    "Nothing makes it fail, and what it says is sound"
    whole = frame.replace("{{", "{").replace("}}", "}").replace("{}", text)
    parsed = parse_answer(whole)
    assert all(math.isfinite(e) and 0 <= s < e for s, e in parsed.spans)
    assert parsed.ok == bool(parsed.spans or parsed.none) == (not parsed.miss_reason)
    assert parsed.choice is None or 0 <= parsed.choice < 26
    for kind in ("vtg", "elsewhere", "gqa"):
        strict = parse_answer(whole, strict=True, kind=kind)
        assert not strict.ok or strict.spans == parsed.spans
