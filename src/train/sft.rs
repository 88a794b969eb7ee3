//! Supervised fine-tuning: cross-entropy on the target and `</s>`.

use super::examples::{Example, pack};
use super::run::{HeldOut, Pass, Task, Validation};
use crate::error::Result;
use crate::models::bloom::training::Backward;
use crate::ops::train::{PackedBatch, TrainBackend};

/// The sequences of a fine-tuning run.
pub struct Sft {
    /// Examples that are trained on.
    pub train: Vec<Example>,
    /// Held-out examples; may be empty.
    pub validation: Vec<Example>,
}

impl<B: TrainBackend> Task<B> for Sft {
    type Batch = PackedBatch;

    fn loss_name(&self) -> (&'static str, &'static str) {
        ("cross-entropy a token", "nats")
    }

    fn count(&self) -> usize {
        self.train.len()
    }

    fn tokens(&self, example: usize) -> usize {
        self.train[example].ids.len()
    }

    fn labels(&self, example: usize) -> usize {
        self.train[example].labels()
    }

    fn batches(&self, _: &B, examples: &[usize], budget: usize) -> Result<Vec<PackedBatch>> {
        Ok(pack(examples.iter().map(|&i| &self.train[i]), budget))
    }

    fn loss(
        &self,
        Pass { backend, model, precision, space }: Pass<B>,
        batch: &PackedBatch,
        gradients: Option<(f32, Backward<B::Flat>)>,
        sums: &mut B::Sums,
    ) {
        model.loss(backend, (precision, batch), space, gradients, sums);
    }

    /// Mean cross-entropy a label.
    fn validate(&self, held_out: &mut HeldOut<B>) -> Result<Option<Validation>> {
        if self.validation.is_empty() {
            return Ok(None);
        }
        let lengths: Vec<usize> = self.validation.iter().map(|e| e.ids.len()).collect();
        let own = held_out.own(&lengths).into_iter().map(|i| &self.validation[i]);
        for batch in pack(own, held_out.micro_tokens) {
            let (pass, sums) = held_out.pass();
            self.loss(pass, &batch, None, sums);
        }
        held_out.communicator.all_reduce(held_out.backend, held_out.sums)?;
        let labels = self.validation.iter().map(Example::labels).sum::<usize>();
        let loss = held_out.backend.sums(held_out.sums)?.loss / labels.max(1) as f64;
        Ok(Some(Validation { loss, ..Validation::default() }))
    }
}
