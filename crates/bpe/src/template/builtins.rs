//! Filters, tests, methods and functions that chat templates use.

use std::rc::Rc;

use minijinja::machinery::ast::CompareOpKind;

use super::eval::{Args, Interp};
use super::json::JsonStyle;
use super::value::Value;
use crate::error::{Error, Result, clip};

/// White space for `strip` and `split` in Python, which counts four more separators than Unicode does.
fn is_space(c: char) -> bool {
    c.is_whitespace() || matches!(c, '\x1c'..='\x1f')
}

impl Interp<'_, '_> {
    fn need(&self, args: &mut Args, name: &str) -> Result<Value> {
        match args.take(name) {
            Some(v) => Ok(v),
            None => self.error(format!("argument {name:?} is missing")),
        }
    }

    fn need_text(&self, args: &mut Args, name: &str) -> Result<Rc<str>> {
        match self.need(args, name)? {
            Value::Str(s) => Ok(s),
            other => self.error(format!("argument {name:?} is {}, not a string", other.kind())),
        }
    }

    /// An optional text; none counts as absent.
    fn opt_text(&self, args: &mut Args, name: &str) -> Result<Option<Rc<str>>> {
        match args.take(name) {
            None | Some(Value::None) => Ok(None),
            Some(Value::Str(s)) => Ok(Some(s)),
            Some(other) => self.error(format!("argument {name:?} is {}, not a string", other.kind())),
        }
    }

    fn opt_int(&self, args: &mut Args, name: &str) -> Result<Option<i64>> {
        match args.take(name) {
            None | Some(Value::None) => Ok(None),
            Some(v) => match v.as_int() {
                Some(i) => Ok(Some(i)),
                None => self.error(format!("argument {name:?} is {}, not an integer", v.kind())),
            },
        }
    }

    fn opt_flag(&self, args: &mut Args, name: &str) -> bool {
        args.take(name).is_some_and(|v| v.is_true())
    }

    /// Functions that are not macros.
    pub(super) fn function(&mut self, name: &str, mut args: Args) -> Result<Value> {
        match name {
            "range" => self.range(args),
            "namespace" => self.namespace(args),
            "dict" => {
                let entries = self.named_entries(args)?;
                Value::map(entries).or_else(|e| self.error(e))
            }
            "raise_exception" => {
                let message = self.need(&mut args, "message")?;
                let message = self.text_of(&message)?;
                Err(Error::TemplateRefused { message: clip(&message, 500) })
            }
            _ => self.error(format!("function {name:?} is not known")),
        }
    }

    fn range(&mut self, mut args: Args) -> Result<Value> {
        let first = self.opt_int(&mut args, "start")?;
        let second = self.opt_int(&mut args, "stop")?;
        let step = self.opt_int(&mut args, "step")?.unwrap_or(1);
        self.no_more("range", args)?;
        let (start, stop) = match (first, second) {
            (Some(stop), None) => (0, stop),
            (Some(start), Some(stop)) => (start, stop),
            _ => return self.error("range needs an argument"),
        };
        if step == 0 {
            return self.error("range step is zero");
        }
        let span = if step > 0 {
            i128::from(stop) - i128::from(start)
        } else {
            i128::from(start) - i128::from(stop)
        };
        let step_size = i128::from(step).abs();
        let count = u64::try_from(((span + step_size - 1) / step_size).max(0)).unwrap_or(u64::MAX);
        self.charge(count.saturating_mul(64))?;
        let items = (0..count as i64).map(|i| Value::Int(start.wrapping_add(i.wrapping_mul(step)))).collect();
        self.list(items, false)
    }

    /// `input|name(args)`.
    pub(super) fn filter(&mut self, name: &str, input: Value, mut args: Args) -> Result<Value> {
        let value = match name {
            "trim" | "upper" | "lower" | "capitalize" | "replace" => {
                let text = self.text_of(&input)?;
                return self.method(&Value::Str(text), if name == "trim" { "strip" } else { name }, args);
            }
            "string" | "safe" => Value::Str(self.text_of(&input)?),
            "length" | "count" => self.length(&input)?,
            "default" | "d" => {
                let fallback = args.take("default_value").unwrap_or(Value::str(""));
                let falsy_too = self.opt_flag(&mut args, "boolean");
                let missing = matches!(input, Value::Undefined) || (falsy_too && !input.is_true());
                if missing { fallback } else { input }
            }
            "first" | "last" => {
                let items = self.items(&input)?;
                let found = if name == "first" { items.items.first() } else { items.items.last() };
                found.cloned().unwrap_or(Value::Undefined)
            }
            "list" => {
                let items = self.items(&input)?;
                self.charge(64 * items.items.len() as u64)?;
                self.list(items.items.clone(), false)?
            }
            "reverse" => match &input {
                Value::Str(s) => {
                    self.charge(2 * s.len() as u64)?;
                    Value::Str(s.chars().rev().collect::<String>().into())
                }
                _ => {
                    let items = self.items(&input)?;
                    self.charge(64 * items.items.len() as u64)?;
                    self.list(items.items.iter().rev().cloned().collect(), false)?
                }
            },
            "int" => self.int_of(&input, &mut args)?,
            "join" => self.join(&input, &mut args)?,
            "items" => self.pairs(&input)?,
            "dictsort" => self.dictsort(&input)?,
            "sort" => self.sort(&input, &mut args)?,
            "map" => self.map_filter(&input, &mut args)?,
            "select" | "reject" => self.select(&input, name == "select", None, &mut args)?,
            "selectattr" | "rejectattr" => {
                let attribute = self.need_text(&mut args, "attribute")?;
                self.select(&input, name == "selectattr", Some(&attribute), &mut args)?
            }
            "indent" => self.indent(&input, &mut args)?,
            "tojson" => self.tojson(&input, &mut args)?,
            _ => return self.error(format!("filter {name:?} is not known")),
        };
        self.no_more(name, args)?;
        Ok(value)
    }

    fn length(&mut self, value: &Value) -> Result<Value> {
        Ok(Value::Int(match value {
            Value::Undefined => 0,
            Value::List(l) => l.items.len() as i64,
            Value::Map(m) => m.entries.len() as i64,
            Value::Str(s) => {
                self.charge(s.len() as u64)?;
                s.chars().count() as i64
            }
            other => return self.error(format!("{} has no length", other.kind())),
        }))
    }

    fn int_of(&mut self, value: &Value, args: &mut Args) -> Result<Value> {
        let fallback = self.opt_int(args, "default")?.unwrap_or(0);
        Ok(Value::Int(match value {
            Value::Float(f) if f.is_finite() && f.abs() < 9e18 => f.trunc() as i64,
            Value::Str(s) => {
                self.charge(s.len() as u64)?;
                let text = s.trim_matches(is_space);
                let float = || text.parse::<f64>().ok().filter(|f| f.abs() < 9e18).map(|f| f.trunc() as i64);
                text.parse().ok().or_else(float).unwrap_or(fallback)
            }
            other => other.as_int().unwrap_or(fallback),
        }))
    }

    fn join(&mut self, input: &Value, args: &mut Args) -> Result<Value> {
        let separator = self.opt_text(args, "d")?.unwrap_or_else(|| "".into());
        let attribute = self.opt_text(args, "attribute")?;
        let items = self.items(input)?;
        let mut out = String::new();
        for (i, item) in items.items.iter().enumerate() {
            let item = match &attribute {
                Some(name) => self.attribute(item, name)?,
                None => item.clone(),
            };
            let text = self.text_of(&item)?;
            self.charge(2 * (text.len() + separator.len()) as u64 + 8)?;
            if i > 0 {
                out.push_str(&separator);
            }
            out.push_str(&text);
        }
        Ok(Value::Str(out.into()))
    }

    /// Key and value of each entry, as tuples.
    fn pairs(&mut self, input: &Value) -> Result<Value> {
        let Value::Map(m) = input else {
            return match input {
                Value::Undefined => self.list(Vec::new(), false),
                other => self.error(format!("{} has no items", other.kind())),
            };
        };
        let mut pairs = Vec::new();
        for (key, value) in &m.entries {
            pairs.push(self.list(vec![Value::Str(key.clone()), value.clone()], true)?);
        }
        self.list(pairs, false)
    }

    fn dictsort(&mut self, input: &Value) -> Result<Value> {
        let Value::Map(m) = input else { return self.error(format!("{} has no items", input.kind())) };
        let mut pairs = Vec::new();
        for (key, value) in &m.entries {
            self.charge(16 * key.len() as u64)?;
            let pair = self.list(vec![Value::Str(key.clone()), value.clone()], true)?;
            pairs.push((key.to_lowercase(), pair));
        }
        pairs.sort_by(|a, b| a.0.cmp(&b.0));
        self.list(pairs.into_iter().map(|(_, p)| p).collect(), false)
    }

    fn sort(&mut self, input: &Value, args: &mut Args) -> Result<Value> {
        let reverse = self.opt_flag(args, "reverse");
        let case_sensitive = self.opt_flag(args, "case_sensitive");
        let attribute = self.opt_text(args, "attribute")?;
        let items = self.items(input)?;
        let mut keyed = Vec::new();
        for item in &items.items {
            let key = match &attribute {
                Some(name) => self.attribute(item, name)?,
                None => item.clone(),
            };
            let key = match key {
                Value::Str(s) if !case_sensitive => {
                    self.charge(4 * s.len() as u64)?;
                    Value::Str(s.to_lowercase().into())
                }
                other => other,
            };
            // Up to 64 comparisons for each item.
            self.charge(4096)?;
            keyed.push((key, item.clone()));
        }
        // One pass finds keys without an order, so that the comparison below cannot fail.
        for pair in keyed.windows(2) {
            if let [a, b] = pair {
                self.order(&a.0, &b.0)?;
            }
        }
        let compare = |a: &Value, b: &Value| match (a, b) {
            (Value::Str(a), Value::Str(b)) => a.cmp(b),
            _ => a.as_float().partial_cmp(&b.as_float()).unwrap_or(std::cmp::Ordering::Equal),
        };
        if keyed.iter().any(|(k, _)| matches!(k, Value::Float(f) if f.is_nan())) {
            return self.error("a number that is not one has no order");
        }
        keyed.sort_by(|a, b| if reverse { compare(&b.0, &a.0) } else { compare(&a.0, &b.0) });
        self.list(keyed.into_iter().map(|(_, v)| v).collect(), false)
    }

    fn map_filter(&mut self, input: &Value, args: &mut Args) -> Result<Value> {
        let filter = self.opt_text_positional(args)?;
        let attribute = if filter.is_none() { self.opt_text(args, "attribute")? } else { None };
        let items = self.items(input)?;
        let mut out = Vec::new();
        for item in &items.items {
            self.charge(64)?;
            out.push(match (&filter, &attribute) {
                (Some(name), _) => self.filter(name, item.clone(), Args::none())?,
                (None, Some(name)) => self.attribute(item, name)?,
                (None, None) => return self.error("map needs a filter or an attribute"),
            });
        }
        self.list(out, false)
    }

    /// The name of a filter or test given as the next positional argument.
    fn opt_text_positional(&self, args: &mut Args) -> Result<Option<Rc<str>>> {
        match args.take_positional() {
            None => Ok(None),
            Some(Value::Str(s)) => Ok(Some(s)),
            Some(other) => self.error(format!("wanted a name, found {}", other.kind())),
        }
    }

    fn select(
        &mut self,
        input: &Value,
        keep: bool,
        attribute: Option<&str>,
        args: &mut Args,
    ) -> Result<Value> {
        let test = self.opt_text_positional(args)?;
        let operand = args.take_positional();
        let items = self.items(input)?;
        let mut out = Vec::new();
        for item in &items.items {
            self.charge(64)?;
            let value = match attribute {
                Some(name) => self.attribute(item, name)?,
                None => item.clone(),
            };
            let passes = match &test {
                None => value.is_true(),
                Some(name) => self.test(name, &value, Args::of(operand.clone()))?,
            };
            if passes == keep {
                out.push(item.clone());
            }
        }
        self.list(out, false)
    }

    fn indent(&mut self, input: &Value, args: &mut Args) -> Result<Value> {
        let width = match args.take("width") {
            None => 4,
            Some(v) => match v.as_int().and_then(|i| usize::try_from(i).ok()).filter(|&n| n <= 1 << 16) {
                Some(n) => n,
                None => return self.error("argument \"width\" is not a small positive integer"),
            },
        };
        let first = self.opt_flag(args, "first");
        let blank = self.opt_flag(args, "blank");
        let text = self.text_of(input)?;
        let lines = text.matches('\n').count() as u64 + 1;
        self.charge(2 * text.len() as u64 + lines.saturating_mul(width as u64))?;
        let pad = " ".repeat(width);
        let mut out = String::new();
        for (i, line) in text.split('\n').enumerate() {
            if i > 0 {
                out.push('\n');
            }
            if (i > 0 || first) && (blank || !line.is_empty() || (i == 0 && first)) {
                out.push_str(&pad);
            }
            out.push_str(line);
        }
        Ok(Value::Str(out.into()))
    }

    fn tojson(&mut self, input: &Value, args: &mut Args) -> Result<Value> {
        // Positional arguments come in the order of the reference's filter.
        let ensure_ascii = self.opt_flag(args, "ensure_ascii");
        let indent = match self.opt_int(args, "indent")? {
            None => None,
            Some(n) => match usize::try_from(n.max(0)).ok().filter(|&n| n <= 1 << 10) {
                Some(n) => Some(n),
                None => return self.error(format!("indentation of {n} is too large")),
            },
        };
        let comma = if indent.is_some() { "," } else { ", " };
        let (item_separator, key_separator) = match args.take("separators") {
            None | Some(Value::None) => (comma.to_owned(), ": ".to_owned()),
            Some(Value::List(l)) => match l.items.as_slice() {
                [Value::Str(a), Value::Str(b)] => (a.as_ref().to_owned(), b.as_ref().to_owned()),
                _ => return self.error("argument \"separators\" is not two strings"),
            },
            Some(other) => return self.error(format!("argument \"separators\" is {}", other.kind())),
        };
        let sort_keys = self.opt_flag(args, "sort_keys");
        let style = JsonStyle { indent, ensure_ascii, sort_keys, item_separator, key_separator };
        let weight = input.weight();
        self.charge(weight.saturating_mul(2).saturating_add(style.overhead(weight)))?;
        let mut out = String::new();
        style.write(input, 0, &mut out).or_else(|e| self.error(e))?;
        Ok(Value::Str(out.into()))
    }

    /// `input is name(args)`.
    pub(super) fn test(&mut self, name: &str, input: &Value, mut args: Args) -> Result<bool> {
        let comparison = match name {
            "eq" | "equalto" | "==" => Some(CompareOpKind::Eq),
            "ne" | "!=" => Some(CompareOpKind::Ne),
            "lt" | "lessthan" | "<" => Some(CompareOpKind::Lt),
            "le" | "<=" => Some(CompareOpKind::Lte),
            "gt" | "greaterthan" | ">" => Some(CompareOpKind::Gt),
            "ge" | ">=" => Some(CompareOpKind::Gte),
            "in" => Some(CompareOpKind::In),
            _ => None,
        };
        if let Some(op) = comparison {
            let other = self.need(&mut args, "other")?;
            self.no_more(name, args)?;
            return self.compare(op, input, &other);
        }
        let answer = match name {
            "defined" => !matches!(input, Value::Undefined),
            "undefined" => matches!(input, Value::Undefined),
            "none" => matches!(input, Value::None),
            "true" => matches!(input, Value::Bool(true)),
            "false" => matches!(input, Value::Bool(false)),
            "boolean" => matches!(input, Value::Bool(_)),
            "integer" => matches!(input, Value::Int(_)),
            "float" => matches!(input, Value::Float(_)),
            "number" => matches!(input, Value::Int(_) | Value::Float(_) | Value::Bool(_)),
            "string" => matches!(input, Value::Str(_)),
            "mapping" => matches!(input, Value::Map(_)),
            // Python takes everything with a length and an index for a sequence.
            "sequence" | "iterable" => {
                matches!(input, Value::List(_) | Value::Str(_) | Value::Map(_) | Value::Undefined)
            }
            "odd" | "even" | "divisibleby" => {
                let divisor =
                    if name == "divisibleby" { self.opt_int(&mut args, "num")?.unwrap_or(0) } else { 2 };
                let Some(rest) = input.as_int().and_then(|i| i.checked_rem(divisor)) else {
                    return self.error(format!("{} cannot be divided by {divisor}", input.kind()));
                };
                (rest != 0) == (name == "odd")
            }
            _ => return self.error(format!("test {name:?} is not known")),
        };
        self.no_more(name, args)?;
        Ok(answer)
    }

    /// `object.name(args)`.
    pub(super) fn method(&mut self, object: &Value, name: &str, args: Args) -> Result<Value> {
        match object {
            Value::Str(s) => self.str_method(s, name, args),
            Value::Map(_) => self.map_method(object, name, args),
            Value::Undefined => self.error(format!("undefined value has no method {name:?}")),
            other => self.error(format!("{} has no method {name:?}", other.kind())),
        }
    }

    fn map_method(&mut self, object: &Value, name: &str, mut args: Args) -> Result<Value> {
        let Value::Map(m) = object else { return self.error("not a mapping") };
        let value = match name {
            "get" => {
                let key = self.need_text(&mut args, "key")?;
                let fallback = args.take("default").unwrap_or(Value::None);
                self.charge(8 * m.entries.len() as u64)?;
                m.get(&key).cloned().unwrap_or(fallback)
            }
            "items" => self.pairs(object)?,
            "keys" => {
                let keys = self.items(object)?;
                Value::List(keys)
            }
            "values" => {
                self.charge(64 * m.entries.len() as u64)?;
                self.list(m.entries.iter().map(|(_, v)| v.clone()).collect(), false)?
            }
            _ => return self.error(format!("a mapping has no method {name:?}")),
        };
        self.no_more(name, args)?;
        Ok(value)
    }

    fn str_method(&mut self, s: &Rc<str>, name: &str, mut args: Args) -> Result<Value> {
        // Every method reads the text; changing case can make it three times as long.
        self.charge(2 * s.len() as u64 + 16)?;
        let value = match name {
            "strip" | "lstrip" | "rstrip" => {
                let set = self.opt_text(&mut args, "chars")?;
                let set: Option<Vec<char>> = set.map(|t| t.chars().take(257).collect());
                if set.as_ref().is_some_and(|v| v.len() > 256) {
                    return self.error("more than 256 characters to strip");
                }
                let strip = |c: char| set.as_ref().map_or_else(|| is_space(c), |v| v.contains(&c));
                if let Some(v) = &set {
                    self.charge((s.len() as u64).saturating_mul(v.len() as u64))?;
                }
                let text = if name == "rstrip" { s } else { s.trim_start_matches(strip) };
                let text = if name == "lstrip" { text } else { text.trim_end_matches(strip) };
                Value::str(text)
            }
            "upper" => {
                self.charge(4 * s.len() as u64)?;
                Value::Str(s.to_uppercase().into())
            }
            "lower" => {
                self.charge(4 * s.len() as u64)?;
                Value::Str(s.to_lowercase().into())
            }
            "capitalize" => {
                self.charge(4 * s.len() as u64)?;
                let mut chars = s.chars();
                let first: String = chars.next().into_iter().flat_map(char::to_uppercase).collect();
                Value::Str((first + &chars.as_str().to_lowercase()).into())
            }
            "startswith" | "endswith" => {
                let wanted = self.need(&mut args, "prefix")?;
                let candidates = match &wanted {
                    Value::List(l) => l.items.clone(),
                    other => vec![other.clone()],
                };
                let mut found = false;
                for candidate in &candidates {
                    let Some(text) = candidate.as_str() else {
                        return self.error(format!("argument is {}, not a string", candidate.kind()));
                    };
                    self.charge(text.len() as u64 + 8)?;
                    found |= if name == "startswith" { s.starts_with(text) } else { s.ends_with(text) };
                }
                Value::Bool(found)
            }
            "replace" => self.replace(s, &mut args)?,
            "split" => self.split(s, &mut args)?,
            "splitlines" => {
                let body = s.strip_suffix('\n').unwrap_or(s);
                let lines = if s.is_empty() { Vec::new() } else { body.split('\n').collect() };
                self.texts(lines.into_iter().map(|l| l.strip_suffix('\r').unwrap_or(l)))?
            }
            "join" => {
                let items = self.need(&mut args, "iterable")?;
                return self.filter("join", items, Args::of(Some(Value::Str(s.clone()))));
            }
            "find" | "count" => {
                let part = self.need_text(&mut args, "sub")?;
                self.charge((s.len() + part.len()) as u64)?;
                Value::Int(match (name, s.find(&*part)) {
                    ("count", _) => s.matches(&*part).count() as i64,
                    (_, Some(at)) => s.get(..at).map_or(0, |t| t.chars().count()) as i64,
                    (_, None) => -1,
                })
            }
            "isdigit" => Value::Bool(!s.is_empty() && s.chars().all(|c| c.is_ascii_digit())),
            _ => return self.error(format!("a string has no method {name:?}")),
        };
        self.no_more(name, args)?;
        Ok(value)
    }

    fn replace(&mut self, s: &str, args: &mut Args) -> Result<Value> {
        let old = self.need_text(args, "old")?;
        let new = self.need_text(args, "new")?;
        let most = match self.opt_int(args, "count")? {
            Some(n) if n >= 0 => n as usize,
            _ => usize::MAX,
        };
        self.charge((s.len() + old.len()) as u64)?;
        let found = s.matches(&*old).count().min(most);
        self.charge(2 * (found as u64).saturating_mul(new.len() as u64).saturating_add(s.len() as u64))?;
        Ok(Value::Str(s.replacen(&*old, &new, most).into()))
    }

    fn split(&mut self, s: &str, args: &mut Args) -> Result<Value> {
        let separator = self.opt_text(args, "sep")?;
        let most = self.opt_int(args, "maxsplit")?.and_then(|n| usize::try_from(n).ok());
        match separator.as_deref() {
            Some("") => self.error("empty separator"),
            Some(separator) => match most {
                Some(n) => self.texts(s.splitn(n.saturating_add(1), separator)),
                None => self.texts(s.split(separator)),
            },
            None => {
                let mut parts = Vec::new();
                let mut rest = s.trim_start_matches(is_space);
                while !rest.is_empty() {
                    self.charge(16)?;
                    let end = if most == Some(parts.len()) { None } else { rest.find(is_space) };
                    let (part, after) =
                        rest.split_at_checked(end.unwrap_or(rest.len())).unwrap_or((rest, ""));
                    parts.push(if end.is_none() { part.trim_end_matches(is_space) } else { part });
                    rest = after.trim_start_matches(is_space);
                }
                self.texts(parts.into_iter())
            }
        }
    }

    /// A list of texts.
    fn texts<'x>(&mut self, parts: impl Iterator<Item = &'x str>) -> Result<Value> {
        let mut items = Vec::new();
        for part in parts {
            self.charge(64)?;
            items.push(self.text(part)?);
        }
        self.list(items, false)
    }
}
