use std::collections::HashSet;
use std::fmt;

use pocketglm_tensor::WeightSource;

use crate::error::shown;
use crate::names::place_of;
use crate::{Error, Result};

/// A tensor that a model wants.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ExpectedTensor {
    /// Its canonical name.
    pub name: String,
    /// Its shape, slowest dimension first.
    pub shape: Vec<usize>,
    /// Whether it may be absent (its shape counts where it is present).
    pub optional: bool,
}

/// A tensor of another shape than wanted.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Misshapen {
    /// Its name.
    pub name: String,
    /// The shape that the model wants.
    pub wanted: Vec<usize>,
    /// The shape in the file.
    pub found: Vec<usize>,
    /// The file.
    pub place: String,
}

/// Everything in which a source differs from what a model expects. Each list is sorted by name.
///
/// The message counts all and shows the first 20 of each kind.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct TensorProblems {
    /// The source as a whole: a file or folder.
    pub place: String,
    /// Names of tensors that are not there.
    pub missing: Vec<String>,
    /// Tensors that are there but cannot be had: name and reason.
    pub unreadable: Vec<(String, String)>,
    /// Tensors that nothing expects: name and file.
    pub extra: Vec<(String, String)>,
    /// Tensors of another shape.
    pub misshapen: Vec<Misshapen>,
}

/// Compares the tensors of `source` with `expected`, and reports all differences in one error. Weights are
/// floating-point numbers, plain or quantised, so a tensor of integers counts as unreadable.
///
/// `place` gives the file of a tensor for the message ([`Checkpoint::place`](crate::Checkpoint::place)).
/// Tensors whose name begins with one of `ignore` may be there without being expected.
///
/// # Errors
/// [`Error::Problems`].
pub fn check_tensors<W: WeightSource + ?Sized>(
    source: &W,
    place: &dyn Fn(&str) -> String,
    expected: &[ExpectedTensor],
    ignore: &[&str],
) -> Result<()> {
    let mut problems = TensorProblems::default();
    for want in expected {
        match source.info(&want.name) {
            Some(info)
                if info.shape == want.shape && (info.dtype.is_float() || info.dtype.is_quantised()) => {}
            Some(info) if info.shape == want.shape => {
                let (name, dtype, file) = (shown(&want.name), info.dtype, place(&want.name));
                let reason = format!(
                    "`{name}` has the type {dtype}, expected F32, F16, BF16 or a quantised one, in {file}"
                );
                problems.unreadable.push((want.name.clone(), reason));
            }
            Some(info) => problems.misshapen.push(Misshapen {
                name: want.name.clone(),
                wanted: want.shape.clone(),
                found: info.shape,
                place: place(&want.name),
            }),
            // A tensor of an unsupported type is not listed either; its error says so.
            None => match source.tensor(&want.name) {
                Err(pocketglm_tensor::Error::Missing { .. }) if want.optional => {}
                Err(e) if !matches!(e, pocketglm_tensor::Error::Missing { .. }) => {
                    problems.unreadable.push((want.name.clone(), e.to_string()));
                }
                _ => problems.missing.push(want.name.clone()),
            },
        }
    }
    let known: HashSet<&str> = expected.iter().map(|e| e.name.as_str()).collect();
    for info in source.tensors() {
        let ignored = ignore.iter().any(|prefix| info.name.starts_with(prefix));
        if !ignored && !known.contains(info.name.as_str()) {
            problems.extra.push((info.name.clone(), place(&info.name)));
        }
    }
    if problems.is_empty() {
        return Ok(());
    }
    problems.place = place_of(source);
    problems.missing.sort();
    problems.unreadable.sort();
    problems.extra.sort();
    problems.misshapen.sort_by(|a, b| a.name.cmp(&b.name));
    Err(Error::Problems(Box::new(problems)))
}

impl TensorProblems {
    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.missing.is_empty()
            && self.unreadable.is_empty()
            && self.extra.is_empty()
            && self.misshapen.is_empty()
    }
}

impl fmt::Display for TensorProblems {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "{}: tensors are not those expected: {} missing, {} unreadable, {} extra, {} of another shape",
            self.place,
            self.missing.len(),
            self.unreadable.len(),
            self.extra.len(),
            self.misshapen.len()
        )?;
        list(f, &self.missing, |f, name| write!(f, "missing `{name}`"))?;
        list(f, &self.unreadable, |f, (_, reason)| f.write_str(reason))?;
        list(f, &self.extra, |f, (name, place)| write!(f, "extra `{}` in {place}", shown(name)))?;
        list(f, &self.misshapen, |f, t| {
            write!(f, "`{}` has shape {:?}, expected {:?}, in {}", t.name, t.found, t.wanted, t.place)
        })
    }
}

/// Writes the first 20 of a list, one a line.
fn list<T>(
    f: &mut fmt::Formatter<'_>,
    all: &[T],
    line: impl Fn(&mut fmt::Formatter<'_>, &T) -> fmt::Result,
) -> fmt::Result {
    const MOST: usize = 20;
    for one in all.iter().take(MOST) {
        f.write_str("\n  ")?;
        line(f, one)?;
    }
    if all.len() > MOST {
        write!(f, "\n  ... and {} more", all.len() - MOST)?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::test_support::Memory;

    fn expected(name: &str, shape: &[usize], optional: bool) -> ExpectedTensor {
        ExpectedTensor { name: name.into(), shape: shape.to_vec(), optional }
    }

    fn file(_: &str) -> String {
        "a.safetensors".into()
    }

    #[test]
    fn the_expected_tensors_pass_with_optional_ones_absent_and_ignored_ones_present() {
        let source = Memory::with(&["a", "b", "cache.0"]);
        let wanted = [expected("a", &[1], false), expected("b", &[1], true), expected("c", &[9], true)];
        check_tensors(&source, &file, &wanted, &["cache."]).unwrap();
        // The control: without the ignored prefix the same check fails.
        assert!(check_tensors(&source, &file, &wanted, &[]).is_err());
    }

    #[test]
    fn one_error_lists_every_difference_sorted() {
        let source = Memory::with(&["x", "b", "a", "o"]).unreadable("u");
        let wanted = [
            expected("n", &[1], false),
            expected("m", &[1], false),
            expected("b", &[2, 3], false),
            expected("a", &[4], false),
            expected("o", &[5], true),
            expected("u", &[1], true),
        ];
        let error = check_tensors(&source, &file, &wanted, &[]).unwrap_err();
        assert_eq!(
            error.to_string(),
            "memory: tensors are not those expected: 2 missing, 1 unreadable, 1 extra, 3 of another shape\n  \
             missing `m`\n  missing `n`\n  \
             tensor `u` in memory: unreadable on purpose\n  \
             extra `x` in a.safetensors\n  \
             `a` has shape [1], expected [4], in a.safetensors\n  \
             `b` has shape [1], expected [2, 3], in a.safetensors\n  \
             `o` has shape [1], expected [5], in a.safetensors"
        );
    }

    #[test]
    fn long_lists_show_twenty_and_count_all() {
        let wanted: Vec<_> = (0..1000).map(|i| expected(&format!("t{i:04}"), &[1], false)).collect();
        let error = check_tensors(&Memory::with(&[]), &file, &wanted, &[]).unwrap_err();
        let Error::Problems(problems) = &error else { panic!("{error}") };
        assert_eq!(problems.missing.len(), 1000);
        let text = error.to_string();
        assert_eq!(text.lines().count(), 1 + 20 + 1);
        assert!(text.contains("1000 missing") && text.ends_with("... and 980 more"));
    }
}
