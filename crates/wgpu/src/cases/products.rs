//! Products with weights of every format, with all that is fused into them; products of two values.

use pocketglm_graph::ops::UnaryKind;
use pocketglm_graph::{Dim, GraphBuilder, Result, Value};
use pocketglm_tensor::{Affine, Block, DType};

use super::comparison::Bound;
use super::comparison::bounds::{F32, HALF_SCALES, HALF_SCALES_SWIGLU, INT8_ACTIVATIONS, wider};
use super::draft::{About, Draft, Fill};
use super::{Case, Feature};

/// Every type that a weight matrix may have.
pub(super) fn formats() -> impl Iterator<Item = DType> {
    let blocks = Block::ALL.into_iter().map(DType::Block);
    let affine = Affine::all().map(DType::Affine);
    [DType::F32, DType::F16, DType::BF16].into_iter().chain(blocks).chain(affine)
}

/// Columns that rows of a type may have: whole blocks and, where the type has them, rows that end short.
pub(super) fn widths(dtype: DType) -> Vec<usize> {
    match dtype {
        DType::Block(b) if b.layout().0 == 256 => vec![256, 768],
        DType::Block(_) => vec![32, 96],
        _ => vec![33, 100, 256],
    }
}

/// Whether a format's scales, and minima where it has them, are what the device keeps.
pub(super) fn scales_bound(dtype: DType) -> Bound {
    let exact = match dtype {
        DType::Block(b) => b.layout().0 == 32,
        DType::Affine(a) => a.symmetric(),
        _ => true,
    };
    if exact { F32 } else { HALF_SCALES }
}

fn form(dtype: DType, [m, n, k]: [usize; 3], extra: &str) -> String {
    format!("{dtype}, {m} rows of {k} to {n}{extra}")
}

pub(super) fn cases(list: &mut Vec<Case>) -> Result<()> {
    for dtype in formats() {
        every_kernel(list, dtype)?;
    }
    epilogues(list)?;
    norms(list)?;
    parts(list)?;
    large(list)?;
    batches(list)
}

/// A row, a few rows and a tile of rows against a matrix, for each width.
fn every_kernel(list: &mut Vec<Case>, dtype: DType) -> Result<()> {
    let bound = scales_bound(dtype);
    for k in widths(dtype) {
        let n = 70;
        let mut one = |m: usize, fill: Fill, bound: Bound| -> Result<()> {
            let about =
                About::new("linear", form(dtype, [m, n, k], &format!(", {} values", fill.name())), bound);
            list.push(about.filled(fill).build(|d, g| {
                let x = d.x(g, "x", &[m, k])?;
                d.linear(g, "l", dtype, x, [n, k], false)
            })?);
            Ok(())
        };
        // Whole numbers lose nothing as bytes, so what is left is the kernel's own.
        one(1, Fill::Codes, bound)?;
        one(1, Fill::Spread, if dtype.is_quantised() { INT8_ACTIVATIONS } else { bound })?;
        one(3, Fill::Spread, bound)?;
        one(35, Fill::Spread, bound)?;
        // More than the smallest tile on cooperative matrices.
        one(70, Fill::Spread, bound)?;
    }
    Ok(())
}

/// Biases, activations, residuals.
fn epilogues(list: &mut Vec<Case>) -> Result<()> {
    let q4 = DType::Block(Block::Q4_0);
    for (dtype, m, n, k) in [
        (DType::F32, 1, 70, 64),
        (DType::F32, 66, 70, 36),
        (DType::F32, 5, 33, 33),
        (DType::F16, 40, 66, 40),
        (DType::F16, 5, 33, 33),
        (DType::F16, 70, 66, 40),
        (DType::BF16, 40, 66, 40),
        (DType::BF16, 70, 66, 40),
        // Too few rows for cooperative matrices.
        (DType::F16, 5, 66, 40),
        (DType::BF16, 5, 66, 40),
        (DType::BF16, 5, 33, 33),
        (q4, 1, 70, 64),
        (q4, 34, 70, 96),
        (q4, 70, 70, 96),
    ] {
        for kind in [None, Some(UnaryKind::Silu), Some(UnaryKind::Gelu), Some(UnaryKind::Relu)] {
            for (bias, residual) in [(true, false), (true, true), (false, true)] {
                let extra = format!(
                    ", {kind:?}{}{}",
                    if bias { ", bias" } else { "" },
                    if residual { ", residual" } else { "" }
                );
                let rounds = dtype.is_quantised() && m == 1;
                let about = About::new(
                    "linear",
                    form(dtype, [m, n, k], &extra),
                    if rounds { INT8_ACTIVATIONS } else { F32 },
                );
                let ops: &[&str] = match (kind.is_some(), residual) {
                    (true, false) => &["linear_act"],
                    (false, true) => &["linear_add"],
                    _ => &[],
                };
                list.push(about.fused(ops).build(|d, g| {
                    let x = d.x(g, "x", &[m, k])?;
                    let y = d.linear(g, "l", dtype, x, [n, k], bias)?;
                    let y = kind.map_or(Ok(y), |kind| g.unary(kind, y))?;
                    if !residual {
                        return Ok(y);
                    }
                    let r = d.x_of(g, "r", &[m, n], Fill::Negative)?;
                    g.add(r, y)
                })?);
            }
        }
    }
    for (m, n, k) in [(1, 35, 64), (3, 35, 64), (35, 66, 64), (70, 66, 64), (1, 9, 33), (5, 66, 33)] {
        for dtype in [DType::F32, DType::BF16, q4, DType::Block(Block::Q8_0)] {
            if dtype.is_quantised() && k % 32 != 0 {
                continue;
            }
            for fill in [Fill::Spread, Fill::Negative] {
                let rounds = dtype.is_quantised() && m == 1;
                let extra = format!(", {} values", fill.name());
                let bound = if rounds { wider(INT8_ACTIVATIONS, F32) } else { F32 };
                let about = About::new("linear_swiglu", form(dtype, [m, n, k], &extra), bound);
                list.push(about.filled(fill).fused(&["linear_swiglu"]).build(|d, g| {
                    let x = d.x(g, "x", &[m, k])?;
                    swiglu(d, g, dtype, x, [n, k])
                })?);
            }
        }
    }
    Ok(())
}

fn swiglu(d: &Draft, g: &mut GraphBuilder<'_>, dtype: DType, x: Value, [n, k]: [usize; 2]) -> Result<Value> {
    let both = d.linear(g, "gate_up", dtype, x, [2 * n, k], false)?;
    let gate = g.slice(both, 1, 0, n)?;
    let up = g.slice(both, 1, n, n)?;
    let gate = g.silu(gate)?;
    g.mul(gate, up)
}

/// Norms in front, one and two.
fn norms(list: &mut Vec<Case>) -> Result<()> {
    let q8 = DType::Block(Block::Q8_0);
    for dtype in [DType::F32, DType::F16, DType::BF16, q8, DType::Block(Block::Q4_K)] {
        for m in [1, 5, 34, 70] {
            let (n, k) = (66, if matches!(dtype, DType::F16 | DType::BF16) { 68 } else { 256 });
            let bound = match (dtype.is_quantised(), m) {
                (true, 1) => INT8_ACTIVATIONS,
                _ => scales_bound(dtype),
            };
            for (layer, bias) in [(false, true), (false, false), (true, true)] {
                let extra = match (layer, bias) {
                    (true, _) => " behind a layer norm",
                    (false, true) => " behind an RMS norm",
                    (false, false) => " behind an RMS norm, no bias",
                };
                let about = About::new("norm_linear", form(dtype, [m, n, k], extra), bound);
                list.push(about.fused(&["norm_linear"]).build(|d, g| {
                    let x = d.x(g, "x", &[m, k])?;
                    let x = if layer {
                        d.vector("n.weight", k, Fill::Positive)?;
                        d.vector("n.bias", k, Fill::Spread)?;
                        g.layer_norm("n", x, 1e-5)?
                    } else {
                        d.rms(g, "n", x, k)?
                    };
                    d.linear(g, "l", dtype, x, [n, k], bias)
                })?);
            }
            for (gated, fused) in [(true, "norm_linear_swiglu"), (false, "norm_linear")] {
                let extra = if gated { ", gate and up" } else { ", no bias" };
                let bound = if gated && bound == HALF_SCALES { HALF_SCALES_SWIGLU } else { bound };
                let what = format!(" behind a sum and two norms{extra}");
                let about = About::new("norm_linear", form(dtype, [m, n, k], &what), bound);
                list.push(about.fused(&["norm_add", fused]).build(|d, g| {
                    let x = d.x(g, "x", &[m, k])?;
                    // Where all values have one sign, steps and minima of the weights nearly cancel.
                    let y = d.x_of(g, "y", &[m, k], if gated { Fill::Negative } else { Fill::Spread })?;
                    let y = d.rms(g, "inner", y, k)?;
                    let h = g.add(x, y)?;
                    let normed = d.rms(g, "outer", h, k)?;
                    let y = match gated {
                        true => swiglu(d, g, dtype, normed, [n, k])?,
                        false => d.linear(g, "l", dtype, normed, [n, k], false)?,
                    };
                    let h = g.scale(h, 0.5)?;
                    g.output("h", h);
                    Ok(y)
                })?);
            }
        }
    }
    Ok(())
}

/// Rows in front of a product that begin at an element that is no multiple of four.
fn parts(list: &mut Vec<Case>) -> Result<()> {
    for dtype in [DType::F32, DType::Block(Block::Q5_1)] {
        for m in [1, 6] {
            let about = About::new(
                "linear",
                form(dtype, [m, 35, 32], " that begin at an odd element"),
                if dtype.is_quantised() && m == 1 { INT8_ACTIVATIONS } else { F32 },
            );
            list.push(about.build(|d, g| {
                let x = d.x(g, "x", &[1 + m * 32])?;
                let x = g.slice(x, 0, 1, m * 32)?;
                let x = g.reshape(x, &[m.into(), 32.into()])?;
                d.linear(g, "l", dtype, x, [35, 32], false)
            })?);
        }
    }
    Ok(())
}

/// Matrices that a small binding does not hold, and rows that workgroup memory does not.
fn large(list: &mut Vec<Case>) -> Result<()> {
    for (dtype, n, k) in [
        (DType::F32, 301, 256),
        (DType::F16, 601, 256),
        (DType::Block(Block::Q8_0), 1101, 256),
        (DType::Block(Block::Q4_1), 4301, 128),
    ] {
        for m in [1, 3, 33] {
            let rounds = dtype.is_quantised() && m == 1;
            let bound = if rounds { INT8_ACTIVATIONS } else { F32 };
            let about = About::new("linear", form(dtype, [m, n, k], ", bias, residual"), bound);
            list.push(about.build(|d, g| {
                let x = d.x(g, "x", &[m, k])?;
                let y = d.linear(g, "l", dtype, x, [n, k], true)?;
                let r = d.x_of(g, "r", &[m, n], Fill::Spread)?;
                g.add(r, y)
            })?);
            let about = About::new("linear_swiglu", form(dtype, [m, n / 2, k], ""), bound);
            list.push(about.fused(&["linear_swiglu"]).build(|d, g| {
                let x = d.x(g, "x", &[m, k])?;
                swiglu(d, g, dtype, x, [n / 2, k])
            })?);
            let about = About::new("norm_linear", form(dtype, [m, n, k], ", bias"), bound);
            list.push(about.fused(&["norm_linear"]).build(|d, g| {
                let x = d.x(g, "x", &[m, k])?;
                let x = d.rms(g, "n", x, k)?;
                d.linear(g, "l", dtype, x, [n, k], true)
            })?);
        }
    }
    // So many tiles that cooperative matrices take the largest ones.
    for (dtype, bias) in [(DType::Block(Block::Q4_0), false), (DType::F16, true)] {
        let extra = if bias { ", bias" } else { "" };
        let about = About::new("linear", form(dtype, [256, 8700, 32], extra), F32);
        list.push(about.build(|d, g| {
            let x = d.x(g, "x", &[256, 32])?;
            d.linear(g, "l", dtype, x, [8700, 32], bias)
        })?);
    }
    for norm in [false, true] {
        for (dtype, k) in [(DType::F32, 8224), (DType::F16, 8228), (DType::Block(Block::Q4_0), 27_232)] {
            let bound = if dtype.is_quantised() { INT8_ACTIVATIONS } else { F32 };
            let extra = if norm { " behind an RMS norm" } else { "" };
            list.push(About::new("linear", form(dtype, [1, 5, k], extra), bound).build(|d, g| {
                let x = d.x(g, "x", &[1, k])?;
                let x = if norm { d.rms(g, "n", x, k)? } else { x };
                d.linear(g, "l", dtype, x, [5, k], false)
            })?);
        }
    }
    Ok(())
}

/// Products of two values.
fn batches(list: &mut Vec<Case>) -> Result<()> {
    for (b, m, n, k) in [(1, 1, 1, 1), (2, 3, 5, 7), (3, 17, 33, 16), (2, 1, 64, 65)] {
        for transposed in [false, true] {
            let form = format!("{b} of [{m}, {k}] and [{k}, {n}], transposed {transposed}");
            list.push(About::new("matmul", form, F32).build(|d, g| {
                let x = d.x(g, "x", &[b, m, k])?;
                let w = d.x(g, "w", &if transposed { [b, n, k] } else { [b, k, n] })?;
                g.matmul(x, w, transposed)
            })?);
        }
    }
    Ok(())
}

/// One case for each of a device's features: the largest that takes a moment.
pub(super) fn quick(list: &mut Vec<Case>) -> Result<()> {
    let mut one = |feature: Feature, dtype: DType, [m, n, k]: [usize; 3], fill: Fill| -> Result<()> {
        let about = About::new("linear", form(dtype, [m, n, k], ""), F32).filled(fill);
        let mut case = about.build(|d, g| {
            let x = d.x(g, "x", &[m, k])?;
            let y = g.reshape(x, &[Dim::from(m), k.into()])?;
            d.linear(g, "l", dtype, y, [n, k], false)
        })?;
        case.quick = Some(feature);
        list.push(case);
        Ok(())
    };
    one(Feature::Plain, DType::F32, [5, 70, 68], Fill::Spread)?;
    one(Feature::Subgroups, DType::F32, [1, 131, 256], Fill::Spread)?;
    one(Feature::PackedDot, DType::Block(Block::Q4_0), [1, 131, 256], Fill::Codes)?;
    one(Feature::PackedDot, DType::Block(Block::Q8_0), [1, 131, 256], Fill::Codes)?;
    one(Feature::Cooperative, DType::Block(Block::Q4_0), [130, 262, 96], Fill::Spread)
}
