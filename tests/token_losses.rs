//! Losses at the LM head on the CPU: against PyTorch's (tests/golden/make_token_losses.py), and
//! against finite differences of whole models.

use beautiful_prompt::models::bloom::BloomConfig;
use beautiful_prompt::models::bloom::training::{Backward, TrainModel, Workspace};
use beautiful_prompt::ops::Tensor;
use beautiful_prompt::ops::cpu::Cpu;
use beautiful_prompt::ops::cpu::simd::Isa;
use beautiful_prompt::ops::token_loss::{
    ClippedPpo, LossGradients, LossOutput, TokenLoss, TokenStats,
};
use beautiful_prompt::ops::train::{PackedBatch, Params, Precision, StepSums, TrainBackend};
use beautiful_prompt::random::Normal;
use safetensors::SafeTensors;
use std::path::Path;

/// Hidden states, an LM head, and labels.
struct Head {
    x: Vec<f32>,
    head: Vec<f32>,
    targets: Vec<u32>,
}

/// What comes of a loss.
struct Losses {
    sum: f64,
    log_probs: Vec<f32>,
    entropies: Vec<f32>,
    dx: Vec<f32>,
    dhead: Vec<f32>,
}

impl Head {
    fn width(&self) -> usize {
        self.x.len() / self.targets.len()
    }

    fn losses(&self, cpu: &Cpu, loss: &TokenLoss<Cpu>) -> Losses {
        let x = cpu.upload(&self.x, self.width());
        let (mut dx, mut logits, mut stats) = Default::default();
        let (mut grads, mut sums) = (vec![0.0; self.head.len()], StepSums::default());
        let gradients = Some(LossGradients { dx: &mut dx, grads: Some(&mut grads) });
        let to = LossOutput { sums: &mut sums, stats: Some(&mut stats), gradients };
        let (p, at) =
            (Params { values: &self.head, precision: Precision::F32 }, 0..self.head.len());
        cpu.lm_head_loss((&x, &mut logits), &self.targets, (p, &at), loss, to);
        let TokenStats { log_probs, entropies } = stats;
        Losses {
            sum: sums.loss,
            log_probs: log_probs.buffer().clone(),
            entropies: entropies.buffer().clone(),
            dx: dx.buffer().clone(),
            dhead: grads,
        }
    }

    /// Without a backward pass.
    fn only_stats(&self, cpu: &Cpu) -> (f64, TokenStats<Cpu>) {
        let x = cpu.upload(&self.x, self.width());
        let (mut logits, mut stats, mut sums) = Default::default();
        let to = LossOutput { sums: &mut sums, stats: Some(&mut stats), gradients: None };
        let (p, at) =
            (Params { values: &self.head, precision: Precision::F32 }, 0..self.head.len());
        let loss = TokenLoss::CrossEntropy { scale: 1.0 };
        cpu.lm_head_loss((&x, &mut logits), &self.targets, (p, &at), &loss, to);
        (sums.loss, stats)
    }
}

fn column(values: impl IntoIterator<Item = f32>) -> Tensor<Cpu> {
    let mut column = Tensor::default();
    let values: Vec<f32> = values.into_iter().collect();
    Cpu::new(1, Isa::detect()).upload_column(&mut column, &values).unwrap();
    column
}

/// The largest difference over the largest magnitude.
fn error(ours: &[f32], theirs: &[f32]) -> f32 {
    assert_eq!(ours.len(), theirs.len());
    let largest = theirs.iter().fold(0f32, |m, v| m.max(v.abs()));
    let worst = ours.iter().zip(theirs).map(|(a, b)| (a - b).abs());
    worst.fold(0.0, |m, e| if e <= m { m } else { e }) / largest
}

fn golden_bytes() -> Vec<u8> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    std::fs::read(root.join("tests/golden/token_losses.safetensors")).unwrap()
}

struct Golden<'a>(SafeTensors<'a>);

impl Golden<'_> {
    fn f32(&self, name: &str) -> Vec<f32> {
        bytemuck::pod_collect_to_vec(self.0.tensor(name).unwrap().data())
    }

    fn f64(&self, name: &str) -> f64 {
        bytemuck::pod_read_unaligned(self.0.tensor(name).unwrap().data())
    }

    fn column(&self, name: &str) -> Tensor<Cpu> {
        column(self.f32(name))
    }

    fn head(&self) -> Head {
        let targets: Vec<i64> =
            bytemuck::pod_collect_to_vec(self.0.tensor("targets").unwrap().data());
        Head {
            x: self.f32("x"),
            head: self.f32("head"),
            targets: targets.into_iter().map(|t| t as u32).collect(),
        }
    }

    /// Sums of 8 products and of 131 exponentials in f32: some 20 roundings of 6e-8.
    fn check(&self, name: &str, ours: &Losses) {
        for (part, ours) in [("dx", &ours.dx), ("dhead", &ours.dhead)] {
            let e = error(ours, &self.f32(&format!("{name}.{part}")));
            assert!(e < 2e-6, "{name}.{part} is off by {e:e}");
        }
    }

    fn check_loss(&self, name: &str, ours: f64) {
        let theirs = self.f64(&format!("{name}.loss"));
        assert!((ours / theirs - 1.0).abs() < 2e-6, "{name}: {ours} for {theirs}");
    }
}

#[test]
fn losses_and_gradients_are_pytorchs_on_every_instruction_set() {
    let bytes = golden_bytes();
    let golden = Golden(SafeTensors::deserialize(&bytes).unwrap());
    let head = golden.head();
    let [old, advantages, reference] = ["old", "advantages", "reference"].map(|n| golden.column(n));
    let ppo = |reference_log_probs, entropy| ClippedPpo {
        old_log_probs: &old,
        advantages: &advantages,
        reference_log_probs,
        clip: 0.2,
        kl: 0.3,
        entropy,
        scale: 1.0,
    };
    let losses = [
        ("cross_entropy", TokenLoss::CrossEntropy { scale: 1.0 }),
        ("ppo", TokenLoss::ClippedPpo(ppo(None, 0.0))),
        ("ppo_with_penalties", TokenLoss::ClippedPpo(ppo(Some(&reference), 0.05))),
    ];
    for isa in Isa::available() {
        let cpu = Cpu::new(2, isa);
        for (name, loss) in &losses {
            let ours = head.losses(&cpu, loss);
            golden.check(name, &ours);
            golden.check_loss(name, ours.sum);
            for (stat, ours) in [("log_probs", &ours.log_probs), ("entropies", &ours.entropies)] {
                let e = error(ours, &golden.f32(stat));
                assert!(e < 2e-6, "{isa:?}, {name}: {stat} are off by {e:e}");
            }
        }
    }
}

/// A loss of sums over sequences: the caller computes its gradients from a pass for statistics.
#[test]
fn dpo_by_given_gradients_is_pytorchs() {
    let bytes = golden_bytes();
    let golden = Golden(SafeTensors::deserialize(&bytes).unwrap());
    let (head, cpu) = (golden.head(), Cpu::new(1, Isa::detect()));
    let (reference, weights) = (golden.f32("reference"), golden.f32("advantages"));
    let (_, stats) = head.only_stats(&cpu);
    let (log_probs, entropies) = (stats.log_probs.buffer(), stats.entropies.buffer());
    let (beta, mut loss, mut gradients) = (0.4, 0.0, vec![0f32; weights.len()]);
    for (chosen, rejected) in [(0..3, 3..7), (7..9, 9..12)] {
        let sum = |r: &std::ops::Range<usize>| -> f64 {
            r.clone().map(|i| log_probs[i] as f64 - reference[i] as f64).sum()
        };
        let margin = beta * (sum(&chosen) - sum(&rejected));
        loss += (-margin).exp().ln_1p();
        let slope = (-beta / (1.0 + margin.exp())) as f32;
        chosen.for_each(|i| gradients[i] = slope);
        rejected.for_each(|i| gradients[i] = -slope);
    }
    loss += entropies.iter().zip(&weights).map(|(h, w)| (h * w) as f64).sum::<f64>();
    golden.check_loss("dpo", loss);
    let (gradients, weights) = (column(gradients), column(weights));
    let given = TokenLoss::Given { log_probs: &gradients, entropies: Some(&weights) };
    let ours = head.losses(&cpu, &given);
    golden.check("dpo", &ours);
    assert_eq!(ours.sum, 0.0);
}

/// Normal numbers, and labels that are spread over the vocabulary.
fn random_head(labels: usize, vocabulary: usize, width: usize) -> Head {
    let mut normal = Normal::new(5, vocabulary as u64);
    let mut numbers = |n: usize| -> Vec<f32> { (0..n).map(|_| normal.sample()).collect() };
    Head {
        x: numbers(labels * width),
        head: numbers(vocabulary * width),
        targets: (0..labels).map(|i| (i * 7919 % vocabulary) as u32).collect(),
    }
}

/// What a test of PPO takes: ratios on both sides of both limits, far enough from these.
struct Ppo([Tensor<Cpu>; 3]);

impl Ppo {
    fn new(log_probs: &[f32]) -> Ppo {
        let moved = |offsets: [f32; 5]| {
            column(log_probs.iter().zip(offsets.into_iter().cycle()).map(|(l, o)| l + o))
        };
        let advantages = (0..log_probs.len()).map(|i| [1.0, -0.5, 0.7][i % 3]);
        let old = moved([-0.5, 0.6, 0.05, -0.05, 0.4]);
        Ppo([old, column(advantages), moved([0.3, -0.8, 0.1, 0.0, -0.2])])
    }

    fn loss(&self, scale: f32) -> TokenLoss<'_, Cpu> {
        let [old_log_probs, advantages, reference] = &self.0;
        TokenLoss::ClippedPpo(ClippedPpo {
            old_log_probs,
            advantages,
            reference_log_probs: Some(reference),
            clip: 0.2,
            kl: 0.4,
            entropy: 0.3,
            scale,
        })
    }
}

/// A label's log-probability, entropy and PPO loss in f64, with what [`Ppo::loss`] takes but for
/// the scale; adds its gradients to those of the hidden state and of the head.
fn plain_ppo(
    (x, head, target): (&[f32], &[f32], usize),
    [old, advantage, reference]: [f64; 3],
    scale: f64,
    (dx, dhead): (&mut [f64], &mut [f64]),
) -> [f64; 3] {
    let dot = |row: &[f32]| -> f64 { row.iter().zip(x).map(|(a, b)| *a as f64 * *b as f64).sum() };
    let logits: Vec<f64> = head.chunks_exact(x.len()).map(dot).collect();
    let max = logits.iter().copied().fold(f64::NEG_INFINITY, f64::max);
    let lse = max + logits.iter().map(|z| (z - max).exp()).sum::<f64>().ln();
    let entropy: f64 = logits.iter().map(|z| (z - lse).exp() * (lse - z)).sum();
    let log_prob = logits[target] - lse;
    let (ratio, log_ratio) = ((log_prob - old).exp(), log_prob - reference);
    let (plain, clipped) = (ratio * advantage, ratio.clamp(0.8, 1.2) * advantage);
    let k3 = (-log_ratio).exp() - 1.0 + log_ratio;
    let loss = -plain.min(clipped) + 0.4 * k3 - 0.3 * entropy;
    let surrogate = if clipped < plain { 0.0 } else { -plain };
    let (g, h) = (scale * (surrogate + 0.4 * (1.0 - (-log_ratio).exp())), scale * -0.3);
    let rows = head.chunks_exact(x.len()).zip(dhead.chunks_exact_mut(x.len()));
    for (j, ((row, drow), z)) in rows.zip(&logits).enumerate() {
        let log_p = z - lse;
        let hit = if j == target { g } else { 0.0 };
        let d = hit - log_p.exp() * (g + h * (log_p + entropy));
        dx.iter_mut().zip(row).for_each(|(dx, w)| *dx += d * *w as f64);
        drow.iter_mut().zip(x).for_each(|(dw, x)| *dw += d * *x as f64);
    }
    [log_prob, entropy, loss]
}

/// More labels than a chunk has rows, of a vocabulary of BLOOM's size that is odd.
#[test]
fn chunks_of_labels_agree_with_f64() {
    let (labels, vocabulary, width) = (19, 250_881, 2);
    let (head, cpu) = (random_head(labels, vocabulary, width), Cpu::new(2, Isa::detect()));
    let (sum, stats) = head.only_stats(&cpu);
    let log_probs = stats.log_probs.buffer();
    let ppo = Ppo::new(log_probs);
    let ours = head.losses(&cpu, &ppo.loss(0.5));
    assert_eq!((&ours.log_probs, &ours.entropies), (log_probs, stats.entropies.buffer()));
    let nll: f64 = log_probs.iter().map(|l| -*l as f64).sum();
    assert!((nll / sum - 1.0).abs() < 1e-6, "{nll} {sum}");
    let (mut dx, mut dhead) = (vec![0.0; head.x.len()], vec![0.0; head.head.len()]);
    let known: Vec<[f64; 3]> = (0..labels)
        .map(|i| {
            let at = i * width..(i + 1) * width;
            let label = (&head.x[at.clone()], &head.head[..], head.targets[i] as usize);
            let given = ppo.0.each_ref().map(|t| t.buffer()[i] as f64);
            plain_ppo(label, given, 0.5, (&mut dx[at], &mut dhead))
        })
        .collect();
    let total: f64 = known.iter().map(|k| k[2]).sum();
    assert!((total - ours.sum).abs() < 1e-5 * labels as f64, "{total} {}", ours.sum);
    let of = |i: usize| known.iter().map(|k| k[i] as f32).collect::<Vec<f32>>();
    let f32s = |v: &[f64]| v.iter().map(|v| *v as f32).collect::<Vec<f32>>();
    // in f32, with sums of 250,881 terms, of which those of dx nearly cancel
    for (name, ours, theirs, allowed) in [
        ("log-probabilities", &ours.log_probs, of(0), 1e-6),
        ("entropies", &ours.entropies, of(1), 5e-6),
        ("dx", &ours.dx, f32s(&dx), 5e-5),
        ("the head's gradient", &ours.dhead, f32s(&dhead), 1e-5),
    ] {
        let e = error(ours, &theirs);
        assert!(e < allowed, "{name} off by {e:e}");
    }
}

#[test]
fn statistics_change_no_bit_of_cross_entropy_and_results_repeat_on_any_number_of_threads() {
    let head = random_head(40, 131, 8);
    let [one, three] = [1, 3].map(|threads| Cpu::new(threads, Isa::detect()));
    let (_, stats) = head.only_stats(&one);
    let ppo = Ppo::new(stats.log_probs.buffer());
    let bits = |v: &[f32]| v.iter().map(|x| x.to_bits()).collect::<Vec<_>>();
    for loss in [TokenLoss::CrossEntropy { scale: 0.3 }, ppo.loss(0.3)] {
        let (a, b) = (head.losses(&one, &loss), head.losses(&three, &loss));
        assert_eq!(a.sum.to_bits(), b.sum.to_bits());
        assert_eq!((bits(&a.dx), bits(&a.dhead)), (bits(&b.dx), bits(&b.dhead)));
        assert_eq!(bits(&a.log_probs), bits(stats.log_probs.buffer()));
        assert_eq!(bits(&b.entropies), bits(stats.entropies.buffer()));
    }
    let with_stats = head.losses(&one, &TokenLoss::CrossEntropy { scale: 0.3 });
    let x = one.upload(&head.x, head.width());
    let (mut dx, mut logits, mut sums) = Default::default();
    let mut grads = vec![0.0; head.head.len()];
    let gradients = Some(LossGradients { dx: &mut dx, grads: Some(&mut grads) });
    let to = LossOutput { sums: &mut sums, stats: None, gradients };
    let (p, at) = (Params { values: &head.head, precision: Precision::F32 }, 0..head.head.len());
    let loss = TokenLoss::CrossEntropy { scale: 0.3 };
    one.lm_head_loss((&x, &mut logits), &head.targets, (p, &at), &loss, to);
    let sums: StepSums = sums;
    assert_eq!(sums.loss.to_bits(), with_stats.sum.to_bits());
    let dx: Tensor<Cpu> = dx;
    assert_eq!(bits(dx.buffer()), bits(&with_stats.dx));
    assert_eq!(bits(&grads), bits(&with_stats.dhead));
}

#[test]
fn labels_without_influence_have_gradients_of_exactly_zero() {
    let (head, cpu) = (random_head(6, 131, 8), Cpu::new(1, Isa::detect()));
    let (_, stats) = head.only_stats(&cpu);
    let old = column(
        stats
            .log_probs
            .buffer()
            .iter()
            .zip([0.1, -0.5, 0.1, 0.5, 0.1, 0.0])
            .map(|(log_prob, offset)| log_prob + offset),
    );
    // the second ratio is clipped from above, the fourth from below, the others have no advantage
    let advantages = column([0.0, 1.0, 0.0, -1.0, 0.0, 0.0]);
    let ppo = TokenLoss::ClippedPpo(ClippedPpo {
        old_log_probs: &old,
        advantages: &advantages,
        reference_log_probs: None,
        clip: 0.2,
        kl: 1.0,
        entropy: 0.0,
        scale: 1.0,
    });
    let ours = head.losses(&cpu, &ppo);
    assert!(ours.dx.iter().chain(&ours.dhead).all(|d| *d == 0.0));
    assert!((ours.sum - (-1.2 + 0.8)).abs() < 1e-6, "{}", ours.sum);
    let (g, h) = (column([0.0, 2.0, 0.0, 0.0, 0.0, 0.0]), column([0.0, 0.0, 0.0, 0.0, 3.0, 0.0]));
    let ours = head.losses(&cpu, &TokenLoss::Given { log_probs: &g, entropies: Some(&h) });
    for (i, row) in ours.dx.chunks_exact(8).enumerate() {
        assert_eq!(row.iter().all(|d| *d == 0.0), ![1, 4].contains(&i), "row {i}");
    }
}

/// The step with it is not taken.
#[test]
fn a_ratio_that_is_no_number_makes_the_loss_none() {
    let (head, cpu) = (random_head(5, 131, 8), Cpu::new(1, Isa::detect()));
    let (_, stats) = head.only_stats(&cpu);
    for bad in [f32::NAN, f32::NEG_INFINITY] {
        let mut old = stats.log_probs.buffer().clone();
        old[1] = bad;
        let mut ppo = Ppo::new(stats.log_probs.buffer());
        ppo.0[0] = column(old);
        assert!(!head.losses(&cpu, &ppo.loss(1.0)).sum.is_finite(), "{bad}");
    }
}

#[test]
fn whole_models_have_the_gradients_of_finite_differences() {
    let mut model = TrainModel::random(BloomConfig::new(50, 32, 2, 2), 3);
    model.values.iter_mut().for_each(|v| *v *= 6.0);
    let mut batch = PackedBatch::default();
    batch.push(&[4, 8, 15, 16, 23, 42, 7], 2);
    batch.push(&[9, 11, 3], 1);
    let cpu = Cpu::new(1, Isa::detect());
    let stats = |model: &TrainModel, loss: &TokenLoss<Cpu>| {
        let (mut sums, mut stats) = (StepSums::default(), TokenStats::default());
        let to = LossOutput { sums: &mut sums, stats: Some(&mut stats), gradients: None };
        let batch = (Precision::F32, &batch);
        model.token_loss(&cpu, batch, &mut Workspace::default(), loss, to);
        (sums.loss, stats)
    };
    let cross_entropy = TokenLoss::CrossEntropy { scale: 1.0 };
    let ppo = Ppo::new(stats(&model, &cross_entropy).1.log_probs.buffer());
    let weights = [[0.3f32, -1.0, 0.0, 0.5, 0.9, -0.2, 0.4], [0.0, 0.5, -0.8, 1.0, 0.1, 0.6, -0.7]];
    let [g, h] = weights.map(column);
    let given = TokenLoss::Given { log_probs: &g, entropies: Some(&h) };
    for (name, loss) in
        [("cross-entropy", &cross_entropy), ("PPO", &ppo.loss(1.0)), ("given", &given)]
    {
        // a loss whose gradients are given is the sum that they are those of
        let loss_of = |model: &TrainModel| {
            let (sum, stats) = stats(model, loss);
            let TokenLoss::Given { .. } = loss else { return sum };
            let dot = |a: &[f32; 7], b: &Tensor<Cpu>| -> f64 {
                a.iter().zip(b.buffer()).map(|(a, b)| *a as f64 * *b as f64).sum()
            };
            sum + dot(&weights[0], &stats.log_probs) + dot(&weights[1], &stats.entropies)
        };
        let (mut grads, mut sums) = (vec![0f32; model.values.len()], StepSums::default());
        let to =
            LossOutput { sums: &mut sums, stats: None, gradients: Some(Backward::to(&mut grads)) };
        let batch = (Precision::F32, &batch);
        model.token_loss(&cpu, batch, &mut Workspace::default(), loss, to);
        let largest = grads.iter().fold(0f32, |m, g| m.max(g.abs())) as f64;
        let mut moved = |i: usize, by: f32| {
            let old = std::mem::replace(&mut model.values[i], 0.0);
            model.values[i] = old + by;
            let loss = loss_of(&model);
            model.values[i] = old;
            loss
        };
        let worst = (0..grads.len()).step_by(173).map(|i| {
            let slope = (moved(i, 2e-3) - moved(i, -2e-3)) / 4e-3;
            (slope - grads[i] as f64).abs()
        });
        let worst = worst.fold(0.0, f64::max);
        assert!(worst < 2e-3 * largest.max(1.0), "{name}: {worst}, of {largest}");
    }
}

/// Policies that are far apart have a loss and gradients all the same; log-probabilities that are
/// no numbers have none.
#[test]
fn log_ratios_of_fifty_stay_finite() {
    let cpu = Cpu::new(1, Isa::detect());
    let (values, at) = (vec![0.1f32, -0.2, 0.3, 0.4, 0.0, -0.1], 0..6);
    let x = cpu.upload(&[0.5, -1.0], 2);
    let column = |value: f32| cpu.upload(&[value], 1);
    let loss = |old: f32, reference: f32, advantage: f32| {
        let (old, reference, advantages) = (column(old), column(reference), column(advantage));
        let ppo = TokenLoss::ClippedPpo(ClippedPpo {
            old_log_probs: &old,
            advantages: &advantages,
            reference_log_probs: Some(&reference),
            clip: 0.2,
            kl: 0.1,
            entropy: 0.0,
            scale: 1.0,
        });
        let (mut dx, mut logits, mut sums) = Default::default();
        let mut grads = vec![0f32; 6];
        let gradients = Some(LossGradients { dx: &mut dx, grads: Some(&mut grads) });
        let to = LossOutput { sums: &mut sums, stats: None, gradients };
        let p = Params { values: &values, precision: Precision::F32 };
        cpu.lm_head_loss((&x, &mut logits), &[1], (p, &at), &ppo, to);
        let finite = grads.iter().chain(dx.buffer()).all(|g| g.is_finite());
        (sums.loss, finite)
    };
    for old in [-51.0, 49.0] {
        for reference in [-51.0, 49.0] {
            for advantage in [-1.0, 1.0] {
                let (sum, finite) = loss(old, reference, advantage);
                assert!(sum.is_finite() && finite, "{old} {reference} {advantage}: {sum}");
            }
        }
    }
    assert!(!loss(f32::NEG_INFINITY, -1.0, -1.0).0.is_finite());
    assert!(!loss(f32::NAN, -1.0, 1.0).0.is_finite());
}
