//! Kernels on the shapes of a GLM-4.1V layer.

#![allow(missing_docs, clippy::unwrap_used, reason = "criterion's macros; a benchmark's sizes are its own")]

use std::hint::black_box;

use criterion::{BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
use pocketglm_tensor::{Cpu, Weight, ops};

fn linear(c: &mut Criterion) {
    let cpu = Cpu::new(0).unwrap();
    let (n, k) = (4096, 4096);
    let f32s: Vec<f32> = (0..n * k).map(|i| (i % 1013) as f32 / 1013.0 - 0.5).collect();
    let halves: Vec<u16> = f32s.iter().map(|v| (v.to_bits() >> 16) as u16).collect();
    for (kind, weight) in [("f32", Weight::F32(&f32s)), ("bf16", Weight::BF16(&halves))] {
        let parts = [ops::Part { weight, rows: n, bias: None }];
        for m in [1, 64, 512] {
            let mut group = c.benchmark_group(if m == 1 { "decode" } else { "prefill" });
            group.sample_size(10);
            // Bytes of weights for decode, multiply-adds (as elements) for prefill.
            group.throughput(if m == 1 {
                Throughput::Bytes((n * k * weight.size().unwrap_or(1)) as u64)
            } else {
                Throughput::Elements((m * n * k) as u64)
            });
            let x: Vec<f32> = (0..m * k).map(|i| (i % 97) as f32 / 97.0 - 0.5).collect();
            let mut y = vec![0f32; m * n];
            group.bench_function(BenchmarkId::new(kind, m), |b| {
                b.iter(|| {
                    ops::linear(&cpu, black_box(&x), m, k, &parts, ops::Epilogue::None, &mut y).unwrap();
                });
            });
            group.finish();
        }
    }
}

criterion_group!(benches, linear);
criterion_main!(benches);
