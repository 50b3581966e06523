//! Symbolic dimensions: polynomials over named sizes, with floor division.

use std::fmt;
use std::ops::{Add, Mul, Sub};
use std::sync::Arc;

use crate::{Error, Result};

/// A dimension of a shape: a fixed size, or sums, products and floor quotients of named sizes.
///
/// Kept in a canonical form, so equality is equality of the polynomials: `T + P == P + T`. A graph of many layers has
/// thousands of them, and a copy costs no memory.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Dim {
    /// What depends on no name.
    constant: i64,
    /// Products of names and their non-zero factors, sorted by product; `None` where there are none.
    terms: Option<Arc<[Term]>>,
}

/// Names that are multiplied, sorted, and a factor.
type Term = (Vec<Atom>, i64);

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
        Dim::from_terms(0, vec![(vec![Atom::Symbol(name)], 1)])
    }

    /// A fixed size.
    pub fn fixed(size: usize) -> Dim {
        // A size above i64::MAX cannot be a length of anything in memory.
        Dim { constant: i64::try_from(size).unwrap_or(i64::MAX), terms: None }
    }

    /// `floor(self / divisor)`; exact where every factor is divisible. A divisor of 0 counts as 1.
    pub fn div(&self, divisor: u32) -> Dim {
        let divisor = divisor.max(1);
        let d = i64::from(divisor);
        if self.constant % d == 0 && self.terms().iter().all(|(_, c)| c % d == 0) {
            let terms = self.terms().iter().map(|(a, c)| (a.clone(), c / d)).collect();
            return Dim::from_terms(self.constant / d, terms);
        }
        Dim::from_terms(0, vec![(vec![Atom::Quotient(self.clone(), divisor)], 1)])
    }

    /// The size, where it does not depend on a name.
    pub fn as_fixed(&self) -> Option<usize> {
        match self.terms {
            None => usize::try_from(self.constant).ok(),
            Some(_) => None,
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
        let mut sum = self.constant;
        for (atoms, factor) in self.terms() {
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
        for atom in self.terms().iter().flat_map(|(atoms, _)| atoms) {
            match atom {
                Atom::Symbol(name) if names.contains(name) => {}
                Atom::Symbol(name) => names.push(name),
                Atom::Quotient(dim, _) => dim.symbols(names),
            }
        }
    }

    fn terms(&self) -> &[Term] {
        self.terms.as_deref().unwrap_or_default()
    }

    /// Sorts and adds up products of at least one name each.
    fn from_terms(constant: i64, mut terms: Vec<Term>) -> Dim {
        for (atoms, _) in &mut terms {
            atoms.sort();
        }
        terms.sort();
        let mut merged: Vec<Term> = Vec::with_capacity(terms.len());
        for (atoms, factor) in terms {
            match merged.last_mut() {
                Some(last) if last.0 == atoms => last.1 = last.1.saturating_add(factor),
                _ => merged.push((atoms, factor)),
            }
        }
        merged.retain(|(_, factor)| *factor != 0);
        Dim { constant, terms: (!merged.is_empty()).then(|| merged.into()) }
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
        let constant = self.constant.saturating_add(other.constant);
        match (&self.terms, &other.terms) {
            (_, None) => Dim { constant, ..self },
            (None, _) => Dim { constant, ..other },
            _ => Dim::from_terms(constant, [self.terms(), other.terms()].concat()),
        }
    }
}

impl Sub for Dim {
    type Output = Dim;
    fn sub(self, other: Dim) -> Dim {
        let terms = other.terms().iter().map(|(a, c)| (a.clone(), c.saturating_neg())).collect();
        self.add(Dim::from_terms(other.constant.saturating_neg(), terms))
    }
}

impl Mul for Dim {
    type Output = Dim;
    fn mul(self, other: Dim) -> Dim {
        let constant = self.constant.saturating_mul(other.constant);
        match (&self.terms, &other.terms) {
            (None, None) => return Dim { constant, terms: None },
            (None, _) if self.constant == 1 => return other,
            (_, None) if other.constant == 1 => return self,
            _ => {}
        }
        let times = |dim: &Dim, factor: i64| -> Vec<Term> {
            dim.terms().iter().map(|(a, c)| (a.clone(), c.saturating_mul(factor))).collect()
        };
        let mut terms = times(&self, other.constant);
        terms.extend(times(&other, self.constant));
        for (a, c) in self.terms() {
            for (b, d) in other.terms() {
                terms.push((a.iter().chain(b).cloned().collect(), c.saturating_mul(*d)));
            }
        }
        Dim::from_terms(constant, terms)
    }
}

impl fmt::Display for Dim {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if *self == Dim::fixed(0) {
            return f.write_str("0");
        }
        let constant = (Vec::new(), self.constant);
        let fixed = (self.constant != 0).then_some(&constant);
        for (i, (atoms, factor)) in self.terms().iter().rev().chain(fixed).enumerate() {
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
        assert_eq!((t() + 1.into()) * (t() - 1.into()), t() * t() - 1.into());
        assert_eq!((Dim::fixed(3) - t()) * 0.into(), Dim::fixed(0));
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
        assert_eq!((Dim::fixed(2) - t()).to_string(), "-T+2");
        assert_eq!((Dim::fixed(2) - 5.into()).to_string(), "-3");
        assert_eq!(Dim::fixed(0).to_string(), "0");
    }
}
