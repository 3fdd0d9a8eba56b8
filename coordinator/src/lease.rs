//! Takes and keeps the lease of a run in its store; [`cluster::Leadership`] has the rules.
//!
//! ```text
//! <run>/lease/0000000007        the claim of term 7, by conditional create
//! <run>/lease/0000000007.beat   written by its holder only, as long as it lives
//! ```

use std::time::Duration;

use checkpoint::{Created, Store, StoreError, create};
use cluster::{Claim, Due, Found, Leadership, Term, Timestamp};
use serde::{Deserialize, Serialize};
use tokio::{
    sync::watch,
    task::JoinHandle,
    time::{Instant, sleep, timeout},
};
use tracing::{debug, info, warn};

use crate::{Lease, StartError};

const FOLDER: &str = "lease";
const BEAT: &str = ".beat";

/// What lies under a claim's name.
#[derive(Debug, Serialize, Deserialize)]
struct Claimed {
    term: Term,
    holder: String,
    /// Drawn at random: tells one's own claim from another's.
    nonce: String,
}

/// What lies beside it.
#[derive(Debug, Default, Serialize, Deserialize)]
struct Beat {
    beat: u64,
    released: bool,
}

/// What is known of one's own leadership.
#[derive(Debug, Clone, Copy)]
struct View {
    assured_until: Option<Instant>,
    replaced_by: Option<Term>,
}

/// A lease that is held, and renewed in the background.
#[derive(Debug)]
pub(crate) struct Held {
    pub(crate) term: Term,
    view: watch::Receiver<View>,
    keeper: JoinHandle<()>,
    store: Store,
}

/// Lets others know whether the lease is still held. Cheap to clone.
#[derive(Debug, Clone)]
pub(crate) struct Assurance(watch::Receiver<View>);

struct Contender {
    store: Store,
    lease: Duration,
    rules: Leadership,
    holder: String,
    nonce: String,
    started: Instant,
    newest: Option<Term>,
}

/// Waits until this process leads the run in `store`.
///
/// # Errors
/// [`StartError::Led`] if another leads and this one is not to stand by.
pub(crate) async fn take(store: Store, lease: &Lease, nonce: String) -> Result<Held, StartError> {
    let started = Instant::now();
    let mut contender = Contender {
        rules: Leadership::new(Timestamp(0), &lease.holder, lease.lasts),
        lease: lease.lasts,
        holder: lease.holder.clone(),
        store: store.clone(),
        nonce,
        started,
        newest: None,
    };
    let mut first: Option<Claim> = None;
    let term = loop {
        contender.turn().await;
        if let Some(term) = contender.rules.term() {
            break term;
        }
        if let Some(claim) = contender.rules.other() {
            let first = first.get_or_insert_with(|| {
                info!(holder = claim.holder, term = %claim.term, "another coordinator leads, or did");
                claim.clone()
            });
            if !lease.standby && claim != first {
                let (holder, term) = (claim.holder.clone(), claim.term);
                return Err(StartError::Led {
                    location: store.location().to_owned(),
                    holder,
                    term,
                });
            }
        }
    };
    let elapsed_ms = started.elapsed().as_millis();
    info!(%term, holder = lease.holder, elapsed_ms, "the lease is taken");
    let (sender, view) = watch::channel(contender.view());
    let keeper = tokio::spawn(contender.keep(sender));
    Ok(Held { term, view, keeper, store })
}

impl Held {
    pub(crate) fn assurance(&self) -> Assurance {
        Assurance(self.view.clone())
    }

    /// Lays the lease down, so that nobody waits for it to run out.
    pub(crate) async fn release(mut self) {
        self.keeper.abort();
        drop((&mut self.keeper).await); // Aborted: it writes no beat any more.
        let beat = u64::MAX;
        let name = format!("{FOLDER}/{:010}{BEAT}", self.term.0);
        let written = self.store.replace(&name, json(&Beat { beat, released: true }));
        match timeout(Duration::from_secs(1), written).await {
            Ok(Ok(())) => {}
            Ok(Err(error)) => warn!(%error, "the lease could not be laid down: it runs out"),
            Err(_) => warn!("the lease could not be laid down: it runs out"),
        }
    }
}

impl Drop for Held {
    fn drop(&mut self) {
        self.keeper.abort();
    }
}

impl Assurance {
    /// Returns when nobody had claimed a newer term a moment ago; looks again before if that is too long
    /// ago, and waits as long as the store does not say.
    ///
    /// # Errors
    /// [`StartError::Superseded`] if somebody has.
    pub(crate) async fn assured(&mut self) -> Result<(), StartError> {
        let is_clear = |view: &View| {
            view.replaced_by.is_some() || view.assured_until.is_some_and(|u| Instant::now() < u)
        };
        match self.0.wait_for(is_clear).await.map(|view| view.replaced_by) {
            Ok(Some(by)) => Err(StartError::Superseded { by }),
            Ok(None) | Err(_) => Ok(()), // Without a keeper the lease was laid down: all is done.
        }
    }

    /// Returns when somebody has claimed a newer term.
    pub(crate) async fn lost(&mut self) -> StartError {
        let replaced = self.0.wait_for(|view| view.replaced_by.is_some()).await;
        match replaced.map(|view| view.replaced_by) {
            Ok(by) => StartError::Superseded { by: by.unwrap_or_default() },
            Err(_) => std::future::pending().await, // As above.
        }
    }
}

impl Contender {
    fn now(&self) -> Timestamp {
        Timestamp(0) + self.started.elapsed()
    }

    fn view(&self) -> View {
        let replaced_by = match self.rules.due(self.now()) {
            Due::Stop { by } => Some(by),
            Due::Wait(_) | Due::Look | Due::Claim(_) | Due::Renew { .. } => None,
        };
        let until = self.rules.assured_until();
        let assured_until = until.map(|until| self.started + until.since(Timestamp(0)));
        View { assured_until, replaced_by }
    }

    /// Renews until another leads.
    async fn keep(mut self, view: watch::Sender<View>) {
        loop {
            self.turn().await;
            let seen = self.view();
            view.send_replace(seen);
            if let Some(by) = seen.replaced_by {
                warn!(term = %by, "another coordinator leads: this one has been replaced");
                std::future::pending::<()>().await; // Until the host has ended.
            }
        }
    }

    /// Does what is due, or waits for it.
    async fn turn(&mut self) {
        let began = self.now();
        let doing = match self.rules.due(began) {
            Due::Wait(until) => {
                return sleep(until.since(began).max(Duration::from_millis(1))).await;
            }
            Due::Stop { .. } => return,
            due @ (Due::Look | Due::Claim(_) | Due::Renew { .. }) => self.carry_out(due, began),
        };
        let found = match timeout(self.lease / 2, doing).await {
            Ok(Ok(found)) => found,
            Ok(Err(error)) => {
                warn!(%error, "the lease cannot be looked after; it is tried again");
                Found::Unknown
            }
            Err(_) => {
                warn!("the store does not answer in time; the lease is tried again");
                Found::Unknown
            }
        };
        if let Found::Newest(Some(claim)) = &found {
            self.newest = Some(claim.term);
        }
        debug!(?found, "lease");
        self.rules.handle(self.now(), found);
    }

    async fn carry_out(&self, due: Due, began: Timestamp) -> Result<Found, StoreError> {
        match due {
            Due::Look => self.newest_claim().await.map(Found::Newest),
            Due::Claim(term) => {
                let (holder, nonce) = (self.holder.clone(), self.nonce.clone());
                let claimed = json(&Claimed { term, holder, nonce });
                let created = create(&self.store, &claim_name(term), claimed).await?;
                Ok(Found::Claimed { term, ours: created == Created::Ours })
            }
            Due::Renew { term, beat } => {
                let name = format!("{}{BEAT}", claim_name(term));
                self.store.replace(&name, json(&Beat { beat, released: false })).await?;
                match self.store.read(&claim_name(term.next())).await {
                    Ok(_) => Ok(Found::Superseded { by: term.next() }),
                    Err(error) if error.is_not_found() => Ok(Found::Renewed { began }),
                    Err(error) => Err(error),
                }
            }
            Due::Wait(_) | Due::Stop { .. } => Ok(Found::Unknown),
        }
    }

    async fn newest_claim(&self) -> Result<Option<Claim>, StoreError> {
        let mut term = match self.newest {
            Some(term) => term,
            None => {
                let names = self.store.names_after(FOLDER, "").await?;
                match names.iter().filter_map(|name| name.parse().ok()).max() {
                    Some(newest) => Term(newest),
                    None => return Ok(None),
                }
            }
        };
        let mut claim = self.store.read(&claim_name(term)).await?;
        loop {
            match self.store.read(&claim_name(term.next())).await {
                Ok(newer) => (term, claim) = (term.next(), newer),
                Err(error) if error.is_not_found() => break,
                Err(error) => return Err(error),
            }
        }
        let beat = match self.store.read(&format!("{}{BEAT}", claim_name(term))).await {
            Ok(bytes) => serde_json::from_slice(&bytes).unwrap_or_default(),
            Err(error) if error.is_not_found() => Beat::default(),
            Err(error) => return Err(error),
        };
        // A claim that cannot be read is somebody's: its beat, or its standing still, decides.
        let holder =
            serde_json::from_slice::<Claimed>(&claim).map(|c| c.holder).unwrap_or_default();
        let Beat { beat, released } = beat;
        Ok(Some(Claim { term, holder, beat, released }))
    }
}

fn claim_name(term: Term) -> String {
    format!("{FOLDER}/{:010}", term.0)
}

fn json(value: &impl Serialize) -> bytes::Bytes {
    serde_json::to_vec(value).expect("it holds only plain values").into()
}
