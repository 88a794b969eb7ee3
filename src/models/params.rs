//! A model's parameter tree, written once: its names, shapes and order serve loading, random
//! weights, training, saving and benchmarks alike.

use crate::checkpoint::Parameter;
use crate::ops::Affine;
use std::convert::Infallible;
use std::ops::Range;

impl<T> Affine<T> {
    /// A layer norm over `width` elements.
    pub fn layer_norm<E>(
        name: &str,
        width: usize,
        make: &mut impl FnMut(Parameter) -> Result<T, E>,
    ) -> Result<Affine<T>, E> {
        Ok(Affine {
            weight: make(Parameter::new(format!("{name}.weight"), &[width]))?,
            bias: make(Parameter::new(format!("{name}.bias"), &[width]))?,
        })
    }

    /// A linear layer with a matrix `[outputs, inputs]`.
    pub fn linear<E>(
        name: &str,
        [outputs, inputs]: [usize; 2],
        make: &mut impl FnMut(Parameter) -> Result<T, E>,
    ) -> Result<Affine<T>, E> {
        Ok(Affine {
            weight: make(Parameter::new(format!("{name}.weight"), &[outputs, inputs]))?,
            bias: make(Parameter::new(format!("{name}.bias"), &[outputs]))?,
        })
    }
}

/// Hands out the ranges of a flat buffer in which a tree's parameters lie one after the other.
pub fn flat_ranges() -> impl FnMut(Parameter) -> Result<Range<usize>, Infallible> {
    let mut start = 0;
    move |parameter| {
        let range = start..start + parameter.len();
        start = range.end;
        Ok(range)
    }
}
