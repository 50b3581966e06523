//! From the bytes of a picture to the rows that the patch embedding multiplies.
//!
//! The order of steps: [`Image::decode`] → [`smart_resize`] → [`resize_bicubic_u8`] → [`patchify`];
//! [`preprocess_image`] and [`preprocess_video`] do the last three. [`vision_positions`] is what the encoder needs to
//! know about a grid. The rules are those of transformers 5.23.0 (`Glm4vImageProcessor`) with Pillow 11.3.0 as the
//! resizer, and the results are equal to theirs bit for bit, except where [`Image::decode`] says otherwise.
//!
//! Letters: `t` frames or temporal patches, `h` `w` pixels or patches, `n` patches, `p` the side of a patch.

mod config;
mod coordinates;
mod decode;
mod header;
mod patchify;
mod positions;
mod resize;

pub use config::PreprocessConfig;
pub use coordinates::{DevicePoint, to_device_pixels};
pub use decode::{DecodeLimits, Image};
pub use patchify::{Pixels, patchify, preprocess_image, preprocess_video, resized_size, visual_tokens};
pub use positions::{VisionPositions, vision_positions};
pub use resize::{resize_bicubic_u8, smart_resize};

#[cfg(test)]
mod golden;
