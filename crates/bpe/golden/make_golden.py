#!/usr/bin/env python3
"""Makes the golden files of this crate and the character tables of src/unicode_tables.rs.

    python make_golden.py --make-tiny <folder with make_tiny.py>

`make_tiny.py` is the project's reference script; its `build_tokenizer` and `CHAT_TEMPLATE` are used. Versions it
was run with: python 3.11.7, transformers 5.23.0, tokenizers 0.23.3, jinja2 3.1.6. Everything is derived from a
fixed seed; nothing is downloaded.

Written next to this script:
    tokenizer.ignore.json, tokenizer.merge.json   the tiny tokenizer with ignore_merges true and false
    tokenizer.gpt2.json                           the same with a plain ByteLevel pre-tokenizer
    tokenizer.flags.json                          the same with every flag of added tokens, and overlapping ones
    encode.jsonl    [text, ids, ids | null if equal to the first, ...] for the four tokenizers, one line per string
    decode.jsonl    [ids, text, text without special tokens | null if equal], by tokenizer.ignore.json
    templates.json  the templates
    render.jsonl    {"t": template, "m": messages, "g": add_generation_prompt, "o": output}
"""
import argparse
import json
import os
import random
import sys

HERE = os.path.dirname(os.path.abspath(__file__))

# The same prompt format as make_tiny's template, written in the style of the published file: a macro for the
# visual parts, a namespace, comments, and tags on lines of their own.
TEMPLATE_LOOPS = """\
{#- Prompt format of the GLM-4.1V family. -#}
[gMASK]<sop>
{%- set ns = namespace(images=0, videos=0) -%}
{%- macro visual(part) -%}
    {%- if part.type == 'video' or 'video' in part -%}
        <|begin_of_video|><|video|><|end_of_video|>
    {%- elif part.type == 'image' or 'image' in part -%}
        <|begin_of_image|><|image|><|end_of_image|>
    {%- endif -%}
{%- endmacro -%}
{% for message in messages %}
    {% if message['role'] == 'system' %}
{{- '<|system|>\\n' ~ message['content'] }}
    {%- elif message.role == 'user' %}
{{- '<|user|>\\n' }}
        {%- if message.content is string %}
{{- message.content }}
        {%- elif message.content is sequence and message.content | length > 0 %}
            {%- for part in message.content %}
                {%- if part.type == 'text' %}
{{- part['text'] }}
                {%- else %}
                    {%- set ns.images = ns.images + (1 if part.type == 'image' else 0) %}
                    {%- set ns.videos = ns.videos + (part.type == 'video') | int %}
{{- visual(part) }}
                {%- endif %}
            {%- endfor %}
        {%- endif %}
    {%- elif message.role == 'assistant' %}
{{- '<|assistant|>' ~ (message.metadata | default('', true)) ~ '\\n' ~ message.content }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt -%}
<|assistant|>{{ '\\n' }}
{%- endif -%}
"""

# Exercises the rest of the language that chat templates use, printing Python values on purpose.
TEMPLATE_LANGUAGE = """\
{% for m in messages %}
  {% if loop.first %}F{% elif loop.last %}L{% else %}M{% endif %}{{ loop.index0 }}/{{ loop.length }}:{{ m.role|upper }}
  {% set text = m.content if m.content is string else m.content | selectattr('type', 'equalto', 'text') | map(attribute='text') | join('|') %}
  {{ text | trim }};{{ text.strip() | length }};{{ text[:5] }}~{{ text[-3:] }}~{{ text[::-1][:4] }}
  {{ text.split('\\n')[-1].lstrip('\\n ') | tojson }} {{ {'a': [1, 2.5, none, true], 'b': text} | tojson }}
  {{ {'k': [text, 1, 1.0, 1e20, 0.00001, false], 'e': []} | tojson(indent=2) }}
  {{ [1, 'x', none, true, 2.0, ('t', 1), ('u',), {'k': 'v'}] }} {{ true }} {{ none }} {{ 7 // 2 }} {{ -7 // 2 }} {{ -7 % 3 }} {{ 7 / 2 }} {{ 2 ** 5 }}
  {{ text.startswith('a') or text.endswith(('b', '。')) }} {{ 'x' in text }} {{ text.replace('a', 'ä') | capitalize }} {{ text.upper().lower() }}
  {%- for k, v in m.items() %}{{ '[' ~ k ~ ':' ~ (v is mapping) ~ (v is iterable) ~ (v is string) ~ ']' }}{% endfor %}
  {%- if m.role not in ['user', 'system'] and not loop.last %}{% continue %}{% endif %}
  {{ m.get('metadata', 'no') }} {{ m.missing is defined }} {{ m.missing }}{{ loop.previtem.role if loop.previtem is defined else '-' }}
{% endfor %}
{% for i in range(10, 0, -3) if i != 4 %}{{ i }},{% else %}none{% endfor %}
{% for i in [] %}x{% else %}empty{% endfor %}
{%- set captured %}<{{ messages | length }}>{% endset %}
{{ captured }}{{ captured | length }} {{ 'a,b,,c'.split(',') }} {{ ' a  b '.split() }} {{ '1-2-3'.split('-', 1) }}
{%- macro twice(x, sep='+', n=2) %}{% for _ in range(n) %}{{ x }}{{ sep if not loop.last }}{% endfor %}{% endmacro %}
{{ twice('q') }}{{ twice('q', n=3) }}{{ twice('q', '') }}
{%- with a = 1, b = 'two' %}{{ a }}{{ b }}{% endwith %}
{{ [3, 1, 2] | sort }}{{ ['b', 'A', 'c'] | sort(reverse=true) }}{{ {'b': 1, 'a': 2} | dictsort }}{{ [1, 2] + [3] }}{{ 'ab' * 2 }}{{ [0] * 3 }}
{{ 'line\\n\\ntwo' | indent(2) }}{{ 'line\\ntwo' | indent(2, true) }}{{ tools is none }}{{ undefined_name is defined }}{{ '%s' | string }}{{ 1 < 2 < 3 }}{{ not 1 == 2 }}
{% if add_generation_prompt %}go{% endif %}
"""

SCRIPTS = [
    (0x21, 0x7E), (0xA1, 0x17F), (0x180, 0x24F), (0x300, 0x36F), (0x370, 0x3FF), (0x400, 0x4FF), (0x531, 0x58F),
    (0x590, 0x5FF), (0x600, 0x6FF), (0x900, 0x97F), (0xE00, 0xE7F), (0x10A0, 0x10FF), (0x1100, 0x11FF),
    (0x1E00, 0x1EFF), (0x2000, 0x206F), (0x2070, 0x209F), (0x2150, 0x218F), (0x2460, 0x24FF), (0x3000, 0x30FF),
    (0x3400, 0x34FF), (0x4E00, 0x9FFF), (0xAC00, 0xD7A3), (0xE000, 0xE0FF), (0xFB00, 0xFDFF), (0xFE00, 0xFEFF),
    (0xFF00, 0xFFEF), (0x10000, 0x100FF), (0x1D400, 0x1D7FF), (0x1F300, 0x1FAFF), (0x20000, 0x200FF),
    (0x323B0, 0x33479), (0xE0000, 0xE01FF), (0x10FF00, 0x10FFFF), (0x0, 0x20), (0x7F, 0xA0),
]
SPACES = [" ", " ", " ", "  ", "\n", "\n\n", "\r\n", "\t", "\r", "\u00a0", "\u3000", "\u2003", "\u2028", "\u0085", "\x0b", "\x0c", "\x1c", "\u200b", "\ufeff"]
SNIPPETS = [
    "'s", "'S", "'t", "'T", "'re", "'RE", "'rE", "'ve", "'Ve", "'m", "'ll", "'LL", "'lL", "'d", "'D", "'\u017f", "'x", "''s", "\u2019s",
    "don't", "I'LL", "we'Ve", "12", "123", "1234", "1234567", "0.5", "3,000", "\u0663\u0664\u0665\u0666", "\u00bd", "\u2167", "\u3007",
    "\U0001f44d\U0001f3fd", "\U0001f468\u200d\U0001f469\u200d\U0001f467", "\U0001f1e8\U0001f1f3", "\u2764\ufe0f", "1\ufe0f\u20e3",
    "e\u0301", "a\u0308\u0323", "\u0915\u094d\u0937", "\u0e01\u0e33", "\u1100\u1161\u11a8", "\u0627\u0644\u0633\u0644\u0627\u0645", "\u05e9\u05dc\u05d5\u05dd",
    "\u202eabc\u202c", "\u200f", "\u0378", "\U000e0041", "\U0010ffff", "\ufffe", "\ufffd", "\ue000",
    "do(action=\"Tap\", element=[500,120])", "finish(message=\"ok\")", "{\"current_app\": \"\u5fae\u4fe1\"}", "** Screen Info **",
    "\u6253\u5f00\u8bbe\u7f6e\u9875\u9762", "\u70b9\u51fb\u641c\u7d22\u6846\uff0c\u7136\u540e\u8fd4\u56de\u3002", "the search box", "Tap", "settings page", "swipe", "\u8d2d\u7269\u8f66",
    "<|", "|>", "<|imag", "image|>", "<|image", "<|user|", "|user|>", "<think", "/think>", "[gMASK", "gMASK]", "<so", "sop>", "<|<|image|>|>",
    "<|user |>", "<|USER|>", "<|image|><|image|>", "<sop><eop>", "</answer", "<|begin_of_", "_", "__init__", "a_b", "--", "...", "\u3002\u3002", "!?", "\\n", "C:\\x",
]


def random_text(rng, added):
    out = []
    for _ in range(rng.choice([1, 2, 3, 4, 5, 6, 8, 12])):
        k = rng.random()
        if k < 0.22:
            out.append(rng.choice(SPACES) * rng.choice([1, 1, 1, 2, 3, 7]))
        elif k < 0.50:
            out.append(rng.choice(SNIPPETS))
        elif k < 0.58:
            out.append(rng.choice(added))
        elif k < 0.62:
            t = rng.choice(added)
            out.append(t[: rng.randrange(len(t))] + t[rng.randrange(len(t)):])
        else:
            lo, hi = rng.choice(SCRIPTS)
            for _ in range(rng.choice([1, 1, 2, 3, 5])):
                out.append(chr(rng.randint(lo, hi)))
    return "".join(out)


def ranges(points):
    out = []
    for c in points:
        if out and out[-1][1] == c - 1:
            out[-1][1] = c
        else:
            out.append([c, c])
    return out


def unicode_tables(path):
    """Reads the classes off the regex engine of `tokenizers`: a character of the class is a piece of its own."""
    from tokenizers import Regex, pre_tokenizers

    lines = [
        "//! The classes `\\p{L}` and `\\p{N}` of the reference tokenizer's regex engine, as inclusive ranges.",
        "//! Made by `golden/make_golden.py`; do not edit.",
        "",
    ]
    for name, pattern, other in [("LETTERS", r"\p{L}", "0"), ("NUMBERS", r"\p{N}", "a")]:
        split = pre_tokenizers.Split(Regex(pattern), behavior="isolated")
        points = [c for c in range(0x110000) if not 0xD800 <= c < 0xE000 and len(split.pre_tokenize_str(other + chr(c))) == 2]
        rows = [f"(0x{a:x}, 0x{b:x})," for a, b in ranges(points)]
        lines += [f"/// `{pattern}`: {len(points)} code points.", "#[rustfmt::skip]", f"pub(crate) const {name}: &[(u32, u32)] = &["]
        for i in range(0, len(rows), 6):
            lines.append("    " + " ".join(rows[i:i + 6]))
        lines += ["];", ""]
    split = pre_tokenizers.Split(Regex(r"\s"), behavior="isolated")
    spaces = [c for c in range(0x110000) if not 0xD800 <= c < 0xE000 and len(split.pre_tokenize_str("0" + chr(c))) == 2]
    white_space = [*range(9, 14), 32, 0x85, 0xA0, 0x1680, *range(0x2000, 0x200B), 0x2028, 0x2029, 0x202F, 0x205F, 0x3000]
    assert spaces == white_space, "\\s is no longer the White_Space property, which the scanner assumes"
    with open(path, "w") as f:
        f.write("\n".join(lines[:-1]) + "\n")


def conversations(rng, n):
    texts = ["打开设置", "Tap [500,120]!", "", " ", "a\nb", "line\r\n", "{\"current_app\": \"微信\"}", "<think>x</think><answer>do(action=\"Tap\")</answer>",
             "quote \" and ' and \\", "</script>&<b>", "tab\tend", "emoji 👍🏽", "{{ not a template }}", "trailing  \n", "\n leading", "\x01\x7f\u2028é", "aXb", "。"]
    parts = lambda: [rng.choice([{"type": "image"}, {"type": "video"}, {"type": "text", "text": rng.choice(texts)}, {"type": "text", "text": rng.choice(texts)}])
                     for _ in range(rng.randrange(1, 5))]
    for _ in range(n):
        msgs = []
        if rng.random() < 0.6:
            msgs.append({"role": "system", "content": rng.choice(texts)})
        for _ in range(rng.randrange(0, 5)):
            role = rng.choice(["user", "user", "assistant", "tool", "observation"])
            m = {"role": role, "content": rng.choice(texts)}
            if role == "user" and rng.random() < 0.6:
                m["content"] = parts()
            if role == "assistant" and rng.random() < 0.4:
                m["metadata"] = rng.choice(["", "get_weather", " x"])
            msgs.append(m)
        yield msgs


def main():
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ap.add_argument("--make-tiny", required=True, help="folder that holds make_tiny.py")
    a = ap.parse_args()
    sys.path.insert(0, a.make_tiny)
    import make_tiny
    from tokenizers import Tokenizer, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    unicode_tables(os.path.join(HERE, "..", "src", "unicode_tables.rs"))
    rng = random.Random(20251212)
    at = lambda name: os.path.join(HERE, name)
    toks = []
    for name, ignore in [("ignore", True), ("merge", False), ("gpt2", False), ("flags", False)]:
        tok, _ = make_tiny.build_tokenizer(1024, 0, ignore, 24)
        if name == "gpt2":
            tok.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
        if name == "ignore":
            # One piece that merging cannot reach, so that ignore_merges makes a difference.
            j = json.loads(tok.to_str())
            vocab, merges = j["model"]["vocab"], j["model"]["merges"]
            drop = [m for m in merges if "".join(m) in ("Ġthe", "Ġsearch", "Ġbox", "确认", "Ġpage")]
            assert drop
            j["model"]["merges"] = [m for m in merges if m not in drop]
            tok = Tokenizer.from_str(json.dumps(j))
        if name == "flags":
            j = json.loads(tok.to_str())
            flags = {"<think>": ["rstrip"], "</think>": ["lstrip"], "<answer>": ["single_word"], "</answer>": ["normalized"],
                     "<|image|>": ["lstrip", "rstrip"], "[MASK]": ["single_word", "lstrip"], "<|video|>": ["normalized", "rstrip"]}
            for t in j["added_tokens"]:
                t.update({k: True for k in flags.get(t["content"], [])})
            for i, content in enumerate(["<sop><eop>", "<|imag", "<|", "设置"]):
                t = dict(j["added_tokens"][0], id=1000 + i, content=content, special=i % 2 == 0, normalized=i >= 2)
                j["added_tokens"].append(t)
            tok = Tokenizer.from_str(json.dumps(j))
        with open(at(f"tokenizer.{name}.json"), "w") as f:
            json.dump(json.loads(tok.to_str()), f, ensure_ascii=False, separators=(",", ":"))
        toks.append(Tokenizer.from_file(at(f"tokenizer.{name}.json")))
    added = make_tiny.SPECIALS + make_tiny.MARKERS

    strings = {"": None, **dict.fromkeys(SNIPPETS), **dict.fromkeys(SPACES), **dict.fromkeys(added)}
    while len(strings) < 12000:
        strings.setdefault(random_text(rng, added))
    strings[" " * 3000 + "a" + "\n" * 2000] = strings["设置" * 700] = strings["ab" * 1500] = None
    with open(at("encode.jsonl"), "w") as f:
        for s in strings:
            ids = [t.encode(s, add_special_tokens=False).ids for t in toks]
            row = [s, ids[0]] + [None if x == ids[0] else x for x in ids[1:]]
            f.write(json.dumps(row, ensure_ascii=False, separators=(",", ":")) + "\n")
    tok = toks[0]
    with open(at("decode.jsonl"), "w") as f:
        for i in range(4000):
            n = rng.choice([0, 1, 2, 3, 5, 8, 20])
            # Single-byte tokens make most sequences invalid UTF-8; ids beyond 1000 have no token.
            ids = [rng.choice([rng.randrange(256), rng.randrange(1000), rng.randrange(980, 1003), rng.randrange(1000, 1 << 20)]) for _ in range(n)]
            full, skip = tok.decode(ids, skip_special_tokens=False), tok.decode(ids, skip_special_tokens=True)
            f.write(json.dumps([ids, full, None if skip == full else skip], ensure_ascii=False, separators=(",", ":")) + "\n")

    templates = [make_tiny.CHAT_TEMPLATE, TEMPLATE_LOOPS, TEMPLATE_LANGUAGE]
    json.dump(templates, open(at("templates.json"), "w"), ensure_ascii=False, indent=1)
    ptok = PreTrainedTokenizerFast(tokenizer_object=toks[0], eos_token="<|endoftext|>", pad_token="<|endoftext|>")
    with open(at("render.jsonl"), "w") as f:
        for t, n in [(0, 200), (1, 200), (2, 100)]:
            for msgs in conversations(rng, n):
                g = rng.random() < 0.7
                # The reference treats an empty conversation as a batch of none.
                if not msgs:
                    continue
                out = ptok.apply_chat_template(msgs, chat_template=templates[t], tokenize=False, add_generation_prompt=g)
                f.write(json.dumps({"t": t, "m": msgs, "g": g, "o": out}, ensure_ascii=False, separators=(",", ":")) + "\n")


if __name__ == "__main__":
    main()
