//! The layer table: which crate may use which, as data, and its comparison with the manifests.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

use serde_json::Value;

use crate::{Error, Result, repo};

/// What a layer may use.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Uses {
    /// Exactly these.
    Only(&'static [&'static str]),
    /// Whatever it needs: a program about the repository.
    Anything,
}

/// One row of the table.
#[derive(Clone, Copy, Debug)]
pub struct Layer {
    /// Folder from the root. Its last part is the layer's name.
    pub folder: &'static str,
    /// Layers that it uses.
    pub uses: Uses,
    /// What it holds.
    pub holds: &'static str,
    /// What it must not know.
    pub absence: &'static str,
}

/// The table, lowest layer first. A new edge is a decision, so it is written here and in the manifest.
pub const LAYERS: &[Layer] = &[
    Layer {
        folder: "crates/tensor",
        uses: Uses::Only(&[]),
        holds: "dtypes, shapes, buffers; CPU kernels with a scalar twin each; the thread pool",
        absence: "files, graphs, models, GPU",
    },
    Layer {
        folder: "crates/quant",
        uses: Uses::Only(&["tensor"]),
        holds: "GGUF's blocks and affine groups: reading, rounding, GPTQ, AWQ, rotations, statistics",
        absence: "models, files, graphs",
    },
    Layer {
        folder: "crates/graph",
        uses: Uses::Only(&["tensor", "quant"]),
        holds: "the IR, shape rules, rewriting passes, memory plan, the `Backend` trait, the CPU executor",
        absence: "models, files, GPU",
    },
    Layer {
        folder: "kernels",
        uses: Uses::Only(&[]),
        holds: "WGSL kernels and the preprocessor that makes variants of them",
        absence: "tensors, wgpu, models",
    },
    Layer {
        folder: "crates/wgpu",
        uses: Uses::Only(&["kernels", "graph", "quant", "tensor"]),
        holds: "the GPU backend: devices, weights and states on them, lowering, the case list of all kernels",
        absence: "models, tokens, files",
    },
    Layer {
        folder: "crates/checkpoint",
        uses: Uses::Only(&["tensor", "quant"]),
        holds: "safetensors, GGUF and `.pglm` files and checkpoint folders behind `WeightSource`",
        absence: "models, graphs",
    },
    Layer {
        folder: "crates/bpe",
        uses: Uses::Only(&[]),
        holds: "tokenizer, special tokens, chat template, streaming detokenizer",
        absence: "tensors",
    },
    Layer {
        folder: "crates/vit",
        uses: Uses::Only(&["graph", "checkpoint", "tensor"]),
        holds: "picture preprocessing and the GLM-4.1V vision encoder as graph functions",
        absence: "GLM, text, GPU",
    },
    Layer {
        folder: "crates/wav2vec",
        uses: Uses::Only(&["graph", "checkpoint", "quant", "tensor"]),
        holds: "audio files, resampling, the Wav2Vec2 encoder as graph functions, CTC decoding, streaming",
        absence: "GLM, text generation, GPU",
    },
    Layer {
        folder: "crates/glm",
        uses: Uses::Only(&["graph", "checkpoint", "tensor"]),
        holds: "the decoder as graph functions, fusion of modalities, positions, tensor names, sampling",
        absence: "image and audio files, tokenizers, GPU",
    },
    Layer {
        folder: "crates/engine",
        uses: Uses::Only(&["glm", "vit", "wav2vec", "bpe", "graph", "checkpoint", "quant", "tensor"]),
        holds: "sessions, KV cache, memory budget, generation",
        absence: "command lines, HTTP, GPU",
    },
    Layer {
        folder: "crates/pocketglm",
        uses: Uses::Only(&["engine", "tensor", "wgpu"]),
        holds: "the facade that others depend on",
        absence: "third parties' types in its signatures",
    },
    Layer {
        folder: "crates/cli",
        uses: Uses::Only(&["pocketglm"]),
        holds: "the `pocketglm` program",
        absence: "crates behind the facade",
    },
    Layer {
        folder: "tests",
        uses: Uses::Only(&["pocketglm"]),
        holds: "one integration crate; golden files with their recipes",
        absence: "private items",
    },
    Layer {
        folder: "xtask",
        uses: Uses::Anything,
        holds: "the repository's own commands",
        absence: "tokens, sessions",
    },
];

impl Layer {
    /// The last part of the folder.
    pub fn name(&self) -> &'static str {
        self.folder.rsplit('/').next().unwrap_or(self.folder)
    }
}

/// A crate of the workspace, as `cargo metadata` sees it.
#[derive(Clone, Debug, Default)]
pub struct Package {
    /// Folder from the root.
    pub folder: String,
    /// Folders of the workspace's crates that it depends on, without development dependencies.
    pub uses: BTreeSet<String>,
    /// Those that only its tests and benches depend on.
    pub dev_uses: BTreeSet<String>,
    /// Its `lib.rs`, else its `main.rs`, else its first test, from the root.
    pub root_file: String,
}

/// The crates of the workspace.
///
/// # Errors
/// What cargo reports, for instance a manifest that does not parse.
pub fn packages() -> Result<Vec<Package>> {
    let mut cargo = repo::cargo();
    cargo.args(["metadata", "--no-deps", "--offline", "--format-version", "1"]);
    let shown = repo::shown(&cargo);
    let text = repo::output_of(&mut cargo)?;
    let wrong =
        |found: String| Error::Content { place: shown.clone(), wanted: "cargo's package list".into(), found };
    let data: Value = serde_json::from_slice(&text).map_err(|e| wrong(e.to_string()))?;
    let root = data["workspace_root"].as_str().ok_or_else(|| wrong("no workspace_root".into()))?;
    let relative = |path: &str| -> Option<String> {
        Path::new(path).strip_prefix(root).ok().map(|p| p.to_string_lossy().replace('\\', "/"))
    };
    let list = data["packages"].as_array().filter(|l| !l.is_empty());
    list.ok_or_else(|| wrong("no packages".into()))?
        .iter()
        .map(|p| {
            let name = p["name"].as_str().unwrap_or("a package");
            let manifest = p["manifest_path"].as_str().and_then(relative);
            let folder = manifest.as_deref().and_then(|m| m.strip_suffix("/Cargo.toml"));
            let folder = folder.ok_or_else(|| wrong(format!("{name} outside the workspace")))?.to_owned();
            let mut package = Package { folder, ..Package::default() };
            for dependency in p["dependencies"].as_array().into_iter().flatten() {
                let Some(to) = dependency["path"].as_str().and_then(relative) else { continue };
                let dev = dependency["kind"].as_str() == Some("dev");
                if dev {
                    package.dev_uses.insert(to)
                } else {
                    package.uses.insert(to)
                };
            }
            let target = |wanted: &str| {
                let targets = p["targets"].as_array().into_iter().flatten();
                targets
                    .filter(|t| t["kind"][0].as_str() == Some(wanted))
                    .find_map(|t| relative(t["src_path"].as_str()?))
            };
            package.root_file = ["lib", "bin", "test"]
                .iter()
                .find_map(|kind| target(kind))
                .ok_or_else(|| wrong(format!("{name} without a library, a program or a test")))?;
            Ok(package)
        })
        .collect()
}

/// Compares the table with the manifests. `exists` says whether a folder has a `Cargo.toml`.
pub fn check(layers: &[Layer], packages: &[Package], exists: impl Fn(&str) -> bool) -> Vec<String> {
    let mut problems = Vec::new();
    let by_folder: BTreeMap<&str, &Package> = packages.iter().map(|p| (p.folder.as_str(), p)).collect();
    let folder_of: BTreeMap<&str, &str> = layers.iter().map(|l| (l.name(), l.folder)).collect();
    for package in packages {
        if !layers.iter().any(|l| l.folder == package.folder) {
            problems.push(format!("`{}` has no row in the layer table", package.folder));
        }
    }
    for layer in layers {
        let Some(package) = by_folder.get(layer.folder) else {
            // A crate of a later issue; but one that is there must be looked at.
            if exists(layer.folder) {
                problems.push(format!("`{}` has a Cargo.toml and is not in the workspace", layer.folder));
            }
            continue;
        };
        let Uses::Only(names) = layer.uses else { continue };
        let mut real = package.uses.clone();
        // The integration tests are a layer whose dependencies are all for tests.
        if layer.folder == "tests" {
            real.extend(package.dev_uses.iter().cloned());
        }
        let mut allowed = BTreeSet::new();
        for name in names {
            match folder_of.get(name) {
                Some(folder) => drop(allowed.insert((*folder).to_owned())),
                None => problems.push(format!(
                    "`{}` uses `{name}` in the layer table, which has no such row",
                    layer.folder
                )),
            }
        }
        for to in real.difference(&allowed) {
            problems
                .push(format!("`{}` uses `{to}` in its Cargo.toml and not in the layer table", layer.folder));
        }
        for to in allowed.difference(&real).filter(|to| by_folder.contains_key(to.as_str())) {
            problems
                .push(format!("`{}` uses `{to}` in the layer table and not in its Cargo.toml", layer.folder));
        }
    }
    problems
}

/// The table in Markdown, as ARCHITECTURE.md shows it. Only crates that are there.
pub fn markdown(layers: &[Layer], exists: impl Fn(&str) -> bool) -> String {
    let mut out = String::from("| folder | uses | holds | knows nothing of |\n| --- | --- | --- | --- |\n");
    for layer in layers.iter().filter(|l| exists(l.folder)) {
        let uses = match layer.uses {
            Uses::Anything => "anything".into(),
            Uses::Only([]) => "-".into(),
            Uses::Only(names) => names.join(", "),
        };
        out.push_str(&format!("| `{}` | {uses} | {} | {} |\n", layer.folder, layer.holds, layer.absence));
    }
    out
}

/// Whether a folder of the repository is a crate.
pub fn is_crate(folder: &str) -> bool {
    repo::root().join(folder).join("Cargo.toml").is_file()
}

#[cfg(test)]
mod tests {
    use super::*;

    const SMALL: &[Layer] = &[
        Layer { folder: "crates/low", uses: Uses::Only(&[]), holds: "numbers", absence: "files" },
        Layer { folder: "crates/high", uses: Uses::Only(&["low"]), holds: "files", absence: "users" },
        Layer { folder: "crates/later", uses: Uses::Only(&["high"]), holds: "plans", absence: "now" },
    ];

    fn package(folder: &str, uses: &[&str]) -> Package {
        let uses = uses.iter().map(|u| (*u).to_owned()).collect();
        Package { folder: folder.into(), uses, ..Package::default() }
    }

    #[test]
    fn a_table_that_fits_the_manifests_has_no_problems() {
        let packages = [package("crates/low", &[]), package("crates/high", &["crates/low"])];
        assert_eq!(check(SMALL, &packages, |f| f != "crates/later"), Vec::<String>::new());
    }

    #[test]
    fn an_edge_that_the_table_lacks_is_named_with_both_ends() {
        let packages = [package("crates/low", &["crates/high"]), package("crates/high", &["crates/low"])];
        let problems = check(SMALL, &packages, |_| false);
        assert_eq!(problems.len(), 1);
        assert!(problems[0].contains("crates/low") && problems[0].contains("crates/high"), "{problems:?}");
    }

    #[test]
    fn an_edge_of_the_table_that_nobody_uses_is_named_with_both_ends() {
        let packages = [package("crates/low", &[]), package("crates/high", &[])];
        let problems = check(SMALL, &packages, |_| false);
        assert_eq!(problems.len(), 1);
        assert!(
            problems[0].contains("crates/low") && problems[0].contains("not in its Cargo.toml"),
            "{problems:?}"
        );
    }

    #[test]
    fn crates_without_a_row_and_rows_outside_the_workspace_are_named() {
        let packages = [package("crates/low", &[]), package("crates/odd", &[])];
        let problems = check(SMALL, &packages, |f| f == "crates/later");
        assert_eq!(problems.len(), 2, "{problems:?}");
        assert!(problems[0].contains("crates/odd") && problems[1].contains("crates/later"), "{problems:?}");
    }

    #[test]
    fn the_markdown_table_has_a_row_for_each_crate_that_is_there() {
        let text = markdown(SMALL, |f| f != "crates/later");
        assert_eq!(text.lines().count(), 4);
        assert!(text.ends_with("| `crates/high` | low | files | users |\n"), "{text}");
    }

    #[test]
    fn cargo_lists_this_crate_with_what_it_uses() {
        let packages = packages().unwrap();
        let xtask = packages.iter().find(|p| p.folder == "xtask").unwrap();
        assert!(xtask.uses.contains("crates/graph") && xtask.dev_uses.contains("crates/bpe"), "{xtask:?}");
        assert_eq!(xtask.root_file, "xtask/src/main.rs");
    }
}
