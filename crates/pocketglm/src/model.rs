use std::path::{Path, PathBuf};

use crate::{
    Engine, EngineOptions, GenerateOptions, Generation, Message, Part, Picture, Request, Result, Session,
    Sound,
};

/// A loaded checkpoint: `Send + Sync`, and cheap to clone.
#[derive(Clone)]
pub struct Model {
    engine: Engine,
}

impl Model {
    /// Opens a Hugging Face checkpoint folder of the `glm4v` or `glm4` family with the default options.
    ///
    /// # Errors
    /// What the folder lacks or holds wrongly, with file and tensor.
    pub fn open(folder: impl AsRef<Path>) -> Result<Model> {
        Model::open_with(folder, EngineOptions::default())
    }

    /// Opens a checkpoint with options: threads, context, memory budget, progress.
    ///
    /// # Errors
    /// As [`Model::open`], and [`crate::Error::Budget`].
    pub fn open_with(folder: impl AsRef<Path>, options: EngineOptions) -> Result<Model> {
        Ok(Model { engine: Engine::open(folder, options)? })
    }

    /// A new conversation, with the sampling that the checkpoint recommends.
    pub fn chat(&self) -> Chat {
        let options =
            GenerateOptions { sampling: self.engine.default_sampling(), ..GenerateOptions::default() };
        Chat { session: self.engine.session(), options, messages: Vec::new() }
    }

    /// The engine below.
    pub fn engine(&self) -> &Engine {
        &self.engine
    }
}

/// What a user says in one turn: text, pictures and sounds in their order.
#[derive(Clone, Debug, Default)]
pub struct Prompt {
    system: Option<String>,
    parts: Vec<Part>,
}

impl Prompt {
    /// Nothing yet.
    pub fn new() -> Prompt {
        Prompt::default()
    }

    /// Instructions that stand before the conversation. They count in the first turn only.
    pub fn system(mut self, text: impl Into<String>) -> Prompt {
        self.system = Some(text.into());
        self
    }

    /// Appends text.
    pub fn text(mut self, text: impl Into<String>) -> Prompt {
        self.parts.push(Part::Text(text.into()));
        self
    }

    /// Appends a PNG, JPEG or WebP file. It is read when the answer begins.
    pub fn image(self, path: impl Into<PathBuf>) -> Prompt {
        self.picture(Picture::file(path))
    }

    /// Appends a picture from bytes, base64 or pixels.
    pub fn picture(mut self, picture: Picture) -> Prompt {
        self.parts.push(Part::Image(picture));
        self
    }

    /// Appends a WAV file. It is read when the answer begins; the checkpoint needs an audio branch.
    pub fn audio(self, path: impl Into<PathBuf>) -> Prompt {
        self.sound(Sound::file(path))
    }

    /// Appends a sound from bytes, base64 or frames.
    pub fn sound(mut self, sound: Sound) -> Prompt {
        self.parts.push(Part::Audio(sound));
        self
    }

    /// Appends a video as frames of one size, two for each second.
    pub fn video(mut self, frames: Vec<Picture>) -> Prompt {
        self.parts.push(Part::Video { frames, seconds: Vec::new() });
        self
    }

    /// The messages that this turn adds.
    fn messages(&self, first: bool) -> Vec<Message> {
        let system = self.system.iter().filter(|_| first).map(|s| Message::text("system", s));
        let user = match self.parts.as_slice() {
            [Part::Text(text)] => Message::text("user", text),
            parts => Message::parts("user", parts.to_vec()),
        };
        system.chain([user]).collect()
    }
}

/// A conversation: `Send`, and independent of every other one.
pub struct Chat {
    session: Session,
    options: GenerateOptions,
    messages: Vec<Message>,
}

impl Chat {
    /// How answers are generated from here on.
    pub fn options_mut(&mut self) -> &mut GenerateOptions {
        &mut self.options
    }

    /// Answers one turn. Record the answer with [`Chat::remember`] to make it part of the conversation.
    ///
    /// # Errors
    /// Pictures that cannot be read, prompts beyond the context, settings outside their ranges.
    pub fn answer(&mut self, prompt: &Prompt) -> Result<Generation<'_>> {
        let before = self.messages.len();
        self.messages.extend(prompt.messages(before == 0));
        let request = Request::Messages(self.messages.clone());
        let started = match self.session.engine().prompt(&request) {
            Ok(prepared) => self.session.generate(&prepared, &self.options),
            Err(e) => Err(e),
        };
        if started.is_err() {
            // A turn that could not begin is not part of the conversation, its system message included.
            self.messages.truncate(before);
        }
        started
    }

    /// Takes the last message back, for a turn whose answer failed on the way.
    pub fn take_back(&mut self) {
        self.messages.pop();
    }

    /// Adds the model's own words to the conversation.
    pub fn remember(&mut self, answer: impl Into<String>) {
        self.messages.push(Message::text("assistant", answer.into()));
    }

    /// The conversation so far.
    pub fn messages(&self) -> &[Message] {
        &self.messages
    }

    /// Forgets the conversation.
    pub fn clear(&mut self) {
        self.messages.clear();
        self.session.clear();
    }

    /// The session below.
    pub fn session(&mut self) -> &mut Session {
        &mut self.session
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn handles_can_go_where_a_user_expects() {
        fn shared<T: Send + Sync + Clone + 'static>() {}
        fn owned<T: Send + 'static>() {}
        shared::<Model>();
        shared::<Engine>();
        shared::<crate::Cancel>();
        owned::<Chat>();
        owned::<Session>();
        owned::<crate::Error>();
    }
}
