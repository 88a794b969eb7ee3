//! Rewrites prompts with the embedded model: `cargo run --release --example rewrite "a cat"`.

use beautiful_prompt::engine::{EngineOptions, Sampling};
use beautiful_prompt::generate::{Generate, GenerateOptions, Length, Session};
use beautiful_prompt::models::bloom::Bloom;
use beautiful_prompt::models::embedded;
use beautiful_prompt::ops::cpu::Cpu;
use beautiful_prompt::ops::cpu::simd::Isa;
use beautiful_prompt::rewrite::Prompter;
use std::sync::Arc;

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let mut prompts: Vec<String> = std::env::args().skip(1).collect();
    if prompts.is_empty() {
        prompts = vec!["a cat in the rain".into(), "a lighthouse at night".into()];
    }
    // all cores, with the fastest instructions that this machine has
    let cpu = Cpu::new(0, Isa::detect());
    let model = Bloom::load(&cpu, embedded::checkpoint(), None)?;
    let tokenizer = Arc::new(embedded::tokenizer());
    let prompter = Prompter { tokenizer: tokenizer.clone(), template: embedded::template() };
    let mut session = Session::new(&cpu, &model, &tokenizer, EngineOptions::default())?;
    let options = GenerateOptions {
        candidates: 2,
        sampling: Sampling { temperature: 1.0, top_p: 0.95, seed: 7, ..Sampling::default() },
        length: Length::New(64),
        ..GenerateOptions::default()
    };
    for (id, prompt) in prompts.iter().enumerate() {
        session.submit(id as u64, prompter.encode(prompt)?, &options)?;
    }
    // prompts are computed together and come back as they are done
    while !session.is_idle() {
        for done in session.step(&mut |_| {})? {
            let done = done?;
            for candidate in &done.candidates {
                println!("{} ->{}", prompts[done.id as usize], candidate.text);
            }
        }
    }
    Ok(())
}
