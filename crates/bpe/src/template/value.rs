//! Values of the template language.
//!
//! Lists and maps know their nesting depth and the size they would have as text, both counted when they are
//! made. That is what keeps a template from building something small in memory that is endless when printed,
//! compared or dropped.

use std::cell::RefCell;
use std::fmt::Write;
use std::rc::Rc;

use crate::limits::MAX_VALUE_DEPTH;

/// A value. Lists and maps never change; only a namespace does, and it can be in no list, map or namespace.
#[derive(Debug, Clone)]
pub(super) enum Value {
    Undefined,
    None,
    Bool(bool),
    Int(i64),
    Float(f64),
    Str(Rc<str>),
    List(Rc<List>),
    Map(Rc<Map>),
    Namespace(Rc<RefCell<Entries>>),
    Loop(Rc<Loop>),
    /// Index of a macro.
    Macro(usize),
}

/// Keys and values in order of insertion.
pub(super) type Entries = Vec<(Rc<str>, Value)>;

/// A list or tuple.
#[derive(Debug)]
pub(super) struct List {
    pub items: Vec<Value>,
    pub tuple: bool,
    depth: u32,
    weight: u64,
}

/// A map with text keys in order of insertion.
#[derive(Debug)]
pub(super) struct Map {
    pub entries: Entries,
    depth: u32,
    weight: u64,
}

/// The `loop` variable.
#[derive(Debug)]
pub(super) struct Loop {
    pub items: Rc<List>,
    pub index: usize,
}

impl Value {
    pub(super) fn str(s: &str) -> Self {
        Value::Str(s.into())
    }

    /// A list, unless it nests too deeply or holds something that may not be in one.
    pub(super) fn list(items: Vec<Value>, tuple: bool) -> Result<Self, String> {
        Ok(Value::List(Rc::new(List::new(items, tuple)?)))
    }

    /// A map; of equal keys the last value stays, in the place of the first.
    pub(super) fn map(entries: Entries) -> Result<Self, String> {
        let mut index = std::collections::HashMap::with_capacity(entries.len());
        let mut unique: Entries = Vec::with_capacity(entries.len());
        for (key, value) in entries {
            let at = *index.entry(key.clone()).or_insert(unique.len());
            match unique.get_mut(at) {
                Some(slot) => slot.1 = value,
                None => unique.push((key, value)),
            }
        }
        let (depth, mut weight) = measure(unique.iter().map(|(_, v)| v))?;
        for (key, _) in &unique {
            weight = weight.saturating_add(text_weight(key));
        }
        Ok(Value::Map(Rc::new(Map { entries: unique, depth, weight })))
    }

    /// Converts a value given by the caller.
    pub(super) fn from_json(json: &serde_json::Value) -> Result<Self, String> {
        use serde_json::Value as Json;
        Ok(match json {
            Json::Null => Value::None,
            Json::Bool(b) => Value::Bool(*b),
            Json::Number(n) => match n.as_i64() {
                Some(i) => Value::Int(i),
                None => Value::Float(n.as_f64().unwrap_or(f64::NAN)),
            },
            Json::String(s) => Value::str(s),
            Json::Array(a) => Value::list(a.iter().map(Value::from_json).collect::<Result<_, _>>()?, false)?,
            Json::Object(o) => {
                let entry = |(k, v): (&String, _)| Ok((k.as_str().into(), Value::from_json(v)?));
                Value::map(o.iter().map(entry).collect::<Result<_, String>>()?)?
            }
        })
    }

    pub(super) fn is_true(&self) -> bool {
        match self {
            Value::Undefined | Value::None => false,
            Value::Bool(b) => *b,
            Value::Int(i) => *i != 0,
            Value::Float(f) => *f != 0.0,
            Value::Str(s) => !s.is_empty(),
            Value::List(l) => !l.items.is_empty(),
            Value::Map(m) => !m.entries.is_empty(),
            Value::Namespace(_) | Value::Loop(_) | Value::Macro(_) => true,
        }
    }

    /// Name of the type, for error messages.
    pub(super) fn kind(&self) -> &'static str {
        match self {
            Value::Undefined => "undefined",
            Value::None => "none",
            Value::Bool(_) => "a boolean",
            Value::Int(_) | Value::Float(_) => "a number",
            Value::Str(_) => "a string",
            Value::List(_) => "a list",
            Value::Map(_) => "a mapping",
            Value::Namespace(_) => "a namespace",
            Value::Loop(_) => "the loop",
            Value::Macro(_) => "a macro",
        }
    }

    /// The integer that Python takes this for.
    pub(super) fn as_int(&self) -> Option<i64> {
        match self {
            Value::Int(i) => Some(*i),
            Value::Bool(b) => Some(i64::from(*b)),
            _ => None,
        }
    }

    pub(super) fn as_float(&self) -> Option<f64> {
        match self {
            Value::Float(f) => Some(*f),
            other => other.as_int().map(|i| i as f64),
        }
    }

    pub(super) fn as_str(&self) -> Option<&str> {
        match self {
            Value::Str(s) => Some(s),
            _ => None,
        }
    }

    /// Upper bound of the bytes of this value as text, and of the steps to walk it.
    pub(super) fn weight(&self) -> u64 {
        match self {
            Value::Str(s) => text_weight(s),
            Value::List(l) => l.weight,
            Value::Map(m) => m.weight,
            _ => 32,
        }
    }

    fn depth(&self) -> u32 {
        match self {
            Value::List(l) => l.depth,
            Value::Map(m) => m.depth,
            _ => 0,
        }
    }

    /// Equality as in Python: numbers compare by value whatever their type.
    pub(super) fn equals(&self, other: &Value) -> bool {
        match (self, other) {
            (Value::Undefined, Value::Undefined) | (Value::None, Value::None) => true,
            (Value::Str(a), Value::Str(b)) => a == b,
            (Value::List(a), Value::List(b)) => {
                a.tuple == b.tuple
                    && a.items.len() == b.items.len()
                    && a.items.iter().zip(&b.items).all(|(x, y)| x.equals(y))
            }
            (Value::Map(a), Value::Map(b)) => {
                a.entries.len() == b.entries.len()
                    && a.entries.iter().all(|(k, v)| b.get(k).is_some_and(|w| v.equals(w)))
            }
            (Value::Namespace(a), Value::Namespace(b)) => Rc::ptr_eq(a, b),
            (Value::Macro(a), Value::Macro(b)) => a == b,
            _ => match (self.as_int(), other.as_int()) {
                (Some(a), Some(b)) => a == b,
                _ => match (self.as_float(), other.as_float()) {
                    (Some(a), Some(b)) => a == b,
                    _ => false,
                },
            },
        }
    }

    /// Appends the value as `str()` gives it.
    pub(super) fn write_str(&self, out: &mut String) {
        match self {
            Value::Undefined => {}
            Value::Str(s) => out.push_str(s),
            other => other.write_repr(out),
        }
    }

    /// Appends the value as `repr()` gives it.
    fn write_repr(&self, out: &mut String) {
        match self {
            Value::Undefined => out.push_str("Undefined"),
            Value::None => out.push_str("None"),
            Value::Bool(b) => out.push_str(if *b { "True" } else { "False" }),
            Value::Int(i) => push_display(out, i),
            Value::Float(f) => out.push_str(&float_repr(*f)),
            Value::Str(s) => write_str_repr(s, out),
            Value::List(l) => {
                let one = l.tuple && l.items.len() == 1;
                let (open, close) = match (l.tuple, one) {
                    (true, true) => ('(', ",)"),
                    (true, false) => ('(', ")"),
                    _ => ('[', "]"),
                };
                out.push(open);
                for (i, item) in l.items.iter().enumerate() {
                    if i > 0 {
                        out.push_str(", ");
                    }
                    item.write_repr(out);
                }
                out.push_str(close);
            }
            Value::Map(m) => {
                out.push('{');
                for (i, (key, value)) in m.entries.iter().enumerate() {
                    if i > 0 {
                        out.push_str(", ");
                    }
                    write_str_repr(key, out);
                    out.push_str(": ");
                    value.write_repr(out);
                }
                out.push('}');
            }
            Value::Namespace(_) => out.push_str("<Namespace>"),
            Value::Loop(_) => out.push_str("<LoopContext>"),
            Value::Macro(_) => out.push_str("<Macro>"),
        }
    }
}

impl List {
    pub(super) fn new(items: Vec<Value>, tuple: bool) -> Result<Self, String> {
        let (depth, weight) = measure(items.iter())?;
        Ok(List { items, tuple, depth, weight })
    }
}

impl Map {
    pub(super) fn get(&self, key: &str) -> Option<&Value> {
        self.entries.iter().find(|(k, _)| &**k == key).map(|(_, v)| v)
    }
}

/// Depth and weight of a container of these items.
fn measure<'v>(items: impl Iterator<Item = &'v Value>) -> Result<(u32, u64), String> {
    let (mut depth, mut weight) = (0, 32u64);
    for item in items {
        if matches!(item, Value::Namespace(_) | Value::Loop(_)) {
            return Err(format!("{} cannot be put into a list or mapping", item.kind()));
        }
        depth = depth.max(item.depth());
        weight = weight.saturating_add(item.weight()).saturating_add(4);
    }
    if depth >= MAX_VALUE_DEPTH {
        return Err(format!("lists and mappings nest deeper than {MAX_VALUE_DEPTH}"));
    }
    Ok((depth + 1, weight))
}

/// Escaping makes at most six bytes of one, as in `\u0000`.
fn text_weight(s: &str) -> u64 {
    (s.len() as u64).saturating_mul(6).saturating_add(4)
}

pub(super) fn push_display(out: &mut String, value: impl std::fmt::Display) {
    // Writing to a String cannot fail.
    let _ = write!(out, "{value}");
}

/// `repr()` of a Python float: the shortest digits that read back the same, in scientific notation below 1e-4
/// and from 1e16 on.
pub(super) fn float_repr(f: f64) -> String {
    if f.is_nan() {
        return "nan".into();
    }
    if f.is_infinite() {
        return if f > 0.0 { "inf" } else { "-inf" }.into();
    }
    if f != 0.0 && (f.abs() < 1e-4 || f.abs() >= 1e16) {
        let text = format!("{f:e}");
        let (digits, exponent) = text.split_once('e').unwrap_or((&text, "0"));
        let exponent: i32 = exponent.parse().unwrap_or_default();
        let sign = if exponent < 0 { '-' } else { '+' };
        return format!("{digits}e{sign}{:02}", exponent.abs());
    }
    let text = format!("{f}");
    if text.contains('.') { text } else { text + ".0" }
}

/// `repr()` of a Python string, except that of other characters only controls count as not printable.
fn write_str_repr(s: &str, out: &mut String) {
    let quote = if s.contains('\'') && !s.contains('"') { '"' } else { '\'' };
    out.push(quote);
    for c in s.chars() {
        match c {
            '\n' => out.push_str("\\n"),
            '\r' => out.push_str("\\r"),
            '\t' => out.push_str("\\t"),
            '\\' => out.push_str("\\\\"),
            c if c == quote => {
                out.push('\\');
                out.push(c);
            }
            c if c.is_control() => push_display(out, format_args!("\\x{:02x}", c as u32)),
            c => out.push(c),
        }
    }
    out.push(quote);
}
