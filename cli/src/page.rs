//! `percheron page`: a run as a web page, while it is on and after it has ended.
//!
//! All that is shown is a fold of the event log up to a record, so the page of a run's past is the page that it had.
//! The server only reads, and only this machine reaches it.

mod goodput;
mod view;

use std::{
    net::SocketAddr,
    sync::{Arc, RwLock},
    time::Duration,
};

use anyhow::{Context as _, Result, ensure};
use axum::{
    Router,
    extract::{Query, State},
    http::{HeaderName, header},
    response::{
        IntoResponse,
        sse::{Event, KeepAlive, Sse},
    },
    routing::get,
};
use coordinator::Entry;
use proto::v1::Liveness;
use serde::Deserialize;
use tokio::{net::TcpListener, sync::watch, time::sleep};
use tokio_stream::{StreamExt as _, wrappers::WatchStream};

use self::view::{About, View};
use crate::{history::Source, print};

/// How often the run is looked at.
const LOOK: Duration = Duration::from_millis(500);
/// A coordinator that is away is about to come back, and needs the log for itself.
const AWAY: Duration = Duration::from_secs(5);

const INDEX: &str = include_str!("../web/index.html");
const SCRIPT: &str = include_str!("../web/page.js");
const STYLE: &str = include_str!("../web/page.css");

/// What the pages of a run are made of.
#[derive(Debug)]
struct Run {
    about: About,
    seen: RwLock<Seen>,
    changed: watch::Sender<u64>,
}

#[derive(Debug, Default)]
struct Seen {
    entries: Vec<Entry>,
    liveness: Liveness,
    /// Whether a coordinator answered last time.
    is_led: bool,
}

/// Serves the page of a run at `listen` until the process is stopped.
///
/// # Errors
/// An address that others reach, or one that is taken; a run that cannot be read.
pub(crate) async fn serve(source: Source, listen: SocketAddr) -> Result<()> {
    ensure!(
        listen.ip().is_loopback(),
        "--listen {listen}: the page has no door, so only this machine may reach it; forward a port to see \
         it from another, such as ssh -L {port}:127.0.0.1:{port} HOST",
        port = listen.port()
    );
    let listener = TcpListener::bind(listen).await;
    let listener = listener.with_context(|| format!("--listen {listen}: cannot listen there"))?;
    let about = About {
        run: source.run()?.to_string(),
        location: source.location().to_owned(),
        recipe: source.recipe()?.to_toml(),
    };
    let run = Arc::new(Run { about, seen: RwLock::default(), changed: watch::Sender::new(0) });
    run.look(&source).await?;
    print::out(&format!("http://{}", listener.local_addr().context("the address")?));
    let looking = Arc::clone(&run);
    let looked = async move {
        loop {
            let patience = looking.patience();
            sleep(patience).await;
            if let Err(error) = looking.look(&source).await {
                print::err(&format!("the run cannot be read just now: {error:#}"));
            }
        }
    };
    tokio::select! {
        served = axum::serve(listener, router(run)) => served.context("the page cannot be served"),
        () = looked => Ok(()),
    }
}

fn router(run: Arc<Run>) -> Router {
    let page =
        |kind: &'static str, text: &'static str| get(move || async move { asset(kind, text) });
    Router::new()
        .route("/", page("text/html; charset=utf-8", INDEX))
        .route("/page.js", page("text/javascript; charset=utf-8", SCRIPT))
        .route("/page.css", page("text/css; charset=utf-8", STYLE))
        .route("/api/run", get(show))
        .route("/api/changes", get(changes))
        .with_state(run)
}

/// Nothing is loaded from elsewhere, and no other page may show this one.
fn asset(kind: &'static str, text: &'static str) -> impl IntoResponse {
    let policy = "default-src 'self'; style-src 'self' 'unsafe-inline'; frame-ancestors 'none'";
    let headers: [(HeaderName, &str); 3] = [
        (header::CONTENT_TYPE, kind),
        (header::CONTENT_SECURITY_POLICY, policy),
        (header::CACHE_CONTROL, "no-cache"),
    ];
    (headers, text)
}

#[derive(Debug, Deserialize)]
struct Wanted {
    /// The newest record that counts.
    until: Option<u64>,
}

async fn show(State(run): State<Arc<Run>>, Query(wanted): Query<Wanted>) -> impl IntoResponse {
    let seen = run.seen.read().unwrap_or_else(std::sync::PoisonError::into_inner);
    let until = wanted.until.unwrap_or(u64::MAX);
    let count = seen.entries.partition_point(|entry| entry.sequence <= until);
    let is_now = count == seen.entries.len();
    let liveness = (is_now && seen.is_led).then_some(&seen.liveness);
    let view = View::of(&run.about, &seen.entries[..count], seen.entries.last(), liveness);
    let text = serde_json::to_string(&view).expect("a view has a JSON form");
    ([(header::CONTENT_TYPE, "application/json"), (header::CACHE_CONTROL, "no-store")], text)
}

/// Says that there is news: an event whenever the run was looked at with another result than before.
async fn changes(
    State(run): State<Arc<Run>>,
) -> Sse<impl tokio_stream::Stream<Item = Result<Event, std::convert::Infallible>>> {
    let changes = WatchStream::new(run.changed.subscribe());
    Sse::new(changes.map(|count| Ok(Event::default().data(count.to_string()))))
        .keep_alive(KeepAlive::default())
}

impl Run {
    fn patience(&self) -> Duration {
        let seen = self.seen.read().unwrap_or_else(std::sync::PoisonError::into_inner);
        if seen.is_led { LOOK } else { AWAY }
    }

    /// Reads what is new.
    async fn look(&self, source: &Source) -> Result<()> {
        let (next, is_over) = {
            let seen = self.seen.read().unwrap_or_else(std::sync::PoisonError::into_inner);
            let last = seen.entries.last();
            let is_over = last.is_some_and(|entry| entry.record.ends_the_run());
            (last.map_or(1, |entry| entry.sequence + 1), is_over)
        };
        if is_over {
            return Ok(());
        }
        let found = source.read(next).await?;
        let mut seen = self.seen.write().unwrap_or_else(std::sync::PoisonError::into_inner);
        let is_led = found.coordinator.is_some();
        let is_news = !found.entries.is_empty()
            || is_led != seen.is_led
            || (is_led && found.liveness != seen.liveness);
        // Two looks that overlap would both bring an entry.
        let from = seen.entries.last().map_or(0, |entry| entry.sequence);
        seen.entries.extend(found.entries.into_iter().filter(|entry| entry.sequence > from));
        seen.liveness = found.liveness;
        seen.is_led = is_led;
        drop(seen);
        if is_news {
            self.changed.send_modify(|count| *count += 1);
        }
        Ok(())
    }
}
