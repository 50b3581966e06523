//! `pocketglm chat`: a conversation, line by line.

use std::io::{BufRead, IsTerminal, Read};
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use clap::Args;
use pocketglm::{Chat, FinishReason, Prompt, Timings};
use rustyline::error::ReadlineError;
use rustyline::{Config, DefaultEditor};

use crate::args::{ModelArgs, SamplingArgs};
use crate::failure::Failure;
use crate::generate::tell_failure;
use crate::interrupt::Interrupt;
use crate::output::{Out, complain, timing_line};
use crate::progress::Bars;

/// Longest line of a conversation that comes through a pipe.
const MAX_LINE_BYTES: u64 = 1 << 20;

const HELP: &str = "\
/image FILE  show a picture with the next message
/audio FILE  play a WAV file with the next message
/reset       forget the conversation
/stats       what the last answer took and what it reused
/help        this list
/quit        end (or Ctrl-D)
Ctrl-C stops an answer.";

/// Talk with the model.
#[derive(Args, Debug)]
pub struct ChatArgs {
    /// Instructions before the conversation.
    #[arg(long, value_name = "TEXT")]
    system: Option<String>,
    /// Picture to show with the first message; may be given several times.
    #[arg(long, value_name = "FILE")]
    image: Vec<PathBuf>,
    /// WAV file to play with the first message; may be given several times. The checkpoint needs an audio branch.
    #[arg(long, value_name = "FILE")]
    audio: Vec<PathBuf>,
    #[command(flatten)]
    model: ModelArgs,
    #[command(flatten)]
    sampling: SamplingArgs,
}

/// What a line of input asks for.
#[derive(Debug, PartialEq, Eq)]
enum Input<'l> {
    Nothing,
    Say(&'l str),
    Image(&'l str),
    Audio(&'l str),
    Reset,
    Stats,
    Help,
    Quit,
    Unknown(&'l str),
}

fn parse(line: &str) -> Input<'_> {
    let line = line.trim();
    let (word, rest) = line.split_once(char::is_whitespace).map_or((line, ""), |(w, r)| (w, r.trim()));
    match word {
        "" => Input::Nothing,
        "/image" => Input::Image(rest),
        "/audio" => Input::Audio(rest),
        "/reset" => Input::Reset,
        "/stats" => Input::Stats,
        "/help" => Input::Help,
        "/quit" | "/exit" => Input::Quit,
        // A path or a sentence may begin with a slash; a lone word that does is a mistyped command.
        _ if word.starts_with('/') && rest.is_empty() && !word[1..].contains('/') => Input::Unknown(word),
        _ => Input::Say(line),
    }
}

/// Runs the command.
pub fn run(args: &ChatArgs) -> Result<ExitCode, Failure> {
    let bars = Bars::new(args.model.quiet);
    let interrupt = Interrupt::install(&bars)?;
    let model = args.model.open(&bars)?;
    let mut lines = Lines::new()?;
    let mut talk = Talk {
        options: args.sampling.options(model.engine())?,
        chat: model.chat(),
        system: args.system.clone(),
        images: Vec::new(),
        sounds: Vec::new(),
        last: None,
        out: Out::new(),
        bars,
        interrupt,
    };
    for path in &args.image {
        talk.show(path)?;
    }
    tell_failure(model.engine());
    for path in &args.audio {
        talk.play(path)?;
    }
    if lines.is_interactive() && !args.model.quiet {
        args.sampling.warn(&talk.options);
        complain("Type a message, /help for the commands, Ctrl-D to end.");
    }
    while let Some(line) = lines.next()? {
        let done = match parse(&line) {
            Input::Quit => break,
            input => talk.take(input),
        };
        match done {
            // Whoever types can try again; a script must see that a step failed.
            Err(failure) if lines.is_interactive() && !failure.is_broken_pipe() => failure.report(),
            done => done?,
        }
    }
    Ok(ExitCode::SUCCESS)
}

/// The conversation and what belongs to its next message.
struct Talk {
    chat: Chat,
    options: pocketglm::GenerateOptions,
    system: Option<String>,
    images: Vec<PathBuf>,
    sounds: Vec<PathBuf>,
    last: Option<(Timings, FinishReason)>,
    out: Out,
    bars: Bars,
    interrupt: Interrupt,
}

impl Talk {
    fn take(&mut self, input: Input<'_>) -> Result<(), Failure> {
        match input {
            Input::Nothing | Input::Quit => {}
            Input::Say(text) => return self.say(text),
            Input::Image("") => complain("which one? /image FILE"),
            Input::Image(path) => {
                self.show(Path::new(path))?;
                complain("the picture goes with your next message");
            }
            Input::Audio("") => complain("which one? /audio FILE"),
            Input::Audio(path) => {
                self.play(Path::new(path))?;
                complain("the sound goes with your next message");
            }
            Input::Reset => {
                self.chat.clear();
                self.images.clear();
                self.sounds.clear();
                self.last = None;
                complain("the conversation is forgotten");
            }
            Input::Stats => self.stats(),
            Input::Help => complain(HELP),
            Input::Unknown(word) => complain(&format!("{word} is no command; /help lists them")),
        }
        Ok(())
    }

    /// Keeps a picture for the next message. It is decoded with the message; that it is there is told at once.
    fn show(&mut self, path: &Path) -> Result<(), Failure> {
        if !path.is_file() {
            return Err(Failure::NoPicture { path: path.display().to_string() });
        }
        self.images.push(path.to_owned());
        Ok(())
    }

    /// Keeps a sound for the next message, likewise.
    fn play(&mut self, path: &Path) -> Result<(), Failure> {
        if !path.is_file() {
            return Err(Failure::NoPicture { path: path.display().to_string() });
        }
        self.sounds.push(path.to_owned());
        Ok(())
    }

    /// One turn.
    fn say(&mut self, text: &str) -> Result<(), Failure> {
        let mut prompt = Prompt::new();
        if let Some(system) = &self.system {
            prompt = prompt.system(system);
        }
        // A picture that fails must not come back with every later message.
        for path in self.images.drain(..) {
            prompt = prompt.image(path);
        }
        for path in self.sounds.drain(..) {
            prompt = prompt.audio(path);
        }
        let cancel = self.interrupt.begin();
        *self.chat.options_mut() = pocketglm::GenerateOptions { cancel, ..self.options.clone() };
        let result = self.answer(&prompt.text(text));
        self.interrupt.end();
        self.bars.clear();
        self.out.end_line()?;
        match result? {
            Some(answer) => self.chat.remember(answer),
            None => complain("stopped before the answer began; the message and its pictures are forgotten"),
        }
        Ok(())
    }

    /// Streams the answer, and gives it as far as it went; nothing if it was stopped before it began.
    fn answer(&mut self, prompt: &Prompt) -> Result<Option<String>, Failure> {
        let mut answer = self.chat.answer(prompt)?;
        let mut text = String::new();
        let mut failed = None;
        for piece in answer.by_ref() {
            match piece.map_err(Failure::from).and_then(|p| self.out.piece(&p.text).map(|()| p)) {
                Ok(piece) => text.push_str(&piece.text),
                Err(failure) => {
                    failed = Some(failure);
                    break;
                }
            }
        }
        let begun = !answer.token_ids().is_empty();
        let finish = answer.finish_reason().unwrap_or(FinishReason::Cancelled);
        let timings = answer.timings();
        let moved = answer.device_failure().is_some();
        drop(answer);
        if moved {
            tell_failure(self.chat.session().engine());
        }
        // A turn without an answer is no part of the conversation.
        if let Some(failure) = failed {
            self.chat.take_back();
            return Err(failure);
        }
        if finish == FinishReason::Cancelled && !begun {
            self.chat.take_back();
            return Ok(None);
        }
        self.last = Some((timings, finish));
        Ok(Some(text))
    }

    fn stats(&mut self) {
        match &self.last {
            Some((timings, finish)) => complain(&timing_line(timings, finish.as_str())),
            None => complain("no answer yet"),
        }
        let messages = self.chat.messages().len();
        let cached = self.chat.session().cached_tokens();
        complain(&format!("{messages} messages, {cached} tokens in the cache"));
    }
}

/// Where lines come from: an editor on a terminal, plain lines otherwise.
enum Lines {
    Editor(Box<DefaultEditor>),
    Plain,
}

impl Lines {
    fn new() -> Result<Lines, Failure> {
        // The editor draws on stdout, so both ends must be a terminal.
        if std::io::stdin().is_terminal() && std::io::stdout().is_terminal() {
            let config = Config::builder().auto_add_history(true).build();
            return Ok(Lines::Editor(Box::new(DefaultEditor::with_config(config).map_err(Failure::Line)?)));
        }
        Ok(Lines::Plain)
    }

    fn is_interactive(&self) -> bool {
        matches!(self, Lines::Editor(_))
    }

    /// The next line, or none at the end.
    fn next(&mut self) -> Result<Option<String>, Failure> {
        match self {
            Lines::Editor(editor) => loop {
                match editor.readline("> ") {
                    Ok(line) => return Ok(Some(line)),
                    Err(ReadlineError::Eof) => return Ok(None),
                    Err(ReadlineError::Interrupted) => complain("Ctrl-D or /quit ends the conversation."),
                    Err(error) => return Err(Failure::Line(error)),
                }
            },
            Lines::Plain => plain_line(&mut std::io::stdin().lock(), MAX_LINE_BYTES),
        }
    }
}

/// One line of at most `limit` bytes, or none at the end.
fn plain_line(input: &mut impl BufRead, limit: u64) -> Result<Option<String>, Failure> {
    let mut line = String::new();
    let n = input.by_ref().take(limit + 1).read_line(&mut line).map_err(Failure::Input)?;
    match n as u64 {
        0 => Ok(None),
        n if n > limit => Err(Failure::InputSize { limit }),
        _ => Ok(Some(line)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn commands_are_told_from_messages() {
        for (line, wanted) in [
            ("", Input::Nothing),
            ("  \n", Input::Nothing),
            ("打开设置\n", Input::Say("打开设置")),
            ("/image a b.png", Input::Image("a b.png")),
            ("/image", Input::Image("")),
            ("/audio a.wav", Input::Audio("a.wav")),
            ("/reset", Input::Reset),
            (" /stats ", Input::Stats),
            ("/help", Input::Help),
            ("/quit", Input::Quit),
            ("/qiut", Input::Unknown("/qiut")),
            ("/etc/hosts", Input::Say("/etc/hosts")),
            ("/s is a word", Input::Say("/s is a word")),
        ] {
            assert_eq!(parse(line), wanted, "{line:?}");
        }
    }

    #[test]
    fn plain_lines_have_a_cap_and_must_be_text() {
        let mut input: &[u8] = b"one\ntwo";
        assert_eq!(plain_line(&mut input, 8).unwrap().as_deref(), Some("one\n"));
        assert_eq!(plain_line(&mut input, 8).unwrap().as_deref(), Some("two"));
        assert!(plain_line(&mut input, 8).unwrap().is_none());
        assert!(matches!(plain_line(&mut &b"123456789"[..], 8), Err(Failure::InputSize { limit: 8 })));
        assert!(matches!(plain_line(&mut &b"\xff\n"[..], 8), Err(Failure::Input(_))));
    }
}
