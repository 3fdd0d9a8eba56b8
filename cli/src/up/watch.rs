//! Follows the event log through the coordinator, across its restarts.

use std::time::Duration;

use anyhow::Result;
use coordinator::Entry;
use proto::v1::{self, watch_response::Kind};
use tokio::sync::mpsc;
use tonic::Status;

use crate::client::{self, Client};

/// A coordinator that is away is tried again after so long.
const RETRY: Duration = Duration::from_millis(100);

/// What a watcher learns.
#[derive(Debug)]
pub(crate) enum News {
    /// The next entry of the log.
    Entry(Entry),
    /// How the workers are.
    Liveness(v1::Liveness),
    /// Watching makes no sense any more.
    Lost(anyhow::Error),
}

/// Sends the entries of the log after `last`, each once, until nobody listens.
pub(crate) async fn follow<T>(
    client: Client,
    mut last: u64,
    news: mpsc::Sender<T>,
    to_message: impl Fn(News) -> T,
) {
    loop {
        match follow_once(&client, &mut last, &news, &to_message).await {
            Ok(true) => {}
            Ok(false) => return,
            Err(lost) => {
                news.send(to_message(News::Lost(lost))).await.ok(); // Nobody may listen any more.
                return;
            }
        }
        tokio::time::sleep(RETRY).await;
    }
}

/// Returns whether to try again.
async fn follow_once<T>(
    client: &Client,
    last: &mut u64,
    news: &mpsc::Sender<T>,
    to_message: &impl Fn(News) -> T,
) -> Result<bool> {
    let mut stream = match client.watch(*last + 1).await {
        Ok(stream) => stream,
        Err(status) => return can_retry(status),
    };
    loop {
        let message = match stream.message().await {
            Ok(Some(message)) => message,
            Ok(None) => return Ok(true),
            Err(status) => return can_retry(status),
        };
        let told = match message.kind {
            Some(Kind::Entry(entry)) if entry.sequence <= *last => continue,
            Some(Kind::Entry(entry)) => {
                *last = entry.sequence;
                News::Entry(client::entry(&entry)?)
            }
            Some(Kind::Liveness(liveness)) => News::Liveness(liveness),
            None => continue,
        };
        if news.send(to_message(told)).await.is_err() {
            return Ok(false);
        }
    }
}

fn can_retry(status: Status) -> Result<bool> {
    if client::is_final(&status) { Err(anyhow::anyhow!("{}", status.message())) } else { Ok(true) }
}
