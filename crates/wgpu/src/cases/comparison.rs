//! How results are compared, and how far apart they may be.

use std::fmt;

use pocketglm_graph::Outputs;

/// A named distance.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Bound {
    /// Its name.
    pub name: &'static str,
    /// The largest relative L2 distance.
    pub most: f64,
    /// Why it is not smaller.
    pub reason: &'static str,
}

/// The bounds of all cases.
pub mod bounds {
    use super::Bound;

    /// Values that are moved or compared.
    pub const EXACT: Bound = Bound { name: "exact", most: 0.0, reason: "values are moved, not computed" };
    /// Sums in f32 in another order, and functions within a few units in the last place.
    pub const F32: Bound =
        Bound { name: "f32", most: 1e-5, reason: "f32 sums in another order, functions of a few ulp" };
    /// Scales that are products or minima are rounded to half precision.
    pub const HALF_SCALES: Bound = Bound {
        name: "half scales",
        most: 1e-3,
        reason: "nested scales, and minima, are rounded to f16 (2^-11) when weights come to the device",
    };
    /// The product of two results over such scales, which may be large and differ.
    pub const HALF_SCALES_SWIGLU: Bound = Bound {
        name: "half scales, SwiGLU",
        most: 5e-3,
        reason: "silu(gate) * up multiplies the errors of two results over rounded scales",
    };
    /// A cache in half precision: a value that differs in its last bit may round to the other neighbour.
    pub const KV_F16: Bound =
        Bound { name: "f16 cache", most: 2e-4, reason: "a last bit may round keys and values the other way" };
    /// The same in bytes.
    pub const KV_INT8: Bound = Bound {
        name: "int8 cache",
        most: 4e-3,
        reason: "a last bit of a key or value may round a byte of its head the other way: one of 127 steps",
    };
    /// Scores of queries and keys that both come from such products.
    pub const INT8_ATTENTION: Bound = Bound {
        name: "int8 activations, attention",
        most: 5e-2,
        reason: "errors of queries, keys and values of rounded activations meet",
    };
    /// Activations rounded to bytes for packed products.
    pub const INT8_ACTIVATIONS: Bound = Bound {
        name: "int8 activations",
        most: 1e-2,
        reason: "x is rounded to 127 steps for each 32 values, as the processor's kernels do",
    };
    /// Operands rounded to half precision for cooperative matrices.
    pub const COOPERATIVE: Bound = Bound {
        name: "f16 operands",
        most: 2e-3,
        reason: "cooperative matrices take x and dequantised weights in f16 (2^-11 each), sums in f32",
    };

    /// The same where queries, keys and values come from such products and meet in such products.
    pub const COOPERATIVE_ATTENTION: Bound = Bound {
        name: "f16 operands, attention",
        most: 5e-3,
        reason: "queries, keys, values and probabilities are rounded to f16, and come from products of such operands",
    };

    /// The same over a cache in bytes.
    pub const COOPERATIVE_KV_INT8: Bound = Bound {
        name: "f16 operands, int8 cache",
        most: 1e-2,
        reason: "keys and values are products of f16 operands: many more of them round to the other of 127 steps",
    };

    /// All of them.
    pub const ALL: [Bound; 11] = [
        EXACT,
        F32,
        KV_F16,
        HALF_SCALES,
        COOPERATIVE,
        KV_INT8,
        HALF_SCALES_SWIGLU,
        COOPERATIVE_ATTENTION,
        COOPERATIVE_KV_INT8,
        INT8_ACTIVATIONS,
        INT8_ATTENTION,
    ];

    /// The larger of two.
    pub const fn wider(a: Bound, b: Bound) -> Bound {
        if a.most >= b.most { a } else { b }
    }
}

/// Results that are not what they should be.
#[derive(Clone, Debug, PartialEq)]
pub struct Difference {
    /// The run, from 0.
    pub run: usize,
    /// The result.
    pub output: String,
    /// Relative L2 distance; infinite where sizes, or what is not finite, differ.
    pub distance: f64,
    /// The bound that it exceeds.
    pub bound: Bound,
    /// The element that differs most: index, wanted, found.
    pub worst: (usize, f32, f32),
}

impl fmt::Display for Difference {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (at, wanted, found) = self.worst;
        write!(
            f,
            "run {}, `{}`: relative L2 distance {:.2e}, {} allows {:.0e}; element {at} is {found}, expected {wanted}",
            self.run, self.output, self.distance, self.bound.name, self.bound.most
        )
    }
}

/// Compares the results of all runs; indices must be equal. Gives the largest distance.
///
/// # Errors
/// The first difference.
pub fn compare(wanted: &[Outputs], found: &[Outputs], bound: Bound) -> Result<f64, Difference> {
    let mut largest = 0.0f64;
    let nothing = |run| Difference {
        run,
        output: "all".into(),
        distance: f64::INFINITY,
        bound,
        worst: (0, f32::NAN, f32::NAN),
    };
    if wanted.len() != found.len() || wanted.is_empty() {
        return Err(nothing(found.len()));
    }
    for (run, (wanted, found)) in wanted.iter().zip(found).enumerate() {
        if wanted.0.len() != found.0.len() || wanted.0.is_empty() {
            return Err(nothing(run));
        }
        for ((name, wanted), (other, found)) in wanted.0.iter().zip(&found.0) {
            let same = name == other && wanted.shape == found.shape;
            let distance = if same { relative_l2(&found.values, &wanted.values) } else { f64::INFINITY };
            if distance.is_nan() || distance > bound.most {
                let worst = worst(&wanted.values, &found.values);
                return Err(Difference { run, output: name.clone(), distance, bound, worst });
            }
            largest = largest.max(distance);
        }
    }
    Ok(largest)
}

/// Distance of two vectors divided by the length of the second; infinite where sizes differ, where one has an element that is
/// not finite and the other has not the same there, or where only the second is zero.
pub fn relative_l2(found: &[f32], wanted: &[f32]) -> f64 {
    if found.len() != wanted.len() {
        return f64::INFINITY;
    }
    let (mut difference, mut length) = (0.0f64, 0.0f64);
    for (&f, &w) in found.iter().zip(wanted) {
        if !f.is_finite() || !w.is_finite() {
            if f == w || (f.is_nan() && w.is_nan()) {
                continue;
            }
            return f64::INFINITY;
        }
        difference += (f64::from(f) - f64::from(w)).powi(2);
        length += f64::from(w).powi(2);
    }
    match (difference == 0.0, length == 0.0) {
        (true, _) => 0.0,
        (false, true) => f64::INFINITY,
        (false, false) => (difference / length).sqrt(),
    }
}

fn worst(wanted: &[f32], found: &[f32]) -> (usize, f32, f32) {
    let apart = |(w, f): (f32, f32)| match (w - f).abs() {
        d if d.is_nan() => f32::INFINITY,
        d => d,
    };
    let pairs = wanted.iter().copied().zip(found.iter().copied()).enumerate();
    let most = pairs.max_by(|a, b| apart(a.1).total_cmp(&apart(b.1)));
    most.map_or((0, f32::NAN, f32::NAN), |(i, (w, f))| (i, w, f))
}

#[cfg(test)]
mod tests {
    use super::*;
    use pocketglm_graph::Output;

    fn outputs(values: &[f32]) -> Vec<Outputs> {
        vec![Outputs(vec![("y".into(), Output { shape: vec![values.len()], values: values.to_vec() })])]
    }

    #[test]
    fn one_changed_element_of_many_is_seen() {
        let wanted: Vec<f32> = (0..4096).map(|i| (i as f32).sin()).collect();
        assert_eq!(compare(&outputs(&wanted), &outputs(&wanted), bounds::EXACT), Ok(0.0));
        for (bound, change) in [(bounds::EXACT, 1e-6), (bounds::F32, 1e-2), (bounds::INT8_ACTIVATIONS, 1.0)] {
            let mut found = wanted.clone();
            found[77] += change;
            let difference = compare(&outputs(&wanted), &outputs(&found), bound).unwrap_err();
            assert_eq!(difference.worst.0, 77);
        }
    }

    #[test]
    fn what_is_not_finite_missing_or_not_compared_is_a_difference() {
        let wanted = [1.0, f32::INFINITY, 0.0];
        assert_eq!(relative_l2(&wanted, &wanted), 0.0);
        for found in [[1.0, f32::NAN, 0.0], [1.0, f32::NEG_INFINITY, 0.0], [f32::NAN, f32::INFINITY, 0.0]] {
            assert_eq!(relative_l2(&found, &wanted), f64::INFINITY);
        }
        assert_eq!(relative_l2(&[1.0], &[0.0]), f64::INFINITY);
        assert_eq!(relative_l2(&[0.0], &[0.0, 0.0]), f64::INFINITY);
        assert!(compare(&[], &[], bounds::F32).is_err());
        assert!(compare(&outputs(&[1.0]), &[], bounds::F32).is_err());
    }
}
