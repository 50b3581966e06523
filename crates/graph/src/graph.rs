//! The graph itself: nodes in topological order, each with its op, operands and the place in the model.

use std::cmp::Reverse;
use std::collections::BinaryHeap;

use pocketglm_tensor::DType;

use crate::dim::{Dim, product};
use crate::ops::Op;
use crate::{Error, Result};

/// One result of one node.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct Value {
    pub(crate) node: u32,
    pub(crate) port: u16,
}

impl Value {
    /// The result `port` of node `node`, for looking things up in the graph that has it.
    pub fn of(node: usize, port: usize) -> Value {
        // A graph has fewer than 2^32 nodes, and no op has 2^16 results: other numbers name nothing.
        Value { node: u32::try_from(node).unwrap_or(u32::MAX), port: u16::try_from(port).unwrap_or(u16::MAX) }
    }

    /// Index of the node that makes this value.
    pub fn node(self) -> usize {
        self.node as usize
    }

    /// Which of that node's results it is.
    pub fn port(self) -> usize {
        self.port as usize
    }
}

/// Element type and symbolic shape of a value.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Meta {
    /// Element type. For weights the type that the checkpoint stores; activations are F32.
    pub dtype: DType,
    /// Shape, slowest dimension first.
    pub shape: Vec<Dim>,
}

impl Meta {
    /// An f32 value of this shape.
    pub fn f32(shape: Vec<Dim>) -> Meta {
        Meta { dtype: DType::F32, shape }
    }

    /// Number of elements.
    pub fn elements(&self) -> Dim {
        product(&self.shape)
    }
}

impl std::fmt::Display for Meta {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}{:?}", self.dtype, self.shape)
    }
}

/// One operation of a graph.
#[derive(Clone, Debug)]
pub struct Node {
    /// What it computes.
    pub op: Op,
    /// Its operands.
    pub inputs: Vec<Value>,
    /// Type and shape of its results.
    pub outputs: Vec<Meta>,
    /// Path of the block that made it, such as `model.language_model.layers.3.mlp`.
    pub scope: String,
    /// Whether it depends on weights alone, so that a backend computes it once when it compiles.
    pub load_time: bool,
}

/// A computation: nodes in topological order, with named results.
#[derive(Clone, Debug, Default)]
pub struct Graph {
    pub(crate) nodes: Vec<Node>,
    pub(crate) outputs: Vec<(String, Value)>,
    /// For each node, the nodes that use one of its results (once per use). Kept up to date by every change, because
    /// a pass asks at every match, and a graph of many layers would take minutes if it were counted anew.
    users: Vec<Vec<usize>>,
}

impl Graph {
    /// The nodes, operands before users.
    pub fn nodes(&self) -> &[Node] {
        &self.nodes
    }

    /// The named results.
    pub fn outputs(&self) -> &[(String, Value)] {
        &self.outputs
    }

    /// Type and shape of a value of this graph.
    pub fn meta(&self, value: Value) -> &Meta {
        &self.nodes[value.node()].outputs[value.port()]
    }

    /// The node that makes a value of this graph.
    pub fn node(&self, value: Value) -> &Node {
        &self.nodes[value.node()]
    }

    /// Nodes that compute something at run time: no inputs, weights, states or load-time nodes.
    pub fn compute_nodes(&self) -> usize {
        self.nodes.iter().filter(|n| !n.op.is_source() && !n.load_time).count()
    }

    /// Compute nodes that move or calculate data: views such as a reshape are free and do not count.
    pub fn dispatches(&self) -> usize {
        self.nodes.iter().filter(|n| !n.op.is_source() && !n.load_time && !n.op.is_view()).count()
    }

    /// For each node whether it is a matrix that every user takes in the type in which it is stored.
    pub fn kept_as_stored(&self) -> Vec<bool> {
        let mut stored = vec![true; self.nodes.len()];
        for node in &self.nodes {
            for (i, v) in node.inputs.iter().enumerate() {
                let matrix = self.meta(*v).shape.len() == 2;
                stored[v.node()] &= matrix && node.op.def().takes_weight(i) && !node.load_time;
            }
        }
        stored
    }

    /// The names that shapes and views of this graph depend on. What only ops depend on, such as the number of keys of a
    /// fused attention, is not among them, so a decode step finds the plan of the last one.
    pub fn sized_by(&self) -> Vec<&'static str> {
        let mut names = Vec::new();
        for node in &self.nodes {
            for dim in node.outputs.iter().flat_map(|m| &m.shape) {
                dim.symbols(&mut names);
            }
            if let Op::Slice(s) = &node.op {
                s.start.symbols(&mut names);
                s.len.symbols(&mut names);
            }
        }
        names
    }

    /// Names every value that a run computes as a result, `{node} {op} {scope}`: for comparing backends op by op. States are
    /// left out, and so are rows whose keys and values may have gone to states alone.
    pub fn name_every_value(&mut self) {
        for (i, node) in self.nodes.iter().enumerate() {
            if node.load_time || node.op.is_source() || node.op.is_view() {
                continue;
            }
            for port in 0..node.outputs.len() - node.op.state_results() {
                self.outputs
                    .push((format!("{i} {} {} {port}", node.op.name(), node.scope), Value::of(i, port)));
            }
        }
    }

    /// The results of load-time nodes that other nodes use, and a graph that computes them and nothing else.
    pub(crate) fn load_time_part(&self) -> (Vec<Value>, Graph) {
        let mut wanted: Vec<Value> = self
            .nodes
            .iter()
            .filter(|n| !n.load_time)
            .flat_map(|n| &n.inputs)
            .chain(self.outputs.iter().map(|(_, v)| v))
            .filter(|v| self.node(**v).load_time)
            .copied()
            .collect();
        wanted.sort_unstable();
        wanted.dedup();
        let mut part = self.clone();
        for i in 0..part.nodes.len() {
            if part.nodes[i].op.writes_state() {
                part.forget(i);
            }
            part.nodes[i].load_time = false;
        }
        part.outputs = wanted.iter().enumerate().map(|(i, v)| (i.to_string(), *v)).collect();
        part.prune_and_sort();
        (wanted, part)
    }

    /// Adds a node whose shapes the op has checked, and returns its first result.
    ///
    /// # Errors
    /// [`Error::Shape`] from the op, with the scope where it happened.
    pub(crate) fn push(&mut self, op: Op, inputs: Vec<Value>, scope: &str) -> Result<Value> {
        let metas: Vec<Meta> = inputs.iter().map(|v| self.meta(*v).clone()).collect();
        let outputs = op.infer(&metas).map_err(|e| e.at(scope))?;
        let node = u32::try_from(self.nodes.len()).map_err(|_| Error::Shape {
            op: "graph",
            wanted: "fewer than 2^32 nodes".into(),
            found: "more".into(),
        })?;
        for v in &inputs {
            self.users[v.node()].push(node as usize);
        }
        self.users.push(Vec::new());
        self.nodes.push(Node { op, inputs, outputs, scope: scope.into(), load_time: false });
        Ok(Value { node, port: 0 })
    }

    /// For each node, the nodes that use one of its results (once per use).
    pub(crate) fn users(&self) -> &[Vec<usize>] {
        &self.users
    }

    pub(crate) fn count_users(&mut self) {
        self.users = vec![Vec::new(); self.nodes.len()];
        for (i, node) in self.nodes.iter().enumerate() {
            for v in &node.inputs {
                self.users[v.node()].push(i);
            }
        }
    }

    /// Whether a value is one of the graph's results.
    pub(crate) fn is_output(&self, value: Value) -> bool {
        self.outputs.iter().any(|(_, v)| *v == value)
    }

    /// For each node whether a run for these results needs it. A run appends to every state, whatever it is for.
    ///
    /// # Errors
    /// [`Error::Name`] for a result that the graph does not have.
    pub fn needed(&self, wanted: &[&str]) -> Result<Vec<bool>> {
        let mut needed = vec![false; self.nodes.len()];
        for name in wanted {
            let (_, v) = self.outputs.iter().find(|(n, _)| n == name).ok_or_else(|| Error::Name {
                kind: "output",
                name: (*name).into(),
                what: "is not one of the program".into(),
            })?;
            needed[v.node()] = true;
        }
        for i in (0..self.nodes.len()).rev() {
            needed[i] |= self.nodes[i].op.writes_state();
            if needed[i] {
                self.nodes[i].inputs.iter().for_each(|v| needed[v.node()] = true);
            }
        }
        Ok(needed)
    }

    /// Makes node `i` use `new` wherever it uses `old`.
    pub(crate) fn set_input(&mut self, i: usize, old: Value, new: Value) {
        let mut moved = 0;
        for v in self.nodes[i].inputs.iter_mut().filter(|v| **v == old) {
            *v = new;
            moved += 1;
        }
        // As many uses of the old node by this one are gone; which of its entries go does not matter.
        for _ in 0..moved {
            if let Some(at) = self.users[old.node()].iter().position(|&user| user == i) {
                self.users[old.node()].swap_remove(at);
            }
            self.users[new.node()].push(i);
        }
    }

    /// Makes every user of `old` use `new`.
    pub(crate) fn replace(&mut self, old: Value, new: Value) {
        // An entry for each use: uses of `old` move to the new node, those of other ports stay.
        for user in std::mem::take(&mut self.users[old.node()]) {
            match self.nodes[user].inputs.iter_mut().find(|v| **v == old) {
                Some(v) => {
                    *v = new;
                    self.users[new.node()].push(user);
                }
                None => self.users[old.node()].push(user),
            }
        }
        for (_, v) in &mut self.outputs {
            if *v == old {
                *v = new;
            }
        }
    }

    /// Makes a replaced node harmless until the next pruning: it uses nothing and writes no state.
    pub(crate) fn forget(&mut self, i: usize) {
        let node = &mut self.nodes[i];
        let meta = node.outputs[0].clone();
        node.op = Op::Input(crate::ops::Input { name: String::new(), meta });
        for v in std::mem::take(&mut node.inputs) {
            let users = &mut self.users[v.node()];
            if let Some(at) = users.iter().position(|&user| user == i) {
                users.swap_remove(at);
            }
        }
    }

    /// Drops nodes that no result and no state needs, and restores topological order after a rewrite.
    ///
    /// Among nodes that could run next, the one that came first stays first, so the order is stable.
    pub(crate) fn prune_and_sort(&mut self) {
        let mut live = vec![false; self.nodes.len()];
        let mut stack: Vec<usize> = self.outputs.iter().map(|(_, v)| v.node()).collect();
        stack.extend((0..self.nodes.len()).filter(|&i| self.nodes[i].op.writes_state()));
        while let Some(i) = stack.pop() {
            if !std::mem::replace(&mut live[i], true) {
                stack.extend(self.nodes[i].inputs.iter().map(|v| v.node()));
            }
        }
        // An input that a node uses twice counts twice, here and among the users.
        let mut waiting: Vec<usize> = self.nodes.iter().map(|n| n.inputs.len()).collect();
        // A fused node is appended at the end; it runs where its earliest user would have run.
        let mut rank: Vec<usize> = (0..self.nodes.len()).collect();
        for i in (0..self.nodes.len()).rev() {
            let own = rank[i];
            for v in &self.nodes[i].inputs {
                rank[v.node()] = rank[v.node()].min(own);
            }
        }
        let mut ready: BinaryHeap<Reverse<(usize, usize)>> = (0..self.nodes.len())
            .filter(|&i| live[i] && waiting[i] == 0)
            .map(|i| Reverse((rank[i], i)))
            .collect();
        let mut moved = vec![u32::MAX; self.nodes.len()];
        let mut order = Vec::with_capacity(self.nodes.len());
        while let Some(Reverse((_, i))) = ready.pop() {
            moved[i] = order.len() as u32;
            order.push(i);
            for &user in self.users[i].iter().filter(|&&user| live[user]) {
                waiting[user] -= 1;
                if waiting[user] == 0 {
                    ready.push(Reverse((rank[user], user)));
                }
            }
        }
        let mut old: Vec<Option<Node>> = std::mem::take(&mut self.nodes).into_iter().map(Some).collect();
        let mut old_users = std::mem::take(&mut self.users);
        self.nodes.reserve_exact(order.len());
        self.users.reserve_exact(order.len());
        for i in order {
            if let Some(mut node) = old[i].take() {
                for v in &mut node.inputs {
                    v.node = moved[v.node()];
                }
                self.nodes.push(node);
                let mut users = std::mem::take(&mut old_users[i]);
                users.retain(|&user| live[user]);
                users.iter_mut().for_each(|user| *user = moved[*user] as usize);
                users.sort_unstable();
                self.users.push(users);
            }
        }
        for (_, v) in &mut self.outputs {
            v.node = moved[v.node()];
        }
    }
}
