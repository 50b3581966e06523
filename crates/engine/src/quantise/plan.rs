//! What quantising will make of a model, before anything is written.

use std::collections::{HashMap, HashSet};

use pocketglm_graph::passes::{NormedLinears, normed_linears};
use pocketglm_tensor::{DType, Packed, PackedFormat, TensorInfo};

use super::policy::{Assignment, Method, Policy};
use super::subject::Subject;
use super::table::CalibrationTable;
use crate::{Error, Result};

/// What becomes of one tensor.
#[derive(Clone, Debug)]
pub struct TensorPlan {
    /// Its name.
    pub name: String,
    /// Its shape.
    pub shape: Vec<usize>,
    /// The type it has.
    pub from: DType,
    /// The type it gets.
    pub to: DType,
    /// How its numbers are chosen; `None` where nothing is quantised.
    pub method: Option<Method>,
    /// Bytes in the file that is read.
    pub bytes_before: u64,
    /// Bytes in the file that is written.
    pub bytes: u64,
    /// Bytes in memory when the model runs: quantised matrices are arranged for the kernels, with some padding.
    pub memory: u64,
    /// What is not as the policy says, and why.
    pub note: Option<String>,
}

impl TensorPlan {
    /// Number of values.
    pub fn elements(&self) -> u64 {
        self.shape.iter().map(|&d| d as u64).product()
    }

    /// Stored bits of a value, scales included.
    pub fn bits_per_weight(&self) -> f64 {
        self.bytes as f64 * 8.0 / self.elements().max(1) as f64
    }
}

/// What becomes of a model.
#[derive(Clone, Debug)]
pub struct QuantPlan {
    /// The policy's name.
    pub policy: String,
    /// The tensors in the order in which they are written.
    pub tensors: Vec<TensorPlan>,
}

impl QuantPlan {
    fn sum(&self, of: impl Fn(&TensorPlan) -> u64) -> u64 {
        self.tensors.iter().map(of).sum()
    }

    /// Number of values.
    pub fn elements(&self) -> u64 {
        self.sum(TensorPlan::elements)
    }

    /// Bytes of all tensors as they are.
    pub fn bytes_before(&self) -> u64 {
        self.sum(|t| t.bytes_before)
    }

    /// Bytes of all tensors as they will be.
    pub fn bytes(&self) -> u64 {
        self.sum(|t| t.bytes)
    }

    /// Bytes of all tensors in memory when the model runs.
    pub fn memory(&self) -> u64 {
        self.sum(|t| t.memory)
    }

    /// Stored bits of a value, scales included.
    pub fn bits_per_weight(&self) -> f64 {
        self.bytes() as f64 * 8.0 / self.elements().max(1) as f64
    }
}

/// The plan, and the norms that take up scales.
pub(super) struct Planned {
    pub plan: QuantPlan,
    /// The norms whose linear layers are all made by [`Method::Awq`].
    pub folds: Vec<NormedLinears>,
}

/// The plan for a model under a policy.
///
/// # Errors
/// [`Error::Policy`], [`Error::AlreadyQuantised`], [`Error::NoCalibration`].
pub(super) fn plan(
    subject: Subject<'_>,
    policy: &Policy,
    table: Option<&CalibrationTable>,
    force_requantise: bool,
) -> Result<Planned> {
    let graph = subject.graph()?;
    let info = |name: String| -> Result<TensorInfo> {
        let missing = || pocketglm_tensor::Error::Missing { name: name.clone(), place: "the model".into() };
        Ok(subject.weights().info(&name).ok_or_else(missing)?)
    };
    let candidates: Vec<TensorInfo> =
        subject.matrices(&graph).into_iter().map(info).collect::<Result<_>>()?;
    let made = policy.assign(&candidates, subject.layers())?;
    let mut made: HashMap<String, Assignment> = candidates.iter().map(|i| i.name.clone()).zip(made).collect();
    for info in &candidates {
        if let Some(assignment) = made.get_mut(&info.name)
            && !subject.takes(&info.name, assignment.dtype)
        {
            let note = Some(format!("has no kernel for {}", assignment.dtype));
            *assignment = Assignment { dtype: info.dtype, method: None, note };
        }
    }

    for info in &candidates {
        let Some(Assignment { dtype, .. }) = made.get(&info.name) else { continue };
        if info.dtype.is_quantised() && *dtype != info.dtype && !force_requantise {
            return Err(Error::AlreadyQuantised {
                place: subject.place(&info.name),
                tensor: info.name.clone(),
                found: info.dtype,
                wanted: *dtype,
            });
        }
    }
    let folds = settle_methods(&candidates, &mut made, normed_linears(&graph), table)?;
    let folded: HashSet<&str> = folds.iter().map(|f| f.norm.as_str()).collect();

    let mut tensors = Vec::new();
    for TensorInfo { name, shape, .. } in graph.weights().into_iter().chain(subject.others()) {
        let stored = info(name.clone())?;
        let made = made.remove(&name);
        let (to, method, note) = match made {
            Some(Assignment { dtype, method, note }) => (dtype, method, note),
            // A norm that takes up scales needs their precision.
            None if folded.contains(name.as_str()) => (DType::F32, None, None),
            None => (stored.dtype, None, None),
        };
        let bytes = to.bytes(&shape).unwrap_or(0) as u64;
        // The head of a tied model is the embedding table, which then stays as it is and is packed besides.
        let memory = match (PackedFormat::of(to), shape.as_slice(), subject.table(&name)) {
            (Some(format), &[rows, k], None) => Packed::bytes_for(format, rows, k)? as u64,
            (Some(format), &[rows, k], Some(true)) => bytes + Packed::bytes_for(format, rows, k)? as u64,
            _ => bytes,
        };
        let bytes_before = stored.bytes() as u64;
        tensors.push(TensorPlan {
            name,
            shape,
            from: stored.dtype,
            to,
            method,
            bytes_before,
            bytes,
            memory,
            note,
        });
    }
    Ok(Planned { plan: QuantPlan { policy: policy.name.clone(), tensors }, folds })
}

/// Replaces methods that cannot be had for a tensor by a search, with a note, and gives the norms that take up scales.
fn settle_methods(
    candidates: &[TensorInfo],
    made: &mut HashMap<String, Assignment>,
    normed: Vec<NormedLinears>,
    table: Option<&CalibrationTable>,
) -> Result<Vec<NormedLinears>> {
    for info in candidates {
        let Some(a) = made.get_mut(&info.name) else { continue };
        let Some(method @ (Method::Gptq | Method::Awq)) = a.method else { continue };
        let Some(table) = table else {
            return Err(Error::NoCalibration { method: method.name(), tensor: info.name.clone() });
        };
        let lacking = match method {
            _ if !table.knows(&info.name) => Some("no statistics of its input"),
            Method::Gptq if !table.has_second_moments(&info.name) => {
                Some("no matrix of second moments of its input")
            }
            _ => None,
        };
        if let Some(lacking) = lacking {
            replace(a, method, lacking);
        }
    }
    let awq = |made: &HashMap<String, Assignment>, name: &String| {
        made.get(name).is_some_and(|a| a.method == Some(Method::Awq))
    };
    let folds: Vec<NormedLinears> =
        normed.into_iter().filter(|n| n.weights.iter().all(|w| awq(made, w))).collect();
    let folded: HashSet<&String> = folds.iter().flat_map(|f| &f.weights).collect();
    for info in candidates.iter().filter(|i| !folded.contains(&i.name)) {
        if let Some(a) = made.get_mut(&info.name).filter(|a| a.method == Some(Method::Awq)) {
            replace(a, Method::Awq, "no norm before it that could take up the scales");
        }
    }
    Ok(folds)
}

fn replace(a: &mut Assignment, method: Method, why: &str) {
    a.method = Some(Method::Search);
    let note = format!("search for {method}: {why}");
    a.note = Some(a.note.take().map_or(note.clone(), |before| format!("{before}; {note}")));
}
