//! `model.safetensors.index.json`: which shard holds which tensor.

use std::fmt;
use std::path::Path;

use serde::Deserialize;
use serde::de::{Deserializer, Error as _, IgnoredAny, MapAccess, Visitor};

use crate::error::shown;
use crate::file::{join_plain, read_small};
use crate::safetensors::UniqueStrings;
use crate::{Error, Result};

/// Most bytes of an index; 262,144 tensors with names of 150 characters need 50 MB.
const MAX_INDEX_BYTES: u64 = 64 << 20;
/// Most shards; each is an open file. The largest published models have a few hundred.
const MAX_SHARDS: usize = 1000;

/// A checked index.
pub(crate) struct ShardIndex {
    /// Shard file names, sorted.
    pub(crate) shards: Vec<String>,
    /// (tensor, index of its shard), sorted by tensor.
    pub(crate) tensors: Vec<(String, usize)>,
}

impl ShardIndex {
    pub(crate) fn read(path: &Path) -> Result<ShardIndex> {
        let wrong = |what| Error::Json { path: path.to_owned(), what };
        let bytes = read_small(path, MAX_INDEX_BYTES)?;
        let raw: RawIndex =
            serde_json::from_slice(bytes.as_slice()).map_err(|e| wrong(shown(&e.to_string())))?;
        let mut shards: Vec<String> = raw.weight_map.values().cloned().collect();
        shards.sort();
        shards.dedup();
        if shards.len() > MAX_SHARDS {
            return Err(wrong(format!("{} shards, expected at most {MAX_SHARDS}", shards.len())));
        }
        for shard in &shards {
            join_plain(Path::new(""), shard, path)?;
            if !shard.ends_with(".safetensors") {
                let wanted = " that ends in .safetensors";
                return Err(Error::FileName { name: shown(shard), place: path.to_owned(), wanted });
            }
        }
        let number = |shard: &String| shards.binary_search(shard).unwrap_or_default();
        let tensors = raw.weight_map.iter().map(|(name, shard)| (name.clone(), number(shard))).collect();
        Ok(ShardIndex { shards, tensors })
    }
}

struct RawIndex {
    weight_map: std::collections::BTreeMap<String, String>,
}

impl<'de> Deserialize<'de> for RawIndex {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Index;
        impl<'de> Visitor<'de> for Index {
            type Value = RawIndex;

            fn expecting(&self, f: &mut fmt::Formatter) -> fmt::Result {
                f.write_str("an object with a weight_map")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<RawIndex, A::Error> {
                let mut weight_map = None;
                while let Some(key) = map.next_key::<String>()? {
                    if key == "weight_map" {
                        let UniqueStrings(strings) = map.next_value()?;
                        if weight_map.replace(strings).is_some() {
                            return Err(A::Error::custom("`weight_map` occurs twice"));
                        }
                    } else {
                        // `metadata` holds total_size, which published files often have wrong.
                        map.next_value::<IgnoredAny>()?;
                    }
                }
                let weight_map = weight_map.ok_or_else(|| A::Error::custom("`weight_map` is missing"))?;
                Ok(RawIndex { weight_map })
            }
        }
        deserializer.deserialize_map(Index)
    }
}
