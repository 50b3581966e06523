//! What benchmarks feed to kernels. Shared by this crate's benchmarks and by `cargo xtask bench`.

use pocketglm_tensor::{Cpu, Packed, PackedFormat, Result, RowCodes, ScaleKind, ZeroKind};

/// The next number of a linear congruential generator (Numerical Recipes); its high bits are the random ones.
fn next(state: &mut u32) -> u32 {
    *state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
    *state
}

/// Values in -1..1 that no cache or predictor likes.
pub fn values(n: usize) -> Vec<f32> {
    let mut state = 1;
    (0..n).map(|_| (next(&mut state) >> 8) as f32 / (1 << 23) as f32 - 1.0).collect()
}

/// A packed matrix `[n, k]` of random codes. Scales repeat, since no kernel's speed depends on them.
pub fn packed(cpu: &Cpu, format: PackedFormat, n: usize, k: usize) -> Result<Packed> {
    let group = if format.group == 0 { k } else { format.group };
    let nested = format.scale == ScaleKind::Nested;
    let halves = if nested { k / 256 } else { k / group };
    let minima = format.zero == ZeroKind::Minima;
    let row = |i: usize, row: &mut RowCodes| {
        let mut state = i as u32;
        row.codes.clear();
        row.codes.extend((0..k).map(|_| (next(&mut state) >> 20) as u8 & ((1u16 << format.bits) - 1) as u8));
        row.scales = vec![0x2000; halves];
        row.minima = vec![0x2000; if minima { halves } else { 0 }];
        row.sub_scales = vec![3; if nested { k / group } else { 0 }];
        let bytes = nested && minima || format.zero == ZeroKind::Codes;
        row.sub_minima = vec![3; if bytes { k / group } else { 0 }];
        Ok(())
    };
    Packed::pack(cpu, format, n, k, &row)
}
