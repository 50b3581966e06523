//! `cargo xtask codegen`: text that is made from data, between markers in a document.

use crate::layers::{self, LAYERS};
use crate::{Error, Result, repo};

/// The document with generated parts.
pub const DOCUMENT: &str = "ARCHITECTURE.md";
const BEGIN: &str = "<!-- layers:begin -->";
const END: &str = "<!-- layers:end -->";
/// The document that is generated as a whole: what runs on a GPU.
const SUPPORT: &str = "kernels/SUPPORT.md";

/// Options of the command.
#[derive(clap::Args)]
pub struct Arguments {
    /// Changes nothing; fails where the document differs from what would be written.
    #[arg(long)]
    check: bool,
}

/// Writes the generated parts, or compares them.
pub fn run(arguments: &Arguments) -> Result<()> {
    if arguments.check {
        return check();
    }
    let path = repo::root().join(SUPPORT);
    repo::write(&path, &support()?)?;
    let path = repo::root().join(DOCUMENT);
    let old = repo::read(&path)?;
    let new = with_table(&old, &layers::markdown(LAYERS, layers::is_crate))?;
    if new == old {
        return repo::print(&format!("{DOCUMENT} is up to date\n"));
    }
    repo::write(&path, &new)?;
    repo::print(&format!("{DOCUMENT} written\n"))
}

/// Fails where the document lacks the table as it is generated now.
pub fn check() -> Result<()> {
    if repo::read(&repo::root().join(SUPPORT)).ok() != Some(support()?) {
        let problem = format!("{SUPPORT} is not the generated one; run `cargo xtask codegen`");
        return Err(Error::Problems { check: "codegen", problems: vec![problem] });
    }
    let old = repo::read(&repo::root().join(DOCUMENT))?;
    match problem(&old, &layers::markdown(LAYERS, layers::is_crate)) {
        None => Ok(()),
        Some(problem) => Err(Error::Problems { check: "codegen", problems: vec![problem] }),
    }
}

/// What the case list of the GPU backend compares.
fn support() -> Result<String> {
    let table = pocketglm_wgpu::cases::support_table(&pocketglm_wgpu::cases::all()?);
    Ok(format!(
        "# What runs on a GPU\n\nWritten by `cargo xtask codegen` from the case list of `crates/wgpu`: small graphs whose results on a \
         device are held\nagainst the processor's scalar kernels, by `cargo xtask parity` on any adapter and by the tests on software \
         Vulkan. Rotary\ntables are computed on the host. An op that is not here is refused when a graph is brought to the \
         device.\n\n{table}"
    ))
}

/// What is wrong with a document, if anything.
pub fn problem(document: &str, table: &str) -> Option<String> {
    match with_table(document, table) {
        Err(e) => Some(e.to_string()),
        Ok(new) if new != document => {
            Some(format!("the layer table in {DOCUMENT} is not the generated one; run `cargo xtask codegen`"))
        }
        Ok(_) => None,
    }
}

/// The document with the text between its markers replaced.
fn with_table(document: &str, table: &str) -> Result<String> {
    let wrong = |found: &str| Error::Content {
        place: DOCUMENT.into(),
        wanted: format!("one line {BEGIN} and after it one line {END}"),
        found: found.into(),
    };
    let (before, rest) = document.split_once(BEGIN).ok_or_else(|| wrong("no beginning"))?;
    let (_, after) = rest.split_once(END).ok_or_else(|| wrong("no end"))?;
    if after.contains(BEGIN) || after.contains(END) {
        return Err(wrong("several"));
    }
    Ok(format!("{before}{BEGIN}\n{table}{END}{after}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_text_between_the_markers_is_replaced() {
        let old = format!("# Title\n{BEGIN}\nold\n{END}\nend\n");
        let new = with_table(&old, "| a |\n").unwrap();
        assert_eq!(new, format!("# Title\n{BEGIN}\n| a |\n{END}\nend\n"));
        assert_eq!(problem(&new, "| a |\n"), None);
        assert_eq!(with_table(&new, "| a |\n").unwrap(), new);
    }

    #[test]
    fn an_edited_table_and_missing_markers_are_problems() {
        let document = format!("{BEGIN}\n| b |\n{END}\n");
        assert!(problem(&document, "| a |\n").unwrap().contains("cargo xtask codegen"));
        assert!(problem("no markers", "| a |\n").unwrap().contains("no beginning"));
        assert!(problem(BEGIN, "| a |\n").unwrap().contains("no end"));
    }
}
