//! Drawing a graph from top to bottom: places for boxes, and an SVG of them.

pub mod layout;
pub mod svg;

/// A graph to be drawn: boxes, and arrows from earlier to later ones.
#[derive(Clone, Debug, Default)]
pub struct Sketch {
    /// The boxes; every arrow leads from a lower to a higher index.
    pub boxes: Vec<Shape>,
    /// Pairs of indices.
    pub arrows: Vec<(usize, usize)>,
    /// A frame around the boxes that are marked as framed.
    pub frame: Option<String>,
}

/// One box.
#[derive(Clone, Debug, Default)]
pub struct Shape {
    /// First line, heavy.
    pub title: String,
    /// Further lines.
    pub lines: Vec<String>,
    /// What a reader sees when pointing at it.
    pub hint: String,
    /// Colour.
    pub family: Family,
    /// Whether it stands in the frame.
    pub framed: bool,
}

/// Kinds of boxes, each with a colour.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub enum Family {
    /// Data that comes in or goes out.
    #[default]
    Data,
    /// Matrix products and convolutions.
    Matrix,
    /// Attention and softmax.
    Attention,
    /// Norms.
    Norm,
    /// Rotary positions.
    Rope,
    /// Element by element.
    Elements,
    /// Rows by index, and the cache.
    Rows,
    /// Layout: views and copies.
    Layout,
    /// Many boxes, drawn as one.
    Folded,
}

impl Family {
    /// All kinds, in the order of the legend.
    pub const ALL: [Family; 9] = [
        Family::Matrix,
        Family::Attention,
        Family::Norm,
        Family::Rope,
        Family::Elements,
        Family::Rows,
        Family::Layout,
        Family::Data,
        Family::Folded,
    ];

    /// Its name in the legend.
    pub fn name(self) -> &'static str {
        match self {
            Family::Data => "input, state, result",
            Family::Matrix => "matrix product",
            Family::Attention => "attention, softmax",
            Family::Norm => "norm",
            Family::Rope => "rotary positions",
            Family::Elements => "element-wise",
            Family::Rows => "gather, scatter, cache",
            Family::Layout => "layout",
            Family::Folded => "more of the same",
        }
    }

    /// Fill and border.
    pub fn colours(self) -> (&'static str, &'static str) {
        match self {
            Family::Data => ("#ffffff", "#64748b"),
            Family::Matrix => ("#dbeafe", "#2563eb"),
            Family::Attention => ("#ede9fe", "#7c3aed"),
            Family::Norm => ("#dcfce7", "#16a34a"),
            Family::Rope => ("#fce7f3", "#db2777"),
            Family::Elements => ("#ffedd5", "#ea580c"),
            Family::Rows => ("#cffafe", "#0891b2"),
            Family::Layout => ("#f1f5f9", "#94a3b8"),
            Family::Folded => ("#fef9c3", "#a16207"),
        }
    }
}
