//! The memory plan: its numbers, and what happens when they do not fit.

use pocketglm::{Engine, EngineOptions, Error, MemoryPlan, Message, Part, Picture, Request};

use crate::golden::path;
use crate::support::{answer, engine, error, exactly, options};

fn part(plan: &MemoryPlan, name: &str) -> u64 {
    plan.parts.iter().find(|p| p.name == name).unwrap_or_else(|| panic!("no {name} in {plan}")).bytes
}

fn inspect(checkpoint: &str, context: usize, screen: Option<(usize, usize)>) -> MemoryPlan {
    let options = EngineOptions { context, ..options() };
    Engine::inspect(path(checkpoint), &options, screen).unwrap().1
}

#[test]
fn the_plan_counts_weights_and_cache_by_hand() {
    // `default`: 3 layers of width 64 with 2 kv heads of size 16, f32.
    let attention = 64 * 64 + 64 + 2 * (32 * 64 + 32) + 64 * 64;
    let layer = attention + 4 * 64 + 2 * 112 * 64 + 64 * 112;
    let decoder = 3 * layer + 64 + 1024 * 64;
    let head = 1024 * 64;
    let (info, plan) = Engine::inspect(path("default"), &options(), None).unwrap();
    assert_eq!(info.decoder.count, decoder);
    assert_eq!(info.head.count, head);
    // The embedding table is read by the row: whole for many tokens, a row and its surroundings for one.
    let table = 1024 * 64;
    assert_eq!(part(&plan, "decoder weights"), (decoder - table + head) * 4);
    assert_eq!(part(&plan, "embedding rows"), table * 4);
    assert_eq!(part(&inspect("default", 1, None), "embedding rows"), (64 * 4 + (352 << 10)).min(table * 4));
    assert_eq!(info.kv_bytes_per_token, 2 * 3 * 2 * 16 * 4);
    assert_eq!(part(&plan, "KV cache"), 2048 * 2 * 3 * 2 * 16 * 4);
    assert_eq!(plan.context, 2048);
    assert_eq!(info.bytes.values().sum::<u64>(), (decoder + head + info.vision.count) * 4);

    // `bf16`: 2 layers of width 32 with 1 kv head of size 16, two bytes a weight.
    let attention = 32 * 32 + 32 + 2 * (16 * 32 + 16) + 32 * 32;
    let layer = attention + 4 * 32 + 3 * 40 * 32;
    let decoder: u64 = 2 * layer + 32 + 352 * 32;
    let (info, plan) = Engine::inspect(path("bf16"), &options(), None).unwrap();
    assert_eq!(info.decoder.count, decoder);
    // Matrices stay as they are stored; small vectors may be widened once.
    // The head is as large as the embedding table, which is counted by the row.
    let matrices = decoder * 2;
    let (least, most) = (matrices, matrices + 2 * (5 * 32 + 64) * 4 + 2 * 32 * 4);
    let found = part(&plan, "decoder weights");
    assert!((least..=most).contains(&found), "{found}, expected from {least} to {most}");
    assert_eq!(part(&plan, "KV cache"), 2048 * 2 * 2 * 16 * 4);
}

#[test]
fn a_tied_head_is_counted_once() {
    let (info, _) = Engine::inspect(path("tied"), &options(), None).unwrap();
    let (other, _) = Engine::inspect(path("bf16"), &options(), None).unwrap();
    assert_eq!(info.head.count, 0);
    assert_eq!(info.decoder.count, other.decoder.count);
    assert_eq!(info.decoder.bytes_at(16), info.decoder.count * 2);
}

#[test]
fn longer_contexts_and_larger_pictures_need_more() {
    let sizes = [16, 256, 1024, 4096].map(|context| inspect("default", context, None).total());
    assert!(sizes.windows(2).all(|w| w[0] < w[1]), "{sizes:?}");
    let none = inspect("default", 2048, None).total();
    let small = inspect("default", 2048, Some((100, 200))).total();
    let large = inspect("default", 2048, Some((1080, 2400))).total();
    assert!(none < small && small < large, "{none} {small} {large}");
    for screen in [(usize::MAX, usize::MAX), (0, 0), (1 << 40, 1), (usize::MAX, 1)] {
        error(Engine::inspect(path("default"), &options(), Some(screen)));
    }
}

#[test]
fn a_budget_below_the_need_is_refused_with_figures_and_the_need_is_accepted() {
    for checkpoint in ["default", "bf16", "tied", "sharded-v4"] {
        let needed = inspect(checkpoint, 2048, None).total();
        let open =
            |memory| Engine::open(path(checkpoint), EngineOptions { memory: Some(memory), ..options() });
        let Err(refused) = open(needed - 1) else { panic!("{checkpoint} was opened below its need") };
        assert!(
            matches!(refused, Error::Budget { needed: n, budget: b, .. } if n == needed && b == needed - 1)
        );
        let text = refused.to_string();
        for figure in
            [needed.to_string(), (needed - 1).to_string(), "decoder weights".into(), "KV cache".into()]
        {
            assert!(text.contains(&figure), "{text}");
        }
        let engine = open(needed).unwrap();
        assert_eq!(
            answer(&mut engine.session(), &crate::support::ids_prompt(&engine, &[1, 2]), &exactly(2))
                .ids
                .len(),
            2
        );
        open(0).map(|_| ()).unwrap_err();
    }
}

#[test]
fn a_picture_that_does_not_fit_the_budget_is_refused_before_it_is_encoded() {
    let memory = Some(inspect("default", 2048, None).total());
    let tight = Engine::open(path("default"), EngineOptions { memory, ..options() }).unwrap();
    let pixels = vec![100; 1000 * 1000 * 3];
    let parts = vec![Part::Image(Picture::rgb8(1000, 1000, pixels).unwrap()), Part::Text("?".into())];
    let request = Request::Messages(vec![Message::parts("user", parts)]);
    let prompt = tight.prompt(&request).unwrap();
    let refused = tight.session().generate(&prompt, &exactly(1)).map(|_| ());
    assert!(matches!(refused, Err(Error::Budget { .. })));
    let needed = tight.plan(&prompt, 1).unwrap().total();
    let roomy = Engine::open(path("default"), EngineOptions { memory: Some(needed), ..options() }).unwrap();
    assert!(roomy.session().generate(&prompt, &exactly(1)).is_ok());
}

#[test]
fn the_plan_of_a_prompt_grows_with_the_answer_and_stops_at_the_context() {
    let engine = engine("default");
    let prompt = crate::support::prompt(&engine, "default", "image");
    let at = |tokens| engine.plan(&prompt, tokens).unwrap();
    assert!(at(1).total() < at(1000).total());
    assert_eq!(at(2048), at(usize::MAX));
    assert_eq!(at(usize::MAX).context, 2048);
}
