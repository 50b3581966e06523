//! From the model's 0..999 coordinates to the pixels of a screen.

use crate::{Error, Result};

/// A pixel of a device's screen, origin at the top left.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct DevicePoint {
    /// Column, below the screen's width.
    pub x: u32,
    /// Row, below the screen's height.
    pub y: u32,
}

/// The pixel that the model means by `[x, y]` on a screen of `width` x `height` pixels.
///
/// This is `int(x / 1000 * width)` of Open-AutoGLM's executor, in the same float64 arithmetic. The model is told to
/// answer 0..=999; 1000 happens, and is clamped to the last pixel. Anything else is an error.
pub fn to_device_pixels(x: i64, y: i64, width: u32, height: u32) -> Result<DevicePoint> {
    Ok(DevicePoint { x: scale("x coordinate", x, width)?, y: scale("y coordinate", y, height)? })
}

fn scale(what: &'static str, value: i64, extent: u32) -> Result<u32> {
    if extent == 0 {
        return Err(Error::size("screen", "at least 1 pixel in both directions", extent));
    }
    if !(0..=1000).contains(&value) {
        return Err(Error::size(what, "0 to 999", value));
    }
    let pixel = (value as f64 / 1000.0 * f64::from(extent)) as u32;
    Ok(pixel.min(extent - 1))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn coordinates_follow_the_reference_executor() {
        // Expected values from Python: int(x / 1000 * width).
        for (x, width, pixel) in [
            (0, 1080, 0),
            (500, 1080, 540),
            (999, 1080, 1078),
            (999, 2400, 2397),
            (1, 720, 0),
            (29, 1000, 29),
            (57, 1000, 57),
            (333, 1440, 479),
            (999, 1, 0),
            (115, 1000, 115),
        ] {
            assert_eq!(
                to_device_pixels(x, 0, width, 1).unwrap(),
                DevicePoint { x: pixel, y: 0 },
                "{x} of {width}"
            );
        }
    }

    #[test]
    fn every_coordinate_lies_on_the_screen_and_grows_with_the_input() {
        for extent in [1, 2, 719, 1080, 2400, u32::MAX] {
            let mut last = 0;
            for x in 0..=1000 {
                let point = to_device_pixels(x, x, extent, extent).unwrap();
                assert!(point.x < extent && point.x >= last && point.x == point.y);
                last = point.x;
            }
        }
    }

    #[test]
    fn coordinates_off_the_scale_are_refused() {
        for (x, y) in [(-1, 0), (0, 1001), (i64::MAX, 0), (0, i64::MIN)] {
            assert!(matches!(to_device_pixels(x, y, 10, 10), Err(Error::Size { .. })));
        }
        assert_eq!(
            to_device_pixels(1001, 0, 9, 9).unwrap_err().to_string(),
            "x coordinate must be 0 to 999, found 1001"
        );
        assert!(to_device_pixels(1, 1, 0, 10).is_err());
    }
}
