//! Kernels on the shapes of a GLM-4.1V layer.

#![allow(missing_docs, clippy::unwrap_used, reason = "criterion's macros; a benchmark's sizes are its own")]

mod samples;

use std::hint::black_box;

use criterion::{BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
use pocketglm_tensor::{Cpu, DType, PackedFormat, Weight, ops};

/// One matrix `[n, k]` of `bytes` bytes against 1, 64 and 512 rows of x.
fn measure(c: &mut Criterion, cpu: &Cpu, name: &str, weight: Weight<'_>, [n, k]: [usize; 2], bytes: usize) {
    let parts = [ops::Part { weight, rows: n, bias: None }];
    for m in [1, 64, 512] {
        let mut group = c.benchmark_group(if m == 1 { "decode" } else { "prefill" });
        group.sample_size(10);
        // Bytes of weights for decode, multiply-adds (as elements) for prefill.
        group.throughput(if m == 1 {
            Throughput::Bytes(bytes as u64)
        } else {
            Throughput::Elements((m * n * k) as u64)
        });
        let (x, mut y) = (samples::values(m * k), vec![0f32; m * n]);
        group.bench_function(BenchmarkId::new(name, m), |b| {
            b.iter(|| {
                ops::linear(cpu, black_box(&x), m, k, &parts, ops::Epilogue::None, &mut y).unwrap();
            });
        });
        group.finish();
    }
}

fn linear(c: &mut Criterion) {
    let cpu = Cpu::new(0).unwrap();
    let (n, k) = (4096, 4096);
    let f32s = samples::values(n * k);
    let halves: Vec<u16> = f32s.iter().map(|v| (v.to_bits() >> 16) as u16).collect();
    for (kind, weight) in [("f32", Weight::F32(&f32s)), ("bf16", Weight::BF16(&halves))] {
        measure(c, &cpu, kind, weight, [n, k], n * k * weight.size().unwrap_or(1));
    }
}

fn packed_linear(c: &mut Criterion) {
    let cpu = Cpu::new(0).unwrap();
    let (n, k) = (4096, 4096);
    for name in ["Q4_0", "Q8_0", "Q4_K", "Q6_K", "int4-g64", "int2-g64"] {
        let format = DType::from_name(name).and_then(PackedFormat::of).unwrap();
        let packed = samples::packed(&cpu, format, n, k).unwrap();
        measure(c, &cpu, name, Weight::Packed(&packed), [n, k], packed.bytes().len());
    }
}

criterion_group!(benches, linear, packed_linear);
criterion_main!(benches);
