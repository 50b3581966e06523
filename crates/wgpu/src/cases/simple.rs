//! Element-wise ops, norms, softmax, rotary embedding, data movement, convolution, top-k.

use pocketglm_graph::Result;
use pocketglm_graph::ops::{BinaryKind, RopeLayout, SoftmaxMask, UnaryKind};

use super::Case;
use super::comparison::bounds::{EXACT, F32};
use super::draft::{About, Fill, dims};

pub(super) fn cases(list: &mut Vec<Case>) -> Result<()> {
    element_wise(list)?;
    norms(list)?;
    softmax(list)?;
    rope(list)?;
    movement(list)?;
    conv(list)?;
    top_k(list)
}

/// Sizes around a workgroup's 64 elements, and one that takes several.
const SIZES: [usize; 4] = [1, 63, 65, 1030];

fn element_wise(list: &mut Vec<Case>) -> Result<()> {
    let any = [
        UnaryKind::Silu,
        UnaryKind::Gelu,
        UnaryKind::GeluTanh,
        UnaryKind::Relu,
        UnaryKind::Sigmoid,
        UnaryKind::Tanh,
        UnaryKind::Erf,
        UnaryKind::Neg,
        UnaryKind::Abs,
        UnaryKind::Square,
    ];
    for kind in any {
        for fill in Fill::EACH {
            let about = About::new("unary", format!("{kind:?}, {} values", fill.name()), F32);
            list.push(about.filled(fill).build(|d, g| {
                let x = d.x(g, "x", &[3, 67])?;
                // Up to ten, where the functions bend.
                let x = if fill == Fill::Spread { g.scale(x, 10.0)? } else { x };
                g.unary(kind, x)
            })?);
        }
    }
    let positive = [UnaryKind::Log, UnaryKind::Sqrt, UnaryKind::Rsqrt, UnaryKind::Recip, UnaryKind::Exp];
    for kind in positive {
        for n in SIZES {
            let about = About::new("unary", format!("{kind:?}, {n} values"), F32).filled(Fill::Positive);
            list.push(about.build(|d, g| {
                let x = d.x(g, "x", &[n])?;
                let x = g.scale(x, 30.0)?;
                g.unary(kind, x)
            })?);
        }
    }
    for n in SIZES {
        list.push(About::new("scale", format!("{n} values"), F32).build(|d, g| {
            let x = d.x(g, "x", &[n])?;
            g.scale(x, -1.7)
        })?);
    }
    use BinaryKind::{Add, Div, Max, Min, Mul, Sub};
    for kind in [Add, Sub, Mul, Div, Max, Min] {
        for (shape, other) in
            [([3, 67], vec![3, 67]), ([3, 67], vec![67]), ([5, 1], vec![1]), ([1, 64], vec![1, 64])]
        {
            let about = About::new("binary", format!("{kind:?}, {shape:?} and {other:?}"), F32);
            list.push(about.build(|d, g| {
                let a = d.x(g, "a", &shape)?;
                let b = d.x_of(g, "b", &other, if kind == Div { Fill::Negative } else { Fill::Spread })?;
                g.binary(kind, a, b)
            })?);
        }
    }
    Ok(())
}

fn norms(list: &mut Vec<Case>) -> Result<()> {
    for c in [1, 63, 65, 130, 1028] {
        for fill in Fill::EACH {
            let form = |extra: &str| format!("{c} columns, {} values{extra}", fill.name());
            list.push(About::new("rms_norm", form(""), F32).filled(fill).build(|d, g| {
                let x = d.x(g, "x", &[3, c])?;
                d.rms(g, "n", x, c)
            })?);
            // The variance of equal values is what rounding leaves of it, so only exact results can be compared.
            let layer = About::new("layer_norm", form(""), F32).filled(match fill {
                Fill::Zero | Fill::Equal => Fill::Zero,
                other => other,
            });
            list.push(layer.build(|d, g| {
                let x = d.x(g, "x", &[3, c])?;
                d.vector("n.weight", c, Fill::Positive)?;
                d.vector("n.bias", c, Fill::Spread)?;
                g.layer_norm("n", x, 1e-5)
            })?);
            let about = About::new("norm_add", form(""), F32).filled(fill).fused(&["norm_add"]);
            list.push(about.build(|d, g| {
                let h = d.x(g, "h", &[3, c])?;
                let x = d.x(g, "x", &[3, c])?;
                let y = d.rms(g, "n", x, c)?;
                g.add(h, y)
            })?);
        }
    }
    for shape in [[2, 3, 4, 5], [1, 7, 1, 67]] {
        list.push(About::new("batch_norm", format!("{shape:?}"), F32).build(|d, g| {
            let x = d.x(g, "x", &shape)?;
            let mut parameters = Vec::new();
            for name in ["weight", "bias", "mean", "variance"] {
                let fill = if name == "variance" { Fill::Positive } else { Fill::Spread };
                d.vector(name, shape[1], fill)?;
                parameters.push(g.weight(name, &[shape[1]])?);
            }
            let [w, b, m, v] = parameters[..] else { return Ok(x) };
            g.batch_norm_by(x, [w, b, m, v], 1e-5)
        })?);
    }
    Ok(())
}

fn softmax(list: &mut Vec<Case>) -> Result<()> {
    for (t, past) in [(1, 0), (1, 70), (5, 0), (9, 60), (66, 3)] {
        for fill in [Fill::Spread, Fill::Large, Fill::Equal, Fill::Negative] {
            let form = format!("causal, {t} rows after {past}, {} values", fill.name());
            list.push(About::new("softmax", form, F32).filled(fill).build(|d, g| {
                let x = d.x(g, "x", &[2, t, past + t])?;
                g.softmax(x, SoftmaxMask::Causal { past: past.into() }, None)
            })?);
        }
    }
    for bounds in [&[0, 1][..], &[0, 5, 5, 37], &[0, 64, 65, 70]] {
        let t = bounds.last().map_or(0, |&t| t as usize);
        list.push(About::new("softmax", format!("segments {bounds:?}"), F32).build(|d, g| {
            let x = d.x(g, "x", &[2, t, t])?;
            let segments = d.ids(g, "segments", &[bounds.len()], bounds)?;
            g.softmax(x, SoftmaxMask::Segments, Some(segments))
        })?);
    }
    Ok(())
}

fn rope(list: &mut Vec<Case>) -> Result<()> {
    for layout in [RopeLayout::Interleaved, RopeLayout::Half] {
        for (t, h, d, r) in [(1, 1, 2, 2), (3, 5, 8, 8), (7, 3, 16, 6), (33, 2, 12, 8)] {
            let form = format!("{layout:?}, {r} of {d} components, {h} heads, {t} rows");
            list.push(About::new("rope", form, F32).build(|draft, g| {
                let x = draft.x(g, "x", &[t, h, d])?;
                let positions: Vec<i32> = (0..2 * t as i32).map(|i| (i * 37) % 1900).collect();
                let positions = draft.ids(g, "positions", &[2, t], &positions)?;
                let axes: Vec<u8> = (0..r / 2).map(|i| (i % 2) as u8).collect();
                let table = g.rope_table(positions, 10_000.0, &axes, r / 2)?;
                g.rope(x, table, layout)
            })?);
        }
    }
    Ok(())
}

fn movement(list: &mut Vec<Case>) -> Result<()> {
    let orders: [(&[usize], &[usize]); 5] = [
        (&[5, 67], &[1, 0]),
        (&[3, 5, 7], &[1, 0, 2]),
        (&[3, 5, 7], &[2, 1, 0]),
        (&[2, 3, 4, 5], &[0, 2, 1, 3]),
        (&[2, 3, 4, 5], &[3, 1, 2, 0]),
    ];
    for (shape, order) in orders {
        list.push(About::new("permute", format!("{shape:?} to {order:?}"), EXACT).build(|d, g| {
            let x = d.x(g, "x", shape)?;
            g.permute(x, order)
        })?);
    }
    for (shape, axis, start, len) in
        [([5, 67], 1, 3, 61), ([5, 67], 0, 2, 3), ([66, 2], 1, 1, 1), ([5, 67], 1, 0, 67)]
    {
        let form = format!("{len} from {start} of axis {axis} of {shape:?}");
        list.push(About::new("slice", form, EXACT).build(|d, g| {
            let x = d.x(g, "x", &shape)?;
            let y = g.slice(x, axis, start, len)?;
            // A view of an input is no computation; its copy is.
            g.scale(y, 1.0)
        })?);
    }
    for axis in [0, 1] {
        list.push(About::new("concat", format!("three along axis {axis}"), EXACT).build(|d, g| {
            let part = |i: usize| if axis == 0 { [i, 13] } else { [13, i] };
            let parts = [
                d.x(g, "a", &part(1))?,
                d.x_of(g, "b", &part(67), Fill::Negative)?,
                d.x_of(g, "c", &part(6), Fill::Large)?,
            ];
            g.concat(&parts, axis)
        })?);
    }
    list.push(About::new("reshape", "of a slice that begins at an odd element", EXACT).build(|d, g| {
        let x = d.x(g, "x", &[9, 7])?;
        let y = g.slice(x, 0, 3, 4)?;
        let y = g.reshape(y, &dims(&[2, 14]))?;
        g.permute(y, &[1, 0])
    })?);
    Ok(())
}

fn conv(list: &mut Vec<Case>) -> Result<()> {
    // Batch, channels, height, width; outputs, kernel, stride, padding, groups.
    type Shape = ([usize; 4], usize, [usize; 2], [usize; 2], [usize; 2], usize);
    let shapes: [Shape; 4] = [
        ([1, 3, 9, 11], 4, [3, 3], [1, 1], [1, 1], 1),
        ([2, 4, 8, 8], 6, [2, 2], [2, 2], [0, 0], 2),
        ([1, 5, 1, 70], 5, [1, 5], [1, 2], [0, 2], 5),
        ([1, 2, 4, 4], 3, [4, 4], [1, 1], [0, 0], 1),
    ];
    for (shape, o, kernel, stride, padding, groups) in shapes {
        for kind in [None, Some(UnaryKind::Gelu), Some(UnaryKind::Silu), Some(UnaryKind::Relu)] {
            let form = format!("{shape:?}, kernel {kernel:?} by {stride:?}, {groups} groups, {kind:?}");
            let ops: &[&str] = if kind.is_some() { &["conv_act"] } else { &["conv"] };
            list.push(About::new("conv", form, F32).fused(ops).build(|d, g| {
                let x = d.x(g, "x", &shape)?;
                let w = d.tensor(g, "w", &[o, shape[1] / groups, kernel[0], kernel[1]])?;
                let b = d.tensor(g, "b", &[o])?;
                let y = g.conv_by(x, w, b, stride, padding, groups)?;
                kind.map_or(Ok(y), |kind| g.unary(kind, y))
            })?);
        }
    }
    Ok(())
}

fn top_k(list: &mut Vec<Case>) -> Result<()> {
    // One row of which only the index is wanted, as a greedy choice is.
    for c in [1, 255, 1030, 20_000, 140_000] {
        for fill in [Fill::Spread, Fill::Large, Fill::Equal, Fill::Negative, Fill::Codes] {
            // One of a row that no small binding holds.
            if c > 65_536 && fill != Fill::Codes {
                continue;
            }
            let form = format!("the index of the largest of {c}, {} values", fill.name());
            list.push(About::new("top_k", form, EXACT).filled(fill).build(|d, g| {
                let x = d.x(g, "x", &[1, c])?;
                Ok(g.top_k(x, 1)?[0])
            })?);
        }
    }
    // Rows of more than 1,024 are sorted in rounds: two of them, or three from 16,385 on.
    for (rows, c) in [(1, 1), (3, 5), (2, 100), (1, 1030), (1, 5000), (1, 20_000)] {
        for k in [1, 2, 5, 64] {
            for fill in [Fill::Spread, Fill::Large, Fill::Equal, Fill::Negative, Fill::Codes] {
                if k > c {
                    continue;
                }
                let form = format!("{k} of {c}, {rows} rows, {} values", fill.name());
                list.push(About::new("top_k", form, EXACT).filled(fill).build(|d, g| {
                    // Whole numbers below 128 are there several times: equal ones come in the order of their places.
                    let x = d.x(g, "x", &[rows, c])?;
                    let [ids, values] = g.top_k(x, k)?;
                    g.output("ids", ids);
                    Ok(values)
                })?);
            }
        }
    }
    Ok(())
}
