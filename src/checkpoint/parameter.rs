//! What a model says of one of its tensors.

/// Name and shape of one tensor of a model.
#[derive(Clone, Debug, PartialEq)]
pub struct Parameter {
    /// As checkpoints name it, with the model's prefix.
    pub name: String,
    /// The outermost dimension first.
    pub shape: Vec<usize>,
}

impl Parameter {
    /// A tensor of this name and shape.
    pub fn new(name: impl Into<String>, shape: &[usize]) -> Parameter {
        Parameter { name: name.into(), shape: shape.to_vec() }
    }

    /// Elements.
    pub fn len(&self) -> usize {
        self.shape.iter().product()
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Whether weight decay applies: to matrices, not to biases and layer norms.
    pub fn decays(&self) -> bool {
        self.shape.len() > 1
    }
}
