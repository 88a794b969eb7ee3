//! Latencies and throughputs of a load.

use serde::Serialize;
use std::time::Instant;

/// One request's course.
pub struct Measured {
    pub started: Instant,
    pub ended: Instant,
    /// When each piece of text came.
    pub pieces: Vec<Instant>,
    /// Of prompt and output, as the server counts them.
    pub tokens: Option<(usize, usize)>,
    pub error: Option<String>,
}

impl Measured {
    pub fn new(started: Instant) -> Measured {
        Measured { started, ended: started, pieces: vec![], tokens: None, error: None }
    }

    fn output(&self) -> usize {
        self.tokens.map_or(self.pieces.len(), |t| t.1)
    }
}

/// Maximum milliseconds that a request may take and count as good.
#[derive(Clone, Copy, Debug, Default)]
pub struct Goodput {
    /// Time to the first token.
    pub ttft: Option<f64>,
    /// Time per output token after the first.
    pub tpot: Option<f64>,
    /// End-to-end latency.
    pub e2el: Option<f64>,
}

/// Milliseconds.
#[derive(Clone, Copy, Debug, Default, Serialize)]
pub struct Latency {
    pub mean: f64,
    pub median: f64,
    pub p99: f64,
}

impl Latency {
    fn of(mut values: Vec<f64>) -> Latency {
        if values.is_empty() {
            return Latency::default();
        }
        values.sort_by(f64::total_cmp);
        let at = |part: f64| {
            let place = part * (values.len() - 1) as f64;
            let (low, rest) = (place.floor() as usize, place.fract());
            values[low] + (values[(low + 1).min(values.len() - 1)] - values[low]) * rest
        };
        Latency {
            mean: values.iter().sum::<f64>() / values.len() as f64,
            median: at(0.5),
            p99: at(0.99),
        }
    }
}

/// What a load has come to: latencies and counts of tokens are those of completed requests.
#[derive(Debug, Serialize)]
pub struct ServeReport {
    /// Requests whose answers ended without an error.
    pub completed: usize,
    /// Requests that ended with an error.
    pub failed: usize,
    /// The first of the failures.
    pub error: Option<String>,
    /// From the start of the load to the end of its last request.
    pub duration_seconds: f64,
    /// Tokens of prompts, as the server counts them.
    pub total_input_tokens: usize,
    /// Tokens of outputs, as the server counts them; pieces of text where it does not.
    pub total_output_tokens: usize,
    /// Completed requests a second.
    pub request_throughput: f64,
    /// Tokens of outputs a second.
    pub output_throughput: f64,
    /// Tokens of prompts and outputs a second.
    pub total_token_throughput: f64,
    /// Completed requests a second that keep the limits; none without limits.
    pub request_goodput: Option<f64>,
    /// The most tokens of outputs in one second.
    pub peak_output_throughput: f64,
    /// The most requests that were open at once.
    pub peak_concurrent_requests: usize,
    /// Time to the first token.
    pub ttft_ms: Latency,
    /// Time per output token after the first.
    pub tpot_ms: Latency,
    /// Between pieces of text.
    pub itl_ms: Latency,
    /// End to end.
    pub e2el_ms: Latency,
}

impl ServeReport {
    /// Sums up a load that began at `started`; goodput is reported if any of `limits` is set.
    pub fn new(all: &[Measured], started: Instant, limits: Goodput) -> ServeReport {
        let good: Vec<&Measured> = all.iter().filter(|m| m.error.is_none()).collect();
        let ms = |from: Instant, to: Instant| (to - from).as_secs_f64() * 1e3;
        let ended = all.iter().map(|m| m.ended).max().unwrap_or(started);
        let seconds = (ended - started).as_secs_f64().max(1e-9);
        let ttft = |m: &Measured| m.pieces.first().map(|&p| ms(m.started, p));
        let tpot = |m: &Measured| {
            let (first, last) = (*m.pieces.first()?, *m.pieces.last()?);
            (m.output() > 1).then(|| ms(first, last) / (m.output() - 1) as f64)
        };
        let within = |value: Option<f64>, limit: Option<f64>| {
            limit.is_none_or(|l| value.is_some_and(|v| v <= l))
        };
        let keeps = |m: &&&Measured| {
            within(ttft(m), limits.ttft)
                && within(tpot(m), limits.tpot)
                && within(Some(ms(m.started, m.ended)), limits.e2el)
        };
        let limited = limits.ttft.or(limits.tpot).or(limits.e2el).is_some();
        let input: usize = good.iter().filter_map(|m| m.tokens).map(|t| t.0).sum();
        let output: usize = good.iter().map(|m| m.output()).sum();
        // tokens of a second: those of a request spread over its pieces
        let mut by_second = vec![0.0; seconds.ceil() as usize + 1];
        for m in &good {
            let each = m.output() as f64 / m.pieces.len().max(1) as f64;
            m.pieces.iter().for_each(|p| by_second[(*p - started).as_secs() as usize] += each);
        }
        let mut edges: Vec<(Instant, i64)> =
            all.iter().flat_map(|m| [(m.started, 1), (m.ended, -1)]).collect();
        edges.sort();
        let mut now = 0;
        let peak = edges.iter().map(|e| {
            now += e.1;
            now
        });
        ServeReport {
            completed: good.len(),
            failed: all.len() - good.len(),
            error: all.iter().find_map(|m| m.error.clone()),
            duration_seconds: seconds,
            total_input_tokens: input,
            total_output_tokens: output,
            request_throughput: good.len() as f64 / seconds,
            output_throughput: output as f64 / seconds,
            total_token_throughput: (input + output) as f64 / seconds,
            request_goodput: limited.then(|| good.iter().filter(keeps).count() as f64 / seconds),
            peak_output_throughput: by_second.iter().copied().fold(0.0, f64::max),
            peak_concurrent_requests: peak.max().unwrap_or(0) as usize,
            ttft_ms: Latency::of(good.iter().filter_map(|m| ttft(m)).collect()),
            tpot_ms: Latency::of(good.iter().filter_map(|m| tpot(m)).collect()),
            itl_ms: Latency::of(
                good.iter().flat_map(|m| m.pieces.windows(2).map(|w| ms(w[0], w[1]))).collect(),
            ),
            e2el_ms: Latency::of(good.iter().map(|m| ms(m.started, m.ended)).collect()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Duration;

    #[test]
    fn names_mean_what_they_mean_elsewhere() {
        let t0 = Instant::now();
        let at = |ms: u64| t0 + Duration::from_millis(ms);
        let request = |from: u64, pieces: &[u64], end: u64| Measured {
            started: at(from),
            ended: at(end),
            pieces: pieces.iter().map(|&p| at(p)).collect(),
            tokens: Some((10, pieces.len() + 1)),
            error: None,
        };
        let mut failed = request(0, &[], 50);
        failed.error = Some("no".into());
        let all = [request(0, &[100, 200, 400], 410), request(100, &[300, 500], 1000), failed];
        let limits = Goodput { ttft: Some(150.0), ..Goodput::default() };
        let r = ServeReport::new(&all, t0, limits);
        assert_eq!((r.completed, r.failed, r.error.as_deref()), (2, 1, Some("no")));
        assert_eq!((r.total_input_tokens, r.total_output_tokens), (20, 7));
        assert!(
            (r.output_throughput - 7.0).abs() < 1e-9
                && (r.request_goodput.unwrap() - 1.0).abs() < 1e-9
        );
        assert_eq!((r.ttft_ms.mean, r.ttft_ms.median), (150.0, 150.0));
        assert_eq!(r.tpot_ms.mean, 100.0);
        assert!((r.itl_ms.mean - 500.0 / 3.0).abs() < 1e-9 && r.itl_ms.median == 200.0);
        assert_eq!((r.e2el_ms.median, r.peak_concurrent_requests), (655.0, 2));
    }
}
