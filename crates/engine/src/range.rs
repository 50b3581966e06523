//! Which ops of a model its device runs, where only a range of them is wanted: how a wrong result is traced to one op.

use std::sync::Arc;

use pocketglm_graph::{Backend, Graph, StagedBackend};

use crate::{Error, Result};

/// A range of ops, both ends included.
///
/// An end is an op's number or name as [`OpPlace`] has it, the name of a block such as
/// `model.language_model.layers.3` or of a result such as `logits`, or a line of `cargo xtask parity --model`. The ops of a model follow one
/// another as a run takes them: vision encoder, audio encoder, decoder. An op that keeps keys and values and the one that reads them
/// are only moved together.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct OpRange {
    /// The first op; the model's first where it is not given.
    pub from: Option<String>,
    /// The last op; the model's last where it is not given.
    pub until: Option<String>,
}

impl OpRange {
    /// Whether nothing is left out.
    pub fn is_all(&self) -> bool {
        self.from.is_none() && self.until.is_none()
    }
}

/// An op of a model.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct OpPlace {
    /// The program that it is part of: `vision`, `audio`, `decoder` or `speech`.
    pub program: &'static str,
    /// Its name: the kind of op, and the block that it belongs to.
    pub name: String,
    /// Whether it runs on the options' device.
    pub on_device: bool,
}

/// The ops of a model's programs in the order in which they run, and those of them that a range names.
pub(crate) struct Ranged {
    /// Program, node and name of each.
    ops: Vec<(&'static str, usize, String)>,
    first: usize,
    last: usize,
}

/// How many close names an error gives.
const NEAR: usize = 3;

impl Ranged {
    /// Looks up the ends of a range.
    ///
    /// # Errors
    /// [`Error::NoOp`] for an end that names nothing, [`Error::NoOps`] for an end that comes before the beginning.
    pub fn new(range: &OpRange, programs: &[(&'static str, &Graph)]) -> Result<Ranged> {
        let mut ops = Vec::new();
        let mut results = Vec::new();
        for (program, graph) in programs {
            let names = graph.op_names();
            for (output, value) in graph.outputs() {
                if let Some(at) = names.iter().position(|(node, _)| *node == value.node()) {
                    results.push((output.clone(), ops.len() + at));
                }
            }
            ops.extend(names.into_iter().map(|(node, name)| (*program, node, name)));
        }
        let find = |wanted: &String| {
            find(wanted, &ops, &results).ok_or_else(|| Error::NoOp {
                wanted: wanted.clone(),
                ops: ops.len(),
                near: near(wanted, &ops, &results),
            })
        };
        let first = range.from.as_ref().map(find).transpose()?.map_or(0, |(first, _)| first);
        let end = ops.len().saturating_sub(1);
        let last = range.until.as_ref().map(find).transpose()?.map_or(end, |(_, last)| last);
        if first > last {
            let end = |i: usize| format!("{i} `{}`", ops[i].2);
            return Err(Error::NoOps { from: end(first), until: end(last) });
        }
        Ok(Ranged { ops, first, last })
    }

    /// The backend of a program: the device, the processor, or both in stages.
    pub fn backend(
        &self,
        program: &'static str,
        device: &Arc<dyn Backend>,
        cpu: &Arc<dyn Backend>,
    ) -> Arc<dyn Backend> {
        let Some(ends) = self.ends(program) else { return cpu.clone() };
        let whole = self.ops.iter().filter(|(p, ..)| *p == program).count();
        if ends.1 + 1 - ends.0 == whole {
            return device.clone();
        }
        let [first, last] = [ends.0, ends.1].map(|at| Edge::of(&self.ops, at));
        Arc::new(StagedBackend::new(
            vec![cpu.clone(), device.clone(), cpu.clone()],
            Arc::new(move |graph| graph.stages_around(first.find(graph, false), last.find(graph, true))),
        ))
    }

    /// Places among all ops of those of a program that are in the range.
    fn ends(&self, program: &str) -> Option<(usize, usize)> {
        let mut own = (self.first..=self.last).filter(|i| self.ops.get(*i).is_some_and(|op| op.0 == program));
        let first = own.next()?;
        Some((first, own.next_back().unwrap_or(first)))
    }

    /// Every op, and whether the device runs it.
    pub fn places(&self, programs: &[(&'static str, &Graph)]) -> Vec<OpPlace> {
        let mut places = Vec::with_capacity(self.ops.len());
        for (program, graph) in programs {
            let stages = self.ends(program).map(|(first, last)| {
                let [first, last] = [first, last].map(|at| self.ops[at].1);
                graph.stages_around(first, last)
            });
            places.extend(self.ops.iter().filter(|op| op.0 == *program).map(|(program, node, name)| {
                OpPlace {
                    program,
                    name: name.clone(),
                    on_device: stages.as_ref().is_some_and(|s| s[*node] == 1),
                }
            }));
        }
        places
    }
}

/// An end of a range, for finding it in another graph of the same program too, such as one that names its hidden states and
/// therefore fuses less.
struct Edge {
    name: String,
    /// Which of the ops of this name it is.
    nth: usize,
}

impl Edge {
    fn of(ops: &[(&'static str, usize, String)], at: usize) -> Edge {
        let (program, _, name) = &ops[at];
        let same = ops[..at].iter().filter(|(p, _, n)| p == program && n == name);
        Edge { name: name.clone(), nth: same.count() }
    }

    /// The node; where the graph has no such op, the first or last one of the smallest block around it.
    fn find(&self, graph: &Graph, last: bool) -> usize {
        let names = graph.op_names();
        if let Some((node, _)) = names.iter().filter(|(_, n)| *n == self.name).nth(self.nth) {
            return *node;
        }
        let mut scope = scope(&self.name);
        while !scope.is_empty() {
            let mut inside = names.iter().filter(|(_, n)| is_within(n, scope)).map(|(node, _)| *node);
            let found = if last { inside.next_back() } else { inside.next() };
            if let Some(node) = found {
                return node;
            }
            scope = scope.rsplit_once('.').map_or("", |(outer, _)| outer);
        }
        if last { graph.nodes().len().saturating_sub(1) } else { 0 }
    }
}

fn scope(name: &str) -> &str {
    name.split_once(' ').map_or("", |(_, scope)| scope)
}

/// Whether an op of this name belongs to a block or to one inside it.
fn is_within(name: &str, block: &str) -> bool {
    scope(name).strip_prefix(block).is_some_and(|rest| rest.is_empty() || rest.starts_with('.'))
}

/// The first and the last op that a text names.
fn find(
    wanted: &str,
    ops: &[(&'static str, usize, String)],
    results: &[(String, usize)],
) -> Option<(usize, usize)> {
    let wanted = wanted.trim();
    if let Ok(number) = wanted.parse::<usize>() {
        return (number < ops.len()).then_some((number, number));
    }
    let ends = |named: &dyn Fn(&str) -> bool| {
        let mut found = ops.iter().enumerate().filter(|(_, op)| named(&op.2)).map(|(i, _)| i);
        let first = found.next()?;
        Some((first, found.next_back().unwrap_or(first)))
    };
    // A line of another listing has a number in front, and perhaps that of a result behind.
    let is_number = |text: &str| text.parse::<usize>().is_ok();
    let name = wanted.split_once(' ').filter(|(n, _)| is_number(n)).map_or(wanted, |(_, name)| name.trim());
    let name = name.rsplit_once(' ').filter(|(_, n)| is_number(n)).map_or(name, |(name, _)| name.trim_end());
    if name.is_empty() {
        return None;
    }
    let result = || results.iter().find(|(n, _)| n == name).map(|(_, at)| (*at, *at));
    let block = name.strip_suffix('.').unwrap_or(name);
    ends(&|n| n.trim_end() == name)
        .or_else(result)
        .or_else(|| ends(&|n| is_within(n, block)))
        .or_else(|| hidden_states(name, ops))
        // The device joins some ops further, so that a name of its own listing may not be here, but its block is.
        .or_else(|| ends(&|n| !scope(name).is_empty() && scope(n) == scope(name)))
}

/// The op whose result a trace calls `hidden_states.{i}`: the last one of the layer before.
fn hidden_states(name: &str, ops: &[(&'static str, usize, String)]) -> Option<(usize, usize)> {
    const LAYERS: &str = "model.language_model.layers";
    let i: usize = name.strip_prefix("hidden_states.")?.parse().ok()?;
    let last_of = |block: &str| ops.iter().rposition(|(p, _, n)| *p == "decoder" && is_within(n, block));
    let at = match i.checked_sub(1) {
        Some(layer) => last_of(&format!("{LAYERS}.{layer}"))?,
        // The embeddings.
        None => ops.iter().position(|(p, _, n)| *p == "decoder" && is_within(n, LAYERS))?.checked_sub(1)?,
    };
    Some((at, at))
}

/// The names that are closest to one that there is not.
fn near(wanted: &str, ops: &[(&'static str, usize, String)], results: &[(String, usize)]) -> Vec<String> {
    // A text from outside, compared with every name: cut to what a name may be.
    let wanted: String = wanted.chars().take(120).collect();
    let names =
        ops.iter().map(|(.., name)| name.trim_end()).chain(results.iter().map(|(name, _)| name.as_str()));
    let blocks = ops.iter().map(|(.., name)| scope(name)).filter(|s| !s.is_empty());
    let mut all: Vec<(usize, &str)> =
        names.chain(blocks).map(|name| (strsim::levenshtein(&wanted, name), name)).collect();
    all.sort_unstable();
    all.dedup();
    all.into_iter().take(NEAR).map(|(_, name)| name.to_owned()).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ops() -> Vec<(&'static str, usize, String)> {
        let names = [
            ("vision", "conv model.visual.patch_embed"),
            ("vision", "linear model.visual.merger"),
            ("decoder", "gather_rows model.language_model"),
            ("decoder", "attention model.language_model.layers.0.self_attn"),
            ("decoder", "norm_add model.language_model.layers.0"),
            ("decoder", "norm_add model.language_model.layers.0"),
            ("decoder", "attention model.language_model.layers.1.self_attn"),
            ("decoder", "norm_add model.language_model.layers.10"),
            ("decoder", "linear lm_head"),
        ];
        names.iter().enumerate().map(|(i, (program, name))| (*program, i, (*name).into())).collect()
    }

    #[test]
    fn ends_are_found_by_number_name_block_result_and_line_of_another_listing() {
        let (ops, results) = (ops(), vec![("logits".to_string(), 8)]);
        for (wanted, found) in [
            ("0", Some((0, 0))),
            ("8", Some((8, 8))),
            ("9", None),
            ("-1", None),
            ("", None),
            ("logits", Some((8, 8))),
            ("linear lm_head", Some((8, 8))),
            ("norm_add model.language_model.layers.0", Some((4, 5))),
            ("217 norm_add model.language_model.layers.10 0", Some((7, 7))),
            ("model.language_model.layers.0", Some((3, 5))),
            ("model.language_model.layers.1", Some((6, 6))),
            ("model.visual", Some((0, 1))),
            ("12 norm_joined model.language_model.layers.1.self_attn 0", Some((6, 6))),
            ("hidden_states.0", Some((2, 2))),
            ("hidden_states.1", Some((5, 5))),
            ("hidden_states.7", None),
            ("model.language_model.layers.2", None),
            ("language_model", None),
        ] {
            assert_eq!(find(wanted, &ops, &results), found, "{wanted}");
        }
    }

    #[test]
    fn names_close_to_a_wrong_one_are_told() {
        let near = near("atention model.language_model.layers.1.self_attn", &ops(), &[]);
        assert_eq!(near[0], "attention model.language_model.layers.1.self_attn");
        assert_eq!(near.len(), NEAR);
    }
}
