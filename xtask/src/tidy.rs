//! `cargo xtask tidy`: rules about the sources that the compiler does not check.

use std::collections::BTreeMap;

use proc_macro2::{Delimiter, TokenStream, TokenTree};

use crate::layers::{self, LAYERS, Package};
use crate::{Error, Result, codegen, repo};

/// The only files with `unsafe`, each a path or the beginning of one, and why.
const UNSAFE_ALLOWED: &[(&str, &str)] = &[
    ("crates/tensor/src/simd/", "vector instructions"),
    ("crates/tensor/src/ops/", "kernels: vector loads and stores, rows split between threads"),
    ("crates/tensor/src/pool.rs", "a borrowed closure is handed to threads that outlive it"),
    ("crates/checkpoint/src/mapped.rs", "a file mapping has no safe interface"),
    ("crates/wgpu/src/pipelines.rs", "kernels compiled without added checks; experimental features"),
    ("crates/tensor/src/peak.rs", "the loop of byte products, whose operands are loaded through pointers"),
    (
        "crates/wgpu/src/pipelines.rs",
        "kernels without the checks that wgpu would add, and experimental features",
    ),
    ("bench/peers/", "a C library's interface, in a workspace of its own"),
    (
        "crates/checkpoint/tests/hostile_models.rs",
        "a counting allocator, to see that memory stays under the cap",
    ),
    ("crates/vit/tests/hostile_pictures.rs", "a counting allocator, to see that memory stays under the cap"),
];

/// Files that may be larger than [`LARGEST_FILE`], and why.
const LARGE_FILES: &[(&str, &str)] = &[
    ("crates/bpe/golden/encode.jsonl", "more than 10,000 strings with the reference's ids"),
    ("tests/golden/real-head-dim/model.safetensors", "the smallest checkpoint with heads of the true size"),
];
const LARGEST_FILE: u64 = 2_000_000;
const LARGEST_TOTAL: u64 = 60_000_000;

/// A source file.
struct Source {
    path: String,
    text: String,
    tokens: TokenStream,
}

/// Runs every check, prints lines of code for each crate, and fails with all problems.
pub fn run() -> Result<()> {
    let files = repo::tracked_files()?;
    let sources = sources(&files)?;
    repo::print(&lines_of_code(&sources))?;
    let problems = problems(&files, &sources)?;
    if problems.is_empty() { Ok(()) } else { Err(Error::Problems { check: "tidy", problems }) }
}

fn problems(files: &[String], sources: &[Source]) -> Result<Vec<String>> {
    let packages = layers::packages()?;
    let mut problems = layers::check(LAYERS, &packages, layers::is_crate);
    for package in &packages {
        problems.extend(header_problem(package, &repo::read(&repo::root().join(&package.root_file))?));
    }
    for source in sources {
        problems.extend(unsafe_problems(source, UNSAFE_ALLOWED));
        problems.extend(exception_problems(source));
    }
    let mut sizes = Vec::with_capacity(files.len());
    for file in files {
        let path = repo::root().join(file);
        let size = path.symlink_metadata().map_err(crate::error::io_error("read", &path))?.len();
        sizes.push((file.as_str(), size));
    }
    problems.extend(size_problems(&sizes, LARGE_FILES));
    let document = repo::root().join(codegen::DOCUMENT);
    if document.is_file() {
        let table = layers::markdown(LAYERS, layers::is_crate);
        problems.extend(codegen::problem(&repo::read(&document)?, &table));
    }
    Ok(problems)
}

/// The Rust files among `files`, as tokens.
fn sources(files: &[String]) -> Result<Vec<Source>> {
    files
        .iter()
        .filter(|f| f.ends_with(".rs"))
        .map(|path| source(path.clone(), repo::read(&repo::root().join(path))?))
        .collect()
}

fn source(path: String, text: String) -> Result<Source> {
    let tokens = text.parse().map_err(|e: proc_macro2::LexError| Error::Content {
        place: format!("{path}:{}", e.span().start().line),
        wanted: "Rust".into(),
        found: e.to_string(),
    })?;
    Ok(Source { path, text, tokens })
}

/// A crate's first words: purpose, absence and invariant, and the lint that keeps `unsafe` out.
fn header_problem(package: &Package, text: &str) -> Vec<String> {
    let file = &package.root_file;
    let header: Vec<&str> = text.lines().map_while(|l| l.strip_prefix("//!")).map(str::trim).collect();
    if header.is_empty() {
        return vec![format!("{file} does not begin with `//!`")];
    }
    let header = header.join(" ");
    let mut problems = Vec::new();
    for (wanted, what) in
        [("knows nothing of", "what the crate does not know"), ("Invariant", "its invariant")]
    {
        if !header.contains(wanted) {
            problems.push(format!("the header of {file} does not say {what} (`{wanted}`)"));
        }
    }
    if !["#![forbid(unsafe_code)]", "#![deny(unsafe_code)]"]
        .iter()
        .any(|a| text.lines().any(|l| l.trim() == *a))
    {
        problems
            .push(format!("{file} carries neither `#![forbid(unsafe_code)]` nor `#![deny(unsafe_code)]`"));
    }
    problems
}

/// `unsafe` outside of the allowed files.
fn unsafe_problems(source: &Source, allowed: &[(&str, &str)]) -> Vec<String> {
    if allowed.iter().any(|(prefix, _)| source.path.starts_with(prefix)) {
        return Vec::new();
    }
    let mut problems = Vec::new();
    visit(source.tokens.clone(), &mut |tree, _| {
        if let TokenTree::Ident(ident) = tree
            && ident == "unsafe"
        {
            let line = ident.span().start().line;
            problems.push(format!("{}:{line}: `unsafe` outside of the files that may have it", source.path));
        }
    });
    problems
}

/// Lint exceptions that do not say why: neither `reason = ".."`, nor a comment on the line or above it.
fn exception_problems(source: &Source) -> Vec<String> {
    let lines: Vec<&str> = source.text.lines().map(str::trim).collect();
    let comment = |l: &str| l.starts_with("//") && !l.starts_with("///") && !l.starts_with("//!");
    let explained = |line: usize| {
        // Other attributes may stand between the comment and the exception.
        let above = lines[..line].iter().rev().find(|l| !l.starts_with("#["));
        above.is_some_and(|l| comment(l)) || lines.get(line).is_some_and(|l| l.contains(" // "))
    };
    let mut problems = Vec::new();
    visit(source.tokens.clone(), &mut |tree, after_hash| {
        let TokenTree::Group(group) = tree else { return };
        if !after_hash || group.delimiter() != Delimiter::Bracket {
            return;
        }
        let mut exception = false;
        let mut reason = false;
        visit(group.stream(), &mut |tree, _| {
            if let TokenTree::Ident(ident) = tree {
                exception |= ident == "allow" || ident == "expect";
                reason |= ident == "reason";
            }
        });
        let line = group.span_open().start().line;
        if exception && !reason && !explained(line - 1) {
            let path = &source.path;
            problems.push(format!(
                "{path}:{line}: a lint exception without `reason = \"..\"` or a comment above it"
            ));
        }
    });
    problems
}

/// Calls `see` for every token, and says whether the one before it was `#` or `#!`.
fn visit(tokens: TokenStream, see: &mut dyn FnMut(&TokenTree, bool)) {
    let mut after_hash = false;
    for tree in tokens {
        see(&tree, after_hash);
        after_hash = match &tree {
            TokenTree::Punct(p) => p.as_char() == '#' || (after_hash && p.as_char() == '!'),
            _ => false,
        };
        if let TokenTree::Group(group) = tree {
            visit(group.stream(), see);
        }
    }
}

/// Files that do not belong into a repository that people clone.
fn size_problems(sizes: &[(&str, u64)], listed: &[(&str, &str)]) -> Vec<String> {
    let mut problems = Vec::new();
    for (file, size) in sizes {
        if *size > LARGEST_FILE && !listed.iter().any(|(name, _)| name == file) {
            problems.push(format!("{file} has {size} bytes, more than {LARGEST_FILE}"));
        }
    }
    for (name, _) in listed {
        if !sizes.iter().any(|(file, size)| file == name && *size > LARGEST_FILE) {
            problems.push(format!("{name} is listed as a large file and is none"));
        }
    }
    let total: u64 = sizes.iter().map(|(_, size)| size).sum();
    if total > LARGEST_TOTAL {
        problems.push(format!("all files together have {total} bytes, more than {LARGEST_TOTAL}"));
    }
    problems
}

/// Lines with code, lines of tests and lines of comments, by crate.
fn lines_of_code(sources: &[Source]) -> String {
    let mut counts: BTreeMap<String, [usize; 3]> = BTreeMap::new();
    for source in sources {
        let parts: Vec<&str> = source.path.split('/').collect();
        let folder = match parts.as_slice() {
            ["crates" | "examples", name, ..] => format!("{}/{name}", parts[0]),
            [first, _, ..] => (*first).to_owned(),
            _ => ".".to_owned(),
        };
        let of_tests = folder == "tests"
            || parts.iter().any(|p| matches!(*p, "tests" | "tests.rs" | "test_support.rs" | "benches"));
        let mut in_tests = of_tests;
        let count = counts.entry(folder).or_default();
        let mut lines = source.text.lines().map(str::trim).filter(|l| !l.is_empty()).peekable();
        while let Some(line) = lines.next() {
            // By convention the tests in a file come last.
            in_tests |= line == "#[cfg(test)]" && lines.peek().is_some_and(|l| *l == "mod tests {");
            count[if line.starts_with("//") { 2 } else { usize::from(in_tests) }] += 1;
        }
    }
    let mut rows = vec![["crate", "code", "tests", "comments"].map(str::to_owned).to_vec()];
    let row = |name: &str, n: &[usize; 3]| {
        std::iter::once(name.to_owned()).chain(n.iter().map(usize::to_string)).collect::<Vec<_>>()
    };
    rows.extend(counts.iter().map(|(name, n)| row(name, n)));
    let sum = counts.values().fold([0; 3], |a, b| [a[0] + b[0], a[1] + b[1], a[2] + b[2]]);
    rows.push(row("all", &sum));
    repo::table(&rows)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parsed(path: &str, text: &str) -> Source {
        source(path.into(), text.into()).unwrap()
    }

    #[test]
    fn the_repository_is_tidy() {
        let files = repo::tracked_files().unwrap();
        let sources = sources(&files).unwrap();
        assert!(sources.len() > 20, "only {} Rust files were looked at", sources.len());
        assert_eq!(problems(&files, &sources).unwrap(), Vec::<String>::new());
    }

    #[test]
    fn a_header_without_absence_or_invariant_is_a_problem() {
        let package = Package { root_file: "crates/x/src/lib.rs".into(), ..Package::default() };
        let good = "//! Purpose. This crate knows\n//! nothing of files.\n//!\n//! Invariant: none.\n\n#![forbid(unsafe_code)]\n";
        assert_eq!(header_problem(&package, good), Vec::<String>::new());
        assert_eq!(header_problem(&package, &good.replace("nothing", "something")).len(), 1);
        assert_eq!(header_problem(&package, &good.replace("Invariant", "Note")).len(), 1);
        assert_eq!(header_problem(&package, &good.replace("#![", "// #![")).len(), 1);
        assert_eq!(header_problem(&package, "mod a;\n").len(), 1);
        assert_eq!(header_problem(&package, &format!("\n{good}")).len(), 1);
    }

    #[test]
    fn unsafe_is_found_in_code_and_not_in_comments_and_strings() {
        let text =
            "// unsafe\n/// unsafe\nfn f() -> &'static str { \"unsafe\" }\n#[deny(unsafe_code)]\nmod m {}\n";
        assert_eq!(unsafe_problems(&parsed("a.rs", text), &[]), Vec::<String>::new());
        let source = parsed("a/b.rs", "fn f() {\n    g(|| unsafe { h() })\n}\n");
        assert_eq!(unsafe_problems(&source, &[]).len(), 1);
        assert!(unsafe_problems(&source, &[])[0].starts_with("a/b.rs:2:"));
        assert!(unsafe_problems(&source, &[("a/", "a reason")]).is_empty());
        assert_eq!(unsafe_problems(&source, &[("b", "a reason")]).len(), 1);
    }

    #[test]
    fn lint_exceptions_need_a_reason_or_a_comment() {
        for good in [
            "#[allow(dead_code, reason = \"later\")]\nfn f() {}",
            "// Later.\n#[allow(dead_code)]\nfn f() {}",
            "// Later.\n#[derive(Clone)]\n#[allow(dead_code)]\nstruct S;",
            "#[allow(dead_code)] // Later.\nfn f() {}",
            "#[cfg_attr(test, allow(dead_code, reason = \"later\"))]\nfn f() {}",
            "fn f() { x.expect(\"allow\"); }",
        ] {
            assert_eq!(exception_problems(&parsed("a.rs", good)), Vec::<String>::new(), "{good}");
        }
        for bad in [
            "#[allow(dead_code)]\nfn f() {}",
            "#![allow(dead_code)]\nfn f() {}",
            "/// What it is.\n#[allow(dead_code)]\nfn f() {}",
            "fn f() {\n    #[expect(unused)]\n    let x = 1;\n}",
            "#[cfg_attr(test, allow(dead_code))]\nfn f() {}",
        ] {
            assert_eq!(exception_problems(&parsed("a.rs", bad)).len(), 1, "{bad}");
        }
    }

    #[test]
    fn large_files_and_large_sums_are_problems() {
        assert_eq!(size_problems(&[("a", LARGEST_FILE), ("b", 1)], &[]), Vec::<String>::new());
        assert!(size_problems(&[("a", LARGEST_FILE + 1)], &[])[0].starts_with("a has"));
        assert_eq!(size_problems(&[("a", LARGEST_FILE + 1)], &[("a", "why")]), Vec::<String>::new());
        assert!(size_problems(&[("a", 1)], &[("a", "why")])[0].contains("is none"));
        let many: Vec<(&str, u64)> = (0..31).map(|_| ("a", LARGEST_FILE)).collect();
        assert_eq!(size_problems(&many, &[]).len(), 1);
    }

    #[test]
    fn lines_are_counted_as_code_tests_or_comments() {
        let text = "//! Doc.\n\nfn f() {}\n#[cfg(test)]\nmod tests {\n    fn g() {}\n}\n";
        let table = lines_of_code(&[
            parsed("crates/x/src/lib.rs", text),
            parsed("crates/x/src/y/tests.rs", "fn h() {}\n"),
        ]);
        let row: Vec<&str> = table.lines().nth(1).unwrap().split_whitespace().collect();
        assert_eq!(row, ["crates/x", "1", "5", "1"]);
    }
}
