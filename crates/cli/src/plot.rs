//! Charts of `eval`: divergence and agreement over bits per weight.

use plotters::prelude::*;
use plotters::style::text_anchor::{HPos, Pos, VPos};
use pocketglm::quantise::Evaluation;

use crate::failure::Failure;

/// Width and height of the picture.
const SIZE: (u32, u32) = (960, 420);
/// What a divergence of nothing is drawn as: the axis is logarithmic.
const LEAST_KL: f64 = 1e-9;

/// One point of a chart.
struct Point {
    bits: f64,
    value: f64,
    label: String,
}

/// Two charts beside each other as SVG.
///
/// # Errors
/// [`Failure::Plot`] where a figure is none that can be drawn.
pub fn draw(models: &[Evaluation]) -> Result<String, Failure> {
    let mut svg = String::new();
    render(models, &mut svg).map_err(|e| Failure::Plot(e.to_string()))?;
    Ok(svg)
}

type Drawn = Result<(), Box<dyn std::error::Error>>;

fn render(models: &[Evaluation], svg: &mut String) -> Drawn {
    let points = |value: fn(&Evaluation) -> f64| -> Vec<Point> {
        let label =
            |m: &Evaluation| m.path.file_stem().map(|s| s.to_string_lossy().into_owned()).unwrap_or_default();
        models.iter().map(|m| Point { bits: m.bits_per_weight, value: value(m), label: label(m) }).collect()
    };
    let root = SVGBackend::with_string(svg, SIZE).into_drawing_area();
    root.fill(&WHITE)?;
    let [left, right] =
        <[_; 2]>::try_from(root.split_evenly((1, 2))).map_err(|_| "two charts were asked for")?;
    let most = models.iter().map(|m| m.bits_per_weight).fold(1.0, f64::max) * 1.15;

    let kl = points(|m| m.kl.max(LEAST_KL));
    let (low, high) = kl.iter().fold((f64::MAX, f64::MIN), |(a, b), p| (a.min(p.value), b.max(p.value)));
    let mut chart = ChartBuilder::on(&left)
        .caption("mean KL divergence from the reference", ("sans-serif", 15))
        .margin(10)
        .x_label_area_size(36)
        .y_label_area_size(58)
        .build_cartesian_2d(0.0..most, (low / 2.0..high * 2.0).log_scale())?;
    chart
        .configure_mesh()
        .x_desc("bits per weight")
        .y_desc("nats")
        .y_label_formatter(&|v| format!("{v:.0e}"))
        .draw()?;
    chart.draw_series(kl.iter().map(dot))?;
    chart.draw_series(kl.iter().map(label))?;

    let same = points(|m| m.same_top * 100.0);
    let low = same.iter().map(|p| p.value).fold(100.0, f64::min);
    let mut chart = ChartBuilder::on(&right)
        .caption("same most likely token", ("sans-serif", 15))
        .margin(10)
        .x_label_area_size(36)
        .y_label_area_size(58)
        .build_cartesian_2d(0.0..most, (low - 1.0).max(0.0)..100.5)?;
    chart
        .configure_mesh()
        .x_desc("bits per weight")
        .y_desc("% of the predictions")
        .y_label_formatter(&|v| format!("{v:.1}"))
        .draw()?;
    chart.draw_series(same.iter().map(dot))?;
    chart.draw_series(same.iter().map(label))?;
    root.present()?;
    Ok(())
}

/// A dot.
fn dot(p: &Point) -> Circle<(f64, f64), i32> {
    Circle::new((p.bits, p.value), 4, BLUE.filled())
}

/// The label above a dot.
fn label(p: &Point) -> Text<'static, (f64, f64), String> {
    let style = ("sans-serif", 12).into_text_style(&SIZE).pos(Pos::new(HPos::Left, VPos::Bottom));
    Text::new(format!(" {}", p.label), (p.bits, p.value), style)
}
