//! `quantize` says beforehand what it would refuse, and every message names what it is about and flags that there are.

use std::path::Path;

use crate::{Run, checkpoint, ok, run, scratch};

fn refused(args: &[&str], wanted: &[&str], unwanted: &[&str]) -> Run {
    let run = run(args);
    assert_eq!(run.status, Some(1), "{args:?}\n{}", run.stderr);
    for text in wanted {
        assert!(run.stderr.contains(text), "{args:?}: {text} in\n{}", run.stderr);
    }
    for text in unwanted {
        assert!(!run.stderr.contains(text), "{args:?}: {text} in\n{}", run.stderr);
    }
    run
}

fn count(folder: &Path) -> usize {
    std::fs::read_dir(folder).unwrap().count()
}

#[test]
fn a_dry_run_refuses_what_the_run_would() {
    let folder = scratch("dry");
    let (model, glm) = (checkpoint("default"), checkpoint("gguf/text.gguf"));
    let file = |name: &str| folder.join(name).display().to_string();
    let (gguf, pglm, other, vision) = (file("a.gguf"), file("a.pglm"), file("a.bin"), file("v.gguf"));
    let text_only =
        ["quantize", "--quiet", "--model", &checkpoint("tied"), "--policy", "Q8_0", "--out", &gguf];
    for (args, wanted) in [
        (&["--model", &model, "--out", &gguf][..], "take one of its formats as policy (F32, F16, Q4_0"),
        (
            &["--model", &model, "--to", "gguf", "--out", &other],
            "take one of its formats as policy (F32, F16, Q4_0",
        ),
        (
            &["--model", &model, "--policy", "Q8_0", "--out", &gguf, "--mmproj-out", &gguf],
            "must have two names",
        ),
        (&["--model", &model, "--out", &pglm, "--mmproj-out", &vision], "a .pglm file holds everything"),
        (&["--model", &model, "--out", &other], "ends in neither .pglm nor .gguf"),
        (&["--model", &glm, "--force", "--policy", "keep", "--out", &glm], "which is being read"),
    ] {
        let run = [&["quantize", "--quiet"], args].concat();
        let dry = [&run[..], &["--dry-run"]].concat();
        let both = [refused(&run, &[wanted], &[]), refused(&dry, &[wanted], &[])];
        assert_eq!(both[0].stderr, both[1].stderr);
        assert_eq!(both[1].stdout, "", "a plan that cannot be carried out is not shown");
    }
    assert_eq!(count(&folder), 0);
    // The control: what the dry run takes is written.
    for (args, files) in [
        (&text_only[..], 2),
        (&["quantize", "--quiet", "--model", &model, "--to", "pglm", "--out", &other], 3),
        (
            &[
                "quantize",
                "--quiet",
                "--model",
                &model,
                "--policy",
                "Q8_0",
                "--out",
                &file("b.gguf"),
                "--mmproj-out",
                &vision,
            ],
            5,
        ),
    ] {
        ok(&[args, &["--dry-run"]].concat());
        ok(args);
        assert_eq!(count(&folder), files);
    }
    // And what stands there is told beforehand as well.
    refused(&[&text_only[..], &["--dry-run"]].concat(), &["exists already"], &[]);
}
