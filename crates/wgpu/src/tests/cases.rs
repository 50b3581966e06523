use super::{open, scalar};
use crate::GpuOptions;
use crate::cases::{all, compare};

/// Runs every case, and gives how many it compared and what differed.
fn run_all(options: &GpuOptions, fuse: bool) -> Option<(usize, Vec<String>)> {
    let backend = open(options)?;
    let cpu = scalar();
    let (mut compared, mut wrong) = (0, Vec::new());
    for case in all().unwrap() {
        let wanted = match case.wanted(&cpu) {
            Ok(w) => w,
            Err(e) => {
                wrong.push(format!("{}: reference: {e}", case.name()));
                continue;
            }
        };
        match case.run(&backend, fuse) {
            Err(e) => wrong.push(format!("{}: {e}", case.name())),
            Ok(found) => match compare(&wanted, &found, case.bound) {
                Ok(_) => compared += 1,
                Err(difference) => wrong.push(format!("{}: {difference}", case.name())),
            },
        }
    }
    Some((compared, wrong))
}

fn check(options: &GpuOptions, fuse: bool) {
    let Some((compared, wrong)) = run_all(options, fuse) else { return };
    assert!(wrong.is_empty(), "{} of {} cases:\n{}", wrong.len(), compared + wrong.len(), wrong.join("\n"));
    assert!(compared > 500, "only {compared} cases were compared");
}

#[test]
fn every_case_is_right_fused() {
    check(&GpuOptions::default(), true);
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
    check(&GpuOptions { binding_limit: Some(1 << 16), ..GpuOptions::default() }, true);
}
