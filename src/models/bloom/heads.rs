//! What reads one number off a hidden state: a reward model's score, PPO's value.

use super::BloomConfig;
use crate::checkpoint::Parameter;
use crate::ops::{Affine, Projection};
use std::convert::Infallible;

/// A head that gives one number for each row of final hidden states.
#[derive(Clone, Debug)]
pub struct ScalarHead<T> {
    /// A linear layer with a ReLU behind it, before the projection; reward models have none.
    pub hidden: Option<Affine<T>>,
    /// From there to one number.
    pub output: Projection<T>,
}

impl BloomConfig {
    /// Makes a `T` of every parameter of PPO's value head, `hidden -> 2 hidden -> ReLU -> 1`, under
    /// the names that trlX gives them.
    ///
    /// # Errors
    /// The first that `make` returns.
    pub fn value_head<T, E>(
        &self,
        mut make: impl FnMut(Parameter) -> Result<T, E>,
    ) -> Result<ScalarHead<T>, E> {
        let (h, make) = (self.hidden_size, &mut make);
        let hidden = Affine::linear("v_head.0", [2 * h, h], make)?;
        let weight = make(Parameter::new("v_head.2.weight", &[1, 2 * h]))?;
        let bias = make(Parameter::new("v_head.2.bias", &[1]))?;
        Ok(ScalarHead { hidden: Some(hidden), output: Projection { weight, bias: Some(bias) } })
    }

    /// The value head's tensors, in their order.
    pub fn value_head_parameters(&self) -> Vec<Parameter> {
        let mut list = Vec::new();
        let push = |parameter| {
            list.push(parameter);
            Ok::<(), Infallible>(())
        };
        let Ok(_) = self.value_head(push);
        list
    }
}
