//! A page with drawings side by side, a legend and tables.

use std::fmt::Write;

use super::layout::{Layout, Line, Point, layout};
use super::{Family, Shape, Sketch};

const MARGIN: f64 = 32.0;
/// Space between the two drawings.
const BETWEEN: f64 = 56.0;
const TITLE_SIZE: f64 = 13.0;
const LINE_SIZE: f64 = 11.5;
const LINE_HEIGHT: f64 = 15.0;
const PADDING: f64 = 11.0;
/// Room between a frame and its boxes.
const FRAME: f64 = 14.0;
const FONT: &str = "DejaVu Sans, Verdana, sans-serif";
/// Widest advance of the common letters of the font, as parts of its size; a heavy one is wider.
const ADVANCE: f64 = 0.61;
const HEAVY_ADVANCE: f64 = 0.69;

/// One drawing with its heading and the tables under it.
#[derive(Clone, Debug, Default)]
pub struct Column {
    /// Heading.
    pub title: String,
    /// Line under it.
    pub subtitle: String,
    /// What is drawn.
    pub sketch: Sketch,
    /// Tables under the drawing: a heading, then rows; the first column is left-aligned, the others right.
    pub tables: Vec<(String, Vec<Vec<String>>)>,
}

/// Width of a text of this size.
pub fn text_width(text: &str, size: f64, heavy: bool) -> f64 {
    let advance = if heavy { HEAVY_ADVANCE } else { ADVANCE };
    let letter = |c: char| match c {
        'i' | 'j' | 'l' | '.' | ',' | '\'' | '|' | ' ' | '(' | ')' | '[' | ']' | ':' => 0.42,
        'm' | 'w' | 'M' | 'W' | '⌊' | '⌋' | '→' | '−' => 1.0,
        c if c.is_ascii() => advance,
        _ => 0.85,
    };
    text.chars().map(letter).sum::<f64>() * size
}

/// Width and height of a box that its text fits in.
pub fn box_size(shape: &Shape) -> Point {
    let lines = shape.lines.iter().map(|l| text_width(l, LINE_SIZE, false));
    let width = lines.fold(text_width(&shape.title, TITLE_SIZE, true), f64::max);
    (width.max(56.0) + 2.0 * PADDING, 22.0 + shape.lines.len() as f64 * LINE_HEIGHT + 6.0)
}

/// Text as it may stand in SVG.
pub fn escape(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    for c in text.chars() {
        match c {
            '&' => out.push_str("&amp;"),
            '<' => out.push_str("&lt;"),
            '>' => out.push_str("&gt;"),
            '"' => out.push_str("&quot;"),
            '\'' => out.push_str("&apos;"),
            // XML has no way to write most control characters.
            c if c.is_control() => out.push(' '),
            c => out.push(c),
        }
    }
    out
}

/// The ink so far.
#[derive(Default)]
struct Ink(String);

impl Ink {
    fn put(&mut self, text: std::fmt::Arguments<'_>) {
        // Writing to a string cannot fail.
        let _ = self.0.write_fmt(text);
        self.0.push('\n');
    }

    fn text(&mut self, (x, y): Point, size: f64, anchor: &str, heavy: bool, colour: &str, text: &str) {
        let weight = if heavy { " font-weight=\"bold\"" } else { "" };
        let text = escape(text);
        self.put(format_args!(
            "<text x=\"{x:.1}\" y=\"{y:.1}\" font-size=\"{size}\" text-anchor=\"{anchor}\" fill=\"{colour}\"{weight}>{text}</text>"
        ));
    }
}

/// The whole page: a title, the legend, and the columns from left to right.
pub fn page(title: &str, subtitle: &str, columns: &[Column]) -> String {
    let mut body = Ink::default();
    let drawn: Vec<(Layout, f64)> = columns
        .iter()
        .map(|c| {
            let sizes: Vec<Point> = c.sketch.boxes.iter().map(box_size).collect();
            let drawing = layout(&sizes, &c.sketch.arrows);
            let tables = c.tables.iter().map(|(_, rows)| column_widths(rows).iter().sum::<f64>());
            let heading = text_width(&c.title, 17.0, true).max(text_width(&c.subtitle, 12.0, false));
            let width = tables.fold((drawing.size.0 + 2.0 * FRAME).max(heading), f64::max);
            (drawing, width)
        })
        .collect();
    let inner: f64 = drawn.iter().map(|d| d.1).sum::<f64>() + BETWEEN * drawn.len().saturating_sub(1) as f64;
    let width = inner.max(text_width(subtitle, 13.0, false)).max(720.0) + 2.0 * MARGIN;

    body.text((MARGIN, 48.0), 22.0, "start", true, "#0f172a", title);
    body.text((MARGIN, 70.0), 13.0, "start", false, "#475569", subtitle);
    let used: Vec<Family> = Family::ALL
        .into_iter()
        .filter(|f| columns.iter().any(|c| c.sketch.boxes.iter().any(|b| b.family == *f)))
        .collect();
    let top = legend(&mut body, &used, width) + 30.0;

    let mut left = MARGIN;
    let mut bottom = top;
    for (i, (column, (drawing, column_width))) in columns.iter().zip(&drawn).enumerate() {
        if i > 0 {
            let x = left - BETWEEN / 2.0;
            body.put(format_args!(
                "<line x1=\"{x:.1}\" y1=\"{:.1}\" x2=\"{x:.1}\" y2=\"@BOTTOM@\" stroke=\"#cbd5e1\"/>",
                top - 16.0
            ));
        }
        body.text((left, top), 17.0, "start", true, "#0f172a", &column.title);
        body.text((left, top + 20.0), 12.0, "start", false, "#475569", &column.subtitle);
        let origin = (left + (column_width - drawing.size.0) / 2.0, top + 52.0);
        body.put(format_args!("<g transform=\"translate({:.1},{:.1})\">", origin.0, origin.1));
        sketch(&mut body, &column.sketch, drawing);
        body.put(format_args!("</g>"));
        let mut y = origin.1 + drawing.size.1 + 56.0;
        for (heading, rows) in &column.tables {
            y = table(&mut body, (left, y), heading, rows) + 34.0;
        }
        bottom = bottom.max(y);
        left += column_width + BETWEEN;
    }
    let body = body.0.replace("@BOTTOM@", &format!("{:.1}", bottom - 20.0));
    let height = bottom + MARGIN - 20.0;
    format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" width=\"{width:.0}\" height=\"{height:.0}\" viewBox=\"0 0 {width:.0} {height:.0}\" font-family=\"{FONT}\">\n\
         <defs><marker id=\"head\" viewBox=\"0 0 8 8\" refX=\"7\" refY=\"4\" markerWidth=\"7\" markerHeight=\"7\" orient=\"auto\">\
         <path d=\"M0,0.8 L7.4,4 L0,7.2 z\" fill=\"#64748b\"/></marker></defs>\n\
         <rect width=\"100%\" height=\"100%\" fill=\"#ffffff\"/>\n{body}</svg>\n"
    )
}

/// One or more lines of coloured squares with names; gives where it ends.
fn legend(body: &mut Ink, families: &[Family], width: f64) -> f64 {
    let (mut x, mut y) = (MARGIN, 98.0);
    for family in families {
        let needed = 20.0 + text_width(family.name(), 12.0, false) + 18.0;
        if x + needed > width - MARGIN && x > MARGIN {
            (x, y) = (MARGIN, y + 22.0);
        }
        let (fill, border) = family.colours();
        body.put(format_args!(
            "<rect x=\"{x:.1}\" y=\"{:.1}\" width=\"14\" height=\"14\" rx=\"4\" fill=\"{fill}\" stroke=\"{border}\" stroke-width=\"1.3\"/>",
            y - 11.0
        ));
        body.text((x + 20.0, y), 12.0, "start", false, "#334155", family.name());
        x += needed;
    }
    y + 18.0
}

fn sketch(body: &mut Ink, sketch: &Sketch, drawing: &Layout) {
    let placed: Vec<(&Shape, Point, Point)> =
        sketch.boxes.iter().zip(&drawing.centres).map(|(b, c)| (b, *c, box_size(b))).collect();
    if let Some(title) = &sketch.frame {
        let framed = || placed.iter().filter(|(b, ..)| b.framed);
        let low =
            |f: fn(&Point, &Point) -> f64| framed().map(|(_, c, s)| f(c, s)).fold(f64::INFINITY, f64::min);
        let (left, top) = (low(|c, s| c.0 - s.0 / 2.0) - FRAME, low(|c, s| c.1 - s.1 / 2.0) - FRAME);
        let (right, bottom) = (-low(|c, s| -c.0 - s.0 / 2.0) + FRAME, -low(|c, s| -c.1 - s.1 / 2.0) + FRAME);
        if left.is_finite() && top.is_finite() {
            body.put(format_args!(
                "<rect x=\"{left:.1}\" y=\"{top:.1}\" width=\"{:.1}\" height=\"{:.1}\" rx=\"12\" fill=\"#f8fafc\" stroke=\"#cbd5e1\" stroke-dasharray=\"5 4\"/>",
                right - left,
                bottom - top
            ));
            // The white border keeps the words readable where an arrow passes behind them.
            let (x, y, title) = (left + 8.0, top - 4.0, escape(title));
            body.put(format_args!(
                "<text x=\"{x:.1}\" y=\"{y:.1}\" font-size=\"11.5\" fill=\"#64748b\" stroke=\"#ffffff\" stroke-width=\"4\" paint-order=\"stroke\">{title}</text>"
            ));
        }
    }
    for line in &drawing.lines {
        arrow(body, line);
    }
    for (shape, centre, size) in placed {
        draw_box(body, shape, centre, size);
    }
}

fn arrow(body: &mut Ink, line: &Line) {
    let ((x0, y0), (x1, y1)) = (line.from, line.to);
    let head = if line.head { " marker-end=\"url(#head)\"" } else { "" };
    let middle = (y0 + y1) / 2.0;
    let path = if (x0 - x1).abs() < 0.05 {
        format!("M{x0:.1},{y0:.1} L{x1:.1},{y1:.1}")
    } else {
        format!("M{x0:.1},{y0:.1} C{x0:.1},{middle:.1} {x1:.1},{middle:.1} {x1:.1},{y1:.1}")
    };
    body.put(format_args!(
        "<path d=\"{path}\" fill=\"none\" stroke=\"#64748b\" stroke-width=\"1.3\"{head}/>"
    ));
}

fn draw_box(body: &mut Ink, shape: &Shape, (x, y): Point, (w, h): Point) {
    let (fill, border) = shape.family.colours();
    let radius = if shape.family == Family::Data { h / 2.0 } else { 7.0 };
    body.put(format_args!("<g><title>{}</title>", escape(&shape.hint)));
    let mut rect = |shift: f64| {
        body.put(format_args!(
            "<rect x=\"{:.1}\" y=\"{:.1}\" width=\"{w:.1}\" height=\"{h:.1}\" rx=\"{radius:.1}\" fill=\"{fill}\" stroke=\"{border}\" stroke-width=\"1.3\"/>",
            x - w / 2.0 + shift,
            y - h / 2.0 + shift
        ));
    };
    if shape.family == Family::Folded {
        rect(7.0);
        rect(3.5);
    }
    rect(0.0);
    let top = y - h / 2.0 + 18.0;
    body.text((x, top), TITLE_SIZE, "middle", true, "#0f172a", &shape.title);
    for (i, line) in shape.lines.iter().enumerate() {
        let y = top + (i + 1) as f64 * LINE_HEIGHT;
        body.text((x, y), LINE_SIZE, "middle", false, "#475569", line);
    }
    body.put(format_args!("</g>"));
}

fn column_widths(rows: &[Vec<String>]) -> Vec<f64> {
    let columns = rows.iter().map(Vec::len).max().unwrap_or(0);
    let width = |c: usize| {
        rows.iter().filter_map(|r| r.get(c)).map(|t| text_width(t, 12.0, false)).fold(0.0, f64::max)
    };
    (0..columns).map(|c| width(c) + 18.0).collect()
}

/// Gives where it ends.
fn table(body: &mut Ink, (left, top): Point, heading: &str, rows: &[Vec<String>]) -> f64 {
    body.text((left, top), 13.5, "start", true, "#0f172a", heading);
    let widths = column_widths(rows);
    let mut y = top + 8.0;
    for (i, row) in rows.iter().enumerate() {
        if i == 1 {
            let right = left + widths.iter().sum::<f64>();
            body.put(format_args!(
                "<line x1=\"{left:.1}\" y1=\"{:.1}\" x2=\"{right:.1}\" y2=\"{:.1}\" stroke=\"#cbd5e1\"/>",
                y + 6.0,
                y + 6.0
            ));
            y += 4.0;
        }
        y += 18.0;
        let mut x = left;
        for (c, (cell, w)) in row.iter().zip(&widths).enumerate() {
            let colour = if i == 0 { "#64748b" } else { "#334155" };
            let (at, anchor) = if c == 0 { (x, "start") } else { (x + w, "end") };
            body.text((at, y), 12.0, anchor, false, colour, cell);
            x += w;
        }
    }
    y
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn text_of_a_model_cannot_leave_its_element() {
        assert_eq!(escape("a<b>&\"'\u{1}"), "a&lt;b&gt;&amp;&quot;&apos; ");
        let shape = Shape { title: "<script>".into(), ..Shape::default() };
        let column =
            Column { sketch: Sketch { boxes: vec![shape], ..Sketch::default() }, ..Column::default() };
        let page = page("t", "s", &[column]);
        assert!(!page.contains("<script>") && page.contains("&lt;script&gt;"));
    }

    #[test]
    fn a_box_is_wider_than_its_longest_line() {
        let shape = Shape { title: "norm".into(), lines: vec!["a".repeat(40)], ..Shape::default() };
        let (w, h) = box_size(&shape);
        // The letter a of the font is 0.613 wide, with its margins.
        assert!(w > 40.0 * 0.61 * LINE_SIZE && h > TITLE_SIZE + LINE_SIZE);
        assert!(box_size(&Shape::default()).0 < w);
    }
}
