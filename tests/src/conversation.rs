//! A session reuses what it can and sees nothing of other sessions.

use pocketglm::{
    Content, Engine, EngineOptions, GenerateOptions, Message, Model, Part, Picture, PreparedPrompt, Prompt,
    Request,
};

use crate::golden::{Tensors, path};
use crate::support::{Random, answer, engine, exactly, ids_prompt, options};

fn noise(width: usize, height: usize, seed: u64) -> Picture {
    let mut random = Random::new(seed);
    Picture::rgb8(width, height, (0..width * height * 3).map(|_| random.next() as u8).collect()).unwrap()
}

fn text(text: &str) -> Part {
    Part::Text(text.into())
}

fn ready(engine: &Engine, messages: &[Message]) -> PreparedPrompt {
    engine.prompt(&Request::Messages(messages.to_vec())).unwrap()
}

/// The token at which two prompts begin to differ.
fn common(a: &PreparedPrompt, b: &PreparedPrompt) -> usize {
    a.token_ids().iter().zip(b.token_ids()).take_while(|(a, b)| a == b).count()
}

#[test]
fn a_conversation_reuses_its_beginning_and_answers_as_a_fresh_session() {
    let engine = engine("default");
    let mut session = engine.session();
    let mut messages = vec![Message::text("system", "You're a phone agent.")];
    for turn in 0..5 {
        messages.push(Message::text("user", format!("打开设置页面 {turn}, then tap [500,{turn}]!")));
        let prompt = ready(&engine, &messages);
        let reusable = session.reusable_tokens(&prompt);
        let got = answer(&mut session, &prompt, &exactly(6));
        assert_eq!(got, answer(&mut engine.session(), &prompt, &exactly(6)), "turn {turn}");
        assert_eq!(got.timings.reused_tokens, reusable);
        assert_eq!(got.timings.reused_tokens + got.timings.prompt_tokens, prompt.token_ids().len());
        if turn > 0 {
            assert!(
                got.timings.reused_tokens > got.timings.prompt_tokens / 2,
                "turn {turn}: {:?}",
                got.timings
            );
        }
        messages.push(Message::text("assistant", "do(action=\"Tap\", element=[500,120])"));
    }
}

#[test]
fn the_same_prompt_again_needs_one_token() {
    let engine = engine("default");
    let prompt = ids_prompt(&engine, &(1..60).collect::<Vec<_>>());
    let mut session = engine.session();
    let first = answer(&mut session, &prompt, &exactly(8));
    let again = answer(&mut session, &prompt, &exactly(8));
    assert_eq!(first, again);
    assert_eq!((again.timings.reused_tokens, again.timings.prompt_tokens), (58, 1));
    // The answer's own tokens are in the cache as well, except the last one, which was never run.
    let longer = ids_prompt(&engine, &[prompt.token_ids(), &first.ids, &[7]].concat());
    let next = answer(&mut session, &longer, &exactly(8));
    assert_eq!(next.timings.reused_tokens, 59 + 7);
    assert_eq!(next, answer(&mut engine.session(), &longer, &exactly(8)));
}

#[test]
fn a_shorter_prompt_truncates_the_cache() {
    let engine = engine("default");
    let mut random = Random::new(3);
    let mut session = engine.session();
    let ids: Vec<u32> = (0..200).map(|_| random.below(900) as u32).collect();
    for _ in 0..40 {
        // Some beginning of one text, sometimes with another end.
        let mut some = ids[..1 + random.below(199)].to_vec();
        if random.below(2) == 0 {
            some.extend((0..random.below(9)).map(|_| random.below(900) as u32));
        }
        let prompt = ids_prompt(&engine, &some);
        let got = answer(&mut session, &prompt, &exactly(4));
        assert_eq!(got, answer(&mut engine.session(), &prompt, &exactly(4)));
    }
    session.clear();
    assert_eq!(session.cached_tokens(), 0);
}

#[test]
fn another_picture_of_the_same_size_is_not_taken_for_the_first() {
    let engine = engine("default");
    let ask = |seed| {
        ready(&engine, &[Message::parts("user", vec![Part::Image(noise(150, 93, seed)), text("点击")])])
    };
    let (a, b) = (ask(1), ask(2));
    assert_eq!(a.token_ids(), b.token_ids(), "only the pixels differ");
    let first_of_picture = a.token_ids().iter().position(|&id| id == 994).unwrap();
    let mut session = engine.session();
    let wanted = [&a, &b].map(|p| answer(&mut engine.session(), p, &exactly(8)));
    assert_ne!(wanted[0], wanted[1], "the answers must depend on the picture");
    assert_eq!(answer(&mut session, &a, &exactly(8)), wanted[0]);
    let got = answer(&mut session, &b, &exactly(8));
    assert_eq!(got, wanted[1]);
    assert_eq!(got.timings.reused_tokens, first_of_picture);
    assert_eq!(got.timings.encoded_pictures, 1);
    // Back to the first one: its keys and values are gone, its encoding is not.
    let got = answer(&mut session, &a, &exactly(8));
    assert_eq!(got, wanted[0]);
    assert_eq!((got.timings.reused_tokens, got.timings.encoded_pictures), (first_of_picture, 0));
}

#[test]
fn the_same_picture_again_is_not_encoded_again() {
    let engine = engine("default");
    let picture = || Part::Image(noise(150, 93, 9));
    let mut session = engine.session();
    let first = ready(&engine, &[Message::parts("user", vec![picture(), text("one")])]);
    assert_eq!(answer(&mut session, &first, &exactly(2)).timings.encoded_pictures, 1);
    // At another place of another prompt, twice.
    let second =
        ready(&engine, &[Message::parts("user", vec![text("two"), picture(), text("and"), picture()])]);
    let got = answer(&mut session, &second, &exactly(6));
    assert_eq!(got.timings.encoded_pictures, 0);
    assert_eq!(got, answer(&mut engine.session(), &second, &exactly(6)));
}

#[test]
fn an_agent_that_deletes_old_screenshots_gets_the_answers_of_fresh_sessions() {
    // As Open-AutoGLM does: after each step the picture leaves the message, its text stays as a list of one part.
    let engine = engine("default");
    let mut session = engine.session();
    let mut messages = vec![Message::text("system", "You're a phone agent.")];
    let mut before: Option<PreparedPrompt> = None;
    for step in 0..6 {
        let screen = text("** Screen Info **\n\n{\"current_app\": \"微信\"}");
        messages.push(Message::parts("user", vec![Part::Image(noise(108, 240, step)), screen.clone()]));
        let prompt = ready(&engine, &messages);
        let got = answer(&mut session, &prompt, &exactly(6));
        assert_eq!(got, answer(&mut engine.session(), &prompt, &exactly(6)), "step {step}");
        assert_eq!(got.timings.encoded_pictures, 1, "step {step}");
        if let Some(before) = &before {
            // Everything up to the deleted picture is reused, and nothing after it.
            assert_eq!(got.timings.reused_tokens, common(before, &prompt), "step {step}");
            assert!(got.timings.reused_tokens > 20);
        }
        before = Some(prompt);
        let Some(Message { content: Content::Parts(parts), .. }) = messages.last_mut() else { panic!() };
        *parts = vec![screen];
        messages.push(Message::text("assistant", "<think>t</think><answer>do(action=\"Back\")</answer>"));
    }
}

#[test]
fn a_picture_and_a_video_with_the_same_tokens_are_not_mixed_up() {
    let engine = engine("default");
    let frames = || Tensors::open("default/golden/video.safetensors").pictures("video.raw_u8").unwrap();
    let ask = |frames: Vec<Picture>| {
        ready(
            &engine,
            &[Message::parts("user", vec![Part::Video { frames, seconds: vec![0, 1, 2, 3] }, text("?")])],
        )
    };
    let backwards: Vec<Picture> = frames().into_iter().rev().collect();
    let prompts = [ask(frames()), ask(backwards)];
    let fresh = prompts.each_ref().map(|p| answer(&mut engine.session(), p, &exactly(6)));
    assert_ne!(fresh[0], fresh[1]);
    let mut session = engine.session();
    for round in 0..3 {
        for (p, wanted) in prompts.iter().zip(&fresh) {
            assert_eq!(&answer(&mut session, p, &exactly(6)), wanted, "round {round}");
        }
    }
}

/// Prompts of all kinds, and what fresh sessions answer.
fn mixed(engine: &Engine) -> Vec<PreparedPrompt> {
    let mut prompts: Vec<PreparedPrompt> = ["text", "image", "two_images", "video"]
        .iter()
        .map(|n| crate::support::prompt(engine, "default", n))
        .collect();
    prompts.push(ids_prompt(engine, &[5, 6, 7]));
    prompts.push(ready(engine, &[Message::parts("user", vec![Part::Image(noise(150, 93, 1)), text("x")])]));
    prompts
}

#[test]
fn sessions_do_not_see_each_other() {
    let engine = engine("default");
    let prompts = mixed(&engine);
    let fresh: Vec<_> = prompts.iter().map(|p| answer(&mut engine.session(), p, &exactly(5))).collect();
    let (mut one, mut two) = (engine.session(), engine.session());
    let mut random = Random::new(11);
    for round in 0..50 {
        let [p, x, q] = [0; 3].map(|_| random.below(prompts.len()));
        assert_eq!(answer(&mut one, &prompts[p], &exactly(5)), fresh[p], "round {round}");
        assert_eq!(answer(&mut two, &prompts[x], &exactly(5)), fresh[x], "round {round}");
        assert_eq!(answer(&mut one, &prompts[q], &exactly(5)), fresh[q], "round {round}");
    }
}

#[test]
fn answers_in_progress_can_take_turns() {
    let engine = engine("default");
    let prompts = mixed(&engine);
    let alone: Vec<_> = prompts.iter().map(|p| answer(&mut engine.session(), p, &exactly(10)).text).collect();
    let mut sessions: Vec<_> = prompts.iter().map(|_| engine.session()).collect();
    let mut answers: Vec<_> =
        sessions.iter_mut().zip(&prompts).map(|(s, p)| s.generate(p, &exactly(10)).unwrap()).collect();
    let mut texts = vec![String::new(); prompts.len()];
    for _ in 0..11 {
        for (a, t) in answers.iter_mut().zip(&mut texts) {
            t.extend(a.next().map(|p| p.unwrap().text));
        }
    }
    assert_eq!(texts, alone);
}

#[test]
fn sessions_on_several_threads_answer_as_alone() {
    let engine = engine("default");
    let prompts = mixed(&engine);
    let alone: Vec<_> = prompts.iter().map(|p| answer(&mut engine.session(), p, &exactly(6))).collect();
    std::thread::scope(|scope| {
        for worker in 0..4usize {
            let (engine, prompts, alone) = (engine.clone(), &prompts, &alone);
            scope.spawn(move || {
                let mut session = engine.session();
                for i in 0..6 {
                    let which = (worker + i) % prompts.len();
                    assert_eq!(
                        answer(&mut session, &prompts[which], &exactly(6)),
                        alone[which],
                        "thread {worker}"
                    );
                }
            });
        }
    });
}

#[test]
fn the_first_pictures_of_several_threads_compile_one_encoder() {
    // A fresh engine, so that all threads meet an encoder that is not there yet.
    let engine = engine("merge-3");
    let prompt = crate::support::prompt(&engine, "merge-3", "image");
    let texts: Vec<String> = std::thread::scope(|scope| {
        let spawn = |_| scope.spawn(|| answer(&mut engine.session(), &prompt, &exactly(6)).text);
        let all: Vec<_> = (0..4).map(spawn).collect();
        all.into_iter().map(|t| t.join().unwrap()).collect()
    });
    assert!(texts.windows(2).all(|w| w[0] == w[1]));
}

#[test]
fn a_turn_that_could_not_begin_is_no_part_of_a_chat() {
    let model = Model::open_with(path("default"), EngineOptions { context: 120, ..options() }).unwrap();
    let mut chat = model.chat();
    chat.options_mut().max_new_tokens = 4;
    assert!(chat.answer(&Prompt::new().system("lost").image("absent.png")).is_err());
    assert!(chat.messages().is_empty(), "{:?}", chat.messages());
    assert!(chat.answer(&Prompt::new().text("far too long ".repeat(100))).is_err());
    assert!(chat.messages().is_empty(), "{:?}", chat.messages());
    let said = chat.answer(&Prompt::new().system("short").text("tap")).unwrap().text().unwrap();
    assert_eq!(chat.messages().len(), 2);
    chat.remember(&said);
    let again = chat
        .answer(&Prompt::new().system("counts in the first turn only").text("go on"))
        .unwrap()
        .text()
        .unwrap();
    let roles: Vec<&str> = chat.messages().iter().map(|m| m.role.as_str()).collect();
    assert_eq!(roles, ["system", "user", "assistant", "user"]);
    let messages = Request::Messages(chat.messages().to_vec());
    let prompt = model.engine().prompt(&messages).unwrap();
    let limit = GenerateOptions { max_new_tokens: 4, ..GenerateOptions::default() };
    assert_eq!(answer(&mut model.engine().session(), &prompt, &limit).text, again);
    chat.clear();
    assert!(chat.messages().is_empty());
}
