//! Files, texts and templates made to hurt: each gets a result or a typed error, soon, and never a panic.

use std::time::{Duration, Instant};

use serde_json::{Value as Json, json};

use super::{XorShift, golden_json, golden_tokenizer};
use crate::{
    ChatTemplate, Error, Message, Part, RenderOptions, Tokenizer, alphabet, limits, template_from_config,
};

/// Runs `f` and fails when it takes two seconds or more.
fn soon<T>(what: &str, f: impl FnOnce() -> T) -> T {
    let start = Instant::now();
    let result = f();
    let time = start.elapsed();
    assert!(time < Duration::from_secs(2), "{what} took {time:?}");
    result
}

/// A valid file of a few kilobytes: the bytes, four merges, two added tokens.
fn small() -> Json {
    let mut vocab: serde_json::Map<String, Json> =
        (0..=255u8).map(|b| (alphabet::char_of(b).to_string(), b.into())).collect();
    for (i, t) in ["ab", "cd", "abcd", "Ġa"].into_iter().enumerate() {
        vocab.insert(t.into(), (256 + i).into());
    }
    json!({
        "version": "1.0", "truncation": null, "padding": null, "normalizer": null,
        "added_tokens": [
            {"id": 260, "content": "<|user|>", "single_word": false, "lstrip": false, "rstrip": false, "normalized": false, "special": true},
            {"id": 261, "content": "<think>", "single_word": false, "lstrip": false, "rstrip": true, "normalized": true, "special": false}],
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [
            {"type": "Split", "pattern": {"Regex": crate::split::GLM_PATTERN}, "behavior": "Isolated", "invert": false},
            {"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": false}]},
        "post_processor": {"type": "ByteLevel"},
        "decoder": {"type": "ByteLevel", "add_prefix_space": true, "trim_offsets": true, "use_regex": true},
        "model": {"type": "BPE", "dropout": null, "unk_token": null, "continuing_subword_prefix": null,
            "end_of_word_suffix": null, "fuse_unk": false, "byte_fallback": false, "ignore_merges": false,
            "vocab": vocab, "merges": [["a", "b"], ["c", "d"], ["ab", "cd"], ["Ġ", "a"]]}
    })
}

/// Loads the small file after a change.
fn changed(change: impl FnOnce(&mut Json)) -> Result<Tokenizer, Error> {
    let mut json = small();
    change(&mut json);
    let text = json.to_string();
    soon("loading", || Tokenizer::from_json(text.as_bytes()))
}

#[test]
fn a_small_tokenizer_cut_at_every_length_is_a_typed_error() {
    let text = small().to_string();
    assert!(Tokenizer::from_json(text.as_bytes()).is_ok());
    for n in 0..text.len() {
        let result = Tokenizer::from_json(&text.as_bytes()[..n]);
        assert!(matches!(result, Err(Error::Json { .. })), "{n} bytes");
    }
}

#[test]
fn mutated_tokenizers_load_or_fail_without_a_panic() {
    let small = small().to_string().into_bytes();
    // The vocabulary is most of the file; half of the mutations go to the rest.
    let structure: Vec<usize> = (0..small.len()).filter(|&i| i < 1500 || i + 1200 > small.len()).collect();
    let mut random = XorShift(0x9E37_79B9_7F4A_7C15);
    let (mut ok, mut failed) = (0, 0);
    for round in 0..2400 {
        let mut bytes = small.clone();
        for _ in 0..=random.below(4) {
            let at = if round % 2 == 0 {
                structure[random.below(structure.len())]
            } else {
                random.below(small.len())
            };
            let at = at.min(bytes.len() - 1);
            match random.below(6) {
                0 => bytes[at] = random.next() as u8,
                1 => bytes[at] ^= 1 << random.below(8),
                2 => drop(bytes.remove(at)),
                3 => bytes.insert(at, b"\"[]{},:019-.eE\\u"[random.below(16)]),
                4 => {
                    let end = (at + random.below(40)).min(bytes.len());
                    let part = bytes[at..end].to_vec();
                    let to = random.below(bytes.len());
                    bytes.splice(to..to, part);
                }
                _ => {
                    let end = (at + random.below(20)).min(bytes.len());
                    bytes.drain(at..end);
                }
            }
            if bytes.is_empty() {
                bytes.push(b'{');
            }
        }
        match soon("a mutated file", || Tokenizer::from_json(&bytes)) {
            Ok(t) => {
                ok += 1;
                let ids = soon("encoding", || t.encode("abcd <|user|> 123 中\n\n")).unwrap_or_default();
                t.decode(&ids, true);
            }
            Err(e) => {
                failed += 1;
                assert!(e.to_string().len() < 600, "{e}");
            }
        }
    }
    assert!(
        ok > 50 && failed > 500,
        "{ok} loaded, {failed} failed: the mutations are too weak or too strong"
    );
}

#[test]
fn components_that_change_ids_are_named_and_rejected() {
    let bert = json!({"type": "BertNormalizer"});
    let cases: Vec<(&str, Json, &str)> = vec![
        ("/normalizer", json!({"type": "NFC"}), "`normalizer` is NFC"),
        ("/normalizer", bert, "`normalizer` is BertNormalizer"),
        ("/decoder", json!({"type": "Metaspace"}), "`decoder` is Metaspace"),
        ("/decoder", Json::Null, "`decoder` is null"),
        ("/pre_tokenizer", Json::Null, "`pre_tokenizer` is null"),
        ("/pre_tokenizer", json!({"type": "Whitespace"}), "`pre_tokenizer` is Whitespace"),
        ("/pre_tokenizer", json!({}), "`pre_tokenizer` is without a type"),
        ("/pre_tokenizer/pretokenizers", json!([]), "an empty Sequence"),
        ("/pre_tokenizer/pretokenizers/0/type", "Digits".into(), "pretokenizers[0]` is Digits"),
        ("/pre_tokenizer/pretokenizers/0/behavior", "Removed".into(), "behavior` is Removed"),
        ("/pre_tokenizer/pretokenizers/0/invert", true.into(), "invert` is true"),
        ("/pre_tokenizer/pretokenizers/0/pattern", json!({"String": " "}), "pattern` is something else"),
        ("/pre_tokenizer/pretokenizers/1/add_prefix_space", true.into(), "add_prefix_space` is true"),
        ("/model/type", "Unigram".into(), "`model.type` is Unigram"),
        ("/model/dropout", 0.1.into(), "`model.dropout` is another number"),
        ("/model/continuing_subword_prefix", "##".into(), "continuing_subword_prefix` is ##"),
        ("/model/end_of_word_suffix", "</w>".into(), "end_of_word_suffix` is </w>"),
    ];
    for (path, value, wanted) in cases {
        let e = changed(|j| *j.pointer_mut(path).unwrap() = value).unwrap_err();
        assert!(matches!(e, Error::Unsupported { .. }), "{path}: {e:?}");
        assert!(e.to_string().contains(wanted), "{path}: {e}");
    }
    for path in ["model", "vocab", "merges"] {
        let e = changed(|j| {
            let parent = if path == "model" { j } else { &mut j["model"] };
            parent.as_object_mut().unwrap().remove(path);
        });
        assert!(matches!(e, Err(Error::Missing { .. })), "{path}");
    }
    // Settings that do not change ids are accepted, whatever they are.
    for (path, value) in [
        ("/post_processor", json!({"type": "TemplateProcessing", "single": [{"SpecialToken": {"id": "x"}}]})),
        ("/truncation", json!({"stride": 99, "max_length": 1})),
        ("/model/dropout", 0.0.into()),
        ("/model/continuing_subword_prefix", "".into()),
    ] {
        let t = changed(|j| *j.pointer_mut(path).unwrap() = value).unwrap();
        assert_eq!(t.encode("abcd").unwrap(), [258], "{path}");
    }
}

#[test]
fn contradictions_in_vocabulary_and_merges_are_rejected() {
    let vocab = |j: &mut Json, token: &str, id: Json| {
        j["model"]["vocab"][token] = id;
    };
    let e = changed(|j| vocab(j, "xy", 97.into())).unwrap_err();
    assert_eq!(e, Error::DuplicateId { id: 97, first: "a".into(), second: "xy".into() });
    let e = changed(|j| vocab(j, "xy", limits::MAX_TOKEN_ID.into())).unwrap_err();
    assert!(matches!(e, Error::IdOutOfRange { .. }), "{e}");
    for id in [json!(-1), json!(1u64 << 40), json!(1e300), json!("7"), json!([])] {
        assert!(matches!(changed(|j| vocab(j, "xy", id)), Err(Error::Json { .. })));
    }
    let e = changed(|j| vocab(j, &"x".repeat(limits::MAX_TOKEN_BYTES + 1), 700.into())).unwrap_err();
    assert!(matches!(e, Error::TooLarge { what: "token bytes", .. }), "{e}");
    let e = changed(|j| drop(j["model"]["vocab"].as_object_mut().unwrap().remove("Ġ"))).unwrap_err();
    assert_eq!(e, Error::MissingByte { byte: b' ' });
    let double = small().to_string().replace("\"vocab\":{", "\"vocab\":{\"a\":999,");
    let e = Tokenizer::from_json(double.as_bytes()).unwrap_err();
    assert_eq!(e, Error::DuplicateToken { token: "a".into(), first: 999, second: 97 });

    let merge = |m: Json| changed(|j| j["model"]["merges"][1] = m);
    assert_eq!(merge(json!(["a", "zz"])).unwrap_err(), Error::MergeToken { index: 1, token: "zz".into() });
    assert_eq!(merge(json!(["b", "a"])).unwrap_err(), Error::MergeToken { index: 1, token: "ba".into() });
    assert_eq!(merge(json!(["a", "中"])).unwrap_err(), Error::MergeToken { index: 1, token: "中".into() });
    assert_eq!(merge(json!(["", "a"])).unwrap_err(), Error::MergeToken { index: 1, token: "".into() });
    for text in ["ab", "a b c", "a  b"] {
        assert!(matches!(merge(text.into()), Err(Error::MergeForm { index: 1, .. })), "{text}");
    }
    for m in [json!(["a"]), json!(["a", "b", "c"]), json!(7), json!([1, 2])] {
        assert!(matches!(merge(m), Err(Error::Json { .. })));
    }
    // A merge listed twice counts with its last rank, as in the reference.
    let t = changed(|j| j["model"]["merges"].as_array_mut().unwrap().push(json!(["a", "b"]))).unwrap();
    assert_eq!(t.encode("abcd").unwrap(), [258]);

    let added = |id: u64, content: &str| {
        changed(|j| {
            j["added_tokens"][0]["id"] = id.into();
            j["added_tokens"][0]["content"] = content.into();
        })
    };
    assert!(matches!(added(97, "<x>"), Err(Error::DuplicateId { id: 97, .. })));
    assert!(matches!(added(500, "ab"), Err(Error::DuplicateToken { first: 256, second: 500, .. })));
    assert!(matches!(added(u64::from(limits::MAX_TOKEN_ID), "<x>"), Err(Error::IdOutOfRange { .. })));
    assert!(matches!(added(500, ""), Err(Error::AddedToken { id: 500, .. })));
    let long = "x".repeat(limits::MAX_ADDED_TOKEN_BYTES + 1);
    assert!(matches!(added(500, &long), Err(Error::TooLarge { .. })));
    assert!(added(97, "a").is_ok(), "an added token may be one of the vocabulary under the same id");
}

#[test]
fn deep_and_oversized_json_is_refused() {
    for open in ["[", "{\"a\":", "{\"model\":{\"merges\":[[", "{\"pre_tokenizer\":{\"pretokenizers\":["] {
        let text = open.repeat(200_000);
        assert!(matches!(
            soon("deep JSON", || Tokenizer::from_json(text.as_bytes())),
            Err(Error::Json { .. })
        ));
        assert!(template_from_config(text.as_bytes()).is_err());
    }
    let blank = vec![b' '; limits::MAX_JSON_BYTES + 1];
    assert!(matches!(
        Tokenizer::from_json(&blank),
        Err(Error::TooLarge { what: "tokenizer.json bytes", .. })
    ));
    let many = (0..limits::MAX_ADDED_TOKENS + 1).map(|i| json!({"id": 300 + i, "content": format!("<{i}>")}));
    let e = changed(|j| j["added_tokens"] = many.collect()).unwrap_err();
    assert!(matches!(e, Error::Json { .. }) && e.to_string().contains("at most 16384"), "{e}");
    let e = changed(|j| j["pre_tokenizer"]["pretokenizers"] = vec![json!({}); 9].into()).unwrap_err();
    assert!(matches!(e, Error::Json { .. }), "{e}");
}

#[test]
fn split_patterns_that_explode_give_up_in_time() {
    let with = |pattern: &str| {
        changed(|j| j["pre_tokenizer"]["pretokenizers"][0]["pattern"]["Regex"] = pattern.into())
    };
    for pattern in
        ["(", "(?<=a+)b", "\\p{Nope}", &"(".repeat(4000), &"a".repeat(limits::MAX_PATTERN_BYTES + 1)]
    {
        let e = with(pattern).err();
        assert!(
            matches!(e, None | Some(Error::Pattern { .. } | Error::TooLarge { .. })),
            "{}: {e:?}",
            &pattern[..5.min(pattern.len())]
        );
    }
    let mut gave_up = 0;
    for pattern in [
        r"(a|aa)+(?=b)\1c",
        r"(?=(a+))\1*(a|b|ab)*c",
        r"^(([a-z])+.)+[A-Z](?!x)([a-z])+$",
        r"(x+x+)+(?=y)",
        r"(?!b)(.*)*(?<=zzz)",
        r"(?=.*b.*b.*b)a",
        r"(a*)*(b|c)*(?!d)\1$",
        r"(?:(?:a{1,50}){1,50}){1,50}(?=b)",
        r"a*?a*?a*?a*?a*?a*?(?=b)",
    ] {
        let Ok(tokenizer) = with(pattern) else {
            gave_up += 1;
            continue;
        };
        for text in [
            "a".repeat(limits::MAX_REGEX_BYTES),
            "ax".repeat(5_000),
            "xy ".repeat(5_000),
            "aB".repeat(10_000),
        ] {
            match soon(pattern, || tokenizer.encode(&text)) {
                Ok(ids) => assert_eq!(tokenizer.decode(&ids, false), text),
                Err(Error::PatternWork { .. }) => gave_up += 1,
                Err(e) => panic!("{pattern}: {e:?}"),
            }
        }
    }
    assert!(gave_up >= 9, "only {gave_up} patterns met a limit");
    // An unknown but harmless pattern works.
    let words = with(r"\w+(?!\w)|\s").unwrap();
    assert_eq!(words.encode("ab cd!").unwrap(), [256, 32, 257, 33]);
}

#[test]
fn long_and_repetitive_texts_encode_in_time() {
    // Added tokens that begin like the text again and again.
    let many: Json = (1..200usize)
        .map(|n| json!({"id": 300 + n, "content": format!("{}!", "a".repeat(n)), "rstrip": true, "lstrip": true}))
        .collect();
    let tokenizer = changed(|j| j["added_tokens"] = many).unwrap();
    for text in [
        "a".repeat(1 << 20),
        format!("{}!", "a".repeat(180)).repeat(4000),
        " \n".repeat(1 << 19),
        "\u{301}'s".repeat(1 << 18),
    ] {
        let ids = soon("a long text", || tokenizer.encode(&text)).unwrap();
        assert!(!ids.is_empty());
    }
    // One piece of a megabyte in which every pair merges, twelve times over.
    let tokenizer = changed(|j| {
        for n in 0..12 {
            let (half, whole) = ("a".repeat(1 << n), "a".repeat(2 << n));
            j["model"]["vocab"][whole] = (300 + n).into();
            j["model"]["merges"].as_array_mut().unwrap().push(json!([half, half]));
        }
    })
    .unwrap();
    let ids = soon("a long piece", || tokenizer.encode(&"a".repeat(1 << 20))).unwrap();
    assert_eq!(ids, [311; 256]);
    let e = golden_tokenizer("merge").encode(&" ".repeat(limits::MAX_TEXT_BYTES + 1)).unwrap_err();
    assert!(matches!(e, Error::TooLarge { what: "text bytes", .. }));
}

#[test]
fn ids_without_a_token_decode_to_nothing() {
    let tokenizer = golden_tokenizer("ignore");
    assert_eq!(tokenizer.decode(&[1000, 1023, 151_349, u32::MAX], false), "");
    assert!(!tokenizer.is_special(u32::MAX) && tokenizer.token_bytes(u32::MAX).is_none());
}

/// Renders on a thread with a small stack, so that recursion shows.
fn render(source: &str) -> Result<String, Error> {
    let messages = vec![Message::text("user", "hi"), Message::parts("user", vec![Part::Image])];
    let source = source.to_owned();
    let run = move || ChatTemplate::new(&source)?.render(&messages, &RenderOptions::default());
    std::thread::Builder::new().stack_size(1 << 20).spawn(run).unwrap().join().unwrap()
}

#[test]
fn template_bombs_end_with_a_typed_error() {
    let twice = |body: &str| {
        format!(
            "{{% set n = namespace(x=[1], s='a', k={{}}) %}}{{% for i in range(90) %}}{body}{{% endfor %}}"
        )
    };
    let loops = "{% for i in range(1000) %}";
    let bombs = [
        "{{ 'x' * 10**9 }}".to_owned(),
        "{{ 10**9 * 'xyz' }}".into(),
        "{{ '' * 10**18 }}{{ 'x' * 10**18 }}".into(),
        "{{ [0] * 10**15 }}".into(),
        "{{ ([0] * 100000000) ~ '' }}".into(),
        "{% for i in range(10**9) %}{% endfor %}".into(),
        "{{ range(9223372036854775807) | length }}".into(),
        format!("{0}{0}{0}{0}x", loops) + &"{% endfor %}".repeat(4),
        format!("{0}{0}{0}{0}", loops) + &"{% endfor %}".repeat(4),
        twice("{% set n.s = n.s ~ n.s %}"),
        twice("{% set n.s = n.s + n.s %}"),
        twice("{% set n.s = [n.s, n.s] | join %}"),
        twice("{% set n.s = n.s | replace('a', 'aa') %}"),
        twice("{% set n.s = n.s.replace('', n.s) %}"),
        twice("{% set n.s %}{{ n.s }}{{ n.s }}{% endset %}"),
        twice("{% set n.x = n.x + n.x %}"),
        twice("{% set n.x = [n.x, n.x] %}") + "{{ n.x }}",
        twice("{% set n.x = (n.x, n.x) %}") + "{{ n.x | tojson }}",
        twice("{% set n.x = {'a': n.x, 'b': n.x} %}") + "{{ n.x == n.x }}",
        twice("{% set n.k = dict(n.k, a=n.k) %}") + "{{ n.k ~ '' }}",
        "{% set n = namespace(x=1) %}{% for i in range(100000) %}{% set n.x = [n.x] %}{% endfor %}".into(),
        "{% set a = ['y' * 1000] * 1000 %}{% set b = [a] * 1000 %}{% set c = [b] * 1000 %}{{ c }}".into(),
        "{% set a = ['y' * 1000] * 1000 %}{% set b = [a] * 1000 %}{{ [b] == [b] }}{{ b | tojson | length }}".into(),
        "{% set a = ['y' * 1000] * 1000 %}{% set b = [a] * 1000 %}{{ 'z' in ([b] * 100) }}{{ b in ([b] * 100) }}".into(),
        "{% set a = 'y' * 100000 %}{{ (a ~ '\n') * 100 | indent(60000) }}{{ ('\n' * 100000) | indent(60000, true, true) }}".into(),
        "{{ ([[]] * 100000) | tojson(indent=1000) }}".into(),
        "{{ ([1] * 100000) | tojson(separators=('x' * 100000, ':')) }}".into(),
        "{{ ([1] * 100000) | join('x' * 100000) }}".into(),
        "{{ ('x' * 1000000).split('x') | map('upper') | list | length }}{{ ('x' * 9000000) | list }}".into(),
        "{% macro f(x) %}{{ f(x) }}{% endmacro %}{{ f(1) }}".into(),
        "{% macro f(x) %}{{ f(x ~ x) }}{{ f(x) }}{% endmacro %}{{ f('a') }}".into(),
        "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(20) }}".into(),
        format!("{{{{ {}1 }}}}", "1+".repeat(450)),
        format!("{{{{ {}1 }}}}", "1+".repeat(50_000)),
        format!("{{{{ {}1 }}}}", "not ".repeat(900)),
        format!("{{{{ {}1 }}}}", "-".repeat(50_000)),
        format!("{{{{ x{} }}}}", ".a".repeat(40_000)),
        format!("{{{{ x{} }}}}", "|trim".repeat(20_000)),
        format!("{{{{ {}1{} }}}}", "(".repeat(480), ")".repeat(480)),
        format!("{{{{ {}1{} }}}}", "[".repeat(140), "]".repeat(140)),
        format!("{}{}", "{% if 1 %}".repeat(140), "{% endif %}".repeat(140)),
        format!("{}{}", "{% if 1 %}".repeat(5_000), "{% endif %}".repeat(5_000)),
        format!("{{% if 0 %}}{}{{% endif %}}", "{% elif 0 %}".repeat(9_000)),
        "x".repeat(limits::MAX_TEMPLATE_BYTES + 1),
        "{% set n = namespace() %}{% set n.n = n %}{{ n }}".into(),
        "{% set n = namespace(a=namespace()) %}".into(),
        "{% for x in [1] %}{{ [loop] }}{% endfor %}".into(),
        "{% include 'x' %}".into(),
        "{% extends 'x' %}".into(),
        "{{ ''.__class__.__mro__[1].__subclasses__() }}".into(),
        "{{ messages[0].update({'role': 'x'}) }}".into(),
        "{{ [] | sort(attribute='a', x=1) }}".into(),
        "{{ 'a' | tojson(indent=9999999) }}{{ '%1000000000d' | format(1) }}".into(),
        "{{ -9223372036854775807 // -1 - 5 }}{{ 2 ** 64 }}".into(),
    ];
    for (i, bomb) in bombs.iter().enumerate() {
        let name = format!("bomb {i}: {}", bomb.chars().take(120).collect::<String>());
        let result = soon(&name, || render(bomb));
        assert!(result.is_err(), "{name} rendered {} bytes", result.map_or(0, |t| t.len()));
    }
}

#[test]
fn the_edges_below_the_bombs_still_render() {
    for (source, wanted) in [
        ("{{ 'x' * 3 }}{{ 2 * 'ab' }}{{ [0] * 2 }}".to_owned(), "xxxabab[0, 0]".to_owned()),
        (format!("{{{{ {}1 }}}}", "1+".repeat(60)), "61".into()),
        (format!("{{% if 0 %}}{}{{% else %}}z{{% endif %}}", "{% elif 0 %}".repeat(100)), "z".into()),
        ("{{ 'x' * 1000000 }}".into(), "x".repeat(1_000_000)),
        ("{% for i in range(10000) %}y{% endfor %}".into(), "y".repeat(10_000)),
        ("{% macro f(n) %}{% if n %}{{ f(n - 1) }}{% endif %}{{ n }}{% endmacro %}{{ f(5) }}".into(), "012345".into()),
        ("{{ 5[0] is undefined }}{{ messages[1].content }}{{ messages[-1].role }}{{ messages[9] is defined }}".into(),
            "True<|begin_of_image|><|image|><|end_of_image|>userFalse".into()),
    ] {
        assert_eq!(soon(&source[..20.min(source.len())], || render(&source)).unwrap(), wanted, "{source}");
    }
}

#[test]
fn large_conversations_render_and_oversized_ones_are_refused() {
    let template = ChatTemplate::new(
        &serde_json::from_str::<Vec<String>>(include_str!("../../golden/templates.json")).unwrap()[1],
    )
    .unwrap();
    let long: Vec<_> = (0..2000).map(|i| Message::text("user", &"点击".repeat(i % 300))).collect();
    let text = soon("two thousand messages", || template.render(&long, &RenderOptions::default())).unwrap();
    assert!(text.len() > 1_500_000);
    let huge = [Message::text("user", &"x".repeat(limits::MAX_TEMPLATE_INPUT_BYTES))];
    let e = template.render(&huge, &RenderOptions::default()).unwrap_err();
    assert!(matches!(e, Error::TooLarge { what: "chat template input bytes", .. }), "{e}");
    let empty = vec![Message::text("", ""); 100_000];
    assert!(matches!(template.render(&empty, &RenderOptions::default()), Err(Error::TooLarge { .. })));
}

#[test]
fn mutated_templates_render_or_fail_without_a_panic() {
    let sources: Vec<String> = serde_json::from_str(include_str!("../../golden/templates.json")).unwrap();
    let messages = [
        Message::text("system", "s"),
        Message::parts("user", vec![Part::Image, Part::Text("a b\nc".into())]),
    ];
    let mut random = XorShift(0xDEAD_BEEF_1234_5678);
    let (mut ok, mut failed) = (0, 0);
    for round in 0..2000 {
        let mut chars: Vec<char> = sources[round % sources.len()].chars().collect();
        for _ in 0..=random.below(3) {
            let at = random.below(chars.len());
            match random.below(4) {
                0 => chars[at] = char::from(b' ' + random.below(95) as u8),
                1 => drop(chars.remove(at)),
                2 => chars.insert(at, "{}%|()[]'\"~+-*/.,0123 中".chars().nth(random.below(22)).unwrap()),
                _ => {
                    let end = (at + random.below(60)).min(chars.len());
                    let part = chars[at..end].to_vec();
                    let to = random.below(chars.len());
                    chars.splice(to..to, part);
                }
            }
        }
        let source: String = chars.iter().collect();
        let result = soon("a mutated template", || {
            ChatTemplate::new(&source)?.render(&messages, &RenderOptions::default())
        });
        match result {
            Ok(_) => ok += 1,
            Err(_) => failed += 1,
        }
    }
    assert!(ok > 200 && failed > 200, "{ok} rendered, {failed} failed");
}

#[test]
fn the_golden_file_survives_being_cut_at_random_places() {
    let bytes = golden_json("flags");
    let mut random = XorShift(5);
    for _ in 0..200 {
        assert!(Tokenizer::from_json(&bytes[..random.below(bytes.len() - 1)]).is_err());
    }
}
