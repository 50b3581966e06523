//! Kernels on cooperative matrices, which software adapters do not run: at least they are valid.

use naga::valid::{Capabilities, ValidationFlags, Validator};
use pocketglm_kernels::Variant;

fn check(variant: &Variant) -> Result<(), String> {
    check_source(&variant.source().unwrap())
}

fn check_source(source: &str) -> Result<(), String> {
    let module = naga::front::wgsl::parse_str(source).map_err(|e| e.emit_to_string(source))?;
    let mut validator = Validator::new(ValidationFlags::all(), Capabilities::all());
    validator.validate(&module).map(|_| ()).map_err(|e| e.emit_to_string(source))
}

#[test]
fn kernels_on_cooperative_matrices_are_valid_in_every_variant() {
    let mut variants = vec![Variant::new("arithmetic_rate.wgsl").flag("COOP")];
    let formats: [&[&'static str]; 7] = [
        &["W_FLOAT", "W_F16"],
        &["W_FLOAT", "W_BF16"],
        &[],
        &["BITS8"],
        &["BITS2"],
        &["GROUP16", "ASYM"],
        &["BITS8", "GROUP16"],
    ];
    let extras: [&[&'static str]; 6] =
        [&[], &["BIAS"], &["RESIDUAL"], &["BIAS", "GELU", "RESIDUAL"], &["SWIGLU"], &["X16", "BIAS"]];
    for file in ["gemm_coop.wgsl", "gemm_coop_db.wgsl", "gemm_coop_m64.wgsl"] {
        for flags in formats.iter().flat_map(|f| extras.iter().map(move |e| [*f, *e].concat())) {
            variants.push(flags.into_iter().fold(Variant::new(file), Variant::flag));
        }
    }
    for (d4, wide) in [(16, None), (20, Some("D80")), (32, Some("D128"))] {
        for flags in [&["SEGMENTS"][..], &["CAUSAL"], &["CAUSAL", "KV_F16"]] {
            for subgroups in [4, 8] {
                let variant =
                    Variant::new("flash_attention_coop.wgsl").value("D4", d4).value("NS", subgroups);
                variants.push(wide.iter().chain(flags).fold(variant, |v, f| v.flag(f)));
            }
        }
    }
    variants.push(Variant::new("attention_decode_coop.wgsl").flag("SPLIT"));
    let wrong: Vec<String> =
        variants.iter().filter_map(|v| check(v).err().map(|e| format!("{v}: {e}"))).collect();
    assert!(wrong.is_empty(), "{} of {}:\n{}", wrong.len(), variants.len(), wrong.join("\n"));
}

#[test]
fn a_kernel_that_is_wrong_is_not_valid() {
    let source = Variant::new("arithmetic_rate.wgsl").flag("COOP").source().unwrap();
    assert!(
        check_source(&source.replace("coopMultiplyAdd(a0, b0, c0)", "coopMultiplyAdd(a0, a0, c0)")).is_err()
    );
    assert!(check_source(&source.replace("var sum = 0.0;", "")).is_err());
}
