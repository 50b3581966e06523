//! Typed access to the fields of an untrusted JSON object, with errors that name file, field and value.

use std::ops::RangeInclusive;

use serde_json::{Map, Value};

use crate::{Error, Result};

/// One JSON object of a configuration file.
#[derive(Clone)]
pub struct Fields<'a> {
    file: &'a str,
    path: String,
    object: &'a Map<String, Value>,
}

/// A value as an error shows it: whole where it is short.
fn shown(value: &Value) -> String {
    let text = value.to_string();
    match text.char_indices().nth(60) {
        Some((end, _)) => format!("{}..", &text[..end]),
        None => text,
    }
}

impl<'a> Fields<'a> {
    /// The top-level object of `file`.
    ///
    /// # Errors
    /// [`Error::Field`] where the file holds something else.
    pub fn new(file: &'a str, value: &'a Value) -> Result<Fields<'a>> {
        let object = value.as_object().ok_or_else(|| Error::Field {
            file: file.into(),
            field: "(top level)".into(),
            wanted: "an object".into(),
            found: shown(value),
        })?;
        Ok(Fields { file, path: String::new(), object })
    }

    fn name(&self, field: &str) -> String {
        if self.path.is_empty() { field.into() } else { format!("{}.{field}", self.path) }
    }

    /// The error for a field that does not hold what is needed.
    pub fn error(&self, field: &str, wanted: impl Into<String>) -> Error {
        let found = self.object.get(field).map_or_else(|| "nothing".into(), shown);
        Error::Field { file: self.file.into(), field: self.name(field), wanted: wanted.into(), found }
    }

    /// The raw value; `null` counts as absent.
    pub fn get(&self, field: &str) -> Option<&'a Value> {
        self.object.get(field).filter(|v| !v.is_null())
    }

    /// An object inside this one.
    pub fn child(&self, field: &str) -> Result<Option<Fields<'a>>> {
        match self.get(field) {
            None => Ok(None),
            Some(v) => {
                let object = v.as_object().ok_or_else(|| self.error(field, "an object"))?;
                Ok(Some(Fields { file: self.file, path: self.name(field), object }))
            }
        }
    }

    /// A whole number within `range`.
    pub fn integer(&self, field: &str, range: RangeInclusive<usize>) -> Result<Option<usize>> {
        let wanted =
            || self.error(field, format!("a whole number from {} to {}", range.start(), range.end()));
        self.get(field)
            .map(|v| {
                v.as_u64()
                    .and_then(|n| usize::try_from(n).ok())
                    .filter(|n| range.contains(n))
                    .ok_or_else(wanted)
            })
            .transpose()
    }

    /// A whole number within `range` that must be there.
    pub fn required(&self, field: &str, range: RangeInclusive<usize>) -> Result<usize> {
        let wanted = format!("a whole number from {} to {}", range.start(), range.end());
        self.integer(field, range)?.ok_or_else(|| self.error(field, wanted))
    }

    /// A finite number within `range`.
    pub fn number(&self, field: &str, range: RangeInclusive<f64>) -> Result<Option<f64>> {
        self.get(field)
            .map(|v| {
                v.as_f64().filter(|n| range.contains(n)).ok_or_else(|| {
                    self.error(field, format!("a number from {} to {}", range.start(), range.end()))
                })
            })
            .transpose()
    }

    /// True or false.
    pub fn boolean(&self, field: &str) -> Result<Option<bool>> {
        self.get(field).map(|v| v.as_bool().ok_or_else(|| self.error(field, "true or false"))).transpose()
    }

    /// A string.
    pub fn string(&self, field: &str) -> Result<Option<&'a str>> {
        self.get(field).map(|v| v.as_str().ok_or_else(|| self.error(field, "a string"))).transpose()
    }

    /// A list of at most `most` whole numbers within `range`; one bare number counts as a list of one.
    pub fn integers(
        &self,
        field: &str,
        most: usize,
        range: RangeInclusive<usize>,
    ) -> Result<Option<Vec<usize>>> {
        let Some(value) = self.get(field) else { return Ok(None) };
        let one = std::slice::from_ref(value);
        let list = value.as_array().map_or(one, Vec::as_slice);
        let wanted = || {
            self.error(
                field,
                format!("at most {most} whole numbers from {} to {}", range.start(), range.end()),
            )
        };
        let number =
            |v: &Value| v.as_u64().and_then(|n| usize::try_from(n).ok()).filter(|n| range.contains(n));
        if list.len() > most {
            return Err(wanted());
        }
        list.iter().map(|v| number(v).ok_or_else(wanted)).collect::<Result<Vec<_>>>().map(Some)
    }
}
