use super::{open, scalar};
use crate::GpuOptions;
use crate::cases::{all, compare};

/// Runs every case, and gives how many it compared and what differed.
fn run_all(options: &GpuOptions, fuse: bool) -> Option<(usize, Vec<String>)> {
    let backend = open(options)?;
    let cpu = scalar();
    let (mut compared, mut refused, mut wrong) = (0, 0, Vec::new());
    for case in all().unwrap() {
        let wanted = match case.wanted(&cpu) {
            Ok(w) => w,
            Err(e) => {
                wrong.push(format!("{}: reference: {e}", case.name()));
                continue;
            }
        };
        backend.take_kernels();
        let found = case.run(&backend, fuse);
        let bound = case.bound_of(&backend.take_kernels());
        match found {
            // Values, and 64 rows of a matrix, that no binding holds are refused, see the tests of faults.
            Err(e) if options.binding_limit.is_some() && e.to_string().contains("fit a binding") => {
                refused += 1;
            }
            Err(e) => wrong.push(format!("{}: {e}", case.name())),
            Ok(found) => match compare(&wanted, &found, bound) {
                Ok(_) => compared += 1,
                Err(difference) => wrong.push(format!("{}: {difference}", case.name())),
            },
        }
    }
    assert!(refused <= 20, "{refused} cases were refused");
    Some((compared, wrong))
}

fn check(options: &GpuOptions, fuse: bool) {
    let Some((compared, wrong)) = run_all(options, fuse) else { return };
    assert!(wrong.is_empty(), "{} of {} cases:\n{}", wrong.len(), compared + wrong.len(), wrong.join("\n"));
    assert!(compared > 500, "only {compared} cases were compared");
}

#[test]
fn every_case_is_right_fused_and_writes_nothing_beside_its_results() {
    check(&GpuOptions { guarded: true, ..GpuOptions::default() }, true);
}

#[test]
fn every_case_is_right_unfused() {
    check(&GpuOptions::default(), false);
}

#[test]
fn every_case_is_right_with_plain_kernels() {
    check(&GpuOptions { plain: true, ..GpuOptions::default() }, true);
}

#[test]
fn every_case_is_right_with_small_bindings() {
    check(&GpuOptions { binding_limit: Some(1 << 18), ..GpuOptions::default() }, true);
}
