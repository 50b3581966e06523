//! `quantize` says beforehand what it would refuse, and every message names what it is about and flags that there are.

use std::path::Path;

use crate::{Run, checkpoint, golden, ok, program, run, scratch};

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

#[test]
fn messages_name_the_file_and_flags_that_the_command_has() {
    let folder = scratch("messages");
    let file = |name: &str| folder.join(name).display().to_string();
    let (model, small, samples) = (checkpoint("default"), file("small.pglm"), file("samples.txt"));
    std::fs::write(&samples, "open the settings and tap on wifi").unwrap();
    ok(&["quantize", "--quiet", "--model", &model, "--policy", "int8", "--out", &small]);
    let again = ["quantize", "--quiet", "--model", &small, "--policy", "int4", "--out", &file("b.pglm")];
    refused(&again, &[&format!("{small}: tensor"), "is already int8-g128", "--force-requantise"], &[]);

    let eval = ["eval", "--quiet", "--samples", &samples, "--reference"];
    let judged = [&eval[..], &[&small, "--policy", "int4"]].concat();
    refused(&judged, &[&format!("{small}: tensor"), "is already int8-g128"], &["--force-requantise"]);
    let gptq = file("gptq.json");
    std::fs::write(&gptq, r#"{"rules": [{"tensors": "*", "format": "int4-g64", "method": "gptq"}]}"#)
        .unwrap();
    let judged = [&eval[..], &[&model, "--policy", &gptq]].concat();
    refused(&judged, &["gptq cannot be simulated: write a file with `quantize`"], &["--calibration"]);
    let nothing = run(&[&eval[..], &[&model]].concat());
    assert_eq!(nothing.status, Some(2));
    assert!(nothing.stderr.contains("<--model <PATH>|--policy <NAME|FILE>>"), "{}", nothing.stderr);

    // A speech checkpoint cannot have a table, so none is asked for.
    let speech = checkpoint("hear/large");
    for more in [&["--method", "gptq"][..], &["--method", "awq"], &["--kv-scales"], &["--static-inputs"]] {
        let args = [&["quantize", "--dry-run", "--model", &speech, "--policy", "int8-row"], more].concat();
        refused(&args, &["which a speech checkpoint cannot have"], &["--calibration"]);
    }
    ok(&["quantize", "--dry-run", "--model", &speech, "--policy", "int8-row"]);
}

#[test]
fn a_file_beside_nothing_is_told_with_its_folder() {
    let folder = scratch("beside");
    std::fs::copy(golden("default/model.safetensors"), folder.join("alone")).unwrap();
    let output = program().current_dir(&folder).args(["info", "--model", "alone"]).output().unwrap();
    let told = String::from_utf8(output.stderr).unwrap();
    assert_eq!((output.status.code(), told.trim()), (Some(1), "error: no config.json in ."));
}
