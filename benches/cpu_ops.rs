//! Criterion benches of the CPU operations: products by type and rows, attention, sampling,
//! training products.

use beautiful_prompt::models::bloom::alibi_slopes;
use beautiful_prompt::ops::cpu::Cpu;
use beautiful_prompt::ops::cpu::linear::{CpuWeight, gemm_nt};
use beautiful_prompt::ops::cpu::matmul::matmul;
use beautiful_prompt::ops::cpu::matrix_view::MatrixView;
use beautiful_prompt::ops::cpu::sampling::sample_token;
use beautiful_prompt::ops::cpu::simd::Isa;
use beautiful_prompt::ops::sampling::{Sampling, SamplingRow};
use beautiful_prompt::ops::train::Precision;
use beautiful_prompt::ops::{Batch, DecodeBackend, Heads, Tensor};
use beautiful_prompt::tensor::{Bytes, DType, HostTensor};
use criterion::{BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
use std::sync::Arc;

fn noise(n: usize) -> Vec<f32> {
    let mut words = beautiful_prompt::random::PhiloxStream::new(1, n as u64);
    (0..n).map(|_| words.uniform() - 0.5).collect()
}

fn matrix(cpu: &Cpu, rows: usize, cols: usize, dtype: DType) -> CpuWeight {
    let bytes: Vec<u8> = noise(rows * cols).into_iter().flat_map(f32::to_le_bytes).collect();
    let len = bytes.len();
    let tensor = HostTensor {
        dtype: DType::F32,
        shape: vec![rows, cols],
        bytes: Bytes::Owned(Arc::new(bytes), 0..len),
    };
    CpuWeight::new(cpu, tensor, Some(dtype)).expect("two dimensions")
}

/// The up projection of BLOOM-1b1.
fn products(c: &mut Criterion) {
    let cpu = Cpu::new(0, Isa::detect());
    let (rows, cols) = (6144, 1536);
    let mut group = c.benchmark_group("product 6144x1536");
    for dtype in [DType::F32, DType::F16, DType::Bf16, DType::Int8] {
        let w = matrix(&cpu, rows, cols, dtype);
        for tokens in [1, 4, 16, 128] {
            let x = noise(tokens * cols);
            group.throughput(Throughput::Elements((tokens * rows * cols) as u64));
            group.bench_function(BenchmarkId::new(dtype.name(), tokens), |b| {
                b.iter(|| {
                    gemm_nt(&cpu, &x, &w, &|_, _, sums| {
                        std::hint::black_box(sums);
                    })
                })
            });
        }
    }
}

fn attention(c: &mut Criterion) {
    let cpu = Cpu::new(0, Isa::detect());
    let heads = Heads { count: 16, size: 96, slopes: alibi_slopes(16) };
    let mut group = c.benchmark_group("attention 16x96");
    for (name, span, past) in
        [("decode after 512", 1usize, 512usize), ("prefill 128", 128, 0), ("prefill 512", 512, 0)]
    {
        let table: Vec<u32> = (0..(span + past).div_ceil(16) as u32).collect();
        let mut cache = cpu.cache(DType::Bf16, 1, &heads, table.len()).expect("memory");
        let mut batch = Batch::default();
        batch.push(&vec![0; span], past, &table);
        let qkv = cpu.upload(&noise(span * 3 * 16 * 96), 3 * 16 * 96);
        cache.write(&cpu, &batch, 0, qkv.buffer());
        let mut out = Tensor::default();
        group.bench_function(name, |b| {
            b.iter(|| cpu.paged_attention(&mut out, &qkv, &batch, (&cache, 0)))
        });
    }
}

fn sampling(c: &mut Criterion) {
    let mut logits: Vec<f32> = noise(250_880).into_iter().map(|v| v * 20.0).collect();
    let mut group = c.benchmark_group("sampling 250880");
    let plain = Sampling { temperature: 1.0, ..Sampling::default() };
    for (name, sampling) in [
        ("greedy", Sampling::default()),
        ("plain", plain),
        ("top-k 50, top-p 0.95", Sampling { top_k: 50, top_p: 0.95, ..plain }),
        ("top-p 0.95", Sampling { top_p: 0.95, ..plain }),
    ] {
        let row = SamplingRow { seen: &[5, 6, 7], ..SamplingRow::new(0, &sampling, 0, 9) };
        group.bench_function(name, |b| b.iter(|| sample_token(&mut logits, 0.0, &row)));
    }
}

fn training_products(c: &mut Criterion) {
    let cpu = Cpu::new(0, Isa::detect());
    let (m, n, k) = (2048, 1024, 256);
    let (a, b, mut out) = (noise(m * k), noise(n * k), vec![0.0; m * n]);
    let mut group = c.benchmark_group("training product 2048x1024x256");
    group.throughput(Throughput::Elements((m * n * k) as u64));
    for precision in [Precision::F32, Precision::Bf16] {
        group.bench_function(format!("{precision:?}"), |bench| {
            bench.iter(|| {
                matmul(
                    &cpu,
                    precision,
                    (&mut out, n),
                    MatrixView::new(&a, m, k),
                    MatrixView::new(&b, n, k).t(),
                    false,
                )
            })
        });
    }
}

criterion_group! {
    name = benches;
    config = Criterion::default().sample_size(20);
    targets = products, attention, sampling, training_products
}
criterion_main!(benches);
