//! Where a cloud tells a machine that it will be taken away, asked again and again.

use std::time::Duration;

use anyhow::{Context as _, Result};
use clap::ValueEnum;
use reqwest::{Client, RequestBuilder, StatusCode};
use serde::Deserialize;
use tokio::{
    sync::mpsc,
    time::{MissedTickBehavior, interval},
};
use tracing::warn;

/// The clouds give 30 s (Google, Azure) to 120 s (Amazon).
const ASK_INTERVAL: Duration = Duration::from_secs(2);
const ANSWER_MAX: Duration = Duration::from_secs(2);
/// The address of a machine's own cloud, in all three.
const METADATA: &str = "http://169.254.169.254";
const TOKEN_SECONDS: &str = "21600";

/// Whose notices are asked for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum Cloud {
    /// Amazon EC2: interruption notices of spot instances.
    Aws,
    /// Google Compute Engine: preemption, and maintenance that ends the machine.
    Gcp,
    /// Microsoft Azure: scheduled events that end or restart the machine.
    Azure,
}

/// Asks in the background.
#[derive(Debug)]
pub(super) struct Watch {
    notices: mpsc::Receiver<String>,
}

impl Watch {
    /// The notice; there is only one.
    pub(super) async fn next(&mut self) -> String {
        match self.notices.recv().await {
            Some(notice) => notice,
            None => std::future::pending().await,
        }
    }
}

/// Begins to ask `cloud`, at `url` instead of its own address if there is one.
pub(super) fn watch(cloud: Cloud, url: Option<&str>) -> Result<Watch> {
    // A proxy would ask its own machine.
    let client = Client::builder().timeout(ANSWER_MAX).no_proxy().build();
    let client = client.context("no HTTP client")?;
    let mut metadata = Metadata {
        client,
        base: url.unwrap_or(METADATA).trim_end_matches('/').to_owned(),
        token: None,
    };
    let (found, notices) = mpsc::channel(1);
    tokio::spawn(async move {
        let mut tick = interval(ASK_INTERVAL);
        tick.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let mut silent = false;
        loop {
            tick.tick().await;
            match metadata.ask(cloud).await {
                Ok(Some(notice)) => {
                    drop(found.send(notice).await); // The guard may be ending.
                    return;
                }
                Ok(None) => silent = false,
                Err(error) if !silent => {
                    warn!(
                        "the cloud cannot be asked whether this machine will be taken away: {error:#}"
                    );
                    silent = true;
                }
                Err(_) => {} // Said already.
            }
        }
    });
    Ok(Watch { notices })
}

struct Metadata {
    client: Client,
    base: String,
    /// Amazon wants one.
    token: Option<String>,
}

#[derive(Deserialize)]
struct InstanceAction {
    action: String,
    #[serde(default)]
    time: String,
}

#[derive(Deserialize)]
#[serde(rename_all = "PascalCase")]
struct ScheduledEvents {
    #[serde(default)]
    events: Vec<ScheduledEvent>,
}

#[derive(Deserialize)]
#[serde(rename_all = "PascalCase")]
struct ScheduledEvent {
    event_type: String,
    #[serde(default)]
    not_before: String,
}

impl Metadata {
    /// The notice, if there is one.
    async fn ask(&mut self, cloud: Cloud) -> Result<Option<String>> {
        match cloud {
            Cloud::Aws => self.ask_aws().await,
            Cloud::Gcp => self.ask_gcp().await,
            Cloud::Azure => self.ask_azure().await,
        }
    }

    async fn ask_aws(&mut self) -> Result<Option<String>> {
        let token = match self.token.take() {
            Some(token) => token,
            None => {
                let put = self.client.put(format!("{}/latest/api/token", self.base));
                let put = put.header("X-aws-ec2-metadata-token-ttl-seconds", TOKEN_SECONDS);
                text(put).await?.context("there is no token")?
            }
        };
        let action = self.get("/latest/meta-data/spot/instance-action");
        // A token that is too old is an error, and the next question begins with a new one.
        let answer = text(action.header("X-aws-ec2-metadata-token", &token)).await?;
        self.token = Some(token);
        let Some(answer) = answer else { return Ok(None) };
        let InstanceAction { action, time } =
            serde_json::from_str(&answer).with_context(|| format!("{answer:?} is no notice"))?;
        Ok(Some(format!("EC2 will {action} this instance at {time}")))
    }

    async fn ask_gcp(&self) -> Result<Option<String>> {
        let value = async |name: &str| {
            let get = self.get(&format!("/computeMetadata/v1/instance/{name}"));
            anyhow::Ok(text(get.header("Metadata-Flavor", "Google")).await?.unwrap_or_default())
        };
        if value("preempted").await?.trim() == "TRUE" {
            return Ok(Some("Compute Engine preempts this machine".to_owned()));
        }
        let event = value("maintenance-event").await?;
        let ends = event.trim() == "TERMINATE_ON_HOST_MAINTENANCE";
        Ok(ends.then(|| "Compute Engine ends this machine for maintenance".to_owned()))
    }

    async fn ask_azure(&self) -> Result<Option<String>> {
        let get = self.get("/metadata/scheduledevents?api-version=2020-07-01");
        let answer = text(get.header("Metadata", "true")).await?.unwrap_or_default();
        if answer.trim().is_empty() {
            return Ok(None);
        }
        let ScheduledEvents { events } = serde_json::from_str(&answer)
            .with_context(|| format!("{answer:?} is no list of events"))?;
        let ends = |event: &&ScheduledEvent| {
            ["Preempt", "Terminate", "Reboot", "Redeploy"].contains(&event.event_type.as_str())
        };
        Ok(events.iter().find(ends).map(|ScheduledEvent { event_type, not_before }| {
            format!("Azure: {event_type} not before {not_before}")
        }))
    }

    fn get(&self, path: &str) -> RequestBuilder {
        self.client.get(format!("{}{path}", self.base))
    }
}

/// What is answered; nothing if there is no such thing.
async fn text(request: RequestBuilder) -> Result<Option<String>> {
    let response = request.send().await?;
    if response.status() == StatusCode::NOT_FOUND {
        return Ok(None);
    }
    Ok(Some(response.error_for_status()?.text().await?))
}

#[cfg(test)]
mod tests;
