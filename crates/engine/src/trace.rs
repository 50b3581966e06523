//! Everything that a run computes, by the names that the reference implementation gives it.

use std::collections::BTreeMap;
use std::path::Path;

use pocketglm_checkpoint::SafetensorsWriter;
use pocketglm_graph::Inputs;
use pocketglm_tensor::{Tensor, TensorInfo};

use crate::plan::decoder_bindings;
use crate::session::{encode, tracing_decoder};
use crate::{Engine, Prompt, Result};

/// Named tensors of one forward pass over a prompt.
///
/// `input_ids [1, n]`, `position_ids [3, 1, n]`, `hidden_states.{i} [1, n, D]` (0 is the embeddings, the last one
/// is after the final norm, as in transformers), `logits [1, n, vocabulary]`; with pictures also `pixel_values
/// [patches, ..]`, `image_grid_thw [pictures, 3]`, `image_embeds [tokens, D]` (the merger's output), and the same
/// with `_videos`, `video_grid_thw`, `video_embeds` for videos; with sounds `audio_embeds [frames, D]`.
pub struct Trace {
    tensors: Vec<(String, Tensor)>,
}

impl Trace {
    pub(crate) fn of(tensors: Vec<(String, Tensor)>) -> Trace {
        Trace { tensors }
    }

    /// The tensors in the order in which they were computed.
    pub fn tensors(&self) -> &[(String, Tensor)] {
        &self.tensors
    }

    /// One tensor.
    pub fn get(&self, name: &str) -> Option<&Tensor> {
        self.tensors.iter().find(|(n, _)| n == name).map(|(_, t)| t)
    }

    /// Writes a safetensors file.
    ///
    /// # Errors
    /// What the file system reports; no partial file is left under `path`.
    pub fn write(&self, path: impl AsRef<Path>) -> Result<()> {
        let infos: Vec<TensorInfo> = self
            .tensors
            .iter()
            .map(|(name, t)| TensorInfo { name: name.clone(), dtype: t.dtype(), shape: t.shape().to_vec() })
            .collect();
        let mut writer = SafetensorsWriter::create(path.as_ref(), &infos, &BTreeMap::new())?;
        for (name, tensor) in &self.tensors {
            writer.write(name, tensor.bytes())?;
        }
        Ok(writer.finish()?)
    }
}

impl Engine {
    /// Runs a prompt once, in one step, and keeps what the reference implementation names.
    ///
    /// # Errors
    /// What encoding and running report.
    pub fn trace(&self, prompt: &Prompt) -> Result<Trace> {
        let n = prompt.ids.len();
        let width = self.inner.model.text.hidden_size;
        let as_i64 = |v: &[i32]| -> Vec<i64> { v.iter().map(|&x| i64::from(x)).collect() };
        let ids: Vec<i32> = prompt.ids.iter().map(|&id| id as i32).collect();
        let positions: Vec<i32> = prompt.positions.axes.concat();
        let mut tensors = vec![
            ("input_ids".to_string(), Tensor::from_i64(&[1, n], &as_i64(&ids))?),
            ("position_ids".into(), Tensor::from_i64(&[3, 1, n], &as_i64(&positions))?),
        ];
        let mut embeds_of = Vec::with_capacity(prompt.pictures.len());
        for picture in &prompt.pictures {
            embeds_of.push(encode(self, picture)?);
        }
        for (video, pixels_name, grid_name, embeds_name) in [
            (false, "pixel_values", "image_grid_thw", "image_embeds"),
            (true, "pixel_values_videos", "video_grid_thw", "video_embeds"),
        ] {
            let (mut pixels, mut grids, mut embeds) = (Vec::new(), Vec::new(), Vec::new());
            for (p, e) in prompt.pictures.iter().zip(&embeds_of).filter(|(p, _)| p.is_video() == Some(video))
            {
                let Some(p) = p.pixels() else { continue };
                pixels.extend_from_slice(&p.values);
                grids.extend(p.grid.map(|side| side as i64));
                embeds.extend_from_slice(e);
            }
            if !grids.is_empty() {
                let patches: usize =
                    grids.as_chunks::<3>().0.iter().map(|g| g.iter().product::<i64>() as usize).sum();
                tensors.push((
                    pixels_name.into(),
                    Tensor::from_f32(&[patches, pixels.len() / patches.max(1)], &pixels)?,
                ));
                tensors.push((grid_name.into(), Tensor::from_i64(&[grids.len() / 3, 3], &grids)?));
                tensors
                    .push((embeds_name.into(), Tensor::from_f32(&[embeds.len() / width, width], &embeds)?));
            }
        }
        let sounds = prompt.pictures.iter().zip(&embeds_of).filter(|(p, _)| p.is_video().is_none());
        let heard: Vec<f32> = sounds.flat_map(|(_, e)| e).copied().collect();
        if !heard.is_empty() {
            tensors.push(("audio_embeds".into(), Tensor::from_f32(&[heard.len() / width, width], &heard)?));
        }
        let (mut at, mut rows) = (Vec::new(), Vec::new());
        for (i, visual) in prompt.visual.iter().enumerate() {
            if let Some((picture, part)) = visual {
                at.push(i as i32);
                rows.extend_from_slice(&embeds_of[*picture][part * width..(part + 1) * width]);
            }
        }
        let all: Vec<i32> = (0..n as i32).collect();
        let inputs = Inputs::new()
            .i32("input_ids", &ids)
            .i32("position_ids", &positions)
            .i32("image_at", &at)
            .f32("image_embeds", &rows)
            .i32("logit_rows", &all);
        let program = tracing_decoder(self)?;
        let bindings = decoder_bindings(n, 0, at.len(), n, n);
        let mut state = program.new_state(&bindings)?;
        for (name, output) in program.run(&mut state, &inputs, &bindings)?.0 {
            let shape: Vec<usize> = std::iter::once(1).chain(output.shape).collect();
            tensors.push((name, Tensor::from_f32(&shape, &output.values)?));
        }
        Ok(Trace { tensors })
    }
}
