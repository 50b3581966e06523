//! Helpers of token sampling over one row of logits `x: [v]`.

use crate::{Error, Result};

/// No element may be NaN: an order with it would depend on how we compare.
fn no_nan(op: &'static str, x: &[f32]) -> Result<()> {
    match x.iter().position(|v| v.is_nan()) {
        Some(i) => Err(Error::Value { op, what: format!("element {i} of {} is not a number", x.len()) }),
        None => Ok(()),
    }
}

/// Index of the first largest element.
///
/// # Errors
/// [`Error::Value`] where there is no element or one is NaN.
pub fn argmax(x: &[f32]) -> Result<usize> {
    const OP: &str = "argmax";
    no_nan(OP, x)?;
    let first = *x.first().ok_or_else(|| Error::Value { op: OP, what: "no element".into() })?;
    // Two simple passes vectorise; one pass that carries an index does not.
    let max = x.iter().fold(first, |m, &v| if v > m { v } else { m });
    Ok(x.iter().position(|&v| v == max).unwrap_or(0))
}

/// Indices of the `n` largest elements, the largest first, equal ones in the order of their indices.
///
/// # Errors
/// [`Error::Value`] where an element is NaN.
pub fn top_k(x: &[f32], n: usize) -> Result<Vec<usize>> {
    no_nan("top_k", x)?;
    let mut order: Vec<usize> = (0..x.len()).collect();
    // Zeros of both signs are equal to `partial_cmp`, so their order is that of their indices.
    let before =
        |a: &usize, b: &usize| x[*b].partial_cmp(&x[*a]).unwrap_or(std::cmp::Ordering::Equal).then(a.cmp(b));
    if n < order.len() && n > 0 {
        order.select_nth_unstable_by(n - 1, before);
    }
    order.truncate(n);
    order.sort_unstable_by(before);
    Ok(order)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn argmax_is_the_first_of_equals() {
        assert_eq!(argmax(&[-1.0, 3.0, 2.0, 3.0]).unwrap(), 1);
        assert_eq!(argmax(&[f32::NEG_INFINITY; 3]).unwrap(), 0);
        assert_eq!(argmax(&[0.0, -0.0]).unwrap(), 0);
        let mut long = vec![0.5f32; 1000];
        long[777] = f32::INFINITY;
        assert_eq!(argmax(&long).unwrap(), 777);
    }

    #[test]
    fn a_nan_is_an_error_that_names_its_place() {
        let error = argmax(&[1.0, f32::NAN, 2.0]).unwrap_err();
        assert_eq!(error.to_string(), "argmax: element 1 of 3 is not a number");
        assert!(top_k(&[f32::NAN], 1).is_err());
        assert!(argmax(&[]).is_err());
    }

    #[test]
    fn top_k_orders_by_value_then_index() {
        let x = [1.0, 5.0, 3.0, 5.0, -2.0];
        assert_eq!(top_k(&x, 3).unwrap(), [1, 3, 2]);
        assert_eq!(top_k(&x, 9).unwrap(), [1, 3, 2, 0, 4]);
        assert!(top_k(&x, 0).unwrap().is_empty());
        let all = top_k(&[2.0; 40], 17).unwrap();
        assert_eq!(all, (0..17).collect::<Vec<_>>());
    }
}
