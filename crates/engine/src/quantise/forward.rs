//! Runs a prompt through a program of the decoder, some tokens at a time, and gives every step's results.

use std::ops::Range;

use pocketglm_graph::{Bindings, Inputs, Outputs, Program, ProgramState};

use crate::plan::decoder_bindings;
use crate::session::encode;
use crate::{Engine, Error, Prompt, Result};

/// A prompt on its way through the decoder. Every token counts as one whose logits are wanted.
pub(super) struct Forward<'a> {
    program: &'a dyn Program,
    prompt: &'a Prompt,
    /// The rows of each picture.
    pictures: Vec<Vec<f32>>,
    state: ProgramState,
    width: usize,
    step: usize,
    at: usize,
}

impl<'a> Forward<'a> {
    /// Encodes the prompt's pictures and makes room for its tokens.
    pub fn new(
        engine: &Engine,
        program: &'a dyn Program,
        prompt: &'a Prompt,
        step: usize,
    ) -> Result<Forward<'a>> {
        let (n, context) = (prompt.ids.len(), engine.inner.model.context(&engine.inner.options));
        if n > context {
            return Err(Error::Context { prompt: n, context });
        }
        let pictures = prompt.pictures.iter().map(|p| encode(engine, p)).collect::<Result<_>>()?;
        let state = program.new_state(&Bindings::new().with("C", n))?;
        let width = engine.inner.model.text.hidden_size;
        Ok(Forward { program, prompt, pictures, state, width, step: step.max(1), at: 0 })
    }

    /// The rows of each picture, as the vision encoder gives them.
    pub fn pictures(&self) -> &[Vec<f32>] {
        &self.pictures
    }

    /// The next step: its tokens and results; `None` at the end.
    pub fn next(&mut self) -> Result<Option<(Range<usize>, Outputs)>> {
        let prompt = self.prompt;
        let range = self.at..self.at.saturating_add(self.step).min(prompt.ids.len());
        let (Some(ids), Some(visual)) = (prompt.ids.get(range.clone()), prompt.visual.get(range.clone()))
        else {
            return Ok(None);
        };
        if ids.is_empty() {
            return Ok(None);
        }
        let ids: Vec<i32> = ids.iter().map(|&id| id as i32).collect();
        let axis = |axis: &'a Vec<i32>| axis.get(range.clone()).unwrap_or_default();
        let positions: Vec<i32> = prompt.positions.axes.iter().flat_map(axis).copied().collect();
        let (mut at, mut embeds) = (Vec::new(), Vec::new());
        for (row, part) in (0..).zip(visual) {
            if let Some((picture, part)) = part {
                let rows = self.pictures.get(*picture);
                let row_of = |all: &'_ Vec<f32>| {
                    all.get(part * self.width..(part + 1) * self.width).map(<[f32]>::to_vec)
                };
                embeds.extend(rows.and_then(row_of).ok_or(Error::NoVision { found: 1 })?);
                at.push(row);
            }
        }
        let rows: Vec<i32> = (0..).take(ids.len()).collect();
        let inputs = Inputs::new()
            .i32("input_ids", &ids)
            .i32("position_ids", &positions)
            .i32("image_at", &at)
            .f32("image_embeds", &embeds)
            .i32("logit_rows", &rows);
        let bindings = decoder_bindings(ids.len(), range.start, at.len(), rows.len(), prompt.ids.len());
        let named = self.program.graph().outputs().iter().map(|(name, _)| name.as_str());
        let wanted: Vec<&str> = named.filter(|name| !pocketglm_glm::BEST.contains(name)).collect();
        let outputs = self.program.start(&mut self.state, &inputs, &bindings, &wanted)?.finish()?;
        self.at = range.end;
        Ok(Some((range, outputs)))
    }
}
