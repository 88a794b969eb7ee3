//! `/v1/models`: the one model there is.

use super::super::errors::{ApiError, ErrorBody};
use super::super::state::{Shared, StateArc};
use axum::Json;
use axum::extract::{Path, State};
use serde::Serialize;
use utoipa::ToSchema;

#[derive(Debug, Serialize, ToSchema)]
pub struct ModelList {
    pub object: &'static str,
    pub data: Vec<Model>,
}

#[derive(Debug, Serialize, ToSchema)]
pub struct Model {
    pub id: String,
    pub object: &'static str,
    pub created: u64,
    pub owned_by: &'static str,
    /// Maximum tokens of a prompt and its continuation.
    pub max_model_len: usize,
}

fn model(shared: &Shared) -> Model {
    Model {
        id: shared.name.clone(),
        object: "model",
        created: shared.created,
        owned_by: "beautiful-prompt",
        max_model_len: shared.config.context,
    }
}

/// The served model.
#[utoipa::path(
    get,
    path = "/v1/models",
    tag = "OpenAI",
    responses((status = 200, body = ModelList), (status = "4XX", body = ErrorBody))
)]
pub async fn models(State(shared): StateArc) -> Json<ModelList> {
    Json(ModelList { object: "list", data: vec![model(&shared)] })
}

/// The served model, by its name.
#[utoipa::path(
    get,
    path = "/v1/models/{model}",
    tag = "OpenAI",
    params(("model" = String, Path, description = "Its name")),
    responses((status = 200, body = Model), (status = "4XX", body = ErrorBody))
)]
pub async fn model_by_name(
    State(shared): StateArc,
    Path(name): Path<String>,
) -> Result<Json<Model>, ApiError> {
    shared.check_model(Some(&name))?;
    Ok(Json(model(&shared)))
}

/// [`model_by_name`] for a name with slashes that are not escaped.
pub async fn model_by_path(
    state: StateArc,
    Path((first, rest)): Path<(String, String)>,
) -> Result<Json<Model>, ApiError> {
    model_by_name(state, Path(format!("{first}/{rest}"))).await
}
