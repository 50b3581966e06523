//! Coordinates in an answer, as pixels of a device.
//!
//! Open-AutoGLM's actions carry them as `element=[x,y]`, `start=[x,y]` and `end=[x,y]`, each from 0 to 999.

use pocketglm::to_device_pixels;
use serde_json::{Value, json};

/// One point that an answer names.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Tap {
    /// The argument that it stands behind, or nothing.
    pub name: String,
    /// Column, 0 to 999.
    pub x: u16,
    /// Row, 0 to 999.
    pub y: u16,
    /// Column of the device.
    pub px: u32,
    /// Row of the device.
    pub py: u32,
}

impl Tap {
    /// The form in `generate --json`.
    pub fn json(&self) -> Value {
        json!({"x": self.x, "y": self.y, "px": self.px, "py": self.py})
    }

    /// The form for people.
    pub fn line(&self, (width, height): (u32, u32)) -> String {
        let space = if self.name.is_empty() { "" } else { " " };
        format!(
            "{}{space}[{},{}] is pixel {},{} of {width}x{height}",
            self.name, self.x, self.y, self.px, self.py
        )
    }
}

/// Every `[x,y]` of two numbers from 0 to 999 in `text`, in order.
pub fn find(text: &str, (width, height): (u32, u32)) -> Vec<Tap> {
    let mut taps = Vec::new();
    for (at, _) in text.match_indices('[') {
        let Some((x, y)) = pair(&text[at + 1..]) else { continue };
        let Ok(point) = to_device_pixels(i64::from(x), i64::from(y), width, height) else { continue };
        taps.push(Tap { name: name(&text[..at]), x, y, px: point.x, py: point.y });
    }
    taps
}

/// The two numbers of `x,y]...`, with spaces around them.
fn pair(text: &str) -> Option<(u16, u16)> {
    // Six digits, the comma and generous spaces: a bracket that closes further away holds no coordinate, and
    // not looking further keeps the work proportional to the text.
    let end = text.bytes().take(32).position(|b| b == b']')?;
    let inside = text.get(..end)?;
    let (x, y) = inside.split_once(',')?;
    Some((coordinate(x)?, coordinate(y)?))
}

fn coordinate(text: &str) -> Option<u16> {
    let digits = text.trim();
    let plain = !digits.is_empty() && digits.len() <= 3 && digits.bytes().all(|b| b.is_ascii_digit());
    plain.then(|| digits.parse().ok()).flatten()
}

/// The word before `=` at the end of `text`.
fn name(text: &str) -> String {
    let Some(before) = text.trim_end().strip_suffix('=') else { return String::new() };
    let before = before.trim_end();
    let letters = before.bytes().rev().take_while(|b| b.is_ascii_alphanumeric() || *b == b'_').count();
    before[before.len() - letters..].to_string()
}

#[cfg(test)]
mod tests {
    use super::*;

    const SCREEN: (u32, u32) = (1080, 2400);

    fn points(text: &str) -> Vec<(String, u16, u16)> {
        find(text, SCREEN).into_iter().map(|t| (t.name, t.x, t.y)).collect()
    }

    #[test]
    fn the_forms_of_open_autoglm_are_found() {
        let text = r#"<answer>do(action="Tap", element=[500,120])</answer> do(action="Swipe", start=[499, 800], end = [ 0,999 ])"#;
        let wanted = [("element", 500, 120), ("start", 499, 800), ("end", 0, 999)];
        assert_eq!(points(text), wanted.map(|(n, x, y)| (n.to_string(), x, y)));
        assert_eq!(points("[7,8]"), [(String::new(), 7, 8)]);
    }

    #[test]
    fn what_is_no_coordinate_is_left_alone() {
        for text in
            ["[1000,5]", "[1,2,3]", "[1]", "[,]", "[-1,5]", "[1.5,2]", "[a,b]", "[1,2", "[+1,2]", "[]", "["]
        {
            assert_eq!(points(text), [], "{text}");
        }
        // A bracket that opens nothing must not hide the one behind it.
        assert_eq!(points("[[1,2]"), [(String::new(), 1, 2)]);
        assert_eq!(find("[1,2]", (0, 5)), []);
    }

    #[test]
    fn many_brackets_take_little_time() {
        let start = std::time::Instant::now();
        assert_eq!(points(&"[".repeat(200_000)), []);
        assert!(start.elapsed().as_secs() < 2);
    }

    #[test]
    fn pixels_follow_the_screen() {
        let tap = &find("好element=[500,120]", SCREEN)[0];
        assert_eq!((tap.px, tap.py), (540, 288));
        assert_eq!(tap.line(SCREEN), "element [500,120] is pixel 540,288 of 1080x2400");
        assert_eq!(tap.json().to_string(), r#"{"x":500,"y":120,"px":540,"py":288}"#);
    }
}
