use std::collections::HashMap;

use pocketglm_tensor::{Packed, Tensor, TensorInfo, WeightSource};

use crate::error::shown;
use crate::{Error, Result};

/// One way in which checkpoints of a family name their tensors.
///
/// A stored name takes the first rule whose stored prefix it begins with, and keeps its rest; a name that
/// no rule fits stays as it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct NameRules {
    /// What messages call the layout.
    pub layout: &'static str,
    /// Pairs (stored prefix, canonical prefix).
    pub prefixes: &'static [(&'static str, &'static str)],
}

impl NameRules {
    /// The canonical name of a stored tensor.
    pub fn canonical(&self, stored: &str) -> String {
        for (from, to) in self.prefixes {
            if let Some(rest) = stored.strip_prefix(from) {
                return format!("{to}{rest}");
            }
        }
        stored.to_owned()
    }

    /// The stored names that could have this canonical name.
    fn candidates<'a>(&'a self, canonical: &'a str) -> impl Iterator<Item = String> + 'a {
        let by_rule = self
            .prefixes
            .iter()
            .filter_map(move |(from, to)| canonical.strip_prefix(to).map(|rest| format!("{from}{rest}")));
        // A rule may stand behind another that takes the name first, so each is tried forwards.
        by_rule.chain(std::iter::once(canonical.to_owned())).filter(move |s| self.canonical(s) == canonical)
    }

    /// The stored name of a canonical one, where `source` has it.
    fn stored<W: WeightSource + ?Sized>(&self, source: &W, canonical: &str) -> Option<String> {
        self.candidates(canonical).find(|name| source.info(name).is_some())
    }

    /// The first of `layouts` under which `source` has every tensor of `wanted` (canonical names).
    ///
    /// # Errors
    /// [`Error::Layout`] where none fits.
    pub fn detect<W: WeightSource + ?Sized>(
        source: &W,
        layouts: &[NameRules],
        wanted: &[&str],
    ) -> Result<NameRules> {
        let lacks = |rules: &NameRules| wanted.iter().find(|name| rules.stored(source, name).is_none());
        if let Some(rules) = layouts.iter().find(|rules| lacks(rules).is_none()) {
            return Ok(*rules);
        }
        let mut names: Vec<String> = source.tensors().into_iter().map(|t| shown(&t.name)).collect();
        let count = names.len();
        names.sort();
        names.truncate(3);
        // What the best-known layout lacks says most.
        let lacking = layouts.first().and_then(lacks).copied().unwrap_or_default();
        Err(Error::Layout {
            place: place_of(source),
            tried: layouts.iter().map(|l| l.layout).collect::<Vec<_>>().join(", "),
            wanted: format!("`{lacking}`"),
            found: format!("{count} tensors such as {names:?}"),
        })
    }
}

/// A source under other names. Tensors keep the order of the source.
#[derive(Clone, Debug)]
pub struct Renamed<W> {
    source: W,
    rules: NameRules,
}

impl<W: WeightSource> Renamed<W> {
    /// Puts `source` under canonical names.
    ///
    /// # Errors
    /// [`Error::Duplicate`] where two stored names have the same canonical one.
    pub fn new(source: W, rules: NameRules) -> Result<Renamed<W>> {
        let mut stored_by_canonical: HashMap<String, String> = HashMap::new();
        for info in source.tensors() {
            let canonical = rules.canonical(&info.name);
            if let Some(first) = stored_by_canonical.insert(canonical.clone(), info.name.clone()) {
                return Err(Error::Duplicate {
                    tensor: shown(&canonical),
                    first: format!("`{}`", shown(&first)),
                    second: format!("`{}`", shown(&info.name)),
                });
            }
        }
        Ok(Renamed { source, rules })
    }

    /// The source under its own names.
    pub fn source(&self) -> &W {
        &self.source
    }

    /// The rules in force.
    pub fn rules(&self) -> &NameRules {
        &self.rules
    }

    /// The name in the source of a canonical name, where the source has that tensor.
    pub fn stored_name(&self, canonical: &str) -> Option<String> {
        self.rules.stored(&self.source, canonical)
    }
}

impl<W: WeightSource> WeightSource for Renamed<W> {
    fn tensors(&self) -> Vec<TensorInfo> {
        let rename = |info: TensorInfo| TensorInfo { name: self.rules.canonical(&info.name), ..info };
        self.source.tensors().into_iter().map(rename).collect()
    }

    fn info(&self, name: &str) -> Option<TensorInfo> {
        let stored = self.stored_name(name)?;
        self.source.info(&stored).map(|info| TensorInfo { name: name.to_owned(), ..info })
    }

    fn packed(&self, name: &str) -> pocketglm_tensor::Result<Option<Packed>> {
        match self.stored_name(name) {
            Some(stored) => self.source.packed(&stored),
            None => Ok(None),
        }
    }

    fn tensor(&self, name: &str) -> pocketglm_tensor::Result<Tensor> {
        let mut missing = None;
        for stored in self.rules.candidates(name) {
            match self.source.tensor(&stored) {
                Err(pocketglm_tensor::Error::Missing { place, .. }) => missing = Some(place),
                // The error of a tensor that is there but cannot be had bears the stored name, which is
                // the one to search for in the file.
                other => return other,
            }
        }
        let place = missing.unwrap_or_else(|| place_of(&self.source));
        Err(pocketglm_tensor::Error::Missing { name: shown(name), place })
    }
}

/// What a source calls itself: the contract has it named in the error for a tensor that is not there.
pub(crate) fn place_of<W: WeightSource + ?Sized>(source: &W) -> String {
    match source.tensor("") {
        Err(pocketglm_tensor::Error::Missing { place, .. }) => place,
        _ => "the weights".to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::test_support::Memory;

    const PLAIN: NameRules = NameRules { layout: "plain", prefixes: &[] };
    const TEXT: NameRules = NameRules {
        layout: "text only",
        prefixes: &[("model.layers.", "model.lm.layers."), ("model.norm.", "model.lm.norm.")],
    };
    const INNER: NameRules =
        NameRules { layout: "inner", prefixes: &[("lm.model.", "model.lm."), ("lm.head.", "head.")] };

    fn names<W: WeightSource>(source: &W) -> Vec<String> {
        source.tensors().into_iter().map(|t| t.name).collect()
    }

    #[test]
    fn each_layout_is_recognised_and_read_under_canonical_names() {
        for (stored, layout) in [
            (["model.lm.layers.0.w", "model.lm.norm.w", "head.w"], "plain"),
            (["model.layers.0.w", "model.norm.w", "head.w"], "text only"),
            (["lm.model.layers.0.w", "lm.model.norm.w", "lm.head.w"], "inner"),
        ] {
            let source = Memory::with(&stored);
            let wanted = ["model.lm.norm.w", "head.w"];
            let rules = NameRules::detect(&source, &[PLAIN, TEXT, INNER], &wanted).unwrap();
            assert_eq!(rules.layout, layout);
            let renamed = Renamed::new(source, rules).unwrap();
            assert_eq!(names(&renamed), ["model.lm.layers.0.w", "model.lm.norm.w", "head.w"]);
            for (i, canonical) in names(&renamed).iter().enumerate() {
                assert_eq!(renamed.stored_name(canonical).as_deref(), Some(stored[i]));
                assert_eq!(renamed.info(canonical).unwrap().name, *canonical);
                assert_eq!(renamed.tensor(canonical).unwrap().to_f32().unwrap()[0], i as f32);
            }
        }
    }

    #[test]
    fn stored_names_are_gone_after_renaming() {
        let renamed = Renamed::new(Memory::with(&["model.norm.w"]), TEXT).unwrap();
        assert!(renamed.info("model.norm.w").is_none());
        let error = renamed.tensor("model.norm.w").unwrap_err().to_string();
        assert_eq!(error, "no tensor `model.norm.w` in memory");
    }

    #[test]
    fn two_stored_names_for_one_canonical_name_are_an_error() {
        let source = Memory::with(&["model.norm.w", "model.lm.norm.w"]);
        let error = Renamed::new(source, TEXT).unwrap_err().to_string();
        assert_eq!(
            error,
            "tensor `model.lm.norm.w` occurs twice: in `model.norm.w` and in `model.lm.norm.w`"
        );
    }

    #[test]
    fn unknown_layout_names_what_was_tried_wanted_and_found() {
        let source = Memory::with(&["blk.1.w", "blk.0.w"]);
        let error = NameRules::detect(&source, &[PLAIN, TEXT], &["head.w"]).unwrap_err().to_string();
        assert_eq!(
            error,
            "memory: tensor names fit no known layout (plain, text only): expected `head.w`, \
             found 2 tensors such as [\"blk.0.w\", \"blk.1.w\"]"
        );
    }

    #[test]
    fn first_fitting_rule_wins_in_both_directions() {
        let rules = NameRules { layout: "r", prefixes: &[("a.", "x."), ("a.b.", "y.")] };
        let renamed = Renamed::new(Memory::with(&["a.b.c"]), rules).unwrap();
        assert!(renamed.info("x.b.c").is_some());
        assert!(renamed.info("y.c").is_none(), "the second rule can never apply");
    }
}
