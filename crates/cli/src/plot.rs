//! Charts of `eval`: divergence and agreement over bits per weight.

use std::collections::HashMap;
use std::ops::Range;
use std::path::{Component, Path};

use plotters::coord::Shift;
use plotters::coord::ranged1d::{DefaultFormatting, KeyPointHint};
use plotters::coord::types::RangedCoordf64;
use plotters::prelude::*;
use plotters::style::text_anchor::{HPos, Pos, VPos};
use pocketglm::quantise::Evaluation;

use crate::failure::Failure;

/// Width and height of the picture.
const SIZE: (u32, u32) = (1100, 460);
/// Height of a label, and the most that one of its characters is wide: viewers choose the font.
const LINE: i32 = 14;
const CHARACTER: i32 = 7;
/// Most characters of a label.
const LONGEST: usize = 32;
/// Radius of a dot, and the distance of its label.
const DOT: i32 = 4;
const GAP: i32 = 7;
/// Most ticks of an axis.
const MOST_TICKS: f64 = 8.0;

/// One point of a chart, on axes that are linear.
struct Point {
    at: (f64, f64),
    label: String,
    /// Whether its value has no place on the axis: it is drawn as a ring at the axis' end.
    beyond: bool,
}

/// The vertical axis of a chart.
struct Axis {
    unit: &'static str,
    range: Range<f64>,
    ticks: Vec<f64>,
    format: fn(&f64) -> String,
}

/// A linear axis with chosen ticks.
struct Scale {
    inner: RangedCoordf64,
    ticks: Vec<f64>,
}

impl Scale {
    fn new(range: Range<f64>, ticks: Vec<f64>) -> Scale {
        Scale { inner: range.into(), ticks }
    }
}

impl Ranged for Scale {
    type FormatOption = DefaultFormatting;
    type ValueType = f64;

    fn map(&self, value: &f64, limit: (i32, i32)) -> i32 {
        self.inner.map(value, limit)
    }

    fn key_points<Hint: KeyPointHint>(&self, hint: Hint) -> Vec<f64> {
        // No lines between the ticks.
        if hint.weight().allow_light_points() { Vec::new() } else { self.ticks.clone() }
    }

    fn range(&self) -> Range<f64> {
        self.inner.range()
    }
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
    let labels = labels(&models.iter().map(|m| m.path.as_path()).collect::<Vec<_>>());
    let root = SVGBackend::with_string(svg, SIZE).into_drawing_area();
    root.fill(&WHITE)?;
    let [left, right] =
        <[_; 2]>::try_from(root.split_evenly((1, 2))).map_err(|_| "two charts were asked for")?;

    let ticks: Vec<f64> = decades(models.iter().map(|m| m.kl)).iter().map(|v| v.log10()).collect();
    let (low, high) = ticks.first().copied().zip(ticks.last().copied()).ok_or("an axis without ticks")?;
    let divergence = |(m, label): (&Evaluation, &String)| match m.kl > 0.0 {
        true => Point { at: (m.bits_per_weight, m.kl.log10()), label: label.clone(), beyond: false },
        // The axis is logarithmic.
        false => Point { at: (m.bits_per_weight, low), label: format!("{label}: 0"), beyond: true },
    };
    let points: Vec<Point> = models.iter().zip(&labels).map(divergence).collect();
    let format = |v: &f64| format!("{:.0e}", 10f64.powf(*v));
    let axis = Axis { unit: "nats", range: low..high, ticks, format };
    chart(&root, &left, "mean KL divergence from the reference", axis, &points)?;

    let agreement = |(m, label): (&Evaluation, &String)| Point {
        at: (m.bits_per_weight, m.same_top * 100.0),
        label: label.clone(),
        beyond: false,
    };
    let points: Vec<Point> = models.iter().zip(&labels).map(agreement).collect();
    let low = points.iter().map(|p| p.at.1).fold(100.0, f64::min);
    let range = (low - 1.0).max(0.0)..100.5;
    let format = |v: &f64| format!("{v:.1}");
    // The room above 100 % is for the dots there.
    let ticks = steps(&(range.start..100.0));
    let axis = Axis { unit: "% of the predictions", ticks, range, format };
    chart(&root, &right, "same most likely token", axis, &points)?;
    root.present()?;
    Ok(())
}

type Area<'a> = DrawingArea<SVGBackend<'a>, Shift>;

/// One chart in `area`; its labels are placed by pixels of `root`.
fn chart(root: &Area<'_>, area: &Area<'_>, caption: &str, axis: Axis, points: &[Point]) -> Drawn {
    let most = points.iter().map(|p| p.at.0).fold(1.0, f64::max) * 1.15;
    let bits = steps(&(0.0..most));
    let mut chart = ChartBuilder::on(area)
        .caption(caption, ("sans-serif", 15))
        .margin(10)
        .x_label_area_size(36)
        .y_label_area_size(58)
        .build_cartesian_2d(Scale::new(0.0..most, bits), Scale::new(axis.range, axis.ticks))?;
    chart
        .configure_mesh()
        .x_desc("bits per weight")
        .y_desc(axis.unit)
        .x_label_formatter(&|v| format!("{v}"))
        .y_label_formatter(&axis.format)
        .draw()?;
    let style = |p: &Point| if p.beyond { BLUE.stroke_width(1) } else { BLUE.filled() };
    chart.draw_series(points.iter().map(|p| Circle::new(p.at, DOT, style(p))))?;

    let plotted = chart.plotting_area();
    let dots: Vec<(i32, i32)> = points.iter().map(|p| plotted.map_coordinate(&p.at)).collect();
    let widths: Vec<i32> = points.iter().map(|p| p.label.chars().count() as i32 * CHARACTER).collect();
    let (columns, rows) = plotted.get_pixel_range();
    for ((point, &dot), text) in points.iter().zip(&dots).zip(place(&dots, &widths, (columns, rows))) {
        let (middle, left) = (text.top + LINE / 2, text.left > dot.0);
        let (near, anchor) = if left { (text.left, HPos::Left) } else { (text.right, HPos::Right) };
        if (middle - dot.1).abs() > LINE / 2 {
            root.draw(&PathElement::new([dot, (near, middle)], BLACK.mix(0.3)))?;
        }
        let style = ("sans-serif", 12).into_text_style(&SIZE).pos(Pos::new(anchor, VPos::Center));
        root.draw(&Text::new(point.label.as_str(), (near, middle), style))?;
    }
    Ok(())
}

/// A rectangle of pixels that a label fills.
#[derive(Clone, Copy, Debug)]
struct Place {
    left: i32,
    right: i32,
    top: i32,
}

impl Place {
    fn covers(&self, other: &Place) -> bool {
        self.left < other.right && other.left < self.right && (self.top - other.top).abs() < LINE
    }

    fn covers_dot(&self, (x, y): (i32, i32)) -> bool {
        (self.left - DOT..=self.right + DOT).contains(&x)
            && (self.top - DOT..=self.top + LINE + DOT).contains(&y)
    }
}

/// Where labels of these widths stand: beside their dots, or in the nearest line above or below where there is room. Where
/// there is none at all, they stand beside their dots.
fn place(dots: &[(i32, i32)], widths: &[i32], (columns, rows): (Range<i32>, Range<i32>)) -> Vec<Place> {
    let mut placed: Vec<Place> = Vec::new();
    for (&(x, y), &width) in dots.iter().zip(widths) {
        let at = |right: bool, line: i32| {
            let left = if right { x + GAP } else { x - GAP - width };
            Place { left, right: left + width, top: y - LINE / 2 + line * LINE }
        };
        let inside = |p: &Place| {
            p.left >= columns.start
                && p.right <= columns.end
                && p.top >= rows.start
                && p.top + LINE <= rows.end
        };
        let free = |p: &Place| !placed.iter().any(|q| p.covers(q)) && !dots.iter().any(|&d| p.covers_dot(d));
        let lines = (0..(rows.end - rows.start) / LINE).flat_map(|n| [-n, n]);
        let found = lines.flat_map(|line| [at(true, line), at(false, line)]).find(|p| inside(p) && free(p));
        placed.push(found.unwrap_or(at(x + GAP + width <= columns.end, 0)));
    }
    placed
}

/// What to call the files: each by as much of its path as tells it from the others.
fn labels(paths: &[&Path]) -> Vec<String> {
    let name = |path: &Path, level: usize| -> String {
        let part = match level {
            0 => path.file_stem(),
            1 => path.file_name(),
            _ => None,
        };
        if let Some(part) = part {
            return part.to_string_lossy().into_owned();
        }
        let parts: Vec<String> = path
            .components()
            .filter(|c| matches!(c, Component::Normal(_) | Component::ParentDir))
            .map(|c| c.as_os_str().to_string_lossy().into_owned())
            .collect();
        let skipped = parts.len().saturating_sub(level.max(1));
        parts.get(skipped..).unwrap_or_default().join("/")
    };
    let deepest = paths.iter().map(|p| p.components().count()).max().unwrap_or(0);
    let mut levels = vec![0; paths.len()];
    let mut names: Vec<String> = Vec::new();
    for _ in 0..=deepest {
        names = paths.iter().zip(&levels).map(|(path, &level)| name(path, level)).collect();
        let count = |n: &String| names.iter().filter(|other| *other == n).count();
        let twice: Vec<bool> = names.iter().map(|n| count(n) > 1).collect();
        levels.iter_mut().zip(twice).filter(|(_, twice)| *twice).for_each(|(level, _)| *level += 1);
    }
    // What is left are the same files, or names that are the same when they are shortened.
    let mut seen: HashMap<String, usize> = HashMap::new();
    let number = |name: String| {
        let name = shortened(&name);
        let times = seen.entry(name.clone()).and_modify(|n| *n += 1).or_insert(1);
        if *times > 1 { format!("{name} ({times})") } else { name }
    };
    names.into_iter().map(number).collect()
}

/// The beginning and the end of a long name.
fn shortened(name: &str) -> String {
    let all: Vec<char> = name.chars().collect();
    if all.len() <= LONGEST {
        return name.to_owned();
    }
    let half = LONGEST / 2;
    let (begin, end) = (all.iter().take(half), all.iter().skip(all.len() - half + 1));
    begin.chain(&['…']).chain(end).collect()
}

/// Ticks of a logarithmic axis on which all positive values lie, with one below them and one above: 1, 2 and 5 of each
/// decade where there are few decades.
fn decades(values: impl Iterator<Item = f64>) -> Vec<f64> {
    let positive = values.filter(|v| *v > 0.0 && v.is_finite());
    let found = positive.fold(None, |range: Option<(f64, f64)>, v| {
        Some(range.map_or((v, v), |(low, high)| (low.min(v), high.max(v))))
    });
    let (low, high) = found.unwrap_or((2e-3, 5e-3));
    let (first, last) = (low.log10().floor() as i32 - 1, high.log10().ceil() as i32 + 1);
    let between = high.log10() - low.log10();
    let mantissas: &[f64] = if between <= 2.0 { &[1.0, 2.0, 5.0] } else { &[1.0] };
    let step = (between / MOST_TICKS).ceil().max(1.0) as usize;
    let all: Vec<f64> = (first..=last + step as i32)
        .step_by(step)
        .flat_map(|decade| mantissas.iter().map(move |m| m * 10f64.powi(decade)))
        .collect();
    let begin = all.iter().rposition(|t| *t < low).unwrap_or(0);
    let end = all.iter().position(|t| *t > high).unwrap_or(all.len().saturating_sub(1));
    all.get(begin..=end).unwrap_or_default().to_vec()
}

/// Round ticks of a linear axis.
fn steps(range: &Range<f64>) -> Vec<f64> {
    let rough = ((range.end - range.start) / MOST_TICKS).max(1e-3);
    let decade = 10f64.powf(rough.log10().floor());
    let step = [1.0, 2.0, 5.0, 10.0].map(|m| m * decade).into_iter().find(|s| *s >= rough).unwrap_or(rough);
    let (first, last) = ((range.start / step).ceil() as i64, (range.end / step).floor() as i64);
    // Rounded, so that no tick reads 0.30000000000000004.
    (first..=last).map(|n| (n as f64 * step * 1e6).round() / 1e6).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn model(path: &str, bits: f64, kl: f64, same_top: f64) -> Evaluation {
        Evaluation {
            path: path.into(),
            bytes: 1,
            bits_per_weight: bits,
            positions: 1,
            perplexity: 1.0,
            kl,
            kl_99: kl,
            kl_max: kl,
            same_top,
            pictures: None,
        }
    }

    #[test]
    fn labels_of_dots_in_one_place_do_not_cover_each_other() {
        let dots = [(100, 100), (100, 100), (102, 103), (290, 100), (10, 10), (100, 190)];
        let widths = [80; 6];
        let placed = place(&dots, &widths, (0..300, 0..200));
        for (i, a) in placed.iter().enumerate() {
            assert!(a.left >= 0 && a.right <= 300 && a.top >= 0 && a.top + LINE <= 200, "{a:?}");
            assert!(placed[..i].iter().all(|b| !a.covers(b)), "{placed:?}");
            assert!(dots.iter().all(|&d| !a.covers_dot(d)), "{a:?}");
        }
        // A lone dot has its label beside it.
        assert_eq!((placed[4].left, placed[4].top), (10 + GAP, 10 - LINE / 2));
        // The control: without room they do.
        let crowded = place(&[(5, 5); 9], &[80; 9], (0..100, 0..20));
        assert!(crowded[7].covers(&crowded[8]));
    }

    #[test]
    fn files_of_one_name_are_told_apart() {
        let of = |paths: &[&str]| labels(&paths.iter().map(Path::new).collect::<Vec<_>>());
        assert_eq!(of(&["x/a.gguf", "y/b.pglm"]), ["a", "b"]);
        assert_eq!(of(&["x/a.gguf", "x/a.pglm", "b"]), ["a.gguf", "a.pglm", "b"]);
        assert_eq!(of(&["x/q/a.pglm", "y/q/a.pglm", "z/a.pglm"]), ["x/q/a.pglm", "y/q/a.pglm", "z/a.pglm"]);
        assert_eq!(of(&["a.pglm", "./a.pglm"]), ["a.pglm", "a.pglm (2)"]);
        let long = of(&[&format!("{}1", "n".repeat(60)), &format!("{}2", "n".repeat(60))]);
        assert!(long[0] != long[1] && long[0].chars().count() == LONGEST, "{long:?}");
    }

    #[test]
    fn ticks_are_few_and_read_differently() {
        for (low, high) in
            [(0.0123, 0.0124), (0.01, 0.9), (1e-5, 3e-4), (1e-9, 1.0), (1e-300, 1e3), (0.1, 0.1)]
        {
            let ticks = decades([0.0, high, low].into_iter());
            let texts: Vec<String> = ticks.iter().map(|v| format!("{v:.0e}")).collect();
            assert!((2..=12).contains(&ticks.len()), "{texts:?}");
            assert!(texts.windows(2).all(|pair| pair[0] != pair[1]), "{texts:?}");
            assert!(ticks[0] < low && ticks[ticks.len() - 1] > high, "{texts:?}");
        }
        assert!(decades([0.0, 0.0].into_iter()).len() >= 2);
        assert_eq!(steps(&(0.0..9.775)), [0.0, 2.0, 4.0, 6.0, 8.0]);
        assert_eq!(steps(&(98.9..100.0)), [99.0, 99.2, 99.4, 99.6, 99.8, 100.0]);
    }

    #[test]
    fn no_divergence_is_a_ring_that_says_so() {
        let svg = draw(&[model("same.pglm", 32.0, 0.0, 1.0), model("small.pglm", 8.5, 0.01, 0.98)]).unwrap();
        assert!(svg.contains("same: 0") && svg.contains("small") && !svg.contains("1e-9"), "{svg}");
        assert_eq!(svg.matches("<circle").count(), 4);
        assert_eq!(svg.matches(r##"fill="none" stroke="#0000FF""##).count(), 1, "{svg}");
        // The control: a divergence, however small, has a place on the axis.
        let svg = draw(&[model("near.pglm", 32.0, 1e-12, 1.0)]).unwrap();
        assert!(svg.contains("near") && !svg.contains("near: 0") && svg.contains("1e-12"), "{svg}");
    }
}
