//! The `tojson` filter, as Python's `json.dumps` with `ensure_ascii=False` writes.

use super::value::{Value, float_repr, push_display};

/// Options of `json.dumps`.
pub(super) struct JsonStyle {
    pub indent: Option<usize>,
    pub ensure_ascii: bool,
    pub sort_keys: bool,
    pub item_separator: String,
    pub key_separator: String,
}

impl JsonStyle {
    /// Upper bound of the bytes that indentation and separators add to a value of this weight.
    pub(super) fn overhead(&self, weight: u64) -> u64 {
        let indent =
            self.indent.map_or(0, |n| n as u64 + 1).saturating_mul(u64::from(crate::limits::MAX_VALUE_DEPTH));
        let per_item = indent + (self.item_separator.len() + self.key_separator.len()) as u64;
        // Every item weighs at least 8.
        (weight / 8 + 2).saturating_mul(per_item)
    }

    /// Appends `value`, or says what cannot be written.
    pub(super) fn write(&self, value: &Value, depth: usize, out: &mut String) -> Result<(), String> {
        match value {
            Value::None => out.push_str("null"),
            Value::Bool(b) => out.push_str(if *b { "true" } else { "false" }),
            Value::Int(i) => push_display(out, i),
            Value::Float(f) if f.is_nan() => out.push_str("NaN"),
            Value::Float(f) if f.is_infinite() => {
                out.push_str(if *f > 0.0 { "Infinity" } else { "-Infinity" });
            }
            Value::Float(f) => out.push_str(&float_repr(*f)),
            Value::Str(s) => self.write_text(s, out),
            Value::List(l) => {
                out.push('[');
                for (i, item) in l.items.iter().enumerate() {
                    self.next_item(i, depth + 1, out);
                    self.write(item, depth + 1, out)?;
                }
                self.close(l.items.is_empty(), depth, ']', out);
            }
            Value::Map(m) => {
                let mut entries: Vec<_> = m.entries.iter().collect();
                if self.sort_keys {
                    entries.sort_by(|a, b| a.0.cmp(&b.0));
                }
                out.push('{');
                for (i, (key, value)) in entries.iter().enumerate() {
                    self.next_item(i, depth + 1, out);
                    self.write_text(key, out);
                    out.push_str(&self.key_separator);
                    self.write(value, depth + 1, out)?;
                }
                self.close(m.entries.is_empty(), depth, '}', out);
            }
            other => return Err(format!("{} cannot be written as JSON", other.kind())),
        }
        Ok(())
    }

    fn next_item(&self, index: usize, depth: usize, out: &mut String) {
        if index > 0 {
            out.push_str(&self.item_separator);
        }
        self.new_line(depth, out);
    }

    fn close(&self, empty: bool, depth: usize, bracket: char, out: &mut String) {
        if !empty {
            self.new_line(depth, out);
        }
        out.push(bracket);
    }

    fn new_line(&self, depth: usize, out: &mut String) {
        if let Some(indent) = self.indent {
            out.push('\n');
            out.extend(std::iter::repeat_n(' ', indent * depth));
        }
    }

    fn write_text(&self, s: &str, out: &mut String) {
        out.push('"');
        for c in s.chars() {
            match c {
                '"' => out.push_str("\\\""),
                '\\' => out.push_str("\\\\"),
                '\n' => out.push_str("\\n"),
                '\r' => out.push_str("\\r"),
                '\t' => out.push_str("\\t"),
                '\u{8}' => out.push_str("\\b"),
                '\u{c}' => out.push_str("\\f"),
                c if (c as u32) < 0x20 || (self.ensure_ascii && !matches!(c, ' '..='~')) => {
                    // U+007F is ASCII and stays as it is.
                    if c == '\u{7f}' {
                        out.push(c);
                        continue;
                    }
                    let mut units = [0u16; 2];
                    for unit in c.encode_utf16(&mut units) {
                        push_display(out, format_args!("\\u{unit:04x}"));
                    }
                }
                c => out.push(c),
            }
        }
        out.push('"');
    }
}
