//! Places for the boxes of a layered drawing (Sugiyama, Tagawa and Toda 1981): ranks, order within each rank,
//! and x coordinates that keep long arrows vertical (Brandes and Köpf 2002).
//!
//! An arrow over several ranks takes a place of its own in each rank between, so no arrow crosses a box.

use std::collections::{BTreeMap, BTreeSet};

/// Space between neighbours in a rank.
const GAP_X: f64 = 22.0;
/// Space between ranks.
const GAP_Y: f64 = 30.0;
/// Width that a passing arrow takes.
const LANE: f64 = 10.0;
/// Sweeps in search of an order with few crossings.
const SWEEPS: usize = 24;

/// x and y, or width and height.
pub type Point = (f64, f64);

/// A drawing without its ink.
#[derive(Clone, Debug, Default)]
pub struct Layout {
    /// Centre of each box.
    pub centres: Vec<Point>,
    /// Lines between neighbouring ranks, and straight ones through a rank.
    pub lines: Vec<Line>,
    /// Size of the whole.
    pub size: Point,
}

/// One piece of an arrow.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Line {
    /// Where it begins.
    pub from: Point,
    /// Where it ends, below.
    pub to: Point,
    /// Whether it ends at a box.
    pub head: bool,
}

impl Line {
    /// The point at `t` from 0 to 1 of the curve that is drawn: vertical at both ends.
    #[cfg(test)]
    pub fn point(&self, t: f64) -> Point {
        let ((x0, y0), (x1, y1)) = (self.from, self.to);
        let middle = (y0 + y1) / 2.0;
        let u = 1.0 - t;
        let blend = |a: f64, b: f64, c: f64, d: f64| {
            u * u * u * a + 3.0 * u * u * t * b + 3.0 * u * t * t * c + t * t * t * d
        };
        (blend(x0, x0, x1, x1), blend(y0, middle, middle, y1))
    }
}

/// The graph with a place for each arrow in each rank that it passes.
struct Ranked {
    /// Real boxes come first; the others are places of arrows.
    real: usize,
    rank: Vec<usize>,
    above: Vec<Vec<usize>>,
    below: Vec<Vec<usize>>,
    width: Vec<f64>,
    /// Nodes of each rank, from left to right.
    order: Vec<Vec<usize>>,
}

/// Places boxes of the given sizes; arrows lead from lower to higher indices.
pub fn layout(sizes: &[Point], arrows: &[(usize, usize)]) -> Layout {
    let mut graph = Ranked::new(sizes, arrows);
    graph.order_ranks();
    let x = graph.coordinates();
    graph.draw(sizes, &x)
}

impl Ranked {
    fn new(sizes: &[Point], arrows: &[(usize, usize)]) -> Ranked {
        let arrows: BTreeSet<(usize, usize)> = arrows.iter().copied().filter(|(a, b)| a < b).collect();
        let real = sizes.len();
        let mut rank = vec![0usize; real];
        for b in 0..real {
            let above = arrows.iter().filter(|(_, to)| *to == b).map(|(from, _)| rank[*from] + 1);
            rank[b] = above.max().unwrap_or(0);
        }
        // What comes in stands right above its first user.
        for a in 0..real {
            if !arrows.iter().any(|(_, to)| *to == a) {
                let users = arrows.iter().filter(|(from, _)| *from == a).map(|(_, to)| rank[*to]);
                rank[a] = users.min().map_or(0, |r| r.saturating_sub(1));
            }
        }
        let mut graph = Ranked {
            real,
            above: vec![Vec::new(); real],
            below: vec![Vec::new(); real],
            width: sizes.iter().map(|s| s.0).collect(),
            order: Vec::new(),
            rank,
        };
        // Arrows from one box share their places: they carry the same value.
        let mut lanes: BTreeMap<(usize, usize), usize> = BTreeMap::new();
        for (from, to) in arrows {
            let mut last = from;
            for rank in graph.rank[from] + 1..graph.rank[to] {
                last = match lanes.get(&(from, rank)) {
                    Some(lane) => *lane,
                    None => {
                        let lane = graph.rank.len();
                        graph.rank.push(rank);
                        graph.above.push(Vec::new());
                        graph.below.push(Vec::new());
                        graph.width.push(LANE);
                        lanes.insert((from, rank), lane);
                        graph.connect(last, lane);
                        lane
                    }
                };
            }
            graph.connect(last, to);
        }
        graph
    }

    fn connect(&mut self, a: usize, b: usize) {
        self.below[a].push(b);
        self.above[b].push(a);
    }

    fn ranks(&self) -> usize {
        self.rank.iter().max().map_or(0, |r| r + 1)
    }

    /// Looks for an order with few crossings: each node goes to the mean place of its neighbours. What comes out
    /// depends on where it starts, so it starts from several orders.
    fn order_ranks(&mut self) {
        let mut natural = vec![Vec::new(); self.ranks()];
        for v in 0..self.rank.len() {
            natural[self.rank[v]].push(v);
        }
        let mut starts = vec![natural.clone(), natural.clone(), natural.clone(), natural];
        starts[1].iter_mut().for_each(|rank| rank.reverse());
        starts[2].iter_mut().for_each(|rank| rank.sort_by_key(|&v| !self.is_lane(v)));
        // Long arrows from the lowest box innermost, as brackets nest.
        starts[3].iter_mut().for_each(|rank| rank.sort_by_key(|&v| (self.is_lane(v), usize::MAX - v)));
        let mut best: Option<(usize, Vec<Vec<usize>>)> = None;
        for mut order in starts {
            for sweep in 0..SWEEPS {
                self.sweep(&mut order, sweep % 2 == 0);
                self.exchange(&mut order);
                let crossings = self.crossings(&order);
                if best.as_ref().is_none_or(|b| crossings < b.0) {
                    best = Some((crossings, order.clone()));
                }
            }
        }
        self.order = best.map(|b| b.1).unwrap_or_default();
    }

    fn sweep(&self, order: &mut [Vec<usize>], down: bool) {
        let ranks: Vec<usize> =
            if down { (0..order.len()).collect() } else { (0..order.len()).rev().collect() };
        for r in ranks {
            let place = places(order);
            let mean = |v: usize| {
                let neighbours = if down { &self.above[v] } else { &self.below[v] };
                let sum: usize = neighbours.iter().map(|n| place[n]).sum();
                if neighbours.is_empty() { place[&v] as f64 } else { sum as f64 / neighbours.len() as f64 }
            };
            let mut keyed: Vec<(f64, usize)> = order[r].iter().map(|&v| (mean(v), v)).collect();
            keyed.sort_by(|a, b| a.0.total_cmp(&b.0));
            order[r] = keyed.into_iter().map(|(_, v)| v).collect();
        }
    }

    /// Exchanges neighbours wherever that removes a crossing.
    fn exchange(&self, order: &mut [Vec<usize>]) {
        for _ in 0..4 {
            let mut changed = false;
            for r in 0..order.len() {
                for i in 1..order[r].len() {
                    let place = places(order);
                    let (u, v) = (order[r][i - 1], order[r][i]);
                    let cost = |a: usize, b: usize| {
                        let side = |x: &[usize], y: &[usize]| -> usize {
                            let pairs = x.iter().flat_map(|p| y.iter().map(move |q| (*p, *q)));
                            let crossed = pairs.filter(|(p, q)| place[p] > place[q]);
                            crossed.map(|(p, q)| self.weight(a, p) * self.weight(b, q)).sum()
                        };
                        side(&self.above[a], &self.above[b]) + side(&self.below[a], &self.below[b])
                    };
                    if cost(v, u) < cost(u, v) {
                        order[r].swap(i - 1, i);
                        changed = true;
                    }
                }
            }
            if !changed {
                break;
            }
        }
    }

    /// How much a crossing with this line counts: long arrows should cross others where they bend anyway.
    fn weight(&self, a: usize, b: usize) -> usize {
        if self.is_lane(a) && self.is_lane(b) { 4 } else { 1 }
    }

    /// The sum over all crossings, each with the weights of both lines.
    fn crossings(&self, order: &[Vec<usize>]) -> usize {
        let place = places(order);
        let mut count = 0;
        for rank in order {
            let lines: Vec<(usize, usize, usize)> = rank
                .iter()
                .flat_map(|a| self.below[*a].iter().map(|b| (place[a], place[b], self.weight(*a, *b))))
                .collect();
            for (i, (a, b, w)) in lines.iter().enumerate() {
                let crossed = lines[i + 1..].iter().filter(|(c, d, _)| (a < c && b > d) || (a > c && b < d));
                count += crossed.map(|(_, _, x)| w * x).sum::<usize>();
            }
        }
        count
    }

    fn is_lane(&self, v: usize) -> bool {
        v >= self.real
    }

    /// Centres in x: the mean of the middle two of four extreme placements.
    fn coordinates(&self) -> Vec<f64> {
        let mut results: Vec<(f64, f64, bool, Vec<f64>)> = Vec::new();
        for down in [true, false] {
            for left in [true, false] {
                let x = self.extreme(down, left);
                let low = (0..x.len()).map(|v| x[v] - self.width[v] / 2.0).fold(f64::INFINITY, f64::min);
                let high = (0..x.len()).map(|v| x[v] + self.width[v] / 2.0).fold(f64::NEG_INFINITY, f64::max);
                results.push((low, high, left, x));
            }
        }
        let narrowest = results.iter().min_by(|a, b| (a.1 - a.0).total_cmp(&(b.1 - b.0)));
        let (low, high) = narrowest.map_or((0.0, 0.0), |r| (r.0, r.1));
        let middle = |v: usize| {
            let shifted = results.iter().map(|(l, h, left, x)| x[v] + if *left { low - l } else { high - h });
            let mut x: Vec<f64> = shifted.collect();
            x.sort_by(f64::total_cmp);
            (x[1] + x[2]) / 2.0
        };
        let x: Vec<f64> = (0..self.rank.len()).map(middle).collect();
        let left = (0..x.len()).map(|v| x[v] - self.width[v] / 2.0).fold(f64::INFINITY, f64::min);
        x.into_iter().map(|x| x - left).collect()
    }

    /// One of four placements: aligned with neighbours above or below, as far to one side as possible.
    fn extreme(&self, down: bool, left: bool) -> Vec<f64> {
        let n = self.rank.len();
        let mut order = self.order.clone();
        if !down {
            order.reverse();
        }
        if !left {
            order.iter_mut().for_each(|rank| rank.reverse());
        }
        let place = places(&order);
        let (before, after) = if down { (&self.above, &self.below) } else { (&self.below, &self.above) };

        // Blocks of nodes that get one coordinate.
        let mut root: Vec<usize> = (0..n).collect();
        let mut taken = vec![false; n];
        for rank in &order {
            let forbidden = self.forbidden(rank, before, after, &place);
            let mut last: Option<usize> = None;
            for &v in rank {
                let mut neighbours: Vec<usize> =
                    before[v].iter().copied().filter(|w| !forbidden.contains(&(*w, v))).collect();
                neighbours.sort_by_key(|w| place[w]);
                let count = neighbours.len();
                if count == 0 {
                    continue;
                }
                for i in [(count - 1) / 2, count / 2] {
                    let w = neighbours[i];
                    if root[v] == v && !taken[w] && last.is_none_or(|l| l < place[&w]) {
                        root[v] = root[w];
                        taken[w] = true;
                        last = Some(place[&w]);
                    }
                }
            }
        }

        // Each block as near to the side as its neighbours let it, then back towards the other side.
        let mut separation: BTreeMap<(usize, usize), f64> = BTreeMap::new();
        for pair in order.iter().flat_map(|rank| rank.windows(2)) {
            let (u, v) = (pair[0], pair[1]);
            let gap = if self.is_lane(u) && self.is_lane(v) { LANE } else { GAP_X };
            let wanted = (self.width[u] + self.width[v]) / 2.0 + gap;
            let entry = separation.entry((root[u], root[v])).or_insert(wanted);
            *entry = entry.max(wanted);
        }
        let mut x = vec![0.0f64; n];
        // The blocks form no cycle, so as many rounds as blocks settle every one; few are ever needed.
        for _ in 0..n {
            let mut moved = false;
            for ((u, v), wanted) in &separation {
                if x[*v] < x[*u] + wanted {
                    x[*v] = x[*u] + wanted;
                    moved = true;
                }
            }
            if !moved {
                break;
            }
        }
        for _ in 0..n {
            let mut moved = false;
            for u in 0..n {
                let room =
                    separation.iter().filter(|((a, _), _)| *a == u).map(|((_, b), wanted)| x[*b] - wanted);
                let room = room.fold(f64::INFINITY, f64::min);
                if room.is_finite() && room > x[u] + 1e-9 {
                    x[u] = room;
                    moved = true;
                }
            }
            if !moved {
                break;
            }
        }
        (0..n).map(|v| if left { x[root[v]] } else { -x[root[v]] }).collect()
    }

    /// Lines between a rank and the one before it that must not be made vertical, because a line between two
    /// places of one arrow has the right of way.
    fn forbidden(
        &self,
        rank: &[usize],
        before: &[Vec<usize>],
        after: &[Vec<usize>],
        place: &BTreeMap<usize, usize>,
    ) -> BTreeSet<(usize, usize)> {
        let lines: Vec<(usize, usize)> =
            rank.iter().flat_map(|&v| before[v].iter().map(move |&w| (w, v))).collect();
        let inner = |&(w, v): &(usize, usize)| self.is_lane(w) && self.is_lane(v);
        let mut forbidden = BTreeSet::new();
        for line in lines.iter().filter(|l| !inner(l)) {
            let (w, v) = *line;
            let shares = (self.is_lane(w) && after[w].iter().any(|o| self.is_lane(*o)))
                || (self.is_lane(v) && before[v].iter().any(|o| self.is_lane(*o)));
            let crosses = lines.iter().filter(|l| inner(l)).any(|(a, b)| {
                (place[a] < place[&w] && place[b] > place[&v])
                    || (place[a] > place[&w] && place[b] < place[&v])
            });
            if shares || crosses {
                forbidden.insert((w, v));
            }
        }
        forbidden
    }

    fn draw(&self, sizes: &[Point], x: &[f64]) -> Layout {
        let height = |v: usize| sizes.get(v).map_or(0.0, |s| s.1);
        let mut bands = Vec::new();
        let mut y = 0.0;
        for rank in &self.order {
            let tallest = rank.iter().map(|&v| height(v)).fold(0.0, f64::max);
            bands.push((y, y + tallest));
            y += tallest + GAP_Y;
        }
        let middle = |v: usize| {
            let (top, bottom) = bands[self.rank[v]];
            (top + bottom) / 2.0
        };
        let edge_above =
            |v: usize| if self.is_lane(v) { bands[self.rank[v]].0 } else { middle(v) - height(v) / 2.0 };
        let edge_below =
            |v: usize| if self.is_lane(v) { bands[self.rank[v]].1 } else { middle(v) + height(v) / 2.0 };
        // Lines at a box are spread along its side, in the order of where they lead.
        let port = |v: usize, other: usize, neighbours: &[usize]| {
            if self.is_lane(v) {
                return x[v];
            }
            let mut sorted: Vec<usize> = neighbours.to_vec();
            sorted.sort_by(|a, b| x[*a].total_cmp(&x[*b]));
            let i = sorted.iter().position(|n| *n == other).unwrap_or(0) as f64;
            let count = sorted.len() as f64;
            let step = (self.width[v] * 0.6 / count).min(26.0);
            x[v] + (i - (count - 1.0) / 2.0) * step
        };
        let mut lines = Vec::new();
        for v in 0..self.rank.len() {
            if self.is_lane(v) {
                let (top, bottom) = bands[self.rank[v]];
                lines.push(Line { from: (x[v], top), to: (x[v], bottom), head: false });
            }
            for &w in &self.below[v] {
                let from = (port(v, w, &self.below[v]), edge_below(v));
                let to = (port(w, v, &self.above[w]), edge_above(w));
                lines.push(Line { from, to, head: !self.is_lane(w) });
            }
        }
        let right = (0..x.len()).map(|v| x[v] + self.width[v] / 2.0).fold(0.0, f64::max);
        let centres = (0..self.real).map(|v| (x[v], middle(v))).collect();
        Layout { centres, lines, size: (right, (y - GAP_Y).max(0.0)) }
    }
}

/// The place of each node in its rank.
fn places(order: &[Vec<usize>]) -> BTreeMap<usize, usize> {
    order.iter().flat_map(|rank| rank.iter().enumerate().map(|(i, v)| (*v, i))).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    const BOX: Point = (100.0, 40.0);

    /// A residual block: a chain, an arrow around it, and three branches inside.
    fn block() -> (Vec<Point>, Vec<(usize, usize)>) {
        let arrows =
            [(0, 1), (1, 2), (1, 3), (1, 4), (2, 5), (3, 6), (5, 7), (6, 7), (7, 8), (4, 8), (8, 9), (0, 9)];
        (vec![BOX; 10], arrows.to_vec())
    }

    #[test]
    fn boxes_do_not_overlap_and_arrows_lead_down() {
        let (sizes, arrows) = block();
        let drawing = layout(&sizes, &arrows);
        for (i, a) in drawing.centres.iter().enumerate() {
            for b in &drawing.centres[..i] {
                assert!((a.0 - b.0).abs() >= BOX.0 || (a.1 - b.1).abs() >= BOX.1, "{a:?} {b:?}");
            }
        }
        for (a, b) in arrows {
            assert!(drawing.centres[a].1 < drawing.centres[b].1);
        }
        assert!(
            drawing.centres.iter().all(|c| c.0 >= BOX.0 / 2.0 && c.0 + BOX.0 / 2.0 <= drawing.size.0 + 1e-6)
        );
    }

    #[test]
    fn no_arrow_passes_through_a_box() {
        let (sizes, arrows) = block();
        let drawing = layout(&sizes, &arrows);
        for line in &drawing.lines {
            for i in 1..20 {
                let (x, y) = line.point(f64::from(i) / 20.0);
                for c in &drawing.centres {
                    let inside = (x - c.0).abs() < BOX.0 / 2.0 && (y - c.1).abs() < BOX.1 / 2.0 - 1e-9;
                    assert!(!inside, "{line:?} passes through the box at {c:?}");
                }
            }
        }
    }

    #[test]
    fn a_long_arrow_is_straight_within() {
        let (sizes, arrows) = block();
        let lanes: Vec<Line> =
            layout(&sizes, &arrows).lines.into_iter().filter(|l| !l.head && l.from.0 == l.to.0).collect();
        // The arrow around the block passes ranks 1 to 5 on one vertical.
        let longest = lanes.iter().map(|l| lanes.iter().filter(|m| m.from.0 == l.from.0).count()).max();
        assert!(longest >= Some(5), "{lanes:?}");
    }

    #[test]
    fn two_crossed_branches_are_uncrossed() {
        let graph = |arrows: &[(usize, usize)]| {
            let mut g = Ranked::new(&[BOX; 5], arrows);
            g.order_ranks();
            g.crossings(&g.order)
        };
        assert_eq!(graph(&[(0, 3), (1, 2), (2, 4), (3, 4)]), 0);
        // Three on three cannot be drawn without crossings, so the counter does count.
        let mut g =
            Ranked::new(&[BOX; 6], &[(0, 3), (0, 4), (0, 5), (1, 3), (1, 4), (1, 5), (2, 3), (2, 4), (2, 5)]);
        g.order_ranks();
        assert_eq!(g.crossings(&g.order), 9);
    }

    #[test]
    fn nothing_to_draw_is_no_error() {
        assert_eq!(layout(&[], &[]).size, (0.0, 0.0));
    }
}
