use super::*;
use crate::random::{Normal, PhiloxStream};

const SEEDS: u64 = 40;

/// A healthy run with the noise of small batches: the policy moves away from its reference, gets a
/// little longer and surer, and its rewards rise and then stay.
fn healthy(update: u64, noise: &mut Normal) -> UpdateStats {
    let mut noisy = |mean: f64, std: f64| mean + std * noise.sample() as f64;
    let learned = 1.0 - (-(update as f64) / 150.0).exp();
    let criticized = 1.0 - (-(update as f64) / 25.0).exp();
    UpdateStats {
        update,
        kl: noisy(8.0 * learned, 1.5).max(0.0),
        entropy: noisy(2.5 - 0.8 * learned, 0.2),
        response_length: noisy(40.0 + 15.0 * learned, 5.0),
        repeated: noisy(0.06, 0.04).max(0.0),
        kept_meaning: noisy(0.85 + 0.03 * learned, 0.03),
        explained_variance: noisy(0.9 * criticized - 0.3, 0.15),
        reward: noisy(3.0 * learned, 0.5),
        held_out: Some(noisy(1.0 * learned, 0.5)),
    }
}

/// The alarms of a run, with the update of each.
fn alarms(limits: MonitorLimits, updates: impl Iterator<Item = UpdateStats>) -> Vec<Alarm> {
    let mut monitors = Monitors::new(limits).unwrap();
    updates.flat_map(|stats| monitors.observe(&stats)).collect()
}

/// A healthy run with a fault that begins after `begins` updates and grows for as long as it takes.
fn faulty(seed: u64, begins: u64, fault: fn(&mut UpdateStats, f64)) -> Vec<Alarm> {
    let mut noise = Normal::new(seed, 1);
    let updates = (1..=begins + 200).map(|update| {
        let mut stats = healthy(update, &mut noise);
        if let Some(since) = update.checked_sub(begins) {
            fault(&mut stats, since as f64);
        }
        stats
    });
    alarms(MonitorLimits::default(), updates)
}

#[test]
fn clean_runs_raise_nothing() {
    for seed in 0..SEEDS {
        let mut noise = Normal::new(seed, 0);
        let raised = alarms(MonitorLimits::default(), (1..=1000).map(|u| healthy(u, &mut noise)));
        assert_eq!(raised, [], "seed {seed}");
    }
}

#[test]
fn a_run_that_learns_nothing_raises_nothing() {
    for seed in 0..SEEDS {
        let mut noise = Normal::new(seed, 2);
        // the reward rises by its noise's size, and the held-out scorer stays where it was
        let updates = (1..=1000).map(|update| UpdateStats {
            reward: healthy(update, &mut noise).reward,
            held_out: Some(0.5 * noise.sample() as f64),
            ..healthy(100, &mut noise)
        });
        assert_eq!(alarms(MonitorLimits::default(), updates), [], "seed {seed}");
    }
}

#[test]
fn each_fault_raises_its_alarm_within_200_updates_and_no_other() {
    type Fault = fn(&mut UpdateStats, f64);
    let faults: [(Monitor, &str, Fault); 8] = [
        (Monitor::Kl, "--kl-target", |s, since| s.kl += 0.3 * since),
        (Monitor::Entropy, "--entropy-coefficient", |s, since| s.entropy *= (-since / 60.0).exp()),
        (Monitor::Length, "--reward clip-tokens", |s, since| s.response_length += 0.5 * since),
        (Monitor::Length, "--reward fidelity", |s, since| {
            s.response_length *= (-since / 80.0).exp()
        }),
        (Monitor::Repeated, "--reward repetition", |s, since| s.repeated += 0.003 * since),
        (Monitor::KeptMeaning, "--reward fidelity", |s, since| s.kept_meaning -= 0.0015 * since),
        (Monitor::ExplainedVariance, "--value-coefficient", |s, since| {
            s.explained_variance -= 0.012 * since
        }),
        (Monitor::Gap, "a --reward for what is lost", |s, since| {
            s.reward += 0.02 * since;
            s.held_out = s.held_out.map(|h| h - 0.012 * since);
        }),
    ];
    for (monitor, remedy, fault) in faults {
        for seed in 0..SEEDS {
            for begins in [0, 40, 300] {
                let raised = faulty(seed, begins, fault);
                let what = format!("{monitor:?}, seed {seed}, from {begins}: {raised:?}");
                assert_eq!(raised.len(), 1, "{what}");
                let alarm = &raised[0];
                assert_eq!((alarm.monitor, alarm.action), (monitor, Action::Warn), "{what}");
                assert!(alarm.update > begins && alarm.message.contains(remedy), "{what}");
                assert!(alarm.message.starts_with(&format!("update {}: ", alarm.update)));
                assert!(!alarm.message.contains('\n'), "{what}");
            }
        }
    }
}

/// A policy-gradient run (REINFORCE with a baseline) on one number: how many words of praise a
/// Gaussian policy adds. Ten are best by the held-out scorer. The proxy pays for each one, or is
/// the held-out scorer with other noise.
fn words_of_praise(seed: u64, hackable: bool, updates: u64) -> Vec<Alarm> {
    const BATCH: usize = 64;
    let (mut noise, mut mean) = (Normal::new(seed, 3), 6.0);
    let mut draw = |std: f64| std * noise.sample() as f64;
    let run = (1..=updates).map(|update| {
        let words: Vec<f64> = (0..BATCH).map(|_| mean + draw(1.0)).collect();
        let gold = |words: f64| words - words * words / 20.0;
        let pay = |words: f64| if hackable { words } else { gold(words) };
        let rewards: Vec<f64> = words.iter().map(|w| pay(*w) + draw(1.0)).collect();
        let reward = rewards.iter().sum::<f64>() / BATCH as f64;
        let held_out = words.iter().map(|w| gold(*w) + draw(1.0)).sum::<f64>() / BATCH as f64;
        let gradient: f64 =
            words.iter().zip(&rewards).map(|(w, r)| (r - reward) * (w - mean)).sum();
        mean += 0.1 * gradient / BATCH as f64;
        let others = healthy(100, &mut Normal::new(seed, 4));
        UpdateStats { update, reward, held_out: Some(held_out), ..others }
    });
    alarms(MonitorLimits::default(), run)
}

#[test]
fn a_hacked_reward_is_told_from_a_sound_one() {
    for seed in 0..SEEDS {
        let raised = words_of_praise(seed, true, 200);
        assert_eq!(raised.len(), 1, "seed {seed}: {raised:?}");
        assert_eq!(raised[0].monitor, Monitor::Gap);
        assert_eq!(words_of_praise(seed, false, 1000), [], "seed {seed}");
    }
}

#[test]
fn rewards_that_fall_together_are_no_hacking() {
    for seed in 0..SEEDS {
        let raised = faulty(seed, 300, |s, since| {
            s.reward -= 0.02 * since;
            s.held_out = s.held_out.map(|h| h - 0.02 * since);
        });
        assert_eq!(raised, [], "seed {seed}");
    }
}

#[test]
fn a_scorer_without_noise_at_the_start_is_not_taken_at_its_word() {
    // the same prompts with the same seeds: constant until the policy moves
    let mut noise = Normal::new(5, 5);
    let updates = (1..=1000).map(|update| {
        let moved = if update <= 30 { 0.0 } else { 0.1 };
        UpdateStats {
            held_out: Some(0.4 + moved * noise.sample() as f64),
            ..healthy(update, &mut noise)
        }
    });
    assert_eq!(alarms(MonitorLimits::default(), updates), []);
}

#[test]
fn a_resumed_run_raises_the_same_alarms() {
    let mut noise = Normal::new(9, 6);
    let updates: Vec<UpdateStats> = (1..=300)
        .map(|update| {
            let mut stats = healthy(update, &mut noise);
            stats.reward += 0.02 * update as f64;
            stats.held_out =
                stats.held_out.map(|h| h - 0.02 * update as f64).filter(|_| update % 2 == 0);
            stats.kl += if (100..140).contains(&update) { 60.0 } else { 0.0 };
            stats
        })
        .collect();
    let limits = MonitorLimits::default;
    let expected = alarms(limits(), updates.iter().copied());
    let kinds: Vec<Monitor> = expected.iter().map(|a| a.monitor).collect();
    assert!(kinds.contains(&Monitor::Kl) && kinds.contains(&Monitor::Gap), "{kinds:?}");
    let mut whole = Monitors::new(limits()).unwrap();
    updates.iter().for_each(|stats| drop(whole.observe(stats)));
    for cut in [1, 19, 20, 21, 60, 105, 141, 250] {
        let mut first = Monitors::new(limits()).unwrap();
        let mut raised: Vec<Alarm> =
            updates[..cut].iter().flat_map(|stats| first.observe(stats)).collect();
        let text = serde_json::to_string(first.state()).unwrap();
        let mut second = Monitors::resume(limits(), serde_json::from_str(&text).unwrap()).unwrap();
        assert_eq!(second.state(), first.state());
        raised.extend(updates[cut..].iter().flat_map(|stats| second.observe(stats)));
        assert_eq!(raised, expected, "cut at {cut}");
        assert_eq!(second.state(), whole.state(), "cut at {cut}");
    }
}

#[test]
fn an_alarm_is_raised_again_only_after_it_was_over() {
    let mut monitors = Monitors::new(MonitorLimits::default()).unwrap();
    let mut uniform = PhiloxStream::new(1, 1);
    let mut run = |kl: f64, updates: u64| -> usize {
        let mut noisy = || kl + 4.0 * (uniform.uniform() as f64 - 0.5);
        let stats =
            |kl| UpdateStats { kl, entropy: 1.0, response_length: 9.0, ..Default::default() };
        (0..updates).map(|_| monitors.observe(&stats(noisy())).len()).sum()
    };
    assert_eq!(run(5.0, 50), 0);
    assert_eq!(run(30.0, 1000), 1, "noise around the limit is one alarm");
    assert_eq!(run(27.0, 100), 0, "it is below the limit, but not by much");
    assert_eq!(run(40.0, 50), 0, "so this is the same alarm still");
    assert_eq!(run(15.0, 50), 0);
    assert_eq!(run(40.0, 50), 1);
    assert_eq!(monitors.active(), [Monitor::Kl]);
}

#[test]
fn numbers_that_are_not_finite_are_named_and_left_out() {
    let good = healthy(1, &mut Normal::new(1, 7));
    type Break = fn(&mut UpdateStats);
    let fields: [(&str, Break); 7] = [
        ("the KL to the reference is NaN", |s| s.kl = f64::NAN),
        ("the entropy is inf", |s| s.entropy = f64::INFINITY),
        ("the mean response length is NaN", |s| s.response_length = f64::NAN),
        ("repeat themselves or others is NaN", |s| s.repeated = f64::NAN),
        ("the kept meaning is -inf", |s| s.kept_meaning = f64::NEG_INFINITY),
        ("the mean reward is NaN", |s| s.reward = f64::NAN),
        ("the held-out scorer's mean is NaN", |s| s.held_out = Some(f64::NAN)),
    ];
    for (expected, break_it) in fields {
        let mut monitors = Monitors::new(MonitorLimits::default()).unwrap();
        assert_eq!(monitors.observe(&good), []);
        let mut bad = UpdateStats { update: 2, ..good };
        break_it(&mut bad);
        let raised = monitors.observe(&bad);
        assert!(raised.len() == 1 && raised[0].action == Action::Stop, "{raised:?}");
        assert!(raised[0].message.contains(expected), "{}", raised[0].message);
        assert_eq!(monitors.observe(&bad), [], "it is said once");
        assert_eq!(monitors.observe(&good), []);
        assert_eq!(monitors.active(), []);
        assert!(
            serde_json::from_str::<MonitorState>(&serde_json::to_string(monitors.state()).unwrap())
                .is_ok()
        );
    }
    let mut monitors = Monitors::new(MonitorLimits::default()).unwrap();
    let constant = UpdateStats { explained_variance: f64::NAN, ..good };
    assert_eq!(monitors.observe(&constant), [], "returns that are all the same");
}

#[test]
fn one_odd_update_is_no_alarm() {
    let mut noise = Normal::new(3, 8);
    let updates = (1..=300).map(|update| {
        let stats = healthy(update, &mut noise);
        // few rollouts at first, and later returns that hardly differ
        let repeated = if update == 1 { 0.4 } else { stats.repeated };
        let odd = update == 100;
        let explained_variance = if odd { -200.0 } else { stats.explained_variance };
        UpdateStats { repeated, explained_variance, ..stats }
    });
    assert_eq!(alarms(MonitorLimits::default(), updates), []);
}

#[test]
fn a_run_of_zeros_is_no_division_by_zero() {
    let updates = (1..=300).map(|update| UpdateStats {
        update,
        explained_variance: 0.5,
        held_out: Some(0.0),
        ..UpdateStats::default()
    });
    assert_eq!(alarms(MonitorLimits::default(), updates), []);
}

#[test]
fn limits_are_checked_and_actions_followed() {
    type Spoil = fn(&mut MonitorLimits);
    let wrong: [(&str, Spoil); 8] = [
        ("start_updates is 1, expected 2", |l| l.start_updates = 1),
        ("smoothing is 0, expected", |l| l.smoothing = 0.0),
        ("kl is NaN, expected above 0", |l| l.kl.limit = f64::NAN),
        ("entropy is 1, expected a share below 1", |l| l.entropy.limit = 1.0),
        ("length is 1, expected a factor above 1", |l| l.length.limit = 1.0),
        ("repeated is 30, expected a share", |l| l.repeated.limit = 30.0),
        ("explained_variance is NaN", |l| l.explained_variance.limit = f64::NAN),
        ("gap is -1, expected above 0", |l| l.gap.limit = -1.0),
    ];
    for (expected, spoil) in wrong {
        let mut limits = MonitorLimits::default();
        spoil(&mut limits);
        let error = Monitors::new(limits).err().unwrap().to_string();
        assert!(error.contains(expected), "{error}");
    }
    let kl = Threshold { limit: 1.0, action: Action::Stop };
    let limits = MonitorLimits { kl, ..MonitorLimits::default() };
    let raised = alarms(limits, std::iter::once(UpdateStats { kl: 2.5, ..Default::default() }));
    assert_eq!((raised[0].action, raised[0].value, raised[0].limit), (Action::Stop, 2.5, 1.0));
    assert_eq!(
        raised[0].message,
        "update 0: the KL to the reference is 2.5 nats a response, above 1; lower --learning-rate \
         or --kl-target"
    );
}
