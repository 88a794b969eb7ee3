//! Criterion benches of what is done with a prompt's text: bytes a second stay the same however
//! long it is, hostile or not.

use beautiful_prompt::rewrite::{Fidelity, PromptMarkup};
use criterion::{BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
use std::hint::black_box;

const KINDS: [(&str, &str); 8] = [
    ("words", "two red cats in the rain, film grain, "),
    ("open brackets", "("),
    ("weights", "(a cat:1.2), "),
    ("brackets in turn", "[]"),
    ("open tags", "<lora:x"),
    ("wildcards", "__a__ "),
    ("underscores", "__"),
    ("breaks", "BREAK "),
];

fn prompts(c: &mut Criterion) {
    let fidelity = Fidelity::default();
    for (name, unit) in KINDS {
        let mut group = c.benchmark_group(name);
        group.sample_size(10);
        for bytes in [10_000, 20_000, 40_000, 80_000] {
            let text = unit.repeat(bytes / unit.len());
            group.throughput(Throughput::Bytes(text.len() as u64));
            group.bench_with_input(BenchmarkId::new("parse", bytes), &text, |b, t| {
                b.iter(|| PromptMarkup::parse(black_box(t)))
            });
            group.bench_with_input(BenchmarkId::new("measure", bytes), &text, |b, t| {
                b.iter(|| fidelity.score(black_box(t), black_box(t)))
            });
        }
    }
}

criterion_group!(benches, prompts);
criterion_main!(benches);
