//! The memory plan: where every value of a run lies.

use std::ops::Range;

use crate::dim::{Bindings, eval_shape};
use crate::graph::{Graph, Node, Value};
use crate::ops::Op;
use crate::{Error, Result};

/// Alignment of values in the arena, in f32 elements: one cache line.
const ALIGN: usize = 16;

/// Where a value lies.
#[derive(Clone, Debug, PartialEq)]
pub(crate) enum Place {
    /// With its source node: an input, weight, constant, state or load-time result.
    Source,
    /// In another value's place, from this element on.
    Inside(Value, usize),
    /// In the arena.
    Arena(Range<usize>),
}

/// Working memory of a node, in f32 elements, from the shapes of its operands and of its results.
pub type Scratch = dyn Fn(&Node, &[Vec<usize>], &[Vec<usize>]) -> usize;

/// Sizes and places of all values for one set of sizes.
#[derive(Clone, Debug)]
pub struct Plan {
    pub(crate) shapes: Vec<Vec<Vec<usize>>>,
    pub(crate) places: Vec<Vec<Place>>,
    pub(crate) scratch: Vec<Range<usize>>,
    /// f32 elements of the arena.
    pub(crate) arena: usize,
    /// f32 elements that all intermediates would take without reuse.
    pub(crate) without_reuse: usize,
    /// f32 elements of which places are multiples.
    align: usize,
}

impl Plan {
    /// Gives every intermediate a place for the sizes in `bindings`.
    ///
    /// # Errors
    /// Unbound or impossible sizes, and slices that reach past their operand.
    pub fn new(graph: &Graph, bindings: &Bindings) -> Result<Plan> {
        Plan::aligned(graph, bindings, ALIGN, &|node, inputs, outputs| node.op.def().scratch(inputs, outputs))
    }

    /// The same for a device whose values begin at multiples of `align` elements, and whose kernels need the working
    /// memory that `scratch` says: f32 elements for a node, the shapes of its operands and of its results.
    ///
    /// # Errors
    /// As [`Plan::new`].
    pub fn aligned(graph: &Graph, bindings: &Bindings, align: usize, scratch: &Scratch) -> Result<Plan> {
        let mut shapes = Vec::with_capacity(graph.nodes.len());
        for node in &graph.nodes {
            let sizes: Result<Vec<_>> = node.outputs.iter().map(|m| eval_shape(&m.shape, bindings)).collect();
            shapes.push(sizes.map_err(|e| e.at(format!("{} {}", node.scope, node.op.name())))?);
        }
        let mut plan = Plan {
            shapes,
            places: Vec::new(),
            scratch: vec![0..0; graph.nodes.len()],
            arena: 0,
            without_reuse: 0,
            align: align.max(1),
        };
        let last_use = plan.place_views(graph, bindings)?;

        // Values that live now, sorted by place. There are few, so a linear search finds the first gap.
        let mut live: Vec<(Range<usize>, usize)> = Vec::new();
        for (i, node) in graph.nodes.iter().enumerate() {
            if node.load_time || node.op.is_source() {
                continue;
            }
            for (port, last) in last_use[i].iter().enumerate() {
                if plan.places[i][port] == Place::Arena(0..0) {
                    let length = size(&plan.shapes[i][port])?;
                    let place = plan.allocate(&mut live, length, (*last).max(i))?;
                    plan.places[i][port] = Place::Arena(place);
                }
            }
            let inputs: Vec<Vec<usize>> = node.inputs.iter().map(|v| plan.shape(*v).to_vec()).collect();
            let scratch = scratch(node, &inputs, &plan.shapes[i]);
            if scratch > 0 {
                plan.scratch[i] = plan.allocate(&mut live, scratch, i)?;
            }
            live.retain(|(_, last)| *last > i);
        }
        Ok(plan)
    }

    /// Sizes of a value.
    pub fn shape(&self, value: Value) -> &[usize] {
        &self.shapes[value.node()][value.port()]
    }

    /// The element of the arena where a value begins that lies there by itself: neither a source nor a view.
    pub fn arena_start(&self, value: Value) -> Option<usize> {
        match &self.places[value.node()][value.port()] {
            Place::Arena(range) => Some(range.start),
            _ => None,
        }
    }

    /// Working memory of a node, in elements of the arena.
    pub fn scratch_of(&self, node: usize) -> Range<usize> {
        self.scratch[node].clone()
    }

    /// Bytes of the arena.
    pub fn arena_bytes(&self) -> u64 {
        self.arena as u64 * 4
    }

    /// Bytes that the intermediates would take if none used the place of another.
    pub fn bytes_without_reuse(&self) -> u64 {
        self.without_reuse as u64 * 4
    }

    /// Marks views and sources, and gives for each value the last node that reads it, views included.
    fn place_views(&mut self, graph: &Graph, bindings: &Bindings) -> Result<Vec<Vec<usize>>> {
        let mut last_use: Vec<Vec<usize>> = graph.nodes.iter().map(|n| vec![0; n.outputs.len()]).collect();
        for (i, node) in graph.nodes.iter().enumerate() {
            let mut places = Vec::with_capacity(node.outputs.len());
            for port in 0..node.outputs.len() {
                places.push(match &node.op {
                    op if op.is_source() || node.load_time => Place::Source,
                    Op::Reshape(_) => Place::Inside(node.inputs[0], 0),
                    Op::Slice(s) if s.axis == 0 => {
                        let from = self.shape(node.inputs[0]);
                        let (start, len) = (s.start.eval(bindings)?, s.len.eval(bindings)?);
                        if start + len > from[0] {
                            return Err(Error::Shape {
                                op: "slice",
                                wanted: format!("at least {} rows", start + len),
                                found: format!("{from:?}"),
                            }
                            .at(node.scope.clone()));
                        }
                        Place::Inside(node.inputs[0], start * from[1..].iter().product::<usize>())
                    }
                    op => {
                        let states = op.state_results();
                        match (port + states).checked_sub(node.outputs.len()) {
                            Some(k) => Place::Inside(node.inputs[node.inputs.len() - states + k], 0),
                            None => Place::Arena(0..0),
                        }
                    }
                });
            }
            self.places.push(places);
            for v in &node.inputs {
                let (root, _) = self.root(*v);
                last_use[root.node()][root.port()] = i;
            }
        }
        for (_, v) in &graph.outputs {
            let (root, _) = self.root(*v);
            last_use[root.node()][root.port()] = graph.nodes.len();
        }
        Ok(last_use)
    }

    /// The value in whose place `value` lies, and the element where it begins.
    pub fn root(&self, mut value: Value) -> (Value, usize) {
        let mut offset = 0;
        while let Place::Inside(inner, at) = &self.places[value.node()][value.port()] {
            offset += at;
            value = *inner;
        }
        (value, offset)
    }

    fn allocate(
        &mut self,
        live: &mut Vec<(Range<usize>, usize)>,
        length: usize,
        last: usize,
    ) -> Result<Range<usize>> {
        let padded = length.div_ceil(self.align) * self.align;
        let mut start = 0;
        let mut index = live.len();
        for (i, (taken, _)) in live.iter().enumerate() {
            if start + padded <= taken.start {
                index = i;
                break;
            }
            start = start.max(taken.end);
        }
        let end = start.checked_add(padded).ok_or_else(|| too_large(length))?;
        live.insert(index, (start..end, last));
        self.arena = self.arena.max(end);
        self.without_reuse += padded;
        Ok(start..start + length)
    }
}

fn too_large(length: usize) -> Error {
    Error::Shape {
        op: "plan",
        wanted: "values that fit in memory".into(),
        found: format!("{length} elements"),
    }
}

fn size(shape: &[usize]) -> Result<usize> {
    shape
        .iter()
        .try_fold(1usize, |n, &d| n.checked_mul(d))
        .filter(|&n| n < usize::MAX / 64)
        .ok_or_else(|| too_large(usize::MAX))
}
