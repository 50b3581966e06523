//! Precision policies: which tensor becomes what, as ordered rules over tensor names.

use std::fmt;
use std::path::Path;

use pocketglm_tensor::{Affine, Block, DType, Group, TensorInfo};
use serde_json::{Map, Value, json};

use crate::picture::read_capped;
use crate::{Error, Result};

/// Largest policy file.
const MAX_POLICY_BYTES: u64 = 1 << 20;
/// Most rules, so that a file cannot take long.
const MAX_RULES: usize = 1000;
/// Stand for the first and the last decoder layer in patterns.
const FIRST: &str = "{first}";
const LAST: &str = "{last}";

/// The policies that have names, besides every format's own name and `keep`.
pub const BUILT_IN: &[&str] = &["int8", "int4", "int2"];

/// How the numbers of a quantised tensor are chosen.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Method {
    /// Plain rounding.
    Round,
    /// The scale of least squared error, weighted by the activations where they are known.
    Search,
    /// Error feedback over the activations' second moments.
    Gptq,
    /// Scales of input channels folded into the norm before, then a search.
    Awq,
}

impl Method {
    /// Every method.
    pub const ALL: [Method; 4] = [Method::Round, Method::Search, Method::Gptq, Method::Awq];

    /// The name in policies and on the command line.
    pub const fn name(self) -> &'static str {
        match self {
            Method::Round => "round",
            Method::Search => "search",
            Method::Gptq => "gptq",
            Method::Awq => "awq",
        }
    }

    /// The method of this name.
    pub fn from_name(name: &str) -> Option<Method> {
        Method::ALL.into_iter().find(|m| m.name() == name)
    }

    /// What a format is made with unless something else is said: eight bits gain nothing from a search.
    fn of(dtype: DType) -> Method {
        match dtype {
            DType::Affine(a) if a.bits() < 8 && a.group() != Group::Tensor => Method::Search,
            DType::Block(b) if b != Block::Q8_0 => Method::Search,
            _ => Method::Round,
        }
    }
}

impl fmt::Display for Method {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// What a rule makes of its tensors.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Format {
    /// They stay as they are stored.
    Keep,
    /// They get this type, or a near one where their rows do not fit it.
    To(DType),
}

/// One rule of a [`Policy`].
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Rule {
    /// Patterns of tensor names: `*` stands for any characters, `{first}` and `{last}` for the numbers of the first and
    /// last decoder layer.
    pub tensors: Vec<String>,
    /// What they become.
    pub format: Format,
    /// How; by the format where it is not said.
    pub method: Option<Method>,
    /// Whether a model without such tensors is no error.
    pub optional: bool,
}

/// Ordered rules: the first that names a tensor decides; a tensor that none names stays as it is.
///
/// Rules concern matrices of linear layers, embedding tables, and a speech encoder's convolutions with enough numbers under
/// their kernels; the positional one takes `int8-row` alone. Norms, biases, position tables, the patch embedding and
/// the first convolution over samples always stay.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Policy {
    /// What reports call it.
    pub name: String,
    /// The rules.
    pub rules: Vec<Rule>,
    /// Whether attention's values are rotated by Hadamard matrices, which spreads outliers and changes nothing in f32.
    pub rotate: bool,
}

/// What becomes of one matrix.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Assignment {
    /// The new type.
    pub dtype: DType,
    /// How it is made; `None` where nothing is quantised.
    pub method: Option<Method>,
    /// Why it is not what the rule says, where it is not.
    pub note: Option<String>,
}

const INT8: DType = affine(8, Group::G128, true);
const INT4: DType = affine(4, Group::G64, true);
const INT2: DType = affine(2, Group::G32, false);

const fn affine(bits: u8, group: Group, symmetric: bool) -> DType {
    match Affine::new(bits, group, symmetric) {
        Some(affine) => DType::Affine(affine),
        None => DType::F32,
    }
}

impl Policy {
    /// A built-in policy: `keep`, `int8`, `int4`, `int2`, or the name of a format for all matrices.
    ///
    /// `int4` and `int2` are mixed: head, embedding, the first and the last decoder layer and `down_proj` have twice the
    /// bits of the others, and the vision encoder has eight.
    pub fn named(name: &str) -> Option<Policy> {
        let rule = |tensors: &[&str], format| Rule {
            tensors: tensors.iter().map(|t| t.to_string()).collect(),
            format,
            method: None,
            optional: true,
        };
        let all = |format| vec![rule(&["*"], format)];
        let mixed = |low, high| {
            let outer = ["lm_head.*", "model.language_model.embed_tokens.*"];
            let layers = ["model.language_model.layers.{first}.*", "model.language_model.layers.{last}.*"];
            vec![
                rule(&["model.visual.*"], Format::To(INT8)),
                rule(&[&outer[..], &layers, &["*.mlp.down_proj.weight"]].concat(), Format::To(high)),
                rule(&["*"], Format::To(low)),
            ]
        };
        let rules = match name {
            "keep" => all(Format::Keep),
            "int8" => all(Format::To(INT8)),
            "int4" => mixed(INT4, INT8),
            "int2" => mixed(INT2, INT4),
            other => {
                let dtype = DType::from_name(other)?;
                return (dtype.is_float() || dtype.is_quantised()).then(|| Policy {
                    name: dtype.name().into(),
                    rules: all(Format::To(dtype)),
                    rotate: false,
                });
            }
        };
        Some(Policy { name: name.into(), rules, rotate: false })
    }

    /// A built-in policy by name, or a policy file.
    ///
    /// # Errors
    /// [`Error::Policy`] where `spec` is neither a name nor a file, and as [`Policy::from_json`].
    pub fn load(spec: &str) -> Result<Policy> {
        if let Some(policy) = Policy::named(spec) {
            return Ok(policy);
        }
        if !Path::new(spec).exists() {
            let what = format!(
                "neither a file nor a name: expected {}, keep, or a format such as int4-g64, Q4_K, Q8_0 or F16",
                BUILT_IN.join(", ")
            );
            return Err(Error::Policy { policy: spec.into(), what });
        }
        Policy::from_json(spec, &read_capped(Path::new(spec), MAX_POLICY_BYTES)?)
    }

    /// Reads `{"name": .., "rotate": .., "rules": [{"tensors": pattern or list, "format": .., "method": ..,
    /// "optional": ..}, ..]}`; all but `rules`, `tensors` and `format` may be left out. `place` is what errors call it.
    ///
    /// # Errors
    /// [`Error::Policy`] with the rule, what was wanted and what was found.
    pub fn from_json(place: &str, json: &[u8]) -> Result<Policy> {
        let wrong = |what: String| Error::Policy { policy: place.into(), what };
        let value: Value = serde_json::from_slice(json).map_err(|e| wrong(format!("not JSON: {e}")))?;
        let top = value.as_object().ok_or_else(|| wrong("expected an object with `rules`".into()))?;
        only(top, &["name", "rotate", "rules"]).map_err(wrong)?;
        let name = match top.get("name") {
            None => place,
            Some(name) => name.as_str().ok_or_else(|| wrong("`name` must be a string".into()))?,
        };
        let rotate = flag(top, "rotate").map_err(wrong)?;
        let rules = top.get("rules").and_then(Value::as_array);
        let rules = rules.ok_or_else(|| wrong("expected a list `rules`".into()))?;
        if rules.is_empty() || rules.len() > MAX_RULES {
            return Err(wrong(format!("{} rules, expected from 1 to {MAX_RULES}", rules.len())));
        }
        let read = |(i, value)| Rule::from_json(value).map_err(|what| wrong(format!("rules[{i}]: {what}")));
        let rules = rules.iter().enumerate().map(read).collect::<Result<_>>()?;
        Ok(Policy { name: name.into(), rules, rotate })
    }

    /// The policy as [`Policy::from_json`] reads it.
    pub fn to_json(&self) -> String {
        let rules: Vec<Value> = self.rules.iter().map(Rule::to_json).collect();
        let mut object = json!({ "name": self.name, "rules": rules });
        if self.rotate {
            object["rotate"] = json!(true);
        }
        object.to_string()
    }

    /// The same with one method for every rule.
    pub fn with_method(mut self, method: Method) -> Policy {
        self.rules.iter_mut().for_each(|rule| rule.method = Some(method));
        self
    }

    /// Which rules decide nothing because earlier ones name all that they name; optional ones may.
    pub(crate) fn shadowed(&self, matrices: &[TensorInfo], layers: usize) -> Vec<String> {
        let mut taken = vec![false; matrices.len()];
        let mut said = Vec::new();
        for (i, rule) in self.rules.iter().enumerate() {
            let patterns = rule.patterns(layers);
            let mut decides = false;
            for (matrix, taken) in matrices.iter().zip(&mut taken) {
                let free = !*taken && patterns.iter().any(|pattern| matches(pattern, &matrix.name));
                *taken |= free;
                decides |= free;
            }
            if !decides && !rule.optional {
                said.push(format!(
                    "rules[{i}] ({}) decides nothing: earlier rules name all that it names",
                    patterns.join(", ")
                ));
            }
        }
        said
    }

    /// What becomes of each of `matrices`, in a model of so many decoder layers.
    ///
    /// # Errors
    /// [`Error::Policy`] for a rule that names no matrix.
    pub(crate) fn assign(&self, matrices: &[TensorInfo], layers: usize) -> Result<Vec<Assignment>> {
        let rules: Vec<Vec<String>> = self.rules.iter().map(|rule| rule.patterns(layers)).collect();
        let names = |patterns: &[String], name: &str| patterns.iter().any(|pattern| matches(pattern, name));
        for (i, (rule, patterns)) in self.rules.iter().zip(&rules).enumerate() {
            if !rule.optional && !matrices.iter().any(|m| names(patterns, &m.name)) {
                let what = format!(
                    "rules[{i}] names no tensor that can be quantised: {}; the model has {} such as {}",
                    patterns.join(", "),
                    matrices.len(),
                    matrices.first().map_or("", |m| &m.name)
                );
                return Err(Error::Policy { policy: self.name.clone(), what });
            }
        }
        let assign = |info: &TensorInfo| {
            let mut named = self.rules.iter().zip(&rules).filter(|(_, patterns)| names(patterns, &info.name));
            match named.next() {
                Some((rule, _)) => assignment(info, rule),
                None => Assignment { dtype: info.dtype, method: None, note: None },
            }
        };
        Ok(matrices.iter().map(assign).collect())
    }
}

/// What one rule makes of one matrix.
fn assignment(info: &TensorInfo, rule: &Rule) -> Assignment {
    let wanted = match rule.format {
        Format::Keep => info.dtype,
        Format::To(dtype) => dtype,
    };
    let dtype = fitting(wanted, info.shape.last().copied().unwrap_or(1));
    let method =
        (dtype != info.dtype && dtype.is_quantised()).then(|| rule.method.unwrap_or(Method::of(dtype)));
    let note = (dtype != wanted)
        .then(|| format!("{wanted} has no rows of {}", info.shape.last().copied().unwrap_or(1)));
    Assignment { dtype, method, note }
}

/// `dtype`, or what takes its place for rows of `k` values that it cannot hold: the same choices as llama.cpp's.
fn fitting(dtype: DType, k: usize) -> DType {
    if dtype.row_bytes(k).is_some() {
        return dtype;
    }
    let other = match dtype {
        DType::Block(Block::Q2_K | Block::Q3_K | Block::IQ4_XS) => Block::IQ4_NL,
        DType::Block(Block::Q4_K) => Block::Q5_0,
        DType::Block(Block::Q5_K) => Block::Q5_1,
        DType::Block(Block::Q6_K) => Block::Q8_0,
        _ => return DType::F16,
    };
    if DType::Block(other).row_bytes(k).is_some() { DType::Block(other) } else { DType::F16 }
}

/// Refuses keys that are not known: a misspelt one would silently do nothing.
fn only(object: &Map<String, Value>, known: &[&str]) -> Result<(), String> {
    match object.keys().find(|key| !known.contains(&key.as_str())) {
        Some(key) => Err(format!("unknown key {key:?}, expected {}", known.join(", "))),
        None => Ok(()),
    }
}

/// A key that is true or false, and false where it is not there.
fn flag(object: &Map<String, Value>, key: &str) -> Result<bool, String> {
    match object.get(key) {
        None => Ok(false),
        Some(v) => v.as_bool().ok_or_else(|| format!("`{key}` must be true or false, found {v}")),
    }
}

impl Rule {
    fn from_json(value: &Value) -> Result<Rule, String> {
        let object = value.as_object().ok_or("expected an object")?;
        only(object, &["tensors", "format", "method", "optional"])?;
        let text = |v: &Value, what: &str| {
            v.as_str().map(str::to_owned).ok_or_else(|| format!("{what} must be a string, found {v}"))
        };
        let tensors = match object.get("tensors") {
            Some(Value::Array(list)) => {
                list.iter().map(|v| text(v, "`tensors`")).collect::<Result<Vec<_>, _>>()?
            }
            Some(one) => vec![text(one, "`tensors`")?],
            None => return Err("expected `tensors`".into()),
        };
        if tensors.is_empty() || tensors.len() > MAX_RULES {
            return Err(format!("{} patterns, expected from 1 to {MAX_RULES}", tensors.len()));
        }
        let format = text(object.get("format").ok_or("expected `format`")?, "`format`")?;
        let format = match format.as_str() {
            "keep" => Format::Keep,
            name => match DType::from_name(name) {
                Some(dtype) if dtype.is_float() || dtype.is_quantised() => Format::To(dtype),
                _ => return Err(format!("unknown format {name:?}")),
            },
        };
        let method = match object.get("method") {
            None => None,
            Some(name) => Some(Method::from_name(&text(name, "`method`")?).ok_or_else(|| {
                let known = Method::ALL.map(Method::name).join(", ");
                format!("unknown method {name}, expected {known}")
            })?),
        };
        Ok(Rule { tensors, format, method, optional: flag(object, "optional")? })
    }

    fn to_json(&self) -> Value {
        let format = match self.format {
            Format::Keep => "keep",
            Format::To(dtype) => dtype.name(),
        };
        let mut object = Map::new();
        object.insert("tensors".into(), json!(self.tensors));
        object.insert("format".into(), json!(format));
        if let Some(method) = self.method {
            object.insert("method".into(), json!(method.name()));
        }
        if self.optional {
            object.insert("optional".into(), json!(true));
        }
        Value::Object(object)
    }

    fn patterns(&self, layers: usize) -> Vec<String> {
        let last = layers.saturating_sub(1).to_string();
        self.tensors.iter().map(|t| t.replace(FIRST, "0").replace(LAST, &last)).collect()
    }
}

/// Whether `pattern`, in which `*` stands for any characters, is all of `name`. Takes at most the product of their
/// lengths.
pub(super) fn matches(pattern: &str, name: &str) -> bool {
    let (pattern, name) = (pattern.as_bytes(), name.as_bytes());
    let (mut p, mut n) = (0, 0);
    // Where the last star stands, and how far it reaches so far.
    let mut star: Option<(usize, usize)> = None;
    while let Some(&byte) = name.get(n) {
        match pattern.get(p) {
            Some(b'*') => {
                star = Some((p, n));
                p += 1;
            }
            Some(&wanted) if wanted == byte => {
                p += 1;
                n += 1;
            }
            _ => match star {
                Some((at, reach)) => {
                    star = Some((at, reach + 1));
                    (p, n) = (at + 1, reach + 1);
                }
                None => return false,
            },
        }
    }
    pattern.get(p..).unwrap_or_default().iter().all(|&b| b == b'*')
}

#[cfg(test)]
mod tests {
    use super::*;

    fn info(name: &str, k: usize) -> TensorInfo {
        TensorInfo { name: name.into(), dtype: DType::BF16, shape: vec![8, k] }
    }

    fn error(json: &str) -> String {
        Policy::from_json("p", json.as_bytes()).unwrap_err().to_string()
    }

    #[test]
    fn stars_stand_for_any_characters() {
        for (pattern, name, wanted) in [
            ("*", "", true),
            ("", "", true),
            ("", "a", false),
            ("a*c", "abbc", true),
            ("a*c", "abcb", false),
            ("*.down.*", "x.1.down.weight", true),
            ("*a*a*", "xaxa", true),
            ("*a*a*", "xa", false),
            ("a", "ab", false),
            ("ab", "a", false),
        ] {
            assert_eq!(matches(pattern, name), wanted, "{pattern} {name}");
        }
        let hostile = "*a".repeat(500);
        assert!(!matches(&hostile, &"a".repeat(400)));
    }

    #[test]
    fn the_first_rule_that_names_a_tensor_decides() {
        let policy = Policy::from_json(
            "p",
            br#"{"rules": [{"tensors": ["b*", "c"], "format": "keep"}, {"tensors": "*", "format": "Q4_K", "method": "round"}]}"#,
        )
        .unwrap();
        let made = policy.assign(&[info("a", 512), info("b1", 512), info("a2", 13696 + 16)], 1).unwrap();
        let formats: Vec<&str> = made.iter().map(|a| a.dtype.name()).collect();
        assert_eq!(formats, ["Q4_K", "BF16", "F16"]);
        assert_eq!((made[0].method, made[1].method, made[2].method), (Some(Method::Round), None, None));
        assert_eq!(made[2].note.as_deref(), Some("Q4_K has no rows of 13712"));
    }

    #[test]
    fn rows_that_a_block_format_cannot_hold_fall_back_as_in_llama_cpp() {
        for (wanted, found) in [
            ("Q4_K", "Q5_0"),
            ("Q5_K", "Q5_1"),
            ("Q6_K", "Q8_0"),
            ("Q2_K", "IQ4_NL"),
            ("Q3_K", "IQ4_NL"),
            ("IQ4_XS", "IQ4_NL"),
            ("Q8_0", "Q8_0"),
            ("int4-g128", "int4-g128"),
        ] {
            assert_eq!(fitting(DType::from_name(wanted).unwrap(), 13696).name(), found, "{wanted}");
        }
        assert_eq!(fitting(DType::Block(Block::Q8_0), 40), DType::F16);
    }

    #[test]
    fn a_rule_that_names_nothing_is_an_error_unless_it_is_optional() {
        let json = br#"{"name": "mine", "rules": [{"tensors": "*", "format": "keep"}, {"tensors": "lm_haed.*", "format": "Q8_0"}]}"#;
        let error =
            Policy::from_json("p", json).unwrap().assign(&[info("lm_head.weight", 32)], 1).unwrap_err();
        assert_eq!(
            error.to_string(),
            "policy `mine`: rules[1] names no tensor that can be quantised: lm_haed.*; \
             the model has 1 such as lm_head.weight"
        );
        for name in BUILT_IN {
            Policy::named(name).unwrap().assign(&[info("a", 32)], 1).unwrap();
        }
    }

    #[test]
    fn a_rule_that_comes_too_late_is_named() {
        let json = br#"{"rules": [{"tensors": "a*", "format": "Q8_0"}, {"tensors": "*", "format": "keep"},
            {"tensors": "a.down", "format": "Q4_0"}, {"tensors": "c", "format": "keep", "optional": true}]}"#;
        let policy = Policy::from_json("p", json).unwrap();
        let all = [info("a.down", 32), info("b", 32)];
        assert_eq!(
            policy.shadowed(&all, 1),
            ["rules[2] (a.down) decides nothing: earlier rules name all that it names"]
        );
        assert_eq!(policy.shadowed(&all[1..], 1).len(), 2, "the first one names nothing as well");
        for name in BUILT_IN {
            assert!(Policy::named(name).unwrap().shadowed(&all, 1).is_empty());
        }
    }

    #[test]
    fn the_mixed_policy_has_more_bits_where_it_matters() {
        let layer = |i: usize, what: &str| info(&format!("model.language_model.layers.{i}.{what}"), 64);
        let all = [
            info("model.language_model.embed_tokens.weight", 64),
            layer(0, "mlp.gate_up_proj.weight"),
            layer(1, "mlp.gate_up_proj.weight"),
            layer(1, "mlp.down_proj.weight"),
            layer(11, "self_attn.q_proj.weight"),
            info("model.visual.blocks.1.mlp.down_proj.weight", 64),
        ];
        let formats = |name: &str| -> Vec<&str> {
            let made = Policy::named(name).unwrap().assign(&all, 12).unwrap();
            made.iter().map(|a| a.dtype.name()).collect()
        };
        assert_eq!(
            formats("int4"),
            ["int8-g128", "int8-g128", "int4-g64", "int8-g128", "int8-g128", "int8-g128"]
        );
        assert_eq!(formats("int2")[2..], ["int2-g32-asym", "int4-g64", "int4-g64", "int8-g128"]);
    }

    #[test]
    fn policies_are_read_back() {
        for name in BUILT_IN.iter().chain(&["Q4_K", "keep"]) {
            let mut policy = Policy::named(name).unwrap().with_method(Method::Gptq);
            for rotate in [false, true] {
                policy.rotate = rotate;
                assert_eq!(Policy::from_json("x", policy.to_json().as_bytes()).unwrap(), policy);
            }
        }
        assert_eq!(Policy::named("I64"), None);
    }

    #[test]
    fn what_does_not_fit_is_named() {
        assert!(error("[").contains("not JSON"));
        assert!(error("[]").contains("an object"));
        assert!(error(r#"{"rules": []}"#).contains("0 rules"));
        assert!(error(r#"{"rotate": 1, "rules": []}"#).contains("`rotate` must be true or false"));
        assert!(error(r#"{"rule": []}"#).contains(r#"unknown key "rule""#));
        let rule = |inside: &str| error(&format!(r#"{{"rules": [{{{inside}}}]}}"#));
        assert!(rule(r#""format": "keep""#).contains("rules[0]: expected `tensors`"));
        assert!(rule(r#""tensors": "*", "format": "Q4_X""#).contains(r#"unknown format "Q4_X""#));
        assert!(rule(r#""tensors": "*", "format": "U8""#).contains("unknown format"));
        assert!(rule(r#""tensors": "*", "format": "Q8_0", "method": "magic""#).contains("unknown method"));
        assert!(rule(r#""tensors": 3, "format": "Q8_0""#).contains("must be a string"));
        assert!(rule(r#""tensors": [], "format": "Q8_0""#).contains("0 patterns"));
        let missing = Policy::load("no-such-policy").unwrap_err().to_string();
        assert!(missing.contains("neither a file nor a name"), "{missing}");
    }
}
