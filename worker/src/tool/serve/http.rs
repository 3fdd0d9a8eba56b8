//! The HTTP face: `POST /v1/classify`, what is served, health, metrics and the page.

use std::sync::Arc;

use axum::{
    Router,
    body::{Body, Bytes},
    extract::{Query, Request, State},
    http::{HeaderName, StatusCode, header},
    response::{IntoResponse, Response},
    routing::{get, post},
};
use serde::Serialize;
use tokio_stream::StreamExt as _;

use super::{
    desk::{Answer, Desk, Wanted},
    refusal::{Kind, Refusal},
};

const INDEX: &str = include_str!("../../../web/serve.html");
const SCRIPT: &str = include_str!("../../../web/serve.js");
const STYLE: &str = include_str!("../../../web/serve.css");

/// The media type of OpenMetrics.
const OPEN_METRICS: &str = "application/openmetrics-text; version=1.0.0; charset=utf-8";
/// What of a body that is not wanted is read and thrown away, so that who sends it hears why.
const DISCARDED_BYTES_MAX: usize = 64 << 20;

/// The one form of an error.
#[derive(Debug, Serialize)]
struct Fault {
    error: String,
}

pub(super) fn router(desk: Arc<Desk>) -> Router {
    let asset =
        |kind: &'static str, text: &'static str| get(move || async move { page(kind, text) });
    Router::new()
        .route("/v1/classify", post(classify))
        .route("/v1/model", get(about))
        .route("/healthz", get(health))
        .route("/metrics", get(metrics))
        .route("/", asset("text/html; charset=utf-8", INDEX))
        .route("/serve.js", asset("text/javascript; charset=utf-8", SCRIPT))
        .route("/serve.css", asset("text/css; charset=utf-8", STYLE))
        .method_not_allowed_fallback(wrong_method)
        .fallback(nowhere)
        .with_state(desk)
}

async fn classify(
    State(desk): State<Arc<Desk>>,
    Query(parameters): Query<Vec<(String, String)>>,
    request: Request,
) -> Response {
    let answering = answer(&desk, &parameters, request.into_body());
    let late = Refusal::Late(desk.patience());
    let answered = tokio::time::timeout(desk.patience(), answering).await.unwrap_or(Err(late));
    let outcome = answered.as_ref().map_or_else(|refusal| refusal.kind().name(), |_| "answered");
    desk.figures().answered("http", outcome);
    match answered {
        Ok(answer) => json(StatusCode::OK, &answer),
        Err(refusal) => refused(&refusal),
    }
}

async fn answer(
    desk: &Arc<Desk>,
    parameters: &[(String, String)],
    body: Body,
) -> Result<Answer, Refusal> {
    // A place first: what has none takes no memory.
    let ready = desk.place().and_then(|place| Ok((place, wanted(desk, parameters)?)));
    let most = if ready.is_ok() { desk.about().image_bytes_max } else { 0 };
    let encoded = received(body, most).await;
    let (place, wanted) = ready?;
    desk.ask(place, encoded?, wanted).await
}

fn wanted(desk: &Desk, parameters: &[(String, String)]) -> Result<Wanted, Refusal> {
    let (mut budget, mut top) = (None, None);
    for (name, value) in parameters {
        let number = value.parse().ok();
        match name.as_str() {
            "budget" => budget = Some(number.ok_or_else(|| Refusal::Budget(value.clone()))?),
            "top" => top = Some(number.ok_or_else(|| Refusal::Top(value.clone()))?),
            _ => return Err(Refusal::Parameter(name.clone())),
        }
    }
    desk.wanted(budget, top)
}

/// The bytes of a body of at most `most`; of what is longer no more is kept.
async fn received(body: Body, most: usize) -> Result<Vec<u8>, Refusal> {
    let (mut kept, mut seen) = (Vec::new(), 0);
    let mut pieces = body.into_data_stream();
    while let Some(piece) = pieces.next().await {
        let piece: Bytes = piece.map_err(|_| Refusal::Broken)?;
        seen += piece.len();
        if seen <= most {
            kept.extend_from_slice(&piece);
        } else if seen > DISCARDED_BYTES_MAX.max(2 * most) {
            break;
        } else {
            kept = Vec::new();
        }
    }
    if seen > most { Err(Refusal::TooLarge { most }) } else { Ok(kept) }
}

fn refused(refusal: &Refusal) -> Response {
    let status = match refusal.kind() {
        Kind::BadInput => StatusCode::BAD_REQUEST,
        Kind::TooLarge => StatusCode::PAYLOAD_TOO_LARGE,
        Kind::Busy => StatusCode::SERVICE_UNAVAILABLE,
        Kind::Late => StatusCode::REQUEST_TIMEOUT,
        Kind::Failed => StatusCode::INTERNAL_SERVER_ERROR,
    };
    let mut response = fault(status, refusal.line());
    if refusal.kind() == Kind::Busy {
        let a_second = header::HeaderValue::from_static("1");
        response.headers_mut().insert(header::RETRY_AFTER, a_second);
    }
    response
}

fn fault(status: StatusCode, error: String) -> Response {
    json(status, &Fault { error })
}

fn json(status: StatusCode, value: &impl Serialize) -> Response {
    let text = serde_json::to_string(value).expect("answers have a JSON form");
    let headers = [(header::CONTENT_TYPE, "application/json"), (header::CACHE_CONTROL, "no-store")];
    (status, headers, text).into_response()
}

async fn about(State(desk): State<Arc<Desk>>) -> Response {
    json(StatusCode::OK, desk.about())
}

async fn health(State(desk): State<Arc<Desk>>) -> Response {
    if desk.is_ending() { refused(&Refusal::Ending) } else { "ok\n".into_response() }
}

async fn metrics(State(desk): State<Arc<Desk>>) -> impl IntoResponse {
    ([(header::CONTENT_TYPE, OPEN_METRICS)], desk.metrics())
}

async fn wrong_method(request: Request) -> Response {
    let (method, path) = (request.method(), request.uri().path());
    let right = if path == "/v1/classify" { "POST" } else { "GET" };
    fault(
        StatusCode::METHOD_NOT_ALLOWED,
        format!("{method} {path}: this is asked for with {right}"),
    )
}

async fn nowhere(request: Request) -> Response {
    let path = request.uri().path();
    fault(
        StatusCode::NOT_FOUND,
        format!("{path}: there is nothing; images go to POST /v1/classify, the page is at /"),
    )
}

/// Nothing is loaded from elsewhere, and no other page may show this one; the image that was dropped is a blob.
fn page(kind: &'static str, text: &'static str) -> impl IntoResponse {
    let policy = "default-src 'self'; img-src 'self' blob: data:; frame-ancestors 'none'";
    let headers: [(HeaderName, &str); 3] = [
        (header::CONTENT_TYPE, kind),
        (header::CONTENT_SECURITY_POLICY, policy),
        (header::CACHE_CONTROL, "no-cache"),
    ];
    (headers, text)
}
