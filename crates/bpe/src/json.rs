//! Reading `tokenizer.json`.
//!
//! Vocabulary and merges go straight into flat buffers while the text is parsed, so that memory stays
//! proportional to the file whatever it holds. Fields that do not change ids (truncation, padding, the
//! post-processor, offsets) are skipped: tokens are never added to a text and texts are never cut.

use std::fmt;

use serde::Deserialize;
use serde::de::{DeserializeSeed, Deserializer, Error as _, IgnoredAny, MapAccess, SeqAccess, Visitor};

use crate::added::AddedToken;
use crate::error::{Error, Result, check_max, clip};
use crate::limits;
use crate::split::SplitStep;
use crate::tokenizer::{Tokenizer, TokenizerParts};

const FILE: &str = "tokenizer.json";

impl Tokenizer {
    /// Reads a Hugging Face `tokenizer.json` with a byte-level BPE model.
    pub fn from_json(json: &[u8]) -> Result<Self> {
        check_max("tokenizer.json bytes", limits::MAX_JSON_BYTES, json.len())?;
        let file: File = serde_json::from_slice(json).map_err(|e| Error::json(FILE, &e))?;
        let model = file.model.ok_or_else(|| missing("model"))?;
        check_model(&model)?;
        if let Some(normalizer) = &file.normalizer {
            return Err(unsupported("normalizer", "null", normalizer.kind()));
        }
        match &file.decoder {
            Some(d) if d.kind() == "ByteLevel" => {}
            other => {
                let found = other.as_ref().map_or("null", Component::kind);
                return Err(unsupported("decoder", "ByteLevel", found));
            }
        }
        let pre = file.pre_tokenizer.ok_or_else(|| unsupported("pre_tokenizer", PRE_WANTED, "null"))?;
        let split = split_steps(&pre)?;
        let vocab = model.vocab.ok_or_else(|| missing("model.vocab"))?;
        let merges = model.merges.ok_or_else(|| missing("model.merges"))?;
        Tokenizer::from_parts(TokenizerParts {
            tokens: vocab.tokens().collect(),
            merges: merges.pairs()?,
            added: file.added_tokens.unwrap_or_default().0.into_iter().map(Into::into).collect(),
            split,
            ignore_merges: model.ignore_merges.unwrap_or(false),
        })
    }
}

fn missing(field: &str) -> Error {
    Error::Missing { file: FILE, field: field.to_owned() }
}

fn unsupported(field: &str, wanted: &'static str, found: &str) -> Error {
    Error::Unsupported { field: field.to_owned(), wanted, found: clip(found, 64) }
}

fn check_model(model: &Model) -> Result<()> {
    // Old files leave the type out; only BPE has merges.
    match model.kind.as_deref() {
        None | Some("BPE") => {}
        Some(other) => return Err(unsupported("model.type", "BPE", other)),
    }
    if model.dropout.is_some_and(|d| d != 0.0) {
        return Err(unsupported("model.dropout", "null or 0", "another number"));
    }
    for (field, value) in [
        ("model.continuing_subword_prefix", &model.continuing_subword_prefix),
        ("model.end_of_word_suffix", &model.end_of_word_suffix),
    ] {
        if let Some(text) = value.as_deref().filter(|t| !t.is_empty()) {
            return Err(unsupported(field, "null or an empty text", text));
        }
    }
    Ok(())
}

const PRE_WANTED: &str = "ByteLevel, or a Sequence of Split steps that ends in ByteLevel,";

fn split_steps(pre: &Component) -> Result<Vec<SplitStep>> {
    let mut steps = Vec::new();
    if pre.kind() != "Sequence" {
        byte_level("pre_tokenizer", &pre.kind, pre.add_prefix_space, pre.use_regex, &mut steps)?;
        return Ok(steps);
    }
    let parts = pre.pretokenizers.as_ref().map_or(&[][..], |p| &p.0);
    let Some((last, before)) = parts.split_last() else {
        return Err(unsupported("pre_tokenizer", PRE_WANTED, "an empty Sequence"));
    };
    for (i, part) in before.iter().enumerate() {
        let field = |name: &str| format!("pre_tokenizer.pretokenizers[{i}]{name}");
        if kind_name(&part.kind) != "Split" {
            let wanted = "Split, followed by ByteLevel at the end,";
            return Err(unsupported(&field(""), wanted, kind_name(&part.kind)));
        }
        if part.behavior.as_deref() != Some("Isolated") {
            let found = part.behavior.as_deref().unwrap_or("missing");
            return Err(unsupported(&field(".behavior"), "Isolated", found));
        }
        if part.invert == Some(true) {
            return Err(unsupported(&field(".invert"), "false", "true"));
        }
        match &part.pattern {
            Some(Pattern { regex: Some(r), .. }) => steps.push(SplitStep::Regex(r.clone())),
            _ => return Err(unsupported(&field(".pattern"), "a Regex", "something else")),
        }
    }
    let field = format!("pre_tokenizer.pretokenizers[{}]", before.len());
    byte_level(&field, &last.kind, last.add_prefix_space, last.use_regex, &mut steps)?;
    Ok(steps)
}

fn byte_level(
    field: &str,
    kind: &Option<String>,
    add_prefix_space: Option<bool>,
    use_regex: Option<bool>,
    steps: &mut Vec<SplitStep>,
) -> Result<()> {
    if kind_name(kind) != "ByteLevel" {
        return Err(unsupported(field, PRE_WANTED, kind_name(kind)));
    }
    // The reference takes true for both when they are absent.
    if add_prefix_space.unwrap_or(true) {
        return Err(unsupported(&format!("{field}.add_prefix_space"), "false", "true or missing"));
    }
    if use_regex.unwrap_or(true) {
        steps.push(SplitStep::Gpt2);
    }
    Ok(())
}

#[derive(Deserialize)]
struct File {
    added_tokens: Option<Bounded<RawAdded, { limits::MAX_ADDED_TOKENS }>>,
    normalizer: Option<Component>,
    pre_tokenizer: Option<Component>,
    decoder: Option<Component>,
    model: Option<Model>,
}

#[derive(Deserialize)]
struct Model {
    #[serde(rename = "type")]
    kind: Option<String>,
    dropout: Option<f32>,
    continuing_subword_prefix: Option<String>,
    end_of_word_suffix: Option<String>,
    ignore_merges: Option<bool>,
    vocab: Option<Vocab>,
    merges: Option<MergeList>,
}

/// A normalizer, pre-tokenizer or decoder, with the fields of those kinds that are understood.
#[derive(Deserialize)]
struct Component {
    #[serde(rename = "type")]
    kind: Option<String>,
    pretokenizers: Option<Bounded<Step, { limits::MAX_SPLIT_STEPS }>>,
    add_prefix_space: Option<bool>,
    use_regex: Option<bool>,
}

/// A member of a Sequence. It has no members itself, so that the memory for a sequence is bounded.
#[derive(Deserialize)]
struct Step {
    #[serde(rename = "type")]
    kind: Option<String>,
    pattern: Option<Pattern>,
    behavior: Option<String>,
    invert: Option<bool>,
    add_prefix_space: Option<bool>,
    use_regex: Option<bool>,
}

impl Component {
    fn kind(&self) -> &str {
        kind_name(&self.kind)
    }
}

fn kind_name(kind: &Option<String>) -> &str {
    kind.as_deref().unwrap_or("without a type")
}

#[derive(Deserialize)]
struct Pattern {
    #[serde(rename = "Regex")]
    regex: Option<String>,
}

#[derive(Deserialize)]
struct RawAdded {
    id: u32,
    content: String,
    #[serde(default)]
    single_word: bool,
    #[serde(default)]
    lstrip: bool,
    #[serde(default)]
    rstrip: bool,
    #[serde(default)]
    normalized: bool,
    #[serde(default)]
    special: bool,
}

impl From<RawAdded> for AddedToken {
    fn from(t: RawAdded) -> Self {
        AddedToken {
            id: t.id,
            content: t.content,
            special: t.special,
            single_word: t.single_word,
            lstrip: t.lstrip,
            rstrip: t.rstrip,
            normalized: t.normalized,
        }
    }
}

/// A list of at most `N` items; one more is an error before it is stored.
struct Bounded<T, const N: usize>(Vec<T>);

impl<T, const N: usize> Default for Bounded<T, N> {
    fn default() -> Self {
        Self(Vec::new())
    }
}

impl<'de, T: Deserialize<'de>, const N: usize> Deserialize<'de> for Bounded<T, N> {
    fn deserialize<D: Deserializer<'de>>(d: D) -> std::result::Result<Self, D::Error> {
        struct Items<T, const N: usize>(std::marker::PhantomData<T>);
        impl<'de, T: Deserialize<'de>, const N: usize> Visitor<'de> for Items<T, N> {
            type Value = Bounded<T, N>;
            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, "a list of at most {N} items")
            }
            fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> std::result::Result<Self::Value, A::Error> {
                let mut items = Vec::new();
                while let Some(item) = seq.next_element()? {
                    if items.len() >= N {
                        return Err(A::Error::invalid_length(N + 1, &self));
                    }
                    items.push(item);
                }
                Ok(Bounded(items))
            }
        }
        d.deserialize_seq(Items(std::marker::PhantomData))
    }
}

/// Texts appended to one buffer; returns where each ends.
struct AppendTo<'b>(&'b mut String);

impl<'de> DeserializeSeed<'de> for AppendTo<'_> {
    type Value = usize;
    fn deserialize<D: Deserializer<'de>>(self, d: D) -> std::result::Result<usize, D::Error> {
        d.deserialize_str(self)
    }
}

impl Visitor<'_> for AppendTo<'_> {
    type Value = usize;
    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a text")
    }
    fn visit_str<E: serde::de::Error>(self, text: &str) -> std::result::Result<usize, E> {
        self.0.push_str(text);
        Ok(self.0.len())
    }
}

/// `model.vocab`: token texts in one buffer, and for each its end and its id.
struct Vocab {
    text: String,
    entries: Vec<(u32, u32)>,
}

impl Vocab {
    fn tokens(&self) -> impl Iterator<Item = (&str, u32)> {
        let mut start = 0usize;
        self.entries.iter().map(move |&(end, id)| {
            let text = self.text.get(start..end as usize).unwrap_or_default();
            start = end as usize;
            (text, id)
        })
    }
}

impl<'de> Deserialize<'de> for Vocab {
    fn deserialize<D: Deserializer<'de>>(d: D) -> std::result::Result<Self, D::Error> {
        struct Entries;
        impl<'de> Visitor<'de> for Entries {
            type Value = Vocab;
            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, "a map from at most {} tokens to ids", limits::MAX_TOKEN_ID)
            }
            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> std::result::Result<Vocab, A::Error> {
                let mut vocab = Vocab { text: String::new(), entries: Vec::new() };
                while let Some(end) = map.next_key_seed(AppendTo(&mut vocab.text))? {
                    if vocab.entries.len() >= limits::MAX_TOKEN_ID as usize {
                        return Err(A::Error::invalid_length(vocab.entries.len(), &self));
                    }
                    let end = u32::try_from(end).map_err(A::Error::custom)?;
                    vocab.entries.push((end, map.next_value()?));
                }
                Ok(vocab)
            }
        }
        d.deserialize_map(Entries)
    }
}

/// `model.merges`: texts in one buffer, and for each entry the ends of its parts. An entry written as one text
/// has its two parts still joined by a space.
struct MergeList {
    text: String,
    entries: Vec<MergeEntry>,
}

#[derive(Clone, Copy)]
enum MergeEntry {
    Joined { end: u32 },
    Pair { middle: u32, end: u32 },
}

impl MergeList {
    fn pairs(&self) -> Result<Vec<(&str, &str)>> {
        let mut start = 0usize;
        let mut pairs = Vec::with_capacity(self.entries.len());
        for (index, entry) in self.entries.iter().enumerate() {
            let slice = |from: usize, to: u32| self.text.get(from..to as usize).unwrap_or_default();
            match *entry {
                MergeEntry::Pair { middle, end } => {
                    pairs.push((slice(start, middle), slice(middle as usize, end)));
                    start = end as usize;
                }
                MergeEntry::Joined { end } => {
                    let text = slice(start, end);
                    start = end as usize;
                    // Files converted from merges.txt may keep its first line.
                    if text.starts_with("#version") {
                        continue;
                    }
                    match text.split_once(' ') {
                        Some((left, right)) if !right.contains(' ') => pairs.push((left, right)),
                        _ => return Err(Error::MergeForm { index, found: clip(text, 64) }),
                    }
                }
            }
        }
        Ok(pairs)
    }
}

impl<'de> Deserialize<'de> for MergeList {
    fn deserialize<D: Deserializer<'de>>(d: D) -> std::result::Result<Self, D::Error> {
        struct Entries;
        impl<'de> Visitor<'de> for Entries {
            type Value = MergeList;
            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, "a list of at most {} merges", limits::MAX_MERGES)
            }
            fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> std::result::Result<MergeList, A::Error> {
                let mut list = MergeList { text: String::new(), entries: Vec::new() };
                while let Some(entry) = seq.next_element_seed(EntrySeed(&mut list.text))? {
                    if list.entries.len() >= limits::MAX_MERGES {
                        return Err(A::Error::invalid_length(list.entries.len(), &self));
                    }
                    list.entries.push(entry);
                }
                Ok(list)
            }
        }
        d.deserialize_seq(Entries)
    }
}

struct EntrySeed<'b>(&'b mut String);

impl<'de> DeserializeSeed<'de> for EntrySeed<'_> {
    type Value = MergeEntry;
    fn deserialize<D: Deserializer<'de>>(self, d: D) -> std::result::Result<MergeEntry, D::Error> {
        d.deserialize_any(self)
    }
}

impl<'de> Visitor<'de> for EntrySeed<'_> {
    type Value = MergeEntry;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a merge, as \"a b\" or [\"a\", \"b\"]")
    }

    fn visit_str<E: serde::de::Error>(self, text: &str) -> std::result::Result<MergeEntry, E> {
        self.0.push_str(text);
        Ok(MergeEntry::Joined { end: u32::try_from(self.0.len()).map_err(E::custom)? })
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> std::result::Result<MergeEntry, A::Error> {
        let mut ends = [0u32; 2];
        for (n, slot) in ends.iter_mut().enumerate() {
            let end = seq
                .next_element_seed(AppendTo(self.0))?
                .ok_or_else(|| A::Error::invalid_length(n, &"a pair of tokens"))?;
            *slot = u32::try_from(end).map_err(A::Error::custom)?;
        }
        if seq.next_element::<IgnoredAny>()?.is_some() {
            return Err(A::Error::invalid_length(3, &"a pair of tokens"));
        }
        Ok(MergeEntry::Pair { middle: ends[0], end: ends[1] })
    }
}
