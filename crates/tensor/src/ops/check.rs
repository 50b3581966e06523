//! How kernels are compared with their twins: on every instruction set, with one and two threads, with sentinels
//! around the output, and with the same bits whatever the threads.

use crate::{Cpu, Isa, Result};

/// Sizes around the vector widths.
pub(crate) const SIZES: [usize; 12] = [1, 3, 7, 8, 15, 16, 17, 31, 63, 64, 65, 100];

/// Allowed difference: `absolute + relative * |wanted|`.
#[derive(Clone, Copy)]
pub(crate) struct Close {
    pub(crate) relative: f32,
    pub(crate) absolute: f32,
}

/// A few roundings.
pub(crate) const F32: Close = Close { relative: 2e-6, absolute: 1e-6 };

/// Values in -1..1.
pub(crate) fn values(n: usize, seed: u64) -> Vec<f32> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    (0..n)
        .map(|_| {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            (state >> 40) as f32 / (1 << 23) as f32 - 1.0
        })
        .collect()
}

/// Values with every kind of number, for functions of one element.
pub(crate) fn awkward() -> Vec<f32> {
    let mut x = vec![
        0.0,
        -0.0,
        1.0,
        -1.0,
        f32::MIN_POSITIVE,
        1e-40,
        -1e-45,
        f32::MAX,
        f32::MIN,
        f32::INFINITY,
        f32::NEG_INFINITY,
        f32::NAN,
        88.7,
        88.8,
        -87.4,
        -103.0,
        -104.5,
        1e-4,
        -1e-4,
        0.35,
        -0.350_001,
        4.0,
        -4.1,
        20.0,
        -20.0,
    ];
    x.extend(values(500, 3).iter().map(|v| v * 12.0));
    x
}

/// The first difference, if any.
pub(crate) fn compare(got: &[f32], wanted: &[f32], close: Close) -> Result<(), String> {
    if got.len() != wanted.len() {
        return Err(format!("{} elements, wanted {}", got.len(), wanted.len()));
    }
    for (i, (&g, &w)) in got.iter().zip(wanted).enumerate() {
        let same = g == w || g.is_nan() && w.is_nan();
        // A difference with an infinity or a NaN compares false.
        let near = (g - w).abs() <= close.absolute + close.relative * w.abs() && w.is_finite();
        if !same && !near {
            return Err(format!("element {i} of {}: {g:e}, wanted {w:e}", got.len()));
        }
    }
    Ok(())
}

/// An output between sentinels.
struct Guarded(Vec<f32>);

const GUARD: usize = 32;
const SENTINEL: f32 = 12_345.678;

impl Guarded {
    fn new(n: usize) -> Guarded {
        Guarded(vec![SENTINEL; n + 2 * GUARD])
    }

    fn output(&mut self) -> &mut [f32] {
        let end = self.0.len() - GUARD;
        &mut self.0[GUARD..end]
    }

    fn intact(&self) -> Result<(), String> {
        let end = self.0.len() - GUARD;
        match self.0[..GUARD].iter().chain(&self.0[end..]).position(|&v| v != SENTINEL) {
            Some(i) => Err(format!("sentinel {i} was overwritten")),
            None => Ok(()),
        }
    }
}

/// Runs `kernel` in every context and compares with `wanted`.
pub(crate) fn try_check(
    wanted: &[f32],
    close: Close,
    kernel: &dyn Fn(&Cpu, &mut [f32]) -> Result<()>,
) -> Result<(), String> {
    for isa in Isa::available() {
        let mut one_thread: Option<Vec<u32>> = None;
        for threads in [1, 2] {
            let place = |e: String| format!("{isa}, {threads} threads: {e}");
            let cpu = Cpu::with_isa(isa, threads).map_err(|e| e.to_string())?;
            let mut guarded = Guarded::new(wanted.len());
            kernel(&cpu, guarded.output()).map_err(|e| place(e.to_string()))?;
            guarded.intact().map_err(place)?;
            compare(guarded.output(), wanted, close).map_err(place)?;
            let bits: Vec<u32> = guarded.output().iter().map(|v| v.to_bits()).collect();
            match &one_thread {
                None => one_thread = Some(bits),
                Some(first) if *first != bits => return Err(place("other bits than with one thread".into())),
                Some(_) => {}
            }
        }
    }
    Ok(())
}

/// As [`try_check`], with a panic that names the case.
pub(crate) fn check(
    case: &str,
    wanted: &[f32],
    close: Close,
    kernel: &dyn Fn(&Cpu, &mut [f32]) -> Result<()>,
) {
    if let Err(e) = try_check(wanted, close, kernel) {
        panic!("{case}: {e}");
    }
}

#[test]
fn the_checker_finds_a_wrong_element_a_sentinel_and_thread_dependence() {
    let wanted = values(40, 1);
    let right = |_: &Cpu, y: &mut [f32]| {
        y.copy_from_slice(&wanted);
        Ok(())
    };
    assert!(try_check(&wanted, F32, &right).is_ok());
    let wrong = |_: &Cpu, y: &mut [f32]| {
        y.copy_from_slice(&wanted);
        y[39] += 1e-4;
        Ok(())
    };
    assert!(try_check(&wanted, F32, &wrong).unwrap_err().contains("element 39"));
    let nan = |_: &Cpu, y: &mut [f32]| {
        y.copy_from_slice(&wanted);
        y[0] = f32::NAN;
        Ok(())
    };
    assert!(try_check(&wanted, F32, &nan).unwrap_err().contains("element 0"));
    let beyond = |_: &Cpu, y: &mut [f32]| {
        y.copy_from_slice(&wanted);
        // SAFETY: a sentinel lies there.
        unsafe { *y.as_mut_ptr().add(y.len()) = 0.0 };
        Ok(())
    };
    assert!(try_check(&wanted, F32, &beyond).unwrap_err().contains("sentinel"));
    let threads = |cpu: &Cpu, y: &mut [f32]| {
        y.copy_from_slice(&wanted);
        y[0] = if cpu.threads() == 2 { y[0].next_up() } else { y[0] };
        Ok(())
    };
    assert!(try_check(&wanted, F32, &threads).unwrap_err().contains("other bits"));
    assert!(compare(&[f32::MAX], &[f32::INFINITY], F32).is_err());
    assert!(compare(&[1.0], &[1.0, 2.0], F32).is_err());
}
