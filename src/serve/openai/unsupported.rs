//! Fields that other servers know and this one does not. To ignore one that changes the result
//! would be a wrong answer, so each is refused by its name, unless its value asks for nothing. What
//! changes no result (`user`, `metadata`, `store`, ...) is let pass.

use crate::serve::errors::ApiError;
use serde_json::{Map, Value, json};

/// When a field asks for nothing; null never asks for anything.
enum Neutral {
    Never,
    /// An empty text, list or object.
    Empty,
    /// One of these values.
    Values(&'static [&'static str]),
    Number(f64),
    False,
    True,
    /// An object of this type.
    Type(&'static str),
    /// As many as `n` asks for.
    SameAsN,
    /// Anything, as long as there are no tools; tools themselves are refused.
    Always,
}

use Neutral::*;

const FIELDS: &[(&str, Neutral)] = &[
    // tools; to choose among none of them, "auto" included, is an error at OpenAI too
    ("tools", Empty),
    ("tool_choice", Values(&["none"])),
    ("parallel_tool_calls", Always),
    ("functions", Empty),
    ("function_call", Values(&["none"])),
    ("web_search_options", Never),
    // the form of the answer
    ("response_format", Type("text")),
    ("modalities", Values(&["text"])),
    ("audio", Never),
    ("verbosity", Values(&["medium"])),
    ("reasoning_effort", Values(&["none"])),
    ("prediction", Never),
    ("guided_json", Never),
    ("guided_regex", Never),
    ("guided_choice", Never),
    ("guided_grammar", Never),
    ("structured_outputs", Never),
    ("grammar", Empty),
    ("json_schema", Never),
    ("return_tokens_as_token_ids", False),
    ("return_token_ids", False),
    ("skip_special_tokens", True),
    // the prompt
    ("suffix", Empty),
    ("prompt_embeds", Never),
    ("truncate_prompt_tokens", Never),
    ("chat_template", Never),
    ("documents", Empty),
    ("continue_final_message", False),
    ("add_generation_prompt", True),
    // sampling
    ("best_of", SameAsN),
    ("use_beam_search", False),
    ("length_penalty", Number(1.0)),
    ("logits_processors", Empty),
    ("allowed_token_ids", Never),
    ("prompt_logprobs", Never),
    ("typical_p", Number(1.0)),
    ("mirostat", Number(0.0)),
];

/// Refuses what would have to be ignored.
pub fn check(body: &Value) -> Result<(), ApiError> {
    let Value::Object(body) = body else { return Ok(()) };
    for (name, neutral) in FIELDS {
        let Some(value) = body.get(*name).filter(|v| !v.is_null()) else { continue };
        if !asks_for_nothing(value, neutral, body) {
            let mut shown = value.to_string();
            if shown.len() > 40 {
                shown.truncate((0..=40).rev().find(|n| shown.is_char_boundary(*n)).unwrap_or(0));
                shown.push('…');
            }
            let message =
                format!("{name} is not supported by this server (it is {shown}); leave it out");
            return Err(ApiError::field(name, message));
        }
    }
    Ok(())
}

fn asks_for_nothing(value: &Value, neutral: &Neutral, body: &Map<String, Value>) -> bool {
    match neutral {
        Never => false,
        Always => true,
        Empty => match value {
            Value::String(s) => s.is_empty(),
            Value::Array(a) => a.is_empty(),
            Value::Object(o) => o.is_empty(),
            _ => false,
        },
        Values(values) => match value {
            Value::Array(list) => list.iter().all(|v| values.iter().any(|n| v == n)),
            one => values.iter().any(|n| one == n),
        },
        Number(n) => value.as_f64() == Some(*n),
        False => value == &json!(false),
        True => value == &json!(true),
        Type(kind) => value.get("type").is_some_and(|t| t == kind),
        SameAsN => value.as_f64() == body.get("n").map_or(Some(1.0), |n| n.as_f64().or(Some(1.0))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_asks_for_something_is_refused() {
        for body in [
            json!({ "user": "a", "metadata": { "a": "b" }, "store": true, "seed": 1 }),
            json!({ "service_tier": "auto", "response_format": { "type": "text" }, "suffix": "" }),
            json!({ "tools": null, "tool_choice": null, "response_format": null }),
            json!({ "suffix": null, "best_of": null }),
            json!({ "tools": [], "tool_choice": "none" }),
            json!({ "best_of": 1 }),
            json!({ "best_of": 3, "n": 3 }),
            json!({ "best_of": 1.0, "n": null, "modalities": ["text"] }),
            json!({ "use_beam_search": false, "length_penalty": 1 }),
            json!([1]),
        ] {
            assert!(check(&body).is_ok(), "{body}");
        }
        for (body, field) in [
            (json!({ "tools": [{ "type": "function" }] }), "tools"),
            (json!({ "tool_choice": "required" }), "tool_choice"),
            (json!({ "tool_choice": "auto" }), "tool_choice"),
            (json!({ "tools": [], "tool_choice": "auto" }), "tool_choice"),
            (json!({ "function_call": "auto" }), "function_call"),
            (json!({ "tool_choice": { "type": "function" } }), "tool_choice"),
            (json!({ "response_format": { "type": "json_object" } }), "response_format"),
            (json!({ "response_format": "text" }), "response_format"),
            (json!({ "suffix": "end" }), "suffix"),
            (json!({ "best_of": 3 }), "best_of"),
            (json!({ "best_of": 3, "n": 2 }), "best_of"),
            (json!({ "guided_regex": "東".repeat(100) }), "guided_regex"),
            (json!({ "modalities": ["text", "audio"] }), "modalities"),
        ] {
            let error = check(&body).unwrap_err();
            assert_eq!(
                (error.status.as_u16(), error.detail.param.as_deref()),
                (400, Some(field)),
                "{body}"
            );
            assert!(error.detail.message.contains(field) && error.detail.message.len() < 200);
        }
    }
}
