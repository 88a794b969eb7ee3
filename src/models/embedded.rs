//! The small demonstration model that the program carries (assets/model; how it was made:
//! assets/model/README.md).

use crate::models::bloom::BloomCheckpoint;
use crate::text::Tokenizer;
use crate::text::template::Template;

/// Aligned so that weights can be read where they lie.
#[repr(C, align(64))]
struct Aligned<T: ?Sized>(T);

static WEIGHTS: &Aligned<[u8]> = &Aligned(*include_bytes!("../../assets/model/model.safetensors"));
const CONFIG: &[u8] = include_bytes!("../../assets/model/config.json");
/// The model's `tokenizer.json`.
pub const TOKENIZER: &[u8] = include_bytes!("../../assets/model/tokenizer.json");
const TEMPLATE: &str = include_str!("../../assets/model/template.txt");

/// Sampling defaults of the model.
pub const GENERATION_CONFIG: &[u8] = include_bytes!("../../assets/model/generation_config.json");

/// What messages call it.
pub const NAME: &str = "the embedded model";

/// The model's checkpoint, read where it lies in the program.
pub fn checkpoint() -> BloomCheckpoint {
    BloomCheckpoint::from_static(CONFIG, &WEIGHTS.0, NAME).expect("the embedded model is whole")
}

/// The model's tokenizer.
pub fn tokenizer() -> Tokenizer {
    Tokenizer::from_bytes(TOKENIZER).expect("the embedded tokenizer is whole")
}

/// The template that the model's prompts are put into.
pub fn template() -> Template {
    Template::parse(TEMPLATE.trim_end_matches('\n')).expect("the embedded template has its place")
}
