//! Prefill and decode at any depth, timed one by one in a session that stays.

use pocketglm::{Engine, Error, GenerateOptions, PreparedPrompt, Request, Session, Timings};

use super::ordinary_tokens;
use crate::failure::Failure;
use crate::generate::begin;

/// A session whose cache holds what stands before the tokens that are timed.
pub struct Meter<'e> {
    engine: &'e Engine,
    session: Session,
    context: usize,
    memory: Option<u64>,
    /// Requests so far: each begins its timed tokens elsewhere in the vocabulary, so that none is in the cache.
    turn: usize,
}

impl<'e> Meter<'e> {
    /// A meter for at most `context` tokens and `memory` bytes.
    pub fn new(engine: &'e Engine, context: usize, memory: Option<u64>) -> Result<Meter<'e>, Failure> {
        let context = context.min(engine.info().max_position_embeddings);
        Ok(Meter { engine, session: engine.session(), context, memory, turn: 0 })
    }

    /// Seconds that `n` tokens of a prompt take behind `depth` others, up to the logits of the last one.
    pub fn prefill(&mut self, n: usize, depth: usize) -> Result<f64, Failure> {
        self.check(n, depth)?;
        let held = ordinary_tokens(self.engine, depth)?;
        let fresh = ordinary_tokens(self.engine, n.saturating_add(1))?;
        let begin_at = |at: usize, n: usize| -> Vec<u32> {
            held.iter().chain(fresh.iter().cycle().skip(at).take(n)).copied().collect()
        };
        if depth > 0 {
            let probe = self.prompt(begin_at(0, 1))?;
            if self.session.reusable_tokens(&probe) < depth {
                let prompt = self.prompt(held.clone())?;
                self.generate(&prompt, 1)?;
            }
        }
        for _ in 0..=n {
            self.turn += 1;
            let prompt = self.prompt(begin_at(self.turn % fresh.len().max(1), n))?;
            // The first token must not be the one that an earlier request left behind the depth.
            if self.session.reusable_tokens(&prompt) == depth {
                let timings = self.generate(&prompt, 1)?;
                expect(n, timings.prompt_tokens)?;
                return Ok(timings.prefill.as_secs_f64());
            }
        }
        Err(Failure::NotMeasured { wanted: n, found: 0 })
    }

    /// Seconds that `n` tokens take one at a time behind `depth` others; at least one stands before them.
    pub fn decode(&mut self, n: usize, depth: usize) -> Result<f64, Failure> {
        self.check(n, depth.max(1))?;
        let prompt = self.prompt(ordinary_tokens(self.engine, depth.max(1))?)?;
        // The prompt's last token gives the first of the answer, which costs no step of its own.
        let timings = self.generate(&prompt, n.saturating_add(1))?;
        expect(n, timings.generated_tokens.saturating_sub(1))?;
        Ok(timings.decode.as_secs_f64())
    }

    fn check(&self, n: usize, depth: usize) -> Result<(), Failure> {
        let prompt = n.saturating_add(depth);
        if prompt > self.context {
            return Err(Error::Context { prompt, context: self.context }.into());
        }
        Ok(())
    }

    fn prompt(&self, ids: Vec<u32>) -> Result<PreparedPrompt, Failure> {
        Ok(self.engine.prompt(&Request::InputIds(ids))?)
    }

    fn generate(&mut self, prompt: &PreparedPrompt, tokens: usize) -> Result<Timings, Failure> {
        let options =
            GenerateOptions { max_new_tokens: tokens, ignore_eos: true, ..GenerateOptions::default() };
        let mut answer = begin(&mut self.session, self.engine, prompt, &options, self.memory)?;
        answer.text()?;
        Ok(answer.timings())
    }
}

fn expect(wanted: usize, found: usize) -> Result<(), Failure> {
    if wanted == found { Ok(()) } else { Err(Failure::NotMeasured { wanted, found }) }
}
