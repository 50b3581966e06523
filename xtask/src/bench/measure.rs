//! Rounds, medians, and the figures that are reported.

use std::time::Instant;

use crate::Result;

/// One measured line: a rate and the limit measured beside it, both in 1e9 units a second.
pub struct Line {
    pub name: String,
    pub rate: f64,
    pub limit: f64,
    pub unit: &'static str,
}

impl Line {
    pub fn share(&self) -> f64 {
        100.0 * self.rate / self.limit
    }
}

/// The middle value, or the mean of the two in the middle; 0 of none.
pub fn median(mut values: Vec<f64>) -> f64 {
    values.sort_unstable_by(f64::total_cmp);
    let middle = values.len() / 2;
    match (values.get(middle.wrapping_sub(1)), values.get(middle)) {
        (Some(low), Some(high)) if values.len().is_multiple_of(2) => (low + high) / 2.0,
        (_, Some(value)) => *value,
        _ => 0.0,
    }
}

/// Alternates a limit and a kernel of `work` (in 1e9 units); gives the medians of the kernel's rate and the limit.
pub fn alternate(
    rounds: usize,
    work: f64,
    limit: &dyn Fn() -> f64,
    kernel: &mut dyn FnMut() -> Result<()>,
) -> Result<(f64, f64)> {
    kernel()?;
    let (mut limits, mut rates) = (Vec::new(), Vec::new());
    for _ in 0..rounds {
        limits.push(limit());
        let start = Instant::now();
        kernel()?;
        rates.push(work / start.elapsed().as_secs_f64());
    }
    Ok((median(rates), median(limits)))
}

/// Seconds of the same work on two sides, round by round.
#[derive(Clone, Debug, Default)]
pub struct Sides {
    pub ours: Vec<f64>,
    pub theirs: Vec<f64>,
}

impl Sides {
    /// Adds what a round took on one side.
    pub fn push(&mut self, ours: bool, seconds: f64) {
        if ours { self.ours.push(seconds) } else { self.theirs.push(seconds) }
    }

    /// How much faster we are: the peer's median over ours.
    pub fn ratio(&self) -> f64 {
        median(self.theirs.clone()) / median(self.ours.clone())
    }

    /// The same by round: median, smallest, largest.
    pub fn by_round(&self) -> [f64; 3] {
        let ratios: Vec<f64> = self.theirs.iter().zip(&self.ours).map(|(t, o)| t / o).collect();
        let extreme = |pick: fn(f64, f64) -> f64| ratios.iter().copied().reduce(pick).unwrap_or(0.0);
        [median(ratios.clone()), extreme(f64::min), extreme(f64::max)]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_median_is_the_middle_of_the_sorted_values() {
        assert_eq!(median(vec![3.0, 1.0, 2.0]), 2.0);
        assert_eq!(median(vec![4.0, 1.0, 2.0, 9.0]), 3.0);
        assert_eq!(median(vec![]), 0.0);
    }

    #[test]
    fn a_machine_that_slows_down_changes_the_medians_but_not_the_ratios_by_round() {
        let sides = Sides { ours: vec![1.0, 2.0, 4.0], theirs: vec![2.0, 4.0, 8.0] };
        assert_eq!((sides.ratio(), sides.by_round()), (2.0, [2.0, 2.0, 2.0]));
        // One disturbed round of the peer moves neither median.
        let sides = Sides { ours: vec![1.0, 1.0, 1.0], theirs: vec![2.0, 9.0, 2.0] };
        assert_eq!((sides.ratio(), sides.by_round()), (2.0, [2.0, 2.0, 9.0]));
    }
}
