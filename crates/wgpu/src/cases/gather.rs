//! Rows by index.

use pocketglm_graph::Result;
use pocketglm_tensor::DType;

use super::Case;
use super::comparison::bounds::{EXACT, F32};
use super::draft::{About, Fill};
use super::products::{formats, scales_bound, widths};

pub(super) fn cases(list: &mut Vec<Case>) -> Result<()> {
    let ids = [3, 39, 0, 7, 7, 20];
    for dtype in formats() {
        let bound = if dtype.is_quantised() { scales_bound(dtype) } else { EXACT };
        for k in widths(dtype) {
            list.push(About::new("gather_rows", format!("{dtype}, rows of {k}"), bound).build(|d, g| {
                d.matrix("table", dtype, [40, k])?;
                let table = g.weight("table", &[40, k])?;
                let ids = d.ids(g, "ids", &[ids.len()], &ids)?;
                g.gather_rows(table, ids)
            })?);
        }
    }
    // Larger than a small binding: rows of several parts are gathered.
    list.push(About::new("gather_rows", "F32, 300 rows of 260", EXACT).build(|d, g| {
        d.matrix("table", DType::F32, [300, 260])?;
        let table = g.weight("table", &[300, 260])?;
        let ids = d.ids(g, "ids", &[5], &[0, 299, 63, 64, 150])?;
        g.gather_rows(table, ids)
    })?);
    for (rows, c) in [(1, 1), (9, 67), (70, 64)] {
        list.push(About::new("gather_rows", format!("of a value, [{rows}, {c}]"), EXACT).build(|d, g| {
            let x = d.x(g, "x", &[rows, c])?;
            let table = g.scale(x, 1.0)?;
            let ids: Vec<i32> = [0, rows - 1, rows / 2].iter().map(|&i| i as i32).collect();
            let ids = d.ids(g, "ids", &[3], &ids)?;
            g.gather_rows(table, ids)
        })?);
    }
    for (n, c) in [(1, 1), (5, 67), (70, 3)] {
        list.push(About::new("weighted_gather", format!("{n} sums of {c} columns"), F32).build(|d, g| {
            let table = d.tensor(g, "table", &[36, c])?;
            let taps: Vec<i32> = (0..n as i32 * 16).map(|i| (i * 11) % 36).collect();
            let taps = d.ids(g, "taps", &[n, 16], &taps)?;
            let weights = d.x_of(g, "weights", &[n, 16], Fill::Spread)?;
            g.weighted_gather(table, taps, weights)
        })?);
    }
    for (t, c, at) in [(1, 1, vec![0]), (9, 67, vec![8, 0, 3]), (5, 13, vec![])] {
        list.push(About::new("scatter_rows", format!("{} of {t} rows of {c}", at.len()), EXACT).build(
            |d, g| {
                let x = d.x(g, "x", &[t, c])?;
                let ids = d.ids(g, "at", &[at.len()], &at)?;
                let rows = d.x_of(g, "rows", &[at.len(), c], Fill::Large)?;
                g.scatter_rows(x, ids, rows)
            },
        )?);
    }
    Ok(())
}
