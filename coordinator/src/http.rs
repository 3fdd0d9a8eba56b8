//! What a coordinator says over HTTP, to whoever can reach the port: it changes nothing, and has no secrets.

use std::sync::Arc;

use axum::{Router, extract::State, http::header, response::IntoResponse, routing::get};
use tokio::{net::TcpListener, sync::oneshot};
use tracing::warn;

use crate::metrics::Metrics;

/// The media type of OpenMetrics.
const OPEN_METRICS: &str = "application/openmetrics-text; version=1.0.0; charset=utf-8";

/// Serves until `end` is closed.
pub(crate) async fn serve(
    listener: TcpListener,
    metrics: Arc<Metrics>,
    end: oneshot::Receiver<()>,
) {
    let router = Router::new()
        .route("/healthz", get(|| async { "leading\n" }))
        .route("/metrics", get(scrape))
        .with_state(metrics);
    let served = axum::serve(listener, router).with_graceful_shutdown(async {
        drop(end.await); // Closed when the host is done; nothing is ever sent.
    });
    if let Err(error) = served.await {
        warn!(%error, "the HTTP server has ended");
    }
}

async fn scrape(State(metrics): State<Arc<Metrics>>) -> impl IntoResponse {
    ([(header::CONTENT_TYPE, OPEN_METRICS)], metrics.text())
}
