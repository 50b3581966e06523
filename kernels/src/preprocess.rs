use std::fmt;

use crate::FILES;

/// What is wrong with a kernel's source or definitions. Each is a defect of the project, never of a user's input.
#[non_exhaustive]
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Error {
    /// A file that is not there.
    #[error("there is no kernel file `{name}`")]
    NoFile {
        /// The name asked for.
        name: String,
    },
    /// A line that cannot be read.
    #[error("{file}, line {line}: {what}")]
    Line {
        /// The file.
        file: String,
        /// The line, from 1.
        line: usize,
        /// What is wrong there.
        what: String,
    },
    /// A definition that no line of the file takes.
    #[error("{file} has no `//#if {name}` and no `const {name}`")]
    Unused {
        /// The file.
        file: String,
        /// The definition.
        name: String,
    },
}

/// One kernel: a file and what is defined in it. Its text is its identity.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Variant {
    file: &'static str,
    defines: Vec<(&'static str, String)>,
}

impl Variant {
    /// The kernel of a file, nothing defined.
    pub fn new(file: &'static str) -> Variant {
        Variant { file, defines: Vec::new() }
    }

    /// Defines a name, for `//#if`.
    pub fn flag(self, name: &'static str) -> Variant {
        self.flag_if(true, name)
    }

    /// Defines a name where a condition holds.
    pub fn flag_if(mut self, condition: bool, name: &'static str) -> Variant {
        if condition {
            self.defines.push((name, String::new()));
        }
        self
    }

    /// Gives a `const NAME` of the file this value, an unsigned number.
    pub fn value(mut self, name: &'static str, value: u32) -> Variant {
        self.defines.push((name, format!("{value}u")));
        self
    }

    /// Gives a `const NAME` of the file this value, a number with a fraction.
    pub fn number(mut self, name: &'static str, value: f32) -> Variant {
        self.defines.push((name, format!("{value:?}")));
        self
    }

    /// The file with its flags, and without the numbers that sizes of tensors and of a device give it: what is another kernel and not
    /// the same one with other sizes.
    pub fn kind(&self) -> String {
        let flags = self.defines.iter().filter(|(_, value)| value.is_empty()).map(|(name, _)| *name);
        let mut flags: Vec<&str> = flags.collect();
        flags.sort_unstable();
        let file = self.file.trim_end_matches(".wgsl");
        std::iter::once(file).chain(flags).collect::<Vec<_>>().join(" ")
    }

    /// The file.
    pub fn file(&self) -> &'static str {
        self.file
    }

    /// The source that a device compiles.
    ///
    /// # Errors
    /// A file that is not there, lines that cannot be read, definitions that nothing takes.
    pub fn source(&self) -> Result<String, Error> {
        let mut used = vec![false; self.defines.len()];
        let mut out = String::new();
        self.expand(self.file, &mut used, &mut out, 0)?;
        match used.iter().position(|u| !u) {
            None => Ok(out),
            Some(i) => Err(Error::Unused { file: self.file.into(), name: self.defines[i].0.into() }),
        }
    }

    fn expand(&self, name: &str, used: &mut [bool], out: &mut String, depth: usize) -> Result<(), Error> {
        let text = file(name)?;
        // Whether the lines of each open block are taken.
        let mut open: Vec<bool> = Vec::new();
        let wrong = |line: usize, what: &str| Error::Line { file: name.into(), line, what: what.into() };
        for (number, line) in (1..).zip(text.lines()) {
            let taken = open.iter().all(|&t| t);
            let Some(command) = line.trim_start().strip_prefix("//#") else {
                if taken {
                    self.line(line, used, out);
                }
                continue;
            };
            if let Some(condition) = command.strip_prefix("if ") {
                let (negated, flag) = match condition.trim().strip_prefix('!') {
                    Some(flag) => (true, flag),
                    None => (false, condition.trim()),
                };
                open.push(self.defined(flag, used) != negated);
            } else if command.trim() == "else" {
                let last = open.last_mut().ok_or_else(|| wrong(number, "`else` without `if`"))?;
                *last = !*last;
            } else if command.trim() == "endif" {
                open.pop().ok_or_else(|| wrong(number, "`endif` without `if`"))?;
            } else if let Some(other) = command.strip_prefix("include ") {
                if depth > 4 {
                    return Err(wrong(number, "files include one another too deeply"));
                }
                if taken {
                    self.expand(other.trim().trim_matches('"'), used, out, depth + 1)?;
                }
            } else {
                return Err(wrong(number, "is no command"));
            }
        }
        if open.is_empty() { Ok(()) } else { Err(wrong(text.lines().count(), "`if` without `endif`")) }
    }

    fn defined(&self, flag: &str, used: &mut [bool]) -> bool {
        let found = self.defines.iter().position(|(name, _)| *name == flag);
        found.map(|i| used[i] = true).is_some()
    }

    /// A plain line; a constant gets the value that was defined.
    fn line(&self, line: &str, used: &mut [bool], out: &mut String) {
        let constant = line.strip_prefix("const ").and_then(|rest| rest.split_once(" = "));
        let given = constant.and_then(|(name, _)| {
            self.defines.iter().position(|(n, value)| *n == name && !value.is_empty()).map(|i| (name, i))
        });
        match given {
            Some((name, i)) => {
                used[i] = true;
                out.push_str(&format!("const {name} = {};\n", self.defines[i].1));
            }
            None => {
                out.push_str(line);
                out.push('\n');
            }
        }
    }
}

impl fmt::Display for Variant {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.file.trim_end_matches(".wgsl"))?;
        for (name, value) in &self.defines {
            match value.as_str() {
                "" => write!(f, " {name}")?,
                value => write!(f, " {name}={}", value.trim_end_matches('u'))?,
            }
        }
        Ok(())
    }
}

/// How a kernel uses a buffer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Access {
    /// A few numbers, the same for all.
    Uniform,
    /// Read only.
    Read,
    /// Read and written.
    ReadWrite,
}

/// One buffer that a kernel binds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Binding {
    /// Its number.
    pub number: u32,
    /// How it is used.
    pub access: Access,
}

/// What a source binds, in the order of the numbers.
///
/// # Errors
/// A binding that is none of the three kinds.
pub fn bindings(source: &str) -> Result<Vec<Binding>, Error> {
    let mut found = Vec::new();
    for (number, line) in (1..).zip(source.lines()) {
        let Some((_, rest)) = line.split_once("@binding(") else { continue };
        let wrong =
            || Error::Line { file: "source".into(), line: number, what: format!("cannot read `{line}`") };
        let (binding, rest) = rest.split_once(')').ok_or_else(wrong)?;
        let access = match () {
            () if rest.contains("var<uniform>") => Access::Uniform,
            () if rest.contains("var<storage, read_write>") => Access::ReadWrite,
            () if rest.contains("var<storage, read>") => Access::Read,
            () => return Err(wrong()),
        };
        found.push(Binding { number: binding.trim().parse().map_err(|_| wrong())?, access });
    }
    found.sort_by_key(|b| b.number);
    Ok(found)
}

fn file(name: &str) -> Result<&'static str, Error> {
    FILES
        .iter()
        .find(|(n, _)| *n == name)
        .map(|(_, text)| *text)
        .ok_or_else(|| Error::NoFile { name: name.into() })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_flag_takes_its_lines_and_a_value_replaces_a_constant() {
        let plain = Variant::new("norm.wgsl").source().unwrap();
        assert!(plain.contains("const WG = 64u;") && !plain.contains("var<storage, read_write> other"));
        let other = Variant::new("norm.wgsl").flag("OTHER").flag("LAYER").value("WG", 256).source().unwrap();
        assert!(other.contains("const WG = 256u;") && other.contains("var<storage, read_write> other"));
        assert_eq!(bindings(&plain).unwrap().len() + 1, bindings(&other).unwrap().len());
    }

    #[test]
    fn a_definition_that_nothing_takes_is_an_error() {
        let error = Variant::new("norm.wgsl").flag("LAYRE").source().unwrap_err();
        assert_eq!(error.to_string(), "norm.wgsl has no `//#if LAYRE` and no `const LAYRE`");
        assert!(Variant::new("none.wgsl").source().is_err());
    }

    #[test]
    fn bindings_are_read_from_the_source() {
        let found = bindings(&Variant::new("linear.wgsl").flag("W_F32").source().unwrap()).unwrap();
        let numbers: Vec<u32> = found.iter().map(|b| b.number).collect();
        assert_eq!(numbers, [0, 1, 4, 7]);
        assert_eq!(
            (found[0].access, found[1].access, found[2].access),
            (Access::Uniform, Access::Read, Access::ReadWrite)
        );
    }
}
