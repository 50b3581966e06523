//! Asks a checkpoint about a picture, on a thread of its own, and prints the answer as it comes.
//!
//! `cargo run --release -- CHECKPOINT PICTURE QUESTION`

use std::sync::mpsc;

use pocketglm::{Model, Prompt, Result};

fn main() -> Result<()> {
    let mut arguments = std::env::args().skip(1);
    let (Some(folder), Some(picture), Some(question)) = (arguments.next(), arguments.next(), arguments.next()) else {
        eprintln!("usage: embed CHECKPOINT PICTURE QUESTION");
        std::process::exit(2);
    };
    let model = Model::open(folder)?;
    let (sender, pieces) = mpsc::channel();
    // A chat is `Send`, so the work can happen anywhere; dropping the receiver would end it within a token.
    let worker = std::thread::spawn(move || -> Result<()> {
        let mut chat = model.chat();
        chat.options_mut().max_new_tokens = 64;
        for piece in chat.answer(&Prompt::new().image(picture).text(question))? {
            if sender.send(piece?.text).is_err() {
                break;
            }
        }
        Ok(())
    });
    for piece in pieces {
        print!("{piece}");
    }
    println!();
    match worker.join() {
        Ok(result) => result,
        Err(panic) => std::panic::resume_unwind(panic),
    }
}
