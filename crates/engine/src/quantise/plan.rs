//! What quantising will make of a model, before anything is written.

use std::collections::{HashMap, HashSet};

use pocketglm_graph::passes::{NormedLinears, normed_linears};
use pocketglm_tensor::{DType, Group, Packed, PackedFormat, TensorInfo};

use super::policy::{Assignment, Method, Policy};
use super::rotate::{Turn, pairs};
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
    /// Bytes in the file that is written: of a `.pglm` file those of the kernels' panels.
    pub bytes: u64,
    /// Bytes in memory when the model runs: quantised matrices are arranged for the kernels, with some padding.
    pub memory: u64,
    /// Whether its rows or columns are rotated.
    pub rotated: bool,
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
    /// What is not as the policy asks, beyond single tensors.
    pub warnings: Vec<String>,
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
    /// What is rotated, by name.
    pub turns: HashMap<String, Turn>,
}

/// The plan for a model under a policy, for a `.pglm` file or for `gguf`.
///
/// # Errors
/// [`Error::Policy`], [`Error::AlreadyQuantised`], [`Error::NoCalibration`].
pub(super) fn plan(
    subject: Subject<'_>,
    policy: &Policy,
    table: Option<&CalibrationTable>,
    force_requantise: bool,
    gguf: bool,
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
    let mut warnings = policy.shadowed(&candidates, subject.layers());
    let folds = settle_methods(
        subject,
        &candidates,
        &mut made,
        normed_linears(&graph),
        table,
        policy,
        &mut warnings,
    )?;
    let turns =
        if policy.rotate { rotations(subject, policy, &candidates, &mut made)? } else { HashMap::new() };
    let folded: HashSet<&str> = folds.iter().map(|f| f.norm.as_str()).collect();

    let mut tensors = Vec::new();
    for TensorInfo { name, shape, .. } in graph.weights().into_iter().chain(subject.others()) {
        let stored = info(name.clone())?;
        let made = made.remove(&name);
        let (to, method, note) = match made {
            Some(Assignment { dtype, method, note }) => (dtype, method, note),
            // A norm that takes up scales needs their precision, and so does a bias that is rotated.
            None if folded.contains(name.as_str()) || turns.contains_key(&name) => (DType::F32, None, None),
            None => (stored.dtype, None, None),
        };
        let rows = to.bytes(&shape).unwrap_or(0) as u64;
        // The head of a tied model is the embedding table, which then stays as it is and is packed besides.
        let (bytes, memory) = match (panel_bytes(to, &shape)?, subject.table(&name)) {
            (Some(panels), None) => (if gguf { rows } else { panels }, panels),
            (Some(panels), Some(true)) => (rows, rows + panels),
            _ => (rows, rows),
        };
        let bytes_before = stored.bytes() as u64;
        tensors.push(TensorPlan {
            rotated: turns.contains_key(&name),
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
    Ok(Planned { plan: QuantPlan { policy: policy.name.clone(), tensors, warnings }, folds, turns })
}

/// Bytes of a matrix as kernels read it, which is how `.pglm` files hold it; `None` for what is not quantised.
pub(super) fn panel_bytes(dtype: DType, shape: &[usize]) -> Result<Option<u64>> {
    match (PackedFormat::of(dtype), shape) {
        (Some(format), &[rows, k]) => Ok(Some(Packed::bytes_for(format, rows, k)? as u64)),
        _ => Ok(None),
    }
}

/// What a policy rotates: pairs of matrices neither of which stays in a type that the rotation would round once more.
fn rotations(
    subject: Subject<'_>,
    policy: &Policy,
    candidates: &[TensorInfo],
    made: &mut HashMap<String, Assignment>,
) -> Result<HashMap<String, Turn>> {
    let wrong = |what: &str| Error::Policy { policy: policy.name.clone(), what: what.into() };
    let Some(model) = subject.model() else {
        return Err(wrong("`rotate` is for models that answer, found a speech checkpoint"));
    };
    let stored: HashMap<&str, DType> = candidates.iter().map(|i| (i.name.as_str(), i.dtype)).collect();
    let mut turns = HashMap::new();
    for pair in pairs(model)? {
        let stays = [&pair.values, &pair.output].into_iter().find_map(|name| {
            let (from, to) = (*stored.get(name.as_str())?, made.get(name)?.dtype);
            (from == to && to != DType::F32).then(|| format!("not rotated: `{name}` stays {to}"))
        });
        match stays {
            None => turns.extend(pair.turns()),
            Some(why) => {
                made.get_mut(&pair.values).into_iter().for_each(|a| add_note(a, why.clone()));
            }
        }
    }
    match turns.is_empty() {
        true => Err(wrong(
            "`rotate` finds nothing to rotate: no pair of matrices around attention gets other types",
        )),
        false => Ok(turns),
    }
}

fn add_note(a: &mut Assignment, note: String) {
    a.note = Some(a.note.take().map_or(note.clone(), |before| format!("{before}; {note}")));
}

/// Replaces methods that cannot be had for a tensor by a search, with a note, and gives the norms that take up scales.
///
/// # Errors
/// [`Error::NoCalibration`], and [`Error::Policy`] where no tensor that GPTQ or AWQ is asked for can have it.
fn settle_methods(
    subject: Subject<'_>,
    candidates: &[TensorInfo],
    made: &mut HashMap<String, Assignment>,
    normed: Vec<NormedLinears>,
    table: Option<&CalibrationTable>,
    policy: &Policy,
    warnings: &mut Vec<String>,
) -> Result<Vec<NormedLinears>> {
    // A table of which rows are read has no input, and is never meant.
    let meant: Vec<&String> =
        candidates.iter().map(|i| &i.name).filter(|n| subject.table(n).is_none()).collect();
    let asked = |made: &HashMap<String, Assignment>, method: Method| {
        meant.iter().filter(|name| made.get(**name).is_some_and(|a| a.method == Some(method))).count()
    };
    for info in candidates {
        let Some(a) = made.get_mut(&info.name) else { continue };
        let whole = matches!(a.dtype, DType::Affine(f) if f.group() == Group::Tensor);
        if let Some(method @ (Method::Search | Method::Gptq)) = a.method.filter(|_| whole) {
            a.method = Some(Method::Round);
            add_note(a, format!("round for {method}: one scale for the whole matrix"));
        }
    }
    let wanted = [Method::Gptq, Method::Awq].map(|method| (method, asked(made, method)));
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
    for (method, wanted) in wanted.into_iter().filter(|(_, wanted)| *wanted > 0) {
        let got = asked(made, method);
        let why = meant.iter().filter_map(|name| Some((name, made.get(*name)?.note.as_ref()?)));
        let why = why.into_iter().find(|(_, note)| note.contains(&format!("for {method}:")));
        let why = why.map(|(name, note)| format!("; `{name}`: {note}")).unwrap_or_default();
        if got == 0 {
            let hint = if method == Method::Gptq { " (`calibrate --second-moments`)" } else { "" };
            let what = format!(
                "{method} is possible for none of the {wanted} tensors that it is asked for{why}{hint}"
            );
            return Err(Error::Policy { policy: policy.name.clone(), what });
        }
        if got < wanted {
            warnings.push(format!("{method} makes {got} of the {wanted} tensors that it is asked for{why}"));
        }
    }
    Ok(folds)
}

fn replace(a: &mut Assignment, method: Method, why: &str) {
    a.method = Some(Method::Search);
    add_note(a, format!("search for {method}: {why}"));
}
