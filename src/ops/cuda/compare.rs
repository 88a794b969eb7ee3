//! How far two results of the same work are apart.

/// The largest difference of two results over the largest magnitude of the second one; infinite
/// where a result is no number or missing.
pub(super) fn max_error(ours: &[f32], theirs: &[f32]) -> f32 {
    let max = theirs.iter().fold(f32::MIN_POSITIVE, |m, v| m.max(v.abs()));
    let off = |(a, b): (&f32, &f32)| finite((a - b).abs());
    if ours.len() == theirs.len() {
        ours.iter().zip(theirs).map(off).fold(0.0, f32::max) / max
    } else {
        f32::INFINITY
    }
}

/// The largest RMS of the differences in a row of `width` over the RMS of this row in `theirs`;
/// infinite where a result is no number or missing. Unlike [`max_error`] it sees an error in a row
/// of small numbers beside a row of large ones.
pub(super) fn row_error(ours: &[f32], theirs: &[f32], width: usize) -> f32 {
    let row = |(a, b): (&[f32], &[f32])| {
        let squares = |of: &mut dyn Iterator<Item = f32>| of.map(|v| v as f64 * v as f64).sum();
        let off: f64 = squares(&mut a.iter().zip(b).map(|(a, b)| a - b));
        let size: f64 = squares(&mut b.iter().copied());
        if off == 0.0 { 0.0 } else { finite((off / size).sqrt() as f32) }
    };
    if ours.len() == theirs.len() {
        ours.chunks(width).zip(theirs.chunks(width)).map(row).fold(0.0, f32::max)
    } else {
        f32::INFINITY
    }
}

/// `max` leaves NaN out, which must not pass for equal.
fn finite(error: f32) -> f32 {
    if error.is_nan() { f32::INFINITY } else { error }
}

/// The largest logit of a row: its token, and by how much it is larger than the second one.
pub(super) fn largest(logits: &[f32]) -> (usize, f32) {
    let (mut best, mut first, mut second) = (0, f32::NEG_INFINITY, f32::NEG_INFINITY);
    for (token, &logit) in logits.iter().enumerate() {
        if logit > first {
            (best, first, second) = (token, logit, first);
        } else if logit > second {
            second = logit;
        }
    }
    (best, first - second)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_no_number_is_no_small_error() {
        assert_eq!(max_error(&[1.0, 2.5], &[1.0, 2.0]), 0.25);
        assert_eq!(max_error(&[1.0, f32::NAN], &[1.0, 2.0]), f32::INFINITY);
        assert_eq!(max_error(&[1.0], &[1.0, 2.0]), f32::INFINITY);
        assert_eq!(row_error(&[f32::NAN, 0.0], &[1.0, 2.0], 2), f32::INFINITY);
        assert_eq!(row_error(&[0.0, 0.1], &[0.0, 0.0], 2), f32::INFINITY);
        assert_eq!(row_error(&[0.0; 2], &[0.0; 2], 2), 0.0);
    }

    #[test]
    fn a_row_of_small_numbers_counts_as_much_as_one_of_large_ones() {
        let theirs = [1000.0, 1000.0, 1.0, 1.0];
        let ours = [1000.0, 1000.0, 1.5, 0.5];
        assert!(max_error(&ours, &theirs) < 1e-3);
        assert_eq!(row_error(&ours, &theirs, 2), 0.5);
    }

    #[test]
    fn the_largest_logit_and_its_margin() {
        assert_eq!(largest(&[1.0, 4.0, 3.5, 4.0 - 1.0]), (1, 0.5));
        assert_eq!(largest(&[2.0, 2.0]), (0, 0.0));
    }
}
