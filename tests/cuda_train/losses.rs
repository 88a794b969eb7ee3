//! Losses at the LM head.

use crate::emulated::{Emulated, gpu};
use beautiful_prompt::models::bloom::BloomConfig;
use beautiful_prompt::models::bloom::training::{Backward, TrainModel, Workspace};
use beautiful_prompt::ops::Tensor;
use beautiful_prompt::ops::cpu::Cpu;
use beautiful_prompt::ops::cpu::simd::Isa;
use beautiful_prompt::ops::cuda::Cuda;
use beautiful_prompt::ops::token_loss::{
    ClippedPpo, LossGradients, LossOutput, TokenLoss, TokenStats,
};
use beautiful_prompt::ops::train::{PackedBatch, Params, Precision, TrainBackend};
use beautiful_prompt::random::Normal;
use beautiful_prompt::tensor::DType;
use half::bf16;

/// Hidden states, an LM head and labels: numbers that bf16 holds, so that what is left between the
/// backends is the rounding of logits and of what comes of them.
struct Head {
    x: Vec<f32>,
    head: Vec<f32>,
    targets: Vec<u32>,
    width: usize,
}

impl Head {
    fn new(labels: usize, vocabulary: usize, width: usize) -> Head {
        let mut normal = Normal::new(9, vocabulary as u64);
        let mut numbers = |n: usize, scale: f32| -> Vec<f32> {
            (0..n).map(|_| bf16::from_f32(normal.sample() * scale).to_f32()).collect()
        };
        Head {
            x: numbers(labels * width, 1.0),
            head: numbers(vocabulary * width, 1.5 / (width as f32).sqrt()),
            targets: (0..labels).map(|i| (i * 7919 % vocabulary) as u32).collect(),
            width,
        }
    }
}

/// The losses that are tried.
#[derive(Clone, Copy, Debug)]
enum Kind {
    CrossEntropy,
    Ppo,
    PpoWithPenalties,
    Given,
    GivenWithEntropies,
}

const KINDS: [Kind; 5] =
    [Kind::CrossEntropy, Kind::Ppo, Kind::PpoWithPenalties, Kind::Given, Kind::GivenWithEntropies];

/// What comes of a loss.
#[derive(Debug, PartialEq)]
struct Losses {
    sum: f64,
    log_probs: Vec<f32>,
    entropies: Vec<f32>,
    dx: Vec<f32>,
    grads: Vec<f32>,
}

struct Run<'a, B: TrainBackend> {
    b: &'a B,
    x: Tensor<B>,
    head: &'a Head,
    values: B::Flat,
    precision: Precision,
}

impl<B: TrainBackend> Run<'_, B> {
    fn column(&self, values: impl IntoIterator<Item = f32>) -> Tensor<B> {
        let mut column = Tensor::default();
        let values: Vec<f32> = values.into_iter().collect();
        self.b.upload_column(&mut column, &values).unwrap();
        column
    }

    fn losses(&self, loss: &TokenLoss<B>, differentiate: bool) -> Losses {
        let at = 0..self.head.head.len();
        let (mut dx, mut logits, mut stats) = Default::default();
        let mut grads = self.b.zeros(at.len()).unwrap();
        let mut sums = self.b.new_sums().unwrap();
        let gradients = LossGradients { dx: &mut dx, grads: Some(&mut grads) };
        let gradients = differentiate.then_some(gradients);
        let to = LossOutput { sums: &mut sums, stats: Some(&mut stats), gradients };
        let p = Params { values: &self.values, precision: self.precision };
        let x = (&self.x, &mut logits);
        self.b.lm_head_loss(x, &self.head.targets, (p, &at), loss, to);
        let TokenStats { log_probs, entropies } = stats;
        assert_eq!(log_probs.shape(), [self.head.targets.len(), 1]);
        let read = |x| self.b.download_column(x).unwrap();
        Losses {
            sum: self.b.sums(&sums).unwrap().loss,
            log_probs: read(&log_probs),
            entropies: read(&entropies),
            dx: if differentiate { read(&dx) } else { vec![] },
            grads: self.b.values(&grads).unwrap().into_owned(),
        }
    }

    /// What a kind of loss gives. Old and reference log-probabilities are this backend's own with
    /// some distance, as in training, so that both backends clip the same labels. Every fifth
    /// label has gradients of zero, but for those of penalties.
    fn kind(&self, kind: Kind) -> Losses {
        let before = self.losses(&TokenLoss::CrossEntropy { scale: 0.5 }, false);
        assert!(before.grads.iter().all(|g| *g == 0.0));
        let moved = |offsets: [f32; 4]| {
            self.column(
                before.log_probs.iter().zip(offsets.into_iter().cycle()).map(|(l, o)| l + o),
            )
        };
        let labels = self.head.targets.len();
        let weights = |numbers: [f32; 5]| self.column((0..labels).map(|i| numbers[i % 5]));
        let [old, reference] = [[-0.5, 0.6, 0.05, -0.05], [0.3, -0.8, 0.1, 0.0]].map(moved);
        let [some, others] = [[1.0, -0.5, 0.7, -1.2, 0.0], [-0.4, 0.0, 0.9, 0.3, 0.0]].map(weights);
        let penalties = matches!(kind, Kind::PpoWithPenalties);
        let loss = match kind {
            Kind::CrossEntropy => TokenLoss::CrossEntropy { scale: 0.5 },
            Kind::Ppo | Kind::PpoWithPenalties => TokenLoss::ClippedPpo(ClippedPpo {
                old_log_probs: &old,
                advantages: &some,
                reference_log_probs: penalties.then_some(&reference),
                clip: 0.2,
                kl: 0.4,
                entropy: if penalties { 0.3 } else { 0.0 },
                scale: 0.5,
            }),
            Kind::Given => TokenLoss::Given { log_probs: &some, entropies: None },
            Kind::GivenWithEntropies => {
                TokenLoss::Given { log_probs: &some, entropies: Some(&others) }
            }
        };
        let without_gradients = self.losses(&loss, false);
        let losses = self.losses(&loss, true);
        assert_eq!(losses.log_probs, before.log_probs);
        assert_eq!(losses.entropies, before.entropies);
        assert_eq!(without_gradients.sum, losses.sum);
        if !matches!(kind, Kind::CrossEntropy | Kind::PpoWithPenalties) {
            for row in losses.dx.chunks_exact(self.head.width).skip(4).step_by(5) {
                assert!(row.iter().all(|d| *d == 0.0), "{kind:?}: {row:?}");
            }
        }
        losses
    }
}

fn cuda(check_order: bool, hopper: bool) -> Cuda<Emulated> {
    Cuda::new(gpu(check_order, hopper), DType::Bf16, false)
}

fn on_gpu<'a>(b: &'a Cuda<Emulated>, head: &'a Head) -> Run<'a, Cuda<Emulated>> {
    let mut values = head.head.clone();
    values.resize(values.len().next_multiple_of(8), 0.0);
    let x = b.upload(&head.x, head.width, DType::Bf16).unwrap();
    Run { b, x, head, values: b.parameters(values).unwrap(), precision: Precision::Bf16 }
}

fn on_cpu<'a>(b: &'a Cpu, head: &'a Head) -> Run<'a, Cpu> {
    let x = b.upload(&head.x, head.width);
    Run { b, x, head, values: head.head.clone(), precision: Precision::F32 }
}

/// The largest difference over the largest magnitude.
fn error(ours: &[f32], theirs: &[f32]) -> f32 {
    assert_eq!(ours.len(), theirs.len());
    let largest = theirs.iter().fold(1e-30f32, |m, v| m.max(v.abs()));
    let worst = ours.iter().zip(theirs).map(|(a, b)| (a - b).abs());
    worst.fold(0.0, |m, e| if e <= m { m } else { e }) / largest
}

/// A rounding to bf16.
const ROUNDING: f32 = 3.9e-3;

fn check(head: &Head, hopper: bool) {
    let (ours, theirs) = (cuda(false, hopper), Cpu::new(2, Isa::detect()));
    let (ours, theirs) = (on_gpu(&ours, head), on_cpu(&theirs, head));
    let mut magnitude = 0.0;
    for kind in KINDS {
        let (ours, theirs) = (ours.kind(kind), theirs.kind(kind));
        // logits are rounded, and many of them average out
        if matches!(kind, Kind::CrossEntropy) {
            magnitude = theirs.sum;
        }
        let off = (ours.sum - theirs.sum).abs() / magnitude;
        assert!(off <= ROUNDING as f64, "{kind:?}: {} for {}", ours.sum, theirs.sum);
        let given = matches!(kind, Kind::Given | Kind::GivenWithEntropies);
        assert_eq!(given, theirs.sum == 0.0, "{kind:?}");
        for (name, ours, theirs, allowed) in [
            ("log-probabilities", &ours.log_probs, &theirs.log_probs, ROUNDING),
            ("entropies", &ours.entropies, &theirs.entropies, ROUNDING),
            // probabilities have the error of their logits, and gradients are rounded
            ("dx", &ours.dx, &theirs.dx, 4.0 * ROUNDING),
            ("the LM head's gradient", &ours.grads, &theirs.grads, 4.0 * ROUNDING),
        ] {
            let e = error(ours, theirs);
            assert!(e <= allowed, "{kind:?}, hopper {hopper}: {name} off by {e:e}");
        }
    }
}

#[test]
fn every_loss_agrees_with_the_cpu() {
    check(&Head::new(21, 130, 48), false);
    check(&Head::new(21, 517, 32), true);
}

/// The sums of the chunks are added up, and every chunk takes its own labels' numbers.
#[test]
fn labels_beyond_a_chunk_agree_with_the_cpu() {
    check(&Head::new(1030, 67, 16), false);
}

#[test]
fn the_order_of_threads_does_not_matter_and_results_repeat() {
    let head = Head::new(9, 131, 16);
    let run = |check_order, kind| on_gpu(&cuda(check_order, false), &head).kind(kind);
    for kind in [Kind::PpoWithPenalties, Kind::GivenWithEntropies] {
        assert_eq!(run(true, kind), run(false, kind), "{kind:?}");
    }
}

/// The step with it is not taken.
#[test]
fn a_ratio_that_is_no_number_makes_the_loss_none() {
    let (head, b) = (Head::new(7, 67, 16), cuda(false, false));
    let run = on_gpu(&b, &head);
    for bad in [f32::NAN, f32::NEG_INFINITY] {
        let [old, advantages] = [[bad, 0.0], [-1.0, 1.0]]
            .map(|two: [f32; 2]| run.column(two.into_iter().cycle().take(7)));
        let ppo = TokenLoss::ClippedPpo(ClippedPpo {
            old_log_probs: &old,
            advantages: &advantages,
            reference_log_probs: None,
            clip: 0.2,
            kl: 0.0,
            entropy: 0.0,
            scale: 1.0,
        });
        assert!(!run.losses(&ppo, true).sum.is_finite(), "{bad}");
    }
}

/// Old log-probabilities are those of the same model in a pass without gradients: all ratios are
/// exactly 1, and each label adds its advantage alone.
#[test]
fn a_models_own_log_probs_have_ratios_of_one() {
    let b = cuda(false, false);
    let model = TrainModel::random(BloomConfig::new(51, 32, 1, 1), 3).place(&b).unwrap();
    let mut batch = PackedBatch::default();
    batch.push(&[4, 8, 15, 16, 23, 42, 7], 2);
    let batch = (Precision::Bf16, &batch);
    let (mut space, mut sums) = (Workspace::default(), b.new_sums().unwrap());
    let mut old = TokenStats::default();
    let to = LossOutput { sums: &mut sums, stats: Some(&mut old), gradients: None };
    model.token_loss(&b, batch, &mut space, &TokenLoss::CrossEntropy { scale: 1.0 }, to);
    let mut advantages = Tensor::default();
    b.upload_column(&mut advantages, &[1.0, -2.0, 3.0, -4.0, 5.5]).unwrap();
    let ppo = TokenLoss::ClippedPpo(ClippedPpo {
        old_log_probs: &old.log_probs,
        advantages: &advantages,
        reference_log_probs: Some(&old.log_probs),
        clip: 0.2,
        kl: 1.0,
        entropy: 0.0,
        scale: 1.0,
    });
    let mut grads = b.zeros(model.config.parameter_count()).unwrap();
    b.clear_sums(&mut sums);
    let to = LossOutput { sums: &mut sums, stats: None, gradients: Some(Backward::to(&mut grads)) };
    model.token_loss(&b, batch, &mut space, &ppo, to);
    assert_eq!(b.sums(&sums).unwrap().loss, -3.5);
    assert!(b.values(&grads).unwrap().iter().any(|g| *g != 0.0));
}
