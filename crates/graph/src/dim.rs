//! Symbolic dimensions: polynomials over named sizes, with floor division.

use std::fmt;
use std::ops::{Add, Mul, Sub};

use crate::{Error, Result};

/// A dimension of a shape: a fixed size, or sums, products and floor quotients of named sizes.
///
/// Kept in a canonical form, so equality is equality of the polynomials: `T + P == P + T`.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Dim {
    /// Products and their non-zero factors, sorted by product.
    terms: Vec<(Vec<Atom>, i64)>,
}

/// An indivisible factor.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
enum Atom {
    Symbol(&'static str),
    Quotient(Dim, u32),
}

/// Sizes given to the names of a graph for one run.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Bindings(Vec<(&'static str, usize)>);

impl Bindings {
    /// No names bound.
    pub fn new() -> Bindings {
        Bindings::default()
    }

    /// Binds `name` to `size`, replacing an earlier size.
    pub fn with(mut self, name: &'static str, size: usize) -> Bindings {
        self.set(name, size);
        self
    }

    /// Binds `name` to `size`, replacing an earlier size.
    pub fn set(&mut self, name: &'static str, size: usize) {
        match self.0.iter_mut().find(|(n, _)| *n == name) {
            Some(slot) => slot.1 = size,
            None => self.0.push((name, size)),
        }
    }

    /// The size of `name`.
    pub fn get(&self, name: &str) -> Option<usize> {
        self.0.iter().find(|(n, _)| *n == name).map(|(_, s)| *s)
    }

    /// All names and sizes, in the order they were bound.
    pub fn iter(&self) -> impl Iterator<Item = (&'static str, usize)> + '_ {
        self.0.iter().copied()
    }
}

impl Dim {
    /// A named size.
    pub fn symbol(name: &'static str) -> Dim {
        Dim { terms: vec![(vec![Atom::Symbol(name)], 1)] }
    }

    /// A fixed size.
    pub fn fixed(size: usize) -> Dim {
        // A size above i64::MAX cannot be a length of anything in memory.
        Dim::from_terms(vec![(Vec::new(), i64::try_from(size).unwrap_or(i64::MAX))])
    }

    /// `floor(self / divisor)`; exact where every factor is divisible. A divisor of 0 counts as 1.
    pub fn div(&self, divisor: u32) -> Dim {
        let divisor = divisor.max(1);
        let d = i64::from(divisor);
        if self.terms.iter().all(|(_, c)| c % d == 0) {
            return Dim { terms: self.terms.iter().map(|(a, c)| (a.clone(), c / d)).collect() };
        }
        Dim { terms: vec![(vec![Atom::Quotient(self.clone(), divisor)], 1)] }
    }

    /// The size, where it does not depend on a name.
    pub fn as_fixed(&self) -> Option<usize> {
        match self.terms.as_slice() {
            [] => Some(0),
            [(atoms, c)] if atoms.is_empty() => usize::try_from(*c).ok(),
            _ => None,
        }
    }

    /// The size under `bindings`.
    ///
    /// # Errors
    /// [`Error::Unbound`] for a name without a size, [`Error::DimRange`] where the value is negative or overflows.
    pub fn eval(&self, bindings: &Bindings) -> Result<usize> {
        usize::try_from(self.eval_signed(bindings)?)
            .map_err(|_| Error::DimRange { dim: self.to_string(), bindings: format!("{bindings:?}") })
    }

    fn eval_signed(&self, bindings: &Bindings) -> Result<i64> {
        let range = || Error::DimRange { dim: self.to_string(), bindings: format!("{bindings:?}") };
        let mut sum = 0i64;
        for (atoms, factor) in &self.terms {
            let mut product = *factor;
            for atom in atoms {
                let value = match atom {
                    Atom::Symbol(name) => {
                        let size = bindings.get(name).ok_or(Error::Unbound { name })?;
                        i64::try_from(size).map_err(|_| range())?
                    }
                    Atom::Quotient(dim, divisor) => {
                        dim.eval_signed(bindings)?.div_euclid(i64::from(*divisor))
                    }
                };
                product = product.checked_mul(value).ok_or_else(range)?;
            }
            sum = sum.checked_add(product).ok_or_else(range)?;
        }
        Ok(sum)
    }

    /// Adds the names that this size depends on to `names`.
    pub(crate) fn symbols(&self, names: &mut Vec<&'static str>) {
        for atom in self.terms.iter().flat_map(|(atoms, _)| atoms) {
            match atom {
                Atom::Symbol(name) if names.contains(name) => {}
                Atom::Symbol(name) => names.push(name),
                Atom::Quotient(dim, _) => dim.symbols(names),
            }
        }
    }

    fn from_terms(mut terms: Vec<(Vec<Atom>, i64)>) -> Dim {
        for (atoms, _) in &mut terms {
            atoms.sort();
        }
        terms.sort();
        let mut merged: Vec<(Vec<Atom>, i64)> = Vec::with_capacity(terms.len());
        for (atoms, factor) in terms {
            match merged.last_mut() {
                Some(last) if last.0 == atoms => last.1 = last.1.saturating_add(factor),
                _ => merged.push((atoms, factor)),
            }
        }
        merged.retain(|(_, factor)| *factor != 0);
        Dim { terms: merged }
    }
}

/// The product of all dimensions.
pub fn product(shape: &[Dim]) -> Dim {
    shape.iter().fold(Dim::fixed(1), |p, d| p * d.clone())
}

/// The sizes of a shape under `bindings`.
///
/// # Errors
/// As [`Dim::eval`].
pub fn eval_shape(shape: &[Dim], bindings: &Bindings) -> Result<Vec<usize>> {
    shape.iter().map(|d| d.eval(bindings)).collect()
}

impl From<usize> for Dim {
    fn from(size: usize) -> Dim {
        Dim::fixed(size)
    }
}

impl Add for Dim {
    type Output = Dim;
    fn add(self, other: Dim) -> Dim {
        Dim::from_terms(self.terms.into_iter().chain(other.terms).collect())
    }
}

impl Sub for Dim {
    type Output = Dim;
    fn sub(self, other: Dim) -> Dim {
        let negated = other.terms.into_iter().map(|(a, c)| (a, c.saturating_neg()));
        Dim::from_terms(self.terms.into_iter().chain(negated).collect())
    }
}

impl Mul for Dim {
    type Output = Dim;
    fn mul(self, other: Dim) -> Dim {
        let mut terms = Vec::with_capacity(self.terms.len() * other.terms.len());
        for (a, c) in &self.terms {
            for (b, d) in &other.terms {
                terms.push((a.iter().chain(b).cloned().collect(), c.saturating_mul(*d)));
            }
        }
        Dim::from_terms(terms)
    }
}

impl fmt::Display for Dim {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.terms.is_empty() {
            return f.write_str("0");
        }
        for (i, (atoms, factor)) in self.terms.iter().rev().enumerate() {
            if i > 0 || *factor < 0 {
                f.write_str(if *factor < 0 { "-" } else { "+" })?;
            }
            let size = factor.unsigned_abs();
            if atoms.is_empty() || size != 1 {
                write!(f, "{size}")?;
            }
            for (j, atom) in atoms.iter().enumerate() {
                if j > 0 || size != 1 {
                    f.write_str("·")?;
                }
                match atom {
                    Atom::Symbol(name) => f.write_str(name)?,
                    Atom::Quotient(dim, divisor) => write!(f, "⌊({dim})/{divisor}⌋")?,
                }
            }
        }
        Ok(())
    }
}

impl fmt::Debug for Dim {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn t() -> Dim {
        Dim::symbol("T")
    }
    fn p() -> Dim {
        Dim::symbol("P")
    }

    #[test]
    fn equal_polynomials_are_equal_dimensions() {
        assert_eq!(t() + p(), p() + t());
        assert_eq!((t() + p()) * Dim::fixed(4), t() * 4.into() + p() * 4.into());
        assert_eq!((t() * 4.into()).div(4), t());
        assert_eq!(t() - t(), Dim::fixed(0));
        assert_ne!(t() * t(), t());
    }

    #[test]
    fn sizes_follow_the_bindings() {
        let b = Bindings::new().with("T", 7).with("P", 10);
        assert_eq!((t() * p() + 3.into()).eval(&b).unwrap(), 73);
        assert_eq!((t() - 10.into()).div(3).eval(&Bindings::new().with("T", 400)).unwrap(), 130);
        assert!(matches!(t().eval(&Bindings::new()), Err(Error::Unbound { name: "T" })));
        assert!(matches!((t() - p()).eval(&b), Err(Error::DimRange { .. })));
        let huge = Bindings::new().with("T", usize::MAX / 2);
        assert!(matches!((t() * t()).eval(&huge), Err(Error::DimRange { .. })));
    }

    #[test]
    fn dimensions_print_as_they_are_read() {
        assert_eq!((t() * 4.into() + p()).to_string(), "4·T+P");
        assert_eq!((t() - 10.into()).div(3).to_string(), "⌊(T-10)/3⌋");
        assert_eq!(Dim::fixed(0).to_string(), "0");
    }
}
