//! Caches of every format: the same answers where the format is exact enough, and sessions that reuse them.

use pocketglm::{Engine, EngineOptions, KvFormat};

use crate::golden::path;
use crate::support::{Random, answer, exactly, ids_prompt, options};

const FORMATS: [KvFormat; 4] = [KvFormat::F32, KvFormat::F16, KvFormat::Int8, KvFormat::Int4];

fn engine(kv: KvFormat, chunk: usize) -> Engine {
    let options = EngineOptions { kv, prefill_chunk: chunk, ..options() };
    Engine::open(path("default"), options).unwrap()
}

fn text(tokens: usize, seed: u64) -> Vec<u32> {
    let mut random = Random::new(seed);
    (0..tokens).map(|_| random.below(900) as u32).collect()
}

#[test]
fn beginnings_are_reused_in_every_format() {
    for kv in FORMATS {
        let engine = engine(kv, 512);
        let mut session = engine.session();
        // More tokens than the cache has room for at first, so that it grows with what it holds.
        let long = text(300, 5);
        let first = answer(&mut session, &ids_prompt(&engine, &long[..200]), &exactly(4));
        let longer = ids_prompt(&engine, &[&long[..200], &first.ids, &long[200..]].concat());
        let next = answer(&mut session, &longer, &exactly(4));
        // The last token of the answer was never run.
        assert_eq!(next.timings.reused_tokens, 203, "{kv}");
        assert_eq!(next, answer(&mut session, &longer, &exactly(4)), "{kv}");
        // A shorter prompt cuts the cache; what follows is written over the rest.
        let other = ids_prompt(&engine, &[&long[..50], &text(30, 6)[..]].concat());
        let cut = answer(&mut session, &other, &exactly(4));
        assert_eq!(cut.timings.reused_tokens, 50, "{kv}");
        assert_eq!(cut, answer(&mut engine.session(), &other, &exactly(4)), "{kv}");
    }
}

/// Relative distance of logits over all tokens of a prompt.
fn distance(a: &[f32], b: &[f32]) -> f64 {
    assert_eq!(a.len(), b.len());
    let square = |x: f32| f64::from(x) * f64::from(x);
    let difference: f64 = a.iter().zip(b).map(|(a, b)| square(a - b)).sum();
    (difference / b.iter().map(|&b| square(b)).sum::<f64>()).sqrt()
}

/// How far logits of the tiny checkpoint may lie from those of an f32 cache: the half steps of the formats are 2^-12,
/// 1/254 and 1/30 of a head's largest value, and random weights were seen to amplify them about fivefold.
const FROM_F32: [(KvFormat, f64); 3] =
    [(KvFormat::F16, 2e-3), (KvFormat::Int8, 4e-2), (KvFormat::Int4, 4e-1)];

#[test]
fn logits_differ_by_no_more_than_the_format() {
    let prompt = text(120, 7);
    let exact = engine(KvFormat::F32, 512);
    let exact = exact.session().forward(&ids_prompt(&exact, &prompt)).unwrap();
    let mut last = 0.0;
    for (kv, most) in FROM_F32 {
        let engine = engine(kv, 512);
        let logits = engine.session().forward(&ids_prompt(&engine, &prompt)).unwrap();
        let found = distance(&logits, &exact);
        println!("{kv}: {found:.1e}");
        assert!(found <= most && found > last, "{kv}: {found:.1e}, at most {most:.0e} and above {last:.1e}");
        last = found;
    }
}

/// How far a prompt in small steps may lie from the same in one: a rounding of f32, and where it makes a key or value
/// fall to the other side, a step of the format at that place.
const CHUNKED: [(KvFormat, f64); 4] =
    [(KvFormat::F32, 1e-5), (KvFormat::F16, 3e-4), (KvFormat::Int8, 3e-3), (KvFormat::Int4, 3e-2)];

#[test]
fn a_prompt_in_steps_equals_the_prompt_at_once() {
    let prompt = text(90, 8);
    for (kv, most) in CHUNKED {
        let whole = engine(kv, 512);
        let whole = whole.session().forward(&ids_prompt(&whole, &prompt)).unwrap();
        for chunk in [1, 7, 64] {
            let engine = engine(kv, chunk);
            let steps = engine.session().forward(&ids_prompt(&engine, &prompt)).unwrap();
            let found = distance(&steps, &whole);
            assert!(found <= most, "{kv} in steps of {chunk}: {found:.1e}, at most {most:.0e}");
        }
    }
}

#[test]
fn the_plan_counts_the_bytes_of_the_format() {
    // 3 layers of keys and values with 2 heads of 16 components.
    for (kv, head) in
        [(KvFormat::F32, 64), (KvFormat::F16, 32), (KvFormat::Int8, 2 + 16), (KvFormat::Int4, 4 + 16)]
    {
        let options = EngineOptions { kv, ..options() };
        let (info, plan) = Engine::inspect(path("default"), &options, None).unwrap();
        let cache = plan.parts.iter().find(|p| p.name == "KV cache").unwrap().bytes;
        assert_eq!((info.kv_bytes_per_token, cache), (2 * 3 * 2 * head, 2048 * 2 * 3 * 2 * head), "{kv}");
    }
}
